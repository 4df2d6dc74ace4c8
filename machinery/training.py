"""Training with Lightning: what is kept, the log of the epochs, the time limit, the trainer."""

from __future__ import annotations

import inspect
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, TQDMProgressBar, WeightAveraging
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from machinery.batches import EpochSeed
from machinery.checkpoints import SafeCheckpoints, newest_sound
from machinery.devices import Machine, peak_mib, prepare_device
from machinery.durations import format_time, parse_duration
from machinery.errors import Diverged, TimeIsUp, UserError, is_out_of_memory
from machinery.files import save_torch, write_csv
from machinery.processes import (
    TIMEOUT,
    EndTogether,
    end_now,
    end_with_parent,
    first_line,
    leave_or_wait,
    lost,
    rank,
)

PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
STARTED = time.monotonic()  # when the program did, all but Python and PyTorch themselves

# ------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------


class Checkpoints(Checkpoint):
    """Saves last.ckpt, and best.ckpt with the weights of the epoch whose `best` metric was highest.

    After the epoch in which `every` seconds are over since the last time, and after the last epoch:
    a GPU may need two seconds for an epoch, and a disk as long for its checkpoint.

    What was best is read from the log, whose rows travel in last.ckpt, as do the best weights. So
    a resumed run knows its best epoch and has its weights, whatever became of best.ckpt.
    """

    def __init__(
        self, folder: Path, log: EpochLog, best: str | None = None, every: float = 0.0
    ) -> None:
        self.folder = folder
        self.epoch_log = log
        self.best = best
        self.every = every
        self.saved_at = time.monotonic()
        self.best_weights: dict[str, Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best_weights": self.best_weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_weights = state_dict["best_weights"]

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if self.best is not None:
            *earlier, newest = [row[self.best] for row in self.epoch_log.rows]
            if all(newest > value for value in earlier):
                state = pl_module.state_dict()
                self.best_weights = {name: value.cpu().clone() for name, value in state.items()}

        is_last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        due = is_last or time.monotonic() - self.saved_at >= self.every
        if trainer.strategy.broadcast(due):  # the first process decides for all
            if self.best_weights is not None and trainer.is_global_zero:
                self.folder.mkdir(parents=True, exist_ok=True)
                save_torch(self.folder / "best.ckpt", {"state_dict": self.best_weights})
            # After best.ckpt: a run that is killed between the two does this epoch again.
            trainer.save_checkpoint(self.folder / "last.ckpt")
            self.saved_at = time.monotonic()


# ------------------------------------------------------------------------------------------------
# Callbacks: the log of the epochs, the check of the loss, the time limit
# ------------------------------------------------------------------------------------------------


class EpochLog(Callback):
    """One row per epoch: printed as a line, kept in `rows`, written to metrics.csv and TensorBoard.

    What `training_step` returns ({"loss": ..., "accuracy": ...}, means over a batch) becomes
    train_loss and so on, the means over the epoch's images. What a module has as `epoch_signals`,
    and what it logs in validation, stands beside it. `names` says how to print a metric:
    {"knn": "k-NN"} for knn_accuracy.

    The rows travel in the checkpoint, so that a resumed run has every epoch exactly once.
    """

    def __init__(
        self, file: Path | None = None, quiet: bool = False, names: dict[str, str] | None = None
    ) -> None:
        self.file = file
        self.quiet = quiet
        self.names = names or {}
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]

    def on_train_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self.start = self.training_end = time.perf_counter()
        self.learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.sums: dict[str, Tensor] = {}
        self.means: dict[str, float] = {}
        self.images = 0

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # Summed here from what training_step returns: `self.log` there costs a tenth of a step.
        n = len(batch[0])
        for name, value in outputs.items():
            self.sums[name] = self.sums.get(name, 0) + n * value.detach()
        self.images += n

        if batch_idx + 1 == trainer.num_training_batches:
            for name, total in self.sums.items():
                over_devices = float(trainer.strategy.reduce(total, reduce_op="mean"))
                self.means[f"train_{name}"] = over_devices / self.images
        self.training_end = time.perf_counter()

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        images = trainer.world_size * self.images
        row = {
            "epoch": trainer.current_epoch + 1,
            **self.means,
            **getattr(pl_module, "epoch_signals", {}),
            **held_out_metrics(trainer),
            "learning_rate": self.learning_rate,
            "images_per_second": round(images / (self.training_end - self.start), 1),
            "seconds": round(time.perf_counter() - self.start, 3),
        }
        if trainer.strategy.root_device.type == "cuda":
            row["peak_mib"] = peak_mib()
        self.rows.append(row)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=int(row["epoch"]))
        if self.file is not None and trainer.is_global_zero:
            write_csv(self.file, self.rows)

        if not self.quiet:
            seconds = float(np.mean([row["seconds"] for row in self.rows]))
            line = epoch_line(row, trainer.max_epochs or 0, seconds, self.names)
            pl_module.print(line)  # above the progress bar, if there is one
            sys.stdout.flush()


def held_out_metrics(trainer: lightning.Trainer) -> dict[str, float]:
    """What the module logged in validation, if this epoch had one."""
    if (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1):
        return {}
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def epoch_line(
    row: dict[str, float], epochs: int, seconds: float, names: dict[str, str] | None = None
) -> str:
    """One epoch for people: its losses and accuracies, its pace, and the time left.

    `seconds` is what an epoch takes; `names` says how to call a split, if not by its own name.
    """
    words = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"]
    measured = [key for key in row if key.endswith(("_loss", "_accuracy"))]
    for split in dict.fromkeys(key.rpartition("_")[0] for key in measured):
        name = (names or {}).get(split, split)
        loss, accuracy = row.get(f"{split}_loss"), row.get(f"{split}_accuracy")
        if loss is not None:
            words.append(f"{name} loss {loss:.4f}")
            name = ""  # the accuracy stands beside it
        if accuracy is not None:
            words.append(f"{name} {100 * accuracy:.1f} %".strip())

    ranks = [f"{key[5:]} {value:.0f}" for key, value in row.items() if key.startswith("rank_")]
    words += [f"rank {', '.join(ranks)}"] if ranks else []
    words.append(f"lr {row['learning_rate']:.2g}")
    words.append(f"{row['images_per_second']:,.0f} images/s")
    if left := (epochs - row["epoch"]) * seconds:
        words.append(f"{format_time(left)} left")
    return "  ".join(words)


class FiniteLoss(Callback):
    """Ends the training as soon as its loss is not finite. Raises Diverged.

    rate: the flag to lower then. last: the checkpoint to name as the last good one.
    """

    def __init__(self, rate: str = "--learning_rate", last: Path | None = None) -> None:
        self.rate = rate
        self.last = last
        self.unchecked: list[tuple[int, float, Tensor]] = []  # step, its learning rate, its loss

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        # Before the step: its schedule then changes the rate.
        self.step_rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        loss = outputs["loss"].detach()
        self.unchecked.append((trainer.global_step, self.step_rate, loss))

        # To look at a loss is to wait for the GPU: there, many are looked at together.
        is_last = batch_idx + 1 == trainer.num_training_batches
        if is_last or loss.device.type == "cpu" or len(self.unchecked) == 50:
            unchecked, self.unchecked = self.unchecked, []
            finite = torch.stack([loss for *_, loss in unchecked]).isfinite()
            if not finite.all():
                step, rate, _ = unchecked[finite.tolist().index(False)]
                self.end(trainer, step, rate)

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if not all(math.isfinite(value) for value in held_out_metrics(trainer).values()):
            self.end(trainer, trainer.global_step, self.step_rate)

    def end(self, trainer: lightning.Trainer, step: int, rate: float) -> None:
        saved = self.last if self.last and self.last.is_file() else "none"
        where = f"epoch {trainer.current_epoch + 1}, step {step}, learning rate {rate:g}"
        raise Diverged(
            f"the loss is not finite ({where}; last good checkpoint: {saved}): "
            f"start a new run with a lower {self.rate}"
        )


class TimeLimit(Callback):
    """--max_time: training ends after the last epoch that fits, counted from the program's start.

    One epoch is trained in any case: a run that is resumed again and again comes to its end.
    """

    def __init__(self, max_time: str | None, log: EpochLog) -> None:
        self.end = STARTED + (parse_duration(max_time) if max_time else math.inf)
        self.epoch_log = log

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        next_end = time.monotonic() + self.epoch_log.rows[-1]["seconds"]
        stop = next_end >= self.end
        trainer.should_stop = trainer.strategy.broadcast(stop)  # the first process decides for all


class AveragedWeights(WeightAveraging):
    """An exponential moving average of the weights and of BatchNorm's statistics.

    After each step a share of 1 - decay of the new weights. It is what validation sees, what
    checkpoints call state_dict, and what is left at the end; what is trained goes on beside it.
    """

    def __init__(self, decay: float, device: str) -> None:
        # Not Lightning's own EMAWeightAveraging: its formula rounds what is constant, such as the
        # images' mean, anew in every step; this one (lerp) leaves it as it is.
        super().__init__(device=device, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # A run that is resumed after its last epoch trains no more, and has no on_train_end.
        self.on_train_end(trainer, pl_module)


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with its time to go; the numbers stand in the epoch lines above it."""

    def get_metrics(self, *_: Any) -> dict[str, Any]:
        return {}

    def on_train_epoch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"  # counted from 1
        self.train_progress_bar.set_description(epoch)


# ------------------------------------------------------------------------------------------------
# The trainer
# ------------------------------------------------------------------------------------------------


def make_trainer(
    machine: Machine,
    seed: int,
    epochs: int,
    log: EpochLog,
    callbacks: Sequence[Callback] = (),
    *,
    folder: Path | None = None,
    checkpoint: Checkpoints | None = None,
    rate: str = "--learning_rate",
    max_time: str | None = None,
    devices: int = 1,
    num_nodes: int = 1,
    **options: Any,
) -> lightning.Trainer:
    """A Lightning trainer that is quiet, seeded per epoch, and logs to `log`.

    With a `folder`, TensorBoard's events go there. A progress bar appears on a terminal only.
    Several devices train by DDP, one process each; on GPUs, BatchNorm then sees the batches of
    all (Section 2.2: global BN). `rate` is the flag to lower when the loss diverges; `options` are
    further ones of Lightning's Trainer.
    """
    from lightning.pytorch.loggers import TensorBoardLogger  # slow to import, and not for --help

    quiet_libraries()
    prepare_device(machine)
    several = devices * num_nodes > 1
    on_terminal = sys.stdout.isatty() and not log.quiet
    bar = [ProgressBar(leave=False)] if on_terminal else []

    # In this order, as Lightning calls them: a loss that is not finite never reaches the log; the
    # log writes an epoch's row; the time limit and the checkpoint read that row.
    finite = FiniteLoss(rate, checkpoint.folder / "last.ckpt" if checkpoint else None)
    together = [EndTogether()] if several else []
    after_the_log = [TimeLimit(max_time, log), *([checkpoint] if checkpoint else [])]

    on_gpus = several and machine.device == "cuda"
    return lightning.Trainer(
        accelerator=machine.device,
        devices=devices,
        num_nodes=num_nodes,
        strategy=several_processes(folder, on_gpus) if several else "auto",
        sync_batchnorm=on_gpus,
        use_distributed_sampler=False,  # Batches knows each rank's share
        precision=PRECISIONS[machine.precision],
        max_epochs=epochs,
        callbacks=[EpochSeed(seed), *together, *callbacks, *bar, finite, log, *after_the_log],
        plugins=[SafeCheckpoints(), *environment(several)],
        # Where Lightning looks for a job's checkpoints: others' may lie in the current folder.
        default_root_dir=folder or os.devnull,
        logger=TensorBoardLogger(folder, name="", version="tensorboard") if folder else False,
        enable_checkpointing=checkpoint is not None,
        enable_progress_bar=on_terminal,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **options,
    )


def several_processes(folder: Path | None, on_gpus: bool) -> DDPStrategy:
    """How processes train together, and that they begin and end together."""
    if folder:
        # Lightning starts the other processes with sys.argv: they are to join this run.
        sys.argv[1:] = ["--resume", str(folder)]
    if rank() != 0:
        end_with_parent()
    options: dict[str, Any] = {}
    if on_gpus:  # where SyncBatchNorm keeps the statistics of all of them equal by itself
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options[name] = False
    return DDPStrategy(timeout=TIMEOUT, **options)


def environment(several: bool) -> list[Any]:
    """What Lightning is to think of where it runs.

    A training on one device is one, also inside a SLURM job or under torchrun. In a job of several
    tasks Lightning is not to requeue it: whoever sent the job resumes it.
    """
    if not several:
        return [LightningEnvironment()]
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def quiet_libraries() -> None:
    """Silence, at their cause, the messages that a user can do nothing about."""
    for name in ("lightning.pytorch", "lightning.fabric"):  # tips, and what hardware there is
        logging.getLogger(name).setLevel(logging.ERROR)
    for deprecated in ("LeafSpec", "all_gather"):  # Lightning's use of PyTorch
        warnings.filterwarnings("ignore", message=f".*{deprecated}.*is deprecated")


def every_step(optimizer: torch.optim.Optimizer, schedule: Any) -> dict[str, Any]:
    """What `configure_optimizers` returns where the learning rate changes after each step."""
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule, "interval": "step"},
    }


def fit(
    trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: Path | None = None
) -> None:
    """`trainer.fit`, from `checkpoint` if it is there.

    Ctrl-C stays KeyboardInterrupt, where Lightning would exit. Of several processes, all but the
    first end here, by SystemExit. Raises TimeIsUp when --max_time ended the training, and
    UserError when it diverged or another process of it was lost.
    """
    start_from = newest_sound(checkpoint) if checkpoint else None
    several, threads = trainer.world_size > 1, torch.get_num_threads()
    try:
        trainer.fit(module, ckpt_path=start_from, weights_only=True)
    except BaseException as error:
        if several and not trainer.is_global_zero:
            end_now(error)
        if isinstance(error, SystemExit) and trainer.interrupted:
            raise KeyboardInterrupt from None
        if several and lost(error) and not is_out_of_memory(error):
            problem = "another process of this training was lost or cannot be reached"
            raise UserError(f"{problem} ({first_line(error)}): go on with --resume") from None
        raise

    if several:
        leave_or_wait()  # what follows is the first process's alone
        torch.set_num_threads(threads)  # Lightning had given each process its share
    if trainer.should_stop and trainer.current_epoch < (trainer.max_epochs or 0):
        raise TimeIsUp
