"""Each script from end to end, on tiny data, as a user runs it."""

import contextlib
import csv
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import termios
import unicodedata
from statistics import mean

import pytest
import torch
import yaml
from helpers import NARROW
from PIL import Image
from torchvision.models import resnet18

import functions as fn
import simCLR
from contrastive.pretrained import load_encoder

COMMON = {
    *("script", "dataset", "data", "seed", "device", "processor"),
    *("precision", "threads", "versions", "git_commit", "git_dirty", "seconds"),
}
FAST_SIMCLR = ["--image_size", 8, "--batch_size", 32, "--knn_k", 5, "--probe_epochs", 3]


def is_png(file):
    with Image.open(file) as image:
        return image.format == "PNG" and min(image.size) > 200


@pytest.fixture(scope="module")
def simclr_run(image_folder, run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("simclr")
    flags = ["--dataset", image_folder, "--epochs", 2, "--output_dir", "out", *FAST_SIMCLR]
    flags += ["--stem", "imagenet"]  # so that torchvision's own ResNet-18 can load the encoder
    done = run("simCLR.py", *flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out", done


def test_simclr_leaves_the_documented_run_folder(simclr_run):
    out, _ = simclr_run
    results = json.loads((out / "results.json").read_text())
    assert set(results) == COMMON | {"pretrain", "shown", "baselines", "knn", "probe"}

    wanted = {"epochs", "steps", "seconds", "pairs_per_second", "final_loss", "normalize"}
    wanted |= {"views", "images_seen", "macs_per_image", "macs"}
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
    line = r"^epoch \d/2  train loss [\d.]+  contrastive [\d.]+ %  k-NN [\d.]+ %  rank z.*images/s"
    assert len(re.findall(line, done.stdout, re.M)) == 2
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
    load_encoder(ours, out / "encoder.pt")
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(encoder.eval()(x), ours.eval()(x))


@pytest.mark.parametrize(
    "file", ["encoder.pt", pytest.param("checkpoints/last.ckpt", marks=pytest.mark.slow)]
)
def test_later_stages_repeat_from_a_checkpoint(simclr_run, image_folder, run_here, tmp_path, file):
    """The k-NN accuracy of a saved encoder is the one that its own run reported."""
    out, _ = simclr_run
    flags = ["--stages", "knn", "--checkpoint", out / file]
    flags += ["--baselines", "false", "--output_dir", "again", "--stem", "imagenet"]
    done = run_here("simCLR.py", "--dataset", image_folder, *flags, *FAST_SIMCLR, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, again = (json.loads((f / "results.json").read_text()) for f in (out, tmp_path / "again"))
    assert again["knn"] == first["knn"]
    assert not {"pretrain", "probe", "baselines"} & set(again)


def test_a_measurement_goes_on_with_the_encoder_that_it_began_with(
    simclr_run, image_folder, run_here, tmp_path
):
    encoder = tmp_path / "encoder.pt"
    encoder.write_bytes((simclr_run[0] / "encoder.pt").read_bytes())
    flags = ["--dataset", image_folder, "--stem", "imagenet", "--stages", "knn", "--no-baselines"]
    flags += ["--checkpoint", encoder, "--knn_k", 5, "--output_dir", "out"]
    done = run_here("simCLR.py", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "out/.unfinished").touch()  # as if it had been interrupted
    assert run_here("simCLR.py", "--resume", "out", cwd=tmp_path).returncode == 0

    state = torch.load(encoder, weights_only=True)
    torch.save({name: 2 * value for name, value in state.items()}, encoder)
    (tmp_path / "out/.unfinished").touch()
    done = run_here("simCLR.py", "--resume", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r".*--checkpoint \S+ is not what it was .*\n", done.stderr)


@pytest.fixture
def measured(monkeypatch, run_here, tmp_path):
    """measured(flags) -> (what simCLR.py would measure with, what it printed), on digits."""
    found = {}

    def evaluate(*, normalize, settings, **_):
        found.update(normalize=normalize, config=settings)
        raise fn.UserError("enough")

    def with_flags(*flags):
        monkeypatch.setattr(simCLR, "evaluate", evaluate)
        words = ["--dataset", "digits", "--stages", "knn", "--checkpoint"]
        done = run_here("simCLR.py", *words, *flags, cwd=tmp_path)
        assert done.stderr == "simCLR.py: error: enough\n"
        return found["normalize"], found["config"], done.stdout

    return with_flags


def statistics(run):
    return json.loads((run / "results.json").read_text())["pretrain"]["normalize"]


@pytest.mark.parametrize("file", [".", "encoder.pt", "checkpoints/last.ckpt"])
@pytest.mark.parametrize("results", ["there", "gone", "of another kind"])
def test_an_encoder_sees_other_images_as_it_saw_its_own(
    file, results, simclr_run, measured, tmp_path
):
    """Its architecture, too, is its run's: there, the stem was torchvision's."""
    shutil.copytree(simclr_run[0], tmp_path / "run")
    if results == "gone":
        (tmp_path / "run/results.json").unlink()
    if results == "of another kind":
        (tmp_path / "run/results.json").write_text('{"pretrain": null}')
    normalize, config, said = measured(tmp_path / "run" / file)
    assert config.stem == "imagenet"
    expected = statistics(simclr_run[0])
    assert normalize.mean.flatten().tolist() == expected["mean"]
    assert normalize.std.flatten().tolist() == expected["std"]
    assert "there is no" not in said


def test_an_encoder_without_its_run_is_taken_for_what_the_flags_say(simclr_run, measured, tmp_path):
    shutil.copyfile(simclr_run[0] / "encoder.pt", tmp_path / "mine.pt")
    normalize, _, said = measured("mine.pt", "--stem", "imagenet")
    digits = fn.Normalize(fn.load_dataset("digits").train_images)
    assert torch.equal(normalize.mean, digits.mean)
    assert "no config.yaml beside mine.pt" in said
    assert "--encoder resnet18, --stem imagenet, --norm batch" in said
    assert "no record of how mine.pt saw its images: by this set's own statistics" in said


@pytest.mark.parametrize(
    "flags", [["--encoder", "resnet34"], ["--norm", "group"], ["--jitter", "0.1"]]
)
def test_flags_that_contradict_the_encoders_run_are_refused(flags, simclr_run, run_here, tmp_path):
    words = ["--dataset", "digits", "--stages", "knn", "--checkpoint", simclr_run[0]]
    done = run_here("simCLR.py", *words, *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert " ".join(flags) in done.stderr
    assert "leave it out" in done.stderr


@pytest.mark.slow
def test_config_of_a_run_repeats_it(simclr_run, run, tmp_path):
    out, _ = simclr_run
    done = run("simCLR.py", "--config", out / "config.yaml", "--output_dir", "again", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, again = (json.loads((f / "results.json").read_text()) for f in (out, tmp_path / "again"))
    for stage in ("knn", "probe", "baselines"):
        assert again[stage] == first[stage]
    assert again["pretrain"]["final_loss"] == first["pretrain"]["final_loss"]


def test_simclr_on_a_flat_folder_without_classes(image_folder, run_here, tmp_path):
    flags = ["--dataset", image_folder / "train" / "red", *FAST_SIMCLR, *NARROW]
    flags += ["--stages", "pretrain", "--epochs", 1, "--output_dir", "out"]
    done = run_here("simCLR.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "encoder.pt").is_file()
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())) == COMMON | {"pretrain"}


def test_rnn_all_cells(image_folder, run, tmp_path):
    flags = ["--cell", "all", "--epochs", 2, "--image_size", 8, "--batch_size", 16]
    flags += ["--learning_rate", 0.01, "--output_dir", "out"]
    done = run("rnn.py", "--dataset", image_folder, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""

    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert set(results) == COMMON | {"cells"}
    assert list(results["cells"]) == ["rnn", "lstm", "gru"]

    wanted = {"best_epoch", "validation_accuracy", "test_accuracy", "per_class"}
    wanted |= {"seconds", "images_per_second"}
    for cell, outcome in results["cells"].items():
        assert wanted <= set(outcome)
        assert set(outcome["per_class"]) == {"red", "green", "blue"}
        assert len(outcome["accuracy_by_rows"]) == len(outcome["gradient_by_row"]) == 8
        assert outcome["accuracy_by_rows"][-1] == outcome["test_accuracy"]
        assert is_png(out / cell / "confusion_matrix.png")
        assert len(list(csv.DictReader((out / cell / "metrics.csv").open()))) == 2
        assert f"training {cell}" in done.stdout

    assert is_png(out / "curves.png")
    assert is_png(out / "rows.png")
    assert done.stdout.count("hardest classes") == 3
    assert len(re.findall(r"^epoch \d/2 ", done.stdout, re.M)) == 6


def test_tuner_finds_a_configuration_that_rnn_trains(image_folder, run_here, tmp_path):
    flags = ["--n_trials", 3, "--epochs", 1, "--image_size", 8, "--output_dir", "study"]
    done = run_here("rnn_hyperparameter_tune.py", "--dataset", image_folder, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""

    out = tmp_path / "study"
    results = json.loads((out / "results.json").read_text())
    assert set(results) == COMMON | {"study", "best_config"}

    spent = {"epochs", "epochs_saved", "seconds", "seconds_saved"}
    outcome = {"trials", "pruned", "failed", "workers", "best_value", "best_params", "best_trials"}
    assert outcome | spent == set(results["study"])
    assert results["study"]["trials"] == 3
    assert is_png(out / "history.png")
    assert len(re.findall(r"^trial \d/3 ", done.stdout, re.M)) == 3

    best = yaml.safe_load((out / "best_config.yaml").read_text())
    assert results["study"]["best_params"].items() <= best.items()
    flags = ["--config", results["best_config"], "--epochs", 1, "--output_dir", "refit"]
    done = run_here("rnn.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_run_that_diverges_ends_in_one_line(image_folder, run, tmp_path):
    flags = ["--image_size", 8, "--batch_size", 16, "--learning_rate", 1e30]
    flags += ["--epochs", 3, "--output_dir", "out"]
    done = run("rnn.py", "--dataset", image_folder, *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "not finite" in done.stderr


@pytest.mark.slow
def test_on_a_terminal_there_is_a_progress_bar_with_time_to_go(image_folder, tmp_path):
    """Under a pseudo-terminal: a bar with the time left, and the epoch lines above it."""
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (40, 120))
    flags = ["--dataset", str(image_folder), "--image_size", "8"]
    flags += ["--epochs", "3", "--output_dir", "out"]
    command = [sys.executable, fn.__file__.replace("functions.py", "rnn.py"), *flags]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=there, stderr=there, stdin=there)
    os.close(there)

    screen = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while block := os.read(here, 4096):
            screen += block
    os.close(here)
    assert process.wait() == 0, screen

    text = screen.decode()
    assert re.search(r"epoch 2/3: +\d+%\|.*<\d\d:\d\d", text)
    assert len(re.findall(r"epoch \d/3  train loss", text)) == 3


@pytest.mark.parametrize("script", ["simCLR.py", "rnn.py", "rnn_hyperparameter_tune.py"])
def test_numbers_are_saved_before_any_figure_and_a_failing_one_costs_a_line(
    script, image_folder, run_here, tmp_path, monkeypatch
):
    """All but simCLR.py's views, which are drawn while its pretraining has yet to begin."""
    seen = []

    def fail(figure, file):
        seen.append((file.name, (tmp_path / "out/results.json").is_file()))
        raise ValueError("a font\nis missing")

    monkeypatch.setattr(fn, "save_figure", fail)
    flags = ["--dataset", image_folder, "--epochs", 1, "--image_size", 8, "--output_dir", "out"]
    flags += ["--n_trials", 4] if "tune" in script else []
    flags += [*FAST_SIMCLR, *NARROW] if script == "simCLR.py" else []
    done = run_here(script, *flags, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(seen) >= 1
    assert all("note: " in line and "(a font is missing)" in line for line in lines)
    assert {name for name, saved in seen if not saved} <= {"views.png"}
    assert json.loads((tmp_path / "out/results.json").read_text())


# ------------------------------------------------------------------------------------------------
# Names and outputs that are hard to take
# ------------------------------------------------------------------------------------------------

AWKWARD = ["蜜蜂", os.fsdecode(b"caf\xe9"), "x" * 180, "two\nlines", "$x_1$", "_hidden", "a\u0301"]


@pytest.fixture
def awkward(tmp_path):
    """A folder of images with a line's end in its name, and classes that are hard to write."""
    folder = tmp_path / "photos of\nme"
    for split, count in (("train", 6), ("test", 2)):
        for c, name in enumerate(AWKWARD):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (30 * c, 250 - 9 * i, 0)).save(
                    folder / split / name / f"{i}.png"
                )
    return folder


def script_in_a_shell(how, *flags, cwd):
    """Run `python rnn.py flags` with something wrong about its output. -> CompletedProcess."""
    words = shlex.join(
        [sys.executable, str(fn.Path(fn.__file__).parent / "rnn.py"), *map(str, flags)]
    )
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    command = f"set -o pipefail; {words} {how}"
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, timeout=300
    )


SHELL = ["", ">&-", "2>&-", ">&- 2>&-", "| head -1", "> /dev/full"]


@pytest.mark.slow
@pytest.mark.parametrize("how", SHELL)
def test_nothing_that_becomes_of_the_output_ends_a_run(how, awkward, tmp_path):
    flags = ["--dataset", awkward, "--image_size", 8, "--batch_size", 8]
    flags += ["--epochs", 1, "--output_dir", "out"]
    done = script_in_a_shell(how, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text("utf-8"))
    names = {unicodedata.normalize("NFC", name) for name in AWKWARD}
    assert set(results["cells"]["rnn"]["per_class"]) == names
    assert b"Traceback" not in done.stderr
    lost = how in ("| head -1", "> /dev/full")
    assert len(done.stderr.splitlines()) == lost

    if how == "| head -1":
        done = script_in_a_shell(how, "--resume", "out", "--epochs", 2, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def test_hard_names_are_short_in_tables_and_figures(awkward, run_here, tmp_path):
    flags = ["--dataset", awkward, "--epochs", 1, *NARROW, "--image_size", 8]
    flags += ["--batch_size", 8, "--knn_k", 3, "--probe", "lbfgs", "--no-baselines"]
    done = run_here("simCLR.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "x" * 15 + "…" + "x" * 8 in done.stdout
    assert "x" * 30 not in done.stdout.partition("linear probe: train")[2]
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"simCLR-photos-of-me-[\d-]+", folder.name)
    for name in ("confusion_matrix.png", "tsne.png"):
        with Image.open(folder / name) as image:
            assert max(image.size) < 1500


@pytest.mark.parametrize("copies", [1, pytest.param(16, marks=pytest.mark.slow)])
def test_images_that_are_all_the_same_have_no_tsne(copies, run, tmp_path):
    """scikit-learn's search would end the whole process, by a segmentation fault."""
    for split, count in (("train", 8), ("test", 2 * copies)):
        for c, colour in (("a", "black"), ("b", "black" if split == "test" else "white")):
            (tmp_path / split / c).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), colour).save(tmp_path / split / c / f"{i}.png")
    flags = ["--dataset", ".", "--epochs", 1, "--output_dir", "out", "--no-baselines"]
    flags += [*NARROW, "--image_size", 8, "--batch_size", 8, "--knn_k", 3, "--probe", "lbfgs"]
    done = run("simCLR.py", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no t-SNE: it needs four different test images or more, and there are 1" in done.stdout
    assert "knn" in json.loads((tmp_path / "out/results.json").read_text())


@pytest.mark.slow
def test_the_demo_beats_raw_pixels_and_the_untrained_encoder(run, tmp_path):
    """What `make demo` runs: with one or two labels per class, pretraining pays."""
    config = fn.Path(fn.__file__).parent / "configs/digits.yaml"
    done = run("simCLR.py", "--config", config, "--output_dir", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    results = json.loads((tmp_path / "out/results.json").read_text())
    for baseline in results["baselines"].values():
        for i, count in enumerate((1, 2)):
            ours, theirs = results["few_labels"][i], baseline["few_labels"][i]
            assert ours["labels_per_class"] == theirs["labels_per_class"] == count
            for method in ("knn_accuracies", "probe_accuracies"):
                assert mean(ours[method]) > mean(theirs[method]) + 0.05


def test_the_figure_of_views_shows_what_the_first_step_sees(monkeypatch, tmp_path):
    """As many views, of crops as small."""
    seen = []
    monkeypatch.setattr(simCLR.figures, "plot_views", lambda *a: seen.append(a))
    images = fn.load_dataset("digits").train_images
    config = simCLR.Config(dataset="digits", views=3, crop_size="4:0.5,8:1", flip=0.0)
    simCLR.show_views(images, config, tmp_path / "views.png", count=5)
    ((chosen, views, _),) = seen
    assert chosen.shape == (5, 3, 8, 8)
    assert views.shape == (15, 3, 4, 4)
    monkeypatch.undo()
    simCLR.figures.plot_views(chosen, views, tmp_path / "views.png")
    assert (tmp_path / "views.png").is_file()
