"""vpcodec info: describe a token file or a model."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import typer

from ..backends import architecture_of
from ..config import (
    AudioConfig,
    AudioModelConfig,
    GridConfig,
    ImageConfig,
    ModelConfig,
    QuantizerConfig,
)
from ..corpus import describe, is_corpus
from ..terminal import escape
from ..tokenfile import AudioHeader, ImageHeader, TokenFileError, Verification, verify
from . import options

SHOWN = 20  # entries of a list; a JSON document has all that are known


def info(
    targets: list[str] = typer.Argument(
        ...,
        metavar="FILE|FOLDER|MODEL...",
        help="Token files, corpora, - or models.",
    ),
    as_json: bool = options.JSON,
) -> None:
    """Describe token files, verifying them fully, corpora of tokens, or models.

    \b
    vpcodec info out.tok
    vpcodec info tokens/ --json
    vpcodec info speech-3k
    """
    from . import common

    places = [place for target in targets for place in _expand(target)]
    described, failures = [], []
    for place in places:
        facts, error = _facts(place)
        if facts is not None:
            described.append(facts)
            if not as_json:
                if len(described) > 1:
                    typer.echo()
                _print(facts)
        if error is not None:
            failures.append(error)
    if as_json and described:
        alone = len(targets) == len(places) == 1
        print(json.dumps(described[0] if alone else described, indent=2))
    if failures and len(places) == 1:
        raise common.UsageError(failures[0])
    for failure in failures:
        print(f"vpcodec: {escape(failure)}", file=sys.stderr)
    if failures:
        print(f"vpcodec: {len(failures)} of {len(places)} failed", file=sys.stderr)
        raise typer.Exit(1)


def _expand(target: str) -> list[str]:
    """The token files of a folder that is no model, or the target itself."""
    from ..hub import bundled_folders
    from ..model_folder import CONFIG
    from .modalities import find_media

    folder = Path(target)
    known = target in bundled_folders() or (folder / CONFIG).exists() or is_corpus(folder)
    if not folder.is_dir() or known:
        return [target]
    return [str(folder / name) for name in find_media(folder, (".tok",))] or [target]


def _facts(place: str) -> tuple[dict[str, Any] | None, str | None]:
    """What is known, and what is wrong."""
    from .errors import USER_ERRORS, explain

    try:
        if place == "-" or os.path.isfile(place) or place.endswith(".tok"):
            facts, error = _token_facts(place)
            return facts, None if error is None else f"{place}: {error}"
        if is_corpus(place):
            return describe(place), None
        return _model_facts(place), None
    except USER_ERRORS as error:
        return None, explain(error)


def _print(facts: dict[str, Any]) -> None:
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        typer.echo(f"{name.replace('_', ' '):<{width}}  {escape(_show(value))}")


def _token_facts(target: str) -> tuple[dict[str, Any], str | None]:
    from ..hub import model_of
    from . import common

    found = verify(common.pipe_in() if target == "-" else target)
    header = found.header
    if header is None:
        raise TokenFileError(f"{target}: {found.error}")
    tokens = found.frames * header.channels
    facts: Callable[..., dict[str, Any]] = _audio_token_facts
    if isinstance(header, ImageHeader):
        facts = _image_token_facts
    return {
        "file": target,
        "model": header.model,
        "fingerprint": header.fingerprint.hex(),
        "decoded_by": model_of(header),
        **facts(header, tokens, found),
        "bytes": found.total_bytes,
        "bits_per_token": round(8 * found.payload_bytes / tokens, 3) if tokens else None,
        "blocks": found.blocks,
        "damaged_blocks": list(found.damaged),
        "damaged_count": found.n_damaged,
        "checksums": "ok" if found.ok else found.error,
    }, found.error


def _audio_token_facts(header: AudioHeader, tokens: int, found: Verification) -> dict[str, Any]:
    seconds = found.n_samples / header.original_rate
    return {
        "kind": "audio",
        "duration_seconds": round(seconds, 6),
        "original_rate": header.original_rate,
        "model_rate": header.sample_rate,
        "channels": header.channels,
        "samples": found.n_samples,
        "tokens": tokens,
        "tokens_per_second": round(header.frame_rate * header.channels, 3),
        "codebook_size": header.codebook_size,
        "nominal_bitrate": round(header.nominal_bitrate, 1),
        "real_bitrate": round(8 * found.total_bytes / seconds, 1) if seconds else None,
    }


def _image_token_facts(header: ImageHeader, tokens: int, found: Verification) -> dict[str, Any]:
    return {
        "kind": "image",
        "width": header.width,
        "height": header.height,
        "components": header.components,
        "rows": header.rows,
        "columns": header.columns,
        "channels": header.channels,
        "tokens": tokens,
        "codebook_size": header.codebook_size,
        "nominal_bits_per_pixel": round(header.bits_per_pixel, 4),
        "real_bits_per_pixel": round(8 * found.total_bytes / header.n_pixels, 4),
    }


def _model_facts(name: str) -> dict[str, Any]:
    from ..hub import open_model
    from ..model_folder import WEIGHTS
    from . import common

    with common.status() as note:
        model = open_model(name, note=note)
    config = model.config
    model.check()
    source = {"source": _source(model.source)} if model.source else {}
    return {
        "model": config.name,
        "kind": config.modality,
        "description": config.description,
        "license": config.license,
        "path": str(model.path),
        **source,
        "fingerprint": model.fingerprint.hex(),
        "space": model.space.hex(),
        "earlier": [item.hex() for item in model.earlier],
        "hop_length": config.hop_length,
        "codebook_size": config.codebook_size,
        "quantizer": _quantizer(config.quantizer),
        "parameters": _count_parameters(model.path / WEIGHTS),
        "entropy_coding": bool(model.tables),
        "entropy_tables": len(model.tables),
        **_facts_of(config),
        "bytes": sum((model.path / file).stat().st_size for file in model.files),
        "checksums": "ok",
    }


def _facts_of(config: ModelConfig) -> dict[str, Any]:
    """Rates, stages and Transformers."""
    if isinstance(config, ImageConfig):
        return _image_model_facts(config)
    architecture = architecture_of(config)
    if architecture is None:
        return _audio_model_facts(cast(AudioConfig, config))
    facts = architecture.describe(config)
    stages = {name: _stages(*zip(*x)) for name, x in facts.items() if not isinstance(x, str)}
    return {**_rates(cast(AudioModelConfig, config)), **facts, **stages}


def _rates(config: AudioModelConfig) -> dict[str, Any]:
    return {
        "sample_rate": config.sample_rate,
        "tokens_per_second": round(config.frame_rate, 3),
        "nominal_bitrate": round(config.bitrate, 1),
        "latency_ms": None if config.latency is None else round(config.latency * 1000, 1),
    }


def _audio_model_facts(config: AudioConfig) -> dict[str, Any]:
    return {
        **_rates(config),
        "encoder": _stages(config.encoder_dims, config.encoder_depths, config.strides),
        "decoder": _stages(config.decoder_dims, config.decoder_depths, config.strides[::-1]),
        "transformer": (
            f"{config.encoder_layers} + {config.decoder_layers} layers of "
            f"{config.encoder_dims[-1]}, window {config.attention_window} tokens"
        ),
    }


def _image_model_facts(config: ImageConfig) -> dict[str, Any]:
    strides = (config.patch_size, *(2 for _ in config.dims[1:]))
    window = config.attention_window
    return {
        "nominal_bits_per_pixel": round(config.bits_per_pixel, 4),
        "encoder": _stages(config.dims, config.encoder_depths, strides),
        "decoder": _stages(config.dims[::-1], config.decoder_depths[::-1], strides[::-1]),
        "transformer": (
            f"{config.encoder_layers} + {config.decoder_layers} layers of "
            f"{config.dims[-1]}, windows of {window} x {window} tokens"
        ),
    }


def _source(source: dict[str, Any]) -> str:
    commit = f"@{source['commit']}" if source.get("commit") else ""
    return f"{source.get('model', 'unknown')}{commit}"


def _quantizer(config: QuantizerConfig) -> str:
    if isinstance(config, GridConfig):
        return f"{config.type} {list(config.levels)}"
    return f"{config.type}, {config.codebook_size} codes of {config.dim} dimensions"


def _count_parameters(path: Path) -> int:
    """The number of parameters in a safetensors file, from its header (the hash is checked)."""
    import math

    from ..model_folder import MAX_HEADER_BYTES, ModelError, weights_header

    try:
        with open(path, "rb") as file:
            header, _ = weights_header(file.read(8 + MAX_HEADER_BYTES))
        return sum(math.prod(entry["shape"]) for entry in header.values())
    except (ModelError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{path}: not a safetensors file") from None


def _stages(dims: tuple[int, ...], depths: tuple[int, ...], strides: tuple[int, ...]) -> str:
    return ", ".join(f"{d}x{n} (stride {s})" for d, n, s in zip(dims, depths, strides))


def _show(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value[:SHOWN])) + (" ..." if len(value) > SHOWN else "")
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
