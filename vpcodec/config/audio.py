"""The configuration of audio models."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from .model import ModelConfig
from .strict import NotNegative, Positive

PARTS = ("encoder", "decoder")
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
        description="Decimation of each encoder stage; their product is the hop length.",
    )
    encoder_dims: tuple[Positive, ...] = Field((32, 96, 192), description="Channels per stage.")
    encoder_depths: tuple[NotNegative, ...] = Field(
        (1, 2, 2), description="ConvUnits per encoder stage."
    )
    decoder_dims: tuple[Positive, ...] = Field(
        (256, 128, 48), description="Channels per decoder stage, lowest rate first."
    )
    decoder_depths: tuple[NotNegative, ...] = Field(
        (2, 1, 1), description="ConvUnits per decoder stage."
    )
    kernel_size: Positive = Field(7, description="Taps of the depthwise convolutions.")
    expansion: Positive = Field(4, description="Hidden width of a ConvUnit over its width.")
    encoder_expansions: tuple[Positive, ...] | None = Field(
        None, description="`expansion` for each encoder stage; null: the same for all."
    )
    decoder_expansions: tuple[Positive, ...] | None = Field(
        None, description="`expansion` for each decoder stage; null: the same for all."
    )
    tconv_kernels: tuple[Positive, ...] = Field(
        (1, 5, 11, 21, 45),
        min_length=1,
        description="TPooling windows of the first block, samples.",
    )
    tconv_channels: Positive = Field(64, description="Hidden width of the first block.")
    tconv_taps: Positive = Field(32, description="Taps of the first block's strided convolution.")
    attention_window: Positive = Field(128, description="Tokens that each token attends to.")
    attention_heads: Positive = Field(4, description="Attention heads.")
    encoder_layers: int = Field(1, ge=0, description="Transformer layers before the quantizer.")
    decoder_layers: int = Field(2, ge=0, description="Transformer layers after the quantizer.")
    encoder_feedforward_dim: Positive | None = Field(
        None,
        description="Hidden width of the encoder's Transformer layers; null: 8/3 of their width.",
    )
    decoder_feedforward_dim: Positive | None = Field(
        None,
        description="Hidden width of the decoder's Transformer layers; null: 8/3 of their width.",
    )
    enhance_kernels: tuple[Positive, ...] = Field(
        (1, 3, 5, 9), min_length=1, description="TPooling windows of the enhance blocks."
    )
    enhance_dilations: tuple[Positive, ...] = Field(
        (1, 2, 3, 5), description="Dilations of the enhance blocks, one per window."
    )
    enhance_channels: Positive = Field(2, description="Channels of each enhance branch.")
    last_dim: Positive = Field(32, description="Channels of the dilated last unit.")
    last_dilations: tuple[Positive, ...] = Field(
        (1, 3, 9), description="Dilations of the last unit."
    )
    synthesis_taps: Positive = Field(
        8, description="Window of the synthesis filterbank, in frames of the last stage."
    )
    noise_channels: Positive | None = Field(
        None,
        description="Channels of the noise that the decoder gates into its stages above the frame "
        "rate; null: no noise.",
    )
    decoder_delay: int = Field(
        2, ge=1, description="Frames of look-ahead that the decoder waits for."
    )

    @model_validator(mode="after")
    def _consistent(self) -> AudioConfig:
        n = len(self.strides)
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
    def latency(self) -> float:
        """Algorithmic latency in seconds: one hop to fill a token and the decoder's delay."""
        return (1 + self.decoder_delay) * self.hop_length / self.sample_rate
