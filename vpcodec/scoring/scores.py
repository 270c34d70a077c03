"""Results of scoring: rows for files, their statistics, and both as JSON, CSV and text."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..metrics.base import Metric
from ..metrics.registry import METRICS, SYSTEM_METRICS

RESAMPLES = 2000  # of the bootstrap
ORIGINAL = "(original)"  # the references as a system, for metrics without reference

ALWAYS = ("bitrate", "bits_per_pixel", "consistency")  # in the rows of systems that have them

_SEED = 0
_PIECE = 2**22  # indices drawn at a time; bounds memory
_ROW_FIELDS = ("key", "system", "delay", "seconds", "bytes", "fingerprint")


@dataclass(frozen=True)
class Row:
    """One file through one system.

    Attributes:
        system: its name.
        file: relative to the folder of the references.
        delay: that was removed, s.
        seconds: duration of the reference; None for images.
        n_bytes: size when coded; None if unknown.
        cache_key: digest of all that the values depend on; "fingerprint" in JSON.
        values: metric -> value, including those of ALWAYS; NaN where a metric is undefined.
    """

    system: str
    file: str
    delay: float
    seconds: float | None
    n_bytes: int | None
    cache_key: str
    values: dict[str, float]

    def to_json(self) -> str:
        """One line: "key" is the file, and each metric has its name, as in VERSA's results.

        Undefined values are null.
        """
        head = (self.file, self.system, self.delay, self.seconds, self.n_bytes, self.cache_key)
        return json.dumps(dict(zip(_ROW_FIELDS, head)) | _finite(self.values), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """The row that `to_json` wrote.

        Raises:
            ValueError: not such a line.
        """
        try:
            found = json.loads(line)
            file, system, delay, seconds, n_bytes, cache_key = (
                found.pop(key) for key in _ROW_FIELDS
            )
            values = {key: math.nan if x is None else float(x) for key, x in found.items()}
            seconds = None if seconds is None else float(seconds)
            n_bytes = None if n_bytes is None else int(n_bytes)
            return cls(
                str(system), str(file), float(delay), seconds, n_bytes, str(cache_key), values
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError("not a row of scores") from None


@dataclass(frozen=True)
class Summary:
    """A metric over files.

    Attributes:
        n: files with a value.
        missing: files without a value.
        mean: of the values; NaN without any, as the percentiles.
        low: lower end of the 95 % interval of the mean, by bootstrap over files (percentiles of
            2,000 resamples, seeded); NaN for fewer than two values.
        high: upper end of that interval.
        median: of the values.
        p5: 5th percentile.
        p95: 95th percentile.
    """

    n: int
    missing: int
    mean: float
    low: float
    high: float
    median: float
    p5: float
    p95: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """The summary of the values of all files, NaN for files without a value."""
        every = np.asarray(values, dtype=np.float64)
        found = every[~np.isnan(every)]
        missing = len(every) - len(found)
        if not len(found):
            return cls(0, missing, *[math.nan] * 6)
        low, high = _bootstrap(found) if len(found) > 1 else (math.nan, math.nan)
        p5, median, p95 = (float(x) for x in np.percentile(found, [5, 50, 95]))
        return cls(len(found), missing, float(found.mean()), low, high, median, p5, p95)


@dataclass(frozen=True)
class SystemScores:
    """All files through one system.

    Attributes:
        name: in tables.
        identity: changes if results may change: a fingerprint, or the version of a program.
        delay: median of the removed delays, s; None if none were estimated.
        summaries: metric -> summary.
        codebook: "tokens", "entropy" (bits per token), "perplexity", "cvu" and "used" over all
            tokens; empty if there are none.
        counts: int64 (K,), how often each code occurred; None without tokens.
        codebook_size: K; None without tokens.
    """

    name: str
    identity: str
    delay: float | None
    summaries: dict[str, Summary]
    codebook: dict[str, float] = field(default_factory=dict)
    counts: np.ndarray | None = None
    codebook_size: int | None = None


@dataclass(frozen=True)
class Scores:
    """The result of scoring.

    Attributes:
        modality: "audio" or "image".
        systems: in the order given; ORIGINAL first, if there are metrics without reference.
        rows: of all files and systems.
        metrics: that were computed, in table order.
        unavailable: default metric that was not computed -> why.
        failed: a line for each file and system without a row.
        settings: what was compared and how, for display.
        notes: lines on what a reader might not expect.
    """

    modality: str
    systems: list[SystemScores]
    rows: list[Row]
    metrics: list[Metric]
    unavailable: dict[str, str]
    failed: list[str]
    settings: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the rows, for JSON; undefined values are None."""
        return {
            "kind": self.modality,
            "settings": self.settings,
            "systems": [
                {
                    "name": system.name,
                    "identity": system.identity,
                    "delay": system.delay,
                    "metrics": {
                        name: _finite(vars(summary)) for name, summary in system.summaries.items()
                    },
                    "codebook": _finite(system.codebook),
                    "codebook_size": system.codebook_size,
                }
                for system in self.systems
            ],
            "unavailable": self.unavailable,
            "failed": self.failed,
            "notes": self.notes,
        }

    def to_csv(self) -> str:
        """A line for each system and metric; undefined values are empty."""
        out = io.StringIO()
        columns = ("n", "missing", "mean", "low", "high", "median", "p5", "p95")
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["system", "metric", "unit", *columns])
        for system in self.systems:
            for name, summary in system.summaries.items():
                cells = _finite(vars(summary))
                unit = describe(name).unit
                writer.writerow([system.name, name, unit, *(cells[column] for column in columns)])
            for name in ("entropy", "perplexity", "cvu"):
                if name in system.codebook:
                    counts = [system.codebook["tokens"], 0, system.codebook[name]]
                    writer.writerow([system.name, name, describe(name).unit, *counts, *[None] * 5])
        return out.getvalue()

    def to_text(self) -> str:
        """A table for a terminal: every statistic of one system, or the means of several."""
        found = {name for system in self.systems for name in system.summaries}
        names = [name for name in (*ALWAYS, *METRICS) if name in found]
        codebook = [
            name
            for name in ("entropy", "perplexity", "cvu")
            if any(name in system.codebook for system in self.systems)
        ]
        directions = {
            "higher": "higher is better",
            "lower": "lower is better",
            "zero": "0 is best",
            "": "",
        }
        first = [_titled(describe(name)) for name in (*names, *codebook)]
        last = [directions[describe(name).better] for name in (*names, *codebook)]
        compared = [system for system in self.systems if system.name != ORIGINAL]
        detailed = len(compared) == 1 and len(self.rows) > len(self.systems)
        if detailed:
            originals = [system for system in self.systems if system.name == ORIGINAL]
            heads, columns = _details(compared[0], originals, names, codebook)
        else:
            heads = [system.name for system in self.systems]
            columns = [_means(system, names, codebook) for system in self.systems]
        notes = [
            f"{system.name}: a delay of {1000 * system.delay:.2f} ms was removed"
            for system in compared
            if system.delay
        ]
        if not detailed:
            notes += [
                f"{system.name}: {describe(name).label} has no value for {summary.missing} of "
                f"{summary.missing + summary.n}"
                for system in self.systems
                for name, summary in system.summaries.items()
                if summary.missing
            ]
        table = _aligned(["", *heads, ""], [first, *columns, last])
        return "\n".join([*table, *notes, *self.notes])


def describe(name: str) -> Metric:
    """The metric of that name, for files or for systems."""
    return METRICS[name] if name in METRICS else SYSTEM_METRICS[name]


def _means(system: SystemScores, names: list[str], codebook: list[str]) -> list[str]:
    """The cells of a column: means with half of their interval."""
    cells = [_with_interval(s) if (s := system.summaries.get(name)) else "" for name in names]
    return cells + [_number(system.codebook[x]) if x in system.codebook else "" for x in codebook]


def _details(
    system: SystemScores, originals: list[SystemScores], names: list[str], codebook: list[str]
) -> tuple[list[str], list[list[str]]]:
    """Headings and columns: every statistic of a system, and the means of the originals."""
    summaries = [system.summaries[name] for name in names]
    totals = [system.codebook[name] for name in codebook]
    columns = {
        "mean": [_number(x) for x in (*(s.mean for s in summaries), *totals)],
        "95 % interval": [_interval(s) for s in summaries],
        "median": [_number(s.median) for s in summaries],
        "5 %": [_number(s.p5) for s in summaries],
        "95 %": [_number(s.p95) for s in summaries],
        "n": [_counted(s) for s in summaries],
    }
    for original in originals:
        found = [original.summaries.get(name) for name in names]
        columns[ORIGINAL] = [_number(s.mean) if s else "" for s in found]
    n_lines = len(names) + len(codebook)
    return list(columns), [cells + [""] * (n_lines - len(cells)) for cells in columns.values()]


def _bootstrap(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of (n,) values."""
    random = np.random.default_rng(_SEED)
    step = max(1, _PIECE // len(values))
    means = [
        values[random.integers(len(values), size=(min(step, RESAMPLES - start), len(values)))].mean(
            1
        )
        for start in range(0, RESAMPLES, step)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinities, which JSON lacks, become None."""
    return {
        key: None if isinstance(x, float) and not math.isfinite(x) else x
        for key, x in values.items()
    }


def _titled(metric: Metric) -> str:
    return f"{metric.label} ({metric.unit})" if metric.unit else metric.label


def _number(value: float) -> str:
    """About four digits."""
    if math.isnan(value):
        return "-"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
    return f"{value:,.{digits}f}"


def _interval(summary: Summary) -> str:
    if math.isnan(summary.low):
        return "-"
    return f"{_number(summary.low)} to {_number(summary.high)}"


def _with_interval(summary: Summary) -> str:
    if math.isnan(summary.low):
        return _number(summary.mean)
    half = (summary.high - summary.low) / 2
    return f"{_number(summary.mean)} ±{_number(half)}"


def _counted(summary: Summary) -> str:
    return f"{summary.n} of {summary.n + summary.missing}" if summary.missing else str(summary.n)


def _aligned(heads: list[str], columns: list[list[str]]) -> list[str]:
    """The lines of a table: first and last column left-aligned, numbers right-aligned."""
    cells = [[head, *column] for head, column in zip(heads, columns, strict=True)]
    widths = [max(len(cell) for cell in column) for column in cells]
    lines: Iterable[tuple[str, ...]] = zip(*cells, strict=True)
    return [
        "  ".join(
            cell.ljust(width) if i in (0, len(widths) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    ]
