"""What encoders are made of, and a small one that learns more from the same arithmetic."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups, or fewer: they divide the channels, and have two of them at least.

    Its statistics are of one image alone; of one channel alone they would take its colours away.
    """
    groups = min(math.gcd(32, channels), max(1, channels // 2))
    return nn.GroupNorm(groups, channels)


NORMS: dict[str, Any] = {"batch": nn.BatchNorm2d, "group": group_norm}
EncoderName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "compact"]
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "leaky_relu": nn.LeakyReLU}


def widened(channels: int, width: float) -> int:
    """`width` times as many channels, to the nearest multiple of eight, which processors like."""
    return channels if width == 1 else max(8, 8 * round(channels * width / 8))


def head_norm(kind: str, width: int) -> list[nn.Module]:
    """What normalises a hidden layer of the head: (B, width) -> (B, width)."""
    if kind == "none":
        return []
    return [nn.BatchNorm1d(width) if kind == "batch" else group_norm(width)]


class CompactNet(nn.Module):
    """Images (B, 3, H, W) -> h (B, 512): seven convolutions for small images.

    ResNet-18 with the CIFAR stem has five convolutions at the images' full size and four at each
    smaller one. Here there are two at each, and one at the smallest: a forward pass of a 32-pixel
    image takes 218 M multiply-accumulates instead of 555 M. So for the same arithmetic it sees 2.5
    times as many images, in 2.5 times as many steps, and learns far more (results/ablations).

    The shape is that of networks with which people race to 94 % on CIFAR-10 with labels:
    T. Balsam's hlb-CIFAR10 (2023), after D. Page's ResNet-9 (2018). Here the first layer learns,
    too, the last map is averaged, and the weights begin as PyTorch has them. norm: channels -> its
    layer; activation: the class of the nonlinearity; width: a factor on all channels,
    which is 1 in what is said here.
    """

    def __init__(
        self, norm: Any = nn.BatchNorm2d, activation: Any = nn.ReLU, width: float = 1
    ) -> None:
        super().__init__()
        first, second, third, last = (widened(n, width) for n in (32, 64, 256, 512))
        self.feature_dim = last  # the length of h
        self.conv1 = conv3x3(3, first)
        self.norm1 = norm(first)
        self.activation = activation()
        self.block1 = CompactBlock(first, second, norm, activation)
        self.block2 = CompactBlock(second, third, norm, activation)
        self.block3 = CompactBlock(third, last, norm, activation)
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm1(self.conv1(x)))
        x = self.block3(self.block2(self.block1(x)))
        return self.avgpool(x).flatten(1)


class CompactBlock(nn.Module):
    """(B, inputs, H, W) -> (B, outputs, H / 2, W / 2), rounded up: widen, halve, then x + F(x).

    Halved before the normalisation, which then has a quarter of the work. F ends in the
    nonlinearity: scaled by 0 at first, as --zero_init does in a ResNet, it would never learn.
    """

    def __init__(self, inputs: int, outputs: int, norm: Any, activation: Any) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.norm1 = norm(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.norm2 = norm(outputs)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm1(self.pool(self.conv1(x))))
        return x + self.activation(self.norm2(self.conv2(x)))


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    """A convolution that keeps the map's size; the normalisation behind it has the bias."""
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)


def widen(encoder: Any, inputs: int, outputs: int, norm: Any, activation: Any) -> None:
    """Let h have `outputs` numbers: a 1x1 convolution of the last map, of `inputs`, before it is
    averaged.

    In place; norm and activation as in `CompactNet`. Each place of the map is asked for more, in a
    nonlinear way, and only then do places mix: a linear probe reads more from it, for little
    arithmetic, since no map has fewer pixels than the last. MobileNetV2 ends so (Sandler et al.
    2018, arXiv 1801.04381, Table 2).
    """
    wide = nn.Conv2d(inputs, outputs, kernel_size=1, bias=False)
    encoder.avgpool = nn.Sequential(wide, norm(outputs), activation(), encoder.avgpool)
    encoder.feature_dim = outputs


def layout(device: str) -> torch.memory_format:
    """How feature maps lie in memory: each pixel's channels together, where that is fast.

    On Apple's GPUs BatchNorm has computed wrong numbers in that layout (PyTorch issue 175189).
    """
    return torch.contiguous_format if device == "mps" else torch.channels_last
