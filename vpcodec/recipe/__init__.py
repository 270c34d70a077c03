"""How a model is trained: a recipe, the contents of a YAML file.

Every field is documented here; docs/recipes.md is made of it. Unknown keys, wrong types and
combinations that cannot work are refused with the path of the field.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..config import ConfigError, explain, model_class
from .audio import AudioRecipe
from .base import Recipe
from .image import ImageRecipe

__all__ = ["AudioRecipe", "ImageRecipe", "Recipe", "load_recipe", "parse_recipe"]

KINDS: dict[str, type[Recipe]] = {"audio": AudioRecipe, "image": ImageRecipe}
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply overrides such as `optim.lr=3e-4` (values are YAML).

    Raises:
        ConfigError: unreadable file, unknown key, wrong type; the message names file and field.
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
    try:
        return parse_recipe(_numbers(data))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_recipe(data: dict[str, Any]) -> Recipe:
    """The recipe of a plain dict; `model.kind` tells which, and is audio where it is missing.

    Raises:
        ConfigError: naming the first field that is wrong.
    """
    model = data.get("model")
    try:
        kind = model_class(model).model_fields["kind"].default
    except ConfigError as error:
        raise ConfigError(f"model.{error}") from None
    try:
        return KINDS[kind].model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def _override(data: dict[str, Any], item: str) -> None:
    """Set one field of a recipe.

    Raises:
        ConfigError: not of the form section.field=value.
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
    """The same with numbers such as 3e-4, which YAML 1.1 reads as text."""
    if isinstance(data, dict):
        return {key: _numbers(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_numbers(value) for value in data]
    if isinstance(data, str) and NUMBER.fullmatch(data):
        return float(data)
    return data
