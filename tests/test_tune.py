"""The tuner: what it draws reaches model and optimiser, and rnn.py can train what it finds."""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import matplotlib.pyplot
import optuna
import pytest
import torch
from processes import finish, start

import functions as fn
import rnn
import rnn_hyperparameter_tune as tune
from functions import trials

SPACE = {
    "hidden_size": [128, 256, 512],
    "num_layers": [1, 3, 5],
    "l2": [16, 32, 64],
    "l3": [16, 32, 64],
    "batch_size": [32, 64, 128, 256],
    "learning_rate": [1e-4, 3e-3, 1e-1],
    "weight_decay": [5e-4, 7e-3, 1e-1],
}
CHANGES = [(name, value) for name, values in SPACE.items() for value in values]


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize(("name", "value"), CHANGES)
def test_every_suggested_value_reaches_model_and_optimiser(cell, name, value):
    params = {key: values[0] for key, values in SPACE.items()} | {name: value}
    config = tune.suggest(optuna.trial.FixedTrial(params), tune.Config(cell=cell, epochs=7, seed=5))
    images, labels = torch.zeros(300, 3, 8, 8, dtype=torch.uint8), torch.arange(300) % 4
    splits = rnn.Splits((images, labels), (images, labels), (images, labels), tuple("abcd"))
    model = rnn.build_model(config, cell, images, 4, config.seed)
    module = rnn.RowClassification(model, splits, config)
    optimiser = module.configure_optimizers()["optimizer"]
    recurrent, head = module.model.recurrent, module.model.head

    assert type(recurrent) is rnn.CELLS[cell]
    built = {
        "hidden_size": recurrent.hidden_size,
        "num_layers": recurrent.num_layers,
        "l2": head[0].out_features,
        "l3": head[4].out_features,
        "batch_size": len(next(iter(module.train_dataloader()))[0]),
        "learning_rate": optimiser.param_groups[0]["lr"],
        "weight_decay": optimiser.param_groups[0]["weight_decay"],
    }

    assert built == params
    assert (config.epochs, config.seed, config.cell) == (7, 5, cell)


def test_search_space_is_the_documented_one():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = study.ask()
    tune.suggest(trial, tune.Config())
    found = trial.distributions

    assert set(found) == set(SPACE)
    for name in ("hidden_size", "num_layers", "l2", "l3", "batch_size"):
        assert list(found[name].choices) == SPACE[name]
    for name in ("learning_rate", "weight_decay"):
        low, high = SPACE[name][0], SPACE[name][-1]
        assert (found[name].low, found[name].high, found[name].log) == (low, high, True)


EXTENDED = {
    "cell": ["lstm", "rnn", "gru"],
    "hidden_size": [128, 256, 384],
    "num_layers": [2, 1, 3],
    "bidirectional": [False, True],
    "pooling": ["last", "mean", "attention"],
    "dropout": [0.1, 0.5],
    "l2": [64, 128, 256],
    "l3": [64, 128, 256],
    "learning_rate": [1e-3, 3e-4, 1e-2],
    "weight_decay": [1e-6, 1e-3],
    "batch_size": [64, 128, 256],
    "warmup_epochs": [0, 3],
    "gradient_clip": [0.1, 10.0],
    "label_smoothing": [0.0, 0.2],
    "crop_padding": [0, 4],
    "flip": [False, True],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in EXTENDED.items() for value in values]
)
def test_every_value_of_the_extended_space_reaches_model_and_training(name, value, monkeypatch):
    params = {key: values[0] for key, values in EXTENDED.items()} | {name: value}
    if params["num_layers"] == 1:
        del params["dropout"]
    asked = tune.Config(space="extended", epochs=7, seed=5)
    config = tune.suggest(optuna.trial.FixedTrial(params), asked)
    config.validate()

    images, labels = torch.zeros(300, 3, 8, 8, dtype=torch.uint8), torch.arange(300) % 4
    splits = rnn.Splits((images, labels), (images, labels), (images, labels), tuple("abcd"))
    model = rnn.build_model(config, config.cell, images, 4, config.seed)
    module = rnn.RowClassification(model, splits, config)
    cycle = module.configure_optimizers()["lr_scheduler"]["scheduler"]
    optimiser, model = cycle.optimizer, module.model

    augmented, smoothed, clipped = [], [], []

    def augment(images, *how):
        augmented.extend(how)
        return images

    def step(self, batch, smoothing):
        smoothed.append(smoothing)

    def clip(parameters, norm):
        clipped.append(norm)

    monkeypatch.setattr(rnn, "random_crop_and_flip", augment)
    monkeypatch.setattr(rnn.RowClassification, "_step", step)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    module.training_step((images, labels), 0)
    module.configure_gradient_clipping(optimiser, None, None)

    peak = cycle._schedule_phases[0]["end_step"] + 1
    built = {
        "cell": next(cell for cell, kind in rnn.CELLS.items() if type(model.recurrent) is kind),
        "hidden_size": model.recurrent.hidden_size,
        "num_layers": model.recurrent.num_layers,
        "bidirectional": model.recurrent.bidirectional,
        "pooling": model.pooling,
        "dropout": model.recurrent.dropout,
        "l2": model.head[0].out_features,
        "l3": model.head[4].out_features,
        "learning_rate": optimiser.param_groups[0]["max_lr"],
        "weight_decay": optimiser.param_groups[0]["weight_decay"],
        "batch_size": len(next(iter(module.train_dataloader()))[0]),
        "warmup_epochs": round(peak / len(module.train_batches)),
        "gradient_clip": clipped[0],
        "label_smoothing": smoothed[0],
        "crop_padding": augmented[0],
        "flip": {0.0: False, 0.5: True}[augmented[1]],  # drawn as a switch
    }

    assert built == {"dropout": 0.0} | params
    assert (config.epochs, config.seed, config.schedule) == (7, 5, "one_cycle")


def test_extended_search_space_is_the_documented_one():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = {}
    for layers in (1, 2):  # dropout is between layers
        study.enqueue_trial({"num_layers": layers})
        trial = study.ask()
        tune.suggest(trial, tune.Config(space="extended", epochs=10)).validate()
        found |= trial.distributions

    assert set(found) == set(EXTENDED)
    for name, values in EXTENDED.items():
        if hasattr(found[name], "choices"):
            assert set(found[name].choices) == set(values)
        else:
            low = 0.0 if name == "dropout" else min(values)
            log = name in ("learning_rate", "weight_decay", "gradient_clip")
            assert (found[name].low, found[name].high, found[name].log) == (low, max(values), log)


def test_trials_may_see_a_part_of_the_training_images_and_all_validation_images():
    configs = [tune.Config(dataset="digits", train_fraction=f) for f in (1.0, 0.25)]
    (whole, _), (part, _) = map(tune.load_splits, configs)
    assert torch.equal(whole.validation[0][:], part.validation[0][:])
    assert torch.equal(whole.test[0], part.test[0])
    share = part.train[1].bincount() / whole.train[1].bincount()
    assert ((share - 0.25).abs() < 0.01).all()

    def pixels(splits):
        return {tuple(image.flatten().tolist()) for image in splits.train[0]}

    assert pixels(part) <= pixels(whole)


pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),  # as main() does
    pytest.mark.filterwarnings("ignore:Heartbeat of storage"),  # tests ask for trials themselves
]


DATA = fn.load_dataset("digits").description()


def small_study(tmp_path=None, **changes):
    """Of few images. In memory where no folder is given: a disk would be waited for each draw."""
    config = tune.Config(**{"dataset": "digits", "n_trials": 2, "epochs": 2} | changes)
    splits = rnn.split(fn.load_dataset("digits"), 0.1, seed=0)
    images, labels = splits.train
    splits = replace(splits, train=(images[:300], labels[:300]))
    place = f"/{tmp_path}/study.db" if tmp_path else ""
    study = tune.open_study(config, f"sqlite://{place}", DATA)
    return study, splits, config


def test_objective_is_the_lowest_validation_loss(tmp_path):
    study, splits, config = small_study(tmp_path, n_trials=1)
    tune.run_study(study, splits, config)
    (trial,) = study.trials
    assert trial.state == optuna.trial.TrialState.COMPLETE
    assert trial.value == pytest.approx(min(trial.intermediate_values.values()))
    assert list(trial.intermediate_values) == [0, 1]


def test_a_resumed_study_goes_on_numbering_and_ends_at_n_trials(tmp_path):
    study, splits, config = small_study(tmp_path, epochs=1)
    tune.run_study(study, splits, config)
    again = tune.open_study(config, f"sqlite:///{tmp_path}/study.db", DATA)
    config.n_trials = 3
    tune.run_study(again, splits, config)
    tune.run_study(again, splits, config)  # nothing is missing now
    assert [trial.number for trial in again.trials] == [0, 1, 2]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_an_interrupted_trial_is_drawn_again_and_the_next_ones_are_new(tmp_path, sampler):
    """Draws follow from the seed and the trial's place; an interrupted trial takes no place."""
    study, _, config = small_study(tmp_path, sampler=sampler)
    first = [tune.suggest(study.ask(), config).learning_rate for _ in range(2)]

    # Opening the study fails the trials that were running when their process ended.
    again = tune.open_study(config, f"sqlite:///{tmp_path}/study.db", DATA)
    assert [trial.state.name for trial in again.trials] == ["FAIL", "FAIL"]

    repeated = [tune.suggest(again.ask(), config).learning_rate for _ in range(3)]
    assert repeated[:2] == first
    assert len(set(repeated)) == 3


def test_an_empty_storage_names_no_other_workers(tmp_path):
    """The study is this process's alone: what seems to run was killed, and is not waited for."""
    study, _, config = small_study(tmp_path, storage="")
    study.ask()
    again = tune.open_study(config, f"sqlite:///{tmp_path}/study.db", DATA)
    assert [trial.state.name for trial in again.trials] == ["FAIL"]


def test_random_search_does_not_look_at_the_losses():
    """After twelve trials, their losses decide what TPE draws, but not what random search draws."""
    drawn = {}
    for sampler in ("tpe", "random"):
        for best in (128, 512):
            study, _, config = small_study(sampler=sampler)
            for _ in range(12):
                trial = study.ask()
                study.tell(trial, abs(tune.suggest(trial, config).hidden_size - best))
            drawn[sampler, best] = [tune.suggest(study.ask(), config).hidden_size for _ in range(8)]

    assert drawn["random", 128] == drawn["random", 512]
    assert drawn["tpe", 128] != drawn["tpe", 512]


def test_another_seed_draws_other_trials(tmp_path):
    drawn = set()
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        study, _, config = small_study(tmp_path / str(seed), seed=seed)
        drawn.add(tune.suggest(study.ask(), config).learning_rate)
    assert len(drawn) == 2


def test_an_interrupted_trial_is_made_up_for(tmp_path):
    study, splits, config = small_study(tmp_path, epochs=1, n_trials=1)
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    tune.run_study(study, splits, config)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]


def test_a_hopeless_trial_is_pruned(tmp_path):
    """Worse than five earlier trials at every epoch, it is stopped before its last."""
    study, splits, config = small_study(tmp_path, epochs=4, n_trials=6)
    params = {key: values[0] for key, values in SPACE.items()}
    losses = {"value": 1e-3, "intermediate_values": dict.fromkeys(range(4), 1e-3)}
    drawn = {"params": params, "distributions": _distributions()}
    for _ in range(5):
        study.add_trial(optuna.trial.create_trial(**drawn, **losses))

    study.enqueue_trial(params)
    study.optimize(lambda trial: tune.objective(trial, splits, config), n_trials=1)
    assert study.trials[-1].state == optuna.trial.TrialState.PRUNED
    assert len(study.trials[-1].intermediate_values) < 4


def _distributions():
    trial = optuna.create_study().ask()
    tune.suggest(trial, tune.Config())
    return trial.distributions


@pytest.mark.slow
def test_a_study_prunes_from_end_to_end(run_here, tmp_path):
    """The script itself: some trials end early, and the report says what that saved."""
    flags = ["--dataset", "digits", "--n_trials", 9, "--epochs", 4]
    flags += ["--train_fraction", 0.25, "--output_dir", "out"]
    done = run_here("rnn_hyperparameter_tune.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    outcome = json.loads((tmp_path / "out/results.json").read_text())["study"]
    study = optuna.load_study(storage=f"sqlite:///{tmp_path}/out/study.db", study_name="rnn")
    pruned = [trial for trial in study.trials if trial.state.name == "PRUNED"]
    assert outcome["pruned"] == len(pruned) > 0
    assert outcome["epochs"] == sum(len(trial.intermediate_values) for trial in study.trials)

    lengths = [len(trial.intermediate_values) for trial in pruned]
    assert outcome["epochs_saved"] == sum(4 - length for length in lengths if length)

    asked = outcome["epochs"] + outcome["epochs_saved"]
    assert f"pruning saved {outcome['epochs_saved']:,} of {asked:,} epochs" in done.stdout

    with open(tmp_path / "out/trials.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["trial"]), row["state"], float(row["value"])) for row in rows] == [
        (trial.number + 1, trial.state.name, trial.value) for trial in study.trials
    ]
    assert [{name: row[name] for name in SPACE} for row in rows] == [
        {name: str(trial.params[name]) for name in SPACE} for trial in study.trials
    ]

    lines, best = done.stdout.splitlines(), float("inf")
    for trial in study.trials:  # each new best is followed by a line with what was drawn
        title, drawn = f"trial {trial.number + 1}/9", f"hidden_size {trial.params['hidden_size']}"
        at = next(i for i, line in enumerate(lines) if line.startswith(title))
        new_best = trial.state.name == "COMPLETE" and trial.value < best
        best = trial.value if new_best else best
        assert lines[at + 1].startswith(f"    {drawn}, ") == new_best

    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    expected = sorted((trial.value, trial.number + 1, trial.params) for trial in complete)[:5]
    assert [(t["value"], t["trial"], t["params"]) for t in outcome["best_trials"]] == expected

    names = ("history", "intermediate_values", "importances")
    assert all((tmp_path / f"out/{name}.png").stat().st_size > 5000 for name in names)


@pytest.mark.parametrize(
    ("losses", "shown"),
    [((0.17, 24), {"0.2", "0.5", "1", "2", "5", "10", "20"}), ((1.1, 2.3), {"1.2", "2"})],
)
def test_losses_of_all_sizes_have_labels_that_do_not_touch(losses, shown):
    study = optuna.create_study()
    values = dict(enumerate(losses))
    study.add_trial(optuna.trial.create_trial(value=losses[1], intermediate_values=values))
    axes = optuna.visualization.matplotlib.plot_intermediate_values(study)
    tune.dress_intermediate_values(axes, study)
    axes.figure.canvas.draw()
    low, high = axes.get_ylim()
    ticks = [*zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)]
    labels = {label.get_text() for at, label in ticks if low <= at <= high}
    matplotlib.pyplot.close(axes.figure)
    assert shown <= labels
    assert len(labels) <= 12
    assert not any(label.get_text() for label in axes.get_yticklabels(minor=True))


def test_saved_by_pruning():
    """Pruned after 2 of 10 epochs in 6 s, a trial saved 8 epochs and 24 s.

    One that diverged or never began saved nothing.
    """
    study = optuna.create_study()
    start = datetime(2026, 1, 1)
    pruned = [("PRUNED", 2, 6), ("PRUNED", 0, 1), ("PRUNED", 5, 5), ("PRUNED", 1, 1)]
    for state, epochs, seconds in (("COMPLETE", 10, 40), *pruned, ("RUNNING", 3, 9)):
        trial = optuna.trial.create_trial(
            state=optuna.trial.TrialState[state],
            value=1.0 if state == "COMPLETE" else None,
            intermediate_values=dict.fromkeys(range(epochs), float("nan") if epochs == 1 else 1.0),
            user_attrs={"diverged": True} if epochs == 5 else {},
        )
        trial.datetime_start = start
        if trial.state.is_finished():
            trial.datetime_complete = start + timedelta(seconds=seconds)
        else:
            trial.datetime_complete = None
        study.add_trial(trial)

    spent = tune.saved_by_pruning(study, tune.Config(epochs=10))
    assert spent == {"epochs": 18, "epochs_saved": 8, "seconds": 53, "seconds_saved": 24}


def test_a_diverging_trial_counts_as_pruned(tmp_path, monkeypatch):
    study, splits, config = small_study(tmp_path)

    def diverge(*_, **__):
        raise fn.Diverged("the loss is no longer finite")

    monkeypatch.setattr(rnn, "train", diverge)
    study.optimize(lambda trial: tune.objective(trial, splits, config), n_trials=1)
    assert study.trials[0].state == optuna.trial.TrialState.PRUNED
    assert study.trials[0].user_attrs["diverged"]


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] "
        "DefaultCPUAllocator: can't allocate memory: you tried to ..."
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_a_trial_that_fails_in_itself_is_noted_and_not_repeated(
    error, tmp_path, monkeypatch, capsys
):
    """Running out of memory fails only that trial."""
    study, splits, config = small_study(tmp_path, n_trials=3, epochs=1)
    train, calls = rnn.train, []

    def sometimes(*args, **options):
        calls.append(None)
        if len(calls) == 2:
            raise error
        return train(*args, **options)

    monkeypatch.setattr(rnn, "train", sometimes)
    tune.run_study(study, splits, config)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert study.trials[1].user_attrs["error"] == "out of memory"
    assert study.trials[1].user_attrs["details"] == str(error)
    assert "trial 2/3  fail       0 epochs  out of memory  best" in capsys.readouterr().out
    assert tune.report(study, config, tmp_path)["study"]["failed"] == 1


def test_a_trials_network_is_gone_before_the_next_is_built(tmp_path, monkeypatch):
    """However the trial ended, its memory on a GPU is free again."""
    trials.quiet_optuna()  # as the script does: pytest would keep what is logged, and the network
    study, splits, config = small_study(tmp_path, n_trials=4, epochs=1)
    build, networks = rnn.build_model, []

    def build_and_look(*args):
        assert [network() for network in networks] == [None] * len(networks)
        network = build(*args)
        networks.append(weakref.ref(network))
        if len(networks) == 2:
            network.register_forward_hook(lambda *_: (_ for _ in ()).throw(MemoryError))
        if len(networks) == 3:
            network.head[-1].bias.data.fill_(torch.nan)
        return network

    monkeypatch.setattr(rnn, "build_model", build_and_look)
    tune.run_study(study, splits, config)
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "FAIL", "PRUNED", "COMPLETE"]


@pytest.mark.slow
def test_the_study_lies_in_its_folder_whatever_that_is_called(run_here, tmp_path):
    """In a database's URL, a question mark would end the file's name."""
    for name in ("what?1", "what?2"):
        flags = ["--dataset", "digits", "--epochs", 1, "--n_trials", 1, "--output_dir", name]
        done = run_here("rnn_hyperparameter_tune.py", *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / name / "study.db").is_file()
        assert "going on with" not in done.stdout

    flags = ["--resume", "what?1", "--n_trials", 2]
    done = run_here("rnn_hyperparameter_tune.py", *flags, cwd=tmp_path)
    assert "going on with the study rnn: 1 trials are there" in done.stdout


def test_a_study_of_something_else_is_refused(tmp_path):
    small_study(tmp_path)
    config = tune.Config(dataset="digits", cell="lstm", epochs=5, seed=1)
    message = r"--study_name rnn has trials with --seed 0, --cell rnn, --epochs 2: name"
    with pytest.raises(fn.UserError, match=message):
        tune.open_study(config, f"sqlite:///{tmp_path}/study.db", DATA)


@pytest.mark.slow
def test_any_other_error_ends_the_worker_and_costs_no_trial(tmp_path, monkeypatch):
    """A broken GPU must not use up the study."""
    study, splits, config = small_study(tmp_path, n_trials=3, epochs=1)

    def broken(*_, **__):
        raise RuntimeError("CUDA error: device-side assert triggered")

    with monkeypatch.context() as patch:
        patch.setattr(rnn, "train", broken)
        with pytest.raises(RuntimeError, match="device-side"):
            tune.run_study(study, splits, config)

    tune.run_study(study, splits, config)
    states = [trial.state.name for trial in study.trials]
    assert states == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert len(trials.counted(study)) == 3


@pytest.mark.parametrize(
    "method", ["set_trial_intermediate_value", "set_trial_state_values", "get_all_trials"]
)
def test_a_database_that_fails_in_the_middle_is_one_line(method, tmp_path, monkeypatch, run_here):
    """In the second trial, reading or writing begins to fail."""
    train, trained = rnn.train, []

    def fails(*_, **__):
        raise optuna.exceptions.StorageInternalError("An exception is raised during the commit.")

    def train_then_fail(*args, **options):
        trained.append(None)
        if len(trained) == 2:
            monkeypatch.setattr(optuna.storages._CachedStorage, method, fails)
        return train(*args, **options)

    monkeypatch.setattr(rnn, "train", train_then_fail)
    flags = ["--dataset", "digits", "--epochs", 1, "--n_trials", 3, "--output_dir", "out"]
    done = run_here("rnn_hyperparameter_tune.py", *flags, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "cannot be used (An exception is raised during the commit.)" in line
    assert "go on with --resume out" in line


def test_a_password_is_not_printed():
    error = ValueError("no user me:secret there")
    url = "postgresql+psycopg://me:secret@host/db"
    text = trials.database_problem(url, error, "check the URL")
    assert "secret" not in text
    assert "postgresql+psycopg://me:***@host/db" in text


def test_the_study_of_another_program_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path}/x.db"
    study = optuna.create_study(storage=url, study_name="rnn")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), 1)
    with pytest.raises(fn.UserError, match="--study_name rnn is the study of another program"):
        tune.open_study(tune.Config(dataset="digits"), url, DATA)


def test_timeout_says_what_is_missing(tmp_path, capsys):
    study, splits, config = small_study(tmp_path, n_trials=3, timeout=1e-9)
    tune.run_study(study, splits, config)
    assert "3 of 3 trials are not finished: go on with --resume" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Several workers on one study
# ------------------------------------------------------------------------------------------------

WORKER = ["--dataset", "digits", "--epochs", 1, "--heartbeat", 3]


def work_together(url, cwd, n_trials, workers=2):
    """Start workers at the same moment, wait for all; returns the study."""
    flags = [*WORKER, "--storage", url, "--n_trials", n_trials]
    processes = [start("rnn_hyperparameter_tune.py", *flags, cwd=cwd) for _ in range(workers)]
    texts = [finish(process, cwd) for process in processes]
    study = optuna.load_study(storage=url, study_name="rnn")
    shown = [int(number) for text in texts for number in re.findall(r"^trial +(\d+)/", text, re.M)]

    assert sorted(shown) == list(range(1, n_trials + 1)), "each trial was run, by one of them"
    reports = {text.split("best of ")[1].split("train the")[0] for text in texts}
    assert len(reports) == 1, "both report the whole study"
    return study


def kill_one(url, cwd, n_trials):
    """Kill a worker in the middle of a trial; another one retries that trial. Returns the study."""
    flags = [*WORKER, "--storage", url, "--n_trials", n_trials, "--epochs", 5]
    victim = start("rnn_hyperparameter_tune.py", *flags, cwd=cwd)
    while not started(url) and victim.is_alive():
        time.sleep(0.02)
    victim.kill()
    victim.join()

    rescuers = [start("rnn_hyperparameter_tune.py", *flags, cwd=cwd) for _ in range(2)]
    for rescuer in rescuers:
        finish(rescuer, cwd)
    return optuna.load_study(storage=url, study_name="rnn")


def started(url):
    with contextlib.suppress(Exception):  # not yet made
        study = optuna.load_study(storage=url, study_name="rnn")
        return any("drawn" in trial.user_attrs for trial in study.trials)
    return False


def check_shared_study(url, cwd):
    study = work_together(url, cwd, n_trials=6)
    kept = trials.counted(study)
    assert len(kept) == 6
    assert {trial.state.name for trial in kept} <= {"COMPLETE", "PRUNED"}
    assert len({tuple(trial.params.items()) for trial in kept}) == 6, "no two draw the same"


def check_rescue(url, cwd):
    study = kill_one(url, cwd, n_trials=2)
    lost, *others = study.trials
    assert lost.state.name == "FAIL"
    retried = [trial for trial in others if trial.system_attrs.get("failed_trial") == lost.number]
    assert len(retried) == 1
    assert retried[0].params == lost.params
    ended = [trial.state.name in ("COMPLETE", "PRUNED") for trial in trials.counted(study)]
    assert ended == [True, True]


@pytest.mark.slow
def test_two_workers_on_sqlite_lose_nothing(tmp_path):
    check_shared_study(f"sqlite:///{tmp_path}/shared.db", tmp_path)


@pytest.mark.slow
def test_a_killed_workers_trial_is_retried_on_sqlite(tmp_path):
    check_rescue(f"sqlite:///{tmp_path}/shared.db", tmp_path)


def test_a_trial_whose_worker_died_before_it_drew_anything_is_made_up_for(tmp_path):
    """Optuna sees no heartbeat there, and would wait for it for ever."""
    url = f"sqlite:///{tmp_path}/x.db"
    config = tune.Config(dataset="digits", n_trials=1, epochs=1, storage=url, heartbeat=2)
    splits = rnn.split(fn.load_dataset("digits"), 0.1, seed=0)
    study = tune.open_study(config, config.storage, DATA)
    study.ask()
    tune.run_study(study, splits, config)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_worker_whose_trial_was_taken_goes_on(when, tmp_path, monkeypatch):
    """Suspended for longer than the heartbeat, it finds that another worker failed its trial.

    The study is completed all the same.
    """
    url = f"sqlite:///{tmp_path}/x.db"
    config = tune.Config(dataset="digits", n_trials=2, epochs=1, storage=url)
    splits = rnn.split(fn.load_dataset("digits"), 0.1, seed=0)
    study = tune.open_study(config, config.storage, DATA)
    train, calls = rnn.train, []

    def suspended(*args, **options):
        calls.append(None)
        trained = train(*args, **options) if when == "after" else None
        if len(calls) == 1:
            taken, failed = study.trials[0]._trial_id, optuna.trial.TrialState.FAIL
            study._storage.set_trial_state_values(taken, failed)
            trials.retry(study, study.trials[0])
        return trained or train(*args, **options)

    monkeypatch.setattr(rnn, "train", suspended)
    tune.run_study(study, splits, config)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[1].params == study.trials[0].params


def test_a_trial_that_kills_its_workers_is_given_up(tmp_path):
    config = tune.Config(dataset="digits", storage=f"sqlite:///{tmp_path}/x.db")
    study = tune.open_study(config, config.storage, DATA)
    for number in range(4):
        trial = study.ask()
        assert trial.number == number
        assert "drawn" not in trial.user_attrs, "its new worker has not drawn it yet"
        trial.set_user_attr("drawn", True)
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        trials.retry(study, study.trials[number])
    assert len(study.trials) == 4, "retried three times, and no more"


def test_a_trial_that_two_workers_find_dead_is_failed_by_one(tmp_path, monkeypatch):
    """The second asks while the first has read the trial, but not yet changed it."""
    config = tune.Config(dataset="digits", storage=f"sqlite:///{tmp_path}/x.db")
    studies = [tune.open_study(config, config.storage, DATA) for _ in range(2)]
    first, second = (study._storage._backend for study in studies)
    trial_id, failed = first.create_new_trial(1), optuna.trial.TrialState.FAIL
    check, asking = first.check_trial_is_updatable, ThreadPoolExecutor(1)
    answers = []

    def let_the_other_ask(*trial):
        answers.append(asking.submit(second.set_trial_state_values, trial_id, failed))
        time.sleep(0.5)  # it now waits, or has done it
        check(*trial)

    monkeypatch.setattr(first, "check_trial_is_updatable", let_the_other_ask)
    assert first.set_trial_state_values(trial_id, failed)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        answers[0].result()


def test_a_trial_beyond_the_last_is_not_counted(tmp_path):
    """Two workers that see one trial missing both begin one; the later one trains nothing."""
    study, splits, config = small_study(tmp_path, n_trials=1, epochs=1)
    study.ask()  # the other worker's
    objective = partial(tune.objective, splits=splits, config=config)
    trials.run_trial(study, objective, tune.Progress(study, config))
    assert [trial.state.name for trial in study.trials] == ["RUNNING", "FAIL"]
    assert not study.trials[1].params
    assert len(trials.counted(study)) == 1


@pytest.mark.slow
def test_workers_share_a_private_study_and_go_on_with_one(run_here, tmp_path):
    flags = ["--dataset", "digits", "--epochs", 1, "--output_dir", "out"]
    first = run_here("rnn_hyperparameter_tune.py", *flags, "--n_trials", 2, cwd=tmp_path)
    assert first.returncode == 0, first.stderr

    flags = ["--resume", "out", "--n_trials", 5, "--workers", 2]
    done = run_here("rnn_hyperparameter_tune.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert sorted(re.findall(r"^trial (\d)/5", done.stdout, re.M)) == ["3", "4", "5"]
    assert done.stdout.count("all 5 trials are done") == 1
    assert "workers" not in (tmp_path / "out/config.yaml").read_text()

    study = optuna.load_study(storage=f"sqlite:///{tmp_path}/out/study.db", study_name="rnn")

    # If both workers took the last place, the sixth trial trained nothing and does not count.
    kept = trials.counted(study)
    assert [trial.number for trial in kept] == [0, 1, 2, 3, 4]
    assert len({tuple(trial.params.items()) for trial in kept}) == 5


@pytest.mark.slow
def test_lost_workers_end_the_study_in_one_line(run_here, tmp_path, monkeypatch):
    """All are killed at once; the study can be resumed."""
    monkeypatch.setattr(tune, "work", killed)
    flags = ["--dataset", "digits", "--epochs", 1, "--n_trials", 2, "--output_dir", "out"]
    done = run_here("rnn_hyperparameter_tune.py", *flags, "--workers", 2, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "--workers: 2 of 2 were lost, status [-9, -9]: go on with --resume" in line
    assert run_here("rnn_hyperparameter_tune.py", "--resume", "out", cwd=tmp_path).returncode == 0


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_process_that_started_them(tmp_path, how):
    """Killed, it says nothing; after Ctrl-C, which all of them get, it says how to go on."""
    script = fn.__file__.replace("functions.py", "rnn_hyperparameter_tune.py")
    flags = ["--dataset", "digits", "--n_trials", "500", "--epochs", "1"]
    flags += ["--workers", "2", "--output_dir", "out"]
    command = [sys.executable, "-c", START_GROUP, script, *flags]
    parent = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    url = f"sqlite:///{tmp_path}/out/study.db"
    while not started(url) and parent.poll() is None:
        time.sleep(0.2)

    if how == signal.SIGINT:
        os.killpg(parent.pid, how)
        lines = [line for line in parent.communicate()[1].splitlines() if line]
        assert len(lines) == 1, lines
        command = "python rnn_hyperparameter_tune.py --resume out"
        assert lines[0].endswith(f"interrupted; continue with: {command}")
    else:
        parent.kill()
        parent.wait()
    assert parent.returncode == (130 if how == signal.SIGINT else -how)

    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, 0)
            time.sleep(0.2)
            continue
        return
    os.killpg(parent.pid, signal.SIGKILL)
    pytest.fail("workers outlived the process that started them")


START_GROUP = """
import os, runpy, signal, sys
os.setpgrp()
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_study_that_several_workers_began_draws_nothing_twice(tmp_path):
    """Workers draw by number, a lone process by place.

    After an interrupted trial the two would overlap.
    """
    study, _, config = small_study(tmp_path)
    url = f"sqlite:///{tmp_path}/study.db"
    study.set_user_attr("workers", 2)
    worker = tune.open_study(replace(config, storage=url), url, DATA)
    drawn = [tune.suggest(worker.ask(), config).learning_rate for _ in range(5)]
    alone = tune.open_study(config, url, DATA)  # fails the five, because no worker is left
    drawn += [tune.suggest(alone.ask(), config).learning_rate for _ in range(3)]
    assert len(set(drawn)) == 8


def test_an_older_study_lacks_what_is_new(tmp_path):
    study, _, config = small_study(tmp_path)
    task = dict(study.user_attrs["task"])
    for new in ("space", "train_fraction"):
        task.pop(new, None)
    study.set_user_attr("task", task)
    tune.require_same_task(study, config)
    with pytest.raises(fn.UserError, match=r"has trials with --train_fraction 1\.0: name another"):
        tune.require_same_task(study, replace(config, train_fraction=0.5))


def test_an_older_study_noted_its_data_set_by_name(tmp_path, capsys):
    study, _, config = small_study(tmp_path)
    url = f"sqlite:///{tmp_path}/study.db"
    old = study.storage if hasattr(study, "storage") else study._storage
    old.set_study_user_attr(study._study_id, "data", None)
    study.set_user_attr("task", study.user_attrs["task"] | {"dataset": "some/where/digits"})
    with pytest.raises(fn.UserError, match="has trials with --dataset some/where/digits"):
        tune.open_study(replace(config, dataset="cifar10"), url, DATA)
    assert capsys.readouterr().err == ""
    for warnings in (1, 0):  # from then on the data are known
        tune.open_study(config, url, DATA)
        assert capsys.readouterr().err.count("warning: --study_name rnn has no record") == warnings


@pytest.mark.parametrize(
    "queued",
    [
        {"hidden_size": 999},
        {"learning_rate": 5.0},
        {"weight_decay": -1.0},
        {"batch_size": "many"},
        {"learning_rate": float("nan")},
    ],
)
def test_a_queued_trial_outside_of_the_space_fails_alone(queued, tmp_path, capsys, recwarn):
    study, splits, config = small_study(tmp_path, epochs=1)
    study.enqueue_trial(queued)
    trials.quiet_optuna()
    tune.run_study(study, splits, config)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]
    assert "trial 1/2  fail       0 epochs  outside of the search" in capsys.readouterr().out
    assert next(iter(queued)) in study.trials[0].user_attrs["error"]
    assert not [w for w in recwarn if "out of range" in str(w.message)]


def test_a_queued_trial_inside_of_the_space_is_tried(tmp_path):
    study, splits, config = small_study(tmp_path, n_trials=1, epochs=1)
    study.enqueue_trial({"hidden_size": 128, "learning_rate": 1e-3})
    tune.run_study(study, splits, config)
    (trial,) = study.trials
    assert (trial.state.name, trial.params["learning_rate"]) == ("COMPLETE", 1e-3)


@pytest.mark.parametrize(
    ("schema", "remedy"), [("v2.6.0.a", "run `optuna storage upgrade`"), ("v99", "update Optuna")]
)
def test_tables_of_another_optuna_are_told_what_optuna_tells(schema, remedy, tmp_path):
    small_study(tmp_path)
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (schema,))
    message = rf"--storage sqlite:.*study\.db cannot be used \(its tables are .*\): {remedy}"
    with pytest.raises(fn.UserError, match=message) as caught:
        tune.open_study(tune.Config(dataset="digits"), f"sqlite:///{tmp_path}/study.db", DATA)
    assert "check the URL" not in str(caught.value)


@pytest.mark.parametrize("space", ["default", "extended"])
def test_a_study_of_one_trial_is_reported(tmp_path, space):
    study, splits, config = small_study(tmp_path, n_trials=1, epochs=1, space=space)
    tune.run_study(study, splits, config)
    assert len(tune.report(study, config, tmp_path)["study"]["best_trials"]) == 1
    tune.plot_study(study, tmp_path)
    assert (tmp_path / "intermediate_values.png").is_file()


def test_on_a_terminal_a_bar_shows_the_best_value(tmp_path, monkeypatch, capsys):
    study, splits, config = small_study(tmp_path, epochs=1)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    tune.run_study(study, splits, config)
    bar = capsys.readouterr().err
    assert "study: 100%" in bar
    assert f"best {study.best_value:.4f}" in bar


@pytest.fixture(scope="module")
def postgres():
    """The URL of a database on our own PostgreSQL server, with its socket in a new folder."""
    pytest.importorskip("psycopg", reason="no psycopg: pip install 'psycopg[binary]'")
    found = [*Path("/usr/lib/postgresql").glob("*/bin")]
    found += map(Path, os.environ["PATH"].split(os.pathsep))
    programs = next((folder for folder in found if (folder / "initdb").is_file()), None)
    if programs is None:
        pytest.skip("no PostgreSQL server: on Debian, apt install postgresql")

    folder = Path(tempfile.mkdtemp(prefix="pg"))
    user = {"user": "postgres"} if os.geteuid() == 0 else {}  # the server refuses to run as root
    if user:
        shutil.chown(folder, "postgres")
    options = {"cwd": folder, "check": True, "stdout": subprocess.DEVNULL, **user}
    make = [programs / "initdb", "-D", folder / "db", "-A", "trust", "-U", "tuner"]
    subprocess.run(make, **options)

    server = [programs / "pg_ctl", "-D", folder / "db", "-w", "-l", folder / "log"]
    subprocess.run([*server, "-o", f"-k {folder} -h ''", "start"], **options)
    try:
        yield f"postgresql+psycopg://tuner@/postgres?host={folder}"
    finally:
        subprocess.run([*server, "-m", "immediate", "stop"], **options)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_two_workers_on_postgresql(postgres, tmp_path):
    check_shared_study(postgres, tmp_path)


@pytest.mark.slow
def test_a_killed_workers_trial_is_retried_on_postgresql(postgres, tmp_path):
    with contextlib.suppress(KeyError):  # left by the test before, if it ran on this server
        optuna.delete_study(storage=postgres, study_name="rnn")
    check_rescue(postgres, tmp_path)


def test_best_config_is_what_rnn_reads(tmp_path):
    study, splits, config = small_study(tmp_path, epochs=1, cell="gru")
    tune.run_study(study, splits, config)
    tune.report(study, config, tmp_path)
    found = fn.parse_config(rnn.Config, ["--config", str(tmp_path / "best_config.yaml")])
    assert {name: getattr(found, name) for name in SPACE} == study.best_params
    assert (found.cell, found.dataset, found.epochs) == ("gru", "digits", 100)


def test_database_that_cannot_be_opened_is_one_line(tmp_path):
    with pytest.raises(fn.UserError, match="--storage nonsense cannot be used"):
        tune.open_study(tune.Config(storage="nonsense"), "nonsense", DATA)
