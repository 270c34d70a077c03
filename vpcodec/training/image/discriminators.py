"""A discriminator of the patches of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from ...recipe.image import DiscriminatorConfig
from ..adversarial import with_noise

CHANNELS = {"small": 32, "full": 64}  # of the first convolution; they double up to 8 times as many
SLOPE = 0.2  # of LeakyReLU


class Discriminators(nn.Module):
    """PatchGAN: convolutions that halve width and height, one more, and a logit per place.

    Weights are normalised and activations are not: statistics of a batch would make the loss depend
    on how the batch is shared among processes, and spectral norms are estimates that change with
    every call, so that a step would depend on how often the network was asked before.

    Args:
        config: `size` other than "none".
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        first = CHANNELS[config.size]
        widths = [3, *(first * min(2**i, 8) for i in range(config.layers + 1))]
        self.hidden = nn.ModuleList(
            _conv(a, b, 4, stride=2) for a, b in zip(widths[:-1], widths[1:-1])
        )
        self.hidden.append(_conv(widths[-2], widths[-1], 3))
        self.last = _conv(widths[-1], 1, 3, gain=0.1)

    def draw(self) -> None:
        """There is one alone, which answers all calls."""

    def forward(self, images: torch.Tensor, noise: float = 0.0) -> list[list[torch.Tensor]]:
        """(B, 3, H, W) in [-1, 1] -> [[hidden activations (B, C, h, w), ..., logits (B, 1, h, w)]].

        The convolutions run under the caller's autocast. `noise`: its standard deviation, added to
        the images.
        """
        x, layers = with_noise(images, noise), []
        for conv in self.hidden:
            x = F.leaky_relu(conv(x), SLOPE, inplace=True)
            layers.append(x)
        return [[*layers, self.last(x)]]


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, gain: float = 1.0) -> nn.Module:
    """Weight-normed convolution that divides the size by `stride`; `gain` before training."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, 1)
    with torch.no_grad():
        nn.init.kaiming_normal_(conv.weight, SLOPE).mul_(gain)
        conv.bias.zero_()
    return weight_norm(conv)
