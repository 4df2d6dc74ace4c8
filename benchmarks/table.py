"""The README's tables of speed, from results/benchmarks/*.json.

python -m benchmarks.table         # prints the README's summary, writes all tables to results/benchmarks/README.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common import OURS

FOLDER = Path(__file__).parent.parent / "results" / "benchmarks"
NAMES = ("step", "augmentation", "loss", "recurrent", "startup", "convolution", "growth", "microbatch")
SUMMARY = (  # benchmark, group, alternative
    ("step", "cifar stem, batch 256", "usual formulation"),
    ("step", "cifar stem, batch 256", "bare model"),
    ("step", "imagenet stem, batch 512", "usual formulation"),
    ("step", "imagenet stem, batch 512", "bare model"),
    ("augmentation", "32 x 32", "torchvision v1 (Pillow), DataLoader"),
    ("augmentation", "32 x 32", "lightly SimCLRTransform, DataLoader"),
    ("augmentation", "32 x 32", "kornia, batched"),
    ("loss", "N = 2048", "masked copies"),
    ("loss", "N = 2048", "lightly NTXentLoss"),
    *(
        ("recurrent", cell, alternative)
        for cell in ("rnn", "lstm", "gru")
        for alternative in ("usual loop", "bare loop")
    ),
)


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def summary() -> str:
    """The README's table: this project beside one alternative a line."""
    lines = ["| | this project | alternative | | faster by |", "| --- | ---: | --- | ---: | ---: |"]
    for name, group, alternative in SUMMARY:
        found = read(name)
        rows, unit = found["groups"][group], found["unit"].split(",")[0]
        ours, theirs = (number(rows[who]["median"]) for who in (OURS, alternative))
        ratio = rows[alternative][f"{OURS} is faster by"]
        lines.append(f"| {found['about']}, {group} ({unit}) | {ours} | {alternative} | {theirs} | {ratio:.2f}× |")
    return "\n".join(lines)


def growth() -> str:
    """The README's table of how cost grows: a line per quantity, seconds and peak memory."""
    lines = []
    for group, rows in (read("growth")["groups"] | read("microbatch")["groups"]).items():
        cells = [f"{size}: {number(row['median'])} s, {row['peak_mib']:,} MiB" for size, row in rows.items()]
        lines.append(f"- {group}: {'; '.join(cells)}")
    return "\n".join(lines)


def comparison(name: str) -> list[str]:
    """All that one benchmark measured, with the raw values."""
    found = read(name)
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    machine = f"{found['processor']}, {found['threads']} threads, {versions}, {found['seconds']:.0f} s"
    lines = [f"## {found['about']}", "", f"    {found['command']}", "", f"{found['unit'].capitalize()}. {machine}.", ""]
    header = ["", "median", "this project is faster by", "raw values", "peak memory, MiB"]
    lines += [f"| {' | '.join(header)} |", "| --- | ---: | ---: | --- | ---: |"]
    for group, rows in found["groups"].items():
        lines.append(f"| **{group}** | | | | |")
        for candidate, row in rows.items():
            ratio = row.get(f"{OURS} is faster by")
            cells = [candidate, number(row["median"]), f"{ratio:.2f}×" if ratio and candidate != OURS else ""]
            peak = f"{row['peak_mib']:,}" if "peak_mib" in row else ""
            cells += [", ".join(f"{value:g}" for value in row["values"]), peak]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def everything() -> str:
    """results/benchmarks/README.md."""
    start = [
        "# Benchmarks",
        "",
        "Written by `python -m benchmarks.table`; the numbers are in the JSON files beside.",
        "",
    ]
    return "\n".join([*start, *(line for name in NAMES for line in [*comparison(name), ""])])


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(everything())
    print(summary(), growth(), sep="\n\n")
