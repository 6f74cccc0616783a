"""How fast is a training step, and how much of the machine does it use?   python tests/benchmark.py [--seconds 4]

One table: the same network (width 192, depth 6, 3 heads, patch 8, 2.7 M parameters, batch 256) as vit.py writes it, and
as timm, transformers and (where installed) vit-pytorch do, in float32 and in bfloat16 autocast, in one process, in
turns, so that all of them meet the same machine. "Share": floating-point operations of the matmuls per second, against
a plain 2048 x 2048 matmul in the same precision. Not a test: nothing here fails.
"""

import argparse
import pathlib
import statistics
import sys
import time

import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import vit  # noqa: E402

DIM, DEPTH, HEADS, PATCH, BATCH, TOKENS = 192, 6, 3, 8, 256, 17


def networks() -> dict[str, nn.Module]:
    """Name -> a classifier for [B, 3, 32, 32] images."""
    found = {"vit.py": vit.Classifier(vit.ViT(32, PATCH, DIM, DEPTH, HEADS))}
    import timm
    from transformers import ViTConfig, ViTForImageClassification

    found["timm"] = timm.models.VisionTransformer(img_size=32, patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, num_classes=10)
    config = ViTConfig(hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=4 * DIM,
                       image_size=32, patch_size=PATCH, num_labels=10)  # fmt: skip

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = ViTForImageClassification(config)

        def forward(self, images):
            return self.model(pixel_values=images).logits

    found["transformers"] = Logits()
    try:
        from vit_pytorch import ViT

        found["vit-pytorch"] = ViT(image_size=32, patch_size=PATCH, num_classes=10, dim=DIM, depth=DEPTH, heads=HEADS, mlp_dim=4 * DIM, dim_head=DIM // HEADS)
    except ImportError:
        pass
    return found


def step_flops() -> float:
    """Operations of one image's training step in matmuls (backward costs twice the forward)."""
    per_block = 12 * DIM * DIM * TOKENS + 2 * TOKENS * TOKENS * DIM  # multiply-adds: qkv, proj, MLP; scores and sum
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="per network, precision and round; there are three rounds")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    for precision in ("float32", "bfloat16"):
        machine = vit.Machine(args.device, precision)
        print(f"{'':14}{'precision':12}{'images/s':>9}{'share':>8}   (median of three rounds)")
        limit = matmul_flops(machine, args.seconds)
        models = {name: m.to(machine.device).train() for name, m in networks().items()}
        optimizers = {name: torch.optim.AdamW(m.parameters(), fused=True) for name, m in models.items()}
        images, labels = torch.rand(BATCH, 3, 32, 32, device=machine.device), torch.randint(10, (BATCH,), device=machine.device)
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
                        start, end = time.perf_counter(), time.perf_counter() + args.seconds
                    steps += 1
                rates[name].append((steps - 2) * BATCH / (time.perf_counter() - start))
        for name, r in rates.items():
            rate = statistics.median(r)
            print(f"{name:14}{precision:12}{rate:9.0f}{100 * rate * step_flops() / limit:7.0f} %", flush=True)
        print(f"{'matmul 2048^3':14}{precision:12}{limit / 1e9:9.0f} GFLOP/s")


if __name__ == "__main__":
    main()
