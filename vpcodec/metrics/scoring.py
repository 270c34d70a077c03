"""Scoring: reference files through codecs, compared with what came out."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import __version__
from ..media.audio import AUDIO_SUFFIXES, load, resample
from ..media.files import find_files
from ..media.image import IMAGE_SUFFIXES, load_image
from ..usage import CodebookUsage
from .alignment import DelayFinder, find_delay, match_level, overlap, remove_delay
from .registry import Clip, Measure, choose
from .report import Example, choose_examples
from .scores import ORIGINAL, Row, Scores, Summary, SystemScores
from .systems import Coded, Decoded, ScoreError, System, build_system, parse_codecs, with_components

Align = Literal["codec", "file", "none"]
Progress = Callable[[str, int, int], None]

ALIGNMENTS: dict[Align, str] = {
    "codec": "one delay per codec, found and removed",
    "file": "a delay per file, found and removed",
    "none": "as the files are",
}
DELAY_FILES = 16  # that the delay of a codec is found from
LONGEST_DIFFERENCE = 0.5  # s, of the lengths of an original and its decoded file

_USER_ERRORS = (ValueError, OSError, MemoryError)  # AudioError, ScoreError ... are ValueErrors


@dataclass(frozen=True)
class Job:
    """What is compared and how; the same in all processes.

    Attributes:
        kind: "audio" or "image".
        root: folder of the references.
        systems: that are scored.
        metrics: names; None for the default ones.
        align: how delays are found; nothing is for images.
        level: whether decoded audio gets the power of its reference.
        rate: Hz at which audio is compared; None for that of each reference.
    """

    kind: Literal["audio", "image"]
    root: Path
    systems: tuple[System, ...]
    metrics: tuple[str, ...] | None = None
    align: Align = "codec"
    level: bool = False
    rate: int | None = None


@dataclass(frozen=True)
class Task:
    """A file, what to do with it, and what was found of it."""

    file: str
    wanted: dict[int, bool]  # number of a system -> whether rows are wanted, or only its tokens
    delays: Mapping[tuple[int, int], int]  # (number, rate) -> samples


@dataclass
class Outcome:
    """Of one file and one system: a row or why there is none, and how often codes occurred."""

    row: Row | None = None
    failure: str | None = None
    codes: np.ndarray | None = None
    counts: np.ndarray | None = None


class Bench:
    """Systems and metrics, ready to work on one file after another; one for each process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.systems = job.systems
        self.measures, self.metrics, self.unavailable = choose(job.kind, job.metrics)
        self._functions = [measure.load() for measure in self.measures]

    def ready(self, _: None) -> None:
        """Nothing; that it is called shows that a process has begun."""

    @property
    def without_reference(self) -> bool:
        """Whether some metrics say something of the originals alone."""
        return any(not metric.needs_reference for metric in self.metrics)

    def find_delays(self, file: str) -> dict[tuple[int, int], DelayFinder]:
        """(number of the system, rate) -> a finder that knows this file; {} if it cannot be used,
        of which `work` will tell."""
        found = {}
        try:
            reference, rate = self._reference(file)
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

    def work(self, task: Task) -> dict[int, Outcome]:
        """Number of the system -> outcome; -1 stands for the originals."""
        try:
            original = _Original(*self._reference(task.file))
        except _USER_ERRORS as error:
            failure = _failure(task.file, "", error)
            return {number: Outcome(failure=failure) for number in task.wanted}
        outcomes = {}
        for number, with_row in task.wanted.items():
            try:
                outcomes[number] = self._outcome(task, number, with_row, original)
            except _USER_ERRORS as error:
                name = self.systems[number].name if number >= 0 else ORIGINAL
                outcomes[number] = Outcome(failure=_failure(task.file, name, error))
        return outcomes

    def example(self, file: str, delays: Mapping[tuple[int, int], int]) -> tuple[Any, Any, dict]:
        """Reference, rate, and system -> what came out, aligned and of the same shape; systems that
        fail are left out."""
        original = _Original(*self._reference(file))
        decoded = {}
        for number, system in enumerate(self.systems):
            try:
                coded = system.code(self.job.root / file)
                part, span, _ = self._aligned(original, coded, number, delays)
            except _USER_ERRORS:
                continue
            decoded[system.name] = np.zeros_like(original.signal)
            decoded[system.name][:, span] = part
        return original.signal, original.rate, decoded

    def _outcome(self, task: Task, number: int, with_row: bool, original: _Original) -> Outcome:
        if number < 0:
            values = self._values(original.clips(), original.clips(), originals=True)
            return Outcome(self._row(ORIGINAL, task, original, None, 0.0, values))
        system = self.systems[number]
        coded = system.code(self.job.root / task.file)
        outcome = Outcome()
        if coded.tokens is not None:
            outcome.codes, outcome.counts = np.unique(coded.tokens, return_counts=True)
        if with_row:
            decoded, span, delay = self._aligned(original, coded, number, task.delays)
            values = self._values(original.clips(span), _wrapped(decoded, original.rate))
            outcome.row = self._row(
                system.name, task, original, coded.n_bytes, delay, values, number
            )
        return outcome

    def _reference(self, file: str) -> tuple[np.ndarray, int | None]:
        """(C, T) and the rate of comparison, or (H, W, C) and None."""
        path = self.job.root / file
        if self.job.kind == "image":
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
    ) -> tuple[np.ndarray, slice, float]:
        """What came out, the span of the reference that it is to be compared with, and the delay
        that was removed, s."""
        reference, rate = original.signal, original.rate
        decoded = _at(coded, rate)
        if rate is None:
            return _as_image(decoded, reference.shape), slice(None), 0.0
        if len(decoded) != len(reference):
            raise ScoreError(f"{len(decoded)} channels came out of {len(reference)}")
        length, found = reference.shape[1], decoded.shape[1]
        if abs(found - length) > LONGEST_DIFFERENCE * rate:
            raise ScoreError(f"{found / rate:.2f} s came out of {length / rate:.2f} s")
        delay = _delay_at(delays, number, rate)
        if self.job.align == "file" and length:
            loudest = int(np.argmax(np.square(reference, dtype=np.float64).sum(1)))
            delay = find_delay(reference[loudest], decoded[loudest], rate)
        span = overlap(delay, length, found)
        decoded = remove_delay(decoded, delay, length)[:, span]
        if self.job.level:
            decoded = match_level(reference[:, span], decoded)
        return decoded, span, delay / rate

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
                table = np.array([function(x, y) for x, y in zip(references, decoded)], np.float64)
            except Exception as error:  # of any library
                raise ScoreError(f"{names[0]}: {type(error).__name__}: {error}") from error
            for name, column in zip(names, table.reshape(-1, len(names)).T):
                has = ~np.isnan(column)
                values[name] = float(column[has].mean()) if has.any() else float("nan")
        return {name: values[name] for name in wanted}

    def _row(
        self,
        name: str,
        task: Task,
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
            key = "bits_per_pixel" if seconds is None else "bitrate"
            values = {key: 8 * n_bytes / size if size else float("nan")} | values
        mark = fingerprint(self, number, task.file, task.delays)
        return Row(name, task.file, delay, seconds, n_bytes, mark, values)


class _Original:
    """A reference, (C, T) and its rate or (H, W, C) and None, and what metrics take of it."""

    def __init__(self, signal: np.ndarray, rate: int | None) -> None:
        self.signal, self.rate = signal, rate
        self._clips: dict[tuple[int, int, int], list[Any]] = {}

    def clips(self, span: slice = slice(None)) -> list[Any]:
        """Of a span of the samples; the same ones whenever it is asked for."""
        key = span.indices(self.signal.shape[1])
        if key not in self._clips:
            self._clips[key] = _wrapped(self.signal[:, span], self.rate)
        return self._clips[key]


def _wrapped(signal: np.ndarray, rate: int | None) -> list[Any]:
    """What measures take: clips of the channels, or the image."""
    return [signal] if rate is None else [Clip(channel, rate) for channel in signal]


def _at(coded: Coded, rate: int | None) -> np.ndarray:
    """The signal at the rate of comparison."""
    if coded.rate == rate:
        return coded.signal
    if coded.rate is None or rate is None:
        raise ScoreError("an image against audio")
    return resample(coded.signal, coded.rate, rate)


def _as_image(decoded: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The image with the channels of the reference, where that changes nothing that is seen."""
    if decoded.shape[:2] == shape[:2]:
        other = with_components(decoded, shape[2])
        if np.array_equal(with_components(other, decoded.shape[2]), decoded):
            return other
    raise ScoreError(f"{_size(decoded.shape)} came out of {_size(shape)}")


def _delay_at(delays: Mapping[tuple[int, int], int], number: int, rate: int) -> int:
    """The delay of a system in samples: found at this rate, else the median of others."""
    if (number, rate) in delays:
        return delays[number, rate]
    others = [delay / other for (of, other), delay in delays.items() if of == number]
    return round(float(np.median(others)) * rate) if others else 0


def fingerprint(bench: Bench, number: int, file: str, delays: Mapping[tuple[int, int], int]) -> str:
    """Of all that a row depends on but the set of metrics: the file's size and time, the system,
    the settings, the delays and this version."""
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
    from .neural import asr_model

    return asr_model()


class Scoring:
    """References through systems: find delays, measure files, sum up.

    Args:
        reference: a file, or a folder with audio or images, sub-folders included.
        systems: what is scored: `build_systems` makes them.
        metrics: names, or a string of them with commas; None for the default ones.
        align: "codec" finds the constant delay of each system from up to 16 files and removes it,
            "file" that of each file, "none" nothing.
        level: give decoded audio the power of its reference.
        rate: Hz at which audio is compared; None for that of each reference.
        jobs: processes.

    Raises:
        ScoreError: nothing to score, audio and images together, or a system that cannot be used.
        MetricError: a metric that does not exist or lacks its package.
    """

    def __init__(
        self,
        reference: str | os.PathLike[str],
        systems: Sequence[System],
        *,
        metrics: str | Sequence[str] | None = None,
        align: Align = "codec",
        level: bool = False,
        rate: int | None = None,
        jobs: int = 1,
    ) -> None:
        if align not in ALIGNMENTS:
            raise ScoreError(f"unknown alignment {align!r} (one of {', '.join(ALIGNMENTS)})")
        if not systems:
            raise ScoreError("nothing to compare with: name decoded files, a model or a codec")
        kind, root, self.files = _find(Path(reference))
        if kind == "image":
            align, level, rate = "none", False, None
        if isinstance(metrics, str):
            metrics = metrics.split(",")
        names = None if metrics is None else tuple(name.strip() for name in metrics)
        if jobs < 1:
            raise ScoreError(f"jobs must be at least 1, got {jobs}")
        self.job = Job(kind, root, tuple(systems), names, align, level, rate)
        self.bench = Bench(self.job)
        for system in self.bench.systems:
            if system.kind not in (None, kind):
                raise ScoreError(f"{system.name} is for {system.kind}, {reference} is {kind}")
        names = [system.name for system in self.bench.systems]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ScoreError(f"{min(twice)} is there twice; NAME=PATH gives another name")
        for measure in self.bench.measures:
            if not all(metric.default for metric in measure.metrics):
                _try(measure, kind)
        self._jobs = min(jobs, len(self.files))
        self._delays: dict[tuple[int, int], int] = {}

    def run(
        self,
        known: Iterable[Row] = (),
        *,
        on_row: Callable[[Row], None] | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Score all files.

        Args:
            known: rows of an earlier run; those that hold all metrics and whose fingerprint is
                still right are not computed again.
            on_row: called with each new row, in the order of files.
            progress: called with what is done, of how many, and what it is.
        """
        report = progress or (lambda label, done, total: None)
        with _Pool(self.job, self.bench, self._jobs) as pool:
            if self.job.align == "codec":
                self._delays = self._find_delays(pool, report)
            known = {(row.system, row.file): row for row in known}
            tasks, rows = self._tasks(known.values())
            usages = {
                number: CodebookUsage(system.codebook_size)
                for number, system in enumerate(self.bench.systems)
                if system.codebook_size
            }
            failed = []
            for i, outcomes in enumerate(pool.map("work", tasks)):
                for number, outcome in outcomes.items():
                    if outcome.failure:
                        failed.append(outcome.failure)
                    if outcome.codes is not None:
                        usages[number].add(outcome.codes, outcome.counts)
                    if row := outcome.row:
                        before = known.get((row.system, row.file))
                        if before and before.fingerprint == row.fingerprint:
                            row = replace(row, values=before.values | row.values)
                        rows[number, row.file] = row
                        if on_row:
                            on_row(row)
                report("scoring", i + 1, len(tasks))
        return self._scores(rows, usages, list(dict.fromkeys(failed)))

    def examples(self, scores: Scores) -> list[Example]:
        """The best, the median and the worst file, coded once more."""
        found = []
        for title, file, note in choose_examples(scores):
            reference, rate, decoded = self.bench.example(file, self._delays)
            found.append(Example(title, file, note, rate, reference, decoded))
        return found

    def _find_delays(self, pool: _Pool, report: Progress) -> dict[tuple[int, int], int]:
        """(number of the system, rate) -> samples, from files spread over all."""
        count = min(DELAY_FILES, len(self.files))
        spread = np.linspace(0, len(self.files) - 1, count).round().astype(int)
        total: dict[tuple[int, int], DelayFinder] = {}
        for i, found in enumerate(pool.map("find_delays", [self.files[j] for j in spread])):
            for key, finder in (found or {}).items():
                if key in total:
                    total[key].merge(finder)
                else:
                    total[key] = finder
            report("finding delays", i + 1, count)
        return {key: finder.delay for key, finder in total.items()}

    def _tasks(self, known: Iterable[Row]) -> tuple[list[Task], dict[tuple[int, str], Row]]:
        """What is to be done, and the rows that need not be."""
        numbers = list(range(len(self.bench.systems)))
        if self.bench.without_reference:
            numbers.insert(0, -1)
        of_name = {self._name(number): number for number in numbers}
        by_key = {(of_name.get(row.system), row.file): row for row in known}
        tasks, rows = [], {}
        for file in self.files:
            wanted = {}
            for number in numbers:
                row = by_key.get((number, file))
                if row and self._holds(row, number):
                    rows[number, file] = row
                    if number >= 0 and self.bench.systems[number].codebook_size:
                        wanted[number] = False
                else:
                    wanted[number] = True
            if wanted:
                tasks.append(Task(file, wanted, self._delays))
        return tasks, rows

    def _holds(self, row: Row, number: int) -> bool:
        """Whether a row is what would be computed now."""
        wanted = {
            metric.name
            for metric in self.bench.metrics
            if number >= 0 or not metric.needs_reference
        }
        return wanted <= set(row.values) and self._is_current(row, number)

    def _is_current(self, row: Row, number: int) -> bool:
        """Whether nothing that its values depend on has changed."""
        try:
            return row.fingerprint == fingerprint(self.bench, number, row.file, self._delays)
        except OSError:  # of a file that has gone; whoever reads it next will tell
            return False

    def _name(self, number: int) -> str:
        return ORIGINAL if number < 0 else self.bench.systems[number].name

    def _scores(
        self,
        rows: dict[tuple[int, str], Row],
        usages: dict[int, CodebookUsage],
        failed: list[str],
    ) -> Scores:
        names = [metric.name for metric in self.bench.metrics]
        systems = []
        for number in sorted({number for number, _ in rows}):
            own = [rows[number, file] for file in self.files if (number, file) in rows]
            summaries = {
                name: Summary.of([row.values.get(name, float("nan")) for row in own])
                for name in ("bitrate", "bits_per_pixel", *names)
                if any(name in row.values for row in own)
            }
            usage = usages.get(number)
            aligned = number >= 0 and self.job.align != "none"
            systems.append(
                SystemScores(
                    name=self._name(number),
                    identity="" if number < 0 else self.bench.systems[number].identity,
                    delay=float(np.median([row.delay for row in own])) if aligned else None,
                    summaries=summaries,
                    codebook=usage.summary() if usage else {},
                    counts=usage.counts if usage else None,
                    codebook_size=usage.codebook_size if usage else None,
                )
            )
        order = {file: i for i, file in enumerate(self.files)}
        ordered = [rows[key] for key in sorted(rows, key=lambda key: (key[0], order[key[1]]))]
        return Scores(
            kind=self.job.kind,
            systems=systems,
            rows=ordered,
            metrics=self.bench.metrics,
            unavailable=self.bench.unavailable,
            failed=failed,
            settings=self._settings(),
        )

    def _settings(self) -> dict[str, str]:
        found = {"reference": str(self.job.root), "files": str(len(self.files))}
        if self.job.kind == "audio":
            rate = f"{self.job.rate} Hz" if self.job.rate else "that of each reference"
            found |= {
                "alignment": ALIGNMENTS[self.job.align],
                "level": "matched" if self.job.level else "as it is",
                "rate": rate,
            }
        return found | {"vpcodec": __version__}


def score(
    reference: str | os.PathLike[str],
    *decoded: str | os.PathLike[str],
    models: str | Sequence[str] = (),
    codecs: str | Sequence[str] = (),
    **options: Any,
) -> Scores:
    """Compare files or folders, models and classic codecs with the originals.

    Args:
        reference: a file, or a folder of audio or of images.
        decoded: files or folders of results, matched by name; "lyra=results/3200" calls one lyra.
        models: names as of `Codec.from_pretrained`; each encodes and decodes the references.
        codecs: such as "opus@6k,codec2@3200" or "webp@0"; as a string or a list.
        options: `metrics`, `align`, `level`, `rate` and `jobs` of `Scoring`. With more than one
            job, a script needs `if __name__ == "__main__":`, as with any use of processes.

    Raises:
        ScoreError, MetricError, ModelError: something cannot be used; single files that fail are
            in `Scores.failed`.
    """
    models = [models] if isinstance(models, str) else models
    systems = build_systems(reference, decoded, models, codecs)
    return Scoring(reference, systems, **options).run()


def build_systems(
    reference: str | os.PathLike[str],
    decoded: Sequence[str | os.PathLike[str]] = (),
    models: Sequence[str] = (),
    codecs: str | Sequence[str] = (),
    *,
    backend: str = "onnx",
) -> list[System]:
    """What is compared with the originals at `reference`; arguments as of `score`.

    Raises:
        ScoreError, ModelError: one of them does not exist, or cannot be used here.
    """
    systems: list[System] = []
    for path in map(os.fspath, decoded):
        name, equals, rest = path.partition("=")
        if equals and not os.path.exists(path):
            systems.append(Decoded(Path(rest), Path(reference), name))
        else:
            systems.append(Decoded(Path(path), Path(reference)))
    systems += [build_system(f"model:{name}", backend=backend) for name in models]
    text = codecs if isinstance(codecs, str) else ",".join(codecs)
    return systems + [build_system(spec) for spec in (parse_codecs(text) if text else ())]


def _try(measure: Measure, kind: str) -> None:
    """Have what needs a network loaded, or fail, before anything else is done."""
    random = np.random.default_rng(0)
    if kind == "image":
        sample: Any = random.integers(256, size=(64, 64, 3), dtype=np.uint8)
    else:
        sample = Clip(random.normal(scale=0.1, size=32_000).astype(np.float32), 16_000)
    measure.load()(sample, sample)


class _Pool:
    """Maps methods of a `Bench` over files, in this process or in others.

    A process that dies takes nothing with it but the file that it worked on.
    """

    def __init__(self, job: Job, bench: Bench, jobs: int) -> None:
        self._job, self._bench, self._jobs = job, bench, jobs
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> _Pool:
        if self._jobs > 1:
            try:
                self._submit("ready", None).result()
            except BrokenProcessPool:
                self._close()
                raise ScoreError(
                    "other processes cannot be started; with jobs > 1 a script needs "
                    "`if __name__ == '__main__':`"
                ) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._close(at_once=kind is not None)

    def map(self, method: str, items: Sequence[Any]) -> Iterator[Any]:
        """The results in order; for a lost one `_lost`."""
        if self._jobs == 1:
            yield from map(getattr(self._bench, method), items)
            return
        ahead = 2 * self._jobs
        running: list[Future] = []
        for i in range(len(items)):
            while len(running) < min(ahead, len(items) - i):
                running.append(self._submit(method, items[i + len(running)]))
            try:
                yield running.pop(0).result()
            except BrokenProcessPool:  # one of those that ran: each alone tells which
                running = []
                yield self._alone(method, items[i])

    def _alone(self, method: str, item: Any) -> Any:
        self._close()
        try:
            return self._submit(method, item, processes=1).result()
        except BrokenProcessPool:
            return _lost(item)
        finally:
            self._close()

    def _submit(self, method: str, item: Any, processes: int | None = None) -> Future:
        with _one_thread():
            if self._executor is None:
                context = multiprocessing.get_context("spawn")
                self._executor = ProcessPoolExecutor(
                    processes or self._jobs, context, _begin, (self._job,)
                )
            try:
                return self._executor.submit(_call, method, item)
            except BrokenProcessPool as error:
                future: Future = Future()
                future.set_exception(error)
                return future

    def _close(self, *, at_once: bool = False) -> None:
        if self._executor:
            if at_once:  # instead of waiting for the files under way
                for process in list((self._executor._processes or {}).values()):
                    process.terminate()
            self._executor.shutdown(cancel_futures=True)
            self._executor = None


_bench: Bench | None = None  # of a worker process


def _begin(job: Job) -> None:
    global _bench
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _bench = Bench(job)


def _call(method: str, item: Any) -> Any:
    return getattr(_bench, method)(item)


def _lost(item: Any) -> Any:
    """What stands for the result of a process that died."""
    if isinstance(item, Task):
        failure = f"{item.file}: the process that scored it died"
        return {number: Outcome(failure=failure) for number in item.wanted}
    return {}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes started inside compute on one thread each."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: "1" for name in names})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _find(reference: Path) -> tuple[Literal["audio", "image"], Path, list[str]]:
    """Kind, folder and relative names of the references."""
    if reference.is_dir():
        files = find_files(reference, AUDIO_SUFFIXES | IMAGE_SUFFIXES)
        root = reference
    else:
        reference.stat()  # raises what is wrong
        if not reference.is_file():
            raise ScoreError(f"{reference}: not a file that can be read more than once")
        files, root = [Path(reference.name)], reference.parent
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise ScoreError(f"{reference}: no audio and no images in this folder")
    if images and len(images) < len(files):
        raise ScoreError(
            f"{reference}: {len(files) - len(images)} audio files and {len(images)} images; "
            "score them apart"
        )
    return ("image" if images else "audio"), root, [path.as_posix() for path in files]


def _failure(file: str, system: str, error: BaseException) -> str:
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    named = text if file in text else f"{file}: {text}"
    line = " ".join((f"{system}: {named}" if system else named).split())
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def _size(shape: tuple[int, ...]) -> str:
    kind = {1: "grey", 2: "grey and alpha", 3: "RGB", 4: "RGBA"}.get(shape[2], "?")
    return f"{shape[1]} x {shape[0]} pixels, {kind},"
