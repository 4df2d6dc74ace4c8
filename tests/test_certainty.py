"""Is it right to be sure? Against slow transcriptions, and cases that are known."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import NARROW, make_config, randint, randn, user_error
from PIL import Image
from torch import nn

import functions as fn
import simCLR
from contrastive import certainty
from contrastive.certainty import (
    Asked,
    Seen,
    agreement,
    kth_similarity,
    learn_afterwards,
    measure_certainty,
    sharpness,
    ways,
)
from contrastive.losses import CERTAIN
from contrastive.probe import Features
from contrastive.scores import (
    aurc,
    auroc,
    best_temperature,
    calibration,
    kept_accuracy,
    kept_at,
    mean_ranks,
    mean_spearman,
    nearest_is_alike,
    order_of_errors,
    ranks,
    spearman,
)
from contrastive.sets import load_others, load_people, load_sets

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

RIGHT = torch.tensor([True, False, True, True, False])
LABELS = torch.tensor([0, 1])

# ------------------------------------------------------------------------------------------------
# Orders
# ------------------------------------------------------------------------------------------------


def test_the_surest_are_kept_first():
    certainty = torch.tensor([0.9, 0.1, 0.8, 0.3, 0.5])  # right, right, wrong, right, wrong
    expected = [1, 1, 2 / 3, 3 / 4, 3 / 5]
    assert kept_accuracy(certainty, RIGHT).tolist() == pytest.approx(expected)
    assert aurc(certainty, RIGHT) == pytest.approx(1 - sum(expected) / 5)
    assert aurc(RIGHT.double(), RIGHT) < aurc(certainty, RIGHT) < aurc(-RIGHT.double(), RIGHT)
    assert kept_at(certainty, RIGHT, (0.01, 0.4, 0.6, 1)) == pytest.approx([1, 1, 2 / 3, 3 / 5])
    assert kept_at(certainty / 0, RIGHT, (0.5, 1)) is None


def test_images_that_are_equally_sure_come_in_no_order():
    """A certainty that says nothing keeps the accuracy of all, however the files lie."""
    same = torch.full((5,), 0.5)
    assert kept_accuracy(same, RIGHT).tolist() == pytest.approx([0.6] * 5)
    assert aurc(same, RIGHT) == aurc(same, RIGHT.flip(0)) == pytest.approx(0.4)
    certainty = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])
    expected = [1, 1, (2 + 1 / 3) / 3, (2 + 2 / 3) / 4, 3 / 5]
    assert kept_accuracy(certainty, RIGHT).tolist() == pytest.approx(expected)


def test_auroc_counts_pairs_and_keeps_its_sign():
    """Of pairs of a right and a wrong one, how often the right one has more."""
    certainty = randn(40)
    right = certainty + randn(40, seed=1) > 0
    pairs = [(a > b).double() for a in certainty[right] for b in certainty[~right]]
    expected = float(torch.stack(pairs).mean())
    assert 0.6 < expected < 1
    assert auroc(certainty, right) == pytest.approx(expected)
    assert auroc(-certainty, right) == pytest.approx(1 - expected)  # misleading stays below half
    assert auroc(certainty, torch.ones(40, dtype=torch.bool)) is None
    assert auroc(torch.full((40,), torch.nan), right) is None


def test_spearman_is_the_correlation_of_ranks():
    a, b = randn(30), randn(30, seed=1)
    ranks = torch.stack([part.argsort().argsort().double() for part in (a, a + b)])
    assert spearman(a, a + b) == pytest.approx(float(torch.corrcoef(ranks)[0, 1]))
    assert spearman(a, a**3) == pytest.approx(1)
    assert spearman(a, torch.ones(30)) is None
    assert spearman(a, torch.full((30,), torch.nan)) is None


def test_images_are_compared_with_their_own_copies_alone():
    """What differs more between images than between copies of one says as much."""
    levels = torch.tensor([3.0, 2.0, 1.0, 0.5])
    falls = levels[:, None] + 100 * torch.rand(20)
    assert mean_spearman(falls, levels) == pytest.approx(1)
    assert mean_spearman(-falls, levels) == pytest.approx(-1)
    assert mean_spearman(torch.cat([falls, -falls], dim=1), levels) == pytest.approx(0, abs=1e-9)
    some = torch.randint(0, 3, (4, 30), generator=torch.Generator().manual_seed(0)).double()
    each = [spearman(column, levels) or 0.0 for column in some.T]  # of the same throughout: none
    assert mean_spearman(some, levels) == pytest.approx(sum(each) / 30)
    assert mean_spearman(torch.full((4, 2), torch.nan), levels) is None


def test_how_sharp_an_image_is_needs_no_model():
    stripes = torch.zeros(1, 3, 8, 8)
    stripes[..., ::2] = 1
    assert float(sharpness(stripes)) == pytest.approx(0.5)  # 1 across, 0 down
    assert float(sharpness(stripes.transpose(2, 3))) == pytest.approx(0.5)
    assert float(sharpness(torch.full((1, 3, 8, 8), 0.7))) == 0


def test_errors_are_in_order_or_not_whatever_their_share():
    """0 where a certainty knows nothing, 1 where all errors come last, below 0 where they come
    first."""
    for share in (0.1, 0.5, 0.9):
        right = torch.arange(1000) >= 1000 * share
        ordered = torch.arange(1000.0)
        assert order_of_errors(ordered, right) == pytest.approx(1)
        assert order_of_errors(-ordered, right) < -0.4
        assert order_of_errors(torch.ones(1000), right) == pytest.approx(0, abs=1e-9)
    assert order_of_errors(ordered, torch.ones(1000, dtype=torch.bool)) is None
    assert order_of_errors(ordered, torch.zeros(1000, dtype=torch.bool)) is None


def test_the_nearest_other_image_decides():
    h, labels = randn(50, 3), torch.arange(50) % 2
    found = nearest_is_alike(h, labels, block=7)
    for i in range(50):
        others = [j for j in range(50) if j != i]
        nearest = max(others, key=lambda j, i=i: float(F.cosine_similarity(h[i], h[j], dim=0)))
        assert bool(found[i]) == (labels[nearest] == labels[i])


def test_the_kth_neighbour_is_the_kth():
    h, bank = randn(5, 4), randn(30, 4, seed=1)
    cosines = F.cosine_similarity(h[:, None], bank[None], dim=2).sort(descending=True).values
    torch.testing.assert_close(kth_similarity(h, bank, 7, block=2), cosines[:, 6])
    torch.testing.assert_close(kth_similarity(h, bank, 99), cosines[:, -1])


def test_views_that_are_the_same_agree():
    h = randn(1, 6, 4)
    assert agreement(h * torch.rand(5, 1, 1)).tolist() == pytest.approx([1.0] * 6)
    assert agreement(torch.cat([h, -h])).tolist() == pytest.approx([0.0] * 6, abs=1e-12)


def test_ranks_are_those_among_whole_images():
    assert mean_ranks(torch.ones(1, 3), torch.ones(9)) == [0.5]
    among = torch.arange(10.0)
    levels = torch.tensor([[-1.0, 10.0], [4.5, 4.5]])
    assert mean_ranks(levels, among) == pytest.approx([0.5, 0.5])
    assert mean_ranks(levels[:, :1], among) == pytest.approx([0.0, 0.5])


# ------------------------------------------------------------------------------------------------
# Calibration, and what is learned afterwards
# ------------------------------------------------------------------------------------------------


def says(confidence, right):
    """Probabilities of two classes that say so, and labels of which so many are right."""
    probabilities = torch.tensor([[confidence, 1 - confidence]]).repeat(10, 1)
    return probabilities, torch.tensor([0] * right + [1] * (10 - right))


@pytest.mark.parametrize(
    ("confidence", "right", "error"), [(0.8, 8, 0), (0.6, 10, 0.4), (1, 5, 0.5)]
)
def test_calibration_is_how_far_words_and_deeds_are_apart(confidence, right, error):
    found, bins = calibration(*says(confidence, right))
    assert found == pytest.approx(error, abs=1e-6)
    assert bins == [pytest.approx([confidence, right / 10, 1.0])]


def test_errors_in_different_bins_do_not_cancel():
    parts = [says(0.55, 10), says(0.95, 5)]  # too modest by .45, too sure by .45
    probabilities, labels = (torch.cat(pair) for pair in zip(*parts, strict=True))
    assert calibration(probabilities, labels)[0] == pytest.approx(0.45, abs=1e-6)


def test_the_temperature_is_found():
    """Labels that are drawn at temperature 3."""
    logits = 6 * randn(20_000, 5, seed=1)
    labels = torch.multinomial((logits / 3).softmax(1), 1).flatten()
    assert best_temperature(logits, labels) == pytest.approx(3, rel=0.05)
    before, after = (calibration((logits / t).softmax(1), labels)[0] for t in (1, 3))
    assert after < 0.02 < before


def blobs(n=600) -> Features:
    """Two classes on a line, which overlap in the middle; the second number says nothing."""
    labels = torch.arange(n) % 2
    h = randn(n, 2, dtype=torch.float32) + torch.tensor([2.0, 0.0]) * (2 * labels[:, None] - 1)
    return Features(h, labels, h, labels, ("left", "right"))


def test_what_is_learned_afterwards_knows_where_the_probe_errs():
    after = learn_afterwards(blobs(), make_config(probe="lbfgs"))
    grid = torch.tensor([[0.0, 0.0], [0.0, 2.0], [4.0, 0.0], [-4.0, 1.0]])
    middle, _, right, left = after.order(grid).flatten().tolist()
    assert middle > max(left, right)  # it predicts a loss
    assert not any(p.requires_grad for p in after.order.parameters())
    assert 0.5 < after.temperature < 2


def test_it_is_learned_from_images_that_the_probe_does_not_know():
    """A probe that learns noise by heart is sure of what it knows, and wrong about the rest."""
    h, labels = randn(200, 300, dtype=torch.float32), torch.arange(200) % 2
    features = Features(h, labels, h, labels, ("a", "b"))
    after = learn_afterwards(features, make_config(probe="lbfgs"))
    right = after.half(h).argmax(1) == labels
    assert 0.65 < right.double().mean() < 0.85  # all of one half, and half of the other
    assert after.temperature > 3


def test_a_feature_that_never_changed_says_nothing():
    features = blobs()
    features.train[:, 1] = 0
    after = learn_afterwards(features, make_config(probe="lbfgs"))
    one, other = torch.tensor([[1.0, 0.0], [1.0, 50.0]])
    assert torch.equal(after.order(one), after.order(other))


def test_of_a_handful_of_images_any_temperature_could_be_best():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert best_temperature(logits, torch.tensor([1, 0])) == pytest.approx(math.exp(4.6))
    assert 0.01 <= best_temperature(logits, torch.tensor([0, 1])) < 0.1


# ------------------------------------------------------------------------------------------------
# All of it
# ------------------------------------------------------------------------------------------------


class Mean(nn.Module):
    """h: the mean colour, uint8 or float32 (B, 3, H, W) -> (B, 3)."""

    def forward(self, images):
        x = images / 255 if images.dtype == torch.uint8 else images
        return x.mean((2, 3))


class Contrast(nn.Module):
    """h: how much neighbouring pixels differ, uint8 or float32 (B, 3, H, W) -> (B, 3)."""

    def forward(self, images):
        x = images / 255 if images.dtype == torch.uint8 else images
        return x.diff(dim=3).abs().mean((2, 3))


def test_every_way_is_the_larger_the_surer():
    """Of an image whose h is long, near the others and far from the probe's border."""
    sure, unsure = torch.tensor([3.0, 0.0]), torch.tensor([0.2, 0.19])
    bank = torch.tensor([[1.0, 0.0]]).repeat(20, 1)
    labels = torch.zeros(20, dtype=torch.int64)
    classifier, after = nn.Linear(2, 2), nn.Linear(2, 1)
    with torch.no_grad():
        classifier.weight.copy_(torch.eye(2))
        classifier.bias.zero_()
        after.weight.copy_(torch.tensor([[-1.0, 0.0]]))  # expects a small loss of the sure one
    found = ways(Features(bank, labels, bank, labels, ("a", "b")), classifier, after, "nt_xent")
    assert len(found) == 6
    seen = Seen(torch.stack([sure, unsure]), sharpness=torch.tensor([0.2, 0.1]))
    for name, way in found.items():
        value = way(seen)
        assert value[0] > value[1], name


def test_a_way_is_praised_for_falling_where_it_is_harder_to_see():
    """The contrast of an image falls when it is blurred, or enlarged from a crop; with noise it
    rises. People agree here on what has contrast."""
    labels = torch.arange(100) % 2
    images = torch.randint(0, 256, (100, 3, 16, 16)) // torch.arange(1, 101).view(-1, 1, 1, 1)
    images = images.to(torch.uint8)
    h = Contrast()(images)
    features = Features(h, labels, h, labels, ("a", "b"))
    certain = torch.linspace(1, 0.5, 100)
    people = torch.stack([certain, 1 - certain], dim=1)
    asked = Asked(
        nn.Identity(), None, Contrast(), lambda x: x / 255, "nt_xent", {}, people,
        make_config(accelerator="cpu", precision="fp32").machine,
    )  # fmt: skip
    classifier = nn.Linear(3, 2)
    found = measure_certainty(asked, images, features, classifier, make_config(probe="lbfgs"))
    for name in ("norm of h", "sharpness"):  # which needs no encoder
        worth = found.worth[name]
        assert worth.blur > 0.9
        assert worth.crops > 0.2
        assert worth.noise < -0.4
        assert worth.people > 0.9


def test_a_way_that_knows_everything_is_worth_the_most(monkeypatch):
    """And one that knows nothing is worth nothing: for the probe, people, and another set."""
    labels = torch.arange(300) % 3
    images = torch.randint(0, 120, (300, 3, 8, 8))
    images[torch.arange(300), labels] += torch.randint(0, 130, (300, 1, 1))
    images = images.to(torch.uint8)
    h = Mean()(images)
    features = Features(h, labels, h, labels, ("r", "g", "b"))
    classifier = nn.Linear(3, 3)
    with torch.no_grad():
        classifier.weight.copy_(20 * torch.eye(3))
        classifier.bias.zero_()
        right = classifier(h).argmax(1) == labels
    assert 5 < (~right).sum() < 150
    people = torch.rand(300, 3)
    people /= people.sum(1, keepdim=True)

    def oracle(seen: Seen) -> torch.Tensor:
        """What nothing but the test image itself has: how right the probe is, and people."""
        known = {tuple(row): i for i, row in enumerate(h.tolist())}
        places = [known.get(tuple(row), -1) for row in seen.h.tolist()]
        scores = right.double() - torch.special.entr(people).sum(1) / 100
        return torch.tensor([float(scores[i]) if i >= 0 else -9.0 for i in places])

    blind = {"oracle": oracle, "blind": lambda seen: torch.rand(len(seen.h))}
    monkeypatch.setattr(certainty, "ways", lambda *_: blind)
    other = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    asked = Asked(
        nn.Identity(), None, Mean(), lambda x: x / 255, "nt_xent", {"other": other}, people,
        make_config(accelerator="cpu", precision="fp32").machine,
    )  # fmt: skip
    found = measure_certainty(asked, images, features, classifier, make_config(probe="lbfgs"))
    knows, blind = found.worth["oracle"], found.worth["blind"]
    assert torch.equal(found.right, right)
    best = kept_accuracy(right.double(), right)
    assert knows.aurc == pytest.approx(float(1 - best.mean()))
    assert (knows.order, abs(blind.order) < 0.5) == (pytest.approx(1), True)
    share = float(right.double().mean())
    assert knows.kept == pytest.approx([min(1, share / (tenth / 10)) for tenth in range(1, 11)])
    assert blind.kept[-1] == pytest.approx(share)
    assert knows.others == {"other": 1.0}
    scores = found.values["oracle"].double()
    expected = [float(scores.quantile(q)) for q in (0, 0.05, 0.5, 0.95, 1)]
    assert knows.quantiles == pytest.approx(expected)
    assert blind.others["other"] == pytest.approx(0.5, abs=0.15)
    assert blind.aurc == pytest.approx(float((~right).double().mean()), abs=0.1)
    for kind in ("crops", "blur", "noise"):
        assert abs(getattr(blind, kind)) < 0.1
    assert knows.people > 0.2 > abs(blind.people)
    assert found.values["agreement of views"].tolist() == pytest.approx([1.0] * 300, abs=1e-5)
    assert found.worth["agreement of views"].crops is None


# ------------------------------------------------------------------------------------------------
# What it is asked with
# ------------------------------------------------------------------------------------------------


def test_other_sets_come_at_the_size_of_the_images(image_folder, tmp_path):
    config = make_config(other_sets=f"noise, {image_folder}", data_dir=str(tmp_path))
    digits = fn.load_dataset("digits", tmp_path, 12)
    found = load_others(config, digits)
    assert {name: tuple(part.shape) for name, part in found.items()} == {
        "noise": (2000, 3, 12, 12),
        str(image_folder): (24, 3, 12, 12),
    }
    assert found["noise"].float().mean() == pytest.approx(127.5, abs=1)
    there = tmp_path / "link"  # no other set than what is measured on, whatever it is called
    there.symlink_to(image_folder)
    config.other_sets = f"{image_folder},{there}"
    assert load_others(config, fn.load_dataset(str(image_folder), tmp_path, 12)) == {}
    config.other_sets = "nowhere"
    assert "--other_sets nowhere: no such folder" in user_error(load_others, config, digits)


def test_answers_of_people_are_shares(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[3, 1], [0, 2]]))
    config = make_config(human_labels=str(tmp_path / "a.npy"))
    assert load_people(config, LABELS, 2).tolist() == [[0.75, 0.25], [0, 1]]
    assert load_people(make_config(), LABELS, 2) is None


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (np.ones((3, 2)), "need (2, 2)"),
        (np.array([[1, -1], [0, 2]]), "negative"),
        (
            np.array([[0, 2], [3, 1]]),
            "only 0.0 % of the test images: bring its rows into the order",
        ),
        (np.array([[0, 0], [0, 2]]), "without an answer"),
        (np.array([[np.nan, 1], [0, 2]]), "without an answer"),
        (np.array([[np.inf, 1], [0, 2]]), "without an answer"),
        (np.array([["a", "b"], ["c", "d"]]), "need (2, 2)"),
        (np.array([[{}, {}], [{}, {}]]), "no file of numbers"),
        (None, "no file of numbers"),
    ],
)
def test_answers_that_are_none_are_refused(answers, words, tmp_path):
    file = tmp_path / "a.npy"
    if answers is None:
        file.write_text("no array")
    else:
        np.save(file, answers)
    config = make_config(human_labels=str(file))
    message = user_error(load_people, config, LABELS, 2)
    assert "--human_labels" in message
    assert words in message


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"other_sets": "digits,,noise"}, "--other_sets"),
        ({"human_labels": "a.npy"}, "--human_labels"),
        ({"human_labels": "a.npy", "validation_fraction": 0.1}, "--human_labels"),
        ({"probe_layer": 1}, "--probe_layer"),
        ({"without_classes": " ,"}, "--without_classes"),
        ({"without_classes": "cat", "evaluate_on": "digits"}, "--without_classes"),
        ({"without_classes": "cat", "human_labels": "a.npy"}, "--without_classes"),
    ],
)
def test_what_cannot_be_asked_is_said(values, flag):
    stages = {} if values == {"human_labels": "a.npy"} else {"stages": "pretrain,certainty"}
    assert flag in user_error(make_config(**stages, **values).validate)


COMMON = {"tenth neighbour", "norm of h", "probe's entropy", "probe's softmax", "learned after"}
COMMON |= {"agreement of views", "sharpness"}


@pytest.mark.slow
def test_end_to_end_with_the_head_and_without(image_folder, run_here, tmp_path):
    """What was learned beside the embedding is asked where the head was kept."""
    np.save(tmp_path / "people.npy", np.full((24, 3), 1 / 3) + np.eye(3)[np.arange(24) // 8])
    flags = ["--dataset", image_folder, "--image_size", 8, "--probe", "lbfgs", "--no-baselines"]
    flags += ["--knn_k", 5, "--other_sets", "noise", "--human_labels", "people.npy"]
    train = [*NARROW, "--batch_size", 32, "--epochs", 1, "--loss", "tau"]
    train += ["--crop_scale", 0.7, "--jitter_strength", 1.0, "--flip", 0, "--recalibrate"]
    stages = ["--stages", "pretrain,certainty", "--output_dir", "out"]
    done = run_here("simCLR.py", *flags, *train, *stages, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads((tmp_path / "out/results.json").read_text())["certainty"]
    assert set(found["ways"]) == COMMON | {"norm of z", "tau"}
    assert set(found["ways"]["tau"]["others"]) == {"noise"}
    assert set(found["calibration"]) == {
        "expected_error", "temperature", "expected_error_at_temperature",
    }  # fmt: skip
    for name in ("certainty", "surest", "tsne_certainty"):
        with Image.open(tmp_path / f"out/{name}.png") as image:
            assert min(image.size) > 100
    assert "against noise" in done.stdout

    # Measured again it is the same.
    again = ["--checkpoint", "out", "--stages", "certainty", "--output_dir", "again"]
    assert run_here("simCLR.py", *flags, *again, cwd=tmp_path).returncode == 0
    measured = json.loads((tmp_path / "again/results.json").read_text())["certainty"]
    for way, worth in found["ways"].items():
        for name in ("aurc", "crops", "blur", "noise"):
            assert measured["ways"][way][name] == pytest.approx(worth[name], abs=1e-6), (way, name)
    assert measured["ways"]["agreement of views"] == found["ways"]["agreement of views"]

    # Resumed with another set, it is not taken for finished.
    (tmp_path / "b").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"b/{i}.png")
    more = ["--resume", "again", "--other_sets", "b"]
    done = run_here("simCLR.py", *more, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    measured = json.loads((tmp_path / "again/results.json").read_text())["certainty"]
    assert set(measured["ways"]["tau"]["others"]) == {"b"}

    alone = ["--checkpoint", "out/encoder.pt", "--stages", "certainty", "--output_dir", "alone"]
    assert run_here("simCLR.py", *flags, *alone, cwd=tmp_path).returncode == 0
    measured = json.loads((tmp_path / "alone/results.json").read_text())["certainty"]
    assert set(measured["ways"]) == COMMON


def test_classes_that_are_left_out_are_in_no_part():
    """The others keep their images and names; the test images of those are returned."""
    data = fn.load_dataset("digits")
    rest, gone = fn.leave_out(data, ["3", "0"])
    assert rest.classes == ("1", "2", "4", "5", "6", "7", "8", "9")
    for part in ("train", "test"):
        images, labels = getattr(data, f"{part}_images"), getattr(data, f"{part}_labels")
        kept = (labels != 3) & (labels != 0)
        assert torch.equal(getattr(rest, f"{part}_images")[:], images[kept])
        new = [data.classes.index(rest.classes[c]) for c in getattr(rest, f"{part}_labels")]
        assert new == labels[kept].tolist()
        assert rest.names(part) == [
            name for name, yes in zip(data.names(part), kept, strict=True) if yes
        ]
    assert torch.equal(gone[:], data.test_images[(data.test_labels == 3) | (data.test_labels == 0)])
    assert torch.equal(rest.pretraining_images[:], rest.train_images[:])

    assert rest.fingerprint != data.fingerprint, "it is another set"
    assert "no class cat, dog, but 0, 1" in user_error(fn.leave_out, data, ["cat", "1", "dog"])
    assert "1 class left" in user_error(fn.leave_out, data, list("012345678"))


def test_a_class_without_test_images_can_be_left_out():
    images = randint(256, 6, 3, 8, 8, dtype=torch.uint8)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    data = fn.ImageDataset("x", images, labels, images[:4], labels[:4], ("a", "b", "c"))
    rest, gone = fn.leave_out(data, ["c"])
    assert gone is None
    assert len(rest.test_images) == 4
    data.test_images, data.test_labels = images[:2], labels[:2]
    assert "no test image left" in user_error(fn.leave_out, data, ["a"], "--evaluate_on")
    assert "--evaluate_on x" in user_error(fn.leave_out, data, ["a"], "--evaluate_on")
    data.test_images = data.test_labels = None
    rest, gone = fn.leave_out(data, ["a"])
    assert (rest.train_labels.tolist(), gone) == ([0, 0, 1, 1], None)
    data.train_labels = None
    assert "no classes" in user_error(fn.leave_out, data, ["a"])


def test_equal_values_have_equal_ranks():
    values = torch.tensor([3.0, 1.0, 3.0, 3.0, 2.0])
    assert ranks(values, values).tolist() == pytest.approx([0.7, 0.1, 0.7, 0.7, 0.3])
    assert ranks(torch.full((9,), 2.0), torch.full((4,), 2.0)).unique().tolist() == [0.5]


def test_validation_leaves_the_test_images_of_classes_left_out_alone(tmp_path):
    flags = {"dataset": "digits", "data_dir": str(tmp_path), "without_classes": "3, 0"}
    config = simCLR.Config(**flags, stages="pretrain,certainty", validation_fraction=0.25)
    config.other_sets = "noise"
    sets = load_sets(config).ready(config)
    assert list(sets.others) == ["classes left out", "noise"]
    held = fn.hold_out(fn.load_dataset("digits"), 0.25)
    unseen = held.test_images[:][(held.test_labels == 3) | (held.test_labels == 0)]
    shown = sets.others["classes left out"]  # in an order of its own
    assert sorted(shown.flatten(1).tolist()) == sorted(unseen.flatten(1).tolist())
    assert len(sets.measured.classes) == 8


def test_end_to_end_without_a_class(image_folder, run_here, tmp_path):
    """A class that nothing has seen, asked beside the others."""
    flags = ["--dataset", image_folder, "--image_size", 8, "--probe", "lbfgs", "--no-baselines"]
    flags += ["--other_sets", "noise", *NARROW, "--batch_size", 32, "--epochs", 1]
    flags += ["--stages", "pretrain,knn,certainty", "--knn_k", 5, "--output_dir", "out"]
    done = run_here("simCLR.py", *flags, "--without_classes", "green", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "200 images of 8 pixels for pretraining" in done.stdout
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert set(found["probe"]["per_class"]) == {"red", "blue"}
    assert found["classes"] == ["blue", "red"]
    others = found["certainty"]["ways"]["probe's softmax"]["others"]
    assert set(others) == {"classes left out", "noise"}
    measure = [*flags[:6], "--checkpoint", "out", "--stages", "features,knn"]
    for name, more, words in (
        ("all", [], "trained without green"),
        ("none", ["--without_classes", "green,blue"], "left then: leave two"),
        ("seen", ["--without_classes", "blue"], "trained on blue: only the probe"),
        ("same", ["--without_classes", "green"], "writing to same"),
    ):
        done = run_here("simCLR.py", *measure, *more, "--output_dir", name, cwd=tmp_path)
        assert words in done.stdout + done.stderr, name
        assert done.returncode == (2 if name == "none" else 0)
    kept = np.load(tmp_path / "same/features.npz")
    assert kept["classes"].tolist() == ["blue", "red"]
    assert len(kept["h"]) == 216

    wrong = run_here("simCLR.py", *flags[:-1], "b", "--without_classes", "pink", cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert "--without_classes" in wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize("loss", [loss for loss in CERTAIN if loss != "tau"])
def test_each_loss_is_asked_what_it_has_learned(loss, run_here, tmp_path):
    """On digits, from pretraining to the figures."""
    flags = ["--dataset", "digits", "--loss", loss, *NARROW, "--batch_size", 200, "--epochs", 1]
    flags += ["--stages", "pretrain,certainty", "--probe", "lbfgs", "--no-baselines", "--flip", 0]
    flags += ["--other_sets", "noise", "--output_dir", "out"]
    done = run_here("simCLR.py", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads((tmp_path / "out/results.json").read_text())["certainty"]["ways"]
    assert set(found) == COMMON | {"norm of z", loss}
    low, *_, high = found[loss]["quantiles"]
    assert low < high
    assert found[loss]["others"]["noise"] is not None
    assert (tmp_path / "out/surest.png").is_file()


def test_harder_images_are_what_they_are_called():
    """Whole ones stay, a crop keeps what it shows, blur takes contrast, noise adds its own."""
    images = torch.rand(4, 3, 32, 32)
    assert torch.equal(certainty.blurred(images, 0.0), images)
    assert torch.equal(certainty.noisy(images, 0.0), images)
    torch.testing.assert_close(certainty.cropped(images, 1.0), images)
    assert (
        certainty.blurred(images, 2.0).std() < certainty.blurred(images, 0.5).std() < images.std()
    )
    added = certainty.noisy(torch.full((1, 3, 64, 64), 0.5), 0.1) - 0.5
    assert float(added.std()) == pytest.approx(0.1, rel=0.05)

    ramp = torch.linspace(0, 1, 64).expand(200, 3, 64, 64)  # a crop of a share shows its root of it
    crops = certainty.cropped(ramp, 0.25)
    spans = crops.amax((1, 2, 3)) - crops.amin((1, 2, 3))
    assert crops.shape == ramp.shape
    assert float((spans**2).mean()) == pytest.approx(0.25, rel=0.15)
    tiny = certainty.blurred(torch.rand(2, 3, 4, 4), 3.0)
    assert tiny.shape == (2, 3, 4, 4)
    assert math.isfinite(float(tiny.sum()))
