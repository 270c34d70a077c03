"""Reading audio: files, pipes and folders, in constant memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import soundfile as sf

from ..files import find_files, spooling
from ..noise import tell
from .chunks import RIFF, W64, Layout, aiff_layout, au_layout, caf_layout, w64_layout
from .common import (
    AUDIO_SUFFIXES,
    BLOCK,
    WIDTHS,
    AudioError,
    PartialAudioError,
    RawFormat,
    check_limits,
    is_regular,
    naming,
    raw_coding,
    reason,
)
from .ffmpeg import FfmpegSource, find_demuxer
from .flac import FlacSource
from .mp3 import LOOK, SEARCH, SEARCHED, Mp3Source, find_frames
from .ogg import OggSource, UnknownCodec
from .pcm import PcmSource, find_parts
from .sound import SoundSource
from .stream import ByteStream, Part, skip_id3
from .wav import wav_layout

TRUNCATED = ("refuse", "keep")  # ways to treat truncated audio
MAX_SPOOL = 2**30  # most bytes of a pipe in a temporary file
_SPOOLED = (b"NIST_1A", b"Creative", b"FORM", b".snd", b"dns.", b"caff", b"riff", b"RIFF", b"RF64")


class Source(Protocol):
    """A reader of one input format, chosen by `open_source` and used by `AudioReader`.

    A new input format is a class like this one, and a line in `open_source`.

    Attributes:
        sample_rate (Hz), channels: as stored.
        n_samples: samples per channel; None if it is only known at the end.
        format, subtype: libsndfile's names.
        cut: how the audio is truncated, once that is known; None if it is not.
    """

    sample_rate: int
    channels: int
    n_samples: int | None
    format: str
    subtype: str
    cut: str | None

    def read(self, n: int) -> np.ndarray:
        """The next samples, float32 (up to n, C); none at the end."""

    def check_end(self, n_read: int) -> None:
        """At the end, set `cut` or raise AudioError if `n_read` samples are not all."""


class AudioReader:
    """Reads audio in blocks, once, from front to back. A context manager.

    WAV, AIFF, AU, CAF, W64, FLAC, Ogg and MPEG audio are streamed from pipes, too; other formats
    that libsndfile or ffmpeg reads pass through a temporary file of at most MAX_SPOOL bytes. What
    is not audio is refused after its first bytes. Every byte of a file is accounted for: audio that
    the header does not mention is read or refused, never skipped.

    Args:
        source: a path, or a binary stream, which need not be seekable and is left open.
        raw: format of headerless PCM; None: the source has a header.
        name: name of a stream in messages.
        truncated: "refuse" raises PartialAudioError if the audio ends early, "keep" reads what
            there is.

    Attributes:
        sample_rate (Hz), channels: as stored.
        n_samples: samples per channel; None if it is only known at the end (MP3, formats that
            ffmpeg reads, and pipes whose header does not state it).
        format, subtype: libsndfile's names, such as "WAV" and "PCM_16".
        cut: how the audio is truncated, known at the end; None if it is not.

    Raises:
        AudioError: the source is missing, unreadable, not audio, or truncated.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | BinaryIO,
        *,
        raw: RawFormat | None = None,
        name: str = "stdin",
        truncated: str = "refuse",
    ) -> None:
        if truncated not in TRUNCATED:
            raise ValueError(f"truncated is {truncated!r}, not one of {', '.join(TRUNCATED)}")
        is_path = isinstance(source, (str, os.PathLike))
        self.name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else name
        self._keep = truncated == "keep"
        with naming(self.name), ExitStack() as stack:
            # Unbuffered, because libsndfile shares the descriptor and its position.
            if isinstance(source, (str, os.PathLike)):
                source = stack.enter_context(open(source, "rb", 0))
            on_disk = is_path and is_regular(source)
            self._source = open_source(source, on_disk, raw, stack, keep=self._keep)
            check_limits(self._source.sample_rate, self._source.channels)
            self._refuse_cut()
            self._stack = stack.pop_all()
        self._done = 0  # samples read per channel
        self.sample_rate: int = self._source.sample_rate
        self.channels: int = self._source.channels
        self.n_samples: int | None = self._source.n_samples
        self.format: str = self._source.format
        self.subtype: str = self._source.subtype

    @property
    def cut(self) -> str | None:
        return self._source.cut

    def _refuse_cut(self) -> None:
        if self._source.cut and not self._keep:
            raise PartialAudioError(self._source.cut)

    def blocks(self, n: int) -> Iterator[np.ndarray]:
        """Yield the remaining audio as float32 (C, up to `n`); integers are scaled to [-1, 1).

        Raises:
            AudioError: the audio is damaged, ends too early, or contains NaN or infinity.
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
            self._refuse_cut()
        finite = np.isfinite(frames).all(axis=1)
        if not finite.all():
            raise AudioError(f"NaN or infinity at {self._seconds(int(finite.argmin()))}")
        return frames

    def _seconds(self, offset: int) -> str:
        return f"{(self._done + offset) / self.sample_rate:.2f} s"

    def close(self) -> None:
        self._stack.close()
        if isinstance(self._source, Mp3Source):
            tell(self.name, self._source.complaints)
            self._source.complaints.clear()

    def __enter__(self) -> AudioReader:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if error is not None and isinstance(self._source, Mp3Source):
            self._source.complaints.clear()  # the error says enough
        self.close()


def load(source: str | os.PathLike[str] | BinaryIO) -> tuple[np.ndarray, int]:
    """Read a whole file, float32 (C, T), and its sample rate, Hz; see `AudioReader`."""
    with AudioReader(source) as reader:
        blocks = [np.empty((reader.channels, 0), dtype=np.float32), *reader.blocks(BLOCK)]
        return np.concatenate(blocks, axis=1), reader.sample_rate


def find_audio(
    folder: str | os.PathLike[str],
    recursive: bool = True,
    suffixes: Collection[str] = AUDIO_SUFFIXES,
) -> list[Path]:
    """The audio files in `folder`, by suffix: sorted paths relative to it, without hidden files.

    Raises:
        AudioError: a folder cannot be read.
    """
    try:
        return find_files(folder, suffixes, recursive=recursive)
    except OSError as error:
        raise AudioError(f"{error.filename}: {error.strerror}") from error


def open_source(
    file: BinaryIO, on_disk: bool, raw: RawFormat | None, stack: ExitStack, *, keep: bool = False
) -> Source:
    """The source for a file: an unbuffered regular file if `on_disk`, otherwise any stream."""
    stream = ByteStream(file, on_disk)
    if raw is not None:
        coding = raw_coding(raw.encoding)
        align = WIDTHS[coding] * raw.channels
        layout = Layout("RAW", coding, raw.sample_rate, raw.channels, align, 0, 0, False)
        return PcmSource(stream, layout, [(0, stream.size)] if on_disk else None)
    if not stream.peek(1):
        raise AudioError("not an audio file (it is empty)")
    skip_id3(stream)
    stream.mark()
    try:
        source = _open_known(stream, stack, keep)
    except UnknownCodec as error:
        stream.rewind()
        return _open_ffmpeg(stream, str(error), "ogg", stack, keep)
    if source is not None:
        stream.unmark()
        return source
    stream.rewind()
    if found := find_demuxer(stream.peek(16)):
        return _open_ffmpeg(stream, *found, stack, keep)
    if on_disk:
        return SoundSource(file, stack)
    if not stream.peek(8).startswith(_SPOOLED):
        raise AudioError("not an audio file that can be read (Format not recognised)")
    return open_source(_spool(stream, stack), True, None, stack, keep=keep)


def _open_known(stream: ByteStream, stack: ExitStack, keep: bool) -> Source | None:
    """The source for a format that is parsed in this package; None for others."""
    head = stream.peek(16)
    if head.startswith(b"OggS"):
        return OggSource(stream, stack, keep=keep)
    if head.startswith(b"fLaC"):
        return FlacSource(stream, stack, keep=keep)
    if head.startswith((b"RIFF", b"RF64", b"BW64", b"riff", b".snd", b"dns.", b"FORM", b"caff")):
        return _open_chunks(stream, stack, keep)
    if find_demuxer(head):
        return None
    for n in (LOOK, SEARCHED):  # little first, because a live pipe may not have more yet
        front = stream.peek(n)
        found = find_frames(front, at_end=len(front) < n)
        if found is not None and found <= SEARCH:
            return Mp3Source(stream, stream.size if stream.on_disk else None, stack, keep=keep)
    return None


def _open_chunks(stream: ByteStream, stack: ExitStack, keep: bool) -> Source | None:
    """The source for a container made of chunks; None if it is not parsed in this package."""
    for parse in (wav_layout, w64_layout, au_layout, aiff_layout, caf_layout):
        if (layout := parse(stream)) is not None:
            break
        stream.rewind()
        stream.mark()
    if layout is not None and layout.style in (RIFF, W64):
        check_limits(layout.sample_rate, layout.channels)
    if layout is not None and layout.coding is not None and not stream.on_disk:
        return PcmSource(stream, layout, None, keep=keep)
    if not stream.on_disk or layout is None:
        return None
    parts, cut = find_parts(stream, layout, keep=keep)
    if layout.coding is not None:
        source: Source = PcmSource(stream, layout, parts, keep=keep)
    elif layout.is_mpeg:
        n_bytes = sum(size for _, size in parts)
        source = Mp3Source(Part(stream, parts), n_bytes, stack, keep=keep)
        source.format = layout.format
    elif len(parts) > 1:
        raise AudioError("its audio is in several chunks, and is not linear PCM; convert it first")
    elif not layout.is_known and not layout.n_bytes and parts[0][1]:
        raise AudioError("its header does not say how long it is, and it is not linear PCM")
    else:
        source = _open_sound(stream, layout, stack, keep)
    source.cut = cut
    return source


def _open_sound(stream: ByteStream, layout: Layout, stack: ExitStack, keep: bool) -> Source:
    """A source through libsndfile or, if that fails, through ffmpeg, if it is installed."""
    try:
        return SoundSource(stream.file, stack)
    except AudioError as error:
        if shutil.which("ffmpeg") is None:
            raise
        try:
            return _open_ffmpeg(stream, layout.format, layout.format.lower(), stack, keep)
        except AudioError:
            raise error from None


def _open_ffmpeg(
    stream: ByteStream, name: str, demuxer: str, stack: ExitStack, keep: bool
) -> Source:
    file = stream.file if stream.on_disk else _spool(stream, stack)
    return FfmpegSource(file.fileno(), name, demuxer, stack, keep=keep)


def _spool(stream: ByteStream, stack: ExitStack) -> BinaryIO:
    """Copy a pipe to an unbuffered regular file."""
    spool = stack.enter_context(tempfile.TemporaryFile())
    while data := stream.some():
        if spool.tell() + len(data) > MAX_SPOOL:
            raise AudioError(
                f"more than {MAX_SPOOL >> 20} MiB through a pipe, in a format that cannot be read "
                "as it comes; save it to a file first"
            )
        with spooling():
            spool.write(data)
            spool.flush()
    return spool.raw
