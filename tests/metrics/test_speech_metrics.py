from __future__ import annotations

import math
import sys

import metric_references as references
import numpy as np
import pytest

from vpcodec.media.audio import resample
from vpcodec.metrics import dnsmos, f0_rmse, pesq_nb, pesq_wb, prosody, speech, stoi, voicing_error
from vpcodec.metrics.prosody import compare_pitch, pitch
from vpcodec.scoring.workers import METRICS, measure

RATE = 16_000
PACKAGES = ("pesq", "pystoi", "speechmos")


def estoi(x: np.ndarray, y: np.ndarray, rate: int) -> float:
    return stoi(x, y, rate, extended=True)


@pytest.fixture(autouse=True)
def packages() -> None:
    for name in PACKAGES:
        pytest.importorskip(name, reason="needs the score extra")


@pytest.fixture
def clean(speech) -> np.ndarray:
    return speech[0]


def with_noise(clean: np.ndarray, level: float) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(len(clean))
    return (clean + level * noise).astype(np.float32)


def voice(frequency: float, seconds: float = 2.0) -> np.ndarray:
    """A steady vowel of some harmonics."""
    phase = 2 * np.pi * frequency * np.arange(int(seconds * RATE)) / RATE
    return 0.1 * sum(np.sin(n * phase) / n for n in range(1, 9))


@pytest.mark.parametrize(
    ("metric", "tolerance"),
    [(pesq_wb, 1e-6), (pesq_nb, 5e-3), (stoi, 1e-9), (estoi, 1e-9)],
    ids=["pesq_wb", "pesq_nb", "stoi", "estoi"],
)
def test_each_metric_is_that_of_its_reference_implementation(metric, tolerance):
    """Narrowband PESQ: the lengths after resampling may differ by a sample."""
    for x, y in references.pairs().values():
        expected = getattr(references, metric.__name__)(x, y)
        assert metric(x, y, RATE) == pytest.approx(expected, rel=0, abs=tolerance)


@pytest.mark.slow
def test_pitch_is_that_of_librosa():
    pytest.importorskip("librosa", reason="needs the dev extra")
    for x, y in references.pairs().values():
        found = f0_rmse(x, y, RATE), voicing_error(x, y, RATE)
        assert found == pytest.approx(references.pitch(x, y), abs=1e-6)


@pytest.mark.slow
def test_dnsmos_is_that_of_its_package():
    """Also over several windows, of which the package leaves out some."""
    for package in ("librosa", "requests"):
        pytest.importorskip(package, reason="needs the dev extra")
    signals = [y for _, y in references.pairs().values()]
    whole = np.concatenate(signals)
    for seconds in (9.01, 10.7, 12, 19.5):
        signals.append(np.resize(whole, int(seconds * RATE)))
    for y in signals:
        assert dnsmos(y, RATE) == pytest.approx(references.dnsmos(y, y), abs=1e-4)


def test_identical_speech_reaches_the_maximum(clean):
    assert pesq_wb(clean, clean, RATE) == pytest.approx(4.644, abs=1e-3)
    assert pesq_nb(clean, clean, RATE) == pytest.approx(4.549, abs=1e-3)
    assert stoi(clean, clean, RATE) == pytest.approx(1)
    assert stoi(clean, clean, RATE, extended=True) == pytest.approx(1)


def test_more_noise_makes_every_metric_worse(clean):
    few, many = (measure(clean, with_noise(clean, level), RATE) for level in (0.003, 0.1))
    assert set(few) == set(METRICS)
    for name in ("pesq_wb", "stoi", "si_sdr"):
        assert few[name] > many[name]
    assert few["mel_distance"] < many["mel_distance"]
    both = [stoi(clean, with_noise(clean, 0.1), RATE, extended=flag) for flag in (False, True)]
    assert both[0] == many["stoi"] and both[1] < both[0] - 0.05


def test_pesq_takes_other_rates(clean):
    clean = resample(resample(clean, RATE, 44_100), 44_100, RATE)
    noisy = with_noise(clean, 0.01)
    expected = pesq_wb(clean, noisy, RATE)
    found = pesq_wb(resample(clean, RATE, 44_100), resample(noisy, RATE, 44_100), 44_100)
    assert found == pytest.approx(expected, abs=0.1)


def test_pesq_of_a_silent_result_has_no_value(clean):
    assert math.isnan(pesq_wb(clean, np.zeros_like(clean), RATE))


def test_pesq_of_long_audio_is_the_mean_of_parts_with_speech(clean):
    """The package crashes on more than 50 utterances, so this would end the process."""
    burst = 0.3 * np.random.default_rng(0).standard_normal(RATE // 4)
    bursts = np.tile(np.concatenate([burst, 0 * burst]), 60)  # 30 s
    noise = with_noise(bursts, 0.01)
    halves = [pesq_wb(x, y, RATE) for x, y in zip(np.split(bursts, 2), np.split(noise, 2))]
    assert pesq_wb(bursts, noise, RATE) == pytest.approx(np.mean(halves))
    bursts[: 15 * RATE] = 0
    assert pesq_wb(bursts, noise, RATE) == pytest.approx(halves[1])


@pytest.mark.parametrize("metric", [pesq_wb, pesq_nb])
def test_what_pesq_refuses_has_no_value(clean, metric, recwarn):
    burst = np.zeros(3 * RATE, np.float32)  # too short to be an utterance
    burst[RATE : RATE + 800] = with_noise(burst[:800], 0.1)
    for x in (burst, np.zeros_like(clean), 0.1 + np.zeros_like(clean), clean[8000:9600]):
        assert math.isnan(metric(x, x, RATE))
    assert math.isnan(metric(clean, np.zeros_like(clean), RATE))
    assert math.isnan(metric(clean, (1e-30 * clean).astype(np.float32), RATE))
    assert not recwarn.list


@pytest.mark.parametrize("metric", [pesq_wb, pesq_nb, stoi, estoi, f0_rmse, voicing_error])
def test_what_is_too_short_or_silent_has_no_value(clean, metric, recwarn):
    silence = np.zeros_like(clean)
    for length in (0, 1, 100, 1000):
        assert math.isnan(metric(clean[8000 : 8000 + length], clean[8000 : 8000 + length], RATE))
    assert math.isnan(metric(silence, clean, RATE))
    assert not recwarn.list


def test_stoi_needs_less_than_half_a_second_of_speech(clean):
    assert math.isnan(stoi(clean[8000:11_000], clean[8000:11_000], RATE))
    assert stoi(clean[8000:24_000], clean[8000:24_000], RATE) == pytest.approx(1)


def test_stoi_of_long_audio_is_the_mean_of_parts_with_speech(clean, monkeypatch):
    noisy = with_noise(clean, 0.02)
    halves = [stoi(x, y, RATE) for x, y in zip(*(np.array_split(s, 2) for s in (clean, noisy)))]
    monkeypatch.setattr(speech, "_STOI_SECONDS", 3)
    assert stoi(clean, noisy, RATE) == pytest.approx(np.mean(halves))
    x, y = (np.pad(signal, (0, len(signal))) for signal in (clean, noisy))
    assert stoi(x, y, RATE) == pytest.approx(np.mean(halves), abs=1e-6)


@pytest.mark.parametrize("cents", [-700, 100, 400])
def test_f0_rmse_is_the_cents_of_a_shift(cents):
    low, high = voice(150), voice(150 * 2 ** (cents / 1200))
    assert f0_rmse(low, high, RATE) == pytest.approx(abs(cents), abs=12)  # steps of 20 cents
    assert voicing_error(low, high, RATE) < 0.03
    assert f0_rmse(low, low, RATE) == 0 == voicing_error(low, low, RATE)


def test_pitch_takes_other_rates():
    track = pitch(resample(voice(200).astype(np.float32), RATE, 44_100), 44_100)
    assert np.nanmedian(track) == pytest.approx(200, rel=0.01)
    assert len(track) == len(pitch(voice(200), RATE))


def test_voicing_error_is_the_share_of_frames_that_were_lost(clean):
    vowel = voice(120, 4)
    muted = vowel.copy()
    muted[: len(muted) // 4] = 0
    assert voicing_error(vowel, muted, RATE) == pytest.approx(0.25, abs=0.02)
    noise = with_noise(np.zeros(RATE, np.float32), 0.1)
    assert math.isnan(f0_rmse(vowel[:RATE], noise, RATE))
    assert voicing_error(vowel[:RATE], noise, RATE) > 0.9
    assert math.isnan(voicing_error(noise, vowel[:RATE], RATE))
    assert math.isnan(voicing_error(clean, 0 * clean, RATE)) is False


def test_pitch_in_parts_is_nearly_that_of_the_whole(clean, monkeypatch):
    whole = pitch(clean, RATE)
    monkeypatch.setattr(prosody, "_PITCH_FRAMES", 100)
    parts = pitch(clean, RATE)
    assert len(parts) == len(whole) == 1 + len(clean) // 160
    rmse, voicing = compare_pitch(whole, parts)
    assert rmse < 20 and voicing < 0.03


def test_dnsmos_hears_noise_and_neither_repetition_of_work_nor_peaks(clean, recwarn):
    good, bad = dnsmos(clean, RATE), dnsmos(with_noise(clean, 0.1), RATE)
    assert all(1 < worse < better < 5 for better, worse in zip(good, bad))
    peak = np.abs(clean).max()
    assert dnsmos(3 * clean / peak, RATE) == pytest.approx(dnsmos(clean / peak, RATE), abs=1e-4)
    assert not recwarn.list


def test_networks_are_loaded_once_on_one_thread():
    network = speech.speechmos_network("dnsmos_models/model_v8.onnx")
    assert speech.speechmos_network("dnsmos_models/model_v8.onnx") is network
    assert network.get_session_options().intra_op_num_threads == 1
    with pytest.raises(ImportError, match="no other.onnx of the package speechmos"):
        speech.speechmos_network("other.onnx")


def test_dnsmos_of_silence_and_of_short_clips_has_no_value(clean):
    for x in (clean[:0], clean[8000:23_000], 0 * clean):
        assert all(math.isnan(score) for score in dnsmos(x, RATE))


@pytest.mark.parametrize("metric", [pesq_wb, pesq_nb, stoi, f0_rmse, voicing_error])
def test_signals_that_do_not_fit_are_refused(clean, metric):
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
    with pytest.raises(ValueError, match="NaN"):
        dnsmos(broken, RATE)


@pytest.mark.parametrize(("metric", "package"), [(pesq_wb, "pesq"), (stoi, "pystoi")])
def test_a_missing_package_is_named_with_the_extra(clean, metric, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install 'vpcodec\[score\]'"):
        metric(clean, clean, RATE)
    assert set(METRICS) - set(measure(clean[:8000], clean[:8000], RATE)) == {metric.__name__}


def test_so_is_one_of_a_metric_of_one_signal(clean, monkeypatch):
    monkeypatch.setitem(sys.modules, "speechmos", None)
    speech.speechmos_network.cache_clear()
    with pytest.raises(ImportError, match=r"speechmos.*pip install 'vpcodec\[score\]'"):
        dnsmos(clean, RATE)
