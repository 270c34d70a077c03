"""Held-out images for evaluations during training."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch

from ...media.image import load_image
from ...models import ImageAutoencoder
from ...scoring.workers import IMAGE_METRICS, Workers
from ...tokenfile import ImageHeader
from ..corpora import list_files
from ..evaluation import CodecFunction, HeldOut
from .data import IMAGE_FILES, to_rgb


class HeldOutImages(HeldOut):
    """Images: (H, W, 3) uint8, each side a multiple of the model's block or less than one."""

    media = IMAGE_FILES
    metrics = IMAGE_METRICS  # type: ignore[assignment]

    def _locations(self) -> list[Path]:
        listing = list_files(self.config.data.path, self.media)
        return [listing.root / name for name in listing.names]

    def read(self, location: Path) -> np.ndarray:
        """The centre of an image, up to `max_side` pixels each way."""
        pixels = to_rgb(load_image(location))
        for axis in (0, 1):
            length, block = pixels.shape[axis], self.model.block_size
            side = min(length, self.config.max_side)
            side = side // block * block or side
            first = (length - side) // 2
            pixels = pixels.take(range(first, first + side), axis)
        return pixels

    def codec(self, model: ImageAutoencoder, device: torch.device | str) -> CodecFunction:
        return codec_of(model, device)

    def submit(
        self, workers: Workers, item: np.ndarray, decoded: np.ndarray
    ) -> Future[dict[str, float]]:
        return workers.submit_image(item, decoded)

    def header(self, item: np.ndarray) -> ImageHeader:
        return ImageHeader(
            model=self.model.name,
            fingerprint=bytes(16),
            channels=1,
            hop_length=self.model.hop_length,
            codebook_size=self.model.codebook_size,
            width=item.shape[1],
            height=item.shape[0],
            components=3,
        )

    def rate(self, n_bytes: int, items: list[np.ndarray]) -> dict[str, float]:
        pixels = sum(item.shape[0] * item.shape[1] for item in items)
        return {"bits_per_pixel": 8 * n_bytes / pixels}


def codec_of(model: ImageAutoencoder, device: torch.device | str) -> CodecFunction:
    """A function that codes an image in one piece, as `ImageCodec` does in tiles, in float32.

    The model gets whole blocks, padded beyond the edges with the last pixels and tokens.

    Args:
        model: in eval mode, with its weights on `device`.
        device: device to compute on.

    Returns:
        A function from (H, W, 3) uint8 pixels to (ceil(H / hop), ceil(W / hop)) int64 tokens and
        (H, W, 3) uint8 pixels.
    """
    device, config = torch.device(device), model.config

    @torch.no_grad()
    def codec(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        height, width = pixels.shape[:2]
        rows, columns = -(-height // config.hop_length), -(-width // config.hop_length)
        images = _padded(pixels, config.block_size).transpose(2, 0, 1).astype(np.float32)
        images = images * np.float32(2 / 255) - np.float32(1)
        with torch.autocast(device.type, enabled=False):
            encoded = model.encode(torch.from_numpy(images).to(device)[None])
            tokens = encoded[0, :rows, :columns].cpu().numpy()
            whole = torch.from_numpy(_padded(tokens, config.attention_window)).to(device)
            decoded = model.decode(whole[None])[0, :, :height, :width].cpu().numpy()
        return tokens, np.rint((decoded + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)

    return codec


def _padded(array: np.ndarray, multiple: int) -> np.ndarray:
    """Pad (H, W, ...) to multiples of a size by repeating the last values."""
    missing = [(0, -side % multiple) for side in array.shape[:2]]
    return np.pad(array, missing + [(0, 0)] * (array.ndim - 2), "edge")
