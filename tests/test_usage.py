from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from groups import in_two_processes
from scipy import stats

from vpcodec.quantizers import all_reduce_usage
from vpcodec.usage import CodebookUsage


def counted(tokens: np.ndarray | torch.Tensor, codebook_size: int) -> CodebookUsage:
    usage = CodebookUsage(codebook_size)
    usage.update(tokens)
    return usage


def skewed(n: int, codebook_size: int, seed: int = 0) -> np.ndarray:
    """Tokens of which some are frequent, some are rare and some never occur."""
    rng = np.random.default_rng(seed)
    share = rng.gamma(0.3, size=codebook_size) + 1e-9
    share[::5] *= rng.random(len(share[::5])) < 0.5
    return rng.choice(codebook_size, n, p=share / share.sum())


def joined_by(rank: int) -> torch.Tensor:
    usage = counted(skewed(1000 * (rank + 1), 50, seed=rank), 50)
    all_reduce_usage(usage)
    return torch.from_numpy(usage.counts)


@pytest.mark.parametrize("codebook_size, n", [(2, 99), (240, 3000), (1000, 300), (117_649, 9999)])
def test_figures_agree_with_scipy(codebook_size, n):
    tokens = skewed(n, codebook_size)
    usage = counted(tokens, codebook_size)
    counts = np.bincount(tokens, minlength=codebook_size)
    bits = stats.entropy(counts, base=2)
    np.testing.assert_array_equal(usage.counts, counts)
    assert usage.tokens == n
    assert usage.entropy == pytest.approx(bits, rel=1e-12)
    assert usage.perplexity == pytest.approx(np.exp(stats.entropy(counts)), rel=1e-12)
    assert usage.cvu == pytest.approx(np.exp(stats.entropy(counts)) / codebook_size, rel=1e-12)
    assert usage.used == len(set(tokens.tolist())) / codebook_size
    assert usage.bitrate(166.67) == pytest.approx(bits * 166.67, rel=1e-12)
    assert usage.summary() == {
        "tokens": n,
        "entropy": usage.entropy,
        "perplexity": usage.perplexity,
        "cvu": usage.cvu,
        "used": usage.used,
    }
    assert {type(value) for value in usage.summary().values()} == {int, float}


@pytest.mark.parametrize("codebook_size", [1, 7, 1000])
def test_one_code_alone_carries_nothing(codebook_size):
    usage = counted(np.full(500, codebook_size - 1), codebook_size)
    assert usage.entropy == usage.bitrate(75) == 0
    assert not math.copysign(1, usage.entropy) < 0
    assert usage.perplexity == 1
    assert usage.cvu == usage.used == 1 / codebook_size


@pytest.mark.parametrize("codebook_size", [2, 7, 1000])
def test_even_use_is_full_use(codebook_size):
    usage = counted(np.tile(np.arange(codebook_size), 3), codebook_size)
    assert usage.entropy == pytest.approx(math.log2(codebook_size), rel=1e-12)
    assert usage.perplexity == pytest.approx(codebook_size, rel=1e-12)
    assert usage.cvu == pytest.approx(1, rel=1e-12)
    assert usage.used == 1


def test_no_tokens_have_no_entropy():
    usage = counted(np.zeros((0, 3), np.int64), 10)
    assert usage.tokens == usage.used == 0
    for figure in (usage.entropy, usage.perplexity, usage.cvu, usage.bitrate(75)):
        assert math.isnan(figure)


def test_a_stream_counts_as_all_at_once():
    tokens = skewed(5000, 300)
    streamed = CodebookUsage(300)
    for part in np.array_split(tokens, 17):
        streamed.update(part)
    whole = counted(tokens, 300)
    np.testing.assert_array_equal(streamed.counts, whole.counts)
    assert streamed.summary() == whole.summary()


@pytest.mark.parametrize("name", "uint8 int8 int16 uint16 int32 uint32 int64 uint64".split())
@pytest.mark.parametrize("shape", [(), (60,), (3, 20), (2, 5, 6)])
def test_any_integers_of_any_shape(name, shape):
    tokens = skewed(math.prod(shape), 120).astype(name).reshape(shape)
    expected = np.bincount(tokens.ravel().astype(np.int64), minlength=120)
    for given in (tokens, torch.from_numpy(np.array(tokens))):
        usage = counted(given, 120)
        assert usage.counts.dtype == np.int64
        np.testing.assert_array_equal(usage.counts, expected)


def test_tokens_above_32767_in_uint16():
    counts = counted(np.array([40_000, 65_535], np.uint16), 65_536).counts
    assert np.flatnonzero(counts).tolist() == [40_000, 65_535]


def test_non_contiguous_tokens():
    tokens = torch.from_numpy(skewed(600, 50)).reshape(20, 30)
    np.testing.assert_array_equal(
        counted(tokens.T[::2], 50).counts, counted(tokens[:, ::2], 50).counts
    )


def test_merging_adds_the_counts():
    first, second = counted(skewed(500, 40, 1), 40), counted(skewed(700, 40, 2), 40)
    expected = first.counts + second.counts
    own = second.counts.copy()
    first.merge(second)
    np.testing.assert_array_equal(first.counts, expected)
    np.testing.assert_array_equal(second.counts, own)


def test_other_codebook_sizes_do_not_merge():
    with pytest.raises(ValueError, match="40.*41"):
        CodebookUsage(40).merge(CodebookUsage(41))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("bad", [-1, 10, 2**40, -(2**63)])
def test_tokens_out_of_range_are_refused_and_nothing_is_counted(bad, kind):
    usage = CodebookUsage(10)
    tokens = np.array([[1, 2], [bad, 3]])
    with pytest.raises(ValueError, match=f"token {bad} "):
        usage.update(tokens if kind == "numpy" else torch.from_numpy(tokens))
    assert usage.tokens == 0


def test_uint64_tokens_do_not_wrap_around():
    usage = CodebookUsage(10)
    with pytest.raises(ValueError, match=str(2**64 - 1)):
        usage.update(np.array([1, 2**64 - 1], np.uint64))
    assert usage.tokens == 0


@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16", "bool", "complex64"])
def test_tokens_that_are_no_integers_are_refused(name):
    usage = CodebookUsage(10)
    with pytest.raises(ValueError, match=name):
        usage.update(torch.ones(3).to(getattr(torch, name)))
    if name != "bfloat16":
        with pytest.raises(ValueError, match=name):
            usage.update(np.ones(3, name))
    assert usage.tokens == 0


@pytest.mark.parametrize("size", [0, -5, 2.5, 2**28 + 1])
def test_impossible_codebook_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f"{size}"):
        CodebookUsage(size)


def test_without_a_group_nothing_is_joined():
    usage = counted(skewed(500, 40), 40)
    before = usage.counts.copy()
    all_reduce_usage(usage)
    np.testing.assert_array_equal(usage.counts, before)


@pytest.mark.slow
def test_two_processes_join_their_counts(tmp_path):
    joined = in_two_processes(joined_by, tmp_path)
    tokens = np.concatenate([skewed(1000, 50, seed=0), skewed(2000, 50, seed=1)])
    for counts in joined:
        assert counts.dtype == torch.int64
        np.testing.assert_array_equal(counts, np.bincount(tokens, minlength=50))
