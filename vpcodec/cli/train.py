"""vpcodec train: a recipe to a run folder."""

from __future__ import annotations

import glob
import json
import os
import sys
from pathlib import Path
from typing import Any

import typer


def train(
    recipe: Path = typer.Argument(..., help="Recipe file (YAML); see docs/recipes.md."),
    overrides: list[str] = typer.Argument(
        None,
        metavar="[SECTION.FIELD=VALUE]...",
        help="Overrides of recipe fields, such as optim.lr=3e-4.",
    ),
    run: Path = typer.Option(
        None,
        "--run",
        "--folder",
        metavar="FOLDER",
        help="Run folder, resumed if it exists; default: runs/RECIPE.",
    ),
    init_from: Path = typer.Option(
        None,
        metavar="PATH",
        help="Initial weights of a new run (model folder or model.safetensors).",
    ),
    processes: int = typer.Option(
        1,
        min=1,
        metavar="N",
        help="Training processes on this machine, one per GPU; torchrun works too.",
    ),
) -> None:
    """Train a model. Interrupt and repeat the command to resume.

    \b
    vpcodec train recipes/speech_3k.yaml data.train=recordings/ --run runs/mine
    vpcodec export runs/mine -o my-model
    """
    from . import common

    common.need_extra(
        "train", "torch", "torchaudio", "safetensors", "accelerate", "tensorboard", "yaml"
    )
    from ..recipe import LMRecipe, load_recipe

    folder = run or Path("runs") / recipe.stem
    loaded = load_recipe(recipe, overrides, name=_name_of(folder))
    if isinstance(loaded, LMRecipe):
        common.need_extra("lm", "transformers", "pyarrow")
    given = {item.partition("=")[0] for item in overrides or []}
    own_data = any(f"{key}.".startswith("data.train.") for key in given)
    left_out = own_data and not any(f"{key}.".startswith("eval.data.") for key in given)
    evaluation: Any = loaded.eval
    held_out = evaluation.data if left_out else None  # of the recipe's own data
    if held_out is not None and not _is_there(held_out):
        loaded = loaded.model_copy(update={"eval": evaluation.model_copy(update={"data": None})})
    else:
        held_out = None
    for corpus in loaded.data.train:
        if corpus.type != "huggingface" and not _is_there(corpus):
            fetch = f", or 'data.train={{type: libritts, path: {corpus.path}, download: true}}'"
            choice = fetch if corpus.type == "libritts" else ""
            raise common.UsageError(
                f"{corpus.path}: no such folder or manifest; set data.train=FOLDER{choice}"
            )
    if processes > 1:
        from ..training.launch import launch

        raise SystemExit(launch(processes, _without_processes(sys.argv[1:])))
    from ..model_folder import WEIGHTS
    from ..training.checkpoints import CheckpointError
    from ..training.corpora import DataError
    from ..training.evaluation import EvaluationError
    from ..training.hardware import NoWeightsError, TrainingError, lost_process

    Trainer: Any
    if isinstance(loaded, LMRecipe):
        from ..training.lm.trainer import LMTrainer as Trainer
    else:
        from ..training.trainer import Trainer
    rank = int(os.environ.get("RANK", 0))
    try:
        if init_from is not None and init_from.is_dir():
            init_from = init_from / WEIGHTS
        trainer = Trainer(loaded, folder, init_from=init_from)
        say = typer.echo if trainer.main else lambda *arguments, **options: None
        if held_out is not None:
            say(
                f"{held_out.path}: no held-out data there, so none is scored; name some with "
                "eval.data=FOLDER",
                err=True,
            )
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
        if isinstance(error, EvaluationError) and "no such folder or" in str(error):
            hint = "; set eval.data=FOLDER, or eval.data=null"
        raise common.UsageError(f"{prefix}{error}{hint}") from None
    except OSError as error:
        error.filename = error.filename or str(folder)
        raise
    except RuntimeError as error:
        if not lost_process(error):
            raise
        raise common.UsageError(f"process {rank}: another process has ended") from None
    say(f"{folder}: trained to step {trainer.step}; next: vpcodec export {folder} -o FOLDER")


def _name_of(run: Path) -> str:
    """What the model of a run is called: as before, or else like its folder."""
    try:
        return str(json.loads((run / "recipe.json").read_bytes())["model"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return run.resolve().name


def _is_there(corpus: Any) -> bool:
    """Whether there is something under the path of a corpus, or will be."""
    path = Path(corpus.path)
    if corpus.type == "libritts":
        roots = (path, path / "LibriTTS")
        return corpus.download or any((x / y).is_dir() for x in roots for y in corpus.subsets)
    return path.exists() or glob.has_magic(corpus.path)


def _without_processes(arguments: list[str]) -> list[str]:
    for i, word in enumerate(arguments):
        if word.partition("=")[0] == "--processes":
            return arguments[:i] + arguments[i + (1 if "=" in word else 2) :]
    return arguments
