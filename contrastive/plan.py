"""What pretraining is about to do, said before it begins."""

from __future__ import annotations

from typing import Any

import torch

import functions as fn
from contrastive.arithmetic import in_words
from contrastive.memory import memory_line, needed_bytes


def print_plan(module: Any, cost: dict[str, Any]) -> None:
    """What pretraining will do, for people: crops, batches, memory and arithmetic.

    cost: of `arithmetic`.
    """
    config, n = module.config, module.config.effective_batch_size
    if config.crop_size is not None:
        crops = [f"{side} pixels until {share:.0%}" for side, share in module.crop_sizes]
        print("crops of " + ", ".join(crops))

    batch = str(n)
    if n != config.batch_size:
        nodes = f" x {config.num_nodes} nodes" if config.num_nodes > 1 else ""
        batch += f" = {config.batch_size} x {config.devices} devices{nodes}"
    if config.micro_batch_size:
        batch += f", in micro-batches of {config.micro_batch_size}"
    images = f"{len(module.batches.tensors[0]):,} images without labels"
    steps = f"{len(module.batches)} steps an epoch"
    negatives = config.views * (n - 1)
    if config.views > 2:
        batch += f" x {config.views} views"
    print(f"pretraining on {images}: batch {batch} ({negatives:,} negatives per view), {steps}")

    device = torch.device(config.machine.device)
    print(module.batches.where(device))
    if device.type == "cuda":
        print(memory_line(needed_bytes(module), fn.free_memory(device)))
    each = f"{cost['macs_per_image'] / 1e6:,.1f} M multiply-accumulates a view"
    print(f"{each}; in all {in_words(cost['macs'])}")
