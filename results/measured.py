"""What the pages of results keep of a run, and of which flags it was made."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import functions as fn  # noqa: E402
import simCLR  # noqa: E402
from contrastive.arithmetic import T  # noqa: E402
from contrastive.certainty import CertaintySettings  # noqa: E402
from contrastive.evaluation import EvaluationSettings  # noqa: E402
from contrastive.few_labels import FewLabelsSettings, mean_and_deviation  # noqa: E402
from contrastive.finetuning import FineTuningSettings  # noqa: E402
from contrastive.probe import ProbeSettings  # noqa: E402

# What does not change what is learned, and what a page tells by itself.
ASIDE = {*simCLR.Config.of_the_session, *simCLR.Config.free_on_resume, "accelerator", "stages"}
ASIDE |= {"checkpoint", "knn_every", "seed", "validation_fraction"}
OF_TRAINING = ("pretrain", "processor", "threads", "precision")
OF_EVALUATION = {
    name
    for settings in (
        CertaintySettings,
        EvaluationSettings,
        ProbeSettings,
        FewLabelsSettings,
        FineTuningSettings,
    )
    for name in settings.__annotations__
}


def baseline(config: str) -> simCLR.Config:
    """The configuration that a page's runs differ from; its path is from the project's root."""
    return fn.load_config(simCLR.Config, ROOT / config)


def entry(
    run: Path, base: simCLR.Config, also: tuple[str, ...] = (), held_out: bool = True
) -> dict[str, Any]:
    """What is kept of a finished run, or of a run whose encoder was measured once more.

    Of the latter it keeps the flags with which one run would have pretrained and measured so. also:
    further parts of results.json. held_out: whether it is to be measured on held-out training
    images, or on the test images; ends with a line of text where it was measured on the others.
    """
    results = json.loads((run / "results.json").read_text())
    config = fn.load_config(simCLR.Config, run / "config.yaml")
    if bool(config.validation_fraction) != held_out:
        remedy = "with" if held_out else "without"
        sys.exit(f"{run}: measure it {remedy} --validation_fraction for this page")
    flags = changed(config, base)
    if config.checkpoint:
        earlier = Path(config.checkpoint)
        trained = json.loads((earlier / "results.json").read_text())
        results |= {name: trained[name] for name in OF_TRAINING}
        learned = changed(fn.load_config(simCLR.Config, earlier / "config.yaml"), base)
        flags = {name: value for name, value in flags.items() if name in OF_EVALUATION}
        flags |= {name: value for name, value in learned.items() if name not in OF_EVALUATION}
    return {
        "script": results["script"],
        "flags": as_flags(flags, base),
        "seed": config.seed,
        "macs": results["pretrain"]["macs"],
        "linear": results["probe"]["test_accuracy"],
        "knn": results["knn"]["accuracy"],
        "seconds": round(results["pretrain"]["seconds"]),
        "processor": results["processor"],
        "threads": results["threads"],
        "precision": results["precision"],
        "commit": results["git_commit"][:7],
        **{name: results[name] for name in also},
    }


def changed(config: simCLR.Config, base: simCLR.Config) -> dict[str, Any]:
    """The flags in which a run differs from the baseline.

    Of those of fine-tuning it has none where it has fine-tuned nothing.
    """
    idle = set() if "finetune" in config.stages_list else set(FineTuningSettings.__annotations__)
    return {
        name: value
        for name, value in vars(config).items()
        if value != getattr(base, name) and name not in ASIDE | idle
    }


def as_flags(flags: dict[str, Any], base: simCLR.Config) -> str:
    """Flags as a command has them, in the order of the settings."""
    return " ".join(f"--{name} {flags[name]}" for name in vars(base) if name in flags)


def add(
    runs: list[str],
    base: simCLR.Config,
    kept: Path,
    also: tuple[str, ...] = (),
    held_out: bool = True,
) -> list[dict[str, Any]]:
    """The entries of a page's JSON file, and those of these runs; one measured anew takes its old
    place. also, held_out: of `entry`."""
    known = json.loads(kept.read_text()) if kept.is_file() else []
    added = [entry(Path(run), base, also, held_out) for run in runs]
    return list({key(one): one for one in known + added}.values())


def write(page: str, entries: list[dict[str, Any]], file: Path, kept: Path) -> None:
    """Leave a page, and beside it its entries."""
    file.write_text(page)
    keep(entries, kept)


def keep(entries: list[dict[str, Any]], kept: Path) -> None:
    """Leave the entries, for `add` to find."""
    kept.write_text(json.dumps(entries, indent=1) + "\n")


def key(one: dict[str, Any]) -> tuple[Any, ...]:
    """What no two entries of a page have in common."""
    return one["script"], one["flags"], one["seed"]


# ------------------------------------------------------------------------------------------------
# What the pages say of several seeds
# ------------------------------------------------------------------------------------------------


def summary(values: list[float]) -> str:
    """Raw values, and what they come to, in percent."""
    raw = ", ".join(f"{100 * value:.1f}" for value in values)
    return raw if len(values) == 1 else f"{raw}: **{mean_and_deviation(values)}**"


MADE = "T | minutes | on | commit"


def made(entries: list[dict[str, Any]]) -> list[str]:
    """How the runs of one row were made: the cells of MADE."""
    return [
        f"{entries[0]['macs'] / T:.3f}",
        f"{statistics.mean(one['seconds'] for one in entries) / 60:.0f}",
        ", ".join(sorted({on(one) for one in entries})),
        ", ".join(sorted({one["commit"] for one in entries})),
    ]


def on(one: dict[str, Any]) -> str:
    """Where a run was made."""
    threads = one["threads"]
    return f"{one['processor']}, {threads} thread{'s' if threads > 1 else ''}"


def draw_seeds(axis: Any, values: list[float], place: int, color: str) -> None:
    """A dot for each seed, and a line at their mean, in the row `place` of a figure."""
    axis.plot(values, [place] * len(values), "o", color=color, alpha=0.6, markersize=5)
    axis.plot(statistics.mean(values), place, "|", color=color, ms=20, mew=2.5)
