"""contrastive/signals.py: closed forms, and slow transcriptions."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import make_config, randn

import functions as fn
import simCLR
from contrastive.signals import batch_signals, collapse, effective_rank


@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_effective_rank_of_equal_directions_is_their_number(k):
    features = torch.zeros(40, 8)
    features[torch.arange(40), torch.arange(40) % k] = 2.5
    assert effective_rank(features) == pytest.approx(k, rel=1e-3)


def test_the_effective_rank_is_its_formula():
    """exp of the entropy of the singular values' shares; singular values 3 and 1."""
    p = torch.tensor([0.75, 0.25])
    expected = math.exp(float(-(p * p.log()).sum()))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("views", [2, 3])
def test_the_signals_of_a_batch_are_their_formulas(views):
    n, z = 9, randn(views, 9, 4, seed=3)
    unit = F.normalize(z, dim=2)
    ranks, distances = [], []
    for v in range(views):
        for u in range(views):
            for i in range(n):
                if u == v:
                    continue
                positive = float(unit[v, i] @ unit[u, i])
                others = [
                    float(unit[v, i] @ unit[w, j]) for w in range(views) for j in range(n) if j != i
                ]
                ranks.append(1 + sum(other > positive for other in others))
                distances.append(float((unit[v, i] - unit[u, i]).square().sum()))
    apart = [
        math.exp(-2 * float((unit[0, i] - unit[0, j]).square().sum()))
        for i in range(n)
        for j in range(i)
    ]
    found = batch_signals(z.flatten(0, 1), views)
    assert found["positive_rank"] == pytest.approx(sum(ranks) / len(ranks))
    assert found["contrastive_accuracy"] == pytest.approx(ranks.count(1) / len(ranks))
    assert found["contrastive_top5"] == pytest.approx(sum(r <= 5 for r in ranks) / len(ranks))
    assert found["alignment"] == pytest.approx(sum(distances) / len(distances), rel=1e-5)
    assert found["uniformity"] == pytest.approx(math.log(sum(apart) / len(apart)), rel=1e-5)
    assert found["rank_z"] == pytest.approx(effective_rank(z.flatten(0, 1)), rel=1e-5)


def test_views_that_are_equal_are_found_at_once():
    found = batch_signals(randn(20, 8).repeat(2, 1), 2)
    assert (found["contrastive_accuracy"], found["positive_rank"]) == (1.0, 1.0)
    assert found["alignment"] == pytest.approx(0, abs=1e-5)


def test_of_a_large_batch_some_images_are_enough():
    z = randn(2 * 2000, 8)
    few = z.view(2, 2000, 8)[:, :512].flatten(0, 1)
    assert batch_signals(z, 2) == batch_signals(few, 2)


def test_a_collapse_is_named_with_its_likely_cause():
    z = torch.ones(40, 8) + 1e-3 * randn(40, 8)
    words = collapse(batch_signals(z, 2))
    assert "collapsed into one point (rank 1.0, uniformity -0.00)" in words
    assert "--learning_rate" in words
    assert collapse(batch_signals(randn(40, 8), 2)) is None


class Constant(torch.nn.Module):
    """An encoder that says the same of every image."""

    def __init__(self):
        super().__init__()
        self.h = torch.nn.Parameter(torch.ones(1, 8))

    def forward(self, x):
        return self.h.expand(len(x), 8) + 0 * x.mean()


def test_signals_stand_in_every_epochs_row_and_a_collapse_is_warned_of_once(tmp_path, capsys):
    data = fn.load_dataset("digits")
    model = simCLR.SimCLRModel(Constant(), 8, 16, 8, "none")
    config = make_config(epochs=3, batch_size=64, knn_k=5, knn_every=2)
    rows = simCLR.pretrain(model, data, config, tmp_path).rows
    keys = {"contrastive_accuracy", "contrastive_top5", "positive_rank", "alignment"}
    keys |= {"uniformity", "rank_z"}
    assert all(keys <= row.keys() for row in rows)
    assert ["rank_h" in row for row in rows] == [False, True, False]
    said = capsys.readouterr().out
    assert said.count("warning: the embeddings have collapsed") == 1
    assert "rank z 1, h 1" in said
    simCLR.figures.plot_pretraining(rows, tmp_path / "pretraining.png")
    assert (tmp_path / "pretraining.png").is_file()
