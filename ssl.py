"""Stage 1: learn from images without labels, then ask what was learned.

    pretrain --task infonce   two random views of an image shall look alike, all other images different
    pretrain --task m         Model M: tell the angle of turned patches, repaint blacked-out patches
    probe                     freeze the encoder, fit a linear layer on its features: what can be read off?
    finetune                  train the encoder on, with labels: what was it good for?

Depends on vit.py and data.py: copy this file with those two.

    python ssl.py pretrain --task m --epochs 3 --out runs/mine
    python ssl.py probe --checkpoint runs/mine/m.pt --out runs/mine
    python ssl.py finetune --checkpoint runs/mine/m.pt --epochs 6 --out runs/mine

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
    from torch.optim.lr_scheduler import LambdaLR

    import data
    import vit

# the coursework report's test accuracies (its Model M went on from its InfoNCE encoder)
REPORTED = {"infonce_probe": 0.4008, "m_infonce_probe": 0.3851, "finetune_m_infonce": 0.4029}

# ---------------------------------------------------------------- InfoNCE


def info_nce(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE with both views as queries (Oord et al. 2018, equation 4; NT-Xent in SimCLR, equation 1).

    z: [2B, E], rows i and B + i being two views of the same image -> loss [], share of views [] whose
    nearest neighbour in the batch is the other view of their image. It is plain classification: among the 2B
    - 1 other views, which is my partner? The score is the cosine, divided by the temperature: the lower it
    is, the more the few views count that look most like me, and the less all others. SimCLR finds 0.5 best
    on CIFAR-10 when trained to convergence (appendix B.9); in three epochs 0.1, 0.2 and 0.5 were level here
    (results/tuning.md).
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


def pretrain_infonce(args: argparse.Namespace, encoder: vit.ViT, images: Tensor, machine, settings: dict):
    """Train the encoder to know an image again in another view; writes out/NAME.pt."""
    model = vit.Contrastive(encoder).to(machine.device)
    parallel = vit.data_parallel(model)  # the model itself, unless several processes share the work
    steps = vit.steps_of(len(images), args.batch)
    optimizer = vit.make_optimizer(model, args.optimizer, args.lr, args.weight_decay, machine.precision)
    schedule = LambdaLR(optimizer, lambda step: vit.warmup_cosine(step, args.epochs * steps, args.warmup))
    name = args.name or "infonce"
    run = vit.Run(name, model, optimizer, schedule, machine, settings, **vit.plan_of(args, steps, args.batch))

    for _ in range(run.epoch, run.epochs):
        model.train()
        for index in data.shuffled_batches(len(images), args.batch, run.generator):
            x = vit.share(two_views(images[index], run.generator))  # [2B, 3, S, S]
            with run.machine.autocast():
                z = parallel(x)  # [2B, E]
            loss, match = info_nce(vit.gather(z), args.temperature)
            loss.backward()
            # a batch that the network finds absurd has a huge gradient, which would rule the momentum for
            # twenty steps; 1 is the usual bound, not tuned
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(loss=loss, match=match)
        run.save()
    run.finish()


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
    hidden = data.take(data.patchify(images, patch), masked).flatten(2)  # [B, M, 3*P*P]
    return F.mse_loss(painted.float(), vit.standardise(hidden))


def pretrain_m(args: argparse.Namespace, encoder: vit.ViT, images: Tensor, machine, settings: dict):
    """Train Model M to name the angle and repaint the blacked-out patches; writes out/NAME.pt."""
    patch, quarter = encoder.config["patch_size"], encoder.patches // 4
    print(f"of {encoder.patches} patches {quarter} are blacked out, {quarter} others turned")
    model = vit.ModelM(encoder).to(machine.device)
    parallel = vit.data_parallel(model)
    steps = vit.steps_of(len(images), args.batch)
    optimizer = vit.make_optimizer(model, args.optimizer, args.lr, args.weight_decay, machine.precision)
    schedule = LambdaLR(optimizer, lambda step: vit.warmup_cosine(step, args.epochs * steps, args.warmup))
    name = args.name or "m"
    run = vit.Run(name, model, optimizer, schedule, machine, settings, **vit.plan_of(args, steps, args.batch))

    for _ in range(run.epoch, run.epochs):
        model.train()
        for index in data.shuffled_batches(len(images), args.batch, run.generator):
            # what has to be painted is the cropped image as it is before patches are blacked out and turned
            target = data.crop_flip(images[index], run.generator)  # [B, 3, S, S]
            x, masked, _, angle = data.patch_augment(target, run.generator, patch, quarter, quarter)
            x, target = vit.share(x), vit.share(target)  # [B, 3, S, S]
            masked, angle = vit.share(masked), vit.share(angle)  # [B, M], [B]
            with run.machine.autocast():
                logits, painted = parallel(x, masked)  # [B, 4], [B, M, 3*P*P]
            mse = paint_loss(painted, target, masked, patch)
            loss = F.cross_entropy(logits.float(), angle) + mse
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(loss=loss, mse=mse, angle=(logits.argmax(1) == angle).float().mean())
        run.save()
    run.finish()


def pretrain_joint(args: argparse.Namespace, encoder: vit.ViT, images: Tensor, machine, settings: dict):
    """Train Model M on its two tasks and InfoNCE at once, on the same two views; writes out/NAME.pt.

    Both views go in blacked out and turned. InfoNCE asks that this not matter, the rotation head that CLS
    still tells the angle. Both can be had: the projector may drop the angle, CLS need not. The weight of
    InfoNCE, --contrast, was not tuned: at 1 the three losses are simply added.
    """
    patch, quarter = encoder.config["patch_size"], encoder.patches // 4
    model = vit.JointM(encoder).to(machine.device)
    parallel = vit.data_parallel(model)
    steps = vit.steps_of(len(images), args.batch)
    optimizer = vit.make_optimizer(model, args.optimizer, args.lr, args.weight_decay, machine.precision)
    schedule = LambdaLR(optimizer, lambda step: vit.warmup_cosine(step, args.epochs * steps, args.warmup))
    name = args.name or "m_joint"
    run = vit.Run(name, model, optimizer, schedule, machine, settings, **vit.plan_of(args, steps, args.batch))

    for _ in range(run.epoch, run.epochs):
        model.train()
        for index in data.shuffled_batches(len(images), args.batch, run.generator):
            target = two_views(images[index], run.generator)  # [2B, 3, S, S]
            x, masked, _, angle = data.patch_augment(target, run.generator, patch, quarter, quarter)
            x, target = vit.share(x), vit.share(target)  # [2B, 3, S, S]
            masked, angle = vit.share(masked), vit.share(angle)  # [2B, M], [2B]
            with run.machine.autocast():
                logits, painted, z = parallel(x, masked)  # [2B, 4], [2B, M, 3*P*P], [2B, E]
            mse = paint_loss(painted, target, masked, patch)
            contrast, match = info_nce(vit.gather(z), args.temperature)
            loss = F.cross_entropy(logits.float(), angle) + mse + args.contrast * contrast
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(loss=loss, mse=mse, angle=(logits.argmax(1) == angle).float().mean(), match=match)
        run.save()
    run.finish()


# which of its tasks Model M has, and whether it turns the whole image instead of patches; --pretext
PRETEXTS = {
    "both": {"masks": True, "turns": True, "whole": False},
    "masking": {"masks": True, "turns": False, "whole": False},
    "rotation": {"masks": False, "turns": True, "whole": False},
    "image-rotation": {"masks": False, "turns": True, "whole": True},
}


def pretrain_part(args: argparse.Namespace, encoder: vit.ViT, images: Tensor, machine, settings: dict):
    """Train on a part of Model M's task (an ablation), or with gaps between the patches; writes
    out/NAME.pt."""
    patch, quarter = encoder.config["patch_size"], encoder.patches // 4
    pretext = PRETEXTS[args.pretext]
    to_mask = quarter if pretext["masks"] else 0
    to_turn = quarter if pretext["turns"] and not pretext["whole"] else 0
    turned = "the whole image is turned" if pretext["whole"] else f"{to_turn} others turned"
    print(f"{args.pretext}: of {encoder.patches} patches {to_mask} are blacked out, {turned}")
    model = vit.ModelM(encoder).to(machine.device)
    model.rotation_head.requires_grad_(pretext["turns"])
    model.reconstruction_head.requires_grad_(pretext["masks"])
    parallel = vit.data_parallel(model)
    steps = vit.steps_of(len(images), args.batch)
    optimizer = vit.make_optimizer(model, args.optimizer, args.lr, args.weight_decay, machine.precision)
    schedule = LambdaLR(optimizer, lambda step: vit.warmup_cosine(step, args.epochs * steps, args.warmup))
    name = args.name or "m"
    run = vit.Run(name, model, optimizer, schedule, machine, settings, **vit.plan_of(args, steps, args.batch))

    for _ in range(run.epoch, run.epochs):
        model.train()
        for index in data.shuffled_batches(len(images), args.batch, run.generator):
            target = data.crop_flip(images[index], run.generator)  # [B, 3, S, S]
            x, masked, _, angle = data.patch_augment(target, run.generator, patch, to_mask, to_turn, args.gap)
            if pretext["whole"]:
                x = data.turn(x, angle)
            x, target = vit.share(x), vit.share(target)  # [B, 3, S, S]
            masked, angle = vit.share(masked), vit.share(angle)  # [B, M], [B]
            with run.machine.autocast():
                logits, painted = parallel(x, masked)  # [B, 4], [B, M, 3*P*P]
            loss, metrics = 0, {}
            if pretext["turns"]:
                loss = loss + F.cross_entropy(logits.float(), angle)
                metrics["angle"] = (logits.argmax(1) == angle).float().mean()
            if pretext["masks"]:
                metrics["mse"] = paint_loss(painted, target, masked, patch)
                loss = loss + metrics["mse"]
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(loss=loss, **metrics)
        run.save()
    run.finish()


def pretrain(args: argparse.Namespace) -> None:
    """Train an encoder without labels, by --task."""
    machine = vit.set_up(args.device, args.precision, args.seed)
    images, labels = data.load(args.data, "train", machine.device, args.limit)
    encoder = vit.make_encoder(args.init, images.shape[-1], args.patch, args.dim, args.stem)
    if 2 * args.gap >= encoder.config["patch_size"]:
        sys.exit(f"--gap {args.gap} leaves nothing of a patch; choose a smaller one")
    in_parts = args.pretext != "both" or args.gap > 0
    if in_parts and (args.contrast or args.task == "infonce"):
        sys.exit("--pretext and --gap change Model M alone; leave out --contrast, and choose --task m")
    if args.task == "infonce" and args.contrast:
        sys.exit("--contrast adds InfoNCE to Model M; choose --task m, or leave it out")
    settings = vit.settings_of(
        args, encoder, start=vit.hash_of_checkpoint(args.init), images=data.fingerprint(images, labels)
    )
    if args.task == "infonce":
        train = pretrain_infonce
    elif args.contrast:
        train = pretrain_joint
    else:
        train = pretrain_part if in_parts else pretrain_m
    train(args, encoder, images, machine, settings)


# ---------------------------------------------------------------- Fine-tuning
# Two habits against learning the training images by heart. Label smoothing asks for 0.91 on the right class
# instead of 1 (Szegedy et al. 2016; 0.1 is their value), so that logits need not grow for ever. CutMix
# pastes a piece of another image, and asks for both classes by their shares of the pixels; half of the
# batches, as is usual for CIFAR (Yun et al. 2019): --cutmix 0.5. It is meant for long training (theirs: 300
# epochs): the default is none, and of run_all.sh's profiles only full has it. What it brings: not measured.


def finetune(args: argparse.Namespace) -> None:
    """Train encoder and a linear layer on CLS with labels, from a checkpoint or from scratch."""
    name = args.name or ("finetune" if args.checkpoint else "finetune_scratch")
    machine, source = vit.set_up(args.device, args.precision, args.seed), data.source(args.data)
    images, labels = labelled(args.data, args.labels, args.limit, machine.device)
    validation, truth = data.load(args.data, "validation", machine.device, args.limit)
    encoder = vit.make_encoder(args.checkpoint, images.shape[-1], args.patch, args.dim, args.stem)
    settings = vit.settings_of(
        args, encoder, start=vit.hash_of_checkpoint(args.checkpoint), images=data.fingerprint(images, labels)
    )
    model = vit.Classifier(encoder, len(source.classes)).to(machine.device)
    parallel = vit.data_parallel(model)
    steps = vit.steps_of(len(images), args.batch)
    optimizer = vit.make_optimizer(model, args.optimizer, args.lr, args.weight_decay, machine.precision)
    schedule = LambdaLR(optimizer, lambda step: vit.warmup_cosine(step, args.epochs * steps, args.warmup))
    run = vit.Run(name, model, optimizer, schedule, machine, settings, **vit.plan_of(args, steps, args.batch))

    for _ in range(run.epoch, run.epochs):
        model.train()
        for index in data.shuffled_batches(len(images), args.batch, run.generator):
            x, y = data.crop_flip(images[index], run.generator), labels[index]  # [B, 3, S, S], [B]
            x, other, kept = data.cutmix(x, y, run.generator, args.cutmix)  # other [B]: what is pasted in
            x, y, other = vit.share(x), vit.share(y), vit.share(other)
            with run.machine.autocast():
                logits = parallel(x)  # [B, K]
            loss = data.cutmix_loss(logits, y, other, kept, args.smoothing)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(loss=loss, train=data.cutmix_accuracy(logits, y, other, kept))
        run.save(validation=vit.accuracy(predict(model, validation, run.machine), truth))
    run.finish()

    images, labels = data.load(args.data, args.split, machine.device, args.limit)
    row = run.summary() | {"images": data.fingerprint(images, labels)}
    if vit.measured(args, name, row):
        return
    logits = predict(model, images, run.machine)
    vit.write_arrays(vit.arrays_path(args, name), guess=logits.argmax(dim=1), truth=labels)
    row |= {"value": vit.accuracy(logits, labels), "report": REPORTED.get(name)}
    vit.record(args, name, run.machine, source, **row)


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
# What did the encoder learn? Freeze it, and let a linear layer read the classes off its features. Linear,
# since that can only find what is already laid out plainly; a deeper head would learn the task itself, and
# be what is measured. Of two features, as they are taught by different losses: CLS by InfoNCE and the angle,
# the patch tokens by repainting. With three decays, since the best one depends on the number of labels:
# after InfoNCE 1e-4 was best with 45,000, 1e-3 with 4,500, 1e-2 with 450 (results/tuning.md). Validation
# images choose.

DECAYS = (1e-4, 1e-3, 1e-2)


def features(encoder: vit.ViT | None, images: Tensor, machine: vit.Machine) -> dict[str, Tensor]:
    """What a frozen encoder says of uint8 images [n, 3, S, S]: CLS and the mean of the patch tokens, both
    [n, D]; without an encoder the pixels themselves, [n, 3*S*S]."""
    if encoder is None:
        return {"pixels": images.flatten(1).float() / 255}  # [n, 3*S*S]
    encoder.to(machine.device).eval()
    cls, mean = [], []
    for x in images.split(machine.eval_batch):
        with torch.no_grad(), machine.autocast():
            tokens = encoder(x.float() / 255).float()  # [b, 1 + N, D]
        cls.append(tokens[:, 0])
        mean.append(tokens[:, 1:].mean(dim=1))
    return {"cls": torch.cat(cls), "mean": torch.cat(mean)}


def fit_linear(x: Tensor, y: Tensor, decay: float, classes: int = 10) -> nn.Linear:
    """Multinomial logistic regression of labels y [n] on features x [n, D].

    The problem is convex, so L-BFGS on all images at once heads for the one answer, from wherever it starts
    (zero), and with no learning rate to choose. It stops after 100 iterations.
    """
    layer = nn.Linear(x.shape[1], classes, device=x.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        """The loss, and its gradient: L-BFGS asks for them wherever its line search looks."""
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(x), y) + decay * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return layer


def probe_each(read: dict[str, dict], labels: dict[str, Tensor], final: str, classes: int) -> list[dict]:
    """Probe each feature with each of DECAYS. read: split -> feature -> [n, D]; labels: split -> [n] -> for
    each what was fitted, and how often it is right on "validation" and on the split `final` ("value")."""
    probes = []
    for feature, raw in read["train"].items():
        # standardised, so that one weight decay suits all dimensions
        mean, spread = raw.mean(dim=0), raw.std(dim=0) + 1e-6  # [D]
        x = {split: (found[feature] - mean) / spread for split, found in read.items()}  # [n, D] each
        for decay in DECAYS:
            layer = fit_linear(x["train"], labels["train"], decay, classes)
            right = {split: vit.accuracy(layer(x[split]), labels[split]) for split in ("validation", final)}
            about = {"features": feature, "decay": decay}
            probes.append(about | {"validation": right["validation"], "value": right[final]})
            print(f"{feature}, decay {decay:g}: validation {right['validation']:.4f}", flush=True)
    return probes


def probe(args: argparse.Namespace) -> None:
    """Fit a linear layer on the frozen features of each checkpoint, a row apiece.

    Controls instead of a checkpoint: "untrained" (a random encoder) and "pixels" (no encoder at all).
    """
    if args.name and len(args.checkpoint) > 1:
        sys.exit("--name is for one checkpoint; leave it out, and each row is called after its checkpoint")
    machine, source = vit.set_up(args.device, args.precision, args.seed), data.source(args.data)
    images, labels = {}, {}  # of each split
    images["train"], labels["train"] = labelled(args.data, args.labels, args.limit, machine.device)
    for split in ("validation", args.split):
        images[split], labels[split] = data.load(args.data, split, machine.device, args.limit)
    if args.split == "validation":
        print("chosen and measured on the same validation images, which flatters a little; --split test")

    for path in args.checkpoint:
        start = time.perf_counter()
        percent = "" if args.labels == 1 else f"_{100 * args.labels:g}"
        name = args.name or f"{pathlib.Path(path).stem}_probe{percent}"
        torch.manual_seed(args.seed)  # an untrained encoder does not depend on the rows before it
        encoder, row = to_be_probed(path, images[args.split].shape[-1], args)
        row |= {"images": data.fingerprint(images[args.split], labels[args.split])}
        if vit.measured(args, name, row):
            continue
        read = {split: features(encoder, x, machine) for split, x in images.items()}
        probes = probe_each(read, labels, args.split, len(source.classes))
        row |= max(probes, key=lambda probe: probe["validation"])
        row |= {"report": REPORTED.get(name), "seconds": row["seconds"] + time.perf_counter() - start}
        vit.record(args, name, machine, source, **row)


def to_be_probed(path: str, size: int, args: argparse.Namespace) -> tuple[vit.ViT | None, dict]:
    """The encoder that `probe` is asked about (None: the pixels themselves), and how it was trained. `size`:
    of the images, in pixels."""
    if path == "pixels":
        return None, {"weights": "", "epochs": 0, "seconds": 0.0}
    if path == "untrained":
        encoder = vit.make_encoder(None, size, args.patch, args.dim, args.stem)
        weights = vit.hash_of_weights(encoder.state_dict())
        state = {"epoch": 0, "seconds": 0.0, "history": {}}
    else:
        encoder = vit.make_encoder(path, size, args.patch, args.dim, args.stem)
        state = vit.read_checkpoint(path)
        weights = vit.hash_of_weights(state["model"])
    row = {"weights": weights, "epochs": state["epoch"], "seconds": state["seconds"]}
    return encoder, row | {"training": {metric: means[-1] for metric, means in state["history"].items()}}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    stages = parser.add_subparsers(dest="stage", required=True)
    common = [vit.common_arguments(), vit.encoder_arguments()]

    # 20 epochs: the report's of Model M. Peak learning rates: of those tried the best, or within a point of
    # it (results/tuning.md)
    training = vit.training_arguments(epochs=20, muon=4e-3, adamw=5e-4, batch=128)
    p = stages.add_parser("pretrain", parents=[*common, training], help="learn without labels")
    add = p.add_argument
    add("--task", choices=["infonce", "m"], required=True, help="InfoNCE on two views, or Model M")
    add("--init", metavar="FILE", help="start from the encoder in this checkpoint instead of a random one")
    add("--contrast", type=float, default=0.0, help="weight of InfoNCE beside Model M's losses (default: 0)")
    add("--temperature", type=float, default=0.1, help="of InfoNCE's softmax (default: %(default)s)")
    add("--pretext", choices=PRETEXTS, default="both", help="Model M's task, or a part of it (default: both)")
    add("--gap", type=int, choices=[0, 1, 2], default=0, help="pixels blackened along each patch's border")
    p.set_defaults(run=pretrain)

    p = stages.add_parser("probe", parents=common, help="fit a linear layer on frozen features")
    add = p.add_argument
    add("--checkpoint", required=True, nargs="+", help="checkpoints, or the controls: untrained, pixels")
    add("--labels", type=vit.fraction, default=1.0, help="share of images with labels (default: all)")
    p.set_defaults(run=probe)

    # 50 epochs: the report's; the learning rates as above
    training = vit.training_arguments(epochs=50, muon=4e-3, adamw=1e-3, batch=128)
    p = stages.add_parser("finetune", parents=[*common, training], help="train on with labels")
    add = p.add_argument
    add("--checkpoint", metavar="FILE", help="start from this encoder (without: from scratch, the control)")
    add("--labels", type=vit.fraction, default=1.0, help="share of images with labels (default: all)")
    add("--cutmix", type=vit.fraction, default=0.0, help="share of batches mixed by CutMix (default: none)")
    add("--smoothing", type=vit.fraction, default=0.1, help="label smoothing (default: %(default)s)")
    p.set_defaults(run=finetune)

    vit.command(parser, data.source)


if __name__ == "__main__":
    main()
