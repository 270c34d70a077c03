"""vpcodec encode: audio and images to token files."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import typer

from . import options
from .errors import UsageError


def encode(
    inputs: list[str] = typer.Argument(
        ...,
        metavar="IN... [OUT]",
        help="Audio or image files, folders or - ; then a file, a folder or -.",
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
    rate: int = typer.Option(None, help="With --raw: sample rate, Hz; default: 16000."),
    channels: int = typer.Option(None, help="With --raw: channels; default: 1."),
    truncated: str = options.TRUNCATED,
) -> None:
    """Encode audio (any format, rate and channels) or images (any format and size) to tokens.

    A folder gives all its audio and images, or with --model those of the model's kind; its other
    files are named as skipped, but for hidden ones. MP4, AAC, WebM and the like need ffmpeg.
    """
    from ..hub import DEFAULT_MODELS
    from ..media.audio import TRUNCATED, RawFormat
    from . import common, kinds

    if truncated not in TRUNCATED:
        raise UsageError(f"--truncated is {truncated!r}, not one of {', '.join(TRUNCATED)}")
    codecs = common.CodecCache(backend, device, threads, jobs)
    codec = codecs.get(model) if model is not None else None
    pcm = (16_000 if rate is None else rate, 1 if channels is None else channels, raw)
    layout = RawFormat(*pcm) if raw else None
    only = kinds.KINDS[codec.kind] if codec else kinds.AUDIO if raw else None
    if raw and codec:
        kinds.check_model("--raw", kinds.AUDIO, codec)
    items, kept, _ = common.plan(
        inputs,
        output,
        find=kinds.find,
        wanted=lambda source: only in (None, kinds.of_suffix(source)),
        input_suffixes=kinds.SUFFIXES,
        suffix=lambda source: ".tok",
        output_suffixes=(".tok",),
        force=force,
    )

    alike = {kinds.of_suffix(item.source) for item in items}
    if codec is None and len(alike) == 1 and (kind := alike.pop()):
        codecs.get(DEFAULT_MODELS[kind.name])  # a missing one is said once, not for every file

    def work(item: common.Item, report: Any) -> tuple[kinds.Kind, Any]:
        name, source = item.source, item.source
        with ExitStack() as stack:
            if source == "-":
                name, source = "stdin", common.pipe_in()
            if raw:
                kind = kinds.of_suffix(item.source)
            elif item.source == "-":
                kind, source = kinds.of_stream(source)
            else:
                kind, source = kinds.of_file(source, stack)
            kind = kind or only or kinds.AUDIO
            kinds.check_options(name, kind, raw=raw, rate=rate, channels=channels)
            if codec:
                kinds.check_model(name, kind, codec)
            chosen = codec or codecs.get(DEFAULT_MODELS[kind.name])
            target = common.pipe_out() if item.target == "-" else item.target
            options = {"truncated": truncated} if kind is kinds.AUDIO else {}
            options |= {"raw": layout} if layout else {}
            return kind, chosen.encode_file(source, target, name=name, report=report, **options)

    common.run(
        items,
        kept,
        work,
        skipped=common.skipped(inputs, items, kept),
        label="encoding",
        jobs=jobs,
        fail_fast=fail_fast,
        as_json=as_json,
    )
