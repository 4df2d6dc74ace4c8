"""The parts of T, the SimCLR paper's random augmentation (Section 3, Appendix A).

Functions of a whole batch, float32 (B, 3, H, W) with values in [0, 1], on the batch's own device.
Every image draws its own parameters. An image whose coin says no gets the neutral parameter, so
that nothing branches. Each has the distribution of torchvision's transform of the same name.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from functions import UserError, check


def uniform(n: int, low: float, high: float, device: torch.device) -> Tensor:
    """(n,) independent draws from U(low, high)."""
    return torch.empty(n, device=device).uniform_(low, high)


# ------------------------------------------------------------------------------------------------
# Random crop, resize and flip
# ------------------------------------------------------------------------------------------------


def crop_boxes(
    n: int, height: int, width: int, min_scale: float, max_scale: float, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n random boxes (top, left, height, width), float32 (n,), whole pixels.

    Area uniform in [min_scale, max_scale] of the image's, aspect ratio log-uniform in [3/4, 4/3].
    Of ten draws the first that fits is taken, the whole image if none does (torchvision: its
    largest central part, which is the same for square images).
    """
    area = height * width * uniform(10 * n, min_scale, max_scale, device).view(n, 10)
    ratio = uniform(10 * n, math.log(3 / 4), math.log(4 / 3), device).view(n, 10).exp()
    w = (area * ratio).sqrt().round()  # (n, 10)
    h = (area / ratio).sqrt().round()

    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    some = fits.any(1)
    w = torch.where(some, w.gather(1, first).squeeze(1), width)  # (n,)
    h = torch.where(some, h.gather(1, first).squeeze(1), height)

    top = (uniform(n, 0, 1, device) * (height - h + 1)).floor()
    left = (uniform(n, 0, 1, device) * (width - w + 1)).floor()
    return top, left, h, w


def resize_weights(start: Tensor, length: Tensor, size_in: int, size_out: int) -> Tensor:
    """Resizing a part of a line of pixels as a matrix: bilinear, and anti-aliased.

    The pixels [start, start + length) become size_out ones. start, length: (B,) -> float32
    (B, size_out, size_in); each row holds the weights of one output pixel.
    """
    step = (length / size_out).view(-1, 1, 1)  # input pixels per output pixel
    first = start.view(-1, 1, 1)
    last = (start + length).view(-1, 1, 1)
    pixel = torch.arange(size_in, device=start.device) + 0.5
    centre = (torch.arange(size_out, device=start.device) + 0.5).view(1, -1, 1) * step + first

    # A triangle around the centre, as wide as an output pixel: that is the anti-aliasing.
    weights = (pixel - centre).abs_().div_(-step.clamp_min(1)).add_(1).clamp_min_(0)
    weights.mul_((pixel > first) & (pixel < last))
    return weights.div_(weights.sum(2, keepdim=True))


def random_resized_crop_and_flip(
    x: Tensor, size: int, min_scale: float, max_scale: float, flip: float
) -> Tensor:
    """Crop at random, resize to `size`, and flip with probability `flip`.

    (B, 3, H, W) -> (B, 3, size, size). All three are two small matrices an image,
    rows @ x @ columns: one batched product instead of a loop over images.
    """
    height, width = x.shape[2:]
    top, left, h, w = crop_boxes(len(x), height, width, min_scale, max_scale, x.device)
    rows = resize_weights(top, h, height, size)  # (B, size, H)
    columns = resize_weights(left, w, width, size)  # (B, size, W)

    flipped = (uniform(len(x), 0, 1, x.device) < flip).view(-1, 1, 1)
    columns = torch.where(flipped, columns.flip(1), columns).transpose(1, 2)  # (B, W, size)

    narrowed = x.flatten(1, 2) @ columns  # (B, 3 H, size)
    narrowed = narrowed.unflatten(1, (3, height))  # (B, 3, H, size)
    return rows.unsqueeze(1) @ narrowed  # (B, 3, size, size)


# ------------------------------------------------------------------------------------------------
# Colours
# ------------------------------------------------------------------------------------------------


def luminance(x: Tensor) -> Tensor:
    """Grey level of RGB, ITU-R 601: (B, 3, H, W) -> (B, 1, H, W)."""
    red, green, blue = x.unbind(1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114).unsqueeze(1)


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn every colour around the HSV wheel by `shift` (B,) turns, keeping value and chroma.

    (B, 3, H, W) -> (B, 3, H, W); shift must be within -1/3 and 1/3.

    On a wheel of circumference 6, red stands at 0, green at 2 and blue at -2. A channel is at its
    highest within 1 of its own place, at its lowest from 2 on, and falls linearly in between:

        -3      -2      -1       0       1       2       3
        cyan   blue  magenta    red   yellow   green    cyan
    """
    red, green, blue = x.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    c = chroma.clamp_min(1e-12)

    # How far from red? |side| while fall is 0, then 1 + fall while |side| is 1, then 3 - |side|
    # while fall is 1. The sign of side says towards which: green or blue.
    side = (green - blue).div_(c)  # -1...1
    fall = (value - red).div_(c)  # 0...1
    hue = torch.addcmul(side.abs(), fall, 3 - 2 * side.abs()).copysign_(side)
    hue.add_(6 * shift.view(-1, 1, 1))  # now in [-5, 5]

    # Around the wheel, a hue t away from a channel's place has the distance 3 - | |t| - 3 |.
    places = torch.tensor([0.0, 2.0, -2.0], device=x.device).view(1, 3, 1, 1)
    height = (hue.unsqueeze(1) - places).abs_().sub_(3).abs_().clamp_(1, 2)  # 1 lowest, 2 highest
    return torch.addcmul((value - 2 * chroma).unsqueeze(1), chroma.unsqueeze(1), height)


def blend(x: Tensor, factor: Tensor, kind: Tensor) -> Tensor:
    """Brightness, contrast or saturation: factor * x + (1 - factor) * other, cut to [0, 1].

    x: (B, 3, H, W); factor, kind: (B,). `other` is black for kind 0 (brightness), the mean grey
    for kind 1 (contrast), and the image's own grey version for kind 2 (saturation).
    """
    factor, kind = (per_image.view(-1, 1, 1, 1) for per_image in (factor, kind))
    grey = luminance(x)
    mean_grey = grey.mean((2, 3), keepdim=True)
    other = torch.addcmul(mean_grey * (kind == 1), grey, (kind == 2).float())
    return torch.lerp(other, x, factor).clamp_(0, 1)


def color_jitter(x: Tensor, strength: float, p: float) -> Tensor:
    """Appendix A: ColorJitter(0.8 s, 0.8 s, 0.8 s, 0.2 s) with probability p. (B, 3, H, W).

    Its four parts come in random order. The three blends have an order drawn per image; the hue,
    which costs the most, turns for a random quarter of the batch at a time:

        first quarter    hue    blend         blend         blend
        second                  blend   hue   blend         blend
        third                   blend         blend   hue   blend
        fourth                  blend         blend         blend   hue
    """
    count, device = len(x), x.device
    n = 4 * math.ceil(count / 4)  # filled up to four equal quarters
    low, high = max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength

    jittered = uniform(n, 0, 1, device) < p
    factors = uniform(3 * n, low, high, device).view(n, 3)
    factors = torch.where(jittered.view(-1, 1), factors, 1.0)  # 1 leaves an image as it is
    shifts = torch.where(jittered, uniform(n, -0.2 * strength, 0.2 * strength, device), 0.0)
    kinds = torch.rand(n, 3, device=device).argsort(1)  # the kinds of an image's three blends
    factors = factors.gather(1, kinds)
    shuffled = torch.randperm(n, device=device)  # whose place decides about the quarter

    x = x.index_select(0, shuffled % count)
    for turn, shift in enumerate(shifts.chunk(4)):
        quarter = x.chunk(4)[turn]  # a view: what is written to it is written to x
        quarter.copy_(shift_hue(quarter, shift))
        if turn < 3:
            x = blend(x, factors[:, turn], kinds[:, turn])
    return x.index_select(0, shuffled.argsort()[:count])


def random_grayscale(x: Tensor, p: float) -> Tensor:
    """Replace an image by its grey version with probability p. (B, 3, H, W)."""
    dropped = (uniform(len(x), 0, 1, x.device) < p).float().view(-1, 1, 1, 1)
    return torch.lerp(x, luminance(x), dropped)


# ------------------------------------------------------------------------------------------------
# Blur
# ------------------------------------------------------------------------------------------------


def gaussian_blur(x: Tensor, p: float) -> Tensor:
    """Appendix A: blur with probability p. (B, 3, H, W).

    sigma ~ U(0.1, 2); the kernel is a tenth of the side, odd, and at least 3.
    """
    radius = max(1, int(0.1 * x.shape[2]) // 2)
    sigma = uniform(len(x), 0.1, 2.0, x.device)
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.softmax(-0.5 * (offsets / sigma.view(-1, 1)) ** 2, dim=1)  # (B, K), sums to 1

    blurred = uniform(len(x), 0, 1, x.device) < p
    untouched = (offsets == 0).float()
    kernel = torch.where(blurred.view(-1, 1), kernel, untouched)

    x = nn.functional.pad(x, [radius] * 4, mode="reflect")
    for axis in (2, 3):  # a Gaussian is separable: down the columns, then along the rows
        length = x.shape[axis] - 2 * radius
        first, *taps = (weight.view(-1, 1, 1, 1) for weight in kernel.unbind(1))
        total = first * x.narrow(axis, 0, length)
        for i, tap in enumerate(taps, 1):  # added up in place: one copy, however wide the kernel
            total.addcmul_(x.narrow(axis, i, length), tap)
        x = total
    return x


# ------------------------------------------------------------------------------------------------
# The size of the crops over the training
# ------------------------------------------------------------------------------------------------


def crop_schedule(crop_size: int | str | None) -> list[tuple[int | None, float]]:
    """--crop_size as [(side in pixels, share of training until which it holds)].

    None stands for the images' own side. An encoder that ends in a mean over the map takes images
    of any size, and smaller crops cost less. Raises UserError.
    """
    if crop_size is None:
        return [(None, 1.0)]

    text = str(crop_size)
    remedy = "give a side from 4 to 224, or sides and shares that grow to 1, as 16:0.7,32:1"
    try:
        pairs = [part.split(":") for part in (text if ":" in text else f"{text}:1").split(",")]
        schedule: list[tuple[int | None, float]] = []
        schedule += [(int(side), float(share)) for side, share in pairs]
    except ValueError:
        raise UserError(f"--crop_size {text}: {remedy}") from None

    shares = [0.0, *(share for _, share in schedule)]
    growing = all(a < b for a, b in itertools.pairwise(shares)) and shares[-1] == 1
    # YAML reads 16:1 as a number of base 60, which is why no side may be that large.
    sizes_fit = all(4 <= int(side or 0) <= 224 for side, _ in schedule)
    check(growing and sizes_fit, f"--crop_size {text}: {remedy}")
    return schedule
