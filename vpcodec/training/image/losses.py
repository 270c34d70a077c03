"""Losses of decoded images: pixels, gradients, structure, and features of a frozen network."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...metrics.image import K1, K2, SCALE_WEIGHTS, SIGMA, WINDOW, scales_that_fit
from ...recipe.image import LossConfig
from ..hardware import TrainingError

LPIPS_SIDE = 64  # pixels; the backbones need as many, so smaller crops are enlarged


class LPIPSError(TrainingError):
    """The network of the loss `lpips` cannot be loaded; the message says what is missing."""


class ImageLoss(nn.Module):
    """Distances between images in [-1, 1], averaged over the images of a batch.

    l1: mean |x - y|. mse: mean (x - y)^2. gradient: mean |dx - dy| of differences between
    neighbouring pixels along both axes, averaged over scales, each of which averages 2 x 2 pixels
    of the previous one; scales of less than 2 pixels are left out. ms_ssim: 1 - MS-SSIM, as in
    `metrics.image`. lpips: LPIPS of the package `lpips`.

    Args:
        config: weights and settings of the losses.

    Raises:
        LPIPSError: the package `lpips` or its backbone cannot be loaded.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        offsets = torch.arange(WINDOW) - WINDOW // 2
        window = torch.exp(-0.5 * (offsets / SIGMA).square())
        self.register_buffer("window", window / window.sum(), persistent=False)
        self.lpips: nn.Module | None = _load_lpips(config.lpips_net) if config.lpips else None

    def forward(self, target: torch.Tensor, output: torch.Tensor) -> dict[str, torch.Tensor]:
        """The unweighted loss terms of (B, 3, H, W) target and output.

        Returns:
            {"l1"} and, if they have a weight, {"mse", "gradient", "ms_ssim", "lpips"}: float32
            scalars.
        """
        config = self.config
        with torch.autocast(target.device.type, enabled=False):
            x, y = target.float(), output.float()
            terms = {"l1": F.l1_loss(y, x)}
            if config.mse:
                terms["mse"] = F.mse_loss(y, x)
            if config.gradient:
                terms["gradient"] = self._gradient(y - x)
            if config.ms_ssim:
                terms["ms_ssim"] = 1 - self._ms_ssim(x, y)
            if self.lpips is not None:
                terms["lpips"] = self._lpips(x, y)
        return terms

    def _gradient(self, error: torch.Tensor) -> torch.Tensor:
        terms = []
        for scale in range(self.config.gradient_scales):
            error = F.avg_pool2d(error, 2) if scale else error
            if min(error.shape[2:]) < 2:
                break
            terms.append((error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2)
        return torch.stack(terms).mean()

    def _ms_ssim(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        scales = scales_that_fit(*x.shape[2:])
        weights = SCALE_WEIGHTS[:scales]
        product: Any = 1.0
        x, y = (x + 1) / 2, (y + 1) / 2  # SSIM is defined for values from 0, black
        for scale, weight in enumerate(weights):
            if scale:
                x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
            ssim, contrast = self._ssim(x, y)
            value = ssim if scale == scales - 1 else contrast
            # At 0 and below, the gradient of a power is undefined or infinite.
            product = product * value.clamp(min=1e-4) ** (weight / sum(weights))
        return product.mean()

    def _ssim(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """SSIM, and its contrast and structure factor, (B, 3) each."""
        # In another layout, cuDNN would compute the products in TF32, too coarse for variances.
        both = torch.cat([x, y, x * x, y * y, x * y], 1).contiguous()
        channels = both.shape[1]
        for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
            kernel = self.window.view(shape).expand(channels, -1, -1, -1)
            both = F.conv2d(both, kernel, groups=channels)
        mean_x, mean_y, xx, yy, xy = both.chunk(5, 1)
        c1, c2 = K1**2, K2**2
        covariance = xy - mean_x * mean_y
        variances = xx - mean_x.square() + yy - mean_y.square()
        contrast = (2 * covariance + c2) / (variances + c2)
        luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
        return (luminance * contrast).mean((2, 3)), contrast.mean((2, 3))

    def _lpips(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if min(x.shape[2:]) < LPIPS_SIDE:
            scale = LPIPS_SIDE / min(x.shape[2:])
            size = [max(LPIPS_SIDE, round(side * scale)) for side in x.shape[2:]]
            x, y = (F.interpolate(z, size, mode="bilinear") for z in (x, y))
        return self.lpips(x, y).mean()


def _load_lpips(net: str) -> nn.Module:
    """The frozen LPIPS network; its input is images in [-1, 1]."""
    try:
        import lpips
    except ImportError as error:
        raise LPIPSError(
            f"loss.lpips needs the package {error.name}: pip install lpips torchvision"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls a deprecated API of torchvision
            network = lpips.LPIPS(net=net, verbose=False)
    except Exception as error:  # the network, caches and damaged files raise many
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise LPIPSError(f"loss.lpips: the backbone {net} cannot be loaded ({reason})") from None
    return network.requires_grad_(False).eval()
