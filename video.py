"""Stage 2: pseudo-videos, and factorised spatio-temporal transformers that start from Model M.

A pseudo-video is a clip of F = 16 images of one class, shown as if they were the frames of a film. Attention
over all F * 17 tokens at once has F times as many scores as F images by themselves. (At these 272 tokens a
whole block, which is mostly MLP, then takes about 1.3 times as long; at a film's thousands of tokens the
scores are what counts.) Both models below factorise attention into space and time:

    encoder    factorised encoder (ViViT's model 2): each frame by itself through the image encoder, then
               the frames' CLS tokens through a temporal transformer, which has its own CLS token
    divided    factorised self-attention (ViViT's model 3): in the last blocks, attention among the patches of
               a frame, then among the frames at the same patch (TimeSformer: the other way round)

A test image is judged as a static video: F times itself.

Depends on vit.py and data.py: copy this file with those two. Its training loop is in `train`.

    python video.py --checkpoint runs/mine/m.pt --model encoder --blocks 1 --epochs 4 --out runs/mine

Papers: Arnab et al. 2021 (ViViT), Bertasius et al. 2021 (TimeSformer). Shape letters as in vit.py; also C
clips, F frames of a clip, n different images shown in them.
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import data
import vit

# the coursework report's test accuracies, of this training (run_all.sh, train_as_the_report)
REPORTED = {"video_report_1": 0.4404, "video_report_2": 0.4244}

# ---------------------------------------------------------------- The two networks


class FactorisedEncoder(nn.Module):
    """Factorised encoder (Arnab et al. 2021, section 3.3, model 2): first space, then time.

    The image encoder sums up each frame in its CLS token; a temporal transformer sums up those in a CLS
    token of its own. Its blocks start as copies of the image encoder's last ones, which know best how a CLS
    token collects from tokens that are nearly finished; the first ones expect patch embeddings. (What they
    get is not quite what they know: it has been through the encoder's last norm.) `ordered`: frames have
    positions, as in ViViT. A pseudo-video has no order, so they can't help here; without them any order of
    the frames gives the same answer (a control: video_unordered).
    """

    def __init__(self, encoder: vit.ViT, blocks: int = 1, frames: int = 16, classes: int = 10, ordered=True):
        super().__init__()
        dim = encoder.config["dim"]
        self.encoder, self.frames = encoder, frames
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, frames, dim)) if ordered else None
        self.blocks = copy.deepcopy(encoder.blocks[-blocks:])
        self.norm = copy.deepcopy(encoder.norm)
        self.head = nn.Linear(dim, classes)
        self.frame_head = nn.Linear(dim, classes)  # for the loss of every image by itself, and the figure

    def tokens(self, images: Tensor, shown: Tensor, trace: list | None = None):
        """images: [C, n, 3, S, S]; shown: [C, F], which of the clip's n images each frame shows
        -> tokens of the last temporal block [C, 1 + F, D] (token 0 is the temporal CLS), and the images' CLS
        [C, n, D]. `trace`: see vit.Block.

        An image is encoded once however many frames show it: a static video costs little more than one.
        """
        C, n = images.shape[:2]
        image_cls = self.encoder(images.flatten(0, 1))[:, 0].view(C, n, -1)  # [C*n, 3, S, S] -> [C, n, D]
        x = data.take(image_cls, shown)  # [C, F, D]
        if self.positions is not None:
            x = x + self.positions
        x = torch.cat([self.cls.expand(C, -1, -1), x], dim=1)  # [C, 1 + F, D]
        for block in self.blocks:
            x = block(x, trace)
        return x, image_cls

    def forward(self, images: Tensor, shown: Tensor, trace: list | None = None):
        """As `tokens` -> class logits of the clips [C, K] and of the images, each by itself [C, n, K]."""
        x, image_cls = self.tokens(images, shown, trace)
        return self.head(self.norm(x[:, 0])), self.frame_head(image_cls)


class TemporalAttention(nn.Module):
    """Attention among the F tokens at the same place of a clip's frames, added to an image encoder's block.

    It starts as a copy of that block's attention behind a gate that is shut (zero): the network starts as
    the image encoder it was made from and opens the gate, channel by channel, as far as other frames help.
    (ViViT, section 3.4, starts there, too, by setting the new attention's weights to zero.) A gate at zero
    still learns: its gradient is that of the output times the attention's update, which is not zero. Only
    the attention behind it gets no gradient before the gate has moved, after the first step.
    """

    def __init__(self, block: vit.Block, frames: int, ordered: bool):
        super().__init__()
        dim = block.norm1.normalized_shape[0]
        self.norm, self.attn = copy.deepcopy(block.norm1), copy.deepcopy(block.attn)
        self.positions = nn.Parameter(0.02 * torch.randn(frames, dim)) if ordered else None
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: [C, F, T, D] -> what to add to it, [C, F, T, D]."""
        C, F, T, D = x.shape
        x = x.transpose(1, 2).flatten(0, 1)  # [C, T, F, D] -> [C*T, F, D]
        if self.positions is not None:
            x = x + self.positions
        update, _ = self.attn(self.norm(x))  # [C*T, F, D]
        return self.gate * update.view(C, T, F, D).transpose(1, 2)  # [C, F, T, D]


class FactorisedAttention(nn.Module):
    """Factorised self-attention (Arnab et al. 2021, section 3.3, model 3): in each block space, then time.

        x = x + attention within the frame(norm(x))       as in the image encoder
        x = x + gate * attention across frames(norm(x))   new, in the last `blocks` blocks
        x = x + mlp(norm(x))                              as in the image encoder

    There is no temporal CLS token; the class is read from the mean of the frames' CLS tokens. (ViViT's model
    3 has no CLS token at all and averages all tokens; ours keeps the image encoder's, as M was trained with
    it.)
    """

    def __init__(self, encoder: vit.ViT, blocks: int = 1, frames: int = 16, classes: int = 10, ordered=True):
        super().__init__()
        dim = encoder.config["dim"]
        self.encoder = encoder
        last = encoder.blocks[-blocks:]
        self.temporal = nn.ModuleList([TemporalAttention(block, frames, ordered) for block in last])
        self.head = nn.Linear(dim, classes)
        self.frame_head = nn.Linear(dim, classes)

    def forward(self, images: Tensor, shown: Tensor) -> tuple[Tensor, Tensor | None]:
        """As FactorisedEncoder.forward; from the first block with temporal attention on, every frame is
        computed, a repeated one too. The images by themselves, as the image encoder alone sees them, are
        computed beside it in training only (else None): nobody else asks."""
        C, n = images.shape[:2]
        spatial = len(self.encoder.blocks) - len(self.temporal)  # blocks without temporal attention
        single = self.encoder.embed(images.flatten(0, 1))  # [C*n, T, D]
        for block in self.encoder.blocks[:spatial]:
            single = block(single)
        x = data.take(single.unflatten(0, (C, n)), shown)  # [C, F, T, D]
        for block, temporal in zip(self.encoder.blocks[spatial:], self.temporal):
            update, _ = block.attn(block.norm1(x).flatten(0, 1))  # [C*F, T, D]
            x = x + update.view(x.shape)
            x = x + temporal(x)
            x = x + block.mlp(block.norm2(x))
        cls = self.encoder.norm(x)[:, :, 0]  # [C, F, D]
        logits = self.head(cls.mean(dim=1))  # [C, K]
        if not self.training:
            return logits, None
        for block in self.encoder.blocks[spatial:]:
            single = block(single)
        image_cls = self.encoder.norm(single)[:, 0].unflatten(0, (C, n))  # [C, n, D]
        return logits, self.frame_head(image_cls)


MODELS = {"encoder": FactorisedEncoder, "divided": FactorisedAttention}

# ---------------------------------------------------------------- Clips
# Sixteen images of one class are easily told: where half of them are recognised, a vote is nearly always
# right. Trained on that alone, the network stops there: the loss is small and no longer says what is wrong
# with any single image. But a static video has no other images to vote with. Hence two additions: clips have
# a random number of different images (--repeats), from a static video to 16; and every image must also be
# classified by itself (--frame-loss). Its weight of 16 counts each image as much as the clip. Said plainly:
# 16 of 17 parts of the loss then are image classification, and that, not the clips, is what most of the
# accuracy comes from (results/report.md, the last step of "Why did the report's two-block video model fall
# behind one?").
#
# Ten clips a step, 160 images, is about the batch of the other stages; the learning rate is theirs, too.


def clip_steps(sampler: data.SameClassBatchSampler, labels: list[int], clips: int, balanced: bool) -> Tensor:
    """One epoch of the sampler's clips, `clips` per optimiser step: indices [steps, clips, F].

    `balanced`: the classes take turns, so that 10 clips hold each of the 10 classes once; what a class has
    more than the smallest one is left out. A rest smaller than a step is dropped.
    """
    epoch = list(sampler)
    if balanced:
        of_class = {}
        for clip in epoch:
            of_class.setdefault(labels[clip[0]], []).append(clip)
        epoch = []
        for one_of_each in zip(*of_class.values()):
            epoch += one_of_each
    steps = len(epoch) // clips
    return torch.tensor(epoch[: steps * clips]).view(steps, clips, sampler.batch)


def random_repeats(clips: int, frames: int, device, generator: Generator | None = None) -> Tensor:
    """Which image each frame shows, [clips, frames], in clips of 1 to `frames` different images."""
    different = torch.randint(1, frames + 1, (clips, 1), device=device, generator=generator)
    shown = torch.arange(frames, device=device) % different  # [clips, frames]
    order = torch.rand(clips, frames, device=device, generator=generator).argsort(dim=1)
    return shown.gather(1, order)


def clip_loss(logits, image_logits, labels, other, kept, smoothing: float, frame_loss: float) -> Tensor:
    """Cross-entropy [] of the clips' logits [C, K], plus `frame_loss` times that of every image [C, F, K].

    A clip mixed by CutMix has two labels, labels [C] and other [C], the first for the share `kept` [] of its
    pixels.
    """
    loss = data.cutmix_loss(logits, labels, other, kept, smoothing)
    if frame_loss:
        frames = image_logits.shape[1]
        own, pasted = labels.repeat_interleave(frames), other.repeat_interleave(frames)  # [C*F] each
        loss = loss + frame_loss * data.cutmix_loss(image_logits.flatten(0, 1), own, pasted, kept, smoothing)
    return loss


# ---------------------------------------------------------------- The stage


def train(args: argparse.Namespace) -> None:
    """Train on pseudo-videos, from the image encoder to the head; judge on static videos."""
    name = args.name or f"video_{args.model}_{args.blocks}"
    machine, source = vit.set_up(args.device, args.precision, args.seed), data.source(args.data)
    images, labels = data.load(args.data, "train", machine.device, args.limit)
    validation, truth = data.load(args.data, "validation", machine.device, args.limit)
    encoder = vit.load_encoder(args.checkpoint, images.shape[-1])
    start = vit.hash_of_checkpoint(args.checkpoint)
    if not 1 <= args.blocks <= len(encoder.blocks):
        sys.exit(f"the encoder has only {len(encoder.blocks)} blocks; choose --blocks from 1 to that")
    try:
        sampler = data.SameClassBatchSampler(labels, args.frames, args.seed)
    except ValueError as error:
        sys.exit(f"{error}; choose a larger --limit or fewer --frames")
    classes = len(source.classes)
    model = MODELS[args.model](encoder, args.blocks, args.frames, classes, ordered=args.positions)
    model.to(machine.device).frame_head.requires_grad_(args.frame_loss > 0)
    parallel = vit.data_parallel(model)
    in_order = torch.arange(args.frames, device=machine.device).expand(args.clips, -1)  # [C, F]

    label_of = labels.tolist()
    steps = len(clip_steps(sampler, label_of, args.clips, args.balanced))
    if steps == 0:
        sys.exit(
            f"all clips are fewer than one step's {args.clips}; choose fewer --clips or a larger --limit"
        )
    optimizer = vit.make_optimizer(model, args.optimizer, args.lr, args.weight_decay, machine.precision)
    schedule = LambdaLR(optimizer, lambda step: vit.warmup_cosine(step, args.epochs * steps, args.warmup))
    settings = vit.settings_of(args, encoder, start=start, images=data.fingerprint(images, labels))
    plan = vit.plan_of(args, steps, images=args.clips * args.frames)
    run = vit.Run(name, model, optimizer, schedule, machine, settings, **plan)

    for epoch in range(run.epoch, run.epochs):
        model.train()
        sampler.set_epoch(epoch)
        clips = clip_steps(sampler, label_of, args.clips, args.balanced)  # [steps, C, F]
        for index in clips.to(machine.device):  # [C, F]
            y = labels[index[:, 0]]  # [C]
            x = data.crop_flip(images[index.flatten()], run.generator)  # [C*F, 3, S, S]
            # to CutMix a clip is one image of F * 3 channels, so all its frames get the same rectangle
            x = x.unflatten(0, index.shape).flatten(1, 2)  # [C, F*3, S, S]
            x, other, kept = data.cutmix(x, y, run.generator, args.cutmix)
            x = x.unflatten(1, (args.frames, 3))  # [C, F, 3, S, S]
            shown = in_order
            if args.repeats:
                shown = random_repeats(args.clips, args.frames, machine.device, run.generator)
            x, y, other, shown = vit.share(x), vit.share(y), vit.share(other), vit.share(shown)
            with run.machine.autocast():
                logits, image_logits = parallel(x, shown)  # [C, K], [C, F, K]
            loss = clip_loss(logits, image_logits, y, other, kept, args.smoothing, args.frame_loss)
            loss.backward()
            # one absurd batch must not rule the momentum; 1 is the usual bound, not tuned
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(loss=loss, train=data.cutmix_accuracy(logits, y, other, kept))
        static = same_class_accuracy(model, validation, truth, 1, args.frames, args.seed, run.machine)
        run.save(validation=static)
    run.finish()

    images, labels = data.load(args.data, args.split, machine.device, args.limit)
    row = run.summary() | {"images": data.fingerprint(images, labels)}
    if vit.measured(args, name, row):
        return
    smallest = int(labels.bincount()[labels.unique()].min())  # images of the rarest class
    different = {}  # number of different images in a clip -> accuracy
    for n in sorted({1, 2, 4, 8, 16, args.frames}):
        if n <= min(smallest, args.frames):
            different[n] = same_class_accuracy(model, images, labels, n, args.frames, args.seed, run.machine)
    if args.model == "encoder" and args.frame_loss and smallest >= args.frames:
        arrays = clips_for_the_figure(model, images, labels, args.frames)
        if arrays:
            vit.write_arrays(vit.arrays_path(args, name), **arrays)
    row |= {"value": different[1], "report": REPORTED.get(name), "different": different}
    vit.record(args, name, run.machine, source, **row)


def predict(model: nn.Module, images: Tensor, index: Tensor, frames: int, machine: vit.Machine) -> Tensor:
    """Class logits [c, K], float32, of the clips that show images[index], index [c, n], in turn until
    `frames` are full. images: uint8 [N, 3, S, S]. With n = 1 these are static videos."""
    model.eval()
    n = index.shape[1]
    shown = torch.arange(frames, device=images.device) % n  # [F]
    logits = []
    for clips in index.split(max(1, machine.eval_batch // n)):
        with torch.no_grad(), machine.autocast():
            logits.append(model(images[clips].float() / 255, shown.expand(len(clips), -1))[0].float())
    return torch.cat(logits)


def same_class_accuracy(model, images, labels, different: int, frames: int, seed: int, machine) -> float:
    """Accuracy on clips of so many `different` images of one class. 1: static videos, every image once.
    More: the labels were used to put the clip together, so this says what a vote would bring, not how well
    an image is recognised."""
    clips = list(data.SameClassBatchSampler(labels, different, seed))
    index = torch.tensor(clips, device=images.device)  # [c, n]
    return vit.accuracy(predict(model, images, index, frames, machine), labels[index[:, 0]])


def clips_for_the_figure(model: FactorisedEncoder, images: Tensor, labels: Tensor, frames: int) -> dict:
    """The first `frames` images of each class as a clip, how the temporal CLS weighs them, the answers; empty
    where no block attends across time."""
    index = torch.stack([(labels == k).nonzero()[:frames, 0] for k in labels.unique()])  # [K, F]
    shown = torch.arange(frames, device=images.device).expand(len(index), -1)  # [K, F]
    trace = []
    with torch.no_grad():
        logits, image_logits = model.eval()(images[index].float() / 255, shown, trace)  # [K, K], [K, F, K]
    if not trace:
        return {}
    weights = trace[-1]["weights"].mean(dim=1)[:, 0]  # [K, H, 1 + F, 1 + F] -> [K, 1 + F]
    arrays = {"images": images[index], "labels": labels[index[:, 0]], "weights": weights}
    return arrays | {"guess": logits.argmax(1), "each": image_logits.argmax(2)}


def load_video(path: str) -> FactorisedEncoder:
    """The factorised encoder in a checkpoint written by `train`."""
    state = vit.read_checkpoint(path)
    settings = state["settings"]
    if settings.get("model") != "encoder":
        sys.exit(f"{path} holds no factorised encoder; `python video.py --model encoder` makes one")
    encoder = vit.ViT(**state["config"])
    classes = len(state["model"]["head.bias"])
    frames, ordered = settings["frames"], settings["positions"]
    model = FactorisedEncoder(encoder, settings["blocks"], frames, classes, ordered)
    vit.load_weights(model, state["model"], path)
    return model


def main() -> None:
    # 25 epochs: the report's. Peak learning rates: the best of those tried (results/tuning.md)
    parents = [vit.common_arguments(), vit.training_arguments(epochs=25, muon=4e-3, adamw=1e-3)]
    raw, yes_no = argparse.RawDescriptionHelpFormatter, argparse.BooleanOptionalAction
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw, parents=parents)
    add = p.add_argument
    add("--checkpoint", metavar="FILE", required=True, help="start from the image encoder in this checkpoint")
    add("--model", choices=MODELS, default="encoder", help="how attention is factorised (default: encoder)")
    add("--blocks", type=int, default=1, help="blocks that attend across time (default: 1)")
    add("--frames", type=vit.count, default=16, help="images of a clip (default: %(default)s)")
    add("--positions", action=yes_no, default=True, help="tell which frame is which (default: yes)")
    add("--clips", type=vit.count, default=10, help="clips per step (default: %(default)s; the report: 1)")
    add("--balanced", action=yes_no, default=True, help="let the classes take turns (default: yes)")
    add("--repeats", action=yes_no, default=True, help="clips may repeat their images (default: yes)")
    add("--frame-loss", type=float, default=16.0, help="weight of classifying each image alone (default: 16)")
    # CutMix is meant for long training. Smoothing: 0.1 is Szegedy et al.'s (2016), so that logits need not
    # grow for ever
    add("--cutmix", type=vit.fraction, default=0.0, help="share of steps mixed by CutMix (default: none)")
    add("--smoothing", type=vit.fraction, default=0.1, help="label smoothing (default: %(default)s)")
    p.set_defaults(run=train)
    vit.command(p, data.source)


if __name__ == "__main__":
    main()
