"""LARS, the paper's optimizer: a rate of its own for every layer, which large batches need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class EachParameter(torch.optim.Optimizer):
    """An optimizer that moves one parameter after the other, each with a momentum of its own."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    self.move(w, w.grad, group)
        return loss

    def move(self, w: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        """One step of one parameter w with gradient g, in place."""
        raise NotImplementedError

    def velocity(self, w: Tensor) -> Tensor:
        """What momentum has gathered for a parameter: zeros before its first step."""
        state = self.state[w]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(w)
        return state["momentum_buffer"]


class LARS(EachParameter):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017, arXiv 1708.03888).

    For a layer's weight w with gradient g, rate gamma, momentum m and weight decay beta:

        lambda = trust * |w| / (|g| + beta * |w|)                   (Eq. 6)
        v <- m * v + gamma * lambda * (g + beta * w),  w <- w - v   (Algorithm 1)

    So every layer moves by the same share of its own length, however large its gradient is.
    Parameters of one dimension, biases and normalisation, take plain steps with momentum, as in
    the SimCLR paper (Appendix B.1): lambda is 1 for them. `nesterov` looks a step ahead.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        nesterov: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "trust": trust, "nesterov": nesterov})

    def move(self, w: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        beta, momentum = group["weight_decay"], group["momentum"]
        update = g.add(w, alpha=beta)
        if w.ndim > 1:
            length, slope = w.norm(), g.norm()
            ratio = group["trust"] * length / (slope + beta * length)
            # A weight or a gradient that is all zero says nothing about the layer's scale.
            update *= torch.where((length > 0) & (slope > 0), ratio, 1.0)
        update *= group["lr"]

        v = self.velocity(w)
        v.mul_(momentum).add_(update)
        w.sub_(update.add(v, alpha=momentum) if group["nesterov"] else v)
