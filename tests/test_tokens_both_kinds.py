"""What holds for tokens of audio and of images alike: files, pipes, damage, other models."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from helpers import Pipe, blocks, flipped

from vpcodec import Codec, read_tokens
from vpcodec.codec import AudioCodec, ImageCodec
from vpcodec.hub import DEFAULT_MODEL
from vpcodec.media.audio import AudioError, load, save
from vpcodec.media.image import ImageError, load_image, save_image
from vpcodec.model_folder import ModelError
from vpcodec.tokenfile import (
    OtherWeightsError,
    TokenFileError,
    TokenReader,
    verify,
    write_tokens,
)

pytestmark = pytest.mark.slow


@dataclass
class Case:
    """A codec with a file that it codes to two channels of tokens in three blocks."""

    codec: Codec
    source: Path
    signal: np.ndarray
    suffix: str  # of what is decoded
    read: Callable[[object], np.ndarray]
    as_in_file: Callable[[np.ndarray], np.ndarray]  # what codec.decode gives, cut and quantized
    n_frames: int
    total: int  # samples or pixels, as progress counts them
    error: type[Exception]  # of files that cannot be read or written

    @property
    def tok(self) -> Path:
        return self.source.with_suffix(".tok")

    @property
    def out(self) -> Path:
        return self.source.with_name(f"out{self.suffix}")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of several blocks."""
    monkeypatch.setattr("vpcodec.codec.image.BLOCK_TOKENS", 512)


@pytest.fixture(params=["audio", "image"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    if request.param == "audio":
        speech = request.getfixturevalue("speech")[:, :72_000]
        samples = np.concatenate(
            [np.tile(speech, 6)[:, :400_001], np.tile(-speech, 6)[:, :400_001]]
        )
        save(tmp_path / "in.wav", samples, 16_000)
        return Case(
            codec=Codec.from_pretrained(),
            source=tmp_path / "in.wav",
            signal=load(tmp_path / "in.wav")[0],
            suffix=".wav",
            read=lambda source: load(source)[0],
            as_in_file=lambda samples: np.rint(samples[:, :400_001] * 2**15) / 2**15,
            n_frames=4_167,
            total=400_001,
            error=AudioError,
        )
    pixels = request.getfixturevalue("picture")(300, 260, 4)
    save_image(tmp_path / "in.png", pixels)
    return Case(
        codec=Codec.from_pretrained(request.getfixturevalue("debug_image_model")),
        source=tmp_path / "in.png",
        signal=pixels,
        suffix=".png",
        read=load_image,
        as_in_file=lambda pixels: pixels[:300, :260],
        n_frames=38 * 33,
        total=300 * 260,
        error=ImageError,
    )


def only(case: Case, *names: str) -> bool:
    """Whether the folder holds these files and nothing else, hidden or not."""
    return {path.name for path in case.source.parent.iterdir()} == set(names)


# ------------------------------------------------------------------------------------ round trips


def test_file_has_the_tokens_of_the_array(case: Case) -> None:
    codec = case.codec
    stats = codec.encode_file(case.source, case.tok)
    tokens, header = read_tokens(case.tok)
    expected = codec.encode(case.signal)
    assert expected.dtype == np.int64
    assert np.array_equal(tokens, expected.reshape(2, -1))
    assert tokens.shape == (2, case.n_frames)
    assert verify(case.tok).ok and len(blocks(case.tok)) == 3
    assert (header.model, header.fingerprint) == (codec.name, codec.space[:8])
    assert (header.hop_length, header.codebook_size) == (codec.hop_length, codec.codebook_size)
    size = case.tok.stat().st_size
    assert (stats.n_frames, stats.channels, stats.n_bytes) == (case.n_frames, 2, size)
    assert only(case, case.source.name, case.tok.name)


def test_file_decodes_as_the_array(case: Case) -> None:
    codec = case.codec
    stats = codec.encode_file(case.source, case.tok)
    assert codec.decode_file(case.tok, case.out) == stats
    decoded = case.read(case.out)
    assert decoded.shape == case.signal.shape
    expected = case.as_in_file(codec.decode(codec.encode(case.signal)))
    assert np.allclose(decoded, expected, rtol=0, atol=1e-4)


def test_tokens_written_as_arrays_decode(case: Case) -> None:
    """Tokens that never were a signal: all of the codebook."""
    case.codec.encode_file(case.source, case.tok)
    tokens, header = read_tokens(case.tok)
    any_tokens = np.random.default_rng(0).integers(0, header.codebook_size, tokens.shape)
    any_tokens[:, :2] = 0, header.codebook_size - 1
    write_tokens(case.tok, any_tokens, header)
    case.codec.decode_file(case.tok, case.out)
    assert case.read(case.out).shape == case.signal.shape


def test_streams_are_as_files(case: Case) -> None:
    codec = case.codec
    codec.encode_file(case.source, case.tok)
    piped, out = io.BytesIO(), io.BytesIO()
    stats = codec.encode_file(Pipe(case.source.read_bytes()), piped)
    assert stats.n_bytes == len(piped.getvalue())
    found = read_tokens(io.BytesIO(piped.getvalue()))[0]
    assert np.array_equal(found, read_tokens(case.tok)[0])
    assert codec.decode_file(Pipe(piped.getvalue()), out) == stats
    codec.decode_file(case.tok, case.out)
    assert np.array_equal(case.read(io.BytesIO(out.getvalue())), case.read(case.out))


def test_reader_in_the_place_of_a_file(case: Case) -> None:
    stats = case.codec.encode_file(case.source, case.tok)
    with open(case.tok, "rb") as file:
        assert case.codec.decode_file(TokenReader(file), case.out) == stats


def test_progress_is_reported(case: Case) -> None:
    encoding, decoding = [], []
    case.codec.encode_file(case.source, case.tok, progress=lambda *call: encoding.append(call))
    case.codec.decode_file(case.tok, case.out, progress=lambda *call: decoding.append(call))
    for stage, calls in {"encoding": encoding, "decoding": decoding}.items():
        assert calls == sorted(calls)
        assert calls[-1] == (stage, case.total, case.total)


# ----------------------------------------------------------------------------------------- damage


def spoil(case: Case, position: int) -> None:
    case.codec.encode_file(case.source, case.tok)
    case.tok.write_bytes(flipped(case.tok.read_bytes(), position))


def test_damage_is_refused(case: Case) -> None:
    case.codec.encode_file(case.source, case.tok)
    spoil(case, blocks(case.tok)[1][0] + 40)
    with pytest.raises(TokenFileError, match="block 1"):
        case.codec.decode_file(case.tok, case.out)
    assert only(case, case.source.name, case.tok.name)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_recovery_keeps_the_rest(case: Case, number: int) -> None:
    """What is far from the lost block comes back as it was; the block itself does not."""
    case.codec.encode_file(case.source, case.tok)
    case.codec.decode_file(case.tok, case.out)
    whole = case.read(case.out)
    spoil(case, blocks(case.tok)[number][0] + 40)
    stats = case.codec.decode_file(case.tok, case.out, recover=True)
    part = case.read(case.out)
    assert stats.damaged == 1
    assert part.shape == whole.shape
    assert not np.array_equal(part, whole)
    if number:  # the beginning is far before it
        begin = (slice(None), slice(25_000)) if case.suffix == ".wav" else slice(60)
        assert np.allclose(part[begin], whole[begin], rtol=0, atol=1e-4)


def test_recovery_of_a_truncated_file(case: Case) -> None:
    case.codec.encode_file(case.source, case.tok)
    case.tok.write_bytes(case.tok.read_bytes()[: blocks(case.tok)[1][0] + 5])
    with pytest.raises(TokenFileError):
        case.codec.decode_file(case.tok, case.out)
    assert only(case, case.source.name, case.tok.name)
    assert case.codec.decode_file(case.tok, case.out, recover=True).damaged == 2
    assert case.read(case.out).shape == case.signal.shape


def test_nothing_left_of_the_tokens(case: Case) -> None:
    """A header alone is worth an empty result of the right size."""
    case.codec.encode_file(case.source, case.tok)
    case.tok.write_bytes(case.tok.read_bytes()[: blocks(case.tok)[0][0]])
    assert case.codec.decode_file(case.tok, case.out, recover=True).damaged == 3
    assert case.read(case.out).shape[:2] == case.signal.shape[:2]


# ----------------------------------------------------------------------------------- other models


def test_tokens_of_other_weights(case: Case) -> None:
    case.codec.encode_file(case.source, case.tok)
    tokens, header = read_tokens(case.tok)
    write_tokens(case.tok, tokens, replace(header, fingerprint=bytes(16)))
    with pytest.raises(OtherWeightsError, match="00000000"):
        case.codec.decode_file(case.tok, case.out)
    assert not case.out.exists()
    case.codec.decode_file(case.tok, case.out, force=True)
    assert case.read(case.out).shape == case.signal.shape


def test_tokens_of_another_codebook(case: Case) -> None:
    case.codec.encode_file(case.source, case.tok)
    tokens, header = read_tokens(case.tok)
    write_tokens(case.tok, tokens % 100, replace(header, codebook_size=100, model="other"))
    for force in (False, True):
        with pytest.raises(TokenFileError, match="'other'"):
            case.codec.decode_file(case.tok, case.out, force=force)
    assert only(case, case.source.name, case.tok.name)


def test_tokens_of_the_other_kind(case: Case, debug_image_model: Path) -> None:
    case.codec.encode_file(case.source, case.tok)
    other = Codec.from_pretrained(debug_image_model if case.suffix == ".wav" else DEFAULT_MODEL)
    for force in (False, True):
        with pytest.raises(TokenFileError, match=f"'{case.codec.name}'.*'{other.name}' cannot"):
            other.decode_file(case.tok, case.out, force=force)
    assert only(case, case.source.name, case.tok.name)


def test_the_kind_of_the_model_chooses_the_class(case: Case, debug_image_model: Path) -> None:
    own, other = AudioCodec, ImageCodec
    if case.suffix == ".png":
        own, other = other, own
    assert type(case.codec) is own
    assert type(own.from_pretrained(case.codec.model.path)) is own
    with pytest.raises(ModelError, match=f"{case.codec.name}.*{own.modality}.*{other.modality}"):
        other.from_pretrained(case.codec.model.path)


# -------------------------------------------------------------------------------------- bad input


def test_bad_sources_and_targets(case: Case) -> None:
    codec, folder = case.codec, case.source.parent
    with pytest.raises((case.error, OSError), match="missing"):
        codec.encode_file(folder / f"missing{case.suffix}", case.tok)
    with pytest.raises(OSError, match="no/folder"):
        codec.encode_file(case.source, folder / "no" / "folder.tok")
    codec.encode_file(case.source, case.tok)
    with pytest.raises((case.error, OSError), match="no/folder"):
        codec.decode_file(case.tok, folder / "no" / f"folder{case.suffix}")
    with pytest.raises(OSError, match="missing.tok"):
        codec.decode_file(folder / "missing.tok", case.out)
    assert only(case, case.source.name, case.tok.name)


@pytest.mark.parametrize("dtype", [np.float64, bool, np.str_])
def test_tokens_of_other_types(case: Case, dtype: type) -> None:
    tokens = np.zeros((1, 4, 4)[: 2 + (case.suffix == ".png")], dtype)
    with pytest.raises(ValueError, match="integers"):
        case.codec.decode(tokens)


@pytest.mark.parametrize("token", ["-1", "K", "large"])
def test_tokens_out_of_range(case: Case, token: str) -> None:
    value = {"-1": -1, "K": case.codec.codebook_size, "large": 2**64 - 1}[token]
    tokens = np.zeros((1, 4, 4)[: 2 + (case.suffix == ".png")], np.uint64 if value > 0 else int)
    tokens[0, 1] = value
    with pytest.raises(ValueError, match=f"token {value} "):
        case.codec.decode(tokens)
