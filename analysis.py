"""What was learned: similarity maps, CKA, every figure and the results table.

    maps       where in the image is CLS' content found? cosine of CLS with the patch tokens
    cka        how much does attention change CLS? linear CKA of the residual stream around each attention
    figures    draw every picture from the files that the stages left (seconds, no training)
    movie      similarity maps and nearest neighbours epoch by epoch, as a GIF
    report     write the results table, with its pictures, to report.md

Depends on vit.py and data.py: copy this file with those two. For CKA alone, StreamingCKA needs only torch.

    python analysis.py maps cka --before runs/mine/m.pt --after runs/mine/finetune.pt --out runs/mine
    python analysis.py figures --out runs/mine

Papers: Kornblith et al. 2019 (linear CKA), Song et al. 2012 (unbiased HSIC), Nguyen et al. 2021 (debiased CKA
of layers). Shape letters as in vit.py; also n images, L representations.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import pathlib
import statistics
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

import data
import vit

# ------------------------------------------------------------------------------------------------------------
# Similarity maps
# ------------------------------------------------------------------------------------------------------------


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
    return vit.Machine(args.device, "float32" if args.precision == "auto" else args.precision, args.seed)


def maps(args: argparse.Namespace) -> None:
    """Measure CLS-patch similarity in two encoders, --before and --after; keep some maps for the figure."""
    name = args.name or "maps"
    stored = vit.arrays_path(args, name)
    if stored.exists() and vit.measured(args, f"{name}_after", args.before, args.after):
        return
    machine = measuring_machine(args)
    images, labels = data.load(args.data, args.split, machine.device, args.limit)
    shown = torch.stack([(labels == k).nonzero()[0, 0] for k in labels.unique()])  # the first of each class
    arrays, rows = {"images": images[shown], "labels": labels[shown]}, {}
    for when, path in (("before", args.before), ("after", args.after)):
        encoder = vit.load_encoder(path).to(machine.device).eval()
        found = []
        for x in images.split(machine.eval_batch):
            with torch.no_grad(), machine.autocast():
                tokens = encoder(x.float() / 255)
            found.append(token_similarity(tokens.float()).cpu())
        similarity = torch.cat(found)  # [n, T, T]
        arrays[when], rows[when] = similarity[shown.cpu()], focus(similarity[:, 0, 1:])
    vit.write_arrays(stored, **arrays)  # before the rows: a row says that everything of it is there
    weights = vit.fingerprint(args.before, args.after)
    for when, row in rows.items():
        row["value"] = row.pop("entropy")
        vit.record(args, f"{name}_{when}", machine, data.source(args.data), weights=weights, **row)


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

    def add(self, *representations: Tensor) -> None:
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

    def result(self, debiased: bool = False) -> Tensor:
        """CKA of every pair: [L, L]; nan in the row and column of a representation that is the same for all
        images, or holds a nan. Raises ValueError with fewer than four images, for which the debiased estimate
        is not defined."""
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
            total = torch.stack([s[i] @ s[i] - zz[i][i].trace() for i in range(L)])  # [L], 1^T K~ 1

            def row_sums(i: int, j: int) -> Tensor:
                """1^T K~ L~ 1, []."""
                return s[i] @ zz[i][j] @ s[j] - az[j][i] @ s[i] - az[i][j] @ s[j] + aa[i, j]

            # hsic - aa: tr(K~ L~)
            hsic = hsic - aa + torch.outer(total, total) / ((n - 1) * (n - 2))
            hsic = hsic - 2 / (n - 2) * _pairs(L, row_sums)
        scale = hsic.diagonal().clamp_min(0).sqrt()  # [L]
        varies = scale > 1e-20 * n * self.largest.square()  # each against its own size: CKA ignores scale
        scale = torch.where(varies, scale, torch.nan)
        return hsic / torch.outer(scale, scale)


def _pairs(number: int, entry) -> Tensor:
    """The matrix [number, number] of entry(i, j)."""
    return torch.stack([torch.stack([entry(i, j) for j in range(number)]) for i in range(number)])


def cka(args: argparse.Namespace) -> None:
    """CKA of CLS between places within an encoder, for two encoders, --before and --after fine-tuning; the
    whole place-by-place matrix goes to the figure.

    The report compares CLS before and after the last self-attention block, which can be read in two ways:
    across the attention's residual sum (the row's value), or across the block with its MLP ("whole_block").
    """
    name = args.name or "cka"
    stored = vit.arrays_path(args, name)
    if stored.exists() and vit.measured(args, f"{name}_after", args.before, args.after):
        return
    machine = measuring_machine(args)
    images, _ = data.load(args.data, args.split, machine.device, args.limit)
    if len(images) < 4:
        sys.exit(f"CKA needs at least 4 images, not {len(images)}; choose a larger --limit")
    arrays = {"images": len(images)}
    for when, path in (("before", args.before), ("after", args.after)):
        encoder, streaming = vit.load_encoder(path).to(machine.device).eval(), StreamingCKA()
        for x in images.split(machine.eval_batch):
            trace = []
            with torch.no_grad(), machine.autocast():
                encoder(x.float() / 255, trace)
            stream = [trace[0]["before"]] + [block[k] for block in trace for k in ("attended", "after")]
            streaming.add(*(t[:, 0] for t in stream))  # CLS: [b, D] at 1 + 2 * depth places
        arrays[f"{when}_biased"] = streaming.result()  # [L, L]
        arrays[f"{when}_debiased"] = streaming.result(debiased=True)  # [L, L]
    vit.write_arrays(stored, **arrays)
    weights = vit.fingerprint(args.before, args.after)
    for when in ("before", "after"):
        plain, debiased = arrays[f"{when}_biased"], arrays[f"{when}_debiased"]
        row = {"value": plain[-3, -2].item(), "debiased": debiased[-3, -2].item()}
        row |= {"whole_block": plain[-3, -1].item(), "whole_block_debiased": debiased[-3, -1].item()}
        for steps, distance in (("attentions", 1), ("blocks", 2)):  # of every block
            values = debiased.diagonal(distance)[::2].tolist()
            row[steps] = [None if math.isnan(v) else v for v in values]  # JSON has no nan
        row |= {"images": len(images), "weights": weights}
        vit.record(args, f"{name}_{when}", machine, data.source(args.data), **row)


# ------------------------------------------------------------------------------------------------------------
# Drawing: a figure is boxes (Pillow images) in rows and columns, and `grid` puts them there
# ------------------------------------------------------------------------------------------------------------

Box = Image.Image
INK, GREY, LIGHT, PAPER = (30, 30, 36), (110, 110, 118), (226, 226, 230), (255, 255, 255)
# colours that colour-blind readers can tell apart (Okabe and Ito 2008), and two more
BLUE, ORANGE, GREEN, PINK = (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167)
COLOURS = [BLUE, ORANGE, GREEN, PINK, (230, 159, 0), (86, 180, 233), (90, 90, 90), (140, 86, 75)]
VIRIDIS = "440154 472c7a 3b518b 2c718e 21908d 27ad81 5cc863 aadc32 fde725"


def colour(x: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1], any shape, to viridis colours [..., 3] in 0..255."""
    anchors = np.array([list(bytes.fromhex(code)) for code in VIRIDIS.split()])  # [9, 3]
    at = np.clip(np.nan_to_num(x), 0, 1) * (len(anchors) - 1)
    low = np.minimum(at.astype(int), len(anchors) - 2)
    return anchors[low] + (at - low)[..., None] * (anchors[low + 1] - anchors[low])


def pixels(images: Tensor | np.ndarray) -> np.ndarray:
    """[..., 3, S, S], uint8 or floats in [0, 1] -> [..., S, S, 3] in 0..255."""
    images = np.asarray(images)
    scale = 1 if images.dtype == np.uint8 else 255
    return np.moveaxis(images.astype(float) * scale, -3, -1)


def picture(array: np.ndarray, size: int, frame: tuple | None = None, smooth: bool = False) -> Box:
    """An array [S, S, 3] of 0..255 as a square box of `size` pixels, in a frame of that colour."""
    box = Image.fromarray(np.clip(array, 0, 255).astype(np.uint8))
    inner = size - 6 if frame else size
    box = box.resize((inner, inner), Image.BICUBIC if smooth else Image.NEAREST)
    return ImageOps.expand(box, 3, frame) if frame else box


def text(words: str, size: int = 13, ink=INK, width: int | None = None, align="l", paper=PAPER) -> Box:
    """Words as a box. With a `width` in pixels they are wrapped to it; align: l left, m middle, r right."""
    font, lines = ImageFont.load_default(size), []
    for paragraph in words.split("\n"):
        lines.append("")
        for word in paragraph.split(" "):
            longer = f"{lines[-1]} {word}" if lines[-1] else word
            if width and lines[-1] and font.getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    width = width or math.ceil(max(font.getlength(line) for line in lines)) + 1
    height = round(1.35 * size)
    box = Image.new("RGB", (width, height * len(lines)), paper)
    for k, line in enumerate(lines):
        x = {"l": 0, "m": width / 2, "r": width}[align]
        ImageDraw.Draw(box).text((x, height * k), line, fill=ink, font=font, anchor=f"{align}a")
    return box


def answer(words: str, right: bool, width: int | None = None) -> Box:
    """What a model said: blue if right, else orange and with an x, for who can't tell the two apart."""
    return text(words if right else f"x {words}", 13, BLUE if right else ORANGE, width)


def grid(rows: list[list[Box | None]], gap: int = 8, x: float = 0.5, y: float = 0.5) -> Box:
    """Boxes in rows and columns as one box; x, y: where in its cell a box lies, 0 left or top, 1 right or
    bottom. None leaves a cell empty."""
    columns = max(map(len, rows))
    widths, heights = [0] * columns, [0] * len(rows)
    for r, row in enumerate(rows):
        for c, box in enumerate(row):
            if box:
                widths[c], heights[r] = max(widths[c], box.width), max(heights[r], box.height)
    whole = Image.new("RGB", (sum(widths) + gap * (columns - 1), sum(heights) + gap * (len(rows) - 1)), PAPER)
    for r, row in enumerate(rows):
        for c, box in enumerate(row):
            if box:
                left, top = sum(widths[:c]) + gap * c, sum(heights[:r]) + gap * r
                left += round(x * (widths[c] - box.width))
                whole.paste(box, (left, top + round(y * (heights[r] - box.height))))
    return whole


def page(title: str, caption: str, body: Box, footer: str) -> Box:
    """A whole figure: what it is, how to read it, the figure itself, where its pixels come from."""
    width = max(body.width, 760)
    paragraphs = [" ".join(paragraph.split()) for paragraph in caption.split("\n\n")]
    head, foot = text("\n".join(paragraphs), 14, GREY, width), text(footer, 12, GREY, width)
    return ImageOps.expand(grid([[text(title, 22)], [head], [body], [foot]], 14, x=0), 24, PAPER)


def scale_bar(low: float, high: float, label: str) -> Box:
    """The legend of `colour`."""
    bar = Image.fromarray(colour(np.linspace(0, 1, 240)[None].repeat(12, 0)).astype(np.uint8))
    return grid([[text(f"{low:.2f}", 12), bar, text(f"{high:.2f}   {label}", 12)]])


def round_ticks(low: float, high: float, most: int = 6) -> np.ndarray:
    """Up to `most` round numbers, 1, 2 or 5 times a power of ten apart, between low and high."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


def chart(
    title: str, lines: dict[str, list], below="epoch", percent=False, places=None, inks=None, span=None
) -> Box:
    """Curves over 1, 2, 3, ... with axes and a legend. places: labels of these numbers; inks: line -> colour;
    span: (number of places, lowest, highest value), where it shall not be as the lines need it."""
    inks = inks or dict(zip(lines, COLOURS))
    values = [value for line in lines.values() for value in line]
    margin = max(0.05 * (max(values) - min(values)), 0.01)
    end, low, high = span or (max(map(len, lines.values())), min(values) - margin, max(values) + margin)
    width, height, left, font = 300, 180, 56, ImageFont.load_default(12)
    box = Image.new("RGB", (left + width + 20, height + 30), PAPER)
    draw = ImageDraw.Draw(box)

    def at(place: float, value: float) -> tuple[float, float]:
        """Where in the box a point lies."""
        return left + width * (place - 1) / max(1, end - 1), 6 + height * (high - value) / (high - low)

    for value in round_ticks(low, high):
        y = at(1, value)[1]
        draw.line([(left, y), (left + width, y)], fill=LIGHT)
        label = f"{100 * value:g} %" if percent else f"{value:g}"
        draw.text((left - 6, y), label, fill=GREY, font=font, anchor="rm")
    if places is None:
        whole = [round(place) for place in round_ticks(1, max(end, 2), 7) if place % 1 == 0]
        places = {place: str(place) for place in whole if place <= end}
    for place, label in places.items():
        draw.text((at(place, low)[0], height + 12), label, fill=GREY, font=font, anchor="ma")
    for name, line in lines.items():
        points = [at(k + 1, value) for k, value in enumerate(line)]
        draw.line(points, fill=inks[name], width=2)
        x, y = points[-1]
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=inks[name])
    legend = grid([[text(name, ink=inks[name])] for name in lines], 2, x=0)
    return grid([[text(title, 15), None], [box, legend], [text(below, 12, GREY), None]], 4)


def bars(rows: list[tuple], low: float, high: float) -> Box:
    """Horizontal bars from `low` on; rows: (label, value, text behind the bar, colour)."""
    labels = max(text(label).width for label, *_ in rows)
    lines = []
    for label, value, behind, ink in rows:
        bar = Image.new("RGB", (max(1, round(380 * (value - low) / (high - low))), 24), ink)
        lines.append([text(label, width=labels, align="r"), grid([[bar, text(behind)]])])
    return grid(lines, 10, x=0)


def matrix(values: np.ndarray, labels: list[str], cell: int, high: float, framed=()) -> Box:
    """A square matrix in colour from 0 to `high`, entries in the cells; framed: cells (i, j) to point out."""
    rows = []
    for i, row in enumerate(values):
        rows.append([text(labels[i], 12)])
        for j, value in enumerate(row):
            shade = LIGHT if np.isnan(value) else tuple(colour(np.array(value / high)).astype(int))
            box = Image.new("RGB", (cell, cell), shade)
            draw = ImageDraw.Draw(box)
            if not np.isnan(value):
                entry = f"{value:.0f}" if high > 1 else f"{value:.2f}".replace("0.", ".")
                ink, font = INK if value > 0.6 * high else PAPER, ImageFont.load_default(11)
                draw.text((cell / 2, cell / 2), entry, fill=ink, font=font, anchor="mm")
            if (i, j) in framed:
                draw.rectangle([0, 0, cell - 1, cell - 1], outline=ORANGE, width=3)
            rows[-1].append(box)
    return grid([*rows, [None, *(text(label, 12) for label in labels)]], 1)


# ------------------------------------------------------------------------------------------------------------
# The figures: each function returns a title, a caption that says how to read it, and the body
# ------------------------------------------------------------------------------------------------------------


def task_examples(args: argparse.Namespace, patch: int) -> tuple[Tensor, ...]:
    """Two images for each of the four angles, 0 to 270 degrees twice over, augmented as Model M sees them:
    images, augmented images [8, 3, S, S] each, masked, turned patches [8, M] each, angles [8]."""
    images, _ = data.load(args.data, "validation", limit=200)
    images = images.float() / 255
    quarter = (images.shape[-1] // patch) ** 2 // 4
    drawn = data.patch_augment(images, torch.Generator().manual_seed(args.seed), patch, quarter, quarter)
    angle = drawn[-1]
    first_and_last = [(angle == k).nonzero()[[0, -1], 0] for k in range(4)]
    chosen = torch.stack(first_and_last, dim=1).flatten()  # [2, 4] -> [8]
    return tuple(x[chosen] for x in (images, *drawn))


def outlined(image: np.ndarray, size: int, patches: dict[int, tuple]) -> Box:
    """An image [S, S, 3] of 16 patches; patches: index -> the colour in which it is framed and numbered."""
    box, side = picture(image, size), size // 4
    draw = ImageDraw.Draw(box)
    for p, ink in patches.items():
        x, y = side * (p % 4), side * (p // 4)
        draw.rectangle([x, y, x + side - 1, y + side - 1], outline=ink, width=3)
        draw.rectangle([x, y, x + 20, y + 16], fill=ink)
        draw.text((x + 10, y + 9), str(p), fill=PAPER, font=ImageFont.load_default(13), anchor="mm")
    return box


def draw_patches(args: argparse.Namespace):
    """The report's first figure: set A, and what becomes of its patches."""
    images, augmented, masked, turned, angle = task_examples(args, 8)
    rows = [[text("the image", 14), text("set A, patches by number", 14), text("what Model M sees", 14)]]
    for i in range(4):
        black, moved = masked[i].tolist(), turned[i].tolist()
        about = [text(f"blacked out: {black}", 14, ORANGE), text(f"turned: {moved}", 14, BLUE)]
        about += [text(f"by {90 * angle[i].item()}°", 14, BLUE)]
        inks = dict.fromkeys(black, ORANGE) | dict.fromkeys(moved, BLUE)
        image = pixels(images[i])
        boxes = [picture(image, 160), outlined(image, 160, inks), picture(pixels(augmented[i]), 160)]
        rows.append([*boxes, grid([[line] for line in about], x=0)])
    caption = """An image is 16 patches of 8x8 pixels. Eight at random are set A: four are blacked out,
    four turned by one angle, counter-clockwise: 0°, 90°, 180° or 270°. Model M names the angle and
    repaints the black patches, so it needs no labels."""
    return "Patch augmentation", caption, grid(rows, 16)


def draw_reconstruction(args: argparse.Namespace):
    """What Model M answers: the black patches repainted, and the angle."""
    state = vit.read_checkpoint(pathlib.Path(args.out) / "m.pt")
    model = vit.ModelM(vit.ViT(**state["config"]), projector="projector.0.weight" in state["model"]).eval()
    model.load_state_dict(state["model"])
    patch = state["config"]["patch_size"]
    images, augmented, masked, _, angle = task_examples(args, patch)
    with torch.no_grad():
        logits, painted, _ = model(augmented, masked)
    patches = data.patchify(augmented, patch)  # [8, N, 3, P, P]
    painted = painted.view(*masked.shape, *patches.shape[2:])  # [8, M, 3, P, P]
    patches[torch.arange(len(images))[:, None], masked] = painted * 0.25 + 0.5  # vit.standardise undone
    columns = [
        [text(words, 13) for words in ("what M sees", "M repaints", "the image", "turned by", "M says")]
    ]
    for i, pictures in enumerate(zip(pixels(augmented), pixels(data.unpatchify(patches)), pixels(images))):
        guess = logits[i].argmax()
        said = [text(f"{90 * angle[i].item()}°"), answer(f"{90 * guess.item()}°", bool(guess == angle[i]))]
        columns.append([*(picture(array, 106) for array in pictures), *said])
    caption = """Four patches black and four turned; the black ones as Model M paints them (it minimises
    the squared error, so it paints the average of what could be there: blur); the image; by how much the
    patches are turned, and what M says (orange with an x: wrong)."""
    return "Model M at work", caption, grid(list(zip(*columns)))


def draw_maps(args: argparse.Namespace):
    """CLS-patch similarity of some images, before and after fine-tuning, in one colour scale."""
    stored, rows = np.load(vit.arrays_path(args, "maps")), rows_of(args)
    names, side = data.source(args.data).classes, math.isqrt(stored["before"].shape[1] - 1)
    cosines = {when: stored[when][:, 0, 1:].reshape(-1, side, side) for when in ("before", "after")}
    low, high = min(map(np.min, cosines.values())), max(map(np.max, cosines.values()))
    columns = [[text(words) for words in ("", "image", "before", "lit by it", "after", "lit by it")]]
    for i, image in enumerate(pixels(stored["images"])):
        column = [text(names[stored["labels"][i]]), picture(image, 84)]
        for when in ("before", "after"):
            small = Image.fromarray(cosines[when][i].astype(np.float32))
            large = np.asarray(small.resize((32, 32), Image.BILINEAR))  # the report's 4x4 -> 32x32
            light = (large - large.min()) / (large.max() - large.min() + 1e-9)
            column.append(picture(colour((large - low) / (high - low)), 84, smooth=True))
            column.append(picture(image * (0.1 + 0.9 * light[..., None]), 84))
        columns.append(column)
    body = grid([[grid(list(zip(*columns)))], [scale_bar(low, high, "cosine of CLS and patch")]], 14)
    caption = """Cosine of the CLS token with each patch token, before and after fine-tuning, one colour
    scale for all maps; under each map the image, brightest where this map is highest."""
    for when in cosines:
        row = rows[f"maps_{when}"]
        caption += f"""\n\n{when.capitalize()} fine-tuning, mean of the {row["split"]} split: entropy
        {row["value"]:.3f}, best quarter {row["best_quarter"]:.3f}, peak {row["peak"]:.3f}."""
    caption += """\n\nEntropy: of the map, shifted to a minimum of 0 and scaled to a sum of 1 (1: spread
    evenly, 0: all on one patch). Best quarter: what of that sum the strongest quarter of the patches
    holds (0.25: spread evenly). Peak: the largest cosine."""
    return "Where in the image is CLS' content?", caption, body


def draw_tokens(args: argparse.Namespace):
    """The whole token-by-token similarity matrix of three images."""
    stored, names = np.load(vit.arrays_path(args, "maps")), data.source(args.data).classes
    low, labels = min(stored[when].min() for when in ("before", "after")), stored["labels"][:3]
    size = 15 * stored["before"].shape[1]
    rows = [[None, *(text(names[label], 14) for label in labels)]]
    for when in ("before", "after"):
        row = [text(f"{when}\nfine-tuning", 14)]
        for similarity in stored[when][:3]:
            box = picture(colour((similarity - low) / (1 - low)), size)
            draw = ImageDraw.Draw(box)  # CLS is set apart from the patches
            draw.line([(15, 0), (15, size)], fill=PAPER, width=2)
            draw.line([(0, 15), (size, 15)], fill=PAPER, width=2)
            row.append(grid([[text("CLS, then the patches row by row", 11, GREY)], [box]], 2, x=0))
        rows.append(row)
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
    boxes = []
    for when in ("before", "after"):
        row = rows[f"cka_{when}"]
        head = f"{when} fine-tuning. Last attention {row['value']:.4f} (debiased {row['debiased']:.4f}), "
        head += f"last block {row['whole_block']:.4f} (debiased {row['whole_block_debiased']:.4f})"
        framed = [(places - 3, places - 2), (places - 3, places - 1)]
        table = matrix(stored[f"{when}_biased"], labels, 480 // places, 1.0, framed)
        boxes.append(grid([[text(head, 13, width=table.width)], [table]]))
    number = f"{stored['images']:,} images" if "images" in stored else "all images"
    caption = f"""Plain (not debiased) linear CKA, {number} of the {args.split} split, of the residual
    stream after each attention (a1, a2, ...) and each MLP (m1, m2, ...). 1: the same similarity structure
    over images, 0: none in common. Framed: the two ways to read the report's "before and after the last
    attention block", across the last attention and across the last block. Grey: CLS enters the first
    block the same for every image, so there is nothing to compare."""
    body = grid([[grid([boxes], 24)], [scale_bar(0, 1, "CKA")]], 14)
    return "Linear CKA of the CLS token along the network", caption, body


# run -> its loss; losses of the same name can be compared, and share a panel
LOSSES = {"infonce": "InfoNCE", "infonce_longer": "InfoNCE"}
LOSSES |= {"m": "angle + squared error", "m_infonce": "angle + squared error"}
LOSSES |= {"m_joint": "angle + squared error + InfoNCE", "finetune": "cross-entropy of classes"}
LOSSES |= dict.fromkeys(["finetune_scratch", "finetune_infonce_longer"], "cross-entropy of classes")
METRICS = {"match": "partner found", "angle": "angle named", "mse": "squared error"}
METRICS |= {"train": "accuracy, train", "validation": "accuracy, validation"}


def history_of(args: argparse.Namespace, name: str) -> dict[str, list[float]]:
    """Metric -> its mean in each epoch of a run; empty where it has no checkpoint."""
    path = pathlib.Path(args.out) / f"{name}.pt"
    return vit.read_checkpoint(path)["history"] if path.exists() else {}


def draw_curves(args: argparse.Namespace):
    """Every metric that the image stages noted, epoch by epoch."""
    panels = {}  # title -> run -> its line
    for name, loss in LOSSES.items():
        for metric, line in history_of(args, name).items():
            title = f"loss: {loss}" if metric == "loss" else METRICS[metric]
            panels.setdefault(title, {})[name] = line
    if not panels:
        raise FileNotFoundError("no checkpoint")
    inks = dict(zip(LOSSES, COLOURS))
    boxes = []
    for title, lines in panels.items():
        is_share = not title.startswith(("loss", "squared"))
        boxes.append(chart(title, lines, percent=is_share, inks=inks))
    caption = """Mean of each epoch, on augmented training images (validation: held-out images as they
    are). Partner found: views whose nearest neighbour in the batch is the other view of their image.
    Angle named: images. Squared error: of the blacked-out patches, in standardised pixels.
    infonce_longer: InfoNCE continued; m: Model M from scratch; m_infonce: continued from InfoNCE;
    m_joint: that, with InfoNCE beside it; finetune: from m_joint."""
    body = grid([boxes[k : k + 2] for k in range(0, len(boxes), 2)], 28, x=0)
    return "Learning curves", caption, body


def draw_classes(args: argparse.Namespace):
    """Confusion matrix and accuracy per class of the fine-tuned model."""
    stored, names = np.load(vit.arrays_path(args, "finetune")), data.source(args.data).classes
    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, (stored["truth"], stored["guess"]), 1)
    percent = 100 * counts / counts.sum(axis=1, keepdims=True).clip(1)
    table = matrix(percent, names, 68, 100.0)
    table = grid([[None, text("the model's answer", 14)], [text("true\nclass", 14), table]])
    caption = f"""In percent of the true class, {int(counts.sum()):,} images of the {args.split} split. On the
    diagonal: the accuracy by class."""
    return "Which classes does the fine-tuned model confuse?", caption, table


def draw_clips(args: argparse.Namespace):
    """A clip of each class: its frames, how the temporal CLS weighs them, what each frame says by itself,
    what the clip says."""
    stored, names = np.load(vit.arrays_path(args, "video_encoder_1")), data.source(args.data).classes
    weights = stored["weights"][:, 1:]  # [K, F]; the rest of the attention stays on CLS itself
    top, frames = weights.max(), weights.shape[1]
    even, full = round(34 / (frames + 1) / top), 34
    rows = [[text("true class", 14), text("attention", 11, GREY), *[None] * frames, text("answer", 14)]]
    for k, clip in enumerate(pixels(stored["images"])):
        truth, guess = stored["labels"][k], stored["guess"][k]
        scale = grid([[text(f"{top:.2f}", 10, GREY)], [text("0", 10, GREY)]], full - 26, x=1)
        row = [text(names[truth], 14), grid([[scale], [Image.new("RGB", (1, 46), PAPER)]], 4)]
        for f, frame in enumerate(clip):
            right = stored["each"][k, f] == truth
            bar = Image.new("RGB", (46, full), PAPER)
            draw = ImageDraw.Draw(bar)
            draw.rectangle([12, full - round(full * weights[k, f] / top), 33, full], fill=GREY)
            draw.line([(0, full - even), (46, full - even)], fill=INK)
            box = picture(frame, 46, BLUE if right else ORANGE)
            if not right:  # told by more than its colour
                ImageDraw.Draw(box).rectangle([0, 37, 45, 45], fill=ORANGE)
            row.append(grid([[bar], [box]], 4))
        rows.append([*row, answer(names[guess], bool(guess == truth))])
    caption = f"""Bar over a frame: attention from the temporal CLS token (one block, mean of the heads);
    the line is an even share, 1/{frames + 1} = {1 / (frames + 1):.3f}. Frame blue: this image by itself
    would be named right; orange, with a thick lower edge: wrong. At the right the answer to the whole
    clip. The clips are put together by their labels."""
    title = f"Pseudo-videos: {frames} images of one class, and where the temporal CLS looks"
    return title, caption, grid(rows, 6)


VIDEOS = ["encoder_1", "encoder_2", "divided_1", "divided_2", "report_1", "report_2", "unordered", "repeats"]


def draw_video(args: argparse.Namespace):
    """Accuracy over the number of different images in a clip; learning curves of one block against two."""
    found = rows_of(args)
    rows = {name: found[f"video_{name}"] for name in VIDEOS if f"video_{name}" in found}
    if not rows:
        raise FileNotFoundError("no row of video.py")
    numbers = list(max((row["different"] for row in rows.values()), key=len))
    lines = {name: list(row["different"].values()) for name, row in rows.items()}
    places = {k + 1: number for k, number in enumerate(numbers)}
    inks = dict(zip(VIDEOS, COLOURS))
    boxes = [chart("accuracy by different images", lines, "different images in the clip", True, places, inks)]
    lines = {}
    for name in ("encoder_1", "encoder_2"):
        history = history_of(args, f"video_{name}")
        for metric in ("validation", "train"):
            if metric in history:
                lines[f"{name}, {metric}"] = history[metric]
    if lines:
        boxes.append(chart("accuracy while training", lines, percent=True))
    caption = """Left: accuracy over the number of different images of one class that fill the 16 frames.
    1: a static video, the test that counts; more: put together by label, so easier. Right: epoch by
    epoch, static videos of the validation split, and training clips (augmented, as trained). encoder:
    factorised encoder; divided: factorised self-attention; report: trained as in the report; unordered:
    without temporal positions; repeats: without the loss of every image by itself; 1, 2: temporal blocks."""
    return "Pseudo-videos: what more images bring, and one block against two", caption, grid([boxes], 28, y=0)


def captioner_of(args: argparse.Namespace) -> tuple[str, str]:
    """Whose captions the pictures show, by its short name and in words: BLIP's where this run used them."""
    blip = "fusion_blip" in rows_of(args)
    return ("blip", "the real BLIP") if blip else ("tiny", "a small captioner trained here")


def draw_captions(args: argparse.Namespace):
    """Images with their captions, and what the fusion model and the control without text answer."""
    (who, name), names = captioner_of(args), data.source(args.data).classes
    both = np.load(vit.arrays_path(args, f"fusion_{who}"))
    alone = np.load(vit.arrays_path(args, f"fusion_{who}_image_only"))
    truth = both["labels"]
    right, before = both["guess"] == truth, alone["guess"] == truth
    cells = []
    for image, caption, k in zip(pixels(both["images"]), both["captions"], both["shown"]):
        lines = [text(f"it is: {names[truth[k]]}")]
        lines.append(answer(f"without: {names[alone['guess'][k]]}", before[k], 200))
        lines.append(answer(f"with: {names[both['guess'][k]]}", right[k]))
        top = grid([[picture(image, 84), text(caption, 13, width=108)]], y=0)
        cells.append(grid([[top], *([line] for line in lines)], 3, x=0))
    caption = f"""Beside each image its caption; below the true class, then the answer without text (the
    control that never saw a caption) and with it; orange with an x: wrong. Of {len(truth):,} images
    {np.sum(right & ~before):,} are right only with captions, {np.sum(before & ~right):,} only without.
    Shown: the first two of each class."""
    body = grid([cells[k : k + 5] for k in range(0, len(cells), 5)], 18, x=0, y=0)
    return f"Captions by {name}, and what they change", caption, body


def draw_words(args: argparse.Namespace):
    """How the image's query shares its attention among the words of the caption."""
    (who, name), names = captioner_of(args), data.source(args.data).classes
    stored = np.load(vit.arrays_path(args, f"fusion_{who}_tokens"))
    high = stored["weights"].max()
    rows = [[None, text("true class", 14), text("the caption, token by token", 14)]]
    for i in range(0, len(stored["shown"]), 2):
        boxes = []
        for word, weight in zip(stored["words"][i].split(" "), stored["weights"][i]):
            paper = tuple(int(255 - (255 - c) * weight / high) for c in BLUE)
            width = max(52, 9 * len(word) + 14)
            ink = PAPER if weight > 0.6 * high else INK
            boxes.append(text(f"{word}\n{weight:.2f}", 13, ink, width, "m", paper))
        truth = names[stored["labels"][stored["shown"][i]]]
        rows.append([picture(pixels(stored["images"][i]), 54), text(truth, 14), grid([boxes], 4)])
    caption = """Attention of the temporal CLS over the tokens of the caption, the number in each and the
    bluer the more (mean of the heads; each row adds up to 1). Tokens are CLIP's pieces of words, between
    <start> and <end>. CLIP reads from left to right, so a token's state knows all words before it:
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
            ink = BLUE if fusion else GREY
            rows.append((what, statistics.mean(values), in_words(row, *values), ink))
    if not rows:
        raise FileNotFoundError("no row of multimodal.py")
    low = math.floor(20 * min(value for _, value, _, _ in rows) - 0.5) / 20
    caption = f"""Accuracy on static videos of the {args.split} split; the bars start at {100 * low:.0f}
    %. Blue: the image and its caption; grey: controls, trained in the same way (the first not at all). ±:
    standard deviation over seeds, where there are several. Captions help if fusion is above both image
    only and text only; they merely answer if it is no better than reading the class off the caption."""
    body = bars(rows, max(0, low), max(value for _, value, _, _ in rows))
    return f"Does the caption help, or merely answer? Captions by {name}", caption, body


FIGURES = [draw_patches, draw_reconstruction, draw_maps, draw_tokens, draw_cka, draw_curves, draw_classes]
FIGURES += [draw_clips, draw_video, draw_captions, draw_words, draw_controls]
FIGURES = {draw.__name__.removeprefix("draw_"): draw for draw in FIGURES}


def figures(args: argparse.Namespace) -> None:
    """Draw every figure whose inputs are there into out/figures."""
    out = pathlib.Path(args.out)
    seed = vit.read_results(out).get("seed", args.seed)
    footer = f"{data.source(args.data).provenance}; run {out.name}, seed {seed}"
    for name, draw in FIGURES.items():
        try:
            drawn = page(*draw(args), footer)
        except (FileNotFoundError, KeyError, SystemExit) as missing:
            print(f"{name}: not drawn, what it needs is not there: {missing}")
            continue
        buffer = io.BytesIO()
        drawn.save(buffer, "PNG", optimize=True)
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


def nearest_neighbours(queries: Tensor, keys: Tensor, labels: Tensor, k: int = 20) -> Tensor:
    """The class that most of the k keys of highest cosine have: queries [n, D], keys and their labels [m, D],
    [m] -> [n]. It asks what looks alike to the encoder, and needs no training (Wu et al. 2018, section 3.4,
    here without weights)."""
    unit = torch.nn.functional.normalize
    cosines = unit(queries, dim=1) @ unit(keys, dim=1).T  # [n, m]
    nearest = cosines.topk(min(k, len(keys)), dim=1).indices  # [n, k]
    votes = torch.nn.functional.one_hot(labels[nearest]).sum(dim=1)  # [n, k, K] -> [n, K]
    return votes.argmax(dim=1)  # [n]


def scenes_of(out: pathlib.Path) -> list[tuple[str, pathlib.Path | None]]:
    """What the film shows: a title and a kept checkpoint each, of each training eight at most."""
    scenes = [("before any training", None)]
    for name, what in FILM.items():
        kept = sorted(out.glob(f"{name}-epoch*.pt"), key=lambda path: int(path.stem.split("epoch")[1]))
        for i in sorted({round(i) for i in np.linspace(0, len(kept) - 1, min(8, len(kept)))}):
            epoch = kept[i].stem.split("epoch")[1]
            scenes.append((f"{what}, epoch {epoch} of {len(kept)}", kept[i]))
    return scenes


def cls_of(encoder: vit.ViT, images: Tensor, machine: vit.Machine) -> Tensor:
    """The CLS tokens [n, D], float32, of uint8 images [n, 3, S, S]."""
    with torch.no_grad(), machine.autocast():
        return torch.cat([encoder(x.float() / 255)[:, 0].float() for x in images.split(machine.eval_batch)])


def movie(args: argparse.Namespace) -> None:
    """Draw maps and nearest neighbours, epoch by epoch, into figures/learning.gif (needs --keep-epochs)."""
    target, scenes = pathlib.Path(args.out) / "figures" / "learning.gif", scenes_of(pathlib.Path(args.out))
    if len(scenes) == 1:
        return print(f"{target}: not drawn; `python ssl.py pretrain ... --keep-epochs` keeps what it shows")
    made_from = vit.fingerprint(__file__, *(path for _, path in scenes[1:]))
    if target.exists() and Image.open(target).info.get("comment") == made_from.encode():
        return print(f"{target}: drawn before", flush=True)

    machine, limit = vit.Machine(args.device, args.precision, args.seed), min(args.limit or 5_000, 5_000)
    train, train_labels = data.load(args.data, "train", machine.device, limit)
    images, truth = data.load(args.data, "validation", machine.device, limit)
    # the second image of each class, or the only one
    shown = torch.stack([(truth == k).nonzero()[:2][-1, 0] for k in truth.unique()])
    cosines, answers, right = [], [], []
    for what, path in scenes:
        encoder = vit.load_encoder(path) if path else vit.make_encoder(None, args.patch, args.dim, args.stem)
        encoder.to(machine.device).eval()
        queries, keys = cls_of(encoder, images, machine), cls_of(encoder, train, machine)
        guess = nearest_neighbours(queries, keys, train_labels)
        with torch.no_grad(), machine.autocast():
            tokens = encoder(images[shown].float() / 255).float()  # [K, T, D]
        cosines.append(token_similarity(tokens)[:, 0, 1:].cpu().numpy())  # [K, N]
        answers.append(guess[shown].tolist())
        right.append((guess == truth).float().mean().item())
        print(f"{what}: nearest neighbours are right for {100 * right[-1]:.2f} %", flush=True)

    source, side = data.source(args.data), math.isqrt(cosines[0].shape[1])
    low, high = min(map(np.min, cosines)), max(map(np.max, cosines))
    caption = f"""Validation images; below each the cosine of CLS with every patch (yellow: high) and the
    class of most of its 20 nearest neighbours among {len(train):,} training images (orange with an x:
    wrong; the true class below it). The curve: how often that is right for {len(images):,} images."""
    frames = []
    for f, (what, _) in enumerate(scenes):
        columns = []
        for i, image in enumerate(pixels(images[shown].cpu())):
            heat = colour(((cosines[f][i] - low) / (high - low)).reshape(side, side))
            label, guess = truth[shown[i]].item(), answers[f][i]
            below = text(f"({source.classes[label]})" if guess != label else " ", 12, GREY)
            said = answer(source.classes[guess], guess == label)
            columns.append([picture(image, 80), picture(heat, 80), said, below])
        span = (len(scenes), min(right) - 0.01, max(right) + 0.01)
        curve = chart("nearest neighbours right", {"": right[: f + 1]}, "scene", True, span=span)
        body = grid([[grid(list(zip(*columns)))], [curve]], 14)
        frames.append(page(what, caption, body, f"{source.provenance}; run {target.parent.parent.name}"))
    every = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames]))
    palette = every.quantize(200)  # one for all frames, so that what stands still costs nothing
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    buffer, times = io.BytesIO(), [900] * len(others) + [3000]  # in milliseconds
    comment = made_from.encode()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=times, loop=0, comment=comment)
    vit.write_file(target, buffer.getvalue())
    print(f"drew {target}, {len(frames)} frames, {len(buffer.getvalue()) / 1000:.0f} kB", flush=True)


# ------------------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------------------


def language_rows(who: str) -> dict[str, tuple]:
    """multimodal.py's part of TABLE, for captions by "tiny" or "blip"."""
    fusion, by = f"fusion_{who}", f"{who} captions"
    return {
        f"captions_{who}": (f"{by}: class named in the caption, no training",),
        f"{fusion}_text_only": (f"{by}: text only", f"captions_{who}"),
        f"{fusion}_image_only": (f"{by}: image only, without the cross-attention", "video_encoder_2"),
        fusion: (f"{by}: fusion, two blocks", f"{fusion}_image_only"),
        f"{fusion}_1": (f"{by}: fusion, one block", fusion),
        f"{fusion}_tokens": (f"{by}: fusion, attention over words", fusion),
        f"{fusion}_shuffled": (f"{by}: fusion, every caption from another image", f"{fusion}_image_only"),
        f"{fusion}_seen": (f"{by} from a captioner that saw the labels: fusion", fusion),
    }


# row of results.json -> what it is; then the row it has to beat to mean anything (the first that is there)
TABLE = {
    "pixels_probe": ("linear probe of raw pixels",),
    "untrained_probe": ("linear probe of an untrained encoder",),
    "infonce_probe": ("linear probe after InfoNCE", "untrained_probe"),
    "infonce_longer_probe": ("linear probe after InfoNCE, as long as m_joint", "infonce_probe"),
    "m_probe": ("linear probe after Model M, from scratch", "untrained_probe"),
    "m_infonce_probe": ("linear probe after Model M, continued from InfoNCE", "infonce_probe"),
    "m_joint_probe": ("linear probe after Model M with InfoNCE", "infonce_longer_probe", "infonce_probe"),
    "m_best_probe": ("the best of the Model M probes by validation", "untrained_probe"),
    "finetune_scratch": ("trained on labels from scratch",),
    "finetune_infonce_longer": ("fine-tuned after InfoNCE, as long as m_joint", "finetune_scratch"),
    "finetune": ("fine-tuned after Model M with InfoNCE", "finetune_infonce_longer", "finetune_scratch"),
    "video_encoder_1": ("video, factorised encoder, one block", "finetune"),
    "video_encoder_2": ("video, factorised encoder, two blocks", "video_encoder_1"),
    "video_divided_1": ("video, factorised self-attention, one block", "video_encoder_1"),
    "video_divided_2": ("video, factorised self-attention, two blocks", "video_divided_1"),
    "video_encoder_1_probe": ("linear probe of the image encoder after video training", "m_joint_probe"),
    "video_unordered": ("video, one block, without temporal positions", "video_encoder_1"),
    "video_report_1": ("video, the report's training, one block",),
    "video_report_1_probe": ("linear probe of its image encoder", "m_joint_probe"),
    "video_report_2": ("video, the report's training, two blocks", "video_report_1"),
    "video_random": ("video, 10 clips a step instead of 1, 10 times the learning rate", "video_report_1"),
    "video_balanced": ("video, and every class once a step", "video_random"),
    "video_repeats": ("video, and 1 to 16 different images a clip", "video_balanced"),
    **language_rows("tiny"),
    **language_rows("blip"),
    "cka_before": ("CKA of CLS across the last attention, before fine-tuning",),
    "cka_after": ("CKA of CLS across the last attention, after fine-tuning", "cka_before"),
    "maps_before": ("entropy of CLS-patch maps, before fine-tuning",),
    "maps_after": ("entropy of CLS-patch maps, after fine-tuning", "maps_before"),
}
REPORTED = {"cka_before": 0.8698, "cka_after": 0.7353}  # by the coursework report


NOTES = """Time: training and evaluating what the row shows, without the stage that it starts from; a probe's
includes the training of the encoder that it probes. Which feature a probe reads is chosen on the validation
split. Tiny captions are not BLIP's, which the report used: a small captioner of the same library class,
trained here on the training labels, wrote them; they hold no knowledge from outside."""


def rows_of(args: argparse.Namespace) -> dict[str, dict]:
    """The rows measured on --split, by their plain names."""
    rows = vit.read_results(args.out)["rows"].items()
    return {name.removesuffix(f"_{args.split}"): row for name, row in rows if row["split"] == args.split}


def over_seeds(args: argparse.Namespace, name: str) -> list[float]:
    """A row's value in this run, and in those beside it of other seeds (OUT-seed1, OUT-seed2, ...)."""
    out = pathlib.Path(args.out)
    found = []
    for folder in (out, *sorted(out.parent.glob(f"{out.name}-seed*"))):
        row = vit.read_results(folder)["rows"].get(vit.row_name(args, name), {})
        found += [row["value"]] if "value" in row else []
    return found


def in_words(name: str, *values: float) -> str:
    """A row's number as tables have it: accuracies in percent, CKA and entropies plain; of several seeds the
    mean and standard deviation."""
    scale, digits, unit = (1, 4, "") if name.startswith(("cka", "maps")) else (100, 2, " %")
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else ""
    return f"{scale * statistics.mean(values):.{digits}f}{spread}{unit}"


def report(args: argparse.Namespace) -> None:
    """Write out/report.md from results.json, and print its table; note there which Model M is best."""
    results, out = vit.read_results(args.out), pathlib.Path(args.out)
    rows = rows_of(args)
    if not rows:
        sys.exit(f"{out} has no rows of the {args.split} split yet; `bash run_all.sh` runs what writes them")
    if args.seconds:
        results["seconds"] = args.seconds
    variants = [name for name in ("m_probe", "m_infonce_probe", "m_joint_probe") if name in rows]
    if variants:
        best = max(variants, key=lambda name: rows[name]["validation"])
        rows["m_best_probe"] = rows[best] | {"variant": best}
        results["rows"][vit.row_name(args, "m_best_probe")] = rows["m_best_probe"]
    vit.write_file(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())

    table = []
    for name, (what, *controls) in TABLE.items():
        if name not in rows:
            continue
        row = rows[name]
        reported = row.get("report") or REPORTED.get(name)
        control = next((control for control in controls if control in rows), None)
        against = f"{control} {in_words(control, rows[control]['value'])}" if control else ""
        what += f" = {row['variant']}" if "variant" in row else ""
        what += {"cls": " (CLS)", "mean": " (mean of patch tokens)"}.get(row.get("features"), "")
        time = f"{row['seconds'] / 60:.1f} min" if "seconds" in row else ""
        numbers = [in_words(name, row["value"]), in_words(name, reported) if reported else "", against]
        table.append([name, *numbers, str(row.get("epochs", "")), time, what, f"`{row['command']}`"])
    heads = ["row", "ours", "report", "control", "epochs", "time", "what it is", "command"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *table)]
    lines.insert(1, "|---|" + "---:|" * 2 + "---|" + "---:|" * 2 + "---|" * 2)
    warning = ""
    if results["dataset"] == "synthetic":
        warning = "SYNTHETIC DATA: these are not CIFAR-10 numbers. "
    if args.limit:
        warning += f"ONLY {args.limit:,} IMAGES of each split: these numbers mean nothing."
    versions = ", ".join(f"{package} {version}" for package, version in results["versions"].items())
    parts = [f"# Results of {out.name}"]
    parts += [f"**{warning.strip()}**"] if warning else []
    parts += [
        f"Images: {results['provenance']}. Accuracies on the {args.split} split, seed {results['seed']}."
    ]
    parts += [f"Machine: {results['device']}, {results['precision']}; {versions}.", "\n".join(lines), NOTES]
    for name in FIGURES:
        if (out / "figures" / f"{name}.png").exists():
            parts.append(f"### {name}\n\n![{name}](figures/{name}.png)")
    vit.write_file(out / "report.md", ("\n\n".join(parts) + "\n").encode())
    for name, ours, theirs, against, *_ in (heads, *table):
        print(f"{name:<24}{ours:>9}{theirs:>9}  {against}")
    print(f"{warning}\nthe table with its commands: {out / 'report.md'}; pictures: {out / 'figures'}")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=raw, parents=[vit.common_arguments()]
    )
    stages = {function.__name__: function for function in (maps, cka, figures, movie, report)}
    add = parser.add_argument
    add("what", nargs="+", choices=list(stages), help="one of these, or several, one after another")
    add("--before", help="maps, cka: checkpoint before fine-tuning")
    add("--after", help="maps, cka: checkpoint after fine-tuning")
    add("--seconds", type=int, help="report: how long the whole run took, where it ran in one go")

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
