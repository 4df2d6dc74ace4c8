"""NT-Xent, forward and backward, for N pairs of embeddings of length 128.

python -m benchmarks.loss
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import functions as fn
from benchmarks import common, usual


def milliseconds(loss: Callable[[Tensor], Tensor], n: int) -> float:
    """Milliseconds of forward and backward on n pairs."""
    torch.manual_seed(0)
    embeddings = torch.randn(2 * n, 128, requires_grad=True)
    # All of them compute the very same quantity.
    torch.testing.assert_close(loss(embeddings), fn.nt_xent_loss(embeddings))

    def step() -> None:
        embeddings.grad = None
        loss(embeddings).backward()

    return 1000 * common.seconds(step)


def ours(n: int) -> float:
    common.prepare()
    return milliseconds(fn.nt_xent_loss, n)


def masked_copies(n: int) -> float:
    return milliseconds(usual.masked_copy_loss, n)


def masked_copies_with_our_memory_setting(n: int) -> float:
    common.prepare()
    return masked_copies(n)


def lightly_loss(n: int) -> float:
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature=0.5)
    return milliseconds(lambda z: loss(*z.chunk(2)), n)


def lightly_with_our_memory_setting(n: int) -> float:
    common.prepare()
    return lightly_loss(n)


def metric_learning_loss(n: int) -> float:
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    loss = SelfSupervisedLoss(NTXentLoss(temperature=0.5))
    return milliseconds(lambda z: loss(*z.chunk(2)), n)


CANDIDATES = {
    common.OURS: ours,
    "masked copies": masked_copies,
    "masked copies, with our memory setting": masked_copies_with_our_memory_setting,
    "lightly NTXentLoss": lightly_loss,
    "lightly, with our memory setting": lightly_with_our_memory_setting,
    "pytorch-metric-learning NTXentLoss": metric_learning_loss,
}

if __name__ == "__main__":
    groups: common.Groups = {
        f"N = {n}": {name: partial(f, n) for name, f in CANDIDATES.items()} for n in (256, 2048)
    }
    # It asks for 64 GiB there.
    del groups["N = 2048"]["pytorch-metric-learning NTXentLoss"]
    common.main(
        "loss",
        groups,
        about="NT-Xent, forward and backward",
        unit="milliseconds, less is better",
    )
