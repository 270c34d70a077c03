"""vpcodec encode: audio to token files."""

from __future__ import annotations

from typing import Any

import typer

from . import options


def encode(
    inputs: list[str] = typer.Argument(
        ..., metavar="IN... [OUT]", help="Audio files, folders or - ; then a file, a folder or -."
    ),
    output: str = options.OUTPUT,
    model: str = options.MODEL,
    backend: str = options.BACKEND,
    device: str = options.DEVICE,
    threads: int = options.THREADS,
    jobs: int = options.JOBS,
    force: bool = options.FORCE,
    fail_fast: bool = options.FAIL_FAST,
    as_json: bool = options.JSON,
    raw: str = typer.Option(None, help="Input is headerless PCM: s16, s24, s32 or f32."),
    rate: int = typer.Option(16_000, help="With --raw: sample rate, Hz."),
    channels: int = typer.Option(1, help="With --raw: channels."),
) -> None:
    """Encode audio (any format, rate and number of channels) to token files."""
    from ..audio import AUDIO_SUFFIXES, RawFormat, find_audio
    from . import common

    items, kept = common.plan(
        inputs,
        output,
        find=find_audio,
        input_suffixes=AUDIO_SUFFIXES,
        suffix=".tok",
        output_suffixes=(".tok",),
        force=force,
    )
    layout = RawFormat(rate, channels, raw) if raw else None
    codec = common.load_codec(model, backend, device, threads, jobs)

    def work(item: common.Item, report: Any) -> dict[str, Any]:
        source = common.pipe_in() if item.source == "-" else item.source
        target = common.pipe_out() if item.target == "-" else item.target
        return common.describe(codec.encode_file(source, target, raw=layout, report=report))

    common.run(items, kept, work, label="encoding", jobs=jobs, fail_fast=fail_fast, as_json=as_json)
