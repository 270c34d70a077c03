"""The modalities that models can be trained for."""

from __future__ import annotations

from ..recipe import AudioRecipe, Recipe
from .task import Task


def make_task(recipe: Recipe) -> Task:
    """The task of a recipe's modality."""
    if isinstance(recipe, AudioRecipe):
        from .audio.task import AudioTask

        return AudioTask(recipe)
    from .image.task import ImageTask

    return ImageTask(recipe)
