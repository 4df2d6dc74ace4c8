"""What pretraining costs, in multiply-accumulates."""

import json

import pytest
import torch
from helpers import cloned_state, make_config, randint
from torch import nn

import functions as fn
import simCLR
from contrastive.arithmetic import T, arithmetic, in_words, macs_of
from contrastive.muon import orthogonalization_macs
from contrastive.plan import print_plan

IMAGES = randint(256, 40, 3, 32, 32, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("stem", "side", "millions"),
    [
        ("imagenet", 32, 37.0),
        ("cifar", 32, 555.4),
        ("cifar", 24, 312.4),
        ("cifar", 16, 138.9),
        ("cifar", 12, 92.8),
        ("cifar", 8, 34.7),
    ],
)
def test_resnet18_costs_what_the_usual_counters_say(stem, side, millions):
    encoder, _ = simCLR.build_encoder("resnet18", stem)
    assert round(macs_of(encoder, side) / 1e6, 1) == millions


def by_hand(model, side):
    """The same, written out: each output of a layer is a sum over all the inputs it sees."""
    total = 0

    def count(layer, inputs, output):
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            taps = layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
            total += taps * output[0].numel()
        elif isinstance(layer, nn.Linear):
            total += layer.in_features * layer.out_features

    hooks = [layer.register_forward_hook(count) for layer in model.modules()]
    model.eval()(torch.zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "compact"])
@pytest.mark.parametrize("side", [8, 20, 33])
def test_the_count_is_what_the_layers_say(name, side):
    """Also of maps that are computed by a shortcut, and with any normalisation and head."""
    encoder, dim = simCLR.build_encoder(name, "cifar", "group", "silu")
    model = simCLR.SimCLRModel(encoder, dim, 64, 32, layers=3)
    state = cloned_state(model)
    before = macs_of(model, side)
    assert before == by_hand(model, side)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def module(**changes):
    config = make_config(batch_size=10, **changes)
    encoder, dim = simCLR.build_encoder("resnet18", "imagenet")
    kind = simCLR.Pretraining if config.micro_batch_size is None else simCLR.CachedPretraining
    return kind(simCLR.SimCLRModel(encoder, dim, 64, 32), IMAGES, None, config)


def test_views_images_and_passes_are_counted():
    """Forward, and twice as much backward; gradient caching embeds twice."""
    plain = arithmetic(module(epochs=3))
    one = plain["macs_per_image"]
    assert one == macs_of(module().model, 32)
    assert plain == {
        "views": 2,
        "images_seen": 3 * 40,
        "macs_per_image": one,
        "macs": 3 * one * 2 * 120,
    }
    four = arithmetic(module(epochs=3, views=4))
    assert four["macs"] == 2 * plain["macs"]
    cached = arithmetic(module(epochs=3, micro_batch_size=5))
    assert cached["macs"] == 4 * one * 2 * 120


def test_the_products_of_muon_are_counted_in_each_step():
    """Twelve steps; they do not depend on how many views or images a step has."""
    model = module().model
    each = sum(orthogonalization_macs(p.shape) for p in model.parameters() if p.ndim > 1)
    for views in (2, 4):
        without, with_it = (
            arithmetic(module(epochs=3, views=views, optimizer=name)) for name in ("sgd", "muon")
        )
        assert with_it["macs"] == without["macs"] + 12 * each


def test_every_process_computes_the_products_of_muon():
    model = module().model
    each = sum(orthogonalization_macs(p.shape) for p in model.parameters() if p.ndim > 1)
    without, with_it = (arithmetic(module(devices=2, optimizer=name)) for name in ("sgd", "muon"))
    steps = with_it["images_seen"] // 20
    assert with_it["macs"] - without["macs"] == 2 * steps * each > 0


def test_images_that_do_not_fill_a_batch_are_not_seen():
    assert arithmetic(module(epochs=2))["images_seen"] == 80
    config = make_config(batch_size=30, epochs=2)
    encoder, dim = simCLR.build_encoder("resnet18", "imagenet")
    pretraining = simCLR.Pretraining(simCLR.SimCLRModel(encoder, dim), IMAGES, None, config)
    assert arithmetic(pretraining)["images_seen"] == 60


def test_the_schedule_of_crops_is_counted_step_by_step():
    """Eight steps: those that have yet to do a half, and those that have done it."""
    pretraining = module(epochs=2, crop_size="8:0.5,16:0.7,24:1")
    model = pretraining.model
    sides = [8] * 4 + [16] * 2 + [24] * 2
    expected = sum(macs_of(model, side) for side in sides) / 8
    assert arithmetic(pretraining)["macs_per_image"] == round(expected)
    seen = [pretraining.side_at(step / 8) for step in range(8)]
    assert seen == sides


@pytest.mark.parametrize(
    ("crop_size", "words"),
    [
        (16, "crops of 16 pixels\n"),
        ("16:0.7,24:1", "crops of 16 pixels until 70% of the steps, then 24 pixels\n"),
    ],
)
def test_the_crops_are_told_before_they_are_made(crop_size, words, capsys):
    pretraining = module(crop_size=crop_size)
    print_plan(pretraining, arithmetic(pretraining))
    assert capsys.readouterr().out.startswith(words)


def test_the_textbook_run_is_the_unit():
    encoder, _ = simCLR.build_encoder("resnet18", "imagenet")
    assert 300 * 50_000 * 2 * 3 * macs_of(encoder, 32) == pytest.approx(T, rel=1e-3)
    assert in_words(T / 4) == "8.32e+14 multiply-accumulates = 0.25 T"


@pytest.mark.slow
def test_a_run_says_what_it_takes_and_what_it_took(run_here, tmp_path):
    flags = ["--dataset", "digits", "--stem", "imagenet", "--epochs", 2, "--stages", "pretrain"]
    flags += ["--batch_size", 256, "--views", 3, "--output_dir", "out"]
    done = run_here("simCLR.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/results.json").read_text())["pretrain"]
    encoder, dim = simCLR.build_encoder("resnet18", "imagenet")
    one = macs_of(simCLR.SimCLRModel(encoder, dim), 8)
    assert (found["views"], found["images_seen"]) == (3, 2 * 5 * 256)
    assert (found["macs_per_image"], found["macs"]) == (one, 9 * one * found["images_seen"])
    assert f"a view; in all {in_words(found['macs'])}" in done.stdout
    assert f"pretraining took {in_words(found['macs'])}" in done.stdout


def test_a_set_that_names_its_own_side_counts_it():
    data = fn.load_dataset("digits")
    config = make_config(epochs=1, batch_size=128)
    encoder, dim = simCLR.build_encoder("resnet18", "imagenet")
    model = simCLR.SimCLRModel(encoder, dim)
    pretraining = simCLR.Pretraining(model, data.pretraining_images, None, config)
    assert arithmetic(pretraining)["macs_per_image"] == macs_of(model, 8)
