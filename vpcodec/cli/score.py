"""vpcodec score: how close decoded audio or images are to the originals."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import typer

from . import options


def score(
    reference: str = typer.Argument(None, metavar="REF", help="Originals: a file or a folder."),
    decoded: list[str] = typer.Argument(
        None,
        metavar="[DEG...]",
        help="Decoded files or folders, matched by name; NAME=PATH gives one a name.",
    ),
    model: list[str] = typer.Option(
        [],
        "--model",
        "-m",
        metavar="MODEL",
        help="A model to encode and decode the originals with; repeatable.",
    ),
    codec: list[str] = typer.Option(
        [],
        "--codec",
        metavar="CODECS",
        help="Other codecs, such as opus@6k,codec2@3200 or webp@0,jpeg@10.",
    ),
    loss: str = typer.Option(
        "",
        metavar="LOSSES",
        help="Also score each model over a live link that loses packets of 18 ms: 5%, or 10%x3 for "
        "three in a row.",
    ),
    metrics: str = typer.Option(
        None,
        "--metrics",
        metavar="NAMES",
        help="Names separated by commas, or all that can be had; default: see --list.",
    ),
    align: str = typer.Option(
        "codec",
        metavar="codec|file|none",
        help="Estimate and remove one delay per codec, one per file, or none.",
    ),
    match_level: bool = typer.Option(
        False, "--match-level", help="Give decoded audio the power of its original."
    ),
    rate: int = typer.Option(
        None,
        min=1000,
        metavar="HZ",
        help="Compare audio at this rate, Hz; default: the rate of each original.",
    ),
    backend: str = options.BACKEND,
    jobs: int = options.JOBS,
    as_json: bool = options.JSON,
    csv: Path = typer.Option(None, metavar="FILE", help="Write the statistics as CSV."),
    jsonl: Path = typer.Option(
        None, metavar="FILE", help="Write the values of each file as JSON lines."
    ),
    resume: bool = typer.Option(
        False, "--resume", help="Keep the lines of --jsonl that are still valid."
    ),
    report: Path = typer.Option(
        None, metavar="FILE", help="Write an HTML page with tables, plots, audio and images."
    ),
    examples: int = typer.Option(
        3, metavar="N", min=1, max=100, help="Files to hear or see on the page, from best to worst."
    ),
    list_metrics: bool = typer.Option(False, "--list", help="List all metrics and exit."),
) -> None:
    """Compare decoded files, models and other codecs with the originals, in one table.

    \b
    vpcodec score recordings/ decoded/
    vpcodec score recordings/ -m speech-3k --codec opus@6k --report page.html
    """
    from . import common

    if list_metrics:
        _list(as_json)
        return
    if reference is None:
        raise common.UsageError("name the originals: a file or a folder (see --help)")
    if resume and jsonl is None:
        raise common.UsageError("--resume needs --jsonl FILE")
    for path in filter(None, (csv, jsonl, report)):
        _check_output(path)

    from ..metrics.base import MetricError
    from ..scoring.run import Scoring, build_systems
    from ..scoring.systems import ScoreError

    bars = StageBars()
    try:
        scoring = Scoring(
            reference,
            build_systems(reference, decoded or (), model, codec, loss, backend=backend),
            metrics=metrics,
            align=align,
            level=match_level,
            rate=rate,
            jobs=jobs,
        )
        for reason in dict.fromkeys(scoring.bench.unavailable.values()):
            print(f"vpcodec: left out: {reason}", file=sys.stderr)
        lines = Lines(jsonl, resume)
        with bars:
            scores = scoring.run(lines.known, on_row=lines.write, progress=bars.report)
        lines.finish(scores, scoring.files)
        if scores.rows:
            print(json.dumps(scores.to_dict(), indent=2) if as_json else scores.to_text())
        if report is not None and scores.rows:
            from ..scoring.report import write_report

            facts = {
                "date": time.strftime("%Y-%m-%d %H:%M %Z"),
                "command": shlex.join(["vpcodec", *sys.argv[1:]]),
            }
            write_report(report, scores, scoring.examples(scores, examples), facts=facts)
    except (MetricError, ScoreError) as error:
        raise common.UsageError(str(error)) from None

    if not scores.rows and len(scores.failed) == 1:
        raise common.UsageError(scores.failed[0])
    for line in scores.failed:
        print(f"vpcodec: {line}", file=sys.stderr)
    if not scores.rows:
        raise common.UsageError(f"all {len(scores.failed)} comparisons failed")
    if csv is not None:
        from ..media.files import atomic_output

        with atomic_output(csv) as file:
            file.write(scores.to_csv().encode(errors="replace"))
    if scores.failed:
        raise typer.Exit(1)


def _check_output(path: Path) -> None:
    """Refuse now what could not be written at the end."""
    from .common import UsageError

    if path.is_dir():
        raise UsageError(f"{path}: it is a folder")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: its folder does not exist")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise UsageError(f"{path}: it cannot be written")


class StageBars:
    """A bar for each stage of the work."""

    def __init__(self) -> None:
        self._label = ""
        self._bar: Any = None

    def report(self, label: str, done: int, total: int | None) -> None:
        from . import common

        if label != self._label:
            self.__exit__()
            self._label, self._bar = label, common.ProgressBar(label, total or 1)
        self._bar.finish("")

    def __enter__(self) -> StageBars:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()


class Lines:
    """The file of --jsonl: rows are appended as they come; at the end each is there once.

    Args:
        path: the file; None does nothing.
        resume: keep the rows of an earlier run, in `known`.

    Raises:
        UsageError: the file has other lines in it; only the last may be cut off.
    """

    def __init__(self, path: Path | None, resume: bool) -> None:
        from ..media.files import is_device

        self.known: list[Any] = []
        self._file = path
        if path is None:
            return
        if is_device(path):
            return
        if resume and path.is_file():
            self.known = _read_rows(path)
        self._replace(self.known)

    def write(self, row: Any) -> None:
        if self._file is not None:
            from ..media.files import appended

            with appended(self._file) as file:
                file.write(row.to_json().encode() + b"\n")

    def finish(self, scores: Any, files: list[str]) -> None:
        """Sort the rows, after those of other systems and files, and drop outdated ones."""
        from ..media.files import is_device

        if self._file is None or is_device(self._file):
            return
        systems = {row.system for row in scores.rows}
        tried = set(files)
        others = [x for x in self.known if x.system not in systems or x.file not in tried]
        self._replace([*others, *scores.rows])

    def _replace(self, rows: list[Any]) -> None:
        from ..media.files import atomic_output

        with atomic_output(self._file) as file:
            file.writelines(row.to_json().encode() + b"\n" for row in rows)


def _read_rows(path: Path) -> list[Any]:
    from ..scoring.scores import Row
    from .common import UsageError

    rows: dict[tuple[str, str], Row] = {}
    lines = path.read_text(errors="replace").splitlines()
    for i, line in enumerate(lines):
        try:
            row = Row.from_json(line)
        except ValueError as error:
            if i == len(lines) - 1 and rows:
                break  # cut off when the last run ended
            raise UsageError(f"{path}: line {i + 1} is {error}") from None
        rows[row.system, row.file] = row
    return list(rows.values())


def _list(as_json: bool) -> None:
    from ..metrics.registry import METRICS, SYSTEM_METRICS

    metrics = [*METRICS.values(), *SYSTEM_METRICS.values()]
    if as_json:
        rows = [
            {
                "name": metric.name,
                "label": metric.label,
                "kind": metric.modality,
                "unit": metric.unit,
                "better": metric.better,
                "rate": metric.rate,
                "needs_reference": metric.needs_reference,
                "default": metric.default,
                "packages": metric.packages,
                "missing": metric.missing,
                "source": metric.source,
            }
            for metric in metrics
        ]
        print(json.dumps(rows, indent=2))
        return
    for metric in metrics:
        flag = "-" if metric.missing else "*" if metric.default else " "
        rate = f"{metric.rate:,} Hz" if metric.rate else ""
        reference = "" if metric.needs_reference else "no reference"
        lack = f"needs {', '.join(metric.missing)}" if metric.missing else ""
        words = (metric.unit, metric.better, rate, reference, metric.source, lack)
        print(
            f"{flag} {metric.name:<22} {metric.modality:<6} "
            + "; ".join(word for word in words if word)
        )
    print("* computed by default; - its packages are missing")
