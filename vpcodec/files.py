"""Output files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO


@contextmanager
def atomic_output(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open `path` for writing so that nobody ever sees it half written.

    The data go to a hidden file beside `path`, which takes its place at the end; on any exception,
    KeyboardInterrupt included, the hidden file is removed and `path` stays as it was. A symbolic
    link keeps pointing to its target, which is the file replaced. Devices and named pipes cannot
    be replaced and are written directly.

    Raises OSError (FileNotFoundError, IsADirectoryError, PermissionError, ...) where that fails.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", os.fspath(path))
    if os.path.exists(path) and not os.path.isfile(path):
        with _naming(path), open(path, "wb") as file:
            yield file
        return
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "its folder does not exist", os.fspath(path))
    if os.path.exists(target) and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "it is write-protected", os.fspath(path))
    temporary = os.path.join(folder, f".{os.urandom(8).hex()}.tmp")
    try:
        with _naming(path), open(temporary, "xb") as file:
            yield file
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give an OSError the name of the output where it has none or that of the hidden file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or _is_hidden(error.filename)):
            error.filename = os.fspath(path)
        raise


def _is_hidden(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".tmp")
