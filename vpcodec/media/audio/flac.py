"""FLAC: frames are counted here and decoded by libsndfile.

libsndfile stops at the length that the header states, and ignores changes of the sample rate. So
the headers of all frames are read here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import soundfile as sf

from .common import BLOCK, AudioError, cut_short
from .stream import ByteStream, Feed, open_feed

_MAX_HEAD = 16  # bytes of a frame header
_LOOK_BACK = 2**18  # bytes at the end in which to search for the last frame
_RATES = (0, 88200, 176400, 192000, 8000, 16000, 22050, 24000, 32000, 44100, 48000, 96000)
_BITS = (0, 8, 12, 0, 16, 20, 24, 32)  # the fourth is reserved
MAX_METADATA = 2**28  # bytes


def _crc_table(polynomial: int, bits: int) -> list[int]:
    table, top, mask = [], 1 << bits - 1, (1 << bits) - 1
    for byte in range(256):
        value = byte << bits - 8
        for _ in range(8):
            value = (value << 1 ^ polynomial if value & top else value << 1) & mask
        table.append(value)
    return table


_CRC8, _CRC16 = _crc_table(0x07, 8), _crc_table(0x8005, 16)


def _crc8(data: bytes) -> int:
    value = 0
    for byte in data:
        value = _CRC8[value ^ byte]
    return value


def crc16(data: bytes) -> int:
    """The checksum of frames; 0 for a complete frame, which includes its checksum."""
    value = 0
    for byte in data:
        value = (value << 8 & 0xFF00) ^ _CRC16[value >> 8 ^ byte]
    return value


class Head(NamedTuple):
    """A frame header."""

    is_variable: bool  # whether `number` counts samples instead of frames
    number: int
    n_samples: int
    sample_rate: int  # 0: as in the file's header
    channels: int
    bits: int  # 0: as in the file's header
    length: int  # bytes


def parse_head(data: bytes, at: int = 0) -> Head | None:
    """The frame header at a position; None if there is none with a correct checksum."""
    if len(data) < at + 6 or data[at] != 0xFF or data[at + 1] & 0xFE != 0xF8:
        return None
    size, rate = data[at + 2] >> 4, data[at + 2] & 15
    channels, bits = data[at + 3] >> 4, data[at + 3] >> 1 & 7
    if not size or rate == 15 or channels > 10 or bits == 3 or data[at + 3] & 1:
        return None
    first = data[at + 4]
    n_more = 0
    while first & 0x80 >> n_more and n_more < 8:
        n_more += 1
    if n_more == 1 or n_more == 8:
        return None
    end = at + 4 + max(1, n_more)
    number = first & (0x7F >> n_more if n_more else 0x7F)
    for byte in data[at + 5 : end]:
        if byte & 0xC0 != 0x80:
            return None
        number = number << 6 | byte & 0x3F
    n_size = {6: 1, 7: 2}.get(size, 0)
    n_rate = {12: 1, 13: 2, 14: 2}.get(rate, 0)
    extra, end = data[end : end + n_size + n_rate], end + n_size + n_rate
    if len(data) <= end or _crc8(data[at:end]) != data[end]:
        return None
    if size == 1:
        n_samples = 192
    elif size < 6:
        n_samples = 576 << size - 2
    elif size < 8:
        n_samples = int.from_bytes(extra[:n_size], "big") + 1
    else:
        n_samples = 256 << size - 8
    if rate < 12:
        sample_rate = _RATES[rate]
    else:
        sample_rate = int.from_bytes(extra[n_size:], "big") * {12: 1000, 13: 1, 14: 10}[rate]
    return Head(
        bool(data[at + 1] & 1), number, n_samples, sample_rate,
        channels + 1 if channels < 8 else 2, _BITS[bits], end + 1 - at,
    )  # fmt: skip


class _Info(NamedTuple):
    """The contents of STREAMINFO."""

    min_block: int
    max_block: int
    sample_rate: int
    channels: int
    bits: int
    n_samples: int  # 0: unknown


def _parse_info(data: bytes) -> _Info:
    packed = int.from_bytes(data[10:18], "big")
    return _Info(
        int.from_bytes(data[:2], "big"),
        int.from_bytes(data[2:4], "big"),
        packed >> 44,
        (packed >> 41 & 7) + 1,
        (packed >> 36 & 31) + 1,
        packed & (1 << 36) - 1,
    )


class FlacSource:
    """A FLAC file or stream.

    Args:
        stream: a file or a pipe, at the FLAC marker.
        stack: closes the decoder.
        keep: read what there is of a truncated file.
    """

    def __init__(self, stream: ByteStream, stack: ExitStack, *, keep: bool = False) -> None:
        self._stream, self._keep = stream, keep
        head = self._take_metadata()
        self._end = self._find_end() if stream.on_disk else 0
        self._promised = self._info.n_samples
        self.cut: str | None = None
        length = 0  # unless the stated length is confirmed, all frames are read
        if stream.on_disk and not keep and self._find_last() == self._promised:
            length = self._promised
        info = bytearray(head[8:42])
        info[13] = info[13] & 0xF0 | length >> 32
        info[14:18] = (length & 0xFFFFFFFF).to_bytes(4, "big")
        self._n_counted = self._n_last = 0  # samples in the frames so far, and in the last one
        self._n_read = 0
        self._is_whole = True  # whether the last frame is complete
        self._has_gap = False  # whether a later frame seems to come too early
        self._feed = Feed(self._pieces(head[:8] + bytes(info) + head[42:]))
        self._sound = open_feed(self._feed)
        stack.callback(self._sound.close)
        self.sample_rate, self.channels = self._sound.samplerate, self._sound.channels
        self.format, self.subtype = self._sound.format, self._sound.subtype
        self.n_samples = length or None

    def _take_metadata(self) -> bytes:
        """Read marker and STREAMINFO; skip other blocks, which may contain images."""
        stream = self._stream
        marker, first = stream.read(4), stream.read(4)
        info = stream.read(34)
        if len(info) < 34 or first[0] & 0x7F or first[1:] != b"\0\0\x22":
            raise AudioError("not an audio file that can be read (FLAC without STREAMINFO)")
        self._info = _parse_info(info)
        is_last = first[0] & 0x80
        total = 0
        while not is_last:
            block = stream.read(4)
            if len(block) < 4:
                raise AudioError("truncated: it ends in its header")
            is_last, size = block[0] & 0x80, int.from_bytes(block[1:], "big")
            total += size
            if stream.skip(size) < size:
                raise AudioError("truncated: it ends in its header")
            if total > MAX_METADATA:
                raise AudioError(f"not an audio file (more than {MAX_METADATA} bytes of metadata)")
        self._start = stream.tell()
        return marker + b"\x80\0\0\x22" + info

    def _find_end(self) -> int:
        """The end of the frames of a file on disk, without tags after them."""
        end = self._stream.size
        self._stream.seek(max(self._start, end - 128))
        if self._stream.read(128).startswith(b"TAG") and end - self._start >= 128:
            end -= 128
        self._stream.seek(max(self._start, end - 32))
        if (footer := self._stream.read(32)).startswith(b"APETAGEX") and len(footer) == 32:
            size = int.from_bytes(footer[12:16], "little")
            size += 32 if footer[23] & 0x80 else 0
            if size <= end - self._start:
                end -= size
        self._stream.seek(self._start)
        return end

    def _find_last(self) -> int | None:
        """Number of samples according to the last frame; None if it is not complete."""
        start = max(self._start, self._end - _LOOK_BACK)
        self._stream.seek(start)
        data = self._stream.read(self._end - start)
        self._stream.seek(self._start)
        at, n_tried = len(data), 0
        while n_tried < 4 and (at := data.rfind(b"\xff", 0, at)) >= 0:
            head = parse_head(data, at)
            if head is None or not self._fits(head):
                continue
            n_tried += 1
            if crc16(data[at:]) == 0:
                size = 1 if head.is_variable else self._info.min_block
                return head.number * size + head.n_samples
        return None

    def _fits(self, head: Head) -> bool:
        info = self._info
        return (
            head.sample_rate in (0, info.sample_rate)
            and head.channels == info.channels
            and head.bits in (0, info.bits)
        )

    def _pieces(self, head: bytes) -> Iterator[bytes]:
        """Yield the file in pieces, and check the header of each frame."""
        yield head
        held = bytearray()  # the bytes from the last frame on
        seen = 0  # number of them that were searched
        last: Head | None = None
        more = b"?"
        while more:
            more = self._some()
            held += more
            limit = max(seen, len(held) - (_MAX_HEAD if more else 5))
            start = 0
            for at in _candidates(held, seen, limit):
                new = parse_head(bytes(held[at : at + _MAX_HEAD]))
                if new is None:
                    continue
                if not self._follows(last, new, held[start:at]):
                    self._has_gap |= last is not None and self._fits(new) and new > last
                    continue
                self._check(new)
                self._n_counted += new.n_samples
                self._n_last = new.n_samples
                last, start = new, at
            del held[:start]
            seen = limit - start
            if len(held) > self._max_frame:
                raise AudioError(f"damaged after {self._place()}: no frame follows")
            if more:
                yield more
        self._is_whole = last is None or crc16(bytes(held)) == 0

    def _some(self) -> bytes:
        """The next bytes, without a tag at the end; empty at the end."""
        if not self._stream.on_disk:
            ahead = self._stream.peek(129)
            if len(ahead) < 129:
                return b"" if ahead.startswith(b"TAG") else self._stream.read(128)
            return self._stream.some(128)
        return self._stream.read(max(0, min(BLOCK, self._end - self._stream.tell())))

    def _follows(self, last: Head | None, new: Head, between: bytearray) -> bool:
        """Whether it is really a header: it has the next number, or follows a complete frame."""
        if last is None:
            return not between
        step = last.n_samples if last.is_variable else 1
        if self._fits(new) and (new.is_variable, new.number) == (
            last.is_variable,
            last.number + step,
        ):
            return True
        return crc16(bytes(between)) == 0

    def _check(self, head: Head) -> None:
        info = self._info
        for name, before, after in (
            ("Hz", info.sample_rate, head.sample_rate or info.sample_rate),
            ("channels", info.channels, head.channels),
            ("bits", info.bits, head.bits or info.bits),
        ):
            if before != after:
                raise AudioError(
                    f"a FLAC file that changes from {before} to {after} {name} at "
                    f"{self._place()}; split it, or convert it to WAV first"
                )

    @property
    def _max_frame(self) -> int:
        """An upper bound of the bytes of a frame."""
        return 2 * 65536 * self._info.channels * 5 + BLOCK

    def _place(self) -> str:
        return f"{self._n_counted / max(1, self._info.sample_rate):.2f} s"

    def read(self, n: int) -> np.ndarray:
        """See `reader.Source`."""
        out = np.zeros((n, self.channels), np.float32)
        try:
            frames = self._sound.read(out=out)
        except sf.LibsndfileError:
            if self._feed.error is not None:
                raise self._feed.error from None
            self._feed.drain()
            if self._is_whole or self._has_gap:
                raise
            # The decoder stopped in the last frame without saying how many samples it returned.
            frames = out[: max(0, self._n_counted - self._n_last - self._n_read)]
        if self._feed.error is not None:
            raise self._feed.error
        self._n_read += len(frames)
        return frames

    def check_end(self, n_read: int) -> None:
        """See `reader.Source`."""
        self._feed.drain()
        if n_read < self._promised:
            self.cut = cut_short(n_read, self._promised, self.sample_rate)
        elif not self._is_whole:
            self.cut = f"truncated: its last frame, behind sample {n_read:,}, is not whole"
        elif n_read < self._n_counted:
            raise AudioError(f"only {n_read:,} of {self._n_counted:,} samples can be read")


def _candidates(data: bytearray, start: int, end: int) -> list[int]:
    """Positions of two bytes that look like the start of a frame."""
    values = np.frombuffer(data, np.uint8)[start : end + 1]
    found = np.flatnonzero((values[:-1] == 0xFF) & (values[1:] & 0xFE == 0xF8)) + start
    del values
    return found.tolist()
