"""What a quantizer without a codebook in training asks of a run: calibration, and codebooks."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch
from accelerate import Accelerator

from ..models import Autoencoder
from ..quantizers import VP
from ..recipe import Recipe
from .crops import Crops
from .hardware import to_device
from .log import RunLog

LATENTS_PER_CODE = 64  # that a codebook is made of after training
QUICK_ITERATIONS = 5  # of k-means, for a codebook that is only evaluated


class CodebookDuties:
    """Sets the strength of the perturbation on the way, and makes the codebook at the end.

    Args:
        recipe: of the run.
        data: what codebooks are made of.
        accelerator: processes and device.

    Attributes:
        needed: whether the model's codebook is made after training, by this run.
    """

    def __init__(self, recipe: Recipe, data: Crops, accelerator: Accelerator) -> None:
        self._recipe, self._data, self._accelerator = recipe, data, accelerator
        self._every = getattr(recipe.model.quantizer, "calibrate_every", 0)
        self.needed = recipe.model.quantizer.type == "vp" and not recipe.train.decoder_only

    def calibrate(self, quantizer: Any, step: int, log: RunLog) -> None:
        """Let the quantizer set its eta when it is time to: in one process, for all."""
        if not self.needed or not self._every or step % self._every:
            return
        if self._accelerator.is_main_process:
            try:
                with log.console.status("calibrating the perturbation"):
                    quantizer.calibrate(seed=step)
            except ValueError as error:
                log.message(f"step {step}: eta stays as it is: {error}")
        if self._accelerator.num_processes > 1:
            found = torch.tensor([float(quantizer.eta), quantizer.mh_steps])
            found = found.to(self._accelerator.device)
            torch.distributed.broadcast(found, 0)
            quantizer.eta.fill_(found[0])
            quantizer.mh_steps = int(found[1])

    def make_quickly(self, model: Autoencoder) -> bool:
        """Give a model a codebook to evaluate it with, of the latents that it remembers.

        Returns:
            Whether it has one; there may be too few latents so far.
        """
        if model.quantizer.fitted:
            return True
        if not isinstance(model.quantizer, VP):
            return False
        try:
            model.quantizer.fit(max_iterations=QUICK_ITERATIONS)
        except ValueError:
            return False
        return True

    @torch.no_grad()
    def make(self, model: Autoencoder, log: RunLog) -> None:
        """Make the codebook of a model in eval mode of its latents of training crops.

        Raises ValueError where there are too few that differ.
        """
        data = self._data
        wanted = LATENTS_PER_CODE * model.quantizer.codebook_size
        number = -(-wanted // (data.tokens * self._recipe.data.batch_size))
        device = self._accelerator.device
        with (
            log.console.status(f"making the codebook of {wanted:,} latents"),
            closing(data.batches(0, number)) as batches,
        ):
            latents = torch.cat(
                [
                    model.encoder(to_device(batch, device)).float().flatten(0, -2)
                    for batch in batches
                ]
            )
            result = model.quantizer.fit(latents, seed=self._recipe.train.seed)
        log.message(f"codebook of {len(latents):,} latents: mean squared error {result.error:.4f}")
