"""TPooling and the two blocks that use it: TConv (encoder) and EnhanceBlock (decoder)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .layers import Causal, State, convolve_row, gelu, init_bias, linear, rowwise


def sliding_max(x: torch.Tensor, window: int, *, covered: int = 1) -> torch.Tensor:
    """Maxima over a sliding window.

    Args:
        x: (..., T), already maxima over `covered` steps each.
        window: steps of the window.
        covered: steps that each value covers so far.

    Returns:
        (..., T - (window - covered)) maxima over `window` steps.
    """
    while covered < window:
        shift = min(covered, window - covered)
        x = torch.maximum(x[..., shift:], x[..., :-shift])
        covered += shift
    return x


def tpool(x: torch.Tensor, window: int) -> torch.Tensor:
    """TPooling (L3AC, section 3): AvgPool_K(MaxPool_K(|x|)), looking back only.

    Args:
        x: (B, C, T), or (B, C, 1, T) as images of height 1; the first 2 (K - 1) steps are history.
        window: K; 1 is the identity, which keeps the sign.

    Returns:
        T - 2 (K - 1) steps: an envelope at time scale K.
    """
    if window == 1:
        return x
    # With max_pool1d, torch.export would fix the length as a constant.
    return F.avg_pool2d(F.max_pool2d(x.abs(), (1, window), 1), (1, window), 1)


class TConv(Causal):
    """First block: envelopes of the waveform at several time scales, then a strided convolution.

    Each branch has one channel, and the convolution includes the first downsampling, so that no
    wide layer runs at the full rate.

    Args:
        windows: TPooling windows, samples; 1 is the waveform itself.
        hidden: channels of the strided convolution.
        out_channels: channels after the 1x1 convolution.
        stride: downsampling factor.
        taps: kernel size of the strided convolution, samples.
    """

    def __init__(
        self, windows: Sequence[int], hidden: int, out_channels: int, *, stride: int, taps: int
    ) -> None:
        super().__init__()
        self.windows = tuple(windows)
        self.conv = nn.Conv1d(len(windows), hidden, taps, stride)
        nn.init.trunc_normal_(self.conv.weight, std=1 / math.sqrt(taps))
        init_bias(self.conv)
        self.mix = linear(hidden, out_channels)
        self.norm = nn.LayerNorm(out_channels, eps=1e-6)
        self._lookback = 2 * (max(windows) - 1)
        self.state_shape = (1, self._lookback + taps - stride)

    def forward(self, x: torch.Tensor, state: State | None = None) -> torch.Tensor:
        """(B, 1, T) samples, T a multiple of the stride -> (B, C, T / stride)."""
        x = self.with_history(x, state)
        y = convolve_row(self.conv, torch.cat(self._branches(x), 1).unsqueeze(2)).squeeze(2)
        y = rowwise(self.mix, gelu(y).transpose(1, 2))
        return self.norm(y).transpose(1, 2)

    def _branches(self, x: torch.Tensor) -> list[torch.Tensor]:
        """`tpool` for each window, with maxima computed from those of the next smaller window."""
        pooled, maxima, covered = {}, x.abs(), 1
        for window in sorted(set(self.windows)):
            maxima, covered = sliding_max(maxima, window, covered=covered), window
            surplus = self._lookback - 2 * (window - 1)  # history that this window does not need
            pooled[window] = (
                x[..., surplus:] if window == 1 else F.avg_pool1d(maxima[..., surplus:], window, 1)
            )
        return [pooled[window] for window in self.windows]


class EnhanceBlock(Causal):
    """Modulates a signal by its own envelopes: x + y x, with y from TPooling branches.

    A 1x1 projection makes a group of channels for each branch (TPooling, then a dilated
    convolution). The branches are normalised per frame, never over the clip.

    Args:
        channels: channels of the signal.
        windows: TPooling window of each branch, steps.
        dilations: dilation of each branch.
        branch_channels: channels of a branch.
        kernel_size: kernel size of the dilated convolutions.
    """

    def __init__(
        self,
        channels: int,
        *,
        windows: Sequence[int],
        dilations: Sequence[int],
        branch_channels: int,
        kernel_size: int,
    ) -> None:
        super().__init__()
        self.windows = tuple(windows)
        self.branch_channels = branch_channels
        hidden = branch_channels * len(windows)
        self.project = nn.Conv1d(channels, hidden, 1)
        self.convs = nn.ModuleList(
            nn.Conv1d(branch_channels, branch_channels, kernel_size, dilation=d) for d in dilations
        )
        self.norm = nn.LayerNorm(hidden, eps=1e-3)
        self.gate = linear(hidden, channels, gain=0.1)
        self._lookbacks = [2 * (w - 1) + (kernel_size - 1) * d for w, d in zip(windows, dilations)]
        self.state_shape = (hidden, max(self._lookbacks))

    def forward(self, x: torch.Tensor, state: State | None = None) -> torch.Tensor:
        history = self.state_shape[1]
        branches = self.with_history(self.project(x), state).unsqueeze(2)
        y = [
            convolve_row(conv, tpool(branch[..., history - lookback :], window))
            for branch, conv, window, lookback in zip(
                branches.split(self.branch_channels, 1), self.convs, self.windows, self._lookbacks
            )
        ]
        y = self.norm(torch.cat(y, 1).squeeze(2).transpose(1, 2))
        return x + x * rowwise(self.gate, y).transpose(1, 2)
