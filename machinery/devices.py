"""Where to compute, in which precision, and how many processes were started for it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from machinery.errors import UserError, check

Precision = Literal["fp32", "bf16", "fp16"]
REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}  # what autocast computes in


@dataclass(frozen=True)
class Machine:
    """Where a run computes (cuda, mps or cpu), and in which precision."""

    device: str
    precision: Precision

    def __str__(self) -> str:
        return f"{self.device}, {self.precision}, {torch.get_num_threads()} threads"

    def autocast(self) -> torch.autocast:
        """A context in which products are computed in the machine's precision."""
        reduced = REDUCED.get(self.precision)
        return torch.autocast(self.device, reduced, enabled=reduced is not None)


def resolve_device(accelerator: str, unsuited: tuple[str, ...] = ()) -> str:
    """'cuda', 'mps' or 'cpu'. Raises UserError for an accelerator that this machine lacks.

    auto passes over what is `unsuited`, and says, once, why it does not take an NVIDIA GPU that
    seems to be there.
    """
    problem = cuda_problem()
    here = {
        "cuda": torch.cuda.is_available() and problem is None,
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if accelerator == "auto":
        if problem is not None:
            note(problem)
        return next(name for name, present in here.items() if present and name not in unsuited)

    if accelerator == "cuda" and problem is not None:
        raise UserError(f"--accelerator cuda: {problem}")
    remedy = "PyTorch finds none here; leave it out, or take cpu"
    check(here[accelerator], f"--accelerator {accelerator}: {remedy}")
    return accelerator


def cuda_problem() -> str | None:
    """Why an NVIDIA GPU that is there cannot be used, with the remedy; None if nothing is wrong."""
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None:
            return None
        built = torch.version.cuda or "no CUDA at all"
        problem = f"there is an NVIDIA driver, but PyTorch finds no GPU (it is built for {built})"
        return f"{problem}: update the driver, or install PyTorch's build for its CUDA version"

    major, minor = torch.cuda.get_device_capability()
    kernels = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", arch) for arch in cuda_architectures()]
    for kernel in kernels:
        if kernel is None:
            continue
        kind, theirs = kernel[1], (int(kernel[2]), int(kernel[3]))
        # Machine code runs on its own generation, and PTX ("compute") on any later one.
        same = theirs[0] == major and theirs[1] <= minor
        if same or (kind == "compute" and theirs <= (major, minor)):
            return None
    if not kernels:
        return None
    built = ", ".join(cuda_architectures())
    problem = (
        f"this GPU's architecture sm_{major}{minor} is none that PyTorch is built for ({built})"
    )
    return f"{problem}: install a PyTorch build for an older CUDA, or take --accelerator cpu"


def cuda_architectures() -> list[str]:
    """What PyTorch has kernels for."""
    return torch.cuda.get_arch_list()


@functools.cache
def note(text: str) -> None:
    """Say something on stderr, once."""
    print(f"note: {text}", file=sys.stderr)


def resolve_precision(precision: str, device: str) -> Precision:
    """'fp32', 'bf16' or 'fp16'.

    auto takes bfloat16 where it is fast: on CUDA GPUs since Ampere, and on CPUs that multiply it
    themselves (AMX, AVX512-BF16). Raises UserError where the device cannot compute in what was
    asked for.
    """
    has_bf16 = device != "cuda" or torch.cuda.get_device_capability() >= (8, 0)
    if precision == "auto":
        multiplies = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        fast = {"cuda": has_bf16, "cpu": multiplies}.get(device, False)
        return "bf16" if fast else "fp32"

    older = "this GPU is older than Ampere and has none: take fp16 or fp32"
    check(precision != "bf16" or has_bf16, f"--precision bf16: {older}")
    scaled = "its gradients are scaled as for CUDA GPUs alone: take bf16 or fp32"
    check(precision != "fp16" or device == "cuda", f"--precision fp16: {scaled}")
    return cast(Precision, precision)


def take_gpu(index: int) -> None:
    """Let this process see one GPU alone: of those that are there, number `index`, in turn.

    To be called before CUDA is used.
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = seen.split(",") if seen else [str(i) for i in range(torch.cuda.device_count())]
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]


def prepare_device(machine: Machine) -> None:
    """Settings of the whole process that make its device fast."""
    if machine.device == "cuda":
        # A run in bfloat16 computes its remaining float32 products (augmentation, NT-Xent) as TF32.
        # In float32 all is float32, which PyTorch's own default for convolutions is not.
        reduced = machine.precision in REDUCED
        torch.set_float32_matmul_precision("high" if reduced else "highest")
        torch.backends.cudnn.allow_tf32 = reduced

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


def processor() -> str:
    """The processor's name, where the system tells it, and what PyTorch makes use of: a number that
    is about speed says nothing without it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        name = next(line.partition(":")[2] for line in lines if line.startswith("model name"))
    also = {"AMX": torch.cpu._is_amx_tile_supported, "BF16": torch.cpu._is_avx512_bf16_supported}
    uses = [torch.backends.cpu.get_cpu_capability(), *(name for name, has in also.items() if has())]
    return f"{name.strip()} ({', '.join(dict.fromkeys(uses))})"


def gpu_record() -> dict[str, Any] | None:
    """What results.json says of the GPU; None without CUDA."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_mib": properties.total_memory // 2**20,
        "peak_mib": max(peak_mib(), *PEAKS),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32": torch.backends.cudnn.allow_tf32,
    }


PEAKS = [0]
"""MiB: what `peak_mib` has returned so far"""


def peak_mib() -> int:
    """The most memory of the GPU that was allocated since this was last asked, in MiB."""
    PEAKS.append(torch.cuda.max_memory_allocated() // 2**20)
    torch.cuda.reset_peak_memory_stats()
    return PEAKS[-1]


def driver_version() -> str | None:
    """NVIDIA's driver, as nvidia-smi names it; None where it does not."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
        return next(iter(done.stdout.split()), None)
    return None


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
