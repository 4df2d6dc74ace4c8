"""3x3 convolutions of small maps as matrix products: what makes small images fast on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SmallMapConv2d(nn.Conv2d):
    """A 3x3 convolution with padding 1 that, on the CPU, computes maps of up to 4x4 output pixels as matrix products.

    The same parameters and, to rounding, the same result, at up to several times the speed (benchmarks/convolution.py).
    It also avoids PyTorch's bfloat16 gradient for stride 2 on a single pixel, not even finite at times (2.14).
    """

    def forward(self, x: Tensor) -> Tensor:
        (height, width), stride = x.shape[2:], self.stride[0]
        if x.device.type != "cpu" or max(height, width) > 4 * stride:
            return super().forward(x)
        if max(height, width) <= 2:
            return self.dense(x)
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):
            x, weight = x.to(torch.get_autocast_dtype("cpu")), weight.to(torch.get_autocast_dtype("cpu"))
        return PatchConvolution.apply(x, weight, stride)

    def dense(self, x: Tensor) -> Tensor:
        """On at most 2x2 pixels every output sees every input pixel: the convolution is one matrix of its taps."""
        (b, _, height, width), stride = x.shape, self.stride[0]
        taps = self.weight.flatten(2).unbind(2)  # nine of (out, in); output pixel (y, x) sees input pixel (i, j)
        outputs = [(y, x) for y in range(0, height, stride) for x in range(0, width, stride)]
        inputs = [(i, j) for i in range(height) for j in range(width)]  # through tap (i - y + 1, j - x + 1)
        matrix = torch.cat([torch.cat([taps[3 * (i - y + 1) + j - x + 1] for i, j in inputs], 1) for y, x in outputs])
        result = nn.functional.linear(x.permute(0, 2, 3, 1).reshape(b, -1), matrix)  # (B, output pixels * out)
        return result.view(b, -(-height // stride), -(-width // stride), self.out_channels).permute(0, 3, 1, 2)


class PatchConvolution(torch.autograd.Function):
    """3x3 convolution, padding 1, by gathering every 3x3 patch: x (B, C, H, W), weight (O, C, 3, 3), stride."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        b, c, height, width = x.shape
        ctx.stride, ctx.input_shape = stride, (b, height, width, c)
        padded = nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        taps = [padded[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]
        patches = torch.cat(taps, dim=3)  # (B, H / stride, W / stride, 9 C), sides rounded up
        matrix = weight.permute(0, 2, 3, 1).reshape(len(weight), -1)  # (O, 9 C)
        ctx.save_for_backward(patches, matrix)
        return (patches @ matrix.T).permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        patches, matrix = ctx.saved_tensors
        (b, height, width, c), stride = ctx.input_shape, ctx.stride
        grad = grad_output.permute(0, 2, 3, 1)  # (B, H / stride, W / stride, O)
        grad_matrix = grad.flatten(0, 2).T @ patches.flatten(0, 2)  # (O, 9 C)
        padded = grad.new_zeros(b, height + 2, width + 2, c, dtype=torch.promote_types(grad.dtype, torch.float32))
        for tap, grad_tap in enumerate((grad @ matrix).split(c, dim=3)):  # each patch gives to the pixels it came from
            i, j = divmod(tap, 3)
            padded[:, i : i + height : stride, j : j + width : stride] += grad_tap
        grad_x = padded[:, 1:-1, 1:-1].permute(0, 3, 1, 2).to(grad.dtype)
        return grad_x, grad_matrix.view(-1, 3, 3, c).permute(0, 3, 1, 2), None
