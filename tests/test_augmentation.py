"""contrastive/augmentation.py and random_views: they draw and compute what torchvision does."""

import itertools

import pytest
import torch
from helpers import assert_rate, make_config
from scipy.stats import chisquare, ks_2samp
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as tv
from torchvision.transforms.v2.functional import resized_crop

import simCLR
from contrastive import augmentation

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

CPU = torch.device("cpu")
ADJUSTMENTS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


def colourful(side: int) -> Tensor:
    """One image without symmetries, float32 (3, side, side): noise on a ramp per channel."""
    ramp = torch.linspace(0, 1, side)
    across, down = ramp.expand(side, side), ramp.view(-1, 1).expand(side, side)
    ramps = torch.stack([across, 0.7 * down, ramp.outer(1 - ramp)])
    noise = torch.rand(3, side, side, generator=torch.Generator().manual_seed(1))
    return (0.6 * ramps + 0.4 * noise).clamp(0, 1)


def copies(image: Tensor, n: int) -> Tensor:
    return image.unsqueeze(0).repeat(n, 1, 1, 1)


def one_by_one(transform, image: Tensor, n: int) -> Tensor:
    """n outcomes of a torchvision transform, which draws again at each call."""
    return torch.stack([transform(image) for _ in range(n)])


def statistics(x: Tensor) -> dict[str, Tensor]:
    """Scalars (B,) for colours, contrast, sharpness and orientation of images (B, 3, H, W)."""
    r, g, b = x.double().unbind(1)
    grey = (r + g + b) / 3
    half = x.shape[3] // 2
    return {
        "red": r.mean((1, 2)),
        "green": g.mean((1, 2)),
        "blue": b.mean((1, 2)),
        "contrast": grey.std((1, 2)),
        "saturation": (x.amax(1) - x.amin(1)).double().mean((1, 2)),
        "hue": (r - g).mean((1, 2)),
        "sharpness": grey.diff(dim=2).abs().mean((1, 2)),
        "orientation": grey[:, :, :half].mean((1, 2)) - grey[:, :, half:].mean((1, 2)),
    }


def assert_same_distribution(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """A Kolmogorov-Smirnov test for each scalar.

    Values are rounded because those of unchanged images differ in their last bits only.
    """
    for name in ours:
        samples = (x[name].double().round(decimals=4) for x in (ours, theirs))
        p = ks_2samp(*samples).pvalue
        assert p > 1e-3, f"{name}: p = {p:.1e}"


def is_near(x: Tensor, image: Tensor, tolerance: float = 1e-5) -> Tensor:
    """bool (B,): which of x (B, 3, H, W) show `image`."""
    return (x - image).abs().amax((1, 2, 3)) < tolerance


def whole_image(
    n: int, height: int, width: int, min_scale: float, max_scale: float, device: torch.device
) -> tuple[Tensor, ...]:
    """Stands in for augmentation.crop_boxes where a test is about what follows the crop."""
    sides = torch.full((n,), float(height)), torch.full((n,), float(width))
    return torch.zeros(n), torch.zeros(n), *sides


# ------------------------------------------------------------------------------------------------
# Random crop and flip
# ------------------------------------------------------------------------------------------------


def box_quantities(
    top: Tensor, left: Tensor, h: Tensor, w: Tensor, height: int, width: int
) -> dict[str, Tensor]:
    return {
        "area": h * w,
        "ratio": w.double() / h.double(),
        "top": top,
        "left": left,
        "height": h,
        "width": w,
        "below": height - top - h,
        "right": width - left - w,
    }


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(32, 32, 0.08), (96, 96, 0.08), (48, 32, 0.08), (32, 32, 0.5)]
)
def test_crop_boxes_are_distributed_as_torchvisions(height, width, scale):
    ours = augmentation.crop_boxes(5000, height, width, scale, 1.0, CPU)
    image, draw = torch.empty(3, height, width), transforms.RandomResizedCrop.get_params
    draws = [draw(image, [scale, 1.0], [3 / 4, 4 / 3]) for _ in range(5000)]
    theirs = torch.tensor(draws, dtype=torch.float32).unbind(1)

    ours, theirs = (box_quantities(*boxes, height, width) for boxes in (ours, theirs))
    assert_same_distribution(ours, theirs)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 8), (48, 32)])
def test_crop_boxes_are_whole_pixels_within_the_image(height, width):
    top, left, h, w = augmentation.crop_boxes(20_000, height, width, 0.01, 1.0, CPU)
    assert all(torch.equal(value, value.round()) for value in (top, left, h, w))
    assert min(top.min(), left.min()) == 0
    assert min(h.min(), w.min()) >= 1
    assert (top + h).max() == height
    assert (left + w).max() == width


@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (8, 8, 8), (64, 64, 16), (48, 40, 24), (10, 10, 96)]
)
def test_crop_and_resize_equal_torchvisions(monkeypatch, height, width, size):
    """Bilinear with anti-aliasing, for boxes of every size: enlarged and reduced."""
    n = 60
    h, w = torch.randint(1, height + 1, (n,)), torch.randint(1, width + 1, (n,))
    top, left = ((torch.rand(n) * (space + 1)).long() for space in (height - h, width - w))
    boxes = top.float(), left.float(), h.float(), w.float()
    monkeypatch.setattr(augmentation, "crop_boxes", lambda *_: boxes)

    x = torch.rand(n, 3, height, width)
    ours = augmentation.random_resized_crop_and_flip(x, size, 0.08, 1.0, flip=0.0)

    boxes = torch.stack([top, left, h, w], dim=1).tolist()
    crops = [resized_crop(x[i], *boxes[i], [size, size], antialias=True) for i in range(n)]
    theirs = torch.stack(crops)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_each_output_pixel_is_a_weighted_mean_of_pixels_in_the_box():
    start, length = torch.tensor([0.0, 5.0, 31.0]), torch.tensor([32.0, 7.0, 1.0])
    weights = augmentation.resize_weights(start, length, 32, 20)
    pixel = torch.arange(32)
    outside = (pixel < start.view(-1, 1)) | (pixel >= (start + length).view(-1, 1))
    torch.testing.assert_close(weights.sum(2), torch.ones(3, 20))
    assert weights.min() >= 0
    assert weights[outside.unsqueeze(1).expand_as(weights)].abs().max() == 0


def test_flip_is_torchvisions_hflip():
    x = torch.rand(16, 3, 12, 12)
    views = []
    for flip in (0.0, 1.0):  # the same seed: the same boxes
        torch.manual_seed(3)
        views.append(augmentation.random_resized_crop_and_flip(x, 12, 0.08, 1.0, flip))
    torch.testing.assert_close(views[1], tv.hflip(views[0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("p", [0.5, 0.2])
def test_flip_rate(monkeypatch, p):
    monkeypatch.setattr(augmentation, "crop_boxes", whole_image)
    image = colourful(8)
    x = augmentation.random_resized_crop_and_flip(copies(image, 5000), 8, 0.08, 1.0, p)
    flipped, kept = is_near(x, tv.hflip(image)), is_near(x, image)
    assert (flipped ^ kept).all()
    assert_rate(int(flipped.sum()), 5000, p)


# ------------------------------------------------------------------------------------------------
# Colours
# ------------------------------------------------------------------------------------------------


def test_luminance_is_torchvisions():
    x = torch.rand(4, 3, 9, 9)
    torch.testing.assert_close(augmentation.luminance(x), tv.rgb_to_grayscale(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift", [-1 / 3, -0.2, -0.013, 0.0, 0.1, 0.2, 1 / 3])
def test_shift_hue_is_torchvisions_adjust_hue(shift):
    """For any colour: also black, white, greys, pure colours and those with two equal channels."""
    corners = torch.tensor(list(itertools.product([0.0, 0.5, 1.0], repeat=3)))  # 27 colours
    x = torch.cat([torch.rand(997, 3), corners]).T.reshape(1, 3, 32, 32)
    ours = augmentation.shift_hue(x, torch.tensor([shift]))
    torch.testing.assert_close(ours, tv.adjust_hue(x, shift), atol=1e-5, rtol=0)


def test_shift_hue_turns_each_image_by_its_own_shift():
    x, shift = torch.rand(20, 3, 5, 5), (torch.rand(20) - 0.5) * 2 / 3
    pairs = zip(x, shift.tolist(), strict=True)
    theirs = torch.stack([tv.adjust_hue(image, s) for image, s in pairs])
    torch.testing.assert_close(augmentation.shift_hue(x, shift), theirs, atol=1e-5, rtol=0)


def in_all_orders(image: Tensor, parameters: list[float]) -> Tensor:
    """(24, 3, H, W): torchvision's four adjustments with these parameters, in each order."""
    outcomes = []
    for order in itertools.permutations(range(4)):
        x = image
        for i in order:
            x = ADJUSTMENTS[i](x, parameters[i])
        outcomes.append(x)
    return torch.stack(outcomes)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_jitter_is_torchvisions_four_adjustments_in_some_order(monkeypatch, strength):
    draws, uniform, places = [], augmentation.uniform, torch.randperm(40)

    def noted(*args) -> Tensor:
        draws.append(uniform(*args))
        return draws[-1]

    monkeypatch.setattr(augmentation, "uniform", noted)
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: places)

    x = torch.rand(40, 3, 6, 6)
    y = augmentation.color_jitter(x.clone(), strength, p=1.0)

    _, factors, shifts = draws  # the coin, three factors an image, one turn of hue
    for j, i in enumerate(places.tolist()):  # image places[j] gets the j-th draws
        parameters = [*factors.view(-1, 3)[j].tolist(), shifts[j].item()]
        outcomes = in_all_orders(x[i], parameters)
        assert is_near(outcomes, y[i], 2e-5).any(), f"image {i}: {parameters}"


@pytest.mark.parametrize("batch", [2400, 6, 1])
def test_the_order_of_the_four_adjustments_is_uniform(monkeypatch, batch):
    """All images and parameters are equal, so an outcome shows which of the 24 orders made it."""

    def fixed(n: int, low: float, high: float, device: torch.device) -> Tensor:
        if (low, high) == (0, 1):
            return torch.zeros(n)  # the coin says yes
        return torch.full((n,), 0.08) if low < 0 else torch.tensor([1.2, 1.35, 1.4]).repeat(n // 3)

    image = colourful(8)
    references = in_all_orders(image, [1.2, 1.35, 1.4, 0.08])
    assert (torch.cdist(references.flatten(1), references.flatten(1)) + torch.eye(24)).min() > 1e-2

    monkeypatch.setattr(augmentation, "uniform", fixed)
    images = copies(image, batch)
    y = torch.cat([augmentation.color_jitter(images, 0.5, p=1.0) for _ in range(2400 // batch)])
    counts = torch.stack([is_near(y, reference) for reference in references]).sum(1)
    assert counts.sum() == 2400
    assert chisquare(counts.numpy()).pvalue > 1e-3, counts.tolist()


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_color_jitter_is_distributed_as_torchvisions(strength):
    n, image, s = 3000, colourful(8), strength
    jitter = transforms.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    ours = augmentation.color_jitter(copies(image, n), s, p=0.8)
    theirs = one_by_one(transforms.RandomApply([jitter], p=0.8), image, n)
    assert_same_distribution(statistics(ours), statistics(theirs))
    assert_rate(int(is_near(ours, image).sum()), n, 0.2)


@pytest.mark.parametrize("part", ["brightness", "contrast", "saturation", "hue"])
def test_each_part_of_the_jitter_is_distributed_as_torchvisions(monkeypatch, part):
    """The other three parts are held at their neutral parameters."""
    uniform = augmentation.uniform
    column = ("brightness", "contrast", "saturation", "hue").index(part)

    def isolated(n: int, low: float, high: float, device: torch.device) -> Tensor:
        drawn = uniform(n, low, high, device)
        if low < 0:
            return drawn * (part == "hue")
        return torch.where(torch.arange(n) % 3 == column, drawn, 1.0) if high > 1 else drawn

    monkeypatch.setattr(augmentation, "uniform", isolated)
    n, image = 3000, colourful(8)
    ours = augmentation.color_jitter(copies(image, n), 1.0, p=1.0)
    theirs = one_by_one(transforms.ColorJitter(**{part: 0.2 if part == "hue" else 0.8}), image, n)
    assert_same_distribution(statistics(ours), statistics(theirs))


def test_random_grayscale_rate_and_values():
    x = torch.rand(4000, 3, 4, 4)
    y = augmentation.random_grayscale(x, 0.2)
    dropped, kept = is_near(y, tv.rgb_to_grayscale(x, 3), 1e-6), is_near(y, x, 1e-7)
    assert (dropped ^ kept).all()
    assert_rate(int(dropped.sum()), 4000, 0.2)


# ------------------------------------------------------------------------------------------------
# Blur
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "kernel", "n"), [(32, 3, 3000), (96, 9, 500)])
def test_gaussian_blur_is_distributed_as_torchvisions(side, kernel, n):
    image = colourful(side)
    images = copies(image, 100)
    ours = torch.cat([augmentation.gaussian_blur(images, p=1.0) for _ in range(n // 100)])
    theirs = one_by_one(transforms.GaussianBlur(kernel, (0.1, 2.0)), image, n)

    names = ("contrast", "saturation", "sharpness")  # blur does not move an image's mean colours
    ours, theirs = ({name: statistics(x)[name] for name in names} for x in (ours, theirs))
    assert_same_distribution(ours, theirs)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("side", "kernel"), [(8, 3), (32, 3), (50, 5), (96, 9)])
def test_gaussian_blur_is_torchvisions(monkeypatch, side, kernel, sigma):
    """The kernel is a tenth of the image's side (the paper's Appendix A), but at least 3."""

    def fixed(n: int, low: float, high: float, device: torch.device) -> Tensor:
        return torch.full((n,), 0.0 if low == 0 else sigma)

    monkeypatch.setattr(augmentation, "uniform", fixed)
    x = torch.rand(2, 3, side, side)
    ours, theirs = augmentation.gaussian_blur(x, p=0.5), tv.gaussian_blur(x, kernel, sigma)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_gaussian_blur_rate():
    image = colourful(32)
    y = torch.cat([augmentation.gaussian_blur(copies(image, 500), p=0.5) for _ in range(6)])

    # Below sigma 0.2 a neighbour weighs less than 4e-6, so that the image stays as it is.
    unchanged_by_small_sigma = 0.5 * (0.2 - 0.1) / 1.9
    assert_rate(int(is_near(y, image).sum()), 3000, 0.5 + unchanged_by_small_sigma)


# ------------------------------------------------------------------------------------------------
# Every image draws its own, and nothing happens with probability 0
# ------------------------------------------------------------------------------------------------


def crop(x: Tensor, p: float) -> Tensor:
    return augmentation.random_resized_crop_and_flip(x, x.shape[2], 0.08 if p else 1.0, 1.0, p)


AUGMENTATIONS = {
    "crop": crop,
    "jitter": lambda x, p: augmentation.color_jitter(x, 0.5, p),
    "grayscale": augmentation.random_grayscale,
    "blur": augmentation.gaussian_blur,
}


@pytest.mark.parametrize("name", ["crop", "jitter", "blur"])
def test_every_image_draws_its_own_parameters(name):
    y = AUGMENTATIONS[name](copies(colourful(32), 64), 1.0)
    assert len(y.flatten(1).mul(1e4).round().unique(dim=0)) > 56


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_with_probability_zero_images_stay_as_they_are(name):
    x = torch.rand(50, 3, 16, 16)
    torch.testing.assert_close(AUGMENTATIONS[name](x.clone(), 0.0), x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_leave_their_input_alone(name):
    x = torch.rand(50, 3, 16, 16)
    before = x.clone()
    AUGMENTATIONS[name](x, 1.0)
    assert torch.equal(x, before)


# ------------------------------------------------------------------------------------------------
# Two views
# ------------------------------------------------------------------------------------------------


def test_a_view_is_distributed_as_torchvisions_pipeline():
    """Crop, flip, jitter, grayscale, in the paper's order (Appendix A)."""
    n, image = 2000, (255 * colourful(16)).byte()
    jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    crop, flip = transforms.RandomResizedCrop(16, antialias=True), transforms.RandomHorizontalFlip()
    pipeline = transforms.Compose([crop, flip, jitter, transforms.RandomGrayscale(0.2)])
    ours = simCLR.random_views(copies(image, n // 2), make_config())
    assert_same_distribution(statistics(ours), statistics(one_by_one(pipeline, image / 255, n)))


@pytest.mark.parametrize("blur", [0.0, 0.5])
def test_random_views_are_float_pairs_within_black_and_white(blur):
    images = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    images[:10], images[10:20] = 0, 255
    before = images.clone()
    views = simCLR.random_views(images, make_config(blur=blur))

    assert views.shape == (80, 3, 32, 32)
    assert views.dtype == torch.float32
    assert views.min() >= 0
    assert views.max() <= 1 + 1e-6  # a sum of float weights is 1 up to rounding
    assert torch.equal(images, before)


def test_rows_i_and_i_plus_n_show_the_same_image():
    """Any crop of a plain colour has that colour."""
    colours = torch.randint(256, (12, 3, 1, 1), dtype=torch.uint8)
    views = simCLR.random_views(
        colours.expand(12, 3, 16, 16), make_config(jitter=0.0, grayscale=0.0)
    )
    expected = (colours / 255).repeat(2, 1, 1, 1).expand(24, 3, 16, 16)
    torch.testing.assert_close(views, expected, atol=1e-6, rtol=0)


def test_the_random_views_of_an_image_differ():
    images = copies((255 * colourful(16)).byte(), 64)
    first, second = simCLR.random_views(images, make_config()).chunk(2)
    assert ((first - second).abs().amax((1, 2, 3)) > 0.02).all()


def test_random_views_without_any_augmentation_are_the_image():
    images = torch.randint(256, (30, 3, 32, 32), dtype=torch.uint8)
    config = make_config(crop_scale=1.0, flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0)
    views = simCLR.random_views(images, config)
    torch.testing.assert_close(views, (images / 255).repeat(2, 1, 1, 1), atol=1e-6, rtol=0)


def test_the_seed_decides_the_views():
    images, views = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        views.append(simCLR.random_views(images, make_config(blur=0.5)))
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


def test_views_keep_float32_under_autocast():
    images, config = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8), make_config(blur=0.5)
    views = []
    for reduced in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            views.append(simCLR.random_views(images, config))
    assert views[1].dtype == torch.float32
    assert torch.equal(*views)


def test_views_have_the_crop_size():
    views = simCLR.random_views(
        torch.zeros(3, 3, 32, 32, dtype=torch.uint8), make_config(), size=20
    )
    assert views.shape == (6, 3, 20, 20)
