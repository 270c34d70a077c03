"""Sampling: tokens that continue other tokens, or none."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from ..progress import Progress
from .network import LanguageModel


@torch.no_grad()
def continue_tokens(
    model: LanguageModel,
    prompt: NDArray[np.int64],
    length: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    may_end: bool = True,
    progress: Progress | None = None,
) -> NDArray[np.int64]:
    """Tokens that follow a prompt; the same ones for the same seed.

    Where the context is full, the model goes on with the later half of it.

    Args:
        model: in eval mode.
        prompt: (T,) tokens; T may be 0.
        length: most tokens to add.
        seed: of the random numbers.
        temperature: divides the logits of each digit; 0: always the likeliest digit.
        top_p: digits are drawn from the smallest set of values with that probability.
        may_end: whether the model can end before; the first token always comes.
        progress: told the tokens that are done.

    Returns:
        (N,) int64 tokens in [0, codebook_size), N <= length, without the prompt.

    Raises:
        ValueError: a token of the prompt is outside the codebook.
    """
    if prompt.size and not 0 <= prompt.min() <= prompt.max() < model.special.bos:
        raise ValueError(f"the tokens of the prompt are not within [0, {model.special.bos})")
    device = model.begin.device
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = prompt.tolist()
    first, context = len(ids), model.config.context
    cache, seen = DynamicCache(config=model.backbone.config), 0  # ids in the cache, bos included
    for done in range(length):
        if not seen or seen >= context:
            keep = ids[-(context - 1) :] if not seen else ids[-(context // 2) :]
            cache, new = DynamicCache(config=model.backbone.config), [model.special.bos, *keep]
            seen = 0
        else:
            new = ids[-1:]
        hidden = model.hidden(torch.tensor([new], device=device), cache)[0, -1]
        seen += len(new)
        found = model.sample(
            hidden,
            generator,
            temperature=temperature,
            top_p=top_p,
            may_end=may_end and len(ids) > 0,
        )
        if found == model.special.eos:
            break
        ids.append(found)
        if progress is not None:
            progress("generating", done + 1, length)
    return np.array(ids[first:], np.int64)
