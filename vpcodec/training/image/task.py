"""Training of image tokenizers."""

from __future__ import annotations

import torch
from torch import nn

from ...recipe import ImageRecipe
from ..log import RunLog
from ..task import Task
from .data import ImageCrops
from .discriminators import Discriminators
from .evaluation import HeldOutImages
from .losses import ImageLoss


class ImageTask(Task):
    """Crops of images, losses of pixels and features, and a patch discriminator."""

    recipe: ImageRecipe
    terms = ("l1", "mse", "gradient", "ms_ssim", "lpips")
    shown = "l1"
    speed = ("megapixels_per_second", 3e6, "MP/s")

    def losses(self) -> nn.Module:
        return ImageLoss(self.recipe.loss)

    def discriminators(self) -> nn.Module:
        return Discriminators(self.recipe.discriminator)

    def crops(self, *, process: int, processes: int, workers: int) -> ImageCrops:
        return ImageCrops(
            self.recipe.data,
            hop_length=self.recipe.model.hop_length,
            seed=self.recipe.train.seed,
            process=process,
            processes=processes,
            workers=workers,
        )

    def held_out(self) -> HeldOutImages:
        return HeldOutImages(self.recipe.eval, self.recipe.model)

    def show(self, log: RunLog, step: int, name: str, sample: torch.Tensor) -> None:
        log.image(step, name, (sample + 1) / 2)
