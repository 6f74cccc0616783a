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
import re
import shlex
import shutil
import sys
import time
import warnings
from importlib import metadata

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

    The path from input to output has no norm on it (pre-norm), so gradients reach the first block unchanged;
    this is why a ViT trains without the long warm-up that the post-norm order needs (Xiong et al. 2020).
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
    attention by itself doesn't know where a token came from. The default: 16 patches, 17 tokens, 1.2 M
    parameters. `stem` replaces the linear map by a ConvStem.
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
    """Small weights and zero biases in linear layers, ViT's usual start (for use with nn.Module.apply)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class ModelM(nn.Module):
    """Model M: an encoder with heads that need no labels.

    Some patches were blacked out, some others all turned by one angle (data.patch_augment). The rotation head
    reads the angle from CLS; the reconstruction head paints each blacked-out patch from that patch's token.
    InfoNCE's projector is an MLP that is thrown away afterwards: it may forget what the encoder should keep.
    """

    def __init__(self, encoder: ViT, projector: bool = False):
        super().__init__()
        dim, patch = encoder.config["dim"], encoder.config["patch_size"]
        self.encoder = encoder
        self.rotation_head = nn.Linear(dim, 4)  # 0, 90, 180, 270 degrees
        self.reconstruction_head = nn.Linear(dim, 3 * patch * patch)
        self.projector = None
        if projector:
            self.projector = nn.Sequential(nn.Linear(dim, 512), nn.ReLU(), nn.Linear(512, 128))

    def forward(self, images: Tensor, masked: Tensor):
        """images [B, 3, S, S], masked patches' indices [B, M] -> angle logits [B, 4], pixels [B, M, 3*P*P],
        projected CLS [B, E] (None without a projector)."""
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

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, 3, S, S] -> class logits [B, K]."""
        return self.head(self.encoder(images)[:, 0])


# ---------------------------------------------------------------- Part 2: the plumbing
# Nothing below is about transformers.
#
# Under torchrun, PyTorch's launcher, every process draws the same random numbers and augments the whole batch
# (cheap beside the network); then each trains on its `share`, `data_parallel` averages the gradients, and
# InfoNCE, whose negatives are all other images, needs `gather`. One process gets back what it gave them.

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
        sys.exit(f"{len(x)} can't be shared out evenly among {PROCESSES} processes: --batch or --clips")
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


class Machine:
    """Where the run computes, and in which precision; both chosen here, and printed."""

    def __init__(self, device: str = "auto", precision: str = "auto", seed: int = 0):
        self.device, self.seed = find_device(device), seed
        kind = self.device.type
        if PROCESSES > 1 and not dist.is_initialized():
            if kind == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)
        torch.set_float32_matmul_precision("high")  # lets CUDA use its tensor cores for float32
        torch.manual_seed(seed)  # initial weights; what is drawn later comes from the run's own generator
        chosen = [precision, "as asked"]
        if precision == "auto":
            chosen = [*faster_precision(self.device)]
        if PROCESSES > 1:
            dist.broadcast_object_list(chosen)  # all take what process 0 found
        self.precision, why = chosen
        self.eval_batch = 125 if kind == "cpu" else 1000  # images at a time; few fit a CPU's cache
        chip = torch.cuda.get_device_name(self.device) if kind == "cuda" else processor_name()
        self.name = f"{kind} ({chip}, {torch.get_num_threads()} CPU threads)"
        print(f"{self.name}, {self.precision} ({why}); torch {torch.__version__}, seed {seed}", flush=True)

    def autocast(self):
        """Context in which matmuls run in the chosen precision; weights and residual stream stay float32."""
        if self.precision == "float32":
            return contextlib.nullcontext()  # not every device knows autocast, even disabled
        return torch.autocast(self.device.type, torch.bfloat16)


def find_device(asked: str) -> torch.device:
    """The device that was asked for, or with "auto" the first that works; SystemExit where none does."""
    names = [asked]
    if asked == "auto":
        mps = torch.backends.mps.is_available() and PROCESSES == 1
        there = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
        names = [name for name in there if there[name]]
    for name in names:
        if name == "cuda" and PROCESSES > 1:
            name = f"cuda:{os.environ['LOCAL_RANK']}"  # one GPU a process
        try:
            return (torch.zeros(1, device=name) + 1).device  # + 1: a GPU too old fails at its first kernel
        except (RuntimeError, AssertionError) as error:
            why = f"the device {name!r} can't be used here ({str(error).splitlines()[0]})"
            if asked == "auto":
                print(f"{why}; going on without", flush=True)
    sys.exit(f"{why}; try --device cpu")


def faster_precision(device: torch.device) -> tuple[str, str]:
    """The precision in which this device multiplies matrices faster, "float32" or "bfloat16", and why.

    Some chips compute in bfloat16, 2 to 3 times faster; all others only convert to it and back, 3 to 25 times
    slower. So little work tells them apart: the best of three products in each. On a CPU one thread's own
    time counts, which stays the same however busy the machine is.
    """
    on_cpu, threads = device.type == "cpu", torch.get_num_threads()
    clock, size = (time.thread_time, 384) if on_cpu else (time.perf_counter, 4096)
    seconds = {"float32": math.inf, "bfloat16": math.inf}
    torch.set_num_threads(1)
    try:
        matrix = torch.ones(size, size, device=device)  # not drawn: a seed's numbers are the experiment's
        for precision in ["float32", "bfloat16"] * 3:
            start = clock()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                (matrix @ matrix)[0, 0].item()  # .item() waits for the device
            seconds[precision] = min(seconds[precision], clock() - start)
    except Exception:  # MPS before macOS 14: TypeError, some old GPUs: RuntimeError
        return "float32", "bfloat16 does not work here"
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


def fingerprint(*paths: str | pathlib.Path) -> str:
    """A short hash of the files' contents, to tell which weights a number came from ("" for no file)."""
    files = [pathlib.Path(path) for path in paths if pathlib.Path(path).is_file()]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12] if files else ""


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


def load_encoder(path: str | pathlib.Path) -> ViT:
    """The encoder in a checkpoint of any stage (its weights are named encoder.* or video.encoder.*)."""
    state = read_checkpoint(path)
    if not state["config"]:
        sys.exit(f"{path} holds a model of another library, not an encoder of this project")
    encoder = ViT(**state["config"])
    own = [name for name in state["model"] if name.startswith(("encoder.", "video.encoder."))]
    encoder.load_state_dict({name.split("encoder.", 1)[1]: state["model"][name] for name in own})
    return encoder


def make_encoder(checkpoint: str | None, patch: int | None, dim: int | None, stem: bool) -> ViT:
    """The encoder in `checkpoint`, which must be as asked for; without one, a new random encoder."""
    try:
        encoder = load_encoder(checkpoint) if checkpoint else ViT(32, patch or 8, dim or 128, stem=stem)
    except ValueError as error:
        sys.exit(f"no such encoder: {error}; choose another --patch or --dim")
    for name, asked in {"patch_size": patch, "dim": dim, "stem": stem or None}.items():
        option, has = name.removesuffix("_size"), encoder.config[name]
        if asked not in (None, has):
            sys.exit(f"the encoder in {checkpoint} has --{option} {has}, not {asked}")
    tokens, width = 1 + encoder.patches, encoder.config["dim"]
    print(f"encoder: {encoder.patches} patches + CLS = {tokens} tokens of width {width}", flush=True)
    return encoder


# ---------------------------------------------------------------- training


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

    After each epoch `save` writes weights, optimiser, random generator and metrics to out/NAME.pt. So a
    resumed run draws the same numbers as an uninterrupted one; on a CPU its weights are the same bit by bit.
    """

    def __init__(self, args, name: str, model: nn.Module, machine: Machine, encoder, steps: int):
        """`encoder`: the ViT that --dim, --patch and --stem describe, or None; `steps`: of an epoch."""
        if steps < 1:
            sys.exit(f"{name}: the images are fewer than one step's {args.batch}; choose a smaller batch")
        self.args, self.name, self.model, self.machine, self.steps = args, name, model, machine, steps
        self.path = pathlib.Path(args.out) / f"{name}.pt"
        self.settings = what_matters(args, encoder)
        self.code = fingerprint(*loaded_files())
        self.generator = torch.Generator(machine.device).manual_seed(machine.seed)
        # weight decay pulls matrices towards zero; on biases, norms, CLS and positions it would only do harm
        matrices = {"params": [], "weight_decay": args.weight_decay}
        others = {"params": [], "weight_decay": 0.0}
        for key, p in model.named_parameters():
            is_matrix = p.ndim > 1 and not key.endswith(("cls", "positions"))
            (matrices if is_matrix else others)["params"].append(p)
        self.optimizer = torch.optim.AdamW([matrices, others], lr=args.lr, betas=(0.9, 0.99), fused=True)
        self.history = {}  # metric -> its mean in each epoch
        self.epoch, self.seconds = 0, 0.0  # finished ones; what they took
        self.batches, self.sums = 0, {}  # of the epoch so far; metric -> its sum over them
        size = sum(p.numel() for p in model.parameters())
        print(f"{name}: {size:,} parameters, {args.epochs} epochs of {steps} steps of {args.batch} images")
        if args.warmup >= args.epochs:
            print(f"{name}: with --warmup {args.warmup:g} the learning rate rises to the end")
        if self.path.exists() and not args.fresh:
            self.resume()
        self.started = time.perf_counter()  # of the epoch
        self.progress = Progress("images", (args.epochs - self.epoch) * steps * args.batch)

    def resume(self) -> None:
        """Go on from the checkpoint of an earlier start of this run."""
        state = read_checkpoint(self.path)
        refuse_other_settings(self.path, state["settings"], self.settings)
        if state["optimizer"]:  # in mid-run: a random generator can't go on elsewhere
            refuse_other_settings(self.path, state, {"device": self.machine.device.type})
        self.model.load_state_dict(state["model"])
        self.epoch, self.seconds, self.history = state["epoch"], state["seconds"], state["history"]
        if not state["optimizer"]:  # not kept once a run is finished
            edited = state.get("code", self.code) != self.code
            note = "; the code has been edited since: --fresh trains anew" if edited else ""
            print(f"{self.name}: finished before, taken from {self.path}{note}")
            return
        print(f"{self.name}: going on after epoch {self.epoch} of {self.args.epochs} in {state['precision']}")
        self.machine.precision = state["precision"]  # another one would be another run
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])

    def set_learning_rate(self) -> None:
        """Linear warm-up, then half a cosine down to zero (SGDR, 2017), over all steps of the run."""
        step, total = self.epoch * self.steps + self.batches, self.args.epochs * self.steps
        warmup = int(self.args.warmup * self.steps)
        if step < warmup:
            share_of_full = (step + 1) / warmup
        else:
            share_of_full = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * share_of_full

    def log(self, **metrics: Tensor) -> None:
        """End a step, after the optimiser's: count it (set_learning_rate goes by this count), note its loss
        and other scalars; once a second show their means so far."""
        for key, value in metrics.items():
            self.sums[key] = self.sums.get(key, 0) + value.detach().float()
        self.batches += 1
        self.progress.done += self.args.batch
        if time.perf_counter() - self.progress.shown > 1:  # at every batch it would make a GPU wait
            self.show(self.means())

    def means(self) -> dict[str, float]:
        """Every metric's mean over the epoch's batches so far; SystemExit where the loss is not finite."""
        means = {key: (total / self.batches).item() for key, total in self.sums.items()}
        if not math.isfinite(means["loss"]):
            where = f"\n{self.name}: the loss is not finite in epoch {self.epoch + 1}"
            sys.exit(f"{where}; the last good epoch is kept; try a smaller --lr with --fresh")
        return means

    def show(self, metrics: dict[str, float], last: bool = False) -> None:
        """The progress line, with these metrics."""
        values = "".join(f"  {key} {value:.3f}" for key, value in metrics.items())
        self.progress.show(f"{self.name} {self.epoch + 1}/{self.args.epochs}{values}", last)

    def save(self, **extra: float) -> None:
        """End an epoch: show and keep its means and `extra` metrics; write the checkpoint."""
        metrics = self.means()
        if PROCESSES > 1:
            everywhere = torch.tensor(list(metrics.values()), device=self.machine.device) / PROCESSES
            dist.all_reduce(everywhere)
            metrics = dict(zip(metrics, everywhere.tolist()))
        metrics |= extra
        self.show(metrics, last=True)
        for key, value in metrics.items():
            self.history.setdefault(key, []).append(value)
        now = time.perf_counter()
        self.seconds += now - self.started
        self.epoch, self.batches, self.sums, self.started = self.epoch + 1, 0, {}, now
        encoder = getattr(self.model, "encoder", None)  # a model of another library has none
        state = {key: getattr(self, key) for key in ("epoch", "seconds", "history", "settings", "code")}
        state |= {"device": self.machine.device.type, "precision": self.machine.precision}
        state |= {"model": self.model.state_dict(), "config": encoder.config if encoder else None}
        state |= {"generator": self.generator.get_state(), "optimizer": None}
        if self.args.keep_epochs:
            write_tensors(self.path.with_stem(f"{self.name}-epoch{self.epoch}"), state)
        if self.epoch < self.args.epochs:
            state["optimizer"] = self.optimizer.state_dict()
        write_tensors(self.path, state)

    def summary(self) -> dict:
        """What a row of results.json says of its training."""
        last = {key: self.history[key][-1] for key in ("train", "validation") if key in self.history}
        return last | {"epochs": self.epoch, "seconds": self.seconds, "weights": fingerprint(self.path)}


FILES = {"init", "checkpoint", "captions"}  # options that name a file; what counts is its contents


def what_matters(args: argparse.Namespace, encoder: ViT | None) -> dict:
    """What makes it another run: its options, less those that leave the weights alone, and its files."""
    harmless = ("fresh", "split", "run", "device", "precision", "out", "name", "keep_epochs")
    found = {key: value for key, value in vars(args).items() if key not in harmless}
    for key in FILES & found.keys():
        found[key] = fingerprint(found[key] or "")
    if encoder:  # its sizes, said or left to the default, are the same run
        config = encoder.config
        found |= {"dim": config["dim"], "patch": config["patch_size"], "stem": config["stem"]}
    return found


def refuse_other_settings(path: pathlib.Path, before: dict, now: dict) -> None:
    """SystemExit if the file that is to be gone on with was made otherwise than it would be now."""
    for key, value in now.items():
        if before.get(key) != value:
            made = f"{path} was made with another {key}: {before.get(key)!r}, not {value!r}"
            if key == "epochs":
                made += " (its learning rate falls to zero at the end: there is no going on)"
            sys.exit(f"{made}; add --fresh to start over, or choose another --name")


def loaded_files() -> list[str]:
    """The .py files of this folder that are loaded: the script and what it imports."""
    here = pathlib.Path(__file__).resolve().parent
    files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    return sorted(file for file in files if pathlib.Path(file).resolve().parent == here)


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
    results, name = read_results(args.out), row_name(args, name)
    results |= {"dataset": source.name, "provenance": source.provenance, "versions": versions} | where
    typed = {"split": args.split, "command": shlex.join([*launcher, *sys.argv])}
    results["rows"][name] = where | row | typed
    write_file(pathlib.Path(args.out) / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    print(f"{name}: {row['value']:.4f}", flush=True)


def measured(args: argparse.Namespace, name: str, *checkpoints: str) -> bool:
    """True where results.json already has this row, from the same command and the same weights."""
    name = row_name(args, name)
    row = read_results(args.out)["rows"].get(name, {})
    known = row.get("weights") == fingerprint(*checkpoints) and row["command"].endswith(shlex.join(sys.argv))
    if known:
        print(f"{name}: {row['value']:.4f}, measured before", flush=True)
    return known


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
    """Run the stage that is typed (its parser has set `run` to the function). `source`: data.source."""
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
        held, asked = read_results(out).get("dataset"), source(args.data).name
        if held not in (None, asked):
            sys.exit(f"{out} holds results on {held} images, not {asked}; choose another --out or --data")
        if PROCESSES > 1 and not hasattr(args, "epochs"):
            sys.exit("this is no training stage; start it with python instead of torchrun")
        args.run(args)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was, after its last epoch", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:  # CUDA, MPS and CPU say it in different words
        if not re.search("out of memory|(allocate|not enough) memory", str(error)):
            raise
        sys.exit("out of memory; choose a smaller --batch (video.py: --clips) with --fresh, or --device cpu")
    finally:
        lock.release()  # a notebook lives on after its %run


def main() -> None:
    description = "print the network, layer by layer"
    args = argparse.ArgumentParser(description=description, parents=[common_arguments()]).parse_args()
    encoder = make_encoder(None, args.patch, args.dim, args.stem)
    for name, part in [*encoder.named_children(), ("all, with CLS and positions", encoder)]:
        print(f"{name:<28} {sum(p.numel() for p in part.parameters()):>9,} parameters")
    print(encoder)


if __name__ == "__main__":
    main()
