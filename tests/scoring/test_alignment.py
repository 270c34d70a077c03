"""Delays and levels of decoded audio."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import run
from paths import SHARED

from vpcodec.scoring.alignment import (
    MAX_DELAY,
    DelayFinder,
    find_delay,
    match_level,
    remove_delay,
)

RATE = 16_000
DELAYS = [-1600, -313, -1, 0, 1, 37, 726, 1600]


@pytest.fixture
def clean(speech) -> np.ndarray:
    return speech[0]


def delayed(x: np.ndarray, delay: int) -> np.ndarray:
    return x[-delay:] if delay < 0 else np.concatenate([np.zeros(delay, x.dtype), x])


def noise(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, n).astype(np.float32)


def smoothed(x: np.ndarray) -> np.ndarray:
    """Without what lies above about 1 kHz; no delay."""
    window = np.hanning(33).astype(np.float32)
    return np.convolve(x, window / window.sum(), "same")


def vocoded(x: np.ndarray, seed: int) -> np.ndarray:
    """The magnitudes of short pieces with random phases: the same envelope, another waveform."""
    size, hop = 256, 64
    random = np.random.default_rng(seed)
    window = np.hanning(size + 1)[:-1]
    y = np.zeros(len(x) + size)
    for start in range(0, len(x) - size, hop):
        magnitudes = np.abs(np.fft.rfft(window * x[start : start + size]))
        phases = np.exp(2j * np.pi * random.random(len(magnitudes)))
        y[start : start + size] += window * np.fft.irfft(magnitudes * phases)
    return y[: len(x)].astype(np.float32)


def found_by_finder(reference: np.ndarray, degraded: np.ndarray, rate: int) -> int:
    finder = DelayFinder(rate)
    finder.add(reference, degraded)
    return finder.delay


@pytest.mark.parametrize("find", [find_delay, found_by_finder])
@pytest.mark.parametrize("delay", DELAYS)
def test_a_delay_is_found_in_spite_of_noise_gain_and_loss_of_highs(clean, find, delay):
    late = delayed(clean, delay)
    level = np.sqrt(np.mean(clean**2))
    for degraded in (late, -0.5 + late, late + level * 5 * noise(len(late)), 0.01 * smoothed(late)):
        assert find(clean, degraded, RATE) == delay


@pytest.mark.parametrize("find", [find_delay, found_by_finder])
@pytest.mark.parametrize("n", [20_000, 60_000, 100_000])
def test_the_lengths_may_differ(clean, find, n):
    degraded = delayed(clean, 123)
    degraded = np.concatenate([degraded, noise(max(0, n - len(degraded)))])[:n]
    assert find(clean, degraded, RATE) == 123
    assert find(degraded, clean, RATE) == -123


@pytest.mark.parametrize("lengths", [(1, 1), (5, 9000), (4000, 3000), (3000, 9001), (1601, 1600)])
def test_one_pair_has_the_lag_of_the_largest_cross_correlation(lengths):
    x, y = (noise(n, seed) + 0.01 for seed, n in enumerate(lengths))
    x, y = x - x.mean(), y - y.mean()
    if min(lengths) == 1:
        expected = 0  # nothing but a constant
    else:
        values, lags = np.correlate(y, x, "full"), np.arange(1 - len(x), len(y))
        near = np.abs(lags) <= MAX_DELAY * RATE
        expected = lags[near][values[near].argmax()]
    assert find_delay(x, y, RATE) == expected


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
def test_the_range_follows_the_rate(rate):
    x = noise(3 * rate)
    largest = round(0.1 * rate)
    assert found_by_finder(x, delayed(x, largest), rate) == largest
    assert abs(found_by_finder(x, delayed(x, largest + 9), rate)) <= largest


def test_a_vocoder_is_aligned_by_its_envelope(clean):
    pieces = [clean[start : start + 30_000] for start in range(0, 56_000, 8_000)]
    finder, single = DelayFinder(RATE), []
    for i, piece in enumerate(pieces):
        degraded = 0.02 * delayed(vocoded(piece, i), 223)
        finder.add(piece, degraded)
        single.append(find_delay(piece, degraded, RATE))
    assert finder.delay == pytest.approx(223, abs=16)  # 1 ms
    assert np.ptp(single) > 100  # of which the waveforms know nothing


def test_the_pairs_of_a_finder_may_come_in_any_order_and_in_parts(clean):
    pairs = [
        (clean[start : start + 12_000], delayed(vocoded(clean[start : start + 12_000], start), 150))
        for start in range(0, 70_000, 7_000)
    ]
    finders = [DelayFinder(RATE) for _ in range(4)]
    for pair in pairs:
        finders[0].add(*pair)
    for pair in reversed(pairs):
        finders[1].add(*pair)
    for i, pair in enumerate(pairs):
        finders[2 + i % 2].add(*pair)
    finders[2].merge(finders[3])
    assert finders[0].delay == finders[1].delay == finders[2].delay == pytest.approx(150, abs=32)
    empty = DelayFinder(RATE)
    empty.merge(finders[0])
    assert empty.delay == finders[0].delay
    with pytest.raises(ValueError, match="Hz"):
        finders[0].merge(DelayFinder(8_000))


def test_silence_says_nothing(clean):
    silence = np.zeros_like(clean)
    finder = DelayFinder(RATE)
    assert finder.delay == 0
    for pair in [(silence, clean), (clean, silence), (silence, silence), (clean[:0], clean)]:
        finder.add(*pair)
        assert finder.delay == 0
        assert find_delay(*pair, RATE) == 0
    finder.add(clean, delayed(clean, 40))
    for _ in range(5):  # these would make the waveforms look weak
        finder.add(clean, silence + np.float32(0.25))
    assert finder.delay == 40


def test_the_faintest_sound_counts(clean):
    assert found_by_finder(clean, np.float32(1e-30) * delayed(clean, 40), RATE) == 40
    assert found_by_finder(np.float32(1e-30) * vocoded(clean, 0), clean, RATE) == pytest.approx(
        0, abs=32
    )


def test_a_long_recording_is_judged_where_it_is_loud(clean):
    pause = noise(70 * RATE) * np.float32(1e-4)
    reference = np.concatenate([pause, clean, pause[: 5 * RATE]])
    degraded = delayed(reference, 91)
    degraded[: 40 * RATE] = noise(40 * RATE, 1)  # of the quiet part, all else
    assert find_delay(reference, degraded, RATE) == 91
    assert found_by_finder(reference, degraded, RATE) == 91


@pytest.mark.parametrize(
    "bad",
    [np.zeros((1, 9), np.float32), np.zeros(9, np.int16), np.full(9, np.nan, np.float32)],
)
def test_other_arrays_are_refused(clean, bad):
    for pair in [(clean, bad), (bad, clean)]:
        with pytest.raises(ValueError, match="signals"):
            find_delay(*pair, RATE)
        with pytest.raises(ValueError, match="signals"):
            DelayFinder(RATE).add(*pair)


@pytest.mark.parametrize("delay", [-20, -3, 0, 3, 20])
@pytest.mark.parametrize("n_samples", [0, 1, 10, 15])
@pytest.mark.parametrize("shape", [(12,), (2, 12), (1, 0)])
def test_a_delay_is_removed_and_nothing_else(delay, n_samples, shape):
    degraded = 1 + np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    before = degraded.copy()
    aligned = remove_delay(degraded, delay, n_samples)
    assert aligned.shape == (*shape[:-1], n_samples) and aligned.dtype == degraded.dtype
    for t in range(n_samples):
        inside = 0 <= t + delay < shape[-1]
        assert np.all(aligned[..., t] == (degraded[..., t + delay] if inside else 0))
    aligned[...] = 0
    assert np.array_equal(degraded, before)


def test_what_was_found_and_removed_brings_the_original_back(clean):
    late = delayed(clean, 300)
    assert np.array_equal(remove_delay(late, find_delay(clean, late, RATE), len(clean)), clean)


@pytest.mark.parametrize("gain", [1e-4, -0.5, 1, 300])
def test_the_level_becomes_that_of_the_reference(clean, gain):
    matched = match_level(clean, np.float32(gain) * clean)
    assert matched.dtype == np.float32
    np.testing.assert_allclose(matched, np.sign(gain) * clean, rtol=1e-5, atol=1e-9)
    longer = match_level(clean, noise(3 * len(clean)))
    assert np.mean(longer**2) == pytest.approx(np.mean(clean**2), rel=1e-4)


def test_silence_has_no_level(clean):
    silence = np.zeros(100, np.float32)
    assert np.array_equal(match_level(clean, silence), silence)
    assert not match_level(silence, clean).any()


@pytest.mark.parametrize("codec", ["lyra_3200", "lyra_6000"])
def test_lags_of_a_real_codec_come_out_as_published(shared_data, codec):
    import json

    from vpcodec.media.audio import load

    peers = json.loads((shared_data / "peers_dev.json").read_text())
    rows = [row for row in peers if row["codec"] == codec][:6]
    finder = DelayFinder(RATE)
    for row in rows:
        degraded = shared_data / "lyra_dev" / codec.split("_")[1] / row["file"]
        pair = [load(path)[0][0] for path in (shared_data / "speech_dev" / row["file"], degraded)]
        assert find_delay(*pair, RATE) == row["lag"]
        finder.add(*pair)
    assert abs(finder.delay) <= 1


@pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="needs ../shared/cases")
def test_the_case_of_speech_that_is_150_ms_late_keeps_its_delay_and_says_so():
    case = SHARED / "cases"
    found = run(
        *("score", case / "23_score_ref.wav", case / "23_score_150ms_late.wav"),
        *("--metrics", "stoi"),
    )
    assert b"no delay was removed" in found.out
