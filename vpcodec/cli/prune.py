"""vpcodec models prune: initial weights of a smaller model from a trained one."""

from __future__ import annotations

from pathlib import Path

import typer


def prune(
    folder: Path = typer.Argument(..., help="Model folder of a native audio model."),
    recipe: Path = typer.Argument(..., help="Recipe of the smaller model, with its data."),
    output: Path = typer.Option(
        ..., "--output", "-o", metavar="FILE", help="Weights to write (.safetensors)."
    ),
    batches: int = typer.Option(
        16, min=1, metavar="N", help="Batches of data to judge hidden units by."
    ),
) -> None:
    """Remove the hidden units of a model that matter least, to fit a smaller recipe.

    Hidden layers, depths and attention_window may be smaller. Continue with:
    vpcodec train RECIPE --init-from OUTPUT
    """
    from . import common

    common.need_extra("train", "torch", "torchaudio", "safetensors", "accelerate", "yaml")
    from ..recipe import load_recipe
    from ..training.corpora import DataError
    from ..training.pruning import PruningError, prune_folder

    bar = common.ProgressBar("prune", 1)
    try:
        n = prune_folder(folder, load_recipe(recipe), output, batches=batches, progress=bar.report)
    except (DataError, PruningError) as error:
        raise common.UsageError(str(error)) from None
    finally:
        bar.close()
    following = f"vpcodec train {recipe} --init-from {output}"
    typer.echo(f"{output}: {n / 1e6:.1f} M parameters; next: {following}")
