"""What a backend does, and a stream on top of one."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Backend(Protocol):
    """Runs the two graphs of a model on numpy arrays; the state is opaque.

    `None` as state is the beginning of a stream. Images have no history: their state is always
    `None`, and what is given back for it has no meaning.
    """

    def encode(self, signal: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        """A signal to tokens.

        Args:
            signal: audio (B, N * hop), N > 0, or images (B, 3, H, W) of RGB in [-1, 1] whose
                sides are multiples of the model's block; float32.
            state: as it was given back for what came before.

        Returns:
            int64 tokens, (B, N) or (B, H / hop, W / hop), and the next state.
        """

    def decode(self, tokens: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        """Tokens (B, N), or (B, rows, columns) of whole windows, to a float32 signal, as above."""


class Stream(Protocol):
    """Audio or tokens in pieces of any length, to the other; the answers of the whole."""

    def push(self, x: np.ndarray, /) -> np.ndarray:
        """(T,) or (C, T) samples, or tokens -> what is now certain of the other."""

    def flush(self, *last: np.ndarray) -> np.ndarray:
        """The rest, after the last tokens if they are given. Starts anew afterwards."""
