"""Finite scalar quantization, symmetric, with noise: the baseline of FSP in the VP-VAE paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .arguments import check_share
from .base import Quantized, uniform_like
from .grid import GridQuantizer


class FSQ(GridQuantizer):
    """Each dimension, squashed by z = (tanh(a) + 1) / 2, is rounded to l / (L - 1), l = 0 .. L - 1.

    The outermost points lie on the edges, so their cells are half as wide. In training, each scalar
    is moved by u ~ U(-1/2, 1/2) / (L - 1), the width of a cell, with probability `noise_rate`
    instead of being rounded (arXiv 2411.19842, section 3.2); nothing keeps it within [0, 1]. The
    gradient passes straight through. The output is (z - 1/2) sqrt(12), as for FSP. There is no
    loss.

    We do not use the FSQ of vector-quantize-pytorch: with `noise_dropout`, it adds noise one unit
    wide, not one level, to values that are already rounded; it computes tokens in float32, and
    disables autocast only on CUDA.

    Args:
        levels: points per dimension, each at least 2.
        noise_rate: probability, per scalar, of noise instead of rounding.
    """

    def __init__(self, levels: Sequence[int] = (8, 8, 8, 6, 5), *, noise_rate: float = 0.5) -> None:
        super().__init__(levels)
        check_share(noise_rate=noise_rate)
        self.noise_rate = noise_rate
        self.register_buffer("_steps", self._levels - 1, persistent=False)

    def forward(self, latents: torch.Tensor) -> Quantized:
        """(..., D) pre-activations a -> noisy (training) or rounded (eval) latents."""
        with torch.autocast(latents.device.type, enabled=False):
            z = self._squash(self.check_latents(latents))
            digits = self._digits(z.detach())
            out = self._points(digits)
            if self.training:
                moved = z.detach() + (uniform_like(z) - 0.5) / self._steps
                noisy = uniform_like(z) < self.noise_rate
                out = z + (torch.where(noisy, moved, out) - z.detach())
            return Quantized(self._scale(out), self._tokens(digits), z.new_zeros(()))

    def _squash(self, a: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(a) + 1) / 2

    def _digits(self, z: torch.Tensor) -> torch.Tensor:
        digits = torch.floor(z * self._steps + 0.5).long()
        return torch.minimum(digits.clamp(min=0), self._steps)

    def _points(self, digits: torch.Tensor) -> torch.Tensor:
        return digits / self._steps
