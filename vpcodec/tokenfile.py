"""The `.tok` container: tokens in checked blocks, readable and writable as a stream.

docs/token-format.md describes every byte of the format. A file is a header, blocks of whole frames
and a trailer. Each carries a CRC-32, and that of a block also encodes its number, so a reader finds
its place again after damage. A file of one block is a short header, the block and one CRC-32 for
both. Memory is bounded by one block plus the index of block sizes. Files of version 1, which have
longer headers, are read; written is version 2.
"""

from __future__ import annotations

import math
import os
import re
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from .media.files import atomic_output

MAGIC = b"\x89TOK\r\n\x1a\n"
VERSION = 2
ONE_BLOCK, BLOCKS = 1, 2  # forms of a file of version 2
AUDIO, IMAGE = 1, 2  # the field `kind`
RAW, ENTROPY = 0, 1  # coding ids
TRAILER = 255  # in place of a coding id

MAX_MODEL_BYTES = 64
MAX_RATE = 2**24  # Hz
MAX_HOP = 2**20
MAX_SAMPLES = 2**48  # per channel
MAX_SIDE = 2**20  # pixels
MAX_PIXELS = 2**32
MAX_BLOCKS = 2**20
MAX_BLOCK_FRAMES = 2**16 - 1
MAX_BLOCK_TOKENS = 2**17  # of all channels together
MAX_INDEX_BYTES = 3 * MAX_BLOCKS  # three LEB128 bytes hold the largest block
MAX_LOST_TOKENS = 2**16  # most that read_all fills in for damaged blocks, or as many as are left
MAX_NAMED = 1000  # damaged blocks that are named
IDENTITY_BYTES = 8  # of a token space's identity, in files; version 1 has all 16

_UNKNOWN = 2**64 - 1  # n_samples in the header of a piped file
_FIXED = struct.Struct("<8s4B2IQ2IH16sB")  # the header of version 1 up to the model name
_BLOCK = struct.Struct("<IHI")  # coding id and payload bytes << 8, frames, check
_TRAILER = struct.Struct("<IQQ")  # 255 and index bytes << 8, frames, samples; then the index
_TAIL = struct.Struct("<II")  # the first word of the trailer again, CRC-32
_CRC = struct.Struct("<I")
_STRIDE = 0x9E3779B1  # times the block number in its check: no flipped bit looks like a near number
_UNSTRIDE = pow(_STRIDE, -1, 2**32)
_WINDOW = 2**16  # bytes searched at a time after damage
_PATIENCE = 16  # checksummed bytes per byte of the file before a search gives up
_MAX_VARINT_BYTES = 8
_LONG = 2**14  # bits of a divisor from which on a product by its reciprocal is faster


class TokenFileError(ValueError):
    """Damage in a token file, or misuse of the format; one line, without the name of the file."""


class OtherWeightsError(TokenFileError):
    """Tokens of another model, which this one could decode if that was asked for."""


class GapError(TokenFileError):
    """More audio in a row is lost than is to be filled with silence."""


class NoCoderError(TokenFileError):
    """The tokens are entropy coded, and the reader has no coder."""


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ------------------------------------------------------------------------------- payload codings


@lru_cache(maxsize=64)
def _power(base: int, exponent: int) -> int:
    power: int = base**exponent
    return power


def raw_bytes(codebook_size: int, n_tokens: int) -> int:
    """Bytes that `n_tokens` tokens take as one mixed-radix integer."""
    return _ceil_div((_power(codebook_size, n_tokens) - 1).bit_length(), 8)


def _limbs(codebook_size: int) -> NDArray[np.int64]:
    """Weights of the tokens that share one 63-bit limb, int64 (G,)."""
    return codebook_size ** np.arange(63 // (codebook_size - 1).bit_length(), dtype=np.int64)


def _pack_raw(tokens: NDArray[np.int64], header: TokenHeader) -> bytes:
    weights = _limbs(header.codebook_size)
    tokens = tokens.ravel()
    padded = np.pad(tokens, (0, -tokens.size % weights.size))
    values: list[int] = (padded.reshape(-1, weights.size) @ weights).tolist()
    digits = weights.size
    while len(values) > 1:
        values += [0] * (len(values) % 2)
        base = _power(header.codebook_size, digits)
        values = [low + base * high for low, high in zip(values[::2], values[1::2], strict=True)]
        digits *= 2
    return values[0].to_bytes(raw_bytes(header.codebook_size, tokens.size), "little")


def _raw_value(payload: bytes, n_frames: int, header: TokenHeader) -> int:
    """The mixed-radix integer in a payload; TokenFileError if it is not one of so many tokens."""
    size, base = n_frames * header.channels, header.codebook_size
    value = int.from_bytes(payload, "little")
    if len(payload) != raw_bytes(base, size) or value >= _power(base, size):
        raise TokenFileError("the payload does not encode that many tokens")
    return value


def _unpack_raw(payload: bytes, n_frames: int, header: TokenHeader) -> NDArray[np.int64]:
    size, base = n_frames * header.channels, header.codebook_size
    weights = _limbs(base)
    values, limbs = [_raw_value(payload, n_frames, header)], _ceil_div(size, weights.size)
    for level in reversed(range((limbs - 1).bit_length())):
        divisor = _power(base, weights.size << level)
        values = [part for value in values for part in reversed(_divmod(value, divisor))]
    tokens = np.array(values[:limbs], np.int64)[:, None] // weights % base
    return tokens.ravel()[:size].reshape(n_frames, header.channels)


def _divmod(value: int, divisor: int) -> tuple[int, int]:
    """divmod(value, divisor) of a value below divisor**2, whose time grows as that of products.

    Python's own grows as the square, which would be seconds for the largest block.
    """
    bits = divisor.bit_length()
    if bits < _LONG:
        return divmod(value, divisor)
    quotient = (value >> bits) * _reciprocal(divisor) >> bits
    rest = value - quotient * divisor
    while rest < 0:
        quotient, rest = quotient - 1, rest + divisor
    while rest >= divisor:
        quotient, rest = quotient + 1, rest - divisor
    return quotient, rest


@lru_cache(maxsize=64)
def _reciprocal(divisor: int) -> int:
    """2**(2 * n) / divisor, to a few units, where n is the bits of the divisor; Newton's method."""
    bits = divisor.bit_length()
    if bits < _LONG:
        return (1 << 2 * bits) // divisor
    half = bits // 2 + 8
    rough = _reciprocal(divisor >> bits - half)
    error = (1 << bits + half) - divisor * rough
    return (rough << bits - half) + (rough * error >> 2 * half)


class Coder(Protocol):
    """An entropy coder of a model's tokens, such as `vpcodec.entropy.TokenCoder`."""

    codebook_size: int

    def pack(self, tokens: NDArray[np.int64], columns: int | None, /) -> bytes:
        """int64 (n_frames, channels) -> payload; of an image, with the frames in a row."""

    def unpack(
        self, payload: bytes, n_frames: int, channels: int, columns: int | None, /
    ) -> NDArray[np.int64]:
        """Payload -> int64 (n_frames, channels).

        Raises:
            ValueError: damaged payload.
        """


def _most_bytes(n_frames: int, header: TokenHeader) -> int:
    """Bytes that a payload of so many frames may have."""
    bits = (header.codebook_size - 1).bit_length()
    return _ceil_div(n_frames * header.channels * bits, 8)


def _columns(header: TokenHeader) -> int | None:
    """Frames in a row of an image; None: audio."""
    return header.columns if isinstance(header, ImageHeader) else None


def _block_crc(coding: int, n_frames: int, payload: bytes) -> int:
    head = struct.pack("<IH", coding | len(payload) << 8, n_frames)
    return zlib.crc32(payload, zlib.crc32(head))


# ---------------------------------------------------------------------------------------- header


@dataclass(frozen=True, kw_only=True)
class TokenHeader(ABC):
    """The header fields that audio and images share.

    Subclasses also have `n_samples`, the total that the trailer confirms, or None if only the
    trailer states it.

    Attributes:
        model: name, 1 to 64 bytes of printable UTF-8.
        fingerprint: the first 8 or all 16 bytes of what identifies the token space; in files of
            early versions, all weights and the configuration of the model. Files of version 2 hold
            the first 8.
        channels: 1 to 255.
        hop_length: size of a frame, see the subclasses.
        codebook_size: 2 to 2**32.
        block_frames: frames in every block but the last; times channels at most MAX_BLOCK_TOKENS.

    Raises:
        TokenFileError: a value out of bounds.
    """

    kind: ClassVar[int]
    _own: ClassVar[dict[str, tuple[int, int]]]  # fields of the subclass, in file order: bounds

    if TYPE_CHECKING:  # a field of one subclass, a property of the other

        @property
        def n_samples(self) -> int | None: ...

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
        if not isinstance(self.fingerprint, bytes) or len(self.fingerprint) not in (
            IDENTITY_BYTES,
            16,
        ):
            raise TokenFileError(
                f"fingerprint {self.fingerprint!r} is not {IDENTITY_BYTES} or 16 bytes"
            )
        bounds = self._own | {
            "channels": (1, 255),
            "hop_length": (1, MAX_HOP),
            "codebook_size": (2, 2**32),
            "block_frames": (1, MAX_BLOCK_FRAMES),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is None and name == "n_samples":
                continue
            if not isinstance(value, Integral) or not low <= int(value) <= high:
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
        """Frames of the whole file; None if only the trailer states them."""

    @property
    def bits_per_token(self) -> float:
        """log2(codebook_size)."""
        return math.log2(self.codebook_size)

    def with_total(self, n_samples: int) -> Self:
        """This header with n_samples.

        Raises:
            TokenFileError: the header states another number.
        """
        if self.n_samples != n_samples:
            raise TokenFileError(f"n_samples is {n_samples}, in the header {self.n_samples}")
        return self


@dataclass(frozen=True, kw_only=True)
class AudioHeader(TokenHeader):
    """Header of a recording; a frame is `hop_length` samples at `sample_rate`.

    Attributes:
        sample_rate: rate of the model, Hz.
        original_rate: rate of the source, Hz.
        n_samples: samples of the source per channel, at original_rate; None if only the trailer
            states them.
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

    def with_total(self, n_samples: int) -> Self:
        """This header with n_samples; raises as for `TokenHeader`."""
        if self.n_samples is None:
            return replace(self, n_samples=n_samples)
        return super().with_total(n_samples)

    def samples_in(self, n_frames: int) -> int:
        """Samples per channel at original_rate in whole frames, rounded down."""
        return n_frames * self.hop_length * self.original_rate // self.sample_rate


@dataclass(frozen=True, kw_only=True)
class ImageHeader(TokenHeader):
    """Header of an image; a frame is a square of `hop_length` pixels per side.

    Frames go row by row from the top left. There is 1 channel, or 2 with alpha, whose plane is
    coded as a grey image.

    Attributes:
        width: pixels of the upright source, at most MAX_SIDE; times height at most MAX_PIXELS.
        height: pixels of the upright source, at most MAX_SIDE.
        components: of the source: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.
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


_KINDS: dict[int, type[AudioHeader] | type[ImageHeader]] = {
    AUDIO: AudioHeader,
    IMAGE: ImageHeader,
}


# Models that a header of version 2 names by a number. Files need these entries as they are, for
# ever: none may be changed or removed. A model with another rate, hop length or codebook has its
# values in the header, whatever its name.
_NUMBERED: dict[int, tuple[int, str, int, int, int]] = {  # kind, name, hop length, K, rate in Hz
    16: (AUDIO, "speech-3k", 96, 250_047, 16_000),
    17: (AUDIO, "speech-vp-16384", 96, 16_384, 16_000),
    18: (AUDIO, "speech-1k", 270, 117_649, 16_000),
    19: (IMAGE, "image-fsp", 8, 15_360, 0),
    20: (AUDIO, "speech-6k", 48, 250_047, 16_000),
}
_REVISION = re.compile(r"@([2-9]|[1-9][0-9]|1[0-9][0-9]|2[0-4][0-9]|25[0-5])")


def _pack_header(header: TokenHeader) -> bytes:
    """The header up to what depends on the form of the file, in version 2."""
    form = ONE_BLOCK if _is_one_block(header) else BLOCKS
    out = bytearray(MAGIC + bytes((form, VERSION)))
    rate = header.sample_rate if isinstance(header, AudioHeader) else 0
    name = header.model.encode()
    for number, (kind, known, *values) in _NUMBERED.items():
        rest = header.model.removeprefix(known)
        if (kind, values) == (header.kind, [header.hop_length, header.codebook_size, rate]) and (
            header.model == known or (header.model != rest and _REVISION.fullmatch(rest))
        ):
            out += bytes((number, int(rest[1:] or 1)))
            break
    else:
        out += bytes((header.kind, len(name))) + name
        out += _leb128(header.hop_length) + _leb128(header.codebook_size - 1)
        out += _leb128(rate) if rate else b""
    out += header.fingerprint[:IDENTITY_BYTES]
    if isinstance(header, AudioHeader):
        same = header.original_rate == header.sample_rate
        known_samples = 0 if header.n_samples is None else header.n_samples + 1
        out += _leb128(header.channels) + _leb128(0 if same else header.original_rate)
        return bytes(out + _leb128(known_samples))
    assert isinstance(header, ImageHeader)
    return bytes(out + _leb128(header.components) + _leb128(header.width) + _leb128(header.height))


def _is_one_block(header: TokenHeader) -> bool:
    """Whether a file is written as one block with one checksum."""
    return header.n_frames is not None and header.n_frames <= header.block_frames


def _parse_fields(fields: _Fields) -> tuple[dict[str, Any], type[AudioHeader] | type[ImageHeader]]:
    """What `_pack_header` wrote after form and version, and the class of the header."""
    kind = fields.byte()
    values: dict[str, Any] = {}
    if kind in _NUMBERED:
        kind, name, hop_length, codebook_size, rate = _NUMBERED[kind]
        revision = fields.byte()
        if not revision:
            raise TokenFileError("the header is damaged")
        values["model"] = name if revision == 1 else f"{name}@{revision}"
    elif kind in _KINDS:
        size = fields.byte()
        if size > MAX_MODEL_BYTES:
            raise TokenFileError(f"the model name has more than {MAX_MODEL_BYTES} bytes")
        values["model"] = _model_name(fields.take(size))
        hop_length, codebook_size = fields.varint(), fields.varint() + 1
        rate = fields.varint() if kind == AUDIO else 0
    else:
        raise _unknown_kind(kind)
    values |= {"hop_length": hop_length, "codebook_size": codebook_size}
    values["fingerprint"] = fields.take(IDENTITY_BYTES)
    if kind == AUDIO:
        values |= {"sample_rate": rate, "channels": fields.varint()}
        values["original_rate"] = fields.varint() or rate
        n_samples = fields.varint()
        values["n_samples"] = n_samples - 1 if n_samples else None
        return values, AudioHeader
    values["components"] = fields.varint()
    values |= {"width": fields.varint(), "height": fields.varint()}
    values["channels"] = 2 - values["components"] % 2
    return values, ImageHeader


def _unknown_kind(kind: int) -> TokenFileError:
    return TokenFileError(
        f"kind {kind} is neither audio ({AUDIO}) nor an image ({IMAGE}) nor a numbered model"
    )


def _model_name(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise TokenFileError("the model name is not UTF-8") from None


class _Fields:
    """Reads the fields of a header one after the other.

    Args:
        first: where they begin, in bytes from the beginning of the file.
        get: gives the first so many bytes of the file, or fewer where it ends before.
    """

    def __init__(self, first: int, get: Callable[[int], bytes | bytearray]) -> None:
        self.size = first
        self._get = get

    def take(self, n: int) -> bytes:
        self.size += n
        data = self._get(self.size)
        if len(data) < self.size:
            raise TokenFileError("the file ends inside its header")
        return bytes(data[self.size - n : self.size])

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        """A number in LEB128."""
        value = 0
        for shift in range(0, 7 * _MAX_VARINT_BYTES, 7):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise TokenFileError("a number in the header is too long")


def _parse_header_1(data: bytes) -> TokenHeader:
    """A header of version 1."""
    (_, _, _, kind, channels, *own, hop_length, top, block_frames, fingerprint,
     _) = _FIXED.unpack_from(data)  # fmt: skip
    if zlib.crc32(data[:-4]) != _CRC.unpack(data[-4:])[0]:
        raise TokenFileError("the header is damaged")
    if kind not in _KINDS:
        raise _unknown_kind(kind)
    model = _model_name(data[_FIXED.size : -4])
    header = _KINDS[kind]
    values: Any = (None if value == _UNKNOWN else value for value in own)
    return header(
        model=model, fingerprint=fingerprint, channels=channels, hop_length=hop_length,
        codebook_size=top + 1, block_frames=block_frames, **dict(zip(header._own, values)),
    )  # fmt: skip


# --------------------------------------------------------------------------------------- trailer


@dataclass(frozen=True)
class _Trailer:
    n_frames: int
    n_samples: int
    index: bytes  # of the blocks: the bytes of each, in LEB128


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
    """Size of the trailer with this first word.

    Raises:
        TokenFileError: not the first word of a trailer.
    """
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
        raise TokenFileError("the trailer is inconsistent")
    return _Trailer(n_frames, n_samples, index)


def _n_blocks(n_frames: int, header: TokenHeader) -> int:
    return _ceil_div(n_frames, header.block_frames)


def _parse_index(index: bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offsets of the blocks after the header, and of the entries in the index; int64 (B + 1,)."""
    data = np.frombuffer(index, np.uint8)
    entries = np.concatenate([[0], np.flatnonzero(data < 128) + 1])
    lengths = np.diff(entries)
    if entries[-1] != data.size or (lengths > 3).any():
        raise TokenFileError("the trailer's index is damaged")
    shifts = 7 * (np.arange(data.size) - np.repeat(entries[:-1], lengths))
    ends = np.cumsum((data & 127).astype(np.int64) << shifts)
    return np.concatenate([[0], ends])[entries], entries


# ---------------------------------------------------------------------------------------- writer


class Output(Protocol):
    """What a token file is written to: a binary stream, or less than one."""

    def write(self, data: bytes, /) -> object:
        """Write all of it."""


class TokenWriter:
    """Writes a token file to a binary stream, which may be a pipe and stays open.

    A file that fits one block, as the header says, is written by `close`. Of others, the header is
    written at once, each block as soon as it is full, and the rest by `close`.

    Args:
        stream: what to write to.
        header: of the file.
        coder: entropy coder, used for the blocks that it makes shorter; None: none.

    Raises:
        ValueError: the coder is for another codebook.
    """

    def __init__(self, stream: Output, header: TokenHeader, *, coder: Coder | None = None) -> None:
        if coder is not None and coder.codebook_size != header.codebook_size:
            raise ValueError("the coder is for another codebook")
        self.header = header
        self._coder = coder
        self.n_frames = 0
        self._number = 0  # of the next block
        self._stream = stream
        self._pending = np.empty((header.channels, 0), np.int64)
        self._index: bytearray | None = bytearray()
        self._one_block = _is_one_block(header)
        if not self._one_block:
            data = _pack_header(header) + _leb128(header.block_frames)
            stream.write(data + _CRC.pack(zlib.crc32(data)))

    def write(self, tokens: NDArray[np.int64]) -> None:
        """Append tokens.

        Args:
            tokens: int64 (channels, n) in [0, codebook_size).

        Raises:
            ValueError: other tokens, or the writer is closed.
            TokenFileError: more than the header states, or than the format holds.
        """
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
        if self._one_block and self.n_frames + tokens.shape[1] > (header.n_frames or 0):
            raise TokenFileError(f"more than {header.n_frames} frames, which the header states")
        self.n_frames += tokens.shape[1]
        tokens = np.concatenate([self._pending, tokens], axis=1)
        if self._one_block:
            self._pending = tokens
            return
        whole = tokens.shape[1] - tokens.shape[1] % header.block_frames
        for start in range(0, whole, header.block_frames):
            self._write_block(tokens[:, start : start + header.block_frames], self._index)
        self._pending = tokens[:, whole:].copy()

    def close(self, n_samples: int | None = None) -> None:
        """Write the last block and the trailer; the stream stays open.

        Args:
            n_samples: the total; needed if the header does not state it.

        Raises:
            TokenFileError: the total is missing, or does not agree with the header or with the
                frames that were written.
            ValueError: the writer is closed.
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
        if self._one_block:
            coding, payload = self._pack(self._pending)
            data = _pack_header(header) + bytes((coding,)) + _leb128(len(payload)) + payload
            self._stream.write(data + _CRC.pack(zlib.crc32(data)))
            self._index = None
            return
        if self._pending.size:
            self._write_block(self._pending, self._index)
        trailer = _Trailer(self.n_frames, n_samples, bytes(self._index))
        self._stream.write(_pack_trailer(trailer))
        self._index = None

    def _write_block(self, tokens: NDArray[np.int64], index: bytearray) -> None:
        if self._number == MAX_BLOCKS:
            raise TokenFileError(f"more than {MAX_BLOCKS} blocks; choose larger block_frames")
        coding, payload = self._pack(tokens)
        check = _block_crc(coding, tokens.shape[1], payload) ^ self._number * _STRIDE % 2**32
        head = _BLOCK.pack(coding | len(payload) << 8, tokens.shape[1], check)
        self._stream.write(head + payload)
        index += _leb128(len(head) + len(payload))
        self._number += 1

    def _pack(self, tokens: NDArray[np.int64]) -> tuple[int, bytes]:
        """(channels, n) tokens -> the coding that makes them shorter, and the payload."""
        if self._coder is not None and tokens.size:
            payload = self._coder.pack(tokens.T, _columns(self.header))
            if len(payload) < raw_bytes(self.header.codebook_size, tokens.size):
                return ENTROPY, payload
        return RAW, _pack_raw(tokens.T, self.header) if tokens.size else b""


# ---------------------------------------------------------------------------------------- reader


@dataclass(frozen=True, eq=False)
class TokenBlock:
    """A block.

    Attributes:
        index: number of the block.
        start_frame: number of its first frame.
        tokens: int64 (channels, n_frames); None if the block is damaged.
        n_frames: frames in it.
    """

    index: int
    start_frame: int
    tokens: NDArray[np.int64] | None
    n_frames: int


@dataclass(frozen=True)
class _OnlyBlock:
    """The block of a file of one block, and the damage of the file."""

    coding: int
    payload: bytes
    error: str | None


class TokenReader:
    """Reads a token file from a binary stream, as an iterator of `TokenBlock`.

    Until the first damage, the stream is asked for only one byte after the trailer, to see that the
    file ends there.

    Args:
        stream: what to read from.
        recover: return damaged blocks without tokens, so that other frames keep their time, instead
            of raising.
        coder: entropy coder of the model; may be set later, when the header is known.

    Attributes:
        header: `AudioHeader` or `ImageHeader`.
        n_samples: total samples per channel, or pixels of an image; None while unknown. If neither
            header nor trailer states it, at the end `AudioHeader.samples_in` of the frames up to
            the last whole block.
        n_frames: total frames; None while unknown.
        damaged: numbers of the first MAX_NAMED damaged blocks since the last seek.
        n_damaged: how many they all are.
        error: the first damage since the last seek; None without.
        payload_bytes: bytes of payload read so far.
        total_bytes: bytes read so far.
        coder: see above.

    Raises:
        TokenFileError: a damaged header or, unless `recover`, a damaged file of one block; when
            iterating, later damage unless `recover`.
        NoCoderError: when iterating, an entropy-coded block without a coder.
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
        self._only: _OnlyBlock | None = None  # of a file of one block
        self.payload_bytes = self.total_bytes = 0
        self.header = self._read_header()
        self.n_samples = self.header.n_samples
        self.n_frames = self.header.n_frames
        self._first = stream.tell() if stream.seekable() else None
        self._start(0, b"")

    def __iter__(self) -> Iterator[TokenBlock]:
        for part in self._parts():
            if isinstance(part, TokenBlock):
                yield part
                continue
            for number in part:
                start = number * self.header.block_frames
                yield TokenBlock(number, start, None, self._frames_due(number))

    def _parts(self) -> Iterator[TokenBlock | range]:
        """The whole blocks, and the numbers of the damaged ones between them."""
        if self._only is not None and not self._done:
            yield from self._only_part(self._only)
        while not self._done:
            record: TokenBlock | _Trailer | None
            try:
                record = self._record()
            except NoCoderError:
                raise
            except TokenFileError as error:
                self._report(error)
                record = self._search()
            if isinstance(record, TokenBlock):
                yield self._lost(record.index)
                self._number += 1
                yield record
            else:
                yield self._lost(_n_blocks(self._finish(record), self.header))

    def _only_part(self, only: _OnlyBlock) -> Iterator[TokenBlock | range]:
        """The block of a file of one block, and after it the end."""
        n_frames = self.header.n_frames or 0
        if self._number == 0 and n_frames and not only.error:
            try:
                tokens = self._unpack(only.coding, only.payload, n_frames)
            except NoCoderError:
                raise
            except ValueError as error:
                only = replace(only, error=f"block 0: {error}")
            else:
                self.payload_bytes += len(only.payload)
                self._number += 1
                yield TokenBlock(0, 0, tokens.T, n_frames)
        if only.error:
            self._report(TokenFileError(only.error))
        yield self._lost(_n_blocks(n_frames, self.header))
        self._finish(None)

    def read_all(self) -> tuple[NDArray[np.int64], TokenHeader]:
        """Read the remaining blocks.

        Returns:
            int64 tokens (channels, n_frames), -1 for those of damaged blocks with `recover`; and
            the header with n_samples, an estimate if the end is damaged or missing.

        Raises:
            TokenFileError: damage without `recover`, or more tokens to fill in than are left and
                than MAX_LOST_TOKENS.
        """
        first = self._number
        blocks = [part for part in self._parts() if isinstance(part, TokenBlock)]
        channels, start = self.header.channels, first * self.header.block_frames
        n_frames, n_samples = self.totals()
        left = channels * sum(block.n_frames for block in blocks)
        lost = channels * (n_frames - start) - left
        if lost > max(left, MAX_LOST_TOKENS):
            raise TokenFileError(f"{lost} tokens are lost, of {lost + left}")
        tokens = np.full((channels, n_frames - start), -1)
        for block in blocks:
            place = block.start_frame - start
            tokens[:, place : place + block.n_frames] = block.tokens
        return tokens, self.header.with_total(n_samples)

    def totals(self) -> tuple[int, int]:
        """n_frames and n_samples of a file that was read to its end.

        Raises:
            ValueError: they are not known yet.
        """
        if self.n_frames is None or self.n_samples is None:
            raise ValueError("the totals are known at the end of the file")
        return self.n_frames, self.n_samples

    def read_trailer(self) -> int:
        """Read the trailer at the end of a seekable stream, and keep the reading position.

        A file of one block has no trailer, and its header states the length.

        Returns:
            n_samples.

        Raises:
            TokenFileError: the stream cannot seek, or the trailer is damaged.
        """
        if self._only is not None:
            return self.totals()[1]
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
        """Let the next iteration start at the block that holds a frame.

        Args:
            frame: its number; n_frames is the end.

        Raises:
            ValueError: the frame is outside the file.
            TokenFileError: as `read_trailer`.
        """
        if self._trailer is None:
            self.read_trailer()
        n_frames, _ = self.totals()
        if not 0 <= frame <= n_frames:
            raise ValueError(f"frame {frame} is not in 0 to {n_frames}")
        if self._only is not None:
            self._start(frame // self.header.block_frames, b"")
            return
        trailer, first = self._trailer, self._first
        assert trailer is not None and first is not None  # as that was read
        offsets, entries = _parse_index(trailer.index)
        number = frame // self.header.block_frames
        self._stream.seek(first + int(offsets[number]))
        self._ahead.clear()
        self._start(number, trailer.index[: entries[number]])

    def _start(self, number: int, index: bytes) -> None:
        self._number = number  # of the next block
        self._index = bytearray(index)  # what the trailer must say of the blocks before it
        self._done = False
        self.damaged: list[int] = []
        self.n_damaged = 0
        self.error: str | None = None

    def _report(self, error: TokenFileError) -> None:
        if not self._recover:
            raise error
        self.error = self.error or str(error)

    def _fill(self, size: int) -> bool:
        """Read ahead until there are `size` bytes; False if the stream ends before."""
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
        whole = self._fill(len(MAGIC) + 2)
        magic = bytes(self._ahead[: len(MAGIC)])
        if not magic:
            raise TokenFileError("the file is empty")
        if magic != MAGIC[: len(magic)]:
            changed = "; it was changed by a text-mode transfer" if magic[:4] == MAGIC[:4] else ""
            raise TokenFileError(f"not a token file{changed}")
        if not whole:
            raise TokenFileError("the file ends inside its header")
        form, version = self._ahead[8:10]
        if version > VERSION:
            raise TokenFileError(f"format version {version} is newer than {VERSION}")
        if version < 2:
            return self._read_header_1()
        if form not in (ONE_BLOCK, BLOCKS):
            raise TokenFileError(f"form {form} is neither one block nor several")
        fields = _Fields(len(MAGIC) + 2, self._first_bytes)
        values, kind = _parse_fields(fields)
        rest = self._read_one_block if form == ONE_BLOCK else self._read_rest
        return rest(fields, values, kind)

    def _first_bytes(self, size: int) -> bytearray:
        """The first bytes of the file; fewer where it ends before."""
        self._fill(size)
        return self._ahead[:size]

    def _read_rest(
        self, fields: _Fields, values: dict[str, Any], kind: type[AudioHeader] | type[ImageHeader]
    ) -> TokenHeader:
        """The rest of the header of a file of several blocks."""
        values["block_frames"] = fields.varint()
        size = fields.size
        if _CRC.unpack(fields.take(_CRC.size))[0] != zlib.crc32(self._ahead[:size]):
            raise TokenFileError("the header is damaged")
        header = kind(**values)
        self._skip(fields.size)
        return header

    def _read_one_block(
        self, fields: _Fields, values: dict[str, Any], kind: type[AudioHeader] | type[ImageHeader]
    ) -> TokenHeader:
        """The rest of a file of one block; what is wrong with it is kept if it may be recovered."""
        if values.get("n_samples", 0) is None:
            raise TokenFileError("the header of a file of one block has no length")
        header = kind(**values, block_frames=1)
        n_frames = header.n_frames or 0
        header = replace(header, block_frames=max(1, n_frames))
        coding, length = fields.byte(), fields.varint()
        error = None
        if coding not in (RAW, ENTROPY):
            error = f"block 0: unknown coding id {coding}"
        elif length > _most_bytes(n_frames, header):
            error = f"block 0: {length} bytes are too many for {n_frames} frames"
        payload = b""
        if error is None:
            try:
                payload, size = fields.take(length), fields.size
                if _CRC.unpack(fields.take(_CRC.size))[0] != zlib.crc32(self._ahead[:size]):
                    error = "block 0: the checksum is wrong"
            except TokenFileError:
                error = "block 0: the file ends inside it"
        if error and not self._recover:
            raise TokenFileError(error)
        self._only = _OnlyBlock(coding, payload, error)
        self._skip(min(fields.size, len(self._ahead)))
        return header

    def _read_header_1(self) -> TokenHeader:
        """A header of version 1."""
        if not self._fill(_FIXED.size):
            raise TokenFileError("the file ends inside its header")
        model_bytes = self._ahead[_FIXED.size - 1]
        if model_bytes > MAX_MODEL_BYTES:
            raise TokenFileError(f"the model name has more than {MAX_MODEL_BYTES} bytes")
        size = _FIXED.size + model_bytes + _CRC.size
        if not self._fill(size):
            raise TokenFileError("the file ends inside its header")
        header = _parse_header_1(bytes(self._ahead[:size]))
        self._skip(size)
        return header

    def _record(self, slack: int = 0) -> TokenBlock | _Trailer:
        """The block or trailer at the reading position.

        Args:
            slack: how far the number of the block may be beyond the next one.

        Raises:
            TokenFileError: there is none.
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
        if coding not in (RAW, ENTROPY):
            raise TokenFileError(f"{place}: unknown coding id {coding}")
        if length > _most_bytes(n_frames, header):
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
        try:
            tokens = self._unpack(coding, payload, n_frames)
        except NoCoderError:
            raise
        except ValueError as error:
            raise TokenFileError(f"{place}: {error}") from None
        start = number * header.block_frames
        if n_frames < header.block_frames:
            self.n_frames = start + n_frames
        self._index += _leb128(_BLOCK.size + length)
        self._skip(_BLOCK.size + length)
        self.payload_bytes += length
        return TokenBlock(number, start, tokens.T, n_frames)

    def _unpack(self, coding: int, payload: bytes, n_frames: int) -> NDArray[np.int64]:
        """Payload -> int64 (n_frames, channels)."""
        if coding == RAW:
            return _unpack_raw(payload, n_frames, self.header)
        if self.coder is None:
            raise NoCoderError(
                f"entropy coded: needs the entropy tables of the model {self.header.model!r}"
            )
        return self.coder.unpack(payload, n_frames, self.header.channels, _columns(self.header))

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

        Blocks may be missing from what is skipped, but only few for its size: so the odds of
        mistaking damage for a block stay near one in 2**32.
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
        """Frames that the block of this number has, or at most has if it may be the last."""
        left = self.header.block_frames
        if self.n_frames is not None:
            left = min(left, self.n_frames - number * left)
        return left

    def _lost(self, end: int) -> range:
        """The numbers of damaged blocks, from the next one to the one before `end`."""
        lost = range(self._number, end)
        self._number = max(self._number, end)
        self.n_damaged += len(lost)
        self.damaged += lost[: MAX_NAMED - len(self.damaged)]
        return lost

    def _finish(self, trailer: _Trailer | None) -> int:
        """Settle the totals: from the trailer, else from the header, else from the blocks.

        Returns:
            n_frames.
        """
        self._done = True
        if trailer:
            self.n_frames, self.n_samples = trailer.n_frames, trailer.n_samples
        if trailer or (self._only and not self.error):
            if self._fill(1):
                self._report(TokenFileError("there is data after the end of the file"))
        if self.n_frames is None:
            self.n_frames = self._number * self.header.block_frames
        if self.n_samples is None and isinstance(self.header, AudioHeader):
            self.n_samples = self.header.samples_in(self.n_frames)
        return self.n_frames


# ------------------------------------------------------------------------------------ whole files


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Attributes:
        ok: whether there is no damage.
        error: the first damage; None without.
        header: of the file; None if it is damaged.
        blocks: number of blocks, damaged ones included.
        damaged: numbers of the first MAX_NAMED damaged blocks.
        n_damaged: how many they all are.
        frames: total frames, damaged ones included.
        n_samples: total samples per channel, or pixels.
        payload_bytes: bytes of all payloads.
        total_bytes: bytes of the file.
    """

    ok: bool
    error: str | None = None
    header: TokenHeader | None = None
    blocks: int = 0
    damaged: tuple[int, ...] = ()
    n_damaged: int = 0
    frames: int = 0
    n_samples: int = 0
    payload_bytes: int = 0
    total_bytes: int = 0


def read_tokens(
    source: str | os.PathLike[str] | BinaryIO, *, recover: bool = False, coder: Coder | None = None
) -> tuple[NDArray[np.int64], TokenHeader]:
    """Read all tokens of a file or stream; `vpcodec.read_tokens` also finds coders of bundled
    models.

    Args:
        source: path or stream.
        recover: return -1 for the tokens of damaged blocks instead of raising.
        coder: `Codec.coder` of the model; None reads only files that are not entropy coded.

    Returns:
        int64 tokens (channels, n_frames), and the header with n_samples.

    Raises:
        TokenFileError: damage, see `TokenReader.read_all`.
        OSError: the path cannot be read.
    """
    with opened(source) as stream:
        return TokenReader(stream, recover=recover, coder=coder).read_all()


def write_tokens(
    target: str | os.PathLike[str] | BinaryIO,
    tokens: NDArray[np.int64],
    header: TokenHeader,
    *,
    coder: Coder | None = None,
) -> None:
    """Write a token file.

    Args:
        target: a stream, or a path; the file appears complete or not at all.
        tokens: int64 (channels, header.n_frames).
        header: of the file.
        coder: `Codec.coder` of the model, for a shorter file; None: log2(codebook_size) bits a
            token.

    Raises:
        ValueError: tokens that do not fit the header.
        TokenFileError: more or fewer tokens than the header says.
        OSError: the path cannot be written.
    """
    with ExitStack() as stack:
        if isinstance(target, (str, os.PathLike)):
            target = stack.enter_context(atomic_output(target))
        writer = TokenWriter(target, header, coder=coder)
        writer.write(tokens)
        writer.close()


def verify(source: str | os.PathLike[str] | BinaryIO) -> Verification:
    """Check a whole file or stream for damage.

    Entropy-coded blocks are checked by their checksums, but not decoded.

    Raises:
        OSError: the path cannot be read.
    """
    with opened(source) as stream:
        try:
            reader = _Checker(stream, recover=True)
        except TokenFileError as error:
            return Verification(False, str(error))
        blocks = sum(1 if isinstance(part, TokenBlock) else len(part) for part in reader._parts())
    return Verification(
        reader.error is None, reader.error, reader.header, blocks, tuple(reader.damaged),
        reader.n_damaged, *reader.totals(), reader.payload_bytes, reader.total_bytes,
    )  # fmt: skip


class _Checker(TokenReader):
    """Reads blocks without decoding them."""

    def _unpack(self, coding: int, payload: bytes, n_frames: int) -> NDArray[np.int64]:
        if coding == RAW:
            _raw_value(payload, n_frames, self.header)
        return np.broadcast_to(np.int64(0), (n_frames, self.header.channels))


def opened(source: str | os.PathLike[str] | BinaryIO) -> AbstractContextManager[BinaryIO]:
    """A context manager for a stream, which stays open, or for the file at a path."""
    return open(source, "rb") if isinstance(source, (str, os.PathLike)) else nullcontext(source)
