"""Whatever libsndfile reads, and checks of what it does not notice."""

from __future__ import annotations

import io
import os
import struct
from contextlib import ExitStack

import numpy as np
import soundfile as sf

from .common import BLOCK, AudioError, check_length, reason
from .wav import is_placeholder

_MAX_OGG_PAGE = 65307  # bytes
_MP3_SLACK = 2 * 1152  # samples by which the lengths in sound MP3 files can be off
_SF_COUNT_MAX = 2**63 - 1  # libsndfile's word for a length that it does not know


class ForwardSoundFile(sf.SoundFile):
    """SoundFile without the seeking that it does around each read and write."""

    def seekable(self) -> bool:
        return False


class SoundSource:
    """Any regular file that libsndfile reads."""

    def __init__(self, file: io.FileIO, stack: ExitStack) -> None:
        self._file = file
        self._size = file.seek(0, os.SEEK_END)
        if _ends_early(file, self._size):
            raise AudioError("truncated: the file ends before its audio does")
        says_length = _mp3_says_length(file)
        file.seek(0)
        try:
            self._sound = ForwardSoundFile(file.fileno(), closefd=False)
        except sf.LibsndfileError as error:
            message = f"not an audio file that can be read ({reason(error)})"
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
            check_length(n_read, self._promised, self.sample_rate)
        elif self.format == "MP3" and self._size - self._file.tell() > BLOCK:
            # Without a length in an MP3, libsndfile guesses one from the first bit rate.
            raise AudioError(
                f"an MP3 that does not say how long it is, of which only {n_read} samples can be "
                "read; convert it to WAV or FLAC first"
            )


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
        return not is_placeholder(n_bytes) and start + n_bytes > size
    if head.startswith(b"riff"):
        return struct.unpack("<Q", head[16:])[0] > size
    if head.startswith(b"FORM"):
        file.seek(12)
        while len(chunk := file.read(8)) == 8:
            name, n_bytes = struct.unpack(">4sI", chunk)
            if name == b"SSND":
                return not is_placeholder(n_bytes) and file.tell() + n_bytes > size
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
