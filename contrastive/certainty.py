"""How sure is it, and is it right to be? What a certainty is worth, measured on test images.

A way to be sure gives each image a number, the higher the surer. Ways that learn one while
pretraining (--loss) and one that is learned afterwards stand beside what plain SimCLR offers
anyway: each must beat that to be a result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functions as fn
from contrastive.augmentation import random_resized_crop_and_flip
from contrastive.looking import nearest
from contrastive.losses import CERTAIN
from contrastive.probe import Features, ProbeSettings, probe, standardization, take_in
from functions import ImageDataset, Subset, UserError, check

MOST = 2000  # images that are cropped, blurred, or of another set
SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)  # of an image's area that a crop leaves
BLURS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)  # standard deviations, in pixels of an image 32 a side
NOISES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2)  # the same, in units of 1 = white
VIEWS = 10  # augmentations that are to agree
BINS = 15
MOST_LOG_T = 4.6  # a temperature from 0.01 to 100: of a handful of images any could be best


@dataclass
class CertaintySettings(ProbeSettings):
    """Against what certainty is measured."""

    title: ClassVar[str] = "certainty"

    other_sets: str = "digits,noise"
    """what the encoder is to be less sure of than of the test images: sets or folders, with commas
    between; noise is uniform"""
    human_labels: str | None = None
    """a file .npy of what people answered: shares of them (N, classes), in the order of the test
    images"""

    def validate(self) -> None:
        super().validate()
        self.require("other_sets human_labels", fn.UTF_8)
        named = all(name.strip() for name in self.other_sets.split(","))
        check(named, f"--other_sets {self.other_sets!r}: name sets with commas between")


# ------------------------------------------------------------------------------------------------
# Ways to be sure
# ------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What the model makes of images: h (N, D), and what the head makes of h (N, columns)."""

    h: Tensor
    outputs: Tensor | None = None


Way = Callable[[Seen], Tensor]  # -> certainties (N,)


class Both(nn.Module):
    """Images -> h, and beside it what the head makes of it: (B, D + columns)."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x).float()
        # In bfloat16 a certainty would have some fifty values.
        with torch.autocast(h.device.type, enabled=False):
            return torch.cat([h, self.head(h)], dim=1)


def kth_similarity(h: Tensor, bank: Tensor, k: int = 10, block: int = 512) -> Tensor:
    """The cosine of each h (N, D) to its k-th nearest row of the bank (M, D): (N,)."""
    return F.cosine_similarity(h, bank[nearest(h, bank, k, block)[:, -1]])


def ways(h: Features, classifier: nn.Linear, after: nn.Module, loss: str) -> dict[str, Way]:
    """{name: a way}: what any encoder offers, what was learned after, and what --loss has learned.

    The last one is what its pictures show.
    """

    def probabilities(seen: Seen) -> Tensor:
        return classifier(seen.h).softmax(1)

    found: dict[str, Way] = {
        "norm of h": lambda seen: seen.h.norm(dim=1),
        "tenth neighbour": lambda seen: kth_similarity(seen.h, h.train),
        "probe's entropy": lambda seen: -torch.special.entr(probabilities(seen)).sum(1),
        "probe's softmax": lambda seen: probabilities(seen).max(1).values,
        "learned after": lambda seen: -after(seen.h).squeeze(1),
    }
    if loss in CERTAIN:
        found[loss] = lambda seen: CERTAIN[loss].certainty(outputs_of(seen))
    return found


def norm_of_z(seen: Seen, loss: str) -> Tensor:
    """The length of the embedding, without what stands beside it: (N,)."""
    outputs = outputs_of(seen)
    columns = CERTAIN[loss].columns if loss in CERTAIN else 0
    return outputs[:, : outputs.shape[1] - columns].norm(dim=1)


def outputs_of(seen: Seen) -> Tensor:
    assert seen.outputs is not None
    return seen.outputs


def agreement(views: Tensor) -> Tensor:
    """How much alike the views of an image are: h (V, N, D) -> (N,), 1 if they are the same.

    The length of the mean of the unit vectors.
    """
    return F.normalize(views, dim=2).mean(0).norm(dim=1)


# ------------------------------------------------------------------------------------------------
# What is learned after: the order of the probe's loss, and its temperature
# ------------------------------------------------------------------------------------------------


@dataclass
class Afterwards:
    """Learned on frozen features alone: what predicts a probe's loss, (N, D) -> (N, 1); that probe,
    which knows one half of the training images; and the temperature at which its probabilities are
    right as often as they say on the other half."""

    order: nn.Module
    half: nn.Linear
    temperature: float


def learn_afterwards(h: Features, settings: ProbeSettings, epochs: int = 20) -> Afterwards:
    """From the losses of a probe on images that it does not know: it learns from one half of the
    training images, and is wrong, or is not, about the other.

    The order is learned, not the size (as in loss prediction, Yoo & Kweon 2019, arXiv 1905.03677,
    Eq. 2): of two images, which one has the larger loss.
    """
    known, unknown = fn.stratified_split(h.train_labels, 0.5, settings.seed)
    half = nn.Linear(h.train.shape[1], len(h.classes))
    probe(h.labelled(known), settings, half)
    with torch.no_grad():
        logits = half(h.train[unknown])
    labels = h.train_labels[unknown]
    losses = F.cross_entropy(logits, labels, reduction="none")

    torch.manual_seed(settings.seed)
    width = h.train.shape[1]
    mean, std = standardization(h.train)
    net = nn.Sequential(nn.Linear(width, 128), nn.ReLU(inplace=True), nn.Linear(128, 1))
    x = (h.train[unknown] - mean) / std
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-4)
    size = min(512, len(x))
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(size):
            one, other = rows, rows[torch.randperm(len(rows))]
            larger = (losses[one] > losses[other]).float()
            apart = (net(x[one]) - net(x[other])).squeeze(1)
            loss = F.binary_cross_entropy_with_logits(apart, larger)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    first: Any = net[0]
    take_in(first, mean, std)  # the standardisation goes into it: h comes as it is
    return Afterwards(net.requires_grad_(False), half, best_temperature(logits, labels))


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


# ------------------------------------------------------------------------------------------------
# Is it right to be?
# ------------------------------------------------------------------------------------------------


def spearman(a: Tensor, b: Tensor) -> float | None:
    """The correlation of two orders, (N,) each; None where one of them is none."""
    from scipy.stats import spearmanr

    numbers = bool(a.isfinite().all() and b.isfinite().all())
    if not numbers or len(a.unique()) < 2 or len(b.unique()) < 2:
        return None
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


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


def aurc(certainty: Tensor, right: Tensor) -> float:
    """The area under risk over coverage: the mean error of the surest, over how many are kept
    (Geifman & El-Yaniv 2017, arXiv 1705.08500). The lower the better."""
    return float(1 - kept_accuracy(certainty, right).mean())


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


# ------------------------------------------------------------------------------------------------
# Images that are harder to see
# ------------------------------------------------------------------------------------------------


def cropped(images: Tensor, by: float) -> Tensor:
    """float32 (B, 3, H, W) in [0, 1] -> the same, enlarged from random crops of such an area."""
    return random_resized_crop_and_flip(images, images.shape[-1], by, by, 0.0)


def blurred(images: Tensor, by: float) -> Tensor:
    from torchvision.transforms.functional import gaussian_blur

    sigma = by * images.shape[-1] / 32
    if sigma == 0:
        return images
    side = min(2 * int(3 * sigma + 1) + 1, 2 * ((images.shape[-1] - 1) // 2) + 1)
    return gaussian_blur(images, [side, side], [sigma, sigma])


def noisy(images: Tensor, by: float) -> Tensor:
    return (images + by * torch.randn_like(images)).clamp(0, 1)


HARDER: dict[str, tuple[Callable[..., Tensor], tuple[float, ...], int]] = {
    # name: (what makes it so, levels, whether more of it is easier to see)
    "crops": (cropped, SHARES, 1),
    "blur": (blurred, BLURS, -1),
    "noise": (noisy, NOISES, -1),
}


@dataclass
class Asked:
    """What is asked how sure it is.

    see: how it is shown images, uint8 or float32 in [0, 1], (B, 3, H, W) -> float32. augment: its
    random views, uint8 (B, 3, H, W) -> float32 in [0, 1]. loss: what it was pretrained with; head:
    g(.), if it was kept. others: {another set: uint8 (N, 3, H, W)}. people: what they answered,
    (N, classes).
    """

    encoder: nn.Module
    head: nn.Sequential | None
    see: nn.Module
    augment: Callable[[Tensor], Tensor]
    loss: str
    others: dict[str, Tensor]
    people: Tensor | None
    machine: fn.Machine

    def look(
        self, images: Tensor | Subset, change: Callable[[Tensor], Tensor] | None = None
    ) -> Seen:
        """What the model makes of images, or of what `change` makes of them, float32 in [0, 1]."""
        see = self.see
        if change is not None:
            see = nn.Sequential(Augmented(lambda images: change(images / 255)), self.see)
        model = Both(self.encoder, self.head) if self.head and self.columns else self.encoder
        both = fn.extract_features(nn.Sequential(see, model), images, self.machine)
        if not self.columns:
            return Seen(both)
        width = both.shape[1] - self.columns
        return Seen(both[:, :width], both[:, width:])

    @property
    def columns(self) -> int:
        """How many the head puts out: none where it is no head."""
        linear = [part for part in self.head or nn.Sequential() if isinstance(part, nn.Linear)]
        return linear[-1].out_features if linear else 0

    def agreements(self, images: Tensor | Subset, seed: int) -> Tensor:
        """How much VIEWS augmentations of each image agree: (N,)."""
        torch.manual_seed(seed)
        model = nn.Sequential(Augmented(self.augment), self.see, self.encoder)
        views = [fn.extract_features(model, images, self.machine) for _ in range(VIEWS)]
        return agreement(torch.stack(views))


class Augmented(nn.Module):
    """Images as something else makes them: random views, for example."""

    def __init__(self, augment: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.augment = augment

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return self.augment(images)


@dataclass
class Worth:
    """What one way to be sure is worth; None where it cannot be said.

    r_auroc: how well it tells images whose nearest is of the same class; aurc: the probe's mean
    error on the surest; crops, blur, noise: Spearman with how well an image can be seen; people:
    Spearman with how much people agree; others: AUROC of the test images against another set.
    """

    r_auroc: float | None
    aurc: float
    crops: float | None
    blur: float | None
    noise: float | None
    people: float | None = None
    others: dict[str, float | None] = field(default_factory=dict)


@dataclass
class Certainty:
    """What was measured; `values`, `falling` and `bins` are for the figures.

    values: {way: certainties (N,) of the test images}. falling: {way: its mean rank among them, 1
    the surest, for each of SHARES}. bins: of `calibration`, before and after.
    """

    worth: dict[str, Worth]
    temperature: float
    calibration_error: tuple[float, float]
    values: dict[str, Tensor]
    right: Tensor
    falling: dict[str, list[float]]
    bins: tuple[list[list[float]], list[list[float]]]

    def results(self) -> dict[str, Any]:
        """This part of results.json."""
        before, after = self.calibration_error
        return {
            "ways": {name: vars(worth) for name, worth in self.worth.items()},
            "calibration": {
                "expected_error": before,
                "temperature": self.temperature,
                "expected_error_at_temperature": after,
            },
        }


@torch.no_grad()
def measure_certainty(
    asked: Asked,
    images: Tensor | Subset,
    h: Features,
    classifier: nn.Linear,
    settings: CertaintySettings,
) -> Certainty:
    """Ask how sure it is of the test images, whose features are h.test: what is that worth?"""
    print(f"asking how sure it is of {len(h.test):,} {h.held_out} images", flush=True)
    seed, labels = settings.seed, h.test_labels
    with torch.enable_grad():
        after = learn_afterwards(h, settings)
    seen = asked.look(images)
    asks = ways(h, classifier, after.order, asked.loss if asked.head else "nt_xent")
    if asked.columns:
        asks = {"norm of z": lambda one: norm_of_z(one, asked.loss), **asks}

    some = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:MOST]
    torch.manual_seed(seed)
    harder = {
        name: [asked.look(images[some], functools.partial(change, by=level)) for level in levels]
        for name, (change, levels, _) in HARDER.items()
    }
    others = {name: asked.look(other) for name, other in asked.others.items()}

    values = {name: way(seen) for name, way in asks.items()}
    values = {"agreement of views": asked.agreements(images, seed), **values}
    right = classifier(h.test).argmax(1) == labels
    alike = nearest_is_alike(h.test, labels)
    worth, falling = {}, {}
    for name, value in values.items():
        found = Worth(auroc(value, alike), aurc(value, right), None, None, None)
        if asked.people is not None:
            found.people = spearman(value, -torch.special.entr(asked.people).sum(1))
        if name in asks:
            for kind, (_, levels, sign) in HARDER.items():
                certainties = torch.stack([asks[name](one) for one in harder[kind]])
                level = sign * torch.tensor(levels)[:, None].expand_as(certainties)
                setattr(found, kind, spearman(certainties.flatten(), level.flatten()))
                if kind == "crops":
                    falling[name] = mean_ranks(certainties, value)
            for other, one in others.items():
                both = torch.cat([value, asks[name](one)])
                found.others[other] = auroc(both, torch.arange(len(both)) < len(value))
        worth[name] = found

    of_half = after.half(h.test)
    errors, bins = zip(
        *(calibration((of_half / t).softmax(1), labels) for t in (1, after.temperature)),
        strict=True,
    )
    return Certainty(worth, after.temperature, errors, values, right, falling, bins)


def mean_ranks(certainties: Tensor, among: Tensor) -> list[float]:
    """Where certainties (levels, n) stand among those of whole images (N,): the mean of each level,
    0 the least sure and 1 the surest."""
    order, certainties = among.sort().values, certainties.contiguous()
    below, up_to = (torch.searchsorted(order, certainties, right=part) for part in (False, True))
    return ((below + up_to) / (2 * len(among))).mean(1).tolist()


# ------------------------------------------------------------------------------------------------
# For people
# ------------------------------------------------------------------------------------------------


def print_certainty(found: Certainty, held_out: str) -> None:
    """A row for each way: what it is worth."""
    others = list(list(found.worth.values())[-1].others)
    rows = [["certainty", "nearest alike", "probe's error", "crops", "blur", "noise"]]
    people = any(one.people is not None for one in found.worth.values())
    rows[0] += [
        *(["people"] if people else []),
        *(f"against {fn.shown(other)}" for other in others),
    ]
    for name, one in found.worth.items():
        cells = [one.r_auroc, one.aurc, one.crops, one.blur, one.noise]
        cells += [one.people] if people else []
        cells += [one.others.get(other) for other in others]
        rows.append([name, *("" if cell is None else f"{cell:.3f}" for cell in cells)])
    print()
    fn.print_columns(rows)
    print(
        "  nearest alike: does it tell where the nearest image is of the same class (AUROC);\n"
        "  probe's error: its mean over how many of the surest are kept (AURC, better the lower);\n"
        "  crops, blur, noise, people: Spearman with how well an image can be seen, with how much\n"
        f"  people agree; against: AUROC of {held_out} images against those of another set"
    )
    before, after = map(fn.percent, found.calibration_error)
    print(
        f"  a probe on half the labels: its probabilities are off by {before}, and by {after} at\n"
        f"  temperature {found.temperature:.2f}, of the other half (expected calibration error)\n"
    )


@fn.drawing
def plot_certainty(found: Certainty, file: Path) -> None:
    """Is it right to be sure? Accuracy of the surest, certainty under crops, and calibration."""
    figure, axes = fn.new_figure(16, 4.4, columns=3)
    for color, (name, value) in enumerate(found.values.items()):
        curve = kept_accuracy(value, found.right)
        share = np.arange(1, len(curve) + 1) / len(curve)
        start = len(curve) // 50  # of a handful, accuracy is noise
        axes[0].plot(share[start:], curve[start:], color=f"C{color}", label=name)
        if name in found.falling:
            axes[1].plot(SHARES, found.falling[name], color=f"C{color}", marker="o", markersize=4)
    axes[0].set(title="The probe on the surest images", xlabel="share that is kept")
    axes[0].set_ylabel("accuracy")
    fn.of_accuracy(axes[0])
    axes[1].set(title="Under crops", xlabel="share of the image that is left")
    axes[1].set_ylabel("mean rank among whole images")
    axes[1].set_xticks(SHARES)
    axes[1].invert_xaxis()

    axes[2].plot([0, 1], [0, 1], color="lightgrey")
    titles = ("as it is", f"at temperature {found.temperature:.2f}")
    for bins, title, error in zip(found.bins, titles, found.calibration_error, strict=True):
        label = f"{title}: off by {fn.percent(error)}"
        axes[2].plot(*np.array(bins)[:, :2].T, marker="o", markersize=4, label=label)
    axes[2].set(title="A probe's probabilities", xlabel="it says", ylabel="it is right")
    axes[2].legend(frameon=False, loc="upper left")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    fn.save_figure(figure, file)


@fn.drawing
def plot_map(points: np.ndarray, found: Certainty, held_out: str, file: Path) -> None:
    """The map of the test images, points (N, 2), coloured by how sure the last way is of them."""
    name, value = list(found.values.items())[-1]
    ranks = value.argsort().argsort().numpy() / max(1, len(value) - 1)
    figure, axis = fn.new_figure(7.6, 6)
    dots = axis.scatter(*points.T, c=ranks, s=fn.dot_size(len(points)), lw=0, cmap="viridis")
    axis.set(title=f"t-SNE of the {held_out} images: {name}", xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    figure.colorbar(dots, ax=axis, label="rank of its certainty, 1 the surest", shrink=0.6)
    fn.save_figure(figure, file)


# ------------------------------------------------------------------------------------------------
# What it is asked with
# ------------------------------------------------------------------------------------------------


def load_others(settings: CertaintySettings, measured: ImageDataset) -> dict[str, Tensor]:
    """{set: up to MOST of its images, uint8 (N, 3, H, W), as large as those measured on} of
    --other_sets, but for the one that is measured on. Raises UserError."""
    found: dict[str, Tensor] = {}
    size = measured.train_images.shape[-1]
    draw = torch.Generator().manual_seed(settings.seed)
    for name in (word.strip() for word in settings.other_sets.split(",")):
        if name == "noise":
            shape = (MOST, 3, size, size)
            found[name] = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
            continue
        data = fn.load_dataset(name, settings.data_dir, size, flag="--other_sets")
        if data.name == measured.name:
            continue
        images = data.train_images if data.test_images is None else data.test_images
        found[name] = images[torch.randperm(len(images), generator=draw)[:MOST]]
    return found


def load_people(settings: CertaintySettings, images: int, classes: int) -> Tensor | None:
    """What people answered, float32 (N, classes), each row to sum to 1. Raises UserError."""
    if settings.human_labels is None:
        return None
    flag = f"--human_labels {settings.human_labels}"
    try:
        answers = np.load(settings.human_labels, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise UserError(f"{flag} is no file of numbers .npy: take another") from None
    check(isinstance(answers, np.ndarray), f"{flag} holds several arrays: save one as .npy")
    shape, fits = (images, classes), answers.dtype.kind in "fiu"
    problem = f"{flag} is {answers.dtype} {answers.shape}, where the test images need {shape}"
    check(fits and answers.shape == shape, f"{problem}: one row for each, in their order")
    people = torch.from_numpy(answers.astype(np.float32))
    valid = bool(people.isfinite().all() and (people >= 0).all() and (people.sum(1) > 0).all())
    check(valid, f"{flag} has rows without an answer, or negative ones: take shares or counts")
    return people / people.sum(1, keepdim=True)
