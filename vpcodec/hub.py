"""A model name to a verified folder: bundled, a path, or `owner/name[@revision]` on the Hub."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from .config import ConfigError, ModelConfig, parse_model

DEFAULT_MODEL = "speech-3k"
DEFAULT_MODELS = {"audio": DEFAULT_MODEL, "image": "image-fsp"}  # kind -> name
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
MAX_CONFIG_BYTES = 1 << 20

_PACKAGE = Path(__file__).parent


class ModelError(ValueError):
    """A model that cannot be found, read or trusted; one line."""


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk.

    Attributes:
        path: the folder.
        config: what the model is.
        fingerprint: 16 bytes that identify weights and configuration, written into token files.
        files: name -> SHA-256 (hex) of every file that `file` hands out.
    """

    path: Path
    config: ModelConfig
    fingerprint: bytes
    files: dict[str, str]

    def check(self) -> None:
        """Check every file against its hash, and the configuration against the fingerprint.

        Raises:
            ModelError: a file is missing or changed since the export.
        """
        for name in {WEIGHTS, *self.files}:
            self.file(name)
        if fingerprint(self.config, (self.path / WEIGHTS).read_bytes()) != self.fingerprint:
            raise ModelError(f"{self.path / CONFIG}: changed (the fingerprint does not fit)")

    def file(self, name: str) -> Path:
        """Path of a file of the model, checked against its hash.

        Raises:
            ModelError: not listed, missing, or changed since the export.
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
    """First 16 bytes of SHA-256 over what decides the tokens: configuration, then weights."""
    needless = {"description": True, "license": True, "quantizer": config.quantizer.training_only}
    facts = config.model_dump(mode="json", exclude=needless)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(weights)
    return digest.digest()[:16]


def bundled_folders() -> dict[str, Path]:
    """The models that ship with the package, by name."""
    for root in (_PACKAGE / "checkpoints", _PACKAGE.parent / "checkpoints"):
        folders = sorted(path.parent for path in root.glob(f"*/{CONFIG}"))
        if folders:
            return {folder.name: folder for folder in folders}
    return {}


def open_model(name: str | Path = DEFAULT_MODEL) -> ModelFolder:
    """Find a model: a bundled name, a folder, or `owner/name[@revision]` on the Hugging Face Hub.

    The Hub is asked last; HF_HOME and HF_HUB_OFFLINE are honoured.

    Raises:
        ModelError: unknown name, unreadable folder, bad config.json, no network.
    """
    bundled = bundled_folders()
    if str(name) in bundled:
        return read_folder(bundled[str(name)])
    path = Path(name)
    if str(name) and path.is_dir():
        return read_folder(path)
    repo, _, revision = str(name).partition("@")
    if repo.count("/") == 1 and not path.is_absolute() and not repo.startswith("."):
        return read_folder(_download(repo, revision or None))
    known = ", ".join(bundled) or "none"
    raise ModelError(
        f"unknown model {str(name)!r} (bundled: {known}; or a folder, or owner/name on the Hub)"
    )


def read_folder(path: Path) -> ModelFolder:
    """Read and check the config.json of a model folder.

    Raises:
        ModelError: missing, too large, not JSON, or with fields that are wrong.
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
        mark = bytes.fromhex(data.pop("fingerprint"))
        files = {str(name): str(digest) for name, digest in data.pop("files").items()}
        config = parse_model(data)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        reason = error if isinstance(error, ConfigError) else "not a model description"
        raise ModelError(f"{file}: {reason}") from None
    if len(mark) != 16:
        raise ModelError(f"{file}: the fingerprint is not 16 bytes")
    if stranger := next((name for name in files if Path(name).name != name), None):
        raise ModelError(f"{file}: {stranger!r} is not the name of a file in the model's folder")
    return ModelFolder(path, config, mark, files)


def write_folder_config(path: Path, config: ModelConfig, mark: bytes, files: list[str]) -> None:
    """Write config.json into a model folder, with the hashes of `files`."""
    data = config.model_dump(mode="json")
    data["fingerprint"] = mark.hex()
    data["files"] = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in files}
    (path / CONFIG).write_text(json.dumps(data, indent=2) + "\n")


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.onnx", "README.md"]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except Exception as error:  # its own errors, and those of the HTTP client underneath
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{repo}: cannot be fetched from the Hub ({reason})") from None
