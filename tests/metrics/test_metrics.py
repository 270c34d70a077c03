from __future__ import annotations

import math
import sys
import warnings

import metric_references as references
import numpy as np
import pytest

from vpcodec.metrics import (
    log_spectral_distance,
    loudness_difference,
    mel_cepstral_distortion,
    mel_distance,
    si_sdr,
    snr,
    stft_distance,
)
from vpcodec.metrics.audio import slaney_mel_bank

RATE = 16_000
TAKE_RATE = (mel_distance, mel_cepstral_distortion, loudness_difference)
METRICS = (*TAKE_RATE, stft_distance, log_spectral_distance, si_sdr, snr)
PACKAGES = {loudness_difference: "pyloudnorm"}
TOLERANCES = {  # absolute, to the reference implementation
    mel_distance: 1e-4,  # whose square root has 1e-10 added, for the gradient of training
    stft_distance: 1e-4,  # of float32
    log_spectral_distance: 1e-4,
    mel_cepstral_distortion: 5e-6,  # of float32; a millionth of the distances
    loudness_difference: 1e-4,
    si_sdr: 1e-6,
    snr: 1e-6,
}


def value(metric, x: np.ndarray, y: np.ndarray) -> float:
    if metric in PACKAGES:
        pytest.importorskip(PACKAGES[metric], reason="needs the score extra")
    return metric(x, y, RATE) if metric in TAKE_RATE else metric(x, y)


@pytest.fixture
def clean(speech) -> np.ndarray:
    return speech[0]


@pytest.fixture
def noisy(clean) -> np.ndarray:
    return with_noise(clean, 0.02)


def with_noise(clean: np.ndarray, level: float) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(len(clean))
    return (clean + level * noise).astype(np.float32)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)
def test_each_metric_is_that_of_its_reference_implementation(metric):
    if metric is stft_distance:
        pytest.importorskip("auraloss", reason="needs the dev extra")
    if metric in (si_sdr, snr):
        pytest.importorskip("torchmetrics", reason="needs the dev extra")
    pytest.importorskip("librosa", reason="needs the dev extra")
    for x, y in references.pairs().values():
        expected = getattr(references, metric.__name__)(x, y)
        assert value(metric, x, y) == pytest.approx(expected, rel=0, abs=TOLERANCES[metric])


@pytest.mark.parametrize("ratio", [-10.0, 0.0, 20.0])
def test_snr_is_that_of_the_noise(clean, ratio):
    assert snr(clean, references.with_noise(clean, ratio)) == pytest.approx(ratio, abs=1e-4)
    assert snr(clean, 0 * clean) == pytest.approx(0)
    assert 100 < snr(clean, clean) < math.inf


@pytest.mark.parametrize("ratio", [-10.0, 0.0, 20.0])
@pytest.mark.parametrize("gain", [1.0, -0.3, 50.0])
def test_si_sdr_is_the_snr_of_uncorrelated_noise_at_any_gain_and_offset(clean, ratio, gain):
    x = clean.astype(np.float64) - clean.mean(dtype=np.float64)
    noise = np.random.default_rng(0).standard_normal(len(x))
    noise -= noise.mean()
    noise -= x * (noise @ x) / (x @ x)
    noise *= np.sqrt(x @ x / (noise @ noise)) * 10 ** (-ratio / 20)
    assert si_sdr(x + 0.25, gain * (x + noise) - 0.1) == pytest.approx(ratio, abs=1e-6)


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


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)
def test_no_metric_depends_on_how_signals_are_cut_into_pieces(clean, noisy, metric, monkeypatch):
    whole = value(metric, clean, noisy)
    monkeypatch.setattr("vpcodec.metrics.audio._PIECE", 2**14)
    assert value(metric, clean, noisy) == pytest.approx(whole, rel=1e-6)


def test_mel_distance_of_a_tenfold_signal_is_one(clean):
    loud = np.random.default_rng(0).standard_normal(RATE)  # far above the floor
    assert mel_distance(loud, 10 * loud, RATE) == pytest.approx(1, abs=0.02)
    assert mel_distance(clean, clean, RATE) == 0
    assert mel_distance(clean[:10], clean[:10] + 0.1, RATE) > 0.1


@pytest.mark.parametrize("decibels", [-12.0, 6.0])
def test_gain_moves_each_metric_by_its_decibels(clean, noisy, decibels):
    loud = np.random.default_rng(0).standard_normal(RATE)  # far above every floor
    gained = references.louder(loud, decibels)
    factor = 10 ** (decibels / 20)
    assert log_spectral_distance(loud, gained) == pytest.approx(abs(decibels), abs=0.01)
    assert mel_distance(loud, gained, RATE) == pytest.approx(abs(decibels) / 20, abs=0.01)
    assert stft_distance(loud, gained) == pytest.approx(
        abs(1 - factor) + abs(math.log(factor)), abs=1e-6
    )
    assert value(loudness_difference, loud, gained) == pytest.approx(decibels, abs=1e-6)
    assert value(loudness_difference, clean, references.louder(clean, decibels)) == pytest.approx(
        decibels, abs=1e-3
    )
    assert value(mel_cepstral_distortion, loud, gained) == pytest.approx(0, abs=1e-3)
    assert si_sdr(clean, references.louder(noisy, decibels)) == pytest.approx(si_sdr(clean, noisy))


def test_low_pass_moves_the_spectral_distances_more_the_lower_it_is(clean):
    for metric in (log_spectral_distance, mel_distance, stft_distance, mel_cepstral_distortion):
        high, low = (
            value(metric, clean, references.low_passed(clean, limit)) for limit in (4000, 1000)
        )
        assert 0 < high < 0.8 * low


def test_delay_hurts_the_waveform_and_hardly_the_spectrum(clean):
    late = references.delayed(clean, 0.005)
    assert snr(clean, late) < 5 and si_sdr(clean, late) < 5
    noisy = references.with_noise(clean, 20)
    for metric in (log_spectral_distance, mel_distance, mel_cepstral_distortion):
        assert value(metric, clean, late) < value(metric, clean, noisy)


def test_mel_cepstral_distortion_is_the_decibels_by_which_bands_differ():
    """Of a spectrum with one cosine over the bands, of amplitude a: a / sqrt(2)."""
    bank = slaney_mel_bank(512, 40, RATE)
    centre = np.interp(bank.argmax(0) * RATE / 512, (0, RATE / 2), (0, 512 * 16)).round()
    ripple = 6 * np.cos(np.pi * 3 * (np.arange(40) + 0.5) / 40)  # dB
    noise = np.random.default_rng(0).standard_normal(2**14)
    gains = np.interp(np.arange(2**13 + 1), centre, ripple)
    rippled = np.fft.irfft(np.fft.rfft(noise) * 10 ** (gains / 20))
    found = mel_cepstral_distortion(noise, rippled, RATE)
    assert found == pytest.approx(6 / math.sqrt(2), rel=0.1)


@pytest.mark.parametrize(
    ("size", "bands", "rate"), [(512, 40, RATE), (321, 120, RATE), (64, 8, 1800)]
)
def test_mel_bands_are_those_of_librosa(size, bands, rate):
    librosa = pytest.importorskip("librosa", reason="needs the dev extra")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bands between two bins
        expected = librosa.filters.mel(sr=rate, n_fft=size, n_mels=bands, dtype=np.float64)
    assert slaney_mel_bank(size, bands, rate).T == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_copies_have_no_distance(clean):
    for metric in METRICS[:5]:
        assert value(metric, clean, clean.copy()) == 0


def test_what_is_silent_or_too_short_has_no_value(clean, recwarn):
    silence, empty = np.zeros_like(clean), clean[:0]
    for metric in (stft_distance, mel_cepstral_distortion, si_sdr, snr, loudness_difference):
        assert math.isnan(value(metric, silence, clean))
        assert math.isnan(value(metric, 0.1 + silence, silence))
    for metric in (mel_cepstral_distortion, si_sdr, loudness_difference):
        assert math.isnan(value(metric, clean, silence))
    for metric in METRICS:
        assert math.isnan(value(metric, empty, empty))
    for metric in (log_spectral_distance, mel_distance):
        assert value(metric, silence, clean) > 0 == value(metric, silence, silence)
    assert math.isnan(value(loudness_difference, clean[8000:14_000], clean[8000:14_000]))
    assert math.isfinite(value(loudness_difference, clean[8000:16_000], clean[8000:16_000]))
    assert not recwarn.list


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)
def test_signals_that_do_not_fit_are_refused(clean, metric):
    broken = clean.copy()
    broken[100] = np.nan
    with pytest.raises(ValueError, match="length"):
        value(metric, clean, clean[:-1])
    with pytest.raises(ValueError, match="shape"):
        value(metric, clean[None], clean[None])
    with pytest.raises(ValueError, match="int16"):
        value(metric, clean, clean.astype(np.int16))
    for pair in ((broken, clean), (clean, broken)):
        with pytest.raises(ValueError, match="NaN"):
            value(metric, *pair)


@pytest.mark.parametrize(("metric", "package"), PACKAGES.items())
def test_a_missing_package_is_named_with_the_extra(clean, metric, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install 'vpcodec\[score\]'"):
        metric(clean, clean, RATE)
