"""Reading audio: files, pipes and folders, in constant memory."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import soundfile as sf

from ..files import find_files
from .common import (
    AUDIO_SUFFIXES,
    BLOCK,
    AudioError,
    RawFormat,
    check_limits,
    is_regular,
    naming,
    raw_coding,
    reason,
)
from .sound import SoundSource
from .wav import WIDTHS, Layout, PcmSource, wav_layout

_MAX_HEADER = 65536  # bytes of a pipe in which WAV data must begin to be streamed


class Source(Protocol):
    """What reads one format of input; `open_source` chooses it, `AudioReader` asks it.

    A new input format is a class like this one, and a line in `open_source`.

    Attributes:
        sample_rate (Hz), channels: as stored.
        n_samples: per channel; None where only reading to the end will tell.
        format, subtype: in libsndfile's words.
    """

    sample_rate: int
    channels: int
    n_samples: int | None
    format: str
    subtype: str

    def read(self, n: int) -> np.ndarray:
        """The next samples, float32 (up to n, C); none at the end."""

    def check_end(self, n_read: int) -> None:
        """Raise AudioError where `n_read` samples cannot be all."""


class AudioReader:
    """Reads audio in blocks, once, from front to back. A context manager.

    `source` is a path or a binary stream, which need not seek, is called `name` in errors and is
    left open. Every format that libsndfile knows is read. From a pipe, `raw` and WAV of linear PCM
    are streamed; anything else passes through a temporary file.

    Attributes:
        sample_rate (Hz), channels: as stored.
        n_samples: per channel; None where only reading to the end will tell (MP3, or a pipe whose
            header does not know).
        format, subtype: in libsndfile's words, such as "WAV" and "PCM_16".

    Raises AudioError where the source is missing, unreadable, not audio, or cut short.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | BinaryIO,
        *,
        raw: RawFormat | None = None,
        name: str = "stdin",
    ) -> None:
        is_path = isinstance(source, (str, os.PathLike))
        self.name = os.fspath(source) if is_path else name
        with naming(self.name), ExitStack() as stack:
            # Unbuffered, because libsndfile shares the descriptor and its position.
            file = stack.enter_context(open(source, "rb", 0)) if is_path else source
            self._source = open_source(file, is_path and is_regular(file), raw, stack)
            check_limits(self._source.sample_rate, self._source.channels)
            self._stack = stack.pop_all()
        self._done = 0  # samples read per channel
        self.sample_rate: int = self._source.sample_rate
        self.channels: int = self._source.channels
        self.n_samples: int | None = self._source.n_samples
        self.format: str = self._source.format
        self.subtype: str = self._source.subtype

    def blocks(self, n: int) -> Iterator[np.ndarray]:
        """Yield what is left as float32 arrays (C, up to `n`); integers are scaled to [-1, 1).

        Raises AudioError where the audio is damaged, ends too early, or holds NaN or infinity.
        """
        while True:
            with naming(self.name):
                frames = self._read(n)
            if not len(frames):
                return
            self._done += len(frames)
            yield np.ascontiguousarray(frames.T)

    def _read(self, n: int) -> np.ndarray:
        try:
            frames = self._source.read(n)
        except sf.LibsndfileError as error:
            raise AudioError(f"damaged after {self._seconds(0)} ({reason(error)})") from error
        if not len(frames):
            self._source.check_end(self._done)
        finite = np.isfinite(frames).all(axis=1)
        if not finite.all():
            raise AudioError(f"NaN or infinity at {self._seconds(int(finite.argmin()))}")
        return frames

    def _seconds(self, offset: int) -> str:
        return f"{(self._done + offset) / self.sample_rate:.2f} s"

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> AudioReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def load(source: str | os.PathLike[str] | BinaryIO) -> tuple[np.ndarray, int]:
    """Read a whole file: float32 (C, T) and its sample rate in Hz. Raises AudioError."""
    with AudioReader(source) as reader:
        blocks = [np.empty((reader.channels, 0), dtype=np.float32), *reader.blocks(BLOCK)]
        return np.concatenate(blocks, axis=1), reader.sample_rate


def find_audio(folder: str | os.PathLike[str], recursive: bool = True) -> list[Path]:
    """The audio files in `folder`, by suffix: sorted paths relative to it, nothing hidden.

    Raises AudioError where a folder cannot be read.
    """
    try:
        return find_files(folder, AUDIO_SUFFIXES, recursive=recursive)
    except OSError as error:
        raise AudioError(f"{error.filename}: {error.strerror}") from error


def open_source(file: BinaryIO, on_disk: bool, raw: RawFormat | None, stack: ExitStack) -> Source:
    """What reads `file`: a regular file without a buffer where `on_disk`, else any stream."""
    head, layout = b"", None
    if raw is not None:
        coding = raw_coding(raw.encoding)
        align = WIDTHS[coding] * raw.channels
        layout = Layout("RAW", coding, raw.sample_rate, raw.channels, align, 0, None)
    elif not on_disk:
        head, layout = _peek(file)
        if layout is None:
            spool = stack.enter_context(tempfile.TemporaryFile())
            spool.write(head)
            shutil.copyfileobj(file, spool)
            spool.flush()
            file, on_disk = spool.raw, True
    if not on_disk:
        return PcmSource(file, head[layout.start :], layout, layout.n_bytes)

    if layout is None:
        file.seek(0)
        if not file.read(1):
            raise AudioError("not an audio file (it is empty)")
        file.seek(0)
        try:
            layout = wav_layout(file)
        except EOFError as error:
            raise AudioError("not an audio file (its header is not complete)") from error
    if layout is None:
        return SoundSource(file, stack)
    held = max(0, file.seek(0, os.SEEK_END) - layout.start)
    n_bytes = held if layout.n_bytes is None else layout.n_bytes
    if held // layout.align < n_bytes // layout.align:
        raise AudioError(f"truncated: {held} bytes of audio where its header promises {n_bytes}")
    if layout.coding is None:
        return SoundSource(file, stack)
    file.seek(layout.start)
    return PcmSource(file, b"", layout, n_bytes)


def _peek(stream: BinaryIO) -> tuple[bytes, Layout | None]:
    """Read a pipe up to its first samples: those bytes, and the layout where it is linear WAV."""
    head = b""
    while len(head) < _MAX_HEADER and (more := stream.read(1024)):
        head += more
        with suppress(EOFError):
            layout = wav_layout(io.BytesIO(head))
            return head, layout if layout and layout.coding else None
    return head, None
