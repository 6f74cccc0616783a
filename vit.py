"""A Vision Transformer for one small image, written out; and the plumbing that every training loop here shares.

Part 1, the network (read this first):   Attention -> Block -> ViT -> ModelM, Classifier
Part 2, the plumbing:                    machine and precision, files, checkpoints, Run (schedule, progress, resume)

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
import signal
import sys
import threading
import time
import warnings

import torch
import torch.distributed as dist
from torch import nn

# ----------------------------------------------------------------------------------------------------------------------
# Part 1: the network
# ----------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, equation 1 and section 3.2.2).

    Every token asks a question (query), offers a label (key) and carries a message (value). A token's output is the
    average of all messages, weighted by how well their labels answer its question:

        attention(Q, K, V) = softmax(Q K^T / sqrt(D / H)) V

    H heads do this side by side, each in its own D / H dimensions, so that one token can look for H things at once.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} can't be shared out evenly among {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)  # the three projections side by side: one big matmul is faster than three
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [B, T, D] -> the attended tokens [B, T, D] and the attention weights [B, H, T, T] (rows sum to one)."""
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)  # [B, T, 3, H, D/H]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D/H]
        # without the scale the scores' variance grows with D/H, the softmax saturates and its gradient vanishes
        scores = q @ k.transpose(-2, -1) * (D // self.heads) ** -0.5  # [B, H, T, T]
        weights = scores.softmax(dim=-1)
        out = (weights @ v).transpose(1, 2).reshape(B, T, D)  # [B, H, T, D/H] -> [B, T, H, D/H] -> [B, T, D]
        return self.proj(out), weights


class Block(nn.Module):
    """One pre-norm transformer block: attention mixes tokens, then an MLP works on each token by itself.

        x = x + attention(norm(x))
        x = x + mlp(norm(x))

    The path from input to output has no norm on it (pre-norm), so gradients reach the first block unchanged; this is
    why a ViT trains without the long warm-up that the original post-norm order needs (Xiong et al. 2020).
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: int = 4):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x: torch.Tensor, trace: list | None = None) -> torch.Tensor:
        """x: [B, T, D] -> [B, T, D].

        `trace`, where given, is a list that receives one dict per block: the residual stream "before" the attention,
        "attended" (after the attention's residual sum) and "after" the block, each [B, T, D], and the attention
        "weights" [B, H, T, T]. It serves CKA and pictures; the computation is the same with and without it.
        """
        update, weights = self.attn(self.norm1(x))
        attended = x + update
        out = attended + self.mlp(self.norm2(attended))
        if trace is not None:
            trace.append({"before": x, "attended": attended, "after": out, "weights": weights})
        return out


class ViT(nn.Module):
    """Vision Transformer encoder (Dosovitskiy et al. 2021, equations 1-4): an image as a short sentence of patches.

    The image is cut into N = (S / P)^2 patches; each becomes one token by a linear map; a learned CLS token is put in
    front, where it collects what describes the whole image; learned positions are added, since attention by itself
    doesn't know where a token came from. The default (S 32, P 8) makes 16 patches, 17 tokens, 1.2 M parameters.
    """

    def __init__(self, image_size: int = 32, patch_size: int = 8, dim: int = 128, depth: int = 6, heads: int = 4, stem: bool = False):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image size {image_size} is not a whole number of {patch_size}-pixel patches")
        self.config = {"image_size": image_size, "patch_size": patch_size, "dim": dim, "depth": depth, "heads": heads, "stem": stem}
        self.patches = patches = (image_size // patch_size) ** 2
        # a convolution whose stride is its kernel size = the same linear map applied to every patch
        self.patch_embedding = ConvStem(patch_size, dim) if stem else nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, 1 + patches, dim))
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        for p in (self.cls, self.positions):
            nn.init.trunc_normal_(p, std=0.02)
        self.apply(init_linear)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """What the first block reads: images [B, 3, S, S], values in [0, 1] -> tokens [B, 1 + N, D]; token 0 is CLS."""
        x = self.patch_embedding(standardise(images))  # [B, D, S/P, S/P]
        x = x.flatten(2).transpose(1, 2)  # [B, N, D], row by row
        return torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.positions  # [B, 1 + N, D]

    def forward(self, images: torch.Tensor, trace: list | None = None) -> torch.Tensor:
        """images: [B, 3, S, S], values in [0, 1] -> tokens [B, 1 + N, D]; token 0 is CLS. `trace`: see Block."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x, trace)
        return self.norm(x)


class ConvStem(nn.Module):
    """A patch embedding that looks for edges first: a 3x3 convolution, a non-linearity, then the linear map of a patch.

    Xiao et al. 2021 ("Early convolutions help transformers see better") let neighbouring patches mix here; in this one
    every patch is padded and convolved by itself, so that nothing of a blacked-out patch can be seen next door.
    """

    def __init__(self, patch: int, dim: int, width: int = 32):
        super().__init__()
        self.patch = patch
        self.layers = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, dim, patch))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: [B, 3, S, S] -> [B, D, S/P, S/P]."""
        B, P, side = len(images), self.patch, images.shape[-1] // self.patch
        x = images.view(B, 3, side, P, side, P).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, P, P)  # [B*N, 3, P, P]
        return self.layers(x).view(B, side, side, -1).permute(0, 3, 1, 2)  # [B*N, D, 1, 1] -> [B, D, S/P, S/P]


def standardise(images: torch.Tensor) -> torch.Tensor:
    """Pixel values in [0, 1] -> about zero mean and unit spread (CIFAR-10's own are 0.47 and 0.25)."""
    return (images - 0.5) / 0.25


def init_linear(module: nn.Module) -> None:
    """Small weights and zero biases in linear layers, ViT's usual start (for use with nn.Module.apply)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class ModelM(nn.Module):
    """Model M: an encoder with two heads that need no labels.

    Some patches were blacked out, some others all turned by one angle (data.patch_augment). The rotation head reads
    the angle from CLS; the reconstruction head paints each blacked-out patch from that patch's token.
    """

    def __init__(self, encoder: ViT):
        super().__init__()
        dim, patch = encoder.config["dim"], encoder.config["patch_size"]
        self.encoder = encoder
        self.rotation_head = nn.Linear(dim, 4)  # 0, 90, 180, 270 degrees
        self.reconstruction_head = nn.Linear(dim, 3 * patch * patch)
        self.projector = None  # a third head, for InfoNCE, where a stage puts one

    def forward(self, images: torch.Tensor, masked: torch.Tensor | None = None):
        """images: [B, 3, S, S]; masked: [B, M] patch indices -> angle logits [B, 4], pixels [B, M, 3*P*P], and the projected
        CLS [B, E] or, without projector, None. Without `masked`, the projected CLS alone."""
        tokens = self.encoder(images)
        cls, patches = tokens[:, 0], tokens[:, 1:]  # [B, D], [B, N, D]
        z = self.projector(cls) if self.projector else None  # [B, E]
        if masked is None:
            return z
        at = masked[:, :, None].expand(-1, -1, patches.shape[-1])  # [B, M, D]
        return self.rotation_head(cls), self.reconstruction_head(patches.gather(1, at)), z


class Classifier(nn.Module):
    """An encoder and a linear layer on its CLS token."""

    def __init__(self, encoder: ViT, classes: int = 10):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config["dim"], classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: [B, 3, S, S] -> class logits [B, K]."""
        return self.head(self.encoder(images)[:, 0])


# ----------------------------------------------------------------------------------------------------------------------
# Part 2: the plumbing. Nothing below is about transformers.
# ----------------------------------------------------------------------------------------------------------------------

# torchrun, PyTorch's launcher, tells each process its number and how many there are; only the first one prints and writes
RANK, PROCESSES = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if "TORCHELASTIC_RUN_ID" in os.environ else (0, 1)


class Machine:
    """Where the run computes, and in which precision; both chosen here, and printed."""

    def __init__(self, device: str = "auto", precision: str = "auto", seed: int = 0):
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and PROCESSES == 1 else "cpu"
        if device.startswith("cuda") and PROCESSES > 1:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            sys.exit(f"the device {device!r} can't be used on this machine ({str(error).splitlines()[0]}); try --device cpu")
        self.device = torch.device(device)
        if PROCESSES > 1 and not dist.is_initialized():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)
        torch.set_float32_matmul_precision("high")  # lets CUDA use its tensor cores for float32
        torch.manual_seed(seed)  # initial weights; everything drawn later comes from the run's own generator
        why = "as asked"
        if precision == "auto":
            choice = [*faster_precision(self.device)]
            if PROCESSES > 1:  # all take what the first one found
                dist.broadcast_object_list(choice)
            precision, why = choice
        self.precision, self.seed = precision, seed
        self.eval_batch = 125 if self.device.type == "cpu" else 1000  # small: activations fit a CPU's cache; a GPU wants work
        kind = {"cuda": lambda: torch.cuda.get_device_name(self.device), "mps": lambda: "Apple GPU"}.get(self.device.type, processor_name)()
        self.name = f"{self.device.type} ({kind}, {torch.get_num_threads()} CPU threads{f' in each of {PROCESSES} processes' if PROCESSES > 1 else ''})"
        print(f"{self.name}, {self.precision} ({why}); torch {torch.__version__}, seed {seed}", flush=True)

    def autocast(self):
        """Context in which matmuls run in bfloat16 where that was chosen; weights and the residual stream stay float32."""
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    # The rest is for `torchrun`; a single process gets everything back as it gave it. Every process holds the whole data
    # set, draws the same random numbers and augments the whole batch (cheap beside the network); then each takes its share.

    def parallel(self, model: nn.Module, some_idle: bool = False) -> nn.Module:
        """The model for a training step: called like `model`, it averages the gradients of all processes in backward.
        `some_idle`: it has parameters that the step does not use."""
        if PROCESSES == 1:
            return model
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of CLS, which is one for the whole batch: harmless
        gpu = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=gpu, find_unused_parameters=some_idle)

    def part(self, *tensors: torch.Tensor | None, views: int = 1) -> list[torch.Tensor | None]:
        """This process's part of a global batch: of each tensor [views * B, ...] the rows [views * B / processes, ...]."""
        if PROCESSES == 1:
            return list(tensors)
        return [t if t is None else t.unflatten(0, (views, PROCESSES, -1))[:, RANK].flatten(0, 1) for t in tensors]

    def gather(self, x: torch.Tensor, views: int = 1) -> torch.Tensor:
        """The inverse of `part`: the parts [views * b, ...] of all processes, joined to [views * b * processes, ...].

        InfoNCE needs it. An image's negatives are all other images of the batch; a process that knew only its own share
        would have fewer of them, an easier task, and the mean of the gradients of such losses is not the gradient of the
        whole batch's loss, because a softmax over some of the scores is not a part of the softmax over all. So every
        process computes the whole loss, and from it the gradient of its own part, in all the part's roles. Together they
        are the gradient; since `parallel` will take their mean instead of their sum, they are multiplied by their number.
        """
        if PROCESSES == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(PROCESSES)]
        dist.all_gather(parts, x.detach().contiguous())
        x.register_hook(lambda gradient: gradient * PROCESSES)
        parts[RANK] = x  # the others' are constants here
        parts = [part.unflatten(0, (views, -1)) for part in parts]  # each [views, b, ...]
        return torch.stack(parts, dim=1).flatten(0, 2)  # [views, processes, b, ...] -> [views * processes * b, ...]

    def shared_out(self, number: int, batch: int, function) -> torch.Tensor:
        """Evaluate `function` on the indices 0 to number - 1, a batch at a time, each by one process: rows [number, K] for all."""
        mine = every = torch.arange(number, device=self.device)
        if number >= PROCESSES:
            mine = every.tensor_split(PROCESSES)[RANK]
        rows = torch.cat([function(index) for index in mine.split(batch)])  # [n, K]
        if len(mine) == number:
            return rows
        whole = rows.new_zeros(number, *rows.shape[1:])
        whole[mine] = rows
        dist.all_reduce(whole)  # every row is filled in by one process and zero in all others
        return whole


def faster_precision(device: torch.device) -> tuple[str, str]:
    """The precision in which this device multiplies matrices faster, "float32" or "bfloat16", and a few words why.

    Some processors and GPUs compute in bfloat16, 2 to 3 times faster; all others only convert to it and back, 3 to 25
    times slower. So little work tells them apart: the best of a few products in each precision, in turns, 0.2 s in all.
    On a CPU one thread's own time counts, which stays the same however busy the machine is.
    """
    on_cpu = device.type == "cpu"
    clock = time.thread_time if on_cpu else time.perf_counter
    size = 384 if on_cpu else 4096
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = {"float32": math.inf, "bfloat16": math.inf}
    try:
        matrix = torch.ones(size, size, device=device)  # nothing is drawn: a seed's numbers are for the experiment
        end = time.perf_counter() + 0.1
        for k in range(5):
            for precision in seconds:
                start = clock()
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
                    (matrix @ matrix)[0, 0].item()  # .item() waits for the device
                seconds[precision] = min(seconds[precision], clock() - start)
            if k and time.perf_counter() > end:
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
    """Write all of `content` or nothing: readers see the old file until the new one is complete and on disk."""
    if RANK:
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
        if part.exists():
            part.unlink()
        sys.exit(f"can't write {path}: {error.strerror}; free some space or choose another --out, then type the same command")


def lock_folder(out: pathlib.Path) -> None:
    """Refuse a second run in the folder `out`; the system gives the lock back however this process ends."""
    import fcntl  # not on plain Windows; WSL has it

    if RANK:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock_folder.held = open(out / ".lock", "w")  # stays open, and so locked, until the process ends
        fcntl.flock(lock_folder.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"another run is working in {out}; wait for it, stop it, or choose another --out")
    except OSError as error:
        sys.exit(f"can't write to the folder {out}: {error.strerror}; choose another --out")


def write_tensors(path: pathlib.Path, state: dict) -> None:
    """torch.save, all or nothing."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getvalue())


def write_npz(path: pathlib.Path, **arrays) -> None:
    """Keep the arrays (tensors, numbers or strings) that a figure needs beside the checkpoint."""
    import numpy

    buffer = io.BytesIO()
    numpy.savez_compressed(buffer, **{name: x.cpu().numpy() if torch.is_tensor(x) else numpy.asarray(x) for name, x in arrays.items()})
    write_file(path, buffer.getvalue())


def read_results(out: str | pathlib.Path) -> dict:
    """The contents of out/results.json; empty rows where there is none yet."""
    path = pathlib.Path(out) / "results.json"
    return json.loads(path.read_text()) if path.exists() else {"rows": {}}


def record(args: argparse.Namespace, name: str, machine: Machine, about: dict, **row) -> None:
    """Put one measured row into results.json: `value` (a fraction), what else the row says, and the command typed.

    `about`: {"dataset", "provenance"}, from data.describe. A row measured on the validation split says so in its name.
    """
    from importlib.metadata import version

    results, out = read_results(args.out), pathlib.Path(args.out)
    packages = ("torch", "numpy", "pillow", "transformers", "open_clip_torch")
    measured_by = {"seed": machine.seed, "device": machine.name, "precision": machine.precision}
    results |= about | measured_by | {"versions": {"python": platform.python_version()}}
    for package in packages:
        with contextlib.suppress(ImportError):
            results["versions"][package] = version(package)
    results["rows"][row_name(args, name)] = measured_by | row | {"memory_gb": memory_gb(), "split": args.split, "command": typed()}
    write_file(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    print(f"{row_name(args, name)}: {row['value']:.4f}", flush=True)


def memory_gb() -> float:
    """The most memory that this process has occupied so far (on a GPU: of the machine, not of the GPU)."""
    import resource  # not on plain Windows; WSL has it

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6), 2)  # macOS says bytes


def row_name(args: argparse.Namespace, name: str) -> str:
    """A row's name in results.json."""
    return name if args.split == "test" else f"{name}_{args.split}"


def arrays_path(args: argparse.Namespace, name: str) -> pathlib.Path:
    """Where the arrays lie that a row's stage keeps for the figures; like rows, those of validation and test apart."""
    return pathlib.Path(args.out) / f"{row_name(args, name)}.npz"


def measured(args: argparse.Namespace, name: str, *checkpoints: str) -> bool:
    """True where results.json already has this row, from the same command and the same weights."""
    row = read_results(args.out)["rows"].get(row_name(args, name), {})
    known = row.get("weights") == fingerprint(*checkpoints) and row["command"].endswith(shlex.join(sys.argv))
    if known:
        print(f"{row_name(args, name)}: {row['value']:.4f}, measured before", flush=True)
    return known


def typed() -> str:
    """The command line that started this."""
    return shlex.join([*(["torchrun", f"--nproc_per_node={PROCESSES}"] if PROCESSES > 1 else ["python"]), *sys.argv])


def fingerprint(*checkpoints: str) -> str:
    """A short hash of the checkpoints' contents, to tell which weights a number came from ("" for no file)."""
    files = [pathlib.Path(c) for c in checkpoints if pathlib.Path(c).is_file()]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12] if files else ""


def read_checkpoint(path: str | pathlib.Path) -> dict:
    """The contents of a checkpoint written by `Run`; one clear sentence where the file is not such a checkpoint.

    `weights_only` keeps a foreign file from running code: it admits tensors and plain Python values, nothing else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        sys.exit(f"there is no checkpoint {path}; a stage of this project makes one, `python ssl.py pretrain` the first")
    except Exception:  # torch.load raises many kinds of error on a file that isn't its own
        sys.exit(f"{path} can't be read as a checkpoint; it must be a .pt file that a stage of this project wrote")
    if not isinstance(state, dict) or not {"config", "model", "epoch", "settings"} <= state.keys():
        sys.exit(f"{path} is not a checkpoint of this project: it lacks what `Run` saves")
    return state


def load_encoder(path: str | pathlib.Path) -> ViT:
    """The encoder stored in a checkpoint of any stage (its weights are named encoder.*)."""
    state = read_checkpoint(path)
    if not state["config"]:
        sys.exit(f"{path} holds a model of another library, not an encoder of this project")
    encoder = ViT(**state["config"])
    weights = {k.removeprefix("video."): v for k, v in state["model"].items()}  # multimodal.py's model holds video.py's
    encoder.load_state_dict({k[8:]: v for k, v in weights.items() if k.startswith("encoder.")})
    return encoder


def make_encoder(args: argparse.Namespace, checkpoint: str | None) -> ViT:
    """The encoder in `checkpoint`; without one, a new random encoder of --dim and --patch."""
    if checkpoint:
        encoder = load_encoder(checkpoint)
        if args.stem and not encoder.config["stem"]:
            sys.exit(f"the encoder in {checkpoint} has no --stem; leave the option out, or choose another checkpoint")
        for option, asked, found in (("dim", args.dim, encoder.config["dim"]), ("patch", args.patch, encoder.config["patch_size"])):
            if asked not in (None, found):
                sys.exit(f"the encoder in {checkpoint} has --{option} {found}, not {asked}; leave the option out, or choose another checkpoint")
    else:
        try:
            encoder = ViT(patch_size=args.patch or 8, dim=args.dim or 128, stem=args.stem)
        except ValueError as error:
            sys.exit(f"no such encoder: {error}; choose another --patch or --dim")
    args.dim, args.patch, args.stem = (encoder.config[k] for k in ("dim", "patch_size", "stem"))  # said or not, it is the same run
    return encoder


class Run:
    """One training run that can be stopped at any moment and resumed by typing the same command.

        run = Run(args, "finetune", model, machine, steps_per_epoch)
        for epoch in run.epochs():                    # goes on after the last finished epoch
            for index in run.steps(batches):          # draws the progress line
                with machine.autocast():
                    output = model(...)
                loss = ...
                loss.backward()
                run.step(loss=loss)                   # clip, learning rate, AdamW, metrics

    After each epoch the weights, optimiser, random generator and metrics are saved to out/NAME.pt as one file, so a
    resumed run draws the same numbers as an uninterrupted one and, on a CPU, ends with the same weights bit for bit.
    """

    def __init__(self, args: argparse.Namespace, name: str, model: nn.Module, machine: Machine, steps_per_epoch: int):
        if steps_per_epoch < 1:
            sys.exit(f"{name}: fewer images than one batch of {args.batch}; choose a smaller --batch")
        if args.batch % PROCESSES:
            sys.exit(f"{name}: --batch {args.batch} can't be shared out evenly among {PROCESSES} processes; choose another --batch")
        self.path = pathlib.Path(args.out) / f"{name}.pt"
        self.name, self.model, self.machine, self.steps_per_epoch = name, model, machine, steps_per_epoch
        self.total, self.batch, self.lr, self.warmup = args.epochs, args.batch, args.lr, args.warmup
        self.epoch, self.seconds, self.history = 0, 0.0, {}  # finished epochs, time spent, metric -> mean of each epoch
        self.generator = torch.Generator(machine.device).manual_seed(machine.seed)
        # weight decay pulls matrices towards zero; on biases, norms, CLS and positions it would only do harm
        decay = [p for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith(("cls", "positions"))]
        other = [p for n, p in model.named_parameters() if p.ndim <= 1 or n.endswith(("cls", "positions"))]
        groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": other, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.99), fused=True)
        # what the command line asked for, less what does not change the weights (or, as precision, goes on as it began); a
        # start file counts by its contents
        loose = ("fresh", "split", "run", "device", "precision", "out", "name", "keep_epochs")
        self.keep_epochs = args.keep_epochs
        self.settings = {k: v for k, v in vars(args).items() if k not in loose}
        self.settings |= {k: fingerprint(self.settings[k] or "") for k in ("init", "checkpoint", "captions") if k in self.settings}
        if self.path.exists() and not args.fresh:
            self._resume()

    @property
    def finished(self) -> bool:
        """True when all epochs are done; the loop then has nothing to do."""
        return self.epoch >= self.total

    def epochs(self):
        """Yield the epochs still to do; save after each."""
        start, already = time.perf_counter(), self.seconds
        if self.finished:
            print(f"{self.name}: finished before, taken from {self.path}", flush=True)
        elif self.epoch:
            print(f"{self.name}: going on after epoch {self.epoch} of {self.total}", flush=True)
        while not self.finished:
            self.metrics, self.done = {}, 0
            self.model.train()
            yield self.epoch
            self.seconds = already + time.perf_counter() - start
            for key, value in self._means(everywhere=True).items():
                self.history.setdefault(key, []).append(value)
            self.epoch += 1
            self._save()

    def steps(self, batches):
        """Yield the batches of one epoch, telling progress, metrics, speed and time left for the whole run."""
        start = shown = time.perf_counter()
        terminal = sys.stdout.isatty()
        for batch in batches:
            yield batch
            now = time.perf_counter()
            last = self.done == self.steps_per_epoch
            if last or (terminal and now - shown > 1):  # reading the metrics makes a GPU wait, so only now and then
                shown, rate = now, self.done / (now - start)
                left = ((self.total - self.epoch) * self.steps_per_epoch - self.done) / rate
                metrics = "  ".join(f"{key} {value:.3f}" for key, value in self._means(everywhere=last).items())
                line = f"{self.name} epoch {self.epoch + 1}/{self.total}  {metrics}  {rate * self.batch:.0f} images/s  {left // 60:.0f}:{left % 60:02.0f} left"
                print(f"\r{line:<110}" if terminal else line, end="\n" if last or not terminal else "", flush=True)

    def step(self, **metrics: torch.Tensor) -> None:
        """After loss.backward(): clip, set this step's learning rate, take an AdamW step, note the metrics."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        at = self.epoch * self.steps_per_epoch + self.done
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * schedule(at, self.total * self.steps_per_epoch, int(self.warmup * self.steps_per_epoch))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.note(**metrics)
        self.done += 1

    def note(self, **metrics: torch.Tensor) -> None:
        """Keep scalar tensors for this epoch's averages without waiting for the device."""
        for key, value in metrics.items():
            self.metrics.setdefault(key, []).append(torch.as_tensor(value).detach().float())

    def _means(self, everywhere: bool = False) -> dict[str, float]:
        values = {key: torch.stack(list_) for key, list_ in self.metrics.items()}
        if everywhere and PROCESSES > 1:
            values = {key: value.to(self.machine.device) / PROCESSES for key, value in values.items()}
            for value in values.values():
                dist.all_reduce(value)
        values = {key: value.cpu() for key, value in values.items()}
        bad = (~torch.isfinite(values["loss"])).nonzero()
        if len(bad):
            sys.exit(f"\n{self.name}: the loss is not finite at epoch {self.epoch + 1}, step {bad[0].item() + 1}; "
                     "the last good epoch, if any, is kept; try a smaller --lr with --fresh")  # fmt: skip
        return {key: value.mean().item() for key, value in values.items()}

    def _save(self) -> None:
        encoder = getattr(self.model, "encoder", None)  # models of another library have none
        state = {"config": encoder and encoder.config, "model": self.model.state_dict(), "epoch": self.epoch, "optimizer": None,
                 "settings": self.settings, "generator": self.generator.get_state(), "history": self.history,
                 "seconds": self.seconds, "device": self.machine.device.type, "precision": self.machine.precision}  # fmt: skip
        if self.keep_epochs:
            write_tensors(self.path.with_stem(f"{self.name}-epoch{self.epoch}"), state)
        write_tensors(self.path, state if self.finished else state | {"optimizer": self.optimizer.state_dict()})
        if PROCESSES > 1:
            dist.barrier()  # the file is there before any process goes on

    def _resume(self) -> None:
        state = read_checkpoint(self.path)
        changed = [k for k, v in self.settings.items() if state["settings"].get(k) != v]
        if state["optimizer"] and state["device"] != self.machine.device.type:
            changed.append("device")  # its random generator can't go on elsewhere
        if changed:
            sys.exit(f"{self.path} was made with another {changed[0].replace('_', '-')}; "
                     "add --fresh to start over, or choose another --out or --name")  # fmt: skip
        self.model.load_state_dict(state["model"])
        self.epoch, self.history, self.seconds = state["epoch"], state["history"], state["seconds"]
        if self.machine.precision != state["precision"]:  # going on in another precision would be another run
            print(f"{self.name}: in {state['precision']}, as it began", flush=True)
            self.machine.precision = state["precision"]
        if state["optimizer"]:  # not needed, and not kept, once a run is finished
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])


def schedule(step: int, total: int, warmup: int) -> float:
    """Share of the full learning rate at `step`: linear warm-up, then half a cosine down to zero (SGDR, 2017)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of rows of logits [n, K] whose largest entry is the label [n]."""
    return (logits.argmax(dim=1) == labels).float().mean().item()


def positive(text: str) -> int:
    """For argparse: a whole number above zero."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text}")
    return int(text)


def between(low: float, high: float = math.inf):
    """For argparse: a function that reads a number from `low` to `high`."""

    def number(text: str) -> float:
        value = float(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"must be at least {low:g}{f' and at most {high:g}' if high < math.inf else ''}, not {text}")
        return value

    return number


def common_arguments() -> argparse.ArgumentParser:
    """The options of every stage, to be used as a parent parser."""
    p = argparse.ArgumentParser(add_help=False)
    p.add_argument("--data", default="data", help='folder with cifar-10-batches-bin, or the word "synthetic" (default: data)')
    p.add_argument("--out", default="runs/mine", help="folder for checkpoints, results.json and figures (default: runs/mine)")
    p.add_argument("--name", help="name of the checkpoint and of its row in results.json")
    p.add_argument("--split", choices=["validation", "test"], default="validation", help="where the final accuracy is measured; "
                   "choose with validation, look at test once (default: validation)")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="of everything drawn at random (default: 0)")
    p.add_argument("--limit", type=positive, help="use only so many images of each split (default: all)")
    p.add_argument("--dim", type=positive, help="width of a new encoder (default: 128)")
    p.add_argument("--patch", type=positive, help="patch size of a new encoder in pixels (default: 8)")
    p.add_argument("--stem", action="store_true", help="give a new encoder a small convolution inside each patch (default: none)")
    p.add_argument("--device", default="auto", help="cpu, cuda, mps (default: the fastest there is)")
    p.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto", help="default: the faster, by measurement")
    return p


def training_arguments(epochs: int, lr: float, batch: int | None = 128) -> argparse.ArgumentParser:
    """The options of every training stage, with this stage's defaults, to be used as a parent parser (batch None: no --batch)."""
    p = argparse.ArgumentParser(add_help=False)
    p.add_argument("--epochs", type=positive, default=epochs, help="passes over the training images (default: %(default)s)")
    if batch:
        p.add_argument("--batch", type=positive, default=batch, help="images per step (default: %(default)s)")
    p.add_argument("--lr", type=between(0), default=lr, help="peak learning rate of AdamW (default: %(default)s)")
    p.add_argument("--weight-decay", type=between(0), default=0.05, help="on matrices only (default: %(default)s)")
    p.add_argument("--warmup", type=between(0), default=1.0, help="epochs of linear warm-up (default: %(default)s)")
    p.add_argument("--keep-epochs", action="store_true", help="also keep the checkpoint of every epoch, as NAME-epoch1.pt, NAME-epoch2.pt, ...")
    p.add_argument("--fresh", action="store_true", help="start over instead of resuming")
    return p


def end(why: str) -> None:
    """Leave, as another process has; one of those that are left says so."""
    if RANK == 0 or PROCESSES == 2:
        print(f"another process of this run has ended ({why}); the same command goes on after the last finished epoch", file=sys.stderr, flush=True)
    os._exit(1)


def watch_for_the_end() -> None:
    """Under torchrun: be told when another process has died, which it does by SIGTERM, even while a GPU keeps us waiting."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # so that it goes to the thread that waits for it
    threading.Thread(target=lambda: end(signal.Signals(signal.sigwait([signal.SIGTERM])).name), daemon=True).start()


def command(parser: argparse.ArgumentParser) -> None:
    """Run the stage that the command line names; its parser has set `run` to the function."""
    if PROCESSES > 1:
        watch_for_the_end()
    if RANK:
        sys.stdout = open(os.devnull, "w")
    try:
        args = parser.parse_args()
        if PROCESSES > 1 and not hasattr(args, "epochs"):
            sys.exit("this is no training stage; start it with python instead of torchrun")
        lock_folder(pathlib.Path(args.out))
        held, asked = read_results(args.out).get("dataset"), "synthetic" if getattr(args, "data", "") == "synthetic" else "cifar10"
        if held not in (None, asked):
            sys.exit(f"{args.out} holds results on {held} images, and --data names those of {asked}; choose another --out or --data")
        args.run(args)
    except SystemExit as error:
        if RANK and error.code:
            time.sleep(2)  # the first process says why
            sys.exit(1)
        raise
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what is saved (in training: the last finished epoch), if typed without --fresh", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:  # CUDA, MPS and CPU say it in different words
        if PROCESSES > 1 and any(name in str(error).lower() for name in ("gloo", "nccl", "connection")):
            end(str(error).splitlines()[0])
        if not any(words in str(error) for words in ("out of memory", "allocate memory", "not enough memory")):
            raise
        sys.exit("out of memory; choose a smaller --batch or, for video.py, fewer --clips (with --fresh), or --device cpu")


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0], parents=[common_arguments()]).parse_args()
    Machine(args.device, args.precision, args.seed)
    encoder = make_encoder(args, None)
    for name, part in [*encoder.named_children(), ("all, with CLS and positions", encoder)]:
        print(f"{name:<28} {sum(p.numel() for p in part.parameters()):>9,} parameters")
    print(encoder)


if __name__ == "__main__":
    main()
