"""Looking at what was learned, features to take away, and measuring on another set."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.ensemble
import torch
import torchvision
from helpers import code_on_page, user_error
from PIL import Image

import functions as fn
import simCLR
from contrastive import evaluation, features, figures, looking, sets
from contrastive.looking import Cell, Looked
from contrastive.probe import Features

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


def looked(labels, predicted, classes=("a", "b", "c"), h=None, sure=0.9) -> Looked:
    """Test images of which the probe says `predicted`; every image is also a training image."""
    labels, predicted = torch.tensor(labels), torch.tensor(predicted)
    n, k = len(labels), len(classes)
    probabilities = torch.full((n, k), (1 - sure) / (k - 1))
    probabilities[torch.arange(n), predicted] = sure
    images = torch.randint(0, 256, (n, 3, 8, 8)).to(torch.uint8)
    h = torch.randn(n, 4) if h is None else h
    names = [f"{i}.png" for i in range(n)]
    return Looked(
        images, images, Features(h, labels, h, labels, classes), probabilities, names, names
    )


# ------------------------------------------------------------------------------------------------
# What is near, confused, and typical
# ------------------------------------------------------------------------------------------------


def test_the_nearest_are_those_of_the_largest_cosine():
    """Against all cosines, sorted; length does not matter, and k is at most the bank."""
    queries, bank = torch.randn(7, 5), torch.randn(20, 5) * torch.rand(20, 1) * 9
    cosines = torch.nn.functional.cosine_similarity(queries[:, None], bank[None], dim=2)
    expected = cosines.argsort(dim=1, descending=True)
    assert torch.equal(looking.nearest(queries, bank, 4, block=3), expected[:, :4])
    assert torch.equal(looking.nearest(queries, bank, 99), expected)


def test_the_worst_pairs_are_those_of_the_confusion_matrix():
    """a: 2 of 3 wrong (once b, ... twice c); b: 1 of 3 wrong; c: never."""
    seen = looked([0, 0, 0, 0, 1, 1, 1, 2, 2], [0, 1, 2, 2, 1, 1, 2, 2, 2])
    assert looking.worst_pairs(seen) == [(0, 2, 2), (1, 2, 1)]
    assert looking.worst_pairs(looked([0, 1], [0, 1])) == []  # c has no image, nothing is wrong


def test_the_typical_image_is_nearest_to_the_mean_direction():
    h = torch.tensor([[1.0, 0.0], [10.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])
    order = looking.typical(h)
    mean = torch.nn.functional.normalize(h, dim=1).mean(0)
    cosines = torch.nn.functional.cosine_similarity(h, mean[None])
    assert torch.equal(order, cosines.argsort(descending=True))
    assert order[-1] == 3


def test_some_of_each_class_stand_for_all():
    labels = torch.tensor([0] * 600 + [1] * 400)
    chosen = looking.some_of_each(labels, 100, seed=0)
    assert labels[chosen].bincount().tolist() == [60, 40]
    assert torch.equal(looking.some_of_each(labels, 1000, 0), torch.arange(1000))


def test_of_too_many_classes_no_class_is_always_left_out():
    """One of each of 30 would be too many: which 10 they are is drawn."""
    labels = torch.arange(30).repeat(2)
    draws = [looking.some_of_each(labels, 10, seed) for seed in range(20)]
    assert all(len(chosen) == 10 for chosen in draws)
    assert len(labels[torch.cat(draws)].unique()) > 25


def test_no_image_is_both_typical_and_odd_in_classes_of_any_size(monkeypatch, tmp_path):
    """Classes of 1, 3 and 20 images: typical ones stand in the left half, odd ones in the right."""
    labels = [0] + [1] * 3 + [2] * 20
    seen = looked(labels, labels)
    seen.test = torch.arange(24).view(24, 1, 1, 1).expand(24, 3, 8, 8).to(torch.uint8)
    grids = []
    monkeypatch.setattr(looking, "draw_grid", lambda *a, **k: grids.append((a[0], k["after"])))
    looking.plot_typical(seen, tmp_path / "x.png")
    ((rows, after),) = grids
    assert after == [5]
    for row, first, size in zip(rows.values(), (0, 1, 4), (1, 3, 20), strict=True):
        shown = [None if cell is None else int(cell.image[0, 0, 0]) for cell in row]
        order = looking.typical(seen.h.test[first : first + size]) + first
        left, right = min(6, (size + 1) // 2), min(6, size // 2)
        assert shown[:left] == order[:left].tolist()
        assert shown[6 : 6 + right] == order.flip(0)[:right].tolist()
        assert set(shown[left:6] + shown[6 + right :]) <= {None}


def test_what_lies_on_a_sheet_is_small(tmp_path):
    """A sheet of large images would be too large to show."""
    labels = [0, 1, 2]
    seen = looked(labels, labels)
    seen.test = torch.randint(0, 256, (3, 3, 300, 300)).to(torch.uint8)
    small = looking.thumbnail(seen.test, 1, 64)
    assert (small.shape, small.dtype) == ((3, 64, 64), torch.uint8)
    expected = torch.nn.functional.interpolate(
        seen.test[1:2].float(), (64, 64), mode="bilinear", antialias=True
    )
    assert (small - expected[0]).abs().max() <= 1.0  # it is rounded
    assert torch.equal(looking.thumbnail(seen.test, 1, 300), seen.test[1])


def test_the_projector_shows_some_of_all_parts_with_what_belongs_to_each(tmp_path, monkeypatch):
    """A sheet of small pictures, each in the place of its h, class, split and file."""
    monkeypatch.setattr(features, "MOST", 9)
    grey = torch.arange(20, dtype=torch.uint8).mul(12).view(20, 1, 1, 1).expand(20, 3, 100, 100)
    data = SimpleNamespace(train_images=grey[:12], test_images=grey[12:], unlabelled_images=None)
    h = torch.arange(20.0)[:, None].repeat(1, 2)
    rows = [["a", "train" if i < 12 else "test", f"{i}\t.png"] for i in range(20)]
    features.write_projector(h, rows, data, tmp_path)
    ((sheet,), (vectors,), (labels,)) = (
        [*tmp_path.rglob(name)] for name in ("sprite.png", "tensors.tsv", "metadata.tsv")
    )
    chosen = np.loadtxt(vectors)[:, 0].astype(int).tolist()
    assert len(set(chosen)) == 9
    assert min(chosen) < 12 <= max(chosen)
    lines = labels.read_text().splitlines()[1:]
    assert lines == ["\t".join([*rows[i][:2], f"{i} .png"]) for i in chosen]
    with Image.open(sheet) as image:
        assert image.size == (3 * 64, 3 * 64)
        middles = [image.getpixel((64 * (i % 3) + 32, 64 * (i // 3) + 32))[0] for i in range(9)]
    assert middles == pytest.approx([12 * i for i in chosen], abs=1)


def test_a_dollar_sign_is_written_as_one(monkeypatch, tmp_path):
    """A name goes through what makes it plain once."""
    written = []
    monkeypatch.setattr(fn, "save_figure", lambda figure, _: written.append(figure))
    looking.plot_confused(looked([0, 0, 1], [1, 1, 1], ("a$", "b$")), tmp_path / "x.png")
    (axis,) = written[0].axes
    (name,) = [label.get_text() for label in axis.get_yticklabels()]
    assert name == r"a\$, taken for b\$: 2 of 2"


def test_right_neighbours_are_framed_and_wrong_ones_named(monkeypatch, tmp_path):
    """Two test images of their class are each other's neighbours, before those of the other."""
    h = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    seen = looked([0, 0, 1, 1], [0, 0, 1, 1], ("cat", "dog"), h)
    grids = []
    monkeypatch.setattr(looking, "draw_grid", lambda rows, *a, **k: grids.append(rows))
    looking.plot_neighbours(seen, 0, tmp_path / "x.png")
    (rows,) = grids
    assert list(rows) == ["cat", "dog"]
    for name, other in (("cat", "dog"), ("dog", "cat")):
        query, *found = rows[name]
        assert query.frame is None
        assert [cell.frame for cell in found] == [looking.RIGHT] * 2 + [looking.WRONG] * 2
        assert [cell.words for cell in found] == ["", "", other, other]


def test_the_most_surely_mistaken_come_first(monkeypatch, tmp_path):
    """A pair stands there once, the worse class first."""
    seen = looked([0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 1, 1], ("cat", "dog"))
    seen.probabilities[:2] = torch.tensor([[0.4, 0.6], [0.1, 0.9]])
    grids = []
    monkeypatch.setattr(looking, "draw_grid", lambda rows, *a, **k: grids.append(rows))
    looking.plot_confused(seen, tmp_path / "x.png")
    ((name, cells),) = grids[0].items()
    assert name == "cat, taken for dog: 2 of 3"
    words = [cell and cell.words for cell in cells]
    assert words == ["dog, 90%", "dog, 60%", "cat, 90%", None]
    assert torch.equal(cells[0].image, seen.test[1])
    assert torch.equal(cells[2].image, seen.test[3])  # the right half: dogs taken for cats


def test_a_pair_stands_where_its_worse_class_does(monkeypatch, tmp_path):
    """cat is worst (dog), then bird (deer), then dog (cat): that pair has been there."""
    labels = [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    predicted = [1, 1, 1, 0] + [0, 1, 1, 1] + [3, 3, 2, 2] + [3] * 4
    grids = []
    monkeypatch.setattr(looking, "draw_grid", lambda rows, *a, **k: grids.append(rows))
    seen = looked(labels, predicted, ("cat", "dog", "bird", "deer"))
    looking.plot_confused(seen, tmp_path / "x.png")
    assert list(grids[0]) == ["cat, taken for dog: 3 of 4", "bird, taken for deer: 2 of 4"]


def test_a_perfect_probe_confuses_nothing(tmp_path, capsys):
    looking.plot_confused(looked([0, 1, 2], [0, 1, 2]), tmp_path / "x.png")
    assert capsys.readouterr().out == "no confused pairs: no test image is mistaken\n"
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("name", ["$x$ _", "a" * 300, "<b>", "\udcff", "line\nbreak"])
def test_names_of_any_letters_are_drawn(name, tmp_path, capsys):
    rows = {name: [Cell(torch.zeros(3, 8, 8, dtype=torch.uint8), "tab:red", name)]}
    looking.draw_grid(rows, "title", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert max(image.size) < 2000


# ------------------------------------------------------------------------------------------------
# End to end
# ------------------------------------------------------------------------------------------------

TINY = ["--stem", "imagenet", "--batch_size", 32, "--knn_k", 5, "--probe", "lbfgs", "--epochs", 1]


@pytest.fixture(scope="module")
def pretrained(image_folder, prepare, tmp_path_factory):
    """A run that has learned from the folder of colours, 8 pixels a side."""
    folder = tmp_path_factory.mktemp("pretrained")
    flags = ["--dataset", image_folder, "--image_size", 8, *TINY, "--stages", "pretrain"]
    prepare("simCLR.py", *flags, "--output_dir", folder / "run", cwd=folder)
    return folder / "run"


def measure(run_here, pretrained, tmp_path, stages, *flags):
    done = run_here(
        "simCLR.py",
        *["--checkpoint", pretrained, "--stages", stages, "--output_dir", "out"],
        *[*TINY[4:8], *flags],
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done


def test_looking_leaves_its_figures(image_folder, pretrained, run_here, tmp_path):
    flags = ["--dataset", image_folder, "--image_size", 8, "--no-baselines"]
    done = measure(run_here, pretrained, tmp_path, "look", *flags)
    out = tmp_path / "out"
    for name in ("neighbours", "typical", "tsne_errors", "confusion_matrix"):
        with Image.open(out / f"{name}.png") as image:
            assert min(image.size) > 100
    assert (out / "confused.png").is_file() != ("no confused pairs" in done.stdout)


@pytest.mark.slow
def test_a_page_to_explore_of_a_folder_whose_names_look_like_html(
    image_folder, pretrained, run_here, tmp_path
):
    """Names from disk are data; digits, which have no files, have a page too."""
    evil = "<img src=x onerror=alert(1)>"
    shutil.copytree(image_folder, tmp_path / "mine")
    for split in ("train", "test"):
        (tmp_path / "mine" / split / "red").rename(tmp_path / "mine" / split / evil)
    (tmp_path / "mine/test" / evil / "000.png").rename(
        tmp_path / "mine/test" / evil / f"{evil}.png"
    )
    for name in ("mine", "digits"):
        flags = ["--checkpoint", pretrained, "--stages", "explore", "--probe", "lbfgs"]
        flags += ["--evaluate_on", name, "--output_dir", f"out-{name}"]
        done = run_here("simCLR.py", *flags, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"to open first: out-{name}/explore.html" in done.stdout
        page = (tmp_path / f"out-{name}/explore.html").read_text("utf-8")
        assert 10_000 < len(page.encode()) < 10e6
        assert "<img src=x" not in page
        assert ("src=x onerror" in page) == (name == "mine")


def test_features_are_those_of_the_encoder_with_the_names_of_their_files(
    image_folder, pretrained, run_here, tmp_path
):
    """As the page says: h, labels, classes, files, splits; loaded without pickles."""
    flags = ["--dataset", image_folder, "--image_size", 8, "--precision", "fp32"]
    measure(run_here, pretrained, tmp_path, "features", *flags, "--accelerator", "cpu")
    taken = np.load(tmp_path / "out/features.npz")
    assert taken["h"].shape == (324, 512)
    assert taken["h"].dtype == np.float32
    assert taken["classes"].tolist() == ["blue", "green", "red"]
    assert taken["splits"].tolist() == ["train"] * 300 + ["test"] * 24
    assert list((tmp_path / "out/projector").rglob("sprite.png"))
    (vectors,) = (tmp_path / "out/projector").rglob("tensors.tsv")
    (labels,) = (tmp_path / "out/projector").rglob("metadata.tsv")
    header, *rows = (line.split("\t") for line in labels.read_text().splitlines())
    assert header == ["class", "split", "file"]
    named = [taken["classes"][label] for label in taken["labels"]]
    assert rows == [list(row) for row in zip(named, taken["splits"], taken["files"], strict=True)]
    np.testing.assert_allclose(np.loadtxt(vectors), taken["h"], rtol=1e-5)

    i = taken["files"].tolist().index("test/green/003.png")
    assert taken["classes"][taken["labels"][i]] == "green"
    encoder = torchvision.models.resnet18()
    encoder.fc = torch.nn.Identity()
    encoder.load_state_dict(torch.load(pretrained / "encoder.pt", weights_only=True))
    recorded = json.loads((pretrained / "results.json").read_text())["pretrain"]["normalize"]
    mean, std = (torch.tensor(recorded[name]).view(3, 1, 1) for name in ("mean", "std"))
    with Image.open(image_folder / "test/green/003.png") as image:
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    with torch.no_grad():
        expected = encoder.eval()(((pixels - mean) / std)[None])[0]
    torch.testing.assert_close(torch.from_numpy(taken["h"][i]), expected, rtol=1e-3, atol=1e-4)


def test_features_are_used_in_scikit_learn_as_the_page_says(
    image_folder, pretrained, run_here, tmp_path, monkeypatch, capfd
):
    flags = ["--checkpoint", pretrained, "--stages", "features", "--evaluate_on", image_folder]
    run_here("simCLR.py", *flags, "--image_size", 8, "--output_dir", "out", cwd=tmp_path)
    monkeypatch.chdir(tmp_path / "out")
    capfd.readouterr()
    exec(code_on_page("docs/evaluation.md", "sklearn"), {"np": np, "sklearn": sklearn})
    assert float(capfd.readouterr().out) > 0.9  # colours are told apart by almost any features


def test_features_of_a_flat_folder_of_grey_images_of_mixed_sizes(pretrained, run_here, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "mine/deeper").mkdir(parents=True)
    for i, size in enumerate([(20, 9), (8, 8), (40, 40)]):
        pixels = rng.integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "mine" / ("deeper" if i else "") / f"{i}.png")
    measure(run_here, pretrained, tmp_path, "features", "--evaluate_on", "mine")
    taken = np.load(tmp_path / "out/features.npz")
    assert taken["files"].tolist() == ["0.png", "deeper/1.png", "deeper/2.png"]
    assert taken["labels"].tolist() == [-1, -1, -1]
    assert taken["splits"].tolist() == ["train"] * 3
    assert taken["classes"].tolist() == []
    (labels,) = (tmp_path / "out/projector").rglob("metadata.tsv")
    assert labels.read_text().splitlines()[1] == "-\ttrain\t0.png"


def test_transfer_shows_another_set_as_the_encoder_has_seen_its_own(
    pretrained, run_here, tmp_path, monkeypatch
):
    """8-pixel digits at the size of the run's images, by the run's statistics."""
    record = json.loads((pretrained / "data.json").read_text())
    record["image_size"] = 12
    other = tmp_path / "run"
    other.mkdir()
    for name in ("encoder.pt", "config.yaml", "results.json"):
        (other / name).write_bytes((pretrained / name).read_bytes())
    (other / "data.json").write_text(json.dumps(record))

    seen = []

    def note(self, images, *rest):
        seen.append(tuple(images.shape[1:]))
        return original(self, images, *rest)

    original = torchvision.models.ResNet.forward
    monkeypatch.setattr(torchvision.models.ResNet, "forward", note)
    flags = ["--checkpoint", other, "--stages", "knn,probe", "--evaluate_on", "digits"]
    flags += ["--knn_k", 5, "--probe", "lbfgs", "--label_fraction", 0.1, "--output_dir", "out"]
    done = run_here("simCLR.py", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(seen) == {(3, 12, 12)}
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["evaluated_on"] == results["dataset"] == "digits"
    assert results["shown"]["size"] == 12
    recorded = json.loads((pretrained / "results.json").read_text())["pretrain"]["normalize"]
    assert results["shown"]["normalize"] == recorded
    assert set(results["baselines"]) == {"raw_pixels", "untrained_encoder"}
    assert results["data"]["classes"] == list("0123456789")
    assert results["probe"]["test_accuracy"] > 0.3


@pytest.mark.slow
def test_pretraining_and_transfer_in_one_run_know_both_sets(image_folder, run_here, tmp_path):
    flags = ["--dataset", image_folder, "--image_size", 8, *TINY, "--evaluate_on", "digits"]
    flags += ["--stages", "pretrain,knn", "--no-baselines", "--output_dir", "out"]
    done = run_here("simCLR.py", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads((tmp_path / "out/data.json").read_text())
    assert record["classes"] == ["blue", "green", "red"]
    assert record["evaluate_on"]["classes"] == list("0123456789")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (results["dataset"], results["evaluated_on"]) == (str(image_folder), "digits")

    # Each set is known again, by its own flag, wherever it lies by now.
    other = tmp_path / "other"
    for part in ("train", "test"):
        for name in ("a", "b"):
            (other / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(other / part / name / "1.png")
    (tmp_path / "out/.unfinished").touch()
    done = run_here("simCLR.py", "--resume", "out", "--evaluate_on", "other", cwd=tmp_path)
    assert done.returncode == 2
    assert "--evaluate_on other is not what it was" in done.stderr
    done = run_here("simCLR.py", "--resume", "out", "--dataset", "other", cwd=tmp_path)
    assert done.returncode == 2
    assert "--dataset other is not what it was" in done.stderr
    done = run_here("simCLR.py", "--resume", "out", "--evaluate_on", "digits", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_that_is_moved_is_measured_on_again(image_folder, pretrained, run_here, tmp_path):
    flags = ["--checkpoint", pretrained, "--stages", "knn", "--evaluate_on", image_folder]
    flags += ["--knn_k", 5, "--no-baselines", "--output_dir", "out"]
    assert run_here("simCLR.py", *flags, cwd=tmp_path).returncode == 0
    before = json.loads((tmp_path / "out/results.json").read_text())
    copy = shutil.copytree(image_folder, tmp_path / "copy")
    done = run_here("simCLR.py", "--resume", "out", "--evaluate_on", copy, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    again = json.loads((tmp_path / "out/results.json").read_text())
    assert again["knn"] == before["knn"]
    (copy / "test/red/000.png").unlink()
    (tmp_path / "out/.unfinished").touch()
    done = run_here("simCLR.py", "--resume", "out", "--evaluate_on", copy, cwd=tmp_path)
    assert "--evaluate_on" in done.stderr
    assert "test images 23 instead of 24" in done.stderr


def test_another_folder_is_read_as_large_as_the_encoder_is_shown_it(
    image_folder, pretrained, run_here, tmp_path, monkeypatch
):
    """Neither shrunk to 32 pixels and enlarged again, nor the other way round."""
    sizes = []

    def note(*args, **kwargs):
        sizes.append((data := original(*args, **kwargs)).train_images.shape[-1])
        return data

    original = fn.load_dataset
    monkeypatch.setattr(fn, "load_dataset", note)
    flags = ["--checkpoint", pretrained, "--stages", "features", "--evaluate_on", image_folder]
    for more in ([], ["--evaluation_size", 20], ["--image_size", 16, "--evaluation_size", 20]):
        folder = tmp_path / str(len(sizes))
        assert run_here("simCLR.py", *flags, *more, "--output_dir", folder, cwd=tmp_path)[0] == 0
        results = json.loads((folder / "results.json").read_text())
        assert results["shown"]["size"] == (20 if more else 8)
        assert results["evaluated_on"] == results["dataset"] == str(image_folder)
    assert sizes == [8, 20, 16]


def test_the_same_set_under_another_name_is_one_set(image_folder, tmp_path):
    """What is held out of it must not be pretrained on."""
    there = tmp_path / "link"
    there.symlink_to(image_folder)
    config = simCLR.Config(
        dataset=str(image_folder), evaluate_on=str(there), data_dir=str(tmp_path), image_size=8,
        validation_fraction=0.2,
    )  # fmt: skip
    both = sets.load_sets(config).ready(config)
    assert not both.differ
    assert len(both.learned.train_images) == 240
    other = simCLR.Config(
        dataset=str(image_folder), evaluate_on="digits", data_dir=str(tmp_path), image_size=8,
        validation_fraction=0.2,
    )  # fmt: skip
    both = sets.load_sets(other).ready(other)
    assert both.differ
    assert len(both.learned.train_images) == 300


def test_one_image_has_features(pretrained, run_here, tmp_path):
    png = tmp_path / "one/1.png"
    png.parent.mkdir()
    Image.new("RGB", (8, 8)).save(png)
    flags = ["--checkpoint", pretrained, "--stages", "features", "--evaluate_on", "one"]
    done = run_here("simCLR.py", *flags, "--output_dir", "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert np.load(tmp_path / "out/features.npz")["h"].shape == (1, 512)


@pytest.mark.slow
def test_what_is_only_looked_at_costs_the_baselines_no_probe(
    image_folder, pretrained, run_here, tmp_path, monkeypatch
):
    fitted = []

    def note(features, *rest):
        fitted.append(features.train.shape[1])
        return original(features, *rest)

    original = evaluation.probe
    monkeypatch.setattr(evaluation, "probe", note)
    flags = ["--checkpoint", pretrained, "--evaluate_on", image_folder, "--probe", "lbfgs"]
    for stages, widths in (("look", [512]), ("knn,look", [512]), ("probe", [192, 512, 512])):
        fitted.clear()
        more = ["--stages", stages, "--knn_k", 5, "--output_dir", stages]
        assert run_here("simCLR.py", *flags, *more, cwd=tmp_path).returncode == 0
        assert fitted == widths


def test_what_cannot_be_measured_on_is_refused_before_any_work(pretrained, run_here, tmp_path):
    png = tmp_path / "flat/1.png"
    png.parent.mkdir()
    Image.new("RGB", (8, 8)).save(png)
    start = ["--checkpoint", pretrained, "--output_dir", "out"]
    cases = {
        ("knn", "flat"): "--evaluate_on flat has no classes",
        ("knn", "nowhere"): "--evaluate_on nowhere: no such folder",
        ("look", "flat"): "--evaluate_on flat has no classes",
        ("explore", "flat"): "--evaluate_on flat has no classes",
        ("finetune", "flat"): "--evaluate_on flat has no classes",
    }
    for (stages, name), words in cases.items():
        flags = [*start, "--stages", stages, "--evaluate_on", name]
        done = run_here("simCLR.py", *flags, cwd=tmp_path)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert words in done.stderr
        assert not (tmp_path / "out").exists()


def test_pretraining_alone_needs_no_other_set():
    config = simCLR.Config(dataset="digits", stages="pretrain", evaluate_on="digits")
    assert "--evaluate_on" in user_error(config.validate)


def test_files_are_named_as_they_lie_in_the_folder(tmp_path, monkeypatch):
    """However the folder is written."""
    for name in ("flat/a.png", "classes/train/a/1.png", "classes/test/a/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)

    for place, part, names in (
        ("flat", "train", ["a.png"]),
        ("classes", "train", ["train/a/1.png"]),
        ("classes", "test", ["test/a/2.png"]),
    ):
        monkeypatch.chdir(tmp_path / place)
        for folder in (".", "./", f"../{place}", f"{tmp_path}/{place}/"):
            data = fn.load_dataset(folder, tmp_path / "data")
            assert data.names(part) == names


def test_a_map_that_cannot_be_made_costs_a_line(capsys):
    """Features that are no numbers: nothing after it is lost."""
    assert figures.tsne_map(torch.full((9, 3), torch.nan), "test", seed=0) is None
    assert "tsne_map could not" in capsys.readouterr().err


def test_a_map_says_of_which_images_it_is(capsys):
    """Validation images are not called test images, whether there are enough of them or not."""
    for count in (3, 9):
        figures.tsne_map(torch.randn(count, 5), "validation", seed=0)
    few, enough = capsys.readouterr().out.splitlines()
    assert "four different validation images" in few
    assert enough == "t-SNE of 9 validation images"


def test_held_out_images_keep_their_names():
    data = fn.load_dataset("digits")
    held = fn.hold_out(data, 0.1)
    names = held.names("train") + held.names("test")
    assert sorted(names) == data.names("train")
    i = 17
    place = data.names("train").index(held.names("test")[i])
    assert torch.equal(held.test_images[i : i + 1][0], data.train_images[place])
