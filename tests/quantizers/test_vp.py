from __future__ import annotations

import copy
import io
import math
import multiprocessing

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
scipy = pytest.importorskip("scipy", reason="needs the dev extra")

import torch.distributed as dist
from groups import in_two_processes
from scipy.cluster.vq import kmeans2
from scipy.spatial import cKDTree
from scipy.stats import chi2, norm
from torch.nn.parallel import DistributedDataParallel

from vpcodec.quantizers import VP, NoCodebookError, vp

LAWS = ("normal", "uniform", "laplace", "silence")


pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw(law: str, number: int, dim: int, seed: int = 0) -> torch.Tensor:
    """(number, dim) of about unit variance; 'silence' has 30 % in a narrow cluster."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(number, dim))
    if law == "uniform":
        z = rng.uniform(-math.sqrt(3), math.sqrt(3), z.shape)
    if law == "laplace":
        z = rng.laplace(0, math.sqrt(0.5), z.shape)
    if law == "silence":
        z = np.where(rng.random((number, 1)) < 0.3, 1.5 + 0.02 * z, z)
    return torch.from_numpy(z).float()


def filled(queue: torch.Tensor, codebook_size: int, **options) -> VP:
    """In training, with exactly these latents in its queue."""
    options = {"queue_size": len(queue), "search_size": None, "seed": 0, **options}
    quantizer = VP(queue.shape[1], codebook_size, **options)
    quantizer.push(queue, number=len(queue))
    return quantizer


def fitted(dim: int = 3, codebook_size: int = 16, **options) -> VP:
    """After some steps and a fit."""
    options = {"queue_size": 500, "push_size": 64, "seed": 0, **options}
    quantizer = VP(dim, codebook_size, **options)
    for step in range(3):
        quantizer(normal(100, dim, seed=step))
    quantizer.fit()
    return quantizer


def power(quantizer: VP, latents: torch.Tensor) -> float:
    return (quantizer(latents).latents - latents).square().sum(-1).mean().item()


def outputs(quantizer: VP, steps: int = 3) -> list[torch.Tensor]:
    dim = quantizer.dim
    return [quantizer(normal(2, 30, dim, seed=100 + step)).latents for step in range(steps)]


def same_outputs(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def mixture(number: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    wide = rng.random((number, 1)) < 0.6
    z = rng.normal(size=(number, 2))
    return torch.from_numpy(np.where(wide, [-1, 0] + 0.7 * z, [1.2, 0.5] + 0.25 * z)).float()


def misfit(latents: torch.Tensor) -> float:
    """p-value of the chi-square test against the density of `mixture`."""
    edges = np.concatenate([[-np.inf], np.linspace(-2.5, 2, 19), [np.inf]])
    expected = 0
    for share, x, y, width in ((0.6, -1, 0, 0.7), (0.4, 1.2, 0.5, 0.25)):
        sides = [np.diff(norm.cdf(edges, center, width)) for center in (x, y)]
        expected = expected + share * np.outer(*sides)
    found = np.histogram2d(*latents.double().numpy().T, (edges, edges))[0].ravel()
    expected = expected.ravel() * len(latents)
    large = expected > 20
    found, expected = (
        np.append(values[large], values[~large].sum()) for values in (found, expected)
    )
    return chi2.sf(((found - expected) ** 2 / expected).sum(), len(expected) - 1)


@pytest.mark.slow
@pytest.mark.parametrize("codebook_size, search_size", [(16, None), (32, None), (32, 4096)])
def test_a_step_leaves_the_density_as_it_is(codebook_size, search_size):
    queue, latents = mixture(8192, seed=1), mixture(10_000, seed=11)
    options = {"search_size": search_size, "eta": 1.5}
    assert misfit(latents) > 0.01
    assert misfit(filled(queue, codebook_size, **options)(latents).latents) > 1e-3
    always = filled(queue, codebook_size, metropolis=False, **options)
    assert misfit(always(latents).latents) < 1e-9


def codebook_error(seen: torch.Tensor, other: torch.Tensor, codebook_size: int) -> float:
    """Mean squared error on `other` of a codebook made of `seen`, by scipy."""
    rng = np.random.default_rng(0)
    data = seen.double().numpy()
    pool = data[: 8 * codebook_size]
    codes, error = [pool[0]], np.inf
    for _ in range(codebook_size - 1):
        error = np.minimum(error, np.square(pool - codes[-1]).sum(1))
        codes.append(pool[rng.choice(len(pool), p=error / error.sum())])
    codes = kmeans2(data, np.array(codes), iter=20, minit="matrix")[0]
    return np.square(cKDTree(codes).query(other.double().numpy())[0]).mean()


@pytest.mark.slow
@pytest.mark.parametrize("law, codebook_size, dim", [(law, 256, 3) for law in LAWS])
def test_calibrated_noise_is_as_strong_as_the_error_of_a_codebook(law, codebook_size, dim):
    fresh = draw(law, 10_000, dim, seed=3)
    error = codebook_error(draw(law, 200 * codebook_size, dim, seed=1), fresh, codebook_size)
    quantizer = filled(draw(law, 64 * codebook_size, dim, seed=2), codebook_size, search_size=2048)
    found = quantizer.calibrate()
    assert quantizer.eta.item() == pytest.approx(found.eta)
    assert found.noise == pytest.approx(found.error, rel=0.01)
    assert power(quantizer, fresh) == pytest.approx(error, rel=0.1)
    if law == "normal":
        quantizer.eta.fill_(1.0)
        assert 0.3 < power(quantizer, fresh) / error < 0.75


@pytest.mark.slow
def test_calibrated_noise_is_as_strong_as_the_error_of_a_larger_codebook():
    test_calibrated_noise_is_as_strong_as_the_error_of_a_codebook("normal", 1024, 4)


def test_calibration_takes_a_known_error_and_leaves_queue_and_random_numbers_alone():
    quantizer = filled(draw("normal", 4096, 3), 64)
    before = copy.deepcopy(quantizer)
    found = quantizer.calibrate(error=0.15)
    assert found.error == 0.15 and not quantizer.fitted
    before.eta.fill_(found.eta)
    assert same_outputs(outputs(quantizer), outputs(before))
    assert power(quantizer, draw("normal", 10_000, 3, seed=1)) == pytest.approx(0.15, rel=0.1)


def test_an_error_out_of_reach_is_refused():
    quantizer = filled(draw("normal", 2000, 3), 64)
    with pytest.raises(ValueError, match="mh_steps"):
        quantizer.calibrate(error=100.0)


@pytest.mark.parametrize("codebook_size", [8, 32])
def test_noise_is_never_longer_than_the_radius(codebook_size):
    queue, latents = normal(512, 3), normal(20_000, 3, seed=1)
    quantizer = filled(queue, codebook_size, eta=1.3)
    order = 512 // codebook_size
    radius = 1.3 * cKDTree(queue).query(latents, [order])[0][:, 0]
    length = (quantizer(latents).latents - latents).norm(dim=-1).numpy()
    assert (length <= radius * (1 + 1e-3) + 1e-5).all()
    assert (length / radius).max() > 0.98


def test_rejected_tokens_pass_exactly_and_the_share_of_the_others_is_told():
    quantizer, latents = filled(normal(512, 3), 32), normal(5, 1000, 3, seed=1)
    out = quantizer(latents)
    moved = (out.latents != latents).any(-1)
    assert 0.3 < moved.float().mean().item() < 0.9
    assert out.stats["accepted"].item() == pytest.approx(moved.float().mean().item())
    noise = (out.latents - latents).square().sum(-1).mean().item()
    assert out.stats["noise"].item() == pytest.approx(noise, rel=1e-4)


def acceptance(z: np.ndarray, queue: np.ndarray, mass: float, eta: float, directions: int):
    """Acceptance probability (eq. 7, 8) of proposals over the disc around z, and their z'.

    (rings, angles); proposals are equally likely.
    """
    order = max(8, round(mass))

    def both(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        gaps = np.sort(np.sqrt(np.square(at[..., None, :] - queue).sum(-1)), -1)
        return gaps[..., 7], gaps[..., order - 1] * (mass / order) ** (1 / 2)

    near, far = both(z)
    share = (np.arange(60) + 0.5) / 60
    length = eta * far * np.sqrt(share)[:, None]
    angle = -np.pi + (np.arange(directions) + 0.5) / directions * 2 * np.pi
    there = z + length[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    near_there, far_there = both(there)
    chance = np.minimum(1, (near * far / (near_there * far_there)) ** 2)
    return np.where(length > eta * far_there, 0, chance), eta * far


@pytest.mark.parametrize("codebook_size, eta", [(4, 1.0), (4, 1.5), (32, 1.5)])
def test_acceptance_follows_equations_7_and_8(codebook_size, eta):
    rng = np.random.default_rng(3)
    queue = np.concatenate([rng.uniform(-1, 1, (32, 2)), rng.normal(0.5, 0.1, (32, 2))])
    number, rings, sectors, forbidden = 40_000, 4, 6, 0.0
    for z in np.array([[0.5, 0.5], [0.3, 0.4], [0.7, -0.2], [-0.8, -0.7], [0, 0], [2.0, 1.5]]):
        chance, radius = acceptance(z, queue, 64 / codebook_size, eta, 120)
        forbidden += (chance == 0).mean() / 6
        cells = chance.reshape(rings, 60 // rings, sectors, 120 // sectors).mean((1, 3))
        expected = np.append(cells.ravel() / cells.size, 1 - chance.mean()) * number
        quantizer = filled(torch.from_numpy(queue).float(), codebook_size, eta=eta)
        latents = torch.from_numpy(z).float().expand(number, 2)
        moved = (quantizer(latents).latents - latents).double().numpy()
        rejected = (moved == 0).all(1)
        x, y = moved[~rejected].T
        share, angle = (x**2 + y**2) / radius**2, np.arctan2(y, x)
        found = np.histogram2d(
            share, angle, (np.linspace(0, 1.0001, rings + 1), np.linspace(-np.pi, np.pi, 7))
        )[0]
        found = np.append(found.ravel(), rejected.sum())
        large = expected > 10
        found, expected = (
            np.append(values[large], values[~large].sum() + 1) for values in (found, expected)
        )
        assert abs(found - expected).max() / number < 0.01, z
        score = ((found - expected) ** 2 / expected).sum()
        assert chi2.sf(score, len(found) - 1) > 1e-4, z
    assert forbidden > 0.005


def test_more_steps_leave_fewer_tokens_alone():
    queue, latents = normal(1024, 3), normal(4000, 3, seed=1)
    alone = []
    for steps in (1, 2, 4):
        out = filled(queue, 64, mh_steps=steps)(latents).latents
        alone.append((out == latents).all(-1).float().mean().item())
    assert alone[0] > 1.5 * alone[1] > 1.5**2 * alone[2] > 0


def test_the_gradient_passes_the_perturbation_unchanged():
    latents, weights = normal(2, 100, 3).requires_grad_(), normal(2, 100, 3, seed=1)
    out = filled(normal(512, 3, seed=2), 32)(latents)
    assert not torch.equal(out.latents, latents)
    (out.latents * weights).sum().backward()
    assert torch.equal(latents.grad, weights)


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_follows_its_formula_and_its_gradient_reaches_the_latents(training):
    rng = np.random.default_rng(0)
    latents = rng.normal([0.3, -1, 0], [0.5, 1, 2], (4, 50, 3)).astype(np.float32)
    mean, variance = latents.mean((0, 1)), latents.var((0, 1))
    expected = 0.1 * (mean**2).mean() + 0.07 * ((variance - 1) ** 2).mean()
    tensor = torch.from_numpy(latents).requires_grad_()
    loss = fitted().train(training)(tensor).loss
    assert loss.item() == pytest.approx(expected, rel=1e-5) and loss.shape == ()
    loss.backward()
    slope = 0.2 * mean / 600 + 0.28 * (variance - 1) * (latents - mean) / 600
    np.testing.assert_allclose(tensor.grad, slope, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("apart", [0, 1e-6])
@pytest.mark.parametrize("at", [0.0, 1.5, 4.0])
def test_silence_gets_noise_of_the_size_of_a_cell(at, apart):
    latents = normal(20_000, 3)
    silent = torch.rand(20_000, generator=torch.Generator().manual_seed(1)) < 0.3
    latents[silent] = at + apart * (2 * normal(int(silent.sum()), 3, seed=2).sigmoid() - 1)
    quantizer = filled(latents[10_000:], 256, search_size=4096)
    noise = (quantizer(latents[:10_000]).latents - latents[:10_000]).square().sum(-1)
    quiet, other = (noise[mask].mean().sqrt() for mask in (silent[:10_000], ~silent[:10_000]))
    assert noise.isfinite().all() and quiet > other / 3


@pytest.mark.parametrize("value", [0.0, 0.7, -50.0])
@pytest.mark.parametrize("number", [1, 300])
def test_latents_that_are_all_equal_do_no_harm(value, number):
    quantizer = VP(3, 16, queue_size=500, seed=0)
    latents = torch.full((number, 3), value).requires_grad_()
    for _ in range(3):
        out = quantizer(latents)
        (out.latents.sum() + out.loss).backward()
        assert out.latents.isfinite().all() and latents.grad.isfinite().all()
        assert (out.latents - latents).abs().max() < 0.1


def test_the_first_call_needs_only_a_few_tokens():
    quantizer = VP(3, 256, queue_size=1000, push_size=10, seed=0)
    assert quantizer.filled == 0 and quantizer.recent().shape == (0, 3)
    out = quantizer(normal(3, 3))
    assert out.latents.shape == (3, 3) and out.latents.isfinite().all()
    assert quantizer(torch.zeros(2, 0, 3)).latents.shape == (2, 0, 3)


def test_filled_counts_the_latents_in_the_queue():
    quantizer = VP(3, 16, queue_size=100, push_size=30, seed=0)
    for expected in (30, 60, 90, 100, 100):
        quantizer(normal(50, 3))
        assert quantizer.filled == len(quantizer.recent()) == expected
    quantizer = VP(3, 16, queue_size=20, push_size=30, seed=0)
    quantizer(normal(50, 3))
    assert quantizer.filled == len(quantizer.recent()) == 20


@pytest.mark.parametrize("offset", [50.0, -50.0])
def test_noise_is_of_the_right_size_from_the_first_call_on(offset):
    latents = normal(3000, 3)
    near, far = (VP(3, 64, queue_size=60_000, push_size=500, eta=1, seed=0) for _ in range(2))
    for _ in range(2):
        expected, found = power(near, latents), power(far, latents + offset)
        assert found == pytest.approx(expected, rel=0.03)
        assert 0.05 < expected / 0.33 < 1
    assert abs(far.recent().mean().item() - offset) < 0.2


def test_the_oldest_latents_leave_first_and_recent_is_oldest_first():
    quantizer = VP(2, 4, queue_size=10, push_size=4, seed=0)
    pushed = []
    for step in range(12):
        latents = step + torch.rand(9, 2, generator=torch.Generator().manual_seed(step))
        quantizer.push(latents)
        pushed += [step] * 4
        assert quantizer.recent()[:, 0].floor().tolist() == pushed[-10:]
        for number in range(1, 13):
            tail = quantizer.recent()[-number:]
            assert torch.equal(quantizer.recent(number), tail)
        assert quantizer.recent(0).shape == (0, 2)


def test_a_push_takes_a_random_sample_of_the_latents():
    quantizer = VP(1, 4, queue_size=1000, push_size=200, seed=0)
    latents = torch.arange(1000.0)[:, None]
    samples = []
    for _ in range(2):
        quantizer.push(latents)
        samples.append(set(quantizer.recent(200).flatten().tolist()))
    assert all(len(sample) == 200 and sample <= set(range(1000)) for sample in samples)
    assert 10 < len(samples[0] & samples[1]) < 80
    assert 400 < sum(samples[0]) / 200 < 600


def through_state(quantizer: VP) -> VP:
    other = VP(3, 16, queue_size=500, push_size=64, seed=1)
    other.load_state_dict(quantizer.state_dict())
    return other


def through_a_used_one(quantizer: VP) -> VP:
    other = fitted(seed=7)
    other.load_state_dict(copy.deepcopy(quantizer.state_dict()))
    return other


def through_safetensors(quantizer: VP) -> VP:
    safetensors = pytest.importorskip("safetensors.torch", reason="needs the train extra")
    other = VP(3, 16, queue_size=500, push_size=64, seed=1)
    other.load_state_dict(safetensors.load(safetensors.save(quantizer.state_dict())))
    return other


def through_a_file(quantizer: VP) -> VP:
    file = io.BytesIO()
    torch.save(quantizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "way", [through_state, through_a_used_one, through_safetensors, through_a_file, copy.deepcopy]
)
@pytest.mark.parametrize("calls", [0, 3, 20])
def test_a_copy_goes_on_as_the_original_does(way, calls):
    quantizer = VP(3, 16, queue_size=500, push_size=64, seed=0)
    for step in range(calls):
        quantizer(normal(100, 3, seed=step))
    if calls:
        quantizer.fit()
        quantizer.eta.fill_(1.23)
    other = way(quantizer)
    assert other.filled == quantizer.filled and other.fitted == quantizer.fitted
    assert other.eta.item() == quantizer.eta.item()
    assert same_outputs(outputs(other), outputs(quantizer))
    assert torch.equal(other.recent(), quantizer.recent())
    if calls:
        assert torch.equal(other.encode(normal(50, 3)), quantizer.encode(normal(50, 3)))


def in_another_process(quantizer: VP) -> list[np.ndarray]:
    return [out.numpy() for out in outputs(quantizer)]


@pytest.mark.slow
def test_a_spawned_process_goes_on_as_the_original_does():
    quantizer = fitted()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply_async(in_another_process, (quantizer,)).get(timeout=120)
    assert same_outputs([torch.from_numpy(out) for out in there], outputs(quantizer))


def test_calibration_takes_more_steps_only_where_no_eta_is_enough():
    quantizer = filled(normal(4000, 3), 128)
    plain = quantizer.calibrate()
    assert plain.mh_steps == quantizer.mh_steps == 1
    found = quantizer.calibrate(error=4 * plain.error)
    assert found.mh_steps == quantizer.mh_steps > 1 and found.eta <= 3
    assert found.noise == pytest.approx(4 * plain.error, rel=0.01)
    other = VP(3, 128, queue_size=quantizer.queue_size)
    other.load_state_dict(quantizer.state_dict())
    assert other.mh_steps == found.mh_steps and other.eta == quantizer.eta
    assert quantizer.calibrate(error=plain.error).mh_steps == 1


def test_random_numbers_follow_the_seed():
    outs = [outputs(VP(3, 16, queue_size=500, seed=seed)) for seed in (1, 1, 2)]
    assert same_outputs(*outs[:2]) and not same_outputs(*outs[1:])
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(outputs(VP(3, 16, queue_size=500)))
    assert same_outputs(*outs[:2]) and not same_outputs(*outs[1:])
    quantizer = filled(normal(500, 3), 16)
    latents = normal(100, 3, seed=1)
    assert not torch.equal(quantizer(latents).latents, quantizer(latents).latents)


def test_without_the_training_state_the_tokens_are_the_same():
    quantizer, latents = fitted().eval(), normal(200, 3)
    state = quantizer.state_dict()
    stored = {name: state[name] for name in state if name not in quantizer.training_state}
    assert set(stored) == {"codebook"}
    other = VP(3, 16, queue_size=500).eval()
    other.load_state_dict(stored)
    assert torch.equal(other(latents).tokens, quantizer(latents).tokens)
    assert torch.equal(other(latents).latents, quantizer(latents).latents)
    other.train()(latents)


@pytest.mark.parametrize(
    "dim, codebook_size, queue_size", [(3, 8, 500), (3, 16, 400), (2, 16, 500)]
)
def test_tables_of_another_size_are_refused(dim, codebook_size, queue_size):
    other = VP(dim, codebook_size, queue_size=queue_size)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(fitted().state_dict())


def test_a_state_without_its_codebook_is_refused():
    state = fitted().state_dict()
    del state["codebook"]
    with pytest.raises(RuntimeError, match="codebook"):
        fitted().load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_the_module_changes_no_token(dtype):
    quantizer, latents = fitted().eval(), normal(500, 3)
    tokens, codebook = quantizer.encode(latents), quantizer.codebook.clone()
    assert torch.equal(quantizer.to(dtype).encode(latents), tokens)
    assert torch.equal(torch.nn.Sequential(quantizer).half()[0].encode(latents), tokens)
    assert torch.equal(quantizer.codebook, codebook)
    assert {buffer.dtype for buffer in quantizer.buffers()} == {torch.float32}


class Coder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(4, 3)
        self.quantizer = VP(3, 16, queue_size=500, push_size=32)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.quantizer(self.project(x))
        return out.latents, out.loss


def found_by(rank: int) -> dict:
    found = {}
    quantizer = VP(3, 16, queue_size=500, push_size=32, seed=5)
    if rank == 0:
        copy.deepcopy(quantizer).eval().train()
    for step in range(10):
        quantizer(10 * rank - 5 + normal(100, 3, seed=2 * step + rank))
    found["queue"], found["filled"] = quantizer.recent(), quantizer.filled
    quantizer.fit()
    found["codebook"] = quantizer.codebook
    if rank == 0:
        found["alone"] = quantizer.eval()(normal(50, 3)).loss.item()
        quantizer.train()
    found["perturbed"] = quantizer(normal(300, 3)).latents
    quantizer.calibrate(error=0.5)
    found["eta"] = quantizer.eta.item()

    weight, data = group_batch(rank)
    loss = quantizer(data * weight + 0.3).loss
    loss.backward()
    dist.all_reduce(weight.grad)
    found["loss"], found["gradient"] = loss.item(), weight.grad / 2

    torch.manual_seed(0)
    model = DistributedDataParallel(Coder())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        latents, loss = model(normal(60, 4, seed=10 * step + rank))
        (latents.square().mean() + loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    found["weight"] = model.module.project.weight.detach()
    found["wrapped queue"] = model.module.quantizer.recent()
    return found


def group_batch(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
    return weight, normal(100 + 60 * rank, 3, seed=rank) + rank


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """What each of two processes found."""
    return in_two_processes(found_by, tmp_path_factory.mktemp("group"))


@pytest.mark.slow
def test_processes_share_one_queue_of_the_latents_of_all(group):
    one, other = group
    assert one["filled"] == other["filled"] == 500
    assert torch.equal(one["queue"], other["queue"])
    assert (one["queue"].mean(1) > 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert len(torch.unique(one["queue"], dim=0)) == 500


@pytest.mark.slow
def test_processes_perturb_differently(group):
    one, other = (found["perturbed"] - normal(300, 3) for found in group)
    both = (one != 0).any(1) & (other != 0).any(1)
    assert both.any() and (one[both] != other[both]).any(1).all()


@pytest.mark.slow
def test_processes_make_the_same_codebook_and_calibrate_alike(group):
    assert torch.equal(group[0]["codebook"], group[1]["codebook"])
    assert group[0]["eta"] == group[1]["eta"] != 1.5


@pytest.mark.slow
def test_distributed_data_parallel_trains_one_model_with_one_queue(group):
    assert torch.equal(group[0]["weight"], group[1]["weight"])
    assert torch.equal(group[0]["wrapped queue"], group[1]["wrapped queue"])
    assert len(group[0]["wrapped queue"]) == 3 * 2 * 32


@pytest.mark.slow
def test_the_loss_and_its_gradient_are_those_of_the_joined_batch(group):
    weight, data = group_batch(0)
    joined = torch.cat([data, group_batch(1)[1]])
    loss = VP(3, 16, queue_size=500)(joined * weight + 0.3).loss
    loss.backward()
    for found in group:
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
        torch.testing.assert_close(found["gradient"], weight.grad)


def test_fit_is_repeatable_by_seed():
    quantizer, latents = VP(3, 32), normal(2000, 3)
    books = []
    for seed in (1, 1, 2):
        quantizer.fit(latents, seed=seed)
        books.append(quantizer.codebook)
    assert torch.equal(books[0], books[1]) and not torch.equal(books[1], books[2])
    assert books[0].shape == (32, 3) and books[0].dtype == torch.float32


def test_fit_takes_latents_of_any_shape_batches_or_the_queue():
    quantizer, latents = filled(normal(400, 3), 8), normal(20, 20, 3)
    plain = quantizer.fit(latents)
    assert torch.equal(plain.centroids, quantizer.codebook)
    assert torch.equal(quantizer.fit(latents.reshape(-1, 3)).centroids, plain.centroids)
    quantizer.fit(list(latents))
    assert quantizer.codebook.shape == (8, 3)
    own = quantizer.fit().centroids
    assert torch.equal(own, quantizer.fit(quantizer.recent()).centroids)


@pytest.mark.parametrize("law", ["normal", "silence"])
def test_fit_is_as_good_as_other_k_means(law):
    seen, fresh = draw(law, 12_800, 3, seed=1), draw(law, 10_000, 3, seed=2)
    quantizer = VP(3, 64).eval()
    quantizer.fit(seen, max_iterations=30)
    error = (quantizer(fresh).latents - fresh).square().sum(1).mean().item()
    assert error < 1.03 * codebook_error(seen, fresh, 64)


@pytest.mark.parametrize("method", ["forward", "encode", "latents_to_tokens"])
def test_tokens_before_the_fit_are_refused(method):
    with pytest.raises(NoCodebookError, match=r"VP.*fit"):
        getattr(VP(3, 16).eval(), method)(normal(5, 3))
    with pytest.raises(NoCodebookError, match=r"VP.*fit"):
        VP(3, 16).tokens_to_latents(torch.zeros(5, dtype=torch.int64))


def test_training_does_without_a_codebook_until_tokens_are_asked_for():
    out = VP(3, 16, queue_size=500)(normal(50, 3))
    with pytest.raises(NoCodebookError, match="fit"):
        _ = out.tokens


def test_eval_itself_does_nothing(monkeypatch):
    quantizer, unfitted = fitted(), VP(3, 16, queue_size=500)
    unfitted(normal(500, 3))
    monkeypatch.setattr(vp, "kmeans", lambda *args, **kwargs: pytest.fail("clustered"))
    for module in (quantizer, unfitted):
        before = copy.deepcopy(module.state_dict())
        after = module.eval().state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(normal(500, 3))
    assert all(torch.equal(before[name], quantizer.state_dict()[name]) for name in before)


@pytest.fixture(scope="module", params=[256, 4096])
def codec(request) -> VP:
    quantizer = VP(4, request.param).eval()
    quantizer.fit(draw("silence", 2 * request.param, 4), max_iterations=2)
    return quantizer


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_every_token_survives_the_way_to_codes_and_back(codec, dtype):
    tokens = torch.arange(codec.codebook_size)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        codes = codec.tokens_to_latents(tokens.reshape(2, -1))
        assert torch.equal(codec.latents_to_tokens(codes), tokens.reshape(2, -1))
        assert torch.equal(codec.encode(codes), tokens.reshape(2, -1))
        out = codec(codes)
    assert torch.equal(out.tokens, tokens.reshape(2, -1)) and torch.equal(out.latents, codes)
    assert len(torch.unique(codes.flatten(0, 1), dim=0)) == len(tokens)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_encode_finds_the_nearest_code(codec, dtype):
    latents = draw("silence", 5000, 4, seed=5)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        tokens = codec.encode(latents)
    codes = codec.codebook.double().numpy()
    nearest = cKDTree(codes).query(latents.double().numpy())[0]
    found = np.linalg.norm(codes[tokens] - latents.double().numpy(), axis=1)
    np.testing.assert_allclose(found, nearest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_results_are_int64_and_float32_whatever_comes_in(dtype, training):
    quantizer = fitted().train(training)
    latents = normal(2, 50, 3).to(dtype)
    expected = quantizer.encode(latents.float())
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(latents)
        codes = quantizer.tokens_to_latents(out.tokens.int())
    assert out.tokens.dtype == quantizer.latents_to_tokens(codes).dtype == torch.int64
    assert out.latents.dtype == out.loss.dtype == codes.dtype == torch.float32
    assert out.latents.shape == (2, 50, 3) and out.loss.shape == ()
    assert torch.equal(out.tokens, expected)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"dim": 0}, "dim.*0"),
        ({"dim": -2}, "dim.*-2"),
        ({"codebook_size": 0}, "codebook_size.*0"),
        ({"eta": 0.0}, "eta.*0"),
        ({"eta": -1.5}, "eta.*-1.5"),
        ({"eta": math.nan}, "eta.*nan"),
        ({"eta": math.inf}, "eta.*inf"),
        ({"mh_steps": 0}, "mh_steps.*0"),
        ({"mh_steps": 1.5}, "mh_steps.*1.5"),
        ({"neighbors": 0}, "neighbors.*0"),
        ({"search_size": 0}, "search_size.*0"),
        ({"queue_size": 0}, "queue_size.*0"),
        ({"push_size": 0}, "push_size.*0"),
    ],
)
def test_wrong_settings_are_refused_and_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        VP(**arguments)


@pytest.mark.parametrize(
    "latents, named",
    [
        (torch.zeros(2, 4), "3.*4"),
        (torch.zeros(2, 1), "3.*1"),
        (torch.tensor(0.0), "3.*none"),
        (torch.zeros(2, 3, dtype=torch.int64), "int64"),
        (torch.tensor([[0, math.nan, 0]]), "nan"),
        (torch.tensor([[0, 0, -math.inf]]), "-inf"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", ["forward", "encode", "latents_to_tokens", "fit", "calibrate"])
def test_wrong_latents_are_refused_and_named(method, training, latents, named):
    quantizer = fitted().train(training)
    before = copy.deepcopy(quantizer.state_dict())
    with pytest.raises(ValueError, match=named):
        getattr(quantizer, method)(latents)
    assert all(torch.equal(before[name], quantizer.state_dict()[name]) for name in before)


@pytest.mark.parametrize(
    "tokens, named",
    [
        (torch.tensor([[0, -1]]), "-1"),
        (torch.tensor([16, 0]), "16"),
        (torch.tensor([0.0]), "float32"),
        (torch.tensor([True]), "bool"),
    ],
)
def test_wrong_tokens_are_refused_and_named(tokens, named):
    with pytest.raises(ValueError, match=named):
        fitted().tokens_to_latents(tokens)


@pytest.mark.parametrize(
    "latents, named",
    [
        (normal(15, 3), "15.*16"),
        ([normal(5, 3), normal(10, 3)], "15.*16"),
        (normal(15, 3).repeat(10, 1), "15.*16"),
        (torch.zeros(100, 3), "1.*16"),
        (None, "0.*16"),
        ([normal(50, 2)], "3.*2"),
        ([torch.full((50, 3), math.nan)], "nan"),
    ],
)
def test_latents_that_make_no_codebook_are_refused(latents, named):
    quantizer = VP(3, 16)
    with pytest.raises(ValueError, match=named):
        quantizer.fit(latents)
    assert not quantizer.fitted


def test_as_many_different_latents_as_codes_are_enough():
    quantizer, latents = VP(3, 16), normal(16, 3)
    quantizer.fit(latents.repeat(10, 1))
    torch.testing.assert_close(quantizer.eval()(latents).latents, latents)
    assert len(quantizer.encode(latents).unique()) == 16
