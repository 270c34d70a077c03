"""The configuration that all models share."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from .quantizers import FSPConfig, QuantizerConfig
from .strict import Strict


class ModelConfig(Strict):
    """The fields of every model.

    Attributes:
        descriptive: fields that are no part of the fingerprint.
        outside_space: fields that are no part of the token space: they do not decide the tokens.
        decoder_weights: how the names of weights begin that are no part of the token space.
    """

    descriptive: ClassVar[frozenset[str]] = frozenset({"description", "license"})
    outside_space: ClassVar[frozenset[str]] = descriptive | {"name"}
    decoder_weights: ClassVar[tuple[str, ...]] = ("decoder.",)

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(@([2-9]|[1-9][0-9]+))?$",
        max_length=64,
        description="Model name, as in token files; @2 and so on is its revision.",
    )
    kind: str = Field(description="What the model codes.")
    description: str = Field("", description="One line, shown by `vpcodec models`.")
    license: str = Field("unknown", description="Licence of the weights.")
    quantizer: QuantizerConfig = Field(
        default_factory=FSPConfig,
        description="One of the quantizers below, selected by its `type`.",
    )

    @property
    def revision(self) -> int:
        """1 for a plain name; a new encoder makes a new revision."""
        return int(self.name.partition("@")[2] or 1)

    @property
    def modality(self) -> str:
        """ "audio" or "image": what config.json calls `kind`."""
        return self.kind

    @property
    def hop_length(self) -> int:
        """Samples per token, or the side in pixels of the square that a token stands for."""
        raise NotImplementedError

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def least_weights(self) -> int:
        """Numbers that the model's weights have at least: a file with fewer is not for it."""
        return 0

    @property
    def bits_per_token(self) -> float:
        """log2 of the codebook size."""
        return math.log2(self.codebook_size)
