"""vpcodec tokenize: recordings to a corpus of tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer

from ..hub import DEFAULT_MODEL
from . import options


def tokenize(
    inputs: list[str] = typer.Argument(
        ...,
        metavar="IN...",
        help="Audio files, folders, globs, manifests (.tsv, .jsonl, Lhotse cuts), WebDataset tars "
        "or Parquet tables with an audio column.",
    ),
    output: Path = typer.Option(
        ..., "--output", "-o", metavar="FOLDER", help="The corpus; an existing one is continued."
    ),
    model: str = typer.Option(DEFAULT_MODEL, "--model", "-m", metavar="MODEL", help="Audio model."),
    format: str = typer.Option(
        "parquet", metavar="NAME", help="Of the shards: parquet, webdataset or lhotse."
    ),
    jobs: int = typer.Option(
        None, "--jobs", "-j", min=1, metavar="N", help="Workers; default: one per CPU."
    ),
    ray: str = typer.Option(
        None, metavar="ADDRESS", help="Use this Ray cluster, such as auto or host:6379."
    ),
    gpus: int = typer.Option(
        0, min=0, metavar="N", help="Use so many GPUs, with the torch backend, instead of CPUs."
    ),
    shard_mb: float = typer.Option(
        256, min=0.001, metavar="MB", help="Recordings per shard, about, in megabytes."
    ),
    mono: bool = typer.Option(False, "--mono", help="Mix the channels down to one."),
    max_seconds: float = typer.Option(
        None, min=0.1, metavar="SECONDS", help="Cut longer recordings; default: keep them whole."
    ),
    cut: str = typer.Option(
        "silence",
        metavar="silence|exact",
        help="With --max-seconds: cut at the quietest place, or exactly there.",
    ),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Show how much work it is, and do nothing."
    ),
    as_json: bool = options.JSON,
) -> None:
    """Encode many recordings to a corpus of tokens, in shards, on Ray Data.

    Repeat the command to resume it, or to add recordings. Those that cannot be read are listed in
    quarantine.jsonl, with exit code 1.

    \b
    vpcodec tokenize speech/ -o corpus/ --jobs 8
    vpcodec tokenize cuts.jsonl.gz -o corpus/ --format lhotse --ray auto
    vpcodec info corpus/
    """
    from . import common

    if ray is not None and jobs is not None:
        raise common.UsageError("--jobs is for this machine, --ray for a cluster: name one of them")
    common.need_extra("corpus", "ray", "pyarrow")
    if gpus:
        common.need_extra("train", "torch", "safetensors")
    from ..corpus import estimate
    from ..corpus import tokenize as run

    settings: dict[str, Any] = {
        "model": model,
        "format": format,
        "shard_mb": shard_mb,
        "mono": mono,
        "max_seconds": max_seconds,
        "cut": cut,
    }
    if dry_run:
        found = estimate(inputs, output, jobs=jobs or 1, **settings)
        _print(found, _estimate_line(found), as_json)
        return
    bar = Bar()
    try:
        totals = run(
            inputs,
            output,
            jobs=jobs,
            address=ray,
            gpus=gpus,
            progress=bar.show,
            **settings,
        )
    finally:
        bar.close()
    facts = {"output": str(output), **totals.to_dict()}
    line = (
        f"{output}: {totals.files - totals.bad:,} of {totals.files:,} files, "
        f"{totals.records:,} records, {totals.seconds / 3600:.2f} h, {totals.tokens:,} tokens in "
        f"{totals.shards:,} shards ({totals.kept:,} kept); {_speed(totals)}"
    )
    _print(facts, line, as_json)
    if totals.left_out:
        print(
            f"vpcodec: {totals.left_out:,} files of earlier runs are no inputs any more; they stay",
            file=sys.stderr,
        )
    if totals.bad:
        place = output / "quarantine.jsonl"
        print(f"vpcodec: {totals.bad:,} of {totals.files:,} failed, see {place}", file=sys.stderr)
        raise typer.Exit(1)


def _print(facts: dict[str, Any], line: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        typer.echo(line, err=True)


def _speed(totals: Any) -> str:
    if not totals.new_seconds:
        return "nothing was left to do"
    return f"{totals.elapsed:.1f} s ({totals.speed:.0f} times real time)"


def _estimate_line(found: dict[str, Any]) -> str:
    return (
        f"{found['files']:,} files, {found['bytes'] / 1e6:,.1f} MB, about {found['hours']:.2f} h: "
        f"{found['tokens']:,} tokens, {found['output_bytes'] / 1e6:,.1f} MB before compression, in "
        f"{found['shards']:,} shards; about {found['seconds']:,.0f} s of work"
    )


class Bar:
    """Progress on stderr, if that is a terminal: files, hours, speed, time to go, bad files."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None

    def show(self, totals: Any) -> None:
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            from ..terminal import plain_stderr

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TimeRemainingColumn(),
                console=Console(file=plain_stderr()),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("tokenising", total=totals.n_files)
        text = (
            f"{totals.files:,} of {totals.n_files:,} files, {totals.seconds / 3600:.2f} h, "
            f"{totals.speed:.0f} x real time, {totals.bad:,} bad"
        )
        self._bar.update(self._task, completed=totals.files, description=text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
