"""Corpora: what folders, globs, manifests, LibriTTS and streamed datasets hold, and parts of it."""

from __future__ import annotations

import csv
import glob
import io
import json
import math
import os
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from ..audio import AUDIO_SUFFIXES, AudioError, find_audio, resample
from ..recipe import AudioCorpus, HuggingFaceCorpus, LibriTTSCorpus

SHORT_SECONDS = 0.1  # what is not longer is left out
UNSOUGHT_SECONDS = 60.0  # of an MP3 file that are read rather than skipped
CONTEXT = 256  # samples, at the lower of two rates, that resampling gets beside a part
READERS = 16  # threads that scan; they wait for disks more than they compute
MANIFESTS = {".txt", ".tsv", ".csv", ".jsonl"}
# TypeError: soundfile wants to be told more about files named .raw.
UNREADABLE = (soundfile.SoundFileError, OSError, ValueError, TypeError)


class DataError(ValueError):
    """Training data that cannot be used: one line that names the corpus, file or line."""


def open_files(corpus: AudioCorpus | LibriTTSCorpus) -> Files:
    """The files of a corpus, their lengths known.

    Raises DataError where there is none that can be read.
    """
    return Files(corpus.path, list_files(corpus))


def list_files(corpus: AudioCorpus | LibriTTSCorpus) -> Listing:
    """What a corpus names.

    Raises DataError where there is nothing.
    """
    if isinstance(corpus, LibriTTSCorpus):
        return Listing(*_find_libritts(corpus))
    return _list_audio(corpus.path)


class Listing:
    """What a corpus names: paths below `root`, offsets (s) and seconds, NaN where not known."""

    def __init__(
        self,
        root: Path,
        names: list[str],
        offsets: array[float] | None = None,
        seconds: array[float] | None = None,
    ) -> None:
        self.root, self.names = root, names
        self.offsets = np.zeros(len(names)) if offsets is None else np.array(offsets)
        self.seconds = np.full(len(names), np.nan) if seconds is None else np.array(seconds)


class Files:
    """The files, or segments of files, of a corpus: tens of millions of them fit in memory.

    Attributes:
        name: of the corpus.
        seconds, offsets: (n,) of the segments.
        ends: (n,) cumulated share of the length.
        unreadable: what was left out.
        broken: numbers of those that were found to be unreadable when they were to be read.
        failures: reads that failed since the last one that did not.
        whole: (n,) bool, which are decoded whole and cached.
    """

    def __init__(self, name: str, listing: Listing) -> None:
        self.name, self.root = name, listing.root
        seconds, offsets, names = listing.seconds, listing.offsets, listing.names
        unknown = np.flatnonzero(np.isnan(seconds))
        parts = np.array_split(unknown, -(-len(unknown) // 256)) if len(unknown) else []

        def measure(part: np.ndarray) -> list[float]:
            return [length_or_zero(self.root / names[number]) for number in part]

        with ThreadPoolExecutor(READERS) as pool:
            for part, found in zip(parts, pool.map(measure, parts)):
                seconds[part] = np.array(found) - offsets[part]
        good = seconds > SHORT_SECONDS
        self.unreadable = [str(self.root / names[number]) for number in np.flatnonzero(~good)]
        if not good.any():
            raise DataError(f"{name}: no audio file that can be read")
        # One block of bytes and no strings: less memory, and none that a fork has to copy.
        encoded = [os.fsencode(names[number]) for number in np.flatnonzero(good)]
        self._names = b"".join(encoded)
        self._name_ends = np.cumsum([len(text) for text in encoded])
        self.seconds, self.offsets = seconds[good], offsets[good]
        ends = np.cumsum(self.seconds)
        self.ends = ends / ends[-1]
        self.broken: set[int] = set()
        self.failures = 0
        self.whole = np.zeros(len(encoded), dtype=bool)
        self.index = 0

    def __len__(self) -> int:
        return len(self._name_ends)

    def path(self, number: int) -> Path:
        first = self._name_ends[number - 1] if number else 0
        return self.root / os.fsdecode(self._names[first : self._name_ends[number]])

    def label(self, number: int) -> str:
        offset = self.offsets[number]
        return f"{self.path(number)}{f' at {offset:g} s' if offset else ''}"

    def describe(self, write: Callable[[bytes], None]) -> None:
        write(f"{len(self)} files ".encode())
        write(self._names)
        write(self._name_ends.astype("<i8").tobytes())
        for times in (self.offsets, self.seconds):
            write(np.round(times * 1000).astype("<i8").tobytes())


class Stream:
    """A dataset of the Hugging Face Hub, read in order, epoch after epoch.

    Args:
        keep: how many items stay in memory, so that several threads can read them.
    """

    def __init__(
        self, corpus: HuggingFaceCorpus, seed: int, process: int, processes: int, keep: int
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
            dataset = dataset.cast_column(corpus.column, datasets.Audio(decode=False))
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
        """The contents of an audio file."""
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


def _list_audio(path: str) -> Listing:
    """The audio of a folder, a glob or a manifest."""
    here = Path(path)
    if here.is_dir():
        return Listing(here, _find(here))
    if here.suffix.lower() in MANIFESTS and here.is_file():
        return _read_manifest(here)
    if glob.has_magic(path) and not here.exists():
        names = sorted(glob.iglob(path, recursive=True))
        names = [name for name in names if Path(name).suffix.lower() in AUDIO_SUFFIXES]
        if not names:
            raise DataError(f"{path}: no audio file matches")
        return Listing(Path(), names)
    if here.exists():
        raise DataError(f"{path}: not a folder, a glob or a manifest (.txt, .tsv, .csv, .jsonl)")
    raise DataError(f"{path}: no such folder or manifest")


def _find(folder: Path) -> list[str]:
    try:
        return [str(name) for name in find_audio(folder)]
    except AudioError as error:
        raise DataError(str(error)) from None


def _find_libritts(corpus: LibriTTSCorpus) -> tuple[Path, list[str]]:
    """The LibriTTS folder and the paths below it; fetches subsets if the corpus says so."""
    root = Path(corpus.path)
    if root.name != "LibriTTS":
        inside = any((root / subset).is_dir() for subset in corpus.subsets)
        root = root if inside and not (root / "LibriTTS").is_dir() else root / "LibriTTS"
    names = []
    for subset in corpus.subsets:
        folder = root / subset
        if not folder.is_dir():
            if not corpus.download:
                raise DataError(
                    f"{folder}: no such folder; set `download: true` in this corpus of data.train "
                    "to fetch it"
                )
            _download_libritts(root, subset)
        names += [f"{subset}/{name}" for name in _find(folder)]
    return root, names


def _download_libritts(root: Path, subset: str) -> None:
    import torchaudio

    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        torchaudio.datasets.LIBRITTS(
            root.parent, url=subset, folder_in_archive=root.name, download=True
        )
    except (OSError, RuntimeError, EOFError) as error:  # EOFError: an archive cut short
        raise DataError(f"{root / subset}: cannot be fetched ({error})") from None


def _read_manifest(path: Path) -> Listing:
    names, offsets, seconds = [], array("d"), array("d")
    for line, row in _rows(path):
        name = _first(row, "path", "audio_filepath")
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}:{line}: no `path`")
        names.append(name)
        offsets.append(_number(path, line, row, 0.0, "offset"))
        seconds.append(_number(path, line, row, math.nan, "seconds", "duration"))
    if not names:
        raise DataError(f"{path}: no audio file is listed")
    return Listing(path.parent, names, offsets, seconds)


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
        raise DataError(f"{path}:{line}: {keys[0]} is not a number of seconds: {text!r}")
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


def length(source: Path | io.BytesIO) -> float:
    with soundfile.SoundFile(source) as file:
        if file.frames >= 2**62:  # libsndfile's word for a length that it does not know
            raise ValueError("unknown length")
        return file.frames / file.samplerate


def length_or_zero(path: Path) -> float:
    try:
        return length(path)
    except UNREADABLE:
        return 0.0


def read_part(
    source: Path | io.BytesIO, offset: float, first: int, count: int, rate: int
) -> np.ndarray:
    """Mono float32, (up to `count`,): samples [first, first + count) at `rate` after `offset` (s).

    What is resampled is what a cut from the whole file, resampled, would be.

    Raises one of UNREADABLE, where there are no samples too.
    """
    with soundfile.SoundFile(source) as file:
        common = math.gcd(file.samplerate, rate)
        up, down = rate // common, file.samplerate // common
        start = round(offset * rate) + first
        context = 0 if up == down else CONTEXT * max(1, -(-down // up))
        begin = max(0, start * down // up - context) // down * down  # a sample at both rates
        end = -(-(start + count) * down // up) + context
        if file.format == "MP3" and begin < UNSOUGHT_SECONDS * file.samplerate:
            file.read(begin, "float32")  # after a seek libmpg123 complains on stderr
        elif begin:
            file.seek(begin)
        samples = file.read(end - begin, "float32", always_2d=True)
    if not np.isfinite(samples).all():
        raise ValueError("NaN or infinite samples")
    skip = start - begin * up // down
    part = resample(samples.mean(1), file.samplerate, rate)[skip : skip + count]
    if not len(part):
        raise ValueError("no samples")
    return part
