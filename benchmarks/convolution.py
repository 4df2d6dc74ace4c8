"""3 x 3 convolutions of small maps on the CPU: PyTorch's own, one dense matrix, or patches.

    python -m benchmarks.convolution

Forward and backward of ResNet-18's layers, for the map sizes that occur with small images. This
decides which maps small_maps.SmallMapConv2d takes over, and how.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks import common
from contrastive.small_maps import PatchConvolution, SmallMapConv2d

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
    return groups


if __name__ == "__main__":
    common.main(
        "convolution",
        all_groups(),
        about=f"Forward and backward of 3 x 3 convolutions, {BATCH} images",
        unit="milliseconds, less is better",
        fresh=False,
    )
