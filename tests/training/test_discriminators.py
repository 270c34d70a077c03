from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vpcodec.recipe.audio import DiscriminatorConfig
from vpcodec.training.adversarial import (
    discriminator_loss,
    generator_losses,
    gradient_penalty,
)
from vpcodec.training.audio.discriminators import Discriminators
from vpcodec.training.balancer import Balancer

pytestmark = pytest.mark.usefixtures("one_thread")
RATE = 16_000


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(size: str = "small", **fields) -> Discriminators:
    torch.manual_seed(0)
    return Discriminators(DiscriminatorConfig(size=size, **fields))


@pytest.fixture(scope="module")
def small() -> Discriminators:
    return build().requires_grad_(False)


def flat(outputs: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [tensor for member in outputs for tensor in member]


@pytest.mark.parametrize(
    "size, low, high", [("frame", 1e6, 3e6), ("small", 1e6, 3e6), ("full", 30e6, 60e6)]
)
def test_sizes_are_as_documented(size, low, high):
    with torch.device("meta"):
        model = build(size)
    assert low < sum(parameter.numel() for parameter in model.parameters()) < high


def test_the_small_size_costs_no_more_than_the_codec(small):
    with FlopCounterMode(display=False) as counter:
        small(noise(1, RATE))
    assert counter.get_total_flops() / 2 < 0.8e9


@pytest.mark.parametrize("size", ["small", "full"])
def test_every_discriminator_gives_its_hidden_activations_and_then_logits(size):
    fields = {"periods": (2, 3), "fft_sizes": (256,)}
    outputs = build(size, **fields)(noise(2, 2000))
    assert len(outputs) == 3
    for member in outputs:
        assert len(member) >= 4
        assert all(len(tensor) == 2 and tensor.shape[1] > 1 for tensor in member[:-1])
        assert member[-1].shape[:2] == (2, 1)
        assert member[-1].numel() > 2  # of places, not one per clip


@pytest.mark.parametrize("length", [1025, 4800, 4801, 7919])
def test_any_length_above_half_of_the_largest_fft_works(small, length):
    assert all(torch.isfinite(tensor).all() for tensor in flat(small(noise(1, length))))


def test_the_smallest_fft_has_bins_for_every_band():
    for size in ("small", "full"):
        outputs = build(size, periods=(), fft_sizes=(16,))(noise(1, 200))
        assert all(tensor.numel() > 0 for tensor in flat(outputs))


def test_a_long_period_works_on_a_short_clip():
    outputs = build(periods=(601,), fft_sizes=())(noise(1, 500))
    assert all(torch.isfinite(tensor).all() for tensor in flat(outputs))


def test_offset_and_level_do_not_tell_clips_apart(small):
    x = noise(1, 4800)
    for y in (0.3 + x, 0.5 * x, 3 * x):
        for a, b in zip(flat(small(x)), flat(small(y)), strict=True):
            assert (a - b).abs().max() < 0.02 * a.abs().max()


def test_clips_are_judged_alone(small):
    x = noise(2, 4800)
    x[1] *= 7
    for both, alone in zip(flat(small(x)), flat(small(x[:1])), strict=True):
        torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-5)


def test_before_training_activations_have_the_level_of_the_input_and_logits_are_small(small):
    for *hidden, logits in small(noise(2, 8000)):
        for tensor in hidden:
            assert 0.2 < tensor.square().mean().sqrt() < 5
        assert logits.square().mean().sqrt() < 0.5


def test_all_the_spectrum_and_all_the_wave_are_looked_at(small):
    """A tone anywhere in the band, or a click anywhere in the wave, changes logits."""
    x = noise(1, 4800)
    time = torch.arange(4800) / RATE
    clicks = [torch.nn.functional.one_hot(torch.tensor(at), 4800) for at in (0, 2401, 4799)]
    tones = [torch.sin(2 * torch.pi * hz * time) for hz in (50, 1700, 4000, 7900)]
    for change in clicks + tones:
        for member, before in zip(small(x + change), small(x), strict=True):
            assert (member[-1] - before[-1]).abs().max() > 0.01


@pytest.mark.parametrize("size", ["small", "full"])
def test_the_losses_reach_every_parameter_and_the_clip(size):
    model = build(size, periods=(2, 5), fft_sizes=(512, 256))
    real, fake = noise(1, 3000), noise(1, 3000, seed=1).requires_grad_()
    discriminator_loss(model(real), model(fake)).backward(inputs=list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    model.requires_grad_(False)
    for loss in generator_losses(model(real), model(fake)).values():
        (gradient,) = torch.autograd.grad(loss, fake, retain_graph=True)
        assert torch.isfinite(gradient).all() and (gradient.abs() > 0).float().mean() > 0.99


@pytest.mark.parametrize("level", [0.0, 0.5, 1e-6])
@pytest.mark.parametrize("other", [0.0, 0.1])
def test_constant_clips_give_finite_losses_and_gradients(level, other):
    model = build(periods=(3,), fft_sizes=(256,))
    fake = torch.full((1, 2000), level).requires_grad_()
    real, fakes = model(noise(1, 2000) * other), model(fake)
    loss = discriminator_loss(real, fakes) + sum(generator_losses(real, fakes).values())
    loss.backward()
    for tensor in (loss, fake.grad, *(parameter.grad for parameter in model.parameters())):
        assert torch.isfinite(tensor).all()


def test_silence_is_not_blown_up(small):
    """The level of what is below -40 dB counts: its gradient is bounded."""
    gradients = []
    for level in (1.0, 1e-3, 1e-6):
        x = (level * noise(1, 4800)).requires_grad_()
        generator_losses(small(noise(1, 4800, seed=1)), small(x))["adversarial"].backward()
        gradients.append(x.grad.norm())
    assert gradients[1] < 20 * gradients[0] and gradients[2] < 20 * gradients[0]


def test_bf16_autocast_works_and_stays_near_float32(small):
    x = noise(2, 4800)
    plain = small(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = small(x)
    for a, b in zip(flat(plain), flat(low), strict=True):
        assert b.dtype == torch.bfloat16
        assert (a - b.float()).abs().mean() < 0.03 * a.abs().mean()
    assert discriminator_loss(low, low).dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in generator_losses(low, low).values())


def test_weights_survive_a_round_trip_through_the_state_dict():
    model, other = build(periods=(2,), fft_sizes=(64,)), build(periods=(2,), fft_sizes=(64,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    other.load_state_dict(model.state_dict())
    x = noise(1, 500)
    assert all(torch.equal(a, b) for a, b in zip(flat(model(x)), flat(other(x)), strict=True))


def test_discriminators_learn_to_tell_harmonics_from_noise():
    generator = torch.Generator().manual_seed(0)
    model = build(periods=(2, 5), fft_sizes=(512,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.8, 0.99))

    def clips() -> tuple[torch.Tensor, torch.Tensor]:
        pitch = 80 + 200 * torch.rand(8, 1, 1, generator=generator)
        harmonics = torch.arange(1, 20)[None, :, None]
        phase = 2 * torch.pi * torch.rand(8, 19, 1, generator=generator)
        waves = torch.sin(2 * torch.pi * pitch * harmonics * torch.arange(2400) / RATE + phase)
        return (waves / harmonics).sum(1), torch.randn(8, 2400, generator=generator)

    def loss() -> torch.Tensor:
        real, fake = clips()
        return discriminator_loss(model(real), model(fake))

    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    with torch.no_grad():
        assert loss() < 0.2  # of other clips; 0.5 is not telling


def test_nothing_of_an_adversarial_step_is_read_by_the_host():
    """Fake tensors have no values: reading one raises."""
    with FakeTensorMode():
        model = build(periods=(3,), fft_sizes=(256,))
        real, fake = torch.empty(2, 2000), torch.empty(2, 2000, requires_grad=True)
        terms = generator_losses(model(real), model(fake))
        gradient = Balancer({"adversarial": 1.0, "feature": 2.0}, 0.9).gradient(terms, fake)
        fake.backward(gradient)
        discriminator_loss(model(real), model(fake.detach())).backward()
    assert fake.grad.shape == (2, 2000)
    assert all(parameter.grad is not None for parameter in model.parameters())


FRAME = {"size": "frame", "periods": (2, 3), "fft_sizes": (256, 512)}


def test_discriminators_at_frame_rate_give_hidden_activations_and_then_logits():
    outputs = build(**FRAME)(noise(2, 2000))
    assert len(outputs) == 4
    for items, member in zip((2, 2, 4, 6), outputs, strict=True):
        assert all(len(tensor) == items and tensor.shape[1] > 1 for tensor in member[:-1])
        assert member[-1].shape[:2] == (items, 1)
        assert member[-1].shape[2] > 10  # a logit per frame, not one per clip


def test_all_the_spectrum_and_all_the_wave_are_looked_at_at_frame_rate():
    model = build(**FRAME).requires_grad_(False)
    x = noise(1, 4800)
    time = torch.arange(4800) / RATE
    clicks = [torch.nn.functional.one_hot(torch.tensor(at), 4800) for at in (300, 2401, 4400)]
    tones = [torch.sin(2 * torch.pi * hz * time) for hz in (70, 1700, 4000, 7900)]
    for change in clicks + tones:
        for member, before in zip(model(x + change), model(x), strict=True):
            assert (member[-1] - before[-1]).abs().max() > 0.01


def test_the_losses_reach_every_parameter_at_frame_rate():
    model = build(**FRAME)
    real, fake = noise(1, 3000), noise(1, 3000, seed=1).requires_grad_()
    discriminator_loss(model(real), model(fake), "relativistic").backward(
        inputs=list(model.parameters())
    )
    for name, parameter in model.named_parameters():
        if not name.endswith("last.bias"):  # a difference of logits has none
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    for loss in generator_losses(model(real), model(fake), "relativistic").values():
        (gradient,) = torch.autograd.grad(loss, fake, retain_graph=True)
        assert torch.isfinite(gradient).all() and (gradient.abs() > 0).float().mean() > 0.99


def test_a_random_part_of_the_discriminators_takes_part_in_a_step():
    model = build(**FRAME, per_step=2)
    x, seen = noise(1, 2000), set()
    every = [member[-1] for member in build(**FRAME)(x)]
    for seed in range(20):
        torch.manual_seed(seed)
        model.draw()
        logits = [member[-1] for member in model(x)]
        which = tuple(i for i, y in enumerate(every) if any(torch.equal(y, z) for z in logits))
        assert len(logits) == len(which) == 2
        seen.add(which)
    assert {i for pair in seen for i in pair} == {0, 1, 2, 3} and len(seen) > 3


@pytest.mark.parametrize("size", ["frame", "small"])
def test_the_gradient_penalty_is_the_squared_norm_of_the_gradient(size):
    model = build(size, periods=(3,), fft_sizes=())
    rows = noise(1, 300).requires_grad_()
    outputs = model(rows)
    torch.manual_seed(0)
    found = torch.stack([gradient_penalty(model, rows, outputs) for _ in range(200)]).mean()
    squares = []
    level = rows.sub(rows.mean()).square().mean().add(0.01**2).sqrt().detach()
    for logit in outputs[0][-1].flatten():
        (gradient,) = torch.autograd.grad(logit, rows, retain_graph=True)
        squares.append((gradient * level).square().sum())
    expected = torch.stack(squares).mean()  # of the input as it is scaled to
    assert found.item() == pytest.approx(expected.item(), rel=0.3)


def test_the_gradient_penalty_flattens_the_logits():
    torch.manual_seed(0)
    model = build(**FRAME)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = noise(4, 2000)
    steepness = []
    for _ in range(20):
        optimizer.zero_grad()
        penalty = gradient_penalty(model, x, model(x))
        penalty.backward()
        optimizer.step()
        steepness.append(penalty.item())
    assert steepness[-1] < 0.3 * steepness[0]
