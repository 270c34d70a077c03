"""vpcodec score: how close decoded audio or images come to the originals."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from . import options


def score(
    reference: str = typer.Argument(None, metavar="REF", help="Originals: a file or a folder."),
    decoded: list[str] = typer.Argument(
        None,
        metavar="[DEG...]",
        help="What is compared: files or folders, matched by name; as NAME=PATH under a name.",
    ),
    model: list[str] = typer.Option(
        [], "--model", "-m", help="A model that encodes and decodes the originals; repeatable."
    ),
    codec: list[str] = typer.Option(
        [],
        "--codec",
        help="Other codecs, such as opus@6k,codec2@3200 or webp@0,jpeg@10.",
    ),
    metrics: str = typer.Option(
        None, "--metrics", help="Names with commas, or all; default: see --list."
    ),
    align: str = typer.Option(
        "codec", help="Delays that are found and removed: of a codec, of each file, or none."
    ),
    match_level: bool = typer.Option(
        False, "--match-level", help="Give decoded audio the power of its original."
    ),
    rate: int = typer.Option(
        None, min=1000, help="Compare audio at this rate, Hz; default: that of each original."
    ),
    backend: str = options.BACKEND,
    jobs: int = options.JOBS,
    as_json: bool = options.JSON,
    csv: Path = typer.Option(None, help="Write the statistics as CSV."),
    jsonl: Path = typer.Option(None, help="Write the values of each file as JSON lines."),
    resume: bool = typer.Option(False, "--resume", help="Keep the lines of --jsonl that hold."),
    report: Path = typer.Option(None, help="Write a page with tables, plots, audio and images."),
    list_metrics: bool = typer.Option(False, "--list", help="List all metrics and end."),
) -> None:
    """Score decoded files, models and other codecs against the originals, in one table."""
    from . import common

    if list_metrics:
        _list(as_json)
        return
    if reference is None:
        raise common.UsageError("name the originals: a file or a folder (see --help)")
    if resume and jsonl is None:
        raise common.UsageError("--resume takes up the lines of --jsonl FILE")
    for path in (csv, jsonl, report):
        if path is not None and not path.absolute().parent.is_dir():
            raise common.UsageError(f"{path}: its folder does not exist")

    from ..metrics.registry import MetricError
    from ..metrics.scoring import Scoring, build_systems
    from ..metrics.systems import ScoreError

    progress = Progress()
    try:
        scoring = Scoring(
            reference,
            build_systems(reference, decoded or (), model, codec, backend=backend),
            metrics=metrics.split(",") if metrics else None,
            align=align,
            level=match_level,
            rate=rate,
            jobs=jobs,
        )
        for reason in scoring.bench.unavailable.values():
            print(f"vpcodec: left out: {reason}", file=sys.stderr)
        with _lines(jsonl, resume) as (known, write), progress:
            scores = scoring.run(known, on_row=write, progress=progress.report)
        if report is not None and scores.rows:
            from ..metrics.report import write_report

            write_report(report, scores, scoring.examples(scores))
    except (MetricError, ScoreError) as error:
        raise common.UsageError(str(error)) from None

    if not scores.rows and len(scores.failed) == 1:
        raise common.UsageError(scores.failed[0])
    for line in scores.failed:
        print(f"vpcodec: {line}", file=sys.stderr)
    if not scores.rows:
        raise common.UsageError(f"all {len(scores.failed)} comparisons failed")
    if csv is not None:
        from ..files import atomic_output

        with atomic_output(csv) as file:
            file.write(scores.to_csv().encode())
    print(json.dumps(scores.to_dict(), indent=2) if as_json else scores.to_text())
    if scores.failed:
        raise typer.Exit(1)


class Progress:
    """A bar for each stage of the work."""

    def __init__(self) -> None:
        self._label = ""
        self._bar: Any = None

    def report(self, label: str, done: int, total: int) -> None:
        from . import common

        if label != self._label:
            self.__exit__()
            self._label, self._bar = label, common.Progress(label, total)
        self._bar.finish("")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()


@contextmanager
def _lines(path: Path | None, resume: bool) -> Iterator[tuple[list[Any], Any]]:
    """The rows that a file holds, and what adds one to it; at the end the file holds each once."""
    if path is None:
        yield [], None
        return
    from ..files import atomic_output
    from ..metrics.scores import Row

    rows: dict[tuple[str, str], Row] = {}
    if resume and path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = Row.from_json(line)
            except ValueError:  # cut off when the last run ended
                continue
            rows[row.system, row.file] = row
    known = list(rows.values())
    with atomic_output(path) as file:
        file.writelines(row.to_json().encode() + b"\n" for row in known)
    with open(path, "ab", buffering=0) as file:

        def write(row: Row) -> None:
            rows[row.system, row.file] = row
            file.write(row.to_json().encode() + b"\n")

        yield known, write
    with atomic_output(path) as file:
        file.writelines(row.to_json().encode() + b"\n" for row in rows.values())


def _list(as_json: bool) -> None:
    from ..metrics.registry import METRICS, SYSTEM_METRICS

    metrics = [*METRICS.values(), *SYSTEM_METRICS.values()]
    if as_json:
        rows = [
            {
                "name": metric.name,
                "label": metric.label,
                "kind": metric.kind,
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
        mark = "-" if metric.missing else "*" if metric.default else " "
        rate = f"{metric.rate:,} Hz" if metric.rate else ""
        reference = "" if metric.needs_reference else "no reference"
        lack = f"needs {', '.join(metric.missing)}" if metric.missing else ""
        words = (metric.unit, metric.better, rate, reference, metric.source, lack)
        print(
            f"{mark} {metric.name:<22} {metric.kind:<6} "
            + "; ".join(word for word in words if word)
        )
    print("* computed without being named; - its packages are missing")
