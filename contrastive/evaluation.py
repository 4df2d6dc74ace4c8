"""What did it learn? Section 4 and Appendix B: what is measured of h, beside baselines."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import functions as fn
from contrastive import figures
from contrastive.certainty import Asked, Certainty, CertaintySettings, measure_certainty
from contrastive.explore import explore
from contrastive.few_labels import (
    FROM_SCRATCH,
    UNTRAINED,
    Draw,
    FewLabels,
    FewLabelsSettings,
    measure_few_labels,
    print_few_labels,
)
from contrastive.finetuning import FineTuned, FineTuningSettings, Labelled, Start, finetune
from contrastive.looking import Looked, look, plot_surest
from contrastive.pretrained import encoder_file, has_head
from contrastive.probe import (
    Features,
    LinearClassifier,
    Probed,
    knn_accuracy,
    note_few_neighbours,
    probe,
)
from contrastive.representation import Mirrored, Resized
from functions import ImageDataset, Subset, check

STAGES = (
    *("pretrain", "knn", "probe", "finetune"),
    *("tsne", "look", "explore", "certainty", "features"),
)
WITHOUT_LABELS = {"pretrain", "features"}
OPEN_FIRST = (
    *("explore.html", "few_labels.png", "finetuning.png", "certainty.png", "neighbours.png"),
    *("tsne.png", "confusion_matrix.png"),
)
# Which begin with the probe, or show what it says, or are drawn on the map.
WITH_PROBE = {"probe", "finetune", "look", "explore", "certainty"}
WITH_MAP = {"tsne", "look", "explore", "certainty"}
MEASURING = {"knn", "probe", "finetune"}  # which compare accuracies

# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------


@dataclass
class EvaluationSettings(CertaintySettings, FineTuningSettings, FewLabelsSettings, fn.RunConfig):
    """What to measure, and how."""

    names_of_data = ("dataset", "evaluate_on", "other_sets", "human_labels")

    title: ClassVar[str] = "evaluation"

    stages: str = "pretrain,knn,probe,tsne"
    """what to do, comma-separated: pretrain, knn, probe, finetune, tsne, look (neighbours,
    confusions, oddities), explore (a page for the browser), certainty, features (to take away)"""
    checkpoint: str | None = None
    """a run's folder, its encoder.pt or one of its checkpoints, for stages without pretrain"""
    evaluate_on: str | None = None
    """another data set or folder of images to measure on, instead of --dataset: what was learned
    is shown those images as large as its own"""
    validation_fraction: float = 0.0
    """share of the training images that is held out, and measured on instead of the test images:
    what chooses settings is not to see those"""
    evaluation_size: int | None = None
    """side in pixels to which images are brought for the encoder (their own unless given); what
    was trained on small crops may see larger images better"""
    recalibrate: bool = False
    """measure BatchNorm's statistics anew on training images as evaluation shows them, not
    augmented; pretraining then leaves that encoder"""
    baselines: bool = True
    """also measure raw pixels and the untrained encoder"""
    label_fraction: float = 1.0
    """share of each class's training labels that k-NN, probe and fine-tuning may use"""

    def validate(self) -> None:
        super().validate()
        size = self.evaluation_size
        fits = size is None or 4 <= size <= 1024
        check(fits, f"--evaluation_size must be between 4 and 1024 pixels, got {size}")
        self.require("evaluate_on", fn.UTF_8)
        needless = self.evaluate_on is not None and self.stages_list == ["pretrain"]
        check(not needless, "--evaluate_on is for stages after pretrain: add knn,probe to --stages")
        transfer = self.evaluate_on is not None and self.checkpoint is not None
        remedy = "leave it out, or give it to the run that pretrains"
        problem = f"--recalibrate measures on what was learned from, not on --evaluate_on: {remedy}"
        check(not (transfer and self.recalibrate), problem)
        of_h = {"finetune", "certainty"} & set(self.stages_list)
        for flag, is_h in {
            "probe_layer": self.probe_layer == 0,
            "probe_cells": self.probe_cells == 1,
            "ten_crops": not self.ten_crops,
        }.items():
            problem = f"--{flag} is not for {' and '.join(sorted(of_h))}, which take h"
            check(is_h or not of_h, f"{problem}: leave it out")
        one = self.left_out == [] or self.evaluate_on is None or "pretrain" not in self.stages_list
        problem = "--without_classes is about one set, and --evaluate_on names another"
        check(one, f"{problem}: leave one of them out, or pretrain first")
        test = self.human_labels is None or not self.validation_fraction
        check(test, "--human_labels are of the test images: leave --validation_fraction out")
        asks = self.human_labels is None or "certainty" in self.stages_list
        check(asks, "--human_labels are for the stage certainty: add it to --stages")
        self.require("label_fraction", fn.SHARE)
        self.require("validation_fraction", fn.BELOW_1)

        if "pretrain" in self.stages_list:
            remedy = "leave it out, or pretrain out of --stages"
            check(self.checkpoint is None, f"--checkpoint is for stages after pretrain: {remedy}")
        else:
            needed = f"--stages {self.stages} needs --checkpoint, a run's folder or encoder.pt"
            check(self.checkpoint is not None, needed)
            encoder_file(self.checkpoint or "", head=self.needs_head)

    @property
    def stages_list(self) -> list[str]:
        """The stages in the order they run. Raises UserError for an unknown one."""
        wanted = fn.listed(self.stages)
        unknown = ", ".join(repr(stage) for stage in wanted if stage not in STAGES)
        known = ",".join(STAGES)
        check(not unknown, f"--stages: unknown stage {unknown}; choose from {known}")
        return [stage for stage in STAGES if stage in wanted]

    @property
    def held_out(self) -> str:
        """What accuracies are measured on: the test images, or validation images."""
        return "validation" if self.validation_fraction else "test"

    @property
    def probes(self) -> bool:
        """Whether a stage needs the linear probe of all labels: fine-tuning with few of them begins
        with the probe of those."""
        few = {"finetune"} if self.label_amounts else set()
        return bool(WITH_PROBE & (set(self.stages_list) - few))

    @property
    def needs_head(self) -> bool:
        """Whether the head is to be loaded as well: certainty takes it where it was kept."""
        asks = "certainty" in self.stages_list and has_head(self.checkpoint or "")
        return self.probe_layer > 0 or asks

    @property
    def needs_labels(self) -> bool:
        """Whether a stage needs images with labels."""
        return bool(set(self.stages_list) - WITHOUT_LABELS)

    @property
    def measures(self) -> bool:
        """Whether a stage compares accuracies."""
        return bool(MEASURING & set(self.stages_list))

    @property
    def set_flag(self) -> str:
        """The flag that names the images to measure on."""
        return "--dataset" if self.evaluate_on is None else "--evaluate_on"


# ------------------------------------------------------------------------------------------------
# What is measured of one representation
# ------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """The accuracies of one representation on the test images; None where no stage asks."""

    knn: float | None = None
    probe: Probed | None = None
    finetuned: FineTuned | None = None
    few_labels: list[FewLabels] = field(default_factory=list)

    def accuracies(self) -> dict[str, float]:
        """{how: test accuracy} of what was measured."""
        found = {} if self.knn is None else {"k-NN": self.knn}
        for how, outcome in {"linear": self.probe, "fine-tuned": self.finetuned}.items():
            if outcome is not None:
                found[how] = outcome.test_accuracy
        return found

    def results(self) -> dict[str, Any]:
        """This part of results.json."""
        found: dict[str, Any] = {}
        if self.knn is not None:
            found["knn"] = {"accuracy": self.knn}
        if self.probe is not None:
            found["probe"] = self.probe.results()
        if self.finetuned is not None:
            found["finetune"] = self.finetuned.results()
        if self.few_labels:
            found["few_labels"] = [few.results() for few in self.few_labels]
        return found


@dataclass
class Tuning:
    """How one encoder is fine-tuned: on which images, and where what it leaves belongs.

    see: how it is shown images, uint8 (B, 3, H, W) -> float32. h: what it makes of them. scratch:
    it was not pretrained.
    """

    encoder: nn.Module
    see: nn.Module
    images: Labelled
    h: Features
    settings: EvaluationSettings
    folder: Path
    scratch: bool = False

    def run(self, probed: nn.Linear, name: str, keep: Path | None = None) -> FineTuned:
        """Fine-tune on all labelled images, of which `probed` is the linear probe."""

        def start(chosen: Tensor) -> Start:
            if self.scratch or len(chosen) == len(self.h.train):
                return Start(self.h.train, probed)
            # Some are to choose the epoch: what begins must not know them.
            part, fitted = self.h.labelled(chosen), copy.deepcopy(probed)
            probe(part, self.settings, fitted)
            return Start(part.train, fitted)

        where = self.folder / name
        what = self.encoder, self.see, self.images, start, self.settings, where
        return finetune(*what, scratch=self.scratch, keep=keep)

    def on(self, draw: Draw, probed: nn.Linear) -> tuple[float, int]:
        """(test accuracy, steps) with these labelled images alone, whose probe is the optimum."""
        few = replace(
            self,
            images=self.images.labelled(draw.chosen),
            h=self.h.labelled(draw.chosen),
            settings=replace(self.settings, seed=draw.seed, probe="lbfgs"),
        )
        found = few.run(probed, draw.name)
        return found.test_accuracy, found.steps


def measure(
    features: Features,
    settings: EvaluationSettings,
    classifier: nn.Linear | None = None,
    tuning: Tuning | None = None,
    keep: Path | None = None,
) -> Measured:
    """k-NN, linear probe and fine-tuning, as the stages ask, and the same with few labels.

    `classifier` is trained in place, so that it can be kept; unless given, it is a new one. What
    has no `tuning`, such as raw pixels, cannot be fine-tuned. keep: where its weights are left.
    """
    outcome, stages = Measured(), settings.stages_list
    classifier = classifier or nn.Linear(features.train.shape[1], len(features.classes))
    if "knn" in stages:
        outcome.knn = knn_accuracy(features, settings)
    if settings.probes:
        outcome.probe = probe(features, settings, classifier)
    few = None
    if "finetune" in stages and tuning is not None:
        if settings.label_amounts:  # all labels take the longest, and --label_fractions 1 asks
            few = tuning.on
        else:
            outcome.finetuned = tuning.run(classifier, "all-labels", keep)
    if settings.measures:
        outcome.few_labels = measure_few_labels(features, settings, few)
    return outcome


# ------------------------------------------------------------------------------------------------
# The stages after pretraining
# ------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """What was measured: {representation: its accuracies}, h of the pretrained encoder, and what
    there is to look at."""

    measured: dict[str, Measured]
    features: Features
    looked: Looked | None = None
    certainty: Certainty | None = None

    def results(self) -> dict[str, Any]:
        """This part of results.json."""
        *baselines, ours = self.measured
        found: dict[str, Any] = {}
        if baselines:
            found["baselines"] = {
                name.replace(" ", "_"): self.measured[name].results() for name in baselines
            }
        if self.certainty is not None:
            found["certainty"] = self.certainty.results()
        return found | self.measured[ours].results()


def evaluate(
    encoder: nn.Module,
    untrained: nn.Module,
    normalize: fn.Normalize,
    data: ImageDataset,
    settings: EvaluationSettings,
    folder: Path,
    asked: Asked | None = None,
) -> Evaluation:
    """Measure the encoder beside raw pixels and the untrained one; leaves classifier.pt.

    normalize: as the encoder's training images were. Features are computed once per encoder and
    shared by every evaluation. asked: where it is to say how sure it is.
    """
    images = labelled_images(data, settings)
    if "knn" in settings.stages_list:
        note_few_neighbours(images.train_labels, images.classes, settings.knn_k)
    measured: dict[str, Measured] = {}
    if settings.baselines and settings.measures:
        own = fn.Normalize(data.pretraining_images)
        measured = measure_baselines(untrained, own, images, settings, folder)

    see = nn.Sequential(Resized(settings.evaluation_size), normalize)
    h = features_of(nn.Sequential(see, encoder), images, settings)
    labelled = f"{len(h.train):,} labelled and {len(h.test):,} {settings.held_out} images"
    what = f" of {data.name}" if settings.evaluate_on else ""
    print(f"measuring the pretrained encoder on {labelled}{what}", flush=True)
    # The probe is trained on features, not through the encoder: the same, without running it anew
    # in every epoch. What is saved is the whole classifier, from images to logits.
    classifier = LinearClassifier(encoder.cpu(), h.train.shape[1], len(h.classes))
    tuning = Tuning(encoder, see, images, h, settings, folder / "finetuning")
    keep = folder / "finetuned.pt"
    ours = measure(h, settings, classifier.classifier, tuning, keep)
    if ours.probe is not None:
        fn.save_torch(folder / "classifier.pt", classifier.state_dict())
    measured["pretrained encoder"] = ours
    tell(measured, settings)
    looked = to_look_at(h, images, classifier.classifier, data) if settings.probes else None
    certainty = None
    if asked is not None:
        certainty = measure_certainty(asked, images.test, h, classifier.classifier, settings)
        figures.print_certainty(certainty, settings.held_out)
    return Evaluation(measured, h, looked, certainty)


def measure_baselines(
    untrained: nn.Module,
    normalize: fn.Normalize,
    images: Labelled,
    settings: EvaluationSettings,
    folder: Path,
) -> dict[str, Measured]:
    """What an accuracy is worth shows beside these two: an untrained network is no bad start,
    and on simple images pixels alone are hard to beat. normalize: by the set's own statistics."""
    print("measuring raw pixels and the untrained encoder", flush=True)
    compared = ",".join(stage for stage in settings.stages_list if stage in MEASURING)
    alike = replace(settings, stages=compared)  # what is only looked at needs no probe here
    pixels = features_of(nn.Sequential(normalize, nn.Flatten()), images, settings)
    see = nn.Sequential(Resized(settings.evaluation_size), normalize)
    h = features_of(nn.Sequential(see, untrained), images, settings)
    place = folder / "from-scratch"
    scratch = Tuning(untrained, see, images, h, settings, place, scratch=True)
    return {
        "raw pixels": measure(pixels, alike),
        UNTRAINED: measure(h, alike, None, scratch),
    }


def tell(measured: dict[str, Measured], settings: EvaluationSettings) -> None:
    """What the pretrained encoder reached, class by class, as soon as it is measured."""
    *_, ours = measured.values()
    if ours.probe is not None:
        train, test = fn.percent(ours.probe.train_accuracy), fn.percent(ours.probe.test_accuracy)
        print(f"linear probe: train {train}, {settings.held_out} {test}")
        fn.print_per_class(ours.probe.per_class)
    if ours.finetuned is not None:
        test = fn.percent(ours.finetuned.test_accuracy)
        print(f"fine-tuned in {ours.finetuned.steps:,} steps: {settings.held_out} {test}")
        fn.print_per_class(ours.finetuned.per_class)


@torch.no_grad()
def to_look_at(h: Features, images: Labelled, classifier: nn.Linear, data: ImageDataset) -> Looked:
    """What there is to look at, with what the trained probe says of the test images."""
    names = data.names("train")
    return Looked(
        train=images.train,
        test=images.test,
        h=h,
        probabilities=classifier(h.test).softmax(1),
        test_files=data.names("test"),
        train_files=[names[i] for i in images.train.chosen.tolist()],
    )


def few_labels(measured: dict[str, Measured]) -> dict[str, list[FewLabels]]:
    """{representation: what it reached with few labels}."""
    return {name: outcome.few_labels for name, outcome in measured.items()}


def labelled_images(data: ImageDataset, settings: EvaluationSettings) -> Labelled:
    """The labelled images of a set, --label_fraction of the training ones.

    Raises UserError for a set without labels.
    """
    train_images, train_labels, test_images, test_labels = data.labelled()
    chosen = fn.stratified_subset(train_labels, settings.label_fraction, settings.seed)
    return Labelled(
        train=Subset(train_images, chosen),
        train_labels=train_labels[chosen],
        test=test_images,
        test_labels=test_labels,
        classes=data.classes,
    )


def features_of(model: nn.Module, images: Labelled, settings: EvaluationSettings) -> Features:
    """What a model makes of the labelled images and, with --probe_mirror, of the training images'
    mirror images: uint8 (B, C, H, W) -> (B, D)."""
    train, test = (
        fn.extract_features(model, part, settings.machine) for part in (images.train, images.test)
    )
    mirrored = None
    if settings.probe_mirror:
        model = nn.Sequential(Mirrored(), model)
        mirrored = fn.extract_features(model, images.train, settings.machine)
    labels = images.train_labels, images.test_labels
    return Features(train, labels[0], test, labels[1], images.classes, settings.held_out, mirrored)


def draw(evaluation: Evaluation, settings: EvaluationSettings, folder: Path) -> None:
    """The figures of what was measured, and at last all accuracies at a glance, and what to open
    first. The numbers are to be saved before."""
    measured, h = evaluation.measured, evaluation.features
    *_, ours = measured.values()
    if ours.probe is not None:
        file, labels = folder / "confusion_matrix.png", h.test_labels
        fn.plot_confusion_matrix(ours.probe.predicted, labels, h.classes, file, "Linear probe")
        if ours.probe.curves:
            title = "Linear probe on the frozen representation"
            fn.plot_curves(
                {"probe": ours.probe.curves}, settings.held_out, folder / "probe.png", title
            )

    if ours.finetuned is not None:
        file, predicted = folder / "finetuned_confusion_matrix.png", ours.finetuned.predicted
        predictions = torch.tensor(predicted)
        fn.plot_confusion_matrix(predictions, h.test_labels, h.classes, file, "Fine-tuned")
        curves = {
            "fine-tuned" if outcome is ours else "from scratch": outcome.finetuned.rows
            for outcome in measured.values()
            if outcome.finetuned is not None
        }
        title = "Fine-tuning, and the same network from scratch"
        fn.plot_curves(curves, "validation", folder / "finetuning.png", title)
    if ours.few_labels:
        file, found = folder / "few_labels.png", few_labels(measured)
        figures.plot_few_labels(found, len(h.classes), settings.held_out, file)

    stages, seed = settings.stages_list, settings.seed
    points = figures.tsne_map(h.test, h.held_out, seed) if WITH_MAP & set(stages) else None
    if "tsne" in stages and points is not None:
        title = f"t-SNE of the {settings.held_out} images' representations"
        fn.plot_tsne(points, h.test_labels, h.classes, folder / "tsne.png", title)
    if "look" in stages and evaluation.looked is not None:
        look(evaluation.looked, points, seed, folder)
    if evaluation.certainty is not None and evaluation.looked is not None:
        figures.plot_certainty(evaluation.certainty, folder / "certainty.png")
        plot_surest(evaluation.looked, evaluation.certainty.values, folder / "surest.png")
        if points is not None:
            file = folder / "tsne_certainty.png"
            figures.plot_certain_map(points, evaluation.certainty, settings.held_out, file)
    if "explore" in stages and evaluation.looked is not None and points is not None:
        title = Path(settings.evaluate_on or settings.dataset).name
        sure = evaluation.certainty.values if evaluation.certainty else None
        explore(evaluation.looked, points, title, seed, folder / "explore.html", sure)
    if settings.measures:
        print_table(measured, settings.held_out)
    if ours.few_labels:
        print_few_labels(few_labels(measured), settings.held_out, settings.label_seeds)
    there = [str(folder / name) for name in OPEN_FIRST if (folder / name).is_file()]
    if there:
        print(f"to open first: {', '.join(there[:3])}")


def print_table(measured: dict[str, Measured], held_out: str) -> None:
    """The outcome at a glance: accuracy on the held-out images, a row per representation; nothing
    where few labels alone were asked for."""
    methods = list(dict.fromkeys(how for each in measured.values() for how in each.accuracies()))
    if not methods:
        return
    rows = [[f"{held_out} accuracy", *methods]]
    for name, outcome in measured.items():
        found = outcome.accuracies()
        rows.append([name, *(fn.percent(found[how]) if how in found else "" for how in methods)])
    print()
    fn.print_columns(rows)
    if "fine-tuned" in methods and len(measured) > 1:
        print(FROM_SCRATCH)
    print()
