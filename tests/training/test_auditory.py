"""Losses after models of hearing: what they must tell apart, and what they resemble."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from paths import SPEECH
from pesq import pesq
from pystoi import stoi

from vpcodec.config import AudioConfig
from vpcodec.media.audio import load, resample
from vpcodec.recipe import AudioRecipe
from vpcodec.training.audio.auditory import IntelligibilityLoss, LoudnessLoss
from vpcodec.training.audio.losses import ReconstructionLoss

RATE = 16_000
LOSSES = {"loudness": LoudnessLoss, "intelligibility": IntelligibilityLoss}


@pytest.fixture(scope="module")
def speech() -> torch.Tensor:
    samples, rate = load(SPEECH)
    return torch.from_numpy(resample(samples[:1], rate, RATE)[:, : 5 * RATE].copy())


def noisy(x: torch.Tensor, snr_db: float) -> torch.Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return x + noise * x.square().mean().sqrt() * 10 ** (-snr_db / 20)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_lost_where_nothing_differs(name, speech):
    assert LOSSES[name](RATE)(speech, speech) < 2e-3


@pytest.mark.parametrize("name", LOSSES)
def test_more_noise_costs_more(name, speech):
    loss = LOSSES[name](RATE)
    costs = [loss(speech, noisy(speech, snr)).item() for snr in (40, 30, 20, 10, 0, -10)]
    assert costs == sorted(costs) and costs[-1] > 3 * costs[1]


def test_added_sound_costs_more_than_missing_sound(speech):
    """The asymmetry of PESQ: noise between 2 and 4 kHz against those frequencies left out."""
    spectrum = torch.fft.rfft(speech)
    hertz = torch.fft.rfftfreq(speech.shape[1], 1 / RATE)
    band = ((hertz > 2000) & (hertz < 4000)).float()
    missing = torch.fft.irfft(spectrum * (1 - band), speech.shape[1])
    gone = speech - missing
    noise = torch.fft.irfft(
        torch.fft.rfft(torch.randn(speech.shape, generator=torch.Generator().manual_seed(1)))
        * band,
        speech.shape[1],
    )
    added = speech + noise * gone.square().mean().sqrt() / noise.square().mean().sqrt()
    loss = LoudnessLoss(RATE)
    assert loss(speech, added) > 1.2 * loss(speech, missing)


def test_masked_sound_costs_nothing(speech):
    """Changes of a twentieth of the loudness everywhere are within the dead zone."""
    assert LoudnessLoss(RATE)(speech, speech * 1.05) < 2e-3


def test_they_rank_degradations_as_the_metrics_do(speech):
    clean = speech[0].numpy()
    degraded = [noisy(speech, snr)[0].numpy() for snr in (35, 25, 15, 5)]
    for keep in (0.15, 0.4):
        spectrum = np.fft.rfft(clean)
        spectrum[int(keep * len(spectrum)) :] = 0
        degraded.append(np.fft.irfft(spectrum, len(clean)).astype(np.float32))
    tensors = [torch.from_numpy(d)[None] for d in degraded[:4]]
    loudness = [LoudnessLoss(RATE)(speech, y).item() for y in tensors]
    scores = [pesq(RATE, clean, d, "wb") for d in degraded[:4]]
    assert np.corrcoef(np.log(loudness), scores)[0, 1] < -0.9
    tensors = [torch.from_numpy(d)[None] for d in degraded]
    lost = [IntelligibilityLoss(RATE)(speech, y).item() for y in tensors]
    understood = [stoi(clean, d, RATE, extended=True) for d in degraded]
    assert np.corrcoef(lost, understood)[0, 1] < -0.9


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("what", ["silence", "click", "short", "loud"])
def test_gradients_are_finite_and_bounded(name, what):
    target = torch.zeros(2, RATE if what != "short" else 600)
    if what == "click":
        target[:, 100] = 1
    if what == "loud":
        target = torch.randn(2, RATE, generator=torch.Generator().manual_seed(0))
    output = (target + 1e-3 * torch.randn(target.shape)).requires_grad_()
    loss = LOSSES[name](RATE)(target, output)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(output.grad).all()
    assert output.grad.norm() < 1e3


def test_they_take_part_where_they_have_a_weight():
    model = AudioConfig(name="x")
    recipe = AudioRecipe(model=model, loss={"loudness": 1, "intelligibility": 0.5})
    x = torch.randn(2, 24_576, generator=torch.Generator().manual_seed(0)) * 0.1
    terms = ReconstructionLoss(recipe.loss, RATE)(x, x.flip(0))
    assert set(terms) == {"wave", "stft", "mel", "loudness", "intelligibility"}
    assert set(ReconstructionLoss(AudioRecipe(model=model).loss, RATE)(x, x)) == {
        "wave",
        "stft",
        "mel",
    }
