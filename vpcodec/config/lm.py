"""The configuration of language models on the tokens of a codec."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from .strict import Strict

Width = Annotated[int, Field(gt=0, le=2**12)]
Tokens = Annotated[int, Field(gt=1, le=2**14)]


class LMConfig(Strict):
    """A decoder-only Transformer (Llama) that predicts the digits of the next token."""

    descriptive: ClassVar[frozenset[str]] = frozenset({"description", "license"})

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64, description="Model name."
    )
    kind: Literal["lm"] = Field("lm", description="What is trained: a language model.")
    description: str = Field("", description="One line.")
    license: str = Field("unknown", description="Licence of the weights.")
    codec: str = Field(
        "speech-1k",
        min_length=1,
        description="Codec that made the tokens: bundled name, folder, or name on the Hub.",
    )
    layers: Annotated[int, Field(gt=0, le=64)] = Field(6, description="Layers of the Transformer.")
    width: Width = Field(256, description="Width of the layers.")
    heads: Annotated[int, Field(gt=0, le=256)] = Field(
        4, description="Attention heads; they divide the width into even parts."
    )
    context: Tokens = Field(
        512, description="Tokens that the model sees at a time; with a `grid`, all of its places."
    )
    grid: tuple[Tokens, Tokens] | None = Field(
        None,
        description="Rows and columns of tokens of the pictures that are generated, row by row; "
        "null: audio.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> LMConfig:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width must be a multiple of twice the heads, got {self.width} and {self.heads}"
            )
        if self.grid is not None and self.context != self.grid[0] * self.grid[1]:
            raise ValueError(
                f"context must be rows times columns of the grid, {self.grid[0] * self.grid[1]}, "
                f"got {self.context}"
            )
        return self
