"""The layout: which file may import which, and how long files and functions may grow."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRACKED = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
FILES = [file for file in TRACKED.stdout.split() if (ROOT / file).is_file()]
HOUSE = [file for file in FILES if not file.startswith(("tests/", "benchmarks/", "results/"))]

MAY_IMPORT = {  # each folder or script, and those that it may import from
    "machinery": {"machinery"},
    "images": {"machinery", "images"},
    "functions": {"machinery", "images"},
    "contrastive": {"functions", "contrastive"},
    "simCLR": {"functions", "contrastive"},
    "rnn": {"functions"},
    "rnn_hyperparameter_tune": {"functions", "rnn"},
}
WITHIN = {  # a file in a folder, and its neighbours that it may import
    "machinery/errors.py": set(),
    "machinery/files.py": {"errors"},
    "machinery/devices.py": {"errors"},
    "machinery/durations.py": {"errors"},
    "machinery/output.py": set(),
    "machinery/batches.py": {"devices"},
    "machinery/checkpoints.py": {"errors", "files"},
    "machinery/processes.py": {"errors"},
    "machinery/command_line.py": {
        *("errors", "files", "devices", "durations", "output", "processes"),
    },
    "machinery/run_folder.py": {"errors", "files", "devices", "command_line", "checkpoints"},
    "machinery/training.py": {
        *("errors", "files", "devices", "durations", "batches", "checkpoints", "processes"),
    },
    "machinery/trials.py": {"errors"},
    "images/folders.py": set(),
    "images/decoding.py": {"folders"},
    "images/sets.py": {"folders", "decoding"},
    "contrastive/augmentation.py": set(),
    "contrastive/small_maps.py": set(),
    "contrastive/signals.py": set(),
    "contrastive/figures.py": {"few_labels", "certainty", "scores"},
    "contrastive/caching.py": set(),
    "contrastive/encoders.py": set(),
    "contrastive/resnets.py": {"encoders"},
    "contrastive/losses.py": set(),
    "contrastive/lars.py": set(),
    "contrastive/memory.py": set(),
    "contrastive/muon.py": {"lars"},
    "contrastive/arithmetic.py": {"memory", "muon"},
    "contrastive/plan.py": {"arithmetic", "memory"},
    "contrastive/whitening.py": set(),
    "contrastive/pretrained.py": {"encoders"},
    "contrastive/probe.py": set(),
    "contrastive/few_labels.py": {"probe"},
    "contrastive/finetuning.py": {"probe"},
    "contrastive/features.py": {"looking"},
    "contrastive/looking.py": {"probe"},
    "contrastive/representation.py": set(),
    "contrastive/scores.py": set(),
    "contrastive/certainty.py": {"augmentation", "losses", "looking", "probe", "scores"},
    "contrastive/explore.py": {"looking", "scores"},
    "contrastive/evaluation.py": {
        *("figures", "pretrained", "probe", "few_labels", "finetuning", "looking", "explore"),
        *("certainty", "representation"),
    },
    "contrastive/sets.py": {"certainty", "evaluation", "pretrained"},
}


def room(file: str) -> str:
    return Path(file).parts[0].removesuffix(".py")


def imports(file: str) -> set[str]:
    """The modules that a file imports, at its top or inside a function, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("file", HOUSE)
def test_arrows_between_rooms_run_downwards(file):
    ours = {name.split(".")[0] for name in imports(file)} & set(MAY_IMPORT)
    assert ours <= MAY_IMPORT[room(file)], f"{file} imports {ours - MAY_IMPORT[room(file)]}"


@pytest.mark.parametrize("file", [file for file in HOUSE if "/" in file])
def test_arrows_within_a_room_run_downwards(file):
    names = {name.split(".")[1] for name in imports(file) if name.startswith(f"{room(file)}.")}
    assert names <= WITHIN[file], f"{file} imports {names - WITHIN[file]}"


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("tests/")])
def test_a_page_has_at_most_700_lines_and_a_function_60(file):
    text = (ROOT / file).read_text()
    assert len(text.splitlines()) <= 700
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            assert (node.end_lineno or 0) - first < 60, (
                f"{file}: {node.name} has more than 60 lines"
            )


def test_the_house_is_all_there():
    assert {"simCLR.py", "rnn.py", "rnn_hyperparameter_tune.py", "functions.py"} <= set(HOUSE)
    assert set(WITHIN) == {file for file in HOUSE if "/" in file}
