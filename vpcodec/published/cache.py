"""Published models by name: downloaded and converted on first use, then cached."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from ..hub import download, read_or_refetch
from ..model_folder import ModelError, ModelFolder, read_folder
from .catalog import MODULES, Published, look_up

CACHE = "VPCODEC_CACHE"  # environment variable: where converted models are kept
FORMAT = 1  # version of the output of `convert`; models of other versions are converted again
NEEDED = ("torch", "safetensors", "onnx", "onnxscript")


def open_published(
    name: str,
    *,
    target: Path | None = None,
    force: bool = False,
    note: Callable[[str], None] | None = None,
) -> ModelFolder:
    """Open the model folder of "owner/name:model" or "owner/name:model@revision".

    A converted model is read from the cache, without a network.

    Args:
        name: see `catalog.PUBLISHED`.
        target: folder to create instead of one in the cache.
        force: download and convert again.
        note: called with a line of text before each slow step.

    Returns:
        The model folder.

    Raises:
        ModelError: the model is unknown, cannot be downloaded, or has unexpected weights.
        FileExistsError: `target` exists, and `force` is not set.
    """
    spec, _, revision = name.partition("@")
    published = look_up(spec)
    cached = _cached(name)
    if target is None and cached.is_dir() and not force:
        return read_folder(cached)
    _need_packages(name)
    note = note or (lambda text: None)
    note(f"fetching {name}")
    fetched = download(published.repo, patterns=list(published.files), revision=revision or None)
    for file in published.files:
        check = partial(_check, fetched.folder / file, fetched.sha256.get(file))
        read_or_refetch(published.repo, fetched, file, check)
    note(f"converting {name}, once")
    weights = (fetched.folder / published.files[0]).parent
    try:
        return convert_folder(
            weights, published, target or cached, commit=fetched.commit, force=force
        )
    except FileExistsError:
        if target is not None:
            raise
        return read_folder(cached)  # another process was first
    except OSError as error:
        path = error.filename or cached
        raise ModelError(f"{path}: {error.strerror} ({CACHE} sets another cache)") from None


def convert_folder(
    folder: Path, published: Published, target: Path, *, commit: str = "", force: bool = False
) -> ModelFolder:
    """Convert a folder of .pt files of a published model; see `convert.convert`."""
    _need_packages(published.spec)
    from .convert import convert

    files = {module: folder / f"{module}.pt" for module in MODULES}
    return convert(files, published, target, commit=commit, force=force)


def is_converted(name: str) -> bool:
    """Whether the model is in the cache."""
    return _cached(name).is_dir()


def _cached(name: str) -> Path:
    """Folder of a model in the cache."""
    cache = os.environ.get(CACHE) or os.path.expanduser("~/.cache/vpcodec")
    return Path(cache) / "converted" / f"v{FORMAT}" / quote(name, safe="")


def _check(path: Path, expected: str | None) -> None:
    """Raise ModelError if a file does not have the SHA-256 that the Hub states."""
    if expected is None or not path.is_file():
        return
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected:
            raise ModelError(f"{path}: damaged (SHA-256 differs from the Hub's)")


def _need_packages(name: str) -> None:
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise ModelError(
            f"{name}: converting it on first use needs {', '.join(missing)}; install it "
            "with: pip install 'vpcodec[train]'"
        )
