"""Finite scalar perturbation (VP-VAE paper, section 3.3): a fixed grid over uniform latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .arguments import check_share
from .base import Quantized, moment_loss, uniform_like
from .grid import GridQuantizer

# Variance of the pre-activation a for which g(a) is (nearly) uniform on [0, 1].
TARGET_VARIANCE = {
    "tanh": math.pi**2 / 12,
    "normal": 1.0,
    "sigmoid": math.pi**2 / 3,
    "laplace": 2.0,
}
REJECTIONS = ("vector", "dimension")


class FSP(GridQuantizer):
    """Quantizer without a learned codebook: each latent dimension is squashed to [0, 1] and cut
    into L cells.

    With z = g(a), g being the activation, the centroid of cell l is c_l = (l + 1/2) / L. In
    training, a token is replaced by its centroids with probability `quantize_rate`
    (straight-through gradient), and otherwise perturbed by u_i ~ U(-eta/(2 L_i), eta/(2 L_i)) (eq.
    16). A proposal that leaves [0, 1]^D is rejected, and the token passes unchanged; for uniform z,
    eta / (4 L_i) of the proposals leave dimension i. The loss pulls the mean and variance of a to
    those that make z uniform (`moment_loss`). The output is (z - 1/2) sqrt(12), which has unit
    variance for uniform z.

    Everything runs in float32 and int64 with autocast off: in bf16 nearly every index is wrong.

    Args:
        levels: cells per dimension, each at least 2; token = sum_i digit_i * prod(levels[:i]).
        activation: "tanh", "normal", "sigmoid" or "laplace"; the last three are CDFs.
        quantize_rate: probability, per token, of quantization instead of perturbation.
        rejection: "vector" (the paper): if one dimension leaves [0, 1], the whole token passes
            unchanged; "dimension": only that dimension does.
        eta: width of the perturbation, relative to the width of a cell.

    Raises:
        ValueError: levels below 2, an unknown activation or rejection, a rate outside [0, 1], or
            eta outside (0, 2] (beyond 2, a proposal could leave on both sides).
    """

    def __init__(
        self,
        levels: Sequence[int] = (9, 9, 9, 7, 7, 7),
        *,
        activation: str = "tanh",
        quantize_rate: float = 0.5,
        rejection: str = "vector",
        eta: float = 1.0,
    ) -> None:
        super().__init__(levels)
        if activation not in TARGET_VARIANCE:
            raise ValueError(f"activation must be one of {list(TARGET_VARIANCE)}, got {activation}")
        if rejection not in REJECTIONS:
            raise ValueError(f"rejection must be one of {list(REJECTIONS)}, got {rejection}")
        if not 0 < eta <= 2:
            raise ValueError(f"eta must be within (0, 2], got {eta}")
        check_share(quantize_rate=quantize_rate)
        self.latent_std = math.sqrt(TARGET_VARIANCE[activation])
        self.activation = activation
        self.quantize_rate = quantize_rate
        self.rejection = rejection
        self.eta = eta

    def forward(self, latents: torch.Tensor) -> Quantized:
        """(..., D) pre-activations a -> perturbed (training) or quantized (eval) latents."""
        with torch.autocast(latents.device.type, enabled=False):
            a = self.check_latents(latents)
            z = self._squash(a)
            digits = self._digits(z.detach())
            centroids = self._points(digits)
            if self.training:
                proposal = z.detach() + (uniform_like(z) - 0.5) * (self.eta / self._levels)
                accepted = (proposal >= 0) & (proposal <= 1)
                if self.rejection == "vector":
                    accepted = accepted.all(-1, keepdim=True)
                perturbed = torch.where(accepted, proposal, z.detach())
                quantize = uniform_like(z[..., :1]) < self.quantize_rate
                target = torch.where(quantize, centroids, perturbed)
                out = z + (target - z.detach())
                stats = {"accepted": accepted.float().mean()}
            else:
                out, stats = centroids, {}
            loss = moment_loss(a, TARGET_VARIANCE[self.activation], shared=self.training)
            return Quantized(self._scale(out), self._tokens(digits), loss, stats)

    def _squash(self, a: torch.Tensor) -> torch.Tensor:
        if self.activation == "tanh":
            return (torch.tanh(a) + 1) / 2
        if self.activation == "normal":
            return (torch.erf(a / math.sqrt(2)) + 1) / 2
        if self.activation == "sigmoid":
            return torch.sigmoid(a)
        left, right = torch.exp(a.clamp(max=0)) / 2, torch.exp(-a.clamp(min=0)) / 2
        return torch.where(a < 0, left, 1 - right)

    def _digits(self, z: torch.Tensor) -> torch.Tensor:
        digits = torch.floor(z * self._levels).long()
        return torch.minimum(digits.clamp(min=0), self._levels - 1)

    def _points(self, digits: torch.Tensor) -> torch.Tensor:
        return (digits.float() + 0.5) / self._levels
