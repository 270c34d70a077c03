"""Codecs published by others: SQCodec and its second version, L3AC.

Everything about them is in this package, and no module outside names them: importing it registers
the architecture with the backends and the model names with the hub.
"""

from ..backends import register
from ..hub import register_source
from .architecture import SQCODEC
from .cache import is_converted, open_published
from .catalog import MODULES, PUBLISHED, Published, is_published, look_up
from .source import PublishedModels

__all__ = [
    "MODULES",
    "PUBLISHED",
    "Published",
    "look_up",
    "is_converted",
    "is_published",
    "open_published",
]

register(SQCODEC)
register_source(PublishedModels())
