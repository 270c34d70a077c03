"""The metrics as the registry runs them: of two clips, or of two images, the reference first.

Each function returns a tuple with a value for each of its metrics, in the registry's order. What is
computed of the reference alone is kept in its clip.
"""

from __future__ import annotations

import numpy as np

from . import audio, image, speech
from .registry import Clip
from .workers import BEST_PSNR


def pesq_wb(reference: Clip, degraded: Clip) -> tuple[float]:
    rate = speech.PESQ_RATE
    return (speech.pesq_wb(reference.at(rate), degraded.at(rate), rate),)


def pesq_nb(reference: Clip, degraded: Clip) -> tuple[float]:
    rate = speech.PESQ_NB_RATE
    return (speech.pesq_nb(reference.at(rate), degraded.at(rate), rate),)


def stoi(reference: Clip, degraded: Clip) -> tuple[float]:
    return (speech.stoi(reference.samples, degraded.samples, degraded.rate),)


def estoi(reference: Clip, degraded: Clip) -> tuple[float]:
    return (speech.stoi(reference.samples, degraded.samples, degraded.rate, extended=True),)


def dnsmos(_: Clip, degraded: Clip) -> tuple[float, ...]:
    rate = speech.DNSMOS_RATE
    return speech.dnsmos(degraded.at(rate), rate)


def mel_distance(reference: Clip, degraded: Clip) -> tuple[float]:
    return (audio.mel_distance(reference.samples, degraded.samples, degraded.rate),)


def stft_distance(reference: Clip, degraded: Clip) -> tuple[float]:
    return (audio.stft_distance(reference.samples, degraded.samples),)


def log_spectral_distance(reference: Clip, degraded: Clip) -> tuple[float]:
    return (audio.log_spectral_distance(reference.samples, degraded.samples),)


def mel_cepstral_distortion(reference: Clip, degraded: Clip) -> tuple[float]:
    rate = audio.MCD_RATE
    return (audio.mel_cepstral_distortion(reference.at(rate), degraded.at(rate), rate),)


def si_sdr(reference: Clip, degraded: Clip) -> tuple[float]:
    return (audio.si_sdr(reference.samples, degraded.samples),)


def snr(reference: Clip, degraded: Clip) -> tuple[float]:
    return (audio.snr(reference.samples, degraded.samples),)


def pitch(reference: Clip, degraded: Clip) -> tuple[float, float]:
    rate = speech.PITCH_RATE
    tracks = (
        clip.get("pitch", lambda clip=clip: speech.pitch(clip.at(rate), rate))
        for clip in (reference, degraded)
    )
    return speech.compare_pitch(*tracks)


def loudness_difference(reference: Clip, degraded: Clip) -> tuple[float]:
    before, after = (
        clip.get("loudness", lambda clip=clip: audio.loudness(clip.samples, clip.rate))
        for clip in (reference, degraded)
    )
    return (after - before,)


def psnr(reference: np.ndarray, degraded: np.ndarray) -> tuple[float]:
    return (min(image.psnr(reference, degraded), BEST_PSNR),)


def ssim(reference: np.ndarray, degraded: np.ndarray) -> tuple[float]:
    return (image.ssim(reference, degraded),)


def ms_ssim(reference: np.ndarray, degraded: np.ndarray) -> tuple[float]:
    return (image.ms_ssim(reference, degraded),)


def lpips(reference: np.ndarray, degraded: np.ndarray) -> tuple[float]:
    return (image.lpips(reference, degraded),)
