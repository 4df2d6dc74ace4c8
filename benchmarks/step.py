"""A whole step of SimCLR: augmentation, forward, backward, optimizer; in pairs per second.

    python -m benchmarks.step

ResNet-18 on 32 x 32 images. "this project" is `python simCLR.py --stages pretrain` itself, on a
folder of random images: the seconds that it reports for its second epoch, with logging, without
the checkpoint that follows. "bare model" is the same encoder, batch and precision on random
tensors, without augmentation, data or trainer: what is left for a program to lose. Both are in
bfloat16 where the processor computes it fast; the usual formulation is in float32, and once more
in bfloat16.
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

import functions as fn
import simCLR
from benchmarks import common, usual

BATCH_SIZE = {"cifar": 256, "imagenet": 512}


def ours(stem: str, *flags: str, images: int) -> float:
    """Pairs per second of simCLR.py itself, with further flags."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = usual.save_images(folder / "images", images)
        command = [sys.executable, "simCLR.py", "--stages", "pretrain", "--epochs", "2"]
        command += ["--accelerator", "cpu", "--stem", stem, "--batch_size", str(BATCH_SIZE[stem])]
        command += ["--dataset", str(dataset), "--data_dir", name]
        command += ["--output_dir", str(folder / "run"), *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

        with open(folder / "run" / "metrics.csv", newline="") as file:
            last = list(csv.DictReader(file))[-1]
        return images / float(last["seconds"])


def bare(stem: str, batch_size: int | None = None, size: int = 32) -> float:
    """Pairs per second of this project's model on random tensors."""
    common.prepare()
    n = batch_size or BATCH_SIZE[stem]
    model = simCLR.SimCLRModel(*simCLR.build_encoder("resnet18", stem))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    views = torch.randn(2 * n, 3, size, size).contiguous(memory_format=torch.channels_last)
    fast = common.CPU.precision == "bf16"

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            loss = fn.nt_xent_loss(model(views), 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return n / common.seconds(step, at_least=15, repeats=8, warm_up=4)


def usual_formulation(stem: str, reduced: bool = False) -> float:
    """Pairs per second of benchmarks/usual.py, in bfloat16 if `reduced`."""
    n = BATCH_SIZE[stem]
    model = usual.model(stem)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps = 3 if stem == "cifar" else 10
    images = usual.random_images(n * (steps + 10))

    ends: list[float] = []
    for first, second in usual.loader(images, n, usual.augmentation()):
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            loss = usual.masked_copy_loss(model(torch.cat([first, second])).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

        ends.append(time.perf_counter())
        if len(ends) == steps + 1:  # the workers are still busy with what would come next
            break
    return n * steps / (ends[-1] - ends[0])


def all_groups() -> common.Groups:
    """The two stems, and the CIFAR stem on smaller crops."""
    groups: common.Groups = {}
    for stem, images in (("cifar", 2048), ("imagenet", 8192)):
        float32 = ("--precision", "fp32")
        groups[f"{stem} stem, batch {BATCH_SIZE[stem]}"] = {
            common.OURS: partial(ours, stem, images=images),
            "this project, float32": partial(ours, stem, *float32, images=images // 2),
            "bare model": partial(bare, stem),
            "usual formulation": partial(usual_formulation, stem),
            "usual formulation, bfloat16": partial(usual_formulation, stem, reduced=True),
        }
    groups["cifar stem, 16-pixel crops, batch 256"] = {
        common.OURS: partial(ours, "cifar", "--crop_size", "16", images=4096),
        "bare model": partial(bare, "cifar", size=16),
    }
    return groups


if __name__ == "__main__":
    common.main(
        "step",
        all_groups(),
        about="A whole step of SimCLR, ResNet-18",
        unit="pairs per second, more is better",
        higher_is_better=True,
    )
