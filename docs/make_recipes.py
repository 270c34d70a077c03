"""Generates docs/recipes.md from the models in vpcodec/recipe and vpcodec/config.

python docs/make_recipes.py          # write it
python docs/make_recipes.py --check  # exit 1 if it is not up to date
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from vpcodec import config
from vpcodec.recipe import audio, base, image, lm, quantizers

WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
TARGET = Path(__file__).with_name("recipes.md")
HEAD = """# Recipes

A recipe is a YAML file that says what to train and how. `model.kind` is `audio`, `image` or `lm`;
the sections of each are below. `model` describes the model and stays with it. All other sections
end with training, including `quantizer`: how the quantizer that `model.quantizer` selects is
trained. Fields that a recipe omits have their defaults. Unknown fields and wrong values are
refused, and the message names the field.

    vpcodec train recipes/speech_3k.yaml data.train=my_recordings/ optim.lr=1e-3 --run runs/mine

Overrides on the command line are `section.field=value`, with YAML values:
`'data.train=[speech/, {path: music/, weight: 0.2}]'`. Repeat the command to resume. With
`--processes 4` it trains in four processes on this machine, one per GPU; `torchrun -m vpcodec train
...` and `accelerate launch -m vpcodec train ...` work across machines. `data.batch_size` is per
process.

This page is generated from the code by `python docs/make_recipes.py`.
"""
NAMES = ("fsp", "vp", "fsq", "vq", "lfq", "simvq")
TRAINING = {
    get_args(model.model_fields["type"].annotation)[0]: model
    for model in quantizers.QuantizerTrainingConfig.__subclasses__()
}
QUANTIZERS = [
    *((f"Quantizer `{name}`", config.QUANTIZERS[name]) for name in NAMES),
    *((f"`quantizer`: training of `{name}`", TRAINING[name]) for name in NAMES),
]
CHAPTERS: list[tuple[str, list[tuple[str, type[BaseModel]]]]] = [
    (
        "Audio",
        [
            ("`model`", config.AudioConfig),
            ("`data`", audio.DataConfig),
            ("A corpus", audio.AudioCorpus),
            ("LibriTTS", audio.LibriTTSCorpus),
            ("A dataset of the Hugging Face Hub", audio.HuggingFaceAudio),
            ("`loss`", audio.LossConfig),
            ("`discriminator`", audio.DiscriminatorConfig),
            ("`eval`", audio.EvalConfig),
        ],
    ),
    (
        "Images",
        [
            ("`model`", config.ImageConfig),
            ("`data`", image.DataConfig),
            ("A corpus", image.ImageCorpus),
            ("A dataset of the Hugging Face Hub", image.HuggingFaceImages),
            ("`loss`", image.LossConfig),
            ("`discriminator`", image.DiscriminatorConfig),
            ("`eval`", image.EvalConfig),
        ],
    ),
    (
        "Language models",
        [
            ("`model`", config.LMConfig),
            ("`data`", lm.TokenData),
            ("A corpus of tokens", lm.TokenCorpus),
            ("`eval`", lm.LMEvaluation),
        ],
    ),
    (
        "All",
        [("`optim`", base.OptimConfig), ("`train`", base.TrainConfig), *QUANTIZERS],
    ),
]


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for chapter, sections in CHAPTERS:
        parts.append(f"\n## {chapter}")
        for title, model in sections:
            parts += [f"\n### {title}\n", describe(model), *table(model)]
    return "\n".join(parts).rstrip() + "\n"


def describe(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split()) + "\n"


def table(model: type[BaseModel]) -> list[str]:
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        cells = (
            f"`{name}`",
            type_name(field.annotation),
            default(field),
            (field.description or "Selects this alternative.").replace("|", "\\|"),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def type_name(annotation: Any) -> str:
    """A type in words."""
    if annotation in WORDS:
        return WORDS[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return "two numbers"
    if origin is tuple:
        return f"list of {type_name(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"`{get_args(annotation.model_fields['type'].annotation)[0]}`"
    if type(None) in arguments:
        rest = [argument for argument in arguments if argument is not type(None)]
        return f"{type_name(rest[0]) if len(rest) == 1 else union(rest)} or null"
    return union(arguments)


def union(members: Iterable[Any]) -> str:
    """The members of a union, by their tags."""
    names = [get_args(member.__origin__.model_fields["type"].annotation)[0] for member in members]
    return " or ".join(f"`{name}`" for name in names)


def default(field: Any) -> str:
    if field.default_factory is not None:
        return "`{type: fsp}`"
    if field.default is PydanticUndefined:
        return "required"
    value = field.default
    if isinstance(value, tuple):
        return f"`[{', '.join(str(item) for item in value)}]`"
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower()}`".replace("none", "null")
    return f"`{value}`" if value != "" else "empty"


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv[1:]:
        sys.exit(0 if TARGET.exists() and TARGET.read_text() == text else 1)
    TARGET.write_text(text)
