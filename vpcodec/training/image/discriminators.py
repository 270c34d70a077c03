"""A discriminator of image patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from ...recipe.image import DiscriminatorConfig
from ..adversarial import with_noise

CHANNELS = {"small": 32, "full": 64}  # of the first convolution; each doubles them, up to 8 times
SLOPE = 0.2  # of LeakyReLU


class Discriminators(nn.Module):
    """PatchGAN: convolutions that halve width and height, one that does not, and a logit per patch.

    Only the weights are normalised. Batch normalisation would make the loss depend on how a batch
    is divided among processes, and spectral normalisation on how often the network was called,
    because its estimates change with every call.

    Args:
        config: configuration with a `size` other than "none".
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
        """Do nothing: the only discriminator answers all calls."""

    def forward(self, images: torch.Tensor, noise: float = 0.0) -> list[list[torch.Tensor]]:
        """(B, 3, H, W) in [-1, 1] -> [[hidden activations (B, C, h, w), ..., logits (B, 1, h, w)]].

        The convolutions run under the caller's autocast. `noise` is the standard deviation of noise
        added to the images.
        """
        x, layers = with_noise(images, noise), []
        for conv in self.hidden:
            x = F.leaky_relu(conv(x), SLOPE, inplace=True)
            layers.append(x)
        return [[*layers, self.last(x)]]


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, gain: float = 1.0) -> nn.Module:
    """Weight-normed convolution, padded to divide the size by `stride`; `gain` as for weights."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, 1)
    with torch.no_grad():
        nn.init.kaiming_normal_(conv.weight, SLOPE).mul_(gain)
        conv.bias.zero_()
    return weight_norm(conv)
