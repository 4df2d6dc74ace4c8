"""What says, while pretraining goes on, whether it learns.

The loss alone does not: it may look flat while the representation gets better, and fall while all
embeddings become one.
"""

from __future__ import annotations

from dataclasses import dataclass

import lightning
import torch
import torch.nn.functional as F
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
    rest, queries = fn.stratified_split(labels, min(0.1, 1000 / len(labels)), seed)
    bank = rest[fn.stratified_subset(labels[rest], min(1.0, 5000 / len(rest)), seed)]
    return KnnMonitor(
        images[bank], labels[bank], images[queries], labels[queries], len(data.classes)
    )


# ------------------------------------------------------------------------------------------------
# Of the embeddings of a batch
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def batch_signals(embeddings: Tensor, views: int, most: int = 512) -> dict[str, float]:
    """How well the views of an image find each other, and how the embeddings lie on the sphere.

    embeddings: (M N, D), rows i, i + N ... of image i; of no more than `most` images. A view's
    positive is ranked among the views of other images by its similarity: 1 is the nearest.

    - contrastive_accuracy, contrastive_top5: the share of positives of rank 1, of rank 5 or less
    - positive_rank: the mean rank
    - alignment: the mean squared distance of positives, 0 at best (Wang & Isola 2020, arXiv
      2005.10242, Section 4.1, alpha = 2)
    - uniformity: log of the mean of exp(-2 |z - z'|^2) over pairs of images, the lower the more
      evenly they are spread (same section, t = 2)
    - rank_z: `effective_rank` of all of them
    """
    by_view = embeddings.float().unflatten(0, (views, -1))[:, :most]  # (M, N, D)
    z = F.normalize(by_view, dim=2)
    n = z.shape[1]
    flat = z.flatten(0, 1)  # (M N, D)
    similarity = flat @ flat.T
    image = torch.arange(n, device=z.device).repeat(views)
    same = image.unsqueeze(1) == image  # (M N, M N): of the same image, or the view itself
    negatives = similarity.masked_fill(same, -torch.inf)

    ranks, distances = [], []
    for turn in range(1, views):
        positive = (flat * flat.roll(-turn * n, 0)).sum(1, keepdim=True)  # (M N, 1)
        ranks.append(1 + (negatives > positive).sum(1).float())
        distances.append(2 - 2 * positive)
    rank = torch.cat(ranks)

    pairs = torch.ones(n, n, dtype=torch.bool, device=z.device).triu(1)
    apart = (2 - 2 * z[0] @ z[0].T)[pairs] if n > 1 else z.new_zeros(1)
    return {
        "contrastive_accuracy": float((rank == 1).float().mean()),
        "contrastive_top5": float((rank <= 5).float().mean()),
        "positive_rank": float(rank.mean()),
        "alignment": float(torch.cat(distances).mean()),
        "uniformity": float((-2 * apart).exp().mean().log()),
        "rank_z": effective_rank(by_view.flatten(0, 1)),
    }


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """How many directions features (N, D) fill: 1 if all are alike, min(N, D) if all are equal.

    The exponential of the entropy of their singular values (RankMe: Garrido et al. 2023, arXiv
    2210.02885, Eq. 1).
    """
    values = torch.linalg.svdvals(features.float())
    p = values / values.sum().clamp_min(1e-12)
    return float(torch.exp(-(p * (p + 1e-7).log()).sum()))


def collapse(signals: dict[str, float]) -> str | None:
    """What to say if the embeddings have become one; None if they have not."""
    if signals["rank_z"] >= 2 or signals["uniformity"] < -0.2:
        return None
    causes = "too high a --learning_rate, or augmentation that leaves nothing to tell images apart"
    found = f"rank {signals['rank_z']:.1f}, uniformity {signals['uniformity']:.2f}"
    return f"warning: the embeddings have collapsed into one point ({found}): {causes}"


# ------------------------------------------------------------------------------------------------
# Of the representations of the monitor's images
# ------------------------------------------------------------------------------------------------


class Monitored(lightning.LightningModule):
    """The validation half of pretraining: a k-NN check of h on the monitor's images.

    Subclasses say what h is. Without a monitor there is no check. `epoch_signals` go into the
    epoch's row.
    """

    def __init__(self, monitor: KnnMonitor | None, knn_k: int, knn_temperature: float) -> None:
        super().__init__()
        self.monitor = monitor
        self.knn_k = knn_k
        self.knn_temperature = knn_temperature
        self.features: list[Tensor] = []
        self.epoch_signals: dict[str, float] = {}
        self.has_warned = False

    def watch(self, embeddings: Tensor, views: int) -> None:
        """Take the signals of a batch's embeddings for this epoch; warns once of a collapse."""
        self.epoch_signals = batch_signals(embeddings.detach(), views)
        words = collapse(self.epoch_signals)
        if words is not None and not self.has_warned:
            self.has_warned = True
            self.print(words)

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
        self.log("rank_h", effective_rank(h[:2000]), logger=False, sync_dist=True)
