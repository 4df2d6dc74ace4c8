"""Images as sequences: classify an image by reading its rows, top to bottom, with a recurrent network.

A 32 x 32 colour image is a sequence of 32 steps of 96 numbers: row r is its red, then green, then blue pixels.
Compared are the plain RNN (Elman 1990), the LSTM (Hochreiter & Schmidhuber 1997) and the GRU (Cho et al. 2014).

    python rnn.py                                   # CIFAR-10, plain RNN, 100 epochs
    python rnn.py --cell all                        # RNN, LSTM and GRU in one figure
    python rnn.py --dataset digits --epochs 30      # no download, well under a minute
    python rnn.py --config runs/.../best_config.yaml  # what rnn_hyperparameter_tune.py found
    python rnn.py --resume                          # continue the newest run where it was interrupted

Measured (results/rnn): after 3 of the 100 epochs the RNN reaches 30.6 %, the LSTM 38.6 % and the GRU 39.1 % of
CIFAR-10's test images (JPEG copy).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
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

    epochs: int = 100
    """passes over the training images"""
    batch_size: int = 64
    """images per step"""
    learning_rate: float = 0.00022
    """of Adam, at the start"""
    weight_decay: float = 0.00052
    """L2 penalty, added to the gradient as Adam does"""
    patience: int = 10
    """epochs without a lower validation loss before the learning rate falls to a tenth"""
    validation_fraction: float = 0.1
    """share of each class's training images held out, to choose the epoch and the learning rate's fall"""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """float32, or bfloat16 autocast: about twice as fast for the LSTM on CPUs with AMX"""
    max_time: str | None = None
    """end after the last epoch that fits into DD:HH:MM:SS (one at least), to go on later with --resume"""

    may_grow = ("epochs",)  # the learning rate falls when the validation loss says so, however many epochs there are

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
        f"--dataset {data.name}: a class needs two training images or more, one for validation: {', '.join(lost)}",
    )
    check(
        config.batch_size <= len(kept),
        f"--batch_size {config.batch_size} is above the {len(kept):,} training images: take at most {len(kept)}",
    )
    return Splits(
        (images[kept], labels[kept]), (images[held_out], labels[held_out]), (test_images, test_labels), data.classes
    )


# ------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------


class SimpleRNN(nn.Module):
    """A recurrent layer (or several) whose last step is classified by a small network.

    Sequences (B, steps, input_size) -> logits (B, num_classes). `cell` is rnn, lstm or gru; l2 and l3 are the widths of
    the head's two hidden layers, each Linear - BatchNorm - ReLU - Dropout(0.5). Raises KeyError for an unknown cell.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int, num_classes: int, l2: int, l3: int, cell: str = "rnn"
    ) -> None:
        super().__init__()
        self.recurrent = CELLS[cell](input_size, hidden_size, num_layers, batch_first=True)
        self.head = nn.Sequential(
            *(nn.Linear(hidden_size, l2), nn.BatchNorm1d(l2), nn.ReLU(), nn.Dropout(0.5)),
            *(nn.Linear(l2, l3), nn.BatchNorm1d(l3), nn.ReLU(), nn.Dropout(0.5)),
            nn.Linear(l3, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.recurrent(x)  # (B, steps, hidden_size): the top layer's state after each row
        return self.head(outputs[:, -1])  # after the last row it has seen the whole image


def build_model(config: Config, cell: str, images: Tensor, num_classes: int) -> SimpleRNN:
    """The network that `config` describes, for images (N, C, H, W), with weights decided by config.seed."""
    torch.manual_seed(config.seed)
    row = images.shape[1] * images.shape[3]
    return SimpleRNN(row, config.hidden_size, config.num_layers, num_classes, config.l2, config.l3, cell)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


class RowClassification(fn.Classification):
    """Trains a SimpleRNN on uint8 images with Adam; the learning rate falls when the validation loss stops falling."""

    def __init__(self, model: SimpleRNN, splits: Splits, config: Config) -> None:
        n = len(splits.train[0])
        lone = n % config.batch_size == 1  # BatchNorm cannot normalise a last batch of one image
        train = Batches(*splits.train, batch_size=config.batch_size, seed=config.seed, drop_last=lone)
        super().__init__(model, train, Batches(*splits.validation, batch_size=1000), held_out="validation")
        self.config = config
        self.normalize = fn.Normalize(splits.train[0])

    def forward(self, images: Tensor) -> Tensor:
        return self.model(rows_as_sequence(self.normalize(images)))

    def configure_optimizers(self) -> Any:
        config = self.config
        optimizer = torch.optim.Adam(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=config.patience)
        # Lightning would step it after the epoch's checkpoint is written, and a resumed run would miss that step:
        # Lightning's turn never comes, on_validation_epoch_end takes it.
        never = {"monitor": "validation_loss", "frequency": sys.maxsize}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, **never}}

    def on_validation_epoch_end(self) -> None:
        schedule: Any = self.lr_schedulers()
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
    results: dict[str, Any] = {
        "best_epoch": int(best["epoch"]),
        "train_accuracy": best["train_accuracy"],
        "validation_accuracy": best["validation_accuracy"],
        "test_accuracy": fn.accuracy(predictions, test_labels),
        "per_class": fn.accuracy_per_class(predictions, test_labels, splits.classes),
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
    """The outcome at a glance, a row per cell."""
    print("\ncell   best epoch   validation     test   parameters     time")
    for name, r in cells.items():
        print(
            f"{name:4} {r['best_epoch']:12} {100 * r['validation_accuracy']:10.1f} % {100 * r['test_accuracy']:6.1f} %"
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
        print_table(results)
        fn.save_results(folder, record, cells=results)


if __name__ == "__main__":
    fn.command_line(main, Config, __doc__)
