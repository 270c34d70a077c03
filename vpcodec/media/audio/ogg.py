"""Ogg: pages are checked and assigned to links here; libsndfile decodes Vorbis and Opus.

libsndfile reads only the first link of a chained file, and silently skips damaged and missing
pages.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from typing import NamedTuple

import numpy as np

from .common import AudioError, PartialAudioError, cut_short
from .stream import ByteStream, Feed, ForwardSoundFile, open_feed

_BOS, _EOS = 2, 4
_HUGE = 2**62  # a granule position that is never reached
_TAIL = 2**31  # number of the page in the tail of a feed
_WITHIN = "truncated: it ends within an Ogg page"
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_CODECS = {b"\x01vorbis": "Vorbis", b"OpusHead": "Opus", b"\x7fFLAC": "FLAC", b"Speex   ": "Speex"}
DECODED = ("Vorbis", "Opus")


class Page(NamedTuple):
    """A page of an Ogg stream."""

    flags: int
    granule: int
    serial: int
    number: int
    data: bytes  # the whole page

    @property
    def body(self) -> bytes:
        return self.data[27 + self.data[26] :]


def checksum(page: bytes) -> int:
    """Ogg's CRC-32 of a page whose checksum is zero: that of zlib with all bits reversed."""
    value = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(value.to_bytes(4, "little").translate(_REVERSED), "big")


def make_page(flags: int, granule: int, serial: int, number: int, body: bytes = b"") -> bytes:
    """Make a page of complete packets, for the tail of a feed and for tests."""
    sizes = [255] * (len(body) // 255) + [len(body) % 255] if body else []
    head = struct.pack("<4sBBqIII", b"OggS", 0, flags, granule, serial, number, 0)
    page = head + bytes([len(sizes), *sizes]) + body
    return page[:22] + struct.pack("<I", checksum(page)) + page[26:]


def codec_of(page: Page) -> str | None:
    """The audio codec of a first page; None if it is not audio."""
    return next((name for magic, name in _CODECS.items() if page.body.startswith(magic)), None)


def read_pages(stream: ByteStream, *, keep: bool = False) -> Iterator[Page]:
    """Iterate over all pages; AudioError for damaged pages and other data."""
    while head := stream.peek(27):
        if not head.startswith(b"OggS"):
            _check_rest(stream)
            return
        sizes = stream.peek(27 + head[-1])[27:] if len(head) == 27 else b""
        length = 27 + len(sizes) + sum(sizes)
        if len(head) < 27 or len(sizes) < head[26] or len(stream.peek(length)) < length:
            if keep:
                return
            raise PartialAudioError(_WITHIN)
        data = stream.read(length)
        _, flags, granule, serial, number, check = struct.unpack("<xxxxBBqIII", data[:26])
        if checksum(data[:22] + bytes(4) + data[26:]) != check:
            place = stream.tell() - length
            raise AudioError(f"damaged: the checksum of the Ogg page at byte {place:,} is wrong")
        yield Page(flags, granule, serial, number, data)


def _check_rest(stream: ByteStream) -> None:
    """Check that the rest, which is not Ogg, is a tag or zeros."""
    place = stream.tell()
    if (head := stream.peek(128)).startswith(b"TAG") and len(stream.peek(129)) == 128:
        return
    rest = head
    while rest := stream.some():
        if any(rest):
            raise AudioError(f"damaged: there is no Ogg page at byte {place:,}")


class UnknownCodec(AudioError):
    """The codec of an intact file is not decoded here."""


class _Link(NamedTuple):
    """One link of a chain in a file on disk."""

    start: int  # position of the first byte
    granule: int  # end of its audio


class OggSource:
    """Ogg Vorbis and Ogg Opus, one link after the other.

    Args:
        stream: a file or a pipe, at the first page.
        stack: closes the decoders.
        keep: read what there is of a truncated file.

    Raises:
        UnknownCodec: the codec is another.
        AudioError: the file is damaged.
    """

    def __init__(self, stream: ByteStream, stack: ExitStack, *, keep: bool = False) -> None:
        self._keep = keep
        self._sounds = stack.enter_context(ExitStack())
        start = stream.tell()
        self._links = _find_links(stream) if stream.on_disk and not keep else []
        total = 0
        for link in self._links[1:]:
            total += self._begin(stream, link.start, link.granule).frames
        granule = self._links[0].granule if self._links else _HUGE
        self._sound = self._begin(stream, start, granule)
        self._links = self._links[1:]
        self.sample_rate, self.channels = self._sound.samplerate, self._sound.channels
        self.format, self.subtype = self._sound.format, self._sound.subtype
        known = stream.on_disk and not keep
        self.n_samples = total + self._sound.frames if known else None
        self.cut: str | None = None

    def _begin(self, stream: ByteStream, start: int, granule: int) -> ForwardSoundFile:
        """Open the link that starts at a byte."""
        if stream.on_disk:
            stream.seek(start)
        self._pages = read_pages(stream, keep=self._keep)
        self._ahead = next(self._pages, None)
        return self._open(granule)

    def _open(self, granule: int) -> ForwardSoundFile:
        """Open the link that begins with the page ahead and ends at `granule`."""
        firsts = []
        while self._ahead is not None and self._ahead.flags & _BOS:
            firsts.append(self._ahead)
            self._ahead = next(self._pages, None)
        audio = [page for page in firsts if codec_of(page)]
        if not firsts:
            raise AudioError("an Ogg file that lacks its beginning")
        if len(audio) != 1:
            raise AudioError(f"an Ogg file of {len(audio)} audio streams, where one is wanted")
        if (codec := codec_of(audio[0])) not in DECODED:
            raise UnknownCodec(f"Ogg {codec}")
        self._last = audio[0]
        self._granule = granule
        self._n_link = 0  # samples read
        others = {page.serial for page in firsts} - {audio[0].serial}
        pieces = chain([audio[0].data], self._pieces(audio[0].serial, others))
        self._feed = Feed(pieces, make_page(_EOS, granule, audio[0].serial, _TAIL))
        self._sounds.close()
        return self._sounds.enter_context(open_feed(self._feed))

    def _pieces(self, serial: int, others: set[int]) -> Iterator[bytes]:
        while (page := self._ahead) is not None and not page.flags & _BOS:
            if page.serial == serial:
                self._check(page)
                self._last = page
                yield page.data
            elif page.serial not in others:
                raise AudioError("damaged: an Ogg page of a stream that never began")
            if self._ahead is page:
                self._ahead = next(self._pages, None)

    def _check(self, page: Page) -> None:
        last = self._last
        if last.flags & _EOS:
            raise AudioError("damaged: an Ogg page follows the last one")
        if page.number != (last.number + 1) & 0xFFFFFFFF:
            raise AudioError(
                f"damaged: after Ogg page {last.number:,} comes {page.number:,}, "
                "and what was between them is missing"
            )

    def read(self, n: int) -> np.ndarray:
        """See `reader.Source`; AudioError also if the links of a chain differ in format."""
        while True:
            frames = self._sound.read(n, dtype="float32", always_2d=True)
            if self._feed.error is not None:
                raise self._feed.error
            self._n_link += len(frames)
            if len(frames) or not self._next_link():
                return frames

    def _next_link(self) -> bool:
        """Go to the next link, if there is one."""
        self._feed.drain()
        if self._granule != _HUGE and self._n_link < self._sound.frames:
            raise AudioError(cut_short(self._n_link, self._sound.frames, self.sample_rate))
        if self._ahead is None:
            return False
        granule = _HUGE
        if self._links:
            granule = self._links.pop(0).granule
        before = self._sound
        self._sound = self._open(granule)
        own, new = (
            f"{sound.subtype} of {sound.channels} channels at {sound.samplerate} Hz"
            for sound in (before, self._sound)
        )
        if new != own:
            raise AudioError(
                f"an Ogg chain that changes from {own} to {new}; split it, or convert it to WAV "
                "first"
            )
        return True

    def check_end(self, n_read: int) -> None:
        """See `reader.Source`."""
        if not self._last.flags & _EOS:
            self.cut = f"truncated: behind sample {n_read:,}, its last Ogg page is not marked so"


def _find_links(stream: ByteStream) -> list[_Link]:
    """The links of a file on disk, from the headers of its pages; AudioError if one is cut."""
    links: list[_Link] = []
    serial, in_firsts = None, False
    while (head := stream.peek(27)).startswith(b"OggS"):
        start = stream.tell()
        sizes = stream.peek(27 + head[-1])[27:] if len(head) == 27 else b""
        length = 27 + len(sizes) + sum(sizes)
        if len(head) < 27 or len(sizes) < head[26] or start + length > stream.size:
            raise PartialAudioError(_WITHIN)
        _, flags, granule, page_serial, number, _ = struct.unpack("<xxxxBBqIII", head[:26])
        if flags & _BOS:
            page = Page(flags, granule, page_serial, number, stream.peek(length))
            if not in_firsts:
                links.append(_Link(start, 0))
            in_firsts = True
            if codec_of(page):
                serial = page_serial
        else:
            in_firsts = False
            if page_serial == serial and granule != -1:
                links[-1] = links[-1]._replace(granule=granule)
        stream.skip(length)
    return links
