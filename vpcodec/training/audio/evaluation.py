"""Held-out audio for evaluations during training."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ...backends.torch import ModuleBackend
from ...codec.streams import CausalDecoderStream, CausalEncoderStream
from ...models import AudioAutoencoder
from ...scoring.workers import METRICS, Workers, measure
from ...tokenfile import AudioHeader
from ..evaluation import CodecFunction, HeldOut
from .corpora import AUDIO_FILES, list_audio, read_part

MIN_SECONDS = 0.5  # shorter clips are left out


class Clip(NamedTuple):
    """A file or a part of it; `seconds` is NaN for the whole file."""

    path: Path
    offset: float
    seconds: float

    def __str__(self) -> str:
        return str(self.path)


class HeldOutAudio(HeldOut):
    """Clips: (T,) float32, mono, at the model's sample rate, T a multiple of the hop."""

    media = AUDIO_FILES

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those of `METRICS`, and those that the recipe adds."""
        return tuple(dict.fromkeys((*METRICS, *self.config.metrics, self.config.best)))

    def _locations(self) -> list[Clip]:
        listing = list_audio(self.config.data)
        columns = (listing.columns[name].tolist() for name in ("offset", "seconds"))
        rows = zip(listing.names, *columns, strict=True)
        return [Clip(listing.root / name, offset, seconds) for name, offset, seconds in rows]

    def read(self, location: Clip) -> np.ndarray:
        """The beginning of a clip, up to `max_seconds`."""
        rate, hop = self.model.sample_rate, self.model.hop_length
        longest = self.config.max_seconds
        seconds = min(longest, location.seconds) if location.seconds > 0 else longest
        samples = read_part(location.path, location.offset, 0, int(seconds * rate), rate)
        if len(samples) < max(hop, MIN_SECONDS * rate):
            raise ValueError(f"shorter than {MIN_SECONDS} s")
        return np.ascontiguousarray(samples[: len(samples) // hop * hop])

    def missing(self) -> list[str]:
        silence = np.zeros(1, np.float32)
        installed = measure(silence, silence, self.model.sample_rate, self.metrics)
        return [name for name in self.metrics if name not in installed]

    def codec(self, model: AudioAutoencoder, device: torch.device | str) -> CodecFunction:
        return codec_of(model, device)

    def submit(
        self, workers: Workers, item: np.ndarray, decoded: np.ndarray
    ) -> Future[dict[str, float]]:
        return workers.submit(item, decoded, self.model.sample_rate, self.metrics)

    def header(self, item: np.ndarray) -> AudioHeader:
        model = self.model
        return AudioHeader(
            model=model.name,
            fingerprint=bytes(16),
            sample_rate=model.sample_rate,
            original_rate=model.sample_rate,
            channels=1,
            n_samples=len(item),
            hop_length=model.hop_length,
            codebook_size=model.codebook_size,
        )

    def rate(self, n_bytes: int, items: list[np.ndarray]) -> dict[str, float]:
        return {"bitrate": 8 * n_bytes * self.model.sample_rate / sum(map(len, items))}


def codec_of(model: AudioAutoencoder, device: torch.device | str) -> CodecFunction:
    """A function that codes a clip as `AudioCodec` does, but in one piece.

    Args:
        model: in eval mode, with its weights on `device`.
        device: device to compute on.

    Returns:
        A function from (T,) float32 samples, T a multiple of the hop, to (T / hop,) int64 tokens
        and (T,) float32 samples aligned with the input.
    """
    backend = ModuleBackend(model, torch.device(device))

    def codec(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        frames = len(samples) // model.config.hop_length + model.config.decoder_delay
        encoder = CausalEncoderStream(model.config, backend, 1, chunk=frames)
        decoder = CausalDecoderStream(model.config, backend, 1, chunk=frames)
        tokens = encoder.push(samples)
        return tokens[0], decoder.flush(tokens)[0]

    return codec
