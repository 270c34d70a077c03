"""The native models, in torch."""

from .audio import AudioAutoencoder

__all__ = ["AudioAutoencoder"]
