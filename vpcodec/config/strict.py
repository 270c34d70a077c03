"""What all configurations share: strict fields, unions selected by a tag, errors in one line."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Width = Annotated[int, Field(gt=0, le=2**13)]  # of a layer
Taps = Annotated[int, Field(gt=0, le=2**12)]  # of a filter, windows and dilations
Factor = Annotated[int, Field(gt=0, le=64)]  # of a width
Depth = Annotated[int, Field(ge=0, le=256)]  # layers in a row
Share = Annotated[float, Field(ge=0, le=1)]
UNKNOWN_TYPE = "unknown_type"
TAGS = {"fsp", "vp", "fsq", "vq", "simvq", "lfq", "audio", "libritts", "image", "huggingface"}
TEXTUAL = ("str", "Literal", "Config", "Corpus")  # in the names of types that accept text
TAGGED = {"quantizer", "noise", "data"}  # fields that are unions; lists of them have numbers


class ConfigError(ValueError):
    """A configuration or recipe that cannot be used; the message names the field."""


class Strict(BaseModel):
    """Refuses unknown fields, infinite numbers, and text or booleans in place of numbers."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        defer_build=True,  # of most classes: a program needs few of them
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        kind = str(cls.model_fields[str(info.field_name)].annotation)
        truth, text = "bool" in kind, any(word in kind for word in TEXTUAL)
        for item in value if isinstance(value, list | tuple) else [value]:
            if truth and not isinstance(item, bool):
                raise ValueError("should be true or false")
            if not truth and isinstance(item, bool):
                raise ValueError("should not be true or false")
        if not text and isinstance(value, str):
            raise ValueError("should be a number")
        return value


def by_type(default: str, *types: str) -> Discriminator:
    """A discriminator that selects the member of a union by its field `type`."""

    def tag(value: Any) -> str:
        found = value.get("type", default) if isinstance(value, dict) else value
        return str(getattr(found, "type", found))

    return Discriminator(
        tag,
        custom_error_type=UNKNOWN_TYPE,
        custom_error_message=f"must be one of {', '.join(types)}",
    )


def explain(error: ValidationError) -> str:
    """The first error, as one line that begins with the path of the field."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    for at in range(len(path) - 1, 0, -1):
        if path[at] in TAGS and (path[at - 1] in TAGGED or path[at - 1].isdigit()):
            del path[at]  # pydantic's tag of the union, not a field
    if first["type"] == UNKNOWN_TYPE:
        path.append("type")
    where = ".".join(path)
    reason = first["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}" if where else reason
