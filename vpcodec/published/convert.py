"""Conversion of published weights to a model folder: weights, ONNX graphs, configuration, card."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from .. import __version__
from ..backends.onnx import OnnxBackend
from ..backends.torch import TorchBackend
from ..graphs import ExportError, same_signal, same_tokens, save_graph, strip, trace
from ..media.files import atomic_folder
from ..model_folder import (
    CONFIG,
    WEIGHTS,
    ModelError,
    ModelFolder,
    fingerprint,
    read_folder,
    token_space,
    write_folder_config,
)
from .architecture import load
from .catalog import Published
from .config import SQCodecConfig
from .network import SQCodecAutoencoder
from .tiling import settle, tiled
from .weights import read_weights

MAX_FRAMES = 1 << 20


def convert(
    files: Mapping[str, Path],
    published: Published,
    target: Path,
    *,
    commit: str = "",
    force: bool = False,
) -> ModelFolder:
    """Make a model folder from published weights.

    model.safetensors keeps the weights as published; the graphs contain them folded.

    Args:
        files: module -> its .pt file, for all of `MODULES`.
        published: the model that they belong to.
        target: model folder to create; it appears complete or not at all.
        commit: commit of the repository that they came from, if any.
        force: replace an existing folder.

    Returns:
        The model folder.

    Raises:
        ModelError: the files do not contain these weights, or the graphs differ from torch.
        FileExistsError: `target` exists, and `force` is not set.
    """
    with atomic_folder(target, force=force, mark=CONFIG) as folder:
        config = published.config
        tensors = read_weights(files, config)
        weights = save(tensors, metadata={"format": "pt"})
        (folder / WEIGHTS).write_bytes(weights)
        model = load(config, tensors).requires_grad_(False)
        if not all(torch.isfinite(value).all() for value in model.parameters()):
            raise ModelError(f"{published.spec}: a direction of its weight norm is zero")
        if config.architecture == "sqcodec":
            config = config.model_copy(update={"silence": _silence(model)})
        model_fingerprint = fingerprint(config, weights)
        try:
            _write_graphs(model, folder, model_fingerprint)
        except (
            RuntimeError,
            AttributeError,
        ) as error:  # other versions of torch have other exporters
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"{published.spec}: cannot be exported ({reason})") from error
        hashes = {
            path: hashlib.sha256(Path(files[Path(path).stem]).read_bytes()).hexdigest()
            for path in published.files
        }
        (folder / "README.md").write_text(_card(published, hashes))
        source = {"model": published.spec, "commit": commit, "sha256": hashes}
        names = [WEIGHTS, "encoder.onnx", "decoder.onnx"]
        space = token_space(config, weights)
        write_folder_config(folder, config, model_fingerprint, names, source=source, space=space)
        try:
            _verify(folder, config)
        except ExportError as error:
            raise ModelError(f"{published.spec}: {error}") from None
    return read_folder(target)


def _write_graphs(model: SQCodecAutoencoder, folder: Path, model_fingerprint: bytes) -> None:
    """Write encoder.onnx and decoder.onnx, with the fingerprint of the model."""
    exported, hop = tiled(model), model.config.hop_length
    frames = torch.export.Dim("frames", min=1, max=MAX_FRAMES)
    units = {"encoder.audio": hop, "decoder.features": model.config.token_stride}
    n = model.config.attention_window + 5  # two blocks: with one, torch would fix their number
    samples, tokens = torch.zeros(2, n * hop), torch.zeros(2, n, dtype=torch.int64)
    for name, states, example, sides in (
        ("encoder", model.encoder_state, samples, {1: hop * frames}),
        ("decoder", model.decoder_state, tokens, {1: frames}),
    ):
        method = name.removesuffix("r")
        graph = trace(exported, method, states, example, sides, units=units)
        strip(graph)
        settle(graph)
        save_graph(graph, model.config, model_fingerprint, folder / f"{name}.onnx")


@torch.inference_mode()
def _silence(model: SQCodecAutoencoder) -> tuple[int, ...]:
    """The tokens of the last of three blocks of silence."""
    window = model.config.attention_window
    tokens = model.encode(torch.zeros(1, 3 * window * model.config.hop_length))
    return tuple(tokens[0, -window:].tolist())


def _verify(folder: Path, config: SQCodecConfig) -> None:
    """Compare ONNX Runtime with torch on clips of 3 tokens and of two attention blocks.

    Raises:
        ExportError: they do not agree.
    """
    model = read_folder(folder)
    reference = TorchBackend(model, threads=None, device="cpu")
    exported = OnnxBackend(model, threads=None, device="cpu")
    rng = np.random.default_rng(0)
    for n_tokens in (3, config.attention_window + 7):
        size = f"{n_tokens} tokens"
        samples = rng.standard_normal((1, n_tokens * config.hop_length)).cumsum(1)
        samples = (samples * 0.5 / np.abs(samples).max()).astype(np.float32)
        expected, found = (backend.encode(samples, None)[0] for backend in (reference, exported))
        tokens = same_tokens(size, expected, found)
        expected, found = (backend.decode(tokens, None)[0] for backend in (reference, exported))
        same_signal(size, expected, found)


def _card(published: Published, hashes: dict[str, str]) -> str:
    config = published.config
    listed = "\n".join(f"    {digest}  {path}" for path, digest in hashes.items())
    weights = f"{published.repo}, {published.name}.{published.version}"
    return f"""---
license: {config.license.lower()}
library_name: vpcodec
pipeline_tag: audio-to-audio
tags: [audio, codec, tokenizer, sqcodec]
---

# {config.name}

{config.description}

The published weights of {weights}, by their authors, converted by
vpcodec {__version__} without further training. {config.sample_rate} Hz, {config.frame_rate:.2f}
tokens/s from one codebook of {config.codebook_size:,} codes, {config.bitrate:.0f} bit/s nominal.

    vpcodec encode in.wav out.tok --model {published.spec}

SHA-256 of the files that were converted:

{listed}

## Limits

The model is not causal: it is for whole clips or long windows, not for live streams. The authors'
code has the MIT licence; if this card says "unknown", ask them about the licence of the weights.
"""
