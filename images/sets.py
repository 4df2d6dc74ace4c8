"""Sets of images in memory: where they come from, and parts of them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from images.decoding import decode, hash_of, resize
from images.folders import class_files, count_line, flat_files, numbered
from machinery.batches import Subset
from machinery.errors import UserError, check
from machinery.files import locked

# ------------------------------------------------------------------------------------------------
# Data sets
# ------------------------------------------------------------------------------------------------


@dataclass
class ImageDataset:
    """A set of images, in memory or mapped into it.

    images: uint8 (N, C, H, W). labels: int64 (N,), each an index into `classes`. pixels: a hash of
    all pixels, where it is known already. files: paths in a folder, of its train and test images.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor | None
    test_images: Tensor | None
    test_labels: Tensor | None
    classes: tuple[str, ...]
    unlabelled_images: Tensor | None = None
    pixels: str | None = None
    files: dict[str, list[str]] = field(default_factory=dict)

    def names(self, part: str) -> list[str]:
        """What the images of a part (train, test, unlabelled) are called.

        Files by their path in the folder; what has no files of its own by its number.
        """
        if part in self.files:
            return self.files[part]
        images = getattr(self, f"{part}_images")
        return [f"{part}/{i:05}" for i in range(0 if images is None else len(images))]

    @functools.cached_property
    def fingerprint(self) -> str:
        """32 letters that two sets share if their images, labels and class names are the same.

        Where the images lie does not matter.
        """
        images = (self.train_images, self.test_images, self.unlabelled_images)
        labels = (self.train_labels, self.test_labels)
        pixels = self.pixels or [None if part is None else hash_of(part[:]) for part in images]
        shapes = [None if part is None else list(part.shape) for part in images]
        numbers = [None if part is None else part.tolist() for part in labels]
        whole = json.dumps([pixels, shapes, numbers, self.classes])
        return hashlib.sha256(whole.encode()).hexdigest()[:32]

    def description(self) -> dict[str, Any]:
        """What a run notes of its data, to tell whether it is resumed on the same."""
        images = (self.train_images, self.test_images, self.unlabelled_images)
        names = ("train_images", "test_images", "unlabelled_images")
        counts = zip(names, images, strict=True)
        return {
            "fingerprint": self.fingerprint,
            **{name: len(part) for name, part in counts if part is not None},
            "image_size": self.train_images.shape[-1],
            "classes": list(self.classes),
        }

    @property
    def pretraining_images(self) -> Tensor:
        """The images that need no labels: the unlabelled ones, or the training images."""
        return self.train_images if self.unlabelled_images is None else self.unlabelled_images

    def labelled(self, flag: str = "--dataset") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(train images, train labels, test images, test labels).

        Raises UserError, which names the flag, where the set lacks one of them, or has one class
        only.
        """
        if self.train_labels is None or self.test_images is None or self.test_labels is None:
            raise UserError(
                f"{flag} {self.name} has no classes or no test images, which this needs: lay "
                f"them out as {self.name}/train/<class>/* and {self.name}/test/<class>/*, or run "
                "--stages pretrain alone"
            )
        several = len(self.classes) > 1
        check(
            several,
            f"{flag} {self.name} has one class only, where telling classes apart needs two",
        )
        return self.train_images, self.train_labels, self.test_images, self.test_labels


def load_dataset(
    name: str,
    data_dir: str | Path = "data",
    image_size: int | None = None,
    *,
    folder_size: int = 32,
    flag: str = "--dataset",
) -> ImageDataset:
    """Load a data set by name, or a folder of images.

    Images are made square, `image_size` pixels a side: unless given `folder_size` for a folder, and
    their own for the others. CIFAR-10, -100 and STL-10 are downloaded into `data_dir` when they are
    not there. Raises UserError, which names the flag.
    """
    if name == "digits":
        return at_size(load_digits(), image_size, Path(data_dir))

    if name in ("cifar10", "cifar100", "stl10"):
        try:
            with locked(Path(data_dir)):  # two processes must not download it at once
                data = download(name, Path(data_dir), flag)
        except OSError as error:
            problem = f"--data_dir {data_dir} cannot be used ({error.strerror})"
            raise UserError(f"{problem}: name another folder") from None
        return at_size(data, image_size, Path(data_dir))

    known = "cifar10, cifar100, stl10, digits"
    check(Path(name).is_dir(), f"{flag} {name}: no such folder, and not one of {known}")
    return load_folder(Path(name), Path(data_dir), image_size or folder_size, flag)


def at_size(data: ImageDataset, size: int | None, data_dir: Path) -> ImageDataset:
    """The same set with its images brought to another size, once; None leaves them as they are."""
    if size in (None, data.train_images.shape[-1]):
        return data
    hashes = []
    changed: dict[str, Any] = {}
    for part in ("train_images", "test_images", "unlabelled_images"):
        images = getattr(data, part)
        if images is not None:
            changed[part], pixels = resize(images, size, data.name, data_dir)
            hashes.append(pixels)
    return replace(data, **changed, pixels=" ".join(hashes))


def load_digits() -> ImageDataset:
    """scikit-learn's 1,797 real 8 x 8 scans of digits, as grey RGB; every fifth is a test image."""
    from sklearn import datasets

    scans = datasets.load_digits()
    grey = torch.from_numpy(scans.images * (255 / 16))  # (N, 8, 8), levels 0...16 in the file
    images = grey.round().to(torch.uint8)[:, None].repeat(1, 3, 1, 1)  # (N, 3, 8, 8)
    labels = torch.from_numpy(scans.target).long()

    train, test = stratified_split(labels, 0.2, seed=0)
    return ImageDataset(
        name="digits",
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        classes=tuple("0123456789"),
    )


def download(name: str, data_dir: Path, flag: str = "--dataset") -> ImageDataset:
    """A set that torchvision downloads. Raises UserError that says where to put its archive."""
    import socket

    cifar = f"{name.replace('cifar', 'cifar-')}-python.tar.gz"
    archive = "stl10_binary.tar.gz" if name == "stl10" else cifar
    timeout = socket.getdefaulttimeout()
    # torchvision sets none: without a network it could wait for ever.
    socket.setdefaulttimeout(8)
    try:
        return load_stl10(data_dir) if name == "stl10" else load_cifar(name, data_dir)
    except Exception as error:  # of the network, the disk, or a damaged archive
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{flag} {name} is not in {data_dir} and could not be downloaded ({reason}): put "
            f"{archive} into {data_dir}, or run without a download: {flag} digits"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def load_cifar(name: str, data_dir: Path) -> ImageDataset:
    """CIFAR-10 or CIFAR-100."""
    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    train, test = (kind(str(data_dir), train=part, download=True) for part in (True, False))

    def images(split: Any) -> Tensor:  # uint8 (N, H, W, 3) -> (N, 3, H, W)
        return torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous()

    return ImageDataset(
        name,
        images(train),
        torch.tensor(train.targets),
        images(test),
        torch.tensor(test.targets),
        tuple(train.classes),
    )


def load_stl10(data_dir: Path) -> ImageDataset:
    """STL-10, with its 100,000 unlabelled images."""
    from torchvision import datasets

    train = datasets.STL10(str(data_dir), "train", download=True)  # all of it, checked
    test = datasets.STL10(str(data_dir), "test")
    # Mapped, as they are 2.7 GB: columns of 96 pixels, where ours are rows.
    file = data_dir / "stl10_binary" / "unlabeled_X.bin"
    columns = np.memmap(file, np.uint8, "c").reshape(-1, 3, 96, 96)
    return ImageDataset(
        "stl10",
        torch.from_numpy(train.data),
        torch.from_numpy(train.labels).long(),
        torch.from_numpy(test.data),
        torch.from_numpy(test.labels).long(),
        tuple(train.classes),
        torch.from_numpy(columns).transpose(2, 3),
    )


def load_folder(folder: Path, data_dir: Path, size: int, flag: str = "--dataset") -> ImageDataset:
    """The user's own images: train/<class>/* and test/<class>/*, or images alone (no classes)."""
    name = str(folder)
    if not (folder / "train").is_dir():
        files = flat_files(folder)
        problem = "has neither images in it nor a folder train/<class>/ with images"
        check(bool(files), f"{flag} {folder} {problem}")
        print(f"{folder}: {len(files):,} images without classes (it has no folder train/)")
        images, pixels = decode(folder, files, data_dir, size)
        called = {"train": within(folder, files)}
        return ImageDataset(name, images, None, None, None, (), pixels=pixels, files=called)

    splits = class_files(folder, flag)
    counts = (count_line(split, names) for split, (_, names) in splits.items())
    print(f"{folder}: {'; '.join(counts)}")
    files, names = splits["train"]
    classes = tuple(sorted(set(names)))  # an empty folder is no class
    labels, n = numbered(names, classes), len(files)
    paths = {split: within(folder, found) for split, (found, _) in splits.items()}
    if "test" not in splits:
        images, pixels = decode(folder, files, data_dir, size)
        about: dict[str, Any] = {"pixels": pixels, "files": paths}
        return ImageDataset(name, images, labels, None, None, classes, **about)

    # test/ may lack some of train/'s classes: its labels are to count all of them.
    test_files, test_names = splits["test"]
    unknown = ", ".join(sorted(set(test_names) - set(classes)))
    check(not unknown, f"{flag} {folder}: test/ has classes that train/ lacks: {unknown}")
    test_labels = numbered(test_names, classes)
    images, pixels = decode(folder, files + test_files, data_dir, size)
    about = {"pixels": pixels, "files": paths}
    return ImageDataset(name, images[:n], labels, images[n:], test_labels, classes, **about)


def within(folder: Path, files: list[str]) -> list[str]:
    """The paths of files as they are below the folder."""
    above = f"{folder}{os.sep}"  # which paths in the current folder may lack
    return [file.removeprefix(above) for file in files]


# ------------------------------------------------------------------------------------------------
# Parts of a set
# ------------------------------------------------------------------------------------------------


def hold_out(data: ImageDataset, fraction: float) -> ImageDataset:
    """A stratified `fraction` of the training images in the place of the test images.

    The same ones whatever the run's seed: runs that are compared are measured on the same images.
    Raises UserError for a set without labels, or with too few images of a class.
    """
    labels = data.train_labels
    problem = f"--validation_fraction {fraction}: {data.name}"
    if labels is None:
        raise UserError(f"{problem} has no classes to take a share of: leave it out")
    rest, chosen = stratified_split(labels, fraction, seed=0)
    lost = sorted(set(count_labels(labels)) - set(count_labels(labels[rest])))
    names = ", ".join(data.classes[label] for label in lost)
    check(not lost, f"{problem} would have no training image of {names} left: take a smaller one")
    return with_parts(data, {"train": ("train", rest), "test": ("train", chosen)})


def with_parts(data: ImageDataset, parts: dict[str, tuple[str, Tensor]]) -> ImageDataset:
    """The set with other parts, each of images that another one had, whose indices are given:
    {"test": ("train", int64 (M,))} measures on training images. Nothing is copied."""
    changed: dict[str, Any] = {"files": {}, "pixels": None}
    for name, (source, chosen) in parts.items():
        paths = data.names(source)
        changed["files"][name] = [paths[i] for i in chosen.tolist()]
        changed[f"{name}_images"] = Subset(getattr(data, f"{source}_images"), chosen)
        changed[f"{name}_labels"] = getattr(data, f"{source}_labels")[chosen]
    return replace(data, **changed)


def leave_out(
    data: ImageDataset, names: Sequence[str], flag: str = "--dataset"
) -> tuple[ImageDataset, Subset | None]:
    """(the set without some of its classes, the test images of those, if there are any).

    What has no label stays: nobody knows of what class it is. flag: what names the set. Raises
    UserError for a class that there is none of, or where nothing is left to tell apart.
    """
    problem = f"--without_classes {','.join(names)}: {flag} {data.name}"
    if data.train_labels is None:
        raise UserError(f"{problem} has no classes: leave it out")
    unknown = ", ".join(name for name in names if name not in data.classes)
    check(not unknown, f"{problem} has no class {unknown}, but {', '.join(data.classes)}")
    kept = [place for place, name in enumerate(data.classes) if name not in names]
    check(len(kept) > 1, f"{problem} has {len(kept)} class left then: leave two at least")
    numbers = torch.full((len(data.classes),), -1)  # of each class, the new one
    numbers[kept] = torch.arange(len(kept))

    changed: dict[str, Any] = {"classes": tuple(data.classes[place] for place in kept)}
    parts, gone = {}, None
    for name in ("train", "test"):
        labels = getattr(data, f"{name}_labels")
        if labels is None:
            continue
        stays = numbers[labels] >= 0
        check(bool(stays.any()), f"{problem} has no {name} image left then: leave others out")
        chosen = stays.nonzero().flatten()
        parts[name] = name, chosen
        changed[f"{name}_labels"] = numbers[labels[chosen]]
        if name == "test" and not stays.all():
            images: Any = data.test_images
            gone = Subset(images, (~stays).nonzero().flatten())
    return replace(with_parts(data, parts), **changed), gone


def stratified_subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Indices of `fraction` of each class, int64 (M,), sorted, fixed by the seed.

    labels: int64 (N,). The count is rounded, and at least one image of each class. For the
    validation split and for few labels. Raises ValueError unless 0 < fraction <= 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    counts = {label: round(fraction * n) for label, n in count_labels(labels).items()}
    return choose(labels, counts, seed)


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """(the rest, `stratified_subset`): all indices of labels int64 (N,) in two parts."""
    chosen = stratified_subset(labels, fraction, seed)
    return complement(chosen, len(labels)), chosen


def per_class_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices of `count` images of each class (all it has, if fewer), int64 (M,), sorted.

    labels: int64 (N,). With one seed, a smaller count is part of a larger one.
    """
    return choose(labels, dict.fromkeys(count_labels(labels), count), seed)


def count_labels(labels: Tensor) -> dict[int, int]:
    """{class: how many images it has}."""
    classes, counts = labels.unique(return_counts=True)
    return dict(zip(classes.tolist(), counts.tolist(), strict=True))


def choose(labels: Tensor, counts: dict[int, int], seed: int) -> Tensor:
    """Draw counts[label] images of each class, at least one: indices int64 (M,), sorted."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label, count in counts.items():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        chosen.append(members[order[: max(1, count)]])
    return torch.cat(chosen).sort().values


def complement(indices: Tensor, n: int) -> Tensor:
    """The indices of 0...n-1, int64, sorted, that are not in `indices`."""
    rest = torch.ones(n, dtype=torch.bool)
    rest[indices] = False
    return rest.nonzero().flatten()
