"""The trainer of codecs: with or without discriminators.

The losses, noise and statistics of several processes are those of one process with the joint batch.
So two processes end with the same weights as one with twice the batch, up to rounding.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..models import Autoencoder
from ..recipe import Recipe
from .codebook import CodebookDuties
from .hardware import NoWeightsError, TrainingError, loader_workers
from .log import RunLog
from .loop import TrainingLoop
from .modalities import make_task
from .selection import Selection, has_evaluation
from .state import RunState
from .step import TrainStep

FINAL_SECONDS = 1800.0  # longest wait for evaluations under way when a run ends


class Trainer(TrainingLoop):
    """Trains a codec; see `TrainingLoop`. Checkpoints contain the discriminators, too.

    Args:
        recipe: the recipe to train.
        folder: the run folder.
        init_from: model.safetensors to start a new run from.

    Raises:
        TrainingError: the device or a package is missing, or `train.decoder_only` has no weights to
            start from.
        CheckpointError: the checkpoint or `init_from` cannot be used.
        DataError: the training data cannot be used.
        EvaluationError: the held-out data cannot be used.
    """

    state: RunState
    train_step: TrainStep

    def __init__(self, recipe: Recipe, folder: Path, *, init_from: Path | None = None) -> None:
        super().__init__(recipe, folder)
        found = self._found
        self.task = make_task(recipe)
        self.speed, self.shown = self.task.speed, self.task.shown
        if recipe.eval.data is not None and self.main:
            self.task.held_out().find_items()  # fail before anything that takes long
        self.state = RunState(recipe, folder, self.task, self.accelerator, self._precision)
        if found is None:
            self._begin(init_from)
        elif init_from is not None:
            self.notes.append(f"the run resumes: {init_from} is not used")
        with self.accelerator.local_main_process_first():  # it downloads what is missing
            loss = self.task.losses().to(self.device)
            self.data = self.task.crops(
                process=self.accelerator.process_index,
                processes=self.accelerator.num_processes,
                workers=loader_workers(recipe, self.accelerator),
            )
        self.codebook = CodebookDuties(recipe, self.data, self.accelerator)
        self._resume()
        if self.step < recipe.train.steps:
            self.codebook.begin(self.state.model.quantizer)
        self.train_step = TrainStep(self.state, self.task, loss, self.accelerator)
        if found is None and recipe.train.precision == "auto":
            fault = self.train_step.check_precision(self.data.shape)
            if fault is not None:
                self.notes.append(f"train.precision=auto uses fp32: {fault}")

    def _begin(self, init_from: Path | None) -> None:
        """Start a new run."""
        left = [] if init_from is None else self.state.load_weights(init_from)
        if left:
            self.notes.append(
                f"{init_from} has another quantizer: {', '.join(left)} start from random weights"
            )
        if self.recipe.train.decoder_only:
            if init_from is None:
                raise NoWeightsError("train.decoder_only needs weights to start from")
            if left:
                raise TrainingError(f"train.decoder_only: {init_from} has another quantizer")
            if not self.state.model.quantizer.fitted:
                raise TrainingError(f"train.decoder_only: {init_from} has no codebook")

    def _networks(self) -> dict[str, nn.Module]:
        networks = {"codec": self.state.model, "discriminators": self.state.discriminators}
        return {name: network for name, network in networks.items() if network is not None}

    def _unfinished(self) -> bool:
        return super()._unfinished() or (self.main and not self.state.model.quantizer.fitted)

    def _between_steps(self, log: RunLog) -> None:
        self.codebook.calibrate(self.state.model.quantizer, self.step, log)

    def _finish(self, selection: Selection | None, log: RunLog) -> None:
        """Fit the codebook if that is due, save, and evaluate for the last time."""
        error, quantizer = None, self.state.model.quantizer
        due = self.codebook.due(quantizer)
        if self.main and due and not quantizer.fitted:
            try:
                self.codebook.make(quantizer, self.state.averaged_model(), log)
            except ValueError as reason:  # too few different latents
                error = reason
        self.save()
        if error is not None:
            raise TrainingError(f"no codebook: {error}; the weights are saved")
        if selection is not None:
            if not has_evaluation(self.folder, self.step):
                self._select(selection, log)
            selection.report(self.step, self.state.seconds, FINAL_SECONDS)
            if due:
                model = copy.deepcopy(self.state.model).eval()
                selection.refine(
                    self.step, model, lambda: self.codebook.make(model.quantizer, model, log)
                )
        self.accelerator.wait_for_everyone()

    def _show(self, batch: np.ndarray, log: RunLog) -> None:
        """Show the first crop, and its reconstruction from tokens by the averaged weights."""
        if not self.main:
            return
        model = self._averaged()
        if model is None:
            return
        crop = torch.from_numpy(batch[:1]).to(self.device)
        with torch.no_grad():
            output, _ = model(crop)
        self.task.show(log, self.step, "original", crop[0])
        self.task.show(log, self.step, "decoded", output[0])

    def _averaged(self) -> Autoencoder | None:
        """The averaged model, with a quickly fitted codebook if it has none.

        Returns:
            The model; None if no codebook can be fitted yet.

        Raises:
            TrainingError: a gradient was not finite.
        """
        self.train_step.check_finite()
        model = self.state.averaged_model()
        return model if self.codebook.make_quickly(model.quantizer) else None

    def _start_selection(self, stack: ExitStack, log: RunLog) -> Selection | None:
        if self.recipe.eval.data is None or not self.main:
            return None
        selection = Selection(
            self.recipe, self.folder, log, self.task.held_out(), publish=self.accelerator.log
        )
        stack.callback(selection.close)
        return selection

    def _select(self, selection: Selection | None, log: RunLog) -> None:
        """Start an evaluation of the averaged weights of this step."""
        if selection is None:
            return
        model = self._averaged()
        if model is None:
            log.message(f"step {self.step}: no codebook to evaluate yet")
        else:
            selection.start(self.step, model, self.device)
