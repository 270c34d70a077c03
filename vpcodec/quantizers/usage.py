"""How a codebook is used: exact counts over any number of tokens, and what follows from them."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist

from .base import check_positive, processes

LARGEST = 2**28  # codes: 2 GiB of counts


class CodebookUsage:
    """Counts tokens, in int64, as they come.

    With p_i the share of code i: entropy H = -sum p_i log2 p_i bits, perplexity 2^H,
    CVU = 2^H / K (VP-VAE paper, section 4: "codebook valid usage", 1 for uniform use). All are of
    the tokens counted; fewer tokens than codes cannot use all of them.

    Args:
        codebook_size: K, at most 2^28.
    """

    def __init__(self, codebook_size: int) -> None:
        check_positive(codebook_size=codebook_size)
        if codebook_size > LARGEST:
            raise ValueError(f"codebook_size must be at most {LARGEST}, got {codebook_size}")
        self.codebook_size = codebook_size
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)

    def update(self, tokens: torch.Tensor | np.ndarray) -> None:
        """Count integer tokens of any shape.

        Raises:
            ValueError: tokens that are no integers or not in 0 .. K - 1; nothing is counted then.
        """
        if isinstance(tokens, torch.Tensor):
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
        codes, counts = np.unique(tokens.astype(np.int64), return_counts=True)
        self.counts[torch.from_numpy(codes)] += torch.from_numpy(counts)

    def merge(self, other: CodebookUsage) -> None:
        """Add the counts of another one of the same codebook size."""
        if other.codebook_size != self.codebook_size:
            raise ValueError(
                f"codebooks of {self.codebook_size} and {other.codebook_size} codes do not add up"
            )
        self.counts += other.counts

    def all_reduce(self) -> None:
        """Add up the counts of all processes of the group; without a group, nothing.

        Every process must call it, and once: the counts are those of all afterwards.
        """
        if processes() > 1:
            counts = self.counts.cuda() if dist.get_backend() == "nccl" else self.counts
            dist.all_reduce(counts)
            self.counts = counts.cpu()

    @property
    def tokens(self) -> int:
        """Tokens counted."""
        return int(self.counts.sum())

    @property
    def entropy(self) -> float:
        """Bits per token; nan without tokens."""
        if not self.tokens:
            return math.nan
        share = self.counts[self.counts > 0].double() / self.tokens
        return max(0.0, float(-(share * share.log2()).sum()))

    @property
    def perplexity(self) -> float:
        """2^entropy, the number of codes that carry as much when used evenly."""
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
        """Bit/s that the tokens carry: entropy times rate, reached by an ideal entropy coder."""
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
