"""Stage 1: learn from images without labels, then ask what was learned.

    pretrain --task infonce   two random views of an image shall look alike, all other images different
    pretrain --task m         Model M: tell the angle of turned patches, repaint blacked-out patches
    probe                     freeze the encoder, fit a linear layer on its features: what can be read off?
    finetune                  train the encoder on, with labels: what was it good for?

Depends on vit.py and data.py: copy this file with those two.

    python ssl.py pretrain --task m --epochs 4 --out runs/mine
    python ssl.py probe --checkpoint runs/mine/m.pt --out runs/mine
    python ssl.py finetune --checkpoint runs/mine/m.pt --epochs 8 --out runs/mine

Papers: Oord et al. 2018 (InfoNCE), Chen et al. 2020 (SimCLR), Gidaris et al. 2018 (rotation), He et al. 2022
(masked autoencoders), Chhabra et al. 2024 (PatchRot).
Shape letters as in vit.py; also M masked patches per image, E width of the contrastive embedding.
"""

from __future__ import annotations

if __name__ == "ssl":
    # Python looks in the script's own folder first, so `import ssl`, as in torch and urllib, finds this file
    # instead of Python's own ssl. Under that name it therefore steps aside: it loads the real module, and the
    # import system hands that one out. (What follows defines only functions: a class would need torch.)
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
    import sys
    import time

    import torch
    import torch.nn.functional as F
    from torch import Generator, Tensor, nn

    import data
    import vit

# the coursework report's test accuracies
REPORTED = {"infonce_probe": 0.4008, "m_probe": 0.3851, "finetune": 0.4029}

# ---------------------------------------------------------------- InfoNCE


def info_nce(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE with both views as queries (Oord et al. 2018, equation 4; NT-Xent in SimCLR, equation 1).

    z: [2B, E], rows i and B + i being two views of the same image -> loss [], share of views [] whose nearest
    neighbour in the batch is the other view of their image. It is plain classification: among the 2B - 1
    other views, which is my partner? The score is the cosine, sharpened by the temperature.
    """
    z = F.normalize(z.float(), dim=1)  # length one, so that products are cosines
    scores = z @ z.T / temperature  # [2B, 2B]
    oneself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    scores = scores.masked_fill(oneself, -torch.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)  # [2B]
    return F.cross_entropy(scores, partner), (scores.argmax(1) == partner).float().mean()


def two_views(images: Tensor, generator: Generator | None) -> Tensor:
    """uint8 [B, 3, S, S] -> two random SimCLR views [2B, 3, S, S] in [0, 1], rows i and B + i of image i."""
    return torch.cat([data.contrastive_view(images, generator), data.contrastive_view(images, generator)])


def pretrain_infonce(args: argparse.Namespace, encoder: vit.ViT, images: Tensor, machine: vit.Machine):
    """Train the encoder to know an image again in another view; writes out/NAME.pt."""
    model = vit.ModelM(encoder, projector=True)
    model.rotation_head.requires_grad_(False)  # no part of this task
    model.reconstruction_head.requires_grad_(False)
    parallel = vit.data_parallel(model.to(machine.device))

    run = vit.Run(args, args.name or "infonce", model, machine, encoder, len(images) // args.batch)
    for _ in range(run.epoch, args.epochs):
        model.train()
        for index in data.shuffled_batches(len(images), args.batch, run.generator):
            x = vit.share(two_views(images[index], run.generator))  # [2B, 3, S, S]
            masked = torch.empty(len(x), 0, dtype=torch.long, device=x.device)  # [2B, 0]: no patch
            with machine.autocast():
                _, _, z = parallel(x, masked)  # [2B, E]
            loss, match = info_nce(vit.gather(z), args.temperature)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            run.set_learning_rate()
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.log(loss=loss, match=match)
        run.save()


# ---------------------------------------------------------------- Model M
#   loss = cross-entropy of the angle + mean squared error of the blacked-out patches (+ contrast * InfoNCE)
#
# The error is that of standardised pixels; in units of [0, 1] it would weigh 16 times less. R in the shapes
# below: rows of a step, B images, or with --contrast the 2B views of them.

# --pretext: share of the patches that are masked, and that are turned; "image-rotation" turns the whole image
TASKS = {"both": (1 / 4, 1 / 4), "masking": (1 / 4, 0), "rotation": (0, 1 / 4), "image-rotation": (0, 0)}


def paint_loss(painted: Tensor, images: Tensor, masked: Tensor, patch: int) -> Tensor:
    """Mean squared error [] of painted [B, M, 3*P*P], standardised, for the patches masked [B, M] of images
    [B, 3, S, S] in [0, 1]."""
    hidden = data.take(data.patchify(images, patch), masked).flatten(2)  # [B, M, 3*P*P]
    return F.mse_loss(painted.float(), vit.standardise(hidden))


def pretrain_m(args: argparse.Namespace, encoder: vit.ViT, images: Tensor, machine: vit.Machine):
    """Train Model M on its task, or half of it, and InfoNCE beside it where asked for; writes out/NAME.pt."""
    patch = encoder.config["patch_size"]
    masked_share, turned_share = TASKS[args.pretext]
    to_mask, to_turn = round(masked_share * encoder.patches), round(turned_share * encoder.patches)
    print(f"{args.pretext}: of {encoder.patches} patches {to_mask} are blacked out, {to_turn} others turned")
    names_angle, paints = args.pretext != "masking", to_mask > 0
    augment = two_views if args.contrast else data.crop_flip
    model = vit.ModelM(encoder, projector=args.contrast > 0)
    model.rotation_head.requires_grad_(names_angle)
    model.reconstruction_head.requires_grad_(paints)
    parallel = vit.data_parallel(model.to(machine.device))

    run = vit.Run(args, args.name or "m", model, machine, encoder, len(images) // args.batch)
    for _ in range(run.epoch, args.epochs):
        model.train()
        for index in data.shuffled_batches(len(images), args.batch, run.generator):
            # what has to be painted is the cropped image as it is before patches are blacked out and turned
            target = augment(images[index], run.generator)  # [R, 3, S, S]
            x, masked, _, angle = data.patch_augment(target, run.generator, patch, to_mask, to_turn, args.gap)
            if args.pretext == "image-rotation":
                x = data.turn(x, angle)
            x, target = vit.share(x), vit.share(target)  # [R, 3, S, S]
            masked, angle = vit.share(masked), vit.share(angle)  # [R, M], [R]
            with machine.autocast():
                logits, painted, z = parallel(x, masked)  # [R, 4], [R, M, 3*P*P], [R, E]
            loss, metrics = 0, {}
            if names_angle:
                loss = loss + F.cross_entropy(logits.float(), angle)
                metrics["angle"] = (logits.argmax(1) == angle).float().mean()
            if paints:
                metrics["mse"] = paint_loss(painted, target, masked, patch)
                loss = loss + metrics["mse"]
            if args.contrast:
                contrast, metrics["match"] = info_nce(vit.gather(z), args.temperature)
                loss = loss + args.contrast * contrast
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            run.set_learning_rate()
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.log(loss=loss, **metrics)
        run.save()


def pretrain(args: argparse.Namespace) -> None:
    """Train an encoder without labels, by --task."""
    machine = vit.Machine(args.device, args.precision, args.seed)
    images, _ = data.load(args.data, "train", machine.device, args.limit)
    encoder = vit.make_encoder(args.init, args.patch, args.dim, args.stem)
    if 2 * args.gap >= encoder.config["patch_size"]:
        sys.exit(f"--gap {args.gap} leaves nothing of a patch; choose a smaller one")
    if args.task == "infonce":
        pretrain_infonce(args, encoder, images, machine)
    else:
        pretrain_m(args, encoder, images, machine)


# ---------------------------------------------------------------- Fine-tuning


def finetune(args: argparse.Namespace) -> None:
    """Train encoder and a 10-class layer on CLS with labels, from a checkpoint or from scratch."""
    name = args.name or ("finetune" if args.checkpoint else "finetune_scratch")
    machine = vit.Machine(args.device, args.precision, args.seed)
    images, labels = labelled(args.data, args.labels, args.limit, machine.device)
    validation, truth = data.load(args.data, "validation", machine.device, args.limit)
    encoder = vit.make_encoder(args.checkpoint, args.patch, args.dim, args.stem)
    model = vit.Classifier(encoder).to(machine.device)
    parallel = vit.data_parallel(model)

    run = vit.Run(args, name, model, machine, encoder, len(images) // args.batch)
    for _ in range(run.epoch, args.epochs):
        model.train()
        for index in data.shuffled_batches(len(images), args.batch, run.generator):
            x, y = data.crop_flip(images[index], run.generator), labels[index]  # [B, 3, S, S], [B]
            x, other, kept = data.cutmix(x, y, run.generator, args.cutmix)  # other [B]: what is pasted in
            x, y, other = vit.share(x), vit.share(y), vit.share(other)
            with machine.autocast():
                logits = parallel(x)  # [B, K]
            loss = data.cutmix_loss(logits, y, other, kept, args.smoothing)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            run.set_learning_rate()
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.log(loss=loss, train=data.cutmix_accuracy(logits, y, other, kept))
        run.save(validation=vit.accuracy(predict(model, validation, machine), truth))

    if vit.measured(args, name, run.path):
        return
    images, labels = data.load(args.data, args.split, machine.device, args.limit)
    logits = predict(model, images, machine)
    vit.write_arrays(vit.arrays_path(args, name), guess=logits.argmax(dim=1), truth=labels)
    row = {"value": vit.accuracy(logits, labels), "report": REPORTED.get(name)} | run.summary()
    vit.record(args, name, machine, data.source(args.data), **row)


def labelled(folder: str, share: float, limit: int | None, device: torch.device):
    """The training images that have labels, a random `share` of all: uint8 [n, 3, S, S], labels [n]."""
    images, labels = data.load(folder, "train", device, limit)  # in random order, always the same
    n = round(share * len(images))
    if n < 10:
        sys.exit(f"--labels {share:g} of {len(images):,} images leaves {n}; at least 10 are needed")
    return images[:n], labels[:n]


def predict(model: nn.Module, images: Tensor, machine: vit.Machine) -> Tensor:
    """Class logits [n, K], float32, of uint8 images [n, 3, S, S]."""
    model.eval()
    with torch.no_grad(), machine.autocast():
        return torch.cat([model(x.float() / 255).float() for x in images.split(machine.eval_batch)])


# ---------------------------------------------------------------- The linear probe


def features(encoder: vit.ViT | None, images: Tensor, machine: vit.Machine) -> dict[str, Tensor]:
    """What a frozen encoder says of uint8 images [n, 3, S, S]: CLS and the mean of the patch tokens, both
    [n, D]; without an encoder the pixels themselves, [n, 3*S*S]."""
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


def fit_linear(x: Tensor, y: Tensor, decay: float, classes: int = 10) -> nn.Linear:
    """Multinomial logistic regression of labels y [n] on features x [n, D].

    The problem is convex, so L-BFGS on all images at once heads for the one answer, with no learning rate to
    choose. Its 100 iterations leave a few hundredths of a percent of accuracy to the layer's random bias.
    """
    layer = nn.Linear(x.shape[1], classes, device=x.device)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        """The loss, and its gradient: L-BFGS asks for them wherever its line search looks."""
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(x), y) + decay * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return layer


def best_probe(read: dict[str, dict], labels: dict[str, Tensor], final: str) -> dict:
    """Probe each feature with three weight decays; the validation split picks the best of all, whose accuracy
    on the split `final` is the row's `value`. read: split -> feature -> [n, D]; labels: split -> [n]."""
    row = {"validation": -1.0}
    for feature, raw in read["train"].items():
        # standardised, so that one weight decay suits all dimensions
        mean, spread = raw.mean(dim=0), raw.std(dim=0) + 1e-6  # [D]
        x = {split: (found[feature] - mean) / spread for split, found in read.items()}  # [n, D] each
        layers = [fit_linear(x["train"], labels["train"], decay) for decay in (1e-4, 1e-3, 1e-2)]
        scores = [vit.accuracy(layer(x["validation"]), labels["validation"]) for layer in layers]
        best = layers[scores.index(max(scores))]
        row[feature] = vit.accuracy(best(x[final]), labels[final])
        print(f"{feature} features, validation {max(scores):.4f}", flush=True)
        if max(scores) > row["validation"]:
            row |= {"features": feature, "validation": max(scores), "value": row[feature]}
    return row


def probe(args: argparse.Namespace) -> None:
    """Fit a linear layer on the frozen features of each checkpoint, a row apiece.

    Controls instead of a checkpoint: "untrained" (a random encoder) and "pixels" (no encoder at all).
    """
    if args.name and len(args.checkpoint) > 1:
        sys.exit("--name is for one checkpoint; leave it out, and each row is called after its checkpoint")
    percent = "" if args.labels == 1 else f"_{100 * args.labels:g}"
    names = {path: args.name or f"{pathlib.Path(path).stem}_probe{percent}" for path in args.checkpoint}
    left = [path for path in names if not vit.measured(args, names[path], path)]
    if not left:
        return
    machine = vit.Machine(args.device, args.precision, args.seed)
    images, labels = {}, {}  # of each split
    images["train"], labels["train"] = labelled(args.data, args.labels, args.limit, machine.device)
    for split in ("validation", args.split):
        images[split], labels[split] = data.load(args.data, split, machine.device, args.limit)

    for path in left:
        start = time.perf_counter()
        torch.manual_seed(args.seed)  # so that a row does not depend on those before it
        file = None if path in ("untrained", "pixels") else path
        training = vit.read_checkpoint(file) if file else {"epoch": 0, "seconds": 0.0, "history": {}}
        encoder = None
        if path != "pixels":
            encoder = vit.make_encoder(file, args.patch, args.dim, args.stem).to(machine.device)
        read = {split: features(encoder, x, machine) for split, x in images.items()}
        row = best_probe(read, labels, args.split)
        row |= {"report": REPORTED.get(names[path]), "weights": vit.fingerprint(path)}
        row |= {"epochs": training["epoch"], "seconds": training["seconds"] + time.perf_counter() - start}
        row |= {"training": {metric: means[-1] for metric, means in training["history"].items()}}
        vit.record(args, names[path], machine, data.source(args.data), **row)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    stages = parser.add_subparsers(dest="stage", required=True)
    common = vit.common_arguments()

    training = vit.training_arguments(epochs=20, lr=5e-4, batch=128)
    p = stages.add_parser("pretrain", parents=[common, training], help="learn without labels")
    add = p.add_argument
    add("--task", choices=["infonce", "m"], required=True, help="InfoNCE on two views, or Model M")
    add("--init", metavar="FILE", help="start from the encoder in this checkpoint instead of a random one")
    add("--contrast", type=float, default=0.0, help="weight of InfoNCE beside Model M's losses (default: 0)")
    add("--temperature", type=float, default=0.1, help="of InfoNCE's softmax (default: %(default)s)")
    add("--pretext", choices=TASKS, default="both", help="Model M's task, or a part of it (default: both)")
    add("--gap", type=int, choices=[0, 1, 2], default=0, help="pixels blackened along each patch's border")
    p.set_defaults(run=pretrain)

    p = stages.add_parser("probe", parents=[common], help="fit a linear layer on frozen features")
    add = p.add_argument
    add("--checkpoint", required=True, nargs="+", help="checkpoints, or the controls: untrained, pixels")
    add("--labels", type=float, default=1.0, help="share of training images that have labels (default: all)")
    p.set_defaults(run=probe)

    training = vit.training_arguments(epochs=50, lr=1e-3, batch=128)
    p = stages.add_parser("finetune", parents=[common, training], help="train on with labels")
    add = p.add_argument
    add("--checkpoint", metavar="FILE", help="start from this encoder (without: from scratch, the control)")
    add("--labels", type=float, default=1.0, help="share of training images that have labels (default: all)")
    add("--cutmix", type=float, default=0.5, help="share of batches mixed by CutMix (default: %(default)s)")
    add("--smoothing", type=float, default=0.1, help="label smoothing (default: %(default)s)")
    p.set_defaults(run=finetune)

    vit.command(parser, data.source)


if __name__ == "__main__":
    main()
