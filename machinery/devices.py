"""Where to compute, in which precision, and how many processes were started for it."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from machinery.errors import UserError, check


@dataclass(frozen=True)
class Machine:
    """Where a run computes (cuda, mps or cpu), and in which precision."""

    device: str
    precision: Literal["fp32", "bf16"]

    def __str__(self) -> str:
        return f"{self.device}, {self.precision}, {torch.get_num_threads()} threads"


def resolve_device(accelerator: str) -> str:
    """'cuda', 'mps' or 'cpu'. Raises UserError for an accelerator that this machine lacks."""
    here = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if accelerator == "auto":
        return next(device for device, present in here.items() if present)

    remedy = "PyTorch finds none here; leave it out, or take cpu"
    check(here[accelerator], f"--accelerator {accelerator}: {remedy}")
    return accelerator


def resolve_precision(precision: str, device: str) -> Literal["fp32", "bf16"]:
    """'fp32' or 'bf16'.

    auto takes bfloat16 where it is fast: on CUDA GPUs since Ampere, and on CPUs with AMX.
    """
    if precision != "auto":
        return "bf16" if precision == "bf16" else "fp32"
    if device == "cuda":
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp32"
    return "bf16" if device == "cpu" and torch.cpu._is_amx_tile_supported() else "fp32"


def prepare_device(machine: Machine) -> None:
    """Settings of the whole process that make its device fast."""
    if machine.device == "cuda":
        # A run in bfloat16 computes its remaining float32 products (augmentation, NT-Xent) as TF32.
        reduced = machine.precision == "bf16"
        torch.set_float32_matmul_precision("high" if reduced else "highest")

    if machine.device == "cpu":
        # Lightning asks NVML whether there is a GPU; where there is none, every step of the
        # optimizer would try to open its library again.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"

        # glibc gives large blocks of memory back to the system, and then fetches them again page
        # by page, which can cost more than the arithmetic. Keep them.
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device; infinite where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    with contextlib.suppress(OSError, StopIteration, IndexError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        return 1024.0 * int(line.split()[1])
    return math.inf


def started_together() -> int | None:
    """How many processes torchrun or SLURM started with this one; None where neither did.

    Raises UserError for a SLURM job without --ntasks-per-node.
    """
    known = (TorchElasticEnvironment, SLURMEnvironment)
    environment = next((kind for kind in known if kind.detect()), None)
    try:
        return environment().world_size() if environment is not None else None
    except RuntimeError as error:  # Lightning's, about SLURM's variables
        raise UserError(f"--devices: {' '.join(str(error).split())}") from None
