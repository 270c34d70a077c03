"""Recordings that tests make."""

from __future__ import annotations

import io

import numpy as np
import soundfile as sf

M4A = b"\0\0\0\x1cftypM4A \0\0\2\0isomiso2" + bytes(200)


def noise(channels: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.9, 0.9, (channels, n)).astype(np.float32)


def sound(format: str, n: int = 40_000, *, channels: int = 1, rate: int = 48_000, **options):
    """A file of so many samples, as bytes."""
    file = io.BytesIO()
    sf.write(file, noise(channels, n).T * 0.3, rate, format=format, **options)
    return file.getvalue()
