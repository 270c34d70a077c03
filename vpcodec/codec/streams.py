"""Streams: audio to tokens and back, piece by piece, with the answers of the whole.

Native models are causal and go on from their state. The published SQCodec is not: it runs in
windows of whole blocks of attention, with what its convolutions see on both sides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import SQCodecConfig
from ..model_folder import ModelError

if TYPE_CHECKING:
    from .audio import AudioCodec

CHUNK_SECONDS = 0.75  # audio that goes through the graphs at once; bounds memory
ENCODE_SECONDS = 1.0  # about the length of a window of SQCodec's encoder
DECODE_SECONDS = 15.0  # and of its decoder, at least, which normalises over it
MAX_WINDOW = 8_400  # tokens, which bounds the memory of the models of high rates
FADE_SECONDS = 0.01  # between windows of the decoder


class EncoderStream:
    """Audio in pieces of any length to tokens; the same tokens as `encode` of the whole."""

    def __init__(self, codec: AudioCodec, channels: int) -> None:
        self._codec = codec
        self._channels = channels
        self._reset()

    def _reset(self) -> None:
        self._state: Any = None
        self._rest = np.zeros((self._channels, 0), np.float32)

    def push(self, samples: np.ndarray) -> np.ndarray:
        """(T,) or (C, T) samples -> (C, n) int64 tokens of the frames that are now complete."""
        samples = check_samples(samples)
        _check_channels(samples, self._channels)
        samples = np.concatenate([self._rest, samples], 1)
        hop = self._codec.hop_length
        whole = samples.shape[1] // hop * hop
        self._rest = samples[:, whole:]
        empty = np.zeros((self._channels, 0), np.int64)
        tokens, self._state = _run(
            self._codec, "encode", samples[:, :whole], hop, self._state, empty
        )
        return tokens

    def flush(self) -> np.ndarray:
        """The token of the last, incomplete frame, if any: (C, 0 or 1). Starts anew afterwards."""
        missing = -self._rest.shape[1] % self._codec.hop_length
        tokens = self.push(np.zeros((self._channels, missing), np.float32))
        self._reset()
        return tokens


class DecoderStream:
    """Tokens in pieces of any length to audio; the same samples as `decode` of the whole."""

    def __init__(self, codec: AudioCodec, channels: int) -> None:
        self._codec = codec
        self._channels = channels
        self._reset()

    def _reset(self) -> None:
        self._state: Any = None
        self._late = self._codec.config.decoder_delay * self._codec.hop_length
        self._last = np.zeros((self._channels, 0), np.int64)

    def push(self, tokens: np.ndarray) -> np.ndarray:
        """(N,) or (C, N) tokens -> (C, n) float32 samples that are now final."""
        tokens = self._codec._check_tokens(tokens, "(C, N)")
        _check_channels(tokens, self._channels)
        empty = np.zeros((self._channels, 0), np.float32)
        samples, self._state = _run(self._codec, "decode", tokens, 1, self._state, empty)
        if tokens.shape[1]:
            self._last = tokens[:, -1:]
        late = min(self._late, samples.shape[1])
        self._late -= late
        return samples[:, late:]

    def flush(self, tokens: np.ndarray | None = None) -> np.ndarray:
        """The samples of the last tokens, if any, and those held back, (C, n). Starts anew.

        The last token is repeated; a graph runs once less than with `push` before.
        """
        if tokens is None:
            tokens = self._last[:, :0]
        tokens = self._codec._check_tokens(tokens, "(C, N)")
        _check_channels(tokens, self._channels)
        last = tokens[:, -1:] if tokens.shape[1] else self._last
        held = np.repeat(last, self._codec.config.decoder_delay, 1)
        samples = self.push(np.concatenate([tokens, held], 1))
        self._reset()
        return samples


class WindowedEncoderStream:
    """Audio in pieces of any length to the tokens of a published SQCodec.

    The same tokens as of the whole clip at once: attention goes on from its state, and the
    convolutions get all that they see.
    """

    def __init__(self, codec: AudioCodec, channels: int) -> None:
        self._channels = channels
        config = codec.config
        self._hop = config.hop_length
        self._window = _whole_blocks(config, ENCODE_SECONDS)
        self._ahead = config.encoder_context
        self._windows = _Windows(codec, "encode", channels, self._ahead)
        self._fill = 0  # tokens of a block that clips are made up to
        if config.architecture == "sqcodec":
            self._fill = config.attention_window
        self._reset()

    def _reset(self) -> None:
        self._windows.reset()
        self._rest = np.zeros((self._channels, 0), np.float32)

    def push(self, samples: np.ndarray) -> np.ndarray:
        """(T,) or (C, T) samples -> (C, n) int64 tokens that are now certain."""
        samples = check_samples(samples)
        _check_channels(samples, self._channels)
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

    def flush(self) -> np.ndarray:
        """The tokens still held back, (C, n). Starts anew afterwards."""
        n = -(-self._rest.shape[1] // self._hop)
        tokens = np.zeros((self._channels, 0), np.int64)
        if n:
            silence = min(-n % self._fill, self._ahead) if self._fill else 0
            missing = (n + silence) * self._hop - self._rest.shape[1]
            tokens = self._windows.run(np.pad(self._rest, ((0, 0), (0, missing))))[:, :n]
        self._reset()
        return tokens


class WindowedDecoderStream:
    """Tokens in pieces of any length to the audio of a published SQCodec.

    Clips of up to about twice `DECODE_SECONDS` are decoded at once. Of longer ones the attention is
    that of the whole, and the convolutions get all that they see, but the decoder normalises over
    each window, which are once to twice as long, instead of over the clip; neighbours are faded
    into each other. The first version of SQCodec normalises over the silence up to the end of a
    block, too: its tokens are put there.
    """

    def __init__(self, codec: AudioCodec, channels: int) -> None:
        self._codec = codec
        self._channels = channels
        config = codec.config
        self._window = _whole_blocks(config, DECODE_SECONDS)
        self._fade = round(FADE_SECONDS * config.sample_rate)
        # What the interpolation of features, the convolutions and the fade need.
        self._ahead = -(-config.decoder_context // config.token_stride) + 1
        self._ahead += -(-self._fade // config.hop_length)
        self._windows = _Windows(codec, "decode", channels, self._ahead)
        self._silence = np.array(config.silence, np.int64)
        self._reset()

    def _reset(self) -> None:
        self._windows.reset()
        self._past = 0  # samples of the past features, which come out again
        self._rest = np.zeros((self._channels, 0), np.int64)
        self._tail: np.ndarray | None = None  # what the window before made of this one's beginning

    def push(self, tokens: np.ndarray) -> np.ndarray:
        """(N,) or (C, N) tokens -> (C, n) float32 samples that are now final."""
        tokens = self._codec._check_tokens(tokens, "(C, N)")
        _check_channels(tokens, self._channels)
        self._rest = np.concatenate([self._rest, tokens], 1)
        config, size = self._codec.config, self._window
        end = size * config.hop_length
        parts = [np.zeros((self._channels, 0), np.float32)]
        start = 0
        while self._rest.shape[1] - start > 2 * size + self._ahead:  # so the last is not short
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

    def flush(self, tokens: np.ndarray | None = None) -> np.ndarray:
        """The samples of the last tokens, if any, and those held back, (C, n). Starts anew."""
        parts = [] if tokens is None else [self.push(tokens)]
        n = self._rest.shape[1]
        samples = np.zeros((self._channels, 0), np.float32)
        if n:  # windows are of whole blocks, so the rest began with a block
            block = max(1, len(self._silence))
            fill = np.tile(self._silence[n % block :] if n % block else [], (self._channels, 1))
            samples = self._run(np.concatenate([self._rest, fill.astype(np.int64)], 1))
        self._reset()
        return np.concatenate([*parts, samples[:, : n * self._codec.hop_length]], 1)

    def _run(self, tokens: np.ndarray) -> np.ndarray:
        samples = self._windows.run(tokens)[:, self._past :]
        if self._tail is not None:
            n = min(self._fade, samples.shape[1])
            share = (np.arange(n, dtype=np.float32) + 0.5) / self._fade
            samples[:, :n] = samples[:, :n] * share + self._tail[:, :n] * (1 - share)
        return samples


class _Windows:
    """Runs windows through a graph of a published SQCodec, channel by channel."""

    def __init__(self, codec: AudioCodec, method: str, channels: int, ahead: int) -> None:
        if ahead >= codec.config.attention_window:
            raise ModelError(f"{codec.name}: its attention_window is too short for windows")
        self._codec = codec
        self._run = getattr(codec.backend, method)
        self._channels = channels
        self.reset()

    def reset(self) -> None:
        self._states: list[Any] = [None] * self._channels

    def run(self, x: np.ndarray) -> np.ndarray:
        """(C, N) of a window and what is ahead of it -> (C, M)."""
        rows = []
        for channel, state in enumerate(self._states):
            row = np.ascontiguousarray(x[channel : channel + 1])
            row, self._states[channel] = self._run(row, state)
            rows.append(row)
        return np.concatenate(rows)

    def keep(self, name: str, end: int, n: int) -> None:
        """Of what a state holds of the last window, the next needs the `n` steps before `end`."""
        for state in self._states:
            if name not in state:
                raise ModelError(
                    f"{self._codec.name}: its graphs are those of another architecture"
                )
            state[name] = state[name][:, end - n : end]


def _whole_blocks(config: SQCodecConfig, seconds: float) -> int:
    """Tokens of about that long, in whole blocks of attention; fewer where they are dense."""
    tokens = min(seconds * config.frame_rate, MAX_WINDOW)
    return max(1, round(tokens / config.attention_window)) * config.attention_window


def _check_channels(x: np.ndarray, channels: int) -> None:
    if len(x) != channels:
        raise ValueError(f"expected {channels} channels, got {len(x)}")


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


def check_samples(samples: np.ndarray) -> np.ndarray:
    """Samples as float32 (C, T).

    Raises:
        ValueError: another shape or dtype, NaN or infinite values.
    """
    samples = np.asarray(samples)
    if samples.dtype.kind != "f" or samples.ndim not in (1, 2) or samples.shape[:-1] == (0,):
        raise ValueError(
            f"samples must be float, (T,) or (C, T), got {samples.dtype} of shape {samples.shape}"
        )
    samples = np.atleast_2d(samples).astype(np.float32, copy=False)
    if not np.isfinite(samples).all():
        raise ValueError("samples hold NaN or infinite values")
    return samples
