"""Tune rnn.py's network with Optuna: which widths, depth, learning rate and batch size suit?

With --space extended also: which cell, direction, pooling, regularisation and augmentation? Every
trial draws a configuration (TPE, Bergstra et al. 2011), trains it with Lightning for at most
--epochs epochs, and is stopped early when its lowest validation loss so far is above the median of
what completed trials had by that epoch. The test images stay unseen.

    python rnn_hyperparameter_tune.py                                 # CIFAR-10, 100 trials
    python rnn_hyperparameter_tune.py --dataset digits --n_trials 20  # no download, a minute
    python rnn_hyperparameter_tune.py --space extended --workers 2    # two processes at a time
    python rnn_hyperparameter_tune.py --resume                        # continue the newest study
    python rnn_hyperparameter_tune.py --storage postgresql+psycopg://HOST/DATABASE  # share a study
    python rnn.py --config runs/.../best_config.yaml                  # train what it found in full

What keeps a study alive among its workers stands in machinery/trials.py.
"""

from __future__ import annotations

import math
import os
import sys
import textwrap
import threading
import warnings
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from tqdm import tqdm

import functions as fn
import rnn
from functions import check, trials

if TYPE_CHECKING:
    import optuna

# ------------------------------------------------------------------------------------------------
# Settings: every field is a flag
# ------------------------------------------------------------------------------------------------


@dataclass
class Study(fn.RunConfig):
    """What is tuned, and how; the search space is in `suggest`."""

    title: ClassVar[str] = "study"

    space: Literal["default", "extended"] = "default"
    """what is tuned: the recipe's own numbers, or also cell, direction, pooling, regularisation
    and augmentation"""
    sampler: Literal["tpe", "random"] = "tpe"
    """how trials are drawn: close to the best so far (TPE), or at random, to compare with"""
    cell: Literal["rnn", "lstm", "gru"] = "rnn"
    """kind of recurrent layer, unless the extended space draws it"""
    n_trials: int = 100
    """trials in all, of all workers together; a resumed study runs those that are missing"""
    epochs: int = 10
    """most epochs a trial may train"""
    validation_fraction: float = 0.1
    """share of each class's training images held out; their loss is what the study minimises"""
    train_fraction: float = 1.0
    """share of each class's other training images that trials see: less is cheaper, and compares
    them less surely"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """float32, or bfloat16 autocast: faster for wide and deep networks, where the processor has
    it"""

    @property
    def may_grow(self) -> tuple[str, ...]:
        return ("n_trials",)

    def validate(self) -> None:
        super().validate()
        self.require("n_trials epochs", fn.at_least(1))
        self.require("validation_fraction", fn.PART)
        self.require("train_fraction", fn.SHARE)


@dataclass
class Workers(fn.RunConfig):
    """Who runs the trials."""

    title: ClassVar[str] = "workers"
    of_the_session = (*fn.RunConfig.of_the_session, "workers")

    timeout: float | None = None
    """start no new trial after this many seconds"""
    workers: int = 1
    """processes of this machine that run trials at the same time, and share its threads or GPU"""
    storage: str | None = None
    """URL of a database that several workers share, each started with this command (SQLite in the
    run folder unless given)"""
    study_name: str = "rnn"
    """name of the study in the database"""
    heartbeat: int = 60
    """seconds after which a worker of a shared study that gives no sign of life counts as dead;
    its trial is retried"""

    def validate(self) -> None:
        super().validate()
        in_memory = self.storage in ("sqlite://", "sqlite:///:memory:")
        remedy = "where no other worker sees it: name a file"
        check(not in_memory, f"--storage {self.storage} lies in memory, {remedy}")
        self.require("workers", fn.at_least(1))
        self.require("heartbeat", fn.at_least(2))
        self.require("timeout", fn.POSITIVE)


@dataclass
class Config(Workers, Study, fn.RunConfig):
    """All settings. RunConfig stands last so that a config.yaml begins with the data set."""

    script: ClassVar[str] = "rnn_hyperparameter_tune.py"
    unsuited: ClassVar[tuple[str, ...]] = rnn.Config.unsuited


# ------------------------------------------------------------------------------------------------
# The search space
# ------------------------------------------------------------------------------------------------


BATCH_SIZES = [32, 64, 128, 256]


def suggest(trial: optuna.trial.BaseTrial, config: Config) -> rnn.Config:
    """Draw one configuration of rnn.py from the search space."""
    shared = {field.name for field in fields(rnn.Config)} - {"output_dir", "resume"}
    fixed = {key: value for key, value in asdict(config).items() if key in shared}
    if config.space == "extended":
        return suggest_extended(trial, fixed)
    return rnn.Config(
        **fixed,
        hidden_size=trial.suggest_categorical("hidden_size", [128, 256, 512]),
        num_layers=trial.suggest_categorical("num_layers", [1, 3, 5]),
        l2=trial.suggest_categorical("l2", [16, 32, 64]),
        l3=trial.suggest_categorical("l3", [16, 32, 64]),
        learning_rate=trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True),
        weight_decay=trial.suggest_float("weight_decay", 5e-4, 1e-1, log=True),
        batch_size=trial.suggest_categorical("batch_size", BATCH_SIZES),
    )


def suggest_extended(trial: optuna.trial.BaseTrial, fixed: dict[str, Any]) -> rnn.Config:
    """Draw all that a recurrent network over rows may be given, beside what is `fixed`."""
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
        "warmup_epochs": trial.suggest_int("warmup_epochs", 0, min(3, fixed["epochs"] - 1)),
        "gradient_clip": trial.suggest_float("gradient_clip", 0.1, 10.0, log=True),
        "label_smoothing": trial.suggest_float("label_smoothing", 0.0, 0.2),
        "crop_padding": trial.suggest_int("crop_padding", 0, 4),
        "flip": trial.suggest_categorical("flip", [False, True]),
    }
    return rnn.Config(**{**fixed, **drawn}, num_layers=num_layers, schedule="one_cycle")


def make_sampler(config: Config) -> optuna.samplers.BaseSampler:
    """A sampler whose draws follow from the seed, the trials so far, and the trial's place.

    So a study that was interrupted draws what it would have drawn. Once several workers have been
    at it, the trial's number stands for its place, which may change while others are interrupted:
    no two trials are drawn alike.
    """
    import optuna

    def seeded(seed: int) -> optuna.samplers.BaseSampler:
        if config.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        # Among several workers, TPE takes trials that others still run for bad ones: it would
        # draw something close to them otherwise.
        several = config.storage is not None
        return optuna.samplers.TPESampler(seed=seed, constant_liar=several)

    class SeededAnew(optuna.samplers.BaseSampler):
        """Draws each trial with a fresh sampler of its own seed."""

        def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            several = config.storage or "workers" in study.user_attrs
            place = trial.number if several else trials.place_in_study(study, trial.number)
            self.fresh = seeded(fn.mix_seed(config.seed, place) % 2**32)
            self.fresh.before_trial(study, trial)

        def infer_relative_search_space(self, *of: Any) -> dict[str, Any]:
            return self.fresh.infer_relative_search_space(*of)

        def sample_relative(self, *of: Any) -> dict[str, Any]:
            return self.fresh.sample_relative(*of)

        def sample_independent(self, *of: Any) -> Any:
            return self.fresh.sample_independent(*of)

    return SeededAnew()


# ------------------------------------------------------------------------------------------------
# The trials
# ------------------------------------------------------------------------------------------------


def objective(trial: optuna.Trial, splits: rnn.Splits, config: Config) -> float:
    """Train the trial's configuration; returns its lowest validation loss.

    A trial that diverges counts as pruned. One that runs out of memory fails and is not tried
    again. Any other error ends this worker, and the trial is another's. Raises NotCounted.
    """
    import optuna
    from optuna_integration import PyTorchLightningPruningCallback

    if trials.place_in_study(trial.study, trial.number) >= config.n_trials:
        raise trials.NotCounted  # several workers took up the last trial at the same moment

    try:
        drawn = suggest(trial, config)
        check_inside(trial)
    except (fn.UserError, ValueError, TypeError) as error:  # of what a user has put in the queue
        ours = trial.study.get_trials(deepcopy=False)[trial.number]
        queued = ours.system_attrs.get("fixed_params")
        if not queued:
            raise
        trial.set_user_attr("error", f"outside of the search space: {queued} ({error})")
        raise trials.Unusable from None
    trial.set_user_attr("drawn", True)
    pruning = PyTorchLightningPruningCallback(trial, monitor="validation_loss")
    try:
        trained = rnn.train(drawn, drawn.cell, splits, callbacks=[pruning])
    except fn.Diverged as diverged:
        trial.set_user_attr("diverged", True)
        raise optuna.TrialPruned(str(diverged)) from None
    except (MemoryError, RuntimeError) as error:
        if not fn.is_out_of_memory(error):
            raise
        trial.set_user_attr("error", "out of memory")
        trial.set_user_attr("details", str(error))
        raise MemoryError from None
    return min(row["validation_loss"] for row in trained.rows)


def check_inside(trial: optuna.Trial) -> None:
    """Raise UserError where a trial's value lies outside of its range: Optuna takes any number."""
    for name, value in trial.params.items():
        space = trial.distributions[name]
        inside = space._contains(space.to_internal_repr(value))
        check(inside, f"{name} {value} is none of {space}")


def open_study(config: Config, url: str, data: dict[str, Any]) -> optuna.Study:
    """The study of `data` in the database at `url`, made if it is not there.

    Raises UserError when the database fails, or the study is about something else.
    """
    import optuna

    heartbeat = config.heartbeat if config.storage else None
    study = trials.open_database(url, config.study_name, heartbeat)
    require_same_task(study, config)
    trials.require_same_data(study, config.dataset, data)
    study.sampler = make_sampler(config)
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    if not config.storage:  # nobody else can be at work on it
        trials.fail_what_was_killed(study)
    return study


def require_same_task(study: optuna.Study, config: Config) -> None:
    """Raise UserError if the study has trials that these settings would not have made."""
    keys = ["image_size", "validation_fraction", "train_fraction", "seed", "space"]
    keys += ["sampler", "cell", "epochs", "precision", "heartbeat"]
    if config.space == "extended":
        keys.remove("cell")  # drawn
    task = {key: getattr(config, key) for key in keys}
    older = {key: getattr(Config, key) for key in keys}
    trials.require_same_task(study, task, older)


class Progress:
    """A line for each trial that ends, with what was drawn if it is the best; a bar below."""

    def __init__(self, study: optuna.Study, config: Config) -> None:
        self.n_trials = config.n_trials
        self.bar = tqdm(
            total=self.n_trials,
            initial=trials.n_finished(study),
            desc="study",
            leave=False,
            disable=not sys.stdout.isatty(),
        )

    def __call__(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if trials.was_interrupted(trial):
            return
        best = "none complete yet"
        if any(other.state.name == "COMPLETE" for other in trials.counted(study)):
            place = trials.place_in_study(study, study.best_trial.number) + 1
            best = f"best {study.best_value:.4f} (trial {place})"

        place = trials.place_in_study(study, trial.number) + 1
        counter = f"trial {place:>{len(str(self.n_trials))}}/{self.n_trials}"
        tqdm.write(f"{counter}  {describe_trial(trial, best)}")
        if trial.state.name == "COMPLETE" and trial.number == study.best_trial.number:
            drawn = ", ".join(f"{name} {short(value)}" for name, value in trial.params.items())
            indent = " " * 4
            lines = textwrap.fill(drawn, 100, initial_indent=indent, subsequent_indent=indent)
            tqdm.write(lines)

        sys.stdout.flush()
        self.bar.set_postfix_str(best, refresh=False)
        self.bar.update(trials.n_finished(study) - self.bar.n)


def short(value: Any, digits: int = 2) -> str:
    """A drawn value for people: two significant digits of a number, unless told otherwise."""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def describe_trial(trial: optuna.trial.FrozenTrial, best: str) -> str:
    """How a trial ended, and the best of the study so far: one line."""
    epochs, state = len(trial.intermediate_values), trial.state.name.lower()
    outcome = f"loss {trial.value:.4f}" if trial.value is not None else "loss   -   "
    if "error" in trial.user_attrs:
        outcome = textwrap.shorten(trial.user_attrs["error"], 90)
    return f"{state:8}  {epochs:2} epochs  {outcome}  {best}"


def run_study(study: optuna.Study, splits: rnn.Splits, config: Config) -> None:
    """Run the trials that are missing, one after the other."""
    progress = Progress(study, config)
    trials.run_trials(
        study,
        partial(objective, splits=splits, config=config),
        progress,
        n_trials=config.n_trials,
        heartbeat=config.heartbeat,
        timeout=config.timeout,
    )
    progress.bar.close()
    print_what_is_left(study, config)


def print_what_is_left(study: optuna.Study, config: Config) -> None:
    left = config.n_trials - trials.n_finished(study)
    if left <= 0:
        print(f"all {config.n_trials} trials are done")
        return
    over = "" if config.timeout is None else "--timeout is over; "
    print(f"{over}{left} of {config.n_trials} trials are not finished: go on with --resume")


def run_workers(study: optuna.Study, config: Config, url: str) -> None:
    """Start --workers processes on the study, and show what they do until all have ended.

    Raises UserError if all of them were lost; if some were, the others do their trials.
    """
    one = replace(config, storage=url, workers=1, output_dir=None, resume=None)
    threads = max(1, torch.get_num_threads() // config.workers)
    study.set_user_attr("workers", config.workers)
    progress = Progress(study, config)
    try:
        lost = trials.run_workers(study, work, (one, threads), progress, config.workers)
    finally:
        progress.bar.close()

    what = f"{len(lost)} of {config.workers} were lost, status {lost}"
    some_left = len(lost) < config.workers or trials.n_finished(study) == config.n_trials
    check(some_left, f"--workers: {what}: go on with --resume")
    if lost:
        print(f"warning: of the workers, {what}", file=sys.stderr)
    print_what_is_left(study, config)


def work(config: Config, threads: int, index: int) -> None:
    """What each of --workers processes does: trials of the shared study, until it is complete.

    Worker `index` computes on one of the machine's GPUs, in turn.
    """
    fn.take_gpu(index)
    threading.Thread(target=trials.end_with_parent, daemon=True).start()
    with fn.lasting_output():
        work_quietly(config, threads)


def work_quietly(config: Config, threads: int) -> None:
    """`work`, with nothing on stdout: the first process says what there is to say."""
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed process leaves behind
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the whole process
    torch.set_num_threads(threads)
    trials.quiet_optuna()

    assert config.storage is not None
    ended_by: tuple[type[Exception], ...] = (fn.UserError, *trials.database_errors())
    try:
        splits, data = load_splits(config)
        run_study(open_study(config, config.storage, data), splits, config)
    except ended_by as error:
        print(f"a worker ended: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


# ------------------------------------------------------------------------------------------------
# The outcome
# ------------------------------------------------------------------------------------------------


def best_config(study: optuna.Study, config: Config) -> rnn.Config:
    """The best trial's configuration, to be trained in full: with rnn.py's number of epochs."""
    return replace(suggest(study.best_trial, config), epochs=rnn.Config.epochs)


@fn.drawing
def plot_study(study: optuna.Study, folder: Path) -> None:
    """Optuna's own figures of the study; importances need four trials that were completed."""
    import matplotlib.pyplot as plt  # which Optuna's figures belong to
    from optuna.visualization import matplotlib as plots

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's matplotlib figures are "experimental"

        figures: dict[str, Any] = {}
        loss = "validation loss"
        figures["history"] = plots.plot_optimization_history(study, target_name=loss)
        figures["history"].set_xlabel("trial (Optuna counts from 0)")

        figures["intermediate_values"] = plots.plot_intermediate_values(study)
        dress_intermediate_values(figures["intermediate_values"], study)

        complete = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
        if len(complete) >= 4:
            importances = plots.plot_param_importances(study, target_name=loss)
            title = "Hyperparameter importances (PED-ANOVA) among completed trials"
            importances.set_title(title, loc="left")  # where Optuna's own stands, to replace it
            figures["importances"] = importances

        for name, axes in figures.items():
            axes.figure.set_size_inches(9, 5)
            fn.save_figure(axes.figure, folder / f"{name}.png")
            plt.close(axes.figure)


def dress_intermediate_values(axes: Any, study: optuna.Study) -> None:
    """Pruned trials in grey, completed ones in blue; epochs from 1 (Lightning counts from 0)."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axes.set(xlabel="epoch", ylabel="validation loss", yscale="log")
    axes.set(title="Trials, pruned (grey) and completed (blue)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(lambda epoch, _: f"{epoch + 1:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # all nine would touch
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    if legend := axes.get_legend():  # an entry for every trial
        legend.remove()

    ended = study.get_trials(deepcopy=False)
    pruned = {f"Trial{trial.number}" for trial in ended if trial.state.name == "PRUNED"}
    for line in axes.get_lines():
        grey = line.get_label() in pruned
        line.set(color="0.65" if grey else "tab:blue", zorder=2 if grey else 3)


def saved_by_pruning(study: optuna.Study, config: Config) -> dict[str, float]:
    """Epochs and seconds that were spent, and that pruned trials would have taken besides.

    At their own pace. Trials that diverged save nothing, as they could not have gone on.
    """
    spent = {"epochs": 0, "epochs_saved": 0, "seconds": 0.0, "seconds_saved": 0.0}
    for trial in trials.counted(study):
        if trial.duration is None:
            continue
        losses, seconds = trial.intermediate_values.values(), trial.duration.total_seconds()
        epochs = len(losses)
        spent["epochs"] += epochs
        spent["seconds"] += seconds

        diverged = "diverged" in trial.user_attrs or not all(map(math.isfinite, losses))
        if trial.state.name == "PRUNED" and epochs and not diverged:
            spent["epochs_saved"] += config.epochs - epochs
            spent["seconds_saved"] += (config.epochs - epochs) * seconds / epochs
    return {name: round(value, 1) for name, value in spent.items()}


def save_trials(study: optuna.Study, file: Path) -> None:
    """All trials as CSV, in the order in which they began: how each ended, and what was drawn."""
    rows = [
        {
            "trial": place,
            "state": trial.state.name,
            "epochs": len(trial.intermediate_values),
            "value": trial.value,
            **trial.params,
        }
        for place, trial in enumerate(trials.counted(study), 1)
    ]
    fn.write_csv(file, rows)


def print_best(study: optuna.Study) -> list[dict[str, Any]]:
    """A table of the five best trials, one to a column; returns them for results.json."""
    complete = [trial for trial in trials.counted(study) if trial.state.name == "COMPLETE"]
    best = sorted(complete, key=lambda trial: trial.value or 0.0)[:5]
    places = [trials.place_in_study(study, trial.number) + 1 for trial in best]

    rows = [["trial", *map(str, places)]]
    rows.append(["validation loss", *(f"{trial.value:.4f}" for trial in best)])
    for name in dict.fromkeys(name for trial in best for name in trial.params):
        values = (trial.params.get(name, "-") for trial in best)
        rows.append([name, *(short(value, digits=3) for value in values)])
    fn.print_columns(rows, indent=4)

    found = zip(places, best, strict=True)
    return [{"trial": place, "value": t.value, "params": t.params} for place, t in found]


def report(study: optuna.Study, config: Config, folder: Path) -> dict[str, Any]:
    """Print the best trials, and write trials.csv and best_config.yaml.

    Returns its part of results.json.
    """
    save_trials(study, folder / "trials.csv")
    states = [trial.state.name for trial in trials.counted(study)]
    outcome: dict[str, Any] = {
        "trials": len(states),
        "pruned": states.count("PRUNED"),
        "failed": states.count("FAIL"),
        "workers": config.workers,
    }
    if "COMPLETE" not in states:
        print("no trial was completed: raise --n_trials or --timeout, and go on with --resume")
        return {"study": outcome}

    spent = saved_by_pruning(study, config)
    outcome |= {"best_value": study.best_value, "best_params": study.best_params, **spent}
    file = folder / "best_config.yaml"
    fn.save_config(file, best_config(study, config))

    ended = f"{outcome['pruned']} pruned, {outcome['failed']} failed"
    print(f"\nthe best of {len(states)} trials ({ended}):")
    outcome["best_trials"] = print_best(study)
    epochs, seconds = (spent[unit] + spent[f"{unit}_saved"] for unit in ("epochs", "seconds"))
    saved, of_all = fn.format_time(spent["seconds_saved"]), fn.format_time(seconds)
    print(
        f"pruning saved {spent['epochs_saved']:,.0f} of {epochs:,.0f} epochs, "
        f"about {saved} of {of_all} of computing"
    )
    print(f"train the first in full: python rnn.py --config {file}")
    return {"study": outcome, "best_config": str(file)}


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------


def load_splits(config: Config) -> tuple[rnn.Splits, dict[str, Any]]:
    """What every trial is trained and validated on, and what there is to note of all the data.

    Raises UserError for too few images.
    """
    data = fn.load_dataset(config.dataset, config.data_dir, config.image_size)
    splits = rnn.split(data, config.validation_fraction, config.seed)
    images, labels = splits.train
    seen = fn.stratified_subset(labels, config.train_fraction, config.seed)

    whole = config.train_fraction == 1
    flag = f"--dataset {data.name}" if whole else f"--train_fraction {config.train_fraction}"
    most = max(BATCH_SIZES)
    problem = f"{len(seen)} training images are too few for batch size {most}"
    check(len(seen) >= most, f"{flag}: {problem}")
    part = fn.Subset(images, seen), labels[seen]
    return replace(splits, train=part), data.description()


def main(config: Config) -> None:
    import sqlalchemy

    run = fn.Run(config)
    trials.quiet_optuna()
    splits, data = load_splits(config)
    run.is_about(data)
    what = "recurrent networks" if config.space == "extended" else f"the {config.cell}"
    images = [f"{len(part[0]):,}" for part in (splits.train, splits.validation)]
    print(
        f"tuning {what} on {config.dataset}: {config.n_trials} trials of at most "
        f"{config.epochs} epochs, {images[0]} training and {images[1]} validation images; "
        f"{config.machine}"
    )

    # A shared study is opened before a folder is made for nothing.
    shared = open_study(config, config.storage, data) if config.storage else None
    with run.open() as folder:
        file = sqlalchemy.URL.create("sqlite", database=str(folder / "study.db"))
        url = config.storage or str(file)
        study = shared or open_study(config, url, data)
        if done := trials.n_finished(study):
            print(f"going on with the study {config.study_name}: {done} trials are there")
        try:
            if config.workers == 1:
                run_study(study, splits, config)
            else:
                run_workers(study, config, url)
            run.save(**report(study, config, folder))
            if any(trial.state.name == "COMPLETE" for trial in trials.counted(study)):
                plot_study(study, folder)
        except trials.database_errors() as error:
            remedy = f"mend that, then go on with --resume {folder}"
            raise fn.UserError(trials.database_problem(url, error, remedy)) from None


if __name__ == "__main__":
    fn.command_line(main, Config, __doc__)
