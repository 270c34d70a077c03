"""vpcodec decode: token files to audio."""

from __future__ import annotations

from typing import Any

import typer

from . import options


def decode(
    inputs: list[str] = typer.Argument(
        ..., metavar="IN... [OUT]", help="Token files, folders or - ; then a file, a folder or -."
    ),
    output: str = options.OUTPUT,
    model: str = typer.Option(
        None,
        "--model",
        "-m",
        help="Bundled name, folder or owner/name[@revision]; default: the file's.",
    ),
    backend: str = options.BACKEND,
    device: str = options.DEVICE,
    threads: int = options.THREADS,
    jobs: int = options.JOBS,
    force: bool = typer.Option(
        False, "--force", help="Replace existing results; decode tokens of other weights."
    ),
    fail_fast: bool = options.FAIL_FAST,
    as_json: bool = options.JSON,
    rate: int = typer.Option(None, min=1, help="Output sample rate, Hz; default: the original's."),
    subtype: str = typer.Option(None, help="Sample format of the output, such as PCM_24, FLOAT."),
    raw: str = typer.Option(None, help="Write headerless PCM: s16, s24, s32 or f32."),
    suffix: str = typer.Option(".wav", help="Format of results whose name is derived."),
    recover: bool = typer.Option(False, help="Put silence where a file is damaged, and go on."),
) -> None:
    """Decode token files to audio at the original rate, with the original channels."""
    from ..audio import AUDIO_SUFFIXES
    from ..files import find_files
    from ..tokenfile import TokenReader
    from . import common

    suffix = suffix if suffix.startswith(".") else f".{suffix}"
    if suffix.lower() not in AUDIO_SUFFIXES:
        raise common.UsageError(f"--suffix must be one of {' '.join(sorted(AUDIO_SUFFIXES))}")
    if raw:
        suffix = ".raw"
    items, kept = common.plan(
        inputs,
        output,
        find=lambda folder: find_files(folder, (".tok",)),
        input_suffixes=(".tok",),
        suffix=suffix,
        output_suffixes=AUDIO_SUFFIXES | ({".raw", ".pcm"} if raw else frozenset()),
        force=force,
    )
    codecs = common.CodecCache(backend, device, threads, jobs)

    def work(item: common.Item, report: Any) -> dict[str, Any]:
        stream = common.pipe_in() if item.source == "-" else open(item.source, "rb")
        target = common.pipe_out() if item.target == "-" else item.target
        with stream:
            tokens = TokenReader(stream, recover=recover)
            codec = codecs.get(model or _bundled(tokens.header.model))
            stats = codec.decode_file(
                tokens,
                target,
                rate=rate,
                subtype=subtype,
                raw=raw,
                force=force,
                report=report,
            )
        return common.describe(stats)

    common.run(items, kept, work, label="decoding", jobs=jobs, fail_fast=fail_fast, as_json=as_json)


def _bundled(name: str) -> str:
    """A model that a token file names; only bundled ones are taken on the file's word."""
    from ..hub import bundled_folders
    from . import common

    if name not in bundled_folders():
        raise common.UsageError(f"made by the model {name!r}, which is not bundled: use --model")
    return name
