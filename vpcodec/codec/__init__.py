"""Codecs: what a user holds. Audio or images to tokens and back, as arrays or files."""

from .audio import AudioCodec, FileStats
from .base import Codec, Report, Source, find_model
from .image import ImageCodec, ImageStats
from .streams import DecoderStream, EncoderStream

__all__ = [
    "AudioCodec",
    "Codec",
    "DecoderStream",
    "EncoderStream",
    "FileStats",
    "ImageCodec",
    "ImageStats",
    "Report",
    "Source",
    "find_model",
]
