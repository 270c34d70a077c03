"""The native models, in torch."""

from collections.abc import Mapping
from typing import Any

from ..config import ImageConfig, ModelConfig
from .audio import AudioAutoencoder
from .image import ImageAutoencoder

__all__ = [
    "AudioAutoencoder",
    "Autoencoder",
    "ImageAutoencoder",
    "build_model",
]

Autoencoder = AudioAutoencoder | ImageAutoencoder


def build_model(config: ModelConfig, training: Mapping[str, Any] | None = None) -> Autoencoder:
    """The model of a configuration, with fresh weights.

    Args:
        config: of the model.
        training: of its quantizer, see `build_quantizer`; needed only to train it.
    """
    if isinstance(config, ImageConfig):
        return ImageAutoencoder(config, training)
    return AudioAutoencoder(config, training)
