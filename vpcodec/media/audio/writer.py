"""Writing audio to files, which appear complete or not at all, and to pipes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import soundfile as sf

from ...checks import check_rate
from ..files import atomic_output, is_device
from .common import (
    BLOCK,
    FORMATS,
    WIDTHS,
    AudioError,
    check_limits,
    choose_format,
    is_regular,
    naming,
    reason,
)
from .reader import open_source
from .stream import ForwardSoundFile
from .wav import encode, to_int, wav_header

MAX_VORBIS_RATE = 200_000  # Hz; libsndfile crashes on more
ROOM = 2**22  # bytes that do not fit on a full disk


class AudioWriter:
    """Writes audio in blocks. A context manager: after an exception, there is no file.

    A file appears only when it is complete; WAV of more than 4 GiB becomes RF64.

    Args:
        target: a path, whose suffix selects the format, or a binary stream, which is left open.
            Streams, and devices without a suffix, get WAV of unknown size, flushed block by block.
        sample_rate: sample rate, Hz.
        channels: number of channels.
        subtype: libsndfile's name, such as "PCM_24"; None: 16 bits, or the default of the format.
        raw: write headerless PCM instead: s16, s24, s32 or f32.
        name: name of a stream in messages.

    Attributes:
        n_samples: samples per channel written so far.
        clipped: number of values outside [-1, 1] that were clipped (float subtypes keep them).

    Raises:
        AudioError: the target cannot be written.
        BrokenPipeError: the reader of the stream has closed it.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | BinaryIO,
        *,
        sample_rate: int,
        channels: int,
        subtype: str | None = None,
        raw: str | None = None,
        name: str = "stdout",
    ) -> None:
        path = target if isinstance(target, (str, os.PathLike)) else None
        self.name = name if path is None else os.fspath(path)
        self.sample_rate, self.channels = check_rate(sample_rate), channels
        self.n_samples = self.clipped = 0
        with naming(self.name), ExitStack() as stack:
            check_limits(self.sample_rate, channels)
            is_stream = path is None or is_device(path)
            suffix = ".wav" if path is None else Path(path).suffix.lower()
            if is_stream and suffix not in FORMATS:
                suffix = ".wav"
            format, self.subtype = choose_format(suffix, subtype, raw)
            if isinstance(target, (str, os.PathLike)):
                target = stack.enter_context(atomic_output(target))
            self._file: BinaryIO = target
            self._sound: sf.SoundFile | None = None
            if format == "WAV" and self.subtype in WIDTHS:
                stack.enter_context(self._wav(in_place=not is_stream))
            elif format != "RAW":
                self._sound = stack.enter_context(self._sound_file(format))
            self._stack = stack.pop_all()

    @contextmanager
    def _wav(self, in_place: bool) -> Iterator[None]:
        """Write the header, and rewrite it at the end if the file is seekable."""
        layout = self.subtype, self.sample_rate, self.channels
        self._write_bytes(wav_header(*layout, 0 if in_place else None))
        yield
        if in_place:
            n_bytes = self.n_samples * self.channels * WIDTHS[self.subtype]
            self._file.write(bytes(n_bytes % 2))  # a chunk has an even size
            self._file.seek(0)
            self._file.write(wav_header(*layout, n_bytes))

    @contextmanager
    def _sound_file(self, format: str) -> Iterator[sf.SoundFile]:
        layout = self.sample_rate, self.channels, self.subtype
        refusal = f"{format} cannot hold {self.channels} channels at {self.sample_rate} Hz"
        if self.subtype == "VORBIS" and self.sample_rate > MAX_VORBIS_RATE:
            raise AudioError(refusal)
        descriptor = self._file.fileno()
        try:
            sound = ForwardSoundFile(descriptor, "w", *layout, format=format, closefd=False)
        except sf.LibsndfileError as error:
            raise AudioError(f"{refusal} ({reason(error)})") from error
        try:
            yield sound
        except BaseException:
            with suppress(sf.LibsndfileError):  # writing may fail again
                sound.close()
            raise
        try:
            sound.close()
        except sf.LibsndfileError:
            self._raise_system_error()
            raise
        if is_regular(self._file):
            self._check_written(format)

    def _check_written(self, format: str) -> None:
        """Read the length back: libsndfile does not report a disk that fills up at the end."""
        with open(self._file.name, "rb", 0) as file, ExitStack() as stack:
            try:
                written = open_source(file, True, None, stack).n_samples
            except AudioError:
                written = -1
        if written is not None and written < self.n_samples:
            self._raise_system_error()
            raise AudioError(f"{self.n_samples} samples could not be written as {format}")

    def _raise_system_error(self) -> None:
        """Write more to provoke the error of the system, because libsndfile does not tell it.

        The file could not be written, so its contents do not matter any more.
        """
        if is_regular(self._file):
            self._file.seek(0, os.SEEK_END)
            self._write_bytes(bytes(ROOM))
            os.fsync(self._file.fileno())

    def write(self, samples: np.ndarray) -> None:
        """Append float samples (C, n), rounded to the nearest value that the subtype can hold."""
        samples = np.asarray(samples, dtype=np.float32)
        if samples.ndim != 2 or len(samples) != self.channels:
            raise ValueError(f"samples of shape {samples.shape}, not ({self.channels}, n)")
        with naming(self.name):
            if not np.isfinite(samples).all():
                raise AudioError("NaN or infinity cannot be written")
            if self.subtype not in ("FLOAT", "DOUBLE"):
                self.clipped += int(np.count_nonzero(np.abs(samples) > 1))
                samples = np.clip(samples, -1, 1)
            self._write(np.ascontiguousarray(samples.T))
        self.n_samples += samples.shape[1]

    def _write(self, frames: np.ndarray) -> None:
        if self._sound is None:
            self._write_bytes(encode(frames, self.subtype))
            return
        if bits := re.fullmatch(r"(?:PCM|ALAC)_[SU]?(\d+)", self.subtype):
            frames = to_int(frames, int(bits[1]))  # libsndfile would round some formats down
        try:
            for start in range(
                0, len(frames), BLOCK
            ):  # its Vorbis encoder crashes on millions of samples
                self._sound.write(frames[start : start + BLOCK])
        except sf.LibsndfileError:
            self._raise_system_error()
            raise

    def _write_bytes(self, data: bytes) -> None:
        left = memoryview(data)
        while left:  # an unbuffered stream may accept only a part
            left = left[self._file.write(left) :]
        self._file.flush()

    def close(self) -> None:
        """Finish the file and move it into place."""
        with naming(self.name):
            self._stack.close()

    def __enter__(self) -> AudioWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with naming(self.name):
            self._stack.__exit__(kind, error, traceback)


def save(
    target: str | os.PathLike[str] | BinaryIO,
    samples: np.ndarray,
    sample_rate: int,
    *,
    subtype: str | None = None,
) -> None:
    """Write a whole float array, (T,) or (C, T); see `AudioWriter`."""
    samples = np.atleast_2d(samples)
    channels = len(samples)
    with AudioWriter(target, sample_rate=sample_rate, channels=channels, subtype=subtype) as writer:
        writer.write(samples)
