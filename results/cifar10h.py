"""What people say of CIFAR-10's test images (CIFAR-10H), in the order of the JPEG copy's files.

    python results/cifar10h.py cifar10h-probs.npy data/cifar10h-probs.npy

The first is the published file (Peterson et al. 2019, arXiv 1908.07086; github.com/jcpeterson/
cifar-10h), whose rows are in the order of CIFAR-10 itself, the second is for --human_labels beside
--dataset data/cifar10-jpeg. Downloads CIFAR-10 into data/ where it is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import functions as fn


def in_order_of_files(answers: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rows (N, classes) class by class, each class's in the order in which they came: as folders
    of CIFAR-10 are sorted, whose classes are in the order of the alphabet. labels: (N,)."""
    return answers[np.argsort(labels, kind="stable")]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        *_, labels = fn.load_dataset("cifar10", Path("data")).labelled()
        np.save(sys.argv[2], in_order_of_files(np.load(sys.argv[1]), labels.numpy()))
    except (fn.UserError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
