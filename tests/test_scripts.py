"""Each script, end to end, on tiny data, as a user runs it; and what it says when something is wrong."""

import contextlib
import csv
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch
import yaml
from PIL import Image
from torchvision.models import resnet18

import functions as fn
import rnn
import simCLR

COMMON = {
    "script",
    "dataset",
    "seed",
    "device",
    "precision",
    "threads",
    "versions",
    "git_commit",
    "git_dirty",
    "seconds",
}
FAST_SIMCLR = ["--image_size", 8, "--stem", "imagenet", "--batch_size", 32, "--knn_k", 5, "--probe_epochs", 3]


def is_png(file):
    with Image.open(file) as image:
        return image.format == "PNG" and min(image.size) > 200


@pytest.fixture(scope="module")
def simclr_run(image_folder, run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("simclr")
    done = run("simCLR.py", "--dataset", image_folder, "--epochs", 2, "--output_dir", "out", *FAST_SIMCLR, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out", done


def test_simclr_leaves_the_documented_run_folder(simclr_run):
    out, _ = simclr_run
    results = json.loads((out / "results.json").read_text())
    assert set(results) == COMMON | {"pretrain", "baselines", "knn", "probe"}
    wanted = {"epochs", "steps", "seconds", "pairs_per_second", "final_loss", "normalize"}
    assert set(results["pretrain"]) == wanted
    assert (results["pretrain"]["epochs"], results["pretrain"]["steps"]) == (2, 2 * (300 // 32))
    assert set(results["probe"]) == {"train_accuracy", "test_accuracy", "per_class"}
    assert set(results["probe"]["per_class"]) == {"red", "green", "blue"}
    assert results["knn"]["accuracy"] > 0.9, "colours are told apart by almost any features"
    for figure in ("views", "pretraining", "probe", "confusion_matrix", "tsne"):
        assert is_png(out / f"{figure}.png")
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"train_loss", "knn_accuracy", "learning_rate", "images_per_second"} <= set(rows[0])
    assert list((out / "checkpoints").glob("*.ckpt"))
    assert list(out.rglob("events.out.tfevents*"))
    assert not list(out.rglob("*.part"))


def test_simclr_prints_one_line_per_epoch_and_no_noise(simclr_run):
    _, done = simclr_run
    assert done.stderr == ""
    assert len(re.findall(r"^epoch \d/2  train loss [\d.]+  k-NN [\d.]+ %.*images/s", done.stdout, re.M)) == 2
    assert "hardest classes" in done.stdout
    assert re.search(r"pretrained encoder +[\d.]+ % +[\d.]+ %", done.stdout)
    for noise in ("Warning", "warn", "GPU available", "\r", "it/s"):
        assert noise not in done.stdout


def test_encoder_file_loads_into_torchvision(simclr_run):
    out, _ = simclr_run
    encoder = resnet18()
    encoder.fc = torch.nn.Identity()
    encoder.load_state_dict(torch.load(out / "encoder.pt", weights_only=True))
    ours, _ = simCLR.build_encoder("resnet18", "imagenet")
    simCLR.load_encoder(ours, out / "encoder.pt")
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(encoder.eval()(x), ours.eval()(x))


@pytest.mark.parametrize("file", ["encoder.pt", pytest.param("checkpoints/last.ckpt", marks=pytest.mark.slow)])
def test_later_stages_repeat_from_a_checkpoint(simclr_run, image_folder, run, tmp_path, file):
    """The k-NN accuracy of a saved encoder is the one that its own run reported."""
    out, _ = simclr_run
    flags = ["--stages", "knn", "--checkpoint", out / file, "--baselines", "false", "--output_dir", "again"]
    done = run("simCLR.py", "--dataset", image_folder, *flags, *FAST_SIMCLR, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, again = (json.loads((f / "results.json").read_text()) for f in (out, tmp_path / "again"))
    assert again["knn"] == first["knn"]
    assert not {"pretrain", "probe", "baselines"} & set(again)


@pytest.mark.slow
def test_config_of_a_run_repeats_it(simclr_run, run, tmp_path):
    out, _ = simclr_run
    done = run("simCLR.py", "--config", out / "config.yaml", "--output_dir", "again", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, again = (json.loads((f / "results.json").read_text()) for f in (out, tmp_path / "again"))
    for stage in ("knn", "probe", "baselines"):
        assert again[stage] == first[stage]
    assert again["pretrain"]["final_loss"] == first["pretrain"]["final_loss"]


def test_finished_run_can_be_resumed_without_harm(simclr_run, run):
    out, _ = simclr_run
    before = (out / "metrics.csv").read_text(), (out / "encoder.pt").read_bytes()
    done = run("simCLR.py", "--resume", out, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    assert before == ((out / "metrics.csv").read_text(), (out / "encoder.pt").read_bytes())


def test_simclr_on_a_flat_folder_without_classes(image_folder, run, tmp_path):
    flags = ["--stages", "pretrain", "--epochs", 1, "--output_dir", "out"]
    done = run("simCLR.py", "--dataset", image_folder / "train" / "red", *flags, *FAST_SIMCLR, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "encoder.pt").is_file()
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())) == COMMON | {"pretrain"}


def test_rnn_all_cells(image_folder, run, tmp_path):
    flags = ["--cell", "all", "--epochs", 2, "--image_size", 8, "--batch_size", 16, "--learning_rate", 0.01]
    done = run("rnn.py", "--dataset", image_folder, *flags, "--output_dir", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert set(results) == COMMON | {"cells"}
    assert list(results["cells"]) == ["rnn", "lstm", "gru"]
    for cell, outcome in results["cells"].items():
        wanted = {"best_epoch", "validation_accuracy", "test_accuracy", "per_class", "seconds", "images_per_second"}
        assert wanted <= set(outcome)
        assert set(outcome["per_class"]) == {"red", "green", "blue"}
        assert is_png(out / cell / "confusion_matrix.png")
        assert len(list(csv.DictReader((out / cell / "metrics.csv").open()))) == 2
        assert f"training {cell}" in done.stdout
    assert is_png(out / "curves.png")
    assert done.stdout.count("hardest classes") == 3
    assert len(re.findall(r"^epoch \d/2 ", done.stdout, re.M)) == 6


def test_tuner_finds_a_configuration_that_rnn_trains(image_folder, run, tmp_path):
    flags = ["--n_trials", 3, "--epochs", 1, "--image_size", 8, "--output_dir", "study"]
    done = run("rnn_hyperparameter_tune.py", "--dataset", image_folder, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    out = tmp_path / "study"
    results = json.loads((out / "results.json").read_text())
    assert set(results) == COMMON | {"study", "best_config"}
    assert {"trials", "pruned", "failed", "best_value", "best_params"} == set(results["study"])
    assert results["study"]["trials"] == 3
    assert is_png(out / "history.png")
    assert len(re.findall(r"^trial \d/3 ", done.stdout, re.M)) == 3
    best = yaml.safe_load((out / "best_config.yaml").read_text())
    assert results["study"]["best_params"].items() <= best.items()
    done = run("rnn.py", "--config", results["best_config"], "--epochs", 1, "--output_dir", "refit", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_ctrl_c_says_how_to_resume_and_the_resumed_run_ends_the_same(image_folder, run, tmp_path):
    """Interrupted after its first epochs, a run goes on to the very numbers of one that never stopped."""
    flags = ["--dataset", image_folder, "--epochs", 15, "--image_size", 8, "--batch_size", 16, "--seed", 7]
    whole = run("rnn.py", *flags, "--output_dir", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, fn.__file__.replace("functions.py", "rnn.py"), *map(str, flags), "--output_dir", "parts"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # other threads would round differently
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)
    deadline = time.monotonic() + 120
    while not (tmp_path / "parts/checkpoints/last.ckpt").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error.strip() == "rnn.py: interrupted; continue with: python rnn.py --resume parts"
    done = len(list(csv.DictReader((tmp_path / "parts/metrics.csv").open())))
    resumed = run("rnn.py", "--resume", "parts", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"epoch {done + 1:>2}/15" in resumed.stdout
    assert f"epoch {done - 1:>2}/15" not in resumed.stdout
    metrics = []
    for name in ("whole", "parts"):
        rows = list(csv.DictReader((tmp_path / name / "metrics.csv").open()))
        metrics.append([{k: v for k, v in row.items() if "second" not in k} for row in rows])
    assert len(metrics[0]) == 15
    assert metrics[0] == metrics[1]


def test_simclr_goes_on_after_its_last_finished_epoch(image_folder, run, tmp_path):
    flags = ["--dataset", image_folder, "--stages", "pretrain", "--epochs", 4, "--output_dir", "out", *FAST_SIMCLR]
    command = [sys.executable, fn.__file__.replace("functions.py", "simCLR.py"), *map(str, flags)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 2/4"):
            process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = run("simCLR.py", "--resume", "out", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "epoch 1/4" not in resumed.stdout
    assert "epoch 4/4" in resumed.stdout
    rows = list(csv.DictReader((tmp_path / "out/metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(image_folder, run, tmp_path):
    flags = ["--dataset", image_folder, "--image_size", 8, "--batch_size", 16, "--epochs", 3, "--output_dir", "out"]
    assert run("rnn.py", *flags, cwd=tmp_path).returncode == 0
    rows = (tmp_path / "out/metrics.csv").read_text().splitlines()
    checkpoints = tmp_path / "out/checkpoints"
    (checkpoints / "last.ckpt").write_bytes((checkpoints / "last.ckpt").read_bytes()[:1000])
    resumed = run("rnn.py", "--resume", "out", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.splitlines() == ["warning: out/checkpoints/last.ckpt is damaged"]
    assert "epoch 3/3" in resumed.stdout
    assert "epoch 2/3" not in resumed.stdout
    again = (tmp_path / "out/metrics.csv").read_text().splitlines()
    assert [line.split(",")[:6] for line in again] == [line.split(",")[:6] for line in rows]
    for file in checkpoints.iterdir():
        file.write_bytes(b"damaged")
    resumed = run("rnn.py", "--resume", "out", cwd=tmp_path)
    assert resumed.returncode == 2
    assert "every checkpoint in out/checkpoints is damaged" in resumed.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_run_that_diverges_ends_in_one_line(image_folder, run, tmp_path):
    flags = ["--image_size", 8, "--batch_size", 16, "--learning_rate", 1e30, "--epochs", 3, "--output_dir", "out"]
    done = run("rnn.py", "--dataset", image_folder, *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "not finite" in done.stderr


def test_on_a_terminal_there_is_a_progress_bar_with_time_to_go(image_folder, tmp_path):
    """Under a pseudo-terminal: a bar with the time left, and the epoch lines above it."""
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (40, 120))
    flags = ["--dataset", str(image_folder), "--image_size", "8", "--epochs", "3", "--output_dir", "out"]
    command = [sys.executable, fn.__file__.replace("functions.py", "rnn.py"), *flags]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=there, stderr=there, stdin=there)
    os.close(there)
    screen = b""
    with contextlib.suppress(OSError):  # Linux's way of saying that the other end is closed
        while block := os.read(here, 4096):
            screen += block
    os.close(here)
    assert process.wait() == 0, screen
    text = screen.decode()
    assert re.search(r"epoch 2/3: +\d+%\|.*<\d\d:\d\d", text)
    assert len(re.findall(r"epoch \d/3  train loss", text)) == 3


def png(file, color="red", size=(8, 8)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(file)


def make_bad_folders(root):
    """Folders with one thing wrong each."""
    (root / "empty").mkdir()
    (root / "afile").write_text("not a folder")
    for name in "abcdef":
        png(root / "oneclass/train/only" / f"{name}.png")
        png(root / "oneclass/test/only" / f"{name}.png")
        png(root / "newclass/train/x" / f"{name}.png")
        png(root / "newclass/train/y" / f"{name}.png")
        png(root / "newclass/test/z" / f"{name}.png")
        png(root / "broken/train/x" / f"{name}.png")
        png(root / "few/train/x" / f"{name}.png")
        png(root / "few/train/y" / f"{name}.png")
        png(root / "few/test/x" / f"{name}.png")
    (root / "broken/train/x/text.png").write_text("no image")
    (root / "notest/train").mkdir(parents=True)
    png(root / "notest/train/x/1.png")
    png(root / "notest/train/y/1.png")
    (root / "full").mkdir()
    (root / "full/notes.txt").write_text("mine")
    (root / "unknown.yaml").write_text("epochs: 3\nbatchsize: 4\n")
    (root / "damaged.yaml").write_text("epochs: [")
    (root / "code.yaml").write_text("seed: !!python/object/apply:os.system ['touch hacked']")
    (root / "text.pt").write_text("no checkpoint")
    torch.save(simCLR.build_encoder("resnet18", "imagenet")[0].state_dict(), root / "other.pt")


DIGITS = ["--dataset", "digits"]
BAD = [
    # script, flags, what the line must name
    ("simCLR.py", ["--dataset", "mnist"], "--dataset mnist"),
    ("simCLR.py", ["--dataset", "empty"], "--dataset empty"),
    ("simCLR.py", ["--dataset", "oneclass"], "one class"),
    ("simCLR.py", ["--dataset", "newclass"], "lacks: z"),
    ("simCLR.py", ["--dataset", "broken"], "text.png"),
    ("simCLR.py", ["--dataset", "notest", "--batch_size", "2"], "no test images"),
    ("rnn.py", ["--dataset", "notest", "--batch_size", "2"], "no test images"),
    ("rnn_hyperparameter_tune.py", ["--dataset", "oneclass"], "one class"),
    ("rnn_hyperparameter_tune.py", ["--dataset", "few"], "batch size 256"),
    ("simCLR.py", [*DIGITS, "--batch_size", "5000"], "--batch_size 5000"),
    ("rnn.py", [*DIGITS, "--batch_size", "5000"], "--batch_size 5000"),
    ("simCLR.py", [*DIGITS, "--checkpoint", "nowhere.pt", "--stages", "knn"], "nowhere.pt"),
    ("simCLR.py", [*DIGITS, "--checkpoint", "text.pt", "--stages", "knn"], "text.pt"),
    ("simCLR.py", [*DIGITS, "--checkpoint", "other.pt", "--stages", "knn"], "other.pt is of another encoder"),
    ("simCLR.py", [*DIGITS, "--output_dir", "full"], "--output_dir full is not empty"),
    ("rnn.py", [*DIGITS, "--output_dir", "afile/x"], "--output_dir afile/x"),
    ("rnn_hyperparameter_tune.py", [*DIGITS, "--storage", "nonsense://x"], "--storage nonsense://x"),
    ("rnn.py", ["--resume"], "--resume"),
    ("rnn.py", ["--resume", "empty"], "--resume empty"),
]


@pytest.fixture(scope="module")
def bad_place(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    make_bad_folders(root)
    return root


@pytest.mark.parametrize(("script", "flags", "culprit"), BAD)
def test_bad_input_is_one_line_and_changes_nothing(script, flags, culprit, bad_place, capsys, monkeypatch):
    """Run in this process, for speed: main() as the script calls it."""
    monkeypatch.chdir(bad_place)
    module = {"simCLR.py": simCLR, "rnn.py": rnn}.get(script) or __import__("rnn_hyperparameter_tune")
    monkeypatch.setattr(sys, "argv", [script, *flags])
    before = {path: path.read_bytes() for path in bad_place.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as exit_:
        fn.command_line(module.main, module.Config, module.__doc__)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert len(error.splitlines()) == 1, error
    assert culprit in error
    assert before.items() <= {path: path.read_bytes() for path in bad_place.rglob("*") if path.is_file()}.items()


BAD_FLAGS = [
    (["--epochs", "0"], "--epochs"),
    (["--epochs", "many"], "--epochs"),
    (["--epochs", "1.5"], "--epochs"),
    (["--temperature", "nan"], "--temperature"),
    (["--temperature", ".nan"], "--temperature"),
    (["--temperature", "0"], "--temperature"),
    (["--learning_rate", "-1"], "--learning_rate"),
    (["--learning_rate", ".inf"], "--learning_rate"),
    (["--batch_size", "1"], "--batch_size"),
    (["--encoder", "vgg"], "--encoder"),
    (["--stem", "round"], "--stem"),
    (["--stages", "pretrain,dream"], "'dream'"),
    (["--stages", "knn"], "--checkpoint"),
    (["--lerning_rate", "1"], "--lerning_rate"),
    (["--epoch", "3"], "--epoch"),
    (["--seed", "-1"], "--seed"),
    (["--config", "nowhere.yaml"], "nowhere.yaml"),
    (["--config", "unknown.yaml"], "batchsize"),
    (["--config", "damaged.yaml"], "config"),
    (["--config", "code.yaml"], "config"),
]


@pytest.mark.parametrize(("flags", "culprit"), BAD_FLAGS)
def test_bad_flag_is_one_line_that_names_it(flags, culprit, bad_place, monkeypatch):
    monkeypatch.chdir(bad_place)
    with pytest.raises(fn.UserError) as error:
        fn.parse_config(simCLR.Config, flags)
    assert culprit in str(error.value)
    assert "\n" not in str(error.value)
    assert not (bad_place / "hacked").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_cuda_where_there_is_none(run, tmp_path):
    """As a real process: exit status, one line on stderr, no traceback, nothing written."""
    done = run("rnn.py", "--dataset", "digits", "--accelerator", "cuda", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--accelerator cuda" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_unknown_cell(run, tmp_path):
    done = run("rnn.py", "--cell", "qrnn", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "--cell" in done.stderr
    assert "lstm" in done.stderr


@pytest.mark.slow
def test_the_demo_beats_the_untrained_encoder(run, tmp_path):
    """What `make demo` runs: pretraining without labels must help where labels are few."""
    root = fn.Path(fn.__file__).parent
    done = run("simCLR.py", "--config", root / "configs/digits.yaml", "--output_dir", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    untrained = results["baselines"]["untrained_encoder"]
    assert results["knn"]["accuracy"] > untrained["knn"]["accuracy"] + 0.02
    assert results["probe"]["test_accuracy"] > untrained["probe"]["test_accuracy"] + 0.05
