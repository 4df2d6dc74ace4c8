"""What is each part of SimCLR worth? One small budget, one change at a time, three seeds.

    python results/ablations/ablations.py commands        # what is to be run
    python results/ablations/ablations.py runs/A runs/B   # adds these runs, draws and writes anew

The baseline of all is configs/cifar10_ablation.yaml.
"""

from __future__ import annotations

import functools
import statistics
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import functions as fn  # noqa: E402
import simCLR  # noqa: E402
from results import measured  # noqa: E402

CONFIG = "configs/cifar10_ablation.yaml"
SEEDS = (0, 1, 2)
METRICS = {"linear": "linear probe", "knn": "k-NN"}
TWICE = "counted_twice.py"
SPAN = 10  # points that a figure's axis shows at least: what seeds differ by should look small


@dataclass
class Question:
    """What is asked, what was found, and {arm: its flags}."""

    name: str
    asks: str
    found: str
    arms: dict[str, str]


QUESTIONS = [
    Question(
        "layers",
        "Which layer is the representation?",
        "h. To find partners in spite of crop and colour, g throws away what the classes need: "
        "the linear probe reads nine points less from z, with each of three seeds, and six of them "
        "are gone after the hidden layer. So g is for training alone (Section 4.2: more than ten "
        "points).",
        {
            "h": "",
            "after the hidden layer": "--probe_layer 1",
            "z": "--probe_layer 2",
        },
    ),
    Question(
        "head",
        "Does h need a head behind it?",
        "Yes: without one it is h that has to forget colour and place, which costs five points of "
        "the linear probe and four of k-NN, with each of three seeds more than two. What a "
        "nonlinear head is worth beside a linear one (in the paper 3 %) does not show so early: "
        "the linear probe reads 0.8 points less, k-NN 0.9 more, about as much as seeds differ.",
        {
            "none": "--head_layers 0",
            "linear": "--head_layers 1",
            "nonlinear": "",
        },
    ),
    Question(
        "temperature",
        "Which temperature?",
        "Lower than 0.5: with the same seed 0.25 is three and a half points of the linear probe "
        "ahead, and five and a half of k-NN; 0.1 is as good as 0.25, and 1 two points of k-NN "
        "worse than 0.5. One seed each. The paper finds 0.5 the best of 0.1, 0.5 and 1 for "
        "CIFAR-10, in training that is a hundred times as long and more (Appendix B.9).",
        {
            "0.1": "--temperature 0.1",
            "0.25": "",
            "0.5": "--temperature 0.5",
            "1": "--temperature 1",
        },
    ),
    Question(
        "batch",
        "How large a batch, for the same images?",
        "At one learning rate, 128 is the best of these: 512 loses five points, for it takes a "
        "quarter of the steps; 32 loses four, for which that rate may be too high. No rate was "
        "tuned, so this does not say what the negatives of a large batch are worth. In the paper "
        "large batches win, by less the longer it trains (Figure 9). One seed each.",
        {
            "32": "--batch_size 32",
            "128": "",
            "512": "--batch_size 512",
        },
    ),
    Question(
        "augmentation",
        "What does each augmentation bring?",
        "Without crops, two views differ only in colour and by a mirror image: partners are easy "
        "to find, and there is little to learn from it. The linear probe loses 17 points, k-NN 16. "
        "Without jitter and grey they lose 10 and 11: the crops of an image share their colours, "
        "which then is enough to find partners by. Without jitter, but with a fifth of the views "
        "grey, they lose 5 and 5, without grey alone nearly 4. So the paper finds it: crops are "
        "the best single augmentation, and crops with colour the best pair (Section 3.1, "
        "Figure 5). Flips change nothing that is clear: without them the linear probe gains 1.5 "
        "points and k-NN 1.0 here, in float32, and the compact encoder with Muon loses 1.0 and 0 "
        "([diary](../simclr/diary.md)). One seed each, beside the baseline with the same one.",
        {
            "all": "",
            "no crop": "--crop_scale 1",
            "no flip": "--flip 0",
            "no jitter": "--jitter 0",
            "no grey": "--grayscale 0",
            "no colour at all": "--jitter 0 --grayscale 0",
        },
    ),
    Question(
        "encoder",
        "Which encoder, for the same arithmetic?",
        "A compact one, by far: it sees 2.5 times as many images, in as many more steps. Its "
        "weights begin as PyTorch has them, those of ResNet-18 as torchvision has them; at one "
        "learning rate.",
        {
            "ResNet-18, 2 epochs": "",
            "compact, 5 epochs": "--encoder compact --epochs 5",
        },
    ),
    Question(
        "stem",
        "Which first layers, for the same arithmetic?",
        "Those for small images (Appendix B.9), though they see crops of 16 pixels only: eight "
        "points of the linear probe. torchvision's first layers make a map a quarter as wide and "
        "high, at a fifteenth of the arithmetic for the same pixels, and so see 3.5 times as many "
        "images, enlarged to 32 pixels; but then they have one place of the last map for an image, "
        "where the others average sixteen. k-NN does not mind (46.1 %). One seed, at one learning "
        "rate.",
        {
            "CIFAR stem, 16 pixels, 2 epochs": "",
            "torchvision's, 32 pixels, 7 epochs": "--stem imagenet --crop_size 32 --epochs 7",
        },
    ),
    Question(
        "views",
        "How many views, for the same arithmetic?",
        "So early it is all one: 58.4 % with four views, 58.1 % with two and the same seed. Twice "
        "as long (results/simclr/diary.md) four are three points ahead, with as many steps, "
        "whether each view is to find each of the others or their mean (`--positives mean`).",
        {
            "2 views, batch 128, 2 epochs": "",
            "4 views, batch 64, 1 epoch": "--views 4 --batch_size 64 --epochs 1",
        },
    ),
    Question(
        "twice",
        "What if the positive is counted twice in the denominator?",
        "Nothing that three seeds could tell, at this length and batch: one positive more among "
        "255 terms. It is an error all the same: the loss is no longer the one of Equation 1, and "
        "in a small batch the extra term weighs more.",
        {"once": "", "twice": TWICE},
    ),
]


# ------------------------------------------------------------------------------------------------
# Which run is of which arm
# ------------------------------------------------------------------------------------------------


@functools.cache
def wanted(arm: str) -> tuple[str, str]:
    """(script, flags) of an arm, flags as an entry has them."""
    if arm == TWICE:
        return TWICE, ""
    config = fn.parse_config(simCLR.Config, ["--config", str(measured.ROOT / CONFIG), *arm.split()])
    base = measured.baseline(CONFIG)
    return "simCLR.py", measured.as_flags(measured.changed(config, base), base)


def runs_of(arm: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of an arm, by seed."""
    found = [one for one in entries if (one["script"], one["flags"]) == wanted(arm)]
    return sorted(found, key=lambda one: one["seed"])


def command(arm: str, seed: int) -> str:
    """What makes a run of an arm."""
    script, flags = (f"results/ablations/{TWICE}", "") if arm == TWICE else ("simCLR.py", arm)
    parts = ["python", script, "--config", CONFIG, flags, f"--seed {seed}" if seed else ""]
    return " ".join(part for part in parts if part)


# ------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------

INTRODUCTION = f"""# What each part of SimCLR is worth

Made by `python results/ablations/ablations.py`. One change at a time, everything else as in
[{Path(CONFIG).name}](../../{CONFIG}): two 16-pixel views, two epochs of 40,000 training images of
CIFAR-10 (JPEG copy), a fiftieth of T. Linear (L-BFGS, 20,000 labels) and k-NN are accuracies on
10,000 other training images, at 32 pixels: the test images were not looked at. So short a training
says what is learned *first*; what wins here need not win after a thousand epochs.

Raw values of seeds 0, 1, 2, as far as they have been run, then mean ± standard deviation. Three
seeds of the baseline are 1.3 points of the linear probe apart and 1.8 of k-NN: less than that says
nothing where there is one seed. In the figures the baseline is orange; a dot is a seed, a line the
mean. Training is in bfloat16 where the processor has it: that of two rows (no flip, torchvision's
first layers) was in float32, so that a point of difference says nothing there. Minutes are those of
pretraining, beside other work: no measure of speed.

    python simCLR.py --config {CONFIG}

with the flags of the row, and `--seed`; `counted_twice.py` is a script beside this page, with the
same flags.
"""


def row(arm: str, flags: str, entries: list[dict[str, Any]]) -> str:
    """A line of a question's table: what one arm reached."""
    found = runs_of(flags, entries)
    cells = [
        arm,
        f"`{flags}`" if flags else "",
        *(measured.summary([one[metric] for one in found]) for metric in METRICS),
        *measured.made(found),
    ]
    return f"| {' | '.join(cells)} |"


def page(entries: list[dict[str, Any]]) -> str:
    """README.md: a table and a figure for each question that has been measured."""
    parts = [INTRODUCTION.strip()]
    for question in QUESTIONS:
        arms = measured_arms(question, entries)
        if not arms:
            continue
        rows = [
            f"| | flags | {' | '.join(METRICS.values())} | {measured.MADE} |",
            "| --- | --- | --- | --- | ---: | ---: | --- | --- |",
            *(row(*arm, entries) for arm in arms.items()),
        ]
        parts += [f"## {question.asks}", textwrap.fill(question.found, 100), "\n".join(rows)]
        parts.append(f"![{question.asks}]({question.name}.png)")
    return "\n\n".join(part for part in parts if part) + "\n"


def measured_arms(question: Question, entries: list[dict[str, Any]]) -> dict[str, str]:
    """{arm: flags} of those that have a run; none where only the baseline has."""
    found = {arm: flags for arm, flags in question.arms.items() if runs_of(flags, entries)}
    return found if len(found) > 1 else {}


@fn.drawing
def draw(question: Question, entries: list[dict[str, Any]], file: Path) -> None:
    """A dot for each seed, a line at their mean: linear probe and k-NN side by side."""
    arms = measured_arms(question, entries)
    figure, axes = fn.new_figure(10, 1.4 + 0.45 * len(arms), columns=len(METRICS))
    figure.suptitle(question.asks)
    for number, (axis, (metric, name)) in enumerate(zip(axes, METRICS.items(), strict=True)):
        for place, flags in enumerate(arms.values()):
            values = [100 * one[metric] for one in runs_of(flags, entries)]
            color = f"C{0 if flags else 1}"
            measured.draw_seeds(axis, values, place, color)
            mean = f"{statistics.mean(values):.1f}"
            axis.annotate(
                mean, (max(values), place), (8, 0), textcoords="offset points", va="center"
            )
        axis.set_yticks(range(len(arms)), list(arms) if number == 0 else [])
        axis.set_ylim(len(arms) - 0.5, -0.5)  # the first row on top
        low, high = axis.dataLim.intervalx
        beside = max(SPAN, 1.4 * (high - low)) / 2  # of the middle; with room for the words
        axis.set_xlim((low + high) / 2 - beside, (low + high) / 2 + beside)
        axis.grid(axis="x", alpha=0.3)
        axis.set_xlabel(f"{name}, accuracy in % (validation)")
    fn.save_figure(figure, file)


if __name__ == "__main__":
    if sys.argv[1:] == ["commands"]:
        arms = dict.fromkeys(flags for question in QUESTIONS for flags in question.arms.values())
        print("\n".join(command(arm, seed) for arm in arms for seed in SEEDS))
        sys.exit()
    kept = HERE / "ablations.json"
    entries = measured.add(sys.argv[1:], measured.baseline(CONFIG), kept)
    asked = {wanted(flags) for question in QUESTIONS for flags in question.arms.values()}
    for one in entries:
        if (one["script"], one["flags"]) not in asked:
            sys.exit(f"{one['script']} {one['flags']}: that is no arm of a question here")
    measured.write(page(entries), entries, HERE / "README.md", kept)
    for question in QUESTIONS:
        if measured_arms(question, entries):
            draw(question, entries, HERE / f"{question.name}.png")
