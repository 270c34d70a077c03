"""Training options of quantizers: the section `quantizer` of every recipe.

They matter only during training, and are not part of the model.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag, TypeAdapter, ValidationError, model_validator

from ..config import (
    QUANTIZERS,
    ConfigError,
    ModelConfig,
    NotNegative,
    Positive,
    Strict,
    by_type,
    explain,
)


class QuantizerTrainingConfig(Strict):
    """The training options of a quantizer."""

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the quantizer's class."""
        return self.model_dump(exclude={"type", "calibrate_every"})


class FSPTrainingConfig(QuantizerTrainingConfig):
    """Finite scalar perturbation."""

    type: Literal["fsp"] = "fsp"
    rejection: Literal["vector", "dimension"] = Field(
        "vector",
        description="What passes unchanged if a dimension leaves [0, 1]: the vector, or only that "
        "dimension.",
    )
    eta: float = Field(
        1.0, gt=0, le=2, description="Width of the perturbation, relative to the width of a cell."
    )


class VPTrainingConfig(QuantizerTrainingConfig):
    """Vector perturbation."""

    type: Literal["vp"] = "vp"
    eta: float = Field(
        1.5, gt=0, description="Radius of the proposals relative to D_M, before calibration."
    )
    mh_steps: Positive = Field(
        1, description="Fewest Metropolis-Hastings steps per token; calibration may raise them."
    )
    neighbors: Positive = Field(8, description="k of the density estimate.")
    search_size: Positive | None = Field(
        8192,
        description="Number of newest latents to measure distances to; null: the whole queue.",
    )
    queue_size: Positive | None = Field(
        None, description="Latents in the queue; null: 16 per code, at least 65,536."
    )
    push_size: Positive = Field(
        256, description="Latents that each process adds to the queue per step."
    )
    metropolis: bool = Field(True, description="False: accept every proposal (an ablation).")
    calibrate_every: NotNegative = Field(
        2000,
        description="Steps between calibrations of eta, which match the error of a k-means "
        "codebook on the queue; 0: never.",
    )

    @model_validator(mode="after")
    def _enough_latents(self) -> VPTrainingConfig:
        sizes = [size for size in (self.search_size, self.queue_size) if size is not None]
        if sizes and self.neighbors > min(sizes):
            raise ValueError("neighbors must be at most search_size and queue_size")
        return self


class FSQTrainingConfig(QuantizerTrainingConfig):
    """Finite scalar quantization (baseline)."""

    type: Literal["fsq"] = "fsq"
    noise_rate: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of scalars that get noise instead of rounding in training.",
    )


class VQTrainingConfig(QuantizerTrainingConfig):
    """A codebook of moving averages (baseline)."""

    type: Literal["vq"] = "vq"
    decay: float | None = Field(
        None, ge=0, le=1, description="Decay of the moving averages; null: 32 latents per code."
    )
    commitment: float = Field(0.25, ge=0, description="Weight of the commitment loss.")
    restart_below: float = Field(
        0.1, ge=0, le=1, description="Fraction of the average use below which a code restarts."
    )
    push_size: Positive = Field(
        256, description="Latents that each process adds per step to the queue for restarts."
    )


class SimVQTrainingConfig(QuantizerTrainingConfig):
    """A random codebook under a learned map (baseline); it has no options."""

    type: Literal["simvq"] = "simvq"


class LFQTrainingConfig(QuantizerTrainingConfig):
    """Lookup-free quantization (baseline)."""

    type: Literal["lfq"] = "lfq"
    entropy_weight: float = Field(0.1, ge=0, description="Weight of the entropy loss.")
    commitment: float = Field(0.25, ge=0, description="Weight of the commitment loss.")
    temperature: float = Field(
        0.01, gt=0, description="Temperature of the soft assignment to codes."
    )


QuantizerTraining = Annotated[
    Annotated[FSPTrainingConfig, Tag("fsp")]
    | Annotated[VPTrainingConfig, Tag("vp")]
    | Annotated[FSQTrainingConfig, Tag("fsq")]
    | Annotated[VQTrainingConfig, Tag("vq")]
    | Annotated[SimVQTrainingConfig, Tag("simvq")]
    | Annotated[LFQTrainingConfig, Tag("lfq")],
    by_type("fsp", "fsp", "vp", "fsq", "vq", "simvq", "lfq"),
]


def with_training_options(data: Any) -> Any:
    """Complete the section `quantizer` of a recipe given as a plain dict.

    The section gets the type of `model.quantizer`. Training options in `model.quantizer`, where
    earlier recipes have them, are moved to the section unless it sets them itself.
    """
    if not isinstance(data, dict):
        return data
    model, section = data.get("model"), data.get("quantizer", {})
    old: dict[str, Any] = {}
    name: Any
    if isinstance(model, ModelConfig):
        name = model.quantizer.type
    else:
        quantizer: Any = model.get("quantizer", {}) if isinstance(model, dict) else None
        name = quantizer.get("type", "fsp") if isinstance(quantizer, dict) else None
        if not isinstance(name, str) or name not in QUANTIZERS:
            return data  # validation refuses it
        old = {key: quantizer[key] for key in QUANTIZERS[name].retired if key in quantizer}
    if not isinstance(section, dict):
        return data
    return data | {"quantizer": {"type": name} | old | section}


def parse_training(model: dict[str, Any], section: dict[str, Any]) -> QuantizerTrainingConfig:
    """The training options of a run, from its checkpoint.

    Args:
        model: configuration of the model; in earlier checkpoints, it contains the options.
        section: section `quantizer` of the recipe; empty in earlier checkpoints.

    Raises:
        ConfigError: a field is wrong.
    """
    data = with_training_options({"model": model, "quantizer": section})
    try:
        return TypeAdapter(QuantizerTraining).validate_python(data["quantizer"])
    except ValidationError as error:
        raise ConfigError(explain(error)) from None
