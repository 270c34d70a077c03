"""A model on disk: reading and writing the folder, checking hashes, and what identifies a model.

A *fingerprint* identifies all weights and the configuration. A *token space* is what decides and
explains tokens, encoder and quantizer; its identity is in token files. Models that differ only in
their decoders have one space, and read each other's files.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from .config import ConfigError, ModelConfig, parse_model
from .entropy import CoderSet, EntropyError, ImageCoder, TokenCoder, load_coder
from .media.files import atomic_output, open_regular

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
MAX_CONFIG_BYTES = 1 << 20
MAX_FILE_BYTES = 4 << 30
MAX_HEADER_BYTES = 1 << 24  # of a safetensors file
_TABLES = re.compile(r"entropy(-[0-9a-f]{8})?\.safetensors")  # names of files with entropy tables


class ModelError(ValueError):
    """A model that cannot be found, read or trusted; the message is one line."""


@dataclass(frozen=True)
class Revision:
    """Another revision of a model, with another encoder.

    Attributes:
        model: the name by which it can be opened, such as owner/name@revision on the Hub.
        identities: of its token files.
    """

    model: str
    identities: frozenset[bytes]


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk. A pickle holds its path, and the folder is read again.

    Attributes:
        path: the folder.
        config: the configuration of the model.
        fingerprint: 16 bytes that identify the weights and configuration.
        files: name -> SHA-256 (hex) of every file that `file` returns; of those with entropy
            tables, the last is the newest.
        source: where converted weights came from; empty for native models.
        stated_space: identity of the token space in config.json; None if it has none.
        earlier: fingerprints of earlier models of the same space, which are in their token files.
        revisions: the model's other revisions, by number.
    """

    path: Path
    config: ModelConfig
    fingerprint: bytes
    files: dict[str, str]
    source: dict[str, Any] = field(default_factory=dict)
    stated_space: bytes | None = None
    earlier: tuple[bytes, ...] = ()
    revisions: Mapping[int, Revision] = field(default_factory=dict)

    def __reduce__(self) -> tuple[object, ...]:
        return _read_again, (self.path.absolute(), self.fingerprint)

    def check(self) -> None:
        """Check every file against its hash, and the configuration against its identities.

        Raises:
            ModelError: a file is missing, or was changed after the export.
        """
        for name in {WEIGHTS, *self.files}:
            self.file(name)
        weights = self._weights()
        if fingerprint(self.config, weights) != self.fingerprint:
            raise ModelError(f"{self.path / CONFIG}: changed (the fingerprint does not match)")
        if self.stated_space not in (None, self._space_of(weights)):
            raise ModelError(f"{self.path / CONFIG}: changed (the token space does not match)")
        if self.config.least_weights > len(weights):
            raise ModelError(f"{self.path / CONFIG}: describes a larger model than {WEIGHTS} holds")

    @cached_property
    def space(self) -> bytes:
        """16 bytes that identify the token space; new token files contain them.

        Raises:
            ModelError: config.json does not state it, and the weights cannot be read.
        """
        if self.stated_space is not None:
            return self.stated_space
        self.file(WEIGHTS)
        return self._space_of(self._weights())

    def _weights(self) -> bytes | mmap.mmap:
        """The contents of model.safetensors, which are not read before they are needed."""
        with open_regular(self.path / WEIGHTS) as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _space_of(self, weights: bytes | mmap.mmap) -> bytes:
        try:
            return token_space(self.config, weights)
        except ModelError as error:
            raise ModelError(f"{self.path / WEIGHTS}: {error}") from None

    @property
    def identities(self) -> frozenset[bytes]:
        """What token files that this model decodes may contain: the identity of the space, or the
        fingerprint of this or an earlier model, as files had it before spaces had an identity.

        Raises:
            ModelError: as `space`.
        """
        return frozenset({self.space, self.fingerprint, *self.earlier})

    def knows(self, identity: bytes) -> bool:
        """Whether this model decodes token files with an identity, or the beginning of one.

        Raises:
            ModelError: as `space`.
        """
        return _begins_one(identity, self.identities)

    def revision_of(self, identity: bytes) -> Revision | None:
        """The other revision of this model that made token files with an identity, or the
        beginning of one."""
        revisions = self.revisions.values()
        return next((r for r in revisions if _begins_one(identity, r.identities)), None)

    @property
    def tables(self) -> list[str]:
        """Names of the files with entropy tables, the newest last."""
        return [name for name in self.files if _TABLES.fullmatch(name)]

    @cached_property
    def coder(self) -> CoderSet | None:
        """The entropy coders of its tokens; None if the model has no entropy tables.

        Raises:
            ModelError: the newest tables are damaged or belong to another codebook.
        """
        if not self.tables:
            return None
        coders = CoderSet(
            self.config.codebook_size,
            {self.files[name][:4]: partial(self._load_tables, name) for name in self.tables},
        )
        coders.newest  # noqa: B018  (the others are loaded for files that need them)
        return coders

    def _load_tables(self, name: str) -> TokenCoder:
        path = self.file(name)
        try:
            coder = load_coder(path)
        except (EntropyError, OSError) as error:
            raise ModelError(str(error)) from None
        if coder.codebook_size != self.config.codebook_size:
            raise ModelError(f"{path}: for a codebook of {coder.codebook_size}")
        if isinstance(coder, ImageCoder) != (self.config.modality == "image"):
            raise ModelError(f"{path}: not for models of {self.config.modality}")
        return coder

    def file(self, name: str) -> Path:
        """Path of a file of the model, checked against its hash.

        Raises:
            ModelError: not listed, missing, or changed after the export.
        """
        path = self.path / name
        try:
            expected = self.files[name]
            with open_regular(path) as file:
                if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                    raise ModelError(f"{path}: larger than {MAX_FILE_BYTES >> 30} GiB")
                actual = hashlib.file_digest(file, "sha256").hexdigest()
        except KeyError:
            raise ModelError(f"{self.path}: the model has no {name}") from None
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror}") from None
        if actual != expected:
            raise ModelError(f"{path}: damaged or changed (SHA-256 differs from {CONFIG})")
        return path


def _begins_one(identity: bytes, known: Iterable[bytes]) -> bool:
    return any(other.startswith(identity) for other in known)


def fingerprint(config: ModelConfig, weights: bytes | mmap.mmap) -> bytes:
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


def token_space(config: ModelConfig, weights: bytes | mmap.mmap) -> bytes:
    """The identity of the token space: the first 16 bytes of the SHA-256 of encoder and quantizer.

    The names of models and all that concerns only decoding do not count, nor fields that are not
    set. Of the weights count the names, types, shapes and values of those that are not the
    decoder's.

    Args:
        config: the configuration.
        weights: the bytes of model.safetensors.

    Raises:
        ModelError: not a safetensors file.
    """
    left_out: dict[str, Any] = dict.fromkeys(config.outside_space, True)
    left_out["quantizer"] = set(config.quantizer.outside_space)
    facts: Any = config.model_dump(mode="json", exclude=left_out, exclude_none=True)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    view = memoryview(weights)
    try:
        header, first = weights_header(weights)
        for name in sorted(header):
            if name.startswith(config.decoder_weights):
                continue
            start, end = header[name]["data_offsets"]
            if not 0 <= start <= end <= len(view) - first:
                raise ValueError
            facts = [name, header[name]["dtype"], header[name]["shape"], end - start]
            digest.update(json.dumps(facts).encode())
            digest.update(view[first + start : first + end])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError("not a safetensors file") from None
    return digest.digest()[:16]


def weights_header(weights: bytes | mmap.mmap) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, by name, and where their values begin.

    Raises:
        ModelError: not a safetensors file.
    """
    first = 8 + int.from_bytes(weights[:8], "little")
    try:
        if not 8 < first <= min(len(weights), MAX_HEADER_BYTES):
            raise ValueError
        header = json.loads(weights[8:first])
        header.pop("__metadata__", None)
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ModelError("not a safetensors file") from None
    return header, first


def read_config(path: Path, what: str) -> bytes:
    """The bytes of the config.json in a folder of `what`.

    Raises:
        ModelError: it is missing or too large.
    """
    file = path / CONFIG
    try:
        with open_regular(file) as stream:
            text = stream.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{file}: {error.strerror} ({what} has a {CONFIG})") from None
    if len(text) > MAX_CONFIG_BYTES:
        raise ModelError(f"{file}: larger than {MAX_CONFIG_BYTES} bytes")
    return text


def read_folder(path: Path) -> ModelFolder:
    """Read and check the config.json of a model folder.

    Raises:
        ModelError: it is missing, too large or not JSON, or has wrong fields.
    """
    file, text = path / CONFIG, read_config(path, "a model folder")
    try:
        data = json.loads(text)
        fingerprint = bytes.fromhex(data.pop("fingerprint"))
        space = data.pop("space", None)
        space = None if space is None else bytes.fromhex(space)
        earlier = tuple(bytes.fromhex(item) for item in data.pop("earlier", ()))
        revisions = {
            int(number): _revision(entry) for number, entry in data.pop("revisions", {}).items()
        }
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
    others = frozenset().union(*(revision.identities for revision in revisions.values()))
    if any(len(item) != 16 for item in (*earlier, *others, *(() if space is None else (space,)))):
        raise ModelError(f"{file}: an identity is not 16 bytes")
    fits = {name: Path(name).name == name and name.isprintable() for name in files}
    if stranger := next((name for name, fit in fits.items() if not fit), None):
        raise ModelError(f"{file}: {stranger!r} is not the name of a file in the model's folder")
    return ModelFolder(path, config, fingerprint, files, source, space, earlier, revisions)


def _read_again(path: Path, fingerprint: bytes) -> ModelFolder:
    """The folder of a pickle.

    Raises:
        ModelError: it is not there, or holds another model.
    """
    if not path.is_dir():
        raise ModelError(f"{path}: the folder of a pickled or copied model is not there")
    model = read_folder(path)
    if model.fingerprint != fingerprint:
        raise ModelError(f"{path}: holds another model than when it was pickled or copied")
    return model


def _revision(entry: dict[str, Any]) -> Revision:
    model = entry["model"]
    if not isinstance(model, str) or not model.isprintable():
        raise ValueError
    return Revision(model, frozenset(bytes.fromhex(item) for item in entry["identities"]))


def write_folder_config(
    path: Path,
    config: ModelConfig,
    fingerprint: bytes,
    files: list[str],
    *,
    source: dict[str, Any] | None = None,
    space: bytes | None = None,
    earlier: Iterable[bytes] = (),
    revisions: Mapping[int, Revision] | None = None,
) -> None:
    """Write config.json into a model folder, with the hashes of `files`; see `ModelFolder`."""
    data = config.model_dump(mode="json")
    if source:
        data["source"] = source
    data["fingerprint"] = fingerprint.hex()
    if space is not None:
        data["space"] = space.hex()
    if known := [item.hex() for item in earlier]:
        data["earlier"] = known
    if revisions:
        data["revisions"] = {
            str(number): {
                "model": revision.model,
                "identities": sorted(item.hex() for item in revision.identities),
            }
            for number, revision in sorted(revisions.items())
        }
    data["files"] = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in files}
    with atomic_output(path / CONFIG) as file:
        file.write((json.dumps(data, indent=2) + "\n").encode())
