"""vpcodec models: what can be used without a network."""

from __future__ import annotations

import json

import typer

from . import options


def models(as_json: bool = options.JSON) -> None:
    """List the bundled models."""
    from ..hub import DEFAULT_MODEL, bundled_folders, read_folder

    rows = []
    for name, path in bundled_folders().items():
        config = read_folder(path).config
        rows.append(
            {
                "name": name,
                "default": name == DEFAULT_MODEL,
                "bitrate": round(config.bitrate, 1),
                "frame_rate": round(config.frame_rate, 3),
                "codebook_size": config.codebook_size,
                "sample_rate": config.sample_rate,
                "license": config.license,
                "description": config.description,
                "path": str(path),
            }
        )
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        mark = "*" if row["default"] else " "
        typer.echo(
            f"{mark} {row['name']:<18} {row['bitrate']:>7.0f} bit/s  {row['frame_rate']:>7.2f} "
            f"tokens/s  {row['sample_rate']} Hz  {row['license']:<10} {row['description']}"
        )
    typer.echo("Others: --model FOLDER or --model owner/name[@revision] from the Hugging Face Hub.")
