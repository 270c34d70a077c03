"""Scoring: code reference files, compare the results with them, and summarise."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import __version__
from ..media.audio import AUDIO_SUFFIXES
from ..media.files import find_files
from ..media.image import IMAGE_SUFFIXES
from ..metrics.base import Clip, Measure
from ..progress import Progress
from ..usage import CodebookUsage
from .alignment import MAX_DELAY, DelayFinder
from .bench import Align, Bench, Job, Request, begin, cache_key, call, lost
from .pool import LostWorkerError, Pool, WorkerError
from .report import EXAMPLES, Example, choose_examples
from .scores import ALWAYS, ORIGINAL, Row, Scores, Summary, SystemScores
from .systems import Decoded, ScoreError, System, build_system, parse_codecs, parse_losses

ALIGNMENTS: dict[Align, str] = {
    "codec": "one delay per codec, estimated and removed",
    "file": "one delay per file, estimated and removed",
    "none": "none",
}
DELAY_FILES = 16  # from which the delay of a codec is estimated


class Scoring:
    """Scores systems on reference files: estimate delays, measure each file, summarise.

    Args:
        reference: a file, or a folder with audio or images, including sub-folders.
        systems: what to score, from `build_systems`.
        metrics: names, or a string of names separated by commas; None: the default metrics.
        align: "codec" estimates one delay per system from up to 16 files and removes it, "file" one
            per file, "none" none.
        level: give decoded audio the power of its reference.
        rate: Hz at which audio is compared; None: the rate of each reference.
        jobs: number of processes.

    Raises:
        ScoreError: nothing to score, a mixture of audio and images, or an unusable system.
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
        modality, root, self.files = _find(Path(reference))
        if modality == "image":
            align, level, rate = "none", False, None
        if isinstance(metrics, str):
            metrics = metrics.split(",")
        names = None if metrics is None else tuple(name.strip() for name in metrics)
        if jobs < 1:
            raise ScoreError(f"jobs must be at least 1, got {jobs}")
        self.job = Job(modality, root, tuple(systems), names, align, level, rate)
        self.bench = Bench(self.job)
        for system in self.bench.systems:
            if system.modality not in (None, modality):
                raise ScoreError(
                    f"{system.name} is for {system.modality}, {reference} is {modality}"
                )
        called = [system.name for system in self.bench.systems]
        if twice := {name for name in called if called.count(name) > 1}:
            raise ScoreError(f"{min(twice)} occurs twice; NAME=PATH gives one another name")
        self._leave_out(names or ())
        self._jobs = min(jobs, len(self.files))
        self._delays: dict[tuple[int, int], int] = {}
        self._unaligned: Counter[int] = Counter()  # number of a system: files, of all files

    def _leave_out(self, named: Sequence[str]) -> None:
        """Try what may lack a network, and leave it out if nobody named it."""
        missing: dict[str, str] = {}
        for measure in self.bench.measures:
            names = {metric.name for metric in measure.metrics}
            if all(metric.default for metric in measure.metrics):
                continue
            try:
                _try(measure, self.job.modality)
            except Exception as error:  # of any library
                if "all" not in named or not names.isdisjoint(named):
                    raise
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                if not reason.startswith(tuple(names)):
                    reason = f"{', '.join(sorted(names))}: {reason}"
                missing |= dict.fromkeys(names, reason)
        if missing:
            every = [metric.name for metric in self.bench.metrics]
            metrics = tuple(name for name in every if name not in missing)
            unavailable = self.bench.unavailable | missing
            self.job = replace(self.job, metrics=metrics)
            self.bench = Bench(self.job)
            self.bench.unavailable = unavailable

    def run(
        self,
        known: Iterable[Row] = (),
        *,
        on_row: Callable[[Row], None] | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Score all files.

        Args:
            known: rows of an earlier run; those that have all metrics and whose cache key is still
                valid are not computed again.
            on_row: called with each new row, in the order of files.
            progress: told the files that are done, in each stage.
        """
        report = progress or (lambda label, done, total: None)
        self._unaligned.clear()
        with _Each(self.job, self.bench, self._jobs) as each:
            if self.job.align == "codec":
                self._delays = self._find_delays(each, report)
            earlier = {(row.system, row.file): row for row in known}
            requests, rows = self._requests(earlier.values())
            usages = {
                number: CodebookUsage(system.codebook_size)
                for number, system in enumerate(self.bench.systems)
                if system.codebook_size
            }
            failed = []
            for i, outcomes in enumerate(each.map("work", requests)):
                for number, outcome in outcomes.items():
                    if outcome.failure:
                        failed.append(outcome.failure)
                    if not outcome.aligned:
                        self._unaligned[number] += 1
                    if outcome.codes is not None:
                        usages[number].add(outcome.codes, outcome.counts)
                    if row := outcome.row:
                        before = earlier.get((row.system, row.file))
                        if before and before.cache_key == row.cache_key:
                            row = replace(row, values=before.values | row.values)
                        rows[number, row.file] = row
                        if on_row:
                            on_row(row)
                report("scoring", i + 1, len(requests))
        return self._scores(rows, usages, list(dict.fromkeys(failed)))

    def examples(self, scores: Scores, count: int = EXAMPLES) -> list[Example]:
        """Files to hear or see, coded again; see `choose_examples`."""
        found = []
        for title, file, note in choose_examples(scores, count):
            reference, rate, decoded = self.bench.example(file, self._delays)
            found.append(Example(title, file, note, rate, reference, decoded))
        return found

    def _find_delays(self, each: _Each, report: Progress) -> dict[tuple[int, int], int]:
        """(number of the system, rate) -> delay in samples, from files spread over all."""
        count = min(DELAY_FILES, len(self.files))
        spread = np.linspace(0, len(self.files) - 1, count).round().astype(int)
        total: dict[tuple[int, int], DelayFinder] = {}
        for i, found in enumerate(each.map("find_delays", [self.files[j] for j in spread])):
            for key, finder in (found or {}).items():
                if key in total:
                    total[key].merge(finder)
                else:
                    total[key] = finder
            report("finding delays", i + 1, count)
        known = {key: finder.delay for key, finder in total.items() if finder.is_known}
        for number in {number for number, _ in total} - {number for number, _ in known}:
            self._unaligned[number] = len(self.files)
        return known

    def _notes(self) -> list[str]:
        """What to say of systems whose delays are not known."""
        return [
            f"{self._name(number)}: no delay was removed"
            + (f" from {count} of {len(self.files)} files" if count < len(self.files) else "")
            + f", since the results are too unlike the originals, or more than {MAX_DELAY:g} s late"
            for number, count in sorted(self._unaligned.items())
        ]

    def _requests(self, known: Iterable[Row]) -> tuple[list[Request], dict[tuple[int, str], Row]]:
        """What to compute, and the rows that need not be computed again."""
        numbers = list(range(len(self.bench.systems)))
        if self.bench.without_reference:
            numbers.insert(0, -1)
        of_name = {self._name(number): number for number in numbers}
        by_key = {(of_name.get(row.system), row.file): row for row in known}
        requests, rows = [], {}
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
                requests.append(Request(file, wanted, self._delays))
        return requests, rows

    def _holds(self, row: Row, number: int) -> bool:
        """Whether a row has all metrics and is still valid."""
        wanted = {
            metric.name
            for metric in self.bench.metrics
            if number >= 0 or not metric.needs_reference
        }
        return wanted <= set(row.values) and self._is_current(row, number)

    def _is_current(self, row: Row, number: int) -> bool:
        """Whether nothing that the values of a row depend on has changed."""
        try:
            return row.cache_key == cache_key(self.bench, number, row.file, self._delays)
        except OSError:  # a file that has gone; whoever reads it next will report it
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
                for name in (*ALWAYS, *names)
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
            modality=self.job.modality,
            systems=systems,
            rows=ordered,
            metrics=self.bench.metrics,
            unavailable=self.bench.unavailable,
            failed=failed,
            settings=self._settings(),
            notes=self._notes(),
        )

    def _settings(self) -> dict[str, str]:
        found = {"reference": str(self.job.root), "files": str(len(self.files))}
        if self.job.modality == "audio":
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
    losses: str = "",
    **options: Any,
) -> Scores:
    """Compare files or folders, models and classic codecs with the originals.

    Args:
        reference: a file, or a folder of audio or of images.
        decoded: files or folders of results, matched by name; "lyra=results/3200" calls one lyra.
        models: names that `Codec.from_pretrained` takes; each encodes and decodes the references.
        codecs: such as "opus@6k,codec2@3200" or "webp@0", as a string or a list.
        losses: such as "5%,10%x3": each model is also scored over a live link that loses this share
            of its packets, singly or so many in a row.
        options: `metrics`, `align`, `level`, `rate` and `jobs` of `Scoring`.

    Returns:
        The scores; files that failed are in `Scores.failed`.

    Raises:
        ScoreError: nothing to compare, or a system that cannot be used.
        MetricError: a metric that does not exist or lacks its package.
        ModelError: a model that cannot be used.
    """
    models = [models] if isinstance(models, str) else models
    systems = build_systems(reference, decoded, models, codecs, losses)
    return Scoring(reference, systems, **options).run()


def build_systems(
    reference: str | os.PathLike[str],
    decoded: Sequence[str | os.PathLike[str]] = (),
    models: Sequence[str] = (),
    codecs: str | Sequence[str] = (),
    losses: str = "",
    *,
    backend: str = "onnx",
) -> list[System]:
    """The systems to compare with the originals; arguments as for `score`.

    Raises:
        ScoreError: a file, codec or program that does not exist.
        ModelError: a model that cannot be used.
    """
    systems: list[System] = []
    for path in [os.fspath(path) for path in decoded]:
        name, equals, rest = path.partition("=")
        if equals and not os.path.exists(path):
            systems.append(Decoded(Path(rest), Path(reference), name))
        else:
            systems.append(Decoded(Path(path), Path(reference)))
    known = parse_losses(losses) if losses else []
    if known and not models:
        raise ScoreError("losses are those of models, and none is named")
    for name in models:
        specs = [f"model:{name}", *(f"lossy:{loss}:{name}" for loss in known)]
        systems += [build_system(spec, backend=backend) for spec in specs]
    text = codecs if isinstance(codecs, str) else ",".join(codecs)
    return systems + [build_system(spec) for spec in (parse_codecs(text) if text else ())]


def _try(measure: Measure, modality: str) -> None:
    """Compute a measure once, so that missing networks fail before anything else is done."""
    random = np.random.default_rng(0)
    if modality == "image":
        sample: Any = random.integers(256, size=(64, 64, 3), dtype=np.uint8)
    else:
        sample = Clip(random.normal(scale=0.1, size=32_000).astype(np.float32), 16_000)
    measure.function(sample, sample)


class _Each:
    """Maps methods of a `Bench` over files, in this process or in others.

    If a process dies, only the file that it worked on is lost.
    """

    def __init__(self, job: Job, bench: Bench, jobs: int) -> None:
        self._bench, self._jobs = bench, jobs
        self._pool = Pool(jobs, begin=(begin, job)) if jobs > 1 else None

    def __enter__(self) -> _Each:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.close()

    def map(self, method: str, items: Sequence[Any]) -> Iterator[Any]:
        """The results in order, with `lost` in place of those of processes that died."""
        if self._pool is None:
            yield from map(getattr(self._bench, method), items)
            return
        running: list[Future[Any]] = []
        for i, item in enumerate(items):
            while len(running) < min(2 * self._jobs, len(items) - i):
                running.append(self._pool.submit(call, method, items[i + len(running)]))
            try:
                yield running.pop(0).result()
            except LostWorkerError:
                yield lost(item)
            except WorkerError as error:
                raise ScoreError(f"a worker failed ({error})") from None


def _find(reference: Path) -> tuple[Literal["audio", "image"], Path, list[str]]:
    """Modality, folder and relative names of the references."""
    if reference.is_dir():
        files = find_files(reference, AUDIO_SUFFIXES | IMAGE_SUFFIXES)
        root = reference
    else:
        reference.stat()  # raises what is wrong
        if not reference.is_file():
            raise ScoreError(f"{reference}: not a regular file")
        files, root = [Path(reference.name)], reference.parent
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise ScoreError(f"{reference}: no audio and no images in this folder")
    if images and len(images) < len(files):
        raise ScoreError(
            f"{reference}: {len(files) - len(images)} audio files and {len(images)} images; "
            "score them separately"
        )
    return ("image" if images else "audio"), root, [path.as_posix() for path in files]
