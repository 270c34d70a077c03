"""The statistics of training steps between two rows of the log."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from ..usage import LARGEST, CodebookUsage


class Meter:
    """Means of the loss terms, and codebook usage, since the last row of the log.

    The sums stay on the device, so that steps do not wait for it.

    Args:
        codebook_size: K; tokens of codebooks larger than `usage.LARGEST` are not counted.
        counting: whether to count tokens; only the main process does.
    """

    def __init__(self, codebook_size: int, *, counting: bool) -> None:
        self._codebook_size = codebook_size
        self.counting = counting and codebook_size <= LARGEST
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._tokens: list[torch.Tensor] = []

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        """Add the terms of a step: scalars."""
        for name, value in terms.items():
            before = self._sums.get(name)
            self._sums[name] = value.float() if before is None else before + value.float()
            self._counts[name] = self._counts.get(name, 0) + 1

    def add_tokens(self, tokens: torch.Tensor) -> None:
        """Add int64 tokens of any shape, if tokens are counted."""
        if self.counting:
            self._tokens.append(tokens)

    def share(self, accelerator: Accelerator) -> None:
        """Replace the sums by their means over all processes."""
        if self._sums and accelerator.num_processes > 1:
            names = sorted(self._sums)
            values = torch.stack([self._sums[name] for name in names])
            self._sums = dict(zip(names, accelerator.reduce(values, "mean").unbind()))

    def means(self) -> dict[str, float]:
        """Means of the terms since the last call."""
        names = sorted(self._sums)
        values = torch.stack([self._sums[name] / self._counts[name] for name in names]).tolist()
        self._sums.clear()
        self._counts.clear()
        return dict(zip(names, values))

    def usage(self) -> dict[str, float]:
        """`perplexity` and `cvu` of the tokens since the last call; empty if there are none."""
        if not self._tokens:
            return {}
        usage = CodebookUsage(self._codebook_size)
        for tokens in self._tokens:
            usage.update(tokens)
        self._tokens.clear()
        return {"perplexity": usage.perplexity, "cvu": usage.cvu}

    def stored(self) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Groups of tensors, and JSON-serialisable state, for a checkpoint; see `restore`."""
        groups: dict[str, dict[str, Any]] = {"log": self._sums}
        if self._tokens:
            groups["tokens"] = {"all": torch.cat([t.flatten().cpu() for t in self._tokens])}
        return groups, {"log": self._counts}

    def restore(
        self,
        groups: dict[str, dict[str, torch.Tensor]],
        state: dict[str, Any],
        device: torch.device,
    ) -> None:
        """Continue from a checkpoint; KeyError if it is incomplete."""
        self._sums = {name: value.to(device) for name, value in groups.get("log", {}).items()}
        self._counts = {name: int(state["log"][name]) for name in self._sums}
        self._tokens = list(groups.get("tokens", {}).values()) if self.counting else []
