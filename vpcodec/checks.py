"""Checks of the arrays that callers hand in."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_CHANNELS = 255
_SCALES = {"int16": np.float32(2**-15), "int32": np.float32(2**-31)}  # as soundfile has it


def check_rate(rate: float) -> int:
    """A sample rate in Hz as an int: NumPy's integers and floats that are whole will do.

    Raises:
        ValueError: it is no whole number.
    """
    try:
        if int(rate) == rate:
            return int(rate)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"a sample rate must be a whole number of Hz, got {rate!r}")


def to_array(values: Any, name: str) -> NDArray[Any]:
    """An array of what a caller hands in: arrays, lists, or tensors of torch, on any device.

    Raises:
        ValueError: a list whose rows differ in length.
    """
    if hasattr(values, "detach"):  # of torch, which is not imported here
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values  # NumPy has no bfloat16
    try:
        return np.asarray(values)
    except ValueError:
        raise ValueError(f"{name} must be an array, but the rows differ in length") from None


def like(array: NDArray[Any], given: Any) -> Any:
    """The array as what a caller handed in: a tensor on the same device for a tensor of torch."""
    if not hasattr(given, "detach"):
        return array
    return sys.modules["torch"].from_numpy(array).to(given.device)


def check_samples(samples: NDArray[Any]) -> NDArray[np.float32]:
    """Samples as float32 (C, T); int16 and int32 are scaled to [-1, 1).

    Raises:
        ValueError: another shape or dtype, NaN or infinite values, or more than MAX_CHANNELS.
    """
    samples = to_array(samples, "samples")
    scale = _SCALES.get(samples.dtype.name)
    known = samples.dtype.kind == "f" or scale is not None
    if not known or samples.ndim not in (1, 2) or samples.shape[:-1] == (0,):
        raise ValueError(
            "samples must be float, int16 or int32, (T,) or (C, T), got "
            f"{samples.dtype} of shape {samples.shape}"
        )
    samples = np.atleast_2d(samples)
    _refuse_many(samples, "samples", "(C, T)")
    if scale is not None:
        return samples.astype(np.float32) * scale
    checked = samples.astype(np.float32, copy=False)
    if not np.isfinite(checked).all():
        raise ValueError("samples hold NaN or infinite values")
    return checked


def _refuse_many(x: NDArray[Any], name: str, axes: str) -> None:
    if len(x) > MAX_CHANNELS:
        raise ValueError(
            f"{name} of shape {x.shape} have {len(x):,} channels, more than {MAX_CHANNELS}; "
            f"transpose? They must be {axes}"
        )


def check_tokens(
    tokens: NDArray[np.integer[Any]], axes: str, codebook_size: int
) -> NDArray[np.int64]:
    """Tokens as int64 with the `axes` (C, ...), of which the first may be missing.

    Raises:
        ValueError: another shape or dtype, a token out of range, or more than MAX_CHANNELS.
    """
    tokens = to_array(tokens, "tokens")
    n_axes = axes.count(",") + 1
    if tokens.ndim == n_axes - 1:
        tokens = tokens[None]
    if tokens.ndim != n_axes or not len(tokens) or (tokens.size and tokens.dtype.kind not in "iu"):
        raise ValueError(
            f"tokens must be {axes} integers, got {tokens.dtype} of shape {tokens.shape}"
        )
    _refuse_many(tokens, "tokens", axes)
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < codebook_size):
        place = np.argwhere((tokens < 0) | (tokens >= codebook_size))[0]
        names = axes.strip("()").replace("C", "channel").replace("N", "frame").split(", ")
        where = ", ".join(f"{name.removesuffix('s')} {i}" for name, i in zip(names, place))
        raise ValueError(f"token {tokens[tuple(place)]} at {where} is outside [0, {codebook_size})")
    return tokens.astype(np.int64, copy=False)


def check_channels(x: NDArray[Any], channels: int) -> None:
    """Raises ValueError where x (C, ...) has another number of channels."""
    if len(x) != channels:
        raise ValueError(f"expected {channels} channels, got {len(x)}")
