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
    """Build the model of a configuration, with random weights.

    Args:
        config: configuration of the model.
        training: training options of its quantizer, see `build_quantizer`; needed only for
            training.
    """
    if isinstance(config, ImageConfig):
        return ImageAutoencoder(config, training)
    return AudioAutoencoder(config, training)
