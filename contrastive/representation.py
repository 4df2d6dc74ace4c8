"""What is measured: h, or a layer of the head behind it, of images at the size of evaluation."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functions as fn
from functions import Batches, Subset, check


class Mirrored(nn.Module):
    """Images as a mirror shows them, left and right exchanged: (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flip(-1)


class Resized(nn.Module):
    """Images at --evaluation_size: uint8, or float32 in [0, 1], (B, C, H, W) -> float32 in [0, 1]
    (B, C, side, side), bilinear. None leaves them as they are, and so does their own size."""

    def __init__(self, side: int | None) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        if self.side is None or images.shape[-1] == self.side:
            return images
        x = images / 255 if images.dtype == torch.uint8 else images
        size = self.side, self.side
        return F.interpolate(x, size, mode="bilinear", antialias=True)


def recalibrate(
    encoder: nn.Module, see: nn.Module, images: Tensor, config: fn.RunConfig, most: int = 10_000
) -> None:
    """Measure BatchNorm's running statistics anew, in place, on up to `most` of the images.

    images: uint8 (N, C, H, W); see: how evaluation shows them, (B, C, H, W) -> float32. Training
    has left a moving average over augmented crops, and over an encoder that was still changing.
    Evaluation shows it whole images (Touvron et al. 2019, arXiv 1906.06423, Section 4: what changes
    with the size of the objects in a picture).
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed))
    chosen = order[:most]  # in random order: a batch of one class alone has statistics of its own
    batches = Batches(Subset(images, chosen), batch_size=min(500, len(chosen)), drop_last=True)
    machine = config.machine
    fn.prepare_device(machine)
    model = nn.Sequential(see, encoder).to(machine.device)
    with machine.autocast():
        torch.optim.swa_utils.update_bn(batches, model, torch.device(machine.device))
    model.cpu()


def in_cells(encoder: nn.Module, cells: int) -> nn.Module:
    """The same encoder, its weights shared, that averages its last map over each of cells x cells
    parts of it, not over all of it.

    Images (B, 3, H, W) -> (B, cells * cells * D), with one cell h itself. Where in the image things
    are is kept: the usual way to measure what a whole map knows (Goyal et al. 2019, arXiv
    1905.01235, Section 4: maps pooled to some 9,000 numbers).
    """
    if cells == 1:
        return encoder
    pool: nn.Module = nn.AdaptiveAvgPool2d(cells)
    if isinstance(encoder.avgpool, nn.Sequential):  # what widens the map stays before it
        pool = nn.Sequential(*encoder.avgpool[:-1], pool)
    other = copy.copy(encoder)
    other._modules = {**encoder._modules, "avgpool": pool}
    return other


class TenCrops(nn.Module):
    """What an encoder makes of ten crops of each image, on average (--ten_crops): of the whole
    image, of its four corners, seven eighths of the side each, and of the mirror images of these
    five (after Krizhevsky, Sutskever & Hinton 2012, Section 4.1, whose fifth crop is the centre,
    and who average what is predicted, not h).

    Images (B, 3, H, W) -> float32 (B, D). What differs from crop to crop says little of what is in
    the image; what is common to all stays. It takes eight to nine times the arithmetic of h alone.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        h, w = height - height // 8, width - width // 8
        rows = images[..., :h, :], images[..., -h:, :]
        corners = [corner for row in rows for corner in (row[..., :w], row[..., -w:])]
        crops = [images, *corners]
        crops += [crop.flip(-1) for crop in crops]
        return torch.stack([self.encoder(crop).float() for crop in crops]).mean(0)


def on_crops(encoder: nn.Module, ten: bool) -> nn.Module:
    """The encoder itself, or on ten crops."""
    return TenCrops(encoder) if ten else encoder


class FirstColumns(nn.Module):
    """(B, D) -> (B, count)."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.count]


def up_to_layer(encoder: nn.Module, head: nn.Sequential, layer: int, beside: int = 0) -> nn.Module:
    """h itself for layer 0, or what so many linear layers of the head make of it: the last one
    makes z, and so many columns beside it that are left out.

    Images (B, 3, H, W) -> (B, D). A hidden layer is taken after its normalisation and ReLU. Raises
    UserError for more layers than there are.
    """
    if layer == 0:
        return encoder
    linear = [place for place, part in enumerate(head) if isinstance(part, nn.Linear)]
    most = f"the head has {len(linear)} layers, take at most as many"
    check(layer <= len(linear), f"--probe_layer {layer}: {most}")
    end = [*linear, len(head)][layer]  # where the next one stands, or the head's end
    if layer < len(linear) or beside == 0:
        return nn.Sequential(encoder, *head[:end])
    last: Any = head[linear[-1]]
    return nn.Sequential(encoder, *head[:end], FirstColumns(last.out_features - beside))
