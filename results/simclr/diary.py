"""The diary of the search: a line per run, failures included.

    python results/simclr/diary.py runs/A runs/B   # adds the lines of these runs, writes diary.md

All runs begin from configs/cifar10_search.yaml and are measured on held-out training images.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from contrastive.arithmetic import T  # noqa: E402
from results import measured  # noqa: E402

INTRODUCTION = """# The search for a recipe

Made by `python results/simclr/diary.py`. Each run is

    python simCLR.py --config configs/cifar10_search.yaml

with the flags of its line: CIFAR-10 (JPEG copy), four epochs' worth of two 16-pixel views of 40,000
training images. Linear (L-BFGS, 20,000 labels) and k-NN are accuracies on 10,000 other training
images, at 32 pixels unless the flags say otherwise; the test images were not looked at. The
standard error of one accuracy is half a point. T is the unit of arithmetic: the textbook run (see
the README). The minutes are those of pretraining, in bfloat16 on one thread of an Intel Xeon with
AMX, beside other work: no measure of speed. The commit is that of the measurement; encoders that
are older than the probe's choice of a penalty were measured by it once more.

| flags | seed | T | linear | k-NN | minutes | threads | commit |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |
"""


def line(one: dict[str, Any]) -> str:
    """Its line of diary.md."""
    cells = [
        f"`{one['flags']}`" if one["flags"] else "none",
        str(one["seed"]),
        f"{one['macs'] / T:.3f}",
        f"{100 * one['linear']:.1f} %",
        f"{100 * one['knn']:.1f} %",
        f"{one['seconds'] / 60:.0f}",
        str(one["threads"]),
        one["commit"],
    ]
    return f"| {' | '.join(cells)} |"


def page(entries: list[dict[str, Any]]) -> str:
    """diary.md."""
    return INTRODUCTION + "\n".join(map(line, entries)) + "\n"


if __name__ == "__main__":
    base = measured.begin("configs/cifar10_search.yaml")
    entries = measured.add(sys.argv[1:], base, HERE / "diary.json")
    (HERE / "diary.md").write_text(page(entries))
