"""Training audio: random crops as a pure function of seed and step, so that resuming is exact."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile

from ..audio import find_audio, resample
from ..recipe import DataConfig

LONG_SECONDS = 60.0  # longer files are not kept in memory but read where the crop lies


class DataError(ValueError):
    """Training data that cannot be used."""


class Crops:
    """Random mono crops of a folder of audio files, or of generated signals.

    Crop i of step s depends on (seed, s, i) alone. Files are drawn in proportion to their length;
    those that cannot be read are left out and listed in `skipped`.

    Args:
        config: folder, crop length, batch size, gain.
        sample_rate: rate of the crops, Hz.
        multiple: crop length is rounded up to a multiple of this many samples.
        seed: of all random draws.
    """

    def __init__(self, config: DataConfig, *, sample_rate: int, multiple: int, seed: int) -> None:
        self.config = config
        self.sample_rate = sample_rate
        self.seed = seed
        self.length = -(-int(config.crop_seconds * sample_rate) // multiple) * multiple
        self.skipped: list[str] = []
        self._broken: set[int] = set()
        self._cache: dict[int, np.ndarray] = {}
        self._cached_bytes = 0
        self.files: list[tuple[Path, float]] = []
        if config.train is not None:
            self._scan(Path(config.train))

    def _scan(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder}: not a folder of training audio")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            paths = [folder / name for name in find_audio(folder)]
            for path, seconds in zip(paths, pool.map(_seconds, paths)):
                if seconds > 0.1:
                    self.files.append((path, seconds))
                else:
                    self.skipped.append(str(path))
        if not self.files:
            raise DataError(f"{folder}: no audio file that can be read")
        ends = np.cumsum([seconds for _, seconds in self.files])
        self._ends = ends / ends[-1]

    @property
    def hours(self) -> float:
        return sum(seconds for _, seconds in self.files) / 3600

    def batch(self, step: int) -> np.ndarray:
        """(batch_size, length) float32 crops of one step."""
        return np.stack([self._crop(step, i) for i in range(self.config.batch_size)])

    def batches(self, first_step: int, last_step: int) -> Iterator[np.ndarray]:
        """The batches of steps [first_step, last_step), read ahead in threads."""
        workers = max(1, min(4, (os.cpu_count() or 1) // 2))
        with ThreadPoolExecutor(workers) as pool:
            ahead = 2 * workers
            pending = [
                pool.submit(self.batch, s)
                for s in range(first_step, min(first_step + ahead, last_step))
            ]
            try:
                for step in range(first_step, last_step):
                    batch = pending.pop(0).result()
                    if step + ahead < last_step:
                        pending.append(pool.submit(self.batch, step + ahead))
                    yield batch
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _crop(self, step: int, index: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, step, index])
        if self.files:
            crop = None
            while crop is None:
                number = int(np.searchsorted(self._ends, rng.random(), side="right"))
                crop = self._try_read(min(number, len(self.files) - 1), rng.random())
        else:
            crop = _generate(rng, self.length, self.sample_rate)
        low, high = self.config.gain_db
        gain = 10 ** (rng.uniform(low, high) / 20) * rng.choice([-1.0, 1.0])
        crop = np.pad(crop, (0, self.length - len(crop))) * gain
        peak = np.abs(crop).max()
        return (crop / max(peak, 1.0)).astype(np.float32)

    def _try_read(self, number: int, position: float) -> np.ndarray | None:
        """`_read`, or None for a file that turns out to be broken."""
        if number not in self._broken:
            try:
                return self._read(number, position)
            except (soundfile.LibsndfileError, OSError, ValueError):
                self._broken.add(number)
                self.skipped.append(str(self.files[number][0]))
        if len(self._broken) == len(self.files):
            raise DataError(f"{self.config.train}: no audio file that can be read")
        return None

    def _read(self, number: int, position: float) -> np.ndarray:
        """Up to `length` samples of file `number`, starting at `position` (0..1) of what fits."""
        path, seconds = self.files[number]
        want = self.length / self.sample_rate
        if seconds > LONG_SECONDS:
            start = position * (seconds - want)
            with soundfile.SoundFile(path) as file:
                file.seek(int(start * file.samplerate))
                samples = file.read(int(want * file.samplerate) + 1, "float32", always_2d=True)
                samples = _to_mono(samples, file.samplerate, self.sample_rate)
            return samples[: self.length]
        samples = self._cache.get(number)
        if samples is None:
            with soundfile.SoundFile(path) as file:
                audio = file.read(dtype="float32", always_2d=True)
                audio = _to_mono(audio, file.samplerate, self.sample_rate)
            samples = np.round(audio.clip(-1, 1) * 32767).astype(np.int16)
            if self._cached_bytes + samples.nbytes <= self.config.cache_mb * 2**20:
                self._cache[number] = samples
                self._cached_bytes += samples.nbytes
        start = int(position * max(0, len(samples) - self.length))
        return samples[start : start + self.length] / np.float32(32767)


def _seconds(path: Path) -> float:
    try:
        info = soundfile.info(path)
    except (soundfile.LibsndfileError, OSError):
        return 0.0
    return info.frames / info.samplerate


def _to_mono(samples: np.ndarray, rate: int, target_rate: int) -> np.ndarray:
    if not np.isfinite(samples).all():
        raise ValueError("NaN or infinite samples")
    return resample(samples.mean(1), rate, target_rate)


def _generate(rng: np.random.Generator, length: int, sample_rate: int) -> np.ndarray:
    """A voiced-like signal: gliding harmonics under a slow envelope, with some noise."""
    t = np.arange(length) / sample_rate
    pitch = rng.uniform(80, 300) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(0.5, 3) * t))
    phase = 2 * np.pi * np.cumsum(pitch) / sample_rate
    harmonics = range(1, int(sample_rate / 2 / 400))
    tone = sum(np.sin(k * phase + rng.uniform(0, 6.3)) / k for k in harmonics)
    envelope = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(1, 5) * t + rng.uniform(0, 6.3))
    return 0.15 * tone * envelope + 0.01 * rng.standard_normal(length)
