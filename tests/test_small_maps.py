"""contrastive/small_maps.py: a convolution of small maps computes what torch's does."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import simCLR
from contrastive import small_maps

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


SMALL_MAPS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (4, 4)]
SMALL_MAPS += [(2, 4), (4, 3), (5, 5), (7, 6), (8, 8), (9, 9)]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("height", "width"), SMALL_MAPS)
def test_a_small_map_is_convolved_as_any_other(height, width, stride):
    """Value and both gradients are those of torch's convolution, in either memory format."""
    torch.manual_seed(0)
    ours = small_maps.SmallMapConv2d(5, 7, 3, stride, padding=1, bias=False).double()
    x = torch.randn(4, 5, height, width, dtype=torch.float64, requires_grad=True)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = ours(x.contiguous(memory_format=memory_format))
        expected = torch.nn.functional.conv2d(x, ours.weight, stride=stride, padding=1)
        torch.testing.assert_close(y, expected)

        g = torch.randn_like(y)
        gradients = [torch.autograd.grad(out, (x, ours.weight), g) for out in (y, expected)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["pointwise", "mean"])
@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_a_small_map_is_widened_and_averaged_as_any_other(kind, size):
    """Value and gradients are torch's, in either memory format; the mean's gradient has the map's
    own."""
    torch.manual_seed(0)
    theirs = {"pointwise": nn.Conv2d(5, 7, 1, bias=False), "mean": nn.AdaptiveAvgPool2d(1)}[kind]
    both = [nn.Sequential(layer.double()) for layer in (theirs, copy.deepcopy(theirs))]
    small_maps.use_small_maps(both[0])
    assert type(both[0][0]) in (small_maps.SmallMapPointwise, small_maps.SmallMapMean)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(4, 5, size, size, dtype=torch.float64).contiguous(
            memory_format=memory_format
        )
        outcomes = []
        for network in both:
            given = x.detach().requires_grad_()
            y = network(given)
            wanted = (given, *network.parameters())
            outcomes.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
        torch.testing.assert_close(*outcomes)
    if kind == "mean":
        assert outcomes[0][1].is_contiguous(memory_format=torch.channels_last)


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
    """Value and gradients have at most twice the error of torch's own convolution."""
    torch.manual_seed(0)
    layer = small_maps.SmallMapConv2d(64, 64, 3, stride, padding=1, bias=False)
    x = torch.randn(32, 64, size, size)
    g = torch.randn_like(layer(x))

    def outcome(forward, dtype):
        a, w = (t.detach().to(dtype).requires_grad_() for t in (x, layer.weight))
        y = forward(a, w)
        return [t.double() for t in (y, *torch.autograd.grad(y, (a, w), g.to(dtype)))]

    def theirs(a, w):
        return torch.nn.functional.conv2d(a, w, stride=stride, padding=1)

    def ours(a, w):
        return small_maps.PatchConvolution.apply(a, w, stride)

    exact = outcome(theirs, torch.float64)
    rounded = outcome(ours, torch.bfloat16), outcome(theirs, torch.bfloat16)
    for e, a, b in zip(exact, *rounded, strict=True):
        assert (a - e).norm() < 2 * (b - e).norm()


@pytest.mark.parametrize(
    ("size", "stride", "ours"), [(4, 1, True), (8, 2, True), (5, 1, False), (9, 2, False)]
)
def test_maps_of_up_to_four_pixels_out_are_gathered_and_larger_ones_left_to_torch(
    monkeypatch, size, stride, ours
):
    calls, gather = [], small_maps.PatchConvolution.apply

    def noted(*args):
        calls.append(1)
        return gather(*args)

    monkeypatch.setattr(small_maps.PatchConvolution, "apply", noted)
    small_maps.SmallMapConv2d(2, 2, 3, stride, padding=1, bias=False)(torch.zeros(1, 2, size, size))
    assert bool(calls) == ours


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_bfloat16_gradients_of_small_images_are_those_of_float32(stem):
    """On 8 x 8 images the last maps are single pixels.

    There the CPU's own bfloat16 convolution may fail.
    """
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


def test_layers_are_replaced_with_their_weights_and_no_random_number_is_drawn():
    torch.manual_seed(0)
    plain = resnet18()
    state, ours = torch.get_rng_state(), copy.deepcopy(plain)
    small_maps.use_small_maps(ours)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert all(map(torch.equal, ours.state_dict().values(), plain.state_dict().values()))

    others = [{"bias": True}, {"groups": 2}, {"dilation": 2, "padding": 2}, {"padding": 0}]
    for named in others:
        other = nn.Sequential(nn.Conv2d(4, 4, 3, **{"bias": False, "padding": 1} | named))
        small_maps.use_small_maps(other)
        assert type(other[0]) is nn.Conv2d, named

    layers = [m for m in ours.modules() if isinstance(m, nn.Conv2d)]
    kinds = {type(layer) for layer in layers if layer.kernel_size == (3, 3)}
    assert kinds == {small_maps.SmallMapConv2d}
    assert type(ours.conv1) is nn.Conv2d  # 7x7
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))
