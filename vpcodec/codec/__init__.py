"""Codecs: what a user holds. Audio or images to tokens and back, as arrays or files."""

from .audio import AudioCodec, DecoderStream, EncoderStream, FileStats
from .base import Codec, Report, Source
from .image import ImageCodec, ImageStats

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
]
