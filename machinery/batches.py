"""The order of an epoch: batches as slices of tensors on the device, and the seeds that decide it."""

from __future__ import annotations

from collections.abc import Iterator

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class Batches:
    """Batches as slices of tensors that already lie on the device: no worker processes, no per-image Python.

    Yields tuples of tensors (B, ...). With a `seed`, the order is a new permutation in every epoch, decided by
    (seed, epoch) alone, so that a resumed run sees what an uninterrupted one would have seen.

    Of `ranks` processes, each sees its own `batch_size` of every ranks * batch_size images of that order (`drop_last`
    then, so that all have a share): together they see what one process with the larger batch would have seen.
    """

    def __init__(
        self, *tensors: Tensor, batch_size: int, seed: int | None = None, drop_last: bool = False, ranks: int = 1
    ) -> None:
        self.tensors, self.batch_size, self.seed, self.drop_last = tensors, batch_size, seed, drop_last
        self.ranks, self.rank, self.epoch = ranks, 0, 0

    def __len__(self) -> int:
        n, step = len(self.tensors[0]), self.batch_size * self.ranks
        return n // step if self.drop_last else -(-n // step)

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
                yield tuple(tensor.index_select(0, order[start:stop]) for tensor in self.tensors)


def on_device(batches: Batches, device: torch.device) -> Batches:
    """The same batches with their tensors moved to `device`, once and for the whole run."""
    batches.tensors = tuple(tensor.to(device) for tensor in batches.tensors)
    return batches


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, such as (seed, epoch, rank); (3, 4) and (3, 4, 0) give different ones."""
    sequence = np.random.SeedSequence([len(numbers), *numbers])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


class EpochSeed(Callback):
    """Each epoch's order, augmentation and dropout follow from (seed, epoch) alone: a resumed run repeats them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        torch.manual_seed(mix_seed(self.seed, trainer.current_epoch, trainer.global_rank))
        assert isinstance(trainer.train_dataloader, Batches)
        trainer.train_dataloader.epoch, trainer.train_dataloader.rank = trainer.current_epoch, trainer.global_rank
