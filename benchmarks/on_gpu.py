"""A step of SimCLR on a GPU: pairs per second, peak memory, and how busy the GPU is.

    python -m benchmarks.on_gpu                     # on a CUDA GPU
    python -m benchmarks.on_gpu --accelerator cpu --batch_size 8 --steps 2    # does it run at all?

ResNet-18 with the CIFAR stem on 32 x 32 images. "this project" is simCLR.py's own training step
with its augmentation and optimizer, "bare model" the same encoder, batch and precision on random
tensors, and "usual formulation" has Pillow transforms in a DataLoader. The device is waited for
around what is timed.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import functions as fn
import simCLR
from benchmarks import common, usual


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def rate(step: Callable[[], Any], pairs: int, steps: int, device: str) -> dict[str, float]:
    """Pairs per second of `step`, each on so many pairs, and the peak of the GPU's memory."""
    for _ in range(max(2, steps // 5)):  # kernels are chosen and compiled
        step()
    wait(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait(device)
    found = {"pairs per second": round(pairs * steps / (time.perf_counter() - start), 1)}
    if device == "cuda":
        found["peak MiB"] = torch.cuda.max_memory_allocated() // 2**20
    return found


def our_step(config: simCLR.Config, compiled: bool) -> Callable[[], None]:
    """A training step of simCLR.py, with its augmentation, on random images."""
    machine = config.machine
    fn.prepare_device(machine)
    torch.manual_seed(0)
    model = simCLR.SimCLRModel(*simCLR.build_encoder(config.encoder, config.stem))
    if compiled:
        model.compile(dynamic=False)
    images = torch.randint(256, (20 * config.batch_size, 3, 32, 32), dtype=torch.uint8)
    module = simCLR.Pretraining(model, images, None, config).to(machine.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    batches = endless(module.batches.to(torch.device(machine.device)))

    def step() -> None:
        (batch,) = next(batches)
        with machine.autocast():
            views = simCLR.random_views(batch, config)
            views = module.normalize(views).contiguous(memory_format=torch.channels_last)
            loss = fn.nt_xent_loss(model(views), config.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def endless(batches: fn.Batches) -> Iterator[tuple[torch.Tensor, ...]]:
    return itertools.chain.from_iterable(itertools.repeat(batches))


def bare_step(config: simCLR.Config) -> Callable[[], None]:
    """The same model on random tensors: what is left to lose."""
    machine = config.machine
    model = simCLR.SimCLRModel(*simCLR.build_encoder(config.encoder, config.stem))
    model.to(machine.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    views = torch.randn(2 * config.batch_size, 3, 32, 32, device=machine.device)
    views = views.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with machine.autocast():
            loss = fn.nt_xent_loss(model(views), config.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def usual_step(config: simCLR.Config, steps: int) -> Callable[[], None]:
    """Pillow transforms in a DataLoader with two workers, masked copies, float32."""
    device, n = config.machine.device, config.batch_size
    model = usual.model(config.stem).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = usual.random_images(n * (2 * steps + 10))
    views = iter(usual.loader(images, n, usual.augmentation()))

    def step() -> None:
        first, second = next(views)
        loss = usual.masked_copy_loss(model(torch.cat([first, second]).to(device)).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def busy_share(step: Callable[[], Any], steps: int) -> float:
    """The share of the time in which the GPU computes, as PyTorch's profiler sees it."""
    from torch.profiler import ProfilerActivity, profile

    wait("cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait("cuda")
        seconds = time.perf_counter() - start
    computing = sum(event.self_device_time_total for event in found.key_averages())
    return round(computing / 1e6 / seconds, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accelerator", default="cuda")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    words = parser.parse_args()
    run = fn.Run(fn.RunConfig(dataset="random images", accelerator=words.accelerator))
    config = simCLR.Config(batch_size=words.batch_size, accelerator=words.accelerator, epochs=1)
    device, n, steps = config.machine.device, config.batch_size, words.steps

    kinds: dict[str, Callable[[], Callable[[], None]]] = {
        common.OURS: lambda: our_step(config, compiled=False),
        "bare model": lambda: bare_step(config),
        "usual formulation": lambda: usual_step(config, steps),
    }
    if device == "cuda":
        kinds["this project, --compile"] = lambda: our_step(config, compiled=True)
    found: dict[str, Any] = {kind: [] for kind in kinds}
    for _ in range(words.rounds):
        for kind, make in kinds.items():
            found[kind].append(rate(make(), n, steps, device))
            print(f"{kind}: {found[kind][-1]}", flush=True)
    if device == "cuda":
        found["share of the time in which the GPU computes"] = {
            kind: busy_share(kinds[kind](), steps) for kind in (common.OURS, "bare model")
        }
        print(found["share of the time in which the GPU computes"])
        common.write("on_gpu", run, {"about": "A step of SimCLR on a GPU", "found": found})


if __name__ == "__main__":
    main()
