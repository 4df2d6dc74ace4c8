"""k-NN and the linear probe: what can be read off frozen features. Section 4.2, Appendix B.6."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

import functions as fn
from functions import Batches, check


@dataclass
class ProbeSettings(fn.RunConfig):
    """How the classes are read off the features."""

    title: ClassVar[str] = "k-NN and linear probe"

    knn_k: int = 200
    """neighbours that vote in k-NN"""
    knn_temperature: float = 0.1
    """tau of the votes' weights in k-NN"""
    knn_every: int = 1
    """epochs of pretraining between k-NN checks, on training images whose labels it never sees"""
    probe: Literal["sgd", "lbfgs"] = "sgd"
    """how the linear probe is trained: step by step with curves, or to the optimum of logistic
    regression, its penalty chosen on labelled training images that are held out for it"""
    probe_epochs: int = 100
    """epochs of the linear probe"""
    probe_batch_size: int = 512
    """images per batch of the linear probe"""
    probe_learning_rate: float = 0.03
    """of the linear probe's SGD, decayed by a cosine; the features are standardised"""
    probe_layer: int = 0
    """what is measured, of the untrained encoder, too: 0 is h, 1 what the first layer of the head
    makes of it, and so on: as many as --head_layers is z (Section 4.2)"""
    probe_mirror: bool = False
    """whether the linear probe learns from the training images' mirror images, too: of the random
    crops and flips of the paper's probe (Appendix B.5, B.6), the flips; leave it out where left and
    right matter. Test images are never mirrored, and k-NN knows the originals alone"""
    probe_cells: int = 1
    """cells a side, over each of which the encoder's last map is averaged for what is measured: 1
    is h; 2 keeps where in an image things are, in four times as many numbers (Goyal et al. 2019)"""
    ten_crops: bool = False
    """what is measured is the mean over an image, its four corners, and the mirror images of these
    five (after Krizhevsky et al. 2012, Section 4.1), for eight to nine times the arithmetic; leave
    it out where left and right matter"""

    def validate(self) -> None:
        super().validate()
        self.require("knn_k knn_every probe_epochs", fn.at_least(1))
        self.require("probe_layer", fn.NOT_NEGATIVE)
        self.require("probe_cells", fn.at_least(1))
        both = self.probe_layer > 0 and self.probe_cells > 1
        check(not both, "--probe_layer is made of h, --probe_cells is not: leave one of them out")
        both = self.probe_cells > 1 and self.ten_crops
        problem = "--probe_cells keeps where things are, --ten_crops averages over it"
        check(not both, f"{problem}: leave one of them out")
        both = self.probe_mirror and self.ten_crops
        problem = "--probe_mirror: --ten_crops has the mirror images already"
        check(not both, f"{problem}, leave one of them out")
        self.require("probe_batch_size", fn.at_least(2))
        self.require("knn_temperature probe_learning_rate", fn.POSITIVE)


@dataclass
class Features:
    """What one encoder makes of the labelled images.

    train, test: h, float32 (N, D); their labels int64 (N,). held_out: what the latter are, test or
    validation images. mirrored: h of the training images' mirror images, from which the linear
    probe learns as well.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    held_out: str = "test"
    mirrored: Tensor | None = None

    def labelled(self, chosen: Tensor) -> Features:
        """The same with these training images alone, indices int64 (M,)."""
        train, labels = self.train[chosen], self.train_labels[chosen]
        mirrored = None if self.mirrored is None else self.mirrored[chosen]
        return replace(self, train=train, train_labels=labels, mirrored=mirrored)

    def to_learn_from(self) -> tuple[Tensor, Tensor]:
        """Of all that the probe learns from, the images and after them their mirror images: h
        (N, D) or (2N, D), and the labels."""
        if self.mirrored is None:
            return self.train, self.train_labels
        return torch.cat([self.train, self.mirrored]), self.train_labels.repeat(2)


# ------------------------------------------------------------------------------------------------
# k-NN
# ------------------------------------------------------------------------------------------------


def knn_accuracy(features: Features, settings: ProbeSettings, k: int | None = None) -> float:
    """The share of test images that their nearest training images classify rightly.

    k: --knn_k unless given.
    """
    # Of raw pixels it is teraflops: where the encoder ran, this runs too.
    bank, labels, queries = (
        part.to(settings.machine.device)
        for part in (features.train, features.train_labels, features.test)
    )
    k, temperature = k or settings.knn_k, settings.knn_temperature
    predicted = fn.knn_predict(queries, bank, labels, len(features.classes), k, temperature)
    return fn.accuracy(predicted.cpu(), features.test_labels)


def note_few_neighbours(labels: Tensor, classes: tuple[str, ...], k: int) -> None:
    """Say that k neighbours are more than a class has images, labels int64 (N,): whatever k-NN says
    of that class, most votes are other classes'."""
    least, name = min(zip(labels.bincount(minlength=len(classes)).tolist(), classes, strict=True))
    if k > least:
        problem = f"--knn_k {k}: {name} has only {least:,} labelled images"
        fn.note(f"{problem}, so others outvote it; try fewer neighbours, such as 5")


# ------------------------------------------------------------------------------------------------
# The linear probe
# ------------------------------------------------------------------------------------------------


class LinearClassifier(nn.Module):
    """images (B, 3, H, W) -> logits (B, num_classes) through a frozen encoder.

    Frozen: no gradient, and BatchNorm in eval mode. `classifier` is what the probe trains.
    """

    def __init__(self, encoder: nn.Module, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)  # the optimizer could not move it by mistake
        self.classifier = nn.Linear(feature_dim, num_classes)
        self.train(self.training)

    def train(self, mode: bool = True) -> LinearClassifier:
        super().train(mode)
        self.encoder.eval()  # BatchNorm would go on learning its statistics otherwise
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.encoder(x)
        return self.classifier(h)


class Probe(fn.Classification):
    """A linear classifier on features (B, D): SGD with momentum, and a cosine schedule."""

    def __init__(
        self,
        model: nn.Linear,
        train: Batches,
        test: Batches,
        settings: ProbeSettings,
        held_out: str = "test",
    ) -> None:
        super().__init__(model, train, test, held_out)
        self.learning_rate = settings.probe_learning_rate
        self.epochs = settings.probe_epochs

    def configure_optimizers(self) -> Any:
        parameters, steps = self.model.parameters(), self.epochs * len(self.train_batches)
        optimizer = torch.optim.SGD(parameters, lr=self.learning_rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return fn.every_step(optimizer, schedule)


def train_probe(
    classifier: nn.Linear, features: Features, settings: ProbeSettings
) -> list[dict[str, float]]:
    """Train `classifier` in place, as --probe says, on `features.to_learn_from()`; returns its
    curves.

    sgd: --probe_epochs epochs in batches of --probe_batch_size, momentum 0.9, a learning rate of
    --probe_learning_rate that falls along a cosine, no weight decay. lbfgs: the optimum of
    logistic regression with the penalty of `best_penalty`; it has no curves.

    The features are standardised for the training, and the scaling is then folded into the
    classifier's weights: still a linear classifier of h, but one learning rate suits every
    encoder. The test curve chooses nothing.
    """
    mean, std = standardization(features.to_learn_from()[0])
    mirrored = None if features.mirrored is None else (features.mirrored - mean) / std
    train, test = ((part - mean) / std for part in (features.train, features.test))
    scaled = replace(features, train=train, test=test, mirrored=mirrored)

    curves: list[dict[str, float]] = []  # L-BFGS has no epochs to draw
    if settings.probe == "lbfgs":
        linear = logistic_regression(scaled, best_penalty(scaled, settings.seed))
    else:
        torch.manual_seed(settings.seed)
        linear = nn.Linear(scaled.train.shape[1], len(features.classes))
        curves = train_by_sgd(linear, scaled, settings)

    take_in(linear, mean, std)
    with torch.no_grad():
        classifier.weight.copy_(linear.weight)
        classifier.bias.copy_(linear.bias)
    return curves


def standardization(features: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, std) of each feature, (N, D) -> (D,) each; a constant one is infinitely wide, so that
    it gets the weight 0."""
    std, mean = torch.std_mean(features, dim=0)
    return mean, torch.where(std > 1e-6, std, torch.inf)


@torch.no_grad()
def take_in(linear: nn.Linear, mean: Tensor, std: Tensor) -> None:
    """Let a layer of (h - mean) / std take h itself, in place; mean, std: (D,).

    w (h - mean) / std + b = (w / std) h + (b - (w / std) mean)
    """
    linear.weight.div_(std)
    linear.bias.sub_(linear.weight @ mean.to(linear.weight.dtype))


def train_by_sgd(
    linear: nn.Linear, features: Features, settings: ProbeSettings
) -> list[dict[str, float]]:
    """Train `linear` in place on `features.to_learn_from()`; returns an EpochLog's rows."""
    h, labels = features.to_learn_from()
    batch_size = min(settings.probe_batch_size, len(h))
    train = Batches(h, labels, batch_size=batch_size, seed=settings.seed)
    test = Batches(features.test, features.test_labels, batch_size=5000)
    epochs = settings.probe_epochs

    log = fn.EpochLog(quiet=True)
    rate = "--probe_learning_rate"
    trainer = fn.make_trainer(settings.machine, settings.seed, epochs, log, rate=rate)
    fn.fit(trainer, Probe(linear, train, test, settings, features.held_out))
    linear.cpu()
    return log.rows


PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
FOLDS = 5


def best_penalty(features: Features, seed: int) -> float:
    """The C of PENALTIES that suits these features: the test images have no say.

    The smaller C, the smaller the weights, so that a probe of few labels, or of an encoder that was
    trained briefly, does not learn by heart what says nothing of other images.

    A fifth of the images is held out to choose; their mirror images are neither learned from nor
    asked. With fewer than 100 labels of a class each fifth is, in turn, and of less than five
    labels each one. Classes of fewer than five have no say where others have more. With one label
    of each class there is nothing to choose by, and C is 0.01. What is compared is the likelihood
    of the held-out labels: among few images accuracy is too coarse. A hundred steps of L-BFGS for
    each C, which begins where the one before it ended, tell them apart.
    """
    from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit

    counts = features.train_labels.bincount()
    least = min(FOLDS, int(counts.max()))
    enough = counts >= least
    if least == 1 or int(enough.sum()) == 1:
        return 0.01
    part = features.labelled(enough[features.train_labels].nonzero().flatten())
    if int(counts[enough].min()) < 100:
        folds = StratifiedKFold(least, shuffle=True, random_state=seed)
    else:
        folds = StratifiedShuffleSplit(1, test_size=1 / FOLDS, random_state=seed)
    h, labels = (each.numpy() for each in part.to_learn_from())
    count = len(part.train)
    splits = [
        (np.concatenate([fitted + start for start in range(0, len(h), count)]), held_out)
        for fitted, held_out in folds.split(h[:count], labels[:count])
    ]

    scores = [likelihoods(h, labels, *split) for split in splits]
    return PENALTIES[int(np.mean(scores, axis=0).argmax())]


def likelihoods(
    h: np.ndarray, labels: np.ndarray, fitted: np.ndarray, held_out: np.ndarray
) -> list[float]:
    """For each C of PENALTIES the mean log-likelihood of the held-out labels.

    h: float (N, D), labels: int64 (N,), fitted and held_out: indices of them. What
    scikit-learn's LogisticRegressionCV computes, but in the precision of h: it makes float64 of it,
    which takes twice the memory and nearly twice the time.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    known, asked = (h[fitted], labels[fitted]), (h[held_out], labels[held_out])
    model = LogisticRegression(max_iter=100, warm_start=True)
    found = []
    with without_convergence_warnings():
        for penalty in PENALTIES:
            model.set_params(C=penalty).fit(*known)
            found.append(-log_loss(asked[1], model.predict_proba(asked[0]), labels=model.classes_))
    return found


@contextmanager
def without_convergence_warnings() -> Iterator[None]:
    """scikit-learn's warning that L-BFGS was stopped is a paragraph for each fit."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def logistic_regression(features: Features, penalty: float, steps: int = 1000) -> nn.Linear:
    """The optimum on `features.to_learn_from()`, found by L-BFGS. penalty: scikit-learn's C.

    Many raw pixels take more steps than that: what they have come to is taken, and a note says so.
    """
    from sklearn.linear_model import LogisticRegression

    optimum = LogisticRegression(C=penalty, max_iter=steps)
    h, labels = features.to_learn_from()
    with without_convergence_warnings():
        optimum.fit(h.numpy(), labels.numpy())
    if optimum.n_iter_.max() >= steps:
        width = features.train.shape[1]
        fn.note(f"the probe on {width:,} numbers an image was stopped after {steps:,} steps")
    weight, bias = torch.from_numpy(optimum.coef_), torch.from_numpy(optimum.intercept_)
    if len(features.classes) == 2:  # scikit-learn then keeps one row: the logit of the second class
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2

    linear = nn.Linear(weight.shape[1], len(weight), dtype=weight.dtype)
    linear.load_state_dict({"weight": weight, "bias": bias})
    return linear


@dataclass
class Probed:
    """What the linear probe reached. predicted: the classes of the test images, int64 (N,)."""

    train_accuracy: float
    test_accuracy: float
    per_class: dict[str, float | None]
    predicted: Tensor
    curves: list[dict[str, float]]

    def results(self) -> dict[str, Any]:
        names = ("train_accuracy", "test_accuracy", "per_class")
        return {name: getattr(self, name) for name in names}


def probe(
    features: Features, settings: ProbeSettings, classifier: nn.Linear | None = None
) -> Probed:
    """Train a linear probe and test it once."""
    classifier = classifier or nn.Linear(features.train.shape[1], len(features.classes))
    curves = train_probe(classifier, features, settings)
    with torch.no_grad():
        predicted_train = classifier(features.train).argmax(1)
        predicted = classifier(features.test).argmax(1)
    return Probed(
        train_accuracy=fn.accuracy(predicted_train, features.train_labels),
        test_accuracy=fn.accuracy(predicted, features.test_labels),
        per_class=fn.accuracy_per_class(predicted, features.test_labels, features.classes),
        predicted=predicted,
        curves=curves,
    )
