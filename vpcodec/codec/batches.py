"""Several clips at once: lists of arrays, and arrays that are padded to one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checks import MAX_CHANNELS, like


class PaddedBatch(NamedTuple):
    """Clips of different lengths in one array; arrays of NumPy, or tensors of torch.

    Attributes:
        values: (B, C, N) tokens or samples, padded at the end.
        lengths: int64 (B,), tokens or samples of each clip.
        mask: bool (B, N), true where there is no padding.
    """

    values: Any
    lengths: Any
    mask: Any


def is_batch(x: Any) -> bool:
    """Whether x is several clips: a padded batch, or a list of arrays or tensors."""
    if isinstance(x, PaddedBatch):
        return True
    if not isinstance(x, (list, tuple)):
        return False
    return all(getattr(item, "ndim", 0) > 0 for item in x)


def clips_of(x: Any) -> list[Any]:
    """The clips of a batch, each (C, n) or (n,); a list of one clip for what is no batch.

    Raises:
        ValueError: lengths of a padded batch that do not fit its values.
    """
    if not isinstance(x, PaddedBatch):
        return list(x) if is_batch(x) else [x]
    lengths = [int(length) for length in x.lengths]
    longest = x.values.shape[-1]
    if len(lengths) != len(x.values) or not all(0 <= length <= longest for length in lengths):
        raise ValueError(
            f"lengths {lengths} do not fit a padded batch of shape {tuple(x.values.shape)}"
        )
    return [clip[..., :length] for clip, length in zip(x.values, lengths)]


def padded(clips: Sequence[NDArray[Any]], filler: int, given: Any) -> PaddedBatch:
    """Clips (C, n) as one batch.

    Args:
        clips: at least one, all with the same number of channels.
        filler: what they are padded with.
        given: makes the result tensors if it is one.

    Raises:
        ValueError: no clips, or clips that differ in their number of channels.
    """
    channels = sorted({len(clip) for clip in clips})
    if len(channels) != 1:
        found = f"clips of {channels[0]} and {channels[-1]} channels" if channels else "no clips"
        raise ValueError(f"{found} cannot be padded to one array")
    lengths = np.array([clip.shape[1] for clip in clips], np.int64)
    values = np.full((len(clips), channels[0], lengths.max()), filler, clips[0].dtype)
    for row, clip in zip(values, clips):
        row[:, : clip.shape[1]] = clip
    mask = np.arange(lengths.max()) < lengths[:, None]
    return PaddedBatch(like(values, given), like(lengths, given), like(mask, given))


def groups(shapes: Sequence[tuple[int, int]], size: int) -> list[list[int]]:
    """The numbers of clips of similar lengths that go through a graph together.

    Args:
        shapes: (C, n) of each clip.
        size: clips in a group, at most; their channels are at most MAX_CHANNELS together.
    """
    found: list[list[int]] = []
    channels = 0
    for i in sorted(range(len(shapes)), key=lambda i: shapes[i][1]):
        channels += shapes[i][0]
        if not found or len(found[-1]) == size or channels > MAX_CHANNELS:
            found.append([])
            channels = shapes[i][0]
        found[-1].append(i)
    return found
