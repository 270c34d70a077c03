"""Processes that call functions while the caller does something else.

Each process is a new interpreter. It imports this module and the modules of the functions that it
is asked to call, but nothing of the caller's program, so no torch unless a function needs it.
Requests and answers are pickles that only pass through pipes between the two.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, BinaryIO, Self

_START = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "  # the parent decides
    "from vpcodec.scoring.pool import serve; serve({nice})"
)
_LIBRARIES = ("OMP", "OPENBLAS", "MKL", "NUMBA")
_SIZE_BYTES = 8  # of the size that precedes each message


class WorkerError(RuntimeError):
    """A function failed in its process."""


class LostWorkerError(WorkerError):
    """A process ended before it answered."""


class Pool:
    """Processes that call functions, with one thread each.

    They are started as needed, also to replace processes that ended, and end with `close` or with
    the process that owns them, however it ends. If one dies, only the call that it worked on is
    lost. Can be used as a context manager.

    Args:
        count: most processes at a time.
        begin: a function and its arguments, called first in each process.
        nice: how far their priority is below the caller's, up to 19.
    """

    def __init__(
        self,
        count: int,
        *,
        begin: tuple[Callable[..., Any], *tuple[Any, ...]] | None = None,
        nice: int = 0,
    ) -> None:
        self._begin, self._nice = begin, nice
        self._threads = ThreadPoolExecutor(count, "pool")
        self._lock = threading.RLock()
        self._closed = False
        self._idle: list[subprocess.Popen[bytes]] = []
        self._processes: set[subprocess.Popen[bytes]] = set()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Call a function of a module in a process, with arguments that can be pickled.

        Returns:
            A future of the result. Its exception is a WorkerError with one line if the function
            raised an exception or cannot be imported, and a LostWorkerError if the process ended.
        """
        return self._threads.submit(self._call, function, arguments)

    @property
    def pids(self) -> list[int]:
        """Process ids of the running processes."""
        with self._lock:
            return [process.pid for process in self._processes]

    def close(self) -> None:
        """Kill all processes; pending futures get a WorkerError or are cancelled."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._idle:
            self._end(process)
        self._idle.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        request = pickle.dumps((function, arguments), pickle.HIGHEST_PROTOCOL)
        process = self._take()
        done, answer = self._ask(process, request)
        with self._lock:
            self._idle.append(process)
        if not done:
            raise WorkerError(answer)
        return answer

    def _ask(self, process: subprocess.Popen[bytes], request: bytes) -> tuple[bool, Any]:
        """Whether a request succeeded, and the answer or the reason."""
        try:
            _send(process.stdin, request)
            return pickle.loads(_receive(process.stdout))
        except (OSError, EOFError):
            raise LostWorkerError(f"a worker {self._end(process)}") from None
        except BaseException:
            self._end(process)
            raise

    def _take(self) -> subprocess.Popen[bytes]:
        """An idle process, or a new one."""
        with self._lock:
            if self._closed:
                raise WorkerError("the workers are closed")
            while self._idle:
                process = self._idle.pop()
                if process.poll() is None:
                    return process
                self._end(process)
            process = _launch(self._nice)
            self._processes.add(process)
        if self._begin is not None:
            function, *arguments = self._begin
            request = pickle.dumps((function, arguments), pickle.HIGHEST_PROTOCOL)
            done, answer = self._ask(process, request)
            if not done:
                self._end(process)
                raise WorkerError(answer)
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> str:
        """Wait for a process to end or kill it, and forget it; returns how it ended."""
        try:
            code = process.wait(1)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        with self._lock:
            self._processes.discard(process)
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # unsent data
                pipe.close()
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def serve(nice: int) -> None:
    """Answer requests from stdin on stdout, until stdin ends."""
    if nice and hasattr(os, "nice"):
        os.nice(nice)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not become an answer
    try:
        while True:
            request = _receive(sys.stdin.buffer)
            try:
                function, arguments = pickle.loads(request)
                answer = pickle.dumps((True, function(*arguments)), pickle.HIGHEST_PROTOCOL)
            except Exception as error:
                answer = pickle.dumps((False, f"{type(error).__name__}: {error}"))
            _send(answers, answer)
    except (EOFError, BrokenPipeError):
        pass  # the parent has ended, or has no more requests


def _send(pipe: BinaryIO, message: bytes) -> None:
    pipe.write(len(message).to_bytes(_SIZE_BYTES, "little"))
    pipe.write(message)
    pipe.flush()


def _receive(pipe: BinaryIO) -> bytes:
    """The next message.

    Raises:
        EOFError: the pipe ends before the end of a message.
    """
    size = pipe.read(_SIZE_BYTES)
    message = pipe.read(int.from_bytes(size, "little"))
    if len(size) < _SIZE_BYTES or len(message) < int.from_bytes(size, "little"):
        raise EOFError
    return message


def _launch(nice: int) -> subprocess.Popen[bytes]:
    threads = {f"{library}_NUM_THREADS": "1" for library in _LIBRARIES}
    path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)  # "" is here
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _START.format(nice=nice)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | threads | {"PYTHONPATH": path},
    )
