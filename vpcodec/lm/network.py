"""The network: a Llama over tokens, with heads that predict the digits of the next one in turn."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

from ..codec import SpecialTokens
from ..config import LMConfig

MULTIPLE = 32  # of the width inside the feed-forward parts


class LanguageModel(nn.Module):
    """Predicts the ids that follow: p(token) = p(digit 0) p(digit 1 | digit 0) ...

    Ids are tokens, and those of `special`. A token is embedded as the sum of the embeddings of its
    digits, which are the weights of the output, too. The first digit has one more value, which is
    `special.eos`. So no distribution has a value that is not a token or the end.

    Args:
        config: of the network.
        levels: number of values of each digit of a token, least significant first.

    Attributes:
        special: ids after the codebook.
    """

    places: torch.Tensor

    def __init__(self, config: LMConfig, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.config, self.levels = config, levels
        self.special = SpecialTokens.after(math.prod(levels))
        width = config.width
        self.codes = nn.ParameterList(
            0.02 * torch.randn(level + (digit == 0), width) for digit, level in enumerate(levels)
        )
        self.begin = nn.Parameter(0.02 * torch.randn(width))  # the embedding of bos
        self.known = nn.ParameterList(torch.randn(level, width) / 2 for level in levels[:-1])
        self.heads = nn.ModuleList(nn.Linear(width, width) for _ in levels)
        self.backbone = LlamaModel(
            LlamaConfig(
                vocab_size=1,
                hidden_size=width,
                intermediate_size=MULTIPLE * -(-8 * width // (3 * MULTIPLE)),
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=config.context,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        # its own place for embeddings is empty: they are sums
        self.backbone.embed_tokens = nn.Identity()  # type: ignore[assignment]
        self.register_buffer(
            "places", torch.tensor([math.prod(levels[:i]) for i in range(len(levels))]), False
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean negative log-likelihood of ids given those before them, nats per id.

        Args:
            ids: (B, T + 1) int64; those that are `special.pad` do not count.
        """
        targets = ids[:, 1:]
        counted = targets != self.special.pad
        return -(self.log_likelihood(ids) * counted).sum() / counted.sum()

    def log_likelihood(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T + 1) ids -> (B, T) log-likelihoods of ids[:, 1:], nats; at pad without meaning."""
        x = self.hidden(ids[:, :-1])
        targets = ids[:, 1:]
        is_token = targets < self.special.bos
        digits = self._split(targets)
        digits[..., 0] = torch.where(targets == self.special.eos, self.levels[0], digits[..., 0])
        total = x.new_zeros(targets.shape, dtype=torch.float32)
        for i, digit in enumerate(digits.unbind(-1)):
            logits = self._logits(x, i).float()
            found = -F.cross_entropy(logits.transpose(1, 2), digit, reduction="none")
            total = total + (found if i == 0 else found * is_token)
            if i + 1 < len(self.levels):
                x = x + F.embedding(digit.clamp(max=self.levels[i] - 1), self.known[i])
        return total

    def hidden(self, ids: torch.Tensor, cache: DynamicCache | None = None) -> torch.Tensor:
        """(B, T) ids -> (B, T, width), after those in the cache, which is extended."""
        digits = self._split(ids)
        x: torch.Tensor = sum(  # type: ignore[assignment]
            F.embedding(digits[..., i], codes) for i, codes in enumerate(self.codes)
        )
        x = torch.where((ids < self.special.bos)[..., None], x, self.begin)
        found: Any = self.backbone(
            None, None, None, cache, inputs_embeds=x, use_cache=cache is not None
        )
        return found.last_hidden_state

    @torch.no_grad()
    def sample(
        self,
        hidden: torch.Tensor,
        generator: torch.Generator,
        *,
        temperature: float,
        top_p: float,
        may_end: bool,
    ) -> int:
        """Draw the next id.

        Args:
            hidden: (width,), the last of `hidden`.
            generator: of random numbers, on the CPU.
            temperature: divides the logits of each digit; 0: the likeliest value.
            top_p: the smallest set of values of each digit with that probability is drawn from.
            may_end: whether `special.eos` can come.
        """
        x, token = hidden, 0
        for i, level in enumerate(self.levels):
            logits = self._logits(x, i).float().cpu()
            if not (i == 0 and may_end):
                logits = logits[:level]
            digit = _draw(logits, generator, temperature, top_p)
            if digit == level:
                return self.special.eos
            token += digit * int(self.places[i])
            if i + 1 < len(self.levels):
                x = x + self.known[i][digit]
        return token

    def _logits(self, x: torch.Tensor, digit: int) -> torch.Tensor:
        """(..., width), with the earlier digits added -> logits of a digit."""
        return F.linear(x + F.silu(self.heads[digit](x)), self.codes[digit])

    def _split(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) ids -> (..., D) digits; of ids that are no tokens, those of token 0."""
        tokens = torch.where(ids < self.special.bos, ids, 0)
        return tokens[..., None] // self.places % torch.tensor(self.levels, device=ids.device)


def _draw(
    logits: torch.Tensor, generator: torch.Generator, temperature: float, top_p: float
) -> int:
    """A value with the probabilities of (N,) logits."""
    if temperature == 0:
        return int(logits.argmax())
    shares, values = (logits / temperature).softmax(0).sort(descending=True, stable=True)
    shares = shares * (shares.cumsum(0) - shares < top_p)  # the first one always stays
    return int(values[torch.multinomial(shares, 1, generator=generator)])
