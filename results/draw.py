"""Every picture, drawn from what the stages left in a run's folder (seconds, no training).

    python results/draw.py --out runs/cifar10-laptop --split test    # its figures/*.png and learning.gif

A picture is rows of cells (words, images, or a picture again), put side by side by `grid`. By hand with
Pillow, since a plotting library would be one more to install.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import pathlib
import sys
import textwrap

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import vit  # noqa: E402

# ---------------------------------------------------------------- the renderer

Cell = Image.Image
INK, GREY, LIGHT, PAPER = (30, 30, 36), (110, 110, 118), (226, 226, 230), (255, 255, 255)
# colours that colour-blind readers can tell apart (Okabe and Ito 2008)
BLUE, ORANGE, GREEN, PINK = (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167)
COLOURS = [BLUE, ORANGE, GREEN, PINK, (230, 159, 0), (86, 180, 233), INK, (170, 110, 90)]
VIRIDIS = "440154 472c7a 3b518b 2c718e 21908d 27ad81 5cc863 aadc32 fde725"


def colour(x: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1], any shape, to viridis colours [..., 3] in 0..255."""
    anchors = np.array([list(bytes.fromhex(code)) for code in VIRIDIS.split()])  # [9, 3]
    places = np.linspace(0, 1, len(anchors))
    return np.stack([np.interp(x, places, channel) for channel in anchors.T], axis=-1)


def pixels(images) -> np.ndarray:
    """[..., 3, S, S], uint8 or floats in [0, 1] -> [..., S, S, 3] in 0..255."""
    images = np.asarray(images)
    return np.moveaxis(images.astype(float) * (1 if images.dtype == np.uint8 else 255), -3, -1)


def picture(array: np.ndarray, size: int) -> Cell:
    """An array [S, S, 3] of 0..255 as a square of `size` pixels."""
    return Image.fromarray(np.clip(array, 0, 255).astype(np.uint8)).resize((size, size), Image.NEAREST)


def text(words: str, size: int = 13, ink=INK) -> Cell:
    """Words, as wide as they are."""
    font, lines, height = ImageFont.load_default(size), words.split("\n"), round(1.35 * size)
    width = math.ceil(max(font.getlength(line) for line in lines)) + 2
    cell = Image.new("RGB", (width, height * len(lines)), PAPER)
    for k, line in enumerate(lines):
        ImageDraw.Draw(cell).text((0, height * k), line, ink, font)
    return cell


def answer(words: str, right: bool) -> Cell:
    """What a model said: blue if right, else orange and with an x, for who can't tell the two apart."""
    return text(words, ink=BLUE) if right else text(f"x {words}", ink=ORANGE)


def tile(words: str, width: int, height: int, paper) -> Cell:
    """A coloured box with words in the middle, dark on light: what looks light has much green."""
    cell, font = Image.new("RGB", (width, height), tuple(map(int, paper))), ImageFont.load_default(12)
    ink, middle = INK if paper[1] > 150 else PAPER, (width / 2, height / 2)
    ImageDraw.Draw(cell).text(middle, words, ink, font, anchor="mm", align="center")
    return cell


def grid(rows: list[list[Cell | str]], gap: int = 8, x: float = 0.5, y: float = 0.5) -> Cell:
    """Cells in rows and columns as one; x, y: where in its place a cell lies (0 left or top, 1 right or
    bottom)."""
    rows = [[text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    columns = itertools.zip_longest(*rows, fillvalue=text(""))
    widths = [max(cell.width for cell in column) for column in columns]
    heights = [max(cell.height for cell in row) for row in rows]
    size = (sum(widths) + gap * (len(widths) - 1), sum(heights) + gap * (len(heights) - 1))
    whole, top = Image.new("RGB", size, PAPER), 0
    for row, height in zip(rows, heights):
        left = 0
        for cell, width in zip(row, widths):
            at = (left + round(x * (width - cell.width)), top + round(y * (height - cell.height)))
            whole.paste(cell, at)
            left += width + gap
        top += height + gap
    return whole


def page(title: str, caption: str, body: Cell, footer: str) -> Cell:
    """A whole picture: what it shows, how to read it, the picture itself, where its pixels come from."""
    caption = textwrap.fill(" ".join(caption.split()), max(110, body.width // 7))
    cells = [text(title, 22), text(caption, 14, GREY), body, text(footer, 12, GREY)]
    return ImageOps.expand(grid([[cell] for cell in cells], 14, x=0), 24, PAPER)


def with_scale(body: Cell, low: float, high: float, words: str) -> Cell:
    """A picture with the legend of `colour` below it."""
    bar = Image.fromarray(colour(np.linspace(0, 1, 240)[None].repeat(12, 0)).astype(np.uint8))
    return grid([[body], [grid([[f"{low:.2f}", bar, f"{high:.2f} {words}"]])]], 14)


def chart(title: str, lines: dict[str, list[tuple]], last: int, until: float = 1e9, mark: float = 0) -> Cell:
    """Curves through points (epoch, value), over epochs 0 to `last`, drawn `until` some epoch. mark: the
    epoch at which labels come in."""
    values = [value for line in lines.values() for _, value in line]
    low, high = min(values), max(values) + 1e-6
    width, height, left = 300, 180, 40
    cell, font = Image.new("RGB", (left + width + 20, height + 30), PAPER), ImageFont.load_default(12)
    draw = ImageDraw.Draw(cell)

    def at(epoch: float, value: float) -> tuple[float, float]:
        """Where in the cell a point lies."""
        return left + width * epoch / last, 12 + (height - 24) * (high - value) / (high - low)

    for value in np.linspace(low, high, 5):
        draw.line([at(0, value), at(last, value)], fill=LIGHT)
        draw.text((left - 6, at(0, value)[1]), f"{value:.3g}", GREY, font, anchor="rm")
    for epoch in range(0, last + 1, math.ceil(last / 8)):
        draw.text((at(epoch, low)[0], height + 12), str(epoch), GREY, font, anchor="ma")
    if mark > 0:
        draw.line([at(mark, low), at(mark, high)], fill=GREY)
        draw.text(at(mark, high), " with labels >", GREY, font, anchor="lm")
    legend = []
    for (name, line), ink in zip(lines.items(), COLOURS):
        points = [at(epoch, value) for epoch, value in line if epoch <= until]
        if points:  # a line that has none keeps its colour for the other charts
            draw.line(points, fill=ink, width=2)
            draw.circle(points[-1], 3, fill=ink)
            legend.append([text(name, ink=ink)])
    return grid([[text(title, 15)], [cell, grid(legend, 2, x=0)]], 4)


# ---------------------------------------------------------------- the pictures
# Each function returns a title, a caption that says how to read it, and the body. It gets the options, the
# names of the classes, and what PICTURES says that it needs.


def read(args: argparse.Namespace, what: str):
    """A checkpoint (NAME.pt) or a row's arrays (NAME.npz) of the run; None where there is none."""
    name, kind = what.split(".")
    path = vit.row_path(args, name, kind) if kind == "npz" else pathlib.Path(args.out, what)
    if not path.exists():
        return None
    return dict(np.load(path)) if kind == "npz" else vit.read_checkpoint(path)


def draw_patches(args: argparse.Namespace, names: list[str], state: dict):
    """Set A, and what Model M answers: the black patches repainted, and the angle."""
    model = vit.ModelM(vit.ViT(**state["config"])).eval()
    model.load_state_dict(state["model"])
    patch, masked, turned = (state["recipe"][key] for key in ("patch", "masked", "turned"))
    images = data.load(args.data, "validation", limit=64)[0].float() / 255
    generator = torch.Generator().manual_seed(1)
    augmented, black, moved, angle = data.patch_augment(images, generator, patch, masked, turned)
    with torch.no_grad():
        logits, painted = model(augmented, black)
    patches = data.patchify(augmented, patch)  # [64, N, 3, P, P]
    b = torch.arange(len(images))[:, None]
    # vit.standardise undone
    patches[b, black] = painted.view(*black.shape, *patches.shape[2:]) * 0.25 + 0.5
    side = images.shape[-1] // patch
    size = 160 // side  # of a patch, in pixels of the picture
    rows = [["the image", "set A, patches by number", "what Model M sees", "what it paints", ""]]
    for i in [(angle == k).nonzero()[0, 0] for k in angle.unique()]:  # one for each angle
        shown = [
            picture(pixels(x[i]), size * side) for x in (images, images, augmented, data.unpatchify(patches))
        ]
        for ink, some in ((ORANGE, black[i].tolist()), (BLUE, moved[i].tolist())):
            for p in some:
                x, y = size * (p % side), size * (p // side)
                square = [x, y, x + size - 1, y + size - 1]
                ImageDraw.Draw(shown[1]).rectangle(square, outline=ink, width=3)
                shown[1].paste(tile(str(p), 20, 16, ink), (x, y))
        said = logits[i].argmax()
        words = [[text("black: painted", ink=ORANGE)], [text(f"turned by {90 * angle[i]}°", ink=BLUE)]]
        rows.append([*shown, grid([*words, [answer(f"it says {90 * said}°", bool(said == angle[i]))]], x=0)])
    caption = f"""{masked + turned} of an image's {side * side} patches, at random, are set A: {masked} are
    blacked out, {turned} turned counter-clockwise by one angle. Model M names the angle and paints the black
    patches: by the squared error the average of what could be there, a blur."""
    return "Patch augmentation, and what Model M makes of it", caption, grid(rows, 14)


def draw_maps(args: argparse.Namespace, names: list[str], stored: dict):
    """CLS-patch similarity of some images, before and after fine-tuning, in one colour scale."""
    cosines = np.stack([stored["before"], stored["after"]])  # [2, K, N]
    low, high, side = cosines.min(), cosines.max(), math.isqrt(cosines.shape[-1])
    images = pixels(stored["images"])
    rows = [["", *(names[k] for k in stored["labels"])], ["image", *(picture(image, 84) for image in images)]]
    for when, maps in zip(("before", "after"), cosines):
        rows.append([when])
        for image, cosine in zip(images, maps):
            small = Image.fromarray(cosine.reshape(side, side).astype(np.float32))
            large = np.asarray(small.resize(image.shape[:2], Image.BILINEAR))  # the report's 4x4 -> 32x32
            rows[-1].append(picture(colour((large - low) / (high - low)), 84))
    caption = """Cosine of the CLS token with each patch token, before and after fine-tuning, enlarged to the
    image's size; one colour scale for all. The first image of each class."""
    return "Similarity of CLS with every patch", caption, with_scale(grid(rows), low, high, "cosine")


def draw_cka(args: argparse.Namespace, names: list[str], stored: dict):
    """Place-by-place CKA of CLS, before and after fine-tuning."""
    places = len(stored["before"])
    labels, size = ["in"] + [f"{kind}{b}" for b in range(1, places // 2 + 1) for kind in "am"], 480 // places
    halves = []
    for when in ("before", "after"):
        rows = [[f"{label} "] for label in labels]
        for (i, j), value in np.ndenumerate(stored[when]):
            words = "" if np.isnan(value) else f"{value:.2f}".removeprefix("0")
            rows[i].append(tile(words, size, size, colour(value) if words else LIGHT))
            if (i, j) in ((places - 3, places - 2), (places - 3, places - 1)):
                ImageDraw.Draw(rows[i][-1]).rectangle([0, 0, size - 1, size - 1], outline=ORANGE, width=3)
        halves.append(grid([[f"{when} fine-tuning"], [grid([*rows, ["", *labels]], 1)]]))
    caption = """Plain (not debiased) linear CKA of CLS after each attention (a1, a2, ...) and each MLP (m1,
    m2, ...). Framed: the two ways to read the report's "before and after the last attention block". Grey: CLS
    enters the first block the same for every image, so there is nothing to compare."""
    body = with_scale(grid([halves], 24), 0, 1, "CKA")
    return "Linear CKA of the CLS token along the network", caption, body


CURVES = {"match": "partner found (%)", "angle": "angle named (%)", "mse": "squared error"}
CURVES |= {"train": "accuracy, training (%)", "validation": "accuracy, validation (%)"}
TRAINED = "infonce m m_alone finetune finetune_infonce finetune_scratch video_1 video_2".split()


def draw_curves(args: argparse.Namespace, names: list[str]):
    """Every metric that the stages noted, over all epochs that led there."""
    ended, panels = {}, {metric: {} for metric in CURVES}  # ended: hash of a run's last weights -> epoch
    for name in TRAINED:  # each after the one that it starts from
        if state := read(args, f"{name}.pt"):
            begin = ended.get(state["recipe"]["start"], 0)
            ended[vit.hash_of(*state["model"].values())] = begin + state["epoch"]
            for metric, panel in panels.items():
                values = state["history"].get(metric, [])
                scale = 1 if metric == "mse" else 100
                panel[name] = [(begin + k, scale * value) for k, value in enumerate(values, start=1)]
    charts = []
    for metric, panel in panels.items():
        if any(len(line) > 1 for line in panel.values()):
            charts.append(chart(CURVES[metric], panel, max(ended.values())))
    if not charts:
        return None
    caption = """One axis of epochs for all: a run that goes on from another begins where that one ended.
    Means of each epoch on augmented training images (video: clips); validation: held-out images. Partner
    found: views whose nearest neighbour in the batch is the other view of their image."""
    return "Learning curves", caption, grid([charts[k : k + 2] for k in range(0, len(charts), 2)], 28, x=0)


def draw_clips(args: argparse.Namespace, names: list[str], stored: dict):
    """A clip of each class: how the temporal CLS weighs its frames, what each says by itself, what all do."""
    weights = stored["weights"][:, 1:]  # [K, F]; the rest of the attention stays on CLS itself
    top, even = weights.max(), 1 / (weights.shape[1] + 1)
    rows = [["true class", *[""] * weights.shape[1], "answer"]]
    for k, clip in enumerate(pixels(stored["images"])):
        truth, said = stored["labels"][k], stored["clip"][k]
        rows.append([names[truth]])
        for f, frame in enumerate(clip):
            bar, line = Image.new("RGB", (46, 35), PAPER), 34 - round(34 * even / top)
            bar.paste(GREY, (12, 34 - round(34 * weights[k, f] / top), 34, 35))
            bar.paste(INK, (0, line, 46, line + 1))
            right = stored["each"][k, f] == truth
            cell = ImageOps.expand(picture(frame, 40), 3, BLUE if right else ORANGE)
            if not right:  # told by more than its colour
                cell.paste(ORANGE, (0, 37, 46, 46))
            rows[-1].append(grid([[bar], [cell]], 4))
        rows[-1].append(answer(names[said], said == truth))
    caption = f"""Bar over a frame: attention from the temporal CLS token (mean of the heads), the highest
    {top:.3f}; the line is an even share, {even:.3f}. Frame blue: this image by itself would be named right;
    orange, with a thick lower edge: wrong. At the right the answer to the whole clip."""
    return f"Clips of {weights.shape[1]} images, and where the temporal CLS looks", caption, grid(rows, 6)


def draw_captions(args: argparse.Namespace, names: list[str], stored: dict, control: dict):
    """Images with their captions, and what the fusion model and the control without text answer."""
    truth, fused, alone = stored["labels"], stored["guess"], control["guess"]
    cells = []
    for image, caption, k in zip(pixels(stored["images"]), stored["captions"], stored["shown"]):
        lines = [[grid([[picture(image, 84), textwrap.fill(str(caption), 16)]], y=0)]]
        lines.append([f"it is: {names[truth[k]]}"])
        lines.append([answer(f"without: {names[alone[k]]}", alone[k] == truth[k])])
        lines.append([answer(f"with: {names[fused[k]]}", fused[k] == truth[k])])
        cells.append(grid(lines, 3, x=0))
    gained, lost = np.sum((fused == truth) & (alone != truth)), np.sum((fused != truth) & (alone == truth))
    caption = f"""Without: the answer of the control that never saw a caption; with: of fusion; orange with an
    x: wrong. Of {len(truth):,} images {np.sum(fused != alone):,} get another answer with captions: {gained:,}
    a right one instead of a wrong one, {lost:,} the other way round. Captions by WHO."""
    body = grid([cells[k : k + 5] for k in range(0, len(cells), 5)], 18, x=0, y=0)
    return "Captions, and what they change", caption, body


def draw_words(args: argparse.Namespace, names: list[str], stored: dict):
    """How the image's query shares its attention among the words of the caption."""
    top, rows = stored["weights"].max(), [["", "true class", "the caption, token by token"]]
    for i in range(0, len(stored["shown"]), 2):
        tiles = []
        for word, weight in zip(stored["words"][i].split(" "), stored["weights"][i]):
            paper = 255 - (255 - np.array(BLUE)) * weight / top
            tiles.append(tile(f"{word}\n{weight:.2f}", max(52, 9 * len(word) + 14), 36, paper))
        truth = names[stored["labels"][stored["shown"][i]]]
        rows.append([picture(pixels(stored["images"][i]), 54), truth, grid([tiles], 4)])
    caption = """Captions by WHO. Attention of the temporal CLS over CLIP's pieces of words (mean of the
    heads; a row adds up to 1). CLIP reads from left to right: the end can still be about the beginning."""
    return "Attention of the image over the words of its caption", caption, grid(rows, 10, x=0)


PICTURES = {  # name -> what draws it, and what that needs; WHO: tiny, or blip where it captioned
    "patches": (draw_patches, ["m.pt"]),
    "maps": (draw_maps, ["maps.npz"]),
    "cka": (draw_cka, ["cka.npz"]),
    "curves": (draw_curves, []),
    "clips": (draw_clips, ["video_1.npz"]),
    "captions": (draw_captions, ["fusion_WHO.npz", "fusion_WHO_image_only.npz"]),
    "words": (draw_words, ["fusion_WHO_tokens.npz"]),
}

# ---------------------------------------------------------------- the film

FILM = {"infonce": "InfoNCE", "m": "Model M", "finetune": "fine-tuning"}


def nearest_neighbours(queries: torch.Tensor, keys: torch.Tensor, labels: torch.Tensor, k: int = 20):
    """The class that most of the k keys of highest cosine have: queries [n, D], keys and their labels [m, D],
    [m] -> [n]. It asks what looks alike to the encoder, and needs no training (Wu et al. 2018, section 3.4,
    here without weights; k = 20 as in DINO, Caron et al. 2021, which found it best)."""
    cosines = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T  # [n, m]
    nearest = cosines.topk(min(k, len(keys)), dim=1).indices  # [n, k]
    return F.one_hot(labels[nearest]).sum(dim=1).argmax(dim=1)  # votes [n, K] -> [n]


def draw_film(args: argparse.Namespace, names: list[str], footer: str) -> list[Cell]:
    """Maps and nearest neighbours, epoch by epoch, of the trainings that kept their epochs."""
    scenes = {}  # title -> checkpoint
    for name, what in FILM.items():
        last = state["epoch"] if (state := read(args, f"{name}.pt")) else 0
        for k in sorted(range(last, 0, -math.ceil(last / 8) or -1)):
            path = pathlib.Path(args.out, name, f"epoch{k}.pt")
            if path.exists() and vit.read_checkpoint(path)["recipe"] == state["recipe"]:
                scenes[f"{what}, epoch {k} of {last}"] = path
    if not scenes:
        return []
    (train, known), (images, truth) = (
        data.load(args.data, split, limit=min(args.limit or 2_000, 2_000))
        for split in ("train", "validation")
    )
    shown = torch.stack([(truth == k).nonzero()[0, 0] for k in truth.unique()])  # [K]
    maps, guesses, right = [], [], []  # a scene each
    for path in scenes.values():
        encoder, plain = vit.load_encoder(path), contextlib.nullcontext()

        def tokens(x: torch.Tensor) -> torch.Tensor:
            """[b, 3, S, S] -> [b, T, D], of length one."""
            return F.normalize(encoder(x.float() / 255), dim=-1)

        seen, keys = (vit.evaluate(encoder, plain, tokens, x) for x in (images, train))
        maps.append((seen[shown, 1:] @ seen[shown, 0, :, None])[..., 0].numpy())  # [K, N]
        guesses.append(nearest_neighbours(seen[:, 0], keys[:, 0], known))  # [n]
        right.append(100 * (guesses[-1] == truth).float().mean().item())
    caption = f"""Validation images; below each the cosine of CLS with every patch (yellow: high) and the
    class of most of its 20 nearest neighbours among {len(train):,} training images (orange with an x: wrong).
    The curve: how often that is right for {len(images):,} images, scene by scene."""
    without, frames = sum("tuning" not in title for title in scenes), []
    labels_from = without - 0.5 if without < len(scenes) else 0
    for f, title in enumerate(scenes):
        rows = [[], [], []]
        for i, image, cosine in zip(shown, pixels(images[shown]), maps[f]):
            heat, guess = (cosine - np.min(maps)) / np.ptp(maps), guesses[f][i]  # [N]
            side = math.isqrt(len(heat))
            rows[0].append(picture(image, 80))
            rows[1].append(picture(colour(heat.reshape(side, side)), 80))
            rows[2].append(answer(names[guess], bool(guess == truth[i])))
        line = {"": list(enumerate(right))}
        curve = chart("nearest neighbours right (%)", line, max(1, len(scenes) - 1), f, labels_from)
        frames.append(page(title, caption, grid([[grid(rows)], [curve]], 14), footer))
    return frames


def main() -> None:
    args = argparse.ArgumentParser(parents=[vit.common_options()]).parse_args()
    source, out = data.source(args.data), pathlib.Path(args.out)
    footer, who = f"{source.provenance}; run {out.name}", "tiny"
    if vit.row_path(args, "fusion_blip", "npz").exists():
        who = "blip"
    for name, (draw, needs) in PICTURES.items():
        inputs = [read(args, what.replace("WHO", who)) for what in needs]
        drawn = draw(args, source.classes, *inputs) if all(inputs) else None
        if drawn:
            title, caption, body = drawn
            caption = caption.replace("WHO", "BLIP" if who == "blip" else "a small captioner trained here")
            with vit.whole_file(out / "figures" / f"{name}.png") as file:
                page(title, caption, body, footer).save(file, "PNG", optimize=True)
        nothing = "not drawn (its stage has not run on this split, or of too few epochs or images)"
        print(f"{name}: {'drawn' if drawn else nothing}", flush=True)
    frames = draw_film(args, source.classes, footer)
    if frames:
        every = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames]))
        palette = every.quantize(200)  # one for all frames, so that what stands still costs nothing
        first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
        times = [900] * len(others) + [3000]  # in milliseconds
        with vit.whole_file(out / "figures" / "learning.gif") as file:
            first.save(file, "GIF", save_all=True, append_images=others, duration=times, loop=0)
    print(f"learning.gif: {len(frames)} frames; all in {out / 'figures'}")


if __name__ == "__main__":
    main()
