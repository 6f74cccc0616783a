"""Stage 2: pseudo-videos, and factorised spatio-temporal transformers that start from Model M.

A pseudo-video is a clip of F = 16 images of one class, shown as if they were the frames of a film. Attention over all
F * 17 tokens at once would cost F times as much as F images do; both models below factorise it into space and time:

    encoder    factorised encoder (ViViT's model 2): each frame by itself through the image encoder; then only the
               frames' CLS tokens through a temporal transformer of one or two blocks, which has its own CLS token
    divided    factorised self-attention (ViViT's model 3, TimeSformer's divided attention): inside the last one or two
               blocks, attention among the patches of a frame, then among the frames at the same patch

A test image is judged as a static video: F times itself.

Depends on vit.py and data.py: copy this file with those two. Its loop is `train` below.

    python video.py --checkpoint runs/mine/m.pt --model encoder --blocks 1 --epochs 6 --out runs/mine

Papers: Arnab et al. 2021 (ViViT), Bertasius et al. 2021 (TimeSformer), Touvron et al. 2021 (LayerScale, the gate).
Shape letters as in vit.py; also C clips, F frames of a clip, n different images of a clip (frames may repeat them).
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch
from torch import nn

import data
import vit

REPORT = {"video_encoder_1": 0.4404, "video_encoder_2": 0.4244, "video_report_1": 0.4404, "video_report_2": 0.4244}  # test accuracies

# ----------------------------------------------------------------------------------------------------------------------
# The two networks
# ----------------------------------------------------------------------------------------------------------------------


class FactorisedEncoder(nn.Module):
    """Factorised encoder (Arnab et al. 2021, section 3.3, model 2): first space, then time.

    The image encoder sums up each frame in its CLS token; a temporal transformer, whose blocks start as copies of the
    image encoder's last ones, sums up those in a CLS token of its own. `ordered`: frames have positions. Without them
    nothing tells the temporal transformer which frame came first, and any order gives the same answer.
    """

    def __init__(self, encoder: vit.ViT, blocks: int = 1, frames: int = 16, classes: int = 10, ordered: bool = True):
        super().__init__()
        dim = encoder.config["dim"]
        self.encoder, self.frames = encoder, frames
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, frames, dim)) if ordered else None
        self.blocks = copy.deepcopy(encoder.blocks[-blocks:])
        self.norm = copy.deepcopy(encoder.norm)
        self.head = nn.Linear(dim, classes)
        self.frame_head = nn.Linear(dim, classes)  # only for the per-frame loss in training

    def tokens(self, images: torch.Tensor, shown: torch.Tensor | None = None,
               trace: list | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """images: [C, n, 3, S, S]; shown: [C, F], which of the clip's n images each frame shows (without: n = F, in order)
        -> tokens of the last temporal block [C, 1 + F, D] (token 0 is the temporal CLS), and the images' CLS [C, n, D].

        An image is encoded once however many frames show it, so a static video costs little more than an image.
        """
        C, n = images.shape[:2]
        each = self.encoder(images.flatten(0, 1))[:, 0].view(C, n, -1)  # [C*n, 3, S, S] -> CLS [C, n, D]
        x = each if shown is None else data.take(each, shown)  # [C, F, D]
        if self.positions is not None:
            x = x + self.positions
        x = torch.cat([self.cls.expand(C, -1, -1), x], dim=1)  # [C, 1 + F, D]
        for block in self.blocks:
            x = block(x, trace)
        return x, each

    def forward(self, images: torch.Tensor, shown: torch.Tensor | None = None,
                trace: list | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """As `tokens` -> class logits of the clips [C, K] and of the images, each by itself [C, n, K]."""
        x, each = self.tokens(images, shown, trace)
        return self.head(self.norm(x[:, 0])), self.frame_head(each)


class TemporalAttention(nn.Module):
    """Attention among the F tokens at the same place of a clip's frames, to be added to a trained block of an image encoder.

    It starts as a copy of that block's attention behind a gate that is shut (zero), so the network starts as the
    image encoder it was made from, and opens the gate, channel by channel, as far as other frames help.
    """

    def __init__(self, block: vit.Block, frames: int, ordered: bool):
        super().__init__()
        dim = block.norm1.normalized_shape[0]
        self.norm, self.attn = copy.deepcopy(block.norm1), copy.deepcopy(block.attn)
        self.positions = nn.Parameter(0.02 * torch.randn(frames, dim)) if ordered else None
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor, frames: int) -> torch.Tensor:
        """x: [C*F, T, D] -> what to add to it, [C*F, T, D]."""
        CF, T, D = x.shape
        x = x.view(-1, frames, T, D).transpose(1, 2).flatten(0, 1)  # [C, F, T, D] -> [C*T, F, D]
        if self.positions is not None:
            x = x + self.positions
        update, _ = self.attn(self.norm(x))  # [C*T, F, D]
        return self.gate * update.view(-1, T, frames, D).transpose(1, 2).reshape(CF, T, D)  # [C, T, F, D] -> [C*F, T, D]


class FactorisedAttention(nn.Module):
    """Factorised self-attention (Arnab et al. 2021, section 3.3, model 3): in each block first space, then time.

        x = x + attention within the frame(norm(x))       as in the image encoder
        x = x + gate * attention across frames(norm(x))   new, in the last `blocks` blocks
        x = x + mlp(norm(x))                              as in the image encoder

    There is no temporal CLS token; the class is read from the mean of the frames' CLS tokens.
    """

    def __init__(self, encoder: vit.ViT, blocks: int = 1, frames: int = 16, classes: int = 10, ordered: bool = True):
        super().__init__()
        dim = encoder.config["dim"]
        self.encoder = encoder
        self.temporal = nn.ModuleList([TemporalAttention(block, frames, ordered) for block in encoder.blocks[-blocks:]])
        self.head = nn.Linear(dim, classes)
        self.frame_head = nn.Linear(dim, classes)

    def forward(self, images: torch.Tensor, shown: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """As FactorisedEncoder.forward. From the first block with temporal attention on, every frame is computed, a repeated
        one too; beside that, every image by itself, as the image encoder alone sees it."""
        C, n = images.shape[:2]
        spatial = len(self.encoder.blocks) - len(self.temporal)
        alone = self.encoder.embed(images.flatten(0, 1))  # [C*n, T, D]
        for block in self.encoder.blocks[:spatial]:
            alone = block(alone)
        x = alone if shown is None else data.take(alone.unflatten(0, (C, n)), shown).flatten(0, 1)  # [C*F, T, D]
        frames = len(x) // C
        for block, temporal in zip(self.encoder.blocks[spatial:], self.temporal):
            x = x + block.attn(block.norm1(x))[0]
            x = x + temporal(x, frames)
            x = x + block.mlp(block.norm2(x))
            alone = block(alone)
        x, alone = (self.encoder.norm(y)[:, 0].unflatten(0, (C, -1)) for y in (x, alone))  # CLS: [C, F, D], [C, n, D]
        return self.head(x.mean(dim=1)), self.frame_head(alone)


MODELS = {"encoder": FactorisedEncoder, "divided": FactorisedAttention}

# ----------------------------------------------------------------------------------------------------------------------
# Clips
#
# 16 images of one class are easily told: where half of them are recognised, a vote is nearly always right. Trained on
# that alone, the network stops at "half of them", and the loss, already small, no longer says what is wrong with any
# single image. A static video has no other images to vote with, and no training clip looked like it. Hence two additions:
# every image must also be classified by itself (--frame-loss; weight 16, as the clip's loss speaks for 16 images), and
# clips have a random number of different images (--repeats), from a static video to 16.
# ----------------------------------------------------------------------------------------------------------------------


def clip_steps(sampler: data.SameClassBatchSampler, labels: list[int], clips: int, balanced: bool) -> torch.Tensor:
    """One epoch of the sampler's clips, `clips` per optimiser step: indices [steps, clips, F].

    `balanced`: the classes take turns, so that 10 clips hold each of the 10 classes once; what a class has more than
    the smallest one is left out. A rest smaller than a step is dropped.
    """
    epoch = list(sampler)
    if balanced:
        of_class = {}
        for clip in epoch:
            of_class.setdefault(labels[clip[0]], []).append(clip)
        epoch = [clip for turn in zip(*of_class.values()) for clip in turn]
    steps = len(epoch) // clips
    return torch.tensor(epoch[: steps * clips]).view(steps, clips, sampler.batch)


def random_repeats(clips: int, frames: int, device: torch.device, generator: torch.Generator | None = None) -> torch.Tensor:
    """Which image each frame shows, [clips, frames], when a clip has a random number of different images, 1 to `frames`."""
    different = torch.randint(1, frames + 1, (clips, 1), device=device, generator=generator)
    shown = torch.arange(frames, device=device) % different  # [clips, frames]
    order = torch.rand(clips, frames, device=device, generator=generator).argsort(dim=1)
    return shown.gather(1, order)


def clip_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, args, machine, generator=None) -> dict[str, torch.Tensor]:
    """Loss and metrics of one step on C clips: uint8 images [C, F, 3, S, S], labels [C].

        loss = cross-entropy of the clip + frame_loss * cross-entropy of every image by itself

    Augmentation and loss are in float32, only the network in autocast.
    """
    C, frames = images.shape[:2]
    images = data.crop_flip(images.flatten(0, 1), generator).view(images.shape)  # [C, F, 3, S, S]
    # to CutMix a clip is one image of F * 3 channels, so all its frames get the same rectangle from one other clip
    mixed, other, share = data.cutmix(images.flatten(1, 2), labels, generator, args.cutmix)  # [C, F*3, S, S]
    shown = random_repeats(C, frames, images.device, generator) if args.repeats else None
    mixed, labels, other, shown = machine.part(mixed.view(images.shape), labels, other, shown)  # whole clips
    with machine.autocast():
        logits, each = model(mixed, shown)  # [C, K], [C, F, K]
    loss = data.cutmix_loss(logits, labels, other, share, args.smoothing)
    if args.frame_loss:
        own = [y.repeat_interleave(frames) for y in (labels, other)]  # [C*F] each
        loss = loss + args.frame_loss * data.cutmix_loss(each.flatten(0, 1), *own, share, args.smoothing)
    return {"loss": loss, "train": (logits.argmax(1) == labels).float().mean()}


# ----------------------------------------------------------------------------------------------------------------------
# The stage
# ----------------------------------------------------------------------------------------------------------------------


def predict(model: nn.Module, images: torch.Tensor, index: torch.Tensor, frames: int, machine: vit.Machine) -> torch.Tensor:
    """Class logits [c, K], float32, of the clips that show images[index], index [c, n], in turn until `frames` are full.

    images: uint8 [N, 3, S, S]. With n = 1 these are static videos.
    """
    model.eval()
    C, n = index.shape
    shown = (torch.arange(frames, device=images.device) % n).expand(C, -1)  # [c, F]
    with torch.no_grad(), machine.autocast():
        return machine.shared_out(C, max(1, machine.eval_batch // n), lambda c: model(images[index[c]].float() / 255, shown[c])[0].float())


def same_class_accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, different: int, args, machine) -> float:
    """Accuracy on clips of so many `different` images of one class. 1: static videos, every image once. More: the labels
    were used to put the clip together, so this says what a vote would bring, not how well an image is recognised."""
    index = torch.tensor(list(data.SameClassBatchSampler(labels, different, args.seed)), device=images.device)  # [c, n]
    return vit.accuracy(predict(model, images, index, args.frames, machine), labels[index[:, 0]])


def train(args: argparse.Namespace) -> None:
    """Train on pseudo-videos, everything from the image encoder to the head; judge on static videos; writes out/NAME.pt."""
    name = args.name or f"video_{args.model}_{args.blocks}"
    args.batch = args.clips * args.frames
    if args.clips % vit.PROCESSES:
        sys.exit(f"{name}: --clips {args.clips} can't be shared out evenly among {vit.PROCESSES} processes; choose another --clips")
    machine = vit.Machine(args.device, args.precision, args.seed)
    images, labels = data.load(args.data, "train", machine.device, args.limit)
    validation = data.load(args.data, "validation", machine.device, args.limit)
    encoder = vit.make_encoder(args, args.checkpoint)
    if args.blocks > len(encoder.blocks):
        sys.exit(f"the encoder in {args.checkpoint} has only {len(encoder.blocks)} blocks to start from; choose fewer --blocks")
    try:
        sampler = data.SameClassBatchSampler(labels, args.frames, args.seed)
    except ValueError as error:
        sys.exit(f"{error}; choose a larger --limit or fewer --frames")
    model = MODELS[args.model](encoder, args.blocks, args.frames, ordered=args.positions).to(machine.device)
    model.frame_head.requires_grad_(args.frame_loss > 0)
    parallel = machine.parallel(model)

    label_of = labels.tolist()
    steps = len(clip_steps(sampler, label_of, args.clips, args.balanced))
    if not steps:
        sys.exit(f"{name}: fewer clips than one step of {args.clips}; choose fewer --clips or a larger --limit")
    run = vit.Run(args, name, model, machine, steps)
    for epoch in run.epochs():
        sampler.set_epoch(epoch)
        for index in run.steps(clip_steps(sampler, label_of, args.clips, args.balanced).to(machine.device)):  # [C, F]
            metrics = clip_step(parallel, images[index], labels[index[:, 0]], args, machine, run.generator)
            metrics["loss"].backward()
            run.step(**metrics)
        run.note(validation=same_class_accuracy(model, *validation, 1, args, machine))

    kept = vit.arrays_path(args, name)
    if (kept.exists() or args.model == "divided") and vit.measured(args, name, run.path):
        return
    images, labels = data.load(args.data, args.split, machine.device, args.limit)
    smallest = int(labels.bincount()[labels.unique()].min())  # images of the rarest class
    different = {n: same_class_accuracy(model, images, labels, n, args, machine)
                 for n in sorted({1, 2, 4, 8, 16, args.frames}) if n <= min(smallest, args.frames)}  # fmt: skip
    if args.model == "encoder" and smallest >= args.frames:
        keep_attention(kept, model, images, labels, args.frames)
    vit.record(args, name, machine, data.describe(args.data), value=different[1], report=REPORT.get(name), different=different,
               train=run.history["train"][-1], validation=run.history["validation"][-1], epochs=run.epoch, seconds=run.seconds,
               weights=vit.fingerprint(run.path))  # fmt: skip


def load_video(path: str) -> FactorisedEncoder:
    """The factorised encoder in a checkpoint written by `train`."""
    state = vit.read_checkpoint(path)
    settings = state["settings"]
    if settings.get("model") != "encoder":
        sys.exit(f"{path} holds no factorised encoder; `python video.py --model encoder` makes one")
    model = FactorisedEncoder(vit.ViT(**state["config"]), settings["blocks"], settings["frames"], ordered=settings["positions"])
    model.load_state_dict(state["model"])
    return model


def keep_attention(path, model: FactorisedEncoder, images: torch.Tensor, labels: torch.Tensor, frames: int) -> None:
    """For the figure: the first `frames` images of each class as a clip, how the temporal CLS weighs them, the answers."""
    index = torch.stack([(labels == k).nonzero()[:frames, 0] for k in labels.unique()])  # [K, F]
    trace = []
    with torch.no_grad():
        logits, each = model.eval()(images[index].float() / 255, trace=trace)  # [K, K], [K, F, K]
    weights = trace[-1]["weights"].mean(dim=1)[:, 0]  # [K, H, 1 + F, 1 + F] -> [K, 1 + F], the mean of the heads
    vit.write_npz(path, images=images[index], labels=labels[index[:, 0]], weights=weights, guess=logits.argmax(1), each=each.argmax(2))


def main() -> None:
    common, training = vit.common_arguments(), vit.training_arguments(epochs=25, lr=1e-3, batch=None)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[common, training])
    p.add_argument("--checkpoint", metavar="FILE", required=True, help="start from the image encoder in this checkpoint")
    p.add_argument("--model", choices=list(MODELS), default="encoder", help="how attention is factorised (default: %(default)s)")
    p.add_argument("--blocks", type=vit.positive, default=1, help="temporal blocks (divided: image blocks that also attend across time; default: %(default)s)")
    p.add_argument("--frames", type=vit.positive, default=16, help="images of a clip (default: %(default)s)")
    yes_no = argparse.BooleanOptionalAction
    p.add_argument("--positions", action=yes_no, default=True, help="tell the temporal attention which frame is which (default: yes)")
    p.add_argument("--clips", type=vit.positive, default=10, help="clips per step (default: %(default)s; the report: 1)")
    p.add_argument("--balanced", action=yes_no, default=True, help="let the classes take turns, so that 10 clips have all 10 (default: yes)")
    p.add_argument("--repeats", action=yes_no, default=True, help="clips of 1 to --frames different images, at random, instead of always --frames (default: yes)")
    p.add_argument("--frame-loss", type=vit.between(0), default=16.0, help="weight of classifying every image by itself as well (default: %(default)s)")
    p.add_argument("--cutmix", type=vit.between(0, 1), default=0.0, help="share of steps whose clips are mixed by CutMix (default: none)")
    p.add_argument("--smoothing", type=vit.between(0, 1), default=0.1, help="label smoothing (default: %(default)s)")
    p.set_defaults(run=train)
    vit.command(p)


if __name__ == "__main__":
    main()
