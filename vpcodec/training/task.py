"""The parts of training that depend on the modality."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from ..recipe import Recipe
from .crops import Crops
from .evaluation import HeldOut
from .log import RunLog


class Task(ABC):
    """Makes the parts of training that differ between audio and images.

    Attributes:
        terms: names of the loss terms that are functions of the output.
        shown: the term that progress lines show.
        forward_options: arguments of the model's forward pass in training, after the batch.
        speed: how speed is measured: its name in metrics.jsonl, the array elements of a batch per
            unit, and the unit in progress lines.
    """

    terms: tuple[str, ...]
    shown: str
    speed: tuple[str, float, str]
    forward_options: tuple[Any, ...] = ()

    def __init__(self, recipe: Recipe) -> None:
        self.recipe: Any = recipe

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the loss terms that are functions of the output."""
        loss = self.recipe.loss
        return {name: getattr(loss, name) for name in (*self.terms, "adversarial", "feature")}

    @abstractmethod
    def losses(self) -> nn.Module:
        """A module from target and output to the terms: scalars, unweighted."""

    @abstractmethod
    def discriminators(self) -> nn.Module:
        """A module from a batch to hidden activations, then logits, of each discriminator."""

    @abstractmethod
    def crops(self, *, process: int, processes: int, workers: int) -> Crops:
        """The training data of one process."""

    @abstractmethod
    def held_out(self) -> HeldOut:
        """The held-out data of a recipe that has any."""

    @abstractmethod
    def show(self, log: RunLog, step: int, name: str, sample: torch.Tensor) -> None:
        """Log one item of a batch for people to hear or see."""
