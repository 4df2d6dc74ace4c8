"""The tuner: every value it draws reaches the model and the optimiser, and what it finds can be trained."""

import optuna
import pytest
import torch

import functions as fn
import rnn
import rnn_hyperparameter_tune as tune

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
    module = rnn.RowClassification(rnn.build_model(config, cell, images, 4), splits, config)
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
        assert (found[name].low, found[name].high, found[name].log) == (SPACE[name][0], SPACE[name][-1], True)


def small_study(tmp_path, **changes):
    config = tune.Config(**{"dataset": "digits", "n_trials": 2, "epochs": 2} | changes)
    splits = rnn.split(fn.load_dataset("digits"), rnn.Config(dataset="digits"))
    study = tune.open_study(config, tmp_path)
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
    again = tune.open_study(config, tmp_path)
    config.n_trials = 3
    tune.run_study(again, splits, config)
    tune.run_study(again, splits, config)  # nothing is missing any more
    assert [trial.number for trial in again.trials] == [0, 1, 2]


def test_a_resumed_study_does_not_repeat_its_draws(tmp_path):
    study, _, config = small_study(tmp_path)
    first = [tune.suggest(trial, config).learning_rate for trial in (study.ask(), study.ask())]
    again = tune.open_study(config, tmp_path)
    assert not {tune.suggest(again.ask(), config).learning_rate for _ in range(2)} & set(first)


def test_an_interrupted_trial_is_made_up_for(tmp_path):
    study, splits, config = small_study(tmp_path, epochs=1, n_trials=1)
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    tune.run_study(study, splits, config)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]


def test_a_hopeless_trial_is_pruned(tmp_path):
    """Worse than five earlier trials at every epoch: stopped before its last."""
    study, splits, config = small_study(tmp_path, epochs=4)
    params = {key: values[0] for key, values in SPACE.items()}
    for _ in range(5):
        study.add_trial(
            optuna.trial.create_trial(
                params=params,
                distributions=_distributions(),
                value=1e-3,
                intermediate_values=dict.fromkeys(range(4), 1e-3),
            )
        )
    study.enqueue_trial(params)
    study.optimize(lambda trial: tune.objective(trial, splits, config), n_trials=1)
    assert study.trials[-1].state == optuna.trial.TrialState.PRUNED
    assert len(study.trials[-1].intermediate_values) < 4


def _distributions():
    trial = optuna.create_study().ask()
    tune.suggest(trial, tune.Config())
    return trial.distributions


def test_a_diverging_trial_counts_as_pruned(tmp_path, monkeypatch):
    study, splits, config = small_study(tmp_path)

    def diverge(*_, **__):
        raise fn.Diverged("the loss is no longer finite")

    monkeypatch.setattr(rnn, "train", diverge)
    study.optimize(lambda trial: tune.objective(trial, splits, config), n_trials=1)
    assert study.trials[0].state == optuna.trial.TrialState.PRUNED


def test_best_config_is_what_rnn_reads(tmp_path):
    study, splits, config = small_study(tmp_path, epochs=1, cell="gru")
    tune.run_study(study, splits, config)
    tune.report(study, config, tmp_path)
    found = fn.parse_config(rnn.Config, ["--config", str(tmp_path / "best_config.yaml")])
    assert {name: getattr(found, name) for name in SPACE} == study.best_params
    assert (found.cell, found.dataset, found.epochs) == ("gru", "digits", 100)


def test_database_that_cannot_be_opened_is_one_line(tmp_path):
    with pytest.raises(fn.UserError, match="--storage nonsense cannot be opened"):
        tune.open_study(tune.Config(storage="nonsense"), tmp_path)
