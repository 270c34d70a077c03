"""Files to read in a folder, and output files that appear complete or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import count, takewhile
from pathlib import Path
from typing import BinaryIO, cast

try:
    import fcntl
except ImportError:  # Windows, where the remains of killed runs are not removed
    fcntl = None  # type: ignore[assignment]

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # what a disk says that has no more room
_STREAMS = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)  # to open one
_MADE, _REPLACED = "made", "replaced"  # in a hidden folder: the result; what makes room for it


def find_files(
    folder: str | os.PathLike[str],
    suffixes: Collection[str],
    *,
    recursive: bool = True,
    skipped: Callable[[Path], None] | None = None,
) -> list[Path]:
    """The files in `folder` with one of `suffixes`, without hidden ones.

    Links to files are followed. Pipes, devices, sockets and circular links are left out and not
    opened. A broken link is listed as a file, which is then missing.

    Args:
        folder: the folder.
        suffixes: suffixes in lower case.
        recursive: whether to search folders below.
        skipped: called with each path that is left out, relative to `folder`.

    Returns:
        Sorted paths relative to `folder`.

    Raises:
        OSError: a folder cannot be read.
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
    """Whether a path is a regular file, or missing, which is reported when it is read."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return True
    except OSError as error:
        return error.errno != errno.ELOOP


def find_others(folder: str | os.PathLike[str]) -> list[Path]:
    """Everything below `folder` except folders, without hidden paths.

    Links to folders are listed, because nothing follows them.

    Returns:
        Sorted paths relative to `folder`.
    """
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


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a regular file for reading. Raises OSError for others, and does not wait for a pipe."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    file = open(path, "rb", opener=opener)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
    return file


@contextmanager
def atomic_output(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open `path` for writing such that it is never seen half written.

    The data go to a hidden file beside `path`, which replaces it at the end. After an exception,
    including KeyboardInterrupt, the hidden file is removed and `path` is unchanged. The remains of
    killed processes that wrote `path` are removed first. If `path` is a symbolic link, its target
    is replaced; the mode of a file that is replaced is kept. Where `is_device`, `path` is written
    directly.

    Raises:
        OSError (FileNotFoundError, IsADirectoryError, PermissionError, ...): that failed; the error
            names `path`.
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
            with suppress(OSError):  # writing may fail again; the first error counts
                file.close()
            raise
        file.close()
        os.replace(file.name, target)


@contextmanager
def _hidden_file(path: str | os.PathLike[str], target: str) -> Iterator[BinaryIO]:
    """A new hidden file beside `target`, removed at the end unless it has been renamed.

    Its name is derived from that of `target`, so that later runs find the remains of killed ones:
    files that are not locked. Locked files belong to processes that are writing the same target.
    """
    hidden, lock = "", None
    try:
        for hidden in _hidden_names(target):
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
            os.close(lock)  # another process removed it before it was locked
            lock = None
            file.close()
        yield file
    finally:  # an interrupt may have come anywhere
        if lock is None:
            _remove_abandoned(hidden)
        else:
            _remove_own(hidden, lock)


def _hidden_names(target: str) -> Iterator[str]:
    """Paths beside `target` for unfinished output, one for each writer of the same name."""
    folder, name = os.path.split(target)
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
    return (os.path.join(folder, f".{digest}-{i}.tmp") for i in count())


def _remove_own(path: str, lock: int) -> None:
    """Remove a hidden file, if it still exists, and unlock it."""
    ours = _is_at(lock, path)
    if fcntl is None:  # Windows, where open files cannot be removed
        os.close(lock)
    if ours:
        with suppress(OSError):
            os.unlink(path)
    if fcntl is not None:
        os.close(lock)


def _remove_abandoned(path: str) -> None:
    """Remove a hidden file whose process has ended."""
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
    """Lock a file; False if another process has locked it. True if the system has no locks."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass
    return True


def _is_at(descriptor: int, path: str) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


@contextmanager
def naming(name: str, kind: type[Exception]) -> Iterator[None]:
    """Prefix the messages of errors of type `kind` with `name`, and turn OSErrors into that type.

    BrokenPipeError passes through.
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
    """Name `path` in OSErrors that name no file, or the file `opened`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename in (None, opened):
            error.filename, error.filename2 = os.fspath(path), None
        raise


@contextmanager
def _hidden_folder(path: Path) -> Iterator[Path]:
    """A new hidden folder beside `path`, removed at the end; errors about it name `path`.

    It is locked and named as `_hidden_file` is.
    """
    hidden, lock = "", None
    try:
        for hidden in _hidden_names(str(path)):
            try:
                os.mkdir(hidden, 0o700)
            except FileExistsError:
                continue
            if fcntl is None:
                break
            with suppress(FileNotFoundError):  # taken for abandoned before it was locked
                lock = os.open(hidden, _FOLDER)
                if _lock(lock) and _is_at(lock, hidden):
                    break
                os.close(lock)
                lock = None
        yield Path(hidden)
    except OSError as error:
        if hidden and str(error.filename or "").startswith(hidden):
            error.filename, error.filename2 = str(path), None
        raise
    finally:  # an interrupt may have come anywhere
        if fcntl is None:
            shutil.rmtree(hidden, ignore_errors=True)
        elif lock is None:
            _remove_abandoned_folder(hidden, path)
        else:
            if _is_at(lock, hidden):
                shutil.rmtree(hidden, ignore_errors=True)
            os.close(lock)


def _remove_abandoned_folder(hidden: str, path: Path) -> None:
    """Remove a hidden folder whose process is gone.

    What the process had already moved out of the way of its result takes its place again.
    """
    if fcntl is None:
        return
    with suppress(OSError):
        descriptor = os.open(hidden, _FOLDER)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, hidden):
                replaced = Path(hidden, _REPLACED)
                if replaced.exists() and not os.path.lexists(path):
                    os.rename(replaced, path)
                shutil.rmtree(hidden)
        finally:
            os.close(descriptor)


class FolderExistsError(FileExistsError):
    """A folder exists already; it could be replaced, but that was not asked for."""


@contextmanager
def atomic_folder(path: Path, *, force: bool = False, mark: str = "") -> Iterator[Path]:
    """A folder to fill, which becomes `path` at the end, or is removed after an exception.

    What processes that were killed left for `path` is removed first.

    Args:
        path: path of the folder.
        force: replace an existing folder, if it is empty or contains a file named `mark`.
        mark: name of the file that identifies folders which may be replaced.

    Raises:
        FolderExistsError: `path` exists, at the beginning or at the end, and `force` is not set.
        FileExistsError: `path` exists and must not be replaced.
    """

    def refuse_existing() -> None:
        if os.path.lexists(path):
            if not force:
                raise FolderExistsError(f"{path}: exists")
            if not path.is_dir() or (any(path.iterdir()) and not (path / mark).is_file()):
                raise FileExistsError(f"{path}: exists and is not replaced, as it has no {mark}")

    for hidden in takewhile(os.path.lexists, _hidden_names(str(path))):
        _remove_abandoned_folder(hidden, path)
    refuse_existing()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _hidden_folder(path) as temporary:
        folder, replaced = temporary / _MADE, temporary / _REPLACED
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
