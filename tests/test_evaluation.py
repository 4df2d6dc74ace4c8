"""The frozen encoder: k-NN, the linear probe, few labels."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import assert_rate, assert_same_bits, cloned_state, make_config
from sklearn.linear_model import LogisticRegressionCV
from torch import nn

import functions as fn
import simCLR
from contrastive import evaluation, few_labels
from contrastive import probe as probing

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


def blobs(
    num_classes: int = 3, spread: float = 0.1, per_class: int = 40, dim: int = 6
) -> probing.Features:
    """Gaussian clouds around orthogonal unit vectors; with a small spread, linearly separable."""
    labels = torch.arange(num_classes).repeat(per_class)
    centres = torch.eye(dim)[labels]
    train, test = (centres + spread * torch.randn(len(labels), dim) for _ in range(2))
    classes = tuple(f"class {i}" for i in range(num_classes))
    return probing.Features(train, labels, test, labels, classes)


def probed(features: probing.Features, probe: str, **values) -> nn.Linear:
    classifier = nn.Linear(features.train.shape[1], len(features.classes))
    probing.train_probe(
        classifier,
        features,
        make_config(probe=probe, probe_epochs=20, probe_batch_size=32, **values),
    )
    return classifier


@torch.no_grad()
def accuracy_of(classifier: nn.Module, features: probing.Features) -> float:
    return fn.accuracy(classifier(features.test).argmax(1), features.test_labels)


# ------------------------------------------------------------------------------------------------
# The frozen encoder
# ------------------------------------------------------------------------------------------------


def test_a_gradient_step_moves_the_classifier_and_not_one_bit_of_the_encoder(encoder):
    """Neither parameters nor BatchNorm statistics change, although the module is training."""
    model, state = simCLR.LinearClassifier(encoder, 8, 3), cloned_state(encoder)
    before = model.classifier.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model.train()
    for _ in range(3):
        logits = model(torch.rand(16, 3, 8, 8))
        nn.functional.cross_entropy(logits, torch.arange(16) % 3).backward()
        optimizer.step()

    assert logits.shape == (16, 3)
    assert_same_bits(encoder, state)
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert not torch.equal(model.classifier.weight, before)


def test_no_gradient_flows_through_the_frozen_encoder(encoder):
    x = torch.rand(4, 3, 8, 8, requires_grad=True)
    simCLR.LinearClassifier(encoder, 8, 3)(x).sum().backward()
    assert x.grad is None
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_the_encoder_stays_in_eval_mode(encoder):
    model = simCLR.LinearClassifier(encoder.train(), 8, 3)
    assert not any(module.training for module in encoder.modules())
    assert model.train() is model
    assert model.training
    assert model.classifier.training
    assert not any(module.training for module in encoder.modules())


@pytest.mark.parametrize("probe", ["sgd", "lbfgs"])
def test_the_probe_leaves_every_bit_of_the_encoder(encoder, probe):
    """As evaluate() does it: features once, then a LinearClassifier's classifier trains on them."""
    images, labels = torch.randint(256, (60, 3, 8, 8), dtype=torch.uint8), torch.arange(60) % 3
    model, state = simCLR.LinearClassifier(encoder, 8, 3), cloned_state(encoder)
    before, config = cloned_state(model.classifier), make_config(probe=probe, probe_epochs=2)
    pipeline = nn.Sequential(fn.Normalize(images), encoder)
    h = fn.extract_features(pipeline, images, config.machine)
    features = probing.Features(h, labels, h, labels, ("a", "b", "c"))
    probing.train_probe(model.classifier, features, config)

    assert_same_bits(encoder, state)
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert not torch.equal(model.classifier.weight, before["weight"])
    assert not torch.equal(model.classifier.bias, before["bias"])


# ------------------------------------------------------------------------------------------------
# The linear probe
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("probe", ["sgd", "lbfgs"])
def test_the_probe_separates_what_is_linearly_separable(probe, num_classes):
    features = blobs(num_classes)
    assert accuracy_of(probed(features, probe), features) == 1.0


@pytest.mark.parametrize("probe", ["sgd", "lbfgs"])
def test_scale_and_offset_of_the_features_do_not_matter(probe):
    """They are standardised, and the classifier that comes back takes them as they are."""
    features, moved = blobs(spread=0.5), blobs(spread=0.5)
    scale, offset = 10 ** torch.linspace(-3, 3, 6), torch.linspace(-5, 5, 6)
    moved.train, moved.test = (x * scale + offset * scale for x in (features.train, features.test))
    with torch.no_grad():
        logits, moved_logits = (
            probed(features, probe)(features.test),
            probed(moved, probe)(moved.test),
        )
    torch.testing.assert_close(moved_logits, logits, atol=2e-2, rtol=0)


def test_a_probe_that_is_stopped_says_so_in_one_line(capfd):
    """What L-BFGS has come to is taken."""
    features = blobs()
    linear = probing.logistic_regression(features, 1.0, steps=2)
    assert linear.weight.isfinite().all()
    width = features.train.shape[1]
    said = f"note: the probe on {width} numbers an image was stopped after 2 steps\n"
    assert capfd.readouterr().err == said


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_lbfgs_probe_is_logistic_regression_on_standardised_features(num_classes):
    from sklearn.linear_model import LogisticRegression

    features = blobs(num_classes, spread=0.8)  # clouds that overlap
    std, mean = torch.std_mean(features.train, dim=0)
    scaled = dataclasses.replace(features, train=(features.train - mean) / std)
    reference = LogisticRegression(C=probing.best_penalty(scaled, seed=0), max_iter=1000)
    reference.fit(scaled.train, features.train_labels)

    standardised = (features.test - mean) / std
    with torch.no_grad():
        logits = probed(features, "lbfgs")(features.test)
    assert logits.argmax(1).tolist() == reference.predict(standardised).tolist()
    expected = torch.from_numpy(reference.predict_proba(standardised)).float()
    torch.testing.assert_close(logits.softmax(1), expected, atol=1e-3, rtol=0)


def noisy_blobs(noise, per_class=300):
    """Three clouds, and 200 features that say nothing: a few labels are soon learned by heart."""
    features = blobs(per_class=per_class, spread=noise)
    for part in ("train", "test"):
        own = getattr(features, part)
        setattr(features, part, torch.cat([own, torch.randn(len(own), 200)], 1))
    return features


def test_the_penalty_is_chosen_without_the_test_images(monkeypatch):
    """Much noise asks for small weights; what the test images are like does not matter."""
    features = noisy_blobs(noise=0.6)
    chosen = probing.best_penalty(features, seed=0)
    assert chosen < max(probing.PENALTIES)
    features.test, features.test_labels = features.test * torch.nan, features.test_labels * 0
    assert probing.best_penalty(features, seed=0) == chosen

    features = noisy_blobs(noise=0.6)
    reached = accuracy_of(probed(features, "lbfgs"), features)
    monkeypatch.setattr(probing, "best_penalty", lambda *_: 1.0)
    assert reached > accuracy_of(probed(features, "lbfgs"), features)


@pytest.mark.parametrize("per_class", [2, 7, 99, 100])
def test_held_out_labels_choose_the_penalty(per_class):
    """The folds, written out: the likelihood of each one's labels by a probe of the others. With
    100 labels of a class there is one fold."""
    from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit

    part = blobs(spread=0.5, per_class=per_class)
    x, labels = part.train, part.train_labels
    folds = StratifiedKFold(min(5, per_class), shuffle=True, random_state=3)
    if per_class == 100:
        folds = StratifiedShuffleSplit(1, test_size=0.2, random_state=3)

    @torch.no_grad()
    def loss(penalty):
        total = 0.0
        for rest, held_out in folds.split(x, labels):
            linear = probing.logistic_regression(part.labelled(torch.from_numpy(rest)), penalty)
            logits = linear(x[held_out].to(linear.weight.dtype))
            total += float(nn.functional.cross_entropy(logits, labels[held_out]))
        return total

    best = min(probing.PENALTIES, key=loss)
    assert probing.best_penalty(part, seed=3) == best
    assert min(probing.PENALTIES) < best


@pytest.mark.parametrize("per_class", [30, 99, 100])
def test_noise_asks_for_small_weights_and_clear_classes_for_large_ones(per_class):
    features = noisy_blobs(noise=0.6, per_class=per_class)
    assert probing.best_penalty(features, seed=0) < 0.3
    assert probing.best_penalty(blobs(per_class=per_class), seed=0) == max(probing.PENALTIES)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_penalties_are_compared_as_scikit_learn_compares_them(num_classes):
    """Its cross-validation, which computes in float64."""
    features = noisy_blobs(noise=0.6, per_class=60)
    features = features.labelled((features.train_labels < num_classes).nonzero().flatten())
    h, labels = features.train.numpy(), features.train_labels.numpy()
    fitted, held_out = np.split(np.arange(len(h)), 2)
    reference = LogisticRegressionCV(
        Cs=probing.PENALTIES,
        l1_ratios=(0,),
        cv=[(fitted, held_out)],
        scoring="neg_log_loss",
        max_iter=100,
        refit=False,
        use_legacy_attributes=False,
    ).fit(h, labels)
    found = probing.likelihoods(h, labels, fitted, held_out)
    np.testing.assert_allclose(found, reference.scores_.squeeze(), rtol=1e-2)


def test_a_class_too_small_to_choose_by_does_not_choose_for_all():
    """One label of a fourth class, beside clear ones of many."""
    features = blobs(num_classes=4, per_class=100)
    part = features.labelled(torch.arange(301))
    chosen = probing.best_penalty(features.labelled(torch.arange(300)), seed=0)
    assert probing.best_penalty(part, seed=0) == chosen == max(probing.PENALTIES)
    assert accuracy_of(probed(part, "lbfgs"), features) > 0.9


@pytest.mark.parametrize("counts", [(1, 1, 1), (9, 1, 1)])
def test_where_no_label_can_be_held_out_weights_are_small(counts):
    features = blobs()
    few = torch.cat([(features.train_labels == c).nonzero()[:n, 0] for c, n in enumerate(counts)])
    assert probing.best_penalty(features.labelled(few), seed=0) == 0.01


@pytest.mark.parametrize("probe", ["sgd", "lbfgs"])
def test_a_feature_constant_in_training_has_no_say_in_the_test(probe):
    """A dead unit, or a pixel black in all training images: nothing was learned about it."""
    features = blobs()
    features.train[:, 5], features.test[:, 5] = 0.0, torch.rand(len(features.test))
    assert accuracy_of(probed(features, probe), features) == 1.0


def test_the_sgd_probe_records_an_epoch_per_row():
    """The last row describes the classifier that comes back."""
    features, classifier = blobs(spread=0.8), nn.Linear(6, 3)
    features.train, features.test = features.train + 5, features.test + 5
    rows = probing.train_probe(classifier, features, make_config(probe="sgd", probe_epochs=3))
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert {"train_loss", "train_accuracy", "test_loss", "test_accuracy"} <= set(rows[0])
    assert rows[-1]["test_accuracy"] == pytest.approx(accuracy_of(classifier, features))


@pytest.mark.parametrize("probe", ["sgd", "lbfgs"])
def test_what_differs_between_an_image_and_its_mirror_image_says_nothing(probe):
    """Two features as good as each other; in the mirror the first changes its sign. The probe of
    the images alone weighs them alike, and that of both knows the second alone."""
    sign = torch.tensor([-1.0, 1.0]).repeat(40)
    h = sign.view(-1, 1).repeat(1, 2)
    labels = (sign > 0).long()
    features = probing.Features(h, labels, h, labels, ("left", "right"))
    alike = probed(features, probe).weight.diff(dim=0)[0]
    assert min(alike) > 0.1

    mirrored = dataclasses.replace(features, mirrored=h * torch.tensor([-1.0, 1.0]))
    first, second = probed(mirrored, probe).weight.diff(dim=0)[0]
    assert abs(first) < 0.1 * second


@pytest.mark.parametrize(("per_class", "folds"), [(40, 5), (100, 1)])
@pytest.mark.parametrize("alone", [0, 1], ids=["every class", "a class of one"])
def test_no_mirror_image_of_what_is_held_out_helps_to_choose(per_class, folds, alone, monkeypatch):
    """A fifth of the images is held out, and the others learned from with their mirror images; the
    image of a class that has no other takes no part."""
    splits, plain = [], probing.likelihoods

    def noted(h, labels, *split):
        splits.append((h, *split))
        return plain(h, labels, *split)

    monkeypatch.setattr(probing, "likelihoods", noted)
    features = blobs(per_class=per_class)
    features = dataclasses.replace(features, mirrored=-features.train)
    if alone:
        kept = (features.train_labels != 1) | (torch.arange(3 * per_class) == 1)
        features = features.labelled(kept.nonzero().flatten())
    probing.best_penalty(features, seed=0)

    count = (3 - alone) * per_class
    assert len(splits) == folds
    for h, fitted, held_out in splits:
        assert len(h) == 2 * count
        assert (h[count:] == -h[:count]).all()
        assert max(held_out) < count
        assert len(held_out) == count // 5
        assert sorted([*(fitted % count), *held_out, *held_out]) == sorted([*range(count)] * 2)


@pytest.mark.parametrize("probe", ["sgd", "lbfgs"])
def test_what_varies_in_mirror_images_alone_has_a_weight(probe):
    """A feature that is the same in all images, and tells the classes apart in the mirror."""
    labels = torch.arange(2).repeat(40)
    h = torch.ones(80, 1)
    features = probing.Features(h, labels, h, labels, ("a", "b"), mirrored=2.0 * labels.view(-1, 1))
    weight = probed(features, probe).weight.diff(dim=0).item()
    assert 0.1 < weight < 20


def test_few_labels_have_their_own_mirror_images():
    features = dataclasses.replace(blobs(), mirrored=torch.arange(120.0).view(-1, 1).repeat(1, 6))
    few = features.labelled(torch.tensor([3, 50]))
    h, labels = few.to_learn_from()
    assert torch.equal(h[:2], features.train[[3, 50]])
    assert h[2:, 0].tolist() == [3, 50]
    assert labels.tolist() == features.train_labels[[3, 50, 3, 50]].tolist()


# ------------------------------------------------------------------------------------------------
# What is measured
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", ["sgd", "lbfgs"])
def test_separable_features_measure_as_perfect(probe):
    config = make_config(stages="knn,probe", checkpoint="encoder.pt", probe=probe, knn_k=5)
    outcome = evaluation.measure(blobs(), config)
    assert outcome.knn == 1.0
    assert outcome.probe.train_accuracy == outcome.probe.test_accuracy == 1.0
    assert outcome.probe.per_class == {"class 0": 1.0, "class 1": 1.0, "class 2": 1.0}


def test_random_features_measure_as_chance():
    features = blobs(num_classes=4, per_class=200)
    features.train, features.test = (
        torch.randn_like(features.train),
        torch.randn_like(features.test),
    )
    config = make_config(stages="knn,probe", checkpoint="x", probe="lbfgs", knn_k=20)
    outcome = evaluation.measure(features, config)
    for value in (outcome.knn, outcome.probe.test_accuracy):
        assert_rate(round(800 * value), 800, 0.25)


@pytest.mark.parametrize(
    ("stages", "keys"), [("knn", {"knn"}), ("probe", {"probe"}), ("tsne", set())]
)
def test_only_the_stages_asked_for_are_measured(stages, keys):
    config = make_config(stages=stages, checkpoint="encoder.pt", probe="lbfgs")
    assert set(evaluation.measure(blobs(), config).results()) == keys


# ------------------------------------------------------------------------------------------------
# Few labels
# ------------------------------------------------------------------------------------------------


def test_one_label_per_class_of_separable_features_is_enough():
    features = blobs(spread=0.01, dim=3)
    config = make_config(labels_per_class="2,1", label_seeds=3, knn_k=5)
    one, two = few_labels.measure_few_labels(features, config)
    assert (one.amount.per_class, two.amount.per_class) == (1, 2)
    assert one.knn_accuracies == two.knn_accuracies == [1.0] * 3
    assert one.probe_accuracies == two.probe_accuracies == [1.0] * 3


def test_with_one_label_per_class_the_nearest_of_them_decides():
    """The k-NN of each draw, written out: the labels that the draw's seed chooses, and k = 1."""
    features = blobs(spread=2.0)
    config = make_config(labels_per_class=1, label_seeds=4, knn_k=5, seed=7)
    (few,) = few_labels.measure_few_labels(features, config)

    expected = []
    for seed in (7, 8, 9, 10):
        chosen = fn.per_class_subset(features.train_labels, 1, seed)
        bank = nn.functional.normalize(features.train[chosen], dim=1)
        nearest = (nn.functional.normalize(features.test, dim=1) @ bank.T).argmax(1)
        predicted = features.train_labels[chosen][nearest]
        expected.append(fn.accuracy(predicted, features.test_labels))
    assert few.knn_accuracies == expected
    assert len(set(expected)) > 1


def test_more_labels_help_where_one_is_not_enough():
    features = blobs(spread=1.5, per_class=200)
    config = make_config(labels_per_class="1,100", label_seeds=5, knn_k=20)
    one, many = few_labels.measure_few_labels(features, config)
    assert sum(many.knn_accuracies) > sum(one.knn_accuracies) + 0.2
    assert sum(many.probe_accuracies) > sum(one.probe_accuracies) + 0.2


@pytest.mark.parametrize("value", ["0", "1,0", "1,,2", "-1", "1.5", "few", ""])
def test_a_wrong_number_of_labels_is_named(value):
    with pytest.raises(fn.UserError, match="--labels_per_class"):
        make_config(labels_per_class=value).validate()


@pytest.mark.parametrize("value", ["0", "0.1,0", "1.5", "-0.1", ".nan", "inf", "some", "0.1,,1"])
def test_a_wrong_share_of_labels_is_named(value):
    with pytest.raises(fn.UserError, match="--label_fractions"):
        make_config(label_fractions=value).validate()


def test_few_labels_are_among_more_of_the_same_draw():
    """One per class among 4, 1 % among 10 %, and 10 % among all; the draws differ."""
    labels = torch.arange(3).repeat_interleave(torch.tensor([100, 200, 400]))[torch.randperm(700)]
    config = make_config(labels_per_class="4,1", label_fractions="0.1,0.01,1")
    one, four, hundredth, tenth, whole = config.label_amounts
    for seed in (0, 1):
        chosen = [
            set(amount.choose(labels, seed).tolist())
            for amount in (one, four, hundredth, tenth, whole)
        ]
        assert chosen[0] < chosen[1]
        assert chosen[2] < chosen[3] < chosen[4]
        assert [len(each) for each in chosen] == [3, 12, 7, 70, 700]
        counts = labels[tenth.choose(labels, seed)].bincount()
        assert counts.tolist() == [10, 20, 40]  # stratified
    assert not torch.equal(one.choose(labels, 0), one.choose(labels, 1))


def test_a_share_that_leaves_a_class_without_a_label_is_refused():
    labels = torch.tensor([0] * 100 + [1] * 20)
    (amount,) = make_config(label_fractions="0.02").label_amounts
    with pytest.raises(fn.UserError, match=r"--label_fractions 0.02 .* b .*20 labels.* 0.05"):
        amount.check(labels, ("a", "b"))
    (enough,) = make_config(label_fractions="0.05").label_amounts
    enough.check(labels, ("a", "b"))


def test_more_labels_than_a_class_has_are_said_to_be_all_of_them(capsys):
    labels = torch.tensor([0] * 100 + [1] * 20)
    few, many = make_config(labels_per_class="20,21").label_amounts
    few.check(labels, ("a", "b"))
    assert capsys.readouterr().err == ""
    many.check(labels, ("a", "b"))
    said = "note: --labels_per_class 21: b has only 20 labels\n"
    assert capsys.readouterr().err == said


def test_more_neighbours_than_a_class_has_images_are_noted(capsys):
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1])
    probing.note_few_neighbours(labels, ("a", "b"), 3)
    assert capsys.readouterr().err == ""
    probing.note_few_neighbours(labels, ("a", "b"), 4)
    said = "note: --knn_k 4: b has only 3 labelled images, so others outvote it; try"
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize(
    ("accuracies", "words"),
    [([0.5], "50.0 %"), ([0.5, 0.7], "60.0 ± 14.1 %"), ([1.0, 1.0, 1.0], "100.0 ± 0.0 %")],
)
def test_mean_and_sample_standard_deviation(accuracies, words):
    assert few_labels.mean_and_deviation(accuracies) == words
