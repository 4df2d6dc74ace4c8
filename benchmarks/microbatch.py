"""What a step of SimCLR costs with the batch, as a whole and in micro-batches.

    python -m benchmarks.microbatch

Seconds, and the peak of memory in MiB.
"""

from __future__ import annotations

from functools import partial

import torch

import functions as fn
import simCLR
from benchmarks import common


def step(n: int, micro: int | None) -> float:
    """Seconds of one step of pretraining with n pairs of 32 x 32 images: ResNet-18, imagenet stem.

    micro: the size of the micro-batches, or None for the whole batch at once.
    """
    torch.manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8)
    config = simCLR.Config(
        stem="imagenet",
        batch_size=n,
        micro_batch_size=micro,
        epochs=3,
        accelerator="cpu",
    )
    encoder, feature_dim = simCLR.build_encoder(config.encoder, config.stem)
    model = simCLR.SimCLRModel(encoder, feature_dim, config.hidden_dim, config.embedding_dim)

    log = fn.EpochLog(quiet=True)
    trainer = fn.make_trainer(config.machine, config.seed, config.epochs, log, limit_val_batches=0)
    kind = simCLR.CachedPretraining if micro else simCLR.Pretraining
    fn.fit(trainer, kind(model, images, None, config))
    return min(row["seconds"] for row in log.rows[1:])  # an epoch is a step; the first warms up


if __name__ == "__main__":
    sizes = (256, 1024, 4096, 16_384)
    whole = "a step of SimCLR (ResNet-18, imagenet stem), by pairs"
    groups: common.Groups = {
        whole: {f"{n:,}": partial(step, n, None) for n in sizes[:-1]},
        "the same in micro-batches of 256": {f"{n:,}": partial(step, n, 256) for n in sizes},
    }
    common.main(
        "microbatch",
        groups,
        about="Micro-batches",
        unit="seconds, less is better",
        reference=None,
        rounds=1,
        memory=True,
    )
