"""The protocols of a backend and of a stream."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Backend(Protocol):
    """Runs the two graphs of a model on NumPy arrays; the state is opaque.

    `None` is the state at the beginning of a stream. Images have no history: their state is always
    `None`, and the returned state has no meaning.
    """

    def encode(self, signal: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        """A signal to tokens.

        Args:
            signal: float32 audio (B, N * hop), N > 0, or RGB images (B, 3, H, W) in [-1, 1] whose
                sides are multiples of the model's block.
            state: as returned for the part before; None at the beginning.

        Returns:
            int64 tokens, (B, N) or (B, H / hop, W / hop), and the next state.
        """

    def decode(
        self, tokens: np.ndarray, state: Any, first_frame: int = 0
    ) -> tuple[np.ndarray, Any]:
        """Tokens to a signal.

        Args:
            tokens: int64 (B, N), or (B, rows, columns) in whole windows.
            state: as for `encode`.
            first_frame: the number of the first token in its recording, if `state` is None:
                decoders with noise read it there.

        Returns:
            The float32 signal, as for `encode`, and the next state.
        """


class Stream(Protocol):
    """Audio to tokens or back in pieces of any length, with the result of coding it at once."""

    def push(self, x: np.ndarray, /) -> np.ndarray:
        """(T,) or (C, T) samples or tokens -> the tokens or samples that are now final."""

    def flush(self, *last: np.ndarray) -> np.ndarray:
        """The rest, after the last tokens if given. The stream can be used again afterwards."""
