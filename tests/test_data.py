from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

pytest.importorskip("torch", reason="needs the train extra")

from vpcodec.audio import resample  # noqa: E402
from vpcodec.recipe import DataConfig  # noqa: E402
from vpcodec.training import data  # noqa: E402
from vpcodec.training.data import Crops, DataError  # noqa: E402

RATE = 16_000


def write(path: Path, samples: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> None:
    soundfile.write(path, samples, rate, subtype=subtype)


def crops(folder: Path | None, *, seed: int = 0, **config) -> Crops:
    config = {"crop_seconds": 0.1, "gain_db": (0.0, 0.0), "batch_size": 4} | config
    train = None if folder is None else str(folder)
    return Crops(DataConfig(train=train, **config), sample_rate=RATE, multiple=96, seed=seed)


def noise(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    return 0.2 * np.random.default_rng(seed).standard_normal(int(seconds * rate)).clip(-4, 4)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    folder = tmp_path / "recordings"
    (folder / "more").mkdir(parents=True)
    write(folder / "a.wav", noise(1.0))
    write(folder / "more" / "b.flac", noise(2.0, seed=1))
    return folder


@pytest.mark.parametrize("generated", [False, True])
def test_a_batch_depends_on_seed_and_step_alone(recordings, generated):
    folder = None if generated else recordings
    first = crops(folder)
    batches = [first.batch(step) for step in range(4)]
    np.testing.assert_array_equal(crops(folder).batch(3), batches[3])
    np.testing.assert_array_equal(first.batch(0), batches[0])
    np.testing.assert_array_equal(crops(folder, cache_mb=0).batch(2), batches[2])
    np.testing.assert_array_equal(list(crops(folder).batches(1, 4)), batches[1:])
    assert not np.array_equal(batches[0], batches[1])
    assert not np.array_equal(crops(folder, seed=1).batch(0), batches[0])
    assert len(np.unique(batches[0], axis=0)) == 4


def test_batches_are_whole_hops_of_float32_in_range(recordings):
    batch = crops(recordings, gain_db=(20.0, 30.0)).batch(0)
    assert batch.dtype == np.float32 and batch.shape == (4, 17 * 96)
    assert np.abs(batch).max() <= 1


def test_the_gain_is_uniform_in_decibels(tmp_path):
    write(tmp_path / "a.wav", np.full(RATE, 0.25))
    level = np.abs(crops(tmp_path, gain_db=(-12.0, 6.0), batch_size=400).batch(0)).max(1)
    decibels = 20 * np.log10(level / 0.25)
    assert -12.1 <= decibels.min() < -11 and 5 < decibels.max() <= 6.1
    assert decibels.mean() == pytest.approx(-3, abs=1)


def test_files_are_drawn_in_proportion_to_their_length(tmp_path):
    write(tmp_path / "quiet.wav", np.full(RATE, 0.25))
    write(tmp_path / "loud.wav", np.full(3 * RATE, 0.5))
    drawn = crops(tmp_path, batch_size=400)
    loud = np.abs(drawn.batch(0)).max(1) > 0.4
    assert loud.mean() == pytest.approx(0.75, abs=0.07)
    assert drawn.hours == pytest.approx(4 / 3600)


def test_a_file_shorter_than_a_crop_is_padded(tmp_path):
    write(tmp_path / "a.wav", np.full(RATE // 5, 0.25))
    batch = crops(tmp_path, crop_seconds=0.3).batch(0)
    assert np.abs(batch[:, : RATE // 5]).min() == pytest.approx(0.25, abs=1e-3)
    assert not batch[:, RATE // 5 :].any()


def test_files_that_cannot_be_read_are_left_out_and_listed(recordings):
    (recordings / "garbage.wav").write_bytes(b"no audio at all")
    (recordings / "empty.flac").write_bytes(b"")
    write(recordings / "nothing.wav", np.zeros(0))
    (recordings / "notes.txt").write_text("not audio by its name")
    drawn = crops(recordings)
    assert np.abs(drawn.batch(0)).max() > 0
    names = sorted(Path(path).name for path in drawn.skipped)
    assert names == ["empty.flac", "garbage.wav", "nothing.wav"]


def test_a_file_that_turns_out_bad_is_left_out_too(tmp_path):
    write(tmp_path / "good.wav", noise(1.0))
    write(tmp_path / "bad.wav", np.full(RATE, np.nan), subtype="FLOAT")
    (tmp_path / "garbage.wav").write_bytes(b"no audio at all")
    drawn = crops(tmp_path)
    for step in range(4):
        assert np.isfinite(drawn.batch(step)).all()
    assert sorted(Path(path).name for path in drawn.skipped) == ["bad.wav", "garbage.wav"]


def test_a_folder_of_bad_files_alone_ends_in_an_error(tmp_path):
    write(tmp_path / "bad.wav", np.full(RATE, np.nan), subtype="FLOAT")
    with pytest.raises(DataError, match="no audio file that can be read"):
        crops(tmp_path).batch(0)


@pytest.mark.parametrize("name", ["absent", "empty", "file.wav"])
def test_a_folder_without_audio_is_refused_and_named(tmp_path, name):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "file.wav", noise(0.5))
    with pytest.raises(DataError, match=name):
        crops(tmp_path / name)


def test_stereo_at_another_rate_becomes_mono_at_the_model_s(tmp_path):
    left, right = noise(1.0, 44_100), noise(1.0, 44_100, seed=1)
    write(tmp_path / "a.wav", np.stack([left, right], 1), 44_100)
    batch = crops(tmp_path, crop_seconds=0.996, batch_size=1).batch(0)[0]
    expected = resample(((left + right) / 2).astype(np.float32), 44_100, RATE)
    expected = np.squeeze(expected)
    starts = range(len(expected) - len(batch) + 1)
    errors = [
        np.abs(sign * batch - expected[start : start + len(batch)]).max()
        for start in starts
        for sign in (1, -1)
    ]
    assert min(errors) < 1e-3 < np.median(errors)


def test_a_long_file_is_read_where_the_crop_lies(tmp_path, monkeypatch):
    write(tmp_path / "a.wav", noise(5.0))
    expected = crops(tmp_path, batch_size=8).batch(0)
    reads = []

    class Spy(soundfile.SoundFile):
        def read(self, frames=-1, *arguments, **options):
            reads.append(frames)
            return super().read(frames, *arguments, **options)

    monkeypatch.setattr(soundfile, "SoundFile", Spy)
    monkeypatch.setattr(data, "LONG_SECONDS", 1.0)
    np.testing.assert_allclose(crops(tmp_path, batch_size=8).batch(0), expected, atol=1e-4)
    assert len(reads) == 8 and 0 < min(reads) and max(reads) <= 17 * 96 + 1


def test_a_crop_of_a_long_file_at_another_rate_is_full(tmp_path, monkeypatch):
    write(tmp_path / "a.wav", noise(3.0, 44_100), 44_100)
    monkeypatch.setattr(data, "LONG_SECONDS", 1.0)
    batch = crops(tmp_path, batch_size=16).batch(0)
    assert np.abs(batch[:, -8:]).max(1).min() > 0
