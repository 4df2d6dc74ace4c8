"""Which image files a folder holds, and of which class each is. None is left out in silence."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from machinery.errors import check

# What systems and programs leave in any folder, besides names that begin with a dot.
DROPPINGS = {
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "icon\r",  # macOS
    "__macosx",
    "@eadir",  # Synology
    "#recycle",
    "@recycle",  # QNAP
    "$recycle.bin",
    "system volume information",
    "lost+found",
}


def is_dropping(name: str) -> bool:
    """Whether a file or folder of this name is a system's own, and no part of any data set."""
    return name.startswith(".") or name.casefold() in DROPPINGS


def normal(name: str) -> str:
    """A name in one of the forms that Unicode has for it: é is one letter, or e and an accent."""
    return unicodedata.normalize("NFC", name)


class Walk:
    """Walks folders, follows links, and enters each directory once.

    left_out: what it saw and did not take: neither files nor folders, and directories that a link
    leads to again. Loops of links end there, too.
    """

    def __init__(self, *not_below: Path) -> None:
        self.entered = {identity(folder) for folder in not_below if folder.is_dir()}
        self.links: list[tuple[str, str]] = []  # (path, class) of links to directories
        self.left_out: list[str] = []

    def files(self, folders: dict[str, str]) -> list[tuple[str, str]]:
        """(path, class) of each file in or below `folders`, {path: class}, in the paths' order."""
        found: list[tuple[str, str]] = []
        links = dict[str, str]()
        for folder, name in folders.items():
            if os.path.islink(folder):
                links[folder] = name
            else:
                found += ((path, name) for path in self.below(folder, name))

        # What links lead to comes last: a directory belongs where it lies, not where it is shown.
        self.links = [*links.items(), *self.links]
        while self.links:
            link, name = self.links.pop(0)
            if identity(link) in self.entered:
                self.left_out.append(f"{link} (a link to what is read elsewhere)")
            else:
                found += ((path, name) for path in self.below(link, name))
        return sorted(found, key=lambda file: [normal(part) for part in file[0].split(os.sep)])

    def below(self, folder: str, name: str) -> Iterator[str]:
        """The files in or below one folder; links to folders are put by."""
        self.entered.add(identity(folder))
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_dropping(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    yield from self.below(entry.path, name)
                elif entry.is_dir():
                    self.links.append((entry.path, name))
                elif entry.is_file() or entry.is_symlink():  # a link to nowhere is named on reading
                    yield entry.path
                else:  # a pipe or a socket, which to open could be to wait for ever
                    self.left_out.append(entry.path)


def identity(folder: str | Path) -> tuple[int, int]:
    """What tells a directory from any other, whatever its path."""
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def flat_files(folder: Path) -> list[str]:
    """The files in or below `folder`, in order. For a folder without classes."""
    walk = Walk()
    files = [path for path, _ in walk.files({str(folder): ""})]
    tell_left_out(folder, walk.left_out)
    return files


def class_files(folder: Path, flag: str = "--dataset") -> dict[str, tuple[list[str], list[str]]]:
    """{split: (its files, the class of each)} of folder/train/<class>/ and folder/test/<class>/.

    Classes in normal form: of two folders whose names differ in form alone, the images are one
    class's. What lies beside the class folders is named. Raises UserError if a split that is there
    has no images.
    """
    splits = [name for name in ("train", "test") if (folder / name).is_dir()]
    left_out = [entry.path for entry in seen(folder) if entry.name not in ("train", "test")]
    found = {}
    walks = []
    for split in splits:
        walk = Walk(folder, folder / "train", folder / "test")
        walks.append(walk)
        there = seen(folder / split)
        beside = [entry for entry in there if not entry.is_dir()]
        classes = [entry for entry in there if entry.is_dir()]
        files = walk.files({entry.path: normal(entry.name) for entry in classes})
        check(bool(files), f"{flag}: no images in {folder / split}/<class>/")

        found[split] = [path for path, _ in files], [name for _, name in files]
        left_out += [*(entry.path for entry in beside), *walk.left_out]
    tell_left_out(folder, left_out)

    above = Walk(folder, folder / "train", folder / "test").entered
    if set.intersection(*(walk.entered for walk in walks)) - above and len(walks) == 2:
        problem = "links lead from both train/ and test/ to the same folder"
        print(
            f"warning: {folder}: {problem}: some test images are training images", file=sys.stderr
        )
    return found


def seen(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, but for systems' droppings, sorted by name."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not is_dropping(entry.name)]
    return sorted(visible, key=lambda entry: normal(entry.name))


def some(words: list[str], most: int = 10) -> str:
    """The first of them for people, and how many more there are."""
    more = f" and {len(words) - most:,} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def tell_left_out(folder: Path, paths: list[str]) -> None:
    """Name what is not read in one line, so that nobody waits for it."""
    if paths:
        print(f"note: not read in {folder}: {some(sorted(paths))}", file=sys.stderr)


def numbered(names: list[str], classes: tuple[str, ...]) -> Tensor:
    """Class names as indices into `classes`: int64 (N,)."""
    place = {name: i for i, name in enumerate(classes)}
    return torch.tensor([place[name] for name in names])


def count_line(split: str, names: list[str]) -> str:
    """How many images a split has, of its smallest class and of its largest: for people."""
    counts = Counter(names)
    least, most = min(counts, key=lambda c: counts[c]), max(counts, key=lambda c: counts[c])
    line = f"{len(names):,} {split} images of {len(counts):,} class{'es' * (len(counts) > 1)}"
    if counts[least] == counts[most]:
        return f"{line}, {counts[most]:,} of each"
    return f"{line}, from {counts[least]:,} of {least} to {counts[most]:,} of {most}"
