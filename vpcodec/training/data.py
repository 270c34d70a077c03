"""Training audio: random crops as a pure function of seed and number, so that resuming is exact."""

from __future__ import annotations

import copy
import csv
import glob
import hashlib
import io
import json
import math
import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from ..audio import AUDIO_SUFFIXES, AudioError, find_audio, resample
from ..recipe import AudioCorpus, DataConfig, HuggingFaceCorpus, LibriTTSCorpus

LONG_SECONDS = 60.0  # longer files are not kept in memory but read where the crop lies
SHORT_SECONDS = 0.1  # what is not longer is left out
SILENCE = 1e-8  # mean power, -80 dB; no ratio to noise is made of less
CONTEXT = 256  # samples, at the lower of two rates, that resampling gets beside a part
MAX_FAILURES = 1000  # files, or items of a stream, in a row
READERS = 16  # threads that scan; they wait for disks more than they compute
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd
COUNTED = 1024  # batches between remembered counts of the items of streams
MANIFESTS = {".txt", ".tsv", ".csv", ".jsonl"}
# TypeError: soundfile wants to be told more about files named .raw.
UNREADABLE = (soundfile.SoundFileError, OSError, ValueError, TypeError)


class DataError(ValueError):
    """Training data that cannot be used: one line that names the corpus, file or line."""


class Crops:
    """Random mono crops of audio files and streamed datasets, or of generated signals.

    Crop i of batch n is crop g = (n * processes + process) * batch_size + i of the training. It
    depends on the configuration, the data and (seed, g) alone: not on workers, on which crops were
    drawn before, or on how the crops of a step are shared among processes. Its corpus follows from
    a sequence in g that keeps the weights as evenly as possible; in the corpus a file is drawn in
    proportion to its length, then a place in it.

    A streamed dataset has no random access: each of its crops takes the next item of the part that
    this process reads. These crops are the same in every run with as many processes, and a
    resumed run reads past the items that it has had.

    Files that cannot be read are left out, another being drawn, and listed in `skipped`. It is an
    error where none is left, or MAX_FAILURES reads fail in a row.

    Args:
        config: corpora, crop length, batch size, augmentation.
        sample_rate: rate of the crops, Hz.
        multiple: crop length is rounded up to a multiple of this many samples.
        seed: of all random draws.
        process, processes: which of how many training processes this is.
        workers: processes that read ahead in `batches`; 0: threads, and always for streams.

    Attributes:
        length: samples of a crop.

    Raises:
        DataError: a corpus is missing, empty or damaged, or has not one file that can be read.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        sample_rate: int,
        multiple: int,
        seed: int,
        process: int = 0,
        processes: int = 1,
        workers: int = 0,
    ) -> None:
        self.config = config
        self.sample_rate = sample_rate
        self.seed = seed % 2**64
        self.process, self.processes = process, processes
        self.workers = 0 if config.streams else workers
        self.length = -(-int(config.crop_seconds * sample_rate) // multiple) * multiple
        self._threads = max(1, min(4, (os.cpu_count() or 1) // 2))
        self._ahead = 2 * self._threads  # batches
        self._skipped: dict[str, None] = {}
        self._cache: dict[tuple[int, int], np.ndarray] = {}
        self._cached_bytes = 0

        self._noise = None if config.noise is None else self._scan(config.noise)
        self._corpora = [self._open(corpus) for corpus in config.train]
        self._mark_cached()
        shares = np.cumsum([corpus.weight for corpus in config.train])
        self._shares = shares / shares[-1] if len(shares) else shares
        phase = np.random.default_rng(self.seed).integers(2**64, dtype=np.uint64)
        self._phase = phase  # of the sequence that chooses corpora
        self._counts = [np.zeros(len(self._corpora), dtype=np.int64)]
        self._counting = threading.Lock() if config.streams else None  # no lock crosses a fork

    @property
    def skipped(self) -> list[str]:
        """Files and items that could not be read so far."""
        return list(self._skipped)

    @property
    def hours(self) -> float:
        """Length of all files to train on; streamed datasets do not tell theirs."""
        files = (corpus for corpus in self._corpora if isinstance(corpus, _Files))
        return sum(corpus.seconds.sum() for corpus in files) / 3600

    @property
    def fingerprint(self) -> str:
        """Hex digest of what is trained on: names, places, durations, weights.

        Of a streamed dataset it is the description, not the contents. A folder that moves as a
        whole keeps its fingerprint.
        """
        digest = hashlib.sha256()
        for corpus, config in zip(self._corpora, self.config.train):
            digest.update(f"train {config.weight!r} ".encode())
            corpus.describe(digest.update)
        if self._noise:
            digest.update(b"noise ")
            self._noise.describe(digest.update)
        return digest.hexdigest()

    def batch(self, number: int) -> np.ndarray:
        """(batch_size, length) float32, within [-1, 1]: the crops of batch `number`, from 0.

        Raises DataError where no file of a corpus can be read, or a stream fails.
        """
        first = (number * self.processes + self.process) * self.config.batch_size
        numbers = np.arange(first, first + self.config.batch_size, dtype=np.uint64)
        which = self._choose(numbers)
        items = self._items(number, which) if self.config.streams else which
        crops = [
            self._crop(int(g), int(corpus), int(item))
            for g, corpus, item in zip(numbers, which, items)
        ]
        return np.stack(crops)

    def batches(self, first: int, last: int) -> Iterator[np.ndarray]:
        """The batches of numbers [first, last), read ahead in threads or worker processes.

        Closing the iterator ends these. Raises DataError, as `batch` does.
        """
        if first >= last:
            return iter(())
        return self._from_workers(first, last) if self.workers else self._from_threads(first, last)

    def _from_threads(self, first: int, last: int) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(self._threads) as pool:
            numbers = iter(range(first, last))
            pending = deque(pool.submit(self.batch, n) for n in islice(numbers, self._ahead))
            try:
                while pending:
                    batch = pending.popleft().result()
                    pending.extend(pool.submit(self.batch, n) for n in islice(numbers, 1))
                    yield batch
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _from_workers(self, first: int, last: int) -> Iterator[np.ndarray]:
        from torch.utils.data import DataLoader

        loader = DataLoader(
            _WorkerCrops(self),
            batch_size=None,
            sampler=range(first, last),
            num_workers=self.workers,
            prefetch_factor=2,
            collate_fn=_unchanged,
            worker_init_fn=_begin_worker,
        )
        iterator = iter(loader)
        try:
            for _ in range(first, last):
                try:
                    batch, skipped, error = next(iterator)
                except RuntimeError as problem:
                    reason = str(problem).splitlines()[0]
                    if reason.startswith("DataLoader worker"):  # it was killed
                        raise DataError(reason) from None
                    raise
                except (OSError, EOFError):  # it was killed while it sent a batch
                    raise DataError("a worker process of the data loader was killed") from None
                self._skipped |= dict.fromkeys(skipped)
                if error:
                    raise DataError(error)
                yield batch.numpy()
        finally:
            iterator._shutdown_workers()  # at once, though a traceback may still hold the iterator

    def _open(self, corpus: AudioCorpus | LibriTTSCorpus | HuggingFaceCorpus) -> _Files | _Stream:
        if not isinstance(corpus, HuggingFaceCorpus):
            return self._scan(corpus)
        keep = (self._ahead + 1) * self.config.batch_size + MAX_FAILURES
        return _Stream(corpus, self.seed, self.process, self.processes, keep)

    def _scan(self, corpus: AudioCorpus | LibriTTSCorpus) -> _Files:
        if isinstance(corpus, LibriTTSCorpus):
            root, names = _find_libritts(corpus)
            listing = _Listing(root, names)
        else:
            listing = _list_audio(corpus.path)
        files = _Files(corpus.path, listing)
        self._skipped |= dict.fromkeys(files.unreadable)
        return files

    def _mark_cached(self) -> None:
        """Decide, in the order of the files, which are decoded whole to be cached.

        Not by what happens to fit when a file is read: whole and in parts, audio that is resampled
        differs by rounding, and crops must not depend on what was read before.
        """
        files = [self._noise] if self._noise else []
        files += [corpus for corpus in self._corpora if isinstance(corpus, _Files)]
        left = self.config.cache_mb * 2**20
        for index, some in enumerate(files):
            size = np.where(some.seconds > LONG_SECONDS, 0, some.seconds * self.sample_rate * 2)
            ends = np.cumsum(size)
            some.whole = (size > 0) & (ends <= left)
            some.index = index
            left -= min(left, ends[-1])

    def _choose(self, numbers: np.ndarray) -> np.ndarray:
        """Index of the corpus of each crop; `numbers` are uint64 of any shape."""
        if len(self._corpora) < 2:
            return np.zeros(numbers.shape, dtype=np.int64)
        place = ((numbers * np.uint64(GOLDEN) + self._phase) >> np.uint64(11)) * 2.0**-53
        return np.searchsorted(self._shares, place, side="right")

    def _items(self, number: int, which: np.ndarray) -> np.ndarray:
        """How many crops of the same corpus this process draws before each one of a batch."""
        with self._counting:
            while len(self._counts) <= number // COUNTED:
                end = len(self._counts) * COUNTED
                self._counts.append(self._counts[-1] + self._count(end - COUNTED, end))
        start = number // COUNTED
        before = self._counts[start] + self._count(start * COUNTED, number)
        same = which[:, None] == which[None, :]
        return before[which] + np.tril(same, -1).sum(1)

    def _count(self, first: int, last: int) -> np.ndarray:
        """Crops of each corpus in the batches [first, last) of this process."""
        size = self.config.batch_size
        starts = (np.arange(first, last) * self.processes + self.process) * size
        numbers = (starts[:, None] + np.arange(size)).astype(np.uint64)
        return np.bincount(self._choose(numbers).ravel(), minlength=len(self._corpora))

    def _crop(self, number: int, corpus: int, item: int) -> np.ndarray:
        """(length,) float32: crop `number` of all, from item `item` if its corpus is streamed."""
        rng = np.random.default_rng([self.seed, number])
        if not self._corpora:
            crop = _generate(rng, self.length, self.sample_rate)
        elif isinstance(source := self._corpora[corpus], _Files):
            crop = self._from_file(source, rng)
        else:
            crop = self._from_stream(source, item, rng.random())
        gain = 10 ** (rng.uniform(*self.config.gain_db) / 20)
        negative = rng.random() < 0.5
        crop = np.pad(crop, (0, self.length - len(crop)))
        if self._noise and rng.random() < self.config.noise_rate:
            crop = self._add_noise(crop, rng)
        crop = crop * (-gain if negative and self.config.flip_polarity else gain)
        return (crop / max(np.abs(crop).max(), 1.0)).astype(np.float32)

    def _add_noise(self, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        noise = np.resize(self._from_file(self._noise, rng), self.length)  # again and again
        decibels = rng.uniform(*self.config.noise_snr_db)
        power, noise_power = (np.mean(np.square(x, dtype=np.float64)) for x in (crop, noise))
        if min(power, noise_power) < SILENCE:
            return crop
        return crop + noise * math.sqrt(power / noise_power * 10 ** (-decibels / 10))

    def _from_file(self, files: _Files, rng: np.random.Generator) -> np.ndarray:
        """Up to `length` samples from somewhere in a corpus."""
        while True:
            number = int(np.searchsorted(files.ends, rng.random(), side="right"))
            number, position = min(number, len(files) - 1), rng.random()
            if number not in files.broken:
                try:
                    samples = self._read(files, number, position)
                except UNREADABLE:
                    files.failures += 1
                    self._skipped[files.label(number)] = None
                    # Another part of a long file may be sound, and whether it is drawn must not
                    # depend on which part was read first.
                    if files.whole[number] or not _seconds_or_zero(files.path(number)):
                        files.broken.add(number)
                else:
                    files.failures = 0
                    return samples
            if len(files.broken) == len(files) or files.failures >= MAX_FAILURES:
                raise DataError(f"{files.name}: no audio file that can be read")

    def _read(self, files: _Files, number: int, position: float) -> np.ndarray:
        """Up to `length` samples of a file, from `position` (0..1) of where they can begin."""
        path, offset = files.path(number), float(files.offsets[number])
        total = round(float(files.seconds[number]) * self.sample_rate)
        if not files.whole[number]:
            first = int(position * max(0, total - self.length))
            return _read_part(path, offset, first, min(self.length, total), self.sample_rate)
        samples = self._cache.get((files.index, number))
        if samples is None:
            audio = _read_part(path, offset, 0, total, self.sample_rate)
            samples = np.round(audio * 32768).clip(-32768, 32767).astype(np.int16)
            budget = self.config.cache_mb * 2**20 // max(1, self.workers)
            if self._cached_bytes + samples.nbytes <= budget:
                self._cache[files.index, number] = samples
                self._cached_bytes += samples.nbytes
        first = int(position * max(0, len(samples) - self.length))
        return samples[first : first + self.length] / np.float32(32768)

    def _from_stream(self, stream: _Stream, number: int, position: float) -> np.ndarray:
        """Up to `length` samples of item `number`, or of the next one that can be read."""
        for candidate in range(number, number + MAX_FAILURES):
            item = stream.item(candidate)
            try:
                audio = stream.fetch(item)
                total = round(_seconds(io.BytesIO(audio)) * self.sample_rate)
                if total <= SHORT_SECONDS * self.sample_rate:
                    raise ValueError("too short")
                first = int(position * max(0, total - self.length))
                samples = min(self.length, total)
                return _read_part(io.BytesIO(audio), 0.0, first, samples, self.sample_rate)
            except UNREADABLE:
                self._skipped[stream.label(candidate, item)] = None
        raise DataError(f"{stream.name}: {MAX_FAILURES} items in a row cannot be read")


class _WorkerCrops:
    """What a worker process holds: the crops, with a cache and a list of broken files of its own.

    An item is (batch, newly skipped, None), or (None, newly skipped, error).
    """

    def __init__(self, crops: Crops) -> None:
        self.crops = copy.copy(crops)
        self.crops._cache, self.crops._cached_bytes, self.crops._skipped = {}, 0, {}

    def __getitem__(self, number: int) -> tuple[Any, list[str], str | None]:
        import torch

        seen, batch, problem = len(self.crops._skipped), None, None
        try:
            batch = torch.from_numpy(self.crops.batch(number))  # a tensor goes by shared memory
        except DataError as error:
            problem = str(error)
        return batch, self.crops.skipped[seen:], problem


def _begin_worker(_: int) -> None:
    # A terminal or a scheduler sends these to all processes; the training process decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _unchanged(item: Any) -> Any:
    return item


class _Listing:
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


class _Files:
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

    def __init__(self, name: str, listing: _Listing) -> None:
        self.name, self.root = name, listing.root
        seconds, offsets, names = listing.seconds, listing.offsets, listing.names
        unknown = np.flatnonzero(np.isnan(seconds))
        parts = np.array_split(unknown, -(-len(unknown) // 256)) if len(unknown) else []

        def measure(part: np.ndarray) -> list[float]:
            return [_seconds_or_zero(self.root / names[number]) for number in part]

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


class _Stream:
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


def _list_audio(path: str) -> _Listing:
    """The audio of a folder, a glob or a manifest."""
    here = Path(path)
    if here.is_dir():
        return _Listing(here, _find(here))
    if here.suffix.lower() in MANIFESTS and here.is_file():
        return _read_manifest(here)
    if glob.has_magic(path) and not here.exists():
        names = sorted(glob.iglob(path, recursive=True))
        names = [name for name in names if Path(name).suffix.lower() in AUDIO_SUFFIXES]
        if not names:
            raise DataError(f"{path}: no audio file matches")
        return _Listing(Path(), names)
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


def _read_manifest(path: Path) -> _Listing:
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
    return _Listing(path.parent, names, offsets, seconds)


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


def _seconds(source: Path | io.BytesIO) -> float:
    with soundfile.SoundFile(source) as file:
        if file.frames >= 2**62:  # libsndfile's word for a length that it does not know
            raise ValueError("unknown length")
        return file.frames / file.samplerate


def _seconds_or_zero(path: Path) -> float:
    try:
        return _seconds(path)
    except UNREADABLE:
        return 0.0


def _read_part(
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
        if file.format == "MP3" and begin < LONG_SECONDS * file.samplerate:
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


def _generate(rng: np.random.Generator, length: int, sample_rate: int) -> np.ndarray:
    """A voiced-like signal: gliding harmonics under a slow envelope, with some noise."""
    t = np.arange(length) / sample_rate
    pitch = rng.uniform(80, 300) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(0.5, 3) * t))
    phase = 2 * np.pi * np.cumsum(pitch) / sample_rate
    harmonics = range(1, int(sample_rate / 2 / 400))
    tone = sum(np.sin(k * phase + rng.uniform(0, 6.3)) / k for k in harmonics)
    envelope = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(1, 5) * t + rng.uniform(0, 6.3))
    return 0.15 * tone * envelope + 0.01 * rng.standard_normal(length)
