"""What is tokenised: the recordings in folders, globs, manifests, Lhotse cuts, tars and Parquet."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import math
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..media.audio import AUDIO_SUFFIXES, AudioReader
from ..media.files import find_files

MANIFESTS = (".tsv", ".jsonl", ".jsonl.gz")
BYTES_PER_SECOND = 32_000  # of a part of a recording, when shards are planned
MAX_MEMBER = 2**31  # bytes of a recording inside a tar or a table
MAX_LINE = 2**24


class CorpusError(ValueError):
    """Inputs that cannot be tokenised, or a folder that is no corpus; one line."""


@dataclass(frozen=True)
class Recording:
    """A recording, or a part of one, to tokenise.

    Attributes:
        key: its name in the corpus.
        path: of the file, absolute.
        n_bytes: of the file or the member; of a part, about that.
        offset: of the part in the file, seconds.
        seconds: of the part; None: to the end.
        member: of a tar: its name; of a table: the column.
        place: of a tar: first byte; of a table: row group and row.
    """

    key: str
    path: str
    n_bytes: int
    offset: float = 0.0
    seconds: float | None = None
    member: str | None = None
    place: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """For messages."""
        if len(self.place) == 2:
            return f"{self.path}: row group {self.place[0]}, row {self.place[1]}"
        return self.path if self.member is None else f"{self.path}: {self.member}"

    def to_json(self) -> str:
        """One line; fields that say nothing are left out."""
        defaults = {"offset": 0.0, "seconds": None, "member": None, "place": ()}
        fields = vars(self).items()
        return json.dumps({k: v for k, v in fields if k not in defaults or v != defaults[k]})

    @classmethod
    def from_json(cls, line: str) -> Recording:
        """The recording that `to_json` wrote.

        Raises:
            CorpusError: not such a line.
        """
        try:
            fields = json.loads(line)
            return cls(**fields | {"place": tuple(fields.get("place", ()))})
        except (ValueError, TypeError, AttributeError):
            raise CorpusError("not a recording of a plan") from None


def list_recordings(inputs: Iterable[str]) -> Iterator[Recording]:
    """The recordings of all inputs, in the order of these, those of folders sorted by path.

    Args:
        inputs: audio files, folders, globs, manifests (.tsv, .jsonl, Lhotse cuts), tars of
            WebDataset, and Parquet tables with an audio column.

    Raises:
        CorpusError: an input that does not exist, holds no audio or is damaged.
    """
    for name in inputs:
        empty = True
        for recording in _of_input(name):
            empty = False
            yield recording
        if empty:
            raise CorpusError(f"{name}: there is no audio in it")


def _of_input(name: str) -> Iterator[Recording]:
    path = Path(name)
    lower = path.name.lower()
    try:
        if path.is_dir():
            yield from _files(path, (path / x for x in find_files(path, AUDIO_SUFFIXES)))
        elif path.exists():
            if lower.endswith(MANIFESTS):
                yield from _manifest(path)
            elif lower.endswith(".tar"):
                yield from _tar(path)
            elif lower.endswith(".parquet"):
                yield from _table(path)
            elif path.suffix.lower() in AUDIO_SUFFIXES:
                yield from _files(path.parent, [path])
            else:
                known = " ".join((*MANIFESTS, ".tar", ".parquet"))
                raise CorpusError(f"{name}: neither audio nor one of {known}")
        elif glob.has_magic(name):
            root = Path(os.path.dirname(re.split(r"[*?[]", name, maxsplit=1)[0]))
            found = sorted(Path(x) for x in glob.glob(name, recursive=True) if os.path.isfile(x))
            for file in found:
                if file.suffix.lower() in AUDIO_SUFFIXES:
                    yield from _files(root, [file])
                else:
                    yield from _of_input(str(file))
        else:
            raise CorpusError(f"{name}: no such file or folder")
    except OSError as error:
        raise CorpusError(f"{error.filename or name}: {error.strerror or error}") from None


def _files(root: Path, paths: Iterable[Path]) -> Iterator[Recording]:
    for path in paths:
        key = path.relative_to(root).with_suffix("").as_posix()
        yield Recording(key, os.path.abspath(path), _size(path))


def _size(path: str | Path) -> int:
    """Bytes of a file; 0 where it is missing, which is reported when it is read."""
    with suppress(OSError):
        return os.stat(path).st_size
    return 0


# --------------------------------------------------------------------------------------- manifests


def _manifest(path: Path) -> Iterator[Recording]:
    for number, row in _rows(path):
        place = f"{path}:{number}"
        if "recording" in row and "channel" in row:
            yield _of_cut(row, path, place)
            continue
        name = next((row[x] for x in ("path", "audio_filepath") if row.get(x)), None)
        if not isinstance(name, str):
            raise CorpusError(f"{place}: no `path`")
        key = next((row[x] for x in ("key", "id") if row.get(x)), None)
        key = PurePosixPath(name).with_suffix("").as_posix() if key is None else str(key)
        seconds = next((row[x] for x in ("seconds", "duration") if row.get(x)), None)
        yield _part(
            key.lstrip("/"),
            path.parent / name,
            _number(place, "offset", row.get("offset") or 0.0),
            None if seconds is None else _number(place, "seconds", seconds),
        )


def _part(key: str, path: Path, offset: float, seconds: float | None) -> Recording:
    n_bytes = _size(path)
    if seconds is not None:
        n_bytes = min(n_bytes, math.ceil(seconds * BYTES_PER_SECOND))
    return Recording(key, os.path.abspath(path), n_bytes, offset, seconds)


def _of_cut(cut: dict[str, Any], manifest: Path, place: str) -> Recording:
    """A cut of Lhotse. It has to take all channels of a recording in one file."""
    try:
        (source,) = cut["recording"]["sources"]
        channels = cut["channel"] if isinstance(cut["channel"], list) else [cut["channel"]]
        if source["type"] != "file" or sorted(channels) != sorted(source["channels"]):
            raise CorpusError(f"{place}: only cuts of whole files on disk can be tokenised")
        whole = cut["start"] == 0 and cut["duration"] == cut["recording"]["duration"]
        return _part(
            str(cut["id"]),
            manifest.parent / source["source"],
            _number(place, "start", cut["start"]),
            None if whole else _number(place, "duration", cut["duration"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(f"{place}: not a cut with one source") from None


def _number(place: str, name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise CorpusError(f"{place}: {name} is not a number of seconds: {value!r}")
    return number


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, fields) of each line of a manifest."""
    if path.name.lower().endswith(".tsv"):
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            try:
                for row in reader:
                    yield reader.line_num, row
            except (csv.Error, UnicodeDecodeError) as error:
                raise CorpusError(f"{path}: {error}") from None
        return
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as file:
        number = 0
        while True:
            number += 1
            try:
                line = file.readline(MAX_LINE)
            except (EOFError, gzip.BadGzipFile, OSError) as error:
                raise CorpusError(f"{path}: {error}") from None
            if not line:
                return
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError):
                fields = None
            if not isinstance(fields, dict):
                raise CorpusError(f"{path}:{number}: not a JSON object")
            yield number, fields


# ---------------------------------------------------------------------------------- tars and tables


def _tar(path: Path) -> Iterator[Recording]:
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if member.isfile() and name.suffix.lower() in AUDIO_SUFFIXES:
                    key = name.with_suffix("").as_posix().removeprefix("./").lstrip("/")
                    yield Recording(
                        key,
                        os.path.abspath(path),
                        member.size,
                        member=member.name,
                        place=(member.offset_data,),
                    )
    except tarfile.TarError as error:
        raise CorpusError(f"{path}: {error}") from None


def _table(path: Path) -> Iterator[Recording]:
    """The rows of a Parquet table with a column of audio, as on the Hub."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            schema = table.schema_arrow
            column = next((field.name for field in schema if _is_audio(field.type)), None)
            if column is None:
                raise CorpusError(f"{path}: no column of audio (a struct with `bytes`)")
            ids = next((x for x in ("key", "id") if x in schema.names), None)
            for group in range(table.num_row_groups):
                facts = table.metadata.row_group(group)
                names = [] if ids is None else table.read_row_group(group, [ids])[ids].to_pylist()
                n_bytes = facts.total_byte_size // max(1, facts.num_rows)
                for row in range(facts.num_rows):
                    key = f"{path.stem}/{group:05d}-{row:05d}" if ids is None else str(names[row])
                    yield Recording(
                        key,
                        os.path.abspath(path),
                        n_bytes,
                        member=column,
                        place=(group, row),
                    )
    except pyarrow.ArrowException as error:
        raise CorpusError(f"{path}: {(str(error).splitlines() or ['damaged'])[0]}") from None


def _is_audio(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


class Opener:
    """Opens recordings, and keeps the last row group of a table for the next ones."""

    def __init__(self) -> None:
        self._group: tuple[str, int] | None = None
        self._rows: list[Any] = []

    @contextmanager
    def open(self, recording: Recording) -> Iterator[AudioReader]:
        """A reader at the beginning of the file or member.

        Raises:
            AudioError: it cannot be read.
            OSError: the tar or the table cannot be read.
            CorpusError: there is no audio in the row of a table.
        """
        if not recording.place:
            source: Any = recording.path
        elif recording.n_bytes > MAX_MEMBER:
            raise CorpusError(f"{recording.name}: more than {MAX_MEMBER} bytes")
        elif len(recording.place) == 1:
            with open(recording.path, "rb") as file:
                file.seek(recording.place[0])
                source = io.BytesIO(file.read(recording.n_bytes))
        else:
            source = io.BytesIO(self._row(recording))
        with AudioReader(source, name=recording.name) as reader:
            yield reader

    def _row(self, recording: Recording) -> bytes:
        import pyarrow
        import pyarrow.parquet

        group, row = recording.place
        if self._group != (recording.path, group):
            try:
                with pyarrow.parquet.ParquetFile(recording.path) as table:
                    column = table.read_row_group(group, [recording.member])[0]
            except pyarrow.ArrowException as error:
                raise CorpusError(f"{recording.name}: {str(error).splitlines()[0]}") from None
            self._group, self._rows = (recording.path, group), column.to_pylist()
        audio = self._rows[row]
        if not audio or not isinstance(audio.get("bytes"), bytes):
            raise CorpusError(f"{recording.name}: there is no audio")
        found: bytes = audio["bytes"]
        return found
