"""The configuration of audio models."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from .model import ModelConfig
from .strict import Depth, Factor, Positive, Taps, Width

PARTS = ("encoder", "decoder")
MAX_HOP = 2**20  # limit of token files
NOISE_FRAMES = 499  # after which the noise of a decoder begins again; a prime number
FRAME_COUNTER = "decoder.frames"  # the state of a decoder with noise that counts its frames


class AudioModelConfig(ModelConfig):
    """The fields of every audio model."""

    kind: Literal["audio"] = Field("audio", description="What the model codes.")
    sample_rate: Positive = Field(16_000, le=10_000_000, description="Audio rate of the model, Hz.")

    @property
    def latency(self) -> float | None:
        """Algorithmic latency in seconds; None if the model is not for live streams."""
        raise NotImplementedError

    @property
    def frame_rate(self) -> float:
        """Tokens per second."""
        return self.sample_rate / self.hop_length

    @property
    def bitrate(self) -> float:
        """Nominal bit/s of one channel: tokens per second times log2 of the codebook size."""
        return self.frame_rate * self.bits_per_token


class AudioConfig(AudioModelConfig):
    """The native causal audio autoencoder. Rates follow from `sample_rate` and `strides`."""

    outside_space: ClassVar[frozenset[str]] = AudioModelConfig.outside_space | {
        "decoder_dims",
        "decoder_depths",
        "decoder_expansions",
        "decoder_layers",
        "decoder_feedforward_dim",
        "enhance_kernels",
        "enhance_dilations",
        "enhance_channels",
        "last_dim",
        "last_dilations",
        "synthesis_taps",
        "noise_channels",
        "decoder_delay",
        # These three may be written in several ways; the shapes of the weights show them.
        "expansion",
        "encoder_expansions",
        "encoder_feedforward_dim",
    }

    strides: tuple[Positive, ...] = Field(
        (8, 4, 3),
        min_length=1,
        max_length=16,
        description="Decimation of each encoder stage; their product is the hop length.",
    )
    encoder_dims: tuple[Width, ...] = Field((32, 96, 192), description="Channels per stage.")
    encoder_depths: tuple[Depth, ...] = Field((1, 2, 2), description="ConvUnits per encoder stage.")
    decoder_dims: tuple[Width, ...] = Field(
        (256, 128, 48), description="Channels per decoder stage, lowest rate first."
    )
    decoder_depths: tuple[Depth, ...] = Field((2, 1, 1), description="ConvUnits per decoder stage.")
    kernel_size: Taps = Field(7, description="Taps of the depthwise convolutions.")
    expansion: Factor = Field(4, description="Hidden width of a ConvUnit over its width.")
    encoder_expansions: tuple[Factor, ...] | None = Field(
        None, description="`expansion` for each encoder stage; null: the same for all."
    )
    decoder_expansions: tuple[Factor, ...] | None = Field(
        None, description="`expansion` for each decoder stage; null: the same for all."
    )
    tconv_kernels: tuple[Taps, ...] = Field(
        (1, 5, 11, 21, 45),
        min_length=1,
        max_length=64,
        description="TPooling windows of the first block, samples.",
    )
    tconv_channels: Width = Field(64, description="Hidden width of the first block.")
    tconv_taps: Taps = Field(32, description="Taps of the first block's strided convolution.")
    attention_window: Positive = Field(
        128, le=2**14, description="Tokens that each token attends to."
    )
    attention_heads: Width = Field(4, description="Attention heads.")
    encoder_layers: Depth = Field(1, description="Transformer layers before the quantizer.")
    decoder_layers: Depth = Field(2, description="Transformer layers after the quantizer.")
    encoder_feedforward_dim: Width | None = Field(
        None,
        description="Hidden width of the encoder's Transformer layers; null: 8/3 of their width.",
    )
    decoder_feedforward_dim: Width | None = Field(
        None,
        description="Hidden width of the decoder's Transformer layers; null: 8/3 of their width.",
    )
    enhance_kernels: tuple[Taps, ...] = Field(
        (1, 3, 5, 9),
        min_length=1,
        max_length=64,
        description="TPooling windows of the enhance blocks.",
    )
    enhance_dilations: tuple[Taps, ...] = Field(
        (1, 2, 3, 5), description="Dilations of the enhance blocks, one per window."
    )
    enhance_channels: Width = Field(2, description="Channels of each enhance branch.")
    last_dim: Width = Field(32, description="Channels of the dilated last unit.")
    last_dilations: tuple[Taps, ...] = Field(
        (1, 3, 9), max_length=64, description="Dilations of the last unit."
    )
    synthesis_taps: Taps = Field(
        8, description="Window of the synthesis filterbank, in frames of the last stage."
    )
    noise_channels: Width | None = Field(
        None,
        description="Channels of the noise that the decoder gates into its stages above the frame "
        "rate; null: no noise.",
    )
    decoder_delay: int = Field(
        2, ge=1, le=2**12, description="Frames of look-ahead that the decoder waits for."
    )

    @model_validator(mode="after")
    def _consistent(self) -> AudioConfig:
        n = len(self.strides)
        if self.hop_length > MAX_HOP:
            raise ValueError(f"strides make a hop of {self.hop_length}, more than {MAX_HOP}")
        per_stride = [f"{a}_{b}" for b in ("dims", "depths", "expansions") for a in PARTS]
        for name in per_stride:
            value = getattr(self, name)
            if value is not None and len(value) != n:
                raise ValueError(f"{name} needs {n} entries, one per stride")
        if len(self.enhance_dilations) != len(self.enhance_kernels):
            raise ValueError("enhance_dilations needs one entry per enhance kernel")
        if self.encoder_dims[-1] % self.attention_heads:
            raise ValueError("encoder_dims[-1] must be a multiple of attention_heads")
        if self.tconv_taps < self.strides[0]:
            raise ValueError("tconv_taps must be at least strides[0]")
        return self

    @property
    def hop_length(self) -> int:
        """Samples per token."""
        return math.prod(self.strides)

    @property
    def least_weights(self) -> int:
        width, layers = self.encoder_dims[-1], self.encoder_layers + self.decoder_layers
        total = layers * 4 * width**2
        for part in PARTS:
            dims, depths = getattr(self, f"{part}_dims"), getattr(self, f"{part}_depths")
            expansions = getattr(self, f"{part}_expansions") or [self.expansion] * len(dims)
            units = zip(dims, depths, expansions)
            total += sum(2 * depth * factor * dim**2 for dim, depth, factor in units)
            total += sum(a * b for a, b in pairwise(dims))
            hidden = getattr(self, f"{part}_feedforward_dim") or 2 * width
            total += getattr(self, f"{part}_layers") * 3 * width * hidden
        rate = math.prod(self.strides[1:])  # of the fastest stage, per frame
        return total + NOISE_FRAMES * rate * (self.noise_channels or 0)

    @property
    def latency(self) -> float:
        """Algorithmic latency in seconds: one hop to fill a token and the decoder's delay."""
        return (1 + self.decoder_delay) * self.hop_length / self.sample_rate
