"""Images as sequences: classify an image by reading its rows, top to bottom, with a recurrent network.

A 32 x 32 colour image is a sequence of 32 steps of 96 numbers: row r is its red, then green, then blue pixels.
Compared are the plain RNN (Elman 1990), the LSTM (Hochreiter & Schmidhuber 1997) and the GRU (Cho et al. 2014).

    python rnn.py                                   # CIFAR-10, plain RNN, 100 epochs
    python rnn.py --cell all                        # RNN, LSTM and GRU in one figure
    python rnn.py --dataset digits --epochs 30      # no download, well under a minute
    python rnn.py --config runs/.../best_config.yaml  # what rnn_hyperparameter_tune.py found
    python rnn.py --resume                          # continue the newest run where it was interrupted

Measured (results/rnn): in 100 epochs the RNN reaches 51.1 %, the LSTM 57.9 % and the GRU 61.5 % of CIFAR-10's test
images (JPEG copy); configs/rnn_best.yaml goes further.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

import functions as fn
from functions import Batches, EpochLog, ImageDataset, RunConfig, check

CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}

# ------------------------------------------------------------------------------------------------
# Configuration: every field is a flag
# ------------------------------------------------------------------------------------------------


@dataclass
class Config(RunConfig):
    """Settings of the recurrent network and its training."""

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
    """what the head sees: the state after the last row, the mean of all rows' states, or their weighted mean"""

    epochs: int = 100
    """passes over the training images"""
    batch_size: int = 64
    """images per step"""
    learning_rate: float = 0.00022
    """of Adam: at the start, or the highest of one_cycle"""
    weight_decay: float = 0.00052
    """L2 penalty, added to the gradient as Adam does"""
    schedule: Literal["plateau", "one_cycle"] = "plateau"
    """the learning rate falls when the validation loss no longer does, or rises for --warmup_epochs and then falls to
    nothing along a cosine"""
    patience: int = 10
    """of plateau: epochs without a lower validation loss that are borne; at the next, the learning rate falls to a
    tenth"""
    warmup_epochs: int = 0
    """of one_cycle: epochs in which the learning rate rises"""
    gradient_clip: float = 0.0
    """largest norm of a step's gradient, which is scaled down to it; 0 leaves it as it is"""
    label_smoothing: float = 0.0
    """share of each training label that is spread over all classes"""
    crop_padding: int = 0
    """each time an image is seen in training, it is shifted by up to so many pixels in each direction"""
    flip: bool = False
    """each time an image is seen in training, it is mirrored left to right or not, with equal probability"""
    validation_fraction: float = 0.1
    """share of each class's training images held out, to choose the epoch and the learning rate's fall"""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """float32, or bfloat16 autocast: faster for LSTM and GRU on CPUs that compute in it"""
    max_time: str | None = None
    """end after the last epoch that fits into DD:HH:MM:SS (one at least), to go on later with --resume"""

    @property
    def may_grow(self) -> tuple[str, ...]:
        """On a plateau the learning rate falls however many epochs there are; one cycle spans them all."""
        return ("epochs",) if self.schedule == "plateau" else ()

    def validate(self) -> None:
        super().validate()
        for flag in ("hidden_size", "num_layers", "l2", "l3", "epochs"):
            check(getattr(self, flag) >= 1, f"--{flag} must be at least 1, got {getattr(self, flag)}")
        check(
            self.batch_size >= 2, f"--batch_size must be at least 2 (BatchNorm needs two images), got {self.batch_size}"
        )
        check(0 < self.learning_rate < math.inf, f"--learning_rate must be a positive number, got {self.learning_rate}")
        check(0 <= self.weight_decay < math.inf, f"--weight_decay must be 0 or more, got {self.weight_decay}")
        check(self.patience >= 0, f"--patience must be 0 or more, got {self.patience}")
        for flag in ("warmup_epochs", "crop_padding", "gradient_clip"):
            value = getattr(self, flag)
            check(0 <= value < math.inf, f"--{flag} must be 0 or more, got {value}")
        for flag in ("dropout", "label_smoothing"):
            check(0 <= getattr(self, flag) < 1, f"--{flag} must be at least 0 and below 1, got {getattr(self, flag)}")
        check(
            self.dropout == 0 or self.num_layers > 1,
            f"--dropout {self.dropout} is between recurrent layers: take --num_layers 2 or more, or leave it out",
        )
        warmup = f"--warmup_epochs {self.warmup_epochs}"
        check(self.warmup_epochs == 0 or self.schedule == "one_cycle", f"{warmup} needs --schedule one_cycle")
        check(self.warmup_epochs < self.epochs, f"{warmup} must be below --epochs {self.epochs}")
        fraction = self.validation_fraction
        check(0 < fraction < 1, f"--validation_fraction must be between 0 and 1, got {fraction}")
        if self.max_time is not None:
            fn.parse_duration(self.max_time)


# ------------------------------------------------------------------------------------------------
# Data: rows as time steps
# ------------------------------------------------------------------------------------------------


def rows_as_sequence(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, C * W): step r is row r of the red channel, then of the green, then of the blue."""
    return images.permute(0, 2, 1, 3).flatten(2)


@dataclass
class Splits:
    """What one training needs: uint8 images (N, C, H, W) and int64 labels (N,) for training, validation and test."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: tuple[str, ...]


def split(data: ImageDataset, config: Config) -> Splits:
    """Hold out a stratified validation split of the training images. Raises UserError for too little data."""
    images, labels, test_images, test_labels = data.labelled()
    held_out = fn.stratified_subset(labels, config.validation_fraction, config.seed)
    kept = fn.complement(held_out, len(labels))
    lost = [name for i, name in enumerate(data.classes) if not (labels[kept] == i).any()]
    check(
        not lost,
        f"--dataset {data.name} with --validation_fraction {config.validation_fraction} leaves nothing to train on of "
        f"{', '.join(lost)}: hold out less, or take more images",
    )
    check(
        config.batch_size <= len(kept),
        f"--batch_size {config.batch_size} is above the {len(kept):,} training images: take at most {len(kept)}",
    )
    side = min(images.shape[2:])
    check(
        config.crop_padding <= side,
        f"--crop_padding {config.crop_padding} is wider than the images of {data.name}: take at most {side}",
    )
    return Splits(
        (images[kept], labels[kept]), (images[held_out], labels[held_out]), (test_images, test_labels), data.classes
    )


# ------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------


class SimpleRNN(nn.Module):
    """A recurrent layer (or several) whose states, pooled over the rows, are classified by a small network.

    Sequences (B, steps, input_size) -> logits (B, num_classes). `cell` is rnn, lstm or gru; l2 and l3 are the widths of
    the head's two hidden layers, each Linear - BatchNorm - ReLU - Dropout(0.5). Raises KeyError for an unknown cell,
    ValueError for an unknown pooling.
    `bidirectional` (Schuster & Paliwal 1997) reads upwards too; `dropout` acts between layers; `pooling` is last, mean
    or attention, where a learned score says how much each row's state counts (after Yang et al. 2016, Eq. 5 to 7).
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
            input_size, hidden_size, num_layers, batch_first=True, dropout=dropout, bidirectional=bidirectional
        )
        width = 2 * hidden_size if bidirectional else hidden_size
        self.head = nn.Sequential(
            *(nn.Linear(width, l2), nn.BatchNorm1d(l2), nn.ReLU(), nn.Dropout(0.5)),
            *(nn.Linear(l2, l3), nn.BatchNorm1d(l3), nn.ReLU(), nn.Dropout(0.5)),
            nn.Linear(l3, num_classes),
        )
        if pooling not in ("last", "mean", "attention"):
            raise ValueError(f"pooling must be last, mean or attention, got {pooling}")
        self.pooling = pooling
        if pooling == "attention":
            self.attention = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.recurrent(x)  # (B, steps, width): the top layer's state after each row
        return self.head(self.pool(outputs))

    def after_each_row(self, x: Tensor) -> Tensor:
        """What it makes of the first row alone, of the first two, and so on: logits (B, steps, num_classes)."""
        if self.recurrent.bidirectional:  # upwards, a sequence that is cut off begins elsewhere
            return torch.stack([self(x[:, :k]) for k in range(1, x.shape[1] + 1)], 1)
        outputs, _ = self.recurrent(x)
        return torch.stack([self.head(self.pool(outputs[:, :k])) for k in range(1, x.shape[1] + 1)], 1)

    def pool(self, outputs: Tensor) -> Tensor:
        """One state for the whole image: (B, steps, width) -> (B, width)."""
        if self.pooling == "mean":
            return outputs.mean(1)
        if self.pooling == "attention":
            weights = self.attention(outputs).softmax(1)  # (B, steps, 1), of sum 1
            return (weights * outputs).sum(1)
        if not self.recurrent.bidirectional:
            return outputs[:, -1]  # after the last row it has seen the whole image
        downwards, upwards = outputs.chunk(2, 2)
        return torch.cat([downwards[:, -1], upwards[:, 0]], 1)  # the last row read upwards is the first


def build_model(config: Config, cell: str, images: Tensor, num_classes: int) -> SimpleRNN:
    """The network that `config` describes, for images (N, C, H, W), with weights decided by config.seed."""
    torch.manual_seed(config.seed)
    row = images.shape[1] * images.shape[3]
    return SimpleRNN(
        *(row, config.hidden_size, config.num_layers, num_classes, config.l2, config.l3, cell),
        bidirectional=config.bidirectional,
        dropout=config.dropout,
        pooling=config.pooling,
    )


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def random_crop_and_flip(images: Tensor, padding: int, flip: bool) -> Tensor:
    """Shift each image by up to `padding` pixels, black beyond its edge, and mirror half of them.

    (B, C, H, W) -> (B, C, H, W), the same dtype, device and values as `images`. The usual augmentation of CIFAR-10
    (He et al. 2016, Section 4.2, with a padding of 4): pad on all sides, then cut out the old size at random.
    """
    n, _, height, width = images.shape
    if padding:
        padded = F.pad(images, [padding] * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (B, C, tops, lefts, H, W)
        top, left = torch.randint(2 * padding + 1, (2, n), device=images.device)
        images = windows[torch.arange(n, device=images.device), :, top, left]
    if flip:
        mirrored = torch.rand(n, 1, 1, 1, device=images.device) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
    return images


class RowClassification(fn.Classification):
    """Trains a SimpleRNN on uint8 images with Adam, as `config` says."""

    model: SimpleRNN

    def __init__(self, model: SimpleRNN, splits: Splits, config: Config) -> None:
        n = len(splits.train[0])
        lone = n % config.batch_size == 1  # BatchNorm cannot normalise a last batch of one image
        train = Batches(*splits.train, batch_size=config.batch_size, seed=config.seed, drop_last=lone)
        super().__init__(model, train, Batches(*splits.validation, batch_size=1000), held_out="validation")
        self.config = config
        self.normalize = fn.Normalize(splits.train[0])

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
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        if config.schedule == "one_cycle":  # after Smith & Topin 2019, along cosines
            steps, warmup = (epochs * len(self.train_batches) for epochs in (config.epochs, config.warmup_epochs))
            rising = warmup / steps if warmup > 1 else 0.0  # PyTorch divides by the warm-up's steps but one
            cycle = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, config.learning_rate, total_steps=steps, pct_start=rising, cycle_momentum=False
            )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=config.patience)
        # Lightning would step it after the epoch's checkpoint is written, and a resumed run would miss that step:
        # Lightning's turn never comes, on_validation_epoch_end takes it.
        never = {"monitor": "validation_loss", "frequency": sys.maxsize}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, **never}}

    def on_validation_epoch_end(self) -> None:
        schedule: Any = self.lr_schedulers()
        if self.config.schedule == "plateau":
            schedule.step(self.trainer.callback_metrics["validation_loss"])


def train(
    config: Config, cell: str, splits: Splits, folder: Path | None = None, callbacks: Sequence[Callback] = ()
) -> tuple[RowClassification, EpochLog]:
    """Train one network and return it with the log of its epochs.

    With a folder, metrics and checkpoints are kept there, an interrupted training goes on, and the weights are those
    of the epoch with the best validation accuracy. Without one, they are the last epoch's.
    """
    model = build_model(config, cell, splits.train[0], len(splits.classes))
    module = RowClassification(model, splits, config)
    if folder is None:
        log = EpochLog(quiet=True)
        fn.fit(fn.make_trainer(config, config.epochs, callbacks, log=log), module)
        return module, log
    log = EpochLog(folder / "metrics.csv")
    checkpoint = fn.Checkpoints(folder / "checkpoints", log, best="validation_accuracy")
    trainer = fn.make_trainer(
        config, config.epochs, callbacks, folder=folder, log=log, checkpoint=checkpoint, max_time=config.max_time
    )
    fn.fit(trainer, module, folder / "checkpoints" / "last.ckpt")
    assert checkpoint.best_weights is not None
    module.load_state_dict(checkpoint.best_weights)
    return module, log


# ------------------------------------------------------------------------------------------------
# What does it look at?
# ------------------------------------------------------------------------------------------------


class EachRow(nn.Module):
    """A trained RowClassification, read out after each row: uint8 (B, C, H, W) -> logits (B, H, classes)."""

    def __init__(self, module: RowClassification) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        return self.module.model.after_each_row(rows_as_sequence(self.module.normalize(images)))


def accuracy_by_rows(module: RowClassification, images: Tensor, labels: Tensor, config: Config) -> list[float]:
    """Accuracy when an image's first k rows alone are read, for k = 1 ... H; the last is that of whole images.

    images: uint8 (N, C, H, W), labels: int64 (N,). The head has learned from whole images only.
    """
    logits = fn.extract_features(EachRow(module), images, config)
    return [fn.accuracy(predictions, labels) for predictions in logits.argmax(2).unbind(1)]


def gradient_by_row(module: RowClassification, images: Tensor, labels: Tensor, config: Config) -> list[float]:
    """How much each row matters to the loss: the norm of the loss's gradient with respect to it, as shares of 1.

    images: uint8 (N, C, H, W), labels: int64 (N,); norms are averaged over the images. In a network that reads
    downwards and hands on its last state alone, the gradient comes to the first rows through all later steps: it
    vanishes where the cell forgets (Bengio, Simard & Frasconi 1994). Pooling gives every row a way of its own.
    """
    device, total = fn.resolve_device(config.accelerator), torch.zeros(images.shape[2])
    module.eval().to(device)
    for some_images, some_labels in Batches(images, labels, batch_size=500):
        rows = rows_as_sequence(module.normalize(some_images.to(device))).requires_grad_()
        with torch.backends.cudnn.flags(enabled=False):  # which goes backwards in training mode only
            loss = F.cross_entropy(module.model(rows), some_labels.to(device), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, rows)  # (B, H, C * W)
        total += gradient.norm(dim=2).sum(0).cpu()
    module.cpu()
    return (total / total.sum().clamp_min(1e-30)).tolist()  # all 0 where no gradient comes through


def plot_rows(cells: dict[str, dict[str, Any]], classes: int, file: Path) -> None:
    """Accuracy over the rows read so far, and the rows' shares of the gradient; a colour per cell."""
    figure, (left, right) = fn.new_figure(10, 4, columns=2)
    rows = range(1, len(next(iter(cells.values()))["accuracy_by_rows"]) + 1)
    for name, result in cells.items():
        left.plot(rows, result["accuracy_by_rows"], label=name.upper())
        right.plot(rows, result["gradient_by_row"], label=name.upper())
    left.axhline(1 / classes, color="grey", linestyle=":", label="left: chance\nright: equal shares")
    left.set(xlabel="rows read, from the top", ylabel="test accuracy", title="What it knows after the first rows")
    right.axhline(1 / len(rows), color="grey", linestyle=":")
    right.set(xlabel="row", ylabel="share of the gradient", yscale="log", title="Which rows the loss depends on")
    shares = [share for result in cells.values() for share in result["gradient_by_row"] if share > 0] or [1.0]
    high = math.ceil(math.log10(max(shares)))
    right.set_ylim(10 ** min(math.floor(math.log10(min(shares))), high - 1), 10**high)
    right.yaxis.set_minor_formatter("")  # whole decades are labelled, and nothing between
    for axis in (left, right):
        axis.grid(alpha=0.3)
        fn.in_percent(axis)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    fn.save_figure(figure, file)


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------


def run_cell(
    config: Config, cell: str, splits: Splits, folder: Path
) -> tuple[dict[str, Any], list[dict[str, float]], Tensor]:
    """Train one kind of cell and test its best epoch once: (results, rows of the curves, test predictions)."""
    module, log = train(config, cell, splits, folder)
    best = max(log.rows, key=lambda row: row["validation_accuracy"])  # the first, if several are equal
    test_images, test_labels = splits.test
    predictions = fn.extract_features(module, test_images, config).argmax(1)
    train_predictions = fn.extract_features(module, splits.train[0], config).argmax(1)
    results: dict[str, Any] = {
        "best_epoch": int(best["epoch"]),
        "train_accuracy": fn.accuracy(train_predictions, splits.train[1]),  # without dropout and augmentation
        "validation_accuracy": best["validation_accuracy"],
        "test_accuracy": fn.accuracy(predictions, test_labels),
        "per_class": fn.accuracy_per_class(predictions, test_labels, splits.classes),
        "accuracy_by_rows": accuracy_by_rows(module, test_images, test_labels, config),
        "gradient_by_row": gradient_by_row(module, test_images, test_labels, config),
        "parameters": sum(p.numel() for p in module.model.parameters()),
        "seconds": round(sum(row["seconds"] for row in log.rows), 1),
        "images_per_second": round(float(torch.tensor([row["images_per_second"] for row in log.rows]).median()), 1),
    }
    print(
        f"{cell}: best epoch {results['best_epoch']}, validation {100 * results['validation_accuracy']:.1f} %, "
        f"test {100 * results['test_accuracy']:.1f} %; accuracy per class on the test images:"
    )
    fn.print_per_class(results["per_class"])
    return results, log.rows, predictions


def print_table(cells: dict[str, dict[str, Any]]) -> None:
    """The outcome at a glance, a row per cell; the gap, of training and validation accuracy, is in points."""
    print("\ncell   best epoch      train   validation    gap      test   parameters     time")
    for name, r in cells.items():
        train, validation, test = (100 * r[f"{split}_accuracy"] for split in ("train", "validation", "test"))
        print(
            f"{name:4} {r['best_epoch']:12} {train:8.1f} % {validation:10.1f} % {train - validation:6.1f} {test:7.1f} %"
            f" {r['parameters']:12,} {fn.format_time(r['seconds']):>8}"
        )
    print()


def main(config: Config) -> None:
    if fn.finished(config):
        return
    record = fn.start_record(config)
    data = fn.load_dataset(config.dataset, config.data_dir, config.image_size)
    splits = split(data, config)
    cells = list(CELLS) if config.cell == "all" else [config.cell]
    _, channels, height, width = data.train_images.shape
    counts = [f"{len(images):,}" for images, _ in (splits.train, splits.validation, splits.test)]
    print(f"{data.name}: {counts[0]} training, {counts[1]} validation and {counts[2]} test images")
    print(f"each read as {height} rows of {channels * width} numbers; {fn.describe_machine(config)}")
    with fn.run_folder(config) as folder:
        outcomes = {}
        for cell in cells:
            cell_folder = folder / cell if len(cells) > 1 else folder
            cell_folder.mkdir(exist_ok=True)
            print(f"training {cell}", flush=True)
            outcomes[cell] = run_cell(config, cell, splits, cell_folder)
            fn.plot_confusion_matrix(
                outcomes[cell][2],
                splits.test[1],
                splits.classes,
                cell_folder / "confusion_matrix.png",
                f"{cell.upper()}, test",
            )
        curves = {cell.upper(): rows for cell, (_, rows, _) in outcomes.items()}
        fn.plot_curves(curves, "validation", folder / "curves.png", f"Reading {Path(data.name).name} images row by row")
        results = {cell: result for cell, (result, _, _) in outcomes.items()}
        plot_rows(results, len(splits.classes), folder / "rows.png")
        print_table(results)
        fn.save_results(folder, record, cells=results)


if __name__ == "__main__":
    fn.command_line(main, Config, __doc__)
