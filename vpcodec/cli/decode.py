"""vpcodec decode: token files to audio and images."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..progress import Progress
from . import options

if TYPE_CHECKING:
    from ..tokenfile import TokenHeader


def decode(
    inputs: list[str] = typer.Argument(
        ...,
        metavar="IN... [OUT]",
        help="Token files, folders, - (stdin), or arrays of tokens (.npy, .npz, .parquet, .jsonl); "
        "the output may come last.",
    ),
    output: str = options.OUTPUT,
    model: str = typer.Option(
        None,
        "--model",
        "-m",
        metavar="MODEL",
        help="Bundled name, folder, owner/name[@revision] or owner/name:model; "
        "default: the one that the file names.",
    ),
    backend: str = options.BACKEND,
    device: str = options.DEVICE,
    threads: int = options.THREADS,
    jobs: int = options.JOBS,
    force: bool = typer.Option(
        False, "--force", help="Replace existing outputs; decode tokens of other weights."
    ),
    fail_fast: bool = options.FAIL_FAST,
    as_json: bool = options.JSON,
    rate: int = typer.Option(
        None,
        min=1,
        metavar="HZ",
        help="Sample rate of decoded audio, Hz; default: the original rate.",
    ),
    subtype: str = typer.Option(
        None, metavar="FORMAT", help="Sample format of decoded audio, such as PCM_24 or FLOAT."
    ),
    raw: str = typer.Option(
        None, metavar="FORMAT", help="Write audio as headerless PCM: s16, s24, s32 or f32."
    ),
    suffix: str = typer.Option(
        None,
        metavar="SUFFIX",
        help="File format of outputs whose names are derived; default: .wav for audio, .png for "
        "images.",
    ),
    recover: bool = typer.Option(
        False, help="Replace damaged parts with silence or grey instead of stopping."
    ),
    max_gap: float = typer.Option(
        None,
        metavar="SECONDS",
        min=0,
        help="With --recover: seconds of silence in a row, at most; default: 60.",
    ),
) -> None:
    """Decode token files to audio or images, with the original rate, channels and size.

    A pipe or a device gets WAV or PNG. From a folder, all token files are decoded, or with --model
    those that fit the model. Arrays without a header, such as those of a language model, need
    --model.

    \b
    vpcodec decode out.tok back.wav
    vpcodec decode tokens/ audio/ --suffix flac
    vpcodec encode - - < in.wav | vpcodec decode - - | aplay
    vpcodec decode generated.npz audio/ -m speech-3k
    """
    from ..media.files import is_device
    from ..tokenfile import TokenReader
    from . import arrays, common, modalities

    if suffix is not None:
        suffix = suffix if suffix.startswith(".") else f".{suffix}"
        if suffix.lower() not in modalities.OUTPUTS:
            raise common.UsageError(
                f"--suffix must be one of {' '.join(sorted(modalities.OUTPUTS))}"
            )
    raw_suffixes = frozenset((".raw", ".pcm") if raw else ())
    audio_options = {"rate": rate, "subtype": subtype, "raw": raw, "max_gap": max_gap}
    codecs = common.CodecCache(backend, device, threads, jobs, inputs)
    only = modalities.MODALITIES[codecs.get(model).modality] if model is not None else None

    def suffix_for(source: Path) -> str:
        modality = modalities.of_tokens(source) or only or modalities.AUDIO
        if raw and modality is modalities.AUDIO:
            return ".raw"
        return suffix if suffix and suffix.lower() in modality.outputs else modality.suffix

    odd: list[str] = []
    with ExitStack() as stack:
        records: arrays.ArrayItems | None = None
        if arrays.is_array(inputs[0]):
            records = arrays.ArrayItems(
                inputs,
                output,
                suffix=suffix_for(Path(inputs[0])),
                output_suffixes=modalities.OUTPUTS | raw_suffixes,
                force=force,
                stack=stack,
            )
            items, kept, single = records.items, records.kept, len(records.items) == 1
        else:
            items, kept, single = common.plan(
                inputs,
                output,
                find=lambda folder: modalities.find_media(folder, (".tok",), odd),
                wanted=lambda source: only is None or modalities.of_tokens(source) in (None, only),
                input_suffixes=(".tok", *arrays.INPUTS),
                suffix=suffix_for,
                output_suffixes=modalities.OUTPUTS | raw_suffixes,
                force=force,
            )

        def codec_of(header: TokenHeader | None) -> Any:
            if header is None and model is None:
                raise common.UsageError("an array does not say which model made it: use --model")
            return codecs.get(model or _trusted(header))

        def work(item: common.Item, progress: Progress) -> tuple[modalities.Modality, Any]:
            name = "stdin" if item.source == "-" else item.source
            codec: Any = None
            stream: Any
            if records is not None:
                stream, codec = records.open(item, codec_of)
            else:
                stream = common.pipe_in() if item.source == "-" else open(item.source, "rb")
            target = common.pipe_out() if item.target == "-" else item.target
            with stream:
                tokens = TokenReader(stream, recover=recover)
                modality = modalities.of_header(tokens.header)
                if single:
                    modalities.check_options(name, modality, **audio_options)
                outputs = modality.outputs | (
                    raw_suffixes if modality is modalities.AUDIO else frozenset()
                )
                fits = item.target == "-" or Path(item.target).suffix.lower() in outputs
                if not fits and not is_device(item.target):
                    known = " ".join(sorted(outputs))
                    raise common.UsageError(
                        f"{item.target}: this is {modality.one}; the suffix must be one of {known}"
                    )
                codec = codec or codec_of(tokens.header)
                modalities.check_model(name, modality, codec)
                options = audio_options if modality is modalities.AUDIO else {}
                options = {name: value for name, value in options.items() if value is not None}
                return modality, codec.decode_file(
                    tokens, target, force=force, progress=progress, **options
                )

        common.run(
            items,
            kept,
            work,
            skipped=odd,
            label="decoding",
            jobs=jobs,
            fail_fast=fail_fast,
            as_json=as_json,
        )


def _trusted(header: TokenHeader) -> str:
    """The model for a token file, if it is local or a bundled model says where it is; nothing else
    is fetched on a file's word."""
    from ..hub import bundled_folders, is_local, model_of, name_of_model
    from . import common

    name = header.model
    found = model_of(header) or name_of_model(name)
    if found is None and (own := name.partition("@")[0]) in bundled_folders():
        raise common.UsageError(
            f"made by {name!r}, a revision that the bundled {own!r} does not know: use a newer "
            "vpcodec, or --model"
        )
    if found is None:
        raise common.UsageError(f"made by the model {name!r}, which is not bundled: use --model")
    if not is_local(found):
        raise common.UsageError(f"made by the model {name!r}; --model {found} fetches it")
    return found
