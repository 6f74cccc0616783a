"""How fast is a training step, how much of the machine does it use, and how long is an epoch?

    python tests/benchmark.py > results/benchmark.md
    python tests/benchmark.py --processes 2        # instead: one process against two, on the same cores
    python tests/benchmark.py --optimizer          # instead: what the optimiser costs of a training step
    python tests/benchmark.py --start              # instead: only the third table

First table: the same network (width 192, depth 6, 3 heads, patch 8, 2.7 M parameters, batch 256) as vit.py
writes it, and as timm, transformers and (where installed) vit-pytorch do, in float32 and in bfloat16
autocast, in one process, in turns, so that all of them meet the same machine. "Share": floating-point
operations of the matmuls per second, against a plain 2048 x 2048 matmul in the same precision. Second table:
one epoch of fine-tuning as ssl.py does it, against the usual loop around timm's network and torchvision's
transforms. Third table: seconds from typing a command to the end of its first step, and what `run_all.sh
quick` and `run_all.sh test` take. Not a test: nothing here fails.
"""

import argparse
import contextlib
import functools
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from torch import nn

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import vit  # noqa: E402

DIM, DEPTH, HEADS, PATCH, BATCH, TOKENS = 192, 6, 3, 8, 256, 17


def networks() -> dict[str, nn.Module]:
    """Name -> a classifier for [B, 3, 32, 32] images."""
    found = {"vit.py": vit.Classifier(vit.ViT(32, PATCH, DIM, DEPTH, HEADS))}
    import timm
    from transformers import ViTConfig, ViTForImageClassification

    found["timm"] = timm.models.VisionTransformer(
        img_size=32, patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, num_classes=10
    )
    config = ViTConfig(
        hidden_size=DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * DIM,
        image_size=32,
        patch_size=PATCH,
        num_labels=10,
    )

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = ViTForImageClassification(config)

        def forward(self, images):
            return self.model(pixel_values=images).logits

    found["transformers"] = Logits()
    try:
        from vit_pytorch import ViT

        found["vit-pytorch"] = ViT(
            image_size=32,
            patch_size=PATCH,
            num_classes=10,
            dim=DIM,
            depth=DEPTH,
            heads=HEADS,
            mlp_dim=4 * DIM,
            dim_head=DIM // HEADS,
        )
    except ImportError:
        pass
    return found


def step_flops() -> float:
    """Operations of one image's training step in matmuls (backward costs twice the forward)."""
    # multiply-adds: qkv, proj, MLP; scores and sum
    per_block = 12 * DIM * DIM * TOKENS + 2 * TOKENS * TOKENS * DIM
    return 3 * 2 * (DEPTH * per_block + 3 * PATCH * PATCH * DIM * (TOKENS - 1))


def matmul_flops(machine: vit.Machine, seconds: float) -> float:
    """Operations per second of a 2048^3 matmul, the machine's practical limit."""
    a = torch.randn(2048, 2048, device=machine.device, dtype=getattr(torch, machine.precision))
    best, end = 1e9, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def step_table(device: str, seconds: float) -> None:
    """Images per second of each network, in each precision; three rounds, in turns, of which the median
    counts."""
    print(
        f"One network, as each library writes it (width {DIM}, depth {DEPTH}, {BATCH} images a step), "
        "training: forward, backward and AdamW's step.\n"
        "Share: operations per second of its matmuls, against those of one large matmul.\n"
    )
    print("| network | precision | images/s | share |\n|---|---|---:|---:|")
    faster, why = vit.faster_precision(quiet_machine(device, "float32").device)
    for precision in ("float32", "bfloat16") if faster == "bfloat16" else ("float32",):
        machine = quiet_machine(device, precision)
        limit = matmul_flops(machine, seconds)
        models = {name: m.to(machine.device).train() for name, m in networks().items()}
        optimizers = {name: torch.optim.AdamW(m.parameters(), fused=True) for name, m in models.items()}
        images, labels = (
            torch.rand(BATCH, 3, 32, 32, device=machine.device),
            torch.randint(10, (BATCH,), device=machine.device),
        )
        rates = {name: [] for name in models}
        for _ in range(3):
            for name, model in models.items():
                steps, end, start = 0, 0.0, 0.0
                while time.perf_counter() < end or steps < 3:
                    with machine.autocast():
                        loss = nn.functional.cross_entropy(model(images), labels)
                    loss.backward()
                    optimizers[name].step()
                    optimizers[name].zero_grad()
                    loss.item()
                    if steps == 1:  # two steps to warm up
                        start, end = time.perf_counter(), time.perf_counter() + seconds
                    steps += 1
                rates[name].append((steps - 2) * BATCH / (time.perf_counter() - start))
        for name, r in rates.items():
            rate = statistics.median(r)
            print(
                f"| {name} | {precision} | {rate:.0f} | {100 * rate * step_flops() / limit:.0f} % |",
                flush=True,
            )
        print(f"| matmul 2048^3 | {precision} | {limit / 1e9:.0f} GFLOP/s | 100 % |")
    if faster == "float32":  # a step would take many seconds
        print(f"\nbfloat16 is left out: float32 is {why}.")


def usual_loop(images: torch.Tensor, labels: torch.Tensor, machine: vit.Machine) -> None:
    """One epoch as most tutorials write it: PIL images, torchvision's transforms, a DataLoader with
    workers, timm's ViT."""
    import timm
    from PIL import Image
    from torchvision import transforms as t

    augment = t.Compose(
        [
            t.RandomCrop(32, 4, padding_mode="reflect"),
            t.RandomHorizontalFlip(),
            t.ToTensor(),
            t.Normalize([0.5] * 3, [0.25] * 3),
        ]
    )

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, i):
            return augment(Image.fromarray(images[i].permute(1, 2, 0).numpy())), int(labels[i])

    loader = torch.utils.data.DataLoader(Images(), 128, shuffle=True, drop_last=True, num_workers=2)
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=128, depth=6, num_heads=4, num_classes=10
    ).to(machine.device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    for x, y in loader:
        x, y = x.to(machine.device), y.to(machine.device)
        with machine.autocast():
            logits = model(x)
        nn.functional.cross_entropy(logits.float(), y, label_smoothing=0.1).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def our_loop(images: torch.Tensor, labels: torch.Tensor, machine: vit.Machine) -> None:
    """The same epoch as ssl.py's `finetune` does it: the data set on the device, augmentation a batch at a
    time."""
    images, labels = images.to(machine.device), labels.to(machine.device)
    model, generator = (
        vit.Classifier(vit.ViT()).to(machine.device),
        torch.Generator(machine.device).manual_seed(0),
    )
    parallel = vit.data_parallel(model)
    with contextlib.redirect_stdout(sys.stderr):
        optimizer = vit.make_optimizer(model, "muon", 1e-3, 0.05, machine.precision)
    for index in data.shuffled_batches(len(images), 128, generator):
        x, y = data.crop_flip(images[index], generator), labels[index]
        x, other, kept = data.cutmix(x, y, generator, 0.0)
        x, y, other = vit.share(x), vit.share(y), vit.share(other)
        with machine.autocast():
            logits = parallel(x)
        data.cutmix_loss(logits, y, other, kept, 0.1).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def optimizer_table(device: str, rounds: int = 15) -> None:
    """What an optimiser's step costs of a fine-tuning step (width 128, batch 128), in turns: medians. Muon's
    iterations are counted down, to see what they cost."""
    print("| optimiser | precision | a training step, ms | of which the optimiser | share |")
    print("|---|---|---:|---:|---:|")
    faster, _ = vit.faster_precision(quiet_machine(device, "float32").device)
    for precision in ("float32", "bfloat16") if faster == "bfloat16" else ("float32",):
        machine = quiet_machine(device, precision)
        x = torch.rand(128, 3, 32, 32, device=machine.device)
        y = torch.randint(10, (128,), device=machine.device)
        kinds = {"AdamW": ("adamw", 5)} | {f"Muon, {n} iterations": ("muon", n) for n in (5, 4, 3)}
        models, optimizers, seconds = {}, {}, {}
        for name, (kind, _) in kinds.items():
            models[name] = vit.Classifier(vit.ViT()).to(machine.device)
            with contextlib.redirect_stdout(sys.stderr):
                optimizers[name] = vit.make_optimizer(models[name], kind, 1e-3, 0.05, precision)
            seconds[name] = []
        usual = vit.orthogonalise
        for _ in range(rounds):
            for name, (_, n) in kinds.items():
                vit.orthogonalise = functools.partial(usual, iterations=n)
                start = now(machine)
                with machine.autocast():
                    logits = models[name](x)
                nn.functional.cross_entropy(logits.float(), y).backward()
                middle = now(machine)
                optimizers[name].step()
                optimizers[name].zero_grad()
                end = now(machine)
                seconds[name].append((end - start, end - middle))
        vit.orthogonalise = usual
        for name, pairs in seconds.items():
            whole, own = (1000 * statistics.median(values[2:]) for values in zip(*pairs))
            print(
                f"| {name} | {precision} | {whole:.0f} | {own:.1f} | {100 * own / whole:.0f} % |", flush=True
            )


def now(machine: vit.Machine) -> float:
    """The time, once the device has done what it was told."""
    if machine.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def epoch_seconds(loop, images: torch.Tensor, labels: torch.Tensor, machine: vit.Machine) -> float:
    """How long one call of the loop takes."""
    start = time.perf_counter()
    loop(images, labels, machine)
    if machine.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def processes_table(number: int, args: argparse.Namespace) -> None:
    """Throughput of `our_loop` in one process and in several; each is started anew, as torchrun sets up
    its processes itself. On a CPU they share the cores: one process with all of them, or several with a
    part each."""
    print("| ssl.py's fine-tuning, global batch 128 | images/s |\n|---|---:|")
    for count in (1, number):
        launcher = (
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
            if count > 1
            else [sys.executable]
        )
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
        words = [__file__, "--loop", "--images", str(args.images), "--device", args.device]
        done = subprocess.run(
            [*launcher, *words], env=os.environ | threads, stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            sys.exit(f"the run with {count} processes failed; the lines above say why")
        print(
            f"| {count} process{'es' if count > 1 else ''}, {threads['OMP_NUM_THREADS']} CPU threads each | "
            f"{done.stdout.strip()} |",
            flush=True,
        )


def epoch_table(device: str, number: int) -> None:
    """Seconds of one epoch of so many drawn images, in the faster precision of the machine; the best of
    three, in turns."""
    machine = quiet_machine(device, "auto")
    images, labels = data.synthetic(number)
    seconds = {our_loop: [], usual_loop: []}
    for _ in range(3):
        for loop in seconds:
            seconds[loop].append(epoch_seconds(loop, images, labels, machine))
    ours, usual = (number / min(seconds[loop]) for loop in seconds)
    print("| one epoch of fine-tuning, width 128, batch 128 | precision | images/s | |\n|---|---|---:|---:|")
    print(
        f"| torchvision transforms, DataLoader with 2 workers, timm | {machine.precision} | {usual:.0f} | 1 |"
    )
    print(f"| ssl.py | {machine.precision} | {ours:.0f} | {ours / usual:.1f} times |")


# command -> the beginning of the line that it prints at the end of its first step (or, where there is no
# step, of its work)
FIRST_STEPS = {
    "ssl.py pretrain --task m --epochs 1": "m 1/1",
    "ssl.py finetune --epochs 1": "finetune_scratch 1/1",
    "video.py --checkpoint OUT/m.pt --frames 6 --clips 20 --blocks 2 --epochs 1": "video_encoder_2 1/1",
    "multimodal.py tiny --checkpoint OUT/m.pt --epochs 1": "tiny_blip_0 1/1",
    "multimodal.py caption --captioner tiny": "256 of 256",
    "multimodal.py embed --captions OUT/captions_tiny.jsonl": "wrote",
    "multimodal.py fuse --captions OUT/captions_tiny.jsonl --epochs 1": "fusion_tiny 1/1",
}


def seconds_until(line: str, command: list[str], folder: pathlib.Path) -> float:
    """From starting `command` to its first line that begins with `line`; waits for its end before
    returning."""
    start, found = time.perf_counter(), 0.0
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    for printed in process.stdout:
        if printed.startswith(line) and not found:
            found = time.perf_counter() - start
    if process.wait():
        sys.exit(f"{' '.join(command)} failed; the lines above say why")
    return found


def start_table(images: str) -> None:
    """How long a newcomer waits: each on a copy of the project, with this Python's packages, of three
    starts the fastest."""
    if images != "synthetic":
        images = str(pathlib.Path(images).resolve())  # the copy has no data/
    print("| from typing the command | seconds |\n|---|---:|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "copy"
        left_out = shutil.ignore_patterns("data", "runs", ".git", ".venv", ".*cache")
        shutil.copytree(ROOT, folder, ignore=left_out)
        common = ["--data", images, "--limit", "256", "--batch", "128"]
        for words, line in FIRST_STEPS.items():
            options = common[:4] if words.startswith(("video", "multimodal.py embed")) else common
            command = [sys.executable, *words.replace("OUT", "runs/mine").split(), *options]
            fresh = [] if "embed" in words else ["--fresh"]
            best = min(seconds_until(line, command + fresh, folder) for _ in range(3 if fresh else 1))
            print(
                f"| to the end of the first step: {' '.join(words.replace('OUT/', '').split()[:2])} | "
                f"{best:.1f} |",
                flush=True,
            )
        os.environ |= {
            "VIRTUAL_ENV": sys.prefix,
            "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        for words in (["quick", "--data", images], ["test"]):
            start = time.perf_counter()
            subprocess.run(["bash", "run_all.sh", *words], cwd=folder, stdout=subprocess.DEVNULL, check=True)
            print(
                f"| to the end: bash run_all.sh {words[0]} | {time.perf_counter() - start:.0f} |", flush=True
            )


def quiet_machine(device: str, precision: str) -> vit.Machine:
    """A vit.Machine that tells what it is on the terminal, not in the table."""
    with contextlib.redirect_stdout(sys.stderr):
        return vit.set_up(device, precision)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="per network, precision and round; there are three rounds"
    )
    parser.add_argument("--images", type=int, default=9000, help="of the epoch in the second table")
    parser.add_argument("--processes", type=int, help="instead of the tables: one process against so many")
    parser.add_argument(
        "--loop",
        action="store_true",
        help="instead of the tables: only ssl.py's images per second, of three epochs the best",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--data", default="synthetic", help="images of the third table: a folder, or synthetic (default)"
    )
    parser.add_argument("--optimizer", action="store_true", help="only what the optimiser costs of a step")
    parser.add_argument("--start", action="store_true", help="only the third table")
    args = parser.parse_args()
    if args.processes:
        return processes_table(args.processes, args)
    if args.loop:
        machine = quiet_machine(args.device, "auto")
        images, labels = data.synthetic(args.images)
        best = min(epoch_seconds(our_loop, images, labels, machine) for _ in range(3))
        return print(f"{args.images / best:.0f}") if vit.RANK == 0 else None
    if args.optimizer:
        return optimizer_table(args.device)
    if args.start:
        return start_table(args.data)
    from importlib.metadata import version

    machine = quiet_machine(args.device, "float32")
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "timm", "transformers", "torchvision")
    )
    print(
        f"# Speed\n\nWritten by `python tests/benchmark.py > results/benchmark.md` on {machine.name}; "
        f"{versions}.\n"
    )
    step_table(args.device, args.seconds)
    print()
    optimizer_table(args.device)
    print()
    epoch_table(args.device, args.images)
    print()
    start_table(args.data)


if __name__ == "__main__":
    main()
