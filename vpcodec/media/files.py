"""Files to read in a folder, and output files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def find_files(
    folder: str | os.PathLike[str], suffixes: Collection[str], *, recursive: bool = True
) -> list[Path]:
    """The files in `folder` with one of `suffixes`: sorted paths relative to it, nothing hidden.

    Raises OSError where a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    found = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        paths = (Path(parent, name) for name in names if not name.startswith("."))
        found += [path.relative_to(folder) for path in paths if path.suffix.lower() in suffixes]
    return sorted(found)


def find_others(folder: str | os.PathLike[str]) -> list[Path]:
    """All that is in `folder` and below and is no folder, and links to folders, which nothing
    follows: sorted paths relative to it, nothing hidden."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        names = [name for name in names if not name.startswith(".")]
        found += [Path(parent, name).relative_to(folder) for name in (*names, *links)]
    return sorted(found)


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
        with _naming(path, path), open(path, "wb") as file:
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
        with _naming(path, temporary), open(temporary, "xb") as file:
            yield file
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextmanager
def naming(name: str, kind: type[Exception]) -> Iterator[None]:
    """Turn errors of a `kind`, and of the system, into ones of it that begin with `name`.

    A broken pipe stays what it is.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except kind as error:
        raise kind(f"{name}: {error}") from error.__cause__
    except OSError as error:
        raise kind(f"{name}: {error.strerror or error}") from error


@contextmanager
def _naming(path: str | os.PathLike[str], opened: str | os.PathLike[str]) -> Iterator[None]:
    """Give an OSError the name of the output where it has none or that of the file `opened`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename in (None, opened):
            error.filename = os.fspath(path)
        raise


@contextmanager
def atomic_folder(path: Path, *, force: bool = False, mark: str = "") -> Iterator[Path]:
    """A folder to fill that takes the place of `path` at the end, or leaves no trace.

    Args:
        path: of the folder.
        force: replace a folder that exists, if it is empty or holds a file called `mark`.

    Raises:
        FileExistsError: `path` exists, or does so at the end, and may not be replaced.
    """

    def refuse_existing() -> None:
        if os.path.lexists(path):
            if not force:
                raise FileExistsError(f"{path}: exists (use --force to replace it)")
            if not path.is_dir() or (any(path.iterdir()) and not (path / mark).is_file()):
                raise FileExistsError(f"{path}: exists and is not replaced, as it has no {mark}")

    refuse_existing()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
        folder, replaced = Path(temporary) / path.name, Path(temporary) / "replaced"
        folder.mkdir()
        yield folder
        refuse_existing()
        if path.exists():
            os.rename(path, replaced)
        try:
            os.rename(folder, path)
        except OSError as error:
            if replaced.exists():
                os.rename(replaced, path)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster
                raise FileExistsError(f"{path}: exists (use --force to replace it)") from None
            raise
