"""Losses of adversarial training for any discriminators: adversarial and feature matching."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import distributed, nn

from ..quantizers.base import normal_like, processes

PENALTY_STEP = 0.1  # e of the gradient penalty
FEATURE_FLOOR = 1e-3  # smallest divisor of feature matching; mean activations are of order 1

Outputs = list[list[torch.Tensor]]  # of each discriminator: hidden activations, then logits


def discriminator_loss(real: Outputs, fake: Outputs, loss: str = "lsgan") -> torch.Tensor:
    """Loss of the discriminators, given their outputs for real data x and decoded data y.

    "lsgan" (Mao et al. 2017): mean (1 - D(x))^2 + mean D(y)^2, 0 at best and 0.5 by guessing.
    "relativistic" (Jolicoeur-Martineau 2018), paired: mean softplus(D(y) - D(x)), 0 at best and
    log 2 by guessing. Detach the decoded data beforehand.

    Returns:
        Mean over the discriminators, a float32 scalar.
    """
    pairs = zip(_logits(real), _logits(fake), strict=True)
    if loss == "relativistic":
        return _mean(F.softplus(y - x).mean() for x, y in pairs)
    return _mean((1 - x).square().mean() + y.square().mean() for x, y in pairs)


def generator_losses(real: Outputs, fake: Outputs, loss: str = "lsgan") -> dict[str, torch.Tensor]:
    """Losses of the codec, given the discriminators' outputs for real and decoded data.

    adversarial: mean (1 - D(y))^2 with "lsgan", mean softplus(D(x) - D(y)) with "relativistic",
    averaged over the discriminators. feature: mean |x - y| / mean |x| of each hidden layer,
    averaged over the layers of a discriminator, then over the discriminators. `real` is detached.

    Returns:
        {"adversarial", "feature"}: float32 scalars, unweighted.
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
    """Share of the logits that rank the real data above the decoded data.

    1: the discriminators are always right; 0.5: they guess.

    Returns:
        Mean over the discriminators, a float32 scalar.
    """
    return _mean((x > y).float().mean() for x, y in zip(_logits(real), _logits(fake), strict=True))


def gradient_penalty(
    discriminators: nn.Module, data: torch.Tensor, outputs: Outputs
) -> torch.Tensor:
    """A penalty on the gradient of the logits, without second derivatives.

    mean (D(h + e n) - D(h))^2 / e^2, where h is the input of the first convolutions and
    n ~ N(0, 1): up to higher orders of e, the expected squared norm of the gradient (R1 and R2 of
    Mescheder et al. 2018).

    Args:
        discriminators: called with `data` and the standard deviation of the noise, e.
        data: the real and decoded data that gave `outputs`.
        outputs: outputs of the discriminators for `data` without noise.

    Returns:
        Mean over the discriminators, a float32 scalar.
    """
    moved = discriminators(data, PENALTY_STEP)
    pairs = zip(_logits(outputs), _logits(moved), strict=True)
    return _mean((y - x).square().mean() for x, y in pairs) / PENALTY_STEP**2


def with_noise(x: torch.Tensor, std: float) -> torch.Tensor:
    """x plus Gaussian noise of this standard deviation; x itself if it is 0."""
    return x + std * normal_like(x) if std else x


@torch.no_grad()
def joint_means(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Mean magnitude of each tensor over all processes of the group, as scalars.

    The shapes must be the same in all processes.
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
