"""Published models behind `Codec`: windows, lengths, silence. Small models with random weights."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs vpcodec[train]")

from official import random_weights
from paths import SPEECH
from safetensors.torch import save

from vpcodec import Codec, read_tokens
from vpcodec.config import FSQConfig
from vpcodec.media.audio import load, resample
from vpcodec.media.audio import save as save_audio
from vpcodec.model_folder import WEIGHTS, fingerprint, write_folder_config
from vpcodec.published.architecture import load as load_model
from vpcodec.published.config import SQCodecConfig
from vpcodec.tokenfile import TokenFileError

pytestmark = pytest.mark.slow

SHAPES = dict(
    strides=(5, 4),
    encoder_dims=(8, 12, 16),
    encoder_depths=(1, 1, 2),
    decoder_strides=(5, 2, 2),
    decoder_dims=(16, 12, 8, 8),
    decoder_depths=(2, 1, 1),
    feature_dim=16,
    quantizer=FSQConfig(levels=(7, 7, 5)),
)
MODELS = {
    "l3ac-strided": SQCodecConfig(
        name="l3ac-strided",
        architecture="l3ac",
        attention_window=30,
        token_stride=3,
        encoder_layers=2,
        encoder_outer_layers=1,
        decoder_layers=3,
        decoder_outer_layers=2,
        **SHAPES,
    ),
    "l3ac-flat": SQCodecConfig(
        name="l3ac-flat",
        architecture="l3ac",
        attention_window=70,
        encoder_layers=1,
        decoder_layers=3,
        **SHAPES,
    ),
    "sqcodec-strided": SQCodecConfig(
        name="sqcodec-strided",
        architecture="sqcodec",
        sample_rate=24_000,
        attention_window=30,
        token_stride=2,
        encoder_layers=3,
        encoder_outer_layers=2,
        decoder_layers=3,
        decoder_outer_layers=2,
        silence=tuple(range(30)),
        **SHAPES,
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def codec(request, tmp_path_factory) -> Codec:
    """A codec that runs in torch; making graphs takes longer than these tests."""
    config = MODELS[request.param]
    folder = tmp_path_factory.mktemp("models") / config.name
    folder.mkdir()
    tensors = {name: torch.from_numpy(value) for name, value in random_weights(config).items()}
    weights = save(tensors)
    (folder / WEIGHTS).write_bytes(weights)
    write_folder_config(folder, config, fingerprint(config, weights), [WEIGHTS])
    return Codec.from_pretrained(folder, backend="torch")


@pytest.fixture(scope="module")
def network(codec):
    """The torch model itself, which takes whole clips."""
    config = codec.config
    return load_model(config, {k: torch.from_numpy(v) for k, v in random_weights(config).items()})


def clip(codec: Codec, seconds: float) -> np.ndarray:
    """(1, T) speech at the model's rate."""
    samples, rate = load(SPEECH)
    samples = resample(samples[:1], rate, codec.sample_rate)
    n = round(seconds * codec.sample_rate)
    return np.tile(samples, (1, -(-n // samples.shape[1])))[:, :n]


@torch.inference_mode()
def encode_whole(network, samples: np.ndarray) -> np.ndarray:
    """Tokens of a clip that is given to the network at once, silence up to a whole block behind."""
    config = network.config
    unit = config.hop_length * config.attention_window
    padded = np.pad(samples, ((0, 0), (0, -samples.shape[1] % unit)))
    n = -(-samples.shape[1] // config.hop_length)
    return network.encode(torch.from_numpy(padded)).numpy()[:, :n]


@torch.inference_mode()
def decode_whole(network, tokens: np.ndarray) -> np.ndarray:
    return network.decode(torch.from_numpy(tokens)).numpy()


def pieces(rng: np.random.Generator, n: int, most: int) -> list[slice]:
    """Random cuts of n things, some of them empty."""
    edges = [0]
    while edges[-1] < n:
        edges.append(min(n, edges[-1] + int(rng.integers(0, most))))
    return [slice(a, b) for a, b in zip(edges, edges[1:])]


def test_windows_have_the_tokens_of_the_whole_clip(codec, network, monkeypatch):
    samples = clip(codec, 3.3)
    tokens = encode_whole(network, samples)
    assert len(np.unique(tokens)) > 15
    monkeypatch.setattr("vpcodec.published.streams.ENCODE_SECONDS", 0.2)
    assert codec.encoder_stream()._window * codec.hop_length < codec.sample_rate
    if codec.config.architecture == "l3ac":  # which has no silence behind the clip
        n = samples.shape[1] // codec.hop_length - 5
        tokens, samples = tokens[:, :n], samples[:, : (n + 5) * codec.hop_length]
        assert (codec.encode(samples)[:, :n] == tokens).mean() > 0.998
    else:
        assert (codec.encode(samples) == tokens).mean() > 0.998  # all but ties


def test_clips_of_a_batch_have_their_own_tokens(codec):
    """What follows a clip changes its tokens, so that none is padded."""
    clips = [clip(codec, seconds) for seconds in (0.4, 1.1)]
    for found, expected in zip(codec.encode(clips, batch_size=2), map(codec.encode, clips)):
        assert np.array_equal(found, expected)
    tokens = codec.encode(clips)
    for found, expected in zip(codec.decode(tokens, batch_size=2), map(codec.decode, tokens)):
        assert np.array_equal(found, expected)


def test_pieces_of_any_length_give_the_same_tokens_and_audio(codec, monkeypatch):
    monkeypatch.setattr("vpcodec.published.streams.ENCODE_SECONDS", 0.2)
    monkeypatch.setattr("vpcodec.published.streams.DECODE_SECONDS", 0.5)
    samples = clip(codec, 2.1)
    tokens, rng = codec.encode(samples), np.random.default_rng(0)
    stream = codec.encoder_stream()
    parts = [stream.push(samples[:, part]) for part in pieces(rng, samples.shape[1], 9000)]
    assert np.array_equal(np.concatenate([*parts, stream.flush()], 1), tokens)
    audio = codec.decode(tokens)
    stream = codec.decoder_stream()
    for _ in range(2):  # a flushed stream begins anew
        parts = [stream.push(tokens[:, part]) for part in pieces(rng, tokens.shape[1], 90)]
        again = np.concatenate([*parts, stream.flush()], 1)
        assert again.shape == audio.shape
        assert np.abs(again - audio).max() < 1e-6


def test_windows_decode_as_the_whole_but_for_the_normalisation(codec, network, monkeypatch):
    """Without it, windows and whole clip agree: attention and convolutions miss nothing."""
    tokens = codec.encode(clip(codec, 3.0))
    monkeypatch.setattr("torch.instance_norm", lambda x, *rest: x)
    expected = decode_whole(network, tokens)
    monkeypatch.setattr("vpcodec.published.streams.DECODE_SECONDS", 0.4)
    assert codec.decoder_stream()._window * 3 < tokens.shape[1]
    found = codec.decode(tokens)
    assert found.shape == expected.shape
    end = -codec.config.hop_length * 60 if codec.config.silence else None  # silence follows there
    assert np.abs(found - expected)[:, :end].max() < 2e-5
    assert np.abs(expected).max() > 0.05


def test_windows_are_faded_into_each_other(codec, monkeypatch):
    """Where the second window begins, it is still the first, and 10 ms later it is itself."""
    tokens = codec.encode(clip(codec, 3.0))
    monkeypatch.setattr("vpcodec.published.streams.DECODE_SECONDS", 0.4)
    windows: list[np.ndarray] = []
    run = codec.backend.decode

    def decode(x, state):
        samples, state = run(x, state)
        windows.append(samples[0].copy())
        return samples, state

    monkeypatch.setattr(codec.backend, "decode", decode)
    found = codec.decode(tokens)[0]
    at = codec.decoder_stream()._window * codec.hop_length
    past = codec.config.decoder_context * codec.hop_length // codec.config.token_stride
    n = round(0.01 * codec.sample_rate)
    before, after = windows[0][at : at + n], windows[1][past : past + n]
    assert np.abs(before - after).max() > 1e-4  # each window is normalised for itself
    share = (np.arange(n) + 0.5) / n
    assert np.abs(found[at : at + n] - (before * (1 - share) + after * share)).max() < 1e-6
    assert np.array_equal(found[at + n : at + 2 * n], windows[1][past + n : past + 2 * n])


def test_the_last_window_is_as_long_as_the_others(codec, monkeypatch):
    """Or its end would be normalised over next to nothing."""
    monkeypatch.setattr("vpcodec.published.streams.DECODE_SECONDS", 0.3)
    stream = codec.decoder_stream()
    lengths: list[int] = []
    run = codec.backend.decode
    monkeypatch.setattr(
        codec.backend, "decode", lambda x, state: lengths.append(x.shape[1]) or run(x, state)
    )
    size, ahead = stream._window, stream._ahead
    for extra in (-1, 0, 1, ahead, ahead + 1, ahead + 2, size - 1, size + ahead):
        tokens = codec.encode(clip(codec, 3.0))[:, : 3 * size + extra]
        lengths.clear()
        assert codec.decode(tokens).shape == (1, tokens.shape[1] * codec.hop_length)
        assert min(lengths) >= size
        assert max(lengths) < 2 * size + ahead + codec.config.attention_window


def test_clips_are_decoded_at_once(codec, network):
    tokens = codec.encode(clip(codec, 0.71))
    n = tokens.shape[1] * codec.hop_length
    silence = np.array([codec.config.silence], np.int64)[:, 30 - -tokens.shape[1] % 30 :]
    filled = np.concatenate([tokens, silence], 1)
    expected = decode_whole(network, filled if codec.config.silence else tokens)[:, :n]
    assert np.abs(codec.decode(tokens) - expected).max() < 1e-6
    assert np.abs(codec.decode(tokens, n - 7) - expected[:, :-7]).max() < 1e-6


@pytest.mark.parametrize("extra", [1, -1, 0])
@pytest.mark.parametrize("tokens", [1, 30, 70, 71])
def test_there_is_a_token_for_each_hop_and_none_for_padding(codec, tokens, extra):
    n = tokens * codec.hop_length + extra
    samples = clip(codec, 1 + n / codec.sample_rate)[:, :n]
    found = codec.encode(samples)
    assert found.shape == (1, -(-n // codec.hop_length))
    assert found.dtype == np.int64
    assert codec.decode(found, n).shape == (1, n)


def test_damaged_blocks_become_silence(codec, tmp_path):
    samples = clip(codec, 12.0)  # of more than one block
    source, coded, back = (tmp_path / name for name in ("a.wav", "a.tok", "b.wav"))
    save_audio(source, samples, codec.sample_rate)
    codec.encode_file(source, coded)
    data = bytearray(coded.read_bytes())
    data[len(data) // 2] ^= 1
    coded.write_bytes(data)
    with pytest.raises(TokenFileError):
        codec.decode_file(coded, back)
    assert codec.decode_file(coded, back, recover=True).damaged == 1
    decoded, _ = load(back)
    assert decoded.shape == samples.shape
    assert (decoded == 0).mean() > 0.05 and np.abs(decoded).max() > 0.05


def test_nothing_gives_nothing(codec):
    tokens = codec.encode(np.zeros((1, 0), np.float32))
    assert tokens.shape == (1, 0)
    assert codec.decode(tokens).shape == (1, 0)


def test_channels_are_coded_alone(codec):
    left, right = clip(codec, 0.9), clip(codec, 1.9)[:, -round(0.9 * codec.sample_rate) :]
    tokens = codec.encode(np.concatenate([left, right]))
    alone = np.concatenate([codec.encode(left), codec.encode(right)])
    assert (tokens == alone).mean() > 0.998
    both = codec.decode(alone)
    assert np.abs(both[1] - codec.decode(alone[1:])[0]).max() < 1e-5


def test_files_of_another_rate(codec, tmp_path):
    samples = clip(codec, 1.7)
    source, coded, back = (tmp_path / name for name in ("a.wav", "a.tok", "b.wav"))
    save_audio(source, np.concatenate([samples, samples * 0.5]), codec.sample_rate)
    recorded, _ = load(source)
    stats = codec.encode_file(source, coded)
    tokens, header = read_tokens(coded)[:2]
    assert header.sample_rate == codec.sample_rate and stats.channels == 2
    assert np.array_equal(tokens, codec.encode(recorded))
    codec.decode_file(coded, back, rate=44_100)
    decoded, rate = load(back)
    assert rate == 44_100
    assert decoded.shape == (2, -(-samples.shape[1] * 44_100 // codec.sample_rate))
