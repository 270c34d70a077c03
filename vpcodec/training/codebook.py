"""The needs of a quantizer beyond training steps: calibration, and a codebook afterwards."""

from __future__ import annotations

from contextlib import closing

import torch
from accelerate import Accelerator

from ..models import Autoencoder
from ..quantizers import NoCodebookError, Quantizer
from ..recipe import Recipe
from .crops import Crops
from .hardware import to_device
from .log import RunLog

LATENTS_PER_CODE = 64  # for the codebook that is fitted after training
QUICK_ITERATIONS = 5  # of k-means, for codebooks that are only evaluated


class CodebookDuties:
    """Calls the parts of the quantizer contract that are not part of training steps.

    With `train.decoder_only` the quantizer stays unchanged, and there is nothing to do.

    Args:
        recipe: recipe of the run.
        data: crops that codebooks are fitted to.
        accelerator: processes and device.
    """

    def __init__(self, recipe: Recipe, data: Crops, accelerator: Accelerator) -> None:
        self._recipe, self._data, self._accelerator = recipe, data, accelerator
        self._frozen = recipe.train.decoder_only

    def due(self, quantizer: Quantizer) -> bool:
        """Whether this run fits a codebook after training."""
        return quantizer.fit_after_training and not self._frozen

    def begin(self, quantizer: Quantizer) -> None:
        """Drop a codebook that was fitted to earlier weights, because training continues."""
        if not self._frozen:
            quantizer.forget_codebook()

    def calibrate(self, quantizer: Quantizer, step: int, log: RunLog) -> None:
        """Calibrate the strength of the perturbation, if it is due at this step."""
        every = self._recipe.calibrate_every
        if self._frozen or not every or step % every:
            return
        try:
            with log.console.status("calibrating the perturbation"):
                quantizer.calibrate(seed=step)
        except ValueError as error:
            log.message(f"step {step}: eta is unchanged: {error}")

    def make_quickly(self, quantizer: Quantizer) -> bool:
        """Fit a codebook for an evaluation to the latents in the quantizer's queue.

        Returns:
            Whether there is a codebook; there may be too few latents so far.
        """
        try:
            if not quantizer.fitted:
                quantizer.fit(max_iterations=QUICK_ITERATIONS)
        except (NoCodebookError, ValueError):
            return False
        return True

    @torch.no_grad()
    def make(self, quantizer: Quantizer, model: Autoencoder, log: RunLog) -> None:
        """Fit the codebook of a quantizer to latents of training crops.

        Args:
            quantizer: the quantizer; not necessarily that of `model`.
            model: computes the latents; in eval mode.
            log: log of the run.

        Raises:
            ValueError: too few different latents.
        """
        data = self._data
        wanted = LATENTS_PER_CODE * quantizer.codebook_size
        number = -(-wanted // (data.tokens * self._recipe.data.batch_size))
        device = self._accelerator.device
        with (
            log.console.status(f"fitting the codebook to {wanted:,} latents"),
            closing(data.batches(0, number)) as batches,
        ):
            latents = torch.cat(
                [
                    model.encoder(to_device(batch, device)).float().flatten(0, -2)
                    for batch in batches
                ]
            )
            found = quantizer.fit(latents, seed=self._recipe.train.seed)
        if found is not None:
            log.message(
                f"codebook of {len(latents):,} latents: mean squared error {found.error:.4f}"
            )
