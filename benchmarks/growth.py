"""How cost grows with the batch, the data set and the number of features: seconds, and memory.

    python -m benchmarks.growth

Memory is the peak in MiB.
"""

from __future__ import annotations

import itertools
import time
from functools import partial

import torch

import functions as fn
import simCLR
from benchmarks import common, usual
from contrastive import figures
from contrastive.probe import Features


def loss(n: int, masked: bool = False) -> float:
    """Seconds of one forward and backward pass of NT-Xent on n pairs."""
    torch.manual_seed(0)
    embeddings = torch.randn(2 * n, 128, requires_grad=True)
    common.prepare()
    f = usual.masked_copy_loss if masked else fn.nt_xent_loss

    def step() -> None:
        embeddings.grad = None
        f(embeddings).backward()

    return common.seconds(step, at_least=0.5, repeats=1, warm_up=1 if n <= 16384 else 0)


def pretraining(n: int, steps: int = 200) -> float:
    """Seconds to prepare pretraining on n images, and to make `steps` batches of views of them.

    Each batch has 256 pairs.
    """
    common.prepare()
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8)
    config = simCLR.Config(batch_size=256)

    start = time.perf_counter()
    normalize = fn.Normalize(images)
    batches = fn.Batches(images, batch_size=config.batch_size, seed=0, drop_last=True)
    epochs = itertools.chain.from_iterable(itertools.repeat(batches))
    for (batch,) in itertools.islice(epochs, steps):
        normalize(simCLR.random_views(batch, config))
    return time.perf_counter() - start


def features(n: int) -> Features:
    """n points of 512 dimensions around ten centres, and as many queries."""
    torch.manual_seed(0)
    labels = torch.arange(n) % 10
    centres = torch.randn(10, 512)
    bank, queries = (centres[labels] + torch.randn(n, 512) for _ in range(2))
    return Features(bank, labels, queries, labels, tuple("0123456789"))


def knn(n: int) -> float:
    """Seconds to classify n queries by their 200 nearest of n."""
    data = features(n)
    common.prepare()

    def classify() -> None:
        fn.knn_predict(data.test, data.train, data.train_labels, 10)

    return common.seconds(classify, at_least=0.5, repeats=1, warm_up=0)


def tsne(n: int) -> float:
    """Seconds of t-SNE of n points of 512 dimensions, PCA included."""
    data = features(n)
    start = time.perf_counter()
    figures.tsne_points(data.test, seed=0)
    return time.perf_counter() - start


def all_groups() -> common.Groups:
    """What grows, and the sizes at which it is measured."""
    pairs = (256, 1024, 4096, 16_384, 65_536)
    images = (5000, 50_000, 500_000)
    points = (1000, 5000, 10_000, 50_000)

    masked = partial(loss, masked=True)  # which needs memory in proportion to N^2
    views = "200 batches of 256 pairs of views, and their preparation, by images in the set"
    return {
        "NT-Xent, forward and backward, by pairs": {f"{n:,}": partial(loss, n) for n in pairs},
        "the same, from masked copies": {f"{n:,}": partial(masked, n) for n in pairs[:3]},
        views: {f"{n:,}": partial(pretraining, n) for n in images},
        "k-NN of as many queries, by features": {f"{n:,}": partial(knn, n) for n in points},
        "t-SNE, by features": {f"{n:,}": partial(tsne, n) for n in points[:3]},
    }


if __name__ == "__main__":
    common.main(
        "growth",
        all_groups(),
        about="How cost grows",
        unit="seconds, less is better",
        reference=None,
        rounds=1,
        memory=True,
    )
