"""Tune rnn.py's network with Optuna: which widths, depth, learning rate, weight decay and batch size suit the data?
With --space extended also: which cell, direction, pooling, regularisation and augmentation?

Every trial draws a configuration (TPE, Bergstra et al. 2011), trains it with Lightning for at most --epochs epochs,
and is stopped early when its lowest validation loss so far is above the median of what completed trials had by that
epoch. The test images stay unseen.

    python rnn_hyperparameter_tune.py                                 # CIFAR-10, 100 trials of at most 10 epochs
    python rnn_hyperparameter_tune.py --dataset digits --n_trials 20  # no download, a minute
    python rnn_hyperparameter_tune.py --space extended --workers 2    # two processes at the same time
    python rnn_hyperparameter_tune.py --resume                        # continue the newest study
    python rnn_hyperparameter_tune.py --storage postgresql+psycopg://HOST/DATABASE  # a worker of a shared study
    python rnn.py --config runs/.../best_config.yaml                  # train what it found in full
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import re
import signal
import sys
import textwrap
import threading
import time
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm import tqdm

import functions as fn
import rnn
from functions import RunConfig, check

if TYPE_CHECKING:
    import optuna

# ------------------------------------------------------------------------------------------------
# Configuration: every field is a flag
# ------------------------------------------------------------------------------------------------


@dataclass
class Config(RunConfig):
    """Settings of the study; what it tunes is in `suggest`."""

    space: Literal["default", "extended"] = "default"
    """what is tuned: the recipe's own numbers, or also cell, direction, pooling, regularisation and augmentation"""
    sampler: Literal["tpe", "random"] = "tpe"
    """how trials are drawn: the likes of the best so far (TPE), or all alike, to compare with"""
    cell: Literal["rnn", "lstm", "gru"] = "rnn"
    """kind of recurrent layer, unless the extended space draws it"""
    n_trials: int = 100
    """trials in all, of all workers together; a resumed study runs those that are missing"""
    epochs: int = 10
    """most epochs a trial may train"""
    validation_fraction: float = 0.1
    """share of each class's training images held out; their loss is what the study minimises"""
    train_fraction: float = 1.0
    """share of each class's other training images that trials see: less is cheaper, and compares them less surely"""
    timeout: float | None = None
    """start no new trial after this many seconds"""
    workers: int = 1
    """processes of this machine that run trials at the same time, and share its threads or its GPU"""
    storage: str | None = None
    """URL of a database that several workers share, each started with this command (SQLite in the run folder unless
    given)"""
    study_name: str = "rnn"
    """name of the study in the database"""
    heartbeat: int = 60
    """seconds after which a worker of a shared study that gives no sign of life counts as dead; its trial is retried"""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """float32, or bfloat16 autocast: faster for wide and deep networks, where the processor has it"""

    of_the_session = (*RunConfig.of_the_session, "workers")

    @property
    def may_grow(self) -> tuple[str, ...]:
        return ("n_trials",)

    def validate(self) -> None:
        super().validate()
        in_memory = self.storage in ("sqlite://", "sqlite:///:memory:")
        check(not in_memory, f"--storage {self.storage} lies in memory, where no other worker sees it: name a file")
        check(self.heartbeat >= 2, f"--heartbeat must be at least 2 seconds, got {self.heartbeat}")
        check(self.n_trials >= 1, f"--n_trials must be at least 1, got {self.n_trials}")
        check(self.epochs >= 1, f"--epochs must be at least 1, got {self.epochs}")
        check(self.workers >= 1, f"--workers must be at least 1, got {self.workers}")
        fraction = self.validation_fraction
        check(0 < fraction < 1, f"--validation_fraction must be between 0 and 1, got {fraction}")
        fraction = self.train_fraction
        check(0 < fraction <= 1, f"--train_fraction must be above 0 and at most 1, got {fraction}")
        check(
            self.timeout is None or 0 < self.timeout < math.inf,
            f"--timeout must be positive seconds, got {self.timeout}",
        )


# ------------------------------------------------------------------------------------------------
# The search space
# ------------------------------------------------------------------------------------------------


BATCH_SIZES = [32, 64, 128, 256]


def suggest(trial: optuna.trial.BaseTrial, config: Config) -> rnn.Config:
    """Draw one configuration of rnn.py from the search space."""
    shared = {key: value for key, value in asdict(config).items() if key in rnn.Config.__dataclass_fields__}
    shared |= {"output_dir": None, "resume": None}
    if config.space == "extended":
        return suggest_extended(trial, shared)
    return rnn.Config(
        **shared,
        hidden_size=trial.suggest_categorical("hidden_size", [128, 256, 512]),
        num_layers=trial.suggest_categorical("num_layers", [1, 3, 5]),
        l2=trial.suggest_categorical("l2", [16, 32, 64]),
        l3=trial.suggest_categorical("l3", [16, 32, 64]),
        learning_rate=trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True),
        weight_decay=trial.suggest_float("weight_decay", 5e-4, 1e-1, log=True),
        batch_size=trial.suggest_categorical("batch_size", BATCH_SIZES),
    )


def suggest_extended(trial: optuna.trial.BaseTrial, shared: dict[str, Any]) -> rnn.Config:
    """Draw one configuration from all that a recurrent network over rows may be given, beside `shared`."""
    num_layers = trial.suggest_int("num_layers", 1, 3)
    drawn = {
        "cell": trial.suggest_categorical("cell", list(rnn.CELLS)),
        "hidden_size": trial.suggest_categorical("hidden_size", [128, 256, 384]),
        "bidirectional": trial.suggest_categorical("bidirectional", [False, True]),
        "pooling": trial.suggest_categorical("pooling", ["last", "mean", "attention"]),
        "dropout": trial.suggest_float("dropout", 0.0, 0.5) if num_layers > 1 else 0.0,
        "l2": trial.suggest_categorical("l2", [64, 128, 256]),
        "l3": trial.suggest_categorical("l3", [64, 128, 256]),
        "learning_rate": trial.suggest_float("learning_rate", 3e-4, 1e-2, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-6, 1e-3, log=True),
        "batch_size": trial.suggest_categorical("batch_size", BATCH_SIZES[1:]),
        "warmup_epochs": trial.suggest_int("warmup_epochs", 0, min(3, shared["epochs"] - 1)),
        "gradient_clip": trial.suggest_float("gradient_clip", 0.1, 10.0, log=True),
        "label_smoothing": trial.suggest_float("label_smoothing", 0.0, 0.2),
        "crop_padding": trial.suggest_int("crop_padding", 0, 4),
        "flip": trial.suggest_categorical("flip", [False, True]),
    }
    return rnn.Config(**{**shared, **drawn}, num_layers=num_layers, schedule="one_cycle")


# ------------------------------------------------------------------------------------------------
# The study
# ------------------------------------------------------------------------------------------------


class NotCounted(Exception):
    """Ends a trial that is not part of the study: one beyond --n_trials, or one that another worker has taken over."""


def objective(trial: optuna.Trial, splits: rnn.Splits, config: Config) -> float:
    """Train the trial's configuration; returns its lowest validation loss. A trial that diverges counts as pruned.

    One that runs out of memory fails and is not tried again; any other error ends this worker, and the trial is
    another's. Raises NotCounted.
    """
    import optuna
    from optuna_integration import PyTorchLightningPruningCallback

    if place_in_study(trial.study, trial.number) >= config.n_trials:
        raise NotCounted  # several workers took up the last trial at the same moment
    drawn = suggest(trial, config)
    trial.set_user_attr("drawn", True)
    pruning = PyTorchLightningPruningCallback(trial, monitor="validation_loss")
    try:
        _, log = rnn.train(drawn, drawn.cell, splits, callbacks=[pruning])
    except fn.Diverged as diverged:
        trial.set_user_attr("diverged", True)
        raise optuna.TrialPruned(str(diverged)) from None
    except (MemoryError, RuntimeError) as error:
        if not fn.is_out_of_memory(error):
            raise
        trial.set_user_attr("error", f"out of memory: {error}")
        raise MemoryError from None
    return min(row["validation_loss"] for row in log.rows)


def was_interrupted(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial ended without an outcome and without an error of its own: another takes its place."""
    return trial.state.name == "FAIL" and "error" not in trial.user_attrs


def counted(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The study's trials, of all workers, finished or not, but for those that were interrupted."""
    return [trial for trial in study.get_trials(deepcopy=False) if not was_interrupted(trial)]


def place_in_study(study: optuna.Study, number: int) -> int:
    """How many trials came before this one, interrupted ones not counted."""
    return sum(trial.number < number for trial in counted(study))


def make_sampler(config: Config) -> optuna.samplers.BaseSampler:
    """A sampler whose draws follow from the seed, the trials so far, and the trial's place in the study.

    So a study that was interrupted draws what it would have drawn. Once several workers have been at it, the trial's
    number stands for the place, which may change while others are interrupted: no two trials draw alike.
    """
    import optuna

    # TPE among several workers takes trials that others run for bad ones, lest it draws the like of them.
    options = {"constant_liar": config.storage is not None} if config.sampler == "tpe" else {}
    base: Any = optuna.samplers.TPESampler if config.sampler == "tpe" else optuna.samplers.RandomSampler

    class Sampler(base):
        def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            several = config.storage or "workers" in study.user_attrs
            place = trial.number if several else place_in_study(study, trial.number)
            seed = fn.mix_seed(config.seed, place) % 2**32
            super().__init__(seed=seed, **options)  # the public way to seed it anew
            super().before_trial(study, trial)

    return Sampler()


def retry(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Queue the configuration of a trial whose worker died again, unless it has cost three workers their life."""
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    if trial.user_attrs.pop("drawn", False):  # its next worker says so again
        RetryHeartbeatStaleTrialCallback(max_retry=3)(study, trial)


def connect(config: Config, url: str) -> optuna.Study:
    """The study in the database at `url`, made if it is not there. Raises what the database's driver raises."""
    import optuna

    storage = optuna.storages.RDBStorage(
        url,
        heartbeat_interval=max(1, config.heartbeat // 4) if config.storage else None,
        grace_period=config.heartbeat if config.storage else None,
        heartbeat_stale_trial_callback=retry if config.storage else None,
        engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None,  # to await a lock
    )
    return optuna.create_study(storage=storage, study_name=config.study_name, load_if_exists=True, direction="minimize")


def open_study(config: Config, url: str) -> optuna.Study:
    """The study in the database at `url`, made if it is not there; UserError when that fails or it is of other data.

    A shared study's workers give signs of life (heartbeats); when one's cease, another worker retries its trial.
    """
    import optuna
    import sqlalchemy.exc

    for attempt in range(4):  # of workers that start at the same moment, one alone succeeds in making the tables
        try:
            study = connect(config, url)
            break
        except Exception as error:  # whatever the database's driver raises
            if attempt < 3 and isinstance(error, sqlalchemy.exc.DBAPIError):
                time.sleep(0.5 * 2**attempt)
                continue
            raise fn.UserError(f"--storage {database_problem(url, error)}: check the URL") from None
    require_same_task(study, config)
    study.sampler = make_sampler(config)
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    if not config.storage:  # nobody else can be at work on it: what seems to run was killed
        for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def database_problem(url: str, error: Exception) -> str:
    """One line about a database that fails, without the password that its URL may hold."""
    password = re.search(r"//[^/@]*:([^/@]+)@", url)
    reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
    text = f"{url} cannot be used ({reason})"
    return text.replace(password[1], "***") if password else text


def require_same_task(study: optuna.Study, config: Config) -> None:
    """Note in a new study what it is about; raise UserError if an older one is about something else."""
    from optuna.study import StudyDirection

    keys = ["dataset", "image_size", "validation_fraction", "train_fraction", "seed", "space", "sampler", "cell"]
    if config.space == "extended":
        keys.remove("cell")  # drawn
    task = {key: getattr(config, key) for key in (*keys, "epochs", "precision", "heartbeat")}
    another = f"--study_name {config.study_name}"
    ours = not study.get_trials(deepcopy=False) and study.directions == [StudyDirection.MINIMIZE]
    noted = study.user_attrs.get("task")  # read after the trials: a worker that starts now notes it before it tries
    if noted is None:
        check(ours, f"{another} is the study of another program: name another study")
        study.set_user_attr("task", task)
        return
    theirs = {key: noted.get(key, getattr(Config, key)) for key in task}  # an older study lacks newer keys
    other = [f"--{key} {theirs[key]}" for key in task if theirs[key] != task[key]]
    check(not other, f"{another} has trials with {', '.join(other)}: name another study")


def n_finished(study: optuna.Study) -> int:
    """How many of the study's trials have come to an end of their own."""
    return sum(trial.state.is_finished() for trial in counted(study))


class Progress:
    """A line for each trial that ends, with what was drawn if it is the best so far; on a terminal, a bar below."""

    def __init__(self, study: optuna.Study, config: Config) -> None:
        self.n_trials, done = config.n_trials, n_finished(study)
        hidden = not sys.stdout.isatty()
        self.bar = tqdm(total=self.n_trials, initial=done, desc="study", leave=False, disable=hidden)

    def __call__(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if was_interrupted(trial):
            return
        best = "none complete yet"
        if any(other.state.name == "COMPLETE" for other in counted(study)):
            best = f"best {study.best_value:.4f} (trial {place_in_study(study, study.best_trial.number) + 1})"
        place = place_in_study(study, trial.number) + 1
        tqdm.write(f"trial {place:>{len(str(self.n_trials))}}/{self.n_trials}  {describe_trial(trial, best)}")
        if trial.state.name == "COMPLETE" and trial.number == study.best_trial.number:
            drawn = (f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items())
            tqdm.write(textwrap.fill(", ".join(drawn), 110, initial_indent="    ", subsequent_indent="    "))
        sys.stdout.flush()
        self.bar.set_postfix_str(best, refresh=False)
        self.bar.update(n_finished(study) - self.bar.n)


def describe_trial(trial: optuna.trial.FrozenTrial, best: str) -> str:
    """How a trial ended, and the best of the study so far: one line."""
    epochs, state = len(trial.intermediate_values), trial.state.name.lower()
    outcome = f"loss {trial.value:.4f}" if trial.value is not None else "loss   -   "
    if "error" in trial.user_attrs:
        outcome = trial.user_attrs["error"].partition(":")[0]
    return f"{state:8}  {epochs:2} epochs  {outcome}  {best}"


def run_study(study: optuna.Study, splits: rnn.Splits, config: Config) -> None:
    """Run the trials that are missing, one after the other; those that other workers have begun are waited for."""
    deadline = time.monotonic() + (config.timeout or math.inf)
    progress = Progress(study, config)
    seen: dict[int, float] = {}
    while time.monotonic() < deadline:
        trials = counted(study)
        states = [trial.state.name for trial in trials]
        if "WAITING" in states or len(states) < config.n_trials:
            run_trial(study, splits, config, progress)
        elif "RUNNING" not in states:
            break
        else:
            if not seen:
                print(f"waiting for {states.count('RUNNING')} trials of other workers", flush=True)
            seen = {t.number: seen.get(t.number, time.monotonic()) for t in trials if t.state.name == "RUNNING"}
            wait_for_others(study, seen, config)
    progress.bar.close()
    print_what_is_left(study, config)


def print_what_is_left(study: optuna.Study, config: Config) -> None:
    left = config.n_trials - n_finished(study)
    over = "" if config.timeout is None else "--timeout is over; "
    rest = f"{over}{left} of {config.n_trials} trials are not finished: go on with --resume"
    print(rest if left > 0 else f"all {config.n_trials} trials are done")


def run_workers(study: optuna.Study, config: Config, url: str) -> None:
    """Start --workers processes on the study, and show what they do until all have ended.

    Raises UserError if all of them were lost; if some were, the others do their trials.
    """
    one = replace(config, storage=url, workers=1, output_dir=None, resume=None)
    threads = max(1, torch.get_num_threads() // config.workers)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(one, threads), daemon=True) for _ in range(config.workers)]
    shown = {trial.number for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()}
    study.set_user_attr("workers", config.workers)
    progress = Progress(study, config)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the workers: Ctrl-C is for this process
    for worker in workers:
        worker.start()
    signal.signal(signal.SIGINT, handler)
    try:
        at_work = True
        while at_work:
            at_work = any(worker.is_alive() for worker in workers)
            for trial in study.get_trials(deepcopy=False):
                if trial.state.is_finished() and trial.number not in shown:
                    shown.add(trial.number)
                    progress(study, trial)
            time.sleep(0.2)
    finally:
        progress.bar.close()
        for worker in workers:
            worker.kill()
            worker.join()
    lost = [worker.exitcode for worker in workers if worker.exitcode]
    what = f"{len(lost)} of {config.workers} were lost, status {lost}"
    check(len(lost) < config.workers or n_finished(study) == config.n_trials, f"--workers: {what}: go on with --resume")
    if lost:
        print(f"warning: of the workers, {what}", file=sys.stderr)
    print_what_is_left(study, config)


def work(config: Config, threads: int) -> None:
    """What each of --workers processes does: trials of the shared study, until it is complete."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed process leaves
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the first process says what there is to say
    torch.set_num_threads(threads)
    quiet_optuna()
    assert config.storage is not None
    ended_by: tuple[type[Exception], ...] = (fn.UserError, *database_errors())
    try:
        run_study(open_study(config, config.storage), load_splits(config), config)
    except ended_by as error:
        print(f"a worker ended: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def end_with_parent() -> None:
    """End this worker when the process that started it is gone, however that was ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run_trial(study: optuna.Study, splits: rnn.Splits, config: Config, progress: Progress) -> None:
    """Run one trial, whatever becomes of it."""
    try:
        study.optimize(
            lambda trial: objective(trial, splits, config),
            n_trials=1,
            callbacks=[progress],
            catch=(MemoryError, NotCounted),
            gc_after_trial=True,  # Lightning's objects refer to each other: let a trial's memory go before the next
        )
    except (ValueError, AssertionError, UnboundLocalError) as error:  # Optuna's, which stumbles over the real reason
        reasons: list[BaseException] = [error]
        while reason := reasons[-1].__context__:
            reasons.append(reason)
        if any("Cannot tell" in str(reason) for reason in reasons):
            lost = "a trial was given to another worker, as this one gave no sign of life: raise --heartbeat"
            print(lost, file=sys.stderr)
            return
        raise next((reason for reason in reasons if isinstance(reason, database_errors())), error) from None


def database_errors() -> tuple[type[Exception], ...]:
    """What is raised when a database fails."""
    import optuna
    import sqlalchemy.exc

    return sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError


def wait_for_others(study: optuna.Study, seen: dict[int, float], config: Config) -> None:
    """Wait a second, then fail trials whose workers have died; `seen` tells since when a trial has been waited for.

    Optuna does so by the heartbeats; a worker killed before its trial's first one is noticed by its drawing nothing.
    """
    import optuna

    time.sleep(1)
    optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        waited = time.monotonic() - seen.get(trial.number, time.monotonic())
        if waited > config.heartbeat and "drawn" not in trial.user_attrs:
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # another worker was faster
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)


# ------------------------------------------------------------------------------------------------
# The outcome
# ------------------------------------------------------------------------------------------------


def best_config(study: optuna.Study, config: Config) -> rnn.Config:
    """The best trial's configuration for rnn.py, to be trained in full: with rnn.py's own number of epochs."""
    return replace(suggest(study.best_trial, config), epochs=rnn.Config.epochs)


def plot_study(study: optuna.Study, folder: Path) -> None:
    """Optuna's own figures of the study; those that compare trials need four that were completed."""
    import matplotlib.pyplot as plt  # which Optuna's figures belong to
    import numpy as np
    from optuna.visualization import matplotlib as plots

    complete = sum(trial.state.name == "COMPLETE" for trial in study.get_trials(deepcopy=False))
    drawn = len({name for trial in study.get_trials(deepcopy=False) for name in trial.params})
    loss = "validation loss"
    figures: dict[str, tuple[Any, float, Any]] = {  # how it is plotted, its width in inches, and how it is dressed
        "history": (
            partial(plots.plot_optimization_history, target_name=loss),
            9,
            lambda axes, _: axes.set_xlabel("trial (Optuna counts from 0)"),
        ),
        "intermediate_values": (plots.plot_intermediate_values, 9, dress_intermediate_values),
    }
    if complete >= 4:
        figures |= {
            "importances": (
                partial(plots.plot_param_importances, target_name=loss),
                9,
                lambda axes, _: axes.set_title("Hyperparameter importances (PED-ANOVA) among completed trials"),
            ),
            "parallel_coordinates": (
                partial(plots.plot_parallel_coordinate, target_name=loss),
                6 + 0.8 * drawn,
                dress_parallel_coordinates,
            ),
            "slices": (partial(plots.plot_slice, target_name=loss), 2.2 * drawn, dress_slices),
        }
    for name, (plot, width, dress) in figures.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna's matplotlib figures are "experimental"
            axes = np.atleast_1d(plot(study))[0]
            dress(axes, study)
            axes.figure.set_size_inches(width, 5)
            fn.save_figure(axes.figure, folder / f"{name}.png")
        plt.close(axes.figure)


def dress_intermediate_values(axes: Any, study: optuna.Study) -> None:
    """Pruned trials in grey, completed ones in blue; epochs from 1 (Lightning counts from 0); no list of trials."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="epoch", ylabel="validation loss", yscale="log", title="Trials, pruned (grey) and completed (blue)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(lambda epoch, _: f"{epoch + 1:g}")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks(lambda value, _: f"{value:g}")
    if legend := axes.get_legend():
        legend.remove()
    pruned = {f"Trial{trial.number}" for trial in study.get_trials(deepcopy=False) if trial.state.name == "PRUNED"}
    for line in axes.get_lines():
        grey = line.get_label() in pruned
        line.set(color="0.65" if grey else "tab:blue", zorder=2 if grey else 3)


def dress_parallel_coordinates(axes: Any, study: optuna.Study) -> None:
    """Without a grid, which would belong to the first of its many scales alone; no line runs through a number."""
    import optuna
    from matplotlib.ticker import MaxNLocator

    first, _colorbar, *scales = axes.figure.axes
    first.grid(False)
    kinds = {name: kind for t in study.get_trials(deepcopy=False) for name, kind in t.distributions.items()}
    for name, scale in zip((label.get_text() for label in first.get_xticklabels()[1:]), scales, strict=True):
        scale.grid(False)
        scale.yaxis.set_minor_formatter("")
        if isinstance(kinds.get(name), optuna.distributions.IntDistribution):
            scale.yaxis.set_major_locator(MaxNLocator(integer=True))
    for label in (label for scale in scales[:-1] for label in scale.get_yticklabels()):  # the last stand outside
        label.set_bbox({"facecolor": first.get_facecolor(), "alpha": 0.8, "linewidth": 0, "pad": 1})


def dress_slices(axes: Any, study: optuna.Study) -> None:
    """Upright numbers below narrow panels, so that they do not run into each other."""
    for panel in axes.figure.axes[:-1]:  # the last is the colour bar
        panel.tick_params(axis="x", rotation=90)
        if panel.get_xscale() == "log":
            panel.xaxis.set_minor_formatter("")


def saved_by_pruning(study: optuna.Study, config: Config) -> dict[str, float]:
    """Epochs and seconds that were spent, and those that pruned trials would have taken beside, at their own pace.

    Trials that diverged are not counted as saving anything, as they could not have gone on.
    """
    spent = {"epochs": 0, "epochs_saved": 0, "seconds": 0.0, "seconds_saved": 0.0}
    for trial in counted(study):
        if trial.duration is None:
            continue
        epochs, seconds = len(trial.intermediate_values), trial.duration.total_seconds()
        spent["epochs"] += epochs
        spent["seconds"] += seconds
        diverged = "diverged" in trial.user_attrs or not all(map(math.isfinite, trial.intermediate_values.values()))
        if trial.state.name == "PRUNED" and epochs and not diverged:
            spent["epochs_saved"] += config.epochs - epochs
            spent["seconds_saved"] += (config.epochs - epochs) * seconds / epochs
    return {name: round(value, 1) for name, value in spent.items()}


def save_trials(study: optuna.Study, file: Path) -> None:
    """All trials as CSV, in the order in which they began: how each ended, and what was drawn for it."""
    rows = [
        {"trial": place + 1, "state": t.state.name, "epochs": len(t.intermediate_values), "value": t.value, **t.params}
        for place, t in enumerate(counted(study))
    ]
    fn.write_csv(file, rows)


def print_best(study: optuna.Study) -> list[dict[str, Any]]:
    """A table of the five best trials, one to a column; returns them for results.json."""
    best = sorted((t for t in counted(study) if t.state.name == "COMPLETE"), key=lambda trial: trial.value or 0.0)[:5]
    places = [place_in_study(study, trial.number) + 1 for trial in best]
    table = {"trial": [str(place) for place in places], "validation loss": [f"{trial.value:.4f}" for trial in best]}
    for name in dict.fromkeys(name for trial in best for name in trial.params):
        values = [trial.params.get(name, "-") for trial in best]
        table[name] = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
    for name, texts in table.items():
        print(f"    {name:15}" + "".join(f"{text:>11}" for text in texts))
    return [{"trial": place, "value": t.value, "params": t.params} for place, t in zip(places, best, strict=True)]


def report(study: optuna.Study, config: Config, folder: Path) -> dict[str, Any]:
    """Print the best trials, write trials.csv, best_config.yaml and the figures; returns results.json's part."""
    from optuna.trial import TrialState

    trials = counted(study)
    save_trials(study, folder / "trials.csv")
    count = {state: sum(t.state == state for t in trials) for state in TrialState}
    outcome: dict[str, Any] = {
        "trials": len(trials),
        "pruned": count[TrialState.PRUNED],
        "failed": count[TrialState.FAIL],
        "workers": config.workers,
    }
    if not count[TrialState.COMPLETE]:
        print("no trial was completed: raise --n_trials or --timeout, and go on with --resume")
        return {"study": outcome}
    outcome |= {"best_value": study.best_value, "best_params": study.best_params}
    outcome |= (spent := saved_by_pruning(study, config))
    file = folder / "best_config.yaml"
    fn.save_config(file, best_config(study, config))
    plot_study(study, folder)
    print(f"\nthe best of {len(trials)} trials ({outcome['pruned']} pruned, {outcome['failed']} failed):")
    outcome["best_trials"] = print_best(study)
    epochs, seconds = (spent[unit] + spent[f"{unit}_saved"] for unit in ("epochs", "seconds"))
    print(
        f"pruning saved {spent['epochs_saved']:,.0f} of {epochs:,.0f} epochs, about "
        f"{fn.format_time(spent['seconds_saved'])} of {fn.format_time(seconds)} of computing"
    )
    print(f"train the first in full: python rnn.py --config {file}")
    return {"study": outcome, "best_config": str(file)}


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------


def quiet_optuna() -> None:
    """Its log would repeat what is printed here, and heartbeats are "experimental"."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def load_splits(config: Config) -> rnn.Splits:
    """The images that every trial is trained and validated on. Raises UserError for too few."""
    data = fn.load_dataset(config.dataset, config.data_dir, config.image_size)
    splits = rnn.split(data, rnn.Config(seed=config.seed, validation_fraction=config.validation_fraction, batch_size=2))
    images, labels = splits.train
    seen = fn.stratified_subset(labels, config.train_fraction, config.seed)
    flag = f"--dataset {data.name}" if config.train_fraction == 1 else f"--train_fraction {config.train_fraction}"
    check(
        len(seen) >= max(BATCH_SIZES),
        f"{flag}: {len(seen)} training images are too few for batch size {max(BATCH_SIZES)}",
    )
    return replace(splits, train=(images[seen], labels[seen]))


def main(config: Config) -> None:
    import sqlalchemy

    record = fn.start_record(config)
    quiet_optuna()
    splits = load_splits(config)
    print(
        f"tuning {'recurrent networks' if config.space == 'extended' else f'the {config.cell}'} on {config.dataset}: "
        f"{config.n_trials} trials of at most {config.epochs} epochs, "
        f"{len(splits.train[0]):,} training and {len(splits.validation[0]):,} validation images; "
        f"{fn.describe_machine(config)}"
    )
    shared = open_study(config, config.storage) if config.storage else None  # before a folder is made for nothing
    with fn.run_folder(config) as folder:
        url = config.storage or str(sqlalchemy.URL.create("sqlite", database=str(folder / "study.db")))
        study = shared or open_study(config, url)
        if done := n_finished(study):
            print(f"going on with the study {config.study_name}: {done} trials are there")
        try:
            if config.workers == 1:
                run_study(study, splits, config)
            else:
                run_workers(study, config, url)
            fn.save_results(folder, record, **report(study, config, folder))
        except database_errors() as error:
            problem = f"--storage {database_problem(url, error)}"
            raise fn.UserError(f"{problem}: mend that, then go on with --resume {folder}") from None


if __name__ == "__main__":
    fn.command_line(main, Config, __doc__)
