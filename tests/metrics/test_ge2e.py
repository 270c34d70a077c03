"""Speaker similarity: features as in the package, its network, and what it needs."""

from __future__ import annotations

import importlib.machinery
import math
import pickle

import numpy as np
import pytest

from vpcodec.metrics import base, ge2e
from vpcodec.metrics.base import Clip
from vpcodec.metrics.ge2e import RATE, embed, mel_power, speaker_similarity_ge2e

torch = pytest.importorskip("torch", reason="needs the train extra")


def random_weights() -> dict:
    lstm, linear = torch.nn.LSTM(40, 256, 3), torch.nn.Linear(256, 256)
    parts = {"lstm": lstm.state_dict(), "linear": linear.state_dict()}
    return {f"{name}.{key}": x for name, part in parts.items() for key, x in part.items()}


def install(folder, monkeypatch, weights) -> None:
    """A package of this name, which holds the weights alone."""
    folder.mkdir()
    torch.save({"model_state": weights | {"similarity_weight": torch.ones(1)}, "step": 1},
               folder / "pretrained.pt")  # fmt: skip
    spec = importlib.machinery.ModuleSpec("resemblyzer", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(base, "find_spec", lambda name: spec)
    ge2e._network.cache_clear()


@pytest.fixture
def network(tmp_path, monkeypatch):
    install(tmp_path / "resemblyzer", monkeypatch, random_weights())
    yield ge2e._network()
    ge2e._network.cache_clear()


def test_mel_spectra_are_those_of_librosa(speech):
    librosa = pytest.importorskip("librosa", reason="needs the dev extra")
    expected = librosa.feature.melspectrogram(
        y=speech[0], sr=RATE, n_fft=400, hop_length=160, n_mels=40
    ).T
    found = mel_power(speech[0])
    assert found.shape == expected.shape and found.dtype == np.float32
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-6 * expected.max())


@pytest.mark.parametrize("seconds", [0.5, 1.6, 2.0, 3.21, 5.4])
def test_parts_are_those_of_the_package(speech, network, seconds):
    """1.6 s every 0.77 s; the last one is taken if three quarters of it are there."""
    samples = speech[0, : round(seconds * RATE)]
    taken = []

    def watching(mel):
        taken.append(mel)
        return network(mel)

    embedding = embed(samples, watching)
    (mel,) = taken
    n_frames = math.ceil((len(samples) + 1) / 160)
    starts = range(0, max(1, n_frames - 160 + 78), 77)
    covered = (len(samples) - starts[-1] * 160) / 25_600
    expected = len(starts) - (covered < 0.75 and len(starts) > 1)
    assert mel.shape == (expected, 160, 40)
    assert embedding.shape == (256,) and np.linalg.norm(embedding) == pytest.approx(1, abs=1e-6)


def test_a_clip_is_like_itself_and_quiet_ones_are_raised(speech, network):
    clip, quiet = (Clip(level * speech[0], RATE) for level in (0.01, 0.001))
    (same,) = speaker_similarity_ge2e(clip, clip)
    (raised,) = speaker_similarity_ge2e(clip, quiet)
    (between,) = speaker_similarity_ge2e(clip, Clip(speech[0, ::-1].copy(), RATE))
    assert same == pytest.approx(1, abs=1e-6) and raised == pytest.approx(1, abs=1e-5)
    assert 0 <= between < 1 - 1e-6


def test_silence_and_short_clips_have_no_value(speech, network):
    clip = Clip(speech[0], RATE)
    assert math.isnan(speaker_similarity_ge2e(clip, Clip(np.zeros(RATE, np.float32), RATE))[0])
    assert math.isnan(speaker_similarity_ge2e(Clip(speech[0, :4000], RATE), clip)[0])


def test_threads_of_the_caller_are_left_alone(speech, network):
    before = torch.get_num_threads()
    clip = Clip(speech[0], RATE)
    speaker_similarity_ge2e(clip, clip)
    assert torch.get_num_threads() == before


def test_without_the_package_the_message_says_what_to_install(monkeypatch, speech):
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    ge2e._network.cache_clear()
    clip = Clip(speech[0], RATE)
    with pytest.raises(ImportError, match="pip install --no-deps resemblyzer"):
        speaker_similarity_ge2e(clip, clip)


class Command:
    def __reduce__(self):
        return print, ("run",)


def test_no_object_of_the_package_is_unpickled(tmp_path, monkeypatch, speech, capsys):
    install(tmp_path / "resemblyzer", monkeypatch, {"lstm.weight": Command()})
    clip = Clip(speech[0], RATE)
    with pytest.raises(pickle.UnpicklingError):
        speaker_similarity_ge2e(clip, clip)
    assert "run" not in capsys.readouterr().out
    ge2e._network.cache_clear()
