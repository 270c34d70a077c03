from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from groups import in_two_processes
from safetensors.torch import load_file, save_file
from scipy import stats

from vpcodec.quantizers import (
    FSP,
    FSQ,
    LFQ,
    VP,
    VQ,
    CodebookUsage,
    NoCodebookError,
    Quantizer,
    SimVQ,
)
from vpcodec.quantizers.fsp import TARGET_VARIANCE

SPEECH_3K = (9, 9, 9, 7, 7, 7)
SPEECH_1K = (7,) * 6
LEVELS = (SPEECH_3K, SPEECH_1K, (8, 6, 5), (8, 5, 5, 5), (7, 5, 5, 5, 5), (8, 8, 8, 6, 5))
LAWS = {
    "tanh": stats.logistic(scale=0.5),
    "normal": stats.norm(),
    "sigmoid": stats.logistic(),
    "laplace": stats.laplace(),
}
ACTIVATIONS = tuple(LAWS)
SCALE = math.sqrt(12)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((), (7,), (2, 5), (2, 3, 4))

BUILD: dict[str, Callable[[], Quantizer]] = {
    **{f"FSP{levels}": functools.partial(FSP, levels) for levels in LEVELS},
    **{f"FSP-{name}": functools.partial(FSP, (8, 6, 5), activation=name) for name in ACTIVATIONS},
    **{f"FSQ{levels}": functools.partial(FSQ, levels) for levels in LEVELS},
    **{f"LFQ-{dim}": functools.partial(LFQ, dim) for dim in (8, 12, 14)},
    **{f"VQ-{size}": functools.partial(VQ, 5, size, seed=0) for size in (256, 1024)},
    **{f"SimVQ-{size}": functools.partial(SimVQ, 5, size) for size in (256, 1024)},
    **{f"VP-{size}": functools.partial(VP, 5, size, seed=0) for size in (256, 1024)},
}
WITH_STATE = ("VQ-256", "VP-256")
every_quantizer = pytest.mark.parametrize("name", BUILD)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def build(name: str) -> Quantizer:
    """A new one, without a codebook where training makes it."""
    if name.startswith("SimVQ"):
        pytest.importorskip("vector_quantize_pytorch", reason="needs vector-quantize-pytorch")
    return BUILD[name]()


@functools.cache
def ready(name: str) -> Quantizer:
    torch.manual_seed(1)
    quantizer = build(name)
    if isinstance(quantizer, VQ):
        for _ in range(4):
            quantizer.train()(latents_for(quantizer, 4 * quantizer.codebook_size))
    if quantizer.fit_after_training:
        latents = latents_for(quantizer, 8 * quantizer.codebook_size)
        quantizer.train()(latents)
        quantizer.fit(latents, max_iterations=10)
    return quantizer


def make(name: str) -> Quantizer:
    """One that has its codebook, in eval."""
    return copy.deepcopy(ready(name)).eval()


def latents_for(quantizer: Quantizer, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, quantizer.dim) * quantizer.latent_std


def autocasts() -> list[torch.autocast | nullcontext]:
    return [nullcontext(), *(torch.autocast("cpu", dtype) for dtype in DTYPES[2:])]


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def unsquash(z: torch.Tensor, activation: str) -> torch.Tensor:
    """The pre-activations, float32, that the activation squashes to z."""
    return torch.from_numpy(LAWS[activation].ppf(z.double().numpy())).float()


def uniform(n: int, levels: tuple[int, ...], activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform z (n, D) and the pre-activations that give it."""
    torch.manual_seed(0)
    z = torch.rand(n, len(levels), dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    return z.float(), unsquash(z, activation)


def evenly(n: int, activation: str = "tanh") -> tuple[torch.Tensor, torch.Tensor]:
    """The middles (n, 1) of n cells of [0, 1] and the pre-activations that give them."""
    z = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    return z, unsquash(z, activation)


def perturb(quantizer: FSP, z: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One training pass: (perturbation of z, which scalars were perturbed)."""
    delta = quantizer.train()(a).latents / SCALE + 0.5 - z
    return delta, delta.abs() > 2e-6


def nearest_exactly(latents: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """(N, K) squared distances in float64."""
    return torch.stack(
        [(row - codes.double()).square().sum(-1) for row in latents.detach().double()]
    )


@every_quantizer
def test_training_may_ask_every_quantizer_for_the_same(name):
    """Calibrate, forget, fit: those that have nothing to do keep codes and latents as they are."""
    quantizer, plain = make(name).train(), make(name)
    latents = latents_for(quantizer, 16 * min(quantizer.codebook_size, 256))
    if not quantizer.fit_after_training:
        assert quantizer.calibrate(latents) is None
        assert quantizer.fit(latents) is None
        quantizer.forget_codebook()
        assert torch.equal(quantizer.eval()(latents).latents, plain(latents).latents)
        return
    error = (plain(latents).latents - latents).square().sum(1).mean().item()
    assert quantizer.calibrate(latents, error=error).noise == pytest.approx(error, rel=0.1)
    quantizer.forget_codebook()
    assert not quantizer.fitted
    with pytest.raises(NoCodebookError):
        quantizer.encode(latents)
    assert quantizer.fit(latents, max_iterations=3).error > 0 and quantizer.fitted


def test_a_codebook_that_training_makes_cannot_be_fitted():
    quantizer = VQ(3, 64)
    with pytest.raises(NoCodebookError, match="training makes it"):
        quantizer.fit(torch.randn(1000, 3))


@every_quantizer
def test_every_token_survives_the_way_to_codes_and_back(name):
    quantizer = make(name)
    tokens = torch.arange(quantizer.codebook_size)
    codes = quantizer.tokens_to_latents(tokens)
    assert len(torch.unique(codes, dim=0)) == quantizer.codebook_size
    for autocast in autocasts():
        with autocast:
            assert torch.equal(quantizer.tokens_to_latents(tokens), codes)
            assert torch.equal(quantizer.latents_to_tokens(codes), tokens)
    shaped = tokens[:24].reshape(2, 3, 4)
    assert torch.equal(quantizer.tokens_to_latents(shaped), codes[:24].reshape(2, 3, 4, -1))
    assert torch.equal(quantizer.tokens_to_latents(tokens[5]), codes[5])
    for dtype in (torch.int32, torch.int16, torch.uint8):
        few = tokens[:200].to(dtype)
        assert torch.equal(quantizer.tokens_to_latents(few), codes[:200])


@every_quantizer
def test_autocast_changes_no_token(name):
    quantizer = make(name)
    a = latents_for(quantizer, 4, 500)
    plain = quantizer.encode(a)
    for autocast in autocasts()[1:]:
        with autocast:
            assert torch.equal(quantizer.encode(a), plain)
            assert torch.equal(quantizer(a).tokens, plain)
            low = a.to(autocast.fast_dtype)
            assert torch.equal(quantizer(low).tokens, quantizer.encode(low.float()))


@every_quantizer
def test_autocast_changes_nothing_in_training(name):
    first, second = make(name).train(), make(name).train()
    a = latents_for(first, 4, 100)
    for autocast in autocasts()[1:]:
        torch.manual_seed(3)
        plain = first(a)
        with autocast:
            torch.manual_seed(3)
            out = second(a)
            assert torch.equal(out.tokens, plain.tokens)
        assert torch.equal(out.latents, plain.latents) and torch.equal(out.loss, plain.loss)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])


@every_quantizer
@pytest.mark.parametrize("training", [True, False])
def test_results_are_int64_and_float32_whatever_comes_in(name, training):
    original = make(name)
    tokens = torch.arange(min(original.codebook_size, 5000))
    codes = original.tokens_to_latents(tokens)
    for dtype in DTYPES:
        quantizer = torch.nn.Sequential(make(name)).to(dtype)[0].train(training)
        assert torch.equal(quantizer.tokens_to_latents(tokens), codes)
        for autocast in autocasts():
            with autocast:
                out = quantizer(torch.zeros(2, 5, quantizer.dim, dtype=dtype))
                again = quantizer.encode(out.latents.to(dtype))
                assert out.tokens.dtype == again.dtype == torch.int64
                assert quantizer.latents_to_tokens(out.latents.to(dtype)).dtype == torch.int64
                found = quantizer.tokens_to_latents(out.tokens.int())
                assert out.latents.dtype == out.loss.dtype == found.dtype == torch.float32
        assert out.latents.shape == (2, 5, quantizer.dim)
        assert out.tokens.shape == (2, 5) and out.loss.shape == ()


@every_quantizer
def test_eval_gives_the_codes_of_its_tokens_and_repeats_itself(name):
    quantizer = make(name)
    a = latents_for(quantizer, 3, 400)
    first, second = quantizer(a), quantizer(a)
    assert torch.equal(first.latents, second.latents)
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.latents, quantizer.tokens_to_latents(first.tokens))
    assert torch.equal(first.tokens, quantizer.encode(a))
    assert torch.equal(first.tokens, quantizer.latents_to_tokens(first.latents))
    assert len(torch.unique(first.tokens)) > 50


@every_quantizer
@pytest.mark.parametrize("shape", SHAPES)
def test_leading_dimensions_are_kept(name, shape):
    quantizer = make(name)
    a = latents_for(quantizer, *shape)
    flat = quantizer.encode(a.reshape(-1, quantizer.dim))
    assert torch.equal(quantizer.encode(a), flat.reshape(shape))
    for training in (True, False):
        out = quantizer.train(training)(a)
        assert out.latents.shape == a.shape and out.tokens.shape == shape
        assert out.latents.isfinite().all() and out.loss.isfinite()
        assert torch.equal(out.tokens.reshape(-1), flat)


@every_quantizer
def test_the_gradient_reaches_the_latents(name):
    for a in (latents_for(ready(name), 2, 60), torch.zeros(2, 60, ready(name).dim)):
        a.requires_grad_()
        out = make(name).train()(a)
        (out.latents * torch.randn_like(a)).sum().backward()
        assert a.grad.isfinite().all()
        assert (a.grad.abs().sum(-1) > 0).float().mean() > 0.9


@every_quantizer
def test_no_latents_give_no_tokens(name):
    quantizer = make(name)
    for shape in ((0,), (2, 0)):
        out = quantizer(torch.zeros(*shape, quantizer.dim))
        assert out.latents.shape == (*shape, quantizer.dim) and out.latents.dtype == torch.float32
        assert out.tokens.shape == shape and out.tokens.dtype == torch.int64
        assert quantizer.encode(torch.zeros(*shape, quantizer.dim)).shape == shape
        codes = quantizer.tokens_to_latents(out.tokens)
        assert quantizer.latents_to_tokens(codes).shape == shape


@every_quantizer
def test_a_stored_quantizer_is_the_same(name, tmp_path):
    quantizer = make(name)
    save_file(quantizer.state_dict(), tmp_path / "all.safetensors")
    loaded = build(name).eval()
    loaded.load_state_dict(load_file(tmp_path / "all.safetensors"))
    a = latents_for(quantizer, 500)
    assert torch.equal(loaded.encode(a), quantizer.encode(a))
    assert torch.equal(loaded(a).latents, quantizer(a).latents)
    torch.manual_seed(2)
    first = quantizer.train()(a)
    torch.manual_seed(2)
    second = loaded.train()(a)
    assert torch.equal(first.latents, second.latents) and torch.equal(first.loss, second.loss)
    for key, value in quantizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


@every_quantizer
def test_tokens_need_no_training_state(name, tmp_path):
    quantizer = make(name)
    state = {k: v for k, v in quantizer.state_dict().items() if k not in quantizer.training_state}
    save_file({f"0.{key}": value for key, value in state.items()}, tmp_path / "some.safetensors")
    loaded = torch.nn.Sequential(build(name)).eval()
    loaded.load_state_dict(load_file(tmp_path / "some.safetensors"))
    a = latents_for(quantizer, 500)
    assert torch.equal(loaded[0].encode(a), quantizer.encode(a))
    assert torch.equal(loaded(a).latents, quantizer(a).latents)


@pytest.mark.parametrize("name", WITH_STATE)
def test_training_goes_on_without_the_training_state(name):
    quantizer = make(name)
    state = {k: v for k, v in quantizer.state_dict().items() if k not in quantizer.training_state}
    loaded = build(name)
    loaded.load_state_dict(state)
    for _ in range(3):
        out = loaded.train()(latents_for(loaded, 4, 300))
        assert out.latents.isfinite().all()
    assert (out.tokens < loaded.codebook_size).all()


@pytest.mark.parametrize("name", WITH_STATE)
def test_an_empty_state_empties_a_quantizer(name):
    quantizer = make(name)
    quantizer.load_state_dict(build(name).state_dict())
    with pytest.raises(NoCodebookError):
        quantizer.encode(torch.zeros(1, quantizer.dim))


@every_quantizer
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_copies_do_as_the_original(name, copied):
    quantizer = make(name)
    other = copied(quantizer)
    a = latents_for(quantizer, 200)
    assert torch.equal(other(a).latents, quantizer(a).latents)
    torch.manual_seed(2)
    first = quantizer.train()(a).latents
    torch.manual_seed(2)
    assert torch.equal(other.train()(a).latents, first)


@every_quantizer
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_latents_that_are_not_finite_are_refused(name, bad):
    quantizer = make(name)
    a = latents_for(quantizer, 2, 5)
    a[1, 3, -1] = bad
    for call in (quantizer.train(), quantizer.eval(), quantizer.encode):
        with pytest.raises(ValueError, match=f"{bad}"):
            call(a)
    with pytest.raises(ValueError, match=f"{bad}"):
        quantizer.latents_to_tokens(a)


@every_quantizer
def test_latents_of_another_width_or_type_are_refused(name):
    quantizer = make(name)
    for training in (True, False):
        quantizer.train(training)
        for call in (quantizer, quantizer.encode, quantizer.latents_to_tokens):
            for width in (1, quantizer.dim + 1):
                with pytest.raises(ValueError, match=rf"{quantizer.dim}.*{width}"):
                    call(torch.zeros(2, 3, width))
            with pytest.raises(ValueError, match=f"{quantizer.dim}"):
                call(torch.tensor(1.0))
            for dtype in (torch.int64, torch.bool):
                with pytest.raises(ValueError, match=f"{dtype}"):
                    call(torch.zeros(2, quantizer.dim, dtype=dtype))


@every_quantizer
def test_tokens_out_of_range_or_of_another_type_are_refused(name):
    quantizer = make(name)
    for bad in (-1, quantizer.codebook_size, 2**40):
        with pytest.raises(ValueError, match=f"token {bad} "):
            quantizer.tokens_to_latents(torch.tensor([[0, 1], [bad, 2]]))
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=f"{dtype}"):
            quantizer.tokens_to_latents(torch.zeros(3).to(dtype))


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"levels": [9, 1]}, r"\[9, 1\]"),
        ({"levels": [9, -3]}, "-3"),
        ({"levels": [9, 2.5]}, "2.5"),
        ({"levels": []}, r"\[\]"),
        ({"levels": [9] * 20}, str(9**20)),
        ({"activation": "relu"}, "relu"),
        ({"rejection": "scalar"}, "scalar"),
        ({"eta": 0}, "0"),
        ({"eta": -1}, "-1"),
        ({"eta": 2.5}, "2.5"),
        ({"eta": math.nan}, "nan"),
        ({"quantize_rate": 1.25}, "1.25"),
        ({"quantize_rate": -0.5}, "-0.5"),
        ({"quantize_rate": math.nan}, "nan"),
    ],
)
def test_wrong_settings_are_refused_and_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        FSP(**arguments)


@pytest.mark.parametrize(
    "kind, arguments, named",
    [
        (FSQ, {"levels": [5, 1]}, r"\[5, 1\]"),
        (FSQ, {"noise_rate": 1.5}, "1.5"),
        (LFQ, {"dim": 0}, "0"),
        (LFQ, {"dim": 25}, "25"),
        (LFQ, {"temperature": 0}, "0"),
        (LFQ, {"temperature": math.nan}, "nan"),
        (VQ, {"codebook_size": 0}, "0"),
        (VQ, {"dim": -1}, "-1"),
        (VQ, {"decay": 1.5}, "1.5"),
        (VQ, {"commitment": -1}, "-1"),
        (VQ, {"commitment": math.nan}, "nan"),
        (VQ, {"restart_below": -0.1}, "-0.1"),
        (SimVQ, {"codebook_size": 0}, "0"),
        (SimVQ, {"dim": 2.5}, "2.5"),
        (VP, {"codebook_size": 2.5}, "2.5"),
    ],
)
def test_wrong_settings_of_the_others_are_refused_and_named(kind, arguments, named):
    if kind is SimVQ:
        pytest.importorskip("vector_quantize_pytorch", reason="needs vector-quantize-pytorch")
    with pytest.raises(ValueError, match=named):
        kind(**arguments)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("levels", [SPEECH_3K, SPEECH_1K])
def test_every_token_survives_the_way_through_the_activation(levels, activation):
    quantizer = FSP(levels, activation=activation).eval()
    tokens = torch.arange(quantizer.codebook_size)
    a = unsquash(quantizer.tokens_to_latents(tokens) / SCALE + 0.5, activation)
    assert torch.equal(quantizer.encode(a), tokens)
    with bf16():
        assert torch.equal(quantizer.encode(a), tokens)
        assert torch.equal(quantizer(a).tokens, tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", LEVELS)
def test_codes_in_half_precision_still_give_their_tokens(levels, dtype):
    for quantizer in (FSP(levels), FSQ(levels)):
        tokens = torch.arange(quantizer.codebook_size)
        codes = quantizer.tokens_to_latents(tokens).to(dtype)
        assert torch.equal(quantizer.latents_to_tokens(codes), tokens)


@pytest.mark.parametrize("kind, edge", [(FSP, 0.5), (FSQ, 0)])
@pytest.mark.parametrize("levels", [SPEECH_3K, (2, 3, 4), (8,)])
def test_codes_lie_where_they_should(levels, kind, edge):
    quantizer = kind(levels)
    tokens = np.arange(quantizer.codebook_size)
    digits = np.stack(np.unravel_index(tokens, levels, order="F"), -1)
    expected = ((digits + edge) / (np.array(levels) - 1 + 2 * edge) - 0.5) * SCALE
    codes = quantizer.tokens_to_latents(torch.from_numpy(tokens)).numpy()
    np.testing.assert_allclose(codes, expected, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_latents_of_the_right_law_come_out_uniform(activation):
    law = LAWS[activation]
    assert TARGET_VARIANCE[activation] == pytest.approx(law.var(), rel=1e-12)
    assert FSP((5,), activation=activation).latent_std == pytest.approx(law.std(), rel=1e-12)
    fine = FSP((1000,), activation=activation).eval()
    assert torch.equal(fine.encode(evenly(1000, activation)[1]), torch.arange(1000))
    drawn = torch.from_numpy(law.rvs(400_000, random_state=0)).float()[:, None]
    z = FSP((5,), activation=activation, quantize_rate=0)(drawn).latents / SCALE + 0.5
    counts = torch.histc(z, 20, 0, 1)
    assert (counts / 20_000).tolist() == pytest.approx([1] * 20, abs=0.02)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_eval_quantizes_to_the_nearest_code(activation):
    quantizer = FSP(SPEECH_3K, activation=activation).eval()
    z, a = uniform(5000, SPEECH_3K, activation)
    half_cell = SCALE / 2 / torch.tensor(SPEECH_3K)
    assert ((quantizer(a).latents - (z - 0.5) * SCALE).abs() <= half_cell + 1e-5).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_latents_far_out_fall_into_the_outer_cells(activation):
    quantizer = FSP((5, 5), activation=activation).eval()
    for far in (50.0, 1e30):
        assert quantizer.encode(torch.tensor([[-far, -far], [far, far]])).tolist() == [0, 24]


@pytest.mark.parametrize("rejection", ["vector", "dimension"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_stays_in_range_and_within_half_a_cell(activation, rejection):
    z, a = uniform(50_000, SPEECH_3K, activation)
    out = FSP(SPEECH_3K, activation=activation, rejection=rejection)(a)
    assert out.latents.abs().max() <= math.sqrt(3) + 1e-5
    half_cell = SCALE / 2 / torch.tensor(SPEECH_3K)
    assert ((out.latents - (z - 0.5) * SCALE).abs() <= half_cell + 1e-5).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("level", [2, 5, 9])
def test_a_quarter_over_the_levels_is_rejected_in_each_dimension(level, activation):
    _, a = uniform(400_000, (level,), activation)
    accepted = FSP((level,), activation=activation, quantize_rate=0)(a).stats["accepted"].item()
    assert 1 - accepted == pytest.approx(1 / (4 * level), rel=0.05)


@pytest.mark.parametrize("eta", [0.5, 1.5, 2.0])
@pytest.mark.parametrize("level", [2, 5, 9])
def test_rejections_grow_with_eta(level, eta):
    z, a = uniform(400_000, (level,), "tanh")
    quantizer = FSP((level,), eta=eta, quantize_rate=0)
    accepted = quantizer(a).stats["accepted"].item()
    assert 1 - accepted == pytest.approx(eta / (4 * level), rel=0.05)
    assert 1 - perturb(quantizer, z, a)[1].float().mean().item() == pytest.approx(
        eta / (4 * level), rel=0.05
    )


@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])
def test_eta_scales_the_perturbation(eta):
    z = torch.rand(200_000, 2) * 0.4 + 0.3
    delta, moved = perturb(FSP((9, 7), eta=eta, quantize_rate=0), z, unsquash(z, "tanh"))
    width = eta / torch.tensor([9.0, 7.0])
    assert moved.float().mean() > 0.999
    assert (delta.var(0) / (width**2 / 12)).tolist() == pytest.approx([1, 1], abs=0.02)
    assert (2 * delta.abs().amax(0) / width).tolist() == pytest.approx([1, 1], abs=1e-3)


def test_a_token_passes_unchanged_if_one_dimension_is_rejected():
    z, a = uniform(200_000, SPEECH_3K, "tanh")
    _, moved = perturb(FSP(SPEECH_3K, quantize_rate=0), z, a)
    expected = math.prod(1 - 1 / (4 * level) for level in SPEECH_3K)
    assert moved.any(-1).float().mean().item() == pytest.approx(expected, rel=0.01)
    assert moved.float().mean().item() == pytest.approx(expected, rel=0.01)


def test_a_rejected_dimension_leaves_the_others_perturbed():
    z, a = uniform(200_000, SPEECH_3K, "tanh")
    quantizer = FSP(SPEECH_3K, quantize_rate=0, rejection="dimension")
    _, moved = perturb(quantizer, z, a)
    expected = [1 - 1 / (4 * level) for level in SPEECH_3K]
    assert moved.float().mean(0).tolist() == pytest.approx(expected, abs=0.003)
    others = moved[~moved[:, 0]][:, 1:]
    assert len(others) > 4000
    assert others.float().mean(0).tolist() == pytest.approx(expected[1:], abs=0.015)
    assert quantizer(a).stats["accepted"].item() == pytest.approx(np.mean(expected), abs=0.002)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_perturbation_is_as_strong_as_the_quantization_error(activation):
    z, a = uniform(400_000, SPEECH_3K, activation)
    quantizer = FSP(SPEECH_3K, activation=activation, quantize_rate=0)
    delta, moved = perturb(quantizer, z, a)
    error = quantizer.eval()(a).latents / SCALE + 0.5 - z
    ratio = delta[moved.any(-1)].var(0) / error.var(0)
    assert ratio.tolist() == pytest.approx([1] * 6, abs=0.022)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_uniform_latents_come_out_with_unit_variance(activation):
    _, a = uniform(200_000, SPEECH_3K, activation)
    quantizer = FSP(SPEECH_3K, activation=activation, quantize_rate=0)
    out = quantizer(a).latents
    assert out.mean(0).tolist() == pytest.approx([0] * 6, abs=0.01)
    assert out.var(0).tolist() == pytest.approx([1] * 6, rel=0.01)
    expected = [1 - 1 / level**2 for level in SPEECH_3K]
    assert quantizer.eval()(a).latents.var(0).tolist() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("level", [5, 6, 7, 8, 9])
def test_fsq_errs_more_than_fsp_on_uniform_latents(level):
    z, a = evenly(level * (level - 1) * 1000)
    expected = (z - 0.5) * SCALE
    fsp, fsq = (
        (kind((level,)).eval()(a).latents - expected).square().mean() for kind in (FSP, FSQ)
    )
    assert (fsq / fsp).item() == pytest.approx((level / (level - 1)) ** 2, rel=0.001)


def test_the_quantize_rate_is_the_share_of_tokens_that_are_quantized():
    _, a = uniform(50_000, SPEECH_3K, "tanh")
    for rate in (0.0, 0.25, 1.0):
        quantizer = FSP(SPEECH_3K, quantize_rate=rate)
        out = quantizer(a)
        quantized = (out.latents - quantizer.tokens_to_latents(out.tokens)).abs().amax(-1) < 1e-5
        assert quantized.float().mean().item() == pytest.approx(rate, abs=0.01)


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradient_passes_the_perturbation_unchanged(activation, rate):
    _, a = uniform(1000, SPEECH_3K, activation)
    a.requires_grad_()
    weights = torch.randn_like(a)
    (
        FSP(SPEECH_3K, activation=activation, quantize_rate=rate)(a).latents * weights
    ).sum().backward()
    slope = torch.from_numpy(LAWS[activation].pdf(a.detach().double().numpy())).float()
    torch.testing.assert_close(a.grad, weights * SCALE * slope, rtol=1e-4, atol=1e-6)


def test_training_is_repeatable_by_seed():
    _, a = uniform(1000, SPEECH_3K, "tanh")
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(FSP(SPEECH_3K)(a).latents)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_loss_is_zero_at_the_moments_of_uniform_latents(activation):
    variance = LAWS[activation].var()
    quantizer = FSP((5, 5), activation=activation)
    a = torch.tensor([-1.0, 1.0]).repeat(50)[:, None].expand(-1, 2) * math.sqrt(variance)
    assert quantizer(a).loss.item() == pytest.approx(0, abs=1e-10)
    assert quantizer(a + 0.1).loss.item() == pytest.approx(0.1 * 0.1**2, rel=1e-4)
    assert quantizer(a * 2).loss.item() == pytest.approx(0.07 * (3 * variance) ** 2, rel=1e-4)


def test_the_loss_follows_its_formula_and_its_gradient_reaches_the_latents():
    rng = np.random.default_rng(0)
    a = rng.normal([0.3, -1, 0], [0.5, 1, 2], (4, 50, 3)).astype(np.float32)
    mean, variance = a.mean((0, 1)), a.var((0, 1))
    expected = 0.1 * (mean**2).mean() + 0.07 * ((variance - math.pi**2 / 12) ** 2).mean()
    tensor = torch.from_numpy(a).requires_grad_()
    loss = FSP((5, 5, 5))(tensor).loss
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert tensor.grad.abs().sum() > 0


def test_every_token_survives_in_onnx(through_onnx):
    quantizer = FSP(SPEECH_3K).eval()
    tokens = np.arange(math.prod(SPEECH_3K))
    codes, back = through_onnx(quantizer, tokens)
    assert back.dtype == np.int64 and codes.dtype == np.float32
    np.testing.assert_array_equal(back, tokens)
    expected = quantizer.tokens_to_latents(torch.from_numpy(tokens))
    np.testing.assert_allclose(codes, expected, atol=1e-6)


@pytest.mark.parametrize("level", [2, 5, 8])
def test_outer_cells_of_fsq_are_half_as_wide(level):
    n = 1000 * 2 * (level - 1)
    tokens = FSQ((level,)).eval().encode(evenly(n)[1])
    share = torch.bincount(tokens, minlength=level) * (level - 1) / n
    assert share.tolist() == pytest.approx([0.5, *[1] * (level - 2), 0.5], abs=0.002)


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_the_noise_of_fsq_is_one_cell_wide_in_some_of_the_scalars(rate):
    levels = (5, 8)
    z, a = uniform(300_000, levels, "tanh")
    quantizer = FSQ(levels, noise_rate=rate)
    out = quantizer(a)
    noisy = (out.latents - quantizer.tokens_to_latents(out.tokens)).abs() > 1e-5
    assert noisy.float().mean(0).tolist() == pytest.approx([rate] * 2, abs=0.005)
    assert noisy.all(-1).float().mean().item() == pytest.approx(rate**2, abs=0.005)
    delta = out.latents / SCALE + 0.5 - z
    for i, level in enumerate(levels):
        width = 1 / (level - 1)
        assert delta[:, i].abs().max() <= width / 2 + 1e-5
        if rate:
            chosen = delta[noisy[:, i], i]
            assert chosen.var().item() == pytest.approx(width**2 / 12, rel=0.02)
            assert chosen.mean().item() == pytest.approx(0, abs=0.01 * width)
            assert out.latents[:, i].max() > math.sqrt(3) * (1 + 0.5 * width)
            assert out.latents[:, i].min() < -math.sqrt(3) * (1 + 0.5 * width)


def test_fsq_passes_the_gradient_and_has_no_loss():
    _, a = uniform(1000, (5, 8), "tanh")
    a.requires_grad_()
    weights = torch.randn_like(a)
    out = FSQ((5, 8))(a)
    (out.latents * weights).sum().backward()
    slope = (1 - torch.tanh(a.detach()).square()) / 2
    torch.testing.assert_close(a.grad, weights * SCALE * slope)
    assert out.loss.item() == 0


@pytest.mark.parametrize(
    "levels, expected",
    [
        ((8, 6, 5), 0.880),
        ((8, 5, 5, 5), 0.832),
        ((7, 5, 5, 5, 5), 0.788),
        ((8, 8, 8, 6, 5), 0.821),
        (SPEECH_1K, 0.793),
        (SPEECH_3K, 0.811),
    ],
)
def test_fsq_cannot_use_its_codes_evenly_and_fsp_can(levels, expected):
    cvu = {FSP: 1.0, FSQ: 1.0}
    for kind in cvu:
        for level in levels:
            usage = CodebookUsage(level)
            usage.update(kind((level,)).eval().encode(evenly(10_000 * level * (level - 1))[1]))
            cvu[kind] *= usage.cvu
    assert cvu[FSQ] == pytest.approx(expected, abs=6e-4)
    assert cvu[FSP] == pytest.approx(1, abs=1e-5)


def test_the_use_of_fsq_is_that_of_its_dimensions():
    usage = CodebookUsage(240)
    usage.update(FSQ((8, 6, 5)).eval().encode(uniform(200_000, (8, 6, 5), "tanh")[1]))
    assert usage.cvu == pytest.approx(0.880, abs=0.003)


@pytest.mark.parametrize("temperature", [0.01, 1.0])
@pytest.mark.parametrize("dim", [1, 3, 6, 7])
def test_the_entropy_loss_is_that_over_all_codes(dim, temperature):
    z = torch.randn(300, dim, requires_grad=True)
    z = (z * (0.01 if temperature < 1 else 0.5) + 0.002).detach().requires_grad_()
    quantizer = LFQ(dim, entropy_weight=1, commitment=0, temperature=temperature)
    loss = quantizer(z).loss
    loss.backward()
    exact = z.detach().double().requires_grad_()
    codes = quantizer.tokens_to_latents(torch.arange(2**dim)).double()
    p = torch.softmax(-(exact[:, None] - codes).square().sum(-1) / temperature, 1)
    average = p.mean(0)
    expected = average.xlogy(average).sum() - p.xlogy(p).sum(1).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=1e-3, atol=1e-5)


def test_the_loss_of_lfq_adds_its_parts():
    z = torch.randn(50, 6)
    sign = torch.where(z > 0, 1.0, -1.0)
    commitment = (z - sign).square().mean().item()
    entropy = LFQ(6, entropy_weight=1, commitment=0)(z).loss.item()
    loss = LFQ(6, entropy_weight=0.3, commitment=0.7)(z).loss.item()
    assert loss == pytest.approx(0.3 * entropy + 0.7 * commitment, rel=1e-5)
    assert LFQ(6, commitment=0.7).eval()(z).loss.item() == pytest.approx(0.7 * commitment)


def test_bit_i_is_the_sign_of_dimension_i():
    quantizer = LFQ(12)
    codes = quantizer.tokens_to_latents(2 ** torch.arange(12))
    assert torch.equal(codes, 2 * torch.eye(12) - 1)
    assert torch.equal(quantizer.eval().encode(codes * 0.01), 2 ** torch.arange(12))
    assert quantizer.encode(-torch.ones(12)) == 0


@pytest.mark.parametrize("dim", [1, 8, 14])
def test_the_gradient_of_lfq_is_finite_far_out(dim):
    z = torch.cat([torch.full((20, dim), 10.0), torch.full((20, dim), -10.0), torch.zeros(4, dim)])
    z.requires_grad_()
    out = LFQ(dim)(z)
    (out.loss + out.latents.sum()).backward()
    assert out.loss.isfinite() and z.grad.isfinite().all()


def preset(quantizer: VQ, codes: torch.Tensor) -> VQ:
    quantizer.codebook, quantizer.sums = codes.clone(), codes.clone()
    quantizer.counts = torch.ones(len(codes))
    return quantizer.train()


def mixture(n: int, time: float) -> torch.Tensor:
    """Latents of 50 clusters, each of which moves its own way and all together another."""
    generator = torch.Generator().manual_seed(7)
    middles = torch.randn(50, 4, generator=generator)
    way = torch.randn(50, 4, generator=generator)
    picked = torch.randint(50, (n,))
    return middles[picked] + 0.3 * time * (way[picked] + 1) + 0.2 * torch.randn(n, 4)


def test_vq_passes_latents_until_it_has_enough_for_its_codebook():
    quantizer = VQ(3, 64, seed=0)
    for _ in range(4):
        assert not quantizer.fitted
        a = torch.randn(2, 32, 3)
        out = quantizer(a)
        assert torch.equal(out.latents, a) and out.loss == 0
    assert quantizer.fitted
    assert out.tokens.shape == (2, 32)
    assert quantizer.codebook.shape == (64, 3)
    assert len(torch.unique(quantizer.codebook, dim=0)) == 64
    assert not torch.equal(quantizer(a).latents, a)


@pytest.mark.parametrize("name", ["VQ-256", "VP-256"])
def test_there_are_no_tokens_before_there_is_a_codebook(name):
    quantizer = build(name).eval()
    a = latents_for(quantizer, 3)
    for call in (quantizer, quantizer.encode, quantizer.latents_to_tokens):
        with pytest.raises(NoCodebookError, match=name[:2]):
            call(a)
    with pytest.raises(NoCodebookError, match=name[:2]):
        quantizer.tokens_to_latents(torch.zeros(3, dtype=torch.int64))


def test_codes_follow_their_latents_by_the_formula():
    quantizer = preset(VQ(1, 2, decay=0.9, restart_below=0), torch.tensor([[0.0], [10.0]]))
    out = quantizer(torch.tensor([[1.0], [2.0], [3.0], [12.0]]))
    assert out.tokens.tolist() == [0, 0, 0, 1]
    assert out.latents.flatten().tolist() == [0, 0, 0, 10]
    assert out.loss.item() == pytest.approx(0.25 * (1 + 4 + 9 + 4) / 4)
    average = 4 / 2
    counts = [0.9 + 0.1 * 3 / average, 0.9 + 0.1 * 1 / average]
    sums = [0.1 * 6 / average, 0.9 * 10 + 0.1 * 12 / average]
    assert quantizer.counts.tolist() == pytest.approx(counts)
    assert quantizer.sums.flatten().tolist() == pytest.approx(sums)
    assert quantizer.codebook.flatten().tolist() == pytest.approx(
        [sums[0] / counts[0], sums[1] / counts[1]]
    )


def test_codes_do_not_follow_in_eval():
    quantizer = make("VQ-256")
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer(latents_for(quantizer, 500) + 3)
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


def test_the_gradient_of_vq_passes_straight_through():
    a = torch.randn(50, 5, requires_grad=True)
    weights = torch.randn(50, 5)
    (make("VQ-256").train()(a).latents * weights).sum().backward()
    torch.testing.assert_close(a.grad, weights)


@pytest.mark.parametrize("settings", [{}, {"decay": 0.9}])
def test_vq_does_not_collapse_on_a_stream_that_moves(settings):
    cluster = pytest.importorskip("sklearn.cluster", reason="needs scikit-learn to compare with")
    quantizer = VQ(4, 256, seed=0, **settings)
    for step in range(300):
        quantizer.train()(mixture(1024, step / 300))
    last = mixture(16_384, 1)
    out = quantizer.eval()(last)
    usage = CodebookUsage(256)
    usage.update(out.tokens)
    fresh = cluster.KMeans(256, n_init=1, random_state=0, max_iter=50).fit(last.numpy())
    assert usage.cvu > 0.5
    assert (out.latents - last).square().sum(1).mean().item() < 1.3 * fresh.inertia_ / len(last)


def far_codes(n: int, dim: int) -> torch.Tensor:
    """Codes of which the first eight serve no Gaussian latent."""
    codes = torch.randn(n, dim, generator=torch.Generator().manual_seed(5))
    codes[:8] += 1000
    return codes


def test_dead_codes_restart_at_recent_latents():
    quantizer = preset(VQ(3, 64, decay=0.9, seed=0), far_codes(64, 3))
    batches = [torch.randn(512, 3) for _ in range(30)]
    seen = []
    for batch in batches:
        far = quantizer.codebook[:8].abs().amax(1) > 500
        quantizer(batch)
        restarted = far & (quantizer.codebook[:8].abs().amax(1) < 500)
        seen += [quantizer.codebook[i].clone() for i in restarted.nonzero().flatten()]
    everything = torch.cat(batches)
    assert len(seen) == 8
    assert all((everything == code).all(1).any() for code in seen)


@pytest.mark.parametrize("decay, steps", [(0.9, 30), (0.5, 100)])
def test_without_restarts_a_code_without_latents_stays(decay, steps):
    codes = far_codes(64, 3)
    quantizer = preset(VQ(3, 64, decay=decay, restart_below=0), codes)
    for _ in range(steps):
        quantizer(torch.randn(256, 3))
    torch.testing.assert_close(quantizer.codebook[:8], codes[:8], rtol=1e-4, atol=0)


def test_codes_restart_at_different_latents_when_half_of_them_are_the_same():
    quantizer = preset(VQ(3, 64, decay=0.9, seed=0), far_codes(64, 3))
    tokens = torch.arange(64)
    for _ in range(30):
        a = torch.randn(512, 3)
        a[::2] = 0
        quantizer(a)
        assert torch.equal(quantizer.encode(quantizer.tokens_to_latents(tokens)), tokens)


def test_vq_waits_for_enough_different_latents():
    quantizer = VQ(3, 32, seed=0)
    for _ in range(3):
        out = quantizer(torch.zeros(100, 3))
        assert torch.equal(out.latents, torch.zeros(100, 3))
    for _ in range(3):
        quantizer(torch.randn(100, 3))
    assert quantizer.fitted


def test_vq_is_repeatable_by_seed():
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        quantizer = VQ(3, 64, decay=0.9, seed=seed)
        for _ in range(20):
            quantizer(torch.randn(512, 3) * 2)
        found.append(quantizer.codebook)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def simvq(dim: int = 5, size: int = 1024) -> SimVQ:
    pytest.importorskip("vector_quantize_pytorch", reason="needs vector-quantize-pytorch")
    return SimVQ(dim, size)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_training_tokens_of_simvq_are_those_of_the_nearest_codes(offset):
    quantizer = simvq()
    a = torch.randn(2, 1000, 5) * 0.5 + offset
    tokens = quantizer(a).tokens.flatten()
    distances = nearest_exactly(a.reshape(-1, 5), quantizer.codebook.detach())
    chosen = distances.gather(1, tokens[:, None])[:, 0]
    assert (chosen <= distances.amin(1) * (1 + 1e-5) + 1e-7).all()
    assert (tokens == distances.argmin(1)).float().mean() > 0.995
    with bf16():
        assert torch.equal(quantizer(a).tokens.flatten(), tokens)


def test_simvq_follows_its_formulas():
    quantizer = simvq(4, 64)
    weight = quantizer.library.code_transform.weight
    expected = quantizer.library.frozen_codebook @ weight.T
    torch.testing.assert_close(quantizer.codebook, expected)
    a = torch.randn(3, 50, 4, requires_grad=True)
    out = quantizer(a)
    codes = expected[out.tokens]
    torch.testing.assert_close(out.latents, codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss, 1.25 * (a - codes).square().mean())
    out.loss.backward()
    exact = weight.detach().double().requires_grad_()
    codes = (quantizer.library.frozen_codebook.double() @ exact.T)[out.tokens]
    (a.detach().double() - codes).square().mean().backward()
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    pull = 0.25 * 2 * (a.detach() - codes.detach().float()) / a.numel()
    torch.testing.assert_close(a.grad, pull, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(quantizer.eval()(a).loss, out.loss.detach())


def test_only_the_map_of_simvq_is_learned():
    quantizer = simvq(4, 64)
    assert [name for name, _ in quantizer.named_parameters()] == ["library.code_transform.weight"]
    before = quantizer.codebook.detach().clone()
    frozen = quantizer.library.frozen_codebook.clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    quantizer(torch.randn(500, 4)).loss.backward()
    optimizer.step()
    assert not torch.equal(quantizer.codebook, before)
    assert torch.equal(quantizer.library.frozen_codebook, frozen)


def batch_of(rank: int, step: int = 0, n: int = 300, dim: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(n + 20 * rank, dim, generator=generator) + rank


def entropy_loss(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z = z.clone().requires_grad_()
    loss = LFQ(3, entropy_weight=1, commitment=0, temperature=1.0)(z).loss
    loss.backward()
    return loss.detach(), z.grad


def vq_after(steps: int, join: Callable[[int], torch.Tensor], **settings: float) -> VQ:
    quantizer = preset(VQ(3, 64, decay=0.9, seed=4, **settings), far_codes(64, 3))
    for step in range(steps):
        quantizer(join(step))
    return quantizer


def fresh_vq(rank: int, seed: int | None, *, uneven: bool) -> torch.Tensor:
    torch.manual_seed(rank)
    quantizer = VQ(3, 64, decay=0.9, seed=seed)
    for step in range(8):
        quantizer(batch_of(rank, step) if uneven else batch_of(rank, step)[:200])
    return quantizer.codebook


def found_by(rank: int) -> dict:
    restarting = vq_after(25, functools.partial(batch_of, rank))
    return {
        "entropy": entropy_loss(batch_of(rank)[:300]),
        "moments": FSP((5, 5, 5))(batch_of(rank)).loss,
        "followed": vq_after(5, functools.partial(batch_of, rank), restart_below=0).codebook,
        "restarted": restarting.codebook,
        "queue": restarting.recent(),
        "seeded": fresh_vq(rank, 3, uneven=False),
        "unseeded": fresh_vq(rank, None, uneven=False),
    }


def uneven_by(rank: int) -> torch.Tensor | str:
    try:
        return fresh_vq(rank, 3, uneven=True)
    except RuntimeError as error:
        return str(error)


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict]:
    """What two processes of one group found, each with latents of its own."""
    return in_two_processes(found_by, tmp_path_factory.mktemp("group"))


def both(step: int) -> torch.Tensor:
    return torch.cat([batch_of(rank, step) for rank in (0, 1)])


@pytest.mark.slow
def test_two_processes_have_the_entropy_loss_of_the_joined_batch(processes):
    loss, gradient = entropy_loss(torch.cat([batch_of(rank)[:300] for rank in (0, 1)]))
    losses, gradients = zip(*(found["entropy"] for found in processes))
    assert torch.stack(losses).mean().item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(torch.cat(gradients) / 2, gradient)


@pytest.mark.slow
def test_two_processes_have_the_moment_loss_of_the_joined_batch(processes):
    expected = FSP((5, 5, 5))(both(0)).loss
    for found in processes:
        torch.testing.assert_close(found["moments"], expected)


@pytest.mark.slow
def test_two_processes_have_the_codebook_of_the_joined_batch(processes):
    expected = vq_after(5, both, restart_below=0).codebook
    for found in processes:
        torch.testing.assert_close(found["followed"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_two_processes_restart_the_same_codes_at_the_same_latents(processes):
    first, second = processes
    assert first["restarted"][:8].abs().max() < 500
    for key in ("restarted", "queue", "seeded"):
        assert torch.equal(first[key], second[key])


@pytest.mark.slow
def test_two_processes_without_a_seed_have_one_codebook(processes):
    assert torch.equal(processes[0]["unseeded"], processes[1]["unseeded"])


@pytest.mark.slow
def test_two_processes_may_start_with_batches_of_different_sizes(tmp_path):
    first, second = in_two_processes(uneven_by, tmp_path)
    assert isinstance(first, torch.Tensor), first
    assert torch.equal(first, second)
