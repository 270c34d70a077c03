"""Tokens of a product of scalar grids: mixed-radix numbers, the first dimension least significant.

Integer arithmetic only: the public code's float32 sums are exact below 2^24 codes alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def digits_to_tokens(digits: torch.Tensor, levels: Sequence[int]) -> torch.Tensor:
    """(..., D) int64 digits -> (...) int64 tokens, sum_i digit_i * prod(levels[:i])."""
    tokens = digits[..., -1]
    for i in range(len(levels) - 2, -1, -1):
        tokens = tokens * levels[i] + digits[..., i]
    return tokens


def tokens_to_digits(tokens: torch.Tensor, levels: Sequence[int]) -> torch.Tensor:
    """(...) int64 tokens -> (..., D) int64 digits."""
    digits = []
    for level in levels:
        digits.append(tokens % level)
        tokens = tokens // level
    return torch.stack(digits, -1)
