"""Export of torch models to ONNX graphs."""

from __future__ import annotations

import json
import logging
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from . import __version__
from .config import AudioConfig, AudioModelConfig, ModelConfig
from .model_folder import WEIGHTS
from .models import Autoencoder
from .models.layers import State

OPSET = 18
SAMPLE_TOLERANCE = 1e-4  # largest difference between samples decoded by torch and by ONNX Runtime
TOKEN_TOLERANCE = 2e-3  # share of tokens that may differ, by rounding at the edges of cells
MIN_SHARED = 4096  # smaller constants stay in the graph
STORED = {"F16": np.float16, "F32": np.float32, "I8": np.int8}  # types of safetensors
MAX_COMPUTED = 1 << 18  # elements of a constant that is computed from weights
EXAMPLE_STEPS = 3  # length of states of any length when tracing


class ExportError(RuntimeError):
    """Exported graphs are faulty; nothing was written."""


class _Step(nn.Module):
    """One direction of a model, with its states as positional inputs and outputs."""

    def __init__(self, model: Autoencoder, method: str, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.method = method
        self.names = names

    def forward(self, x: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state = State(dict(zip(self.names, past)))
        y = getattr(self.model, self.method)(x, state)
        return y, *(state.next[name] for name in self.names)


def trace(
    model: Autoencoder,
    method: str,
    shapes: dict[str, tuple[int, ...]],
    example: torch.Tensor,
    sides: dict[int, Any],
    *,
    units: dict[str, int] | None = None,
) -> onnx.ModelProto:
    """Trace one direction of a model, with states `past.X` as inputs and `next.X` as outputs.

    Args:
        model: the model.
        method: "encode" or "decode".
        shapes: name -> shape of each state, without the batch; a length of 0 means any length.
        example: an example input with a batch of 2.
        sides: dynamic dimensions of the input besides the batch: index -> `torch.export.Dim`.
        units: name -> unit that the length of a state is a multiple of; 1 if missing.

    Returns:
        The graph, with its weights inside.
    """
    names, units = list(shapes), units or {}
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    past, dynamic_past = [], []
    for i, (name, (steps, *rest)) in enumerate(shapes.items()):
        dynamic_past.append({0: batch})
        if steps == 0:
            unit = units.get(name, 1)
            dynamic_past[-1][1] = unit * torch.export.Dim(f"past_{i}", min=1, max=1 << 20)
            steps = unit * EXAMPLE_STEPS
        past.append(torch.zeros(2, steps, *rest))
    dynamic: tuple[Any, ...] = ({0: batch} | sides,)
    if past:
        dynamic += (tuple(dynamic_past),)
    signal = "images" if model.config.kind == "image" else "samples"
    first, last = (signal, "tokens") if method == "encode" else ("tokens", signal)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Step(model, method, names),
            (example, *past),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dynamic,
            input_names=[first, *(f"past.{name}" for name in names)],
            output_names=[last, *(f"next.{name}" for name in names)],
            external_data=False,
            verbose=False,
        )
    graph = program.model_proto
    _name_axes(graph)
    return graph


def strip(graph: onnx.ModelProto) -> None:
    """Remove the exporter's metadata (names and line numbers of the source) and inferred shapes."""
    for entry in (graph.graph, *graph.graph.node, *graph.graph.input, *graph.graph.output):
        entry.ClearField("doc_string")
        entry.ClearField("metadata_props")
    for tensor in graph.graph.initializer:
        tensor.ClearField("doc_string")
        tensor.ClearField("metadata_props")
    graph.graph.ClearField("value_info")


def _name_axes(graph: onnx.ModelProto) -> None:
    """Give the axes of outputs the names that those of the input have, where the tracer lost them.

    The sizes of the output of a graph are those of its input, in the same order.
    """
    names = [name for name in _symbols(graph.graph.input[0]) if name != "batch"]
    lost = [name for name in _symbols(graph.graph.output[0]) if re.fullmatch(r"s\d+", name)]
    if len(lost) != len(names):
        return
    known = dict(zip(lost, names))
    for output in graph.graph.output:
        for axis in output.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = re.sub(
                    r"\bs\d+\b", lambda found: known.get(found[0], found[0]), axis.dim_param
                )


def _symbols(value: onnx.ValueInfoProto) -> list[str]:
    """Names in the shape of an input or output, in order, each once."""
    sizes = [axis.dim_param for axis in value.type.tensor_type.shape.dim]
    return list(dict.fromkeys(re.findall(r"[A-Za-z_]\w*", " ".join(sizes))))


def share_weights(graph: onnx.ModelProto, weights: bytes) -> None:
    """Replace large initialisers by references into model.safetensors.

    The exporter may have renamed and transposed them, so tensors are matched by value.

    Args:
        graph: the graph, changed in place.
        weights: contents of model.safetensors.

    Raises:
        ExportError: a large constant is not a stored weight.
    """
    (size,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + size])
    stored = []
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = (8 + size + offset for offset in entry["data_offsets"])
            flat = np.frombuffer(weights[start:stop], STORED[entry["dtype"]])
            stored.append((flat, entry["shape"], start))
    nodes = []
    for tensor in list(graph.graph.initializer):
        values = numpy_helper.to_array(tensor)
        if values.size < MIN_SHARED or values.dtype not in (np.float32, np.int8):
            continue
        for flat, shape, start in stored:
            if flat.size != values.size or (flat.dtype == np.int8) != (values.dtype == np.int8):
                continue
            saved = flat.reshape(shape).astype(values.dtype)
            transposed = values.ndim == 2 and np.array_equal(saved.T, values)
            if not transposed and not np.array_equal(saved.reshape(values.shape), values):
                continue
            narrow = flat.dtype == np.float16
            shared = graph.graph.initializer.add(
                name=f"{tensor.name}.stored",
                data_type=helper.np_dtype_to_tensor_dtype(flat.dtype),
                data_location=TensorProto.EXTERNAL,
                dims=shape if transposed else values.shape,
            )
            facts = {"location": WEIGHTS, "offset": start, "length": flat.nbytes}
            for key, value in facts.items():
                shared.external_data.add(key=key, value=str(value))
            wide = f"{tensor.name}.wide" if transposed else tensor.name
            to_float = {"op_type": "Cast", "to": TensorProto.FLOAT}
            widen = to_float if narrow else {"op_type": "Identity"}
            nodes.append(helper.make_node(inputs=[shared.name], outputs=[wide], **widen))
            if transposed:
                nodes.append(helper.make_node("Transpose", [wide], [tensor.name], perm=[1, 0]))
            graph.graph.initializer.remove(tensor)
            break
        else:  # computed from weights, as the codes of SimVQ are
            if values.size > MAX_COMPUTED:
                size = values.size
                raise ExportError(
                    f"{tensor.name}: a constant of {size} numbers is not a stored weight"
                )
    nodes += graph.graph.node
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


def save_graph(
    graph: onnx.ModelProto, config: ModelConfig, model_fingerprint: bytes, path: Path
) -> None:
    """Write a graph, with a description of its model as metadata."""
    facts: dict[str, Any] = {
        "model_type": "vpcodec",
        "version": __version__,
        "kind": config.kind,
        "name": config.name,
        "hop_length": config.hop_length,
        "codebook_size": config.codebook_size,
        "license": config.license,
        "fingerprint": model_fingerprint.hex(),
    }
    if isinstance(config, AudioModelConfig):
        facts["sample_rate"] = config.sample_rate
    if isinstance(config, AudioConfig):
        facts["decoder_delay"] = config.decoder_delay
    helper.set_model_props(graph, {key: str(value) for key, value in facts.items()})
    onnx.save(graph, path)


def same_tokens(size: str, expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Check that ONNX Runtime gives the tokens of torch.

    Args:
        size: size of the input, for messages.
        expected: int64 tokens from torch.
        found: int64 tokens from ONNX Runtime.

    Returns:
        `found`.

    Raises:
        ExportError: the shapes differ, or more tokens than rounding explains.
    """
    if found.shape != expected.shape:
        raise ExportError(f"{size}: tokens of shape {found.shape}, with torch {expected.shape}")
    wrong = np.mean(expected != found)
    if wrong > max(TOKEN_TOLERANCE, 1 / found.size):  # a single tie is not a fault
        raise ExportError(f"{size}: {wrong:.1%} of the tokens differ from torch")
    return found


def same_signal(size: str, expected: np.ndarray, found: np.ndarray) -> None:
    """Check that ONNX Runtime decodes the signal of torch; arguments as for `same_tokens`.

    Raises:
        ExportError: the signals differ by more than SAMPLE_TOLERANCE.
    """
    error = np.abs(expected - found).max()
    if not error <= SAMPLE_TOLERANCE:
        raise ExportError(f"{size}: the decoded signal differs from torch by {error:.1e}")
