"""Checks of the arguments of quantizers."""

from __future__ import annotations

import math
from collections.abc import Sequence


def check_levels(levels: Sequence[int]) -> tuple[int, ...]:
    """Check the levels of a grid, and return them as integers.

    Raises:
        ValueError: there are no levels, they are not integers of at least 2, or there are more
            codes than float64 can count exactly.
    """
    checked = tuple(int(level) for level in levels)
    if not checked or min(checked) < 2 or list(checked) != list(levels):
        raise ValueError(f"levels must be integers of at least 2, got {list(levels)}")
    if math.prod(checked) > 2**53:
        raise ValueError(f"a codebook of {math.prod(checked)} entries is too large")
    return checked


def check_positive(**numbers: int) -> None:
    """Raise ValueError for the first number that is not a positive integer."""
    for name, number in numbers.items():
        if isinstance(number, bool) or number != int(number) or number < 1:
            raise ValueError(f"{name} must be a positive integer, got {number}")


def check_share(**numbers: float) -> None:
    """Raise ValueError for the first number outside [0, 1]."""
    for name, number in numbers.items():
        if not 0 <= number <= 1:
            raise ValueError(f"{name} must be within [0, 1], got {number}")
