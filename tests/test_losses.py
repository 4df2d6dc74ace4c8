"""contrastive/losses.py, against slow transcriptions: more views, and the decoupled loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import randn

import functions as fn
from contrastive.losses import EachPositive, contrastive_loss


def sim(a, b):
    return float(F.cosine_similarity(a, b, dim=0))


def slow_each(z, views, tau, decoupled=False):
    """The docstring's formula, sum by sum: z is (M, N, D)."""
    m, n = z.shape[:2]
    terms = []
    for i in range(n):
        for v in range(m):
            others = sum(
                math.exp(sim(z[v, i], z[u, j]) / tau) for j in range(n) if j != i for u in range(m)
            )
            for u in range(m):
                if u != v:
                    positive = math.exp(sim(z[v, i], z[u, i]) / tau)
                    below = others if decoupled else positive + others
                    terms.append(-math.log(positive / below))
    return sum(terms) / len(terms)


def slow_mean(z, views, tau, decoupled=False):
    """NT-Xent between each view and the normalised mean of its image's others."""
    m = len(z)
    unit = F.normalize(z, dim=2)
    losses = []
    for v in range(m):
        others = torch.stack([unit[u] for u in range(m) if u != v]).mean(0)
        pair = torch.stack([unit[v], F.normalize(others, dim=1)])
        losses.append(slow_each(pair, 2, tau, decoupled))
    return sum(losses) / m


SLOW = {"each": slow_each, "mean": slow_mean}


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize("positives", ["each", "mean"])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_the_loss_is_its_formula(views, positives, decoupled, tau):
    z = randn(views, 5, 6, seed=views)
    ours = contrastive_loss(z.flatten(0, 1), views, tau, positives, decoupled)
    assert float(ours) == pytest.approx(SLOW[positives](z, views, tau, decoupled), rel=1e-10)


@pytest.mark.parametrize("positives", ["each", "mean"])
def test_two_views_are_exactly_nt_xent(positives):
    z = randn(40, 8, dtype=torch.float32)
    assert torch.equal(contrastive_loss(z, 2, 0.3, positives), fn.nt_xent_loss(z, 0.3))


def test_the_kernel_of_more_views_is_nt_xent_for_two():
    """Also its gradient: one formula in two forms."""
    a, b = (randn(40, 8).requires_grad_() for _ in range(2))
    ours = EachPositive.apply(F.normalize(a, dim=1), 2, 0.3, False, 16)
    theirs = fn.nt_xent_loss(b, 0.3)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("views", [2, 3, 5])
@pytest.mark.parametrize("positives", ["each", "mean"])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("block", [1, 4, 1000])
def test_its_gradient_is_that_of_the_loss(views, positives, decoupled, block):
    z = randn(views * 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: contrastive_loss(z, views, 0.4, positives, decoupled, block), (z,)
    )


@pytest.mark.parametrize("positives", ["each", "mean"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_neither_the_order_of_images_nor_of_views_matters(positives, decoupled):
    z = randn(4, 7, 5)
    images, views = torch.randperm(7), torch.randperm(4)
    losses = [
        float(contrastive_loss(part.flatten(0, 1), 4, 0.3, positives, decoupled))
        for part in (z, z[:, images], z[views])
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-12)


def test_all_embeddings_alike_give_the_loss_of_chance():
    """exp(0) of one positive and M (N - 1) negatives; decoupled, of the negatives alone."""
    z = torch.ones(4 * 6, 3)
    assert float(contrastive_loss(z, 4)) == pytest.approx(math.log(1 + 4 * 5), rel=1e-5)
    assert float(contrastive_loss(z, 4, decoupled=True)) == pytest.approx(math.log(4 * 5), rel=1e-5)


def test_views_that_are_alike_still_learn_when_decoupled():
    """Yeh et al. 2022: the positive in the denominator takes the gradient of an easy pair away."""
    z = torch.eye(6, dtype=torch.float64).repeat(2, 1)  # each pair alike, all others orthogonal
    slopes = []
    for decoupled in (False, True):
        turned = (z + 0.1 * randn(12, 6)).requires_grad_()
        contrastive_loss(turned, 2, 0.05, decoupled=decoupled).backward()
        slopes.append(float(turned.grad.norm()))
    assert slopes[1] > 100 * slopes[0]


@pytest.mark.parametrize(("rows", "views"), [(7, 2), (8, 3), (0, 2), (4, 1)])
def test_rows_that_are_no_views_of_images_are_refused(rows, views):
    with pytest.raises(ValueError, match="embeddings must be"):
        contrastive_loss(torch.zeros(rows, 3), views)


def test_it_is_computed_in_float32_under_autocast():
    z = randn(12, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(z, 3, 0.1, "mean")
    assert loss.dtype == torch.float32
    assert torch.equal(loss, contrastive_loss(z.float(), 3, 0.1, "mean"))
