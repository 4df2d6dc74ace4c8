"""Training with Lightning: checkpoints, the log of the epochs, the time limit, and the trainer itself."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, Timer, TQDMProgressBar
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from machinery.batches import EpochSeed
from machinery.command_line import RunConfig
from machinery.devices import prepare_device, resolve_device, resolve_precision
from machinery.errors import Diverged, TimeIsUp, UserError, check
from machinery.files import save_torch, write_csv

STARTED = time.monotonic()


# ------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------


class SafeCheckpoints(TorchCheckpointIO):
    """A checkpoint appears whole or not at all, and the one before it is kept beside it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name("fresh.ckpt")
        save_torch(fresh, checkpoint)
        if path.is_file():
            os.replace(path, previous(path))
        os.replace(fresh, path)


def previous(checkpoint: Path) -> Path:
    """Where the checkpoint before `checkpoint` is kept."""
    return checkpoint.with_name(f"previous-{checkpoint.name}")


def newest_sound(checkpoint: Path) -> Path | None:
    """`checkpoint`, or the one before it if it is damaged (with a warning), or None where there is none.

    Raises UserError if all there are damaged.
    """
    there = [path for path in (checkpoint, previous(checkpoint)) if path.is_file()]
    for path in there:
        try:
            load_checkpoint(path)
        except UserError:
            continue
        if path != there[0]:
            print(f"warning: {there[0]} is damaged; going on from {path}", file=sys.stderr)
            there[0].unlink(missing_ok=True)  # lest it take the place of the sound one before it
        return path
    check(not there, f"--resume: every checkpoint in {checkpoint.parent} is damaged; start afresh, without --resume")
    return None


def load_checkpoint(file: Path) -> dict[str, Any]:
    """Read a checkpoint as data, on the CPU: one that holds code, or whose checksums are wrong, raises UserError."""
    try:
        with zipfile.ZipFile(file) as archive:  # PyTorch writes checksums, but does not compare them
            if archive.testzip() is not None:
                raise ValueError
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file can fail in many ways
        raise UserError(f"{file} is damaged, or no checkpoint of plain data: take another, or start afresh") from None


class Checkpoints(Checkpoint):
    """Saves last.ckpt after every epoch, and best.ckpt when the `best` metric is higher than in all epochs before.

    What was best is read from the log, whose rows travel in last.ckpt, as do the best weights: what a resumed run
    believes to be the best is what it has, whatever became of best.ckpt.
    """

    def __init__(self, folder: Path, log: EpochLog, best: str | None = None) -> None:
        self.folder, self.epoch_log, self.best = folder, log, best
        self.best_weights: dict[str, Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best_weights": self.best_weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_weights = state_dict["best_weights"]

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.best is not None:
            *earlier, newest = [row[self.best] for row in self.epoch_log.rows]
            if all(newest > value for value in earlier):
                self.best_weights = {name: value.cpu().clone() for name, value in pl_module.state_dict().items()}
                trainer.save_checkpoint(self.folder / "best.ckpt")
        trainer.save_checkpoint(self.folder / "last.ckpt")  # after it: a run killed in between redoes this epoch


# ------------------------------------------------------------------------------------------------
# The time limit and the log of the epochs
# ------------------------------------------------------------------------------------------------


class TimeLimit(Callback):
    """--max_time: training ends after the last epoch that fits, and is saved. Counted once the libraries are loaded.

    One epoch is trained in any case: a run that is resumed again and again comes to its end.
    """

    def __init__(self, max_time: str | None, log: EpochLog) -> None:
        self.end, self.epoch_log = STARTED + (parse_duration(max_time) if max_time else math.inf), log

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        fits = time.monotonic() + self.epoch_log.rows[-1]["seconds"] < self.end
        trainer.should_stop = trainer.strategy.broadcast(not fits)  # the first process decides for all


def parse_duration(max_time: str) -> float:
    """Seconds of a duration in Lightning's format, DD:HH:MM:SS. Raises UserError."""
    try:
        return Timer(max_time).time_remaining() or 0.0
    except (ValueError, MisconfigurationException):
        raise UserError(f"--max_time {max_time}: give days, hours, minutes and seconds as DD:HH:MM:SS") from None


class EpochLog(Callback):
    """One row per epoch: printed as a line, kept in `rows`, written to metrics.csv and to TensorBoard.

    What `training_step` returns ({"loss": ..., "accuracy": ...}, means over a batch) becomes train_loss and so on,
    the means over the epoch's images; what a module logs in validation stands beside it.

    The rows travel in the checkpoint, so that a resumed run's metrics.csv has every epoch exactly once.
    """

    def __init__(self, file: Path | None = None, quiet: bool = False, rate: str = "--learning_rate") -> None:
        self.file, self.quiet, self.rate = file, quiet, rate  # rate: the flag to lower when the loss diverges
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.start = self.training_end = time.perf_counter()
        self.sums: dict[str, Tensor] = {}
        self.means: dict[str, float] = {}
        self.images = 0
        self.learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.to_check: list[tuple[int, float, Tensor]] = []  # step, its learning rate, its loss

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.step_rate = trainer.optimizers[0].param_groups[0]["lr"]  # before the step's schedule changes it

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        n, last, loss = len(batch[0]), batch_idx + 1 == trainer.num_training_batches, outputs["loss"].detach()
        self.to_check.append((trainer.global_step, self.step_rate, loss))
        if last or loss.device.type == "cpu" or len(self.to_check) == 50:  # to look is to wait for the GPU
            self.check_finite(trainer)
        for name, value in outputs.items():  # what training_step returned; `self.log` there costs a tenth of a step
            self.sums[name] = self.sums.get(name, 0) + n * value.detach()
        self.images += n
        if last:
            self.means = {
                f"train_{name}": float(trainer.strategy.reduce(total, reduce_op="mean")) / self.images
                for name, total in self.sums.items()
            }
        self.training_end = time.perf_counter()

    def check_finite(self, trainer: lightning.Trainer) -> None:
        """Raise Diverged if a loss that was kept for it is not finite."""
        to_check, self.to_check = self.to_check, []
        for step, rate, loss in to_check:
            if not math.isfinite(loss):
                self.diverged(trainer, f"step {step}, learning rate {rate:g}")

    def diverged(self, trainer: lightning.Trainer, where: str) -> NoReturn:
        saved = self.file.with_name("checkpoints") / "last.ckpt" if self.file and self.rows else "none"
        where = f"epoch {trainer.current_epoch + 1}, {where}; last good checkpoint: {saved}"
        raise Diverged(f"the loss is not finite ({where}): start a new run with a lower {self.rate}")

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        validated = (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
        held_out = {name: float(value) for name, value in trainer.callback_metrics.items()} if validated else {}
        row = {
            "epoch": trainer.current_epoch + 1,
            **self.means,
            **held_out,
            "learning_rate": self.learning_rate,
            "images_per_second": round(trainer.world_size * self.images / (self.training_end - self.start), 1),
            "seconds": round(time.perf_counter() - self.start, 3),
        }
        if not all(math.isfinite(value) for value in row.values()):  # of the held-out images
            self.diverged(trainer, f"step {trainer.global_step}, learning rate {self.learning_rate:g}")
        self.rows.append(row)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=int(row["epoch"]))
        if self.file is not None and trainer.is_global_zero:
            write_csv(self.file, self.rows)
        if not self.quiet:
            pl_module.print(self._line(row, trainer.max_epochs or 0))  # above the progress bar, if there is one
            sys.stdout.flush()

    def _line(self, row: dict[str, float], epochs: int) -> str:
        words = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"]
        for split in ("train", "validation", "knn"):
            loss, accuracy = row.get(f"{split}_loss"), row.get(f"{split}_accuracy")
            if loss is not None:
                words.append(f"{split} loss {loss:.4f}")
            if accuracy is not None:
                words.append(f"{100 * accuracy:.1f} %" if loss is not None else f"k-NN {100 * accuracy:.1f} %")
        words += [f"lr {row['learning_rate']:.2g}", f"{row['images_per_second']:,.0f} images/s"]
        left = (epochs - row["epoch"]) * float(np.mean([r["seconds"] for r in self.rows]))
        return "  ".join(words) + (f"  {format_time(left)} left" if left else "")


def format_time(seconds: float) -> str:
    """A duration for people: 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with its time to go, epochs counted from 1; the numbers stand in the epoch lines above it."""

    def get_metrics(self, *_: Any) -> dict[str, Any]:
        return {}

    def on_train_epoch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")


# ------------------------------------------------------------------------------------------------
# The trainer
# ------------------------------------------------------------------------------------------------


def make_trainer(
    config: RunConfig,
    epochs: int,
    callbacks: Sequence[Callback] = (),
    *,
    folder: Path | None = None,
    log: EpochLog | None = None,
    checkpoint: Checkpoints | None = None,
    max_time: str | None = None,
    devices: int = 1,
    num_nodes: int = 1,
    **options: Any,
) -> lightning.Trainer:
    """A Lightning trainer that is quiet, seeded per epoch, and writes into `folder` (TensorBoard) if it is given.

    Progress bar on a terminal only; the epoch lines come from `log`. `options` are further ones of Lightning's Trainer.
    Several devices train by DDP, one process each; on GPUs, BatchNorm then sees the batches of all.
    """
    from lightning.pytorch.loggers import TensorBoardLogger

    quiet_libraries()
    device = resolve_device(config.accelerator)
    prepare_device(config)
    on_terminal = sys.stdout.isatty() and not (log and log.quiet)
    limit = TimeLimit(max_time, log) if log else None
    extra = [log, limit, checkpoint, ProgressBar(leave=False) if on_terminal else None]
    several = devices * num_nodes > 1
    return lightning.Trainer(
        accelerator=device,
        devices=devices,
        num_nodes=num_nodes,
        strategy="ddp" if several else "auto",
        sync_batchnorm=several and device == "cuda",
        use_distributed_sampler=False,  # Batches knows each rank's share
        precision="bf16-mixed" if resolve_precision(config.precision, device) == "bf16" else "32-true",
        max_epochs=epochs,
        callbacks=[EpochSeed(config.seed), *callbacks, *(callback for callback in extra if callback is not None)],
        # LightningEnvironment: a training on one device is one, also inside a SLURM job or torchrun.
        plugins=[SafeCheckpoints(), *([] if several else [LightningEnvironment()])],
        logger=TensorBoardLogger(folder, name="", version="tensorboard") if folder else False,
        enable_checkpointing=checkpoint is not None,
        enable_progress_bar=on_terminal,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **options,
    )


def quiet_libraries() -> None:
    """Silence, at their cause, the messages that a user can do nothing about."""
    for name in ("lightning.pytorch", "lightning.fabric"):  # tips, and which accelerators were found
        logging.getLogger(name).setLevel(logging.ERROR)
    for deprecated in ("LeafSpec", "all_gather"):  # Lightning's use of PyTorch
        warnings.filterwarnings("ignore", message=f".*{deprecated}.*is deprecated")


def fit(trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: Path | None = None) -> None:
    """`trainer.fit`, from `checkpoint` if it is there. Ctrl-C stays KeyboardInterrupt, where Lightning exits.

    Of several processes, all but the first end here, by SystemExit. Raises TimeIsUp when --max_time ended the training,
    UserError when it diverged, and when another process of it was lost.
    """
    try:
        trainer.fit(module, ckpt_path=newest_sound(checkpoint) if checkpoint else None, weights_only=True)
    except SystemExit:
        if trainer.interrupted and trainer.is_global_zero:
            raise KeyboardInterrupt from None
        raise
    except UserError:
        if not trainer.is_global_zero:
            sys.exit(2)  # the first process says why
        raise
    except RuntimeError as error:
        lost = "gloo" in str(error) or isinstance(error, torch.distributed.DistError)
        if not (trainer.world_size > 1 and torch.distributed.is_initialized() and lost):
            raise
        if not trainer.is_global_zero:
            sys.exit(2)
        raise UserError("another process of this training was lost: go on with --resume") from None
    if trainer.world_size > 1:
        torch.distributed.destroy_process_group()  # what follows is the first process's alone
    if not trainer.is_global_zero:
        sys.exit(0)
    if trainer.should_stop and trainer.current_epoch < (trainer.max_epochs or 0):
        raise TimeIsUp
