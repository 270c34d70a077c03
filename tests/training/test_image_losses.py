from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from vpcodec.metrics import ms_ssim
from vpcodec.recipe.image import DiscriminatorConfig, LossConfig
from vpcodec.training.adversarial import discriminator_loss, generator_losses
from vpcodec.training.image.discriminators import Discriminators
from vpcodec.training.image.losses import ImageLoss, LPIPSError

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = {"l1": 1.0, "mse": 1.0, "gradient": 1.0, "ms_ssim": 1.0}


def picture(side: int = 64, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Smooth shapes with some noise, within [-1, 1]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side]
    phases = rng.uniform(0, 6, (batch, 3, 1, 1))
    waves = 0.4 * np.sin(rows / 7 + phases) + 0.4 * np.cos(columns / 11 + 2 * phases)
    return torch.from_numpy(waves + rng.uniform(-0.2, 0.2, waves.shape)).float()


def noisy(x: torch.Tensor, level: float, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return x + level * torch.randn(x.shape, generator=generator)


@pytest.fixture(scope="module")
def loss() -> ImageLoss:
    return ImageLoss(LossConfig(**ALL))


def test_equal_images_have_no_loss(loss):
    x = picture()
    terms = loss(x, x)
    assert set(terms) == set(ALL)
    for name, value in terms.items():
        assert value.item() == pytest.approx(0, abs=1e-6), name


def test_every_loss_grows_with_the_noise(loss):
    x = picture()
    rows = [loss(x, noisy(x, level)) for level in (0.01, 0.1, 0.5)]
    for name in ALL:
        values = [row[name].item() for row in rows]
        assert 0 < values[0] < 0.5 * values[1] < 0.5 * values[2], name


def test_pixel_losses_are_what_their_formulas_say(loss):
    x = picture()
    terms = loss(x, x + torch.tensor([0.1, -0.3]).view(2, 1, 1, 1))
    assert terms["l1"].item() == pytest.approx(0.2, rel=1e-4)
    assert terms["mse"].item() == pytest.approx(0.05, rel=1e-4)
    assert terms["gradient"].item() == pytest.approx(0, abs=1e-6)


def test_the_gradient_loss_looks_at_differences_on_every_scale():
    """A ramp down differs by its slope between neighbours, twice that at each further scale."""
    ramp = 0.01 * torch.arange(64.0).view(1, 1, 64, 1).expand(1, 3, 64, 64)
    x = torch.zeros(1, 3, 64, 64)
    for scales, slopes in ((1, [1]), (3, [1, 2, 4])):
        loss = ImageLoss(LossConfig(gradient=1.0, gradient_scales=scales))
        expected = 0.01 * np.mean(slopes) / 2  # nothing along the other axis
        assert loss(x, ramp)["gradient"].item() == pytest.approx(expected, rel=1e-4)
        assert loss(x, ramp.mT)["gradient"].item() == pytest.approx(expected, rel=1e-4)
    loss = ImageLoss(LossConfig(gradient=1.0, gradient_scales=8))  # more than there are pixels for
    assert torch.isfinite(loss(x[..., :16, :16], ramp[..., :16, :16])["gradient"])


@pytest.mark.parametrize("side", [16, 24, 64, 96, 192])
def test_ms_ssim_is_the_metric(loss, side):
    x = picture(side, 1)
    y = noisy(x, 0.1).clamp(-1, 1)
    pair = [((z[0].permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8) for z in (x, y)]
    x, y = (torch.from_numpy(z).permute(2, 0, 1)[None] / 127.5 - 1 for z in pair)
    assert 1 - loss(x, y)["ms_ssim"].item() == pytest.approx(ms_ssim(*pair), abs=2e-5)


def test_ms_ssim_is_that_of_the_package_pytorch_msssim(loss):
    package = pytest.importorskip("pytorch_msssim", reason="needs the package pytorch-msssim")
    x = picture(192)
    y = noisy(x, 0.2)
    expected = package.ms_ssim((x + 1) / 2, (y + 1) / 2, data_range=1.0)
    assert 1 - loss(x, y)["ms_ssim"].item() == pytest.approx(expected.item(), abs=1e-4)


def test_only_what_has_a_weight_is_computed_but_l1():
    x = picture(16)
    assert set(ImageLoss(LossConfig())(x, -x)) == {"l1"}
    assert set(ImageLoss(LossConfig(l1=0.0, mse=1.0))(x, -x)) == {"l1", "mse"}


def test_losses_are_means_over_images_so_that_processes_can_share_a_batch(loss):
    x = picture(batch=4)
    y = noisy(x, 0.2)
    whole = loss(x, y)
    halves = [loss(x[part], y[part]) for part in (slice(0, 2), slice(2, 4))]
    for name, value in whole.items():
        torch.testing.assert_close(value, (halves[0][name] + halves[1][name]) / 2)


def test_losses_are_computed_in_float32(loss):
    x, y = picture(), noisy(picture(), 0.1)
    plain = loss(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        for name, value in loss(x, y).items():
            assert value.dtype == torch.float32 and torch.equal(value, plain[name])


@pytest.mark.parametrize("target", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("output", ["equal", "flat", "negative", "far"])
def test_gradients_are_finite_whatever_the_model_gives(loss, target, output):
    x = torch.full((1, 3, 64, 64), target)
    if output == "negative":
        x = picture(batch=1)
    y = {"equal": x, "flat": x + 0.5, "negative": -x, "far": noisy(x, 30.0)}[output]
    y = y.clone().requires_grad_()
    terms = loss(x, y)
    sum(terms.values()).backward()
    assert all(torch.isfinite(value) for value in terms.values())
    assert torch.isfinite(y.grad).all()


def test_following_the_gradient_of_ms_ssim_makes_it_better(loss):
    x = picture(96)
    y = noisy(x, 0.3).requires_grad_()
    values = []
    for _ in range(20):
        value = loss(x, y)["ms_ssim"]
        (gradient,) = torch.autograd.grad(value, y)
        y = (y - 0.02 * gradient / gradient.abs().mean()).detach().requires_grad_()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]


# LPIPS


def test_a_missing_package_is_named_in_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(LPIPSError, match="package lpips: pip install lpips") as error:
        ImageLoss(LossConfig(lpips=0.1))
    assert "\n" not in str(error.value)


@pytest.fixture
def package(monkeypatch) -> ModuleType:
    """A package lpips whose distance is the mean square error, of a network that has a weight."""

    class LPIPS(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            if net == "squeeze":
                raise OSError("<urlopen error no such host>\nmore")
            self.factor = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            assert min(x.shape[2:]) >= 64 and x.dtype == torch.float32
            return self.factor * (x - y).square().mean((1, 2, 3), keepdim=True)

    package = ModuleType("lpips")
    package.LPIPS = LPIPS
    monkeypatch.setitem(sys.modules, "lpips", package)
    return package


@pytest.mark.parametrize("side", [16, 64])
def test_lpips_is_asked_about_images_and_not_trained(package, side):
    loss = ImageLoss(LossConfig(lpips=0.1, lpips_net="alex"))
    x, y = picture(side), noisy(picture(side), 0.3).requires_grad_()
    value = loss(x, y)["lpips"]
    value.backward()
    assert value.shape == () and y.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    if side == 64:
        assert value.item() == pytest.approx((x - y).square().mean().item())


def test_a_backbone_that_cannot_be_fetched_is_an_error_of_one_line(package):
    with pytest.raises(LPIPSError, match="squeeze cannot be loaded .*no such host") as error:
        ImageLoss(LossConfig(lpips=0.1, lpips_net="squeeze"))
    assert "\n" not in str(error.value)


# The discriminator


def build(size: str = "small", **fields) -> Discriminators:
    torch.manual_seed(0)
    return Discriminators(DiscriminatorConfig(size=size, **fields))


@pytest.mark.parametrize("size, low, high", [("small", 0.4e6, 0.6e6), ("full", 1.6e6, 2.4e6)])
@pytest.mark.parametrize("layers", [1, 3, 4])
def test_it_gives_hidden_activations_and_a_logit_per_patch(size, low, high, layers):
    model = build(size, layers=layers)
    [[*hidden, logits]] = model(picture(64))
    assert len(hidden) == layers + 1 and all(layer.shape[1] >= 32 for layer in hidden)
    assert logits.shape == (2, 1, 64 >> layers, 64 >> layers)
    if layers == 3:
        assert low < sum(parameter.numel() for parameter in model.parameters()) < high


def test_images_are_judged_alone_and_the_answer_is_always_the_same():
    model, x = build().train(), picture(batch=4)
    [both], [alone], [again] = model(x), model(x[:1]), model(x)
    for a, b, c in zip(both, alone, again):
        torch.testing.assert_close(a[:1], b)
        assert torch.equal(a, c)


def test_before_training_activations_have_the_level_of_the_input_and_logits_are_small():
    [[*hidden, logits]] = build()(picture())
    for layer in hidden:
        assert 0.1 < layer.square().mean().sqrt() < 5
    assert logits.square().mean().sqrt() < 0.5


def test_its_losses_reach_every_parameter_and_every_pixel():
    model = build()
    real, fake = picture(batch=1), noisy(picture(batch=1), 0.3).requires_grad_()
    discriminator_loss(model(real), model(fake)).backward(inputs=list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    for value in generator_losses(model(real), model(fake)).values():
        (gradient,) = torch.autograd.grad(value, fake, retain_graph=True)
        assert torch.isfinite(gradient).all() and (gradient.abs() > 0).float().mean() > 0.99


def test_it_learns_to_tell_blurred_images():
    model = build(layers=2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    values = []
    for step in range(80):
        real = picture(32, 4, seed=step)
        fake = torch.nn.functional.avg_pool2d(real, 3, 1, 1)
        loss = discriminator_loss(model(real), model(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert np.mean(values[-10:]) < 0.42  # 0.5 if it cannot tell
