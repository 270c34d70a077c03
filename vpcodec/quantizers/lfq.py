"""Lookup-free quantization: one bit per dimension; a baseline."""

from __future__ import annotations

import torch

from .arguments import check_positive
from .base import Quantized, Quantizer, mean_square, processes, sum_with_gradient

MOST_DIMENSIONS = 24  # training holds the average over all 2^D codes in memory


class LFQ(Quantizer):
    """The sign of each dimension (MAGVIT-v2, arXiv 2310.05737): K = 2^D codes in {-1, 1}^D.

    Loss: entropy_weight (E[H(p(c|z))] - H(E[p(c|z)])) + commitment mean (z - sg(c))^2, with
    p(c|z) ~ exp(-|z - c|^2 / temperature): each token should be certain, and together they should
    use every code. p factorises over the dimensions, so the first entropy is a sum over them, and
    the average over all codes is exactly one product of two matrices of 2^(D/2) columns.

    We do not use vector-quantize-pytorch: it holds N x K probabilities, drops the result of its
    all-reduce (two processes get the entropy of half a distribution), and returns int32.

    Args:
        dim: D, bits per token, at most 24.
        entropy_weight: weight of the entropy term.
        commitment: weight of the commitment term.
        temperature: of p(c|z).
    """

    def __init__(
        self,
        dim: int = 14,
        *,
        entropy_weight: float = 0.1,
        commitment: float = 0.25,
        temperature: float = 0.01,
    ) -> None:
        super().__init__()
        check_positive(dim=dim)
        if dim > MOST_DIMENSIONS:
            raise ValueError(f"dim must be at most {MOST_DIMENSIONS}, got {dim}")
        if not (entropy_weight >= 0 and commitment >= 0):
            raise ValueError(f"weights must not be negative, got {entropy_weight} and {commitment}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.dim = dim
        self.codebook_size = 2**dim
        self.entropy_weight = entropy_weight
        self.commitment = commitment
        self.temperature = temperature
        self.register_buffer("_bits", 2 ** torch.arange(dim), persistent=False)

    def forward(self, latents: torch.Tensor) -> Quantized:
        """(..., D) latents -> their signs, with a straight-through gradient."""
        with torch.autocast(latents.device.type, enabled=False):
            z = self.check_latents(latents)
            positive = z > 0
            codes = torch.where(positive, 1.0, -1.0)
            loss = self.commitment * mean_square(z - codes)
            if self.training and z.numel():
                loss = loss + self.entropy_weight * self._entropy_loss(z.reshape(-1, self.dim))
            if self.training:
                codes = z + (codes - z).detach()
            return Quantized(codes, (positive * self._bits).sum(-1), loss)

    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        """(..., D) latents -> (...) int64 tokens, bit i from dimension i."""
        return ((self.check_latents(latents) > 0) * self._bits).sum(-1)

    def tokens_to_latents(self, tokens: torch.Tensor) -> torch.Tensor:
        """(...) integer tokens -> (..., D) float32 signs."""
        bits = self.check_tokens(tokens).unsqueeze(-1) // self._bits % 2
        return bits.float() * 2 - 1

    def _entropy_loss(self, z: torch.Tensor) -> torch.Tensor:
        """(N, D) -> E[H(p(c|z))] - H(E[p(c|z)]) in nats."""
        logits = 4 * z / self.temperature  # |z + 1|^2 - |z - 1|^2 = 4 z
        one, zero = torch.sigmoid(logits), torch.sigmoid(-logits)
        logs = torch.nn.functional.logsigmoid
        sure = -(one * logs(logits) + zero * logs(-logits)).sum(1).mean()
        half = self.dim // 2
        low, high = _joint(one[:, :half], zero[:, :half]), _joint(one[:, half:], zero[:, half:])
        average, count = low.T @ high, z.new_tensor(float(len(z)))
        if processes() > 1:
            average, count = sum_with_gradient(average), sum_with_gradient(count)
        average = average / count
        return sure + (average * average.clamp(min=1e-12).log()).sum()


def _joint(one: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """(N, B) probabilities of independent bits -> (N, 2^B) of all their combinations."""
    joint = one.new_ones(len(one), 1)
    for i in range(one.shape[1]):
        joint = torch.cat([joint * zero[:, i : i + 1], joint * one[:, i : i + 1]], 1)
    return joint
