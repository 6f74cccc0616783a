"""How fast is a training step, how much of the machine does it use, and how long is an epoch?

    python tests/benchmark.py > results/benchmark.md

First table: the same network (width 192, depth 6, 3 heads, patch 8, 2.7 M parameters, batch 256) as vit.py
writes it, and as timm, transformers and (where installed) vit-pytorch do, in float32 and in bfloat16
autocast, in one process, in turns, so that all of them meet the same machine. "Share": floating-point
operations of the matmuls per second, against a plain 2048 x 2048 matmul in the same precision. Second table:
one epoch of fine-tuning as ssl.py does it, by AdamW and by Muon, against the usual loop around timm's network
and torchvision's transforms. Not a test: nothing here fails.
"""

import argparse
import contextlib
import pathlib
import statistics
import sys
import time
from importlib.metadata import version

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
    sizes = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "num_labels": 10}
    config = ViTConfig(**sizes, intermediate_size=4 * DIM, image_size=32, patch_size=PATCH)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = ViTForImageClassification(config)

        def forward(self, images):
            return self.model(pixel_values=images).logits

    found["transformers"] = Logits()
    try:
        from vit_pytorch import ViT

        sizes = {"image_size": 32, "patch_size": PATCH, "num_classes": 10, "dim": DIM, "depth": DEPTH}
        found["vit-pytorch"] = ViT(**sizes, heads=HEADS, mlp_dim=4 * DIM, dim_head=DIM // HEADS)
    except ImportError:
        pass
    return found


def step_flops() -> float:
    """Operations of one image's training step in matmuls (backward costs twice the forward)."""
    # multiply-adds: qkv, proj, MLP; scores and sum
    per_block = 12 * DIM * DIM * TOKENS + 2 * TOKENS * TOKENS * DIM
    return 3 * 2 * (DEPTH * per_block + 3 * PATCH * PATCH * DIM * (TOKENS - 1))


def set_up(device: str, precision: str):
    """vit.set_up, which tells what it is on the terminal, not in the table -> device, autocast, precision."""
    args = argparse.Namespace(device=device, precision=precision, seed=0)
    with contextlib.redirect_stdout(sys.stderr):
        return *vit.set_up(args), args.precision


def matmul_flops(device: torch.device, precision: str, seconds: float) -> float:
    """Operations per second of a 2048^3 matmul, the machine's practical limit."""
    a = torch.randn(2048, 2048, device=device, dtype=getattr(torch, precision))
    best, end = 1e9, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def step_table(where: str, seconds: float) -> None:
    """Images per second of each network, in each precision; three rounds, in turns, of which the median
    counts."""
    print(
        f"One network, as each library writes it (width {DIM}, depth {DEPTH}, {BATCH} images a step), "
        "training: forward, backward and AdamW's step.\n"
        "Share: operations per second of its matmuls, against those of one large matmul.\n"
    )
    print("| network | precision | images/s | share |\n|---|---|---:|---:|")
    usual = set_up(where, "auto")[2]
    for precision in dict.fromkeys(["float32", usual]):
        device, autocast, _ = set_up(where, precision)
        limit = matmul_flops(device, precision, seconds)
        models = {name: m.to(device).train() for name, m in networks().items()}
        optimizers = {name: torch.optim.AdamW(m.parameters(), fused=True) for name, m in models.items()}
        images, labels = (
            torch.rand(BATCH, 3, 32, 32, device=device),
            torch.randint(10, (BATCH,), device=device),
        )
        rates = {name: [] for name in models}
        for _ in range(3):
            for name, model in models.items():
                steps, end, start = 0, 0.0, 0.0
                while time.perf_counter() < end or steps < 3:
                    with autocast:
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
            share = statistics.median(r) * step_flops() / limit
            print(f"| {name} | {precision} | {statistics.median(r):.0f} | {100 * share:.0f} % |", flush=True)
        print(f"| matmul 2048^3 | {precision} | {limit / 1e9:.0f} GFLOP/s | 100 % |")


def usual_loop(images: torch.Tensor, labels: torch.Tensor, device: torch.device, autocast) -> None:
    """One epoch as most tutorials write it: PIL images, torchvision's transforms, a DataLoader with
    workers, timm's ViT."""
    import timm
    from PIL import Image
    from torchvision import transforms as t

    crop = t.RandomCrop(32, 4, padding_mode="reflect")
    augment = t.Compose([crop, t.RandomHorizontalFlip(), t.ToTensor(), t.Normalize([0.5] * 3, [0.25] * 3)])

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, i):
            return augment(Image.fromarray(images[i].permute(1, 2, 0).numpy())), int(labels[i])

    loader = torch.utils.data.DataLoader(Images(), 128, shuffle=True, drop_last=True, num_workers=2)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 10}
    model = timm.models.VisionTransformer(**sizes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        with autocast:
            logits = model(x)
        nn.functional.cross_entropy(logits.float(), y, label_smoothing=0.1).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def our_loop(images: torch.Tensor, labels: torch.Tensor, device: torch.device, autocast, kind="muon") -> None:
    """The same epoch as ssl.py's `finetune` does it: the data set on the device, augmentation a batch at a
    time."""
    images, labels = images.to(device), labels.to(device)
    model, generator = vit.Classifier(vit.ViT()).to(device), torch.Generator(device).manual_seed(0)
    precision = "float32" if isinstance(autocast, contextlib.nullcontext) else "bfloat16"
    optimizer = vit.make_optimizer(model, kind, 1e-3, 0.05, precision)
    for index in data.shuffled_batches(len(images), 128, generator):
        x, y = data.crop_flip(images[index], generator), labels[index]
        with autocast:
            logits = model(x)
        nn.functional.cross_entropy(logits.float(), y, label_smoothing=0.1).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def epoch_table(where: str, number: int) -> None:
    """Images per second of one epoch of so many drawn images; the best of three, in turns."""
    device, autocast, precision = set_up(where, "auto")
    images, labels = data.synthetic(number)

    def by_adamw(*args):
        our_loop(*args, kind="adamw")

    loops = {"torchvision transforms, DataLoader with 2 workers, timm, AdamW": usual_loop}
    loops |= {"ssl.py, AdamW": by_adamw, "ssl.py, Muon": our_loop}
    best = dict.fromkeys(loops, 1e9)
    for _ in range(3):
        for name, loop in loops.items():
            start = time.perf_counter()
            loop(images, labels, device, autocast)
            if device.type == "cuda":
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - start)
    print("| one epoch of fine-tuning, width 128, batch 128 | precision | images/s |\n|---|---|---:|")
    for name, seconds in best.items():
        print(f"| {name} | {precision} | {number / seconds:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--seconds", type=float, default=2.0, help="per network, precision and round; there are three rounds")
    add("--images", type=int, default=9000, help="of the epoch in the second table")
    add("--device", default="auto")
    args = parser.parse_args()
    packages = [f"{name} {version(name)}" for name in ("torch", "timm", "transformers", "torchvision")]
    kind = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    print("# Speed\n\nWritten by `python tests/benchmark.py > results/benchmark.md`;")
    print(f"{kind}; {', '.join(packages)}.\n")
    step_table(args.device, args.seconds)
    print()
    epoch_table(args.device, args.images)


if __name__ == "__main__":
    main()
