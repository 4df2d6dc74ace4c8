"""A JPEG copy of CIFAR-10, as the results were measured on: a folder of images.

    python results/cifar10_jpeg.py data/cifar10-jpeg

Downloads CIFAR-10 into data/ where it is missing, and saves its 60,000 images at quality 75,
numbered within their class. Ours came to us ready made: single pixels may differ.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import functions as fn
from functions import ImageDataset


def save(data: ImageDataset, folder: Path) -> None:
    """FOLDER/train/<class>/0000.jpg ..., and the same of the test images."""
    train, train_labels, test, test_labels = data.labelled()
    for split, images, labels in (("train", train, train_labels), ("test", test, test_labels)):
        numbers: Counter[int] = Counter()
        for image, label in zip(images, labels.tolist(), strict=True):
            file = folder / split / data.classes[label] / f"{numbers[label]:04}.jpg"
            numbers[label] += 1
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, quality=75)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        save(fn.load_dataset("cifar10", Path("data")), Path(sys.argv[1]))
    except fn.UserError as error:
        sys.exit(f"error: {error}")
