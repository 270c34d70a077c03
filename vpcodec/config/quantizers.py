"""The quantizer of a model: what decides its tokens."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, Tag, model_validator

from .strict import Positive, Strict, by_type

MAX_CODEBOOK = 2**32  # limit of token files
MAX_STORED_CODES = 2**20  # in a stored codebook: more take too long to fit and to search


def _not_too_many(levels: tuple[int, ...]) -> tuple[int, ...]:
    if math.prod(levels) > MAX_CODEBOOK:
        raise ValueError(f"make {math.prod(levels)} codes, more than {MAX_CODEBOOK}")
    return levels


Levels = Annotated[tuple[Annotated[int, Field(ge=2)], ...], AfterValidator(_not_too_many)]


class BaseQuantizerConfig(Strict):
    """The fields of every quantizer.

    Attributes:
        retired: training options that configurations had before these moved to recipes; accepted
            and ignored.
        outside_space: fields that do not decide the tokens; see `ModelConfig`.
    """

    retired: ClassVar[frozenset[str]] = frozenset()
    outside_space: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _without_retired(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if name not in cls.retired}


class GridConfig(BaseQuantizerConfig):
    """A quantizer whose codebook is a product of scalar grids."""

    levels: Levels = Field(description="Levels per latent dimension.")

    @property
    def codebook_size(self) -> int:
        return math.prod(self.levels)

    @property
    def token_levels(self) -> tuple[int, ...]:
        return self.levels

    @property
    def dim(self) -> int:
        return len(self.levels)


class FSPConfig(GridConfig):
    """Finite scalar perturbation: uniform latents, Lloyd-Max centroids."""

    retired: ClassVar[frozenset[str]] = frozenset({"rejection", "eta"})
    outside_space: ClassVar[frozenset[str]] = frozenset({"quantize_rate"})

    type: Literal["fsp"] = "fsp"
    levels: Levels = Field(
        (9, 9, 9, 7, 7, 7),
        min_length=1,
        description="Levels per latent dimension; their product is the codebook size.",
    )
    activation: Literal["tanh", "normal", "sigmoid", "laplace"] = Field(
        "tanh",
        description="Squashing to [0, 1], with the latent variance that makes the result uniform: "
        "tanh (0.8225), normal CDF (1), sigmoid (3.29), Laplace CDF (2).",
    )
    quantize_rate: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of training tokens that are quantized instead of perturbed.",
    )  # a training option, but part of the fingerprints of models


class FSQConfig(GridConfig):
    """Finite scalar quantization, symmetric, with noise in training (baseline)."""

    retired: ClassVar[frozenset[str]] = frozenset({"noise_rate"})

    type: Literal["fsq"] = "fsq"
    levels: Levels = Field(
        (8, 8, 8, 6, 5), min_length=1, description="Points per latent dimension."
    )


class _CodebookConfig(BaseQuantizerConfig):
    """A quantizer with a stored codebook."""

    dim: Positive = Field(5, le=4096, description="Latent dimensions.")
    codebook_size: Annotated[int, Field(gt=0, le=MAX_STORED_CODES)] = Field(
        16_384, description="Codes."
    )

    @property
    def token_levels(self) -> tuple[int, ...]:
        return (self.codebook_size,)


class VPConfig(_CodebookConfig):
    """Vector perturbation: no codebook in training, k-means afterwards."""

    retired: ClassVar[frozenset[str]] = frozenset(
        {
            "eta",
            "mh_steps",
            "neighbors",
            "search_size",
            "queue_size",
            "push_size",
            "metropolis",
            "calibrate_every",
        }
    )

    type: Literal["vp"] = "vp"


class VQConfig(_CodebookConfig):
    """Codebook of moving averages, with a k-means start and restarts of unused codes (baseline)."""

    retired: ClassVar[frozenset[str]] = frozenset(
        {"decay", "commitment", "restart_below", "push_size"}
    )

    type: Literal["vq"] = "vq"


class SimVQConfig(_CodebookConfig):
    """A frozen random codebook under a learned linear map (baseline)."""

    type: Literal["simvq"] = "simvq"


class LFQConfig(BaseQuantizerConfig):
    """Lookup-free quantization: one bit per dimension (baseline)."""

    retired: ClassVar[frozenset[str]] = frozenset({"entropy_weight", "commitment", "temperature"})

    type: Literal["lfq"] = "lfq"
    dim: Positive = Field(14, le=24, description="Bits per token.")

    @property
    def codebook_size(self) -> int:
        return 2**self.dim

    @property
    def token_levels(self) -> tuple[int, ...]:
        return (2,) * self.dim


QuantizerConfig = Annotated[
    Annotated[FSPConfig, Tag("fsp")]
    | Annotated[VPConfig, Tag("vp")]
    | Annotated[FSQConfig, Tag("fsq")]
    | Annotated[VQConfig, Tag("vq")]
    | Annotated[SimVQConfig, Tag("simvq")]
    | Annotated[LFQConfig, Tag("lfq")],
    by_type("fsp", "fsp", "vp", "fsq", "vq", "simvq", "lfq"),
]

QUANTIZERS: dict[str, type[BaseQuantizerConfig]] = {
    "fsp": FSPConfig,
    "vp": VPConfig,
    "fsq": FSQConfig,
    "vq": VQConfig,
    "simvq": SimVQConfig,
    "lfq": LFQConfig,
}
