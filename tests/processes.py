"""Run a script in a process of its own, forked from one that has imported everything already."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

import functions as fn

ROOT = Path(__file__).parent.parent


def main(script: str, flags: list[str], cwd: Path) -> None:
    """Run the script as a program, with one thread; what it prints goes to a file in `cwd`."""
    with open(cwd / f"{os.getpid()}.out", "wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(cwd)

    # A shell's background jobs ignore Ctrl-C; another number of threads would round differently.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)

    sys.argv = [script, *flags]
    module = importlib.import_module(script.removesuffix(".py"))
    fn.command_line(module.main, module.Config, module.__doc__)


def start(script: str, *flags: object, cwd: Path) -> ForkServerProcess:
    """Start `python script flags` in the folder `cwd`."""
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    scripts = ["simCLR", "rnn", "rnn_hyperparameter_tune"]
    context.set_forkserver_preload(["processes", *scripts, "optuna_integration"])
    process = context.Process(target=main, args=(script, list(map(str, flags)), cwd))
    process.start()
    return process


def output(process: ForkServerProcess, cwd: Path) -> str:
    """What the process has printed so far."""
    with contextlib.suppress(FileNotFoundError):
        return (cwd / f"{process.pid}.out").read_text()
    return ""


def finish(process: ForkServerProcess, cwd: Path, timeout: float = 300) -> str:
    """Wait for the process and return what it printed; fails if it ended in an error."""
    process.join(timeout)
    text = output(process, cwd)
    assert process.exitcode == 0, text
    return text
