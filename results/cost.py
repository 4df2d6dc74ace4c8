"""Accuracy against cost, as one figure: what is measured here, and what others have published.

    python results/cost.py       # writes results/cost.png

Ours are results/cifar10-*, each a recipe of configs/ on all training images; several seeds of one
recipe are one point, their mean. Open is what results/simclr-best makes of an image on average over
ten crops of it. The others, all of ResNet-18, stand in anchors.json.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import functions as fn  # noqa: E402
import simCLR  # noqa: E402
from contrastive.arithmetic import T  # noqa: E402

METHODS = {  # each with its marker, and how it is called
    "SimCLR": ("o", "SimCLR, published: ResNet-18"),
    "textbook": ("x", "SimCLR, told to us: ResNet-18, torchvision's stem"),
    "EMP-SSL": ("s", "EMP-SSL, published: ResNet-18, average of 128 patches"),
    "SIGReg": ("^", "SIGReg, published: ResNet-18"),
    "VICReg": ("v", "VICReg, published: ResNet-18"),
}
Kind = tuple[str, str, float, int | None]
Words = dict[str, Any]
# Where a point has its words.
ABOVE: Words = {"xytext": (0, 9), "ha": "right"}
BELOW: Words = {"xytext": (0, -16), "ha": "right"}
OVER: Words = {"xytext": (0, 9), "ha": "center"}
UNDER: Words = {"xytext": (0, -16), "ha": "center"}
BESIDE: Words = {"xytext": (8, 0), "ha": "left", "va": "center"}
BEFORE: Words = {"xytext": (-8, 0), "ha": "right", "va": "center"}
# (encoder, optimizer, width, length of h if widened): what it is called, its colour, and where its
# points and the last one have their words.
KINDS: dict[Kind, tuple[str, str, Words, Words]] = {
    ("resnet18", "sgd", 1, None): ("ResNet-18", "C1", BELOW, BESIDE),
    ("compact", "sgd", 1, None): ("compact encoder", "C0", BELOW, UNDER),
    ("compact", "muon", 1, None): ("compact encoder, Muon", "C2", ABOVE, BESIDE),
    ("compact", "muon", 1, 2048): ("compact encoder, Muon, h of 2,048", "C3", ABOVE, BESIDE),
    ("compact", "muon", 1.5, 4096): ("1.5 times as wide, h of 4,096", "C4", ABOVE, BEFORE),
}


def kind_of(run: Path) -> Kind:
    """What kind of recipe a run is of."""
    config = fn.load_config(simCLR.Config, run / "config.yaml")
    return config.encoder, config.optimizer, config.width, config.feature_dim


def ours() -> dict[Kind, list[tuple[float, float, int]]]:
    """For each kind, its recipes' (T, mean linear accuracy in percent, number of seeds)."""
    found = defaultdict(list)
    for file in HERE.glob("cifar10-*/results.json"):
        results = json.loads(file.read_text())
        name, _, _ = file.parent.name.partition("-seed")
        found[results["pretrain"]["macs"] / T, name, kind_of(file.parent)].append(
            100 * results["probe"]["test_accuracy"]
        )
    points: dict[Kind, list[tuple[float, float, int]]] = defaultdict(list)
    for (t, _, kind), reached in sorted(found.items(), key=lambda one: one[0][0]):
        points[kind].append((t, statistics.mean(reached), len(reached)))
    return dict(points)


def averaged() -> tuple[float, float, Kind]:
    """T, linear accuracy in percent, and kind of the encoder whose h is averaged over ten crops."""
    place = HERE / "simclr-best"
    trained, crops = (
        json.loads((folder / "results.json").read_text()) for folder in (place, place / "ten-crops")
    )
    t, linear = trained["pretrain"]["macs"] / T, 100 * crops["probe"]["test_accuracy"]
    return t, linear, kind_of(place)


@fn.drawing
def draw(file: Path) -> None:
    """A dot per published number, and a line of ours, over T on a logarithmic axis."""
    published = json.loads((HERE / "anchors.json").read_text())
    figure, axis = fn.new_figure(9, 5)
    for method, (marker, name) in METHODS.items():
        theirs = [one for one in published if one["method"] == method]
        t, linear = [one["t"] for one in theirs], [one["linear"] for one in theirs]
        axis.plot(t, linear, marker, color="0.55", fillstyle="none", label=name)
    # Two of one cost and length stand close together, and have their length once.
    lengths = {(one["t"], epochs(one["setting"])): one["linear"] for one in reversed(published)}
    style = {"textcoords": "offset points", "fontsize": "small"}
    for (t, length), reached in lengths.items():
        axis.annotate(length, (t, reached), (8, 0), color="0.5", va="center", **style)
    measured = ours()
    for kind in sorted(measured, key=list(KINDS).index):
        name, color, before, last = KINDS[kind]
        points = measured[kind]
        t, linear = [point[0] for point in points], [point[1] for point in points]
        axis.plot(t, linear, "o-", color=color, label=f"SimCLR, here: {name}")
        for *point, n in points:
            words = f"{point[1]:.1f} %" + (f" ({n} seeds)" if n > 1 else "")
            place = last if point[0] == t[-1] else before
            axis.annotate(words, point, color=color, **place, **style)
    *point, kind = averaged()
    name, color = "SimCLR, here: the same, average of ten crops", KINDS[kind][1]
    axis.plot(*point, "s", color=color, fillstyle="none", label=name)
    axis.annotate(f"{point[1]:.1f} %", point, color=color, **OVER, **style)
    axis.set_xscale("log")
    axis.set_xlim(0.04, 130)
    ticks = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 15, 50)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    unit = "T, the arithmetic of 300 epochs of ResNet-18 with torchvision's stem"
    axis.set_xlabel(f"cost of pretraining in {unit} (logarithmic)")
    axis.set_ylabel("linear accuracy on CIFAR-10 in %")
    axis.set_title(
        "How much is learned from how little arithmetic, without labels (ours: JPEG copy)"
    )
    axis.legend(loc="lower right", frameon=False)
    fn.save_figure(figure, file)


def epochs(setting: str) -> str:
    """How long a published run was, from what anchors.json says of it."""
    found = re.search(r"[\d,]+ epochs?", setting)
    return found[0] if found else ""


if __name__ == "__main__":
    draw(HERE / "cost.png")
