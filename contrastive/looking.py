"""Looking at what was learned: what it takes for alike, what it confuses, what it finds typical."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import functions as fn
from contrastive.probe import Features
from functions import Subset

RIGHT, WRONG = "tab:green", "tab:red"
CELL = 0.75  # inches that an image of a grid takes


@dataclass
class Looked:
    """What there is to look at.

    train, test: uint8 (N, 3, H, W); h: what the encoder makes of them. probabilities: the linear
    probe's, of the test images, float32 (N, K). files: what the test and the training images are
    called.
    """

    train: Tensor | Subset
    test: Tensor | Subset
    h: Features
    probabilities: Tensor
    test_files: list[str]
    train_files: list[str]

    @property
    def predicted(self) -> Tensor:
        """The classes that the probe says, int64 (N,)."""
        return self.probabilities.argmax(1)

    @property
    def right(self) -> Tensor:
        """Whether it is right, bool (N,)."""
        return self.predicted == self.h.test_labels


def nearest(queries: Tensor, bank: Tensor, k: int, block: int = 512) -> Tensor:
    """The indices of the k rows of `bank` that are nearest to each query, nearest first.

    By cosine, as k-NN and NT-Xent compare: (Q, D), (N, D) -> int64 (Q, k), k at most N.
    """
    bank = F.normalize(bank, dim=1)
    parts = F.normalize(queries, dim=1).split(block)
    return torch.cat([(part @ bank.T).topk(min(k, len(bank)), dim=1).indices for part in parts])


def some_of_each(labels: Tensor, most: int, seed: int) -> Tensor:
    """Up to `most` images, of each class about as large a share: indices int64 (M,), sorted."""
    if len(labels) <= most:
        return torch.arange(len(labels))
    chosen = fn.stratified_subset(labels, most / len(labels), seed)
    # Of a hundred classes, rounding may have chosen some too many: of any class.
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
    return chosen[order[:most]].sort().values


def worst_pairs(looked: Looked) -> list[tuple[int, int, int]]:
    """What each class is most often taken for: (class, taken for, how often).

    That which is recognised worst comes first; without those that are never mistaken.
    """
    labels, predicted = looked.h.test_labels, looked.predicted
    k = len(looked.h.classes)
    counts = torch.zeros(k, k, dtype=torch.int64)
    counts.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
    total = counts.sum(1)
    accuracy = counts.diagonal() / total.clamp_min(1)
    accuracy[total == 0] = torch.inf  # a class without test images is not known to be hard
    counts.fill_diagonal_(0)
    pairs = [(c, int(counts[c].argmax())) for c in accuracy.argsort().tolist()]
    return [(c, other, int(counts[c, other])) for c, other in pairs if counts[c, other]]


def typical(h: Tensor) -> Tensor:
    """Images from the most typical to the oddest: by the cosine to the mean of the unit vectors.

    (N, D) -> indices int64 (N,).
    """
    unit = F.normalize(h, dim=1)
    return (unit @ unit.mean(0)).argsort(descending=True)


# ------------------------------------------------------------------------------------------------
# Grids of images
# ------------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """An image of a grid: uint8 (3, H, W), the colour of its frame, and the words below it."""

    image: Tensor
    frame: str | None = None
    words: str = ""


def draw_grid(
    rows: dict[str, list[Cell | None]], title: str, file: Path, after: Sequence[int] = ()
) -> None:
    """Draw rows of images with a name each, None for none; a gap after the columns of `after`."""
    from matplotlib.patches import Rectangle

    columns = max(len(cells) for cells in rows.values())
    names = [fn.plain(name, 60) for name in rows]
    beside = 0.4 + 0.1 * max(map(fn.width, names))  # inches
    figure, axis = fn.new_figure(CELL * columns + beside, CELL * 1.25 * len(rows) + 0.6)
    for r, cells in enumerate(rows.values()):
        for c, cell in enumerate(cells):
            if cell is None:
                continue
            left = c + 0.4 * sum(c > place for place in after)
            box = (left, left + 0.92, 1.25 * r + 0.92, 1.25 * r)
            axis.imshow(cell.image.permute(1, 2, 0).numpy(), extent=box, interpolation="nearest")
            if cell.frame:
                place, size = (left, 1.25 * r), (0.92, 0.92)
                axis.add_patch(Rectangle(place, *size, fill=False, lw=2.5, color=cell.frame))
            words = fn.plain(cell.words, 16) if cell.words else ""
            middle, below = left + 0.46, 1.25 * r + 0.94
            axis.text(middle, below, words, ha="center", va="top", fontsize=7)

    axis.set(xlim=(-0.1, columns + 0.4 * len(after)), ylim=(1.25 * len(rows), -0.1), xticks=[])
    axis.set_yticks([1.25 * r + 0.46 for r in range(len(rows))], names)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set(title=title, aspect="equal")
    fn.save_figure(figure, file)


@fn.drawing
def plot_neighbours(looked: Looked, seed: int, file: Path, most: int = 10, k: int = 8) -> None:
    """Test images, and the training images that the encoder finds nearest.

    One of each class, up to `most`. Those of the same class are framed, others marked with theirs.
    """
    h = looked.h
    queries = fn.per_class_subset(h.test_labels, 1, seed)
    queries = queries[h.test_labels[queries].argsort()][:most]
    found = nearest(h.test[queries], h.train, k)
    rows: dict[str, list[Cell | None]] = {}
    for i, row in zip(queries.tolist(), found.tolist(), strict=True):
        label = int(h.test_labels[i])
        cells: list[Cell | None] = [Cell(one(looked.test, i))]
        for j in row:
            other = int(h.train_labels[j])
            same = other == label
            words = "" if same else h.classes[other]
            cells.append(Cell(one(looked.train, j), RIGHT if same else WRONG, words))
        rows[h.classes[label]] = cells
    title = f"{h.held_out.capitalize()} images (left) and their nearest training images"
    draw_grid(rows, title, file, after=[0])


@fn.drawing
def plot_confused(looked: Looked, file: Path, most: int = 3, each: int = 6) -> None:
    """Of the worst classes, pairs of one and what it is most often taken for: the images that are
    most surely taken for the other, both ways."""
    h = looked.h
    rows: dict[str, list[Cell | None]] = {}
    pairs: dict[frozenset[int], tuple[int, int, int]] = {}
    for pair in worst_pairs(looked):
        pairs.setdefault(frozenset(pair[:2]), pair)  # the way round that begins with the worse one
    worst = [*pairs.values()][:most]
    each = min(each, max((count for _, _, count in worst), default=0))
    for label, other, count in worst:
        total = int((h.test_labels == label).sum())
        names = (fn.shown(h.classes[name], 16) for name in (label, other))
        row = [*taken_for(looked, label, other, each), *taken_for(looked, other, label, each)]
        rows[f"{', taken for '.join(names)}: {count} of {total}"] = row
    if rows:
        title = "The worst classes, taken for another (left), and that one for them (right)"
        draw_grid(rows, title, file, after=[each - 1])
    else:
        print(f"no confused pairs: no {h.held_out} image is mistaken")


def taken_for(looked: Looked, label: int, other: int, most: int) -> list[Cell | None]:
    """The test images of a class that are most surely taken for another; as many cells as that."""
    mistaken = (looked.h.test_labels == label) & (looked.predicted == other)
    images, name = mistaken.nonzero().flatten(), looked.h.classes[other]
    surest = images[looked.probabilities[images, other].argsort(descending=True)][:most].tolist()
    row: list[Cell | None] = [None] * most
    for place, i in enumerate(surest):
        words = f"{fn.shown(name, 10)}, {looked.probabilities[i, other]:.0%}"
        row[place] = Cell(one(looked.test, i), words=words)
    return row


@fn.drawing
def plot_typical(looked: Looked, file: Path, most: int = 20, each: int = 6) -> None:
    """The most typical and the oddest test images of each class, of up to `most` classes."""
    h = looked.h
    rows: dict[str, list[Cell | None]] = {}
    each = min(each, (int(h.test_labels.bincount().max()) + 1) // 2)
    for label in h.test_labels.unique().tolist()[:most]:
        members = (h.test_labels == label).nonzero().flatten()
        order = members[typical(h.test[members])].tolist()
        rows[h.classes[label]] = halves(order, each, lambda i: Cell(one(looked.test, i)))
    title = "Most typical of its class (left half), and oddest (right half, the oddest first)"
    draw_grid(rows, title, file, after=[each - 1])


@fn.drawing
def plot_surest(
    looked: Looked, values: dict[str, Tensor], file: Path, most: int = 4, each: int = 12
) -> None:
    """The test images of a class that the last way is surest and least sure of, {way: (N,)}, of up
    to `most` classes; wrong ones are framed."""
    (name, value), h = list(values.items())[-1], looked.h
    rows: dict[str, list[Cell | None]] = {}
    each = min(each, (int(h.test_labels.bincount().max()) + 1) // 2)
    for label in h.test_labels.unique().tolist()[:most]:
        members = (h.test_labels == label).nonzero().flatten()
        order = members[value[members].argsort(descending=True)].tolist()
        rows[h.classes[label]] = halves(order, each, lambda i: framed(looked, i))
    title = f"{name}: the surest (left half) and the least sure (right half, the least first)"
    draw_grid(rows, title, file, after=[each - 1])


def framed(looked: Looked, i: int) -> Cell:
    """A test image, framed with what the probe says where that is wrong."""
    if looked.right[i]:
        return Cell(one(looked.test, i))
    return Cell(one(looked.test, i), WRONG, looked.h.classes[int(looked.predicted[i])])


def halves(order: list[int], each: int, cell: Callable[[int], Cell]) -> list[Cell | None]:
    """A row whose left half begins with the first of `order`, and its right half with the last.

    No image is in both.
    """
    half = (len(order) + 1) // 2
    row: list[Cell | None] = [None] * (2 * each)
    for c, i in enumerate(order[:half][:each]):
        row[c] = cell(i)
    for c, i in enumerate(order[half:][::-1][:each]):
        row[each + c] = cell(i)
    return row


def one(images: Tensor | Subset, i: int) -> Tensor:
    """An image of a set: uint8 (3, H, W)."""
    return images[i : i + 1][0]


def thumbnail(images: Tensor | Subset, i: int, side: int) -> Tensor:
    """The same, brought to `side` pixels if it is larger: uint8 (3, side, side)."""
    image = one(images, i)
    if image.shape[-1] <= side:
        return image
    size = side, side
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


@fn.drawing
def plot_errors(points: np.ndarray, looked: Looked, file: Path) -> None:
    """The map of the test images, points (N, 2): where the probe is wrong."""
    right, size = looked.right.numpy(), fn.dot_size(len(points))
    figure, axis = fn.new_figure(7, 6)
    for chosen, color, name in ((right, "lightgrey", "right"), (~right, WRONG, "wrong")):
        label = f"{name}: {chosen.sum():,}"
        axis.scatter(*points[chosen].T, s=size, color=color, label=label, linewidths=0)
    title = f"t-SNE of the {looked.h.held_out} images: where the linear probe errs"
    axis.set(title=title, xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    for handle in axis.legend(frameon=False).legend_handles:
        handle.set(sizes=[40])
    fn.save_figure(figure, file)


def look(looked: Looked, points: np.ndarray | None, seed: int, folder: Path) -> None:
    """All of it into a run's folder; points (N, 2) are the map of the test images, if there is
    one."""
    plot_neighbours(looked, seed, folder / "neighbours.png")
    plot_confused(looked, folder / "confused.png")
    plot_typical(looked, folder / "typical.png")
    if points is not None:
        plot_errors(points, looked, folder / "tsne_errors.png")
