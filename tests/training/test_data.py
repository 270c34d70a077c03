from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

pytest.importorskip("torch", reason="needs the train extra")

from vpcodec.media.audio import resample
from vpcodec.recipe.audio import DataConfig
from vpcodec.training import crops as general
from vpcodec.training.audio import corpora, data
from vpcodec.training.audio.data import AudioCrops
from vpcodec.training.corpora import DataError

RATE = 16_000


def write(path: Path, samples: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype=subtype)


def crops(
    train: Any, *, seed: int = 0, process: int = 0, processes: int = 1, **config
) -> AudioCrops:
    """Crops of 0.1 s, four in a batch, with no gain: only the sign is random."""
    workers = config.get("workers") or 0
    config = {"crop_seconds": 0.1, "gain_db": (0.0, 0.0), "batch_size": 4} | config
    train = str(train) if isinstance(train, Path) else train
    return AudioCrops(
        DataConfig(train=train, **config),
        sample_rate=RATE,
        hop_length=96,
        seed=seed,
        process=process,
        processes=processes,
        workers=workers,
    )


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
    np.testing.assert_array_equal(crops(folder, cache_mb=0).batch(2), batches[2])  # 16 bits
    np.testing.assert_array_equal(list(crops(folder).batches(1, 4)), batches[1:])
    assert not np.array_equal(batches[0], batches[1])
    assert not np.array_equal(crops(folder, seed=1).batch(0), batches[0])
    assert len(np.unique(batches[0], axis=0)) == 4


def test_batches_are_whole_hops_of_float32_in_range(recordings):
    batch = crops(recordings, gain_db=(20.0, 30.0)).batch(0)
    assert batch.dtype == np.float32 and batch.shape == (4, 17 * 96)
    assert np.abs(batch).max() <= 1
    assert crops(recordings).tokens == 17


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
    assert drawn.summary == "0.0 h" and crops(()).summary == ""


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
    assert len(reads) == 8 and 0 < min(reads) and max(reads) <= 17 * 96


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.ogg"])
def test_parts_are_what_a_cut_from_the_whole_file_resampled_would_be(tmp_path, name, capfd):
    write(tmp_path / name, noise(2.0, 44_100), 44_100, subtype=None)
    samples, _ = soundfile.read(tmp_path / name, dtype="float32")
    whole = resample(samples, 44_100, RATE)
    for offset, first, count in [(0.0, 0, 500), (0.25, 1001, 800), (1.5, 7000, 2000)]:
        start = round(offset * RATE) + first
        part = corpora.read_part(tmp_path / name, offset, first, count, RATE)
        np.testing.assert_allclose(part, whole[start : start + count], atol=1e-5)
    assert len(part) == 1000  # up to the end of the file
    assert capfd.readouterr().err == ""


def test_whole_files_and_parts_give_the_same_crops(tmp_path):
    write(tmp_path / "a.flac", noise(3.0, 44_100), 44_100)
    whole, parts = crops(tmp_path).batch(0), crops(tmp_path, cache_mb=0).batch(0)
    np.testing.assert_allclose(whole, parts, atol=4e-5)


def test_what_cannot_be_cached_is_not_read_whole(tmp_path, monkeypatch):
    for name in "abcdefghijkl":
        write(tmp_path / f"{name}.wav", noise(10.0))  # 0.3 MiB each
    frames = []

    class Spy(soundfile.SoundFile):
        def read(self, count=-1, *arguments, **options):
            frames.append(count)
            return super().read(count, *arguments, **options)

    monkeypatch.setattr(soundfile, "SoundFile", Spy)
    drawn = crops(tmp_path, cache_mb=1)
    for number in range(40):
        drawn.batch(number)
    assert sorted(count for count in frames if count > 17 * 96) == [10 * RATE] * 3
    assert 0 < sum(samples.nbytes for samples, _ in drawn._cache.values()) <= 2**20


def test_a_long_file_that_is_broken_in_one_place_is_used_elsewhere(tmp_path, monkeypatch):
    samples = np.full(10 * RATE, 0.25)
    samples[4 * RATE : 5 * RATE] = np.nan
    write(tmp_path / "a.wav", samples, subtype="FLOAT")
    monkeypatch.setattr(data, "LONG_SECONDS", 1.0)
    drawn = crops(tmp_path, batch_size=100)
    batch = drawn.batch(0)
    np.testing.assert_allclose(np.abs(batch), 0.25)
    assert drawn.skipped == [str(tmp_path / "a.wav")]
    np.testing.assert_array_equal(drawn.batch(0), batch)


# Shares of corpora


def levels(batch: np.ndarray) -> np.ndarray:
    return np.abs(batch).max(1).astype(float).round(2)


@pytest.fixture
def two_corpora(tmp_path: Path) -> list[dict]:
    write(tmp_path / "few" / "a.wav", np.full(RATE, 0.25))
    write(tmp_path / "many" / "a.wav", np.full(9 * RATE, 0.5))
    return [
        {"path": str(tmp_path / "few"), "weight": 3.0},
        {"path": str(tmp_path / "many"), "weight": 1.0},
    ]


def test_corpora_are_mixed_by_weight_and_evenly(two_corpora):
    drawn = crops(two_corpora, batch_size=16)
    few = np.concatenate([levels(drawn.batch(number)) == 0.25 for number in range(50)])
    assert few.mean() == pytest.approx(0.75, abs=0.01)
    per_sixteen = np.convolve(few, np.ones(16), "valid")
    assert per_sixteen.min() >= 10 and per_sixteen.max() <= 14  # chance would give 6 to 16
    assert drawn.hours == pytest.approx(10 / 3600)
    other = levels(crops(two_corpora, batch_size=16, seed=1).batch(0)) == 0.25
    assert (other != few[:16]).any()


def test_several_processes_draw_what_one_with_larger_batches_does(two_corpora, recordings):
    train = [*two_corpora, str(recordings)]
    whole = crops(train, batch_size=6)
    parts = [crops(train, batch_size=2, process=p, processes=3) for p in range(3)]
    for number in (0, 1, 1000):
        split = np.concatenate([part.batch(number) for part in parts])
        np.testing.assert_array_equal(split, whole.batch(number))


# Manifests and globs


@pytest.fixture
def manifest(tmp_path: Path) -> Any:
    """Writes a manifest beside three files, each of one level."""
    for number, level in enumerate((0.1, 0.2, 0.3)):
        write(tmp_path / "audio" / f"{number}.wav", np.full(RATE, level))

    def make(name: str, text: str | bytes) -> Path:
        text = text if isinstance(text, bytes) else text.encode()
        (tmp_path / name).write_bytes(text)
        return tmp_path / name

    return make


@pytest.mark.parametrize(
    "name, text",
    [
        ("list.txt", "audio/0.wav\n\naudio/2.wav"),
        ("list.txt", "\ufeffaudio/0.wav\r\naudio/2.wav\r\n"),
        ("list.csv", 'note,path\n"one, two",audio/0.wav\n,"audio/2.wav"\n'),
        ("list.tsv", 'path\tsentence\tseconds\naudio/0.wav\t"odd\t1\naudio/2.wav\t\t\n'),
        ("list.jsonl", '{"path": "audio/0.wav"}\n{"audio_filepath": "audio/2.wav"}\n'),
    ],
)
def test_a_manifest_names_files_relative_to_itself(manifest, name, text):
    drawn = crops(manifest(name, text), batch_size=20)
    assert set(levels(drawn.batch(0))) == {0.1, 0.3}
    assert drawn.hours == pytest.approx(2 / 3600) and drawn.skipped == []


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
@pytest.mark.parametrize("cache_mb", [0, 10])
def test_rows_with_offset_and_seconds_are_segments(tmp_path, manifest, suffix, cache_mb):
    samples = np.repeat([0.1, 0.2, 0.3, 0.4, 0.5], RATE)  # a second each
    write(tmp_path / "talk.wav", samples)
    rows = [(1.0, 1.0), (2.0, 0.5), (4.0, None)]
    if suffix == "jsonl":
        lines = [{"path": "talk.wav", "offset": o, "duration": s} for o, s in rows]
        text = "\n".join(json.dumps(line) for line in lines)
    else:
        lines = [("path", "offset", "seconds")] + [("talk.wav", o, s or "") for o, s in rows]
        comma = "," if suffix == "csv" else "\t"
        text = "\n".join(comma.join(map(str, line)) for line in lines)
    drawn = crops(manifest(f"list.{suffix}", text), batch_size=400, cache_mb=cache_mb)
    batch = drawn.batch(0)
    assert drawn.hours == pytest.approx(2.5 / 3600)
    assert np.ptp(np.abs(batch), axis=1).max() < 1e-4  # none reaches into another segment
    found, counts = np.unique(levels(batch), return_counts=True)
    assert found.tolist() == [0.2, 0.3, 0.5]
    np.testing.assert_allclose(counts / 400, [0.4, 0.2, 0.4], atol=0.08)


def test_rows_of_known_length_are_not_opened_before_they_are_drawn(manifest):
    path = manifest("list.csv", "path,seconds\nabsent.wav,3600\naudio/1.wav,1\n")
    drawn = crops(path)
    assert drawn.hours == pytest.approx(3601 / 3600) and drawn.skipped == []
    assert set(levels(drawn.batch(0))) == {0.2}
    assert drawn.skipped == [str(path.parent / "absent.wav")]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("list.csv", "file,seconds\na.wav,1\n", "list.csv:1: no column `path`"),
        ("list.csv", "", "list.csv:1: no column `path`"),
        (
            "list.csv",
            "path,seconds\na.wav,1\nb.wav,long\n",
            "list.csv:3: seconds is not a non-negative number",
        ),
        ("list.csv", 'path\na.wav\n"b.wav\n', "list.csv:3: unexpected end of data"),
        ("list.tsv", "seconds\tpath\n1\n", "list.tsv:2: no `path`"),
        (
            "list.tsv",
            "path\toffset\na.wav\t-1\n",
            "list.tsv:2: offset is not a non-negative number",
        ),
        ("list.jsonl", '{"path": "a.wav"}\n{"path": \n', "list.jsonl:2: not a JSON object"),
        ("list.jsonl", '["a.wav"]', "list.jsonl:1: not a JSON object"),
        ("list.jsonl", '{"file": "a.wav"}', "list.jsonl:1: no `path`"),
        ("list.jsonl", '{"path": "a.wav", "seconds": NaN}', "list.jsonl:1: seconds is not"),
        ("list.txt", b"a.wav\n\xff\xfe.wav\n", "list.txt:2: not UTF-8"),
        ("list.txt", "\n", "list.txt: no audio file is listed"),
        ("list.txt", "absent.wav\n", "list.txt: no audio file that can be read"),
    ],
)
def test_a_bad_manifest_is_refused_with_file_and_line(manifest, name, text, message):
    with pytest.raises(DataError) as error:
        crops(manifest(name, text))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_glob_chooses_files(recordings):
    assert crops(f"{recordings}/**/*.flac").hours == pytest.approx(2 / 3600)
    (recordings / "notes.txt").write_text("not audio by its name")
    everything = crops(f"{recordings}/**")
    assert everything.hours == pytest.approx(3 / 3600) and everything.skipped == []
    with pytest.raises(DataError, match="no audio file matches"):
        crops(f"{recordings}/*.mp3")


# LibriTTS


@pytest.mark.parametrize("inside", [False, True])
def test_libritts_is_found_in_its_own_layout(tmp_path, inside):
    folder = tmp_path / "LibriTTS"
    for subset, level in (("dev-clean", 0.1), ("test-clean", 0.2), ("dev-other", 0.3)):
        name = folder / subset / "84" / "121123" / "84_121123_000007_000001.wav"
        write(name, np.full(RATE, level), 24_000)
        name.with_suffix(".normalized.txt").write_text("Go.")
    path = str(folder if inside else tmp_path)
    corpus = {"type": "libritts", "path": path, "subsets": ("dev-clean", "dev-other")}
    drawn = crops([corpus], batch_size=20)
    assert drawn.hours == pytest.approx(2 * RATE / 24_000 / 3600)
    assert set(levels(drawn.batch(0)[:, 700:900])) == {0.1, 0.3}


def test_subsets_of_libritts_are_fetched_if_that_is_wanted(tmp_path, monkeypatch):
    torchaudio = pytest.importorskip("torchaudio")
    fetched = []

    def fetch(root, url, folder_in_archive, download):
        fetched.append(url)
        assert download and root.is_dir()
        if url == "dev-other":
            raise RuntimeError("no such host")
        write(root / folder_in_archive / url / "1" / "2" / "1_2_3_4.wav", noise(1.0))

    monkeypatch.setattr(torchaudio.datasets, "LIBRITTS", fetch)
    corpus = {"type": "libritts", "path": str(tmp_path / "data"), "subsets": ("dev-clean",)}
    with pytest.raises(DataError, match="dev-clean: no such folder; set `download: true`"):
        crops([corpus])
    assert fetched == []
    corpus["download"] = True
    for _ in range(2):
        assert crops([corpus]).hours == pytest.approx(1 / 3600)
    assert fetched == ["dev-clean"]
    corpus["subsets"] = ("dev-clean", "dev-other")
    with pytest.raises(DataError, match="dev-other: cannot be fetched .no such host"):
        crops([corpus])


# Augmentation


def test_half_of_the_crops_are_turned_over_unless_that_is_off(tmp_path):
    write(tmp_path / "a.wav", np.full(RATE, 0.25))
    negative = crops(tmp_path, batch_size=400).batch(0)[:, 0] < 0
    assert negative.mean() == pytest.approx(0.5, abs=0.08)
    assert (crops(tmp_path, batch_size=400, flip_polarity=False).batch(0) > 0).all()


def test_noise_is_added_at_the_ratio_that_is_asked_for(tmp_path):
    write(tmp_path / "speech" / "a.wav", np.full(RATE, 0.2))
    write(tmp_path / "noise" / "a.wav", 0.3 * np.sin(np.arange(2400) * 2 * np.pi / 16))
    options = {
        "noise": str(tmp_path / "noise"),
        "noise_rate": 0.75,
        "noise_snr_db": (5.0, 15.0),
        "flip_polarity": False,
        "batch_size": 400,
        "crop_seconds": 0.3,  # twice the noise
    }
    batch = crops(tmp_path / "speech", **options).batch(0)
    added = np.square(batch - 0.2, dtype=np.float64).mean(1)
    mixed = added > 1e-6
    assert mixed.mean() == pytest.approx(0.75, abs=0.07)
    ratios = 10 * np.log10(0.2**2 / added[mixed])
    assert 4.99 < ratios.min() < 6 and 14 < ratios.max() < 15.01
    assert ratios.mean() == pytest.approx(10, abs=0.7)
    np.testing.assert_allclose(batch[~mixed], 0.2, atol=1e-4)
    assert np.ptp(np.abs(batch[mixed] - 0.2)[:, 2400:].max(1) / np.sqrt(added[mixed])) < 1e-2


@pytest.mark.parametrize("silent", ["speech", "noise"])
def test_silence_is_left_unmixed(tmp_path, silent):
    for name in ("speech", "noise"):
        write(tmp_path / name / "a.wav", np.zeros(RATE) if name == silent else noise(1.0))
    mixed = crops(tmp_path / "speech", noise=str(tmp_path / "noise"), noise_rate=1.0)
    np.testing.assert_array_equal(mixed.batch(0), crops(tmp_path / "speech").batch(0))


def test_mixtures_stay_in_range(tmp_path):
    write(tmp_path / "a.wav", 0.9 * np.sign(noise(1.0)))
    loud = crops(tmp_path, noise=str(tmp_path), noise_rate=1.0, noise_snr_db=(0.0, 0.0))
    assert np.abs(loud.batch(0)).max() == 1


def test_a_telephone_leaves_its_band_and_a_little_noise(tmp_path):
    write(tmp_path / "a.wav", 0.3 * noise(2.0))
    options = {"flip_polarity": False, "gain_db": (0.0, 0.0), "batch_size": 200}
    direct = crops(tmp_path, **options).batch(0)
    mixed = crops(tmp_path, telephone_rate=0.3, **options).batch(0)
    changed = np.abs(mixed - direct).max(1) > 1e-3
    assert changed.mean() == pytest.approx(0.3, abs=0.1)
    np.testing.assert_array_equal(mixed[~changed], direct[~changed])
    hertz = np.fft.rfftfreq(direct.shape[1], 1 / RATE)

    def power(x: np.ndarray, low: float, high: float) -> float:
        inside = (hertz > low) & (hertz < high)
        return float(np.square(np.abs(np.fft.rfft(x[changed]))[:, inside]).mean())

    whole = power(direct, 500, 3000)
    assert power(mixed, 500, 3000) == pytest.approx(whole, rel=0.02)
    assert 10 * np.log10(power(mixed - direct, 500, 3000) / whole) == pytest.approx(-38, abs=2)
    assert 10 * np.log10(power(mixed, 20, 80) / whole) < -30
    assert 10 * np.log10(power(mixed, 4100, 8000) / whole) < -60


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_a_telephone_leaves_silence_and_full_scale_finite(tmp_path, level):
    write(tmp_path / "a.wav", level * np.sign(noise(1.0)))
    batch = crops(tmp_path, telephone_rate=1.0).batch(0)
    assert np.isfinite(batch).all() and np.abs(batch).max() <= 1
    assert batch.any() == bool(level)


# Fingerprint


def test_the_fingerprint_tells_when_the_data_change(tmp_path, recordings):
    def take(folder: Path = recordings, weight: float = 1.0, **config) -> str:
        corpora = [{"path": str(folder), "weight": weight}, str(tmp_path / "other")]
        return crops(corpora, **config).fingerprint

    write(tmp_path / "other" / "a.wav", noise(0.5))
    before = take()
    assert take(seed=1, batch_size=2, process=1, processes=2) == before
    assert len({before, take(weight=2.0), take(noise=str(recordings))}) == 3
    moved = recordings.rename(tmp_path / "moved")
    assert take(moved) == before
    write(moved / "a.wav", noise(1.5))
    longer = take(moved)
    (moved / "a.wav").rename(moved / "c.wav")
    assert len({before, longer, take(moved)}) == 3


# Worker processes


def test_workers_give_the_batches_of_threads_and_name_broken_files(recordings):
    write(recordings / "bad.wav", np.full(RATE, np.nan), subtype="FLOAT")
    threads, workers = crops(recordings), crops(recordings, workers=2)
    batches = list(workers.batches(3, 10))
    np.testing.assert_array_equal(batches, list(threads.batches(3, 10)))
    assert workers.skipped == threads.skipped == [str(recordings / "bad.wav")]
    assert batches[0].dtype == np.float32
    assert list(workers.batches(3, 3)) == []


def test_an_error_in_a_worker_is_one_of_the_data(tmp_path):
    write(tmp_path / "bad.wav", np.full(RATE, np.nan), subtype="FLOAT")
    with pytest.raises(DataError, match="bad|no audio file that can be read") as error:
        next(crops(tmp_path, workers=1).batches(0, 2))
    assert "\n" not in str(error.value)


def children() -> set[int]:
    lines = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    return {int(number) for number in lines.split()}


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")


@needs_proc
def test_closing_the_iterator_ends_the_workers(recordings):
    before = children()
    batches = crops(recordings, workers=2).batches(0, 1000)
    next(batches), next(batches)  # one of each
    assert len(children() - before) == 2
    for number in children() - before:
        os.kill(number, signal.SIGINT)  # as a terminal does
        os.kill(number, signal.SIGTERM)
    next(batches)
    batches.close()
    assert children() - before == set()


def lose_a_worker(recordings: Path) -> None:
    """Kill the only worker in the midst of its work, which must become a DataError."""
    before = children()
    batches = crops(recordings, workers=1).batches(0, 1000)
    next(batches)
    os.kill((children() - before).pop(), signal.SIGKILL)
    with pytest.raises(DataError, match="worker"):
        list(batches)
    for _ in range(300):  # torch's handler of SIGCHLD raises wherever it interrupts: here, then
        with contextlib.suppress(RuntimeError):
            if children() == before:
                break
            time.sleep(0.01)


@needs_proc
def test_a_killed_worker_is_an_error_of_the_data(recordings):
    lose_a_worker(recordings)


@needs_proc
def test_a_killed_worker_may_be_told_of_while_the_others_are_ended(recordings, monkeypatch):
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as Workers

    plain = Workers._shutdown_workers

    def told(self):  # as torch's handler of SIGCHLD does where the end comes late
        if self._shutdown:  # an iterator of before, now collected
            return
        monkeypatch.undo()
        plain(self)
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr(Workers, "_shutdown_workers", told)
    lose_a_worker(recordings)


@needs_proc
def test_workers_end_when_the_training_process_is_killed(recordings):
    script = f"""
from test_data import children, crops
from torch.utils.data._utils import worker
worker.MP_STATUS_CHECK_INTERVAL = 0.3  # instead of 5 s, after which workers look for their parent
batches = crops({str(recordings)!r}, workers=2).batches(0, 100000)
next(batches)
print(*children(), flush=True)
next(iter(int, 1))
"""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    )
    workers = [int(number) for number in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert len(workers) == 2
    for _ in range(300):
        if not any(_alive(number) for number in workers):
            return
        time.sleep(0.1)
    raise AssertionError("workers are left")


def _alive(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


# Streamed datasets


def item(level: float, name: str | None = None) -> dict[str, Any]:
    file = io.BytesIO()
    soundfile.write(file, np.full(RATE // 5, level), RATE, format="WAV")
    return {"bytes": file.getvalue(), "path": name}


class FakeDataset:
    """What is used of datasets.IterableDataset; shuffling is a rotation by seed and epoch."""

    def __init__(self, items: list[dict]) -> None:
        self.items, self.seed, self.epoch, self.part, self.decode = items, None, 0, (0, 1), True

    def select_columns(self, columns: list[str]) -> FakeDataset:
        assert columns == ["audio"]
        return self

    def cast_column(self, column: str, feature: Any) -> FakeDataset:
        assert column == "audio"
        self.decode = feature.decode
        return self

    def shuffle(self, seed: int, buffer_size: int) -> FakeDataset:
        assert buffer_size == 7
        self.seed = seed
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict]:
        assert not self.decode
        first = (self.seed + self.epoch) % max(1, len(self.items))
        items = self.items[first:] + self.items[:first]
        yield from ({"audio": some} for some in items[self.part[0] :: self.part[1]])


@pytest.fixture
def hub(monkeypatch) -> Any:
    """Puts a fake package `datasets` with one dataset in place; gives (items, calls)."""
    items, calls = [], []

    def load_dataset(path, name=None, **options):
        calls.append((path, name, options))
        if path == "absent":
            raise FileNotFoundError("Dataset 'absent' doesn't exist on the Hub\nTry another")
        return FakeDataset(items)

    def split_dataset_by_node(dataset, rank, world_size):
        dataset.part = rank, world_size
        return dataset

    package, distributed = ModuleType("datasets"), ModuleType("datasets.distributed")
    package.load_dataset = load_dataset
    package.Audio = lambda decode: SimpleNamespace(decode=decode)
    package.distributed = distributed
    distributed.split_dataset_by_node = split_dataset_by_node
    monkeypatch.setitem(sys.modules, "datasets", package)
    monkeypatch.setitem(sys.modules, "datasets.distributed", distributed)
    return items, calls


STREAM = {"type": "huggingface", "path": "some/speech", "shuffle_buffer": 7}


def order(drawn: AudioCrops, batches: int) -> list[int]:
    """Numbers of the items of the crops, whose level is a hundredth of it."""
    return (levels(np.concatenate(list(drawn.batches(0, batches)))) * 100).round().tolist()


def test_a_stream_gives_every_item_once_per_epoch_in_a_new_order(hub):
    items, calls = hub
    items += [item(number / 100) for number in range(1, 21)]
    numbers = order(crops([STREAM | {"name": "en", "revision": "v1"}]), 10)
    assert sorted(numbers[:20]) == sorted(numbers[20:]) == list(range(1, 21))
    assert numbers[:20] != numbers[20:]
    options = {"split": "train", "revision": "v1", "streaming": True}
    assert calls == [("some/speech", "en", options)]
    assert order(crops([STREAM], seed=1), 5) != numbers[:20]


def test_a_stream_resumes_exactly_among_other_corpora(hub, two_corpora):
    hub[0].extend(item(number / 100) for number in range(1, 21))
    train = [*two_corpora, STREAM | {"weight": 2.0}]
    expected = list(crops(train).batches(0, 40))
    np.testing.assert_array_equal(list(crops(train).batches(33, 40)), expected[33:])
    drawn = crops(train)
    for number in (7, 2, 39):  # any order works
        np.testing.assert_array_equal(drawn.batch(number), expected[number])
    numbers = (levels(np.concatenate(expected)) * 100).round()
    streamed = [n for n in numbers if n not in (25, 50)]
    assert len(streamed) == pytest.approx(160 / 3, abs=2)
    assert sorted(streamed[:20]) == list(range(1, 21))


def test_counts_of_items_do_not_depend_on_where_they_begin(hub, two_corpora, monkeypatch):
    hub[0].extend(item(number / 100) for number in range(1, 21))
    expected = crops([*two_corpora, STREAM]).batch(25)
    monkeypatch.setattr(general, "COUNTED", 4)
    np.testing.assert_array_equal(crops([*two_corpora, STREAM]).batch(25), expected)


def test_processes_share_the_items_of_a_stream(hub):
    hub[0].extend(item(number / 100) for number in range(1, 21))
    parts = [order(crops([STREAM], process=p, processes=2, batch_size=5), 2) for p in (0, 1)]
    assert sorted(sum(parts, [])) == list(range(1, 21))


def test_items_that_cannot_be_read_give_way_to_the_next(hub):
    broken = {"bytes": b"no audio", "path": "b.mp3"}
    hub[0].extend([item(0.01), broken, item(0.03), {"bytes": b"", "path": None}])
    drawn = crops([STREAM])
    assert order(drawn, 1) == [1, 3, 3, 3]  # the next epoch begins with what is broken
    assert len(drawn.skipped) >= 2 and "some/speech: b.mp3" in drawn.skipped
    np.testing.assert_array_equal(crops([STREAM]).batch(1), drawn.batch(1))


@pytest.mark.parametrize("items", [[], [{"bytes": b"no audio", "path": "b.mp3"}]])
def test_a_stream_without_audio_is_an_error(hub, items):
    hub[0].extend(items)
    with pytest.raises(DataError, match="some/speech: (no items|1000 items in a row)"):
        crops([STREAM]).batch(0)


def test_items_may_be_paths(hub, tmp_path):
    write(tmp_path / "a.flac", np.full(RATE, 0.25))
    hub[0].append({"bytes": None, "path": str(tmp_path / "a.flac")})
    hub[0].append({"bytes": None, "path": str(tmp_path / "absent.flac")})
    assert set(levels(crops([STREAM]).batch(0))) == {0.25}


def test_what_the_hub_says_becomes_one_line(hub):
    with pytest.raises(DataError) as error:
        crops([STREAM | {"path": "absent"}])
    assert str(error.value) == "absent: Dataset 'absent' doesn't exist on the Hub"


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        crops([STREAM])


def test_the_description_of_a_stream_is_in_the_fingerprint(hub):
    hub[0].append(item(0.1))
    before = crops([STREAM]).fingerprint
    assert crops([STREAM]).fingerprint == before
    assert crops([STREAM | {"revision": "v2"}]).fingerprint != before


def test_the_real_package_streams_parquet(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    for shard in range(2):
        rows = [item((shard * 6 + number) / 100) for number in range(1, 7)]
        table = datasets.Dataset.from_dict({"text": ["a"] * 6, "audio": rows})
        table.to_parquet(tmp_path / f"train-{shard:05}-of-00002.parquet")
    stream = STREAM | {"path": str(tmp_path)}
    drawn = crops([stream])
    numbers = order(drawn, 6)
    assert sorted(numbers[:12]) == sorted(numbers[12:]) == list(range(1, 13))
    assert numbers[:12] != numbers[12:] and drawn.skipped == []
    np.testing.assert_array_equal(next(crops([stream]).batches(4, 5)), drawn.batch(4))
    parts = [order(crops([stream], process=p, processes=2, batch_size=6), 1) for p in (0, 1)]
    assert sorted(sum(parts, [])) == list(range(1, 13))
    with pytest.raises(DataError, match="speech"):
        crops([stream | {"column": "speech"}])
