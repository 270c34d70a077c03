"""Streams for live links: other sample rates, and tokens that are lost."""

from __future__ import annotations

import numpy as np
import pytest

from vpcodec import AudioCodec, Codec
from vpcodec.media.audio import AudioError, resample

HOLD, FADE = 0.06, 0.04  # s, as documented


@pytest.fixture(scope="module", params=["speech-3k", "speech-1k"])
def codec(request: pytest.FixtureRequest) -> AudioCodec:
    return Codec.from_pretrained(request.param, threads=1)


def decoded(codec: AudioCodec, tokens: np.ndarray, *lost: tuple[int, int]) -> np.ndarray:
    """All samples, with these ranges of tokens lost, one token at a time around them."""
    stream, parts, i = codec.decoder_stream(len(tokens)), [], 0
    for start, end in [*lost, (tokens.shape[1], tokens.shape[1])]:
        parts += [stream.push(tokens[:, i:start]), stream.push_lost(end - start)]
        i = end
    return np.concatenate([*parts, stream.flush()], 1)


def level(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


@pytest.mark.parametrize("rate", [48_000, 44_100, 8_000])
def test_a_stream_at_another_rate_is_encode_and_decode(codec, speech, rate):
    samples = np.concatenate([resample(speech[:, :40_000], 16_000, rate)] * 2)
    samples[1] *= 0.5
    integers = np.round(samples * 32_000).clip(-(2**15), 2**15 - 1).astype(np.int16)
    encoder = codec.encoder_stream(2, sample_rate=rate)
    for _ in range(2):  # a stream can be used again
        parts = [encoder.push(piece) for piece in np.array_split(integers, 37, 1)]
        tokens = np.concatenate([*parts, encoder.flush()], 1)
        assert np.array_equal(tokens, codec.encode(integers, rate))
    decoder = codec.decoder_stream(2, sample_rate=rate)
    for _ in range(2):
        parts = [decoder.push(piece) for piece in np.array_split(tokens, 29, 1)]
        found = np.concatenate([*parts, decoder.flush()], 1)
        expected = resample(codec.decode(tokens), codec.sample_rate, rate)
        assert found.shape == expected.shape
        assert np.allclose(found, expected, rtol=0, atol=1e-4)


def test_a_rate_that_makes_no_sense_is_refused(codec):
    with pytest.raises(ValueError, match="whole number"):
        codec.encoder_stream(sample_rate=44_100.5)
    with pytest.raises(AudioError, match="cannot resample"):
        codec.decoder_stream(sample_rate=3)


@pytest.mark.parametrize("lost", [(100, 101), (100, 109), (0, 1), (0, 200), (250, 10**9)])
def test_a_loss_changes_no_length_and_nothing_before_it(codec, speech, lost):
    tokens = codec.encode(speech[:, : 270 * 270])
    start, end = lost[0], min(lost[1], tokens.shape[1])
    samples = decoded(codec, tokens, (start, end))
    intact = codec.decode(tokens)
    assert samples.shape == intact.shape
    before = max(0, start - codec.config.decoder_delay) * codec.hop_length
    assert np.allclose(samples[:, :before], intact[:, :before], rtol=0, atol=1e-5)


def test_each_push_gives_as_many_samples_as_it_takes_tokens_lost_or_not(codec, speech):
    tokens = codec.encode(speech)[:, :60]
    stream, n = codec.decoder_stream(), 0
    for i in range(60):
        part = stream.push_lost(1) if i % 7 in (0, 3, 4) else stream.push(tokens[:, i : i + 1])
        n += part.shape[1]
        assert n == max(0, i + 1 - codec.config.decoder_delay) * codec.hop_length
    assert stream.push_lost(0).shape == (1, 0)
    assert n + stream.flush().shape[1] == 60 * codec.hop_length
    with pytest.raises(ValueError, match="negative"):
        stream.push_lost(-1)


def test_how_a_loss_is_cut_changes_nothing(codec, speech):
    tokens = codec.encode(speech)[:, :200]
    whole = decoded(codec, tokens, (100, 160))
    stream = codec.decoder_stream()
    parts = [stream.push(tokens[:, :100])]
    parts += [stream.push_lost(n) for n in (1, 2, 7, 0, 20, 30)]
    parts += [stream.push(tokens[:, 160:]), stream.flush()]
    assert np.allclose(np.concatenate(parts, 1), whole, rtol=0, atol=1e-5)


def test_a_loss_sounds_on_then_fades_then_is_silent(codec, speech):
    tokens = codec.encode(speech)
    hop, rate = codec.hop_length, codec.frame_rate
    loud = np.convolve(np.abs(speech[0]), np.ones(1600), "valid")
    start = int(np.argmax(loud[: len(loud) // 2])) // hop
    end = start + round(0.3 * rate)
    samples = decoded(codec, tokens, (start, end))
    at = start * hop
    hold, silent = round(HOLD * 16_000), round((HOLD + FADE) * 16_000) + hop
    assert level(samples[:, at : at + hold - hop]) > 0.3 * level(samples[:, at - hold : at])
    assert not samples[:, at + silent : end * hop].any()
    # No click: no step is larger than those of the speech itself.
    step = np.abs(np.diff(samples))
    assert step[:, at : end * hop + hop].max() <= 1.5 * np.abs(np.diff(codec.decode(tokens))).max()


@pytest.mark.parametrize("seconds", [0.018, 0.06, 0.2, 0.5])
def test_after_a_loss_the_decoder_comes_back_to_the_undisturbed_one(codec, speech, seconds):
    tokens = codec.encode(speech)
    intact, hop = codec.decode(tokens), codec.hop_length
    n = max(1, round(seconds * codec.frame_rate))
    ratios = []
    for start in range(60, tokens.shape[1] - n - 200 * 96 // hop, 97 * 96 // hop):
        error = decoded(codec, tokens, (start, start + n)) - intact
        after = slice((start + n) * hop + 1600, (start + n) * hop + 1600 + 3200)
        ratios.append(20 * np.log10(level(intact[:, after]) / (level(error[:, after]) + 1e-9)))
    assert np.median(ratios) > (20 if seconds <= 0.06 else 12)


def test_noise_after_a_long_loss_is_that_of_its_place():
    codec = Codec.from_pretrained("speech-3k", threads=1)
    tokens = np.full((1, 1200), 125_023)
    samples = decoded(codec, tokens, (50, 700))
    error = (samples - codec.decode(tokens))[:, 1100 * 96 :]
    assert np.abs(error).max() < 1e-3


def test_a_stream_on_which_nothing_ever_arrives_is_silent(codec):
    stream = codec.decoder_stream(2)
    parts = [stream.push_lost(5), stream.push_lost(6), stream.flush()]
    samples = np.concatenate(parts, 1)
    assert samples.shape == (2, 11 * codec.hop_length) and not samples.any()


def test_a_loss_at_the_end_is_concealed_up_to_the_end(codec, speech):
    tokens = codec.encode(speech)[:, :100]
    samples = decoded(codec, tokens, (97, 100))
    assert samples.shape[1] == 100 * codec.hop_length


def test_what_is_lost_is_predicted_by_the_entropy_tables(speech):
    """Closer to the truth than the last token, in the digits of FSP, over many single losses."""
    codec = Codec.from_pretrained("speech-3k", threads=1)
    tokens = codec.encode(speech)
    radix = np.cumprod([1, 9, 9, 9, 7, 7])
    levels = np.array([9, 9, 9, 7, 7, 7])

    def error(found: np.ndarray, start: int) -> float:
        digits = [x[0, :, None] // radix % levels for x in (found, tokens[:, start : start + 3])]
        return float(np.abs(digits[0] - digits[1]).mean())

    starts = range(64, tokens.shape[1] - 3, 20)
    predicted = [error(codec.coder.predict(tokens[:, i - 64 : i], 3), i) for i in starts]
    repeated = [error(np.repeat(tokens[:, i - 1 : i], 3, 1), i) for i in starts]
    assert np.mean(predicted) < 0.85 * np.mean(repeated)


def test_losses_cost_less_than_the_repeated_token(speech):
    """SNR where 18 ms are lost now and then, against the intact decoder."""
    codec = Codec.from_pretrained("speech-3k", threads=1)
    tokens = codec.encode(speech)
    intact = codec.decode(tokens)
    lost = [(start, start + 3) for start in range(64, tokens.shape[1] - 3, 40)]
    last = tokens.copy()
    for start, end in lost:
        last[:, start:end] = last[:, start - 1 : start]
    ours = level(decoded(codec, tokens, *lost) - intact)
    assert ours < 0.9 * level(codec.decode(last) - intact)
