"""The configuration of a model, as in config.json: `AudioConfig` or `ImageConfig`.

Fields are documented only here; unknown keys and wrong types are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from .audio import FRAME_COUNTER, MAX_HOP, NOISE_FRAMES, PARTS, AudioConfig, AudioModelConfig
from .image import ImageConfig
from .lm import LMConfig
from .model import ModelConfig
from .quantizers import (
    QUANTIZERS,
    FSPConfig,
    FSQConfig,
    GridConfig,
    LFQConfig,
    QuantizerConfig,
    SimVQConfig,
    VPConfig,
    VQConfig,
)
from .strict import (
    ConfigError,
    Depth,
    NotNegative,
    Positive,
    Share,
    Strict,
    Taps,
    Width,
    by_type,
    explain,
)

__all__ = [
    "FRAME_COUNTER",
    "MAX_HOP",
    "MODALITIES",
    "NOISE_FRAMES",
    "PARTS",
    "QUANTIZERS",
    "AudioConfig",
    "AudioModelConfig",
    "ConfigError",
    "Depth",
    "FSPConfig",
    "FSQConfig",
    "GridConfig",
    "ImageConfig",
    "LFQConfig",
    "LMConfig",
    "ModelConfig",
    "NotNegative",
    "Positive",
    "QuantizerConfig",
    "Share",
    "SimVQConfig",
    "Strict",
    "Taps",
    "VPConfig",
    "VQConfig",
    "Width",
    "by_type",
    "explain",
    "model_class",
    "parse_model",
    "register_architecture",
]

MODALITIES: dict[str, type[ModelConfig]] = {"audio": AudioConfig, "image": ImageConfig}
_architectures: dict[str, type[AudioModelConfig]] = {}  # of audio that are not native


def register_architecture(names: Iterable[str], config: type[AudioModelConfig]) -> None:
    """Register the configuration class of audio models whose `architecture` is one of `names`."""
    _architectures.update(dict.fromkeys(names, config))


def parse_model(data: Any) -> ModelConfig:
    """The configuration of a model from a plain dict.

    Without `kind` it is an audio model, without `architecture` a native one.

    Raises:
        ConfigError: a wrong field, which the message names.
    """
    try:
        return model_class(data).model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def model_class(data: Any) -> type[ModelConfig]:
    """The configuration class for a plain dict.

    Raises:
        ConfigError: unknown `kind` or `architecture`.
    """
    kind = data.get("kind", "audio") if isinstance(data, dict) else "audio"
    if not isinstance(kind, str) or kind not in MODALITIES:
        raise ConfigError(f"kind: must be one of {', '.join(MODALITIES)}")
    if kind == "audio" and isinstance(data, dict) and "architecture" in data:
        architecture = data["architecture"]
        if not isinstance(architecture, str) or architecture not in _architectures:
            known = ", ".join(_architectures) or "none here"
            raise ConfigError(f"architecture: must be one of {known}")
        return _architectures[architecture]
    return MODALITIES[kind]
