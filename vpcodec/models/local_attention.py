"""Sliding-window local Transformer: each token sees itself and the `window - 1` before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .layers import Causal, State, gelu, linear

ABSENT_PENALTY = 1e30  # subtracted from the scores of tokens before the beginning


class LocalAttention(Causal):
    """Multi-head attention over an exact sliding window, with a learned bias per distance and head.

    The state holds keys, values and a flag for tokens that exist, so it does not grow with the file
    and the beginning of a stream is masked.
    """

    def __init__(self, dim: int, *, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.qkv = linear(dim, 3 * dim, bias=False)
        self.out = linear(dim, dim, bias=False, gain=0.3)
        self.distance_bias = nn.Parameter(torch.zeros(window, heads))
        self.state_shape = (window - 1, 2 * dim + 1)

    def forward(self, x: torch.Tensor, state: State | None = None) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        batch, steps, dim = x.shape
        q, kv = self.qkv(x).split([dim, 2 * dim], -1)
        kv = self.with_history(F.pad(kv, (0, 1), value=1.0), state, dim=1)
        k, v, exists = kv.split([dim, dim, 1], -1)

        def split(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(-1, (self.heads, dim // self.heads)).transpose(1, 2)

        scores = split(q) @ split(k).transpose(2, 3) * (dim // self.heads) ** -0.5
        absent = (exists.float().transpose(1, 2) - 1).unsqueeze(1) * ABSENT_PENALTY
        weights = torch.softmax(scores.float() + self._bias(steps, state) + absent, -1).to(v.dtype)
        return self.out((weights @ split(v)).transpose(1, 2).flatten(2))

    def _bias(self, steps: int, state: State | None) -> torch.Tensor:
        """(heads, steps, window - 1 + steps) bias by distance, minus infinity out of the window.

        Key j of the extended sequence is window - 1 + i - j tokens before query i.
        """
        # Biases from distance window - 1 down to 0, then minus infinity for keys out of the window.
        row = F.pad(self.distance_bias.float().flip(0).T, (0, steps), value=float("-inf"))
        keys = self.window - 1 + steps
        if state is None:  # training, whose compiler would take minutes for the other branch
            i = torch.arange(steps, device=row.device)
            j = torch.arange(keys, device=row.device)
            index = (j[None, :] - i[:, None]) % (keys + 1)
            bias = row.index_select(1, index.flatten()).unflatten(1, index.shape)
            if torch.compiler.is_compiling():
                # Fused with the softmax, torch 2.11 makes code that writes out of bounds.
                torch._dynamo.graph_break()
            return bias
        # Concatenated copies of the row, cut into rows that are one step shorter, so that each is
        # shifted by one step: ONNX Runtime copies memory instead of gathering single numbers.
        copies = row.unsqueeze(1).expand(-1, steps, -1).flatten(1)
        return copies[:, : steps * keys].unflatten(1, (steps, keys))


class TransformerLayer(nn.Module):
    """Pre-norm local attention and GEGLU feed-forward, both residual; (B, T, D)."""

    def __init__(
        self, dim: int, *, heads: int, window: int, feedforward_dim: int | None = None
    ) -> None:
        super().__init__()
        hidden = feedforward_dim or (8 * dim // 3 + 31) // 32 * 32
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = LocalAttention(dim, heads=heads, window=window)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.gate = linear(dim, 2 * hidden, bias=False)
        self.narrow = linear(hidden, dim, bias=False, gain=0.3)

    def forward(self, x: torch.Tensor, state: State | None = None) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), state)
        value, gate = self.gate(self.feed_forward_norm(x)).chunk(2, -1)
        return x + self.narrow(value * gelu(gate))


class LocalTransformer(nn.Module):
    """A stack of `TransformerLayer`; (B, D, T) like the convolutions around it."""

    def __init__(
        self,
        dim: int,
        *,
        layers: int,
        heads: int,
        window: int,
        feedforward_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerLayer(dim, heads=heads, window=window, feedforward_dim=feedforward_dim)
            for _ in range(layers)
        )

    def forward(self, x: torch.Tensor, state: State | None = None) -> torch.Tensor:
        x = x.transpose(1, 2)
        for layer in self.layers:
            x = layer(x, state)
        return x.transpose(1, 2)
