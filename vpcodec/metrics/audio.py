"""Distances of decoded audio: functions of two mono signals, the reference first.

Signals are float arrays (T,) of equal length, full scale at -1 and 1; `rate` is in Hz. All
functions raise ValueError for other shapes and dtypes, different lengths, and NaN or infinite
samples. The value is NaN where a metric is undefined. Long signals are processed in pieces: beyond
copies of the signals, `mel_cepstral_distortion` holds about 1 kB per 10 ms, and the others a
constant amount.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..media.audio import resample
from .base import Clip, Metric, registered

MEL_BANDS = {128: 16, 256: 32, 512: 64, 1024: 80, 2048: 128}  # FFT size: mel bands
MEL_FLOOR = 1e-4  # of a full-scale sine: 80 dB below counts as silence
RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))  # FFT, hop, window of STFTs
LSD_SIZE, LSD_HOP = 2048, 512  # samples
LSD_FLOOR = 1e-10  # of the power of a full-scale sine: below is rounding to 16 bits
MCD_RATE = 16_000  # Hz
MCD_SIZE, MCD_HOP, MCD_BANDS = 512, 160, 40  # samples, samples, mel bands
MCD_COEFFICIENTS = 13
POWER_FLOOR, DYNAMIC_RANGE = 1e-10, 80.0  # of `decibels`; dB
SILENCE = 1e-7  # of full scale

_PIECE = 2**20  # samples of the frames that are transformed at once; bounds memory
_EPSILON = float(np.finfo(np.float64).eps)


def mel_distance(reference: np.ndarray, degraded: np.ndarray, rate: int) -> float:
    """Mean |log10(M |X| + 1e-4) - log10(M |Y| + 1e-4)|, over the FFT sizes of MEL_BANDS.

    |X|: magnitudes of periodic Hann windows a quarter apart, the ends reflected, scaled so that a
    full-scale sine has 1. M: triangular bands on the HTK mel scale from 0 to rate / 2, each of
    which sums to 1. A distance of 1 is 20 dB. The training loss `mel` has the same formula. NaN for
    signals without samples.
    """
    reference, degraded = check_signals(reference, degraded)
    if not len(reference):
        return math.nan
    distances = []
    for size, bands in MEL_BANDS.items():
        bank = _mel_bank(size, bands, rate)
        total = count = 0.0
        for parts in powers((reference, degraded), size, size // 4):
            x, y = (
                np.log10(np.sqrt(power + 1e-10) * (4 / size) @ bank + MEL_FLOOR) for power in parts
            )
            total += np.abs(x - y).sum()
            count += x.size
        distances.append(total / count)
    return float(np.mean(distances))


@registered(
    Metric(
        name="mel_distance",
        label="Mel distance",
        unit="",
        better="lower",
        modality="audio",
        source="mean difference of log10 mel spectra, five FFT sizes",
    ),
)
def measure_mel_distance(reference: Clip, degraded: Clip) -> tuple[float]:
    return (mel_distance(reference.samples, degraded.samples, degraded.rate),)


def stft_distance(reference: np.ndarray, degraded: np.ndarray) -> float:
    """Multi-resolution STFT distance (Yamamoto et al. 2020), 0 for equal signals.

    Mean over RESOLUTIONS of ||X| - |Y|| / ||X|| (Frobenius norms) + mean |ln |X| - ln |Y||, with
    magnitudes of at least 1e-4, periodic Hann windows and reflected ends: what auraloss computes
    for (degraded, reference). NaN for a silent reference.
    """
    reference, degraded = check_signals(reference, degraded)
    if is_silent(reference):
        return math.nan
    distances = []
    for size, hop, window in RESOLUTIONS:
        error = energy = logs = count = 0.0
        for parts in powers((reference, degraded), size, hop, window):
            x, y = (np.sqrt(np.maximum(power, 1e-8)) for power in parts)
            error += np.square(x - y).sum()
            energy += np.square(x).sum()
            logs += np.abs(np.log(x) - np.log(y)).sum()
            count += x.size
        distances.append(math.sqrt(error / energy) + logs / count)
    return float(np.mean(distances))


@registered(
    Metric(
        name="stft_distance",
        label="STFT distance",
        unit="",
        better="lower",
        modality="audio",
        source="Yamamoto et al. 2020, as in auraloss",
    ),
)
def measure_stft_distance(reference: Clip, degraded: Clip) -> tuple[float]:
    return (stft_distance(reference.samples, degraded.samples),)


def log_spectral_distance(reference: np.ndarray, degraded: np.ndarray) -> float:
    """Log-spectral distance, dB: the mean over frames of the root mean square over frequencies of
    10 log10(|X|^2 / |Y|^2).

    Periodic Hann windows of 2048 samples, 512 apart, with reflected ends. Powers are scaled so that
    a full-scale sine has 1, and clipped below at 1e-10. NaN for signals without samples.
    """
    reference, degraded = check_signals(reference, degraded)
    if not len(reference):
        return math.nan
    total = count = 0.0
    for parts in powers((reference, degraded), LSD_SIZE, LSD_HOP):
        x, y = (np.log10(np.maximum(power * (4 / LSD_SIZE) ** 2, LSD_FLOOR)) for power in parts)
        total += 10 * np.sqrt(np.square(x - y).mean(1)).sum()
        count += len(x)
    return float(total / count)


@registered(
    Metric(
        name="log_spectral_distance",
        label="LSD",
        unit="dB",
        better="lower",
        modality="audio",
        source="Gray and Markel 1976, FFT 2048",
    ),
)
def measure_log_spectral_distance(reference: Clip, degraded: Clip) -> tuple[float]:
    return (log_spectral_distance(reference.samples, degraded.samples),)


def mel_cepstral_distortion(reference: np.ndarray, degraded: np.ndarray, rate: int) -> float:
    """Mel-cepstral distortion, dB: 10 sqrt(2) / ln(10) times the mean over frames of |c - c'|.

    c: c_1 .. c_13 of ln E_b = c_0 + 2 sum_m c_m cos(pi m (b + 1/2) / 40), with the energies E of 40
    mel bands as in librosa (Slaney's scale, FFT of 512 samples at 16 kHz, to which other rates are
    resampled), clipped at 80 dB below the largest. So it is the root mean square difference of
    smoothed mel spectra in dB, independent of level. Frames, 10 ms apart, are compared at the same
    time: there is no time warping. NaN for silence.
    """
    reference, degraded = check_signals(reference, degraded)
    if is_silent(reference) or is_silent(degraded):
        return math.nan
    if rate != MCD_RATE:
        reference, degraded = (resample(x, rate, MCD_RATE) for x in (reference, degraded))
    bank = slaney_mel_bank(MCD_SIZE, MCD_BANDS, MCD_RATE)
    energies = zip(
        *(
            [power @ bank for power in parts]
            for parts in powers((reference, degraded), MCD_SIZE, MCD_HOP, ends="constant")
        )
    )
    x, y = (decibels(np.concatenate(parts)) for parts in energies)
    return float(np.linalg.norm((x - y) @ _cosines(), axis=1).mean() / math.sqrt(MCD_BANDS))


@registered(
    Metric(
        name="mel_cepstral_distortion",
        label="MCD",
        unit="dB",
        better="lower",
        modality="audio",
        source="Kubichek 1993, 13 coefficients, no warping, bands as in librosa",
        rate=16_000,
    ),
)
def measure_mel_cepstral_distortion(reference: Clip, degraded: Clip) -> tuple[float]:
    rate = MCD_RATE
    return (mel_cepstral_distortion(reference.at(rate), degraded.at(rate), rate),)


def si_sdr(reference: np.ndarray, degraded: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio, dB.

    For zero-mean x and y, with t = x <x, y> / <x, x>: 10 log10(|t|^2 / |y - t|^2). The float64
    epsilon is added to numerators and denominators, which keeps the value finite. NaN if either
    signal is silent.
    """
    reference, degraded = check_signals(reference, degraded)
    if is_silent(reference) or is_silent(degraded):
        return math.nan
    means = [signal.mean(dtype=np.float64) for signal in (reference, degraded)]
    energy = product = _EPSILON
    for x, y in _parts(reference, degraded, *means):
        energy += x @ x
        product += x @ y
    scale = product / energy
    rest = _EPSILON
    for x, y in _parts(reference, degraded, *means):
        y -= scale * x
        rest += y @ y
    return 10 * math.log10((scale**2 * (energy - _EPSILON) + _EPSILON) / rest)


@registered(
    Metric(
        name="si_sdr",
        label="SI-SDR",
        unit="dB",
        better="higher",
        modality="audio",
        source="Le Roux et al. 2019",
    ),
)
def measure_si_sdr(reference: Clip, degraded: Clip) -> tuple[float]:
    return (si_sdr(reference.samples, degraded.samples),)


def snr(reference: np.ndarray, degraded: np.ndarray) -> float:
    """Signal-to-noise ratio, dB: 10 log10((|x|^2 + e) / (|y - x|^2 + e)), e the float64 epsilon.

    Equal signals have a large finite value. NaN for a silent reference.
    """
    reference, degraded = check_signals(reference, degraded)
    if is_silent(reference):
        return math.nan
    signal = noise = _EPSILON
    for x, y in _parts(reference, degraded):
        signal += x @ x
        noise += (y - x) @ (y - x)
    return 10 * math.log10(signal / noise)


@registered(
    Metric(
        name="snr",
        label="SNR",
        unit="dB",
        better="higher",
        modality="audio",
        source="10 log10 of signal over error",
    ),
)
def measure_snr(reference: Clip, degraded: Clip) -> tuple[float]:
    return (snr(reference.samples, degraded.samples),)


def check_signals(*signals: np.ndarray) -> list[np.ndarray]:
    """Signals as arrays.

    Raises:
        ValueError: a signal is not float (T,) or not finite, or their lengths differ.
    """
    found = [np.asarray(signal) for signal in signals]
    for signal in found:
        if signal.ndim != 1 or signal.dtype.kind != "f":
            raise ValueError(
                f"signals must be float, (T,), got {signal.dtype} of shape {signal.shape}"
            )
        if not np.isfinite(signal).all():
            raise ValueError("signals hold NaN or infinite values")
    if len({len(signal) for signal in found}) > 1:
        raise ValueError(f"signals differ in length: {', '.join(str(len(x)) for x in found)}")
    return found


def is_silent(signal: np.ndarray) -> bool:
    """Whether a signal is constant, to less than a step of 24 bits."""
    return not len(signal) or bool(float(signal.max()) - float(signal.min()) < SILENCE)


def missing_package(metric: str, package: str) -> ImportError:
    """The error of a metric whose package is missing."""
    return ImportError(f"{metric} needs the package {package}: pip install 'vpcodec[score]'")


def powers(
    signals: Sequence[np.ndarray],
    size: int,
    hop: int,
    window: int | None = None,
    *,
    ends: Literal["reflect", "constant"] = "reflect",
) -> Iterator[list[np.ndarray]]:
    """|X|^2 of centred frames of each signal in parts, (frames, size // 2 + 1) float64.

    Args:
        signals: (T,) each.
        size: samples of a frame.
        hop: samples between frames.
        window: samples of the periodic Hann window in the middle of a frame; `size` by default.
        ends: how `np.pad` continues the signals.
    """
    weights = _window(size, window or size)
    frames = [sliding_window_view(np.pad(x, size // 2, ends), size)[::hop] for x in signals]
    step = _PIECE // size
    for start in range(0, len(frames[0]), step):
        spectra = (np.fft.rfft(part[start : start + step] * weights) for part in frames)
        yield [spectrum.real**2 + spectrum.imag**2 for spectrum in spectra]


def decibels(power: np.ndarray) -> np.ndarray:
    """10 log10 of powers of at least 1e-10, and at least the largest of all minus 80 dB."""
    found = 10 * np.log10(np.maximum(power, POWER_FLOOR))
    return np.maximum(found, found.max() - DYNAMIC_RANGE)


@lru_cache(maxsize=32)
def slaney_mel_bank(size: int, bands: int, rate: int) -> np.ndarray:
    """(size // 2 + 1, bands) weights of mel bands of equal areas from 0 to rate / 2.

    The scale of Slaney's Auditory Toolbox, as in librosa: linear to 1 kHz with 15 mel, above
    logarithmic with 27 mel to 6.4 kHz. A narrow band may fall between two frequencies of the FFT
    and has no weight then.
    """
    top = rate / 2
    top = 15 * top / 1000 if top < 1000 else 15 + 27 * math.log(top / 1000) / math.log(6.4)
    mel = np.linspace(0, top, bands + 2)
    edges = np.where(mel < 15, mel / 15, 6.4 ** ((mel.clip(15) - 15) / 27)) * 1000  # Hz
    return _triangles(edges, size, rate) * (2 / (edges[2:] - edges[:-2]))


def _parts(
    x: np.ndarray, y: np.ndarray, mean_x: float = 0.0, mean_y: float = 0.0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both signals with their means removed, float64, in parts."""
    for start in range(0, len(x), _PIECE):
        part = slice(start, start + _PIECE)
        yield x[part] - np.float64(mean_x), y[part] - np.float64(mean_y)


def _window(size: int, length: int) -> np.ndarray:
    """(size,): a periodic Hann window of `length` samples with zeros on both sides."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi / length * np.arange(length))
    left = (size - length) // 2
    return np.pad(hann, (left, size - length - left))


@lru_cache(maxsize=32)
def _mel_bank(size: int, bands: int, rate: int) -> np.ndarray:
    """(size // 2 + 1, bands) weights: triangles between neighbours on the HTK mel scale."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)  # Hz
    bank = _triangles(edges, size, rate)
    return bank / bank.sum(0).clip(min=1e-6)  # a band may fall between two bins


def _triangles(edges: np.ndarray, size: int, rate: int) -> np.ndarray:
    """(size // 2 + 1, bands): triangles of height 1, each from an edge (Hz) to the next but one."""
    bins = np.fft.rfftfreq(size, 1 / rate)[:, None]
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    return np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clip(min=0)


@lru_cache(maxsize=1)
def _cosines() -> np.ndarray:
    """(MCD_BANDS, MCD_COEFFICIENTS): an orthonormal DCT-II without its constant."""
    phases = np.outer(np.arange(MCD_BANDS) + 0.5, np.arange(1, MCD_COEFFICIENTS + 1))
    return np.sqrt(2 / MCD_BANDS) * np.cos(np.pi / MCD_BANDS * phases)
