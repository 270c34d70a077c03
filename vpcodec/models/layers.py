"""Causal building blocks, which read their history from a `State` and write it back.

Tensors are (B, C, T) unless stated otherwise. With `state=None` a layer starts from silence
(zeros), as at the beginning of a stream: offline and streaming are the same function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..config import NOISE_FRAMES
from ..quantizers.base import normal_like

BIAS_STD = 0.02  # before training
NOISE_STD = 0.02  # of the injected noise, before training


class State:
    """The history of every causal layer by name: read from `past`, written to `next`."""

    def __init__(self, past: dict[str, torch.Tensor]) -> None:
        self.past = past
        self.next: dict[str, torch.Tensor] = {}


class Causal(nn.Module):
    """A layer with a history of earlier steps.

    Attributes:
        state_shape: shape of the history, without the batch.
        state_name: key of the history in a `State`, set by `name_states`.
    """

    state_shape: tuple[int, int]
    state_name: str = ""

    def with_history(self, x: torch.Tensor, state: State | None, *, dim: int = -1) -> torch.Tensor:
        """Prepend the history to x along the time dimension: -1, or 1 for (B, T, C)."""
        n = self.state_shape[dim if dim < 0 else dim - 1]
        if n == 0:
            return x
        if state is None:
            return F.pad(x, (n, 0) if dim == -1 else (0, 0, n, 0))
        x = torch.cat([state.past[self.state_name], x], dim)
        state.next[self.state_name] = x[..., -n:] if dim == -1 else x[:, -n:]
        return x


def name_states(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name the causal layers of a model; returns name -> shape of each non-empty history."""
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, Causal):
            module.state_name = name
            if min(module.state_shape) > 0:
                shapes[name] = module.state_shape
    return shapes


def zero_state(shapes: dict[str, tuple[int, int]], batch: int) -> dict[str, torch.Tensor]:
    """The state at the beginning of a stream: silence."""
    return {name: torch.zeros(batch, *shape) for name, shape in shapes.items()}


class CausalConv1d(Causal):
    """Convolution whose output step t sees input steps up to (t + 1) * stride - 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(
            in_channels, out_channels, kernel_size, stride, 0, dilation, groups, bias
        )
        fan_in = in_channels // groups * kernel_size
        nn.init.trunc_normal_(self.conv.weight, std=1 / math.sqrt(fan_in))
        if bias:
            init_bias(self.conv)
        self.state_shape = (in_channels, (kernel_size - 1) * dilation + 1 - stride)

    def forward(self, x: torch.Tensor, state: State | None = None) -> torch.Tensor:
        x = self.with_history(x, state)
        return convolve_row(self.conv, x.unsqueeze(2)).squeeze(2)


def convolve_row(conv: nn.Conv1d, x: torch.Tensor) -> torch.Tensor:
    """A convolution without padding on images of height 1, (B, C, 1, T) -> (B, C', 1, T').

    ONNX Runtime has fast kernels, depthwise and dense, for images only.
    """
    return F.conv2d(
        x,
        conv.weight.unsqueeze(2),
        conv.bias,
        stride=(1, *conv.stride),
        dilation=(1, *conv.dilation),
        groups=conv.groups,
    )


def linear(in_features: int, out_features: int, *, bias: bool = True, gain: float = 1) -> nn.Linear:
    """nn.Linear with truncated normal weights, scaled by fan-in, and small random biases."""
    layer = nn.Linear(in_features, out_features, bias)
    nn.init.trunc_normal_(layer.weight, std=gain / math.sqrt(in_features))
    if bias:
        init_bias(layer)
    return layer


def rowwise(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply a function of frames to (B, T, C) -> (B, T, C').

    The function gets a matrix (B * T, C), because only then does ONNX Runtime fuse the addition of
    a bias.
    """
    return function(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def init_bias(layer: nn.Module) -> None:
    """Initialise biases to small random numbers.

    With zeros, all channels of a silent frame would be equal, and each norm would multiply its
    gradient by eps^-1/2: by 10^32 through all of them.
    """
    nn.init.trunc_normal_(layer.bias, std=BIAS_STD)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU with the exact error function.

    In an ONNX graph it is written as the pattern that ONNX Runtime has a kernel for, which torch's
    exporter does not produce for F.gelu; compiled training keeps torch's own.
    """
    if torch.onnx.is_in_onnx_export():
        return 0.5 * (x * (1 + torch.erf(x / math.sqrt(2))))
    return F.gelu(x)


def snake(v: torch.Tensor) -> torch.Tensor:
    """v - cos v: Snake between two affine maps.

    x + sin^2(a x) / a = (v + 1 - cos v) / (2 a) with v = 2 a x. The map before absorbs the factor
    2 a, the one after it 1 / (2 a) and the constant, so that a learned a costs no extra pass.
    """
    return v - torch.cos(v)


class Snake(nn.Module):
    """Snake times 2 a, without an affine map before: v + 1 - cos v with v = scale x, (B, C, T).

    The scale, 2 a per channel, is learned and starts at 2. Zero maps to zero, as it must because
    histories start with zeros.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels, 1), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1 + snake(x * self.scale)


class ChannelNorm(nn.Module):
    """Layer normalisation of each frame over its channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class ConvUnit(nn.Module):
    """ConvNeXt-1D unit: depthwise convolution, norm, widen, Snake, narrow; residual."""

    def __init__(self, channels: int, *, kernel_size: int, expansion: int) -> None:
        super().__init__()
        self.depthwise = CausalConv1d(channels, channels, kernel_size, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.widen = linear(channels, channels * expansion, gain=2)
        self.narrow = linear(channels * expansion, channels, gain=0.15)

    def forward(self, x: torch.Tensor, state: State | None = None) -> torch.Tensor:
        y = self.norm(self.depthwise(x, state).transpose(1, 2))
        y = rowwise(lambda rows: self.narrow(snake(self.widen(rows))), y)
        return x + y.transpose(1, 2)


class DownLayer(nn.Module):
    """Downsampling by a convolution with kernel = stride, then channel norm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = CausalConv1d(in_channels, out_channels, stride, stride=stride)
        self.norm = ChannelNorm(out_channels)

    def forward(self, x: torch.Tensor, state: State | None = None) -> torch.Tensor:
        return self.norm(self.conv(x, state))


class UpLayer(Causal):
    """Upsampling: 1x1 convolution, repetition, causal smoothing, channel norm.

    The smoothing window, of `stride` steps, starts as a box. It covers repetitions of at most two
    frames, so each output step is a mix of the two.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.project = linear(in_channels, out_channels)
        self.smooth = nn.Parameter(torch.full((stride, out_channels), 1 / stride))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.norm = nn.LayerNorm(out_channels, eps=1e-6)
        self.state_shape = (1, out_channels)

    def forward(self, x: torch.Tensor, state: State | None = None) -> torch.Tensor:
        """(B, C, T) -> (B, C', T * stride)."""
        x = self.with_history(rowwise(self.project, x.transpose(1, 2)), state, dim=1)
        # Share of the new frame in each output step, (stride, C').
        new = self.smooth.flip(0).cumsum(0)
        last = x[:, :-1]
        change = (x[:, 1:] - last).unsqueeze(2)
        y = (last * self.smooth.sum(0) + self.bias).unsqueeze(2) + change * new
        return self.norm(y.flatten(1, 2)).transpose(1, 2)


class DilatedUnit(nn.Module):
    """Residual units (Snake, dilated convolution, Snake, 1x1), one per dilation, then Snake."""

    def __init__(self, channels: int, *, kernel_size: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.first = nn.ModuleList(Snake(channels) for _ in dilations)
        self.dilated = nn.ModuleList(
            CausalConv1d(channels, channels, kernel_size, dilation=d) for d in dilations
        )
        self.mix = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in dilations)
        for conv in self.mix:
            nn.init.trunc_normal_(conv.weight, std=0.15 / math.sqrt(channels))
            init_bias(conv)
        self.last = Snake(channels)

    def forward(self, x: torch.Tensor, state: State | None = None) -> torch.Tensor:
        for first, dilated, mix in zip(self.first, self.dilated, self.mix):
            x = x + mix(snake(dilated(first(x), state)))
        return self.last(x)


class SynthesisFilterbank(nn.Module):
    """(B, C, T) -> (B, T * stride): causal overlap-add of learned windows.

    Equivalent to a transposed convolution with stride `stride` and windows of `taps * stride`
    samples, computed as a convolution that outputs the `stride` samples of a frame at once.
    """

    def __init__(self, channels: int, stride: int, *, taps: int) -> None:
        super().__init__()
        self.conv = CausalConv1d(channels, stride, taps, bias=False)
        nn.init.trunc_normal_(self.conv.conv.weight, std=0.1 / math.sqrt(channels * taps))

    def forward(self, x: torch.Tensor, state: State | None = None) -> torch.Tensor:
        return self.conv(x, state).transpose(1, 2).flatten(1)


class FrameCounter(Causal):
    """Numbers the frames from the beginning of a stream, modulo NOISE_FRAMES.

    The count is part of the state, so that what is read from a table by frame number does not
    depend on how the stream is chunked, or where decoding starts.
    """

    state_shape = (1, 1)

    def forward(self, frames: torch.Tensor, state: State | None = None) -> torch.Tensor:
        """(B, N, ...) frames -> (B, N) int64 numbers in [0, NOISE_FRAMES)."""
        batch, steps = frames.shape[:2]
        new = torch.arange(steps, device=frames.device)
        if state is None:
            return (new % NOISE_FRAMES).expand(batch, steps)
        past = state.past[self.state_name]
        numbers = past[:, :, 0].to(torch.int64) + new
        state.next[self.state_name] = torch.remainder(past + steps, NOISE_FRAMES)
        return numbers % NOISE_FRAMES


class NoiseInjection(nn.Module):
    """Gated noise, x + W_out (n * (W_gate x)): the part of a signal that tokens leave random.

    In training, n ~ N(0, 1) is drawn anew. In eval mode, it is read from a table of the model by
    frame number, so that the same tokens give the same samples everywhere.

    Args:
        dim: channels of x.
        channels: channels of the noise.
        rate: steps of x per frame.
        seed: seed of the table.
    """

    table: torch.Tensor

    SCALE = 32.0  # one standard deviation in the int8 table, which holds nearly 4 of them

    def __init__(self, dim: int, *, channels: int, rate: int, seed: int) -> None:
        super().__init__()
        self.channels = channels
        self.rate = rate
        self.gate = linear(dim, channels)
        self.out = nn.Linear(channels, dim, bias=False)
        nn.init.trunc_normal_(self.out.weight, std=NOISE_STD / math.sqrt(channels))
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(NOISE_FRAMES, rate * channels, generator=generator)
        table = (normal * self.SCALE).round().clamp(-127, 127).to(torch.int8)
        self.register_buffer("table", table)

    def forward(self, x: torch.Tensor, frames: torch.Tensor | None) -> torch.Tensor:
        """(B, C, T) and, in eval mode, (B, T / rate) int64 frame numbers -> (B, C, T)."""
        rows = x.transpose(1, 2)
        if frames is None:
            noise = normal_like(rows.new_empty(*rows.shape[:2], self.channels).float())
        else:
            noise = self.table.index_select(0, frames.flatten()).to(rows.dtype) / self.SCALE
            noise = noise.view(*rows.shape[:2], self.channels)
        y = rowwise(self.out, noise * rowwise(self.gate, rows))
        return x + y.transpose(1, 2)
