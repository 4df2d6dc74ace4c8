"""Tune rnn.py's network with Optuna: which widths, depth, learning rate, weight decay and batch size suit the data?

Every trial draws a configuration (TPE, Bergstra et al. 2011), trains it with Lightning for at most --epochs epochs,
and is stopped early when its validation loss is above the median of earlier trials at that epoch. The test images
stay unseen.

    python rnn_hyperparameter_tune.py                                 # CIFAR-10, 100 trials of at most 10 epochs
    python rnn_hyperparameter_tune.py --dataset digits --n_trials 20  # no download, a minute
    python rnn_hyperparameter_tune.py --resume                        # continue the newest study
    python rnn.py --config runs/.../best_config.yaml                  # train what it found in full
"""

from __future__ import annotations

import gc
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

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

    cell: Literal["rnn", "lstm", "gru"] = "rnn"
    """kind of recurrent layer"""
    n_trials: int = 100
    """trials in all; a resumed study runs those that are missing"""
    epochs: int = 10
    """most epochs a trial may train"""
    validation_fraction: float = 0.1
    """share of each class's training images held out; their loss is what the study minimises"""
    timeout: float | None = None
    """start no new trial after this many seconds"""
    storage: str | None = None
    """database URL of the study; unless given, SQLite in the run folder"""
    study_name: str = "rnn"
    """name of the study in the database"""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """float32, or bfloat16 autocast, which gains nothing for steps as small as these"""

    def validate(self) -> None:
        super().validate()
        check(self.n_trials >= 1, f"--n_trials must be at least 1, got {self.n_trials}")
        check(self.epochs >= 1, f"--epochs must be at least 1, got {self.epochs}")
        fraction = self.validation_fraction
        check(0 < fraction < 1, f"--validation_fraction must be between 0 and 1, got {fraction}")
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
    return rnn.Config(
        **{**shared, "output_dir": None, "resume": None},
        hidden_size=trial.suggest_categorical("hidden_size", [128, 256, 512]),
        num_layers=trial.suggest_categorical("num_layers", [1, 3, 5]),
        l2=trial.suggest_categorical("l2", [16, 32, 64]),
        l3=trial.suggest_categorical("l3", [16, 32, 64]),
        learning_rate=trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True),
        weight_decay=trial.suggest_float("weight_decay", 5e-4, 1e-1, log=True),
        batch_size=trial.suggest_categorical("batch_size", BATCH_SIZES),
    )


# ------------------------------------------------------------------------------------------------
# The study
# ------------------------------------------------------------------------------------------------


def objective(trial: optuna.Trial, splits: rnn.Splits, config: Config) -> float:
    """Train the trial's configuration; returns its lowest validation loss. A trial that diverges counts as pruned."""
    import optuna
    from optuna_integration import PyTorchLightningPruningCallback

    try:
        _, log = rnn.train(
            suggest(trial, config),
            config.cell,
            splits,
            callbacks=[PyTorchLightningPruningCallback(trial, monitor="validation_loss")],
        )
    except fn.Diverged as diverged:
        raise optuna.TrialPruned(str(diverged)) from None
    finally:
        gc.collect()  # Lightning's objects refer to each other: let a trial's memory go before the next
    return min(row["validation_loss"] for row in log.rows)


def open_study(config: Config, folder: Path) -> optuna.Study:
    """The study in its database, made if it is not there. Raises UserError when the database cannot be used."""
    import optuna

    url = config.storage or f"sqlite:///{folder / 'study.db'}"
    try:
        study = optuna.create_study(
            storage=url, study_name=config.study_name, load_if_exists=True, direction="minimize"
        )
        drawn = len(study.get_trials(deepcopy=False))
    except Exception as error:  # whatever the database's driver raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise fn.UserError(f"--storage {url} cannot be opened ({reason}): check the URL") from None
    study.sampler = optuna.samplers.TPESampler(seed=fn.mix_seed(config.seed, drawn) % 2**32)  # no draw is repeated
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    return study


def print_trial(study: optuna.Study, trial: optuna.trial.FrozenTrial, n_trials: int) -> None:
    """One line per finished trial."""
    from optuna.trial import TrialState

    done = f"trial {trial.number + 1:>{len(str(n_trials))}}/{n_trials}"
    epochs, state = len(trial.intermediate_values), trial.state.name.lower()
    outcome = f"loss {trial.value:.4f}" if trial.value is not None else "loss   -   "
    complete = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    best = f"best {study.best_value:.4f} (trial {study.best_trial.number + 1})" if complete else "none complete yet"
    drawn = "  ".join(f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items())
    print(f"{done}  {state:8}  {epochs:2} epochs  {outcome}  {best}  | {drawn}", flush=True)


def run_study(study: optuna.Study, splits: rnn.Splits, config: Config) -> None:
    """Run the trials that are missing from the study, one after the other."""
    from optuna.trial import TrialState

    finished = (TrialState.COMPLETE, TrialState.PRUNED)  # a trial that was interrupted is made up for
    missing = config.n_trials - len(study.get_trials(deepcopy=False, states=finished))
    if missing > 0:
        study.optimize(
            lambda trial: objective(trial, splits, config),
            n_trials=missing,
            timeout=config.timeout,
            callbacks=[lambda study, trial: print_trial(study, trial, config.n_trials)],
        )


# ------------------------------------------------------------------------------------------------
# The outcome
# ------------------------------------------------------------------------------------------------


def best_config(study: optuna.Study, config: Config) -> rnn.Config:
    """The best trial's configuration for rnn.py, to be trained in full: with rnn.py's own number of epochs."""
    return replace(suggest(study.best_trial, config), epochs=rnn.Config.epochs)


def plot_study(study: optuna.Study, folder: Path) -> None:
    """Optuna's own figures: the best value over the trials, and how much each hyperparameter mattered."""
    import warnings

    from optuna.visualization import matplotlib as plots

    complete = [t for t in study.get_trials(deepcopy=False) if t.value is not None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's matplotlib figures are "experimental"
        figures = {"history": plots.plot_optimization_history(study)}
        if len(complete) >= 4:
            figures["importances"] = plots.plot_param_importances(study)
        for name, axes in figures.items():
            figure: Any = axes.figure
            figure.set_size_inches(9, 5)
            figure.set_layout_engine("constrained")
            fn.save_figure(figure, folder / f"{name}.png")


def report(study: optuna.Study, config: Config, folder: Path) -> dict[str, Any]:
    """Print the best trial, write best_config.yaml; returns results.json's part."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    count = {state: sum(t.state == state for t in trials) for state in TrialState}
    outcome: dict[str, Any] = {
        "trials": len(trials),
        "pruned": count[TrialState.PRUNED],
        "failed": count[TrialState.FAIL],
    }
    if not count[TrialState.COMPLETE]:
        print("no trial was completed: raise --n_trials or --timeout, and go on with --resume")
        return {"study": outcome}
    outcome |= {"best_value": study.best_value, "best_params": study.best_params}
    file = folder / "best_config.yaml"
    fn.save_config(file, best_config(study, config))
    plot_study(study, folder)
    print(f"\nbest of {len(trials)} trials ({outcome['pruned']} pruned): validation loss {study.best_value:.4f} with")
    for name, value in study.best_params.items():
        print(f"    {name:14} {value:.3g}" if isinstance(value, float) else f"    {name:14} {value}")
    print(f"train it in full: python rnn.py --config {file}")
    return {"study": outcome, "best_config": str(file)}


def main(config: Config) -> None:
    import optuna

    record = fn.start_record(config)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    data = fn.load_dataset(config.dataset, config.data_dir, config.image_size)
    first = rnn.Config(seed=config.seed, validation_fraction=config.validation_fraction, batch_size=2)
    splits = rnn.split(data, first)  # the same for every trial
    n = len(splits.train[0])
    check(
        n >= max(BATCH_SIZES),
        f"--dataset {data.name}: {n} training images are too few for batch size {max(BATCH_SIZES)}",
    )
    print(
        f"tuning the {config.cell} on {data.name}: {config.n_trials} trials of at most {config.epochs} epochs, "
        f"{n:,} training and {len(splits.validation[0]):,} validation images; "
        f"{fn.resolve_device(config.accelerator)}, {torch.get_num_threads()} threads"
    )
    with fn.run_folder(config) as folder:
        study = open_study(config, folder)
        run_study(study, splits, config)
        fn.save_results(folder, record, **report(study, config, folder))


if __name__ == "__main__":
    fn.command_line(main, Config, __doc__)
