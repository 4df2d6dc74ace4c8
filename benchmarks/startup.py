"""How long until something happens: --help, and the first step on a folder of 60,000 images decoded before.

python -m benchmarks.startup
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks import common, usual

# simCLR.py, left at the beginning of its second step
TO_THE_SECOND_STEP = """
import os, sys, functions as fn, simCLR
step = simCLR.Pretraining.training_step
def training_step(self, batch, batch_idx):
    return step(self, batch, batch_idx) if batch_idx == 0 else os._exit(0)
simCLR.Pretraining.training_step = training_step
sys.argv[0] = "simCLR.py"
fn.command_line(simCLR.main, simCLR.Config, simCLR.__doc__)
"""


def seconds_of(*words: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def second_start(images: int = 60_000) -> float:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = usual.save_images(folder / "images", images)
        flags = ["--stages", "pretrain", "--stem", "imagenet", "--dataset", str(dataset), "--data_dir", name]
        first, second = (
            seconds_of("-c", TO_THE_SECOND_STEP, *flags, "--output_dir", str(folder / run)) for run in ("run1", "run2")
        )
        print(f"    {images:,} images: first start {first:.1f} s, second start {second:.1f} s")
        return second


if __name__ == "__main__":
    bare: dict[str, common.Candidate] = {
        "import torch, lightning": partial(seconds_of, "-c", "import torch, lightning")
    }
    scripts = ("simCLR.py", "rnn.py", "rnn_hyperparameter_tune.py")
    helps: dict[str, dict[str, common.Candidate]]
    helps = {f"{script} --help": {common.OURS: partial(seconds_of, script, "--help"), **bare} for script in scripts}
    helps["simCLR.py to the end of its first step, 60,000 images"] = {common.OURS: second_start}
    about, unit = "Start-up", "seconds, less is better"
    common.main("startup", helps, about=about, unit=unit, rounds=3, fresh=False)
