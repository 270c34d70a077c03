"""A model on disk: reading and writing the folder, checking hashes, and the fingerprint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .config import ConfigError, ModelConfig, parse_model
from .entropy import TABLES, EntropyError, TokenCoder, load_coder
from .media.files import atomic_output

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
MAX_CONFIG_BYTES = 1 << 20


class ModelError(ValueError):
    """A model that cannot be found, read or trusted; the message is one line."""


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk.

    Attributes:
        path: the folder.
        config: the configuration of the model.
        fingerprint: 16 bytes that identify the weights and configuration; token files contain it.
        files: name -> SHA-256 (hex) of every file that `file` returns.
        source: where converted weights came from; empty for native models.
    """

    path: Path
    config: ModelConfig
    fingerprint: bytes
    files: dict[str, str]
    source: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Check every file against its hash, and the configuration against the fingerprint.

        Raises:
            ModelError: a file is missing, or was changed after the export.
        """
        for name in {WEIGHTS, *self.files}:
            self.file(name)
        if fingerprint(self.config, (self.path / WEIGHTS).read_bytes()) != self.fingerprint:
            raise ModelError(f"{self.path / CONFIG}: changed (the fingerprint does not match)")

    @cached_property
    def coder(self) -> TokenCoder | None:
        """The entropy coder of its tokens; None if the model has no entropy tables.

        Raises:
            ModelError: the tables are damaged or belong to another codebook.
        """
        if TABLES not in self.files:
            return None
        path = self.file(TABLES)
        try:
            coder = load_coder(path)
        except (EntropyError, OSError) as error:
            raise ModelError(str(error)) from None
        if coder.codebook_size != self.config.codebook_size:
            raise ModelError(f"{path}: for a codebook of {coder.codebook_size}")
        return coder

    def file(self, name: str) -> Path:
        """Path of a file of the model, checked against its hash.

        Raises:
            ModelError: not listed, missing, or changed after the export.
        """
        path = self.path / name
        try:
            expected = self.files[name]
            with open(path, "rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
        except KeyError:
            raise ModelError(f"{self.path}: the model has no {name}") from None
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror}") from None
        if actual != expected:
            raise ModelError(f"{path}: damaged or changed (SHA-256 differs from {CONFIG})")
        return path


def fingerprint(config: ModelConfig, weights: bytes) -> bytes:
    """The first 16 bytes of the SHA-256 of what determines the tokens: configuration and weights.

    Fields that are not set do not count, so adding fields does not change existing fingerprints.

    Args:
        config: the configuration; descriptions and fields for training only are left out.
        weights: the bytes of model.safetensors.
    """
    facts = config.model_dump(mode="json", exclude=set(config.descriptive), exclude_none=True)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(weights)
    return digest.digest()[:16]


def read_folder(path: Path) -> ModelFolder:
    """Read and check the config.json of a model folder.

    Raises:
        ModelError: it is missing, too large or not JSON, or has wrong fields.
    """
    file = path / CONFIG
    try:
        with open(file, "rb") as stream:
            text = stream.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{file}: {error.strerror} (a model folder has a {CONFIG})") from None
    if len(text) > MAX_CONFIG_BYTES:
        raise ModelError(f"{file}: larger than {MAX_CONFIG_BYTES} bytes")
    try:
        data = json.loads(text)
        fingerprint = bytes.fromhex(data.pop("fingerprint"))
        files = {str(name): str(digest) for name, digest in data.pop("files").items()}
        source = dict(data.pop("source", {}))
        if not all(str(source.get(key, "")).isprintable() for key in ("model", "commit")):
            raise ValueError
        config = parse_model(data)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        reason = error if isinstance(error, ConfigError) else "not a model description"
        raise ModelError(f"{file}: {reason}") from None
    if len(fingerprint) != 16:
        raise ModelError(f"{file}: the fingerprint is not 16 bytes")
    fits = {name: Path(name).name == name and name.isprintable() for name in files}
    if stranger := next((name for name, fit in fits.items() if not fit), None):
        raise ModelError(f"{file}: {stranger!r} is not the name of a file in the model's folder")
    return ModelFolder(path, config, fingerprint, files, source)


def write_folder_config(
    path: Path,
    config: ModelConfig,
    fingerprint: bytes,
    files: list[str],
    *,
    source: dict[str, Any] | None = None,
) -> None:
    """Write config.json into a model folder, with the hashes of `files`; see `ModelFolder`."""
    data = config.model_dump(mode="json")
    if source:
        data["source"] = source
    data["fingerprint"] = fingerprint.hex()
    data["files"] = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in files}
    with atomic_output(path / CONFIG) as file:
        file.write((json.dumps(data, indent=2) + "\n").encode())
