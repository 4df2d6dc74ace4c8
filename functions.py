"""What the three scripts share: whatever any experiment on small images would want.

In this order: user errors and the command line, the run folder, data sets, batches, the NT-Xent loss,
training with Lightning, evaluation (features, k-NN, accuracy per class) and figures.
What the papers are about (the recurrent network, SimCLR's augmentations and model) stands in the scripts.

Tensors are written with their shapes: N images in a set, B in a batch, C channels, H x W pixels, D features.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import hashlib
import io
import json
import logging
import math
import os
import re
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, TypeVar

import jsonargparse
import lightning
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.callbacks import Callback, Checkpoint, Timer, TQDMProgressBar
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STARTED = time.monotonic()

# ------------------------------------------------------------------------------------------------
# User errors and the command line
# ------------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake the user can mend. Shown as one line on stderr that names the culprit and the remedy; exit status 2."""


class Diverged(UserError):
    """The loss is no longer finite."""


class CannotWrite(UserError):
    """A file could not be written: the disk is full, say."""


class TimeIsUp(Exception):
    """--max_time is over; the run can be resumed."""


def check(condition: bool, message: str) -> None:
    """Raise UserError(message) unless `condition` holds."""
    if not condition:
        raise UserError(message)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch found no memory, for which it has several ways: the CPU's, CUDA's, and cuBLAS's and cuDNN's."""
    words = ("out of memory", "allocate memory", "ALLOC_FAILED")
    plain = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return plain or isinstance(error, (MemoryError, torch.OutOfMemoryError))


@dataclass
class RunConfig:
    """What every script's configuration begins with."""

    dataset: str = "cifar10"
    """cifar10, cifar100, stl10, digits, or a folder of images: DIR/train/<class>/*, DIR/test/<class>/*"""
    data_dir: str = "data"
    """where data sets are downloaded to, and decoded image folders are cached"""
    image_size: int | None = None
    """side in pixels to which the images of a folder are brought (32 unless given); other sets keep their own"""
    output_dir: str | None = None
    """folder for this run's results; unless given, a new one named after script, data set and time, in runs/"""
    seed: int = 0
    """decides initial weights, splits, order, augmentation and dropout"""
    accelerator: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to compute; auto takes a CUDA GPU, else Apple's, else the CPU"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """float32, or bfloat16 autocast; auto takes bfloat16 where the processor computes it fast"""
    resume: str | None = None
    """continue an interrupted run: its folder, or nothing for the newest one"""

    of_the_session: ClassVar[tuple[str, ...]] = ("output_dir", "resume", "max_time", "timeout")
    """what says nothing about a run's outcome: not in its config.yaml, and free to differ when it is resumed"""

    def validate(self) -> None:
        """Check the values that types alone do not (ranges, existing devices). Raises UserError."""
        check(self.dataset != "", "--dataset is empty: name a data set or a folder")
        check(0 <= self.seed < 2**32, f"--seed must be between 0 and 2^32 - 1, got {self.seed}")
        size = self.image_size
        check(size is None or 4 <= size <= 1024, f"--image_size must be between 4 and 1024 pixels, got {size}")
        resolve_device(self.accelerator)
        if self.output_dir is not None and self.resume is None and is_first_process(self):
            check_output_dir(Path(self.output_dir))

    @property
    def may_grow(self) -> tuple[str, ...]:
        """What a resumed run may raise, as all that was done so far would have been done all the same."""
        return ()

    @property
    def processes(self) -> int:
        """How many processes train together, each on a device."""
        return 1


ConfigT = TypeVar("ConfigT", bound=RunConfig)


def is_first_process(config: RunConfig) -> bool:
    """Whether this process is the first of those that train together: it alone prints and writes."""
    return config.processes == 1 or getattr(rank_zero_only, "rank", 0) == 0


def started_together() -> int | None:
    """How many processes torchrun or SLURM started together, this one among them; None where neither did.

    Raises UserError for a SLURM job without --ntasks-per-node.
    """
    environment = next((e for e in (TorchElasticEnvironment, SLURMEnvironment) if e.detect()), None)
    try:
        return environment().world_size() if environment is not None else None
    except RuntimeError as error:  # Lightning's, of SLURM's variables
        raise UserError(f"--devices: {' '.join(str(error).split())}") from None


class OneLineParser(jsonargparse.ArgumentParser):
    """jsonargparse's parser, with each error as one line that names the flag."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = re.sub(r'Parser key "([^"]+)":', r"--\1:", message)
        message = re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", message)
        message = re.sub(r"a <class '(\w+)'>", r"a value of type \1", message)
        message = re.sub(r"unrecognized arguments: (.*)", r"unknown flag or argument: \1 (see --help)", message)
        message = re.sub(r"Option '(.*?)' is not accepted", r"unknown key '\1' in the --config file", message)
        raise UserError(" ".join(message.split()))


def make_parser(config_class: type[RunConfig], description: str | None) -> OneLineParser:
    """The command line of a script: one flag per field of its dataclass, `--config FILE.yaml` and `--print_config`."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = OneLineParser(description=(description or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the values below")
    parser.add_class_arguments(config_class, as_group=False)
    return parser


def parse_config(config_class: type[ConfigT], argv: Sequence[str], description: str | None = None) -> ConfigT:
    """Turn command-line words into a validated configuration.

    With `--resume`, the configuration is the one that the interrupted run saved; other flags may repeat it, or raise
    what `may_grow`. Raises UserError for anything that is not right; exits 0 after `--help` or `--print_config`.
    """
    argv = list(argv)
    for i, word in enumerate(argv):  # a bare --resume means the newest run
        if word == "--resume" and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
            argv[i] = "--resume=latest"
    parser = make_parser(config_class, description)
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        if word == "--config" or word.startswith("--config="):
            check_yaml(Path(word.partition("=")[2] or following))
    given = parser.parse_args(argv)
    if given.resume is not None:
        folder = newest_run(Path(sys.argv[0]).stem) if given.resume == "latest" else Path(given.resume)
        saved_file = folder / "config.yaml"
        check(saved_file.is_file(), f"--resume {folder}: no run there (it has no config.yaml)")
        check_yaml(saved_file)
        try:
            saved = parser.parse_args(["--config", str(saved_file)])
        except UserError as error:
            raise UserError(f"--resume {folder}: its config.yaml is not one of this script's ({error})") from None
        given = parser.parse_args(["--config", str(saved_file), *argv])
        same = ("config", *config_class.of_the_session)
        may_grow = config_class(**{field.name: saved[field.name] for field in fields(config_class)}).may_grow
        differing = [k for k in vars(saved) if k not in same and saved[k] != given[k]]
        wrong = [k for k in differing if k not in may_grow or saved[k] > given[k]]
        began = " and ".join(f"--{key} {saved[key]}" for key in wrong)
        check(not wrong, f"--resume {folder}: that run began with {began}, which must stay: leave it out")
        for key in differing:
            print(f"--{key} raised from {saved[key]} to {given[key]}: what was done so far stays valid")
        given.resume, given.output_dir = str(folder), str(folder)
    for field in fields(config_class):
        check(given[field.name] is not None or field.default is None, f"--{field.name} must have a value, not null")
    config = config_class(**{field.name: given[field.name] for field in fields(config_class)})
    config.validate()
    return config


def check_yaml(file: Path) -> None:
    """Raise UserError unless `file` is a YAML mapping of plain values."""
    try:
        values = yaml.safe_load(file.read_bytes())
    except OSError as error:
        raise UserError(f"--config {file} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config {file} is not YAML of plain values ({reason})") from None
    check(isinstance(values, dict), f"--config {file} must have lines of the form `key: value`")


def command_line(main: Callable[[ConfigT], None], config_class: type[ConfigT], description: str | None) -> NoReturn:
    """Run `main(config)` as a program: user errors and Ctrl-C end in one line on stderr, without a traceback."""
    script = Path(sys.argv[0]).name
    try:
        config = parse_config(config_class, sys.argv[1:], description)
        if config.processes == 1:
            rank_zero_only.rank = 0  # type: ignore[attr-defined] # started by srun, say, but a run of its own
        elif not is_first_process(config):
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the whole process
        main(config)
    except (UserError, OSError) as error:  # an OSError names its file, such as a folder that may not be read
        print(f"{script}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"{script}: error: out of memory: take smaller batches, or a smaller network", file=sys.stderr)
        sys.exit(2)
    except TimeIsUp as time_is_up:
        print(f"--max_time is over; {time_is_up}")
    except KeyboardInterrupt as interrupt:
        how = interrupt.args[0] if interrupt.args else "nothing new was saved yet"
        print(f"\n{script}: interrupted; {how}", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


# ------------------------------------------------------------------------------------------------
# The run folder
# ------------------------------------------------------------------------------------------------


def newest_run(script: str, runs: Path = Path("runs")) -> Path:
    """The most recently changed run folder of `script` below `runs`. Raises UserError when there is none."""
    found = [path.parent for path in runs.glob(f"{script}-*/config.yaml")]
    check(bool(found), f"--resume: no run of {script} in {runs}/; give the run's folder, --resume DIR")
    # A folder changes when a file in it is renamed or made: the run's own, or its checkpoints'.
    return max(found, key=lambda run: max(path.stat().st_mtime for path in (run, *run.glob("**/checkpoints"))))


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
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Keep other processes that ask for it too out of `folder`, until this one leaves the block or ends in any way.

    Raises BlockingIOError if another is there and `wait` is false. Where a file system knows no locks, there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            import fcntl  # not on Windows

            file = stack.enter_context(open(folder / ".lock", "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                print(f"waiting for another process that is at work in {folder}", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        except BlockingIOError:
            raise
        except (ImportError, OSError):
            pass
        yield


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all: aside, synced to disk, then renamed over the old one. Raises CannotWrite."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:  # which does not name the file when the disk is full
        problem = f"{path} could not be written ({error.strerror}); what was written before is whole"
        raise CannotWrite(f"{problem}: make room, or give access there") from None
    finally:
        aside.unlink(missing_ok=True)


def save_torch(path: Path, value: Any) -> None:
    """`torch.save`, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomically(path, buffer.getbuffer())


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


def check_output_dir(folder: Path) -> None:
    """Raise UserError unless a run can be written to `folder`: one that is new or empty, where one may write."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    usable = existing.is_dir() and os.access(existing, os.W_OK)
    check(usable, f"--output_dir {folder} cannot be made or written to (because of {existing}): take another folder")
    full = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    check(not full, f"--output_dir {folder} is not empty: take a new folder, or go on with --resume {folder}")


def as_yaml(config: RunConfig) -> str:
    """A configuration as the YAML that `--config` reads, without what is of one session only."""
    values = {key: value for key, value in asdict(config).items() if key not in config.of_the_session}
    plain = {
        k: json.dumps(v, ensure_ascii=False) if isinstance(v, str) else yaml.safe_dump(v) for k, v in values.items()
    }
    return "".join(f"{key}: {text.splitlines()[0]}\n" for key, text in plain.items())


def save_config(file: Path, config: RunConfig) -> None:
    """Write a configuration as the YAML that `--config` reads."""
    write_atomically(file, as_yaml(config).encode())


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
    here = Path(__file__).parent
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None
    return None


# ------------------------------------------------------------------------------------------------
# Data sets
# ------------------------------------------------------------------------------------------------


@dataclass
class ImageDataset:
    """A set of images in memory. images: uint8 (N, C, H, W); labels: int64 (N,), an index into `classes`."""

    name: str
    train_images: Tensor
    train_labels: Tensor | None
    test_images: Tensor | None
    test_labels: Tensor | None
    classes: tuple[str, ...]
    unlabelled_images: Tensor | None = None

    @property
    def pretraining_images(self) -> Tensor:
        """The images that need no labels: the set's unlabelled ones if it has some, else the training images."""
        return self.train_images if self.unlabelled_images is None else self.unlabelled_images

    def labelled(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(train images, train labels, test images, test labels). Raises UserError where the set lacks one of them."""
        if self.train_labels is None or self.test_images is None or self.test_labels is None:
            raise UserError(
                f"--dataset {self.name} has no classes or no test images, which this needs: lay them out as "
                f"{self.name}/train/<class>/* and {self.name}/test/<class>/*, or run --stages pretrain alone"
            )
        check(len(self.classes) > 1, f"--dataset {self.name} has one class only, where telling classes apart needs two")
        return self.train_images, self.train_labels, self.test_images, self.test_labels


def load_dataset(name: str, data_dir: str | Path = "data", image_size: int | None = None) -> ImageDataset:
    """Load a data set by name, or a folder of images (made square, `image_size` pixels a side, 32 unless given).

    Downloads CIFAR-10/100 and STL-10 into `data_dir` when they are not there. Raises UserError.
    """
    if name == "digits":
        return _load_digits()
    if name in ("cifar10", "cifar100", "stl10"):
        try:
            with locked(Path(data_dir)):  # two processes must not download it at once
                return _load_torchvision(name, Path(data_dir))
        except OSError as error:
            raise UserError(f"--data_dir {data_dir} cannot be used ({error.strerror}): name another folder") from None
    check(Path(name).is_dir(), f"--dataset {name}: no such folder, and not one of cifar10, cifar100, stl10, digits")
    return _load_folder(Path(name), Path(data_dir), image_size or 32)


def _load_digits() -> ImageDataset:
    """scikit-learn's 1,797 real 8 x 8 scans of handwritten digits, as grey RGB; every fifth is a test image."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = torch.from_numpy(scans.images * (255 / 16)).round().to(torch.uint8)  # (N, 8, 8), 0...16 in the file
    images, labels = images[:, None].repeat(1, 3, 1, 1), torch.from_numpy(scans.target).long()
    test = stratified_subset(labels, 0.2, seed=0)
    train = complement(test, len(labels))
    return ImageDataset("digits", images[train], labels[train], images[test], labels[test], tuple("0123456789"))


def _load_torchvision(name: str, data_dir: Path) -> ImageDataset:
    import socket

    from torchvision import datasets

    archive = "stl10_binary.tar.gz" if name == "stl10" else f"{name.replace('cifar', 'cifar-')}-python.tar.gz"
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(8)  # torchvision sets none: without a network it could wait for ever
    try:
        if name == "stl10":
            splits = [datasets.STL10(str(data_dir), s, download=s == "train") for s in ("train", "test", "unlabeled")]
            train, test, unlabelled = ((torch.from_numpy(s.data), torch.from_numpy(s.labels).long()) for s in splits)
            return ImageDataset(name, *train, *test, tuple(splits[0].classes), unlabelled[0])
        kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        splits = [kind(str(data_dir), train=is_train, download=True) for is_train in (True, False)]
        planes = [torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous() for s in splits]
        train, test = ((images, torch.tensor(s.targets)) for images, s in zip(planes, splits, strict=True))
        return ImageDataset(name, *train, *test, tuple(splits[0].classes))
    except Exception as error:  # of the network, the disk, or a damaged archive
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--dataset {name} is not in {data_dir} and could not be downloaded ({reason}): put "
            f"{archive} into {data_dir}, or run without it: python {Path(sys.argv[0]).name} --dataset digits"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def _load_folder(folder: Path, data_dir: Path, size: int) -> ImageDataset:
    """A folder of the user's own images: train/<class>/* and test/<class>/*, or images alone (no classes)."""
    name = str(folder)
    if not (folder / "train").is_dir():
        files = sorted(path for path in folder.iterdir() if not path.is_dir() and _is_visible(path.relative_to(folder)))
        check(bool(files), f"--dataset {folder} has neither images in it nor a folder train/<class>/ with images")
        return ImageDataset(name, _decode(folder, files, data_dir, size), None, None, None, ())
    files, labels, classes = _class_files(folder / "train")
    n = len(files)
    if not (folder / "test").is_dir():
        return ImageDataset(name, _decode(folder, files, data_dir, size), labels, None, None, classes)
    test_files, test_labels, test_classes = _class_files(folder / "test")
    unknown = sorted(set(test_classes) - set(classes))
    check(not unknown, f"--dataset {folder}: test/ has classes that train/ lacks: {', '.join(unknown)}")
    test_labels = torch.tensor([classes.index(test_classes[label]) for label in test_labels])
    images = _decode(folder, files + test_files, data_dir, size)
    return ImageDataset(name, images[:n], labels, images[n:], test_labels, classes)


def _is_visible(path: Path) -> bool:
    """Every file counts as an image but those that systems hide: what is none is found on decoding, and named."""
    return not any(part.startswith(".") for part in path.parts) and path.name.lower() not in (
        "thumbs.db",
        "desktop.ini",
    )


def _class_files(split: Path) -> tuple[list[Path], Tensor, tuple[str, ...]]:
    """The files below split/<class>/, the class of each, int64 (N,), and the names of classes that have any."""
    files = sorted(path for path in split.glob("*/**/*") if not path.is_dir() and _is_visible(path.relative_to(split)))
    check(bool(files), f"--dataset: no images in {split}/<class>/")
    names = [path.relative_to(split).parts[0] for path in files]
    classes = sorted(set(names))  # an empty folder is no class
    return files, torch.tensor([classes.index(name) for name in names]), tuple(classes)


def _decode(folder: Path, files: list[Path], data_dir: Path, size: int) -> Tensor:
    """Decode files to uint8 (N, 3, size, size), once: cached under a key of every path, length and time of change."""
    key = hashlib.sha256(f"1 {size} ".encode() + os.fsencode(folder.resolve()))
    for file in files:
        stat = file.stat()
        key.update(os.fsencode(file.relative_to(folder)) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    cache = data_dir / "cache" / f"{folder.resolve().name}-{size}px-{key.hexdigest()[:16]}.pt"
    if cache.is_file():
        with contextlib.suppress(Exception):  # a damaged cache is decoded afresh, and overwritten
            images = torch.load(cache, weights_only=True, mmap=True)
            if images.shape == (len(files), 3, size, size) and images.dtype == torch.uint8:
                return images
    print(f"decoding {len(files):,} images of {folder} (once; kept in {cache})", flush=True)
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    from PIL import Image

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # read_image refuses such files itself
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, pixels in enumerate(pool.map(lambda file: read_image(file, size), files)):
            images[i] = torch.tensor(pixels).permute(2, 0, 1)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_torch(cache, images)
    except (OSError, UserError) as error:
        print(f"note: the decoded images are not kept for the next run ({error})", file=sys.stderr)
    return images


def read_image(file: Path, size: int) -> np.ndarray:
    """Decode one image file of any mode and orientation to RGB, uint8 (size, size, 3): scaled, then cropped centrally.

    Raises UserError that names the file when it is no image, is damaged, or is absurdly large.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            if image.width * image.height > 50_000_000:  # before any pixel is decoded
                raise ValueError(f"{image.width} x {image.height} pixels")
            image.draft("RGB", (size, size))  # a JPEG decoder may shrink by 2, 4 or 8 as it reads
            upright = ImageOps.exif_transpose(image)
            if upright.mode == "F":
                raise ValueError("its pixels are floating-point numbers")
            if upright.mode.startswith("I"):  # 16-bit grey: Pillow would clip, not scale
                levels = np.asarray(upright)
                upright = Image.fromarray((levels >> 8 if levels.max() > 255 else levels).astype(np.uint8))
            if upright.mode in ("P", "PA", "LA", "RGBA") or "transparency" in upright.info:  # shown on white
                rgba = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            rgb = upright.convert("RGB")
            if rgb.size != (size, size):
                rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)
            return np.asarray(rgb)
    except Exception as error:  # Pillow raises many kinds for damaged files
        reason = str(error).replace(str(file), "the file")
        raise UserError(f"{file} is not an image that can be read ({reason}): replace or remove it") from None


def stratified_subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Indices, int64 (M,), sorted, of `fraction` of each class (rounded, at least one image), fixed by the seed.

    labels: int64 (N,). For the validation split and few-label subsets. Raises ValueError unless 0 < fraction <= 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = max(1, round(fraction * len(members)))
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen).sort().values


def complement(indices: Tensor, n: int) -> Tensor:
    """The indices of 0...n-1, int64, sorted, that are not in `indices`."""
    rest = torch.ones(n, dtype=torch.bool)
    rest[indices] = False
    return rest.nonzero().flatten()


class Normalize(nn.Module):
    """Each channel to mean 0 and deviation 1, measured on `images`: uint8 (N, C, H, W), the training images only.

    uint8, or float32 in [0, 1]: (B, C, H, W) -> float32 (B, C, H, W). A constant channel is only centred.
    """

    mean: Tensor  # (C, 1, 1), in units of 1 = white
    std: Tensor

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        levels = torch.arange(256, dtype=torch.float64) / 255
        # From a histogram of the 256 values: exact, and without a float copy of the whole set.
        counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
        p = counts / counts[:1].sum(dtype=torch.float64)  # (C, 256)
        mean = p @ levels
        std = (p @ levels**2 - mean**2).clamp_min(0).sqrt()
        self.register_buffer("mean", mean.float().view(-1, 1, 1))
        self.register_buffer("std", torch.where(std > 1e-6, std, 1.0).float().view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        white = 255 if images.dtype == torch.uint8 else 1
        return (images.float() * (1 / (white * self.std))).sub_(self.mean / self.std)


class Batches:
    """Batches as slices of tensors that already lie on the device: no worker processes, no per-image Python.

    Yields tuples of tensors (B, ...). With a `seed`, the order is a new permutation in every epoch, decided by
    (seed, epoch) alone, so that a resumed run sees what an uninterrupted one would have seen.

    Of `ranks` processes, each sees its own `batch_size` of every ranks * batch_size images of that order (`drop_last`
    then, so that all have a share): together they see what one process with the larger batch would have seen.
    """

    def __init__(
        self, *tensors: Tensor, batch_size: int, seed: int | None = None, drop_last: bool = False, ranks: int = 1
    ) -> None:
        self.tensors, self.batch_size, self.seed, self.drop_last = tensors, batch_size, seed, drop_last
        self.ranks, self.rank, self.epoch = ranks, 0, 0

    def __len__(self) -> int:
        n, step = len(self.tensors[0]), self.batch_size * self.ranks
        return n // step if self.drop_last else -(-n // step)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        n = len(self.tensors[0])
        if self.seed is not None:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
            order = torch.randperm(n, generator=generator).to(self.tensors[0].device)
        for step in range(len(self)):
            start = (step * self.ranks + self.rank) * self.batch_size
            stop = min(start + self.batch_size, n)
            if self.seed is None:
                yield tuple(tensor[start:stop] for tensor in self.tensors)
            else:
                yield tuple(tensor.index_select(0, order[start:stop]) for tensor in self.tensors)


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, such as (seed, epoch, rank); (3, 4) and (3, 4, 0) give different ones."""
    sequence = np.random.SeedSequence([len(numbers), *numbers])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


# ------------------------------------------------------------------------------------------------
# NT-Xent
# ------------------------------------------------------------------------------------------------


def nt_xent_loss(embeddings: Tensor, temperature: float = 0.5, block: int | None = None) -> Tensor:
    """SimCLR's loss, Eq. 1 and Algorithm 1 of Chen et al. 2020 (arXiv 2002.05709), averaged over all 2N anchors.

        l(i, j) = -log( exp(sim(z_i, z_j) / tau) / sum over k != i of exp(sim(z_i, z_k) / tau) )

    embeddings: (2N, D), any float type; rows i and i + N are the two views of image i, and need not be normalised.
    temperature: tau > 0. Returns a scalar, computed in float32 (float64 stays float64), also under autocast.
    The positive stands once in the denominator. Raises ValueError for an odd number of rows or a temperature <= 0.

    The (2N, 2N) similarities are never held at once, only `block` rows of them (512 on the CPU, 4,096 on a GPU): memory
    grows with N, not N^2. The value does not depend on the block but for rounding. The gradient is of first order only.
    """
    if embeddings.ndim != 2 or len(embeddings) % 2 or len(embeddings) == 0:
        raise ValueError(f"embeddings must be (2N, D) with N >= 1, got {tuple(embeddings.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if block is not None and block < 1:
        raise ValueError(f"block must be at least one row, got {block}")
    with torch.autocast(embeddings.device.type, enabled=False):
        z = F.normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=1)  # (2N, D)
        return NTXent.apply(z, temperature, block or (512 if z.device.type == "cpu" else 4096))


class NTXent(torch.autograd.Function):
    """Eq. 1 on unit vectors z (2N, D), with its gradient computed on the way, while each block of rows is at hand.

    With p_ik the softmax over k != i of sim(z_i, z_k) / tau, and z_i+ the positive of z_i, the loss is the mean of
    -log p_ii+, and  d loss / d z_i = (sum over k of (p_ik + p_ki) z_k - 2 z_i+) / (2N tau).
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float, block: int) -> Tensor:
        two_n = len(z)
        positive = torch.arange(two_n, device=z.device).roll(two_n // 2)  # i's positive is i + N, and i + N's is i
        loss, gradient = z.new_zeros(()), torch.zeros_like(z)
        for start in range(0, two_n, block):
            rows = slice(start, start + block)
            logits = (z[rows] / temperature) @ z.T  # (block, 2N): sim(z_i, z_k) / tau, cosine similarity
            logits.diagonal(start).fill_(-torch.inf)  # k != i
            log_p = torch.log_softmax(logits, dim=1)
            loss -= log_p.gather(1, positive[rows].unsqueeze(1)).sum()
            if ctx.needs_input_grad[0]:
                p = log_p.exp_()
                gradient[rows].addmm_(p, z)
                gradient.addmm_(p.T, z[rows])
        ctx.save_for_backward(gradient.sub_(z[positive], alpha=2).div_(two_n * temperature))
        return loss / two_n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None


# ------------------------------------------------------------------------------------------------
# Training with Lightning
# ------------------------------------------------------------------------------------------------


def resolve_device(accelerator: str) -> str:
    """'cuda', 'mps' or 'cpu'. Raises UserError for an accelerator this machine does not have."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if accelerator == "auto":
        return next(device for device, present in here.items() if present)
    check(here[accelerator], f"--accelerator {accelerator}: PyTorch finds none here; leave it out, or take cpu")
    return accelerator


def resolve_precision(precision: str, device: str) -> Literal["fp32", "bf16"]:
    """'fp32' or 'bf16'. auto is bfloat16 on CUDA GPUs since Ampere and on CPUs with AMX, where it is fast."""
    if precision != "auto":
        return "bf16" if precision == "bf16" else "fp32"
    if device == "cuda":
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp32"
    return "bf16" if device == "cpu" and torch.cpu._is_amx_tile_supported() else "fp32"


def prepare_device(config: RunConfig) -> None:
    """Settings of the whole process that make its device fast.

    On CUDA, a run in bfloat16 computes the matrix products that stay float32 (augmentation, NT-Xent) as TF32.
    """
    device = resolve_device(config.accelerator)
    reduced = resolve_precision(config.precision, device) == "bf16"
    if device == "cuda":
        torch.set_float32_matmul_precision("high" if reduced else "highest")
    if device == "cpu":
        # Lightning has CUDA looked for by NVML: where there is none, each optimizer step tries to open its library.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
        # glibc hands large blocks of memory back to the system, and fetches them again page by page: keep them.
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def describe_machine(config: RunConfig) -> str:
    """Device, precision and threads of a run, for people."""
    device = resolve_device(config.accelerator)
    return f"{device}, {resolve_precision(config.precision, device)}, {torch.get_num_threads()} threads"


class SafeCheckpoints(TorchCheckpointIO):
    """A checkpoint appears whole or not at all, and the one before it is kept beside it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name("fresh.ckpt")
        save_torch(fresh, checkpoint)
        if path.is_file():
            os.replace(path, previous(path))
        os.replace(fresh, path)


def previous(checkpoint: Path) -> Path:
    """Where the checkpoint before `checkpoint` is kept."""
    return checkpoint.with_name(f"previous-{checkpoint.name}")


def newest_sound(checkpoint: Path) -> Path | None:
    """`checkpoint`, or the one before it if it is damaged (with a warning), or None where there is none.

    Raises UserError if all there are damaged.
    """
    there = [path for path in (checkpoint, previous(checkpoint)) if path.is_file()]
    for path in there:
        try:
            load_checkpoint(path)
        except UserError:
            continue
        if path != there[0]:
            print(f"warning: {there[0]} is damaged; going on from {path}", file=sys.stderr)
            there[0].unlink(missing_ok=True)  # lest it take the place of the sound one before it
        return path
    check(not there, f"--resume: every checkpoint in {checkpoint.parent} is damaged; start afresh, without --resume")
    return None


def load_checkpoint(file: Path) -> dict[str, Any]:
    """Read a checkpoint as data, on the CPU: one that holds code, or whose checksums are wrong, raises UserError."""
    try:
        with zipfile.ZipFile(file) as archive:  # PyTorch writes checksums, but does not compare them
            if archive.testzip() is not None:
                raise ValueError
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file can fail in many ways
        raise UserError(f"{file} is damaged, or no checkpoint of plain data: take another, or start afresh") from None


class Checkpoints(Checkpoint):
    """Saves last.ckpt after every epoch, and best.ckpt when the `best` metric is higher than in all epochs before.

    What was best is read from the log, whose rows travel in last.ckpt, as do the best weights: what a resumed run
    believes to be the best is what it has, whatever became of best.ckpt.
    """

    def __init__(self, folder: Path, log: EpochLog, best: str | None = None) -> None:
        self.folder, self.epoch_log, self.best = folder, log, best
        self.best_weights: dict[str, Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best_weights": self.best_weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_weights = state_dict["best_weights"]

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.best is not None:
            *earlier, newest = [row[self.best] for row in self.epoch_log.rows]
            if all(newest > value for value in earlier):
                self.best_weights = {name: value.cpu().clone() for name, value in pl_module.state_dict().items()}
                trainer.save_checkpoint(self.folder / "best.ckpt")
        trainer.save_checkpoint(self.folder / "last.ckpt")  # after it: a run killed in between redoes this epoch


class EpochSeed(Callback):
    """Each epoch's order, augmentation and dropout follow from (seed, epoch) alone: a resumed run repeats them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        torch.manual_seed(mix_seed(self.seed, trainer.current_epoch, trainer.global_rank))
        assert isinstance(trainer.train_dataloader, Batches)
        trainer.train_dataloader.epoch, trainer.train_dataloader.rank = trainer.current_epoch, trainer.global_rank


class TimeLimit(Callback):
    """--max_time: training ends after the last epoch that fits, and is saved. Counted once the libraries are loaded.

    One epoch is trained in any case: a run that is resumed again and again comes to its end.
    """

    def __init__(self, max_time: str | None, log: EpochLog) -> None:
        self.end, self.epoch_log = STARTED + (parse_duration(max_time) if max_time else math.inf), log

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        fits = time.monotonic() + self.epoch_log.rows[-1]["seconds"] < self.end
        trainer.should_stop = trainer.strategy.broadcast(not fits)  # the first process decides for all


def parse_duration(max_time: str) -> float:
    """Seconds of a duration in Lightning's format, DD:HH:MM:SS. Raises UserError."""
    try:
        return Timer(max_time).time_remaining() or 0.0
    except (ValueError, MisconfigurationException):
        raise UserError(f"--max_time {max_time}: give days, hours, minutes and seconds as DD:HH:MM:SS") from None


class EpochLog(Callback):
    """One row per epoch: printed as a line, kept in `rows`, written to metrics.csv and to TensorBoard.

    What `training_step` returns ({"loss": ..., "accuracy": ...}, means over a batch) becomes train_loss and so on,
    the means over the epoch's images; what a module logs in validation stands beside it.

    The rows travel in the checkpoint, so that a resumed run's metrics.csv has every epoch exactly once.
    """

    def __init__(self, file: Path | None = None, quiet: bool = False, rate: str = "--learning_rate") -> None:
        self.file, self.quiet, self.rate = file, quiet, rate  # rate: the flag to lower when the loss diverges
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.start = self.training_end = time.perf_counter()
        self.sums: dict[str, Tensor] = {}
        self.means: dict[str, float] = {}
        self.images = 0
        self.learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.to_check: list[tuple[int, float, Tensor]] = []  # step, its learning rate, its loss

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.step_rate = trainer.optimizers[0].param_groups[0]["lr"]  # before the step's schedule changes it

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        n, last, loss = len(batch[0]), batch_idx + 1 == trainer.num_training_batches, outputs["loss"].detach()
        self.to_check.append((trainer.global_step, self.step_rate, loss))
        if last or loss.device.type == "cpu" or len(self.to_check) == 50:  # to look is to wait for the GPU
            self.check_finite(trainer)
        for name, value in outputs.items():  # what training_step returned; `self.log` there costs a tenth of a step
            self.sums[name] = self.sums.get(name, 0) + n * value.detach()
        self.images += n
        if last:
            self.means = {
                f"train_{name}": float(trainer.strategy.reduce(total, reduce_op="mean")) / self.images
                for name, total in self.sums.items()
            }
        self.training_end = time.perf_counter()

    def check_finite(self, trainer: lightning.Trainer) -> None:
        """Raise Diverged if a loss that was kept for it is not finite."""
        to_check, self.to_check = self.to_check, []
        for step, rate, loss in to_check:
            if not math.isfinite(loss):
                self.diverged(trainer, f"step {step}, learning rate {rate:g}")

    def diverged(self, trainer: lightning.Trainer, where: str) -> NoReturn:
        saved = self.file.with_name("checkpoints") / "last.ckpt" if self.file and self.rows else "none"
        where = f"epoch {trainer.current_epoch + 1}, {where}; last good checkpoint: {saved}"
        raise Diverged(f"the loss is not finite ({where}): start a new run with a lower {self.rate}")

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        validated = (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
        held_out = {name: float(value) for name, value in trainer.callback_metrics.items()} if validated else {}
        row = {
            "epoch": trainer.current_epoch + 1,
            **self.means,
            **held_out,
            "learning_rate": self.learning_rate,
            "images_per_second": round(trainer.world_size * self.images / (self.training_end - self.start), 1),
            "seconds": round(time.perf_counter() - self.start, 3),
        }
        if not all(math.isfinite(value) for value in row.values()):  # of the held-out images
            self.diverged(trainer, f"step {trainer.global_step}, learning rate {self.learning_rate:g}")
        self.rows.append(row)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=int(row["epoch"]))
        if self.file is not None and trainer.is_global_zero:
            write_csv(self.file, self.rows)
        if not self.quiet:
            pl_module.print(self._line(row, trainer.max_epochs or 0))  # above the progress bar, if there is one
            sys.stdout.flush()

    def _line(self, row: dict[str, float], epochs: int) -> str:
        words = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"]
        for split in ("train", "validation", "knn"):
            loss, accuracy = row.get(f"{split}_loss"), row.get(f"{split}_accuracy")
            if loss is not None:
                words.append(f"{split} loss {loss:.4f}")
            if accuracy is not None:
                words.append(f"{100 * accuracy:.1f} %" if loss is not None else f"k-NN {100 * accuracy:.1f} %")
        words += [f"lr {row['learning_rate']:.2g}", f"{row['images_per_second']:,.0f} images/s"]
        left = (epochs - row["epoch"]) * float(np.mean([r["seconds"] for r in self.rows]))
        return "  ".join(words) + (f"  {format_time(left)} left" if left else "")


def write_csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV, whole or not at all; a column that a row lacks stays empty there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(file, text.getvalue().encode())


def format_time(seconds: float) -> str:
    """A duration for people: 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with its time to go, epochs counted from 1; the numbers stand in the epoch lines above it."""

    def get_metrics(self, *_: Any) -> dict[str, Any]:
        return {}

    def on_train_epoch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")


def make_trainer(
    config: RunConfig,
    epochs: int,
    callbacks: Sequence[Callback] = (),
    *,
    folder: Path | None = None,
    log: EpochLog | None = None,
    checkpoint: Checkpoints | None = None,
    max_time: str | None = None,
    devices: int = 1,
    num_nodes: int = 1,
    **options: Any,
) -> lightning.Trainer:
    """A Lightning trainer that is quiet, seeded per epoch, and writes into `folder` (TensorBoard) if it is given.

    Progress bar on a terminal only; the epoch lines come from `log`. `options` are further ones of Lightning's Trainer.
    Several devices train by DDP, one process each; on GPUs, BatchNorm then sees the batches of all.
    """
    from lightning.pytorch.loggers import TensorBoardLogger

    quiet_libraries()
    device = resolve_device(config.accelerator)
    prepare_device(config)
    on_terminal = sys.stdout.isatty() and not (log and log.quiet)
    limit = TimeLimit(max_time, log) if log else None
    extra = [log, limit, checkpoint, ProgressBar(leave=False) if on_terminal else None]
    several = devices * num_nodes > 1
    return lightning.Trainer(
        accelerator=device,
        devices=devices,
        num_nodes=num_nodes,
        strategy="ddp" if several else "auto",
        sync_batchnorm=several and device == "cuda",
        use_distributed_sampler=False,  # Batches knows each rank's share
        precision="bf16-mixed" if resolve_precision(config.precision, device) == "bf16" else "32-true",
        max_epochs=epochs,
        callbacks=[EpochSeed(config.seed), *callbacks, *(callback for callback in extra if callback is not None)],
        # LightningEnvironment: a training on one device is one, also inside a SLURM job or torchrun.
        plugins=[SafeCheckpoints(), *([] if several else [LightningEnvironment()])],
        logger=TensorBoardLogger(folder, name="", version="tensorboard") if folder else False,
        enable_checkpointing=checkpoint is not None,
        enable_progress_bar=on_terminal,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **options,
    )


def quiet_libraries() -> None:
    """Silence, at their cause, the messages that a user can do nothing about."""
    for name in ("lightning.pytorch", "lightning.fabric"):  # tips, and which accelerators were found
        logging.getLogger(name).setLevel(logging.ERROR)
    for deprecated in ("LeafSpec", "all_gather"):  # Lightning's use of PyTorch
        warnings.filterwarnings("ignore", message=f".*{deprecated}.*is deprecated")


def fit(trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: Path | None = None) -> None:
    """`trainer.fit`, from `checkpoint` if it is there. Ctrl-C stays KeyboardInterrupt, where Lightning exits.

    Of several processes, all but the first end here, by SystemExit. Raises TimeIsUp when --max_time ended the training,
    UserError when it diverged, and when another process of it was lost.
    """
    try:
        trainer.fit(module, ckpt_path=newest_sound(checkpoint) if checkpoint else None, weights_only=True)
    except SystemExit:
        if trainer.interrupted and trainer.is_global_zero:
            raise KeyboardInterrupt from None
        raise
    except UserError:
        if not trainer.is_global_zero:
            sys.exit(2)  # the first process says why
        raise
    except RuntimeError as error:
        lost = "gloo" in str(error) or isinstance(error, torch.distributed.DistError)
        if not (trainer.world_size > 1 and torch.distributed.is_initialized() and lost):
            raise
        if not trainer.is_global_zero:
            sys.exit(2)
        raise UserError("another process of this training was lost: go on with --resume") from None
    if trainer.world_size > 1:
        torch.distributed.destroy_process_group()  # what follows is the first process's alone
    if not trainer.is_global_zero:
        sys.exit(0)
    if trainer.should_stop and trainer.current_epoch < (trainer.max_epochs or 0):
        raise TimeIsUp


class Classification(lightning.LightningModule):
    """Cross-entropy training of `model` on (inputs, labels); measures loss and accuracy on the held-out batches too.

    Subclasses say what the model sees (`forward`) and how it is optimised (`configure_optimizers`).
    `held_out` names the second split in the metrics: "validation" or "test".
    """

    def __init__(self, model: nn.Module, train: Batches, evaluate: Batches, held_out: str = "validation") -> None:
        super().__init__()
        self.model, self.train_batches, self.evaluate_batches, self.held_out = model, train, evaluate, held_out

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def train_dataloader(self) -> Batches:
        return on_device(self.train_batches, self.device)

    def val_dataloader(self) -> Batches:
        return on_device(self.evaluate_batches, self.device)

    def _step(self, batch: tuple[Tensor, Tensor], label_smoothing: float = 0.0) -> dict[str, Tensor]:
        inputs, labels = batch
        logits = self(inputs)
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing), "accuracy": accuracy}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch)  # averaged over the epoch by EpochLog

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        values = {f"{self.held_out}_{name}": value for name, value in self._step(batch).items()}
        self.log_dict(values, batch_size=len(batch[1]), logger=False)


def on_device(batches: Batches, device: torch.device) -> Batches:
    """The same batches with their tensors moved to `device`, once and for the whole run."""
    batches.tensors = tuple(tensor.to(device) for tensor in batches.tensors)
    return batches


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def extract_features(model: nn.Module, images: Tensor, config: RunConfig, batch_size: int = 500) -> Tensor:
    """What `model` makes of un-augmented images, in eval mode: uint8 (N, C, H, W) -> float32 (N, D) on the CPU.

    For an encoder these are the representations h = f(x): computed once, read by k-NN, linear probe and t-SNE.
    The model's mode and device are put back afterwards.
    """
    device, was_training = resolve_device(config.accelerator), model.training
    prepare_device(config)
    reduced = resolve_precision(config.precision, device) == "bf16"
    model.eval().to(device)
    with torch.autocast(device, torch.bfloat16, enabled=reduced):
        batches = Batches(images, batch_size=batch_size)
        bar = tqdm(batches, "features", leave=False, disable=not sys.stdout.isatty())
        features = [model(batch.to(device)).float().cpu() for (batch,) in bar]
    model.train(was_training).cpu()
    return torch.cat(features)


@torch.no_grad()
def knn_predict(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.1,
    block: int = 512,
) -> Tensor:
    """Weighted k-nearest-neighbour classification by cosine similarity (Wu et al. 2018, arXiv 1805.01978, section 3.4).

    Each of the k nearest images in the bank votes for its class with weight exp(similarity / temperature).
    queries (Q, D), bank (N, D), bank_labels int64 (N,) -> predicted classes int64 (Q,). k is at most N.
    Works through `block` queries at a time: memory grows with block * N, not Q * N.
    """
    bank, k = F.normalize(bank.float(), dim=1), min(k, len(bank))
    predictions = []
    buffer = bank.new_empty(min(block, len(queries)), len(bank))  # one for all blocks: the heap does not fragment
    for part in queries.split(block):
        similarity = torch.mm(F.normalize(part.float(), dim=1), bank.T, out=buffer[: len(part)])  # (block, N)
        nearest, index = similarity.topk(k, dim=1)  # (block, k)
        votes = torch.zeros(len(part), num_classes, device=bank.device)
        weights = ((nearest - nearest[:, :1]) / temperature).exp()  # relative to the nearest's: never infinite
        votes.scatter_add_(1, bank_labels[index], weights)
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """The fraction of right predictions; both int64 (N,)."""
    return int((predictions == labels).sum()) / len(labels)


def accuracy_per_class(predictions: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, float | None]:
    """The fraction of each class's images that were recognised; None for a class without images. Both int64 (N,)."""
    members = {name: labels == i for i, name in enumerate(classes)}
    return {name: accuracy(predictions[m], labels[m]) if m.any() else None for name, m in members.items()}


def print_per_class(per_class: dict[str, float | None]) -> None:
    """Print the accuracy of each class, best first, and name the worst three."""
    ranked = sorted(((v, name) for name, v in per_class.items() if v is not None), reverse=True)
    width = max(len(name) for _, name in ranked)
    for value, name in ranked if len(ranked) <= 20 else ranked[:3]:
        print(f"    {name:{width}}  {100 * value:5.1f} %  {'#' * round(30 * value)}")
    if len(ranked) > 20:
        print(f"    ... and {len(ranked) - 3} more in results.json")
    print("  hardest classes: " + ", ".join(f"{name} {100 * value:.1f} %" for value, name in reversed(ranked[-3:])))


# ------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    """A matplotlib figure of `columns` axes side by side, sizes in inches. No pyplot, no display, no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plain(name: str) -> str:
    """A class name as matplotlib should show it: `$` starts no formula, `_` hides no legend entry."""
    return name.replace("$", r"\$").replace("_", " ").strip() or "_"


def save_figure(figure: Figure, file: Path) -> None:
    """Save as PNG and print its path."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a name in another script
        figure.savefig(buffer := io.BytesIO(), format="png", dpi=120, bbox_inches="tight")
    write_atomically(file, buffer.getbuffer())
    print(f"  figure {file}")


def in_percent(axis: Any) -> None:
    """Show an axis of fractions of 1 in percent."""
    axis.yaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:g} %")


def over_epochs(axis: Any, ylabel: str, percent: bool = False) -> None:
    """Dress an axis of curves over the epochs: whole epochs, a light grid, percent where it shows fractions of 1."""
    from matplotlib.ticker import MaxNLocator

    axis.set(xlabel="epoch", ylabel=ylabel)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    if percent:
        in_percent(axis)


def plot_curves(runs: dict[str, list[dict[str, float]]], held_out: str, file: Path, title: str) -> None:
    """Loss and accuracy of the training (dashed) and held-out (solid) images over the epochs; a colour per run."""
    figure, axes = new_figure(10, 4, columns=2)
    for axis, quantity in zip(axes, ("loss", "accuracy"), strict=True):
        for i, (name, rows) in enumerate(runs.items()):
            epochs = [row["epoch"] for row in rows]
            label, marker = (f"{name}, " if len(runs) > 1 else ""), "o" if len(rows) <= 10 else ""
            for split, style in (("train", "--"), (held_out, "-")):
                values = [row[f"{split}_{quantity}"] for row in rows]
                axis.plot(epochs, values, style, color=f"C{i}", label=label + split, marker=marker, markersize=4)
        over_epochs(axis, quantity, percent=quantity == "accuracy")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle(plain(title))
    save_figure(figure, file)


def plot_confusion_matrix(predictions: Tensor, labels: Tensor, classes: Sequence[str], file: Path, title: str) -> None:
    """Rows are true classes, columns predicted ones, in percent of the true class. predictions, labels: int64 (N,)."""
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    many = len(classes) > 20  # then numbers and names would not be legible
    matrix = 100 * confusion_matrix(labels, predictions, labels=range(len(classes)), normalize="true")
    figure, axis = new_figure(7.4, 6.4)
    display = ConfusionMatrixDisplay(matrix, display_labels=None if many else [plain(name) for name in classes])
    display.plot(ax=axis, cmap="Blues", values_format=".0f", include_values=not many, colorbar=False, im_kw={"vmin": 0})
    axis.set(title=f"{title}, % of each class", xlabel="predicted", ylabel="true")
    axis.spines[["top", "right"]].set_visible(True)
    if many:
        axis.set(xticks=[], yticks=[])
    else:
        axis.tick_params(axis="x", rotation=45 if max(map(len, classes)) > 3 else 0)
    save_figure(figure, file)


def plot_tsne(points: np.ndarray, labels: Tensor, classes: Sequence[str], file: Path, title: str) -> None:
    """A scatter of two-dimensional points, a colour per class. points (N, 2), labels int64 (N,)."""
    from matplotlib import colormaps

    figure, axis = new_figure(8.2, 6.6)
    size = max(2, min(14, 20000 / len(points)))
    colors = colormaps["tab10" if len(classes) <= 10 else "gist_ncar"]
    for i, name in enumerate(classes):
        color = colors(i if len(classes) <= 10 else i / len(classes))
        chosen = (labels == i).numpy()
        axis.scatter(*points[chosen].T, s=size, color=color, alpha=0.7, lw=0, label=plain(name))
    if len(classes) <= 20:
        legend = axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        for handle in legend.legend_handles:
            handle.set(sizes=[50], alpha=1)
    axis.set(title=title, xticks=[], yticks=[])
    axis.spines[["left", "bottom"]].set_visible(False)
    save_figure(figure, file)
