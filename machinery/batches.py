"""The order of an epoch: batches as slices of tensors, and the seeds that decide which."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class Batches:
    """Batches as slices of tensors: no worker processes, and no Python per image.

    Yields tuples of tensors (B, ...). With a `seed`, each epoch has an order of its own that
    (seed, epoch) alone decide: a resumed run sees what an uninterrupted one would have seen.

    Of `ranks` processes, each sees its own `batch_size` of every ranks * batch_size images of that
    order. Together they see what one process with the larger batch would see. `drop_last` must
    then be true, so that all of them have a share of each step.
    """

    def __init__(
        self,
        *tensors: Tensor,
        batch_size: int,
        seed: int | None = None,
        drop_last: bool = False,
        ranks: int = 1,
    ) -> None:
        self.tensors = tensors
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.ranks = ranks

        self.rank = 0
        self.epoch = 0

    def __len__(self) -> int:
        n, step = len(self.tensors[0]), self.batch_size * self.ranks
        return n // step if self.drop_last else -(-n // step)  # the latter rounded up

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        n = len(self.tensors[0])
        if self.seed is not None:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
            order = torch.randperm(n, generator=generator).to(self.tensors[0].device)

        for step in range(len(self)):
            start = (step * self.ranks + self.rank) * self.batch_size
            stop = min(start + self.batch_size, n)
            if self.seed is None:
                yield tuple(tensor[start:stop] for tensor in self.tensors)
            else:
                chosen = order[start:stop]
                yield tuple(tensor.index_select(0, chosen) for tensor in self.tensors)

    def to(self, device: torch.device) -> Batches:
        """The same batches, of tensors that lie on `device`."""
        moved = copy.copy(self)
        moved.tensors = tuple(tensor.to(device) for tensor in self.tensors)
        return moved


class EpochSeed(Callback):
    """Each epoch's order, augmentation and dropout follow from (seed, epoch) alone.

    So a resumed run repeats them.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        batches, epoch, rank = trainer.train_dataloader, trainer.current_epoch, trainer.global_rank
        assert isinstance(batches, Batches)
        batches.epoch = epoch
        batches.rank = rank
        torch.manual_seed(mix_seed(self.seed, epoch, rank))


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, such as (seed, epoch, rank).

    Their count is mixed in: (3, 4) and (3, 4, 0) give different seeds.
    """
    sequence = np.random.SeedSequence([len(numbers), *numbers])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)
