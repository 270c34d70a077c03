"""The native image autoencoder: convolutional encoder, quantizer, convolutional decoder.

The architecture is VQGAN's (residual blocks, attention at the lowest resolution), made local:
blocks normalise each pixel over its channels rather than the image over its pixels, and attention
stays within windows of tokens. So the tokens of an image do not depend on how it is cut into
tiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..config import ImageConfig
from ..quantizers import Quantized, build_quantizer
from .layers import State, init_bias


class Conv2d(nn.Module):
    """Convolution with zero padding, with its kernel as a matrix (out, k * k * in) for Muon.

    Args:
        in_channels, out_channels: channels of input and output, (B, C, H, W).
        kernel_size: k, odd.
        gain: scale of the initial weights.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 1, *, gain: float = 1.0
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        fan_in = in_channels * kernel_size**2
        self.weight = nn.Parameter(torch.empty(out_channels, fan_in))
        self.bias = nn.Parameter(torch.empty(out_channels))
        nn.init.trunc_normal_(self.weight, std=gain / math.sqrt(fan_in))
        init_bias(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k = self.kernel_size
        kernel = self.weight.view(len(self.bias), k, k, -1).permute(0, 3, 1, 2)
        return F.conv2d(x, kernel, self.bias, padding=k // 2)


class PixelNorm(nn.Module):
    """Layer norm of each pixel over its channels; (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """Norm, SiLU and 3 x 3 convolution, twice; residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first_norm = PixelNorm(channels)
        self.first = Conv2d(channels, channels, 3)
        self.second_norm = PixelNorm(channels)
        self.second = Conv2d(channels, channels, 3, gain=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(F.silu(self.first_norm(x)))
        return x + self.second(F.silu(self.second_norm(y)))


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a learned bias per offset and head.

    Args:
        channels: channels of (B, C, H, W); H and W must be multiples of the window.
        heads: number of attention heads.
        window: side of the windows, tokens.
    """

    def __init__(self, channels: int, *, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = Conv2d(channels, 3 * channels)
        self.out = Conv2d(channels, channels, gain=0.3)
        self.offset_bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        y, x = y.flatten(), x.flatten()
        down, right = y[:, None] - y + window - 1, x[:, None] - x + window - 1
        self.register_buffer("offsets", down * (2 * window - 1) + right, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        side, head = self.window, channels // self.heads
        rows, columns = height // side, width // side
        parts = self.qkv(x).reshape(batch, 3, self.heads, head, rows, side, columns, side)
        # (3, B, rows, columns, heads, tokens per window, channels per head)
        q, k, v = parts.permute(1, 0, 4, 6, 2, 5, 7, 3).flatten(5, 6).unbind(0)
        scores = q @ k.transpose(-2, -1) * head**-0.5
        bias = F.embedding(self.offsets, self.offset_bias).permute(2, 0, 1)
        weights = torch.softmax(scores.float() + bias, -1).to(v.dtype)
        y = (weights @ v).unflatten(-2, (side, side))
        y = y.permute(0, 3, 6, 1, 4, 2, 5).reshape(batch, channels, height, width)
        return self.out(y)


class AttentionLayer(nn.Module):
    """Pre-norm window attention and feed-forward, both residual; (B, C, H, W)."""

    def __init__(self, channels: int, *, heads: int, window: int) -> None:
        super().__init__()
        self.attention_norm = PixelNorm(channels)
        self.attention = WindowAttention(channels, heads=heads, window=window)
        self.feed_forward_norm = PixelNorm(channels)
        self.widen = Conv2d(channels, 2 * channels)
        self.narrow = Conv2d(2 * channels, channels, gain=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.narrow(F.silu(self.widen(self.feed_forward_norm(x))))


class ImageEncoder(nn.Module):
    """Images to latents: residual blocks at falling resolutions, attention, projection.

    Args:
        config: configuration of the model.
        latent_std: approximate standard deviation of the latents before training.
    """

    def __init__(self, config: ImageConfig, latent_std: float = 1.0) -> None:
        super().__init__()
        dims = config.dims
        self.patch_size = config.patch_size
        self.first = Conv2d(3 * config.patch_size**2, dims[0], 3)
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(dim) for _ in range(depth)))
            for dim, depth in zip(dims, config.encoder_depths)
        )
        self.downs = nn.ModuleList(Conv2d(4 * a, b) for a, b in zip(dims, dims[1:]))
        self.attention = _attention(config, config.encoder_layers)
        self.norm = PixelNorm(dims[-1])
        self.project = Conv2d(dims[-1], config.quantizer.dim, gain=latent_std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) images -> (B, H / hop, W / hop, D) latents."""
        x = images.contiguous(memory_format=torch.channels_last)
        x = self.first(F.pixel_unshuffle(x, self.patch_size))
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i < len(self.downs):
                x = self.downs[i](F.pixel_unshuffle(x, 2))
        x = self.attention(x)
        return self.project(self.norm(x)).permute(0, 2, 3, 1)


class ImageDecoder(nn.Module):
    """Latents to images: attention, residual blocks at rising resolutions.

    Args:
        config: configuration of the model.
    """

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        dims = config.dims
        self.patch_size = config.patch_size
        self.project = Conv2d(config.quantizer.dim, dims[-1])
        self.attention = _attention(config, config.decoder_layers)
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(dim) for _ in range(depth)))
            for dim, depth in zip(dims[::-1], config.decoder_depths[::-1])
        )
        self.ups = nn.ModuleList(Conv2d(b, 4 * a) for a, b in zip(dims[-2::-1], dims[::-1]))
        self.norm = PixelNorm(dims[0])
        self.last = Conv2d(dims[0], 3 * config.patch_size**2, 3)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, h, w, D) latents -> (B, 3, h * hop, w * hop) images, float32, not clipped."""
        x = latents.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        x = self.attention(self.project(x))
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i < len(self.ups):
                x = F.pixel_shuffle(self.ups[i](x), 2)
        return F.pixel_shuffle(self.last(self.norm(x)), self.patch_size).float()


class ImageAutoencoder(nn.Module):
    """Encoder, quantizer and decoder of an `ImageConfig`.

    Images are (B, 3, H, W) RGB in [-1, 1], with H and W multiples of `config.block_size`.

    Args:
        config: configuration of the model.
        training: training options of its quantizer, see `build_quantizer`; needed only for
            training.
    """

    # There is no history; `state` exists because audio models have it.
    encoder_state: dict[str, tuple[int, int]] = {}
    decoder_state: dict[str, tuple[int, int]] = {}

    def __init__(self, config: ImageConfig, training: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.config = config
        quantizer = build_quantizer(config.quantizer, training)
        self.encoder = ImageEncoder(config, quantizer.latent_std)
        self.quantizer = quantizer
        self.decoder = ImageDecoder(config)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, Quantized]:
        """(B, 3, H, W) images -> decoded images, not clipped, and the result of the quantizer."""
        quantized = self.quantizer(self.encoder(images))
        return self.decoder(quantized.latents), quantized

    def target(self, images: torch.Tensor) -> torch.Tensor:
        """The ideal output for a batch: the batch itself."""
        return images

    def encode(self, images: torch.Tensor, state: State | None = None) -> torch.Tensor:
        """(B, 3, H, W) images -> (B, H / hop, W / hop) int64 tokens."""
        return self.quantizer.encode(self.encoder(images))

    def decode(self, tokens: torch.Tensor, state: State | None = None) -> torch.Tensor:
        """(B, h, w) int64 tokens -> (B, 3, h * hop, w * hop) float32 images in [-1, 1]."""
        return self.decoder(self.quantizer.tokens_to_latents(tokens)).clamp(-1, 1)


def _attention(config: ImageConfig, layers: int) -> nn.Sequential:
    heads, window = config.attention_heads, config.attention_window
    return nn.Sequential(
        *(AttentionLayer(config.dims[-1], heads=heads, window=window) for _ in range(layers))
    )
