"""The `.tok` container: tokens in checked blocks, readable and writable as a stream.

Every byte of the format is described in docs/token-format.md. A file is a header, blocks of whole
frames and a trailer; each carries a CRC-32, and a block's also tells its number, so that a reader
finds its place again behind damage. Memory is bounded by one block plus the index of block sizes.
"""

from __future__ import annotations

import math
import os
import re
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral
from typing import BinaryIO, ClassVar, NamedTuple, Protocol, Self

import numpy as np

from .media.files import atomic_output

MAGIC = b"\x89TOK\r\n\x1a\n"
VERSION = 1
AUDIO, IMAGE = 1, 2  # the kind
RAW, ENTROPY = 0, 1  # coding ids
TRAILER = 255  # in the place of one

MAX_MODEL_BYTES = 64
MAX_RATE = 2**24  # Hz
MAX_HOP = 2**20
MAX_SAMPLES = 2**48  # per channel
MAX_SIDE = 2**20  # pixels
MAX_PIXELS = 2**32
MAX_BLOCKS = 2**20
MAX_BLOCK_TOKENS = 2**17  # of all channels together
MAX_INDEX_BYTES = 3 * MAX_BLOCKS  # three LEB128 bytes hold the largest block
MAX_LOST_TOKENS = 2**26  # that read_tokens fills in for damaged blocks

_UNKNOWN = 2**64 - 1  # n_samples in the header of a piped file
_FIXED = struct.Struct("<8s4B2IQ2IH16sB")  # the header up to the model name
_BLOCK = struct.Struct("<IHI")  # coding id and payload bytes << 8, frames, check
_TRAILER = struct.Struct("<IQQ")  # 255 and index bytes << 8, frames, samples; then the index
_TAIL = struct.Struct("<II")  # the trailer's first word again, CRC-32
_CRC = struct.Struct("<I")
_STRIDE = 0x9E3779B1  # per block number in its check: no flipped bit looks like a near number
_UNSTRIDE = pow(_STRIDE, -1, 2**32)
_WINDOW = 2**16  # bytes looked through at a time behind damage
_PATIENCE = 16  # checksummed bytes per byte of the file before such a search gives up


class TokenFileError(ValueError):
    """Damage in a token file, or misuse of the format: one line, without the file's name."""


class NoCoderError(TokenFileError):
    """The tokens are entropy coded, and the reader was given no coder."""


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ------------------------------------------------------------------------------- payload codings


@lru_cache(maxsize=64)
def _power(base: int, exponent: int) -> int:
    return base**exponent


def raw_bytes(codebook_size: int, n_tokens: int) -> int:
    """Bytes that `n_tokens` tokens take as one mixed-radix integer."""
    return _ceil_div((_power(codebook_size, n_tokens) - 1).bit_length(), 8)


def _limbs(codebook_size: int) -> np.ndarray:
    """Weights of the tokens that share one 63-bit limb, int64 (G,)."""
    return codebook_size ** np.arange(63 // (codebook_size - 1).bit_length(), dtype=np.int64)


def _pack_raw(tokens: np.ndarray, header: TokenHeader) -> bytes:
    weights = _limbs(header.codebook_size)
    tokens = tokens.ravel()
    padded = np.pad(tokens, (0, -tokens.size % weights.size))
    values = (padded.reshape(-1, weights.size) @ weights).tolist()
    digits = weights.size
    while len(values) > 1:
        values += [0] * (len(values) % 2)
        base = _power(header.codebook_size, digits)
        values = [low + base * high for low, high in zip(values[::2], values[1::2], strict=True)]
        digits *= 2
    return values[0].to_bytes(raw_bytes(header.codebook_size, tokens.size), "little")


def _unpack_raw(payload: bytes, n_frames: int, header: TokenHeader) -> np.ndarray:
    size, base = n_frames * header.channels, header.codebook_size
    weights = _limbs(base)
    value = int.from_bytes(payload, "little")
    if len(payload) != raw_bytes(base, size) or value >= _power(base, size):
        raise TokenFileError("the payload is not a number of that many tokens")
    values, limbs = [value], _ceil_div(size, weights.size)
    for level in reversed(range((limbs - 1).bit_length())):
        divisor = _power(base, weights.size << level)
        values = [part for value in values for part in reversed(divmod(value, divisor))]
    tokens = np.array(values[:limbs], np.int64)[:, None] // weights % base
    return tokens.ravel()[:size].reshape(n_frames, header.channels)


class Coder(Protocol):
    """Entropy coder of a model's tokens, as `vpcodec.entropy.TokenCoder`."""

    codebook_size: int

    def pack(self, tokens: np.ndarray) -> bytes:
        """int64 (n_frames, channels) -> payload."""

    def unpack(self, payload: bytes, n_frames: int, channels: int) -> np.ndarray:
        """Payload -> int64 (n_frames, channels); ValueError if it is damaged."""


def _block_crc(coding: int, n_frames: int, payload: bytes) -> int:
    head = struct.pack("<IH", coding | len(payload) << 8, n_frames)
    return zlib.crc32(payload, zlib.crc32(head))


# ---------------------------------------------------------------------------------------- header


@dataclass(frozen=True, kw_only=True)
class TokenHeader(ABC):
    """What a token file says about itself, whatever its kind; wrong values raise TokenFileError.

    model: name, 1 to 64 bytes of printable UTF-8. fingerprint: 16 bytes, of weights and
    configuration. channels: 1 to 255. hop_length: what a frame stands for, see the kinds.
    codebook_size: 2 to 2**32. block_frames: frames in every block but the last; times channels at
    most MAX_BLOCK_TOKENS.

    Every kind has n_samples too: the total by which the trailer confirms the length, or None when
    only the trailer knows it.
    """

    kind: ClassVar[int]
    _own: ClassVar[dict[str, tuple[int, int]]]  # fields of the kind, as in the file: bounds

    model: str
    fingerprint: bytes
    channels: int
    hop_length: int
    codebook_size: int
    block_frames: int = 512

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model.isprintable():
            raise TokenFileError(f"model name {self.model!r} is not printable text")
        if not 1 <= len(self.model.encode(errors="surrogatepass")) <= MAX_MODEL_BYTES:
            raise TokenFileError(f"model name {self.model!r} is not 1 to {MAX_MODEL_BYTES} bytes")
        if not isinstance(self.fingerprint, bytes) or len(self.fingerprint) != 16:
            raise TokenFileError(f"fingerprint {self.fingerprint!r} is not 16 bytes")
        bounds = self._own | {
            "channels": (1, 255),
            "hop_length": (1, MAX_HOP),
            "codebook_size": (2, 2**32),
            "block_frames": (1, 2**16 - 1),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is None and name == "n_samples":
                continue
            if not isinstance(value, Integral) or not low <= value <= high:
                raise TokenFileError(f"{name} {value!r} is not an integer from {low} to {high}")
            object.__setattr__(self, name, int(value))
        if self.block_frames * self.channels > MAX_BLOCK_TOKENS:
            raise TokenFileError(
                f"block_frames {self.block_frames} times {self.channels} channels is more than "
                f"{MAX_BLOCK_TOKENS} tokens"
            )
        if (self.n_frames or 0) > MAX_BLOCKS * self.block_frames:
            raise TokenFileError(f"n_frames {self.n_frames} needs more than {MAX_BLOCKS} blocks")

    @property
    @abstractmethod
    def n_frames(self) -> int | None:
        """Frames of the whole file; None when only the trailer knows."""

    @property
    def bits_per_token(self) -> float:
        """log2(codebook_size)."""
        return math.log2(self.codebook_size)

    def with_total(self, n_samples: int) -> Self:
        """This header with n_samples known; TokenFileError where it says another number itself."""
        if self.n_samples is None:
            return replace(self, n_samples=n_samples)
        if self.n_samples != n_samples:
            raise TokenFileError(f"n_samples is {n_samples}, in the header {self.n_samples}")
        return self


@dataclass(frozen=True, kw_only=True)
class AudioHeader(TokenHeader):
    """Header of a recording.

    sample_rate: Hz, the model's. original_rate: Hz, the source's. n_samples: of the source, per
    channel, at original_rate; None when only the trailer knows. hop_length: samples at sample_rate
    per frame.
    """

    kind: ClassVar[int] = AUDIO
    _own: ClassVar[dict[str, tuple[int, int]]] = {
        "sample_rate": (1, MAX_RATE),
        "original_rate": (1, MAX_RATE),
        "n_samples": (0, MAX_SAMPLES),
    }

    sample_rate: int
    original_rate: int
    n_samples: int | None

    @property
    def model_samples(self) -> int | None:
        """Samples per channel at sample_rate, ceil(n_samples * sample_rate / original_rate)."""
        if self.n_samples is None:
            return None
        return _ceil_div(self.n_samples * self.sample_rate, self.original_rate)

    @property
    def n_frames(self) -> int | None:
        """Frames, ceil(model_samples / hop_length)."""
        samples = self.model_samples
        return None if samples is None else _ceil_div(samples, self.hop_length)

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop_length

    @property
    def nominal_bitrate(self) -> float:
        """Bits per second of all channels, at log2(codebook_size) bits a token."""
        return self.frame_rate * self.bits_per_token * self.channels

    def samples_in(self, n_frames: int) -> int:
        """Samples per channel at original_rate in whole frames, rounded down."""
        return n_frames * self.hop_length * self.original_rate // self.sample_rate


@dataclass(frozen=True, kw_only=True)
class ImageHeader(TokenHeader):
    """Header of a picture, whose frames are squares of pixels, row by row from the top left.

    width, height: pixels of the upright source, at most MAX_SIDE each and MAX_PIXELS together.
    components: of the source; 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA. channels: 1, or 2 where
    there is alpha, whose plane is coded as a grey picture. hop_length: side of a square, in pixels.
    """

    kind: ClassVar[int] = IMAGE
    _own: ClassVar[dict[str, tuple[int, int]]] = {
        "width": (1, MAX_SIDE),
        "height": (1, MAX_SIDE),
        "components": (1, 4),
    }

    width: int
    height: int
    components: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_pixels > MAX_PIXELS:
            raise TokenFileError(
                f"width {self.width} times height {self.height} is more than {MAX_PIXELS} pixels"
            )
        if self.channels != 2 - self.components % 2:
            raise TokenFileError(
                f"channels {self.channels} does not fit {self.components} components"
            )

    @property
    def rows(self) -> int:
        """Rows of squares, ceil(height / hop_length)."""
        return _ceil_div(self.height, self.hop_length)

    @property
    def columns(self) -> int:
        """Squares in a row, ceil(width / hop_length)."""
        return _ceil_div(self.width, self.hop_length)

    @property
    def n_frames(self) -> int:
        """Frames, rows * columns."""
        return self.rows * self.columns

    @property
    def n_pixels(self) -> int:
        """width * height."""
        return self.width * self.height

    @property
    def n_samples(self) -> int:
        """The total that the trailer repeats: n_pixels."""
        return self.n_pixels

    @property
    def bits_per_pixel(self) -> float:
        """Bits per pixel of all channels, at log2(codebook_size) bits a token."""
        return self.channels * self.bits_per_token / self.hop_length**2


_KINDS = {header.kind: header for header in (AudioHeader, ImageHeader)}


def _pack_header(header: TokenHeader) -> bytes:
    model = header.model.encode()
    own = [getattr(header, name) for name in header._own]
    data = _FIXED.pack(
        MAGIC, VERSION, VERSION, header.kind, header.channels,
        *(_UNKNOWN if value is None else value for value in own),
        header.hop_length, header.codebook_size - 1, header.block_frames,
        header.fingerprint, len(model),
    ) + model  # fmt: skip
    return data + _CRC.pack(zlib.crc32(data))


def _parse_header(data: bytes) -> TokenHeader:
    (_, _, _, kind, channels, *own, hop_length, top, block_frames, fingerprint,
     _) = _FIXED.unpack_from(data)  # fmt: skip
    if zlib.crc32(data[:-4]) != _CRC.unpack(data[-4:])[0]:
        raise TokenFileError("the header is damaged")
    if kind not in _KINDS:
        raise TokenFileError(f"kind {kind} is neither audio ({AUDIO}) nor an image ({IMAGE})")
    try:
        model = data[_FIXED.size : -4].decode()
    except UnicodeDecodeError:
        raise TokenFileError("the model name is not UTF-8") from None
    header = _KINDS[kind]
    values = (None if value == _UNKNOWN else value for value in own)
    return header(
        model=model, fingerprint=fingerprint, channels=channels, hop_length=hop_length,
        codebook_size=top + 1, block_frames=block_frames, **dict(zip(header._own, values)),
    )  # fmt: skip


# --------------------------------------------------------------------------------------- trailer


class _Trailer(NamedTuple):
    n_frames: int
    n_samples: int
    index: bytes


def _leb128(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


def _pack_trailer(trailer: _Trailer) -> bytes:
    word = TRAILER | len(trailer.index) << 8
    data = _TRAILER.pack(word, trailer.n_frames, trailer.n_samples) + trailer.index
    data += _CRC.pack(word)
    return data + _CRC.pack(zlib.crc32(data))


def _trailer_bytes(word: int) -> int:
    """Size of the trailer with this first word; TokenFileError if it cannot be one."""
    if word & 255 != TRAILER or word >> 8 > MAX_INDEX_BYTES:
        raise TokenFileError("the trailer is damaged")
    return _TRAILER.size + (word >> 8) + _TAIL.size


def _parse_trailer(data: bytes, header: TokenHeader) -> _Trailer:
    word, n_frames, n_samples = _TRAILER.unpack_from(data)
    index = data[_TRAILER.size : -_TAIL.size]
    if _TAIL.unpack(data[-_TAIL.size :]) != (word, zlib.crc32(data[:-4])):
        raise TokenFileError("the trailer is damaged")
    if header.with_total(n_samples).n_frames != n_frames:
        raise TokenFileError("the trailer does not agree with the header")
    if np.count_nonzero(np.frombuffer(index, np.uint8) < 128) != _n_blocks(n_frames, header):
        raise TokenFileError("the trailer does not agree with itself")
    return _Trailer(n_frames, n_samples, index)


def _n_blocks(n_frames: int, header: TokenHeader) -> int:
    return _ceil_div(n_frames, header.block_frames)


def _parse_index(index: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Where each block begins behind the header, and each entry in the index; int64 (B + 1,)."""
    data = np.frombuffer(index, np.uint8)
    entries = np.concatenate([[0], np.flatnonzero(data < 128) + 1])
    lengths = np.diff(entries)
    if entries[-1] != data.size or (lengths > 3).any():
        raise TokenFileError("the trailer's index is damaged")
    shifts = 7 * (np.arange(data.size) - np.repeat(entries[:-1], lengths))
    ends = np.cumsum((data & 127).astype(np.int64) << shifts)
    return np.concatenate([[0], ends])[entries], entries


# ---------------------------------------------------------------------------------------- writer


class TokenWriter:
    """Writes a token file to a binary stream, which may be a pipe and stays open.

    The header goes out at once, each block as soon as it is full, the rest with `close`. A block is
    entropy coded where there is a coder, which makes it shorter.
    """

    def __init__(
        self, stream: BinaryIO, header: TokenHeader, *, coder: Coder | None = None
    ) -> None:
        if coder is not None and coder.codebook_size != header.codebook_size:
            raise ValueError("the coder is for another codebook")
        self.header = header
        self._coder = coder
        self.n_frames = 0
        self._number = 0  # of the next block
        self._stream = stream
        self._pending = np.empty((header.channels, 0), np.int64)
        self._index: bytearray | None = bytearray()
        stream.write(_pack_header(header))

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens, int64 (channels, n) in [0, codebook_size); ValueError if they are not."""
        if self._index is None:
            raise ValueError("write to a closed TokenWriter")
        header = self.header
        if not isinstance(tokens, np.ndarray) or tokens.dtype != np.int64:
            raise ValueError(f"tokens are {getattr(tokens, 'dtype', type(tokens))}, not int64")
        if tokens.ndim != 2 or tokens.shape[0] != header.channels:
            raise ValueError(f"tokens have shape {tokens.shape}, not ({header.channels}, n)")
        bad = tokens[(tokens < 0) | (tokens >= header.codebook_size)]
        if bad.size:
            raise ValueError(f"token {bad[0]} is not in 0 to {header.codebook_size - 1}")
        self.n_frames += tokens.shape[1]
        tokens = np.concatenate([self._pending, tokens], axis=1)
        whole = tokens.shape[1] - tokens.shape[1] % header.block_frames
        for start in range(0, whole, header.block_frames):
            self._write_block(tokens[:, start : start + header.block_frames])
        self._pending = tokens[:, whole:].copy()

    def close(self, n_samples: int | None = None) -> None:
        """Write what is left, and the trailer; the stream stays open.

        n_samples: the total, needed when the header does not say it.
        TokenFileError when it is missing, or does not agree with the header or the frames written.
        """
        if self._index is None:
            raise ValueError("close of a closed TokenWriter")
        header = self.header
        if n_samples is None:
            n_samples = header.n_samples
        if n_samples is None:
            raise TokenFileError("n_samples is neither given nor in the header")
        header = header.with_total(n_samples)
        if self.n_frames != header.n_frames:
            raise TokenFileError(
                f"{self.n_frames} frames were written, {n_samples} samples need {header.n_frames}"
            )
        if self._pending.size:
            self._write_block(self._pending)
        trailer = _Trailer(self.n_frames, header.n_samples, bytes(self._index))
        self._stream.write(_pack_trailer(trailer))
        self._index = None

    def _write_block(self, tokens: np.ndarray) -> None:
        if self._number == MAX_BLOCKS:
            raise TokenFileError(f"more than {MAX_BLOCKS} blocks; choose larger block_frames")
        coding, payload = RAW, None
        if self._coder is not None:
            coding, payload = ENTROPY, self._coder.pack(tokens.T)
        if payload is None or len(payload) >= raw_bytes(self.header.codebook_size, tokens.size):
            coding, payload = RAW, _pack_raw(tokens.T, self.header)
        check = _block_crc(coding, tokens.shape[1], payload) ^ self._number * _STRIDE % 2**32
        head = _BLOCK.pack(coding | len(payload) << 8, tokens.shape[1], check)
        self._stream.write(head + payload)
        self._index += _leb128(len(head) + len(payload))
        self._number += 1


# ---------------------------------------------------------------------------------------- reader


@dataclass(frozen=True, eq=False)
class TokenBlock:
    """One block: tokens int64 (channels, n_frames) from start_frame on, None where damaged."""

    index: int
    start_frame: int
    tokens: np.ndarray | None
    n_frames: int


class TokenReader:
    """Reads a token file from a binary stream, block by block, as an iterator of TokenBlock.

    The header is read at once; TokenFileError if it is damaged. Later damage is a TokenFileError
    too, or with `recover` a block without tokens, so that the other frames keep their time. Up to
    the first damage the stream is asked for no byte behind the trailer but one, to see that the
    file ends there.

    header: AudioHeader or ImageHeader. n_samples (pixels of an image), n_frames: the totals, None
    while unknown; should neither header nor trailer tell, n_samples is AudioHeader.samples_in of
    the frames up to the last whole block in the end. damaged: numbers of the damaged blocks, and
    error: the first damage, since the last seek. payload_bytes, total_bytes: used so far. coder:
    of entropy-coded blocks, may be set when the header is known; NoCoderError where it is missing.
    """

    def __init__(
        self, stream: BinaryIO, *, recover: bool = False, coder: Coder | None = None
    ) -> None:
        self.coder = coder
        self._stream = stream
        self._recover = recover
        self._ahead = bytearray()  # read, not yet used
        self._checked = 0  # bytes checksummed
        self._trailer: _Trailer | None = None
        self.payload_bytes = self.total_bytes = 0
        self.header = self._read_header()
        self.n_samples = self.header.n_samples
        self.n_frames = self.header.n_frames
        self._first = stream.tell() if stream.seekable() else None
        self._start(0, b"")

    def __iter__(self) -> Iterator[TokenBlock]:
        while not self._done:
            try:
                record = self._record()
            except NoCoderError:
                raise
            except TokenFileError as error:
                self._report(error)
                record = self._search()
            if isinstance(record, TokenBlock):
                yield from self._lost(record.index)
                self._number += 1
                yield record
            else:
                self._finish(record)
                yield from self._lost(_n_blocks(self.n_frames, self.header))

    def read_all(self) -> tuple[np.ndarray, TokenHeader]:
        """What is left: tokens int64 (channels, n_frames), and the header with n_samples.

        With `recover`, the frames of damaged blocks are -1, and a damaged or missing end leaves
        n_samples as it is found. TokenFileError for other damage, and for more than
        MAX_LOST_TOKENS tokens to fill in.
        """
        channels, lost = self.header.channels, 0
        parts = [np.empty((channels, 0), np.int64)]
        for block in self:
            tokens = block.tokens
            if tokens is None:
                lost += channels * block.n_frames
                if lost > MAX_LOST_TOKENS:
                    raise TokenFileError(f"more than {MAX_LOST_TOKENS} tokens are lost")
                tokens = np.full((channels, block.n_frames), -1)
            parts.append(tokens)
        return np.concatenate(parts, axis=1), self.header.with_total(self.n_samples)

    def read_trailer(self) -> int:
        """n_samples, from the end of a seekable stream; the reading position stays.

        TokenFileError when the stream cannot seek or the trailer is damaged.
        """
        if self._first is None:
            raise TokenFileError("the stream cannot seek")
        position = self._stream.tell()
        try:
            end = self._stream.seek(0, os.SEEK_END)
            self._stream.seek(max(self._first, end - _TAIL.size))
            tail = self._stream.read(_TAIL.size)
            size = _trailer_bytes(_TAIL.unpack(tail)[0]) if len(tail) == _TAIL.size else end + 1
            if end - size < self._first:
                raise TokenFileError("the trailer is damaged")
            self._stream.seek(end - size)
            trailer = _parse_trailer(self._stream.read(size), self.header)
            if _parse_index(trailer.index)[0][-1] != end - size - self._first:
                raise TokenFileError("the trailer does not agree with the size of the file")
        finally:
            self._stream.seek(position)
        self._trailer = trailer
        self.n_frames, self.n_samples = trailer.n_frames, trailer.n_samples
        return trailer.n_samples

    def seek_frame(self, frame: int) -> None:
        """Let the next iteration begin with the block that holds `frame`; n_frames is the end.

        ValueError for a frame outside the file, TokenFileError as in `read_trailer`.
        """
        if self._trailer is None:
            self.read_trailer()
        if not 0 <= frame <= self.n_frames:
            raise ValueError(f"frame {frame} is not in 0 to {self.n_frames}")
        offsets, entries = _parse_index(self._trailer.index)
        number = frame // self.header.block_frames
        self._stream.seek(self._first + int(offsets[number]))
        self._ahead.clear()
        self._start(number, self._trailer.index[: entries[number]])

    def _start(self, number: int, index: bytes) -> None:
        self._number = number  # of the next block
        self._index = bytearray(index)  # what the trailer must say of the blocks before it
        self._done = False
        self.damaged: list[int] = []
        self.error: str | None = None

    def _report(self, error: TokenFileError) -> None:
        if not self._recover:
            raise error
        self.error = self.error or str(error)

    def _fill(self, size: int) -> bool:
        """Read ahead until `size` bytes are there; False if the stream ends before."""
        while (missing := size - len(self._ahead)) > 0:
            chunk = self._stream.read(missing)
            if not chunk:
                return False
            self._ahead += chunk
        return True

    def _skip(self, size: int) -> None:
        del self._ahead[:size]
        self.total_bytes += size

    def _read_header(self) -> TokenHeader:
        whole = self._fill(_FIXED.size)
        magic = bytes(self._ahead[: len(MAGIC)])
        if not magic:
            raise TokenFileError("the file is empty")
        if magic != MAGIC[: len(magic)]:
            changed = "; a transfer as text changed it" if magic[:4] == MAGIC[:4] else ""
            raise TokenFileError(f"not a token file{changed}")
        if not whole:
            raise TokenFileError("the file ends inside its header")
        minimum, model_bytes = self._ahead[9], self._ahead[_FIXED.size - 1]
        if minimum > VERSION:
            raise TokenFileError(f"format version {minimum} is newer than {VERSION}")
        if model_bytes > MAX_MODEL_BYTES:
            raise TokenFileError(f"the model name has more than {MAX_MODEL_BYTES} bytes")
        size = _FIXED.size + model_bytes + _CRC.size
        if not self._fill(size):
            raise TokenFileError("the file ends inside its header")
        header = _parse_header(bytes(self._ahead[:size]))
        self._skip(size)
        return header

    def _record(self, slack: int = 0) -> TokenBlock | _Trailer:
        """The block or trailer at the reading position; TokenFileError if there is none.

        The block's number is the next one, or up to `slack` later.
        """
        if not self._fill(_BLOCK.size):
            raise TokenFileError(f"block {self._number}: the file ends before a block or trailer")
        if self._ahead[0] == TRAILER:
            return self._read_trailer()
        return self._read_block(slack)

    def _read_block(self, slack: int) -> TokenBlock:
        header, place = self.header, f"block {self._number}"
        word, n_frames, check = _BLOCK.unpack_from(self._ahead)
        coding, length = word & 255, word >> 8
        token_bits = (header.codebook_size - 1).bit_length()
        if coding not in (RAW, ENTROPY):
            raise TokenFileError(f"{place}: unknown coding id {coding}")
        if length > _ceil_div(n_frames * header.channels * token_bits, 8):
            raise TokenFileError(f"{place}: {length} bytes are too many for {n_frames} frames")
        if not 1 <= n_frames <= header.block_frames:
            raise TokenFileError(f"{place}: {n_frames} frames are not 1 to {header.block_frames}")
        if not self._fill(_BLOCK.size + length):
            raise TokenFileError(f"{place}: the file ends inside it")
        payload = bytes(self._ahead[_BLOCK.size : _BLOCK.size + length])
        number = (_block_crc(coding, n_frames, payload) ^ check) * _UNSTRIDE % 2**32
        self._checked += length
        if not self._number <= number <= min(self._number + slack, MAX_BLOCKS - 1):
            raise TokenFileError(f"{place}: the checksum is wrong")
        due = self._frames_due(number)
        if n_frames > due or (n_frames < due and self.n_frames is not None):
            raise TokenFileError(f"{place}: {n_frames} frames where {due} are due")
        if coding == ENTROPY and self.coder is None:
            raise NoCoderError(f"entropy coded: needs the tables of the model {header.model!r}")
        try:
            if coding == RAW:
                tokens = _unpack_raw(payload, n_frames, header)
            else:
                tokens = self.coder.unpack(payload, n_frames, header.channels)
        except ValueError as error:
            raise TokenFileError(f"{place}: {error}") from None
        start = number * header.block_frames
        if n_frames < header.block_frames:
            self.n_frames = start + n_frames
        self._index += _leb128(_BLOCK.size + length)
        self._skip(_BLOCK.size + length)
        self.payload_bytes += length
        return TokenBlock(number, start, tokens.T, n_frames)

    def _read_trailer(self) -> _Trailer:
        word = _CRC.unpack_from(self._ahead)[0]
        size = _trailer_bytes(word)
        if self.error is None and word >> 8 != len(self._index):
            raise TokenFileError("the trailer does not agree with the blocks")
        if not self._fill(size):
            raise TokenFileError("the file ends inside its trailer")
        if self._ahead[:4] != self._ahead[size - _TAIL.size : size - 4]:
            raise TokenFileError("the trailer is damaged")
        self._checked += size
        trailer = _parse_trailer(bytes(self._ahead[:size]), self.header)
        due = self.n_frames
        if due is None:  # the blocks so far were full
            due = max(trailer.n_frames, self._number * self.header.block_frames)
        if trailer.n_frames != due or (self.error is None and trailer.index != self._index):
            raise TokenFileError("the trailer does not agree with the blocks")
        self._skip(size)
        return trailer

    def _search(self) -> TokenBlock | _Trailer | None:
        """The next whole block or trailer, or None if the stream ends before it.

        Blocks may have been cut out of what is skipped, but few for its size: that keeps the
        odds of taking damage for a block near one in 2**32.
        """
        codings = re.escape(bytes((RAW, ENTROPY)))
        begin = re.compile(
            b"[" + codings + rb"]..[\x00-\x08](?!\x00\x00)..|\xff..[\x00-\x30]", re.DOTALL
        )
        origin, position = self.total_bytes, 0
        while self._checked < _PATIENCE * self.total_bytes + 2**26:
            more = self._fill(_WINDOW)
            match = begin.search(self._ahead, position)
            if match is None and not more:
                break
            self._skip(match.start() if match else len(self._ahead) - _BLOCK.size)
            position = 0
            if match:
                try:
                    return self._record(1 + (self.total_bytes - origin) // _BLOCK.size)
                except NoCoderError:
                    raise
                except TokenFileError:
                    position = 1
        self._skip(len(self._ahead))
        return None

    def _frames_due(self, number: int) -> int:
        """Frames that the block of this number has, or may have if it can be the last."""
        left = self.header.block_frames
        if self.n_frames is not None:
            left = min(left, self.n_frames - number * left)
        return left

    def _lost(self, end: int) -> Iterator[TokenBlock]:
        """Damaged blocks, from the next one up to the one before `end`."""
        for number in range(self._number, end):
            self._number += 1
            self.damaged.append(number)
            start = number * self.header.block_frames
            yield TokenBlock(number, start, None, self._frames_due(number))

    def _finish(self, trailer: _Trailer | None) -> None:
        """Settle the totals, without a trailer from the header or else the blocks that are left."""
        self._done = True
        if trailer:
            self.n_frames, self.n_samples = trailer.n_frames, trailer.n_samples
            if self._fill(1):
                self._report(TokenFileError("there is data after the end of the file"))
        if self.n_frames is None:
            self.n_frames = self._number * self.header.block_frames
        if self.n_samples is None:
            self.n_samples = self.header.samples_in(self.n_frames)


# ------------------------------------------------------------------------------------ whole files


@dataclass(frozen=True)
class Verification:
    """What `verify` found: ok, or the first error; blocks and frames count the damaged ones too."""

    ok: bool
    error: str | None = None
    header: TokenHeader | None = None
    blocks: int = 0
    damaged: tuple[int, ...] = ()
    frames: int = 0
    n_samples: int = 0
    payload_bytes: int = 0
    total_bytes: int = 0


def read_tokens(
    source: str | os.PathLike | BinaryIO, *, recover: bool = False, coder: Coder | None = None
) -> tuple[np.ndarray, TokenHeader]:
    """Tokens int64 (channels, n_frames) of a file or stream, and its header with n_samples.

    coder: of the model, `Codec.coder`; without one, only files that are not entropy coded are read.
    `vpcodec.read_tokens` finds that of a bundled model.

    Errors and `recover` as of `TokenReader.read_all`; OSError for a path that cannot be read.
    """
    with opened(source) as stream:
        return TokenReader(stream, recover=recover, coder=coder).read_all()


def write_tokens(
    target: str | os.PathLike | BinaryIO,
    tokens: np.ndarray,
    header: TokenHeader,
    *,
    coder: Coder | None = None,
) -> None:
    """Write tokens, int64 (channels, header.n_frames), to a stream or, all or nothing, to a file.

    coder: `Codec.coder`, for a shorter file; none: packed at log2(codebook_size) bits a token.
    Errors as TokenWriter raises them; OSError for a path that cannot be written.
    """
    with nullcontext(target) if hasattr(target, "write") else atomic_output(target) as stream:
        writer = TokenWriter(stream, header, coder=coder)
        writer.write(tokens)
        writer.close()


def verify(source: str | os.PathLike | BinaryIO) -> Verification:
    """Read a whole file or stream in search of damage; only OSError is raised.

    Entropy-coded blocks are checked by their checksums, and not decoded.
    """
    with opened(source) as stream:
        try:
            reader = TokenReader(stream, recover=True, coder=_Undecoded())
        except TokenFileError as error:
            return Verification(False, str(error))
        blocks = sum(1 for _ in reader)
    return Verification(
        reader.error is None, reader.error, reader.header, blocks, tuple(reader.damaged),
        reader.n_frames, reader.n_samples, reader.payload_bytes, reader.total_bytes,
    )  # fmt: skip


class _Undecoded:
    """In the place of a coder where tokens are not needed."""

    codebook_size = 0

    def unpack(self, payload: bytes, n_frames: int, channels: int) -> np.ndarray:
        return np.broadcast_to(np.int64(0), (n_frames, channels))


def opened(source: str | os.PathLike | BinaryIO) -> AbstractContextManager[BinaryIO]:
    """A stream as it is, left open, or the file at a path."""
    return nullcontext(source) if hasattr(source, "read") else open(source, "rb")
