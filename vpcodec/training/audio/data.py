"""Training audio: crops of recordings with random gain, polarity, noise and telephone bands."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np

from ...recipe.audio import DataConfig
from ..crops import Crops
from .corpora import AUDIO_FILES, SHORT_SECONDS, AudioFiles, length, length_or_zero, read_part

LONG_SECONDS = 60.0  # longer files are not cached; only the crop is read
SILENCE = 1e-8  # mean power, -80 dB; no noise is mixed with less
TELEPHONE_LOW_HZ = (200.0, 400.0)  # range of the lower edge of the telephone band
TELEPHONE_HIGH_HZ = (3200.0, 3600.0)  # range of the upper edge
TELEPHONE_EDGE_HZ = 200.0  # width of the edges
TELEPHONE_RATE = 8000
MU = 255  # mu-law of ITU-T G.711


class AudioCrops(Crops):
    """Random mono crops of audio files and streamed datasets, or of generated signals.

    Files are drawn in proportion to their length. Batches are (batch_size, length) float32.

    Args:
        config: corpora, crop length, batch size, augmentation.
        sample_rate: sample rate of the crops, Hz.
        hop_length: samples per token; the length of crops is rounded up to a multiple of it.
        seed, process, processes, workers: as for `Crops`.

    Attributes:
        length: number of samples of a crop.
    """

    media = AUDIO_FILES
    axes = 1

    def __init__(
        self,
        config: DataConfig,
        *,
        sample_rate: int,
        hop_length: int,
        seed: int,
        process: int = 0,
        processes: int = 1,
        workers: int = 0,
    ) -> None:
        super().__init__(
            config,
            seed=seed,
            process=process,
            processes=processes,
            workers=workers,
            scan=AudioFiles,
        )
        self.sample_rate = sample_rate
        self.tokens = -(-int(config.crop_seconds * sample_rate) // hop_length)
        self.length = self.tokens * hop_length
        self.shape = (self.length,)
        self._noise = None if config.noise is None else AudioFiles(config.noise)
        if self._noise is not None:
            self._skipped |= dict.fromkeys(self._noise.unreadable)
        self._choose_cached()

    @property
    def hours(self) -> float:
        """Total length of the training files, h, without streamed datasets."""
        return sum(files.seconds.sum() for files in self._files) / 3600

    @property
    def summary(self) -> str:
        return f"{self.hours:.1f} h" if self.hours else ""

    def _describe(self, write: Callable[[bytes], None]) -> None:
        super()._describe(write)
        if self._noise:
            write(b"noise ")
            self._noise.describe(write)

    def _choose_cached(self) -> None:
        """Decide, in the order of the files, which are decoded whole and cached.

        This cannot wait until a file is read: resampling a whole file and a part of it differ by
        rounding, and crops must not depend on what was read before.
        """
        files = [*([self._noise] if self._noise else []), *self._files]
        left = self.config.cache_mb * 2**20 // max(1, self.workers)
        for index, some in enumerate(files):
            size = np.where(some.seconds > LONG_SECONDS, 0, some.seconds * self.sample_rate * 2)
            ends = np.cumsum(size)
            some.whole = (size > 0) & (ends <= left)
            some.index = index
            left -= min(left, ends[-1])

    def _finish(self, cut: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Augment a cut of up to `length` samples: (length,) float32."""
        gain = 10 ** (rng.uniform(*self.config.gain_db) / 20)
        negative = rng.random() < 0.5
        crop = np.pad(cut, (0, self.length - len(cut)))
        if self._noise and rng.random() < self.config.noise_rate:
            crop = self._add_noise(crop, rng)
        if self.config.telephone_rate and rng.random() < self.config.telephone_rate:
            crop = telephone(crop, self.sample_rate, rng)
        crop = crop * (-gain if negative and self.config.flip_polarity else gain)
        return (crop / max(np.abs(crop).max(), 1.0)).astype(np.float32)

    def _add_noise(self, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        noise = np.resize(self._from_file(self._noise, rng), self.length)  # repeated as needed
        decibels = rng.uniform(*self.config.noise_snr_db)
        power, noise_power = (np.mean(np.square(x, dtype=np.float64)) for x in (crop, noise))
        if min(power, noise_power) < SILENCE:
            return crop
        return crop + noise * math.sqrt(power / noise_power * 10 ** (-decibels / 10))

    def _read(self, files: AudioFiles, number: int, place: np.ndarray) -> np.ndarray:
        """Up to `length` samples of a file."""
        path, offset = files.path(number), float(files.offsets[number])
        total = round(float(files.seconds[number]) * self.sample_rate)
        if not files.whole[number]:
            first = int(place[0] * max(0, total - self.length))
            return read_part(path, offset, first, min(self.length, total), self.sample_rate)
        found = self._cache.get((files.index, number))
        if found is None:
            audio = read_part(path, offset, 0, total, self.sample_rate)
            scale = np.float32(max(1.0, float(np.abs(audio).max())) / 32768)
            found = np.round(audio / scale).clip(-32768, 32767).astype(np.int16), scale
            self._cache[files.index, number] = found
        samples, scale = found
        first = int(place[0] * max(0, len(samples) - self.length))
        return samples[first : first + self.length] * scale

    def _decode(self, data: bytes, place: np.ndarray) -> np.ndarray:
        """Up to `length` samples."""
        total = round(length(io.BytesIO(data)) * self.sample_rate)
        if total <= SHORT_SECONDS * self.sample_rate:
            raise ValueError("too short")
        first, samples = int(place[0] * max(0, total - self.length)), min(self.length, total)
        return read_part(io.BytesIO(data), 0.0, first, samples, self.sample_rate)

    def _generate(self, rng: np.random.Generator) -> np.ndarray:
        return _voice(rng, self.length, self.sample_rate)

    def _is_lost(self, files: AudioFiles, number: int) -> bool:
        """A long file may have readable parts, which must not depend on the part read first."""
        return bool(files.whole[number]) or not length_or_zero(files.path(number))


def telephone(samples: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Pass (T,) samples, full scale 1, through a telephone: band-limited, 8 bits of mu-law.

    The edges of the band are random. Nothing remains above 4 kHz.

    Returns:
        (T,) float64.
    """
    n, narrow = len(samples), round(len(samples) * TELEPHONE_RATE / sample_rate)
    hertz = np.fft.rfftfreq(n, 1 / sample_rate)
    low, high = rng.uniform(*TELEPHONE_LOW_HZ), rng.uniform(*TELEPHONE_HIGH_HZ)
    band = (np.minimum(hertz - low, high - hertz) / TELEPHONE_EDGE_HZ + 0.5).clip(0, 1)
    received = mu_law(np.fft.irfft(np.fft.rfft(samples) * band, narrow) * (narrow / n))
    return np.fft.irfft(np.fft.rfft(received), n) * (n / narrow)


def mu_law(samples: np.ndarray) -> np.ndarray:
    """Quantize samples, full scale 1, to 8 bits of mu-law; silence stays silent."""
    law = np.sign(samples) * np.log1p(MU * np.abs(samples).clip(max=1)) / np.log1p(MU)
    law = np.round(law * 127) / 127
    return np.sign(law) * np.expm1(np.abs(law) * np.log1p(MU)) / MU


def _voice(rng: np.random.Generator, length: int, sample_rate: int) -> np.ndarray:
    """A voice-like signal: gliding harmonics under a slow envelope, with some noise."""
    t = np.arange(length) / sample_rate
    pitch = rng.uniform(80, 300) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(0.5, 3) * t))
    phase = 2 * np.pi * np.cumsum(pitch) / sample_rate
    harmonics = range(1, int(sample_rate / 2 / 400))
    tone = sum(np.sin(k * phase + rng.uniform(0, 6.3)) / k for k in harmonics)
    envelope = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(1, 5) * t + rng.uniform(0, 6.3))
    return 0.15 * tone * envelope + 0.01 * rng.standard_normal(length)
