"""For threads: compiled code that ends before the interpreter, and objects for one at a time."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

T = TypeVar("T")

_changed = threading.Condition()
_running = 0  # calls of compiled code
_ending = False


@contextmanager
def compiled_code() -> Iterator[None]:
    """A context in which compiled code may run without the GIL; the interpreter waits for its end.

    If a daemon thread returned from compiled code while the interpreter is ending, Python would
    unwind it, and C++ would abort the process. Once the interpreter is ending, only the main thread
    may enter; others wait until the process has gone.
    """
    global _running
    with _changed:
        while _ending and threading.current_thread() is not threading.main_thread():
            _changed.wait()
        _running += 1
    try:
        yield
    finally:
        with _changed:
            _running -= 1
            _changed.notify_all()


@atexit.register
def _end() -> None:
    global _ending
    with _changed:
        _ending = True
        _changed.wait_for(lambda: not _running)


def _after_fork() -> None:
    """Forget the calls of other threads in a child process."""
    global _changed, _running
    _changed, _running = threading.Condition(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Exclusive:
    """Base of objects whose `alone` methods may be called by only one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.RLock()


def alone(method: Callable[..., T]) -> Callable[..., T]:
    """Decorate a method of an Exclusive: it raises RuntimeError while another thread is in one."""

    @wraps(method)
    def guarded(self: Exclusive, *arguments: Any, **options: Any) -> T:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(f"this {type(self).__name__} is in use by another thread")
        try:
            return method(self, *arguments, **options)
        finally:
            self._lock.release()

    return guarded
