"""Pitch and loudness of decoded audio; signals are as in `metrics.audio`, the reference first."""

from __future__ import annotations

import math

import numpy as np

from ..media.audio import resample
from .audio import check_signals, is_silent, missing_package
from .base import Clip, Metric, registered
from .pyin import pyin

PITCH_RATE = 16_000  # Hz
PITCH_HOP = 160  # samples between frames: 10 ms
PITCH_RANGE = (65.0, 500.0)  # Hz: from low male voices to children
GATE = 0.4  # s, of a loudness block; shorter signals have no loudness

_PITCH_FRAME = 1024  # samples: four periods of the lowest pitch
_PITCH_STEPS = 5  # pitches per semitone
_PITCH_FRAMES = 3000  # that are tracked at once; bounds memory


def pitch(signal: np.ndarray, rate: int) -> np.ndarray:
    """Fundamental frequency every 10 ms, by pYIN.

    From 65 to 500 Hz in steps of 20 cents, with frames of 64 ms; shorter signals have no pitch.
    Signals of more than 30 s are tracked in parts of 30 s, which may differ from one track where
    they meet.

    Returns:
        (1 + T' // 160,) Hz, NaN where unvoiced, for T' samples at 16 kHz, to which other rates are
        resampled.
    """
    (signal,) = check_signals(signal)
    if rate != PITCH_RATE:
        signal = resample(signal, rate, PITCH_RATE)
    found = np.full(1 + len(signal) // PITCH_HOP, np.nan)
    if is_silent(signal) or len(signal) < _PITCH_FRAME:
        return found
    padded = np.pad(signal, _PITCH_FRAME // 2)
    for start in range(0, len(found), _PITCH_FRAMES):
        end = min(start + _PITCH_FRAMES, len(found))
        found[start:end] = pyin(
            padded[start * PITCH_HOP : (end - 1) * PITCH_HOP + _PITCH_FRAME],
            PITCH_RATE,
            lowest=PITCH_RANGE[0],
            highest=PITCH_RANGE[1],
            size=_PITCH_FRAME,
            hop=PITCH_HOP,
            steps=_PITCH_STEPS,
        )
    return found


def compare_pitch(reference: np.ndarray, degraded: np.ndarray) -> tuple[float, float]:
    """`f0_rmse` and `voicing_error` from two results of `pitch` of the same length."""
    before, after = (~np.isnan(track) for track in (reference, degraded))
    both = before & after
    cents = 1200 * np.log2(degraded[both] / reference[both])
    return (
        math.sqrt(np.square(cents).mean()) if both.any() else math.nan,
        float((before != after).mean()) if before.any() else math.nan,
    )


def f0_rmse(reference: np.ndarray, degraded: np.ndarray, rate: int) -> float:
    """Root mean square error of `pitch`, cents, over the frames that are voiced in both.

    An octave error counts as 1200. NaN if there is no such frame.
    """
    reference, degraded = check_signals(reference, degraded)
    return compare_pitch(pitch(reference, rate), pitch(degraded, rate))[0]


def voicing_error(reference: np.ndarray, degraded: np.ndarray, rate: int) -> float:
    """Fraction of the frames of `pitch` that are voiced in only one of the signals.

    NaN if no frame of the reference is voiced.
    """
    reference, degraded = check_signals(reference, degraded)
    return compare_pitch(pitch(reference, rate), pitch(degraded, rate))[1]


@registered(
    Metric(
        name="f0_rmse",
        label="F0 RMSE",
        unit="cents",
        better="lower",
        modality="audio",
        source="pYIN, Mauch and Dixon 2014, as in librosa",
        rate=16_000,
    ),
    Metric(
        name="voicing_error",
        label="Voicing error",
        unit="",
        better="lower",
        modality="audio",
        source="pYIN, Mauch and Dixon 2014, as in librosa",
        rate=16_000,
    ),
)
def measure_pitch(reference: Clip, degraded: Clip) -> tuple[float, float]:
    rate = PITCH_RATE
    tracks = (
        clip.get("pitch", lambda clip=clip: pitch(clip.at(rate), rate))  # type: ignore[misc]
        for clip in (reference, degraded)
    )
    return compare_pitch(*tracks)


def loudness(signal: np.ndarray, rate: int) -> float:
    """Integrated loudness, LUFS (ITU-R BS.1770, gated). NaN below 0.4 s and where no block is
    louder than -70 LUFS.

    Raises:
        ImportError: without the package pyloudnorm.
    """
    try:
        import pyloudnorm
    except ImportError as error:
        raise missing_package("loudness", "pyloudnorm") from error
    (signal,) = check_signals(signal)
    if len(signal) < GATE * rate:
        return math.nan
    value = float(pyloudnorm.Meter(rate, block_size=GATE).integrated_loudness(signal))
    return value if math.isfinite(value) else math.nan


def loudness_difference(reference: np.ndarray, degraded: np.ndarray, rate: int) -> float:
    """Loudness of the degraded minus that of the reference, LU; NaN where one has none.

    Raises:
        ImportError: without the package pyloudnorm.
    """
    reference, degraded = check_signals(reference, degraded)
    return loudness(degraded, rate) - loudness(reference, rate)


@registered(
    Metric(
        name="loudness_difference",
        label="Loudness difference",
        unit="LU",
        better="zero",
        modality="audio",
        source="ITU-R BS.1770 (pyloudnorm)",
        packages=("pyloudnorm",),
    ),
)
def measure_loudness_difference(reference: Clip, degraded: Clip) -> tuple[float]:
    before, after = (
        clip.get("loudness", lambda clip=clip: loudness(clip.samples, clip.rate))  # type: ignore[misc]
        for clip in (reference, degraded)
    )
    return (after - before,)
