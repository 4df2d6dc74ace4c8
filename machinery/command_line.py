"""Dataclasses as a command line: every field is a flag, and --config reads a file of them."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import json
import math
import os
import re
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, TypeVar

import docstring_parser
import jsonargparse
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from machinery.devices import Machine, resolve_device, resolve_precision, started_together
from machinery.durations import parse_duration
from machinery.errors import TimeIsUp, UserError, check, is_out_of_memory
from machinery.files import check_output_dir, write_atomically
from machinery.output import lasting_output
from machinery.processes import interrupt, release

# ------------------------------------------------------------------------------------------------
# Settings: what a script can be told
# ------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """What a value must be: a test, and the words for it."""

    holds: Callable[[Any], bool]
    words: str


def at_least(least: int) -> Rule:
    return Rule(lambda value: value >= least, f"at least {least}")


POSITIVE = Rule(lambda value: 0 < value < math.inf, "a positive number")
NOT_NEGATIVE = Rule(lambda value: 0 <= value < math.inf, "0 or more")
PROBABILITY = Rule(lambda value: 0 <= value <= 1, "a probability, from 0 to 1")
SHARE = Rule(lambda value: 0 < value <= 1, "above 0 and at most 1")
PART = Rule(lambda value: 0 < value < 1, "between 0 and 1")
BELOW_1 = Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")


def is_utf_8(text: str) -> bool:
    return text == text.encode(errors="replace").decode()


# A configuration file could not hold anything else.
UTF_8 = Rule(is_utf_8, "a name in UTF-8: rename the folder, or give a link to it")


def listed(words: object) -> list[str]:
    """What a flag lists with commas between; nothing where it was not given."""
    return [] if words is None else [word.strip() for word in str(words).split(",")]


class Settings:
    """Some of a script's flags: a dataclass, with a docstring under each field for its --help.

    They stand beside the code that obeys them. A script's configuration inherits from all of its
    settings, so that a function takes the whole configuration where it asks for a part of it.
    """

    title: ClassVar[str]
    """the heading over these flags in --help"""

    def validate(self) -> None:
        """Check what the types alone do not: ranges, files, devices. Raises UserError."""

    def require(self, flags: str, rule: Rule) -> None:
        """Check `flags`, names with spaces between, against a rule. Raises UserError.

        None stands for a flag that was not given, and keeps every rule.
        """
        for flag in flags.split():
            value = getattr(self, flag)
            check(value is None or rule.holds(value), f"--{flag} must be {rule.words}, got {value}")


@dataclass
class DataSettings(Settings):
    """Which images."""

    title: ClassVar[str] = "data"

    dataset: str = "cifar10"
    """cifar10, cifar100, stl10, digits, or a folder of images: DIR/train/<class>/*,
    DIR/test/<class>/*"""
    data_dir: str = "data"
    """where data sets are downloaded to, and decoded image folders are cached"""
    image_size: int | None = None
    """side in pixels to which images are brought: unless given, 32 for those of a folder, and
    their own for other sets"""

    def validate(self) -> None:
        super().validate()
        check(self.dataset != "", "--dataset is empty: name a data set or a folder")
        self.require("dataset data_dir", UTF_8)
        size = self.image_size
        fits = size is None or 4 <= size <= 1024
        check(fits, f"--image_size must be between 4 and 1024 pixels, got {size}")


@dataclass
class RunConfig(DataSettings):
    """What every script's configuration begins with."""

    title: ClassVar[str] = "run and machine"
    script: ClassVar[str] = "script.py"
    """the file whose configuration this is"""
    of_the_session: ClassVar[tuple[str, ...]] = ("output_dir", "resume", "max_time", "timeout")
    """flags that say nothing about a run's outcome: not kept in its config.yaml, and free to
    change when it is resumed"""
    unsuited: ClassVar[tuple[str, ...]] = ()
    """devices that --accelerator auto passes over"""
    if_memory_runs_out: ClassVar[str] = "take smaller batches, smaller images, or a smaller network"
    """the advice then"""
    free_on_resume: ClassVar[tuple[str, ...]] = ("data_dir",)
    """flags that a resumed run may change, and that say nothing about its outcome"""
    names_of_data: ClassVar[tuple[str, ...]] = ("dataset",)
    """flags that it may change as well, as its data may have moved: of what is learned from and
    measured on, a fingerprint tells whether it is the same"""

    output_dir: str | None = None
    """folder for this run's results; unless given, a new one named after script, data set and
    time, in runs/"""
    resume: str | None = None
    """continue an interrupted run: its folder, or nothing for the newest one"""
    seed: int = 0
    """decides initial weights, splits, order, augmentation and dropout"""
    accelerator: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to compute; auto takes a CUDA GPU, else Apple's, else the CPU"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """float32, or autocast to bfloat16, or (on CUDA) to float16; auto takes bfloat16 where the
    processor computes it fast"""

    def validate(self) -> None:
        super().validate()
        self.require("output_dir resume", UTF_8)
        check(0 <= self.seed < 2**32, f"--seed must be between 0 and 2^32 - 1, got {self.seed}")
        _ = self.machine
        if self.output_dir is not None and self.resume is None and is_first_process(self):
            check_output_dir(Path(self.output_dir))

    @property
    def machine(self) -> Machine:
        """Where to compute, and in which precision. Raises UserError for a missing device."""
        device = resolve_device(self.accelerator, self.unsuited)
        return Machine(device, resolve_precision(self.precision, device))

    @property
    def may_grow(self) -> tuple[str, ...]:
        """The flags that a resumed run may raise: what it has done so far stays valid."""
        return ()

    @property
    def processes(self) -> int:
        """How many processes train together, each on a device."""
        return 1


ConfigT = TypeVar("ConfigT", bound=RunConfig)


@dataclass
class LongRun(RunConfig):
    """For a training that may need more than one session."""

    free_on_resume = (*RunConfig.free_on_resume, "checkpoint_every")

    checkpoint_every: float = 30.0
    """seconds between checkpoints, each after the epoch in which they are over"""
    max_time: str | None = None
    """end training after the last epoch that fits into DD:HH:MM:SS (one at least), to go on with
    --resume"""

    def validate(self) -> None:
        super().validate()
        self.require("checkpoint_every", NOT_NEGATIVE)
        if self.max_time is not None:
            parse_duration(self.max_time)


@dataclass
class SeveralDevices(LongRun):
    """For a training that several devices share, one process each."""

    devices: int = 1
    """GPUs (or processes, on the CPU) of this machine to train on"""
    num_nodes: int = 1
    """machines to train on, each with that many devices"""

    @property
    def processes(self) -> int:
        return self.devices * self.num_nodes

    def validate(self) -> None:
        super().validate()
        self.require("devices num_nodes", at_least(1))
        device = self.machine.device
        processors = os.cpu_count() or 1
        here = {"cuda": torch.cuda.device_count(), "mps": 1, "cpu": processors}[device]
        has = f"this machine has {here} for --accelerator {device}"
        check(self.devices <= here, f"--devices {self.devices}: {has}")
        if self.processes > 1:
            self.validate_start(started_together())

    def validate_start(self, started: int | None) -> None:
        """Check that torchrun or SLURM, if they `started` this process, started enough of them."""
        wanted = (
            f"--devices {self.devices} on --num_nodes {self.num_nodes} "
            f"are {self.processes} processes"
        )
        if started is None:
            remedy = "start them with torchrun or srun, on each node as many as devices"
            check(self.num_nodes == 1, f"{wanted}: {remedy}")
            return

        how = f"torchrun --nproc_per_node {self.devices}, or srun --ntasks-per-node {self.devices}"
        check(started == self.processes, f"{wanted}, but {started} were started: use {how}")
        reason = "processes started together have to agree on the run's folder"
        named = self.output_dir is not None or self.resume is not None
        check(named, f"--output_dir must be given: {reason}")


def is_first_process(config: RunConfig) -> bool:
    """Whether this is the first of the processes that train together.

    It alone prints and writes.
    """
    return config.processes == 1 or getattr(rank_zero_only, "rank", 0) == 0


# ------------------------------------------------------------------------------------------------
# From words to a configuration
# ------------------------------------------------------------------------------------------------


class Help(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help as wide as the code, with the example commands as they stand in the docstring.

    A flag shows its values, a sentence, and its default.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=100, max_help_position=28)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, jsonargparse.ActionYesNo):
            return ", ".join(action.option_strings)
        return super()._format_action_invocation(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        if default is None or default == argparse.SUPPRESS:
            return action.help or ""
        shown = str(default).lower() if isinstance(default, bool) else f"{default}"
        return f"{action.help} (default: {shown})"


class OneLineParser(jsonargparse.ArgumentParser):
    """jsonargparse's parser, with each error as one line that names the flag."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        kinder = {
            r'Parser key "([^"]+)":': r"--\1:",
            r"a typing\.Literal\[(.*?)\]": r"one of \1",
            r"a <class '(\w+)'>": r"a value of type \1",
            r"unrecognized arguments: (.*)": r"unknown flag or argument: \1 (see --help)",
            r"Option '(.*?)' is not accepted": r"unknown key '\1' in the --config file",
            r"argument --(\w+)/--no-\w+: invalid \w+ value: (.*)": r"--\1: true or false, not \2",
        }
        for pattern, words in kinder.items():
            message = re.sub(pattern, words, message)
        raise UserError(" ".join(message.split()))


def make_parser(config_class: type[RunConfig], description: str | None) -> OneLineParser:
    """The command line of a script: a flag per field of its dataclass, in a group per settings.

    Besides, `--config FILE.yaml` reads any of them, and `--print_config` prints them as YAML.
    `description` is the script's docstring, up to and with its example commands.
    """
    parser = OneLineParser(
        usage=f"python {config_class.script} [--flag value ...]",
        description=summary(description or ""),
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the values below")

    types = typing.get_type_hints(config_class)
    for title, settings in groups(config_class).items():
        group = parser.add_argument_group(title)
        for name, words in settings.items():
            kind, default = types[name], getattr(config_class, name)
            if kind is bool:
                yes_or_no: Any = jsonargparse.ActionYesNo(no_prefix="no-")  # --name, --no-name
                group.add_argument(
                    f"--{name}", action=yes_or_no, nargs="?", default=default, help=words
                )
            elif typing.get_origin(kind) is Literal:  # whose values are shown
                group.add_argument(f"--{name}", type=kind, default=default, help=words)
            else:
                value = "TEXT" if str in (kind, *typing.get_args(kind)) else "N"
                # `str | None` would read the words null and ~ as None, as YAML does.
                reader = text_or_none if kind == str | None else kind
                group.add_argument(
                    f"--{name}", type=reader, default=default, help=words, metavar=value
                )
    return parser


def text_or_none(value: Any) -> str | None:
    """A text as it stands on the command line. In a file, null stands for None."""
    if value is None or isinstance(value, str):
        return value
    raise ValueError(f"Expected a text. Got value: {value}")


def summary(docstring: str) -> str:
    """A script's docstring as far as a newcomer needs it: until its first example commands end."""
    paragraphs = docstring.split("\n\n")
    commands = [i for i, text in enumerate(paragraphs) if text.startswith("    python ")]
    return "\n\n".join(paragraphs[: commands[0] + 1 if commands else 1]).strip()


def groups(config_class: type[RunConfig]) -> dict[str, dict[str, str]]:
    """{title: {flag: its help}}: the data first, then the script's own, the machine last."""
    found: dict[str, dict[str, str]] = {DataSettings.title: {}}
    place: dict[str, str] = {}
    for settings in reversed(config_class.__mro__):
        if not (issubclass(settings, Settings) and is_dataclass(settings)):
            continue
        params = docstring_parser.parse_from_object(settings).params
        told = {param.arg_name: " ".join((param.description or "").split()) for param in params}
        for name in (field.name for field in fields(settings)):
            if name in told or name not in place:  # a subclass may tell a flag anew, in its place
                title = place.setdefault(name, settings.title)
                found.setdefault(title, {})[name] = told.get(name, "")

    machine = found.pop(RunConfig.title)
    return found | {RunConfig.title: machine}


def parse_config(
    config_class: type[ConfigT], argv: Sequence[str], description: str | None = None
) -> ConfigT:
    """Turn command-line words into a validated configuration.

    With --resume, the configuration is the one that the interrupted run saved; other flags may
    repeat it, or raise what `may_grow`. Raises UserError for anything that is not right; exits
    with status 0 after --help or --print_config.
    """
    words = in_order(argv)
    parser = make_parser(config_class, description)
    given = parser.parse_args(words)
    if given.resume is not None:
        newest = given.resume == "latest"
        folder = newest_run(config_class.script) if newest else Path(given.resume)
        given = resumed(parser, config_class, folder, words)

    config = build(config_class, given)
    config.validate()  # after the types: ranges, files, devices
    return config


def in_order(argv: Sequence[str]) -> list[str]:
    """The same words with --config first: flags win over the file, wherever it stands.

    Each file is read here, and its text stands in its place. A bare --resume becomes
    --resume=latest. Raises UserError for a file that is not YAML.
    """
    files: list[str] = []
    others: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--config" and words:
            word = f"--config={words.pop(0)}"
        if word == "--resume" and (not words or words[0].startswith("--")):
            word = "--resume=latest"
        if word.startswith("--config="):
            files.append(f"--config={read_yaml(Path(word.partition('=')[2]))}")
        else:
            others.append(word)
    return files + others


def resumed(
    parser: OneLineParser, config_class: type[ConfigT], folder: Path, words: Sequence[str]
) -> jsonargparse.Namespace:
    """What the run in `folder` saved, with what `words` may change about it. Raises UserError."""
    file = folder / "config.yaml"
    check(file.is_file(), f"--resume {folder}: no run there (it has no config.yaml)")
    text = read_yaml(file)
    try:
        saved = parser.parse_args([f"--config={text}"])
    except UserError as error:
        problem = f"its config.yaml is not one of this script's ({error})"
        raise UserError(f"--resume {folder}: {problem}") from None

    # A second time, with today's words over the saved ones, to see which of them differ.
    given = parser.parse_args([f"--config={text}", *words])
    free = {"config", *config_class.of_the_session, *config_class.free_on_resume}
    free |= set(config_class.names_of_data)
    changed = [key for key in vars(saved) if key not in free and saved[key] != given[key]]
    may_grow = build(config_class, saved).may_grow
    refused = [key for key in changed if key not in may_grow or given[key] < saved[key]]
    began = " and ".join(f"--{key} {saved[key]}" for key in refused)
    check(
        not refused,
        f"--resume {folder}: that run began with {began}, which must stay: leave it out",
    )
    for key in changed:
        before, now = saved[key], given[key]
        print(f"--{key} raised from {before} to {now}: what was done so far stays valid")

    given.resume = given.output_dir = str(folder)
    return given


def build(config_class: type[ConfigT], given: jsonargparse.Namespace) -> ConfigT:
    """The configuration with the values that a parser found. Raises UserError for a null."""
    for field in fields(config_class):
        there = given[field.name] is not None or field.default is None
        check(there, f"--{field.name} must have a value, not null")
    return config_class(**{field.name: given[field.name] for field in fields(config_class)})


def read_yaml(file: Path) -> str:
    """The text of a YAML mapping of plain values. Raises UserError for anything else.

    A byte order mark says that it is UTF-16, as PowerShell writes; without one it is UTF-8.
    """
    try:
        data = file.read_bytes()
        utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16" if utf_16 else "utf-8-sig")
        values = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"--config {file} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config {file} is not YAML of plain values ({reason})") from None
    check(isinstance(values, dict), f"--config {file} must have lines of the form `key: value`")
    return text


def newest_run(script: str, runs: Path = Path("runs")) -> Path:
    """The most recently changed run folder of `script` below `runs`. Raises UserError."""
    name = Path(script).stem
    found = [path.parent for path in runs.glob(f"{name}-*/config.yaml")]
    remedy = "give the run's folder, --resume DIR"
    check(bool(found), f"--resume: no run of {name} in {runs}/; {remedy}")

    def changed(run: Path) -> float:
        # A folder changes when a file in it is made or renamed: the run's, or its checkpoints'.
        return max(path.stat().st_mtime for path in (run, *run.glob("**/checkpoints")))

    return max(found, key=changed)


# ------------------------------------------------------------------------------------------------
# From a configuration to a file, and back
# ------------------------------------------------------------------------------------------------


def as_yaml(config: RunConfig) -> str:
    """A configuration as the YAML that --config reads, without what belongs to one session."""
    lines = []
    for key, value in asdict(config).items():
        if key in config.of_the_session:
            continue
        # JSON's quotes keep every text what it is; YAML's own may fold a long one.
        is_text = isinstance(value, str)
        text = json.dumps(value, ensure_ascii=False) if is_text else yaml.safe_dump(value)
        lines.append(f"{key}: {text.splitlines()[0]}\n")
    return "".join(lines)


def save_config(file: Path, config: RunConfig) -> None:
    """Write a configuration as the YAML that --config reads."""
    write_atomically(file, as_yaml(config).encode())


def load_config(config_class: type[ConfigT], file: Path) -> ConfigT:
    """Read a configuration that `save_config` wrote, today's defaults for what it lacks."""
    parser = make_parser(config_class, None)
    return build(config_class, parser.parse_args([f"--config={read_yaml(file)}"]))


# ------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------


def command_line(
    main: Callable[[ConfigT], None], config_class: type[ConfigT], description: str | None
) -> NoReturn:
    """Run `main(config)` as a program.

    User errors and Ctrl-C end in one line on stderr, without a traceback.
    """
    with lasting_output(), terminated_as_interrupted():
        status = run_program(main, config_class, description)
    sys.exit(status)


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Within this block, SIGTERM (of timeout, docker stop or scancel) ends it as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_program(
    main: Callable[[ConfigT], None], config_class: type[ConfigT], description: str | None
) -> int:
    """Run `main(config)`; what ends it early is one line. Returns the exit status."""
    script = config_class.script
    try:
        config = parse_config(config_class, sys.argv[1:], description)
        if config.processes == 1:
            # It is a run of its own, even where srun started it as one of several.
            rank_zero_only.rank = 0  # type: ignore[attr-defined]
        elif not is_first_process(config):
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the whole process
        main(config)
        release()
    except (UserError, OSError) as error:  # an OSError names its file, one without access, say
        return failed(script, f"error: {' '.join(str(error).split())}", status=2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return failed(script, f"error: out of memory: {config_class.if_memory_runs_out}", status=2)
    except TimeIsUp as time_is_up:
        print(f"--max_time is over; {time_is_up}")
        release()
    except KeyboardInterrupt as interrupt:
        print(file=sys.stderr)  # after the ^C that the terminal shows
        how = interrupt.args[0] if interrupt.args else "nothing new was saved yet"
        return failed(script, f"interrupted; {how}", status=130)
    return 0


def failed(script: str, message: str, status: int) -> int:
    """Say in one line on stderr why the program ends; returns its exit status."""
    print(f"{script}: {message}", file=sys.stderr)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Python's own way out would wait for processes that may be gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
