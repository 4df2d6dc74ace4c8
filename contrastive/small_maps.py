"""Layers of small maps as matrix products and means: what makes small images fast on a CPU.

The last layers of an encoder see 32-pixel images as maps of 4x4 pixels and less, for which a
library made for large maps takes up to several times as long (benchmarks/convolution.py).
"""

from __future__ import annotations

from typing import Any, Self, TypeGuard

import torch
from torch import Tensor, nn

SMALL = 4  # pixels a side of the largest map (the output's) that is computed this way


def use_small_maps(network: nn.Module) -> None:
    """Replace a network's 3x3 and 1x1 convolutions and its last mean by the layers below, with the
    same weights and names."""
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if is_plain(layer) and layer.kernel_size == (3, 3):
                setattr(module, name, SmallMapConv2d.of(layer))
            elif is_plain(layer) and layer.kernel_size == layer.stride == (1, 1):
                setattr(module, name, SmallMapPointwise.of(layer))
            elif isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1)):
                setattr(module, name, SmallMapMean(1))


def is_plain(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a convolution as the encoders here have them: one that keeps a map's size, or
    halves it, and has no bias."""
    if type(layer) is not nn.Conv2d or layer.bias is not None:
        return False
    same = layer.padding == tuple(side // 2 for side in layer.kernel_size)
    return same and layer.groups == 1 and layer.dilation == (1, 1)


class SameLayer(nn.Conv2d):
    """A convolution without bias that can be made of another."""

    @classmethod
    def of(cls, layer: nn.Conv2d) -> Self:
        """The same layer, computed this way."""
        # On the meta device: its own weights are not drawn, the random numbers of others stay.
        new = cls(
            layer.in_channels,
            layer.out_channels,
            kernel_size=layer.kernel_size[0],
            stride=layer.stride[0],
            padding=layer.kernel_size[0] // 2,
            bias=False,
            device="meta",
        )
        new.weight = layer.weight
        return new


class SmallMapMean(nn.AdaptiveAvgPool2d):
    """The mean over a map, (B, C, H, W) -> (B, C, 1, 1), whose gradient has the map's own layout.

    On the CPU only. PyTorch's has another, and the layer before pays for it.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)[:, :, None, None]


class SmallMapPointwise(SameLayer):
    """A 1x1 convolution that computes SMALL maps as one product, on the CPU only."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or max(x.shape[2:]) > SMALL:
            return super().forward(x)
        y = nn.functional.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1))
        return y.permute(0, 3, 1, 2)


class SmallMapConv2d(SameLayer):
    """A 3x3 convolution, padding 1, whose output is a SMALL map, computed as products.

    On the CPU only. The same parameters and, to rounding, the same result as nn.Conv2d's. It also
    avoids PyTorch's bfloat16 gradient for stride 2 on a single pixel, at times not even finite
    (2.14).
    """

    def forward(self, x: Tensor) -> Tensor:
        side, stride = max(x.shape[2:]), self.stride[0]
        if x.device.type != "cpu" or side > SMALL * stride:
            return super().forward(x)
        if side <= 2:
            return self.dense(x)

        weight = self.weight
        if torch.is_autocast_enabled("cpu"):  # which does not reach into an autograd.Function
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
        return PatchConvolution.apply(x, weight, stride)

    def dense(self, x: Tensor) -> Tensor:
        """The convolution of at most 2x2 pixels: one matrix, as every output sees every input."""
        b, _, height, width = x.shape
        stride = self.stride[0]
        out_height, out_width = ceil_div(height, stride), ceil_div(width, stride)
        outputs = [(stride * y, stride * x) for y in range(out_height) for x in range(out_width)]
        inputs = [(i, j) for i in range(height) for j in range(width)]

        taps = self.weight.flatten(2).unbind(2)  # nine of (out, in)

        def tap(y: int, x: int, i: int, j: int) -> Tensor:
            """The weights through which the output at (y, x) sees the input at (i, j)."""
            return taps[3 * (i - y + 1) + (j - x + 1)]

        rows = [torch.cat([tap(y, x, i, j) for i, j in inputs], dim=1) for y, x in outputs]
        matrix = torch.cat(rows)  # (output pixels * out, input pixels * in)
        pixels = x.permute(0, 2, 3, 1).reshape(b, -1)  # (B, input pixels * in)
        result = nn.functional.linear(pixels, matrix)  # (B, output pixels * out)
        return result.view(b, out_height, out_width, self.out_channels).permute(0, 3, 1, 2)


class PatchConvolution(torch.autograd.Function):
    """3x3 convolution, padding 1, by gathering every 3x3 patch of the map.

    x (B, C, H, W), weight (O, C, 3, 3), stride -> (B, O, H / stride, W / stride), rounded up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        b, c, height, width = x.shape
        ctx.stride = stride
        ctx.input_shape = (b, height, width, c)

        padded = nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        seen = [seen_by(tap, padded, height, width, stride) for tap in range(9)]
        patches = torch.cat(seen, dim=3)  # (B, H / stride, W / stride, 9 C)
        matrix = weight.permute(0, 2, 3, 1).reshape(len(weight), -1)  # (O, 9 C)
        ctx.save_for_backward(patches, matrix)
        return (patches @ matrix.T).permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        patches, matrix = ctx.saved_tensors
        b, height, width, c = ctx.input_shape
        grad = grad_output.permute(0, 2, 3, 1)  # (B, H / stride, W / stride, O)
        grad_matrix = grad.flatten(0, 2).T @ patches.flatten(0, 2)  # (O, 9 C)
        grad_weight = grad_matrix.view(-1, 3, 3, c).permute(0, 3, 1, 2)

        # Each patch gives to the pixels it came from; summed in float32 at least.
        dtype = torch.promote_types(grad.dtype, torch.float32)
        padded = grad.new_zeros(b, height + 2, width + 2, c, dtype=dtype)
        for tap, grad_tap in enumerate((grad @ matrix).split(c, dim=3)):
            seen_by(tap, padded, height, width, ctx.stride).add_(grad_tap)
        grad_x = padded[:, 1:-1, 1:-1].permute(0, 3, 1, 2).to(grad.dtype)
        return grad_x, grad_weight, None


def seen_by(tap: int, padded: Tensor, height: int, width: int, stride: int) -> Tensor:
    """The pixels that one of the nine taps sees: a view of `padded` (B, H + 2, W + 2, C)."""
    i, j = divmod(tap, 3)
    return padded[:, i : i + height : stride, j : j + width : stride]


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
