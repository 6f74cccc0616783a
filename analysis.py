"""What was learned: similarity maps, CKA, every figure and the results table.

    maps       where in the image is CLS' content found? cosine of CLS with the 16 patch tokens
    cka        how much does attention change CLS? linear CKA of the residual stream around each attention
    figures    draw every picture from the files that the stages left (seconds, no training)
    movie      similarity maps and nearest neighbours epoch by epoch, as a GIF
    report     write the results table, with its pictures, to report.md

Depends on vit.py and data.py: copy this file with those two. For CKA alone, StreamingCKA needs only torch.

    python analysis.py maps cka --before runs/mine/m.pt --after runs/mine/finetune.pt --out runs/mine
    python analysis.py figures --out runs/mine

Papers: Kornblith et al. 2019 (linear CKA), Song et al. 2012 (unbiased HSIC), Nguyen et al. 2021 (debiased CKA
of layers). Pillow draws everything: a picture here is an array with text on it.
"""

from __future__ import annotations

import argparse
import io
import json
import pathlib
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
import vit

# ------------------------------------------------------------------------------------------------------------
# Similarity maps
# ------------------------------------------------------------------------------------------------------------


def token_similarity(tokens: torch.Tensor) -> torch.Tensor:
    """Cosine of every token with every other: [B, T, D] -> [B, T, T]; row 0 holds CLS' map."""
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    return unit @ unit.transpose(1, 2)


def focus(maps: torch.Tensor) -> dict[str, float]:
    """How concentrated CLS-patch maps [n, N] are, averaged over images; a cosine map is no distribution, so
    it is shifted to a minimum of 0 and scaled to a sum of 1, as the eye does with a colour scale.

    entropy: of that distribution, as a share of its maximum log N (1: spread evenly, 0: all on one patch)
    best_quarter: mass on the N/4 strongest patches (0.25: spread evenly)
    peak: the largest cosine itself; spread: the cosines' standard deviation within an image
    """
    mass = maps - maps.min(dim=1, keepdim=True).values
    mass = mass / mass.sum(dim=1, keepdim=True).clamp_min(1e-12)
    N = maps.shape[1]
    entropy = torch.special.entr(mass).sum(dim=1) / np.log(N)
    best = mass.topk(N // 4, dim=1).values.sum(dim=1)
    found = {
        "entropy": entropy,
        "best_quarter": best,
        "peak": maps.max(dim=1).values,
        "spread": maps.std(dim=1),
    }
    return {name: values.mean().item() for name, values in found.items()}


def maps(args: argparse.Namespace) -> None:
    """Measure CLS-patch similarity over a split, before and after fine-tuning; keep some for the figure."""
    stored = vit.arrays_path(args, "maps")
    if stored.exists() and vit.measured(args, "maps_after", args.before, args.after):
        return
    machine = vit.Machine(args.device, args.precision, args.seed)
    images, labels = data.load(args.data, args.split, machine.device, args.limit)
    # the first image of each class
    shown = torch.stack([(labels == k).nonzero()[0, 0] for k in labels.unique()])
    arrays, measured = {"images": images[shown], "labels": labels[shown]}, {}
    for when, path in (("before", args.before), ("after", args.after)):
        encoder = vit.load_encoder(path).to(machine.device).eval()
        with torch.no_grad():
            # [n, T, T]
            similarity = torch.cat(
                [token_similarity(encoder(x.float() / 255)).cpu() for x in images.split(machine.eval_batch)]
            )
        arrays[when], measured[when] = similarity[shown.cpu()], focus(similarity[:, 0, 1:])
    vit.write_arrays(stored, **arrays)  # before the rows: a row says that everything of it is there
    for when, row in measured.items():
        vit.record(
            args,
            f"maps_{when}",
            machine,
            data.source(args.data),
            value=row.pop("entropy"),
            **row,
            precision="float32",
            weights=vit.fingerprint(args.before, args.after),
        )


# ------------------------------------------------------------------------------------------------------------
# CKA
# ------------------------------------------------------------------------------------------------------------


class StreamingCKA:
    """Linear CKA between all pairs of L representations of the same images, adding a batch at a time.

    Linear CKA compares two representations X [n, D1] and Y [n, D2] by their similarity structure over images:
    it is the cosine of the two (centred) Gram matrices X X^T and Y Y^T. In feature space no n x n matrix is
    needed:

        CKA(X, Y) = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)),     HSIC(X, Y) = |X^T Y|_F^2   (X, Y centred)

    (Kornblith et al. 2019, equations 3-5). That estimate is biased upwards when n is not much larger than D:
    even independent features get a positive score. Song et al. 2012 (equation 5; used for CKA by Nguyen et
    al. 2021) remove the bias by leaving each image's similarity with itself out of the Gram matrices. Their
    formula, too, is made of sums over images, so both come from the same few D x D accumulators whatever n
    is.
    """

    def __init__(self):
        self.n = 0

    def add(self, *representations: torch.Tensor) -> None:
        """One batch: L tensors [b, D_l], rows belonging to the same images. float64 inside, on the CPU."""
        z = torch.cat([r.detach().cpu().double() for r in representations], dim=1)  # [b, sum of D]
        if self.n == 0:
            self.widths = [r.shape[1] for r in representations]
            self.origin = z.mean(dim=0)  # CKA ignores a common shift; sums of small numbers lose fewer digits
            self.largest = torch.zeros(len(representations), dtype=torch.float64)
            self.sums = [0.0] * 4
        largest = torch.stack([part.abs().max() for part in z.split(self.widths, dim=1)])  # [L]
        self.largest = torch.maximum(self.largest, largest)
        z = z - self.origin
        own = [part.square().sum(dim=1) for part in z.split(self.widths, dim=1)]
        a = torch.stack(own, dim=1)  # [b, L], each image's similarity with itself
        self.n += len(z)
        self.sums = [old + new for old, new in zip(self.sums, (z.sum(dim=0), z.T @ z, a.T @ z, a.T @ a))]

    def result(self, debiased: bool = False) -> torch.Tensor:
        """CKA of every pair: [L, L]; nan in the row and column of a representation that is the same for all
        images, or holds a nan.

        Raises ValueError with fewer than four images, for which the debiased estimate is not defined.
        """
        if self.n < 4:
            raise ValueError(f"CKA needs at least 4 images, not {self.n}")
        n, L = self.n, len(self.widths)
        s, zz, az, aa = self.sums  # [D], [D, D], [L, D], [L, L]
        if not debiased:
            zz = zz - torch.outer(s, s) / n  # the centred X^T Y of all pairs
        zz = [row.split(self.widths, dim=1) for row in zz.split(self.widths)]  # L x L blocks, [D_i, D_j] each
        hsic = _pairs(L, lambda i, j: zz[i][j].square().sum())  # [L, L]
        if debiased:
            s, az = s.split(self.widths), [row.split(self.widths) for row in az]
            # with K~ = the Gram matrix of representation i without its diagonal, and L~ that of j
            total = torch.stack([s[i] @ s[i] - zz[i][i].trace() for i in range(L)])  # [L] 1^T K~ 1
            # 1^T K~ L~ 1
            rows = _pairs(
                L, lambda i, j: s[i] @ zz[i][j] @ s[j] - az[j][i] @ s[i] - az[i][j] @ s[j] + aa[i, j]
            )
            # hsic - aa: tr(K~ L~)
            hsic = hsic - aa + torch.outer(total, total) / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows
        scale = hsic.diagonal().clamp_min(0).sqrt()  # [L]
        varies = scale > 1e-20 * n * self.largest.square()  # each against its own size: CKA ignores scale
        scale = torch.where(varies, scale, torch.nan)
        return hsic / torch.outer(scale, scale)


def _pairs(number: int, entry) -> torch.Tensor:
    return torch.stack([torch.stack([entry(i, j) for j in range(number)]) for i in range(number)])


def cka(args: argparse.Namespace) -> None:
    """CKA of CLS across attention, before and after fine-tuning; the whole layer-by-layer matrix for the
    figure.

    The report compares CLS before and after the last self-attention block, which can be read in two ways:
    across the attention's residual sum (the row's value), or across the whole block with its MLP
    ("whole_block").
    """
    stored = vit.arrays_path(args, "cka")
    if stored.exists() and vit.measured(args, "cka_after", args.before, args.after):
        return
    machine = vit.Machine(args.device, args.precision, args.seed)
    images, _ = data.load(args.data, args.split, machine.device, args.limit)
    if len(images) < 4:
        raise SystemExit(f"CKA needs at least 4 images, not {len(images)}; choose a larger --limit")
    arrays = {}
    for when, path in (("before", args.before), ("after", args.after)):
        encoder, streaming = vit.load_encoder(path).to(machine.device).eval(), StreamingCKA()
        for x in images.split(machine.eval_batch):
            trace = []
            with torch.no_grad():
                encoder(x.float() / 255, trace)
            stream = [trace[0]["before"]] + [block[k] for block in trace for k in ("attended", "after")]
            streaming.add(*(t[:, 0] for t in stream))  # CLS: [b, D] at 1 + 2 * depth places
        # [L, L]
        arrays[f"{when}_biased"], arrays[f"{when}_debiased"] = (
            streaming.result(),
            streaming.result(debiased=True),
        )
    vit.write_arrays(stored, **arrays)
    for when, reported in (("before", 0.8698), ("after", 0.7353)):
        biased, debiased = arrays[f"{when}_biased"], arrays[f"{when}_debiased"]
        steps = {
            name: debiased.diagonal(places)[::2].tolist()
            for name, places in (("attentions", 1), ("blocks", 2))
        }
        # JSON has no nan
        steps = {name: [None if np.isnan(v) else v for v in values] for name, values in steps.items()}
        vit.record(
            args,
            f"cka_{when}",
            machine,
            data.source(args.data),
            value=biased[-3, -2].item(),
            report=reported,
            debiased=debiased[-3, -2].item(),
            whole_block=biased[-3, -1].item(),
            whole_block_debiased=debiased[-3, -1].item(),
            **steps,
            precision="float32",
            weights=vit.fingerprint(args.before, args.after),
        )


# ------------------------------------------------------------------------------------------------------------
# Drawing with Pillow: a page with a title, a caption and a footer that says where the pixels come from
# ------------------------------------------------------------------------------------------------------------

INK, GREY, PAPER = (30, 30, 36), (120, 120, 128), (255, 255, 255)
LINES = [
    (31, 119, 180),
    (214, 96, 20),
    (44, 140, 60),
    (148, 80, 180),
    (200, 40, 60),
    (120, 110, 40),
    (60, 160, 170),
]
VIRIDIS = np.array(
    [
        [68, 1, 84],
        [71, 44, 122],
        [59, 81, 139],
        [44, 113, 142],
        [33, 144, 141],
        [39, 173, 129],
        [92, 200, 99],
        [170, 220, 50],
        [253, 231, 37],
    ]
)


class Page:
    """A white page; everything is drawn at pixel coordinates, text in the font that Pillow brings."""

    def __init__(self, width: int, height: int, title: str, caption: str, footer: str):
        self.image = Image.new("RGB", (width, height + 118), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.text(24, 16, title, size=24)
        for k, line in enumerate(caption.split("\n")):
            self.text(24, 48 + 19 * k, line, size=14, ink=GREY)
        letters = (width - 48) // 6  # a letter is about 6 pixels wide
        for k, line in enumerate(textwrap.wrap(footer, letters)[:2]):
            self.text(24, height + 86 + 15 * k, line, size=12, ink=GREY)
        self.top = 58 + 19 * len(caption.split("\n"))

    def text(self, x: float, y: float, text: str, size: int = 13, ink=INK, anchor: str = "la") -> None:
        """`anchor` as in Pillow: la left-top, ma middle-top, mm middle-middle, rm right-middle."""
        self.draw.text((x, y), text, fill=ink, font=ImageFont.load_default(size), anchor=anchor)

    def paste(self, picture: np.ndarray, x: int, y: int, size: int, smooth: bool = False) -> None:
        """An array [S, S, 3] of 0..255 as a square of `size` pixels."""
        picture = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
        self.image.paste(
            picture.resize((size, size), Image.BICUBIC if smooth else Image.NEAREST), (int(x), int(y))
        )

    def scale_bar(self, x: int, y: int, width: int, low: float, high: float, label: str) -> None:
        """The legend of `colour`: a horizontal bar from low to high."""
        self.image.paste(
            Image.fromarray(colour(np.linspace(0, 1, width)[None].repeat(12, 0)).astype(np.uint8)), (x, y)
        )
        self.text(x - 6, y + 6, f"{low:.2f}", 12, anchor="rm")
        self.text(x + width + 6, y + 6, f"{high:.2f}   {label}", 12, anchor="lm")

    def chart(
        self,
        box: tuple,
        lines: dict[str, list],
        title: str,
        percent: bool = False,
        ticks: dict[int, str] | None = None,
        below: str = "epoch",
    ) -> None:
        """Curves over 1, 2, 3, ..., with axes and legend; box: x, y, width, height; ticks: place -> label."""
        x0, y0, w, h = box
        values = [v for line in lines.values() for v in line]
        low, high = min(values), max(values)
        high, low = high + 0.05 * (high - low + 1e-9), low - 0.05 * (high - low + 1e-9)
        high = min(high, 1) if percent else high
        longest = max(map(len, lines.values()))
        self.text(x0, y0 - 24, title, 15)
        for k in range(5):
            y = y0 + h - h * k / 4
            self.draw.line([(x0, y), (x0 + w, y)], fill=(228, 228, 232))
            v = low + (high - low) * k / 4
            self.text(x0 - 6, y, f"{100 * v:.0f} %" if percent else f"{v:.2f}", 12, GREY, "rm")
        for place, label in (ticks or {k: str(k) for k in (1, (longest + 1) // 2, longest)}).items():
            self.text(x0 + w * (place - 1) / max(1, longest - 1), y0 + h + 6, label, 12, GREY, "ma")
        self.text(x0 + w / 2, y0 + h + 20, below, 12, GREY, "ma")
        for k, (name, line) in enumerate(lines.items()):
            at = [
                (x0 + w * i / max(1, longest - 1), y0 + h - h * (v - low) / (high - low))
                for i, v in enumerate(line)
            ]
            ink = LINES[k % len(LINES)]
            self.draw.line(at, fill=ink, width=2)
            self.draw.ellipse([at[-1][0] - 3, at[-1][1] - 3, at[-1][0] + 3, at[-1][1] + 3], fill=ink)
            self.text(x0 + w + 14, y0 + 18 * k, name, 13, ink)

    def heat_map(
        self, matrix: np.ndarray, x: int, y: int, cell: int, labels: list[str], low=0.0, high=1.0
    ) -> None:
        """A square matrix in colour, row labels left, column labels below, entries in the cells."""
        for i, row in enumerate(matrix):
            for j, v in enumerate(row):
                at = [x + j * cell, y + i * cell, x + (j + 1) * cell - 1, y + (i + 1) * cell - 1]
                share = (v - low) / (high - low)
                fill = (230, 230, 230) if np.isnan(v) else tuple(int(c) for c in colour(np.array(share)))
                self.draw.rectangle(at, fill=fill)
                if not np.isnan(v):
                    entry = f"{v:.0f}" if high > 1 else f"{v:.2f}".replace("0.", ".")
                    self.text(
                        at[0] + cell / 2, at[1] + cell / 2, entry, 11, INK if share > 0.6 else PAPER, "mm"
                    )
            self.text(x - 6, y + (i + 0.5) * cell, labels[i], 12, anchor="rm")
            self.text(
                x + (i + 0.5) * cell, y + len(matrix) * cell + 6 + 13 * (i % 2), labels[i], 12, anchor="ma"
            )


def colour(x: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1], any shape, to viridis colours [..., 3] in 0..255."""
    at = np.clip(np.nan_to_num(x), 0, 1) * (len(VIRIDIS) - 1)
    low = np.minimum(at.astype(int), len(VIRIDIS) - 2)
    return VIRIDIS[low] + (at - low)[..., None] * (VIRIDIS[low + 1] - VIRIDIS[low])


def pixels(images: torch.Tensor | np.ndarray) -> np.ndarray:
    """[..., 3, S, S], uint8 or floats in [0, 1] -> [..., S, S, 3] in 0..255 for Page.paste."""
    images = np.asarray(images)
    return np.moveaxis(images.astype(float) * (1 if images.dtype == np.uint8 else 255), -3, -1)


def draw_patches(args: argparse.Namespace, footer: str) -> Page:
    """The report's first figure: set A, and what becomes of its patches."""
    images, _ = data.load(args.data, "validation", limit=4)
    images = images.float() / 255
    augmented, masked, rotated, angle = data.patch_augment(images, torch.Generator().manual_seed(args.seed))
    page = Page(
        860,
        740,
        "Patch augmentation",
        "An image is 16 patches of 8x8 pixels. Eight at random are set A: four are "
        "blacked out, four turned by one angle\n(counter-clockwise). Model M names the angle and repaints "
        "the black "
        "patches, so it needs no labels.",
        footer,
    )
    for i in range(len(images)):
        y = page.top + 20 + 175 * i
        for x, picture in ((24, images), (230, images), (436, augmented)):
            page.paste(pixels(picture[i]), x, y, 160)
        for indices, ink, x0 in ((masked[i], (255, 90, 60), 230), (rotated[i], (70, 210, 255), 230)):
            for p in indices.tolist():
                x, top = x0 + 40 * (p % 4), y + 40 * (p // 4)
                page.draw.rectangle([x, top, x + 39, top + 39], outline=ink, width=3)
                page.draw.rectangle([x, top, x + 21, top + 17], fill=ink)
                page.text(x + 11, top + 9, str(p), 13, INK, "mm")
        page.text(630, y + 20, f"masked   {masked[i].tolist()}", 15, (215, 70, 40))
        page.text(630, y + 50, f"rotated  {rotated[i].tolist()}", 15, (20, 130, 180))
        page.text(630, y + 80, f"by  {90 * angle[i].item()} degrees", 15, (20, 130, 180))
    for x, name in ((24, "image"), (230, "set A, by patch index"), (436, "what Model M sees")):
        page.text(x, page.top, name, 14)
    return page


def draw_reconstruction(args: argparse.Namespace, footer: str) -> Page:
    """What Model M answers: the black patches repainted, and the angle."""
    state = vit.read_checkpoint(pathlib.Path(args.out) / "m.pt")
    model = vit.ModelM(vit.ViT(**state["config"]), projector="projector.0.weight" in state["model"]).eval()
    model.load_state_dict(state["model"])
    patch = state["config"]["patch_size"]
    images, _ = data.load(args.data, "validation", limit=8)
    images = images.float() / 255
    augmented, masked, _, angle = data.patch_augment(images, torch.Generator().manual_seed(args.seed), patch)
    with torch.no_grad():
        logits, painted, _ = model(augmented, masked)
    patches = data.patchify(augmented, patch)  # [B, N, 3, P, P]
    painted = painted.view(*masked.shape, *patches.shape[2:]) * 0.25 + 0.5  # vit.standardise undone
    patches[torch.arange(len(images))[:, None], masked] = painted
    page = Page(
        960,
        410,
        "Model M at work",
        "Top: the input, four patches black and four turned. Middle: the same with M's "
        "guess for the black patches (it minimises\nthe squared error, so it paints the average of what "
        "could be "
        "there: blur). Bottom: the image. Below it the angle.",
        footer,
    )
    for i in range(len(images)):
        for row, picture in enumerate((augmented, data.unpatchify(patches), images)):
            page.paste(pixels(picture[i]), 24 + 116 * i, page.top + 116 * row, 110)
        right = logits[i].argmax() == angle[i]
        page.text(24 + 116 * i, page.top + 350, f"angle {90 * angle[i].item()}", 13)
        page.text(
            24 + 116 * i,
            page.top + 367,
            f"M says {90 * logits[i].argmax().item()}",
            13,
            LINES[2] if right else LINES[4],
        )
    return page


def draw_maps(args: argparse.Namespace, footer: str) -> Page:
    """CLS-patch similarity on some images, before and after fine-tuning, in one colour scale."""
    stored, rows = np.load(vit.arrays_path(args, "maps")), rows_of(args)
    names, side = data.source(args.data).classes, int((stored["before"].shape[1] - 1) ** 0.5)
    sides = {
        when: stored[when][:, 0, 1:].reshape(len(stored["labels"]), side, side)
        for when in ("before", "after")
    }
    low, high = min(s.min() for s in sides.values()), max(s.max() for s in sides.values())
    focus_text = {
        when: ", ".join(
            f"{k.replace('_', ' ')} {rows[f'maps_{when}'][v]:.3f}"
            for k, v in (("entropy", "value"), ("best_quarter", "best_quarter"), ("peak", "peak"))
        )
        for when in sides
    }
    page = Page(
        980,
        600,
        "Where is CLS' content? Cosine of the CLS token with each patch token",
        "One row each for the image, the map before and after fine-tuning, the map laid over the image; "
        "same colours in all. Over the\n"
        f"whole {rows['maps_after']['split']} split:  before: {focus_text['before']};  after: "
        f"{focus_text['after']}.",
        footer,
    )
    order = ["image", "before", "before,\nover it", "after", "after,\nover it"]
    for r, label in enumerate(order):
        page.text(14, page.top + 46 + 106 * r, label, 13)
    for i, image in enumerate(pixels(stored["images"])):
        x = 84 + 89 * i
        page.text(x + 42, page.top - 4, names[stored["labels"][i]], 13, anchor="ma")
        page.paste(image, x, page.top + 18, 84)
        for r, when in ((1, "before"), (3, "after")):
            small = Image.fromarray(((sides[when][i] - low) / (high - low)).astype(np.float32))
            heat = colour(np.asarray(small.resize((32, 32), Image.BILINEAR)))  # the report's 4x4 -> 32x32
            page.paste(heat, x, page.top + 18 + 106 * r, 84, smooth=True)
            page.paste(
                0.45 * image.mean(axis=-1, keepdims=True) + 0.55 * heat, x, page.top + 18 + 106 * (r + 1), 84
            )
    page.scale_bar(360, page.top + 560, 240, low, high, "cosine with CLS")
    return page


def draw_tokens(args: argparse.Namespace, footer: str) -> Page:
    """The whole token-by-token similarity matrix of three images."""
    stored = np.load(vit.arrays_path(args, "maps"))
    page = Page(
        960,
        615,
        "Every token against every token",
        f"Cosine between the {stored['before'].shape[1]} tokens, CLS first, then the patches row by row; "
        "above before, below after fine-tuning.\nSquares along the diagonal are rows of the image; lines "
        "parallel to it join patches above each other.",
        footer,
    )
    low, names = min(stored[w].min() for w in ("before", "after")), data.source(args.data).classes
    for i, label in enumerate(stored["labels"][:3]):
        page.text(80 + 290 * i + 127, page.top, names[label], 14, anchor="ma")
    for r, when in enumerate(("before", "after")):
        page.text(14, page.top + 130 + 270 * r, when, 14)
        for i in range(min(3, len(stored["labels"]))):
            page.paste(
                colour((stored[when][i] - low) / (1 - low)), 80 + 290 * i, page.top + 20 + 270 * r, 255
            )
    page.scale_bar(330, page.top + 565, 240, low, 1.0, "cosine")
    return page


def draw_cka(args: argparse.Namespace, footer: str) -> Page:
    """Layer-by-layer CKA of CLS, before and after fine-tuning."""
    stored, rows = np.load(vit.arrays_path(args, "cka")), rows_of(args)
    depth = len(stored["before_biased"]) // 2
    labels = ["in"] + [f"{n}{k}" for k in range(1, depth + 1) for n in "am"]
    texts = {
        w: f"{w} fine-tuning; last attention: {rows[f'cka_{w}']['value']:.4f} "
        f"(debiased {rows[f'cka_{w}']['debiased']:.4f}), "
        f"last block: {rows[f'cka_{w}']['whole_block']:.4f}"
        for w in ("before", "after")
    }
    page = Page(
        1000,
        545,
        "Linear CKA of the CLS token along the network",
        "The residual stream after each attention (a1, a2, ...) and each "
        "MLP (m1, m2, ...). 1: the same similarity structure over images, 0: none in common.\nGrey: CLS "
        "enters the first block the "
        "same for every image, so there is nothing to compare. Cells next to the diagonal are single steps.",
        footer,
    )
    cell = 420 // len(labels)
    for i, when in enumerate(("before", "after")):
        x = 60 + 500 * i
        page.text(x - 26, page.top + 4, texts[when], 13)
        page.heat_map(stored[f"{when}_biased"], x, page.top + 30, cell, labels)
    page.scale_bar(380, page.top + 520, 240, 0, 1, "CKA")
    return page


def draw_curves(args: argparse.Namespace, footer: str) -> Page:
    """Every metric that the image stages noted, epoch by epoch."""
    paths = [
        pathlib.Path(args.out) / f"{name}.pt"
        for name in ("infonce", "m", "m_infonce", "m_joint", "finetune", "finetune_scratch")
    ]
    histories = {p.stem: vit.read_checkpoint(p)["history"] for p in paths if p.exists()}
    if not histories:
        raise FileNotFoundError("no checkpoint")
    panels = {}
    for name, history in histories.items():
        for metric, line in history.items():
            panels.setdefault(metric, {})[name] = line
    page = Page(
        1080,
        30 + 270 * ((len(panels) + 1) // 2),
        "Learning curves",
        "Mean of each epoch, on augmented training images. match: views whose nearest neighbour is "
        "the other view of their image; angle: right rotation;\nmse: squared error of the masked patches, in "
        "standardised pixels; "
        "train, validation: right class (validation: held-out images).\nm: Model M from scratch; m_infonce: "
        "continued from InfoNCE; "
        "m_joint: that, with InfoNCE beside it.",
        footer,
    )
    for k, (metric, lines) in enumerate(panels.items()):
        box = (70 + 530 * (k % 2), page.top + 40 + 270 * (k // 2), 320, 190)
        page.chart(box, lines, metric, percent=metric not in ("loss", "mse"))
    return page


def draw_classes(args: argparse.Namespace, footer: str) -> Page:
    """Confusion matrix and accuracy per class of the fine-tuned model."""
    stored = np.load(vit.arrays_path(args, "finetune"))
    names, K = data.source(args.data).classes, 10
    confusion = np.zeros((K, K))
    np.add.at(confusion, (stored["truth"], stored["guess"]), 1)
    percent = 100 * confusion / confusion.sum(axis=1, keepdims=True).clip(1)
    page = Page(
        980,
        515,
        "Which classes does the fine-tuned model confuse?",
        f"Rows: the true class; columns: the model's answer, in percent "
        f"of the row. {int(confusion.sum()):,} images. Right: accuracy per class.",
        footer,
    )
    page.heat_map(percent, 110, page.top + 10, 46, names, 0, 100)
    for k, v in enumerate(percent.diagonal()):
        y = page.top + 18 + 46 * k
        page.draw.rectangle([660, y, 660 + 2 * v, y + 28], fill=LINES[0])
        page.text(650, y + 14, names[k], 13, anchor="rm")
        page.text(668 + 2 * v, y + 14, f"{v:.1f} %", 13, anchor="lm")
    return page


def draw_clips(args: argparse.Namespace, footer: str) -> Page:
    """A clip of each class: its frames, how the temporal CLS weighs them, what each frame says by itself,
    what the clip says."""
    stored, names = np.load(vit.arrays_path(args, "video_encoder_1")), data.source(args.data).classes
    weights = stored["weights"][:, 1:]  # [K, F]; the rest of the attention stays on CLS itself
    top, F, cell = weights.max(), weights.shape[1], 52
    page = Page(
        220 + cell * F,
        40 + 84 * len(weights),
        f"Pseudo-videos: {F} images of one class, and where the temporal CLS token looks",
        "Bar over a frame: attention from the temporal CLS (one block, mean of the heads; the highest is "
        f"{top:.3f}, an even share "
        f"{1 / (F + 1):.3f}). Frame green: this image\nby itself would be named right, red: wrong. Right: "
        "the answer to the whole clip. "
        "These clips are put together by their labels.",
        footer,
    )
    for k, clip in enumerate(pixels(stored["images"])):
        y, truth, guess = page.top + 12 + 84 * k, stored["labels"][k], stored["guess"][k]
        page.text(24, y + 52, names[truth], 14, anchor="lm")
        page.text(116 + cell * F, y + 52, names[guess], 14, LINES[2] if guess == truth else LINES[4], "lm")
        for f, frame in enumerate(clip):
            x, ink = 104 + cell * f, LINES[2] if stored["each"][k, f] == truth else LINES[4]
            page.draw.rectangle(
                [x + 12, y + 24 - 22 * weights[k, f] / top, x + cell - 17, y + 25], fill=LINES[0]
            )
            page.draw.rectangle([x - 1, y + 28, x + cell - 4, y + 28 + cell - 4], fill=ink)
            page.paste(frame, x + 2, y + 31, cell - 9)
    return page


def draw_video(args: argparse.Namespace, footer: str) -> Page:
    """Accuracy over the number of different images in a clip; learning curves of one block against two."""
    # as many as there are colours
    shown = ("encoder_1", "encoder_2", "divided_1", "divided_2", "report_1", "report_2", "repeats")
    rows = {name: row for name, row in rows_of(args).items() if name in [f"video_{s}" for s in shown]}
    if not rows:
        raise FileNotFoundError("no row of video.py")
    places = max((row["different"] for row in rows.values()), key=len)
    page = Page(
        1180,
        430,
        "Pseudo-videos: what more images bring, and one block against two",
        "Left: accuracy over the number of different images of one class that fill the frames. 1: a static "
        "video, the test that "
        "counts; more: put together by\nlabel, so easier. Right: epoch by epoch, accuracy on static videos "
        "of the validation split "
        "and on the training clips (augmented, as trained).\nencoder: factorised encoder; divided: "
        "factorised self-attention; report: trained as in the report; "
        "1, 2: temporal blocks.",
        footer,
    )
    ticks = {k + 1: n for k, n in enumerate(places)}
    page.chart(
        (70, page.top + 44, 330, 260),
        {name.removeprefix("video_"): list(row["different"].values()) for name, row in rows.items()},
        "accuracy by different images",
        True,
        ticks,
        "different images in the clip",
    )
    histories = {
        n: vit.read_checkpoint(pathlib.Path(args.out) / f"{n}.pt")["history"]
        for n in ("video_encoder_1", "video_encoder_2")
    }
    lines = {
        f"{n.removeprefix('video_')}, {what}": h[key]
        for n, h in histories.items()
        for key, what in (("validation", "static"), ("train", "training"))
    }
    page.chart((660, page.top + 44, 330, 260), lines, "accuracy while training", True)
    return page


def captioner_of(args: argparse.Namespace) -> str:
    """Whose captions the pictures show: "blip" where this run used them, else the small captioner, "tiny"."""
    return "blip" if "fusion_blip" in rows_of(args) else "tiny"


def draw_captions(args: argparse.Namespace, footer: str) -> Page:
    """Images with their captions, and what the fusion model and the control without text answer."""
    who, names = captioner_of(args), data.source(args.data).classes
    both, alone = (
        np.load(vit.arrays_path(args, name)) for name in (f"fusion_{who}", f"fusion_{who}_image_only")
    )
    truth, right, before = both["labels"], both["guess"] == both["labels"], alone["guess"] == alone["labels"]
    page = Page(
        1100,
        645,
        f"Captions by the {MADE_BY[who]}, and what they change",
        "Beside each image its caption, under it the true class, then the answer without text (the control "
        f"that never saw a caption) and with it. Of {len(truth):,} images,\n"
        f"{np.sum(right & ~before):,} are right only with captions, {np.sum(before & ~right):,} only "
        "without. Shown: the first two of each class.",
        footer,
    )
    for i, image in enumerate(pixels(both["images"])):
        x, y, k = 24 + 213 * (i % 5), page.top + 8 + 160 * (i // 5), both["shown"][i]
        page.paste(image, x, y, 84)
        for line, text in enumerate(textwrap.wrap(both["captions"][i], 15, max_lines=5, placeholder=" ...")):
            page.text(x + 92, y + 14 * line, text, 12)
        page.text(x, y + 90, f"it is: {names[truth[k]]}", 13)
        for line, (what, guess, ok) in enumerate(
            (("without", alone["guess"][k], before[k]), ("with", both["guess"][k], right[k]))
        ):
            page.text(x, y + 106 + 16 * line, f"{what}: {names[guess]}", 13, LINES[2] if ok else LINES[4])
    return page


def draw_words(args: argparse.Namespace, footer: str) -> Page:
    """How the image's query shares its attention among the words of the caption."""
    who, names = captioner_of(args), data.source(args.data).classes
    stored = np.load(vit.arrays_path(args, f"fusion_{who}_tokens"))
    weights, rows = stored["weights"], range(0, len(stored["shown"]), 2)
    widths = {i: [max(52, 9 * len(word) + 14) for word in stored["words"][i].split(" ")] for i in rows}
    page = Page(
        max(1000, 220 + max(map(sum, widths.values()))),
        30 + 62 * len(rows),
        f"Which words does the image ask? Captions by the {MADE_BY[who]}",
        "Attention of the temporal CLS over the tokens of the caption (mean of the heads; each row adds up "
        "to one). CLIP reads from left to right, so a\n"
        "token's state knows all words before it: attention on the end of the sentence can still be about "
        "its beginning.",
        footer,
    )
    high = weights.max()
    for r, i in enumerate(rows):
        x, y, truth = 190, page.top + 12 + 62 * r, stored["labels"][stored["shown"][i]]
        page.paste(pixels(stored["images"][i]), 24, y, 54)
        page.text(88, y + 27, names[truth], 14, anchor="lm")
        for word, width, w in zip(stored["words"][i].split(" "), widths[i], weights[i]):
            page.draw.rectangle(
                [x, y + 8, x + width - 4, y + 46],
                fill=tuple(int(255 - (255 - c) * w / high) for c in LINES[0]),
            )
            ink = PAPER if w > 0.6 * high else INK
            page.text(x + width / 2 - 2, y + 20, word, 13, ink, "mm")
            page.text(x + width / 2 - 2, y + 36, f"{w:.2f}", 11, ink, "mm")
            x += width
    return page


def draw_controls(args: argparse.Namespace, footer: str) -> Page:
    """Fusion against what the image, the caption, another image's caption and a remembered label bring."""
    who, rows = captioner_of(args), rows_of(args)
    bars = [(name, TABLE[name][0], rows[name]["value"]) for name in language_rows(who) if name in rows]
    if not bars:
        raise FileNotFoundError("no row of multimodal.py")
    page = Page(
        1060,
        40 + 44 * len(bars),
        f"Does the caption help, or merely answer? Captions by the {MADE_BY[who]}",
        f"Accuracy on static videos of the {args.split} split, each control trained like fusion, the first "
        "not at all. Help: fusion is above both image only "
        "and text only.\nMerely answer: fusion is no better than reading the class name off the caption.",
        footer,
    )
    for r, (name, what, value) in enumerate(bars):
        y = page.top + 14 + 44 * r
        page.text(478, y + 13, what, 13, anchor="rm")
        fusion = name in (f"fusion_{who}", f"fusion_{who}_1", f"fusion_{who}_tokens")
        page.draw.rectangle([490, y, 490 + 460 * value, y + 26], fill=LINES[0] if fusion else GREY)
        page.text(498 + 460 * value, y + 13, f"{100 * value:.2f} %", 13, anchor="lm")
    return page


FIGURES = {
    "patches": draw_patches,
    "reconstruction": draw_reconstruction,
    "maps": draw_maps,
    "tokens": draw_tokens,
    "cka": draw_cka,
    "curves": draw_curves,
    "classes": draw_classes,
    "clips": draw_clips,
    "video": draw_video,
    "captions": draw_captions,
    "words": draw_words,
    "controls": draw_controls,
}


def rows_of(args: argparse.Namespace) -> dict[str, dict]:
    """The rows measured on --split, by their plain names."""
    rows = vit.read_results(args.out)["rows"]
    return {
        name.removesuffix(f"_{args.split}"): row for name, row in rows.items() if row["split"] == args.split
    }


def figures(args: argparse.Namespace) -> None:
    """Draw every figure whose inputs are there into out/figures."""
    out, about = pathlib.Path(args.out), data.source(args.data)
    footer = f"{about.provenance}; run {out.name}, seed {vit.read_results(out).get('seed', args.seed)}"
    for name, draw in FIGURES.items():
        try:
            page = draw(args, footer)
        except (FileNotFoundError, KeyError, SystemExit) as missing:
            print(f"{name}: not drawn, what it needs is not there: {missing}")
            continue
        buffer = io.BytesIO()
        page.image.save(buffer, "PNG", optimize=True)
        vit.write_file(out / "figures" / f"{name}.png", buffer.getvalue())
        print(f"drew {out / 'figures' / name}.png", flush=True)


# ------------------------------------------------------------------------------------------------------------
# The moving picture
# ------------------------------------------------------------------------------------------------------------

FILM = {
    "infonce": "learning without labels: InfoNCE",
    "m_joint": "learning without labels: Model M and InfoNCE",
    "finetune": "fine-tuning on labels",
}


def nearest_neighbours(
    queries: torch.Tensor, keys: torch.Tensor, labels: torch.Tensor, k: int = 20
) -> torch.Tensor:
    """The class that most of the k keys of highest cosine have: queries [n, D], keys [m, D], labels [m] ->
    [n].

    It asks what looks alike to the encoder, and needs no training (Wu et al. 2018, section 3.4, here without
    weights).
    """
    unit = torch.nn.functional.normalize
    cosines = unit(queries, dim=1) @ unit(keys, dim=1).T  # [n, m]
    nearest = cosines.topk(min(k, len(keys)), dim=1).indices  # [n, k]
    return torch.nn.functional.one_hot(labels[nearest]).sum(dim=1).argmax(dim=1)  # [n, k, K] -> [n, K] -> [n]


def movie(args: argparse.Namespace) -> None:
    """Draw maps and nearest neighbours, epoch by epoch, into figures/learning.gif (needs --keep-epochs)."""
    out, target = pathlib.Path(args.out), pathlib.Path(args.out) / "figures" / "learning.gif"
    scenes = [("before any training", None)]
    for name, what in FILM.items():
        last = vit.read_checkpoint(out / f"{name}.pt")["epoch"] if (out / f"{name}.pt").exists() else 0
        kept = [k for k in range(1, last + 1) if (out / f"{name}-epoch{k}.pt").exists()]
        chosen = sorted({round(i) for i in np.linspace(0, len(kept) - 1, min(8, len(kept)))})
        scenes += [(f"{what}, epoch {kept[i]} of {last}", out / f"{name}-epoch{kept[i]}.pt") for i in chosen]
    if len(scenes) == 1:
        return print(
            f"{target}: not drawn, no epoch is kept; `python ssl.py pretrain --task infonce --keep-epochs "
            "--fresh` keeps them",
            flush=True,
        )
    made_from = vit.fingerprint(*(path for _, path in scenes[1:]))
    if target.exists() and Image.open(target).info.get("comment") == made_from.encode():
        return print(f"{target}: drawn before", flush=True)

    machine = vit.Machine(args.device, args.precision, args.seed)
    train, validation = (
        data.load(args.data, split, machine.device, min(args.limit or 5_000, 5_000))
        for split in ("train", "validation")
    )
    # the second image of each class, or the only one
    shown = torch.stack([(validation[1] == k).nonzero()[:2][-1, 0] for k in validation[1].unique()])
    maps, answers, right = [], [], []
    for what, path in scenes:
        encoder = (
            (vit.load_encoder(path) if path else vit.make_encoder(None, args.patch, args.dim, args.stem))
            .to(machine.device)
            .eval()
        )
        with torch.no_grad(), machine.autocast():
            keys, queries = (
                torch.cat([encoder(x.float() / 255)[:, 0].float() for x in images.split(machine.eval_batch)])
                for images, _ in (train, validation)
            )
            tokens = encoder(validation[0][shown].float() / 255)
        maps.append(token_similarity(tokens.float())[:, 0, 1:].cpu().numpy())  # [K, N]
        guess = nearest_neighbours(queries, keys, train[1])
        answers.append(guess[shown].tolist())
        right.append((guess == validation[1]).float().mean().item())
        print(f"{what}: nearest neighbours are right for {100 * right[-1]:.2f} %", flush=True)

    names, side = data.source(args.data).classes, int(maps[0].shape[1] ** 0.5)
    low, high = min(m.min() for m in maps), max(m.max() for m in maps)
    pictures, footer, frames = pixels(validation[0][shown].cpu()), data.source(args.data).provenance, []
    for f, (what, _) in enumerate(scenes):
        page = Page(
            900,
            350,
            what,
            "Validation images; below each, the cosine of CLS with every patch (yellow: high), and the class "
            "of most of its 20 nearest\n"
            f"neighbours among {len(train[1]):,} training images (green: right). Below: how often that is "
            f"right for {len(validation[1]):,} images.",
            footer,
        )
        for i, image in enumerate(pictures):
            x = 24 + 86 * i
            page.paste(image, x, page.top + 6, 80)
            page.paste(colour(((maps[f][i] - low) / (high - low)).reshape(side, side)), x, page.top + 92, 80)
            k = answers[f][i]
            page.text(
                x + 40,
                page.top + 178,
                names[k],
                13,
                LINES[2] if k == validation[1][shown[i]] else LINES[4],
                "ma",
            )
        line = [
            (
                90 + 700 * i / (len(scenes) - 1),
                page.top + 300 - 80 * (v - min(right)) / (max(right) - min(right) + 1e-9),
            )
            for i, v in enumerate(right)
        ]
        page.draw.line(line, fill=(215, 215, 220), width=2)
        if f:
            page.draw.line(line[: f + 1], fill=LINES[0], width=3)
        page.draw.ellipse([line[f][0] - 4, line[f][1] - 4, line[f][0] + 4, line[f][1] + 4], fill=LINES[0])
        page.text(line[f][0] + 8, line[f][1] + 12, f"{100 * right[f]:.1f} %", 14)
        frames.append(page.image)
    every = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames]))
    palette = every.quantize(200)  # one for all frames, so that what stands still costs nothing
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        "GIF",
        save_all=True,
        append_images=frames[1:],
        duration=[900] * (len(frames) - 1) + [3000],
        loop=0,
        comment=made_from.encode(),
    )
    vit.write_file(target, buffer.getvalue())
    print(f"drew {target}, {len(frames)} frames, {len(buffer.getvalue()) / 1000:.0f} kB", flush=True)


# ------------------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------------------

REPORTED_WITH_BLIP = 0.7013  # the coursework report's test accuracy with captions

MADE_BY = {"tiny": "small captioner trained here", "blip": "real BLIP"}


def language_rows(who: str) -> dict[str, tuple]:
    """multimodal.py's part of TABLE, for captions by "tiny" or "blip"."""
    fusion, by = f"fusion_{who}", f"{who} captions"
    return {
        f"captions_{who}": (f"{by}: class named in the caption, no training", None),
        f"{fusion}_text_only": (f"{by}: text only", f"captions_{who}"),
        f"{fusion}_image_only": (f"{by}: image only, without the cross-attention", "video_encoder_2"),
        fusion: (f"{by}: fusion, two blocks", f"{fusion}_image_only"),
        f"{fusion}_1": (f"{by}: fusion, one block", fusion),
        f"{fusion}_tokens": (f"{by}: fusion, attention over words", fusion),
        f"{fusion}_shuffled": (f"{by}: fusion, every caption from another image", f"{fusion}_image_only"),
        f"{fusion}_seen": (f"{by} from a captioner that saw the labels: fusion", fusion),
    }


# row of results.json -> what it is, and the row that it has to beat to mean anything
TABLE = {
    "pixels_probe": ("linear probe of raw pixels", None),
    "untrained_probe": ("linear probe of an untrained encoder", None),
    "infonce_probe": ("linear probe after InfoNCE", "untrained_probe"),
    "m_probe": ("linear probe after Model M, from scratch", "untrained_probe"),
    "m_infonce_probe": ("linear probe after Model M, continued from InfoNCE", "infonce_probe"),
    "m_joint_probe": (
        "linear probe after Model M with InfoNCE beside it, continued from InfoNCE",
        "infonce_probe",
    ),
    "m_best_probe": ("the best of the Model M probes by validation", "untrained_probe"),
    "finetune_scratch": ("trained on labels from scratch", None),
    "finetune": ("fine-tuned", "finetune_scratch"),
    "video_encoder_1": ("video, factorised encoder, one block", "finetune"),
    "video_encoder_2": ("video, factorised encoder, two blocks", "video_encoder_1"),
    "video_divided_1": ("video, factorised self-attention, one block", "video_encoder_1"),
    "video_divided_2": ("video, factorised self-attention, two blocks", "video_divided_1"),
    "video_encoder_1_probe": ("linear probe of the image encoder after video training", "m_joint_probe"),
    "video_unordered": (
        "video, factorised encoder, one block, without temporal positions",
        "video_encoder_1",
    ),
    "video_report_1": ("video, the report's training, one block", None),
    "video_report_1_probe": (
        "linear probe of the image encoder after the report's training",
        "m_joint_probe",
    ),
    "video_report_2": ("video, the report's training, two blocks", "video_report_1"),
    "video_random": ("video, 10 clips a step instead of 1, 10 times the learning rate", "video_report_1"),
    "video_balanced": ("video, and every class once a step", "video_random"),
    "video_repeats": ("video, and 1 to 16 different images a clip", "video_balanced"),
    **{name: about for who in ("tiny", "blip") for name, about in language_rows(who).items()},
    "cka_before": ("CKA of CLS across the last attention, before fine-tuning", None),
    "cka_after": ("CKA of CLS across the last attention, after fine-tuning", "cka_before"),
    "maps_before": ("entropy of CLS-patch maps, before fine-tuning", None),
    "maps_after": ("entropy of CLS-patch maps, after fine-tuning", "maps_before"),
}


def formatted(name: str, value: float, deviation: float | None = None) -> str:
    """A row's number as tables have it: accuracies in percent, CKA and entropies plain; with ± if given."""
    scale, digits, unit = (1, 4, "") if name.startswith(("cka", "maps")) else (100, 2, " %")
    spread = "" if deviation is None else f" ± {scale * deviation:.{digits}f}"
    return f"{scale * value:.{digits}f}{spread}{unit}"


def report(args: argparse.Namespace) -> None:
    """Write out/report.md from results.json, and print its table; note there which Model M is best."""
    results, out = vit.read_results(args.out), pathlib.Path(args.out)
    rows = rows_of(args)
    if not rows:
        raise SystemExit(
            f"{out}/results.json has no rows of the {args.split} split yet; `bash run_all.sh` runs the "
            "stages that write them"
        )

    if args.seconds:
        results["seconds"] = args.seconds
    variants = [name for name in ("m_probe", "m_infonce_probe", "m_joint_probe") if name in rows]
    if variants:
        best = max(variants, key=lambda name: rows[name]["validation"])
        rows["m_best_probe"] = results["rows"][vit.row_name(args, "m_best_probe")] = rows[best] | {
            "variant": best
        }
    vit.write_file(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())

    def number(name: str | None, key: str = "value") -> str:
        """One entry of the table, empty where there is none."""
        value = rows.get(name, {}).get(key)
        return "" if value is None else formatted(name, value)

    table = [["", "report", "ours", "control", "epochs", "time", "command"]]
    for name, (what, control) in TABLE.items():
        if row := rows.get(name):
            what += {"cls": " (CLS)", "mean": " (mean of patch tokens)"}.get(row.get("features"), "")
            what += f" = {row['variant']}" if "variant" in row else ""
            against = f"{number(control)} {control}" if control in rows else ""
            time = f"{row['seconds'] / 60:.1f} min" if "seconds" in row else ""
            table.append(
                [
                    what,
                    number(name, "report"),
                    number(name),
                    against,
                    str(row.get("epochs", "")),
                    time,
                    f"`{row['command']}`",
                ]
            )
        elif name == "fusion_blip" and "fusion_tiny" in rows:
            table.append(
                [
                    what,
                    formatted(name, REPORTED_WITH_BLIP),
                    "not measured here",
                    "",
                    "",
                    "",
                    "needs the weights of BLIP and CLIP",
                ]
            )
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    lines.insert(1, "|---|" + "---:|" * 5 + "---|")
    stamp = ""
    if results["dataset"] == "synthetic":
        stamp = "**SYNTHETIC DATA: these are not CIFAR-10 numbers.**\n\n"
    if args.limit:
        stamp += f"**ONLY {args.limit:,} IMAGES of each split: these numbers mean nothing.**\n\n"
    tiny = ""
    if "captions_tiny" in rows:
        tiny = (
            " Tiny captions are not BLIP's: a small captioner of the same library class, trained here on the "
            "training labels, wrote them; they hold no knowledge from outside."
        )
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    pictures = [
        f"### {name}\n\n![{name}](figures/{name}.png)\n"
        for name in FIGURES
        if (out / "figures" / f"{name}.png").exists()
    ]
    text = (
        f"# Results of {out.name}\n\n{stamp}Images: {results['provenance']}. Accuracies on the {args.split} "
        "split, one seed "
        f"({results['seed']}).\nMachine: {results['device']}, {results['precision']}; {versions}.\n\n"
        + "\n".join(lines)
        + "\n\n"
        "Time: training and evaluating what the row shows, without the stage it starts from. Which feature a "
        "probe reads "
        "is chosen on the validation split." + tiny + "\n\n" + "\n".join(pictures)
    )
    vit.write_file(out / "report.md", text.encode())
    widths = [max(len(cells[c]) for cells in table) for c in range(6)]
    for cells in table:
        print(
            "  ".join(
                cell.ljust(w) if c == 0 else cell.rjust(w)
                for c, (cell, w) in enumerate(zip(cells[:6], widths))
            )
        )
    if stamp:
        print(stamp.replace("*", "").strip())
    print(f"the table with its commands: {out / 'report.md'}; pictures: {out / 'figures'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[vit.common_arguments()],
    )
    stages = {function.__name__: function for function in (maps, cka, figures, movie, report)}
    parser.add_argument(
        "what", nargs="+", choices=list(stages), help="one of these, or several, one after another"
    )
    parser.add_argument("--before", help="maps, cka: checkpoint before fine-tuning")
    parser.add_argument("--after", help="maps, cka: checkpoint after fine-tuning")
    parser.add_argument(
        "--seconds", type=int, help="report: how long the whole run took, where it ran in one go"
    )

    def run(args: argparse.Namespace) -> None:
        """The stages that the command line names, one after another."""
        if {"maps", "cka"} & {*args.what} and not (args.before and args.after):
            parser.error("maps and cka need --before and --after")
        for name in args.what:
            stages[name](args)

    parser.set_defaults(run=run)
    vit.command(parser, data.source)


if __name__ == "__main__":
    main()
