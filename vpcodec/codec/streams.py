"""Streams: audio to tokens and back, piece by piece, with the answers of the whole.

Native models are causal and go on from their state.

Threads may share a codec, each with streams of its own: a stream that another thread is pushing to
raises RuntimeError, and goes on as if it had not been asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import check_channels, check_samples, check_tokens
from ..threads import Exclusive, alone

if TYPE_CHECKING:
    from .audio import AudioCodec

CHUNK_SECONDS = 0.75  # audio that goes through the graphs at once; bounds memory


class EncoderStream(Exclusive):
    """Audio in pieces of any length to tokens; the same tokens as `encode` of the whole."""

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
        """(T,) or (C, T) samples -> (C, n) int64 tokens of the frames that are now complete."""
        samples = check_samples(samples)
        check_channels(samples, self._channels)
        samples = np.concatenate([self._rest, samples], 1)
        hop = self._codec.hop_length
        whole = samples.shape[1] // hop * hop
        self._rest = samples[:, whole:]
        empty = np.zeros((self._channels, 0), np.int64)
        tokens, self._state = _run(
            self._codec, "encode", samples[:, :whole], hop, self._state, empty
        )
        return tokens

    @alone
    def flush(self) -> np.ndarray:
        """The token of the last, incomplete frame, if any: (C, 0 or 1). Starts anew afterwards."""
        missing = -self._rest.shape[1] % self._codec.hop_length
        tokens = self.push(np.zeros((self._channels, missing), np.float32))
        self._reset()
        return tokens


class DecoderStream(Exclusive):
    """Tokens in pieces of any length to audio; the same samples as `decode` of the whole."""

    def __init__(self, codec: AudioCodec, channels: int) -> None:
        super().__init__()
        self._codec = codec
        self._channels = channels
        self._reset()

    def _reset(self) -> None:
        self._state: Any = None
        self._late = self._codec.config.decoder_delay * self._codec.hop_length
        self._last = np.zeros((self._channels, 0), np.int64)

    @alone
    def push(self, tokens: np.ndarray) -> np.ndarray:
        """(N,) or (C, N) tokens -> (C, n) float32 samples that are now final."""
        tokens = check_tokens(tokens, "(C, N)", self._codec.codebook_size)
        check_channels(tokens, self._channels)
        empty = np.zeros((self._channels, 0), np.float32)
        samples, self._state = _run(self._codec, "decode", tokens, 1, self._state, empty)
        if tokens.shape[1]:
            self._last = tokens[:, -1:]
        late = min(self._late, samples.shape[1])
        self._late -= late
        return samples[:, late:]

    @alone
    def flush(self, tokens: np.ndarray | None = None) -> np.ndarray:
        """The samples of the last tokens, if any, and those held back, (C, n). Starts anew.

        The last token is repeated; a graph runs once less than with `push` before.
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
    codec: AudioCodec, method: str, x: np.ndarray, column: int, state: Any, empty: np.ndarray
) -> tuple[np.ndarray, Any]:
    """Run x (C, N * column) through a stateful graph, few frames at a time, in equal parts: a part
    of one frame would take as long as twenty in a longer one."""
    frames = x.shape[1] // column
    if not frames:
        return empty, state
    graph = getattr(codec.backend, method)
    runs = max(1, round(frames * len(x) / codec.chunk_frames))
    step = column * -(-frames // runs)
    parts = [empty]
    for start in range(0, x.shape[1], step):
        part, state = graph(np.ascontiguousarray(x[:, start : start + step]), state)
        parts.append(part)
    return np.concatenate(parts, 1), state
