"""Architectures that are not native, and their registration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config import AudioModelConfig, ModelConfig, register_architecture
from .protocol import Backend, DecoderStream, EncoderStream

if TYPE_CHECKING:
    from torch import Tensor, nn

Stages = list[tuple[int, int, int]]  # width, depth and stride of each


@dataclass(frozen=True)
class Architecture:
    """An architecture of audio models that is not native.

    Attributes:
        names: values of `architecture` in config.json.
        config: the class of their configuration.
        load: configuration and tensors of model.safetensors -> torch model in eval mode; raises
            RuntimeError if they do not fit. Only this needs torch.
        encoder_stream: configuration, backend and number of channels -> stream.
        decoder_stream: the same for decoding.
        describe: configuration -> stages of "encoder" and "decoder", and a line on "transformer".
        plan_memory: whether ONNX Runtime should plan memory, which suits calls of equal length.
    """

    names: tuple[str, ...]
    config: type[AudioModelConfig]
    load: Callable[[Any, Mapping[str, Tensor]], nn.Module]
    encoder_stream: Callable[[Any, Backend, int], EncoderStream]
    decoder_stream: Callable[[Any, Backend, int], DecoderStream]
    describe: Callable[[Any], dict[str, str | Stages]]
    plan_memory: bool = True


_registered: dict[type[ModelConfig], Architecture] = {}


def register(architecture: Architecture) -> None:
    """Make an architecture known to `parse_model`, to backends and to codecs."""
    register_architecture(architecture.names, architecture.config)
    _registered[architecture.config] = architecture


def architecture_of(config: ModelConfig) -> Architecture | None:
    """The registered architecture of a model; None for native models."""
    return _registered.get(type(config))
