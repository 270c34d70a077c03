"""Gradient balancer: weights become shares of the gradient at the output."""

from __future__ import annotations

import torch
from torch import distributed, nn


class Balancer(nn.Module):
    """Combines the gradients of losses at one output (Defossez et al. 2022, section 3.4).

    With g_i the gradient of loss i at the output and n_i a moving average of its norm, the combined
    gradient is scale * sum_i share_i * g_i / n_i, where the shares are the weights over the sum of
    the weights of the losses at hand. However large a loss is, its pull is its share.

    The norm of a loss is the root mean square, over the items of the batch, of the norm of the
    gradient that the item would have in a batch of its own: sqrt(B) times the norm of g_i for a
    mean over B items. So the result does not depend on the size of the batch, nor, if each process
    has as many items and the gradients of parameters are averaged, on the number of processes.

    Args:
        weights: name -> weight, not negative; losses of weight 0 are left out.
        decay: of the averages.
        scale: norm of the combined gradient of an item if all losses pull the same way.
    """

    total: torch.Tensor
    count: torch.Tensor

    def __init__(self, weights: dict[str, float], decay: float, scale: float = 1.0) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.decay = decay
        self.scale = scale
        self.register_buffer("total", torch.zeros(len(weights)))  # decayed sum of the norms,
        self.register_buffer("count", torch.zeros(len(weights)))  # and of ones: their average

    def gradient(
        self,
        losses: dict[str, torch.Tensor],
        output: torch.Tensor,
        loss_scale: torch.Tensor | float = 1.0,
    ) -> torch.Tensor:
        """The combined gradient at `output`, for the caller to backpropagate.

        Updates the averages. A gradient that is exactly zero adds nothing and counts for nothing;
        one that is not finite passes into the result, but not into the averages. Leaves the
        gradients of parameters alone; keeps the graph.

        Args:
            losses: name -> scalar, a function of `output` (what does not need a gradient is left
                out); the same names in all processes.
            output: (B, ...), part of the graph of the losses.
            loss_scale: of training in float16: the gradients are those of scaled losses, and the
                result is scaled.

        Returns:
            Shape and dtype of `output`; zeros if there is nothing to combine.

        Raises:
            KeyError: a loss without a weight.
        """
        gradients = {}
        for name, loss in losses.items():
            if self.weights[name] and loss.requires_grad:
                (g,) = torch.autograd.grad(loss * loss_scale, output, retain_graph=True)
                gradients[name] = g.float() / loss_scale
        averages = dict(zip(self.weights, self._update(gradients, output.device)))
        share = self.scale / sum(self.weights[name] for name in gradients) if gradients else 0.0
        combined = torch.zeros_like(output, dtype=torch.float32)
        for name, g in gradients.items():
            combined += share * self.weights[name] * g / averages[name]
        return (combined * loss_scale).to(output.dtype)

    @torch.no_grad()
    def _update(self, gradients: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
        """Put the norms of the gradients into the averages; these, one per weight, not zero."""
        zero = torch.zeros((), device=device)  # of a loss that is not at hand: does not count
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
        # Where nothing has counted yet, gradients are zero or not finite, and stay so.
        return torch.where(self.count > 0, self.total / self.count, 1.0)
