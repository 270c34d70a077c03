"""vpcodec encode: audio and images to token files."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import typer

from ..progress import Progress
from . import options
from .errors import UsageError


def encode(
    inputs: list[str] = typer.Argument(
        ...,
        metavar="IN... [OUT]",
        help="Audio or image files, folders or - (stdin); the output may come last.",
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
    raw: str = typer.Option(
        None, metavar="FORMAT", help="The input is headerless PCM: s16, s24, s32 or f32."
    ),
    rate: int = typer.Option(
        None, metavar="HZ", help="With --raw: sample rate, Hz; default: 16000."
    ),
    channels: int = typer.Option(None, metavar="N", help="With --raw: channels; default: 1."),
    mono: bool = typer.Option(
        False, "--mono", help="Mix the channels of audio down to one, which takes fewer bits."
    ),
    truncated: str = options.TRUNCATED,
) -> None:
    """Encode audio (any format, rate and channels) or images (any format and size) to tokens.

    From a folder, all audio and images are encoded, or with --model those that fit the model; its
    other files are named as skipped, but for hidden ones. MP4, AAC, WebM and the like need ffmpeg.

    \b
    vpcodec encode in.wav out.tok
    vpcodec encode recordings/ tokens/ --jobs 2
    arecord -f S16_LE -r 16000 -t raw | vpcodec encode - live.tok --raw s16
    """
    from ..hub import DEFAULT_MODELS
    from ..media.audio import TRUNCATED, RawFormat
    from . import common, modalities

    if truncated not in TRUNCATED:
        raise UsageError(f"--truncated is {truncated!r}, not one of {', '.join(TRUNCATED)}")
    codecs = common.CodecCache(backend, device, threads, jobs, inputs)
    codec = codecs.get(model) if model is not None else None
    pcm = (16_000 if rate is None else rate, 1 if channels is None else channels, raw)
    layout = RawFormat(*pcm) if raw else None
    only = modalities.MODALITIES[codec.modality] if codec else modalities.AUDIO if raw else None
    if raw and codec:
        modalities.check_model("--raw", modalities.AUDIO, codec)
    items, kept, _ = common.plan(
        inputs,
        output,
        find=modalities.find_media,
        wanted=lambda source: only in (None, modalities.of_suffix(source)),
        input_suffixes=modalities.SUFFIXES,
        suffix=lambda source: ".tok",
        output_suffixes=(".tok",),
        force=force,
    )

    alike = {modalities.of_suffix(item.source) for item in items}
    if codec is None and {modalities.AUDIO, modalities.IMAGE} <= alike:
        found = [modalities.of_suffix(item.source) for item in items]
        print(
            f"vpcodec: audio ({found.count(modalities.AUDIO)}) and images "
            f"({found.count(modalities.IMAGE)}) are each coded with the default model of their "
            "kind; --model takes one kind only",
            file=sys.stderr,
        )
    if codec is None and len(alike) == 1 and (modality := alike.pop()):
        codecs.get(
            DEFAULT_MODELS[modality.name]
        )  # so a missing model is reported once, not for every file

    def work(item: common.Item, progress: Progress) -> tuple[modalities.Modality, Any]:
        name = item.source
        source: Any = item.source
        with ExitStack() as stack:
            if source == "-":
                name, source = "stdin", common.pipe_in()
            if raw:
                modality = modalities.of_suffix(item.source)
            elif item.source == "-":
                modality, source = modalities.of_stream(source)
            else:
                modality, source = modalities.of_file(source, stack)
            modality = modality or only or modalities.AUDIO
            given = {"raw": raw, "rate": rate, "channels": channels, "mono": mono or None}
            modalities.check_options(name, modality, **given)
            if codec:
                modalities.check_model(name, modality, codec)
            chosen = codec or codecs.get(DEFAULT_MODELS[modality.name])
            target = common.pipe_out() if item.target == "-" else item.target
            options: dict[str, Any] = {"raw": layout} if layout else {}
            if modality is modalities.AUDIO:
                options |= {"truncated": truncated, "mono": mono}
            return modality, chosen.encode_file(
                source, target, name=name, progress=progress, **options
            )

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
