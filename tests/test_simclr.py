"""simCLR.py: its encoder, model, pretraining, checkpoints and configuration."""

import itertools
import math
import pickle
from pathlib import Path

import pytest
import torch
from helpers import assert_same_bits, cloned_state, make_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision import models

import functions as fn
import simCLR
from contrastive import augmentation, signals
from contrastive.pretrained import load_encoder

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


# ------------------------------------------------------------------------------------------------
# Encoder and model
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize(
    ("name", "feature_dim"), [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)]
)
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
    assert (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
    assert conv.bias is None
    assert not any(isinstance(module, nn.MaxPool2d) for module in encoder.modules())

    sizes = []
    encoder.layer1.register_forward_hook(lambda _, inputs, output: sizes.append(output.shape[2:]))
    encoder.eval()(torch.rand(1, 3, 12, 12))
    assert sizes == [(12, 12)]


@pytest.mark.parametrize(
    ("name", "stem", "culprit"), [("vgg", "cifar", "vgg"), ("resnet18", "mnist", "mnist")]
)
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
    z = hidden @ linear[1].weight.T + linear[1].bias
    torch.testing.assert_close(head(h), z, atol=1e-5, rtol=1e-4)


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
    config = make_config(learning_rate=0.3, batch_size=batch_size)
    assert simCLR.actual_learning_rate(config) == pytest.approx(rate)


def test_the_learning_rate_suits_the_optimizer_unless_given():
    configs = [make_config(optimizer=o, batch_size=512) for o in ("sgd", "adam")]
    assert [simCLR.actual_learning_rate(config) for config in configs] == [0.12, 0.002]

    given = make_config(optimizer="adam", learning_rate=0.5, batch_size=128)
    assert simCLR.actual_learning_rate(given) == 0.25


@pytest.mark.parametrize(
    ("configured", "epochs", "expected"), [(10, 300, 10), (10, 50, 5), (10, 3, 0.3), (0, 300, 0)]
)
def test_warm_up_is_at_most_a_tenth_of_the_training(configured, epochs, expected):
    config = make_config(warmup_epochs=configured, epochs=epochs)
    assert simCLR.warmup_epochs(config) == pytest.approx(expected)


def make_pretraining(encoder: nn.Module, **values) -> simCLR.Pretraining:
    images = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8)
    model = simCLR.SimCLRModel(encoder, 8, 16, 5)
    return simCLR.Pretraining(model, images, None, make_config(**values))


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
    """Each training image shows its own index in three bytes; test images are white."""
    index = torch.arange(sum(counts))
    images = (
        torch.stack([index % 256, index // 256, torch.zeros_like(index)], dim=1)
        .view(-1, 3, 1, 1)
        .byte()
    )
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[
        torch.randperm(len(index))
    ]
    white = torch.full((test, 3, 1, 1), 255, dtype=torch.uint8)
    classes = tuple(f"class {i}" for i in range(len(counts)))
    test_labels = torch.zeros(test, dtype=torch.long)
    return fn.ImageDataset("numbered", images, labels, white, test_labels, classes)


def numbers(images: Tensor) -> Tensor:
    return (
        images[:, 0, 0, 0].long()
        + 256 * images[:, 1, 0, 0].long()
        + 65536 * images[:, 2, 0, 0].long()
    )


def test_the_monitor_splits_the_training_images_by_class():
    data = numbered_dataset([100, 60, 40])
    monitor = signals.knn_monitor(data, seed=0)
    bank, queries = numbers(monitor.bank), numbers(monitor.queries)

    both = [*bank.tolist(), *queries.tolist()]
    assert sorted(both) == list(range(200))  # each training image once, and no test image
    assert torch.equal(monitor.bank_labels, data.train_labels[bank])
    assert torch.equal(monitor.query_labels, data.train_labels[queries])
    assert monitor.query_labels.bincount().tolist() == [10, 6, 4]
    assert monitor.num_classes == 3


def test_the_monitor_takes_at_most_5000_and_1000_of_a_large_set():
    data = numbered_dataset([12_000, 8_000])
    monitor = signals.knn_monitor(data, seed=0)
    assert monitor.bank_labels.bincount().tolist() == [3000, 2000]
    assert monitor.query_labels.bincount().tolist() == [600, 400]
    bank, queries = numbers(monitor.bank), numbers(monitor.queries)
    assert not set(bank.tolist()) & set(queries.tolist())


def test_the_monitor_follows_from_the_seed():
    data = numbered_dataset([100, 100])
    queries = [numbers(signals.knn_monitor(data, seed).queries) for seed in (0, 0, 1)]
    assert torch.equal(queries[0], queries[1])
    assert not torch.equal(queries[0], queries[2])


def test_an_unlabelled_set_has_no_monitor():
    images = torch.zeros(100, 3, 8, 8, dtype=torch.uint8)
    data = fn.ImageDataset("folder", images, None, None, None, ())
    assert signals.knn_monitor(data, seed=0) is None


def test_pretraining_learns_and_its_checkpoint_gives_the_encoder(tmp_path):
    """On 64 digits, the loss falls from chance, about log(2N - 1).

    A checkpoint of Lightning has f's weights.
    """
    data = fn.load_dataset("digits")
    data.train_images, data.train_labels = data.train_images[:300], data.train_labels[:300]
    values = {"epochs": 12, "batch_size": 64, "learning_rate": 0.8, "knn_every": 12}
    config = make_config(**values, crop_scale=0.5, flip=0.0)

    encoder, feature_dim = simCLR.build_encoder("resnet18", "cifar")
    model = simCLR.SimCLRModel(encoder, feature_dim, 64, 32)
    log, every = fn.EpochLog(quiet=True), config.knn_every
    machine, epochs = config.machine, config.epochs
    trainer = fn.make_trainer(machine, config.seed, epochs, log, check_val_every_n_epoch=every)
    monitor = signals.knn_monitor(data, seed=0)
    module = simCLR.Pretraining(model, data.train_images[:64], monitor, config)
    fn.fit(trainer, module)

    losses = [row["train_loss"] for row in log.rows]
    assert len(losses) == 12
    assert losses[0] < math.log(127) + 1
    assert 0 < sum(losses[-3:]) / 3 < losses[0] - 0.4
    assert log.rows[-1]["knn_accuracy"] > 0.1  # the accuracy of chance

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh, _ = simCLR.build_encoder("resnet18", "cifar")
    load_encoder(fresh, tmp_path / "last.ckpt")
    assert_same_bits(fresh, encoder.state_dict())


def test_one_step_stays_on_its_device():
    """Views, model and loss on an imagined GPU, where a tensor left on the CPU is an error."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AvgPool2d(14), nn.Flatten())
        model = simCLR.SimCLRModel(encoder, 8, 16, 5)
        images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
        loss = fn.nt_xent_loss(model(simCLR.random_views(images, make_config(blur=0.5))), 0.5)
    assert loss.device.type == "cuda"


# ------------------------------------------------------------------------------------------------
# Checkpoints: data, never code
# ------------------------------------------------------------------------------------------------


def test_encoder_pt_gives_back_the_same_bits(encoder, tmp_path):
    state = cloned_state(encoder)
    fn.save_torch(tmp_path / "encoder.pt", state)
    with torch.no_grad():
        encoder[0].weight.zero_()
    load_encoder(encoder, tmp_path / "encoder.pt")
    assert_same_bits(encoder, state)


def test_a_lightning_checkpoint_gives_the_encoder_without_the_head(encoder, tmp_path):
    state = {name: torch.ones_like(value) for name, value in encoder.state_dict().items()}
    head = {"model.projection_head.0.weight": torch.zeros(3, 8), "normalize.mean": torch.zeros(3)}
    whole = {f"model.encoder.{name}": value for name, value in state.items()} | head
    torch.save({"epoch": 3, "state_dict": whole}, tmp_path / "last.ckpt")
    load_encoder(encoder, tmp_path / "last.ckpt")
    assert_same_bits(encoder, state)


def test_a_missing_checkpoint_is_named(encoder, tmp_path):
    with pytest.raises(fn.UserError, match=r"--checkpoint .*nowhere\.pt: no such file"):
        load_encoder(encoder, tmp_path / "nowhere.pt")


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "zeros"])
def test_a_damaged_checkpoint_is_named_and_changes_nothing(encoder, tmp_path, damage):
    file, state = tmp_path / "encoder.pt", cloned_state(encoder)
    torch.save(encoder.state_dict(), file)
    whole = file.read_bytes()
    contents = {
        "truncated": whole[: len(whole) // 2],
        "text": b"hello\n",
        "empty": b"",
        "zeros": bytes(1000),
    }
    file.write_bytes(contents[damage])
    with pytest.raises(fn.UserError, match=r"--checkpoint .*encoder\.pt is damaged"):
        load_encoder(encoder, file)
    assert_same_bits(encoder, state)


OF_ANOTHER_SCRIPT = {"state_dict": {"model.rnn.weight": torch.zeros(2)}}


@pytest.mark.parametrize(
    "value",
    [
        pytest.param({"0.weight": torch.zeros(8, 3, 3, 3)}, id="a part of the weights"),
        pytest.param(OF_ANOTHER_SCRIPT, id="another script's checkpoint"),
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
        load_encoder(encoder, file)
    assert_same_bits(encoder, state)


def test_the_other_stem_is_refused(tmp_path):
    saved, _ = simCLR.build_encoder("resnet18", "imagenet")
    torch.save(saved.state_dict(), tmp_path / "encoder.pt")

    encoder, _ = simCLR.build_encoder("resnet18", "cifar")
    with pytest.raises(fn.UserError, match="--encoder, --stem, --norm, --width and --feature_dim"):
        load_encoder(encoder, tmp_path / "encoder.pt")


class Intruder:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, protocol=2))]
)
def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(encoder, tmp_path, save):
    file, folder = tmp_path / "encoder.pt", tmp_path / "made by the pickle"
    save({"0.weight": Intruder(folder)}, file)
    with pytest.raises(fn.UserError, match="damaged, or no checkpoint"):
        load_encoder(encoder, file)
    assert not folder.exists()
    torch.load(file, weights_only=False) if save is torch.save else pickle.loads(file.read_bytes())
    assert folder.exists()  # it would have run


# ------------------------------------------------------------------------------------------------
# Configuration
# ------------------------------------------------------------------------------------------------


def test_the_defaults_are_valid():
    simCLR.Config().validate()


BAD_VALUES = [
    *[
        (name, 0)
        for name in ("epochs", "hidden_dim", "embedding_dim", "knn_every", "knn_k", "probe_epochs")
    ],
    *[(name, 1) for name in ("batch_size", "probe_batch_size")],
    *[
        (name, value)
        for name in ("temperature", "knn_temperature")
        for value in (0.0, math.nan, math.inf, -1.0)
    ],
    *[
        (name, value)
        for name in ("learning_rate", "probe_learning_rate")
        for value in (0.0, math.nan, math.inf)
    ],
    *[
        (name, value)
        for name in ("flip", "jitter", "grayscale", "blur")
        for value in (1.5, -0.1, math.nan)
    ],
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
        *["", "0", "x", "3", "1025", "-16", "16.5", "16,32", "16:0.5", "16:2", "16:0.5:1"],
        *["16:0,32:1", "16:nan,32:1", "16:0.9,24:0.7,32:1", "16:0.5,,32:1"],
    ],
)
def test_a_bad_crop_size_is_refused_with_the_name_of_its_flag(crop_size):
    with pytest.raises(fn.UserError, match="--crop_size"):
        make_config(crop_size=crop_size).validate()


def test_pretraining_crops_by_its_schedule():
    """10 steps: 5 with crops of 4 pixels, 3 with 6, 2 with 8; k-NN sees whole images of 8."""
    seen = []

    class Sides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, x.shape[-1]))
            return x.mean((2, 3)) * self.weight

    data = fn.load_dataset("digits")
    values = {"epochs": 2, "batch_size": 20, "jitter": 0.0, "grayscale": 0.0}
    config = make_config(**values, crop_size="4:0.5,6:0.8,8:1")
    log = fn.EpochLog(quiet=True)
    trainer = fn.make_trainer(config.machine, config.seed, config.epochs, log)
    model = simCLR.SimCLRModel(Sides(), 3, 4, 4)
    monitor = signals.knn_monitor(data, seed=0)
    fn.fit(trainer, simCLR.Pretraining(model, data.train_images[:100], monitor, config))

    assert [side for training, side in seen if training] == [4] * 5 + [6] * 3 + [8] * 2
    assert {side for training, side in seen if not training} == {8}


def test_a_side_that_yaml_reads_to_base_60_is_refused():
    """YAML reads 16:1 as 961; a wrong size must not go unnoticed."""

    def parsed(text: str) -> simCLR.Config:
        return fn.parse_config(simCLR.Config, ["--dataset", "digits", "--crop_size", text])

    for text in ("16:1", "32:1", "4:1"):
        with pytest.raises(fn.UserError, match="--crop_size"):
            parsed(text)
    assert parsed("16:0.5,32:1").crop_size


# ------------------------------------------------------------------------------------------------
# Compilation
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_compile_is_passed_on(monkeypatch, tmp_path, compiled):
    calls = []
    monkeypatch.setattr(simCLR.SimCLRModel, "compile", lambda _, **options: calls.append(options))
    data = fn.load_dataset("digits")
    data.train_images, data.train_labels = data.train_images[:40], data.train_labels[:40]
    model = simCLR.SimCLRModel(nn.Sequential(nn.AvgPool2d(8), nn.Flatten()), 3, 4, 4)
    simCLR.pretrain(model, data, make_config(epochs=1, batch_size=20, compile=compiled), tmp_path)
    assert calls == ([{"dynamic": False}] if compiled else [])


def test_compile_sees_the_whole_model_as_one_graph():
    """fullgraph: nothing sends torch.compile back to Python. Parameters keep their names."""
    model = simCLR.SimCLRModel(*simCLR.build_encoder("resnet18", "cifar"), 16, 8).eval()
    names, x = set(model.state_dict()), torch.randn(2, 3, 32, 32)
    expected = model(x)
    model.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(x), expected)
    assert set(model.state_dict()) == names
