"""Metrics of decoded images: functions of two images, the reference first.

Images are uint8 arrays (H, W) or (H, W, C) of the same shape. All functions raise ValueError for
other shapes and dtypes, and for images without pixels. All channels count equally, alpha included.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from .base import Metric, registered

PEAK = 255
BEST_PSNR = 100.0  # dB, for equal images, because means need a number
WINDOW, SIGMA = 11, 1.5  # pixels, of the Gaussian of SSIM
K1, K2 = 0.01, 0.03
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, finest first

_PIECE = 2**18  # pixels that are filtered at once; bounds memory
_LPIPS_SIDE = 64  # pixels, the least that its backbones take


def psnr(reference: np.ndarray, degraded: np.ndarray) -> float:
    """Peak signal-to-noise ratio over all channels, dB; infinite for equal images."""
    reference, degraded = _check(reference, degraded)
    error = 0
    for x, y in _pieces(reference, degraded, 1):
        error += int(np.square(x.astype(np.int32) - y).sum(dtype=np.int64))
    if not error:
        return math.inf
    return 10 * math.log10(PEAK**2 * reference.size / error)


@registered(
    Metric(
        name="psnr",
        label="PSNR",
        unit="dB",
        better="higher",
        modality="image",
        source="10 log10 of 255^2 over mean square error, at most 100",
    ),
)
def measure_psnr(reference: np.ndarray, degraded: np.ndarray) -> tuple[float]:
    return (min(psnr(reference, degraded), BEST_PSNR),)


def ssim(reference: np.ndarray, degraded: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004), up to 1.

    The mean over channels and over all positions of a Gaussian window of 11 x 11 pixels inside the
    image. Along a side of less than 11 pixels, the window has the largest odd size that fits.
    """
    reference, degraded = _check(reference, degraded)
    return float(np.mean([_ssim(x, y)[0] for x, y in _channels(reference, degraded)]))


@registered(
    Metric(
        name="ssim",
        label="SSIM",
        unit="",
        better="higher",
        modality="image",
        source="Wang et al. 2004",
    ),
)
def measure_ssim(reference: np.ndarray, degraded: np.ndarray) -> tuple[float]:
    return (ssim(reference, degraded),)


def ms_ssim(reference: np.ndarray, degraded: np.ndarray) -> float:
    """Multi-scale structural similarity (Wang et al. 2003), from 0 to 1, mean over the channels.

    Each scale averages 2 x 2 pixels of the one before. Five scales need a shorter side of at least
    176 pixels; smaller images have as many scales as hold a window, at least one, with weights
    scaled to a sum of 1. Negative factors count as 0.
    """
    reference, degraded = _check(reference, degraded)
    scales = scales_that_fit(*reference.shape[:2])
    weights = np.array(SCALE_WEIGHTS[:scales]) / sum(SCALE_WEIGHTS[:scales])
    values = []
    for x, y in _channels(reference, degraded):
        factors = []
        for scale in range(scales):
            x, y = (_halved(x), _halved(y)) if scale else (x, y)
            similarity, contrast = _ssim(x, y)
            factors.append(similarity if scale == scales - 1 else contrast)
        values.append(np.prod(np.maximum(factors, 0) ** weights))
    return float(np.mean(values))


@registered(
    Metric(
        name="ms_ssim",
        label="MS-SSIM",
        unit="",
        better="higher",
        modality="image",
        source="Wang et al. 2003",
    ),
)
def measure_ms_ssim(reference: np.ndarray, degraded: np.ndarray) -> tuple[float]:
    return (ms_ssim(reference, degraded),)


def lpips(reference: np.ndarray, degraded: np.ndarray, *, net: str = "alex") -> float:
    """LPIPS (Zhang et al. 2018), from 0 for equal images; of RGB, or of grey as RGB.

    NaN for images with a side of less than 64 pixels, which its networks do not take.

    Raises:
        ImportError: without the package lpips.
        ValueError: images with alpha.
    """
    reference, degraded = _check(reference, degraded)
    if reference.shape[2] not in (1, 3):
        raise ValueError(f"LPIPS takes grey or RGB, not {reference.shape[2]} channels")
    network, tensor = _lpips_network(net)
    if min(reference.shape[:2]) < _LPIPS_SIDE:
        return math.nan
    x, y = (
        tensor(np.broadcast_to(image, (*image.shape[:2], 3))) for image in (reference, degraded)
    )
    return float(network(x, y))


@registered(
    Metric(
        name="lpips",
        label="LPIPS",
        unit="",
        better="lower",
        modality="image",
        source="Zhang et al. 2018, AlexNet (lpips)",
        packages=("lpips", "torchvision"),
        install="pip install lpips torchvision",
        default=False,
    ),
)
def measure_lpips(reference: np.ndarray, degraded: np.ndarray) -> tuple[float]:
    return (lpips(reference, degraded),)


def scales_that_fit(height: int, width: int) -> int:
    """How many scales of MS-SSIM have a window's side at least; not less than one."""
    side = min(height, width)
    fit = (side >> scale >= WINDOW for scale in range(len(SCALE_WEIGHTS)))
    return max(1, sum(fit))


def _ssim(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Of (H, W) images: SSIM, and its factor of contrast and structure."""
    down, right = (_window(min(WINDOW, (side - 1) // 2 * 2 + 1)) for side in x.shape)
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    similarity = contrast = 0.0
    for a, b in _pieces(x, y, len(down)):
        a, b = a.astype(np.float64), b.astype(np.float64)
        maps = np.stack([a, b, a * a, b * b, a * b])
        mean_a, mean_b, aa, bb, ab = _filtered(_filtered(maps, down, 1), right, 2)
        variances = aa - mean_a**2 + bb - mean_b**2
        second = (2 * (ab - mean_a * mean_b) + c2) / (variances + c2)
        first = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        similarity += (first * second).sum()
        contrast += second.sum()
    places = (x.shape[0] - len(down) + 1) * (x.shape[1] - len(right) + 1)
    return similarity / places, contrast / places


def _filtered(maps: np.ndarray, window: np.ndarray, axis: int) -> np.ndarray:
    """Weighted means of neighbours along an axis, where all of them are there."""
    length = maps.shape[axis] - len(window) + 1
    parts = (maps.take(range(i, i + length), axis) for i in range(len(window)))
    return sum(weight * part for weight, part in zip(window, parts))


def _pieces(x: np.ndarray, y: np.ndarray, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Parts of both, each with all columns, in which every window of so many rows lies once."""
    step = max(1, _PIECE // x.shape[1])
    for start in range(0, len(x) - rows + 1, step):
        part = slice(start, start + step + rows - 1)
        yield x[part], y[part]


def _channels(*images: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    for channel in range(images[0].shape[2]):
        yield tuple(image[..., channel] for image in images)


def _halved(image: np.ndarray) -> np.ndarray:
    """(H, W) -> (H // 2, W // 2) float32, the means of 2 x 2 pixels."""
    height, width = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
    rows = image[0:height:2].astype(np.float32) + image[1:height:2]
    return (rows[:, 0:width:2] + rows[:, 1:width:2]) / 4


def _window(size: int) -> np.ndarray:
    window = np.exp(-0.5 * ((np.arange(size) - size // 2) / SIGMA) ** 2)
    return window / window.sum()


@lru_cache(maxsize=3)
def _lpips_network(net: str) -> tuple[Any, Any]:
    """The network, and what makes a tensor of an RGB image."""
    try:
        import lpips as package
    except ImportError as error:
        raise ImportError("LPIPS needs the package lpips: pip install lpips torchvision") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision in an old way
        return package.LPIPS(net=net, verbose=False).requires_grad_(False), package.im2tensor


def _check(*images: np.ndarray) -> list[np.ndarray]:
    """The images as (H, W, C)."""
    found = [np.asarray(image) for image in images]
    for image in found:
        if image.ndim not in (2, 3) or image.dtype != np.uint8 or not image.size:
            raise ValueError(
                f"images must be uint8, (H, W) or (H, W, C), got {image.dtype} of shape "
                f"{image.shape}"
            )
    if len({image.shape for image in found}) > 1:
        raise ValueError(f"images differ in shape: {', '.join(str(x.shape) for x in found)}")
    return [image[..., None] if image.ndim == 2 else image for image in found]
