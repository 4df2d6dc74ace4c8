"""Is it right to be sure? What each way is worth, over seeds, at one budget.

    python results/certainty/certainty.py runs/A runs/B   # adds these runs, draws and writes anew

The baseline is configs/cifar10_certainty.yaml; runs differ in --loss and --seed.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import functions as fn  # noqa: E402
from contrastive.losses import CERTAIN  # noqa: E402
from results import measured  # noqa: E402

CONFIG = "configs/cifar10_certainty.yaml"
PLAIN = "nt_xent"
BAR = "probe's softmax"  # of the same encoder: what a learned certainty has to beat
ACCURACIES = {"knn": "k-NN", "linear": "linear probe"}

# What is asked of a way: {its name in results.json: (its name here, what chance has)}.
ASKED = {
    "r_auroc": ("nearest alike", 0.5),
    "aurc": ("probe's error", None),
    "crops": ("crops", 0.0),
    "blur": ("blur", 0.0),
    "noise": ("noise", 0.0),
    "people": ("people", 0.0),
}

INTRODUCTION = f"""# How sure is it, and is it right to be?

Made by `python results/certainty/certainty.py`. Each run is

    python simCLR.py --config {CONFIG}

with `--loss` and `--seed`: CIFAR-10 (JPEG copy), two 16-pixel views, the same arithmetic for all.
Certainties are asked of the 10,000 test images, at 32 pixels; of 2,000 of them cropped, blurred and
with noise; and of up to 2,000 images of another set. Cells are mean ± standard deviation over the
seeds; the raw values are in [certainty.json](certainty.json).
"""

WORDS = """\
Nearest alike: AUROC with which a certainty tells the test images whose nearest test image is of the
same class. Probe's error: its mean over how many of the surest are kept (AURC, better the lower).
Crops, blur, noise, people: Spearman with how well an image can be seen, and with how much people
agree on it (CIFAR-10H). Against another set: AUROC of the test images against it; .5 is chance, and
below that the other set is found the surer. First stands what plain SimCLR offers; then, in bold,
what each loss has learned, and below it what it has to beat: the largest probability of a probe on
the same encoder."""


def by_loss(entries: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{loss: its entries, by seed}, plain SimCLR first; runs that differ in more are refused."""
    found: dict[str, list[dict[str, Any]]] = {loss: [] for loss in (PLAIN, *CERTAIN)}
    for one in sorted(entries, key=lambda one: one["seed"]):
        loss = one["flags"].removeprefix("--loss ") or PLAIN
        if loss not in found:
            sys.exit(f"a run with {one['flags']}: these pages compare losses alone")
        found[loss].append(one)
    return {loss: some for loss, some in found.items() if some}


def by_way(entries: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{way: what it is worth, for each seed}: those of plain SimCLR, then what each other loss has
    learned, with BAR of the same runs."""
    found: dict[str, list[dict[str, Any]]] = {}
    for loss, runs in by_loss(entries).items():
        plain = {way: way for way in runs[0]["certainty"]["ways"]}
        ways = plain if loss == PLAIN else {loss: loss, f"{loss}: {BAR}": BAR}
        for name, way in ways.items():
            found[name] = [run["certainty"]["ways"][way] for run in runs]
    return found


def known(values: list[float | None]) -> list[float]:
    """Those of the seeds that have one: not each way is asked each question."""
    return [value for value in values if value is not None]


def mean(values: list[float]) -> str:
    """Mean ± standard deviation, if there are several."""
    if not values:
        return ""
    text = f"{statistics.mean(values):.3f}"
    return f"{text} ± {statistics.stdev(values):.3f}" if values[1:] else text


def page(entries: list[dict[str, Any]]) -> str:
    """README.md: what it costs in accuracy, and what each way is worth."""
    runs, ways = by_loss(entries), by_way(entries)
    others = list(entries[0]["certainty"]["ways"][BAR]["others"])
    costs = [
        f"| loss | {' | '.join(ACCURACIES.values())} | seeds | {measured.MADE} |",
        "| --- | --- | --- | --- | ---: | ---: | --- | --- |",
    ]
    for loss, some in runs.items():
        cells = [
            f"`{loss}`",
            *(measured.summary([one[name] for one in some]) for name in ACCURACIES),
            ", ".join(str(one["seed"]) for one in some),
            *measured.made(some),
        ]
        costs.append(f"| {' | '.join(cells)} |")

    names = [name for name, _ in ASKED.values()]
    names += [f"against {Path(name).name}" for name in others]
    worth = [f"| certainty | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for way, worths in ways.items():
        name = f"**{way}**" if way in CERTAIN else way
        cells = [mean(known([one[key] for one in worths])) for key in ASKED]
        cells += [mean(known([one["others"].get(other) for one in worths])) for other in others]
        worth.append(f"| {name} | {' | '.join(cells)} |")

    parts = [INTRODUCTION.strip(), "## Does it cost accuracy?", "\n".join(costs)]
    parts += ["## What is it worth?", "\n".join(worth), WORDS]
    parts.append("![What each certainty is worth](certainty.png)")
    return "\n\n".join(parts) + "\n"


@fn.drawing
def draw(entries: list[dict[str, Any]], file: Path) -> None:
    """A panel for each question, a row for each way, a dot for each seed and a line at the mean."""
    ways = by_way(entries)
    figure, axes = fn.new_figure(15, 1.6 + 0.34 * len(ways), columns=len(ASKED))
    for number, (axis, (key, (name, chance))) in enumerate(zip(axes, ASKED.items(), strict=True)):
        for place, (way, worths) in enumerate(ways.items()):
            values, color = known([one[key] for one in worths]), f"C{1 if way in CERTAIN else 0}"
            if values:
                measured.draw_seeds(axis, values, place, color)
        if chance is not None:
            axis.axvline(chance, color="0.6", linestyle=":")
        axis.set_yticks(range(len(ways)), list(ways) if number == 0 else [])
        axis.set_ylim(len(ways) - 0.5, -0.5)
        axis.margins(x=0.12)
        axis.grid(axis="x", alpha=0.3)
        better = "less is better" if key == "aurc" else "more is better"
        axis.set(title=name, xlabel=better)
    fn.save_figure(figure, file)


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    base, kept = measured.baseline(CONFIG), HERE / "certainty.json"
    entries = measured.add(sys.argv[1:], base, kept, also=("certainty",), held_out=False)
    measured.write(page(entries), entries, HERE / "README.md", kept)
    draw(entries, HERE / "certainty.png")
