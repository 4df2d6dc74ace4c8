"""The README's tables of speed, from results/benchmarks/*.json.

python -m benchmarks.table
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common import OURS

FOLDER = Path(__file__).parent.parent / "results" / "benchmarks"


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def comparison(name: str) -> list[str]:
    """A table of one benchmark: each group's candidates, and how many times faster this project is than each."""
    found = read(name)
    lines = [
        f"| {found['about']} | {found['unit'].split(',')[0]} | this project is faster by |",
        "| --- | ---: | ---: |",
    ]
    for group, rows in found["groups"].items():
        lines.append(f"| *{group}* | | |")
        for candidate, row in rows.items():
            ratio = "" if candidate == OURS else f"{row[f'{OURS} is faster by']:.2f}×"
            lines.append(f"| {candidate} | {number(row['median'])} | {ratio} |")
    return lines


def growth() -> list[str]:
    """How cost grows: a line per quantity, seconds and peak memory."""
    lines = []
    for group, rows in read("growth")["groups"].items():
        lines += ["", f"| {group} | " + " | ".join(rows) + " |", "| --- |" + " ---: |" * len(rows)]
        lines.append("| seconds | " + " | ".join(number(row["median"]) for row in rows.values()) + " |")
        lines.append("| peak memory, MiB | " + " | ".join(f"{row['peak_mib']:,}" for row in rows.values()) + " |")
    return lines[1:]


def tables() -> str:
    parts = [comparison(name) for name in ("step", "augmentation", "loss", "recurrent", "startup")]
    return "\n\n".join("\n".join(part) for part in [*parts, growth()])


if __name__ == "__main__":
    print(tables())
