"""Gradient balancer: loss weights become shares of the gradient at the output."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn


class Balancer(nn.Module):
    """Combines the gradients of losses at one output (Defossez et al. 2022, section 3.4).

    With g_i the gradient of loss i at the output and n_i a moving average of its norm, the combined
    gradient is scale * sum_i share_i * g_i / n_i, where the shares are the weights over the sum of
    the weights of the losses that are present. So the influence of a loss is its share, whatever
    its magnitude.

    The norm of a loss is the root mean square, over the items of the batch, of the norm of the
    gradient of an item in a batch of its own: sqrt(B) times the norm of g_i for a mean over B
    items. So the result does not depend on the batch size, nor on the number of processes if all
    have the same number of items and the gradients of parameters are averaged.

    Args:
        weights: name -> weight, not negative; losses with weight 0 are ignored.
        decay: decay of the moving averages.
        scale: norm of the combined gradient of an item if all gradients point the same way.
    """

    total: torch.Tensor
    count: torch.Tensor

    def __init__(self, weights: dict[str, float], decay: float, scale: float = 1.0) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.decay = decay
        self.scale = scale
        self._measured: set[str] = set()  # losses that have an average
        self.register_buffer("total", torch.zeros(len(weights)))  # decayed sums of the norms
        self.register_buffer("count", torch.zeros(len(weights)))  # and of ones

    def gradient(
        self,
        losses: dict[str, torch.Tensor],
        output: torch.Tensor,
        loss_scale: torch.Tensor | float = 1.0,
        *,
        measure: bool = True,
    ) -> torch.Tensor:
        """The combined gradient at `output`, for the caller to backpropagate.

        Updates the averages. A gradient that is exactly zero does not count in its average; one
        that is not finite passes into the result, but not into the average. The gradients of
        parameters are not touched, and the graph is kept.

        Without `measure`, the averages are not updated, and the gradient is that of the weighted
        sum of the losses, in one pass instead of one per loss. If a loss has no average yet, all
        are measured anyway.

        Args:
            losses: name -> scalar function of `output`, with the same names in all processes;
                losses that need no gradient are ignored.
            output: (B, ...), part of the graph of the losses.
            loss_scale: scale of the losses in float16 training; the result is scaled by it too.
            measure: whether to measure the norms of the gradients.

        Returns:
            A gradient with the shape and dtype of `output`; zeros if there is nothing to combine.

        Raises:
            KeyError: a loss has no weight.
        """
        active = {n: x for n, x in losses.items() if self.weights[n] and x.requires_grad}
        if not active:
            return torch.zeros_like(output)
        share = self.scale / sum(self.weights[name] for name in active)
        if not measure and self._measured.issuperset(active):
            averages = dict(zip(self.weights, self._averages()))
            terms = [self.weights[n] / averages[n] * loss for n, loss in active.items()]
            total = share * torch.stack(terms).sum() * loss_scale
            return torch.autograd.grad(total, output, retain_graph=True)[0]
        gradients = {}
        for name, loss in active.items():
            (g,) = torch.autograd.grad(loss * loss_scale, output, retain_graph=True)
            gradients[name] = g.float() / loss_scale
        averages = dict(zip(self.weights, self._update(gradients, output.device)))
        combined = torch.zeros_like(output, dtype=torch.float32)
        for name, g in gradients.items():
            combined += share * self.weights[name] * g / averages[name]
        return (combined * loss_scale).to(output.dtype)

    @torch.no_grad()
    def _update(self, gradients: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
        """Add the norms of the gradients to the averages; returns these, one per weight."""
        zero = torch.zeros((), device=device)  # norm of an absent loss, which does not count
        squares = torch.stack(
            [
                len(g) * torch.linalg.vector_norm(g).square()
                if (g := gradients.get(n)) is not None
                else zero
                for n in self.weights
            ]
        )
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(squares)
            squares /= distributed.get_world_size()
        norms = squares.sqrt()
        counts = torch.isfinite(norms) & (norms > 0)
        self.total = torch.where(counts, self.decay * self.total + norms, self.total)
        self.count = torch.where(counts, self.decay * self.count + 1, self.count)
        self._measured |= set(gradients)
        return self._averages()

    def _averages(self) -> torch.Tensor:
        """Averages of the norms; 1 if none has counted yet, because all were zero or not finite."""
        return torch.where(self.count > 0, self.total / self.count, 1.0)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._measured = {n for n, count in zip(self.weights, self.count.tolist()) if count}
