"""Features to take away: h of every image of a set, with its label and its name."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import nn

import functions as fn
from functions import ImageDataset

NO_LABEL = -1


def save_features(model: nn.Module, data: ImageDataset, machine: fn.Machine, file: Path) -> None:
    """Leave what `model`, uint8 (B, C, H, W) -> (B, D), makes of all images of a set, as .npz.

    - h: float32 (N, D)
    - labels: int64 (N,), indices into classes; -1 for an image without a label
    - classes: their names (K,)
    - files: what each image is called (N,): its path in the folder, or its number
    - splits: the part it belongs to (N,): train, test or unlabelled
    """
    h, labels, files, splits = [], [], [], []
    parts = {
        "train": (data.train_images, data.train_labels),
        "test": (data.test_images, data.test_labels),
        "unlabelled": (data.unlabelled_images, None),
    }
    for part, (images, known) in parts.items():
        if images is None:
            continue
        h.append(fn.extract_features(model, images, machine))
        labels.append(torch.full((len(images),), NO_LABEL) if known is None else known)
        files += data.names(part)
        splits += [part] * len(images)

    np.savez(
        whole := io.BytesIO(),
        h=torch.cat(h).numpy(),
        labels=torch.cat(labels).numpy(),
        classes=np.array(data.classes, dtype=str),
        files=np.array(files, dtype=str),
        splits=np.array(splits, dtype=str),
    )
    fn.write_atomically(file, whole.getvalue())
    print(f"features of {len(files):,} images in {file}")
