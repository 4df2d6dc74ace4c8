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

import lightning
import torch

from machinery.command_line import RunConfig, as_yaml, is_first_process, save_config
from machinery.devices import resolve_device, resolve_precision, started_together
from machinery.errors import CannotWrite, TimeIsUp, UserError
from machinery.files import check_output_dir, locked, write_atomically


def finished(config: RunConfig) -> bool:
    """Whether `config` resumes a run that had come to its end; says so."""
    folder = Path(config.resume or "")
    if config.resume is None or not (folder / "results.json").is_file():
        return False
    unchanged = (folder / "config.yaml").read_text() == as_yaml(config)
    if unchanged:
        print(f"{folder} is finished: its results are in {folder}/results.json")
    return unchanged


@contextlib.contextmanager
def run_folder(config: RunConfig) -> Iterator[Path]:
    """Make (or, when resuming, reopen) the run's folder with its config.yaml; an end before time says how to resume.

    Takes away the results.json of an end that is one no more, and leaves in sys.argv how to join this run: that is what
    Lightning starts the processes of further devices with.

    Raises UserError when the folder cannot be made, already holds something, or is another process's.
    """
    script = Path(sys.argv[0]).stem
    if not is_first_process(config):
        yield Path(config.resume or config.output_dir or "")
        return
    folder = Path(config.resume) if config.resume else _new_folder(script, config)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, wait=False))
        except BlockingIOError:
            raise UserError(f"--resume {folder}: another process is at work there; wait for it, or stop it") from None
        for leftover in folder.rglob(".*.part"):  # of a process killed while it wrote
            leftover.unlink()
        (folder / "results.json").unlink(missing_ok=True)
        save_config(folder / "config.yaml", config)
        print(f"writing to {folder}")
        sys.argv[1:] = ["--resume", str(folder)]
        how = f"continue with: python {script}.py --resume {folder}"
        if config.processes > 1 and started_together() is not None:
            how = f"continue with the same torchrun or srun command and --resume {folder}"
        try:
            yield folder
        except CannotWrite as error:
            raise CannotWrite(f"{error}, then {how}") from None
        except TimeIsUp:
            raise TimeIsUp(how) from None
        except KeyboardInterrupt:
            raise KeyboardInterrupt(how) from None


def _new_folder(script: str, config: RunConfig) -> Path:
    """The folder that --output_dir names, or a new one in runs/; two runs of the same second get different ones."""
    if config.output_dir:
        folder = Path(config.output_dir)
        check_output_dir(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    name = f"{script}-{Path(config.dataset).resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        with contextlib.suppress(FileExistsError):
            (folder := Path("runs") / f"{name}{suffix}").mkdir(parents=True)
            return folder
    raise UserError(f"--output_dir: runs/{name} and 998 like it exist; name a folder")


def start_record(config: RunConfig) -> dict[str, Any]:
    """What runs, where, and with which versions: the beginning of results.json, to be taken before the work starts."""
    device = resolve_device(config.accelerator)
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")  # results change no result
    return {
        "script": Path(sys.argv[0]).name,
        "dataset": config.dataset,
        "seed": config.seed,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "precision": resolve_precision(config.precision, device),
        "threads": torch.get_num_threads(),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "lightning": lightning.__version__},
        "git_commit": commit,
        "git_dirty": None if status is None else bool(status),
        "seconds": time.time(),
    }


def save_results(folder: Path, record: dict[str, Any], **outcome: Any) -> None:
    """Write results.json: the record of the run's start, its seconds, and its outcome (accuracies: fractions of 1)."""
    record = {**record, "seconds": round(time.time() - record["seconds"], 1), **outcome}
    write_atomically(folder / "results.json", (json.dumps(record, indent=2) + "\n").encode())
    print(f"results in {folder}/results.json")


def _git(*words: str) -> str | None:
    here = Path(__file__).parent.parent  # the project, not this folder alone: its state is what is recorded
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None
    return None
