"""Finite scalar perturbation (VP-VAE paper, section 3.3): a fixed grid over uniform latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .base import Quantized, Quantizer

# Variance of the pre-activation a for which g(a) is (nearly) uniform on [0, 1].
TARGET_VARIANCE = {"tanh": math.pi**2 / 12, "normal": 1.0}
MOMENT_WEIGHTS = (0.1, 0.07)  # of the squared mean and of the squared variance error


class FSP(Quantizer):
    """Quantizer without a codebook: each latent dimension is squashed to [0, 1] and cut in L cells.

    With g the activation, z = g(a), the centroid of cell l is c_l = (l + 1/2) / L. In training a
    token is, with probability `quantize_rate`, replaced by its centroids (straight-through
    gradient), otherwise perturbed by u_i ~ U(-1/(2 L_i), 1/(2 L_i)); a proposal that leaves
    [0, 1]^D in any dimension is rejected and the token passes unchanged (eq. 16 with eta = 1).
    The loss pulls mean and variance of a to those for which z is uniform:
    0.1 mean_d mu_d^2 + 0.07 mean_d (sigma_d^2 - sigma_g^2)^2. The output is (z - 1/2) sqrt(12), of
    unit variance for uniform z.

    Everything runs in float32 and int64 with autocast off: in bf16 nearly every index is wrong.

    Args:
        levels: cells per dimension, each at least 2; token = sum_i digit_i * prod(levels[:i]).
        activation: "tanh" or "normal" (the normal CDF).
        quantize_rate: probability, per token, of quantization instead of perturbation.
    """

    def __init__(
        self,
        levels: Sequence[int] = (9, 9, 9, 7, 7, 7),
        *,
        activation: str = "tanh",
        quantize_rate: float = 0.5,
    ) -> None:
        super().__init__()
        levels = [int(level) for level in levels]
        if not levels or min(levels) < 2:
            raise ValueError(f"levels must be at least 2 each, got {levels}")
        if activation not in TARGET_VARIANCE:
            raise ValueError(f"activation must be one of {list(TARGET_VARIANCE)}, got {activation}")
        if not 0 <= quantize_rate <= 1:
            raise ValueError(f"quantize_rate must be within [0, 1], got {quantize_rate}")
        self.levels = tuple(levels)
        self.dim = len(levels)
        self.codebook_size = math.prod(levels)
        if self.codebook_size > 2**53:
            raise ValueError(f"a codebook of {self.codebook_size} entries is too large")
        self.activation = activation
        self.quantize_rate = quantize_rate
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("_levels", torch.tensor(levels), persistent=False)
        self.register_buffer("_basis", torch.tensor(basis), persistent=False)

    def forward(self, latents: torch.Tensor) -> Quantized:
        """(..., D) pre-activations a -> perturbed (training) or quantized (eval) latents.

        Raises:
            ValueError: the last dimension is not `dim`.
        """
        self._check(latents)
        with torch.autocast(latents.device.type, enabled=False):
            a = latents.float()
            z = self._squash(a)
            digits = self._digits(z.detach())
            centroids = self._centroids(digits)
            if self.training:
                width = 1 / self._levels
                proposal = z.detach() + (torch.rand_like(z) - 0.5) * width
                accepted = ((proposal >= 0) & (proposal <= 1)).all(-1, keepdim=True)
                perturbed = torch.where(accepted, proposal, z.detach())
                quantize = torch.rand_like(z[..., :1]) < self.quantize_rate
                target = torch.where(quantize, centroids, perturbed)
                out = z + (target - z.detach())
                stats = {"accepted": accepted.float().mean()}
            else:
                out, stats = centroids, {}
            return Quantized(self._scale(out), self._tokens(digits), self._moment_loss(a), stats)

    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        """(..., D) pre-activations -> (...) int64 tokens."""
        self._check(latents)
        with torch.autocast(latents.device.type, enabled=False):
            return self._tokens(self._digits(self._squash(latents.float())))

    def tokens_to_latents(self, tokens: torch.Tensor) -> torch.Tensor:
        """(...) int64 tokens -> (..., D) float32 scaled centroids."""
        digits = tokens.long().unsqueeze(-1) // self._basis % self._levels
        return self._scale(self._centroids(digits))

    def latents_to_tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """(..., D) float32 scaled centroids -> (...) int64 tokens, exactly."""
        self._check(latents)
        return self._tokens(self._digits(latents.float() / math.sqrt(12) + 0.5))

    def _check(self, latents: torch.Tensor) -> None:
        if latents.shape[-1] != self.dim:
            raise ValueError(f"expected latents of {self.dim} dimensions, got {latents.shape[-1]}")

    def _squash(self, a: torch.Tensor) -> torch.Tensor:
        if self.activation == "tanh":
            return (torch.tanh(a) + 1) / 2
        return (torch.erf(a / math.sqrt(2)) + 1) / 2

    def _digits(self, z: torch.Tensor) -> torch.Tensor:
        digits = torch.floor(z * self._levels).long()
        return torch.minimum(digits.clamp(min=0), self._levels - 1)

    def _tokens(self, digits: torch.Tensor) -> torch.Tensor:
        return (digits * self._basis).sum(-1)

    def _centroids(self, digits: torch.Tensor) -> torch.Tensor:
        return (digits.float() + 0.5) / self._levels

    def _scale(self, z: torch.Tensor) -> torch.Tensor:
        return (z - 0.5) * math.sqrt(12)

    def _moment_loss(self, a: torch.Tensor) -> torch.Tensor:
        flat = a.reshape(-1, self.dim)
        mean = flat.mean(0)
        variance = flat.var(0, unbiased=False)
        target = TARGET_VARIANCE[self.activation]
        return (
            MOMENT_WEIGHTS[0] * mean.square().mean()
            + MOMENT_WEIGHTS[1] * (variance - target).square().mean()
        )
