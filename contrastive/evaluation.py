"""What did it learn? Section 4 and Appendix B: k-NN and linear probe on the frozen h."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functions as fn
from contrastive import figures
from contrastive.pretrained import encoder_file
from functions import Batches, ImageDataset, Subset, check

STAGES = ("pretrain", "knn", "probe", "tsne")

# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------


@dataclass
class ProbeSettings(fn.Settings):
    """How the classes are read off the features."""

    title: ClassVar[str] = "k-NN and linear probe"

    knn_k: int = 200
    """neighbours that vote in k-NN"""
    knn_temperature: float = 0.1
    """tau of the votes' weights in k-NN"""
    probe: Literal["sgd", "lbfgs"] = "sgd"
    """how the linear probe is trained: step by step with curves, or to the optimum of logistic
    regression, its penalty chosen on a fifth of the labelled training images"""
    probe_epochs: int = 100
    """epochs of the linear probe"""
    probe_batch_size: int = 512
    """images per batch of the linear probe"""
    probe_learning_rate: float = 0.03
    """of the linear probe's SGD, decayed by a cosine; the features are standardised"""
    probe_layer: int = 0
    """what is measured: 0 is h, 1 what the first layer of the head makes of it, and so on: as many
    as --head_layers is z (Section 4.2)"""

    def validate(self) -> None:
        super().validate()
        self.require("knn_k probe_epochs", fn.at_least(1))
        self.require("probe_layer", fn.NOT_NEGATIVE)
        self.require("probe_batch_size", fn.at_least(2))
        self.require("knn_temperature probe_learning_rate", fn.POSITIVE)


@dataclass
class EvaluationSettings(ProbeSettings, fn.RunConfig):
    """What to measure, and how."""

    title: ClassVar[str] = "evaluation"

    stages: str = "pretrain,knn,probe,tsne"
    """what to do, comma-separated: pretrain, knn, probe, tsne"""
    checkpoint: str | None = None
    """a run's folder, its encoder.pt or one of its checkpoints, for stages without pretrain"""
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
    """share of each class's training labels that k-NN and probe may use"""
    labels_per_class: int | str | None = None
    """besides, how far a few labels get: one number per class, or several, as 1,2,10"""
    label_seeds: int = 10
    """how often --labels_per_class draws which images have a label"""

    def validate(self) -> None:
        super().validate()
        self.require("label_seeds", fn.at_least(1))
        size = self.evaluation_size
        fits = size is None or 4 <= size <= 1024
        check(fits, f"--evaluation_size must be between 4 and 1024 pixels, got {size}")
        self.require("label_fraction", fn.SHARE)
        self.require("validation_fraction", fn.BELOW_1)
        _ = self.label_counts

        if "pretrain" in self.stages_list:
            remedy = "leave it out, or pretrain out of --stages"
            check(self.checkpoint is None, f"--checkpoint is for stages after pretrain: {remedy}")
        else:
            needed = f"--stages {self.stages} needs --checkpoint, a run's folder or encoder.pt"
            check(self.checkpoint is not None, needed)
            encoder_file(self.checkpoint or "", head=self.probe_layer > 0)

    @property
    def stages_list(self) -> list[str]:
        """The stages in the order they run. Raises UserError for an unknown one."""
        wanted = [stage.strip() for stage in self.stages.split(",")]
        unknown = ", ".join(repr(stage) for stage in wanted if stage not in STAGES)
        known = ",".join(STAGES)
        check(not unknown, f"--stages: unknown stage {unknown}; choose from {known}")
        return [stage for stage in STAGES if stage in wanted]

    @property
    def label_counts(self) -> list[int]:
        """--labels_per_class as numbers, the fewest first. Raises UserError."""
        if self.labels_per_class is None:
            return []
        words = str(self.labels_per_class).split(",")
        valid = all(word.strip().isdecimal() and int(word) > 0 for word in words)
        remedy = "give numbers of at least 1, as 1,2,10"
        check(valid, f"--labels_per_class {self.labels_per_class}: {remedy}")
        return sorted({int(word) for word in words})

    @property
    def held_out(self) -> str:
        """What accuracies are measured on: the test images, or validation images."""
        return "validation" if self.validation_fraction else "test"

    @property
    def measures(self) -> bool:
        """Whether a stage compares accuracies."""
        return bool({"knn", "probe"} & set(self.stages_list))


# ------------------------------------------------------------------------------------------------
# The encoder as it is measured
# ------------------------------------------------------------------------------------------------


class Resized(nn.Module):
    """Images at --evaluation_size: uint8, or float32 in [0, 1], (B, C, H, W) -> float32 in [0, 1]
    (B, C, side, side), bilinear; None leaves them as they are."""

    def __init__(self, side: int | None) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        if self.side is None or images.shape[-1] == self.side:
            return images
        x = images / 255 if images.dtype == torch.uint8 else images
        size = self.side, self.side
        return F.interpolate(x, size, mode="bilinear", antialias=True)


def recalibrate(
    encoder: nn.Module,
    normalize: fn.Normalize,
    images: Tensor,
    settings: EvaluationSettings,
    most: int = 10_000,
) -> None:
    """Measure BatchNorm's running statistics anew, in place, on up to `most` of the images.

    uint8 (N, C, H, W). Training has left a moving average over augmented crops, and over an encoder
    that was still changing. Evaluation shows it whole images (Touvron et al. 2019, arXiv
    1906.06423, Section 4: what changes with the size of the objects in a picture).
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings.seed))
    chosen = order[:most]  # in random order: a batch of one class alone has statistics of its own
    batches = Batches(Subset(images, chosen), batch_size=min(500, len(chosen)), drop_last=True)
    machine = settings.machine
    fn.prepare_device(machine)
    model = nn.Sequential(Resized(settings.evaluation_size), normalize, encoder).to(machine.device)
    with machine.autocast():
        torch.optim.swa_utils.update_bn(batches, model, torch.device(machine.device))
    model.cpu()


def up_to_layer(encoder: nn.Module, head: nn.Sequential, layer: int) -> nn.Module:
    """h itself for layer 0, or what so many linear layers of the head make of it.

    Images (B, 3, H, W) -> (B, D). A hidden layer is taken after its normalisation and ReLU. Raises
    UserError for more layers than there are.
    """
    if layer == 0:
        return encoder
    linear = [place for place, part in enumerate(head) if isinstance(part, nn.Linear)]
    most = f"the head has {len(linear)} layers, take at most as many"
    check(layer <= len(linear), f"--probe_layer {layer}: {most}")
    end = [*linear, len(head)][layer]  # where the next one stands, or the head's end
    return nn.Sequential(encoder, *head[:end])


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
        self, model: nn.Linear, train: Batches, test: Batches, settings: EvaluationSettings
    ) -> None:
        super().__init__(model, train, test, held_out=settings.held_out)
        self.learning_rate = settings.probe_learning_rate
        self.epochs = settings.probe_epochs

    def configure_optimizers(self) -> Any:
        parameters, steps = self.model.parameters(), self.epochs * len(self.train_batches)
        optimizer = torch.optim.SGD(parameters, lr=self.learning_rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


@dataclass
class Features:
    """What one encoder makes of the labelled images.

    train, test: h, float32 (N, D); their labels int64 (N,).
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    def labelled(self, chosen: Tensor) -> Features:
        """The same with these training images alone, indices int64 (M,)."""
        train, labels = self.train[chosen], self.train_labels[chosen]
        return replace(self, train=train, train_labels=labels)


def train_probe(
    classifier: nn.Linear, features: Features, settings: EvaluationSettings
) -> list[dict[str, float]]:
    """Train `classifier` in place on features.train, as --probe says; returns its curves.

    sgd: --probe_epochs epochs in batches of --probe_batch_size, momentum 0.9, a learning rate of
    --probe_learning_rate that falls along a cosine, no weight decay. lbfgs: the optimum of
    logistic regression with the penalty of `best_penalty`; it has no curves.

    The features are standardised for the training, and the scaling is then folded into the
    classifier's weights: still a linear classifier of h, but one learning rate suits every
    encoder. The test curve chooses nothing.
    """
    std, mean = torch.std_mean(features.train, dim=0)
    std = torch.where(std > 1e-6, std, torch.inf)  # a constant feature gets the weight 0
    scaled = replace(
        features, train=(features.train - mean) / std, test=(features.test - mean) / std
    )

    curves: list[dict[str, float]] = []  # L-BFGS has no epochs to draw
    if settings.probe == "lbfgs":
        linear = logistic_regression(scaled, best_penalty(scaled, settings.seed))
    else:
        torch.manual_seed(settings.seed)
        linear = nn.Linear(scaled.train.shape[1], len(features.classes))
        curves = train_by_sgd(linear, scaled, settings)

    # w (h - mean) / std + b = (w / std) h + (b - (w / std) mean)
    with torch.no_grad():
        weight = linear.weight / std
        classifier.weight.copy_(weight)
        classifier.bias.copy_(linear.bias - weight @ mean.to(weight.dtype))
    return curves


def train_by_sgd(
    linear: nn.Linear, features: Features, settings: EvaluationSettings
) -> list[dict[str, float]]:
    """Train `linear` in place on features.train; returns an EpochLog's rows."""
    train = Batches(
        features.train,
        features.train_labels,
        batch_size=min(settings.probe_batch_size, len(features.train)),
        seed=settings.seed,
    )
    test = Batches(features.test, features.test_labels, batch_size=5000)
    epochs = settings.probe_epochs

    log = fn.EpochLog(quiet=True)
    rate = "--probe_learning_rate"
    trainer = fn.make_trainer(settings.machine, settings.seed, epochs, log, rate=rate)
    fn.fit(trainer, Probe(linear, train, test, settings))
    linear.cpu()
    return log.rows


PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01)


def best_penalty(features: Features, seed: int) -> float:
    """The C of PENALTIES that suits these features: chosen on a fifth of the training images.

    The smaller C, the smaller the weights. An encoder that was trained briefly has features that a
    probe can learn by heart: there it is worth a point of accuracy. The test images have no say. A
    class of fewer than 100 labels is too small to choose by, and C is scikit-learn's 1.
    """
    if features.train_labels.bincount().min() < 100:
        return PENALTIES[0]
    held_out = fn.stratified_subset(features.train_labels, 0.2, seed)
    part = features.labelled(fn.complement(held_out, len(features.train)))
    unseen, labels = features.train[held_out], features.train_labels[held_out]

    def accuracy(penalty: float) -> float:
        linear = logistic_regression(part, penalty)
        with torch.no_grad():
            return fn.accuracy(linear(unseen.to(linear.weight.dtype)).argmax(1), labels)

    return max(PENALTIES, key=accuracy)


def logistic_regression(features: Features, penalty: float) -> nn.Linear:
    """The optimum on features.train, found by L-BFGS. penalty: scikit-learn's C."""
    from sklearn.linear_model import LogisticRegression

    optimum = LogisticRegression(C=penalty, max_iter=1000)
    optimum.fit(features.train.numpy(), features.train_labels.numpy())
    weight, bias = torch.from_numpy(optimum.coef_), torch.from_numpy(optimum.intercept_)
    if len(features.classes) == 2:  # scikit-learn then keeps one row: the logit of the second class
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2

    linear = nn.Linear(weight.shape[1], len(weight), dtype=weight.dtype)
    linear.load_state_dict({"weight": weight, "bias": bias})
    return linear


# ------------------------------------------------------------------------------------------------
# What is measured of one representation
# ------------------------------------------------------------------------------------------------


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


@dataclass
class FewLabels:
    """Test accuracies with a few labels per class, one for each draw of which images have them."""

    labels_per_class: int
    knn_accuracies: list[float]
    probe_accuracies: list[float]


@dataclass
class Measured:
    """The accuracies of one representation on the test images; None where no stage asks."""

    knn: float | None = None
    probe: Probed | None = None
    few_labels: list[FewLabels] = field(default_factory=list)

    def accuracies(self) -> dict[str, float]:
        """{how: test accuracy} of what was measured."""
        found = {} if self.knn is None else {"k-NN": self.knn}
        return found if self.probe is None else found | {"linear": self.probe.test_accuracy}

    def results(self) -> dict[str, Any]:
        """This part of results.json."""
        found: dict[str, Any] = {}
        if self.knn is not None:
            found["knn"] = {"accuracy": self.knn}
        if self.probe is not None:
            found["probe"] = self.probe.results()
        if self.few_labels:
            found["few_labels"] = [vars(few) for few in self.few_labels]
        return found


def mean_and_deviation(accuracies: Sequence[float]) -> str:
    """Accuracies for people: their mean and, if there are several, standard deviation."""
    mean = 100 * statistics.mean(accuracies)
    if len(accuracies) == 1:
        return f"{mean:.1f} %"
    return f"{mean:.1f} ± {100 * statistics.stdev(accuracies):.1f} %"


def measure(
    features: Features, settings: EvaluationSettings, classifier: nn.Linear | None = None
) -> Measured:
    """k-NN and linear probe of one set of features, as the stages and --labels_per_class ask.

    `classifier` is trained in place, so that it can be kept; unless given, it is a new one.
    """
    outcome = Measured()
    if "knn" in settings.stages_list:
        outcome.knn = knn_accuracy(features, settings)
    if "probe" in settings.stages_list:
        outcome.probe = probe(features, settings, classifier)
    if settings.measures:
        outcome.few_labels = measure_few_labels(features, settings)
    return outcome


def knn_accuracy(features: Features, settings: EvaluationSettings, k: int | None = None) -> float:
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


def probe(
    features: Features, settings: EvaluationSettings, classifier: nn.Linear | None = None
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


def measure_few_labels(features: Features, settings: EvaluationSettings) -> list[FewLabels]:
    """k-NN and probe for each of --labels_per_class, over --label_seeds draws.

    The probe is the optimum of logistic regression here, whatever --probe says: with so few
    images it takes no time. A neighbour can have no more than all its class's labels, so k is at
    most that.
    """
    found = []
    optimum = replace(settings, probe="lbfgs")
    for count in settings.label_counts:
        few = FewLabels(count, [], [])
        for draw in range(settings.label_seeds):
            seed = settings.seed + draw  # the same draws for every encoder: a paired comparison
            chosen = fn.per_class_subset(features.train_labels, count, seed)
            part = features.labelled(chosen)
            k = min(settings.knn_k, count)
            few.knn_accuracies.append(knn_accuracy(part, settings, k))
            few.probe_accuracies.append(probe(part, optimum).test_accuracy)
        found.append(few)
    return found


# ------------------------------------------------------------------------------------------------
# The stages after pretraining
# ------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """What was measured: {representation: its accuracies}, and h of the pretrained encoder."""

    measured: dict[str, Measured]
    features: Features

    def results(self) -> dict[str, Any]:
        """This part of results.json."""
        *baselines, ours = self.measured
        found: dict[str, Any] = {}
        if baselines:
            found["baselines"] = {
                name.replace(" ", "_"): self.measured[name].results() for name in baselines
            }
        return found | self.measured[ours].results()


def evaluate(
    encoder: nn.Module,
    untrained: nn.Module,
    normalize: fn.Normalize,
    data: ImageDataset,
    settings: EvaluationSettings,
    folder: Path,
) -> Evaluation:
    """Measure the encoder beside raw pixels and the untrained one; leaves classifier.pt.

    normalize: as the encoder's training images were. Features are computed once per encoder and
    shared by every evaluation.
    """
    measured: dict[str, Measured] = {}
    resize = Resized(settings.evaluation_size)

    # What an accuracy is worth shows beside these two: an untrained ResNet is no bad start, and
    # on simple images the pixels alone are hard to beat.
    if settings.baselines and settings.measures:
        print("measuring raw pixels and the untrained encoder", flush=True)
        own = fn.Normalize(data.pretraining_images)
        pixels = nn.Sequential(own, nn.Flatten())
        random = nn.Sequential(resize, own, untrained)
        for name, baseline in {"raw pixels": pixels, "untrained encoder": random}.items():
            features = features_of(baseline, data, settings)
            measured[name] = measure(features, settings)

    h = features_of(nn.Sequential(resize, normalize, encoder), data, settings)
    labelled = f"{len(h.train):,} labelled and {len(h.test):,} {settings.held_out} images"
    print(f"measuring the pretrained encoder on {labelled}", flush=True)
    # The probe is trained on features, not through the encoder: the same, without running it anew
    # in every epoch. What is saved is the whole classifier, from images to logits.
    classifier = LinearClassifier(encoder.cpu(), h.train.shape[1], len(h.classes))
    ours = measured["pretrained encoder"] = measure(h, settings, classifier.classifier)
    if ours.probe is not None:
        fn.save_torch(folder / "classifier.pt", classifier.state_dict())
        train, test = fn.percent(ours.probe.train_accuracy), fn.percent(ours.probe.test_accuracy)
        print(f"linear probe: train {train}, {settings.held_out} {test}")
        fn.print_per_class(ours.probe.per_class)
    if settings.measures:
        print_table(measured, settings.held_out)
    if ours.few_labels:
        print_few_labels(few_labels(measured), settings)
    return Evaluation(measured, h)


def few_labels(measured: dict[str, Measured]) -> dict[str, list[FewLabels]]:
    """{representation: what it reached with few labels}."""
    return {name: outcome.few_labels for name, outcome in measured.items()}


def features_of(model: nn.Module, data: ImageDataset, settings: EvaluationSettings) -> Features:
    """What a model makes of the labelled images, --label_fraction of the training ones.

    uint8 (B, C, H, W) -> (B, D). Raises UserError for a set without labels.
    """
    train_images, train_labels, test_images, test_labels = data.labelled()
    chosen = fn.stratified_subset(train_labels, settings.label_fraction, settings.seed)
    return Features(
        train=fn.extract_features(model, Subset(train_images, chosen), settings.machine),
        train_labels=train_labels[chosen],
        test=fn.extract_features(model, test_images, settings.machine),
        test_labels=test_labels,
        classes=data.classes,
    )


def draw(evaluation: Evaluation, settings: EvaluationSettings, folder: Path) -> None:
    """The figures of what was measured. The numbers are to be saved before."""
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

    if ours.few_labels:
        curves = {
            name: {
                "k-NN": {each.labels_per_class: each.knn_accuracies for each in found},
                "linear probe": {each.labels_per_class: each.probe_accuracies for each in found},
            }
            for name, found in few_labels(measured).items()
        }
        figures.plot_few_labels(curves, folder / "few_labels.png")
    if "tsne" in settings.stages_list:
        figures.show_tsne(h.test, h.test_labels, h.classes, settings.seed, folder / "tsne.png")


def print_table(measured: dict[str, Measured], held_out: str) -> None:
    """The outcome at a glance: accuracy on the held-out images, a row per representation."""
    methods = list(next(iter(measured.values())).accuracies())
    rows = [[f"{held_out} accuracy", *methods]]
    for name, outcome in measured.items():
        rows.append([name, *map(fn.percent, outcome.accuracies().values())])
    print()
    fn.print_columns(rows)
    print()


def print_few_labels(few: dict[str, list[FewLabels]], settings: EvaluationSettings) -> None:
    """Accuracies with few labels: a row for each number of labels per class."""
    representations = [name.split()[0] for name in few]  # raw, untrained, pretrained
    rows = [
        ["labels", *(name for name in representations for _ in ("k-NN", "linear"))],
        ["per class", *("k-NN", "linear") * len(representations)],
    ]
    for same_count in zip(*few.values(), strict=True):
        row = [str(same_count[0].labels_per_class)]
        for found in same_count:
            row.append(mean_and_deviation(found.knn_accuracies))
            row.append(mean_and_deviation(found.probe_accuracies))
        rows.append(row)
    what, draws = f"{settings.held_out} accuracy", f"{settings.label_seeds} draws of the labels"
    print(f"  {what}, mean ± standard deviation of {draws}:\n")
    fn.print_columns(rows)
    print()
