"""What can go wrong in a way that the user can mend, and how it is said: in one line."""

from __future__ import annotations

import torch


class UserError(Exception):
    """A mistake that the user can mend.

    It is shown as one line on stderr that names the culprit and the remedy; exit status 2.
    """


class Diverged(UserError):
    """The loss is no longer finite."""


class CannotWrite(UserError):
    """A file could not be written, because the disk is full, say."""


class TimeIsUp(Exception):
    """--max_time is over; the run can be resumed."""


def check(condition: bool, message: str) -> None:
    """Raise UserError(message) unless `condition` holds."""
    if not condition:
        raise UserError(message)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left.

    PyTorch says so in several ways: the CPU's, CUDA's, cuBLAS's and cuDNN's.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("out of memory", "allocate memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
