"""Quantizers: one contract (`Quantizer`), one result (`Quantized`)."""

from .base import Quantized, Quantizer
from .fsp import FSP

__all__ = ["FSP", "Quantized", "Quantizer"]
