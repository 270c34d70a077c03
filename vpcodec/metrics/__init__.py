"""How close decoded data come to the original: metrics, and processes that compute them."""

from .audio import (
    log_spectral_distance,
    loudness_difference,
    mel_cepstral_distortion,
    mel_distance,
    si_sdr,
    snr,
    stft_distance,
)
from .image import lpips, ms_ssim, psnr, ssim
from .speech import dnsmos, f0_rmse, pesq_nb, pesq_wb, stoi, voicing_error

__all__ = [
    "dnsmos",
    "f0_rmse",
    "log_spectral_distance",
    "loudness_difference",
    "lpips",
    "mel_cepstral_distortion",
    "mel_distance",
    "ms_ssim",
    "pesq_nb",
    "pesq_wb",
    "psnr",
    "si_sdr",
    "snr",
    "ssim",
    "stft_distance",
    "stoi",
    "voicing_error",
]
