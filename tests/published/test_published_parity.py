"""The published models, with random weights, beside the authors' packages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from official import (
    Official,
    official_missing,
    random_weights,
    save_modules,
    whole_windows,
)
from paths import RESOURCES

from vpcodec.published import PUBLISHED, Published
from vpcodec.published.architecture import load
from vpcodec.published.config import SQCodecConfig

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = RESOURCES / "published"
BY_NAME = {published.config.name: published for published in PUBLISHED}
SAME = 1e-4  # of full scale
SAME_TOKENS = 0.999


class Ours:
    """Our model with the weights; clips (T,), tokens (N,), on both sides whole."""

    def __init__(self, config: SQCodecConfig, weights: Mapping[str, np.ndarray]) -> None:
        tensors = {name: torch.tensor(value) for name, value in weights.items()}
        self.model = load(config, tensors)

    def encode(self, samples: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.model.encode(torch.from_numpy(samples[None]))[0].numpy()

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.model.decode(torch.from_numpy(tokens[None]))[0].numpy()


@pytest.fixture(scope="module", params=["l3ac-1kbps", "sqcodec-0k75bps"])
def golden(request: pytest.FixtureRequest) -> Iterator[tuple[Ours, dict[str, np.ndarray]]]:
    """A model, and what the authors' package made with its weights (make_published.py)."""
    config = BY_NAME[request.param].config
    with np.load(GOLDEN / f"{request.param}.npz", allow_pickle=False) as arrays:
        expected = dict(arrays)
    expected["samples"] = expected["samples"].astype(np.float32) / 2**15
    yield Ours(config, random_weights(config)), expected


def test_tokens_are_those_of_the_authors(golden):
    """SQCodec's with the padding, too, which makes whole windows of the clip."""
    ours, expected = golden
    tokens = ours.encode(whole_windows(expected["samples"], ours.model.config))
    theirs = expected.get("padded_tokens", expected["tokens"])
    assert tokens.dtype == np.int64
    assert tokens.shape == theirs.shape
    assert (tokens == theirs).mean() >= SAME_TOKENS


def test_one_token_per_begun_hop(golden):
    ours, expected = golden
    assert len(expected["tokens"]) == -(-len(expected["samples"]) // ours.model.config.hop_length)
    if "padded_tokens" in expected:
        kept = expected["padded_tokens"][: len(expected["tokens"])]
        np.testing.assert_array_equal(kept, expected["tokens"])


def test_audio_is_that_of_the_authors(golden):
    ours, expected = golden
    for kind in ("", "padded_") if "padded_tokens" in expected else ("",):
        theirs = expected[f"{kind}audio"]
        audio = ours.decode(expected[f"{kind}tokens"])[: len(theirs)]
        np.testing.assert_allclose(audio, theirs, rtol=0, atol=SAME)


def test_golden_data_can_tell_a_fault(golden):
    """Levels are used, audio is neither clipped nor quiet, and depends on the tokens."""
    ours, expected = golden
    digits = expected["tokens"][:, None] // 7 ** np.arange(6) % 7
    for used in digits.T:
        counts = np.bincount(used, minlength=7)
        assert (counts > 0).sum() >= 4
        assert max(counts[0], counts[-1]) < len(used) / 2
    assert 0.05 < np.sqrt(np.mean(expected["audio"] ** 2)) < 0.5
    assert np.abs(expected["audio"]).max() < 0.99
    changed = expected["tokens"].copy()
    changed[50] = changed[51]
    assert np.abs(ours.decode(changed) - expected["audio"]).max() > 100 * SAME


@pytest.mark.parametrize(
    "part", ["grn.gamma", "grn.beta", "alpha", "original0", "original1", "bias"]
)
def test_every_kind_of_weight_shows(golden, part):
    """1 % more in the weights of one kind is seen beyond what counts as the same."""
    ours, expected = golden
    weights = random_weights(ours.model.config)
    for name in weights:
        if name.endswith(part) and name.startswith("decoder."):
            values = weights[name]  # directions count, not their lengths: all but the first
            (values.reshape(len(values), -1)[:, 1:] if part == "original1" else values)[...] *= 1.01
    audio = Ours(ours.model.config, weights).decode(expected["tokens"])
    assert np.abs(audio - expected["audio"]).max() > 3 * SAME


@pytest.mark.slow
@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.config.name)
def test_all_models_beside_the_authors_packages(published: Published, speech, tmp_path):
    """Tokens differ only where the package's own latents lie on an edge between two levels.

    Audio is the package's; where its own interpolation errs by more than that, it is what the
    package gives with right places (`decode_exactly`).
    """
    if reason := official_missing():
        pytest.skip(reason)
    weights = random_weights(published.config)
    ours = Ours(published.config, weights)
    theirs = Official(published, save_modules(weights, tmp_path))
    for seconds in (0.3, 1.0, 5.0, 12.0):
        n = round(seconds * published.config.sample_rate)
        samples = np.tile(speech[0], 1 + n // speech.shape[1])[:n]
        expected = theirs.encode(samples)
        tokens = ours.encode(whole_windows(samples, published.config))
        assert tokens.shape == expected.shape
        differ = tokens != expected
        assert differ.mean() <= 1 - SAME_TOKENS
        positions = theirs.positions(samples)[differ]
        to_edge = 0.5 - np.abs(positions - np.round(positions))
        assert (to_edge.min(axis=1) < 1e-3).all()

        audio, exact = ours.decode(expected), theirs.decode_exactly(expected)
        np.testing.assert_allclose(audio, exact, rtol=0, atol=SAME / 5)
        package = theirs.decode(expected)
        assert np.abs(audio - package).max() < max(SAME, 1.1 * np.abs(package - exact).max())
