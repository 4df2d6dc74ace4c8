"""The diary of the search: a line per run, failures included.

    python results/simclr/diary.py search runs/A runs/B   # adds their lines, writes diary.md
    python results/simclr/diary.py quarter runs/C         # the same on the second rung
    python results/simclr/diary.py                        # writes diary.md anew

The baseline is configs/cifar10_search.yaml, on the second rung configs/cifar10_quarter.yaml. All
runs are measured on held-out training images.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from contrastive.arithmetic import T  # noqa: E402
from results import measured  # noqa: E402

INTRODUCTION = """# The search for a recipe

Made by `python results/simclr/diary.py search RUN ...`. Each run is

    python simCLR.py --config configs/cifar10_search.yaml

with the flags of its line: CIFAR-10 (JPEG copy), four epochs' worth of two 16-pixel views of 40,000
training images. Linear (L-BFGS, 20,000 labels) and k-NN are accuracies on 10,000 other training
images, at 32 pixels unless the flags say otherwise; the test images were not looked at. The
standard error of one accuracy is half a point. T is the unit of arithmetic: the textbook run (see
the README). The minutes are those of pretraining, in bfloat16 on one thread of an Intel Xeon with
AMX, beside other work: no measure of speed. The commit is that of the measurement; encoders that
are older than the probe's choice of a penalty were measured by it once more.

The compact encoder spends fewer multiply-accumulates on the same images; its runs were made on one
thread of an AMD EPYC without AMX, those of five and six minutes on an Intel Xeon with it. Muon's
own products are part of its T.

"""

SECOND_RUNG = """
## The second rung

What wins a short race need not win a longer one, so the candidates for a long recipe are measured
at greater length as well. Here an encoder learns from all 50,000 training images, without labels;
linear (40,000 labels) and k-NN are accuracies on the other 10,000 of them, whose labels nothing has
seen. Only the chosen recipe's encoder is then tested, once. (The minutes of the compact encoder are
those of one thread of an AMD EPYC without AMX.)

    python simCLR.py --config configs/cifar10_quarter.yaml --stages pretrain --output_dir RUN
    python simCLR.py --config configs/cifar10_quarter.yaml --stages knn,probe --checkpoint RUN \\
        --validation_fraction 0.2

"""
TABLE = """| flags | seed | T | linear | k-NN | minutes | threads | commit |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |
"""
RUNGS = {  # each with its baseline, and where its lines are kept
    "search": ("configs/cifar10_search.yaml", HERE / "diary.json", INTRODUCTION),
    "quarter": ("configs/cifar10_quarter.yaml", HERE / "diary_quarter.json", SECOND_RUNG),
}


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


def page(entries: dict[str, list[dict[str, Any]]]) -> str:
    """diary.md. entries: {rung: its entries}."""
    parts = []
    for rung, (_, _, introduction) in RUNGS.items():
        parts.append(introduction + TABLE + "\n".join(map(line, entries[rung])) + "\n")
    return "".join(parts)


def kept() -> dict[str, list[dict[str, Any]]]:
    """{rung: the entries that are kept}."""
    return {rung: json.loads(file.read_text()) for rung, (_, file, _) in RUNGS.items()}


if __name__ == "__main__":
    rung, *runs = sys.argv[1:] or ["search"]
    if rung not in RUNGS:
        sys.exit(__doc__)
    config, file, _ = RUNGS[rung]
    entries = measured.add(runs, measured.baseline(config), file)
    measured.write(page(kept() | {rung: entries}), entries, HERE / "diary.md", file)
