"""Quantizers: one contract (`Quantizer`) and one result (`Quantized`)."""

from ..config import QuantizerConfig
from ..usage import CodebookUsage
from .base import NoCodebookError, NotFiniteError, Quantized, Quantizer, all_reduce_usage
from .fsp import FSP
from .fsq import FSQ
from .lfq import LFQ
from .simvq import SimVQ
from .vp import VP
from .vq import VQ

__all__ = [
    "FSP",
    "FSQ",
    "LFQ",
    "VP",
    "VQ",
    "CodebookUsage",
    "NoCodebookError",
    "NotFiniteError",
    "Quantized",
    "Quantizer",
    "SimVQ",
    "all_reduce_usage",
    "build_quantizer",
]

_CLASSES = {"fsp": FSP, "vp": VP, "fsq": FSQ, "vq": VQ, "simvq": SimVQ, "lfq": LFQ}


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    """Build the quantizer that a configuration describes."""
    options = config.model_dump(exclude={"type", "calibrate_every"})
    return _CLASSES[config.type](**options)
