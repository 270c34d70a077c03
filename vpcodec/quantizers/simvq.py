"""SimVQ: a frozen random codebook under a learned linear map; a baseline."""

from __future__ import annotations

import torch

from .arguments import check_positive
from .base import Quantized, mean_square
from .codebook import CodebookQuantizer


class SimVQ(CodebookQuantizer):
    """`vector_quantize_pytorch.SimVQ` (arXiv 2411.02038) behind our contract.

    The library computes training passes, with autocast off: codes C W with a frozen Gaussian C, the
    rotation trick for the gradient, and the loss mean (sg(z) - c)^2 + 1/4 mean (z - sg(c))^2. In
    eval, tokens come from our own chunked search, because the library holds all N x K distances.

    Args:
        dim: D.
        codebook_size: K.
    """

    def __init__(self, dim: int = 5, codebook_size: int = 1024) -> None:
        from vector_quantize_pytorch import SimVQ as Library

        super().__init__()
        check_positive(dim=dim, codebook_size=codebook_size)
        self.dim = dim
        self.codebook_size = codebook_size
        self.library = Library(dim, codebook_size)
        self.latent_std = (
            3 * dim
        ) ** -0.5  # standard deviation of the library's codes before training

    @property
    def codebook(self) -> torch.Tensor:
        """(K, D) float32 codes, without a gradient."""
        return self.codes()

    def codes(self) -> torch.Tensor:
        with torch.autocast(self.library.frozen_codebook.device.type, enabled=False):
            return self.library.codebook.detach()

    def forward(self, latents: torch.Tensor) -> Quantized:
        """(..., D) latents -> nearest codes."""
        with torch.autocast(latents.device.type, enabled=False):
            z = self.check_latents(latents)
            if not self.training:
                tokens = self.encode(z)
                codes = self.tokens_to_latents(tokens)
                return Quantized(codes, tokens, mean_square(z - codes).detach() * 1.25)
            codes, tokens, loss = self.library(z.reshape(1, -1, self.dim))
            return Quantized(codes.reshape(z.shape), tokens.long().reshape(z.shape[:-1]), loss)
