"""How close decoded audio comes to the original: metrics, and processes that compute them."""

from .audio import mel_distance, pesq_wb, si_sdr, stoi

__all__ = ["mel_distance", "pesq_wb", "si_sdr", "stoi"]
