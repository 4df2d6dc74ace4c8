"""functions.py except its data sets: subsets, Normalize, loss, features, k-NN and figures."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, randint, randn
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import functions as fn

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


# ------------------------------------------------------------------------------------------------
# Subsets and Normalize
# ------------------------------------------------------------------------------------------------


ORDER = torch.randperm(255, generator=torch.manual_seed(0))
UNEVEN = torch.tensor([7] * 1 + [2] * 3 + [0] * 50 + [5] * 201)[ORDER]


@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.1, 1 / 3, 0.5, 0.99, 1])
def test_subset_takes_its_share_of_every_class_and_at_least_one(fraction):
    chosen = fn.stratified_subset(UNEVEN, fraction, seed=0)
    assert chosen.dtype == torch.int64
    assert torch.equal(chosen, chosen.unique())  # sorted and distinct
    for label in UNEVEN.unique():
        members, count = int((label == UNEVEN).sum()), int((UNEVEN[chosen] == label).sum())
        assert count >= 1
        assert abs(count - fraction * members) <= 0.5 or count == 1


def test_subset_is_fixed_by_its_seed_alone():
    first = fn.stratified_subset(UNEVEN, 0.2, seed=1)
    torch.manual_seed(99)
    assert torch.equal(first, fn.stratified_subset(UNEVEN, 0.2, seed=1))
    subsets = {tuple(fn.stratified_subset(UNEVEN, 0.2, seed).tolist()) for seed in range(20)}
    assert len(subsets) == 20


def test_over_many_seeds_every_image_is_equally_likely():
    labels = torch.tensor([0] * 10 + [1] * 20)
    subsets = (fn.stratified_subset(labels, 0.3, seed) for seed in range(2000))
    times = sum(torch.bincount(subset, minlength=30) for subset in subsets)
    assert (times / 2000 - 0.3).abs().max() < 5 * math.sqrt(0.3 * 0.7 / 2000)


def test_the_whole_fraction_is_everything():
    assert torch.equal(fn.stratified_subset(UNEVEN, 1, seed=3), torch.arange(len(UNEVEN)))


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, math.nan, math.inf])
def test_no_other_fraction_is_accepted(fraction):
    with pytest.raises(ValueError, match="fraction"):
        fn.stratified_subset(UNEVEN, fraction, seed=0)


def test_a_subset_by_count_has_that_many_of_each_class_and_smaller_ones_within():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 4)[torch.randperm(84)]
    chosen = [fn.per_class_subset(labels, count, seed=3) for count in (1, 2, 10)]
    counts = [labels[indices].bincount().tolist() for indices in chosen]
    assert counts == [[1, 1, 1], [2, 2, 2], [10, 10, 4]]
    one, two, ten = (set(indices.tolist()) for indices in chosen)
    assert one < two < ten
    assert torch.equal(chosen[1], fn.per_class_subset(labels, 2, seed=3))
    assert not torch.equal(chosen[2], fn.per_class_subset(labels, 10, seed=4))


def test_subset_and_complement_are_everything_once():
    subset = fn.stratified_subset(UNEVEN, 0.3, seed=0)
    rest = fn.complement(subset, len(UNEVEN))
    assert rest.dtype == torch.int64
    assert torch.equal(rest, rest.sort().values)
    assert torch.equal(torch.cat([subset, rest]).sort().values, torch.arange(len(UNEVEN)))
    assert fn.complement(torch.arange(4), 4).tolist() == []


def skewed_images(n: int = 40) -> torch.Tensor:
    """Three channels of different mean and spread, uint8 (n, 3, 8, 8)."""
    divisors = torch.tensor([1, 3, 9], dtype=torch.uint8).view(3, 1, 1)
    return randint(256, n, 3, 8, 8, dtype=torch.uint8) // divisors


def test_training_images_are_normalised_to_mean_0_and_deviation_1():
    images = skewed_images()
    normalised = fn.Normalize(images)(images)
    assert normalised.dtype == torch.float32
    assert normalised.shape == images.shape

    mean, std = normalised.mean((0, 2, 3)), normalised.std((0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(std, torch.ones(3), atol=1e-4, rtol=0)


def test_normalize_is_torchvisions_totensor_and_normalize():
    from torchvision import transforms

    train, other = skewed_images(), randint(256, 5, 3, 8, 8, seed=1, dtype=torch.uint8)
    values = train.numpy().astype(np.float64) / 255
    normalize = transforms.Normalize(values.mean((0, 2, 3)), values.std((0, 2, 3)))
    theirs = transforms.Compose([transforms.ToTensor(), normalize])

    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in other]
    expected = torch.stack([theirs(picture) for picture in pictures])
    torch.testing.assert_close(fn.Normalize(train)(other), expected.float(), atol=1e-5, rtol=1e-5)


def test_the_statistics_of_a_subset_are_those_of_its_images_alone():
    """Also of more images than are looked at together."""
    images = randint(256, 9000, 3, 4, 4, dtype=torch.uint8)
    images[::2] //= 3
    chosen = torch.arange(1, 9000, 2)
    part, copied = fn.Normalize(fn.Subset(images, chosen)), fn.Normalize(images[chosen])
    assert torch.equal(part.mean, copied.mean)
    assert torch.equal(part.std, copied.std)
    values = images[chosen].double() / 255
    expected = values.mean((0, 2, 3), keepdim=True)[0].float()
    torch.testing.assert_close(part.mean, expected, rtol=1e-6, atol=0)


def test_statistics_that_were_measured_before_are_taken_as_they_are():
    measured = fn.Normalize(randint(256, 50, 3, 4, 4, dtype=torch.uint8))
    again = fn.Normalize.of(measured.mean.flatten(), measured.std.flatten())
    assert torch.equal(again.mean, measured.mean)
    assert torch.equal(again.std, measured.std)


def test_normalize_reads_uint8_and_floats_from_0_to_1_alike_and_changes_neither():
    images = skewed_images()
    floats, normalize = images.float() / 255, fn.Normalize(images)
    before = floats.clone()
    torch.testing.assert_close(normalize(images), normalize(floats), atol=1e-5, rtol=1e-5)
    assert torch.equal(floats, before)


@pytest.mark.parametrize("value", [0, 1, 77, 255])
def test_a_constant_channel_is_only_centred(value):
    images = skewed_images()
    images[:, 1] = value
    normalize = fn.Normalize(images)
    assert normalize(images)[:, 1].abs().max() < 1e-6

    images[:, 1] = 255 - value
    changed = normalize(images)
    expected = torch.full((40, 8, 8), (255 - 2 * value) / 255)
    assert changed.isfinite().all()
    torch.testing.assert_close(changed[:, 1], expected, atol=1e-6, rtol=0)


def test_normalize_measures_any_number_of_channels():
    images = skewed_images()[:, :1]
    assert fn.Normalize(images)(images).std() == pytest.approx(1, abs=1e-3)


# ------------------------------------------------------------------------------------------------
# NT-Xent
# ------------------------------------------------------------------------------------------------


def cosine_similarities(embeddings: torch.Tensor) -> list[list[float]]:
    """s[i][k] = z_i . z_k / (|z_i| |z_k|), with Python's numbers."""
    z = embeddings.double().tolist()
    length = [math.sqrt(sum(value * value for value in row)) for row in z]
    dot = [[sum(map(float.__mul__, row, other)) for other in z] for row in z]
    return [[dot[i][k] / (length[i] * length[k]) for k in range(len(z))] for i in range(len(z))]


def algorithm_1(s: list[list[float]], tau: float) -> float:
    """The end of the paper's Algorithm 1, with l(i, j) of Eq. 1.

    Our rows k and k + N are its 2k - 1 and 2k.
    """
    n = len(s) // 2

    def l(i: int, j: int) -> float:  # noqa: E743 (the paper's letter)
        denominator = sum(math.exp(s[i][k] / tau) for k in range(2 * n) if k != i)
        return -math.log(math.exp(s[i][j] / tau) / denominator)

    return sum(l(k, k + n) + l(k + n, k) for k in range(n)) / (2 * n)


TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-5}


@pytest.mark.parametrize("n", range(1, 20))
def test_loss_is_algorithm_1_of_the_paper(n):
    """With values in bfloat16, which every type holds exactly."""
    for d in (1, 2, 5, 64):
        z = randn(2 * n, d, seed=100 * n + d, dtype=torch.bfloat16)
        s = cosine_similarities(z)
        for tau in (0.1, 0.5, 1.0, 10.0):
            expected = algorithm_1(s, tau)
            for dtype, tolerance in TOLERANCES.items():
                loss, case = fn.nt_xent_loss(z.to(dtype), tau), (d, dtype, tau)
                assert loss.shape == ()
                assert loss.item() == pytest.approx(expected, rel=tolerance, abs=tolerance), case


@pytest.mark.parametrize("n", [1, 2, 3, 64, 500])
@pytest.mark.parametrize("tau", [0.05, 0.5, 10])
def test_identical_embeddings_cost_log_of_2n_minus_1(n, tau):
    z = randn(1, 16).repeat(2 * n, 1)
    assert fn.nt_xent_loss(z, tau).item() == pytest.approx(math.log(2 * n - 1), abs=1e-9)
    assert fn.nt_xent_loss(z.float(), tau).item() == pytest.approx(math.log(2 * n - 1), abs=1e-4)


@pytest.mark.parametrize("n", [2, 3, 20])
@pytest.mark.parametrize("tau", [0.05, 0.5, 10])
def test_orthogonal_pairs_have_their_closed_form(n, tau):
    z = torch.eye(n, dtype=torch.float64).repeat(2, 1)
    expected = math.log1p((2 * n - 2) * math.exp(-1 / tau))
    assert fn.nt_xent_loss(z, tau).item() == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_perfect_separation_costs_nothing_at_a_small_temperature():
    assert fn.nt_xent_loss(torch.eye(8).repeat(2, 1), 0.02).item() < 1e-6


def test_the_positive_stands_once_in_the_denominator():
    z, tau, n = randn(12, 4), 0.5, 6
    s = cosine_similarities(z)
    twice = 0.0
    for i in range(2 * n):
        positive = math.exp(s[i][(i + n) % (2 * n)] / tau)
        others = sum(math.exp(s[i][k] / tau) for k in range(2 * n) if k != i)
        twice += -math.log(positive / (positive + others)) / (2 * n)
    assert abs(fn.nt_xent_loss(z, tau).item() - twice) > 0.05

    pair = fn.nt_xent_loss(randn(2, 4), tau)  # a pair alone has no negatives
    assert pair.item() == pytest.approx(0, abs=1e-12)


def test_loss_does_not_depend_on_the_length_of_an_embedding():
    z, lengths = randn(14, 5), torch.logspace(-3, 3, 14, dtype=torch.float64).view(-1, 1)
    torch.testing.assert_close(fn.nt_xent_loss(lengths * z, 0.3), fn.nt_xent_loss(z, 0.3))


def test_loss_does_not_depend_on_the_order_of_images_or_views():
    a, b = randn(7, 5), randn(7, 5, seed=1)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    loss = fn.nt_xent_loss(torch.cat([a, b]), 0.3)
    torch.testing.assert_close(fn.nt_xent_loss(torch.cat([a[order], b[order]]), 0.3), loss)
    torch.testing.assert_close(fn.nt_xent_loss(torch.cat([b, a]), 0.3), loss)

    some = torch.cat([b[:3], a[3:]]), torch.cat([a[:3], b[3:]])  # of the first three images only
    torch.testing.assert_close(fn.nt_xent_loss(torch.cat(some), 0.3), loss)

    mixed = fn.nt_xent_loss(torch.cat([a, b[order]]), 0.3)  # which view belongs to which matters
    assert abs(mixed - loss) > 1e-3


@pytest.mark.parametrize(("n", "d", "tau"), [(1, 3, 0.5), (3, 4, 0.5), (5, 2, 0.1), (4, 7, 10.0)])
def test_gradient_is_the_derivative(n, d, tau):
    z = randn(2 * n, d).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: fn.nt_xent_loss(z, tau), z)


def gradient_of(z: torch.Tensor, tau: float = 0.5) -> torch.Tensor:
    z = z.detach().clone().requires_grad_()
    fn.nt_xent_loss(z, tau).backward()
    return z.grad


def whole_matrix_loss(z: torch.Tensor, tau: float) -> torch.Tensor:
    """Eq. 1 with the (2N, 2N) matrix in memory and torch's own derivative."""
    z = torch.nn.functional.normalize(z, dim=1)
    logits = (z @ z.T / tau).fill_diagonal_(-torch.inf)
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


@pytest.mark.parametrize("block", [1, 3, 7, 12, 13, 23, 24, 25, None])
@pytest.mark.parametrize("tau", [0.02, 0.5, 10.0])
def test_blocks_change_neither_loss_nor_gradient(block, tau):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        a, b = (randn(24, 6, dtype=dtype).requires_grad_() for _ in range(2))
        loss, expected = fn.nt_xent_loss(a, tau, block), whole_matrix_loss(b, tau)
        torch.testing.assert_close(loss, expected, atol=tolerance, rtol=tolerance)
        (3 * loss).backward()
        (3 * expected).backward()
        torch.testing.assert_close(a.grad, b.grad, atol=tolerance / tau, rtol=tolerance)


@pytest.mark.parametrize("block", [1, 4, 5])
def test_gradient_of_blocks_is_the_derivative(block):
    z = randn(10, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: fn.nt_xent_loss(z, 0.3, block), z)


def test_a_large_batch_in_float32_is_rounded_no_worse_than_the_whole_matrix():
    z = randn(3000, 32)
    types = (torch.float64, torch.float32, torch.float32)
    exact, ours, theirs = (z.to(dtype, copy=True).requires_grad_() for dtype in types)

    exact_loss, loss = whole_matrix_loss(exact, 0.1), fn.nt_xent_loss(ours, 0.1)
    for value in (exact_loss, loss, whole_matrix_loss(theirs, 0.1)):
        value.backward()
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-6)

    error, usual = ((x.grad - exact.grad).norm() / exact.grad.norm() for x in (ours, theirs))
    assert error < max(1e-6, 2 * usual)


@pytest.mark.parametrize("two_n", [64, 256])
def test_no_tensor_is_larger_than_a_block_of_rows(two_n):
    class Largest(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    with Largest() as largest:
        fn.nt_xent_loss(randn(two_n, 4).requires_grad_(), 0.5, block=8).backward()
    assert largest.numel == 8 * two_n


@pytest.mark.parametrize("block", [0, -1])
def test_a_block_without_rows_is_refused(block):
    with pytest.raises(ValueError, match="block"):
        fn.nt_xent_loss(torch.ones(4, 2), 0.5, block)


def test_gradient_is_orthogonal_to_each_embedding():
    z = randn(16, 6)
    gradient = gradient_of(z)
    assert gradient.norm(dim=1).min() > 1e-4
    assert (gradient * z).sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_of_reduced_precision_is_computed_in_float32(dtype):
    z = randn(64, 32, dtype=dtype)
    loss = fn.nt_xent_loss(z, 0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(fn.nt_xent_loss(z.double(), 0.1).item(), rel=1e-5)
    assert gradient_of(z).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_autocast_changes_neither_loss_nor_gradient(dtype):
    z = randn(64, 32, dtype=dtype)
    inside, outside = z.clone().requires_grad_(), z.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = fn.nt_xent_loss(inside, 0.1)
    expected = fn.nt_xent_loss(outside, 0.1)
    of_loss = torch.float64 if dtype == torch.float64 else torch.float32

    assert loss.dtype == expected.dtype == of_loss
    assert loss.item() == expected.item()

    loss.backward()
    expected.backward()
    assert torch.equal(inside.grad, outside.grad)


@pytest.mark.parametrize("tau", [0.001, 0.01, 1000.0])
def test_extreme_temperatures_and_embeddings_stay_finite(tau):
    for z in (randn(20, 8), 300 * randn(20, 8, dtype=torch.float16), torch.zeros(20, 8)):
        assert fn.nt_xent_loss(z, tau).isfinite()
        assert gradient_of(z.float(), tau).isfinite().all()


def test_loss_leaves_its_input_alone():
    z = torch.nn.functional.normalize(randn(8, 4))
    before = z.clone()
    fn.nt_xent_loss(z, 0.5)
    assert torch.equal(z, before)


@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (0, 4), (4,), (), (2, 2, 2)])
def test_embeddings_that_are_no_pairs_are_refused(shape):
    with pytest.raises(ValueError, match="2N"):
        fn.nt_xent_loss(torch.ones(shape))


@pytest.mark.parametrize("tau", [0, -1, -math.inf, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(tau):
    with pytest.raises(ValueError, match="temperature"):
        fn.nt_xent_loss(torch.ones(4, 2), tau)


# ------------------------------------------------------------------------------------------------
# Features, k-NN and accuracy
# ------------------------------------------------------------------------------------------------


def small_model(images: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()]
    model = nn.Sequential(fn.Normalize(images), *layers)
    model(images)  # so that BatchNorm's statistics are not 0 and 1
    return model


@pytest.mark.parametrize("training", [True, False])
def test_extracting_features_leaves_the_model_as_it_was(training):
    images = skewed_images()
    model = small_model(images).train(training)
    model[2].train(not training)  # one part in a mode of its own
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fn.extract_features(model, images, CPU.machine)
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("batch_size", [1, 7, 40, 500])
def test_features_are_the_models_output_in_eval_mode_whatever_the_batch_size(batch_size):
    images = skewed_images()
    model = small_model(images)
    features = fn.extract_features(model, images, CPU.machine, batch_size)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(features, model.eval()(images), atol=1e-5, rtol=1e-5)


def test_features_computed_in_bfloat16_come_as_float32():
    images = skewed_images()
    model = small_model(images)
    exact = fn.extract_features(model, images, CPU.machine)
    reduced = fn.extract_features(model, images, fn.Machine("cpu", "bf16"))
    assert reduced.dtype == torch.float32
    assert 0 < (reduced - exact).abs().max() < 0.1


def slow_knn(queries, bank, labels, num_classes: int, k: int, tau: float) -> list[int]:
    """Wu et al. 2018, section 3.4, with Python's loops."""
    predictions = []
    for query in queries.tolist():
        similarities = []
        for row in bank.tolist():
            length = math.hypot(*query) * math.hypot(*row)
            similarities.append(sum(map(float.__mul__, query, row)) / length)
        votes = [0.0] * num_classes
        for i in sorted(range(len(bank)), key=lambda i: -similarities[i])[:k]:
            votes[int(labels[i])] += math.exp(similarities[i] / tau)
        predictions.append(votes.index(max(votes)))
    return predictions


def queries_and_bank(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (n, 6), a bank (60, 6) and its labels, of four classes."""
    bank = randn(60, 6, seed=1, dtype=torch.float32)
    return randn(n, 6, dtype=torch.float32), bank, randint(4, 60)


@pytest.mark.parametrize("k", [1, 2, 5, 20, 60, 1000])
@pytest.mark.parametrize("tau", [0.02, 0.1, 1.0])
def test_knn_is_the_weighted_vote_of_the_nearest(k, tau):
    queries, bank, labels = queries_and_bank(30)
    predicted = fn.knn_predict(queries, bank, labels, 4, k, tau)
    assert predicted.dtype == torch.int64
    assert predicted.tolist() == slow_knn(queries, bank, labels, 4, k, tau)


def test_knn_weights_stay_finite_at_a_small_temperature():
    bank = torch.tensor([[1.0, 0.1], [1.0, 0.0]])  # exp(1 / 0.005) is more than float32 holds
    query, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0, 1])
    assert fn.knn_predict(query, bank, labels, 2, 2, 0.005).tolist() == [1]


def test_knn_does_not_depend_on_the_block_or_on_lengths():
    queries, bank, labels = queries_and_bank(50)
    whole = fn.knn_predict(queries, bank, labels, 4, 9)
    assert len(whole.unique()) > 1
    for block in (1, 7, 50, 51):
        assert torch.equal(fn.knn_predict(queries, bank, labels, 4, 9, block=block), whole)

    longer = bank * torch.arange(1, 61).view(-1, 1)
    assert torch.equal(fn.knn_predict(3 * queries, longer, labels, 4, 9), whole)


def test_one_neighbour_is_the_nearest_and_an_image_is_nearest_to_itself():
    bank, labels = randn(60, 6, dtype=torch.float32), randint(4, 60)
    assert torch.equal(fn.knn_predict(bank, bank, labels, 4, k=1), labels)


def test_knn_of_perfect_clusters_is_perfect():
    labels = torch.arange(100) % 5
    points = 10 * torch.eye(5)[labels] + 0.1 * randn(100, 5, dtype=torch.float32)
    predicted = fn.knn_predict(points[:40], points[40:], labels[40:], 5, k=10)
    assert fn.accuracy(predicted, labels[:40]) == 1.0


def test_accuracy_is_the_fraction_of_right_predictions():
    labels = torch.tensor([0, 1, 2, 2])
    assert fn.accuracy(labels, labels) == 1.0
    assert fn.accuracy(torch.tensor([0, 1, 2, 0]), labels) == 0.75
    assert fn.accuracy(torch.tensor([1, 0, 0, 0]), labels) == 0.0
    assert isinstance(fn.accuracy(labels, labels), float)


def test_accuracy_per_class_is_none_for_a_class_without_images():
    predictions, labels = torch.tensor([0, 1, 2, 0, 3]), torch.tensor([0, 0, 2, 2, 2])
    per_class = fn.accuracy_per_class(predictions, labels, ("a", "b", "c", "d"))
    assert per_class == {"a": 0.5, "b": None, "c": pytest.approx(1 / 3), "d": None}


def test_the_three_hardest_classes_are_named(capsys):
    fn.print_per_class({"a": 0.5, "b": None, "c": 0.25, "d": 1.0, "e": 0.75})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["d", "e", "a", "c"]
    assert lines[-1].strip() == "hardest classes: c 25.0 %, a 50.0 %, e 75.0 %"


# ------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------


def assert_figure(file: Path) -> None:
    """The file is a PNG of some size that shows something."""
    with Image.open(file) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width > 300
        assert image.height > 300
        assert len(image.convert("RGB").getcolors(2**24)) > 20
    assert os.listdir() == [file.name]


def curve(epochs: int) -> list[dict[str, float]]:
    names = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
    rows = []
    for i in range(1, epochs + 1):
        rows.append({"epoch": i, **{name: 1 / (i + j) for j, name in enumerate(names)}})
    return rows


CURVES = [{"probe": curve(1)}, {"rnn": curve(30), "lstm": curve(5), "gru": curve(30)}]


@pytest.mark.parametrize("runs", CURVES)
def test_curves_are_drawn(runs):
    fn.plot_curves(runs, "validation", Path("curves.png"), "Accuracy")
    assert_figure(Path("curves.png"))


def test_curves_of_a_training_that_holds_nothing_out_are_drawn(capsys):
    rows = [{name: row[name] for name in row if "validation" not in name} for row in curve(5)]
    fn.plot_curves({"scratch": rows}, "validation", Path("curves.png"), "Accuracy")
    assert_figure(Path("curves.png"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("classes", [2, 10, 30])
def test_confusion_matrix_is_drawn_also_with_a_class_that_no_image_has(classes):
    predictions, labels = randint(classes, 200), randint(classes - 1, 200, seed=1)
    names = [f"class {i}" for i in range(classes)]
    fn.plot_confusion_matrix(predictions, labels, names, Path("c.png"), "Test images")
    assert_figure(Path("c.png"))


@pytest.mark.parametrize("classes", [2, 10, 30])
def test_scatter_of_points_is_drawn(classes):
    points, labels = randn(200, 2).numpy(), randint(classes, 200)
    names = [f"class {i}" for i in range(classes)]
    fn.plot_tsne(points, labels, names, Path("t.png"), "t-SNE")
    assert_figure(Path("t.png"))


def test_class_names_of_any_kind_can_be_drawn(tmp_path):
    """No name is read as a formula, hides from the legend, or warns about a missing glyph."""
    names = ["$^$", "_hidden", "猫"]
    points, labels = np.random.default_rng(0).random((30, 2)), torch.arange(30) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fn.plot_confusion_matrix(labels, labels, names, tmp_path / "matrix.png", "t")
        fn.plot_tsne(points, labels, names, tmp_path / "tsne.png", "t")


@pytest.mark.parametrize("name", ["a\udcff", "\x00", "b" * 500])
def test_a_name_that_cannot_be_drawn_costs_one_line(name, tmp_path, capsys):
    predicted, labels = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0])
    fn.plot_confusion_matrix(predicted, labels, (name, "b"), tmp_path / "x.png", "t")
    drawn, said = (tmp_path / "x.png").is_file(), capsys.readouterr().err.splitlines()
    assert drawn == (said == [])
    assert len(said) <= 1


@pytest.mark.parametrize("values", [[0.979, 0.986], [0.5, 0.5], [1.0, 1.0], [0.0, 0.001]])
def test_an_axis_of_accuracy_spans_five_points_at_least(values):
    """Noise of half a point is not to fill the figure."""
    _, axis = fn.new_figure(4, 3)
    axis.plot(values)
    fn.over_epochs(axis, "accuracy", accuracy=True)
    low, high = axis.get_ylim()
    assert high - low > 0.0499
    assert low < min(values)
    assert max(values) < high


def test_a_wide_axis_of_accuracy_stays_as_it_is():
    _, axis = fn.new_figure(4, 3)
    axis.plot([0.1, 0.9])
    before = axis.get_ylim()
    fn.of_accuracy(axis)
    assert axis.get_ylim() == before


def test_a_table_has_its_first_column_flush_left_and_the_others_flush_right(capsys):
    fn.print_columns([("cell", "test", "gap"), ("lstm, wide", "57.9 %", "3"), ("rnn", "5.1 %", "")])
    assert capsys.readouterr().out == (
        "  cell           test   gap\n  lstm, wide   57.9 %     3\n  rnn           5.1 %\n"
    )
