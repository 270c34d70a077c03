"""How a codebook is used: exact counts over any number of tokens, and statistics of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

LARGEST = 2**28  # codes: 2 GiB of counts


class CodebookUsage:
    """Counts tokens, in int64, as they come.

    With p_i the share of code i: entropy H = -sum p_i log2 p_i bits, perplexity 2^H, and
    CVU = 2^H / K (VP-VAE paper, section 4: "codebook valid usage", 1 for uniform use). Fewer tokens
    than codes cannot use all codes, so all of these are then lower bounds.

    Args:
        codebook_size: K, at most 2^28.
    """

    def __init__(self, codebook_size: int) -> None:
        if codebook_size != int(codebook_size) or not 1 <= codebook_size <= LARGEST:
            raise ValueError(
                f"codebook_size must be an integer from 1 to {LARGEST}, got {codebook_size}"
            )
        self.codebook_size = codebook_size
        self.counts = np.zeros(codebook_size, np.int64)

    def update(self, tokens: Any) -> None:
        """Count integer tokens: an array or a torch tensor of any shape.

        Raises:
            ValueError: tokens that are not integers in 0 .. K - 1; nothing is counted then.
        """
        if hasattr(tokens, "detach"):  # of torch, which this module does without
            if tokens.is_floating_point() or tokens.is_complex():
                raise ValueError(f"tokens must be integers, got {tokens.dtype}")
            tokens = tokens.detach().cpu().numpy()
        if not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens must be integers, got {tokens.dtype}")
        if tokens.size == 0:
            return
        for bad in (int(tokens.min()), int(tokens.max())):
            if not 0 <= bad < self.codebook_size:
                raise ValueError(f"token {bad} is not within 0 .. {self.codebook_size - 1}")
        self.add(*np.unique(tokens.astype(np.int64), return_counts=True))

    def add(self, codes: np.ndarray, counts: np.ndarray) -> None:
        """Add counts of codes.

        Args:
            codes: int64 (n,) in 0 .. K - 1, all different.
            counts: int64 (n,), how often each occurred.
        """
        self.counts[codes] += counts

    def merge(self, other: CodebookUsage) -> None:
        """Add the counts of another instance.

        Raises:
            ValueError: it is for another codebook size.
        """
        if other.codebook_size != self.codebook_size:
            raise ValueError(
                f"codebooks of {self.codebook_size} and {other.codebook_size} codes cannot be added"
            )
        self.counts += other.counts

    @property
    def tokens(self) -> int:
        """Number of tokens counted."""
        return int(self.counts.sum())

    @property
    def entropy(self) -> float:
        """Bits per token; nan without tokens."""
        if not self.tokens:
            return math.nan
        share = self.counts[self.counts > 0] / self.tokens
        return max(0.0, float(-(share * np.log2(share)).sum()))

    @property
    def perplexity(self) -> float:
        """2^entropy: the number of evenly used codes that would carry as much."""
        return 2**self.entropy

    @property
    def cvu(self) -> float:
        """Perplexity over the codebook size."""
        return self.perplexity / self.codebook_size

    @property
    def used(self) -> float:
        """Share of the codes that occurred."""
        return int((self.counts > 0).sum()) / self.codebook_size

    def bitrate(self, tokens_per_second: float) -> float:
        """Bit/s of an ideal entropy coder: entropy times token rate."""
        return self.entropy * tokens_per_second

    def summary(self) -> dict[str, float]:
        """All of the above as plain numbers."""
        return {
            "tokens": self.tokens,
            "entropy": self.entropy,
            "perplexity": self.perplexity,
            "cvu": self.cvu,
            "used": self.used,
        }
