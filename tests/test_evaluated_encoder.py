"""The encoder that is measured: averaged weights, statistics anew, its size of images."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import NARROW, cloned_state, make_config, randint, randn, user_error
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import nn
from torchvision.transforms.functional import ten_crop

import functions as fn
import simCLR
from contrastive import evaluation
from contrastive import probe as probing
from contrastive.representation import Resized, in_cells, on_crops, recalibrate, up_to_layer
from contrastive.whitening import whiten

SHORT = [
    *["--dataset", "digits", *NARROW, "--epochs", 3, "--batch_size", 300],
    *["--accelerator", "cpu", "--precision", "fp32", "--checkpoint_every", 0, "--knn_k", 5],
    *["--stages", "pretrain,knn", "--no-baselines"],
]


def encoder_of(folder):
    return torch.load(folder / "encoder.pt", weights_only=True)


def same(ours, theirs):
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ------------------------------------------------------------------------------------------------
# --ema
# ------------------------------------------------------------------------------------------------


class Weights(Callback):
    """What is trained, after each step; and what validation sees."""

    def __init__(self):
        self.trained, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.trained.append(cloned_state(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.validated.append(cloned_state(pl_module))


def test_the_average_is_its_formula(seeded):
    """e_1 = w_1, then e <- decay e + (1 - decay) w: BatchNorm's statistics as well as weights."""
    data = fn.load_dataset("digits")
    config = make_config(epochs=2, batch_size=400, stem="imagenet", knn_k=5)
    encoder, dim = simCLR.build_encoder("resnet18", "imagenet")
    model = simCLR.SimCLRModel(encoder, dim, 64, 32)
    monitor = simCLR.knn_monitor(data, 0)
    module = simCLR.Pretraining(model, data.train_images, monitor, config)
    kept, averaged = Weights(), fn.AveragedWeights(0.75, "cpu")
    log = fn.EpochLog(quiet=True)
    fn.fit(fn.make_trainer(config.machine, 0, 2, log, [kept, averaged]), module)

    assert len(kept.trained) == 6
    expected = kept.trained[0]
    for i, state in enumerate(kept.trained[1:], 1):
        if i == 3:
            seen_after_the_first_epoch = cloned(expected)
        expected = {name: 0.75 * expected[name] + 0.25 * state[name] for name in state}
    found = module.state_dict()
    for name, value in expected.items():
        if found[name].is_floating_point():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
            seen = kept.validated[0][name]
            torch.testing.assert_close(seen, seen_after_the_first_epoch[name], atol=1e-6, rtol=1e-5)
    normalize = fn.Normalize(data.train_images)
    assert torch.equal(module.normalize.mean, normalize.mean), "what is constant stays so"
    assert not same(found, kept.trained[-1])


def cloned(state):
    return {name: value.clone() for name, value in state.items()}


def test_the_average_does_not_copy_the_images():
    data = fn.load_dataset("digits")
    config = make_config(batch_size=400)
    model = simCLR.SimCLRModel(nn.Flatten(), 192, 64, 32)
    module = simCLR.Pretraining(model, data.train_images, None, config)
    average = fn.AveragedWeights(0.9, "cpu")
    average.setup(None, module, "fit")
    (images,) = average._average_model.module.batches.tensors
    assert images.data_ptr() == data.train_images.data_ptr()


@pytest.fixture(scope="module")
def averaged_run(prepare, tmp_path_factory):
    """Three epochs with all that changes the encoder that is measured."""
    cwd = tmp_path_factory.mktemp("averaged")
    flags = [*SHORT, "--ema", 0.8, "--recalibrate", "true", "--evaluation_size", 16]
    flags += ["--whiten", "true", "--output_dir", "whole"]
    assert prepare("simCLR.py", *flags, cwd=cwd) == ""
    return cwd / "whole", flags


@pytest.mark.slow
def test_an_averaged_run_resumes_to_the_same_bits(averaged_run, run_here, tmp_path):
    whole, flags = averaged_run
    flags = [*flags[:-1], "parts", "--max_time", "00:00:00:01"]
    parts = run_here("simCLR.py", *flags, cwd=tmp_path)
    assert "--max_time is over" in parts.stdout
    done = run_here("simCLR.py", "--resume", "parts", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert same(encoder_of(tmp_path / "parts"), encoder_of(whole))
    ours, theirs = (
        torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
        for folder in (tmp_path / "parts", whole)
    )
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert same(ours[part], theirs[part])
    assert not same(ours["state_dict"], ours["current_model_state"])
    knn = [
        json.loads((folder / "results.json").read_text())["knn"]
        for folder in (tmp_path / "parts", whole)
    ]
    assert knn[0] == knn[1]


@pytest.mark.slow
def test_a_run_lost_after_its_last_epoch_still_leaves_the_average(averaged_run, run_here, tmp_path):
    whole, flags = averaged_run
    with pytest.MonkeyPatch.context() as patch:

        def broken(*_):
            raise fn.UserError("the evaluation breaks")

        patch.setattr(simCLR, "recalibrate", broken)
        done = run_here("simCLR.py", *flags[:-1], "parts", cwd=tmp_path)
    assert (done.returncode, "the evaluation breaks" in done.stderr) == (2, True)
    assert run_here("simCLR.py", "--resume", "parts", cwd=tmp_path).returncode == 0
    assert same(encoder_of(tmp_path / "parts"), encoder_of(whole))


@pytest.mark.slow
def test_what_was_measured_is_measured_again(averaged_run, run_here, tmp_path):
    """encoder.pt is the averaged one, with its new statistics; the size is a flag of evaluation."""
    whole, _ = averaged_run
    flags = ["--dataset", "digits", "--stages", "knn", "--checkpoint", whole, "--knn_k", 5]
    flags += ["--no-baselines", "--accelerator", "cpu", "--precision", "fp32"]
    flags += ["--evaluation_size", 16, "--output_dir"]
    done = run_here("simCLR.py", *flags, "again", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = [
        json.loads((folder / "results.json").read_text()) for folder in (whole, tmp_path / "again")
    ]
    assert results[0]["knn"] == results[1]["knn"]


# ------------------------------------------------------------------------------------------------
# --recalibrate, --evaluation_size
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 12])
def test_statistics_anew_are_those_of_the_images(encoder, size):
    """Mean and variance of what BatchNorm is shown, of un-augmented images at evaluation's size."""
    images = randint(256, 60, 3, 8, 8, dtype=torch.uint8)
    normalize = fn.Normalize(images)
    encoder[1].running_mean.fill_(7.0)
    before = cloned_state(encoder)
    recalibrate(encoder, nn.Sequential(Resized(size), normalize), images, make_config())

    x = images / 255
    x = x if size is None else F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    shown = encoder[0](normalize(x))
    norm = encoder[1]
    torch.testing.assert_close(norm.running_mean, shown.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(norm.running_var, shown.var((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert norm.momentum == 0.1
    assert all(torch.equal(encoder.state_dict()[k], before[k]) for k in ("0.weight", "1.weight"))


def test_images_in_the_order_of_their_classes_are_mixed(encoder):
    """Batches of one class each would have too small a variance."""
    dark, bright = (torch.full((600, 3, 4, 4), level, dtype=torch.uint8) for level in (50, 200))
    images = torch.cat([dark, bright])
    normalize = fn.Normalize(images)
    recalibrate(encoder, normalize, images, make_config(seed=3))
    shown = encoder[0](normalize(images))
    torch.testing.assert_close(encoder[1].running_var, shown.var((0, 2, 3)), atol=0.0, rtol=0.05)


def test_groupnorm_has_no_statistics():
    assert "--recalibrate" in user_error(make_config(norm="group", recalibrate=True).validate)


def test_of_many_images_some_are_enough(encoder):
    seen = []
    encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    images = randint(256, 300, 3, 4, 4, dtype=torch.uint8)
    recalibrate(encoder, fn.Normalize(images), images, make_config(), most=120)
    assert sum(seen) == 120


@pytest.mark.parametrize("side", [4, 8, 20])
def test_images_are_brought_to_the_size_of_evaluation(side):
    images = randint(256, 5, 3, 8, 8, dtype=torch.uint8)
    found = Resized(side)(images)
    expected = images / 255
    if side != 8:
        size = side, side
        expected = F.interpolate(expected, size, mode="bilinear", antialias=True)
        assert torch.equal(found, expected)
    else:
        assert torch.equal(found, images)
    torch.testing.assert_close(fn.Normalize(images)(found), fn.Normalize(images)(expected))
    assert torch.equal(Resized(None)(images), images)
    grey = torch.full((1, 3, 8, 8), 77, dtype=torch.uint8)
    assert torch.allclose(
        Resized(side)(grey) * (1 if side != 8 else 1 / 255), torch.tensor(77 / 255)
    )


def test_the_encoder_alone_sees_the_other_size(run_here, tmp_path):
    """Raw pixels stay as they are; the check between epochs sees what evaluation will see."""
    flags = [*SHORT[:-1], "--baselines", "--epochs", 1]
    found = []
    for name, more in (("own", []), ("twice", ["--evaluation_size", 16])):
        done = run_here("simCLR.py", *flags, *more, "--output_dir", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((tmp_path / name / "results.json").read_text()))
    own, twice = (results["baselines"] for results in found)
    assert own["raw_pixels"] == twice["raw_pixels"]
    assert own["untrained_encoder"] != twice["untrained_encoder"]
    assert found[0]["pretrain"]["final_loss"] == found[1]["pretrain"]["final_loss"]
    rows = [
        (tmp_path / name / "metrics.csv").read_text().splitlines()[-1] for name in ("own", "twice")
    ]
    columns = (tmp_path / "own/metrics.csv").read_text().splitlines()[0].split(",")
    place = columns.index("rank_h")
    assert rows[0].split(",")[place] != rows[1].split(",")[place]


# ------------------------------------------------------------------------------------------------
# --whiten
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_whitened_filters_answer_alike_to_nothing(stem):
    """On the images' patches: variance 1, no correlation, and each with both signs."""
    smooth = F.interpolate(randn(50, 3, 6, 6, dtype=torch.float32), (16, 16), mode="bilinear")
    noise = randn(50, 3, 16, 16, seed=1, dtype=torch.float32)
    images = (128 + 40 * smooth + 15 * noise).clamp(0, 255).to(torch.uint8)
    normalize = fn.Normalize(images)
    encoder, _ = simCLR.build_encoder("resnet18", stem)
    conv, before = encoder.conv1, encoder.conv1.weight.clone()
    whiten(conv, normalize, images)

    n = 27 if stem == "cifar" else 32
    patches = F.unfold(normalize(images), conv.kernel_size).transpose(1, 2).flatten(0, 1)
    answers = patches.double() @ conv.weight.detach()[:n].flatten(1).double().T
    largest = torch.linalg.eigvalsh(patches.double().T.cov()).flip(0)
    kept = largest[:n] / (largest[:n] + 1e-3 * largest.mean())
    torch.testing.assert_close(answers.T.cov(), kept.diag(), atol=1e-4, rtol=1e-4)
    assert torch.equal(conv.weight[n : 2 * n], -conv.weight[:n])
    assert torch.equal(conv.weight[2 * n :], before[2 * n :])
    assert conv.weight.requires_grad


def test_whitening_is_the_same_every_time():
    images = fn.load_dataset("digits").train_images
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 64, 3, bias=False)
        torch.rand(len(weights))  # whatever was drawn since
        whiten(conv, fn.Normalize(images), images)
        weights.append(conv.weight.detach().clone())
    assert torch.equal(*weights)
    assert weights[0].isfinite().all()  # grey images have no colours to tell apart


# ------------------------------------------------------------------------------------------------
# --image_size of a named set
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 20])
def test_a_named_set_at_another_size_is_as_a_folder_of_it(size, tmp_path, capsys):
    own = fn.load_dataset("digits")
    folder = tmp_path / "digits"
    for split, images, labels in (
        ("train", own.train_images, own.train_labels),
        ("test", own.test_images, own.test_labels),
    ):
        for c in range(10):
            place = folder / split / str(c)
            place.mkdir(parents=True)
            for i in (labels == c).nonzero()[:3, 0].tolist():
                pixels = images[i].permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(place / f"{i:04}.png")
    theirs = fn.load_dataset(str(folder), tmp_path / "data", size)
    ours = fn.load_dataset("digits", tmp_path / "data", size)
    for part in ("train", "test"):
        images, labels = getattr(ours, f"{part}_images"), getattr(ours, f"{part}_labels")
        first = torch.cat([(labels == c).nonzero()[:3, 0] for c in range(10)])
        assert torch.equal(images[first], getattr(theirs, f"{part}_images"))
    assert ours.train_images.shape == (1438, 3, size, size)
    assert torch.equal(ours.train_labels, own.train_labels)
    assert ours.fingerprint != own.fingerprint

    assert "resizing 1,438 images of digits (once; kept in" in capsys.readouterr().out
    again = fn.load_dataset("digits", tmp_path / "data", size)
    assert capsys.readouterr().out == ""
    assert torch.equal(again.train_images, ours.train_images)
    assert again.fingerprint == ours.fingerprint


def test_a_sets_own_size_changes_nothing(tmp_path):
    own, same_size = fn.load_dataset("digits"), fn.load_dataset("digits", tmp_path, 8)
    assert own.fingerprint == same_size.fingerprint
    assert not list(tmp_path.iterdir())


def test_unlabelled_images_are_resized_too(tmp_path, monkeypatch):
    from images import sets

    images = randint(256, 4, 3, 8, 8, dtype=torch.uint8)
    data = sets.ImageDataset(
        "stl10",
        images[:1],
        torch.zeros(1).long(),
        images[1:2],
        torch.zeros(1).long(),
        ("a", "b"),
        images,
    )
    monkeypatch.setattr(sets, "download", lambda *_: data)
    found = sets.load_dataset("stl10", tmp_path, 16)
    assert found.pretraining_images.shape == (4, 3, 16, 16)
    assert torch.equal(found.pretraining_images[:1], found.train_images)
    assert found.test_images.shape == (1, 3, 16, 16)


def test_a_named_set_at_another_size_trains(run_here, tmp_path):
    flags = ["--dataset", "digits", "--image_size", 12, *NARROW, "--epochs", 1]
    flags += ["--stages", "pretrain", "--output_dir", "out"]
    done = run_here("simCLR.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1,438 images of 12 pixels" in done.stdout


# ------------------------------------------------------------------------------------------------
# --validation_fraction
# ------------------------------------------------------------------------------------------------


def test_held_out_images_take_the_place_of_the_test_images():
    """Stratified, none in both parts, and the same whatever else is drawn."""
    data = fn.load_dataset("digits")
    torch.manual_seed(5)
    part = fn.hold_out(data, 0.2)
    assert len(part.train_images) + len(part.test_images) == len(data.train_images)
    for c in range(10):
        expected = round(0.2 * int((data.train_labels == c).sum()))
        assert int((part.test_labels == c).sum()) == expected
    both = torch.cat([part.train_images[:], part.test_images[:]]).flatten(1)
    assert torch.equal(both.sort(0).values, data.train_images.flatten(1).sort(0).values)
    chosen = fn.stratified_subset(data.train_labels, 0.2, seed=0)
    assert torch.equal(part.test_images[:], data.train_images[chosen])
    assert torch.equal(part.test_labels, data.train_labels[chosen])


def test_a_class_is_not_held_out_whole():
    images = randint(256, 5, 3, 8, 8, dtype=torch.uint8)
    labels = torch.tensor([0, 0, 0, 0, 1])
    data = fn.ImageDataset("x", images, labels, None, None, ("cat", "dog"))
    assert "no training image of dog left" in user_error(fn.hold_out, data, 0.2)
    data.train_labels = None
    assert "no classes" in user_error(fn.hold_out, data, 0.2)


@pytest.mark.parametrize("probe", ["sgd", "lbfgs"])
def test_settings_are_chosen_without_the_test_images(probe, run_here, tmp_path, monkeypatch):
    """They are not looked at, and what is printed says so."""
    data = fn.load_dataset("digits")
    data.test_images.zero_()
    monkeypatch.setattr(fn, "load_dataset", lambda *_: data)
    flags = [*SHORT[:-3], "--stages", "pretrain,knn,probe", "--probe", probe, "--probe_epochs", 5]
    flags += ["--baselines", "true", "--validation_fraction", 0.25, "--output_dir", "out"]
    done = run_here("simCLR.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1,079 images of 8 pixels" in done.stdout
    assert "1,079 labelled and 359 validation images" in done.stdout
    assert "validation accuracy" in done.stdout
    assert "test accuracy" not in done.stdout
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["pretrain"]["images_seen"] == 3 * 900
    assert results["baselines"]["raw_pixels"]["knn"]["accuracy"] > 0.9


# ------------------------------------------------------------------------------------------------
# --probe_layer
# ------------------------------------------------------------------------------------------------


def test_a_layer_of_the_head_is_what_its_formula_says(encoder):
    """h, then relu(BatchNorm(W h)) of each hidden layer, and z = W h + b."""
    model = simCLR.SimCLRModel(encoder, 8, 16, 5, layers=3).double().eval()
    first, norm, _, second, norm2, _, last = head = model.projection_head
    for each in (norm, norm2):
        nn.init.uniform_(each.running_mean)
        nn.init.uniform_(each.running_var, 1, 2)
    x = randn(4, 3, 8, 8, dtype=torch.float64)
    expected = [encoder(x)]
    for linear, batch_norm in ((first, norm), (second, norm2)):
        y = expected[-1] @ linear.weight.T
        y = (y - batch_norm.running_mean) / (batch_norm.running_var + batch_norm.eps).sqrt()
        expected.append(F.relu(y))
    expected.append(expected[-1] @ last.weight.T + last.bias)
    for layer, value in enumerate(expected):
        found = up_to_layer(encoder, head, layer)(x)
        torch.testing.assert_close(found, value)
    assert torch.equal(found, model(x))
    with pytest.raises(fn.UserError, match="--probe_layer 4: the head has 3 layers"):
        up_to_layer(encoder, head, 4)


@pytest.mark.parametrize(
    ("name", "feature_dim"), [("resnet18", None), ("compact", None), ("compact", 700)]
)
def test_cells_are_the_means_of_the_parts_of_the_last_map(name, feature_dim):
    """Of a 4 x 4 map: each quarter's mean, channel by channel; and their mean is h."""
    encoder, width = simCLR.build_encoder(name, feature_dim=feature_dim)
    encoder.eval()
    maps = []
    average = encoder.avgpool if feature_dim is None else encoder.avgpool[-1]
    average.register_forward_pre_hook(lambda _, given: maps.append(given[0]))
    x = randn(2, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        h, cells = encoder(x), in_cells(encoder, 2)(x)
        (last,) = maps  # (2, D, 4, 4)
        for channel in range(0, width, 100):
            for i in range(2):
                for j in range(2):
                    quarter = last[:, channel, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                    found = cells[:, 4 * channel + 2 * i + j]
                    torch.testing.assert_close(found, quarter.mean((1, 2)))
        torch.testing.assert_close(cells.view(2, width, 4).mean(2), h)
        assert in_cells(encoder, 1) is encoder
        encoder.conv1.weight.zero_()  # its weights are the encoder's own
        assert not torch.equal(in_cells(encoder, 2)(x), cells)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (20, 13)])
def test_ten_crops_are_torchvisions_but_the_centre_which_is_the_whole_image(height, width):
    encoder = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    x = randn(4, 3, height, width, dtype=torch.float32)
    crops = list(ten_crop(x, [height - height // 8, width - width // 8]))
    crops[4], crops[9] = x, x.flip(-1)
    with torch.no_grad():
        expected = torch.stack([encoder(crop) for crop in crops]).mean(0)
        torch.testing.assert_close(on_crops(encoder, ten=True)(x), expected)
        torch.testing.assert_close(on_crops(encoder, ten=True)(x.flip(-1)), expected)
    assert on_crops(encoder, ten=False) is encoder


@pytest.mark.slow
def test_ten_crops_are_measured_but_not_of_raw_pixels(run_here, tmp_path):
    """h of every stage is their mean, and of the untrained encoder, too."""
    whole, crops = ["--output_dir", "whole"], ["--ten_crops", "--output_dir", "crops"]
    flags = ["--dataset", "digits", "--checkpoint", "pretrained", "--precision", "fp32"]
    flags += ["--stages", "knn,probe,features", "--knn_k", 5, "--probe_epochs", 2]
    first = [*SHORT, "--epochs", 1, "--stages", "pretrain", "--output_dir", "pretrained"]
    for more in (first, [*flags, *whole], [*flags, *crops]):
        done = run_here("simCLR.py", *more, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
    results = {
        name: json.loads((tmp_path / name / "results.json").read_text())
        for name in ("whole", "crops")
    }
    raw, untrained = (
        {name: results[name]["baselines"][of] for name in results}
        for of in ("raw_pixels", "untrained_encoder")
    )
    assert raw["crops"] == raw["whole"]
    assert untrained["crops"] != untrained["whole"]
    assert results["crops"]["shown"] == {**results["whole"]["shown"], "ten_crops": True}

    taken = np.load(tmp_path / "crops/features.npz")
    test = taken["splits"] == "test"
    h, labels = torch.from_numpy(taken["h"]), torch.from_numpy(taken["labels"])
    encoder, _ = simCLR.build_encoder("resnet18", "imagenet", width=0.25)
    encoder.load_state_dict(encoder_of(tmp_path / "pretrained"))
    shown = results["crops"]["shown"]["normalize"]
    mean, std = (torch.tensor(shown[name]).view(3, 1, 1) for name in ("mean", "std"))
    images = (fn.load_dataset("digits").test_images / 255 - mean) / std
    network = on_crops(encoder, ten=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(h[test], network(images), rtol=1e-4, atol=1e-5)

    # What is kept is the classifier that was measured, crops and all.
    classifier = evaluation.LinearClassifier(network, h.shape[1], 10)
    classifier.load_state_dict(torch.load(tmp_path / "crops/classifier.pt", weights_only=True))
    with torch.no_grad():
        right = classifier(images).argmax(1) == labels[test]
    assert right.double().mean().item() == results["crops"]["probe"]["test_accuracy"]


def test_mirror_images_are_for_the_probe_alone(image_folder, tmp_path):
    """They are those of the images, and what k-NN and the tests see is as without them."""
    data = fn.load_dataset(str(image_folder), tmp_path, image_size=8)
    found = []
    for mirror in (False, True):
        config = make_config(
            dataset=str(image_folder), probe_mirror=mirror, probe="lbfgs", stages="knn,probe",
            checkpoint="x", knn_k=5,
        )  # fmt: skip
        images = evaluation.labelled_images(data, config)
        pixels = nn.Sequential(fn.Normalize(data.train_images), nn.Flatten())
        found.append(evaluation.features_of(pixels, images, config))
    without, both = found
    assert without.mirrored is None
    flipped = both.train.view(-1, 3, 8, 8).flip(3).flatten(1)
    assert torch.equal(both.mirrored, flipped)
    assert not torch.equal(both.mirrored, both.train)
    assert torch.equal(both.train, without.train)
    assert torch.equal(both.test, without.test)


@pytest.mark.slow
def test_every_probe_learns_from_mirror_images(image_folder, run_here, tmp_path, monkeypatch):
    """Of raw pixels and of both encoders, with few labels, and what fine-tuning begins with."""
    seen = []

    def note(features, *rest):
        seen.append(features)
        return original(features, *rest)

    original = probing.logistic_regression
    monkeypatch.setattr(probing, "logistic_regression", note)
    flags = ["--dataset", image_folder, *NARROW, "--image_size", 8, "--knn_k", 5, "--probe"]
    flags += ["lbfgs", "--probe_mirror", "--finetune_epochs", 2, "--finetune_steps", 2]
    few = ["--stages", "pretrain,knn,tsne", "--epochs", 1, "--batch_size", 32]
    few += ["--labels_per_class", 2, "--label_seeds", 1, "--output_dir", "few"]
    every = ["--stages", "finetune", "--checkpoint", "few", "--output_dir", "every"]
    for more, counts in ((few, [6, 6, 6]), (every, [300, 300, 300, 270])):
        seen.clear()
        done = run_here("simCLR.py", *flags, *more, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert [len(features.train) for features in seen] == counts
        for features in seen:
            assert features.mirrored.shape == features.train.shape
            assert not torch.equal(features.mirrored, features.train)


@pytest.mark.slow
def test_cells_are_measured_and_belong_to_the_untrained_encoder_too(run_here, tmp_path):
    flags = [*SHORT, "--epochs", 1, "--stages", "pretrain,knn,probe,features", "--probe_cells", 2]
    flags += ["--image_size", 16, "--encoder", "compact", "--stem", "cifar", "--width", 0.5]
    flags += ["--baselines", "true", "--probe_epochs", 10]
    done = run_here("simCLR.py", *flags, "--output_dir", "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert np.load(tmp_path / "out/features.npz")["h"].shape == (1797, 1024)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["baselines"]["untrained_encoder"]["probe"]["test_accuracy"] > 0.5
    weights = torch.load(tmp_path / "out/classifier.pt", weights_only=True)
    assert weights["classifier.weight"].shape == (10, 1024)


def test_z_is_measured_again_from_the_checkpoint(run_here, tmp_path):
    """encoder.pt has no head, the checkpoint beside it has; and the head's own width is known."""
    flags = [*SHORT, "--epochs", 1, "--hidden_dim", 64, "--embedding_dim", 32]
    whole = [*flags, "--probe_layer", 2, "--output_dir", "whole"]
    assert run_here("simCLR.py", *whole, cwd=tmp_path).returncode == 0
    flags = ["--dataset", "digits", "--stages", "knn", "--checkpoint", "whole", "--knn_k", 5]
    flags += ["--no-baselines", "--accelerator", "cpu", "--precision", "fp32", "--output_dir"]
    for layer in (0, 2):
        again = [*flags, f"layer{layer}", "--probe_layer", layer]
        done = run_here("simCLR.py", *again, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
    of_z, of_h, of_z_again = (
        json.loads((tmp_path / name / "results.json").read_text())["knn"]
        for name in ("whole", "layer0", "layer2")
    )
    assert of_z == of_z_again != of_h

    # The untrained encoder is measured at the same layer.
    flags.remove("--no-baselines")
    of_untrained = []
    for layer in (0, 2):
        again = [*flags, f"beside{layer}", "--probe_layer", layer]
        assert run_here("simCLR.py", *again, cwd=tmp_path).returncode == 0
        results = json.loads((tmp_path / f"beside{layer}/results.json").read_text())
        of_untrained.append(results["baselines"]["untrained_encoder"]["knn"])
    assert of_untrained[0] != of_untrained[1]
