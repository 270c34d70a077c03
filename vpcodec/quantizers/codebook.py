"""Quantizers with a stored codebook: a token is the index of the nearest code."""

from __future__ import annotations

from abc import abstractmethod

import torch

from .base import Quantizer
from .knn import nearest


class CodebookQuantizer(Quantizer):
    """A quantizer with a codebook of K vectors; subclasses implement training."""

    @abstractmethod
    def codes(self) -> torch.Tensor:
        """(K, D) float32, without a gradient.

        Raises:
            NoCodebookError: there is no codebook yet.
        """

    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        """(..., D) latents -> (...) int64 indices of the nearest codes."""
        with torch.autocast(latents.device.type, enabled=False):
            z = self.check_latents(latents)
            return nearest(z.reshape(-1, self.dim), self.codes()).reshape(z.shape[:-1])

    def tokens_to_latents(self, tokens: torch.Tensor) -> torch.Tensor:
        """(...) integer tokens -> (..., D) float32 codes."""
        return self.codes()[self.check_tokens(tokens)]
