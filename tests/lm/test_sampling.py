"""Sampling: seeded, within range, and the same with a cache as without."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs the lm extra")
import torch

from vpcodec.config import LMConfig
from vpcodec.lm import LanguageModel, continue_tokens

NOTHING = np.empty(0, np.int64)


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    config = LMConfig(name="tiny", layers=1, width=8, heads=2, context=8)
    model = LanguageModel(config, (3, 5)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_the_same_seed_gives_the_same_tokens(model: LanguageModel) -> None:
    draws = [continue_tokens(model, NOTHING, 30, seed=s, may_end=False) for s in (1, 1, 2)]
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


def test_tokens_are_in_range_beyond_the_context(model: LanguageModel) -> None:
    prompt = np.arange(15)
    found = continue_tokens(model, prompt, 100, may_end=False, temperature=3.0)
    assert found.shape == (100,) and found.dtype == np.int64
    assert 0 <= found.min() and found.max() < 15
    assert len(set(found.tolist())) > 10


def test_a_cache_changes_nothing(model: LanguageModel) -> None:
    found = continue_tokens(model, np.array([3, 1]), 5, temperature=0, may_end=False)
    ids = [model.special.bos, 3, 1]
    for token in found:
        hidden = model.hidden(torch.tensor([ids]))[0, -1]
        generator = torch.Generator()
        own = model.sample(hidden, generator, temperature=0, top_p=1, may_end=False)
        assert own == token
        ids.append(own)


def test_a_narrow_top_p_takes_the_likeliest_digits(model: LanguageModel) -> None:
    likeliest = continue_tokens(model, NOTHING, 12, temperature=0, may_end=False)
    narrow = continue_tokens(model, NOTHING, 12, seed=5, top_p=1e-6, may_end=False)
    assert np.array_equal(narrow, likeliest)


def test_a_model_ends_where_it_may_but_not_before_the_first_token(model: LanguageModel) -> None:
    with torch.no_grad():
        model.codes[0][-1] = 0
        model.codes[0][:-1] = 0  # all first digits and the end alike
    lengths = {len(continue_tokens(model, NOTHING, 50, seed=seed)) for seed in range(12)}
    assert 1 <= min(lengths) < 50 and len(lengths) > 3


def test_a_prompt_of_other_tokens_is_refused(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="not within"):
        continue_tokens(model, np.array([15]), 1)
