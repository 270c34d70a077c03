"""The command line: one thin module per command.

Imports here take no time, so that Ctrl-C is handled from the beginning.
"""

from __future__ import annotations

import _thread
import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2, never a traceback.

    Ctrl-C ends with code 130 and no message, even while modules are imported.
    """
    if sys.stderr is None:  # closed; print would take stdout instead
        sys.stderr = open(os.devnull, "w")
    with _interruptible():
        from .app import app
        from .errors import USER_ERRORS, explain

        try:
            with _flushed():
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
    """A context in which Ctrl-C ends the program with code 130, whatever happens to the exception.

    An import of compiled code may turn KeyboardInterrupt into another exception. Where an exception
    cannot propagate, as in callbacks during imports, it would be printed and dropped; it is raised
    again.
    """
    interrupted, hook = False, sys.unraisablehook

    def interrupt(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    def unraisable(problem: Any) -> None:
        if interrupted and issubclass(problem.exc_type, KeyboardInterrupt):
            _thread.start_new_thread(interrupt_again, ())
        else:
            hook(problem)

    def interrupt_again() -> None:
        time.sleep(0.01)  # until the main thread is out of there
        _thread.interrupt_main()

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored
    try:
        if ours:
            signal.signal(signal.SIGINT, interrupt)
    except ValueError:  # not the main thread: signals are somebody else's
        ours = False
    try:
        if ours:
            sys.unraisablehook = unraisable
        yield
    except BaseException:
        if interrupted:
            sys.exit(130)
        raise
    finally:
        if ours:
            sys.unraisablehook = hook
            signal.signal(signal.SIGINT, signal.default_int_handler)


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
