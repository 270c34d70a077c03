"""The native models, in torch."""

from ..config import AudioConfig, ImageConfig
from .audio import AudioAutoencoder
from .image import ImageAutoencoder

__all__ = ["AudioAutoencoder", "Autoencoder", "ImageAutoencoder", "build_model"]

Autoencoder = AudioAutoencoder | ImageAutoencoder


def build_model(config: AudioConfig | ImageConfig) -> Autoencoder:
    """The model of a configuration, with fresh weights."""
    return AudioAutoencoder(config) if config.kind == "audio" else ImageAutoencoder(config)
