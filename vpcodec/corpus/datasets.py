"""Datasets of torch over a corpus of tokens, for DataLoaders on several ranks and workers."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..records import Record, RecordFile, facts_of
from .inputs import CorpusError
from .plan import Plan, open_plan
from .shards import read_shard

Item = dict[str, Any]
"""`tokens` as an int64 tensor (channels, frames), and all other columns of the record."""


class TokenDataset(Dataset[Item]):
    """The clips of a corpus by number. It can be pickled and sent to the workers of a DataLoader.

    Args:
        folder: of a corpus in Parquet.

    Raises:
        CorpusError: no such corpus, one in another format, or one that is not complete.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._plan = open_plan(folder)
        if self._plan.settings.format != "parquet":
            raise CorpusError(
                f"{folder}: in the format {self._plan.settings.format}, which has no order of "
                "access; use IterableTokenDataset"
            )
        self._ends = list(accumulate(_counts(self._plan), initial=0))
        self._open: tuple[int, RecordFile] | None = None

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> Item:
        if not -len(self) <= number < len(self):
            raise IndexError(f"clip {number} of {len(self)}")
        number %= len(self)
        shard = bisect_right(self._ends, number) - 1
        if self._open is None or self._open[0] != shard:
            if self._open is not None:
                self._open[1].__exit__()
            self._open = shard, RecordFile(self._plan.data_files(shard)[0])
        return _item(self._open[1].read(number - self._ends[shard]))

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": None}


class IterableTokenDataset(IterableDataset[Item]):
    """The clips of a corpus in any format, one after the other.

    Each worker of each rank has its own shards, or, where there are fewer shards than workers, its
    own clips of every shard. With `shuffle`, the shards and the clips in each are in an order that
    depends on `seed` and the epoch alone; the epoch grows with each iteration, or is set with
    `set_epoch`. `state_dict` and `load_state_dict` resume in the middle of an epoch, in each worker
    from its own state, as torchdata's StatefulDataLoader does.

    Args:
        folder: of a corpus.
        shuffle: whether to shuffle.
        seed: of the order.
        rank: of this process among those that train; None: from torch.distributed if it is
            initialised, else 0.
        world_size: how many processes train; None: as `rank`, else 1.

    Raises:
        CorpusError: no such corpus, or one that is not complete.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self._plan = open_plan(folder)
        self._counts = _counts(self._plan)
        self._shuffle, self._seed = shuffle, seed
        if rank is None or world_size is None:
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if distributed else 0
            world_size = torch.distributed.get_world_size() if distributed else 1
        self._rank, self._world_size = rank, world_size
        self._epoch = 0
        self._done = 0  # clips of this epoch that this worker has given
        self._resumed = False

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration, which begins at its start."""
        self._epoch, self._done, self._resumed = epoch, 0, False

    def state_dict(self) -> dict[str, int]:
        """Where this worker is."""
        return {"epoch": self._epoch, "done": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration go on where the state was taken."""
        self._epoch, self._done, self._resumed = state["epoch"], state["done"], True

    def __iter__(self) -> Iterator[Item]:
        if not self._resumed:
            self._done = 0
        self._resumed = False
        skip = self._done
        for shard, numbers in self._order():
            if skip >= len(numbers):
                skip -= len(numbers)
                continue
            for record in _selected(self._plan, shard, numbers[skip:]):
                self._done += 1
                yield _item(record)
            skip = 0
        self._epoch, self._done = self._epoch + 1, 0

    def _order(self) -> Iterator[tuple[int, list[int]]]:
        """The shards of this worker, and the numbers of its clips in each."""
        info = get_worker_info()
        n_workers = info.num_workers if info else 1
        place = self._rank * n_workers + (info.id if info else 0)
        n_places = self._world_size * n_workers
        random = np.random.default_rng((self._seed, self._epoch))
        n_shards = len(self._counts)
        shards = random.permutation(n_shards) if self._shuffle else np.arange(n_shards)
        alone = n_shards >= n_places
        for shard in shards[place::n_places] if alone else shards:
            own = np.random.default_rng((self._seed, self._epoch, int(shard)))
            numbers = np.arange(self._counts[shard])
            if self._shuffle:
                numbers = own.permutation(numbers)
            yield int(shard), (numbers if alone else numbers[place::n_places]).tolist()


def _counts(plan: Plan) -> list[int]:
    """The number of clips in each shard."""
    counts = []
    for shard in range(plan.n_shards):
        report = plan.report(shard)
        if report is None:
            raise CorpusError(
                f"{plan.folder}: not complete: shard {shard} of {plan.n_shards} is missing"
            )
        counts.append(int(report["records"]))
    return counts


def _selected(plan: Plan, shard: int, numbers: list[int]) -> Iterator[Record]:
    """Records of a shard by their numbers."""
    if plan.settings.format == "parquet":
        with RecordFile(plan.data_files(shard)[0]) as file:
            file_order = all(a < b for a, b in zip(numbers, numbers[1:]))
            if file_order:
                yield from map(file.read, numbers)
                return
            found = {number: file.read(number) for number in sorted(numbers)}
    else:
        wanted = set(numbers)
        found = {i: x for i, x in enumerate(read_shard(plan, shard)) if i in wanted}
    for number in numbers:
        yield found.pop(number)


def _item(record: Record) -> Item:
    return facts_of(record) | {"tokens": torch.from_numpy(record.tokens)}
