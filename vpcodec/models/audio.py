"""The native audio autoencoder: causal encoder, quantizer, causal decoder."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from ..config import AudioConfig
from ..quantizers import Quantized, build_quantizer
from .layers import (
    CausalConv1d,
    ConvUnit,
    DilatedUnit,
    DownLayer,
    FrameCounter,
    NoiseInjection,
    State,
    SynthesisFilterbank,
    UpLayer,
    linear,
    name_states,
)
from .local_attention import LocalTransformer
from .tconv import EnhanceBlock, TConv


class Encoder(nn.Module):
    """Samples to latents: TConv, ConvUnits and down layers, local Transformer, projection.

    Args:
        config: configuration of the model.
        latent_std: approximate standard deviation of the latents before training.
    """

    def __init__(self, config: AudioConfig, latent_std: float = 1.0) -> None:
        super().__init__()
        dims, strides = config.encoder_dims, config.strides
        self.first = TConv(
            config.tconv_kernels,
            config.tconv_channels,
            dims[0],
            stride=strides[0],
            taps=config.tconv_taps,
        )
        self.stages = nn.ModuleList()
        self.downs = nn.ModuleList()
        expansions = config.encoder_expansions or [config.expansion] * len(dims)
        for i, dim in enumerate(dims):
            self.stages.append(_units(dim, config.encoder_depths[i], expansions[i], config))
            if i + 1 < len(dims):
                self.downs.append(DownLayer(dim, dims[i + 1], strides[i + 1]))
        self.transformer = LocalTransformer(
            dims[-1],
            layers=config.encoder_layers,
            heads=config.attention_heads,
            window=config.attention_window,
            feedforward_dim=config.encoder_feedforward_dim,
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.project = linear(dims[-1], config.quantizer.dim, gain=latent_std)

    def forward(self, samples: torch.Tensor, state: State | None = None) -> torch.Tensor:
        """(B, T) samples, T a multiple of the hop -> (B, T / hop, D) latents."""
        x = self.first(samples.unsqueeze(1), state)
        for i, stage in enumerate(self.stages):
            for unit in stage:
                x = unit(x, state)
            if i < len(self.downs):
                x = self.downs[i](x, state)
        x = self.transformer(x, state)
        return self.project(self.norm(x.transpose(1, 2)))


class Decoder(nn.Module):
    """Latents to samples: Transformer, stages with EnhanceBlock and up layer, synthesis filterbank.

    The output is delayed by `decoder_delay` frames.

    Args:
        config: configuration of the model.
    """

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        dims, strides = config.decoder_dims, config.strides[::-1]
        width = config.encoder_dims[-1]
        self.project = linear(config.quantizer.dim, width)
        self.transformer = LocalTransformer(
            width,
            layers=config.decoder_layers,
            heads=config.attention_heads,
            window=config.attention_window,
            feedforward_dim=config.decoder_feedforward_dim,
        )
        self.first = CausalConv1d(width, dims[0], 3)
        self.stages = nn.ModuleList()
        self.enhances = nn.ModuleList()
        self.ups = nn.ModuleList()
        expansions = config.decoder_expansions or [config.expansion] * len(dims)
        for i, dim in enumerate(dims):
            self.stages.append(_units(dim, config.decoder_depths[i], expansions[i], config))
            self.enhances.append(
                EnhanceBlock(
                    dim,
                    windows=config.enhance_kernels,
                    dilations=config.enhance_dilations,
                    branch_channels=config.enhance_channels,
                    kernel_size=config.kernel_size,
                )
            )
            if i + 1 < len(dims):
                self.ups.append(UpLayer(dim, dims[i + 1], strides[i]))
        self.narrow = nn.Conv1d(dims[-1], config.last_dim, 1)
        self.last = DilatedUnit(
            config.last_dim, kernel_size=config.kernel_size, dilations=config.last_dilations
        )
        self.synthesis = SynthesisFilterbank(
            config.last_dim, strides[-1], taps=config.synthesis_taps
        )
        self.noise = nn.ModuleList()
        if config.noise_channels:
            self.frames = FrameCounter()
            rates = list(accumulate(strides[:-1], operator.mul))
            places = [*zip(dims[1:], rates), (config.last_dim, rates[-1] if rates else 1)]
            for i, (dim, rate) in enumerate(places):
                self.noise.append(
                    NoiseInjection(dim, channels=config.noise_channels, rate=rate, seed=i)
                )

    def forward(self, latents: torch.Tensor, state: State | None = None) -> torch.Tensor:
        """(B, N, D) latents -> (B, N * hop) samples in [-1, 1], late by `decoder_delay` frames."""
        frames = self.frames(latents, state) if self.noise and not self.training else None
        x = self.transformer(self.project(latents).transpose(1, 2), state)
        x = self.first(x, state)
        for i, (stage, enhance) in enumerate(zip(self.stages, self.enhances)):
            for unit in stage:
                x = unit(x, state)
            x = enhance(x, state)
            if i < len(self.ups):
                x = self.ups[i](x, state)
                if self.noise:
                    x = self.noise[i](x, frames)
        x = self.narrow(x)
        if self.noise:
            x = self.noise[-1](x, frames)
        x = self.last(x, state)
        return torch.tanh(self.synthesis(x, state).float())


class AudioAutoencoder(nn.Module):
    """Encoder, quantizer and decoder of an `AudioConfig`.

    `encode` and `decode` take and return state, so the same code serves whole clips (`state=None`),
    streams and ONNX.

    Args:
        config: configuration of the model.
        training: training options of its quantizer, see `build_quantizer`; needed only for
            training.

    Attributes:
        encoder_state, decoder_state: name -> shape, without the batch, of each layer's history.
    """

    def __init__(self, config: AudioConfig, training: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.config = config
        quantizer = build_quantizer(config.quantizer, training)
        self.encoder = Encoder(config, quantizer.latent_std)
        self.quantizer = quantizer
        self.decoder = Decoder(config)
        shapes = name_states(self)
        self.encoder_state = {k: v for k, v in shapes.items() if k.startswith("encoder.")}
        self.decoder_state = {k: v for k, v in shapes.items() if k.startswith("decoder.")}

    def forward(self, samples: torch.Tensor, draws: int = 1) -> tuple[torch.Tensor, Quantized]:
        """The forward pass of training.

        Args:
            samples: (B, T), T a multiple of the hop.
            draws: number of outputs per crop, each with its own noise.

        Returns:
            (draws * B, T - delay) samples aligned with `samples[:, : T - delay]`, one batch of
            outputs after the other, and the result of the quantizer.
        """
        quantized = self.quantizer(self.encoder(samples))
        out = self.decoder(quantized.latents.repeat(draws, 1, 1))
        return out[:, self.delay :], quantized

    def target(self, samples: torch.Tensor) -> torch.Tensor:
        """The ideal output for a batch: the batch without its last `delay` samples."""
        return samples[:, : samples.shape[1] - self.delay]

    @property
    def delay(self) -> int:
        """Delay of `decode`, samples."""
        return self.config.decoder_delay * self.config.hop_length

    def encode(self, samples: torch.Tensor, state: State | None = None) -> torch.Tensor:
        """(B, T) samples, T a multiple of the hop -> (B, T / hop) int64 tokens."""
        return self.quantizer.encode(self.encoder(samples, state))

    def decode(self, tokens: torch.Tensor, state: State | None = None) -> torch.Tensor:
        """(B, N) int64 tokens -> (B, N * hop) float32 samples, delayed by `delay` samples."""
        return self.decoder(self.quantizer.tokens_to_latents(tokens), state)


def _units(dim: int, depth: int, expansion: int, config: AudioConfig) -> nn.ModuleList:
    return nn.ModuleList(
        ConvUnit(dim, kernel_size=config.kernel_size, expansion=expansion) for _ in range(depth)
    )
