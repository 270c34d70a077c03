"""The published SQCodec and L3AC as an `Architecture` for backends, codecs and commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..backends import Architecture
from .config import SQCodecConfig
from .streams import WindowedDecoderStream, WindowedEncoderStream

if TYPE_CHECKING:
    from torch import Tensor, nn


def load(config: SQCodecConfig, published: Mapping[str, Tensor]) -> nn.Module:
    """Build the torch model with published weights, in eval mode.

    Raises:
        RuntimeError: the weights do not fit the configuration.
    """
    from .network import SQCodecAutoencoder
    from .tensors import expected_shapes, fold

    for name, shape in expected_shapes(config).items():
        if name not in published or tuple(published[name].shape) != shape:
            raise RuntimeError(f"not the published tensors ({name})")
    model = SQCodecAutoencoder(config).eval()
    model.load_state_dict(fold(published, config))
    return model


def describe(config: SQCodecConfig) -> dict[str, Any]:
    """See `Architecture`."""
    encoder = config.encoder_layers + config.encoder_outer_layers
    decoder = config.decoder_layers + config.decoder_outer_layers
    return {
        "encoder": list(zip(config.encoder_dims, config.encoder_depths, (1, *config.strides))),
        "decoder": list(zip(config.decoder_dims, config.decoder_depths, config.decoder_strides)),
        "transformer": (
            f"{encoder} + {decoder} layers of {config.feature_dim}, blocks of "
            f"{config.attention_window} tokens"
        ),
    }


SQCODEC = Architecture(
    names=("sqcodec", "l3ac"),
    config=SQCodecConfig,
    load=load,
    encoder_stream=WindowedEncoderStream,
    decoder_stream=WindowedDecoderStream,
    describe=describe,
    # Calls differ in length, so one planned block for all tensors of a call only adds memory.
    plan_memory=False,
)
