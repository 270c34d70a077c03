"""The published SQCodec and L3AC (SQCodec's second version), for inference with their weights.

Features are (B, T, C), channels last, which suits matrix products and norms over channels. Affine
operations are folded into the matrices beforehand (`tensors.fold`):

- weight norm: g v / |v|;
- GRN, whose response is divided by its own mean over one channel, and so is (1 + gamma) x + beta;
- Snake between two matrices: x + sin^2(a x) / a = (v + 1 - cos v) / (2 a) with v = 2 a x, so the
  matrix before is scaled by 2 a, the one after by 1 / (2 a), and v - cos v remains to be computed.

The input of a model is a whole clip (`state=None`), or a window of it: whole attention blocks and
some look-ahead. Attention continues from the last whole block. `past` holds the input of the
convolutions before the window; it is empty at the beginning of a clip.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from ..models.layers import State, gelu, snake
from ..quantizers import FSQ
from .config import SQCodecConfig

ENCODER_POOLS = (1, 5, 11, 21, 45)  # TPooling windows of the first block; 1: the waveform itself
ENHANCE_POOLS = (1, 3, 5, 9)
ENHANCE_DILATIONS = (1, 2, 3, 5)
LAST_DILATIONS = (1, 3, 9)
TAPS = 7
BRANCH_CHANNELS = 4  # per TPooling window of the first block
STRETCH = {"sqcodec": 1.001, "l3ac": 1.0}  # factor of tanh before rounding
EPS = {"sqcodec": torch.finfo(torch.float32).eps, "l3ac": 1e-8}  # of norms over channels
LAYER_NORM_EPS = INSTANCE_NORM_EPS = 1e-5
MASKED = -1e30
SMALLEST_ALPHA = 1e-3  # of a folded Snake; smaller ones would amplify rounding


class StretchedFSQ(FSQ):
    """FSQ of tanh times a factor: 1.001, in SQCodec's first version, makes the edges reachable."""

    def __init__(self, levels: tuple[int, ...], stretch: float) -> None:
        super().__init__(levels)
        self.stretch = stretch

    def _squash(self, a: torch.Tensor) -> torch.Tensor:
        return (self.stretch * torch.tanh(a) + 1) / 2


class SQCodecAutoencoder(nn.Module):
    """Encoder, quantizer and decoder of an `SQCodecConfig`.

    Attributes:
        encoder_state, decoder_state: name -> shape, without the batch, of the tensors in `State`; a
            length of 0 means any length, 0 at the beginning.
    """

    def __init__(self, config: SQCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = StretchedFSQ(config.quantizer.levels, STRETCH[config.architecture])
        self.decoder = Decoder(config)
        self.encoder_state = dict(self.encoder.states("encoder."))
        self.decoder_state = dict(self.decoder.states("decoder."))

    def encode(self, samples: torch.Tensor, state: State | None = None) -> torch.Tensor:
        """(B, N * hop) samples -> (B, N) int64 tokens.

        `next` of "encoder.audio" holds the samples; see `Transformer` for the rest.
        """
        return self.quantizer.encode(self.encoder(samples, state))

    def decode(self, tokens: torch.Tensor, state: State | None = None) -> torch.Tensor:
        """(B, N) int64 tokens -> (B, past * hop / token_stride + N * hop) samples in [-1, 1].

        The samples are those of the past features and of these tokens. `next` of "decoder.features"
        and "decoder.tokens" holds those of all N tokens.
        """
        return self.decoder(self.quantizer.tokens_to_latents(tokens), state)


class Encoder(nn.Module):
    """Samples to latents: first block, ConvUnits and down layers, local Transformers."""

    def __init__(self, config: SQCodecConfig) -> None:
        super().__init__()
        dims, width = config.encoder_dims, config.feature_dim
        self.hop, self.token_stride = config.hop_length, config.token_stride
        self.first = FirstBlock(dims[0])
        self.stages = nn.ModuleList(
            nn.ModuleList(ConvUnit(dim, config) for _ in range(depth))
            for dim, depth in zip(dims, config.encoder_depths)
        )
        self.downs = nn.ModuleList(
            Affine(stride * a, b) for a, b, stride in zip(dims, dims[1:], config.strides)
        )
        self.down_norms = nn.ModuleList(
            nn.LayerNorm(dim, EPS[config.architecture]) for dim in dims[1:]
        )
        self.last = Affine(3 * dims[-1], width)
        self.outer = Transformer(config, config.encoder_outer_layers, config.token_stride)
        self.shrink = Affine(config.token_stride * width, width) if self.outer.layers else None
        self.inner = Transformer(config, config.encoder_layers)
        self.project = Affine(width, config.quantizer.dim)

    def states(self, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        self.audio = f"{prefix}audio"
        yield self.audio, (0,)
        yield from self.outer.states(f"{prefix}outer.")
        yield from self.inner.states(f"{prefix}inner.")

    def forward(self, samples: torch.Tensor, state: State | None) -> torch.Tensor:
        x = samples
        if state is not None:
            state.next[self.audio] = samples
            x = torch.cat([state.past[self.audio], samples], 1)
        x = self.first(x)
        for i, stage in enumerate(self.stages):
            for unit in stage:
                x = unit(x)
            if i < len(self.downs):
                x = self.down_norms[i](self.downs[i](_stack(x, self.downs[i], x.shape[-1])))
        x = self.last(_neighbours(x, 3))
        if state is not None:
            x = x[:, state.past[self.audio].shape[1] // self.hop * self.token_stride :]
        if self.shrink is not None:
            x = self.outer(x, state)
            x = self.shrink(_stack(x, self.shrink, x.shape[-1]))
        return self.project(self.inner(x, state))


class Decoder(nn.Module):
    """Latents to samples: local Transformers, ConvUnits with enhance blocks and up layers."""

    def __init__(self, config: SQCodecConfig) -> None:
        super().__init__()
        dims, width = config.decoder_dims, config.feature_dim
        self.token_stride = config.token_stride
        self.project = Affine(config.quantizer.dim, width)
        self.inner = Transformer(config, config.decoder_layers)
        self.outer = Transformer(config, config.decoder_outer_layers, config.token_stride)
        self.first = Affine(3 * width, dims[0])
        stages = [
            nn.ModuleList(ConvUnit(dim, config) for _ in range(depth))
            for dim, depth in zip(dims, config.decoder_depths)
        ]
        self.stage = stages[0]
        self.enhances = nn.ModuleList(EnhanceBlock() for _ in stages)
        self.levels = nn.ModuleList()
        for i, units in enumerate([*stages[1:], nn.ModuleList([LastBlock(dims[-1])])]):
            norm = nn.LayerNorm(dims[i + 1], EPS[config.architecture])
            self.levels.append(Level(dims[i], config.decoder_strides[i], norm, units))

    def states(self, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        self.tokens, self.features = f"{prefix}tokens", f"{prefix}features"
        width = self.project.weight.shape[1]
        if self.outer.layers:
            yield self.tokens, (0, width)
        yield self.features, (0, width)
        yield from self.inner.states(f"{prefix}inner.")
        yield from self.outer.states(f"{prefix}outer.")

    def forward(self, latents: torch.Tensor, state: State | None) -> torch.Tensor:
        x = self.inner(self.project(latents), state)
        if self.outer.layers:
            past = 0
            if state is not None:
                state.next[self.tokens] = x
                past = state.past[self.tokens].shape[1]
                x = torch.cat([state.past[self.tokens], x], 1)
            x = _interpolate(x, self.token_stride)[:, past * self.token_stride :]
            x = self.outer(x, state)
        if state is not None:
            state.next[self.features] = x
            x = torch.cat([state.past[self.features], x], 1)
        x = self.first(_neighbours(x, 3))
        for unit in self.stage:
            x = unit(x)
        for enhance, level in zip(self.enhances, self.levels):
            x = level(x, enhance(x))
        return x


class Level(nn.Module):
    """The layers after an enhance block: gate, up layer, and units.

    All of them are local, so that a level can be computed in parts with some context on both sides.

    Attributes:
        stride: output steps per input step.
        reach: context of the units on either side, output steps.
        width: channels of the widest tensor.
    """

    def __init__(
        self, channels: int, stride: int, norm: nn.LayerNorm, units: nn.ModuleList
    ) -> None:
        super().__init__()
        (out_channels,) = norm.normalized_shape
        self.stride = stride
        self.reach = sum(unit.reach for unit in units)
        self.width = max((unit.width for unit in units), default=out_channels)
        self.gate = Affine(len(ENHANCE_POOLS), channels)
        self.up = Affine(channels, out_channels)
        self.norm = norm
        self.units = units

    def forward(
        self, x: torch.Tensor, trends: torch.Tensor, inside: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the level.

        Args:
            x: (B, T, C).
            trends: (B, T, 4), output of the enhance block.
            inside: (T,), 1 for steps of the clip and 0 beyond its ends; None: all are inside.

        Returns:
            (B, T * stride, C'), or (B, T * stride) samples.
        """
        x = self.norm(_interpolate(self.up(x * self.gate(trends)), self.stride))
        if inside is not None:
            inside = inside.unsqueeze(1).expand(-1, self.stride).reshape(-1, 1)
        for unit in self.units:
            x = unit(x, inside)
        return x


class Affine(nn.Module):
    """An affine map (..., C) -> (..., C'), with its matrix stored as (C, C')."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # On a matrix, because only then does ONNX Runtime fuse the addition of the bias.
        rows = torch.addmm(self.bias, x.flatten(0, -2), self.weight)
        return rows.unflatten(0, x.shape[:-1])


class ConvUnit(nn.Module):
    """x + narrow(v - cos v) with v = widen(norm(depthwise(x))): a ConvNeXt-1D unit, folded."""

    def __init__(self, channels: int, config: SQCodecConfig) -> None:
        super().__init__()
        self.channels = channels
        self.reach, self.width = TAPS // 2, 4 * channels
        self.kernel = nn.Parameter(torch.empty(channels, 1, 1, TAPS))
        self.bias = nn.Parameter(torch.empty(channels))
        self.norm = nn.LayerNorm(channels, EPS[config.architecture])
        self.widen = Affine(channels, 4 * channels)
        self.narrow = Affine(4 * channels, channels)

    def forward(self, x: torch.Tensor, inside: torch.Tensor | None = None) -> torch.Tensor:
        x = _keep(x, inside)
        # As an image of height 1: ONNX Runtime has fast depthwise kernels for images only.
        y = x.unsqueeze(1).permute(0, 3, 1, 2)
        y = F.conv2d(y, self.kernel, self.bias, padding=(0, TAPS // 2), groups=self.channels)
        v = self.widen(self.norm(y.permute(0, 2, 3, 1).squeeze(1)))
        return x + self.narrow(snake(v))


class FirstBlock(nn.Module):
    """TConv on the waveform: five TPoolings, seven taps, GELU, and the waveform itself.

    (B, T) -> (B, T, C).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 4 * BRANCH_CHANNELS * len(ENCODER_POOLS)
        self.spread = Affine(TAPS * len(ENCODER_POOLS), hidden)
        self.merge = Affine(hidden, channels)
        self.wave = nn.Parameter(torch.empty(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = torch.stack([_trend_pool(x, window) for window in ENCODER_POOLS], -1)
        hidden = gelu(self.spread(_neighbours(pooled, TAPS)))
        return self.merge(hidden) + x.unsqueeze(-1) * self.wave


class EnhanceBlock(nn.Module):
    """TEConv without its gate: four TPoolings of the first channel, normalised over the clip.

    (B, T, C) -> (B, T, 4).
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.Parameter(torch.empty(len(ENHANCE_POOLS), 1, 1, TAPS))
        self.bias = nn.Parameter(torch.empty(len(ENHANCE_POOLS)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x[..., 0]
        branches = []
        for i, (window, dilation) in enumerate(zip(ENHANCE_POOLS, ENHANCE_DILATIONS)):
            pooled = _trend_pool(first, window).unsqueeze(1)
            branches.append(
                F.conv1d(
                    pooled,
                    self.kernels[i],
                    self.bias[i : i + 1],
                    padding=TAPS // 2 * dilation,
                    dilation=dilation,
                )
            )
        # torch.nn.functional.instance_norm refuses clips of one step.
        y = torch.instance_norm(
            torch.cat(branches, 1), None, None, None, None, True, 0.0, INSTANCE_NORM_EPS, False
        )
        return y.transpose(1, 2)


class LastBlock(nn.Module):
    """Three residual dilated units and a convolution to one channel; (B, T, C) -> (B, T)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        n = len(LAST_DILATIONS)
        self.reach, self.width = TAPS // 2 * (sum(LAST_DILATIONS) + 1), channels
        self.first_scale = nn.Parameter(torch.empty(n, channels, 1))  # 2 alpha
        self.dilated = nn.Parameter(torch.empty(n, channels, channels, TAPS))
        self.dilated_bias = nn.Parameter(torch.empty(n, channels))
        self.mix = nn.Parameter(torch.empty(n, channels, channels, 1))
        self.mix_bias = nn.Parameter(torch.empty(n, channels))
        self.last_scale = nn.Parameter(torch.empty(channels, 1))
        self.synthesis = nn.Parameter(torch.empty(TAPS, channels))
        self.synthesis_taps = nn.Parameter(torch.empty(TAPS, 1))
        self.synthesis_bias = nn.Parameter(torch.empty(1))

    def forward(self, x: torch.Tensor, inside: torch.Tensor | None = None) -> torch.Tensor:
        x = x.transpose(1, 2)
        if inside is not None:
            inside = inside.transpose(0, 1)
        for i, dilation in enumerate(LAST_DILATIONS):
            x = _keep(x, inside)
            v = x * self.first_scale[i]
            pad = TAPS // 2 * dilation
            v = F.pad(snake(v), (pad, pad), value=-1.0)  # a folded Snake maps 0 to -1
            v = F.conv1d(v, self.dilated[i], self.dilated_bias[i], dilation=dilation)
            x = x + F.conv1d(snake(v), self.mix[i], self.mix_bias[i])
        v = x * self.last_scale
        taps = _keep(self.synthesis @ snake(v) + self.synthesis_taps, inside)
        taps = F.pad(taps, (TAPS // 2, TAPS // 2))
        y = sum(taps[:, k, k : k + 1 - TAPS or None] for k in range(TAPS))
        return torch.tanh(y + self.synthesis_bias)


class Transformer(nn.Module):
    """Local Transformer: each block of tokens sees itself, causally, and the previous block.

    The state of a layer is the keys, values and "exists" flags of the last whole block.
    """

    def __init__(self, config: SQCodecConfig, layers: int, rate: int = 1) -> None:
        super().__init__()
        self.window = config.attention_window * rate
        self.heads = config.attention_heads
        width = config.feature_dim
        inner = self.heads * (width // 4)
        self.layers = nn.ModuleList(TransformerLayer(width, inner) for _ in range(layers))
        if layers:  # the bias of key j of two blocks for query i is at (j - i) mod 3 w
            self.distance_bias = nn.Parameter(torch.empty(self.heads, 3 * self.window))

    def states(self, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        for i, layer in enumerate(self.layers):
            name = f"{prefix}{i}"
            layer.state_name = name  # type: ignore[assignment]
            yield name, (self.window, 2 * layer.out.in_features + 1)

    def forward(self, x: torch.Tensor, state: State | None) -> torch.Tensor:
        steps, w = x.shape[1], self.window
        blocks = (steps + w - 1) // w
        queries = torch.arange(blocks * w, device=x.device).clamp(max=steps - 1)
        keys = (torch.arange(blocks, device=x.device) * w).unsqueeze(1)
        keys = (keys + torch.arange(2 * w, device=x.device)).clamp(max=steps + w - 1)
        whole = torch.arange(w, device=x.device) + steps // w * w
        n = 3 * w  # shifts the vector by one step per row: repeat it, and cut it into shorter rows
        bias = self.distance_bias.unsqueeze(1).expand(-1, w, n).reshape(self.heads, w * n)
        bias = bias[:, : w * (n - 1)].reshape(self.heads, w, n - 1)[:, :, : 2 * w]
        for layer in self.layers:
            x = layer(x, bias, (queries, keys.flatten(), whole), blocks, state)
        return x


class BlockAttention(nn.Module):
    """Attention of queries (B, N, H, w, D) of N blocks to keys and values (B, N, H, 2 w, D)."""

    def forward(self, q, k, v, missing: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """`missing` is (B, N, 1, 1, 2 w), `bias` is (H, w, 2 w); returns (B, N, H, w, D)."""
        return torch.softmax(q @ k.transpose(-1, -2) + bias + missing, -1) @ v


class TransformerLayer(nn.Module):
    """Pre-norm attention and GEGLU feed-forward, both residual."""

    state_name: str = ""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.blocks = BlockAttention()
        self.attention_norm = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.feed_forward_norm = nn.LayerNorm(width, LAYER_NORM_EPS)
        hidden = int(width * 4 * 2 / 3)
        self.widen = nn.Linear(width, 2 * hidden, bias=False)
        self.narrow = nn.Linear(hidden, width, bias=False)

    def forward(self, x, bias, places, blocks: int, state: State | None) -> torch.Tensor:
        x = x + self.out(self._attend(self.attention_norm(x), bias, places, blocks, state))
        value, gate = self.widen(self.feed_forward_norm(x)).chunk(2, -1)
        return x + self.narrow(value * gelu(gate))

    def _attend(self, x, bias, places, blocks: int, state: State | None) -> torch.Tensor:
        batch, steps, _ = x.shape
        heads, w = bias.shape[:2]
        queries, keys, whole = places
        q, kv = self.qkv(x).split([self.out.in_features, 2 * self.out.in_features], -1)
        kv = torch.cat([kv, torch.ones_like(kv[..., :1])], -1)
        if state is None:
            kv = F.pad(kv, (0, 0, w, 0))
        else:
            kv = torch.cat([state.past[self.state_name], kv], 1)
            state.next[self.state_name] = kv.index_select(1, whole)
        q = q.index_select(1, queries).reshape(batch, blocks, w, heads, -1).transpose(2, 3)
        kv = kv.index_select(1, keys).reshape(batch, blocks, 2 * w, -1)
        k, v, exists = kv.split([self.out.in_features, self.out.in_features, 1], -1)
        k, v = (y.reshape(batch, blocks, 2 * w, heads, -1).transpose(2, 3) for y in (k, v))
        missing = ((1 - exists) * MASKED).reshape(batch, blocks, 1, 1, 2 * w)
        y = self.blocks(q, k, v, missing, bias)
        return y.transpose(2, 3).reshape(batch, blocks * w, -1)[:, :steps]


def _trend_pool(x: torch.Tensor, window: int) -> torch.Tensor:
    """TPooling of (B, T): mean of the maxima of |x| over an odd window; 1: x itself.

    The mean includes the zeros beyond the ends.
    """
    if window == 1:
        return x
    row, pad = (1, window), (0, window // 2)  # in 1-D, torch.export would fix the length
    x = F.max_pool2d(x.abs()[:, None, None], row, 1, pad)
    return F.avg_pool2d(x, row, 1, pad)[:, 0, 0]


def _keep(x: torch.Tensor, inside: torch.Tensor | None) -> torch.Tensor:
    """Set x to zero where `inside` is 0, beyond the ends, as the padding of convolutions."""
    return x if inside is None else x * inside


def _stack(x: torch.Tensor, layer: Affine, channels: int) -> torch.Tensor:
    """(B, T, C) -> (B, T / r, r C): the input of a convolution with kernel = stride = r."""
    stride = layer.weight.shape[0] // channels
    return x.reshape(x.shape[0], -1, stride * channels)


def _neighbours(x: torch.Tensor, taps: int) -> torch.Tensor:
    """(B, T, C) -> (B, T, taps C): the input of a convolution, zero beyond the ends."""
    x = F.pad(x, (0, 0, taps // 2, taps // 2))
    return torch.cat([x[:, k : k + 1 - taps or None] for k in range(taps)], -1)


def _interpolate(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Linear interpolation of (B, T, C) to (B, factor T, C), with steps at the centre of cells."""
    before = torch.cat([x[:, :1], x[:, :-1]], 1)
    after = torch.cat([x[:, 1:], x[:, -1:]], 1)
    phases = []
    for phase in range(factor):
        at = (phase + 0.5) / factor - 0.5
        other = before if at < 0 else after
        phases.append(x * (1 - abs(at)) + other * abs(at) if at else x)
    return torch.stack(phases, 2).flatten(1, 2)
