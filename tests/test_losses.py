from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("torchaudio", reason="needs the train extra")

from vpcodec.recipe import LossConfig  # noqa: E402
from vpcodec.training.losses import ReconstructionLoss  # noqa: E402

RATE = 16_000


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return 0.2 * np.random.default_rng(seed).standard_normal(int(seconds * RATE)).clip(-4, 4)


@pytest.fixture
def loss() -> ReconstructionLoss:
    return ReconstructionLoss(LossConfig(), RATE)


def signal_noise(level: float = 0.2) -> torch.Tensor:
    return torch.from_numpy(noise(0.5, seed=2)).float()[None] * (level / 0.2)


def test_identical_signals_have_no_loss(loss):
    x = signal_noise()
    assert {k: v.item() for k, v in loss(x, x).items()} == {"wave": 0, "stft": 0, "mel": 0}


def test_the_loss_grows_with_the_noise(loss):
    x, error = signal_noise(), torch.from_numpy(noise(0.5, seed=3)).float()
    terms = [loss(x, x + level * error) for level in (0.01, 0.1, 1.0)]
    for name in ("wave", "stft", "mel"):
        values = [term[name].item() for term in terms]
        assert 0 < values[0] < 0.5 * values[1] < 0.25 * values[2]


def test_half_the_amplitude_costs_what_the_formula_says(loss):
    x = signal_noise(0.25)
    terms = loss(x, x / 2)
    assert terms["wave"].item() == pytest.approx(0.5, rel=1e-4)
    assert terms["stft"].item() == pytest.approx(0.5 + math.log10(2), rel=0.03)
    assert terms["mel"].item() == pytest.approx(math.log10(2), rel=0.03)


def test_the_loss_is_computed_in_float32(loss):
    x, y = signal_noise(), signal_noise(0.1)
    plain = loss(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        for name, value in loss(x, y).items():
            assert value.dtype == torch.float32
            assert torch.equal(value, plain[name])


@pytest.mark.parametrize("target", [0.0, 0.2])
@pytest.mark.parametrize("output", [0.0, 0.2])
def test_silence_gives_finite_losses_and_gradients(loss, target, output):
    y = signal_noise(output).requires_grad_()
    terms = loss(signal_noise(target), y)
    assert all(torch.isfinite(value) for value in terms.values())
    sum(terms.values()).backward()
    assert torch.isfinite(y.grad).all()


def test_sizes_without_mel_bands_leave_the_mel_term_out():
    loss = ReconstructionLoss(LossConfig(fft_sizes=(128,), mel_bands=(0,)), RATE)
    assert loss(signal_noise(), signal_noise(0.1))["mel"].item() == 0
