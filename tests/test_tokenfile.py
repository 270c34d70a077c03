from __future__ import annotations

import io
import json
import os
import random
import re
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import RESOURCES, ROOT

from vpcodec import tokenfile
from vpcodec.hub import bundled_folders, open_model
from vpcodec.tokenfile import (
    ENTROPY,
    MAX_BLOCKS,
    RAW,
    AudioHeader,
    ImageHeader,
    NoCoderError,
    TokenFileError,
    TokenHeader,
    TokenReader,
    TokenWriter,
    _divmod,
    raw_bytes,
    read_tokens,
    verify,
    write_tokens,
)

VECTORS = {
    name: fields | {"version": version}
    for version, file in ((1, "tok/vectors.json"), (2, "tok/vectors-2.json"))
    for name, fields in json.loads((RESOURCES / file).read_text(encoding="utf-8")).items()
}


class Pipe(io.RawIOBase):
    """A stream that cannot seek, gives a few bytes at a time and remembers what was asked."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position, self.asked = data, 0, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        assert size > 0
        self.asked = max(self.asked, self.position + size)
        chunk = self.data[self.position : self.position + min(size, 7)]
        self.position += len(chunk)
        return chunk


def make_header(**fields) -> AudioHeader:
    values = dict(
        model="speech-3k", fingerprint=bytes(range(8)), sample_rate=16000, original_rate=16000,
        channels=1, n_samples=960, hop_length=96, codebook_size=117649, block_frames=4,
    )  # fmt: skip
    return AudioHeader(**values | fields)


def make_image_header(**fields) -> ImageHeader:
    values = dict(
        model="image-fsp", fingerprint=bytes(range(8)), width=35, height=10, components=3,
        channels=1, hop_length=8, codebook_size=117649, block_frames=4,
    )  # fmt: skip
    return ImageHeader(**values | fields)


def make_tokens(header: TokenHeader, n_frames: int | None = None, seed: int = 0) -> np.ndarray:
    shape = (header.channels, header.n_frames if n_frames is None else n_frames)
    return np.random.default_rng(seed).integers(0, header.codebook_size, shape)


def dump_header(header: TokenHeader) -> bytes:
    stream = io.BytesIO()
    TokenWriter(stream, header)
    return stream.getvalue()


def dump(tokens: np.ndarray, header: TokenHeader, n_samples: int | None = None) -> bytes:
    stream = io.BytesIO()
    writer = TokenWriter(stream, header)
    writer.write(tokens)
    writer.close(n_samples)
    return stream.getvalue()


def load(data: bytes, **options) -> tuple[np.ndarray, TokenHeader]:
    return read_tokens(io.BytesIO(data), **options)


def version_1(data: bytes, header: TokenHeader) -> tuple[bytes, TokenHeader]:
    """The same file of several blocks as version 1, and its header."""
    header = replace(header, fingerprint=bytes(range(16)))
    name = header.model.encode()
    if isinstance(header, AudioHeader):
        total = 2**64 - 1 if header.n_samples is None else header.n_samples
        own = (header.sample_rate, header.original_rate, total)
    else:
        own = (header.width, header.height, header.components)
    head = b"\x89TOK\r\n\x1a\n" + struct.pack(
        "<4B2IQ2IH16sB", 1, 1, header.kind, header.channels, *own, header.hop_length,
        header.codebook_size - 1, header.block_frames, header.fingerprint, len(name),
    ) + name  # fmt: skip
    return head + struct.pack("<I", zlib.crc32(head)) + data[header_bytes(data) :], header


def header_bytes(data: bytes) -> int:
    """Where the blocks of a file of several blocks begin."""
    return 59 + data[54] if data[9] == 1 else TokenReader(io.BytesIO(data)).total_bytes


def block_spans(data: bytes, header: TokenHeader) -> list[tuple[int, int]]:
    """(start, end) of each block, read off the block headers."""
    spans, start = [], header_bytes(data)
    while data[start] != 255:
        end = start + 10 + int.from_bytes(data[start + 1 : start + 4], "little")
        spans.append((start, end))
        start = end
    return spans


@contextmanager
def allocating_less_than(n_bytes: float) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < n_bytes
    finally:
        tracemalloc.stop()


def mono() -> tuple[bytes, np.ndarray, TokenHeader]:
    header = make_header()
    tokens = make_tokens(header)
    return dump(tokens, header), tokens, header


def stereo() -> tuple[bytes, np.ndarray, TokenHeader]:
    header = make_header(
        channels=2, n_samples=None, original_rate=44100, codebook_size=1000, block_frames=5
    )
    tokens = make_tokens(header, 13)
    return dump(tokens, header, 44100 * 13 * 96 // 16000), tokens, replace(header, n_samples=3439)


def grey() -> tuple[bytes, np.ndarray, TokenHeader]:
    header = make_image_header(components=1)
    tokens = make_tokens(header)
    return dump(tokens, header), tokens, header


def rgba() -> tuple[bytes, np.ndarray, TokenHeader]:
    header = make_image_header(
        width=50, height=13, components=4, channels=2, codebook_size=1000, block_frames=5
    )
    tokens = make_tokens(header)
    return dump(tokens, header), tokens, header


def old_mono() -> tuple[bytes, np.ndarray, TokenHeader]:
    data, tokens, header = mono()
    return (version_1(data, header)[0], tokens, version_1(data, header)[1])


def old_rgba() -> tuple[bytes, np.ndarray, TokenHeader]:
    data, tokens, header = rgba()
    return (version_1(data, header)[0], tokens, version_1(data, header)[1])


SAMPLES = pytest.mark.parametrize("sample", [mono, stereo, grey, rgba, old_mono, old_rgba])
OLD = pytest.mark.parametrize("sample", [old_mono, old_rgba])
LENGTH_AHEAD = pytest.mark.parametrize("sample", [mono, grey, rgba, old_mono, old_rgba])


def short() -> tuple[bytes, np.ndarray, TokenHeader]:
    """One block."""
    header = make_header(channels=2, original_rate=44100, n_samples=2000, block_frames=8)
    tokens = make_tokens(header)
    return dump(tokens, header), tokens, header


def little() -> tuple[bytes, np.ndarray, TokenHeader]:
    """One block of a model without a number."""
    header = make_image_header(model="größe", components=2, channels=2, block_frames=10)
    tokens = make_tokens(header)
    return dump(tokens, header), tokens, header


def silent() -> tuple[bytes, np.ndarray, TokenHeader]:
    """One block, empty."""
    header = make_header(n_samples=0, codebook_size=250_047, block_frames=1)
    return dump(make_tokens(header), header), make_tokens(header), header


ONE_BLOCK = pytest.mark.parametrize("sample", [short, little, silent])


def as_read(header: TokenHeader) -> TokenHeader:
    """A header that was written, as it is read: a file of one block has just its frames."""
    if header.n_frames is not None and header.n_frames <= header.block_frames:
        return replace(header, block_frames=max(1, header.n_frames))
    return header


def assert_nothing_wrong(found: np.ndarray, tokens: np.ndarray) -> None:
    """Each frame is right and in its place, or marked as lost."""
    n = min(found.shape[1], tokens.shape[1])
    kept = (found[:, :n] >= 0).all(axis=0)
    assert (found[:, :n][:, kept] == tokens[:, :n][:, kept]).all()
    assert (found[:, n:] == -1).all()


# ------------------------------------------------------------------------------------ round trips


@st.composite
def headers_and_totals(draw) -> tuple[TokenHeader, int]:
    """A header of either kind, and the n_samples that its tokens stand for."""
    block_frames = draw(st.sampled_from([1, 2, 3, 7, 64]))
    channels = draw(st.integers(1, 6))
    hop = draw(st.integers(1, 500))
    common = dict(
        codebook_size=draw(st.integers(2, 2**32) | st.sampled_from([2, 3, 2**16, 2**32])),
        hop_length=hop,
        block_frames=block_frames,
    )
    if draw(st.booleans()):
        sides = [draw(st.integers(1, 14)) * hop - draw(st.integers(0, hop - 1)) for _ in range(2)]
        components = draw(st.integers(1, 4))
        header = make_image_header(
            width=sides[0], height=sides[1], components=components,
            channels=1 if components in (1, 3) else 2, **common,
        )  # fmt: skip
        return header, sides[0] * sides[1]
    n_frames = draw(
        st.sampled_from([0, 1, block_frames - 1, block_frames, block_frames + 1])
        | st.integers(0, 200)
    )
    n_samples = max(0, n_frames * hop - draw(st.integers(0, hop - 1)))
    known = draw(st.booleans())
    header = make_header(channels=channels, n_samples=n_samples if known else None, **common)
    return header, n_samples


@settings(max_examples=150, deadline=None)
@given(headers_and_totals(), st.data())
def test_round_trip(header_and_total, data):
    header, n_samples = header_and_total
    full_header = header.with_total(n_samples)
    n_frames = full_header.n_frames
    tokens = make_tokens(full_header, seed=data.draw(st.integers(0, 99)))
    if data.draw(st.booleans()):
        tokens[:] = header.codebook_size - 1
    whole = dump(tokens, header, n_samples)
    for source in (io.BytesIO(whole), Pipe(whole)):
        found, full = read_tokens(source)
        assert found.dtype == np.int64 and found.shape == tokens.shape
        assert (found == tokens).all()
        assert full == (full_header if header.n_samples is None else as_read(full_header))

    stream = io.BytesIO()
    writer = TokenWriter(stream, header)
    cuts = sorted(data.draw(st.lists(st.integers(0, n_frames), max_size=4)))
    for part in np.split(tokens, cuts, axis=1):
        writer.write(part)
    writer.close(n_samples)
    assert stream.getvalue() == whole, "the bytes depend on how the tokens came"


@given(
    st.integers(0, 10**8), st.integers(1, 2**18), st.integers(1, 2**18), st.integers(1000, 2**20)
)
def test_frame_counts_are_exact(n_samples, sample_rate, original_rate, hop):
    header = make_header(
        n_samples=n_samples, sample_rate=sample_rate, original_rate=original_rate, hop_length=hop,
        block_frames=2**16 - 1,
    )  # fmt: skip
    samples, frames = header.model_samples, header.n_frames
    assert (samples - 1) * original_rate < n_samples * sample_rate <= samples * original_rate
    assert (frames - 1) * hop < samples <= frames * hop


@given(st.integers(1, 2**16), st.integers(1, 2**16), st.integers(1, 2**20))
def test_squares_cover_the_picture_exactly(width, height, hop):
    header = make_image_header(width=width, height=height, hop_length=hop, block_frames=2**16 - 1)
    assert (header.columns - 1) * hop < width <= header.columns * hop
    assert (header.rows - 1) * hop < height <= header.rows * hop
    assert header.n_frames == header.rows * header.columns
    assert header.n_pixels == header.n_samples == width * height


def test_header_rates():
    header = make_header(channels=2)
    assert header.frame_rate == pytest.approx(166.667, abs=1e-3)
    assert header.bits_per_token == pytest.approx(16.844, abs=1e-3)
    assert header.nominal_bitrate == pytest.approx(2 * 2807.4, abs=0.2)
    assert make_header(
        n_samples=np.int64(2**48), hop_length=2**20, block_frames=2**15
    ) == make_header(n_samples=2**48, hop_length=2**20, block_frames=2**15)
    unknown = make_header(n_samples=None)
    assert unknown.model_samples is None and unknown.n_frames is None
    assert unknown.with_total(960) == make_header()


def test_image_header_rates():
    header = make_image_header(components=4, channels=2)
    assert header.bits_per_token == pytest.approx(16.844, abs=1e-3)
    assert header.bits_per_pixel == pytest.approx(2 * 16.844 / 64, abs=1e-4)
    assert make_image_header(width=np.int64(35)) == make_image_header()
    assert make_image_header(width=2**20, height=2**12, block_frames=2**16 - 1).n_frames == 2**26


def test_a_header_needs_a_kind():
    with pytest.raises(TypeError):
        TokenHeader(model="m", fingerprint=bytes(16), channels=1, hop_length=1, codebook_size=2)


@pytest.mark.parametrize("codebook_size", [2, 3, 5, 1000, 16384, 117649, 2**32 - 1, 2**32])
def test_raw_payload_is_the_least_that_holds_every_block(codebook_size):
    for n in (1, 2, 3, 31, 64, 65, 513):
        size = raw_bytes(codebook_size, n)
        assert 256 ** (size - 1) < codebook_size**n <= 256**size
        header = make_header(codebook_size=codebook_size, n_samples=96 * (n + 1), block_frames=n)
        start, end = block_spans(dump(make_tokens(header), header), header)[0]
        assert end - start == 10 + size


def test_overhead_of_ten_seconds():
    header = make_header(n_samples=160_000, block_frames=512)
    data = dump(make_tokens(header), header)
    result = verify(io.BytesIO(data))
    assert (result.frames, result.blocks) == (1667, 4)
    assert result.total_bytes == len(data)
    assert len(data) - result.payload_bytes <= 100 + 12 * result.blocks
    assert len(data) <= 100 + 12 * 4 + 4 + 1667 * header.bits_per_token / 8


# ------------------------------------------------------------------------------ the format itself


@pytest.mark.parametrize("name", VECTORS)
def test_golden_vectors(name):
    fields = dict(VECTORS[name])
    version = fields.pop("version")
    tokens = np.array(fields.pop("tokens"), np.int64)
    fields["fingerprint"] = bytes.fromhex(fields["fingerprint"])
    if fields.pop("kind") == "image":
        header = ImageHeader(**fields)
        n_samples = fields["width"] * fields["height"]
    else:
        known, n_samples = fields.pop("known"), fields.pop("n_samples")
        header = AudioHeader(n_samples=n_samples if known else None, **fields)
    path = RESOURCES / f"tok/{name}.tok"
    found, full = read_tokens(path)
    assert (found == tokens).all() and found.shape == tokens.shape
    if version == 1:
        assert full == header.with_total(n_samples)
        return
    assert dump(tokens, header, n_samples) == path.read_bytes()
    stored = replace(header, fingerprint=header.fingerprint[:8])
    assert full == as_read(stored).with_total(n_samples)


def test_the_documentation_shows_the_vectors():
    text = (ROOT / "docs/token-format.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^```tok (\S+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert set(shown) == {
        "mono", "stereo-piped", "rgba", "short-2", "rgba-2", "stereo-piped-2", "numbered-2",
    }  # fmt: skip
    for name, lines in shown.items():
        data = b"".join(bytes.fromhex(line[:27]) for line in lines.splitlines())
        assert data == (RESOURCES / f"tok/{name}.tok").read_bytes()


class ZlibCoder:
    """Stands for the entropy coder of a model."""

    def __init__(self, codebook_size: int) -> None:
        self.codebook_size = codebook_size

    def pack(self, tokens: np.ndarray, columns: int | None) -> bytes:
        return zlib.compress(tokens.astype("<u4").tobytes())

    def unpack(
        self, payload: bytes, n_frames: int, channels: int, columns: int | None
    ) -> np.ndarray:
        try:
            tokens = np.frombuffer(zlib.decompress(payload), "<u4").astype(np.int64)
        except zlib.error as error:
            raise ValueError(str(error)) from None
        return tokens.reshape(n_frames, channels)


def coded_file() -> tuple[bytes, np.ndarray, AudioHeader, ZlibCoder]:
    """Three blocks of two channels, of which the last two are entropy coded."""
    header = make_header(channels=2, n_samples=96 * 300, block_frames=100)
    coder = ZlibCoder(header.codebook_size)
    tokens = make_tokens(header)
    tokens[:, 100:200], tokens[:, 200:] = 7, 9
    out = io.BytesIO()
    write_tokens(out, tokens, header, coder=coder)
    return out.getvalue(), tokens, header, coder


def test_a_coder_is_used_where_it_makes_a_block_shorter():
    data, tokens, header, coder = coded_file()
    assert [data[start] for start, _ in block_spans(data, header)] == [RAW, ENTROPY, ENTROPY]
    assert len(data) < len(dump(tokens, header))
    found, _ = read_tokens(io.BytesIO(data), coder=coder)
    assert (found == tokens).all()


def test_without_a_coder_the_model_is_named():
    data, _, header, _ = coded_file()
    for recover in (False, True):  # missing tables are no damage
        with pytest.raises(NoCoderError, match=f"tables of the model '{header.model}'"):
            read_tokens(io.BytesIO(data), recover=recover)
    found = verify(io.BytesIO(data))  # which needs no tokens
    assert found.ok and found.blocks == 3 and found.frames == 300


def test_the_coder_may_come_when_the_header_is_known():
    data, tokens, _, coder = coded_file()
    reader = TokenReader(io.BytesIO(data))
    assert reader.coder is None
    reader.coder = coder
    assert (np.concatenate([block.tokens for block in reader], 1) == tokens).all()


def test_a_coder_of_another_codebook_is_refused():
    header = make_header()
    with pytest.raises(ValueError, match="another codebook"):
        TokenWriter(io.BytesIO(), header, coder=ZlibCoder(header.codebook_size + 1))


def test_damage_of_a_coded_block_is_noticed_and_confined():
    data, tokens, header, coder = coded_file()
    start, end = block_spans(data, header)[1]
    for bit in range(8 * start, 8 * end):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(TokenFileError, match="block 1"):
            read_tokens(io.BytesIO(flipped), coder=coder)
        found, _ = read_tokens(io.BytesIO(flipped), coder=coder, recover=True)
        assert (found[:, 100:200] == -1).all()
        assert (np.delete(found, np.s_[100:200], 1) == np.delete(tokens, np.s_[100:200], 1)).all()


def test_a_payload_that_the_coder_refuses_is_damage():
    data, _, header, coder = coded_file()
    coder.pack = lambda tokens, columns: b"not zlib"
    out = io.BytesIO()
    write_tokens(out, np.full((2, 300), 7), header, coder=coder)
    with pytest.raises(TokenFileError, match="block 0"):
        read_tokens(io.BytesIO(out.getvalue()), coder=coder)


def test_an_unknown_coding_is_named():
    header = make_header(n_samples=96 * 6, block_frames=5)
    data = bytearray(dump(np.full((1, 6), 2), header))
    data[block_spans(data, header)[0][0]] = 2
    with pytest.raises(TokenFileError, match="block 0: unknown coding id 2"):
        load(bytes(data))


def test_a_number_too_large_for_its_block_is_damage():
    header = make_header(codebook_size=3, n_samples=96 * 6, block_frames=5)
    data = bytearray(dump(np.full((1, 6), 2), header))
    start, end = block_spans(data, header)[0]
    assert data[end - 1] == 3**5 - 1
    data[end - 1] = 3**5
    check = zlib.crc32(data[start : start + 6] + data[end - 1 : end])
    data[start + 6 : start + 10] = struct.pack("<I", check)
    with pytest.raises(TokenFileError, match="block 0"):
        load(bytes(data))


# ------------------------------------------------------------------------------ files of one block


def known_models() -> list[tuple[str, TokenHeader]]:
    """The bundled models and headers of files that they make."""
    found = []
    for name in bundled_folders():
        config = open_model(name).config
        fields = dict(
            model=name, hop_length=config.hop_length, codebook_size=config.codebook_size,
            block_frames=4096,
        )  # fmt: skip
        if config.modality == "audio":
            fields |= dict(n_samples=160_000, sample_rate=config.sample_rate)
            found += [
                (name, make_header(original_rate=config.sample_rate, **fields)),
                (name, make_header(original_rate=48_000, **fields | dict(n_samples=480_000))),
            ]
        else:
            found.append((name, make_image_header(width=500, height=375, **fields)))
    return found


@pytest.mark.parametrize(("name", "header"), known_models())
def test_the_container_of_one_block_has_at_most_40_bytes(name, header):
    data = dump(make_tokens(header), header)
    result = verify(io.BytesIO(data))
    assert result.ok and result.blocks == 1 and result.header == as_read(header)
    assert len(data) - result.payload_bytes <= 34


@pytest.mark.parametrize(
    "name",
    [
        "speech-3k", "speech-3k@2", "speech-3k@255", "speech-3k@256", "speech-3k@1",
        "speech-3k@02", "speech-3k@x", "speech-3kb", "speech", "image-fsp",
    ],
)  # fmt: skip
@pytest.mark.parametrize("fields", [{}, {"codebook_size": 100}, {"sample_rate": 24_000}])
@pytest.mark.parametrize("n_samples", [960, 4800])
def test_any_values_of_any_model_are_kept(name, fields, n_samples):
    header = make_header(**dict(model=name, n_samples=n_samples, block_frames=15) | fields)
    numbered = dict(codebook_size=250_047) | fields
    for written in (header, replace(header, **numbered)):
        assert load(dump(make_tokens(written), written))[1] == as_read(written)


@ONE_BLOCK
def test_every_flipped_bit_of_a_file_of_one_block_is_noticed(sample):
    data, _, _ = sample()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        for read in READERS:
            with pytest.raises(TokenFileError):
                read(bytes(changed))
        result = verify(io.BytesIO(changed))
        assert not result.ok and result.error


@ONE_BLOCK
def test_every_truncation_of_a_file_of_one_block_is_noticed(sample):
    data, _, _ = sample()
    for size in range(len(data)):
        for read in READERS:
            with pytest.raises(TokenFileError, match="ends inside|empty"):
                read(data[:size])
        assert not verify(Pipe(data[:size])).ok


@ONE_BLOCK
def test_data_behind_a_file_of_one_block_is_noticed_but_not_read(sample):
    data, tokens, _ = sample()
    for more in (b"\0", b"\xff", data):
        for read in READERS:
            with pytest.raises(TokenFileError, match="after the end"):
                read(data + more)
        assert (load(data + more, recover=True)[0] == tokens).all()
    pipe = Pipe(data + data)
    result = verify(pipe)
    assert "after the end" in result.error and not result.damaged
    assert pipe.asked == len(data) + 1
    assert result.total_bytes == len(data)


@ONE_BLOCK
def test_a_damaged_file_of_one_block_is_lost_and_keeps_its_length(sample):
    data, tokens, header = sample()
    blocks = [0] if header.n_frames else []
    for broken in (data[:-1], data[:-1] + bytes([data[-1] ^ 1])):
        found, full = load(broken, recover=True)
        assert full == as_read(header) and found.shape == tokens.shape and (found == -1).all()
        result = verify(io.BytesIO(broken))
        assert list(result.damaged) == blocks and result.error.startswith("block 0: ")
        reader = TokenReader(io.BytesIO(broken), recover=True)
        reader.seek_frame(0)
        assert [block.tokens for block in reader] == [None for _ in blocks]
        assert reader.damaged == blocks and reader.error
        for read in READERS:
            with pytest.raises(TokenFileError, match=r"^block 0: "):
                read(broken)


@ONE_BLOCK
def test_seeking_in_a_file_of_one_block(sample):
    data, tokens, header = sample()
    for stream in (io.BytesIO(data), Pipe(data)):
        reader = TokenReader(stream)
        assert reader.read_trailer() == header.n_samples
        for frame in (*range(header.n_frames + 1), 0):
            reader.seek_frame(frame)
            blocks = list(reader)
            assert len(blocks) == (frame < header.n_frames)
            assert all((block.tokens == tokens).all() for block in blocks)
        with pytest.raises(ValueError, match=f"frame {header.n_frames + 1}"):
            reader.seek_frame(header.n_frames + 1)


def test_a_file_of_one_block_that_the_coder_refuses_is_damage():
    header = make_header(n_samples=96 * 300, block_frames=300)
    coder = ZlibCoder(header.codebook_size)
    out = io.BytesIO()
    write_tokens(out, np.full((1, 300), 7), header, coder=coder)
    assert (load(out.getvalue(), coder=coder)[0] == 7).all()
    for recover in (False, True):
        with pytest.raises(NoCoderError, match="tables of the model 'speech-3k'"):
            load(out.getvalue(), recover=recover)
    assert verify(io.BytesIO(out.getvalue())).ok
    coder.unpack = lambda *_: (_ for _ in ()).throw(ValueError("no"))
    with pytest.raises(TokenFileError, match="block 0: no"):
        load(out.getvalue(), coder=coder)
    assert (load(out.getvalue(), coder=coder, recover=True)[0] == -1).all()


def test_more_frames_than_a_file_of_one_block_states_are_refused():
    header = make_header(block_frames=10)
    writer = TokenWriter(io.BytesIO(), header)
    writer.write(make_tokens(header, 6))
    with pytest.raises(TokenFileError, match="more than 10 frames"):
        writer.write(make_tokens(header, 5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("03 02", "form 3"),
        ("00 02", "form 0"),
        ("01 03", "version 3"),
        ("01 02 00", "kind 0"),
        ("01 02 7f", "kind 127"),
        ("01 02 10 00", "damaged"),
        ("01 02 01 41", "more than 64"),
        ("01 02 01 01 ff", "UTF-8"),
        ("01 02 01 01 1b 60 05 01" + " 00" * 8 + " 01 00 01", "printable"),
        ("01 02 01 00 60 05 01" + " 00" * 8 + " 01 00 01", "1 to 64"),
        ("01 02 01 01 61 00 05 01" + " 00" * 8 + " 01 00 02", "hop_length 0"),
        ("01 02 01 01 61 60 00 01" + " 00" * 8 + " 01 00 02", "codebook_size 1"),
        ("01 02 01 01 61 60 05 00" + " 00" * 8 + " 01 00 02", "sample_rate 0"),
        ("01 02 01 01 61 60 05 01" + " 00" * 8 + " 00 00 02", "channels 0"),
        ("01 02 01 01 61" + " ff" * 8, "number in the header is too long"),
        ("01 02 10 01" + " 00" * 8 + " 01 00 00", "no length"),
        ("01 02 10 01" + " 00" * 8 + " 01 00" + " ff" * 6 + " 7f", "n_samples"),
        ("01 02 10 01" + " 00" * 8 + " 01 00 80 80 80 80 01", "needs more than"),
        ("01 02 10 01" + " 00" * 8 + " 01 00 80 80 80 08", "block_frames"),
        ("01 02 10 01" + " 00" * 8 + " 01 00 61 00 04", "4 bytes are too many for 1 frames"),
        ("01 02 10 01" + " 00" * 8 + " 01 00 61 02 01", "unknown coding id 2"),
        ("01 02 13 01" + " 00" * 8 + " 05 08 08", "components 5"),
        ("01 02 13 01" + " 00" * 8 + " 00 08 08", "components 0"),
        ("01 02 13 01" + " 00" * 8 + " 03 00 08", "width 0"),
        ("01 02 13 01" + " 00" * 8 + " 03 81 80 40 08", "width 1048577"),
        ("01 02 13 01" + " 00" * 8 + " 03 80 80 40 80 80 40", "needs more than"),
        ("02 02 10 01" + " 00" * 8 + " 01 00 61 00", "ends inside its header"),
    ],
)
def test_absurd_headers_of_version_2_are_refused_before_anything_is_allocated(fields, message):
    data = b"\x89TOK\r\n\x1a\n" + bytes.fromhex(fields)
    for rest in (b"", struct.pack("<I", zlib.crc32(data))):
        with allocating_less_than(100_000), pytest.raises(TokenFileError, match=message) as caught:
            load(data + rest)
        assert "\n" not in str(caught.value)
        if "form" not in message and "bytes" in message:
            assert load(data + rest, recover=True)[0].tolist() == [[-1]]
        if rest == b"" and message.startswith("ends"):
            break


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes_in_a_header_of_version_2_are_an_error_or_read(data):
    """Nothing but TokenFileError, in little memory, strict or not; checksums may be right."""
    sample = data.draw(st.sampled_from([short, little, silent, stereo, rgba]))
    changed = bytearray(sample()[0])
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(8, min(len(changed), 50)))
        size = data.draw(st.integers(0, 4))
        changed[start : start + size] = data.draw(st.binary(max_size=4))
    if data.draw(st.booleans()):
        end = data.draw(st.integers(10, len(changed)))
        changed[end : end + 4] = struct.pack("<I", zlib.crc32(changed[:end]))
    for recover in (False, True):
        for source in (io.BytesIO(changed), Pipe(bytes(changed))):
            with suppress(TokenFileError):
                tokens, header = read_tokens(source, recover=recover)
                assert tokens.shape == (header.channels, header.n_frames)
    result = verify(io.BytesIO(changed))
    assert result.ok or result.error


# --------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    "fields",
    [
        dict(model=""), dict(model="x" * 65), dict(model="é" * 33), dict(model="a\nb"),
        dict(model=None), dict(fingerprint=bytes(15)), dict(fingerprint="0" * 16),
        dict(channels=0), dict(channels=256), dict(hop_length=0), dict(hop_length=2**20 + 1),
        dict(codebook_size=1), dict(codebook_size=2**32 + 1), dict(block_frames=0),
        dict(block_frames=2**16),
    ],
)  # fmt: skip
@pytest.mark.parametrize("make", [make_header, make_image_header])
def test_wrong_header_fields_are_refused(make, fields):
    with pytest.raises(TokenFileError) as caught:
        make(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        dict(sample_rate=0), dict(sample_rate=16000.0), dict(sample_rate=2**24 + 1),
        dict(original_rate=0), dict(n_samples=-1), dict(n_samples=2**48 + 1),
        dict(n_samples=96 * 4 * MAX_BLOCKS + 1), dict(channels=255, block_frames=515),
    ],
)  # fmt: skip
def test_wrong_fields_of_audio_are_refused(fields):
    with pytest.raises(TokenFileError) as caught:
        make_header(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        dict(width=0), dict(height=0), dict(width=2**20 + 1), dict(height=2**20 + 1),
        dict(width=None), dict(height=1.5), dict(width=2**16 + 1, height=2**16, hop_length=64),
        dict(width=2**16, height=2**16, hop_length=1), dict(components=0), dict(components=5),
        dict(components=None), dict(channels=2), dict(components=4), dict(components=2),
        dict(components=1, channels=2), dict(components=4, channels=3),
    ],
)  # fmt: skip
def test_wrong_fields_of_images_are_refused(fields):
    with pytest.raises(TokenFileError) as caught:
        make_image_header(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([[0, 117649]]), "token 117649 "),
        (np.array([[-3, 0]]), "token -3 "),
        (np.zeros((1, 3), np.int32), "int32"),
        (np.zeros((1, 3)), "float64"),
        ([[1, 2]], "list"),
        (np.zeros(3, np.int64), r"\(3,\)"),
        (np.zeros((2, 3), np.int64), r"\(2, 3\)"),
    ],
)
@pytest.mark.parametrize("header", [make_header(), make_image_header()])
def test_wrong_tokens_are_refused(header, tokens, message):
    stream = io.BytesIO()
    writer = TokenWriter(stream, header)
    with pytest.raises(ValueError, match=message):
        writer.write(tokens)
    writer.write(make_tokens(header))
    writer.close()
    assert verify(io.BytesIO(stream.getvalue())).ok, "a refused write left something behind"


def test_the_length_must_be_said_once_and_fit_the_frames():
    for header, frames, n_samples in (
        (make_header(), 9, None),
        (make_header(), 11, None),
        (make_header(), 10, 961),
        (make_header(n_samples=None), 10, None),
        (make_header(n_samples=None), 10, 961),
        (make_header(n_samples=None), 0, 2**60),
        (make_image_header(), 9, None),
        (make_image_header(), 11, None),
        (make_image_header(), 10, 351),
    ):
        with pytest.raises(TokenFileError):
            dump(make_tokens(header, frames), header, n_samples)
    for header, n_samples in ((make_header(), 960), (make_image_header(), 350)):
        assert dump(make_tokens(header), header, n_samples) == dump(make_tokens(header), header)


def test_a_closed_writer_refuses_more():
    writer = TokenWriter(io.BytesIO(), make_header(n_samples=0))
    writer.close()
    with pytest.raises(ValueError):
        writer.close()
    with pytest.raises(ValueError):
        writer.write(np.zeros((1, 1), np.int64))


# --------------------------------------------------------------------------- damage, strict reading


def seekable_tokens(data: bytes) -> None:
    reader = TokenReader(io.BytesIO(data))
    reader.read_trailer()
    list(reader)


READERS = (load, lambda data: read_tokens(Pipe(data)), seekable_tokens)


@SAMPLES
def test_every_flipped_bit_is_noticed(sample):
    data, _, _ = sample()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        for read in READERS:
            with pytest.raises(TokenFileError):
                read(bytes(changed))
        result = verify(io.BytesIO(changed))
        assert not result.ok and result.error


@SAMPLES
def test_every_truncation_is_noticed(sample):
    data, _, _ = sample()
    for size in range(len(data)):
        for read in READERS:
            with pytest.raises(TokenFileError):
                read(data[:size])
        assert not verify(Pipe(data[:size])).ok


@SAMPLES
def test_data_behind_the_end_is_noticed_but_not_read(sample):
    data, tokens, _ = sample()
    for more in (b"\0", b"\xff", b"\n", data):
        for read in READERS:
            with pytest.raises(TokenFileError):
                read(data + more)
    pipe = Pipe(data + data)
    result = verify(pipe)
    assert not result.ok and "after the end" in result.error and not result.damaged
    assert pipe.asked == len(data) + 1
    assert result.total_bytes == len(data)
    assert (load(data + data, recover=True)[0] == tokens).all()


@SAMPLES
def test_damage_names_its_block(sample):
    data, _, header = sample()
    for number, (start, end) in enumerate(block_spans(data, header)):
        for place in (start, start + 2, start + 4, start + 7, start + 10, end - 1):
            changed = bytearray(data)
            changed[place] ^= 16
            with pytest.raises(TokenFileError, match=f"^block {number}: "):
                load(bytes(changed))


def test_swapped_doubled_and_missing_blocks_are_noticed():
    header = make_header(n_samples=None)
    data = dump(make_tokens(header, 12), header, 12 * 96)
    (a, b), (_, c), (_, d) = block_spans(data, header)
    head, first, second, third, tail = data[:a], data[a:b], data[b:c], data[c:d], data[d:]
    for blocks in (second + first + third, first + first + third, first + third, first + second,
                   first + second + third + third):  # fmt: skip
        with pytest.raises(TokenFileError):
            load(head + blocks + tail)
    found, _ = load(head + first + third + tail, recover=True)
    assert (found[0] == -1).tolist() == [False] * 4 + [True] * 4 + [False] * 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"RIFF" + bytes(99), "not a token file$"),
        (b"\x89TO", "ends inside its header"),
        (mono()[0].replace(b"\r\n", b"\n"), "text-mode transfer"),
        (mono()[0].replace(b"\n", b"\r\n"), "text-mode transfer"),
        (bytes(byte & 127 for byte in mono()[0]), "not a token file$"),
    ],
)
def test_what_is_no_token_file(data, message):
    with pytest.raises(TokenFileError, match=message):
        load(data)
    assert not verify(io.BytesIO(data)).ok


@pytest.mark.parametrize(
    ("offset", "field", "message"),
    [
        (9, b"\3", "format version 3"),
        (10, b"\3", "kind 3 "),
        (10, b"\0", "kind 0 "),
        (11, b"\0", "channels"),
        (28, b"\xff" * 4, "hop_length"),
        (32, bytes(4), "codebook_size"),
        (36, bytes(2), "block_frames"),
        (54, b"\xff", "model name"),
        (54, b"\0", "damaged"),
        (55, b"\xff", "UTF-8"),
        (55, b"\x1b", "printable"),
    ],
)
@OLD
def test_absurd_headers_are_refused_before_anything_is_allocated(sample, offset, field, message):
    data, _, header = sample()
    assert_header_refused(data, header, offset, field, message)


@pytest.mark.parametrize(
    ("offset", "field", "message"),
    [
        (10, b"\2", "components"),
        (11, b"\xff", "tokens"),
        (12, bytes(4), "sample_rate"),
        (16, b"\xff" * 4, "original_rate"),
        (20, b"\xfe" + b"\xff" * 7, "n_samples"),
        (20, struct.pack("<Q", 2**48), "blocks"),
    ],
)
def test_absurd_headers_of_audio_are_refused(offset, field, message):
    header = make_header(n_samples=None, block_frames=2**16 - 1)
    data, header = version_1(dump_header(header), header)
    assert_header_refused(data, header, offset, field, message)


@pytest.mark.parametrize(
    ("offset", "field", "message"),
    [
        (11, b"\2", "channels 2"),
        (11, b"\xff", "channels 255"),
        (12, bytes(4), "width 0"),
        (16, bytes(4), "height 0"),
        (12, b"\xff" * 4, "width 4294967295"),
        (12, struct.pack("<II", 2**20, 2**20), "pixels"),
        (20, bytes(8), "components 0"),
        (20, struct.pack("<Q", 5), "components 5"),
        (20, struct.pack("<Q", 4), "channels 1"),
        (20, b"\xff" * 8, "components"),
    ],
)
def test_absurd_headers_of_images_are_refused(offset, field, message):
    header = make_image_header(width=10_000, height=10_000, hop_length=64, block_frames=512)
    data, header = version_1(dump_header(header), header)
    assert_header_refused(data, header, offset, field, message)


def assert_header_refused(data: bytes, header: TokenHeader, offset, field, message) -> None:
    """Reading `data` fails where `field` is put at `offset` and the checksum is made right."""
    data, end = bytearray(data), header_bytes(data)
    data[offset : offset + len(field)] = field
    data[end - 4 : end] = struct.pack("<I", zlib.crc32(data[: end - 4]))
    with allocating_less_than(100_000), pytest.raises(TokenFileError, match=message):
        load(bytes(data), recover=True)


def test_absurd_blocks_and_trailers_are_refused_before_anything_is_allocated():
    header = make_header(n_samples=None, channels=255, codebook_size=2**32, block_frames=512)
    start = dump_header(header)
    for record in (
        struct.pack("<IHI", 0 | 0xFFFFFF << 8, 512, 0),
        struct.pack("<IHI", 0 | 1021 << 8, 1, 0),
        struct.pack("<IHI", 0 | 100 << 8, 0, 0),
        struct.pack("<IHI", 0 | 100 << 8, 513, 0),
        struct.pack("<IQQ", 255 | 0xFFFFFF << 8, 2**60, 2**60),
        struct.pack("<IQQ", 255 | 3 << 8, 2**60, 2**60) + bytes(9),
    ):
        pipe = Pipe(start + record)
        with allocating_less_than(100_000), pytest.raises(TokenFileError):
            read_tokens(pipe)
        assert pipe.asked <= len(start) + 31


@pytest.mark.parametrize(
    "header",
    [
        make_header(n_samples=96 * 2**32, block_frames=2**16 - 1),
        make_image_header(width=2**16, height=2**16, hop_length=1, block_frames=2**16 - 1),
    ],
)
def test_a_file_that_lost_more_than_memory_is_not_filled_in(header):
    data = dump_header(header)
    with pytest.raises(TokenFileError, match="tokens are lost"):
        load(data, recover=True)
    result = verify(io.BytesIO(data))
    assert result.damaged == tuple(range(1000))
    assert result.frames == 2**32 and result.n_damaged == result.blocks == 65538


def test_a_claim_of_a_million_blocks_costs_what_the_file_holds():
    header = make_header(n_samples=96 * 2**20, block_frames=1)
    index = bytes([11]) * 2**20
    trailer = struct.pack("<IQQ", 255 | len(index) << 8, 2**20, header.n_samples) + index
    trailer += trailer[:4]
    data = dump_header(header) + trailer + struct.pack("<I", zlib.crc32(trailer))
    with allocating_less_than(16 * len(data)):
        result = verify(io.BytesIO(data))
    assert (result.blocks, result.n_damaged, len(result.damaged)) == (2**20, 2**20, 1000)
    with allocating_less_than(16 * len(data)), pytest.raises(TokenFileError, match="are lost"):
        load(data, recover=True)


def test_lost_tokens_are_filled_in_where_as_many_are_left():
    """Wherever in the file they are: more than MAX_LOST_TOKENS, in the first half."""
    header = make_header(n_samples=96 * 300_000, block_frames=50_000)
    tokens = make_tokens(header)
    data = bytearray(dump(tokens, header))
    spans = block_spans(data, header)
    for start, _ in spans[:3]:
        data[start + 20] ^= 1
    found, _ = load(bytes(data), recover=True)
    assert (found[:, :150_000] == -1).all() and (found[:, 150_000:] == tokens[:, 150_000:]).all()
    data[spans[3][0] + 20] ^= 1
    with pytest.raises(TokenFileError, match="200000 tokens are lost, of 300000"):
        load(bytes(data), recover=True)


@pytest.mark.slow
@pytest.mark.parametrize("codebook_size", [2, 3, 117649, 2**20, 2**32 - 1, 2**32])
def test_the_largest_blocks_are_read_as_written(codebook_size):
    """Their integers have up to four million bits."""
    header = make_header(
        channels=2, n_samples=None, codebook_size=codebook_size, block_frames=65_535
    )
    for tokens in (
        make_tokens(header, 65_535),
        np.zeros((2, 65_535), np.int64),
        np.full((2, 65_535), codebook_size - 1),
    ):
        data = dump(tokens, header, 96 * 65_535)
        assert verify(io.BytesIO(data)).ok
        assert (load(data)[0] == tokens).all()
    first, end = block_spans(data, header)[0]
    if codebook_size & (codebook_size - 1):  # one more than the last number
        value = int.from_bytes(data[first + 10 : end], "little") + 1
        payload = value.to_bytes(end - first - 10, "little")
        head = data[first : first + 6]
        block = head + struct.pack("<I", zlib.crc32(head + payload)) + payload
        result = verify(io.BytesIO(data[:first] + block + data[end:]))
        assert "does not encode that many" in result.error


@pytest.mark.parametrize("bits", [1, 100, 2**14 - 1, 2**14, 2**14 + 1, 40_001, 100_000])
def test_quotients_are_exact(bits):
    rng = random.Random(bits)
    lowest, highest = 1 << bits - 1, (1 << bits) - 1
    for divisor in (lowest, lowest + 1, highest, lowest | rng.getrandbits(bits)):
        values = [rng.randrange(divisor * divisor) for _ in range(10)]
        for value in (0, divisor - 1, divisor, divisor * divisor - 1, *values):
            assert _divmod(value, divisor) == divmod(value, divisor)


# ------------------------------------------------------------------------------------- recovering


@SAMPLES
@pytest.mark.parametrize("as_pipe", [False, True])
def test_one_flipped_bit_costs_one_block_at_most(sample, as_pipe):
    data, tokens, header = sample()
    spans = block_spans(data, header)
    for bit in range(8 * header_bytes(data), 8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        reader = TokenReader((Pipe if as_pipe else io.BytesIO)(bytes(changed)), recover=True)
        found = [
            np.full((header.channels, block.n_frames), -1) if block.tokens is None else block.tokens
            for block in reader
        ]
        found = np.concatenate(found, axis=1)
        hit = [i for i, (start, end) in enumerate(spans) if start <= bit // 8 < end]
        assert reader.damaged == hit and reader.error
        assert found.shape == tokens.shape
        assert_nothing_wrong(found, tokens)
        assert (found == -1).sum() <= header.channels * header.block_frames
        assert reader.n_frames == header.n_frames
        if hit or sample is not stereo:
            assert reader.n_samples == header.n_samples
        else:  # the trailer is lost, and with it the length
            assert reader.n_samples == 13 * 96 * 44100 // 16000


@LENGTH_AHEAD
def test_recovering_from_truncation_keeps_the_length_if_the_header_has_it(sample):
    data, tokens, header = sample()
    spans = block_spans(data, header)
    for size in range(header_bytes(data), len(data)):
        found, full = load(data[:size], recover=True)
        whole = header.block_frames * sum(end <= size for _, end in spans)
        assert full == header and found.shape == tokens.shape
        assert (found[:, :whole] == tokens[:, :whole]).all()
        assert (found[:, whole:] == -1).all()


def test_recovering_a_piped_file_that_was_cut_off_keeps_the_whole_blocks():
    data, tokens, header = stereo()
    spans = block_spans(data, header)
    for size in range(header_bytes(data), len(data)):
        found, full = load(data[:size], recover=True)
        frames = min(13, 5 * sum(end <= size for _, end in spans))
        assert found.shape == (2, frames) and (found == tokens[:, :frames]).all()
        assert full.n_samples == frames * 96 * 44100 // 16000 and full.n_frames == frames


@SAMPLES
def test_garbage_between_any_two_bytes_costs_one_block_at_most(sample):
    data, tokens, header = sample()
    random = np.random.default_rng(1).bytes
    for place in range(header_bytes(data), len(data)):
        for garbage in (b"\0" * 9, b"\xff" * 40, random(1), random(3000)):
            found, _ = load(data[:place] + garbage + data[place:], recover=True)
            assert found.shape == tokens.shape
            assert_nothing_wrong(found, tokens)
            inside = any(start < place < end for start, end in block_spans(data, header))
            assert (found[0] == -1).sum() <= (header.block_frames if inside else 0)


@pytest.mark.parametrize("lost", [[0], [2], [5], [0, 5], [1, 2, 3], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("filler", ["zeros", "ones", "random", "cut"])
@pytest.mark.parametrize(
    "header",
    [
        make_header(n_samples=96 * 350, block_frames=64, channels=2),
        make_header(n_samples=None, block_frames=64, channels=2),
        make_image_header(
            width=35 * 12, height=10 * 12, components=2, channels=2, hop_length=12, block_frames=64
        ),
    ],
)
def test_lost_blocks_keep_the_time_of_the_others(lost, filler, header):
    n_samples = header.n_samples or 96 * 350
    tokens = make_tokens(header, 350)
    data = dump(tokens, header, n_samples)
    changed = bytearray(data)
    for number in reversed(lost):
        start, end = block_spans(data, header)[number]
        fill = {
            "zeros": bytes(end - start),
            "ones": b"\xff" * (end - start),
            "random": np.random.default_rng(number).bytes(end - start),
            "cut": b"",
        }
        changed[start:end] = fill[filler]
    result = verify(io.BytesIO(changed))
    assert not result.ok and (result.frames, result.n_samples) == (350, n_samples)
    assert result.blocks == 6
    found, full = load(bytes(changed), recover=True)
    assert found.shape == tokens.shape and full.n_samples == n_samples
    assert_nothing_wrong(found, tokens)
    assert set(lost) <= set(result.damaged)
    if filler != "cut" or len(lost) == 1:
        assert result.damaged == tuple(lost)


@pytest.mark.parametrize("header", [make_header(), make_image_header()])
def test_a_search_sees_over_the_edges_of_its_window(header):
    tokens = make_tokens(header)
    data = dump(tokens, header)
    start = block_spans(data, header)[1][0]
    for size in range(2**16 - 24, 2**16 + 2):
        found, _ = load(data[:start] + b"\x01" * size + data[start:], recover=True)
        assert (found == tokens).all()


@pytest.mark.parametrize("sample", [stereo, rgba])
def test_much_garbage_loses_nothing_behind_it(sample):
    data, tokens, header = sample()
    start = block_spans(data, header)[1][0]
    garbage = np.random.default_rng(3).bytes(4_000_000)
    found, _ = load(data[:start] + garbage + data[start:], recover=True)
    assert (found == tokens).all()


def test_a_block_that_claims_a_far_place_is_not_believed():
    data = craft(UNKNOWN, [(5, 4), (50_000, 4), (1, 4)], 12, 1152)
    reader = TokenReader(io.BytesIO(data), recover=True)
    assert [block.index for block in reader if block.tokens is not None] == [1]
    assert (reader.n_frames, reader.damaged) == (12, [0, 2])


@SAMPLES
def test_the_first_damage_is_the_one_reported(sample):
    data, _, header = sample()
    changed = bytearray(data)
    for number in (0, 2):
        changed[block_spans(data, header)[number][0] + 12] ^= 1
    result = verify(io.BytesIO(changed))
    assert result.damaged == (0, 2) and result.error.startswith("block 0: ")


def test_flipped_bits_in_a_check_do_not_make_a_block_of_another_number():
    header = make_header(n_samples=96 * 200, block_frames=2, codebook_size=2)
    tokens = make_tokens(header)
    data = dump(tokens, header)
    place = block_spans(data, header)[0][0] + 6
    check = struct.unpack_from("<I", data, place)[0]
    for one in range(32):
        for two in range(one + 1):
            changed = bytearray(data)
            struct.pack_into("<I", changed, place, check ^ (1 << one | 1 << two))
            found, _ = load(bytes(changed), recover=True)
            assert (found[0] == -1).tolist() == [True] * 2 + [False] * 198
            assert_nothing_wrong(found, tokens)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_damage_shifts_a_frame(data):
    common = dict(channels=2, codebook_size=5000, block_frames=16)
    header = data.draw(
        st.sampled_from(
            [
                make_header(n_samples=None, **common),
                make_image_header(width=160, height=80, components=4, **common),
            ]
        )
    )
    tokens = make_tokens(header, 200)
    changed = bytearray(dump(tokens, header, header.n_samples or 200 * 96))
    first = header_bytes(changed)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(first, len(changed)))
        size = data.draw(st.integers(0, 300))
        changed[start : start + size] = data.draw(st.binary(max_size=300))
    found, _ = load(bytes(changed), recover=True)
    assert_nothing_wrong(found, tokens)


def craft(header: TokenHeader, blocks, n_frames: int, n_samples: int, index: bytes | None = None):
    """A file with right checksums and (number, frames) of each block and totals as told."""
    data = dump_header(header)
    sizes = []
    for number, frames in blocks:
        payload = bytes(raw_bytes(header.codebook_size, frames * header.channels))
        head = struct.pack("<IH", RAW | len(payload) << 8, frames)
        check = zlib.crc32(head + payload) ^ number * 0x9E3779B1 % 2**32
        data += head + struct.pack("<I", check) + payload
        sizes.append(10 + len(payload))
    index = bytes(sizes) if index is None else index
    word = struct.pack("<I", 255 | len(index) << 8)
    trailer = word + struct.pack("<QQ", n_frames, n_samples) + index + word
    return data + trailer + struct.pack("<I", zlib.crc32(trailer))


# 7 frames of 600 samples or pixels, in blocks of 4
KNOWN, UNKNOWN = make_header(n_samples=600), make_header(n_samples=None)
IMAGE = make_image_header(width=600, height=1, hop_length=96)


@pytest.mark.parametrize("header", [KNOWN, UNKNOWN, IMAGE])
def test_what_agrees_is_read(header):
    found, full = load(craft(header, [(0, 4), (1, 3)], 7, 600))
    assert found.tolist() == [[0] * 7] and full.n_samples == 600


@pytest.mark.parametrize("header", [KNOWN, UNKNOWN, IMAGE])
@pytest.mark.parametrize(
    ("blocks", "n_frames", "n_samples", "index"),
    [
        ([(0, 4), (1, 3)], 7, 500, None),
        ([(0, 4), (1, 3)], 6, 600, None),
        ([(0, 4), (1, 3)], 6, 500, None),
        ([(0, 4), (1, 3)], 8, 700, None),
        ([(0, 4), (1, 4)], 7, 600, None),
        ([(0, 4), (1, 2)], 7, 600, None),
        ([(0, 4)], 7, 600, None),
        ([(0, 4)], 7, 600, b"\x13\x13"),
        ([(0, 3), (1, 4)], 7, 600, None),
        ([(0, 4), (1, 3), (2, 1)], 7, 600, None),
        ([(0, 4), (1, 3), (2, 1)], 9, 864, None),
        ([(0, 4), (1, 3)], 7, 600, b"\x13"),
        ([(0, 4), (1, 3)], 7, 600, b"\x13\x13"),
        ([(0, 4), (1, 3)], 7, 600, b"\x13\x11\x00"),
        ([(0, 4), (1, 3)], 7, 600, b"\x13\x91\x00"),
        ([(0, 4), (1, 3)], 7, 600, b"\x13\x91"),
        ([(1, 3), (0, 4)], 7, 600, None),
        ([], 7, 600, None),
        ([], 0, 600, None),
    ],
)
def test_what_disagrees_is_damage_though_every_checksum_is_right(
    header, blocks, n_frames, n_samples, index
):
    data = craft(header, blocks, n_frames, n_samples, index)
    for read in READERS:
        with pytest.raises(TokenFileError):
            read(data)
    assert not verify(io.BytesIO(data)).ok


@pytest.mark.parametrize("header", [KNOWN, IMAGE])
def test_the_header_decides_how_many_frames_are_due(header):
    with pytest.raises(TokenFileError, match="header"):
        load(craft(header, [(0, 4), (1, 3)], 7, 599))
    data = craft(header, [(0, 3), (1, 3)], 7, 600)
    with pytest.raises(TokenFileError, match=r"^block 0: 3 frames where 4 are due"):
        load(data)
    assert load(data, recover=True)[0].tolist() == [[-1] * 4 + [0] * 3]


@pytest.mark.parametrize("index", [b"\x13\x91", b"\x93\x80\x80\0\x11", b"\x13\x11\x80"])
def test_seeking_refuses_an_index_that_is_none(index):
    reader = TokenReader(io.BytesIO(craft(UNKNOWN, [(0, 4), (1, 3)], 7, 600, index)))
    with pytest.raises(TokenFileError):
        reader.seek_frame(4)


def test_the_number_of_blocks_is_bounded(monkeypatch):
    data = craft(UNKNOWN, [(0, 4), (1, 4), (2, 4)], 12, 1152)
    assert verify(io.BytesIO(data)).ok
    monkeypatch.setattr(tokenfile, "MAX_BLOCKS", 2)
    with pytest.raises(TokenFileError, match="block 2"):
        load(data)
    with pytest.raises(TokenFileError, match="larger block_frames"):
        TokenWriter(io.BytesIO(), UNKNOWN).write(make_tokens(UNKNOWN, 12))
    monkeypatch.setattr(tokenfile, "MAX_BLOCKS", 3)
    monkeypatch.setattr(tokenfile, "MAX_INDEX_BYTES", 2)
    with pytest.raises(TokenFileError, match="trailer"):
        load(data)


def test_the_end_of_another_file_is_noticed():
    header = make_header(n_samples=None)
    short = dump(make_tokens(header, 4), header, 4 * 96)
    long = dump(make_tokens(header, 9), header, 9 * 96)
    with pytest.raises(TokenFileError, match="trailer"):
        load(long[: block_spans(long, header)[1][1]] + short[block_spans(short, header)[0][1] :])


# ------------------------------------------------------------------------------------------ fuzz


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=400)
    | st.lists(st.sampled_from([b"\0", b"\xff", b"\1", b"\4", b"\n\0\0\4\0"]), max_size=200).map(
        b"".join
    ),
    st.sampled_from([make_header(), make_header(n_samples=None), make_image_header()]),
    st.booleans(),
)
def test_any_bytes_behind_a_header_are_an_error_or_lost(garbage, header, as_pipe):
    data = dump_header(header) + garbage
    source = Pipe if as_pipe else io.BytesIO
    with pytest.raises(TokenFileError):
        read_tokens(source(data))
    found, _ = read_tokens(source(data), recover=True)
    assert found.shape == (1, header.n_frames or 0) and (found == -1).all()


@pytest.mark.parametrize("record", [bytes.fromhex("0000f0070002"), b"\xff\0\0\x2f", b"\0", b"\xff"])
def test_a_file_made_to_be_slow_is_not(record):
    header = make_header(channels=255, codebook_size=2**32, block_frames=512, n_samples=None)
    start = dump_header(header)
    data = start + record * (4_000_000 // len(record))
    with allocating_less_than(16e6):
        begin = time.process_time()
        assert not verify(io.BytesIO(data)).ok
        assert time.process_time() - begin < 5


# ---------------------------------------------------------------------------- streaming and seeking


def test_a_pipe_gives_each_block_as_soon_as_it_is_written():
    header = make_header(n_samples=None, channels=2)
    tokens = make_tokens(header, 11)
    read_end, write_end = os.pipe()
    seen = threading.Semaphore(0)

    def write() -> None:
        with open(write_end, "wb", buffering=0) as stream:
            writer = TokenWriter(stream, header)
            for start in (0, 4, 8):
                writer.write(tokens[:, start : start + 4])
                if start < 8:
                    assert seen.acquire(timeout=10), "the block did not come through"
            writer.close(11 * 96 - 5)

    thread = threading.Thread(target=write)
    thread.start()
    with open(read_end, "rb") as stream:
        reader = TokenReader(stream)
        assert reader.n_samples is None and reader.n_frames is None
        blocks = []
        for block in reader:
            blocks.append(block)
            seen.release()
    thread.join()
    places = [(block.index, block.start_frame, block.n_frames) for block in blocks]
    assert places == [(0, 0, 4), (1, 4, 4), (2, 8, 3)]
    assert (np.concatenate([b.tokens for b in blocks], axis=1) == tokens).all()
    assert (reader.n_samples, reader.n_frames, reader.damaged) == (11 * 96 - 5, 11, [])


def test_memory_does_not_grow_with_the_length(tmp_path):
    header = make_header(n_samples=None, codebook_size=4096, block_frames=512)
    chunk = make_tokens(header, 10_000)
    n_chunks = 60  # one hour
    writer = TokenWriter(io.BytesIO(), header)
    with allocating_less_than(1e6):
        writer.write(np.tile(chunk, 20))
        assert tracemalloc.get_traced_memory()[0] < 1e6, "the writer keeps more than a block"
        tracemalloc.reset_peak()
        with open(tmp_path / "long.tok", "wb") as stream:
            writer = TokenWriter(stream, header)
            for _ in range(n_chunks):
                writer.write(chunk)
            writer.close(n_chunks * 10_000 * 96)
        for recover in (False, True):
            with open(tmp_path / "long.tok", "rb") as stream:
                reader = TokenReader(stream, recover=recover)
                assert sum(block.n_frames for block in reader) == n_chunks * 10_000


@SAMPLES
def test_seeking(sample):
    data, tokens, header = sample()
    for recover in (False, True):
        for frame in range(header.n_frames + 1):
            reader = TokenReader(skipped(b"before" + data, 6), recover=recover)
            reader.seek_frame(frame)
            blocks = list(reader)
            assert reader.damaged == [] and reader.error is None
            if frame < header.n_frames:
                assert blocks[0].start_frame <= frame < blocks[0].start_frame + blocks[0].n_frames
            for block in blocks:
                stop = block.start_frame + block.n_frames
                assert (block.tokens == tokens[:, block.start_frame : stop]).all()
            if blocks:
                assert stop == header.n_frames
            reader.seek_frame(0)
            assert sum(block.n_frames for block in reader) == header.n_frames
        for frame in (-1, header.n_frames + 1):
            with pytest.raises(ValueError, match=str(frame)):
                reader.seek_frame(frame)


def skipped(data: bytes, start: int) -> io.BytesIO:
    stream = io.BytesIO(data)
    stream.seek(start)
    return stream


def test_the_trailer_tells_the_length_up_front():
    data, tokens, header = stereo()
    reader = TokenReader(io.BytesIO(data))
    first = next(iter(reader))
    assert reader.n_samples is None
    assert reader.read_trailer() == reader.n_samples == header.n_samples
    assert reader.n_frames == 13
    rest = [block.tokens for block in reader]
    assert (np.concatenate([first.tokens, *rest], axis=1) == tokens).all()


@pytest.mark.parametrize("sample", [mono, grey])
def test_seeking_needs_a_whole_trailer_and_a_stream_that_seeks(sample):
    data, _, _ = sample()
    with pytest.raises(TokenFileError, match="seek"):
        TokenReader(Pipe(data)).seek_frame(0)
    for broken in (data[:-1], data + b"\0", data[:68], data[:72], data[:80] + data[81:]):
        reader = TokenReader(io.BytesIO(broken), recover=True)
        with pytest.raises(TokenFileError):
            reader.seek_frame(0)
        assert sum(block.n_frames for block in reader) == 10, "the reading position was lost"


@pytest.mark.parametrize("sample", [mono, grey])
def test_seeking_over_a_damaged_block(sample):
    data, tokens, header = sample()
    changed = bytearray(data)
    changed[block_spans(data, header)[1][0] + 12] ^= 1
    reader = TokenReader(io.BytesIO(changed), recover=True)
    assert [block.tokens is None for block in reader] == [False, True, False]
    reader.seek_frame(8)
    assert [block.index for block in reader] == [2] and reader.damaged == []
    reader.seek_frame(4)
    assert next(iter(reader)).tokens is None
    reader.seek_frame(0)
    assert [block.index for block in reader] == [0, 1, 2] and reader.damaged == [1]
    reader = TokenReader(io.BytesIO(changed))
    reader.seek_frame(8)
    assert (next(iter(reader)).tokens == tokens[:, 8:]).all()
    reader.seek_frame(4)
    with pytest.raises(TokenFileError, match="block 1"):
        next(iter(reader))


# -------------------------------------------------------------------------------------- on disk


def test_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    header = make_header()
    tokens = make_tokens(header)
    path = tmp_path / ("n" * 250 + ".tok")
    write_tokens(str(path), tokens, header)
    assert (read_tokens(path)[0] == tokens).all()
    before = path.read_bytes()

    def interrupt(self, n_samples=None):
        raise KeyboardInterrupt

    with pytest.raises(TokenFileError):
        write_tokens(path, tokens[:, 1:], header)
    with pytest.raises(ValueError):
        write_tokens(path, -1 - tokens, header)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TokenWriter, "close", interrupt)
        write_tokens(path, tokens, header)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    write_tokens(path, tokens[:, ::-1].copy(), header)
    assert (read_tokens(path)[0] == tokens[:, ::-1]).all() and list(tmp_path.iterdir()) == [path]


def test_links_and_devices_stay_what_they_are(tmp_path):
    header = make_header()
    (tmp_path / "target.tok").write_bytes(b"")
    (tmp_path / "link.tok").symlink_to("target.tok")
    write_tokens(tmp_path / "link.tok", make_tokens(header), header)
    assert (tmp_path / "link.tok").is_symlink() and verify(tmp_path / "target.tok").ok
    os.mkfifo(tmp_path / "fifo")
    results = []
    thread = threading.Thread(target=lambda: results.append(verify(tmp_path / "fifo")))
    thread.start()
    write_tokens(tmp_path / "fifo", make_tokens(header), header)
    thread.join()
    assert results[0].ok and (tmp_path / "fifo").is_fifo()


@pytest.mark.parametrize(("sample", "n_samples"), [(mono, 960), (grey, 350)])
def test_verify_reports(tmp_path, sample, n_samples):
    data, _, header = sample()
    path = tmp_path / "a.tok"
    path.write_bytes(data)
    result = verify(path)
    assert result == verify(Pipe(data))
    assert (result.ok, result.error, result.header) == (True, None, header)
    assert (result.blocks, result.damaged, result.frames) == (3, (), 10)
    assert result.n_samples == n_samples
    assert result.total_bytes == len(data) and result.payload_bytes == 9 + 9 + 5
    with pytest.raises(FileNotFoundError):
        verify(tmp_path / "none.tok")


def test_importing_needs_no_more_than_numpy():
    text = Path(tokenfile.__file__).read_text(encoding="utf-8")
    assert "vpcodec" not in "".join(re.findall(r"^\s*(?:import|from) .*$", text, re.MULTILINE))
