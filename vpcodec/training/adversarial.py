"""Losses of adversarial training, of any discriminators: adversarial and feature matching."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import distributed, nn

from ..quantizers.base import normal_like, processes

PENALTY_STEP = 0.1  # e of the gradient penalty
FEATURE_FLOOR = 1e-3  # of mean activations, which are of order 1

Outputs = list[list[torch.Tensor]]  # per discriminator its hidden activations, then its logits


def discriminator_loss(real: Outputs, fake: Outputs, loss: str = "lsgan") -> torch.Tensor:
    """Loss of the discriminators, given their outputs for real and decoded data.

    Mean over the discriminators. "lsgan" (Mao et al. 2017): mean (1 - D(x))^2 + mean D(y)^2: 0 at
    best, 0.5 if they cannot tell. "relativistic" (Jolicoeur-Martineau 2018), paired: mean
    softplus(D(y) - D(x)): 0 at best, log 2 if they cannot tell. Detach the decoded data before.

    Returns:
        Scalar, float32.
    """
    pairs = zip(_logits(real), _logits(fake), strict=True)
    if loss == "relativistic":
        return _mean(F.softplus(y - x).mean() for x, y in pairs)
    return _mean((1 - x).square().mean() + y.square().mean() for x, y in pairs)


def generator_losses(real: Outputs, fake: Outputs, loss: str = "lsgan") -> dict[str, torch.Tensor]:
    """What the discriminators' outputs for real and decoded data ask of the codec.

    adversarial: mean over the discriminators of mean (1 - D(y))^2 with "lsgan", of
    mean softplus(D(x) - D(y)) with "relativistic". feature: mean |x - y| / mean |x| per hidden
    layer, averaged over the layers of each discriminator, then over these. `real` is detached.

    Returns:
        {"adversarial", "feature"} scalars, float32, unweighted.
    """
    means = iter(joint_means([layer.detach().float() for layers in real for layer in layers[:-1]]))
    pairs = zip(_logits(real), _logits(fake), strict=True)
    if loss == "relativistic":
        adversarial = _mean(F.softplus(x.detach() - y).mean() for x, y in pairs)
    else:
        adversarial = _mean((1 - y).square().mean() for _, y in pairs)
    return {
        "adversarial": adversarial,
        "feature": _mean(
            _mean(
                F.l1_loss(y.float(), x.detach().float()) / next(means).clamp(min=FEATURE_FLOOR)
                for x, y in zip(xs[:-1], ys[:-1])
            )
            for xs, ys in zip(real, fake, strict=True)
        ),
    }


@torch.no_grad()
def winning_chance(real: Outputs, fake: Outputs) -> torch.Tensor:
    """Share of the places where a discriminator rates the real data above the decoded.

    1: it always tells; 0.5: it guesses. Mean over the discriminators; scalar, float32.
    """
    return _mean((x > y).float().mean() for x, y in zip(_logits(real), _logits(fake), strict=True))


def gradient_penalty(
    discriminators: nn.Module, data: torch.Tensor, outputs: Outputs
) -> torch.Tensor:
    """How steep the logits are: a gradient penalty without second derivatives.

    Mean over the discriminators of mean (D(h + e n) - D(h))^2 / e^2, where h is what their first
    convolutions see and n ~ N(0, 1): the expected square of the norm of the gradient (R1 and R2 of
    Mescheder et al. 2018), up to higher orders of e.

    Args:
        discriminators: called with `data` and the standard deviation of the noise, e.
        data: real and decoded, as they were when they gave `outputs`.

    Returns:
        Scalar, float32.
    """
    moved = discriminators(data, PENALTY_STEP)
    pairs = zip(_logits(outputs), _logits(moved), strict=True)
    return _mean((y - x).square().mean() for x, y in pairs) / PENALTY_STEP**2


def with_noise(x: torch.Tensor, std: float) -> torch.Tensor:
    """The same with noise of this standard deviation; without a copy where it is 0."""
    return x + std * normal_like(x) if std else x


@torch.no_grad()
def joint_means(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Means of the magnitudes of each tensor over all processes of the group, as scalars.

    The processes give tensors of the same shapes.
    """
    means = torch.stack([value.abs().mean() for value in values])
    if processes() > 1:
        distributed.all_reduce(means)
        means /= processes()
    return list(means.unbind())


def _logits(outputs: Outputs) -> list[torch.Tensor]:
    return [layers[-1].float() for layers in outputs]


def _mean(terms: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(terms)).mean()
