"""How every benchmark measures: candidates in turn, in several rounds, each in a fresh process.

In turn, because a machine that is slower for a while is then slower for all of them. In a fresh
process, because settings such as the memory allocator's hold for a whole process: they would help
or harm the candidate that comes next. Reported are the median of the rounds and all raw values;
where memory is the question, also the peak above what was held before.

All of it on the CPU, where every alternative runs too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import functions as fn

OURS = "this project"
ALTERNATIVES = ("torchvision", "lightly", "kornia", "pytorch-metric-learning")
CPU = fn.RunConfig(accelerator="cpu").machine

Candidate = Callable[[], float]
Groups = dict[str, dict[str, Candidate]]

# ------------------------------------------------------------------------------------------------
# What a candidate calls
# ------------------------------------------------------------------------------------------------


def prepare() -> None:
    """The settings with which this project runs on a CPU."""
    fn.prepare_device(CPU)


def seconds(
    f: Callable[[], Any], at_least: float = 2.0, repeats: int = 5, warm_up: int = 2
) -> float:
    """The median seconds of a call of `f`.

    It is called `repeats` times or more, and for `at_least` seconds in all.
    """
    for _ in range(warm_up):
        f()

    taken: list[float] = []
    while len(taken) < repeats or sum(taken) < at_least:
        start = time.perf_counter()
        f()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


# ------------------------------------------------------------------------------------------------
# A benchmark as a program
# ------------------------------------------------------------------------------------------------


def main(
    name: str,
    groups: Mapping[str, Mapping[str, Candidate]],
    *,
    about: str,
    unit: str,
    higher_is_better: bool = False,
    reference: str | None = OURS,
    rounds: int = 3,
    fresh: bool = True,
    memory: bool = False,
) -> None:
    """Measure each group's candidates, print a table, write results/benchmarks/<name>.json.

    The others are compared with `reference`, if there is one. fresh=False measures all of them in
    this process, for candidates that want the same settings.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--rounds", type=int, default=rounds)
    # What a fresh process is told: group, candidate.
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.one:
        group, candidate = words.one
        print(json.dumps(measure(groups[group][candidate], memory)))
        return

    run = fn.Run(fn.RunConfig(dataset="random images", accelerator="cpu"))
    print(f"{about}\n{torch.get_num_threads()} threads, {words.rounds} rounds; {unit}", flush=True)

    outcome: dict[str, Any] = {}
    for group, candidates in groups.items():
        measured: dict[str, list[dict[str, float]]] = {candidate: [] for candidate in candidates}
        for _ in range(words.rounds):
            for candidate, f in candidates.items():
                taken = in_fresh_process(name, group, candidate) if fresh else measure(f, memory)
                measured[candidate].append(taken)
        outcome[group] = _summary(measured, higher_is_better, reference)
        print_group(group, outcome[group])

    write(name, run, {"about": about, "unit": unit, "groups": outcome})


def measure(candidate: Candidate, memory: bool) -> dict[str, float]:
    """What a candidate returns; with `memory`, also the peak above what was held before."""
    if not memory:
        return {"value": candidate()}
    before = memory_mib("VmRSS")
    value = candidate()
    return {"value": value, "peak_mib": memory_mib("VmHWM") - before}


def memory_mib(which: str) -> float:
    """What this process holds (VmRSS) or ever held (VmHWM), in MiB. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def in_fresh_process(name: str, group: str, candidate: str) -> dict[str, float]:
    """`measure` in a process of its own, whose last line says the outcome."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--one", group, candidate]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------
# The outcome
# ------------------------------------------------------------------------------------------------


def _summary(
    measured: dict[str, list[dict[str, float]]], higher_is_better: bool, reference: str | None
) -> dict[str, dict[str, Any]]:
    """One group's rows: median, raw values, and how many times faster the reference is."""
    rows: dict[str, dict[str, Any]] = {}
    for candidate, outcomes in measured.items():
        values = [float(f"{outcome['value']:.4g}") for outcome in outcomes]
        row = rows[candidate] = {"median": statistics.median(values), "values": values}
        if "peak_mib" in outcomes[0]:
            row["peak_mib"] = round(statistics.median(outcome["peak_mib"] for outcome in outcomes))

    if reference is not None:
        ours = rows[reference]["median"]
        for row in rows.values():
            ratio = ours / row["median"] if higher_is_better else row["median"] / ours
            row[f"{reference} is faster by"] = round(ratio, 3)
    return rows


def print_group(group: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print one group's rows, a line each."""
    print(f"\n{group}")
    for candidate, row in rows.items():
        ratios = [f"{value:8.2f}x" for key, value in row.items() if key.endswith("faster by")]
        ratio = ratios[0] if ratios else ""
        raw = " ".join(f"{value:g}" for value in row["values"])
        peak = f"; peak {row['peak_mib']:,} MiB" if "peak_mib" in row else ""
        print(f"  {candidate:40} {row['median']:12,.4g} {ratio}   ({raw}{peak})", flush=True)


def write(name: str, run: fn.Run, outcome: dict[str, Any]) -> None:
    """Write results/benchmarks/<name>.json: what ran and where, and what was measured."""
    record = run.record() | {"script": f"benchmarks/{name}.py"}
    del record["precision"], record["data"]  # every candidate has its own
    for package in ALTERNATIVES:
        with contextlib.suppress(PackageNotFoundError):
            record["versions"][package] = version(package)
    record |= {"command": f"python -m benchmarks.{name}"}

    folder = Path("results/benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**record, **outcome}, indent=1)
    fn.write_atomically(folder / f"{name}.json", f"{text}\n".encode())
    print(f"written to {folder}/{name}.json ({record['seconds']:.0f} s)")
