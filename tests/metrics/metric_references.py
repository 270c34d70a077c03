"""The metrics as other packages or plain formulas compute them, and signals to compare them on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import soundfile as sf
import soxr
from paths import SHARED, SPEECH

DATA = SHARED / "data"
RATE = 16_000
CLIPS = 10
SECONDS = 5  # of a clip: DNSMOS hears one window

Signals = tuple[np.ndarray, np.ndarray]


def made_speech() -> np.ndarray:
    """tests/resources/speech.wav at 16 kHz, float32 (T,)."""
    samples, rate = sf.read(SPEECH, dtype="float32")
    return soxr.resample(samples, rate, RATE)


def with_noise(x: np.ndarray, snr: float) -> np.ndarray:
    """White noise, of that ratio in dB exactly."""
    noise = np.random.default_rng(0).standard_normal(len(x))
    noise *= np.linalg.norm(x) / np.linalg.norm(noise) * 10 ** (-snr / 20)
    return (x + noise).astype(x.dtype)


def low_passed(x: np.ndarray, limit: float) -> np.ndarray:
    """Nothing above `limit` Hz."""
    spectrum = np.fft.rfft(x)
    spectrum[np.fft.rfftfreq(len(x), 1 / RATE) > limit] = 0
    return np.fft.irfft(spectrum, len(x)).astype(x.dtype)


def delayed(x: np.ndarray, seconds: float) -> np.ndarray:
    return np.pad(x, (round(seconds * RATE), 0))[: len(x)]


def louder(x: np.ndarray, decibels: float) -> np.ndarray:
    return (x * 10 ** (decibels / 20)).astype(x.dtype)


DEGRADATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "noise 10 dB": lambda x: with_noise(x, 10),
    "low-pass 2 kHz": lambda x: low_passed(x, 2000),
    "delay 5 ms": lambda x: delayed(x, 0.005),
    "gain -6 dB": lambda x: louder(x, -6),
}


@lru_cache(maxsize=1)
def pairs() -> dict[str, Signals]:
    """Ten real clips and what a codec made of them; where they are absent, the made speech and its
    degradations."""
    decoded = sorted((DATA / "lyra_dev" / "3200").glob("*.flac"))
    if not decoded:
        x = made_speech()
        return {name: (x, degrade(x)) for name, degrade in DEGRADATIONS.items()}
    found = {}
    for path in decoded[:: len(decoded) // CLIPS][:CLIPS]:
        x, y = (
            sf.read(folder / path.name, dtype="float32", frames=SECONDS * RATE)[0]
            for folder in (DATA / "speech_dev", path.parent)
        )
        length = min(len(x), len(y))
        found[path.stem] = x[:length], y[:length]
    return found


def pesq_wb(x: np.ndarray, y: np.ndarray) -> float:
    from pesq import pesq

    return pesq(RATE, x, y, "wb")


def pesq_nb(x: np.ndarray, y: np.ndarray) -> float:
    from pesq import pesq

    return pesq(8000, *(soxr.resample(signal, RATE, 8000) for signal in (x, y)), "nb")


def stoi(x: np.ndarray, y: np.ndarray) -> float:
    import pystoi

    return pystoi.stoi(x, y, RATE)


def estoi(x: np.ndarray, y: np.ndarray) -> float:
    import pystoi

    return pystoi.stoi(x, y, RATE, extended=True)


def dnsmos(x: np.ndarray, y: np.ndarray) -> tuple[float, ...]:
    from speechmos import dnsmos as package

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = package.run(y / max(1, np.abs(y).max()), RATE)
    return tuple(found[f"{name}_mos"] for name in ("ovrl", "sig", "bak", "p808"))


def mel_distance(x: np.ndarray, y: np.ndarray) -> float:
    import librosa

    distances = []
    for size, bands in ((128, 16), (256, 32), (512, 64), (1024, 80), (2048, 128)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bands between two bins
            bank = librosa.filters.mel(
                sr=RATE, n_fft=size, n_mels=bands, htk=True, norm=None, dtype=np.float64
            )
        bank /= np.maximum(bank.sum(1, keepdims=True), 1e-6)
        logs = [
            np.log10(bank @ (np.abs(stft(signal, size, size // 4)) * 4 / size) + 1e-4)
            for signal in (x, y)
        ]
        distances.append(np.abs(logs[0] - logs[1]).mean())
    return float(np.mean(distances))


def stft_distance(x: np.ndarray, y: np.ndarray) -> float:
    import torch
    from auraloss.freq import MultiResolutionSTFTLoss

    tensors = (torch.from_numpy(signal)[None, None] for signal in (y, x))
    return float(MultiResolutionSTFTLoss()(*tensors))


def log_spectral_distance(x: np.ndarray, y: np.ndarray) -> float:
    decibels = [
        20 * np.log10(np.maximum(np.abs(stft(signal, 2048, 512)) * 4 / 2048, 1e-5))
        for signal in (x, y)
    ]
    return float(np.sqrt(((decibels[0] - decibels[1]) ** 2).mean(0)).mean())


def mel_cepstral_distortion(x: np.ndarray, y: np.ndarray) -> float:
    import librosa

    bands = 40
    cepstra = []
    for signal in (x, y):
        mfcc = librosa.feature.mfcc(
            y=signal, sr=RATE, n_mfcc=14, n_fft=512, hop_length=160, n_mels=bands
        )
        # Orthonormal coefficients of decibels -> c of ln E = c_0 + 2 sum c_m cos.
        cepstra.append(mfcc[1:] * (math.log(10) / 10) / math.sqrt(2 * bands))
    distance = np.sqrt(((cepstra[0] - cepstra[1]) ** 2).sum(0))
    return float(10 * math.sqrt(2) / math.log(10) * distance.mean())


def si_sdr(x: np.ndarray, y: np.ndarray) -> float:
    import torch
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

    tensors = (torch.from_numpy(signal.astype(np.float64)) for signal in (y, x))
    return float(scale_invariant_signal_distortion_ratio(*tensors, zero_mean=True))


def snr(x: np.ndarray, y: np.ndarray) -> float:
    import torch
    from torchmetrics.functional.audio import signal_noise_ratio

    return float(
        signal_noise_ratio(*(torch.from_numpy(signal.astype(np.float64)) for signal in (y, x)))
    )


def pitch(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    import librosa

    (f, voiced, _), (g, also, _) = (
        librosa.pyin(
            signal,
            fmin=65,
            fmax=500,
            sr=RATE,
            frame_length=1024,
            hop_length=160,
            resolution=0.2,
        )
        for signal in (x, y)
    )
    both = voiced & also
    return (
        float(np.sqrt(((1200 * np.log2(g[both] / f[both])) ** 2).mean())),
        float((voiced ^ also).mean()),
    )


def loudness_difference(x: np.ndarray, y: np.ndarray) -> float:
    import pyloudnorm

    meter = pyloudnorm.Meter(RATE)
    return meter.integrated_loudness(y) - meter.integrated_loudness(x)


def stft(signal: np.ndarray, size: int, hop: int) -> np.ndarray:
    import librosa

    return librosa.stft(signal.astype(np.float64), n_fft=size, hop_length=hop, pad_mode="reflect")
