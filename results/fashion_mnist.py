"""Fashion-MNIST as a folder of images, from the files of Debian's package dataset-fashion-mnist.

    python results/fashion_mnist.py data/fashion-mnist

70,000 grey images of 28 x 28 pixels (Xiao et al. 2017, arXiv 1708.07747), for --evaluate_on.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGE = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle-boot"),
)


def idx(file: Path, header: int) -> np.ndarray:
    """What an IDX file of bytes holds after its header: uint8 (N,)."""
    return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=header)


def main(folder: Path, package: Path = PACKAGE) -> None:
    for split, name in (("train", "train"), ("test", "t10k")):
        images = idx(package / f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = idx(package / f"{name}-labels-idx1-ubyte.gz", 8)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = folder / split / CLASSES[label] / f"{i:05}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
