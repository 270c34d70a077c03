"""Discriminators on folded waveforms and on complex spectra."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from ...recipe.audio import DiscriminatorConfig
from ..adversarial import with_noise

SLOPE = 0.1  # of LeakyReLU
FLOOR = 0.01  # RMS, -40 dB; much quieter clips are not amplified to full level
MAGNITUDE_FLOOR = 1e-3  # for spectra of clips with an RMS of 1
FRAME_WIDTH = 192  # channels of the discriminators at frame rate


@dataclass(frozen=True)
class _Sizes:
    period_channels: tuple[int, ...]
    stft_channels: tuple[int, ...]
    stft_strides: tuple[int, ...]  # over frequency
    band_edges: tuple[float, ...]  # between bands with separate weights, 1: the Nyquist frequency


SIZES = {
    "small": _Sizes((16, 32, 64, 128, 256), (16, 32, 64, 64), (4, 4, 2, 1), (0.25, 0.5)),
    "full": _Sizes(
        (32, 128, 512, 1024, 1024), (32, 32, 32, 32, 32), (1, 2, 2, 2, 1), (0.1, 0.25, 0.5, 0.75)
    ),
}


class Discriminators(nn.Module):
    """All discriminators of a recipe in one module.

    Clips are normalised to zero mean and an RMS of 1 first (if louder than -40 dB), so that neither
    offset nor level distinguishes real from decoded audio; the reconstruction losses cover both.

    Args:
        config: configuration with a `size` other than "none".
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        if config.size == "frame":
            members: list[nn.Module] = [
                *(_FrameSpectrum(fft_size) for fft_size in config.fft_sizes),
                *(_FramePeriod(period) for period in config.periods),
            ]
        else:
            sizes = SIZES[config.size]
            members = [
                *(_Period(period, sizes) for period in config.periods),
                *(_Spectrum(fft_size, sizes) for fft_size in config.fft_sizes),
            ]
        self.members = nn.ModuleList(members)
        self.per_step = config.per_step
        self.chosen = list(range(len(members)))

    def draw(self) -> None:
        """Draw the members that answer the next calls, if `per_step` is set."""
        if self.per_step is not None:
            order = torch.randperm(len(self.members))[: self.per_step]
            self.chosen = sorted(order.tolist())

    def forward(self, samples: torch.Tensor, noise: float = 0.0) -> list[list[torch.Tensor]]:
        """Outputs of the discriminators for (B, T) samples.

        Spectra are computed in float32; the convolutions run under the caller's autocast.

        Args:
            samples: (B, T); T is more than half of the largest FFT size, or at least the whole of
                it for discriminators at frame rate.
            noise: standard deviation of noise added to the input of each first convolution.

        Returns:
            For each discriminator its hidden activations (B, C, ...), then logits (B, 1, ...); with
            B * period items instead of B for those at frame rate that fold the waveform.
        """
        with torch.autocast(samples.device.type, enabled=False):
            samples = samples.float()
            samples = samples - samples.mean(-1, keepdim=True)
            power = samples.square().mean(-1, keepdim=True)
            samples = samples * (power + FLOOR**2).rsqrt()
        return [self.members[i](samples, noise) for i in self.chosen]


class _Period(nn.Module):
    """Multi-period discriminator: 2-D convolutions on the waveform folded into rows of a period."""

    def __init__(self, period: int, sizes: _Sizes) -> None:
        super().__init__()
        self.period = period
        channels = sizes.period_channels
        self.hidden = nn.ModuleList(
            _conv(c, d, (5, 1), stride=(3 if i < len(channels) - 1 else 1, 1))
            for i, (c, d) in enumerate(pairwise((1, *channels)))
        )
        self.last = _conv(channels[-1], 1, (3, 1), gain=0.1)

    def forward(self, samples: torch.Tensor, noise: float) -> list[torch.Tensor]:
        rows = F.pad(samples, (0, -samples.shape[-1] % self.period))
        rows = rows.unflatten(-1, (-1, self.period)).unsqueeze(1)
        *hidden, x = _run(self.hidden, with_noise(rows, noise))
        return [*hidden, x, self.last(x)]


class _Spectrum(nn.Module):
    """Discriminator of the real and imaginary parts of an STFT, with separate weights per band."""

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

    def forward(self, samples: torch.Tensor, noise: float) -> list[torch.Tensor]:
        with torch.autocast(samples.device.type, enabled=False):
            spectrum = torch.stft(
                samples, self.fft_size, self.fft_size // 4, window=self.window, return_complex=True
            )
            spectrum = torch.view_as_real(spectrum).permute(0, 3, 2, 1)  # (B, 2, frames, bins)
        bands = with_noise(spectrum, noise).tensor_split(self.edges, dim=-1)
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
    """Weight-normed convolution, padded to keep the size; `gain` scales its initial weights."""
    padding = tuple(d * (k // 2) for k, d in zip(kernel, dilation))
    return _normed(nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation), gain)


def _conv1d(
    inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1, gain: float = 1.0
) -> nn.Module:
    """As `_conv`, over time only."""
    padding = dilation * (kernel // 2)
    return _normed(nn.Conv1d(inputs, outputs, kernel, stride, padding, dilation), gain)


def _normed(conv: nn.Conv1d | nn.Conv2d, gain: float) -> nn.Module:
    with torch.no_grad():
        nn.init.kaiming_normal_(conv.weight, SLOPE).mul_(gain)
        conv.bias.zero_()
    return weight_norm(conv)


def _run(convs: Iterable[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """Activations after each convolution."""
    activations = []
    for conv in convs:
        x = F.leaky_relu(_convolve(conv, x), SLOPE, inplace=True)
        activations.append(x)
    return activations


def _convolve(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`conv(x)`, as a matrix product for rows no longer than the padding under CPU autocast.

    oneDNN's bf16 convolutions of such rows return NaN on processors with AMX (torch 2.11). The
    parts of the kernel that only see padding are left out.
    """
    width, middle = x.shape[-1], conv.padding[-1]
    half = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if not (half and isinstance(conv, nn.Conv2d) and width <= middle):
        return conv(x)
    weight = conv.weight[..., middle - width + 1 : middle + width]
    padding = (conv.padding[0], width - 1)
    columns = F.unfold(x, weight.shape[2:], conv.dilation, padding, conv.stride)
    y = F.linear(columns.transpose(1, 2), weight.flatten(1), conv.bias).transpose(1, 2)
    return y.unflatten(2, (-1, (width - 1) // conv.stride[1] + 1))


class _FrameSpectrum(nn.Module):
    """Discriminator of STFT frames: two convolutions over time and frequency, then over time only.

    It has few activations, all dense, so that it is cheap on a CPU. Its input is the log magnitude,
    and the real and imaginary parts divided by magnitude^0.7.
    """

    def __init__(self, fft_size: int) -> None:
        super().__init__()
        self.fft_size = fft_size
        window = torch.hann_window(fft_size)
        self.register_buffer("window", window / window.norm(), persistent=False)
        self.hidden = nn.ModuleList(
            [
                _conv(3, 16, (3, 9), stride=(1, 4)),
                _conv(16, 32, (3, 9), stride=(1, 4)),
            ]
        )
        self.mix = _conv1d(32 * fft_size // 32, FRAME_WIDTH, 1)
        self.frames = nn.ModuleList(
            _conv1d(FRAME_WIDTH, FRAME_WIDTH, 3, dilation=d) for d in (1, 1, 2)
        )
        self.last = _conv1d(FRAME_WIDTH, 1, 3, gain=0.1)

    def forward(self, samples: torch.Tensor, noise: float) -> list[torch.Tensor]:
        with torch.autocast(samples.device.type, enabled=False):
            size = self.fft_size
            spectrum = torch.stft(
                samples, size, size // 4, window=self.window, center=False, return_complex=True
            )
            spectrum = torch.view_as_real(spectrum[:, 1:]).permute(0, 3, 2, 1)  # without DC
            power = spectrum.square().sum(1, keepdim=True) + MAGNITUDE_FLOOR**2
            parts = torch.cat([0.5 * power.log10(), spectrum * power**-0.35], 1)
        hidden = _run(self.hidden, with_noise(parts, noise))
        x = hidden[-1].permute(0, 1, 3, 2).flatten(1, 2)
        rest = _run([self.mix, *self.frames], x)
        return [*hidden, *rest, self.last(rest[-1])]


class _FramePeriod(nn.Module):
    """Discriminator of every n-th sample: 1-D convolutions on each of the n sequences."""

    def __init__(self, period: int) -> None:
        super().__init__()
        self.period = period
        channels = (1, 16, 48, 128, FRAME_WIDTH)
        self.hidden = nn.ModuleList(
            _conv1d(c, d, 5, stride=3 if i < len(channels) - 2 else 1)
            for i, (c, d) in enumerate(pairwise(channels))
        )
        self.last = _conv1d(FRAME_WIDTH, 1, 3, gain=0.1)

    def forward(self, samples: torch.Tensor, noise: float) -> list[torch.Tensor]:
        rows = F.pad(samples, (0, -samples.shape[-1] % self.period))
        rows = rows.unflatten(-1, (-1, self.period)).transpose(1, 2).flatten(0, 1)
        hidden = _run(self.hidden, with_noise(rows.unsqueeze(1), noise))
        return [*hidden, self.last(hidden[-1])]
