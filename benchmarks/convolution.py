"""Layers of small maps on the CPU: PyTorch's own, one dense matrix, or patches.

    python -m benchmarks.convolution

Forward and backward of ResNet-18's 3 x 3 convolutions, for the map sizes that occur with small
images, and of what widens a last map (--feature_dim) and averages it. This decides which maps
small_maps takes over, and how.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import common
from contrastive.small_maps import PatchConvolution, SmallMapConv2d, use_small_maps

SHAPES = [  # channels in, channels out, side of the map, stride
    (512, 512, 1, 1),
    (256, 512, 2, 2),
    (256, 256, 2, 1),
    (512, 512, 2, 1),
    (256, 512, 4, 2),
    (256, 256, 4, 1),
    (512, 512, 4, 1),
    (128, 128, 8, 1),
    (256, 256, 8, 1),
    (128, 256, 8, 2),
    (256, 512, 8, 2),
]
WIDENED = [  # channels in, channels out, side of the map: the last layers, with --feature_dim
    (512, 2048, 2),
    (512, 4096, 2),
    (512, 2048, 4),
    (512, 2048, 8),
]
BATCH = 256


def milliseconds(shape: tuple[int, int, int, int], dtype: torch.dtype, way: str) -> float:
    """Milliseconds of forward and backward of one layer, computed in one of four ways."""
    common.prepare()
    channels_in, channels_out, side, stride = shape
    x = torch.randn(BATCH, channels_in, side, side)
    x = x.to(dtype, memory_format=torch.channels_last).requires_grad_()
    layer = SmallMapConv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
    layer.to(dtype).to(memory_format=torch.channels_last)

    forward = {
        "PyTorch": lambda: F.conv2d(x, layer.weight, stride=stride, padding=1),
        "dense matrix": lambda: layer.dense(x),
        "patches": lambda: PatchConvolution.apply(x, layer.weight, stride),
        common.OURS: lambda: layer(x),
    }[way]
    gradient = torch.randn_like(forward())

    def both() -> None:
        torch.autograd.grad(forward(), (x, layer.weight), gradient)

    return 1000 * common.seconds(both, at_least=0.5)


def milliseconds_to_widen(shape: tuple[int, int, int], dtype: torch.dtype, way: str) -> float:
    """Milliseconds of forward and backward of a 1 x 1 convolution, ReLU and mean over the map."""
    common.prepare()
    channels_in, channels_out, side = shape
    x = torch.randn(BATCH, channels_in, side, side)
    x = x.to(dtype, memory_format=torch.channels_last).requires_grad_()
    wide = nn.Conv2d(channels_in, channels_out, kernel_size=1, bias=False)
    layers = nn.Sequential(wide, nn.ReLU(), nn.AdaptiveAvgPool2d(1)).to(dtype)
    if way == common.OURS:
        use_small_maps(layers)
    layers.to(memory_format=torch.channels_last)
    gradient = torch.randn(BATCH, channels_out, 1, 1).to(dtype)

    def both() -> None:
        torch.autograd.grad(layers(x), (x, *layers.parameters()), gradient)

    return 1000 * common.seconds(both, at_least=0.5)


def all_groups() -> common.Groups:
    """A group for each type and shape; a dense matrix is an option for maps of 2 x 2 at most."""
    groups: common.Groups = {}
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            channels_in, channels_out, side, stride = shape
            kind = str(dtype).removeprefix("torch.")
            layer = f"{channels_in} -> {channels_out}, {side} x {side}, stride {stride}"
            ways = [common.OURS, "PyTorch", "patches"]
            if side <= 2:
                ways.append("dense matrix")
            groups[f"{kind}, {layer}"] = {
                way: partial(milliseconds, shape, dtype, way) for way in ways
            }
        for wide in WIDENED:
            layer = f"{kind}, {wide[0]} -> {wide[1]}, 1 x 1 on {wide[2]} x {wide[2]}, then mean"
            groups[layer] = {
                way: partial(milliseconds_to_widen, wide, dtype, way)
                for way in (common.OURS, "PyTorch")
            }
    return groups


if __name__ == "__main__":
    common.main(
        "convolution",
        all_groups(),
        about=f"Forward and backward of layers of small maps, {BATCH} images",
        unit="milliseconds, less is better",
        fresh=False,
    )
