"""Stage 3: language. An image's caption, as a vector, joins the video model through a cross-attention block.

    image --BLIP--> caption --CLIP's text tower--> embedding --linear--> keys, values --+
    image, shown as a static video --video.py's model--> its temporal CLS --> query ----+--> cross-attention block --> class

Part 1, the network (read this first):   CrossAttention -> CrossBlock -> Fusion
Part 2, captions:                        BLIP, the caption file
Part 3, embeddings:                      CLIP's text tower
Part 4, without downloads:               a small BLIP and a small CLIP of the same classes, trained here
Part 5, fusion and its controls:         does the caption help, or does it merely answer?

Depends on vit.py, data.py and video.py: copy this file with those three. For cross-attention alone, CrossBlock needs
only torch and vit.init_linear.

    python multimodal.py tiny --checkpoint runs/mine/m.pt --epochs 2      # only where BLIP and CLIP can't be downloaded
    python multimodal.py caption --captioner tiny
    python multimodal.py embed --captions runs/mine/captions_tiny.jsonl
    python multimodal.py fuse --captions runs/mine/captions_tiny.jsonl --blocks 1 --epochs 2

Papers: Li et al. 2022 (BLIP), Radford et al. 2021 (CLIP), Cherti et al. 2023 (open_clip), Vaswani et al. 2017 (attention).
Shape letters as in vit.py; also U distinct captions, L words (tokens) of a caption, E width of CLIP's embedding.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import pathlib
import re
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

import data
import video
import vit

REPORT = 0.7013  # test accuracy with captions
SPLITS = ("train", "validation", "test")
CLIP = ("ViT-B-32", "laion2b_s34b_b79k")  # open_clip's names of the architecture and of its weights

# ----------------------------------------------------------------------------------------------------------------------
# Part 1: the network
# ----------------------------------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """Multi-head cross-attention (Vaswani et al. 2017, section 3.2.3): x asks, the text answers.

        softmax(Q K^T / sqrt(D / H)) V,     Q = x W_q,   K = text W_k,   V = text W_v

    The softmax shares out a total of one among the keys. With a single key, which is all that a pooled text vector
    gives, there is nothing to share: its weight is 1 whatever the query is, every x gets the same text W_v, and W_q and
    W_k are never used. So attention chooses only among several keys: the words of a caption (--text tokens).
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} can't be shared out evenly among {heads} heads")
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, text: torch.Tensor, is_word: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [B, T, D], text: [B, L, D], is_word: [B, L], False where there is only padding -> [B, T, D], weights [B, H, T, L]."""
        B, T, D = x.shape
        q = self.q(x).view(B, T, self.heads, -1).transpose(1, 2)  # [B, H, T, D/H]
        k, v = self.kv(text).view(B, -1, 2, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # each [B, H, L, D/H]
        scores = q @ k.transpose(-2, -1) * (D // self.heads) ** -0.5  # [B, H, T, L]
        if is_word is not None:
            scores = scores.masked_fill(~is_word[:, None, None, :], -torch.inf)  # [B, 1, 1, L]
        weights = scores.softmax(dim=-1)
        out = (weights @ v).transpose(1, 2).reshape(B, T, D)  # [B, H, T, D/H] -> [B, T, H, D/H] -> [B, T, D]
        return self.proj(out), weights


class CrossBlock(nn.Module):
    """A whole pre-norm transformer block whose attention reads from the text:

        x = x + cross_attention(norm(x), norm(text))
        x = x + mlp(norm(x))

    Both sums start at zero (their last layers do), so a trained network that gets this block put on top starts out
    unchanged and learns from there how much to let in.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: int = 4):
        super().__init__()
        self.norm1, self.norm_text, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = CrossAttention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))
        self.apply(vit.init_linear)
        nn.init.zeros_(self.attn.proj.weight)
        nn.init.zeros_(self.mlp[2].weight)

    def forward(self, x: torch.Tensor, text: torch.Tensor | None, is_word: torch.Tensor | None = None,
                trace: list | None = None) -> torch.Tensor:  # fmt: skip
        """x: [B, T, D], text: [B, L, D] (None: the gate to the text is closed), is_word: [B, L] -> [B, T, D].
        `trace`, where given, receives the attention weights [B, H, T, L]."""
        if text is not None:
            update, weights = self.attn(self.norm1(x), self.norm_text(text), is_word)
            x = x + update
            if trace is not None:
                trace.append(weights)
        return x + self.mlp(self.norm2(x))


class Fusion(nn.Module):
    """The video model with a cross-attention block after its last spatio-temporal block.

    Of the video model's tokens only the temporal CLS asks: the class is read from it, and no later block would read
    what the others had learned from the text.
    `image=False` is the control that sees only the caption: a learned vector asks in place of the image.
    """

    def __init__(self, model: video.FactorisedEncoder, text_dim: int, image: bool = True):
        super().__init__()
        dim = model.encoder.config["dim"]
        self.video = model
        self.project = nn.Linear(text_dim, dim)
        self.block = CrossBlock(dim, model.encoder.config["heads"])
        self.cls = None if image else nn.Parameter(0.02 * torch.randn(1, 1, dim))

    @property
    def encoder(self) -> vit.ViT:
        """The image encoder, as in every model of this project."""
        return self.video.encoder

    def forward(self, images: torch.Tensor, text: torch.Tensor | None = None, is_word: torch.Tensor | None = None,
                trace: list | None = None) -> torch.Tensor:  # fmt: skip
        """Static videos, each of one image: [B, 3, S, S]; text: [B, L, E] or None; is_word: [B, L] -> class logits [B, K]."""
        if self.cls is None:
            shown = torch.zeros(len(images), self.video.frames, dtype=torch.long, device=images.device)  # [B, F]: always image 0
            x = self.video.tokens(images[:, None], shown)[0][:, :1]  # [B, 1 + F, D] -> CLS [B, 1, D]
        else:
            x = self.cls.expand(len(images), -1, -1)  # [B, 1, D]
        x = self.block(x, None if text is None else self.project(text), is_word, trace)
        return self.video.head(self.video.norm(x[:, 0]))


# ----------------------------------------------------------------------------------------------------------------------
# Part 2: captions. One JSON object per line: first what made them, then {"split", "index", "caption"}, appended batch by
# batch, so that hours of captioning survive any accident.
# ----------------------------------------------------------------------------------------------------------------------


def load_blip(name: str, revision: str | None, device: torch.device):
    """(model, processor) of a BLIP captioner: a model id of the Hugging Face hub, or a folder made by save_pretrained.

    Weights in half precision on CUDA. Raises SystemExit with one sentence when it can't be had.
    """
    from transformers import BlipForConditionalGeneration, BlipProcessor

    quiet()
    try:
        processor = BlipProcessor.from_pretrained(name, revision=revision)
        model = BlipForConditionalGeneration.from_pretrained(name, revision=revision)
    except Exception as error:  # offline and not cached, no such model, not a model: the library raises many kinds
        sys.exit(f"can't load the captioner {name} ({first_line(error)}); where there is a network, `hf download {name} "
                 "--exclude tf_model.h5` fetches it (into HF_HOME); or name a folder with --blip, or say --captioner tiny")  # fmt: skip
    return model.to(device, torch.float16 if device.type == "cuda" else torch.float32).eval(), processor


def quiet() -> None:
    """Silence the libraries' own remarks and bars (except for downloads): what matters becomes one sentence below."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    enable_progress_bars()
    logging.disable(logging.ERROR)


def pixel_values(processor, images: torch.Tensor) -> torch.Tensor:
    """What BLIP sees of uint8 images [B, 3, S, S]: enlarged and standardised by its processor, float [B, 3, S', S']."""
    device = images.device
    images = images.cpu() if device.type == "mps" else images  # not every PyTorch can enlarge this way there
    return processor(images=images, return_tensors="pt")["pixel_values"].to(device)


def write_captions(model, processor, images: torch.Tensor, args, machine: vit.Machine) -> list[str]:
    """The captions of uint8 images [n, 3, S, S]."""
    longest = min(args.max_new_tokens, model.config.text_config.max_position_embeddings - 1)
    pixels = pixel_values(processor, images).to(model.dtype)
    with torch.no_grad(), machine.autocast() if machine.device.type == "cpu" else contextlib.nullcontext():
        tokens = model.generate(pixel_values=pixels, num_beams=args.beams, max_new_tokens=longest)
    return [caption.strip() for caption in processor.batch_decode(tokens, skip_special_tokens=True)]


def read_captions(path: str | pathlib.Path) -> tuple[dict, dict[tuple[str, int], str], int]:
    """The header of a caption file, its captions by (split, index), and how many of its bytes are whole lines.

    A last line torn by a kill or a full disk doesn't count. Raises SystemExit with one sentence for any other file.
    """
    try:
        raw = pathlib.Path(path).read_bytes()
    except OSError:
        sys.exit(f"there is no caption file {path}; `python multimodal.py caption` writes one")
    whole = raw[: raw.rfind(b"\n") + 1]
    try:
        header, *lines = map(json.loads, whole.splitlines())
        header["captioner"], header["model"], header["dataset"]
        return header, {(line["split"], line["index"]): line["caption"] for line in lines}, len(whole)
    except (ValueError, KeyError, TypeError):
        sys.exit(f"{path} is not a caption file: its lines must be JSON, first captioner, model and dataset, then split, index and caption each")


def captions_of(captions: dict[tuple[str, int], str], split: str, number: int) -> list[str]:
    """The captions of the first `number` images of a split. Raises SystemExit where one is missing."""
    missing = sum((split, i) not in captions for i in range(number))
    if missing:
        sys.exit(f"the caption file lacks {missing} of {number} captions of the {split} split; `python multimodal.py caption` goes on with it")
    return [captions[split, i] for i in range(number)]


SYNONYMS = {"airplane": "plane jet aircraft airliner biplane", "automobile": "car sedan suv", "cat": "kitten", "deer": "elk moose antelope",
            "dog": "puppy", "frog": "toad", "horse": "pony", "ship": "boat ferry sailboat yacht", "truck": "lorry"}  # fmt: skip


def named_class(caption: str, classes: list[str]) -> int:
    """The label of the first word that names a class, by itself or by a synonym, in singular or plural; -1 if none does."""
    names = [(word, k) for k, name in enumerate(classes) for word in (name, *SYNONYMS.get(name, "").split())]
    label = dict(names) | {f"{word}s": k for word, k in names}
    return next((label[word] for word in re.findall("[a-z]+", caption.lower()) if word in label), -1)


def progress(batches: list, sizes: list[int], what: str):
    """Yield the batches, drawing a bar with the number done of `what`, by the batches' sizes, and the time left."""
    start = shown = time.perf_counter()
    terminal, total, done = sys.stdout.isatty(), sum(sizes), 0
    pause = 1 if terminal else 60  # seconds; a log gets a line a minute
    for batch, size in zip(batches, sizes):
        yield batch
        now, done = time.perf_counter(), done + size
        if done == total or now - shown > pause:
            shown, rate = now, done / (now - start)
            left = (total - done) / rate
            line = f"[{'#' * (30 * done // total):<30}] {done:,} of {total:,} {what}, {rate:.0f}/s, {left // 60:.0f}:{left % 60:02.0f} left"
            print(f"\r{line:<110}" if terminal else line, end="\n" if done == total or not terminal else "", flush=True)


def choose(args) -> tuple[str, str]:
    """What --captioner auto means on this machine, "blip" or "tiny", and why."""
    if not (args.device.startswith(("auto", "cuda")) and torch.cuda.is_available()):
        return "tiny", "without a CUDA GPU BLIP would take hours"
    print("looking for the weights of BLIP and CLIP, here or on the Hugging Face hub (1.5 GB)", file=sys.stderr, flush=True)
    try:
        load_blip(args.blip, args.revision, torch.device("cpu"))
        load_clip(*CLIP)
    except SystemExit as error:
        return "tiny", str(error)
    return "blip", "there is a CUDA GPU, and the weights are here"


def captioner(args) -> None:
    """Print what --captioner auto means here: blip or tiny (and why, on stderr)."""
    name, why = choose(args)
    print(f"captioner: {name}; {why}", file=sys.stderr)
    print(name)


def small_blips(out: pathlib.Path) -> list[str]:
    """The folders of the small BLIPs, by fold. Raises SystemExit unless all are there, from one run of `tiny`, and trained to the end."""
    first = out / "tiny_blip_0.pt"
    settings = vit.read_checkpoint(first)["settings"] if first.exists() else {"folds": 1}
    found = [out / f"tiny_blip_{fold}" for fold in range(settings["folds"])]
    for folder in found:
        state = vit.read_checkpoint(f"{folder}.pt") if (folder / "model.safetensors").exists() else None
        if not state or state["optimizer"] or state["settings"] != settings:
            sys.exit(f"{folder} is not trained yet; `python multimodal.py tiny --out {out}` trains a small BLIP for each fold")
    return [str(folder) for folder in found]


def caption(args) -> None:
    """Caption every image of the three splits; as a row, how often the caption names the right class.

    tiny: image i is captioned by the small BLIP of fold i % folds, which has not seen it in training (see Part 4), with
    --seen by the next one, which has.
    """
    if args.captioner == "auto":
        args.captioner, why = choose(args)
        print(f"captioner: {args.captioner}; {why}", flush=True)
    if args.seen and args.captioner == "blip":
        sys.exit("--seen is for the small captioner: BLIP has not seen the labels of any of these images")
    machine, out = vit.Machine(args.device, args.precision, args.seed), pathlib.Path(args.out)
    about, classes = data.describe(args.data), data.class_names(args.data)
    header = {"captioner": args.captioner, "dataset": about["dataset"], "beams": args.beams, "max_new_tokens": args.max_new_tokens}
    if args.captioner == "tiny":
        models = small_blips(out)
        weights = vit.fingerprint(*(f"{m}/model.safetensors" for m in models))
        header |= {"model": "small BLIP trained here", "seen": args.seen, "weights": weights}
    else:
        models = [args.blip]
        header |= {"model": args.blip, "revision": args.revision}

    @functools.cache
    def captioner_of_fold(m: int):
        """The (model, processor) of fold m, loaded when first needed."""
        return load_blip(models[m], args.revision if args.captioner == "blip" else None, machine.device)

    path = out / f"{args.name or 'captions_' + args.captioner + ('_seen' if args.seen else '')}.jsonl"
    if args.fresh or not path.exists():
        captioner_of_fold(0)  # one that can't be had must not cost the captions of an earlier one
        vit.write_file(path, (json.dumps(header) + "\n").encode())
    made_by, done, whole = read_captions(path)
    if changed := [k for k, v in header.items() if made_by.get(k) != v]:
        sys.exit(f"{path} was made with another {changed[0].replace('_', '-')}; add --fresh to start over, or choose another --name")

    os.truncate(path, whole)  # drops a torn last line
    shares = {}
    for split in SPLITS:
        images, labels = data.load(args.data, split, limit=args.limit)
        fold = torch.arange(len(images)) % len(models)
        batches = [(m, index) for m in range(len(models)) for index in (fold == m).nonzero()[:, 0].split(args.batch)
                   if any((split, i) not in done for i in index.tolist())]  # fmt: skip
        for m, index in progress(batches, [len(index) for _, index in batches], f"{split} captions"):
            model, processor = captioner_of_fold((m + args.seen) % len(models))
            written = zip(index.tolist(), write_captions(model, processor, images[index].to(machine.device), args, machine))
            new = {(split, i): c for i, c in written if (split, i) not in done}
            append(path, "".join(json.dumps({"split": split, "index": i, "caption": c}) + "\n" for (_, i), c in new.items()))
            done |= new
        named = torch.tensor([named_class(c, classes) for c in captions_of(done, split, len(labels))])
        shares[split] = {"right": (named == labels).float().mean().item(), "silent": (named < 0).float().mean().item()}  # silent: names no class

    also = {f"{split}_{k}": v for split in ("train", "validation", args.split) for k, v in shares[split].items()}  # test: only if asked
    vit.record(args, path.stem, machine, about, value=shares[args.split]["right"], captioner=args.captioner,
               model=header["model"], **also, weights=vit.fingerprint(path))  # fmt: skip


def append(path: pathlib.Path, lines: str) -> None:
    """Add lines to a file and see them on disk; on a full disk one sentence."""
    try:
        with open(path, "a") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        sys.exit(f"can't write {path}: {error.strerror}; free some space, then type the same command")


def first_line(error: BaseException) -> str:
    """What a library's error says, without its paragraphs of advice."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# ----------------------------------------------------------------------------------------------------------------------
# Part 3: embeddings
# ----------------------------------------------------------------------------------------------------------------------


def load_clip(name: str, weights: str | None):
    """(CLIP model on the CPU, tokenizer): an open_clip architecture with the tag or file of its weights, or "local-dir:FOLDER".

    Raises SystemExit with one sentence when it can't be had.
    """
    import open_clip

    quiet()
    local = name.startswith("local-dir:")
    try:
        model = open_clip.create_model(name, None if local else weights, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # offline, no such model, no such file, not weights: open_clip raises many kinds
        hub = (open_clip.get_pretrained_cfg(name, weights) or {}).get("hf_hub", "").strip("/")
        fetch = f"where there is a network, `hf download {hub} --include 'open_clip*'` fetches it (into HF_HOME); or " if hub else ""
        advice = f"{fetch}name a file with --clip-weights"
        if local:
            advice = "`python multimodal.py tiny` trains one into --out; or choose another --clip"
        sys.exit(f"can't load the CLIP {name}{'' if local else f' with weights {weights}'} ({first_line(error)}); {advice}")
    if not torch.is_tensor(getattr(model, "text_projection", None)):
        sys.exit(f"the text tower of {name} is built otherwise than CLIP's; choose a --clip such as {CLIP[0]}")
    return model.eval(), tokenizer


@torch.no_grad()
def embed_words(model, tokenizer, captions: list[str]) -> list[torch.Tensor]:
    """Each caption's words in CLIP's joint space, one [L, E] per caption, unit rows. The last row, the end-of-text token's,
    is what CLIP itself uses for the whole caption: its encode_text."""
    tokens = tokenizer(captions)  # [u, context length], padded with zeros behind the end-of-text token, the largest number
    length = tokens.argmax(dim=1) + 1
    tokens = tokens.to(next(model.parameters()).device)
    found = []
    handle = model.ln_final.register_forward_hook(lambda _, __, states: found.append(states))  # [u, context length, width]
    model.encode_text(tokens)
    handle.remove()
    states = F.normalize(found[0].float() @ model.text_projection.float(), dim=-1)  # [u, context length, E]
    return [s[:n].cpu() for s, n in zip(states, length.tolist())]


def embed(args) -> None:
    """Embed every distinct caption of a file once; writes out/NAME_OF_THE_FILE.npz."""
    header, captions, _ = read_captions(args.captions)
    own = f"local-dir:{pathlib.Path(args.out) / 'tiny_clip'}"
    name = args.clip or (own if header["captioner"] == "tiny" else CLIP[0])
    path, folder = embeddings_path(args), pathlib.Path(name.removeprefix("local-dir:"))
    used = f"{name} {args.clip_weights} {vit.fingerprint(args.clip_weights)}"
    if folder.is_dir():
        used = f"{folder.name} {vit.fingerprint(*sorted(folder.glob('*')))}"
    known, states, words, before = read_embeddings(path)
    if before != used:
        known, states, words = {}, [], []
    new = [c for c in dict.fromkeys(captions.values()) if c not in known]
    print(f"{len(captions):,} captions, {len(known) + len(new):,} distinct, {len(new):,} to embed with {name}", flush=True)
    if not new:
        return
    machine = vit.Machine(args.device, "float32", args.seed)
    model, tokenizer = load_clip(name, args.clip_weights)
    model.visual = None  # only the text tower is used
    model.to(machine.device)
    batches = [new[i : i + 256] for i in range(0, len(new), 256)]
    for batch in progress(batches, [len(b) for b in batches], "captions embedded"):
        states += embed_words(model, tokenizer, batch)
    vit.write_npz(path, used=used, captions=list(known) + new, words=words + spelled(new), length=[len(s) for s in states],
                  states=torch.cat(states).half())  # fmt: skip
    print(f"wrote {path}")


def spelled(captions: list[str]) -> list[str]:
    """Captions as CLIP's text tower reads them: their tokens, joined by spaces."""
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    tokens = [[tokenizer.decoder[i].removesuffix("</w>") for i in tokenizer.encode(caption)] for caption in captions]
    return [" ".join(["<start>", *t, "<end>"]) for t in tokens]


def embeddings_path(args) -> pathlib.Path:
    """Where the embeddings of --captions lie."""
    return (pathlib.Path(args.out) / pathlib.Path(args.captions).name).with_suffix(".npz")


def read_embeddings(path: pathlib.Path) -> tuple[dict[str, int], list[torch.Tensor], list[str], str]:
    """Caption -> its place in the two lists that follow: [L, E] float16 tensors, and the L words as CLIP reads them, joined
    by spaces; last, which CLIP made them. Empty where there is no file."""
    import numpy

    if not path.exists():
        return {}, [], [], ""
    stored = numpy.load(path)
    if "words" not in stored:  # written by an earlier version
        return {}, [], [], ""
    states = torch.from_numpy(stored["states"]).split(stored["length"].tolist())
    place = {caption: i for i, caption in enumerate(stored["captions"].tolist())}
    return place, list(states), stored["words"].tolist(), stored["used"].item()


# ----------------------------------------------------------------------------------------------------------------------
# Part 4: without downloads. A BLIP and a CLIP small enough to train here, on sentences made from the label and a few
# measured words. They know nothing that the training images don't hold, so from such a caption expect what a second
# opinion brings, no more; what the real BLIP adds is knowledge from outside.
#
# A captioner trained on an image's label remembers it and writes it into the caption. Fusion training on such captions
# would learn to copy the class word, which is right there and often wrong on new images. So the training images are
# dealt out to k folds, fold f's captioner is trained on all the others, and captions fold f: no image is captioned by a
# model that has seen it. (The real BLIP learned from captions of web images and of COCO. It may have met the originals
# of some of CIFAR-10's images there, which come from the web, too; their CIFAR-10 labels it has not seen.)
# ----------------------------------------------------------------------------------------------------------------------

HUES = "red yellow green cyan blue purple".split()


def sentences(images: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> list[str]:
    """"the cat on dark green far away": the class word from the label, the rest measured. images: uint8 [n, 3, S, S], labels [n].

    Ground: brightness and hue of the mean colour of a rim of S/8 pixels. Close up: most of the image has another colour.
    The class word comes first, as the words before it can't help to find it.
    """
    x = images.float() / 255
    edge = images.shape[-1] // 8
    rim = torch.ones(images.shape[-2:], dtype=torch.bool, device=x.device)  # [S, S]
    rim[edge:-edge, edge:-edge] = False
    ground = x[:, :, rim].mean(dim=2)  # [n, 3]
    close = ((x - ground[:, :, None, None]).abs().mean(dim=1) > 0.2).float().mean(dim=(1, 2)) > 0.5  # [n]
    bright, spread = ground.mean(dim=1) > 0.5, ground.amax(dim=1) - ground.amin(dim=1)  # [n] each
    r, g, b = ground.unbind(dim=1)
    hue = (torch.atan2(3**0.5 * (g - b), 2 * r - g - b) / (torch.pi / 3)).round().long() % 6  # [n], in steps of 60 degrees
    return [f"the {classes[k]} on {'bright' if light else 'dark'} {HUES[h] if s > 0.06 else 'grey'} {'close up' if near else 'far away'}"
            for k, light, h, s, near in zip(labels.tolist(), bright.tolist(), hue.tolist(), spread.tolist(), close.tolist())]  # fmt: skip


def small_blip(encoder: vit.ViT, classes: list[str], size: int):
    """(BLIP model, processor) whose image tower is our `encoder`, weights and all, looking at images enlarged to `size` pixels.

    BLIP enlarges its images (to 384 pixels), and so does this one: patches of 8 pixels then show less of the image each,
    so it sees details that our 16 patches blur, and errs elsewhere than the image model. The encoder can start from
    there, best after InfoNCE, whose crops were enlarged, too; its positions are interpolated, as usual for ViTs.
    """
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *"the on bright dark grey".split(), *HUES,
                  *"close up far away".split(), *classes]  # fmt: skip
    at = {word: i for i, word in enumerate(vocabulary)}
    c = encoder.config
    both = {"hidden_size": c["dim"], "intermediate_size": 4 * c["dim"], "num_attention_heads": c["heads"]}
    image = both | {"image_size": size, "patch_size": c["patch_size"], "num_hidden_layers": c["depth"]}
    text = both | {"vocab_size": len(at), "num_hidden_layers": 2, "encoder_hidden_size": c["dim"], "max_position_embeddings": 16,
                   "bos_token_id": at["[DEC]"], "eos_token_id": at["[SEP]"], "sep_token_id": at["[SEP]"],
                   "pad_token_id": at["[PAD]"]}  # fmt: skip
    model = BlipForConditionalGeneration(BlipConfig(vision_config=image, text_config=text))

    weights = encoder.state_dict()
    cls, grid = weights["positions"][:, :1], weights["positions"][:, 1:].transpose(1, 2)  # [1, 1, D], [1, D, N]
    side, new_side = c["image_size"] // c["patch_size"], size // c["patch_size"]
    grid = F.interpolate(grid.unflatten(2, (side, side)), size=(new_side, new_side), mode="bicubic")  # [1, D, new_side, new_side]
    weights["positions"] = torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)  # [1, 1 + new N, D]
    theirs = {"patch_embedding": "embeddings.patch_embedding", "cls": "embeddings.class_embedding", "positions": "embeddings.position_embedding",
              "blocks": "encoder.layers", "norm1": "layer_norm1", "norm2": "layer_norm2", "attn": "self_attn", "proj": "projection",
              "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2", "norm": "post_layernorm"}  # fmt: skip
    ours = re.compile(r"\b(" + "|".join(map(re.escape, theirs)) + r")\b")
    model.vision_model.load_state_dict({ours.sub(lambda name: theirs[name[0]], k): v for k, v in weights.items()})
    standard = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}  # as vit.standardise
    return model, BlipProcessor(BlipImageProcessor(size={"height": size, "width": size}, **standard), BertTokenizer(vocab=at, bos_token="[DEC]"))


SMALL_CLIP = {"embed_dim": 64, "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
              "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}}  # fmt: skip


def tiny(args) -> None:
    """Train the small BLIP, one per fold, and the small CLIP; write them as folders that load_blip and load_clip read."""
    quiet()
    machine, out, classes = vit.Machine(args.device, args.precision, args.seed), pathlib.Path(args.out), data.class_names(args.data)
    images, labels = data.load(args.data, "train", machine.device, args.limit)
    if args.folds < 2:
        sys.exit("--folds must be at least 2: with one, every training image would be captioned by a model that has seen its label")
    if vit.read_checkpoint(args.checkpoint)["settings"].get("stage") != "pretrain":
        sys.exit(f"{args.checkpoint} was trained on labels; choose an encoder that has seen none, from `ssl.py pretrain`")
    encoder, truth = vit.make_encoder(args, args.checkpoint), sentences(images, labels, classes)
    if args.stem:
        sys.exit(f"{args.checkpoint} was made with --stem, which BLIP's image tower has not; choose an encoder without")
    if args.enlarge % args.patch:
        sys.exit(f"--enlarge {args.enlarge} is not a whole number of {args.patch}-pixel patches")
    turn = torch.arange(len(images), device=machine.device) % args.folds
    for fold in range(args.folds):
        model, processor = small_blip(encoder, classes, args.enlarge)
        parallel = machine.parallel(model.to(machine.device))
        ids = processor.tokenizer(truth, return_tensors="pt", return_token_type_ids=False)["input_ids"].to(machine.device)  # [n, L + 2]
        ids[:, 0] = model.config.text_config.bos_token_id
        weight = torch.ones(model.config.text_config.vocab_size, device=machine.device)
        weight[-len(classes) :] = 8.0  # the one word that is hard to find
        others = (turn != fold).nonzero()[:, 0]
        run = vit.Run(args, f"tiny_blip_{fold}", model, machine, len(others) // args.batch)
        for _ in run.epochs():
            for i in run.steps(data.shuffled_batches(len(others), args.batch, run.generator)):
                index = others[i]  # [B]
                shifted = (255 * data.crop_flip(images[index], run.generator)).round().byte()  # the processor takes pixels of 0 to 255
                index, shifted = machine.part(index, shifted)
                pixels = pixel_values(processor, shifted)
                with machine.autocast():
                    logits = parallel(pixel_values=pixels, input_ids=ids[index]).logits.float()  # [B, L + 2, V]
                target = ids[index, 1:]  # [B, L + 1]: every word from those before it
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten(), weight)
                loss.backward()
                right = (logits[:, :-1].argmax(dim=2) == target).float()
                run.step(loss=loss, words=right.mean(), train=right[:, 1].mean())  # the, class word
        if vit.RANK:
            continue
        try:
            model.save_pretrained(out / f"tiny_blip_{fold}")
            processor.save_pretrained(out / f"tiny_blip_{fold}")
        except Exception as error:  # a full disk; the library raises several kinds
            sys.exit(f"can't write {out / f'tiny_blip_{fold}'} ({first_line(error)}); free some space, then type the same command")

    import open_clip  # only here: it takes seconds

    model = open_clip.CLIP(**SMALL_CLIP).to(machine.device)
    parallel = machine.parallel(model)
    tokens = open_clip.SimpleTokenizer(context_length=SMALL_CLIP["text_cfg"]["context_length"])(truth).to(machine.device)  # [n, 16]
    contrast = open_clip.ClipLoss()
    run = vit.Run(argparse.Namespace(**vars(args) | {"epochs": 1}), "tiny_clip", model, machine, len(images) // args.batch)
    for _ in run.epochs():
        for index in run.steps(data.shuffled_batches(len(images), args.batch, run.generator)):
            pixels, words = machine.part(vit.standardise(data.crop_flip(images[index], run.generator)), tokens[index])
            with machine.autocast():
                picture, text, scale = parallel(pixels, words)
            loss = contrast(machine.gather(picture.float()), machine.gather(text.float()), scale)
            loss.backward()
            run.step(loss=loss)
    folder = out / "tiny_clip"
    vit.write_file(folder / "open_clip_config.json", json.dumps({"model_cfg": SMALL_CLIP}).encode())
    vit.write_tensors(folder / "open_clip_pytorch_model.bin", model.state_dict())


# ----------------------------------------------------------------------------------------------------------------------
# Part 5: fusion and its controls
# ----------------------------------------------------------------------------------------------------------------------


class Text:
    """The embeddings of captions by (split, index), on the device: states [U, L, E], which are words [U, L], whose CLIP made them."""

    def __init__(self, args, captions: dict[tuple[str, int], str], device: torch.device):
        self.captions = captions
        self.place, states, self.words, self.clip = read_embeddings(embeddings_path(args))
        if not states or set(captions.values()) - self.place.keys():
            sys.exit(f"not all of these captions are embedded; `python multimodal.py embed --captions {args.captions} --out {args.out}` does it")
        if args.text == "pooled":
            states = [s[-1:] for s in states]  # the end-of-text token's alone, CLIP's vector for the whole caption: L = 1
        self.states = nn.utils.rnn.pad_sequence(states, batch_first=True).to(device)
        self.is_word = (torch.arange(self.states.shape[1]) < torch.tensor([len(s) for s in states])[:, None]).to(device)

    def of(self, split: str, number: int, control: str | None):
        """The captions that the first `number` images of a split get, and a function from indices [B] of these images to what
        Fusion.forward takes: embeddings [B, L, E] and which are words [B, L]; for the control image_only twice None."""
        captions = captions_of(self.captions, split, number)
        if control == "shuffled":
            captions = captions[1:] + captions[:1]  # every image gets its neighbour's; neighbours have nothing in common
        at = torch.tensor([self.place[c] for c in captions], device=self.states.device)  # [n]
        if control == "image_only":
            return captions, lambda index: (None, None)
        return captions, lambda index: (self.states[at[index]].float(), self.is_word[at[index]])


def predict(model: Fusion, images: torch.Tensor, text, machine: vit.Machine) -> torch.Tensor:
    """Class logits [n, K], float32, of static videos of uint8 images [n, 3, S, S] with their captions (text: the function from Text.of)."""
    model.eval()
    with torch.no_grad(), machine.autocast():
        return machine.shared_out(len(images), machine.eval_batch, lambda index: model(images[index].float() / 255, *text(index)).float())


def fuse(args) -> None:
    """Fine-tune the video model with the cross-attention block, and train its controls; judge on static videos with captions."""
    header, captions, _ = read_captions(args.captions)
    about = data.describe(args.data)
    if header["dataset"] != about["dataset"]:
        sys.exit(f"{args.captions} holds captions of {header['dataset']}, not of {about['dataset']}")
    if args.name and len(args.control) > 1:
        sys.exit("--name is for one --control; leave it out, and each row is called after what it is")
    args.checkpoint = args.checkpoint or str(pathlib.Path(args.out) / f"video_encoder_{args.blocks}.pt")
    args.blocks = len(video.load_video(args.checkpoint).blocks)
    machine = vit.Machine(args.device, args.precision, args.seed)
    splits = {split: data.load(args.data, split, machine.device, args.limit) for split in ("train", "validation", args.split)}
    text = Text(args, captions, machine.device)
    args.clip = text.clip  # goes into the checkpoint: other embeddings are another run
    for control in args.control:
        start = video.load_video(args.checkpoint)
        torch.manual_seed(args.seed)  # so that a row does not depend on those before it
        own = argparse.Namespace(**vars(args) | {"control": None if control == "none" else control})
        fuse_one(own, start, header, about, splits, text, machine)


def fuse_one(args, start: video.FactorisedEncoder, header: dict, about: dict, splits: dict, text: Text, machine: vit.Machine) -> None:
    """One row of `fuse`, from the video model `start`. `splits`: images and labels by split."""
    variant = (args.blocks == 1 and "1", header.get("seen") and "seen", args.text == "tokens" and "tokens", args.control)
    name = args.name or "_".join(["fusion", header["captioner"], *filter(None, variant)])
    (images, labels), (validation, truth) = splits["train"], splits["validation"]
    _, of_train = text.of("train", len(images), args.control)
    _, of_validation = text.of("validation", len(validation), args.control)
    model = Fusion(start, text.states.shape[2], image=args.control != "text_only").to(machine.device)
    parallel = machine.parallel(model, some_idle=True)
    cutmix = 0.0 if args.control == "text_only" else args.cutmix  # without the image nothing could tell what was mixed in

    run = vit.Run(args, name, model, machine, len(images) // args.batch)
    for _ in run.epochs():
        for index in run.steps(data.shuffled_batches(len(images), args.batch, run.generator)):
            # a mixed image keeps the caption of the image that it was pasted into
            x, other, share = data.cutmix(data.crop_flip(images[index], run.generator), labels[index], run.generator, cutmix)
            x, other, index = machine.part(x, other, index)
            with machine.autocast():
                logits = parallel(x, *of_train(index))  # [B, K]
            loss = data.cutmix_loss(logits, labels[index], other, share, args.smoothing)
            loss.backward()
            run.step(loss=loss, train=(logits.argmax(1) == labels[index]).float().mean())
        run.note(validation=vit.accuracy(predict(model, validation, of_validation, machine), truth))

    kept = vit.arrays_path(args, name)
    if kept.exists() and vit.measured(args, name, run.path):
        return
    images, labels = splits[args.split]
    read, of_images = text.of(args.split, len(images), args.control)  # the captions that the model reads: with shuffled, not the images' own
    logits = predict(model, images, of_images, machine)
    shown = torch.cat([(labels == k).nonzero()[:2, 0] for k in labels.unique()])  # for the figures: the first two images of each class
    arrays = {"guess": logits.argmax(1), "labels": labels, "shown": shown, "images": images[shown],
              "captions": [read[i] for i in shown.tolist()]}  # fmt: skip
    if args.text == "tokens" and args.control != "image_only":
        trace = []
        with torch.no_grad():
            model(images[shown].float() / 255, *of_images(shown), trace)
        weights = trace[0].mean(dim=1)[:, 0]  # [B, H, 1, L] -> [B, L], the mean of the heads
        arrays |= {"weights": weights, "words": [text.words[text.place[caption]] for caption in arrays["captions"]]}
    vit.write_npz(kept, **arrays)
    vit.record(args, name, machine, about, value=vit.accuracy(logits, labels), captioner=header["captioner"], model=header["model"],
               clip=text.clip, report=REPORT if name in ("fusion_blip", "fusion_tiny") else None, train=run.history["train"][-1],
               validation=run.history["validation"][-1], epochs=run.epoch, seconds=run.seconds, weights=vit.fingerprint(run.path))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    common, blip = vit.common_arguments(), argparse.ArgumentParser(add_help=False)
    blip.add_argument("--blip", default="Salesforce/blip-image-captioning-base", help="model id or folder (default: %(default)s)")
    blip.add_argument("--revision", help="of that model id: a branch, tag or commit (default: the newest)")

    p = stages.add_parser("captioner", parents=[common, blip], help=captioner.__doc__)
    p.set_defaults(run=captioner)

    p = stages.add_parser("tiny", parents=[common, vit.training_arguments(epochs=15, lr=1e-3)], help=tiny.__doc__)
    p.add_argument("--checkpoint", metavar="FILE", required=True, help="start BLIP's image tower from this encoder; one that has seen no labels")
    p.add_argument("--folds", type=vit.positive, default=2, help="parts of the images, a small BLIP for each (default: %(default)s)")
    p.add_argument("--enlarge", type=vit.positive, default=48, help="pixels to which the small BLIP enlarges images (default: %(default)s)")
    p.set_defaults(run=tiny)

    p = stages.add_parser("caption", parents=[common, blip], help="caption every image")
    p.add_argument("--captioner", choices=["auto", "blip", "tiny"], default="auto", help="default: blip with a CUDA GPU and the weights, else tiny")
    p.add_argument("--seen", action="store_true", help="tiny: let every training image be captioned by a model that has seen its label")
    p.add_argument("--beams", type=vit.positive, default=1, help="of beam search (default: 1, greedy)")
    p.add_argument("--max-new-tokens", type=vit.positive, default=20, help="longest caption (default: %(default)s)")
    p.add_argument("--batch", type=vit.positive, default=250, help="images at a time (default: %(default)s)")
    p.add_argument("--fresh", action="store_true", help="start over instead of going on")
    p.set_defaults(run=caption)

    p = stages.add_parser("embed", parents=[common], help="embed the distinct captions of a file")
    p.add_argument("--captions", metavar="FILE", required=True, help="caption file, from here or from another machine")
    p.add_argument("--clip", help='open_clip architecture, or "local-dir:FOLDER" (default: the small CLIP for tiny captions, else ViT-B-32)')
    p.add_argument("--clip-weights", default=CLIP[1], help="tag or file of its weights (default: %(default)s)")
    p.set_defaults(run=embed)

    p = stages.add_parser("fuse", parents=[common, vit.training_arguments(epochs=25, lr=5e-4)], help="train on images with captions")
    p.add_argument("--captions", metavar="FILE", required=True, help="caption file, embedded before")
    p.add_argument("--blocks", type=vit.positive, default=2, help="start from OUT/video_encoder_BLOCKS.pt (default: %(default)s)")
    p.add_argument("--checkpoint", metavar="FILE", help="or start from the video model in this checkpoint")
    p.add_argument("--text", choices=["pooled", "tokens"], default="pooled", help="one vector a caption, or one a word (default: %(default)s)")
    p.add_argument("--control", choices=["none", "image_only", "text_only", "shuffled"], nargs="+", default=["none"],
                   help="leave out the text or the image, or mix up the captions; several are trained one after another (default: none)")  # fmt: skip
    p.add_argument("--cutmix", type=vit.between(0, 1), default=0.0, help="share of batches mixed by CutMix (default: none)")
    p.add_argument("--smoothing", type=vit.between(0, 1), default=0.1, help="label smoothing (default: %(default)s)")
    p.set_defaults(run=fuse)
    vit.command(parser)


if __name__ == "__main__":
    main()
