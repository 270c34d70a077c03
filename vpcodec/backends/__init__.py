"""Backends run a model's encoder and decoder: one protocol, same answers."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from ..model_folder import ModelFolder

BACKENDS = ("onnx", "torch")


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


def load_backend(
    name: str, model: ModelFolder, *, threads: int | None = None, device: str = "auto"
) -> Backend:
    """Make a backend by name.

    Raises:
        ValueError: unknown name.
        ModelError: a file of the model is missing or damaged.
        ImportError: the backend's package is not installed.
    """
    if name == "onnx":
        from .onnx import OnnxBackend

        return OnnxBackend(model, threads=threads, device=device)
    if name == "torch":
        from .torch import TorchBackend

        return TorchBackend(model, threads=threads, device=device)
    raise ValueError(f"unknown backend {name!r} (one of {', '.join(BACKENDS)})")
