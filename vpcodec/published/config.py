"""The configuration of a published SQCodec or L3AC, as in its config.json."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from ..config import MAX_HOP, AudioModelConfig, Depth, NotNegative, Positive, Width


class SQCodecConfig(AudioModelConfig):
    """A published SQCodec, in its first version ("sqcodec") or its second ("l3ac").

    It is not causal: convolutions look both ways, and the decoder normalises over its whole input.
    """

    descriptive: ClassVar[frozenset[str]] = AudioModelConfig.descriptive | {"silence"}
    outside_space: ClassVar[frozenset[str]] = AudioModelConfig.outside_space | {
        "silence",
        "decoder_strides",
        "decoder_dims",
        "decoder_depths",
        "decoder_layers",
        "decoder_outer_layers",
    }
    decoder_weights: ClassVar[tuple[str, ...]] = ("decoder.", "en_decoder.")

    architecture: Literal["sqcodec", "l3ac"] = Field(description="The version.")
    strides: tuple[Positive, ...] = Field(
        min_length=1,
        max_length=16,
        description="Downsampling factor of each down layer of the encoder.",
    )
    encoder_dims: tuple[Width, ...] = Field(
        description="Channels per stage; one more than `strides`."
    )
    encoder_depths: tuple[Depth, ...] = Field(description="ConvUnits per encoder stage.")
    decoder_strides: tuple[Positive, ...] = Field(
        min_length=1,
        max_length=16,
        description="Upsampling factor of each up layer of the decoder.",
    )
    decoder_dims: tuple[Width, ...] = Field(
        description="Channels per stage and of the last unit; one more than `decoder_strides`."
    )
    decoder_depths: tuple[Depth, ...] = Field(
        description="ConvUnits per decoder stage, one per entry of `decoder_strides`."
    )
    feature_dim: Width = Field(
        multiple_of=4, description="Width of the Transformers; each head has a quarter of it."
    )
    attention_heads: Width = Field(6, description="Attention heads.")
    attention_window: Positive = Field(
        le=2**14,
        description="Tokens per attention block; each block sees itself and the previous one.",
    )
    token_stride: Positive = Field(
        1,
        le=64,
        description="Features per token; the outer Transformer layers run at the feature rate.",
    )
    encoder_layers: Positive = Field(le=256, description="Transformer layers at the token rate.")
    encoder_outer_layers: Depth = Field(
        0, description="Transformer layers before them, at the feature rate."
    )
    decoder_layers: Positive = Field(le=256, description="Transformer layers at the token rate.")
    decoder_outer_layers: Depth = Field(
        0, description="Transformer layers after them, at the feature rate."
    )
    silence: tuple[NotNegative, ...] = Field(
        (),
        description="Tokens of a block of silence after silence. If present, they pad clips to "
        "whole blocks before decoding.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> SQCodecConfig:
        lengths = {
            "encoder_dims": len(self.strides) + 1,
            "encoder_depths": len(self.strides) + 1,
            "decoder_dims": len(self.decoder_strides) + 1,
            "decoder_depths": len(self.decoder_strides),
        }
        for name, length in lengths.items():
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name} needs {length} entries")
        if math.prod(self.strides) != math.prod(self.decoder_strides):
            raise ValueError("decoder_strides must have the product of strides")
        if self.hop_length > MAX_HOP:
            raise ValueError(f"strides make a hop of {self.hop_length}, more than {MAX_HOP}")
        outer = (self.encoder_outer_layers > 0, self.decoder_outer_layers > 0)
        if outer != (self.token_stride > 1,) * 2:
            raise ValueError("outer layers go with a token_stride above 1")
        if self.quantizer.type != "fsq":
            raise ValueError("quantizer must be of type fsq")
        if len(self.silence) not in (0, self.attention_window):
            raise ValueError("silence needs attention_window entries, or none")
        if max(self.silence, default=0) >= self.codebook_size:
            raise ValueError("silence has a token beyond the codebook")
        return self

    @property
    def hop_length(self) -> int:
        """Samples per token."""
        return math.prod(self.strides) * self.token_stride

    @property
    def latency(self) -> None:
        """None: the model is not for live streams."""
        return None

    @property
    def encoder_context(self) -> int:
        """Context of the encoder's convolutions on either side of a token, tokens."""
        reach, rate = 22 + 22 + 3, 1  # samples: two poolings of 45, seven taps
        for depth, stride in zip(self.encoder_depths, (*self.strides, 1)):
            reach += 3 * depth * rate
            rate *= stride
        return -(-(reach + rate) // self.hop_length)

    @property
    def decoder_context(self) -> int:
        """Context of the decoder's convolutions on either side of a feature, features."""
        samples = math.prod(self.strides)  # per feature
        reach, step = samples, samples
        for depth, stride in zip(self.decoder_depths, self.decoder_strides):
            reach += (3 * depth + 4 + 4 + 3 * 5 + 1) * step  # poolings of 9, dilation 5, upsampling
            step //= stride
        return -(-(reach + 3 * (1 + 3 + 9) + 3) // samples)
