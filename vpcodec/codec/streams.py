"""Streams: audio to tokens and back, piece by piece, with the result of coding it at once.

Native models are causal and continue from their state.

Threads may share a codec if each has its own streams. A stream that another thread is using raises
RuntimeError and is not affected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..backends import Backend, DecoderStream, EncoderStream
from ..checks import check_channels, check_samples, check_tokens
from ..config import AudioConfig, AudioModelConfig
from ..media.audio import Resampler
from ..threads import Exclusive, alone

X = TypeVar("X", bound=np.generic)
Y = TypeVar("Y", bound=np.generic)

Predict = Callable[[NDArray[np.int64], int], NDArray[np.int64]]

HOLD_SECONDS, FADE_SECONDS = 0.06, 0.04  # of the last sound, where tokens are lost
PREDICT_FROM = 64  # newest frames, from which lost ones are predicted
CHUNK_SECONDS = 0.75  # audio that goes through the graphs at once; bounds memory


def repeat_last(tokens: NDArray[np.int64], n_frames: int) -> NDArray[np.int64]:
    """(C, N) tokens -> (C, n_frames), all as the last one; N > 0."""
    return np.repeat(tokens[:, -1:], n_frames, 1)


def chunk_frames(config: AudioModelConfig) -> int:
    """Frames that go through a graph at a time, of all channels together."""
    return max(1, round(CHUNK_SECONDS * config.frame_rate))


class CausalEncoderStream(Exclusive):
    """Audio in pieces of any length to tokens: the tokens that `encode` gives for the whole.

    Args:
        config: of a native model.
        backend: runs the model.
        channels: of the audio; they are coded separately.
        chunk: frames that go through the graph at a time; None: `chunk_frames`.
    """

    def __init__(
        self, config: AudioConfig, backend: Backend, channels: int, *, chunk: int | None = None
    ) -> None:
        super().__init__()
        self._hop = config.hop_length
        self._encode = backend.encode
        self._channels = channels
        self._chunk = chunk or chunk_frames(config)
        self._reset()

    def _reset(self) -> None:
        self._state: Any = None
        self._rest = np.zeros((self._channels, 0), np.float32)

    @alone
    def push(self, samples: NDArray[Any]) -> NDArray[np.int64]:
        """Encode the next samples.

        Args:
            samples: (T,) or (C, T) float (or int16 or int32) at the model's rate; T may be 0.

        Returns:
            (C, n) int64 tokens of the frames that are now complete; n may be 0.

        Raises:
            ValueError: wrong shape, dtype or number of channels, or non-finite samples.
        """
        samples = check_samples(samples)
        check_channels(samples, self._channels)
        samples = np.concatenate([self._rest, samples], 1)
        whole = samples.shape[1] // self._hop * self._hop
        self._rest = samples[:, whole:]
        empty = np.zeros((self._channels, 0), np.int64)
        tokens, self._state = _run(
            self._encode, self._chunk, samples[:, :whole], self._hop, self._state, empty
        )
        return tokens

    @alone
    def flush(self) -> NDArray[np.int64]:
        """End the audio.

        Returns:
            (C, 0 or 1) int64: the token of the last, incomplete frame, if there is one. The stream
            can be used for other audio afterwards.
        """
        missing = -self._rest.shape[1] % self._hop
        tokens = self.push(np.zeros((self._channels, missing), np.float32))
        self._reset()
        return tokens


class CausalDecoderStream(Exclusive):
    """Tokens in pieces of any length to audio: the samples that `decode` gives for the whole.

    The decoder is late: the samples of its delay are dropped, and at the end the last token is
    repeated until all samples are out.

    Lost tokens are concealed by predicted ones, which keeps the state close to what it would have
    been; the sound fades out after `HOLD_SECONDS`. A loss that has faded out costs no computing,
    and after it the decoder begins anew, with the noise of its place.

    Args:
        config: of a native model.
        backend: runs the model.
        channels: of the audio; they are coded separately.
        first_frame: the number of the first token in its recording.
        predict: tokens (C, N), N > 0, and n -> (C, n) that may follow, where some are lost.
        chunk: frames that go through the graph at a time; None: `chunk_frames`.
    """

    def __init__(
        self,
        config: AudioConfig,
        backend: Backend,
        channels: int,
        first_frame: int = 0,
        *,
        predict: Predict = repeat_last,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self._config = config
        self._backend = backend
        self._channels = channels
        self._predict = predict
        self._chunk = chunk or chunk_frames(config)
        self._reset(first_frame)

    def _reset(self, first_frame: int = 0) -> None:
        self._state: Any = None
        self._frame = first_frame  # of the next token
        self._late = self._config.decoder_delay * self._config.hop_length
        self._newest = np.zeros((self._channels, 0), np.int64)  # tokens, predicted ones too
        self._lost = 0  # frames in a row
        self._gain = 1.0  # at the last sample that is out
        self._goals = np.ones(self._config.decoder_delay)  # gains at the ends of frames not yet out

    @alone
    def push(self, tokens: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Decode the next tokens.

        Args:
            tokens: (N,) or (C, N) integers in [0, codebook_size); N may be 0.

        Returns:
            (C, n) float32 samples that are now final; n may be 0.

        Raises:
            ValueError: wrong shape, dtype or number of channels, or a token out of range.
        """
        tokens = check_tokens(tokens, "(C, N)", self._config.codebook_size)
        check_channels(tokens, self._channels)
        if tokens.shape[1]:
            self._newest = np.concatenate([self._newest, tokens], 1)[:, -PREDICT_FROM:]
            self._lost = 0
        return self._advance(tokens, np.ones(tokens.shape[1]))

    @alone
    def push_lost(self, n_frames: int) -> NDArray[np.float32]:
        """Conceal tokens that did not arrive.

        Args:
            n_frames: how many per channel.

        Returns:
            (C, n) float32, as many samples as `push` gives for as many tokens. The sound goes on as
            the model's entropy tables predict, or as it was if it has none, and fades out from 60
            to 100 ms after the beginning of the loss.

        Raises:
            ValueError: a negative number.
        """
        if n_frames < 0:
            raise ValueError(f"n_frames must not be negative, got {n_frames}")
        seconds = (self._lost + 1 + np.arange(n_frames)) / self._config.frame_rate
        goals = np.clip(1 - (seconds - HOLD_SECONDS) / FADE_SECONDS, 0, 1)
        audible = round((HOLD_SECONDS + FADE_SECONDS) * self._config.frame_rate)
        audible += self._config.decoder_delay
        heard = max(0, min(n_frames, audible - self._lost))
        self._lost += n_frames
        if not self._newest.shape[1]:  # nothing has arrived yet
            return self._advance(None, np.zeros(n_frames))
        predicted = self._predict(self._newest, heard)
        self._newest = np.concatenate([self._newest, predicted], 1)
        concealed = self._advance(predicted, goals[:heard])
        return np.concatenate([concealed, self._advance(None, goals[heard:])], 1)

    @alone
    def flush(self, tokens: NDArray[np.integer[Any]] | None = None) -> NDArray[np.float32]:
        """End the tokens.

        Args:
            tokens: the last ones, as for `push`; passing them here saves a run of the graph.

        Returns:
            (C, n) float32: the samples of these tokens and those held back for the decoder's delay.
            The stream can be used for other tokens afterwards.
        """
        if tokens is None:
            tokens = self._newest[:, :0]
        tokens = check_tokens(tokens, "(C, N)", self._config.codebook_size)
        check_channels(tokens, self._channels)
        delay = self._config.decoder_delay
        if self._lost and not tokens.shape[1]:
            samples = self.push_lost(delay)
        else:
            last = np.concatenate([self._newest, tokens], 1)[:, -1:]
            samples = self.push(np.concatenate([tokens, np.repeat(last, delay, 1)], 1))
        self._reset()
        return samples

    def _advance(
        self, tokens: NDArray[np.int64] | None, goals: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        """The samples that come out while these tokens go in.

        Args:
            tokens: (C, n) int64; None: silence, and the state is forgotten.
            goals: (n,) gains at the ends of the frames.
        """
        n, hop = len(goals), self._config.hop_length
        samples = np.zeros((self._channels, 0 if tokens is not None else n * hop), np.float32)
        if tokens is not None:
            samples, self._state = _run(self._decode, self._chunk, tokens, 1, self._state, samples)
        elif n:
            self._state = None
        self._frame += n
        goals = np.concatenate([self._goals, goals])
        goals, self._goals = goals[:n], goals[n:]
        if n and not (self._gain == 1 and (goals == 1).all()):
            ends = np.arange(n + 1) * hop
            gain = np.interp(np.arange(1, n * hop + 1), ends, [self._gain, *goals])
            samples = samples * gain.astype(np.float32)
            self._gain = float(goals[-1])
        late = min(self._late, samples.shape[1])
        self._late -= late
        return samples[:, late:]

    def _decode(self, tokens: NDArray[np.int64], state: Any) -> tuple[NDArray[np.float32], Any]:
        return self._backend.decode(tokens, state, self._frame)


class ResampledEncoderStream(Exclusive):
    """An encoder stream for audio at another sample rate than the model's.

    Args:
        stream: takes the model's rate; fresh.
        sample_rate: of the audio, Hz.
        model_rate: of the model, Hz.
        channels: of the audio.
    """

    def __init__(
        self, stream: EncoderStream, sample_rate: int, model_rate: int, channels: int
    ) -> None:
        super().__init__()
        self._stream = stream
        self._rates = sample_rate, model_rate
        self._channels = channels
        self._resampler = Resampler(*self._rates, channels)

    @alone
    def push(self, samples: NDArray[Any]) -> NDArray[np.int64]:
        """Encode the next samples, at the stream's rate; see `CausalEncoderStream.push`."""
        samples = check_samples(samples)
        check_channels(samples, self._channels)
        return self._stream.push(self._resampler.process(samples))

    @alone
    def flush(self) -> NDArray[np.int64]:
        """End the audio: the remaining tokens. The stream can be used for other audio then."""
        last = self._stream.push(self._resampler.flush())
        self._resampler = Resampler(*self._rates, self._channels)
        return np.concatenate([last, self._stream.flush()], 1)


class ResampledDecoderStream(Exclusive):
    """A decoder stream whose audio comes out at another sample rate than the model's.

    Args:
        stream: gives the model's rate; fresh.
        model_rate: of the model, Hz.
        sample_rate: of the audio, Hz.
        channels: of the audio.
    """

    def __init__(
        self, stream: DecoderStream, model_rate: int, sample_rate: int, channels: int
    ) -> None:
        super().__init__()
        self._stream = stream
        self._rates = model_rate, sample_rate
        self._channels = channels
        self._resampler = Resampler(*self._rates, channels)

    @alone
    def push(self, tokens: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Decode the next tokens; see `CausalDecoderStream.push`."""
        return self._resampler.process(self._stream.push(tokens))

    @alone
    def push_lost(self, n_frames: int) -> NDArray[np.float32]:
        """Conceal tokens that did not arrive; see `CausalDecoderStream.push_lost`."""
        return self._resampler.process(self._stream.push_lost(n_frames))

    @alone
    def flush(self, tokens: NDArray[np.integer[Any]] | None = None) -> NDArray[np.float32]:
        """End the tokens: the remaining samples. The stream can be used for other tokens then."""
        last = self._resampler.process(self._stream.flush(tokens))
        samples = np.concatenate([last, self._resampler.flush()], 1)
        self._resampler = Resampler(*self._rates, self._channels)
        return samples


def _run(
    graph: Callable[[NDArray[X], Any], tuple[NDArray[Y], Any]],
    chunk: int,
    x: NDArray[X],
    column: int,
    state: Any,
    empty: NDArray[Y],
) -> tuple[NDArray[Y], Any]:
    """Run x (C, N * column) through a stateful graph in equal parts of few frames.

    Equal, because a part of one frame takes as long as twenty frames in a longer part.
    """
    frames = x.shape[1] // column
    if not frames:
        return empty, state
    runs = max(1, round(frames * len(x) / chunk))
    step = column * -(-frames // runs)
    parts = [empty]
    for start in range(0, x.shape[1], step):
        part, state = graph(np.ascontiguousarray(x[:, start : start + step]), state)
        parts.append(part)
    return np.concatenate(parts, 1), state
