"""Codecs: audio or images to tokens and back, as arrays, streams or files."""

from .. import published as _published  # noqa: F401  registers itself
from ..backends import DecoderStream, EncoderStream
from .audio import AudioCodec, FileStats
from .base import Codec, Source
from .batches import PaddedBatch
from .digits import SpecialTokens
from .image import ImageCodec, ImageStats
from .tokens import read_tokens

__all__ = [
    "AudioCodec",
    "Codec",
    "DecoderStream",
    "EncoderStream",
    "FileStats",
    "ImageCodec",
    "ImageStats",
    "PaddedBatch",
    "Source",
    "SpecialTokens",
    "read_tokens",
]
