"""How long until something happens: --help, and the first step on a folder of 60,000 images.

    python -m benchmarks.startup

The images of the folder were decoded by a start before.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks import common, usual

SCRIPTS = ("simCLR.py", "rnn.py", "rnn_hyperparameter_tune.py")

# simCLR.py, left at the beginning of its second step
TO_THE_SECOND_STEP = """
import os, functions as fn, simCLR
step = simCLR.Pretraining.training_step
def training_step(self, batch, batch_idx):
    return step(self, batch, batch_idx) if batch_idx == 0 else os._exit(0)
simCLR.Pretraining.training_step = training_step
fn.command_line(simCLR.main, simCLR.Config, simCLR.__doc__)
"""


def seconds_of(*words: str) -> float:
    """Seconds of a Python program with these words."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def second_start(images: int = 60_000) -> float:
    """Seconds of simCLR.py until its first step is done, with the images decoded before."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = usual.save_images(folder / "images", images)
        flags = ["--stages", "pretrain", "--stem", "imagenet"]
        flags += ["--dataset", str(dataset), "--data_dir", name]

        def start(run: str) -> float:
            where = ["--output_dir", str(folder / run)]
            return seconds_of("-c", TO_THE_SECOND_STEP, *flags, *where)

        first = start("run1")
        second = start("run2")
        print(f"    {images:,} images: first start {first:.1f} s, second start {second:.1f} s")
        return second


if __name__ == "__main__":
    least = partial(seconds_of, "-c", "import torch, lightning")
    groups: common.Groups = {
        f"{script} --help": {
            common.OURS: partial(seconds_of, script, "--help"),
            "import torch, lightning": least,
        }
        for script in SCRIPTS
    }
    groups["simCLR.py to the end of its first step, 60,000 images"] = {common.OURS: second_start}
    common.main(
        "startup",
        groups,
        about="Start-up",
        unit="seconds, less is better",
        fresh=False,  # each is a process anyway
    )
