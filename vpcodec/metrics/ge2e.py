"""Speaker similarity, by the network of Resemblyzer, a generalised end-to-end speaker encoder.

Only the weights of the package are used, 1.4 M parameters, and none of its code, which needs
librosa and webrtcvad. They are read by torch without unpickling objects.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from .audio import is_silent, powers, slaney_mel_bank
from .base import Clip, Metric, package_file, registered
from .distillmos import on_one_thread

INSTALL = "pip install 'vpcodec[train]' && pip install --no-deps resemblyzer"
RATE = 16_000  # Hz
MIN_SECONDS = 0.5  # below, there is too little to know a voice by
LEVEL = 10 ** (-30 / 20)  # RMS that quieter clips are raised to
_WINDOW, _HOP, _BANDS = 400, 160, 40
_PART, _STEP = 160, 77  # frames of a part, and between parts
_COVERED = 0.75  # of the last part, or it is left out
_LAYERS, _UNITS = 3, 256


@registered(
    Metric(
        name="speaker_similarity_ge2e",
        label="Speaker similarity, GE2E",
        unit="cosine",
        better="higher",
        modality="audio",
        source="Wan et al. 2018 (resemblyzer)",
        rate=RATE,
        packages=("torch", "resemblyzer"),
        install=INSTALL,
        default=False,
    ),
)
def speaker_similarity_ge2e(reference: Clip, degraded: Clip) -> tuple[float]:
    """Cosine of the speaker embeddings of two clips (GE2E, Wan et al. 2018), 0 to 1.

    1 is the same voice; clips of two speakers have about 0.4 to 0.7. Clips are raised to -30 dBFS
    if they are quieter. Pauses are not cut out, as Resemblyzer's preprocessing does. NaN for
    silence and below 0.5 s.
    """
    network = _network()
    clips = [clip.at(RATE).astype(np.float32, copy=False) for clip in (reference, degraded)]
    if any(is_silent(clip) or len(clip) < MIN_SECONDS * RATE for clip in clips):
        return (math.nan,)
    one, other = (embed(clip * max(1.0, LEVEL / _rms(clip)), network) for clip in clips)
    return (float(one @ other),)


def embed(samples: np.ndarray, network: Any) -> np.ndarray:
    """The embedding of a speaker: the mean over parts of 1.6 s, of length 1.

    Args:
        samples: (T,) float32 at 16 kHz.
        network: takes (B, 160, 40) mel spectra and gives (B, 256) embeddings.

    Returns:
        (256,) float32.
    """
    n_frames = -(-(len(samples) + 1) // _HOP)
    starts = list(range(0, max(1, n_frames - _PART + _STEP + 1), _STEP))
    covered = (len(samples) - starts[-1] * _HOP) / (_PART * _HOP)
    if covered < _COVERED and len(starts) > 1:
        starts.pop()
    missing = (starts[-1] + _PART) * _HOP - len(samples)
    mel = mel_power(np.pad(samples, (0, max(0, missing))))
    embeddings = network(np.stack([mel[start : start + _PART] for start in starts]))
    mean = embeddings.mean(0)
    return np.asarray(mean / np.linalg.norm(mean))


def mel_power(samples: np.ndarray) -> np.ndarray:
    """Power in 40 mel bands (Slaney's) every 10 ms.

    Args:
        samples: (T,) at 16 kHz.

    Returns:
        (1 + T // 160, 40) float32.
    """
    parts = powers([samples.astype(np.float64)], _WINDOW, _HOP, ends="constant")
    bank = slaney_mel_bank(_WINDOW, _BANDS, RATE)
    return np.concatenate([power @ bank for (power,) in parts]).astype(np.float32)


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


@lru_cache(maxsize=1)
def _network() -> Any:
    path = package_file("resemblyzer", "pretrained.pt")
    try:
        import torch
    except ImportError:
        path = None
    if path is None:
        raise ImportError(f"speaker similarity needs packages: {INSTALL}")
    return build_network(torch.load(path, map_location="cpu", weights_only=True)["model_state"])


def build_network(weights: dict[str, Any]) -> Any:
    """The speaker encoder with these weights, as a function of mel spectra (NumPy in and out)."""
    import torch

    lstm = torch.nn.LSTM(_BANDS, _UNITS, _LAYERS, batch_first=True)
    linear = torch.nn.Linear(_UNITS, _UNITS)
    for name, module in (("lstm", lstm), ("linear", linear)):
        parts = {key.partition(".")[2]: value for key, value in weights.items()
                 if key.startswith(f"{name}.")}  # fmt: skip
        module.load_state_dict(parts)

    def network(mel: np.ndarray) -> np.ndarray:
        with on_one_thread():
            _, (hidden, _) = lstm(torch.from_numpy(mel))
            embeddings = torch.relu(linear(hidden[-1]))
            return (embeddings / embeddings.norm(dim=1, keepdim=True)).numpy()

    return network
