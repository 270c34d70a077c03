"""The configuration of image models."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from .model import ModelConfig
from .strict import Depth, Positive, Width

MAX_OFFSETS = 2**27  # numbers in the tables of all attention layers


class ImageConfig(ModelConfig):
    """The native image autoencoder: convolutions, and attention within windows of tokens.

    Every layer sees a bounded neighbourhood, so large images can be coded in tiles with the tokens
    of the whole.
    """

    outside_space: ClassVar[frozenset[str]] = ModelConfig.outside_space | {
        "decoder_depths",
        "decoder_layers",
    }

    kind: Literal["image"] = Field("image", description="What the model codes.")
    patch_size: Positive = Field(
        2,
        le=32,
        description="Side of the squares of pixels that the first stage takes as one input.",
    )
    dims: tuple[Width, ...] = Field(
        (64, 128, 160),
        min_length=1,
        max_length=6,
        description="Channels per stage; each stage after the first halves width and height.",
    )
    encoder_depths: tuple[Depth, ...] = Field(
        (1, 1, 2), description="Residual blocks per encoder stage."
    )
    decoder_depths: tuple[Depth, ...] = Field(
        (1, 2, 2), description="Residual blocks per decoder stage, in the order of `dims`."
    )
    attention_window: Annotated[int, Field(ge=1, le=64)] = Field(
        8, description="Side of the square windows of tokens that attend to each other."
    )
    attention_heads: Width = Field(4, description="Attention heads.")
    encoder_layers: Depth = Field(1, description="Attention layers before the quantizer.")
    decoder_layers: Depth = Field(1, description="Attention layers after the quantizer.")

    @model_validator(mode="after")
    def _consistent(self) -> ImageConfig:
        n = len(self.dims)
        for name in ("encoder_depths", "decoder_depths"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"{name} needs {n} entries, one per entry of dims")
        if self.dims[-1] % self.attention_heads:
            raise ValueError("dims[-1] must be a multiple of attention_heads")
        if self.attention_window**4 * (self.encoder_layers + self.decoder_layers) > MAX_OFFSETS:
            raise ValueError("attention_window is too large for that many layers")
        return self

    @property
    def hop_length(self) -> int:
        """Side of the square of pixels that a token stands for."""
        return self.patch_size * 2 ** (len(self.dims) - 1)

    @property
    def least_weights(self) -> int:
        depths = zip(self.dims, self.encoder_depths, self.decoder_depths)
        total = sum(18 * (down + up) * dim**2 for dim, down, up in depths)
        return total + 8 * (self.encoder_layers + self.decoder_layers) * self.dims[-1] ** 2

    @property
    def bits_per_pixel(self) -> float:
        """Nominal bits per pixel of one channel: bits per token over pixels per token."""
        return self.bits_per_token / self.hop_length**2

    @property
    def block_size(self) -> int:
        """Side of an attention window in pixels; the network takes multiples of it."""
        return self.hop_length * self.attention_window

    @property
    def encoder_halo(self) -> int:
        """Most tokens around a tile of whole windows whose pixels its tokens depend on."""
        return self._halo(self.encoder_depths)

    @property
    def decoder_halo(self) -> int:
        """Most tokens around a tile of whole windows that its pixels depend on."""
        return self._halo(self.decoder_depths)

    def _halo(self, depths: tuple[int, ...]) -> int:
        """Reach of the 3 x 3 convolutions, one at each end and two per block, in whole windows."""
        blocks = sum(2 * depth * 2**i for i, depth in enumerate(depths))
        windows = -(-self.patch_size * (1 + blocks) // self.block_size)
        return windows * self.attention_window
