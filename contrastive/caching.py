"""A batch of any size in the memory of a micro-batch: the same loss, the same gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from torch import Tensor, nn

import functions as fn


class GradientCache(lightning.LightningModule):
    """Gradient caching (Gao et al. 2021, arXiv 2101.06983), to be inherited before a Pretraining.

    Losses of parts of the batch would lack negatives. So the whole batch is embedded, micro-batch
    by micro-batch, without keeping what backward needs. The loss of all embeddings gives its
    gradient with respect to each of them, and each micro-batch is embedded once more to carry that
    gradient on to the weights.
    """

    model: Any
    config: Any

    def embed(self, images: Tensor) -> Tensor:
        self.micro_batches = images.split(self.config.micro_batch_size or len(images))
        with torch.no_grad(), frozen_statistics(self.model):
            parts = [self.embed_again(i) for i in range(len(self.micro_batches))]
        by_view = [z.view(self.config.views, -1, z.shape[1]) for z in parts]
        # A leaf: the graph of the loss ends here.
        self.z = torch.cat(by_view, dim=1).flatten(0, 1).requires_grad_()
        return self.z

    def embed_again(self, i: int) -> Tensor:
        """z of micro-batch i, of the same views each time.

        They are drawn anew from their seed, not stored.
        """
        config = self.config
        torch.manual_seed(fn.mix_seed(config.seed, self.global_step, self.global_rank, i))
        return super().embed(self.micro_batches[i])  # type: ignore[misc]

    def backward(self, loss: Tensor) -> None:
        """From the loss to the gradient of the weights.

        Lightning calls it between training_step and the optimizer.
        """
        loss.backward()
        assert self.z.grad is not None
        by_view = self.z.grad.view(self.config.views, -1, self.z.shape[1])
        parts = by_view.split(len(self.micro_batches[0]), dim=1)
        *others, last = [part.flatten(0, 1) for part in parts]

        autocast = self.trainer.precision_plugin.forward_context
        parameters = list(self.model.parameters())
        for i, gradient in enumerate(others):
            with autocast():
                z = self.embed_again(i)
            found = torch.autograd.grad(z, parameters, gradient)
            for p, g in zip(parameters, found, strict=True):
                # Added up in zeros of its own, for the memory layout of p.
                p.grad = (torch.zeros_like(p) if p.grad is None else p.grad).add_(g)

        # The last one DDP sees: here it averages over the devices what each has added up.
        with autocast():
            z = self.embed_again(len(others))
        z.backward(last)


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by its batch, but leaves its running statistics to a second pass."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
