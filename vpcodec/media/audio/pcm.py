"""Linear PCM from a file or a pipe."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .chunks import Layout, parts_behind
from .common import READ_WIDTHS, AudioError, cut_short
from .stream import ByteStream, Part
from .wav import decode

_LOOK = 2**18  # bytes examined at a time to find which of four bytes contain 24 bits


class PcmSource:
    """Linear PCM from a file or a pipe.

    Args:
        stream: a file or a pipe, at the first byte of audio.
        layout: layout of the file.
        parts: (first byte, bytes) of the audio of a file on disk, from `find_parts`.
        keep: read what there is of a truncated file.
    """

    def __init__(
        self,
        stream: ByteStream,
        layout: Layout,
        parts: list[tuple[int, int]] | None,
        *,
        keep: bool = False,
    ) -> None:
        self.sample_rate, self.channels = layout.sample_rate, layout.channels
        assert layout.coding is not None
        self.format, self.subtype = layout.format, layout.coding
        self._stream, self._layout, self._keep = stream, layout, keep
        self._width = layout.align // max(1, layout.channels)
        self._has_more = parts is None and layout.is_known  # after the stated length
        self._promised: int | None = None
        if parts is not None:
            self._file: Part | ByteStream = Part(stream, parts)
            self._promised = sum(size for _, size in parts) // layout.align
            self.n_samples: int | None = self._promised
        else:
            self._file = stream
            if layout.is_known:
                self._promised = layout.n_bytes // layout.align
            self.n_samples = None if keep else self._promised
        self._left = self._promised
        self.cut: str | None = None
        self._shift = 0  # bits to shift samples up by
        if self._width > READ_WIDTHS[self.subtype]:
            self._shift = self._find_shift(parts)

    def read(self, n: int) -> np.ndarray:
        """See `reader.Source`."""
        align = self._layout.align
        wanted = (n if self._left is None else min(n, self._left)) * align
        data = bytearray()
        while len(data) < wanted and (more := self._file.read(wanted - len(data))):
            data += more
        n_read = len(data) // align
        if self._left is not None:
            self._left -= n_read
        del data[n_read * align :]
        samples = decode(data, self.subtype, self._layout.order, self._width)
        if self._shift:
            samples = samples * np.float32(2**self._shift)
        return samples.reshape(-1, self.channels)

    def check_end(self, n_read: int) -> None:
        """See `reader.Source`."""
        if self._promised is not None and n_read < self._promised:
            self.cut = cut_short(n_read, self._promised, self.sample_rate)
        elif self._has_more and self._promised is not None:
            self._stream.skip(self._layout.n_bytes - self._promised * self._layout.align)
            odd = self._layout.n_bytes % 2 == 1
            try:
                more = parts_behind(self._stream, self._layout.style, odd)
            except AudioError:
                if not self._keep:
                    raise
                more = []
            self._stream.skip(2**62)  # so that the writer of the pipe can finish
            if more:
                raise AudioError(
                    "more audio follows in a chunk of its own, which a pipe cannot tell before; "
                    "save it to a file first"
                )
        else:
            self._stream.skip(2**62)

    def _find_shift(self, parts: list[tuple[int, int]] | None) -> int:
        """Shift for 24 bits in the lower three of four bytes, which some writers use by mistake."""
        can_be_upper = can_be_lower = True
        blocks = [self._stream.peek(_LOOK)] if parts is None else _blocks(Part(self._stream, parts))
        for block in blocks:
            samples = np.frombuffer(block[: len(block) // 4 * 4], f"{self._layout.order}i4")
            can_be_upper &= not (samples & 0xFF).any()
            can_be_lower &= bool((np.abs(samples.astype(np.int64) * 2 + 1) < 2**24).all())
            if not (can_be_upper and can_be_lower):
                break
        return 8 if can_be_lower and (parts is not None or not can_be_upper) else 0


def _blocks(part: Part) -> Iterator[bytes]:
    left = b""
    while data := part.read(_LOOK):
        data = left + data
        left = data[len(data) // 4 * 4 :]
        yield data


def find_parts(
    stream: ByteStream, layout: Layout, *, keep: bool
) -> tuple[list[tuple[int, int]], str | None]:
    """Find the parts of a file on disk that contain audio.

    Returns:
        (first byte, bytes) of each part, and a message if the file is truncated.

    Raises:
        AudioError: bytes after the audio cannot be accounted for.
    """
    held = max(0, stream.size - layout.start)
    n_bytes = layout.n_bytes
    if layout.is_known or (n_bytes and n_bytes <= held):
        whole = min(n_bytes, held)
        stream.seek(layout.start + whole)
        try:
            behind = parts_behind(stream, layout.style, n_bytes % 2 == 1)
        except AudioError:
            if layout.is_known and not keep:
                raise
            behind = []
            if not layout.is_known:
                whole = held
        parts = [(layout.start, whole), *behind]
    else:
        parts = [(layout.start, held)]
    if not layout.is_known and parts == [(layout.start, held)]:
        return parts, None
    promised = n_bytes + sum(size for _, size in parts[1:])
    parts = [(start, min(size, stream.size - start)) for start, size in parts]
    there = sum(size for _, size in parts)
    cut = None
    if there // layout.align < promised // layout.align:
        cut = cut_short(there // layout.align, promised // layout.align, max(1, layout.sample_rate))
    return parts, cut
