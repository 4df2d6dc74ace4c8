"""The kin of NT-Xent: more than two views of an image, and the positive out of the denominator."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functions import nt_xent_loss


def contrastive_loss(
    embeddings: Tensor,
    views: int = 2,
    temperature: float = 0.5,
    positives: str = "each",
    decoupled: bool = False,
    block: int | None = None,
) -> Tensor:
    """NT-Xent for M views of each of N images, averaged over all anchors. A scalar.

    embeddings: (M N, D); rows i, i + N, i + 2 N ... are the views of image i. positives:

    - each: an anchor z and each other view z+ of its image in turn. What else is of its image is
      left out, so that only views of other images are negatives (Tian et al. 2020, Poly-View of
      Shidani et al. 2024):

          -log( exp(sim(z, z+) / tau) / (exp(sim(z, z+) / tau) + sum over others of exp(...)) )

    - mean: NT-Xent between a view and the normalised mean of its image's other views.

    decoupled: the positive is left out of the denominator (Yeh et al. 2022, arXiv 2110.06848, Eq.
    6), so that a pair that is alike already still learns. With two views, and not decoupled, all
    of it is `nt_xent_loss`. Raises ValueError for rows that are no multiple of M.
    """
    if views < 2 or len(embeddings) % views or len(embeddings) == 0:
        shape = tuple(embeddings.shape)
        raise ValueError(f"embeddings must be (M N, D) with M = {views} >= 2, N >= 1, got {shape}")
    if views == 2 and not decoupled:
        return nt_xent_loss(embeddings, temperature, block)

    with torch.autocast(embeddings.device.type, enabled=False):
        z = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
        z = F.normalize(z, dim=1)
        rows = block or (512 if z.device.type == "cpu" else 4096)
        if positives == "each" or views == 2:
            return EachPositive.apply(z, views, temperature, decoupled, rows)

        by_view = z.unflatten(0, (views, -1))  # (M, N, D)
        # The normalised mean of the others, which is their normalised sum.
        targets = F.normalize(by_view.sum(0) - by_view, dim=2)
        pairs = torch.cat([by_view, targets], dim=1)  # (M, 2 N, D): each view with its targets
        losses = [
            EachPositive.apply(pair, 2, temperature, decoupled, rows)
            if decoupled
            else nt_xent_loss(pair, temperature, block)
            for pair in pairs
        ]
        return torch.stack(losses).mean()


class EachPositive(torch.autograd.Function):
    """The loss of `contrastive_loss` with each positive, on unit vectors z (M N, D), and its
    gradient while each block of rows is at hand.

    For an anchor with logits s = sim / tau, let n = log of the sum of exp(s) over its negatives.
    Its loss with one positive p is log(exp(s_p) + exp(n)) - s_p = softplus(n - s_p), decoupled
    n - s_p. So with c_p = sigmoid(n - s_p), decoupled 1, the gradient with respect to its logits is

        -c_p / (M - 1) for a positive,   (mean of c_p) * exp(s_k - n) for a negative k.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, views: int, temperature: float, decoupled: bool, block: int
    ) -> Tensor:
        total, n = len(z), len(z) // views
        loss = z.new_zeros(())
        gradient = torch.zeros_like(z)
        turns = torch.arange(1, views, device=z.device) * n  # from a view to the image's others

        for start in range(0, total, block):
            rows = torch.arange(start, min(start + block, total), device=z.device)
            others = (rows.unsqueeze(1) + turns) % total  # (block, M - 1): the positives
            own = torch.cat([rows.unsqueeze(1), others], dim=1)  # (block, M): of the same image

            logits = (z[rows] / temperature) @ z.T  # (block, M N)
            positive = logits.gather(1, others)  # (block, M - 1)
            logits.scatter_(1, own, -torch.inf)  # what is left are the negatives
            negative = logits.logsumexp(1, keepdim=True)  # (block, 1)
            if decoupled:
                loss += (negative - positive).mean(1).sum()
                pull = torch.ones_like(positive)
            else:
                loss += F.softplus(negative - positive).mean(1).sum()
                pull = torch.sigmoid(negative - positive)

            if ctx.needs_input_grad[0]:
                slope = (logits - negative).exp_().mul_(pull.mean(1, keepdim=True))
                slope.scatter_(1, others, -pull / (views - 1))
                gradient[start : start + len(rows)].addmm_(slope, z)  # as anchors
                gradient.addmm_(slope.T, z[rows])  # as what anchors are compared with

        ctx.save_for_backward(gradient.div_(total * temperature))
        return loss / total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None, None, None
