"""What it costs to say, after each epoch, whether it learns.

    python -m benchmarks.signals

Milliseconds: a step of SimCLR, and all signals of an epoch but k-NN, which --knn_every spaces.
"""

from __future__ import annotations

from functools import partial

import torch

import functions as fn
import simCLR
from benchmarks import common
from contrastive.signals import batch_signals, effective_rank

STEPS = 50_000 // 256
"""of an epoch of CIFAR-10"""


def step(views: int) -> float:
    """Milliseconds of one step on 16-pixel crops: ResNet-18, cifar stem, 512 views in all."""
    n = 512 // views
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4 * n, 3, 32, 32), dtype=torch.uint8)
    config = simCLR.Config(batch_size=n, views=views, epochs=3, crop_size=16, accelerator="cpu")
    encoder, feature_dim = simCLR.build_encoder(config.encoder, config.stem)
    model = simCLR.SimCLRModel(encoder, feature_dim, config.hidden_dim, config.embedding_dim)

    log = fn.EpochLog(quiet=True)
    trainer = fn.make_trainer(config.machine, config.seed, config.epochs, log, limit_val_batches=0)
    fn.fit(trainer, simCLR.Pretraining(model, images, None, config))
    fastest = min(row["seconds"] for row in log.rows[1:])  # the first epoch warms up
    return 1e3 * fastest / 4


def signals(views: int) -> float:
    """Milliseconds of an epoch's signals: of 512 embeddings, and of 2,000 representations."""
    torch.manual_seed(0)
    z, h = torch.randn(512, 128), torch.randn(2000, 512)
    common.prepare()

    def all_signals() -> None:
        batch_signals(z, views)
        effective_rank(h)

    return 1e3 * common.seconds(all_signals)


if __name__ == "__main__":
    groups: common.Groups = {
        f"{views} views (an epoch of CIFAR-10 has {STEPS * views // 2} steps)": {
            "a step": partial(step, views),
            "the signals of an epoch": partial(signals, views),
        }
        for views in (2, 4)
    }
    common.main(
        "signals",
        groups,
        about="What the signals cost",
        unit="milliseconds, less is better",
        reference=None,
    )
