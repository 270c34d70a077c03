"""Losses of adversarial training: least squares and feature matching, of any discriminators."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import distributed

from ..quantizers.base import processes

FEATURE_FLOOR = 1e-3  # of mean activations, which are of order 1

Outputs = list[list[torch.Tensor]]  # per discriminator its hidden activations, then its logits


def discriminator_loss(real: Outputs, fake: Outputs) -> torch.Tensor:
    """LSGAN loss of the discriminators, given their outputs for real and decoded data.

    Mean over the discriminators of mean (1 - D(x))^2 + mean D(y)^2: 0 at best, 0.5 if they cannot
    tell. Detach the decoded data before.

    Returns:
        Scalar, float32.
    """
    return _mean(
        (1 - x[-1].float()).square().mean() + y[-1].float().square().mean()
        for x, y in zip(real, fake, strict=True)
    )


def generator_losses(real: Outputs, fake: Outputs) -> dict[str, torch.Tensor]:
    """What the discriminators' outputs for real and decoded data ask of the codec.

    adversarial: mean over the discriminators of mean (1 - D(y))^2. feature: mean |x - y| / mean |x|
    per hidden layer, averaged over the layers of each discriminator, then over these; `real` is
    detached.

    Returns:
        {"adversarial", "feature"} scalars, float32, unweighted.
    """
    means = iter(joint_means([layer.detach().float() for layers in real for layer in layers[:-1]]))
    return {
        "adversarial": _mean((1 - y[-1].float()).square().mean() for y in fake),
        "feature": _mean(
            _mean(
                F.l1_loss(y.float(), x.detach().float()) / next(means).clamp(min=FEATURE_FLOOR)
                for x, y in zip(xs[:-1], ys[:-1])
            )
            for xs, ys in zip(real, fake, strict=True)
        ),
    }


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


def _mean(terms: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(terms)).mean()
