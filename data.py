"""From disk to a batch on the device: augmentation, patch masking and rotation, samplers, CIFAR-10.

Part 1, augmentation:      crop and flip; CutMix; SimCLR's random-resized crop and colours
Part 2, patches:           patchify, unpatchify, patch_augment (Model M's task)
Part 3, batches:           shuffled batches, SameClassBatchSampler
Part 4, which images:      load, source (the one place to change for other images)
Part 5 (may be skipped):   download, unpack, check; the synthetic stand-in

A split lives on the device as one uint8 tensor, and every augmentation is a few tensor operations on the
whole batch, so there are no worker processes. Depends on torch and numpy: copy this file alone.

    python data.py --data data    # fetch CIFAR-10 into data/ and check it

Shape letters: B batch, S image size, P patch size, N patches, M masked patches, C colour channels. Images are
[B, 3, S, S].
"""

from __future__ import annotations

import argparse
import errno
import functools
import itertools
import math
import os
import pathlib
import shutil
import socket
import sys
import tarfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Generator, Tensor

# ---------------------------------------------------------------- Part 1: augmentation


def uniform(like: Tensor, low: float, high: float, generator: Generator | None) -> Tensor:
    """Random numbers from low to high, [B], on the device of `like` [B, ...]."""
    return low + (high - low) * torch.rand(len(like), device=like.device, generator=generator)


def crop_flip(images: Tensor, generator: Generator | None = None, pad: int = 2) -> Tensor:
    """Random shift by up to `pad` pixels (He et al. 2016, section 4.2, have 4; in few epochs 2 is better, see
    results/tuning.md), reflected at the border, and a random mirror image: uint8 [B, 3, S, S] -> float
    [B, 3, S, S] in [0, 1]. Each output row and column looks up the input row or column it comes from."""
    B, _, S, _ = images.shape
    shift = torch.randint(-pad, pad + 1, (2, B, 1), device=images.device, generator=generator)
    at = torch.arange(S, device=images.device) + shift  # [2, B, S], from -pad to S - 1 + pad
    rows, columns = (S - 1) - ((S - 1) - at.abs()).abs()  # [B, S] each, reflected: -1 -> 1, S -> S - 2
    mirror = uniform(images, 0, 1, generator)[:, None] < 0.5  # [B, 1]
    columns = torch.where(mirror, columns.flip(1), columns)
    b = torch.arange(B, device=images.device)[:, None, None]  # [B, 1, 1]
    # indices around a slice put the indexed axes in front: [B, S, S, 3]
    return images[b, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).float() / 255


def cutmix(images: Tensor, labels: Tensor, classes: int, generator: Generator | None = None):
    """In half of the batches, paste a rectangle of the next image over each (Yun et al. 2019, section 3.1;
    one rectangle for the batch): images [B, 3, S, S], labels [B] -> mixed images [B, 3, S, S], and what share
    of the pixels each class has, [B, K]. So the network can't rely on any one part of an image."""
    S = images.shape[-1]
    area, x, y, chance = torch.rand(4, device=images.device, generator=generator)
    half = torch.where(chance < 0.5, area.sqrt() / 2, 0)  # of the rectangle's side
    at = (torch.arange(S, device=images.device) + 0.5) / S  # [S]
    inside = ((at - y).abs() < half)[:, None] & ((at - x).abs() < half)  # [S, S]
    pasted, share = inside.float().mean(), F.one_hot(labels, classes).float()  # [], [B, K]
    return torch.where(inside, images.roll(1, 0), images), torch.lerp(share, share.roll(1, 0), pasted)


def resized_crop_flip(images: Tensor, generator: Generator | None = None, scale=(0.2, 1.0)) -> Tensor:
    """A random rectangle (share of the area in `scale`, aspect 3/4 to 4/3), stretched to full size, mirrored:
    uint8 [B, 3, S, S] -> float [B, 3, S, S] in [0, 1]. (Szegedy et al. 2015; SimCLR, appendix A, which crops
    down to 0.08 of the area: of 32 pixels that leaves 9 a side, MoCo's 0.2 leaves 14.)"""
    area = uniform(images, *scale, generator)  # [B]
    ratio = uniform(images, math.log(3 / 4), math.log(4 / 3), generator).exp()  # [B]
    # one rectangle in six is wider or higher than the image, and is cut to it (torchvision draws again)
    w = (area * ratio).sqrt().clamp(max=1)  # [B], as a share of the image's width
    h = (area / ratio).sqrt().clamp(max=1)  # [B], of its height
    x = uniform(images, -1, 1, generator) * (1 - w)  # centre; grid_sample's image spans -1 to 1
    y = uniform(images, -1, 1, generator) * (1 - h)
    w = torch.where(uniform(images, 0, 1, generator) < 0.5, -w, w)  # a negative width: mirrored
    zero = torch.zeros_like(w)
    theta = torch.stack([w, zero, x, zero, h, y], 1).view(-1, 2, 3)  # [B, 2, 3]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)  # [B, S, S, 2]
    return F.grid_sample(images.float() / 255, grid, padding_mode="reflection", align_corners=False)


def colour_jitter(images: Tensor, generator: Generator | None = None, strength: float = 0.5) -> Tensor:
    """SimCLR's distortion of brightness, contrast, saturation and hue (Chen et al. 2020, appendix A).

    images: float [B, 3, S, S] in [0, 1] -> the same. `strength` is the paper's; 0.5 is its choice for
    CIFAR-10 (appendix B.9), where it leaves out the blur, too. 80 % of images are distorted, 20 % made grey,
    as for ImageNet (appendix A). Without it two crops of an image could mostly be told by their colours, and
    less would be learned (section 3.1: crops alone still teach something).

    Not quite torchvision's ColorJitter: the hue is turned in YIQ, not HSV, and contrast comes last. All but
    contrast then are linear in a pixel's colour, so each image gets one 3x3 matrix. In YIQ a colour is its
    brightness Y and a point (I, Q) of the colour plane; saturation scales that point, hue turns it.
    """
    distorted = (uniform(images, 0, 1, generator) < 0.8).float()  # [B]
    grey = uniform(images, 0, 1, generator) < 0.2  # [B]
    most = 0.8 * strength
    brightness = 1 + distorted * uniform(images, -most, most, generator)  # [B]
    contrast = 1 + distorted * uniform(images, -most, most, generator)  # [B]
    saturation = 1 + distorted * uniform(images, -most, most, generator)  # [B]
    saturation = torch.where(grey, 0.0, saturation)
    furthest = 0.2 * strength  # of a whole turn
    hue = 2 * math.pi * distorted * uniform(images, -furthest, furthest, generator)  # [B], radians

    cos, sin = saturation * hue.cos(), saturation * hue.sin()  # [B]
    zero, one = torch.zeros_like(hue), torch.ones_like(hue)
    rows = [one, zero, zero, zero, cos, -sin, zero, sin, cos]
    in_yiq = brightness[:, None, None] * torch.stack(rows, dim=1).view(-1, 3, 3)  # [B, 3, 3]
    to_yiq, from_yiq = yiq(images.device)
    in_rgb = from_yiq @ in_yiq @ to_yiq  # [B, 3, 3]
    images = (in_rgb @ images.flatten(2)).view_as(images)  # [B, 3, S*S] -> [B, 3, S, S]
    mean = images.mean(dim=(1, 2, 3), keepdim=True)  # [B, 1, 1, 1]
    return (mean + contrast[:, None, None, None] * (images - mean)).clamp(0, 1)


@functools.cache
def yiq(device: torch.device) -> tuple[Tensor, Tensor]:
    """The matrix from RGB to YIQ and its inverse, moved to a device once."""
    matrix = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    return matrix.to(device), torch.linalg.inv(matrix).to(device)


def contrastive_view(images: Tensor, generator: Generator | None = None) -> Tensor:
    """One random SimCLR view of each image: uint8 [B, 3, S, S] -> float [B, 3, S, S] in [0, 1]."""
    return colour_jitter(resized_crop_flip(images, generator), generator)


# ---------------------------------------------------------------- Part 2: patches


def patchify(images: Tensor, patch: int = 8) -> Tensor:
    """[B, C, S, S] -> [B, N, C, P, P], patches row by row. Raises ValueError when the images are not square
    or not a whole number of patches."""
    if images.ndim != 4 or images.shape[2] != images.shape[3] or images.shape[2] % patch:
        raise ValueError(f"images {list(images.shape)} are not [B, C, S, S] with S a multiple of {patch}")
    B, C, S, _ = images.shape
    x = images.reshape(B, C, S // patch, patch, S // patch, patch)  # [B, C, row, P, column, P]
    # [B, row, column, C, P, P] -> [B, N, C, P, P]
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C, patch, patch)


def unpatchify(patches: Tensor) -> Tensor:
    """[B, N, C, P, P] -> [B, C, S, S], the inverse of `patchify`."""
    B, N, C, P, _ = patches.shape
    side = math.isqrt(N)
    x = patches.reshape(B, side, side, C, P, P).permute(0, 3, 1, 4, 2, 5)  # [B, C, row, P, column, P]
    return x.reshape(B, C, side * P, side * P)


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """Turn row b of x [B, ..., S, S] by angle[b] quarter turns counter-clockwise; angle: [B], 0 to 3."""
    turned = torch.stack([torch.rot90(x, k, dims=(-2, -1)) for k in range(4)])  # [4, B, ..., S, S]
    return turned[angle, torch.arange(len(x), device=x.device)]  # [B, ..., S, S]


def patch_augment(images: Tensor, generator: Generator | None = None, patch=8, masked=4, turned=4):
    """Model M's input: per image, black out `masked` random patches and turn `turned` others by one angle.

    images: [B, C, S, S] -> (augmented images [B, C, S, S], indices of the masked patches [B, masked], of the
    turned ones [B, turned], and the angle [B] in quarter turns counter-clockwise: 0, 1, 2, 3). Both together
    are the report's set A: 8 of the 16 patches, half of them masked. Raises ValueError for too many patches.
    """
    x = patchify(images, patch).clone()  # [B, N, C, P, P]; the caller keeps its images
    B, N = x.shape[:2]
    if masked + turned > N:
        raise ValueError(f"{masked} masked and {turned} turned patches are more than the {N} there are")
    order = torch.rand(B, N, device=x.device, generator=generator).argsort(dim=1)  # each image's own
    mask_at, turn_at = order[:, :masked], order[:, masked : masked + turned]
    angle = torch.randint(4, (B,), device=x.device, generator=generator)
    b = torch.arange(B, device=x.device)[:, None]  # [B, 1]
    x[b, turn_at] = turn(x[b, turn_at], angle)  # [B, turned, C, P, P]
    x[b, mask_at] = 0
    return unpatchify(x), mask_at, turn_at, angle


# ---------------------------------------------------------------- Part 3: batches


def own_part(x: Tensor) -> Tensor:
    """This process's rows of a batch [B, ...]: all of them, unless torchrun has started several processes.
    Raises RuntimeError where these can't share them out evenly."""
    if not dist.is_initialized():
        return x
    return x.unflatten(0, (dist.get_world_size(), -1))[dist.get_rank()]


def shuffled_batches(number: int, batch: int, generator: Generator):
    """Yield index tensors [batch] that cover range(number) in random order; a smaller rest is dropped."""
    order = torch.randperm(number, device=generator.device, generator=generator)
    yield from map(own_part, order[: number - number % batch].view(-1, batch))


class SameClassBatchSampler(torch.utils.data.Sampler):
    """Batches of indices whose images all belong to one class, to act as the frames of a pseudo-video.

        sampler = SameClassBatchSampler(labels, 16)
        DataLoader(dataset, batch_sampler=sampler)      # or, with everything on the device:
        for index in sampler: frames = images[index]

    labels: [n], a tensor, an array or a list. Each epoch shuffles within each class; the classes take turns,
    in an order that is drawn anew each time (by seed and epoch). Iterating begins the next epoch by itself;
    after a resume say with `set_epoch` which one is next. No index comes twice in an epoch; of each class a
    rest smaller than `batch` is dropped. Raises ValueError when a class has fewer than `batch` images.
    """

    def __init__(self, labels: Tensor | np.ndarray | list[int], batch: int = 16, seed: int = 0):
        labels = torch.as_tensor(labels)
        self.members = [(labels == k).nonzero()[:, 0].cpu() for k in labels.unique()]  # indices of each class
        smallest = min(len(members) for members in self.members)
        if smallest < batch:
            raise ValueError(f"a class has only {smallest} images, fewer than one batch of {batch}")
        self.batch, self.seed, self.epoch = batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the next epoch's shuffle, as torch's DistributedSampler does."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(len(m) // self.batch for m in self.members)

    def __iter__(self):
        g = Generator().manual_seed(self.seed * 1_000_003 + self.epoch)  # another one for each seed and epoch
        self.epoch += 1
        batches = []  # of each class
        for m in self.members:
            m = m[torch.randperm(len(m), generator=g)]
            batches.append(m[: len(m) - len(m) % self.batch].view(-1, self.batch).tolist())
        for one_each in itertools.zip_longest(*batches):  # a batch of each class; None: it has no more
            order = torch.randperm(len(one_each), generator=g).tolist()
            yield from (one_each[k] for k in order if one_each[k])


# ---------------------------------------------------------------- Part 4: which images


class Source(NamedTuple):
    """A data set: how `load` reads it, and what tables and figures call it."""

    name: str
    classes: list[str]  # by label
    provenance: str  # in one line: where the pixels come from
    read: Callable  # split, limit -> images uint8 [n, 3, S, S], labels int64 [n]


def source(data: str) -> Source:
    """What --data names, a folder or the word "synthetic": the one place to change for other images."""
    if data == "synthetic":
        return Source("synthetic", SHAPES, "SYNTHETIC shapes drawn by data.py, not CIFAR-10", read_synthetic)
    folder = find(data)
    return Source("cifar10", CLASSES, provenance(folder), functools.partial(read_cifar10, folder))


def load(data: str, split: str, device: torch.device | str = "cpu", limit: int | None = None):
    """One split on the device: images uint8 [n, 3, S, S] (CIFAR-10: S = 32) and labels int64 [n].

    train       45,000 images
    validation   5,000, held out of the official training set, always the same: choose with these
    test        10,000, the official test set: for the final number only
    `data`: see `source`; `limit`: at most so many images (None: all)."""
    images, labels = source(data).read(split, limit)
    return images.to(device), labels.to(device)


# ---------------------------------------------------------------- Part 5: disk and network

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"  # labels and pixels, no pickle
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
FOLDER = "cifar-10-batches-bin"
TRAIN_FILES = [f"data_batch_{i}.bin" for i in range(1, 6)]
FILES = [*TRAIN_FILES, "test_batch.bin"]
RECORD = 1 + 3 * 32 * 32  # one label byte, then the red, the green and the blue plane
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
SHAPES = "disc ring square frame triangle cross star crescent bars checkers".split()
NO_NETWORK = 3  # exit code: run_all.sh then goes on with drawn shapes, but after no other failure


def fetch(folder: pathlib.Path, url: str = URL, sha256: str = SHA256) -> None:
    """Download, check, unpack: folder/cifar-10-batches-bin appears last, complete or not at all. SystemExit
    with one sentence: no network, no space, not the file."""
    archive, part = folder / "cifar-10-binary.tar.gz", folder / (FOLDER + ".part")
    socket.setdefaulttimeout(10)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(archive), hash_prefix=sha256)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        with tarfile.open(archive, "r:gz") as tar:
            # only the six names we know, written under names we choose: no path in it is trusted
            for name in FILES:
                (part / name).write_bytes(tar.extractfile(f"{FOLDER}/{name}").read())
        (part / "provenance.txt").write_text("CIFAR-10, the official binary archive, SHA-256 checked\n")
        os.replace(part, folder / FOLDER)
        archive.unlink()
    except RuntimeError:  # download_url_to_file's, of another SHA-256
        sys.exit(f"what comes from {url} is not the file, or a part of it (a login page?); try again")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):  # not the network's fault
            sys.exit(f"can't fetch CIFAR-10 into {folder}: {error.strerror}; 350 MB must be free there")
        advice = "go online and type the same command, or say --data synthetic for drawn shapes"
        print(f"can't download {url}: {getattr(error, 'reason', error)}; {advice}", file=sys.stderr)
        sys.exit(NO_NETWORK)


def find(data: str) -> pathlib.Path:
    """The folder of .bin files for --data, which may name it, whatever it is called, or its parent."""
    path = pathlib.Path(data)
    named = path.name == FOLDER or any((path / name).exists() for name in FILES)
    return path if named else path / FOLDER


def read_batches(folder: pathlib.Path, names: list[str]) -> tuple[Tensor, Tensor]:
    """Read CIFAR-10 binary files: images uint8 [n, 3, 32, 32] and labels int64 [n], in file order. SystemExit
    with one sentence where a file is missing or damaged."""
    advice = f"`python data.py --data {folder.parent}` fetches CIFAR-10, --data synthetic draws shapes"
    records = []
    for path in [folder / name for name in names]:
        read = np.fromfile(path, dtype=np.uint8) if path.exists() else np.empty(0)
        if len(read) != 10_000 * RECORD or read[::RECORD].max() >= len(CLASSES):  # too few bytes, or no label
            sys.exit(f"{path} is missing or damaged; delete {folder}, if it is there, then {advice}")
        records.append(read.reshape(-1, RECORD))
    records = torch.from_numpy(np.concatenate(records))  # [n, 3073]
    return records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), records[:, 0].long()


def read_cifar10(folder: pathlib.Path, split: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """One split of the .bin files in `folder`, as `load`."""
    order = torch.randperm(50_000, generator=Generator().manual_seed(0))
    parts = {"train": order[:45_000], "validation": order[45_000:], "test": torch.arange(10_000)}
    images, labels = read_batches(folder, ["test_batch.bin"] if split == "test" else TRAIN_FILES)
    return images[parts[split][:limit]], labels[parts[split][:limit]]


def read_synthetic(split: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """One split of drawn shapes, as `load`."""
    size, seed = {"train": (45_000, 0), "validation": (5_000, 1), "test": (10_000, 2)}[split]
    return synthetic(min(limit or size, size), seed)


def provenance(folder: pathlib.Path) -> str:
    """Where the images in `folder` come from: its provenance.txt, by `fetch` or by hand, as one line."""
    note = folder / "provenance.txt"
    if not note.exists():
        return "CIFAR-10 files found on disk, origin not known"
    return " ".join(note.read_text("utf-8-sig", errors="replace").split())


def synthetic(number: int, seed: int = 0, size: int = 32) -> tuple[Tensor, Tensor]:
    """Ten shapes to stand in for CIFAR-10's classes: images uint8 [n, 3, size, size], labels int64 [n].
    Colours, place, size and angle have nothing to do with the class, so pixel values say little about it."""
    g = Generator().manual_seed(seed)
    labels = torch.randperm(number, generator=g) % 10
    angle, scale, left, top = torch.rand(4, number, 1, 1, generator=g)  # [n, 1, 1] each
    angle, scale = 2 * math.pi * angle, 0.4 + 0.4 * scale
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")  # [S, S]
    x, y = x - 0.7 * left + 0.35, y - 0.7 * top + 0.35  # [n, S, S]
    u = (x * angle.cos() + y * angle.sin()) / scale  # the shape's own coordinates, [n, S, S]
    v = (y * angle.cos() - x * angle.sin()) / scale
    r, box = (u * u + v * v).sqrt(), torch.maximum(u.abs(), v.abs())
    shapes = [
        r < 0.9,  # disc
        (r < 1) & (r > 0.6),  # ring
        box < 0.8,  # square
        (box < 0.9) & (box > 0.55),  # frame
        (v < 0.6) & (v > 1.9 * u.abs() - 1),  # triangle
        (box < 1) & (torch.minimum(u.abs(), v.abs()) < 0.28),  # cross
        r < 0.65 + 0.35 * torch.cos(5 * torch.atan2(v, u)),  # star
        (r < 1) & ((u - 0.45) ** 2 + v * v > 0.5),  # crescent
        (box < 0.9) & (torch.sin(9 * u) > 0),  # bars
        (box < 0.9) & (torch.sin(6 * u) * torch.sin(6 * v) > 0),  # checkers
    ]
    inside = torch.stack(shapes)[labels, torch.arange(number)][:, None]  # [n, 1, S, S]
    ink, ground = torch.randint(256, (2, number, 3, 1, 1), generator=g, dtype=torch.uint8)  # [n, 3, 1, 1]
    return torch.where(inside, ink, ground), labels


def main() -> None:
    parser = argparse.ArgumentParser(description="fetch CIFAR-10 into a folder and check it")
    parser.add_argument("--data", type=os.path.expanduser, default="data", help="default: %(default)s")
    args = parser.parse_args()
    if source(args.data).name == "cifar10" and not find(args.data).exists():
        fetch(find(args.data).parent)
    for split in ("train", "validation", "test"):
        images, labels = load(args.data, split)
        print(f"{split}: {len(images):,} images, by class {labels.bincount().tolist()}")
    print(f"{args.data}: {source(args.data).provenance}")


if __name__ == "__main__":
    main()
