"""SimCLR's levers: encoders, heads, optimizers."""

import ast
import csv
import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
from helpers import NARROW, make_config, randn, user_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

import functions as fn
import simCLR
from contrastive import encoders
from contrastive.arithmetic import macs_of
from contrastive.encoders import ACTIVATIONS, NORMS, CompactNet, widen
from contrastive.lars import LARS
from contrastive.muon import ITERATIONS, Muon, orthogonalization_macs, orthogonalized

# ------------------------------------------------------------------------------------------------
# Encoders and heads
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu", "silu", "leaky_relu"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_another_activation_stands_where_torchvision_has_relu(name, activation):
    encoder, _ = simCLR.build_encoder(name, "imagenet", activation=activation)
    theirs = getattr(models, name)()
    theirs.fc = nn.Identity()
    for block in theirs.modules():
        if hasattr(block, "relu"):
            block.relu = getattr(
                nn, {"gelu": "GELU", "silu": "SiLU"}.get(activation, "LeakyReLU")
            )()
    theirs.load_state_dict(encoder.state_dict(), strict=True)
    x = torch.rand(2, 3, 24, 24)
    torch.testing.assert_close(encoder.eval()(x), theirs.eval()(x), atol=1e-4, rtol=1e-4)


def test_resnet101_is_torchvisions():
    encoder, dim = simCLR.build_encoder("resnet101", "imagenet")
    theirs = models.resnet101().double()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(encoder.double().state_dict(), strict=True)
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    assert dim == 2048
    torch.testing.assert_close(encoder.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_blocks_that_begin_as_the_identity_are(name, norm, seeded):
    encoder, _ = simCLR.build_encoder(name, norm=norm, zero_init=True)
    first, *others = encoder.layer2
    x = first(torch.rand(2, first.conv1.in_channels, 8, 8))
    for block in others:  # the first has another shape of output
        assert torch.equal(block(x), x)
    assert x.any()


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("side", [8, 33, 96])
def test_images_of_any_side_become_representations(stem, side):
    encoder, dim = simCLR.build_encoder("resnet18", stem)
    assert encoder.eval()(torch.rand(1, 3, side, side)).shape == (1, dim)


def compact_by_hand(x, state, activation):
    """Conv, norm, nonlinearity; thrice: conv, max-pool, norm, nonlinearity, x + the same again."""

    def conv(x, name):
        return nn.functional.conv2d(x, state[f"{name}.weight"], padding=1)

    def norm(x, name):
        names = ("running_mean", "running_var", "weight", "bias")
        return nn.functional.batch_norm(x, *(state[f"{name}.{part}"] for part in names))

    x = activation(norm(conv(x, "conv1"), "norm1"))
    for block in ("block1", "block2", "block3"):
        x = nn.functional.max_pool2d(conv(x, f"{block}.conv1"), 2, ceil_mode=True)
        x = activation(norm(x, f"{block}.norm1"))
        x = x + activation(norm(conv(x, f"{block}.conv2"), f"{block}.norm2"))
    return x.flatten(2).mean(2)


@pytest.mark.parametrize("side", [4, 8, 16, 33])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_compact_encoder_is_seven_convolutions(side, activation, seeded):
    encoder, dim = simCLR.build_encoder("compact", activation=activation)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            for part in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(part)
    x = torch.rand(3, 3, side, side)
    by_hand = compact_by_hand(x, encoder.state_dict(), getattr(nn.functional, activation))
    assert dim == 512
    torch.testing.assert_close(encoder.eval()(x), by_hand, atol=1e-4, rtol=1e-4)


def channels_of(encoder):
    """(inputs, outputs) of each convolution, and the channels of each normalisation."""
    found = {}
    for name, part in encoder.named_modules():
        if isinstance(part, nn.Conv2d):
            found[name] = part.in_channels, part.out_channels
        elif isinstance(part, nn.BatchNorm2d):
            found[name] = (part.num_features,)
    return found


@pytest.mark.parametrize(
    ("name", "stem"),
    [(name, stem) for name in ("resnet18", "resnet50") for stem in ("cifar", "imagenet")]
    + [("compact", "cifar")],
)
@pytest.mark.parametrize("width", [0.5, 2])
def test_a_width_multiplies_the_channels_of_every_layer(name, stem, width):
    """As in the paper's 2x and 4x ResNets, the stem's, too: all but the three colours."""
    narrow, dim = simCLR.build_encoder(name, stem)
    encoder, wide = simCLR.build_encoder(name, stem, width=width)
    assert wide == width * dim
    # A block that kept its width needs no convolution beside it, and neither does a wider one.
    assert channels_of(encoder) == {
        part: tuple(n if n == 3 else width * n for n in channels)
        for part, channels in channels_of(narrow).items()
    }
    assert encoder.eval()(torch.rand(2, 3, 16, 16)).shape == (2, wide)


@pytest.mark.parametrize(("width", "channels"), [(1, 32), (1.3, 40), (0.125, 8), (0.3, 8)])
def test_channels_are_a_multiple_of_eight(width, channels):
    encoder, _ = simCLR.build_encoder("compact", width=width)
    assert encoder.conv1.out_channels == channels


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_a_wide_resnets_first_layer_begins_as_torchvision_begins_the_others(stem, seeded):
    """Normal, with variance 2 / (outputs x k x k): fan out, for ReLU."""
    encoder, _ = simCLR.build_encoder("resnet18", stem, width=4)
    weight = encoder.conv1.weight
    k = weight.shape[-1]
    assert weight.std().item() == pytest.approx((2 / (256 * k * k)) ** 0.5, rel=0.05)
    assert weight.mean().abs() < 0.05 * weight.std()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(
    ("name", "ends"), [("compact", 512), ("resnet18", 512), ("resnet50", 2048)]
)
def test_a_wider_representation_is_the_average_of_a_widened_last_map(
    name, ends, activation, seeded
):
    """h = mean over places of nonlinearity(norm(W x)), where x is the last map at each place; the
    other weights, and what they begin as, are those of the encoder as it is."""
    encoder, dim = simCLR.build_encoder(name, activation=activation, feature_dim=37)
    assert dim == 37
    torch.manual_seed(0)
    narrow, _ = simCLR.build_encoder(name, activation=activation)
    torch.manual_seed(0)
    again, _ = simCLR.build_encoder(name, activation=activation, feature_dim=37)
    state = again.state_dict()
    assert all(torch.equal(state[key], part) for key, part in narrow.state_dict().items())

    wide, norm = encoder.avgpool[:2]
    for part in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(part)
    maps = []
    encoder.avgpool.register_forward_pre_hook(lambda module, given: maps.append(given[0]))
    x = torch.rand(2, 3, 24, 24)
    h = encoder.double().eval()(x.double())
    places = maps[0].flatten(2).transpose(1, 2)  # (B, places, channels)
    assert places.shape[1:] == (9, ends)
    y = places @ wide.weight.flatten(1).T
    y = (y - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(h, getattr(nn.functional, activation)(y).mean(1))


def test_the_compact_encoder_needs_pytorch_alone():
    """docs/levers.md says so to whom takes the file along."""
    tree = ast.parse(Path(encoders.__file__).read_text())
    froms = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imports = [one for node in ast.walk(tree) if isinstance(node, ast.Import) for one in node.names]
    modules = {name.partition(".")[0] for name in [*froms, *(one.name for one in imports)]}
    assert modules - set(sys.stdlib_module_names) == {"torch"}


def test_the_compact_encoder_takes_two_fifths_of_the_arithmetic_of_resnet18():
    compact, resnet = (simCLR.build_encoder(name)[0] for name in ("compact", "resnet18"))
    shapes = {
        32: [3 * 32, 32 * 64],
        16: [64 * 64, 64 * 256],
        8: [256 * 256, 256 * 512],
        4: [512**2],
    }
    assert macs_of(compact, 32) == sum(9 * s * s * sum(pairs) for s, pairs in shapes.items())
    assert 2.5 < macs_of(resnet, 32) / macs_of(compact, 32) < 2.6


def test_no_image_of_a_compact_encoder_with_group_norm_depends_on_the_others(seeded):
    encoder, _ = simCLR.build_encoder("compact", norm="group")
    x = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(encoder(x)[:1], encoder(x[:1]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (2, 1), (5, 1), (6, 2), (32, 16), (48, 16), (64, 32), (512, 32)],
)
def test_groups_have_two_channels_at_least(channels, groups):
    norm = NORMS["group"](channels)
    assert (norm.num_groups, norm.num_channels) == (groups, channels)


@pytest.mark.parametrize("flag", ["--stem=imagenet", "--zero_init=true"])
def test_what_is_for_resnets_is_refused_with_the_compact_encoder(flag):
    problem = user_error(fn.parse_config, simCLR.Config, ["--encoder", "compact", flag])
    assert flag.replace("=true", "").replace("=", " ") in problem
    assert "take a ResNet" in problem


def test_an_unknown_activation_is_named():
    assert "--activation swish" in user_error(
        simCLR.build_encoder, "resnet18", "cifar", "batch", "swish"
    )


def test_no_head_compares_the_representation_itself():
    h = randn(5, 8)
    assert torch.equal(simCLR.build_head(8, layers=0)(h), h)


def test_one_layer_is_a_linear_head():
    (layer,) = simCLR.build_head(8, 16, 5, layers=1)
    assert isinstance(layer, nn.Linear)
    assert layer.weight.shape == (5, 8)


@pytest.mark.parametrize("layers", [2, 3, 4])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_the_head_is_its_formula(layers, norm):
    """z = W_L ReLU(norm(W_{L-1} ... ReLU(norm(W_1 h))))."""
    head = simCLR.build_head(8, 32, 5, norm, layers)
    linear = [module for module in head if isinstance(module, nn.Linear)]
    assert len(linear) == layers
    h = x = torch.randn(9, 8)
    for layer in linear[:-1]:
        assert (layer.bias is None) == (norm != "none")
        x = nn.functional.linear(x, layer.weight, layer.bias)
        if norm == "batch":
            x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
        elif norm == "group":
            x = nn.functional.group_norm(x, 16)
        x = x.relu()
    expected = nn.functional.linear(x, linear[-1].weight, linear[-1].bias)
    torch.testing.assert_close(head(h), expected, atol=1e-5, rtol=1e-4)


def test_the_heads_dropout_is_for_training_alone():
    head = simCLR.build_head(8, 1000, 5, "none", dropout=0.25)
    hidden = head[:-1]
    h = torch.randn(1, 8).abs()
    kept = hidden(h)
    head.eval()
    whole = hidden(h)
    dropped = (kept == 0) & (whole > 0)
    assert 0.15 < dropped.sum() / (whole > 0).sum() < 0.35
    torch.testing.assert_close(kept[~dropped], whole[~dropped] / 0.75)


def test_the_default_head_is_bit_for_bit_what_it_was():
    torch.manual_seed(3)
    head = simCLR.build_head(8, 16, 5)
    torch.manual_seed(3)
    before = nn.Sequential(
        nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Linear(16, 5)
    )
    assert head.state_dict().keys() == before.state_dict().keys()
    for ours, theirs in zip(head.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# ------------------------------------------------------------------------------------------------
# Optimizers
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_is_its_algorithm(nesterov, decay):
    """You et al. 2017, Algorithm 1, written out: three steps of a weight and of a bias."""
    rate, m, trust = 0.7, 0.9, 0.001
    w, b = randn(4, 3), randn(4, seed=1)
    parameters = nn.Parameter(w.clone()), nn.Parameter(b.clone())
    optimizer = LARS(parameters, rate, m, decay, trust, nesterov)
    v_w, v_b = torch.zeros_like(w), torch.zeros_like(b)
    for step in range(3):
        g_w, g_b = randn(4, 3, seed=10 + step), randn(4, seed=20 + step)
        parameters[0].grad, parameters[1].grad = g_w.clone(), g_b.clone()
        optimizer.step()

        scale = trust * w.norm() / (g_w.norm() + decay * w.norm())
        u_w, u_b = rate * scale * (g_w + decay * w), rate * (g_b + decay * b)
        v_w, v_b = m * v_w + u_w, m * v_b + u_b
        w = w - (u_w + m * v_w if nesterov else v_w)
        b = b - (u_b + m * v_b if nesterov else v_b)
        torch.testing.assert_close(parameters[0].detach(), w)
        torch.testing.assert_close(parameters[1].detach(), b)


def test_lars_moves_every_layer_by_the_same_share_whatever_its_gradient():
    layers = [nn.Parameter(randn(5, 5, seed=i)) for i in range(3)]
    before = [layer.detach().clone() for layer in layers]
    for i, layer in enumerate(layers):
        layer.grad = randn(5, 5, seed=9 + i) * 10.0 ** (3 * i)
    LARS(layers, 0.5).step()
    shares = [
        float((a - b.detach()).norm() / a.norm()) for a, b in zip(before, layers, strict=True)
    ]
    assert shares == pytest.approx([0.5 * 0.001] * 3)


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_lars_does_not_divide_by_zero(zero):
    w = nn.Parameter(torch.zeros(2, 2) if zero == "weight" else torch.ones(2, 2))
    w.grad = torch.zeros(2, 2) if zero == "gradient" else torch.ones(2, 2)
    LARS([w], 0.5).step()
    assert w.isfinite().all()


def turned(before, after):
    """The share of its length by which a layer moved."""
    return float((before - after.detach()).norm() / before.norm())


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (6, 40), (40, 6)])
def test_muon_weighs_all_directions_alike(rows, columns):
    """U S V^T -> nearly U V^T, by its SVD: singular values thirty times apart come to about 1."""
    u, _, v = torch.linalg.svd(randn(rows, columns), full_matrices=False)
    values = torch.logspace(0, -1.5, 6).double()
    kept = u.T @ orthogonalized(u * values @ v) @ v.T
    assert kept.diag().min() > 0.68
    assert kept.diag().max() < 1.25
    assert (kept - torch.diag(kept.diag())).abs().max() < 1e-4


def test_muon_orthogonalizes_as_pytorch_does():
    """torch.optim.Muon has it for matrices, in bfloat16: a step from zeros is -lr times it."""
    w = nn.Parameter(torch.zeros(16, 48))
    w.grad = randn(16, 48).float()
    plain = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    torch.optim.Muon([w], lr=1.0, ns_steps=ITERATIONS, **plain).step()
    torch.testing.assert_close(-w.detach(), orthogonalized(w.grad), atol=0.015, rtol=0)


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_muon_in_half_precision_takes_gradients_of_any_size(dtype, scale):
    """float16 has no numbers below 6e-8 or above 65,504."""
    matrix = randn(16, 48).float()
    exact = orthogonalized(matrix)
    torch.testing.assert_close(orthogonalized(scale * matrix, dtype), exact, atol=0.02, rtol=0)
    assert not orthogonalized(0 * matrix, dtype).any()


def test_muon_computes_in_the_precision_of_the_run():
    parameters = [nn.Parameter(randn(4, 3))]
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        config = make_config(optimizer="muon", precision=precision)
        assert simCLR.make_optimizer(parameters, config).dtype == dtype


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_is_its_algorithm(nesterov):
    """Written out: three steps of a weight and of a bias."""
    rate, m = 0.2, 0.9
    w, b = randn(4, 3), randn(4, seed=1)
    parameters = nn.Parameter(w.clone()), nn.Parameter(b.clone())
    optimizer = Muon(parameters, rate, m, nesterov)
    v_w, v_b = torch.zeros_like(w), torch.zeros_like(b)
    for step in range(3):
        g_w, g_b = randn(4, 3, seed=10 + step), randn(4, seed=20 + step)
        parameters[0].grad, parameters[1].grad = g_w.clone(), g_b.clone()
        optimizer.step()

        v_w, v_b = m * v_w + g_w, m * v_b + g_b
        o = orthogonalized(g_w + m * v_w if nesterov else v_w)
        moved = w - rate * w.norm() * o / o.norm()
        w = moved * w.norm() / moved.norm()
        b = b - rate * (g_b + m * v_b if nesterov else v_b)
        torch.testing.assert_close(parameters[0].detach(), w)
        torch.testing.assert_close(parameters[1].detach(), b)


def test_muon_turns_every_layer_by_the_same_share_and_keeps_its_length():
    """Whatever the gradient's size; a convolution is a matrix with a row for each output."""
    layers = [nn.Parameter(randn(5, 2, 3, 3, seed=i)) for i in range(3)]
    before = [layer.detach().clone() for layer in layers]
    for i, layer in enumerate(layers):
        layer.grad = randn(5, 2, 3, 3, seed=9 + i) * 10.0 ** (3 * i)
    flat = nn.Parameter(layers[0].detach().flatten(1).clone())
    flat.grad = layers[0].grad.flatten(1)
    Muon([*layers, flat], 0.01).step()
    pairs = list(zip(before, layers, strict=True))
    assert [turned(*pair) for pair in pairs] == pytest.approx([0.01] * 3, rel=0.02)
    lengths = [[float(w.detach().norm()) for w in pair] for pair in pairs]
    assert [b for b, _ in lengths] == pytest.approx([a for _, a in lengths])
    torch.testing.assert_close(layers[0].detach().flatten(1), flat.detach())


@pytest.mark.parametrize("shape", [(5, 2, 3, 3), (40, 2, 3, 3)])
def test_a_layer_of_channels_last_is_moved_as_any_other(shape):
    plain, last = nn.Parameter(randn(*shape)), nn.Parameter(randn(*shape))
    last.data = last.data.contiguous(memory_format=torch.channels_last)
    gradient = randn(*shape, seed=1)
    plain.grad = gradient.clone()
    last.grad = gradient.contiguous(memory_format=torch.channels_last)
    Muon([plain], 0.01).step()
    Muon([last], 0.01).step()
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain, last)


def test_muon_has_nothing_for_weight_decay_to_do():
    layers = [nn.Parameter(randn(4, 3).float()) for _ in range(2)]
    for layer, decay in zip(layers, (0.0, 0.5), strict=True):
        config = make_config(optimizer="muon", weight_decay=decay)
        layer.grad = randn(4, 3, seed=1).float()
        simCLR.make_optimizer([layer], config).step()
    assert torch.equal(*layers)


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_muon_does_not_divide_by_zero(zero):
    w = nn.Parameter(torch.zeros(2, 2) if zero == "weight" else torch.ones(2, 2))
    w.grad = torch.zeros(2, 2) if zero == "gradient" else torch.ones(2, 2)
    before = w.detach().clone()
    Muon([w], 0.5).step()
    torch.testing.assert_close(w.detach(), before)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (4, 2, 3, 3), (20, 2, 3, 3)])
def test_the_arithmetic_of_muon_is_what_pytorch_counts(shape):
    with FlopCounterMode(display=False) as counter:
        orthogonalized(randn(*shape).flatten(1))
    assert 2 * orthogonalization_macs(torch.Size(shape)) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        ("sgd", torch.optim.SGD),
        ("lars", LARS),
        ("muon", Muon),
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
    ],
)
def test_weights_decay_and_biases_do_not(optimizer, kind):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    config = make_config(optimizer=optimizer, weight_decay=0.01, batch_size=256, momentum=0.8)
    made = simCLR.make_optimizer(list(model.parameters()), config)
    assert type(made) is kind
    weights, others = made.param_groups
    assert [p.ndim for p in weights["params"]] == [2]
    assert [p.ndim for p in others["params"]] == [1, 1, 1]
    assert (weights["weight_decay"], others["weight_decay"]) == (0.01, 0.0)  # muon has none
    assert made.defaults["lr"] == {"sgd": 0.06, "lars": 0.3, "muon": 0.03}.get(optimizer, 0.001)
    if optimizer in ("sgd", "lars", "muon"):
        assert made.defaults["momentum"] == 0.8


@pytest.mark.parametrize(
    ("scaling", "rate", "words"),
    [
        ("linear", 1.2, "0.3 x 1024/256 = 1.2"),
        ("sqrt", 0.6, "0.3 x sqrt(1024/256) = 0.6"),
        ("none", 0.3, "0.3"),
    ],
)
def test_the_rate_follows_the_batch_as_it_is_told(scaling, rate, words, capsys):
    """Appendix B.1; a batch of 1,024 is four times 256."""
    config = make_config(learning_rate=0.3, batch_size=1024, scaling=scaling)
    assert simCLR.actual_learning_rate(config) == pytest.approx(rate)
    simCLR.print_learning_rate(config)
    assert capsys.readouterr().out.startswith(f"sgd, learning rate {words}, warm-up 10 of 300")
    assert math.isclose(simCLR.SCALINGS[scaling](1.0), 1.0)


@pytest.mark.parametrize("flags", [{"optimizer": "adam"}, {"momentum": 0.0}])
def test_nesterov_needs_momentum(flags):
    assert "--nesterov" in user_error(make_config(nesterov=True, **flags).validate)


@pytest.mark.parametrize(
    "optimizer",
    ["muon", *(pytest.param(other, marks=pytest.mark.slow) for other in ("lars", "adamw"))],
)
def test_other_optimizers_and_views_train_and_resume(optimizer, image_folder, run_here, tmp_path):
    """End to end, with four views, a mean target and a deeper head; cut off, and gone on with."""
    flags = ["--dataset", image_folder, "--image_size", 8, "--stages", "pretrain"]
    flags += [*NARROW, "--epochs", 3, "--views", 4, "--positives", "mean", "--decoupled"]
    flags += ["--head_layers", 3]
    flags += ["--head_norm", "none", "--head_dropout", 0.1, "--optimizer", optimizer]
    flags += ["--scaling", "sqrt", "--activation", "silu", "--crop_scale", 0.3]
    flags += ["--crop_scale_max", 0.6, "--batch_size", 100, "--checkpoint_every", 0]
    flags += ["--precision", "fp32"]
    whole = run_here("simCLR.py", *flags, "--output_dir", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert "batch 100 x 4 views (396 negatives per view)" in whole.stdout
    assert "x sqrt(100/256) =" in whole.stdout
    results = json.loads((tmp_path / "whole/results.json").read_text())["pretrain"]
    with open(tmp_path / "whole/metrics.csv") as file:
        images = statistics.median(float(row["images_per_second"]) for row in csv.DictReader(file))
    assert results["pairs_per_second"] == pytest.approx(2 * images, abs=0.1), (
        "four views: two pairs"
    )

    flags += ["--output_dir", "parts"]
    parts = run_here("simCLR.py", *flags, "--max_time", "00:00:00:01", cwd=tmp_path)
    assert "--max_time is over" in parts.stdout
    assert run_here("simCLR.py", "--resume", "parts", cwd=tmp_path).returncode == 0
    ours, theirs = (
        torch.load(tmp_path / name / "encoder.pt", weights_only=True) for name in ("parts", "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "architecture",
    [
        {"stem": "imagenet", "activation": "gelu"},
        {"encoder": "compact", "whiten": "true"},
        {"encoder": "compact", "width": 0.5, "feature_dim": 96},
    ],
    ids=lambda architecture: "-".join(map(str, architecture.values())),
)
def test_an_encoder_is_measured_as_what_it_was_trained_as(architecture, run_here, tmp_path):
    flags = ["--dataset", "digits", "--epochs", 1, "--no-baselines", "--knn_k", 5]
    flags += [f"--{name}={value}" for name, value in architecture.items()]
    done = run_here(
        "simCLR.py", *flags, "--stages", "pretrain,knn", "--output_dir", "a", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    flags = ["--dataset", "digits", "--stages", "knn", "--checkpoint", "a", "--no-baselines"]
    done = run_here("simCLR.py", *flags, "--knn_k", 5, "--output_dir", "b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = [fn.load_config(simCLR.Config, tmp_path / name / "config.yaml") for name in "ab"]
    for name in set(architecture) - {"whiten"}:
        assert [getattr(config, name) for config in results] == 2 * [architecture[name]]
    numbers = [(tmp_path / name / "results.json").read_text() for name in "ab"]
    first, again = (text.partition('"knn"')[2].split("}")[0] for text in numbers)
    assert first == again


def scale_channels(encoder, times):
    """Replace each convolution and GroupNorm by one of so many times the channels (not colours)."""
    for parent in list(encoder.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, nn.Conv2d):
                inputs = 3 if part.in_channels == 3 else int(times * part.in_channels)
                outputs, where = int(times * part.out_channels), (part.stride, part.padding)
                wide = nn.Conv2d(inputs, outputs, part.kernel_size, *where, bias=False)
                setattr(parent, name, wide)
            elif isinstance(part, nn.GroupNorm):
                channels = int(times * part.num_channels)
                setattr(parent, name, NORMS["group"](channels))


def torchvisions(config):
    """The same encoder, made by its own constructor, as the README and docs/levers.md say."""
    if config.encoder == "compact":
        norm, activation = NORMS[config.norm], ACTIVATIONS[config.activation]
        encoder = CompactNet(norm, activation, config.width)
        if config.feature_dim:
            widen(encoder, encoder.feature_dim, config.feature_dim, norm, activation)
        return encoder
    group = {"norm_layer": lambda channels: nn.GroupNorm(math.gcd(32, channels), channels)}
    encoder = getattr(models, config.encoder)(**(group if config.norm == "group" else {}))
    if config.stem == "cifar":
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        encoder.maxpool = nn.Identity()
    encoder.fc = nn.Identity()
    if config.width != 1:
        scale_channels(encoder, config.width)
    kinds = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "leaky_relu": nn.LeakyReLU}
    for block in encoder.modules():
        if hasattr(block, "relu"):
            block.relu = kinds[config.activation]()
    return encoder


@pytest.mark.parametrize(
    "changes",
    [
        {"head_layers": 0},
        {"head_layers": 1, "norm": "group"},
        {"head_layers": 3, "head_norm": "none", "head_dropout": 0.2, "activation": "gelu"},
        {"stem": "cifar", "head_norm": "group", "activation": "leaky_relu", "whiten": True},
        {"encoder": "resnet34", "norm": "group", "activation": "silu", "ema": 0.5},
        {"encoder": "compact", "stem": "cifar", "norm": "group", "activation": "gelu"},
        {"encoder": "compact", "stem": "cifar", "micro_batch_size": 8, "crop_size": "4:0.5,8:1"},
        {"encoder": "compact", "stem": "cifar", "feature_dim": 48, "activation": "silu"},
        {"encoder": "compact", "stem": "cifar", "width": 0.5, "feature_dim": 48},
        {"encoder": "resnet18", "width": 0.25, "norm": "group"},
        pytest.param({"encoder": "resnet50", "stem": "cifar"}, marks=pytest.mark.slow),
        pytest.param({"encoder": "resnet50", "norm": "group"}, marks=pytest.mark.slow),
        pytest.param({"encoder": "resnet101", "activation": "gelu"}, marks=pytest.mark.slow),
        pytest.param({"encoder": "resnet101", "stem": "cifar"}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_an_encoder_is_trained_exported_and_loaded_elsewhere(changes, tmp_path):
    """Two steps on digits; what was trained and what others make of encoder.pt are equal."""
    settings = {"stem": "imagenet", "batch_size": 16, "epochs": 1, "hidden_dim": 64} | changes
    config = make_config(**settings)
    images = fn.load_dataset("digits").train_images[:32]
    data = fn.ImageDataset("digits", images, None, None, None, ())
    architecture = config.encoder, config.stem, config.norm, config.activation
    widths = {"width": config.width, "feature_dim": config.feature_dim}
    encoder, dim = simCLR.build_encoder(*architecture, **widths)
    norm = config.head_norm or config.norm
    head = config.hidden_dim, config.embedding_dim, norm, config.head_layers, config.head_dropout
    model = simCLR.SimCLRModel(encoder, dim, *head)
    before = [p.clone() for p in encoder.parameters()]
    assert simCLR.pretrain(model, data, config, tmp_path).results["steps"] == 2
    assert not any(torch.equal(p, old) for p, old in zip(encoder.parameters(), before, strict=True))

    theirs = torchvisions(config)
    theirs.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True), strict=True)
    x = fn.Normalize(images)(images)
    encoder, theirs = encoder.double().eval(), theirs.double().eval()
    torch.testing.assert_close(encoder(x.double()), theirs(x.double()))


@pytest.mark.slow
def test_the_papers_setting_trains(run_here, tmp_path):
    """The README's command, for two steps on digits."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    command = text[text.index("python simCLR.py --encoder resnet50 --zero_init") :]
    command = command.partition("```")[0].replace("\\\n", " ")
    _, script, *flags = command.split()
    flags += ["--dataset", "digits", "--epochs", 1, "--batch_size", 700, "--stages", "pretrain"]
    done = run_here(script, *flags, "--output_dir", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "lars, learning rate 1 x 700/256 = 2.73438, warm-up" in done.stdout
    assert "2 steps an epoch" in done.stdout
