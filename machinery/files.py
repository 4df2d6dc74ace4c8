"""Files that appear whole or not at all, and folders that one process has to itself."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from machinery.errors import CannotWrite, check


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Keep other processes that ask for it too out of `folder`, until this one leaves the block or ends in any way.

    Raises BlockingIOError if another is there and `wait` is false. Where a file system knows no locks, there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            import fcntl  # not on Windows

            file = stack.enter_context(open(folder / ".lock", "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                print(f"waiting for another process that is at work in {folder}", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        except BlockingIOError:
            raise
        except (ImportError, OSError):
            pass
        yield


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all: aside, synced to disk, then renamed over the old one. Raises CannotWrite."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:  # which does not name the file when the disk is full
        problem = f"{path} could not be written ({error.strerror}); what was written before is whole"
        raise CannotWrite(f"{problem}: make room, or give access there") from None
    finally:
        aside.unlink(missing_ok=True)


def save_torch(path: Path, value: Any) -> None:
    """`torch.save`, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomically(path, buffer.getbuffer())


def write_csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV, whole or not at all; a column that a row lacks stays empty there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(file, text.getvalue().encode())


def check_output_dir(folder: Path) -> None:
    """Raise UserError unless a run can be written to `folder`: one that is new or empty, where one may write."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    usable = existing.is_dir() and os.access(existing, os.W_OK)
    check(usable, f"--output_dir {folder} cannot be made or written to (because of {existing}): take another folder")
    full = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    check(not full, f"--output_dir {folder} is not empty: take a new folder, or go on with --resume {folder}")
