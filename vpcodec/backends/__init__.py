"""Backends run a model's encoder and decoder: one protocol, same answers."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from ..hub import ModelFolder

BACKENDS = ("onnx", "torch")


class Backend(Protocol):
    """Runs the two stateful graphs of a model on numpy arrays; the state is opaque.

    `None` as state is the beginning of a stream.
    """

    def encode(self, samples: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        """(B, N * hop) float32 samples, N > 0 -> (B, N) int64 tokens, next state."""

    def decode(self, tokens: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        """(B, N) int64 tokens, N > 0 -> (B, N * hop) float32 samples, next state."""


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
