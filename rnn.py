"""Images as sequences: classify an image by reading its rows with a recurrent network.

A 32 x 32 colour image is a sequence of 32 steps of 96 numbers: row r is its red, then green, then
blue pixels. Compared are the plain RNN (Elman 1990), the LSTM (Hochreiter & Schmidhuber 1997) and
the GRU (Cho et al. 2014).

    python rnn.py                                     # CIFAR-10, plain RNN, 100 epochs
    python rnn.py --cell all                          # RNN, LSTM and GRU in one figure
    python rnn.py --dataset digits --epochs 30        # no download, well under a minute
    python rnn.py --config runs/.../best_config.yaml  # what rnn_hyperparameter_tune.py found
    python rnn.py --resume                            # continue the newest run

Measured (results/rnn): in 100 epochs the RNN reaches 51.1 %, the LSTM 57.9 % and the GRU 61.5 % of
CIFAR-10's test images (JPEG copy); configs/rnn_best.yaml goes further.

What can be set stands beside what it sets: Network and Training. Config, after them, is both.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

import functions as fn
from functions import Batches, EpochLog, ImageDataset, Subset, check, random_crop_and_flip

CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}

# ------------------------------------------------------------------------------------------------
# Data: rows as time steps
# ------------------------------------------------------------------------------------------------


def rows_as_sequence(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, C * W): step r is row r of red, then of green, then of blue."""
    return images.permute(0, 2, 1, 3).flatten(2)


@dataclass
class Splits:
    """What one training needs: uint8 images (N, C, H, W) and int64 labels (N,) of each split."""

    train: tuple[Tensor | Subset, Tensor]
    validation: tuple[Tensor | Subset, Tensor]
    test: tuple[Tensor, Tensor]
    classes: tuple[str, ...]


def split(data: ImageDataset, fraction: float, seed: int) -> Splits:
    """Hold out a stratified `fraction` of the training images for validation.

    Raises UserError where that leaves a class without training images.
    """
    images, labels, test_images, test_labels = data.labelled()
    # The test images stay unseen: what chooses an epoch or a learning rate is this split.
    kept, held_out = fn.stratified_split(labels, fraction, seed)

    seen = set(labels[kept].tolist())
    lost = ", ".join(name for i, name in enumerate(data.classes) if i not in seen)
    problem = f"--dataset {data.name} with --validation_fraction {fraction}"
    remedy = "hold out less, or take more images"
    check(not lost, f"{problem} leaves nothing to train on of {lost}: {remedy}")
    return Splits(
        train=(Subset(images, kept), labels[kept]),
        validation=(Subset(images, held_out), labels[held_out]),
        test=(test_images, test_labels),
        classes=data.classes,
    )


# ------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------


@dataclass
class Network(fn.Settings):
    """The recurrent layers, and what classifies their states."""

    title: ClassVar[str] = "network"

    cell: Literal["rnn", "lstm", "gru", "all"] = "rnn"
    """kind of recurrent layer; all trains the three in turn and compares them"""
    hidden_size: int = 256
    """width of the recurrent state"""
    num_layers: int = 1
    """recurrent layers, one upon the other"""
    l2: int = 64
    """width of the head's first hidden layer"""
    l3: int = 64
    """width of the head's second hidden layer"""
    bidirectional: bool = False
    """read the rows from the bottom up too, with a network of its own"""
    dropout: float = 0.0
    """share of the outputs dropped between one recurrent layer and the next"""
    pooling: Literal["last", "mean", "attention"] = "last"
    """what the head sees: the state after the last row, the mean of all rows' states, or their
    weighted mean"""

    def validate(self) -> None:
        super().validate()
        self.require("hidden_size num_layers l2 l3", fn.at_least(1))
        self.require("dropout", fn.BELOW_1)
        remedy = "take --num_layers 2 or more, or leave it out"
        check(
            self.dropout == 0 or self.num_layers > 1,
            f"--dropout {self.dropout} is between recurrent layers: {remedy}",
        )


def hidden_layer(inputs: int, width: int) -> list[nn.Module]:
    return [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5)]


class SimpleRNN(nn.Module):
    """A recurrent layer (or several) whose states, pooled over the rows, a small network reads.

    Sequences (B, steps, input_size) -> logits (B, num_classes). `cell` is rnn, lstm or gru; l2 and
    l3 are the widths of the head's two hidden layers, each Linear - BatchNorm - ReLU -
    Dropout(0.5). Raises KeyError for an unknown cell, ValueError for an unknown pooling.

    `bidirectional` (Schuster & Paliwal 1997) reads upwards too. `dropout` acts between layers.
    `pooling` is last, mean or attention, where a learned score says how much each row's state
    counts (after Yang et al. 2016, Eq. 5 to 7).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        num_classes: int,
        l2: int,
        l3: int,
        cell: str = "rnn",
        bidirectional: bool = False,
        dropout: float = 0.0,
        pooling: str = "last",
    ) -> None:
        super().__init__()
        self.recurrent = CELLS[cell](
            input_size,
            hidden_size,
            num_layers,
            batch_first=True,
            dropout=dropout,
            bidirectional=bidirectional,
        )
        width = 2 * hidden_size if bidirectional else hidden_size
        self.head = nn.Sequential(
            *hidden_layer(width, l2), *hidden_layer(l2, l3), nn.Linear(l3, num_classes)
        )
        if pooling not in ("last", "mean", "attention"):
            raise ValueError(f"pooling must be last, mean or attention, got {pooling}")
        self.pooling = pooling
        if pooling == "attention":
            self.attention = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.states(x)))

    def states(self, x: Tensor) -> Tensor:
        """The top layer's state after each row: (B, steps, input_size) -> (B, steps, width)."""
        device = x.device.type
        # On CPUs without AVX-512 oneDNN has no LSTM in bfloat16 and would stop. On CUDA, PyTorch
        # gives cuDNN's recurrent layers float16 under any autocast, whatever it was asked for.
        lacking = device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        in_float32 = (lacking and isinstance(self.recurrent, nn.LSTM)) or device == "cuda"
        context = torch.autocast(device, enabled=False) if in_float32 else contextlib.nullcontext()
        with context:
            outputs, _ = self.recurrent(x)
        return outputs

    def after_each_row(self, x: Tensor) -> Tensor:
        """What it makes of the first row alone, of the first two, and so on.

        (B, steps, input_size) -> logits (B, steps, num_classes).
        """
        steps = range(1, x.shape[1] + 1)
        if self.recurrent.bidirectional:  # upwards, a sequence that is cut off begins elsewhere
            return torch.stack([self(x[:, :k]) for k in steps], 1)
        states = self.states(x)
        return torch.stack([self.head(self.pool(states[:, :k])) for k in steps], 1)

    def pool(self, states: Tensor) -> Tensor:
        """One state for the whole image: (B, steps, width) -> (B, width)."""
        if self.pooling == "mean":
            return states.mean(1)
        if self.pooling == "attention":
            weights = self.attention(states).softmax(1)  # (B, steps, 1), of sum 1
            return (weights * states).sum(1)
        if not self.recurrent.bidirectional:
            return states[:, -1]  # after the last row it has seen the whole image
        downwards, upwards = states.chunk(2, 2)
        return torch.cat([downwards[:, -1], upwards[:, 0]], 1)  # upwards, the first row is last


def build_model(
    network: Network, cell: str, images: Tensor | Subset, num_classes: int, seed: int
) -> SimpleRNN:
    """The network that the settings describe, for images (N, C, H, W), with weights of `seed`."""
    torch.manual_seed(seed)
    return SimpleRNN(
        input_size=images.shape[1] * images.shape[3],
        hidden_size=network.hidden_size,
        num_layers=network.num_layers,
        num_classes=num_classes,
        l2=network.l2,
        l3=network.l3,
        cell=cell,
        bidirectional=network.bidirectional,
        dropout=network.dropout,
        pooling=network.pooling,
    )


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


@dataclass
class Training(fn.LongRun):
    """How the network learns."""

    title: ClassVar[str] = "training"

    epochs: int = 100
    """passes over the training images"""
    batch_size: int = 64
    """images per step"""
    learning_rate: float = 0.00022
    """of Adam: at the start, or the highest of one_cycle"""
    weight_decay: float = 0.00052
    """L2 penalty, added to the gradient as Adam does"""
    schedule: Literal["plateau", "one_cycle"] = "plateau"
    """the learning rate falls when the validation loss no longer does, or rises for
    --warmup_epochs and then falls to nothing along a cosine"""
    patience: int = 10
    """of plateau: after more epochs than these without a lower validation loss, the learning rate
    falls to a tenth"""
    warmup_epochs: int = 0
    """of one_cycle: epochs in which the learning rate rises"""
    gradient_clip: float = 0.0
    """largest norm of a step's gradient, which is scaled down to it; 0 leaves it as it is"""
    label_smoothing: float = 0.0
    """share of each training label that is spread over all classes"""
    crop_padding: int = 0
    """each time an image is seen in training, it is shifted by up to so many pixels in each
    direction"""
    flip: float | bool = 0.0
    """probability of a horizontal flip in training (true: 0.5)"""
    validation_fraction: float = 0.1
    """share of each class's training images held out, to choose the epoch and the learning rate's
    fall"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """float32, or bfloat16 autocast: faster for LSTM and GRU on CPUs that compute in it (on CUDA
    recurrent layers stay in float32)"""

    def __post_init__(self) -> None:
        if isinstance(self.flip, bool):  # a switch once, and so it stands in older configurations
            self.flip = 0.5 if self.flip else 0.0

    @property
    def may_grow(self) -> tuple[str, ...]:
        """On a plateau the rate falls however many epochs there are; one cycle spans them all."""
        return ("epochs",) if self.schedule == "plateau" else ()

    def validate(self) -> None:
        super().validate()
        self.require("epochs", fn.at_least(1))
        batch = self.batch_size
        needs = "BatchNorm needs two images"
        check(batch >= 2, f"--batch_size must be at least 2 ({needs}), got {batch}")
        self.require("learning_rate", fn.POSITIVE)
        self.require("weight_decay patience warmup_epochs crop_padding", fn.NOT_NEGATIVE)
        self.require("gradient_clip", fn.NOT_NEGATIVE)
        self.require("label_smoothing", fn.BELOW_1)
        self.require("flip", fn.PROBABILITY)
        self.require("validation_fraction", fn.PART)

        warmup = f"--warmup_epochs {self.warmup_epochs}"
        one_cycle = self.warmup_epochs == 0 or self.schedule == "one_cycle"
        check(one_cycle, f"{warmup} needs --schedule one_cycle")
        shorter = self.warmup_epochs < self.epochs
        check(shorter, f"{warmup} must be below --epochs {self.epochs}")


@dataclass
class Config(Training, Network, fn.RunConfig):
    """All settings. RunConfig stands last so that a config.yaml begins with the data set."""

    script: ClassVar[str] = "rnn.py"
    unsuited: ClassVar[tuple[str, ...]] = ("mps",)  # where a GRU's many small steps are slow


def check_data(splits: Splits, config: Config) -> None:
    """Check what the settings ask of the images. Raises UserError."""
    images = splits.train[0]
    n, side = len(images), min(images.shape[2:])
    problem = f"--batch_size {config.batch_size} is above the {n:,} training images"
    check(config.batch_size <= n, f"{problem}: take at most {n}")
    problem = f"--crop_padding {config.crop_padding} is wider than the images"
    check(config.crop_padding <= side, f"{problem}: take at most {side}")


class RowClassification(fn.Classification):
    """Trains a SimpleRNN on uint8 images with Adam, as the settings say."""

    model: SimpleRNN

    def __init__(self, model: SimpleRNN, splits: Splits, config: Training) -> None:
        images, labels = splits.train
        train = Batches(
            images,
            labels,
            batch_size=config.batch_size,
            seed=config.seed,
            # BatchNorm cannot normalise a last batch of one image.
            drop_last=len(images) % config.batch_size == 1,
        )
        validation = Batches(*splits.validation, batch_size=1000)
        super().__init__(model, train, validation, held_out="validation")
        self.config = config
        self.normalize = fn.Normalize(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(rows_as_sequence(self.normalize(images)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        images, labels = batch
        images = random_crop_and_flip(images, self.config.crop_padding, self.config.flip)
        return self._step((images, labels), self.config.label_smoothing)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        if self.config.gradient_clip:  # Lightning's own refuses fused optimizers in bfloat16
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)

    def configure_optimizers(self) -> Any:
        config = self.config
        optimizer = torch.optim.Adam(
            self.model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            # A fused step takes off float16's scale itself: too late for the gradient's norm.
            fused=not (config.gradient_clip and config.precision == "fp16"),
        )
        if config.schedule == "one_cycle":  # after Smith & Topin 2019, along cosines
            steps = config.epochs * len(self.train_batches)
            warmup = config.warmup_epochs * len(self.train_batches)
            cycle = torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                config.learning_rate,
                total_steps=steps,
                # PyTorch divides by the steps of the warm-up less one.
                pct_start=warmup / steps if warmup > 1 else 0.0,
                cycle_momentum=False,
            )
            return fn.every_step(optimizer, cycle)

        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.1, patience=config.patience
        )
        # Lightning would step it after the epoch's checkpoint is written, and a resumed run would
        # miss that step. So Lightning's turn never comes: on_validation_epoch_end takes it.
        never = {"monitor": "validation_loss", "frequency": sys.maxsize}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, **never}}

    def on_validation_epoch_end(self) -> None:
        schedule: Any = self.lr_schedulers()
        if self.config.schedule == "plateau":
            schedule.step(self.trainer.callback_metrics["validation_loss"])


@dataclass
class Trained:
    """A trained network, and the rows of its epochs."""

    module: RowClassification
    rows: list[dict[str, float]]


def train(
    config: Config,
    cell: str,
    splits: Splits,
    folder: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> Trained:
    """Train one network.

    With a folder, metrics and checkpoints are kept there, an interrupted training goes on, and the
    weights are those of the epoch with the best validation accuracy. Without one, they are the
    last epoch's.
    """
    model = build_model(config, cell, splits.train[0], len(splits.classes), config.seed)
    module = RowClassification(model, splits, config)
    if folder is None:
        log = EpochLog(quiet=True)
        trainer = fn.make_trainer(config.machine, config.seed, config.epochs, log, callbacks)
        fn.fit(trainer, module)
        return Trained(module, log.rows)

    log = EpochLog(folder / "metrics.csv")
    every = config.checkpoint_every
    checkpoint = fn.Checkpoints(folder / "checkpoints", log, "validation_accuracy", every)
    trainer = fn.make_trainer(
        config.machine,
        config.seed,
        config.epochs,
        log,
        callbacks,
        folder=folder,
        checkpoint=checkpoint,
        max_time=config.max_time,
    )
    fn.fit(trainer, module, folder / "checkpoints" / "last.ckpt")
    assert checkpoint.best_weights is not None
    module.load_state_dict(checkpoint.best_weights)  # the last epoch's are often worse
    return Trained(module, log.rows)


# ------------------------------------------------------------------------------------------------
# What does it look at?
# ------------------------------------------------------------------------------------------------


class EachRow(nn.Module):
    """A trained RowClassification, read after each row: uint8 (B, C, H, W) -> (B, H, classes)."""

    def __init__(self, module: RowClassification) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        return self.module.model.after_each_row(rows_as_sequence(self.module.normalize(images)))


def accuracy_by_rows(
    module: RowClassification, images: Tensor, labels: Tensor, machine: fn.Machine
) -> list[float]:
    """Accuracy when an image's first k rows alone are read, for k = 1 ... H.

    images: uint8 (N, C, H, W), labels: int64 (N,). The head has learned from whole images only;
    the last accuracy is theirs.
    """
    logits = fn.extract_features(EachRow(module), images, machine)
    return [fn.accuracy(predictions, labels) for predictions in logits.argmax(2).unbind(1)]


def gradient_by_row(
    module: RowClassification, images: Tensor, labels: Tensor, machine: fn.Machine
) -> list[float]:
    """How much each row matters to the loss: the norm of its gradient, as shares of 1.

    images: uint8 (N, C, H, W), labels: int64 (N,); norms are averaged over the images. In a
    network that reads downwards and hands on its last state alone, the gradient comes to the first
    rows through all later steps: it vanishes where the cell forgets (Bengio, Simard & Frasconi
    1994). Pooling gives every row a way of its own.
    """
    device = "cpu" if machine.device == "mps" else machine.device  # untested there, in eval mode
    total = torch.zeros(images.shape[2])
    module.eval().to(device)
    for some_images, some_labels in Batches(images, labels, batch_size=500):
        rows = rows_as_sequence(module.normalize(some_images.to(device))).requires_grad_()
        with torch.backends.cudnn.flags(enabled=False):  # which goes backwards in training only
            loss = F.cross_entropy(module.model(rows), some_labels.to(device), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, rows)  # (B, H, C * W)
        total += gradient.norm(dim=2).sum(0).cpu()
    module.cpu()
    return (total / total.sum().clamp_min(1e-30)).tolist()  # all 0 where no gradient comes through


# ------------------------------------------------------------------------------------------------
# What one cell reached
# ------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What one kind of cell reached; the first ten fields go to results.json.

    predictions: classes of the test images, int64 (N,). rows: of its epochs.
    """

    best_epoch: int
    train_accuracy: float
    validation_accuracy: float
    test_accuracy: float
    per_class: dict[str, float | None]
    accuracy_by_rows: list[float]
    gradient_by_row: list[float]
    parameters: int
    seconds: float
    images_per_second: float
    predictions: Tensor
    rows: list[dict[str, float]]

    def results(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("predictions", "rows")}


def run_cell(config: Config, cell: str, splits: Splits, folder: Path) -> Outcome:
    """Train one kind of cell, and test its best epoch once."""
    trained = train(config, cell, splits, folder)
    module, rows, machine = trained.module, trained.rows, config.machine
    best = max(rows, key=lambda row: row["validation_accuracy"])  # the first, if several are equal

    # Without dropout and augmentation, unlike the training accuracy of the curves.
    train_images, train_labels = splits.train
    train_predictions = fn.extract_features(module, train_images, machine).argmax(1)
    images, labels = splits.test
    predictions = fn.extract_features(module, images, machine).argmax(1)  # the test images, once

    outcome = Outcome(
        best_epoch=int(best["epoch"]),
        train_accuracy=fn.accuracy(train_predictions, train_labels),
        validation_accuracy=best["validation_accuracy"],
        test_accuracy=fn.accuracy(predictions, labels),
        per_class=fn.accuracy_per_class(predictions, labels, splits.classes),
        accuracy_by_rows=accuracy_by_rows(module, images, labels, machine),
        gradient_by_row=gradient_by_row(module, images, labels, machine),
        parameters=sum(p.numel() for p in module.model.parameters()),
        seconds=round(sum(row["seconds"] for row in rows), 1),
        images_per_second=round(statistics.median(row["images_per_second"] for row in rows), 1),
        predictions=predictions,
        rows=rows,
    )
    print(
        f"{cell}: best epoch {outcome.best_epoch}, "
        f"validation {fn.percent(outcome.validation_accuracy)}, "
        f"test {fn.percent(outcome.test_accuracy)}; accuracy per class on the test images:"
    )
    fn.print_per_class(outcome.per_class)
    return outcome


@fn.drawing
def plot_rows(outcomes: dict[str, Outcome], classes: int, file: Path) -> None:
    """Accuracy over the rows read so far, and the rows' shares of the gradient; a colour a cell."""
    figure, (left, right) = fn.new_figure(10, 4, columns=2)
    height = len(next(iter(outcomes.values())).accuracy_by_rows)
    rows = range(1, height + 1)
    for name, outcome in outcomes.items():
        left.plot(rows, outcome.accuracy_by_rows, label=name.upper())
        right.plot(rows, outcome.gradient_by_row, label=name.upper())

    chance = {"color": "grey", "linestyle": ":"}
    left.axhline(1 / classes, label="left: chance\nright: equal shares", **chance)
    left.set(xlabel="rows read, from the top", ylabel="test accuracy")
    left.set(title="What it knows after the first rows")
    fn.of_accuracy(left)

    right.axhline(1 / height, **chance)
    right.set(xlabel="row", ylabel="share of the gradient", yscale="log")
    right.set(title="Which rows the loss depends on")
    shares = [share for outcome in outcomes.values() for share in outcome.gradient_by_row if share]
    low, high = (math.log10(bound(shares or [1.0])) for bound in (min, max))
    top = math.ceil(high)
    right.set_ylim(10 ** min(math.floor(low), top - 1), 10**top)
    right.yaxis.set_minor_formatter("")  # whole decades are labelled, and nothing between
    fn.in_percent(right)

    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    fn.save_figure(figure, file)


def print_table(outcomes: dict[str, Outcome]) -> None:
    """The outcome at a glance, a row per cell; the gap, of training and validation, in points."""
    rows = [("cell", "best epoch", "train", "validation", "gap", "test", "parameters", "time")]
    for name, r in outcomes.items():
        gap = f"{100 * (r.train_accuracy - r.validation_accuracy):.1f}"
        train, validation = fn.percent(r.train_accuracy), fn.percent(r.validation_accuracy)
        test, parameters = fn.percent(r.test_accuracy), f"{r.parameters:,}"
        time = fn.format_time(r.seconds)
        rows.append((name, str(r.best_epoch), train, validation, gap, test, parameters, time))
    print()
    fn.print_columns(rows, indent=0)
    print()


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    run = fn.Run(config)
    if run.is_finished():
        return
    data = fn.load_dataset(config.dataset, config.data_dir, config.image_size)
    run.is_about(data.description())
    splits = split(data, config.validation_fraction, config.seed)
    check_data(splits, config)

    _, channels, height, width = data.train_images.shape
    n, m, k = (f"{len(images):,}" for images, _ in (splits.train, splits.validation, splits.test))
    print(f"{data.name}: {n} training, {m} validation and {k} test images")
    print(f"each read as {height} rows of {channels * width} numbers; {config.machine}")

    cells = list(CELLS) if config.cell == "all" else [config.cell]
    with run.open() as folder:
        outcomes = {}
        for cell in cells:
            cell_folder = folder / cell if len(cells) > 1 else folder
            cell_folder.mkdir(exist_ok=True)
            print(f"training {cell}", flush=True)
            outcomes[cell] = run_cell(config, cell, splits, cell_folder)
        print_table(outcomes)
        # The numbers first: no figure is worth losing them.
        run.save(cells={cell: outcome.results() for cell, outcome in outcomes.items()})

        for cell, outcome in outcomes.items():
            cell_folder = folder / cell if len(cells) > 1 else folder
            file, title = cell_folder / "confusion_matrix.png", f"{cell.upper()}, test"
            labels = splits.test[1]
            fn.plot_confusion_matrix(outcome.predictions, labels, splits.classes, file, title)
        curves = {cell.upper(): outcome.rows for cell, outcome in outcomes.items()}
        title = f"Reading {Path(data.name).name} images row by row"
        fn.plot_curves(curves, "validation", folder / "curves.png", title)
        plot_rows(outcomes, len(splits.classes), folder / "rows.png")


if __name__ == "__main__":
    fn.command_line(main, Config, __doc__)
