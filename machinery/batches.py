"""The order of an epoch: batches as slices of tensors, and the seeds that decide which."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from machinery.devices import free_memory

# A set is kept on its device if it takes no more than this share of the memory that is free there.
SHARE = 0.25


@dataclass
class Subset:
    """Some of a set's images, left where they lie: nothing is copied until it is asked for.

    images: (N, ...), or a Subset again. chosen: int64 (M,), indices of the images that belong to
    it, in its order.
    """

    images: Tensor | Subset
    chosen: Tensor

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, part: slice | Tensor) -> Tensor:
        return rows(self.images, self.chosen[part])

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), *self.images.shape[1:]

    @property
    def device(self) -> torch.device:
        return self.images.device


class Batches:
    """Batches as slices of tensors: no worker processes, and no Python per image.

    Takes tensors (N, ...) or Subsets of them, and yields tuples of tensors (B, ...). With a `seed`,
    each epoch has an order of its own that (seed, epoch) alone decide: a resumed run sees what an
    uninterrupted one would have seen.

    Of `ranks` processes, each sees its own `batch_size` of every ranks * batch_size images of that
    order. Together they see what one process with the larger batch would see. `drop_last` must
    then be true, so that all of them have a share of each step.
    """

    def __init__(
        self,
        *tensors: Tensor | Subset,
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
        self.device = torch.device("cpu")  # where batches are wanted
        self.kept = True  # the whole set is there

    def __deepcopy__(self, memo: dict[int, Any]) -> Batches:
        """A copy that shares the images: they may be larger than the memory."""
        return copy.copy(self)

    def __len__(self) -> int:
        n, step = len(self.tensors[0]), self.batch_size * self.ranks
        return n // step if self.drop_last else -(-n // step)  # the latter rounded up

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return self.all_here() if self.kept else self.one_ahead()

    def parts(self) -> Iterator[slice | Tensor]:
        """Which images each batch of this epoch has: a slice of the set, or indices int64 (B,)."""
        n = len(self.tensors[0])
        if self.seed is not None:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
            order = torch.randperm(n, generator=generator)
            order = order.to(self.tensors[0].device)

        for step in range(len(self)):
            start = (step * self.ranks + self.rank) * self.batch_size
            stop = min(start + self.batch_size, n)
            yield slice(start, stop) if self.seed is None else order[start:stop]

    def all_here(self) -> Iterator[tuple[Tensor, ...]]:
        """The batches of a set that lies where they are wanted."""
        for part in self.parts():
            yield self.take(part)

    def one_ahead(self) -> Iterator[tuple[Tensor, ...]]:
        """The same batches of a larger set: while one is computed with, a thread gathers the next.

        Its pages may have to come from the disk, and all of them to the device.
        """
        on_gpu = self.device.type == "cuda"

        def gather(part: slice | Tensor) -> tuple[Tensor, ...]:
            batch = tuple(rows_alone(tensor, part) for tensor in self.tensors)
            # Pinned memory alone is copied to a GPU while the GPU computes.
            return tuple(t.pin_memory() for t in batch) if on_gpu else batch

        with ThreadPoolExecutor(1) as thread:
            parts = self.parts()
            ahead = [thread.submit(gather, part) for part in islice(parts, 1)]
            while ahead:
                batch = ahead.pop().result()
                ahead = [thread.submit(gather, part) for part in islice(parts, 1)]
                yield tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)

    def take(self, part: slice | Tensor) -> tuple[Tensor, ...]:
        """One batch, on the device where the set lies."""
        return tuple(rows(tensor, part) for tensor in self.tensors)

    def to(self, device: torch.device) -> Batches:
        """The same batches on `device`, with the whole set if it fits there."""
        moved = copy.copy(self)
        moved.device = device
        moved.kept = self.fits(device)
        if moved.kept and device.type != "cpu":
            moved.tensors = tuple(tensor[:].to(device) for tensor in self.tensors)
        return moved

    @property
    def bytes(self) -> int:
        """What all images of the set take."""
        return sum(len(t) * rows(t, slice(0, 1)).nbytes for t in self.tensors)

    def fits(self, device: torch.device) -> bool:
        """Whether `device` has room for the whole set beside the training."""
        return self.bytes <= SHARE * free_memory(device)

    def where(self, device: torch.device) -> str:
        """Where the images are during training: for people."""
        mib = self.bytes / 2**20
        size = f"{mib:,.0f} MiB of images" if mib > 10 else f"{mib:.1f} MiB of images"
        if self.fits(device):
            return f"{size}, kept in the memory of the {device.type}"
        free = f"{free_memory(device) / 2**20:,.0f} MiB that are free on the {device.type}"
        return f"{size}, too much for the {free}: each batch is gathered one step ahead"


def rows(tensor: Tensor | Subset, part: slice | Tensor) -> Tensor:
    """Rows of a set, given by a slice or by indices int64 (B,)."""
    if isinstance(tensor, Tensor) and isinstance(part, Tensor):
        return tensor.index_select(0, part)
    return tensor[part]


def rows_alone(tensor: Tensor | Subset, part: slice | Tensor) -> Tensor:
    """The same rows, gathered by one thread.

    PyTorch would wake threads of its own for it, which take the cores from those that train.
    """
    if isinstance(tensor, Subset):
        return rows_alone(tensor.images, tensor.chosen[part])
    if isinstance(part, slice):
        return tensor[part]
    return torch.from_numpy(tensor.numpy().take(part.numpy(), axis=0))


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
