"""The protocols of backends and of streams."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Backend(Protocol):
    """Runs the two graphs of a model on NumPy arrays; the state is opaque.

    `None` is the state at the beginning of a stream. Images have no history: their state is always
    `None`, and the returned state has no meaning.

    Attributes:
        name: "onnx" or "torch".
    """

    name: str

    @property
    def for_streams(self) -> Backend:
        """The backend for short pieces, for which more than one thread does not pay."""

    def encode(self, signal: NDArray[np.float32], state: Any) -> tuple[NDArray[np.int64], Any]:
        """A signal to tokens.

        Args:
            signal: float32 audio (B, N * hop), N > 0, or RGB images (B, 3, H, W) in [-1, 1] whose
                sides are multiples of the model's block.
            state: as returned for the part before; None at the beginning.

        Returns:
            int64 tokens, (B, N) or (B, H / hop, W / hop), and the next state.
        """

    def decode(
        self, tokens: NDArray[np.int64], state: Any, first_frame: int = 0
    ) -> tuple[NDArray[np.float32], Any]:
        """Tokens to a signal.

        Args:
            tokens: int64 (B, N), or (B, rows, columns) in whole windows.
            state: as for `encode`.
            first_frame: the number of the first token in its recording, if `state` is None:
                decoders with noise read it there.

        Returns:
            The float32 signal, as for `encode`, and the next state.
        """


class EncoderStream(Protocol):
    """Audio in pieces of any length to tokens: the tokens that `encode` gives for the whole."""

    def push(self, samples: NDArray[Any]) -> NDArray[np.int64]:
        """Encode the next samples.

        Args:
            samples: (T,) or (C, T) float (or int16 or int32) at the model's rate; T may be 0.

        Returns:
            (C, n) int64 tokens that are now final; n may be 0.

        Raises:
            ValueError: wrong shape, dtype or number of channels, or non-finite samples.
        """

    def flush(self) -> NDArray[np.int64]:
        """End the audio.

        Returns:
            (C, n) int64: the remaining tokens. The stream can be used for other audio afterwards.
        """


class DecoderStream(Protocol):
    """Tokens in pieces of any length to audio: the samples that `decode` gives for the whole."""

    def push(self, tokens: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Decode the next tokens.

        Args:
            tokens: (N,) or (C, N) integers in [0, codebook_size); N may be 0.

        Returns:
            (C, n) float32 samples that are now final; n may be 0.

        Raises:
            ValueError: wrong shape, dtype or number of channels, or a token out of range.
        """

    def push_lost(self, n_frames: int) -> NDArray[np.float32]:
        """Conceal tokens that did not arrive.

        Args:
            n_frames: how many per channel.

        Returns:
            (C, n) float32, as many samples as `push` gives for as many tokens.

        Raises:
            ValueError: a negative number, or a model that is not for live streams.
        """

    def flush(self, tokens: NDArray[np.integer[Any]] | None = None) -> NDArray[np.float32]:
        """End the tokens.

        Args:
            tokens: the last ones, as for `push`; passing them here saves a run of the graph.

        Returns:
            (C, n) float32: the remaining samples. The stream can be used for other tokens
            afterwards.
        """
