"""Training audio: random crops as a pure function of seed and number, so that resuming is exact."""

from __future__ import annotations

import copy
import hashlib
import io
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np

from ..recipe import AudioCorpus, DataConfig, HuggingFaceCorpus, LibriTTSCorpus
from .corpora import (
    SHORT_SECONDS,
    UNREADABLE,
    DataError,
    Files,
    Stream,
    length,
    length_or_zero,
    open_files,
    read_part,
)

LONG_SECONDS = 60.0  # longer files are not kept in memory but read where the crop lies
SILENCE = 1e-8  # mean power, -80 dB; no ratio to noise is made of less
RETRIES = (0.1, 1.0)  # seconds before a file is read again after an error of the system
MAX_FAILURES = 1000  # files, or items of a stream, in a row
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd
COUNTED = 1024  # batches between remembered counts of the items of streams


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
        self.seed = seed
        self.process, self.processes = process, processes
        self.workers = 0 if config.streams else workers
        self.length = -(-int(config.crop_seconds * sample_rate) // multiple) * multiple
        self._threads = max(1, min(4, (os.cpu_count() or 1) // 2))
        self._ahead = 2 * self._threads  # batches
        self._skipped: dict[str, None] = {}
        self._cache: dict[tuple[int, int], tuple[np.ndarray, np.float32]] = {}

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
        files = (corpus for corpus in self._corpora if isinstance(corpus, Files))
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

    def _open(self, corpus: AudioCorpus | LibriTTSCorpus | HuggingFaceCorpus) -> Files | Stream:
        if not isinstance(corpus, HuggingFaceCorpus):
            return self._scan(corpus)
        keep = (self._ahead + 2) * self.config.batch_size
        return Stream(corpus, self.seed, self.process, self.processes, keep)

    def _scan(self, corpus: AudioCorpus | LibriTTSCorpus) -> Files:
        files = open_files(corpus)
        self._skipped |= dict.fromkeys(files.unreadable)
        return files

    def _mark_cached(self) -> None:
        """Decide, in the order of the files, which are decoded whole to be cached.

        Not by what happens to fit when a file is read: whole and in parts, audio that is resampled
        differs by rounding, and crops must not depend on what was read before.
        """
        files = [self._noise] if self._noise else []
        files += [corpus for corpus in self._corpora if isinstance(corpus, Files)]
        left = self.config.cache_mb * 2**20 // max(1, self.workers)
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
        elif isinstance(source := self._corpora[corpus], Files):
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

    def _from_file(self, files: Files, rng: np.random.Generator) -> np.ndarray:
        """Up to `length` samples from somewhere in a corpus."""
        while True:
            number = int(np.searchsorted(files.ends, rng.random(), side="right"))
            number, position = min(number, len(files) - 1), rng.random()
            if number not in files.broken:
                try:
                    samples = self._read_patiently(files, number, position)
                except UNREADABLE:
                    files.failures += 1
                    self._skipped[files.label(number)] = None
                    # Another part of a long file may be sound, and whether it is drawn must not
                    # depend on which part was read first.
                    if files.whole[number] or not length_or_zero(files.path(number)):
                        files.broken.add(number)
                else:
                    files.failures = 0
                    return samples
            if len(files.broken) == len(files) or files.failures >= MAX_FAILURES:
                raise DataError(f"{files.name}: no audio file that can be read")

    def _read_patiently(self, files: Files, number: int, position: float) -> np.ndarray:
        """`_read`, again where the file system and not the file is at fault."""
        for pause in RETRIES:
            try:
                return self._read(files, number, position)
            except (FileNotFoundError, PermissionError):
                raise
            except OSError:
                time.sleep(pause)
        return self._read(files, number, position)

    def _read(self, files: Files, number: int, position: float) -> np.ndarray:
        """Up to `length` samples of a file, from `position` (0..1) of where they can begin."""
        path, offset = files.path(number), float(files.offsets[number])
        total = round(float(files.seconds[number]) * self.sample_rate)
        if not files.whole[number]:
            first = int(position * max(0, total - self.length))
            return read_part(path, offset, first, min(self.length, total), self.sample_rate)
        found = self._cache.get((files.index, number))
        if found is None:
            audio = read_part(path, offset, 0, total, self.sample_rate)
            scale = np.float32(max(1.0, float(np.abs(audio).max())) / 32768)
            found = np.round(audio / scale).clip(-32768, 32767).astype(np.int16), scale
            self._cache[files.index, number] = found
        samples, scale = found
        first = int(position * max(0, len(samples) - self.length))
        return samples[first : first + self.length] * scale

    def _from_stream(self, stream: Stream, number: int, position: float) -> np.ndarray:
        """Up to `length` samples of item `number`, or of the next one that can be read."""
        for candidate in range(number, number + MAX_FAILURES):
            item = stream.item(candidate)
            try:
                audio = stream.fetch(item)
                total = round(length(io.BytesIO(audio)) * self.sample_rate)
                if total <= SHORT_SECONDS * self.sample_rate:
                    raise ValueError("too short")
                first = int(position * max(0, total - self.length))
                samples = min(self.length, total)
                return read_part(io.BytesIO(audio), 0.0, first, samples, self.sample_rate)
            except UNREADABLE:
                self._skipped[stream.label(candidate, item)] = None
        raise DataError(f"{stream.name}: {MAX_FAILURES} items in a row cannot be read")


class _WorkerCrops:
    """What a worker process holds: the crops, with a cache and a list of broken files of its own.

    An item is (batch, newly skipped, None), or (None, newly skipped, error).
    """

    def __init__(self, crops: Crops) -> None:
        self.crops = copy.copy(crops)
        self.crops._cache, self.crops._skipped = {}, {}

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


def _generate(rng: np.random.Generator, length: int, sample_rate: int) -> np.ndarray:
    """A voiced-like signal: gliding harmonics under a slow envelope, with some noise."""
    t = np.arange(length) / sample_rate
    pitch = rng.uniform(80, 300) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(0.5, 3) * t))
    phase = 2 * np.pi * np.cumsum(pitch) / sample_rate
    harmonics = range(1, int(sample_rate / 2 / 400))
    tone = sum(np.sin(k * phase + rng.uniform(0, 6.3)) / k for k in harmonics)
    envelope = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(1, 5) * t + rng.uniform(0, 6.3))
    return 0.15 * tone * envelope + 0.01 * rng.standard_normal(length)
