"""vpcodec models tables: entropy tables for a model of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from . import options


def tables(
    folder: Path = typer.Argument(..., help="Model folder; gets the tables, or new ones."),
    data: Path = typer.Argument(..., help="Folder of recordings, those of its training."),
    hours: float = typer.Option(6.0, min=0.01, help="Of audio at most."),
    hidden: int = typer.Option(128, min=8, max=1024, help="Units per digit: size against speed."),
    steps: int = typer.Option(3000, min=1, help="Of the training of the tables."),
    seed: int = typer.Option(0, min=0, help="Of recordings and training."),
    as_json: bool = options.JSON,
) -> None:
    """Make entropy tables of a model's tokens, so that its token files become shorter.

    Tables are part of a model: files that were coded with other ones cannot be read any more, so
    make them before the model is used.
    """
    from . import common

    common.need_extra("train", "torch", "safetensors")
    from ..training.entropy import TableError, add_tables

    bar = common.ProgressBar("tables", 2)
    try:
        bits = add_tables(
            folder, data, hours=hours, hidden=hidden, steps=steps, seed=seed, report=bar.report
        )
    except TableError as error:
        raise common.UsageError(str(error)) from None
    finally:
        bar.close()
    from ..model_folder import read_folder

    nominal = read_folder(folder).config.bits_per_token
    facts = {
        "model": str(folder),
        "bits_per_token": round(bits, 3),
        "nominal_bits_per_token": round(nominal, 3),
    }
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        typer.echo(f"{folder}: {bits:.2f} bits per token on its data, {nominal:.2f} without tables")
