from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("torchaudio", reason="needs the train extra")

from vpcodec.recipe.audio import LossConfig
from vpcodec.training.adversarial import (
    discriminator_loss,
    generator_losses,
    winning_chance,
)
from vpcodec.training.audio.losses import ReconstructionLoss

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


def outputs(*logits: float, hidden: float = 1.0) -> list[list[torch.Tensor]]:
    """Of discriminators with two hidden layers and constant logits."""
    return [
        [torch.full((2, 4, 7), hidden), torch.full((2, 3), hidden), torch.full((2, 1, 5), logit)]
        for logit in logits
    ]


def random_outputs(seed: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(2, 4, size, generator=generator) for size in sizes]
        for sizes in ((9, 3), (50, 20, 5))
    ]


@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_discriminators_loss_does_not_depend_on_how_many_there_are(count):
    def loss(real: float, fake: float) -> float:
        return discriminator_loss(outputs(*[real] * count), outputs(*[fake] * count)).item()

    assert loss(1.0, 0.0) == 0
    assert loss(0.5, 0.5) == 0.5
    assert loss(0.0, 1.0) == 2


def test_discriminators_count_alike_however_many_logits_they_have():
    def one(logit: float, size: int) -> list[torch.Tensor]:
        return [torch.ones(1), torch.full((1, 1, size), logit)]

    real, fake = [one(1.0, 5), one(1.0, 500)], [one(0.0, 5), one(1.0, 500)]
    assert discriminator_loss(real, fake).item() == 0.5
    assert generator_losses(real, fake)["adversarial"].item() == 0.5


def test_the_adversarial_loss_is_zero_where_the_discriminators_are_fooled():
    for logit, expected in ((1.0, 0.0), (0.5, 0.25), (0.0, 1.0), (-1.0, 4.0)):
        losses = generator_losses(outputs(1.0, 0.3), outputs(logit, logit))
        assert losses["adversarial"].item() == expected


def test_feature_matching_is_relative_and_about_hidden_layers_only():
    real = outputs(1.0, 1.0, hidden=-2.0)
    assert generator_losses(real, outputs(0.0, -7.0, hidden=-2.0))["feature"].item() == 0
    assert generator_losses(real, outputs(1.0, 1.0, hidden=1.0))["feature"].item() == 1.5


def test_feature_matching_does_not_depend_on_the_level_of_activations():
    real, fake = random_outputs(0), random_outputs(1)
    plain = generator_losses(real, fake)["feature"]
    scaled = [[[20 * x for x in member] for member in side] for side in (real, fake)]
    torch.testing.assert_close(generator_losses(*scaled)["feature"], plain)


def test_no_gradient_of_the_codecs_losses_goes_to_outputs_for_recorded_audio():
    real, fake = random_outputs(0), random_outputs(1)
    for tensor in [t for side in (real, fake) for member in side for t in member]:
        tensor.requires_grad_()
    sum(generator_losses(real, fake).values()).backward()
    assert all(tensor.grad is None for member in real for tensor in member)
    assert all(tensor.grad.abs().max() > 0 for member in fake for tensor in member)


def test_discriminators_of_another_number_are_refused():
    with pytest.raises(ValueError):
        discriminator_loss(outputs(1.0, 1.0), outputs(1.0))
    with pytest.raises(ValueError):
        generator_losses(outputs(1.0, 1.0), outputs(1.0))


@pytest.mark.parametrize("name", ["wave", "stft", "mel", "adversarial", "feature"])
def test_the_pull_of_a_term_follows_its_gradient_however_large_it_is(loss, name):
    """No term is replaced by a constant above a bound: twice the weight is twice the pull."""

    def pull(level: float, weight: float) -> tuple[float, torch.Tensor]:
        error = torch.from_numpy(noise(0.5, seed=3)).float()[None]
        y = (signal_noise() + level * error).requires_grad_()
        features = [[y.view(1, 10, -1), y.mean(-1)]]
        real = [[signal_noise().view(1, 10, -1), y.new_zeros(1)]]
        terms = loss(signal_noise(), y) | generator_losses(real, features)
        (weight * terms[name]).backward()
        return terms[name].item(), y.grad

    for level in (0.5, 1000.0):
        value, once = pull(level, 1.0)
        assert once.norm() > 0
        torch.testing.assert_close(pull(level, 2.0)[1], 2 * once)
        finite = pull(level * 1.01, 1.0)[0] - value
        error = torch.from_numpy(noise(0.5, seed=3)).float()[None]
        assert finite == pytest.approx((once * error).sum().item() * level * 0.01, rel=0.1)


def test_a_relativistic_loss_is_about_differences_of_logits():
    log2 = math.log(2)
    for shift in (0.0, 7.0):
        even = outputs(shift, shift)
        assert discriminator_loss(even, even, "relativistic").item() == pytest.approx(log2)
        assert generator_losses(even, even, "relativistic")["adversarial"].item() == (
            pytest.approx(log2)
        )
    real, fake = outputs(3.0), outputs(-3.0)
    assert discriminator_loss(real, fake, "relativistic").item() == pytest.approx(0.0025, abs=1e-3)
    assert generator_losses(real, fake, "relativistic")["adversarial"].item() == (
        pytest.approx(6.0025, abs=1e-3)
    )


def test_the_winning_chance_tells_who_is_ahead():
    real, fake = outputs(1.0, 1.0), outputs(0.0, 0.0)
    assert winning_chance(real, fake).item() == 1
    assert winning_chance(fake, real).item() == 0
    one = [[torch.zeros(1), torch.tensor([0.0, 1.0, 2.0, 3.0])]]
    other = [[torch.zeros(1), torch.tensor([1.0, 0.0, 3.0, 2.0])]]
    assert winning_chance(one, other).item() == 0.5


def test_two_draws_that_agree_cost_what_one_costs():
    loss = ReconstructionLoss(LossConfig(energy=True), RATE)
    x, y = signal_noise(), signal_noise(0.1)
    terms, plain = loss(x, y.repeat(2, 1)), loss(x, y)
    for name in ("wave", "stft", "mel"):
        torch.testing.assert_close(terms[name], plain[name], rtol=1e-4, atol=1e-5)


def test_two_draws_cost_less_by_half_of_what_they_differ_by():
    loss = ReconstructionLoss(LossConfig(energy=True), RATE)
    x, y, z = (torch.from_numpy(noise(0.5, seed=i)).float()[None] for i in (2, 3, 4))
    terms, first, second, between = loss(x, torch.cat([y, z])), loss(x, y), loss(x, z), loss(y, z)
    for name in ("wave", "stft", "mel"):
        expected = (first[name] + second[name] - between[name]) / 2
        assert terms[name].item() == pytest.approx(expected.item(), rel=0.02)


def test_the_gradient_of_what_draws_differ_by_reaches_each_of_them_once():
    loss = ReconstructionLoss(LossConfig(energy=True), RATE)
    x, y, z = (torch.from_numpy(noise(0.5, seed=i)).float()[None] for i in (2, 3, 4))
    both = torch.cat([y, z]).requires_grad_()
    (found,) = torch.autograd.grad(loss(x, both)["wave"], both)
    level = x.abs().mean() * x.numel()
    towards = torch.sign(both.detach() - x) / 2
    apart = torch.sign(torch.cat([y - z, z - y])) / 2
    torch.testing.assert_close(found, (towards - apart) / level, rtol=1e-4, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("joint", [False, True])
def test_the_energy_distance_learns_noise_and_a_distance_does_not(joint):
    """Noise of a known spectrum: STFT magnitudes of the trained generator are as spread as those of
    noise (Rayleigh: standard deviation over mean 0.52); trained by a distance they are not."""
    sizes = {"fft_sizes": (128, 256), "mel_bands": (16, 32), "wave": 0.0, "joint": joint}
    generator = torch.Generator().manual_seed(0)

    def spread(energy: bool) -> tuple[float, float]:
        torch.manual_seed(0)
        loss = ReconstructionLoss(LossConfig(energy=energy, **sizes), RATE)
        # a fixed wave, which a decoder has where it makes no noise, and a filter of its noise
        tone = torch.nn.Parameter(0.1 * torch.randn(1, 2048))
        kernel = torch.nn.Parameter(0.02 * torch.randn(1, 1, 33))
        optimizer = torch.optim.Adam([tone, kernel], lr=0.01)

        def draw(count: int) -> torch.Tensor:
            white = torch.randn(count, 1, 2048 + 32, generator=generator)
            return tone + torch.nn.functional.conv1d(white, kernel).squeeze(1)

        for _ in range(250):
            target = 0.2 * torch.randn(8, 2048, generator=generator)
            terms = loss(target, draw(16 if energy else 8))
            optimizer.zero_grad()
            (terms["stft"] + terms["mel"]).backward()
            optimizer.step()
        with torch.no_grad():
            magnitude = torch.stft(
                draw(64), 256, 64, window=torch.hann_window(256), return_complex=True
            ).abs()[:, 8:120, 4:-4]
        return (magnitude.std(0) / magnitude.mean(0)).mean().item(), magnitude.mean().item()

    like, level = spread(energy=True)
    unlike, low = spread(energy=False)
    assert 0.45 < like < 0.6
    assert unlike < 0.35
    assert level > 1.05 * low
