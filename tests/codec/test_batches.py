"""Lists of clips and padded batches: what comes out is what single clips give."""

from __future__ import annotations

import numpy as np
import pytest

from vpcodec import AudioCodec, Codec
from vpcodec.codec import PaddedBatch

LENGTHS = (0, 1, 96, 97, 20_000, 8_001, 31_111)
TIES = 2e-3  # share of tokens that float rounding at a cell's edge may change


@pytest.fixture(scope="module")
def codec() -> AudioCodec:
    return AudioCodec.from_pretrained("speech-3k")


@pytest.fixture
def clips(speech: np.ndarray) -> list[np.ndarray]:
    return [speech[0, 1_000 * i :][:n] for i, n in enumerate(LENGTHS)]


@pytest.fixture
def tokens(codec: AudioCodec, clips: list[np.ndarray]) -> list[np.ndarray]:
    return [codec.encode(clip) for clip in clips]


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return len(found) == len(expected) and all(map(np.array_equal, found, expected))


def test_a_list_gives_the_tokens_of_single_clips(codec, clips, tokens):
    assert same(codec.encode(clips), tokens)
    assert same(codec.encode(tuple(clips)), tokens)


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_so_do_clips_that_go_through_the_graph_together(codec, clips, tokens, batch_size):
    found = codec.encode(clips, batch_size=batch_size)
    assert [x.shape for x in found] == [x.shape for x in tokens]
    assert np.mean(np.hstack(found) != np.hstack(tokens)) <= TIES


@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_list_gives_the_samples_of_single_clips(codec, tokens, batch_size):
    lengths = [x.shape[1] * 96 - (x.shape[1] > 9) for x in tokens]
    found = codec.decode(tokens, lengths, batch_size=batch_size)
    assert [x.shape for x in found] == [(1, n) for n in lengths]
    for x, one, n in zip(found, tokens, lengths):
        assert np.abs(x - codec.decode(one, n)).max(initial=0) < 1e-5


def test_clips_of_other_rates_and_channels(codec, speech):
    clips = [speech[:, :30_000], np.vstack([speech[0, :9_000], speech[0, 9_000:18_000]])]
    found = codec.encode(clips, 44_100, batch_size=2)
    alone = [codec.encode(clip, 44_100) for clip in clips]
    assert [x.shape for x in found] == [x.shape for x in alone]
    assert np.mean(np.hstack([x.ravel() for x in found]) != np.hstack([*map(np.ravel, alone)])) <= (
        TIES
    )


def test_there_may_be_more_channels_than_a_stream_takes(codec, speech):
    clips = [speech[:, :500]] * 300
    found = codec.encode(clips, batch_size=300)
    assert len(found) == 300 and same(found[:1] * 300, found)


def test_padding_comes_with_lengths_and_a_mask(codec, clips, tokens):
    batch = codec.encode(clips, padding=True)
    assert isinstance(batch, PaddedBatch)
    values, lengths, mask = batch
    assert values.dtype == np.int64 and values.shape == (7, 1, max(x.shape[1] for x in tokens))
    assert lengths.tolist() == [x.shape[1] for x in tokens]
    assert mask.dtype == bool and mask.sum(1).tolist() == lengths.tolist()
    assert same([row[:, keep] for row, keep in zip(values, mask)], tokens)
    assert (values[:, 0][~mask] == codec.special_tokens.pad).all()


def test_a_padded_batch_comes_back(codec, clips, tokens):
    batch = codec.encode(clips, padding=True)
    assert same(codec.decode(batch), codec.decode(tokens))
    samples = codec.decode(batch, padding=True)
    assert (samples.values[:, 0][~samples.mask] == 0).all()
    assert same(codec.encode(samples), codec.encode(codec.decode(tokens)))


def test_a_single_clip_can_be_padded(codec, clips, tokens):
    batch = codec.encode(clips[-1], padding=True)
    assert np.array_equal(batch.values, tokens[-1][None]) and batch.mask.all()


def test_an_empty_list(codec):
    assert codec.encode([]) == [] == codec.decode([])
    with pytest.raises(ValueError, match="^no clips cannot be padded"):
        codec.encode([], padding=True)


@pytest.mark.parametrize(
    "call, reason",
    [
        (lambda c: c.encode([np.zeros(9), np.array([np.nan])]), "^clip 1: samples hold NaN"),
        (lambda c: c.decode([np.array([3]), np.array([1, 250_047])]),
         r"^clip 1: token 250047 at channel 0, frame 1 is outside \[0, 250047\)"),
        (lambda c: c.decode([np.array([3])], [97]), "^clip 0: n_samples is 97"),
        (lambda c: c.decode([np.array([3])], [9, 9]), "^2 lengths for 1 clips"),
        (lambda c: c.encode([np.zeros(9)], batch_size=0), "^batch_size must be at least 1"),
        (lambda c: c.encode([np.zeros((1, 9)), np.zeros((2, 9))], padding=True), "1 and 2 ch"),
        (lambda c: c.decode(PaddedBatch(np.zeros((1, 1, 5), int), [6], None)), "do not fit"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_clip(codec, call, reason):
    with pytest.raises(ValueError, match=reason):
        call(codec)


def test_tensors_for_tensors(codec, clips, tokens):
    torch = pytest.importorskip("torch", reason="needs the train extra")
    tensors = [torch.tensor(clip) for clip in clips]
    one = codec.encode(tensors[-1])
    assert torch.is_tensor(one) and np.array_equal(one.numpy(), tokens[-1])
    found = codec.encode([*tensors[:-1], clips[-1]])
    assert [torch.is_tensor(x) for x in found] == [True] * 6 + [False]
    assert same([np.asarray(x) for x in found], tokens)
    batch = codec.encode(tensors, padding=True)
    assert torch.is_tensor(batch.values) and torch.is_tensor(batch.mask)
    audio = codec.decode(batch)
    assert all(map(torch.is_tensor, audio))
    assert same([x.numpy() for x in audio], codec.decode(tokens))
    digits = codec.split_tokens(one)
    assert torch.is_tensor(digits) and torch.equal(codec.join_tokens(digits), one)


@pytest.mark.parametrize("name", ["speech-3k", "speech-vp-16384", "image-fsp"])
def test_digits(name):
    codec = Codec.from_pretrained(name)
    levels = codec.token_levels
    assert np.prod(levels) == codec.codebook_size
    every = np.arange(codec.codebook_size)
    digits = codec.split_tokens(every)
    assert digits.shape == (codec.codebook_size, len(levels)) and digits.dtype == np.int64
    assert digits.min(0).tolist() == [0] * len(levels)
    assert (digits.max(0) + 1).tolist() == list(levels)
    assert np.array_equal(codec.join_tokens(digits), every)


def test_digits_are_those_of_the_quantizer(codec):
    """Tokens that differ in one digit have codes that differ in one dimension."""
    torch = pytest.importorskip("torch", reason="needs the train extra")
    from vpcodec.quantizers import FSP

    assert codec.token_levels == (9, 9, 9, 7, 7, 7)
    quantizer = FSP(levels=codec.token_levels)
    digits = codec.split_tokens(np.array([123_456, 123_456]))
    for i in range(6):
        other = digits.copy()
        other[1, i] = (other[1, i] + 1) % codec.token_levels[i]
        codes = quantizer.tokens_to_latents(torch.tensor(codec.join_tokens(other)))
        assert (codes[0] != codes[1]).nonzero().flatten().tolist() == [i]


@pytest.mark.parametrize(
    "call, reason",
    [
        (lambda c: c.split_tokens([[0, 1], [2, -1]]), r"^token -1 at \[1, 1\] is outside"),
        (lambda c: c.join_tokens([[0, 0, 0, 7, 0, 0]]), r"^digit 3: 7 at \[0\] is outside"),
        (lambda c: c.join_tokens([[0, 0]]), r"^digits must be \(..., 6\), got shape \(1, 2\)"),
        (lambda c: c.split_tokens(np.array([0.5])), "^tokens must be integers, got float64"),
    ],
)  # fmt: skip
def test_wrong_digits_are_named(codec, call, reason):
    with pytest.raises(ValueError, match=reason):
        call(codec)


def test_special_tokens_come_after_the_codebook(codec):
    special = codec.special_tokens
    assert tuple(special) == (250_047, 250_048, 250_049) and special.vocabulary_size == 250_050
    with pytest.raises(ValueError, match="token 250048 at channel 0, frame 1 is outside"):
        codec.decode(np.array([5, special.eos]))


def test_clips_of_similar_lengths_go_through_the_graph_together(codec, clips, monkeypatch):
    rows, encode = [], codec.backend.encode
    monkeypatch.setattr(
        codec.backend, "encode", lambda x, state: rows.append(len(x)) or encode(x, state)
    )
    codec.encode(clips, batch_size=3)
    assert set(rows) == {3, 1}
    rows.clear()
    codec.encode(clips)
    assert set(rows) == {1}
