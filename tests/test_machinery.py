"""machinery/: the command line, run folders, files, devices, batches and training."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
import torch
from helpers import CPU, Config, randn, user_error
from torch import nn

import functions as fn
import machinery.batches
import rnn
import rnn_hyperparameter_tune
import simCLR
from functions import UserError
from machinery import command_line, devices, files, output, run_folder, training

HERE = Path(__file__).parent
DATA = {"fingerprint": "abc", "train_images": 30, "image_size": 8, "classes": ["cat", "dog"]}

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


# ------------------------------------------------------------------------------------------------
# User errors and the command line
# ------------------------------------------------------------------------------------------------


def parse(*words: str) -> Config:
    return fn.parse_config(Config, words, "What it does.\n\nMore.")


def write_yaml(text: str | bytes, name: str = "mine.yaml") -> str:
    Path(name).write_bytes(text.encode() if isinstance(text, str) else text)
    return name


def save_run(folder: str, **values) -> Path:
    Path(folder).mkdir(parents=True)
    fn.save_config(Path(folder) / "config.yaml", Config(**values))
    return Path(folder)


def test_no_words_give_the_defaults():
    assert parse() == Config()


def test_flags_become_typed_values():
    words = "--epochs 5 --rate=1e-05 --cell lstm --image_size 16 --dataset 123"
    config = parse(*words.split())
    assert config == Config(epochs=5, rate=1e-5, cell="lstm", image_size=16, dataset="123")


def test_yaml_file_gives_values_and_flags_win_over_it():
    file = write_yaml("epochs: 7\nrate: 1e-05\n")
    assert parse("--config", file) == Config(epochs=7, rate=1e-5)
    assert parse("--config", file, "--epochs", "8") == Config(epochs=8, rate=1e-5)


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        ("--bogus 1", "--bogus"),
        ("--epoch 1", "--epoch"),  # no abbreviations
        ("stray", "stray"),
        ("--epochs", "--epochs"),
        ("--epochs many", "--epochs"),
        ("--epochs 1.5", "--epochs"),
        ("--rate fast", "--rate"),
        ("--rate nan", "--rate"),
        ("--cell gru", "--cell"),
        ("--accelerator tpu", "--accelerator"),
        ("--seed -1", "--seed"),
        (f"--seed {2**63}", "--seed"),
        ("--image_size 3", "--image_size"),
        ("--image_size 1025", "--image_size"),
        ("--config nowhere.yaml", "nowhere.yaml"),
        ("--config .", "--config"),
        ("--resume nowhere", "nowhere"),
    ],
)
def test_wrong_words_are_named_in_one_line(words, culprit):
    assert culprit in user_error(parse, *words.split())


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("epochs: many\n", "--epochs"),
        ("epochs: {a: 1}\n", "--epochs"),
        ("epochs: null\n", "--epochs"),
        ("seed: null\n", "--seed"),
        ("cell: gru\n", "--cell"),
        ("epoch: 1\n", "'epoch'"),
        ("epochs: [1\n", "mine.yaml"),
        ("a: b: c\n", "mine.yaml"),
        ("\tepochs: 3\n", "mine.yaml"),
        ("- 1\n- 2\n", "mine.yaml"),
        ("only words\n", "mine.yaml"),
        ("", "mine.yaml"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "mine.yaml"),  # not text, a checkpoint for example
    ],
)
def test_wrong_yaml_is_named_in_one_line(text, culprit):
    assert culprit in user_error(parse, "--config", write_yaml(text))


@pytest.mark.parametrize("text", ["{}", "epochs: {}"])
def test_yaml_is_data_and_never_code(text):
    command = "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [made]]"
    assert "python/object" in user_error(parse, "--config", write_yaml(text.replace("{}", command)))
    assert not Path("made").exists()


def test_print_config_prints_yaml_that_config_reads(capsys):
    with pytest.raises(SystemExit) as done:
        parse("--epochs", "5", "--rate", "1e-05", "--print_config")
    assert done.value.code == 0
    assert parse("--config", write_yaml(capsys.readouterr().out)) == Config(epochs=5, rate=1e-5)


def test_help_describes_every_field(capsys):
    with pytest.raises(SystemExit) as done:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert done.value.code == 0

    assert "What it does." in text
    assert "--epochs N passes over the images (default: 3)" in text
    assert "decides initial weights" in text


def test_help_shows_the_example_commands_as_they_stand(capsys):
    commands = "    python script.py         # plain\n    python x"
    docstring = f"What it does.\n\nHow.\n\n{commands}\n\nMore."
    with pytest.raises(SystemExit):
        fn.parse_config(Config, ["--help"], docstring)
    shown = capsys.readouterr().out
    assert f"What it does.\n\nHow.\n\n{commands}\n" in shown
    assert "More." not in shown


@pytest.mark.parametrize("script", [rnn, simCLR, rnn_hyperparameter_tune])
def test_flags_stand_in_groups_of_a_dozen_at_most_each_with_its_sentence(script):
    groups = command_line.groups(script.Config)
    first, *_, last = groups
    assert (first, last) == ("data", "run and machine")
    assert len(groups) >= 4
    assert all(1 <= len(flags) <= 12 for flags in groups.values())
    assert all(words for flags in groups.values() for words in flags.values())
    shown = [flag for flags in groups.values() for flag in flags]
    assert sorted(shown) == sorted(field.name for field in fields(script.Config))


@dataclass
class Switched(Config):
    """With a switch."""

    lit: bool = False
    """whether it is lit"""


@pytest.mark.parametrize(
    ("words", "lit"),
    [
        ("", False),
        ("--lit", True),
        ("--lit --epochs 4", True),
        ("--no-lit", False),
        ("--lit true", True),
        ("--lit=false", False),
        ("--config lit.yaml", True),
        ("--no-lit --config lit.yaml", False),
    ],
)
def test_a_switch_works_bare_and_with_its_value(words, lit):
    write_yaml("lit: true\n", "lit.yaml")
    assert fn.parse_config(Switched, words.split()).lit is lit


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_file_is_read_in_the_encoding_that_its_mark_names(encoding):
    """PowerShell's > writes UTF-16; without a mark, only UTF-8 is understood."""
    text = "epochs: 7\ndataset: Übung 蜜蜂\n"
    marks = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
    Path("mine.yaml").write_bytes(marks.get(encoding, b"") + text.encode(encoding))
    assert parse("--config", "mine.yaml") == Config(epochs=7, dataset="Übung 蜜蜂")

    Path("mine.yaml").write_bytes(text.encode("utf-16")[2:])
    assert "mine.yaml" in user_error(parse, "--config", "mine.yaml")


@pytest.mark.parametrize("name", ["null", "~", "#1", "1", "yes", "[a]", "a: b", "1e5", "''"])
def test_a_text_on_the_command_line_stays_what_it_is(name):
    assert parse("--output_dir", name).output_dir == name
    assert parse(f"--output_dir={name}").output_dir == name
    assert parse("--dataset", name).dataset == name


def test_null_in_a_file_is_none():
    assert parse("--config", write_yaml("output_dir: null\n")).output_dir is None
    assert "--output_dir" in user_error(parse, "--config", write_yaml("output_dir: 5\n"))


def test_a_flag_wins_over_the_file_wherever_config_stands():
    file = write_yaml("epochs: 7\nrate: 0.5\n")
    assert parse("--epochs", "8", "--config", file) == Config(epochs=8, rate=0.5)
    assert parse("--epochs", "8", f"--config={file}", "--rate", "1") == Config(epochs=8, rate=1.0)


CHANGED = {"epochs": 5, "rate": 1e-5, "cell": "lstm", "image_size": 16}
ODD_NAMES = ["null", "1", "yes", "1e5", "a: b", "#x", " x ", "~", "'\"\\", "a\nb"]
ODD_NAMES += ["Übung", "photos 😀"]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {**CHANGED, "seed": 2**32 - 1, "precision": "fp32"},
        *({"rate": rate} for rate in (1e22, 5e-324, 0.1 + 0.2, 3.0, -1e-7)),
        *({"dataset": name} for name in ODD_NAMES),
    ],
    ids=str,
)
def test_saved_configuration_reads_back_equal(values):
    fn.save_config(Path("config.yaml"), Config(**values))
    assert parse("--config", "config.yaml") == Config(**values)


def test_saved_configuration_forgets_where_the_run_wrote():
    fn.save_config(Path("config.yaml"), Config(epochs=9, output_dir="there", resume="there"))
    assert parse("--config", "config.yaml") == Config(epochs=9)


def test_bare_resume_takes_the_newest_run_of_this_script():
    for age, (folder, epochs) in enumerate([("script-a", 11), ("script-b", 12), ("other-c", 13)]):
        save_run(f"runs/{folder}", epochs=epochs)
        os.utime(f"runs/{folder}/config.yaml", (10**9 + age,) * 2)
    assert parse("--resume") == parse("--resume", "--seed", "0")
    newest = "runs/script-b"
    assert parse("--resume") == Config(epochs=12, resume=newest, output_dir=newest)

    Path("runs/script-a/checkpoint").touch()  # the newest is the run that wrote last
    assert parse("--resume").epochs == 11


def test_bare_resume_without_a_run_is_refused():
    save_run("runs/other-a")
    message = user_error(parse, "--resume")
    assert "script" in message
    assert "--resume" in message


def test_resume_takes_the_saved_configuration():
    save_run("run", epochs=9, rate=1e-5)
    expected = Config(epochs=9, rate=1e-5, resume="run", output_dir="run")
    assert parse("--resume", "run", "--epochs", "9") == expected


def test_resume_refuses_another_value_and_names_its_flag():
    save_run("run", epochs=9)
    message = user_error(parse, "--resume", "run", "--epochs", "10")
    assert "--epochs" in message
    assert "run" in message
    assert "--rate" not in message
    assert "--rate" in user_error(parse, "--resume", "run", "--config", write_yaml("rate: 3.0\n"))


def test_resume_of_a_folder_without_a_run_is_refused():
    Path("empty").mkdir()
    assert "empty" in user_error(parse, "--resume", "empty")


def run_program(main, *words: str, monkeypatch, capsys) -> tuple[int, list[str]]:
    """(exit status, lines on stderr) of `script.py WORDS`."""
    monkeypatch.setattr("sys.argv", ["/somewhere/script.py", *words])
    with pytest.raises(SystemExit) as done:
        fn.command_line(main, Config, "What it does.")
    return done.value.code, capsys.readouterr().err.strip().splitlines()


def test_program_gets_its_configuration_and_exits_with_0(monkeypatch, capsys):
    seen = []
    assert run_program(seen.append, "--epochs", "4", monkeypatch=monkeypatch, capsys=capsys) == (
        0,
        [],
    )
    assert seen == [Config(epochs=4)]


def test_user_error_is_one_line_and_status_2(monkeypatch, capsys):
    def main(config: Config) -> None:
        raise UserError("--dataset x: no such folder")

    expected = (2, ["script.py: error: --dataset x: no such folder"])
    assert run_program(main, monkeypatch=monkeypatch, capsys=capsys) == expected
    status, lines = run_program(main, "--bogus", monkeypatch=monkeypatch, capsys=capsys)
    assert (status, len(lines)) == (2, 1)
    assert "--bogus" in lines[0]


def test_other_errors_keep_their_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        fn.command_line(lambda config: 1 / 0, Config, None)


def test_ctrl_c_is_one_line_that_says_how_to_resume_and_status_130(monkeypatch, capsys):
    def main(config: Config) -> None:
        with fn.Run(config).open():
            raise KeyboardInterrupt

    status, lines = run_program(main, "--output_dir", "out", monkeypatch=monkeypatch, capsys=capsys)
    assert (status, len(lines)) == (130, 1)
    assert "python script.py --resume out" in lines[0]


def test_ctrl_c_before_the_run_says_that_nothing_was_saved(monkeypatch, capsys):
    def main(config: Config) -> None:
        raise KeyboardInterrupt

    status, lines = run_program(main, monkeypatch=monkeypatch, capsys=capsys)
    assert (status, len(lines)) == (130, 1)
    assert "nothing new was saved" in lines[0]


# ------------------------------------------------------------------------------------------------
# The run folder and its files
# ------------------------------------------------------------------------------------------------


def test_new_run_folder_is_named_after_script_and_set_and_has_the_configuration():
    with fn.Run(Config(dataset="some/photos", epochs=4)).open() as folder:
        assert folder.parent == Path("runs")
        assert folder.name.startswith("script-photos-2")
        there = {"config.yaml", "sessions.txt", ".lock", ".unfinished"}
        assert {file.name for file in folder.iterdir()} == there
        saved = parse("--config", str(folder / "config.yaml"))
        assert saved == Config(dataset="some/photos", epochs=4)
    assert {file.name for file in folder.iterdir()} == {"config.yaml", "sessions.txt", ".lock"}


def test_two_runs_in_the_same_second_get_different_folders(monkeypatch):
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: "20300101-000000")
    folders = []
    for _ in range(3):
        with fn.Run(Config()).open() as folder:
            folders.append(folder)
    assert len(set(folders)) == 3
    assert all((folder / "config.yaml").is_file() for folder in folders)


def test_output_dir_is_made_with_its_parents_and_may_exist_empty():
    Path("there").mkdir()
    for name in ("deep/er", "there"):
        with fn.Run(Config(output_dir=name)).open() as folder:
            assert folder == Path(name)
            assert (folder / "config.yaml").is_file()


def enter(config: Config) -> None:
    with fn.Run(config).open():
        pytest.fail("the folder was accepted")


def test_output_dir_with_anything_in_it_is_refused_and_untouched():
    Path("full").mkdir()
    Path("full/config.yaml").write_text("precious")
    assert "--output_dir full" in user_error(enter, Config(output_dir="full"))
    assert [(file.name, file.read_text()) for file in Path("full").iterdir()] == [
        ("config.yaml", "precious")
    ]


@pytest.mark.parametrize("wanted", ["file", "file/below", "file/below/that"])
def test_output_dir_that_is_or_lies_below_a_file_is_refused(wanted):
    Path("file").write_text("precious")
    assert f"--output_dir {wanted}" in user_error(enter, Config(output_dir=wanted))
    assert Path("file").read_text() == "precious"


def test_ctrl_c_in_a_run_carries_the_command_that_resumes_it():
    run = fn.Run(Config(output_dir="out"))
    with pytest.raises(KeyboardInterrupt) as stopped, run.open():
        raise KeyboardInterrupt
    assert "python script.py --resume out" in str(stopped.value)


def test_resumed_run_keeps_its_folder_and_configuration():
    folder = save_run("run", epochs=9)
    before = (folder / "config.yaml").read_bytes()
    with fn.Run(parse("--resume", "run")).open() as reopened:
        assert reopened == folder
    assert (folder / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("data", [b"", b"whole", bytes(range(256)) * 5000])
def test_a_file_is_written_whole(data):
    Path("file").write_bytes(b"old")
    fn.write_atomically(Path("file"), data)
    assert Path("file").read_bytes() == data
    assert os.listdir() == ["file"]


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(failing, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    Path("file").write_bytes(b"old")
    monkeypatch.setattr(files.os, failing, fail)
    with pytest.raises(fn.UserError, match="No space"):
        fn.write_atomically(Path("file"), b"new")
    assert Path("file").read_bytes() == b"old"
    assert os.listdir() == ["file"]


def test_save_torch_is_what_torch_load_reads_as_plain_data():
    fn.save_torch(Path("x.pt"), {"w": torch.arange(5), "rows": [{"epoch": 1}]})
    loaded = torch.load("x.pt", weights_only=True)
    assert loaded["rows"] == [{"epoch": 1}]
    assert torch.equal(loaded["w"], torch.arange(5))


def test_csv_has_every_column_and_blanks_for_what_a_row_lacks():
    rows = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "knn": 0.25, "loss": 0.125}]
    fn.write_csv(Path("m.csv"), rows)
    assert Path("m.csv").read_bytes() == b"epoch,loss,knn\n1,0.5,\n2,0.125,0.25\n"


def test_results_json_has_the_common_keys_and_the_outcome():
    run = fn.Run(Config("digits", seed=5, accelerator="cpu", precision="fp32", output_dir="out"))
    run.is_about(DATA)
    with run.open():
        run.save(knn={"accuracy": 0.5})
    results = json.loads(Path("out/results.json").read_text())
    assert results["data"] == json.loads(Path("out/data.json").read_text()) == DATA
    keys = "script dataset data seed device processor precision threads versions"
    assert list(results) == [*keys.split(), "git_commit", "git_dirty", "seconds", "knn"]
    assert re.fullmatch(r"\S.* \(\w+(, \w+)*\)", results["processor"])
    assert (results["script"], results["dataset"], results["seed"]) == ("script.py", "digits", 5)
    assert (results["device"], results["precision"]) == ("cpu", "fp32")
    assert results["threads"] == torch.get_num_threads()
    assert results["versions"]["torch"] == torch.__version__
    assert 0 <= results["seconds"] < 60
    assert results["knn"] == {"accuracy": 0.5}

    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True)
    assert results["git_commit"] == (head.stdout.strip() if head.returncode == 0 else None)


def test_a_resumed_run_says_when_it_went_on_and_with_which_code(monkeypatch):
    config = Config("digits", accelerator="cpu", output_dir="out")
    says = {"rev-parse": "c0ffee", "status": ""}
    monkeypatch.setattr(run_folder, "git", lambda word, *_: says[word])
    with pytest.raises(KeyboardInterrupt), fn.Run(config).open():
        raise KeyboardInterrupt
    says |= {"rev-parse": "decade", "status": " M simCLR.py"}
    run = fn.Run(replace(config, output_dir=None, resume="out"))
    with run.open():
        run.save()
    first, second = json.loads(Path("out/results.json").read_text())["sessions"]
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(f"{time} c0ffee", first)
    assert re.fullmatch(f"{time} decade, changed", second)


def test_results_without_git_still_appear(monkeypatch):
    monkeypatch.setenv("PATH", "")
    fn.Run(Config(accelerator="cpu")).save()
    results = json.loads(Path("results.json").read_text())
    assert (results["git_commit"], results["git_dirty"]) == (None, None)


def test_a_finished_run_is_one_with_results_and_the_same_settings(capsys):
    """Whatever the order of its config.yaml, and whether or not that knows newer settings."""
    folder = save_run("run", epochs=3)
    assert not fn.Run(parse("--resume", "run")).is_finished()
    (folder / "results.json").write_text("{}")
    assert fn.Run(parse("--resume", "run")).is_finished()
    assert "run is finished" in capsys.readouterr().out

    (folder / "config.yaml").write_text("seed: 0\ndataset: cifar10\n")  # an older version's
    assert fn.Run(parse("--resume", "run")).is_finished()
    (folder / "config.yaml").write_text("epochs: 2\n")
    config = Config(epochs=3, resume="run", output_dir="run")
    assert not fn.Run(config).is_finished()


def test_git_speaks_of_the_whole_project(monkeypatch):
    """From machinery/ alone, a change in a script would go unnoticed."""
    seen = []
    answer = SimpleNamespace(returncode=0, stdout="")
    monkeypatch.setattr(
        run_folder.subprocess, "run", lambda words, **options: seen.append(options) or answer
    )
    fn.Run(Config())
    assert {options["cwd"] for options in seen} == {HERE.parent}


def test_a_folder_is_locked_until_the_block_ends(capsys):
    with files.locked(Path("here")):
        with pytest.raises(filelock.Timeout), files.locked(Path("here"), wait=False):
            pytest.fail("two at a time")
        assert Path("here/.lock").exists()
    with files.locked(Path("here"), wait=False):
        pass


def test_where_the_file_system_has_no_locks_there_is_none(monkeypatch):
    def fail(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(files.FileLock, "acquire", fail)
    with files.locked(Path("here"), wait=False):
        pass


# ------------------------------------------------------------------------------------------------
# Devices and memory
# ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_a_device_that_is_not_there_is_refused():
    assert "--accelerator cuda" in user_error(devices.resolve_device, "cuda")
    assert "--accelerator cuda" in user_error(parse, "--accelerator", "cuda")


@pytest.mark.parametrize(
    ("cuda", "mps", "device"), [(1, 1, "cuda"), (1, 0, "cuda"), (0, 1, "mps"), (0, 0, "cpu")]
)
def test_auto_takes_cuda_else_mps_else_the_cpu(cuda, mps, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(devices, "cuda_problem", lambda: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert devices.resolve_device("auto") == device
    assert devices.resolve_device("cpu") == "cpu"


@pytest.mark.parametrize("device", ["cuda", "mps", "cpu"])
def test_a_given_precision_is_taken_everywhere(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert devices.resolve_precision("fp32", device) == "fp32"
    assert devices.resolve_precision("bf16", device) == "bf16"


def test_auto_precision_is_bfloat16_where_the_hardware_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert devices.resolve_precision("auto", "cuda") == "bf16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert devices.resolve_precision("auto", "cuda") == "fp32"

    for amx, avx512, precision in (
        (True, True, "bf16"),
        (False, True, "bf16"),
        (False, False, "fp32"),
    ):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        assert devices.resolve_precision("auto", "cpu") == precision
        assert devices.resolve_precision("auto", "mps") == "fp32"


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="counts page faults of glibc's allocator"
)
@pytest.mark.slow
def test_a_prepared_process_does_not_fetch_the_same_memory_again():
    """6 times 40 MiB are 60,000 pages of 4 KiB; a process that keeps memory fetches them once.

    Below 32 MiB, glibc may keep a block on its own.
    """
    program = """
import resource, torch, functions as fn
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3): [torch.ones(10 * 2**20), torch.ones(10 * 2**20)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(); before = faults()
fn.prepare_device(fn.Machine("cpu", "fp32"))
faults(); print(before, faults())
"""
    options = {"capture_output": True, "text": True, "check": True}
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE.parent, **options)
    unprepared, prepared = map(int, done.stdout.split())
    assert prepared < unprepared / 10


# ------------------------------------------------------------------------------------------------
# Batches and seeds
# ------------------------------------------------------------------------------------------------


def flatten(batches: fn.Batches) -> torch.Tensor:
    return torch.cat([batch for (batch,) in batches])


@pytest.mark.parametrize(
    ("n", "batch_size"), [(10, 3), (12, 3), (10, 1), (10, 10), (10, 99), (1, 1)]
)
def test_every_image_comes_once_per_epoch(n, batch_size):
    for seed in (None, 0):
        batches = fn.Batches(torch.arange(n), batch_size=batch_size, seed=seed)
        sizes = [len(batch) for (batch,) in batches]
        assert len(batches) == len(sizes) == math.ceil(n / batch_size)
        assert all(size == batch_size for size in sizes[:-1])
        assert flatten(batches).sort().values.tolist() == list(range(n))


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (12, 3), (10, 10), (10, 99)])
def test_drop_last_leaves_only_whole_batches(n, batch_size):
    for seed in (None, 0):
        batches = fn.Batches(torch.arange(n), batch_size=batch_size, seed=seed, drop_last=True)
        sizes = [len(batch) for (batch,) in batches]
        assert sizes == [batch_size] * (n // batch_size)
        assert len(batches) == len(sizes)
        seen = [i for (batch,) in batches for i in batch.tolist()]
        assert len(set(seen)) == len(seen)


def test_unshuffled_batches_are_slices_in_order():
    images = torch.arange(20)
    batches = list(fn.Batches(images, batch_size=6))
    assert torch.equal(torch.cat([batch for (batch,) in batches]), images)
    assert batches[1][0].data_ptr() == images[6:].data_ptr()  # no copy


def test_order_depends_on_seed_and_epoch_alone():
    torch.manual_seed(1)
    batches = fn.Batches(torch.arange(100), batch_size=7, seed=5)
    batches.epoch = 3
    state = torch.get_rng_state()
    order = flatten(batches)
    assert torch.equal(state, torch.get_rng_state())  # nothing comes from the global generator

    torch.manual_seed(2)
    again = fn.Batches(torch.arange(100), batch_size=30, seed=5)
    again.epoch = 3
    assert torch.equal(order, flatten(again))
    assert torch.equal(order, flatten(again))


def test_order_differs_between_epochs_and_seeds():
    orders = set()
    for seed, epoch in itertools.product(range(5), range(5)):
        batches = fn.Batches(torch.arange(50), batch_size=50, seed=seed)
        batches.epoch = epoch
        orders.add(tuple(flatten(batches).tolist()))
    assert len(orders) == 25


def test_tensors_of_a_batch_stay_aligned():
    images, labels = torch.arange(30).view(30, 1, 1, 1), torch.arange(30)
    for seed in (None, 0):
        for batch, label in fn.Batches(images, labels, batch_size=8, seed=seed):
            assert torch.equal(batch.flatten(), label)


def test_mixed_seeds_are_fixed_and_distinct_63_bit_numbers():
    numbers = [*itertools.product(range(40), range(40)), *itertools.product(range(1, 9), repeat=3)]
    seeds = [fn.mix_seed(*pair) for pair in numbers]
    assert seeds == [fn.mix_seed(*pair) for pair in numbers]
    assert len(set(seeds)) == len(numbers)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    assert fn.mix_seed(2**63 - 1, 0) != fn.mix_seed(2**62, 0)


def test_the_order_of_an_epoch_and_its_augmentation_draw_from_different_seeds():
    """Batches mixes (seed, epoch), EpochSeed mixes (seed, epoch, rank)."""
    assert fn.mix_seed(3, 4) != fn.mix_seed(3, 4, 0)


# ------------------------------------------------------------------------------------------------
# Training with Lightning
# ------------------------------------------------------------------------------------------------


class Softmax(fn.Classification):
    """The smallest model that trains."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train_softmax(log: fn.EpochLog, epochs: int = 3, poison: float = 0.0) -> Softmax:
    x = randn(60, 5, dtype=torch.float32)
    y = (x[:, 0] > 0).long()
    x[0, 0] += poison
    torch.manual_seed(0)
    train = fn.Batches(x, y, batch_size=16, seed=0)
    module = Softmax(nn.Linear(5, 2), train, fn.Batches(x[40:], y[40:], batch_size=16))
    fn.fit(fn.make_trainer(CPU.machine, CPU.seed, epochs, log), module)
    return module


def test_training_logs_one_row_per_epoch_and_writes_them(capsys):
    log = fn.EpochLog(Path("metrics.csv"))
    module = train_softmax(log)
    keys = ["epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy"]
    keys += ["learning_rate", "images_per_second", "seconds"]
    assert [row["epoch"] for row in log.rows] == [1, 2, 3]
    assert all(sorted(row) == sorted(keys) for row in log.rows)
    assert log.rows[-1]["train_loss"] < log.rows[0]["train_loss"]

    inputs, labels = module.evaluate_batches.tensors
    accuracy = fn.accuracy(module(inputs).argmax(1), labels)
    assert log.rows[-1]["validation_accuracy"] == pytest.approx(accuracy)

    loss = nn.functional.cross_entropy(module(inputs), labels).item()
    assert log.rows[-1]["validation_loss"] == pytest.approx(loss, rel=1e-5)

    with open("metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [{key: float(value) for key, value in row.items()} for row in rows] == log.rows

    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]


def test_an_epochs_row_is_the_mean_over_its_images_also_when_the_last_batch_is_smaller():
    """Three images in batches of two; the learning rate is 0."""
    x, y = randn(3, 5, dtype=torch.float32), torch.tensor([0, 1, 1])
    train, validation = fn.Batches(x, y, batch_size=2), fn.Batches(x, y, batch_size=2)
    module = Softmax(nn.Linear(5, 2), train, validation)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    log = fn.EpochLog(quiet=True)
    fn.fit(fn.make_trainer(CPU.machine, CPU.seed, 1, log), module)

    loss = nn.functional.cross_entropy(module(x), y).item()
    accuracy = fn.accuracy(module(x).argmax(1), y)
    for split in ("train", "validation"):
        assert log.rows[0][f"{split}_loss"] == pytest.approx(loss, rel=1e-5)
        assert log.rows[0][f"{split}_accuracy"] == pytest.approx(accuracy)


def test_the_same_seed_trains_the_same_weights():
    one, two = (train_softmax(fn.EpochLog(quiet=True)).model.weight for _ in range(2))
    assert torch.equal(one, two)


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where():
    log = fn.EpochLog(Path("metrics.csv"), quiet=True)
    message = user_error(train_softmax, log, 3, math.inf)
    batches = fn.Batches(torch.arange(60), batch_size=16, seed=0)

    # Image 0 is the poisoned one.
    step = next(i for i, (batch,) in enumerate(batches, start=1) if 0 in batch)
    for words in ("epoch 1", f"step {step}", "learning rate 0.1", "--learning_rate", "checkpoint"):
        assert words in message
    assert log.rows == []


def test_a_held_out_loss_that_is_not_finite_stops_the_run_before_its_row_is_kept():
    class Poisoned(Softmax):
        def validation_step(self, batch, batch_idx):
            self.log("validation_loss", torch.tensor(torch.nan))

    x, y = randn(8, 5, dtype=torch.float32), torch.tensor([0, 1] * 4)
    batches = fn.Batches(x, y, batch_size=4)
    log = fn.EpochLog(quiet=True)
    trainer = fn.make_trainer(CPU.machine, CPU.seed, 2, log, rate="--rate")
    with pytest.raises(fn.Diverged, match=r"epoch 1, step 2, .*good checkpoint: none.*--rate"):
        fn.fit(trainer, Poisoned(nn.Linear(5, 2), batches, batches))
    assert log.rows == []


def test_an_epochs_line_says_what_was_measured():
    row = {"epoch": 3, "train_loss": 0.5, "train_accuracy": 0.25, "knn_accuracy": 0.125}
    row |= {"learning_rate": 0.1, "images_per_second": 1234.5, "seconds": 2.0}
    line = training.epoch_line(row, epochs=10, seconds=20.0, names={"knn": "k-NN"})
    words = "epoch  3/10  train loss 0.5000  25.0 %  k-NN 12.5 %  lr 0.1"
    assert line == f"{words}  1,234 images/s  2 min left"


def test_batches_of_another_device_are_others():
    batches = fn.Batches(torch.arange(4), batch_size=2, seed=0)
    moved = batches.to(torch.device("meta"))
    assert moved.tensors[0].device.type == "meta"
    assert batches.tensors[0].device.type == "cpu"
    assert (moved.batch_size, moved.seed) == (2, 0)


SETS = {"shuffled": {"seed": 3}, "in order": {}, "of two ranks": {"seed": 3, "ranks": 2}}


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("as_subset", [False, True])
def test_a_set_that_does_not_fit_gives_the_same_batches(kind, as_subset, monkeypatch):
    images, labels = torch.arange(300).view(100, 3), torch.arange(100)
    chosen = torch.arange(99, -1, -2)
    tensors = (images[chosen], labels[chosen])
    if as_subset:
        tensors = fn.Subset(images, chosen), fn.Subset(labels, chosen)
    options = {"batch_size": 7, "drop_last": "ranks" in SETS[kind], **SETS[kind]}
    batches = fn.Batches(images[chosen], labels[chosen], **options)
    batches.epoch = 2
    expected = list(batches)

    for free in (10.0**9, 0.0):
        monkeypatch.setattr(machinery.batches, "free_memory", lambda device, free=free: free)
        moved = fn.Batches(*tensors, **options).to(torch.device("cpu"))
        assert moved.kept == bool(free)
        moved.epoch = 2
        found = list(moved)
        assert len(found) == len(expected) == len(moved)
        for one, other in zip(found, expected, strict=True):
            assert all(map(torch.equal, one, other))


def test_the_next_batch_is_gathered_while_one_is_computed_with(monkeypatch):
    monkeypatch.setattr(machinery.batches, "free_memory", lambda device: 0.0)
    batches = fn.Batches(torch.arange(12), batch_size=3).to(torch.device("cpu"))
    taken, both = [], threading.Event()

    def rows_alone(tensor, part):
        taken.append((part.start, threading.current_thread()))
        if len(taken) == 2:
            both.set()
        return tensor[part]

    monkeypatch.setattr(machinery.batches, "rows_alone", rows_alone)
    found = iter(batches)
    assert next(found)[0].tolist() == [0, 1, 2]
    assert both.wait(10)  # without the second being asked for
    assert taken[1][0] == 3
    assert all(thread is not threading.main_thread() for _, thread in taken)
    found.close()
    assert len(taken) == 2


@pytest.mark.parametrize(("free", "fits"), [(1000, False), (1200, True), (math.inf, True)])
def test_a_quarter_of_the_free_memory_is_for_the_images(free, fits, monkeypatch):
    monkeypatch.setattr(machinery.batches, "free_memory", lambda device: float(free))
    batches = fn.Batches(torch.zeros(100, 3, dtype=torch.uint8), batch_size=7)
    assert (batches.bytes, batches.fits(torch.device("cpu"))) == (300, fits)
    words = "kept in the memory of the cpu" if fits else "each batch is gathered one step ahead"
    assert words in batches.where(torch.device("cpu"))


@pytest.mark.parametrize(("numbers", "words"), [(275_000, "0.3 MiB"), (2**30, "1,024 MiB")])
def test_few_images_take_some_memory(numbers, words):
    batches = fn.Batches(torch.zeros(1, dtype=torch.uint8).expand(numbers), batch_size=7)
    assert batches.where(torch.device("cpu")).startswith(f"{words} of images")


def test_free_memory_is_what_the_system_says():
    free = devices.free_memory(torch.device("cpu"))
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free <= whole


def test_a_subset_copies_nothing_until_it_is_asked():
    images = torch.arange(20).view(10, 2)
    part = fn.Subset(fn.Subset(images, torch.tensor([9, 8, 3, 1])), torch.tensor([2, 0]))
    assert (len(part), part.shape, part.device) == (2, (2, 2), images.device)
    assert part[:].tolist() == [[6, 7], [18, 19]]
    assert part[torch.tensor([1])].tolist() == [[18, 19]]
    images[9] = 0
    assert part[1:].tolist() == [[0, 0]]


# ------------------------------------------------------------------------------------------------
# Output
# ------------------------------------------------------------------------------------------------


class Ending(io.RawIOBase):
    """A file that nobody reads any more."""

    def writable(self):
        return True

    def write(self, data):
        raise BrokenPipeError(32, "Broken pipe")


def broken_stream():
    return io.TextIOWrapper(io.BufferedWriter(Ending(), buffer_size=1), write_through=True)


def test_a_stream_that_nobody_reads_is_no_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", broken_stream())
    with output.lasting_output():
        for _ in range(3):
            print("a line", flush=True)
    assert capsys.readouterr().err.count("note: stdout is lost") >= 1


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_stream_that_is_not_there_is_no_error(closed, monkeypatch):
    monkeypatch.setattr(sys, closed, None)
    with output.lasting_output():
        print("a line", file=getattr(sys, closed), flush=True)
        assert getattr(sys, closed).isatty() is False
    assert getattr(sys, closed) is None


@pytest.mark.parametrize("name", ["蜜蜂", os.fsdecode(b"caf\xe9"), "\U0001f41d"])
def test_letters_that_the_encoding_lacks_are_escaped(name, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    with output.lasting_output():
        print(name)
        sys.stdout.flush()
        assert raw.getvalue().decode("cp1252").strip() == name.encode(
            "cp1252", "backslashreplace"
        ).decode("cp1252")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cat", "cat"),
        ("two\nlines\tand tabs", "two lines and tabs"),
        ("x" * 15 + "y" * 165, "x" * 15 + "…" + "y" * 8),
        (os.fsdecode(b"caf\xe9"), "caf?"),
        ("a\u200bb\x1b[31m", "a?b?[31m"),
        (" ", "?"),
    ],
)
def test_names_are_shown_in_a_line_that_fits(name, text):
    assert output.shown(name) == text


def test_a_table_is_straight_with_wide_letters_and_accents(capsys):
    fn.print_columns([["蜜蜂", "1 %"], ["e\u0301", "22 %"], ["bee", "3 %"]])
    lines = capsys.readouterr().out.splitlines()
    assert {output.width(line) for line in lines} == {2 + 4 + 3 + 4}


def test_rows_travel_in_the_checkpoint():
    log, resumed = fn.EpochLog(), fn.EpochLog()
    log.rows = [
        {"epoch": 1, "train_loss": 0.5},
        {"epoch": 2, "train_loss": 0.25, "knn_accuracy": 0.125},
    ]
    fn.save_torch(Path("log.pt"), log.state_dict())
    resumed.load_state_dict(torch.load("log.pt", weights_only=True))
    assert resumed.rows == log.rows


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (45, "45 s"),
        (89, "89 s"),
        (120, "2 min"),
        (725, "12 min"),
        (3 * 3600 + 5 * 60, "3 h 05 min"),
        (7199, "2 h 00 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_durations_are_written_for_people(seconds, text):
    assert fn.format_time(seconds) == text
