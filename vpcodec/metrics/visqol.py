"""ViSQOL, by the package visqol-python."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

from .audio import is_silent
from .base import Clip, Metric, registered

RATE = 16_000  # Hz, of its speech mode
MIN_SECONDS = 1.0
INSTALL = "pip install visqol-python"


@registered(
    Metric(
        name="visqol",
        label="ViSQOL",
        unit="MOS-LQO",
        better="higher",
        modality="audio",
        source="Chinen et al. 2020, speech mode (visqol-python)",
        rate=RATE,
        packages=("visqol",),
        install=INSTALL,
        default=False,
    ),
)
def visqol(reference: Clip, degraded: Clip) -> tuple[float]:
    """ViSQOL version 3 in speech mode (Hines et al. 2015, Chinen et al. 2020), 1 to 5.

    The similarity of spectra is mapped to a rating by its polynomial, which needs nothing else to
    be installed, and not by its lattice network, whose values are lower. NaN for silence, below
    1 s, and where it finds no speech.
    """
    x, y = (clip.at(RATE).astype(np.float64) for clip in (reference, degraded))
    if is_silent(x) or is_silent(y) or min(len(x), len(y)) < MIN_SECONDS * RATE:
        return (math.nan,)
    try:
        return (float(_api().measure_from_arrays(x, y, RATE).moslqo),)
    except ValueError:  # no part of it is active
        return (math.nan,)


@lru_cache(maxsize=1)
def _api() -> Any:
    try:
        with _without_numba():
            from visqol import VisqolApi
    except ImportError as error:
        raise ImportError(f"ViSQOL needs a package: {INSTALL}") from error
    api = VisqolApi()
    api.create(mode="speech", use_lattice_model=False)
    return api


@contextmanager
def _without_numba() -> Iterator[None]:
    """Imports inside do not find numba, which the package uses where it is installed.

    Its cache has crashed processes when two wrote it at once. Values are the same without it.
    """
    missing = object()
    before = sys.modules.get("numba", missing)
    sys.modules["numba"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is missing:
            del sys.modules["numba"]
        else:
            sys.modules["numba"] = before  # type: ignore[assignment]
