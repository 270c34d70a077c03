"""The native models, in torch."""

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


def build_model(config: ModelConfig) -> Autoencoder:
    """The model of a configuration, with fresh weights."""
    return ImageAutoencoder(config) if isinstance(config, ImageConfig) else AudioAutoencoder(config)
