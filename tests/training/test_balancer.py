from __future__ import annotations

import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from groups import in_two_processes

from vpcodec.training.balancer import Balancer

pytestmark = pytest.mark.usefixtures("one_thread")


def signal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def two_losses(output: torch.Tensor) -> dict[str, torch.Tensor]:
    """Means over clips, as different in size as losses come."""
    return {"small": 1e-4 * output.abs().mean(), "large": 300 * (output - 1).square().mean()}


def clip_norm(gradient: torch.Tensor) -> float:
    """Root mean square, over clips, of the gradients that they would have alone."""
    return (len(gradient) * gradient).flatten(1).norm(dim=1).square().mean().sqrt().item()


def test_weights_are_shares_of_the_gradient_whatever_the_size_of_the_losses():
    output = signal(4, 100).requires_grad_()
    losses = two_losses(output)
    for weights, share in (((1.0, 3.0), 0.25), ((20.0, 5.0), 0.8)):
        balancer = Balancer(dict(zip(losses, weights)), decay=0.0, scale=2.0)
        parts = []
        for name, part in zip(losses, (share, 1 - share)):
            (gradient,) = torch.autograd.grad(losses[name], output, retain_graph=True)
            parts.append(2.0 * part * gradient / clip_norm(gradient))
            assert clip_norm(parts[-1]) == pytest.approx(2.0 * part)
        torch.testing.assert_close(balancer.gradient(losses, output), sum(parts))


def test_a_factor_on_a_loss_does_not_change_its_pull():
    output = signal(4, 100).requires_grad_()
    losses = two_losses(output)
    plain = Balancer({"small": 1.0, "large": 1.0}, 0.9).gradient(losses, output)
    losses["small"] = 1e6 * losses["small"]
    scaled = Balancer({"small": 1.0, "large": 1.0}, 0.9).gradient(losses, output)
    torch.testing.assert_close(scaled, plain)


def test_norms_are_averaged_exponentially_without_bias():
    decay, norms = 0.8, []
    balancer = Balancer({"loss": 3.0}, decay)
    for step in range(6):
        output = signal(3, 50, seed=step).requires_grad_()
        loss = (step + 1) * output.square().mean()
        (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
        norms.append(clip_norm(gradient))
        weights = [decay**age for age in range(step, -1, -1)]
        average = sum(w * n for w, n in zip(weights, norms)) / sum(weights)
        got = balancer.gradient({"loss": loss}, output)
        torch.testing.assert_close(got, gradient / average, rtol=1e-5, atol=1e-8)


def test_the_pull_grows_when_the_gradient_outgrows_its_average():
    """A sudden large gradient is not cut to the norm that others have."""
    balancer = Balancer({"loss": 1.0}, 0.99)
    output = signal(2, 50).requires_grad_()
    for _ in range(50):
        before = balancer.gradient({"loss": output.square().mean()}, output)
    after = balancer.gradient({"loss": 10 * output.square().mean()}, output)
    assert 7 < after.norm() / before.norm() < 10


def test_the_result_does_not_depend_on_the_size_of_the_batch():
    def parameter_gradient(copies: int) -> torch.Tensor:
        weight = torch.ones(20, requires_grad=True)
        output = signal(2, 20).repeat(copies, 1) * weight
        balancer = Balancer({"small": 1.0, "large": 2.0}, 0.9)
        output.backward(balancer.gradient(two_losses(output), output))
        return weight.grad

    torch.testing.assert_close(parameter_gradient(1), parameter_gradient(5))


def test_losses_of_weight_zero_are_not_even_differentiated():
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise AssertionError("differentiated")

    output = signal(2, 10).requires_grad_()
    losses = two_losses(output)
    plain = Balancer({"small": 1.0, "large": 1.0}, 0.9).gradient(losses, output)
    balancer = Balancer({"small": 1.0, "off": 0.0, "large": 1.0}, 0.9)
    losses["off"] = Poison.apply(output).sum()
    assert torch.equal(balancer.gradient(losses, output), plain)


def test_losses_that_are_not_at_hand_leave_their_share_to_the_others():
    output = signal(2, 10).requires_grad_()
    losses = {"large": two_losses(output)["large"]}
    alone = Balancer({"large": 1.0}, 0.9).gradient(losses, output)
    balancer = Balancer({"later": 7.0, "large": 2.0, "constant": 5.0}, 0.9)
    losses["constant"] = torch.zeros(())
    torch.testing.assert_close(balancer.gradient(losses, output), alone)


def test_a_loss_without_a_weight_is_refused():
    output = signal(2, 10).requires_grad_()
    with pytest.raises(KeyError, match="other"):
        Balancer({"loss": 1.0}, 0.9).gradient({"other": output.sum()}, output)


def test_nothing_to_combine_gives_zeros():
    output = signal(2, 10).requires_grad_()
    assert not Balancer({"loss": 0.0}, 0.9).gradient({"loss": output.sum()}, output).any()
    assert not Balancer({"loss": 1.0}, 0.9).gradient({}, output).any()


def test_zero_gradients_give_zeros_and_do_not_lower_the_average():
    balancer, other = Balancer({"loss": 1.0}, 0.5), Balancer({"loss": 1.0}, 0.5)
    output = signal(2, 10).requires_grad_()
    for _ in range(3):
        assert not balancer.gradient({"loss": (0 * output).sum()}, output).any()
    for balance in (balancer, other):
        balance.gradient({"loss": output.sum()}, output)
    balancer.gradient({"loss": (0 * output).sum()}, output)
    losses = {"loss": 4 * output.sum()}
    assert torch.equal(balancer.gradient(losses, output), other.gradient(losses, output))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("steps", [0, 3])
def test_gradients_that_are_not_finite_show_and_leave_the_averages_alone(bad, steps):
    balancer = Balancer({"small": 1.0, "large": 1.0}, 0.9)
    output = signal(2, 10).requires_grad_()
    for _ in range(steps):
        balancer.gradient(two_losses(output), output)
    state = {name: value.clone() for name, value in balancer.state_dict().items()}
    losses = two_losses(output)
    losses["small"] = losses["small"] + (output[0, 0] * bad)
    assert not torch.isfinite(balancer.gradient(losses, output)).all()
    assert torch.equal(balancer.total[0], state["total"][0])
    assert torch.isfinite(balancer.gradient(two_losses(output), output)).all()


def test_the_gradients_of_parameters_are_left_to_the_caller():
    layer = torch.nn.Linear(10, 10)
    head = torch.nn.Linear(10, 1)
    output = layer(signal(4, 10))
    loss = head(output).square().mean()
    gradient = Balancer({"loss": 1.0}, 0.9).gradient({"loss": loss}, output)
    assert all(p.grad is None for p in (*layer.parameters(), *head.parameters()))
    own = layer.weight.square().mean()  # as that of a quantizer
    torch.autograd.backward([output, own], [gradient, torch.tensor(0.5)])
    (through,) = torch.autograd.grad(layer(signal(4, 10)), layer.weight, gradient)
    torch.testing.assert_close(layer.weight.grad, through + 0.5 * 2 * layer.weight.detach() / 100)
    assert head.weight.grad is None


def test_a_loss_scale_scales_the_result_and_nothing_else():
    output = signal(2, 10).requires_grad_()
    plain, scaled = (Balancer({"small": 1.0, "large": 1.0}, 0.9) for _ in range(2))
    expected = 1024 * plain.gradient(two_losses(output), output)
    got = scaled.gradient(two_losses(output), output, loss_scale=torch.tensor(1024.0))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(scaled.total, plain.total)


def test_it_goes_on_exactly_after_a_round_trip_through_the_state_dict():
    weights = {"small": 1.0, "off": 0.0, "large": 1.0}
    balancer, resumed = Balancer(weights, 0.9), Balancer(weights, 0.9)
    for step in range(4):
        output = signal(2, 10, seed=step).requires_grad_()
        expected = balancer.gradient(two_losses(output), output)
        if step == 2:
            resumed.load_state_dict(balancer.state_dict())
        if step > 2:
            assert torch.equal(resumed.gradient(two_losses(output), output), expected)


class TwoParts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = torch.nn.Linear(12, 16), torch.nn.Linear(16, 30)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def train(model: torch.nn.Module, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Three updates on batches of 8 clips, shared among the processes; the weights."""
    balancer = Balancer({"small": 1.0, "large": 2.0, "off": 0.0}, 0.7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(3):
        scale = torch.logspace(-1, 1, 8)[:, None]  # the halves of the batch differ
        batch = (scale * signal(8, 12, seed=step)).chunk(world)[rank]
        output = model(batch)
        optimizer.zero_grad()
        output.backward(balancer.gradient(two_losses(output), output))
        optimizer.step()
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def trained_by(rank: int) -> dict[str, torch.Tensor]:
    weights = train(torch.nn.parallel.DistributedDataParallel(TwoParts()), rank, 2)
    return {name.removeprefix("module."): value for name, value in weights.items()}


@pytest.mark.slow
def test_two_processes_with_half_the_batch_each_train_as_one_with_all(tmp_path: Path):
    expected = train(TwoParts(), 0, 1)
    for weights in in_two_processes(trained_by, tmp_path):
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)


def test_between_measurements_one_pass_gives_the_gradient_of_the_same_averages():
    balancer, other = (Balancer({"small": 1.0, "large": 3.0}, 0.9) for _ in range(2))
    for seed, measure in enumerate((True, False, False)):
        output = signal(4, 100, seed=seed).requires_grad_()
        losses = two_losses(output)
        before = balancer.state_dict()["total"].clone()
        found = balancer.gradient(losses, output, measure=measure)
        if measure:
            torch.testing.assert_close(found, other.gradient(losses, output))
            continue
        assert torch.equal(balancer.total, before)
        averages = (balancer.total / balancer.count).tolist()
        expected = 0
        for share, average, loss in zip((0.25, 0.75), averages, losses.values()):
            (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
            expected = expected + share * gradient / average
        torch.testing.assert_close(found, expected)


def test_a_loss_that_comes_later_is_measured_at_once():
    balancer = Balancer({"small": 1.0, "large": 1.0}, 0.9)
    output = signal(4, 100).requires_grad_()
    losses = two_losses(output)
    balancer.gradient({"small": losses["small"]}, output)
    balancer.gradient(losses, output, measure=False)
    assert (balancer.count > 0).all()


def test_a_balancer_that_was_restored_goes_on_without_measuring():
    balancer, restored = (Balancer({"small": 1.0, "large": 1.0}, 0.9) for _ in range(2))
    output = signal(4, 100).requires_grad_()
    balancer.gradient(two_losses(output), output)
    restored.load_state_dict(balancer.state_dict())
    output = signal(4, 100, seed=1).requires_grad_()
    results = [b.gradient(two_losses(output), output, measure=False) for b in (balancer, restored)]
    assert torch.equal(*results) and torch.equal(balancer.total, restored.total)
