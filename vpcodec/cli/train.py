"""vpcodec train: a recipe to a run folder."""

from __future__ import annotations

from pathlib import Path

import typer


def train(
    recipe: Path = typer.Argument(..., help="Recipe file (YAML)."),
    overrides: list[str] = typer.Argument(
        None, metavar="[SECTION.FIELD=VALUE]...", help="Overrides, such as optim.lr=3e-4."
    ),
    run: Path = typer.Option(
        None, "--run", help="Run folder, resumed if it exists; default: runs/RECIPE."
    ),
    init_from: Path = typer.Option(
        None, help="Start a new run from these weights (model folder or model.safetensors)."
    ),
) -> None:
    """Train a model; interrupt and repeat the command to resume."""
    from . import common

    common.need_extra("train", "torch", "torchaudio", "safetensors", "tensorboard", "yaml")
    from ..hub import WEIGHTS
    from ..recipe import load_recipe
    from ..training.checkpoints import CheckpointError
    from ..training.data import DataError
    from ..training.trainer import Trainer, TrainingError

    try:
        folder = run or Path("runs") / recipe.stem
        if init_from is not None and init_from.is_dir():
            init_from = init_from / WEIGHTS
        trainer = Trainer(load_recipe(recipe, overrides), folder, init_from=init_from)
        if trainer.step:
            typer.echo(f"resuming {folder} at step {trainer.step}", err=True)
        try:
            trainer.train()
        except KeyboardInterrupt:
            typer.echo(f"saved at step {trainer.step}; repeat the command to go on", err=True)
            raise
    except (CheckpointError, DataError, TrainingError) as error:
        raise common.UsageError(str(error)) from None
    typer.echo(f"{folder}: trained to step {trainer.step}; next: vpcodec export {folder} -o FOLDER")
