"""The models, in torch: the native ones, and the published SQCodec."""

from ..config import ImageConfig, ModelConfig, SQCodecConfig
from .audio import AudioAutoencoder
from .image import ImageAutoencoder
from .sqcodec import SQCodecAutoencoder

__all__ = [
    "AudioAutoencoder",
    "Autoencoder",
    "ImageAutoencoder",
    "SQCodecAutoencoder",
    "build_model",
]

Autoencoder = AudioAutoencoder | ImageAutoencoder | SQCodecAutoencoder


def build_model(config: ModelConfig) -> Autoencoder:
    """The model of a configuration, with fresh weights."""
    if isinstance(config, SQCodecConfig):
        return SQCodecAutoencoder(config)
    return ImageAutoencoder(config) if isinstance(config, ImageConfig) else AudioAutoencoder(config)
