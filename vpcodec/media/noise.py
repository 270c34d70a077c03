"""What C libraries write to stderr while they read a file, told with the file's name instead."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

MAX_TOLD = 3  # different lines per file
_log = logging.getLogger(__name__)
_lock = threading.Lock()  # the descriptor is that of the whole process


@contextmanager
def overheard() -> Iterator[list[str]]:
    """A list that holds, at the end, the lines that were written to file descriptor 2 meanwhile.

    One thread at a time; the others wait.
    """
    lines: list[str] = []
    with _lock, tempfile.TemporaryFile() as file:
        try:
            stderr = os.dup(2)
        except OSError:  # it is closed
            yield lines
            return
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            lines += file.read(2**16).decode(errors="replace").splitlines()


def tell(name: str, lines: list[str]) -> None:
    """Log what was overheard of the file `name`, each line once, as warnings."""
    different = list(dict.fromkeys(filter(None, map(str.strip, lines))))
    for line in different[:MAX_TOLD]:
        _log.warning("%s: %s", name, line)
    if len(different) > MAX_TOLD:
        _log.warning("%s: and %d more such lines", name, len(different) - MAX_TOLD)
