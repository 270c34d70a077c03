"""The trainer: any number of processes, with or without discriminators, exact when resumed.

All random numbers of a step are a function of the seed and the step, or part of the checkpoint; and
the losses, noise and statistics of several processes are those of one process with the joint batch.
So a run that was interrupted anywhere and resumed ends with the same weights as one that was not,
and two processes with the same weights as one with twice the batch, both up to rounding.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..media.files import atomic_output
from ..models import Autoencoder
from ..recipe import Recipe
from .checkpoints import checkpoints, load_newest
from .codebook import CodebookDuties
from .hardware import (
    NoWeightsError,
    TrainingError,
    any_process,
    choose_precision,
    deferred_interrupt,
    loader_workers,
    make_accelerator,
    same_in_all_processes,
    to_device,
)
from .log import Clock, RunLog, truncate_metrics, write_readme
from .modalities import make_task
from .selection import Selection, has_evaluation
from .state import RunState
from .step import TrainStep

STOP_SECONDS = 5.0  # longest wait for evaluations under way when a run is interrupted
FINAL_SECONDS = 1800.0  # and when it ends


class Trainer:
    """Trains one recipe in one run folder.

    The folder holds README.md, recipe.json, `checkpoints/` (model, averaged weights, optimisers,
    discriminators), `best.safetensors`, metrics.jsonl and TensorBoard events.

    Args:
        recipe: the recipe to train.
        folder: the run folder, created if missing. An existing run resumes, if its recipe trains
            the same model.
        init_from: model.safetensors to start a new run from.

    Attributes:
        state: everything that changes from step to step.
        train_step: one training step.
        data: the source of crops.
        notes: messages to show when training starts.

    Raises:
        TrainingError: the device or a package is missing, or `train.decoder_only` has no weights to
            start from.
        CheckpointError: the checkpoint or `init_from` cannot be used.
        DataError: the training data cannot be used.
        EvaluationError: the held-out data cannot be used.
    """

    def __init__(self, recipe: Recipe, folder: Path, *, init_from: Path | None = None) -> None:
        self.recipe = recipe
        self.folder = folder
        self.accelerator = make_accelerator(recipe)
        self.device = self.accelerator.device
        self.main = self.accelerator.is_main_process
        self.notes: list[str] = []
        found = self._find_checkpoint()
        precision: str = recipe.train.precision
        if precision == "auto" and found is not None:
            precision = str(found[1].get("precision"))
        precision = choose_precision(precision, self.accelerator)
        self.task = make_task(recipe)
        if recipe.eval.data is not None and self.main:
            self.task.held_out().find_items()  # fail before anything that takes long
        self.state = RunState(recipe, folder, self.task, self.accelerator, precision)
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
        self._listed = 0  # files written to skipped.txt
        folder.mkdir(parents=True, exist_ok=True)
        if found is not None:
            changed = self.state.restore(*found, self._data_facts())
            if "data" in changed:
                self.notes.append("the training data have changed since the run was interrupted")
            if "batch" in changed:
                self.notes.append("the batch size has changed, so the following crops are others")
        if not same_in_all_processes(self.state.step, self.accelerator):
            raise TrainingError(f"{folder}: the processes see different checkpoints")
        if self.main:
            truncate_metrics(folder, self.step)
        if self.step < recipe.train.steps:
            self.codebook.begin(self.state.model.quantizer)
        self.train_step = TrainStep(self.state, self.task, loss, self.accelerator)
        if found is None and recipe.train.precision == "auto":
            fault = self.train_step.check_precision(self.data.shape)
            if fault is not None:
                self.notes.append(f"train.precision=auto uses fp32: {fault}")

    @property
    def step(self) -> int:
        """Number of updates done."""
        return self.state.step

    def _find_checkpoint(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]] | None:
        """The newest undamaged checkpoint; None if there are no checkpoints."""
        if not checkpoints(self.folder):
            return None
        groups, state, damaged = load_newest(self.folder)
        self.notes += [f"{error}; using the one before it" for error in damaged]
        return groups, state

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

    def train(self) -> None:
        """Train to the last step; on Ctrl-C or SIGTERM, finish the step, save and stop.

        Raises:
            KeyboardInterrupt: the run was interrupted, and a checkpoint is saved.
            TrainingError: the run cannot continue.
        """
        train = self.recipe.train
        if not any_process(self._unfinished(), self.accelerator):
            return
        with ExitStack() as stack:
            log = RunLog(self.folder, self.recipe, step=self.step, enabled=self.main)
            stack.callback(log.close)
            selection = self._start_selection(stack, log)
            self._describe(log)
            if train.trackers:
                self.accelerator.init_trackers("vpcodec", self.recipe.model_dump(mode="json"))
                stack.callback(self.accelerator.end_training)
            interrupted = stack.enter_context(deferred_interrupt())
            batches = self.data.batches(
                self.step * train.accumulate, train.steps * train.accumulate
            )
            if self.step < train.steps:
                stack.enter_context(closing(batches))
                if self._selection_is_due() and not has_evaluation(self.folder, self.step):
                    self._select(selection, log)  # it was lost when the run was interrupted
            clock = Clock()
            while self.step < train.steps:
                with clock.training():
                    with clock.waiting():
                        samples = np.stack([next(batches) for _ in range(train.accumulate)])
                    terms = self.train_step(*to_device(samples, self.device))
                clock.numbers += samples.size * self.accelerator.num_processes
                self.state.meter.add(terms)
                last = self.step == train.steps
                if self.step % train.log_every == 0 or last:
                    self._log(clock, log)
                if self.step % train.show_every == 0:
                    self._show(samples[0], log)
                self.codebook.calibrate(self.state.model.quantizer, self.step, log)
                stop = any_process(interrupted(), self.accelerator)
                if not last and (stop or self.step % train.save_every == 0):
                    self.save()
                if not last and self._selection_is_due() and not stop:
                    self._select(selection, log)
                if selection is not None:
                    wait = STOP_SECONDS if stop else 0.0
                    selection.report(self.step, self.state.seconds, wait)
                if stop and not last:
                    raise KeyboardInterrupt
            self._finish(selection, log)

    def save(self) -> None:
        """Write a checkpoint; returns in every process once it is written.

        Raises:
            TrainingError: a gradient was not finite, so the state is not worth keeping.
        """
        self.train_step.check_finite()
        self._list_skipped()
        self.state.meter.share(self.accelerator)
        if self.main:
            self.state.save(self._data_facts())
        self.accelerator.wait_for_everyone()

    def _unfinished(self) -> bool:
        if not self.main:
            return False
        steps_left = self.step < self.recipe.train.steps
        unevaluated = self.recipe.eval.data is not None and not has_evaluation(
            self.folder, self.step
        )
        return steps_left or not self.state.model.quantizer.fitted or unevaluated

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

    def _data_facts(self) -> dict[str, Any]:
        """Everything besides the seed that determines the crops of a step."""
        sizes = [self.recipe.data.batch_size, self.recipe.train.accumulate]
        return {
            "data": self.data.fingerprint,
            "batch": [*sizes, self.accelerator.num_processes],
        }

    def _list_skipped(self) -> None:
        """List files that could not be read in the run folder."""
        skipped, process = self.data.skipped, self.accelerator.process_index
        if len(skipped) > self._listed:
            self._listed = len(skipped)
            with atomic_output(
                self.folder / f"skipped{f'-{process}' if process else ''}.txt"
            ) as file:
                file.write("".join(f"{name}\n" for name in skipped).encode())

    def _describe(self, log: RunLog) -> None:
        """Write README.md and recipe.json, and show the notes on stderr."""
        sources = ", ".join(corpus.path for corpus in self.recipe.data.train) or "generated"
        data = f"{sources} ({self.data.summary})" if self.data.summary else sources
        parameters = {"codec": self.state.model, "discriminators": self.state.discriminators}
        if self.main:
            with atomic_output(self.folder / "recipe.json") as file:
                file.write(self.recipe.model_dump_json(indent=2).encode())
            write_readme(
                self.folder,
                self.recipe,
                parameters={k: _parameters(m) for k, m in parameters.items() if m is not None},
                data=data,
            )
        for note in self.notes:
            log.message(note)
        if self.data.skipped:
            log.message(
                f"left out {len(self.data.skipped)} files that cannot be read (skipped.txt); the "
                f"first: {self.data.skipped[0]}"
            )
        self._list_skipped()

    def _log(self, clock: Clock, log: RunLog) -> None:
        """Log a row: the means since the last one."""
        meter = self.state.meter
        meter.share(self.accelerator)
        row = meter.means()
        self.train_step.check_finite()
        seconds, speed, wait_share = clock.lap()
        self.state.seconds += seconds
        name, size, unit = self.task.speed
        row |= {
            "lr": self.train_step.learning_rate(self.step - 1),
            name: speed / size,
            "wait_share": wait_share,
        }
        row |= meter.usage()
        log.row(self.step, self.state.seconds, row)
        self.accelerator.log(row, self.step)
        note = "  ".join(f"{term} {row[term]:.3f}" for term in ("loss", self.task.shown))
        if "discriminator" in row:
            note += f"  D {row['discriminator']:.3f}"
        log.progress(self.step, f"{note}  {row[name]:.3g} {unit}")

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

    def _selection_is_due(self) -> bool:
        return self.step > 0 and self.step % self.recipe.eval.every == 0

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


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
