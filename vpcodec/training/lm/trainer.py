"""The trainer of language models on tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ...codec import AudioCodec, Codec, ImageCodec
from ...config import ConfigError, LMConfig, explain
from ...hub import open_model
from ...lm import LanguageModel, continue_tokens, write_lm
from ...model_folder import ModelFolder
from ...recipe import LMRecipe
from ..checkpoints import (
    CheckpointError,
    averaged_weights,
    load_newest,
    one_line,
)
from ..hardware import compile_options
from ..log import RunLog
from ..loop import TrainingLoop
from ..optim import set_learning_rate
from ..selection import has_evaluation
from ..state import ModelState
from ..step import ModelStep
from .data import Clip, Excerpts, read_clips
from .evaluation import HeldOutTokens, LMSelection

SHOWN_SECONDS = 4.0  # of audio in TensorBoard
NOTHING = np.empty(0, np.int64)  # a prompt


class LMState(ModelState):
    """The state of a language model's run.

    Args:
        model, recipe, folder, accelerator, precision: as for `ModelState`.
        codec: that made the tokens.

    Attributes:
        tokens: what checkpoints say of the tokens.
    """

    def __init__(
        self,
        model: LanguageModel,
        recipe: LMRecipe,
        folder: Path,
        accelerator: Accelerator,
        precision: str,
        codec: ModelFolder,
    ) -> None:
        counted = codec.config.codebook_size
        super().__init__(model, recipe, folder, accelerator, precision, counted=counted)
        self.tokens = {"levels": list(model.levels), "space": codec.space.hex()}

    def _config(self, data: dict[str, Any]) -> LMConfig:
        return _parse(data)

    def _facts(self) -> dict[str, Any]:
        return self.tokens

    def _check(self, state: dict[str, Any]) -> None:
        if {name: state[name] for name in self.tokens} != self.tokens:
            raise CheckpointError(f"{self.folder}: holds a run on the tokens of another codec")


class LMStep(ModelStep):
    """Updates a language model by the mean negative log-likelihood of ids."""

    def __call__(self, *batches: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state
        set_learning_rate(state.optimizers, self.learning_rate(state.step))
        total = torch.zeros((), device=state.device)
        for i, batch in enumerate(batches):
            with self._synchronised_last(i, len(batches), self.model):
                with self._autocast():
                    loss = self.model(batch) / len(batches)
                state.scalers[0].scale(loss).backward()
            total += loss.detach()
        clip = self.recipe.optim.grad_clip
        norm = self._update(state.optimizers, state.model, clip, state.scalers[0])
        state.step += 1
        state.update_average()
        return {"loss": total, "bits": total / np.log(2), "grad_norm": norm}


class LMTrainer(TrainingLoop):
    """Trains a language model; see `TrainingLoop`. Bits are those per id: token or end.

    Args:
        recipe: the recipe to train.
        folder: the run folder.
        init_from: model.safetensors of a language model to start a new run from.

    Raises:
        ModelError: the codec cannot be opened.
        TrainingError: the device or a package is missing.
        CheckpointError: the checkpoint or `init_from` cannot be used.
        DataError: the tokens cannot be read, or are those of another codec.
    """

    recipe: LMRecipe
    state: LMState
    speed = ("tokens_per_second", 1.0, "tokens/s")
    shown = "bits"

    def __init__(self, recipe: LMRecipe, folder: Path, *, init_from: Path | None = None) -> None:
        super().__init__(recipe, folder)
        config, seed = recipe.model, recipe.train.seed
        self._codec = open_model(config.codec)
        self._clips, skipped = read_clips(recipe.data.train, self._codec, config)
        self._held_out: HeldOutTokens | None = None
        if recipe.eval.data is not None and self.main:
            held_out, left = read_clips([recipe.eval.data], self._codec, config)
            self._held_out = HeldOutTokens(_spread(held_out, recipe), config, self._codec)
            self.notes += [f"not evaluated: {text}" for text in left]
        torch.manual_seed(seed)
        model = LanguageModel(config, self._codec.config.quantizer.token_levels)
        new = self._found is None
        if new and init_from is not None:
            _load(model, init_from)
        elif init_from is not None:
            self.notes.append(f"the run resumes: {init_from} is not used")
        self.data = Excerpts(
            self._clips,
            config,
            model.special,
            batch_size=recipe.data.batch_size,
            seed=seed,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            skipped=skipped,
        )
        self.state = LMState(model, recipe, folder, self.accelerator, self._precision, self._codec)
        self._resume()
        self.train_step = LMStep(self.state, self.accelerator)
        if recipe.train.compile:
            self.state.model.compile(options=compile_options(self._precision, self.device))

    def _networks(self) -> dict[str, nn.Module]:
        return {"language model": self.state.model}

    def _start_selection(self, stack: ExitStack, log: RunLog) -> LMSelection | None:
        if self._held_out is None:
            return None
        return LMSelection(
            self.recipe,
            self.folder,
            log,
            self._held_out,
            self._clips,
            facts=self.state.tokens,
            publish=self.accelerator.log,
        )

    def _select(self, selection: LMSelection | None, log: RunLog) -> None:
        if selection is not None:
            self.train_step.check_finite()
            selection.start(self.step, self.state.averaged_model(), self.device)

    def _show(self, batch: np.ndarray, log: RunLog) -> None:
        """Show what the averaged weights generate from nothing."""
        if not self.main:
            return
        self.train_step.check_finite()
        model, grid = self.state.averaged_model(), self.recipe.model.grid
        codec: Any = Codec.from_pretrained(self._codec.path, threads=1)
        if isinstance(codec, ImageCodec):
            tokens = continue_tokens(model, NOTHING, model.config.context, may_end=False)
            image = codec.decode(tokens.reshape(grid))
            log.image(self.step, "generated", torch.from_numpy(image).permute(2, 0, 1) / 255)
        elif isinstance(codec, AudioCodec):
            n = round(SHOWN_SECONDS * codec.frame_rate)
            tokens = continue_tokens(model, NOTHING, n, may_end=False)
            audio = torch.from_numpy(codec.decode(tokens[None])[0])
            log.audio(self.step, "generated", audio, codec.sample_rate)

    def _finish(self, selection: LMSelection | None, log: RunLog) -> None:
        self.save()
        if selection is not None and not has_evaluation(self.folder, self.step):
            self._select(selection, log)
            selection.report(self.step, self.state.seconds)
        self.accelerator.wait_for_everyone()


def export_lm(
    run: Path,
    target: Path,
    *,
    force: bool = False,
    note: Callable[[str], None] | None = None,
) -> None:
    """Export the averaged weights of a run to a model folder.

    Args:
        run: run folder, whose newest checkpoint is used, or a checkpoint file such as
            `best.safetensors`.
        target: model folder to create; it appears complete or not at all.
        force: replace an existing folder.
        note: called with a message for each damaged checkpoint that is skipped.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be used.
        FileExistsError: `target` exists and `force` is not set.
    """
    groups, state = load_newest(run, note)
    try:
        model = LanguageModel(_parse(state["config"]), tuple(state["levels"]))
        model.load_state_dict(averaged_weights(groups))
        space = bytes.fromhex(state["space"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{run}: the checkpoint is incomplete ({one_line(error)})") from None
    write_lm(model, space, target, force=force)


def _parse(data: dict[str, Any]) -> LMConfig:
    try:
        return LMConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def _load(model: LanguageModel, path: Path) -> None:
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = one_line(error)
        raise CheckpointError(f"{path}: not the weights of such a model ({reason})") from None


def _spread(clips: list[Clip], recipe: LMRecipe) -> list[Clip]:
    """At most `eval.max_files` clips, spread evenly over all."""
    n = min(len(clips), recipe.eval.max_files)
    return [clips[i] for i in np.linspace(0, len(clips) - 1, n).round().astype(int)]
