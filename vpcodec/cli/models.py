"""vpcodec models: list models, and publish them."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import typer

from ..config import AudioModelConfig, ModelConfig
from . import options


def models(context: typer.Context, as_json: bool = options.JSON) -> None:
    """List bundled and published models, or work with one.

    * marks the defaults: what encode takes without --model.
    """
    if context.invoked_subcommand is not None:
        return
    from ..hub import DEFAULT_MODELS, bundled_folders, is_local, registered_models
    from ..model_folder import read_folder

    bundled = [
        _row(name, read_folder(path).config, path) for name, path in bundled_folders().items()
    ]
    for row in bundled:
        row["default"] = row["name"] == DEFAULT_MODELS[row["kind"]]
    published = [_row(name, config, None) for name, config in registered_models()]
    for row in published:
        row["cached"] = is_local(row["name"])
    if as_json:
        print(json.dumps(bundled + published, indent=2))
        return
    width = max(len(row["name"]) for row in bundled + published)
    for row in bundled:
        typer.echo(_text(row, width))
    typer.echo("\nPublished by others; fetched from the Hub and converted on first use:")
    for row in published:
        typer.echo(_text(row, width))
    typer.echo("\nAlso: --model FOLDER, or --model owner/name[@revision] from the Hub.")


def push(
    folder: Path = typer.Argument(..., help="Model folder with a README.md that names a licence."),
    repository: str = typer.Argument(
        ..., metavar="OWNER/NAME", help="Created if it does not exist."
    ),
    private: bool = typer.Option(False, "--private", help="Make the repository private."),
    revision: str = typer.Option(None, metavar="BRANCH", help="Branch; default: the main one."),
    message: str = typer.Option(None, metavar="TEXT", help="Commit message."),
    as_json: bool = options.JSON,
) -> None:
    """Check a model folder and publish it on the Hugging Face Hub in one commit."""
    from ..hub import push as push_folder

    url = push_folder(folder, repository, private=private, revision=revision, message=message)
    name = f"{repository}@{revision}" if revision else repository
    if as_json:
        print(json.dumps({"model": name, "private": private, "url": url}, indent=2))
    else:
        typer.echo(f"{url}; use it with: --model {name}")


def _row(name: str, config: ModelConfig, path: Path | None) -> dict[str, Any]:
    """The facts of a model; without a path it is not bundled."""
    return {
        "name": name,
        "kind": config.modality,
        "bundled": path is not None,
        "cached": path is not None,
        "default": False,
        **_rates(config),
        "codebook_size": config.codebook_size,
        "license": config.license,
        "description": config.description,
        "path": None if path is None else str(path),
    }


def _rates(config: ModelConfig) -> dict[str, Any]:
    if isinstance(config, AudioModelConfig):
        return {
            "bitrate": round(config.bitrate, 1),
            "frame_rate": round(config.frame_rate, 3),
            "sample_rate": config.sample_rate,
        }
    pixels = config.hop_length**2
    return {
        "bits_per_pixel": round(config.bits_per_token / pixels, 4),
        "hop_length": config.hop_length,
    }


def _text(row: dict[str, Any], width: int) -> str:
    """The facts of a model in lines of at most 80 columns."""
    if row["kind"] == "audio":
        rate = f"{row['bitrate']:,.0f} bit/s"
        rates = f"{rate:>12}  {row['frame_rate']:>7.1f} tokens/s  {row['sample_rate'] / 1000:g} kHz"
    else:
        side, rate = row["hop_length"], f"{row['bits_per_pixel']:.3f} bit/pixel"
        rates = f"{rate:>12}  {side} x {side} pixels/token"
    star = "*" if row["default"] else " "
    here = "in the cache; " if row["cached"] and not row["bundled"] else ""
    licence = "licence unknown" if row["license"] == "unknown" else row["license"]
    more = textwrap.wrap(f"{here}{licence}; {row['description']}", 76)
    return "\n    ".join([f"{star} {row['name']:<{width}}  {row['kind']}  {rates}", *more])
