"""The command line: one thin module per command.

Imports here take no time, so that Ctrl-C is handled from the beginning.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..terminal import escaping

_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2, never a traceback.

    Ctrl-C, SIGTERM and SIGHUP end with code 130, 143 and 129, without a message and with everything
    cleaned up, even while modules are imported.
    """
    if sys.stderr is None:  # closed; print would take stdout instead
        sys.stderr = open(os.devnull, "w")
    with escaping(), _interruptible():
        from ..media.files import FULL
        from .app import app
        from .errors import USER_ERRORS, explain

        try:
            with _flushed(), _logged():
                app()
        except BrokenPipeError:  # the reader of our output has gone: there is nobody to tell
            _drop_stdout()
            sys.exit(1)
        except USER_ERRORS as error:
            _drop_stdout()
            if isinstance(error, OSError) and not error.filename and error.errno in FULL:
                error.filename = "stdout"  # files have their names
            print(f"vpcodec: {explain(error)}", file=sys.stderr)
            sys.exit(2)


@contextmanager
def _interruptible() -> Iterator[None]:
    """A context in which Ctrl-C, SIGTERM and SIGHUP end the program with code 128 and their number,
    whatever happens to the exception.

    An import of compiled code may turn KeyboardInterrupt into another exception. Where an exception
    cannot propagate, as in callbacks during imports, it would be printed and dropped; it is raised
    again. Signals that are ignored, as under nohup, stay so.
    """
    received, hook = 0, sys.unraisablehook  # the first signal
    before: dict[int, Any] = {}

    def interrupt(number: int, frame: Any) -> None:
        nonlocal received
        received = received or number
        raise KeyboardInterrupt

    def unraisable(problem: Any) -> None:
        if received and issubclass(problem.exc_type, KeyboardInterrupt):
            _thread.start_new_thread(interrupt_again, ())
        else:
            hook(problem)

    def interrupt_again() -> None:
        time.sleep(0.01)  # until the main thread is out of there
        _thread.interrupt_main(received)

    try:
        for number in _SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, interrupt)
    except ValueError:  # not the main thread: signals are somebody else's
        pass
    try:
        if before:
            sys.unraisablehook = unraisable
        yield
    except BaseException:
        if received:
            sys.exit(128 + received)
        raise
    finally:
        if before:
            sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _logged() -> Iterator[None]:
    """Warnings of the package are lines on stderr."""
    import logging

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("vpcodec: %(message)s"))
    logger = logging.getLogger("vpcodec")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def _flushed() -> Iterator[None]:
    """What is printed inside has left the program at the end; else an OSError that names stdout."""
    try:
        yield
    finally:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError as error:
            error.filename = "stdout"
            raise


def _drop_stdout() -> None:
    """Where stdout takes no more, let Python's own flush at the exit have somewhere to go."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
