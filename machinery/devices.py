"""Where to compute, in which precision, and how many processes were started for it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING, Literal

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from machinery.errors import UserError, check

if TYPE_CHECKING:
    from machinery.command_line import RunConfig


def resolve_device(accelerator: str) -> str:
    """'cuda', 'mps' or 'cpu'. Raises UserError for an accelerator this machine does not have."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if accelerator == "auto":
        return next(device for device, present in here.items() if present)
    check(here[accelerator], f"--accelerator {accelerator}: PyTorch finds none here; leave it out, or take cpu")
    return accelerator


def resolve_precision(precision: str, device: str) -> Literal["fp32", "bf16"]:
    """'fp32' or 'bf16'. auto is bfloat16 on CUDA GPUs since Ampere and on CPUs with AMX, where it is fast."""
    if precision != "auto":
        return "bf16" if precision == "bf16" else "fp32"
    if device == "cuda":
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp32"
    return "bf16" if device == "cpu" and torch.cpu._is_amx_tile_supported() else "fp32"


def prepare_device(config: RunConfig) -> None:
    """Settings of the whole process that make its device fast.

    On CUDA, a run in bfloat16 computes the matrix products that stay float32 (augmentation, NT-Xent) as TF32.
    """
    device = resolve_device(config.accelerator)
    reduced = resolve_precision(config.precision, device) == "bf16"
    if device == "cuda":
        torch.set_float32_matmul_precision("high" if reduced else "highest")
    if device == "cpu":
        # Lightning has CUDA looked for by NVML: where there is none, each optimizer step tries to open its library.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
        # glibc hands large blocks of memory back to the system, and fetches them again page by page: keep them.
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def describe_machine(config: RunConfig) -> str:
    """Device, precision and threads of a run, for people."""
    device = resolve_device(config.accelerator)
    return f"{device}, {resolve_precision(config.precision, device)}, {torch.get_num_threads()} threads"


def started_together() -> int | None:
    """How many processes torchrun or SLURM started together, this one among them; None where neither did.

    Raises UserError for a SLURM job without --ntasks-per-node.
    """
    environment = next((e for e in (TorchElasticEnvironment, SLURMEnvironment) if e.detect()), None)
    try:
        return environment().world_size() if environment is not None else None
    except RuntimeError as error:  # Lightning's, of SLURM's variables
        raise UserError(f"--devices: {' '.join(str(error).split())}") from None
