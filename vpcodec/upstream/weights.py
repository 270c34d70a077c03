"""Published weights: their names and shapes, and a reader that trusts nothing in the files."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ..config import SQCodecConfig
from ..model_folder import ModelError
from .catalog import MODULES

_TENSOR_OVERHEAD = 2048  # bytes that name, shape and alignment of a tensor may take in a file
_FILE_OVERHEAD = 1 << 16
_ZIP = b"PK\x03\x04"  # what a zip file with anything in it begins with
_LONG = 100  # characters of a name that are shown

Shapes = Mapping[str, tuple[int, ...]]
Named = Iterator[tuple[str, tuple[int, ...]]]

# ------------------------------------------------------------------------------ names and shapes


def expected_shapes(config: SQCodecConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of a model.

    Names are those of the published files behind that of the module:
    "encoder.blocks.0.conv_1.bias". All are float32.
    """
    shapes = _encoder(config), _quantizer(config), _decoder(config)
    shapes += _en_encoder(config), _en_decoder(config)
    return {
        f"{module}.{name}": shape
        for module, weights in zip(MODULES, shapes)
        for name, shape in weights
    }


def _encoder(config: SQCodecConfig) -> Named:
    dims, depths = config.encoder_dims, config.encoder_depths
    yield from _trend_convolutions("blocks.0", branches=5, channels=4)
    yield from _normalized("blocks.0.conv_1", 80, 20, 1)
    yield from _normalized("blocks.0.conv_2", dims[0], 81, 1)
    last = 2 * len(config.strides) + 1
    for i, stride in enumerate(config.strides):
        yield from _units(f"blocks.{2 * i + 1}", depths[i], dims[i])
        yield from _normalized(f"blocks.{2 * i + 2}.0", dims[i + 1], dims[i], stride)
        yield from _affine(f"blocks.{2 * i + 2}.1", dims[i + 1])
    yield from _units(f"blocks.{last}", depths[-1], dims[-1])
    yield from _normalized(f"blocks.{last + 1}", config.feature_dim, dims[-1], 3)


def _quantizer(config: SQCodecConfig) -> Named:
    yield from _linear("project_in", config.quantizer.dim, config.feature_dim)
    yield from _linear("project_out", config.feature_dim, config.quantizer.dim)


def _decoder(config: SQCodecConfig) -> Named:
    dims = config.decoder_dims
    yield from _normalized("blocks.0", dims[0], config.feature_dim, 3)
    for i, depth in enumerate(config.decoder_depths):
        yield from _units(f"blocks.{3 * i + 1}", depth, dims[i])
        yield from _trend_convolutions(f"blocks.{3 * i + 2}", branches=4, channels=1)
        yield from _affine(f"blocks.{3 * i + 2}.merge_layer.0", 4)
        yield from _linear(f"blocks.{3 * i + 2}.merge_layer.1", dims[i], 4, 1)
        yield from _normalized(f"blocks.{3 * i + 3}.0", dims[i + 1], dims[i], 1)
        yield from _affine(f"blocks.{3 * i + 3}.2", dims[i + 1])
    end, width = f"blocks.{3 * len(config.decoder_strides) + 1}.block", dims[-1]
    for i in range(3):
        yield f"{end}.0.{i}.module.block.0.alpha", (1, width, 1)
        yield from _normalized(f"{end}.0.{i}.module.block.1", width, width, 7)
        yield f"{end}.0.{i}.module.block.2.alpha", (1, width, 1)
        yield from _normalized(f"{end}.0.{i}.module.block.3", width, width, 1)
    yield f"{end}.1.alpha", (1, width, 1)
    yield from _normalized(f"{end}.2", 1, width, 7)


def _en_encoder(config: SQCodecConfig) -> Named:
    dim, stride = config.feature_dim, config.token_stride
    if stride > 1:
        if config.architecture == "sqcodec":
            yield "cache_token", (1, 0, dim)
        yield from _transformer("down_trans.trans", config.encoder_outer_layers, config)
        yield from _normalized("down_trans.down_layer", dim, dim, stride)
    yield from _transformer("local_trans", config.encoder_layers, config)


def _en_decoder(config: SQCodecConfig) -> Named:
    if config.token_stride > 1:
        yield from _transformer("up_trans.trans", config.decoder_outer_layers, config)
    yield from _transformer("local_trans", config.decoder_layers, config)


def _transformer(name: str, layers: int, config: SQCodecConfig) -> Named:
    dim, heads = config.feature_dim, config.attention_heads
    inner, hidden = heads * (dim // 4), dim * 8 // 3
    for i in range(layers):
        yield from _affine(f"{name}.layers.{i}.0.norm", dim)
        yield f"{name}.layers.{i}.0.to_qkv.weight", (3 * inner, dim)
        yield f"{name}.layers.{i}.0.to_out.weight", (dim, inner)
        yield from _affine(f"{name}.layers.{i}.1.0", dim)
        yield f"{name}.layers.{i}.1.1.weight", (2 * hidden, dim)
        yield f"{name}.layers.{i}.1.4.weight", (dim, hidden)
    widths = 1, dim // 2, dim // 2, heads
    for i in range(3):
        yield from _linear(f"{name}.dynamic_pos_bias.mlp.{2 * i}", widths[i + 1], widths[i])


def _units(name: str, depth: int, dim: int) -> Named:
    for i in range(depth):
        unit, hidden = f"{name}.{i}.module", 4 * dim
        yield from _normalized(f"{unit}.dw_conv", dim, 1, 7)
        yield from _affine(f"{unit}.norm", dim)
        yield from _normalized(f"{unit}.pw_conv1", hidden, dim)
        yield f"{unit}.act.alpha", (1, 1, hidden)
        yield f"{unit}.grn.gamma", (1, hidden)
        yield f"{unit}.grn.beta", (1, hidden)
        yield from _normalized(f"{unit}.pw_conv2", dim, hidden)


def _trend_convolutions(name: str, branches: int, channels: int) -> Named:
    for i in range(branches):
        yield from _normalized(f"{name}.blocks.{i}.1", channels, 1, 7)


def _normalized(name: str, out: int, *rest: int) -> Named:
    """A convolution or linear layer under weight norm: the gains, then the directions."""
    yield f"{name}.bias", (out,)
    yield f"{name}.parametrizations.weight.original0", (out, *(1 for _ in rest))
    yield f"{name}.parametrizations.weight.original1", (out, *rest)


def _linear(name: str, out: int, *rest: int) -> Named:
    yield f"{name}.weight", (out, *rest)
    yield f"{name}.bias", (out,)


def _affine(name: str, channels: int) -> Named:
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)


# --------------------------------------------------------------------------------------- reading


def read_weights(files: Mapping[str, Path], config: SQCodecConfig) -> dict[str, torch.Tensor]:
    """Read the published weights of a model; nothing in the files is executed.

    Args:
        files: module -> its .pt file, for all of `MODULES`.
        config: the model that they must fit.

    Returns:
        float32 on the CPU, names and shapes exactly those of `expected_shapes`.

    Raises:
        ModelError: a file cannot be read, is not a checkpoint of PyTorch (the zip format), is
            damaged or larger than it can be, holds more than tensors, or other tensors than
            expected; names the file.
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
        for name in expected:  # of its own, in order, whatever view the file holds
            tensor = found[name].detach()
            weights[prefix + name] = tensor.clone(memory_format=torch.contiguous_format)
    return weights


def _check_container(path: Path, expected: Shapes) -> None:
    """Refuse what is not a sound zip file, or too large for the tensors, before PyTorch sees it."""
    limit = _FILE_OVERHEAD + sum(4 * math.prod(s) + _TENSOR_OVERHEAD for s in expected.values())
    with open(path, "rb") as file:
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
        raise ModelError(f"damaged (the checksum of {_shown([damaged])} does not fit)")


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
        kind = str(found[other[0]].dtype).removeprefix("torch.")
        raise ModelError(f"not plain float32: {_shown(other)}, {kind}")
    if wrong := [name for name, shape in expected.items() if found[name].shape != shape]:
        first = wrong[0]
        sizes = f"{tuple(found[first].shape)} instead of {expected[first]}"
        raise ModelError(f"of another shape: {_shown(wrong)}, {sizes}")
    if infinite := [name for name in expected if not found[name].isfinite().all()]:
        raise ModelError(f"not finite: {_shown(infinite)}")


def _shown(names: list[str]) -> str:
    """The first name, which may come from the file, and how many more there are."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return ascii(names[0][:_LONG]) + more
