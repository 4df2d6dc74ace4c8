"""What pretraining is about to do, said before it begins, and whether it can."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import functions as fn
from contrastive.arithmetic import in_words
from contrastive.memory import memory_line, needed_bytes
from functions import ImageDataset, check


def check_data(data: ImageDataset, config: Any) -> None:
    """Fail now rather than after hours of pretraining. Raises UserError."""
    if "pretrain" in config.stages_list:
        n = len(data.pretraining_images)
        check(n >= 2, f"--dataset {data.name}: {n} image is too few to learn from")
        most, wanted = n // config.processes, config.batch_size
        remedy = f"take at most {most}"
        problem = f"--batch_size {wanted} is too large for the {n:,} images of {data.name}"
        check(wanted <= most, f"{problem}: {remedy}")
        side, patch = data.train_images.shape[-1], 7 if config.stem == "imagenet" else 3
        problem = f"--whiten: images of {side} pixels have no patch of {patch} x {patch}"
        fits = side >= patch or not config.whiten
        check(fits, f"{problem}: leave it out, or give --image_size {patch}")


def print_model(model: nn.Module, data: ImageDataset, config: Any) -> None:
    """What learns, from what, and where, for people."""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    if "pretrain" in config.stages_list:
        n, side = len(data.pretraining_images), data.train_images.shape[-1]
        print(f"SimCLR on {data.name}: {n:,} images of {side} pixels for pretraining")
    stem = "" if config.encoder == "compact" else f", {config.stem} stem"
    print(f"{config.encoder}{stem}, {parameters:.1f} M parameters; {config.machine}")


def print_plan(module: Any, cost: dict[str, Any]) -> None:
    """What pretraining will do, for people: crops, batches, memory and arithmetic.

    cost: of `arithmetic`.
    """
    config, n = module.config, module.config.effective_batch_size
    if config.crop_size is not None:
        *before, (last, _) = module.crop_sizes
        crops = [f"{side} pixels until {share:.0%} of the steps" for side, share in before]
        crops.append(f"{last} pixels")
        print("crops of " + ", then ".join(crops))

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
