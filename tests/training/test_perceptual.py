from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
transformers = pytest.importorskip("transformers", reason="the perceptual loss is optional")

from vpcodec.training.audio.perceptual import PerceptualError, PerceptualLoss

pytestmark = pytest.mark.usefixtures("one_thread")
RATE = 16_000


def speech_like(seconds: float, rate: int = RATE) -> torch.Tensor:
    """Harmonics with a gliding pitch, pauses and a little noise; (1, T)."""
    time = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    phase = 2 * torch.pi * (120 * time + 20 * torch.sin(2 * time))
    wave = sum(torch.sin(n * phase) / n for n in range(1, 30))
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(0))
    envelope = (torch.sin(2 * torch.pi * 1.5 * time) > -0.5).double()
    return (0.1 * envelope * wave + 1e-3 * noise).float()[None]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Whisper with random weights that would drop out a lot in training mode."""
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=60,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        dropout=0.5,
        encoder_layerdrop=0.5,
        init_std=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    folder = tmp_path_factory.mktemp("whisper")
    transformers.WhisperModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loss(whisper: Path) -> PerceptualLoss:
    return PerceptualLoss(str(whisper))


def test_features_are_those_of_transformers_on_thirty_seconds(whisper, loss):
    samples = speech_like(30.0)
    extractor = transformers.WhisperFeatureExtractor()
    mel = extractor(samples[0].numpy(), sampling_rate=RATE, return_tensors="pt").input_features
    model = transformers.WhisperModel.from_pretrained(whisper).eval()
    with torch.no_grad():
        expected = model.encoder(mel).last_hidden_state
        torch.testing.assert_close(loss.log_mel(samples), mel, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(loss.features(samples), expected, rtol=1e-3, atol=1e-3)
    assert expected.std() > 0.1


def test_a_clip_has_features_for_its_own_length_only(loss):
    """And its log-mel is the beginning of that of the clip padded to 30 s, as Whisper has it."""
    samples = speech_like(1.536)
    mel = loss.log_mel(samples)
    assert mel.shape == (1, 80, 153)
    assert loss.features(samples).shape == (1, 77, 32)
    padded = transformers.WhisperFeatureExtractor()(
        samples[0].numpy(), sampling_rate=RATE, return_tensors="pt"
    ).input_features
    torch.testing.assert_close(mel[..., :151], padded[..., :151], rtol=1e-3, atol=1e-3)


def test_each_clip_has_features_of_its_own(loss):
    """The floor of 80 dB below the loudest bin is that of the clip, not of the batch."""
    quiet = 1e-3 * speech_like(0.5)
    both = torch.cat([speech_like(0.5), quiet])
    torch.testing.assert_close(loss.features(both)[1:], loss.features(quiet), rtol=1e-3, atol=1e-4)


def test_identical_signals_have_no_loss(loss):
    assert loss(speech_like(0.5), speech_like(0.5)).item() == 0


def test_the_loss_grows_with_the_noise_to_order_one(loss):
    target = speech_like(0.5)
    error = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    values = [loss(target, target + level * error).item() for level in (1e-3, 1e-2, 1e-1)]
    assert 0 < values[0] < 0.7 * values[1] < 0.5 * values[2] < 2


def test_the_loss_is_the_relative_square_error_of_the_features(loss):
    target, output = speech_like(0.5), speech_like(0.5).flip(-1)
    x, y = loss.features(target), loss.features(output)
    expected = (x - y).square().sum() / x.square().sum()
    torch.testing.assert_close(loss(target, output), expected)


def test_the_gradient_reaches_the_output_and_leaves_the_encoder_frozen(loss):
    target = speech_like(0.5).requires_grad_()
    output = (0.5 * speech_like(0.5).flip(-1)).requires_grad_()
    value = loss(target, output)
    value.backward()
    assert torch.isfinite(output.grad).all() and (output.grad != 0).float().mean() > 0.9
    assert target.grad is None
    assert list(loss.parameters())
    assert all(not p.requires_grad and p.grad is None for p in loss.parameters())
    with torch.no_grad():  # a step against the gradient lowers the loss
        assert loss(target, output - 0.01 * output.grad / output.grad.norm()) < value


def test_the_encoder_stays_in_eval_mode(loss):
    target, output = speech_like(0.3), 0.1 * speech_like(0.3).flip(-1)
    before = loss(target, output)
    torch.nn.Sequential(loss).train()
    assert all(torch.equal(loss(target, output), before) for _ in range(4))


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_silence_gives_finite_losses_and_gradients(loss, level):
    output = torch.zeros(1, 4800).requires_grad_()
    value = loss(level * speech_like(0.3), output)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(output.grad).all()


def test_other_sample_rates_are_resampled(whisper, loss):
    other = PerceptualLoss(str(whisper), sample_rate=24_000)
    samples = speech_like(1.0, 24_000)
    mel, expected = other.log_mel(samples), loss.log_mel(speech_like(1.0))
    assert mel.shape == expected.shape
    assert (mel - expected)[:, :30].abs().median() < 0.1
    output = samples.clone().requires_grad_()
    other(0.5 * samples.flip(-1), output).backward()
    assert torch.isfinite(output.grad).all() and output.grad.any()


def test_bf16_autocast_is_for_the_encoder_only(loss):
    target, output = speech_like(0.5), speech_like(0.5).flip(-1).requires_grad_()
    plain, mel = loss(target, output), loss.log_mel(target)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(target, output)
        assert torch.equal(loss.log_mel(target), mel)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(plain.item(), rel=0.1)
    value.backward()
    assert torch.isfinite(output.grad).all()


def test_clips_of_more_than_thirty_seconds_are_refused(loss):
    with pytest.raises(ValueError, match="up to 30 s, got 30.5 s"):
        loss(torch.zeros(1, 488_000), torch.zeros(1, 488_000))


def test_without_transformers_the_error_says_what_to_install(whisper, monkeypatch):
    real = builtins.__import__

    def fake(name: str, *args, **kwargs):
        if name.split(".")[0] == "transformers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(PerceptualError, match="pip install 'transformers"):
        PerceptualLoss(str(whisper))


def refusal(model: Path | str) -> str:
    with pytest.raises(PerceptualError) as caught:
        PerceptualLoss(str(model))
    message = str(caught.value)
    assert str(model) in message and "\n" not in message
    return message


def test_a_folder_without_a_model_is_refused_in_a_line(tmp_path):
    refusal(tmp_path)
    refusal(tmp_path / "nowhere")


def test_another_kind_of_model_is_refused(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    assert "bert, not whisper" in refusal(tmp_path)


def test_weights_that_are_damaged_or_missing_are_refused(whisper, tmp_path):
    from safetensors.numpy import load_file, save_file

    (tmp_path / "config.json").write_bytes((whisper / "config.json").read_bytes())
    weights = load_file(whisper / "model.safetensors")
    weights = {name: np.ascontiguousarray(value) for name, value in weights.items()}
    del weights["encoder.layers.1.fc1.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "encoder.layers.1.fc1.weight" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10" + bytes(200))
    refusal(tmp_path)
