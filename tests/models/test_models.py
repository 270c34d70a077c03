from __future__ import annotations

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("yaml", reason="needs the train extra")

import torch.nn.functional as F
from autoencoders import build, config_of
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from vpcodec.config import FRAME_COUNTER, NOISE_FRAMES, AudioConfig
from vpcodec.models import AudioAutoencoder
from vpcodec.models.layers import (
    ConvUnit,
    DilatedUnit,
    DownLayer,
    FrameCounter,
    NoiseInjection,
    Snake,
    State,
    SynthesisFilterbank,
    UpLayer,
    snake,
    zero_state,
)
from vpcodec.models.local_attention import LocalAttention, LocalTransformer
from vpcodec.models.tconv import EnhanceBlock, TConv, tpool

FRAMES = 40


@pytest.fixture(scope="module", params=["speech_3k.yaml", "debug.yaml", "minimal"])
def model(request: pytest.FixtureRequest) -> AudioAutoencoder:
    return build(config_of(request.param))


@pytest.fixture(scope="module")
def speech_3k() -> AudioAutoencoder:
    return build(config_of("speech_3k.yaml"))


@pytest.fixture
def samples(model: AudioAutoencoder) -> torch.Tensor:
    torch.manual_seed(1)
    return 0.3 * torch.randn(2, FRAMES * model.config.hop_length)


@pytest.mark.parametrize("frames", [1, 2, 13])
def test_lengths(model, frames):
    hop = model.config.hop_length
    tokens = model.encode(torch.randn(3, frames * hop))
    assert tokens.shape == (3, frames) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < model.config.codebook_size
    decoded = model.decode(tokens)
    assert decoded.shape == (3, frames * hop) and decoded.dtype == torch.float32
    assert decoded.abs().max() <= 1


def test_the_training_pass_is_encode_and_decode_without_the_delay(model, samples):
    output, quantized = model(samples)
    assert model.delay == model.config.decoder_delay * model.config.hop_length
    assert output.shape[1] == samples.shape[1] - model.delay
    assert torch.equal(quantized.tokens, model.encode(samples))
    expected = model.decode(quantized.tokens)[:, model.delay :]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_every_parameter_learns():
    model = build(config_of("debug.yaml")).train().requires_grad_()
    output, quantized = model(0.3 * torch.randn(2, 40 * model.config.hop_length))
    (output.square().mean() + quantized.loss).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    "part, types",
    [
        ("encoder", {TConv, ConvUnit, DownLayer, LocalTransformer}),
        (
            "decoder",
            {ConvUnit, Snake, UpLayer, LocalTransformer}
            | {EnhanceBlock, DilatedUnit, SynthesisFilterbank},
        ),
    ],
)
def test_the_architecture_has_its_parts_and_nothing_that_cannot_stream(speech_3k, part, types):
    present = {type(module) for module in getattr(speech_3k, part).modules()}
    assert types <= present
    clip_wide = (nn.ConvTranspose1d, nn.InstanceNorm1d, nn.BatchNorm1d, nn.GroupNorm)
    assert [kind for kind in present if issubclass(kind, clip_wide)] == []


def test_depths_and_layers_follow_the_configuration(speech_3k):
    config = speech_3k.config

    def count(part: nn.Module, kind: type) -> int:
        return sum(isinstance(module, kind) for module in part.modules())

    assert count(speech_3k.encoder, ConvUnit) == sum(config.encoder_depths)
    assert count(speech_3k.decoder, ConvUnit) == sum(config.decoder_depths)
    assert count(speech_3k.encoder, LocalAttention) == config.encoder_layers
    assert count(speech_3k.decoder, LocalAttention) == config.decoder_layers


def test_hidden_widths_follow_the_configuration():
    config = AudioConfig(
        name="m",
        expansion=2,
        decoder_expansions=(3, 1, 4),
        encoder_feedforward_dim=40,
        attention_heads=4,
    )
    model = AudioAutoencoder(config)
    widths = [
        [unit.narrow.in_features for stage in part.stages for unit in stage]
        for part in (model.encoder, model.decoder)
    ]
    assert widths == [[64, 192, 192, 384, 384], [768, 768, 128, 192]]
    layers = (*model.encoder.transformer.layers, *model.decoder.transformer.layers)
    assert [layer.narrow.in_features for layer in layers] == [40, 512, 512]


WINDOW = 5


def test_attention_at_the_beginning_is_masked_and_not_padded():
    torch.manual_seed(0)
    attention = LocalAttention(8, heads=2, window=WINDOW).requires_grad_(False)
    x = torch.randn(1, 1, 8)
    value = attention.qkv(x)[..., 16:]
    torch.testing.assert_close(attention(x), attention.out(value))


def test_the_distance_bias_belongs_to_the_distance():
    torch.manual_seed(0)
    attention = LocalAttention(8, heads=2, window=WINDOW).requires_grad_(False)
    attention.distance_bias[3] = 1e4  # all weight on the token three before
    x = torch.randn(1, 12, 8)
    value = attention.qkv(x)[..., 16:]
    torch.testing.assert_close(attention(x)[:, 3:], attention.out(value[:, :-3]))


@pytest.mark.parametrize("window", [2, 5, 45])
def test_tpooling_is_average_of_maximum_of_magnitude(window):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 200)
    envelope = nn.MaxPool1d(window, 1)(F.pad(x.abs(), (window - 1, 0)))
    expected = nn.AvgPool1d(window, 1)(F.pad(envelope, (window - 1, 0)))
    pooled = tpool(F.pad(x, (2 * (window - 1), 0)), window)
    torch.testing.assert_close(pooled, expected)


def test_tpooling_over_one_sample_is_the_signal():
    x = torch.randn(2, 3, 20)
    assert torch.equal(tpool(x, 1), x)


def test_tconv_reads_the_tpooling_of_each_window():
    torch.manual_seed(0)
    windows = (45, 1, 5, 11, 5)
    block = TConv(windows, 8, 6, stride=4, taps=12).requires_grad_(False)
    x = torch.randn(2, 1, 80)
    past = F.pad(x, (12 - 4, 0))  # what the convolution looks back at
    branches = [tpool(F.pad(past, (2 * (w - 1), 0)), w) for w in windows]
    expected = block.norm(block.mix(F.gelu(block.conv(torch.cat(branches, 1))).mT)).mT
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def snake_of(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """The activation as it was published."""
    return x + torch.sin(alpha * x).square() / alpha


def test_snake_layer_is_the_formula_times_its_scale():
    layer = Snake(3).requires_grad_(False)
    layer.scale.copy_(torch.tensor([[1.0], [2.0], [6.0]]))
    x = torch.randn(2, 3, 7)
    expected = layer.scale * snake_of(x, layer.scale / 2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert not layer(torch.zeros(1, 3, 1)).any()


def test_snake_between_matrices_is_the_formula():
    torch.manual_seed(0)
    alpha = torch.tensor([0.5, 1.0, 3.0])
    before, after = torch.randn(3, 5), torch.randn(4, 3)
    x = torch.randn(7, 5)
    folded = after / (2 * alpha)
    found = snake(x @ (2 * alpha[:, None] * before).T) @ folded.T + folded.sum(1)
    expected = snake_of(x @ before.T, alpha) @ after.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def noise_layer() -> NoiseInjection:
    torch.manual_seed(0)
    layer = NoiseInjection(6, channels=4, rate=3, seed=0).requires_grad_(False)
    layer.out.weight.normal_()
    return layer


def test_noise_of_a_trained_model_is_its_table_at_the_number_of_the_frame():
    layer, x = noise_layer(), torch.randn(2, 6, 9)
    frames = torch.tensor([[0, 1, 2], [NOISE_FRAMES - 1, 0, 1]])
    noise = (layer.table.float() / 32)[frames].reshape(2, 9, 4)
    expected = x + (layer.out(noise * layer.gate(x.mT))).mT
    torch.testing.assert_close(layer(x, frames), expected)
    assert not torch.equal(layer(x, frames), layer(x, frames.flip(0)))


def test_noise_in_training_is_drawn_anew_and_its_table_is_like_it():
    layer, x = noise_layer(), torch.randn(1, 6, 3 * NOISE_FRAMES)
    drawn = [layer(x, None) - x for _ in range(2)]
    read = layer(x, torch.arange(NOISE_FRAMES)[None]) - x
    assert not torch.allclose(*drawn)
    for y in (*drawn, read):
        torch.testing.assert_close(y.std(), read.std(), rtol=0.15, atol=0)
    table = layer.table.float() / 32
    assert abs(table.mean()) < 0.02 and abs(table.std() - 1) < 0.02 and table.abs().max() < 4


def test_the_table_does_not_depend_on_random_numbers_drawn_before():
    tables = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        tables.append(NoiseInjection(6, channels=4, rate=3, seed=0).table)
    assert torch.equal(*tables)
    assert not torch.equal(tables[0], NoiseInjection(6, channels=4, rate=3, seed=1).table)


def test_frames_are_counted_up_to_the_length_of_the_table():
    numbers = FrameCounter()(torch.zeros(2, 2 * NOISE_FRAMES + 3, 5))
    assert torch.equal(numbers[1], torch.arange(2 * NOISE_FRAMES + 3) % NOISE_FRAMES)


def test_the_state_that_counts_frames_has_the_name_that_backends_know():
    model = build(config_of("debug.yaml"))
    assert model.decoder_state[FRAME_COUNTER] == (1, 1)


def test_a_model_without_noise_has_no_trace_of_it(speech_3k):
    assert speech_3k.config.noise_channels is None
    names = [*speech_3k.state_dict(), *speech_3k.decoder_state]
    assert not [name for name in names if "noise" in name or "frames" in name]


@pytest.mark.parametrize("stride", [2, 3, 8])
def test_up_layer_starts_as_repeat_and_box(stride):
    torch.manual_seed(0)
    layer = UpLayer(6, 4, stride).requires_grad_(False)
    layer.norm = nn.Identity()
    x = torch.randn(2, 6, 20)
    repeated = layer.project(x.mT).mT.repeat_interleave(stride, -1)
    padded = F.pad(repeated, (stride - 1, 0))
    torch.testing.assert_close(layer(x), F.avg_pool1d(padded, stride, 1), rtol=1e-4, atol=1e-5)
    layer.smooth.normal_()
    kernel = layer.smooth.T.unsqueeze(1)
    torch.testing.assert_close(layer(x), F.conv1d(padded, kernel, groups=4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride, taps", [(8, 8), (3, 2), (4, 1)])
def test_synthesis_is_a_transposed_convolution(stride, taps):
    torch.manual_seed(0)
    bank = SynthesisFilterbank(5, stride, taps=taps).requires_grad_(False)
    x = torch.randn(2, 5, 30)
    windows = bank.conv.conv.weight.flip(-1)  # (sample in frame, channel, frame after)
    kernel = windows.permute(1, 2, 0).reshape(5, 1, taps * stride)
    expected = F.conv_transpose1d(x, kernel, stride=stride)[:, 0, : 30 * stride]
    torch.testing.assert_close(bank(x), expected, rtol=1e-4, atol=1e-6)


def multiply_adds(function: Callable, *arguments) -> int:
    """Of convolutions, linear layers and matrix products, elementwise work left out."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*arguments)
    return counter.get_total_flops() // 2


class Known(nn.Module):
    """A convolution, a depthwise convolution, a linear layer and a product of known cost."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        norm = weight_norm if normed else nn.Identity()
        self.conv = norm(nn.Conv1d(3, 16, 7, stride=2))
        self.depthwise = norm(nn.Conv1d(16, 16, 5, groups=16))
        self.linear = norm(nn.Linear(16, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(self.depthwise(self.conv(x)).transpose(1, 2))
        return y @ y.transpose(1, 2)


@pytest.mark.parametrize("normed", [False, True])
def test_the_counter_counts_every_layer(normed):
    batch, wide, short = 2, (107 - 7) // 2 + 1, (107 - 7) // 2 + 1 - 4
    expected = wide * 16 * 3 * 7 + short * 16 * 5 + short * 16 * 10 + short * short * 10
    assert multiply_adds(Known(normed), torch.randn(batch, 3, 107)) == batch * expected


def test_speech_3k_keeps_its_budget(speech_3k):
    config = speech_3k.config
    frames = round(config.frame_rate)
    samples = torch.randn(1, frames * config.hop_length)
    past_encoder = State(zero_state(speech_3k.encoder_state, 1))
    past_decoder = State(zero_state(speech_3k.decoder_state, 1))
    tokens = speech_3k.encode(samples, past_encoder)
    speech_3k.decode(tokens, past_decoder)
    encode = multiply_adds(speech_3k.encode, samples, State(past_encoder.next))
    decode = multiply_adds(speech_3k.decode, tokens, State(past_decoder.next))
    seconds = frames / config.frame_rate
    assert 0 < encode and 0 < decode
    assert (encode + decode) / seconds <= 0.8e9
    assert sum(p.numel() for p in speech_3k.parameters()) <= 5e6


@pytest.mark.parametrize("name", ["debug.yaml", "speech_3k.yaml", "speech_1k.yaml"])
def test_silence_does_not_blow_up_the_gradients_of_a_new_model(name):
    """With equal channels, each of some ten norms would multiply them by a thousand."""
    torch.manual_seed(0)
    model = AudioAutoencoder(config_of(name))
    output, _ = model(torch.zeros(1, 40 * model.config.hop_length))
    output.abs().mean().backward()
    norm = sum(p.grad.double().square().sum() for p in model.parameters()).sqrt()
    assert 0 < norm < 1000
