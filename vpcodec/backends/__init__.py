"""Backends run a model's encoder and decoder: one protocol, the same results."""

from __future__ import annotations

from ..model_folder import ModelFolder
from .architecture import Architecture, architecture_of, register
from .protocol import Backend, DecoderStream, EncoderStream

__all__ = [
    "BACKENDS",
    "Architecture",
    "Backend",
    "DecoderStream",
    "EncoderStream",
    "architecture_of",
    "load_backend",
    "register",
]

BACKENDS = ("onnx", "torch")


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
