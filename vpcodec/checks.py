"""Checks of the arrays that callers hand in."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def check_samples(samples: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Samples as float32 (C, T).

    Raises:
        ValueError: another shape or dtype, NaN or infinite values.
    """
    samples = np.asarray(samples)
    if samples.dtype.kind != "f" or samples.ndim not in (1, 2) or samples.shape[:-1] == (0,):
        raise ValueError(
            f"samples must be float, (T,) or (C, T), got {samples.dtype} of shape {samples.shape}"
        )
    checked = np.atleast_2d(samples).astype(np.float32, copy=False)
    if not np.isfinite(checked).all():
        raise ValueError("samples hold NaN or infinite values")
    return checked


def check_tokens(
    tokens: NDArray[np.integer[Any]], axes: str, codebook_size: int
) -> NDArray[np.int64]:
    """Tokens as int64 with the `axes` (C, ...), of which the first may be missing.

    Raises:
        ValueError: another shape or dtype, or a token out of range.
    """
    tokens = np.asarray(tokens)
    n_axes = axes.count(",") + 1
    if tokens.ndim == n_axes - 1:
        tokens = tokens[None]
    if tokens.ndim != n_axes or not len(tokens) or (tokens.size and tokens.dtype.kind not in "iu"):
        raise ValueError(
            f"tokens must be {axes} integers, got {tokens.dtype} of shape {tokens.shape}"
        )
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < codebook_size):
        bad = tokens.min() if tokens.min() < 0 else tokens.max()
        raise ValueError(f"token {bad} is outside [0, {codebook_size})")
    return tokens.astype(np.int64, copy=False)


def check_channels(x: NDArray[Any], channels: int) -> None:
    """Raises ValueError where x (C, ...) has another number of channels."""
    if len(x) != channels:
        raise ValueError(f"expected {channels} channels, got {len(x)}")
