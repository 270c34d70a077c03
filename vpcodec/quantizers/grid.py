"""Tokens of a product of scalar grids: mixed-radix numbers, the first dimension least significant.

Integer arithmetic only: the public code's float32 sums are exact below 2^24 codes alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def digits_to_tokens(digits: torch.Tensor, levels: Sequence[int]) -> torch.Tensor:
    """(..., D) int64 digits -> (...) int64 tokens, sum_i digit_i * prod(levels[:i])."""
    return (digits * _basis(levels, digits.device)).sum(-1)


def tokens_to_digits(tokens: torch.Tensor, levels: Sequence[int]) -> torch.Tensor:
    """(...) int64 tokens -> (..., D) int64 digits."""
    radix = torch.tensor(list(levels), device=tokens.device)
    return tokens.unsqueeze(-1) // _basis(levels, tokens.device) % radix


def _basis(levels: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([math.prod(levels[:i]) for i in range(len(levels))], device=device)
