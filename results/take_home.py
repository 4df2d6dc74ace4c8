"""An encoder to take home: what a run has learned, in half the bytes.

    python results/take_home.py RUN      # leaves results/simclr-best
    python simCLR.py --stages knn,probe,tsne --checkpoint results/simclr-best --dataset ...

Weights in float16 are loaded as float32 again, and what they are worth is measured of this file.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import functions as fn  # noqa: E402

# With what says how it was trained, and how it was shown its images.
BESIDE = ("config.yaml", "data.json", "metrics.csv", "pretraining.png", "results.json")
MEASURED = ("measured", "cells")  # what this encoder is worth, by h and by the last map in quarters


def halve(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with float32 as float16; counts stay. Raises ValueError for what it cannot hold."""
    half = {name: v.half() if v.is_floating_point() else v for name, v in state.items()}
    lost = [name for name, v in half.items() if not v.isfinite().all()]
    if lost:
        raise ValueError(f"too large for float16: {', '.join(lost)}")
    return half


def main(run: Path, there: Path) -> None:
    """Copy a finished run's encoder, and what belongs to it. Ends with a line for another run,
    before anything is changed."""
    lacking = [name for name in ("encoder.pt", *BESIDE) if not (run / name).is_file()]
    if lacking:
        sys.exit(f"{run} lacks {', '.join(lacking)}: name the folder of a finished run")
    state = halve(torch.load(run / "encoder.pt", map_location="cpu", weights_only=True))

    there.mkdir(parents=True, exist_ok=True)
    for name in MEASURED:  # of the encoder that was there before
        shutil.rmtree(there / name, ignore_errors=True)
    for name in BESIDE:
        shutil.copy(run / name, there / name)
    fn.save_torch(there / "encoder.pt", state)
    print(f"{there / 'encoder.pt'}: {(there / 'encoder.pt').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), HERE / "simclr-best")
