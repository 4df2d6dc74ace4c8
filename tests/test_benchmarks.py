"""What the benchmarks compare computes the same; the tables are what was measured."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

import functions as fn
import simCLR
from benchmarks import (
    augmentation,
    common,
    convolution,
    growth,
    loss,
    recurrent,
    signals,
    step,
    table,
    usual,
)

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("n", [1, 2, 17])
def test_the_masked_copy_formulation_is_the_same_loss(n):
    torch.manual_seed(0)
    a, b = (torch.randn(2 * n, 8, dtype=torch.float64).requires_grad_() for _ in range(2))
    b.data.copy_(a.data)
    losses = usual.masked_copy_loss(a, 0.3), fn.nt_xent_loss(b, 0.3)
    for value in losses:
        value.backward()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_the_usual_formulation_trains_the_same_network(stem):
    """It has the same parameters, and with the same values the same embeddings."""
    torch.manual_seed(0)
    theirs = usual.model(stem).double()
    ours = simCLR.SimCLRModel(*simCLR.build_encoder("resnet18", stem)).double()
    values = list(theirs.state_dict().values())
    names = ours.state_dict()
    assert [value.shape for value in values] == [value.shape for value in names.values()]

    ours.load_state_dict(dict(zip(names, values, strict=True)))
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_usual_loader_gives_pairs_of_views():
    first, second = usual.TwoViews(usual.random_images(2), usual.augmentation())[0]
    assert first.shape == second.shape == (3, 32, 32)
    assert not torch.equal(first, second)


def test_the_usual_rows_are_those_of_rnn():
    row, label = recurrent.Rows(12)[11]
    images, labels = recurrent.splits(12, 0).train
    expected = (images / 255 - 0.5) / 0.25
    torch.testing.assert_close(row, recurrent.rnn.rows_as_sequence(expected)[11])
    assert label == labels[11]


def test_seconds_is_the_median_of_its_repeats(monkeypatch):
    calls, durations = [], iter([1.0, 9.0, 2.0, 3.0, 100.0])
    times = iter([t for d in durations for t in (0.0, d)])
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(times))
    assert common.seconds(lambda: calls.append(1), at_least=0, repeats=5, warm_up=2) == 3.0
    assert len(calls) == 7


@pytest.mark.parametrize(("higher_is_better", "ratio"), [(True, 0.5), (False, 2.0)])
def test_the_ratio_says_how_many_times_faster_this_project_is(higher_is_better, ratio):
    measured = {
        common.OURS: [{"value": v, "peak_mib": 1.0} for v in (1.0, 2.0, 9.0)],
        "other": [{"value": 4.0}],
    }
    row = common._summary(measured, higher_is_better, common.OURS)["other"]
    assert row["this project is faster by"] == ratio


def test_a_benchmark_measures_in_turn_prints_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["x", "--rounds", "2"])
    order = []

    def candidate(name: str) -> float:
        order.append(name)
        return 2.0

    candidates = {name: partial(candidate, name) for name in (common.OURS, "other")}
    common.main("x", {"group": candidates}, about="About", unit="seconds", fresh=False)
    assert order == [common.OURS, "other"] * 2

    written = json.loads((tmp_path / "results" / "benchmarks" / "x.json").read_text())
    assert written["groups"]["group"]["other"] == {
        "median": 2.0,
        "values": [2.0, 2.0],
        "this project is faster by": 1.0,
    }
    assert {"threads", "versions", "git_commit", "processor", "command", "seconds"} <= set(written)
    assert "1.00x" in capsys.readouterr().out


@pytest.mark.slow
def test_the_smallest_of_each_benchmark_runs(monkeypatch):
    """Each is called once instead of for seconds."""

    def once(f, **_) -> float:
        f()
        return 1.0

    monkeypatch.setattr(common, "seconds", once)
    monkeypatch.setattr(recurrent, "STEPS", 22)
    assert augmentation.ours() > 0
    assert loss.ours(4) == loss.masked_copies(4) == 1000
    assert convolution.milliseconds((4, 8, 2, 1), torch.float32, "dense matrix") == 1000
    assert step.bare("imagenet", batch_size=2) == 2
    assert recurrent.bare_loop("gru") > 0
    assert recurrent.usual_loop("rnn") > 0
    assert growth.loss(4) == growth.knn(20) == 1
    assert growth.pretraining(600, steps=3) > 0
    assert signals.signals(4) == 1000


@pytest.mark.slow
def test_the_whole_step_is_measured_on_the_program_itself():
    assert step.ours("imagenet", "--batch_size", "8", "--precision", "fp32", images=16) > 0


def test_the_signals_cost_less_than_a_fiftieth_of_an_epoch():
    """What was measured, not what this machine does now."""
    found = json.loads((table.FOLDER / "signals.json").read_text())["groups"]
    for (name, rows), steps in zip(found.items(), (195, 390), strict=True):
        assert f"{steps} steps" in name
        epoch = steps * rows["a step"]["median"]
        assert rows["the signals of an epoch"]["median"] < 0.02 * epoch


def test_the_tables_are_what_was_measured():
    readme, all_tables = (ROOT / "README.md").read_text(), (table.FOLDER / "README.md").read_text()
    assert table.headline() in readme, "python -m benchmarks.table prints something else"
    assert table.everything() == all_tables, "run python -m benchmarks.table"


@pytest.mark.parametrize("name", table.NAMES)
def test_measurements_come_from_a_clean_commit(name):
    found = json.loads((table.FOLDER / f"{name}.json").read_text())
    assert found["git_dirty"] is False
    assert found["command"] == f"python -m benchmarks.{name}"
