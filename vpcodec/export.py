"""A trained run to a model folder: weights, two ONNX graphs, configuration, card; verified first.

The weights are stored once, as float16 (codebooks as float32), in model.safetensors; the ONNX
graphs refer to them there (ONNX external data with offsets) and widen them when they are loaded, so
torch and ONNX Runtime compute in float32 with the very same numbers.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save
from torch import nn

from . import __version__
from .backends import Backend
from .backends.onnx import OnnxBackend
from .backends.torch import TorchBackend
from .codec import AudioCodec
from .config import AudioConfig, ConfigError, ImageConfig, parse_model
from .hub import WEIGHTS, fingerprint, read_folder, write_folder_config
from .models import Autoencoder, build_model
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
        model = build_model(parse_model(state["config"]))
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


def export_model(model: Autoencoder, target: Path, *, force: bool = False) -> None:
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


def _write(model: Autoencoder, folder: Path) -> None:
    config = model.config
    stored = _stored_state(model)
    weights = save(stored, metadata={"format": "pt"})
    (folder / WEIGHTS).write_bytes(weights)
    rounded = build_model(config).eval().requires_grad_(False)
    rounded.load_state_dict(stored)
    mark = fingerprint(config, weights)
    metadata = {
        "model_type": "vpcodec",
        "version": __version__,
        "kind": config.kind,
        "name": config.name,
        "hop_length": config.hop_length,
        "codebook_size": config.codebook_size,
        "license": config.license,
        "fingerprint": mark.hex(),
    }
    if isinstance(config, AudioConfig):
        metadata |= {"sample_rate": config.sample_rate, "decoder_delay": config.decoder_delay}
    signal, tokens = _examples(config)
    for name, method, shapes, example in (
        ("encoder", "encode", rounded.encoder_state, signal),
        ("decoder", "decode", rounded.decoder_state, tokens),
    ):
        graph = _trace(rounded, method, shapes, *example)
        _share_weights(graph, weights)
        _strip(graph)
        helper.set_model_props(graph, {key: str(value) for key, value in metadata.items()})
        onnx.save(graph, folder / f"{name}.onnx")
    (folder / "README.md").write_text(_card(config, rounded))
    write_folder_config(folder, config, mark, [WEIGHTS, "encoder.onnx", "decoder.onnx"])


def _examples(config: AudioConfig | ImageConfig) -> list[tuple[torch.Tensor, dict[int, Any]]]:
    """Inputs of encoder and decoder to trace the graphs with, and the sides that may differ."""
    if isinstance(config, AudioConfig):
        frames = torch.export.Dim("frames", min=1, max=1 << 20)
        return [
            (torch.zeros(2, 5 * config.hop_length), {1: config.hop_length * frames}),
            (torch.zeros(2, 5, dtype=torch.int64), {1: frames}),
        ]
    rows, columns = (torch.export.Dim(name, min=1, max=1 << 12) for name in ("rows", "columns"))
    block, window = config.block_size, config.attention_window
    return [
        (torch.zeros(2, 3, 2 * block, 3 * block), {2: block * rows, 3: block * columns}),
        (
            torch.zeros(2, 2 * window, 3 * window, dtype=torch.int64),
            {1: window * rows, 2: window * columns},
        ),
    ]


def _stored_state(model: Autoencoder) -> dict[str, torch.Tensor]:
    """What a model folder keeps: float16, but codes in full, or close ones would become one."""
    needless = {f"quantizer.{name}" for name in model.quantizer.training_state}
    state = {k: v.detach().cpu() for k, v in model.state_dict().items() if k not in needless}
    return {
        k: (v if k.startswith("quantizer.") else v.half()).contiguous() for k, v in state.items()
    }


class _Step(nn.Module):
    """One direction of the model with its states as positional inputs and outputs."""

    def __init__(self, model: Autoencoder, method: str, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.method = method
        self.names = names

    def forward(self, x: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state = State(dict(zip(self.names, past)))
        y = getattr(self.model, self.method)(x, state)
        return y, *(state.next[name] for name in self.names)


def _trace(model, method, shapes, example, sides) -> onnx.ModelProto:
    names = list(shapes)
    past = tuple(zero_state(shapes, 2).values())
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    dynamic: tuple[Any, ...] = ({0: batch} | sides,)
    if past:
        dynamic += (tuple({0: batch} for _ in past),)
    signal = "samples" if isinstance(model.config, AudioConfig) else "images"
    first, last = (signal, "tokens") if method == "encode" else ("tokens", signal)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, aloud
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
    """Compare ONNX Runtime with torch.

    Raises:
        ExportError: they do not agree.
    """
    model = read_folder(folder)
    torch_backend = TorchBackend(model, threads=None, device="cpu")
    onnx_backend = OnnxBackend(model, threads=None, device="cpu")
    if isinstance(model.config, AudioConfig):
        _compare_audio(AudioCodec(model, torch_backend), AudioCodec(model, onnx_backend))
    else:
        _compare_images(model.config, torch_backend, onnx_backend)


def _compare_audio(reference: AudioCodec, exported: AudioCodec) -> None:
    """On 1, hop - 1, hop, hop + 1 and several thousand samples."""
    hop = reference.hop_length
    rng = np.random.default_rng(0)
    for n in (1, hop - 1, hop, hop + 1, 4321 + 7 * hop):
        samples = np.cumsum(rng.standard_normal((2, n)), 1).astype(np.float32)
        samples *= 0.5 / max(np.abs(samples).max(), 1)
        tokens = _same_tokens(f"{n} samples", reference.encode(samples), exported.encode(samples))
        _same_signal(f"{n} samples", reference.decode(tokens, n), exported.decode(tokens, n))


def _compare_images(config: ImageConfig, reference: Backend, exported: Backend) -> None:
    """On images of one block and of several."""
    rng = np.random.default_rng(0)
    for rows, columns in ((1, 1), (1, 3), (2, 1)):
        shape = (2, 3, rows * config.block_size, columns * config.block_size)
        images = np.cumsum(np.cumsum(rng.standard_normal(shape), 2), 3)
        images = (images / np.abs(images).max()).astype(np.float32)
        size = f"{shape[3]} x {shape[2]} pixels"
        expected, found = (backend.encode(images, None)[0] for backend in (reference, exported))
        tokens = _same_tokens(size, expected, found)
        expected, found = (backend.decode(tokens, None)[0] for backend in (reference, exported))
        _same_signal(size, expected, found)


def _same_tokens(size: str, expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    if found.shape != expected.shape:
        raise ExportError(f"{size}: tokens of shape {found.shape}, with torch {expected.shape}")
    wrong = np.mean(expected != found)
    if wrong > TOKEN_TOLERANCE:
        raise ExportError(f"{size}: {wrong:.1%} of the tokens differ from torch")
    return found


def _same_signal(size: str, expected: np.ndarray, found: np.ndarray) -> None:
    error = np.abs(expected - found).max()
    if not error <= SAMPLE_TOLERANCE:
        raise ExportError(f"{size}: what is decoded differs from torch by {error:.1e}")


def _card(config: AudioConfig | ImageConfig, model: nn.Module) -> str:
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    codebook = f"one codebook of\n{config.codebook_size:,} codes"
    if isinstance(config, AudioConfig):
        tags, example = "audio, codec, speech, tokenizer", "in.wav"
        facts = (
            f"{config.sample_rate} Hz, {config.frame_rate:.2f} tokens/s from {codebook}, "
            f"{config.bitrate:.0f} bit/s nominal, {millions:.2f} M\nparameters, "
            f"{config.latency * 1000:.0f} ms algorithmic latency."
        )
    else:
        tags, example = "image, tokenizer", "photo.png"
        facts = (
            f"A token for {config.hop_length} x {config.hop_length} pixels from {codebook}, "
            f"{config.bits_per_pixel:.3f} bits per pixel nominal,\n{millions:.2f} M parameters."
        )
    return f"""---
license: {config.license.lower()}
library_name: vpcodec
tags: [{tags}]
---

# {config.name}

{config.description}

{facts}

    vpcodec encode {example} out.tok --model {config.name}
"""
