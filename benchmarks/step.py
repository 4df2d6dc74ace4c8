"""A whole step of SimCLR, ResNet-18 on 32 x 32 images: augmentation, forward, backward, optimizer; pairs per second.

    python -m benchmarks.step

"this project" is `python simCLR.py --stages pretrain` itself, on a folder of random images: its second epoch, with
logging and everything else. "bare model" is the same encoder, batch and precision on random tensors, without
augmentation, data or trainer: what is left for a program to lose.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image

import functions as fn
import simCLR
from benchmarks import common, usual

BATCH_SIZE = {"cifar": 256, "imagenet": 512}


def ours(stem: str, *flags: str, images: int = 4096) -> float:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        for i, pixels in enumerate(usual.random_images(images)):
            Image.fromarray(pixels).save(folder / "images" / f"{i}.bmp")
        command = [sys.executable, "simCLR.py", "--stages", "pretrain", "--epochs", "2", "--stem", stem]
        where = ["--dataset", folder / "images", "--data_dir", folder, "--output_dir", folder / "run"]
        size = ["--batch_size", str(BATCH_SIZE[stem])]
        subprocess.run([str(word) for word in [*command, *size, *where, *flags]], check=True, stdout=subprocess.DEVNULL)
        with open(folder / "run" / "metrics.csv", newline="") as file:
            last = list(csv.DictReader(file))[-1]
        return images / float(last["seconds"])


def bare(stem: str, batch_size: int | None = None, size: int = 32) -> float:
    """Pairs per second of this project's model on random tensors."""
    fn.prepare_device("cpu")
    n = batch_size or BATCH_SIZE[stem]
    model = simCLR.SimCLRModel(*simCLR.build_encoder("resnet18", stem))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    views = torch.randn(2 * n, 3, size, size).contiguous(memory_format=torch.channels_last)
    fast = fn.resolve_precision("auto", "cpu") == "bf16"

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            loss = fn.nt_xent_loss(model(views), 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return n / common.seconds(step, at_least=15, repeats=8, warm_up=4)


def usual_formulation(stem: str) -> float:
    n = BATCH_SIZE[stem]
    model = usual.model(stem)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps = 4 if stem == "cifar" else 8
    taken: list[float] = []
    for first, second in usual.loader(usual.random_images(n * steps), n, usual.augmentation()):
        if not taken:
            start = time.perf_counter()  # after the workers' first batch
        loss = usual.masked_copy_loss(model(torch.cat([first, second])))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        taken.append(time.perf_counter() - start)
    return n * (len(taken) - 1) / (taken[-1] - taken[0])


if __name__ == "__main__":
    groups: dict[str, dict[str, common.Candidate]] = {}
    for stem in ("cifar", "imagenet"):
        groups[f"{stem} stem, batch {BATCH_SIZE[stem]}"] = {
            common.OURS: partial(ours, stem),
            "bare model": partial(bare, stem),
            "usual formulation": partial(usual_formulation, stem),
        }
    groups["cifar stem, 16-pixel crops, batch 256"] = {
        common.OURS: partial(ours, "cifar", "--crop_size", "16"),
        "bare model": partial(bare, "cifar", size=16),
    }
    about, unit = "A whole step of SimCLR, ResNet-18", "pairs per second, more is better"
    common.main("step", groups, about=about, unit=unit, higher_is_better=True)
