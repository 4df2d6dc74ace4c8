"""Fixtures: a small folder of real images, and a way to run a script as a user does."""

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import functions as fn
from machinery import command_line

torch.set_num_threads(1)  # the tests share the cores among themselves, and other threads would round differently

command_line.make_parser = functools.cache(
    command_line.make_parser
)  # a tenth of a second each, and the tests ask for hundreds

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """DIR/train/<class>/*.png and DIR/test/<class>/*.png: three classes of 8 x 8 images, told apart by their colour."""
    folder = tmp_path_factory.mktemp("images") / "colours"
    rng = np.random.default_rng(0)
    for split, count in (("train", 100), ("test", 8)):
        for c, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (8, 8, 3), dtype=np.uint8)
                pixels[..., c] += 150
                Image.fromarray(pixels).save(folder / split / name / f"{i:03}.png")
    return folder


@pytest.fixture(scope="session")
def run():
    """Run a script in a folder as a user would: run("rnn.py", "--epochs", "1", cwd=folder) -> CompletedProcess."""

    def run_script(script: str, *flags: object, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, **options)

    return run_script


class Code:
    """A pickle of it runs a command when it is loaded, in the folder of whoever loads it."""

    def __reduce__(self):
        return os.system, ("touch hacked",)


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run_here(capfd, monkeypatch):
    """The same in this process, which saves the imports: run_here("rnn.py", "--epochs", "1", cwd=folder) -> Ended."""

    def run_script(script: str, *flags: object, cwd: Path) -> Ended:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        module = importlib.import_module(script.removesuffix(".py"))
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            fn.command_line(module.main, module.Config, module.__doc__)
        return Ended(int(end.value.code or 0), *capfd.readouterr())

    return run_script
