"""What was learned: similarity maps, and CKA.

    maps   where in the image is CLS' content found? cosine of CLS with the patch tokens
    cka    how much does attention change CLS? linear CKA of the residual stream around each attention

Depends on vit.py and data.py: copy this file with those two (token_similarity and linear_cka need only
torch). It measures and stores; results/draw.py draws.

    python analysis.py maps cka --before runs/mine/m.pt --after runs/mine/finetune.pt

Papers: Kornblith et al. 2019 (linear CKA), Song et al. 2012 (unbiased HSIC), Nguyen et al. 2021 (debiased CKA
of layers). Shape letters as in vit.py; also n images, R places in the network.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys

import numpy as np
import torch
from torch import Tensor

import data
import vit

# ---------------------------------------------------------------- similarity maps
# Why cosines of tokens, and not attention weights? A weight says how much one head of one block takes from a
# patch, whatever it then makes of it; six blocks of four heads give 24 different maps. The cosine compares
# what has come out at the end: which patches' tokens hold what CLS holds. (It is also what the coursework
# asks for.)


def token_similarity(tokens: Tensor) -> Tensor:
    """Cosine of every token with every other: [B, T, D] -> [B, T, T]; row 0 holds CLS' map."""
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    return unit @ unit.transpose(1, 2)  # [B, T, T]


def focus(cosines: Tensor) -> dict[str, float]:
    """How concentrated CLS-patch maps [n, N] are, and on what, averaged over images. A cosine map is no
    distribution, so for the first two it is shifted to a minimum of 0 and scaled to a sum of 1, as the eye
    does with a colour scale.

    entropy: of that distribution, as a share of its maximum log N (1: spread evenly, 0: all on one patch)
    best_quarter: mass on the N/4 strongest patches (0.25: spread evenly)
    spread: the cosines' standard deviation within an image
    centre: the mean cosine of the inner patches above that of the outermost ones. Most of CIFAR-10's objects
    are in the middle, so this asks, without masks of objects, whether object or background is lit.
    """
    n, N = cosines.shape
    mass = cosines - cosines.min(dim=1, keepdim=True).values
    mass = mass / mass.sum(dim=1, keepdim=True).clamp_min(1e-12)
    entropy = torch.special.entr(mass).sum(dim=1) / math.log(N)  # [n]
    best_quarter = mass.topk(N // 4, dim=1).values.sum(dim=1)  # [n]
    spread = cosines.std(dim=1)  # [n]
    side = math.isqrt(N)
    inner = torch.zeros(side, side, dtype=torch.bool)
    inner[1:-1, 1:-1] = True
    inner = inner.flatten()  # [N]
    centre = cosines[:, inner].mean(dim=1) - cosines[:, ~inner].mean(dim=1)  # [n]
    found = {"entropy": entropy, "best_quarter": best_quarter, "spread": spread, "centre": centre}
    return {name: values.mean().item() for name, values in found.items()}


def maps(args: argparse.Namespace) -> None:
    """Measure CLS-patch similarity before and after fine-tuning; keep a map of each class for the picture."""
    device, autocast = vit.set_up(args)
    images, labels = data.load(args.data, args.split, device, args.limit)
    shown = torch.stack([(labels == k).nonzero()[0, 0] for k in labels.unique()])  # first of each class, [K]
    arrays, rows = {"images": images[shown].cpu(), "labels": labels[shown].cpu()}, {}
    for when, path in two_encoders(args).items():
        encoder = vit.load_encoder(path, images.shape[-1]).to(device)

        def cls_map(x: Tensor) -> Tensor:
            """[b, 3, S, S] -> [b, N]."""
            return token_similarity(encoder(x.float() / 255).float())[:, 0, 1:]

        cosines = vit.evaluate(encoder, autocast, cls_map, images).cpu()  # [n, N]
        arrays[when], rows[when] = cosines[shown.cpu()], focus(cosines)
    store(args, "maps", arrays)
    for when, row in rows.items():
        row |= {"value": row.pop("entropy"), "provenance": data.source(args.data).provenance}
        vit.record(args, named(args, f"maps_{when}"), images, labels, **row)


# ---------------------------------------------------------------- CKA
# Do two layers (or two networks) see the same images as alike? Their features can't be compared one by one: a
# network may turn or scale them at will and undo it in the next layer. But the Gram matrix X X^T [n, n] of a
# representation X [n, D], the similarity of each image with each, is blind to turns. Linear CKA is the cosine
# of two Gram matrices. X is centred first: what all images have in common says nothing about them, but would
# make all Gram matrices alike. In feature space no n x n matrix is needed, as <X X^T, Y Y^T> = |X^T Y|_F^2.


def hsic(x: Tensor, y: Tensor, debiased: bool) -> Tensor:
    """HSIC [] of centred representations x [n, D] and y [n, E], but for a factor that CKA does not see.

    The plain one is |X^T Y|_F^2. It is biased upwards when n is not much larger than D: even independent
    features get a positive score. Song et al. 2012 (equation 5; used for CKA by Nguyen et al. 2021) remove
    the bias by leaving each image's similarity with itself out of the Gram matrices. As the rows of a centred
    Gram matrix add up to zero, their formula becomes, k and l being the squared lengths of X's and Y's rows:

        |X^T Y|_F^2 - n / (n - 2) k.l + sum(k) sum(l) / ((n - 1) (n - 2))
    """
    n, found = len(x), (x.T @ y).square().sum()
    if debiased:
        k, l = x.square().sum(dim=1), y.square().sum(dim=1)  # [n] each
        found = found - n / (n - 2) * (k @ l) + k.sum() * l.sum() / ((n - 1) * (n - 2))
    return found


def linear_cka(x: Tensor, y: Tensor, debiased: bool = False) -> Tensor:
    """Linear CKA [] of two representations x [n, D] and y [n, E] of the same n images (Kornblith et al. 2019,
    equations 1, 3 and 4):

        CKA(X, Y) = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y))

    1: the same similarity structure over images, 0: none in common; nan where a representation is the same
    for all images (0 / 0). Raises ValueError with fewer than four images, for which the debiased estimate is
    not defined.

    Which estimate? The plain one gives even unrelated features about D / (n + D), if no direction stands out
    (200 images, 128 dimensions: more than a third); the debiased one about 0 (it can fall below). Take the
    debiased one unless n is many times D, where the two agree; papers mostly quote the plain one.
    """
    return cka_table([x, y], debiased)[0, 1]


def cka_table(places: list[Tensor], debiased: bool = False) -> Tensor:
    """linear_cka between all pairs of R representations [n, D_r] of the same images: [R, R]."""
    if len(places[0]) < 4:
        raise ValueError(f"CKA needs at least 4 images, not {len(places[0])}")
    # float64, as squares of squares are summed; less the first image's, so that a constant is exactly 0
    x = [place.double() - place[0].double() for place in places]
    x = [place - place.mean(dim=0) for place in x]
    found = torch.stack([hsic(a, b, debiased) for a in x for b in x]).view(len(x), len(x))  # [R, R]
    scale = found.diagonal().sqrt()  # [R]
    return found / torch.outer(scale, scale)


def cls_along(encoder: vit.ViT, images: Tensor, autocast=contextlib.nullcontext()) -> Tensor:
    """CLS of uint8 images [n, 3, S, S] on its way through the encoder, [n, R, D]: what enters the first block
    (the same for every image), then after each attention and after each MLP: R = 1 + 2 * depth places."""

    def places(x: Tensor) -> Tensor:
        """[b, 3, S, S] -> [b, R, D]."""
        trace = []
        encoder(x.float() / 255, trace)
        stream = [trace[0]["before"]] + [block[key] for block in trace for key in ("attended", "after")]
        return torch.stack([tokens[:, 0] for tokens in stream], dim=1)

    return vit.evaluate(encoder, autocast, places, images)


def cka(args: argparse.Namespace) -> None:
    """CKA of CLS between all places within the encoder, before and after fine-tuning; a row for each.

    The report compares CLS before and after the last self-attention block, which can be read in two ways:
    across the attention's residual sum (the row's value), or across the block with its MLP ("whole_block").
    """
    device, autocast = vit.set_up(args)
    images, labels = data.load(args.data, args.split, device, args.limit)
    if len(images) < 4:
        sys.exit(f"CKA needs at least 4 images, not {len(images)}; choose a larger --limit")
    arrays, rows = {}, {}
    for when, path in two_encoders(args).items():
        encoder = vit.load_encoder(path, images.shape[-1]).to(device)
        places = cls_along(encoder, images, autocast).cpu().unbind(dim=1)  # R times [n, D]
        plain, debiased = (cka_table(places, kind).numpy() for kind in (False, True))  # [R, R] each
        # of the places -3 is before the last block, -2 after its attention, -1 after its MLP
        row = {"value": plain[-3, -2], "debiased": debiased[-3, -2], "whole_block": plain[-3, -1]}
        arrays[when], rows[when] = plain, row | {"provenance": data.source(args.data).provenance}
    store(args, "cka", arrays)
    for when, row in rows.items():
        vit.record(args, named(args, f"cka_{when}"), images, labels, **row)


# ---------------------------------------------------------------- the stage


def two_encoders(args: argparse.Namespace) -> dict[str, str]:
    """The checkpoints to compare, of an encoder before fine-tuning and after it."""
    return {"before": args.before or f"{args.out}/m.pt", "after": args.after or f"{args.out}/finetune.pt"}


def named(args: argparse.Namespace, name: str) -> str:
    """A row's name; --name is put in front of it, for another pair of checkpoints."""
    return f"{args.name}_{name}" if args.name else name


def store(args: argparse.Namespace, name: str, arrays: dict) -> None:
    """Keep arrays for the pictures."""
    with vit.whole_file(vit.row_path(args, named(args, name), "npz")) as file:
        np.savez_compressed(file, **arrays)


def run(args: argparse.Namespace) -> None:
    """The measurements that the command line names, in float32: here it is not speed that counts."""
    args.precision = "float32" if args.precision == "auto" else args.precision
    for name in args.what:
        {"maps": maps, "cka": cka}[name](args)


def main() -> None:
    raw, parents = argparse.RawDescriptionHelpFormatter, [vit.common_options()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, parents=parents)
    add = parser.add_argument
    add("what", nargs="+", choices=["maps", "cka"], help="one of these, or both")
    add("--before", type=vit.path, help="checkpoint before fine-tuning (default: OUT/m.pt)")
    add("--after", type=vit.path, help="checkpoint after fine-tuning (default: OUT/finetune.pt)")
    parser.set_defaults(run=run)
    vit.command(parser)


if __name__ == "__main__":
    main()
