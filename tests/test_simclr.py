"""simCLR.py: what the paper and torchvision say is true of its augmentations, model, training and evaluation."""

import itertools
import math
import pickle
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest, chisquare, ks_2samp
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision import models, transforms
from torchvision.transforms import functional as tv
from torchvision.transforms.v2.functional import resized_crop

import functions as fn
import simCLR
from contrastive import augmentation, evaluation, signals, small_maps

CPU = torch.device("cpu")
ADJUSTMENTS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Thousands of tiny tensor operations: a second thread would only be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_config(**values) -> simCLR.Config:
    return simCLR.Config(**{"dataset": "digits", "accelerator": "cpu", "precision": "fp32", **values})


def colourful(side: int) -> Tensor:
    """One image without symmetries, float32 (3, side, side): noise on ramps that differ per channel."""
    ramp = torch.linspace(0, 1, side)
    ramps = torch.stack([ramp.expand(side, side), 0.7 * ramp.view(-1, 1).expand(side, side), ramp.outer(1 - ramp)])
    return (0.6 * ramps + 0.4 * torch.rand(3, side, side, generator=torch.Generator().manual_seed(1))).clamp(0, 1)


def copies(image: Tensor, n: int) -> Tensor:
    return image.unsqueeze(0).repeat(n, 1, 1, 1)


def one_by_one(transform, image: Tensor, n: int) -> Tensor:
    """n outcomes of a torchvision transform, which draws anew at each call."""
    return torch.stack([transform(image) for _ in range(n)])


def statistics(x: Tensor) -> dict[str, Tensor]:
    """Scalars (B,) that tell colours, contrast, sharpness and orientation of images (B, 3, H, W) apart."""
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
    """Kolmogorov-Smirnov for each scalar. Rounded: the unchanged images' equal values differ in the last bits."""
    for name in ours:
        p = ks_2samp(ours[name].double().round(decimals=4), theirs[name].double().round(decimals=4)).pvalue
        assert p > 1e-3, f"{name}: p = {p:.1e}"


def assert_rate(count: int, n: int, p: float) -> None:
    assert binomtest(count, n, p).pvalue > 1e-3, f"{count} of {n} instead of {p}"


def is_near(x: Tensor, image: Tensor, tolerance: float = 1e-5) -> Tensor:
    """bool (B,): which of x (B, 3, H, W) show `image`."""
    return (x - image).abs().amax((1, 2, 3)) < tolerance


def whole_image(n: int, height: int, width: int, min_scale: float, device: torch.device) -> tuple[Tensor, ...]:
    """Stands in for augmentation.crop_boxes where a test is about what follows the crop."""
    return torch.zeros(n), torch.zeros(n), torch.full((n,), float(height)), torch.full((n,), float(width))


# ------------------------------------------------------------------------------------------------
# Augmentation: random crop and flip
# ------------------------------------------------------------------------------------------------


def box_quantities(top: Tensor, left: Tensor, h: Tensor, w: Tensor, height: int, width: int) -> dict[str, Tensor]:
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


@pytest.mark.parametrize(("height", "width", "scale"), [(32, 32, 0.08), (96, 96, 0.08), (48, 32, 0.08), (32, 32, 0.5)])
def test_crop_boxes_are_distributed_as_torchvisions(height, width, scale):
    ours = augmentation.crop_boxes(5000, height, width, scale, CPU)
    image = torch.empty(3, height, width)
    draws = [transforms.RandomResizedCrop.get_params(image, [scale, 1.0], [3 / 4, 4 / 3]) for _ in range(5000)]
    theirs = torch.tensor(draws, dtype=torch.float32).unbind(1)
    assert_same_distribution(box_quantities(*ours, height, width), box_quantities(*theirs, height, width))


@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 8), (48, 32)])
def test_crop_boxes_are_whole_pixels_within_the_image(height, width):
    top, left, h, w = augmentation.crop_boxes(20_000, height, width, 0.01, CPU)
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
    monkeypatch.setattr(augmentation, "crop_boxes", lambda *_: (top.float(), left.float(), h.float(), w.float()))
    x = torch.rand(n, 3, height, width)
    ours = augmentation.random_resized_crop_and_flip(x, size, 0.08, flip=0.0)
    boxes = torch.stack([top, left, h, w], dim=1).tolist()
    theirs = torch.stack([resized_crop(x[i], *boxes[i], [size, size], antialias=True) for i in range(n)])
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
        views.append(augmentation.random_resized_crop_and_flip(x, 12, 0.08, flip))
    torch.testing.assert_close(views[1], tv.hflip(views[0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("p", [0.5, 0.2])
def test_flip_rate(monkeypatch, p):
    monkeypatch.setattr(augmentation, "crop_boxes", whole_image)
    image = colourful(8)
    x = augmentation.random_resized_crop_and_flip(copies(image, 5000), 8, 0.08, p)
    flipped, kept = is_near(x, tv.hflip(image)), is_near(x, image)
    assert (flipped ^ kept).all()
    assert_rate(int(flipped.sum()), 5000, p)


# ------------------------------------------------------------------------------------------------
# Augmentation: colours
# ------------------------------------------------------------------------------------------------


def test_luminance_is_torchvisions():
    x = torch.rand(4, 3, 9, 9)
    torch.testing.assert_close(augmentation.luminance(x), tv.rgb_to_grayscale(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift", [-1 / 3, -0.2, -0.013, 0.0, 0.1, 0.2, 1 / 3])
def test_shift_hue_is_torchvisions_adjust_hue(shift):
    """For any colour: also for black, white, greys, the pure colours, and those with two equal channels."""
    corners = torch.tensor(list(itertools.product([0.0, 0.5, 1.0], repeat=3)))  # 27 colours
    x = torch.cat([torch.rand(997, 3), corners]).T.reshape(1, 3, 32, 32)
    ours = augmentation.shift_hue(x, torch.tensor([shift]))
    torch.testing.assert_close(ours, tv.adjust_hue(x, shift), atol=1e-5, rtol=0)


def test_shift_hue_turns_each_image_by_its_own_shift():
    x, shift = torch.rand(20, 3, 5, 5), (torch.rand(20) - 0.5) * 2 / 3
    theirs = torch.stack([tv.adjust_hue(image, s) for image, s in zip(x, shift.tolist(), strict=True)])
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
    monkeypatch.setattr(augmentation, "uniform", lambda *args: draws.append(uniform(*args)) or draws[-1])
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: places)  # image places[j] gets the j-th draws
    x = torch.rand(40, 3, 6, 6)
    y = augmentation.color_jitter(x.clone(), strength, p=1.0)
    _, factors, shifts = draws  # the coin, three factors an image, one turn of hue
    for j, i in enumerate(places.tolist()):
        image, result = x[i], y[i]
        parameters = [*factors.view(-1, 3)[j].tolist(), shifts[j].item()]
        assert is_near(in_all_orders(image, parameters), result, 2e-5).any(), f"image {i}: {parameters}"


@pytest.mark.parametrize("batch", [2400, 6, 1])
def test_the_order_of_the_four_adjustments_is_uniform(monkeypatch, batch):
    """All images and parameters are equal here, so that an outcome tells which of the 24 orders it had."""

    def fixed(n: int, low: float, high: float, device: torch.device) -> Tensor:
        if (low, high) == (0, 1):
            return torch.zeros(n)  # the coin says yes
        return torch.full((n,), 0.08) if low < 0 else torch.tensor([1.2, 1.35, 1.4]).repeat(n // 3)

    image = colourful(8)
    references = in_all_orders(image, [1.2, 1.35, 1.4, 0.08])
    assert (torch.cdist(references.flatten(1), references.flatten(1)) + torch.eye(24)).min() > 1e-2
    monkeypatch.setattr(augmentation, "uniform", fixed)
    y = torch.cat([augmentation.color_jitter(copies(image, batch), 0.5, p=1.0) for _ in range(2400 // batch)])
    counts = torch.stack([is_near(y, reference) for reference in references]).sum(1)
    assert counts.sum() == 2400
    assert chisquare(counts.numpy()).pvalue > 1e-3, counts.tolist()


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_color_jitter_is_distributed_as_torchvisions(strength):
    n, image, s = 3000, colourful(8), strength
    jitter = transforms.RandomApply([transforms.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)], p=0.8)
    ours, theirs = augmentation.color_jitter(copies(image, n), s, p=0.8), one_by_one(jitter, image, n)
    assert_same_distribution(statistics(ours), statistics(theirs))
    assert_rate(int(is_near(ours, image).sum()), n, 0.2)


@pytest.mark.parametrize("part", ["brightness", "contrast", "saturation", "hue"])
def test_each_part_of_the_jitter_is_distributed_as_torchvisions(monkeypatch, part):
    """The other three parts are held at their neutral parameters."""
    uniform, column = augmentation.uniform, ("brightness", "contrast", "saturation", "hue").index(part)

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
# Augmentation: blur
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "kernel", "n"), [(32, 3, 3000), (96, 9, 500)])
def test_gaussian_blur_is_distributed_as_torchvisions(side, kernel, n):
    image = colourful(side)
    ours = torch.cat([augmentation.gaussian_blur(copies(image, 100), p=1.0) for _ in range(n // 100)])
    theirs = one_by_one(transforms.GaussianBlur(kernel, (0.1, 2.0)), image, n)
    names = ("contrast", "saturation", "sharpness")  # blur does not move an image's mean colours
    assert_same_distribution(*({name: statistics(x)[name] for name in names} for x in (ours, theirs)))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("side", "kernel"), [(8, 3), (32, 3), (50, 5), (96, 9)])
def test_gaussian_blur_is_torchvisions(monkeypatch, side, kernel, sigma):
    """The kernel is a tenth of the image's side, as in the paper's Appendix A, and never below 3."""
    monkeypatch.setattr(
        augmentation, "uniform", lambda n, low, high, device: torch.full((n,), 0.0 if low == 0 else sigma)
    )
    x = torch.rand(2, 3, side, side)
    torch.testing.assert_close(
        augmentation.gaussian_blur(x, p=0.5), tv.gaussian_blur(x, [kernel] * 2, [sigma] * 2), atol=1e-6, rtol=0
    )


def test_gaussian_blur_rate():
    image = colourful(32)
    y = torch.cat([augmentation.gaussian_blur(copies(image, 500), p=0.5) for _ in range(6)])
    unchanged_by_small_sigma = 0.5 * (0.2 - 0.1) / 1.9  # below sigma 0.2 a neighbour weighs less than 4e-6
    assert_rate(int(is_near(y, image).sum()), 3000, 0.5 + unchanged_by_small_sigma)


# ------------------------------------------------------------------------------------------------
# Augmentation: every image draws its own, nothing happens with probability 0, two views
# ------------------------------------------------------------------------------------------------

AUGMENTATIONS = {
    "crop": lambda x, p: augmentation.random_resized_crop_and_flip(x, x.shape[2], 0.08 if p else 1.0, p),
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


def test_a_view_is_distributed_as_torchvisions_pipeline():
    """Crop, flip, jitter, grayscale, in the paper's order (Appendix A)."""
    n, image = 2000, (255 * colourful(16)).byte()
    jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    crop = transforms.RandomResizedCrop(16, antialias=True)
    pipeline = transforms.Compose([crop, transforms.RandomHorizontalFlip(), jitter, transforms.RandomGrayscale(0.2)])
    ours = simCLR.two_views(copies(image, n // 2), make_config())
    assert_same_distribution(statistics(ours), statistics(one_by_one(pipeline, image / 255, n)))


@pytest.mark.parametrize("blur", [0.0, 0.5])
def test_two_views_are_float_pairs_within_black_and_white(blur):
    images = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    images[:10], images[10:20] = 0, 255
    before = images.clone()
    views = simCLR.two_views(images, make_config(blur=blur))
    assert views.shape == (80, 3, 32, 32)
    assert views.dtype == torch.float32
    assert views.min() >= 0
    assert views.max() <= 1 + 1e-6  # a sum of float weights is 1 but for its last bits
    assert torch.equal(images, before)


def test_rows_i_and_i_plus_n_show_the_same_image():
    """Crops of a plain colour are that colour, whichever they are."""
    colours = torch.randint(256, (12, 3, 1, 1), dtype=torch.uint8)
    views = simCLR.two_views(colours.expand(12, 3, 16, 16), make_config(jitter=0.0, grayscale=0.0))
    expected = (colours / 255).repeat(2, 1, 1, 1).expand(24, 3, 16, 16)
    torch.testing.assert_close(views, expected, atol=1e-6, rtol=0)


def test_the_two_views_of_an_image_differ():
    first, second = simCLR.two_views(copies((255 * colourful(16)).byte(), 64), make_config()).chunk(2)
    assert ((first - second).abs().amax((1, 2, 3)) > 0.02).all()


def test_two_views_without_any_augmentation_are_the_image():
    images = torch.randint(256, (30, 3, 32, 32), dtype=torch.uint8)
    config = make_config(crop_scale=1.0, flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0)
    views = simCLR.two_views(images, config)
    torch.testing.assert_close(views, (images / 255).repeat(2, 1, 1, 1), atol=1e-6, rtol=0)


def test_the_seed_decides_the_views():
    images, views = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        views.append(simCLR.two_views(images, make_config(blur=0.5)))
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


def test_views_keep_float32_under_autocast():
    images, config = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8), make_config(blur=0.5)
    views = []
    for reduced in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            views.append(simCLR.two_views(images, config))
    assert views[1].dtype == torch.float32
    assert torch.equal(*views)


# ------------------------------------------------------------------------------------------------
# Encoder and model
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder() -> nn.Module:
    """A stand-in for a ResNet: it has what matters here, a convolution and a BatchNorm. (B, 3, H, W) -> (B, 8)."""
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers)


def cloned_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_bits(module: nn.Module, state: dict[str, Tensor]) -> None:
    now = module.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], state[name]) for name in state)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize(("name", "feature_dim"), [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)])
def test_an_encoder_is_torchvisions_resnet_without_classifier(name, feature_dim, stem):
    """Its weights load strictly into torchvision's own network, which then computes the same."""
    encoder, dim = simCLR.build_encoder(name, stem)
    theirs = getattr(models, name)()
    theirs.fc = nn.Identity()
    if stem == "cifar":
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    theirs.load_state_dict(encoder.state_dict(), strict=True)
    x = torch.rand(2, 3, 16, 16)
    h = encoder.eval()(x)
    assert dim == feature_dim
    assert h.shape == (2, feature_dim)
    torch.testing.assert_close(h, theirs.eval()(x), atol=1e-4, rtol=1e-4)


def test_the_cifar_stem_keeps_the_resolution():
    """Appendix B.9: the first convolution is 3x3 with stride 1, and there is no max-pool."""
    encoder, _ = simCLR.build_encoder("resnet18", "cifar")
    conv = encoder.conv1
    assert (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert not any(isinstance(module, nn.MaxPool2d) for module in encoder.modules())
    sizes = []
    encoder.layer1.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[2:]))
    encoder.eval()(torch.rand(1, 3, 12, 12))
    assert sizes == [(12, 12)]


@pytest.mark.parametrize(("name", "stem", "culprit"), [("vgg", "cifar", "vgg"), ("resnet18", "mnist", "mnist")])
def test_an_unknown_encoder_or_stem_is_named(name, stem, culprit):
    with pytest.raises(fn.UserError, match=culprit):
        simCLR.build_encoder(name, stem)


def test_model_maps_images_to_embeddings_through_the_representation(encoder):
    """z = g(f(x)); get_encoder() is f alone."""
    model = simCLR.SimCLRModel(encoder, feature_dim=8, hidden_dim=16, embedding_dim=5).eval()
    x = torch.rand(7, 3, 10, 10)
    h, z = model.get_encoder()(x), model(x)
    assert h.shape == (7, 8)
    assert z.shape == (7, 5)
    assert torch.equal(h, encoder(x))
    assert torch.equal(z, model.projection_head(h))


def test_the_projection_head_has_one_hidden_layer_with_relu(encoder):
    """Section 2.1: g(h) = W2 ReLU(W1 h), here with BatchNorm between (Appendix B)."""
    head = simCLR.SimCLRModel(encoder, 8, hidden_dim=16, embedding_dim=5).projection_head
    linear = [module for module in head if isinstance(module, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == [(16, 8), (5, 16)]
    h = torch.randn(9, 8)
    hidden = nn.functional.batch_norm(h @ linear[0].weight.T, None, None, training=True).relu()
    torch.testing.assert_close(head(h), hidden @ linear[1].weight.T + linear[1].bias, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------
# Pretraining: learning rate, optimiser, monitor, and that it learns
# ------------------------------------------------------------------------------------------------


def test_learning_rate_rises_linearly_to_one_and_falls_as_a_cosine_to_zero():
    factors = [simCLR.learning_rate_factor(step, 10, 110) for step in range(111)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[10] == max(factors) == 1
    assert factors[60] == pytest.approx(0.5)  # half way
    assert factors[35] == pytest.approx((1 + math.sqrt(0.5)) / 2)  # a quarter of the way
    assert factors[110] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))


def test_learning_rate_without_warm_up_is_the_cosine_alone():
    factors = [simCLR.learning_rate_factor(step, 0, 4) for step in range(5)]
    assert factors == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0])


@pytest.mark.parametrize(("batch_size", "rate"), [(256, 0.3), (512, 0.6), (64, 0.075)])
def test_the_learning_rate_is_scaled_with_the_batch(batch_size, rate):
    assert simCLR.actual_learning_rate(make_config(learning_rate=0.3, batch_size=batch_size)) == pytest.approx(rate)


@pytest.mark.parametrize(("configured", "epochs", "expected"), [(10, 300, 10), (10, 50, 5), (10, 3, 0.3), (0, 300, 0)])
def test_warm_up_is_at_most_a_tenth_of_the_training(configured, epochs, expected):
    assert simCLR.warmup_epochs(make_config(warmup_epochs=configured, epochs=epochs)) == pytest.approx(expected)


def make_pretraining(encoder: nn.Module, **values) -> simCLR.Pretraining:
    images = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8)
    return simCLR.Pretraining(simCLR.SimCLRModel(encoder, 8, 16, 5), images, None, make_config(**values))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_weights_decay_but_biases_and_batchnorm_do_not(encoder, optimizer):
    module = make_pretraining(encoder, optimizer=optimizer, batch_size=4, weight_decay=0.01)
    groups = module.configure_optimizers()["optimizer"].param_groups
    decay = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    matrices = {m.weight for m in module.model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert set(decay) == set(module.model.parameters())
    assert all(rate == (0.01 if parameter in matrices else 0) for parameter, rate in decay.items())


def test_the_schedule_peaks_at_the_scaled_rate_and_ends_at_zero(encoder):
    module = make_pretraining(encoder, batch_size=4, epochs=20, warmup_epochs=2, learning_rate=0.64)
    chosen = module.configure_optimizers()
    optimizer, schedule = chosen["optimizer"], chosen["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(20 * 5):  # 5 steps an epoch
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert chosen["lr_scheduler"]["interval"] == "step"
    assert rates[0] == pytest.approx(0.01 / 10)
    assert rates[9] == rates[10] == max(rates) == pytest.approx(0.01)  # 0.64 * 4 / 256
    assert 0 < rates[-1] < 1e-4
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def numbered_dataset(counts: list[int], test: int = 50) -> fn.ImageDataset:
    """Each training image shows its own index in three bytes, so that it can be recognised; test images are white."""
    index = torch.arange(sum(counts))
    images = torch.stack([index % 256, index // 256, torch.zeros_like(index)], dim=1).view(-1, 3, 1, 1).byte()
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[torch.randperm(len(index))]
    white = torch.full((test, 3, 1, 1), 255, dtype=torch.uint8)
    classes = tuple(f"class {i}" for i in range(len(counts)))
    return fn.ImageDataset("numbered", images, labels, white, torch.zeros(test, dtype=torch.long), classes)


def numbers(images: Tensor) -> Tensor:
    return images[:, 0, 0, 0].long() + 256 * images[:, 1, 0, 0].long() + 65536 * images[:, 2, 0, 0].long()


def test_the_monitor_splits_the_training_images_by_class():
    data = numbered_dataset([100, 60, 40])
    bank, bank_labels, queries, query_labels, num_classes = signals.knn_monitor(data, seed=0)
    assert sorted([*numbers(bank).tolist(), *numbers(queries).tolist()]) == list(range(200))  # disjoint, no test image
    assert torch.equal(bank_labels, data.train_labels[numbers(bank)])
    assert torch.equal(query_labels, data.train_labels[numbers(queries)])
    assert query_labels.bincount().tolist() == [10, 6, 4]
    assert num_classes == 3


def test_the_monitor_takes_at_most_5000_and_1000_of_a_large_set():
    bank, bank_labels, queries, query_labels, _ = signals.knn_monitor(numbered_dataset([12_000, 8_000]), seed=0)
    assert bank_labels.bincount().tolist() == [3000, 2000]
    assert query_labels.bincount().tolist() == [600, 400]
    assert not set(numbers(bank).tolist()) & set(numbers(queries).tolist())


def test_the_monitor_follows_from_the_seed():
    data = numbered_dataset([100, 100])
    queries = [numbers(signals.knn_monitor(data, seed)[2]) for seed in (0, 0, 1)]
    assert torch.equal(queries[0], queries[1])
    assert not torch.equal(queries[0], queries[2])


def test_an_unlabelled_set_has_no_monitor():
    images = torch.zeros(100, 3, 8, 8, dtype=torch.uint8)
    assert signals.knn_monitor(fn.ImageDataset("folder", images, None, None, None, ()), seed=0) is None


def test_pretraining_learns_and_its_checkpoint_gives_the_encoder(tmp_path):
    """64 digits, ResNet18: the loss falls from chance, about log(2N - 1); a Lightning checkpoint has f's weights."""
    data = fn.load_dataset("digits")
    data.train_images, data.train_labels = data.train_images[:300], data.train_labels[:300]
    config = make_config(epochs=12, batch_size=64, learning_rate=0.8, crop_scale=0.5, flip=0.0, knn_every=12)
    encoder, feature_dim = simCLR.build_encoder("resnet18", "cifar")
    model = simCLR.SimCLRModel(encoder, feature_dim, 64, 32)
    log = fn.EpochLog(quiet=True)
    trainer = fn.make_trainer(config, config.epochs, log=log, check_val_every_n_epoch=config.knn_every)
    module = simCLR.Pretraining(model, data.train_images[:64], signals.knn_monitor(data, seed=0), config)
    fn.fit(trainer, module)
    losses = [row["train_loss"] for row in log.rows]
    assert len(losses) == 12
    assert losses[0] < math.log(127) + 1
    assert 0 < sum(losses[-3:]) / 3 < losses[0] - 0.4
    assert log.rows[-1]["knn_accuracy"] > 0.1  # chance

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh, _ = simCLR.build_encoder("resnet18", "cifar")
    simCLR.load_encoder(fresh, tmp_path / "last.ckpt")
    assert_same_bits(fresh, encoder.state_dict())


def test_one_step_stays_on_its_device(encoder):
    """Views, model and loss on an imagined GPU, where a tensor left on the CPU is an error."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model = simCLR.SimCLRModel(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AvgPool2d(14), nn.Flatten()), 8, 16, 5)
        images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
        loss = fn.nt_xent_loss(model(simCLR.two_views(images, make_config(blur=0.5))), 0.5)
    assert loss.device.type == "cuda"


# ------------------------------------------------------------------------------------------------
# Checkpoints: data, never code
# ------------------------------------------------------------------------------------------------


def test_encoder_pt_gives_back_the_same_bits(encoder, tmp_path):
    state = cloned_state(encoder)
    fn.save_torch(tmp_path / "encoder.pt", state)
    with torch.no_grad():
        encoder[0].weight.zero_()
    simCLR.load_encoder(encoder, tmp_path / "encoder.pt")
    assert_same_bits(encoder, state)


def test_a_lightning_checkpoint_gives_the_encoder_without_the_head(encoder, tmp_path):
    state = {name: torch.ones_like(value) for name, value in encoder.state_dict().items()}
    head = {"model.projection_head.0.weight": torch.zeros(3, 8), "normalize.mean": torch.zeros(3)}
    whole = {f"model.encoder.{name}": value for name, value in state.items()} | head
    torch.save({"epoch": 3, "state_dict": whole}, tmp_path / "last.ckpt")
    simCLR.load_encoder(encoder, tmp_path / "last.ckpt")
    assert_same_bits(encoder, state)


def test_a_missing_checkpoint_is_named(encoder, tmp_path):
    with pytest.raises(fn.UserError, match=r"--checkpoint .*nowhere\.pt: no such file"):
        simCLR.load_encoder(encoder, tmp_path / "nowhere.pt")


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "zeros"])
def test_a_damaged_checkpoint_is_named_and_changes_nothing(encoder, tmp_path, damage):
    file, state = tmp_path / "encoder.pt", cloned_state(encoder)
    torch.save(encoder.state_dict(), file)
    whole = file.read_bytes()
    contents = {"truncated": whole[: len(whole) // 2], "text": b"hello\n", "empty": b"", "zeros": bytes(1000)}
    file.write_bytes(contents[damage])
    with pytest.raises(fn.UserError, match=r"--checkpoint .*encoder\.pt is damaged"):
        simCLR.load_encoder(encoder, file)
    assert_same_bits(encoder, state)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param({"0.weight": torch.zeros(8, 3, 3, 3)}, id="a part of the weights"),
        pytest.param({"state_dict": {"model.rnn.weight": torch.zeros(2)}}, id="another script's checkpoint"),
        pytest.param({"state_dict": None}, id="no weights"),
        pytest.param({"state_dict": {0: torch.zeros(2)}}, id="weights without names"),
        pytest.param(torch.zeros(3), id="a tensor"),
        pytest.param([1, 2], id="a list"),
        pytest.param({}, id="nothing"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_and_changes_nothing(encoder, tmp_path, value):
    file, state = tmp_path / "other.pt", cloned_state(encoder)
    torch.save(value, file)
    with pytest.raises(fn.UserError, match="--checkpoint"):
        simCLR.load_encoder(encoder, file)
    assert_same_bits(encoder, state)


def test_the_other_stem_is_refused(tmp_path):
    torch.save(simCLR.build_encoder("resnet18", "imagenet")[0].state_dict(), tmp_path / "encoder.pt")
    with pytest.raises(fn.UserError, match="--encoder, --stem and --norm"):
        simCLR.load_encoder(simCLR.build_encoder("resnet18", "cifar")[0], tmp_path / "encoder.pt")


class Intruder:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(encoder, tmp_path, save):
    file, folder = tmp_path / "encoder.pt", tmp_path / "made by the pickle"
    save({"0.weight": Intruder(folder)}, file)
    with pytest.raises(fn.UserError, match="damaged, or no checkpoint"):
        simCLR.load_encoder(encoder, file)
    assert not folder.exists()
    torch.load(file, weights_only=False) if save is torch.save else pickle.loads(file.read_bytes())
    assert folder.exists()  # it would have run


# ------------------------------------------------------------------------------------------------
# Evaluation: the frozen encoder, k-NN and the linear probe
# ------------------------------------------------------------------------------------------------


def blobs(num_classes: int = 3, spread: float = 0.1, per_class: int = 40, dim: int = 6) -> evaluation.Features:
    """Gaussian clouds around orthogonal unit vectors; with a small spread, linearly separable."""
    labels = torch.arange(num_classes).repeat(per_class)
    centres = torch.eye(dim)[labels]
    train, test = (centres + spread * torch.randn(len(labels), dim) for _ in range(2))
    return evaluation.Features(train, labels, test, labels, tuple(f"class {i}" for i in range(num_classes)))


def probed(features: evaluation.Features, probe: str, **values) -> nn.Linear:
    classifier = nn.Linear(features.train.shape[1], len(features.classes))
    evaluation.train_probe(
        classifier, features, make_config(probe=probe, probe_epochs=20, probe_batch_size=32, **values)
    )
    return classifier


@torch.no_grad()
def accuracy_of(classifier: nn.Module, features: evaluation.Features) -> float:
    return fn.accuracy(classifier(features.test).argmax(1), features.test_labels)


def test_a_gradient_step_moves_the_classifier_and_not_one_bit_of_the_encoder(encoder):
    """Not its parameters, nor its BatchNorm statistics, although the module is in training mode."""
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
    """Through the path of evaluate(): features once, then the classifier of a LinearClassifier is trained on them."""
    images, labels = torch.randint(256, (60, 3, 8, 8), dtype=torch.uint8), torch.arange(60) % 3
    model, state = simCLR.LinearClassifier(encoder, 8, 3), cloned_state(encoder)
    before, config = cloned_state(model.classifier), make_config(probe=probe, probe_epochs=2)
    pipeline = nn.Sequential(fn.Normalize(images), encoder)
    h = fn.extract_features(pipeline, images, config)
    features = evaluation.Features(h, labels, h, labels, ("a", "b", "c"))
    evaluation.train_probe(model.classifier, features, config)
    assert_same_bits(encoder, state)
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert not torch.equal(model.classifier.weight, before["weight"])
    assert not torch.equal(model.classifier.bias, before["bias"])


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
        logits, moved_logits = probed(features, probe)(features.test), probed(moved, probe)(moved.test)
    torch.testing.assert_close(moved_logits, logits, atol=2e-2, rtol=0)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_lbfgs_probe_is_logistic_regression_on_standardised_features(num_classes):
    from sklearn.linear_model import LogisticRegression

    features = blobs(num_classes, spread=0.8)  # clouds that overlap
    std, mean = torch.std_mean(features.train, dim=0)
    reference = LogisticRegression(max_iter=1000).fit((features.train - mean) / std, features.train_labels)
    standardised = (features.test - mean) / std
    with torch.no_grad():
        logits = probed(features, "lbfgs")(features.test)
    assert logits.argmax(1).tolist() == reference.predict(standardised).tolist()
    expected = torch.from_numpy(reference.predict_proba(standardised)).float()
    torch.testing.assert_close(logits.softmax(1), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("probe", ["sgd", "lbfgs"])
def test_a_feature_constant_in_training_has_no_say_in_the_test(probe):
    """A unit that is dead, or a pixel that is black, in all training images: nothing was learned of it."""
    features = blobs()
    features.train[:, 5], features.test[:, 5] = 0.0, torch.rand(len(features.test))
    assert accuracy_of(probed(features, probe), features) == 1.0


def test_the_sgd_probe_records_an_epoch_per_row():
    """The last row tells of the classifier that comes back."""
    features, classifier = blobs(spread=0.8), nn.Linear(6, 3)
    features.train, features.test = features.train + 5, features.test + 5
    rows = evaluation.train_probe(classifier, features, make_config(probe="sgd", probe_epochs=3))
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert {"train_loss", "train_accuracy", "test_loss", "test_accuracy"} <= set(rows[0])
    assert rows[-1]["test_accuracy"] == pytest.approx(accuracy_of(classifier, features))


@pytest.mark.parametrize("probe", ["sgd", "lbfgs"])
def test_separable_features_measure_as_perfect(probe):
    config = make_config(stages="knn,probe", checkpoint="encoder.pt", probe=probe, knn_k=5)
    outcome = evaluation.measure(blobs(), config)
    assert outcome["knn"] == {"accuracy": 1.0}
    assert outcome["probe"]["train_accuracy"] == outcome["probe"]["test_accuracy"] == 1.0
    assert outcome["probe"]["per_class"] == {"class 0": 1.0, "class 1": 1.0, "class 2": 1.0}


def test_random_features_measure_as_chance():
    features = blobs(num_classes=4, per_class=200)
    features.train, features.test = torch.randn_like(features.train), torch.randn_like(features.test)
    outcome = evaluation.measure(features, make_config(stages="knn,probe", checkpoint="x", probe="lbfgs", knn_k=20))
    for value in (outcome["knn"]["accuracy"], outcome["probe"]["test_accuracy"]):
        assert_rate(round(800 * value), 800, 0.25)


@pytest.mark.parametrize(("stages", "keys"), [("knn", {"knn"}), ("probe", {"probe"}), ("tsne", set())])
def test_only_the_stages_asked_for_are_measured(stages, keys):
    config = make_config(stages=stages, checkpoint="encoder.pt", probe="lbfgs")
    assert {"knn", "probe"} & set(evaluation.measure(blobs(), config)) == keys


# ------------------------------------------------------------------------------------------------
# Configuration
# ------------------------------------------------------------------------------------------------


def test_the_defaults_are_valid():
    simCLR.Config().validate()


BAD_VALUES = [
    *[(name, 0) for name in ("epochs", "hidden_dim", "embedding_dim", "knn_every", "knn_k", "probe_epochs")],
    *[(name, 1) for name in ("batch_size", "probe_batch_size")],
    *[(name, value) for name in ("temperature", "knn_temperature") for value in (0.0, math.nan, math.inf, -1.0)],
    *[(name, value) for name in ("learning_rate", "probe_learning_rate") for value in (0.0, math.nan, math.inf)],
    *[(name, value) for name in ("flip", "jitter", "grayscale", "blur") for value in (1.5, -0.1, math.nan)],
    *[(name, value) for name in ("crop_scale", "label_fraction") for value in (0.0, 1.1, math.nan)],
    *[("jitter_strength", value) for value in (-0.1, 1.3, math.nan)],
    *[("weight_decay", value) for value in (-1e-4, math.nan, math.inf)],
    *[("stages", value) for value in ("foo", "", "pretrain,,knn", "pretrain,foo")],
    *[("seed", value) for value in (-1, 2**63)],
    *[("image_size", value) for value in (3, 1025)],
    ("warmup_epochs", -1),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_bad_value_is_refused_with_the_name_of_its_flag(name, value):
    with pytest.raises(fn.UserError, match=rf"--{name}\b"):
        make_config(**{name: value}).validate()


@pytest.mark.parametrize("stages", ["knn", "probe", "tsne", "knn,probe"])
def test_stages_without_pretrain_need_a_checkpoint(stages, tmp_path):
    with pytest.raises(fn.UserError, match="--checkpoint"):
        make_config(stages=stages).validate()
    with pytest.raises(fn.UserError, match=r"nowhere.pt: no such file"):
        make_config(stages=stages, checkpoint="nowhere.pt").validate()
    (tmp_path / "encoder.pt").touch()
    make_config(stages=stages, checkpoint=str(tmp_path / "encoder.pt")).validate()


def test_a_checkpoint_and_pretraining_exclude_each_other():
    with pytest.raises(fn.UserError, match="--checkpoint"):
        make_config(stages="pretrain,knn", checkpoint="encoder.pt").validate()


def test_stages_run_in_their_order_whatever_the_order_given():
    assert make_config(stages="probe, pretrain,knn").stages_list == ["pretrain", "knn", "probe"]


# ------------------------------------------------------------------------------------------------
# Crop size
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("crop_size", "schedule"),
    [
        (None, [(None, 1.0)]),
        (16, [(16, 1.0)]),
        ("16", [(16, 1.0)]),
        ("16:0.7,24:0.9,32:1.0", [(16, 0.7), (24, 0.9), (32, 1.0)]),
        ("32:0.5, 16:1", [(32, 0.5), (16, 1.0)]),
    ],
)
def test_a_crop_size_is_a_side_or_a_schedule_over_the_share_of_training(crop_size, schedule):
    assert augmentation.crop_schedule(crop_size) == schedule


@pytest.mark.parametrize(
    "crop_size",
    [
        "",
        *[
            "0",
            "x",
            "3",
            "1025",
            "-16",
            "16.5",
            "16,32",
            "16:0.5",
            "16:2",
            "16:0.5:1",
            "16:0,32:1",
            "16:nan,32:1",
            "16:0.9,24:0.7,32:1",
            "16:0.5,,32:1",
        ],
    ],
)
def test_a_bad_crop_size_is_refused_with_the_name_of_its_flag(crop_size):
    with pytest.raises(fn.UserError, match="--crop_size"):
        make_config(crop_size=crop_size).validate()


def test_views_have_the_crop_size():
    views = simCLR.two_views(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), make_config(), size=20)
    assert views.shape == (6, 3, 20, 20)


def test_pretraining_crops_by_its_schedule():
    """10 steps: 5 with crops of 4 pixels, 3 with 6, 2 with 8; the k-NN check sees whole images of 8."""
    seen = []

    class Sides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, x.shape[-1]))
            return x.mean((2, 3)) * self.weight

    data = fn.load_dataset("digits")
    config = make_config(epochs=2, batch_size=20, crop_size="4:0.5,6:0.8,8:1", jitter=0.0, grayscale=0.0)
    trainer = fn.make_trainer(config, config.epochs, log=fn.EpochLog(quiet=True))
    model = simCLR.SimCLRModel(Sides(), 3, 4, 4)
    fn.fit(trainer, simCLR.Pretraining(model, data.train_images[:100], signals.knn_monitor(data, seed=0), config))
    assert [side for training, side in seen if training] == [4] * 5 + [6] * 3 + [8] * 2
    assert {side for training, side in seen if not training} == {8}


def test_a_side_that_yaml_reads_to_base_60_is_refused():
    """16:1 is 961 there; a wrong size must not go unnoticed."""
    for text in ("16:1", "32:1", "4:1"):
        with pytest.raises(fn.UserError, match="--crop_size"):
            fn.parse_config(simCLR.Config, ["--dataset", "digits", "--crop_size", text])
    assert fn.parse_config(simCLR.Config, ["--dataset", "digits", "--crop_size", "16:0.5,32:1"]).crop_size


@pytest.mark.parametrize("compiled", [False, True])
def test_compile_is_passed_on(monkeypatch, tmp_path, compiled):
    calls = []
    monkeypatch.setattr(simCLR.SimCLRModel, "compile", lambda self, **options: calls.append(options))
    data = fn.load_dataset("digits")
    data.train_images, data.train_labels = data.train_images[:40], data.train_labels[:40]
    model = simCLR.SimCLRModel(nn.Sequential(nn.AvgPool2d(8), nn.Flatten()), 3, 4, 4)
    simCLR.pretrain(model, data, make_config(epochs=1, batch_size=20, compile=compiled), tmp_path)
    assert calls == ([{"dynamic": False}] if compiled else [])


def test_compile_sees_the_whole_model_as_one_graph():
    """fullgraph: nothing in it sends torch.compile back to Python. The parameters keep their names."""
    model = simCLR.SimCLRModel(*simCLR.build_encoder("resnet18", "cifar"), 16, 8).eval()
    names, x = set(model.state_dict()), torch.randn(2, 3, 32, 32)
    expected = model(x)
    model.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(x), expected)
    assert set(model.state_dict()) == names


# ------------------------------------------------------------------------------------------------
# Small maps
# ------------------------------------------------------------------------------------------------

SMALL_MAPS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (4, 4), (2, 4), (4, 3), (5, 5), (7, 6), (8, 8), (9, 9)]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("height", "width"), SMALL_MAPS)
def test_a_small_map_is_convolved_as_any_other(height, width, stride):
    """Value and both gradients are those of torch's convolution, to rounding; also for another memory format."""
    torch.manual_seed(0)
    ours = small_maps.SmallMapConv2d(5, 7, 3, stride, padding=1, bias=False).double()
    x = torch.randn(4, 5, height, width, dtype=torch.float64, requires_grad=True)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = ours(x.contiguous(memory_format=memory_format))
        expected = torch.nn.functional.conv2d(x, ours.weight, stride=stride, padding=1)
        torch.testing.assert_close(y, expected)
        g = torch.randn_like(y)
        for a, b in zip(*(torch.autograd.grad(out, (x, ours.weight), g) for out in (y, expected)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_small_maps_follow_autocast(size):
    torch.manual_seed(0)
    ours = small_maps.SmallMapConv2d(16, 8, 3, stride=2 if size == 8 else 1, padding=1, bias=False)
    x = torch.randn(4, 16, size, size)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert ours.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), ours(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (4, 1), (8, 2), (7, 2)])
def test_small_maps_in_bfloat16_are_rounded_like_torchs(size, stride):
    """Value and gradients come no further from the exact ones than twice the error of torch's own convolution."""
    torch.manual_seed(0)
    layer = small_maps.SmallMapConv2d(64, 64, 3, stride, padding=1, bias=False)
    x = torch.randn(32, 64, size, size)
    g = torch.randn_like(layer(x))

    def outcome(forward, dtype):
        a, w = (t.detach().to(dtype).requires_grad_() for t in (x, layer.weight))
        y = forward(a, w)
        return [t.double() for t in (y, *torch.autograd.grad(y, (a, w), g.to(dtype)))]

    theirs = lambda a, w: torch.nn.functional.conv2d(a, w, stride=stride, padding=1)  # noqa: E731
    ours = lambda a, w: small_maps.PatchConvolution.apply(a, w, stride)  # noqa: E731
    exact = outcome(theirs, torch.float64)
    for e, a, b in zip(exact, outcome(ours, torch.bfloat16), outcome(theirs, torch.bfloat16), strict=True):
        assert (a - e).norm() < 2 * (b - e).norm()


@pytest.mark.parametrize(("size", "stride", "ours"), [(4, 1, True), (8, 2, True), (5, 1, False), (9, 2, False)])
def test_maps_of_up_to_four_pixels_out_are_gathered_and_larger_ones_left_to_torch(monkeypatch, size, stride, ours):
    calls, gather = [], small_maps.PatchConvolution.apply
    monkeypatch.setattr(small_maps.PatchConvolution, "apply", lambda *args: calls.append(1) or gather(*args))
    small_maps.SmallMapConv2d(2, 2, 3, stride, padding=1, bias=False)(torch.zeros(1, 2, size, size))
    assert bool(calls) == ours


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_bfloat16_gradients_of_small_images_are_those_of_float32(stem):
    """On 8 x 8 images the last maps are single pixels, where the CPU's own bfloat16 convolution may fail."""
    torch.manual_seed(0)
    encoder, _ = simCLR.build_encoder("resnet18", stem)
    x, gradients = torch.randn(32, 3, 8, 8), []
    for enabled in (False, True):
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            encoder(x).float().square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in encoder.parameters()]))
    assert gradients[1].isfinite().all()
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.9


def test_the_learning_rate_suits_the_optimizer_unless_given():
    rates = [make_config(optimizer=o, batch_size=512) for o in ("sgd", "adam")]
    assert [simCLR.actual_learning_rate(config) for config in rates] == [0.12, 0.002]
    assert simCLR.actual_learning_rate(make_config(optimizer="adam", learning_rate=0.5, batch_size=128)) == 0.25
