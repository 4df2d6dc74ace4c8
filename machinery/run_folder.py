"""The folder that a run leaves: its configuration from the start, its results at the end."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import lightning
import torch

from machinery.checkpoints import newest_sound
from machinery.command_line import RunConfig, as_yaml, is_first_process, load_config, save_config
from machinery.devices import started_together
from machinery.errors import CannotWrite, TimeIsUp, UserError
from machinery.files import check_output_dir, locked, write_atomically


class Run:
    """A run of a script: its folder, and the record that becomes its results.json.

    Make one when the work starts, as the clock and the state of the code are read here. Open it
    once the input is known to be good, as that makes the folder.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.folder = Path(config.resume or config.output_dir or "")
        self.started = time.monotonic()
        self.git_commit = git("rev-parse", "HEAD")
        # The results are no part of what makes results.
        code = ("--untracked-files=no", "--", ".", ":!results")
        self.git_status = git("status", "--porcelain", *code)

    def is_finished(self) -> bool:
        """Whether this resumes a run that had come to its end, unchanged; says so."""
        if self.config.resume is None or not (self.folder / "results.json").is_file():
            return False
        before = load_config(type(self.config), self.folder / "config.yaml")
        # Compared as settings, not as text: an older file may lack what is newer.
        if as_yaml(before) != as_yaml(self.config):
            return False
        print(f"{self.folder} is finished: its results are in {self.folder}/results.json")
        return True

    @contextlib.contextmanager
    def open(self) -> Iterator[Path]:
        """Make the run's folder, or reopen it when resuming, and keep other processes out.

        An end before time then says how to go on. Raises UserError when the folder cannot be made,
        already holds something, or is another process's.
        """
        if not is_first_process(self.config):  # it joined a run whose folder the first one made
            yield self.folder
            return

        if self.config.resume is None:
            self.folder = new_folder(self.config)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self.folder, wait=False))
            except filelock.Timeout:
                problem = "another process is at work there; wait for it, or stop it"
                raise UserError(f"--resume {self.folder}: {problem}") from None

            # Before anything is touched: without a sound checkpoint there is no going on.
            for checkpoint in self.folder.rglob("last.ckpt"):
                newest_sound(checkpoint)
            self.prepare()
            print(f"writing to {self.folder}")
            try:
                yield self.folder
            except CannotWrite as error:
                raise CannotWrite(f"{error}, then {self.how_to_go_on()}") from None
            except TimeIsUp:
                raise TimeIsUp(self.how_to_go_on()) from None
            except KeyboardInterrupt:
                raise KeyboardInterrupt(self.how_to_go_on()) from None

    def prepare(self) -> None:
        """Clear what an earlier session left unfinished or outdated, and save the configuration."""
        for leftover in self.folder.rglob(".*.part"):  # of a process that was killed while it wrote
            leftover.unlink()
        # An earlier end's results are not this one's.
        (self.folder / "results.json").unlink(missing_ok=True)
        save_config(self.folder / "config.yaml", self.config)

    def how_to_go_on(self) -> str:
        """The command that resumes this run, for people."""
        if self.config.processes > 1 and started_together() is not None:
            return f"continue with the same torchrun or srun command and --resume {self.folder}"
        return f"continue with: python {self.config.script} --resume {self.folder}"

    def record(self) -> dict[str, Any]:
        """What ran, where, with which versions, and for how many seconds so far."""
        machine = self.config.machine
        on_cuda = machine.device == "cuda"
        return {
            "script": self.config.script,
            "dataset": self.config.dataset,
            "seed": self.config.seed,
            "device": torch.cuda.get_device_name() if on_cuda else machine.device,
            "precision": machine.precision,
            "threads": torch.get_num_threads(),
            "versions": {
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "lightning": lightning.__version__,
            },
            "git_commit": self.git_commit,
            "git_dirty": None if self.git_status is None else bool(self.git_status),
            "seconds": round(time.monotonic() - self.started, 1),
        }

    def save(self, **outcome: Any) -> None:
        """Write results.json: the record, and the outcome (accuracies as fractions of 1)."""
        file = self.folder / "results.json"
        text = json.dumps({**self.record(), **outcome}, indent=2)
        write_atomically(file, f"{text}\n".encode())
        print(f"results in {file}")


def new_folder(config: RunConfig) -> Path:
    """The folder that --output_dir names, or a new one in runs/, made here. Raises UserError."""
    if config.output_dir:
        folder = Path(config.output_dir)
        check_output_dir(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    script, dataset = Path(config.script).stem, Path(config.dataset).resolve().name
    name = f"{script}-{dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):  # runs that start in the same second
        folder = Path("runs") / f"{name}{suffix}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise UserError(f"--output_dir: runs/{name} and 998 like it exist; name a folder")


def git(*words: str) -> str | None:
    """What a git command says about this project's code; None without git, or outside of it."""
    project = Path(__file__).parent.parent  # all of it: this folder alone could be clean
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", *words], cwd=project, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None
    return None
