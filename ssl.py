"""Stage 1: learn from images without labels, then ask what was learned.

    pretrain --task infonce   two random views of an image shall look alike, all other images different
    pretrain --task m         Model M: tell the angle of turned patches, repaint blacked-out patches
    probe                     freeze the encoder, fit a linear layer on its features: what can be read off?
    finetune                  train the encoder on, with labels: what was it good for?

Depends on vit.py and data.py: copy this file with those two.

    python ssl.py pretrain --task infonce --epochs 4
    python ssl.py pretrain --task m --init runs/mine/infonce.pt --epochs 3
    python ssl.py probe --checkpoint runs/mine/infonce.pt runs/mine/m.pt
    python ssl.py finetune --checkpoint runs/mine/m.pt --epochs 6

A task of your own takes four steps. Write its loss beside `info_nce`; copy the loop that is nearest to it,
with the loss and the checkpoint's name changed (and the model, if it needs another head); put the loop into
TASKS, from where --task knows it; probe the checkpoint like the others.

Papers: Oord et al. 2018 (InfoNCE), Chen et al. 2020 (SimCLR), Gidaris et al. 2018 (rotation), He et al. 2022
(masked autoencoders), Chhabra et al. 2022 (PatchRot; arXiv 2210.15722).
Shape letters as in vit.py; also M masked patches per image, E width of the contrastive embedding.
"""

from __future__ import annotations

if __name__ == "ssl":
    # Python looks in the script's own folder first, so `import ssl`, as in torch, finds this file instead of
    # Python's own ssl. Under that name it steps aside: it loads the real module, and the import system hands
    # that one out. The rest is executed all the same, with a stand-in for what can't be imported yet.
    import importlib.machinery
    import importlib.util
    import sys
    import sysconfig

    _spec = importlib.machinery.PathFinder.find_spec("ssl", [sysconfig.get_path("stdlib")])
    sys.modules["ssl"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["ssl"])

    class Anything:
        """Has every attribute, and can be called, indexed and inherited."""

        def __getattr__(self, *_, **__):
            return self

        __call__ = __getitem__ = __getattr__

        def __mro_entries__(self, _):
            return ()

    torch = F = nn = Tensor = LambdaLR = data = vit = Anything()  # and what else you use outside of functions
else:
    import argparse
    import pathlib
    import sys

    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LambdaLR

    import data
    import vit

# ---------------------------------------------------------------- InfoNCE


def info_nce(first: Tensor, second: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE with both views as queries (Oord et al. 2018, equation 4; NT-Xent in SimCLR, equation 1).

    first, second: two views' embeddings of the same images, [B, E] each -> loss [], share of views [] whose
    nearest neighbour in the batch is the other view of their image. It is plain classification: among the 2B
    - 1 other views, which is my partner? The score is the cosine, divided by the temperature: the lower it
    is, the more the few views count that look most like me, and the less all others.
    """
    z = F.normalize(torch.cat([first, second]).float(), dim=1)  # [2B, E], of length one: products are cosines
    scores = z @ z.T / temperature  # [2B, 2B]
    oneself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    scores = scores.masked_fill(oneself, -torch.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)  # [2B]
    return F.cross_entropy(scores, partner), (scores.argmax(1) == partner).float().mean()


def pretrain_infonce(args: argparse.Namespace) -> None:
    """Train the encoder to know an image again in another view; writes out/infonce.pt."""
    device, autocast = vit.set_up(args)
    images, labels = data.load(args.data, "train", device, args.limit)
    encoder = encoder_of(args, args.init, images)
    recipe = vit.recipe_of(args, images, labels, args.init)
    model = vit.Contrastive(encoder).to(device)
    steps = len(images) // args.batch
    optimizer = vit.make_optimizer(model, args.optimizer, args.lr, args.weight_decay, args.precision)
    schedule = LambdaLR(optimizer, lambda step: vit.triangle(step, args.epochs * steps, args.warmup))
    run = vit.Run(args, args.name or "infonce", model, optimizer, schedule, steps, recipe)

    # A checkpoint is written after each epoch. Of your own things it knows what is part of `model` (put an
    # EMA teacher there); what you write to a file within an epoch comes twice if that epoch is cut off.
    for _ in range(run.epoch, args.epochs):
        model.train()
        for index in data.shuffled_batches(len(images), args.batch, run.generator):
            views = [data.contrastive_view(images[index], run.generator) for _ in range(2)]
            with autocast:
                z = model(torch.cat(views))  # [2B, 3, S, S] -> [2B, E]
            first, second = z.chunk(2)  # [B, E] each
            loss, match = info_nce(vit.gather(first), vit.gather(second), args.temperature)
            loss.backward()
            vit.average_gradients(model)
            # a batch that the network finds absurd has a huge gradient, which would rule the momentum for
            # twenty steps; 1 is the usual bound, not tuned
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(loss=loss, match=match)
        run.save()


# ---------------------------------------------------------------- Model M
#   loss = cross-entropy of the angle + mean squared error of the blacked-out patches
#
# The error is that of standardised pixels; in units of [0, 1] it would weigh 16 times less. Both losses then
# start near 1 (a uniform guess of four angles: 1.39; the mean colour: about 1) and are simply added.
#
# A masked autoencoder (He et al. 2022) hides three quarters of the patches, encodes the others only, and
# paints with a decoder of several blocks. Here, as in the report, a quarter is hidden; the encoder reads the
# black patches like all others, and one linear layer paints. That is simpler, and an easier task: a black
# patch's neighbours are mostly there.


def paint_loss(painted: Tensor, images: Tensor, masked: Tensor, patch: int) -> Tensor:
    """Mean squared error [] of painted [B, M, 3*P*P], standardised, for the patches masked [B, M] of images
    [B, 3, S, S] in [0, 1]."""
    b = torch.arange(len(images), device=images.device)[:, None]  # [B, 1]
    hidden = data.patchify(images, patch)[b, masked].flatten(2)  # [B, M, 3*P*P]
    return F.mse_loss(painted.float(), vit.standardise(hidden))


def pretrain_m(args: argparse.Namespace) -> None:
    """Train Model M to name the angle and repaint the blacked-out patches; writes out/m.pt."""
    device, autocast = vit.set_up(args)
    images, labels = data.load(args.data, "train", device, args.limit)
    encoder = encoder_of(args, args.init, images)
    patch, quarter = encoder.config["patch_size"], encoder.patches // 4
    args.masked = quarter if args.masked is None else args.masked
    args.turned = quarter if args.turned is None else args.turned
    print(f"of {encoder.patches} patches {args.masked} are blacked out, {args.turned} others turned")
    if not 0 < args.masked + args.turned <= encoder.patches:
        sys.exit(f"--masked and --turned together must be 1 to {encoder.patches} patches")
    recipe = vit.recipe_of(args, images, labels, args.init)
    model = vit.ModelM(encoder).to(device)
    steps = len(images) // args.batch
    optimizer = vit.make_optimizer(model, args.optimizer, args.lr, args.weight_decay, args.precision)
    schedule = LambdaLR(optimizer, lambda step: vit.triangle(step, args.epochs * steps, args.warmup))
    run = vit.Run(args, args.name or "m", model, optimizer, schedule, steps, recipe)

    for _ in range(run.epoch, args.epochs):
        model.train()
        for index in data.shuffled_batches(len(images), args.batch, run.generator):
            # what has to be painted is the cropped image as it is before patches are blacked out and turned
            target = data.crop_flip(images[index], run.generator)  # [B, 3, S, S]
            x, masked, _, angle = data.patch_augment(target, run.generator, patch, args.masked, args.turned)
            with autocast:
                logits, painted = model(x, masked)  # [B, 4], [B, M, 3*P*P]
            loss, metrics = 0, {}
            if args.turned:
                loss = loss + F.cross_entropy(logits.float(), angle)
                metrics["angle"] = (logits.argmax(1) == angle).float().mean()
            if args.masked:
                metrics["mse"] = paint_loss(painted, target, masked, patch)
                loss = loss + metrics["mse"]
            loss.backward()
            vit.average_gradients(model)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(loss=loss, **metrics)
        run.save()


# ---------------------------------------------------------------- Fine-tuning


def finetune(args: argparse.Namespace) -> None:
    """Train encoder and a linear layer on CLS with labels, from a checkpoint or from scratch."""
    device, autocast = vit.set_up(args)
    images, labels = labelled(args, device)
    validation, truth = data.load(args.data, "validation", device, args.limit)
    source = data.source(args.data)
    encoder = encoder_of(args, args.checkpoint, images)
    recipe = vit.recipe_of(args, images, labels, args.checkpoint)
    model = vit.Classifier(encoder, len(source.classes)).to(device)
    steps = len(images) // args.batch
    optimizer = vit.make_optimizer(model, args.optimizer, args.lr, args.weight_decay, args.precision)
    schedule = LambdaLR(optimizer, lambda step: vit.triangle(step, args.epochs * steps, args.warmup))
    name = args.name or ("finetune" if args.checkpoint else "finetune_scratch")
    run = vit.Run(args, name, model, optimizer, schedule, steps, recipe)

    for _ in range(run.epoch, args.epochs):
        model.train()
        for index in data.shuffled_batches(len(images), args.batch, run.generator):
            x, y = data.crop_flip(images[index], run.generator), labels[index]  # [B, 3, S, S], [B]
            if args.cutmix:
                x, y = data.cutmix(x, y, len(source.classes), run.generator)  # [B, 3, S, S], [B, K]
            with autocast:
                logits = model(x)  # [B, K]
            # Label smoothing asks for 0.91 on the right class instead of 1, so that logits need not grow for
            # ever (Szegedy et al. 2016; 0.1 is their value)
            loss = F.cross_entropy(logits.float(), y, label_smoothing=args.smoothing)
            loss.backward()
            vit.average_gradients(model)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(loss=loss, train=(logits.argmax(1) == labels[index]).float().mean())
        logits = vit.evaluate(model, autocast, lambda x: model(x.float() / 255), validation)
        run.save(validation=vit.accuracy(logits, truth))

    images, labels = data.load(args.data, args.split, device, args.limit)
    logits = vit.evaluate(model, autocast, lambda x: model(x.float() / 255), images)
    row = run.row() | {"value": vit.accuracy(logits, labels), "provenance": source.provenance}
    vit.record(args, name, images, labels, **row)


def labelled(args: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    """The training images that have labels, a random share of all: uint8 [n, 3, S, S], labels [n]."""
    images, labels = data.load(args.data, "train", device, args.limit)  # in random order, always the same
    n = round(args.labels * len(images))
    if n < 10:
        sys.exit(f"--labels {args.labels:g} of {len(images):,} images leaves {n}; at least 10 are needed")
    return images[:n], labels[:n]


def encoder_of(args: argparse.Namespace, checkpoint: str | None, images: Tensor) -> vit.ViT:
    """The encoder in `checkpoint`, which must be as the options ask; without one, a new random encoder."""
    size = images.shape[-1]
    try:
        new = (size, args.patch or 8, args.dim or 128)
        encoder = vit.load_encoder(checkpoint, size) if checkpoint else vit.ViT(*new)
    except ValueError as error:
        sys.exit(f"no such encoder: {error}; choose another --patch or --dim")
    for option, has in {"patch": encoder.config["patch_size"], "dim": encoder.config["dim"]}.items():
        if vars(args)[option] not in (None, has):
            sys.exit(f"the encoder in {checkpoint} has --{option} {has}, not {vars(args)[option]}")
    args.patch, args.dim = encoder.config["patch_size"], encoder.config["dim"]  # as if they had been typed
    return encoder


# ---------------------------------------------------------------- The linear probe
# What did the encoder learn? Freeze it, and let a linear layer read the classes off its features. Linear,
# since that can only find what is already laid out plainly; a deeper head would learn the task itself, and
# be what is measured. Two features are tried, as different losses teach them: CLS by InfoNCE and the angle,
# the patch tokens by repainting; and three decays, since the best one depends on the number of labels: after
# InfoNCE 1e-4 was best with 45,000, 1e-3 with 4,500, 1e-2 with 450 (results/tuning.md). Validation images
# choose among these six.

DECAYS = (1e-4, 1e-3, 1e-2)


def features(encoder: vit.ViT | None, images: Tensor, autocast) -> dict[str, Tensor]:
    """What a frozen encoder says of uint8 images [n, 3, S, S]: CLS and the mean of the patch tokens, both
    [n, D]; without an encoder the pixels themselves, [n, 3*S*S]."""
    if encoder is None:
        return {"pixels": images.flatten(1).float() / 255}  # [n, 3*S*S]
    tokens = vit.evaluate(encoder, autocast, lambda x: encoder(x.float() / 255), images)  # [n, 1 + N, D]
    return {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(dim=1)}


def probe(args: argparse.Namespace) -> None:
    """Fit a linear layer on the frozen features of each checkpoint, a row apiece.

    Controls instead of a checkpoint: "untrained" (a random encoder) and "pixels" (no encoder at all).
    """
    device, autocast = vit.set_up(args)
    source, images, labels = data.source(args.data), {}, {}  # of each split
    images["train"], labels["train"] = labelled(args, device)
    for split in ("validation", args.split):
        images[split], labels[split] = data.load(args.data, split, device, args.limit)

    for path in args.checkpoint:
        row = {"epochs": 0, "value": 0.0, "validation": -1.0, "provenance": source.provenance}
        torch.manual_seed(args.seed)  # an untrained encoder does not depend on the rows before it
        encoder = None
        if path != "pixels":
            own = argparse.Namespace(**vars(args))  # what encoder_of writes there is of this encoder only
            encoder = encoder_of(own, None if path == "untrained" else path, images["train"]).to(device)
        if path not in ("pixels", "untrained"):
            row["epochs"] = vit.read_checkpoint(path)["epoch"]
        read = {split: features(encoder, x, autocast) for split, x in images.items()}
        for feature, raw in read["train"].items():
            # standardised, so that one weight decay suits all dimensions
            mean, spread = raw.mean(dim=0), raw.std(dim=0) + 1e-6  # [D]
            x = {split: (found[feature] - mean) / spread for split, found in read.items()}  # [n, D] each
            for decay in DECAYS:
                layer = vit.fit_linear(x["train"], labels["train"], decay, len(source.classes))
                judged = ("validation", args.split)
                right = {split: vit.accuracy(layer(x[split]), labels[split]) for split in judged}
                print(f"{feature}, decay {decay:g}: validation {right['validation']:.4f}", flush=True)
                if right["validation"] > row["validation"]:
                    row |= {"feature": feature, "decay": decay, "validation": right["validation"]}
                    row["value"] = right[args.split]
        name = f"{pathlib.Path(path).stem}_{args.name or 'probe'}"
        vit.record(args, name, images[args.split], labels[args.split], **row)


# ---------------------------------------------------------------- The command line

TASKS = {"infonce": pretrain_infonce, "m": pretrain_m}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    stages = parser.add_subparsers(dest="stage", required=True)
    common = vit.common_options()
    common.add_argument("--dim", type=int, help="width of a new encoder (default: 128)")
    common.add_argument("--patch", type=int, help="patch size of a new encoder in pixels (default: 8)")

    # 20 epochs, of Model M, and 50 of fine-tuning are the report's. Peak learning rates: results/tuning.md
    training = vit.training_options(epochs=20, muon=4e-3, adamw=5e-4, batch=128)
    p = stages.add_parser("pretrain", parents=[common, training], help="learn without labels")
    add = p.add_argument
    add("--task", choices=TASKS, required=True, help="InfoNCE on two views, or Model M")
    add("--init", type=vit.path, help="start from the encoder in this checkpoint instead of a random one")
    add("--temperature", type=float, default=0.1, help="of InfoNCE's softmax (default: %(default)s)")
    add("--masked", type=int, help="patches that Model M must paint (default: a quarter; 0: none)")
    add("--turned", type=int, help="patches whose angle Model M must name (default: a quarter; 0: none)")
    p.set_defaults(run=lambda args: TASKS[args.task](args))

    p = stages.add_parser("probe", parents=[common], help="fit a linear layer on frozen features")
    add = p.add_argument
    where = "checkpoints (rows are named by file name: no two alike), or the controls: untrained, pixels"
    add("--checkpoint", type=vit.path, required=True, nargs="+", help=where)
    add("--labels", type=float, default=1.0, help="share of images with labels (default: all)")
    p.set_defaults(run=probe)

    training = vit.training_options(epochs=50, muon=4e-3, adamw=1e-3, batch=128)
    p = stages.add_parser("finetune", parents=[common, training], help="train on with labels")
    add = p.add_argument
    add("--checkpoint", type=vit.path, help="start from this encoder (without: from scratch, the control)")
    add("--labels", type=float, default=1.0, help="share of images with labels (default: all)")
    add("--smoothing", type=float, default=0.1, help="label smoothing (default: %(default)s)")
    add("--cutmix", action="store_true", help="paste part of another image into each, in half of the steps")
    p.set_defaults(run=finetune)

    vit.command(parser)


if __name__ == "__main__":
    main()
