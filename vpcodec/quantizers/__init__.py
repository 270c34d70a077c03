"""Quantizers: one contract (`Quantizer`) and one result (`Quantized`)."""

from collections.abc import Mapping
from typing import Any

from ..config import QuantizerConfig
from ..usage import CodebookUsage
from .base import (
    Calibration,
    NoCodebookError,
    NotFiniteError,
    Quantized,
    Quantizer,
    all_reduce_usage,
)
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
    "Calibration",
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


def build_quantizer(
    config: QuantizerConfig, training: Mapping[str, Any] | None = None
) -> Quantizer:
    """Build the quantizer that a configuration describes.

    Args:
        config: configuration of the quantizer.
        training: keyword arguments of its class that only training needs, such as `queue_size`.
    """
    return _CLASSES[config.type](**config.model_dump(exclude={"type"}), **(training or {}))
