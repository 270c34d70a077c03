"""Metrics of held-out data, computed in the background of a training run: see `Workers`."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import suppress
from typing import Self

import numpy as np

from ..metrics.base import Clip
from ..metrics.image import BEST_PSNR, ms_ssim, psnr, ssim
from ..metrics.registry import MEASURES
from .pool import Pool

METRICS = ("pesq_wb", "stoi", "si_sdr", "mel_distance")
IMAGE_METRICS = ("psnr", "ssim", "ms_ssim")


class Workers:
    """Processes of the lowest priority that compute the metrics below; see `pool.Pool`.

    Args:
        count: most processes at a time.
    """

    def __init__(self, count: int) -> None:
        self._pool = Pool(count, nice=19)

    def submit(
        self,
        reference: np.ndarray,
        degraded: np.ndarray,
        rate: int,
        names: tuple[str, ...] = METRICS,
    ) -> Future[dict[str, float]]:
        """Compare two signals (T,), as float32, in the background.

        Returns:
            A future of `measure`; its exception is a WorkerError.

        Raises:
            ValueError: signals of other shapes or of different lengths.
        """
        if reference.ndim != 1 or reference.shape != degraded.shape:
            raise ValueError(f"signals of shapes {reference.shape} and {degraded.shape}, not (T,)")
        pair = (np.ascontiguousarray(x, np.float32) for x in (reference, degraded))
        return self._pool.submit(measure, *pair, rate, names)

    def submit_image(self, reference: np.ndarray, degraded: np.ndarray) -> Future[dict[str, float]]:
        """Compare two images (H, W, C), uint8, in the background.

        Returns:
            A future of `measure_image`; its exception is a WorkerError.

        Raises:
            ValueError: other arrays, or of different shapes.
        """
        if any(x.ndim != 3 or x.dtype != np.uint8 for x in (reference, degraded)):
            raise ValueError("images are not (H, W, C) uint8")
        if reference.shape != degraded.shape:
            raise ValueError(f"images of shapes {reference.shape} and {degraded.shape}")
        return self._pool.submit(measure_image, reference, degraded)

    @property
    def pids(self) -> list[int]:
        """Process ids of the running processes."""
        return self._pool.pids

    def close(self) -> None:
        """Kill all processes; pending futures get a WorkerError or are cancelled."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def measure(
    reference: np.ndarray, degraded: np.ndarray, rate: int, names: tuple[str, ...] = METRICS
) -> dict[str, float]:
    """The values of the named metrics whose packages are installed; raises as `metrics.audio`."""
    pair = Clip(reference, rate), Clip(degraded, rate)
    found: dict[str, float] = {}
    for entry in MEASURES:
        wanted = [metric.name in names and not metric.missing for metric in entry.metrics]
        if any(wanted):
            with suppress(ImportError):
                values = zip(entry.metrics, entry.function(*pair), wanted, strict=True)
                found |= {metric.name: value for metric, value, take in values if take}
    return found


def measure_image(reference: np.ndarray, degraded: np.ndarray) -> dict[str, float]:
    """The value of each of IMAGE_METRICS, PSNR at most BEST_PSNR; raises as `metrics.image`."""
    return {
        "psnr": min(psnr(reference, degraded), BEST_PSNR),
        "ssim": ssim(reference, degraded),
        "ms_ssim": ms_ssim(reference, degraded),
    }
