"""Metrics of decoded speech: perceptual quality, predicted ratings and intelligibility.

Signals are as in `metrics.audio`: float arrays (T,), full scale at -1 and 1; `rate` is in Hz. Those
of a pair have the same length, the reference first; otherwise ValueError is raised. The value is
NaN where a metric is undefined. Each function raises ImportError without its package.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from ..media.audio import resample
from .audio import (
    check_signals,
    decibels,
    is_silent,
    missing_package,
    powers,
    slaney_mel_bank,
)
from .base import Clip, Metric, package_file, registered

if TYPE_CHECKING:
    import onnxruntime

PESQ_RATE = 16_000  # Hz, of wideband PESQ
PESQ_NB_RATE = 8_000  # Hz, of narrowband PESQ
STOI_RATE = 10_000  # Hz at which pystoi works
DNSMOS_RATE = 16_000  # Hz
DNSMOS_SECONDS = 1.0  # shorter clips, repeated to nine seconds, would be a stutter

DNSMOS_NETWORKS = ("sig_bak_ovr", "model_v8")  # of P.835 and of P.808

_DNSMOS_WINDOW = 144_160  # samples: 9.01 s
_DNSMOS_CURVES = (  # polynomials from outputs to MOS of signal, background and overall
    (-0.08397278, 1.22083953, 0.0052439),
    (-0.13166888, 1.60915514, -0.39604546),
    (-0.06766283, 1.11546468, 0.04602535),
)
_PESQ_SECONDS = 20  # the package crashes on 50 utterances; each takes at least 0.4 s
_STOI_SECONDS = 60  # bounds memory: the package takes 2 MB per second
_STOI_FRAME = 256  # samples of a frame, at STOI_RATE
_STOI_TOO_SHORT = "Not enough STFT frames"  # how its warning begins


def pesq_wb(reference: np.ndarray, degraded: np.ndarray, rate: int) -> float:
    """Wideband PESQ (ITU-T P.862.2), as MOS-LQO from 1.0 to 4.64.

    It is computed at 16 kHz, to which other rates are resampled. NaN if PESQ finds no speech in
    either signal, and below 0.25 s. Signals of more than 20 s are cut into equal parts of at most
    20 s, and the values of those that have one are averaged.
    """
    return _pesq(reference, degraded, rate, PESQ_RATE, "wb")


@registered(
    Metric(
        name="pesq_wb",
        label="PESQ-WB",
        unit="MOS",
        better="higher",
        modality="audio",
        source="ITU-T P.862.2 (pesq)",
        rate=16_000,
        packages=("pesq",),
    ),
)
def measure_pesq_wb(reference: Clip, degraded: Clip) -> tuple[float]:
    rate = PESQ_RATE
    return (pesq_wb(reference.at(rate), degraded.at(rate), rate),)


def pesq_nb(reference: np.ndarray, degraded: np.ndarray, rate: int) -> float:
    """Narrowband PESQ (ITU-T P.862), as MOS-LQO (P.862.1) from 1.0 to 4.55.

    It is computed at 8 kHz, to which other rates are resampled; otherwise as `pesq_wb`.
    """
    return _pesq(reference, degraded, rate, PESQ_NB_RATE, "nb")


@registered(
    Metric(
        name="pesq_nb",
        label="PESQ-NB",
        unit="MOS",
        better="higher",
        modality="audio",
        source="ITU-T P.862, P.862.1 (pesq)",
        rate=8_000,
        packages=("pesq",),
    ),
)
def measure_pesq_nb(reference: Clip, degraded: Clip) -> tuple[float]:
    rate = PESQ_NB_RATE
    return (pesq_nb(reference.at(rate), degraded.at(rate), rate),)


def stoi(
    reference: np.ndarray, degraded: np.ndarray, rate: int, *, extended: bool = False
) -> float:
    """Short-time objective intelligibility, up to 1.0; with `extended`, ESTOI.

    NaN for a silent reference, and if less than 0.4 s of speech remains after pauses are removed;
    about 0 for a silent result. Signals of more than 60 s are cut into equal parts of at most 60 s,
    and the values of those that have one are averaged.
    """
    try:
        import pystoi
    except ImportError as error:
        raise missing_package("STOI", "pystoi") from error
    reference, degraded = check_signals(reference, degraded)
    values = []
    for x, y in _parts(reference, degraded, _STOI_SECONDS * rate):
        if is_silent(x) or len(x) * STOI_RATE <= _STOI_FRAME * rate:
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("error", _STOI_TOO_SHORT, RuntimeWarning)
            try:
                values.append(float(pystoi.stoi(x, y, rate, extended=extended)))
            except RuntimeWarning as warning:
                if not str(warning).startswith(_STOI_TOO_SHORT):
                    raise
    return _mean(values)


@registered(
    Metric(
        name="stoi",
        label="STOI",
        unit="",
        better="higher",
        modality="audio",
        source="Taal et al. 2011 (pystoi)",
        rate=10_000,
        packages=("pystoi",),
    ),
)
def measure_stoi(reference: Clip, degraded: Clip) -> tuple[float]:
    return (stoi(reference.samples, degraded.samples, degraded.rate),)


@registered(
    Metric(
        name="estoi",
        label="ESTOI",
        unit="",
        better="higher",
        modality="audio",
        source="Jensen and Taal 2016 (pystoi)",
        rate=10_000,
        packages=("pystoi",),
    ),
)
def measure_estoi(reference: Clip, degraded: Clip) -> tuple[float]:
    return (stoi(reference.samples, degraded.samples, degraded.rate, extended=True),)


class DNSMOS(NamedTuple):
    """Predicted mean opinion scores, from 1 to 5."""

    overall: float
    signal: float
    background: float
    p808: float


def dnsmos(signal: np.ndarray, rate: int) -> DNSMOS:
    """DNSMOS P.835 and P.808 (Reddy et al. 2021, 2022), without a reference.

    It is computed at 16 kHz, to which other rates are resampled: the mean over windows of 9.01 s, 1
    s apart. Shorter signals are repeated, as the package does. Peaks above full scale are scaled
    down to it. NaN for silence and below 1 s.
    """
    try:
        p835, p808 = (speechmos_network(f"dnsmos_models/{name}.onnx") for name in DNSMOS_NETWORKS)
    except ImportError as error:
        raise missing_package("DNSMOS", "speechmos") from error
    (signal,) = check_signals(signal)
    if is_silent(signal) or len(signal) < DNSMOS_SECONDS * rate:
        return DNSMOS(*[math.nan] * 4)
    if rate != DNSMOS_RATE:
        signal = resample(signal, rate, DNSMOS_RATE)
    signal = (signal / max(1, np.abs(signal).max())).astype(np.float32)
    scores = []
    for window in _dnsmos_windows(signal):
        [raw] = p835.run(None, {"input_1": window[None]})[0]
        rated = [np.polyval(curve, x) for curve, x in zip(_DNSMOS_CURVES, raw)]
        [[also]] = p808.run(None, {"input_1": dnsmos_features(window)[None]})[0]
        scores.append([*rated, also])
    sig, bak, ovrl, also = np.mean(scores, axis=0).tolist()
    return DNSMOS(ovrl, sig, bak, also)


@registered(
    *(
        Metric(
            name=f"dnsmos_{name}",
            label=f"DNSMOS {label}",
            unit="MOS",
            better="higher",
            modality="audio",
            source=f"Reddy et al. {year} (speechmos)",
            rate=16_000,
            needs_reference=False,
            packages=("speechmos",),
        )
        for name, label, year in (
            ("ovrl", "OVRL", 2022),
            ("sig", "SIG", 2022),
            ("bak", "BAK", 2022),
            ("p808", "P.808", 2021),
        )
    ),
)
def measure_dnsmos(_: Clip, degraded: Clip) -> tuple[float, ...]:
    rate = DNSMOS_RATE
    return dnsmos(degraded.at(rate), rate)


@lru_cache(maxsize=8)
def speechmos_network(name: str) -> onnxruntime.InferenceSession:
    """A network of the installed package speechmos, on one thread; none of its code is loaded.

    Args:
        name: file below the package, such as dnsmos_models/model_v8.onnx.

    Raises:
        ImportError: without the package, or if it has no such file.
    """
    path = package_file("speechmos", name)
    if path is None:
        raise ImportError(f"there is no {name} of the package speechmos")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def dnsmos_features(window: np.ndarray) -> np.ndarray:
    """The mel spectrum that DNSMOS P.808 takes: 1 at its peak, -1 where it is 80 dB lower.

    Args:
        window: (144160,) at 16 kHz.

    Returns:
        (900, 120) float32.
    """
    bank = slaney_mel_bank(321, 120, DNSMOS_RATE)
    level = decibels(
        np.concatenate([x @ bank for [x] in powers([window[:-160]], 321, 160, ends="constant")])
    )
    return ((level - level.max() + 40) / 40).astype(np.float32)


def _dnsmos_windows(signal: np.ndarray) -> Iterator[np.ndarray]:
    """Windows of 9.01 s, 1 s apart, of a signal at 16 kHz; a shorter one is repeated.

    As in the package speechmos, the last second is not used, nor are windows whose end is rounded
    down to the sample before.
    """
    while len(signal) < _DNSMOS_WINDOW:
        signal = np.tile(signal, 2)
    for second in range(max(1, len(signal) // DNSMOS_RATE - 9)):
        start, end = second * DNSMOS_RATE, int((second + 9.01) * DNSMOS_RATE)
        if end - start == _DNSMOS_WINDOW:
            yield signal[start:end]


def _pesq(
    reference: np.ndarray,
    degraded: np.ndarray,
    rate: int,
    pesq_rate: int,
    mode: Literal["wb", "nb"],
) -> float:
    try:
        from pesq import BufferTooShortError, NoUtterancesError, pesq
    except ImportError as error:
        raise missing_package("PESQ", "pesq") from error
    reference, degraded = check_signals(reference, degraded)
    if is_silent(reference) or is_silent(degraded):
        return math.nan
    if rate != pesq_rate:
        reference, degraded = (resample(x, rate, pesq_rate) for x in (reference, degraded))
    values = []
    for x, y in _parts(reference, degraded, _PESQ_SECONDS * pesq_rate):
        if not (is_silent(x) or is_silent(y)):  # for which the package fails
            with suppress(BufferTooShortError, NoUtterancesError):
                values.append(float(pesq(pesq_rate, x, y, mode)))
    return _mean(values)


def _parts(x: np.ndarray, y: np.ndarray, longest: int) -> zip[tuple[np.ndarray, np.ndarray]]:
    """Both signals in the fewest equal parts of at most `longest` samples."""
    count = max(1, -(-len(x) // longest))
    return zip(np.array_split(x, count), np.array_split(y, count))


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else math.nan
