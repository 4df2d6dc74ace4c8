"""A dataclass as a command line: every field is a flag, `--config FILE.yaml` reads any of them."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal, NoReturn, TypeVar

import jsonargparse
import yaml
from lightning.pytorch.utilities import rank_zero_only

from machinery.devices import resolve_device
from machinery.errors import TimeIsUp, UserError, check, is_out_of_memory
from machinery.files import check_output_dir, write_atomically


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


def newest_run(script: str, runs: Path = Path("runs")) -> Path:
    """The most recently changed run folder of `script` below `runs`. Raises UserError when there is none."""
    found = [path.parent for path in runs.glob(f"{script}-*/config.yaml")]
    check(bool(found), f"--resume: no run of {script} in {runs}/; give the run's folder, --resume DIR")
    # A folder changes when a file in it is renamed or made: the run's own, or its checkpoints'.
    return max(found, key=lambda run: max(path.stat().st_mtime for path in (run, *run.glob("**/checkpoints"))))


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
