"""Quality on held-out audio during training, measured in the background."""

from __future__ import annotations

import io
import math
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch

from ..config import ModelConfig
from ..metrics.workers import METRICS, Workers, measure
from ..models import AudioAutoencoder
from ..quantizers import CodebookUsage
from ..recipe import AudioCorpus, EvalConfig, LibriTTSCorpus
from ..tokenfile import AUDIO, TokenHeader, write_tokens
from .corpora import UNREADABLE, DataError, list_files, read_part

CodecFunction = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

MIN_SECONDS = 0.5  # shorter clips are left out
MAX_WORKERS = 4
MAX_RUNNING = 2  # evaluations; bounds the memory of decoded audio


class EvaluationError(ValueError):
    """Held-out audio, or a choice of metric, that cannot be used."""


@dataclass(frozen=True)
class _Run:
    """An evaluation whose audio is with the workers."""

    step: int
    totals: dict[str, float]  # what is known without them
    scores: list[Future[dict[str, float]]]


class Clip(NamedTuple):
    """A file, or a part of it; seconds are NaN for all of it."""

    path: Path
    offset: float
    seconds: float


class Evaluation:
    """Clips of held-out audio, coded now and measured later.

    The caller's thread codes the clips (`start`); processes of the lowest priority measure what
    came out, and `results` gives the finished evaluations. No worker that ends or fails disturbs
    the caller: its evaluation is dropped, and told of in `failures`. A context manager.

    Attributes:
        clips: (T,) float32, mono, at the model's rate, T a multiple of the hop.
        skipped: a line for each file that could not be used.
        missing: metrics that are left out because their package is not installed.
        failures: a line for each evaluation that was dropped.

    Args:
        config: `data`, `max_files` files spread evenly over it, `max_seconds` of each.
        model: what the clips are for: rate, hop, codebook, name.

    Raises:
        EvaluationError: no data, no clip that can be used, or the package of `config.best` missing.
    """

    def __init__(self, config: EvalConfig, model: ModelConfig) -> None:
        self.model = model
        self.skipped: list[str] = []
        self.failures: list[str] = []
        nothing = np.zeros(1, np.float32)
        there = measure(nothing, nothing, model.sample_rate)
        self.missing = [name for name in METRICS if name not in there]
        if config.best in self.missing:
            raise EvaluationError(
                f"eval.best is {config.best}, which needs pip install 'vpcodec[score]'"
            )
        self.clips = self._read(config)
        self._running: deque[_Run] = deque()
        self._workers = Workers(min(MAX_WORKERS, max(1, (os.cpu_count() or 1) // 2)))

    def start(self, step: int, codec: CodecFunction) -> None:
        """Code all clips, here and now, and have the results measured in the background.

        Waits for older evaluations where more than MAX_RUNNING would be under way.

        Args:
            step: that the results shall have.
            codec: (T,) float32 samples -> (N,) int64 tokens and (T,) float32 samples, as of
                `codec_of`; its errors pass through, and leave nothing started.
        """
        if len(self._running) >= MAX_RUNNING:
            wait(self._running[-MAX_RUNNING].scores)
        coded = [codec(clip) for clip in self.clips]
        totals = self._totals([tokens for tokens, _ in coded])
        rate = self.model.sample_rate
        scores = [
            self._workers.submit(clip, decoded, rate)
            for clip, (_, decoded) in zip(self.clips, coded, strict=True)
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
            step and values of each: `pesq_wb`, `stoi`, `si_sdr` (dB) and `mel_distance`, means
            over the clips that have a value (NaN if none has, as PESQ of silence); `unscored`, the
            clips that lack at least one; `entropy` (bits per token), `perplexity` and `cvu` of all
            tokens; `bitrate`, bit/s of the clips as token files.
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
        """The values of all clips; none of them after a failure, None while some are not ready."""
        done, pending = wait(run.scores, seconds, FIRST_EXCEPTION)
        for error in filter(None, (score.exception() for score in done)):
            for score in pending:
                score.cancel()
            self.failures.append(f"evaluation of step {run.step}: {error}")
            return []
        return None if pending else [score.result() for score in run.scores]

    def _read(self, config: EvalConfig) -> list[np.ndarray]:
        """The clips; what cannot be used goes to `skipped`."""
        paths = find_clips(config.data)
        if len(paths) > config.max_files:
            spread = np.linspace(0, len(paths) - 1, config.max_files).round().astype(int)
            paths = [paths[i] for i in spread]
        clips = []
        for found in paths:
            try:
                clips.append(_read_clip(found, self.model, config.max_seconds))
            except UNREADABLE as error:
                self.skipped.append(f"{found.path}: {error}")
        if not clips:
            reason = f" ({self.skipped[0]})" if self.skipped else ""
            raise EvaluationError(f"{config.data.path}: no audio file that can be used{reason}")
        return clips

    def _totals(self, tokens: list[np.ndarray]) -> dict[str, float]:
        """What the tokens of all clips tell."""
        usage = CodebookUsage(self.model.codebook_size)
        n_bytes = 0
        for clip, found in zip(self.clips, tokens, strict=True):
            usage.update(found)
            file = io.BytesIO()
            write_tokens(file, found[None], self._header(len(clip)))
            n_bytes += len(file.getvalue())
        seconds = sum(map(len, self.clips)) / self.model.sample_rate
        return {
            "entropy": usage.entropy,
            "perplexity": usage.perplexity,
            "cvu": usage.cvu,
            "bitrate": 8 * n_bytes / seconds,
        }

    def _header(self, n_samples: int) -> TokenHeader:
        model = self.model
        return TokenHeader(
            kind=AUDIO,
            model=model.name,
            fingerprint=bytes(16),
            sample_rate=model.sample_rate,
            original_rate=model.sample_rate,
            channels=1,
            n_samples=n_samples,
            hop_length=model.hop_length,
            codebook_size=model.codebook_size,
        )


def find_clips(corpus: AudioCorpus | LibriTTSCorpus) -> list[Clip]:
    """What a corpus holds, sorted.

    Raises:
        EvaluationError: nothing there.
    """
    try:
        listing = list_files(corpus)
    except DataError as error:
        raise EvaluationError(f"eval.data: {error}") from None
    rows = zip(listing.names, listing.offsets.tolist(), listing.seconds.tolist(), strict=True)
    return sorted(Clip(listing.root / name, offset, seconds) for name, offset, seconds in rows)


def codec_of(model: AudioAutoencoder, device: torch.device | str) -> CodecFunction:
    """A function that codes one clip at once, as `Codec` does in pieces, in float32.

    Args:
        model: in eval mode, with its weights on `device`.
        device: where it runs.

    Returns:
        (T,) float32 samples, T a multiple of the hop -> (T / hop,) int64 tokens and (T,) float32
        samples in line with the input.
    """
    device = torch.device(device)

    @torch.no_grad()
    def codec(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.autocast(device.type, enabled=False):
            tokens = model.encode(torch.from_numpy(samples).to(device)[None])
            late = tokens[:, -1:].expand(-1, model.config.decoder_delay)
            decoded = model.decode(torch.cat([tokens, late], 1))[:, model.delay :]
        return tokens[0].cpu().numpy(), decoded[0].cpu().numpy()

    return codec


def _read_clip(clip: Clip, model: ModelConfig, max_seconds: float) -> np.ndarray:
    """The beginning of a clip, (T,) float32.

    Raises ValueError or another of UNREADABLE where there is none to use.
    """
    rate, hop = model.sample_rate, model.hop_length
    seconds = min(max_seconds, clip.seconds) if clip.seconds > 0 else max_seconds
    samples = read_part(clip.path, clip.offset, 0, int(seconds * rate), rate)
    if len(samples) < max(hop, MIN_SECONDS * rate):
        raise ValueError(f"shorter than {MIN_SECONDS} s")
    return np.ascontiguousarray(samples[: len(samples) // hop * hop])


def _means(scores: list[dict[str, float]]) -> dict[str, float]:
    """Means of what has a value, and `unscored`."""
    table = {name: np.array([score[name] for score in scores]) for name in scores[0]}
    has = {name: ~np.isnan(column) for name, column in table.items()}
    means = {
        name: float(column[has[name]].mean()) if has[name].any() else math.nan
        for name, column in table.items()
    }
    return means | {"unscored": float((~np.logical_and.reduce(list(has.values()))).sum())}
