"""Muon: momentum whose directions all weigh the same, which learns much from few steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from contrastive.lars import EachParameter

ITERATIONS = 3  # Jordan has five for language models, three in his races on CIFAR-10
A, B, C = 3.4445, -4.7750, 2.0315
"""Jordan's coefficients of x -> A x + B x^3 + C x^5: as steep at 0 as it can be while values stay
near 1. Three iterations take singular values from 0.02 to 1 to between 0.68 and 1.21, and smaller
ones to about 40 times what they were."""


def orthogonalized(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """U V^T, nearly, of a matrix U S V^T (m, n): its directions, without how much each weighs.

    Newton-Schulz iterations, which are products alone, in `dtype`: an odd polynomial of a matrix is
    that polynomial of its singular values. Of zeros it makes zeros.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T  # the smaller side first: smaller products
    # No singular value above 1; before the cast, as float16 has no numbers for a small gradient.
    # Contiguous, as a sum of two layouts is slow.
    x = (x / x.norm().clamp(min=1e-20)).to(dtype).contiguous()
    for _ in range(ITERATIONS):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=B, alpha=C)  # B x x^T + C (x x^T)^2
        x = torch.addmm(x, polynomial, x, beta=A)
    return (x if wide else x.T).to(matrix.dtype)


def orthogonalization_macs(shape: torch.Size) -> int:
    """Multiply-accumulates of `orthogonalized` for a weight of this shape."""
    m, n = sorted((shape[0], shape[1:].numel()))
    return ITERATIONS * (2 * m * m * n + m**3)


class Muon(EachParameter):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), weights keeping their length.

    For a layer's weight W, a row for each output, with gradient G, rate gamma and momentum m:

        V <- m V + G                      (nesterov: then G + m V in place of V)
        W <- W - gamma |W| O / |O|,       O = `orthogonalized`(V)
        W <- W |W before| / |W|

    Why: a few directions dominate the gradient of a layer. Steps along it learn these and hardly
    the rest, steps along O learn all alike. And a weight before a normalisation computes the same
    whatever its length. As that is kept, as in Jordan's races on CIFAR-10 (cifar10-airbench), gamma
    is about the share by which a layer turns in each step, large gradient or small, and there is
    nothing for weight decay to do. He has other optimizers for the first and the last layer; here
    every weight takes part, since z is normalised, too.

    Parameters of one dimension, biases and normalisation, take plain steps with momentum, of the
    same rate, as in `LARS`. A weight of zeros stays as it is. dtype: of the products.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov})
        self.dtype = dtype

    def move(self, w: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        momentum = group["momentum"]
        v = self.velocity(w)
        v.mul_(momentum).add_(g)
        update = g.add(v, alpha=momentum) if group["nesterov"] else v
        if w.ndim <= 1:
            w.sub_(update, alpha=group["lr"])
            return
        length = w.norm()
        # A convolution's channels last, as they lie in memory: there is nothing to copy.
        rows = update.movedim(1, -1)
        o = orthogonalized(rows.flatten(1), self.dtype).view(rows.shape).movedim(-1, 1)
        w.sub_(o * (group["lr"] * length / o.norm().clamp(min=1e-20)))
        w.mul_(length / w.norm().clamp(min=1e-20))
