"""Fine-tuning: the whole encoder learns on, with labels. Appendix B.5 and B.8."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

import functions as fn
from contrastive.probe import take_in
from functions import Batches, Subset

ENOUGH = 100  # labels of each class, of which a tenth can choose an epoch


@dataclass
class FineTuningSettings(fn.LongRun):
    """How the encoder learns on with labels."""

    title: ClassVar[str] = "fine-tuning"

    finetune_epochs: int = 30
    """passes over the labelled images (the paper: 30 with a tenth of ImageNet's labels, 60 with a
    hundredth)"""
    finetune_steps: int = 300
    """steps at least: few labels are passed over more often"""
    finetune_batch_size: int = 256
    """images per batch of fine-tuning"""
    finetune_learning_rate: float = 0.05
    """of fine-tuning, for a batch of 256; it follows the batch, and falls along a cosine"""
    finetune_encoder_rate: float = 0.1
    """share of it with which the pretrained encoder learns (the paper: 1)"""
    finetune_head: Literal["linear", "mlp"] = "linear"
    """what classifies h: a linear layer, which begins as the linear probe, or one with a hidden
    layer as wide as h before it"""
    finetune_flip: float | None = None
    """probability of a horizontal flip in fine-tuning (as in pretraining unless given): 0 where
    left and right matter"""

    def validate(self) -> None:
        super().validate()
        self.require("finetune_epochs finetune_steps", fn.at_least(1))
        self.require("finetune_batch_size", fn.at_least(2))
        self.require("finetune_learning_rate", fn.POSITIVE)
        self.require("finetune_encoder_rate", fn.SHARE)
        self.require("finetune_flip", fn.PROBABILITY)


@dataclass
class Labelled:
    """Images to fine-tune on, and those to test on once.

    train, test: uint8 (N, 3, H, W); their labels int64 (N,).
    """

    train: Subset
    train_labels: Tensor
    test: Tensor | Subset
    test_labels: Tensor
    classes: tuple[str, ...]

    def labelled(self, chosen: Tensor) -> Labelled:
        """The same with these training images alone, indices int64 (M,)."""
        train, labels = Subset(self.train, chosen), self.train_labels[chosen]
        return replace(self, train=train, train_labels=labels)


class FineTuning(fn.Classification):
    """images -> logits through an encoder that learns on: SGD with Nesterov momentum.

    see: how the encoder is shown images, uint8 (B, 3, H, W) -> float32. No weight decay, crops and
    flips alone (Appendix B.5); crops are shifts by up to an eighth of the side, as is usual for
    small images. pretrained: BatchNorm keeps the statistics that pretraining has left.
    """

    def __init__(
        self,
        model: nn.Module,
        see: nn.Module,
        parts: tuple[Batches, Batches],
        rates: tuple[float, float],
        total_steps: int,
        flip: float,
        pretrained: bool = True,
    ) -> None:
        super().__init__(model, *parts)
        self.see = see
        self.rates = rates  # of the classifier, of the encoder
        self.total_steps = total_steps
        self.flip = flip
        self.pretrained = pretrained

    def on_train_epoch_start(self) -> None:
        if self.pretrained:
            # The statistics of a batch of ten labelled images would spoil those of thousands, and
            # what the classifier was fitted to would be gone at the first step.
            for part in self.model.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.see(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        images, labels = batch
        images = fn.random_crop_and_flip(images, images.shape[-1] // 8, self.flip)
        return self._step((images, labels))

    def configure_optimizers(self) -> Any:
        parts = (self.model.get_submodule(name) for name in ("classifier", "encoder"))
        groups = [
            {"params": list(part.parameters()), "lr": rate}
            for part, rate in zip(parts, self.rates, strict=True)
        ]
        optimizer = torch.optim.SGD(groups, lr=self.rates[0], momentum=0.9, nesterov=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.total_steps)
        return fn.every_step(optimizer, schedule)


@dataclass
class FineTuned:
    """What fine-tuning reached; all but `predicted` and `rows` go to results.json.

    best_epoch: the one that a tenth of the labelled images chose; None where they are too few to
    choose by, and the last one is taken. predicted: classes of the test images. rows: of its
    epochs.
    """

    test_accuracy: float
    per_class: dict[str, float | None]
    labels: int
    epochs: int
    steps: int
    best_epoch: int | None
    predicted: list[int]
    rows: list[dict[str, float]]

    def results(self) -> dict[str, Any]:
        """This part of results.json."""
        return {k: v for k, v in vars(self).items() if k not in ("predicted", "rows")}


class Standardize(nn.Module):
    """h (B, D) -> (h - mean) / std, as measured on features (N, D).

    h is positive and long. A classifier would mostly learn its mean, and at a usual rate learn more
    than there is to learn.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", features.mean(0))
        std = features.std(0)
        least = 0.1 * float(std.mean()) or 1.0  # all alike they become 0
        self.register_buffer("std", std.clamp_min(least))

    def forward(self, h: Tensor) -> Tensor:
        return (h - self.mean) / self.std


@dataclass
class Start:
    """What a fine-tuning begins with: h of the images it is trained on, float32 (N, D), and the
    classifier that was fitted to them."""

    h: Tensor
    classifier: nn.Linear


def network(encoder: nn.Module, start: Start, kind: str, scratch: bool) -> nn.Sequential:
    """Images (B, 3, H, W) -> logits (B, classes): a copy of the encoder, and what classifies its h:
    a linear layer, or as --finetune_head says. h is standardised unless all begins from scratch."""
    linear = copy.deepcopy(start.classifier).float()
    width, classes = linear.in_features, linear.out_features
    parts = OrderedDict(encoder=copy.deepcopy(encoder), classifier=linear)
    if scratch:
        parts["classifier"] = linear = nn.Linear(width, classes)
    else:
        standardize = Standardize(start.h)
        take_in(linear, -standardize.mean / standardize.std, 1 / standardize.std)
        parts = OrderedDict(encoder=parts["encoder"], standardize=standardize, classifier=linear)
    if kind == "mlp":
        hidden = nn.Linear(width, width), nn.ReLU(inplace=True)
        parts["classifier"] = nn.Sequential(*hidden, nn.Linear(width, classes))
    return nn.Sequential(parts).train().requires_grad_(True)  # a probe may have frozen the encoder


def plain(model: nn.Sequential) -> nn.Sequential:
    """The same network of an encoder and a classifier alone, which takes h as it is."""
    parts = OrderedDict(copy.deepcopy(model).named_children())
    standardize: Any = parts.pop("standardize", None)
    if standardize is not None:
        head: Any = parts["classifier"]
        first = head if isinstance(head, nn.Linear) else head[0]
        take_in(first, standardize.mean, standardize.std)
    return nn.Sequential(parts)


def finetune(
    encoder: nn.Module,
    see: nn.Module,
    images: Labelled,
    start: Callable[[Tensor], Start],
    settings: FineTuningSettings,
    folder: Path,
    *,
    scratch: bool = False,
    keep: Path | None = None,
) -> FineTuned:
    """Train a copy of `encoder`, images (B, 3, H, W) -> h (B, D), and a classifier, with labels.

    see: how the encoder is shown images, uint8 (B, 3, H, W) -> float32. start: the classifier to
    begin with, fitted to the labelled images of these indices, int64 (M,): the linear probe, so
    that the first steps do not spoil the encoder to make up for a classifier that knows nothing
    (Kumar et al. 2022, arXiv 2202.10054). It does not see the images that choose the epoch.
    scratch: the encoder knows nothing either, and learns with the whole rate, beside a new
    classifier. keep: where the weights are to be left, with keys encoder.* and classifier.*.

    What it did is noted in `folder`: an interrupted one goes on, a finished one is not repeated.
    """
    outcome, checkpoints = folder / "outcome.json", folder / "checkpoints"
    if outcome.is_file():
        shutil.rmtree(checkpoints, ignore_errors=True)  # of a process that was killed just then
        return FineTuned(**json.loads(outcome.read_text("utf-8")))

    folder.mkdir(parents=True, exist_ok=True)
    chosen, held_out = split(images, settings.seed)
    begin = start(chosen)
    torch.manual_seed(settings.seed)
    model = network(encoder, begin, settings.finetune_head, scratch)
    train, validation = batches(images, chosen, held_out, settings)
    epochs = max(settings.finetune_epochs, math.ceil(settings.finetune_steps / len(train)))
    rate = settings.finetune_learning_rate * train.batch_size / 256
    rates = rate, (rate if scratch else rate * settings.finetune_encoder_rate)
    parts = train, validation or train
    total, flip = epochs * len(train), settings.finetune_flip or 0.0
    module = FineTuning(model, see, parts, rates, total, flip, pretrained=not scratch)

    log = fn.EpochLog(folder / "metrics.csv", quiet=keep is None)
    best = "validation_accuracy" if validation else None
    kept = fn.Checkpoints(checkpoints, log, best, settings.checkpoint_every)
    what = settings.machine, settings.seed, epochs, log
    rate_flag, most = "--finetune_learning_rate", settings.max_time
    # A network that is trained already has steep directions: one step too far, and all is lost.
    choosing: dict[str, Any] = {} if scratch else {"gradient_clip_val": 1.0}
    choosing |= {} if validation else {"limit_val_batches": 0}
    trainer = fn.make_trainer(*what, checkpoint=kept, rate=rate_flag, max_time=most, **choosing)
    fn.fit(trainer, module, checkpoints / "last.ckpt")
    if kept.best_weights is not None:
        module.load_state_dict(kept.best_weights)

    found = tested(module, images, log.rows, settings.machine, best)
    if keep is not None:
        state = plain(model).state_dict()
        fn.save_torch(keep, {name: value.cpu() for name, value in state.items()})
    fn.write_atomically(outcome, json.dumps(vars(found)).encode())
    shutil.rmtree(checkpoints)  # a hundred megabytes, of which all that matters is kept
    return found


def split(images: Labelled, seed: int) -> tuple[Tensor, Tensor]:
    """(which labelled images are trained on, which choose the epoch): indices int64.

    A stratified tenth chooses where every class has at least ENOUGH labels; elsewhere all are
    trained on, and there is no choice.
    """
    labels = images.train_labels
    if int(labels.bincount(minlength=len(images.classes)).min()) >= ENOUGH:
        return fn.stratified_split(labels, 0.1, seed)
    return torch.arange(len(labels)), torch.arange(0)


def batches(
    images: Labelled, chosen: Tensor, held_out: Tensor, settings: FineTuningSettings
) -> tuple[Batches, Batches | None]:
    """(batches to train on, batches to choose the epoch by, if any), of these labelled images."""
    part = images.labelled(chosen)
    size = min(settings.finetune_batch_size, len(chosen))
    train = Batches(
        part.train,
        part.train_labels,
        batch_size=size,
        seed=settings.seed,
        drop_last=len(chosen) % size == 1,  # BatchNorm cannot normalise a single image
    )
    if len(held_out) == 0:
        return train, None
    part = images.labelled(held_out)
    return train, Batches(part.train, part.train_labels, batch_size=500)


def tested(
    module: FineTuning,
    images: Labelled,
    rows: list[dict[str, float]],
    machine: fn.Machine,
    best: str | None,
) -> FineTuned:
    """What a fine-tuned network makes of the test images, which it sees once."""
    predicted = fn.extract_features(module, images.test, machine).argmax(1)
    epoch = int(max(rows, key=lambda row: row[best])["epoch"]) if best else None
    return FineTuned(
        test_accuracy=fn.accuracy(predicted, images.test_labels),
        per_class=fn.accuracy_per_class(predicted, images.test_labels, images.classes),
        labels=len(images.train_labels),
        epochs=len(rows),
        steps=len(rows) * len(module.train_batches),
        best_epoch=epoch,
        predicted=predicted.tolist(),
        rows=rows,
    )
