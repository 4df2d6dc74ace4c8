"""What a step of pretraining needs of a GPU's memory: a table, counted without a GPU.

    python -m benchmarks.memory

Weights, gradient, momentum, and what the forward pass keeps for backward, in GiB, for 512 images
(1,024 views) a step. What operations need for themselves, and the images, come on top.
"""

from __future__ import annotations

from typing import Any

import torch

import functions as fn
import simCLR
from benchmarks import common
from contrastive.memory import bytes_of_a_step

ENCODERS = ("compact", "resnet18", "resnet34", "resnet50")
SIZES = (("cifar", 16), ("cifar", 32), ("imagenet", 32), ("imagenet", 96), ("imagenet", 224))


def main() -> None:
    run = fn.Run(fn.RunConfig(dataset="random images", accelerator="cpu"))
    rows = []
    for name in ENCODERS:
        for stem, side in SIZES:
            own = name == "compact"  # it has a stem of its own, for small images
            if own and stem != "cifar":
                continue
            model = simCLR.SimCLRModel(*simCLR.build_encoder(name, stem))
            row: dict[str, Any] = {"encoder": name, "stem": "" if own else stem, "side": side}
            for precision, reduced in (("fp32", None), ("bf16", torch.bfloat16)):
                needed = bytes_of_a_step(model, 1024, side, "cuda", reduced)
                row[precision] = round(needed / 2**30, 1)
            rows.append(row)
    fn.print_columns([list(rows[0]), *([str(value) for value in row.values()] for row in rows)])
    common.write("memory", run, {"about": "Memory of a step of 512 images, GiB", "rows": rows})


if __name__ == "__main__":
    main()
