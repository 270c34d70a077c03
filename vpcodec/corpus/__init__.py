"""Corpora of tokens: recordings to sharded tables on Ray Data, and datasets for training on them.

`tokenize` needs the extra `corpus`; the datasets need torch, and pyarrow for Parquet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .inputs import CorpusError, Recording, list_recordings
from .plan import is_corpus
from .tokenize import Totals, describe, estimate, tokenize

if TYPE_CHECKING:
    from .datasets import IterableTokenDataset, TokenDataset

__all__ = [
    "CorpusError",
    "IterableTokenDataset",
    "Recording",
    "TokenDataset",
    "Totals",
    "describe",
    "estimate",
    "is_corpus",
    "list_recordings",
    "tokenize",
]


def __getattr__(name: str) -> Any:  # so that torch is imported for those who train only
    if name not in ("IterableTokenDataset", "TokenDataset"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import datasets

    return getattr(datasets, name)
