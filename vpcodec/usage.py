"""Codebook usage: exact counts over any number of tokens, and statistics of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

LARGEST = 2**28  # codes: 2 GiB of counts


class CodebookUsage:
    """Counts tokens incrementally, in int64.

    With p_i the share of code i: entropy H = -sum p_i log2 p_i bits, perplexity 2^H, and
    CVU = 2^H / K (VP-VAE paper, section 4: "codebook valid usage", 1 for uniform use). If there are
    fewer tokens than codes, all of these are lower bounds.

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
            ValueError: tokens that are not integers in 0 .. K - 1; then none are counted.
        """
        if hasattr(tokens, "detach"):  # a torch tensor; this module does not import torch
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
            counts: int64 (n,), number of occurrences of each.
        """
        self.counts[codes] += counts

    def merge(self, other: CodebookUsage) -> None:
        """Add the counts of another instance.

        Raises:
            ValueError: the codebook sizes differ.
        """
        if other.codebook_size != self.codebook_size:
            raise ValueError(
                f"usage of {self.codebook_size} and of {other.codebook_size} codes cannot be merged"
            )
        self.counts += other.counts

    @property
    def tokens(self) -> int:
        """Number of tokens counted."""
        return int(self.counts.sum())

    @property
    def entropy(self) -> float:
        """Bits per token; NaN without tokens."""
        if not self.tokens:
            return math.nan
        share = self.counts[self.counts > 0] / self.tokens
        return max(0.0, float(-(share * np.log2(share)).sum()))

    @property
    def perplexity(self) -> float:
        """2^entropy: the number of uniformly used codes with the same entropy."""
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
        """Bit rate of an ideal entropy coder, bit/s: entropy times token rate."""
        return self.entropy * tokens_per_second

    def summary(self) -> dict[str, float]:
        """All statistics as plain numbers."""
        return {
            "tokens": self.tokens,
            "entropy": self.entropy,
            "perplexity": self.perplexity,
            "cvu": self.cvu,
            "used": self.used,
        }
