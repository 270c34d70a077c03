"""What a quantizer asks of a run: calibration on the way, and a codebook after training."""

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

LATENTS_PER_CODE = 64  # that a codebook is made of after training
QUICK_ITERATIONS = 5  # of k-means, for a codebook that is only evaluated


class CodebookDuties:
    """Does for a quantizer what its contract asks for beside the steps of training.

    With `train.decoder_only` the quantizer stays as it is, and there is nothing to do.

    Args:
        recipe: of the run.
        data: what codebooks are made of.
        accelerator: processes and device.
    """

    def __init__(self, recipe: Recipe, data: Crops, accelerator: Accelerator) -> None:
        self._recipe, self._data, self._accelerator = recipe, data, accelerator
        self._frozen = recipe.train.decoder_only

    def due(self, quantizer: Quantizer) -> bool:
        """Whether a codebook is made after training, by this run."""
        return quantizer.fit_after_training and not self._frozen

    def begin(self, quantizer: Quantizer) -> None:
        """Training goes on: a codebook that was made after it is of other weights."""
        if not self._frozen:
            quantizer.forget_codebook()

    def calibrate(self, quantizer: Quantizer, step: int, log: RunLog) -> None:
        """Let the quantizer set the strength of its perturbation when it is time to."""
        every = self._recipe.calibrate_every
        if self._frozen or not every or step % every:
            return
        try:
            with log.console.status("calibrating the perturbation"):
                quantizer.calibrate(seed=step)
        except ValueError as error:
            log.message(f"step {step}: eta stays as it is: {error}")

    def make_quickly(self, quantizer: Quantizer) -> bool:
        """Make a codebook to evaluate with, of the latents that the quantizer remembers.

        Returns:
            Whether it has one; there may be too few latents so far.
        """
        try:
            if not quantizer.fitted:
                quantizer.fit(max_iterations=QUICK_ITERATIONS)
        except (NoCodebookError, ValueError):
            return False
        return True

    @torch.no_grad()
    def make(self, quantizer: Quantizer, model: Autoencoder, log: RunLog) -> None:
        """Make the codebook of a quantizer of a model's latents of training crops.

        Args:
            quantizer: may be another than that of the model.
            model: in eval mode.
            log: told of it.

        Raises:
            ValueError: too few latents that differ.
        """
        data = self._data
        wanted = LATENTS_PER_CODE * quantizer.codebook_size
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
            found = quantizer.fit(latents, seed=self._recipe.train.seed)
        if found is not None:
            log.message(
                f"codebook of {len(latents):,} latents: mean squared error {found.error:.4f}"
            )
