"""Training images: random crops, mirrored or not."""

from __future__ import annotations

import io
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from ...media.image import IMAGE_SUFFIXES, ImageError, find_images, load_image
from ...recipe.image import DataConfig, ImageCorpus
from ..corpora import Files, MediaType, list_files
from ..crops import Crops

IMAGE_FILES = MediaType(
    noun="image",
    suffixes=IMAGE_SUFFIXES,
    find_files=find_images,
    errors=(ImageError, OSError, ValueError, TypeError),
    feature="Image",
)


class ImageCrops(Crops):
    """Random square crops of image files and streamed datasets, or of generated images.

    All files are equally likely, and opened only when they are drawn. Images are upright RGB, with
    transparency on white. Batches are (batch_size, 3, size, size) float32.

    Args:
        config: corpora, crop size, batch size, augmentation.
        hop_length: side of the square of pixels that a token stands for.
        seed, process, processes, workers: as for `Crops`.

    Attributes:
        size: side of a crop, pixels.
    """

    media = IMAGE_FILES
    axes = 2

    def __init__(
        self,
        config: DataConfig,
        *,
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
            scan=list_images,
        )
        self.size = config.crop_size
        self.tokens = (self.size // hop_length) ** 2
        self.shape = (3, self.size, self.size)
        # Cached and reread images are equal, so crops do not depend on which of them are cached.
        self._room = config.cache_mb * 2**20 // max(1, self.workers)  # bytes
        # Worker processes have no lock, because locks do not survive forks.
        self._caching = nullcontext() if self.workers else threading.Lock()

    @property
    def summary(self) -> str:
        number = sum(map(len, self._files))
        return f"{number:,} images" if number else ""

    def _read(self, files: Files, number: int, place: np.ndarray) -> np.ndarray:
        """(size, size, 3) uint8."""
        key = files.name, number
        pixels = self._cache.get(key)
        if pixels is None:
            pixels = self._load(files.path(number))
            with self._caching:
                if key not in self._cache and pixels.nbytes <= self._room:
                    self._room -= pixels.nbytes
                    self._cache[key] = pixels
        return self._cut(pixels, place)

    def _decode(self, data: bytes, place: np.ndarray) -> np.ndarray:
        """(size, size, 3) uint8."""
        return self._cut(self._load(io.BytesIO(data)), place)

    def _load(self, source: Path | io.BytesIO) -> np.ndarray:
        """(H, W, 3) uint8, with the shorter side scaled down to `resize` if it is larger."""
        try:
            pixels = to_rgb(load_image(source))
        except ImageError as error:
            if isinstance(error.__cause__, OSError):  # from the file system, which may recover
                raise error.__cause__ from None
            raise
        height, width = pixels.shape[:2]
        resize = self.config.resize or 0
        if not 0 < resize < min(height, width):
            return pixels
        scale = resize / min(height, width)
        return _resized(pixels, round(height * scale), round(width * scale))

    def _cut(self, pixels: np.ndarray, place: np.ndarray) -> np.ndarray:
        """A square of (H, W, 3) pixels, enlarged if they are too few for a crop or `resize`."""
        shape = np.array(pixels.shape[:2])
        scale = max(self.config.resize or 0, self.size) / shape.min()
        # Only the square is enlarged, so that long and narrow images stay small.
        grown = np.round(shape * scale).astype(int) if scale > 1 else shape
        corner = (place * (grown - self.size + 1)).astype(int)
        if scale <= 1:
            top, left = corner
            return pixels[top : top + self.size, left : left + self.size]
        top, left = corner * shape / grown
        bottom, right = np.minimum((corner + self.size) * shape / grown, shape)
        return _resized(pixels, self.size, self.size, (left, top, right, bottom))

    def _generate(self, rng: np.random.Generator) -> np.ndarray:
        return _generated_image(rng, self.size)

    def _finish(self, cut: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Mirror a cut or not: (3, size, size) float32 in [-1, 1]."""
        if rng.random() < 0.5 and self.config.flip:
            cut = cut[:, ::-1]
        return np.ascontiguousarray(cut.transpose(2, 0, 1), np.float32) / 127.5 - 1


def list_images(corpus: ImageCorpus) -> Files:
    """The files of a corpus of images; DataError if there are none."""
    listing = list_files(corpus.path, IMAGE_FILES)
    return Files(corpus.path, listing.root, listing.names)


def to_rgb(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 1 to 4) uint8 pixels -> (H, W, 3): grey repeated, transparency on white."""
    colours = pixels
    if pixels.shape[2] in (2, 4):
        alpha = pixels[..., -1:].astype(np.uint16)
        mixed = pixels[..., :-1] * alpha + 255 * (255 - alpha)
        colours = ((mixed + 127) // 255).astype(np.uint8)
    return colours if colours.shape[2] == 3 else colours.repeat(3, 2)


def _resized(
    pixels: np.ndarray,
    height: int,
    width: int,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """Resize pixels, or those in a box (left, top, right, bottom), with antialiasing."""
    from PIL import Image

    image = Image.fromarray(pixels)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box))


def _generated_image(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) uint8: a smooth background, shapes with edges, and a patch of texture."""
    y, x = np.mgrid[:size, :size][..., None] / size
    image = rng.uniform(40, 215, 3) + rng.uniform(-80, 80, 3) * x + rng.uniform(-80, 80, 3) * y
    for _ in range(rng.integers(2, 6)):
        row, column, reach = rng.uniform((0, 0, 0.05), (1, 1, 0.4))
        angle = rng.uniform(0, np.pi)
        along = (x - column) * np.cos(angle) + (y - row) * np.sin(angle)
        across = (y - row) * np.cos(angle) - (x - column) * np.sin(angle)
        power = rng.choice([2.0, 8.0])  # an ellipse, or nearly a rectangle
        inside = (along / reach) ** power + (across / (reach * rng.uniform(0.2, 1))) ** power < 1
        image = np.where(inside, rng.uniform(0, 255, 3), image)
    row, column, angle = rng.uniform(0, 1, 3) * (1, 1, np.pi)
    waves = np.sin(
        rng.uniform(0.1, 0.4) * size * 2 * np.pi * (x * np.cos(angle) + y * np.sin(angle))
    )
    window = np.exp(-((x - column) ** 2 + (y - row) ** 2) / 0.08)
    image = image + rng.uniform(10, 60) * waves * window + rng.normal(0, 2, (size, size, 3))
    return image.clip(0, 255).astype(np.uint8)
