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

    python video.py --checkpoint runs/mine/m.pt --blocks 1 --epochs 4

Papers: Arnab et al. 2021 (ViViT), Bertasius et al. 2021 (TimeSformer). Shape letters as in vit.py; but C
clips, F frames of a clip.
"""

from __future__ import annotations

import argparse
import copy
import sys

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

import data
import vit

# ---------------------------------------------------------------- The two networks


class FactorisedEncoder(nn.Module):
    """Factorised encoder (Arnab et al. 2021, section 3.3, model 2): first space, then time.

    The image encoder sums up each frame in its CLS token; a temporal transformer sums up those in a CLS
    token of its own. Its blocks start as copies of the image encoder's last ones, which know best how a CLS
    token collects from tokens that are nearly finished; the first ones expect patch embeddings. (What they
    get is not quite what they know: it has been through the encoder's last norm.) The frames have positions,
    as in ViViT, though those of a pseudo-video have no order.
    """

    def __init__(self, encoder: vit.ViT, blocks: int = 1, frames: int = 16, classes: int = 10):
        super().__init__()
        dim = encoder.config["dim"]
        self.encoder, self.frames = encoder, frames
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, frames, dim))
        self.blocks = copy.deepcopy(encoder.blocks[-blocks:])
        self.norm = copy.deepcopy(encoder.norm)
        self.head = nn.Linear(dim, classes)

    def encode(self, images: Tensor) -> Tensor:
        """Space: images [B, 3, S, S] in [0, 1], each by itself -> their CLS tokens [B, D]."""
        return self.encoder(images)[:, 0]

    def summary(self, frames: Tensor, trace: list | None = None) -> Tensor:
        """Time: encoded frames [C, F, D] -> the temporal CLS token [C, D] (before the last norm). `trace`:
        see vit.Block."""
        x = torch.cat([self.cls.expand(len(frames), -1, -1), frames + self.positions], dim=1)  # [C, 1 + F, D]
        for block in self.blocks:
            x = block(x, trace)
        return x[:, 0]

    def temporal(self, frames: Tensor, trace: list | None = None) -> Tensor:
        """Encoded frames [C, F, D] -> class logits of the clips [C, K]."""
        return self.head(self.norm(self.summary(frames, trace)))


class TemporalAttention(nn.Module):
    """Attention among the F tokens at the same place of a clip's frames, added to an image encoder's block.

    It starts as a copy of that block's attention behind a gate that is shut (zero): the network starts as
    the image encoder it was made from and opens the gate, channel by channel, as far as other frames help.
    (ViViT, section 3.4, starts there, too, by setting the new attention's weights to zero.) A gate at zero
    still learns: its gradient is that of the output times the attention's update, which is not zero. Only
    the attention behind it gets no gradient before the gate has moved, after the first step.
    """

    def __init__(self, block: vit.Block, frames: int):
        super().__init__()
        dim = block.norm1.normalized_shape[0]
        self.norm, self.attn = copy.deepcopy(block.norm1), copy.deepcopy(block.attn)
        self.positions = nn.Parameter(0.02 * torch.randn(frames, dim))
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: [C, F, T, D] -> what to add to it, [C, F, T, D]."""
        C, F, T, D = x.shape
        x = x.transpose(1, 2).flatten(0, 1) + self.positions  # [C, T, F, D] -> [C*T, F, D]
        update, _ = self.attn(self.norm(x))  # [C*T, F, D]
        return self.gate * update.view(C, T, F, D).transpose(1, 2)  # [C, F, T, D]


class FactorisedAttention(nn.Module):
    """Factorised self-attention (Arnab et al. 2021, section 3.3, model 3): in each block space, then time.

        x = x + attention within the frame(norm(x))                   as in the image encoder
        x = x + gate * attention across frames(norm(x + positions))   new, in the last `blocks` blocks
        x = x + mlp(norm(x))                                          as in the image encoder

    There is no temporal CLS token; the class is read from the mean of the frames' CLS tokens. (ViViT's model
    3 has no CLS token at all and averages all tokens; ours keeps the image encoder's, as M was trained with
    it.)
    """

    def __init__(self, encoder: vit.ViT, blocks: int = 1, frames: int = 16, classes: int = 10):
        super().__init__()
        self.encoder, self.frames, self.first = encoder, frames, len(encoder.blocks) - blocks
        self.temporals = nn.ModuleList([TemporalAttention(b, frames) for b in encoder.blocks[-blocks:]])
        self.head = nn.Linear(encoder.config["dim"], classes)

    def space(self, block: vit.Block, x: Tensor) -> Tensor:
        """Attention within each frame by itself: [..., T, D] -> [..., T, D]."""
        update, _ = block.attn(block.norm1(x).flatten(0, -3))  # [B, T, D]
        return x + update.view(x.shape)

    def encode(self, images: Tensor) -> Tensor:
        """All that comes before the first attention across frames: images [B, 3, S, S], each by itself ->
        tokens [B, T, D]."""
        x = self.encoder.embed(images)
        for block in self.encoder.blocks[: self.first]:
            x = block(x)
        return self.space(self.encoder.blocks[self.first], x)

    def temporal(self, frames: Tensor) -> Tensor:
        """The rest: encoded frames [C, F, T, D] -> class logits [C, K]."""
        x = frames
        for i, (block, temporal) in enumerate(zip(self.encoder.blocks[self.first :], self.temporals)):
            if i > 0:  # in the first block `encode` has done it
                x = self.space(block, x)
            if i == len(self.temporals) - 1:
                x = x[:, :, :1]  # [C, F, 1, D]: only CLS is read, and from here on it asks no patch any more
            x = x + temporal(x)
            x = x + block.mlp(block.norm2(x))
        cls = self.encoder.norm(x)[:, :, 0]  # [C, F, D]
        return self.head(cls.mean(dim=1))


MODELS = {"encoder": FactorisedEncoder, "divided": FactorisedAttention}


def repeated(encoded: Tensor, frames: int) -> Tensor:
    """Static videos: encoded images [B, ...] -> [B, F, ...]. An image is encoded once, and shown F times."""
    return encoded[:, None].expand(-1, frames, *encoded.shape[1:])


def static(model: nn.Module, images: Tensor) -> Tensor:
    """Class logits [B, K] of uint8 images [B, 3, S, S], each as a static video."""
    return model.temporal(repeated(model.encode(images.float() / 255), model.frames))


# ---------------------------------------------------------------- Clips
# Sixteen images of one class are easily told: where half of them are recognised, a vote is nearly always
# right. Trained on that alone, the network stops there: the loss is small and no longer says what is wrong
# with any single image. But a static video, by which it is judged, has no other images to vote with. Hence a
# second loss: every image must also be recognised by itself, as the static video that it will be shown as in
# the test. A weight of 16 = F counts each image as much as the clip. Said plainly: 16 of 17 parts of the loss
# then are image classification, and that, not the clips, is what most of the accuracy comes from (compare the
# rows clips_1 and clips_2, without it: --frame-loss 0).


def clip_batches(sampler: data.SameClassBatchSampler, clips: int, device: torch.device | str = "cpu"):
    """Yield one epoch of the sampler's clips, `clips` a step: indices [C, F]; a smaller rest is dropped."""
    epoch = torch.tensor(list(sampler), device=device)  # [all, F], all at once: a copy makes a GPU wait
    yield from map(data.own_part, epoch[: len(epoch) - len(epoch) % clips].split(clips))


def train(args: argparse.Namespace) -> None:
    """Train on pseudo-videos, from the image encoder to the head; judge on static videos."""
    device, autocast = vit.set_up(args)
    source = data.source(args.data)
    images, labels = data.load(args.data, "train", device, args.limit)
    validation, truth = data.load(args.data, "validation", device, args.limit)
    encoder = vit.load_encoder(args.checkpoint, images.shape[-1])
    if args.blocks > len(encoder.blocks):
        sys.exit(f"the encoder has only {len(encoder.blocks)} blocks; choose --blocks from 1 to that")
    try:
        sampler = data.SameClassBatchSampler(labels, args.frames, args.seed)
    except ValueError as error:
        sys.exit(f"{error}; choose a larger --limit or fewer --frames")
    recipe = vit.recipe_of(args, images, labels, args.checkpoint)
    model = MODELS[args.model](encoder, args.blocks, args.frames, len(source.classes)).to(device)
    steps = len(sampler) // args.clips
    optimizer = vit.make_optimizer(model, args.optimizer, args.lr, args.weight_decay, args.precision)
    schedule = LambdaLR(optimizer, lambda step: vit.triangle(step, args.epochs * steps, args.warmup))
    name = args.name or ("video_divided" if args.model == "divided" else f"video_{args.blocks}")
    run = vit.Run(args, name, model, optimizer, schedule, steps, recipe)

    for epoch in range(run.epoch, args.epochs):
        model.train()
        sampler.set_epoch(epoch)
        for index in clip_batches(sampler, args.clips, device):  # [C, F]
            x = data.crop_flip(images[index.flatten()], run.generator)  # [C*F, 3, S, S]
            y = labels[index[:, 0]]  # [C]
            with autocast:
                encoded = model.encode(x)  # [C*F, D]; divided: [C*F, T, D]
                logits = model.temporal(encoded.unflatten(0, index.shape))  # [C, K]
            loss = cross_entropy(logits.float(), y, label_smoothing=args.smoothing)
            if args.frame_loss:
                with autocast:
                    alone = model.temporal(repeated(encoded, args.frames))  # [C*F, K]
                each = y.repeat_interleave(args.frames)  # [C*F]
                frame_loss = cross_entropy(alone.float(), each, label_smoothing=args.smoothing)
                loss = loss + args.frame_loss * frame_loss
            loss.backward()
            vit.average_gradients(model)
            # one absurd batch must not rule the momentum; 1 is the usual bound, not tuned
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(loss=loss, train=(logits.argmax(1) == y).float().mean())
        logits = vit.evaluate(model, autocast, lambda x: static(model, x), validation)
        run.save(validation=vit.accuracy(logits, truth))

    images, labels = data.load(args.data, args.split, device, args.limit)
    logits = vit.evaluate(model, autocast, lambda x: static(model, x), images)
    row = run.row() | {"value": vit.accuracy(logits, labels), "provenance": source.provenance}
    if args.model == "encoder":
        shown = clips_for_the_picture(model, images, labels, logits.argmax(1))
        with vit.whole_file(vit.row_path(args, name, "npz")) as file:
            np.savez_compressed(file, **{key: x.cpu() for key, x in shown.items()})
    vit.record(args, name, images, labels, **row)


@torch.no_grad()
def clips_for_the_picture(model: FactorisedEncoder, images: Tensor, labels: Tensor, guess: Tensor) -> dict:
    """The first F images of each class as a clip, how the temporal CLS weighs them, and the answers: `each`
    image's by itself, from `guess` [n], and the `clip`'s."""
    found = {"images": [], "labels": [], "weights": [], "each": [], "clip": []}
    for k in labels.unique():
        index, trace = (labels == k).nonzero()[: model.frames, 0], []  # [F]
        if len(index) == model.frames:
            logits = model.temporal(model.encode(images[index].float() / 255)[None], trace)  # [1, K]
            weights = trace[-1]["weights"].mean(dim=1)[0, 0]  # [1, H, 1 + F, 1 + F] -> [1 + F]
            values = (images[index], k, weights, guess[index], logits.argmax())
            for key, value in zip(found, values):
                found[key].append(value)
    return {key: torch.stack(values) for key, values in found.items() if values}


def load_video(path: str, size: int) -> FactorisedEncoder:
    """The factorised encoder, for images of `size` pixels, in a checkpoint written by `train`."""
    state, encoder = vit.read_checkpoint(path), vit.load_encoder(path, size)
    recipe = state["recipe"]
    if recipe.get("model") != "encoder":
        sys.exit(f"{path} holds no factorised encoder; `python video.py --model encoder` makes one")
    classes = len(state["model"]["head.bias"])
    model = FactorisedEncoder(encoder, recipe["blocks"], recipe["frames"], classes)
    model.load_state_dict(state["model"])
    return model


def main() -> None:
    # 25 epochs: the report's. Peak learning rates: the best of those tried (results/tuning.md). Ten clips a
    # step, 160 images, is about the batch of the other stages
    parents = [vit.common_options(), vit.training_options(epochs=25, muon=4e-3, adamw=1e-3)]
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw, parents=parents)
    add = p.add_argument
    add("--checkpoint", type=vit.path, required=True, help="start from the image encoder in this checkpoint")
    add("--model", choices=MODELS, default="encoder", help="how attention is factorised (default: encoder)")
    add("--blocks", type=int, default=1, help="blocks that attend across time (default: 1)")
    add("--frames", type=int, default=16, help="images of a clip (default: %(default)s)")
    add("--clips", type=int, default=10, help="clips per step (default: %(default)s; the report: 1)")
    add("--frame-loss", type=float, default=16.0, help="weight of classifying each image alone (default: 16)")
    add("--smoothing", type=float, default=0.1, help="label smoothing (default: %(default)s)")
    p.set_defaults(run=train)
    vit.command(p)


if __name__ == "__main__":
    main()
