"""What can go wrong in a way that a user can mend, and how to say so in one line."""

from __future__ import annotations

import torch


class UserError(Exception):
    """A mistake the user can mend. Shown as one line on stderr that names the culprit and the remedy; exit status 2."""


class Diverged(UserError):
    """The loss is no longer finite."""


class CannotWrite(UserError):
    """A file could not be written: the disk is full, say."""


class TimeIsUp(Exception):
    """--max_time is over; the run can be resumed."""


def check(condition: bool, message: str) -> None:
    """Raise UserError(message) unless `condition` holds."""
    if not condition:
        raise UserError(message)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch found no memory, for which it has several ways: the CPU's, CUDA's, and cuBLAS's and cuDNN's."""
    words = ("out of memory", "allocate memory", "ALLOC_FAILED")
    plain = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return plain or isinstance(error, (MemoryError, torch.OutOfMemoryError))
