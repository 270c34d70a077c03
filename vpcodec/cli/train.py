"""vpcodec train: a recipe to a run folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer


def train(
    recipe: Path = typer.Argument(..., help="Recipe file (YAML); see docs/recipes.md."),
    overrides: list[str] = typer.Argument(
        None,
        metavar="[SECTION.FIELD=VALUE]...",
        help="Overrides of recipe fields, such as optim.lr=3e-4.",
    ),
    run: Path = typer.Option(
        None, "--run", "--folder", help="Run folder, resumed if it exists; default: runs/RECIPE."
    ),
    init_from: Path = typer.Option(
        None, help="Initial weights of a new run (model folder or model.safetensors)."
    ),
    processes: int = typer.Option(
        1, min=1, help="Training processes on this machine, one per GPU; torchrun works too."
    ),
) -> None:
    """Train a model. Interrupt and repeat the command to resume."""
    from . import common

    common.need_extra(
        "train", "torch", "torchaudio", "safetensors", "accelerate", "tensorboard", "yaml"
    )
    from ..recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    if processes > 1:
        from ..training.launch import launch

        raise SystemExit(launch(processes, _without_processes(sys.argv[1:])))
    from ..model_folder import WEIGHTS
    from ..training.checkpoints import CheckpointError
    from ..training.corpora import DataError
    from ..training.evaluation import EvaluationError
    from ..training.hardware import NoWeightsError, TrainingError, lost_process
    from ..training.trainer import Trainer

    rank = int(os.environ.get("RANK", 0))
    folder = run or Path("runs") / recipe.stem
    try:
        if init_from is not None and init_from.is_dir():
            init_from = init_from / WEIGHTS
        trainer = Trainer(loaded, folder, init_from=init_from)
        say = typer.echo if trainer.main else lambda *arguments, **options: None
        if trainer.step:
            say(f"resuming {folder} at step {trainer.step}", err=True)
        try:
            trainer.train()
        except KeyboardInterrupt:
            say(f"stopped at step {trainer.step}; repeat the command to resume", err=True)
            raise
    except (CheckpointError, DataError, EvaluationError, TrainingError) as error:
        prefix = f"process {rank}: " if rank else ""
        hint = ": --init-from" if isinstance(error, NoWeightsError) else ""
        raise common.UsageError(f"{prefix}{error}{hint}") from None
    except OSError as error:
        error.filename = error.filename or str(folder)
        raise
    except RuntimeError as error:
        if not lost_process(error):
            raise
        raise common.UsageError(f"process {rank}: another process has ended") from None
    say(f"{folder}: trained to step {trainer.step}; next: vpcodec export {folder} -o FOLDER")


def _without_processes(arguments: list[str]) -> list[str]:
    for i, word in enumerate(arguments):
        if word.partition("=")[0] == "--processes":
            return arguments[:i] + arguments[i + (1 if "=" in word else 2) :]
    return arguments
