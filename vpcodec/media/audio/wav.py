"""The headers of WAV and RF64, and conversion of linear PCM.

Linear PCM is not left to libsndfile, which cannot stream it through pipes, takes a header with
unknown size for an empty file, and does not report files that end too early.
"""

from __future__ import annotations

import io
import struct
from functools import lru_cache

import numpy as np
import soundfile as sf

from .chunks import MAX_CHUNKS, RIFF, Layout, is_known_chunk, is_placeholder, take, wav_coding
from .common import READ_WIDTHS, WIDTHS, AudioError
from .stream import ByteStream

MAX_RIFF = 0xFFFFFFFE  # bytes; a larger WAV becomes RF64

_UNKNOWN = 0xFFFFFFFF  # size in a WAV header if it is unknown or too large


def wav_layout(stream: ByteStream) -> Layout | None:
    """Parse the header of a WAV or RF64 file.

    Args:
        stream: at the start of the file; afterwards at the first byte of audio.

    Returns:
        The layout; None if the file has another format.

    Raises:
        AudioError: the header is damaged or incomplete.
    """
    if stream.peek(4) not in (b"RIFF", b"RF64", b"BW64"):
        return None
    begin = stream.tell()
    kind, riff_size, form = struct.unpack("<4sI4s", take(stream, 12))
    if form != b"WAVE":
        return None
    fmt, long_size = b"", 0
    for _ in range(MAX_CHUNKS):
        name, n_bytes = struct.unpack("<4sI", take(stream, 8))
        if name == b"data":
            break
        start = stream.tell()
        if name == b"ds64":
            (long_size,) = struct.unpack("<8xQ", take(stream, 16))
        elif name == b"fmt ":
            fmt = take(stream, min(n_bytes, 40))
        stream.skip(start + n_bytes + n_bytes % 2 - stream.tell())
    else:
        raise AudioError(f"not an audio file (more than {MAX_CHUNKS} chunks before its audio)")
    if len(fmt) < 16:
        return None
    start = stream.tell()
    if kind != b"RIFF" and n_bytes == _UNKNOWN:
        n_bytes = long_size or _UNKNOWN
        riff_size = _UNKNOWN
    # Programs that write to a pipe leave 0 or a largest value, and no chunks after the audio.
    if n_bytes == 0:
        known = is_known_chunk(RIFF, stream.peek(8)) or not stream.peek(1)
    else:
        behind = riff_size + 8 - (start - begin) - n_bytes
        known = not is_placeholder(n_bytes) or (2 <= behind and not is_placeholder(riff_size))

    tag, channels, sample_rate, _, align, bits = struct.unpack("<HHIIHH", fmt[:16])
    if tag == 0xFFFE:  # WAVE_FORMAT_EXTENSIBLE: the tag opens its GUID
        tag = int.from_bytes(fmt[24:26], "little")
    return wav_coding(
        Layout(
            format="WAV" if kind == b"RIFF" else "RF64",
            coding=None,
            sample_rate=sample_rate,
            channels=channels,
            align=max(1, align),
            start=start,
            n_bytes=n_bytes,
            is_known=known,
            style=RIFF,
        ),
        tag,
        bits,
    )


def wav_header(coding: str, sample_rate: int, channels: int, n_bytes: int | None) -> bytes:
    """A WAV header for `n_bytes` of data, of the same length for any number; None: for a pipe."""
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


def decode(data: bytes | bytearray, coding: str, order: str = "<", width: int = 0) -> np.ndarray:
    """Convert bytes to float32 (n,).

    Args:
        data: the bytes.
        coding: libsndfile's name of the coding.
        order: "<" little-endian or ">" big-endian.
        width: bytes per sample, if more than the coding needs; samples are in the upper bytes.
    """
    if coding in ("FLOAT", "DOUBLE"):
        with np.errstate(over="ignore"):
            return np.frombuffer(data, f"{order}f{WIDTHS[coding]}").astype(np.float32)
    if coding in ("ULAW", "ALAW"):
        return _law(coding)[np.frombuffer(data, np.uint8)]
    width = width or READ_WIDTHS[coding]
    samples = np.frombuffer(data, np.uint8).reshape(-1, width)
    wide = np.zeros((len(samples), 4), dtype=np.uint8)
    wide[:, 4 - width :] = samples[:, ::-1] if order == ">" else samples
    if coding == "PCM_U8":
        wide[:, 3] ^= 0x80
    return wide.view("<i4")[:, 0].astype(np.float32) * np.float32(2**-31)


@lru_cache
def _law(coding: str) -> np.ndarray:
    """The sample of each byte in G.711, from libsndfile."""
    every = io.BytesIO(bytes(range(256)))
    options = {"format": "RAW", "samplerate": 8000, "channels": 1, "subtype": coding}
    return sf.read(every, dtype="float32", **options)[0]


def encode(frames: np.ndarray, coding: str) -> bytes:
    """Convert float32 (n, C) to interleaved little-endian bytes."""
    if coding in ("FLOAT", "DOUBLE"):
        return frames.astype(f"<f{WIDTHS[coding]}").tobytes()
    width = WIDTHS[coding]
    wide = to_int(frames, 8 * width).astype("<i4").reshape(-1, 1).view(np.uint8)
    if coding == "PCM_U8":
        wide[:, 3] ^= 0x80
    return wide[:, 4 - width :].tobytes()


def to_int(samples: np.ndarray, bits: int) -> np.ndarray:
    """Round float samples to `bits` bits, in the upper bits of an int32."""
    full = 2 ** (bits - 1)
    rounded = np.clip(np.rint(samples.astype(np.float64) * full), -full, full - 1)
    return rounded.astype(np.int32) << (32 - bits)
