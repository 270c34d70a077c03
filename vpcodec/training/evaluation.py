"""Quality on held-out data during training, measured in the background."""

from __future__ import annotations

import io
import math
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar

import numpy as np
import torch

from ..metrics.registry import METRICS
from ..models import Autoencoder
from ..recipe.base import Evaluation as EvalConfig
from ..scoring.workers import Workers
from ..tokenfile import TokenHeader, write_tokens
from ..usage import CodebookUsage
from .corpora import DataError, MediaType

CodecFunction = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

MAX_WORKERS = 4
MAX_RUNNING = 2  # evaluations at a time; bounds the memory for decoded items


class EvaluationError(ValueError):
    """Held-out data or a metric cannot be used."""


class HeldOut(ABC):
    """The held-out data of one modality, and how it is coded and measured.

    An item is one array to code: the samples of a clip or the pixels of an image.

    Args:
        config: `data`, and how much of each file to use.
        model: configuration of the model that is evaluated.

    Attributes:
        media: the files that items are read from.
    """

    media: ClassVar[MediaType]

    def __init__(self, config: EvalConfig, model: Any) -> None:
        self.config: Any = config
        self.model = model

    def find_items(self) -> list[Any]:
        """Locations of the items, sorted; their `str` is used in messages.

        Raises:
            EvaluationError: there are none.
        """
        try:
            return sorted(self._locations())
        except DataError as error:
            raise EvaluationError(f"eval.data: {error}") from None

    @abstractmethod
    def _locations(self) -> list[Any]:
        """Locations of the items in any order; DataError if there are none."""

    @abstractmethod
    def read(self, location: Any) -> np.ndarray:
        """Read an item; raises one of `media.errors` if it cannot be used."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that `submit` measures."""

    def missing(self) -> list[str]:
        """Names of metrics whose package is not installed."""
        return []

    @abstractmethod
    def codec(self, model: Autoencoder, device: torch.device | str) -> CodecFunction:
        """A function that codes one item as `Codec` does, in float32.

        Args:
            model: in eval mode, with its weights on `device`.
            device: device to compute on.

        Returns:
            A function from an item to its int64 tokens and the decoded item.
        """

    @abstractmethod
    def submit(
        self, workers: Workers, item: np.ndarray, decoded: np.ndarray
    ) -> Future[dict[str, float]]:
        """Have `metrics` measured by a worker; ValueError if the shapes do not match."""

    @abstractmethod
    def header(self, item: np.ndarray) -> TokenHeader:
        """Header of the token file of an item."""

    @abstractmethod
    def rate(self, n_bytes: int, items: list[np.ndarray]) -> dict[str, float]:
        """The rate if all items take `n_bytes`, under its name in metrics.jsonl."""


@dataclass(frozen=True)
class _PendingEvaluation:
    """An evaluation whose items the workers are measuring."""

    step: int
    totals: dict[str, float]  # statistics of the tokens, known at once
    scores: list[Future[dict[str, float]]]


class Evaluation:
    """Codes held-out items at once, and has them measured in the background.

    The caller's thread codes the items (`start`), processes of the lowest priority measure the
    decoded items, and `results` returns the finished evaluations. A worker that fails or dies does
    not disturb the caller: the evaluation is dropped and listed in `failures`. A context manager.

    Args:
        held_out: where the items come from, and how they are coded and measured.

    Attributes:
        items: the items of `held_out`, at most `max_files`, spread evenly over all.
        skipped: one line for each file that could not be used.
        missing: metrics that are left out because their package is not installed.
        failures: one line for each evaluation that was dropped.

    Raises:
        EvaluationError: there are no usable items, or the package of `eval.best` is not installed.
    """

    def __init__(self, held_out: HeldOut) -> None:
        self.held_out = held_out
        self.skipped: list[str] = []
        self.failures: list[str] = []
        self.missing = held_out.missing()
        best = held_out.config.best
        if best in self.missing:
            raise EvaluationError(f"eval.best is {best}, which needs {METRICS[best].install}")
        self.items = self._read()
        self._running: deque[_PendingEvaluation] = deque()
        self._workers = Workers(min(MAX_WORKERS, max(1, (os.cpu_count() or 1) // 2)))

    def start(self, step: int, codec: CodecFunction) -> None:
        """Code all items now, and have the decoded items measured in the background.

        Waits for earlier evaluations if more than MAX_RUNNING would be under way. If the codec
        raises an exception, nothing is started.

        Args:
            step: step to file the results under.
            codec: the result of `HeldOut.codec`.
        """
        if len(self._running) >= MAX_RUNNING:
            wait(self._running[-MAX_RUNNING].scores)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # as `Codec` computes
            coded = [codec(item) for item in self.items]
        totals = self._totals([tokens for tokens, _ in coded])
        scores = [
            self.held_out.submit(self._workers, item, decoded)
            for item, (_, decoded) in zip(self.items, coded, strict=True)
        ]
        self._running.append(_PendingEvaluation(step, totals, scores))

    @property
    def running(self) -> set[int]:
        """Steps whose evaluations are under way."""
        return {run.step for run in self._running}

    def results(self, wait: float = 0.0) -> list[tuple[int, dict[str, float]]]:
        """The evaluations that have finished since the last call, oldest first.

        Args:
            wait: seconds to wait for each evaluation under way.

        Returns:
            Step and values of each: the mean of each metric over the items that have a value (NaN
            if none has, such as PESQ of silence); `unscored`, the number of items that lack a
            value; `entropy` (bits per token), `perplexity` and `cvu` of all tokens; and the rate of
            the items as token files.
        """
        found = []
        while self._running and (scores := self._collect(self._running[0], wait)) is not None:
            run = self._running.popleft()
            if scores:
                found.append((run.step, _means(scores) | run.totals))
        return found

    def close(self) -> None:
        """Stop the workers at once and drop the evaluations under way."""
        self._running.clear()
        self._workers.close()

    def __enter__(self) -> Evaluation:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _collect(self, run: _PendingEvaluation, seconds: float) -> list[dict[str, float]] | None:
        """The values of all items; empty after a failure, None while some are not ready."""
        done, pending = wait(run.scores, seconds, FIRST_EXCEPTION)
        for error in filter(None, (score.exception() for score in done)):
            for score in pending:
                score.cancel()
            self.failures.append(f"evaluation of step {run.step}: {error}")
            return []
        return None if pending else [score.result() for score in run.scores]

    def _read(self) -> list[np.ndarray]:
        """Read the items; list those that cannot be used in `skipped`."""
        held_out, limit = self.held_out, self.held_out.config.max_files
        locations = held_out.find_items()
        if len(locations) > limit:
            spread = np.linspace(0, len(locations) - 1, limit).round().astype(int)
            locations = [locations[i] for i in spread]
        items = []
        for location in locations:
            try:
                items.append(held_out.read(location))
            except held_out.media.errors as error:
                reason = str(error).removeprefix(f"{location}: ")
                self.skipped.append(f"{location}: {reason}")
        if not items:
            reason = f" ({self.skipped[0]})" if self.skipped else ""
            path, noun = held_out.config.data.path, held_out.media.noun
            raise EvaluationError(f"{path}: no {noun} that can be used{reason}")
        return items

    def _totals(self, tokens: list[np.ndarray]) -> dict[str, float]:
        """Statistics of the tokens of all items, and their rate as token files."""
        usage = CodebookUsage(self.held_out.model.codebook_size)
        n_bytes = 0
        for item, found in zip(self.items, tokens, strict=True):
            usage.update(found)
            file = io.BytesIO()
            write_tokens(file, found.reshape(1, -1), self.held_out.header(item))
            n_bytes += len(file.getvalue())
        return {
            "entropy": usage.entropy,
            "perplexity": usage.perplexity,
            "cvu": usage.cvu,
        } | self.held_out.rate(n_bytes, self.items)


def _means(scores: list[dict[str, float]]) -> dict[str, float]:
    """Means over the items that have a value, and `unscored`."""
    columns = {name: np.array([score[name] for score in scores]) for name in scores[0]}
    has = {name: ~np.isnan(column) for name, column in columns.items()}
    means = {
        name: float(column[has[name]].mean()) if has[name].any() else math.nan
        for name, column in columns.items()
    }
    return means | {"unscored": float((~np.logical_and.reduce(list(has.values()))).sum())}
