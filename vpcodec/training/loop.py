"""The training loop, for all kinds of models: any number of processes, exact when resumed.

All random numbers of a step are a function of the seed and the step, or part of the checkpoint. So
a run that was interrupted anywhere and resumed ends with the same weights as one that was not, up
to rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from ..media.files import atomic_output
from ..recipe import AnyRecipe
from .checkpoints import checkpoints, load_newest
from .hardware import (
    TrainingError,
    any_process,
    choose_precision,
    deferred_interrupt,
    make_accelerator,
    same_in_all_processes,
    to_device,
)
from .log import Clock, RunLog, truncate_metrics, write_readme
from .selection import has_evaluation
from .state import ModelState
from .step import ModelStep

STOP_SECONDS = 5.0  # longest wait for evaluations under way when a run is interrupted

Checkpoint = tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]


class Selection(Protocol):
    """Evaluates weights, logs their scores, and keeps the best."""

    def start(self, step: int, model: Any, device: torch.device) -> None:
        """Begin to evaluate a model in eval mode."""

    def report(self, now: int, seconds: float, wait: float = 0.0) -> None:
        """Log the evaluations that have finished, at step `now` after `seconds` of training; wait
        that long for each that is under way."""

    def close(self) -> None:
        """Stop the evaluations under way."""


class TrainingLoop(ABC):
    """Trains one recipe in one run folder.

    The folder holds README.md, recipe.json, `checkpoints/` (model, averaged weights, optimisers),
    `best.safetensors`, metrics.jsonl and TensorBoard events.

    A subclass sets `state`, `train_step`, `data`, `speed` and `shown` when it is made, the first
    with `_resume`.

    Args:
        recipe: the recipe to train.
        folder: the run folder, created if missing. An existing run resumes, if its recipe trains
            the same model.

    Attributes:
        state: everything that changes from step to step.
        train_step: one training step.
        data: the source of batches, with a `fingerprint`, a `summary`, and a list `skipped` of what
            could not be read.
        speed: how speed is measured: its name in metrics.jsonl, the array elements of a batch per
            unit, and the unit in progress lines.
        shown: the loss term that progress lines show.
        notes: messages to show when training starts.

    Raises:
        TrainingError: the device or a package is missing.
        CheckpointError: the checkpoint cannot be used.
    """

    state: ModelState
    train_step: ModelStep
    data: Any
    speed: tuple[str, float, str]
    shown: str

    def __init__(self, recipe: AnyRecipe, folder: Path) -> None:
        self.recipe: Any = recipe
        self.folder = folder
        self.accelerator = make_accelerator(recipe)
        self.device = self.accelerator.device
        self.main = self.accelerator.is_main_process
        self.notes: list[str] = []
        self._listed = 0  # files written to skipped.txt
        self._found = self._find_checkpoint()
        precision: str = recipe.train.precision
        if precision == "auto" and self._found is not None:
            precision = str(self._found[1].get("precision"))
        self._precision = choose_precision(precision, self.accelerator)

    @property
    def step(self) -> int:
        """Number of updates done."""
        return self.state.step

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
                self._between_steps(log)
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

    def _resume(self) -> None:
        """Restore the state, if there is a checkpoint, once there are `state` and `data`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._found is not None:
            changed = self.state.restore(*self._found, self._data_facts())
            self._found = None  # so that its tensors are not kept
            if "data" in changed:
                self.notes.append("the training data have changed since the run was interrupted")
            if "batch" in changed:
                self.notes.append("the batch size has changed, so the following crops are others")
        if not same_in_all_processes(self.state.step, self.accelerator):
            raise TrainingError(f"{self.folder}: the processes see different checkpoints")
        if self.main:
            truncate_metrics(self.folder, self.step)

    def _find_checkpoint(self) -> Checkpoint | None:
        """The newest undamaged checkpoint; None if there are no checkpoints."""
        if not checkpoints(self.folder):
            return None
        return load_newest(self.folder, self.notes.append)

    def _unfinished(self) -> bool:
        """Whether there is anything left to do in the main process."""
        if not self.main:
            return False
        unevaluated = self.recipe.eval.data is not None and not has_evaluation(
            self.folder, self.step
        )
        return self.step < self.recipe.train.steps or unevaluated

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
        if self.main:
            with atomic_output(self.folder / "recipe.json") as file:
                file.write(self.recipe.model_dump_json(indent=2).encode())
            write_readme(
                self.folder,
                self.recipe,
                parameters={k: _parameters(m) for k, m in self._networks().items()},
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
        name, size, unit = self.speed
        row |= {
            "lr": self.train_step.learning_rate(self.step - 1),
            name: speed / size,
            "wait_share": wait_share,
        }
        row |= meter.usage()
        log.row(self.step, self.state.seconds, row)
        self.accelerator.log(row, self.step)
        note = "  ".join(f"{term} {row[term]:.3f}" for term in ("loss", self.shown))
        if "discriminator" in row:
            note += f"  D {row['discriminator']:.3f}"
        log.progress(self.step, f"{note}  {row[name]:.3g} {unit}")

    def _selection_is_due(self) -> bool:
        return self.step > 0 and self.step % self.recipe.eval.every == 0

    @abstractmethod
    def _networks(self) -> dict[str, nn.Module]:
        """The networks that are trained, by what README.md calls them."""

    @abstractmethod
    def _start_selection(self, stack: ExitStack, log: RunLog) -> Selection | None:
        """What evaluates and selects weights, closed by `stack`; None where nothing is held out."""

    @abstractmethod
    def _select(self, selection: Any, log: RunLog) -> None:
        """Start an evaluation of the averaged weights of this step."""

    @abstractmethod
    def _show(self, batch: np.ndarray, log: RunLog) -> None:
        """Log something for people to hear or see; `batch` is that of the last step."""

    @abstractmethod
    def _finish(self, selection: Any, log: RunLog) -> None:
        """Save, and evaluate for the last time."""

    def _between_steps(self, log: RunLog) -> None:
        """Do what is due besides the training step."""
        return None


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
