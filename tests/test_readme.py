"""Every command that the README and the scripts' own docstrings show is one that the scripts accept."""

import csv
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

import functions as fn
import rnn
import rnn_hyperparameter_tune
import simCLR
from machinery import command_line

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = {"rnn.py": rnn, "simCLR.py": simCLR, "rnn_hyperparameter_tune.py": rnn_hyperparameter_tune}
TEXTS = [
    README,
    *(module.__doc__ or "" for module in SCRIPTS.values()),
    *(p.read_text() for p in ROOT.glob("configs/*")),
]
TEXTS += [path.read_text() for path in (ROOT / "results").rglob("*.md")]
COMMANDS = sorted({m.strip("`") for text in TEXTS for m in re.findall(r"python \w+\.py(?: +(?!#)[^\s`#|]+)*", text)})


def test_there_are_commands_for_each_script():
    for script in SCRIPTS:
        assert any(f"python {script}" in command for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_accepted(command, tmp_path, monkeypatch):
    """Parsed and validated as the script would; files and runs that an example only names are put there first."""
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
    monkeypatch.setattr(os, "cpu_count", lambda: 64)  # as many devices as an example asks for, and processes
    monkeypatch.setattr(fn, "started_together", lambda: 8 if "--num_nodes" in flags else None)
    fn.parse_config(SCRIPTS[script].Config, flags)


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/*.yaml")), ids=lambda file: file.name)
def test_config_file_is_accepted_by_the_script_it_names(file):
    script = re.search(r"python (\w+\.py) ", file.read_text()).group(1)
    fn.parse_config(SCRIPTS[script].Config, ["--config", str(file)])
    assert yaml.safe_load(file.read_text())


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`?make ([\w-]+)", README)) <= targets | {"sure"}


def test_files_that_the_readme_links_to_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link


def test_every_flag_the_readme_mentions_exists():
    known = {f"--{name}" for module in SCRIPTS.values() for name in module.Config.__dataclass_fields__}
    mentioned = set(re.findall(r"`(--\w+)", README))
    assert mentioned <= known | {"--config", "--print_config", "--help"}


def accuracies(value):
    """Every accuracy in a results.json, wherever it stands, as the README writes it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key.endswith("accuracy") and isinstance(inner, float):
                yield f"{100 * inner:.1f} %"
            yield from accuracies(inner)


def test_every_accuracy_in_the_readme_stands_in_the_results():
    """Each row of the tables and each docstring names the folder whose results.json has its percentages."""
    rows = [line for line in README.splitlines() if "](results/" in line and line.startswith("|")]
    assert len(rows) >= 3
    rows += [text[text.index("Measured") :] for module in SCRIPTS.values() if "Measured" in (text := module.__doc__)]
    for row in rows:
        folder = re.search(r"\((results/[\w-]+)", row).group(1)
        measured = set(accuracies(json.loads((ROOT / folder / "results.json").read_text())))
        quoted = set(re.findall(r"[\d.]+ %", row))
        assert quoted
        assert quoted <= measured, f"{quoted - measured} in {row}"


@pytest.mark.parametrize("file", sorted(ROOT.glob("results/*/results.json")), ids=lambda file: file.parent.name)
def test_results_were_made_by_a_committed_state(file):
    results = json.loads(file.read_text())
    assert results["git_commit"]
    assert results["git_dirty"] is False


def results_of(name):
    return json.loads((ROOT / "results" / name / "results.json").read_text())


NETWORKS = [  # the first words of a row in the README, its folder and cell
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
    train, validation, test = (100 * outcome[f"{split}_accuracy"] for split in ("train", "validation", "test"))
    row = [words, str(outcome["best_epoch"]), f"{train:.1f} %", f"{validation:.1f} %", f"{train - validation:.1f}"]
    row.append(f"**{test:.1f} %**" if folder == "rnn-best" else f"{test:.1f} %")
    if not words.startswith("seed"):
        row += [f"{outcome['parameters']:,}", fn.format_time(outcome["seconds"])]
    assert f"| {' | '.join(row)} | [{folder}](results/{folder}) |" in README


@pytest.mark.parametrize(("sampler", "folder"), [("TPE", "rnn-study"), ("random", "rnn-study-random")])
def test_the_table_of_samplers_is_that_of_the_results(sampler, folder):
    study = results_of(folder)["study"]
    row = [sampler, f"{study['best_value']:.4f}", *(f"{study[k]:.0f}" for k in ("pruned", "epochs", "epochs_saved"))]
    assert f"| {' | '.join(row)} |" in README


def test_what_the_readme_says_of_the_extended_study():
    study = results_of("rnn-study-extended")["study"]
    words = (
        f"({study['best_value']:.4f} at best; {study['pruned']} trials pruned, {study['epochs_saved']} of 600 epochs"
    )
    assert words in README
    with open(ROOT / "results/rnn-study-extended/trials.csv") as file:
        complete = [row for row in csv.DictReader(file) if row["state"] == "COMPLETE"]
    best = sorted(complete, key=lambda row: float(row["value"]))[:10]
    names = ("cell", "num_layers", "hidden_size", "bidirectional", "flip", "crop_padding")
    assert {tuple(row[name] for name in names) for row in best} == {("gru", "2", "128", "True", "True", "0")}


def test_the_table_per_class_is_that_of_the_results():
    networks = {cell.upper(): outcome for cell, outcome in results_of("rnn")["cells"].items()}
    networks["best LSTM"] = results_of("rnn-best")["cells"]["lstm"]
    for name, outcome in networks.items():
        assert " | ".join([f"| {name}", *(f"{100 * share:.1f}" for share in outcome["per_class"].values())]) in README


def test_the_table_of_the_study_is_that_of_the_results():
    study = results_of("rnn-study")["study"]
    for trial in study["best_trials"]:
        values = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in trial["params"].values()]
        assert " | ".join([f"| {trial['trial']}", f"{trial['value']:.4f}", *values]) + " |" in README
    epochs = study["epochs"] + study["epochs_saved"]
    assert f"pruned {study['pruned']} of {study['trials']} trials and saved {study['epochs_saved']:,.0f} of" in README
    assert f"{epochs:,.0f} epochs" in README
