"""Linear PCM: the headers of WAV and RF64, and samples as bytes.

Handled here and not by libsndfile, which cannot stream it through pipes, takes a header of unknown
size for an empty file, and says nothing when a file ends before its header promises.
"""

from __future__ import annotations

import struct
from typing import BinaryIO, NamedTuple

import numpy as np

from .common import BLOCK, check_length

WIDTHS = {"PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}  # bytes

_WAV_CODINGS = {  # format tag, bytes per sample
    (1, 1): "PCM_U8",
    (1, 2): "PCM_16",
    (1, 3): "PCM_24",
    (1, 4): "PCM_32",
    (3, 4): "FLOAT",
    (3, 8): "DOUBLE",
}

MAX_RIFF = 0xFFFFFFFE  # bytes; a larger WAV becomes RF64

_UNKNOWN = 0xFFFFFFFF  # the size in a WAV header that does not know it or cannot hold it


class Layout(NamedTuple):
    """Where linear PCM lies: the coding is None for other kinds of WAV."""

    format: str
    coding: str | None
    sample_rate: int
    channels: int
    align: int  # bytes per sample of all channels
    start: int  # first byte
    n_bytes: int | None  # None: up to the end


class PcmSource:
    """Linear PCM from a file or a pipe, of which `head` has been read already."""

    def __init__(self, file: BinaryIO, head: bytes, layout: Layout, n_bytes: int | None) -> None:
        self.sample_rate, self.channels = layout.sample_rate, layout.channels
        self.format, self.subtype = layout.format, layout.coding
        self.n_samples = self._left = None if n_bytes is None else n_bytes // layout.align
        self._file, self._head, self._align = file, head, layout.align

    def read(self, n: int) -> np.ndarray:
        """The next samples, (up to n, C); none at the end."""
        wanted = (n if self._left is None else min(n, self._left)) * self._align
        data = bytearray(self._head[:wanted])
        self._head = self._head[wanted:]
        while len(data) < wanted and (more := self._file.read(wanted - len(data))):
            data += more
        n_read = len(data) // self._align
        if self._left is not None:
            self._left -= n_read
        return decode(data[: n_read * self._align], self.subtype).reshape(-1, self.channels)

    def check_end(self, n_read: int) -> None:
        """Raise AudioError where `n_read` samples cannot be all."""
        if self.n_samples is not None:
            check_length(n_read, self.n_samples, self.sample_rate)
        while self._file.read(BLOCK):  # so that what writes the pipe can finish
            pass


def wav_layout(file: BinaryIO) -> Layout | None:
    """The layout of a WAV or RF64 file from its start; None where it is something else.

    Raises EOFError where `file` ends before its data begin.
    """

    def take(n: int) -> bytes:
        data = file.read(n)
        if len(data) < n:
            raise EOFError
        return data

    kind, riff_size, form = struct.unpack("<4sI4s", take(12))
    if kind not in (b"RIFF", b"RF64", b"BW64") or form != b"WAVE":
        return None
    fmt, long_size = b"", 0
    while (chunk := struct.unpack("<4sI", take(8)))[0] != b"data":
        name, size = chunk
        start = file.tell()
        if name == b"ds64":
            (long_size,) = struct.unpack("<8xQ", take(16))
        elif name == b"fmt ":
            fmt = take(min(size, 40))
        file.seek(start + size + size % 2)
    start, n_bytes = file.tell(), chunk[1]
    if len(fmt) < 16:
        return None
    if kind != b"RIFF" and n_bytes == _UNKNOWN:
        n_bytes = long_size
    # Writers to a pipe leave 0 or some largest value. 0 is meant where more chunks are to follow.
    is_empty = n_bytes == 0 and riff_size + 8 > start and not is_placeholder(riff_size)
    known = is_empty or not is_placeholder(n_bytes)

    tag, channels, sample_rate, _, align, bits = struct.unpack("<HHIIHH", fmt[:16])
    if tag == 0xFFFE:  # WAVE_FORMAT_EXTENSIBLE: the tag opens its GUID
        tag = int.from_bytes(fmt[24:26], "little")
    width = (bits + 7) // 8
    coding = _WAV_CODINGS.get((tag, width)) if align == width * channels else None
    if not known:
        n_bytes = None
    format = "WAV" if kind == b"RIFF" else "RF64"
    return Layout(format, coding, sample_rate, channels, max(1, align), start, n_bytes)


def is_placeholder(size: int) -> bool:
    """Whether a chunk size is one that programs write where they cannot know it."""
    return (
        size == 0
        or 0x7F000000 <= size <= 0x80000000
        or 0xFFFF0000 <= size <= 0xFFFFFFFF
        or size >= 1 << 63
    )


def wav_header(coding: str, sample_rate: int, channels: int, n_bytes: int | None) -> bytes:
    """A WAV header for data of `n_bytes`, as long for 0 as for any number; None: for a pipe."""
    width = WIDTHS[coding]
    align = width * channels
    rates = channels, sample_rate, sample_rate * align, align, 8 * width
    if coding in ("FLOAT", "DOUBLE"):
        fmt = struct.pack("<4sIHHIIHHH", b"fmt ", 18, 3, *rates, 0)
    else:
        fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, *rates)
    if n_bytes is None:
        start = struct.pack("<4sI4s", b"RIFF", _UNKNOWN, b"WAVE")
        return start + fmt + struct.pack("<4sI", b"data", _UNKNOWN)
    riff_size = 4 + 36 + len(fmt) + 8 + n_bytes + n_bytes % 2
    if riff_size <= MAX_RIFF:
        start = struct.pack("<4sI4s4sI28x", b"RIFF", riff_size, b"WAVE", b"JUNK", 28)
        return start + fmt + struct.pack("<4sI", b"data", n_bytes)
    sizes = riff_size, n_bytes, n_bytes // align, 0
    start = struct.pack("<4sI4s4sIQQQI", b"RF64", _UNKNOWN, b"WAVE", b"ds64", 28, *sizes)
    return start + fmt + struct.pack("<4sI", b"data", _UNKNOWN)


def decode(data: bytes | bytearray, coding: str) -> np.ndarray:
    """Little-endian bytes to float32 (n,)."""
    if coding in ("FLOAT", "DOUBLE"):
        with np.errstate(over="ignore"):
            return np.frombuffer(data, f"<f{WIDTHS[coding]}").astype(np.float32)
    width = WIDTHS[coding]
    wide = np.zeros((len(data) // width, 4), dtype=np.uint8)
    wide[:, 4 - width :] = np.frombuffer(data, np.uint8).reshape(-1, width)
    if coding == "PCM_U8":
        wide[:, 3] ^= 0x80
    return wide.view("<i4")[:, 0].astype(np.float32) * np.float32(2**-31)


def encode(frames: np.ndarray, coding: str) -> bytes:
    """Float32 (n, C) to little-endian bytes, interleaved."""
    if coding in ("FLOAT", "DOUBLE"):
        return frames.astype(f"<f{WIDTHS[coding]}").tobytes()
    width = WIDTHS[coding]
    wide = to_int(frames, 8 * width).astype("<i4").reshape(-1, 1).view(np.uint8)
    if coding == "PCM_U8":
        wide[:, 3] ^= 0x80
    return wide[:, 4 - width :].tobytes()


def to_int(samples: np.ndarray, bits: int) -> np.ndarray:
    """Float samples to the nearest of `bits` bits, at the upper end of an int32."""
    full = 2 ** (bits - 1)
    rounded = np.clip(np.rint(samples.astype(np.float64) * full), -full, full - 1)
    return rounded.astype(np.int32) << (32 - bits)
