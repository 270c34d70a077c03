"""Tokens to train language models on, and to evaluate them on: held in memory, cut to excerpts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...codec import SpecialTokens
from ...config import LMConfig
from ...corpus import CorpusError, IterableTokenDataset, is_corpus
from ...model_folder import ModelFolder
from ...recipe.lm import TokenCorpus
from ...records import SUFFIXES, Record, RecordError, read_records, record_of
from ...tokenfile import ImageHeader, TokenFileError, TokenHeader, TokenReader
from ..corpora import DataError

Clip = NDArray[np.int32]
"""(T,) tokens of a channel of audio, or (rows, columns) of an image."""


def read_clips(
    corpora: Iterable[TokenCorpus], codec: ModelFolder, config: LMConfig
) -> tuple[list[Clip], list[str]]:
    """The tokens of corpora, each channel of audio by itself; of images, those without alpha.

    Args:
        corpora: what to read, in this order.
        codec: the model that made all of it.
        config: whose `grid` tells audio from images.

    Returns:
        The clips, and a line for each file that is left out, as it cannot be read or is too small.

    Raises:
        DataError: a corpus cannot be read or is empty, or tokens are of another model or modality.
    """
    clips: list[Clip] = []
    skipped: list[str] = []
    for corpus in corpora:
        before = len(clips)
        for name, tokens, header in _read(corpus.path, codec, config, skipped):
            parts = list(tokens.astype(np.int32))
            if isinstance(header, ImageHeader):  # whose alpha is another kind of picture
                parts = [parts[0].reshape(header.rows, header.columns)]
            for clip in parts:
                if clip.size and _fits(clip, config):
                    clips.append(clip)
                else:
                    skipped.append(f"{name}: too small")
        if len(clips) == before:
            reason = f" ({skipped[-1]})" if skipped else ""
            raise DataError(f"{corpus.path}: no tokens that can be used{reason}")
    return clips, skipped


def _read(
    path: str, codec: ModelFolder, config: LMConfig, skipped: list[str]
) -> Iterator[tuple[str, NDArray[np.int64], TokenHeader]]:
    """Name, tokens (channels, frames) and header of each item of a corpus; see `read_clips`."""
    here = Path(path)

    def checked(record: Record) -> tuple[str, NDArray[np.int64], TokenHeader]:
        return record.key, record.tokens, _check(record.key, record.header, codec, config)

    if is_corpus(here):
        try:
            for item in IterableTokenDataset(here, rank=0, world_size=1):
                yield checked(record_of(item, item.pop("tokens").numpy()))
        except (CorpusError, RecordError, OSError) as error:
            raise DataError(str(error)) from None
        return
    if here.suffix.lower() in SUFFIXES:
        try:
            yield from map(checked, read_records(here))
        except (RecordError, OSError) as error:
            raise DataError(f"{path}: {error}") from None
        return
    for file in sorted(here.rglob("*.tok")) if here.is_dir() else [here]:
        try:
            with open(file, "rb") as stream:
                reader = TokenReader(stream)
                _check(str(file), reader.header, codec, config)
                reader.coder = codec.coder
                tokens, header = reader.read_all()
        except (TokenFileError, OSError) as error:
            skipped.append(f"{file}: {error}")
        else:
            yield str(file), tokens, header


def _check(
    name: str, header: TokenHeader | None, codec: ModelFolder, config: LMConfig
) -> TokenHeader:
    """The header of tokens that fit; DataError if they do not."""
    if header is None:
        raise DataError(f"{name}: an array without a header, which does not say who made it")
    if not codec.knows(header.fingerprint):
        raise DataError(
            f"{name}: tokens of the model {header.model!r} (token space "
            f"{header.fingerprint.hex()[:8]}), not of {codec.config.name!r}"
        )
    if isinstance(header, ImageHeader) and config.grid is None:
        raise DataError(f"{name}: tokens of images need model.grid")
    if not isinstance(header, ImageHeader) and config.grid is not None:
        raise DataError(f"{name}: tokens of audio, but model.grid is for images")
    return header


def _fits(clip: Clip, config: LMConfig) -> bool:
    return config.grid is None or all(n >= m for n, m in zip(clip.shape, config.grid))


class Excerpts:
    """Random excerpts of clips as rows of ids: a pure function of seed and number.

    A row begins with bos. An excerpt of audio is up to `context` tokens from anywhere, with eos
    where the clip ends within them; one of an image is a random part of the size of the grid, row
    by row. Clips are drawn by their length.

    Args:
        clips: of `read_clips`.
        config: of the model.
        special: ids beside the tokens.
        batch_size: rows per batch.
        seed: of all draws.
        process, processes: number of this training process, and of all of them.
        skipped: what could not be read.

    Attributes:
        skipped: what could not be read.
    """

    def __init__(
        self,
        clips: list[Clip],
        config: LMConfig,
        special: SpecialTokens,
        *,
        batch_size: int,
        seed: int,
        process: int = 0,
        processes: int = 1,
        skipped: list[str] | None = None,
    ) -> None:
        self._clips, self._config, self._special = clips, config, special
        self._batch_size, self._seed = batch_size, seed
        self._process, self._processes = process, processes
        self.skipped = skipped or []
        self._ends = np.cumsum([clip.size for clip in clips])

    @property
    def summary(self) -> str:
        """How much data there is, in a few words."""
        return f"{int(self._ends[-1]):,} tokens of {len(self._clips):,} clips"

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of all tokens."""
        digest = hashlib.sha256()
        for clip in self._clips:
            digest.update(repr(clip.shape).encode())
            digest.update(np.ascontiguousarray(clip))
        return digest.hexdigest()

    def batch(self, number: int) -> NDArray[np.int64]:
        """The rows of batch `number`, counted from 0: (batch_size, context + 1) ids."""
        first = (number * self._processes + self._process) * self._batch_size
        return np.stack([self._row(first + i) for i in range(self._batch_size)])

    def batches(self, first: int, last: int) -> Iterator[NDArray[np.int64]]:
        """The batches [first, last)."""
        for number in range(first, last):
            yield self.batch(number)

    def _row(self, number: int) -> NDArray[np.int64]:
        random = np.random.default_rng([self._seed, number])
        token = random.integers(self._ends[-1])
        clip = self._clips[int(np.searchsorted(self._ends, token, side="right"))]
        special, context = self._special, self._config.context
        if self._config.grid is not None:
            rows, columns = self._config.grid
            top = random.integers(clip.shape[0] - rows + 1)
            left = random.integers(clip.shape[1] - columns + 1)
            found = clip[top : top + rows, left : left + columns].ravel()
        else:
            start = random.integers(max(0, len(clip) + 1 - context) + 1)
            found = np.append(clip[start : start + context], special.eos)[:context]
        row = np.full(context + 1, special.pad, np.int64)
        row[0] = special.bos
        row[1 : 1 + len(found)] = found
        return row
