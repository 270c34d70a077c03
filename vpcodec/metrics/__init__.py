"""How close decoded data come to the original: pure functions, each with its registry entry."""

from .audio import (
    log_spectral_distance,
    mel_cepstral_distortion,
    mel_distance,
    si_sdr,
    snr,
    stft_distance,
)
from .image import lpips, ms_ssim, psnr, ssim
from .prosody import f0_rmse, loudness_difference, voicing_error
from .speech import dnsmos, pesq_nb, pesq_wb, stoi

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
