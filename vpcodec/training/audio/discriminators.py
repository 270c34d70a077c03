"""Discriminators on folded waveforms and on complex spectra."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from ...recipe.audio import DiscriminatorConfig

SLOPE = 0.1  # of LeakyReLU
FLOOR = 0.01  # RMS below which a clip stays quiet: -40 dB


@dataclass(frozen=True)
class _Sizes:
    period_channels: tuple[int, ...]
    stft_channels: tuple[int, ...]
    stft_strides: tuple[int, ...]  # over frequency
    band_edges: tuple[float, ...]  # shares of the spectrum between bands with weights of their own


SIZES = {
    "small": _Sizes((16, 32, 64, 128, 256), (16, 32, 64, 64), (4, 4, 2, 1), (0.25, 0.5)),
    "full": _Sizes(
        (32, 128, 512, 1024, 1024), (32, 32, 32, 32, 32), (1, 2, 2, 2, 1), (0.1, 0.25, 0.5, 0.75)
    ),
}


class Discriminators(nn.Module):
    """All discriminators of a recipe behind one call.

    Each clip loses its mean and is brought to an RMS of 1 before (if louder than -40 dB), so that
    neither offset nor level tell real from decoded audio: the reconstruction losses see to them.

    Args:
        config: `size` other than "none".
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        sizes = SIZES[config.size]
        self.members = nn.ModuleList(
            [_Period(period, sizes) for period in config.periods]
            + [_Spectrum(fft_size, sizes) for fft_size in config.fft_sizes]
        )

    def forward(self, samples: torch.Tensor) -> list[list[torch.Tensor]]:
        """(B, T) -> per discriminator its hidden activations (B, C, ...), then logits (B, 1, ...).

        T: any number above half of the largest FFT size. Spectra are taken in float32; the
        convolutions run under the caller's autocast.
        """
        with torch.autocast(samples.device.type, enabled=False):
            samples = samples.float()
            samples = samples - samples.mean(-1, keepdim=True)
            power = samples.square().mean(-1, keepdim=True)
            samples = samples * (power + FLOOR**2).rsqrt()
        return [member(samples) for member in self.members]


class _Period(nn.Module):
    """Looks at every n-th sample: the wave is folded to rows of one period."""

    def __init__(self, period: int, sizes: _Sizes) -> None:
        super().__init__()
        self.period = period
        channels = sizes.period_channels
        self.hidden = nn.ModuleList(
            _conv(c, d, (5, 1), stride=(3 if i < len(channels) - 1 else 1, 1))
            for i, (c, d) in enumerate(pairwise((1, *channels)))
        )
        self.last = _conv(channels[-1], 1, (3, 1), gain=0.1)

    def forward(self, samples: torch.Tensor) -> list[torch.Tensor]:
        rows = F.pad(samples, (0, -samples.shape[-1] % self.period))
        *hidden, x = _run(self.hidden, rows.unflatten(-1, (-1, self.period)).unsqueeze(1))
        return [*hidden, x, self.last(x)]


class _Spectrum(nn.Module):
    """Looks at real and imaginary part of an STFT, in bands with weights of their own."""

    def __init__(self, fft_size: int, sizes: _Sizes) -> None:
        super().__init__()
        self.fft_size = fft_size
        bins = fft_size // 2 + 1
        self.edges = [round(share * bins) for share in sizes.band_edges]
        window = torch.hann_window(fft_size)
        self.register_buffer("window", window / window.norm(), persistent=False)
        channels, strides = sizes.stft_channels, sizes.stft_strides
        last = len(channels) - 1
        self.bands = nn.ModuleList(
            nn.ModuleList(
                _conv(
                    c,
                    d,
                    (3, 9 if i < last else 3),
                    stride=(1, strides[i]),
                    dilation=(2 ** (i - 1) if 0 < i < last else 1, 1),
                )
                for i, (c, d) in enumerate(pairwise((2, *channels)))
            )
            for _ in range(len(self.edges) + 1)
        )
        self.last = _conv(channels[-1], 1, (3, 3), gain=0.1)

    def forward(self, samples: torch.Tensor) -> list[torch.Tensor]:
        with torch.autocast(samples.device.type, enabled=False):
            spectrum = torch.stft(
                samples, self.fft_size, self.fft_size // 4, window=self.window, return_complex=True
            )
            spectrum = torch.view_as_real(spectrum).permute(0, 3, 2, 1)  # (B, 2, frames, bins)
        bands = spectrum.tensor_split(self.edges, dim=-1)
        hidden = [_run(convs, band) for convs, band in zip(self.bands, bands)]
        x = torch.cat([band[-1] for band in hidden], -1)
        return [*(layer for band in hidden for layer in band), self.last(x)]


def _conv(
    inputs: int,
    outputs: int,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    gain: float = 1.0,
) -> nn.Module:
    """Weight-normed convolution, padded to keep the size; `gain` is that before training."""
    padding = tuple(d * (k // 2) for k, d in zip(kernel, dilation))
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation)
    with torch.no_grad():
        nn.init.kaiming_normal_(conv.weight, SLOPE).mul_(gain)
        conv.bias.zero_()
    return weight_norm(conv)


def _run(convs: nn.ModuleList, x: torch.Tensor) -> list[torch.Tensor]:
    """Activations after each convolution."""
    activations = []
    for conv in convs:
        x = F.leaky_relu(conv(x), SLOPE, inplace=True)
        activations.append(x)
    return activations
