"""Files to read in a folder, and output files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO, cast

try:
    import fcntl
except ImportError:  # Windows: nothing that a killed run left is removed there
    fcntl = None  # type: ignore[assignment]

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # what a disk says that has no more room
_STREAMS = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}


def find_files(
    folder: str | os.PathLike[str],
    suffixes: Collection[str],
    *,
    recursive: bool = True,
    skipped: Callable[[Path], None] | None = None,
) -> list[Path]:
    """The files in `folder` with one of `suffixes`: sorted paths relative to it, nothing hidden.

    Links are followed to files. Pipes, devices, sockets and links that lead back to themselves are
    left out and not opened; `skipped` is told each, relative to `folder`. A link to nothing counts
    as a file, which is missing. Raises OSError where a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    found = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        paths = (Path(parent, name) for name in names if not name.startswith("."))
        found += [path.relative_to(folder) for path in paths if path.suffix.lower() in suffixes]
    kept = []
    for path in sorted(found):
        if _may_be_read(Path(folder, path)):
            kept.append(path)
        elif skipped is not None:
            skipped(path)
    return kept


def _may_be_read(path: Path) -> bool:
    """Whether it is a regular file, or missing, which is an error of its own."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return True
    except OSError as error:
        return error.errno != errno.ELOOP


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


def is_device(path: str | os.PathLike[str]) -> bool:
    """Whether a path is no file or folder, but a device, a pipe, or one of the names under which a
    shell passes on its own streams, whatever these are."""
    if _descriptor(path) is not None:
        return True
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


@contextmanager
def appended(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file or a device to write at the end of. An OSError names `path`."""
    with _opened(path, "ab") as file:
        yield file


@contextmanager
def _opened(path: str | os.PathLike[str], mode: str) -> Iterator[BinaryIO]:
    stream = _descriptor(path)
    with _naming(path, path), open(path if stream is None else os.dup(stream), mode) as file:
        yield cast(BinaryIO, file)


def _descriptor(path: str | os.PathLike[str]) -> int | None:
    """The number of a stream that has a name."""
    name = os.fspath(path)
    if name in _STREAMS:
        return _STREAMS[name]
    number = name.removeprefix("/dev/fd/")
    return int(number) if number != name and number.isdecimal() else None


@contextmanager
def atomic_output(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open `path` for writing so that nobody ever sees it half written.

    The data go to a hidden file beside `path`, which takes its place at the end; on any exception,
    KeyboardInterrupt included, the hidden file is removed and `path` stays as it was. What a
    process that was killed left for `path` is removed first. A symbolic link keeps pointing to its
    target, which is the file replaced; its mode stays what it was. What `is_device` cannot be
    replaced and is written directly, wherever it stands.

    Raises OSError (FileNotFoundError, IsADirectoryError, PermissionError, ...) where that fails;
    it names `path`.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", os.fspath(path))
    if is_device(path):
        with _opened(path, "wb") as device:
            yield device
        return
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "its folder does not exist", os.fspath(path))
    with _naming(path, target), suppress(FileNotFoundError):
        os.lstat(target)  # a name that is too long is refused before anything is computed
    if os.path.exists(target) and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "it is write-protected", os.fspath(path))
    with _hidden_file(path, target) as file, _naming(path, file.name):
        with suppress(OSError):  # a new file, or one on a disk without modes
            os.chmod(file.name, stat.S_IMODE(os.stat(target).st_mode))
        try:
            yield file
        except BaseException:
            with suppress(OSError):  # of what could not be written; the first error counts
                file.close()
            raise
        file.close()
        os.replace(file.name, target)


@contextmanager
def _hidden_file(path: str | os.PathLike[str], target: str) -> Iterator[BinaryIO]:
    """A new hidden file beside `target`; at the end it is removed unless it has another name.

    The name follows from that of `target`, so that the next run finds what a killed one left: a
    file that nobody locks. Files that are locked are of others who write the same just now.
    """
    folder, name = os.path.split(target)
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
    hidden, lock = "", None
    try:
        for i in count():
            hidden = os.path.join(folder, f".{digest}-{i}.tmp")
            _remove_abandoned(hidden)
            try:
                file = open(hidden, "xb")
            except FileExistsError:
                continue
            except OSError as error:
                error.filename = os.fspath(path)
                raise
            lock = os.dup(file.fileno())
            if _lock(lock) and _is_at(lock, hidden):
                break
            os.close(lock)  # another process took it for abandoned before it was locked
            lock = None
            file.close()
        yield file
    finally:  # an interrupt may have come anywhere
        if lock is None:
            _remove_abandoned(hidden)
        else:
            _remove_own(hidden, lock)


def _remove_own(path: str, lock: int) -> None:
    """Remove a hidden file, if it is still there, and unlock it."""
    ours = _is_at(lock, path)
    if fcntl is None:  # where a file that is open cannot be removed
        os.close(lock)
    if ours:
        with suppress(OSError):
            os.unlink(path)
    if fcntl is not None:
        os.close(lock)


def _remove_abandoned(path: str) -> None:
    """Remove a hidden file whose process is gone."""
    if fcntl is None:
        return
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                os.unlink(path)
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a file; false where another process has. Where the system has no locks all is well."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass
    return True


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


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
        raise type(error)(f"{name}: {error}") from error.__cause__
    except OSError as error:
        raise kind(f"{name}: {error.strerror or error}") from error


@contextmanager
def spooling() -> Iterator[None]:
    """Say of a disk that is full that it is the one with temporary files."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            error.strerror = f"{error.strerror} in the temporary folder {tempfile.gettempdir()}"
        raise


@contextmanager
def _naming(path: str | os.PathLike[str], opened: str | os.PathLike[str]) -> Iterator[None]:
    """Give an OSError the name of the output where it has none or that of the file `opened`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename in (None, opened):
            error.filename, error.filename2 = os.fspath(path), None
        raise


@contextmanager
def _hidden_folder(path: Path) -> Iterator[str]:
    """A folder beside `path` that is removed at the end; errors about it name `path`."""
    temporary = path.parent / f".{path.name}-"
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=temporary.name) as folder:
            yield folder
    except OSError as error:
        if str(error.filename or "").startswith(str(temporary)):
            error.filename, error.filename2 = str(path), None
        raise


class FolderExistsError(FileExistsError):
    """A folder that is there already, and would have been replaced had that been asked for."""


@contextmanager
def atomic_folder(path: Path, *, force: bool = False, mark: str = "") -> Iterator[Path]:
    """A folder to fill that takes the place of `path` at the end, or leaves no trace.

    Args:
        path: of the folder.
        force: replace a folder that exists, if it is empty or holds a file called `mark`.

    Raises:
        FolderExistsError: `path` exists, or does so at the end, and not `force`.
        FileExistsError: it may not be replaced in any case.
    """

    def refuse_existing() -> None:
        if os.path.lexists(path):
            if not force:
                raise FolderExistsError(f"{path}: exists")
            if not path.is_dir() or (any(path.iterdir()) and not (path / mark).is_file()):
                raise FileExistsError(f"{path}: exists and is not replaced, as it has no {mark}")

    refuse_existing()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _hidden_folder(path) as temporary:
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
                raise FolderExistsError(f"{path}: exists") from None
            raise
