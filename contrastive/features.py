"""Features to take away: h of every image of a set, with its label and its name."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import functions as fn
from contrastive.looking import thumbnail
from functions import ImageDataset

NO_LABEL = -1
MOST = 2000  # images for the projector
THUMBNAIL = 64  # pixels of a side, at most: TensorBoard lays all of them side by side in one image


def save_features(model: nn.Module, data: ImageDataset, machine: fn.Machine, folder: Path) -> None:
    """Leave what `model`, uint8 (B, C, H, W) -> (B, D), makes of all images of a set: features.npz,
    and what TensorBoard's projector reads. The file has

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
    names = [*data.classes, "-"]  # the last one is NO_LABEL's
    classes = [names[label] for label in numbers.tolist()]
    rows = [list(row) for row in zip(classes, splits, files, strict=True)]
    write_projector(vectors, rows, data, folder / "projector")


@fn.drawing
def write_projector(h: Tensor, rows: list[list[str]], data: ImageDataset, folder: Path) -> None:
    """Up to MOST images of a set for TensorBoard's embedding projector, with thumbnails: h of all
    of them, float32 (N, D), and of each its class, split and file."""
    from torch.utils.tensorboard import SummaryWriter

    parts = (data.train_images, data.test_images, data.unlabelled_images)
    places = [(part, i) for part in parts if part is not None for i in range(len(part))]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
    chosen = order[:MOST].sort().values.tolist()
    some = (places[i] for i in chosen)
    pictures = torch.stack([thumbnail(part, i, THUMBNAIL) for part, i in some])
    with SummaryWriter(str(folder)) as writer:
        writer.add_embedding(
            h[chosen],
            metadata=[[fn.shown(word) for word in rows[i]] for i in chosen],
            metadata_header=["class", "split", "file"],
            label_img=pictures / 255,
            tag="h",
        )
    print(f"  TensorBoard's projector: tensorboard --logdir {folder}")
