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

WHERE = {"dataset", "data_dir", "validation_fraction", "output_dir", "resume", "seed", "max_time"}
WHERE |= {"stages", "checkpoint", "knn_every"}
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


def begin(config: str) -> simCLR.Config:
    """The configuration that a page's runs begin from; its path is from the project's root."""
    return fn.load_config(simCLR.Config, ROOT / config)


def entry(run: Path, base: simCLR.Config, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """What is kept of a finished run, or of a run whose encoder was measured once more.

    Of the latter it keeps what pretraining and measuring at once would have had for flags. also:
    further parts of results.json.
    """
    results = json.loads((run / "results.json").read_text())
    config = fn.load_config(simCLR.Config, run / "config.yaml")
    flags = changed(config, base)
    if config.checkpoint:
        earlier = Path(config.checkpoint)
        trained = json.loads((earlier / "results.json").read_text())
        results |= {name: trained[name] for name in OF_TRAINING}
        flags = {name: value for name, value in flags.items() if name in OF_EVALUATION}
        flags = changed(fn.load_config(simCLR.Config, earlier / "config.yaml"), base) | flags
    return {
        "script": results["script"],
        "flags": in_words(flags),
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
    """The flags in which a run differs from the configuration that it began from.

    Of those of fine-tuning it has none where it has fine-tuned nothing.
    """
    idle = set() if "finetune" in config.stages_list else set(FineTuningSettings.__annotations__)
    return {
        name: value
        for name, value in vars(config).items()
        if value != getattr(base, name) and name not in WHERE | idle
    }


def in_words(flags: dict[str, Any]) -> str:
    """Flags as a command has them."""
    return " ".join(f"--{name} {value}" for name, value in flags.items())


def add(
    runs: list[str], base: simCLR.Config, kept: Path, also: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """All entries of a page's JSON file, with these runs; one measured anew takes its old place."""
    known = json.loads(kept.read_text()) if kept.is_file() else []
    added = [entry(Path(run), base, also) for run in runs]
    entries = list({key(one): one for one in known + added}.values())
    kept.write_text(json.dumps(entries, indent=1) + "\n")
    return entries


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
        ", ".join(sorted({f"{one['processor']}, {one['threads']} thread" for one in entries})),
        ", ".join(sorted({one["commit"] for one in entries})),
    ]


def draw_seeds(axis: Any, values: list[float], place: int, color: str) -> None:
    """A dot for each seed, and a line at their mean, in the row `place` of a figure."""
    axis.plot(values, [place] * len(values), "o", color=color, alpha=0.6, markersize=5)
    axis.plot(statistics.mean(values), place, "|", color=color, ms=20, mew=2.5)
