"""The processes of one training end together, whichever of them ends first, and however.

One that stays behind would hold its GPU, waiting for the others in a collective operation: under
NCCL for half an hour.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import lightning
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only

from machinery.errors import UserError, is_out_of_memory

GRACE = 8.0  # seconds in which the first process may end in good order
TIMEOUT = timedelta(minutes=10)  # in which all of them must come to a collective operation


def rank() -> int:
    """Which of the training's processes this is, counted from 0."""
    return getattr(rank_zero_only, "rank", 0)


class EndTogether(Callback):
    """SIGTERM (of scancel, docker stop, timeout) ends a training's processes: all, and at once.

    Lightning's own handler broadcasts from within the handler, and the others do not answer (its
    issue 20806). Here the first process ends as on Ctrl-C; the others have nothing to save.
    """

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if not trainer.is_global_zero:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # even while it waits for the others
            return
        signal.signal(signal.SIGTERM, interrupt)
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)
        threading.Thread(target=end_after_grace, args=(read,), daemon=True).start()


def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    """Handles SIGTERM as Ctrl-C is handled."""
    raise KeyboardInterrupt


def end_after_grace(read: int) -> None:
    """End this process some seconds after SIGTERM, if it could not end by itself.

    While it waits for a process that is gone, Python calls no handler: the signal wakes this
    thread instead.
    """
    while signal.SIGTERM not in os.read(read, 1):
        pass
    time.sleep(GRACE)
    print("interrupted while it waited for other processes", file=sys.stderr, flush=True)
    os._exit(130)


def end_with_parent() -> None:
    """Make this process end within a second of the one that started it, however that ends."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_now(error: BaseException) -> NoReturn:
    """End this process, one of the others, without waiting for anybody.

    Python's own way out would take down the process group, and wait for the others.
    """
    if is_out_of_memory(error):
        print(f"process {rank()} ran out of memory", file=sys.stderr)
    elif not isinstance(error, (SystemExit, KeyboardInterrupt, UserError)) and not lost(error):
        traceback.print_exception(error)  # otherwise the first process says why
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


waiting: list[Any] = []  # where the others wait, once the training is over


def leave_or_wait() -> None:
    """After the training: the first process goes on alone, the others end here.

    Those that torchrun started wait for the first one to end: torchrun would take down a run whose
    processes do not all end within five minutes.
    """
    first = rank() == 0
    if TorchElasticEnvironment.detect():
        group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        if first:
            waiting.append(group)
            return
        with contextlib.suppress(RuntimeError):  # the first one failed: it says why
            dist.barrier(group)
        os._exit(0)
    dist.destroy_process_group()
    if not first:
        sys.exit(0)


def release() -> None:
    """Let the processes go that wait for this one."""
    if waiting:
        dist.barrier(waiting.pop())
        dist.destroy_process_group()


def lost(error: BaseException) -> bool:
    """Whether an error says that another process cannot be reached."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def first_line(error: BaseException) -> str:
    """What an error says, as far as one line has room for it."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= 200 else f"{line[:199]}…"
