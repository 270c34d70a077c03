"""Metrics of decoded speech: functions of two mono signals, the reference first.

Signals are float arrays (T,) of equal length, full scale at -1 and 1, in Hz `rate`. All raise
ValueError for other shapes and dtypes, different lengths, and NaN or infinite samples. NaN is the
value where a metric is not defined.
"""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..audio import resample

PESQ_RATE = 16_000  # Hz, of wideband PESQ
MEL_BANDS = {128: 16, 256: 32, 512: 64, 1024: 80, 2048: 128}  # FFT size: mel bands
MEL_FLOOR = 1e-4  # of a full-scale sine: what lies 80 dB below counts as silence

_PESQ_SECONDS = 20  # the package crashes on 50 utterances, each with its pause 0.4 s or more
_STOI_RATE = 10_000  # Hz at which pystoi works
_STOI_FRAME = 256  # samples of a frame there
_STOI_TOO_SHORT = "Not enough STFT frames"  # the beginning of its warning
_PIECE = 2**20  # samples of the frames that are transformed at once; bounds memory


def pesq_wb(reference: np.ndarray, degraded: np.ndarray, rate: int) -> float:
    """PESQ, wideband (ITU-T P.862.2), as MOS-LQO from 1.0 to 4.64; at 16 kHz, to which other
    rates are resampled. NaN where PESQ finds no speech in one of them, and below 0.25 s. More than
    20 s are cut into equal parts of at most that, and those with a value averaged.

    Raises:
        ImportError: without the package pesq.
    """
    try:
        from pesq import BufferTooShortError, NoUtterancesError, pesq
    except ImportError as error:
        raise _missing("PESQ", "pesq") from error
    reference, degraded = _check(reference, degraded)
    if rate != PESQ_RATE:
        reference, degraded = (resample(x, rate, PESQ_RATE) for x in (reference, degraded))
    parts = max(1, -(-len(reference) // (_PESQ_SECONDS * PESQ_RATE)))
    values = []
    for x, y in zip(np.array_split(reference, parts), np.array_split(degraded, parts)):
        if not (_is_silent(x) or _is_silent(y)):  # of which it would make NaN and an error
            with suppress(BufferTooShortError, NoUtterancesError):
                values.append(float(pesq(PESQ_RATE, x, y, "wb")))
    return float(np.mean(values)) if values else math.nan


def stoi(
    reference: np.ndarray, degraded: np.ndarray, rate: int, *, extended: bool = False
) -> float:
    """Short-time objective intelligibility, up to 1.0; with `extended`, ESTOI.

    NaN for silence and where less than 0.4 s of speech is left once pauses are cut out.

    Raises:
        ImportError: without the package pystoi.
    """
    try:
        import pystoi
    except ImportError as error:
        raise _missing("STOI", "pystoi") from error
    reference, degraded = _check(reference, degraded)
    if _is_silent(reference) or len(reference) * _STOI_RATE <= _STOI_FRAME * rate:
        return math.nan
    with warnings.catch_warnings():
        warnings.filterwarnings("error", _STOI_TOO_SHORT, RuntimeWarning)
        try:
            return float(pystoi.stoi(reference, degraded, rate, extended=extended))
        except RuntimeWarning as warning:
            if not str(warning).startswith(_STOI_TOO_SHORT):
                raise
            return math.nan


def si_sdr(reference: np.ndarray, degraded: np.ndarray) -> float:
    """Scale-invariant ratio of signal to distortion, dB.

    Of x and y without their means, with t = x <x, y> / <x, x>: 10 log10(|t|^2 / |y - t|^2). The
    float64 epsilon, added above and below both lines, keeps it finite. NaN for a silent reference.
    """
    reference, degraded = _check(reference, degraded)
    if _is_silent(reference):
        return math.nan
    x, y = (signal - signal.mean(dtype=np.float64) for signal in (reference, degraded))
    epsilon = np.finfo(np.float64).eps
    target = x * ((x @ y + epsilon) / (x @ x + epsilon))
    rest = y - target
    return 10 * math.log10((target @ target + epsilon) / (rest @ rest + epsilon))


def mel_distance(reference: np.ndarray, degraded: np.ndarray, rate: int) -> float:
    """Mean |log10(M |X| + 1e-4) - log10(M |Y| + 1e-4)|, over the FFT sizes of MEL_BANDS.

    |X|: magnitudes of periodic Hann windows a quarter apart, the ends reflected, scaled so that a
    full-scale sine has 1. M: triangular bands on the HTK mel scale from 0 to rate / 2, each of
    which sums to 1. A distance of 1 is 20 dB. The loss `mel` of training has the same formula.
    NaN for signals without samples.
    """
    reference, degraded = _check(reference, degraded)
    if not len(reference):
        return math.nan
    distances = []
    for size, bands in MEL_BANDS.items():
        bank, window = _mel_bank(size, bands, rate), _window(size)
        signals = (
            np.pad(x.astype(np.float64), size // 2, "reflect") for x in (reference, degraded)
        )
        frames = [sliding_window_view(x, size)[:: size // 4] for x in signals]
        total, step = 0.0, _PIECE // size
        for start in range(0, len(frames[0]), step):
            x, y = (_log_mel(part[start : start + step], window, bank) for part in frames)
            total += np.abs(x - y).sum()
        distances.append(total / (len(frames[0]) * bands))
    return float(np.mean(distances))


def _log_mel(frames: np.ndarray, window: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """(n, size) samples -> (n, bands)."""
    spectrum = np.fft.rfft(frames * window)
    power = spectrum.real**2 + spectrum.imag**2
    return np.log10(np.sqrt(power + 1e-10) * (4 / len(window)) @ bank + MEL_FLOOR)


def _window(size: int) -> np.ndarray:
    return 0.5 - 0.5 * np.cos(2 * np.pi / size * np.arange(size))


@lru_cache(maxsize=32)
def _mel_bank(size: int, bands: int, rate: int) -> np.ndarray:
    """(size / 2 + 1, bands) weights: triangles between neighbours on the mel scale."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)  # Hz
    bins = np.linspace(0, rate / 2, size // 2 + 1)[:, None]
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    bank = np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clip(min=0)
    return bank / bank.sum(0).clip(min=1e-6)  # a band may lie between two bins


def _check(*signals: np.ndarray) -> list[np.ndarray]:
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


def _is_silent(signal: np.ndarray) -> bool:
    """Whether there is nothing but a constant."""
    return not len(signal) or bool(signal.min() == signal.max())


def _missing(metric: str, package: str) -> ImportError:
    return ImportError(f"{metric} needs the package {package}: pip install 'vpcodec[score]'")
