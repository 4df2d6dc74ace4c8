"""Checkpoints on disk: written whole or not at all, read as data, with one before the newest."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from machinery.errors import UserError, check
from machinery.files import replace, save_torch


class SafeCheckpoints(TorchCheckpointIO):
    """A checkpoint appears whole or not at all, and the one before it is kept beside it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name("fresh.ckpt")
        save_torch(fresh, checkpoint)
        if path.is_file():
            replace(path, previous(path))
        replace(fresh, path)


def previous(checkpoint: Path) -> Path:
    """Where the checkpoint before `checkpoint` is kept."""
    return checkpoint.with_name(f"previous-{checkpoint.name}")


def newest_sound(checkpoint: Path) -> Path | None:
    """`checkpoint`, or the one before it if that is damaged, or None where there is none.

    Says so if it is damaged. Raises UserError if all there are damaged.
    """
    there = [path for path in (checkpoint, previous(checkpoint)) if path.is_file()]
    for path in there:
        try:
            load_checkpoint(path)
        except UserError:
            continue
        if path != there[0]:
            print(f"warning: {there[0]} is damaged; going on from {path}", file=sys.stderr)
            # The next checkpoint would move the damaged one over the sound one.
            there[0].unlink(missing_ok=True)
        return path

    remedy = "start afresh, without --resume"
    check(not there, f"--resume: every checkpoint in {checkpoint.parent} is damaged; {remedy}")
    return None


def load_checkpoint(file: Path) -> dict[str, Any]:
    """Read a checkpoint as data, on the CPU. Raises UserError if it holds code or is damaged."""
    try:
        with zipfile.ZipFile(file) as archive:  # PyTorch writes checksums, but never compares them
            if archive.testzip() is not None:
                raise ValueError
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file can fail in many ways
        problem = f"{file} is damaged, or no checkpoint of plain data"
        raise UserError(f"{problem}: take another, or start afresh") from None
