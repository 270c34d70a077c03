"""MPEG audio (MP3, MP2, MP1): frames are found here and decoded by libsndfile.

libsndfile takes the length of an MP3 from its first frame and stops there, so concatenated files
lose all but the first; and bytes outside frames (tags, zeros, junk) end or confuse it. Here every
byte is accounted for: frames go to the decoder, known tags are skipped, and other bytes are skipped
at the ends and refused in between. As in ffmpeg, encoder delay and padding are those of the first
file's header, and the headers of further files are frames of silence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple, Protocol

import numpy as np

from ..noise import overheard
from .common import AudioError, PartialAudioError, cut_short
from .stream import Feed, id3_length, open_feed

SEARCH = 2**16  # most bytes before the first frame
LOOK = 8643  # bytes that hold three frames of the largest size
SEARCHED = SEARCH + LOOK
_RATES = (44100, 48000, 32000)
_BIT_RATES = {  # (MPEG 1, layer): kbit/s
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_DECODER_DELAY = 529  # samples


class Header(NamedTuple):
    """The first four bytes of a frame."""

    length: int  # bytes
    n_samples: int
    sample_rate: int
    channels: int
    layer: int
    side: int  # bytes between header and data


class Readable(Protocol):
    def read(self, n: int) -> bytes: ...


def parse_header(data: bytes, at: int = 0) -> Header | None:
    """The frame header at a position; None if there is none.

    Headers of free format count as none, because they do not state the length of the frame.
    """
    if len(data) < at + 4 or data[at] != 0xFF or data[at + 1] & 0xE0 != 0xE0:
        return None
    version, layer = data[at + 1] >> 3 & 3, 4 - (data[at + 1] >> 1 & 3)
    bits, rate, pad = data[at + 2] >> 4, data[at + 2] >> 2 & 3, data[at + 2] >> 1 & 1
    if version == 1 or layer == 4 or bits in (0, 15) or rate == 3 or data[at + 3] & 3 == 2:
        return None
    one = version == 3
    sample_rate = _RATES[rate] >> (0 if one else 1 if version == 2 else 2)
    bit_rate = 1000 * _BIT_RATES[one, layer][bits - 1]
    mono = data[at + 3] >> 6 == 3
    if layer == 1:
        length, n_samples = (12 * bit_rate // sample_rate + pad) * 4, 384
    else:
        n_samples = 576 if layer == 3 and not one else 1152
        length = n_samples // 8 * bit_rate // sample_rate + pad
    side = (17 if mono else 32) if one else (9 if mono else 17)
    return Header(length, n_samples, sample_rate, 1 if mono else 2, layer, side)


def find_frames(data: bytes, start: int = 0, *, at_end: bool) -> int | None:
    """The start of MPEG audio in `data`: three frames in a row, or fewer up to the end."""
    at = start
    while (at := data.find(b"\xff", at)) >= 0:
        if _is_run(data, at, at_end):
            return at
        at += 1
    return None


def _is_run(data: bytes, at: int, at_end: bool) -> bool:
    first = parse_header(data, at)
    if first is None:
        return False
    position = at + first.length
    for _ in range(2):
        if at_end and position >= len(data) - 3:
            return position == len(data)
        header = parse_header(data, position)
        if header is None:
            return at_end and _tag_length(data[position : position + 32], True) is not None
        if header[2:5:2] != first[2:5:2]:
            return False
        position += header.length
    return True


class _Frame(NamedTuple):
    header: Header
    data: bytes


class _Frames:
    """Iterates over the frames of a stream.

    Attributes:
        junk: number of bytes since the last frame that are neither frames nor tags.
        skipped: whether there is anything, including tags, between the last two frames.
        cut: (available, stated) bytes of a last frame that is not complete.
    """

    def __init__(self, file: Readable) -> None:
        self._file = file
        self._data = b""
        self._at = 0
        self._ended = False
        self.position = 0  # position of `_data` in the stream
        self.junk = 0
        self.skipped = False
        self.cut: tuple[int, int] | None = None

    def _has(self, n: int) -> bool:
        """Whether `n` more bytes are available; reads as needed."""
        if len(self._data) - self._at >= n:
            return True
        if self._ended:
            return False
        parts = [self._data[self._at :]]
        size = len(parts[0])
        while size < n and not self._ended:
            more = self._file.read(n - size)
            self._ended = not more
            parts.append(more)
            size += len(more)
        self.position += self._at
        self._data, self._at = b"".join(parts), 0
        return size >= n

    def _skip(self, n: int) -> None:
        while n:
            if not self._has(1):
                return
            step = min(n, len(self._data) - self._at)
            self._at += step
            n -= step
            if n:
                self._has(min(n, SEARCH))

    def __iter__(self) -> Iterator[_Frame]:
        synced = False
        while self._has(1):
            self._has(4)
            header = parse_header(self._data, self._at)
            if header is not None and synced:
                if not self._has(header.length):
                    if not self._is_tag_ahead():
                        self.cut = (len(self._data) - self._at, header.length)
                        return
                else:
                    data = self._data[self._at : self._at + header.length]
                    self._at += header.length
                    yield _Frame(header, data)
                    self.junk, self.skipped = 0, False
                    continue
            synced, self.skipped = self._resync(), True

    def _is_tag_ahead(self) -> bool:
        return _tag_length(self._data[self._at : self._at + 32], False) is not None

    def _resync(self) -> bool:
        """Skip a tag, or go to the next frames or the end; returns whether to expect a frame."""
        self._has(32)
        head = self._data[self._at : self._at + 32]
        length = _tag_length(head, False)
        if head.startswith(b"LYRICSBEGIN"):
            self._has(SEARCH)
            ends = [self._data.find(mark, self._at) for mark in (b"LYRICSEND", b"LYRICS200")]
            end = min((end for end in ends if end >= 0), default=None)
            length = None if end is None else end + 9 - self._at
        if length is not None:
            self._skip(length)
            return True
        self._has(LOOK)
        if find_frames(self._data[self._at : self._at + LOOK], at_end=self._ended) == 0:
            return True
        self._has(SEARCHED)
        at_end = self._ended
        found = find_frames(self._data, self._at, at_end=at_end)
        limit = len(self._data) if at_end else self._at + SEARCH
        if found is None or found > limit:
            for mark in (b"ID3", b"TAG", b"APETAGEX", b"LYRICSBEGIN"):
                other = self._data.find(mark, self._at + 1)
                if other > 0 and _tag_length(self._data[other : other + 32], False) is not None:
                    limit = min(limit, other)
            self.junk += limit - self._at
            self._at = limit
            return False
        skipped = self._data[self._at : found]
        self._at = found
        self.junk += len(skipped)
        return True


def _tag_length(head: bytes, any_end: bool) -> int | None:
    """Length of the tag that begins with `head`, bytes; None if there is no tag."""
    if head.startswith(b"ID3") and len(head) >= 10 and max(head[6:10]) < 0x80:
        return id3_length(head)
    if head.startswith(b"TAG+"):
        return 227
    if head.startswith(b"TAG"):
        return 128
    if head.startswith(b"APETAGEX") and len(head) == 32:
        size, flags = (int.from_bytes(head[i : i + 4], "little") for i in (12, 20))
        return 32 + (size if flags & 1 << 29 else 0)
    if any_end and head.startswith(b"LYRICSBEGIN"):
        return len(head)
    if any_end and head and not any(head):
        return len(head)
    return None


class _Info(NamedTuple):
    """The contents of an encoder's header frame."""

    n_frames: int | None
    n_bytes: int | None
    delay: int | None
    padding: int


def _info(frame: _Frame) -> _Info | None:
    """The header in a first frame; None if the frame contains audio."""
    data, at = frame.data, 4 + frame.header.side
    if frame.header.layer != 3:
        return None
    if data[36:40] == b"VBRI":
        n_bytes, n_frames = (int.from_bytes(data[i : i + 4], "big") for i in (46, 50))
        return _Info(n_frames or None, n_bytes or None, None, 0)
    if data[at : at + 4] not in (b"Xing", b"Info"):
        return None
    flags = int.from_bytes(data[at + 4 : at + 8], "big")
    n_frames = int.from_bytes(data[at + 8 : at + 12], "big") if flags & 1 else 0
    field = data[at + 12 : at + 16] if flags & 1 else data[at + 8 : at + 12]
    n_bytes = int.from_bytes(field, "big") if flags & 2 else 0
    at += 8 + sum(size for bit, size in enumerate((4, 4, 100, 4)) if flags >> bit & 1)
    delay, padding = None, 0
    if data[at : at + 4] in (b"LAME", b"Lavf", b"Lavc") and len(data) >= at + 24:
        both = int.from_bytes(data[at + 21 : at + 24], "big")
        delay, padding = both >> 12, both & 0xFFF
    return _Info(n_frames or None, n_bytes or None, delay, padding)


class Mp3Source:
    """MPEG audio from a file or a stream.

    Args:
        file: the input, at its first byte.
        size: its length, bytes; None if unknown.
        stack: closes the decoder.
        keep: read what there is of a truncated file.
    """

    def __init__(
        self, file: Readable, size: int | None, stack: ExitStack, *, keep: bool = False
    ) -> None:
        self._frames = _Frames(file)
        self._size, self._keep = size, keep
        self._iterator = iter(self._frames)
        first = next(self._iterator, None)
        if first is None:
            raise AudioError("not an audio file (it has no whole MPEG frame)")
        self._header, self._info = first.header, _info(first)
        self._n_fed = self._n_bytes = 0  # frames, and their bytes including the header
        self._ahead = deque([first] if self._info is None else [])  # frames to decode
        if not self._look(1):
            raise AudioError("an MP3 of a header without audio")
        if self._info:
            self._n_bytes = len(first.data)
        self._feed = Feed(self._pieces())
        self.complaints: list[str] = []  # of the decoder
        with overheard() as lines:
            self._sound = open_feed(self._feed)
        self.complaints += lines
        stack.callback(self._sound.close)
        self.sample_rate, self.channels = self._sound.samplerate, self._sound.channels
        self.format, self.subtype = "MP3", self._sound.subtype
        self.n_samples: int | None = None
        self.cut: str | None = None
        self._n_decoded = 0  # samples
        self._start = self._padding = 0  # first sample to keep, and first sample of the padding
        self._end = 0  # end of the padding
        if self._info and self._info.delay is not None:
            self._start = self._info.delay + _DECODER_DELAY
            if self._info.n_frames:
                self._end = self._info.n_frames * self._header.n_samples
                self._padding = self._end - max(0, self._info.padding - _DECODER_DELAY)

    def _look(self, n: int) -> bool:
        """Whether there are at least `n` more frames to decode."""
        while len(self._ahead) < n and (frame := next(self._iterator, None)) is not None:
            if not (self._frames.skipped and _info(frame)):
                self._check(frame)
                self._ahead.append(frame)
        return len(self._ahead) >= n

    def _pieces(self) -> Iterator[bytes]:
        while self._look(1):
            frame = self._ahead.popleft()
            self._n_fed += 1
            self._n_bytes += len(frame.data)
            yield frame.data

    def _check(self, frame: _Frame) -> None:
        ours, other = self._header, frame.header
        n_before = self._n_fed + len(self._ahead)
        place = f"{n_before * ours.n_samples / ours.sample_rate:.2f} s"
        if self._frames.junk and n_before and not self._keep:
            raise PartialAudioError(
                f"damaged after {place}: {self._frames.junk:,} bytes there are no MPEG audio, "
                "and more follows"
            )
        for name, before, after in (
            ("layers", ours.layer, other.layer),
            ("Hz", ours.sample_rate, other.sample_rate),
            ("channels", ours.channels, other.channels),
        ):
            if before != after:
                raise AudioError(
                    f"an MP3 that changes from {before} to {after} {name} at {place}; "
                    "split it, or convert it to WAV first"
                )

    def _ends(self) -> bool:
        """Whether the file ends with the padding that its header states, or soon after it."""
        n_more = self._end // self._header.n_samples + 1 - self._n_fed  # one frame after it
        if n_more > 0 and not self._look(n_more):
            return True
        n_bytes = self._info.n_bytes if self._info else None
        if self._size is None or n_bytes is None:
            return False
        return self._size <= n_bytes * 17 / 16  # as ffmpeg decides

    def read(self, n: int) -> np.ndarray:
        """See `reader.Source`."""
        while True:
            with overheard() as lines:
                frames = self._sound.read(n, dtype="float32", always_2d=True)
            self.complaints += lines
            if self._feed.error is not None:
                raise self._feed.error
            start, end = self._n_decoded, self._n_decoded + len(frames)
            self._n_decoded = end
            inside = slice(max(0, self._start - start), None)
            kept = frames[inside]
            if start < self._end and end > self._padding and self._ends():
                low, high = (max(0, edge - end + len(kept)) for edge in (self._padding, self._end))
                kept = np.concatenate([kept[:low], kept[high:]])
            if len(kept) or not len(frames):
                return kept

    def check_end(self, n_read: int) -> None:
        """See `reader.Source`."""
        size = self._header.n_samples
        for frame in self._pieces():  # none, unless the decoder stopped early
            self._n_bytes += len(frame)
        fed = self._n_fed * size
        if self._n_decoded < fed:
            raise AudioError(f"only {self._n_decoded:,} of {fed:,} samples can be decoded")
        promised = 0
        if self._info is not None and self._info.n_frames is not None:
            promised = self._info.n_frames * size
            if self._n_bytes >= (self._info.n_bytes or 1):  # some count their header, too
                promised -= size
        cut = self._frames.cut
        if fed < promised:
            self.cut = cut_short(fed, promised, self.sample_rate)
        elif cut:
            self.cut = (
                f"truncated: its last frame has {cut[0]:,} of {cut[1]:,} bytes, behind "
                f"{n_read:,} samples"
            )
