"""Audio in and out: files, pipes, folders and resampling, in constant memory.

Samples are float32 arrays of shape (C, T), channels first, with full scale at -1 and 1.
libsndfile (through soundfile) reads and writes the formats, soxr resamples. Linear PCM in WAV is
handled here: libsndfile cannot stream it through pipes, takes a header of unknown size for an
empty file, and says nothing when a file ends before its header promises.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import numpy as np
import soundfile as sf
import soxr

from .files import atomic_output, find_files, naming

MAX_SAMPLE_RATE = 1_000_000  # Hz
MAX_CHANNELS = 255
MAX_RESAMPLING = 256  # the largest ratio between two sample rates

_FORMATS = {  # suffix: libsndfile's format, default subtype
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".oga": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".aiff": ("AIFF", "PCM_16"),
    ".aif": ("AIFF", "PCM_16"),
    ".au": ("AU", "PCM_16"),
    ".snd": ("AU", "PCM_16"),
    ".caf": ("CAF", "PCM_16"),
    ".w64": ("W64", "PCM_16"),
    ".rf64": ("RF64", "PCM_16"),
}
AUDIO_SUFFIXES = frozenset(_FORMATS)

_WIDTHS = {"PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}  # bytes
_WAV_CODINGS = {  # format tag, bytes per sample
    (1, 1): "PCM_U8",
    (1, 2): "PCM_16",
    (1, 3): "PCM_24",
    (1, 4): "PCM_32",
    (3, 4): "FLOAT",
    (3, 8): "DOUBLE",
}
_RAW_CODINGS = {"s16": "PCM_16", "s24": "PCM_24", "s32": "PCM_32", "f32": "FLOAT"}

_BLOCK = 65536  # samples per channel at a time, where no caller chooses
_MAX_HEADER = 65536  # bytes of a pipe in which WAV data must begin to be streamed
_MAX_RIFF = 0xFFFFFFFE  # bytes; a larger WAV becomes RF64
_MAX_OGG_PAGE = 65307  # bytes
_MP3_SLACK = 2 * 1152  # samples by which the lengths in sound MP3 files can be off
_MAX_VORBIS_RATE = 200_000  # Hz; libsndfile crashes on more
_SF_COUNT_MAX = 2**63 - 1  # libsndfile's word for a length that it does not know
_UNKNOWN = 0xFFFFFFFF  # the size in a WAV header that does not know it or cannot hold it


class AudioError(ValueError):
    """Audio that cannot be read or written: one line that names the file and the cause."""


@dataclass(frozen=True)
class RawFormat:
    """Headerless PCM: interleaved little-endian samples, `encoding` s16, s24, s32 or f32."""

    sample_rate: int
    channels: int = 1
    encoding: str = "s16"

    def __post_init__(self) -> None:
        _raw_coding(self.encoding)
        _check_limits(self.sample_rate, self.channels)


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
        with _naming(self.name), ExitStack() as stack:
            # Unbuffered, because libsndfile shares the descriptor and its position.
            file = stack.enter_context(open(source, "rb", 0)) if is_path else source
            self._source = _open_source(file, is_path and _is_regular(file), raw, stack)
            _check_limits(self._source.sample_rate, self._source.channels)
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
            with _naming(self.name):
                frames = self._read(n)
            if not len(frames):
                return
            self._done += len(frames)
            yield np.ascontiguousarray(frames.T)

    def _read(self, n: int) -> np.ndarray:
        try:
            frames = self._source.read(n)
        except sf.LibsndfileError as error:
            raise AudioError(f"damaged after {self._seconds(0)} ({_reason(error)})") from error
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


class AudioWriter:
    """Writes audio in blocks. A context manager: leaving it by an exception leaves no file.

    `target` is a path, whose suffix chooses the format, or a binary stream, which gets WAV of
    unknown size, flushed block by block, and is left open. `subtype` is one of libsndfile's names
    ("PCM_24"), 16 bits or the format's own by default. `raw` (s16, s24, s32 or f32) writes
    headerless PCM instead. A file takes its name only when complete; WAV past 4 GiB becomes RF64.

    Attributes:
        n_samples: written so far, per channel.
        clipped: how many values lay beyond [-1, 1] and were clipped (float subtypes keep them).

    Raises AudioError where the target cannot be written; BrokenPipeError passes through.
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
        is_path = isinstance(target, (str, os.PathLike))
        self.name = os.fspath(target) if is_path else name
        self.sample_rate, self.channels = sample_rate, channels
        self.n_samples = self.clipped = 0
        with _naming(self.name), ExitStack() as stack:
            _check_limits(sample_rate, channels)
            suffix = Path(target).suffix.lower() if is_path else ".wav"
            format, self.subtype = _choose_format(suffix, subtype, raw)
            self._file = stack.enter_context(atomic_output(target)) if is_path else target
            self._sound = None
            if format == "WAV" and self.subtype in _WIDTHS:
                stack.enter_context(self._wav(in_place=is_path and _is_regular(self._file)))
            elif format != "RAW":
                self._sound = stack.enter_context(self._sound_file(format))
            self._stack = stack.pop_all()

    @contextmanager
    def _wav(self, in_place: bool) -> Iterator[None]:
        """Write the header, and once more at the end where its place can be sought."""
        layout = self.subtype, self.sample_rate, self.channels
        self._write_bytes(_wav_header(*layout, 0 if in_place else None))
        yield
        if in_place:
            n_bytes = self.n_samples * self.channels * _WIDTHS[self.subtype]
            self._file.write(bytes(n_bytes % 2))  # a chunk has an even size
            self._file.seek(0)
            self._file.write(_wav_header(*layout, n_bytes))

    @contextmanager
    def _sound_file(self, format: str) -> Iterator[sf.SoundFile]:
        layout = self.sample_rate, self.channels, self.subtype
        refusal = f"{format} cannot hold {self.channels} channels at {self.sample_rate} Hz"
        if self.subtype == "VORBIS" and self.sample_rate > _MAX_VORBIS_RATE:
            raise AudioError(refusal)
        descriptor = self._file.fileno()
        try:
            sound = _ForwardSoundFile(descriptor, "w", *layout, format=format, closefd=False)
        except sf.LibsndfileError as error:
            raise AudioError(f"{refusal} ({_reason(error)})") from error
        with sound:
            yield sound
        if _is_regular(self._file):
            self._check_written(format)

    def _check_written(self, format: str) -> None:
        """Read the length back: libsndfile does not tell of a disk that fills up at the end."""
        with open(self._file.name, "rb", 0) as file, ExitStack() as stack:
            try:
                written = _open_source(file, True, None, stack).n_samples
            except AudioError:
                written = -1
        if written is not None and written < self.n_samples:
            raise AudioError(f"{self.n_samples} samples could not be written as {format}")

    def write(self, samples: np.ndarray) -> None:
        """Append float samples (C, n), rounded to the nearest value that the subtype can hold."""
        samples = np.asarray(samples, dtype=np.float32)
        if samples.ndim != 2 or len(samples) != self.channels:
            raise ValueError(f"samples of shape {samples.shape}, not ({self.channels}, n)")
        with _naming(self.name):
            if not np.isfinite(samples).all():
                raise AudioError("NaN or infinity cannot be written")
            if self.subtype not in ("FLOAT", "DOUBLE"):
                self.clipped += int(np.count_nonzero(np.abs(samples) > 1))
                samples = np.clip(samples, -1, 1)
            self._write(np.ascontiguousarray(samples.T))
        self.n_samples += samples.shape[1]

    def _write(self, frames: np.ndarray) -> None:
        if self._sound is None:
            self._write_bytes(_encode(frames, self.subtype))
            return
        if bits := re.fullmatch(r"(?:PCM|ALAC)_[SU]?(\d+)", self.subtype):
            frames = _to_int(frames, int(bits[1]))  # libsndfile would round some formats down
        for start in range(0, len(frames), _BLOCK):  # its Vorbis encoder crashes on millions
            self._sound.write(frames[start : start + _BLOCK])

    def _write_bytes(self, data: bytes) -> None:
        left = memoryview(data)
        while left:  # a stream without a buffer may take a part only
            left = left[self._file.write(left) :]
        self._file.flush()

    def close(self) -> None:
        """Finish the file and put it in its place."""
        with _naming(self.name):
            self._stack.close()

    def __enter__(self) -> AudioWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with _naming(self.name):
            self._stack.__exit__(kind, error, traceback)


class Resampler:
    """Changes the sample rate of a stream, block by block, with no delay and no loss of length.

    Blocks may have any size; the result does not depend on it. Equal rates pass through.
    Raises AudioError for rates that are not positive or more than MAX_RESAMPLING-fold apart.
    """

    def __init__(self, from_rate: int, to_rate: int, channels: int) -> None:
        low, high = sorted((from_rate, to_rate))
        if low < 1 or high > MAX_RESAMPLING * low:
            raise AudioError(f"cannot resample from {from_rate} Hz to {to_rate} Hz")
        self.from_rate, self.to_rate, self.channels = from_rate, to_rate, channels
        self._n_in = self._n_out = 0  # samples per channel
        self._stream = None
        if from_rate != to_rate:
            self._stream = soxr.ResampleStream(from_rate, to_rate, channels, dtype="float32")

    def process(self, samples: np.ndarray) -> np.ndarray:
        """Take float32 samples (C, n) at `from_rate`; give what is ready at `to_rate`, (C, m)."""
        out = self._resample(samples) if self._stream else samples
        self._n_in += samples.shape[1]
        self._n_out += out.shape[1]
        return out

    def flush(self, n_out: int | None = None) -> np.ndarray:
        """Give the rest, (C, m), so that all output together is `n_out` samples per channel.

        By default that is `resampled_length` of the input. Call it once, at the end. Raises
        ValueError where more than `n_out` samples were given already.
        """
        if n_out is None:
            n_out = resampled_length(self._n_in, self.from_rate, self.to_rate)
        if n_out < self._n_out:
            raise ValueError(f"{n_out} samples asked for, but {self._n_out} are out already")
        rest = np.zeros((self.channels, n_out - self._n_out), dtype=np.float32)
        if self._stream:
            # soxr rounds its length down or up; silence after the input makes it long enough.
            n_needed = resampled_length(n_out, self.to_rate, self.from_rate) + 1
            silence = np.zeros((self.channels, max(1, n_needed - self._n_in)), dtype=np.float32)
            out = self._resample(silence, last=True)[:, : rest.shape[1]]
            rest[:, : out.shape[1]] = out
        return rest

    def _resample(self, samples: np.ndarray, last: bool = False) -> np.ndarray:
        frames = np.ascontiguousarray(samples.T, dtype=np.float32)
        return self._stream.resample_chunk(frames, last).T


def resampled_length(n_samples: int, from_rate: int, to_rate: int) -> int:
    """The samples that `n_samples` at `from_rate` become at `to_rate`, rounded up."""
    return -(-n_samples * to_rate // from_rate)


def resample(samples: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Resample a whole float array, (T,) or (C, T), to float32 of `resampled_length(T)`."""
    channels = np.atleast_2d(np.asarray(samples, dtype=np.float32))
    resampler = Resampler(from_rate, to_rate, len(channels))
    out = np.concatenate([resampler.process(channels), resampler.flush()], axis=1)
    return out if np.ndim(samples) == 2 else out[0]


def load(source: str | os.PathLike[str] | BinaryIO) -> tuple[np.ndarray, int]:
    """Read a whole file: float32 (C, T) and its sample rate in Hz. Raises AudioError."""
    with AudioReader(source) as reader:
        blocks = [np.empty((reader.channels, 0), dtype=np.float32), *reader.blocks(_BLOCK)]
        return np.concatenate(blocks, axis=1), reader.sample_rate


def save(
    target: str | os.PathLike[str] | BinaryIO,
    samples: np.ndarray,
    sample_rate: int,
    *,
    subtype: str | None = None,
) -> None:
    """Write a whole float array, (T,) or (C, T). Raises AudioError."""
    samples = np.atleast_2d(samples)
    channels = len(samples)
    with AudioWriter(target, sample_rate=sample_rate, channels=channels, subtype=subtype) as writer:
        writer.write(samples)


def find_audio(folder: str | os.PathLike[str], recursive: bool = True) -> list[Path]:
    """The audio files in `folder`, by suffix: sorted paths relative to it, nothing hidden.

    Raises AudioError where a folder cannot be read.
    """
    try:
        return find_files(folder, AUDIO_SUFFIXES, recursive=recursive)
    except OSError as error:
        raise AudioError(f"{error.filename}: {error.strerror}") from error


class _Layout(NamedTuple):
    """Where linear PCM lies: the coding is None for other kinds of WAV."""

    format: str
    coding: str | None
    sample_rate: int
    channels: int
    align: int  # bytes per sample of all channels
    start: int  # first byte
    n_bytes: int | None  # None: up to the end


class _PcmSource:
    """Linear PCM from a file or a pipe, of which `head` has been read already."""

    def __init__(self, file: BinaryIO, head: bytes, layout: _Layout, n_bytes: int | None) -> None:
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
        return _decode(data[: n_read * self._align], self.subtype).reshape(-1, self.channels)

    def check_end(self, n_read: int) -> None:
        """Raise AudioError where `n_read` samples cannot be all."""
        if self.n_samples is not None:
            _check_length(n_read, self.n_samples, self.sample_rate)
        while self._file.read(_BLOCK):  # so that what writes the pipe can finish
            pass


class _ForwardSoundFile(sf.SoundFile):
    """SoundFile without the seeking that it does around each read and write."""

    def seekable(self) -> bool:
        return False


class _SoundSource:
    """Any regular file that libsndfile reads."""

    def __init__(self, file: io.FileIO, stack: ExitStack) -> None:
        self._file = file
        self._size = file.seek(0, os.SEEK_END)
        if _ends_early(file, self._size):
            raise AudioError("truncated: the file ends before its audio does")
        says_length = _mp3_says_length(file)
        file.seek(0)
        try:
            self._sound = _ForwardSoundFile(file.fileno(), closefd=False)
        except sf.LibsndfileError as error:
            message = f"not an audio file that can be read ({_reason(error)})"
            raise AudioError(message) from error
        stack.callback(self._sound.close)
        self.sample_rate, self.channels = self._sound.samplerate, self._sound.channels
        self.format, self.subtype = self._sound.format, self._sound.subtype
        self.n_samples = self._promised = self._sound.frames
        if self.format == "MP3":
            self.n_samples = None
            self._promised = self._promised - _MP3_SLACK if says_length else None
        elif self.n_samples == _SF_COUNT_MAX:
            self.n_samples = self._promised = None

    def read(self, n: int) -> np.ndarray:
        """The next samples, (up to n, C); none at the end."""
        return self._sound.read(n, dtype="float32", always_2d=True)

    def check_end(self, n_read: int) -> None:
        """Raise AudioError where `n_read` samples cannot be all."""
        if self._promised is not None:
            _check_length(n_read, self._promised, self.sample_rate)
        elif self.format == "MP3" and self._size - self._file.tell() > _BLOCK:
            # Without a length in an MP3, libsndfile guesses one from the first bit rate.
            raise AudioError(
                f"an MP3 that does not say how long it is, of which only {n_read} samples can be "
                "read; convert it to WAV or FLAC first"
            )


def _open_source(
    file: BinaryIO, on_disk: bool, raw: RawFormat | None, stack: ExitStack
) -> _PcmSource | _SoundSource:
    """What reads `file`: a regular file without a buffer where `on_disk`, else any stream."""
    head, layout = b"", None
    if raw is not None:
        coding = _raw_coding(raw.encoding)
        align = _WIDTHS[coding] * raw.channels
        layout = _Layout("RAW", coding, raw.sample_rate, raw.channels, align, 0, None)
    elif not on_disk:
        head, layout = _peek(file)
        if layout is None:
            spool = stack.enter_context(tempfile.TemporaryFile())
            spool.write(head)
            shutil.copyfileobj(file, spool)
            spool.flush()
            file, on_disk = spool.raw, True
    if not on_disk:
        return _PcmSource(file, head[layout.start :], layout, layout.n_bytes)

    if layout is None:
        file.seek(0)
        if not file.read(1):
            raise AudioError("not an audio file (it is empty)")
        file.seek(0)
        try:
            layout = _wav_layout(file)
        except EOFError as error:
            raise AudioError("not an audio file (its header is not complete)") from error
    if layout is None:
        return _SoundSource(file, stack)
    held = max(0, file.seek(0, os.SEEK_END) - layout.start)
    n_bytes = held if layout.n_bytes is None else layout.n_bytes
    if held // layout.align < n_bytes // layout.align:
        raise AudioError(f"truncated: {held} bytes of audio where its header promises {n_bytes}")
    if layout.coding is None:
        return _SoundSource(file, stack)
    file.seek(layout.start)
    return _PcmSource(file, b"", layout, n_bytes)


def _peek(stream: BinaryIO) -> tuple[bytes, _Layout | None]:
    """Read a pipe up to its first samples: those bytes, and the layout where it is linear WAV."""
    head = b""
    while len(head) < _MAX_HEADER and (more := stream.read(1024)):
        head += more
        with suppress(EOFError):
            layout = _wav_layout(io.BytesIO(head))
            return head, layout if layout and layout.coding else None
    return head, None


def _wav_layout(file: BinaryIO) -> _Layout | None:
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
    is_empty = n_bytes == 0 and riff_size + 8 > start and not _is_placeholder(riff_size)
    known = is_empty or not _is_placeholder(n_bytes)

    tag, channels, sample_rate, _, align, bits = struct.unpack("<HHIIHH", fmt[:16])
    if tag == 0xFFFE:  # WAVE_FORMAT_EXTENSIBLE: the tag opens its GUID
        tag = int.from_bytes(fmt[24:26], "little")
    width = (bits + 7) // 8
    coding = _WAV_CODINGS.get((tag, width)) if align == width * channels else None
    if not known:
        n_bytes = None
    format = "WAV" if kind == b"RIFF" else "RF64"
    return _Layout(format, coding, sample_rate, channels, max(1, align), start, n_bytes)


def _is_placeholder(size: int) -> bool:
    """Whether a chunk size is one that programs write where they cannot know it."""
    return (
        size == 0
        or 0x7F000000 <= size <= 0x80000000
        or 0xFFFF0000 <= size <= 0xFFFFFFFF
        or size >= 1 << 63
    )


def _wav_header(coding: str, sample_rate: int, channels: int, n_bytes: int | None) -> bytes:
    """A WAV header for data of `n_bytes`, as long for 0 as for any number; None: for a pipe."""
    width = _WIDTHS[coding]
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
    if riff_size <= _MAX_RIFF:
        start = struct.pack("<4sI4s4sI28x", b"RIFF", riff_size, b"WAVE", b"JUNK", 28)
        return start + fmt + struct.pack("<4sI", b"data", n_bytes)
    sizes = riff_size, n_bytes, n_bytes // align, 0
    start = struct.pack("<4sI4s4sIQQQI", b"RF64", _UNKNOWN, b"WAVE", b"ds64", 28, *sizes)
    return start + fmt + struct.pack("<4sI", b"data", _UNKNOWN)


def _ends_early(file: io.FileIO, size: int) -> bool:
    """Whether a file of `size` bytes has less than its AIFF, AU, W64 or Ogg structure says."""
    file.seek(0)
    head = file.read(24).ljust(24, b"\0")
    if head.startswith(b"OggS"):
        file.seek(max(0, size - _MAX_OGG_PAGE))
        tail = file.read()
        page = tail[tail.rfind(b"OggS") :]
        return len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])
    if head.startswith(b".snd"):
        start, n_bytes = struct.unpack(">II", head[4:12])
        return not _is_placeholder(n_bytes) and start + n_bytes > size
    if head.startswith(b"riff"):
        return struct.unpack("<Q", head[16:])[0] > size
    if head.startswith(b"FORM"):
        file.seek(12)
        while len(chunk := file.read(8)) == 8:
            name, n_bytes = struct.unpack(">4sI", chunk)
            if name == b"SSND":
                return not _is_placeholder(n_bytes) and file.tell() + n_bytes > size
            file.seek(n_bytes + n_bytes % 2, os.SEEK_CUR)
    return False


def _mp3_says_length(file: io.FileIO) -> bool:
    """Whether the first frame of an MP3, behind any ID3 tag, holds the number of frames."""
    file.seek(0)
    head = file.read(10)
    if head.startswith(b"ID3"):
        size = sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=False))
        file.seek(10 + size)
    head += file.read(64)
    return any(tag in head for tag in (b"Xing", b"Info", b"VBRI"))


def _check_length(n_read: int, n_promised: int, sample_rate: int) -> None:
    if n_read < n_promised:
        ends, promised = n_read / sample_rate, n_promised / sample_rate
        raise AudioError(f"truncated: it ends at {ends:.2f} s of {promised:.2f} s")


def _check_limits(sample_rate: int, channels: int) -> None:
    if not 1 <= sample_rate <= MAX_SAMPLE_RATE:
        raise AudioError(f"a sample rate of {sample_rate} Hz is not in 1 to {MAX_SAMPLE_RATE}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(f"{channels} channels are not in 1 to {MAX_CHANNELS}")


def _raw_coding(encoding: str) -> str:
    if encoding not in _RAW_CODINGS:
        raise AudioError(f"raw encoding {encoding!r} is not one of {', '.join(_RAW_CODINGS)}")
    return _RAW_CODINGS[encoding]


def _choose_format(suffix: str, subtype: str | None, raw: str | None) -> tuple[str, str]:
    """libsndfile's names for the format and the subtype of an output."""
    if raw is not None:
        return "RAW", _raw_coding(raw)
    if suffix not in _FORMATS:
        known = " ".join(_FORMATS)
        raise AudioError(f"the suffix {suffix!r} stands for no known format; choose from {known}")
    format, default = _FORMATS[suffix]
    subtype = subtype.upper() if subtype else default
    if not sf.check_format(format, subtype):
        known = " ".join(sf.available_subtypes(format))
        raise AudioError(f"{format} has no subtype {subtype}; choose from {known}")
    return format, subtype


def _decode(data: bytes | bytearray, coding: str) -> np.ndarray:
    """Little-endian bytes to float32 (n,)."""
    if coding in ("FLOAT", "DOUBLE"):
        with np.errstate(over="ignore"):
            return np.frombuffer(data, f"<f{_WIDTHS[coding]}").astype(np.float32)
    width = _WIDTHS[coding]
    wide = np.zeros((len(data) // width, 4), dtype=np.uint8)
    wide[:, 4 - width :] = np.frombuffer(data, np.uint8).reshape(-1, width)
    if coding == "PCM_U8":
        wide[:, 3] ^= 0x80
    return wide.view("<i4")[:, 0].astype(np.float32) * np.float32(2**-31)


def _encode(frames: np.ndarray, coding: str) -> bytes:
    """Float32 (n, C) to little-endian bytes, interleaved."""
    if coding in ("FLOAT", "DOUBLE"):
        return frames.astype(f"<f{_WIDTHS[coding]}").tobytes()
    width = _WIDTHS[coding]
    wide = _to_int(frames, 8 * width).astype("<i4").reshape(-1, 1).view(np.uint8)
    if coding == "PCM_U8":
        wide[:, 3] ^= 0x80
    return wide[:, 4 - width :].tobytes()


def _to_int(samples: np.ndarray, bits: int) -> np.ndarray:
    """Float samples to the nearest of `bits` bits, at the upper end of an int32."""
    full = 2 ** (bits - 1)
    rounded = np.clip(np.rint(samples.astype(np.float64) * full), -full, full - 1)
    return rounded.astype(np.int32) << (32 - bits)


def _is_regular(file: BinaryIO) -> bool:
    return stat.S_ISREG(os.fstat(file.fileno()).st_mode)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """`files.naming` for AudioErrors, of libsndfile's errors too."""
    with naming(name, AudioError):
        try:
            yield
        except sf.LibsndfileError as error:
            raise AudioError(_reason(error)) from error


def _reason(error: sf.LibsndfileError) -> str:
    return error.error_string.removeprefix("Error : ").rstrip(".")
