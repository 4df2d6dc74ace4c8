"""Which images are learned from, which are measured on, and beside which others."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

import functions as fn
from contrastive.certainty import MOST, CertaintySettings
from contrastive.evaluation import EvaluationSettings
from contrastive.pretrained import content, image_side
from functions import ImageDataset, Subset, UserError, check

SettingsT = TypeVar("SettingsT", bound=EvaluationSettings)


@dataclass
class Sets:
    """The images to learn from, and those to measure on: the same set without --evaluate_on."""

    learned: ImageDataset
    measured: ImageDataset
    others: dict[str, Tensor] = field(default_factory=dict)
    people: Tensor | None = None

    @property
    def differ(self) -> bool:
        return self.learned is not self.measured

    def description(self, file: Path | None = None) -> dict[str, Any]:
        """What a run notes of them, to tell whether it is resumed on the same, and with the same
        encoder. file: the encoder's, where it was trained before."""
        found = self.learned.description()
        if self.differ:
            found["evaluate_on"] = self.measured.description()
        if file:
            found["files"] = {"checkpoint": content(file)}
        return found

    def ready(self, settings: EvaluationSettings) -> Sets:
        """The same as they are used: with validation images in the place of the test images if
        --validation_fraction says so, and without some classes. Raises UserError for what cannot be
        measured on."""
        learned, measured = self.learned, self.measured
        if settings.validation_fraction:
            measured = fn.hold_out(measured, settings.validation_fraction)
        unseen = None
        if settings.left_out:
            hidden = measured.unlabelled_images is None or "pretrain" not in settings.stages_list
            problem = f"--without_classes: unlabelled images of {measured.name} may show them"
            check(hidden, f"{problem}: leave it out, or pretrain out of --stages")
            measured, unseen = fn.leave_out(measured, settings.left_out, settings.set_flag)
            rest = f"{len(measured.classes)} classes are left"
            print(f"without {', '.join(settings.left_out)}: {rest}")
        learned = learned if self.differ else measured
        if not settings.needs_labels:
            return Sets(learned, measured)
        _, labels, _, test_labels = measured.labelled(settings.set_flag)
        labels = labels[fn.stratified_subset(labels, settings.label_fraction, settings.seed)]
        for amount in settings.label_amounts:
            amount.check(labels, measured.classes)
        if "certainty" not in settings.stages_list:
            return Sets(learned, measured)
        least, name = min(zip(labels.bincount().tolist(), measured.classes, strict=False))
        problem = f"{settings.set_flag} {measured.name}: {name} has {least} labelled training image"
        check(least > 1, f"{problem}, where certainty needs two of each class")
        others = load_others(settings, self.measured)
        if unseen is not None:
            others = {"classes left out": some_of(unseen, settings.seed), **others}
        people = load_people(settings, test_labels, len(measured.classes))
        return Sets(learned, measured, others, people)


def load_sets(settings: EvaluationSettings, file: Path | None = None) -> Sets:
    """The sets that the stages need: --dataset, and --evaluate_on where that is another one.

    file: of the encoder, where it was trained before. A folder that is measured on is read as large
    as the encoder is shown it. Raises UserError.
    """
    where, size, other = settings.data_dir, settings.image_size, settings.evaluate_on
    learned, side = None, image_side(file) if file else None
    if other is None or "pretrain" in settings.stages_list:
        learned = fn.load_dataset(settings.dataset, where, size)
        side = learned.train_images.shape[-1]
        if other is None:
            return Sets(learned, learned)
    shown = settings.evaluation_size or side or 32
    measured = fn.load_dataset(other, where, size, folder_size=shown, flag="--evaluate_on")
    if learned is None or measured.fingerprint == learned.fingerprint:
        return Sets(measured, measured)
    return Sets(learned, measured)


def at_learned_size(settings: SettingsT, sets: Sets, file: Path | None) -> SettingsT:
    """The settings with --evaluation_size as the encoder's own images had it, for another set's.

    file: the encoder's, where it was trained before.
    """
    if settings.evaluate_on is None or settings.evaluation_size is not None:
        return settings
    side = image_side(file) if file else sets.learned.train_images.shape[-1]
    return replace(settings, evaluation_size=side)


def as_shown(
    settings: EvaluationSettings, normalize: fn.Normalize, data: ImageDataset
) -> dict[str, Any]:
    """How the encoder was shown the images that it is measured on, for results.json: whoever uses
    what a run leaves is to show it theirs in the same way."""
    other: dict[str, Any] = (
        {} if settings.evaluate_on is None else {"evaluated_on": settings.evaluate_on}
    )
    if settings.left_out:
        other["classes"] = list(data.classes)
    shown = {
        "size": settings.evaluation_size or data.train_images.shape[-1],
        "normalize": normalize.record(),
    }
    if settings.ten_crops:
        shown["ten_crops"] = True
    return {**other, "shown": shown}


# ------------------------------------------------------------------------------------------------
# Beside what certainty is measured
# ------------------------------------------------------------------------------------------------


def some_of(images: Tensor | Subset, seed: int) -> Tensor:
    """Up to MOST of them, uint8 (N, 3, H, W)."""
    draw = torch.Generator().manual_seed(seed)
    return images[torch.randperm(len(images), generator=draw)[:MOST]]


def load_others(settings: CertaintySettings, measured: ImageDataset) -> dict[str, Tensor]:
    """{set: up to MOST of its images, uint8 (N, 3, H, W), as large as those measured on} of
    --other_sets, but for the one that is measured on. Raises UserError."""
    found: dict[str, Tensor] = {}
    size = measured.train_images.shape[-1]
    draw = torch.Generator().manual_seed(settings.seed)
    for name in fn.listed(settings.other_sets):
        if name == "noise":
            shape = (MOST, 3, size, size)
            found[name] = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
            continue
        data = fn.load_dataset(name, settings.data_dir, size, flag="--other_sets")
        if data.fingerprint == measured.fingerprint:
            print(f"--other_sets {name}: that is what is measured on, and no other set")
            continue
        images = data.train_images if data.test_images is None else data.test_images
        found[name] = some_of(images, settings.seed)
    return found


def load_people(settings: CertaintySettings, labels: Tensor, classes: int) -> Tensor | None:
    """What people answered, float32 (N, classes), each row to sum to 1. labels: int64 (N,), of the
    images that they were shown. Raises UserError."""
    if settings.human_labels is None:
        return None
    flag = f"--human_labels {settings.human_labels}"
    try:
        answers = np.load(settings.human_labels, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise UserError(f"{flag} is no file of numbers .npy: take another") from None
    check(isinstance(answers, np.ndarray), f"{flag} holds several arrays: save one as .npy")
    shape, fits = (len(labels), classes), answers.dtype.kind in "fiu"
    problem = f"{flag} is {answers.dtype} {answers.shape}, where the test images need {shape}"
    check(fits and answers.shape == shape, f"{problem}: one row for each, in their order")
    people = torch.from_numpy(answers.astype(np.float32))
    valid = bool(people.isfinite().all() and (people >= 0).all() and (people.sum(1) > 0).all())
    check(valid, f"{flag} has rows without an answer, or negative ones: take shares or counts")
    # People mostly agree with the labels; with rows in another order they would not.
    agree = fn.accuracy(people.argmax(1), labels)
    problem = f"{flag} agrees with the labels of only {fn.percent(agree)} of the test images"
    check(agree >= 0.5, f"{problem}: bring its rows into the order of their files")
    return people / people.sum(1, keepdim=True)
