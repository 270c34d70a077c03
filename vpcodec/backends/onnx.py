"""The default backend: ONNX Runtime, no torch."""

from __future__ import annotations

import ctypes
import os
from functools import cached_property, partial
from pathlib import Path
from weakref import WeakSet

import numpy as np
import onnxruntime as ort

from ..config import FRAME_COUNTER, NOISE_FRAMES
from ..model_folder import ModelError, ModelFolder
from ..threads import compiled_code, default_threads
from .architecture import architecture_of
from .checks import NEXT, PAST, check_external_data, check_interface, lengths

State = dict[str, np.ndarray]


class OnnxBackend:
    """Runs encoder.onnx and decoder.onnx; each is loaded on first use.

    A pickle holds the folder and the options. Sessions are loaded afresh where it is read, and in a
    process that was forked.

    Args:
        model: the folder.
        threads: intra-op threads; None: `default_threads`, and one for streams.
        device: "cpu", "cuda" (needs onnxruntime-gpu) or "auto" (cuda where it is available).
    """

    name = "onnx"

    def __init__(self, model: ModelFolder, *, threads: int | None, device: str) -> None:
        model.check()
        self.model = model
        self.threads = threads
        self.device = device
        available = ort.get_available_providers()
        if device == "cuda" and "CUDAExecutionProvider" not in available:
            raise ModelError("device cuda: this ONNX Runtime has no CUDA (install onnxruntime-gpu)")
        use_cuda = device != "cpu" and "CUDAExecutionProvider" in available
        exact = {"use_tf32": 0}  # full float32, so that tokens are those of other machines
        self.providers: list[str | tuple[str, dict[str, int]]] = []
        if use_cuda:
            self.providers.append(("CUDAExecutionProvider", exact))
        self.providers.append("CPUExecutionProvider")
        _backends.add(self)

    @cached_property
    def for_streams(self) -> OnnxBackend:
        if self.threads is not None or default_threads() == 1:
            return self
        return OnnxBackend(self.model, threads=1, device=self.device)

    def __reduce__(self) -> tuple[object, ...]:
        again = partial(OnnxBackend, self.model, threads=self.threads, device=self.device)
        return again, ()

    def encode(self, samples: np.ndarray, state: State | None) -> tuple[np.ndarray, State]:
        tokens, following = self._encoder.run(samples, state)
        self._check(tokens, np.int64, (len(samples), *self._grid(samples)), "encoder.onnx")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.model.config.codebook_size:
            raise ModelError(
                f"{self.model.path / 'encoder.onnx'}: gives tokens beyond its codebook"
            )
        return tokens, following

    def decode(
        self, tokens: np.ndarray, state: State | None, first_frame: int = 0
    ) -> tuple[np.ndarray, State]:
        if state is None:
            state = self._decoder.beginning(len(tokens))
            if FRAME_COUNTER in state:
                state[FRAME_COUNTER][:] = first_frame % NOISE_FRAMES
        signal, following = self._decoder.run(tokens, state)
        grid = tuple(size * self.model.config.hop_length for size in tokens.shape[1:])
        colours = () if tokens.ndim == 2 else (3,)
        self._check(signal, np.float32, (len(tokens), *colours, *grid), "decoder.onnx")
        return signal, following

    def _grid(self, signal: np.ndarray) -> tuple[int, ...]:
        """Tokens along the sides of a signal, (B, T) or (B, 3, H, W)."""
        sides = signal.shape[1:] if signal.ndim == 2 else signal.shape[2:]
        return tuple(side // self.model.config.hop_length for side in sides)

    def _check(self, found: np.ndarray, dtype: type, shape: tuple[int, ...], name: str) -> None:
        """Raise ModelError where a graph gave something else than config.json promises."""
        if found.dtype != dtype or found.shape != shape:
            raise ModelError(
                f"{self.model.path / name}: gives {found.dtype} of shape {found.shape}, where "
                f"config.json promises {np.dtype(dtype)} of shape {shape}"
            )

    @cached_property
    def _encoder(self) -> _Graph:
        return self._load("encoder.onnx")

    @cached_property
    def _decoder(self) -> _Graph:
        return self._load("decoder.onnx")

    def _load(self, name: str) -> _Graph:
        path = self.model.file(name)
        check_external_data(self.model, path)
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what fails is raised
        architecture = architecture_of(self.model.config)
        options.enable_mem_pattern = architecture is None or architecture.plan_memory
        options.intra_op_num_threads = self.threads or default_threads()
        # Threads that have nothing to do sleep; else they would take cores from other processes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = ort.InferenceSession(str(path), options, providers=self.providers)
        except Exception as error:  # ONNX Runtime raises bare pybind exceptions of many kinds
            _check_memory(error)
            raise ModelError(f"{path}: ONNX Runtime cannot load it ({_reason(error)})") from None
        try:
            check_interface(
                self.model.config, path.stem, session.get_inputs(), session.get_outputs()
            )
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from None
        return _Graph(session, path)


_backends: WeakSet[OnnxBackend] = WeakSet()


def _after_fork() -> None:
    """Forget the sessions of the parent process. Their threads are not there, and to end them would
    crash, so they are kept for ever."""
    for backend in _backends:
        for name in ("_encoder", "_decoder"):
            if graph := vars(backend).pop(name, None):
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(graph.session))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Graph:
    """One session with named states: input `past.X` goes with output `next.X`."""

    def __init__(self, session: ort.InferenceSession, path: Path) -> None:
        self.session, self.path = session, path
        self.input, *states = session.get_inputs()
        self.shapes = {s.name.removeprefix(PAST): lengths(s.shape[1:]) for s in states}
        self.outputs = [o.name for o in session.get_outputs()]

    def beginning(self, batch: int) -> State:
        """The state at the beginning of a stream."""
        return {name: np.zeros((batch, *shape), np.float32) for name, shape in self.shapes.items()}

    def run(self, x: np.ndarray, state: State | None) -> tuple[np.ndarray, State]:
        state = self.beginning(len(x)) if state is None else state
        feed = {self.input.name: x} | {PAST + name: value for name, value in state.items()}
        try:
            with compiled_code():
                y, *following = self.session.run(self.outputs, feed)
        except Exception as error:
            _check_memory(error)
            raise ModelError(f"{self.path}: cannot run ({_reason(error)})") from error
        names = (name.removeprefix(NEXT) for name in self.outputs[1:])
        return y, dict(zip(names, following))


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_memory(error: Exception) -> None:
    """Raise MemoryError if that is what an exception of ONNX Runtime says."""
    words = ("bad allocation", "bad_alloc", "allocate memory")
    if isinstance(error, MemoryError) or any(word in str(error) for word in words):
        raise MemoryError("in ONNX Runtime") from None
