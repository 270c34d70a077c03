"""Corpora: what folders, globs, manifests and streamed datasets hold."""

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
    """Training data that cannot be used: one line that names the corpus, file or line."""


@dataclass(frozen=True)
class FileKind:
    """What the files of a corpus are.

    Attributes:
        noun: what one is called.
        suffixes: in lower case.
        find: the files in a folder, relative to it; ValueError where it cannot be read.
        errors: what reading one raises.
        feature: class of the package `datasets` for columns of them.
        columns: numbers that manifests may have beside the path: the default, and the names of the
            column.
    """

    noun: str
    suffixes: Collection[str]
    find: Callable[[Path], list[Path]]
    errors: tuple[type[Exception], ...]
    feature: str
    columns: Mapping[str, tuple[float, tuple[str, ...]]] = field(default_factory=dict)


class Listing:
    """What a corpus names: paths below `root`, and for each of these the numbers of `columns`."""

    def __init__(
        self,
        root: Path,
        names: list[str],
        kind: FileKind,
        columns: Mapping[str, array[float]] | None = None,
    ) -> None:
        self.root, self.names = root, names
        if columns is None:
            defaults = {name: default for name, (default, _) in kind.columns.items()}
            self.columns = {name: np.full(len(names), value) for name, value in defaults.items()}
        else:
            self.columns = {name: np.array(column) for name, column in columns.items()}


def list_files(path: str, kind: FileKind) -> Listing:
    """The files of a folder, a glob or a manifest.

    Raises DataError where there is nothing.
    """
    here = Path(path)
    if here.is_dir():
        if not (names := find(here, kind)):
            raise DataError(f"{path}: no {kind.noun} in it")
        return Listing(here, names, kind)
    if here.suffix.lower() in MANIFESTS and here.is_file():
        return _read_manifest(here, kind)
    if glob.has_magic(path) and not here.exists():
        names = sorted(glob.iglob(path, recursive=True))
        names = [name for name in names if Path(name).suffix.lower() in kind.suffixes]
        if not names:
            raise DataError(f"{path}: no {kind.noun} matches")
        return Listing(Path(), names, kind)
    if here.exists():
        raise DataError(f"{path}: not a folder, a glob or a manifest (.txt, .tsv, .csv, .jsonl)")
    raise DataError(f"{path}: no such folder or manifest")


def find(folder: Path, kind: FileKind) -> list[str]:
    """The files in a folder; DataError where it cannot be read."""
    try:
        return [str(name) for name in kind.find(folder)]
    except ValueError as error:
        raise DataError(str(error)) from None


class Files:
    """The files of a corpus: tens of millions of them fit in memory.

    Attributes:
        name: of the corpus.
        unreadable: what was left out, as its length is unknown.
        broken: numbers of those that were found to be unreadable when they were to be read.
        failures: reads that failed since the last one that did not.
    """

    def __init__(
        self, name: str, root: Path, names: list[str], unreadable: list[str] | None = None
    ) -> None:
        self.name, self.root = name, root
        self.unreadable = unreadable or []
        # One block of bytes and no strings: less memory, and none that a fork has to copy.
        encoded = [os.fsencode(text) for text in names]
        self._names = b"".join(encoded)
        self._name_ends = np.cumsum([len(text) for text in encoded])
        self.broken: set[int] = set()
        self.failures = 0

    def __len__(self) -> int:
        return len(self._name_ends)

    def draw(self, share: float) -> int:
        """Number of a file, for a random number in [0, 1): each is equally likely."""
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
        feature: class of the package `datasets` that the column has.
        keep: how many items stay in memory, so that several threads can read them.
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
        with _naming(self.name):
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
        self._next = 0  # number of the item after those in the window
        self._items = self._read()

    def _read(self) -> Iterator[dict[str, Any]]:
        # The dataset's own `skip` would fix the order of its shards, so later epochs would differ.
        for epoch in count():
            self._dataset.set_epoch(epoch)
            row = None
            for row in self._dataset:
                yield row[self.corpus.column]
            if row is None:
                raise DataError(f"{self.name}: no items for this process")

    def item(self, number: int) -> dict[str, Any]:
        """Item `number`, {"bytes", "path"}, of the endless sequence of this process."""
        with self._lock, _naming(self.name):
            if number < self._next - len(self._window):
                self._items, self._next = self._read(), 0
                self._window.clear()
            while self._next <= number:
                self._window.append(next(self._items))
                self._next += 1
            return self._window[number - self._next]

    def fetch(self, item: dict[str, Any]) -> bytes:
        """The contents of a file."""
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
def _naming(name: str) -> Iterator[None]:
    """Turn what `datasets` raises, which can be anything, into a DataError of one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise DataError(f"{name}: {reason}") from error


def _read_manifest(path: Path, kind: FileKind) -> Listing:
    names, columns = [], {name: array("d") for name in kind.columns}
    for line, row in _rows(path):
        name = _first(row, "path", "audio_filepath")
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}:{line}: no `path`")
        names.append(name)
        for column, (default, keys) in kind.columns.items():
            columns[column].append(_number(path, line, row, default, *keys))
    if not names:
        raise DataError(f"{path}: no {kind.noun} is listed")
    return Listing(path.parent, names, kind, columns)


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
        raise DataError(f"{path}:{line}: {keys[0]} is not a number from 0 up: {text!r}")
    return value


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, columns) of a manifest."""
    suffix = path.suffix.lower()
    if suffix in {".tsv", ".csv"}:
        yield from _table(path, suffix)
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


def _table(path: Path, suffix: str) -> Iterator[tuple[int, dict[str, str]]]:
    lines = (text for _, text in _lines(path))
    if suffix == ".tsv":  # tables of corpora have quotation marks in their texts
        table = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        table = csv.reader(lines, strict=True)
    try:
        header = [name.strip() for name in next(table, [])]
        if not {"path", "audio_filepath"} & set(header):
            raise DataError(f"{path}:1: no column `path`")
        for row in table:
            if row:
                yield table.line_num, dict(zip(header, row))
    except csv.Error as error:
        raise DataError(f"{path}:{table.line_num}: {error}") from None


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
