"""Corpora: the items of folders, globs, manifests and streamed datasets."""

from __future__ import annotations

import csv
import glob
import json
import math
import os
import threading
from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from ..recipe.base import HuggingFaceCorpus

MANIFESTS = {".txt", ".tsv", ".csv", ".jsonl"}


class DataError(ValueError):
    """Data cannot be used; the message is one line that names the corpus, file or line."""


@dataclass(frozen=True)
class MediaType:
    """The media files of a modality.

    Attributes:
        noun: what messages call one file.
        suffixes: in lower case.
        find_files: lists the files in a folder, relative to it; raises ValueError if the folder
            cannot be read.
        errors: exceptions that reading a file can raise.
        feature: class of the package `datasets` for columns of such files.
        columns: numeric columns that a manifest may have besides the path: name -> default, and
            names of the column in a manifest.
    """

    noun: str
    suffixes: Collection[str]
    find_files: Callable[[Path], list[Path]]
    errors: tuple[type[Exception], ...]
    feature: str
    columns: Mapping[str, tuple[float, tuple[str, ...]]] = field(default_factory=dict)


class Listing:
    """The files of a corpus: paths below `root`, and for each of them the values of `columns`."""

    def __init__(
        self,
        root: Path,
        names: list[str],
        media: MediaType,
        columns: Mapping[str, array[float]] | None = None,
    ) -> None:
        self.root, self.names = root, names
        if columns is None:
            defaults = {name: default for name, (default, _) in media.columns.items()}
            self.columns = {name: np.full(len(names), value) for name, value in defaults.items()}
        else:
            self.columns = {name: np.array(column) for name, column in columns.items()}


def list_files(path: str, media: MediaType) -> Listing:
    """The files of a folder, a glob or a manifest.

    Raises:
        DataError: there are none.
    """
    here = Path(path)
    if here.is_dir():
        if not (names := find_files(here, media)):
            raise DataError(f"{path}: no {media.noun} in it")
        return Listing(here, names, media)
    if here.suffix.lower() in MANIFESTS and here.is_file():
        return _read_manifest(here, media)
    if glob.has_magic(path) and not here.exists():
        names = sorted(glob.iglob(path, recursive=True))
        names = [name for name in names if Path(name).suffix.lower() in media.suffixes]
        if not names:
            raise DataError(f"{path}: no {media.noun} matches")
        return Listing(Path(), names, media)
    if here.exists():
        raise DataError(f"{path}: not a folder, a glob or a manifest (.txt, .tsv, .csv, .jsonl)")
    raise DataError(f"{path}: no such folder or manifest")


def find_files(folder: Path, media: MediaType) -> list[str]:
    """The files in a folder, relative to it; DataError if it cannot be read."""
    try:
        return [str(name) for name in media.find_files(folder)]
    except ValueError as error:
        raise DataError(str(error)) from None


class Files:
    """The files of a corpus, stored compactly: tens of millions of them fit in memory.

    Attributes:
        name: name of the corpus.
        unreadable: files left out because they could not be read when the corpus was scanned.
        broken: numbers of files that turned out to be unreadable later.
        failures: number of failed reads since the last successful one.
    """

    def __init__(
        self, name: str, root: Path, names: list[str], unreadable: list[str] | None = None
    ) -> None:
        self.name, self.root = name, root
        self.unreadable = unreadable or []
        # One block of bytes instead of strings takes less memory, and forks share it.
        encoded = [os.fsencode(text) for text in names]
        self._names = b"".join(encoded)
        self._name_ends = np.cumsum([len(text) for text in encoded])
        self.broken: set[int] = set()
        self.failures = 0

    def __len__(self) -> int:
        return len(self._name_ends)

    def draw(self, share: float) -> int:
        """Number of the file for a random number in [0, 1); all files are equally likely."""
        return min(int(share * len(self)), len(self) - 1)

    def path(self, number: int) -> Path:
        first = self._name_ends[number - 1] if number else 0
        return self.root / os.fsdecode(self._names[first : self._name_ends[number]])

    def label(self, number: int) -> str:
        return str(self.path(number))

    def describe(self, write: Callable[[bytes], None]) -> None:
        write(f"{len(self)} files ".encode())
        write(self._names)
        write(self._name_ends.astype("<i8").tobytes())


class Stream:
    """A dataset of the Hugging Face Hub, read in order, epoch after epoch.

    Args:
        corpus: the dataset.
        feature: class of the package `datasets` for the column.
        seed: seed of the order of items.
        process: number of this training process.
        processes: number of training processes, which share the dataset.
        keep: number of items kept in memory, so that several threads can read them.
    """

    def __init__(
        self,
        corpus: HuggingFaceCorpus,
        feature: str,
        seed: int,
        process: int,
        processes: int,
        keep: int,
    ) -> None:
        try:
            import datasets
            from datasets.distributed import split_dataset_by_node
        except ImportError:
            raise DataError(
                f"{corpus.path}: streaming needs the package `datasets`: pip install datasets"
            ) from None
        self.corpus, self.name = corpus, corpus.path
        with _as_data_error(self.name):
            dataset = datasets.load_dataset(
                corpus.path,
                corpus.name,
                split=corpus.split,
                revision=corpus.revision,
                streaming=True,
            )
            dataset = dataset.select_columns([corpus.column])
            undecoded = getattr(datasets, feature)(decode=False)
            dataset = dataset.cast_column(corpus.column, undecoded)
            dataset = dataset.shuffle(seed=seed % 2**63, buffer_size=corpus.shuffle_buffer)
            self._dataset = split_dataset_by_node(dataset, process, processes)
        self._lock = threading.Lock()
        self._window: deque[dict[str, Any]] = deque(maxlen=keep)
        self._next = 0  # number of the first item after the window
        self._items = self._read()

    def _read(self) -> Iterator[dict[str, Any]]:
        # `skip` of `datasets` fixes the order of the shards, which would change later epochs.
        for epoch in count():
            self._dataset.set_epoch(epoch)
            row = None
            for row in self._dataset:
                yield row[self.corpus.column]
            if row is None:
                raise DataError(f"{self.name}: no items for this process")

    def item(self, number: int) -> dict[str, Any]:
        """Item `number` of the endless sequence of this process: {"bytes", "path"}."""
        with self._lock, _as_data_error(self.name):
            if number < self._next - len(self._window):
                self._items, self._next = self._read(), 0
                self._window.clear()
            while self._next <= number:
                self._window.append(next(self._items))
                self._next += 1
            return self._window[number - self._next]

    def fetch(self, item: dict[str, Any]) -> bytes:
        """The contents of the file of an item."""
        if item["bytes"] is not None:
            return item["bytes"]
        import fsspec

        with fsspec.open(item["path"], "rb") as file:
            return file.read()

    def label(self, number: int, item: dict[str, Any]) -> str:
        name = item.get("path") if isinstance(item, dict) else None
        return f"{self.name}: {name or f'item {number}'}"

    def describe(self, write: Callable[[bytes], None]) -> None:
        write(self.corpus.model_dump_json().encode())


@contextmanager
def _as_data_error(name: str) -> Iterator[None]:
    """Turn any exception of `datasets` into a DataError of one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise DataError(f"{name}: {reason}") from error


def _read_manifest(path: Path, media: MediaType) -> Listing:
    names, columns = [], {name: array("d") for name in media.columns}
    for line, row in _rows(path):
        name = _first(row, "path", "audio_filepath")
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}:{line}: no `path`")
        names.append(name)
        for column, (default, keys) in media.columns.items():
            columns[column].append(_number(path, line, row, default, *keys))
    if not names:
        raise DataError(f"{path}: no {media.noun} is listed")
    return Listing(path.parent, names, media, columns)


def _first(row: dict[str, Any], *keys: str) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _number(path: Path, line: int, row: dict[str, Any], default: float, *keys: str) -> float:
    text = _first(row, *keys)
    if text is None or text == "":
        return default
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise DataError(f"{path}:{line}: {keys[0]} is not a non-negative number: {text!r}")
    return value


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, columns) of each entry of a manifest."""
    suffix = path.suffix.lower()
    if suffix in {".tsv", ".csv"}:
        yield from _delimited_rows(path, suffix)
        return
    for line, text in _lines(path):
        if not text.strip():
            continue
        if suffix == ".txt":
            yield line, {"path": text}
            continue
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{line}: not a JSON object")
        yield line, row


def _delimited_rows(path: Path, suffix: str) -> Iterator[tuple[int, dict[str, str]]]:
    lines = (text for _, text in _lines(path))
    if suffix == ".tsv":  # transcripts in the tables of corpora contain quotation marks
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if not {"path", "audio_filepath"} & set(header):
            raise DataError(f"{path}:1: no column `path`")
        for row in reader:
            if row:
                yield reader.line_num, dict(zip(header, row))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: {error}") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise DataError(f"{path}:{number}: not UTF-8") from None
                yield number, text.rstrip("\r\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
