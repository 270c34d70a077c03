"""Resampling with soxr."""

from __future__ import annotations

import numpy as np
import soxr

from ...checks import check_rate
from ...threads import compiled_code
from .common import AudioError

MAX_RESAMPLING = 256  # the largest ratio between two sample rates
MAX_WORK = 4096  # the largest ratio times channels


class Resampler:
    """Resamples a stream block by block, without delay or change of duration.

    The result does not depend on the size of blocks. Equal rates pass through.

    Args:
        from_rate: sample rate of the input, Hz.
        to_rate: sample rate of the output, Hz.
        channels: number of channels.

    Raises:
        AudioError: the rates are not positive or differ by more than a factor MAX_RESAMPLING, or
            the factor times the channels is more than MAX_WORK.
    """

    def __init__(self, from_rate: int, to_rate: int, channels: int) -> None:
        from_rate, to_rate = check_rate(from_rate), check_rate(to_rate)
        low, high = sorted((from_rate, to_rate))
        if low < 1 or high > MAX_RESAMPLING * low:
            raise AudioError(f"cannot resample from {from_rate} Hz to {to_rate} Hz")
        if high * channels > MAX_WORK * low:
            raise AudioError(
                f"cannot resample {channels} channels at once from {from_rate} Hz to {to_rate} Hz"
            )
        self.from_rate, self.to_rate, self.channels = from_rate, to_rate, channels
        self._n_in = self._n_out = 0  # samples per channel
        self._stream: soxr.ResampleStream | None = None
        if from_rate != to_rate:
            self._stream = soxr.ResampleStream(from_rate, to_rate, channels, dtype="float32")

    def process(self, samples: np.ndarray) -> np.ndarray:
        """(C, n) float32 samples at `from_rate` -> (C, m) samples at `to_rate` that are ready."""
        out = samples if self._stream is None else self._resample(self._stream, samples)
        self._n_in += samples.shape[1]
        self._n_out += out.shape[1]
        return out

    def flush(self, n_out: int | None = None) -> np.ndarray:
        """The remaining samples, (C, m). Call it once, at the end.

        Args:
            n_out: total output, samples per channel; None: `resampled_length` of the input.

        Raises:
            ValueError: more than `n_out` samples were already returned.
        """
        if n_out is None:
            n_out = resampled_length(self._n_in, self.from_rate, self.to_rate)
        if n_out < self._n_out:
            raise ValueError(f"{n_out} samples asked for, but {self._n_out} are out already")
        rest = np.zeros((self.channels, n_out - self._n_out), dtype=np.float32)
        if self._stream is not None:
            # soxr rounds the length down or up; silence after the input makes it long enough.
            n_needed = resampled_length(n_out, self.to_rate, self.from_rate) + 1
            silence = np.zeros((self.channels, max(1, n_needed - self._n_in)), dtype=np.float32)
            out = self._resample(self._stream, silence, last=True)[:, : rest.shape[1]]
            rest[:, : out.shape[1]] = out
        return rest

    @staticmethod
    def _resample(
        stream: soxr.ResampleStream, samples: np.ndarray, last: bool = False
    ) -> np.ndarray:
        frames = np.ascontiguousarray(samples.T, dtype=np.float32)
        with compiled_code():
            return stream.resample_chunk(frames, last).T


def resampled_length(n_samples: int, from_rate: int, to_rate: int) -> int:
    """Number of samples after resampling `n_samples`, rounded up."""
    from_rate, to_rate = check_rate(from_rate), check_rate(to_rate)  # ints: products may be large
    return -(-n_samples * to_rate // from_rate)


def resample(samples: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Resample a whole float array, (T,) or (C, T), to float32 of length `resampled_length(T)`."""
    channels = np.atleast_2d(np.asarray(samples, dtype=np.float32))
    resampler = Resampler(from_rate, to_rate, len(channels))
    out = np.concatenate([resampler.process(channels), resampler.flush()], axis=1)
    return out if np.ndim(samples) == 2 else out[0]
