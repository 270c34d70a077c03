"""Training data: random crops, a pure function of seed and number, so that runs resume exactly."""

from __future__ import annotations

import copy
import hashlib
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import Any, ClassVar

import numpy as np

from ..recipe.base import Data, HuggingFaceCorpus
from .corpora import DataError, Files, MediaType, Stream

RETRIES = (0.1, 1.0)  # seconds to wait before a file is read again after a system error
MAX_FAILURES = 1000  # failed reads in a row
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd
COUNTED = 1024  # batches between stored counts of the items of streams


class Crops(ABC):
    """Random crops of files and streamed datasets, or of generated data.

    Crop i of batch n is crop g = (n * processes + process) * batch_size + i of the run. It depends
    only on the configuration, the data, the seed and g: not on workers, on which crops were drawn
    before, or on how the crops of a step are divided among processes. A low-discrepancy sequence in
    g chooses the corpus, so that the weights hold as evenly as possible; then a file of the corpus
    is drawn, and a position in the file.

    A streamed dataset has no random access: each of its crops takes the next item of the part that
    this process reads. These crops are the same in every run with the same number of processes, and
    a resumed run skips the items that it has already used.

    A file that cannot be read is replaced by another draw and listed in `skipped`. It is an error
    if no file is left, or if MAX_FAILURES reads fail in a row.

    Args:
        config: corpora, batch size, and the options of the modality.
        seed: seed of all random draws.
        process, processes: number of this training process, and of all of them.
        workers: processes that read ahead in `batches`; 0: threads, which streams always use.
        scan: lists the files of a corpus that is not streamed.

    Attributes:
        media: the files that crops are taken from.
        axes: number of axes along which a crop is positioned.
        tokens: number of tokens of one crop.
        shape: shape of one crop.

    Raises:
        DataError: a corpus is missing, empty or damaged, or none of its files can be read.
    """

    media: ClassVar[MediaType]
    axes: ClassVar[int]
    tokens: int
    shape: tuple[int, ...]

    def __init__(
        self,
        config: Data,
        *,
        seed: int,
        process: int = 0,
        processes: int = 1,
        workers: int = 0,
        scan: Callable[[Any], Files],
    ) -> None:
        self.config: Any = config
        self.seed = seed
        self.process, self.processes = process, processes
        self.workers = 0 if config.streams else workers
        self._threads = max(1, min(4, (os.cpu_count() or 1) // 2))
        self._ahead = 2 * self._threads  # batches
        self._skipped: dict[str, None] = {}
        self._cache: dict[tuple[int, int], Any] = {}
        self._corpora = [self._open(corpus, scan) for corpus in config.train]
        shares = np.cumsum([corpus.weight for corpus in config.train])
        self._shares = shares / shares[-1] if len(shares) else shares
        phase = np.random.default_rng(self.seed).integers(2**64, dtype=np.uint64)
        self._phase = phase  # offset of the sequence that chooses corpora
        self._counts = [np.zeros(len(self._corpora), dtype=np.int64)]
        self._counting = threading.Lock() if config.streams else None  # locks do not survive forks

    @property
    def skipped(self) -> list[str]:
        """Files and items that could not be read so far."""
        return list(self._skipped)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the training data: file names, durations if known, and corpus weights.

        A streamed dataset contributes its configuration, not its contents. The fingerprint does not
        change if a folder is moved as a whole.
        """
        digest = hashlib.sha256()
        self._describe(digest.update)
        return digest.hexdigest()

    @property
    @abstractmethod
    def summary(self) -> str:
        """How much data there is, in a few words; empty if that is not known."""

    def batch(self, number: int) -> np.ndarray:
        """The crops of batch `number`, counted from 0: (batch_size, ...) float32 within [-1, 1].

        Raises:
            DataError: no file of a corpus can be read, or a stream fails.
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
        """The batches [first, last), read ahead in threads or worker processes.

        Closing the iterator ends the threads or processes.

        Raises:
            DataError: as for `batch`.
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

        loader: DataLoader[Any] = DataLoader(
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
            with suppress(RuntimeError):  # raised during the shutdown if a worker was killed
                iterator._shutdown_workers()  # now: a traceback may keep the iterator alive

    @property
    def _files(self) -> list[Files]:
        """The corpora that are not streamed."""
        return [corpus for corpus in self._corpora if isinstance(corpus, Files)]

    def _open(self, corpus: Any, scan: Callable[[Any], Files]) -> Files | Stream:
        if not isinstance(corpus, HuggingFaceCorpus):
            files = scan(corpus)
            self._skipped |= dict.fromkeys(files.unreadable)
            return files
        keep = (self._ahead + 2) * self.config.batch_size
        return Stream(corpus, self.media.feature, self.seed, self.process, self.processes, keep)

    def _describe(self, write: Callable[[bytes], None]) -> None:
        """Write the data that the fingerprint digests."""
        for corpus, config in zip(self._corpora, self.config.train):
            write(f"train {config.weight!r} ".encode())
            corpus.describe(write)

    def _choose(self, numbers: np.ndarray) -> np.ndarray:
        """Index of the corpus of each crop; `numbers` are uint64 of any shape."""
        if len(self._corpora) < 2:
            return np.zeros(numbers.shape, dtype=np.int64)
        place = ((numbers * np.uint64(GOLDEN) + self._phase) >> np.uint64(11)) * 2.0**-53
        return np.searchsorted(self._shares, place, side="right")

    def _items(self, number: int, which: np.ndarray) -> np.ndarray:
        """For each crop of a batch, the number of earlier crops of its corpus in this process."""
        with self._counting:
            while len(self._counts) <= number // COUNTED:
                end = len(self._counts) * COUNTED
                self._counts.append(self._counts[-1] + self._count(end - COUNTED, end))
        start = number // COUNTED
        before = self._counts[start] + self._count(start * COUNTED, number)
        same = which[:, None] == which[None, :]
        return before[which] + np.tril(same, -1).sum(1)

    def _count(self, first: int, last: int) -> np.ndarray:
        """Number of crops of each corpus in the batches [first, last) of this process."""
        size = self.config.batch_size
        starts = (np.arange(first, last) * self.processes + self.process) * size
        numbers = (starts[:, None] + np.arange(size)).astype(np.uint64)
        return np.bincount(self._choose(numbers).ravel(), minlength=len(self._corpora))

    def _crop(self, number: int, corpus: int, item: int) -> np.ndarray:
        """Crop `number` of the run, from item `item` if its corpus is streamed."""
        rng = np.random.default_rng([self.seed, number])
        if not self._corpora:
            found = self._generate(rng)
        elif isinstance(source := self._corpora[corpus], Files):
            found = self._from_file(source, rng)
        else:
            found = self._from_stream(source, item, rng.random(self.axes))
        return self._finish(found, rng)

    def _from_file(self, files: Files, rng: np.random.Generator) -> np.ndarray:
        """A cut at a random position of a random file."""
        while True:
            number, place = files.draw(rng.random()), rng.random(self.axes)
            if number not in files.broken:
                try:
                    found = self._read_patiently(files, number, place)
                except self.media.errors:
                    files.failures += 1
                    self._skipped[files.label(number)] = None
                    if self._is_lost(files, number):
                        files.broken.add(number)
                else:
                    files.failures = 0
                    return found
            if len(files.broken) == len(files) or files.failures >= MAX_FAILURES:
                raise DataError(f"{files.name}: no {self.media.noun} that can be read")

    def _read_patiently(self, files: Files, number: int, place: np.ndarray) -> np.ndarray:
        """`_read`, repeated after errors of the file system rather than of the file."""
        for pause in RETRIES:
            try:
                return self._read(files, number, place)
            except (FileNotFoundError, PermissionError, IsADirectoryError):
                raise
            except OSError:
                time.sleep(pause)
        return self._read(files, number, place)

    def _from_stream(self, stream: Stream, number: int, place: np.ndarray) -> np.ndarray:
        """A cut from item `number`, or from the next readable item."""
        for candidate in range(number, number + MAX_FAILURES):
            item = stream.item(candidate)
            try:
                return self._decode(stream.fetch(item), place)
            except self.media.errors:
                self._skipped[stream.label(candidate, item)] = None
        raise DataError(f"{stream.name}: {MAX_FAILURES} items in a row cannot be read")

    @abstractmethod
    def _read(self, files: Files, number: int, place: np.ndarray) -> np.ndarray:
        """A cut from a file; `place` is its position per axis, 0 to 1 of the possible range."""

    @abstractmethod
    def _decode(self, data: bytes, place: np.ndarray) -> np.ndarray:
        """A cut from the contents of a file, as `_read`."""

    @abstractmethod
    def _generate(self, rng: np.random.Generator) -> np.ndarray:
        """A generated signal in place of a cut, if there is no corpus."""

    @abstractmethod
    def _finish(self, cut: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Turn a cut into a crop, float32: augmentation and layout."""

    def _is_lost(self, files: Files, number: int) -> bool:
        """Whether no part of a file that failed to read can be read.

        Crops must not depend on what was read before, so a file is excluded for all crops or for
        none.
        """
        return True


class _WorkerCrops:
    """The data set of a worker process: crops with their own cache and list of broken files.

    An item is (batch, newly skipped, None), or (None, newly skipped, error).
    """

    def __init__(self, crops: Crops) -> None:
        self.crops = copy.copy(crops)
        self.crops._cache, self.crops._skipped = {}, {}

    def __getitem__(self, number: int) -> tuple[Any, list[str], str | None]:
        import torch

        seen, batch, problem = len(self.crops._skipped), None, None
        try:
            batch = torch.from_numpy(self.crops.batch(number))  # passed in shared memory
        except DataError as error:
            problem = str(error)
        return batch, self.crops.skipped[seen:], problem


def _begin_worker(_: int) -> None:
    # Terminals and schedulers signal all processes; the training process decides what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _unchanged(item: Any) -> Any:
    return item
