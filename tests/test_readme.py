"""The scripts accept every command that a page shows, and every number on it was measured."""

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
import rnn_hyperparameter_tune as tune
import simCLR
from contrastive.few_labels import mean_and_deviation
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
                yield ", ".join(f"{100 * draw:.1f}" for draw in inner)  # raw values, in a column
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
        quoted |= set(re.findall(r"(?<=\| )[\d.]+(?:, [\d.]+)+(?= \|)", row))
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
