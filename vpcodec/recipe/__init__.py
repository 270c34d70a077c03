"""Recipes: the model, data and settings of a training run, read from a YAML file.

Every field is documented here, and docs/recipes.md is generated from it. Unknown keys, wrong types
and impossible combinations are refused with the path of the field.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ..config import ConfigError, explain, model_class
from .audio import AudioRecipe
from .base import Recipe
from .image import ImageRecipe
from .lm import LMRecipe

__all__ = [
    "AnyRecipe",
    "AudioRecipe",
    "ImageRecipe",
    "LMRecipe",
    "Recipe",
    "load_recipe",
    "parse_recipe",
]

AnyRecipe = Recipe | LMRecipe

RECIPES: dict[str, type[AnyRecipe]] = {
    "audio": AudioRecipe,
    "image": ImageRecipe,
    "lm": LMRecipe,
}
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def load_recipe(
    path: str | Path, overrides: list[str] | None = None, *, name: str | None = None
) -> AnyRecipe:
    """Read a recipe file and apply overrides such as `optim.lr=3e-4` (values are YAML).

    Args:
        path: of the file.
        overrides: fields to set.
        name: of the model, where neither says it, such as that of its training run; None: the
            file's.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a type is wrong; the message
            names the file and the field.
    """
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file ({str(error).splitlines()[0]})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections")
    for item in overrides or []:
        _override(data, item)
    if isinstance(model := data.get("model"), dict):
        model.setdefault("name", _model_name(name or Path(path).stem))
    try:
        return parse_recipe(_numbers(data))
    except ConfigError as error:
        field = str(error).partition(":")[0]
        keys = [item.partition("=")[0] for item in overrides or []]
        own = any(f"{key}.".startswith(f"{field}.") or field.startswith(f"{key}.") for key in keys)
        raise ConfigError(f"{'command line' if own else path}: {error}") from None


def parse_recipe(data: dict[str, Any]) -> AnyRecipe:
    """Build a recipe from a plain dict; `model.kind` tells what is trained, an audio codec by
    default.

    Raises:
        ConfigError: a field is wrong; the message names the first one.
    """
    model = data.get("model")
    kind = model.get("kind") if isinstance(model, dict) else None
    if kind != "lm":  # which is no kind of codec
        try:
            kind = model_class(model).model_fields["kind"].default
        except ConfigError as error:
            raise ConfigError(f"model.{error}") from None
    try:
        return RECIPES[kind].model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error) + _suggestion(RECIPES[kind], error)) from None


def _suggestion(recipe: type[BaseModel], error: ValidationError) -> str:
    """The name that is nearest to a field that does not exist."""
    first = error.errors()[0]
    if first["type"] != "extra_forbidden":
        return ""
    *parents, wrong = (str(part) for part in first["loc"])
    models: list[type[BaseModel]] = [recipe]
    for part in parents:
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        models = [model for field in fields for model in _models(field.annotation)] or models
    names = {name for model in models for name in model.model_fields}
    near = difflib.get_close_matches(wrong, sorted(names), 1)
    return f"; did you mean {near[0]}?" if near else ""


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _model_name(text: str) -> str:
    """A text as the name of a model."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-")[:64] or "model"


def _override(data: dict[str, Any], item: str) -> None:
    """Set one field of a recipe.

    Raises:
        ConfigError: the override is not of the form section.field=value.
    """
    import yaml

    key, eq, value = item.partition("=")
    *parents, leaf = key.split(".")
    if not eq or not all((*parents, leaf)):
        raise ConfigError(f"override {item!r} is not of the form section.field=value")
    node = data
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {item!r}: {part} is not a section")
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"override {item!r}: {value!r} is not a YAML value") from None


def _numbers(data: Any) -> Any:
    """Convert numbers such as 3e-4, which YAML 1.1 reads as text."""
    if isinstance(data, dict):
        return {key: _numbers(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_numbers(value) for value in data]
    if isinstance(data, str) and NUMBER.fullmatch(data):
        return float(data)
    return data
