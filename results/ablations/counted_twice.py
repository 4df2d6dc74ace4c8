"""A common error: NT-Xent that has the positive twice in its denominator.

    python results/ablations/counted_twice.py --config configs/cifar10_ablation.yaml

It is simCLR.py with that loss. Who puts the positive's logit in front of a row of the similarity
matrix in which it still stands gets it; the loss falls, nothing warns.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import functions as fn
import simCLR


def counted_twice(
    embeddings: Tensor, views: int = 2, temperature: float = 0.5, *_: Any, **__: Any
) -> Tensor:
    """-log( e^p / (e^p + e^p + sum over negatives of e^n) ), two views: z (2 N, D) -> a scalar.

    It stands in the place of contrastive_loss, whose other arguments it does not have.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        z = F.normalize(embeddings.float(), dim=1)
        logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)  # without itself
        partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)
        positive = logits.gather(1, partner.unsqueeze(1))
        twice = torch.cat([positive, logits], dim=1)
        return F.cross_entropy(twice, torch.zeros_like(partner))


class Config(simCLR.Config):
    """simCLR.py's settings; what a run leaves names this script."""

    script: ClassVar[str] = "counted_twice.py"


if __name__ == "__main__":
    simCLR.contrastive_loss = counted_twice
    fn.command_line(simCLR.main, Config, __doc__)
