"""vpcodec encode: audio and images to token files."""

from __future__ import annotations

from typing import Any

import typer

from . import options


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
) -> None:
    """Encode audio (any format, rate and channels) or images (any format and size) to tokens.

    A folder gives all its audio and images, or with --model those of the model's kind.
    """
    from ..audio import RawFormat
    from ..hub import DEFAULT_MODELS
    from . import common, kinds

    codecs = common.CodecCache(backend, device, threads, jobs)
    pcm = (16_000 if rate is None else rate, 1 if channels is None else channels, raw)
    layout = RawFormat(*pcm) if raw else None
    only = kinds.AUDIO if raw else None
    if model is not None:
        codec = codecs.get(model)
        only = kinds.KINDS[codec.kind]
        if raw:
            kinds.check_model("--raw", kinds.AUDIO, codec)
    items, kept = common.plan(
        inputs,
        output,
        find=lambda folder: kinds.find(folder, only),
        input_suffixes=kinds.SUFFIXES,
        suffix=lambda source: ".tok",
        output_suffixes=(".tok",),
        force=force,
    )

    def kind_of(source: str) -> kinds.Kind:
        return (kinds.of_suffix(source) or kinds.AUDIO) if raw else kinds.of_file(source)

    def codec_for(name: str, kind: kinds.Kind) -> Any:
        kinds.check_options(name, kind, raw=raw, rate=rate, channels=channels)
        if model is not None:
            kinds.check_model(name, kind, codec)
        return codecs.get(model or DEFAULT_MODELS[kind.name])

    for item in items:
        if item.source != "-":
            codec_for(item.source, kind_of(item.source))

    def work(item: common.Item, report: Any) -> tuple[kinds.Kind, Any]:
        name, source = item.source, item.source
        if source != "-":
            kind = kind_of(source)
        elif raw:
            name, kind, source = "stdin", kinds.AUDIO, common.pipe_in()
        else:
            name, (kind, source) = "stdin", kinds.of_stream(common.pipe_in())
        codec = codec_for(name, kind)
        target = common.pipe_out() if item.target == "-" else item.target
        options = {"raw": layout} if layout else {}
        return kind, codec.encode_file(source, target, report=report, **options)

    common.run(items, kept, work, label="encoding", jobs=jobs, fail_fast=fail_fast, as_json=as_json)
