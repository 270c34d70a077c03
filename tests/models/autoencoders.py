"""Audio autoencoders that tests are made of: those of recipes, and the smallest one."""

from __future__ import annotations

import torch
from paths import RECIPES

from vpcodec.config import AudioConfig
from vpcodec.models import AudioAutoencoder
from vpcodec.recipe import load_recipe

MINIMAL = {
    "name": "minimal",
    "strides": (4, 2),
    "encoder_dims": (8, 8),
    "encoder_depths": (0, 1),
    "decoder_dims": (8, 8),
    "decoder_depths": (1, 0),
    "kernel_size": 1,
    "tconv_kernels": (1,),
    "tconv_taps": 4,
    "attention_window": 1,
    "attention_heads": 1,
    "encoder_layers": 0,
    "decoder_layers": 1,
    "enhance_kernels": (1,),
    "enhance_dilations": (1,),
    "last_dilations": (),
    "synthesis_taps": 1,
    "decoder_delay": 1,
    "quantizer": {"levels": (3,)},
}


def config_of(name: str) -> AudioConfig:
    """ "minimal", or a file in recipes/, whose model is "without noise" if the name ends so."""
    if name == "minimal":
        return AudioConfig(**MINIMAL)
    recipe, _, silent = name.partition(" without ")
    return load_recipe(RECIPES / recipe, ["model.noise_channels=null"] if silent else []).model


def build(config: AudioConfig) -> AudioAutoencoder:
    """In eval mode, with no bias, norm or distance bias left at its neutral start."""
    torch.manual_seed(0)
    model = AudioAutoencoder(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "distance_bias" in name or "alpha" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
