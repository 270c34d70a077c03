"""The trainer: any number of processes, adversarial or not, resumed exactly.

All randomness of a step is a function of the seed and the number of the step, or part of the
checkpoint, and the losses, noise and statistics of several processes are those of one process with
all of the batch. So a run that is interrupted anywhere and resumed gives the same weights as one
that was not, and two processes give what one gives with twice the batch, both up to rounding.
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
from .kinds import make_task
from .log import Clock, RunLog, cut_metrics, write_readme
from .selection import Selection, evaluated
from .state import RunState
from .step import TrainStep

STOP_SECONDS = 5.0  # that a run which is stopped waits for evaluations under way
FINAL_SECONDS = 1800.0  # that one which has ended does


class Trainer:
    """Trains one recipe in one run folder.

    The folder holds README.md and recipe.json, `checkpoints/` (model, averaged weights, optimisers,
    discriminators), `best.safetensors`, metrics.jsonl and TensorBoard events.

    Args:
        recipe: what to train.
        folder: the run; created. An existing run is resumed if its recipe trains the same model.
        init_from: model.safetensors to start from, for a new run.

    Attributes:
        state: what changes from step to step.
        train_step: does one.
        data: where crops come from.
        notes: lines for whoever starts the run.

    Raises:
        TrainingError, CheckpointError, DataError, EvaluationError, PerceptualError: what the recipe
            asks for is not there; it trains the decoder alone, and there are no weights for the
            rest.
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
            self.task.held_out().find()  # before anything that takes long
        self.state = RunState(recipe, folder, self.task, self.accelerator, precision)
        if found is None:
            self._begin(init_from)
        elif init_from is not None:
            self.notes.append(f"the run goes on: {init_from} is not used")
        with self.accelerator.local_main_process_first():  # which fetches what is missing
            loss = self.task.losses().to(self.device)
            self.data = self.task.crops(
                process=self.accelerator.process_index,
                processes=self.accelerator.num_processes,
                workers=loader_workers(recipe, self.accelerator),
            )
        self.codebook = CodebookDuties(recipe, self.data, self.accelerator)
        self._listed = 0  # of files that cannot be read
        folder.mkdir(parents=True, exist_ok=True)
        if found is not None:
            changed = self.state.restore(*found, self._data_facts())
            if "data" in changed:
                self.notes.append("the training data changed since the run was interrupted")
            if "batch" in changed:
                self.notes.append("batches are of another size than before: other crops will come")
        if not same_in_all_processes(self.state.step, self.accelerator):
            raise TrainingError(f"{folder}: processes see different checkpoints in it")
        if self.main:
            cut_metrics(folder, self.step)
        if self.step < recipe.train.steps:
            self.codebook.begin(self.state.model.quantizer)
        self.train_step = TrainStep(self.state, self.task, loss, self.accelerator)
        if found is None and recipe.train.precision == "auto":
            fault = self.train_step.check_precision(self.data.shape)
            if fault is not None:
                self.notes.append(f"train.precision=auto takes fp32: {fault}")

    @property
    def step(self) -> int:
        """Updates done."""
        return self.state.step

    def _find_checkpoint(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]] | None:
        """The newest checkpoint that is whole, if there are any."""
        if not checkpoints(self.folder):
            return None
        groups, state, damaged = load_newest(self.folder)
        self.notes += [f"{error}; the one before it is taken" for error in damaged]
        return groups, state

    def _begin(self, init_from: Path | None) -> None:
        """Start a new run."""
        left = [] if init_from is None else self.state.load_weights(init_from)
        if left:
            self.notes.append(
                f"{init_from} has another quantizer: {', '.join(left)} begin as they were drawn"
            )
        if self.recipe.train.decoder_only:
            if init_from is None:
                raise NoWeightsError("train.decoder_only needs weights to start from")
            if left:
                raise TrainingError(f"train.decoder_only: {init_from} has another quantizer")
            if not self.state.model.quantizer.fitted:
                raise TrainingError(f"train.decoder_only: {init_from} has no codebook")

    def train(self) -> None:
        """Run to the last step; on Ctrl-C or SIGTERM finish the step, save and stop.

        Raises:
            KeyboardInterrupt: it was stopped, and has saved.
            TrainingError: it cannot go on.
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
                if self._selection_is_due() and not evaluated(self.folder, self.step):
                    self._select(selection, log)  # it was lost when the run ended
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
        """Write the checkpoint; returns when it is there, in every process.

        Raises:
            TrainingError: a gradient was not finite, so there is nothing worth keeping.
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
        lost = self.recipe.eval.data is not None and not evaluated(self.folder, self.step)
        steps_left = self.step < self.recipe.train.steps
        return steps_left or not self.state.model.quantizer.fitted or lost

    def _finish(self, selection: Selection | None, log: RunLog) -> None:
        """Make the codebook if that is due, save, evaluate for the last time."""
        error, quantizer = None, self.state.model.quantizer
        due = self.codebook.due(quantizer)
        if self.main and due and not quantizer.fitted:
            try:
                self.codebook.make(quantizer, self.state.averaged_model(), log)
            except ValueError as found:  # too few latents that differ
                error = found
        self.save()
        if error is not None:
            raise TrainingError(f"no codebook: {error}; the weights are saved")
        if selection is not None:
            if not evaluated(self.folder, self.step):
                self._select(selection, log)
            selection.report(self.step, self.state.seconds, FINAL_SECONDS)
            if due:
                model = copy.deepcopy(self.state.model).eval()
                selection.refine(
                    self.step, model, lambda: self.codebook.make(model.quantizer, model, log)
                )
        self.accelerator.wait_for_everyone()

    def _data_facts(self) -> dict[str, Any]:
        """What decides, beside the seed, which crops a step has."""
        sizes = [self.recipe.data.batch_size, self.recipe.train.accumulate]
        return {
            "data": self.data.fingerprint,
            "batch": [*sizes, self.accelerator.num_processes],
        }

    def _list_skipped(self) -> None:
        """Files that could not be read, in the run folder."""
        skipped, process = self.data.skipped, self.accelerator.process_index
        if len(skipped) > self._listed:
            self._listed = len(skipped)
            with atomic_output(
                self.folder / f"skipped{f'-{process}' if process else ''}.txt"
            ) as file:
                file.write("".join(f"{name}\n" for name in skipped).encode())

    def _describe(self, log: RunLog) -> None:
        """README.md, and on stderr what a person should know first."""
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
        """A row of the means since the last one."""
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
        """First crop and its reconstruction by the averaged weights, really quantized."""
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
        """The averaged model with a codebook, maybe a quick one; None if there cannot be one yet.

        Raises TrainingError where a gradient was not finite.
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
        """Have the averaged weights of this step evaluated."""
        if selection is None:
            return
        model = self._averaged()
        if model is None:
            log.message(f"step {self.step}: no codebook to evaluate yet")
        else:
            selection.start(self.step, model, self.device)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
