"""Fine-tuning: where it begins, what it changes, what chooses the epoch, and how it goes on."""

import json

import pytest
import torch
import torchvision
from helpers import NARROW, assert_same_bits, cloned_state, code_on_page, make_config
from torch import nn

import functions as fn
import simCLR
from contrastive import evaluation, finetuning
from contrastive.evaluation import Tuning
from contrastive.few_labels import Draw
from contrastive.finetuning import FineTuning, Labelled, Start, batches, finetune, split
from contrastive.probe import Features, probe
from contrastive.sets import as_shown

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


def colours(per_class: int = 20, test: int = 10) -> Labelled:
    """Noisy 8 x 8 images of three colours, which one has to look at to tell apart."""

    def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(3).repeat(count)
        pixels = torch.randint(0, 150, (len(labels), 3, 8, 8))
        pixels[torch.arange(len(labels)), labels] += 60
        return pixels.to(torch.uint8), labels

    return Labelled(*images(per_class), *images(test), ("red", "green", "blue"))


def settings(**values):
    quick = {"finetune_epochs": 3, "finetune_steps": 1, "finetune_batch_size": 16}
    return make_config(**{**quick, **values})


class See(nn.Module):
    """uint8 (B, 3, H, W) -> float32 in [0, 1]."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images / 255


def new(chosen: torch.Tensor) -> Start:
    """A classifier that has learned nothing."""
    torch.manual_seed(0)
    return Start(torch.randn(len(chosen), 8), nn.Linear(8, 3))


def tuned(encoder, images, folder, **values):
    keep = folder / "finetuned.pt"
    folder.mkdir(exist_ok=True)
    found = finetune(encoder, See(), images, new, settings(**values), folder / "x", keep=keep)
    return found, torch.load(keep, weights_only=True)


def test_features_that_are_all_alike_become_0():
    """Those of a collapsed encoder: fine-tuning then begins with a classifier of its bias alone."""
    h = torch.full((5, 3), 0.7)
    assert finetuning.Standardize(h)(h).tolist() == torch.zeros(5, 3).tolist()


def test_it_learns_and_leaves_the_pretrained_encoder_alone(encoder, tmp_path):
    before = cloned_state(encoder)
    images = colours(test=50)
    fast = {"finetune_learning_rate": 1.0, "finetune_encoder_rate": 1.0}
    found, weights = tuned(encoder, images, tmp_path, finetune_steps=60, **fast)
    assert_same_bits(encoder, before)
    assert found.test_accuracy > 0.9
    assert found.labels == 60
    assert (found.epochs, found.steps) == (15, 60)
    assert not torch.equal(weights["encoder.0.weight"], before["0.weight"])
    assert found.test_accuracy == fn.accuracy(torch.tensor(found.predicted), images.test_labels)


def test_the_weights_that_are_kept_give_the_accuracy_that_is_reported(encoder, tmp_path):
    images = colours(per_class=100)  # enough for a tenth to choose the epoch
    found, weights = tuned(encoder, images, tmp_path, finetune_epochs=5)
    assert found.best_epoch is not None
    names = ("encoder.", "classifier.")
    parts = [
        {key.removeprefix(name): value for key, value in weights.items() if key.startswith(name)}
        for name in names
    ]
    classifier = nn.Linear(8, 3)
    encoder.load_state_dict(parts[0])
    classifier.load_state_dict(parts[1])
    with torch.no_grad():
        predicted = classifier(encoder.eval()(images.test / 255)).argmax(1)
    assert predicted.tolist() == found.predicted


def test_it_begins_as_the_linear_probe(tmp_path):
    """With a rate of next to nothing it predicts what the probe predicts.

    BatchNorm's statistics are pretraining's: those of a few labelled images are others.
    """
    encoder = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    encoder[1].running_mean.normal_()
    images = colours(test=50)
    with torch.no_grad():
        h = encoder.eval()(images.train / 255)

    def start(chosen):
        features = Features(h, images.train_labels, h, images.train_labels, images.classes)
        probe(features, settings(probe="lbfgs"), fitted := nn.Linear(8, 3))
        return Start(h, fitted)

    still = settings(finetune_learning_rate=1e-12)
    found = finetune(encoder, See(), images, start, still, tmp_path / "x")
    with torch.no_grad():
        logits = start(torch.arange(60)).classifier(encoder.eval()(images.test / 255))
    assert found.predicted == logits.argmax(1).tolist()
    assert len(set(found.predicted)) == 3


def test_from_scratch_batchnorm_learns_its_statistics(encoder, tmp_path, monkeypatch):
    """Pretrained, it keeps them, in the steps after a validation as well."""
    seen: dict[bool, set[bool]] = {}
    steps = FineTuning.training_step

    def note(module, batch, batch_idx):
        norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
        seen.setdefault(module.pretrained, set()).update(part.training for part in norms)
        assert module.training
        return steps(module, batch, batch_idx)

    monkeypatch.setattr(FineTuning, "training_step", note)
    for scratch in (False, True):
        what = encoder, See(), colours(per_class=100), new, settings(), tmp_path / str(scratch)
        finetune(*what, scratch=scratch)
    assert seen == {True: {False}, False: {True}}


@pytest.mark.parametrize(("per_class", "known"), [(99, 99), (100, 90)])
def test_the_probe_it_begins_as_does_not_know_the_images_that_choose_the_epoch(
    per_class, known, encoder, tmp_path, monkeypatch
):
    images = colours(per_class=per_class)
    h = Features(
        torch.randn(3 * per_class, 8), images.train_labels, torch.randn(30, 8), images.test_labels,
        images.classes,
    )  # fmt: skip
    begun: list[torch.Tensor] = []

    def note(encoder, see, images, start, *_, **__):
        chosen, held_out = split(images, seed=0)
        assert not set(chosen.tolist()) & set(held_out.tolist())
        begin = start(chosen)
        begun[:] = [begin.classifier.weight, chosen]
        assert torch.equal(begin.h, h.train[chosen])
        return begin.classifier

    monkeypatch.setattr("contrastive.evaluation.finetune", note)
    whole = new(torch.arange(0)).classifier
    tuning = Tuning(encoder, See(), images, h, settings(probe="lbfgs"), tmp_path)
    probed = tuning.run(whole, "x")
    assert len(begun[1]) == 3 * known
    if known == per_class:
        assert probed is whole
        return

    # Of other images it is the same probe if those are the ones held out.
    held_out = torch.ones(len(h.train), dtype=torch.bool)
    held_out[begun[1]] = False
    before = begun[0].clone()
    h.train[held_out] += 100
    tuning.run(whole, "x")
    assert torch.equal(begun[0], before)
    h.train[begun[1][0]] += 100
    tuning.run(whole, "x")
    assert not torch.equal(begun[0], before)


def test_many_of_few_labels_begin_with_the_optimum_as_few_do(encoder, tmp_path, monkeypatch):
    """Where some of a draw are held out the probe is fitted anew: not by --probe."""
    images, h = colours(per_class=100), torch.randn(300, 8)
    features = Features(h, images.train_labels, h[:30], images.test_labels, images.classes)
    asked = []
    monkeypatch.setattr("contrastive.evaluation.probe", lambda _, how, __: asked.append(how.probe))
    tuning = Tuning(encoder, See(), images, features, settings(probe="sgd"), tmp_path)
    everything = torch.arange(300)
    tuning.on(Draw(everything[:297], 0, "few"), new(everything).classifier)
    assert asked == []  # 99 of a class: all are trained on
    accuracy, steps = tuning.on(Draw(everything, 0, "more"), new(everything).classifier)
    assert asked == ["lbfgs"]
    assert 0 <= accuracy <= 1
    assert steps == json.loads((tmp_path / "more/outcome.json").read_text())["steps"]


def test_each_draw_is_a_training_of_its_own(encoder, tmp_path):
    """With all labels too, where the draws are of the same images."""
    images, h = colours(), torch.randn(60, 8)
    features = Features(h, images.train_labels, h[:30], images.test_labels, images.classes)
    tuning = Tuning(encoder, See(), images, features, settings(), tmp_path)
    everything = torch.arange(60)
    for seed in (0, 1):
        tuning.on(Draw(everything, seed, f"all-{seed}"), new(everything).classifier)
    rows = [
        json.loads((tmp_path / name / "outcome.json").read_text())["rows"]
        for name in ("all-0", "all-1")
    ]
    assert rows[0][0]["train_loss"] != rows[1][0]["train_loss"]


def test_from_scratch_the_seed_alone_decides(encoder, tmp_path):
    """Whatever was drawn before, and whatever the probe was: a resumed run repeats it."""
    outcomes = []
    for i in range(2):
        images, where = colours(), tmp_path / str(i)
        images.train[:], images.test[:] = torch.arange(8).to(torch.uint8), 7

        def start(chosen, seed=i):
            torch.manual_seed(seed)
            return Start(torch.randn(len(chosen), 8), nn.Linear(8, 3))

        outcomes.append(finetune(encoder, See(), images, start, settings(), where, scratch=True))
    losses = [[row["train_loss"] for row in outcome.rows] for outcome in outcomes]
    assert losses[0] == losses[1]


def test_no_step_is_longer_than_its_rate(encoder, tmp_path, monkeypatch):
    """A long gradient, of a classifier that is sure and wrong, is cut to a length of 1; but not
    that of a network from scratch, which learns less with such steps."""
    lengths, steps = [], torch.optim.SGD.step

    def note(optimizer, closure=None):
        def noted():
            loss = closure()
            parts = [p.grad for group in optimizer.param_groups for p in group["params"]]
            lengths.append(torch.cat([part.flatten() for part in parts]).norm().item())
            return loss

        return steps(optimizer, noted)

    monkeypatch.setattr(torch.optim.SGD, "step", note)

    def wrong(chosen):
        classifier = nn.Linear(8, 3)
        with torch.no_grad():
            classifier.weight.mul_(1000)
        return Start(torch.randn(len(chosen), 8), classifier)

    finetune(encoder, See(), colours(), wrong, settings(), tmp_path / "x")
    assert 0.99 < max(lengths) <= 1.001

    lengths.clear()
    loud = nn.Sequential(encoder, nn.Linear(8, 8))
    nn.init.constant_(loud[1].weight, 10)
    finetune(loud, See(), colours(), new, settings(), tmp_path / "y", scratch=True)
    assert max(lengths) > 2


def test_a_head_with_a_hidden_layer(encoder, tmp_path):
    _, weights = tuned(encoder, colours(), tmp_path, finetune_head="mlp")
    shapes = [tuple(weights[f"classifier.{name}.weight"].shape) for name in (0, 2)]
    assert shapes == [(8, 8), (3, 8)]


def test_the_encoder_learns_with_a_share_of_the_rate_and_from_scratch_with_all_of_it(
    encoder, tmp_path, monkeypatch
):
    """0.05 for 256 images: 0.05 * 16 / 256 for 16, along a cosine to 0, Nesterov, no decay."""
    seen = []
    optimizers = FineTuning.configure_optimizers

    def note(module):
        made = optimizers(module)
        groups = made["optimizer"].param_groups
        seen.append(([group["lr"] for group in groups], groups))
        return made

    monkeypatch.setattr(FineTuning, "configure_optimizers", note)
    for scratch in (False, True):
        where = tmp_path / str(scratch)
        finetune(encoder, See(), colours(), new, settings(), where, scratch=scratch)
    rate = 0.05 * 16 / 256
    assert seen[0][0] == pytest.approx([rate, rate / 10])
    assert seen[1][0] == pytest.approx([rate, rate])
    for _, groups in seen:
        for group in groups:
            assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 0)
            assert group["lr"] == pytest.approx(0, abs=1e-9)


def test_an_eighth_of_the_side_and_mirror_images_are_all_of_the_augmentation(
    encoder, tmp_path, monkeypatch
):
    seen = []

    def note(images, padding, flip):
        seen.append((len(images), padding, flip))
        return images

    monkeypatch.setattr(fn, "random_crop_and_flip", note)
    tuned(encoder, colours(), tmp_path, finetune_flip=0.25)
    assert set(seen) == {(16, 1, 0.25), (12, 1, 0.25)}  # 60 images: the last batch is of 12


def test_a_tenth_of_the_labelled_images_chooses_where_they_suffice():
    """It is no part of what is trained on; below 100 labels per class all are."""
    images = colours(per_class=100)
    images.train[:, 0, 0, 0] = torch.arange(300) % 251  # to tell them apart by their first pixel
    images.train[:, 0, 0, 1] = torch.arange(300) // 251
    parts = split(images, seed=0)
    train, validation = batches(images, *parts, settings())

    def which(batches):
        pixels = torch.cat([batch[:, 0, 0, :2].int() for batch, _ in batches])
        return set((pixels[:, 0] + 251 * pixels[:, 1]).tolist())

    assert len(which(train)) == 270
    assert len(which(validation)) == 30
    assert not which(train) & which(validation)
    labels = torch.cat([labels for _, labels in validation])
    assert labels.bincount().tolist() == [10, 10, 10]

    few = images.labelled(torch.arange(3, 300))  # 99 of each class
    train, nothing = batches(few, *split(few, seed=0), settings())
    assert nothing is None
    assert len(which(train)) == 297


def test_a_last_batch_of_one_image_is_left_out():
    """BatchNorm cannot normalise it."""
    images = colours(per_class=11)  # 33 images: 16 + 16 + 1
    train, _ = batches(images, *split(images, seed=0), settings())
    assert [len(labels) for _, labels in train] == [16, 16]


@pytest.mark.parametrize("per_class", [1, 100])
def test_interrupted_in_the_middle_it_ends_with_the_same_bits(
    per_class, encoder, tmp_path, monkeypatch
):
    images = colours(per_class=per_class)
    values = {"finetune_epochs": 4, "checkpoint_every": 0.0}
    whole, weights = tuned(encoder, images, tmp_path / "whole", **values)

    steps = FineTuning.training_step

    def interrupted(module, batch, batch_idx):
        if module.current_epoch == 2:
            raise KeyboardInterrupt
        return steps(module, batch, batch_idx)

    monkeypatch.setattr(FineTuning, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned(encoder, images, tmp_path / "parts", **values)
    monkeypatch.undo()
    assert (tmp_path / "parts/x/checkpoints/last.ckpt").is_file()
    again, resumed = tuned(encoder, images, tmp_path / "parts", **values)

    assert again.predicted == whole.predicted
    assert again.best_epoch == whole.best_epoch
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())


def test_a_finished_one_is_read_and_not_repeated(encoder, tmp_path, monkeypatch):
    first, _ = tuned(encoder, colours(), tmp_path)
    assert not (tmp_path / "x/checkpoints").exists()
    monkeypatch.setattr(finetuning, "split", None)  # there is no training without
    again, _ = tuned(encoder, colours(), tmp_path)
    assert vars(again) == vars(first)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("finetune_epochs", 0),
        ("finetune_steps", 0),
        ("finetune_batch_size", 1),
        ("finetune_learning_rate", 0.0),
        ("finetune_encoder_rate", 0.0),
        ("finetune_encoder_rate", 1.5),
        ("finetune_flip", 1.1),
    ],
)
def test_a_wrong_setting_is_named(flag, value):
    with pytest.raises(fn.UserError, match=f"--{flag}"):
        make_config(**{flag: value}).validate()


def test_finetuned_weights_load_in_torchvision_as_the_page_says(tmp_path, monkeypatch):
    """And the network there says what ours says."""
    encoder, width = simCLR.build_encoder("resnet18", "cifar")
    start = lambda _: Start(torch.randn(40, width), nn.Linear(width, 10))  # noqa: E731
    images = fn.load_dataset("digits")
    part = Labelled(
        fn.Subset(images.train_images, torch.arange(40)),
        images.train_labels[:40],
        images.test_images[:20],
        images.test_labels[:20],
        images.classes,
    )
    quick = settings(finetune_epochs=1, finetune_batch_size=20)
    normalize = fn.Normalize(images.train_images)
    keep = tmp_path / "finetuned.pt"
    found = finetune(encoder, normalize, part, start, quick, tmp_path / "x", keep=keep)
    monkeypatch.chdir(tmp_path)
    shown = as_shown(make_config(dataset="digits"), normalize, images)
    (tmp_path / "results.json").write_text(json.dumps(shown))
    names = {"torch": torch, "torchvision": torchvision, "json": json, "images": part.test / 255}
    exec(code_on_page("docs/evaluation.md", "finetuned.pt"), names)
    assert names["logits"].argmax(1).tolist() == found.predicted


def test_images_are_flipped_as_in_pretraining(image_folder, run_here, tmp_path, monkeypatch):
    """Unless a flag says otherwise: digits are no digits in a mirror."""
    flips = set()

    def note(images, padding, flip):
        flips.add(flip)
        return images

    monkeypatch.setattr(fn, "random_crop_and_flip", note)
    flags = ["--dataset", image_folder, "--image_size", 8, *NARROW, "--epochs", 1]
    flags += ["--batch_size", 32, "--flip", 0.125, "--stages", "pretrain", "--output_dir", "out"]
    assert run_here("simCLR.py", *flags, cwd=tmp_path).returncode == 0
    flags = ["--dataset", image_folder, "--image_size", 8, "--stages", "finetune", "--probe"]
    flags += ["lbfgs", "--labels_per_class", 1, "--label_seeds", 1, "--finetune_steps", 1]
    flags += ["--finetune_epochs", 1, "--checkpoint", "out", "--no-baselines", "--output_dir"]
    for folder, more, expected in (("a", [], 0.125), ("b", ["--finetune_flip", 0.25], 0.25)):
        flips.clear()
        assert run_here("simCLR.py", *flags, folder, *more, cwd=tmp_path).returncode == 0
        assert flips == {expected}


@pytest.mark.slow
def test_both_arms_end_to_end_have_the_same_steps_and_labels(
    image_folder, run_here, tmp_path, monkeypatch
):
    """Pretrained and from scratch, with few labels, and with all; what is left on disk."""
    learned_from = {}
    train = evaluation.finetune

    def noted(encoder, see, images, start, settings, folder, **more):
        if folder.parent.name in ("finetuning", "from-scratch"):
            drawn = learned_from.setdefault(folder.name, [])
            drawn.append((images.train.chosen.tolist(), images.train_labels.tolist()))
        return train(encoder, see, images, start, settings, folder, **more)

    monkeypatch.setattr(evaluation, "finetune", noted)
    flags = ["--dataset", image_folder, "--image_size", 8, *NARROW, "--epochs", 1]
    flags += ["--batch_size", 32, "--knn_k", 5, "--output_dir", "out", "--probe", "lbfgs"]
    flags += ["--stages", "pretrain,knn,probe,finetune", "--finetune_epochs", 2]
    flags += ["--finetune_steps", 4, "--labels_per_class", 2, "--label_fractions", 0.1]
    done = run_here("simCLR.py", *flags, "--label_seeds", 2, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")

    results = json.loads((tmp_path / "out/results.json").read_text())
    scratch = results["baselines"]["untrained_encoder"]
    assert "finetune" not in results  # all labels were not asked for
    for ours, theirs in zip(results["few_labels"], scratch["few_labels"], strict=True):
        assert ours["images"] == theirs["images"]
        assert len(ours["finetuned_accuracies"]) == len(theirs["finetuned_accuracies"]) == 2
    two, tenth = results["few_labels"]
    assert (two["labels_per_class"], two["images"]) == (2, 6)
    assert (tenth["label_fraction"], tenth["images"]) == (0.1, 30)
    outcomes = [
        json.loads(file.read_text()) for file in (tmp_path / "out").rglob("2-per-class*/*.json")
    ]
    assert [each["steps"] for each in outcomes] == [4] * 4
    assert two["finetuned_steps"] == scratch["few_labels"][0]["finetuned_steps"] == [4, 4]
    assert tenth["finetuned_steps"] == scratch["few_labels"][1]["finetuned_steps"]
    assert len(learned_from) == 4  # two amounts, two draws of each, the same for both arms
    assert all(ours == theirs for ours, theirs in learned_from.values())
    assert learned_from["2-per-class-0"] != learned_from["2-per-class-1"]
    *_, table, first = done.stdout.rstrip().split("\n\n")[-2:]
    assert "fine-tuned, the untrained encoder is the same network trained from scratch" in table
    assert first.startswith("to open first: out/few_labels.png")
    assert [each["labels"] for each in outcomes] == [6] * 4

    assert not list((tmp_path / "out").glob("f*/**/*.ckpt"))

    # Interrupted in either arm, it goes on, and repeats no draw that it has finished.
    flags[flags.index("out")] = "parts"
    for place in ("from-scratch/2-per-class-1", "finetuning/0.1-of-all-0"):

        def interrupted(encoder, see, images, start, settings, folder, **more):
            if str(folder).endswith(place):  # noqa: B023
                raise KeyboardInterrupt
            return noted(encoder, see, images, start, settings, folder, **more)

        monkeypatch.setattr(evaluation, "finetune", interrupted)
        more = flags if place.startswith("from") else ["--resume", "parts"]
        assert run_here("simCLR.py", *more, "--label_seeds", 2, cwd=tmp_path).returncode == 130
    monkeypatch.setattr(evaluation, "finetune", noted)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "parts").rglob("outcome.json")}
    assert run_here("simCLR.py", "--resume", "parts", cwd=tmp_path).returncode == 0
    assert len(before) == 6  # four from scratch, and two per class of ours
    assert before == {file: file.stat().st_mtime_ns for file in before}
    again = json.loads((tmp_path / "parts/results.json").read_text())
    assert again["few_labels"] == results["few_labels"]
    assert again["baselines"] == results["baselines"]

    flags = ["--checkpoint", "out", "--stages", "finetune", "--dataset", image_folder]
    flags += ["--image_size", 8, "--finetune_epochs", 2, "--finetune_steps", 4, "--knn_k", 5]
    done = run_here("simCLR.py", *flags, "--probe", "lbfgs", "--output_dir", "all", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads((tmp_path / "all/results.json").read_text())
    scratch = results["baselines"]["untrained_encoder"]
    for key in ("labels", "epochs", "steps"):
        assert results["finetune"][key] == scratch["finetune"][key] > 0
    assert "finetune" not in results["baselines"]["raw_pixels"]
    for name in ("finetuned.pt", "finetuning.png", "finetuned_confusion_matrix.png"):
        assert (tmp_path / "all" / name).is_file()
    assert "from scratch" in done.stdout
