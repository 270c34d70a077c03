"""Held-out bits per token of a language model, beside those of simpler ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...config import LMConfig
from ...lm import LanguageModel
from ...model_folder import ModelFolder
from ...recipe import LMRecipe
from ...usage import CodebookUsage
from ..checkpoints import BEST, save_checkpoint
from ..log import RunLog
from ..selection import kept
from .data import Clip

ROWS = 16  # at a time
CODER_BLOCK = 2048  # tokens that the entropy coder codes at a time, as in token files


class HeldOutTokens:
    """Held-out clips, and what models need to code them.

    Audio is predicted in steps of half the context, so that all but the first tokens of a clip are
    predicted from at least half of it; of an image, all whole grids, each by itself.

    Args:
        clips: of `data.read_clips`.
        config: of the language model.
        codec: that made the tokens.

    Attributes:
        n_tokens: how many tokens are predicted.
    """

    def __init__(self, clips: list[Clip], config: LMConfig, codec: ModelFolder) -> None:
        self._config, self._codec = config, codec
        self._pieces = [piece for clip in clips for piece in _pieces(clip, config)]
        self.n_tokens = sum(piece.size for piece in self._pieces)

    @torch.no_grad()
    def bits(self, model: LanguageModel) -> float:
        """Bits per token of a language model in eval mode. That a clip has not ended counts, that
        it ends does not: an entropy coder knows it."""
        device, total = model.begin.device, 0.0
        rows = list(self._rows(model))
        for first in range(0, len(rows), ROWS):
            ids = np.stack([row for row, _ in rows[first : first + ROWS]])
            known = torch.tensor([known for _, known in rows[first : first + ROWS]], device=device)
            tensor = torch.from_numpy(ids).to(device)
            found = model.log_likelihood(tensor)
            counted = tensor[:, 1:] != model.special.pad
            counted &= torch.arange(found.shape[1], device=device) >= known[:, None]
            total -= float(found.double()[counted].sum())
        return total / math.log(2) / self.n_tokens

    def baselines(self, training: list[Clip]) -> dict[str, float]:
        """Bits per token of simpler models of the same tokens.

        Args:
            training: the clips that the language model learns from.

        Returns:
            `entropy`: of the held-out tokens without context, a lower bound where they are few;
            `unigram`: under the frequencies of the training tokens, half a token added to each;
            `coder`: of the codec's integer entropy coder, if it has one.
        """
        size = self._codec.config.codebook_size
        held_out, learnt = CodebookUsage(size), CodebookUsage(size)
        for usage, clips in ((held_out, self._pieces), (learnt, training)):
            for clip in clips:
                usage.update(clip)
        shares = (learnt.counts + 0.5) / (learnt.tokens + 0.5 * size)
        unigram = -float((held_out.counts * np.log2(shares)).sum()) / held_out.tokens
        found = {"entropy": held_out.entropy, "unigram": unigram}
        if (coder := self._codec.coder) is not None:
            columns = self._config.grid[1] if self._config.grid else None
            n_bytes = sum(
                len(coder.pack(part.astype(np.int64)[:, None], columns))
                for piece in self._pieces
                for part in _blocks(piece, columns)
            )
            found["coder"] = 8 * n_bytes / self.n_tokens
        return found

    def rates(self, bits: float) -> dict[str, float]:
        """The rate of so many bits per token, under its name: per second, or per pixel."""
        codec: Any = self._codec.config
        if self._config.grid is not None:
            return {"bits_per_pixel": bits / codec.hop_length**2}
        return {"bits_per_second": bits * codec.sample_rate / codec.hop_length}

    def _rows(self, model: LanguageModel) -> Iterator[tuple[NDArray[np.int64], int]]:
        """Rows of ids, and how many of their tokens are predicted in the row before."""
        context, special = self._config.context, model.special
        for piece in self._pieces:
            step = context if self._config.grid else max(1, context // 2)
            for start in range(0, max(1, len(piece) - context + step), step):
                part = piece[start : start + context]
                row = np.full(context + 1, special.pad, np.int64)
                row[0], row[1 : 1 + len(part)] = special.bos, part
                yield row, context - step if start else 0


def _pieces(clip: Clip, config: LMConfig) -> list[NDArray[np.int32]]:
    """(N,) tokens of a clip of audio, or of each whole grid of an image."""
    if config.grid is None:
        return [clip]
    rows, columns = config.grid
    return [
        clip[top : top + rows, left : left + columns].ravel()
        for top in range(0, clip.shape[0] - rows + 1, rows)
        for left in range(0, clip.shape[1] - columns + 1, columns)
    ]


def _blocks(piece: NDArray[np.int32], columns: int | None) -> list[NDArray[np.int32]]:
    size = CODER_BLOCK if columns is None else len(piece)
    return [piece[start : start + size] for start in range(0, len(piece), size)]


class LMSelection:
    """Evaluates weights, logs bits per token, and keeps the weights with the fewest.

    Args:
        recipe: recipe of the run.
        folder: the run folder.
        log: log of the run.
        held_out: what to predict.
        training: the clips that are learnt from.
        publish: called with a row of scores and the current step, for tracking services.
    """

    def __init__(
        self,
        recipe: LMRecipe,
        folder: Path,
        log: RunLog,
        held_out: HeldOutTokens,
        training: list[Clip],
        *,
        facts: dict[str, Any],
        publish: Callable[[dict[str, float], int], None],
    ) -> None:
        self._state = {"config": recipe.model.model_dump(mode="json"), **facts}
        self._path, self._log, self._publish = folder / BEST, log, publish
        self._held_out = held_out
        self._baselines = held_out.baselines(training)
        self._found: list[tuple[int, dict[str, float]]] = []

    def close(self) -> None:
        """Nothing is under way."""

    def start(self, step: int, model: LanguageModel, device: torch.device) -> None:
        """Evaluate a model in eval mode, and keep its weights if it is the best so far."""
        bits = self._held_out.bits(model)
        row = {"bits_per_token": bits, **self._held_out.rates(bits), **self._baselines}
        self._found.append((step, row))
        best = kept(self._path, self._log)
        if best is None or bits < best["value"]:
            state = self._state | {"step": step, "metric": "bits_per_token", "value": bits}
            save_checkpoint(self._path, {"average": model.state_dict()}, state)

    def report(self, now: int, seconds: float, wait: float = 0.0) -> None:
        """Log the evaluations since the last call."""
        for step, values in self._found:
            row = {f"eval/{name}": value for name, value in values.items()}
            self._log.row(step, seconds, row)
            self._publish(row, now)
            note = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
            self._log.message(f"step {step}: held out: {note}")
        self._found.clear()
