"""A Vision Transformer for one small image, written out; and what every training loop shares.

Part 1, the network (read this first):   Attention -> Block -> ViT -> ModelM, Contrastive, Classifier
Part 2, the optimiser:                   Muon, which learns faster than AdamW here; the schedule
Part 3, the plumbing (may be skipped):   device and precision, files, checkpoints, Run, the command line

Depends on torch alone: copy this file and use `ViT` in your own code.

    python vit.py                  # prints the network, layer by layer

Papers: Vaswani et al. 2017 (attention), Dosovitskiy et al. 2021 (ViT), Xiong et al. 2020 (pre-norm), Jordan
et al. 2024 (Muon; kellerjordan.github.io/posts/muon), Liu et al. 2025 (its step's length; arXiv 2502.16982).
Shape letters, here and in every file: B batch, T tokens = 1 + N, N patches, D width, H heads, K classes, P
patch size in pixels, S image size in pixels.
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
import re
import shlex
import shutil
import sys
import time
import warnings
from importlib import metadata
from typing import NamedTuple

import torch
import torch.distributed as dist
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
    warm-up or diverges; with pre-norm it does not (Xiong et al. 2020). The MLP is four times as wide inside,
    as in both papers: two thirds of a block's weights.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: int = 4):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

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
    attention by itself doesn't know where a token came from. `stem` replaces the linear map by a ConvStem.

    The default is as large as a laptop trains in minutes: 16 patches (the report's), 17 tokens, width 128, 6
    blocks, 4 heads of 32 dimensions, 1.2 M parameters. Width 192 was tried and brings little; small patches
    bring much, at four times the cost (results/report.md, "Is the 8x8 patch the limit?").
    """

    def __init__(self, image_size=32, patch_size=8, dim=128, depth=6, heads=4, stem=False):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image size {image_size} is not a whole number of {patch_size}-pixel patches")
        self.config = {"image_size": image_size, "patch_size": patch_size, "dim": dim, "depth": depth}
        self.config |= {"heads": heads, "stem": stem}
        self.patches = (image_size // patch_size) ** 2
        if stem:
            self.patch_embedding = ConvStem(patch_size, dim)
        else:  # a convolution whose stride is its kernel size = the same linear map applied to every patch
            self.patch_embedding = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, 1 + self.patches, dim))
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        nn.init.trunc_normal_(self.cls, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.apply(init_linear)

    def embed(self, images: Tensor) -> Tensor:
        """What the first block reads: images [B, 3, S, S] in [0, 1] -> tokens [B, 1 + N, D], CLS first.

        Raises ValueError for images of another size than the encoder was made for.
        """
        size = self.config["image_size"]
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"images {list(images.shape)} are not [B, 3, {size}, {size}]")
        x = self.patch_embedding(standardise(images))  # [B, D, S/P, S/P]
        x = x.flatten(2).transpose(1, 2)  # [B, N, D], row by row
        cls = self.cls.expand(len(x), -1, -1)  # [B, 1, D]
        return torch.cat([cls, x], dim=1) + self.positions  # [B, 1 + N, D]

    def forward(self, images: Tensor, trace: list | None = None) -> Tensor:
        """images: [B, 3, S, S] in [0, 1] -> tokens [B, 1 + N, D]; token 0 is CLS. `trace`: see Block."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x, trace)
        return self.norm(x)


class ConvStem(nn.Module):
    """A patch embedding that looks for edges first: 3x3 convolution, GELU, then a patch's linear map.

    Xiao et al. 2021 ("Early convolutions help transformers see better") let neighbouring patches mix here;
    here each is padded and convolved by itself, so that nothing of a blacked-out one can be seen next door.
    From scratch it brought nothing (results/report.md, "Is the 8x8 patch the limit?"). The 32 channels were
    not tuned.
    """

    def __init__(self, patch: int, dim: int, width: int = 32):
        super().__init__()
        self.patch = patch
        edges = nn.Conv2d(3, width, 3, padding=1)
        self.layers = nn.Sequential(edges, nn.GELU(), nn.Conv2d(width, dim, patch))

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, 3, S, S] -> [B, D, S/P, S/P]."""
        B, P, side = len(images), self.patch, images.shape[-1] // self.patch
        x = images.view(B, 3, side, P, side, P)  # [B, 3, row, P, column, P]
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, P, P)  # [B*N, 3, P, P]
        x = self.layers(x)  # [B*N, D, 1, 1]
        return x.view(B, side, side, -1).permute(0, 3, 1, 2)  # [B, D, S/P, S/P]


def standardise(images: Tensor) -> Tensor:
    """Pixel values in [0, 1] -> about zero mean and unit spread (CIFAR-10's own are 0.47 and 0.25)."""
    return (images - 0.5) / 0.25


def init_linear(module: nn.Module) -> None:
    """Small weights and zero biases in linear layers, as timm's and DeiT's ViTs start (for use with
    nn.Module.apply). The patch embedding, a convolution, and the heads put on later keep PyTorch's start."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class ModelM(nn.Module):
    """Model M: an encoder with heads that need no labels.

    Some patches were blacked out, some others all turned by one angle (data.patch_augment). The rotation head
    reads the angle from CLS; the reconstruction head paints each blacked-out patch from that patch's token.
    """

    def __init__(self, encoder: ViT):
        super().__init__()
        dim, patch = encoder.config["dim"], encoder.config["patch_size"]
        self.encoder = encoder
        self.rotation_head = nn.Linear(dim, 4)  # 0, 90, 180, 270 degrees
        self.reconstruction_head = nn.Linear(dim, 3 * patch * patch)

    def forward(self, images: Tensor, masked: Tensor):
        """images [B, 3, S, S], masked patches' indices [B, M] -> angle logits [B, 4], standardised pixels
        [B, M, 3*P*P]."""
        return self.heads(self.encoder(images), masked)

    def heads(self, tokens: Tensor, masked: Tensor):
        """What the heads make of tokens [B, 1 + N, D]; as forward."""
        cls, patches = tokens[:, 0], tokens[:, 1:]  # [B, D], [B, N, D]
        index = masked[:, :, None].expand(-1, -1, patches.shape[-1])  # [B, M, D]
        return self.rotation_head(cls), self.reconstruction_head(patches.gather(1, index))


def projector(dim: int) -> nn.Module:
    """The MLP between CLS and a contrastive loss, thrown away afterwards: [B, D] -> [B, 128].

    The loss asks that views of an image look alike, so whatever tells them apart (colour, place) is to be
    forgotten. The projector forgets it, so that the encoder need not (SimCLR, section 4.2, which also finds
    that the number of outputs hardly matters; 512 inside is the width of our MLPs at D = 128).
    """
    return nn.Sequential(nn.Linear(dim, 512), nn.ReLU(), nn.Linear(512, 128))


class Contrastive(nn.Module):
    """InfoNCE's model: an encoder, and the projector on its CLS token."""

    def __init__(self, encoder: ViT):
        super().__init__()
        self.encoder = encoder
        self.projector = projector(encoder.config["dim"])

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, 3, S, S] -> [B, 128]."""
        return self.projector(self.encoder(images)[:, 0])


class JointM(ModelM):
    """Model M with InfoNCE's projector beside its two heads."""

    def __init__(self, encoder: ViT):
        super().__init__(encoder)
        self.projector = projector(encoder.config["dim"])

    def forward(self, images: Tensor, masked: Tensor):
        """As Model M's -> angle logits [B, 4], pixels [B, M, 3*P*P], projected CLS [B, 128]."""
        tokens = self.encoder(images)
        return *self.heads(tokens, masked), self.projector(tokens[:, 0])


class Classifier(nn.Module):
    """An encoder and a linear layer on its CLS token."""

    def __init__(self, encoder: ViT, classes: int = 10):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config["dim"], classes)

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, 3, S, S] -> class logits [B, K]."""
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
# and a p that drives every s in (0, 1] towards 1 will do; it costs three matrix products a time. The textbook
# one of this degree, (15, -10, 3) / 8, converges to 1 but starts slowly (p(s) = 1.9 s for small s). Jordan's
# coefficients were searched for a steep start: 3.4 times a time, so that five times lift all above 0.002; the
# price is that they end between 0.7 and 1.2 instead of at 1. Three or four times leave the small ones small:
# three cost 3.5 points in a trial; four 0.8, which one seed can't tell from nothing (results/tuning.md).
#
# Muon is for matrices inside the network. AdamW keeps what is no such map: biases and norms (vectors), CLS
# and positions (tables of vectors), and the heads, each of whose outputs has a meaning of its own. Jordan et
# al. leave the input layer to AdamW, too. Ours, the patch embedding, is a map from pixels like any other, and
# by Muon it brought 3.5 points more (results/tuning.md). The projector, thrown away later, counts as a head.


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """U V^T of every matrix U S V^T, nearly: [n, rows, columns] -> the same, singular values about 1.

    The coefficients and five iterations are those of Jordan et al. 2024. Pass matrices that are wider than
    high (rows <= columns; else transpose them): the products are then smaller.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    # no singular value exceeds the Frobenius norm, so all are in [0, 1] now; 1e-7: a gradient may be zero
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT  # [n, rows, rows]
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + polynomial x, [n, rows, columns]
    return x


class Muon(torch.optim.Optimizer):
    """MomentUm Orthogonalized by Newton-Schulz (Jordan et al. 2024), for weight matrices inside a network.

        M <- momentum M + (1 - momentum) gradient
        W <- W - lr decay W - lr 0.2 sqrt(max(rows, columns)) U V^T

    U and V^T are those of M one step ahead, momentum M + (1 - momentum) gradient once more (Nesterov). A
    momentum of 0.95, a mean over about twenty steps, is Jordan's choice and was not tuned here.

    All entries of U V^T together have the length sqrt(min(rows, columns)), so one of them is about 1 /
    sqrt(max(rows, columns)) large; the factor in front makes it 0.2, which is about the root mean square of
    an AdamW step's entries (Liu et al. 2025, section 2.2). So the two can share a learning rate and a decay.
    That the best one is two to eight times AdamW's own was found by trying (results/tuning.md); another one
    for the part that AdamW keeps was not tried.

    A parameter [rows, ...] counts as one matrix: a convolution that embeds patches, [D, 3, P, P], as
    [D, 3*P*P]. `parts`, a key of a parameter group, says that its weights are so many matrices on top of each
    other (a qkv: 3): each is a map of its own, and orthogonalised as one. `precision`: of the iterations.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, precision=torch.float32, parts=1):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"precision": precision, "parts": parts})

    @torch.no_grad()
    def step(self):
        """Move every weight that has a gradient."""
        alike = {}  # shape, scale, precision -> (weight, direction) of all matrices that have these
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            for p in weights:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            means, gradients = [self.state[p]["momentum"] for p in weights], [p.grad for p in weights]
            # _foreach_: on a GPU one launch for the whole list
            torch._foreach_lerp_(means, gradients, 1 - momentum)
            ahead = torch._foreach_lerp(gradients, means, momentum)
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
            for weight, direction in zip(weights, ahead):
                w_parts = weight.view(len(weight), -1).chunk(group["parts"])  # [rows, columns] each
                d_parts = direction.view(len(weight), -1).chunk(group["parts"])
                for w, d in zip(w_parts, d_parts):
                    scale = lr * 0.2 * max(w.shape) ** 0.5
                    if len(w) > w.shape[1]:
                        w, d = w.T, d.T  # lay it down; w is still a view of the weight
                    alike.setdefault((d.shape, scale, group["precision"]), []).append((w, d))
        # matrices of one shape are iterated together: few large products instead of many small ones
        for (_, scale, precision), pairs in alike.items():
            weights, directions = zip(*pairs)
            steps = orthogonalise(torch.stack(directions).to(precision)).float()  # [n, rows, columns]
            torch._foreach_add_(weights, steps.unbind(), alpha=-scale)


class Together(torch.optim.Optimizer):
    """Several optimisers that are used as one: by a loop, a schedule and a checkpoint. (It inherits from
    Optimizer because PyTorch's schedules take nothing else. Optimizer's own __init__ is not called, as it
    asks for parameters, and this has none of its own.)"""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        """The groups of all: who changes a learning rate here changes it there."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self):
        """A step of each."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True):
        """Forget the gradients of all."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """As of any optimiser, to be loaded again by load_state_dict."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what state_dict returned."""
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)


# the weights inside a network, by where they are: in our networks' blocks, and in those of transformers' BLIP
# (layers, layer) and open_clip's CLIP (resblocks)
INSIDE = re.compile(r"(^|\.)(blocks?|temporal|layers?|resblocks|patch_embedding)\.")
# weights that are several matrices on top of each other
PARTS = {".qkv.weight": 3, ".in_proj_weight": 3, ".kv.weight": 2}
# rows are looked up in these, not multiplied
TABLES = re.compile(r"(^|\.)(cls|positions)$|(class|position|positional|word|token)_embedding")


def make_optimizer(model: nn.Module, kind: str, lr: float, weight_decay: float, precision: str = "float32"):
    """A model's optimiser: "muon" (with AdamW for what is no matrix inside the network) or "adamw" (for all).
    `precision`: "float32" or "bfloat16", of Muon's iterations. To use another, write it in place of the call,
    `torch.optim.SGD(model.parameters(), lr)`: schedule, checkpoint and resume take any, and groups of
    parameters with learning rates of their own, too.

    Weight decay pulls matrices towards zero, so that what no image asks for is forgotten; biases, norms, CLS
    and positions have no reason to be small. 0.05 is DeiT's (Touvron et al. 2021); AdamW's second beta of
    0.99, instead of 0.999, forgets old gradients within a hundred steps, as short trainings need. Neither
    was tuned. Raises ValueError for "muon" where no weight is inside by its name: AdamW alone needs another
    learning rate.
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
    decayed = {"params": matrices, "weight_decay": weight_decay}
    adamw = torch.optim.AdamW([decayed, {"params": others, "weight_decay": 0.0}], lr, (0.9, 0.99), fused=True)
    if kind == "adamw":
        return adamw
    if not inside:
        raise ValueError("no weight's name says that Muon is for it; extend vit.INSIDE, or choose adamw")
    by_muon, by_adamw = sum(map(len, inside.values())), len(matrices) + len(others)
    print(f"optimiser: Muon for {by_muon} weights (see vit.INSIDE), AdamW for {by_adamw} others")
    groups = [{"params": weights, "parts": parts} for parts, weights in inside.items()]
    muon = Muon(groups, lr, weight_decay=weight_decay, precision=getattr(torch, precision))
    return Together(muon, adamw)


def warmup_cosine(step: int, total: int, warmup: float) -> float:
    """The share of the peak learning rate in this step, counted from 0, of `total`: a linear rise over the
    first share `warmup` of them, then half a cosine down to zero (SGDR, Loshchilov and Hutter 2017).

    The rise is there as a mean over few gradients is no mean yet. (As pre-norm needs no long one, its length
    hardly matters: 0.02 to 0.3 of the steps were level, results/tuning.md.) The fall is there as a network
    that takes full steps to the end is still being thrown about when it is stopped.
    """
    rise = min(warmup * total, total - 1)  # at most, so that total - rise, a divisor below, is not zero
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))


# ---------------------------------------------------------------- Part 3: the plumbing
# Nothing below is about transformers, and none of it is needed to understand a training loop. What a loop
# calls: set_up (where to compute), Run (progress, checkpoint, resume), record (a row of results.json).
#
# Several processes, one per GPU, under PyTorch's launcher torchrun: each draws the same random numbers and
# augments the whole batch (cheap beside the network); then it trains on its `share`, `data_parallel` averages
# the gradients, and InfoNCE, whose negatives are all other images, needs `gather`. A single process gets back
# what it gave them.

UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK = int(os.environ["RANK"]) if UNDER_TORCHRUN else 0  # only process 0 prints and writes
PROCESSES = int(os.environ["WORLD_SIZE"]) if UNDER_TORCHRUN else 1


def data_parallel(model: nn.Module, some_idle: bool = False) -> nn.Module:
    """The model; its backward averages all processes' gradients. some_idle: not every step uses all of it."""
    if PROCESSES == 1:
        return model
    warnings.filterwarnings("ignore", "Grad strides do not match")  # harmless: CLS is expanded, not copied
    gpu = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
    return nn.parallel.DistributedDataParallel(model, device_ids=gpu, find_unused_parameters=some_idle)


def share(x: Tensor) -> Tensor:
    """This process's rows of a batch x [B, ...]."""
    if len(x) % PROCESSES:
        why = f"{len(x)} can't be shared out evenly among {PROCESSES} processes"
        sys.exit(f"{why}; choose another --batch (video.py: --clips)")
    return x.chunk(PROCESSES)[RANK]


def gather(x: Tensor) -> Tensor:
    """The inverse of `share`: the parts of all processes, joined; a process's gradient reaches its own part.

    A softmax over some of the scores is no part of the softmax over all, so every process computes the whole
    batch's loss, and from it the gradient of its part alone. The whole gradient is the sum of these;
    `data_parallel` takes their mean; so each is multiplied by their number.
    """
    if PROCESSES == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(PROCESSES)]
    dist.all_gather(parts, x.detach().contiguous())
    x.register_hook(lambda gradient: gradient * PROCESSES)
    parts[RANK] = x  # the others' are constants here
    return torch.cat(parts)


# ---------------------------------------------------------------- device and precision


class Machine(NamedTuple):
    """What `set_up` found: where a run computes, and in which precision."""

    device: torch.device
    precision: str  # "float32" or "bfloat16"
    name: str  # in words, for results.json
    seed: int

    def autocast(self):
        """Context in which matmuls run in the chosen precision; weights and residual stream stay float32."""
        if self.precision == "float32":
            return contextlib.nullcontext()  # not every device knows autocast, even disabled
        return torch.autocast(self.device.type, torch.bfloat16)

    @property
    def eval_batch(self) -> int:
        """Images at a time where nothing is learned: few fit a CPU's cache."""
        return 125 if self.device.type == "cpu" else 1000


def set_up(device: str = "auto", precision: str = "auto", seed: int = 0) -> Machine:
    """Choose device and precision where they are "auto", join the other processes (under torchrun), seed what
    draws initial weights, and say all this. SystemExit where the device can't be used."""
    where = find_device(device)
    if PROCESSES > 1 and not dist.is_initialized():
        if where.type == "cuda":
            torch.cuda.set_device(where)
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    chosen = [precision, "as asked"]
    if precision == "auto":
        chosen = [*faster_precision(where)]
    if PROCESSES > 1:
        dist.broadcast_object_list(chosen)  # all take what process 0 found
    precision, why = chosen
    torch.manual_seed(seed)  # what is drawn in training comes from the run's own generator
    chip = torch.cuda.get_device_name(where) if where.type == "cuda" else processor_name()
    name = f"{where.type} ({chip}, {torch.get_num_threads()} CPU threads)"
    print(f"{name}, {precision} ({why}); torch {torch.__version__}, seed {seed}", flush=True)
    return Machine(where, precision, name, seed)


def find_device(asked: str) -> torch.device:
    """The device that was asked for, or with "auto" the first that works; SystemExit where none does."""
    names = [asked]
    if asked == "auto":
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        names = [name for name in there if there[name]]
        if PROCESSES > 1:  # all must choose the same, so none tries another
            names = ["cuda" if there["cuda"] else "cpu"]
    for name in names:
        if name == "cuda" and PROCESSES > 1:
            name = f"cuda:{os.environ['LOCAL_RANK']}"  # one GPU a process
        try:
            return (torch.zeros(1, device=name) + 1).device  # + 1: a GPU too old fails at its first kernel
        except (RuntimeError, AssertionError) as error:
            why = f"the device {name!r} can't be used here ({str(error).splitlines()[0]})"
            if name != names[-1]:
                print(f"{why}; going on without", flush=True)
    sys.exit(f"{why}; try --device cpu, or fewer processes")


def faster_precision(device: torch.device) -> tuple[str, str]:
    """The precision in which this device trains our networks faster, "float32" or "bfloat16", and why.

    Some CPUs compute in bfloat16, 2 to 3 times faster; all others only convert to it and back, 3 to 30 times
    slower. So little work tells them apart: the best of three products in each, in one thread's own time,
    which stays the same however busy the machine is. On a GPU not the arithmetic of so small a network takes
    the time but the launching of its kernels, and autocast adds some (an H100, width 128, batch 128, InfoNCE:
    6,900 images/s in float32, 5,200 in bfloat16). For a much wider network try --precision bfloat16 there.
    """
    if device.type != "cpu":
        return "float32", "which asks for fewer kernels than bfloat16"
    threads = torch.get_num_threads()
    seconds = {"float32": math.inf, "bfloat16": math.inf}
    torch.set_num_threads(1)
    try:
        matrix = torch.ones(384, 384)  # not drawn: a seed's numbers are the experiment's
        for precision in ["float32", "bfloat16"] * 3:
            start = time.thread_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                matrix @ matrix
            seconds[precision] = min(seconds[precision], time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    faster, slower = sorted(seconds, key=seconds.get)
    return faster, f"{seconds[slower] / seconds[faster]:.1f} times as fast as {slower} here"


def processor_name() -> str:
    """The processor as Linux names it, else as Python does."""
    path = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text() if path.exists() else "")
    return found[1] if found else platform.processor() or platform.machine()


# ---------------------------------------------------------------- files and checkpoints
# A file that is half written, by a kill or a full disk, would be taken for a whole one by the next command.
# So nothing is ever written in place.


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


def write_arrays(path: pathlib.Path, **arrays) -> None:
    """Keep arrays (tensors, numbers or strings) as .npz, all or nothing."""
    import numpy

    buffer = io.BytesIO()
    on_cpu = {key: x.cpu() if torch.is_tensor(x) else x for key, x in arrays.items()}
    numpy.savez_compressed(buffer, **on_cpu)
    write_file(path, buffer.getvalue())


def hash_of(*pieces: bytes) -> str:
    """A short hash, to tell whether two contents are the same."""
    return hashlib.sha256(b"".join(pieces)).hexdigest()[:12]


def hash_of_files(*paths: str | pathlib.Path) -> str:
    """A short hash of the files' contents ("" where there is none of them)."""
    files = [pathlib.Path(path) for path in paths if path and pathlib.Path(path).is_file()]
    return hash_of(*(file.read_bytes() for file in files)) if files else ""


def hash_of_weights(weights: dict[str, Tensor]) -> str:
    """A short hash of named tensors: runs that end with the same weights have the same, wherever they ran."""
    return hash_of(*(name.encode() + x.cpu().numpy().tobytes() for name, x in sorted(weights.items())))


def hash_of_checkpoint(path: str | pathlib.Path) -> str:
    """hash_of_weights of a checkpoint ("" for no path)."""
    return hash_of_weights(read_checkpoint(path)["model"]) if path else ""


def read_checkpoint(path: str | pathlib.Path) -> dict:
    """The contents of a checkpoint written by `Run`; SystemExit with one sentence where the file is none.

    `weights_only` keeps a foreign file from running code: it admits only tensors and plain Python values.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        sys.exit(f"there is no checkpoint {path}; a stage makes one, `python ssl.py pretrain` the first")
    except Exception:  # torch.load raises many kinds of error on a file that isn't its own
        state = None
    if not isinstance(state, dict) or not {"config", "model", "epoch", "settings"} <= state.keys():
        sys.exit(f"{path} can't be read as a checkpoint; it must be a .pt file that a stage here wrote")
    return state


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: str | pathlib.Path) -> None:
    """Give the model these weights, which come from `path`; SystemExit where they are of another network."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # its second line says what is missing, unexpected, or of another size
        first = str(error).splitlines()[1].split(",")[0].strip()
        why = f"{path} holds another network than the code makes now ({first})"
        sys.exit(f"{why}; undo the edit, or train anew: --fresh, or another --name")


def load_encoder(path: str | pathlib.Path, size: int | None = None) -> ViT:
    """The encoder in a checkpoint of any stage (its weights are named encoder.* or video.encoder.*).
    SystemExit where it is not for images of `size` pixels (None: any will do)."""
    state = read_checkpoint(path)
    if not state["config"]:
        sys.exit(f"{path} holds a model of another library, not an encoder of this project")
    encoder = ViT(**state["config"])
    has = encoder.config["image_size"]
    if size not in (None, has):
        sys.exit(f"the encoder in {path} reads images of {has}x{has} pixels, not {size}x{size}")
    own = [name for name in state["model"] if name.startswith(("encoder.", "video.encoder."))]
    load_weights(encoder, {name.split("encoder.", 1)[1]: state["model"][name] for name in own}, path)
    return encoder


# ---------------------------------------------------------------- training


def steps_of(number: int, batch: int) -> int:
    """Steps of an epoch: whole batches of so many images; SystemExit where there is none."""
    if number < batch:
        sys.exit(f"{number} images are fewer than one step's {batch}; choose a smaller batch")
    return number // batch


class Progress:
    """A line that says how much of `total` is done, how fast it goes, and how long the rest will take."""

    def __init__(self, unit: str, total: int):
        self.unit, self.total, self.done = unit, total, 0
        self.started = self.shown = time.perf_counter()

    def advance(self, pieces: int) -> None:
        """So many more are done."""
        self.done += pieces
        self.show(f"{self.done:,} of {self.total:,}", self.done == self.total)

    def show(self, text: str, last: bool = False) -> None:
        """Draw `text`, speed and time left over the line before; a log (no terminal) gets the last only."""
        self.shown = time.perf_counter()
        rate = self.done / (self.shown - self.started)
        left = round((self.total - self.done) / rate)
        line = f"{text}  {rate:.0f} {self.unit}/s  {left // 60}:{left % 60:02} left"
        width = shutil.get_terminal_size().columns - 1
        if sys.stdout.isatty():
            print(f"\r{line[:width]:<{width}}", end="\n" if last else "", flush=True)
        elif last:
            print(line, flush=True)


class Run:
    """One training run, which can be stopped at any moment and goes on when the same command is typed again.

        run = Run(...)                                 # goes on from out/NAME.pt where there is one
        for epoch in range(run.epoch, run.epochs):     # none, where it is finished
            for ... : ...; run.log(loss=loss)          # a step: what the loop does, and its numbers
            run.save()                                 # the epoch's means; the checkpoint
        run.finish()                                   # from here on the run counts as finished

    A checkpoint holds weights, optimiser, schedule, random generators and metrics. So a resumed run draws the
    same numbers as one that was not interrupted; on a CPU its weights are the same bit by bit. `settings` is
    whatever makes it another run: where the checkpoint has others, it is not gone on with. `steps` are those
    of an epoch, `images` those of a step.

    What else must survive a stop (an EMA teacher, say) must be part of `model`, or no checkpoint holds it. To
    stop early, decide from `run.history`, which a resumed run has, too, at the top of an epoch. Every
    epoch's weights are kept with --keep-epochs, as NAME-epoch1.pt, ... Run notices edits of .py files only:
    after editing a loop in a notebook's cell, choose another name, or fresh=True.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        machine: Machine,
        settings: dict,
        epochs: int,
        steps: int,
        images: int,
        out: str | pathlib.Path = "runs/mine",
        fresh: bool = False,
        keep_epochs: bool = False,
    ):
        self.name, self.model, self.optimizer, self.schedule = name, model, optimizer, schedule
        self.machine, self.keep_epochs, self.finished = machine, keep_epochs, False
        self.settings = settings | {"epochs": epochs, "seed": machine.seed}
        self.epochs, self.images = epochs, images
        self.path = pathlib.Path(out) / f"{name}.pt"
        self.code = loaded_code()
        self.generator = torch.Generator(machine.device).manual_seed(machine.seed)
        self.history = {}  # metric -> its mean in each epoch
        self.epoch, self.seconds = 0, 0.0  # finished ones; what they took
        self.batches, self.sums = 0, {}  # of the epoch so far; metric -> its sum over them
        size = sum(p.numel() for p in model.parameters())
        print(f"{name}: {size:,} parameters, {epochs} epochs of {steps} steps of {images} images")
        if fresh and RANK == 0:  # else a stop in the first epoch would bring the old run back
            for old in [self.path, *self.path.parent.glob(f"{name}-epoch*.pt")]:
                old.unlink(missing_ok=True)
        if self.path.exists() and not fresh:
            self.resume()
        self.started = time.perf_counter()  # of the epoch
        self.progress = Progress("images", (epochs - self.epoch) * steps * images)

    def resume(self) -> None:
        """Go on from the checkpoint of an earlier start of this run; SystemExit where it was another run."""
        state = read_checkpoint(self.path)
        refuse_other_settings(self.path, state["settings"], self.settings)
        edited = edited_since(state["code"])
        load_weights(self.model, state["model"], self.path)
        self.epoch, self.seconds, self.history = state["epoch"], state["seconds"], state["history"]
        self.machine = self.machine._replace(precision=state["precision"])  # another would be another run
        if state["finished"]:
            self.finished, self.epochs = True, self.epoch  # it may have been stopped early
            note = f"; {edited} has been edited since: --fresh trains anew" if edited else ""
            print(f"{self.name}: finished before, taken from {self.path}{note}")
            return
        if edited:  # half a run with the old loss and half with the new would be neither
            why = f"{edited} has been edited since the first half of {self.path} was trained"
            sys.exit(f"{why}; undo the edit, or add --fresh to start over")
        # a random generator can't go on elsewhere
        refuse_other_settings(self.path, state, {"device": self.machine.device.type})
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["random"])  # for who adds dropout
        for name, p in self.model.named_parameters():  # what a loop that adds up gradients had not yet used
            if name in state["gradients"]:
                p.grad = state["gradients"][name].to(p.device)
        print(f"{self.name}: going on after epoch {self.epoch} of {self.epochs} in {state['precision']}")

    def log(self, **metrics: Tensor) -> None:
        """Note a step's loss and other scalars; once a second show the epoch's means so far."""
        for key, value in metrics.items():
            self.sums[key] = self.sums.get(key, 0) + torch.as_tensor(value).detach().float()
        self.batches += 1
        self.progress.done += self.images
        if time.perf_counter() - self.progress.shown > 1:  # at every batch it would make a GPU wait
            self.show(self.means())

    def means(self) -> dict[str, float]:
        """Every metric's mean over the epoch's batches so far."""
        return {key: (total / self.batches).item() for key, total in self.sums.items()}

    def show(self, metrics: dict[str, float], last: bool = False) -> None:
        """The progress line, with these metrics."""
        values = "".join(f"  {key} {value:.3f}" for key, value in metrics.items())
        self.progress.show(f"{self.name} {self.epoch + 1}/{self.epochs}{values}", last)

    def save(self, **extra: float) -> None:
        """End an epoch: show and keep its means and `extra` metrics; write the checkpoint. Raises
        FloatingPointError, and keeps the checkpoint of the epoch before, where the loss is not finite."""
        metrics = self.means() | extra
        if PROCESSES > 1:
            everywhere = torch.tensor(list(metrics.values()), device=self.machine.device) / PROCESSES
            dist.all_reduce(everywhere)
            metrics = dict(zip(metrics, everywhere.tolist()))
        self.show(metrics, last=True)
        if not math.isfinite(metrics["loss"]):
            why = f"{self.name}: the loss is not finite in epoch {self.epoch + 1}"
            raise FloatingPointError(f"{why}; the last good epoch is kept; try a smaller --lr with --fresh")
        for key, value in metrics.items():
            self.history.setdefault(key, []).append(value)
        now = time.perf_counter()
        self.seconds += now - self.started
        self.epoch, self.batches, self.sums, self.started = self.epoch + 1, 0, {}, now
        if self.keep_epochs:
            write_tensors(self.path.with_stem(f"{self.name}-epoch{self.epoch}"), self.state(finished=True))
        write_tensors(self.path, self.state())

    def finish(self) -> None:
        """Write the last checkpoint, without what only a resumed run needs: from now on it is finished."""
        if self.finished:  # before: what the file says of code and device is still true
            return
        if self.batches:
            sys.exit(f"{self.name}: stopped inside epoch {self.epoch + 1}; call save() before finish()")
        share = self.schedule.get_last_lr()[0] / self.schedule.base_lrs[0]
        if self.epoch == self.epochs and share > 0.01:
            end = f"{self.name}: the learning rate ended at {share:.0%} of its peak"
            print(f"{end}; does the schedule count the same steps as schedule.step()?")
        write_tensors(self.path, self.state(finished=True))

    def state(self, finished: bool = False) -> dict:
        """What a checkpoint holds."""
        encoder = getattr(self.model, "encoder", None)  # a model of another library has none
        state = {key: getattr(self, key) for key in ("epoch", "seconds", "history", "settings", "code")}
        state |= {"device": self.machine.device.type, "precision": self.machine.precision}
        state |= {"model": self.model.state_dict(), "config": encoder.config if encoder else None}
        state |= {"finished": finished}
        if not finished:
            gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
            state |= {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
            state |= {"generator": self.generator.get_state(), "random": torch.get_rng_state()}
            state |= {"gradients": gradients}
        return state

    def summary(self) -> dict:
        """What a row of results.json says of its training."""
        last = {key: self.history[key][-1] for key in ("train", "validation") if key in self.history}
        last |= {"epochs": self.epoch, "seconds": self.seconds}
        return last | {"weights": hash_of_weights(self.model.state_dict())}


def settings_of(args: argparse.Namespace, encoder: ViT | None = None, **more) -> dict:
    """What makes it another run: all options, typed or not, less those that leave the weights alone; the
    encoder's sizes; and `more`. Files and images count by their contents, which the stage adds, not by their
    names."""
    harmless = ("run", "out", "name", "split", "device", "precision", "fresh", "keep_epochs")
    by_content = ("data", "init", "checkpoint", "captions")
    found = {key: value for key, value in vars(args).items() if key not in harmless + by_content}
    if encoder:
        config = encoder.config
        found |= {"dim": config["dim"], "patch": config["patch_size"], "stem": config["stem"]}
    return found | more


def plan_of(args: argparse.Namespace, steps: int, images: int) -> dict:
    """What Run has to know of the options: epochs; `steps` of an epoch, `images` of a step; where checkpoints
    lie, which are kept, and whether to start over."""
    length = {"epochs": args.epochs, "steps": steps, "images": images}
    return length | {"out": args.out, "fresh": args.fresh, "keep_epochs": args.keep_epochs}


def refuse_other_settings(path: pathlib.Path, before: dict, now: dict) -> None:
    """SystemExit if the file that is to be gone on with was made otherwise than it would be now."""
    for key, value in now.items():
        if before.get(key) != value:
            made = f"{path} was made with another {key}: {before.get(key)!r}, not {value!r}"
            if key == "epochs":
                made += " (its learning rate falls to zero at the end: there is no going on)"
            sys.exit(f"{made}; add --fresh to start over, or choose another --name")


SOURCES = {}  # .py file -> hash of what was loaded from it, once it was loaded


def loaded_code() -> dict[str, str]:
    """The .py files of this folder that are loaded, and the script, by name, with a hash of each. SystemExit
    where one has been edited since it was loaded: a notebook runs on with the old one."""
    here, found = os.path.dirname(os.path.abspath(__file__)), {}
    for name, module in sorted(sys.modules.items()):
        path = os.path.abspath(getattr(module, "__file__", None) or "")
        if (os.path.dirname(path) != here and name != "__main__") or not os.path.isfile(path):
            continue
        file, now = os.path.basename(path), hash_of_files(path)
        if name == "__main__":  # the script, which is read anew each time
            SOURCES[path] = now
        if SOURCES.setdefault(path, now) != now:
            sys.exit(
                f"{file} has been edited since it was loaded; restart Python (in a notebook: the kernel)"
            )
        found[file] = now
    return found


def edited_since(before: dict[str, str]) -> str:
    """The first file that was loaded before and now, and has another content now; "" where there is none."""
    now = loaded_code()
    return next((name for name in before if now.get(name, before[name]) != before[name]), "")


loaded_code()  # remember what has been loaded until now: this file, data.py


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of logits [n, K] whose largest entry is the label [n]."""
    return (logits.argmax(dim=1) == labels).float().mean().item()


# ---------------------------------------------------------------- results.json, the command line


def read_results(out: str | pathlib.Path) -> dict:
    """The contents of out/results.json; empty rows where there is none yet."""
    path = pathlib.Path(out) / "results.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {"rows": {}}
    except ValueError:
        sys.exit(f"{path} is no JSON any more; mend it or move it away: the stages write their rows anew")


def row_name(args: argparse.Namespace, name: str) -> str:
    """A row's name in results.json: one measured on the validation split says so."""
    return name if args.split == "test" else f"{name}_{args.split}"


def arrays_path(args: argparse.Namespace, name: str) -> pathlib.Path:
    """Where a row's arrays for the figures lie."""
    return pathlib.Path(args.out) / f"{row_name(args, name)}.npz"


def record(args: argparse.Namespace, name: str, machine: Machine, source, **row) -> None:
    """Put a row into results.json: `value` (a fraction) and what else it says. `source`: data.source's."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "pillow", "transformers", "open_clip_torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # a copied file needs only some of them
            versions[package] = metadata.version(package)
    launcher = ["torchrun", f"--nproc_per_node={PROCESSES}"] if PROCESSES > 1 else ["python"]
    where = {"seed": machine.seed, "device": machine.name, "precision": machine.precision}
    where |= {"provenance": source.provenance}
    results, name = read_results(args.out), row_name(args, name)
    results |= {"dataset": source.name, "versions": versions}
    typed = {"split": args.split, "command": shlex.join([*launcher, *sys.argv]), "code": loaded_code()}
    results["rows"][name] = where | row | typed
    write_file(pathlib.Path(args.out) / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    print(f"{name}: {row['value']:.4f}", flush=True)


def measured(args: argparse.Namespace, name: str, now: dict) -> bool:
    """True where results.json already has this row, by the same command and code, of the same weights and
    images (`now`)."""
    name = row_name(args, name)
    row = read_results(args.out)["rows"].get(name, {})
    same = all(row.get(key) == now[key] for key in ("weights", "images"))
    known = same and not edited_since(row["code"]) and row["command"].endswith(shlex.join(sys.argv))
    if known:
        print(f"{name}: {row['value']:.4f}, measured before", flush=True)
    return known


def count(text: str) -> int:
    """An option's value: a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def fraction(text: str) -> float:
    """An option's value: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


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
    add("--limit", type=count, help="use only so many images of each split (default: all)")
    add("--device", default="auto", help="cpu, cuda, mps (default: the fastest there is)")
    add("--precision", choices=["auto", "float32", "bfloat16"], default="auto", help="default: the faster")
    return p


def encoder_arguments() -> argparse.ArgumentParser:
    """The options of the stages that make a new encoder, to be used as a parent parser."""
    p = argparse.ArgumentParser(add_help=False)
    add = p.add_argument
    add("--dim", type=count, help="width of a new encoder (default: 128)")
    add("--patch", type=count, help="patch size of a new encoder in pixels (default: 8)")
    add("--stem", action="store_true", help="give a new encoder a small convolution inside each patch")
    return p


def make_encoder(checkpoint: str | None, size: int, patch: int | None, dim: int | None, stem: bool) -> ViT:
    """The encoder in `checkpoint`, which must be as asked for; without one, a new random encoder. `size`: of
    the images, in pixels."""
    try:
        if checkpoint:
            encoder = load_encoder(checkpoint, size)
        else:
            encoder = ViT(size, patch or 8, dim or 128, stem=stem)
    except ValueError as error:
        sys.exit(f"no such encoder: {error}; choose another --patch or --dim")
    for name, asked in {"patch_size": patch, "dim": dim, "stem": stem or None}.items():
        option, has = name.removesuffix("_size"), encoder.config[name]
        if asked not in (None, has):
            sys.exit(f"the encoder in {checkpoint} has --{option} {has}, not {asked}")
    tokens, width = 1 + encoder.patches, encoder.config["dim"]
    print(f"encoder: {encoder.patches} patches + CLS = {tokens} tokens of width {width}", flush=True)
    return encoder


def training_arguments(epochs: int, muon: float, adamw: float, batch: int | None = None):
    """The options of every training stage, to be used as a parent parser, with this stage's defaults:
    peak learning rates of the two optimisers, images per step (None: the stage counts in other units)."""
    p = argparse.ArgumentParser(add_help=False)
    add = p.add_argument
    add("--epochs", type=count, default=epochs, help="passes over the training images (default: %(default)s)")
    if batch:
        add("--batch", type=count, default=batch, help="images per step (default: %(default)s)")
    add("--optimizer", choices=["muon", "adamw"], default="muon", help="default: %(default)s")
    add("--lr", type=float, help=f"peak learning rate (default: {muon:g}; with --optimizer adamw {adamw:g})")
    add("--weight-decay", type=float, default=0.05, help="on matrices only (default: %(default)s)")
    add("--warmup", type=fraction, default=0.1, help="share of steps with linear rise (default: %(default)s)")
    add("--keep-epochs", action="store_true", help="also keep every epoch's checkpoint, NAME-epoch1.pt, ...")
    add("--fresh", action="store_true", help="start over instead of going on")
    p.set_defaults(usual_lr={"muon": muon, "adamw": adamw})
    return p


def command(parser: argparse.ArgumentParser, source) -> None:
    """Run the stage that is typed (its parser has set `run` to the function). `source`: data.source."""
    import filelock  # comes with torch

    args = parser.parse_args()
    if hasattr(args, "usual_lr"):
        usual = vars(args).pop("usual_lr")
        args.lr = usual[args.optimizer] if args.lr is None else args.lr
    loaded_code()
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
        held, asked = read_results(out).get("dataset"), source(args.data).name
        if held not in (None, asked):
            sys.exit(f"{out} holds results on {held} images, not {asked}; choose another --out or --data")
        if PROCESSES > 1 and not hasattr(args, "epochs"):
            sys.exit("this is no training stage; start it with python instead of torchrun")
        args.run(args)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was, after its last epoch", file=sys.stderr)
        print("(with --fresh it starts over)", file=sys.stderr)
        sys.exit(130)
    except FloatingPointError as error:  # Run.save's
        sys.exit(str(error))
    except RuntimeError as error:  # CUDA, MPS and CPU say it in different words
        if not re.search("out of memory|(allocate|not enough) memory|ALLOC_FAILED", str(error)):
            raise
        sys.exit("out of memory; choose a smaller --batch (video.py: --clips) with --fresh, or --device cpu")
    finally:
        lock.release()  # a notebook lives on after its %run


def main() -> None:
    description, parents = "print the network, layer by layer", [common_arguments(), encoder_arguments()]
    args = argparse.ArgumentParser(description=description, parents=parents).parse_args()
    encoder = make_encoder(None, 32, args.patch, args.dim, args.stem)
    for name, part in [*encoder.named_children(), ("all, with CLS and positions", encoder)]:
        print(f"{name:<28} {sum(p.numel() for p in part.parameters()):>9,} parameters")
    print(encoder)


if __name__ == "__main__":
    main()
