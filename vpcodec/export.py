"""A trained run to a model folder: weights, two ONNX graphs, configuration, card; verified first.

The weights are stored once, as float16 (codebooks as float32), in model.safetensors; the ONNX
graphs refer to them there (ONNX external data with offsets) and widen them when they are loaded, so
torch and ONNX Runtime compute in float32 with the very same numbers.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save
from torch import nn

from . import __version__
from .backends.onnx import OnnxBackend
from .backends.torch import TorchBackend
from .codec import Codec
from .config import ConfigError, ModelConfig, parse_model
from .hub import WEIGHTS, fingerprint, read_folder, write_folder_config
from .models import AudioAutoencoder
from .models.layers import State, zero_state
from .quantizers import VP
from .training.checkpoints import (
    CheckpointError,
    averaged_weights,
    brief,
    find_checkpoint,
    load_checkpoint,
)

OPSET = 18
SAMPLE_TOLERANCE = 1e-4  # largest difference of decoded samples between torch and ONNX
MIN_SHARED = 4096  # smaller constants stay in the graph
STORED = {"F16": np.float16, "F32": np.float32}  # types of safetensors
MAX_COMPUTED = 1 << 18  # numbers of a constant that is no weight itself
TOKEN_TOLERANCE = 2e-3  # share of tokens that may differ (float rounding at a cell's edge)


class ExportError(RuntimeError):
    """The exported graphs do not agree with torch; nothing was written."""


def export_run(run: Path, target: Path, *, force: bool = False) -> None:
    """Export the averaged weights of a training run.

    Args:
        run: its folder, of which the newest checkpoint is taken, or a checkpoint file such as
            `best.safetensors`.
        target: model folder to make; appears whole or not at all.
        force: replace an existing folder.

    Raises:
        CheckpointError: no checkpoint there.
        FileExistsError: target exists and not `force`.
        ExportError: the graphs do not agree with torch.
    """
    groups, state = load_checkpoint(find_checkpoint(run))
    try:
        model = AudioAutoencoder(parse_model(state["config"]))
        model.load_state_dict(averaged_weights(groups))
        if isinstance(model.quantizer, VP) and not model.quantizer.fitted:  # interrupted
            model.quantizer.fit()
        if not model.quantizer.fitted:
            raise CheckpointError(f"{run}: the quantizer has no codebook yet; train on")
    except CheckpointError:
        raise
    except (KeyError, ConfigError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{run}: the checkpoint is incomplete ({brief(error)})") from None
    export_model(model, target, force=force)


def export_model(model: AudioAutoencoder, target: Path, *, force: bool = False) -> None:
    """Export a torch model; see `export_run`."""
    if target.exists() and not force:
        raise FileExistsError(f"{target}: exists (use --force to replace it)")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        _write(model, folder)
        _verify(folder)
        if target.exists():
            os.rename(target, Path(temporary) / "replaced")
        os.rename(folder, target)


def _write(model: AudioAutoencoder, folder: Path) -> None:
    config = model.config
    stored = _stored_state(model)
    weights = save(stored, metadata={"format": "pt"})
    (folder / WEIGHTS).write_bytes(weights)
    rounded = AudioAutoencoder(config).eval().requires_grad_(False)
    rounded.load_state_dict(stored)
    mark = fingerprint(config, weights)
    metadata = {
        "model_type": "vpcodec",
        "version": __version__,
        "name": config.name,
        "sample_rate": config.sample_rate,
        "hop_length": config.hop_length,
        "codebook_size": config.codebook_size,
        "decoder_delay": config.decoder_delay,
        "license": config.license,
        "fingerprint": mark.hex(),
    }
    samples = torch.zeros(2, 5 * config.hop_length)
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    frames = torch.export.Dim("frames", min=1, max=1 << 20)
    for name, method, shapes, example, axis in (
        ("encoder", "encode", rounded.encoder_state, samples, config.hop_length * frames),
        ("decoder", "decode", rounded.decoder_state, tokens, frames),
    ):
        graph = _trace(rounded, method, shapes, example, axis)
        _share_weights(graph, weights)
        _strip(graph)
        helper.set_model_props(graph, {key: str(value) for key, value in metadata.items()})
        onnx.save(graph, folder / f"{name}.onnx")
    (folder / "README.md").write_text(_card(config, rounded))
    write_folder_config(folder, config, mark, [WEIGHTS, "encoder.onnx", "decoder.onnx"])


def _stored_state(model: AudioAutoencoder) -> dict[str, torch.Tensor]:
    """What a model folder keeps: float16, but codes in full, or close ones would become one."""
    needless = {f"quantizer.{name}" for name in model.quantizer.training_state}
    state = {k: v.detach().cpu() for k, v in model.state_dict().items() if k not in needless}
    return {
        k: (v if k.startswith("quantizer.") else v.half()).contiguous() for k, v in state.items()
    }


class _Step(nn.Module):
    """One direction of the model with its states as positional inputs and outputs."""

    def __init__(self, model: AudioAutoencoder, method: str, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.method = method
        self.names = names

    def forward(self, x: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state = State(dict(zip(self.names, past)))
        y = getattr(self.model, self.method)(x, state)
        return y, *(state.next[name] for name in self.names)


def _trace(model, method, shapes, example, axis) -> onnx.ModelProto:
    names = list(shapes)
    past = tuple(zero_state(shapes, 2).values())
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    dynamic = ({0: batch, 1: axis}, tuple({0: batch} for _ in past))
    first, last = ("samples", "tokens") if method == "encode" else ("tokens", "samples")
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
    return program.model_proto


def _strip(graph: onnx.ModelProto) -> None:
    """Drop the exporter's notes (names and line numbers of the source) and inferred shapes."""
    for entry in (graph.graph, *graph.graph.node, *graph.graph.input, *graph.graph.output):
        entry.ClearField("doc_string")
        entry.ClearField("metadata_props")
    for tensor in graph.graph.initializer:
        tensor.ClearField("doc_string")
        tensor.ClearField("metadata_props")
    graph.graph.ClearField("value_info")


def _share_weights(graph: onnx.ModelProto, weights: bytes) -> None:
    """Replace large initialisers by references into model.safetensors.

    The exporter may have transposed a matrix, so tensors are recognised by their values.
    """
    (size,) = struct.unpack("<Q", weights[:8])
    table = json.loads(weights[8 : 8 + size])
    stored = []
    for name, entry in table.items():
        if name != "__metadata__":
            start, stop = (8 + size + offset for offset in entry["data_offsets"])
            flat = np.frombuffer(weights[start:stop], STORED[entry["dtype"]])
            stored.append((flat, entry["shape"], start))
    nodes = []
    for tensor in list(graph.graph.initializer):
        values = numpy_helper.to_array(tensor)
        if values.size < MIN_SHARED or values.dtype != np.float32:
            continue
        for flat, shape, start in stored:
            if flat.size != values.size:
                continue
            saved = flat.reshape(shape).astype(np.float32)
            transposed = values.ndim == 2 and np.array_equal(saved.T, values)
            if not transposed and not np.array_equal(saved.reshape(values.shape), values):
                continue
            narrow = flat.dtype == np.float16
            shared = graph.graph.initializer.add(
                name=f"{tensor.name}.stored",
                data_type=TensorProto.FLOAT16 if narrow else TensorProto.FLOAT,
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
                raise ExportError(f"{tensor.name}: a constant of {size} numbers is no weight")
    nodes += graph.graph.node
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


def _verify(folder: Path) -> None:
    """Compare ONNX Runtime with torch on 1, hop - 1, hop, hop + 1 and several thousand samples."""
    model = read_folder(folder)
    hop = model.config.hop_length
    reference = Codec(model, TorchBackend(model, threads=None, device="cpu"))
    exported = Codec(model, OnnxBackend(model, threads=None, device="cpu"))
    rng = np.random.default_rng(0)
    for n in (1, hop - 1, hop, hop + 1, 4321 + 7 * hop):
        samples = np.cumsum(rng.standard_normal((2, n)), 1).astype(np.float32)
        samples *= 0.5 / max(np.abs(samples).max(), 1)
        expected, tokens = reference.encode(samples), exported.encode(samples)
        wrong = np.mean(expected != tokens)
        if tokens.shape != expected.shape or wrong > TOKEN_TOLERANCE:
            raise ExportError(f"{n} samples: {wrong:.1%} of the tokens differ from torch")
        error = np.abs(reference.decode(tokens, n) - exported.decode(tokens, n)).max()
        if not error <= SAMPLE_TOLERANCE:
            raise ExportError(f"{n} samples: decoded audio differs from torch by {error:.1e}")


def _card(config: ModelConfig, model: nn.Module) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    return f"""---
license: {config.license.lower()}
library_name: vpcodec
tags: [audio, codec, speech, tokenizer]
---

# {config.name}

{config.description}

{config.sample_rate} Hz, {config.frame_rate:.2f} tokens/s from one codebook of
{config.codebook_size:,} codes, {config.bitrate:.0f} bit/s nominal, {parameters / 1e6:.2f} M
parameters, {config.latency * 1000:.0f} ms algorithmic latency.

    vpcodec encode in.wav out.tok --model {config.name}
"""
