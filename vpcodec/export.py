"""Export of a training run to a model folder: weights, two ONNX graphs, configuration and card.

The weights are stored once, as float16 (codebooks as float32), in model.safetensors. The ONNX
graphs refer to them (ONNX external data with offsets) and widen them when they are loaded, so that
torch and ONNX Runtime compute in float32 with the same numbers. The graphs are verified first.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from .backends import Backend
from .backends.onnx import OnnxBackend
from .backends.torch import TorchBackend
from .codec import AudioCodec
from .config import AudioConfig, ConfigError, ImageConfig, parse_model
from .graphs import same_signal, same_tokens, save_graph, share_weights, strip, trace
from .hub import bundled_folders
from .media.files import atomic_folder
from .model_folder import (
    CONFIG,
    WEIGHTS,
    ModelError,
    ModelFolder,
    fingerprint,
    read_folder,
    token_space,
    write_folder_config,
)
from .models import Autoencoder, build_model
from .quantizers import NoCodebookError
from .recipe.quantizers import parse_training
from .training.checkpoints import (
    CheckpointError,
    averaged_weights,
    inference_weights,
    load_newest,
    one_line,
)


def export_run(
    run: Path,
    target: Path,
    *,
    force: bool = False,
    like: Path | None = None,
    note: Callable[[str], None] | None = None,
) -> None:
    """Export the averaged weights of a training run.

    Args:
        run: run folder, whose newest checkpoint is used, or a checkpoint file such as
            `best.safetensors`.
        target: model folder to create; it appears complete or not at all.
        force: replace an existing folder.
        like: folder of a model with the same token space, whose entropy tables and token file
            identities are copied; None: a bundled model with that space, if there is one.
        note: called with a message for each damaged checkpoint that is skipped.

    Raises:
        CheckpointError: there is no checkpoint, it cannot be used, or it has no codebook yet.
        FileExistsError: `target` exists and `force` is not set.
        ExportError: the graphs do not agree with torch.
        ModelError: `like` is damaged or has another token space.
    """
    groups, state = load_newest(run, note)
    try:
        training = parse_training(state["config"], state.get("quantizer", {}))
        model = build_model(parse_model(state["config"]), training.options())
        model.load_state_dict(averaged_weights(groups))
    except (KeyError, ConfigError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{run}: the checkpoint is incomplete ({one_line(error)})") from None
    try:
        if not model.quantizer.fitted:  # the run was interrupted before it made the codebook
            model.quantizer.fit()
    except (NoCodebookError, ValueError) as error:
        raise CheckpointError(f"{run}: no codebook yet ({error}); continue training") from None
    export_model(model, target, force=force, like=like)


def export_model(
    model: Autoencoder, target: Path, *, force: bool = False, like: Path | None = None
) -> None:
    """Export a torch model; see `export_run`."""
    with atomic_folder(target, force=force, mark=CONFIG) as folder:
        _write(model, folder, like)
        _verify(folder)


def _write(model: Autoencoder, folder: Path, like: Path | None) -> None:
    config = model.config
    stored = _stored_state(model)
    weights = save(stored, metadata={"format": "pt"})
    (folder / WEIGHTS).write_bytes(weights)
    space = token_space(config, weights)
    relative = _relative(space, like)  # may raise, so before the slow part
    rounded = build_model(config).eval().requires_grad_(False)
    rounded.load_state_dict(stored)
    model_fingerprint = fingerprint(config, weights)
    signal, tokens = _examples(config)
    for name, method, shapes, example in (
        ("encoder", "encode", rounded.encoder_state, signal),
        ("decoder", "decode", rounded.decoder_state, tokens),
    ):
        graph = trace(rounded, method, shapes, *example)
        share_weights(graph, weights)
        strip(graph)
        save_graph(graph, config, model_fingerprint, folder / f"{name}.onnx")
    (folder / "README.md").write_text(_card(config, rounded))
    names = [WEIGHTS, "encoder.onnx", "decoder.onnx"]
    if relative is None:
        write_folder_config(folder, config, model_fingerprint, names, space=space)
        return
    for name in relative.tables:
        shutil.copyfile(relative.file(name), folder / name)
    write_folder_config(
        folder,
        config,
        model_fingerprint,
        [*names, *relative.tables],
        space=space,
        earlier=[x for x in (*relative.earlier, relative.fingerprint) if x != model_fingerprint],
        revisions=relative.revisions,
    )


def _relative(space: bytes, like: Path | None) -> ModelFolder | None:
    """The model `like`; without it, a bundled model with this token space, if there is one.

    Raises:
        ModelError: `like` is damaged or has another token space.
    """
    if like is None:
        bundled = (read_folder(path) for path in bundled_folders().values())
        return next((model for model in bundled if model.space == space), None)
    model = read_folder(like)
    model.check()
    if model.space != space:
        raise ModelError(f"{like}: has another token space (its encoder or quantizer differs)")
    return model


def _examples(config: AudioConfig | ImageConfig) -> list[tuple[torch.Tensor, dict[int, Any]]]:
    """Example inputs of encoder and decoder for tracing, each with its dynamic dimensions."""
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
    """What a model folder keeps: float16, but codes in full, or close ones would become one, and
    whole numbers as they are."""
    state = {name: value.detach().cpu() for name, value in inference_weights(model).items()}
    return {name: _narrow(name, tensor).contiguous() for name, tensor in state.items()}


def _narrow(name: str, tensor: torch.Tensor) -> torch.Tensor:
    exact = name.startswith("quantizer.") or not tensor.is_floating_point()
    return tensor if exact else tensor.half()


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
    """Compare clips of 1, hop - 1, hop, hop + 1 and several thousand samples."""
    hop = reference.hop_length
    rng = np.random.default_rng(0)
    for n in (1, hop - 1, hop, hop + 1, 4321 + 7 * hop):
        samples = np.cumsum(rng.standard_normal((2, n)), 1).astype(np.float32)
        samples *= 0.5 / max(np.abs(samples).max(), 1)
        tokens = same_tokens(f"{n} samples", reference.encode(samples), exported.encode(samples))
        same_signal(f"{n} samples", reference.decode(tokens, n), exported.decode(tokens, n))


def _compare_images(config: ImageConfig, reference: Backend, exported: Backend) -> None:
    """Compare images of one block and of several."""
    rng = np.random.default_rng(0)
    for rows, columns in ((1, 1), (1, 3), (2, 1)):
        shape = (2, 3, rows * config.block_size, columns * config.block_size)
        images = np.cumsum(np.cumsum(rng.standard_normal(shape), 2), 3)
        images = (images / np.abs(images).max()).astype(np.float32)
        size = f"{shape[3]} x {shape[2]} pixels"
        tokens = same_tokens(size, *(b.encode(images, None)[0] for b in (reference, exported)))
        same_signal(size, *(b.decode(tokens, None)[0] for b in (reference, exported)))


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
            f"One token per {config.hop_length} x {config.hop_length} pixels from {codebook}, "
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
