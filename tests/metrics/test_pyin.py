from __future__ import annotations

import metric_references as references
import numpy as np
import pytest
import soundfile as sf

from vpcodec.metrics.prosody import pitch

RATE = 16_000


def expected(signal: np.ndarray) -> np.ndarray:
    """The track of librosa, NaN where unvoiced."""
    import librosa

    return librosa.pyin(
        signal, fmin=65, fmax=500, sr=RATE, frame_length=1024, hop_length=160, resolution=0.2
    )[0]


def made_signals() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    seconds = np.arange(2 * RATE) / RATE
    noise = 0.1 * random.standard_normal(len(seconds))
    saw = (seconds * 110) % 1 - 0.5
    glide = np.sin(2 * np.pi * np.cumsum(np.geomspace(50, 700, len(seconds))) / RATE)
    return {
        "speech": references.made_speech(),
        "noise": noise,
        "tone": np.sin(2 * np.pi * 220 * seconds),  # of which frames are voiced for certain
        "jumps": np.sin(2 * np.pi * np.where(seconds % 0.2 < 0.1, 100, 400) * seconds),
        "glide": glide,
        "saw": saw,
        "saw in noise": (saw + 3 * noise).astype(np.float32),
        "pauses": saw * (seconds % 0.5 < 0.25),
        "clicks": (np.arange(len(seconds)) % 97 == 0).astype(float),
        "offset": 0.5 + 1e-4 * noise,
        "quiet": 1e-6 * saw,
        "one frame": saw[:1024],
    }


@pytest.mark.parametrize("name", made_signals())
def test_each_frame_is_that_of_librosa(name):
    pytest.importorskip("librosa", reason="needs the dev extra")
    signal = made_signals()[name]
    np.testing.assert_array_equal(pitch(signal, RATE), expected(signal))


@pytest.mark.slow
def test_each_frame_of_real_speech_is_that_of_librosa(shared_data):
    pytest.importorskip("librosa", reason="needs the dev extra")
    paths = sorted((shared_data / "speech_dev").glob("*.flac"))
    assert paths
    for path in paths:
        signal, rate = sf.read(path, dtype="float32")
        assert rate == RATE
        np.testing.assert_array_equal(pitch(signal, RATE), expected(signal), err_msg=path.name)


def test_the_pitch_of_a_tone_is_the_nearest_of_five_per_semitone():
    for frequency in (70.0, 123.4, 440.0):
        track = pitch(np.sin(2 * np.pi * frequency * np.arange(RATE) / RATE), RATE)
        inner = track[10:-10]
        assert np.abs(1200 * np.log2(inner / frequency)).max() <= 12  # steps of 20 cents
