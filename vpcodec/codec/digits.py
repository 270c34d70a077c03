"""What a token is made of: its digits, and ids beyond the codebook for language models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..checks import like, to_array


class SpecialTokens(NamedTuple):
    """Ids for what is no sound and no pixel, after those of the codebook.

    Attributes:
        bos: beginning of a sequence, codebook_size.
        eos: end of a sequence, codebook_size + 1.
        pad: padding, codebook_size + 2.
    """

    bos: int
    eos: int
    pad: int

    @classmethod
    def after(cls, codebook_size: int) -> SpecialTokens:
        return cls(codebook_size, codebook_size + 1, codebook_size + 2)

    @property
    def vocabulary_size(self) -> int:
        """Number of all ids, those of the codebook included."""
        return self.pad + 1


def split_tokens(tokens: Any, levels: Sequence[int]) -> Any:
    """Tokens (...) to digits (..., D), see `Codec.split_tokens`."""
    array = _integers(tokens, "tokens")
    size = math.prod(levels)
    _check_range(array, size, "token")
    places = np.cumprod([1, *levels[:-1]], dtype=np.int64)
    digits = array[..., None] // places % np.array(levels, np.int64)
    return like(digits, tokens)


def join_tokens(digits: Any, levels: Sequence[int]) -> Any:
    """Digits (..., D) to tokens (...), see `Codec.join_tokens`."""
    array = _integers(digits, "digits")
    if array.shape[-1:] != (len(levels),):
        raise ValueError(f"digits must be (..., {len(levels)}), got shape {array.shape}")
    for i, level in enumerate(levels):
        _check_range(array[..., i], level, f"digit {i}:")
    places = np.cumprod([1, *levels[:-1]], dtype=np.int64)
    return like(array @ places, digits)


def _integers(values: Any, name: str) -> np.ndarray:
    array = to_array(values, name)
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {array.dtype}")
    return array.astype(np.int64)


def _check_range(array: np.ndarray, size: int, name: str) -> None:
    bad = (array < 0) | (array >= size)
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"{name} {array[place]} at {list(place)} is outside [0, {size})")
