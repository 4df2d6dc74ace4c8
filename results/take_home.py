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

BESIDE = ("config.yaml", "data.json", "metrics.csv", "pretraining.png")


def halve(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with float32 as float16; counts stay. Raises ValueError for what it cannot hold."""
    half = {name: v.half() if v.is_floating_point() else v for name, v in state.items()}
    lost = [name for name, v in half.items() if not v.isfinite().all()]
    if lost:
        raise ValueError(f"too large for float16: {', '.join(lost)}")
    return half


def main(run: Path, there: Path) -> None:
    """Copy a finished run's encoder, and beside it what says how it was trained."""
    there.mkdir(parents=True, exist_ok=True)
    state = torch.load(run / "encoder.pt", map_location="cpu", weights_only=True)
    fn.save_torch(there / "encoder.pt", halve(state))
    for name in BESIDE:
        shutil.copy(run / name, there / name)
    # load_encoder's record of how images were normalised, and what the training took.
    shutil.copy(run / "results.json", there / "results.json")
    print(f"{there / 'encoder.pt'}: {(there / 'encoder.pt').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), HERE / "simclr-best")
