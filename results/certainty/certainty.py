"""Is it right to be sure? What each way is worth, over seeds, at one budget.

    python results/certainty/certainty.py runs runs/A runs/B   # adds runs, draws and writes anew
    python results/certainty/certainty.py search runs/A        # ... that choose a temperature
    python results/certainty/certainty.py classes runs/A       # ... that have not seen all classes

The baselines are configs/cifar10_certainty.yaml, and what ends in _search and _classes; runs differ
in --loss, what each has of its own (--temperature, --embedding_dim), and --seed.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import functions as fn  # noqa: E402
import simCLR  # noqa: E402
from contrastive.arithmetic import T  # noqa: E402
from contrastive.certainty import KEPT  # noqa: E402
from contrastive.losses import CERTAIN  # noqa: E402
from results import measured  # noqa: E402

Value = TypeVar("Value")
CONFIG = "configs/cifar10_certainty.yaml"
SEARCH = "configs/cifar10_certainty_search.yaml"
CLASSES = "configs/cifar10_certainty_classes.yaml"
PLAIN = "nt_xent"
OWN = {"--loss", "--temperature", "--embedding_dim"}  # what each loss may have of its own
# Of the same encoder: what a certainty has to beat.
BARS = ("norm of z", "tenth neighbour", "probe's softmax")
ACCURACIES = {"knn": "k-NN", "linear": "linear probe"}

# What is asked of a way: {its name in results.json: (its name here, what chance has)}. More is
# better throughout.
ASKED = {
    "r_auroc": ("nearest alike", 0.5),
    "order": ("errors last", 0.0),
    "crops": ("crops", 0.0),
    "blur": ("blur", 0.0),
    "noise": ("noise", 0.0),
    "people": ("people", 0.0),
}

INTRODUCTION = f"""# How sure is it, and is it right to be?

Made by `python results/certainty/certainty.py`. Each run is

    python simCLR.py --config {CONFIG}

with `--loss`, its `--temperature`, and `--seed`: CIFAR-10 (JPEG copy), two 16-pixel views, five
epochs, the same arithmetic for all. What it is measured on is made by `results/cifar10_jpeg.py`,
`results/fashion_mnist.py` and `results/cifar10h.py`.
Certainties are asked of the 10,000 test images, at 32 pixels; of 2,000 of them cropped, blurred and
with noise; and of up to 2,000 images of another set. Cells are mean ± standard deviation over the
seeds; the raw values are in [runs.json](runs.json).
"""

VERDICT = """\
Little. `tau` and `mc_infonce` cost no accuracy: NT-Xent at the low temperature that they need is no
better than they are; all three are about a point below NT-Xent at 0.25. `kappa` and `latent_class`,
at 0.25, cost four to five points of k-NN and one to three of the linear probe. On its own encoder
none tells clearly better where the nearest image is alike, or where the probe errs, than what every
run offers without a label: how near the tenth neighbour is, or the length of z. A probe, which has
seen labels, tells both far better.

They do fall where images are cropped or blurred, but so does the mere sharpness of the pixels, and
more reliably. Noise makes every one of them rise, and pure noise is found surer than all but a
handful of photos: as if they had learned how much there is in an image to tell it by, not how well
it can be seen. Clothes, too, are found surer than photos. The distance of the tenth neighbour tells
both clothes and digits from photos, but on the encoders of the low temperature alone.

What `tau` and `mc_infonce` have learned is a little of where people disagree: 0.11 each, beside
0.08 at most for what else has no label, and 0.20 to 0.22 for a probe. Longer training does more: on
the encoder of 0.65 T, NT-Xent's, the length of h alone comes to 0.19, and orders the errors to 0.47
([looking](../README.md#looking-at-it-and-how-sure-it-is))."""

SUREST = """\
Test images of four classes, the surest on the left and the least sure on the right (seed 0); framed
is what the linear probe takes for another class. To the eye, sure is what stands out from a plain
ground, right or wrong; `tau` and `mc_infonce` are least sure of what is blurred, or seen so closely
that little of it is in the picture."""

COSTS = """\
Calibration error: by how much, on average, the largest probability of a probe that knows half the
labels is off from how often it is right; then with the temperature that the other half has set.
Certainty: its median in seed 0's run, and where nine tenths of the images lie."""

WORDS = """\
"Learned after" is a small network that has seen, on frozen features, where a probe errs. How much
ten augmentations of an image agree is asked of whole test images alone.

Nearest alike: AUROC with which a certainty tells the test images whose nearest test image is of the
same class. Errors last: do the probe's errors come last in its order; 0 is no order, 1 the best
there is (from the area under risk over coverage, which stands in the JSON file). Crops, blur,
noise: Spearman with how well an image can be seen, of six copies of the same image, on average (a
crop is enlarged, which blurs it as well). People: Spearman with how much they agree on it
(CIFAR-10H). Against another set: AUROC of the test images against it; .5 is chance, and below that
the other set is found the surer.

First stands what plain SimCLR offers, and the sharpness of the pixels, which needs no encoder, then
plain SimCLR at the temperature of `tau` and `mc_infonce`; then, in bold, what each loss has
learned, and below it what it has to beat, on the same encoder: the norm of its embedding and how
near the tenth neighbour among the training images is, which no label has seen either, and the
largest probability of a probe, which has seen all labels (as have entropy and what is learned
after)."""


def flags_of(one: dict[str, Any]) -> dict[str, str]:
    """The flags of an entry, with its loss."""
    words = one["flags"].split()
    return {"--loss": PLAIN, **dict(zip(words[::2], words[1::2], strict=True))}


def name_of(one: dict[str, Any]) -> str:
    """What an entry is called: by its loss, plain SimCLR at another temperature by that, too."""
    flags = flags_of(one)
    loss, temperature = flags["--loss"], flags.get("--temperature")
    return f"{PLAIN} at {temperature}" if loss == PLAIN and temperature else loss


def by_loss(entries: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{loss: its entries, by seed}, plain SimCLR first; runs that differ in more than OWN are
    refused, and so are two settings of one loss that learns a certainty."""
    controls = {name_of(one) for one in entries} - {PLAIN, *CERTAIN}
    names = (PLAIN, *sorted(controls), *CERTAIN)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for one in sorted(entries, key=lambda one: one["seed"]):
        loss = name_of(one)
        if not set(flags_of(one)) <= OWN:
            sys.exit(f"a run with {one['flags']}: these pages compare losses alone")
        if found[loss] and found[loss][0]["flags"] != one["flags"]:
            sys.exit(f"{found[loss][0]['flags']} and {one['flags']}: take one setting")
        found[loss].append(one)
    return {loss: some for loss, some in found.items() if some}


def by_way(entries: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{way: what it is worth, for each seed}: those of plain SimCLR, then what each other loss has
    learned, with BARS of the same runs."""
    found: dict[str, list[dict[str, Any]]] = {}
    for loss, runs in by_loss(entries).items():
        plain = {way: way for way in runs[0]["certainty"]["ways"]}
        learned = {loss: loss} if loss in CERTAIN else {}
        ways = plain if loss == PLAIN else learned | {f"{loss}: {bar}": bar for bar in BARS}
        for name, way in ways.items():
            found[name] = [run["certainty"]["ways"][way] for run in runs]
    return found


def marked(way: str) -> str:
    """A way as a table names it: in bold what a loss has learned."""
    return f"**{way}**" if way in CERTAIN else way


def known(values: list[Value | None]) -> list[Value]:
    """Those of the seeds that have one: not each way is asked each question."""
    return [value for value in values if value is not None]


def spread(one: dict[str, Any], loss: str) -> str:
    """The middle of what a loss has learned, and where nine tenths of it lie, in one run."""
    if loss not in CERTAIN:
        return ""
    _, low, middle, high, _ = one["certainty"]["ways"][loss]["quantiles"]
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def calibration(some: list[dict[str, Any]]) -> str:
    """By how much a probe's probabilities are off, before and after its temperature is set."""
    found = [one["certainty"]["calibration"] for one in some]
    names = ("expected_error", "expected_error_at_temperature")
    before, after = (fn.percent(statistics.mean(one[name] for one in found)) for name in names)
    return f"{before}, then {after}"


def mean(values: list[float]) -> str:
    """Mean ± standard deviation, if there are several."""
    if not values:
        return ""
    text = f"{statistics.mean(values):.3f}"
    return f"{text} ± {statistics.stdev(values):.3f}" if values[1:] else text


TEMPERATURE = f"""\
Each loss has its own: a certainty that scales the logits, or blurs them, is of no use where they
are already as large as they can be. It is the one whose certainty best tells where the nearest
image is alike, in short runs (seed 0) measured on held-out training images; where two do so alike,
the one that costs less accuracy. With other images of the same kind the numbers would change by
about .006 (the standard error), with other seeds by more, perhaps. On a sphere of 32 dimensions,
not 128, `mc_infonce` does worse:

    python simCLR.py --config {SEARCH}

Without the flag it is 0.25, which NT-Xent has from its recipes; `kappa`, which is NT-Xent and a
term beside it, has the same."""


UNSEEN = f"""\
Encoder and probe have not seen cats and ships, in

    python simCLR.py --config {CLASSES}

with each loss's own flags. AUROC of the test images of the other eight classes against those of
these two; .5 is chance:"""

UNSEEN_WORDS = """\
Of this one pair of classes, none of the four knows as much as the sharpness of the pixels.
NT-Xent's length of z, without a label, knows nearly as much as the probe of the eight (0.64 and
0.65)."""


def of_unseen(entries: list[dict[str, Any]]) -> str:
    """Which certainty is lower for classes that were never seen."""
    lines = ["| certainty | against classes never seen | seeds |", "| --- | --- | --- |"]
    for way, worths in by_way(entries).items():
        found = known([one["others"].get("classes left out") for one in worths])
        if found:
            lines.append(f"| {marked(way)} | {mean(found)} | {len(found)} |")
    return "\n".join(lines)


def choice(search: list[dict[str, Any]]) -> str:
    """What the short runs say of each loss's temperature."""
    lines = ["| flags | k-NN | linear probe | nearest alike | T | commit |", "|" + " --- |" * 6]
    for one in sorted(search, key=lambda one: (flags_of(one)["--loss"], one["flags"])):
        loss = flags_of(one)["--loss"]
        cells = [
            f"`{one['flags']}`",
            *(measured.summary([one[name]]) for name in ACCURACIES),
            f"{one['certainty']['ways'][loss]['r_auroc']:.3f}",
            f"{one['macs'] / T:.3f}",
            one["commit"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(
    entries: list[dict[str, Any]], search: list[dict[str, Any]], classes: list[dict[str, Any]]
) -> str:
    """README.md: what it costs in accuracy, what each way is worth, what it says of classes never
    seen, and how temperatures were chosen."""
    runs, ways = by_loss(entries), by_way(entries)
    others = list(entries[0]["certainty"]["ways"][BARS[0]]["others"])
    columns = ["loss", "flags", *ACCURACIES.values(), "calibration error", "certainty", "seeds"]
    costs = [
        f"| {' | '.join(columns)} | {measured.MADE} |",
        f"|{' --- |' * len(columns)} ---: | ---: | --- | --- |",
    ]
    for loss, some in runs.items():
        cells = [
            f"`{loss}`",
            f"`{some[0]['flags']}`" if some[0]["flags"] else "",
            *(measured.summary([one[name] for one in some]) for name in ACCURACIES),
            calibration(some),
            spread(some[0], loss),
            ", ".join(str(one["seed"]) for one in some),
            *measured.made(some),
        ]
        costs.append(f"| {' | '.join(cells)} |")

    names = [name for name, _ in ASKED.values()]
    names += [f"against {Path(name).name}" for name in others]
    worth = [f"| certainty | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for way, worths in ways.items():
        cells = [mean(known([one[key] for one in worths])) for key in ASKED]
        cells += [mean(known([one["others"].get(other) for one in worths])) for other in others]
        worth.append(f"| {marked(way)} | {' | '.join(cells)} |")

    parts = [INTRODUCTION.strip(), "## What is it worth?", VERDICT]
    parts.append("![What the linear probe gains, and the order of its errors](kept.png)")
    parts += ["## Does it cost accuracy?", "\n".join(costs), COSTS]
    parts += ["## Each certainty, each question", "\n".join(worth), WORDS]
    parts.append("![What each certainty is worth](certainty.png)")
    if classes:
        parts += ["## And of classes never seen?", UNSEEN, of_unseen(classes), UNSEEN_WORDS]
    pictures = [
        f"![The surest and the least sure test images: {loss}](surest-{loss}.png)"
        for loss in runs
        if loss in CERTAIN
    ]
    parts += ["## What are they surest of?", SUREST, *pictures]
    if search:
        parts += ["## Which temperature?", TEMPERATURE, choice(search)]
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
            if way in CERTAIN or (way.startswith(f"{PLAIN} at") and way.endswith(BARS[0])):
                axis.axhline(place - 0.5, color="0.85", linewidth=0.8)
        axis.axvline(chance, color="0.6", linestyle=":")
        axis.set_yticks(range(len(ways)), list(ways) if number == 0 else [])
        axis.set_ylim(len(ways) - 0.5, -0.5)
        axis.margins(x=0.12)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(name)
    fn.save_figure(figure, file)


def keep_surest(runs: list[str]) -> None:
    """Of the first seed's runs, the pictures of what each loss is surest and least sure of; of 256
    colours, so that they are small."""
    for run in map(Path, runs):
        config = fn.load_config(simCLR.Config, run / "config.yaml")
        if config.loss in CERTAIN and config.seed == 0:
            with Image.open(run / "surest.png") as image:
                small = image.convert("RGB").quantize(256)
            small.save(HERE / f"surest-{config.loss}.png", optimize=True)


@fn.drawing
def draw_kept(entries: list[dict[str, Any]], file: Path) -> None:
    """By how much the probe's accuracy on the surest images is better than on all of them, the mean
    over the seeds in a band of one standard deviation; and how well each loss orders the errors
    beside what its own encoder offers, a dot for each seed.

    What needs labels is black, what needs neither labels nor another loss grey.
    """
    ways = by_way(entries)
    norm, neighbour, softmax = BARS
    grey = {neighbour: "0.4", norm: "0.7"}
    styles = {
        softmax: ("black", f"NT-Xent: {softmax} (labels)"),
        **{bar: (color, f"NT-Xent: {bar}") for bar, color in grey.items()},
        **{way: (f"C{number}", way) for number, way in enumerate(CERTAIN)},
    }
    figure, (kept, own) = fn.new_figure(12.5, 4.2, columns=2)
    for way, (color, name) in styles.items():
        curves = np.array(known([one["kept"] for one in ways.get(way, [])]))  # (seeds, shares)
        if len(curves):
            curves = 100 * (curves - curves[:, -1:])  # each encoder has an accuracy of its own
            mean, spread = curves.mean(0), curves.std(0, ddof=min(1, len(curves) - 1))
            kept.plot(KEPT, mean, color=color, label=name)
            band = mean - spread, mean + spread
            kept.fill_between(KEPT, *band, color=color, alpha=0.15, linewidth=0)
    kept.set(title="What the linear probe gains on the surest images")
    kept.set(xlabel="share of the test images that is kept", ylabel="points of accuracy gained")

    losses = [way for way in CERTAIN if way in ways]
    for place, loss in enumerate(losses):
        for way, color in (grey | {loss: styles[loss][0]}).items():
            worths = ways[way if way == loss else f"{loss}: {way}"]
            measured.draw_seeds(own, known([one["order"] for one in worths]), place, color)
    own.set(title="Each beside the grey two of its own encoder", yticks=range(len(losses)))
    own.set(xlabel="order of the errors: 0 is none, at 1 they come last")
    own.set(yticklabels=losses, ylim=(len(losses) - 0.5, -0.5))
    own.set_xlim(left=0)
    for axis in (kept, own):
        axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    fn.save_figure(figure, file)


if __name__ == "__main__":
    kind, *runs = sys.argv[1:] or [""]
    kinds = {"search": SEARCH, "classes": CLASSES, "runs": CONFIG}
    if kind not in kinds:
        sys.exit(__doc__)
    found = {}
    for name, config in kinds.items():
        file, new = HERE / f"{name}.json", runs if name == kind else []
        base, held_out = measured.baseline(config), name == "search"
        found[name] = measured.add(new, base, file, ("certainty",), held_out)
        if found[name]:
            measured.keep(found[name], file)
    entries = found["runs"]
    if entries:
        (HERE / "README.md").write_text(page(entries, found["search"], found["classes"]))
        draw(entries, HERE / "certainty.png")
        draw_kept(entries, HERE / "kept.png")
        keep_surest(runs if kind == "runs" else [])
