"""What a certainty is worth: certainties and what was right in, one number out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 15
MOST_LOG_T = 4.6  # a temperature from 0.01 to 100: of a handful of images any could be best


def spearman(a: Tensor, b: Tensor) -> float | None:
    """The correlation of two orders, (N,) each; None where one of them is none."""
    from scipy.stats import spearmanr

    numbers = bool(a.isfinite().all() and b.isfinite().all())
    if not numbers or len(a.unique()) < 2 or len(b.unique()) < 2:
        return None
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def mean_spearman(values: Tensor, by: Tensor) -> float | None:
    """The mean over columns of Spearman's correlation of values (levels, n) with `by` (levels,).

    So each image is compared with its own copies alone: how sure it is of other images, which
    differ in more, says nothing. A column that is the same throughout counts 0.
    """
    from scipy.stats import rankdata

    if not values.isfinite().all():
        return None
    centred = [torch.from_numpy(rankdata(part.numpy(), axis=0)) for part in (values, by[:, None])]
    ours, theirs = (part - part.mean(0) for part in centred)
    lengths = ours.norm(dim=0) * theirs.norm(dim=0)
    return float(((ours * theirs).sum(0) / lengths.clamp_min(1e-12)).mean())


def auroc(certainty: Tensor, right: Tensor) -> float | None:
    """How often what is right has more certainty than what is wrong: certainty (N,), right bool
    (N,). 0.5 is chance, below it certainty misleads. None if all are right, or all wrong."""
    from sklearn.metrics import roc_auc_score

    if right.all() or not right.any() or not certainty.isfinite().all():
        return None
    return float(roc_auc_score(right.numpy(), certainty.numpy()))


def kept_accuracy(certainty: Tensor, right: Tensor) -> Tensor:
    """Accuracy on the 1, 2, ... N surest images: certainty (N,), right bool (N,) -> (N,).

    Images that are equally sure come in no order: each counts as their mean.
    """
    _, place, count = certainty.unique(return_inverse=True, return_counts=True)
    of_ties = torch.zeros(len(count), dtype=torch.float64).index_add_(0, place, right.double())
    expected = (of_ties / count)[place]
    order = certainty.argsort(descending=True)
    return expected[order].cumsum(0) / torch.arange(1, len(order) + 1)


def kept_at(certainty: Tensor, right: Tensor, shares: Sequence[float]) -> list[float] | None:
    """Accuracy where these shares of the images are kept, the surest: a few points of
    `kept_accuracy`, and None for what is no order."""
    if not certainty.isfinite().all():
        return None
    curve = kept_accuracy(certainty, right)
    return [float(curve[max(1, round(share * len(curve))) - 1]) for share in shares]


def aurc(certainty: Tensor, right: Tensor) -> float | None:
    """The area under risk over coverage (the curve: Geifman & El-Yaniv 2017, arXiv 1705.08500; its
    area: Geifman et al. 2019, arXiv 1805.08206): the mean error of the surest, over how many are
    kept. The lower the better; None for what is no order."""
    if not certainty.isfinite().all():
        return None
    return float(1 - kept_accuracy(certainty, right).mean())


def order_of_errors(certainty: Tensor, right: Tensor) -> float | None:
    """What an order of the errors (N,) is worth, whatever their share: 0 if they lie anywhere, 1 if
    they come last. None where there is nothing to order.

    1 - (aurc - that of the best order) / (that of no order - that of the best): the excess over the
    best, as in Geifman et al. (2019, arXiv 1805.08206, Section 2), as a share of what no order has.
    Below 0 the errors come first.
    """
    found, best = aurc(certainty, right), aurc(right.double(), right)
    wrong = 1 - float(right.double().mean())
    if found is None or best is None or wrong in (0.0, 1.0):
        return None
    return (wrong - found) / (wrong - best)


def nearest_is_alike(h: Tensor, labels: Tensor, block: int = 512) -> Tensor:
    """Whether the nearest other image, by cosine, is of the same class: (N, D) -> bool (N,).

    What a certainty is to predict (R-AUROC: Kirchhof et al. 2023, arXiv 2307.03810, Section 3).
    """
    unit = F.normalize(h, dim=1)
    found = []
    for start in range(0, len(unit), block):
        similarity = unit[start : start + block] @ unit.T
        similarity.diagonal(start).fill_(-torch.inf)
        found.append(similarity.argmax(1))
    return labels[torch.cat(found)] == labels


def ranks(values: Tensor, among: Tensor) -> Tensor:
    """Where values, of any shape, stand among others (N,): 0 the least, 1 the largest.

    Equal ones stand in the middle of their kind.
    """
    order, values = among.sort().values, values.contiguous()
    below, up_to = (torch.searchsorted(order, values, right=part) for part in (False, True))
    return (below + up_to) / (2 * len(among))


def mean_ranks(certainties: Tensor, among: Tensor) -> list[float]:
    """Where certainties (levels, n) stand among those of whole images (N,): the mean of each level,
    0 the least sure and 1 the surest."""
    return ranks(certainties, among).mean(1).tolist()


# ------------------------------------------------------------------------------------------------
# Probabilities
# ------------------------------------------------------------------------------------------------


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """By which to divide logits (N, K) so that labels (N,) are likeliest (Guo et al. 2017, arXiv
    1706.04599, Section 4.2)."""
    log_t = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_t.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(log_t.detach().clamp(-MOST_LOG_T, MOST_LOG_T).nan_to_num(0.0).exp())


def calibration(probabilities: Tensor, labels: Tensor) -> tuple[float, list[list[float]]]:
    """(expected calibration error, [[confidence, accuracy, share of the images] of each bin]).

    probabilities (N, K). How far, on average, the largest probability is from how often it is right
    (Guo et al. 2017, Eq. 3), in BINS bins of equal width.
    """
    confidence, predicted = probabilities.max(1)
    right = (predicted == labels).double()
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    bins = []
    for i in range(BINS):
        inside = place == i
        if inside.any():
            mean, accuracy = confidence[inside].double().mean(), right[inside].mean()
            bins.append([float(mean), float(accuracy), float(inside.double().mean())])
    return sum(share * abs(mean - accuracy) for mean, accuracy, share in bins), bins
