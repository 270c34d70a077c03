"""Training of audio codecs."""

from __future__ import annotations

import torch
from torch import nn

from ...quantizers.base import processes
from ...recipe import AudioRecipe
from ..hardware import TrainingError
from ..log import RunLog
from ..task import Task
from .data import AudioCrops
from .discriminators import Discriminators
from .evaluation import HeldOutAudio
from .losses import ReconstructionLoss


class AudioTask(Task):
    """Crops of recordings; spectral, auditory and perceptual losses; audio discriminators."""

    recipe: AudioRecipe
    terms = ("wave", "stft", "mel", "loudness", "intelligibility", "perceptual")
    shown = "mel"

    def __init__(self, recipe: AudioRecipe) -> None:
        super().__init__(recipe)
        self.rate = recipe.model.sample_rate
        if recipe.loss.energy:
            self.forward_options = (2,)  # outputs per crop
        self.speed = ("audio_seconds_per_second", self.rate, "s/s")

    def losses(self) -> nn.Module:
        return ReconstructionLoss(self.recipe.loss, self.rate)

    def discriminators(self) -> nn.Module:
        if self.recipe.discriminator.per_step and processes() > 1:
            raise TrainingError("discriminator.per_step works with one process only")
        return Discriminators(self.recipe.discriminator)

    def crops(self, *, process: int, processes: int, workers: int) -> AudioCrops:
        return AudioCrops(
            self.recipe.data,
            sample_rate=self.rate,
            hop_length=self.recipe.model.hop_length,
            seed=self.recipe.train.seed,
            process=process,
            processes=processes,
            workers=workers,
        )

    def held_out(self) -> HeldOutAudio:
        return HeldOutAudio(self.recipe.eval, self.recipe.model)

    def show(self, log: RunLog, step: int, name: str, sample: torch.Tensor) -> None:
        log.audio(step, name, sample, self.rate)
