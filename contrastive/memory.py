"""How much memory a step of pretraining needs: known before it is spent.

What backward needs is kept from the forward pass, and grows with the views and their area; weights,
gradient and momentum do not. All of it is counted on tensors that have a shape and no values.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

import functions as fn


class Kept(saved_tensors_hooks):
    """Within this block, adds up the bytes that autograd keeps for backward, each storage once.

    Those of `known` tensors, the weights, are not counted.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__(self.pack, lambda tensor: tensor)
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.storages: dict[int, Any] = {}  # held, so that no other takes its number

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.storages[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def bytes_of_a_step(
    model: nn.Module,
    views: int,
    side: int,
    device: str = "cuda",
    reduced: torch.dtype | None = None,
) -> int:
    """Bytes for a step of `model` on so many views (views, 3, side, side), on such a device.

    Weights, their gradient and SGD's momentum, and what the forward pass keeps for backward; in
    float32, or under autocast to `reduced`. `model` may lie anywhere and is left as it is. What an
    operation needs for itself, and the loss, come on top.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        fake = fake_copy(model, device)
        parameters = list(fake.parameters())
        kept = Kept(parameters)
        x = torch.empty(views, 3, side, side, device=device)
        before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        torch.set_autocast_enabled(device, reduced is not None)
        torch.set_autocast_dtype(device, reduced or before[1])
        try:
            with kept:
                fake(x.contiguous(memory_format=torch.channels_last))
        finally:
            torch.set_autocast_enabled(device, before[0])
            torch.set_autocast_dtype(device, before[1])
            torch.clear_autocast_cache()
    return kept.bytes + 3 * sum(p.numel() * p.element_size() for p in parameters)


def fake_copy(model: nn.Module, device: str) -> nn.Module:
    """The same layers in training mode, of tensors without values. Within a FakeTensorMode."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        strides = tensor.stride()
        empty = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=device)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty) if is_parameter else empty
    return copy.deepcopy(model, memo).train()


def needed_bytes(module: Any) -> int:
    """What the largest step of a training will take of its device's memory."""
    config, machine = module.config, module.config.machine
    images = config.micro_batch_size or config.batch_size
    own = module.batches.tensors[0].shape[-1]
    side = max(side or own for side, _ in module.crop_sizes)
    reduced = fn.REDUCED.get(machine.precision)
    return bytes_of_a_step(module.model, config.views * images, side, machine.device, reduced)


def memory_line(needed: float, free: float) -> str:
    """What a step needs of the memory that is free, both in bytes: for people."""
    line = (
        f"a step needs about {needed / 2**30:.1f} GiB of the {free / 2**30:.1f} GiB that are free"
    )
    if needed < free:
        return line
    return f"warning: {line}: give --micro_batch_size, for the same result in less"
