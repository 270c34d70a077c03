from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from vpcodec.audio import resample
from vpcodec.metrics import mel_distance, pesq_wb, si_sdr, stoi
from vpcodec.metrics.workers import METRICS, measure

RATE = 16_000


@pytest.fixture
def clean(speech) -> np.ndarray:
    return speech[0]


@pytest.fixture
def noisy(clean) -> np.ndarray:
    return with_noise(clean, 0.02)


def with_noise(clean: np.ndarray, level: float) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(len(clean))
    return (clean + level * noise).astype(np.float32)


@pytest.mark.parametrize("snr", [-10.0, 0.0, 20.0])
@pytest.mark.parametrize("gain", [1.0, -0.3, 50.0])
def test_si_sdr_is_the_snr_of_uncorrelated_noise_at_any_gain_and_offset(clean, snr, gain):
    x = clean.astype(np.float64) - clean.mean(dtype=np.float64)
    noise = np.random.default_rng(0).standard_normal(len(x))
    noise -= noise.mean()
    noise -= x * (noise @ x) / (x @ x)
    noise *= np.sqrt(x @ x / (noise @ noise)) * 10 ** (-snr / 20)
    assert si_sdr(x + 0.25, gain * (x + noise) - 0.1) == pytest.approx(snr, abs=1e-6)


def test_si_sdr_of_a_copy_is_large_and_finite(clean):
    assert 100 < si_sdr(clean, 0.5 * clean) < math.inf


@pytest.mark.parametrize("rate", [16_000, 24_000, 8_000])
@pytest.mark.parametrize("length", [1025, 40_001])
def test_mel_distance_is_the_mel_loss_of_training(clean, noisy, rate, length):
    torch = pytest.importorskip("torch", reason="needs the train extra")
    from vpcodec.recipe.audio import LossConfig
    from vpcodec.training.audio.losses import ReconstructionLoss

    x, y = clean[8000 : 8000 + length], noisy[8000 : 8000 + length]
    loss = ReconstructionLoss(LossConfig(), rate)
    expected = float(loss(torch.from_numpy(x)[None], torch.from_numpy(y)[None])["mel"])
    assert expected > 0.1
    assert mel_distance(x, y, rate) == pytest.approx(expected, abs=1e-4)


def test_mel_distance_does_not_depend_on_how_it_is_cut_into_pieces(clean, noisy, monkeypatch):
    whole = mel_distance(clean, noisy, RATE)
    monkeypatch.setattr("vpcodec.metrics.audio._PIECE", 2**14)
    assert mel_distance(clean, noisy, RATE) == pytest.approx(whole, rel=1e-9)


def test_mel_distance_of_a_tenfold_signal_is_one(clean):
    loud = np.random.default_rng(0).standard_normal(RATE)  # far above the floor
    assert mel_distance(loud, 10 * loud, RATE) == pytest.approx(1, abs=0.02)
    assert mel_distance(clean, clean, RATE) == 0
    assert mel_distance(clean[:10], clean[:10] + 0.1, RATE) > 0.1


def test_identical_speech_reaches_the_maximum(clean):
    pytest.importorskip("pesq", reason="needs the score extra")
    pytest.importorskip("pystoi", reason="needs the score extra")
    assert pesq_wb(clean, clean, RATE) == pytest.approx(4.644, abs=1e-3)
    assert stoi(clean, clean, RATE) == pytest.approx(1)
    assert stoi(clean, clean, RATE, extended=True) == pytest.approx(1)


def test_more_noise_makes_every_metric_worse(clean):
    pytest.importorskip("pesq", reason="needs the score extra")
    pytest.importorskip("pystoi", reason="needs the score extra")
    few, many = (measure(clean, with_noise(clean, level), RATE) for level in (0.003, 0.1))
    assert set(few) == set(METRICS)
    for name in ("pesq_wb", "stoi", "si_sdr"):
        assert few[name] > many[name]
    assert few["mel_distance"] < many["mel_distance"]
    both = [stoi(clean, with_noise(clean, 0.1), RATE, extended=flag) for flag in (False, True)]
    assert both[0] == many["stoi"] and both[1] < both[0] - 0.05


def test_pesq_takes_other_rates(clean):
    pytest.importorskip("pesq", reason="needs the score extra")
    clean = resample(resample(clean, RATE, 44_100), 44_100, RATE)
    noisy = with_noise(clean, 0.01)
    expected = pesq_wb(clean, noisy, RATE)
    found = pesq_wb(resample(clean, RATE, 44_100), resample(noisy, RATE, 44_100), 44_100)
    assert found == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("metric", [pesq_wb, stoi])
def test_what_is_too_short_or_silent_has_no_value(clean, metric, recwarn):
    pytest.importorskip("pesq", reason="needs the score extra")
    pytest.importorskip("pystoi", reason="needs the score extra")
    silence = np.zeros_like(clean)
    for length in (0, 1, 100, 3000):
        assert math.isnan(metric(clean[8000 : 8000 + length], clean[8000 : 8000 + length], RATE))
    assert math.isnan(metric(silence, clean, RATE))
    assert math.isnan(si_sdr(silence, clean))
    assert not recwarn.list


def test_pesq_of_a_silent_result_has_no_value(clean):
    pytest.importorskip("pesq", reason="needs the score extra")
    assert math.isnan(pesq_wb(clean, np.zeros_like(clean), RATE))


def test_pesq_of_long_audio_is_the_mean_of_parts_with_speech(clean):
    """The package crashes on more than 50 utterances, so this would end the process."""
    pytest.importorskip("pesq", reason="needs the score extra")
    burst = 0.3 * np.random.default_rng(0).standard_normal(RATE // 4)
    bursts = np.tile(np.concatenate([burst, 0 * burst]), 60)  # 30 s
    noise = with_noise(bursts, 0.01)
    halves = [pesq_wb(x, y, RATE) for x, y in zip(np.split(bursts, 2), np.split(noise, 2))]
    assert pesq_wb(bursts, noise, RATE) == pytest.approx(np.mean(halves))
    bursts[: 15 * RATE] = 0
    assert pesq_wb(bursts, noise, RATE) == pytest.approx(halves[1])


@pytest.mark.parametrize(
    "metric",
    [pesq_wb, stoi, mel_distance, lambda x, y, rate: si_sdr(x, y)],
    ids=["pesq_wb", "stoi", "mel_distance", "si_sdr"],
)
def test_signals_that_do_not_fit_are_refused(clean, metric):
    pytest.importorskip("pesq", reason="needs the score extra")
    pytest.importorskip("pystoi", reason="needs the score extra")
    broken = clean.copy()
    broken[100] = np.nan
    with pytest.raises(ValueError, match="length"):
        metric(clean, clean[:-1], RATE)
    with pytest.raises(ValueError, match="shape"):
        metric(clean[None], clean[None], RATE)
    with pytest.raises(ValueError, match="int16"):
        metric(clean, clean.astype(np.int16), RATE)
    for pair in ((broken, clean), (clean, broken)):
        with pytest.raises(ValueError, match="NaN"):
            metric(*pair, RATE)


@pytest.mark.parametrize(("metric", "package"), [(pesq_wb, "pesq"), (stoi, "pystoi")])
def test_a_missing_package_is_named_with_the_extra(clean, metric, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install 'vpcodec\[score\]'"):
        metric(clean, clean, RATE)
    assert set(METRICS) - set(measure(clean[:8000], clean[:8000], RATE)) == {metric.__name__}


def test_the_metrics_load_no_torch():
    code = (
        "import sys, numpy, vpcodec.metrics.workers as w; x = numpy.ones(8000); "
        "w.measure(x, x, 16000); print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
