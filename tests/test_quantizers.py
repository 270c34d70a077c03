from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from vpcodec.quantizers import FSP  # noqa: E402

SPEECH_3K = (9, 9, 9, 7, 7, 7)
SPEECH_1K = (7,) * 6
ACTIVATIONS = ("tanh", "normal")
SCALE = math.sqrt(12)


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def unsquash(z: torch.Tensor, activation: str) -> torch.Tensor:
    """The pre-activations, float32, that the activation squashes to z."""
    y = 2 * z.double() - 1
    a = torch.atanh(y) if activation == "tanh" else math.sqrt(2) * torch.erfinv(y)
    return a.float()


def uniform(n: int, levels: tuple[int, ...], activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform z (n, D) and the pre-activations that give it."""
    torch.manual_seed(0)
    z = torch.rand(n, len(levels), dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    return z.float(), unsquash(z, activation)


def perturb(quantizer: FSP, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One training pass: (perturbation of z, which tokens were perturbed)."""
    z = (torch.tanh(a) + 1) / 2
    delta = quantizer.train()(a).latents / SCALE + 0.5 - z
    return delta, delta.abs().amax(-1) > 1e-6


@pytest.mark.parametrize("levels", [SPEECH_3K, SPEECH_1K])
def test_every_token_survives_the_way_to_codes_and_back(levels):
    quantizer = FSP(levels).eval()
    tokens = torch.arange(quantizer.codebook_size)
    codes = quantizer.tokens_to_latents(tokens)
    assert torch.equal(quantizer.latents_to_tokens(codes), tokens)
    assert len(torch.unique(codes, dim=0)) == math.prod(levels)
    with bf16():
        assert torch.equal(quantizer.tokens_to_latents(tokens), codes)
        assert torch.equal(quantizer.latents_to_tokens(codes), tokens)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(quantizer.latents_to_tokens(codes.to(dtype)), tokens)


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


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast_changes_no_token(activation):
    torch.manual_seed(0)
    quantizer = FSP(SPEECH_3K, activation=activation).eval()
    a = torch.randn(4, 5000, 6)
    plain = quantizer.encode(a)
    with bf16():
        assert torch.equal(quantizer.encode(a), plain)
        assert torch.equal(quantizer(a).tokens, plain)
        assert torch.equal(quantizer(a.bfloat16()).tokens, quantizer.encode(a.bfloat16().float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_results_are_int64_and_float32_whatever_comes_in(dtype, training):
    quantizer = FSP(SPEECH_3K).train(training).to(dtype)
    with bf16():
        out = quantizer(torch.zeros(2, 5, 6, dtype=dtype))
        assert out.tokens.dtype == quantizer.encode(out.latents.to(dtype)).dtype == torch.int64
        assert quantizer.latents_to_tokens(out.latents.to(dtype)).dtype == torch.int64
        codes = quantizer.tokens_to_latents(out.tokens.int())
        assert out.latents.dtype == out.loss.dtype == codes.dtype == torch.float32
    assert out.latents.shape == (2, 5, 6) and out.tokens.shape == (2, 5) and out.loss.shape == ()


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"levels": [9, 1]}, r"\[9, 1\]"),
        ({"levels": [9, -3]}, "-3"),
        ({"levels": []}, r"\[\]"),
        ({"levels": [9] * 20}, str(9**20)),
        ({"activation": "relu"}, "relu"),
        ({"quantize_rate": 1.25}, "1.25"),
        ({"quantize_rate": -0.5}, "-0.5"),
    ],
)
def test_wrong_settings_are_refused_and_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        FSP(**arguments)


@pytest.mark.parametrize("method", ["forward", "encode", "latents_to_tokens"])
@pytest.mark.parametrize("dim", [1, 5])
def test_latents_of_another_width_are_refused(method, dim):
    with pytest.raises(ValueError, match=rf"6.*{dim}"):
        getattr(FSP(SPEECH_3K), method)(torch.zeros(2, 3, dim))


@pytest.mark.parametrize("levels", [SPEECH_3K, (2, 3, 4), (8,)])
def test_codes_are_the_middles_of_the_cells(levels):
    quantizer = FSP(levels)
    tokens = np.arange(quantizer.codebook_size)
    digits = np.stack(np.unravel_index(tokens, levels, order="F"), -1)
    expected = ((digits + 0.5) / levels - 0.5) * SCALE
    codes = quantizer.tokens_to_latents(torch.from_numpy(tokens)).numpy()
    np.testing.assert_allclose(codes, expected, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_eval_quantizes_to_the_nearest_code_and_repeats_itself(activation):
    quantizer = FSP(SPEECH_3K, activation=activation).eval()
    z, a = uniform(5000, SPEECH_3K, activation)
    first, second = quantizer(a), quantizer(a)
    assert torch.equal(first.latents, second.latents)
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.latents, quantizer.tokens_to_latents(first.tokens))
    half_cell = SCALE / 2 / torch.tensor(SPEECH_3K)
    assert ((first.latents - (z - 0.5) * SCALE).abs() <= half_cell + 1e-5).all()


def test_latents_far_out_fall_into_the_outer_cells():
    quantizer = FSP((5, 5)).eval()
    assert quantizer.encode(torch.tensor([[-50.0, -50.0], [50.0, 50.0]])).tolist() == [0, 24]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_stays_in_range_and_within_half_a_cell(activation):
    z, a = uniform(50_000, SPEECH_3K, activation)
    out = FSP(SPEECH_3K, activation=activation)(a)
    assert out.latents.abs().max() <= math.sqrt(3) + 1e-5
    half_cell = SCALE / 2 / torch.tensor(SPEECH_3K)
    assert ((out.latents - (z - 0.5) * SCALE).abs() <= half_cell + 1e-5).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("level", [2, 5, 9])
def test_a_quarter_over_the_levels_is_rejected_in_each_dimension(level, activation):
    _, a = uniform(400_000, (level,), activation)
    accepted = FSP((level,), activation=activation, quantize_rate=0)(a).stats["accepted"].item()
    assert 1 - accepted == pytest.approx(1 / (4 * level), rel=0.05)


def test_a_token_passes_unchanged_if_one_dimension_is_rejected():
    _, a = uniform(200_000, SPEECH_3K, "tanh")
    _, perturbed = perturb(FSP(SPEECH_3K, quantize_rate=0), a)
    expected = math.prod(1 - 1 / (4 * level) for level in SPEECH_3K)
    assert perturbed.float().mean().item() == pytest.approx(expected, rel=0.01)


def test_the_perturbation_is_as_strong_as_the_quantization_error():
    z, a = uniform(1_000_000, SPEECH_3K, "tanh")
    quantizer = FSP(SPEECH_3K, quantize_rate=0)
    delta, perturbed = perturb(quantizer, a)
    error = quantizer.eval()(a).latents / SCALE + 0.5 - z
    ratio = delta[perturbed].var(0) / error.var(0)
    assert ratio.tolist() == pytest.approx([1] * 6, abs=0.02)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_uniform_latents_come_out_with_unit_variance(activation):
    _, a = uniform(200_000, SPEECH_3K, activation)
    out = FSP(SPEECH_3K, activation=activation, quantize_rate=0)(a).latents
    assert out.mean(0).tolist() == pytest.approx([0] * 6, abs=0.01)
    assert out.var(0).tolist() == pytest.approx([1] * 6, rel=0.01)


def test_the_quantize_rate_is_the_share_of_tokens_that_are_quantized():
    _, a = uniform(50_000, SPEECH_3K, "tanh")
    for rate in (0.0, 0.25, 1.0):
        quantizer = FSP(SPEECH_3K, quantize_rate=rate)
        out = quantizer(a)
        quantized = (out.latents - quantizer.tokens_to_latents(out.tokens)).abs().amax(-1) < 1e-5
        assert quantized.float().mean().item() == pytest.approx(rate, abs=0.01)


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_the_gradient_passes_the_perturbation_unchanged(rate):
    _, a = uniform(1000, SPEECH_3K, "tanh")
    a.requires_grad_()
    weights = torch.randn_like(a)
    (FSP(SPEECH_3K, quantize_rate=rate)(a).latents * weights).sum().backward()
    slope = (1 - torch.tanh(a.detach()).square()) / 2
    torch.testing.assert_close(a.grad, weights * SCALE * slope)


def test_training_is_repeatable_by_seed():
    _, a = uniform(1000, SPEECH_3K, "tanh")
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(FSP(SPEECH_3K)(a).latents)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("activation, variance", [("tanh", math.pi**2 / 12), ("normal", 1.0)])
def test_the_loss_is_zero_at_the_moments_of_uniform_latents(activation, variance):
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


def test_every_token_survives_in_onnx(tmp_path):
    pytest.importorskip("onnxscript", reason="needs the train extra")
    import onnxruntime

    class RoundTrip(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantizer = FSP(SPEECH_3K)

        def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            codes = self.quantizer.tokens_to_latents(tokens)
            return codes, self.quantizer.latents_to_tokens(codes)

    module = RoundTrip().eval()
    path = tmp_path / "round_trip.onnx"
    torch.onnx.export(
        module,
        (torch.zeros(5, dtype=torch.int64),),
        path,
        dynamo=True,
        opset_version=18,
        dynamic_shapes=({0: torch.export.Dim("length")},),
        input_names=["tokens"],
        verbose=False,
    )
    tokens = np.arange(math.prod(SPEECH_3K))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    codes, back = session.run(None, {"tokens": tokens})
    assert back.dtype == np.int64 and codes.dtype == np.float32
    np.testing.assert_array_equal(back, tokens)
    np.testing.assert_allclose(codes, module(torch.from_numpy(tokens))[0], atol=1e-6)
