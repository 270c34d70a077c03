"""Streams of the published models, in windows of whole attention blocks.

The models are not causal, so each window includes the context of its convolutions on both sides.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backends import Backend
from ..checks import check_channels, check_samples, check_tokens
from ..model_folder import ModelError
from ..threads import Exclusive, alone
from .config import SQCodecConfig

ENCODE_SECONDS = 1.0  # approximate length of an encoder window
DECODE_SECONDS = 15.0  # least length of a decoder window, over which the decoder normalises
MAX_WINDOW = 8_400  # tokens; bounds the memory of models with high rates
FADE_SECONDS = 0.01  # cross-fade between decoder windows


class WindowedEncoderStream(Exclusive):
    """Encodes audio, in pieces of any length, to the tokens of a published SQCodec.

    The tokens are the same as those of the whole clip: attention continues from its state, and the
    convolutions get their full context.

    Args:
        config: configuration of the model.
        backend: runs its graphs.
        channels: number of channels.
    """

    def __init__(self, config: SQCodecConfig, backend: Backend, channels: int) -> None:
        super().__init__()
        self._channels = channels
        self._hop = config.hop_length
        self._window = _whole_blocks(config, ENCODE_SECONDS)
        self._ahead = config.encoder_context
        self._windows = _Windows(config, backend, "encode", channels, self._ahead)
        self._fill = 0  # clips are padded to multiples of this many tokens
        if config.architecture == "sqcodec":
            self._fill = config.attention_window
        self._reset()

    def _reset(self) -> None:
        self._windows.reset()
        self._rest = np.zeros((self._channels, 0), np.float32)

    @alone
    def push(self, samples: np.ndarray) -> np.ndarray:
        """(T,) or (C, T) samples -> (C, n) int64 tokens that are now final."""
        samples = check_samples(samples)
        check_channels(samples, self._channels)
        self._rest = np.concatenate([self._rest, samples], 1)
        size, whole = self._window * self._hop, (self._window + self._ahead) * self._hop
        parts = [np.zeros((self._channels, 0), np.int64)]
        start = 0
        while self._rest.shape[1] - start >= whole:
            tokens = self._windows.run(self._rest[:, start : start + whole])
            parts.append(tokens[:, : self._window])
            self._windows.keep("encoder.audio", size, self._ahead * self._hop)
            start += size
        self._rest = self._rest[:, start:]
        return np.concatenate(parts, 1)

    @alone
    def flush(self) -> np.ndarray:
        """The remaining tokens, (C, n) int64. The stream can be used again afterwards."""
        n = -(-self._rest.shape[1] // self._hop)
        tokens = np.zeros((self._channels, 0), np.int64)
        if n:
            silence = min(-n % self._fill, self._ahead) if self._fill else 0
            missing = (n + silence) * self._hop - self._rest.shape[1]
            tokens = self._windows.run(np.pad(self._rest, ((0, 0), (0, missing))))[:, :n]
        self._reset()
        return tokens


class WindowedDecoderStream(Exclusive):
    """Decodes tokens, in pieces of any length, to the audio of a published SQCodec.

    Clips of up to about twice `DECODE_SECONDS` are decoded in one piece. In longer ones, attention
    and convolutions see the same as in the whole clip, but the decoder normalises over windows of
    once to twice that length instead of the clip, and windows are cross-faded. The first version of
    SQCodec also normalises over the silence that pads a clip to whole blocks, so its tokens are
    appended.

    Args:
        config: configuration of the model.
        backend: runs its graphs.
        channels: number of channels.
    """

    def __init__(self, config: SQCodecConfig, backend: Backend, channels: int) -> None:
        super().__init__()
        self._config = config
        self._channels = channels
        self._window = _whole_blocks(config, DECODE_SECONDS)
        self._fade = round(FADE_SECONDS * config.sample_rate)
        # Tokens that the interpolation of features, the convolutions and the cross-fade look ahead.
        self._ahead = -(-config.decoder_context // config.token_stride) + 1
        self._ahead += -(-self._fade // config.hop_length)
        self._windows = _Windows(config, backend, "decode", channels, self._ahead)
        self._silence = np.array(config.silence, np.int64)
        self._reset()

    def _reset(self) -> None:
        self._windows.reset()
        self._past = 0  # samples of past features, which are decoded again as context
        self._rest = np.zeros((self._channels, 0), np.int64)
        # The previous window's samples for the beginning of the next one.
        self._tail: np.ndarray | None = None

    @alone
    def push(self, tokens: np.ndarray) -> np.ndarray:
        """(N,) or (C, N) tokens -> (C, n) float32 samples that are now final."""
        tokens = check_tokens(tokens, "(C, N)", self._config.codebook_size)
        check_channels(tokens, self._channels)
        self._rest = np.concatenate([self._rest, tokens], 1)
        config, size = self._config, self._window
        end = size * config.hop_length
        parts = [np.zeros((self._channels, 0), np.float32)]
        start = 0
        while self._rest.shape[1] - start > 2 * size + self._ahead:  # keeps the last window long
            samples = self._run(self._rest[:, start : start + size + self._ahead])
            parts.append(samples[:, :end])
            self._tail = samples[:, end : end + self._fade]
            features = config.decoder_context
            self._windows.keep("decoder.features", size * config.token_stride, features)
            self._past = features * config.hop_length // config.token_stride
            if config.token_stride > 1:
                self._windows.keep("decoder.tokens", size, 1)
            start += size
        self._rest = self._rest[:, start:]
        return np.concatenate(parts, 1)

    def push_lost(self, n_frames: int) -> np.ndarray:
        """Raises ValueError: windows of seconds are not for live links, where tokens are lost."""
        raise ValueError(f"{self._config.name} is not for live streams; it cannot conceal losses")

    @alone
    def flush(self, tokens: np.ndarray | None = None) -> np.ndarray:
        """The samples of `tokens`, if any, and all remaining samples, (C, n) float32.

        The stream can be used again afterwards.
        """
        parts = [] if tokens is None else [self.push(tokens)]
        n = self._rest.shape[1]
        samples = np.zeros((self._channels, 0), np.float32)
        if n:  # windows are whole blocks, so the rest starts with a block
            block = max(1, len(self._silence))
            fill = np.tile(self._silence[n % block :] if n % block else [], (self._channels, 1))
            samples = self._run(np.concatenate([self._rest, fill.astype(np.int64)], 1))
        self._reset()
        return np.concatenate([*parts, samples[:, : n * self._config.hop_length]], 1)

    def _run(self, tokens: np.ndarray) -> np.ndarray:
        samples = self._windows.run(tokens)[:, self._past :]
        if self._tail is not None:
            n = min(self._fade, samples.shape[1])
            share = (np.arange(n, dtype=np.float32) + 0.5) / self._fade
            samples[:, :n] = samples[:, :n] * share + self._tail[:, :n] * (1 - share)
        return samples


class _Windows:
    """Runs windows through a graph of a published SQCodec, channel by channel."""

    def __init__(
        self, config: SQCodecConfig, backend: Backend, method: str, channels: int, ahead: int
    ) -> None:
        if ahead >= config.attention_window:
            raise ModelError(f"{config.name}: its attention_window is too short for windows")
        self._name = config.name
        self._run = getattr(backend, method)
        self._channels = channels
        self.reset()

    def reset(self) -> None:
        self._states: list[Any] = [None] * self._channels

    def run(self, x: np.ndarray) -> np.ndarray:
        """(C, N) input of a window and its look-ahead -> (C, M) output."""
        rows = []
        for channel, state in enumerate(self._states):
            row = np.ascontiguousarray(x[channel : channel + 1])
            row, self._states[channel] = self._run(row, state)
            rows.append(row)
        return np.concatenate(rows)

    def keep(self, name: str, end: int, n: int) -> None:
        """Keep only the `n` steps before `end` in a state, for the next window."""
        for state in self._states:
            if name not in state:
                raise ModelError(f"{self._name}: its graphs are those of another architecture")
            state[name] = state[name][:, end - n : end]


def _whole_blocks(config: SQCodecConfig, seconds: float) -> int:
    """Number of tokens of about this duration, in whole attention blocks; fewer at high rates."""
    tokens = min(seconds * config.frame_rate, MAX_WINDOW)
    return max(1, round(tokens / config.attention_window)) * config.attention_window
