"""Records: the tokens of clips, with all that their headers hold, in NPZ, Parquet and JSON lines.

docs/language-models.md has the columns. Tokens are stored in the smallest unsigned integer type
that holds the codebook, and read as int64. Nothing is pickled, and sizes that a file states are
checked before anything is allocated.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from .media.files import atomic_output
from .tokenfile import MAX_BLOCK_TOKENS, AudioHeader, ImageHeader, TokenFileError, TokenHeader

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".npz", ".parquet", ".jsonl")  # of files of records
BARE_SUFFIX = ".npy"  # one array, without a header
MAX_BYTES = 2**31  # of an array, a line or a row group
BLOCK_FRAMES = 2048  # of audio in the token file that a record becomes
ROWS = 256  # records in a row group of Parquet

GROUP_TOKENS = 2**22  # after which a row group ends

_HEADERS = "headers.json"  # in an NPZ file
_COMMON = {  # column: type
    "key": "string",
    "tokens": "binary",
    "dtype": "string",
    "channels": "int32",
    "frames": "int64",
    "kind": "string",
    "model": "string",
    "fingerprint": "string",
    "codebook_size": "int64",
    "hop_length": "int32",
}
_OF_AUDIO = {
    "sample_rate": "int32",
    "original_rate": "int32",
    "n_samples": "int64",
    "duration": "float64",
}
_OF_IMAGE = {"width": "int32", "height": "int32", "components": "int32"}
_ORIGIN = {"source": "string", "start": "int64"}


class RecordError(ValueError):
    """A file of records that cannot be read or written; one line."""


@dataclass(frozen=True, eq=False)
class Record:
    """The tokens of a clip or an image.

    Attributes:
        key: its name in the file.
        tokens: int64 (channels, frames); of an array without a header, any shape.
        header: as in a token file, with the number of samples; None: a bare array.
        source: path of what was encoded; may be empty.
        start: of the clip in its source, samples at the original rate.
    """

    key: str
    tokens: NDArray[np.int64]
    header: TokenHeader | None
    source: str = ""
    start: int = 0


def smallest_dtype(codebook_size: int) -> np.dtype[Any]:
    """The smallest unsigned little-endian integer type that holds all tokens."""
    kinds = ("<u1", "<u2", "<u4")
    return next(np.dtype(kind) for kind in kinds if codebook_size <= 2 ** (8 * int(kind[2])))


def facts_of(record: Record) -> dict[str, Any]:
    """All but the tokens, by column, as plain numbers and text.

    Raises:
        RecordError: a record without a header, or whose tokens do not fit it.
    """
    header = record.header
    if header is None:
        raise RecordError(f"{record.key}: an array without a header")
    if record.tokens.shape != (header.channels, header.n_frames):
        raise RecordError(
            f"{record.key}: tokens of shape {record.tokens.shape}, but a header for "
            f"({header.channels}, {header.n_frames})"
        )
    facts: dict[str, Any] = {
        "key": record.key,
        "dtype": smallest_dtype(header.codebook_size).name,
        "channels": header.channels,
        "frames": header.n_frames,
        "kind": "image" if isinstance(header, ImageHeader) else "audio",
        "model": header.model,
        "fingerprint": header.fingerprint.hex(),
        "codebook_size": header.codebook_size,
        "hop_length": header.hop_length,
    }
    if isinstance(header, AudioHeader):
        n_samples = cast(int, header.n_samples)  # as n_frames is known
        facts |= {
            "sample_rate": header.sample_rate,
            "original_rate": header.original_rate,
            "n_samples": n_samples,
            "duration": n_samples / header.original_rate,
        }
    else:
        facts |= {name: getattr(header, name) for name in _OF_IMAGE}
    return facts | {"source": record.source, "start": record.start}


def record_of(facts: dict[str, Any], tokens: NDArray[Any] | bytes) -> Record:
    """The record with these facts, as `facts_of` gives them.

    Args:
        facts: by column.
        tokens: (channels, frames) integers, or their bytes.

    Raises:
        RecordError: facts that are missing, wrong or do not fit the tokens.
    """
    key = str(facts.get("key"))
    try:
        common = {name: facts[name] for name in ("model", "channels", "hop_length")}
        common |= {
            "fingerprint": bytes.fromhex(facts["fingerprint"]),
            "codebook_size": facts["codebook_size"],
        }
        header: TokenHeader
        if facts["kind"] == "audio":
            own = {name: facts[name] for name in ("sample_rate", "original_rate", "n_samples")}
            own["block_frames"] = min(BLOCK_FRAMES, MAX_BLOCK_TOKENS // max(1, facts["channels"]))
            header = AudioHeader(**common, **own)
        elif facts["kind"] == "image":
            header = ImageHeader(**common, **{name: facts[name] for name in _OF_IMAGE})
        else:
            raise RecordError(f"{key}: kind {facts['kind']!r} is neither audio nor image")
        start = int(facts.get("start") or 0)
    except KeyError as error:
        raise RecordError(f"{key}: no column {error}") from None
    except TokenFileError as error:
        raise RecordError(f"{key}: {error}") from None
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, RecordError) else RecordError(f"{key}: {error}") from None
    if header.n_frames is None:
        raise RecordError(f"{key}: n_samples is missing")
    shape = header.channels, header.n_frames
    dtype = smallest_dtype(header.codebook_size)
    if isinstance(tokens, bytes):
        if facts.get("dtype", dtype.name) != dtype.name:
            raise RecordError(f"{key}: tokens of type {facts['dtype']!r}, not {dtype.name}")
        if len(tokens) != math.prod(shape) * dtype.itemsize:
            raise RecordError(f"{key}: {len(tokens)} bytes of tokens, not those of {shape}")
        tokens = np.frombuffer(tokens, dtype).reshape(shape)
    if tokens.shape != shape or tokens.dtype.kind not in "iu":
        raise RecordError(f"{key}: {tokens.dtype} tokens of shape {tokens.shape}, not {shape}")
    bad = (tokens < 0) | (tokens >= header.codebook_size)
    if bad.any():
        channel, frame = np.argwhere(bad)[0]
        raise RecordError(
            f"{key}: token {tokens[channel, frame]} at channel {channel}, frame {frame} is outside "
            f"[0, {header.codebook_size})"
        )
    return Record(key, tokens.astype(np.int64), header, str(facts.get("source") or ""), start)


def token_bytes(record: Record) -> bytes:
    """The tokens in their smallest type, channel by channel."""
    header = cast(TokenHeader, record.header)
    return record.tokens.astype(smallest_dtype(header.codebook_size)).tobytes()


# ----------------------------------------------------------------------------------------- writing


def write_records(path: str | os.PathLike[str], records: Iterable[Record]) -> int:
    """Write records to a file, which appears complete or not at all.

    Args:
        path: ends in .npz, .parquet (which needs pyarrow) or .jsonl.
        records: with headers; of one kind, audio or images, and with different keys.

    Returns:
        Number of records.

    Raises:
        RecordError: another suffix, a record without a header, or a key that occurs twice.
        OSError: the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise RecordError(f"{path}: the suffix must be one of {' '.join(SUFFIXES)}")
    write: Callable[[BinaryIO, Iterator[Record]], None] = {
        ".npz": _write_npz,
        ".parquet": write_parquet,
        ".jsonl": _write_lines,
    }[suffix]
    seen: set[str] = set()

    def each() -> Iterator[Record]:
        for record in records:
            if record.key in seen:
                raise RecordError(f"{path}: the key {record.key!r} twice")
            seen.add(record.key)
            yield record

    with atomic_output(path) as file:
        write(file, each())
    return len(seen)


def _write_npz(file: BinaryIO, records: Iterator[Record]) -> None:
    headers = {}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:

        def entry(name: str) -> Any:  # of no date, so that equal tokens are equal files
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            return archive.open(info, "w", force_zip64=True)

        for record in records:
            headers[record.key] = facts_of(record)
            array = record.tokens.astype(headers[record.key]["dtype"])
            with entry(f"{record.key}.npy") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
        with entry(_HEADERS) as member:
            member.write(json.dumps(headers, indent=1).encode())


def _write_lines(file: BinaryIO, records: Iterator[Record]) -> None:
    for record in records:
        facts = facts_of(record) | {"tokens": record.tokens.tolist()}
        del facts["dtype"]
        file.write(json.dumps(facts).encode() + b"\n")


def write_parquet(file: BinaryIO, records: Iterator[Record]) -> None:
    """Write records of one kind as Parquet with zstd; the same records are the same bytes.

    Raises:
        RecordError: no pyarrow, a record without a header, or of another kind than the first.
    """
    parquet = _parquet()
    first = next(records, None)
    kind = facts_of(first)["kind"] if first else "audio"
    schema = _schema(kind)
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for group in _groups(chain([first] if first else [], records)):
            rows = [_row(record, kind) for record in group]
            writer.write_table(_arrow().Table.from_pylist(rows, schema), row_group_size=ROWS)


def _groups(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records in groups of at most ROWS, and fewer of long ones, which bounds memory."""
    group: list[Record] = []
    for record in records:
        group.append(record)
        if len(group) == ROWS or sum(x.tokens.size for x in group) >= GROUP_TOKENS:
            yield group
            group = []
    if group:
        yield group


def _row(record: Record, kind: str) -> dict[str, Any]:
    facts = facts_of(record)
    if facts["kind"] != kind:
        raise RecordError(f"{record.key}: audio and images cannot be in one table")
    return facts | {"tokens": token_bytes(record)}


def _schema(kind: str) -> pyarrow.Schema:
    columns = _COMMON | (_OF_IMAGE if kind == "image" else _OF_AUDIO) | _ORIGIN
    return _arrow().schema([(name, getattr(_arrow(), of)()) for name, of in columns.items()])


def _arrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise RecordError(
            "Parquet needs pyarrow; install it with: pip install 'vpcodec[corpus]'"
        ) from None
    return pyarrow


def _parquet() -> Any:
    _arrow()
    import pyarrow.parquet

    return pyarrow.parquet


# ----------------------------------------------------------------------------------------- reading


class RecordFile:
    """A file of records, or a single array, from which records are read one by one.

    A context manager. Use it in one thread at a time.

    Args:
        path: ends in .npz, .parquet, .jsonl or .npy.

    Attributes:
        keys: of all records, in their order.

    Raises:
        RecordError: the file is damaged or of another format.
        OSError: it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        openers: dict[str, Callable[[BinaryIO], tuple[list[str], Callable[[int], Record]]]] = {
            ".npz": _open_npz,
            ".parquet": _open_parquet,
            ".jsonl": _open_lines,
            BARE_SUFFIX: self._open_bare,
        }
        suffix = Path(path).suffix.lower()
        if suffix not in openers:
            raise RecordError(f"{path}: the suffix must be one of {' '.join(openers)}")
        with ExitStack() as stack:
            file = stack.enter_context(open(path, "rb"))
            with self._named():
                self.keys, self._read = openers[suffix](file)
            self._stack = stack.pop_all()

    def read(self, number: int) -> Record:
        """A record by its number.

        Raises:
            RecordError: it is damaged, or a token is out of range (with its place).
        """
        with self._named():
            return self._read(number)

    def __iter__(self) -> Iterator[Record]:
        return (self.read(number) for number in range(len(self.keys)))

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except RecordError as error:
            raise RecordError(f"{self.path}: {error}") from None
        except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RecordError(f"{self.path}: {reason}") from None

    def _open_bare(self, file: BinaryIO) -> tuple[list[str], Callable[[int], Record]]:
        key = Path(self.path).stem
        size = os.fstat(file.fileno()).st_size

        def read(number: int) -> Record:
            file.seek(0)
            return Record(key, read_array(file, size), None)

        read(0)
        return [key], read


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """All records of a file; `RecordFile` reads one after another.

    Raises:
        RecordError: the file is damaged.
        OSError: it cannot be read.
    """
    with RecordFile(path) as file:
        return list(file)


def read_array(file: Any, size: int) -> NDArray[np.int64]:
    """An array of integers in the format of .npy, which takes `size` bytes, as int64.

    Raises:
        RecordError: something else.
    """
    version = np.lib.format.read_magic(file)
    headers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in headers:
        raise RecordError(f"version {version} of .npy is not known")
    shape, fortran, dtype = headers[version](file)
    if dtype.kind not in "iu":
        raise RecordError(f"tokens must be integers, got {dtype}")
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes > MAX_BYTES or file.tell() + n_bytes != size:
        raise RecordError(f"{size} bytes are not an array of shape {shape} and type {dtype}")
    array = np.frombuffer(file.read(n_bytes), dtype).reshape(shape, order="F" if fortran else "C")
    if array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise RecordError(f"token {array.max()} is too large")
    return array.astype(np.int64)


def _open_npz(file: BinaryIO) -> tuple[list[str], Callable[[int], Record]]:
    archive = zipfile.ZipFile(file)
    members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
    keys = [info.filename.removesuffix(".npy") for info in members]
    headers: dict[str, Any] = {}
    if any(info.filename == _HEADERS for info in archive.infolist()):
        if archive.getinfo(_HEADERS).file_size > MAX_BYTES:
            raise RecordError(f"{_HEADERS} is too large")
        headers = json.loads(archive.read(_HEADERS))
        if not isinstance(headers, dict):
            raise RecordError(f"{_HEADERS} is not a JSON object")

    def read(number: int) -> Record:
        info, key = members[number], keys[number]
        with archive.open(info) as member:
            try:
                tokens = read_array(member, info.file_size)
            except ValueError as error:
                raise RecordError(f"{key}: {error}") from None
        if not headers:
            return Record(key, tokens, None)
        if not isinstance(headers.get(key), dict):
            raise RecordError(f"{key}: not in {_HEADERS}")
        return record_of(headers[key] | {"key": key}, tokens)

    return keys, read


def _open_lines(file: BinaryIO) -> tuple[list[str], Callable[[int], Record]]:
    keys: list[str] = []
    places: list[int] = []

    def line() -> dict[str, Any] | None:
        text = file.readline(MAX_BYTES)
        if not text:
            return None
        try:
            facts = json.loads(text)
            if isinstance(facts, dict) and isinstance(facts.get("key"), str):
                return facts
        except (ValueError, RecursionError):
            pass
        raise RecordError(f"line {len(keys) + 1} is not a JSON object with a key")

    while True:
        place = file.tell()
        facts = line()
        if facts is None:
            break
        keys.append(facts["key"])
        places.append(place)

    def read(number: int) -> Record:
        file.seek(places[number])
        facts = line() or {}
        try:
            tokens = np.array(facts.get("tokens"))
        except ValueError:
            raise RecordError(f"{keys[number]}: the channels differ in length") from None
        if not tokens.size and tokens.ndim == 2:
            tokens = tokens.astype(np.int64)
        if tokens.dtype.kind not in "iu":
            raise RecordError(f"{keys[number]}: tokens must be lists of integers")
        if "kind" not in facts:
            return Record(keys[number], tokens.astype(np.int64), None)
        return record_of(facts, tokens)

    return keys, read


def _open_parquet(file: BinaryIO) -> tuple[list[str], Callable[[int], Record]]:
    try:
        table = _parquet().ParquetFile(file)
        names = set(table.schema_arrow.names)
        if missing := {"key", "tokens"} - names:
            raise RecordError(f"no column {min(missing)!r}; see docs/language-models.md")
        keys = [str(key) for key in table.read(columns=["key"])["key"].to_pylist()]
    except _arrow().ArrowException as error:
        raise RecordError((str(error).splitlines() or ["not Parquet"])[0]) from None
    groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
    ends = np.cumsum([0, *(group.num_rows for group in groups)])
    wanted = [*_COMMON, *_OF_AUDIO, *_OF_IMAGE, *_ORIGIN]
    columns = [name for name in wanted if name in names]
    current: tuple[int, list[dict[str, Any]]] = (-1, [])

    def read(number: int) -> Record:
        nonlocal current
        group = int(np.searchsorted(ends, number, "right")) - 1
        if current[0] != group:
            if groups[group].total_byte_size > MAX_BYTES:
                raise RecordError(f"row group {group} has more than {MAX_BYTES} bytes")
            try:
                current = group, table.read_row_group(group, columns).to_pylist()
            except _arrow().ArrowException as error:
                raise RecordError((str(error).splitlines() or ["damaged"])[0]) from None
        facts = dict(current[1][number - int(ends[group])])
        tokens = facts.pop("tokens")
        if not isinstance(tokens, bytes):
            try:
                tokens = np.array(tokens, np.int64)
            except (TypeError, ValueError):
                raise RecordError(f"{keys[number]}: tokens are neither bytes nor lists") from None
        if "kind" not in facts and not isinstance(tokens, bytes):
            return Record(keys[number], tokens, None)
        return record_of(facts, tokens)

    return keys, read


# -------------------------------------------------------------------------------------------- keys


def path_of_key(key: str) -> PurePosixPath:
    """A key as a relative path that stays below the folder it is put into.

    Raises:
        RecordError: it would not.
    """
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts or not path.name or not key.isprintable():
        raise RecordError(f"the key {key!r} is no relative path")
    if "\\" in key or any(len(part.encode()) > 200 for part in path.parts):
        raise RecordError(f"the key {key!r} cannot name a file")
    return path
