"""The contract that every quantizer keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class Quantized:
    """What a quantizer returns.

    Attributes:
        latents: (..., D) float32, what the decoder sees: perturbed in training, codes in eval.
        tokens: (...) int64, the index of the nearest code.
        loss: scalar float32, the quantizer's own loss, unweighted.
        stats: scalars worth logging.
    """

    latents: torch.Tensor
    tokens: torch.Tensor
    loss: torch.Tensor
    stats: dict[str, torch.Tensor] = field(default_factory=dict)


class Quantizer(nn.Module, ABC):
    """Latents (..., D) to tokens (...) and back; float32, int64 inside, whatever the autocast."""

    dim: int
    codebook_size: int

    @abstractmethod
    def forward(self, latents: torch.Tensor) -> Quantized:
        """Perturb or quantize (..., D) latents."""

    @abstractmethod
    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        """(..., D) latents before the quantizer -> (...) int64 tokens."""

    @abstractmethod
    def tokens_to_latents(self, tokens: torch.Tensor) -> torch.Tensor:
        """(...) int64 tokens -> (..., D) float32 codes, as the decoder sees them."""

    @abstractmethod
    def latents_to_tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """(..., D) codes as `tokens_to_latents` gives them -> (...) int64 tokens, exactly."""
