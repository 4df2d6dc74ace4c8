"""The folder that a run leaves: its settings and data from the start, its results at the end."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import lightning
import torch

from machinery import files
from machinery.checkpoints import newest_sound
from machinery.command_line import RunConfig, as_yaml, is_first_process, load_config, save_config
from machinery.devices import gpu_record, processor, started_together
from machinery.errors import CannotWrite, TimeIsUp, UserError
from machinery.files import check_output_dir, locked, write_atomically

EARLIER = "previous-results.json"
UNFINISHED = ".unfinished"  # there from the start of a run until its last figure is drawn
SESSIONS = "sessions.txt"  # when the run began and when it was resumed, with the code's commit


class Run:
    """A run of a script: its folder, and the record that becomes its results.json.

    Make one when the work starts, as the clock and the state of the code are read here. Tell it
    what its data are. Open it once the input is known to be good, as that makes the folder.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.data: dict[str, Any] | None = None
        self.folder = Path(config.resume or config.output_dir or "")
        self.started = time.monotonic()
        self.git_commit = git("rev-parse", "HEAD")
        # The results are no part of what makes results.
        code = ("--untracked-files=no", "--", ".", ":!results")
        self.git_status = git("status", "--porcelain", *code)

    def is_finished(self) -> bool:
        """Whether this resumes a run that had come to its end, unchanged; says so."""
        there = (self.folder / "results.json").is_file()
        if self.config.resume is None or not there or (self.folder / UNFINISHED).exists():
            return False
        before = load_config(type(self.config), self.folder / "config.yaml")
        # Compared as settings, not as text: an older file may lack what is newer.
        free = {name: getattr(self.config, name) for name in self.config.free_on_resume}
        before = replace(before, **free)
        if as_yaml(before) != as_yaml(self.config):
            return False
        print(f"{self.folder} is finished: its results are in {self.folder}/results.json")
        return True

    def is_about(self, data: dict[str, Any], flag: str = "dataset") -> None:
        """Note the data of this run, or check that they are the ones it began with.

        data: its `fingerprint`, and what else there is to say; flag: what names it. Of what another
        flag names, the same stands under that flag's name, and under `files` a hash of each file
        that a flag names. What was learned from other images is worth nothing here, and may not
        even fit. Raises UserError.
        """
        self.data = data
        if self.config.resume is None or not is_first_process(self.config):
            return
        try:
            began_with = json.loads((self.folder / "data.json").read_text("utf-8"))
            pairs = {flag: (began_with, data)}
            for name in {**began_with, **data}:
                if name != "files" and isinstance(began_with.get(name, data.get(name)), dict):
                    # Of which nothing is noted where it is the same set.
                    pairs[name] = began_with.get(name, began_with), data.get(name, data)
            changed = {
                name: difference(then, now)
                for name, (then, now) in pairs.items()
                if then["fingerprint"] != now["fingerprint"]
            }
            for name, content in began_with.get("files", {}).items():
                if data.get("files", {}).get(name) != content:
                    changed[name] = "other content"
        except (OSError, ValueError, KeyError):
            if not any(self.folder.rglob("*.ckpt")) and not (self.folder / "study.db").is_file():
                return  # it was interrupted before it learned anything
            problem = f"{self.folder} has no record of its data, as it is of an earlier version"
            doubt = f"take care that {getattr(self.config, flag)} holds the same images"
            print(f"warning: {problem}: {doubt}", file=sys.stderr)
            return
        for name, how in changed.items():
            problem = f"--{name} {getattr(self.config, name)} is not what it was ({how})"
            remedy = f"put it back, name a copy with --{name}, or start a new run"
            raise UserError(f"--resume {self.folder}: {problem}: {remedy}")

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
            (self.folder / UNFINISHED).unlink(missing_ok=True)

    def prepare(self) -> None:
        """Clear what an earlier session left unfinished or outdated, and save the configuration."""
        (self.folder / UNFINISHED).touch()
        for leftover in self.folder.rglob(".*.part"):  # of a process that was killed while it wrote
            leftover.unlink()
        # An earlier end's results are not this one's, but they are kept until there are new ones.
        if (self.folder / "results.json").is_file():
            files.replace(self.folder / "results.json", self.folder / EARLIER)
        code = f"{self.git_commit or 'no commit'}{', changed' if self.git_status else ''}"
        now = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {code}"
        sessions = [*self.sessions(), now]
        write_atomically(self.folder / SESSIONS, "".join(f"{one}\n" for one in sessions).encode())
        save_config(self.folder / "config.yaml", self.config)
        if self.data is not None:
            text = json.dumps(self.data, indent=2)
            write_atomically(self.folder / "data.json", f"{text}\n".encode())

    def sessions(self) -> list[str]:
        """The lines of SESSIONS: none of a run that has not begun, or is of an earlier version."""
        file = self.folder / SESSIONS
        return file.read_text("utf-8").splitlines() if file.is_file() else []

    def how_to_go_on(self) -> str:
        """The command that resumes this run, for people."""
        folder = shlex.quote(str(self.folder))
        if self.config.processes > 1 and started_together() is not None:
            return f"continue with the same torchrun or srun command and --resume {folder}"
        return f"continue with: python {self.config.script} --resume {folder}"

    def record(self) -> dict[str, Any]:
        """What ran, where, with which versions, and for how many seconds in this session."""
        machine = self.config.machine
        on_cuda = machine.device == "cuda"
        return {
            "script": self.config.script,
            "dataset": self.config.dataset,
            "data": self.data,
            "seed": self.config.seed,
            "device": torch.cuda.get_device_name() if on_cuda else machine.device,
            "processor": processor(),
            "precision": machine.precision,
            **({"gpu": gpu_record()} if on_cuda else {}),
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
        sessions = {} if self.config.resume is None else {"sessions": self.sessions()}
        text = json.dumps({**self.record(), **sessions, **outcome}, indent=2)
        write_atomically(file, f"{text}\n".encode())
        (self.folder / EARLIER).unlink(missing_ok=True)
        print(f"results in {file}")


def difference(then: dict[str, Any], now: dict[str, Any]) -> str:
    """How two descriptions of data differ: for people."""
    lost = [name for name in then["classes"] if name not in now["classes"]]
    new = [name for name in now["classes"] if name not in then["classes"]]
    words = [f"without class {lost[0]}"] if lost else []
    words += [f"with a new class {new[0]}"] if new else []
    for key, count in now.items():
        if isinstance(count, int) and then.get(key) != count:
            words.append(f"{key.replace('_', ' ')} {count:,} instead of {then.get(key, 0):,}")
    return ", ".join(words) or "as many images, but others"


def new_folder(config: RunConfig) -> Path:
    """The folder that --output_dir names, or a new one in runs/, made here. Raises UserError."""
    if config.output_dir:
        folder = Path(config.output_dir)
        check_output_dir(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    script, dataset = Path(config.script).stem, Path(config.dataset).resolve().name
    dataset = re.sub(r"[^\w.-]+", "-", dataset)[:60]  # easy to type, for --resume
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
