"""Quantizers whose tokens are the nearest rows of a table of codes."""

from __future__ import annotations

from abc import abstractmethod

import torch

from .base import Quantizer
from .knn import nearest


class TableQuantizer(Quantizer):
    """Everything but training, for a table of codes."""

    @abstractmethod
    def codes(self) -> torch.Tensor:
        """(K, D) float32, without a gradient.

        Raises:
            NoCodebookError: there is no table yet.
        """

    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        """(..., D) latents -> (...) int64 indices of the nearest codes."""
        with torch.autocast(latents.device.type, enabled=False):
            z = self.check_latents(latents)
            return nearest(z.reshape(-1, self.dim), self.codes()).reshape(z.shape[:-1])

    def tokens_to_latents(self, tokens: torch.Tensor) -> torch.Tensor:
        """(...) integer tokens -> (..., D) float32 codes."""
        return self.codes()[self.check_tokens(tokens)]
