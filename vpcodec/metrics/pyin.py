"""Pitch by pYIN (Mauch and Dixon 2014, ICASSP), in NumPy.

YIN (de Cheveigné and Kawahara 2002) looks for the period of a frame where a difference function
falls below a threshold. pYIN takes every threshold from 0 to 1, each as likely as a beta
distribution says, so that a frame has several candidates with probabilities; a hidden Markov model,
whose states are pitches, each voiced and unvoiced, then finds the most likely track.

Parameters and details are those of librosa 0.11, so that the tracks are equal.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

_THRESHOLDS = np.linspace(0, 1, 101)[1:]
_TROUGH_DECAY = 2.0  # by exp of which each trough of a frame is less likely than the one before it
_NO_TROUGH = 0.01  # probability of the deepest trough where it is above the threshold
_SWITCH = 0.01  # probability that a frame is voiced and the next unvoiced, or the other way round
_GLIDE = 35.92  # octaves per second: the steepest change of pitch
_BLOCK = 256  # frames whose difference functions are computed at once
_TINY = float(np.finfo(np.float64).tiny)


def pyin(
    signal: np.ndarray,
    rate: int,
    *,
    lowest: float,
    highest: float,
    size: int,
    hop: int,
    steps: int,
) -> np.ndarray:
    """Track the fundamental frequency.

    Args:
        signal: float (T,), T >= size; frames begin at 0, hop, 2 hop, ...
        rate: Hz.
        lowest: Hz.
        highest: Hz.
        size: samples of a frame, more than the longest period.
        hop: samples.
        steps: pitches per semitone.

    Returns:
        (1 + (T - size) // hop,) Hz, float64, each one of the pitches; NaN where unvoiced.
    """
    frames = sliding_window_view(signal.astype(np.float64), size)[::hop]
    shortest, longest = math.floor(rate / highest), min(math.ceil(rate / lowest), size - 1)
    pitches = lowest * 2 ** (
        np.arange(math.floor(12 * steps * math.log2(highest / lowest)) + 1) / (12 * steps)
    )
    voiced = np.zeros((len(frames), len(pitches)))
    for start in range(0, len(frames), _BLOCK):
        block = slice(start, start + _BLOCK)
        difference = _normalized_difference(frames[block], shortest, longest)
        frame, lag, probability = _candidates(difference)
        frequency = rate / (shortest + lag + _parabola(difference, frame, lag))
        pitch = np.round(12 * steps * np.log2(frequency / lowest)).astype(int).clip(0)
        inside = pitch < len(pitches)
        # Of troughs with the same pitch, which are rare, the last one counts.
        voiced[block][frame[inside], pitch[inside]] = probability[inside]
    width = round(_GLIDE * 12 * hop / rate) * steps // 2  # both ways
    states = _most_likely(voiced, _transitions(len(pitches), width))
    return np.where(states < len(pitches), pitches[states % len(pitches)], np.nan)


def _normalized_difference(frames: np.ndarray, shortest: int, longest: int) -> np.ndarray:
    """YIN's cumulative mean normalized difference function.

    The difference d at a lag is the sum of (x[n] - x[n + lag])^2 over a frame that zeros follow;
    what is returned is d over the mean of d from lag 1 on.

    Returns:
        (frames, longest - shortest + 1), float64, about 1 where nothing repeats.
    """
    size = 2 * frames.shape[1]
    spectrum = np.fft.rfft(frames, size)
    power = spectrum.real**2 + spectrum.imag**2
    correlation = np.fft.irfft(power, size)[:, : longest + 1]
    left = np.cumsum(np.square(frames[:, :longest]), axis=1)  # what no sample is compared with
    left[:, 0] = 0  # as in librosa, for equal tracks; only the mean below has lag 1 in it
    difference = 2 * (correlation[:, :1] - correlation[:, 1:]) - left
    mean = np.cumsum(difference, axis=1) / np.arange(1, longest + 1)
    return difference[:, shortest - 1 :] / (mean[:, shortest - 1 :] + _TINY)


def _candidates(difference: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Troughs of the difference function that may be the period.

    Returns:
        Frame, lag (from the shortest) and probability of each, by frame and lag.
    """
    falls = np.diff(difference, axis=1, prepend=np.inf) < 0
    ends = np.ones((len(falls), 1), bool)
    rises = np.diff(difference, axis=1)
    falls[:, 0] = rises[:, 0] > 0
    frame, lag = np.nonzero(falls & np.concatenate([rises >= 0, ends], axis=1))
    height = difference[frame, lag]

    # One row per trough; below: whether it is below each threshold.
    below = height[:, None] < _THRESHOLDS
    first = np.searchsorted(frame, frame)  # trough of the same frame
    end = np.searchsorted(frame, frame, side="right")
    counts = np.concatenate([np.zeros((1, below.shape[1]), int), np.cumsum(below, axis=0)])
    before, count = counts[:-1] - counts[first], counts[end] - counts[first]
    decay = np.exp(-_TROUGH_DECAY * np.arange(difference.shape[1] + 1))
    prior = np.where(below, (1 - decay[1]) / (1 - decay[count.clip(1)]) * decay[before], 0)
    weights = _threshold_weights()
    probability = prior @ weights

    order = np.lexsort((height, frame))  # the lowest trough of each frame is first in its frame
    deepest = order[np.unique(frame, return_index=True)[1]]
    probability[deepest] += _NO_TROUGH * (~below[deepest] @ weights)
    found = probability > 0
    return frame[found], lag[found], probability[found]


@lru_cache(maxsize=1)
def _threshold_weights() -> np.ndarray:
    """Probability of each threshold: a beta distribution with parameters 2 and 18, mean 0.1.

    It is that of at least two successes in 19 trials, which has a closed form.
    """
    x = np.concatenate([[0], _THRESHOLDS])
    return np.diff(1 - (1 - x) ** 18 * (1 + 18 * x))


def _parabola(difference: np.ndarray, frame: np.ndarray, lag: np.ndarray) -> np.ndarray:
    """Where the parabola through a trough and its neighbours is lowest, as lags from the trough.

    0 at the first and last lag, and where it would be farther away than one.
    """
    last = difference.shape[1] - 1
    left, middle, right = (difference[frame, (lag + i).clip(0, last)] for i in (-1, 0, 1))
    curve, slope = right + left - 2 * middle, (right - left) / 2
    inside = (lag > 0) & (lag < last) & (np.abs(slope) < np.abs(curve))
    return np.where(inside, -slope / np.where(inside, curve, 1), 0)


class _Transitions(NamedTuple):
    """Log probabilities between states; voiced states come first, then the unvoiced."""

    full: np.ndarray  # (from, to)
    near: np.ndarray  # (2 width + 1, to voiced or unvoiced, from voiced or unvoiced, to pitch)


@lru_cache(maxsize=4)
def _transitions(pitches: int, width: int) -> _Transitions:
    """A pitch changes by at most `width`, with probabilities that form a triangle."""
    distance = np.abs(np.subtract.outer(np.arange(pitches), np.arange(pitches)))
    glide = np.maximum(width + 1 - distance, 0) / (width + 1)
    glide /= glide.sum(1, keepdims=True)
    keep = 1 - _SWITCH
    full = np.log(np.kron([[keep, 1 - keep], [1 - keep, keep]], glide) + _TINY)
    by_kind = full.reshape(2, pitches, 2, pitches)  # from kind, from pitch, to kind, to pitch
    near = np.full((2 * width + 1, 2, 2, pitches), -np.inf)
    to = np.arange(pitches)
    for i in range(2 * width + 1):
        source = to + i - width
        inside = (source >= 0) & (source < pitches)
        near[i][..., inside] = by_kind[:, source[inside], :, to[inside]].transpose(2, 1, 0)
    return _Transitions(full, near)


def _most_likely(voiced: np.ndarray, transitions: _Transitions) -> np.ndarray:
    """The most likely states (Viterbi).

    Args:
        voiced: (frames, pitches) probability of each pitch; what they lack to 1 is that of no
            voice, spread evenly over the unvoiced states.

    Returns:
        (frames,) states: pitches, from 0, and unvoiced pitches, from `pitches`.
    """
    count, pitches = voiced.shape
    full, near = transitions
    width = len(near) // 2
    unvoiced = (1 - voiced.sum(1).clip(0, 1)) / pitches
    values = np.empty((count, 2, pitches))  # of the best track that ends in each state
    values[:, 0] = np.log(voiced + _TINY)
    values[:, 1] = np.log(unvoiced + _TINY)[:, None]
    values[0] += math.log(1 / (2 * pitches) + _TINY)
    padded = np.full((2, pitches + 2 * width), -np.inf)
    sources = sliding_window_view(padded, pitches, axis=1).transpose(1, 0, 2)[:, None]
    sums = np.empty_like(near)
    far = math.log(_TINY)  # of what is farther away, as good as impossible
    for t in range(1, count):
        padded[:, width : width + pitches] = values[t - 1]
        np.add(sources, near, out=sums)
        best = sums.max(axis=0).max(axis=1)
        values[t] += np.maximum(best, values[t - 1].max() + far)
    flat = values.reshape(count, -1)
    states = np.empty(count, int)
    states[-1] = flat[-1].argmax()
    for t in range(count - 1, 0, -1):
        states[t - 1] = (flat[t - 1] + full[:, states[t]]).argmax()
    return states
