"""What says, while pretraining goes on, whether it learns."""

from __future__ import annotations

from typing import Any

import functions as fn
from functions import ImageDataset


def knn_monitor(data: ImageDataset, seed: int) -> tuple[Any, ...] | None:
    """Up to 5,000 bank and 1,000 query images with labels, stratified, from the training set; None without labels."""
    images, labels = data.train_images, data.train_labels
    if labels is None or len(data.classes) < 2 or len(labels) < 2 * len(data.classes):
        return None
    queries = fn.stratified_subset(labels, min(0.1, 1000 / len(labels)), seed)
    rest = fn.complement(queries, len(labels))
    bank = rest[fn.stratified_subset(labels[rest], min(1.0, 5000 / len(rest)), seed)]
    return images[bank], labels[bank], images[queries], labels[queries], len(data.classes)
