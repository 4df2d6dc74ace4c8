"""torchvision's ResNets as encoders: wider ones, a stem for small images, other nonlinearities."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from contrastive.encoders import ACTIVATIONS, NORMS, widened

BLOCKS: dict[str, tuple[Any, list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
}


class WideResNet(ResNet):
    """torchvision's ResNet with `width` times as many channels in every layer."""

    def __init__(self, block: Any, layers: list[int], width: float, **named: Any) -> None:
        self.width = width
        super().__init__(block, layers, **named)

    def _make_layer(self, block: Any, planes: int, *args: Any, **named: Any) -> nn.Sequential:
        if planes == 64:  # the first: what it is given has been widened, too
            self.inplanes = widened(64, self.width)
        return super()._make_layer(block, widened(planes, self.width), *args, **named)


def build_resnet(
    name: str,
    stem: str = "cifar",
    norm: str = "batch",
    activation: str = "relu",
    zero_init: bool = False,
    width: float = 1,
) -> tuple[nn.Module, int]:
    """(encoder, feature_dim) for `build_encoder`: a ResNet without its classifier.

    Images (B, 3, H, W) -> h (B, feature_dim). At width 1 it is torchvision's; 2 and 4 are the 2x
    and 4x of the paper (Figure 7).
    """
    block, layers = BLOCKS[name]
    encoder: Any = WideResNet(
        block, layers, width, norm_layer=NORMS[norm], zero_init_residual=zero_init
    )
    first, feature_dim = widened(64, width), widened(512, width) * block.expansion
    encoder.fc = nn.Identity()
    if stem == "cifar":
        encoder.conv1 = first_layer(first, kernel_size=3, stride=1, padding=1)
        encoder.maxpool = nn.Identity()
    elif width != 1:
        encoder.conv1 = first_layer(first, kernel_size=7, stride=2, padding=3)
    if width != 1:
        encoder.bn1 = NORMS[norm](first)

    if activation != "relu":
        for part in [m for m in encoder.modules() if hasattr(m, "relu")]:
            part.relu = ACTIVATIONS[activation]()
    return encoder, feature_dim


def first_layer(channels: int, **named: Any) -> nn.Conv2d:
    """A convolution of colours that begins as torchvision begins the others."""
    layer = nn.Conv2d(3, channels, bias=False, **named)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer
