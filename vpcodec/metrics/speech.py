"""Metrics of decoded speech: perceptual quality, predicted ratings and intelligibility.

Signals are as in `metrics.audio`: float arrays (T,), full scale at -1 and 1; `rate` is in Hz. Those
of a pair have the same length, the reference first; otherwise ValueError is raised. The value is
NaN where a metric is undefined. Each function raises ImportError without its package.
"""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..media.audio import resample
from .audio import check_signals, is_silent, missing_package
from .base import Clip, Metric, registered

PESQ_RATE = 16_000  # Hz, of wideband PESQ
PESQ_NB_RATE = 8_000  # Hz, of narrowband PESQ
STOI_RATE = 10_000  # Hz at which pystoi works
DNSMOS_RATE = 16_000  # Hz
DNSMOS_SECONDS = 1.0  # shorter clips, repeated to nine seconds, would be a stutter

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
        scorer = _dnsmos_scorer()
    except ImportError as error:
        raise missing_package("DNSMOS", "speechmos") from error
    (signal,) = check_signals(signal)
    if is_silent(signal) or len(signal) < DNSMOS_SECONDS * rate:
        return DNSMOS(*[math.nan] * 4)
    if rate != DNSMOS_RATE:
        signal = resample(signal, rate, DNSMOS_RATE)
    signal = signal / max(1, np.abs(signal).max())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about mel bands without a frequency, always the same
        found = scorer(signal, DNSMOS_RATE, False)
    return DNSMOS(*(float(found[f"{name}_mos"]) for name in ("ovrl", "sig", "bak", "p808")))


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
            packages=("speechmos", "librosa", "requests"),
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


@lru_cache(maxsize=1)
def _dnsmos_scorer() -> Any:
    """The scorer of the package, with sessions of one thread."""
    import onnxruntime
    from speechmos import dnsmos as package

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    folder = Path(package.__file__).parent / "dnsmos_models"
    paths = [str(folder / name) for name in ("sig_bak_ovr.onnx", "model_v8.onnx")]
    scorer = package.DNSMOS(*paths)
    scorer.onnx_sess, scorer.p808_onnx_sess = (
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for path in paths
    )
    return scorer


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
