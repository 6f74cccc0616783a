"""Stage 1: learn from images without labels, then ask what was learned.

    pretrain --task infonce   two random views of an image shall look alike, all other images different (baseline)
    pretrain --task m         Model M: tell the angle of turned patches, repaint blacked-out patches
    probe                     freeze the encoder, fit a linear layer on its features: what is there to be read off?
    finetune                  train the encoder on, with labels: what was it good for?

Depends on vit.py and data.py: copy this file with those two. Its loops are `pretrain` and `finetune` below.

    python ssl.py pretrain --task m --epochs 4 --out runs/mine
    python ssl.py probe --checkpoint runs/mine/m.pt --out runs/mine
    python ssl.py finetune --checkpoint runs/mine/m.pt --epochs 8 --out runs/mine

Papers: Oord et al. 2018 (InfoNCE), Chen et al. 2020 (SimCLR), Gidaris et al. 2018 (rotation), He et al. 2022 (masked
autoencoders), Chhabra et al. 2024 (PatchRot).
Shape letters as in vit.py; also M masked patches per image, E width of the contrastive embedding.

Each *_step below goes from images to the loss; augmentation and loss are in float32, only the network in autocast.
"""

from __future__ import annotations

if __name__ == "ssl":
    # Python looks in the script's own folder first, so with this file in it `import ssl` - which torch, urllib and
    # many others do - finds this file instead of the standard library's ssl. Under that name it therefore steps
    # aside: it loads the real module, and the import system hands that one out. Nothing below defines more than
    # functions, so nothing else happens under the borrowed name.
    import importlib.machinery
    import importlib.util
    import sys
    import sysconfig

    _spec = importlib.machinery.PathFinder.find_spec("ssl", [sysconfig.get_path("stdlib")])
    sys.modules["ssl"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["ssl"])
else:
    import argparse
    import pathlib
    import time

    import torch
    import torch.nn.functional as F
    from torch import nn

    import data
    import vit

REPORT = {"infonce_probe": 0.4008, "m_probe": 0.3851, "finetune": 0.4029}  # the coursework report's test accuracies


# ----------------------------------------------------------------------------------------------------------------------
# The losses
# ----------------------------------------------------------------------------------------------------------------------


def info_nce(z: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE with both views as queries (Oord et al. 2018, equation 4; NT-Xent in SimCLR, equation 1).

    z: [2B, E], rows i and B + i being two views of the same image -> loss [], share of views [] whose nearest
    neighbour in the batch is the other view of their image. It is plain classification: among the 2B - 1 other views,
    which is my partner? The score is the cosine, sharpened by the temperature.
    """
    z = F.normalize(z.float(), dim=1)  # length one, so that products are cosines
    scores = z @ z.T / temperature  # [2B, 2B]
    scores = scores.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)  # not with oneself
    partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)  # [2B]
    return F.cross_entropy(scores, partner), (scores.argmax(1) == partner).float().mean()


def projector(dim: int, hidden: int = 512, out: int = 128) -> nn.Sequential:
    """The small MLP between CLS and InfoNCE, thrown away afterwards: it may forget what the encoder should keep."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, out))


def infonce_step(model: nn.Module, images: torch.Tensor, args, machine, generator=None) -> dict[str, torch.Tensor]:
    """Loss and metrics of one InfoNCE step on uint8 images [B, 3, S, S]."""
    views = torch.cat([data.contrastive_view(images, generator) for _ in range(2)])  # [2B, 3, S, S]
    with machine.autocast():
        z = model(*machine.part(views, views=2))  # [2B, E]
    loss, match = info_nce(machine.gather(z.float(), views=2), args.temperature)
    return {"loss": loss, "match": match}


PATCHES = {"both": (4, 4), "masking": (4, 0), "rotation": (0, 4), "image-rotation": (0, 0)}  # --pretext -> how many are masked, turned


def m_step(model: nn.Module, images: torch.Tensor, args, machine, generator=None) -> dict[str, torch.Tensor]:
    """Loss and metrics of one Model M step on uint8 images [B, 3, S, S].

        loss = cross-entropy of the angle + mean squared error of the masked patches (+ contrast * InfoNCE)

    The squared error is of standardised pixels; in units of [0, 1] it would weigh 16 times less. With
    --contrast the images are two SimCLR views each, and CLS has to match them as well. --pretext leaves out one of
    the two tasks, or turns the whole image instead of patches (Gidaris et al. 2018).
    """
    if args.contrast:
        images = torch.cat([data.contrastive_view(images, generator) for _ in range(2)])  # [2B, 3, S, S]
    else:
        images = data.crop_flip(images, generator)  # [B, 3, S, S]
    masking, turning = PATCHES[args.pretext]
    augmented, masked, _, angle = data.patch_augment(images, generator, args.patch, masking, turning, args.gap)
    if args.pretext == "image-rotation":
        augmented = data.turn(augmented, angle)
    views = 2 if args.contrast else 1
    images, augmented, masked, angle = machine.part(images, augmented, masked, angle, views=views)
    with machine.autocast():
        logits, pixels, z = model(augmented, masked)  # [B, 4], [B, M, 3*P*P], [B, E]
    losses, metrics = [], {}
    if args.pretext != "masking":
        losses.append(F.cross_entropy(logits.float(), angle))
        metrics["angle"] = (logits.argmax(1) == angle).float().mean()
    if masking:
        hidden = data.take(data.patchify(images, args.patch), masked).flatten(2)  # [B, M, 3*P*P]
        losses.append(F.mse_loss(pixels.float(), vit.standardise(hidden)))
        metrics["mse"] = losses[-1]
    if args.contrast:
        loss, metrics["match"] = info_nce(machine.gather(z.float(), views), args.temperature)
        losses.append(args.contrast * loss)
    return {"loss": sum(losses), **metrics}


def finetune_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, args, machine, generator=None) -> dict:
    """Loss and metrics of one supervised step on uint8 images [B, 3, S, S], labels [B]."""
    images = data.crop_flip(images, generator)  # [B, 3, S, S]
    images, other, share = data.cutmix(images, labels, generator, args.cutmix)
    images, labels, other = machine.part(images, labels, other)
    with machine.autocast():
        logits = model(images)  # [B, K]
    loss = data.cutmix_loss(logits, labels, other, share, args.smoothing)
    return {"loss": loss, "train": (logits.argmax(1) == labels).float().mean()}


# ----------------------------------------------------------------------------------------------------------------------
# The stages
# ----------------------------------------------------------------------------------------------------------------------


def pretrain(args: argparse.Namespace) -> None:
    """Train an encoder without labels; writes out/NAME.pt."""
    machine = vit.Machine(args.device, args.precision, args.seed)
    images, _ = data.load(args.data, "train", machine.device, args.limit)
    encoder = vit.make_encoder(args, args.init)
    model = vit.ModelM(encoder)
    if args.task == "m" and encoder.patches < sum(PATCHES[args.pretext]):
        raise SystemExit(f"this task masks and turns {sum(PATCHES[args.pretext])} patches, but this encoder has only {encoder.patches}; choose a smaller --patch")
    if 2 * args.gap >= args.patch:
        raise SystemExit(f"--gap {args.gap} leaves nothing of a {args.patch}-pixel patch; choose a smaller one")
    if args.task == "infonce" or args.contrast:
        model.projector = projector(encoder.config["dim"])
    model.rotation_head.requires_grad_(args.task == "m" and args.pretext != "masking")  # what a task leaves out stays as it is
    model.reconstruction_head.requires_grad_(args.task == "m" and args.pretext in ("both", "masking"))
    parallel = machine.parallel(model.to(machine.device))
    task_step = {"infonce": infonce_step, "m": m_step}[args.task]

    run = vit.Run(args, args.name or args.task, model, machine, len(images) // args.batch)
    for _ in run.epochs():
        for index in run.steps(data.shuffled_batches(len(images), args.batch, run.generator)):
            metrics = task_step(parallel, images[index], args, machine, run.generator)
            metrics["loss"].backward()
            run.step(**metrics)


def finetune(args: argparse.Namespace) -> None:
    """Train encoder and a 10-class layer on CLS with labels, from a checkpoint or (without one) from scratch."""
    name = args.name or ("finetune" if args.checkpoint else "finetune_scratch")
    machine = vit.Machine(args.device, args.precision, args.seed)
    images, labels = labelled(args, machine.device)
    validation = data.load(args.data, "validation", machine.device, args.limit)
    encoder = vit.make_encoder(args, args.checkpoint)
    model = vit.Classifier(encoder).to(machine.device)
    parallel = machine.parallel(model)

    run = vit.Run(args, name, model, machine, len(images) // args.batch)
    for _ in run.epochs():
        for index in run.steps(data.shuffled_batches(len(images), args.batch, run.generator)):
            metrics = finetune_step(parallel, images[index], labels[index], args, machine, run.generator)
            metrics["loss"].backward()
            run.step(**metrics)
        run.note(validation=vit.accuracy(predict(model, validation[0], machine), validation[1]))

    kept = vit.arrays_path(args, name)
    if kept.exists() and vit.measured(args, name, run.path):
        return
    images, labels = data.load(args.data, args.split, machine.device, args.limit)
    logits = predict(model, images, machine)
    vit.write_npz(kept, guess=logits.argmax(dim=1), truth=labels)
    vit.record(args, name, machine, data.describe(args.data), value=vit.accuracy(logits, labels), report=REPORT.get(name),
               validation=run.history["validation"][-1], epochs=run.epoch, seconds=run.seconds, weights=vit.fingerprint(run.path))  # fmt: skip


def labelled(args: argparse.Namespace, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The training images that have labels, a random share of all: uint8 [n, 3, S, S], labels [n]."""
    images, labels = data.load(args.data, "train", device, args.limit)  # in random order, always the same
    n = round(args.labels * len(images))
    if n < 10:
        raise SystemExit(f"--labels {args.labels:g} of {len(images):,} images leaves {n}; at least 10 are needed")
    return images[:n], labels[:n]


def predict(model: nn.Module, images: torch.Tensor, machine: vit.Machine) -> torch.Tensor:
    """Class logits [n, K], float32, of uint8 images [n, 3, S, S]."""
    model.eval()
    with torch.no_grad(), machine.autocast():
        return machine.shared_out(len(images), machine.eval_batch, lambda index: model(images[index].float() / 255).float())


def features(encoder: vit.ViT | None, images: torch.Tensor, machine: vit.Machine) -> dict[str, torch.Tensor]:
    """What a frozen encoder says of uint8 images [n, 3, S, S]: its CLS token and the mean of its patch tokens, [n, D].

    Without an encoder, the pixels themselves: [n, 3*S*S].
    """
    if encoder is None:
        return {"pixels": images.flatten(1).float() / 255}  # [n, 3*S*S]
    encoder.eval()
    cls, mean = [], []
    for x in images.split(machine.eval_batch):
        with torch.no_grad(), machine.autocast():
            tokens = encoder(x.float() / 255).float()  # [b, 1 + N, D]
        cls.append(tokens[:, 0])
        mean.append(tokens[:, 1:].mean(dim=1))
    return {"cls": torch.cat(cls), "mean": torch.cat(mean)}


def fit_linear(x: torch.Tensor, y: torch.Tensor, decay: float, classes: int = 10) -> nn.Linear:
    """Multinomial logistic regression of labels y [n] on features x [n, D].

    The problem is convex, so L-BFGS on all images at once heads for the one answer, with no learning rate to choose. Its 100
    iterations leave a few hundredths of a percent of accuracy to chance: raw pixels' ± over seeds is the layer's random bias.
    """
    layer = nn.Linear(x.shape[1], classes, device=x.device)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        """The loss, with its gradient: L-BFGS asks for it several times a step, wherever its line search looks."""
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(x), y) + decay * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return layer


def probe(args: argparse.Namespace) -> None:
    """Fit a linear layer on the frozen features of each checkpoint: a row apiece.

    Controls instead of a checkpoint: "untrained" (a random encoder) and "pixels" (no encoder at all).
    """
    if args.name and len(args.checkpoint) > 1:
        raise SystemExit("--name is for one checkpoint; leave it out, and each row is called after its checkpoint")
    names = {checkpoint: args.name or f"{pathlib.Path(checkpoint).stem}_probe" for checkpoint in args.checkpoint}
    left = [checkpoint for checkpoint in names if not vit.measured(args, names[checkpoint], checkpoint)]
    if not left:
        return
    machine = vit.Machine(args.device, args.precision, args.seed)
    splits = {"train": labelled(args, machine.device)}
    for split in ("validation", args.split):
        splits[split] = data.load(args.data, split, machine.device, args.limit)
    for checkpoint in left:
        torch.manual_seed(args.seed)  # so that a row does not depend on those before it
        probe_one(args, names[checkpoint], checkpoint, splits, machine)


def probe_one(args: argparse.Namespace, name: str, checkpoint: str, splits: dict, machine: vit.Machine) -> None:
    """Probe CLS, and beside it the mean patch token; validation picks which counts. `splits`: its images and labels by split."""
    start, encoder, trained = time.perf_counter(), None, {"epoch": 0, "seconds": 0.0, "history": {}}
    if checkpoint != "pixels":
        own = argparse.Namespace(**vars(args))  # make_encoder writes the encoder's sizes into it; the next one may have others
        encoder = vit.make_encoder(own, None if checkpoint == "untrained" else checkpoint).to(machine.device)
        trained = trained if checkpoint == "untrained" else vit.read_checkpoint(checkpoint)
    read = {split: features(encoder, images, machine) for split, (images, _) in splits.items()}
    labels = {split: labels for split, (_, labels) in splits.items()}
    scores = {}  # feature -> (validation accuracy, final accuracy)
    for feature, x in read["train"].items():
        mean, spread = x.mean(dim=0), x.std(dim=0) + 1e-6  # [D]
        for split in read:
            read[split][feature].sub_(mean).div_(spread)  # standardised, so that one weight decay suits all dimensions
        tried = []
        for decay in (1e-4, 1e-3, 1e-2):
            layer = fit_linear(x, labels["train"], decay)
            tried.append([vit.accuracy(layer(read[s][feature]), labels[s]) for s in ("validation", args.split)])
        scores[feature] = max(tried, key=lambda accuracies: accuracies[0])
        print(f"{name}: {feature} features, validation {scores[feature][0]:.4f}", flush=True)
    best = max(scores, key=lambda feature: scores[feature][0])
    vit.record(args, name, machine, data.describe(args.data), value=scores[best][1], features=best,
               validation=scores[best][0], **{f: s[1] for f, s in scores.items()}, report=REPORT.get(name),
               epochs=trained["epoch"], seconds=trained["seconds"] + time.perf_counter() - start,
               training={metric: means[-1] for metric, means in trained["history"].items()},
               weights=vit.fingerprint(checkpoint))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    common = vit.common_arguments()

    p = stages.add_parser("pretrain", parents=[common, vit.training_arguments(epochs=20, lr=5e-4)], help="learn without labels")
    p.add_argument("--task", choices=["infonce", "m"], required=True, help="InfoNCE on two views, or Model M")
    p.add_argument("--init", metavar="FILE", help="start from the encoder in this checkpoint instead of a random one")
    p.add_argument("--contrast", type=vit.between(0), default=0.0, help="weight of InfoNCE beside Model M's two losses (default: none)")
    p.add_argument("--temperature", type=vit.between(0.001), default=0.1, help="of InfoNCE's softmax (default: %(default)s)")
    p.add_argument("--pretext", choices=list(PATCHES), default="both",
                   help="what Model M has to do: the report's two tasks, one of them, or name the angle of the whole image (default: both)")  # fmt: skip
    p.add_argument("--gap", type=int, choices=[0, 1, 2], default=0, help="pixels blackened along each border of every patch (default: none)")
    p.set_defaults(run=pretrain)

    p = stages.add_parser("probe", parents=[common], help="fit a linear layer on frozen features")
    p.add_argument("--checkpoint", required=True, nargs="+", help="checkpoints, or the controls: untrained, pixels")
    p.add_argument("--labels", type=vit.between(0, 1), default=1.0, help="share of the training images that have labels (default: all)")
    p.set_defaults(run=probe)

    p = stages.add_parser("finetune", parents=[common, vit.training_arguments(epochs=50, lr=1e-3)], help="train on with labels")
    p.add_argument("--checkpoint", metavar="FILE", help="start from this encoder (without: from scratch, the control)")
    p.add_argument("--labels", type=vit.between(0, 1), default=1.0, help="share of the training images that have labels (default: all)")
    p.add_argument("--cutmix", type=vit.between(0, 1), default=0.5, help="share of batches mixed by CutMix (default: %(default)s)")
    p.add_argument("--smoothing", type=vit.between(0, 1), default=0.1, help="label smoothing (default: %(default)s)")
    p.set_defaults(run=finetune)

    vit.command(parser)


if __name__ == "__main__":
    main()
