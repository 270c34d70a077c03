"""The network: its distributions, checked by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs the lm extra")
import torch

from vpcodec.config import LMConfig
from vpcodec.lm import LanguageModel

LEVELS = (3, 2, 4)
CONFIG = LMConfig(name="tiny", layers=1, width=8, heads=2, context=8)


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(CONFIG, LEVELS).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum())


def test_the_digits_head_is_the_sum_of_its_digits_by_hand(model: LanguageModel) -> None:
    special, digits = model.special, (2, 1, 3)
    token = 2 + 3 * (1 + 2 * 3)
    ids = torch.tensor([[special.bos, 5, token]])
    with torch.no_grad():
        found = model.log_likelihood(ids)[0, 1].item()
        x = model.hidden(ids[:, :-1])[0, 1].double().numpy()
    wanted = 0.0
    for i, digit in enumerate(digits):
        head = model.heads[i]
        inner = head.weight.detach().double().numpy() @ x + head.bias.detach().double().numpy()
        codes = model.codes[i].detach().double().numpy()
        logits = codes @ (x + inner / (1 + np.exp(-inner)))
        assert len(logits) == LEVELS[i] + (i == 0)  # the end is one more value of the first digit
        wanted += log_softmax(logits)[digit]
        if i < 2:
            x = x + model.known[i].detach().double().numpy()[digit]
    assert found == pytest.approx(wanted, abs=1e-5)


def test_the_shares_of_all_tokens_and_the_end_sum_to_one(model: LanguageModel) -> None:
    special = model.special
    last = [*range(special.bos), special.eos]
    ids = torch.tensor([[special.bos, 7, i] for i in last])
    with torch.no_grad():
        shares = model.log_likelihood(ids)[:, 1].exp()
    assert shares.sum().item() == pytest.approx(1, abs=1e-5)
    assert len(shares) == 24 + 1


def test_a_flat_codebook_has_one_digit() -> None:
    torch.manual_seed(0)
    model = LanguageModel(CONFIG, (11,)).eval()
    ids = torch.tensor([[model.special.bos, i] for i in (*range(11), model.special.eos)])
    with torch.no_grad():
        assert model.log_likelihood(ids).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_ids_depend_on_those_before_only(model: LanguageModel) -> None:
    a = torch.tensor([[model.special.bos, 1, 2, 3, 4]])
    b = torch.tensor([[model.special.bos, 1, 2, 9, 8]])
    with torch.no_grad():
        first, second = model.log_likelihood(a), model.log_likelihood(b)
    assert torch.equal(first[:, :2], second[:, :2])
    assert not torch.allclose(first[:, 2:], second[:, 2:])


def test_padding_does_not_count(model: LanguageModel) -> None:
    bos, eos, pad = model.special
    with torch.no_grad():
        alone = model(torch.tensor([[bos, 1, 2, eos]]))
        padded = model(torch.tensor([[bos, 1, 2, eos, pad, pad]]))
    assert padded.item() == pytest.approx(alone.item(), abs=1e-6)


def test_every_digit_matters(model: LanguageModel) -> None:
    tokens = [a + 3 * (b + 2 * c) for a, b, c in itertools.product(range(3), range(2), range(4))]
    ids = torch.tensor([[model.special.bos, token, 0] for token in tokens])
    with torch.no_grad():
        found = model.log_likelihood(ids)
    assert len(set(found[:, 0].tolist())) == len(set(found[:, 1].tolist())) == 24
