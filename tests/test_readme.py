"""The scripts accept every command that a page shows, and every number on it was measured."""

import csv
import gzip
import importlib.util
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

import functions as fn
import rnn
import rnn_hyperparameter_tune as tune
import simCLR
from contrastive.few_labels import mean_and_deviation
from contrastive.losses import contrastive_loss
from machinery import command_line

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "results/README.md").read_text()
PAGES = {ROOT / "README.md": README, ROOT / "results/README.md": RESULTS}
PAGES |= {path: path.read_text() for path in ROOT.glob("docs/*.md")}
SCRIPTS = {"rnn.py": rnn, "simCLR.py": simCLR, "rnn_hyperparameter_tune.py": tune}

TEXTS = [*PAGES.values(), *(module.__doc__ or "" for module in SCRIPTS.values())]
TEXTS += [path.read_text() for path in ROOT.glob("configs/*")]
TEXTS += [path.read_text() for path in (ROOT / "results").rglob("*.md")]
TEXTS = [re.sub(r" *\\\n *", " ", text) for text in TEXTS]  # commands of several lines

COMMAND = r"python \w+\.py(?: +(?!#)[^\s`#|]+)*"
COMMANDS = sorted({found.strip("`") for text in TEXTS for found in re.findall(COMMAND, text)})


def test_there_are_commands_for_each_script():
    for script in SCRIPTS:
        assert any(f"python {script}" in command for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_accepted(command, tmp_path, monkeypatch):
    """Parsed and validated as the script would, once the files and runs that it names are there."""
    _, script, *flags = shlex.split(command)
    if "--help" in flags:
        return

    if "--resume" in flags:
        (tmp_path / "runs/newest").mkdir(parents=True)
        monkeypatch.setattr(command_line, "newest_run", lambda _: tmp_path / "runs/newest")
        fn.save_config(tmp_path / "runs/newest/config.yaml", SCRIPTS[script].Config())
        at = flags.index("--resume")
        if at + 1 < len(flags):
            flags[at + 1] = str(tmp_path / "runs/newest")

    if "--checkpoint" in flags:
        (tmp_path / "encoder.pt").touch()
        flags[flags.index("--checkpoint") + 1] = str(tmp_path / "encoder.pt")

    if "--config" in flags:
        at = flags.index("--config") + 1
        if flags[at].startswith("runs/"):
            fn.save_config(tmp_path / "config.yaml", SCRIPTS[script].Config())
            flags[at] = str(tmp_path / "config.yaml")
        else:
            flags[at] = str(ROOT / flags[at])

    # As many devices and processes as the examples ask for.
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    together = 8 if "--num_nodes" in flags else None
    monkeypatch.setattr(command_line, "started_together", lambda: together)
    fn.parse_config(SCRIPTS[script].Config, flags)


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/*.yaml")), ids=lambda file: file.name)
def test_config_file_is_accepted_by_the_script_it_names(file):
    script = re.search(r"python (\w+\.py) ", file.read_text()).group(1)
    fn.parse_config(SCRIPTS[script].Config, ["--config", str(file)])
    assert yaml.safe_load(file.read_text())


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("results/*/config.yaml")), ids=lambda file: file.parent.name
)
def test_a_run_that_an_earlier_version_made_can_be_resumed(file):
    """Its settings may lack newer flags, and have `flip` as the switch that it was."""
    folder = file.parent
    script = json.loads((folder / "results.json").read_text())["script"]
    config = fn.parse_config(SCRIPTS[script].Config, ["--resume", str(folder)])
    assert fn.Run(config).is_finished()


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`?make ([\w-]+)", README)) <= targets | {"sure"}


def test_a_newcomer_reads_the_readme_in_one_go():
    assert len(README.encode()) <= 14_000


def test_files_that_the_pages_link_to_exist():
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page}: {link}"


def test_every_flag_the_readme_mentions_exists():
    configs = [module.Config for module in SCRIPTS.values()]
    known = {f"--{name}" for config in configs for name in config.__dataclass_fields__}
    mentioned = {flag for text in PAGES.values() for flag in re.findall(r"`(--\w+)", text)}
    assert mentioned <= known | {"--config", "--print_config", "--help"}


def accuracies(value):
    """Every accuracy in a results.json, wherever it stands, as the pages write it."""
    if isinstance(value, list):
        for inner in value:
            yield from accuracies(inner)
    if isinstance(value, dict):
        for key, inner in value.items():
            if key.endswith("accuracy") and isinstance(inner, float):
                yield f"{100 * inner:.1f} %"
            if key.endswith("accuracies"):
                yield mean_and_deviation(inner)
            yield from accuracies(inner)


def rows_with_numbers():
    """Each row of a table that names the folder of its numbers, and each docstring that does."""
    for page, text in PAGES.items():
        prefix = {ROOT: "results/", ROOT / "docs": "../results/"}.get(page.parent, "")
        rows = [line for line in text.splitlines() if line.startswith("|")]
        for row in rows:
            if found := re.search(rf"\]\({prefix}([\w/-]+)\) \|$", row):
                yield row, found[1]
    for module in SCRIPTS.values():
        if "Measured" in module.__doc__:
            text = module.__doc__[module.__doc__.index("Measured") :]
            yield text, re.search(r"\(results/([\w-]+)\)", text)[1]


def test_every_accuracy_on_a_page_stands_in_the_results():
    rows = list(rows_with_numbers())
    assert len(rows) >= 10
    for row, folder in rows:
        measured = set(accuracies(results_of(folder)))
        quoted = set(re.findall(r"[\d.]+(?: ± [\d.]+)? %", row))
        assert quoted
        assert quoted <= measured, f"{quoted - measured} in {row}"


def test_the_table_of_few_labels_is_that_of_the_results():
    results = results_of("digits")
    kinds = [results["baselines"]["raw_pixels"], results["baselines"]["untrained_encoder"], results]
    for same_count in zip(*(kind["few_labels"] for kind in kinds), strict=True):
        row = [str(same_count[0]["labels_per_class"])]
        for few in same_count:
            row.append(mean_and_deviation(few["knn_accuracies"]))
            row.append(mean_and_deviation(few["probe_accuracies"]))
        assert f"| {' | '.join(row)} |" in RESULTS


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("results/*/results.json")), ids=lambda file: file.parent.name
)
def test_results_were_made_by_a_committed_state(file):
    results = json.loads(file.read_text())
    assert results["git_commit"]
    assert results["git_dirty"] is False


def results_of(name):
    return json.loads((ROOT / "results" / name / "results.json").read_text())


NETWORKS = [  # the first words of a row in results/README.md, its folder and cell
    ("RNN", "rnn", "rnn"),
    ("LSTM", "rnn", "lstm"),
    ("GRU", "rnn", "gru"),
    ("seed 0", "rnn", "rnn"),
    ("seed 1", "rnn-seed1", "rnn"),
    ("seed 2", "rnn-seed2", "rnn"),
    ("LSTM", "rnn-best", "lstm"),
    ("RNN", "rnn-study-refit", "rnn"),
    ("GRU, both ways", "rnn-study-extended-refit", "gru"),
]


@pytest.mark.parametrize(("words", "folder", "cell"), NETWORKS)
def test_the_rows_of_recurrent_networks_are_those_of_the_results(words, folder, cell):
    outcome = results_of(folder)["cells"][cell]
    splits = ("train", "validation", "test")
    train, validation, test = (100 * outcome[f"{split}_accuracy"] for split in splits)

    row = [words, str(outcome["best_epoch"]), f"{train:.1f} %", f"{validation:.1f} %"]
    row.append(f"{train - validation:.1f}")
    row.append(f"**{test:.1f} %**" if folder == "rnn-best" else f"{test:.1f} %")
    if not words.startswith("seed"):
        row += [f"{outcome['parameters']:,}", fn.format_time(outcome["seconds"])]
    assert f"| {' | '.join(row)} | [{folder}]({folder}) |" in RESULTS


@pytest.mark.parametrize(
    ("sampler", "folder"), [("TPE", "rnn-study"), ("random", "rnn-study-random")]
)
def test_the_table_of_samplers_is_that_of_the_results(sampler, folder):
    study = results_of(folder)["study"]
    row = [sampler, f"{study['best_value']:.4f}"]
    row += [f"{study[key]:.0f}" for key in ("pruned", "epochs", "epochs_saved")]
    assert f"| {' | '.join(row)} |" in RESULTS


def test_what_the_page_says_of_the_extended_study():
    study = results_of("rnn-study-extended")["study"]
    words = (
        f"({study['best_value']:.4f} at best; {study['pruned']} trials pruned, "
        f"{study['epochs_saved']} of 600 epochs"
    )
    assert words in RESULTS

    with open(ROOT / "results/rnn-study-extended/trials.csv") as file:
        complete = [row for row in csv.DictReader(file) if row["state"] == "COMPLETE"]
    best = sorted(complete, key=lambda row: float(row["value"]))[:10]
    names = ("cell", "num_layers", "hidden_size", "bidirectional", "flip", "crop_padding")
    drawn = {tuple(row[name] for name in names) for row in best}
    assert drawn == {("gru", "2", "128", "True", "True", "0")}


def test_the_table_per_class_is_that_of_the_results():
    networks = {cell.upper(): outcome for cell, outcome in results_of("rnn")["cells"].items()}
    networks["best LSTM"] = results_of("rnn-best")["cells"]["lstm"]
    for name, outcome in networks.items():
        shares = [f"{100 * share:.1f}" for share in outcome["per_class"].values()]
        assert " | ".join([f"| {name}", *shares]) in RESULTS


def test_the_table_of_the_study_is_that_of_the_results():
    study = results_of("rnn-study")["study"]
    for trial in study["best_trials"]:
        values = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in trial["params"].values()]
        row = " | ".join([f"| {trial['trial']}", f"{trial['value']:.4f}", *values])
        assert row + " |" in RESULTS

    pruned = f"pruned {study['pruned']} of {study['trials']} trials"
    assert f"{pruned} and saved {study['epochs_saved']:,.0f} of" in RESULTS
    epochs = study["epochs"] + study["epochs_saved"]
    assert f"{epochs:,.0f} epochs" in RESULTS


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


def certain_entry(loss, seed):
    """A run of results/certainty, as its page keeps it."""
    ways = ["norm of h", "probe's softmax"] + ([] if loss == "nt_xent" else [loss])
    measures = ("r_auroc", "aurc", "crops", "blur", "noise", "people")
    worth = dict.fromkeys(measures, 0.5 + 0.1 * seed) | {"others": {"data/b": 0.75}}
    entry = {"flags": "" if loss == "nt_xent" else f"--loss {loss}", "seed": seed}
    entry |= {"linear": 0.6, "knn": 0.5, "macs": 2e14, "seconds": 60}
    entry |= {"processor": "x", "threads": 1, "commit": "abc"}
    return entry | {"certainty": {"ways": {way: dict(worth) for way in ways}}}


def test_each_loss_stands_beside_what_it_has_to_beat(tmp_path):
    certainty = module_of(ROOT / "results/certainty/certainty.py")
    entries = [certain_entry(loss, seed) for loss in ("nt_xent", "tau") for seed in (1, 0)]
    entries[2]["certainty"]["ways"]["probe's softmax"]["r_auroc"] = 0.9
    entries[0]["certainty"]["ways"]["norm of h"]["people"] = None
    page = certainty.page(entries)
    assert "| `tau` | 50.0, 50.0: **50.0 ± 0.0 %** | 60.0, 60.0: **60.0 ± 0.0 %** | 0, 1 |" in page
    assert "| **tau** | 0.550 ± 0.071 |" in page
    assert "| probe's softmax | 0.550 ± 0.071 |" in page
    assert "| tau: probe's softmax | 0.700 ± 0.283 |" in page
    assert "| against b |" in page
    row = next(line for line in page.splitlines() if line.startswith("| norm of h"))
    assert row.endswith("| 0.500 | 0.750 ± 0.000 |")  # one seed was asked about people
    certainty.draw(entries, tmp_path / "certainty.png")
    assert (tmp_path / "certainty.png").stat().st_size > 10_000


def test_runs_that_differ_in_more_than_the_loss_are_not_compared():
    certainty = module_of(ROOT / "results/certainty/certainty.py")
    other = certain_entry("tau", 0) | {"flags": "--epochs 1 --loss tau"}
    with pytest.raises(SystemExit, match="--epochs 1"):
        certainty.page([certain_entry("nt_xent", 0), other])


def test_an_encoder_to_take_home_is_the_same_to_a_thousandth(run, tmp_path):
    """In half the bytes, and shown its images as before."""
    flags = ["--dataset", "digits", "--stem", "imagenet", "--epochs", 1, "--batch_size", 400]
    done = run("simCLR.py", *flags, "--stages", "pretrain", "--output_dir", "run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    module_of(ROOT / "results/take_home.py").main(tmp_path / "run", tmp_path / "home")
    whole, half = (tmp_path / name / "encoder.pt" for name in ("run", "home"))
    assert half.stat().st_size < 0.51 * whole.stat().st_size
    ours, theirs = (torch.load(file, weights_only=True) for file in (half, whole))
    for name, value in ours.items():
        assert torch.allclose(value.to(theirs[name].dtype), theirs[name], rtol=1e-3, atol=1e-6)

    measure = ["--dataset", "digits", "--stages", "knn", "--no-baselines", "--checkpoint"]
    done = run("simCLR.py", *measure, "home", "--output_dir", "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no record" not in done.stdout
    home = json.loads((tmp_path / "out/results.json").read_text())
    trained = json.loads((tmp_path / "run/results.json").read_text())["pretrain"]
    assert home["shown"]["normalize"] == trained["normalize"]


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


def test_a_run_with_the_common_error_names_its_script(run, tmp_path):
    flags = ["--dataset", "digits", "--stem", "imagenet", "--epochs", 1, "--batch_size", 400]
    flags += ["--precision", "fp32", "--stages", "pretrain,knn", "--no-baselines", "--output_dir"]
    done = run("results/ablations/counted_twice.py", *flags, "twice", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    done = run("simCLR.py", *flags, "once", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    results = [
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("twice", "once")
    ]
    assert [each["script"] for each in results] == ["counted_twice.py", "simCLR.py"]
    twice, once = (each["pretrain"]["final_loss"] for each in results)
    assert twice > once


def test_a_quarter_of_the_arithmetic_is_what_was_measured():
    found = results_of("cifar10-10-epochs")
    cost = found["pretrain"]["macs"] / 3.33e15
    assert cost < 0.25
    assert found["pretrain"]["epochs"] == 10
    shares = [f"{100 * share:.1f}" for share in found["probe"]["per_class"].values()]
    assert " | ".join([f"| {cost:.3f} T", *shares]) in RESULTS
    for row, folder in rows_with_numbers():
        if folder.startswith("cifar10-"):
            cost = results_of(folder)["pretrain"]["macs"] / 3.33e15
            assert f"| {cost:.3f} |" in row or f"**{cost:.2f} T**" in row


def test_every_recipe_is_a_point_of_the_cost_figure():
    cost = module_of(ROOT / "results/cost.py")
    points = [point for kind in cost.ours().values() for point in kind]
    assert sum(seeds for _, _, seeds in points) == len(list(ROOT.glob("results/cifar10-*/")))
    assert all(0.05 < t < 1 and 70 < linear < 100 for t, linear, _ in points)
