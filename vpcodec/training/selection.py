"""Selection of the best weights of a run by their scores on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..metrics.registry import METRICS
from ..models import Autoencoder
from ..recipe import Recipe
from .checkpoints import BEST, DamagedError, inference_weights, load_checkpoint, save_checkpoint
from .evaluation import Evaluation, HeldOut
from .log import RunLog, read_metrics

SHOWN = (
    *("distillmos", "dnsmos_p808", "pesq_wb", "stoi", "mel_distance", "bitrate"),
    *("psnr", "ssim", "ms_ssim", "bits_per_pixel"),
)


class Selection:
    """Evaluates weights in the background, logs their scores, and keeps the best in a file.

    The best score is stored in `best.safetensors` itself, so that it survives when a run is killed.

    Args:
        recipe: recipe of the run.
        folder: the run folder.
        log: log of the run.
        held_out: data to evaluate on.
        publish: called with a row of scores and the current step, for tracking services whose steps
            can only increase.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        log: RunLog,
        held_out: HeldOut,
        *,
        publish: Callable[[dict[str, float], int], None],
    ) -> None:
        self._config = recipe.model.model_dump(mode="json")
        self._metric = recipe.eval.best
        self._path = folder / BEST
        self._log, self._publish = log, publish
        self._candidates: dict[int, dict[str, torch.Tensor]] = {}  # weights being evaluated
        self._held_out = held_out
        self._evaluation = Evaluation(held_out)
        for text in self._evaluation.skipped:
            log.message(f"not evaluated: {text}")
        for name in self._evaluation.missing:
            log.message(f"{name} is left out: {METRICS[name].install}")

    def close(self) -> None:
        """Stop the evaluations under way."""
        self._evaluation.close()

    def start(self, step: int, model: Autoencoder, device: torch.device) -> None:
        """Code the held-out data with a model in eval mode; it is scored in the background."""
        self._candidates[step] = {
            name: value.cpu() for name, value in inference_weights(model).items()
        }
        self._evaluation.start(step, self._held_out.codec(model, device))

    def report(self, now: int, seconds: float, wait: float = 0.0) -> None:
        """Log the evaluations that have finished, and keep the best weights.

        Args:
            now: current step of training.
            seconds: duration of training so far.
            wait: longest time to wait for each evaluation under way, s.
        """
        for step, values in self._evaluation.results(wait):
            row = {f"eval/{name}": value for name, value in values.items()}
            self._log.row(step, seconds, row)
            self._publish(row, now)
            note = "  ".join(f"{name} {values[name]:.3f}" for name in SHOWN if name in values)
            self._log.message(f"step {step}: held out: {note}")
            value = values.get(self._metric, math.nan)
            if self._is_best(value):
                self._keep(step, self._candidates[step], value)
        while self._evaluation.failures:
            self._log.message(self._evaluation.failures.pop(0))
        running = self._evaluation.running
        self._candidates = {step: self._candidates[step] for step in running}

    def refine(self, last: int, model: Autoencoder, make_codebook: Callable[[], None]) -> None:
        """Fit the codebook of the best weights as thoroughly as that of the last ones.

        Does nothing if the best weights are the last ones, whose codebook is already fitted.

        Args:
            last: step of the last weights.
            model: a model to load the best weights into.
            make_codebook: fits the codebook of `model`; raises ValueError if that fails.
        """
        if not self._path.exists():
            return
        groups, state = load_checkpoint(self._path)
        if state["step"] == last or state["refined"]:
            return
        model.load_state_dict(groups["average"])
        try:
            make_codebook()
        except ValueError as error:
            self._log.message(f"the best weights keep a quickly fitted codebook: {error}")
            return
        self._keep(state["step"], inference_weights(model), state["value"], refined=True)

    def _is_best(self, value: float) -> bool:
        if math.isnan(value):
            return False
        before = kept(self._path, self._log)
        if before is None or before.get("metric") != self._metric:
            return True
        sign = -1 if METRICS[self._metric].better == "lower" else 1
        return sign * value > sign * before["value"]

    def _keep(
        self, step: int, weights: dict[str, torch.Tensor], value: float, *, refined: bool = False
    ) -> None:
        state: dict[str, Any] = {"step": step, "config": self._config, "refined": refined}
        state |= {"metric": self._metric, "value": value}
        save_checkpoint(self._path, {"average": weights}, state)


def kept(path: Path, log: RunLog) -> dict[str, Any] | None:
    """What is known of the best weights so far; None where there are none, or damaged ones."""
    if not path.exists():
        return None
    try:
        return load_checkpoint(path)[1]
    except DamagedError as error:
        log.message(f"{error}; it is replaced")
        return None


def has_evaluation(run: Path, step: int) -> bool:
    """Whether metrics.jsonl has an evaluation of a step."""
    rows = (row for _, row in read_metrics(run) if row["step"] == step)
    return any("eval/entropy" in row for row in rows)
