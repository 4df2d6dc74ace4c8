"""results/benchmarks/README.md, and the lines of it that the README shows, from the JSON files.

python -m benchmarks.table      # writes all tables, prints what the README shows of them
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import functions as fn
from benchmarks.common import OURS

FOLDER = Path(__file__).parent.parent / "results" / "benchmarks"
NAMES = (
    "step",
    "augmentation",
    "loss",
    "recurrent",
    "startup",
    "convolution",
    "growth",
    "microbatch",
    "signals",
)

# ------------------------------------------------------------------------------------------------
# What is compared: benchmark, group, alternative
# ------------------------------------------------------------------------------------------------

Comparison = tuple[str, str, str]

SUMMARY: tuple[Comparison, ...] = (
    ("step", "cifar stem, batch 256", "usual formulation"),
    ("step", "cifar stem, batch 256", "bare model"),
    ("step", "imagenet stem, batch 512", "usual formulation"),
    ("step", "imagenet stem, batch 512", "bare model"),
    ("augmentation", "32 x 32", "torchvision v1 (Pillow), DataLoader"),
    ("augmentation", "32 x 32", "lightly SimCLRTransform, DataLoader"),
    ("augmentation", "32 x 32", "kornia, batched"),
    ("loss", "N = 2048", "masked copies"),
    ("loss", "N = 2048", "lightly NTXentLoss"),
    ("recurrent", "rnn", "usual loop"),
    ("recurrent", "rnn", "bare loop"),
    ("recurrent", "lstm", "usual loop"),
    ("recurrent", "lstm", "bare loop"),
    ("recurrent", "gru", "usual loop"),
    ("recurrent", "gru", "bare loop"),
)
HEADLINE: tuple[Comparison, ...] = (
    ("step", "cifar stem, batch 256", "usual formulation"),
    ("step", "imagenet stem, batch 512", "usual formulation"),
    ("loss", "N = 2048", "masked copies"),
)

# ------------------------------------------------------------------------------------------------
# Prose
# ------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# Benchmarks

How fast is this project, and how much memory does it take, beside the usual way to write the same
and beside other libraries? `make benchmarks` measures it. The candidates of a group are measured
in turn, because a machine that is slower for a while is then slower for all of them; and in a
fresh process each wherever settings of the whole process matter, such as the memory allocator's.

Reported are the medians of {rounds} rounds; the full tables show all raw values. Together they took
{time} on {threads} CPU cores with AMX; no GPU was at hand. To measure again, take a machine that
does nothing else.

This page is written by `python -m benchmarks.table`; its numbers are in the JSON files beside it.
"""

WORDS = """\
- **Usual formulation** ([benchmarks/usual.py](../../benchmarks/usual.py)): Pillow transforms in a
  DataLoader with two workers, float32, NT-Xent from masked copies of the similarity matrix.
- **Usual loop** ([benchmarks/recurrent.py](../../benchmarks/recurrent.py)): ToTensor and Normalize
  per image in a DataLoader. It and the usual formulation fetch numbers after every batch.
- **Bare** model or loop: this project's own model on ready-made tensors, without data,
  augmentation, validation or trainer. It shows what there is to lose.

In SimCLR's step this project takes bfloat16; in float32 it is slower by the factors in the full
tables.
"""

REASONS = """\
- **Nothing is done per image.** The data set lies on the device as one tensor, batches are slices
  of it, and whole batches are augmented there, each image with its own random draws.
- **Memory is kept.** glibc hands large tensors back to the system and gets them again page by
  page, which costs a CPU more than much of the arithmetic. `prepare_device` turns that off; "with
  our memory setting" in the full tables shows what others gain by it.
- **NT-Xent works in blocks of rows** and computes its gradient on the way: memory grows with N,
  not N².
- **Small maps are matrix products** on the CPU (`SmallMapConv2d`): the same result, for most
  shapes at several times the speed.
- **bfloat16** where the processor computes it fast: CUDA GPUs since Ampere, CPUs with AMX or
  AVX512-BF16.
- On a GPU, not measured yet: channels_last, fused optimizers, TF32 and, if asked, `--compile`.
"""

# ------------------------------------------------------------------------------------------------
# Numbers
# ------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def read(name: str) -> dict[str, Any]:
    """What one benchmark wrote."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def introduction() -> str:
    """What was measured, and how: the rounds, the time and the machine."""
    found = [read(name) for name in NAMES]
    rows = [row for one in found for group in one["groups"].values() for row in group.values()]
    rounds = {len(row["values"]) for row in rows}
    threads = {one["threads"] for one in found}
    return INTRODUCTION.format(
        rounds=f"{min(rounds)} to {max(rounds)}",
        time=fn.format_time(sum(one["seconds"] for one in found)),
        threads=" or ".join(map(str, sorted(threads))),
    )


def side_by_side(comparisons: Sequence[Comparison]) -> str:
    """This project beside one alternative a line."""
    header = "| | this project | alternative | | faster by |"
    lines = [header, "| --- | ---: | --- | ---: | ---: |"]
    for name, group, alternative in comparisons:
        found = read(name)
        rows, unit = found["groups"][group], found["unit"].split(",")[0]
        what = f"{found['about']}, {group} ({unit})"
        ours, theirs = (number(rows[who]["median"]) for who in (OURS, alternative))
        ratio = f"{rows[alternative][f'{OURS} is faster by']:.2f}×"
        lines.append(f"| {what} | {ours} | {alternative} | {theirs} | {ratio} |")
    return "\n".join(lines)


def headline() -> str:
    """The lines of the summary that the README shows."""
    return side_by_side(HEADLINE)


def summary() -> str:
    return side_by_side(SUMMARY)


def growth() -> str:
    """How cost grows: a line per quantity, seconds and peak memory."""
    lines = []
    for group, rows in (read("growth")["groups"] | read("microbatch")["groups"]).items():
        cells = [
            f"{size}: {number(row['median'])} s, {row['peak_mib']:,} MiB"
            for size, row in rows.items()
        ]
        lines.append(f"- {group}: {'; '.join(cells)}")
    return "\n".join(lines)


def large_sets() -> str:
    """A folder of a million images: what each kind of start measured, a line each."""
    found = read("large_sets")
    lines = [
        f"{found['about']}, by `{found['command']}` ({found['processor']}, {found['threads']} "
        f"threads): gathered one step ahead from the mapped file, training makes "
        f"{found['ratio']:.3f} of the steps that it makes from memory.",
        "",
    ]
    for kind, rows in found["found"].items():
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        words = (f"{name} {', '.join(map(str, values))}" for name, values in columns.items())
        lines.append(f"- {kind}: {'; '.join(words)}")
    return "\n".join(lines)


def memory() -> str:
    """What a step needs of a GPU's memory, in GiB."""
    found = read("memory")
    names = list(found["rows"][0])
    lines = [f"| {' | '.join(names)} |", "| --- | --- " + "| ---: " * (len(names) - 2) + "|"]
    lines += [f"| {' | '.join(map(str, row.values()))} |" for row in found["rows"]]
    return "\n".join(lines)


def full_table(name: str) -> str:
    """All that one benchmark measured, with the raw values."""
    found = read(name)
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    threads = f"{found['threads']} threads"
    machine = f"{found['processor']}, {threads}, {versions}, {found['seconds']:.0f} s"
    header = ["", "median", f"{OURS} is faster by", "raw values", "peak memory, MiB"]
    lines = [
        f"### {found['about']}",
        "",
        f"    {found['command']}",
        "",
        f"{found['unit'].capitalize()}. {machine}.",
        "",
        f"| {' | '.join(header)} |",
        "| --- | ---: | ---: | --- | ---: |",
    ]
    for group, rows in found["groups"].items():
        lines.append(f"| **{group}** | | | | |")
        for candidate, row in rows.items():
            ratio = row.get(f"{OURS} is faster by")
            cells = [
                candidate,
                number(row["median"]),
                f"{ratio:.2f}×" if ratio and candidate != OURS else "",
                ", ".join(f"{value:g}" for value in row["values"]),
                f"{row['peak_mib']:,}" if "peak_mib" in row else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------


def everything() -> str:
    """results/benchmarks/README.md."""
    seconds_and_memory = "Seconds, and the peak of memory above what was held before:"
    parts = [
        introduction(),
        "## Summary\n",
        f"{summary()}\n",
        WORDS,
        "## Where it comes from\n",
        REASONS,
        "## How cost grows\n",
        f"{seconds_and_memory}\n",
        f"{growth()}\n",
        "## Sets larger than memory\n",
        f"{large_sets()}\n",
        "## Memory of a step\n",
        "For 512 images a step, in GiB: weights, gradient, momentum, and what the forward pass\n"
        "keeps for backward, counted by `python -m benchmarks.memory` on tensors without values.\n"
        "What operations need for themselves comes on top. `--micro_batch_size` divides all but\n"
        "the weights' part.\n",
        f"{memory()}\n",
        "## Full tables\n",
        *(full_table(name) for name in NAMES),
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(everything())
    print(headline())
