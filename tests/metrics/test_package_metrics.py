"""ViSQOL and PLCMOS, which packages carry with their weights."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from vpcodec.metrics import plcmos as plcmos_module
from vpcodec.metrics.base import Clip
from vpcodec.metrics.plcmos import RATERS, log_power, plcmos
from vpcodec.metrics.registry import METRICS
from vpcodec.metrics.visqol import visqol

RATE = 16_000


@pytest.fixture
def clean(speech: np.ndarray) -> np.ndarray:
    return speech[0, : 3 * RATE]


def noisy(x: np.ndarray, level: float) -> np.ndarray:
    return x + np.random.default_rng(0).normal(0, level, x.shape).astype(np.float32)


def lossy(x: np.ndarray, share: float) -> np.ndarray:
    """Packets of 20 ms lost at random."""
    kept = np.random.default_rng(0).random(len(x) // 320) >= share
    return x[: 320 * len(kept)] * np.repeat(kept, 320)


def test_plcmos_is_that_of_its_package(clean: np.ndarray, monkeypatch) -> None:
    package = pytest.importorskip("speechmos.plcmos", reason="needs the score extra")
    raters = iter(np.random.default_rng(0).normal(size=(RATERS, 1, 64)))
    monkeypatch.setattr(package.np.random, "normal", lambda size: next(raters))
    expected = package.PLCMOS().get_mos(clean.astype(np.float64))
    (value,) = plcmos(Clip(clean, RATE), Clip(clean, RATE))
    assert value == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("n", [16_000, 16_001, 16_255])
def test_the_spectrum_is_that_of_the_package(clean: np.ndarray, n: int) -> None:
    package = pytest.importorskip("speechmos.plcmos", reason="needs the score extra")
    for samples in (clean[:n].astype(np.float64), np.zeros(n)):
        expected = package.PLCMOS().stft_transform(samples)
        np.testing.assert_allclose(log_power(samples), expected, atol=1e-5)


def test_lost_packets_cost(clean: np.ndarray) -> None:
    pytest.importorskip("speechmos", reason="needs the score extra")
    values = [plcmos(Clip(clean, RATE), Clip(lossy(clean, x), RATE))[0] for x in (0, 0.1, 0.4)]
    assert values == sorted(values, reverse=True) and 1 < values[-1] < values[0] - 0.5
    assert plcmos(Clip(clean, RATE), Clip(lossy(clean, 0.1), RATE))[0] == values[1]


def test_visqol_falls_with_noise(clean: np.ndarray) -> None:
    pytest.importorskip("visqol", reason="needs the package visqol-python")
    levels = (0, 0.002, 0.02, 0.1)
    values = [visqol(Clip(clean, RATE), Clip(noisy(clean, x), RATE))[0] for x in levels]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(5, abs=0.05) and 1 <= values[-1] < 3


@pytest.mark.parametrize("name", ["visqol", "plcmos"])
def test_where_nothing_is_heard_there_is_no_value(clean: np.ndarray, name: str) -> None:
    pytest.importorskip({"visqol": "visqol", "plcmos": "speechmos"}[name])
    function = {"visqol": visqol, "plcmos": plcmos}[name]
    silence, short = Clip(np.zeros_like(clean), RATE), Clip(clean[:8_000], RATE)
    assert math.isnan(function(Clip(clean, RATE), silence)[0])
    assert math.isnan(function(short, short)[0])


@pytest.mark.parametrize("name", ["visqol", "plcmos"])
def test_they_are_optional(name: str) -> None:
    assert not METRICS[name].default
    assert METRICS[name].packages and "pip install" in METRICS[name].install


def test_a_missing_package_is_named(clean: np.ndarray, monkeypatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(plcmos_module, "speechmos_network", missing)
    with pytest.raises(ImportError, match="PLCMOS.*speechmos"):
        plcmos(Clip(clean, RATE), Clip(clean, RATE))
    monkeypatch.setitem(sys.modules, "visqol", None)
    from vpcodec.metrics.visqol import _api

    _api.cache_clear()
    with pytest.raises(ImportError, match="pip install visqol-python"):
        visqol(Clip(clean, RATE), Clip(clean, RATE))
