"""How close decoded data come to the original: metrics, and processes that compute them."""

from .audio import mel_distance, pesq_wb, si_sdr, stoi
from .image import lpips, ms_ssim, psnr, ssim

__all__ = ["lpips", "mel_distance", "ms_ssim", "pesq_wb", "psnr", "si_sdr", "ssim", "stoi"]
