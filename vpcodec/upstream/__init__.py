"""Codecs that others published: SQCodec and its second version, L3AC."""

from ..hub import register_source
from .cache import is_converted, open_published
from .catalog import MODULES, PUBLISHED, Published, find, is_published
from .source import PublishedModels

__all__ = [
    "MODULES",
    "PUBLISHED",
    "Published",
    "find",
    "is_converted",
    "is_published",
    "open_published",
]

register_source(PublishedModels())
