"""Training a recurrent network on the rows of 32 x 32 images, batch 64, in images per second.

    python -m benchmarks.recurrent

"this project" is rnn.py's whole training of an epoch on 45,000 random images: with validation on
5,000 more, logging, and checkpoints. "bare loop" trains the same network on one tensor that was
normalised beforehand: forward, backward, optimizer, nothing else; once more with this project's
settings and a fused optimizer. "usual loop" is a DataLoader with ToTensor and Normalize per image,
and .item(); worker processes made it slower here. All but one line is in float32.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import rnn
from benchmarks import common, usual

BATCH_SIZE = 64
WARM_UP = 20  # steps that are not measured
STEPS = 400


def splits(n: int, validation: int = 100) -> rnn.Splits:
    """n random training images with labels, and others that are held out."""
    images = torch.from_numpy(usual.random_images(n + validation))
    images = images.permute(0, 3, 1, 2).contiguous()
    labels = torch.arange(n + validation) % 10
    held_out = images[n:], labels[n:]
    return rnn.Splits((images[:n], labels[:n]), held_out, held_out, tuple("0123456789"))


# ------------------------------------------------------------------------------------------------
# This project
# ------------------------------------------------------------------------------------------------


def ours(cell: str, precision: str = "fp32") -> float:
    n = 45_000
    settings: Any = {"cell": cell, "precision": precision, "accelerator": "cpu"}
    config = rnn.Config(**settings, epochs=1)
    data = splits(n, 5000)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        rnn.train(config, cell, data, Path(folder))
        return n / (time.perf_counter() - start)


# ------------------------------------------------------------------------------------------------
# Plain loops
# ------------------------------------------------------------------------------------------------


def rate(
    cell: str, batches: Iterable[tuple[Tensor, Tensor]], fetch: bool, fused: bool = False
) -> float:
    """Images per second of a plain training loop on (B, steps, input_size) and labels (B,).

    `fetch` gets loss and accuracy as numbers after every batch.
    """
    config = rnn.Config()
    model = rnn.build_model(config, cell, torch.empty(1, 3, 32, 32), 10, seed=0)
    optimizer = torch.optim.Adam(
        model.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=fused,
    )

    correct, total = 0.0, 0.0
    for step, (x, labels) in enumerate(batches):
        if step == WARM_UP:
            start = time.perf_counter()
        if step == STEPS:  # before a loader runs empty
            break
        logits = model(x)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if fetch:
            total += loss.item()
            correct += (logits.argmax(1) == labels).sum().item()
    return (STEPS - WARM_UP) * BATCH_SIZE / (time.perf_counter() - start)


def bare_loop(cell: str, same_settings: bool = False) -> float:
    if same_settings:
        common.prepare()
    images, labels = splits(BATCH_SIZE * (STEPS + 1)).train
    x = rnn.rows_as_sequence((images[:] / 255 - 0.5) / 0.25)
    batches = zip(x.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True)
    return rate(cell, batches, fetch=False, fused=same_settings)


class Rows(Dataset):
    """Rows of an array of images, each through Pillow, ToTensor and Normalize."""

    def __init__(self, n: int) -> None:
        self.images = usual.random_images(n)
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image: Tensor = self.transform(Image.fromarray(self.images[i]))
        return image.permute(1, 0, 2).flatten(1), i % 10


def usual_loop(cell: str) -> float:
    data = Rows(BATCH_SIZE * (STEPS + 20))  # more than is read, as the loader must not run empty
    return rate(cell, DataLoader(data, BATCH_SIZE, shuffle=True), fetch=True)


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    groups: common.Groups = {
        cell: {
            common.OURS: partial(ours, cell),
            "this project, --precision bf16": partial(ours, cell, "bf16"),
            "bare loop": partial(bare_loop, cell),
            "bare loop, same settings": partial(bare_loop, cell, same_settings=True),
            "usual loop": partial(usual_loop, cell),
        }
        for cell in rnn.CELLS
    }
    common.main(
        "recurrent",
        groups,
        about="Training a recurrent network on image rows, batch 64",
        unit="images per second, more is better",
        higher_is_better=True,
    )
