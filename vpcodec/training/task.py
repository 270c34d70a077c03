"""What the training of one kind of model has of its own."""

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
    """Makes the parts of a training that depend on whether it is of audio or of images.

    Attributes:
        terms: names of the loss terms that are functions of the output.
        shown: the one that stands in progress lines.
        forward_options: of the model's forward pass in training, beside the batch.
        speed: what is counted per second: its name in metrics.jsonl, numbers of a batch that make
            one of it, its unit in progress lines.
    """

    terms: tuple[str, ...]
    shown: str
    speed: tuple[str, float, str]
    forward_options: tuple[Any, ...] = ()

    def __init__(self, recipe: Recipe) -> None:
        self.recipe: Any = recipe

    @property
    def weights(self) -> dict[str, float]:
        """Of the loss terms that are functions of the output."""
        loss = self.recipe.loss
        return {name: getattr(loss, name) for name in (*self.terms, "adversarial", "feature")}

    @abstractmethod
    def losses(self) -> nn.Module:
        """Takes target and output, gives the terms as scalars, unweighted."""

    @abstractmethod
    def discriminators(self) -> nn.Module:
        """Takes a batch, gives per discriminator its hidden activations, then its logits."""

    @abstractmethod
    def crops(self, *, process: int, processes: int, workers: int) -> Crops:
        """The training data of one process."""

    @abstractmethod
    def held_out(self) -> HeldOut:
        """The data of evaluations; the recipe has some."""

    @abstractmethod
    def show(self, log: RunLog, step: int, name: str, sample: torch.Tensor) -> None:
        """Give a person one item of a batch."""
