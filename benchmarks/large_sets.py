"""A folder of a million images: how soon training begins, how fast it runs, what memory it takes.

    python -m benchmarks.large_sets

The folder has a thousand different images, each under a thousand names. A step trains rnn.py's
plain network on 64 images, the cheapest step that this project has: where the images come from
shows most there. Compared are batches that are gathered from the file one step ahead, as for a set
that does not fit into memory, and batches of the same images held in memory. Private memory is what
a process cannot give back (RssAnon): pages of the mapped file do not count. Linux only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import functions as fn
import machinery.batches
import rnn
from benchmarks import common

STEPS = 2000


def make_folder(folder: Path, n: int) -> None:
    """folder/train/<class>/ with n names of n / 1000 different images, of random colours."""
    torch.manual_seed(0)
    for c in range(10):
        (folder / "train" / str(c)).mkdir(parents=True)
        (folder / "test" / str(c)).mkdir(parents=True)
        for i in range(max(1, n // 10_000)):
            pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy()
            first = folder / "test" / str(c) / f"{i}.png"
            Image.fromarray(pixels).save(first)
            for j in range(1000):
                os.link(first, folder / "train" / str(c) / f"{i}-{j}.png")


def train(folder: Path, in_memory: bool) -> dict[str, float]:
    """What one process sees that trains on the folder: seconds to its first step, steps, memory."""
    common.prepare()
    start = time.perf_counter()
    data = fn.load_dataset(str(folder / "images"), folder / "data", 32)
    data.description()
    if in_memory:
        data.train_images = data.train_images.clone()
    machinery.batches.SHARE = 1.0 if in_memory else 0.0
    config = rnn.Config(dataset=data.name, accelerator="cpu")
    splits = rnn.split(data, 0.1, seed=0)
    model = rnn.build_model(config, "rnn", splits.train[0], 10, seed=0)
    module = rnn.RowClassification(model, splits, config)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    batches = iter(module.train_batches.to(torch.device("cpu")))
    taken: list[float] = []
    private = 0.0
    for i, batch in enumerate(itertools.islice(batches, STEPS)):
        images, labels = batch
        module.training_step((images, labels), i)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.perf_counter())
        if i == 100:
            private = common.memory_mib("RssAnon")
    return {
        "seconds to the first step": round(taken[0] - start, 2),
        "steps per second": round(1 / statistics.median(map(float.__sub__, taken[1:], taken)), 1),
        "private MiB": round(common.memory_mib("RssAnon")),
        "private MiB more than at step 100": round(common.memory_mib("RssAnon") - private, 1),
    }


def in_fresh_process(folder: Path, in_memory: bool) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.large_sets", "--one", str(folder)]
    command += ["--in_memory"] * in_memory
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--in_memory", action="store_true", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.one:
        print(json.dumps(train(words.one, words.in_memory)))
        return

    run = fn.Run(fn.RunConfig(dataset="random images", accelerator="cpu"))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_folder(folder / "images", words.images)
        found: dict[str, Any] = {"first start, which decodes": [in_fresh_process(folder, False)]}
        kinds = {"gathered one step ahead": False, "held in memory": True}
        found |= {kind: [] for kind in kinds}
        for _ in range(words.rounds):
            for kind, in_memory in kinds.items():
                found[kind].append(in_fresh_process(folder, in_memory))

    for kind, rows in found.items():
        print(f"{kind}:")
        for row in rows:
            print("  " + ", ".join(f"{name} {value:,}" for name, value in row.items()))
    ahead, held = (
        statistics.median(row["steps per second"] for row in found[kind]) for kind in kinds
    )
    print(f"gathered, it makes {ahead / held:.3f} of the steps that it makes from memory")
    about = f"A folder of {words.images:,} images of 32 x 32 pixels"
    common.write("large_sets", run, {"about": about, "found": found, "ratio": ahead / held})


if __name__ == "__main__":
    main()
