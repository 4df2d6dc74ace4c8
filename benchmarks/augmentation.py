"""Two random views of 32 x 32 images: SimCLR's augmentation, and normalisation.

    python -m benchmarks.augmentation

The augmentation is that for CIFAR, without blur.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import v2

import functions as fn
import simCLR
from benchmarks import common, usual

BATCH = 512  # images; twice as many views
IMAGES = torch.from_numpy(usual.random_images(BATCH)).permute(0, 3, 1, 2).contiguous()

# ------------------------------------------------------------------------------------------------
# Whole batches
# ------------------------------------------------------------------------------------------------


def of_whole_batches(random_views: Callable[[], Tensor]) -> float:
    """Milliseconds a view of a function that makes two views of each of IMAGES."""
    return 1000 * common.seconds(random_views, warm_up=10) / (2 * BATCH)


def ours() -> float:
    common.prepare()
    config = simCLR.Config()
    normalize = fn.Normalize(IMAGES)
    return of_whole_batches(lambda: normalize(simCLR.random_views(IMAGES, config)))


def kornia_batched() -> float:
    import kornia.augmentation as K

    augment = nn.Sequential(
        K.RandomResizedCrop((32, 32), scale=(0.08, 1.0)),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.Normalize(torch.tensor(usual.MEAN), torch.tensor(usual.STD)),
    )
    return of_whole_batches(lambda: augment(IMAGES.float().div_(255).repeat(2, 1, 1, 1)))


def kornia_with_our_memory_setting() -> float:
    common.prepare()
    return kornia_batched()


# ------------------------------------------------------------------------------------------------
# Image by image
# ------------------------------------------------------------------------------------------------


def in_a_loader(transform: Any) -> float:
    """Milliseconds a view of a DataLoader with two workers, neither at its start nor at its end."""
    batches = iter(usual.loader(usual.random_images(6400), 64, transform))
    for _ in range(10):
        next(batches)

    start = time.perf_counter()
    views = sum(len(first) + len(second) for first, second in itertools.islice(batches, 80))
    return 1000 * (time.perf_counter() - start) / views


def torchvision_v1() -> float:
    return in_a_loader(usual.augmentation())


def torchvision_v2() -> float:
    steps = [
        v2.ToImage(),
        v2.RandomResizedCrop(32, scale=(0.08, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(usual.MEAN, usual.STD),
    ]
    return in_a_loader(v2.Compose(steps))


def lightly_transform() -> float:
    from lightly.transforms import SimCLRTransform

    both = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)
    return in_a_loader(transforms.Lambda(both.transforms[0]))


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------


def training_step() -> float:
    """For comparison, the rest of a step: ResNet-18 with the CIFAR stem.

    Forward, backward and optimizer, in bfloat16 where it is fast.
    """
    from benchmarks.step import bare

    return 1000 / (2 * bare("cifar", batch_size=64))


if __name__ == "__main__":
    candidates: dict[str, common.Candidate] = {
        common.OURS: ours,
        "torchvision v1 (Pillow), DataLoader": torchvision_v1,
        "torchvision v2 (tensors), DataLoader": torchvision_v2,
        "lightly SimCLRTransform, DataLoader": lightly_transform,
        "kornia, batched": kornia_batched,
        "kornia, with our memory setting": kornia_with_our_memory_setting,
        "a training step, CIFAR stem": training_step,
    }
    common.main(
        "augmentation",
        {"32 x 32": candidates},
        about="Augmentation of 32 x 32 images",
        unit="milliseconds per view, less is better",
    )
