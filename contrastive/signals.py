"""What says, while pretraining goes on, whether it learns."""

from __future__ import annotations

from dataclasses import dataclass

import lightning
import torch
from torch import Tensor

import functions as fn
from functions import Batches, ImageDataset


@dataclass
class KnnMonitor:
    """Labelled *training* images on which the encoder is checked by k-NN while it learns.

    bank, queries: uint8 (M, 3, H, W) and (Q, 3, H, W); their labels int64. Each query is
    classified by its nearest images in the bank.
    """

    bank: Tensor
    bank_labels: Tensor
    queries: Tensor
    query_labels: Tensor
    num_classes: int

    def accuracy(self, h: Tensor, k: int, temperature: float) -> float:
        """k-NN accuracy of the queries; h (M + Q, D) are the features of bank and queries."""
        m = len(self.bank)
        labels = self.bank_labels.to(h.device)
        predicted = fn.knn_predict(h[m:], h[:m], labels, self.num_classes, k, temperature)
        return fn.accuracy(predicted.cpu(), self.query_labels)


def knn_monitor(data: ImageDataset, seed: int) -> KnnMonitor | None:
    """Up to 5,000 bank and 1,000 query images, stratified, of the training set.

    None for a set without labels, or with too few of them.
    """
    images, labels = data.train_images, data.train_labels
    if labels is None or len(data.classes) < 2 or len(labels) < 2 * len(data.classes):
        return None

    # Training images, not test images: whoever watches this number chooses by it.
    queries = fn.stratified_subset(labels, min(0.1, 1000 / len(labels)), seed)
    rest = fn.complement(queries, len(labels))
    bank = rest[fn.stratified_subset(labels[rest], min(1.0, 5000 / len(rest)), seed)]
    return KnnMonitor(
        images[bank], labels[bank], images[queries], labels[queries], len(data.classes)
    )


class Monitored(lightning.LightningModule):
    """The validation half of pretraining: a k-NN check of h on the monitor's images.

    Subclasses say what h is. Without a monitor there is no check.
    """

    def __init__(self, monitor: KnnMonitor | None, knn_k: int, knn_temperature: float) -> None:
        super().__init__()
        self.monitor = monitor
        self.knn_k = knn_k
        self.knn_temperature = knn_temperature
        self.features: list[Tensor] = []

    def represent(self, images: Tensor) -> Tensor:
        """h of un-augmented images: uint8 (B, 3, H, W) -> (B, D)."""
        raise NotImplementedError

    def val_dataloader(self) -> Batches:
        assert self.monitor is not None
        images = torch.cat([self.monitor.bank, self.monitor.queries])
        return Batches(images, batch_size=500).to(self.device)

    def validation_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        self.features.append(self.represent(batch[0]).float())

    def on_validation_epoch_end(self) -> None:
        assert self.monitor is not None
        h = torch.cat(self.features)
        self.features.clear()  # they would be kept until the next check otherwise
        accuracy = self.monitor.accuracy(h, self.knn_k, self.knn_temperature)
        self.log("knn_accuracy", accuracy, logger=False, sync_dist=True)
