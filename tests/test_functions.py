"""functions.py: every test states one truth, in the order of functions.py's own parts."""

from __future__ import annotations

import csv
import http.client
import io
import itertools
import json
import math
import os
import pickle
import socket
import struct
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from conftest import Code
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import functions as fn
from functions import UserError
from machinery import files, run_folder

HERE = Path(__file__).parent


@dataclass
class Config(fn.RunConfig):
    """The configuration of a script that is called script.py."""

    epochs: int = 3
    """passes over the images"""
    rate: float = 0.1
    """how fast to learn"""
    cell: Literal["rnn", "lstm"] = "rnn"
    """what to train"""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Each test is script.py, run in a folder of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("sys.argv", ["script.py"])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randint(high: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def user_error(call, *args) -> str:
    """The message of the UserError that call(*args) must raise: one line."""
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert message.strip()
    assert len(message.splitlines()) == 1, message
    return message


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
    config = parse("--epochs", "5", "--rate=1e-05", "--cell", "lstm", "--image_size", "16", "--dataset", "123")
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
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "mine.yaml"),  # no text at all, such as a checkpoint
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
    for words in ("What it does.", "--epochs EPOCHS passes over the images", "decides initial weights"):
        assert words in text


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"epochs": 5, "rate": 1e-5, "cell": "lstm", "image_size": 16, "seed": 2**32 - 1, "precision": "fp32"},
        *({"rate": rate} for rate in (1e22, 5e-324, 0.1 + 0.2, 3.0, -1e-7)),
        *(
            {"dataset": name}
            for name in ("null", "1", "yes", "1e5", "a: b", "#x", " x ", "~", "'\"\\", "a\nb", "Übung")
        ),
        {"dataset": "photos 😀"},
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
    assert parse("--resume") == Config(epochs=12, resume="runs/script-b", output_dir="runs/script-b")
    Path("runs/script-a/checkpoint").touch()  # the run that wrote last, not the one that began last
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
    assert run_program(seen.append, "--epochs", "4", monkeypatch=monkeypatch, capsys=capsys) == (0, [])
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
        with fn.run_folder(config):
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
# The run folder
# ------------------------------------------------------------------------------------------------


def test_new_run_folder_is_named_after_script_and_set_and_has_the_configuration():
    with fn.run_folder(Config(dataset="some/photos", epochs=4)) as folder:
        assert folder.parent == Path("runs")
        assert folder.name.startswith("script-photos-2")
        assert {file.name for file in folder.iterdir()} == {"config.yaml", ".lock"}
        assert parse("--config", str(folder / "config.yaml")) == Config(dataset="some/photos", epochs=4)


def test_two_runs_in_the_same_second_get_different_folders(monkeypatch):
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: "20300101-000000")
    folders = []
    for _ in range(3):
        with fn.run_folder(Config()) as folder:
            folders.append(folder)
    assert len(set(folders)) == 3
    assert all((folder / "config.yaml").is_file() for folder in folders)


def test_output_dir_is_made_with_its_parents_and_may_exist_empty():
    Path("there").mkdir()
    for name in ("deep/er", "there"):
        with fn.run_folder(Config(output_dir=name)) as folder:
            assert folder == Path(name)
            assert (folder / "config.yaml").is_file()


def enter(config: Config) -> None:
    with fn.run_folder(config):
        pytest.fail("the folder was accepted")


def test_output_dir_with_anything_in_it_is_refused_and_untouched():
    Path("full").mkdir()
    Path("full/config.yaml").write_text("precious")
    assert "--output_dir full" in user_error(enter, Config(output_dir="full"))
    assert [(file.name, file.read_text()) for file in Path("full").iterdir()] == [("config.yaml", "precious")]


@pytest.mark.parametrize("wanted", ["file", "file/below", "file/below/that"])
def test_output_dir_that_is_or_lies_below_a_file_is_refused(wanted):
    Path("file").write_text("precious")
    assert f"--output_dir {wanted}" in user_error(enter, Config(output_dir=wanted))
    assert Path("file").read_text() == "precious"


def test_ctrl_c_in_a_run_carries_the_command_that_resumes_it():
    with pytest.raises(KeyboardInterrupt) as stopped, fn.run_folder(Config(output_dir="out")):
        raise KeyboardInterrupt
    assert "python script.py --resume out" in str(stopped.value)


def test_resumed_run_keeps_its_folder_and_configuration():
    folder = save_run("run", epochs=9)
    before = (folder / "config.yaml").read_bytes()
    with fn.run_folder(parse("--resume", "run")) as reopened:
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


def test_results_json_has_the_common_keys_and_the_outcome():
    record = fn.start_record(Config("digits", seed=5, accelerator="cpu", precision="fp32"))
    fn.save_results(Path(), record, knn={"accuracy": 0.5})
    results = json.loads(Path("results.json").read_text())
    keys = "script dataset seed device precision threads versions git_commit git_dirty seconds knn"
    assert list(results) == keys.split()
    assert (results["script"], results["dataset"], results["seed"]) == ("script.py", "digits", 5)
    assert (results["device"], results["precision"], results["threads"]) == ("cpu", "fp32", torch.get_num_threads())
    assert results["versions"]["torch"] == torch.__version__
    assert 0 <= results["seconds"] < 60
    assert results["knn"] == {"accuracy": 0.5}
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True)
    assert results["git_commit"] == (head.stdout.strip() if head.returncode == 0 else None)


def test_results_without_git_still_appear(monkeypatch):
    monkeypatch.setenv("PATH", "")
    fn.save_results(Path(), fn.start_record(Config(accelerator="cpu")))
    results = json.loads(Path("results.json").read_text())
    assert (results["git_commit"], results["git_dirty"]) == (None, None)


# ------------------------------------------------------------------------------------------------
# Data sets: digits, CIFAR and STL-10
# ------------------------------------------------------------------------------------------------


def check_types(data: fn.ImageDataset, channels: int, size: int) -> None:
    """What ImageDataset promises of its tensors."""
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        assert images.dtype == torch.uint8
        assert images.shape == (len(labels), channels, size, size)
        assert labels.dtype == torch.int64
        assert int(labels.max()) < len(data.classes)


def test_digits_are_scikit_learns_scans_each_once_in_a_stratified_split():
    from sklearn.datasets import load_digits

    data, scans = fn.load_dataset("digits"), load_digits()
    check_types(data, 3, 8)
    assert data.classes == tuple("0123456789")
    assert len(data.train_images) + len(data.test_images) == 1797
    pixels = torch.cat([data.train_images, data.test_images])
    assert torch.equal(pixels[:, 0], pixels[:, 1])
    assert torch.equal(pixels[:, 0], pixels[:, 2])
    ours = zip(map(bytes, pixels[:, 0].numpy()), torch.cat([data.train_labels, data.test_labels]).tolist(), strict=True)
    pixels = np.rint(scans.images * 255 / 16).astype(np.uint8)
    assert Counter(ours) == Counter(zip(map(bytes, pixels), scans.target.tolist(), strict=True))
    for digit in range(10):
        assert abs(int((data.test_labels == digit).sum()) - 0.2 * (scans.target == digit).sum()) <= 0.5


def test_digits_are_the_same_every_time():
    one, two = fn.load_dataset("digits"), fn.load_dataset("digits")
    assert torch.equal(one.train_images, two.train_images)
    assert torch.equal(one.test_labels, two.test_labels)
    assert one.pretraining_images is one.train_images


@pytest.fixture
def no_network(monkeypatch):
    """No network, and files of the torchvision data sets count as intact when they are there."""
    from torchvision.datasets import cifar, stl10, utils

    def unreachable(*_, **__):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    for module in (cifar, stl10, utils):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))


def fake_cifar(folder: Path, key: str, files: dict[str, int], meta: tuple[str, str, int]) -> dict[str, torch.Tensor]:
    """CIFAR's own format: pickled rows of 1024 red, 1024 green, 1024 blue values. Returns the images of each file."""
    folder.mkdir(parents=True)
    images = {name: randint(256, n, 3, 32, 32, seed=i, dtype=torch.uint8) for i, (name, n) in enumerate(files.items())}
    for name, pixels in images.items():
        labels = [i % meta[2] for i in range(len(pixels))]
        (folder / name).write_bytes(pickle.dumps({"data": pixels.reshape(len(pixels), 3072).numpy(), key: labels}))
    (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: [f"class {i}" for i in range(meta[2])]}))
    return images


def fake_cifar10(data_dir: Path) -> dict[str, torch.Tensor]:
    files = {**{f"data_batch_{i}": 3 for i in range(1, 6)}, "test_batch": 4}
    return fake_cifar(data_dir / "cifar-10-batches-py", "labels", files, ("batches.meta", "label_names", 10))


def fake_cifar100(data_dir: Path) -> dict[str, torch.Tensor]:
    files = {"train": 7, "test": 4}
    return fake_cifar(data_dir / "cifar-100-python", "fine_labels", files, ("meta", "fine_label_names", 100))


def fake_stl10(data_dir: Path) -> dict[str, torch.Tensor]:
    """STL-10's own format: values 1...10 for classes; each channel of an image column by column."""
    folder = data_dir / "stl10_binary"
    folder.mkdir(parents=True)
    (folder / "class_names.txt").write_text("".join(f"class {i}\n" for i in range(10)))
    images = {}
    for i, (name, n) in enumerate({"train": 4, "test": 3, "unlabeled": 5}.items()):
        images[name] = randint(256, n, 3, 96, 96, seed=i, dtype=torch.uint8)
        images[name].transpose(2, 3).contiguous().numpy().tofile(folder / f"{name}_X.bin")
        if name != "unlabeled":
            np.arange(1, n + 1, dtype=np.uint8).tofile(folder / f"{name}_y.bin")
    return images


def test_cifar10_keeps_pixels_channels_and_labels(tmp_path, no_network):
    files = fake_cifar10(tmp_path)
    data = fn.load_dataset("cifar10", tmp_path)
    check_types(data, 3, 32)
    assert torch.equal(data.train_images, torch.cat([files[f"data_batch_{i}"] for i in range(1, 6)]))
    assert torch.equal(data.test_images, files["test_batch"])
    assert data.train_labels.tolist() == [0, 1, 2] * 5
    assert data.test_labels.tolist() == [0, 1, 2, 3]
    assert data.classes == tuple(f"class {i}" for i in range(10))
    assert data.unlabelled_images is None


def test_cifar100_has_its_hundred_fine_classes(tmp_path, no_network):
    files = fake_cifar100(tmp_path)
    data = fn.load_dataset("cifar100", tmp_path)
    check_types(data, 3, 32)
    assert torch.equal(data.train_images, files["train"])
    assert torch.equal(data.test_images, files["test"])
    assert data.train_labels.tolist() == list(range(7))
    assert data.classes == tuple(f"class {i}" for i in range(100))


def test_stl10_is_upright_and_has_its_unlabelled_images_for_pretraining(tmp_path, no_network):
    files = fake_stl10(tmp_path)
    data = fn.load_dataset("stl10", tmp_path)
    check_types(data, 3, 96)
    assert torch.equal(data.train_images, files["train"])
    assert torch.equal(data.test_images, files["test"])
    assert torch.equal(data.pretraining_images, files["unlabeled"])
    assert data.train_labels.tolist() == [0, 1, 2, 3]
    assert data.classes == tuple(f"class {i}" for i in range(10))


ARCHIVES = {
    "cifar10": (fake_cifar10, "cifar-10-python.tar.gz"),
    "cifar100": (fake_cifar100, "cifar-100-python.tar.gz"),
    "stl10": (fake_stl10, "stl10_binary.tar.gz"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_without_network_the_archive_is_named_and_putting_it_there_helps(name, tmp_path, no_network):
    fake, archive = ARCHIVES[name]
    socket.setdefaulttimeout(123)
    try:
        message = user_error(fn.load_dataset, name, tmp_path / "data")
        assert socket.getdefaulttimeout() == 123
    finally:
        socket.setdefaulttimeout(None)
    for words in (f"--dataset {name}", archive, str(tmp_path / "data"), "script.py --dataset digits", "no network"):
        assert words in message

    fake(tmp_path / "elsewhere")
    (tmp_path / "data").mkdir(exist_ok=True)
    with tarfile.open(tmp_path / "data" / archive, "w:gz") as tar:
        for folder in (tmp_path / "elsewhere").iterdir():
            tar.add(folder, folder.name)
    check_types(fn.load_dataset(name, tmp_path / "data"), 3, 96 if name == "stl10" else 32)


@pytest.mark.parametrize("form", ["unpacked", "archive"])
def test_data_that_is_not_the_original_is_never_opened(form, tmp_path, monkeypatch):
    """CIFAR comes as pickles, which run as code: torchvision compares checksums before it unpacks or loads them."""

    def unreachable(*_, **__):
        raise urllib.error.URLError("no network here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    folder = tmp_path / "data" if form == "unpacked" else tmp_path / "elsewhere"
    fake_cifar10(folder)
    for file in (folder / "cifar-10-batches-py").iterdir():
        file.write_bytes(pickle.dumps(Code()))
    if form == "archive":
        (tmp_path / "data").mkdir()
        with tarfile.open(tmp_path / "data/cifar-10-python.tar.gz", "w:gz") as tar:
            tar.add(folder / "cifar-10-batches-py", "cifar-10-batches-py")
    assert "could not be downloaded" in user_error(fn.load_dataset, "cifar10", tmp_path / "data")
    assert not (tmp_path / "hacked").exists()
    pickle.loads(pickle.dumps(Code()))
    assert (tmp_path / "hacked").exists(), "the test can fail"


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionResetError(104, "reset"), http.client.BadStatusLine("?")])
def test_every_failure_of_a_download_is_a_user_error(error, tmp_path, no_network, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    assert "cifar-10-python.tar.gz" in user_error(fn.load_dataset, "cifar10", tmp_path)


def test_a_download_cannot_wait_for_ever(tmp_path, no_network, monkeypatch):
    seen = []

    def note(*_, **__):
        seen.append(socket.getdefaulttimeout())
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", note)
    user_error(fn.load_dataset, "cifar10", tmp_path)
    assert seen
    assert None not in seen
    assert socket.getdefaulttimeout() is None


def test_data_dir_that_is_a_file_is_named(tmp_path, no_network):
    (tmp_path / "file").write_text("precious")
    assert str(tmp_path / "file") in user_error(fn.load_dataset, "cifar10", tmp_path / "file")


# ------------------------------------------------------------------------------------------------
# Data sets: folders of images
# ------------------------------------------------------------------------------------------------

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def save(file: str, image: Image.Image | tuple[int, ...], **options) -> Path:
    """Save an image, or a 12 x 9 one of a single colour."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    (Image.new("RGB", (12, 9), image) if isinstance(image, tuple) else image).save(file, **options)
    return Path(file)


def load(folder: str = "photos", size: int | None = 8) -> fn.ImageDataset:
    return fn.load_dataset(folder, "data", size)


def pixels_of(image: Image.Image, file: str = "photos/a.png", size: int = 8, **options) -> torch.Tensor:
    """What one image becomes, int (3, size, size)."""
    save(file, image, **options)
    images = load(size=size).train_images
    assert images.dtype == torch.uint8
    assert images.shape == (1, 3, size, size)
    return images[0].int()


def assert_colour(pixels: torch.Tensor, colour: tuple[int, ...], within: int = 0) -> None:
    """All pixels (3, ...) have this colour."""
    difference = (pixels.flatten(1) - torch.tensor(colour).view(3, 1)).abs().max()
    assert difference <= within, f"{pixels.flatten(1)[:, 0].tolist()}... is not {colour}"


def two_classes(folder: str = "photos") -> None:
    """cat is red (2 for training, 1 for test), dog is blue (1 and 2)."""
    for name in ("train/cat/a", "train/cat/b", "test/cat/c", "train/dog/a", "test/dog/x/deep", "test/dog/b"):
        save(f"{folder}/{name}.png", RED if "cat" in name else BLUE)


def test_class_folders_give_images_labels_and_class_names():
    two_classes()
    data = load()
    check_types(data, 3, 8)
    assert data.classes == ("cat", "dog")
    assert data.train_labels.tolist() == [0, 0, 1]
    assert data.test_labels.tolist() == [0, 1, 1]
    for images, labels in (data.labelled()[:2], data.labelled()[2:]):
        for image, label in zip(images, labels, strict=True):
            assert_colour(image.int(), (RED, BLUE)[label])


def test_a_class_that_the_test_split_lacks_keeps_the_numbers_of_the_others():
    save("photos/train/ant/a.png", GREEN)
    two_classes()
    data = load()
    assert data.classes == ("ant", "cat", "dog")
    assert data.test_labels.tolist() == [1, 2, 2]


def test_images_are_32_pixels_unless_told_otherwise():
    save("photos/a.png", RED)
    assert load(size=None).train_images.shape == (1, 3, 32, 32)


def test_flat_folder_has_images_in_the_order_of_their_names_and_no_labels():
    for name, colour in (("b", GREEN), ("a", RED), ("c", BLUE)):
        save(f"photos/{name}.png", colour)
    data = load()
    assert (data.train_labels, data.test_images, data.test_labels, data.classes) == (None, None, None, ())
    for image, colour in zip(data.train_images, (RED, GREEN, BLUE), strict=True):
        assert_colour(image.int(), colour)
    assert data.pretraining_images is data.train_images


def test_images_of_any_size_become_square():
    for i, size in enumerate([(1, 1), (8, 8), (3, 50), (200, 7), (64, 48)]):
        save(f"photos/{i}.png", Image.new("RGB", size, (10, 200, 30)))
    data = load()
    assert data.train_images.shape == (5, 3, 8, 8)
    assert_colour(data.train_images.transpose(0, 1).int(), (10, 200, 30))


def test_an_image_of_the_exact_size_keeps_its_exact_pixels():
    noise = randint(256, 16, 16, 3, dtype=torch.uint8)
    assert torch.equal(pixels_of(Image.fromarray(noise.numpy()), size=16), noise.permute(2, 0, 1).int())


def test_a_wide_image_is_cropped_to_its_middle():
    stripes = Image.new("RGB", (96, 32), GREEN)
    stripes.paste(RED, (0, 0, 32, 32))
    stripes.paste(BLUE, (64, 0, 96, 32))
    assert_colour(pixels_of(stripes)[:, :, 1:-1], GREEN)


@pytest.mark.parametrize(
    ("mode", "colour", "file", "expected"),
    [
        ("L", 100, "a.png", (100, 100, 100)),
        ("L", 100, "a.jpg", (100, 100, 100)),
        ("1", 1, "a.png", WHITE),
        ("LA", (100, 255), "a.png", (100, 100, 100)),
        ("LA", (0, 0), "a.png", WHITE),
        ("RGBA", (255, 0, 0, 255), "a.png", RED),
        ("RGBA", (0, 0, 0, 0), "a.png", WHITE),  # what is transparent shows the paper
        ("RGBA", (255, 0, 0, 128), "a.png", (255, 127, 127)),
        ("CMYK", (0, 255, 255, 0), "a.jpg", RED),
        ("RGB", (10, 200, 30), "a.bmp", (10, 200, 30)),
        ("RGB", (10, 200, 30), "a.webp", (10, 200, 30)),
        ("RGB", (10, 200, 30), "NO-EXTENSION", (10, 200, 30)),
    ],
)
def test_every_mode_becomes_rgb(mode, colour, file, expected):
    options = {"format": "png"} if "." not in file else {}
    assert_colour(
        pixels_of(Image.new(mode, (20, 20), colour), f"photos/{file}", **options), expected, 0 if "png" in file else 4
    )


@pytest.mark.parametrize("file", ["a.png", "a.pgm", "a.tif"])
def test_16_bit_grey_is_scaled_and_not_clipped(file):
    grey = Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16))
    assert_colour(pixels_of(grey, f"photos/{file}"), (156, 156, 156), within=1)


@pytest.mark.parametrize(("options", "left"), [({}, (0, 255, 0)), ({"transparency": 0}, WHITE)])
def test_palette_image_shows_its_colours_and_transparency(options, left):
    halves = Image.new("P", (8, 8), 1)
    halves.putpalette([*GREEN, *RED])
    halves.paste(0, (0, 0, 4, 8))
    pixels = pixels_of(halves, **options)
    assert_colour(pixels[:, :, :4], left)
    assert_colour(pixels[:, :, 4:], RED)


@pytest.mark.parametrize("size", [(16, 16), (300, 200), (200, 320)])
@pytest.mark.parametrize(("orientation", "turn"), [(1, None), (3, "ROTATE_180"), (6, "ROTATE_90"), (8, "ROTATE_270")])
def test_a_photo_taken_sideways_is_turned_upright(size, orientation, turn):
    upright = Image.new("RGB", size, BLUE)
    upright.paste(RED, (0, 0, size[0], size[1] // 2))
    stored = upright.transpose(Image.Transpose[turn]) if turn else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = pixels_of(stored, "photos/a.jpg", size=16, exif=exif, quality=95, subsampling=0)
    assert_colour(pixels[:, :6], RED, within=12)
    assert_colour(pixels[:, 10:], BLUE, within=12)


def cache_file() -> Path:
    (file,) = Path("data/cache").iterdir()
    return file


def test_a_folder_is_decoded_once(monkeypatch):
    two_classes()
    first = load()
    monkeypatch.setattr(fn, "read_image", lambda *_: pytest.fail("decoded again"))
    second = load()
    assert torch.equal(first.train_images, second.train_images)
    assert torch.equal(first.test_images, second.test_images)
    assert torch.equal(first.test_labels, second.test_labels)


def test_another_size_is_decoded_on_its_own():
    save("photos/a.png", RED)
    assert load(size=8).train_images.shape[-1] == 8
    assert load(size=9).train_images.shape[-1] == 9
    assert load(size=8).train_images.shape[-1] == 8


@pytest.mark.parametrize("change", ["content", "length", "new file", "removed file", "renamed file"])
def test_a_changed_folder_is_decoded_afresh(change):
    save("photos/a.bmp", RED)
    save("photos/b.bmp", BLUE)
    assert len(load().train_images) == 2
    if change == "content":  # of the same length in bytes
        later = os.stat(save("photos/a.bmp", GREEN)).st_mtime_ns + 10**9
        os.utime("photos/a.bmp", ns=(later, later))
    elif change == "length":  # within the clock's resolution
        time = os.stat("photos/a.bmp").st_mtime_ns
        os.utime(save("photos/a.bmp", Image.new("RGB", (30, 30), GREEN)), ns=(time, time))
    elif change == "new file":
        save("photos/0.bmp", GREEN)
    elif change == "removed file":
        os.remove("photos/a.bmp")
    else:
        os.rename("photos/a.bmp", "photos/c.bmp")
    assert_colour(load().train_images[0].int(), BLUE if change in ("removed file", "renamed file") else GREEN)


def test_two_folders_of_one_name_do_not_share_a_cache():
    for folder, colour in (("mine/photos", RED), ("yours/photos", BLUE)):
        os.utime(save(f"{folder}/a.bmp", colour), ns=(10**18, 10**18))  # as an archive unpacks them
        assert_colour(load(folder).train_images[0].int(), colour)


@pytest.mark.parametrize("damage", ["empty", "truncated", "garbage", "another shape", "another type"])
def test_a_damaged_cache_is_decoded_afresh_and_mended(damage, monkeypatch):
    two_classes()
    expected = load().train_images.clone()
    file, whole = cache_file(), cache_file().read_bytes()
    if damage == "another shape":
        torch.save(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), file)
    elif damage == "another type":
        torch.save({"images": 1}, file)
    else:
        file.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "garbage": b"garbage" * 100}[damage])
    assert torch.equal(load().train_images, expected)
    monkeypatch.setattr(fn, "read_image", lambda *_: pytest.fail("the cache was not mended"))
    assert torch.equal(load().train_images, expected)


def test_a_cache_that_cannot_be_written_is_only_noted(capsys):
    two_classes()
    Path("data").write_text("a file, no folder")
    assert len(load().train_images) == 3
    error = capsys.readouterr().err
    assert error.startswith("note: ")
    assert len(error.splitlines()) == 1
    assert Path("data").read_text() == "a file, no folder"


@pytest.mark.parametrize("where", ["photos", "photos/train", "photos/train/cat"])
def test_files_that_systems_hide_are_ignored(where):
    two_classes()
    for name in (".DS_Store", "._a.png", "Thumbs.db", "desktop.ini"):
        Path(where, name).write_text("no image")
    assert load().train_labels.tolist() == [0, 0, 1]
    save("flat/a.png", RED)
    Path("flat/.DS_Store").write_text("no image")
    assert len(load("flat").train_images) == 1


@pytest.mark.parametrize("where", ["photos/train", "photos/train/cat"])
def test_hidden_folders_are_ignored(where):
    two_classes()
    save(f"{where}/.ipynb_checkpoints/a-checkpoint.png", GREEN)
    data = load()
    assert data.classes == ("cat", "dog")
    assert data.train_labels.tolist() == [0, 0, 1]


def test_an_empty_class_folder_is_no_class():
    two_classes()
    for folder in ("train/bee", "train/cow", "test/ape"):
        Path("photos", folder).mkdir()
    data = load()
    assert data.classes == ("cat", "dog")
    assert data.train_labels.tolist() == [0, 0, 1]
    assert data.test_labels.tolist() == [0, 1, 1]


def test_a_missing_folder_is_named_with_the_sets_there_are():
    message = user_error(load, "nowhere")
    assert "--dataset nowhere" in message
    assert "digits" in message


@pytest.mark.parametrize("folders", [["."], ["cat"], ["train"], ["train/cat"], ["train/cat", "train/dog"]])
def test_a_folder_without_images_is_named(folders):
    for folder in folders:
        Path("photos", folder).mkdir(parents=True)
    assert "photos" in user_error(load)


def test_images_in_train_without_class_folders_are_refused():
    save("photos/train/a.png", RED)
    assert "photos/train/<class>" in user_error(load)


def test_a_test_class_that_train_lacks_is_named():
    two_classes()
    save("photos/test/emu/a.png", GREEN)
    message = user_error(load)
    assert "emu" in message
    assert "photos" in message
    assert "cat" not in message


def png_of_claimed_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


BROKEN = {
    "text.png": b"this is no image\n",
    "empty.png": b"",
    "truncated.jpg": encoded(Image.fromarray(randint(256, 64, 64, 3, dtype=torch.uint8).numpy()), "jpeg")[:2000],
    "notes.txt": b"a list of the photos\n",
    "large.png": encoded(Image.new("1", (7100, 7100)), "png"),  # intact, a few kilobytes
    "larger.png": png_of_claimed_size(10_000, 10_000),
    "absurd.png": png_of_claimed_size(2**31 - 1, 2**31 - 1),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("where", ["flat", "photos/train/cat", "photos/test/dog"])
def test_a_file_that_is_no_readable_image_is_named_and_all_that_is_said(name, where, recwarn, capsys):
    two_classes()
    save("flat/a.png", RED)
    Path(where, name).write_bytes(BROKEN[name])
    assert f"{where}/{name}" in user_error(load, where.split("/")[0])
    assert [str(warning.message) for warning in recwarn] == []
    assert capsys.readouterr().err == ""
    assert not Path("data").exists()


def test_labelled_images_are_refused_to_a_set_that_has_no_classes_or_test_images_or_one_class():
    save("flat/a.png", RED)
    assert "flat" in user_error(load("flat").labelled)
    save("untested/train/cat/a.png", RED)
    save("untested/train/dog/a.png", RED)
    assert "untested/test/<class>" in user_error(load("untested").labelled)
    save("single/train/cat/a.png", RED)
    save("single/test/cat/a.png", RED)
    assert "one class" in user_error(load("single").labelled)


# ------------------------------------------------------------------------------------------------
# Subsets, Normalize, Batches
# ------------------------------------------------------------------------------------------------

UNEVEN = torch.tensor([7] * 1 + [2] * 3 + [0] * 50 + [5] * 201)[torch.randperm(255, generator=torch.manual_seed(0))]


@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.1, 1 / 3, 0.5, 0.99, 1])
def test_subset_takes_its_share_of_every_class_and_at_least_one(fraction):
    chosen = fn.stratified_subset(UNEVEN, fraction, seed=0)
    assert chosen.dtype == torch.int64
    assert torch.equal(chosen, chosen.unique())  # sorted and distinct
    for label in UNEVEN.unique():
        members, count = int((label == UNEVEN).sum()), int((UNEVEN[chosen] == label).sum())
        assert count >= 1
        assert abs(count - fraction * members) <= 0.5 or count == 1


def test_subset_is_fixed_by_its_seed_alone():
    first = fn.stratified_subset(UNEVEN, 0.2, seed=1)
    torch.manual_seed(99)
    assert torch.equal(first, fn.stratified_subset(UNEVEN, 0.2, seed=1))
    subsets = {tuple(fn.stratified_subset(UNEVEN, 0.2, seed).tolist()) for seed in range(20)}
    assert len(subsets) == 20


def test_over_many_seeds_every_image_is_equally_likely():
    labels = torch.tensor([0] * 10 + [1] * 20)
    times = sum(torch.bincount(fn.stratified_subset(labels, 0.3, seed), minlength=30) for seed in range(2000))
    assert (times / 2000 - 0.3).abs().max() < 5 * math.sqrt(0.3 * 0.7 / 2000)


def test_the_whole_fraction_is_everything():
    assert torch.equal(fn.stratified_subset(UNEVEN, 1, seed=3), torch.arange(len(UNEVEN)))


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, math.nan, math.inf])
def test_no_other_fraction_is_accepted(fraction):
    with pytest.raises(ValueError, match="fraction"):
        fn.stratified_subset(UNEVEN, fraction, seed=0)


def test_subset_and_complement_are_everything_once():
    subset = fn.stratified_subset(UNEVEN, 0.3, seed=0)
    rest = fn.complement(subset, len(UNEVEN))
    assert rest.dtype == torch.int64
    assert torch.equal(rest, rest.sort().values)
    assert torch.equal(torch.cat([subset, rest]).sort().values, torch.arange(len(UNEVEN)))
    assert fn.complement(torch.arange(4), 4).tolist() == []


def skewed_images(n: int = 40) -> torch.Tensor:
    """Three channels of different mean and spread, uint8 (n, 3, 8, 8)."""
    return randint(256, n, 3, 8, 8, dtype=torch.uint8) // torch.tensor([1, 3, 9], dtype=torch.uint8).view(3, 1, 1)


def test_training_images_are_normalised_to_mean_0_and_deviation_1():
    images = skewed_images()
    normalised = fn.Normalize(images)(images)
    assert normalised.dtype == torch.float32
    assert normalised.shape == images.shape
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalised.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_normalize_is_torchvisions_totensor_and_normalize():
    from torchvision import transforms

    train, other = skewed_images(), randint(256, 5, 3, 8, 8, seed=1, dtype=torch.uint8)
    values = train.numpy().astype(np.float64) / 255
    theirs = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(values.mean((0, 2, 3)), values.std((0, 2, 3)))]
    )
    expected = torch.stack([theirs(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in other])
    torch.testing.assert_close(fn.Normalize(train)(other), expected.float(), atol=1e-5, rtol=1e-5)


def test_normalize_reads_uint8_and_floats_from_0_to_1_alike_and_changes_neither():
    images = skewed_images()
    floats, normalize = images.float() / 255, fn.Normalize(images)
    before = floats.clone()
    torch.testing.assert_close(normalize(images), normalize(floats), atol=1e-5, rtol=1e-5)
    assert torch.equal(floats, before)


@pytest.mark.parametrize("value", [0, 1, 77, 255])
def test_a_constant_channel_is_only_centred(value):
    images = skewed_images()
    images[:, 1] = value
    normalize = fn.Normalize(images)
    assert normalize(images)[:, 1].abs().max() < 1e-6
    images[:, 1] = 255 - value
    changed = normalize(images)
    assert changed.isfinite().all()
    torch.testing.assert_close(changed[:, 1], torch.full((40, 8, 8), (255 - 2 * value) / 255), atol=1e-6, rtol=0)


def test_normalize_measures_any_number_of_channels():
    images = skewed_images()[:, :1]
    assert fn.Normalize(images)(images).std() == pytest.approx(1, abs=1e-3)


def flatten(batches: fn.Batches) -> torch.Tensor:
    return torch.cat([batch for (batch,) in batches])


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (12, 3), (10, 1), (10, 10), (10, 99), (1, 1)])
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
    assert torch.equal(state, torch.get_rng_state())  # and draws nothing from the global generator
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
    assert fn.mix_seed(3, 4) != fn.mix_seed(3, 4, 0)  # Batches' (seed, epoch), EpochSeed's (seed, epoch, rank)


# ------------------------------------------------------------------------------------------------
# NT-Xent
# ------------------------------------------------------------------------------------------------


def cosine_similarities(embeddings: torch.Tensor) -> list[list[float]]:
    """s[i][k] = z_i . z_k / (|z_i| |z_k|), with Python's numbers."""
    z = embeddings.double().tolist()
    length = [math.sqrt(sum(value * value for value in row)) for row in z]
    dot = [[sum(map(float.__mul__, row, other)) for other in z] for row in z]
    return [[dot[i][k] / (length[i] * length[k]) for k in range(len(z))] for i in range(len(z))]


def algorithm_1(s: list[list[float]], tau: float) -> float:
    """The end of the paper's Algorithm 1, with its l(i, j) of Eq. 1. Our rows k and k + N are its 2k - 1 and 2k."""
    n = len(s) // 2

    def l(i: int, j: int) -> float:  # noqa: E743 (the paper's letter)
        denominator = sum(math.exp(s[i][k] / tau) for k in range(2 * n) if k != i)
        return -math.log(math.exp(s[i][j] / tau) / denominator)

    return sum(l(k, k + n) + l(k + n, k) for k in range(n)) / (2 * n)


@pytest.mark.parametrize("n", range(1, 20))
def test_loss_is_algorithm_1_of_the_paper(n):
    for d in (1, 2, 5, 64):
        z = randn(2 * n, d, seed=100 * n + d, dtype=torch.bfloat16)  # values that every type holds exactly
        s = cosine_similarities(z)
        for tau in (0.1, 0.5, 1.0, 10.0):
            expected = algorithm_1(s, tau)
            for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 2e-5)):
                loss = fn.nt_xent_loss(z.to(dtype), tau)
                assert loss.shape == ()
                assert loss.item() == pytest.approx(expected, rel=tolerance, abs=tolerance), (d, dtype, tau)


@pytest.mark.parametrize("n", [1, 2, 3, 64, 500])
@pytest.mark.parametrize("tau", [0.05, 0.5, 10])
def test_identical_embeddings_cost_log_of_2n_minus_1(n, tau):
    z = randn(1, 16).repeat(2 * n, 1)
    assert fn.nt_xent_loss(z, tau).item() == pytest.approx(math.log(2 * n - 1), abs=1e-9)
    assert fn.nt_xent_loss(z.float(), tau).item() == pytest.approx(math.log(2 * n - 1), abs=1e-4)


@pytest.mark.parametrize("n", [2, 3, 20])
@pytest.mark.parametrize("tau", [0.05, 0.5, 10])
def test_orthogonal_pairs_have_their_closed_form(n, tau):
    z = torch.eye(n, dtype=torch.float64).repeat(2, 1)
    expected = math.log1p((2 * n - 2) * math.exp(-1 / tau))
    assert fn.nt_xent_loss(z, tau).item() == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_perfect_separation_costs_nothing_at_a_small_temperature():
    assert fn.nt_xent_loss(torch.eye(8).repeat(2, 1), 0.02).item() < 1e-6


def test_the_positive_stands_once_in_the_denominator():
    z, tau, n = randn(12, 4), 0.5, 6
    s = cosine_similarities(z)
    twice = 0.0
    for i in range(2 * n):
        positive = math.exp(s[i][(i + n) % (2 * n)] / tau)
        others = sum(math.exp(s[i][k] / tau) for k in range(2 * n) if k != i)
        twice += -math.log(positive / (positive + others)) / (2 * n)
    assert abs(fn.nt_xent_loss(z, tau).item() - twice) > 0.05
    assert fn.nt_xent_loss(randn(2, 4), tau).item() == pytest.approx(0, abs=1e-12)  # a pair alone has no negatives


def test_loss_does_not_depend_on_the_length_of_an_embedding():
    z, lengths = randn(14, 5), torch.logspace(-3, 3, 14, dtype=torch.float64).view(-1, 1)
    torch.testing.assert_close(fn.nt_xent_loss(lengths * z, 0.3), fn.nt_xent_loss(z, 0.3))


def test_loss_does_not_depend_on_the_order_of_images_or_views():
    a, b = randn(7, 5), randn(7, 5, seed=1)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    loss = fn.nt_xent_loss(torch.cat([a, b]), 0.3)
    torch.testing.assert_close(fn.nt_xent_loss(torch.cat([a[order], b[order]]), 0.3), loss)
    torch.testing.assert_close(fn.nt_xent_loss(torch.cat([b, a]), 0.3), loss)
    some = torch.cat([b[:3], a[3:]]), torch.cat([a[:3], b[3:]])  # of the first three images only
    torch.testing.assert_close(fn.nt_xent_loss(torch.cat(some), 0.3), loss)
    assert abs(fn.nt_xent_loss(torch.cat([a, b[order]]), 0.3) - loss) > 1e-3  # but on who belongs to whom


@pytest.mark.parametrize(("n", "d", "tau"), [(1, 3, 0.5), (3, 4, 0.5), (5, 2, 0.1), (4, 7, 10.0)])
def test_gradient_is_the_derivative(n, d, tau):
    assert torch.autograd.gradcheck(lambda z: fn.nt_xent_loss(z, tau), randn(2 * n, d).requires_grad_())


def gradient_of(z: torch.Tensor, tau: float = 0.5) -> torch.Tensor:
    z = z.detach().clone().requires_grad_()
    fn.nt_xent_loss(z, tau).backward()
    return z.grad


def whole_matrix_loss(z: torch.Tensor, tau: float) -> torch.Tensor:
    """Eq. 1 with the (2N, 2N) matrix in memory and torch's own derivative."""
    z = torch.nn.functional.normalize(z, dim=1)
    logits = (z @ z.T / tau).fill_diagonal_(-torch.inf)
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


@pytest.mark.parametrize("block", [1, 3, 7, 12, 13, 23, 24, 25, None])
@pytest.mark.parametrize("tau", [0.02, 0.5, 10.0])
def test_blocks_change_neither_loss_nor_gradient(block, tau):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        a, b = randn(24, 6, dtype=dtype).requires_grad_(), randn(24, 6, dtype=dtype).requires_grad_()
        loss, expected = fn.nt_xent_loss(a, tau, block), whole_matrix_loss(b, tau)
        torch.testing.assert_close(loss, expected, atol=tolerance, rtol=tolerance)
        (3 * loss).backward()
        (3 * expected).backward()
        torch.testing.assert_close(a.grad, b.grad, atol=tolerance / tau, rtol=tolerance)


@pytest.mark.parametrize("block", [1, 4, 5])
def test_gradient_of_blocks_is_the_derivative(block):
    assert torch.autograd.gradcheck(lambda z: fn.nt_xent_loss(z, 0.3, block), randn(10, 3).requires_grad_())


def test_a_large_batch_in_float32_is_rounded_no_worse_than_the_whole_matrix():
    z = randn(3000, 32)
    exact, ours, theirs = (
        z.to(dtype, copy=True).requires_grad_() for dtype in (torch.float64, torch.float32, torch.float32)
    )
    losses = whole_matrix_loss(exact, 0.1), fn.nt_xent_loss(ours, 0.1), whole_matrix_loss(theirs, 0.1)
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    error, usual = ((x.grad - exact.grad).norm() / exact.grad.norm() for x in (ours, theirs))
    assert error < max(1e-6, 2 * usual)


@pytest.mark.parametrize("two_n", [64, 256])
def test_no_tensor_is_larger_than_a_block_of_rows(two_n):
    class Largest(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    with Largest() as largest:
        fn.nt_xent_loss(randn(two_n, 4).requires_grad_(), 0.5, block=8).backward()
    assert largest.numel == 8 * two_n


@pytest.mark.parametrize("block", [0, -1])
def test_a_block_without_rows_is_refused(block):
    with pytest.raises(ValueError, match="block"):
        fn.nt_xent_loss(torch.ones(4, 2), 0.5, block)


def test_gradient_is_orthogonal_to_each_embedding():
    z = randn(16, 6)
    gradient = gradient_of(z)
    assert gradient.norm(dim=1).min() > 1e-4
    assert (gradient * z).sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_of_reduced_precision_is_computed_in_float32(dtype):
    z = randn(64, 32, dtype=dtype)
    loss = fn.nt_xent_loss(z, 0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(fn.nt_xent_loss(z.double(), 0.1).item(), rel=1e-5)
    assert gradient_of(z).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_autocast_changes_neither_loss_nor_gradient(dtype):
    z = randn(64, 32, dtype=dtype)
    inside, outside = z.clone().requires_grad_(), z.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = fn.nt_xent_loss(inside, 0.1)
    expected = fn.nt_xent_loss(outside, 0.1)
    assert loss.dtype == expected.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == expected.item()
    loss.backward()
    expected.backward()
    assert torch.equal(inside.grad, outside.grad)


@pytest.mark.parametrize("tau", [0.001, 0.01, 1000.0])
def test_extreme_temperatures_and_embeddings_stay_finite(tau):
    for z in (randn(20, 8), 300 * randn(20, 8, dtype=torch.float16), torch.zeros(20, 8)):
        assert fn.nt_xent_loss(z, tau).isfinite()
        assert gradient_of(z.float(), tau).isfinite().all()


def test_loss_leaves_its_input_alone():
    z = torch.nn.functional.normalize(randn(8, 4))
    before = z.clone()
    fn.nt_xent_loss(z, 0.5)
    assert torch.equal(z, before)


@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (0, 4), (4,), (), (2, 2, 2)])
def test_embeddings_that_are_no_pairs_are_refused(shape):
    with pytest.raises(ValueError, match="2N"):
        fn.nt_xent_loss(torch.ones(shape))


@pytest.mark.parametrize("tau", [0, -1, -math.inf, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(tau):
    with pytest.raises(ValueError, match="temperature"):
        fn.nt_xent_loss(torch.ones(4, 2), tau)


# ------------------------------------------------------------------------------------------------
# Memory that is kept
# ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts page faults of glibc's allocator")
def test_a_prepared_process_does_not_fetch_the_same_memory_again():
    """20 times 40 MiB are 200,000 pages of 4 KiB; a process that keeps its memory fetches them once.

    Below 32 MiB, glibc may keep a block by itself.
    """
    program = """
import resource, torch, functions as fn
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10): [torch.ones(10 * 2**20), torch.ones(10 * 2**20)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(); before = faults()
fn.prepare_device(fn.RunConfig(accelerator="cpu"))
faults(); print(before, faults())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE.parent, capture_output=True, text=True, check=True)
    unprepared, prepared = map(int, done.stdout.split())
    assert prepared < unprepared / 10


# ------------------------------------------------------------------------------------------------
# Training with Lightning
# ------------------------------------------------------------------------------------------------

CPU = Config("digits", accelerator="cpu", precision="fp32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_a_device_that_is_not_there_is_refused():
    assert "--accelerator cuda" in user_error(fn.resolve_device, "cuda")
    assert "--accelerator cuda" in user_error(parse, "--accelerator", "cuda")


@pytest.mark.parametrize(("cuda", "mps", "device"), [(1, 1, "cuda"), (1, 0, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_auto_takes_cuda_else_mps_else_the_cpu(cuda, mps, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert fn.resolve_device("auto") == device
    assert fn.resolve_device("cpu") == "cpu"


@pytest.mark.parametrize("device", ["cuda", "mps", "cpu"])
def test_a_given_precision_is_taken_everywhere(device):
    assert fn.resolve_precision("fp32", device) == "fp32"
    assert fn.resolve_precision("bf16", device) == "bf16"


def test_auto_precision_is_bfloat16_where_the_hardware_has_it(monkeypatch):
    assert fn.resolve_precision("auto", "mps") == "fp32"
    for fast, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda fast=fast: fast)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda fast=fast: (9, 0) if fast else (7, 5))
        assert fn.resolve_precision("auto", "cpu") == precision
        assert fn.resolve_precision("auto", "cuda") == precision


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
    fn.fit(fn.make_trainer(CPU, epochs, log=log), module)
    return module


def test_training_logs_one_row_per_epoch_and_writes_them(capsys):
    log = fn.EpochLog(Path("metrics.csv"))
    module = train_softmax(log)
    keys = ["epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "learning_rate"]
    assert [row["epoch"] for row in log.rows] == [1, 2, 3]
    assert all(sorted(row) == sorted([*keys, "images_per_second", "seconds"]) for row in log.rows)
    assert log.rows[-1]["train_loss"] < log.rows[0]["train_loss"]
    inputs, labels = module.evaluate_batches.tensors
    assert log.rows[-1]["validation_accuracy"] == pytest.approx(fn.accuracy(module(inputs).argmax(1), labels))
    loss = nn.functional.cross_entropy(module(inputs), labels).item()
    assert log.rows[-1]["validation_loss"] == pytest.approx(loss, rel=1e-5)
    with open("metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [{key: float(value) for key, value in row.items()} for row in rows] == log.rows
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == [f"epoch {i}/3" for i in (1, 2, 3)]


def test_an_epochs_row_is_the_mean_over_its_images_also_when_the_last_batch_is_smaller():
    """Three images in batches of two; the learning rate is 0."""
    x, y = randn(3, 5, dtype=torch.float32), torch.tensor([0, 1, 1])
    module = Softmax(nn.Linear(5, 2), fn.Batches(x, y, batch_size=2), fn.Batches(x, y, batch_size=2))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    fn.fit(fn.make_trainer(CPU, 1, log=(log := fn.EpochLog(quiet=True))), module)
    for split in ("train", "validation"):
        assert log.rows[0][f"{split}_loss"] == pytest.approx(nn.functional.cross_entropy(module(x), y).item(), rel=1e-5)
        assert log.rows[0][f"{split}_accuracy"] == pytest.approx(fn.accuracy(module(x).argmax(1), y))


def test_the_same_seed_trains_the_same_weights():
    one, two = (train_softmax(fn.EpochLog(quiet=True)).model.weight for _ in range(2))
    assert torch.equal(one, two)


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where():
    log = fn.EpochLog(Path("metrics.csv"), quiet=True)
    message = user_error(train_softmax, log, 3, math.inf)
    batches = fn.Batches(torch.arange(60), batch_size=16, seed=0)
    step = next(i for i, (batch,) in enumerate(batches, start=1) if 0 in batch)  # the one with the poisoned image
    for words in ("epoch 1", f"step {step}", "learning rate 0.1", "--learning_rate", "checkpoint"):
        assert words in message
    assert log.rows == []


def test_rows_travel_in_the_checkpoint():
    log, resumed = fn.EpochLog(), fn.EpochLog()
    log.rows = [{"epoch": 1, "train_loss": 0.5}, {"epoch": 2, "train_loss": 0.25, "knn_accuracy": 0.125}]
    fn.save_torch(Path("log.pt"), log.state_dict())
    resumed.load_state_dict(torch.load("log.pt", weights_only=True))
    assert resumed.rows == log.rows


def test_csv_has_every_column_and_blanks_for_what_a_row_lacks():
    fn.write_csv(Path("m.csv"), [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "knn": 0.25, "loss": 0.125}])
    assert Path("m.csv").read_bytes() == b"epoch,loss,knn\n1,0.5,\n2,0.125,0.25\n"


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


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


def small_model(images: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()]
    model = nn.Sequential(fn.Normalize(images), *layers)
    model(images)  # so that BatchNorm's statistics are no round numbers
    return model


@pytest.mark.parametrize("training", [True, False])
def test_extracting_features_leaves_the_model_as_it_was(training):
    images = skewed_images()
    model = small_model(images).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fn.extract_features(model, images, CPU)
    assert all(module.training is training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("batch_size", [1, 7, 40, 500])
def test_features_are_the_models_output_in_eval_mode_whatever_the_batch_size(batch_size):
    images = skewed_images()
    model = small_model(images)
    features = fn.extract_features(model, images, CPU, batch_size)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(features, model.eval()(images), atol=1e-5, rtol=1e-5)


def test_features_computed_in_bfloat16_come_as_float32():
    images = skewed_images()
    model = small_model(images)
    exact = fn.extract_features(model, images, CPU)
    reduced = fn.extract_features(model, images, Config(accelerator="cpu", precision="bf16"))
    assert reduced.dtype == torch.float32
    assert 0 < (reduced - exact).abs().max() < 0.1


def slow_knn(queries, bank, labels, num_classes: int, k: int, tau: float) -> list[int]:
    """Wu et al. 2018, section 3.4, with Python's loops."""
    predictions = []
    for query in queries.tolist():
        similarities = []
        for row in bank.tolist():
            length = math.hypot(*query) * math.hypot(*row)
            similarities.append(sum(map(float.__mul__, query, row)) / length)
        votes = [0.0] * num_classes
        for i in sorted(range(len(bank)), key=lambda i: -similarities[i])[:k]:
            votes[int(labels[i])] += math.exp(similarities[i] / tau)
        predictions.append(votes.index(max(votes)))
    return predictions


@pytest.mark.parametrize("k", [1, 2, 5, 20, 60, 1000])
@pytest.mark.parametrize("tau", [0.02, 0.1, 1.0])
def test_knn_is_the_weighted_vote_of_the_nearest(k, tau):
    queries, bank, labels = randn(30, 6, dtype=torch.float32), randn(60, 6, seed=1, dtype=torch.float32), randint(4, 60)
    predicted = fn.knn_predict(queries, bank, labels, 4, k, tau)
    assert predicted.dtype == torch.int64
    assert predicted.tolist() == slow_knn(queries, bank, labels, 4, k, tau)


def test_knn_weights_stay_finite_at_a_small_temperature():
    bank = torch.tensor([[1.0, 0.1], [1.0, 0.0]])  # exp(1 / 0.005) is more than float32 holds
    assert fn.knn_predict(torch.tensor([[1.0, 0.0]]), bank, torch.tensor([0, 1]), 2, 2, 0.005).tolist() == [1]


def test_knn_does_not_depend_on_the_block_or_on_lengths():
    queries, bank, labels = randn(50, 6, dtype=torch.float32), randn(60, 6, seed=1, dtype=torch.float32), randint(4, 60)
    whole = fn.knn_predict(queries, bank, labels, 4, 9)
    assert len(whole.unique()) > 1
    for block in (1, 7, 50, 51):
        assert torch.equal(fn.knn_predict(queries, bank, labels, 4, 9, block=block), whole)
    assert torch.equal(fn.knn_predict(3 * queries, bank * torch.arange(1, 61).view(-1, 1), labels, 4, 9), whole)


def test_one_neighbour_is_the_nearest_and_an_image_is_nearest_to_itself():
    bank, labels = randn(60, 6, dtype=torch.float32), randint(4, 60)
    assert torch.equal(fn.knn_predict(bank, bank, labels, 4, k=1), labels)


def test_knn_of_perfect_clusters_is_perfect():
    labels = torch.arange(100) % 5
    points = 10 * torch.eye(5)[labels] + 0.1 * randn(100, 5, dtype=torch.float32)
    predicted = fn.knn_predict(points[:40], points[40:], labels[40:], 5, k=10)
    assert fn.accuracy(predicted, labels[:40]) == 1.0


def test_accuracy_is_the_fraction_of_right_predictions():
    labels = torch.tensor([0, 1, 2, 2])
    assert fn.accuracy(labels, labels) == 1.0
    assert fn.accuracy(torch.tensor([0, 1, 2, 0]), labels) == 0.75
    assert fn.accuracy(torch.tensor([1, 0, 0, 0]), labels) == 0.0
    assert isinstance(fn.accuracy(labels, labels), float)


def test_accuracy_per_class_is_none_for_a_class_without_images():
    predictions, labels = torch.tensor([0, 1, 2, 0, 3]), torch.tensor([0, 0, 2, 2, 2])
    per_class = fn.accuracy_per_class(predictions, labels, ("a", "b", "c", "d"))
    assert per_class == {"a": 0.5, "b": None, "c": pytest.approx(1 / 3), "d": None}


def test_the_three_hardest_classes_are_named(capsys):
    fn.print_per_class({"a": 0.5, "b": None, "c": 0.25, "d": 1.0, "e": 0.75})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["d", "e", "a", "c"]
    assert lines[-1].strip() == "hardest classes: c 25.0 %, a 50.0 %, e 75.0 %"


# ------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------


def assert_figure(file: Path) -> None:
    """A PNG of some size that shows something."""
    with Image.open(file) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width > 300
        assert image.height > 300
        assert len(image.convert("RGB").getcolors(2**24)) > 20
    assert os.listdir() == [file.name]


def curve(epochs: int) -> list[dict[str, float]]:
    names = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
    return [{"epoch": i, **{name: 1 / (i + j) for j, name in enumerate(names)}} for i in range(1, epochs + 1)]


@pytest.mark.parametrize("runs", [{"probe": curve(1)}, {"rnn": curve(30), "lstm": curve(5), "gru": curve(30)}])
def test_curves_are_drawn(runs):
    fn.plot_curves(runs, "validation", Path("curves.png"), "Accuracy")
    assert_figure(Path("curves.png"))


@pytest.mark.parametrize("classes", [2, 10, 30])
def test_confusion_matrix_is_drawn_also_with_a_class_that_no_image_has(classes):
    predictions, labels = randint(classes, 200), randint(classes - 1, 200, seed=1)
    fn.plot_confusion_matrix(predictions, labels, [f"class {i}" for i in range(classes)], Path("c.png"), "Test images")
    assert_figure(Path("c.png"))


@pytest.mark.parametrize("classes", [2, 10, 30])
def test_scatter_of_points_is_drawn(classes):
    labels = randint(classes, 200)
    fn.plot_tsne(randn(200, 2).numpy(), labels, [f"class {i}" for i in range(classes)], Path("t.png"), "t-SNE")
    assert_figure(Path("t.png"))


# ------------------------------------------------------------------------------------------------
# What strangers found
# ------------------------------------------------------------------------------------------------


def test_class_names_of_any_kind_can_be_drawn(tmp_path):
    """Neither a formula nor a hidden legend entry, nor a warning about a missing glyph."""
    names = ["$^$", "_hidden", "猫"]
    labels = torch.arange(30) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fn.plot_confusion_matrix(labels, labels, names, tmp_path / "matrix.png", "t")
        fn.plot_tsne(np.random.default_rng(0).random((30, 2)), labels, names, tmp_path / "tsne.png", "t")


def test_a_dangling_link_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/link.png").symlink_to("nowhere.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "flat/a.png")
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as exit_:
        fn.command_line(lambda _: fn.load_dataset(str(tmp_path / "flat"), tmp_path), fn.RunConfig, None)
    error = capsys.readouterr().err
    assert (exit_.value.code, len(error.splitlines())) == (2, 1)
    assert "link.png" in error
