"""The invariants of encoding and decoding, as arrays, streams and files."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from helpers import Pipe, blocks, flipped
from paths import ROOT

from vpcodec import Codec, read_tokens
from vpcodec.codec import FileStats
from vpcodec.codec.audio import FILE_BLOCK
from vpcodec.codec.streams import chunk_frames
from vpcodec.media.audio import RawFormat, load, resample, save
from vpcodec.tokenfile import (
    AudioHeader,
    GapError,
    TokenFileError,
    TokenReader,
    TokenWriter,
    verify,
)

LENGTHS = [0, 1, 95, 96, 97, *np.random.default_rng(0).integers(98, 9_000, 3).tolist()]
RATES = [8_000, 22_050, 44_100, 48_000, 96_000]
TIES = 2e-3  # share of tokens that float rounding at a cell's edge may change


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.from_pretrained()


@pytest.fixture
def stereo(speech: np.ndarray) -> np.ndarray:
    """Two different channels of speech, 2 s."""
    return np.concatenate([speech[:, 4_000:36_000], -0.5 * speech[:, 30_000:62_000]])


def pieces(n: int, seed: int = 0) -> list[int]:
    """Random cuts of n into odd pieces, empty ones too."""
    rng = np.random.default_rng(seed)
    cuts = [0]
    while cuts[-1] < n:
        cuts.append(min(n, cuts[-1] + int(rng.choice([0, 1, 7, 95, 96, 97, 1_000, 5_003]))))
    return cuts


def share(a: np.ndarray, b: np.ndarray) -> float:
    """Share of tokens that differ."""
    assert a.shape == b.shape
    return float(np.mean(a != b))


# ------------------------------------------------------------------------------------ I1, lengths


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("n", LENGTHS)
def test_lengths(codec: Codec, stereo: np.ndarray, n: int, channels: int) -> None:
    tokens = codec.encode(stereo[:channels, :n])
    assert tokens.dtype == np.int64
    assert tokens.shape == (channels, -(-n // codec.hop_length))
    samples = codec.decode(tokens, n)
    assert samples.dtype == np.float32
    assert samples.shape == (channels, n)
    assert codec.decode(tokens).shape == (channels, tokens.shape[1] * codec.hop_length)


@pytest.mark.parametrize("rate", [11_025, *RATES])
@pytest.mark.parametrize("n", [0, 1, 13_001])
def test_lengths_at_other_rates(codec: Codec, speech: np.ndarray, n: int, rate: int) -> None:
    tokens = codec.encode(speech[:, 8_000 : 8_000 + n], rate)
    model_samples = -(-n * 16_000 // rate)
    assert tokens.shape == (1, -(-model_samples // codec.hop_length))


def test_one_dimension_is_one_channel(codec: Codec, speech: np.ndarray) -> None:
    tokens = codec.encode(speech[0, :5_000])
    assert np.array_equal(tokens, codec.encode(speech[:, :5_000]))
    assert np.array_equal(codec.decode(tokens[0]), codec.decode(tokens))


def test_facts_agree(codec: Codec) -> None:
    assert codec.frame_rate == codec.sample_rate / codec.hop_length
    assert codec.bitrate == pytest.approx(codec.frame_rate * np.log2(codec.codebook_size))
    assert codec.latency == pytest.approx((1 + codec.config.decoder_delay) / codec.frame_rate)
    assert len(codec.fingerprint) == 16


def test_tokens_stay_in_the_codebook_and_samples_in_range(codec: Codec) -> None:
    rng = np.random.default_rng(1)
    loud = (10 * rng.standard_normal((1, 9_600))).astype(np.float32)
    tokens = codec.encode(loud)
    assert 0 <= tokens.min() and tokens.max() < codec.codebook_size
    anything = rng.integers(0, codec.codebook_size, (1, 100))
    anything[0, :2] = 0, codec.codebook_size - 1
    assert np.abs(codec.decode(anything)).max() <= 1


def test_decoded_speech_follows_the_speech(codec: Codec, speech: np.ndarray) -> None:
    """The loudness of both in time: a decoder that is late or deaf fails."""
    decoded = codec.decode(codec.encode(speech), speech.shape[1])

    def loudness(x: np.ndarray, shift: int = 0) -> np.ndarray:
        x = np.roll(x[0], shift)
        return np.log10(np.square(x[: len(x) // 160 * 160]).reshape(-1, 160).mean(1) + 1e-5)

    def agreement(shift: int) -> float:
        return float(np.corrcoef(loudness(speech), loudness(decoded, shift))[0, 1])

    assert agreement(0) > 0.9
    assert agreement(0) > max(agreement(-320), agreement(320))


# ------------------------------------------------------------------------------- I2, independence


@pytest.mark.parametrize("seconds", [0.006, 0.05, 0.37, 100])
def test_chunk_size_changes_nothing(
    codec: Codec, stereo: np.ndarray, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    tokens = codec.encode(stereo)
    samples = codec.decode(tokens)
    monkeypatch.setattr("vpcodec.codec.streams.CHUNK_SECONDS", seconds)
    assert chunk_frames(codec.config) == max(1, round(seconds * codec.frame_rate))
    assert np.array_equal(codec.encode(stereo), tokens)
    assert np.allclose(codec.decode(tokens), samples, rtol=0, atol=1e-5)


def test_channels_do_not_touch_each_other(codec: Codec, stereo: np.ndarray) -> None:
    tokens = codec.encode(stereo)
    samples = codec.decode(tokens)
    for channel in (0, 1):
        alone = codec.encode(stereo[channel])
        assert np.array_equal(alone[0], tokens[channel])
        assert np.allclose(codec.decode(alone)[0], samples[channel], rtol=0, atol=1e-5)


@pytest.mark.parametrize("tail", ["silence", "noise"])
def test_what_follows_does_not_change_tokens(codec: Codec, speech: np.ndarray, tail: str) -> None:
    n = 20_000  # in the middle of a frame
    after = np.zeros((1, 7_000), np.float32)
    if tail == "noise":
        after = np.random.default_rng(2).uniform(-1, 1, after.shape).astype(np.float32)
    longer = codec.encode(np.concatenate([speech[:, :n], after], 1))
    whole = n // codec.hop_length
    assert np.array_equal(longer[:, :whole], codec.encode(speech[:, :n])[:, :whole])


def test_encoder_stream_is_encode(codec: Codec, stereo: np.ndarray) -> None:
    stream = codec.encoder_stream(2)
    parts, got = [], 0
    cuts = pieces(stereo.shape[1])
    for start, end in zip(cuts[:-1], cuts[1:]):
        parts.append(stream.push(stereo[:, start:end]))
        got += parts[-1].shape[1]
        assert got == end // codec.hop_length  # no complete frame is held back
    parts.append(stream.flush())
    assert np.array_equal(np.concatenate(parts, 1), codec.encode(stereo))


def test_decoder_stream_is_decode(codec: Codec, stereo: np.ndarray) -> None:
    tokens = codec.encode(stereo)
    stream = codec.decoder_stream(2)
    parts, got = [], 0
    cuts = pieces(tokens.shape[1], seed=3)
    for start, end in zip(cuts[:-1], cuts[1:]):
        parts.append(stream.push(tokens[:, start:end]))
        got += parts[-1].shape[1]
        assert got == max(0, end - codec.config.decoder_delay) * codec.hop_length
    parts.append(stream.flush())
    samples = np.concatenate(parts, 1)
    assert samples.shape == (2, tokens.shape[1] * codec.hop_length)
    assert np.allclose(samples, codec.decode(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 3])
def test_short_decoder_streams(codec: Codec, n_tokens: int) -> None:
    stream = codec.decoder_stream()
    tokens = np.arange(n_tokens)[None]
    samples = np.concatenate([stream.push(tokens), stream.flush()], 1)
    assert samples.shape == (1, n_tokens * codec.hop_length)
    assert np.allclose(samples, codec.decode(tokens), rtol=0, atol=1e-5)


def test_flush_starts_anew(codec: Codec, speech: np.ndarray) -> None:
    part = speech[:, 10_000:17_050]
    encoder, decoder = codec.encoder_stream(), codec.decoder_stream()
    first, second = (np.concatenate([encoder.push(part), encoder.flush()], 1) for _ in range(2))
    assert np.array_equal(first, second)
    one, two = (np.concatenate([decoder.push(first), decoder.flush()], 1) for _ in range(2))
    assert np.array_equal(one, two)
    assert encoder.flush().shape == (1, 0)
    assert decoder.flush().shape == (1, 0)


def test_streams_of_one_codec_are_apart(codec: Codec, stereo: np.ndarray) -> None:
    streams = [codec.encoder_stream(), codec.encoder_stream()]
    parts: list[list[np.ndarray]] = [[], []]
    for start in range(0, stereo.shape[1], 5_000):
        for channel in (0, 1):
            parts[channel].append(streams[channel].push(stereo[channel, start : start + 5_000]))
    for channel in (0, 1):
        tokens = np.concatenate([*parts[channel], streams[channel].flush()], 1)
        assert np.array_equal(tokens, codec.encode(stereo[channel]))


def test_threads_change_nothing(speech: np.ndarray) -> None:
    one, two = (Codec.from_pretrained(threads=threads) for threads in (1, 2))
    tokens = one.encode(speech)
    assert share(tokens, two.encode(speech)) <= TIES
    assert np.allclose(one.decode(tokens), two.decode(tokens), rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------- I3, memory

MEASURE = """
import sys
from vpcodec.cli import main
try:
    main()
finally:
    status = open("/proc/self/status").read()
    print(status.split("VmHWM:")[1].split()[0], file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads peak memory from /proc, which is Linux's"
)
def test_memory_does_not_grow(speech: np.ndarray) -> None:
    minute = np.resize(np.rint(speech[0] * 32767).astype("<i2"), 60 * 16_000)
    peaks = []
    for minutes in (1, 6):
        data = np.tile(minute, minutes).tobytes()
        n_bytes = len(data)
        for command in (["encode", "-", "--raw", "s16"], ["decode", "-", "-", "--raw", "s16"]):
            done = subprocess.run(
                [sys.executable, "-c", MEASURE, *command], input=data, capture_output=True
            )
            assert done.returncode == 0, done.stderr
            data = done.stdout
            peaks.append(int(done.stderr.split()[-1]) / 1024)
        assert len(data) == n_bytes
    assert max(peaks) < 500
    assert peaks[2] - peaks[0] < 30 and peaks[3] - peaks[1] < 30


# ----------------------------------------------------------------------------------- I5, backends


def test_backends_agree(codec: Codec, speech: np.ndarray) -> None:
    pytest.importorskip("torch", reason="needs the train extra")
    other = Codec.from_pretrained(backend="torch", device="cpu")
    tokens = codec.encode(speech)
    assert share(tokens, other.encode(speech)) <= TIES
    assert np.allclose(codec.decode(tokens), other.decode(tokens), rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------ files


@pytest.fixture
def sound(stereo: np.ndarray, tmp_path: Path) -> Path:
    """A WAV of two channels, 16 kHz, 2 s."""
    path = tmp_path / "sound.wav"
    save(path, stereo, 16_000)
    return path


@pytest.fixture
def long_tok(codec: Codec, speech: np.ndarray, tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A token file of six blocks, the last one shorter, and the decoded audio, 16 kHz."""
    samples = np.tile(speech, 16)[:, : 5 * FILE_BLOCK * codec.hop_length + 10_001]
    save(tmp_path / "long.wav", samples, 16_000)
    codec.encode_file(tmp_path / "long.wav", tmp_path / "long.tok")
    codec.decode_file(tmp_path / "long.tok", tmp_path / "whole.wav")
    return tmp_path / "long.tok", load(tmp_path / "whole.wav")[0]


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", [16_000, *RATES])
def test_files_are_as_arrays(
    codec: Codec, speech: np.ndarray, tmp_path: Path, rate: int, channels: int
) -> None:
    """Rate, channels, their order and the exact length come back."""
    n = rate // 2 + 7
    gains = np.linspace(1, 0.1, channels, dtype=np.float32)[:, None]
    save(tmp_path / "in.wav", gains * resample(speech[:, 9_000:], 16_000, rate)[:, :n], rate)
    samples, _ = load(tmp_path / "in.wav")

    stats = codec.encode_file(tmp_path / "in.wav", tmp_path / "in.tok")
    tokens, header = read_tokens(tmp_path / "in.tok")
    assert np.array_equal(tokens, codec.encode(samples, rate))
    size = (tmp_path / "in.tok").stat().st_size
    assert stats == FileStats(n, rate, channels, tokens.shape[1], size)
    assert stats.seconds == n / rate
    assert stats.bitrate == pytest.approx(8 * size * rate / n)
    assert (header.n_samples, header.original_rate, header.channels) == (n, rate, channels)
    assert (header.model, header.fingerprint) == (codec.name, codec.space[:8])

    assert codec.decode_file(tmp_path / "in.tok", tmp_path / "out.wav") == stats
    out, out_rate = load(tmp_path / "out.wav")
    expected = codec.decode(tokens, -(-n * 16_000 // rate))
    if rate != 16_000:
        expected = resample(expected, 16_000, rate)[:, :n]
    assert (out_rate, out.shape) == (rate, (channels, n))
    assert np.allclose(out, np.clip(expected, -1, 1), rtol=0, atol=1e-3)


def test_pipes_are_as_files(codec: Codec, sound: Path, tmp_path: Path) -> None:
    """A WAV whose header does not know its length, through streams that cannot seek."""
    samples, rate = load(sound)
    wav = io.BytesIO()
    save(wav, samples, rate)  # to a stream: of unknown size
    piped = io.BytesIO()
    stats = codec.encode_file(Pipe(wav.getvalue()), piped)
    file_stats = codec.encode_file(sound, tmp_path / "sound.tok")
    tokens, header = read_tokens(io.BytesIO(piped.getvalue()))
    assert np.array_equal(tokens, read_tokens(tmp_path / "sound.tok")[0])
    assert header.n_samples == samples.shape[1]
    assert TokenReader(io.BytesIO(piped.getvalue())).header.n_samples is None
    assert stats == replace(file_stats, n_bytes=len(piped.getvalue()))

    out = io.BytesIO()
    assert codec.decode_file(Pipe(piped.getvalue()), out, raw="f32") == stats
    decoded = np.frombuffer(out.getvalue(), "<f4").reshape(-1, 2).T
    assert np.allclose(decoded, codec.decode(tokens, samples.shape[1]), rtol=0, atol=1e-5)


def test_raw_input(codec: Codec, stereo: np.ndarray) -> None:
    raw = Pipe(stereo.T.astype("<f4").tobytes())
    out = io.BytesIO()
    codec.encode_file(raw, out, raw=RawFormat(16_000, 2, "f32"))
    tokens, _ = read_tokens(io.BytesIO(out.getvalue()))
    assert np.array_equal(tokens, codec.encode(stereo))


def test_output_rate_and_subtype(codec: Codec, sound: Path, tmp_path: Path) -> None:
    codec.encode_file(sound, tmp_path / "a.tok")
    stats = codec.decode_file(tmp_path / "a.tok", tmp_path / "b.wav", rate=44_100, subtype="FLOAT")
    samples, rate = load(tmp_path / "b.wav")
    assert (stats.n_samples, stats.sample_rate) == (32_000, 16_000)  # of the original
    assert (rate, samples.shape) == (44_100, (2, 88_200))


@pytest.mark.parametrize("n", [0, 1])
def test_nearly_no_audio(codec: Codec, tmp_path: Path, n: int) -> None:
    save(tmp_path / "a.wav", np.zeros((1, n)), 44_100)
    stats = codec.encode_file(tmp_path / "a.wav", tmp_path / "a.tok")
    assert (stats.n_samples, stats.n_frames, verify(tmp_path / "a.tok").ok) == (n, n, True)
    assert codec.decode_file(tmp_path / "a.tok", tmp_path / "b.wav").n_samples == n
    assert load(tmp_path / "b.wav")[0].shape == (1, n)


# ---------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("number", [0, 2, 5])
def test_recovery(codec: Codec, long_tok: tuple[Path, np.ndarray], number: int) -> None:
    path, whole = long_tok
    span = blocks(path)
    assert len(span) == 6
    path.write_bytes(flipped(path.read_bytes(), span[number][0] + 40))
    stats = codec.decode_file(path, path.parent / "part.wav", recover=True)
    part, _ = load(path.parent / "part.wav")
    assert stats.damaged == 1
    assert part.shape == whole.shape

    hop = codec.hop_length
    start, end = number * FILE_BLOCK * hop, min((number + 1) * FILE_BLOCK * hop, whole.shape[1])
    clean = max(0, start - codec.config.decoder_delay * hop)  # then the look-ahead is missing
    assert np.allclose(part[:, :clean], whole[:, :clean], rtol=0, atol=1e-4)
    assert not part[:, start:end].any()
    later = slice(end + 16_000, None)  # the decoder has its past again
    if number < 5:
        assert np.corrcoef(part[0, later], whole[0, later])[0, 1] > 0.95


def test_recovery_of_a_truncated_file(codec: Codec, long_tok: tuple[Path, np.ndarray]) -> None:
    path, whole = long_tok
    path.write_bytes(path.read_bytes()[: blocks(path)[3][0] + 5])
    with pytest.raises(TokenFileError):
        codec.decode_file(path, path.parent / "part.wav")
    stats = codec.decode_file(path, path.parent / "part.wav", recover=True)
    part, _ = load(path.parent / "part.wav")
    assert (stats.damaged, part.shape) == (3, whole.shape)
    end = (3 * FILE_BLOCK - codec.config.decoder_delay) * codec.hop_length
    assert np.allclose(part[:, :end], whole[:, :end], rtol=0, atol=1e-4)
    assert not part[:, 3 * FILE_BLOCK * codec.hop_length :].any()


def test_gaps_have_a_limit(codec: Codec, long_tok: tuple[Path, np.ndarray]) -> None:
    """A gap counts by itself: what lies between two of them does not."""
    path, whole = long_tok
    target, data = path.parent / "part.wav", bytearray(path.read_bytes())
    seconds = FILE_BLOCK / codec.frame_rate
    for number in (1, 2, 4):
        data[blocks(path)[number][0] + 40] ^= 4
    path.write_bytes(data)
    with pytest.raises(GapError, match=rf"in a row are lost, from {seconds:.2f} s on"):
        codec.decode_file(path, target, recover=True, max_gap=1.9 * seconds)
    assert not target.exists()
    stats = codec.decode_file(path, target, recover=True, max_gap=2 * seconds)
    assert (stats.damaged, load(target)[0].shape) == (3, whole.shape)


@pytest.mark.parametrize(
    ("n_samples", "block_frames"),
    [(10**12, 2**16 - 1), (61 * 16_000, 2**16 - 1), (61 * 16_000, 512)],
)
def test_length_that_only_the_header_claims(
    codec: Codec, tmp_path: Path, n_samples: int, block_frames: int
) -> None:
    """A header makes no minutes of silence, be it that of a file of one block or of several."""
    header = AudioHeader(
        model=codec.name, fingerprint=codec.space, sample_rate=16_000, original_rate=16_000,
        channels=1, n_samples=n_samples, hop_length=codec.hop_length,
        codebook_size=codec.codebook_size, block_frames=block_frames,
    )  # fmt: skip
    with open(tmp_path / "a.tok", "wb") as file:
        writer = TokenWriter(file, header)
        if header.n_frames <= block_frames:
            writer.write(np.zeros((1, header.n_frames), np.int64))
            writer.close()
            file.truncate(50)
    with pytest.raises(GapError, match="more than 60 s in a row are lost, from 0.00 s on"):
        codec.decode_file(tmp_path / "a.tok", tmp_path / "a.wav", recover=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tok"]


# ------------------------------------------------------------------------------------- bad arrays


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (np.array([0, np.nan, 0], np.float32), "NaN"),
        (np.array([0, -np.inf], np.float32), "NaN or infinite"),
        (np.zeros(100, np.uint8), "got uint8"),
        (np.zeros(100, np.int64), "got int64"),
        (np.zeros((1, 2, 3), np.float32), r"\(1, 2, 3\)"),
        (np.float32(0.5), r"shape \(\)"),
        (np.zeros((0, 100), np.float32), r"\(0, 100\)"),
        (np.array(["a"]), "<U1"),
    ],
)
def test_bad_samples(codec: Codec, samples: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        codec.encode(samples)


@pytest.mark.parametrize("rate", [0, -8_000, 1])
def test_bad_rates(codec: Codec, rate: int) -> None:
    with pytest.raises(ValueError, match=f"from {rate} Hz"):
        codec.encode(np.zeros(100, np.float32), rate)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([[0, -1]], "-1"),
        ([[0.0, 1.0]], "float64"),
        ([[True, False]], "bool"),
        (np.zeros((1, 2, 3), int), r"\(1, 2, 3\)"),
        (np.zeros((0, 3), int), r"\(0, 3\)"),
        (np.array([[2**64 - 1]], np.uint64), str(2**64 - 1)),
    ],
)
def test_bad_tokens(codec: Codec, tokens: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        codec.decode(np.asarray(tokens))


@pytest.mark.parametrize("n_samples", [-1, 193, 10**12])
def test_bad_n_samples(codec: Codec, n_samples: int) -> None:
    with pytest.raises(ValueError, match=str(n_samples)):
        codec.decode(np.zeros((1, 2), int), n_samples)


@pytest.mark.parametrize("samples", [[[0.0, 0.1], [0.2]], [[0.0, 0.1], np.zeros(3)]])
def test_ragged_lists(codec: Codec, samples: list) -> None:
    with pytest.raises(ValueError, match="^samples must be an array, but the rows differ"):
        codec.encode(samples)
    with pytest.raises(ValueError, match="^tokens must be an array, but the rows differ"):
        codec.decode([[1, 2], [3]])


def test_untransposed_arrays_are_refused_before_they_cost_memory(codec: Codec) -> None:
    """Views of one sample: gigabytes if they were copied."""
    samples = np.broadcast_to(np.float32(0.1), (10**10, 2))
    for take in (codec.encode, codec.encoder_stream().push):
        with pytest.raises(ValueError, match=r"10,000,000,000 channels.*transpose\?"):
            take(samples)
    tokens = np.broadcast_to(np.int64(1), (10**10, 1))
    for take in (codec.decode, codec.decoder_stream().push):
        with pytest.raises(ValueError, match=r"10,000,000,000 channels.*transpose\?"):
            take(tokens)


def test_255_channels_are_not_too_many(codec: Codec) -> None:
    assert codec.encode(np.zeros((255, 96), np.float32)).shape == (255, 1)
    with pytest.raises(ValueError, match="256 channels"):
        codec.encode(np.zeros((256, 96), np.float32))


@pytest.mark.parametrize("dtype", ["int16", "int32"])
def test_integers_are_scaled_as_soundfile_does(
    codec: Codec, speech: np.ndarray, tmp_path: Path, dtype: str
) -> None:
    subtype = {"int16": "PCM_16", "int32": "PCM_32"}[dtype]
    save(tmp_path / "a.wav", speech[:, :8_000], 16_000, subtype=subtype)
    integers, _ = sf.read(tmp_path / "a.wav", dtype=dtype, always_2d=True)
    floats, _ = sf.read(tmp_path / "a.wav", dtype="float32", always_2d=True)
    expected = codec.encode(floats.T)
    assert np.array_equal(codec.encode(integers.T), expected)
    assert np.array_equal(codec.encode(integers[:, 0]), expected)
    stream = codec.encoder_stream()
    assert np.array_equal(np.hstack([stream.push(integers.T), stream.flush()]), expected)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int16"])
def test_tensors_of_torch(codec: Codec, speech: np.ndarray, kind: str) -> None:
    torch = pytest.importorskip("torch", reason="needs the train extra")
    samples = torch.tensor(speech[:, :8_000])
    samples = (samples * 2**15).short() if kind == "int16" else samples.to(getattr(torch, kind))
    if kind != "int16":
        samples.requires_grad_()
    plain = samples.float() / (2**15 if kind == "int16" else 1)
    tokens = codec.encode(samples)
    assert np.array_equal(tokens, codec.encode(plain.detach().numpy()))
    assert torch.equal(codec.decode(tokens), torch.tensor(codec.decode(tokens.numpy())))


WHOLE_RATES = [kind(44_100) for kind in (np.int64, np.int32, np.uint32, np.uint16)]
WHOLE_RATES += [44_100.0, np.float64(44_100), np.float32(44_100)]


@pytest.mark.parametrize("rate", WHOLE_RATES, ids=lambda rate: type(rate).__name__)
def test_whole_numbers_of_any_type_are_rates(codec: Codec, speech: np.ndarray, rate) -> None:
    samples = np.tile(speech, 2)  # so long that 16 and 32 bits would overflow
    assert np.array_equal(codec.encode(samples, rate), codec.encode(samples, 44_100))
    assert np.array_equal(resample(samples, rate, 16_000), resample(samples, 44_100, 16_000))
    raw = RawFormat(rate)
    target, data = io.BytesIO(), (speech[0] * 2**15).astype("<i2").tobytes()
    codec.encode_file(io.BytesIO(data), target, raw=raw)
    assert read_tokens(io.BytesIO(target.getvalue()))[1].original_rate == 44_100
    decoded = [io.BytesIO(), io.BytesIO()]
    for out, wanted in zip(decoded, (rate, 44_100)):
        codec.decode_file(io.BytesIO(target.getvalue()), out, rate=wanted)
    assert decoded[0].getvalue() == decoded[1].getvalue()


@pytest.mark.parametrize("rate", [44_100.5, "44100", np.nan, np.inf, [44_100, 48_000]])
def test_other_rates_are_refused(codec: Codec, rate: object) -> None:
    with pytest.raises(ValueError, match="whole number of Hz"):
        codec.encode(np.zeros(100, np.float32), rate)
    with pytest.raises(ValueError, match="whole number of Hz"):
        RawFormat(rate)


def test_wrong_channels_into_streams(codec: Codec) -> None:
    with pytest.raises(ValueError, match="2 channels, got 1"):
        codec.encoder_stream(2).push(np.zeros(10, np.float32))
    with pytest.raises(ValueError, match="1 channels, got 2"):
        codec.decoder_stream().push(np.zeros((2, 3), int))


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="'tflite'.*onnx, torch"):
        Codec.from_pretrained(backend="tflite")


# ----------------------------------------------------------------------------------------- noise


@pytest.fixture(scope="module")
def noisy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of recipes/debug.yaml, whose decoder has noise, with noise that can be heard."""
    torch = pytest.importorskip("torch", reason="needs the train extra")
    from vpcodec.export import export_model
    from vpcodec.models import AudioAutoencoder
    from vpcodec.recipe import load_recipe

    torch.manual_seed(0)
    model = AudioAutoencoder(load_recipe(ROOT / "recipes" / "debug.yaml").model)
    for layer in model.decoder.noise:
        torch.nn.init.normal_(layer.out.weight, std=0.5)
    folder = tmp_path_factory.mktemp("models") / "noisy"
    export_model(model, folder)
    return folder


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_a_part_has_the_noise_of_its_place_in_the_whole(noisy_model: Path, backend: str) -> None:
    codec = Codec.from_pretrained(noisy_model, backend=backend, threads=1)
    tokens = np.full((1, 1200), 60)  # so that only noise differs, once the history is full
    whole = codec.decode(tokens)
    hop, full = codec.hop_length, 300
    for first in (7, 499, 700):
        part = codec.decode(tokens[:, first:], first_frame=first)
        np.testing.assert_allclose(
            part[:, full * hop :], whole[:, (first + full) * hop :], rtol=0, atol=1e-4
        )
    elsewhere = codec.decode(tokens[:, 7:])
    difference = elsewhere[:, full * hop :] - whole[:, (7 + full) * hop :]
    assert np.abs(difference).max() > 0.01


@pytest.mark.parametrize("pieces", [(1, 1198, 1), (400, 400, 400), (7,) * 171 + (3,)])
def test_noise_does_not_depend_on_pieces_channels_or_backend(
    noisy_model: Path, pieces: tuple[int, ...]
) -> None:
    codec = Codec.from_pretrained(noisy_model, threads=1)
    tokens = np.random.default_rng(0).integers(codec.codebook_size, size=(2, 1200))
    whole = codec.decode(tokens)
    stream = codec.decoder_stream(2)
    parts = [stream.push(piece) for piece in np.split(tokens, np.cumsum(pieces)[:-1], 1)]
    found = np.concatenate([*parts, stream.flush()], 1)
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-4)
    np.testing.assert_allclose(codec.decode(tokens[1]), whole[1:], rtol=0, atol=1e-4)
    other = Codec.from_pretrained(noisy_model, backend="torch", threads=1)
    np.testing.assert_allclose(other.decode(tokens), whole, rtol=0, atol=1e-4)


def test_what_follows_a_damaged_block_has_the_noise_of_its_place(
    noisy_model: Path, tmp_path: Path
) -> None:
    codec = Codec.from_pretrained(noisy_model, threads=1)
    rng = np.random.default_rng(0)
    n = 3 * FILE_BLOCK * codec.hop_length
    save(tmp_path / "a.wav", 0.3 * rng.standard_normal((1, n)).astype(np.float32), 16_000)
    codec.encode_file(tmp_path / "a.wav", tmp_path / "a.tok")
    codec.decode_file(tmp_path / "a.tok", tmp_path / "whole.wav")
    span = blocks(tmp_path / "a.tok")
    data = (tmp_path / "a.tok").read_bytes()
    (tmp_path / "a.tok").write_bytes(flipped(data, span[0][0] + 40))
    codec.decode_file(tmp_path / "a.tok", tmp_path / "part.wav", recover=True)
    whole, part = (load(tmp_path / name)[0] for name in ("whole.wav", "part.wav"))
    later = (FILE_BLOCK + 400) * codec.hop_length  # the decoder has its past again
    np.testing.assert_allclose(part[:, later:], whole[:, later:], rtol=0, atol=1e-3)
