"""Quantizers whose codes are the points of a product of scalar grids.

Tokens are mixed-radix numbers, the first dimension least significant, computed in integers: the
float32 sums of the published code are exact only below 2^24 codes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch

from .arguments import check_levels
from .base import Quantizer


class GridQuantizer(Quantizer):
    """A quantizer on a fixed grid; subclasses implement training.

    Latents are squashed to [0, 1]^D and assigned to the nearest grid point z. Codes are
    (z - 1/2) sqrt(12), which has unit variance for uniform z.

    Args:
        levels: points per dimension, each at least 2; token = sum_i digit_i * prod(levels[:i]).
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = check_levels(levels)
        self.dim = len(self.levels)
        self.codebook_size = math.prod(self.levels)
        places = [math.prod(self.levels[:i]) for i in range(self.dim)]
        self.register_buffer("_levels", torch.tensor(self.levels), persistent=False)
        self.register_buffer("_places", torch.tensor(places), persistent=False)

    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        """(..., D) pre-activations -> (...) int64 tokens."""
        with torch.autocast(latents.device.type, enabled=False):
            digits = self._digits(self._squash(self.check_latents(latents)))
            return self._tokens(digits)

    def tokens_to_latents(self, tokens: torch.Tensor) -> torch.Tensor:
        """(...) integer tokens -> (..., D) float32 scaled points."""
        tokens = self.check_tokens(tokens).unsqueeze(-1)
        # Tokens are not negative; rounding down, not to zero, would take seven nodes in ONNX.
        digits = torch.div(tokens, self._places, rounding_mode="trunc") % self._levels
        return self._scale(self._points(digits))

    def latents_to_tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """(..., D) scaled points -> (...) int64 tokens, exactly."""
        digits = self._digits(self.check_latents(latents) / math.sqrt(12) + 0.5)
        return self._tokens(digits)

    @abstractmethod
    def _squash(self, a: torch.Tensor) -> torch.Tensor:
        """(..., D) pre-activations -> z within [0, 1]."""

    @abstractmethod
    def _digits(self, z: torch.Tensor) -> torch.Tensor:
        """(..., D) z -> (..., D) int64 index of the nearest point in each dimension."""

    @abstractmethod
    def _points(self, digits: torch.Tensor) -> torch.Tensor:
        """(..., D) int64 digits -> (..., D) float32 points within [0, 1]."""

    def _tokens(self, digits: torch.Tensor) -> torch.Tensor:
        """(..., D) int64 digits -> (...) int64 tokens."""
        return (digits * self._places).sum(-1)

    def _scale(self, z: torch.Tensor) -> torch.Tensor:
        return (z - 0.5) * math.sqrt(12)
