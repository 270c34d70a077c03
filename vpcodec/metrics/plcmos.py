"""PLCMOS, of gaps and what fills them, by a network in the package speechmos."""

from __future__ import annotations

import math

import numpy as np

from .audio import is_silent, missing_package
from .base import Clip, Metric, registered
from .speech import speechmos_network

RATE = 16_000  # Hz
MIN_SECONDS = 1.0
RATERS = 15  # over whom the values are averaged, as in the package
MAX_SECONDS = 60.0  # of a part
_WINDOW, _HOP = 512, 256  # samples
_FLOOR = 1e-12  # of the smallest power that is not 0: 120 dB


@registered(
    Metric(
        name="plcmos",
        label="PLCMOS",
        unit="MOS",
        better="higher",
        modality="audio",
        source="Diener et al. 2023, version 2 (speechmos)",
        rate=RATE,
        needs_reference=False,
        packages=("speechmos",),
        default=False,
    ),
)
def plcmos(_: Clip, degraded: Clip) -> tuple[float]:
    """PLCMOS version 2 (Diener et al. 2023), 1 to 5: how listeners rate concealed packet losses.

    The network rates as one of many listeners, who are drawn once: the same for every clip, so that
    a clip always has the same value. Clips of more than 60 s are cut into equal parts, and the
    values are averaged. NaN for silence and below 1 s.
    """
    try:
        network = speechmos_network("plcmos_models/plcmos_v2.onnx")
    except ImportError as error:
        raise missing_package("PLCMOS", "speechmos") from error
    samples = degraded.at(RATE)
    if is_silent(samples) or len(samples) < MIN_SECONDS * RATE:
        return (math.nan,)
    samples = samples / max(1, np.abs(samples).max())
    raters = np.random.default_rng(0).normal(size=(RATERS, 1, 64)).astype(np.float32)
    values = []
    for part in np.array_split(samples, -(-len(samples) // int(MAX_SECONDS * RATE))):
        features = log_power(part)[None, None]
        for rater in raters:
            inputs = {"degraded_audio": features, "rater_embed": rater}
            values.append(float(np.squeeze(network.run(None, inputs)[0])))
    return (float(np.mean(values)),)


def log_power(samples: np.ndarray) -> np.ndarray:
    """The spectrum that the network takes: log10 of the power, halved.

    Args:
        samples: (T,) at 16 kHz.

    Returns:
        (frames, 257) float32.
    """
    n_frames = -(-(len(samples) + _HOP) // _HOP)
    padded = np.zeros((n_frames + 1) * _HOP)
    padded[_HOP : _HOP + len(samples)] = samples
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP]
    power = np.abs(np.fft.rfft(frames * np.hamming(_WINDOW + 1)[:-1])) ** 2
    least = power[power > 0].min() * _FLOOR if power.any() else 1e-8
    return (np.log(np.where(power > 0, power, least)) / 20).astype(np.float32)
