"""Files that appear whole or not at all, and folders that one process has to itself."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from machinery.errors import CannotWrite, check


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Have `folder` to oneself, among the processes that ask for it, until the block ends.

    The lock is free again when its process ends, in whatever way. Raises filelock.Timeout if
    another process has it and `wait` is false. Where the file system has no locks, there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.acquire(timeout=0))
        except Timeout:
            if not wait:
                raise
            print(f"waiting for another process that is at work in {folder}", flush=True)
            stack.enter_context(lock.acquire())
        except (OSError, NotImplementedError):
            pass  # a file system without locks, or a folder that may only be read
        yield


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises CannotWrite.

    The data goes to a file beside it, is synced to the disk, and then takes the old file's name.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        replace(aside, path)

    except OSError as error:  # it does not name the file when the disk is full
        problem = f"{path} could not be written ({error.strerror})"
        remedy = "what was written before is whole: make room, or give access there"
        raise CannotWrite(f"{problem}; {remedy}") from None

    finally:
        aside.unlink(missing_ok=True)


def replace(source: Path, target: Path) -> None:
    """`os.replace`, tried for two seconds: Windows refuses while another process reads the file."""
    for attempt in range(20):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if attempt == 19:
                raise
            time.sleep(0.1)


def save_torch(path: Path, value: Any) -> None:
    """`torch.save`, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    # Its bytes, which cost no copy; a view would outlive the buffer where the disk is full.
    write_atomically(path, buffer.getvalue())


def write_csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV, whole or not at all; a column that a row lacks stays empty there."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(file, text.getvalue().encode())


def check_output_dir(folder: Path) -> None:
    """Raise UserError unless `folder` is new or empty, and may be written to."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    check(
        existing.is_dir() and os.access(existing, os.W_OK),
        f"--output_dir {folder} cannot be made or written to (because of {existing}): "
        "take another folder",
    )
    full = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    remedy = f"take a new folder, or go on with --resume {folder}"
    check(not full, f"--output_dir {folder} is not empty: {remedy}")
