"""Stage 3: language. An image's caption, as a vector, joins the video model through a cross-attention block.

    image --BLIP--> caption --CLIP's text tower--> embedding --linear--> keys, values --+
                                                                                        |
    image, as a static video --video.py's model--> its temporal CLS ---------> query ---+
                                                                                        |
                                              class <--linear-- cross-attention block <-+

Part 1, the network (read this first):   CrossAttention -> CrossBlock -> Fusion
Part 2, captions:                        BLIP, the caption file
Part 3, embeddings:                      CLIP's text tower
Part 4, without downloads:               a small BLIP and a small CLIP of the same classes, trained here
Part 5, fusion and its controls:         does the caption help, or does it merely answer?

Depends on vit.py, data.py and video.py: copy this file with those three. (CrossBlock alone needs only torch
and vit.init_linear.) It continues from video.py's model. `tiny` is for where BLIP can't be downloaded, or
would take a night:

    python video.py --checkpoint runs/mine/m.pt --blocks 1 --epochs 4
    python multimodal.py tiny --checkpoint runs/mine/m.pt --epochs 2 --frozen 4 --enlarge 40
    python multimodal.py caption --captioner tiny
    python multimodal.py embed --captions runs/mine/captions_tiny.jsonl
    python multimodal.py fuse --captions runs/mine/captions_tiny.jsonl --blocks 1 --epochs 1

Papers: Li et al. 2022 (BLIP), Radford et al. 2021 (CLIP), Cherti et al. 2023 (open_clip), Vaswani et al. 2017
(attention). Shape letters as in vit.py; also U distinct captions, L words (tokens) of a caption, E width of
CLIP's embedding.
"""

from __future__ import annotations

import argparse
import copy
import errno
import functools
import json
import logging
import pathlib
import re
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import data
import video
import vit

REPORTED = {"fusion_blip": 0.7013}  # the coursework report's test accuracy, with BLIP's captions
SPLITS = ("train", "validation", "test")

# ---------------------------------------------------------------- Part 1: the network


class CrossAttention(nn.Module):
    """Multi-head cross-attention (Vaswani et al. 2017, section 3.2.3): x asks, the text answers.

        softmax(Q K^T / sqrt(D / H)) V,     Q = x W_q,   K = text W_k,   V = text W_v

    The softmax shares out a total of one among the keys. A single key, which is all that a pooled text vector
    gives, has the weight 1 whatever the query is: every x gets the same text W_v, and W_q and W_k get no
    gradient. So attention chooses only among several keys: the words of a caption (--text tokens).
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} can't be shared out evenly among {heads} heads")
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, text: Tensor, is_word: Tensor | None = None):
        """x: [B, T, D], text: [B, L, D], is_word: [B, L], False where there is only padding
        -> [B, T, D], attention weights [B, H, T, L]."""
        B, T, D = x.shape
        q = self.q(x).view(B, T, self.heads, -1).transpose(1, 2)  # [B, H, T, D/H]
        kv = self.kv(text).view(B, -1, 2, self.heads, D // self.heads)  # [B, L, 2, H, D/H]
        k, v = kv.permute(2, 0, 3, 1, 4)  # each [B, H, L, D/H]
        scores = q @ k.transpose(-2, -1) * (D // self.heads) ** -0.5  # [B, H, T, L]
        if is_word is not None:
            scores = scores.masked_fill(~is_word[:, None, None, :], -torch.inf)  # [B, 1, 1, L]
        weights = scores.softmax(dim=-1)
        out = weights @ v  # [B, H, T, D/H]
        out = out.transpose(1, 2).reshape(B, T, D)  # [B, T, H, D/H] -> [B, T, D]
        return self.proj(out), weights


class CrossBlock(nn.Module):
    """A whole pre-norm transformer block whose attention reads from the text:

        x = x + cross_attention(norm(x), norm(text))
        x = x + mlp(norm(x))

    What is added starts at zero (its last layers do), so a trained network that gets this block put on top
    starts out unchanged and learns how much to let in. The last layers' own gradient is not zero, so they
    leave zero in the first step; those behind them follow in the second.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: int = 4):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm_text = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn = CrossAttention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))
        self.apply(vit.init_linear)
        nn.init.zeros_(self.attn.proj.weight)
        nn.init.zeros_(self.mlp[2].weight)

    def forward(self, x: Tensor, text: Tensor | None, is_word: Tensor | None = None, trace=None) -> Tensor:
        """x: [B, T, D], text: [B, L, D] (None: only the MLP works), is_word: [B, L] -> [B, T, D].
        `trace`, a list, receives the attention weights [B, H, T, L]."""
        if text is not None:
            update, weights = self.attn(self.norm1(x), self.norm_text(text), is_word)
            x = x + update
            if trace is not None:
                trace.append(weights)
        return x + self.mlp(self.norm2(x))


class Fusion(nn.Module):
    """The video model with a cross-attention block after its last spatio-temporal block.

    Of the video model's tokens only the temporal CLS asks: the class is read from it, and no later block
    would read what the others had learned from the text. Two controls see less: with `image=False` a learned
    vector asks in place of the image, with `text=False` nothing is asked.
    """

    def __init__(self, model: video.FactorisedEncoder, text_dim: int, image: bool = True, text: bool = True):
        super().__init__()
        dim = model.encoder.config["dim"]
        self.video = model
        self.sees_image, self.sees_text = image, text
        self.project = nn.Linear(text_dim, dim)
        self.block = CrossBlock(dim, model.encoder.config["heads"])
        if not image:
            self.cls = nn.Parameter(0.02 * torch.randn(1, 1, dim))

    @property
    def encoder(self) -> vit.ViT:
        """The image encoder, as in every model of this project."""
        return self.video.encoder

    def forward(self, images: Tensor, text: Tensor, is_word: Tensor | None = None, trace=None) -> Tensor:
        """Static videos of one image each, [B, 3, S, S]; text [B, L, E], is_word [B, L] -> logits [B, K]."""
        if self.sees_image:
            first = torch.zeros(len(images), self.video.frames, dtype=torch.long, device=images.device)
            tokens, _ = self.video.tokens(images[:, None], first)  # [B, 1 + F, D]
            x = tokens[:, :1]  # CLS, [B, 1, D]
        else:
            x = self.cls.expand(len(images), -1, -1)  # [B, 1, D]
        text = self.project(text) if self.sees_text else None  # [B, L, D]
        x = self.block(x, text, is_word, trace)
        return self.video.head(self.video.norm(x[:, 0]))


# ---------------------------------------------------------------- Part 2: captions


NO_BLIP = 3  # exit code: run_all.sh then goes on with the small captioner, but after no other failure


def load_blip(name: str, revision: str | None, device: torch.device):
    """(model, processor) of a BLIP captioner on Hugging Face's hub or in a folder. SystemExit where it can't
    be had, or lacks weights: the library would fill them in at random."""
    import transformers

    quiet()
    load = transformers.BlipForConditionalGeneration.from_pretrained
    try:
        processor = transformers.BlipProcessor.from_pretrained(name, revision=revision)
        model, found = load(name, revision=revision, output_loading_info=True)
    except Exception as error:  # offline and not cached, no such model, not a model: many kinds of error
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            sys.exit(f"can't store the captioner {name}: {error.strerror}; make room, type the same command")
        advice = f"`hf download {name} --exclude tf_model.h5` fetches it; or choose --captioner tiny"
        print(f"can't load the captioner {name} ({first_line(error)}); {advice}", file=sys.stderr)
        sys.exit(NO_BLIP)
    if found["missing_keys"]:
        sys.exit(f"{name} is no BLIP captioner: it has no weights for {sorted(found['missing_keys'])[0]}")
    return model.to(device).eval(), processor


def quiet() -> None:
    """Silence the libraries' remarks and bars (except for downloads): what matters becomes one sentence."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    enable_progress_bars()
    logging.disable(logging.ERROR)


def first_line(error: BaseException) -> str:
    """What a library's error says first, without its paragraphs of advice (some begin with a bare colon)."""
    lines = [line.strip(" :") for line in str(error).splitlines()]
    return next((line for line in lines if re.search("[a-z]{3}", line)), type(error).__name__)


def pixel_values(processor, images: Tensor) -> Tensor:
    """What BLIP sees of uint8 images [B, 3, S, S]: enlarged and standardised, float [B, 3, S', S']."""
    device = images.device
    images = images.cpu() if device.type == "mps" else images  # not every PyTorch can enlarge this way there
    return processor(images=images, return_tensors="pt")["pixel_values"].to(device)


def describe(model, processor, images: Tensor, machine: vit.Machine) -> list[str]:
    """The captions, of at most 20 tokens each (as in BLIP's own captioning), of uint8 images [n, 3, S, S];
    each word the likeliest next."""
    longest = min(20, model.config.text_config.max_position_embeddings - 1)  # small BLIPs have few positions
    with torch.no_grad(), machine.autocast():
        pixels = pixel_values(processor, images)
        tokens = model.generate(pixel_values=pixels, num_beams=1, max_new_tokens=longest)
    return [caption.strip() for caption in processor.batch_decode(tokens, skip_special_tokens=True)]


def read_captions(path: str | pathlib.Path) -> tuple[dict, dict[str, str]]:
    """A caption file's header, and its captions by image. One JSON object a line: first what made them, then
    {"image", "caption"}. SystemExit if it is no such file.

    An image is known by a hash of its pixels (data.image_keys), not by its number: the same data set may be
    in another order on another machine, and then every caption would belong to another image.
    """
    try:
        *lines, last = pathlib.Path(path).read_bytes().split(b"\n")
    except OSError:
        command = "python multimodal.py caption --captioner tiny"
        sys.exit(f"there is no caption file {path}; `{command}` writes one")
    if last.endswith(b"}"):  # no newline at the end: left out by an editor; any other such line is torn
        lines.append(last)
    try:
        header, *captions = [json.loads(line) for line in lines if line.strip()]
        if not {"captioner", "model"} <= set(header):
            raise ValueError("no header")
        return header, {line["image"]: line["caption"] for line in captions}
    except (ValueError, KeyError, TypeError):
        sys.exit(f"{path} is not a caption file: one line of JSON on the captioner, then one a caption")


def write_captions(path: pathlib.Path, header: dict, captions: dict[str, str]) -> None:
    """The inverse of read_captions, all or nothing."""
    lines = [header] + [{"image": key, "caption": caption} for key, caption in captions.items()]
    vit.write_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def captions_of(captions: dict[str, str], images: Tensor, split: str, path: str) -> list[str]:
    """The caption of each of a split's images. SystemExit where an image has none."""
    keys = data.image_keys(images)
    missing = sum(key not in captions for key in keys)
    if missing:
        why = f"{path} has no caption for {missing:,} of {len(keys):,} {split} images"
        sys.exit(f"{why}: it was made of other images, or `multimodal.py caption` has not finished it")
    return [captions[key] for key in keys]


SYNONYMS = {
    "airplane": "plane jet aircraft airliner biplane",
    "automobile": "car sedan suv",
    "cat": "kitten",
    "deer": "elk moose antelope",
    "dog": "puppy",
    "frog": "toad",
    "horse": "pony",
    "ship": "boat ferry sailboat yacht",
    "truck": "lorry",
}


def named_class(caption: str, classes: list[str]) -> int:
    """The label of the first word that names a class, by itself or a synonym, or in plural; -1 if none."""
    for word in re.findall("[a-z]+", caption.lower()):
        for label, name in enumerate(classes):
            names = [name, *SYNONYMS.get(name, "").split()]
            if word in names or word.removesuffix("s") in names:
                return label
    return -1


def small_blips(out: str, images: Tensor, labels: Tensor) -> list[str]:
    """The folders of the small BLIPs, by fold. SystemExit unless all are there, of one run, finished, and
    trained on these training images (in another order an image's captioner might have seen it)."""
    first = pathlib.Path(out, "tiny_blip_0.pt")
    settings = vit.read_checkpoint(first)["settings"] if first.exists() else {"folds": 1}
    folders = [f"{out}/tiny_blip_{fold}" for fold in range(settings["folds"])]
    for folder in folders:
        written = pathlib.Path(folder, "model.safetensors").exists()
        state = vit.read_checkpoint(f"{folder}.pt") if written else None
        if not written or not state["finished"] or state["settings"] != settings:
            train = f"python multimodal.py tiny --checkpoint ENCODER.pt --out {out}"
            sys.exit(f"{folder} is not trained yet; `{train}` does it")
    if settings["images"] != data.fingerprint(images, labels):
        again = f"python multimodal.py tiny --fresh --checkpoint ENCODER.pt --out {out}"
        sys.exit(f"{first} was made with another images (--data or --limit); `{again}` makes it of these")
    return folders


def caption(args: argparse.Namespace) -> None:
    """Caption every image of the three splits; as a row, how often the caption names the right class."""
    machine, about = vit.set_up(args.device, args.precision, args.seed), data.source(args.data)
    images, labels, keys = {}, {}, {}  # of each split
    for split in SPLITS:
        images[split], labels[split] = data.load(args.data, split, limit=args.limit)
        keys[split] = data.image_keys(images[split])
    name = f"captions_{args.captioner}"
    header = {"captioner": args.captioner, "dataset": about.name}
    if args.captioner == "blip":
        if args.seen:
            sys.exit("--seen is for the small captioners, which are trained here on the labels")
        models = [args.blip]
        header |= {"model": args.blip, "revision": args.revision}
    else:
        models = small_blips(args.out, images["train"], labels["train"])
        weights = vit.hash_of_files(*[f"{folder}/model.safetensors" for folder in models])
        header |= {"model": "small BLIP trained here", "seen": args.seen, "weights": weights}
        name += "_seen" if args.seen else ""
    name = args.name or name
    path = pathlib.Path(args.out, f"{name}.jsonl")
    captions = {}
    if path.exists() and not args.fresh:
        before, captions = read_captions(path)
        vit.refuse_other_settings(path, before, header)
        if captions and not any(key in captions for split in SPLITS for key in keys[split]):
            sys.exit(f"{path} holds captions of other images only; --fresh replaces them, --name keeps them")

    load = functools.cache(load_blip)  # once each, when it is needed
    saved = time.perf_counter()
    for split in SPLITS:
        left = [i for i, key in enumerate(keys[split]) if key not in captions]
        progress = vit.Progress(f"{split} captions", len(left))
        for fold, folder in enumerate(models):
            own = [i for i in left if fold == fold_of_captioner(i, len(models), args.seen)]
            for start in range(0, len(own), args.batch):
                index = own[start : start + args.batch]
                model, processor = load(folder, args.revision, machine.device)
                found = describe(model, processor, images[split][index].to(machine.device), machine)
                captions |= {keys[split][i]: text for i, text in zip(index, found)}
                progress.advance(len(index))
                if time.perf_counter() - saved > 10:  # seconds: no accident costs more
                    write_captions(path, header, captions)
                    saved = time.perf_counter()
        if left:
            write_captions(path, header, captions)

    row = {"captioner": args.captioner, "model": header["model"], "words": vit.hash_of_files(path)}
    row["images"] = data.fingerprint(images[args.split], labels[args.split])
    for split in dict.fromkeys(("train", "validation", args.split)):  # test: only if asked
        named = [named_class(captions[key], about.classes) for key in keys[split]]
        named = torch.tensor(named)  # [n]
        row[f"{split}_right"] = (named == labels[split]).float().mean().item()
        row[f"{split}_silent"] = (named < 0).float().mean().item()  # names no class
    vit.record(args, name, machine, about, value=row[f"{args.split}_right"], **row)


def fold_of_captioner(index: int, folds: int, seen: bool) -> int:
    """Which of the small BLIPs captions the image of this number: that of its own fold, which was trained on
    all others and has not seen it (see Part 4), or, to see what that is good for, the next, which has."""
    fold = index % folds
    return (fold + 1) % folds if seen else fold


# ---------------------------------------------------------------- Part 3: embeddings


def load_clip(name: str, weights: str | None):
    """(CLIP model on the CPU, tokenizer): an open_clip architecture with the tag or file of its weights, or
    "local-dir:FOLDER". SystemExit where it can't be had."""
    import open_clip

    quiet()
    local = name.startswith("local-dir:")
    try:
        model = open_clip.create_model(name, None if local else weights, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # offline, no such model or file, not weights: open_clip raises many kinds
        hub = (open_clip.get_pretrained_cfg(name, weights) or {}).get("hf_hub", "").strip("/")
        advice = "name a file with --clip-weights"
        if local:
            advice = "`python multimodal.py tiny --checkpoint ENCODER.pt` trains one into --out"
        elif hub:
            advice = f"`hf download {hub} --include 'open_clip*'` fetches it; or {advice}"
        sys.exit(f"can't load the CLIP {name} with weights {weights} ({first_line(error)}); {advice}")
    if not (torch.is_tensor(getattr(model, "text_projection", None)) and hasattr(tokenizer, "decode")):
        sys.exit(f"the text tower of {name} is built otherwise than CLIP's; choose another --clip")
    return model.eval(), tokenizer


@torch.no_grad()
def embed_words(model, tokenizer, captions: list[str]) -> dict[str, tuple[str, Tensor]]:
    """What CLIP makes of a caption: its L words as CLIP reads them, joined by spaces, and a unit vector for
    each, [L, E]. The last, the end-of-text token's, is what CLIP itself takes for the whole caption (its
    encode_text). CLIP's projection was trained on that one alone; what it makes of the other words is not in
    the space that CLIP shares with images, but tells the words apart, which is all that keys and values
    need."""
    tokens = tokenizer(captions)  # [u, context length]
    length = tokens.argmax(dim=1) + 1  # the end-of-text token is the largest number; behind it are zeros
    seen = []  # what encode_text has for every word before it picks the last
    hook = model.ln_final.register_forward_hook(lambda _, __, states: seen.append(states))
    model.encode_text(tokens.to(model.text_projection.device))
    hook.remove()
    states = F.normalize(seen[0].float() @ model.text_projection.float(), dim=-1)  # [u, context length, E]
    found = {}
    for caption, ids, state, n in zip(captions, tokens.tolist(), states.cpu(), length.tolist()):
        words = [tokenizer.decode([i]).strip() for i in ids[1 : n - 1]]
        found[caption] = (" ".join(["<start>", *words, "<end>"]), state[:n])
    return found


def embed(args: argparse.Namespace) -> None:
    """Embed every distinct caption of a file once; writes out/NAME_OF_THE_FILE_clip.pt."""
    header, captions = read_captions(args.captions)
    usual = f"local-dir:{args.out}/tiny_clip" if header["captioner"] == "tiny" else "ViT-B-32"
    name = args.clip or usual
    clip = f"{name} {args.clip_weights} {vit.hash_of_files(args.clip_weights)}"
    if name.startswith("local-dir:"):
        folder = pathlib.Path(name.removeprefix("local-dir:"))
        clip = f"{folder.name} {vit.hash_of_files(*sorted(folder.glob('*')))}"
    path = embeddings_path(args.out, args.captions)
    used, embedded = read_embeddings(path)
    embedded = embedded if used == clip else {}
    new = [c for c in dict.fromkeys(captions.values()) if c not in embedded]
    print(f"{len(captions):,} captions, {len(new):,} to embed with {name}, each once")
    if not new:
        return
    machine = vit.set_up(args.device, "float32", args.seed)
    model, tokenizer = load_clip(name, args.clip_weights)
    model.visual = None  # only the text tower is used
    model.to(machine.device)
    progress = vit.Progress("captions", len(new))
    for start in range(0, len(new), 256):
        some = new[start : start + 256]
        embedded |= embed_words(model, tokenizer, some)
        progress.advance(len(some))
    # in float16, and as views of one tensor, which torch.save writes as one piece of the file
    lengths = [len(states) for _, states in embedded.values()]
    pieces = torch.cat([states for _, states in embedded.values()]).half().split(lengths)
    embedded = {caption: (words, piece) for (caption, (words, _)), piece in zip(embedded.items(), pieces)}
    vit.write_tensors(path, {"clip": clip, "embedded": embedded})
    print(f"wrote {path}")


def embeddings_path(out: str, captions: str) -> pathlib.Path:
    """Where the embeddings of a caption file lie."""
    return pathlib.Path(out, pathlib.Path(captions).stem + "_clip.pt")


def read_embeddings(path: pathlib.Path) -> tuple[str, dict[str, tuple[str, Tensor]]]:
    """Which CLIP made them, and what embed_words found, in float16; empty where there is no file."""
    stored = torch.load(path, weights_only=True) if path.exists() else {"clip": "", "embedded": {}}
    return stored["clip"], stored["embedded"]


# ---------------------------------------------------------------- Part 4: without downloads
# A BLIP and a CLIP small enough to train here, on sentences made from the label and a few measured words.
# They know nothing that the training images don't hold, so expect of their captions what a second opinion
# brings, no more; what the real BLIP adds is knowledge from outside.
#
# A captioner trained on an image's label remembers it and writes it into the caption. Fusion training on such
# captions would learn to copy the class word, which is right there and often wrong on new images. So the
# training images are dealt out to k folds, fold f's captioner is trained on all the others, and captions fold
# f: no image is captioned by a model that has seen it. (The real BLIP may have met some of CIFAR-10's images
# on the web, beside words that name what they show; it has not been trained on these labels.)

HUES = "red yellow green cyan blue purple".split()


def sentences(images: Tensor, labels: Tensor, classes: list[str]) -> list[str]:
    """One sentence an image, "the cat on dark green far away": the class from the label, the rest measured.
    images: uint8 [n, 3, S, S], labels [n].

    Ground: brightness and hue of the mean colour of a rim of S/8 pixels. Close up: most of the image has
    another colour. The class word comes first, so that no word before it hints at it. The two
    thresholds (another colour: 0.2 from the ground's; grey: channels within 0.06) were set by looking at 50
    images, and nothing depends on them but these words.
    """
    x = images.float() / 255
    edge = images.shape[-1] // 8
    rim = torch.ones(images.shape[-2:], dtype=torch.bool, device=x.device)  # [S, S]
    rim[edge:-edge, edge:-edge] = False
    ground = x[:, :, rim].mean(dim=2)  # [n, 3]
    close = ((x - ground[:, :, None, None]).abs().mean(dim=1) > 0.2).float().mean(dim=(1, 2)) > 0.5  # [n]
    bright = ground.mean(dim=1) > 0.5  # [n]
    grey = ground.amax(dim=1) - ground.amin(dim=1) <= 0.06  # [n]
    r, g, b = ground.unbind(dim=1)
    angle = torch.atan2(3**0.5 * (g - b), 2 * r - g - b)  # [n], of the colour circle, in radians
    hue = (angle / (torch.pi / 3)).round().long() % 6  # [n], in steps of 60 degrees
    found = []
    for k, h, is_grey, is_bright, is_close in torch.stack([labels, hue, grey, bright, close], 1).tolist():
        colour = "grey" if is_grey else HUES[h]
        light = "bright" if is_bright else "dark"
        distance = "close up" if is_close else "far away"
        found.append(f"the {classes[k]} on {light} {colour} {distance}")
    return found


def small_blip(encoder: vit.ViT, classes: list[str], size: int):
    """(BLIP model, processor) whose image tower is our `encoder`, weights and all, looking at images enlarged
    to `size` pixels: patches of 8 pixels then show less of the image each, so it sees details that our 16
    patches blur, and errs elsewhere than the image model. (The real BLIP enlarges to 384 pixels.)"""
    import transformers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    words = ["the", "on", "bright", "dark", "grey", *HUES, "close", "up", "far", "away", *classes]
    number = {word: i for i, word in enumerate(special + words)}
    ours = encoder.config
    D = ours["dim"]
    both = {"hidden_size": D, "intermediate_size": 4 * D, "num_attention_heads": ours["heads"]}
    image = {"image_size": size, "patch_size": ours["patch_size"], "num_hidden_layers": ours["depth"]}
    text = {"vocab_size": len(number), "num_hidden_layers": 2, "encoder_hidden_size": D}
    text |= {"max_position_embeddings": 16, "bos_token_id": number["[DEC]"], "pad_token_id": number["[PAD]"]}
    text |= {"eos_token_id": number["[SEP]"], "sep_token_id": number["[SEP]"]}
    config = transformers.BlipConfig(vision_config=both | image, text_config=both | text)
    model = transformers.BlipForConditionalGeneration(config)
    copy_encoder(encoder, model.vision_model)

    look = {"size": {"height": size, "width": size}}
    look |= {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}  # as vit.standardise
    tokenizer = transformers.BertTokenizer(vocab=number, bos_token="[DEC]")
    return model, transformers.BlipProcessor(transformers.BlipImageProcessor(**look), tokenizer)


@torch.no_grad()
def copy_encoder(encoder: vit.ViT, tower: nn.Module) -> None:
    """Copy our encoder into BLIP's image tower, whose images may be larger: positions are interpolated."""
    ends = tower.embeddings
    pairs = [(encoder.patch_embedding, ends.patch_embedding), (encoder.norm, tower.post_layernorm)]
    for ours, theirs in zip(encoder.blocks, tower.encoder.layers):
        pairs += [(ours.norm1, theirs.layer_norm1), (ours.attn.qkv, theirs.self_attn.qkv)]
        pairs += [(ours.attn.proj, theirs.self_attn.projection), (ours.norm2, theirs.layer_norm2)]
        pairs += [(ours.mlp[0], theirs.mlp.fc1), (ours.mlp[2], theirs.mlp.fc2)]
    for ours, theirs in pairs:
        theirs.load_state_dict(ours.state_dict())
    side = encoder.config["image_size"] // encoder.config["patch_size"]
    new_side = int((ends.position_embedding.shape[1] - 1) ** 0.5)
    cls, grid = encoder.positions[:, :1], encoder.positions[:, 1:]  # [1, 1, D], [1, N, D]
    grid = grid.transpose(1, 2).unflatten(2, (side, side))  # [1, D, side, side]
    grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic")
    grid = grid.flatten(2).transpose(1, 2)  # [1, new N, D]
    ends.position_embedding.copy_(torch.cat([cls, grid], dim=1))
    ends.class_embedding.copy_(encoder.cls)


def train_small_blip(args, settings, fold: int, encoder: vit.ViT, images: Tensor, truth: list[str], machine):
    """Train one fold's captioner on the images of all other folds; writes the folder out/tiny_blip_FOLD."""
    classes = data.source(args.data).classes
    model, processor = small_blip(encoder, classes, args.enlarge)
    if args.frozen:  # the first blocks stay as they came: a step is cheaper, and few epochs teach more
        model.vision_model.embeddings.requires_grad_(False)
        model.vision_model.encoder.layers[: args.frozen].requires_grad_(False)
    parallel = vit.data_parallel(model.to(machine.device))
    ids = processor.tokenizer(truth, return_tensors="pt", return_token_type_ids=False)["input_ids"]
    ids = ids.to(machine.device)  # [n, L + 2]
    ids[:, 0] = model.config.text_config.bos_token_id
    weight = torch.ones(model.config.text_config.vocab_size, device=machine.device)  # [V], V words in all
    # of seven words and the end only the class is hard to find: it counts a little more than all others do
    # together; not tuned
    weight[-len(classes) :] = 8.0
    others = (torch.arange(len(images), device=machine.device) % args.folds != fold).nonzero()[:, 0]

    steps = vit.steps_of(len(others), args.batch)
    optimizer = vit.make_optimizer(model, args.optimizer, args.lr, args.weight_decay, machine.precision)
    schedule = LambdaLR(optimizer, lambda step: vit.warmup_cosine(step, args.epochs * steps, args.warmup))
    name = f"tiny_blip_{fold}"
    run = vit.Run(name, model, optimizer, schedule, machine, settings, **vit.plan_of(args, steps, args.batch))

    for _ in range(run.epoch, run.epochs):
        model.train()
        for i in data.shuffled_batches(len(others), args.batch, run.generator):
            index = others[i]  # [B]
            x = data.crop_flip(images[index], run.generator)  # [B, 3, S, S]
            x, words = vit.share(x), vit.share(ids[index])  # words: [B, L + 2]
            pixels = pixel_values(processor, (255 * x).round().byte())  # [B, 3, S', S']
            with run.machine.autocast():
                logits = parallel(pixel_values=pixels, input_ids=words).logits.float()  # [B, L + 2, V]
            guess = logits[:, :-1]  # [B, L + 1, V]
            target = words[:, 1:]  # [B, L + 1]: every word from those before
            loss = F.cross_entropy(guess.flatten(0, 1), target.flatten(), weight)
            loss.backward()
            # one absurd batch must not rule the momentum; 1 is the usual bound, not tuned
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            right = (guess.argmax(dim=2) == target).float()  # [B, L + 1]
            run.log(loss=loss, words=right.mean(), train=right[:, 1].mean())  # the second word is the class
        run.save()
    run.finish()
    if vit.RANK > 0:
        return
    folder = f"{args.out}/tiny_blip_{fold}"
    try:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    except Exception as error:  # a full disk; the library raises several kinds
        sys.exit(f"can't write {folder} ({first_line(error)}); free some space, then type the same command")


def small_clip(size: int) -> dict:
    """open_clip's configuration of a CLIP for images of `size` pixels, small enough to train in a minute; not
    tuned."""
    image = {"image_size": size, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    return {"embed_dim": 64, "vision_cfg": image, "text_cfg": text}


def train_small_clip(args, settings, images: Tensor, truth: list[str], machine: vit.Machine) -> None:
    """Train a small CLIP on images and sentences, for one epoch; writes the folder out/tiny_clip."""
    import open_clip  # only here: it takes seconds

    config = small_clip(images.shape[-1])
    model = open_clip.CLIP(**config).to(machine.device)
    parallel = vit.data_parallel(model)
    tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    tokens = tokenizer(truth).to(machine.device)  # [n, 16]
    contrast = open_clip.ClipLoss()

    steps = vit.steps_of(len(images), args.batch)
    optimizer = vit.make_optimizer(model, args.optimizer, args.lr, args.weight_decay, machine.precision)
    schedule = LambdaLR(optimizer, lambda step: vit.warmup_cosine(step, steps, args.warmup))
    plan = vit.plan_of(args, steps, args.batch) | {"epochs": 1}
    run = vit.Run("tiny_clip", model, optimizer, schedule, machine, settings, **plan)

    for _ in range(run.epoch, run.epochs):
        model.train()
        for index in data.shuffled_batches(len(images), args.batch, run.generator):
            x = vit.share(vit.standardise(data.crop_flip(images[index], run.generator)))  # [B, 3, S, S]
            with run.machine.autocast():
                picture, text, scale = parallel(x, vit.share(tokens[index]))  # [B, E], [B, E], []
            loss = contrast(vit.gather(picture.float()), vit.gather(text.float()), scale)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(loss=loss)
        run.save()
    run.finish()
    folder = pathlib.Path(args.out, "tiny_clip")
    vit.write_file(folder / "open_clip_config.json", json.dumps({"model_cfg": config}).encode())
    vit.write_tensors(folder / "open_clip_pytorch_model.bin", model.state_dict())


def tiny(args: argparse.Namespace) -> None:
    """Train a small BLIP for each fold, and a small CLIP; write folders for load_blip and load_clip."""
    quiet()
    if args.folds < 2:
        sys.exit("--folds must be at least 2: an image's captioner must not have seen its label")
    if vit.read_checkpoint(args.checkpoint)["settings"].get("stage") != "pretrain":
        sys.exit(f"{args.checkpoint} was trained on labels; choose an encoder from `ssl.py pretrain`")
    machine = vit.set_up(args.device, args.precision, args.seed)
    images, labels = data.load(args.data, "train", machine.device, args.limit)
    encoder = vit.load_encoder(args.checkpoint, images.shape[-1])
    start, pixels = vit.hash_of_checkpoint(args.checkpoint), data.fingerprint(images, labels)
    settings = vit.settings_of(args, encoder, start=start, images=pixels)
    if encoder.config["stem"]:
        sys.exit(f"{args.checkpoint} was made with --stem, which BLIP's image tower has not")
    patch = encoder.config["patch_size"]
    if args.enlarge % patch:
        sys.exit(f"--enlarge {args.enlarge} is not a whole number of {patch}-pixel patches")
    classes = data.source(args.data).classes
    for name in classes:
        if not re.fullmatch("[a-z]+", name):
            sys.exit(f"captions need classes of one word in small letters, a to z; rename {name!r}")
    truth = sentences(images, labels, classes)
    for fold in range(args.folds):
        train_small_blip(args, settings, fold, encoder, images, truth, machine)
    train_small_clip(args, settings, images, truth, machine)


# ---------------------------------------------------------------- Part 5: fusion and its controls


class Captioned(NamedTuple):
    """A split on the device: its images with their labels, and the embeddings of their captions."""

    images: Tensor  # uint8 [n, 3, S, S]
    labels: Tensor  # [n]
    which: Tensor  # [n], the number of each image's caption in the two tables that follow
    states: Tensor  # [U, L, E]
    is_word: Tensor  # [U, L], False where there is only padding

    def text(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """What Fusion reads beside the images at `index` [B]: [B, L, E] and [B, L]."""
        which = self.which[index]  # [B]
        return self.states[which].float(), self.is_word[which]


def load_captioned(args, captions: dict, embedded: dict, device: torch.device) -> dict[str, Captioned]:
    """The splits that `fuse` needs, by name. SystemExit where an image has no caption."""
    number = {caption: i for i, caption in enumerate(embedded)}
    states = [state for _, state in embedded.values()]
    if args.text == "pooled":  # the end-of-text token's alone, CLIP's vector for a whole caption: L = 1
        states = [s[-1:] for s in states]
    length = torch.tensor([len(s) for s in states])
    states = nn.utils.rnn.pad_sequence(states, batch_first=True).to(device)  # [U, L, E]
    is_word = (torch.arange(states.shape[1]) < length[:, None]).to(device)  # [U, L]
    found = {}
    for split in ("train", "validation", args.split):
        images, labels = data.load(args.data, split, device, args.limit)
        which = [number[caption] for caption in captions_of(captions, images, split, args.captions)]
        found[split] = Captioned(images, labels, torch.tensor(which, device=device), states, is_word)
    return found


def fuse(args: argparse.Namespace) -> None:
    """Fine-tune the video model with the cross-attention block, and train its controls, a row apiece."""
    header, captions = read_captions(args.captions)
    about = data.source(args.data)
    if args.name and len(args.control) > 1:
        sys.exit("--name is for one --control; leave it out, and each row is called after what it is")
    clip, embedded = read_embeddings(embeddings_path(args.out, args.captions))
    if not embedded.keys() >= set(captions.values()):
        command = f"python multimodal.py embed --captions {args.captions} --out {args.out}"
        sys.exit(f"not all of these captions are embedded; `{command}` does it")
    start = args.checkpoint or f"{args.out}/video_encoder_{args.blocks}.pt"
    base = video.load_video(start)
    machine = vit.set_up(args.device, args.precision, args.seed)
    splits = load_captioned(args, captions, embedded, machine.device)
    text_dim = splits["train"].states.shape[2]
    usual = f"fusion_{header['captioner']}"
    usual += "_1" if len(base.blocks) == 1 else ""
    usual += "_seen" if header.get("seen") else ""
    usual += "_tokens" if args.text == "tokens" else ""

    settings = vit.settings_of(args, base.encoder, start=vit.hash_of_checkpoint(start), clip=clip)
    settings |= {"blocks": len(base.blocks), "words": vit.hash_of_files(args.captions)}
    settings |= {"images": data.fingerprint(splits["train"].images, splits["train"].labels)}

    for control in args.control:
        name = args.name or (usual if control == "none" else f"{usual}_{control}")
        own = splits
        if control == "shuffled":  # every image gets its neighbour's caption: they have nothing in common
            own = {split: part._replace(which=part.which.roll(-1)) for split, part in splits.items()}
        torch.manual_seed(args.seed)  # so that a row does not depend on those before it
        model = Fusion(copy.deepcopy(base), text_dim, control != "text_only", control != "image_only")
        model.to(machine.device)
        this = settings | {"control": control}
        run = train_fusion(args, name, model, own["train"], own["validation"], machine, this)
        judged = own[args.split]
        row = run.summary() | {"images": data.fingerprint(judged.images, judged.labels)}
        if vit.measured(args, name, row):
            continue
        logits = predict(model, judged, run.machine)
        arrays = for_figures(model, judged, logits, embedded, args.text == "tokens")
        vit.write_arrays(vit.arrays_path(args, name), **arrays)
        row |= {"value": vit.accuracy(logits, judged.labels), "report": REPORTED.get(name)}
        row |= {"captioner": header["captioner"], "model": header["model"], "clip": clip}
        vit.record(args, name, run.machine, about, **row)


def train_fusion(args, name: str, model: Fusion, train: Captioned, validation: Captioned, machine, settings):
    """Train one row of `fuse` -> its vit.Run."""
    # without the image nothing could tell what CutMix has mixed in
    cutmix = args.cutmix if model.sees_image else 0.0
    parallel = vit.data_parallel(model, some_idle=True)

    steps = vit.steps_of(len(train.images), args.batch)
    optimizer = vit.make_optimizer(model, args.optimizer, args.lr, args.weight_decay, machine.precision)
    schedule = LambdaLR(optimizer, lambda step: vit.warmup_cosine(step, args.epochs * steps, args.warmup))
    run = vit.Run(name, model, optimizer, schedule, machine, settings, **vit.plan_of(args, steps, args.batch))

    for _ in range(run.epoch, run.epochs):
        model.train()
        for index in data.shuffled_batches(len(train.images), args.batch, run.generator):
            x = data.crop_flip(train.images[index], run.generator)  # [B, 3, S, S]
            y = train.labels[index]  # [B]
            x, other, kept = data.cutmix(x, y, run.generator, cutmix)  # a mixed image keeps its own caption
            x, y, other, index = vit.share(x), vit.share(y), vit.share(other), vit.share(index)
            with run.machine.autocast():
                logits = parallel(x, *train.text(index))  # [B, K]
            loss = data.cutmix_loss(logits, y, other, kept, args.smoothing)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(loss=loss, train=data.cutmix_accuracy(logits, y, other, kept))
        right = vit.accuracy(predict(model, validation, run.machine), validation.labels)
        run.save(validation=right)
    run.finish()
    return run


def predict(model: Fusion, split: Captioned, machine: vit.Machine) -> Tensor:
    """Class logits [n, K], float32, of a split's images as static videos."""
    model.eval()
    logits = []
    for index in torch.arange(len(split.images), device=machine.device).split(machine.eval_batch):
        with torch.no_grad(), machine.autocast():
            logits.append(model(split.images[index].float() / 255, *split.text(index)).float())
    return torch.cat(logits)


@torch.no_grad()
def for_figures(model: Fusion, split: Captioned, logits: Tensor, embedded: dict, tokens: bool) -> dict:
    """The answers to all images [n]; of the first two of each class the captions, and with `tokens` the
    attention to their words."""
    shown = torch.cat([(split.labels == k).nonzero()[:2, 0] for k in split.labels.unique()])  # [m]
    known, images = list(embedded), split.images[shown]
    captions = [known[i] for i in split.which[shown].tolist()]
    arrays = {"guess": logits.argmax(1), "labels": split.labels}
    arrays |= {"shown": shown, "images": images, "captions": captions}
    if tokens and model.sees_text:
        trace = []
        model(images.float() / 255, *split.text(shown), trace)
        weights = trace[0].mean(dim=1)[:, 0]  # [m, H, 1, L] -> [m, L], the mean of the heads
        arrays |= {"weights": weights, "words": [embedded[caption][0] for caption in captions]}
    return arrays


def main() -> None:
    raw, common = argparse.RawDescriptionHelpFormatter, vit.common_arguments()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    stages = parser.add_subparsers(dest="stage", required=True)

    # 4e-3 is what the other stages have: in a trial of 116 steps 8e-3 was 3.7 points better; for longer
    # training it was not tried (results/tuning.md). 15 epochs: not tuned
    training = vit.training_arguments(epochs=15, muon=4e-3, adamw=1e-3, batch=128)
    p = stages.add_parser("tiny", parents=[common, training], help=tiny.__doc__)
    add = p.add_argument
    add("--checkpoint", metavar="FILE", required=True, help="BLIP's image tower starts from this encoder")
    # more folds: more images for each BLIP, but one training more each
    add("--folds", type=int, default=2, help="parts of the images, each with its BLIP (default: %(default)s)")
    add("--enlarge", type=vit.count, default=48, help="pixels to enlarge images to (default: %(default)s)")
    add("--frozen", type=int, help="blocks of the image tower that are not trained (default: none)")
    p.set_defaults(run=tiny)

    p = stages.add_parser("caption", parents=[common], help="caption every image")
    add = p.add_argument
    add("--captioner", choices=["blip", "tiny"], required=True, help="the real one, or the one trained here")
    blip = "Salesforce/blip-image-captioning-base"
    add("--blip", default=blip, help="model id or folder (default: %(default)s)")
    add("--revision", help="of that model id: a branch, tag or commit (default: the newest)")
    add("--seen", action="store_true", help="tiny: use models that have seen the training images' labels")
    add("--batch", type=vit.count, default=50, help="images at a time (default: %(default)s)")
    add("--fresh", action="store_true", help="start over instead of going on")
    p.set_defaults(run=caption)

    p = stages.add_parser("embed", parents=[common], help="embed the distinct captions of a file")
    add = p.add_argument
    add("--captions", metavar="FILE", required=True, help="caption file, from here or from another machine")
    add("--clip", help='architecture or "local-dir:FOLDER" (default: ViT-B-32; for tiny the small one)')
    weights = "laion2b_s34b_b79k"
    add("--clip-weights", default=weights, help="tag or file of its weights (default: %(default)s)")
    p.set_defaults(run=embed)

    # peak learning rates: within a point of the best tried (results/tuning.md); 25 epochs: not tuned
    training = vit.training_arguments(epochs=25, muon=1e-3, adamw=5e-4, batch=128)
    p = stages.add_parser("fuse", parents=[common, training], help="train on images with captions")
    add = p.add_argument
    add("--captions", metavar="FILE", required=True, help="caption file, embedded before")
    add("--blocks", type=int, default=2, help="start from OUT/video_encoder_BLOCKS.pt (default: %(default)s)")
    add("--checkpoint", metavar="FILE", help="or start from the video model in this checkpoint")
    add("--text", choices=["pooled", "tokens"], default="pooled", help="one vector a caption, or one a word")
    controls = ["none", "image_only", "text_only", "shuffled"]
    add("--control", choices=controls, nargs="+", default=["none"], help="what to leave out; each is a row")
    # CutMix is meant for long training. Smoothing: 0.1 is Szegedy et al.'s (2016), so that logits need not
    # grow for ever
    add("--cutmix", type=vit.fraction, default=0.0, help="share of batches mixed by CutMix (default: none)")
    add("--smoothing", type=vit.fraction, default=0.1, help="label smoothing (default: %(default)s)")
    p.set_defaults(run=fuse)
    vit.command(parser, data.source)


if __name__ == "__main__":
    main()
