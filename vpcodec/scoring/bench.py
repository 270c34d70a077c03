"""One file through all systems: code it, align the result, and compute the metrics."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from .. import __version__
from ..media.audio import load, resample
from ..media.image import load_image
from ..metrics.base import Clip
from ..metrics.registry import choose
from .alignment import DelayFinder, find_delay, match_level, overlap, remove_delay
from .scores import ORIGINAL, Row
from .systems import Coded, ScoreError, System, with_components

Align = Literal["codec", "file", "none"]
LONGEST_DIFFERENCE = 0.5  # s, between the lengths of an original and its decoded file

_USER_ERRORS = (ValueError, OSError, MemoryError)  # AudioError, ScoreError ... are ValueErrors


@dataclass(frozen=True)
class Job:
    """What to compare and how; the same in all processes.

    Attributes:
        modality: "audio" or "image".
        root: folder of the references.
        systems: to score.
        metrics: names; None: the default metrics.
        align: how delays are estimated; images have none.
        level: whether decoded audio gets the power of its reference.
        rate: Hz at which audio is compared; None: the rate of each reference.
    """

    modality: Literal["audio", "image"]
    root: Path
    systems: tuple[System, ...]
    metrics: tuple[str, ...] | None = None
    align: Align = "codec"
    level: bool = False
    rate: int | None = None


@dataclass(frozen=True)
class Request:
    """A file, what to compute for it, and the delays."""

    file: str
    wanted: dict[int, bool]  # number of a system -> whether a row is wanted, or only tokens
    delays: Mapping[tuple[int, int], int]  # (number, rate) -> samples


@dataclass
class Outcome:
    """For one file and system: a row or why there is none, and how often codes occurred.

    `aligned` is false where a delay of the file was asked for and nothing is known of it.
    """

    row: Row | None = None
    failure: str | None = None
    codes: np.ndarray | None = None
    counts: np.ndarray | None = None
    aligned: bool = True


class Bench:
    """Systems and metrics, ready to process one file after another; one per process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.systems = job.systems
        self.measures, self.metrics, self.unavailable = choose(job.modality, job.metrics)
        self._functions = [measure.function for measure in self.measures]

    @property
    def without_reference(self) -> bool:
        """Whether some metrics need no reference, so that the originals are scored too."""
        return any(not metric.needs_reference for metric in self.metrics)

    def find_delays(self, file: str) -> dict[tuple[int, int], DelayFinder]:
        """(number of the system, rate) -> a finder with this file.

        Empty if the file cannot be used; `work` reports why.
        """
        found: dict[tuple[int, int], DelayFinder] = {}
        try:
            reference, stored = self._reference(file)
            rate = cast(int, stored)  # of audio
        except _USER_ERRORS:
            return {}
        for number, system in enumerate(self.systems):
            try:
                signal = _at(system.code(self.job.root / file), rate)
                finder = DelayFinder(rate)
                for x, y in zip(reference, signal):
                    finder.add(x, y)
            except _USER_ERRORS:
                continue
            found[number, rate] = finder
        return found

    def work(self, request: Request) -> dict[int, Outcome]:
        """Number of the system (-1: the originals) -> outcome."""
        try:
            original = _Original(*self._reference(request.file))
        except _USER_ERRORS as error:
            failure = _failure(request.file, "", error)
            return {number: Outcome(failure=failure) for number in request.wanted}
        outcomes = {}
        for number, with_row in request.wanted.items():
            try:
                outcomes[number] = self._outcome(request, number, with_row, original)
            except _USER_ERRORS as error:
                name = self.systems[number].name if number >= 0 else ORIGINAL
                outcomes[number] = Outcome(failure=_failure(request.file, name, error))
        return outcomes

    def example(self, file: str, delays: Mapping[tuple[int, int], int]) -> tuple[Any, Any, dict]:
        """Reference, rate, and system -> decoded signal, aligned and of the same shape.

        Systems that fail are left out.
        """
        original = _Original(*self._reference(file))
        decoded = {}
        for number, system in enumerate(self.systems):
            try:
                coded = system.code(self.job.root / file)
                part, span, *_ = self._aligned(original, coded, number, delays)
            except _USER_ERRORS:
                continue
            decoded[system.name] = np.zeros_like(original.signal)
            decoded[system.name][:, span] = part
        return original.signal, original.rate, decoded

    def _outcome(
        self, request: Request, number: int, with_row: bool, original: _Original
    ) -> Outcome:
        if number < 0:
            values = self._values(original.clips(), original.clips(), originals=True)
            return Outcome(self._row(ORIGINAL, request, original, None, 0.0, values))
        system = self.systems[number]
        coded = system.code(self.job.root / request.file)
        outcome = Outcome()
        if coded.tokens is not None:
            outcome.codes, outcome.counts = np.unique(coded.tokens, return_counts=True)
        if with_row:
            decoded, span, delay, outcome.aligned = self._aligned(
                original, coded, number, request.delays
            )
            values = self._values(original.clips(span), _wrapped(decoded, original.rate))
            if (same := system.consistency(coded)) is not None:
                values = {"consistency": same} | values
            outcome.row = self._row(
                system.name, request, original, coded.n_bytes, delay, values, number
            )
        return outcome

    def _reference(self, file: str) -> tuple[np.ndarray, int | None]:
        """(C, T) and the rate at which audio is compared, or (H, W, C) and None."""
        path = self.job.root / file
        if self.job.modality == "image":
            return load_image(path), None
        samples, rate = load(path)
        wanted = self.job.rate or rate
        return (resample(samples, rate, wanted) if wanted != rate else samples), wanted

    def _aligned(
        self,
        original: _Original,
        coded: Coded,
        number: int,
        delays: Mapping[tuple[int, int], int],
    ) -> tuple[np.ndarray, slice, float, bool]:
        """The decoded signal, the span of the reference to compare, the removed delay, s, and
        whether that of the file is known, if it was asked for."""
        reference, rate = original.signal, original.rate
        decoded = _at(coded, rate)
        if rate is None:
            return _as_image(decoded, reference.shape), slice(None), 0.0, True
        if len(decoded) != len(reference):
            raise ScoreError(f"{len(decoded)} channels came out of {len(reference)}")
        length, found = reference.shape[1], decoded.shape[1]
        if abs(found - length) > LONGEST_DIFFERENCE * rate:
            raise ScoreError(f"{found / rate:.2f} s came out of {length / rate:.2f} s")
        delay, known = _delay_at(delays, number, rate), True
        if self.job.align == "file" and length:
            loudest = int(np.argmax(np.square(reference, dtype=np.float64).sum(1)))
            pair = reference[loudest], decoded[loudest]
            finder = DelayFinder(rate)
            finder.add(*pair)
            known = finder.is_known
            delay = find_delay(*pair, rate) if known else 0
        span = overlap(delay, length, found)
        decoded = remove_delay(decoded, delay, length)[:, span]
        if self.job.level:
            decoded = match_level(reference[:, span], decoded)
        return decoded, span, delay / rate, known

    def _values(
        self, references: list[Any], decoded: list[Any], *, originals: bool = False
    ) -> dict[str, float]:
        """Metric -> mean over the channels that have a value."""
        wanted = [m.name for m in self.metrics if not (originals and m.needs_reference)]
        values: dict[str, float] = {}
        for measure, function in zip(self.measures, self._functions):
            names = [metric.name for metric in measure.metrics]
            if set(wanted).isdisjoint(names):
                continue
            try:
                found = np.array([function(x, y) for x, y in zip(references, decoded)], np.float64)
            except Exception as error:  # of any library
                raise ScoreError(f"{names[0]}: {type(error).__name__}: {error}") from error
            for name, column in zip(names, found.reshape(-1, len(names)).T):
                has = ~np.isnan(column)
                values[name] = float(column[has].mean()) if has.any() else float("nan")
        return {name: values[name] for name in wanted}

    def _row(
        self,
        name: str,
        request: Request,
        original: _Original,
        n_bytes: int | None,
        delay: float,
        values: dict[str, float],
        number: int = -1,
    ) -> Row:
        height, width = original.signal.shape[:2]  # or channels and samples
        seconds = None if original.rate is None else width / original.rate
        if n_bytes is not None:
            size = height * width if seconds is None else seconds
            rate_name = "bits_per_pixel" if seconds is None else "bitrate"
            values = {rate_name: 8 * n_bytes / size if size else float("nan")} | values
        key = cache_key(self, number, request.file, request.delays)
        return Row(name, request.file, delay, seconds, n_bytes, key, values)


class _Original:
    """A reference, (C, T) and its rate or (H, W, C) and None, with cached inputs of metrics."""

    def __init__(self, signal: np.ndarray, rate: int | None) -> None:
        self.signal, self.rate = signal, rate
        self._clips: dict[tuple[int, int, int], list[Any]] = {}

    def clips(self, span: slice = slice(None)) -> list[Any]:
        """The inputs of metrics for a span of the samples, made once for each span."""
        key = span.indices(self.signal.shape[1])
        if key not in self._clips:
            self._clips[key] = _wrapped(self.signal[:, span], self.rate)
        return self._clips[key]


def _wrapped(signal: np.ndarray, rate: int | None) -> list[Any]:
    """The inputs of measures: clips of the channels, or the image."""
    return [signal] if rate is None else [Clip(channel, rate) for channel in signal]


def _at(coded: Coded, rate: int | None) -> np.ndarray:
    """The signal at the rate at which it is compared."""
    if coded.rate == rate:
        return coded.signal
    if coded.rate is None or rate is None:
        raise ScoreError("an image cannot be compared with audio")
    return resample(coded.signal, coded.rate, rate)


def _as_image(decoded: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The image with the components of the reference, if that changes nothing visible."""
    if decoded.shape[:2] == shape[:2]:
        other = with_components(decoded, shape[2])
        if np.array_equal(with_components(other, decoded.shape[2]), decoded):
            return other
    raise ScoreError(f"{_size(decoded.shape)} came out of {_size(shape)}")


def _delay_at(delays: Mapping[tuple[int, int], int], number: int, rate: int) -> int:
    """The delay of a system in samples: estimated at this rate, else the median of other rates."""
    if (number, rate) in delays:
        return delays[number, rate]
    others = [delay / other for (of, other), delay in delays.items() if of == number]
    return round(float(np.median(others)) * rate) if others else 0


def cache_key(bench: Bench, number: int, file: str, delays: Mapping[tuple[int, int], int]) -> str:
    """Digest of all that a row depends on, except the set of metrics.

    That is the size and time of the file, the system, the settings, the delays and this version.
    """
    job = bench.job
    paths = [job.root / file]
    identity = ORIGINAL
    if number >= 0:
        identity = bench.systems[number].identity
        paths += bench.systems[number].files(paths[0])
    stats = [path.stat() for path in paths]
    found = sorted((rate, delay) for (of, rate), delay in delays.items() if of == number)
    parts = (
        __version__,
        identity,
        [(stat.st_size, stat.st_mtime_ns) for stat in stats],
        (job.align, job.level, job.rate) if number >= 0 else job.rate,
        found,
        _asr_model() if any(metric.name == "wer" for metric in bench.metrics) else None,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _asr_model() -> str:
    from ..metrics.neural import asr_model

    return asr_model()


def _failure(file: str, system: str, error: BaseException) -> str:
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    named = text if file in text else f"{file}: {text}"
    line = " ".join((f"{system}: {named}" if system else named).split())
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def _size(shape: tuple[int, ...]) -> str:
    form = {1: "grey", 2: "grey and alpha", 3: "RGB", 4: "RGBA"}.get(shape[2], "?")
    return f"{shape[1]} x {shape[0]} pixels, {form},"


_bench: Bench | None = None  # in a worker process


def begin(job: Job) -> None:
    """Make the bench of a worker process, which ends when its parent does."""
    global _bench
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _bench = Bench(job)


def call(method: str, item: Any) -> Any:
    """Call a method of the bench of this worker process."""
    return getattr(_bench, method)(item)


def lost(item: Any) -> Any:
    """The result in place of that of a process that died."""
    if isinstance(item, Request):
        failure = f"{item.file}: the process that scored it died"
        return {number: Outcome(failure=failure) for number in item.wanted}
    return {}
