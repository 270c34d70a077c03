"""Train a language model, export it, generate with it: all on the command line."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import refuse, run
from paths import SPEECH

pytest.importorskip("accelerate", reason="needs the train extra")
pytest.importorskip("transformers", reason="needs the lm extra")
import torch

from vpcodec import read_tokens
from vpcodec.config import LMConfig
from vpcodec.hub import open_model
from vpcodec.lm import LanguageModel, write_lm
from vpcodec.media.audio import load
from vpcodec.media.image import load_image, save_image

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = """
model: {kind: lm, layers: 1, width: 16, heads: 2, context: 32}
data: {train: tokens, batch_size: 2}
eval: {data: tokens/speech.tok}
train: {steps: 2, device: cpu, precision: fp32, show_every: 2}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def untrained(target: str, codec: str, **fields: Any) -> None:
    torch.manual_seed(0)
    config = LMConfig(name="tiny", codec=codec, **({"layers": 1, "width": 16, "heads": 2} | fields))
    model = open_model(codec)
    network = LanguageModel(config, model.config.quantizer.token_levels)
    write_lm(network, model.space, Path(target))


def test_from_recordings_to_a_continuation() -> None:
    run("encode", SPEECH, "tokens/speech.tok", "-m", "speech-1k")
    Path("lm.yaml").write_text(RECIPE)
    result = run("train", "lm.yaml")
    assert "bits_per_token" in result.err and "unigram" in result.err
    assert "resuming runs/lm at step 2" in run("train", "lm.yaml", "train.steps=3").err
    run("export", "runs/lm", "-o", "my-lm")
    assert "exists" in refuse("export", "runs/lm", "-o", "my-lm")
    run("export", "runs/lm/best.safetensors", "-o", "my-lm", "--force")
    result = run("generate", "-m", "my-lm", "--prompt", SPEECH, "--seconds", 0.5, "-o", "y.wav")
    assert "after" in result.err and "seed 0" in result.err
    audio, rate = load("y.wav")
    prompt, _ = read_tokens("tokens/speech.tok")
    assert rate == 16_000
    assert prompt.shape[1] * 270 < audio.shape[1] <= (prompt.shape[1] + 30) * 270


def test_a_seed_gives_the_same_bytes_in_a_file_and_a_pipe() -> None:
    untrained("lm", "speech-1k")
    options = ("generate", "-m", "lm", "--seconds", 1)
    run(*options, "-o", "a.tok")
    run(*options, "-o", "b.tok", "--seed", 0)
    run(*options, "-o", "c.tok", "--seed", 1)
    run(*options, "-o", "a.wav")
    piped = run(*options, "-o", "-").out
    assert Path("a.tok").read_bytes() == Path("b.tok").read_bytes()
    assert Path("a.tok").read_bytes() != Path("c.tok").read_bytes()
    run("decode", "a.tok", "decoded.wav")
    assert Path("a.wav").read_bytes() == Path("decoded.wav").read_bytes()
    assert np.array_equal(load(io.BytesIO(piped))[0], load("a.wav")[0])


def test_a_prompt_is_the_beginning_as_audio_or_as_tokens() -> None:
    untrained("lm", "speech-1k")
    run("encode", SPEECH, "prompt.tok", "-m", "speech-1k")
    prompt, header = read_tokens("prompt.tok")
    whole = prompt[0, : header.model_samples // header.hop_length]
    options = ("generate", "-m", "lm", "--seconds", 0.2, "--prompt")
    for source in (SPEECH, "prompt.tok"):
        run(*options, source, "-o", "out.tok")
        found, _ = read_tokens("out.tok")
        assert np.array_equal(found[0, : len(whole)], whole)
        assert 0 < found.shape[1] - len(whole) <= 12
    piped = run(*options, "-", "-o", "piped.tok", stdin=SPEECH.read_bytes())
    assert piped.code == 0 and Path("piped.tok").exists()


def test_pictures_are_generated_and_completed(picture) -> None:
    untrained("lm", "image-fsp", grid=(4, 6), context=24)
    run("generate", "-m", "lm", "-o", "out.png")
    assert load_image("out.png").shape == (32, 48, 3)
    save_image("in.png", picture(32, 48))
    run("generate", "-m", "lm", "--prompt", "in.png", "-o", "half.tok")
    run("encode", "in.png", "in.tok")
    (found, _), (prompt, _) = read_tokens("half.tok"), read_tokens("in.tok")
    assert np.array_equal(found[0, :12], prompt[0, :12])
    assert not np.array_equal(found[0, 12:], prompt[0, 12:])
    save_image("small.png", picture(8, 48))
    assert "smaller than 48 x 16 pixels" in refuse(
        "generate", "-m", "lm", "--prompt", "small.png", "-o", "x.png"
    )
    assert "only audio takes --seconds" in refuse(
        "generate", "-m", "lm", "--seconds", 1, "-o", "x.png"
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--codec", "speech-3k", "-o", "x.wav"), "made for the tokens of 'speech-1k'"),
        (("--codec", "nobody", "-o", "x.wav"), "unknown model 'nobody'"),
        (("-o", "x.png"), "the suffix of the output must be one of"),
        (("--prompt", "missing.wav", "-o", "x.wav"), "missing.wav"),
        (("--prompt", "other.tok", "-o", "x.wav"), "not the tokens of 'speech-1k'"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[str, ...], message: str) -> None:
    untrained("lm", "speech-1k")
    run("encode", SPEECH, "other.tok", "-m", "speech-3k")
    assert message in refuse("generate", "-m", "lm", *arguments)
    assert not Path("x.wav").exists()


def test_a_codec_is_no_language_model() -> None:
    codec = open_model("speech-1k").path
    assert "a codec, not a language model" in refuse("generate", "-m", codec, "-o", "x.wav")
