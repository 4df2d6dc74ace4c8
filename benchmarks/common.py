"""How every benchmark measures: candidates in turn, several rounds, each time in a fresh process of its own.

A fresh process, because settings such as the memory allocator's hold for a whole process and would help or harm the
candidate that comes next; in turn, so that a machine that is slower for a while is slower for all. Reported are the
median of the rounds and all raw values; where memory is the question, also the peak above what was held before.

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
Candidate = Callable[[], float]


def seconds(f: Callable[[], Any], at_least: float = 2.0, repeats: int = 5, warm_up: int = 2) -> float:
    """The median seconds of a call of `f`, of `repeats` calls or more and at least `at_least` seconds."""
    for _ in range(warm_up):
        f()
    taken: list[float] = []
    while len(taken) < repeats or sum(taken) < at_least:
        start = time.perf_counter()
        f()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def prepare() -> None:
    """The settings with which this project runs on a CPU."""
    fn.prepare_device(fn.RunConfig(accelerator="cpu"))


def memory_mib(which: str) -> float:
    """What this process holds (VmRSS) or ever held (VmHWM), in MiB. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


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
    """Measure each group's candidates against `reference`, print a table, write results/benchmarks/<name>.json.

    fresh=False measures all in this process, for candidates that want the same settings.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # what the fresh process is told: group, candidate
    words = parser.parse_args()
    if words.one:
        group, candidate = words.one
        before = memory_mib("VmRSS") if memory else 0.0
        measured_here = {"value": groups[group][candidate]()}
        print(json.dumps(measured_here | ({"peak_mib": memory_mib("VmHWM") - before} if memory else {})))
        return
    record = fn.start_record(fn.RunConfig(dataset="random images", accelerator="cpu"))
    del record["precision"]  # each benchmark's own
    for package in ("torchvision", "lightly", "kornia", "pytorch-metric-learning"):
        with contextlib.suppress(PackageNotFoundError):
            record["versions"][package] = version(package)
    outcome: dict[str, Any] = {}
    print(f"{about}\n{torch.get_num_threads()} threads, {words.rounds} rounds; {unit}")
    for group, candidates in groups.items():
        measured: dict[str, list[dict[str, float]]] = {candidate: [] for candidate in candidates}
        for _ in range(words.rounds):
            for candidate in candidates:
                outcome_here = (
                    _in_fresh_process(name, group, candidate) if fresh else {"value": candidates[candidate]()}
                )
                measured[candidate].append(outcome_here)
        outcome[group] = _summary(measured, higher_is_better, reference)
        _print(group, outcome[group])
    folder = Path("results/benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    record["seconds"] = round(time.time() - record["seconds"], 1)
    about_it = {"about": about, "unit": unit, "command": f"python -m benchmarks.{name}", "groups": outcome}
    text = json.dumps({**record, "processor": processor(), **about_it}, indent=1)
    fn.write_atomically(folder / f"{name}.json", f"{text}\n".encode())
    print(f"written to {folder}/{name}.json ({record['seconds']:.0f} s)")


def processor() -> str:
    """The processor's name, where the system tells it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _in_fresh_process(name: str, group: str, candidate: str) -> dict[str, float]:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--one", group, candidate]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _summary(measured: dict[str, list[dict[str, float]]], higher_is_better: bool, reference: str | None) -> Any:
    rows: dict[str, dict[str, Any]] = {}
    for candidate, outcomes in measured.items():
        values = [float(f"{outcome['value']:.4g}") for outcome in outcomes]
        rows[candidate] = {"median": statistics.median(values), "values": values}
        if "peak_mib" in outcomes[0]:
            rows[candidate]["peak_mib"] = round(statistics.median(outcome["peak_mib"] for outcome in outcomes))
    for row in rows.values() if reference else ():
        ratio = row["median"] / rows[str(reference)]["median"]
        row[f"{reference} is faster by"] = round(1 / ratio if higher_is_better else ratio, 3)
    return rows


def _print(group: str, rows: dict[str, dict[str, Any]]) -> None:
    print(f"\n{group}")
    for candidate, row in rows.items():
        ratio = next((f"{value:8.2f}x" for key, value in row.items() if key.endswith("faster by")), "")
        raw = " ".join(f"{value:g}" for value in row["values"])
        peak = f"; peak {row['peak_mib']:,} MiB" if "peak_mib" in row else ""
        print(f"  {candidate:40} {row['median']:12,.4g} {ratio}   ({raw}{peak})", flush=True)
