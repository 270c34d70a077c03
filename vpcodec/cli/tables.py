"""vpcodec models tables: entropy tables for your own model."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from . import options


def tables(
    folder: Path = typer.Argument(..., help="Model folder; tables are added to it."),
    data: Path = typer.Argument(
        ..., help="Folder of recordings or images, preferably the training data."
    ),
    hours: float = typer.Option(
        6.0, min=0.01, metavar="N", help="Hours of audio, at most; of images, all are used."
    ),
    hidden: int = typer.Option(
        128,
        min=8,
        max=1024,
        metavar="N",
        help="Hidden units per digit: more give smaller files and slower coding.",
    ),
    steps: int = typer.Option(3000, min=1, metavar="N", help="Training steps."),
    seed: int = typer.Option(0, min=0, metavar="N", help="Random seed."),
    as_json: bool = options.JSON,
) -> None:
    """Fit entropy tables to a model's tokens, which makes its token files smaller.

    New files use the newest tables. Those that a model has already stay, and with them its files
    can be read as before.
    """
    from . import common

    common.need_extra("train", "torch", "safetensors")
    from ..training.entropy import TableError, add_tables

    bar = common.ProgressBar("tables", 2)
    try:
        bits = add_tables(
            folder, data, hours=hours, hidden=hidden, steps=steps, seed=seed, progress=bar.report
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
