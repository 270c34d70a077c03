"""vpcodec export: a training run to a model folder."""

from __future__ import annotations

from pathlib import Path

import typer

from . import options


def export(
    run: Path = typer.Argument(..., help="Run folder of `vpcodec train`."),
    output: Path = typer.Option(
        ..., "--output", "-o", metavar="FOLDER", help="Model folder to create."
    ),
    like: Path = typer.Option(
        None,
        "--like",
        metavar="FOLDER",
        help="Model of the same token space, whose entropy tables and recognised token files are "
        "taken over; default: a bundled one.",
    ),
    force: bool = options.FORCE,
) -> None:
    """Export a run to ONNX, safetensors and config.json, with the graphs checked against torch."""
    from . import common, modalities

    common.need_extra("train", "torch", "torchaudio", "safetensors", "onnx", "onnxscript")
    from ..export import export_run
    from ..graphs import ExportError
    from ..model_folder import read_folder
    from ..training.checkpoints import CheckpointError, load_newest

    def note(text: str) -> None:
        typer.echo(f"vpcodec: {text}", err=True)

    try:
        if load_newest(run)[1].get("config", {}).get("kind") == "lm":
            common.need_extra("lm", "transformers")
            from ..lm import read_lm
            from ..training.lm.trainer import export_lm

            if like is not None:
                raise common.UsageError(f"{run}: a language model; --like is for codecs")
            export_lm(run, output, force=force, note=note)
            example = "out.png" if read_lm(output).config.grid else "out.wav"
            typer.echo(f"{output}: try: vpcodec generate -m {output} -o {example}")
            return
        export_run(
            run,
            output,
            force=force,
            like=like,
            note=note,
        )
    except (CheckpointError, ExportError) as error:
        raise common.UsageError(str(error)) from None
    size = sum(path.stat().st_size for path in output.iterdir())
    example = f"in{modalities.MODALITIES[read_folder(output).config.modality].suffix}"
    typer.echo(f"{output}: {size / 2**20:.1f} MiB; try: vpcodec encode {example} -m {output}")
