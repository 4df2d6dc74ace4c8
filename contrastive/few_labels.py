"""How far do a few labels get? Section 6, Table 7: semi-supervised learning."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

import functions as fn
from contrastive.probe import Features, ProbeSettings, knn_accuracy, probe
from functions import check


@dataclass
class Draw:
    """Which images have a label: indices int64 (M,); the seed that drew them, and how the draw is
    called on disk."""

    chosen: Tensor
    seed: int
    name: str


# Fine-tunes on the labelled images of a draw, from their linear probe: test accuracy, and steps.
FineTune = Callable[[Draw, nn.Linear], tuple[float, int]]


@dataclass
class FewLabelsSettings(ProbeSettings):
    """How many labels to try."""

    title: ClassVar[str] = "few labels"

    labels_per_class: int | str | None = None
    """measure with few labels, too: so many per class, one number or several, as 1,4,25;
    fine-tuning then takes these alone"""
    label_fractions: float | str | None = None
    """the same with a share of each class's labels, as 0.01,0.1"""
    label_seeds: int = 10
    """how often each draws which images have a label; with one seed, fewer are among more"""

    def validate(self) -> None:
        super().validate()
        self.require("label_seeds", fn.at_least(1))
        _ = self.label_amounts

    @property
    def label_amounts(self) -> list[Amount]:
        """--labels_per_class and --label_fractions, the fewest of each first. Raises UserError."""
        counts, shares = fn.listed(self.labels_per_class), fn.listed(self.label_fractions)
        valid = all(word.isdecimal() and int(word) > 0 for word in counts)
        remedy = "give numbers of at least 1, as 1,2,10"
        check(valid, f"--labels_per_class {self.labels_per_class}: {remedy}")
        valid = all(is_share(word) for word in shares)
        remedy = "give shares above 0 and at most 1, as 0.01,0.1"
        check(valid, f"--label_fractions {self.label_fractions}: {remedy}")
        return [
            *(Amount(per_class=count) for count in sorted({int(word) for word in counts})),
            *(Amount(fraction=share) for share in sorted({float(word) for word in shares})),
        ]


def is_share(word: str) -> bool:
    try:
        return 0 < float(word) <= 1
    except ValueError:
        return False


@dataclass(frozen=True)
class Amount:
    """So many labels of each class, or such a share of them."""

    per_class: int | None = None
    fraction: float | None = None

    def __str__(self) -> str:
        if self.per_class is not None:
            return f"{self.per_class} per class"
        return f"{100 * (self.fraction or 1):g} %"

    @property
    def file_name(self) -> str:
        """The same, as part of a file's name."""
        return f"{self.per_class}-per-class" if self.per_class else f"{self.fraction}-of-all"

    def choose(self, labels: Tensor, seed: int) -> Tensor:
        """Which of the images have a label: labels int64 (N,) -> indices int64 (M,), sorted.

        With one seed, fewer are among more.
        """
        if self.per_class is not None:
            return fn.per_class_subset(labels, self.per_class, seed)
        return fn.stratified_subset(labels, self.fraction or 1.0, seed)

    def check(self, labels: Tensor, classes: Sequence[str]) -> None:
        """Raises UserError where a class would have no label, and says where it has fewer than are
        asked for."""
        counts = labels.bincount(minlength=len(classes))
        least, name = int(counts.min()), classes[int(counts.argmin())]
        if self.fraction is None:
            if self.per_class is not None and self.per_class > least:
                fn.note(f"--labels_per_class {self.per_class}: {name} has only {least:,} labels")
            return
        least = max(least, 1)
        problem = f"--label_fractions {self.fraction:g} leaves {name} ({least:,} labels) without"
        check(round(self.fraction * least) >= 1, f"{problem}: take at least {1 / least:.2g}")


@dataclass
class FewLabels:
    """Test accuracies with a few labels, one for each draw of which images have them.

    images: how many those are. finetuned_steps: how many each of its fine-tunings took.
    """

    amount: Amount
    images: int = 0
    knn_accuracies: list[float] = field(default_factory=list)
    probe_accuracies: list[float] = field(default_factory=list)
    finetuned_accuracies: list[float] = field(default_factory=list)
    finetuned_steps: list[int] = field(default_factory=list)

    def accuracies(self) -> dict[str, list[float]]:
        """{how: an accuracy for each draw} of what was measured."""
        found = {
            "k-NN": self.knn_accuracies,
            "linear": self.probe_accuracies,
            "fine-tuned": self.finetuned_accuracies,
        }
        return {name: values for name, values in found.items() if values}

    def results(self) -> dict[str, Any]:
        """This part of results.json."""
        found = {
            "labels_per_class": self.amount.per_class,
            "label_fraction": self.amount.fraction,
            "images": self.images,
            "knn_accuracies": self.knn_accuracies,
            "probe_accuracies": self.probe_accuracies,
            "finetuned_accuracies": self.finetuned_accuracies,
            "finetuned_steps": self.finetuned_steps,
        }
        return {name: value for name, value in found.items() if value not in (None, [])}


def measure_few_labels(
    features: Features, settings: FewLabelsSettings, finetune: FineTune | None = None
) -> list[FewLabels]:
    """k-NN and probe for each amount of labels, over --label_seeds draws; fine-tuning where given.

    The probe is the optimum of logistic regression here, whatever --probe says: with so few
    images it takes no time. A neighbour can have no more than all its class's labels, so k is at
    most that.
    """
    found = []
    optimum = replace(settings, probe="lbfgs")
    for amount in settings.label_amounts:
        few = FewLabels(amount)
        if finetune is not None:
            draws = f"{settings.label_seeds} draws" if settings.label_seeds > 1 else "one draw"
            print(f"  fine-tuning with few labels: {amount}, {draws}", flush=True)
        for i in range(settings.label_seeds):
            seed = settings.seed + i  # the same draws for every encoder: a paired comparison
            chosen = amount.choose(features.train_labels, seed)
            part = features.labelled(chosen)
            few.images = len(chosen)
            k = min(settings.knn_k, int(part.train_labels.bincount().max()))
            few.knn_accuracies.append(knn_accuracy(part, settings, k))
            classifier = nn.Linear(part.train.shape[1], len(part.classes))
            few.probe_accuracies.append(probe(part, optimum, classifier).test_accuracy)
            if finetune is not None:
                draw = Draw(chosen, seed, f"{amount.file_name}-{i}")
                accuracy, steps = finetune(draw, classifier)
                few.finetuned_accuracies.append(accuracy)
                few.finetuned_steps.append(steps)
        found.append(few)
    return found


UNTRAINED = "untrained encoder"  # how its row is called
FROM_SCRATCH = f"  fine-tuned, the {UNTRAINED} is the same network trained from scratch"


def mean_and_deviation(accuracies: Sequence[float]) -> str:
    """Accuracies for people: their mean and, if there are several, standard deviation."""
    mean = 100 * statistics.mean(accuracies)
    if len(accuracies) == 1:
        return f"{mean:.1f} %"
    return f"{mean:.1f} ± {100 * statistics.stdev(accuracies):.1f} %"


def print_few_labels(few: dict[str, list[FewLabels]], held_out: str, draws: int) -> None:
    """Accuracies with few labels: a row for each amount. few: {representation: its accuracies}."""
    columns = [(name, how) for name, found in few.items() for how in found[0].accuracies()]
    names = [name.split()[0] for name, _ in columns]  # raw, untrained, pretrained
    first = [names.index(name) == i for i, name in enumerate(names)]
    rows = [
        ["", *(name if here else "" for name, here in zip(names, first, strict=True))],
        ["labels", *(how for _, how in columns)],
    ]
    for i, each in enumerate(next(iter(few.values()))):
        cells = (few[name][i].accuracies()[how] for name, how in columns)
        rows.append([str(each.amount), *map(mean_and_deviation, cells)])
    print(f"  {held_out} accuracy, mean ± standard deviation of {draws} draws of the labels:\n")
    fn.print_columns(rows)
    if (UNTRAINED, "fine-tuned") in columns:
        print(FROM_SCRATCH)
    print()
