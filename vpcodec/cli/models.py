"""vpcodec models: what can be used without a network."""

from __future__ import annotations

import json
from typing import Any

import typer

from ..config import AudioConfig, ImageConfig
from . import options


def models(as_json: bool = options.JSON) -> None:
    """List the bundled models; * marks what is taken for its kind without --model."""
    from ..hub import DEFAULT_MODELS, bundled_folders, read_folder

    rows = []
    for name, path in bundled_folders().items():
        config = read_folder(path).config
        rows.append(
            {
                "name": name,
                "kind": config.kind,
                "default": name == DEFAULT_MODELS[config.kind],
                **_rates(config),
                "codebook_size": config.codebook_size,
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
        if row["kind"] == "audio":
            rates = (
                f"{row['bitrate']:>7.0f} bit/s  {row['frame_rate']:>7.2f} tokens/s  "
                f"{row['sample_rate']} Hz"
            )
        else:
            side = row["hop_length"]
            rates = f"{row['bits_per_pixel']:>7.3f} bit/pixel  {side} x {side} pixels/token"
        typer.echo(
            f"{mark} {row['name']:<18} {row['kind']}  {rates}  {row['license']:<10} "
            f"{row['description']}"
        )
    typer.echo("Others: --model FOLDER or --model owner/name[@revision] from the Hugging Face Hub.")


def _rates(config: AudioConfig | ImageConfig) -> dict[str, Any]:
    if isinstance(config, AudioConfig):
        return {
            "bitrate": round(config.bitrate, 1),
            "frame_rate": round(config.frame_rate, 3),
            "sample_rate": config.sample_rate,
        }
    return {"bits_per_pixel": round(config.bits_per_pixel, 4), "hop_length": config.hop_length}
