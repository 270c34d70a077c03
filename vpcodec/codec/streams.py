"""Streams: audio to tokens and back, piece by piece, with the result of coding it at once.

Native models are causal and continue from their state.

Threads may share a codec if each has its own streams. A stream that another thread is using raises
RuntimeError and is not affected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import check_channels, check_samples, check_tokens
from ..threads import Exclusive, alone

if TYPE_CHECKING:
    from .audio import AudioCodec

CHUNK_SECONDS = 0.75  # audio that goes through the graphs at once; bounds memory


class EncoderStream(Exclusive):
    """Audio in pieces of any length to tokens: the tokens that `encode` gives for the whole."""

    def __init__(self, codec: AudioCodec, channels: int) -> None:
        super().__init__()
        self._codec = codec
        self._channels = channels
        self._reset()

    def _reset(self) -> None:
        self._state: Any = None
        self._rest = np.zeros((self._channels, 0), np.float32)

    @alone
    def push(self, samples: np.ndarray) -> np.ndarray:
        """Encode the next samples.

        Args:
            samples: (T,) or (C, T) float at the model's rate; T may be 0.

        Returns:
            (C, n) int64 tokens of the frames that are now complete; n may be 0.

        Raises:
            ValueError: wrong shape, dtype or number of channels, or non-finite samples.
        """
        samples = check_samples(samples)
        check_channels(samples, self._channels)
        samples = np.concatenate([self._rest, samples], 1)
        hop = self._codec.hop_length
        whole = samples.shape[1] // hop * hop
        self._rest = samples[:, whole:]
        empty = np.zeros((self._channels, 0), np.int64)
        encode = self._codec.backend.encode
        frames = self._codec.chunk_frames
        tokens, self._state = _run(encode, frames, samples[:, :whole], hop, self._state, empty)
        return tokens

    @alone
    def flush(self) -> np.ndarray:
        """End the audio.

        Returns:
            (C, 0 or 1) int64: the token of the last, incomplete frame, if there is one. The stream
            can be used for other audio afterwards.
        """
        missing = -self._rest.shape[1] % self._codec.hop_length
        tokens = self.push(np.zeros((self._channels, missing), np.float32))
        self._reset()
        return tokens


class DecoderStream(Exclusive):
    """Tokens in pieces of any length to audio: the samples that `decode` gives for the whole."""

    def __init__(self, codec: AudioCodec, channels: int, first_frame: int = 0) -> None:
        super().__init__()
        self._codec = codec
        self._channels = channels
        self._reset(first_frame)

    def _reset(self, first_frame: int = 0) -> None:
        self._first_frame = first_frame
        self._state: Any = None
        self._late = self._codec.config.decoder_delay * self._codec.hop_length
        self._last = np.zeros((self._channels, 0), np.int64)

    @alone
    def push(self, tokens: np.ndarray) -> np.ndarray:
        """Decode the next tokens.

        Args:
            tokens: (N,) or (C, N) integers in [0, codebook_size); N may be 0.

        Returns:
            (C, n) float32 samples that are now final; n may be 0.

        Raises:
            ValueError: wrong shape, dtype or number of channels, or a token out of range.
        """
        tokens = check_tokens(tokens, "(C, N)", self._codec.codebook_size)
        check_channels(tokens, self._channels)
        empty = np.zeros((self._channels, 0), np.float32)
        samples, self._state = _run(
            self._decode, self._codec.chunk_frames, tokens, 1, self._state, empty
        )
        if tokens.shape[1]:
            self._last = tokens[:, -1:]
        late = min(self._late, samples.shape[1])
        self._late -= late
        return samples[:, late:]

    def _decode(self, tokens: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        return self._codec.backend.decode(tokens, state, self._first_frame)

    @alone
    def flush(self, tokens: np.ndarray | None = None) -> np.ndarray:
        """End the tokens.

        Args:
            tokens: the last ones, as for `push`; passing them here saves a run of the graph.

        Returns:
            (C, n) float32: the samples of these tokens and those held back for the decoder's delay,
        XX
        """
        if tokens is None:
            tokens = self._last[:, :0]
        tokens = check_tokens(tokens, "(C, N)", self._codec.codebook_size)
        check_channels(tokens, self._channels)
        last = tokens[:, -1:] if tokens.shape[1] else self._last
        held = np.repeat(last, self._codec.config.decoder_delay, 1)
        samples = self.push(np.concatenate([tokens, held], 1))
        self._reset()
        return samples


def _run(
    graph: Callable[[np.ndarray, Any], tuple[np.ndarray, Any]],
    chunk_frames: int,
    x: np.ndarray,
    column: int,
    state: Any,
    empty: np.ndarray,
) -> tuple[np.ndarray, Any]:
    """Run x (C, N * column) through a stateful graph in equal parts of few frames.

    Equal, because a part of one frame takes as long as twenty frames in a longer part.
    """
    frames = x.shape[1] // column
    if not frames:
        return empty, state
    runs = max(1, round(frames * len(x) / chunk_frames))
    step = column * -(-frames // runs)
    parts = [empty]
    for start in range(0, x.shape[1], step):
        part, state = graph(np.ascontiguousarray(x[:, start : start + step]), state)
        parts.append(part)
    return np.concatenate(parts, 1), state
