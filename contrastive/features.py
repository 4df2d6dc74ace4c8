"""Features to take away: h of every image of a set, with its label and its name."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import functions as fn
from contrastive.looking import thumbnail
from functions import ImageDataset, Subset

NO_LABEL = -1
MOST = 2000  # images for the projector
THUMBNAIL = 64  # pixels of a side, at most: TensorBoard lays all of them side by side in one image


def save_features(model: nn.Module, data: ImageDataset, machine: fn.Machine, folder: Path) -> None:
    """Leave what `model`, uint8 (B, C, H, W) -> (B, D), makes of all images of a set, as
    features.npz; and, of up to MOST of them, for TensorBoard's projector. The file holds

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

    vectors, numbers = torch.cat(h), torch.cat(labels)
    np.savez(
        whole := io.BytesIO(),
        h=vectors.numpy(),
        labels=numbers.numpy(),
        classes=np.array(data.classes, dtype=str),
        files=np.array(files, dtype=str),
        splits=np.array(splits, dtype=str),
    )
    file = folder / "features.npz"
    fn.write_atomically(file, whole.getvalue())
    print(f"features of {len(files):,} images in {file}")

    chosen = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:MOST].sort()[0]
    pictures = [images for images, _ in parts.values() if images is not None]
    classes = [*(fn.shown(name) for name in data.classes), "-"]  # the last one is NO_LABEL's
    rows = [[classes[int(numbers[i])], splits[i], fn.shown(files[i])] for i in chosen.tolist()]
    write_projector(vectors[chosen], small(pictures, chosen), rows, folder / "projector")


def small(parts: Sequence[Tensor | Subset], chosen: Tensor) -> Tensor:
    """Thumbnails of some images, uint8 (M, 3, side, side); indices count through all parts."""
    places = [(images, i) for images in parts for i in range(len(images))]
    some = (places[i] for i in chosen.tolist())
    return torch.stack([thumbnail(images, i, THUMBNAIL) for images, i in some])


@fn.drawing
def write_projector(h: Tensor, pictures: Tensor, rows: list[list[str]], folder: Path) -> None:
    """Vectors h (M, D), thumbnails, and [class, split, file] of each, for TensorBoard's embedding
    projector."""
    from torch.utils.tensorboard import SummaryWriter

    header = ["class", "split", "file"]
    with SummaryWriter(str(folder)) as writer:
        writer.add_embedding(
            h, metadata=rows, metadata_header=header, label_img=pictures / 255, tag="h"
        )
    print(f"  TensorBoard's projector: tensorboard --logdir {folder}")
