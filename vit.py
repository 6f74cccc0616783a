"""A Vision Transformer for one small image, written out; and what every training loop shares.

Part 1, the network (read this first):   Attention -> Block -> ViT -> ModelM, Contrastive, Classifier
Part 2, the optimiser:                   Muon, which learns faster than AdamW here; the schedule
Part 3, the plumbing (may be skipped):   device and precision, files, checkpoints, Run, the command line

Depends on torch alone (a training Run also on tqdm): copy this file and use `ViT` in your own code.

    python vit.py                  # prints the network, layer by layer

Papers: Vaswani et al. 2017 (attention), Dosovitskiy et al. 2021 (ViT), Xiong et al. 2020 (pre-norm), Jordan
et al. 2024 (Muon; kellerjordan.github.io/posts/muon), Liu et al. 2025 (its step's length; arXiv 2502.16982).
Shape letters everywhere: B batch, T tokens = 1 + N, N patches, D width, H heads, K classes, P patch size, S
image size in pixels, C channels (in video.py: clips).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import shlex
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------- Part 1: the network


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, equation 1 and section 3.2.2).

    Every token asks a question (query), says what it is about (key) and carries a message (value). A token's
    output is the average of all messages, weighted by how well their keys answer its question:

        attention(Q, K, V) = softmax(Q K^T / sqrt(D / H)) V

    H heads do this side by side, each in its own D / H dimensions, so that a token can look for H things.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} can't be shared out evenly among {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)  # three projections side by side: one big matmul is faster
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, T, D] -> attended tokens [B, T, D], attention weights [B, H, T, T] (rows sum to one)."""
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)  # [B, T, 3, H, D/H]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D/H]
        # without the scale the scores' variance grows with D/H, the softmax saturates, its gradient vanishes
        scores = q @ k.transpose(-2, -1) * (D // self.heads) ** -0.5  # [B, H, T, T]
        weights = scores.softmax(dim=-1)
        out = weights @ v  # [B, H, T, D/H]
        out = out.transpose(1, 2).reshape(B, T, D)  # [B, T, H, D/H] -> [B, T, D]
        return self.proj(out), weights


class Block(nn.Module):
    """One pre-norm transformer block: attention mixes tokens, then an MLP works on each token by itself.

        x = x + attention(norm(x))
        x = x + mlp(norm(x))

    The path from input to output has no norm on it (pre-norm). With a norm after each sum (post-norm, as in
    Vaswani et al.) the gradients near the output are large at initialisation, so that training needs a long
    warm-up or diverges; with pre-norm it does not (Xiong et al. 2020). The MLP is four times as wide inside.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, trace: list | None = None) -> Tensor:
        """x: [B, T, D] -> [B, T, D].

        `trace`, for CKA and pictures, is a list that receives one dict per block: the residual stream
        "before" the attention, "attended" (after its residual sum) and "after" the block, each [B, T, D], and
        the attention "weights" [B, H, T, T].
        """
        update, weights = self.attn(self.norm1(x))
        attended = x + update
        out = attended + self.mlp(self.norm2(attended))
        if trace is not None:
            trace.append({"before": x, "attended": attended, "after": out, "weights": weights})
        return out


class ViT(nn.Module):
    """Vision Transformer encoder (Dosovitskiy et al. 2021, equations 1-4): an image as a sentence of patches.

    The image is cut into N = (S / P)^2 patches; each becomes one token by a linear map; a learned CLS token
    is put in front, where it collects what describes the whole image; learned positions are added, since
    attention by itself doesn't know where a token came from.

    The default is as large as a laptop trains in minutes: 16 patches (the report's), 17 tokens, width 128, 6
    blocks, 4 heads of 32 dimensions, 1.2 M parameters. Smaller patches bring much, at four times the cost.
    """

    def __init__(self, image_size=32, patch_size=8, dim=128, depth=6, heads=4, channels=3):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image size {image_size} is not a whole number of {patch_size}-pixel patches")
        self.config = {"image_size": image_size, "patch_size": patch_size, "dim": dim, "depth": depth}
        self.config |= {"heads": heads, "channels": channels}
        self.patches = (image_size // patch_size) ** 2
        # a convolution whose stride is its kernel size = the same linear map applied to every patch
        self.patch_embedding = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, 1 + self.patches, dim))
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        nn.init.trunc_normal_(self.cls, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.apply(init_linear)

    def embed(self, images: Tensor) -> Tensor:
        """What the first block reads: images [B, C, S, S] in [0, 1] -> tokens [B, 1 + N, D], CLS first.
        Raises ValueError for images of another size than the encoder was made for."""
        size, channels = self.config["image_size"], self.config["channels"]
        if images.shape[1:] != (channels, size, size):
            raise ValueError(f"images {list(images.shape)} are not [B, {channels}, {size}, {size}]")
        x = self.patch_embedding(standardise(images))  # [B, D, S/P, S/P]
        x = x.flatten(2).transpose(1, 2)  # [B, N, D], row by row
        cls = self.cls.expand(len(x), -1, -1)  # [B, 1, D]
        return torch.cat([cls, x], dim=1) + self.positions  # [B, 1 + N, D]

    def forward(self, images: Tensor, trace: list | None = None) -> Tensor:
        """images: [B, C, S, S] in [0, 1] -> tokens [B, 1 + N, D]; token 0 is CLS. `trace`: see Block."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x, trace)
        return self.norm(x)


def standardise(images: Tensor) -> Tensor:
    """Pixel values in [0, 1] -> about zero mean and unit spread (CIFAR-10's own are 0.47 and 0.25)."""
    return (images - 0.5) / 0.25


def init_linear(module: nn.Module) -> None:
    """Small weights and zero biases in linear layers, as timm's and DeiT's ViTs start (nn.Module.apply)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class ModelM(nn.Module):
    """Model M: an encoder with two heads that need no labels.

    Some patches were blacked out, some others all turned by one angle (data.patch_augment). The rotation head
    reads the angle from CLS; the reconstruction head paints each blacked-out patch from that patch's token.
    """

    def __init__(self, encoder: ViT):
        super().__init__()
        dim, patch, channels = (encoder.config[key] for key in ("dim", "patch_size", "channels"))
        self.encoder = encoder
        self.rotation_head = nn.Linear(dim, 4)  # 0, 90, 180, 270 degrees
        self.reconstruction_head = nn.Linear(dim, channels * patch * patch)

    def forward(self, images: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, C, S, S], indices of the masked patches [B, M] -> angle logits [B, 4], standardised
        pixels [B, M, C*P*P]."""
        tokens = self.encoder(images)  # [B, 1 + N, D]
        cls, patches = tokens[:, 0], tokens[:, 1:]  # [B, D], [B, N, D]
        index = masked[:, :, None].expand(-1, -1, patches.shape[-1])  # [B, M, D]
        return self.rotation_head(cls), self.reconstruction_head(patches.gather(1, index))


class Contrastive(nn.Module):
    """InfoNCE's model: an encoder, and a projector between its CLS token and the loss.

    The loss asks that views of an image look alike, so whatever tells them apart (colour, place) is to be
    forgotten. The projector, an MLP that is thrown away afterwards, forgets it, so that the encoder need not
    (SimCLR, section 4.2). 512 is the width of our MLPs at D = 128; neither number was tuned.
    """

    def __init__(self, encoder: ViT):
        super().__init__()
        self.encoder = encoder
        self.projector = nn.Sequential(nn.Linear(encoder.config["dim"], 512), nn.ReLU(), nn.Linear(512, 128))

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, C, S, S] -> [B, 128]."""
        return self.projector(self.encoder(images)[:, 0])


class Classifier(nn.Module):
    """An encoder and a linear layer on its CLS token."""

    def __init__(self, encoder: ViT, classes: int = 10):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config["dim"], classes)

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, C, S, S] -> class logits [B, K]."""
        return self.head(self.encoder(images)[:, 0])


# ---------------------------------------------------------------- Part 2: the optimiser
# A weight matrix is not a list of numbers: it is a map, and turns some directions of its input into some
# directions of its output. Its gradient says which of these turns would lower the loss. Write that gradient
# (or its running mean, the momentum) as a sum over directions, its singular value decomposition:
#
#     M = U S V^T = sum over k of  s_k u_k v_k^T
#
# Usually a few s_k are large and all others tiny (Jordan et al.): what all images agree on drowns what some
# could teach. AdamW doesn't see this, as it scales every entry of M by itself. Muon steps along
#
#     U V^T = sum over k of  u_k v_k^T
#
# the same directions, every one equally far. (If M is the gradient: of all steps whose largest singular value
# is 1, the one that lowers the loss most, to first order.) The SVD itself is slow and hard to do in parallel.
# But
#
#     X X^T X = U S V^T  V S U^T  U S V^T = U S^3 V^T,        as U^T U = V^T V = 1
#
# so an odd polynomial of a matrix is that polynomial of its singular values:
#
#     p(X) = a X + b (X X^T) X + c (X X^T)^2 X = U p(S) V^T,        p(s) = a s + b s^3 + c s^5
#
# and if p, applied again and again, drives every s in (0, 1] towards 1, it will do; each time costs three
# matrix products. The textbook one of this degree, (15, -10, 3) / 8, converges to 1 but starts slowly (p(s) =
# 1.9 s for small s). Jordan's coefficients were searched for a steep start: 3.4 s. Five times bring every s
# above 0.002 to between 0.7 and 1.2: fast, at the price of not ending at 1.
#
# Muon is for matrices inside the network. AdamW keeps what is no such map: biases and norms (vectors), CLS
# and positions (tables of vectors), and the heads, each of whose outputs has a meaning of its own. Jordan et
# al. leave the input layer to AdamW, too; ours, the patch embedding, is a map from pixels like any other.


def orthogonalise(matrices: Tensor) -> Tensor:
    """U V^T of every matrix U S V^T, nearly: [n, rows, columns] -> the same, singular values about 1 (Jordan
    et al. 2024: coefficients, five iterations). With rows <= columns the products are smaller."""
    a, b, c = 3.4445, -4.7750, 2.0315
    # no singular value exceeds the Frobenius norm, so all are in [0, 1] now; 1e-7: a gradient may be zero
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT  # [n, rows, rows]
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + polynomial x, [n, rows, columns]
    return x


class Muon(torch.optim.AdamW):
    """MomentUm Orthogonalized by Newton-Schulz (Jordan et al. 2024), for the matrices inside a network:

        M <- momentum M + (1 - momentum) gradient
        W <- W - lr decay W - lr 0.2 sqrt(max(rows, columns)) U V^T

    U and V^T are those of M one step ahead, momentum M + (1 - momentum) gradient once more (Nesterov). A
    momentum of 0.95, a mean over about twenty steps, is Jordan's choice. An entry of U V^T is about 1 /
    sqrt(max(rows, columns)) large; the factor in front makes it 0.2, about the root mean square of an AdamW
    step's entries (Liu et al. 2025, section 2.2), so that the two can share a learning rate and a decay.

    Parameter groups with the key `parts` are stepped by Muon, all others by AdamW. `parts` says how many
    matrices, each a map of its own, lie on top of each other in a weight (a qkv: 3). A weight of more axes is
    one matrix, too: a patch embedding [D, C, P, P] is [D, C*P*P]. `precision`: of the iterations.
    """

    def __init__(self, groups, lr, momentum=0.95, precision=torch.float32, **adamw):
        super().__init__(groups, lr, **adamw)
        self.momentum, self.precision = momentum, precision

    def step(self):
        """Move every weight that has a gradient."""
        every = self.param_groups
        self.step_matrices([group for group in every if "parts" in group])
        self.param_groups = [group for group in every if "parts" not in group]
        super().step()
        self.param_groups = every

    @torch.no_grad()
    def step_matrices(self, groups: list[dict]) -> None:
        """Muon's part. Matrices of one shape are iterated together: few large products, not many small."""
        alike = {}  # shape, scale -> (weight, direction) of all matrices that have these
        for group in groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                if not self.state[p]:  # under AdamW's names, as AdamW loads them again from a checkpoint
                    self.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p)}
                mean = self.state[p]["exp_avg"].lerp_(p.grad, 1 - self.momentum)
                ahead = p.grad.lerp(mean, self.momentum)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                matrices = [x.view(len(p), -1).chunk(group["parts"]) for x in (p, ahead)]
                for w, d in zip(*matrices):  # [rows, columns] each
                    scale = group["lr"] * 0.2 * max(w.shape) ** 0.5
                    if len(w) > w.shape[1]:
                        w, d = w.T, d.T  # lay it down; w is still a view of the weight
                    alike.setdefault((d.shape, scale), []).append((w, d))
        for (_, scale), pairs in alike.items():
            weights, directions = zip(*pairs)
            steps = orthogonalise(torch.stack(directions).to(self.precision)).float()  # [n, rows, columns]
            for w, step in zip(weights, steps):
                w.sub_(step, alpha=scale)


# the weights inside a network, by where they are: in our blocks, in BLIP's layers, in CLIP's resblocks
INSIDE = re.compile(r"(^|\.)(blocks?|temporals?|layers?|resblocks|patch_embedding)\.")
PARTS = {".qkv.weight": 3, ".in_proj_weight": 3, ".kv.weight": 2}  # several matrices on top of each other
# of these, rows are looked up, not multiplied
TABLES = re.compile(r"(^|\.)(cls|positions)$|(class|position|positional|word|token)_embedding")


def make_optimizer(model: nn.Module, kind: str, lr: float, weight_decay: float, precision: str = "float32"):
    """A model's optimiser, "muon" or "adamw" (for all weights); `precision`: of Muon's iterations. Any other,
    say `torch.optim.SGD(model.parameters(), lr)`, may stand in place of the call.

    Weight decay pulls matrices towards zero, so that what no image asks for is forgotten; biases, norms, CLS
    and positions have no reason to be small. 0.05 is DeiT's (Touvron et al. 2021); AdamW's second beta of
    0.99 forgets old gradients within a hundred steps, as short trainings need. Neither was tuned.
    """
    inside, matrices, others = {}, [], []  # inside: how many matrices a weight is -> such weights
    for name, p in model.named_parameters():
        if p.ndim < 2 or TABLES.search(name):
            others.append(p)
        elif kind == "muon" and INSIDE.search(name):
            parts = next((n for end, n in PARTS.items() if name.endswith(end)), 1)
            inside.setdefault(parts, []).append(p)
        else:
            matrices.append(p)
    if kind == "muon" and not inside:
        raise ValueError("no weight's name says that Muon is for it; extend vit.INSIDE, or choose adamw")
    groups = [{"params": weights, "parts": n, "weight_decay": weight_decay} for n, weights in inside.items()]
    groups += [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr, betas=(0.9, 0.99), fused=True)
    return Muon(groups, lr, precision=getattr(torch, precision), betas=(0.9, 0.99), fused=True)


def triangle(step: int, total: int, warmup: float) -> float:
    """The share of the peak learning rate in step 0, 1, ... of `total`: a line up over the first share
    `warmup`, while the optimiser's running means hold too few gradients; then a line down to zero, as a
    network that takes full steps to the end is still thrown about when it is stopped (Defazio et al. 2023,
    arXiv 2310.07831; half a cosine down is a point or two worse in short trainings, results/tuning.md)."""
    rise = warmup * total
    up, down = (step + 1) / (rise + 1), (total - step) / max(1, total - rise)
    return max(0.0, min(up, down))


def fit_linear(x: Tensor, y: Tensor, decay: float, classes: int = 10) -> nn.Linear:
    """Multinomial logistic regression of labels y [n] on features x [n, D]. The problem is convex, so L-BFGS
    on all images at once heads for the one answer, with no learning rate to choose."""
    layer = nn.Linear(x.shape[1], classes, device=x.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        """The loss, and its gradient, wherever L-BFGS' line search looks."""
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(x), y) + decay * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return layer


# ---------------------------------------------------------------- Part 3: the plumbing
# Nothing below is about transformers, and none of it is needed to understand a training loop. Several
# processes, one per GPU, under PyTorch's launcher torchrun: data.py hands each its part of every batch,
# `average_gradients` makes one gradient of theirs, and InfoNCE, whose negatives are all other images, needs
# `gather`. Only process 0 prints and writes.

UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ  # some clusters set the other two for any process
RANK = int(os.environ["RANK"]) if UNDER_TORCHRUN else 0
PROCESSES = int(os.environ["WORLD_SIZE"]) if UNDER_TORCHRUN else 1


def set_up(args: argparse.Namespace):
    """Choose device and precision where they are "auto", and write them into args; seed what draws initial
    weights -> the device, and a context in which matmuls run in that precision. SystemExit where the device
    can't be used. bfloat16 is 2 to 3 times faster on CPUs that compute in it, up to 30 times slower on all
    others; a GPU gains little: launching the kernels of so small a network takes longer than computing."""
    if args.device == "auto":
        there = torch.accelerator.is_available()
        args.device = torch.accelerator.current_accelerator().type if there else "cpu"
    where = f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" and PROCESSES > 1 else args.device
    try:
        device = (torch.zeros(1, device=where) + 1).device  # + 1: a GPU too old fails at its first kernel
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"the device {where!r} can't be used ({str(error).splitlines()[0]}); try --device cpu")
    if PROCESSES > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.precision == "auto":
        cpuinfo = pathlib.Path("/proc/cpuinfo")  # Linux's
        flags = cpuinfo.read_text() if device.type == "cpu" and cpuinfo.exists() else ""
        args.precision = "bfloat16" if re.search("amx_bf16|avx512_bf16", flags) else "float32"
    torch.manual_seed(args.seed)  # what is drawn in training comes from the run's own generator
    print(f"{args.device}, {args.precision}, torch {torch.__version__}, seed {args.seed}", flush=True)
    if args.precision == "float32":
        return device, contextlib.nullcontext()  # not every device knows autocast, even disabled
    return device, torch.autocast(device.type, torch.bfloat16)


def average_gradients(model: nn.Module) -> None:
    """Give every process of torchrun the mean of all processes' gradients."""
    if PROCESSES > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = nn.utils.parameters_to_vector(gradients)  # one message instead of a hundred
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat / PROCESSES, gradients)


def gather(x: Tensor) -> Tensor:
    """The parts x [B, ...] of all processes, joined; each part's gradient is the sum of all processes'."""
    if PROCESSES == 1:
        return x
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x.contiguous()))


@torch.no_grad()
def evaluate(model: nn.Module, autocast, function, *inputs: Tensor) -> Tensor:
    """function(a batch of each input), where nothing is learned: inputs [n, ...] -> [n, ...], float32."""
    model.eval()
    found = []
    for batch in zip(*(x.split(250) for x in inputs)):  # so few stay in a CPU's cache
        with autocast:
            found.append(function(*batch).float())
    return torch.cat(found)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of logits [n, K] whose largest entry is the label [n]."""
    return (logits.argmax(dim=1) == labels).float().mean().item()


@contextlib.contextmanager
def whole_file(path: str | pathlib.Path):
    """Of a file, write all or nothing: what a kill or a full disk leaves would be taken for a whole one."""
    buffer, path = io.BytesIO(), pathlib.Path(path)
    yield buffer
    if RANK > 0:
        return
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        sys.exit(f"can't write {path}: {error.strerror}; make room or choose another --out, then try again")


def hash_of(*pieces: bytes | Tensor) -> str:
    """A short hash, to tell whether two contents are the same."""
    pieces = [x.cpu().numpy().tobytes() if torch.is_tensor(x) else x for x in pieces]
    return hashlib.sha256(b"".join(pieces)).hexdigest()[:12]


def read_checkpoint(path: str | pathlib.Path) -> dict:
    """The contents of a checkpoint written by `Run`; SystemExit with one sentence where the file is none.
    `weights_only` keeps a foreign file from running code: it admits only tensors and plain Python values."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {key: state[key] for key in ("model", "config", "epoch", "recipe")} | state
    except Exception as error:  # torch.load raises many kinds on a file that isn't its own
        why = "there is no" if isinstance(error, FileNotFoundError) else "damaged, or no"
        sys.exit(f"{path}: {why} checkpoint; a stage makes one, `python ssl.py pretrain` the first")


def load_encoder(path: str | pathlib.Path, size: int | None = None) -> ViT:
    """The encoder in a checkpoint of any stage. SystemExit where there is none, or not for images of `size`
    pixels (None: any will do)."""
    state = read_checkpoint(path)
    if not state["config"]:
        sys.exit(f"{path} holds a model of another library, not an encoder of this project")
    encoder, has = ViT(**state["config"]), state["config"]["image_size"]
    if size not in (None, has):
        sys.exit(f"the encoder in {path} reads images of {has}x{has} pixels, not {size}x{size}")
    own = [name for name in state["model"] if name.startswith(("encoder.", "video.encoder."))]
    encoder.load_state_dict({name.split("encoder.", 1)[1]: state["model"][name] for name in own})
    return encoder


def recipe_of(args: argparse.Namespace, images: Tensor, labels: Tensor, start: str | None = None) -> dict:
    """What makes a run what it is: its options, less those that leave the weights alone; the training images
    and the weights in the checkpoint `start`, by their contents, not by their names; and the code."""
    left_out = "run out name split fresh keep_epochs data init checkpoint captions".split()
    recipe = {key: value for key, value in vars(args).items() if key not in left_out}
    weights = read_checkpoint(start)["model"].values() if start else ()
    return recipe | {"images": hash_of(images, labels), "start": hash_of(*weights), "code": hash_of_code()}


def hash_of_code() -> str:
    """A short hash of all .py files of this folder that are in use."""
    used = {os.path.abspath(getattr(module, "__file__", None) or "") for module in [*sys.modules.values()]}
    here = pathlib.Path(os.path.abspath(__file__)).parent
    return hash_of(*(file.read_bytes() for file in sorted(here.glob("*.py")) if str(file) in used))


class Run:
    """One training run, which can be stopped at any moment and goes on when the same command is typed again:
    it is loaded from out/NAME.pt, if there is one, and `epoch` says how many epochs are done. Then it draws
    the same numbers as one that was not interrupted; on a CPU its weights are the same bit by bit. With
    another `recipe` it is another run, and refused; `steps`: of an epoch. To stop early, `break` at the top
    of an epoch by what `history` says, which a resumed run has, too."""

    def __init__(self, args, name: str, model: nn.Module, optimizer, schedule, steps: int, recipe: dict):
        from tqdm import tqdm

        self.args, self.name, self.model = args, name, model
        self.optimizer, self.schedule, self.recipe = optimizer, schedule, recipe
        self.path = pathlib.Path(args.out, f"{name}.pt")
        self.generator = torch.Generator(next(model.parameters()).device).manual_seed(args.seed)
        self.epoch, self.seconds, self.history = 0, 0.0, {}  # of finished epochs; metric -> its means
        if not steps:
            sys.exit(f"{name}: the images are too few for one step; choose a smaller batch or more images")
        size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{name}: {size:,} trainable parameters, {args.epochs} epochs of {steps} steps", flush=True)
        if args.fresh:  # now, else a stop in the first epoch would bring the old run back
            self.path.unlink(missing_ok=True)
        if self.path.exists():
            self.resume()
        left = (args.epochs - self.epoch) * steps
        self.progress = tqdm(total=left, desc=name, leave=False, disable=RANK > 0 or None, mininterval=1)
        self.sums, self.batches, self.started = {}, 0, time.perf_counter()  # of the epoch so far

    def resume(self) -> None:
        """Go on from the checkpoint of an earlier start of this run; SystemExit where it was another run."""
        state = read_checkpoint(self.path)
        finished = state["epoch"] >= self.args.epochs
        for key, before in state["recipe"].items():  # an option that only one of the two has is not compared
            if (now := self.recipe.get(key, before)) != before:
                other = f"{self.path} was made with another {key}: {before!r}, not {now!r}"
                if not finished or key not in ("code", "device", "precision"):
                    sys.exit(f"{other}; add --fresh to start over, or choose another --name")
                print(f"{other}; --fresh trains anew")
        self.model.load_state_dict(state["model"])
        self.epoch, self.seconds, self.history = state["epoch"], state["seconds"], state["history"]
        if finished:
            return print(f"{self.name}: finished before, taken from {self.path}", flush=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        print(f"{self.name}: going on after epoch {self.epoch} of {self.args.epochs}", flush=True)

    def log(self, **metrics) -> None:
        """Note a step's loss and other scalars."""
        for key, value in metrics.items():
            self.sums[key] = self.sums.get(key, 0) + torch.as_tensor(value).detach().float()
        self.batches += 1
        if self.progress.update():  # once a second, as it is drawn: reading numbers makes a GPU wait
            self.progress.set_postfix(self.means(), refresh=False)

    def means(self) -> dict[str, float]:
        """Every metric's mean over the epoch's batches so far."""
        return {key: (total / self.batches).item() for key, total in self.sums.items()}

    def save(self, **metrics: float) -> None:
        """End an epoch: print its means and `metrics`, write the checkpoint. SystemExit, and none is written,
        where the weights are not finite."""
        metrics = self.means() | {key: float(value) for key, value in metrics.items()}
        if not all(p.isfinite().all() for p in self.model.parameters()):
            why = f"{self.name}: the weights are not finite after epoch {self.epoch + 1}, which is not kept"
            sys.exit(f"{why}; try a smaller --lr with --fresh")
        for key, value in metrics.items():
            self.history.setdefault(key, []).append(value)
        self.seconds += time.perf_counter() - self.started
        self.epoch += 1
        words = "".join(f"  {key} {value:.3f}" for key, value in metrics.items())
        left = round(self.seconds / self.epoch * (self.args.epochs - self.epoch))
        line = f"{self.name} {self.epoch}/{self.args.epochs}{words}  {left // 60}:{left % 60:02} left"
        self.progress.clear()
        print(line, flush=True)

        config = getattr(getattr(self.model, "encoder", None), "config", None)  # None: of another library
        state = {key: getattr(self, key) for key in ("epoch", "seconds", "history", "recipe")}
        state |= {"model": self.model.state_dict(), "config": config}
        if self.args.keep_epochs:
            with whole_file(self.path.with_suffix("") / f"epoch{self.epoch}.pt") as file:
                torch.save(state, file)
        state |= {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        with whole_file(self.path) as file:
            torch.save(state | {"generator": self.generator.get_state()}, file)
        self.sums, self.batches, self.started = {}, 0, time.perf_counter()

    def row(self) -> dict:
        """What a row of the table says of its training."""
        last = {key: values[-1] for key, values in self.history.items()}
        return {"epochs": self.epoch, "seconds": self.seconds, "training": last}


def row_path(args: argparse.Namespace, name: str, kind: str = "json") -> pathlib.Path:
    """Where a row lies, or the arrays of its picture (kind "npz"); one measured on validation says so."""
    return pathlib.Path(args.out, "rows", f"{name}{'' if args.split == 'test' else '_validation'}.{kind}")


def record(args: argparse.Namespace, name: str, images: Tensor, labels: Tensor, **row) -> None:
    """Write a row of the table: `value` (a fraction) and what else it says, in a file of its own, so that
    stages may run side by side. images, labels: what it was measured on."""
    chip = torch.cuda.get_device_name() if "cuda" in args.device else torch.backends.cpu.get_cpu_capability()
    row |= {key: vars(args)[key] for key in ("split", "seed", "limit", "precision")}
    row |= {"command": shlex.join(["python", *sys.argv]), "images": hash_of(images, labels)}
    row |= {"device": f"{args.device}, {chip}", "torch": torch.__version__, "code": hash_of_code()}
    with whole_file(row_path(args, name)) as file:
        file.write(json.dumps(row, indent=1, default=float).encode())
    print(f"{name}: {row['value']:.4f}", flush=True)


# options that are numbers -> their least and largest value
RANGES = {"seed": (0, 2**32 - 1), "lr": (1e-9, 1e3), "temperature": (1e-3, 1e3)}
RANGES |= dict.fromkeys("labels warmup smoothing".split(), (0, 1))
RANGES |= dict.fromkeys("weight_decay frame_loss masked turned frozen".split(), (0, 10**9))
RANGES |= dict.fromkeys("limit epochs batch dim patch frames clips blocks folds enlarge".split(), (1, 10**9))
path = os.path.expanduser  # in --out=~/x the shell leaves the ~ as it is


def common_options() -> argparse.ArgumentParser:
    """The options of every stage, to be used as a parent parser."""
    p = argparse.ArgumentParser(add_help=False)
    add = p.add_argument
    add("--data", type=path, default="data", help='folder with CIFAR-10, or "synthetic" (default: data)')
    add("--out", type=path, default="runs/mine", help="folder for checkpoints and rows (default: runs/mine)")
    add("--name", help="name of the checkpoint and of its row; of a probe: the end of its rows' names")
    splits, precisions = ["validation", "test"], ["auto", "float32", "bfloat16"]
    add("--split", choices=splits, default="validation", help="what is measured; test once, at the end")
    add("--seed", type=int, default=0, help="of everything drawn at random (default: 0)")
    add("--limit", type=int, help="use only so many images of each split (default: all)")
    add("--device", default="auto", help="cpu, cuda, mps (default: the fastest there is)")
    add("--precision", choices=precisions, default="auto", help="default: bfloat16 where a CPU has it")
    return p


def training_options(epochs: int, muon: float, adamw: float, batch: int | None = None):
    """The options of every training stage, a parent parser; the stage's defaults: peak learning rates of the
    two optimisers, images per step (None: it counts in other units)."""
    p = argparse.ArgumentParser(add_help=False)
    add = p.add_argument
    add("--epochs", type=int, default=epochs, help="passes over the training images (default: %(default)s)")
    if batch:
        add("--batch", type=int, default=batch, help="images per step (default: %(default)s)")
    add("--optimizer", choices=["muon", "adamw"], default="muon", help="default: %(default)s")
    add("--lr", type=float, help=f"peak learning rate (default: {muon:g}; adamw: {adamw:g})")
    add("--weight-decay", type=float, default=0.05, help="on matrices only (default: %(default)s)")
    add("--warmup", type=float, default=0.1, help="share of steps with linear rise (default: %(default)s)")
    add("--keep-epochs", action="store_true", help="also keep every epoch's weights, NAME/epoch1.pt, ...")
    add("--fresh", action="store_true", help="start over instead of going on")
    p.set_defaults(usual_lr={"muon": muon, "adamw": adamw})
    return p


def command(parser: argparse.ArgumentParser) -> None:
    """Run the stage that is typed (its parser has set `run` to the function)."""
    args = parser.parse_args()
    for name, (low, high) in RANGES.items():
        value = vars(args).get(name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} {value} is not between {low:g} and {high:g}")
    if hasattr(args, "usual_lr"):
        usual = vars(args).pop("usual_lr")
        args.lr = args.lr or usual[args.optimizer]
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # what goes wrong here is still said, on stderr
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)  # fails now if it can't be written later
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("\nstopped; the same command (without --fresh) goes on after its last epoch", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if "loading state_dict" in str(error):
            sys.exit(f"{error}\nA checkpoint holds another network: undo the edit, or train anew (--fresh)")
        if re.search("(out of|enough|allocate) memory|ALLOC_FAILED", str(error)):  # CUDA, MPS, CPU differ
            sys.exit("out of memory; choose a smaller --batch (video.py: --clips), or --device cpu")
        raise


if __name__ == "__main__":
    encoder = ViT()
    print(encoder, f"\n{sum(p.numel() for p in encoder.parameters()):,} parameters")
