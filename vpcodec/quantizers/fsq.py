"""Finite scalar quantization, symmetric, with noise: what the VP-VAE paper compares FSP with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .base import Quantized, Quantizer, check_levels, check_share
from .grid import digits_to_tokens, tokens_to_digits


class FSQ(Quantizer):
    """Each dimension, squashed by z = (tanh(a) + 1) / 2, is rounded to l / (L - 1), l = 0 .. L - 1.

    The outermost points lie on the edges, so their cells are half as wide. In training every scalar
    is, with probability `noise_rate`, not rounded but moved by u ~ U(-1/2, 1/2) / (L - 1), the
    width of a cell (arXiv 2411.19842, section 3.2); nothing keeps it within [0, 1]. Rounding passes
    the gradient straight through. The output is (z - 1/2) sqrt(12), as for FSP. No loss.

    Our own: the FSQ of vector-quantize-pytorch adds, with `noise_dropout`, noise of the width of
    one unit, not of one level, to values that are already rounded, computes tokens in float32, and
    switches autocast off on CUDA alone.

    Args:
        levels: points per dimension, each at least 2.
        noise_rate: probability, per scalar, of noise instead of rounding.
    """

    def __init__(self, levels: Sequence[int] = (8, 8, 8, 6, 5), *, noise_rate: float = 0.5) -> None:
        super().__init__()
        self.levels = check_levels(levels)
        check_share(noise_rate=noise_rate)
        self.dim = len(self.levels)
        self.codebook_size = math.prod(self.levels)
        self.noise_rate = noise_rate
        self.register_buffer("_steps", torch.tensor(self.levels) - 1, persistent=False)

    def forward(self, latents: torch.Tensor) -> Quantized:
        """(..., D) pre-activations a -> noisy (training) or rounded (eval) latents."""
        with torch.autocast(latents.device.type, enabled=False):
            z = (torch.tanh(self.check_latents(latents)) + 1) / 2
            digits = self._digits(z.detach())
            out = digits / self._steps
            if self.training:
                moved = z.detach() + (torch.rand_like(z) - 0.5) / self._steps
                noisy = torch.rand_like(z) < self.noise_rate
                out = z + (torch.where(noisy, moved, out) - z.detach())
            tokens = digits_to_tokens(digits, self.levels)
            return Quantized(self._scale(out), tokens, z.new_zeros(()))

    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        """(..., D) pre-activations -> (...) int64 tokens."""
        with torch.autocast(latents.device.type, enabled=False):
            z = (torch.tanh(self.check_latents(latents)) + 1) / 2
            return digits_to_tokens(self._digits(z), self.levels)

    def tokens_to_latents(self, tokens: torch.Tensor) -> torch.Tensor:
        """(...) integer tokens -> (..., D) float32 scaled points."""
        return self._scale(tokens_to_digits(self.check_tokens(tokens), self.levels) / self._steps)

    def latents_to_tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """(..., D) scaled points -> (...) int64 tokens, exactly."""
        digits = self._digits(self.check_latents(latents) / math.sqrt(12) + 0.5)
        return digits_to_tokens(digits, self.levels)

    def _digits(self, z: torch.Tensor) -> torch.Tensor:
        digits = torch.floor(z * self._steps + 0.5).long()
        return torch.minimum(digits.clamp(min=0), self._steps)

    def _scale(self, z: torch.Tensor) -> torch.Tensor:
        return (z - 0.5) * math.sqrt(12)
