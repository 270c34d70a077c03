"""Architectures that are not native: what the rooms that hold them register."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config import AudioModelConfig, ModelConfig, register_architecture
from .protocol import Backend, Stream

if TYPE_CHECKING:
    from torch import Tensor, nn

Stages = list[tuple[int, int, int]]  # width, depth and stride of each


@dataclass(frozen=True)
class Architecture:
    """An architecture of audio models that is not native.

    Attributes:
        names: values of `architecture` in config.json.
        config: what is described there.
        load: a configuration and the tensors of model.safetensors to the torch model, in eval
            mode; raises RuntimeError where they do not fit. Only this needs torch.
        encoder_stream, decoder_stream: of a configuration, a backend, and the number of channels.
        describe: "encoder" and "decoder" to their stages, "transformer" to a line.
        plan_memory: whether ONNX Runtime shall plan memory, which suits calls of equal length.
    """

    names: tuple[str, ...]
    config: type[AudioModelConfig]
    load: Callable[[Any, Mapping[str, Tensor]], nn.Module]
    encoder_stream: Callable[[Any, Backend, int], Stream]
    decoder_stream: Callable[[Any, Backend, int], Stream]
    describe: Callable[[Any], dict[str, str | Stages]]
    plan_memory: bool = True


_registered: dict[type[ModelConfig], Architecture] = {}


def register(architecture: Architecture) -> None:
    """Make models of an architecture known to `parse_model`, to the backends and to codecs."""
    register_architecture(architecture.names, architecture.config)
    _registered[architecture.config] = architecture


def architecture_of(config: ModelConfig) -> Architecture | None:
    """The registered architecture of a model; None: a native one."""
    return _registered.get(type(config))
