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
and vit.init_linear.) It continues from video.py's model of two blocks. `tiny` is for where BLIP can't be
downloaded, or would take a night:

    python multimodal.py tiny --checkpoint runs/mine/m.pt --epochs 2 --frozen 4 --enlarge 40
    python multimodal.py caption --captioner tiny
    python multimodal.py embed --captions runs/mine/captions_tiny.json
    python multimodal.py fuse --captions runs/mine/captions_tiny.json --epochs 1

Papers: Li et al. 2022 (BLIP), Radford et al. 2021 (CLIP), Cherti et al. 2023 (open_clip), Vaswani et al. 2017
(attention). Shape letters as in vit.py; also U distinct captions, L words (tokens) of a caption, E width of
CLIP's embedding, V words that a captioner knows.
"""

from __future__ import annotations

import argparse
import copy
import errno
import json
import logging
import pathlib
import re
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import data
import video
import vit

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
    starts out unchanged and learns how much to let in. The last layers' own gradient is not zero.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm_text = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn = CrossAttention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
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

    Only the temporal CLS asks: no later block would read what other tokens had learned from the text. Two
    controls see less: with `image=False` a learned vector asks, with `text=False` nothing is asked.
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
        """Images [B, 3, S, S] as static videos; text [B, L, E], is_word [B, L] -> class logits [B, K]."""
        if self.sees_image:
            frames = video.repeated(self.video.encode(images), self.video.frames)  # [B, F, D]
            x = self.video.summary(frames)[:, None]  # the temporal CLS, [B, 1, D]
        else:
            x = self.cls.expand(len(images), -1, -1)  # [B, 1, D]
        text = self.project(text) if self.sees_text else None  # [B, L, D]
        x = self.block(x, text, is_word, trace)
        return self.video.head(self.video.norm(x[:, 0]))


# ---------------------------------------------------------------- Part 2: captions

NO_BLIP = 3  # exit code: run_all.sh then goes on with the small captioner, but after no other failure


def load_blip(name: str):
    """(model, processor) of a BLIP captioner on Hugging Face's hub or in a folder. SystemExit where it can't
    be had, or lacks weights: the library would fill them in at random."""
    import transformers

    load = transformers.BlipForConditionalGeneration.from_pretrained
    try:
        processor = transformers.BlipProcessor.from_pretrained(name)
        model, found = load(name, output_loading_info=True)
    except (OSError, ValueError) as error:  # offline and not cached, no such model, not a model
        if getattr(error, "errno", None) == errno.ENOSPC:
            sys.exit(f"can't store the captioner {name}: {error.strerror}; make room, type the same command")
        why = str(error).strip().split("\n")[0]  # without the library's paragraphs of advice
        advice = f"`hf download {name} --exclude tf_model.h5` fetches it; or choose --captioner tiny"
        print(f"can't load the captioner {name} ({why}); {advice}", file=sys.stderr)
        sys.exit(NO_BLIP)
    if found["missing_keys"]:
        sys.exit(f"{name} is no BLIP captioner: it has no weights for {sorted(found['missing_keys'])[0]}")
    return model, processor


@torch.no_grad()
def describe(model, processor, images: Tensor, autocast) -> list[str]:
    """The captions, of at most 20 tokens each (as in BLIP's own captioning), of uint8 images [n, 3, S, S];
    each word the likeliest next."""
    longest = min(20, model.config.text_config.max_position_embeddings - 1)  # small BLIPs have few positions
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]  # enlarged, standardised
    with autocast:
        tokens = model.generate(pixel_values=pixels, num_beams=1, max_new_tokens=longest)
    return [caption.strip() for caption in processor.batch_decode(tokens, skip_special_tokens=True)]


def read_captions(path: str | pathlib.Path) -> dict:
    """A caption file, JSON: who wrote the captions ("captioner", "model"), for each split "images", a hash of
    its images in their order, and "captions", one for each image. SystemExit if it is no such file."""
    try:
        found = json.loads(pathlib.Path(path).read_text("utf-8"))
        return {key: found[key] for key in ("captioner", "model", "images", "captions")}
    except (OSError, ValueError, KeyError, TypeError):
        sys.exit(f"{path} is missing or no caption file; `python multimodal.py caption` writes one")


def captions_of(found: dict, split: str, images: Tensor, path: str) -> list[str]:
    """The captions of a split's images, from read_captions. SystemExit where they are others', or in another
    order: every caption would then belong to another image."""
    captions = found["captions"][split]
    if found["images"][split] != vit.hash_of(images) or len(captions) != len(images):
        why = f"{path} was made of other {split} images, of these in another order, or is not finished"
        sys.exit(f"{why}; `python multimodal.py caption` makes one for yours")
    return captions


SYNONYMS = {"airplane": "plane jet aircraft airliner biplane", "automobile": "car sedan suv", "frog": "toad"}
SYNONYMS |= {"cat": "kitten", "deer": "elk moose antelope", "dog": "puppy", "horse": "pony", "truck": "lorry"}
SYNONYMS |= {"ship": "boat ferry sailboat yacht"}


def named_class(caption: str, classes: list[str]) -> int:
    """The label of the first word that names a class, by itself or a synonym, or in plural; -1 if none."""
    for word in re.findall("[a-z]+", caption.lower()):
        for label, name in enumerate(classes):
            names = [name, *SYNONYMS.get(name, "").split()]
            if word in names or word.removesuffix("s") in names:
                return label
    return -1


def caption(args: argparse.Namespace) -> None:
    """Caption every image of the three splits; as a row, how often the caption names the right class."""
    from tqdm import tqdm

    device, autocast = vit.set_up(args)
    source, images, labels = data.source(args.data), {}, {}  # of each split
    for split in SPLITS:
        images[split], labels[split] = data.load(args.data, split, device, args.limit)
    models, found = [], {"model": args.blip}
    if args.captioner == "tiny":
        made_of = vit.hash_of(images["train"], labels["train"])
        models, weights = load_small_blips(args.out, source.classes, made_of)
        found = {"model": f"small BLIP trained here, {weights}"}
    found |= {"captioner": args.captioner, "images": {split: vit.hash_of(images[split]) for split in SPLITS}}
    name = args.name or f"captions_{args.captioner}"
    path = pathlib.Path(args.out, f"{name}.json")
    captions = {split: [] for split in SPLITS}
    if path.exists() and not args.fresh:
        before = read_captions(path)
        captions = before.pop("captions")
        for key, value in found.items():
            if before[key] != value:
                sys.exit(f"{path} was made with another {key}; --fresh replaces it, --name keeps it")
    found["captions"] = captions
    if not models and any(len(captions[split]) < len(images[split]) for split in SPLITS):
        models = [load_blip(args.blip)]
    models = [(model.to(device).eval(), processor) for model, processor in models]

    for split in SPLITS:
        done, n = captions[split], len(images[split])
        for start in tqdm(range(len(done), n, args.batch), split, disable=None):
            done += [""] * min(args.batch, n - start)
            for fold, (model, processor) in enumerate(models):
                # a small BLIP captions only the images of its own fold, which it has not been trained on
                own = [i for i in range(start, len(done)) if i % len(models) == fold]
                words = describe(model, processor, images[split][own], autocast) if own else []
                for i, sentence in zip(own, words):
                    done[i] = sentence
            if start // 1000 != len(done) // 1000 or len(done) == n:  # an accident costs a thousand at most
                with vit.whole_file(path) as file:
                    file.write(json.dumps(found, indent=0, ensure_ascii=False).encode())
        print(f"{split}: {n:,} captions in {path}", flush=True)

    x, y = images[args.split], labels[args.split]
    named = torch.tensor([named_class(c, source.classes) for c in captions[args.split]], device=device)  # [n]
    about = {"captioner": args.captioner, "model": found["model"], "provenance": source.provenance}
    vit.record(args, name, x, y, value=(named == y).float().mean(), **about)


# ---------------------------------------------------------------- Part 3: embeddings


def load_clip(name: str, out: str):
    """(CLIP model, tokenizer, what it is): "ViT-B-32" with LAION's weights, "hf-hub:ORG/REPO" for another of
    open_clip's, or "tiny", the small one in `out`. SystemExit where it can't be had."""
    import open_clip

    if name == "tiny":
        state = vit.read_checkpoint(f"{out}/tiny_clip.pt")
        model, tokenizer = small_clip(state["recipe"]["size"])
        model.load_state_dict(state["model"])
        return model, tokenizer, f"tiny, {vit.hash_of(*state['model'].values())}"
    try:
        model = open_clip.create_model(name, "laion2b_s34b_b79k", require_pretrained=True)
        return model, open_clip.get_tokenizer(name), name
    except Exception as error:  # offline, no such model: open_clip raises many kinds
        advice = "`hf download laion/CLIP-ViT-B-32-laion2B-s34B-b79K --include 'open_clip*'` fetches ViT-B-32"
        sys.exit(f"can't load the CLIP {name} ({error}); {advice}; or choose --clip tiny")


@torch.no_grad()
def embed_words(model, tokenizer, captions: list[str]) -> list[tuple[str, Tensor]]:
    """What CLIP makes of each caption: its L words as CLIP reads them, joined by spaces, and a unit vector
    for each, [L, E]. The last, the end-of-text token's, is what CLIP itself takes for the whole caption (its
    encode_text). The others are not in the space that CLIP shares with images, but tell the words apart,
    which is all that keys and values need."""
    tokens = tokenizer(captions)  # [u, context length]
    length = tokens.argmax(dim=1) + 1  # the end-of-text token is the largest number; behind it are zeros
    seen = []  # what encode_text has for every word before it picks the last
    hook = model.ln_final.register_forward_hook(lambda _, __, states: seen.append(states))
    model.encode_text(tokens.to(model.text_projection.device))
    hook.remove()
    states = F.normalize(seen[0].float() @ model.text_projection.float(), dim=-1)  # [u, context length, E]
    found = []
    for ids, state, n in zip(tokens.tolist(), states.cpu(), length.tolist()):
        words = [tokenizer.decode([i]).strip() for i in ids[1 : n - 1]]
        found.append((" ".join(["<start>", *words, "<end>"]), state[:n]))
    return found


def embeddings_path(args: argparse.Namespace) -> pathlib.Path:
    """Where the embeddings of --captions lie."""
    return pathlib.Path(args.out, pathlib.Path(args.captions).stem + "_clip.pt")


def embed(args: argparse.Namespace) -> None:
    """Embed every distinct caption of a file once; writes out/NAME_OF_THE_FILE_clip.pt."""
    from tqdm import tqdm

    found = read_captions(args.captions)
    distinct = list(dict.fromkeys(caption for split in SPLITS for caption in found["captions"][split]))
    device, _ = vit.set_up(args)
    usual = "tiny" if found["captioner"] == "tiny" else "ViT-B-32"
    model, tokenizer, clip = load_clip(args.clip or usual, args.out)
    model.visual = None  # only the text tower is used
    model.to(device).eval()
    embedded = []
    for start in tqdm(range(0, len(distinct), 256), "captions", disable=None):
        embedded += embed_words(model, tokenizer, distinct[start : start + 256])
    words, states = zip(*embedded)
    # in float16, and as views of one tensor, which torch.save writes as one piece of the file
    states = torch.cat(states).half().split([len(s) for s in states])
    with vit.whole_file(embeddings_path(args)) as file:
        torch.save({"clip": clip, "captions": distinct, "words": words, "states": states}, file)
    print(f"{len(distinct):,} distinct captions embedded by {clip}; wrote {embeddings_path(args)}")


# ---------------------------------------------------------------- Part 4: without downloads
# A BLIP and a CLIP small enough to train here, on sentences made from the label and two measured words. They
# know nothing that the training images don't hold, so expect of their captions what a second opinion brings,
# no more; what the real BLIP adds is knowledge from outside.
#
# A captioner trained on an image's label remembers it and writes it into the caption. Fusion training on such
# captions would learn to copy the class word, which is right on training images and often wrong on new ones.
# So the training images are dealt out to k folds, fold f's captioner is trained on all the others, and
# captions fold f: no image is captioned by a model that has seen it.

HUES = "red yellow green cyan blue purple".split()


def sentences(images: Tensor, labels: Tensor, classes: list[str]) -> list[str]:
    """One sentence an image, "the cat on dark green": the class from the label; the mean colour of a rim of
    S/8 pixels, measured. The class word comes early, so that no word before it hints at it.
    images: uint8 [n, 3, S, S], labels [n]."""
    edge = images.shape[-1] // 8
    rim = torch.ones(images.shape[-2:], dtype=torch.bool, device=images.device)  # [S, S]
    rim[edge:-edge, edge:-edge] = False
    ground = images[:, :, rim].float().mean(dim=2) / 255  # [n, 3]
    bright = ground.mean(dim=1) > 0.5  # [n]
    grey = ground.amax(dim=1) - ground.amin(dim=1) <= 0.06  # [n]
    r, g, b = ground.unbind(dim=1)
    angle = torch.atan2(3**0.5 * (g - b), 2 * r - g - b)  # [n], of the colour circle, in radians
    hue = (angle / (torch.pi / 3)).round().long() % 6  # [n], in steps of 60 degrees
    found = []
    for k, h, is_grey, is_bright in torch.stack([labels, hue, grey, bright], dim=1).tolist():
        light, colour = "bright" if is_bright else "dark", "grey" if is_grey else HUES[h]
        found.append(f"the {classes[k]} on {light} {colour}")
    return found


def small_blip(config: dict, classes: list[str], size: int):
    """(BLIP model, processor) whose image tower is built as our encoder of that `config`, looking at images
    enlarged to `size` pixels: patches of 8 pixels then show less of the image each, so it sees details that
    our 16 patches blur, and errs elsewhere than the image model. (The real BLIP enlarges to 384 pixels.)"""
    import transformers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    words = ["the", "on", "bright", "dark", "grey", *HUES, *classes]
    number = {word: i for i, word in enumerate(special + words)}
    D = config["dim"]
    both = {"hidden_size": D, "intermediate_size": 4 * D, "num_attention_heads": config["heads"]}
    image = {"image_size": size, "patch_size": config["patch_size"], "num_hidden_layers": config["depth"]}
    text = {"vocab_size": len(number), "num_hidden_layers": 2, "encoder_hidden_size": D}
    text |= {"max_position_embeddings": 16, "bos_token_id": number["[DEC]"], "pad_token_id": number["[PAD]"]}
    text |= {"eos_token_id": number["[SEP]"], "sep_token_id": number["[SEP]"]}
    config = transformers.BlipConfig(vision_config=both | image, text_config=both | text)
    look = {"size": {"height": size, "width": size}}
    look |= {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}  # as vit.standardise
    tokenizer = transformers.BertTokenizer(vocab=number, bos_token="[DEC]")
    processor = transformers.BlipProcessor(transformers.BlipImageProcessor(**look), tokenizer)
    return transformers.BlipForConditionalGeneration(config), processor


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


def train_small_blip(args, fold: int, encoder: vit.ViT, images, labels, truth: list[str], device, autocast):
    """Train one fold's captioner on the images of all other folds; writes out/tiny_blip_FOLD.pt."""
    classes = data.source(args.data).classes
    model, processor = small_blip(encoder.config, classes, args.enlarge)
    copy_encoder(encoder, model.vision_model)
    if args.frozen:  # the first blocks stay as they came: a step is cheaper, and few epochs teach more
        model.vision_model.embeddings.requires_grad_(False)
        model.vision_model.encoder.layers[: args.frozen].requires_grad_(False)
    model.to(device)
    ids = processor.tokenizer(truth, return_tensors="pt")["input_ids"].to(device)  # [n, L + 2]
    ids[:, 0] = model.config.text_config.bos_token_id
    weight = torch.ones(model.config.text_config.vocab_size, device=device)  # [V]
    weight[-len(classes) :] = 8.0  # of all words only the class is hard to find; not tuned
    others = (torch.arange(len(images), device=device) % args.folds != fold).nonzero()[:, 0]

    recipe = vit.recipe_of(args, images, labels, args.checkpoint) | {"encoder": encoder.config}
    steps = len(others) // args.batch
    optimizer = vit.make_optimizer(model, args.optimizer, args.lr, args.weight_decay, args.precision)
    schedule = LambdaLR(optimizer, lambda step: vit.triangle(step, args.epochs * steps, args.warmup))
    run = vit.Run(args, f"tiny_blip_{fold}", model, optimizer, schedule, steps, recipe)

    for _ in range(run.epoch, args.epochs):
        model.train()
        for i in data.shuffled_batches(len(others), args.batch, run.generator):
            index = others[i]  # [B]
            x, words = data.crop_flip(images[index], run.generator), ids[index]  # [B, 3, S, S], [B, L + 2]
            pixels = processor(images=(255 * x).round().byte(), return_tensors="pt")["pixel_values"]
            with autocast:
                logits = model(pixel_values=pixels, input_ids=words).logits.float()  # [B, L + 2, V]
            guess = logits[:, :-1]  # [B, L + 1, V]
            target = words[:, 1:]  # [B, L + 1]: every word from those before
            loss = F.cross_entropy(guess.flatten(0, 1), target.flatten(), weight)
            loss.backward()
            vit.average_gradients(model)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            right = (guess.argmax(dim=2) == target).float()  # [B, L + 1]
            run.log(loss=loss, words=right.mean(), train=right[:, 1].mean())  # the second word is the class
        run.save()


def load_small_blips(out: str, classes: list[str], images: str):
    """The small BLIPs, by fold, with their processors, and a hash of their weights. SystemExit unless all are
    finished, and trained on these `images` (a hash): else one might have seen what it captions."""
    recipe = vit.read_checkpoint(f"{out}/tiny_blip_0.pt")["recipe"]
    states = [vit.read_checkpoint(f"{out}/tiny_blip_{fold}.pt") for fold in range(recipe["folds"])]
    compared, models = recipe.keys() - {"code", "device", "precision"}, []
    for fold, state in enumerate(states):
        same = all(recipe[key] == state["recipe"][key] for key in compared)
        if not same or state["epoch"] < recipe["epochs"] or recipe["images"] != images:
            sys.exit(f"{out}/tiny_blip_{fold}.pt is not finished, or of other images: `multimodal.py tiny`")
        model, processor = small_blip(recipe["encoder"], classes, recipe["enlarge"])
        model.load_state_dict(state["model"])
        models.append((model, processor))
    return models, vit.hash_of(*(weight for state in states for weight in state["model"].values()))


def small_clip(size: int):
    """(open_clip's CLIP for images of `size` pixels, its tokenizer), small enough to train in a minute; not
    tuned."""
    import open_clip  # in functions only: it takes seconds

    image = {"image_size": size, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    return open_clip.CLIP(64, image, text), open_clip.SimpleTokenizer(context_length=16)


def train_small_clip(args, images: Tensor, labels: Tensor, truth: list[str], device, autocast) -> None:
    """Train a small CLIP on images and sentences, for one epoch; writes out/tiny_clip.pt."""
    import open_clip

    model, tokenizer = small_clip(images.shape[-1])
    model.to(device)
    tokens = tokenizer(truth).to(device)  # [n, 16]
    contrast = open_clip.ClipLoss()

    args = argparse.Namespace(**vars(args) | {"epochs": 1})
    recipe = vit.recipe_of(args, images, labels) | {"size": images.shape[-1]}
    steps = len(images) // args.batch
    optimizer = vit.make_optimizer(model, args.optimizer, args.lr, args.weight_decay, args.precision)
    schedule = LambdaLR(optimizer, lambda step: vit.triangle(step, steps, args.warmup))
    run = vit.Run(args, "tiny_clip", model, optimizer, schedule, steps, recipe)

    for _ in range(run.epoch, args.epochs):
        model.train()
        for index in data.shuffled_batches(len(images), args.batch, run.generator):
            x = vit.standardise(data.crop_flip(images[index], run.generator))  # [B, 3, S, S]
            with autocast:
                picture, text, scale = model(x, tokens[index])  # [B, E], [B, E], []
            loss = contrast(vit.gather(picture.float()), vit.gather(text.float()), scale)
            loss.backward()
            vit.average_gradients(model)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(loss=loss)
        run.save()


def tiny(args: argparse.Namespace) -> None:
    """Train a small BLIP for each fold, and a small CLIP."""
    if args.folds < 2:
        sys.exit("--folds must be at least 2: an image's captioner must not have seen its label")
    if vit.read_checkpoint(args.checkpoint)["recipe"].get("stage") != "pretrain":
        sys.exit(f"{args.checkpoint} was trained on labels; choose an encoder from `ssl.py pretrain`")
    device, autocast = vit.set_up(args)
    images, labels = data.load(args.data, "train", device, args.limit)
    encoder = vit.load_encoder(args.checkpoint, images.shape[-1])
    patch = encoder.config["patch_size"]
    if args.enlarge % patch:
        sys.exit(f"--enlarge {args.enlarge} is not a whole number of {patch}-pixel patches")
    classes = data.source(args.data).classes
    if not all(re.fullmatch("[a-z]+", name) for name in classes):
        sys.exit(f"captions need classes of one word in small letters, a to z; rename {classes}")
    truth = sentences(images, labels, classes)
    for fold in range(args.folds):
        train_small_blip(args, fold, encoder, images, labels, truth, device, autocast)
    train_small_clip(args, images, labels, truth, device, autocast)


# ---------------------------------------------------------------- Part 5: fusion and its controls


def fuse(args: argparse.Namespace) -> None:
    """Fine-tune the video model with the cross-attention block, and train its controls, a row apiece."""
    if args.name and len(args.control) > 1:
        sys.exit("--name is for one --control; leave it out, and each row is called after what it is")
    found = read_captions(args.captions)
    if not embeddings_path(args).exists():
        command = f"python multimodal.py embed --captions {args.captions} --out {args.out}"
        sys.exit(f"these captions are not embedded yet; `{command}` does it")
    table = torch.load(embeddings_path(args), weights_only=True)
    number = {caption: i for i, caption in enumerate(table["captions"])}
    start = args.checkpoint or f"{args.out}/video_2.pt"
    device, autocast = vit.set_up(args)
    source, images, labels, which = data.source(args.data), {}, {}, {}  # of each split
    for split in dict.fromkeys(("train", "validation", args.split)):
        images[split], labels[split] = data.load(args.data, split, device, args.limit)
        captions = captions_of(found, split, images[split], args.captions)
        if not number.keys() >= set(captions):
            sys.exit(f"{args.captions} has changed since `multimodal.py embed`; type that command again")
        which[split] = torch.tensor([number[c] for c in captions], device=device)  # its caption's number, [n]
    base = video.load_video(start, images["train"].shape[-1])
    # pooled: the end-of-text token's alone, CLIP's vector for a whole caption: L = 1
    states = [s if args.text == "tokens" else s[-1:] for s in table["states"]]
    length = torch.tensor([len(s) for s in states])
    states = nn.utils.rnn.pad_sequence(states, batch_first=True).float().to(device)  # [U, L, E]
    is_word = (torch.arange(states.shape[1]) < length[:, None]).to(device)  # [U, L]

    recipe = vit.recipe_of(args, images["train"], labels["train"], start)
    recipe |= {"clip": table["clip"], "words": vit.hash_of(json.dumps(found).encode())}
    about = {"captioner": found["captioner"], "clip": table["clip"], "provenance": source.provenance}
    for control in args.control:
        name = f"fusion_{found['captioner']}" + ("_tokens" if args.text == "tokens" else "")
        name = args.name or name + ("" if control == "none" else f"_{control}")
        torch.manual_seed(args.seed)  # so that a row does not depend on those before it
        model = Fusion(copy.deepcopy(base), states.shape[2], control != "text_only", control != "image_only")
        model.to(device)
        own = which
        if control == "shuffled":  # every image gets its neighbour's caption; their order is random
            own = {split: numbers.roll(-1) for split, numbers in which.items()}

        def answer(x: Tensor, i: Tensor) -> Tensor:
            """Class logits [B, K] of uint8 images [B, 3, S, S] with captions of these numbers [B]."""
            return model(x.float() / 255, states[i], is_word[i])

        steps = len(images["train"]) // args.batch
        optimizer = vit.make_optimizer(model, args.optimizer, args.lr, args.weight_decay, args.precision)
        schedule = LambdaLR(optimizer, lambda step: vit.triangle(step, args.epochs * steps, args.warmup))
        run = vit.Run(args, name, model, optimizer, schedule, steps, recipe | {"control": control})

        for _ in range(run.epoch, args.epochs):
            model.train()
            for index in data.shuffled_batches(len(images["train"]), args.batch, run.generator):
                x = data.crop_flip(images["train"][index], run.generator)  # [B, 3, S, S]
                y, i = labels["train"][index], own["train"][index]  # [B], [B]
                with autocast:
                    logits = model(x, states[i], is_word[i])  # [B, K]
                loss = F.cross_entropy(logits.float(), y, label_smoothing=args.smoothing)
                loss.backward()
                vit.average_gradients(model)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                run.log(loss=loss, train=(logits.argmax(1) == y).float().mean())
            held_out = vit.evaluate(model, autocast, answer, images["validation"], own["validation"])
            run.save(validation=vit.accuracy(held_out, labels["validation"]))

        x, y, i = images[args.split], labels[args.split], own[args.split]
        logits = vit.evaluate(model, autocast, answer, x, i)
        with vit.whole_file(vit.row_path(args, name, "npz")) as file:
            np.savez_compressed(file, **for_pictures(model, x, y, i, logits, table, states, is_word))
        vit.record(args, name, x, y, value=vit.accuracy(logits, y), **run.row(), **about)
        if control == "image_only" and args.split == "test":  # else fitted and judged on the same images
            held_out = vit.evaluate(model, autocast, answer, images["validation"], own["validation"])
            words = [found["captions"][split] for split in ("validation", "test")]
            named = [torch.tensor([named_class(c, source.classes) for c in w], device=device) for w in words]
            value, without = bound(held_out, named[0], labels["validation"], logits, named[1], y)
            name = name.removesuffix("_image_only") + "_bound"
            vit.record(args, name, x, y, value=value, without=without, **about)


def bound(logits: Tensor, named: Tensor, labels: Tensor, logits2: Tensor, named2: Tensor, labels2: Tensor):
    """What the class word of captions could bring: accuracy of a logistic regression on the image-only
    model's logits [n, K] and the class that the caption names [n] (-1: none); then of one on the logits
    alone. Fitted on the first images (validation's, which no model was trained on), judged on the second."""
    classes, found = logits.shape[1], []
    for weight in (1, 0):  # of the caption
        fitted, judged = (
            torch.cat([x.log_softmax(dim=1), weight * F.one_hot(n + 1, classes + 1)], dim=1)  # [n, K + K + 1]
            for x, n in ((logits, named), (logits2, named2))
        )
        found.append(vit.accuracy(vit.fit_linear(fitted, labels, 1e-4, classes)(judged), labels2))
    return found


@torch.no_grad()
def for_pictures(model, images, labels, which, logits, table, states, is_word) -> dict[str, np.ndarray]:
    """The answers to all images [n]; of the first two of each class the captions, and the attention to their
    words [m, L]."""
    shown = torch.cat([(labels == k).nonzero()[:2, 0] for k in labels.unique()])  # [m]
    numbers, trace = which[shown], []  # [m]
    arrays = {"guess": logits.argmax(1), "labels": labels, "shown": shown, "images": images[shown]}
    if model.sees_text:
        model(images[shown].float() / 255, states[numbers], is_word[numbers], trace)
        arrays["weights"] = trace[0].mean(dim=1)[:, 0]  # [m, H, 1, L] -> [m, L]
    words = {key: np.array([table[key][i] for i in numbers.tolist()]) for key in ("captions", "words")}
    return {key: x.cpu().numpy() for key, x in arrays.items()} | words


def main() -> None:
    raw, common = argparse.RawDescriptionHelpFormatter, vit.common_options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    stages = parser.add_subparsers(dest="stage", required=True)

    training = vit.training_options(epochs=15, muon=4e-3, adamw=1e-3, batch=128)
    p = stages.add_parser("tiny", parents=[common, training], help=tiny.__doc__)
    add = p.add_argument
    add("--checkpoint", type=vit.path, required=True, help="BLIP's image tower starts from this encoder")
    add("--folds", type=int, default=2, help="parts of the images, each with its BLIP (default: %(default)s)")
    add("--enlarge", type=int, default=48, help="pixels to enlarge images to (default: %(default)s)")
    add("--frozen", type=int, default=0, help="blocks of the image tower not trained (default: none)")
    p.set_defaults(run=tiny)

    p = stages.add_parser("caption", parents=[common], help="caption every image")
    add, blip = p.add_argument, "Salesforce/blip-image-captioning-base"
    add("--captioner", choices=["blip", "tiny"], required=True, help="the real one, or the one trained here")
    add("--blip", default=blip, help="model id or folder (default: %(default)s)")
    add("--batch", type=int, default=50, help="images at a time (default: %(default)s)")
    add("--fresh", action="store_true", help="start over instead of going on")
    p.set_defaults(run=caption)

    p = stages.add_parser("embed", parents=[common], help="embed the distinct captions of a file")
    add = p.add_argument
    add("--captions", type=vit.path, required=True, help="caption file, from here or from another machine")
    add("--clip", help="ViT-B-32, hf-hub:ORG/REPO, or tiny (default: ViT-B-32; for tiny captions tiny)")
    p.set_defaults(run=embed)

    training = vit.training_options(epochs=25, muon=1e-3, adamw=5e-4, batch=128)
    p = stages.add_parser("fuse", parents=[common, training], help="train on images with captions")
    add = p.add_argument
    add("--captions", type=vit.path, required=True, help="caption file, embedded before")
    add("--checkpoint", type=vit.path, help="start from this video model (default: OUT/video_2.pt)")
    add("--text", choices=["pooled", "tokens"], default="pooled", help="one vector a caption, or one a word")
    controls = ["none", "image_only", "text_only", "shuffled"]
    add("--control", choices=controls, nargs="+", default=["none"], help="what to leave out; each is a row")
    add("--smoothing", type=float, default=0.1, help="label smoothing (default: %(default)s)")
    p.set_defaults(run=fuse)
    logging.disable(logging.ERROR)  # of the libraries' remarks, what matters becomes one sentence
    vit.command(parser)


if __name__ == "__main__":
    main()
