"""How sure is it, and is it right to be? What a certainty is worth, measured on test images.

A way to be sure gives each image a number, the higher the surer. Ways that learn one while
pretraining (--loss) and one that is learned afterwards stand beside what plain SimCLR offers
anyway: each must beat that to be a result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functions as fn
from contrastive.augmentation import random_resized_crop_and_flip
from contrastive.looking import nearest
from contrastive.losses import CERTAIN
from contrastive.probe import Features, ProbeSettings, probe, standardization, take_in
from contrastive.scores import (
    aurc,
    auroc,
    best_temperature,
    calibration,
    kept_at,
    mean_ranks,
    mean_spearman,
    nearest_is_alike,
    order_of_errors,
    spearman,
)
from functions import Subset, check

MOST = 2000  # images that are cropped, blurred, or of another set
SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)  # of an image's area that a crop leaves
BLURS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)  # standard deviations, in pixels of an image 32 a side
NOISES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2)  # the same, in units of 1 = white
VIEWS = 10  # augmentations that are to agree
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
KEPT = tuple(tenth / 10 for tenth in range(1, 11))  # shares of the test images, the surest


@dataclass
class CertaintySettings(ProbeSettings):
    """Against what certainty is measured."""

    title: ClassVar[str] = "certainty"

    other_sets: str = "digits,noise"
    """what the encoder is to be less sure of than of the test images: sets or folders, with commas
    between; noise is uniform"""
    without_classes: str | None = None
    """classes, with commas between, that neither the encoder nor the probe is to see: their test
    images are another set, too"""
    human_labels: str | None = None
    """a file .npy of what people answered: shares of them (N, classes), in the order of the test
    images"""

    def validate(self) -> None:
        super().validate()
        self.require("other_sets without_classes human_labels", fn.UTF_8)
        named = all(fn.listed(self.other_sets))
        check(named, f"--other_sets {self.other_sets!r}: name sets with commas between")
        named = bool(self.left_out) or self.without_classes is None
        check(named, f"--without_classes {self.without_classes!r}: name classes, or leave it out")
        all_ = self.human_labels is None or not self.left_out
        check(all_, "--human_labels are of all classes: leave --without_classes out")

    @property
    def left_out(self) -> list[str]:
        """The classes of --without_classes."""
        return [name for name in fn.listed(self.without_classes) if name]


# ------------------------------------------------------------------------------------------------
# Ways to be sure
# ------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What the model makes of images: h (N, D), and what the head makes of h (N, columns); and how
    sharp they are, (N,), to which no model is needed."""

    h: Tensor
    sharpness: Tensor
    outputs: Tensor | None = None


Way = Callable[[Seen], Tensor]  # -> certainties (N,)


def sharpness(images: Tensor) -> Tensor:
    """How much neighbouring pixels differ, on average: float32 (B, 3, H, W) in [0, 1] -> (B,)."""
    across, down = (images.diff(dim=dim).abs().mean((1, 2, 3)) for dim in (3, 2))
    return (across + down) / 2


class Look(nn.Module):
    """Images uint8 (B, 3, H, W) -> h of what `change` makes of them, what the head makes of h, and
    how sharp they are: (B, D + columns + 1). see: float32 in [0, 1] -> as the encoder sees them."""

    def __init__(
        self, change: Callable[[Tensor], Tensor], see: nn.Module, encoder: nn.Module, head: Any
    ) -> None:
        super().__init__()
        self.change, self.see, self.encoder, self.head = change, see, encoder, head

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            images = self.change(images / 255)
        h = self.encoder(self.see(images)).float()
        # In bfloat16 a certainty would have some fifty values.
        with torch.autocast(images.device.type, enabled=False):
            outputs = [self.head(h)] if self.head else []
            return torch.cat([h, *outputs, sharpness(images)[:, None]], dim=1)


def kth_similarity(h: Tensor, bank: Tensor, k: int = 10, block: int = 512) -> Tensor:
    """The cosine of each h (N, D) to its k-th nearest row of the bank (M, D): (N,)."""
    return F.cosine_similarity(h, bank[nearest(h, bank, k, block)[:, -1]])


def ways(h: Features, classifier: nn.Linear, after: nn.Module, loss: str) -> dict[str, Way]:
    """{name: a way}: one that needs no encoder, what any encoder offers, what was learned after,
    and what --loss has learned.

    Whoever takes certainty for what falls where images are harder to see has to beat the first: it
    falls, too, and has seen nothing. The last one is what the pictures show.
    """

    def probabilities(seen: Seen) -> Tensor:
        return classifier(seen.h).softmax(1)

    found: dict[str, Way] = {
        "sharpness": lambda seen: seen.sharpness,
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
    """What the head makes of h, (N, columns), where there is one."""
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
    which knows one half of the training images; and the temperature at which the labels of the
    other half are likeliest."""

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


# ------------------------------------------------------------------------------------------------
# Images that are harder to see
# ------------------------------------------------------------------------------------------------


def cropped(images: Tensor, by: float) -> Tensor:
    """float32 (B, 3, H, W) in [0, 1] -> the same, enlarged from random crops of such an area."""
    return random_resized_crop_and_flip(images, images.shape[-1], by, by, 0.0)


def blurred(images: Tensor, by: float) -> Tensor:
    """The same, blurred with such a standard deviation in pixels of an image of 32."""
    from torchvision.transforms.functional import gaussian_blur

    sigma = by * images.shape[-1] / 32
    if sigma == 0:
        return images
    side = min(2 * int(3 * sigma + 1) + 1, 2 * ((images.shape[-1] - 1) // 2) + 1)
    return gaussian_blur(images, [side, side], [sigma, sigma])


def noisy(images: Tensor, by: float) -> Tensor:
    """The same with Gaussian noise of such a standard deviation."""
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
        head = self.head if self.columns else None
        model = Look(change or nn.Identity(), self.see, self.encoder, head)
        found = fn.extract_features(model, images, self.machine)
        width = found.shape[1] - self.columns - 1
        h, outputs, sharp = found.split([width, self.columns, 1], dim=1)
        return Seen(h, sharp.squeeze(1), outputs if self.columns else None)

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
    error on the surest, and order what that is worth: 0 in no order, 1 with all errors last; crops,
    blur, noise: Spearman with how well an image can be seen, of the copies of one image, on
    average; people: Spearman with how much people agree; others: AUROC of the test images against
    another set. kept: the probe's accuracy where the shares KEPT of the images are kept, the
    surest. quantiles: of the certainties themselves, at QUANTILES: they may order images well and
    hardly differ.
    """

    r_auroc: float | None
    aurc: float | None
    order: float | None
    crops: float | None
    blur: float | None
    noise: float | None
    kept: list[float] | None
    quantiles: list[float] | None
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
    at = torch.tensor(QUANTILES, dtype=torch.float64)
    worth, falling = {}, {}
    for name, value in values.items():
        quantiles = value.double().quantile(at).tolist() if value.isfinite().all() else None
        told = auroc(value, alike), aurc(value, right), order_of_errors(value, right)
        found = Worth(*told, None, None, None, kept_at(value, right, KEPT), quantiles)
        if asked.people is not None:
            found.people = spearman(value, -torch.special.entr(asked.people).sum(1))
        if name in asks:
            for kind, (_, levels, sign) in HARDER.items():
                certainties = torch.stack([asks[name](one) for one in harder[kind]])
                seen_well = sign * torch.tensor(levels)
                setattr(found, kind, mean_spearman(certainties, seen_well))
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
