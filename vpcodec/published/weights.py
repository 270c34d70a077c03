"""A reader of published weights that does not trust the files."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ..media.files import open_regular
from ..model_folder import ModelError
from .catalog import MODULES
from .config import SQCodecConfig
from .tensors import expected_shapes

_TENSOR_OVERHEAD = 2048  # most bytes for name, shape and alignment of a tensor
_FILE_OVERHEAD = 1 << 16
_ZIP = b"PK\x03\x04"  # first bytes of a zip file that is not empty
_LONG = 100  # most characters of a name in messages

Shapes = Mapping[str, tuple[int, ...]]


def read_weights(files: Mapping[str, Path], config: SQCodecConfig) -> dict[str, torch.Tensor]:
    """Read the published weights of a model; nothing in the files is executed.

    Args:
        files: module -> its .pt file, for all of `MODULES`.
        config: configuration that they must fit.

    Returns:
        Tensors, float32 on the CPU, with exactly the names and shapes of `expected_shapes`.

    Raises:
        ModelError: a file cannot be read, is not a PyTorch checkpoint (in the zip format), is
            damaged or too large, or does not contain exactly the expected tensors; the message
            names the file.
    """
    shapes = expected_shapes(config)
    weights = {}
    for module in MODULES:
        prefix = f"{module}."
        expected = {
            name.removeprefix(prefix): shape
            for name, shape in shapes.items()
            if name.startswith(prefix)
        }
        path = Path(files[module])
        try:
            _check_container(path, expected)
            found = _load(path)
            _check_tensors(found, expected)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from None
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror or error}") from None
        for name in expected:  # a contiguous copy, because the file may contain views
            tensor = found[name].detach()
            weights[prefix + name] = tensor.clone(memory_format=torch.contiguous_format)
    return weights


def _check_container(path: Path, expected: Shapes) -> None:
    """Refuse a damaged zip file, or one too large for the tensors, before PyTorch reads it."""
    limit = _FILE_OVERHEAD + sum(4 * math.prod(s) + _TENSOR_OVERHEAD for s in expected.values())
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ModelError(f"{size} bytes, where at most {limit} are expected")
        if file.read(len(_ZIP)) != _ZIP:
            raise ModelError("not a checkpoint of PyTorch in the zip format")
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                size = sum(entry.file_size for entry in entries)
                packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
                damaged = None if packed or size > limit else archive.testzip()
        except Exception:  # of many kinds, from the zip file's directory and from its entries
            raise ModelError("truncated or damaged") from None
    if size > limit:
        raise ModelError(f"unpacks to {size} bytes, where at most {limit} are expected")
    if packed:
        raise ModelError("not a checkpoint of PyTorch (compressed)")
    if damaged is not None:
        raise ModelError(f"damaged (the checksum of {_shown([damaged])} is wrong)")


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise ModelError("holds more than tensors (nothing in it was run)") from None
    except Exception:  # of many kinds, from the unpickler and from the reader of the tensors
        raise ModelError("damaged, or not a checkpoint of PyTorch") from None


def _check_tensors(found: Any, expected: Shapes) -> None:
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ModelError("not a dictionary of tensors")
    if strange := [name for name, value in found.items() if not isinstance(value, torch.Tensor)]:
        raise ModelError(f"not a tensor: {_shown(strange)}")
    if missing := [name for name in expected if name not in found]:
        raise ModelError(f"missing: {_shown(missing)}")
    if unexpected := [name for name in found if name not in expected]:
        raise ModelError(f"unexpected: {_shown(unexpected)}")
    plain = torch.float32, torch.strided, torch.device("cpu")
    if other := [n for n, t in found.items() if (t.dtype, t.layout, t.device) != plain]:
        dtype = str(found[other[0]].dtype).removeprefix("torch.")
        raise ModelError(f"not plain float32: {_shown(other)}, {dtype}")
    if wrong := [name for name, shape in expected.items() if found[name].shape != shape]:
        first = wrong[0]
        sizes = f"{tuple(found[first].shape)} instead of {expected[first]}"
        raise ModelError(f"of another shape: {_shown(wrong)}, {sizes}")
    if infinite := [name for name in expected if not found[name].isfinite().all()]:
        raise ModelError(f"not finite: {_shown(infinite)}")


def _shown(names: list[str]) -> str:
    """The first name, escaped because it may come from the file, and the number of others."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return ascii(names[0][:_LONG]) + more
