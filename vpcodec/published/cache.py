"""Published models by name: fetched and converted when they are first asked for, then kept."""

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
FORMAT = 1  # of what `convert` makes; another one is converted anew
NEEDED = ("torch", "safetensors", "onnx", "onnxscript")


def open_published(
    name: str,
    *,
    target: Path | None = None,
    force: bool = False,
    note: Callable[[str], None] | None = None,
) -> ModelFolder:
    """The model folder of "owner/name:model", or of "owner/name:model@revision".

    Without a revision, what was converted once is used from then on, without a network.

    Args:
        name: see `catalog.PUBLISHED`.
        target: folder to make instead of one in the cache.
        force: fetch and convert anew.
        note: told what takes a while.

    Raises:
        ModelError: unknown, cannot be fetched, or weights that are not what they should be.
        FileExistsError: target exists and not `force`.
    """
    spec, _, revision = name.partition("@")
    published = look_up(spec)
    kept = _kept(name)
    if target is None and kept.is_dir() and not force:
        return read_folder(kept)
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
            weights, published, target or kept, commit=fetched.commit, force=force
        )
    except FileExistsError:
        if target is not None:
            raise
        return read_folder(kept)  # another process was faster
    except OSError as error:
        at = error.filename or kept
        raise ModelError(f"{at}: {error.strerror} ({CACHE} names another cache)") from None


def convert_folder(
    folder: Path, published: Published, target: Path, *, commit: str = "", force: bool = False
) -> ModelFolder:
    """Convert a folder with the .pt files of a published model; see `convert.convert`."""
    _need_packages(published.spec)
    from .convert import convert

    files = {module: folder / f"{module}.pt" for module in MODULES}
    return convert(files, published, target, commit=commit, force=force)


def is_converted(name: str) -> bool:
    """Whether `open_published` has the model at hand."""
    return _kept(name).is_dir()


def _kept(name: str) -> Path:
    cache = os.environ.get(CACHE) or os.path.expanduser("~/.cache/vpcodec")
    return Path(cache) / "converted" / f"v{FORMAT}" / quote(name, safe="")


def _check(path: Path, expected: str | None) -> None:
    """Refuse a file that is not what the Hub says it is."""
    if expected is None or not path.is_file():
        return
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected:
            raise ModelError(f"{path}: damaged (SHA-256 differs from the Hub's)")


def _need_packages(name: str) -> None:
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise ModelError(
            f"{name}: the first use converts it, which needs {', '.join(missing)}; install it "
            "with: pip install 'vpcodec[train]'"
        )
