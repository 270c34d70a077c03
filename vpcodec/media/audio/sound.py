"""Other formats that libsndfile reads, from regular files."""

from __future__ import annotations

import io
from contextlib import ExitStack

import numpy as np
import soundfile as sf

from .common import AudioError, cut_short, reason
from .stream import ForwardSoundFile

_SF_COUNT_MAX = 2**63 - 1  # how libsndfile says that it does not know the length


class SoundSource:
    """A regular file in a format that only libsndfile parses."""

    def __init__(self, file: io.FileIO, stack: ExitStack) -> None:
        file.seek(0)
        try:
            self._sound = ForwardSoundFile(file.fileno(), closefd=False)
        except sf.LibsndfileError as error:
            message = f"not an audio file that can be read ({reason(error)})"
            raise AudioError(message) from error
        stack.callback(self._sound.close)
        self.sample_rate, self.channels = self._sound.samplerate, self._sound.channels
        self.format, self.subtype = self._sound.format, self._sound.subtype
        self.n_samples: int | None = self._sound.frames
        if self.n_samples == _SF_COUNT_MAX:
            self.n_samples = None
        self.cut: str | None = None

    def read(self, n: int) -> np.ndarray:
        """See `reader.Source`."""
        return self._sound.read(n, dtype="float32", always_2d=True)

    def check_end(self, n_read: int) -> None:
        """See `reader.Source`."""
        if self.n_samples is not None and n_read < self.n_samples:
            self.cut = cut_short(n_read, self.n_samples, self.sample_rate)
