"""What was learned: similarity maps, CKA, every figure and the results table.

    maps       where in the image is CLS' content found? cosine of CLS with the patch tokens
    cka        how much does attention change CLS? linear CKA of the residual stream around each attention
    figures    draw every picture from the files that the stages left (seconds, no training)
    movie      similarity maps and nearest neighbours epoch by epoch, as a GIF
    report     write the results table, with its pictures, to report.md

Depends on vit.py and data.py: copy this file with those two. linear_cka and StreamingCKA need only torch.

    python analysis.py maps cka --before runs/mine/m.pt --after runs/mine/finetune.pt --out runs/mine
    python analysis.py figures --out runs/mine

Papers: Kornblith et al. 2019 (linear CKA), Song et al. 2012 (unbiased HSIC), Nguyen et al. 2021 (debiased CKA
of layers). Shape letters as in vit.py; also n images, R representations.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import math
import pathlib
import re
import statistics
import sys
import unicodedata

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
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
    """How concentrated CLS-patch maps [n, N] are, averaged over images. A cosine map is no distribution, so
    it is shifted to a minimum of 0 and scaled to a sum of 1, as the eye does with a colour scale.

    entropy: of that distribution, as a share of its maximum log N (1: spread evenly, 0: all on one patch)
    best_quarter: mass on the N/4 strongest patches (0.25: spread evenly)
    peak: the largest cosine itself; spread: the cosines' standard deviation within an image
    """
    N = cosines.shape[1]
    mass = cosines - cosines.min(dim=1, keepdim=True).values
    mass = mass / mass.sum(dim=1, keepdim=True).clamp_min(1e-12)
    entropy = torch.special.entr(mass).sum(dim=1) / math.log(N)  # [n]
    best_quarter = mass.topk(N // 4, dim=1).values.sum(dim=1)  # [n]
    peak, spread = cosines.max(dim=1).values, cosines.std(dim=1)  # [n] each
    found = {"entropy": entropy, "best_quarter": best_quarter, "peak": peak, "spread": spread}
    return {name: values.mean().item() for name, values in found.items()}


def measuring_machine(args: argparse.Namespace) -> vit.Machine:
    """The machine, in float32 unless another precision is asked for: here it is not speed that counts."""
    return vit.set_up(args.device, "float32" if args.precision == "auto" else args.precision, args.seed)


def tokens_of(encoder: vit.ViT, images: Tensor, machine: vit.Machine) -> Tensor:
    """The tokens [n, T, D], float32, on the CPU, of uint8 images [n, 3, S, S]."""
    encoder.to(machine.device).eval()
    with torch.no_grad(), machine.autocast():
        batches = images.split(machine.eval_batch)
        return torch.cat([encoder(x.to(machine.device).float() / 255).float().cpu() for x in batches])


def two_encoders(args: argparse.Namespace) -> dict[str, str]:
    """The checkpoints to compare: of an encoder before fine-tuning and of the same after it."""
    before = args.before or f"{args.out}/m_joint.pt"
    return {"before": before, "after": args.after or f"{args.out}/finetune.pt"}


def first_of_each_class(labels: Tensor) -> Tensor:
    """labels [n] -> where each class is seen first, [K]."""
    return torch.stack([(labels == k).nonzero()[0, 0] for k in labels.unique()])


def maps(args: argparse.Namespace) -> None:
    """Measure CLS-patch similarity in two encoders, --before and --after; keep some maps for the figure."""
    name, paths, source = args.name or "maps", two_encoders(args), data.source(args.data)
    images, labels = data.load(args.data, args.split, limit=args.limit)
    about = made_of(paths, images, labels)
    stored = vit.arrays_path(args, name)
    if stored.exists() and vit.measured(args, f"{name}_after", about):
        return
    machine = measuring_machine(args)
    shown = first_of_each_class(labels)
    arrays, rows = {"images": images[shown], "labels": labels[shown]}, {}
    for when, path in paths.items():
        encoder = vit.load_encoder(path, images.shape[-1])
        similarity = token_similarity(tokens_of(encoder, images, machine))  # [n, T, T]
        arrays[when], rows[when] = similarity[shown], focus(similarity[:, 0, 1:])
    vit.write_arrays(stored, **arrays)  # before the rows: a row says that everything of it is there
    for when, row in rows.items():
        row["value"] = row.pop("entropy")
        vit.record(args, f"{name}_{when}", machine, source, **row, **about)


def made_of(paths: dict[str, str], images: Tensor, labels: Tensor) -> dict[str, str]:
    """What a measurement depends on: hashes of the checkpoints' weights and of the images."""
    weights = " ".join(vit.hash_of_checkpoint(path) for path in paths.values())
    return {"weights": weights, "images": data.fingerprint(images, labels)}


# ---------------------------------------------------------------- CKA
# Do two layers (or two networks) see the same images as alike? Their features can't be compared one by one: a
# network may turn or scale them at will and undo it in the next layer. But the Gram matrix X X^T [n, n] of a
# representation X [n, D], the similarity of each image with each, is blind to turns. Linear CKA is the cosine
# of two Gram matrices. X is centred first: what all images have in common says nothing about them, but would
# make all Gram matrices alike. In feature space no n x n matrix is needed, as <X X^T, Y Y^T> = |X^T Y|_F^2.


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA [] of two representations x [n, D] and y [n, E] of the same n images (Kornblith et al. 2019,
    equations 1, 3 and 4):

        CKA(X, Y) = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)),     HSIC(X, Y) = |X^T Y|_F^2   (X, Y centred)

    This is all of it, where all features fit into memory. What follows is the same, a batch at a time.
    """
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    xy, xx, yy = (x.T @ y).square().sum(), (x.T @ x).square().sum(), (y.T @ y).square().sum()  # HSIC, [] each
    return xy / (xx * yy).sqrt()


class StreamingCKA:
    """Linear CKA between all pairs of R representations of the same images, adding a batch at a time.

    linear_cka is biased upwards when n is not much larger than D: even independent features get a positive
    score. Song et al. 2012 (equation 5; used for CKA by Nguyen et al. 2021) remove the bias by leaving each
    image's similarity with itself out of the Gram matrices. Their formula, too, is made of sums over images,
    so both estimates come from the same few D x D sums whatever n is.
    """

    def __init__(self):
        self.n = 0

    def add(self, *representations: Tensor) -> None:
        """One batch: R tensors [b, D_r], rows belonging to the same images. float64 inside, on the CPU."""
        features = [r.detach().cpu().double() for r in representations]
        z = torch.cat(features, dim=1)  # [b, D], D: sum of the D_r
        if self.n == 0:
            R, D = len(representations), z.shape[1]
            self.widths = [r.shape[1] for r in representations]
            # CKA ignores a common shift. Seen from the first image, sums are of small numbers, which lose
            # fewer digits, and features that are the same for all images are exactly zero
            self.origin = z[0]
            self.sum = torch.zeros(D, dtype=z.dtype)  # of z
            self.products = torch.zeros(D, D, dtype=z.dtype)  # z^T z
            self.own_times_z = torch.zeros(R, D, dtype=z.dtype)  # own^T z
            self.own_times_own = torch.zeros(R, R, dtype=z.dtype)  # own^T own
        z = z - self.origin
        own = [part.square().sum(dim=1) for part in z.split(self.widths, dim=1)]
        own = torch.stack(own, dim=1)  # [b, R], each image's similarity with itself
        self.n += len(z)
        self.sum += z.sum(dim=0)
        self.products += z.T @ z
        self.own_times_z += own.T @ z
        self.own_times_own += own.T @ own

    def result(self, debiased: bool = False) -> Tensor:
        """CKA of every pair: [R, R]; nan in the row and column of a representation that is the same for all
        images (0 / 0), or holds a nan. Raises ValueError with fewer than four images, for which the debiased
        estimate is not defined."""
        if self.n < 4:
            raise ValueError(f"CKA needs at least 4 images, not {self.n}")
        R = len(self.widths)
        hsic = torch.stack([self.hsic(i, j, debiased) for i in range(R) for j in range(R)]).view(R, R)
        scale = hsic.diagonal().sqrt()  # [R]
        return hsic / torch.outer(scale, scale)

    def hsic(self, i: int, j: int, debiased: bool) -> Tensor:
        """HSIC of representations i and j, [], but for a factor that CKA does not see."""
        n, rows = self.n, self.products.split(self.widths)  # [D_r, D] each
        xx, xy, yy = (rows[a].split(self.widths, dim=1)[b] for a, b in ((i, i), (i, j), (j, j)))
        x, y = self.sum.split(self.widths)[i], self.sum.split(self.widths)[j]  # [D_i], [D_j]
        if not debiased:
            return (xy - torch.outer(x, y) / n).square().sum()  # xy centred: X^T Y
        # k, l [n]: each image's similarity with itself in X and in Y, the diagonals of X X^T and Y Y^T
        xl = self.own_times_z[j].split(self.widths)[i]  # X^T l, [D_i]
        yk = self.own_times_z[i].split(self.widths)[j]  # Y^T k, [D_j]
        kl = self.own_times_own[i, j]  # k^T l
        # K and L: X X^T and Y Y^T without their diagonals; 1: a vector of ones; x = X^T 1, y = Y^T 1
        trace = xy.square().sum() - kl  # tr(K L)
        middle = x @ xy @ y - xl @ x - yk @ y + kl  # 1^T K L 1 = (X x - k)^T (Y y - l)
        total_k = x @ x - xx.trace()  # 1^T K 1
        total_l = y @ y - yy.trace()  # 1^T L 1
        return trace + total_k * total_l / ((n - 1) * (n - 2)) - 2 / (n - 2) * middle


def cka(args: argparse.Namespace) -> None:
    """CKA of CLS between places within an encoder, for two encoders, --before and --after fine-tuning; the
    whole place-by-place matrix goes to the figure.

    The report compares CLS before and after the last self-attention block, which can be read in two ways:
    across the attention's residual sum (the row's value), or across the block with its MLP ("whole_block").
    """
    name, paths, source = args.name or "cka", two_encoders(args), data.source(args.data)
    images, labels = data.load(args.data, args.split, limit=args.limit)
    about = made_of(paths, images, labels)
    stored = vit.arrays_path(args, name)
    if stored.exists() and vit.measured(args, f"{name}_after", about):
        return
    machine = measuring_machine(args)
    if len(images) < 4:
        sys.exit(f"CKA needs at least 4 images, not {len(images)}; choose a larger --limit")
    arrays = {"number": len(images)}
    for when, path in paths.items():
        encoder = vit.load_encoder(path, images.shape[-1]).to(machine.device).eval()
        streaming = StreamingCKA()
        for x in images.split(machine.eval_batch):
            trace = []
            with torch.no_grad(), machine.autocast():
                encoder(x.to(machine.device).float() / 255, trace)
            stream = [trace[0]["before"]] + [block[k] for block in trace for k in ("attended", "after")]
            streaming.add(*(t[:, 0] for t in stream))  # CLS: [b, D] at 1 + 2 * depth places
        arrays[f"{when}_biased"] = streaming.result()  # [R, R]
        arrays[f"{when}_debiased"] = streaming.result(debiased=True)  # [R, R]
    vit.write_arrays(stored, **arrays)
    # of the places -3 is before the last block, -2 after its attention, -1 after its MLP
    for when in paths:
        plain, debiased = arrays[f"{when}_biased"], arrays[f"{when}_debiased"]
        row = {"value": plain[-3, -2].item(), "debiased": debiased[-3, -2].item()}
        row |= {"whole_block": plain[-3, -1].item(), "whole_block_debiased": debiased[-3, -1].item()}
        for steps, distance in (("attentions", 1), ("blocks", 2)):  # of every block
            values = debiased.diagonal(distance)[::2].tolist()
            row[steps] = [None if math.isnan(v) else v for v in values]  # JSON has no nan
        vit.record(args, f"{name}_{when}", machine, source, **row, **about, number=len(images))


# ---------------------------------------------------------------- drawing (from here on it may be skipped)
# A figure is boxes (Pillow images) in rows and columns; `grid` puts them there. By hand, since a plotting
# library would be one more to install for a dozen pictures.

Box = Image.Image
INK, GREY, LIGHT, PAPER = (30, 30, 36), (110, 110, 118), (226, 226, 230), (255, 255, 255)
EMPTY = Image.new("RGB", (1, 1), PAPER)  # leaves a cell of a grid empty
# colours that colour-blind readers can tell apart (Okabe and Ito 2008), and two more
BLUE, ORANGE, GREEN, PINK = (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167)
COLOURS = [BLUE, ORANGE, GREEN, PINK, (230, 159, 0), (86, 180, 233), (90, 90, 90), (140, 86, 75)]
VIRIDIS = "440154 472c7a 3b518b 2c718e 21908d 27ad81 5cc863 aadc32 fde725"


def colour(x: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1], any shape, to viridis colours [..., 3] in 0..255."""
    anchors = np.array([list(bytes.fromhex(code)) for code in VIRIDIS.split()])  # [9, 3]
    places = np.linspace(0, 1, len(anchors))
    return np.stack([np.interp(x, places, channel) for channel in anchors.T], axis=-1)


def pixels(images: Tensor | np.ndarray) -> np.ndarray:
    """[..., 3, S, S], uint8 or floats in [0, 1] -> [..., S, S, 3] in 0..255."""
    images = np.asarray(images)
    scale = 1 if images.dtype == np.uint8 else 255
    return np.moveaxis(images.astype(float) * scale, -3, -1)


def picture(array: np.ndarray, size: int) -> Box:
    """An array [S, S, 3] of 0..255 as a square box of `size` pixels."""
    return Image.fromarray(np.clip(array, 0, 255).astype(np.uint8)).resize((size, size), Image.NEAREST)


# where systems keep letters that Pillow's own font has not
FONTS = ["DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "Arial.ttf"]
FONTS += ["NotoSansCJK-Regular.ttc", "PingFang.ttc", "msyh.ttc", "wqy-microhei.ttc"]


def lacks(font: ImageFont.FreeTypeFont, words: str) -> bool:
    """Whether the font draws some letter as the box that stands for what it has not."""
    shapes = {}
    for letter in {"\uffff", *words} - {"\n"}:
        box = Image.new("L", (64, 64))
        ImageDraw.Draw(box).text((0, 0), letter, 255, font)
        shapes[letter] = box.tobytes()
    missing = shapes.pop("\uffff")
    return missing in shapes.values()


@functools.cache
def legible(words: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """The words, and a font that has their letters: Pillow's own, or one of the system's. Where none has,
    they are spelled without accents, and what then is left over as question marks."""
    own = ImageFont.load_default(size)
    if not lacks(own, words):
        return words, own
    for name in FONTS:
        try:
            font = ImageFont.truetype(name, size)
        except OSError:  # not on this system
            continue
        if not lacks(font, words):
            return words, font
    plain = unicodedata.normalize("NFKD", words.replace("ß", "ss"))
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return "".join("?" if lacks(own, letter) else letter for letter in plain), own


def text(words: str, size: int = 13, ink=INK, width: int | None = None) -> Box:
    """Words as a box; with a `width` in pixels they are wrapped to it."""
    (words, font), lines = legible(words, size), []
    for paragraph in words.split("\n"):
        lines.append("")
        for word in paragraph.split(" "):
            longer = f"{lines[-1]} {word}".strip()
            if width and font.getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    width = width or math.ceil(max(font.getlength(line) for line in lines)) + 1
    height = round(1.35 * size)
    box = Image.new("RGB", (width, height * len(lines)), PAPER)
    for k, line in enumerate(lines):
        ImageDraw.Draw(box).text((0, height * k), line, fill=ink, font=font)
    return box


def answer(words: str, right: bool) -> Box:
    """What a model said: blue if right, else orange and with an x, for who can't tell the two apart."""
    return text(words, ink=BLUE) if right else text(f"x {words}", ink=ORANGE)


def tile(words: str, width: int, height: int, paper) -> Box:
    """A coloured box with words in the middle."""
    box = Image.new("RGB", (width, height), tuple(int(c) for c in paper))
    ink = INK if paper[1] > 150 else PAPER  # dark on light: what looks light has much green
    (words, font), middle = legible(words, 12), (width / 2, height / 2)
    ImageDraw.Draw(box).text(middle, words, ink, font, anchor="mm", align="center")
    return box


def grid(rows: list[list[Box]], gap: int = 8, x: float = 0.5, y: float = 0.5) -> Box:
    """Boxes in rows and columns as one box; x, y: where in its cell a box lies (0 left or top, 1 right or
    bottom)."""
    columns = itertools.zip_longest(*rows, fillvalue=EMPTY)
    widths = [max(box.width for box in column) for column in columns]
    heights = [max(box.height for box in row) for row in rows]
    size = (sum(widths) + gap * (len(widths) - 1), sum(heights) + gap * (len(heights) - 1))
    whole = Image.new("RGB", size, PAPER)
    top = 0
    for row, height in zip(rows, heights):
        left = 0
        for box, width in zip(row, widths):
            whole.paste(box, (left + round(x * (width - box.width)), top + round(y * (height - box.height))))
            left += width + gap
        top += height + gap
    return whole


def page(title: str, caption: str, body: Box, footer: str) -> Box:
    """A whole figure: what it is, how to read it, the figure itself, where its pixels come from."""
    width = max(body.width, 760)
    head = text(" ".join(caption.split()), 14, GREY, width)
    boxes = [text(title, 22), head, body, text(footer, 12, GREY, width)]
    return ImageOps.expand(grid([[box] for box in boxes], 14, x=0), 24, PAPER)


def scale_bar(low: float, high: float, label: str) -> Box:
    """The legend of `colour`."""
    bar = Image.fromarray(colour(np.linspace(0, 1, 240)[None].repeat(12, 0)).astype(np.uint8))
    return grid([[text(f"{low:.2f}", 12), bar, text(f"{high:.2f} {label}", 12)]])


def round_ticks(low: float, high: float) -> np.ndarray:
    """At most 7 round numbers, 1, 2 or 5 times a power of ten apart, between low and high."""
    if low == high:
        return np.array([low])
    step = 10.0 ** math.floor(math.log10((high - low) / 6))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


def chart(
    title: str,
    lines: dict[str, list],
    labels: list | None = None,
    until: int | None = None,
    ends: dict[str, float] | None = None,
) -> Box:
    """Curves over epochs, or over places that have `labels`, with axes and a legend; an empty line is not
    drawn, but has its colour all the same. until: draw only so many points of each. ends: the place of each
    line's last point (seconds, say); its others lie evenly before it."""
    values = [value for line in lines.values() for value in line]
    margin = max(0.05 * (max(values) - min(values)), 0.01 * max(values), 0.001)
    low, high = min(values) - margin, max(values) + margin
    ends = ends or {name: len(line) for name, line in lines.items()}
    last = max(ends.values())
    first = 0 if labels is None else 1
    width, height, left, font = 300, 180, 40, ImageFont.load_default(12)
    box = Image.new("RGB", (left + width + 20, height + 30), PAPER)
    draw = ImageDraw.Draw(box)

    def at(place: float, value: float) -> tuple[float, float]:
        """Where in the box a point lies."""
        right = left + width * (place - first) / max(1, last - first)
        return right, 6 + height * (high - value) / (high - low)

    for value in round_ticks(low, high):
        y = at(first, value)[1]
        draw.line([(left, y), (left + width, y)], fill=LIGHT)
        draw.text((left - 6, y), f"{value:g}", fill=GREY, font=font, anchor="rm")
    for place in round_ticks(first, last):
        if place >= first and place % 1 == 0:
            label = labels[int(place) - 1] if labels else f"{place:g}"
            draw.text((at(place, low)[0], height + 12), label, fill=GREY, font=font, anchor="ma")
    legend = []
    for (name, line), ink in zip(lines.items(), COLOURS):
        places = [ends[name] * (k + 1) / len(line) for k in range(len(line))]
        points = [at(place, value) for place, value in zip(places, line)][:until]
        if points:
            draw.line(points, fill=ink, width=2)
            x, y = points[-1]
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=ink)
            legend.append([text(name, ink=ink)])
    return grid([[text(title, 15)], [box, grid(legend, 2, x=0)]], 4)


def matrix(values: np.ndarray, labels: list[str], cell: int, framed=()) -> Box:
    """A square matrix of shares in colour, with its entries; framed: cells (i, j) to point out."""
    rows = []
    for i, row in enumerate(values):
        rows.append([ImageOps.expand(text(labels[i], 12), 3, PAPER)])
        for j, value in enumerate(row):
            if np.isnan(value):
                box = tile("", cell, cell, LIGHT)
            else:
                box = tile(f"{value:.2f}".removeprefix("0"), cell, cell, colour(value))
            if (i, j) in framed:
                ImageDraw.Draw(box).rectangle([0, 0, cell - 1, cell - 1], outline=ORANGE, width=3)
            rows[-1].append(box)
    return grid([*rows, [EMPTY, *(text(label, 12) for label in labels)]], 1)


# ---------------------------------------------------------------- the figures
# Each function returns a title, a caption that says how to read it, and the body.


def task_examples(args: argparse.Namespace, patch: int) -> tuple[Tensor, ...]:
    """Two images for each of the four angles, 0 to 270 degrees twice over, augmented as Model M sees them:
    images, augmented images [8, 3, S, S] each, masked, turned patches [8, M] each, angles [8]."""
    images, _ = data.load(args.data, "validation", limit=200)
    images = images.repeat(math.ceil(200 / len(images)), 1, 1, 1)  # so many that no angle is missing
    images = images.float() / 255
    quarter = (images.shape[-1] // patch) ** 2 // 4
    drawn = data.patch_augment(images, torch.Generator().manual_seed(args.seed), patch, quarter, quarter)
    angle = drawn[-1]
    first_and_last = [(angle == k).nonzero()[[0, -1], 0] for k in range(4)]
    chosen = torch.stack(first_and_last, dim=1).flatten()  # [2, 4] -> [8]
    return tuple(x[chosen] for x in (images, *drawn))


def draw_patches(args: argparse.Namespace):
    """The report's first figure: set A, half of the patches, and what becomes of them."""
    images, augmented, masked, turned, angle = task_examples(args, 8)
    rows = [[text("the image"), text("set A, patches by number"), text("what Model M sees")]]
    side = images.shape[-1] // 8  # patches in a row
    for i in range(4):
        image, seen = picture(pixels(images[i]), 40 * side), picture(pixels(augmented[i]), 40 * side)
        numbered = image.copy()
        for ink, patches in ((ORANGE, masked[i].tolist()), (BLUE, turned[i].tolist())):
            for p in patches:
                x, y = 40 * (p % side), 40 * (p // side)
                ImageDraw.Draw(numbered).rectangle([x, y, x + 39, y + 39], outline=ink, width=3)
                numbered.paste(tile(str(p), 20, 16, ink), (x, y))
        about = [[text(f"blacked out: {masked[i].tolist()}", ink=ORANGE)]]
        about += [[text(f"turned by {90 * angle[i]}°: {turned[i].tolist()}", ink=BLUE)]]
        rows.append([image, numbered, seen, grid(about, x=0)])
    black, turn = masked.shape[1], turned.shape[1]
    caption = f"""{black + turn} of an image's {side * side} patches, at random, are set A: {black} are
    blacked out, {turn} turned counter-clockwise by one angle. Model M names the angle and repaints the black
    patches, without labels."""
    return "Patch augmentation", caption, grid(rows, 16, x=0)


def draw_reconstruction(args: argparse.Namespace):
    """What Model M answers: the black patches repainted, and the angle."""
    path = pathlib.Path(args.out) / "m.pt"
    state = vit.read_checkpoint(path)
    model = vit.ModelM(vit.ViT(**state["config"])).eval()
    vit.load_weights(model, state["model"], path)
    images, augmented, masked, _, angle = task_examples(args, state["config"]["patch_size"])
    with torch.no_grad():
        logits, painted = model(augmented, masked)
    patches = data.patchify(augmented, state["config"]["patch_size"])  # [8, N, 3, P, P]
    painted = painted.view(*masked.shape, *patches.shape[2:])  # [8, M, 3, P, P]
    patches[torch.arange(len(images))[:, None], masked] = painted * 0.25 + 0.5  # vit.standardise undone
    rows = []
    pictures = {"what M sees": augmented, "M repaints": data.unpatchify(patches), "the image": images}
    for words, shown in pictures.items():
        rows.append([text(words), *(picture(array, 106) for array in pixels(shown))])
    guess = logits.argmax(dim=1)
    rows.append([text("turned by"), *(text(f"{90 * k}°") for k in angle)])
    rows.append([text("M says"), *(answer(f"{90 * k}°", bool(k == true)) for k, true in zip(guess, angle))])
    caption = """A quarter of the patches black, another turned; then the black ones as Model M paints them.
    It minimises the squared error, so it paints the average of what could be there, a blur. Orange with an
    x: wrong."""
    return "Model M at work", caption, grid(rows)


def draw_maps(args: argparse.Namespace):
    """CLS-patch similarity of some images, before and after fine-tuning, in one colour scale."""
    stored, rows = np.load(vit.arrays_path(args, "maps")), rows_of(args)
    names = data.source(args.data).classes
    cosines = np.stack([stored["before"], stored["after"]], axis=1)[:, :, 0, 1:]  # [K, 2, N]
    low, high, side = cosines.min(), cosines.max(), math.isqrt(cosines.shape[-1])
    columns = [[text(words) for words in ("", "image", "before", "lit by it", "after", "lit by it")]]
    for i, image in enumerate(pixels(stored["images"])):
        column = [text(names[stored["labels"][i]]), picture(image, 84)]
        for cosine in cosines[i]:
            small = Image.fromarray(cosine.reshape(side, side).astype(np.float32))
            large = np.asarray(small.resize(image.shape[:2], Image.BILINEAR))  # the report's 4x4 -> 32x32
            light = (large - large.min()) / (large.max() - large.min() + 1e-9)
            column.append(picture(colour((large - low) / (high - low)), 84))
            column.append(picture(image * (0.1 + 0.9 * light[..., None]), 84))
        columns.append(column)
    body = grid([[grid(list(zip(*columns)))], [scale_bar(low, high, "cosine of CLS and patch")]], 14)

    before, after = rows["maps_before"], rows["maps_after"]
    caption = f"""Cosine of the CLS token with each patch token, before and after fine-tuning; under each map
    the image, brightest where the map is highest. Means of the {before["split"]} split, before -> after:
    entropy {before["value"]:.3f} -> {after["value"]:.3f} (of the map, shifted to a minimum of 0 and scaled to
    a sum of 1; 1: spread evenly, 0: all on one patch); of that sum, the strongest quarter of the patches
    holds {before["best_quarter"]:.3f} -> {after["best_quarter"]:.3f}; largest cosine {before["peak"]:.3f} ->
    {after["peak"]:.3f}."""
    return "Where in the image is CLS' content?", caption, body


def draw_tokens(args: argparse.Namespace):
    """The whole token-by-token similarity matrix of three images."""
    stored, names = np.load(vit.arrays_path(args, "maps")), data.source(args.data).classes
    low = min(stored["before"].min(), stored["after"].min())
    tokens = stored["before"].shape[1]
    cell = max(3, 255 // tokens)  # pixels
    size = cell * tokens
    rows = [[EMPTY, *(text(names[label]) for label in stored["labels"][:3])]]
    for when in ("before", "after"):
        rows.append([text(f"{when}\nfine-tuning")])
        for similarity in stored[when][:3]:
            box = picture(colour((similarity - low) / (1 - low)), size)
            box.paste(PAPER, (cell - 1, 0, cell + 1, size))  # CLS is set apart from the patches
            box.paste(PAPER, (0, cell - 1, size, cell + 1))
            rows[-1].append(box)
    body = grid([[grid(rows, 16)], [scale_bar(low, 1.0, "cosine")]], 14)
    caption = """Cosine between all tokens, from left to right and from top to bottom: CLS (set apart by
    white lines), then the patches row by row. Squares along the diagonal are rows of the image; lines
    parallel to it join patches above each other."""
    return "Every token against every token", caption, body


def draw_cka(args: argparse.Namespace):
    """Place-by-place CKA of CLS, before and after fine-tuning."""
    stored, rows = np.load(vit.arrays_path(args, "cka")), rows_of(args)
    places = len(stored["before_biased"])
    labels = ["in"] + [f"{kind}{block}" for block in range(1, places // 2 + 1) for kind in "am"]
    framed = [(places - 3, places - 2), (places - 3, places - 1)]
    boxes = []
    for when in ("before", "after"):
        row = rows[f"cka_{when}"]
        head = f"{when} fine-tuning. Last attention {row['value']:.4f} (debiased {row['debiased']:.4f}), "
        head += f"last block {row['whole_block']:.4f} (debiased {row['whole_block_debiased']:.4f})"
        table = matrix(stored[f"{when}_biased"], labels, 480 // places, framed)
        boxes.append(grid([[text(head, width=table.width)], [table]]))
    caption = f"""Plain (not debiased) linear CKA, {stored["number"]:,} images of the {args.split} split, of
    the residual stream after each attention (a1, a2, ...) and each MLP (m1, m2, ...). 1: the same similarity
    structure over images, 0: none in common. Framed: the two ways to read the report's "before and after the
    last attention block". Grey: CLS enters the first block the same for every image: nothing to compare."""
    body = grid([[grid([boxes], 24)], [scale_bar(0, 1, "CKA")]], 14)
    return "Linear CKA of the CLS token along the network", caption, body


# checkpoint -> what its loss is: losses of one name can be compared and share a panel
LOSSES = {"infonce": "InfoNCE", "infonce_longer": "InfoNCE"}
LOSSES |= {"m": "angle + squared error", "m_infonce": "angle + squared error"}
LOSSES |= {"m_joint": "angle + squared error + InfoNCE"}
LOSSES |= dict.fromkeys(["finetune", "finetune_scratch", "finetune_infonce_longer"], "cross-entropy")
METRICS = {"mse": "squared error", "match": "partner found (%)", "angle": "angle named (%)"}
METRICS |= {"train": "accuracy, train (%)", "validation": "accuracy, validation (%)"}


def history_of(args: argparse.Namespace, name: str) -> dict[str, list]:
    """Metric -> its value in every epoch, shares in percent; empty where there is no such checkpoint."""
    path = pathlib.Path(args.out) / f"{name}.pt"
    history = vit.read_checkpoint(path)["history"] if path.exists() else {}
    for metric in history.keys() & (METRICS.keys() - {"mse"}):
        history[metric] = [100 * value for value in history[metric]]
    return history


def draw_curves(args: argparse.Namespace):
    """Every metric that the image stages noted, epoch by epoch."""
    panels = {}  # title -> run -> its line
    for name, loss in LOSSES.items():
        for metric, line in history_of(args, name).items():
            title = f"loss: {loss}" if metric == "loss" else METRICS.get(metric, metric)
            lines = panels.setdefault(title, {run: [] for run in LOSSES})
            lines[name] = line
    boxes = [chart(title, lines) for title, lines in panels.items()]
    caption = """Mean of each epoch, on augmented training images (validation: held-out images as they
    are). Partner found: views whose nearest neighbour in the batch is the other view of their image.
    Squared error: of the blacked-out patches, in standardised pixels. infonce_longer: InfoNCE continued; m:
    Model M from scratch; m_infonce: continued from InfoNCE; m_joint: that, with InfoNCE beside it; finetune:
    from m_joint."""
    return "Learning curves", caption, grid([boxes[k : k + 2] for k in range(0, len(boxes), 2)], 28, x=0)


def draw_optimizers(args: argparse.Namespace):
    """What the optimiser brings: the same training by AdamW and by Muon, by epochs and by seconds."""
    pairs = {"infonce": ("match", "InfoNCE, partner found (%)")}
    pairs |= {"finetune_scratch": ("validation", "from scratch, accuracy, validation (%)")}
    pairs |= {"finetune": ("validation", "fine-tuning, accuracy, validation (%)")}
    rows = []
    for run, (metric, title) in pairs.items():
        lines, seconds = {}, {}
        for optimizer, name in {"Muon": run, "AdamW": f"{run}_adamw"}.items():
            lines[optimizer] = history_of(args, name).get(metric, [])
            seconds[optimizer] = vit.read_checkpoint(pathlib.Path(args.out) / f"{name}.pt")["seconds"]
        rows.append([chart(f"{title}, by epoch", lines), chart("the same, by seconds", lines, ends=seconds)])
    caption = """The same training by two optimisers, each at its own learning rate: the best of those that
    were tried, or within a point of it (results/tuning.md). At the left by epochs; at the right by seconds on
    this run's machine, with all that it did beside. Partner found: in training; accuracy: on held-out
    images."""
    return "What does the optimiser bring?", caption, grid(rows, 28, x=0)


def draw_classes(args: argparse.Namespace):
    """Confusion matrix and accuracy per class of the fine-tuned model."""
    stored, names = np.load(vit.arrays_path(args, "finetune")), data.source(args.data).classes
    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, (stored["truth"], stored["guess"]), 1)
    table = matrix(counts / counts.sum(axis=1, keepdims=True).clip(1), names, 68)
    body = grid([[EMPTY, text("the model's answer")], [text("true\nclass"), table]])
    caption = f"""Shares of each true class, {int(counts.sum()):,} images of the {args.split} split. On the
    diagonal: the accuracy by class."""
    return "Which classes does the fine-tuned model confuse?", caption, body


def draw_clips(args: argparse.Namespace):
    """A clip of each class: its frames, how the temporal CLS weighs them, what each frame says by itself,
    what the clip says."""
    stored, names = np.load(vit.arrays_path(args, "video_encoder_1")), data.source(args.data).classes
    weights = stored["weights"][:, 1:]  # [K, F]; the rest of the attention stays on CLS itself
    top, even = weights.max(), 1 / (weights.shape[1] + 1)
    rows = [[text("true class"), *[EMPTY] * weights.shape[1], text("answer")]]
    for k, clip in enumerate(pixels(stored["images"])):
        truth, guess = stored["labels"][k], stored["guess"][k]
        rows.append([text(names[truth])])
        for f, frame in enumerate(clip):
            bar = Image.new("RGB", (46, 35), PAPER)
            bar.paste(GREY, (12, 34 - round(34 * weights[k, f] / top), 34, 35))
            line = 34 - round(34 * even / top)
            bar.paste(INK, (0, line, 46, line + 1))
            right = stored["each"][k, f] == truth
            box = ImageOps.expand(picture(frame, 40), 3, BLUE if right else ORANGE)
            if not right:  # told by more than its colour
                box.paste(ORANGE, (0, 37, 46, 46))
            rows[-1].append(grid([[bar], [box]], 4))
        rows[-1].append(answer(names[guess], guess == truth))
    caption = f"""Bar over a frame: attention from the temporal CLS token (one block, mean of the heads), the
    highest {top:.3f}; the line is an even share, {even:.3f}. Frame blue: this image by itself would be named
    right; orange, with a thick lower edge: wrong. At the right the answer to the whole clip."""
    title = f"Pseudo-videos: {weights.shape[1]} images of one class, and where the temporal CLS looks"
    return title, caption, grid(rows, 6)


VIDEOS = ["encoder_1", "encoder_2", "divided_1", "divided_2", "report_1", "report_2", "unordered", "repeats"]


def draw_video(args: argparse.Namespace):
    """Accuracy over the number of different images in a clip; learning curves of one block against two."""
    rows, drawn, labels = rows_of(args), {}, []
    for name in VIDEOS:
        different = rows.get(f"video_{name}", {}).get("different", {})  # number of images -> accuracy
        drawn[name] = [100 * value for value in different.values()]
        labels = max(labels, list(different), key=len)
    boxes = [chart("accuracy (%) by different images in the clip", drawn, labels)]
    lines = {}
    for name in ("encoder_1", "encoder_2"):
        for metric in ("validation", "train"):
            lines[f"{name}, {metric}"] = history_of(args, f"video_{name}").get(metric, [])
    if any(lines.values()):
        boxes.append(chart("accuracy (%) by epoch", lines))
    what = {name: TABLE[f"video_{name}"][0].removeprefix("video, ") for name in VIDEOS if drawn[name]}
    names = "; ".join(f"{name}: {words}" for name, words in what.items())
    caption = f"""Left: 16 frames filled with 1, 2, ... different images of one class. 1: a static video, the
    test that counts; more: put together by label, so easier. Right: static videos of the validation split,
    and training clips (augmented). {names}."""
    return "Pseudo-videos: what more images bring, and one block against two", caption, grid([boxes], 28, y=0)


def captioner_of(args: argparse.Namespace) -> tuple[str, str]:
    """Whose captions the pictures show, by its short name and in words: BLIP's where this run used them."""
    blip = "fusion_blip" in rows_of(args)
    return ("blip", "the real BLIP") if blip else ("tiny", "a small captioner trained here")


def draw_captions(args: argparse.Namespace):
    """Images with their captions, and what the fusion model and the control without text answer."""
    (who, name), names = captioner_of(args), data.source(args.data).classes
    stored = np.load(vit.arrays_path(args, f"fusion_{who}"))
    alone = np.load(vit.arrays_path(args, f"fusion_{who}_image_only"))["guess"]
    truth, fused = stored["labels"], stored["guess"]
    cells = []
    for image, caption, k in zip(pixels(stored["images"]), stored["captions"], stored["shown"]):
        lines = [grid([[picture(image, 84), text(caption, width=108)]], y=0)]
        lines.append(text(f"it is: {names[truth[k]]}"))
        lines.append(answer(f"without: {names[alone[k]]}", alone[k] == truth[k]))
        lines.append(answer(f"with: {names[fused[k]]}", fused[k] == truth[k]))
        cells.append(grid([[line] for line in lines], 3, x=0))
    gained = np.sum((fused == truth) & (alone != truth))
    lost = np.sum((fused != truth) & (alone == truth))
    caption = f"""Beside each image its caption; below the true class, then the answer without text (of the
    control that never saw a caption) and with it; orange with an x: wrong. Of {len(truth):,} images
    {np.sum(fused != alone):,} get another answer with captions: {gained:,} a right one instead of a wrong
    one, {lost:,} the other way round. Shown: the first two of each class."""
    body = grid([cells[k : k + 5] for k in range(0, len(cells), 5)], 18, x=0, y=0)
    return f"Captions by {name}, and what they change", caption, body


def draw_words(args: argparse.Namespace):
    """How the image's query shares its attention among the words of the caption."""
    (who, name), names = captioner_of(args), data.source(args.data).classes
    stored = np.load(vit.arrays_path(args, f"fusion_{who}_tokens"))
    blue, top = np.array(BLUE), stored["weights"].max()
    rows = [[EMPTY, text("true class"), text("the caption, token by token")]]
    for i in range(0, len(stored["shown"]), 2):
        boxes = []
        for word, weight in zip(stored["words"][i].split(" "), stored["weights"][i]):
            paper = 255 - (255 - blue) * weight / top
            boxes.append(tile(f"{word}\n{weight:.2f}", max(52, 9 * len(word) + 14), 36, paper))
        truth = names[stored["labels"][stored["shown"][i]]]
        rows.append([picture(pixels(stored["images"][i]), 54), text(truth), grid([boxes], 4)])
    caption = """Attention of the temporal CLS over the tokens of the caption (mean of the heads; a row adds
    up to 1). Tokens are CLIP's pieces of words, between <start> and <end>. CLIP reads from left to right, so
    attention on the end of the sentence can still be about its beginning."""
    return f"Which words does the image ask? Captions by {name}", caption, grid(rows, 10, x=0)


def draw_controls(args: argparse.Namespace):
    """Fusion against what the image, the caption, another image's caption and a remembered label bring."""
    who, name = captioner_of(args)
    rows = []
    for row, (what, *_) in language_rows(who).items():
        values = over_seeds(args, row)
        if values:
            fusion = row in (f"fusion_{who}", f"fusion_{who}_1", f"fusion_{who}_tokens")
            rows.append((what, statistics.mean(values), in_words(row, *values), BLUE if fusion else GREY))
    means = [mean for _, mean, _, _ in rows]
    low = max(0, math.floor(20 * min(means) - 0.5) / 20)  # a round number below all
    lines = []
    for what, mean, number, ink in rows:
        bar = Image.new("RGB", (max(1, round(380 * (mean - low) / (max(means) - low))), 24), ink)
        lines.append([text(what), grid([[bar, text(number)]])])
    caption = f"""Accuracy on static videos of the {args.split} split; the bars start at {100 * low:.0f} %.
    Blue: the image and its caption; grey: controls, trained in the same way (the first not at all). All on
    the video model of two blocks, but for one, which has no control here. ±: standard deviation over seeds.
    Captions help if fusion is above both image only and text only by more than the spread over seeds; they
    merely answer if it is no better than reading the class off the caption."""
    return f"Does the caption help, or merely answer? Captions by {name}", caption, grid(lines, 10, x=0)


OPTIMIZED = [f"{run}{by}" for run in ("infonce", "finetune_scratch", "finetune") for by in ("", "_adamw")]
# what is drawn, and from what: checkpoints (.pt), arrays (.npz) and rows; {who}: whose captions
FIGURES = {
    "patches": (draw_patches, []),
    "reconstruction": (draw_reconstruction, ["m.pt"]),
    "maps": (draw_maps, ["maps.npz", "maps_before", "maps_after"]),
    "tokens": (draw_tokens, ["maps.npz"]),
    "cka": (draw_cka, ["cka.npz", "cka_before", "cka_after"]),
    "curves": (draw_curves, ["m.pt"]),
    "optimizers": (draw_optimizers, [f"{name}.pt" for name in OPTIMIZED]),
    "classes": (draw_classes, ["finetune.npz"]),
    "clips": (draw_clips, ["video_encoder_1.npz"]),
    "video": (draw_video, ["video_encoder_1"]),
    "captions": (draw_captions, ["fusion_{who}.npz", "fusion_{who}_image_only.npz"]),
    "words": (draw_words, ["fusion_{who}_tokens.npz"]),
    "controls": (draw_controls, ["fusion_{who}", "fusion_{who}_image_only"]),
}


def missing(args: argparse.Namespace, needed: list[str]) -> list[str]:
    """What is not there of what a figure needs."""
    out, rows, (who, _) = pathlib.Path(args.out), rows_of(args), captioner_of(args)
    found, images = [], set()
    for what in [what.format(who=who) for what in needed]:
        name, _, kind = what.partition(".")
        there = {"": name in rows, "pt": (out / what).exists(), "npz": vit.arrays_path(args, name).exists()}
        if not there[kind]:
            found.append(what)
        if kind != "pt" and name in rows:
            images.add(rows[name].get("images"))
    if len(images) > 1:  # their arrays are compared image by image
        found.append("all of these measured on the same images")
    return found


def figures(args: argparse.Namespace) -> None:
    """Draw every figure whose inputs are there into out/figures."""
    out = pathlib.Path(args.out)
    footer = f"{data.source(args.data).provenance}; run {out.name}"
    for name, (draw, needed) in FIGURES.items():
        lacking = missing(args, needed)
        if lacking:
            print(f"{name}: not drawn, as it needs {', '.join(lacking)}")
            continue
        buffer = io.BytesIO()
        page(*draw(args), footer).save(buffer, "PNG", optimize=True)
        vit.write_file(out / "figures" / f"{name}.png", buffer.getvalue())
        print(f"drew {out / 'figures' / name}.png", flush=True)


# ---------------------------------------------------------------- the moving picture

FILM = {
    "infonce": "learning without labels: InfoNCE",
    "m_joint": "learning without labels: Model M and InfoNCE",
    "finetune": "fine-tuning on labels",
}


def nearest_neighbours(queries: Tensor, keys: Tensor, labels: Tensor, k: int = 20) -> Tensor:
    """The class that most of the k keys of highest cosine have: queries [n, D], keys and their labels [m, D],
    [m] -> [n]. It asks what looks alike to the encoder, and needs no training (Wu et al. 2018, section 3.4,
    here without weights; k = 20 as in DINO, Caron et al. 2021, which found it best)."""
    unit = torch.nn.functional.normalize
    cosines = unit(queries, dim=1) @ unit(keys, dim=1).T  # [n, m]
    nearest = cosines.topk(min(k, len(keys)), dim=1).indices  # [n, k]
    votes = torch.nn.functional.one_hot(labels[nearest]).sum(dim=1)  # [n, k, K] -> [n, K]
    return votes.argmax(dim=1)  # [n]


def scenes_of(out: pathlib.Path) -> dict[str, pathlib.Path]:
    """What the film shows: titles and checkpoints, of each training eight kept epochs at most."""
    scenes = {}
    for name, what in FILM.items():
        epochs = sorted(int(path.stem.split("epoch")[1]) for path in out.glob(f"{name}-epoch*.pt"))
        for i in np.linspace(0, len(epochs) - 1, min(8, len(epochs))).astype(int):
            scenes[f"{what}, epoch {epochs[i]} of {epochs[-1]}"] = out / f"{name}-epoch{epochs[i]}.pt"
    return scenes


def movie(args: argparse.Namespace) -> None:
    """Draw maps and nearest neighbours, epoch by epoch, into figures/learning.gif (needs --keep-epochs)."""
    out = pathlib.Path(args.out)
    target, kept = out / "figures" / "learning.gif", scenes_of(out)
    if not kept:
        return print(f"{target}: not drawn; `python ssl.py pretrain ... --keep-epochs` keeps what it shows")
    made_from = vit.hash_of_files(__file__, *kept.values()).encode()
    if target.exists() and Image.open(target).info.get("comment") == made_from:
        return print(f"{target}: drawn before", flush=True)

    machine, limit = vit.set_up(args.device, args.precision, args.seed), min(args.limit or 5_000, 5_000)
    config = vit.read_checkpoint(next(iter(kept.values())))["config"]
    train, train_labels = data.load(args.data, "train", limit=limit)
    images, truth = data.load(args.data, "validation", limit=limit)
    shown = first_of_each_class(truth)
    scenes = {"before any training": None} | kept
    cosines, guesses, right = [], [], []  # a scene each
    for title, path in scenes.items():
        encoder = vit.load_encoder(path) if path else vit.ViT(**config)
        tokens = tokens_of(encoder, images, machine)  # [n, T, D]
        guess = nearest_neighbours(tokens[:, 0], tokens_of(encoder, train, machine)[:, 0], train_labels)
        cosines.append(token_similarity(tokens[shown])[:, 0, 1:].numpy())  # [K, N]
        guesses.append(guess[shown])  # [K]
        right.append(100 * (guess == truth).float().mean().item())
        print(f"{title}: nearest neighbours are right for {right[-1]:.2f} %", flush=True)

    source, side = data.source(args.data), math.isqrt(cosines[0].shape[1])
    heat = colour((np.stack(cosines) - np.min(cosines)) / np.ptp(cosines))  # [scenes, K, N, 3]
    caption = f"""Validation images; below each the cosine of CLS with every patch (yellow: high) and the
    class of most of its 20 nearest neighbours among {len(train):,} training images (orange with an x: wrong;
    the true class below it). The curve: how often that is right for {len(images):,} images."""
    frames = []
    for f, title in enumerate(scenes):
        columns = []
        for i, image in enumerate(pixels(images[shown])):
            column = [picture(image, 80), picture(heat[f, i].reshape(side, side, 3), 80)]
            label, guess = source.classes[truth[shown[i]]], source.classes[guesses[f][i]]
            column.append(answer(guess, guess == label))
            column.append(text("" if guess == label else f"({label})", 12, GREY))
            columns.append(column)
        curve = chart("nearest neighbours right (%), scene by scene", {"": right}, until=f + 1)
        body = grid([[grid(list(zip(*columns)))], [curve]], 14)
        frames.append(page(title, caption, body, f"{source.provenance}; run {out.name}"))
    every = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames]))
    palette = every.quantize(200)  # one for all frames, so that what stands still costs nothing
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    buffer, times = io.BytesIO(), [900] * len(others) + [3000]  # in milliseconds
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=times, loop=0, comment=made_from)
    vit.write_file(target, buffer.getvalue())
    print(f"drew {target}, {len(frames)} frames, {len(buffer.getvalue()) / 1000:.0f} kB", flush=True)


# ---------------------------------------------------------------- the table


def language_rows(who: str) -> dict[str, tuple]:
    """multimodal.py's part of TABLE, for captions by "tiny" or "blip"."""
    fusion, by = f"fusion_{who}", f"{who} captions"
    return {
        f"captions_{who}": (f"{by}: class named in the caption, no training",),
        f"{fusion}_text_only": (f"{by}: text only", f"captions_{who}"),
        f"{fusion}_image_only": (f"{by}: image only, without the cross-attention", "video_encoder_2"),
        fusion: (f"{by}: fusion", f"{fusion}_image_only"),
        f"{fusion}_1": (f"{by}: fusion, on the video model of one block", "video_encoder_1"),
        f"{fusion}_tokens": (f"{by}: fusion, attention over words", fusion),
        f"{fusion}_shuffled": (f"{by}: fusion, every caption from another image", f"{fusion}_image_only"),
        f"{fusion}_seen": (f"{by} from a captioner that saw the labels: fusion", fusion),
    }


# row of results.json -> what it is; then its control: the row it is compared with (the first that is there)
TABLE = {
    "pixels_probe": ("linear probe of raw pixels",),
    "untrained_probe": ("linear probe of an untrained encoder",),
    "infonce_probe": ("linear probe after InfoNCE", "pixels_probe"),
    "infonce_longer_probe": ("linear probe after InfoNCE, as long as m_joint", "infonce_probe"),
    "m_probe": ("linear probe after Model M, from scratch", "pixels_probe"),
    "m_infonce_probe": ("linear probe after Model M, continued from InfoNCE", "infonce_probe"),
    "m_joint_probe": ("linear probe after Model M with InfoNCE", "infonce_longer_probe", "infonce_probe"),
    "infonce_adamw_probe": ("linear probe after InfoNCE by AdamW instead of Muon", "infonce_probe"),
    "finetune_scratch": ("trained on labels from scratch",),
    "finetune_scratch_adamw": ("trained on labels from scratch by AdamW instead of Muon", "finetune_scratch"),
    "finetune_adamw": ("fine-tuned after Model M with InfoNCE, by AdamW instead of Muon", "finetune"),
    "finetune_m_infonce": ("fine-tuned after Model M, continued from InfoNCE", "finetune_scratch"),
    "finetune_infonce_longer": ("fine-tuned after InfoNCE, as long as m_joint", "finetune_scratch"),
    "finetune": ("fine-tuned after Model M with InfoNCE", "finetune_infonce_longer", "finetune_scratch"),
    "video_encoder_1": ("video, factorised encoder, one block", "finetune"),
    "video_encoder_2": ("video, factorised encoder, two blocks", "video_encoder_1"),
    "video_divided_1": ("video, factorised self-attention, one block", "video_encoder_1"),
    "video_divided_2": ("video, factorised self-attention, two blocks", "video_divided_1"),
    "video_encoder_1_probe": ("linear probe of the image encoder after video training", "m_joint_probe"),
    "video_unordered": ("video, one block, without temporal positions", "video_encoder_1"),
    "video_report_1": ("video, clips alone as we read the report, one block", "finetune"),
    "video_report_1_probe": ("linear probe of its image encoder", "m_joint_probe"),
    "video_report_2": ("video, clips alone as we read the report, two blocks", "video_report_1"),
    "video_muon": ("video, these clips, by Muon instead of AdamW", "video_report_1"),
    "video_random": (
        "video, and 10 clips a step instead of 1, 10 times the learning rate",
        "video_muon",
        "video_report_1",
    ),
    "video_balanced": ("video, and every class once a step", "video_random"),
    "video_repeats": ("video, our clips, without the loss of every image by itself", "video_balanced"),
    **language_rows("tiny"),
    **language_rows("blip"),
    "cka_before": ("CKA of CLS across the last attention, before fine-tuning",),
    "cka_after": ("CKA of CLS across the last attention, after fine-tuning", "cka_before"),
    "maps_before": ("entropy of CLS-patch maps, before fine-tuning",),
    "maps_after": ("entropy of CLS-patch maps, after fine-tuning", "maps_before"),
}
REPORTED = {"cka_before": 0.8698, "cka_after": 0.7353}  # by the coursework report


def rows_of(args: argparse.Namespace) -> dict[str, dict]:
    """The rows measured on --split, by their plain names."""
    rows = vit.read_results(args.out)["rows"].items()
    return {name.removesuffix(f"_{args.split}"): row for name, row in rows if row["split"] == args.split}


def over_seeds(args: argparse.Namespace, name: str) -> list[float]:
    """A row's value in this run, and in those beside it (OUT-seed1, OUT-seed2, ...) that differ from it in
    nothing but the seed."""
    out = pathlib.Path(args.out)
    own = rows_of(args).get(name)
    values = [own["value"]] if own else []
    for folder in sorted(out.parent.glob(f"{out.name}-seed*")):
        row = vit.read_results(folder)["rows"].get(vit.row_name(args, name))
        is_seed = re.fullmatch(r"-seed\d+", folder.name.removeprefix(out.name))
        if own and row and is_seed and but_for_the_seed(row) == but_for_the_seed(own):
            values.append(row["value"])
    return values


def but_for_the_seed(row: dict) -> tuple:
    """What two rows must share to be the same experiment: images, code, precision, and the command without
    its seed and folder."""
    command = re.sub(r"--seed \d+", "", row["command"])
    command = re.sub(r"-seed\d+", "", command)
    return row.get("images"), row.get("code"), row.get("precision"), command


def in_words(name: str, *values: float) -> str:
    """A row's number as tables have it: accuracies in percent, CKA and entropies plain; of several seeds the
    mean and standard deviation."""
    scale, digits, unit = (1, 4, "") if name.startswith(("cka", "maps")) else (100, 2, " %")
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.{digits}f}{spread}{unit}"


NOTES = """Time: training and evaluating what the row shows, without the stage that it starts from; a probe's
includes the training of the encoder that it probes. A probe reads cls or the mean of the patch tokens, as is
better on the validation split. Tiny captions are not BLIP's, which the report used: a small captioner of the
same library class wrote them, trained here on the training labels; they hold no knowledge from outside."""


def values_of(rows: dict[str, dict], key: str) -> str:
    """What rows have at `key`, in words; a mixture is said to be one."""
    found = list(dict.fromkeys(str(row[key]) for row in rows.values() if key in row))
    if len(found) > 1:
        return f"{', or '.join(found)} (A MIXTURE: each row's own is in results.json)"
    return found[0] if found else "not recorded"


def report(args: argparse.Namespace) -> None:
    """Write out/report.md from results.json, and print its table."""
    results, rows, out = vit.read_results(args.out), rows_of(args), pathlib.Path(args.out)
    if not rows:
        sys.exit(f"{out} has no rows of the {args.split} split yet; `bash run_all.sh` runs what writes them")
    table = [["row", "ours", "report", "control", "epochs", "time", "what it is", "command"]]
    others = {name: ("",) for name, row in rows.items() if name not in TABLE and "epochs" in row}
    for name, (what, *controls) in (TABLE | others).items():
        if name not in rows:
            continue
        row = rows[name]
        reported = row.get("report") or REPORTED.get(name)
        control = next((other for other in controls if other in rows), None)
        cells = [
            name,
            in_words(name, row["value"]),
            in_words(name, reported) if reported else "",
            f"{control} {in_words(control, rows[control]['value'])}" if control else "",
            str(row.get("epochs", "")),
            f"{row['seconds'] / 60:.1f} min" if "seconds" in row else "",
            f"{what} ({row['features']})" if "features" in row else what,
            f"`{row['command']}`",
        ]
        table.append(cells)

    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    lines.insert(1, "|---|---:|---:|---|---:|---:|---|---|")
    warning = ""
    if results["dataset"] == "synthetic":
        warning = "SYNTHETIC DATA: these are not CIFAR-10 numbers. "
    if args.limit:
        warning += f"ONLY {args.limit:,} IMAGES of each split: these numbers mean nothing."
    about = f"Images: {values_of(rows, 'provenance')}. Accuracies on the {args.split} split. "
    about += f"Seed: {values_of(rows, 'seed')}."
    versions = ", ".join(f"{package} {version}" for package, version in results["versions"].items())
    trained = {name: row for name, row in rows.items() if "epochs" in row}  # maps and CKA are float32 anyway
    machine = (
        f"Machine: {values_of(rows, 'device')}; precision: {values_of(trained, 'precision')}; {versions}."
    )
    parts = [f"# Results of {out.name}"]
    parts += [f"**{warning.strip()}**"] if warning else []
    parts += [about, machine, "\n".join(lines), NOTES]
    for name in FIGURES:
        if (out / "figures" / f"{name}.png").exists():
            parts.append(f"### {name}\n\n![{name}](figures/{name}.png)")
    vit.write_file(out / "report.md", ("\n\n".join(parts) + "\n").encode())
    for name, ours, theirs, control, *_ in table:
        print(f"{name:<24}{ours:>9}{theirs:>9}  {control}")
    print(f"{warning}\nthe table with its commands: {out / 'report.md'}; pictures: {out / 'figures'}")


def main() -> None:
    formatter, parents = argparse.RawDescriptionHelpFormatter, [vit.common_arguments()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, parents=parents)
    stages = {function.__name__: function for function in (maps, cka, figures, movie, report)}
    add = parser.add_argument
    add("what", nargs="+", choices=list(stages), help="one of these, or several, one after another")
    add("--before", help="maps, cka: checkpoint before fine-tuning (default: OUT/m_joint.pt)")
    add("--after", help="maps, cka: checkpoint after fine-tuning (default: OUT/finetune.pt)")

    def run(args: argparse.Namespace) -> None:
        """The stages that the command line names, one after another."""
        for name in args.what:
            stages[name](args)

    parser.set_defaults(run=run)
    vit.command(parser, data.source)


if __name__ == "__main__":
    main()
