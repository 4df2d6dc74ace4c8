"""A first layer that knows the images' colours and edges before it learns anything."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import functions as fn


@torch.no_grad()
def whiten(conv: Any, normalize: fn.Normalize, images: Tensor, most: int = 2000) -> None:
    """Let an nn.Conv2d start, in place, from the whitened principal components of patches.

    images: uint8 (N, 3, H, W), the first layer's input once `normalize` has seen them; `most` of
    them are enough. Neighbouring pixels are much alike, so that what random filters answer is
    mostly brightness. The covariance of patches with the conv's own k x k pixels has eigenvectors
    v of eigenvalue e; v / sqrt(e) answers to each kind of patch with variance 1, and no two answer
    alike. Each stands there with both signs, as ReLU halves it; the largest first, until there are
    no more filters or eigenvectors. The other filters stay random.

    After K. Jordan: 94% on CIFAR-10 in 3.29 seconds (arXiv 2404.00498, Section 3.2), where such a
    layer stays as it is; here it learns on.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    chosen = images[order[:most]].to(normalize.mean.device)
    patches = F.unfold(normalize(chosen), conv.kernel_size).transpose(1, 2)
    patches = patches.flatten(0, 1).double()  # (patches, 3 k k)
    values, vectors = torch.linalg.eigh(patches.T.cov())  # ascending
    count = min(len(values), conv.out_channels // 2)
    # A direction that hardly varies is noise of the file format.
    scale = (values + 1e-3 * values.mean()).rsqrt()
    filters = (vectors * scale).T.flip(0)[:count]  # (count, 3 k k)
    both = torch.cat([filters, -filters]).view(2 * count, *conv.weight.shape[1:])
    conv.weight[: 2 * count] = both.to(conv.weight)
