"""For threads: how many pay, compiled code that ends before the interpreter, objects for one."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

MOST_THREADS = 4  # that a graph is given by default

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
    global _changed, _running, _blas_lock, _blas_users
    _changed, _running = threading.Condition(), 0
    _blas_lock, _blas_users = threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ------------------------------------------------------------------------------ numbers of threads


def default_threads() -> int:
    """Threads for a graph that codes long pieces: the cores that are allowed, at most
    MOST_THREADS."""
    return min(MOST_THREADS, allowed_cores())


def allowed_cores(root: Path = Path("/")) -> int:
    """Cores that this process may keep busy, by its affinity and the CPU quota of its cgroups.

    Args:
        root: where /proc and /sys are found.

    Returns:
        At least 1; a quota of part of a core more is rounded down.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, int(min([cores, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """Cores that this process's cgroups and those around them may use, where there are limits."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        base, limits = root / "sys/fs/cgroup", _limit_2
        if controllers:
            if "cpu" not in controllers.split(","):
                continue
            base, limits = base / "cpu", _limit_1
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                with suppress(OSError, ValueError, ArithmeticError):
                    if (cores := limits(folder)) > 0:
                        yield cores


def _limit_2(group: Path) -> float:
    """Cores of a group of cgroup v2; ValueError without a limit."""
    quota, period = (group / "cpu.max").read_text().split()
    return int(quota) / int(period)


def _limit_1(group: Path) -> float:
    """Cores of a group of cgroup v1; negative without a limit."""
    quota = int((group / "cpu.cfs_quota_us").read_text())
    return quota / int((group / "cpu.cfs_period_us").read_text())


_blas_lock = threading.Lock()
_blas_users = 0
_blas_before = 0


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """A context in which NumPy's matrix products, which are many and small, take one thread.

    Several threads may be in it; the number from before comes back when the last has left. Only the
    OpenBLAS that is part of NumPy's wheels is known; other libraries are left as they are.
    """
    global _blas_users, _blas_before
    functions = _openblas()
    if functions is None:
        yield
        return
    get, put = functions
    with _blas_lock:
        if not _blas_users:
            _blas_before = get()
            put(1)
        _blas_users += 1
    try:
        yield
    finally:
        with _blas_lock:
            _blas_users -= 1
            if not _blas_users:
                put(_blas_before)


@cache
def _openblas() -> tuple[Callable[[], int], Callable[[int], object]] | None:
    """What gets and sets the number of threads of the OpenBLAS in NumPy's wheel."""
    import ctypes

    numpy = sys.modules["numpy"].__file__
    assert numpy is not None
    package = Path(numpy).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        for path in folder.glob("*openblas*"):
            with suppress(OSError, AttributeError):
                library = ctypes.CDLL(str(path))  # which is loaded already
                end = "64_" if "64_" in path.name else ""
                return (
                    getattr(library, f"scipy_openblas_get_num_threads{end}"),
                    getattr(library, f"scipy_openblas_set_num_threads{end}"),
                )
    return None


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
