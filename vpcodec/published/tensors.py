"""The list of the published tensors: their names and shapes, and how they are folded.

Published names are "module.name in its file". An entry of the list is a layer: its names in the
published files and in `SQCodecAutoencoder`, its published shapes, and how it is folded into our
matrices; `network` explains the folding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .config import SQCodecConfig
from .network import (
    BRANCH_CHANNELS,
    ENCODER_POOLS,
    ENHANCE_POOLS,
    LAST_DILATIONS,
    MASKED,
    SMALLEST_ALPHA,
    TAPS,
)

Named = Iterator[tuple[str, tuple[int, ...]]]
Tensors = Iterator[tuple[str, torch.Tensor]]


def expected_shapes(config: SQCodecConfig) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of each weight of a model. All are float32."""
    return {name: shape for layer in layers(config) for name, shape in layer.shapes()}


def fold(published: Mapping[str, torch.Tensor], config: SQCodecConfig) -> dict[str, torch.Tensor]:
    """Convert published tensors to the state dict of `SQCodecAutoencoder`, in float64.

    Returns:
        Float32 tensors.

    Raises:
        RuntimeError: a tensor is missing or has another shape.
    """
    source = _Source(published)
    try:
        return {
            name: value.float().contiguous()
            for layer in layers(config)
            for name, value in layer.fold(source)
        }
    except (KeyError, IndexError, RuntimeError) as error:
        raise RuntimeError(f"not the published tensors ({error})") from None


def layers(config: SQCodecConfig) -> Iterator[_Layer]:
    """All layers of a model, module by module."""
    yield from _encoder(config)
    width, dim = config.feature_dim, config.quantizer.dim
    yield _Dense("encoder.project", "quantizer.project_in", (dim, width), normed=False)
    # Published codes are 2 z - 1, ours (z - 1/2) sqrt(12).
    yield _Dense(
        "decoder.project", "quantizer.project_out", (width, dim), normed=False, divisor=math.sqrt(3)
    )
    yield from _decoder(config)
    yield from _transformers(config)


def _encoder(config: SQCodecConfig) -> Iterator[_Layer]:
    dims, depths = config.encoder_dims, config.encoder_depths
    at = "encoder.blocks"
    yield _First(dims[0])
    for i, stride in enumerate(config.strides):
        yield from _units(f"encoder.stages.{i}", f"{at}.{2 * i + 1}", depths[i], dims[i])
        shape = (dims[i + 1], dims[i], stride)
        yield _Dense(f"encoder.downs.{i}", f"{at}.{2 * i + 2}.0", shape)
        yield _Norm(f"encoder.down_norms.{i}", f"{at}.{2 * i + 2}.1", dims[i + 1])
    n = len(config.strides)
    yield from _units(f"encoder.stages.{n}", f"{at}.{2 * n + 1}", depths[-1], dims[-1])
    yield _Dense("encoder.last", f"{at}.{2 * n + 2}", (config.feature_dim, dims[-1], 3))


def _decoder(config: SQCodecConfig) -> Iterator[_Layer]:
    dims = config.decoder_dims
    at = "decoder.blocks"
    yield _Dense("decoder.first", f"{at}.0", (dims[0], config.feature_dim, 3))
    for i, depth in enumerate(config.decoder_depths):
        level = f"decoder.levels.{i}"
        units = f"decoder.levels.{i - 1}.units" if i else "decoder.stage"
        yield from _units(units, f"{at}.{3 * i + 1}", depth, dims[i])
        yield _Enhance(f"decoder.enhances.{i}", f"{level}.gate", f"{at}.{3 * i + 2}", dims[i])
        yield _Dense(f"{level}.up", f"{at}.{3 * i + 3}.0", (dims[i + 1], dims[i], 1))
        yield _Norm(f"{level}.norm", f"{at}.{3 * i + 3}.2", dims[i + 1])
    n = len(config.decoder_depths)
    yield _Last(f"decoder.levels.{n - 1}.units.0", f"{at}.{3 * n + 1}.block", dims[-1])


def _transformers(config: SQCodecConfig) -> Iterator[_Layer]:
    width, stride = config.feature_dim, config.token_stride
    window, outer_window = config.attention_window, config.attention_window * stride
    heads = config.attention_heads
    if stride > 1:
        if config.architecture == "sqcodec":
            yield _Unused("en_encoder.cache_token", (1, 0, width))
        trans, n = "en_encoder.down_trans.trans", config.encoder_outer_layers
        yield _Transformer("encoder.outer", trans, n, outer_window, width, heads)
        down = "en_encoder.down_trans.down_layer"
        yield _Dense("encoder.shrink", down, (width, width, stride))
    trans, n = "en_encoder.local_trans", config.encoder_layers
    yield _Transformer("encoder.inner", trans, n, window, width, heads)
    if stride > 1:
        trans, n = "en_decoder.up_trans.trans", config.decoder_outer_layers
        yield _Transformer("decoder.outer", trans, n, outer_window, width, heads)
    trans, n = "en_decoder.local_trans", config.decoder_layers
    yield _Transformer("decoder.inner", trans, n, window, width, heads)


def _units(ours: str, theirs: str, depth: int, channels: int) -> Iterator[_Unit]:
    for i in range(depth):
        yield _Unit(f"{ours}.{i}", f"{theirs}.{i}.module", channels)


# ----------------------------------------------------------------------------------------- layers


class _Layer(ABC):
    """An entry of the list of published tensors."""

    @abstractmethod
    def shapes(self) -> Named:
        """Published names and shapes."""

    @abstractmethod
    def fold(self, source: _Source) -> Tensors:
        """Our names and values, computed from the published ones."""


@dataclass(frozen=True)
class _Unused(_Layer):
    """A tensor in the files that nothing needs."""

    theirs: str
    shape: tuple[int, ...]

    def shapes(self) -> Named:
        yield self.theirs, self.shape

    def fold(self, source: _Source) -> Tensors:
        yield from ()


@dataclass(frozen=True)
class _Norm(_Layer):
    """A normalisation over channels."""

    ours: str
    theirs: str
    channels: int

    def shapes(self) -> Named:
        yield from _affine_shapes(self.theirs, self.channels)

    def fold(self, source: _Source) -> Tensors:
        for name in ("weight", "bias"):
            yield f"{self.ours}.{name}", source[f"{self.theirs}.{name}"]


@dataclass(frozen=True)
class _Dense(_Layer):
    """A matrix, or a convolution that becomes one, with or without weight norm."""

    ours: str
    theirs: str
    shape: tuple[int, ...]  # (C', C) or (C', C, taps)
    normed: bool = True
    divisor: float = 1.0  # of the weight

    def shapes(self) -> Named:
        if self.normed:
            yield from _normed_shapes(self.theirs, *self.shape)
        else:
            yield from _plain_shapes(self.theirs, *self.shape)

    def fold(self, source: _Source) -> Tensors:
        weight, bias = source.normed(self.theirs) if self.normed else source.plain(self.theirs)
        yield from _affine(self.ours, weight / self.divisor, bias)


@dataclass(frozen=True)
class _Unit(_Layer):
    """A ConvUnit: depthwise convolution, norm, Snake between two matrices, GRN."""

    ours: str
    theirs: str
    channels: int

    def shapes(self) -> Named:
        at, hidden = self.theirs, 4 * self.channels
        yield from _normed_shapes(f"{at}.dw_conv", self.channels, 1, TAPS)
        yield from _affine_shapes(f"{at}.norm", self.channels)
        yield from _normed_shapes(f"{at}.pw_conv1", hidden, self.channels)
        yield f"{at}.act.alpha", (1, 1, hidden)
        yield f"{at}.grn.gamma", (1, hidden)
        yield f"{at}.grn.beta", (1, hidden)
        yield from _normed_shapes(f"{at}.pw_conv2", self.channels, hidden)

    def fold(self, source: _Source) -> Tensors:
        ours, at = self.ours, self.theirs
        weight, bias = source.normed(f"{at}.dw_conv")
        yield f"{ours}.kernel", weight.unsqueeze(2)
        yield f"{ours}.bias", bias
        yield from _Norm(f"{ours}.norm", f"{at}.norm", self.channels).fold(source)
        scale = source.snake_scale(f"{at}.act")
        weight, bias = source.normed(f"{at}.pw_conv1")
        yield from _affine(f"{ours}.widen", weight * scale[:, None], bias * scale)
        weight, bias = source.normed(f"{at}.pw_conv2")
        narrow = weight * (1 + source[f"{at}.grn.gamma"]) / scale
        bias = bias + weight @ source[f"{at}.grn.beta"][0] + narrow.sum(1)
        yield from _affine(f"{ours}.narrow", narrow, bias)


@dataclass(frozen=True)
class _Transformer(_Layer):
    """Layers of a local Transformer, and the network that computes their bias by distance."""

    ours: str
    theirs: str
    layers: int
    window: int
    width: int
    heads: int

    def shapes(self) -> Named:
        width, inner, hidden = self.width, self.heads * (self.width // 4), self.width * 8 // 3
        for i in range(self.layers):
            at = f"{self.theirs}.layers.{i}"
            yield from _affine_shapes(f"{at}.0.norm", width)
            yield f"{at}.0.to_qkv.weight", (3 * inner, width)
            yield f"{at}.0.to_out.weight", (width, inner)
            yield from _affine_shapes(f"{at}.1.0", width)
            yield f"{at}.1.1.weight", (2 * hidden, width)
            yield f"{at}.1.4.weight", (width, hidden)
        widths = 1, width // 2, width // 2, self.heads
        for i in range(3):
            name = f"{self.theirs}.dynamic_pos_bias.mlp.{2 * i}"
            yield from _plain_shapes(name, widths[i + 1], widths[i])

    def fold(self, source: _Source) -> Tensors:
        head = self.width // 4
        for i in range(self.layers):
            ours, at = f"{self.ours}.layers.{i}", f"{self.theirs}.layers.{i}"
            yield from _Norm(f"{ours}.attention_norm", f"{at}.0.norm", self.width).fold(source)
            yield from _Norm(f"{ours}.feed_forward_norm", f"{at}.1.0", self.width).fold(source)
            qkv = source[f"{at}.0.to_qkv.weight"].clone()
            qkv[: self.heads * head] *= head**-0.5
            yield f"{ours}.qkv.weight", qkv
            yield f"{ours}.out.weight", source[f"{at}.0.to_out.weight"]
            yield f"{ours}.widen.weight", source[f"{at}.1.1.weight"]
            yield f"{ours}.narrow.weight", source[f"{at}.1.4.weight"]
        window = self.window
        bias = source.distance_bias(f"{self.theirs}.dynamic_pos_bias.mlp", 2 * window)
        moved = torch.full((self.heads, 3 * window), MASKED, dtype=torch.float64)
        moved[:, : window + 1] = bias[: window + 1].flip(0).T  # distances w .. 0
        moved[:, 2 * window + 1 :] = bias[window + 1 :].flip(0).T  # distances 2 w - 1 .. w + 1
        yield f"{self.ours}.distance_bias", moved


@dataclass(frozen=True)
class _First(_Layer):
    """The first block.

    The convolutions of the branches and the one that mixes them become one matrix; the layer after
    it is split into one matrix for the hidden channels and a vector for the waveform.
    """

    channels: int
    ours = "encoder.first"
    theirs = "encoder.blocks.0"

    def shapes(self) -> Named:
        branches = len(ENCODER_POOLS)
        mixed = branches * BRANCH_CHANNELS
        yield from _branch_shapes(self.theirs, branches, BRANCH_CHANNELS)
        yield from _normed_shapes(f"{self.theirs}.conv_1", 4 * mixed, mixed, 1)
        yield from _normed_shapes(f"{self.theirs}.conv_2", self.channels, 4 * mixed + 1, 1)

    def fold(self, source: _Source) -> Tensors:
        mix, bias = source.normed(f"{self.theirs}.conv_1")
        taps = torch.zeros(mix.shape[0], TAPS, len(ENCODER_POOLS), dtype=torch.float64)
        for i in range(len(ENCODER_POOLS)):
            weight, branch_bias = source.normed(f"{self.theirs}.blocks.{i}.1")
            part = mix[:, i * BRANCH_CHANNELS : (i + 1) * BRANCH_CHANNELS, 0]
            taps[:, :, i] = part @ weight[:, 0]
            bias = bias + part @ branch_bias
        yield f"{self.ours}.spread.weight", taps.flatten(1).T
        yield f"{self.ours}.spread.bias", bias
        weight, bias = source.normed(f"{self.theirs}.conv_2")
        yield from _affine(f"{self.ours}.merge", weight[:, :-1, 0], bias)
        yield f"{self.ours}.wave", weight[:, -1, 0]


@dataclass(frozen=True)
class _Enhance(_Layer):
    """An enhance block, and the gate after it."""

    ours: str
    gate: str
    theirs: str
    channels: int

    def shapes(self) -> Named:
        n = len(ENHANCE_POOLS)
        yield from _branch_shapes(self.theirs, n, 1)
        yield from _affine_shapes(f"{self.theirs}.merge_layer.0", n)
        yield from _plain_shapes(f"{self.theirs}.merge_layer.1", self.channels, n, 1)

    def fold(self, source: _Source) -> Tensors:
        at = self.theirs
        branches = [source.normed(f"{at}.blocks.{k}.1") for k in range(len(ENHANCE_POOLS))]
        yield f"{self.ours}.kernels", torch.stack([weight for weight, _ in branches])
        yield f"{self.ours}.bias", torch.cat([bias for _, bias in branches])
        scale, shift = source.plain(f"{at}.merge_layer.0")
        weight, bias = source.plain(f"{at}.merge_layer.1")
        weight = weight[:, :, 0]
        bias = bias + weight @ shift
        yield from _affine(self.gate, weight * scale, bias + 1)


@dataclass(frozen=True)
class _Last(_Layer):
    """The last block: residual dilated units and the convolution to one channel."""

    ours: str
    theirs: str
    channels: int

    def shapes(self) -> Named:
        width = self.channels
        for i in range(len(LAST_DILATIONS)):
            block = f"{self.theirs}.0.{i}.module.block"
            yield f"{block}.0.alpha", (1, width, 1)
            yield from _normed_shapes(f"{block}.1", width, width, TAPS)
            yield f"{block}.2.alpha", (1, width, 1)
            yield from _normed_shapes(f"{block}.3", width, width, 1)
        yield f"{self.theirs}.1.alpha", (1, width, 1)
        yield from _normed_shapes(f"{self.theirs}.2", 1, width, TAPS)

    def fold(self, source: _Source) -> Tensors:
        parts: dict[str, list[torch.Tensor]] = {
            name: [] for name in ("first_scale", "dilated", "dilated_bias", "mix", "mix_bias")
        }
        for i in range(len(LAST_DILATIONS)):
            block = f"{self.theirs}.0.{i}.module.block"
            first, second = source.snake_scale(f"{block}.0"), source.snake_scale(f"{block}.2")
            weight, bias = source.normed(f"{block}.1")
            dilated = weight / first[:, None]
            parts["first_scale"].append(first[:, None])
            parts["dilated"].append(dilated * second[:, None, None])
            parts["dilated_bias"].append((bias + dilated.sum((1, 2))) * second)
            weight, bias = source.normed(f"{block}.3")
            parts["mix"].append(weight / second[:, None])
            parts["mix_bias"].append(bias + parts["mix"][-1].sum((1, 2)))
        for name, tensors in parts.items():
            yield f"{self.ours}.{name}", torch.stack(tensors)
        scale = source.snake_scale(f"{self.theirs}.1")
        weight, bias = source.normed(f"{self.theirs}.2")
        synthesis = (weight[0] / scale[:, None]).T
        yield f"{self.ours}.last_scale", scale[:, None]
        yield f"{self.ours}.synthesis", synthesis
        yield f"{self.ours}.synthesis_taps", synthesis.sum(1)[:, None]
        yield f"{self.ours}.synthesis_bias", bias


def _branch_shapes(name: str, branches: int, channels: int) -> Named:
    for i in range(branches):
        yield from _normed_shapes(f"{name}.blocks.{i}.1", channels, 1, TAPS)


def _normed_shapes(name: str, out: int, *rest: int) -> Named:
    """A convolution or linear layer with weight norm: bias, gains and directions."""
    yield f"{name}.bias", (out,)
    yield f"{name}.parametrizations.weight.original0", (out, *(1 for _ in rest))
    yield f"{name}.parametrizations.weight.original1", (out, *rest)


def _plain_shapes(name: str, out: int, *rest: int) -> Named:
    yield f"{name}.weight", (out, *rest)
    yield f"{name}.bias", (out,)


def _affine_shapes(name: str, channels: int) -> Named:
    yield from _plain_shapes(name, channels)


def _affine(name: str, weight: torch.Tensor, bias: torch.Tensor) -> Tensors:
    """The tensors of an `Affine` from a published weight, (C', C) or (C', C, taps), taps first."""
    if weight.ndim == 3:
        weight = weight.permute(0, 2, 1).flatten(1)
    yield f"{name}.weight", weight.T
    yield f"{name}.bias", bias


class _Source:
    """Access to published tensors in float64."""

    def __init__(self, published: Mapping[str, torch.Tensor]) -> None:
        self._published = published

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._published[name].double()

    def plain(self, at: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of a layer."""
        return self[f"{at}.weight"], self[f"{at}.bias"]

    def normed(self, at: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of a layer with weight norm, w = g v / |v| per output."""
        gain = self[f"{at}.parametrizations.weight.original0"]
        direction = self[f"{at}.parametrizations.weight.original1"]
        length = direction.flatten(1).norm(dim=1).reshape(gain.shape)
        return gain * direction / length, self[f"{at}.bias"]

    def snake_scale(self, at: str) -> torch.Tensor:
        """2 alpha of a Snake, (C,)."""
        alpha = self[f"{at}.alpha"].flatten()
        sign = torch.where(alpha < 0, -1.0, 1.0)
        return 2 * sign * alpha.abs().clamp(min=SMALLEST_ALPHA)

    def distance_bias(self, at: str, n: int) -> torch.Tensor:
        """Attention bias by distance, (n, heads), from a small network.

        It is computed in float32, as published: rounding matters for distances of hundreds.
        """
        x = torch.arange(n, dtype=torch.float32).unsqueeze(1)
        for i in (0, 2, 4):
            x = F.linear(x, self[f"{at}.{i}.weight"].float(), self[f"{at}.{i}.bias"].float())
            x = F.silu(x) if i < 4 else x
        return x.double()
