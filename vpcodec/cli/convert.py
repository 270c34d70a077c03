"""vpcodec models convert: published weights to a model folder."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from . import options


def convert(
    source: str = typer.Argument(
        ..., metavar="NAME|FOLDER", help="owner/name:model[@revision], or a folder with .pt files."
    ),
    output: Path = typer.Option(
        None,
        "--output",
        "-o",
        metavar="FOLDER",
        help="Model folder to create; default, for a NAME: in the cache.",
    ),
    model: str = typer.Option(
        None, "--as", metavar="NAME", help="What the files of a FOLDER are: owner/name:model."
    ),
    force: bool = options.FORCE,
    as_json: bool = options.JSON,
) -> None:
    """Convert published weights (see `vpcodec models`) from the Hub or a folder.

    A FOLDER holds encoder.pt, quantizer.pt, decoder.pt, en_encoder.pt and en_decoder.pt. They must
    contain the expected tensors and no code, and the graphs must agree with torch.
    """
    from ..published import look_up, open_published
    from ..published.cache import convert_folder
    from . import common

    with common.status() as note:
        if Path(source).is_dir():
            if model is None or output is None:
                raise common.UsageError(f"{source}: a folder needs --as NAME and --output FOLDER")
            note(f"converting {source}")
            folder = convert_folder(Path(source), look_up(model), output, force=force)
        elif model is not None:
            raise common.UsageError(f"{source}: there is no such folder")
        else:
            folder = open_published(source, target=output, force=force, note=note)
    size = sum((folder.path / name).stat().st_size for name in folder.files)
    facts = {
        "model": folder.config.name,
        "path": str(folder.path),
        "fingerprint": folder.fingerprint.hex(),
        "bytes": size,
        "source": folder.source,
    }
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        name = folder.path if output is not None else source
        typer.echo(f"{folder.path}: {size / 2**20:.1f} MiB; try: vpcodec encode in.wav -m {name}")
