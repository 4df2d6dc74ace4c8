"""The diary of the search: a line per run, failures included.

    python results/simclr/diary.py runs/A runs/B   # adds the lines of these runs, writes diary.md

All runs begin from configs/cifar10_search.yaml and are measured on held-out training images.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import functions as fn  # noqa: E402
import simCLR  # noqa: E402
from contrastive.arithmetic import T  # noqa: E402
from contrastive.evaluation import EvaluationSettings, ProbeSettings  # noqa: E402

BASE = fn.load_config(simCLR.Config, HERE.parent.parent / "configs" / "cifar10_search.yaml")
WHERE = ("dataset", "data_dir", "validation_fraction", "output_dir", "resume", "seed", "max_time")
WHERE += ("stages", "checkpoint")

INTRODUCTION = """# The search for a recipe

Made by `python results/simclr/diary.py`. Each run is

    python simCLR.py --config configs/cifar10_search.yaml

with the flags of its line: CIFAR-10 (JPEG copy), four epochs' worth of two 16-pixel views of 40,000
training images. Linear (L-BFGS, 20,000 labels) and k-NN are accuracies on 10,000 other training
images, at 32 pixels; the test images were not looked at. The standard error of one accuracy is half
a point. T is the unit of arithmetic: the textbook run (see the README). The minutes are those of
pretraining, in bfloat16 on one thread of an Intel Xeon with AMX, beside other work: no measure of
speed. These runs read their two parts from a folder each; --validation_fraction 0.2 makes the very
same parts (compared: equal). One encoder was measured twice, as it was and recalibrated.

| flags | seed | T | linear | k-NN | minutes | threads | commit |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |
"""


def entry(run: Path) -> dict[str, Any]:
    """What the diary keeps of a finished run, or of a run whose encoder was measured once more.

    Of the latter it keeps what pretraining and measuring at once would have had for flags.
    """
    results = json.loads((run / "results.json").read_text())
    config = fn.load_config(simCLR.Config, run / "config.yaml")
    flags = changed(config)
    if config.checkpoint:
        earlier = Path(config.checkpoint)
        results["pretrain"] = json.loads((earlier / "results.json").read_text())["pretrain"]
        of_evaluation = EvaluationSettings.__annotations__ | ProbeSettings.__annotations__
        flags = {name: value for name, value in flags.items() if name in of_evaluation}
        flags = changed(fn.load_config(simCLR.Config, earlier / "config.yaml")) | flags
    return {
        "flags": " ".join(f"--{name} {value}" for name, value in flags.items()),
        "seed": config.seed,
        "macs": results["pretrain"]["macs"],
        "linear": results["probe"]["test_accuracy"],
        "knn": results["knn"]["accuracy"],
        "seconds": round(results["pretrain"]["seconds"]),
        "threads": results["threads"],
        "precision": results["precision"],
        "commit": results["git_commit"][:7],
    }


def changed(config: simCLR.Config) -> dict[str, Any]:
    """The flags in which a run differs from the file that all begin from."""
    return {
        name: value
        for name, value in vars(config).items()
        if value != getattr(BASE, name) and name not in WHERE
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


def page(entries: list[dict[str, Any]]) -> str:
    """diary.md."""
    return INTRODUCTION + "\n".join(map(line, entries)) + "\n"


if __name__ == "__main__":
    kept = HERE / "diary.json"
    entries = json.loads(kept.read_text()) if kept.is_file() else []
    for run in map(Path, sys.argv[1:]):
        new = entry(run)
        known = [(one["flags"], one["seed"]) for one in entries]
        if (new["flags"], new["seed"]) not in known:
            entries.append(new)
    kept.write_text(json.dumps(entries, indent=1) + "\n")
    (HERE / "diary.md").write_text(page(entries))
