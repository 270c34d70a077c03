"""Metrics in the background: processes that compute them while the caller does something else.

A worker is an interpreter of its own that imports this module and nothing of the caller's program,
so no torch. A request is a line of JSON, which describes two arrays, and then these; the answer is
a line of JSON.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from .audio import mel_distance, si_sdr
from .image import ms_ssim, psnr, ssim
from .speech import pesq_wb, stoi

METRICS = ("pesq_wb", "stoi", "si_sdr", "mel_distance")
IMAGE_METRICS = ("psnr", "ssim", "ms_ssim")
BEST_PSNR = 100.0  # dB, for equal images: means need a number

_START = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "  # the parent decides
    "from vpcodec.metrics.workers import serve; serve()"
)


class WorkerError(RuntimeError):
    """A worker that ended, or failed, before it answered."""


class Workers:
    """Processes that compute metrics, of the lowest priority and with one thread each.

    They are started as they are needed, in the place of ones that ended too, and end with `close`
    or with the process that owns them, however it ends. A context manager.

    Args:
        count: how many may work at the same time.
    """

    def __init__(self, count: int) -> None:
        self._threads = ThreadPoolExecutor(count, "metrics")
        self._lock = threading.RLock()
        self._closed = False
        self._idle: list[subprocess.Popen] = []
        self._processes: set[subprocess.Popen] = set()

    def submit(
        self, reference: np.ndarray, degraded: np.ndarray, rate: int
    ) -> Future[dict[str, float]]:
        """Have two signals (T,) compared, as float32: a future of `measure`.

        Its exception is a WorkerError where the worker ended or `measure` raised one.

        Raises:
            ValueError: signals of other shapes or of different length.
        """
        if reference.ndim != 1 or reference.shape != degraded.shape:
            raise ValueError(f"signals of shapes {reference.shape} and {degraded.shape}, not (T,)")
        return self._threads.submit(self._measure, "audio", "<f4", reference, degraded, rate)

    def submit_image(self, reference: np.ndarray, degraded: np.ndarray) -> Future[dict[str, float]]:
        """Have two images (H, W, C) of uint8 compared: a future of `measure_image`.

        Its exception is a WorkerError, as that of `submit`.

        Raises:
            ValueError: other arrays, or of different shapes.
        """
        if any(x.ndim != 3 or x.dtype != np.uint8 for x in (reference, degraded)):
            raise ValueError("images are not (H, W, C) uint8")
        if reference.shape != degraded.shape:
            raise ValueError(f"images of shapes {reference.shape} and {degraded.shape}")
        return self._threads.submit(self._measure, "image", "|u1", reference, degraded)

    @property
    def pids(self) -> list[int]:
        """Of the processes that run."""
        with self._lock:
            return [process.pid for process in self._processes]

    def close(self) -> None:
        """End all at once; what they have not answered yet becomes a WorkerError or cancelled."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._idle:
            self._end(process)
        self._idle.clear()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _measure(
        self, kind: str, dtype: str, reference: np.ndarray, degraded: np.ndarray, *arguments: int
    ) -> dict[str, float]:
        """The answer of a worker: of `MEASURES[kind]`, which gets both arrays and the arguments."""
        request = {"kind": kind, "dtype": dtype, "shape": reference.shape, "arguments": arguments}
        process = self._take()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            for array in (reference, degraded):
                process.stdin.write(np.ascontiguousarray(array, dtype).data)
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer.endswith(b"\n"):
                raise EOFError
        except (OSError, EOFError):
            raise WorkerError(f"a worker {self._end(process)}") from None
        except BaseException:
            self._end(process)
            raise
        with self._lock:
            self._idle.append(process)
        found = json.loads(answer)
        if isinstance(found, str):
            raise WorkerError(found)
        return found

    def _take(self) -> subprocess.Popen:
        with self._lock:
            if self._closed:
                raise WorkerError("the workers are closed")
            while self._idle:
                process = self._idle.pop()
                if process.poll() is None:
                    return process
                self._end(process)
            process = _launch()
            self._processes.add(process)
            return process

    def _end(self, process: subprocess.Popen) -> str:
        """Wait for its end or kill it, and forget it; how it ended."""
        try:
            code = process.wait(1)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        with self._lock:
            self._processes.discard(process)
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # of what could not be sent
                pipe.close()
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def measure(reference: np.ndarray, degraded: np.ndarray, rate: int) -> dict[str, float]:
    """Each of METRICS whose package is there -> value; ValueError as in `metrics.audio`."""
    found = {}
    for metric in (pesq_wb, stoi, mel_distance):
        with suppress(ImportError):
            found[metric.__name__] = metric(reference, degraded, rate)
    return found | {"si_sdr": si_sdr(reference, degraded)}


def measure_image(reference: np.ndarray, degraded: np.ndarray) -> dict[str, float]:
    """Each of IMAGE_METRICS -> value, PSNR up to BEST_PSNR; ValueError as in `metrics.image`."""
    return {
        "psnr": min(psnr(reference, degraded), BEST_PSNR),
        "ssim": ssim(reference, degraded),
        "ms_ssim": ms_ssim(reference, degraded),
    }


MEASURES = {"audio": measure, "image": measure_image}


def serve() -> None:
    """Answer requests from stdin on stdout, until stdin ends."""
    if hasattr(os, "nice"):
        os.nice(19)
    answers = os.fdopen(os.dup(1), "wb", 0)
    os.dup2(2, 1)  # a library that prints shall not answer
    try:
        while line := sys.stdin.buffer.readline():
            request = json.loads(line)
            shape, dtype = (2, *request["shape"]), np.dtype(request["dtype"])
            data = sys.stdin.buffer.read(math.prod(shape) * dtype.itemsize)
            arrays = np.frombuffer(data, dtype).reshape(shape)
            try:
                answer = MEASURES[request["kind"]](*arrays, *request["arguments"])
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            answers.write(json.dumps(answer).encode() + b"\n")
    except (ValueError, BrokenPipeError):
        pass  # the parent ended in the middle of a request, or before the answer


def _launch() -> subprocess.Popen:
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)  # "" is here
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _START],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | threads | {"PYTHONPATH": path},
    )
