"""The kinds of models that can be trained."""

from __future__ import annotations

from ..recipe import AudioRecipe, Recipe
from .task import Task


def make_task(recipe: Recipe) -> Task:
    """What the training of a recipe's kind of model has of its own."""
    if isinstance(recipe, AudioRecipe):
        from .audio.task import AudioTask

        return AudioTask(recipe)
    from .image.task import ImageTask

    return ImageTask(recipe)
