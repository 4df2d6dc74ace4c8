"""The usual formulation, written afresh as the reference.

Images are augmented one by one with Pillow in worker processes, everything is float32, NT-Xent is
taken from masked copies of the similarity matrix, and numbers are fetched with .item() after every
batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models, transforms

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)  # of CIFAR-10

# ------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------


def random_images(n: int, side: int = 32) -> np.ndarray:
    """uint8 (n, side, side, 3), the same in every process."""
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def save_images(folder: Path, n: int) -> Path:
    """A new folder of n random images, one file each, for a program to read."""
    folder.mkdir()
    for i, pixels in enumerate(random_images(n)):
        Image.fromarray(pixels).save(folder / f"{i}.bmp")
    return folder


def augmentation(side: int = 32) -> Any:
    """SimCLR's augmentation of a Pillow image (the paper's Appendix A).

    As for small images: strength 0.5, and no blur.
    """
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(side, scale=(0.08, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


class TwoViews(Dataset):
    """The pairs of views of an array of images, through a transform of one Pillow image."""

    def __init__(self, images: np.ndarray, transform: Any) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image = Image.fromarray(self.images[i])
        return self.transform(image), self.transform(image)


def loader(images: np.ndarray, batch_size: int, transform: Any) -> DataLoader:
    """Two worker processes, shuffled, whole batches only."""
    pairs = TwoViews(images, transform)
    return DataLoader(pairs, batch_size, shuffle=True, num_workers=2, drop_last=True)


# ------------------------------------------------------------------------------------------------
# Loss and model
# ------------------------------------------------------------------------------------------------


def masked_copy_loss(embeddings: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent by picking positives and negatives out of the similarities with boolean masks.

    (2N, D), rows i and i + N a pair -> scalar.
    """
    two_n = len(embeddings)
    z = nn.functional.normalize(embeddings, dim=1)
    similarity = z @ z.T  # (2N, 2N)

    image = torch.arange(two_n // 2).repeat(2)
    same_image = image[:, None] == image[None, :]
    not_itself = ~torch.eye(two_n, dtype=torch.bool)
    similarity = similarity[not_itself].view(two_n, -1)  # (2N, 2N - 1)
    same_image = same_image[not_itself].view(two_n, -1)

    positives = similarity[same_image].view(two_n, -1)  # (2N, 1)
    negatives = similarity[~same_image].view(two_n, -1)  # (2N, 2N - 2)
    logits = torch.cat([positives, negatives], dim=1) / temperature
    return nn.functional.cross_entropy(logits, torch.zeros(two_n, dtype=torch.long))


def model(stem: str) -> nn.Module:
    """torchvision's ResNet-18 with a projection head.

    The cifar stem is as in the paper's Appendix B.9.
    """
    network = models.resnet18()
    if stem == "cifar":
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    network.fc = nn.Sequential(
        nn.Linear(512, 512, bias=False),
        nn.BatchNorm1d(512),
        nn.ReLU(inplace=True),
        nn.Linear(512, 128),
    )
    return network
