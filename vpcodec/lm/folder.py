"""A language model on disk: config.json and model.safetensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from ..config import ConfigError, LMConfig, explain
from ..media.files import atomic_folder, open_regular
from ..model_folder import CARD, CONFIG, WEIGHTS, ModelError, ModelFolder, read_config
from .network import LanguageModel

MAX_CODES = 2**28  # of a codebook
MAX_DIGITS = 64


@dataclass(frozen=True)
class LMFolder:
    """A language model on disk.

    Attributes:
        path: the folder.
        config: of the network.
        levels: number of values of each digit of a token.
        space: 16 bytes that identify the token space, as `Codec.space`.
        sha256: of the weights, hex.
    """

    path: Path
    config: LMConfig
    levels: tuple[int, ...]
    space: bytes
    sha256: str

    def check_codec(self, codec: ModelFolder) -> None:
        """Check that the model was trained on the tokens of a codec.

        Raises:
            ModelError: it was not.
        """
        if not codec.knows(self.space):
            raise ModelError(
                f"{self.path}: made for the tokens of {self.config.codec!r} (token space "
                f"{self.space.hex()[:8]}), not for those of {codec.config.name!r} "
                f"({codec.space.hex()[:8]})"
            )


def write_lm(model: LanguageModel, space: bytes, target: Path, *, force: bool = False) -> None:
    """Write a model folder, which appears complete or not at all.

    Args:
        model: the network.
        space: identity of the token space.
        target: the folder.
        force: replace an existing one.

    Raises:
        FileExistsError: `target` exists and `force` is not set.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    weights = save(state, metadata={"format": "pt"})
    facts = model.config.model_dump(mode="json") | {
        "levels": list(model.levels),
        "space": space.hex(),
        "files": {WEIGHTS: hashlib.sha256(weights).hexdigest()},
    }
    with atomic_folder(target, force=force, mark=CONFIG) as folder:
        (folder / WEIGHTS).write_bytes(weights)
        (folder / CARD).write_text(_card(model))
        (folder / CONFIG).write_text(json.dumps(facts, indent=2) + "\n")


def read_lm(path: Path) -> LMFolder:
    """Read and check the config.json of a language model.

    Raises:
        ModelError: it is missing, too large or not JSON, has wrong fields, or is that of a codec.
    """
    file, text = path / CONFIG, read_config(path, "a language model")
    try:
        data = json.loads(text)
        if data.get("kind") != "lm":
            raise ConfigError("a codec, not a language model")
        levels = tuple(data.pop("levels"))
        space = bytes.fromhex(data.pop("space"))
        sha256 = str(data.pop("files")[WEIGHTS])
        if len(space) != 16 or not all(type(n) is int and n > 1 for n in levels):
            raise ValueError
        if not 0 < len(levels) <= MAX_DIGITS or math.prod(levels) > MAX_CODES:
            raise ConfigError(f"levels: more than {MAX_CODES} codes or none")
        config = LMConfig.model_validate(data)
    except ValidationError as error:
        raise ModelError(f"{file}: {explain(error)}") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        reason = error if isinstance(error, ConfigError) else "not a model description"
        raise ModelError(f"{file}: {reason}") from None
    return LMFolder(path, config, levels, space, sha256)


def load_lm(folder: LMFolder) -> LanguageModel:
    """The network with its weights, in eval mode on the CPU.

    Raises:
        ModelError: the weights are missing, were changed, or are those of another network.
    """
    path = folder.path / WEIGHTS
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if hashlib.file_digest(file, "sha256").hexdigest() != folder.sha256:
                raise ModelError(f"{path}: damaged or changed (SHA-256 differs from {CONFIG})")
        with safe_open(path, "pt") as tensors:
            found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from None
    except SafetensorError:
        raise ModelError(f"{path}: not a safetensors file") from None
    with torch.device("meta"):  # before memory is taken for what config.json says
        network = LanguageModel(folder.config, folder.levels)
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    if found != wanted or size < sum(map(math.prod, wanted.values())):
        raise ModelError(f"{path}: weights of another network than {CONFIG} describes")
    model = LanguageModel(folder.config, folder.levels)
    model.load_state_dict(load_file(path))
    return model.eval()


def _card(model: LanguageModel) -> str:
    config: Any = model.config
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    example = "in.png -o out.png" if config.grid else "in.wav -o out.wav"
    return f"""---
license: {config.license.lower()}
library_name: vpcodec
---

# {config.name}

{config.description}

A language model on the tokens of {config.codec}: {millions:.2f} M parameters,
{config.layers} layers of width {config.width}, {config.context} tokens of context.

    vpcodec generate -m {config.name} --prompt {example}
"""
