"""Forward reading of files and pipes, and an adapter that makes libsndfile read forward."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import BinaryIO

import soundfile as sf

from .common import BLOCK, AudioError, reason

_MAX_MARKED = 2**20  # most bytes that a pipe can be rewound by
_LENGTH = 2**50  # length that a `Feed` claims to have, bytes
_WINDOW = 2**16  # bytes that a `Feed` can seek back
_PARTIAL = 1024  # a `Feed` may return less than is asked for from this many bytes on
_FAR = 2**20  # bytes before the end of a `Feed` from which on its tail is read


class ByteStream:
    """A file or a pipe, read forward with lookahead.

    Args:
        file: an unbuffered regular file if `on_disk`, otherwise any stream.
        on_disk: whether the file is seekable.

    Attributes:
        size: length of a file on disk, bytes.
    """

    def __init__(self, file: BinaryIO | io.RawIOBase, on_disk: bool) -> None:
        self.file, self.on_disk = file, on_disk
        self.size = file.seek(0, os.SEEK_END) if on_disk else 0
        if on_disk:
            file.seek(0)
        self._buffer = bytearray()
        self._start = 0  # position of the buffer
        self._read1 = getattr(file, "read1", None)
        self._mark = 0
        self._marked: bytearray | None = None  # bytes of a pipe since its mark

    def peek(self, n: int) -> bytes:
        """The next `n` bytes, fewer at the end, without consuming them."""
        while len(self._buffer) < n and (more := self._more(n - len(self._buffer))):
            self._buffer += more
        return bytes(self._buffer[:n])

    def read(self, n: int) -> bytes:
        """The next `n` bytes, fewer at the end."""
        data = self.peek(n)
        del self._buffer[: len(data)]
        self._start += len(data)
        if self._marked is not None:
            self._marked += data
            if len(self._marked) > _MAX_MARKED:
                self._marked = None
        return data

    def some(self, but: int = 0) -> bytes:
        """The available bytes without waiting for more: at least one, none at the end.

        Args:
            but: number of bytes at the end of the buffer to leave.
        """
        self.peek(1)
        return self.read(len(self._buffer) - but)

    def skip(self, n: int) -> int:
        """Skip `n` bytes, fewer at the end; returns their number."""
        if self.on_disk:
            n = max(0, min(n, self.size - self._start))
            self.seek(self._start + n)
            return n
        done = 0
        while done < n and (data := self.read(min(BLOCK, n - done))):
            done += len(data)
        return done

    def mark(self) -> None:
        """Remember this position."""
        self._mark = self._start
        self._marked = None if self.on_disk else bytearray()

    def unmark(self) -> None:
        """Forget the mark, and the bytes read since."""
        self._marked = None

    def rewind(self) -> None:
        """Return to the mark; AudioError if too much of a pipe was read since."""
        if self.on_disk:
            self.seek(self._mark)
        elif self._marked is None:
            raise AudioError("too much before its audio to be read from a pipe; save it to a file")
        else:
            self._buffer[:0] = self._marked
            self._start, self._marked = self._mark, None

    def seek(self, position: int) -> None:
        """Go to a position of a file on disk."""
        self._buffer.clear()
        self._start = self.file.seek(position)

    def tell(self) -> int:
        """The current position."""
        return self._start

    def _more(self, n: int) -> bytes:
        if self.on_disk:
            return self.file.read(max(n, BLOCK)) or b""
        if self._read1:  # what a live pipe has, without waiting for more
            return self._read1(max(n, BLOCK))
        return self.file.read(n) or b""


class Part:
    """Parts of a file on disk, read as one.

    Args:
        parent: the file.
        parts: (first byte, bytes) of each part.
    """

    def __init__(self, parent: ByteStream, parts: list[tuple[int, int]]) -> None:
        self._parent, self._parts = parent, [list(part) for part in parts]
        self._at: int | None = None

    def read(self, n: int) -> bytes:
        """Up to `n` bytes; empty at the end."""
        while self._parts:
            start, left = self._parts[0]
            if self._at is None:
                if self._parent.tell() != start:
                    self._parent.seek(start)
                self._at = start
            data = self._parent.read(min(n, left))
            self._parts[0] = [start, left - len(data)]
            if data:
                return data
            self._parts.pop(0)
            self._at = None
        return b""


class ForwardSoundFile(sf.SoundFile):
    """A SoundFile that does not seek before and after each read and write."""

    def seekable(self) -> bool:
        return False


class Feed:
    """A file object for libsndfile, which reads pieces of bytes one after the other.

    It claims a length that is never reached; libsndfile can only look at `tail`, its last bytes.

    Args:
        pieces: the bytes.
        tail: the last bytes of the claimed length.

    Attributes:
        error: exception of the iterator of pieces, which libsndfile does not pass on.
        ended: whether all pieces were read.
    """

    def __init__(self, pieces: Iterator[bytes], tail: bytes = b"") -> None:
        self._pieces = pieces
        self._tail = tail
        self._held = bytearray()
        self._start = 0  # position of the first byte held
        self._at = 0
        self.error: BaseException | None = None
        self.ended = False

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: _LENGTH}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, n: int = -1) -> bytes:
        if self._at >= _LENGTH - _FAR:
            data = (bytes(_FAR - len(self._tail)) + self._tail)[self._at - _LENGTH + _FAR :][:n]
        else:
            data = self._take(n)
        self._at += len(data)
        return data

    def _take(self, n: int) -> bytes:
        end = self._at + n
        enough = end if n < _PARTIAL else self._at + 1  # do not wait for a live pipe
        while self._start + len(self._held) < enough and not self.ended and self.error is None:
            try:
                self._held += next(self._pieces)
            except StopIteration:
                self.ended = True
            except BaseException as error:  # the callback of libsndfile would print it and continue
                self.error = error
        if self._at < self._start:
            self.error = self.error or ValueError("read behind what is held")
            return b""
        data = bytes(self._held[self._at - self._start : end - self._start])
        gone = end - _WINDOW - self._start
        if gone > _WINDOW:
            del self._held[:gone]
            self._start += gone
        return data

    def drain(self) -> None:
        """Read the pieces that libsndfile left; raises their exceptions."""
        for _ in self._pieces:
            pass
        self.ended = True

    def write(self, data: bytes) -> int:  # soundfile requires it
        raise OSError("a feed is for reading")


def skip_id3(stream: ByteStream) -> None:
    """Skip ID3v2 tags with their footers."""
    while (head := stream.peek(10)).startswith(b"ID3") and len(head) == 10:
        stream.skip(id3_length(head))


def id3_length(head: bytes) -> int:
    """Length of the ID3v2 tag with these first 10 bytes."""
    size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0)))
    return 10 + size + (10 if head[5] & 0x10 else 0)


def open_feed(feed: Feed) -> ForwardSoundFile:
    """Open a decoder for a feed; AudioError if it cannot be decoded."""
    try:
        return ForwardSoundFile(feed)
    except sf.LibsndfileError as error:
        if feed.error is not None:
            raise feed.error from None
        raise AudioError(f"not an audio file that can be read ({reason(error)})") from error
