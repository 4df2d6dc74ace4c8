"""No run is lost: killed at any moment and resumed, it ends with the bits of one never stopped."""

import csv
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Code
from helpers import NARROW
from processes import ROOT, finish, output, start

import functions as fn
from machinery import checkpoints, files, training, trials

SHORT = {
    "simCLR.py": [
        *["--epochs", 12, "--image_size", 8, *NARROW, "--batch_size", 64],
        *["--accelerator", "cpu", "--precision", "fp32", "--checkpoint_every", 0],
        *["--knn_k", 5, "--probe_epochs", 3, "--baselines", "false"],
        *["--stages", "pretrain,knn,probe,finetune,tsne", "--finetune_epochs", 3],
        *["--finetune_steps", 1, "--finetune_batch_size", 64],
    ],
    "rnn.py": [
        *["--epochs", 12, "--image_size", 8, "--batch_size", 8],
        *["--cell", "all", "--learning_rate", 0.01, "--checkpoint_every", 0],
    ],
    "rnn_hyperparameter_tune.py": ["--epochs", 2, "--image_size", 8, "--n_trials", 13],
}
OF_TIME = ("second", "session", "git", "best_config")  # of two runs of one configuration


def timeless(value):
    """A structure without its times; tensors as their bytes, so that == compares bits."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        kept = [key for key in value if not any(word in str(key) for word in OF_TIME)]
        return {key: timeless(value[key]) for key in kept}
    return [timeless(v) for v in value] if isinstance(value, (list, tuple)) else value


def bits(folder):
    """All that a run leaves except times and figures: numbers, weights, optimizer state, trials."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix in (".pt", ".ckpt") and not file.name.startswith("previous"):
            found[name] = timeless(torch.load(file, weights_only=True))
        elif file.suffix == ".json":
            found[name] = timeless(json.loads(file.read_text()))
        elif file.suffix == ".csv":
            found[name] = timeless(list(csv.DictReader(file.open())))
        elif file.suffix == ".yaml":
            found[name] = file.read_text()
        elif file.suffix == ".db":
            found[name] = study_bits(f"sqlite:///{file}")
    return found


def study_bits(url):
    import optuna

    study = optuna.load_study(storage=url, study_name="rnn")
    return [(t.state.name, t.params, t.value, t.intermediate_values) for t in trials.counted(study)]


def assert_same_bits(folder, reference):
    ours, theirs = bits(folder), bits(reference)
    assert set(ours) == set(theirs)
    for name in theirs:
        assert ours[name] == theirs[name], name


@pytest.fixture(scope="module")
def uninterrupted(image_folder, tmp_path_factory):
    """uninterrupted(script) -> the folder of an undisturbed run, and the seconds it took."""
    done = {}

    def reference(script):
        if script not in done:
            cwd = tmp_path_factory.mktemp("reference")
            finish(start(script, "--help", cwd=cwd), cwd)  # now everything is imported
            begin = time.monotonic()
            finish(begin_or_resume(script, image_folder, cwd), cwd)
            done[script] = cwd / "out", time.monotonic() - begin
        return done[script]

    return reference


def begin_or_resume(script, image_folder, cwd):
    """Start the run, or resume it once its folder is there."""
    if (cwd / "out/config.yaml").is_file():
        return start(script, "--resume", "out", cwd=cwd)
    data = ["--dataset", image_folder, "--data_dir", image_folder.parent / "data"]
    return start(script, *data, "--output_dir", "out", *SHORT[script], cwd=cwd)


def torture(script, kills, uninterrupted, image_folder, cwd, seed=0):
    """Kill a run at random moments and resume it, again and again; compare each finished run."""
    reference, seconds = uninterrupted(script)
    draw, compared, survived = random.Random(seed), 0, 0

    while survived < kills or compared == 0:
        process = begin_or_resume(script, image_folder, cwd)
        if survived < kills:
            process.join(draw.uniform(0, seconds))
        else:
            process.join(300)

        if process.exitcode is None:
            process.kill()
            process.join()
            survived += 1
            if survived % 4 == 0:
                assert_other_data_are_refused(script, image_folder, cwd)
        else:
            assert process.exitcode == 0, output(process, cwd)
            assert_same_bits(cwd / "out", reference)
            assert not list((cwd / "out").rglob("*.part"))
            shutil.rmtree(cwd / "out")
            compared += 1

    print(f"{script}: {survived} kills, {compared} runs compared, uninterrupted {seconds:.1f} s")
    return compared


def contents(folder):
    """Every file below a folder, and its bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_other_data_are_refused(script, image_folder, cwd):
    """With one image more the run does not go on, and stays as it is."""
    if not (cwd / "out/data.json").is_file() or (cwd / "out/results.json").is_file():
        return  # it had yet to begin, or was finished: then it says so, and reads no images
    before, new = contents(cwd / "out"), image_folder / "train/red/zzz.png"
    shutil.copyfile(image_folder / "train/blue/000.png", new)
    try:
        process = start(script, "--resume", "out", cwd=cwd)
        process.join(300)
    finally:
        new.unlink()
    assert process.exitcode == 2, output(process, cwd)
    assert "train images 301 instead of 300" in output(process, cwd)
    assert contents(cwd / "out") == before


@pytest.mark.slow
@pytest.mark.parametrize("script", SHORT)
def test_torture(script, uninterrupted, image_folder, tmp_path):
    """Eight SIGKILLs at random moments of each script's run (set KILLS for more)."""
    torture(script, int(os.environ.get("KILLS", "8")), uninterrupted, image_folder, tmp_path)


@pytest.mark.slow
def test_killed_in_training_and_resumed_is_bit_identical(uninterrupted, image_folder, tmp_path):
    """It is killed in the third epoch or soon after."""
    reference, _ = uninterrupted("simCLR.py")
    process = begin_or_resume("simCLR.py", image_folder, tmp_path)
    while "epoch  2/12" not in output(process, tmp_path) and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    text = finish(begin_or_resume("simCLR.py", image_folder, tmp_path), tmp_path)

    assert "epoch  1/12" not in text
    assert "epoch 12/12" in text
    assert_same_bits(tmp_path / "out", reference)


# ------------------------------------------------------------------------------------------------
# Going on
# ------------------------------------------------------------------------------------------------

TINY = ["--image_size", 8, "--batch_size", 32, "--checkpoint_every", 0]


@pytest.fixture
def short_rnn(image_folder, run_here, tmp_path):
    """The folder of a finished run of three epochs."""
    flags = ["--dataset", image_folder, *TINY, "--epochs", 3, "--output_dir", "out"]
    done = run_here("rnn.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return tmp_path / "out"


def test_a_finished_run_says_so_and_is_left_alone(short_rnn, run_here):
    before = contents(short_rnn)
    done = run_here("rnn.py", "--resume", "out", cwd=short_rnn.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "out is finished: its results are in out/results.json\n"
    assert contents(short_rnn) == before


def test_a_run_that_ended_while_it_drew_draws_again(image_folder, run_here, tmp_path, monkeypatch):
    """Its numbers are there, its last figures are not: it is not finished."""
    flags = ["--dataset", image_folder, *SHORT["rnn.py"][:6], "--epochs", 1, "--output_dir", "out"]
    monkeypatch.setattr(fn, "plot_confusion_matrix", interrupt := Interrupting())
    done = run_here("rnn.py", *flags, cwd=tmp_path)
    assert done.returncode != 0
    assert interrupt.called
    before = json.loads((tmp_path / "out/results.json").read_text())
    assert not (tmp_path / "out/confusion_matrix.png").exists()

    monkeypatch.undo()
    done = run_here("rnn.py", "--resume", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "is finished" not in done.stdout
    assert (tmp_path / "out/confusion_matrix.png").is_file()
    assert timeless(json.loads((tmp_path / "out/results.json").read_text())) == timeless(before)
    assert "is finished" in run_here("rnn.py", "--resume", "out", cwd=tmp_path).stdout


class Interrupting:
    """Stands in for what is killed: Ctrl-C."""

    called = False

    def __call__(self, *args, **kwargs):
        self.called = True
        raise KeyboardInterrupt


def test_raised_epochs_give_what_as_many_at_once_give(short_rnn, image_folder, run_here):
    cwd = short_rnn.parent
    done = run_here("rnn.py", "--resume", "out", "--epochs", 5, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "--epochs raised from 3 to 5" in done.stdout

    flags = ["--dataset", image_folder, *TINY, "--epochs", 5, "--output_dir", "five"]
    five = run_here("rnn.py", *flags, cwd=cwd)
    assert five.returncode == 0, five.stderr
    assert_same_bits(short_rnn, cwd / "five")
    assert "is finished" in run_here("rnn.py", "--resume", "out", cwd=cwd).stdout


def test_earlier_results_stay_until_there_are_new_ones(short_rnn, run_here):
    cwd, before = short_rnn.parent, (short_rnn / "results.json").read_bytes()
    flags = ["--epochs", 6, "--max_time", "00:00:00:01"]
    for resumed in range(2):  # cut off twice
        done = run_here("rnn.py", "--resume", "out", *flags, cwd=cwd)
        assert "--max_time is over" in done.stdout, resumed
        assert not (short_rnn / "results.json").exists()
        assert (short_rnn / "previous-results.json").read_bytes() == before

    assert run_here("rnn.py", "--resume", "out", cwd=cwd).returncode == 0
    assert (short_rnn / "results.json").is_file()
    assert not (short_rnn / "previous-results.json").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--epochs", 2], ["--epochs 3"]),  # fewer epochs cannot continue a run
        (["--seed", 1, "--cell", "gru"], ["--cell rnn", "--seed 0"]),
        (["--learning_rate", 0.1], ["--learning_rate 0.00022"]),
    ],
)
def test_another_configuration_is_refused_by_name(short_rnn, run_here, flags, named):
    done = run_here("rnn.py", "--resume", "out", *flags, cwd=short_rnn.parent)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    for words in named:
        assert words in done.stderr


def test_simclr_does_not_raise_its_epochs(tmp_path, run_here):
    """Its cosine schedule spans them: with more epochs, all of them would have been different."""
    flags = ["--dataset", "digits", "--stages", "pretrain", *NARROW]
    flags += ["--epochs", 1, "--output_dir", "out"]
    assert run_here("simCLR.py", *flags, cwd=tmp_path).returncode == 0
    done = run_here("simCLR.py", "--resume", "out", "--epochs", 2, cwd=tmp_path)
    assert done.returncode == 2
    assert "--epochs 1" in done.stderr


def test_max_time_ends_at_a_checkpoint_and_the_rest_follows(short_rnn, image_folder, run_here):
    cwd = short_rnn.parent
    flags = ["--dataset", image_folder, *TINY, "--epochs", 3]
    flags += ["--max_time", "00:00:00:00", "--output_dir", "parts"]
    done = run_here("rnn.py", *flags, cwd=cwd)

    assert (done.returncode, done.stderr) == (0, "")
    last = done.stdout.splitlines()[-1]
    assert last == "--max_time is over; continue with: python rnn.py --resume parts"
    assert not (cwd / "parts/results.json").exists()
    assert sum(1 for _ in (cwd / "parts/metrics.csv").open()) == 2, "one epoch is always trained"

    again = run_here("rnn.py", "--resume", "parts", "--max_time", "00:00:00:00", cwd=cwd)
    assert "epoch 2/3" in again.stdout
    assert run_here("rnn.py", "--resume", "parts", cwd=cwd).returncode == 0
    assert_same_bits(cwd / "parts", short_rnn)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_micro_batches_resume_exactly(precision, run_here, tmp_path):
    """Their views follow from the step, and a resumed run continues its count."""
    flags = ["--dataset", "digits", "--stages", "pretrain", *NARROW]
    flags += ["--epochs", 2, "--knn_k", 5, "--batch_size", 500, "--micro_batch_size", 250]
    flags += ["--precision", precision, "--accelerator", "cpu"]
    assert run_here("simCLR.py", *flags, "--output_dir", "whole", cwd=tmp_path).returncode == 0

    one_epoch = ["--max_time", "00:00:00:00", "--output_dir", "parts"]
    parts = run_here("simCLR.py", *flags, *one_epoch, cwd=tmp_path)
    assert "epoch 2/2" not in parts.stdout
    assert run_here("simCLR.py", "--resume", "parts", cwd=tmp_path).returncode == 0
    assert_same_bits(tmp_path / "parts", tmp_path / "whole")


def test_max_time_leaves_room_for_the_next_epoch(tmp_path, monkeypatch):
    """With 10 s left, an epoch of 8 s fits, one of 12 s does not."""
    for seconds, stops in ((8.0, False), (12.0, True)):
        log = fn.EpochLog()
        log.rows = [{"epoch": 1, "seconds": seconds}]
        limit = training.TimeLimit("00:00:01:00", log)
        monkeypatch.setattr(training.time, "monotonic", lambda: training.STARTED + 50)
        strategy = SimpleNamespace(broadcast=lambda value: value)
        trainer = SimpleNamespace(should_stop=False, strategy=strategy)
        limit.on_train_epoch_end(trainer, None)
        assert trainer.should_stop == stops


def test_a_torn_last_line_of_the_metrics_is_mended(short_rnn, run_here):
    whole = bits(short_rnn)
    (short_rnn / "results.json").unlink()
    text = (short_rnn / "metrics.csv").read_bytes()
    (short_rnn / "metrics.csv").write_bytes(text[:-9])

    checkpoints = short_rnn / "checkpoints"  # as if killed in the third epoch
    (checkpoints / "previous-last.ckpt").replace(checkpoints / "last.ckpt")

    done = run_here("rnn.py", "--resume", "out", cwd=short_rnn.parent)
    assert done.returncode == 0, done.stderr
    assert bits(short_rnn) == whole


def test_ctrl_c_says_how_to_resume(image_folder, tmp_path):
    flags = ["--dataset", image_folder, *TINY, "--epochs", 500, "--output_dir", "out"]
    process = start("rnn.py", *flags, cwd=tmp_path)
    while not (tmp_path / "out/checkpoints/last.ckpt").is_file() and process.is_alive():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)

    assert process.exitcode == 130
    last = output(process, tmp_path).splitlines()[-1]
    assert last == "rnn.py: interrupted; continue with: python rnn.py --resume out"


def test_two_processes_do_not_share_a_run(image_folder, run_here, tmp_path):
    """The second is refused; once the first has ended, in any way, its run can be resumed."""
    flags = ["--dataset", image_folder, *TINY, "--epochs", 99, "--output_dir", "out"]
    process = start("rnn.py", *flags, cwd=tmp_path)
    while not (tmp_path / "out/metrics.csv").is_file() and process.is_alive():
        time.sleep(0.02)
    done = run_here("rnn.py", "--resume", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "another process is at work there" in done.stderr

    process.kill()
    process.join()
    flags = ["--resume", "out", "--max_time", "00:00:00:00"]
    assert run_here("rnn.py", *flags, cwd=tmp_path).returncode == 0


def test_runs_of_the_same_second_get_folders_of_their_own(image_folder, tmp_path):
    flags = ["--dataset", image_folder, "--data_dir", "data", *TINY, "--epochs", 1]
    processes = [start("rnn.py", *flags, cwd=tmp_path) for _ in range(4)]
    texts = [finish(process, tmp_path) for process in processes]

    runs = list((tmp_path / "runs").iterdir())
    results = [json.loads((folder / "results.json").read_text()) for folder in runs]
    assert len(runs) == 4
    assert len({json.dumps(timeless(result)) for result in results}) == 1, texts

    # All four decoded the images at once, too.
    (cache,) = (tmp_path / "data/cache").glob("*/images.npy")
    assert np.load(cache).shape == (324, 3, 8, 8)
    assert sum("decoding" in text for text in texts) == 1


# ------------------------------------------------------------------------------------------------
# Damage
# ------------------------------------------------------------------------------------------------


def damage(file, how):
    if how == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "flipped":  # in the middle of the file
        data = bytearray(file.read_bytes())
        for i in range(len(data) // 3, len(data) // 3 + 2000):
            data[i] ^= 0xFF
        file.write_bytes(data)
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "code":
        torch.save(Code(), file)
    else:
        file.write_bytes(pickle.dumps(Code()))


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "code", "pickle"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(how, short_rnn, run_here, monkeypatch):
    monkeypatch.chdir(short_rnn.parent)
    whole = bits(short_rnn)
    (short_rnn / "results.json").unlink()
    damage(short_rnn / "checkpoints/last.ckpt", how)
    done = run_here("rnn.py", "--resume", "out", cwd=short_rnn.parent)

    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "warning: out/checkpoints/last.ckpt is damaged; "
        "going on from out/checkpoints/previous-last.ckpt"
    ]
    assert "epoch 3/3" in done.stdout
    assert "epoch 2/3" not in done.stdout
    assert bits(short_rnn) == whole
    assert not (short_rnn.parent / "hacked").exists()


def test_the_test_of_code_can_fail(tmp_path, monkeypatch):
    """Loaded without weights_only, such a checkpoint runs its code."""
    monkeypatch.chdir(tmp_path)
    damage(tmp_path / "x.ckpt", "code")
    torch.load("x.ckpt", weights_only=False)
    assert (tmp_path / "hacked").exists()


def test_a_flipped_bit_is_noticed(short_rnn):
    """In the middle of the weights, torch.load alone would just read another number."""
    file = short_rnn / "checkpoints/last.ckpt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    torch.load(file, weights_only=True)
    with pytest.raises(fn.UserError, match="damaged"):
        fn.load_checkpoint(file)


def test_falling_back_never_costs_the_sound_checkpoint(short_rnn, run_here, monkeypatch):
    """A run killed between the two renames of its first save after falling back can go on."""
    (short_rnn / "results.json").unlink()
    damage(short_rnn / "checkpoints/last.ckpt", "cut")
    replace, calls = os.replace, []

    def killed(source, target):
        if Path(target).name == "last.ckpt":
            calls.append(target)
            if len(calls) == 1:
                raise KeyboardInterrupt  # before the new checkpoint is renamed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killed)
        assert run_here("rnn.py", "--resume", "out", cwd=short_rnn.parent).returncode == 130
    assert checkpoints.newest_sound(short_rnn / "checkpoints/last.ckpt") is not None


@pytest.mark.parametrize("how", ["gone", "code"])
def test_the_best_weights_do_not_hang_on_their_file(how, short_rnn, run_here):
    """best.ckpt is for others to use: the run itself has the best weights in last.ckpt."""
    whole = bits(short_rnn)
    (short_rnn / "results.json").unlink()
    best = short_rnn / "checkpoints/best.ckpt"
    if how == "gone":
        best.unlink()
    else:
        damage(best, how)
    done = run_here("rnn.py", "--resume", "out", cwd=short_rnn.parent)

    assert (done.returncode, done.stderr) == (0, "")
    results = timeless(json.loads((short_rnn / "results.json").read_text()))
    assert results == whole["results.json"]


def test_without_a_sound_checkpoint_there_is_one_line(short_rnn, run_here):
    (short_rnn / "results.json").unlink()
    for file in (short_rnn / "checkpoints").glob("*last.ckpt"):
        damage(file, "code")
    done = run_here("rnn.py", "--resume", "out", cwd=short_rnn.parent)

    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "out/checkpoints" in line
    assert "start afresh" in line
    assert not (short_rnn.parent / "hacked").exists()


# ------------------------------------------------------------------------------------------------
# A run knows its data
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def own_images(image_folder, tmp_path):
    """A copy of the folder of images that a test may change."""
    return Path(shutil.copytree(image_folder, tmp_path / "mine"))


@pytest.fixture
def own_rnn(own_images, run_here, tmp_path):
    """The folder of a finished run on it, of three epochs."""
    flags = ["--dataset", "mine", *TINY, "--epochs", 3, "--output_dir", "out"]
    done = run_here("rnn.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return tmp_path / "out"


def change_data(folder, how):
    """Change a folder of images. Returns what is to be said of it."""
    if how == "a class more":
        for split in ("train", "test"):
            shutil.copytree(folder / split / "red", folder / split / "pink")
        return "with a new class pink"
    if how == "a class renamed":
        for split in ("train", "test"):
            os.rename(folder / split / "red", folder / split / "zinnober")
        return "without class red, with a new class zinnober"
    if how == "images fewer":
        for i in range(40):
            (folder / f"train/red/{i:03}.png").unlink()
        return "train images 260 instead of 300"
    if how == "an image more":
        shutil.copyfile(folder / "train/red/000.png", folder / "train/red/zzz.png")
        return "train images 301 instead of 300"
    if how == "a label wrong":
        os.rename(folder / "train/red/099.png", folder / "train/green/zzz.png")
    elif how == "a test image other":
        shutil.copyfile(folder / "test/red/001.png", folder / "test/red/000.png")
    return "as many images, but others"


CHANGES = ["a class more", "a class renamed", "images fewer", "an image more"]
CHANGES += ["a label wrong", "a test image other"]


@pytest.mark.parametrize("how", CHANGES)
def test_a_run_does_not_go_on_with_other_data(how, own_rnn, own_images, run_here):
    before, said = contents(own_rnn), change_data(own_images, how)
    done = run_here("rnn.py", "--resume", "out", "--epochs", 5, cwd=own_rnn.parent)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "--resume out: --dataset mine is not what it was" in line
    assert said in line
    assert contents(own_rnn) == before


def test_nor_with_another_data_set(own_rnn, run_here):
    before = contents(own_rnn)
    flags = ["--resume", "out", "--epochs", 5, "--dataset", "digits"]
    done = run_here("rnn.py", *flags, cwd=own_rnn.parent)
    assert done.returncode == 2
    assert "without class blue, with a new class 0" in done.stderr
    assert contents(own_rnn) == before


def test_pretraining_does_not_go_on_with_other_data(own_images, run_here, tmp_path):
    flags = ["--dataset", "mine", *SHORT["simCLR.py"], "--max_time", "00:00:00:01"]
    done = run_here("simCLR.py", *flags, "--output_dir", "out", cwd=tmp_path)
    assert "--max_time is over" in done.stdout
    before, said = contents(tmp_path / "out"), change_data(own_images, "images fewer")
    done = run_here("simCLR.py", "--resume", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert contents(tmp_path / "out") == before


@pytest.mark.slow
def test_data_that_have_moved_are_named_anew(own_rnn, own_images, run_here):
    """The same images in another place: the run ends as it would have there."""
    cwd = own_rnn.parent
    os.rename(own_images, cwd / "moved")
    done = run_here("rnn.py", "--resume", "out", "--epochs", 5, cwd=cwd)
    assert done.returncode == 2
    assert "--dataset mine: no such folder" in done.stderr

    flags = ["--epochs", 5, "--dataset", "moved/", "--data_dir", "new"]
    done = run_here("rnn.py", "--resume", "out", *flags, cwd=cwd)
    assert (done.returncode, done.stderr) == (0, "")
    whole = ["--dataset", "moved/", "--data_dir", "new", *TINY, "--epochs", 5]
    assert run_here("rnn.py", *whole, "--output_dir", "five", cwd=cwd).returncode == 0
    assert_same_bits(own_rnn, cwd / "five")

    # Once more, with another spelling: nothing is left to do.
    done = run_here("rnn.py", "--resume", "out", "--data_dir", "data", cwd=cwd)
    assert "is finished" in done.stdout


def test_a_run_of_an_earlier_version_goes_on_with_a_warning(own_rnn, own_images, run_here):
    (own_rnn / "data.json").unlink()
    done = run_here("rnn.py", "--resume", "out", "--epochs", 4, cwd=own_rnn.parent)
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: out has no record of its data")

    change_data(own_images, "an image more")  # from now on it is known
    done = run_here("rnn.py", "--resume", "out", "--epochs", 5, cwd=own_rnn.parent)
    assert done.returncode == 2


def test_a_study_does_not_go_on_with_other_data(own_images, run_here, tmp_path):
    flags = ["--dataset", "mine", *SHORT["rnn_hyperparameter_tune.py"]]
    flags += ["--n_trials", 1, "--output_dir", "out"]
    done = run_here("rnn_hyperparameter_tune.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, said = contents(tmp_path / "out"), change_data(own_images, "an image more")
    done = run_here("rnn_hyperparameter_tune.py", "--resume", "out", "--n_trials", 2, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert contents(tmp_path / "out") == before


def test_a_shared_study_knows_its_data_and_not_their_path(own_images, run_here, tmp_path):
    script, storage = "rnn_hyperparameter_tune.py", ["--storage", "sqlite:///shared.db"]
    flags = [*SHORT[script], "--n_trials", 1, *storage]
    for dataset in ("mine", "mine/", own_images.absolute()):
        done = run_here(script, "--dataset", dataset, *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    change_data(own_images, "a label wrong")
    before = (tmp_path / "shared.db").read_bytes()
    done = run_here(script, "--dataset", "mine", *flags, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "--study_name rnn has trials on other data than --dataset mine now is" in line
    assert (tmp_path / "shared.db").read_bytes() == before


@pytest.mark.parametrize("how", ["cut", "empty", "code"])
def test_what_a_run_had_reached_stays_where_it_cannot_go_on(how, short_rnn, run_here):
    """Of a finished run whose epochs are raised, but whose checkpoints are damaged."""
    for file in (short_rnn / "checkpoints").glob("*last.ckpt"):
        damage(file, how)
    before = contents(short_rnn)
    done = run_here("rnn.py", "--resume", "out", "--epochs", 5, cwd=short_rnn.parent)
    assert done.returncode == 2
    assert "start afresh" in done.stderr
    assert contents(short_rnn) == before


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_stays(short_rnn, run_here):
    """No file may grow beyond half a checkpoint: there is no room for that of the fourth epoch."""
    most = (short_rnn / "checkpoints/last.ckpt").stat().st_size // 2
    before = bits(short_rnn)
    command = [sys.executable, str(ROOT / "rnn.py"), "--resume", "out", "--epochs", "5"]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    options = {"capture_output": True, "text": True, "preexec_fn": limit}
    done = subprocess.run(command, cwd=short_rnn.parent, **options)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("rnn.py: error: out/checkpoints/")
    assert "could not be written (File too large); what was written before is whole" in line
    assert line.endswith("then continue with: python rnn.py --resume out")

    def checkpoints(found):
        return {name: value for name, value in found.items() if "ckpt" in name}

    assert checkpoints(bits(short_rnn)) == checkpoints(before)

    again = run_here("rnn.py", "--resume", "out", "--epochs", 5, cwd=short_rnn.parent)
    assert again.returncode == 0


def test_a_diverged_run_names_the_step_and_the_last_good_checkpoint(
    short_rnn, run_here, monkeypatch
):
    """The fourth epoch's second loss is not a number."""
    steps_per_epoch = 9
    step, calls = fn.Classification._step, []

    def spoiled(self, *batch):
        outcome = step(self, *batch)
        if self.training:
            calls.append(None)
            outcome["loss"] = outcome["loss"] * (torch.nan if len(calls) == 2 else 1)
        return outcome

    monkeypatch.setattr(fn.Classification, "_step", spoiled)
    done = run_here("rnn.py", "--resume", "out", "--epochs", 5, cwd=short_rnn.parent)
    assert done.returncode == 2

    (line,) = done.stderr.splitlines()
    assert "start a new run with a lower --learning_rate" in line
    assert f"epoch 4, step {3 * steps_per_epoch + 2}, learning rate 0.00022" in line
    assert "last good checkpoint: out/checkpoints/last.ckpt" in line

    saved = torch.load(short_rnn / "checkpoints/last.ckpt", weights_only=True)
    assert saved["epoch"] == 2
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())
