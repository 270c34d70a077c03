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
from .corpora import DataError, FileKind

CodecFunction = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

MAX_WORKERS = 4
MAX_RUNNING = 2  # evaluations; bounds the memory of what was decoded


class EvaluationError(ValueError):
    """Held-out data, or a choice of metric, that cannot be used."""


class HeldOut(ABC):
    """What an evaluation needs to know about one kind of data.

    An item is the array that is coded, with all of its samples or pixels.

    Args:
        config: `data` and how much of each file.
        model: what the items are for.
    """

    kind: ClassVar[FileKind]

    def __init__(self, config: EvalConfig, model: Any) -> None:
        self.config: Any = config
        self.model = model

    def find(self) -> list[Any]:
        """Where items are, sorted; their `str` is for messages.

        Raises:
            EvaluationError: nothing there.
        """
        try:
            return sorted(self._places())
        except DataError as error:
            raise EvaluationError(f"eval.data: {error}") from None

    @abstractmethod
    def _places(self) -> list[Any]:
        """The same in any order; raises DataError."""

    @abstractmethod
    def read(self, place: Any) -> np.ndarray:
        """An item; raises one of `kind.errors` where there is none to use."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """That `submit` gives."""

    def missing(self) -> list[str]:
        """Metrics whose package is not installed."""
        return []

    @abstractmethod
    def codec(self, model: Autoencoder, device: torch.device | str) -> CodecFunction:
        """A function that codes one item as `Codec` does, in float32.

        Args:
            model: in eval mode, with its weights on `device`.
            device: where it runs.

        Returns:
            Item -> int64 tokens and the decoded item.
        """

    @abstractmethod
    def submit(
        self, workers: Workers, item: np.ndarray, decoded: np.ndarray
    ) -> Future[dict[str, float]]:
        """Have `metrics` measured; ValueError where the two do not fit together."""

    @abstractmethod
    def header(self, item: np.ndarray) -> TokenHeader:
        """Of its token file."""

    @abstractmethod
    def rate(self, n_bytes: int, items: list[np.ndarray]) -> dict[str, float]:
        """What so many bytes for all items are, by its name in metrics.jsonl."""


@dataclass(frozen=True)
class _Run:
    """An evaluation whose items are with the workers."""

    step: int
    totals: dict[str, float]  # what is known without them
    scores: list[Future[dict[str, float]]]


class Evaluation:
    """Held-out items, coded now and measured later.

    The caller's thread codes the items (`start`); processes of the lowest priority measure what
    came out, and `results` gives the finished evaluations. No worker that ends or fails disturbs
    the caller: its evaluation is dropped, and told of in `failures`. A context manager.

    Attributes:
        items: of `held_out`: `max_files` spread evenly over all.
        skipped: a line for each file that could not be used.
        missing: metrics that are left out because their package is not installed.
        failures: a line for each evaluation that was dropped.

    Args:
        held_out: where items come from, and what is done with them.

    Raises:
        EvaluationError: no data, no item that can be used, or the package of `eval.best` missing.
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
        self._running: deque[_Run] = deque()
        self._workers = Workers(min(MAX_WORKERS, max(1, (os.cpu_count() or 1) // 2)))

    def start(self, step: int, codec: CodecFunction) -> None:
        """Code all items, here and now, and have the results measured in the background.

        Waits for older evaluations where more than MAX_RUNNING would be under way.

        Args:
            step: that the results shall have.
            codec: item -> int64 tokens and the decoded item, as of `HeldOut.codec`; its errors
                pass through, and leave nothing started.
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
        self._running.append(_Run(step, totals, scores))

    @property
    def running(self) -> set[int]:
        """Steps whose evaluations are under way."""
        return {run.step for run in self._running}

    def results(self, wait: float = 0.0) -> list[tuple[int, dict[str, float]]]:
        """The evaluations that have finished since the last call, oldest first.

        Args:
            wait: seconds to wait for each that was started.

        Returns:
            step and values of each: the metrics, means over the items that have a value (NaN if
            none has, as PESQ of silence); `unscored`, the items that lack at least one; `entropy`
            (bits per token), `perplexity` and `cvu` of all tokens; the rate of the items as token
            files.
        """
        found = []
        while self._running and (scores := self._collect(self._running[0], wait)) is not None:
            run = self._running.popleft()
            if scores:
                found.append((run.step, _means(scores) | run.totals))
        return found

    def close(self) -> None:
        """End the workers at once; evaluations under way are dropped without a word."""
        self._running.clear()
        self._workers.close()

    def __enter__(self) -> Evaluation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _collect(self, run: _Run, seconds: float) -> list[dict[str, float]] | None:
        """The values of all items; none of them after a failure, None while some are not ready."""
        done, pending = wait(run.scores, seconds, FIRST_EXCEPTION)
        for error in filter(None, (score.exception() for score in done)):
            for score in pending:
                score.cancel()
            self.failures.append(f"evaluation of step {run.step}: {error}")
            return []
        return None if pending else [score.result() for score in run.scores]

    def _read(self) -> list[np.ndarray]:
        """The items; what cannot be used goes to `skipped`."""
        held_out, limit = self.held_out, self.held_out.config.max_files
        places = held_out.find()
        if len(places) > limit:
            spread = np.linspace(0, len(places) - 1, limit).round().astype(int)
            places = [places[i] for i in spread]
        items = []
        for place in places:
            try:
                items.append(held_out.read(place))
            except held_out.kind.errors as error:
                reason = str(error).removeprefix(f"{place}: ")
                self.skipped.append(f"{place}: {reason}")
        if not items:
            reason = f" ({self.skipped[0]})" if self.skipped else ""
            path, noun = held_out.config.data.path, held_out.kind.noun
            raise EvaluationError(f"{path}: no {noun} that can be used{reason}")
        return items

    def _totals(self, tokens: list[np.ndarray]) -> dict[str, float]:
        """What the tokens of all items tell."""
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
    """Means of what has a value, and `unscored`."""
    table = {name: np.array([score[name] for score in scores]) for name in scores[0]}
    has = {name: ~np.isnan(column) for name, column in table.items()}
    means = {
        name: float(column[has[name]].mean()) if has[name].any() else math.nan
        for name, column in table.items()
    }
    return means | {"unscored": float((~np.logical_and.reduce(list(has.values()))).sum())}
