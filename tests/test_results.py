"""The scripts of results/: what they keep of a run, and the pages and figures that they make."""

import gzip
import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import NARROW

import functions as fn
import simCLR
from contrastive.losses import contrastive_loss
from results import measured

ROOT = Path(__file__).parent.parent


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_diary_is_what_was_measured():
    """Each of its lines is a run that the configuration it begins from and its flags make again."""
    diary = module_of(ROOT / "results/simclr/diary.py")
    kept = diary.kept()
    assert (ROOT / "results/simclr/diary.md").read_text() == diary.page(kept)
    for rung, (config, _, _) in diary.RUNGS.items():
        assert kept[rung]
        for entry in kept[rung]:
            fn.parse_config(
                simCLR.Config, ["--config", str(ROOT / config), *entry["flags"].split()]
            )
            assert 0.01 < entry["macs"] / diary.T < 1


def test_the_ablations_are_what_was_measured():
    """Every arm is a command that is accepted, with the base itself in each question."""
    ablations = module_of(ROOT / "results/ablations/ablations.py")
    entries = json.loads((ROOT / "results/ablations/ablations.json").read_text())
    assert (ROOT / "results/ablations/README.md").read_text() == ablations.page(entries)
    for question in ablations.QUESTIONS:
        assert "" in question.arms.values()
        asked = [ablations.wanted(flags) for flags in question.arms.values()]
        assert len(set(asked)) == len(asked)
        if ablations.measured_arms(question, entries):
            assert question.found, f"what was found on {question.name}?"
            for flags in question.arms.values():
                seeds = [one["seed"] for one in ablations.runs_of(flags, entries)]
                assert seeds == list(range(len(seeds)))


def measured_run(folder, linear=0.5, **settings):
    """A finished run, as the pages of results read it."""
    base = measured.baseline("configs/cifar10_search.yaml")
    folder.mkdir()
    fn.save_config(folder / "config.yaml", replace(base, **settings))
    results = {"script": "simCLR.py", "probe": {"test_accuracy": linear}, "knn": {"accuracy": 0.4}}
    results |= {"pretrain": {"macs": 1, "seconds": 60.2}, "processor": "x", "threads": 1}
    results |= {"precision": "fp32", "git_commit": "0123456789"}
    (folder / "results.json").write_text(json.dumps(results))
    return str(folder)


def entries_of(*runs, kept="none.json", held_out=True):
    base = measured.baseline("configs/cifar10_search.yaml")
    return measured.add(list(runs), base, Path(kept), held_out=held_out)


def test_an_entry_has_the_flags_in_which_its_run_differs(tmp_path):
    aside = {"checkpoint_every": 600.0, "accelerator": "cpu", "data_dir": "there", "seed": 3}
    run = measured_run(tmp_path / "run", views=4, dataset="digits", temperature=0.1, **aside)
    (entry,) = entries_of(run)
    assert entry["flags"] == "--dataset digits --views 4 --temperature 0.1"
    assert (entry["seed"], entry["linear"], entry["commit"]) == (3, 0.5, "0123456")


def test_an_encoder_measured_once_more_has_the_flags_it_learned_and_was_measured_with(tmp_path):
    first = measured_run(tmp_path / "a", views=4, probe="sgd", evaluation_size=40, knn_k=10)
    again = measured_run(tmp_path / "b", linear=0.6, checkpoint=first, views=2, evaluation_size=24)
    before, after = entries_of(first, again)
    assert before["flags"] == "--views 4 --knn_k 10 --probe sgd --evaluation_size 40"
    assert after["flags"] == "--views 4 --evaluation_size 24"
    assert after["linear"] == 0.6


def test_a_run_measured_anew_takes_its_old_place(tmp_path):
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps(entries_of(measured_run(tmp_path / "a", linear=0.5))))
    (entry,) = entries_of(measured_run(tmp_path / "b", linear=0.6), kept=kept)
    assert entry["linear"] == 0.6


def test_what_was_measured_on_test_images_has_no_line_among_held_out_ones(tmp_path):
    run = measured_run(tmp_path / "run", validation_fraction=0.0)
    with pytest.raises(SystemExit, match="with --validation_fraction"):
        entries_of(run)
    assert entries_of(run, held_out=False)


def certain_entry(loss, seed):
    """A run of results/certainty, as its page keeps it."""
    ways = ["norm of h", "norm of z", "tenth neighbour", "probe's softmax"]
    ways += [] if loss == "nt_xent" else [loss]
    measures = ("r_auroc", "aurc", "order", "crops", "blur", "noise", "people")
    worth = dict.fromkeys(measures, 0.5 + 0.1 * seed) | {"others": {"data/b": 0.75}}
    worth["quantiles"] = [0.0, 0.25, 0.5, 0.75, 1.0]
    worth["kept"] = [0.9 - 0.03 * tenth for tenth in range(10)]
    entry = {"flags": "" if loss == "nt_xent" else f"--loss {loss} --temperature 0.1"}
    entry["seed"] = seed
    entry |= {"linear": 0.6, "knn": 0.5, "macs": 2e14, "seconds": 60}
    entry |= {"processor": "x", "threads": 1, "commit": "abc"}
    calibration = {"expected_error": 0.03, "expected_error_at_temperature": 0.02}
    ways = {way: dict(worth) for way in ways}
    return entry | {"certainty": {"ways": ways, "calibration": calibration}}


def test_each_loss_stands_beside_what_it_has_to_beat(tmp_path):
    certainty = module_of(ROOT / "results/certainty/certainty.py")
    entries = [certain_entry(loss, seed) for loss in ("nt_xent", "tau") for seed in (1, 0)]
    entries[2]["certainty"]["ways"]["probe's softmax"]["r_auroc"] = 0.9
    entries[0]["certainty"]["ways"]["norm of h"]["people"] = None
    narrow = certain_entry("tau", 0)
    narrow["flags"] = f"--embedding_dim 32 {narrow['flags']}"
    unseen = [certain_entry("nt_xent", 0), certain_entry("tau", 0)]
    for way in unseen[1]["certainty"]["ways"].values():
        way["others"] = {"classes left out": 0.625}
    page = certainty.page(entries, [certain_entry("tau", 0), narrow], unseen)
    assert "| **tau** | 0.625 |" in page
    assert "| tau: norm of z | 0.625 |" in page
    found = "| 50.0 | 60.0 | 0.500 | 0.060 | abc |"
    assert f"| `--embedding_dim 32 --loss tau --temperature 0.1` {found}" in page
    assert "| `--loss tau --temperature 0.1` | 50.0 | 60.0 | 0.500 | 0.060 | abc |" in page
    accuracies = "| 50.0, 50.0: **50.0 ± 0.0 %** | 60.0, 60.0: **60.0 ± 0.0 %** |"
    others = "3.0 %, then 2.0 % | 0.5 (0.25 to 0.75) | 0, 1 |"
    assert f"| `tau` | `--loss tau --temperature 0.1` {accuracies} {others}" in page
    assert "| **tau** | 0.550 ± 0.071 |" in page
    assert "| probe's softmax | 0.550 ± 0.071 |" in page
    assert "| tau: probe's softmax | 0.700 ± 0.283 |" in page
    assert "| tau: norm of z | 0.550 ± 0.071 |" in page
    assert "| against b |" in page
    row = next(line for line in page.splitlines() if line.startswith("| norm of h"))
    assert row.endswith("| 0.500 | 0.750 ± 0.000 |")  # one seed was asked about people
    entries[1]["certainty"]["ways"]["norm of z"]["kept"] = None
    for name, draw in (("certainty", certainty.draw), ("kept", certainty.draw_kept)):
        draw(entries, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_plain_simclr_at_another_temperature_is_a_control_beside_itself():
    certainty = module_of(ROOT / "results/certainty/certainty.py")
    control = certain_entry("nt_xent", 0) | {"flags": "--temperature 0.05"}
    page = certainty.page([control, certain_entry("nt_xent", 0)], [], [])
    assert "| `nt_xent` |  | 50.0 | 60.0 |" in page
    assert "| `nt_xent at 0.05` | `--temperature 0.05` | 50.0 | 60.0 |" in page
    assert list(certainty.by_way([control])) == [
        f"nt_xent at 0.05: {bar}" for bar in certainty.BARS
    ]


def test_runs_that_differ_in_more_than_the_loss_are_not_compared():
    certainty = module_of(ROOT / "results/certainty/certainty.py")
    other = certain_entry("tau", 0) | {"flags": "--epochs 1 --loss tau"}
    with pytest.raises(SystemExit, match="--epochs 1"):
        certainty.page([certain_entry("nt_xent", 0), other], [], [])
    other["flags"] = "--loss tau --temperature 0.05"
    with pytest.raises(SystemExit, match="take one setting"):
        certainty.page([certain_entry("tau", 0), other], [], [])


def test_an_encoder_to_take_home_is_the_same_to_a_thousandth(run_here, tmp_path):
    """In half the bytes, and shown its images as before."""
    flags = ["--dataset", "digits", *NARROW, "--epochs", 1, "--batch_size", 400]
    done = run_here(
        "simCLR.py", *flags, "--stages", "pretrain", "--output_dir", "run", cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    earlier = [tmp_path / "home" / name for name in ("measured", "cells")]
    for folder in earlier:  # of another encoder
        folder.mkdir(parents=True)
    module_of(ROOT / "results/take_home.py").main(tmp_path / "run", tmp_path / "home")
    assert not any(folder.exists() for folder in earlier)
    whole, half = (tmp_path / name / "encoder.pt" for name in ("run", "home"))
    assert half.stat().st_size < 0.51 * whole.stat().st_size
    ours, theirs = (torch.load(file, weights_only=True) for file in (half, whole))
    for name, value in ours.items():
        assert torch.allclose(value.to(theirs[name].dtype), theirs[name], rtol=1e-3, atol=1e-6)

    measure = ["--dataset", "digits", "--stages", "knn", "--no-baselines", "--checkpoint"]
    done = run_here("simCLR.py", *measure, "home", "--output_dir", "out", cwd=tmp_path)
    few = "note: --knn_k 200: 8 has only 139 labelled images, so others outvote it"
    assert (done.returncode, done.stderr) == (0, f"{few}; try fewer neighbours, such as 5\n")
    assert "no record" not in done.stdout
    home = json.loads((tmp_path / "out/results.json").read_text())
    trained = json.loads((tmp_path / "run/results.json").read_text())["pretrain"]
    assert home["shown"]["normalize"] == trained["normalize"]


def test_an_unfinished_run_leaves_the_encoder_that_is_there(tmp_path):
    for name in ("run", "home"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "encoder.pt").write_text(name)
    with pytest.raises(SystemExit, match="finished"):
        module_of(ROOT / "results/take_home.py").main(tmp_path / "run", tmp_path / "home")
    assert (tmp_path / "home/encoder.pt").read_text() == "home"


def test_fashion_mnist_becomes_a_folder_of_images(tmp_path):
    """Files as Debian's package has them: a header, then bytes."""
    package = tmp_path / "package"
    package.mkdir()
    rng = np.random.default_rng(0)
    pixels = {name: rng.integers(0, 256, (4, 28, 28), dtype=np.uint8) for name in ("train", "t10k")}
    for name, images in pixels.items():
        images_file = package / f"{name}-images-idx3-ubyte.gz"
        images_file.write_bytes(gzip.compress(bytes(16) + images.tobytes()))
        labels_file = package / f"{name}-labels-idx1-ubyte.gz"
        labels_file.write_bytes(gzip.compress(bytes(8) + bytes([9, 0, 9, 3])))
    module_of(ROOT / "results/fashion_mnist.py").main(tmp_path / "there", package)
    data = fn.load_dataset(str(tmp_path / "there"), tmp_path, 28)
    assert data.classes == ("ankle-boot", "dress", "t-shirt")
    assert data.names("test") == [
        *("test/ankle-boot/00000.png", "test/ankle-boot/00002.png"),
        *("test/dress/00003.png", "test/t-shirt/00001.png"),
    ]
    assert np.array_equal(data.test_images[1, 2].numpy(), pixels["t10k"][2])


def test_a_copy_in_jpeg_has_the_same_images_in_their_order(image_folder, tmp_path):
    """Smooth images, of which JPEG keeps nearly everything; their order within a class stays."""
    data = fn.load_dataset(str(image_folder), tmp_path, 8)
    for images in (data.train_images, data.test_images):
        images[:] = torch.arange(len(images)).view(-1, 1, 1, 1) % 250  # each of a grey of its own
    module_of(ROOT / "results/cifar10_jpeg.py").save(data, tmp_path / "copy")
    copy = fn.load_dataset(str(tmp_path / "copy"), tmp_path, 8)
    assert copy.classes == data.classes
    assert copy.names("test")[:2] == ["test/blue/0000.jpg", "test/blue/0001.jpg"]
    for now, then in zip(copy.labelled(), data.labelled(), strict=True):
        assert torch.allclose(now.float(), then.float(), atol=1)


def test_answers_of_people_come_in_the_order_of_the_copy(image_folder, tmp_path):
    """The images of three classes mixed, as CIFAR-10's are: each finds its own row again."""
    data = fn.load_dataset(str(image_folder), tmp_path, 8)
    mixed = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    data.test_labels = data.test_labels[mixed]
    data.test_images = 10 * mixed.view(-1, 1, 1, 1).expand(24, 3, 8, 8).to(torch.uint8)
    module_of(ROOT / "results/cifar10_jpeg.py").save(data, tmp_path / "copy")
    copy = fn.load_dataset(str(tmp_path / "copy"), tmp_path, 8)
    order = module_of(ROOT / "results/cifar10h.py").in_order_of_files
    rows = order(mixed.numpy(), data.test_labels.numpy())
    assert copy.test_images[:, 0, 0, 0].tolist() == (10 * rows).tolist()


def test_the_positive_is_counted_twice():
    """-log( e^p / (2 e^p + sum over negatives) ), term by term; and simCLR.py is not changed."""
    twice = module_of(ROOT / "results/ablations/counted_twice.py").counted_twice
    z = F.normalize(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    sims = (z @ z.T / 0.3).tolist()
    terms = []
    for i in range(8):
        positive = math.exp(sims[i][(i + 4) % 8])
        every = sum(math.exp(sims[i][j]) for j in range(8) if j != i)
        terms.append(-math.log(positive / (positive + every)))
    assert float(twice(z, 2, 0.3)) == pytest.approx(sum(terms) / 8, rel=1e-5)
    assert simCLR.contrastive_loss is contrastive_loss


@pytest.mark.slow
def test_a_run_with_the_common_error_names_its_script(image_folder, run, run_here, tmp_path):
    flags = ["--dataset", image_folder, *NARROW, "--epochs", 1, "--batch_size", 20]
    flags += ["--precision", "fp32", "--stages", "pretrain,knn", "--no-baselines"]
    flags += ["--knn_k", 5, "--output_dir"]
    done = run("results/ablations/counted_twice.py", *flags, "twice", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    done = run_here("simCLR.py", *flags, "once", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    results = [
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("twice", "once")
    ]
    assert [each["script"] for each in results] == ["counted_twice.py", "simCLR.py"]
    twice, once = (each["pretrain"]["final_loss"] for each in results)
    assert twice > once


def test_every_recipe_is_a_point_of_the_cost_figure(tmp_path):
    cost = module_of(ROOT / "results/cost.py")
    assert set(cost.ours()) <= set(cost.KINDS)
    cost.draw(tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 10_000
    points = [point for kind in cost.ours().values() for point in kind]
    assert sum(seeds for _, _, seeds in points) == len(list(ROOT.glob("results/cifar10-*/")))
    assert all(0.05 < t < 1 and 70 < linear < 100 for t, linear, _ in points)
