"""The configuration of a published SQCodec or L3AC, as in its config.json."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from ..config import AudioModelConfig, NotNegative, Positive


class SQCodecConfig(AudioModelConfig):
    """A published SQCodec, in its first version ("sqcodec") or its second ("l3ac").

    Not causal: convolutions look both ways, and the decoder normalises over its whole input.
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

    architecture: Literal["sqcodec", "l3ac"] = Field(description="Which version.")
    strides: tuple[Positive, ...] = Field(
        min_length=1, description="Decimation of each down layer of the encoder."
    )
    encoder_dims: tuple[Positive, ...] = Field(description="Channels; one more than `strides`.")
    encoder_depths: tuple[NotNegative, ...] = Field(description="ConvUnits per encoder stage.")
    decoder_strides: tuple[Positive, ...] = Field(
        min_length=1, description="Factor of each up layer of the decoder."
    )
    decoder_dims: tuple[Positive, ...] = Field(
        description="Channels; one more than `decoder_strides`, the last those of the last unit."
    )
    decoder_depths: tuple[NotNegative, ...] = Field(
        description="ConvUnits per decoder stage, one per entry of `decoder_strides`."
    )
    feature_dim: Positive = Field(
        multiple_of=4, description="Width of the Transformers; heads have a quarter of it."
    )
    attention_heads: Positive = Field(6, description="Attention heads.")
    attention_window: Positive = Field(
        description="Tokens per block of attention; each block sees itself and the previous one."
    )
    token_stride: Positive = Field(
        1, description="Features per token; the outer Transformer layers run at that higher rate."
    )
    encoder_layers: Positive = Field(description="Transformer layers at the token rate.")
    encoder_outer_layers: NotNegative = Field(
        0, description="Layers before them, at the higher rate."
    )
    decoder_layers: Positive = Field(description="Transformer layers at the token rate.")
    decoder_outer_layers: NotNegative = Field(
        0, description="Layers after them, at the higher rate."
    )
    silence: tuple[NotNegative, ...] = Field(
        (),
        description="Tokens of a block of silence after silence; if present, clips are padded with "
        "them to whole blocks before decoding.",
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
        """None: not for live streams."""
        return None

    @property
    def encoder_context(self) -> int:
        """Most tokens on either side whose samples the convolutions before a token see."""
        reach, rate = 22 + 22 + 3, 1  # samples: two poolings of 45, seven taps
        for depth, stride in zip(self.encoder_depths, (*self.strides, 1)):
            reach += 3 * depth * rate
            rate *= stride
        return -(-(reach + rate) // self.hop_length)

    @property
    def decoder_context(self) -> int:
        """Most features on either side that the convolutions after a feature see."""
        samples = math.prod(self.strides)  # of a feature
        reach, step = samples, samples
        for depth, stride in zip(self.decoder_depths, self.decoder_strides):
            reach += (3 * depth + 4 + 4 + 3 * 5 + 1) * step  # poolings of 9, dilation 5, upsampling
            step //= stride
        return -(-(reach + 3 * (1 + 3 + 9) + 3) // samples)
