"""A Vision Transformer for one small image, written out; and the plumbing that every training loop shares.

Part 1, the network (read this first):   Attention -> Block -> ViT -> ModelM, Classifier
Part 2, the plumbing:                    device and precision, files, checkpoints, Run, the command line

Depends on torch alone: copy this file and use `ViT` in your own code.

    python vit.py                  # prints the network, layer by layer

Papers: Vaswani et al. 2017 (attention), Dosovitskiy et al. 2021 (ViT), Xiong et al. 2020 (pre-norm).
Shape letters, here and in every file: B batch, T tokens = 1 + N, N patches, D width, H heads, K classes,
P patch size in pixels, S image size in pixels.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import hashlib
import io
import json
import math
import os
import pathlib
import platform
import shlex
import shutil
import sys
import time
import warnings
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist
from torch import nn

# ---------------------------------------------------------------------------------------------------------
# Part 1: the network
# ---------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, equation 1 and section 3.2.2).

    Every token asks a question (query), says what it is about (key) and carries a message (value). A token's
    output is the average of all messages, weighted by how well their keys answer its question:

        attention(Q, K, V) = softmax(Q K^T / sqrt(D / H)) V

    H heads do this side by side, each in its own D / H dimensions, so that one token can look for H things at
    once.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} can't be shared out evenly among {heads} heads")
        self.heads = heads
        # three projections side by side: one big matmul is faster than three
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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

    The path from input to output has no norm on it (pre-norm), so gradients reach the first block unchanged;
    this is why a ViT trains without the long warm-up that the original post-norm order needs (Xiong et al.
    2020).
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: int = 4):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x: torch.Tensor, trace: list | None = None) -> torch.Tensor:
        """x: [B, T, D] -> [B, T, D].

        `trace`, where given, is a list that receives one dict per block: the residual stream "before" the
        attention, "attended" (after the attention's residual sum) and "after" the block, each [B, T, D], and
        the attention "weights" [B, H, T, T]. It serves CKA and pictures; the computation is the same with and
        without it.
        """
        update, weights = self.attn(self.norm1(x))
        attended = x + update
        out = attended + self.mlp(self.norm2(attended))
        if trace is not None:
            trace.append({"before": x, "attended": attended, "after": out, "weights": weights})
        return out


class ViT(nn.Module):
    """Vision Transformer encoder (Dosovitskiy et al. 2021, equations 1-4): an image as a short sentence of
    patches.

    The image is cut into N = (S / P)^2 patches; each becomes one token by a linear map; a learned CLS token
    is put in front, where it collects what describes the whole image; learned positions are added, since
    attention by itself doesn't know where a token came from. The default makes 16 patches, 17 tokens, 1.2 M
    parameters.
    """

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 8,
        dim: int = 128,
        depth: int = 6,
        heads: int = 4,
        stem: bool = False,
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image size {image_size} is not a whole number of {patch_size}-pixel patches")
        self.config = {"image_size": image_size, "patch_size": patch_size, "dim": dim, "depth": depth}
        self.config |= {"heads": heads, "stem": stem}
        self.patches = (image_size // patch_size) ** 2
        # a convolution whose stride is its kernel size = the same linear map applied to every patch
        linear = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size) if not stem else None
        self.patch_embedding = ConvStem(patch_size, dim) if stem else linear
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, 1 + self.patches, dim))
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        nn.init.trunc_normal_(self.cls, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.apply(init_linear)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """What the first block reads: images [B, 3, S, S] in [0, 1] -> tokens [B, 1 + N, D], CLS first.

        Raises ValueError for images of another shape than the encoder was made for.
        """
        size = self.config["image_size"]
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"images {list(images.shape)} are not [B, 3, {size}, {size}]")
        x = self.patch_embedding(standardise(images))  # [B, D, S/P, S/P]
        x = x.flatten(2).transpose(1, 2)  # [B, N, D], row by row
        cls = self.cls.expand(len(x), -1, -1)  # [B, 1, D]
        return torch.cat([cls, x], dim=1) + self.positions  # [B, 1 + N, D]

    def forward(self, images: torch.Tensor, trace: list | None = None) -> torch.Tensor:
        """images: [B, 3, S, S] in [0, 1] -> tokens [B, 1 + N, D]; token 0 is CLS. `trace`: see Block."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x, trace)
        return self.norm(x)


class ConvStem(nn.Module):
    """A patch embedding that looks for edges first: 3x3 convolution, non-linearity, then the linear map of a
    patch.

    Xiao et al. 2021 ("Early convolutions help transformers see better") let neighbouring patches mix here; in
    this one every patch is padded and convolved by itself, so that nothing of a blacked-out patch can be seen
    next door.
    """

    def __init__(self, patch: int, dim: int, width: int = 32):
        super().__init__()
        self.patch = patch
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, dim, patch)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: [B, 3, S, S] -> [B, D, S/P, S/P]."""
        B, P, side = len(images), self.patch, images.shape[-1] // self.patch
        x = images.view(B, 3, side, P, side, P)  # [B, 3, row, P, column, P]
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, P, P)  # [B*N, 3, P, P]
        x = self.layers(x)  # [B*N, D, 1, 1]
        return x.view(B, side, side, -1).permute(0, 3, 1, 2)  # [B, D, S/P, S/P]


def standardise(images: torch.Tensor) -> torch.Tensor:
    """Pixel values in [0, 1] -> about zero mean and unit spread (CIFAR-10's own are 0.47 and 0.25)."""
    return (images - 0.5) / 0.25


def init_linear(module: nn.Module) -> None:
    """Small weights and zero biases in linear layers, ViT's usual start (for use with nn.Module.apply)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class ModelM(nn.Module):
    """Model M: an encoder with heads that need no labels.

    Some patches were blacked out, some others all turned by one angle (data.patch_augment). The rotation head
    reads the angle from CLS; the reconstruction head paints each blacked-out patch from that patch's token.
    For InfoNCE there is a projector, an MLP that is thrown away afterwards: it may forget what the encoder
    should keep.
    """

    def __init__(self, encoder: ViT, projector: bool = False):
        super().__init__()
        dim, patch = encoder.config["dim"], encoder.config["patch_size"]
        self.encoder = encoder
        self.rotation_head = nn.Linear(dim, 4)  # 0, 90, 180, 270 degrees
        self.reconstruction_head = nn.Linear(dim, 3 * patch * patch)
        if projector:
            self.projector = nn.Sequential(nn.Linear(dim, 512), nn.ReLU(), nn.Linear(512, 128))
        else:
            self.projector = None

    def forward(self, images: torch.Tensor, masked: torch.Tensor):
        """images: [B, 3, S, S]; masked: [B, M] patch indices
        -> angle logits [B, 4], pixels [B, M, 3*P*P], projected CLS [B, E] (None without a projector)."""
        tokens = self.encoder(images)
        cls, patches = tokens[:, 0], tokens[:, 1:]  # [B, D], [B, N, D]
        index = masked[:, :, None].expand(-1, -1, patches.shape[-1])  # [B, M, D]
        pixels = self.reconstruction_head(patches.gather(1, index))  # [B, M, 3*P*P]
        embedding = self.projector(cls) if self.projector else None  # [B, E]
        return self.rotation_head(cls), pixels, embedding


class Classifier(nn.Module):
    """An encoder and a linear layer on its CLS token."""

    def __init__(self, encoder: ViT, classes: int = 10):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config["dim"], classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: [B, 3, S, S] -> class logits [B, K]."""
        return self.head(self.encoder(images)[:, 0])


# ---------------------------------------------------------------------------------------------------------
# Part 2: the plumbing. Nothing below is about transformers.
#
# Under torchrun, PyTorch's launcher, every process holds the whole data set, draws the same random numbers
# and augments the whole batch (cheap beside the network); then each trains on its `share`, `data_parallel`
# averages the gradients, and InfoNCE, whose negatives are all other images of the batch, needs `gather`. A
# single process gets from these three what it gave them.
# ---------------------------------------------------------------------------------------------------------

UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK = int(os.environ["RANK"]) if UNDER_TORCHRUN else 0  # only process 0 prints and writes
PROCESSES = int(os.environ["WORLD_SIZE"]) if UNDER_TORCHRUN else 1


def data_parallel(model: nn.Module, some_idle: bool = False) -> nn.Module:
    """Called like `model`, it averages the gradients of all processes in backward.

    some_idle: the model has parameters that a step does not use.
    """
    if PROCESSES == 1:
        return model
    warnings.filterwarnings("ignore", "Grad strides do not match")  # harmless: CLS is expanded, not copied
    gpu = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
    return nn.parallel.DistributedDataParallel(model, device_ids=gpu, find_unused_parameters=some_idle)


def share(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """This process's part of a batch whose images lie along `dim`."""
    if x.shape[dim] % PROCESSES:
        sys.exit(f"{x.shape[dim]} can't be shared out evenly among {PROCESSES} processes: --batch or --clips")
    return x.chunk(PROCESSES, dim)[RANK]


def gather(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The inverse of `share`: the parts of all processes, joined; a process's gradient reaches its own part.

    A softmax over some of the scores is no part of the softmax over all, so every process computes the loss
    of the whole batch, and from it the gradient of its part alone. The whole gradient is the sum of these;
    `data_parallel` takes their mean; so each is multiplied by their number.
    """
    if PROCESSES == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(PROCESSES)]
    dist.all_gather(parts, x.detach().contiguous())
    x.register_hook(lambda gradient: gradient * PROCESSES)
    parts[RANK] = x  # the others' are constants here
    return torch.cat(parts, dim)


class Machine:
    """Where the run computes, and in which precision; both chosen here, and printed."""

    def __init__(self, device: str = "auto", precision: str = "auto", seed: int = 0):
        self.device = find_device(device)
        if PROCESSES > 1 and not dist.is_initialized():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)
        torch.set_float32_matmul_precision("high")  # lets CUDA use its tensor cores for float32
        torch.manual_seed(seed)  # initial weights; what is drawn later comes from the run's own generator
        chosen = [precision, "as asked"]
        if precision == "auto":
            chosen = [*faster_precision(self.device)]
        if PROCESSES > 1:
            dist.broadcast_object_list(chosen)  # all take what process 0 found
        self.precision, why = chosen
        self.seed = seed
        # images at a time in evaluation: small, so that the activations fit a CPU's cache
        self.eval_batch = 125 if self.device.type == "cpu" else 1000
        chip = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else processor_name()
        self.name = f"{self.device.type} ({chip}, {torch.get_num_threads()} CPU threads"
        self.name += f" in each of {PROCESSES} processes)" if PROCESSES > 1 else ")"
        print(f"{self.name}, {self.precision} ({why}); torch {torch.__version__}, seed {seed}", flush=True)

    def autocast(self):
        """Context in which matmuls run in the chosen precision; weights and residual stream stay float32."""
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def find_device(asked: str) -> torch.device:
    """The device that was asked for, or with "auto" the first that works; SystemExit where none does."""
    candidates = [asked]
    if asked == "auto":
        candidates = ["cuda"] if torch.cuda.is_available() else []
        candidates += ["mps"] if torch.backends.mps.is_available() and PROCESSES == 1 else []
        candidates += ["cpu"]
    for name in candidates:
        if name == "cuda" and PROCESSES > 1:
            name = f"cuda:{os.environ['LOCAL_RANK']}"  # one GPU a process
        try:
            return (torch.zeros(1, device=name) + 1).device  # + 1: a GPU too old fails at its first kernel
        except (RuntimeError, AssertionError) as error:
            why_not = f"the device {name!r} can't be used here ({str(error).splitlines()[0]})"
            if asked == "auto":
                print(f"{why_not}; going on without", flush=True)
    sys.exit(f"{why_not}; try --device cpu")


def faster_precision(device: torch.device) -> tuple[str, str]:
    """The precision in which this device multiplies matrices faster, "float32" or "bfloat16", and why.

    Some processors and GPUs compute in bfloat16, 2 to 3 times faster; all others only convert to it and back,
    3 to 25 times slower. So little work tells them apart: the best of a few products in each, in turns. On a
    CPU one thread's own time counts, which stays the same however busy the machine is.
    """
    on_cpu = device.type == "cpu"
    clock = time.thread_time if on_cpu else time.perf_counter
    size = 384 if on_cpu else 4096
    threads = torch.get_num_threads()
    seconds = {"float32": math.inf, "bfloat16": math.inf}
    end = time.perf_counter() + 0.1
    torch.set_num_threads(1)
    try:
        matrix = torch.ones(size, size, device=device)  # not drawn: a seed's numbers are the experiment's
        for k in range(5):
            for precision in seconds:
                start = clock()
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                    (matrix @ matrix)[0, 0].item()  # .item() waits for the device
                seconds[precision] = min(seconds[precision], clock() - start)
            if k > 0 and time.perf_counter() > end:
                break
    except Exception:  # MPS before macOS 14: TypeError, some old GPUs: RuntimeError
        return "float32", "bfloat16 does not work here"
    finally:
        torch.set_num_threads(threads)
    faster, slower = sorted(seconds, key=seconds.get)
    return faster, f"{seconds[slower] / seconds[faster]:.1f} times as fast as {slower} here"


def processor_name() -> str:
    """The processor as Linux names it, else as Python does."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_file(path: pathlib.Path, content: bytes) -> None:
    """Write all of `content` or nothing: readers see the old file until the new one is complete, on disk."""
    if RANK > 0:
        return
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        sys.exit(f"can't write {path}: {error.strerror}; make room or choose another --out, then try again")


def write_tensors(path: pathlib.Path, state: dict) -> None:
    """torch.save, all or nothing."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getvalue())


def read_checkpoint(path: str | pathlib.Path) -> dict:
    """The contents of a checkpoint written by `Run`; SystemExit with one sentence where the file is none.

    `weights_only` keeps a foreign file from running code: it admits tensors and plain Python values, nothing
    else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        sys.exit(f"there is no checkpoint {path}; a stage makes one, `python ssl.py pretrain` the first")
    except Exception:  # torch.load raises many kinds of error on a file that isn't its own
        sys.exit(f"{path} can't be read as a checkpoint; it must be a .pt file that a stage here wrote")
    if not isinstance(state, dict) or not {"config", "model", "epoch", "settings"} <= state.keys():
        sys.exit(f"{path} is not a checkpoint of this project: it lacks what `Run` saves")
    return state


def load_encoder(path: str | pathlib.Path) -> ViT:
    """The encoder in a checkpoint of any stage (its weights are named encoder.* or video.encoder.*)."""
    state = read_checkpoint(path)
    if not state["config"]:
        sys.exit(f"{path} holds a model of another library, not an encoder of this project")
    encoder = ViT(**state["config"])
    weights = {name.removeprefix("video."): value for name, value in state["model"].items()}
    found = {name[8:]: value for name, value in weights.items() if name.startswith("encoder.")}
    encoder.load_state_dict(found)
    return encoder


def make_encoder(checkpoint: str | None, patch: int | None, dim: int | None, stem: bool) -> ViT:
    """The encoder in `checkpoint`, which must be as asked for; without one, a new random encoder."""
    try:
        encoder = load_encoder(checkpoint) if checkpoint else ViT(32, patch or 8, dim or 128, stem=stem)
    except ValueError as error:
        sys.exit(f"no such encoder: {error}; choose another --patch or --dim")
    asked = {"patch_size": patch, "dim": dim, "stem": stem or None}
    for name, value in asked.items():
        if value not in (None, encoder.config[name]):
            option = name.removesuffix("_size")
            sys.exit(f"the encoder in {checkpoint} has --{option} {encoder.config[name]}, not {value}")
    tokens, width = 1 + encoder.patches, encoder.config["dim"]
    print(f"encoder: {encoder.patches} patches + CLS = {tokens} tokens of width {width}", flush=True)
    return encoder


class Run:
    """One training run, which can be stopped at any moment and goes on when the same command is typed again.

    After each epoch `save` writes weights, optimiser, random generator and metrics to out/NAME.pt, one file.
    So a resumed run draws the same numbers as an uninterrupted one and, on a CPU, ends with the same weights
    bit by bit.
    """

    def __init__(
        self,
        args,
        name: str,
        model: nn.Module,
        machine: Machine,
        encoder: ViT | None,
        steps: int,
        also: dict | None = None,
    ):
        """`encoder`: the one that --dim, --patch and --stem describe (None: they describe none); `steps` of
        an epoch; `also`: settings that are no options."""
        if steps < 1:
            sys.exit(f"{name}: the images are fewer than one step's {args.batch}; choose a smaller batch")
        self.path = pathlib.Path(args.out) / f"{name}.pt"
        self.name, self.model, self.machine, self.args, self.steps = name, model, machine, args, steps
        self.settings = settings(args, encoder) | (also or {})
        self.generator = torch.Generator(machine.device).manual_seed(machine.seed)
        # weight decay pulls matrices towards zero; on biases, norms, CLS and positions it would only do harm
        decayed, others = [], []
        for key, p in model.named_parameters():
            is_matrix = p.ndim > 1 and not key.endswith(("cls", "positions"))
            (decayed if is_matrix else others).append(p)
        groups = [
            {"params": decayed, "weight_decay": args.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99), fused=True)
        self.epoch = 0  # finished ones
        self.seconds = 0.0
        self.history = {}  # metric -> its mean in each epoch
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(
            f"{name}: {millions:.1f} M parameters, {args.epochs} epochs "
            f"of {steps} steps of {args.batch} images"
        )
        if args.warmup >= args.epochs:
            print(f"{name}: with --warmup {args.warmup:g} the learning rate rises to the end")
        if self.path.exists() and not args.fresh:
            self.resume()
        self.begin_epoch()

    def resume(self) -> None:
        """Go on from the checkpoint of an earlier start of this run."""
        state = read_checkpoint(self.path)
        before, now = state["settings"] | {"device": state["device"]}, dict(self.settings)
        if state["optimizer"]:
            now["device"] = self.machine.device.type  # in mid-run: a random generator can't go on elsewhere
        for key in now:
            if before.get(key) != now[key]:
                sys.exit(
                    f"{self.path} was made with another {key.replace('_', '-')} "
                    f"({before.get(key)}, not {now[key]}); "
                    "add --fresh to start over, or choose another --out or --name"
                )
        self.model.load_state_dict(state["model"])
        self.epoch, self.seconds, self.history = state["epoch"], state["seconds"], state["history"]
        if not state["optimizer"]:  # not kept once a run is finished
            print(
                f"{self.name}: finished before, taken from {self.path} "
                "(an edited file is not noticed: --fresh trains anew)"
            )
            return
        print(f"{self.name}: going on after epoch {self.epoch} of {self.args.epochs} in {state['precision']}")
        self.machine.precision = state["precision"]  # another one would be another run
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])

    def summary(self) -> dict:
        """What a row of results.json says of its training."""
        last = {key: self.history[key][-1] for key in ("train", "validation") if key in self.history}
        return last | {"epochs": self.epoch, "seconds": self.seconds, "weights": fingerprint(self.path)}

    def begin_epoch(self) -> None:
        """Nothing of the epoch that comes is done yet."""
        self.batches, self.metrics = 0, {}  # metric -> its value in each batch so far
        self.started = self.shown = self.logged = time.perf_counter()

    def set_learning_rate(self) -> None:
        """Linear warm-up, then half a cosine down to zero, over all steps of the run."""
        done, total = self.epoch * self.steps + self.batches, self.args.epochs * self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * schedule(done, total, int(self.args.warmup * self.steps))

    def log(self, **metrics: torch.Tensor) -> None:
        """End a step: count it (set_learning_rate goes by this count), note its loss and other scalars; once
        a second show their means so far. Call it once a batch, after the optimiser's step."""
        for key, value in metrics.items():
            self.metrics.setdefault(key, []).append(value.detach().float())
        self.batches += 1
        self.logged = time.perf_counter()
        if self.logged - self.shown > 1:  # not at every batch: reading the values makes a GPU wait
            self.shown = self.logged
            show(self.line(self.means()))

    def means(self) -> dict[str, float]:
        """Every metric's mean over this process's batches so far; SystemExit where the loss is not finite."""
        values = {key: torch.stack(noted).cpu() for key, noted in self.metrics.items()}
        bad = (~torch.isfinite(values["loss"])).nonzero()
        if len(bad):
            sys.exit(
                f"\n{self.name}: the loss is not finite at epoch {self.epoch + 1}, step {bad[0].item() + 1}; "
                "the last good epoch, if any, is kept; try a smaller --lr with --fresh"
            )
        return {key: value.mean().item() for key, value in values.items()}

    def line(self, metrics: dict[str, float]) -> str:
        """The progress line: where the run is, how fast, and how long the rest will take."""
        seconds = self.logged - self.started
        left = ((self.args.epochs - self.epoch) * self.steps - self.batches) * seconds / self.batches
        values = "".join(f"  {key} {value:.3f}" for key, value in metrics.items())
        speed = f"{self.batches * self.args.batch / seconds:.0f} images/s"
        return f"{self.name} {self.epoch + 1}/{self.args.epochs}{values}  {speed}  {minutes(left)} left"

    def save(self, **measured: float) -> None:
        """End an epoch: show and keep its means and what was measured after it; write the checkpoint."""
        metrics = self.means()
        if PROCESSES > 1:
            everywhere = torch.tensor(list(metrics.values()), device=self.machine.device) / PROCESSES
            dist.all_reduce(everywhere)
            metrics = dict(zip(metrics, everywhere.tolist()))
        metrics |= measured
        show(self.line(metrics), last=True)
        for key, value in metrics.items():
            self.history.setdefault(key, []).append(value)
        self.epoch += 1
        self.seconds += time.perf_counter() - self.started
        state = {key: getattr(self, key) for key in ("epoch", "seconds", "history", "settings")}
        state |= {"device": self.machine.device.type, "precision": self.machine.precision}
        state |= {"model": self.model.state_dict(), "optimizer": None}
        state |= {"generator": self.generator.get_state()}
        encoder = getattr(self.model, "encoder", None)  # a model of another library has none
        state["config"] = encoder.config if encoder else None
        if self.args.keep_epochs:
            write_tensors(self.path.with_stem(f"{self.name}-epoch{self.epoch}"), state)
        if self.epoch < self.args.epochs:
            state["optimizer"] = self.optimizer.state_dict()
        write_tensors(self.path, state)
        self.begin_epoch()


def settings(args: argparse.Namespace, encoder: ViT | None) -> dict:
    """What makes it another run: its options, less those that leave the weights alone, and its files."""
    harmless = ("fresh", "split", "run", "device", "precision", "out", "name", "keep_epochs")
    found = {key: value for key, value in vars(args).items() if key not in harmless}
    for key in {"init", "checkpoint", "captions"} & found.keys():
        found[key] = fingerprint(found[key] or "")
    if encoder:  # its sizes, said or left to the default, are the same run
        config = encoder.config
        found |= {"dim": config["dim"], "patch": config["patch_size"], "stem": config["stem"]}
    return found


def schedule(step: int, total: int, warmup: int) -> float:
    """Share of the full learning rate at `step`: linear warm-up, then half a cosine to zero (SGDR, 2017)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of rows of logits [n, K] whose largest entry is the label [n]."""
    return (logits.argmax(dim=1) == labels).float().mean().item()


def minutes(seconds: float) -> str:
    """83 -> "1:23"."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"


def show(line: str, last: bool = False) -> None:
    """Draw a progress line over the one before, as wide as the terminal; a log gets only the last one."""
    width = shutil.get_terminal_size().columns - 1
    if sys.stdout.isatty():
        print(f"\r{line[:width]:<{width}}", end="\n" if last else "", flush=True)
    elif last:
        print(line, flush=True)


class Progress:
    """A progress line for work that is no training: `total` pieces of `what`."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done, self.started = what, total, 0, time.perf_counter()

    def advance(self, pieces: int) -> None:
        """So many more are done."""
        self.done += pieces
        rate = self.done / (time.perf_counter() - self.started)
        left = minutes((self.total - self.done) / rate)
        show(
            f"{self.done:,} of {self.total:,} {self.what}, {rate:.0f}/s, {left} left", self.done == self.total
        )


def fingerprint(*paths: str | pathlib.Path) -> str:
    """A short hash of the files' contents, to tell which weights a number came from ("" for no file)."""
    files = [pathlib.Path(path) for path in paths if pathlib.Path(path).is_file()]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12] if files else ""


def read_results(out: str | pathlib.Path) -> dict:
    """The contents of out/results.json; empty rows where there is none yet."""
    path = pathlib.Path(out) / "results.json"
    if not path.exists():
        return {"rows": {}}
    try:
        return json.loads(path.read_text())
    except ValueError:
        sys.exit(f"{path} is no JSON any more; mend it or move it away: the stages write their rows anew")


def row_name(args: argparse.Namespace, name: str) -> str:
    """A row's name in results.json: one measured on the validation split says so."""
    return name if args.split == "test" else f"{name}_{args.split}"


def arrays_path(args: argparse.Namespace, name: str) -> pathlib.Path:
    """Where a row's arrays for the figures lie."""
    return pathlib.Path(args.out) / f"{row_name(args, name)}.npz"


def write_arrays(path: pathlib.Path, **arrays) -> None:
    """Keep arrays (tensors, numbers or strings) as .npz, all or nothing."""
    import numpy

    buffer = io.BytesIO()
    arrays = {key: x.cpu().numpy() if torch.is_tensor(x) else numpy.asarray(x) for key, x in arrays.items()}
    numpy.savez_compressed(buffer, **arrays)
    write_file(path, buffer.getvalue())


def record(args: argparse.Namespace, name: str, machine: Machine, source, **row) -> None:
    """Put one row into results.json: `value` (a fraction), what else the row says, the command typed.

    `source`: what data.source says of --data.
    """
    results = read_results(args.out)
    packages = ("torch", "numpy", "pillow", "transformers", "open_clip_torch")
    where = {"seed": machine.seed, "device": machine.name, "precision": machine.precision}
    versions = {package: installed(package) for package in packages}
    results |= {"dataset": source.name, "provenance": source.provenance} | where
    results |= {"versions": {"python": platform.python_version()} | versions}
    results["rows"][row_name(args, name)] = where | row | {"split": args.split, "command": typed()}
    write_file(pathlib.Path(args.out) / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    print(f"{row_name(args, name)}: {row['value']:.4f}", flush=True)


def installed(package: str) -> str | None:
    """The package's version; None where it is not installed: a copied file needs only some of them."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def measured(args: argparse.Namespace, name: str, *checkpoints: str) -> bool:
    """True where results.json already has this row, from the same command and the same weights."""
    row = read_results(args.out)["rows"].get(row_name(args, name), {})
    known = row.get("weights") == fingerprint(*checkpoints) and row["command"].endswith(shlex.join(sys.argv))
    if known:
        print(f"{row_name(args, name)}: {row['value']:.4f}, measured before", flush=True)
    return known


def typed() -> str:
    """The command line that started this."""
    launcher = ["torchrun", f"--nproc_per_node={PROCESSES}"] if PROCESSES > 1 else ["python"]
    return shlex.join([*launcher, *sys.argv])


def common_arguments() -> argparse.ArgumentParser:
    """The options of every stage, to be used as a parent parser."""
    p = argparse.ArgumentParser(add_help=False)
    add = p.add_argument
    add("--data", default="data", help='folder with cifar-10-batches-bin, or "synthetic" (default: data)')
    add("--out", default="runs/mine", help="folder for checkpoints, results, figures (default: runs/mine)")
    add("--name", help="name of the checkpoint and of its row in results.json")
    splits = ["validation", "test"]
    add("--split", choices=splits, default="validation", help="for the final number; look at test once")
    add("--seed", type=int, default=0, help="of everything drawn at random (default: 0)")
    add("--limit", type=int, help="use only so many images of each split (default: all)")
    add("--dim", type=int, help="width of a new encoder (default: 128)")
    add("--patch", type=int, help="patch size of a new encoder in pixels (default: 8)")
    add("--stem", action="store_true", help="give a new encoder a small convolution inside each patch")
    add("--device", default="auto", help="cpu, cuda, mps (default: the fastest there is)")
    add("--precision", choices=["auto", "float32", "bfloat16"], default="auto", help="default: the faster")
    return p


def training_arguments(epochs: int, lr: float, batch: int | None = None) -> argparse.ArgumentParser:
    """The options of every training stage, with this stage's defaults, to be used as a parent parser."""
    p = argparse.ArgumentParser(add_help=False)
    add = p.add_argument
    add("--epochs", type=int, default=epochs, help="passes over the training images (default: %(default)s)")
    if batch:
        add("--batch", type=int, default=batch, help="images per step (default: %(default)s)")
    add("--lr", type=float, default=lr, help="peak learning rate of AdamW (default: %(default)s)")
    add("--weight-decay", type=float, default=0.05, help="on matrices only (default: %(default)s)")
    add("--warmup", type=float, default=1.0, help="epochs of linear warm-up (default: %(default)s)")
    add("--keep-epochs", action="store_true", help="also keep every epoch's checkpoint, NAME-epoch1.pt, ...")
    add("--fresh", action="store_true", help="start over instead of going on")
    return p


def command(parser: argparse.ArgumentParser, source) -> None:
    """Run the stage that the command line names; its parser has set `run` to the function. `source`:
    data.source."""
    import filelock  # comes with torch

    args = parser.parse_args()
    out = pathlib.Path(args.out)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # what goes wrong here is still said, on stderr
    lock = filelock.FileLock(out / ".lock")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if RANK == 0:
            lock.acquire(timeout=0)
    except filelock.Timeout:
        sys.exit(f"another run is working in {out}; wait for it, stop it, or choose another --out")
    except NotImplementedError:
        print(f"{out} is on a disk that knows no locks; don't start two runs in it", file=sys.stderr)
    except OSError as error:
        sys.exit(f"can't work in the folder {out}: {error.strerror}; choose another --out")
    try:
        held = read_results(out).get("dataset")
        asked = source(args.data).name
        if held not in (None, asked):
            sys.exit(f"{out} holds results on {held} images, not {asked}; choose another --out or --data")
        if PROCESSES > 1 and not hasattr(args, "epochs"):
            sys.exit("this is no training stage; start it with python instead of torchrun")
        args.run(args)
    except KeyboardInterrupt:
        print(
            "\nstopped; the same command goes on where it was, training after its last epoch", file=sys.stderr
        )
        sys.exit(130)
    except RuntimeError as error:  # CUDA, MPS and CPU say it in different words
        if not any(
            words in str(error) for words in ("out of memory", "allocate memory", "not enough memory")
        ):
            raise
        sys.exit(
            "out of memory; choose a smaller --batch (video.py: fewer --clips) with --fresh, or --device cpu"
        )
    finally:
        lock.release()  # a notebook lives on after its %run


def main() -> None:
    parser = argparse.ArgumentParser(
        description="print the network, layer by layer", parents=[common_arguments()]
    )
    args = parser.parse_args()
    encoder = make_encoder(None, args.patch, args.dim, args.stem)
    for name, part in [*encoder.named_children(), ("all, with CLS and positions", encoder)]:
        print(f"{name:<28} {sum(p.numel() for p in part.parameters()):>9,} parameters")
    print(encoder)


if __name__ == "__main__":
    main()
