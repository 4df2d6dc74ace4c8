"""Fixtures: a small folder of images, ways to run a script, and the place and state of a test."""

import contextlib
import functools
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# The tests share the cores: several threads of each would wait for the others', at times for a
# minute. Before NumPy reads it.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import functions as fn
from machinery import command_line

pytest.register_assert_rewrite("helpers")  # its asserts then show their values, too

torch.set_num_threads(1)  # another number would round differently

# A parser takes a tenth of a second to build, and the tests ask for hundreds.
command_line.make_parser = functools.cache(command_line.make_parser)

ROOT = Path(__file__).parent.parent


def pytest_configure(config):
    """What these tests say holds on the CPU: a GPU is seen by the tests marked `gpu` alone."""
    if "gpu" not in (config.option.markexpr or "").replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """DIR/train/<class>/*.png and DIR/test/<class>/*.png: 8 x 8 images of three colours."""
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
    """Run a script as a user: run("rnn.py", "--epochs", 1, cwd=folder) -> CompletedProcess."""

    def run_script(script: str, *flags: object, cwd: Path, **options: object):
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        options |= {"capture_output": True, "text": True, "timeout": 600}
        return subprocess.run(command, cwd=cwd, **options)

    return run_script


class Code:
    """Its pickle runs a command when it is loaded, in the folder of whoever loads it."""

    def __reduce__(self):
        return os.system, ("touch hacked",)


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def in_this_process(patch: pytest.MonkeyPatch, script: str, *flags: object, cwd: Path) -> int:
    """Run a script without starting one, which saves the imports. Returns its exit status."""
    patch.chdir(cwd)
    patch.setattr(sys, "argv", [script, *map(str, flags)])
    module = importlib.import_module(script.removesuffix(".py"))
    with pytest.raises(SystemExit) as end:
        fn.command_line(module.main, module.Config, module.__doc__)
    return int(end.value.code or 0)


@pytest.fixture
def run_here(capfd, monkeypatch):
    """As `run`, in this process: run_here("rnn.py", cwd=folder) -> Ended."""

    def run_script(script: str, *flags: object, cwd: Path) -> Ended:
        capfd.readouterr()
        status = in_this_process(monkeypatch, script, *flags, cwd=cwd)
        return Ended(status, *capfd.readouterr())

    return run_script


@pytest.fixture(scope="session")
def prepare():
    """As `run_here`, for what several tests share: prepare("simCLR.py", ..., cwd=folder) runs it to
    its end without an error; returns what it said on stderr."""

    def run_script(script: str, *flags: object, cwd: Path) -> str:
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
            status = in_this_process(patch, script, *flags, cwd=cwd)
        assert status == 0, said.getvalue()
        return said.getvalue()

    return run_script


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    """The test runs as script.py, in a folder of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("sys.argv", ["script.py"])


@pytest.fixture(scope="module")
def one_thread():
    """Thousands of tiny tensor operations: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def seeded():
    """The test draws the same random numbers every time."""
    torch.manual_seed(0)


@pytest.fixture
def encoder() -> nn.Module:
    """Stands in for a ResNet: a convolution and a BatchNorm. (B, 3, H, W) -> (B, 8)."""
    block = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(*block, nn.AdaptiveAvgPool2d(1), nn.Flatten())
