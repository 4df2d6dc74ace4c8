"""The arithmetic of pretraining, counted: machines differ, multiply-accumulates do not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from contrastive.memory import fake_copy
from contrastive.muon import orthogonalization_macs

T = 3.33e15
"""The unit: ResNet-18 with torchvision's stem (37.0 M multiply-accumulates at 32 pixels), 300
epochs of 50,000 images, two views, three passes each. The textbook run."""


def macs_of(model: nn.Module, side: int) -> int:
    """Multiply-accumulates of one forward pass of one image (3, side, side).

    Convolutions with the taps that fall on their padding, and linear layers, as PyTorch's own
    counter has them. Whatever shortcut computes a convolution does not count less: `model` is
    copied with plain ones, of tensors that have no values, and is left as it is.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        # Not "cpu", the only device on which small maps are computed in another way.
        plain = fake_copy(model, "meta").eval()
        x = torch.empty(2, 3, side, side, device="meta")  # of one, GroupNorm may have too little
        with FlopCounterMode(display=False) as counter:
            plain(x)
    # Of two images; the counter counts a product and its addition as two.
    return counter.get_total_flops() // 4


def arithmetic(module: Any) -> dict[str, Any]:
    """What a `Pretraining` will have done at its end, for results.json.

    macs_per_image: `macs_of` one view, averaged over the steps of the crop schedule. macs: those of
    all views, forward and backward, which is two passes: the gradients with respect to inputs and
    to weights. Gradient caching has a second forward pass. The products of Muon count, too: every
    process computes them.
    """
    config, own = module.config, module.batches.tensors[0].shape[-1]
    steps = config.epochs * len(module.batches)
    sides = Counter(module.side_at(step / steps) for step in range(steps))
    total = sum(count * macs_of(module.model, side or own) for side, count in sides.items())

    images = steps * config.effective_batch_size
    passes = 3 if config.micro_batch_size is None else 4
    per_view = total / steps
    of_muon = 0
    if config.optimizer == "muon":
        weights = (p.shape for p in module.model.parameters() if p.ndim > 1)
        of_muon = config.processes * steps * sum(map(orthogonalization_macs, weights))
    return {
        "views": config.views,
        "images_seen": images,
        "macs_per_image": round(per_view),
        "macs": round(passes * per_view * config.views * images) + of_muon,
    }


def in_words(macs: float) -> str:
    """An amount of arithmetic for people: 1.25e+14 multiply-accumulates = 0.038 T."""
    return f"{macs:.3g} multiply-accumulates = {macs / T:.2g} T"
