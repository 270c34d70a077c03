"""Perceptual loss: distance between features of a frozen speech encoder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..adversarial import joint_means
from ..hardware import TrainingError

RATE = 16_000  # sample rate of Whisper, Hz
FFT_SIZE = 400
HOP = 160
INSTALL = "the perceptual loss needs transformers: pip install 'transformers>=5'"


class PerceptualError(TrainingError):
    """The encoder of the perceptual loss cannot be loaded."""


class PerceptualLoss(nn.Module):
    """Mean squared difference of Whisper's last encoder layer over the target's mean square.

    Clips are not padded to the 30 s that Whisper transcribes. The encoder is frozen and always in
    eval mode.

    Args:
        model: folder of a Whisper model, or its name on the Hub.
        sample_rate: sample rate of the signals, Hz.

    Raises:
        PerceptualError: transformers is not installed, or the model cannot be loaded.
    """

    window: torch.Tensor
    bank: torch.Tensor

    def __init__(self, model: str, sample_rate: int = RATE) -> None:
        super().__init__()
        from torchaudio.functional import melscale_fbanks

        self.sample_rate = sample_rate
        self.encoder = _load_encoder(model).requires_grad_(False).eval()
        bands = self.encoder.config.num_mel_bins
        bank = melscale_fbanks(FFT_SIZE // 2 + 1, 0.0, RATE / 2, bands, RATE, "slaney", "slaney")
        self.register_buffer("window", torch.hann_window(FFT_SIZE), persistent=False)
        self.register_buffer("bank", bank, persistent=False)

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Set the mode, except that the encoder stays in eval mode: no dropout, no layer drop."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, target: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """(B, T) target and output -> scalar, float32; of order 1 for unrelated speech.

        The encoder runs under the caller's autocast.

        Raises:
            ValueError: the clips are longer than the 30 s that Whisper has positions for.
        """
        with torch.no_grad():
            x = self.features(target)
        y = self.features(output)
        (power,) = joint_means([x.square()])
        return F.mse_loss(y, x) / power

    def features(self, samples: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, frames of 20 ms, width) last layer of the encoder, float32."""
        encoder = self.encoder
        x = F.gelu(encoder.conv1(self.log_mel(samples)))
        x = F.gelu(encoder.conv2(x)).transpose(1, 2)
        positions = encoder.embed_positions.weight
        if x.shape[1] > len(positions):
            raise ValueError(
                f"the perceptual loss takes clips of up to {len(positions) * 2 * HOP / RATE:g} s, "
                f"got {samples.shape[-1] / self.sample_rate:g} s"
            )
        x = x + positions[: x.shape[1]]
        for layer in encoder.layers:
            x = layer(x, None)
        return encoder.layer_norm(x).float()

    def log_mel(self, samples: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, bands, frames of 10 ms) input of Whisper, float32, differentiable."""
        from torchaudio.functional import resample

        with torch.autocast(samples.device.type, enabled=False):
            samples = resample(samples.float(), self.sample_rate, RATE)
            spectrum = torch.stft(samples, FFT_SIZE, HOP, window=self.window, return_complex=True)
            power = torch.view_as_real(spectrum[..., :-1]).square().sum(-1)
            log = (self.bank.T @ power).clamp(min=1e-10).log10()
            floor = log.detach().amax((1, 2), keepdim=True) - 8  # no gradient to the loudest bin
            return (torch.maximum(log, floor) + 4) / 4


def _load_encoder(model: str) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise PerceptualError(INSTALL) from None
    if int(transformers.__version__.split(".")[0]) < 5:
        raise PerceptualError(f"{INSTALL} (found {transformers.__version__})")
    try:
        model_type = transformers.AutoConfig.from_pretrained(model).model_type
        if model_type != "whisper":
            raise ValueError(f"a model of type {model_type}, not whisper")
        whisper: Any
        whisper, info = transformers.WhisperModel.from_pretrained(
            model, dtype=torch.float32, output_loading_info=True
        )
        missing = [name for name in info["missing_keys"] if "encoder." in name]
        if missing:
            raise ValueError(f"no weights for {sorted(missing)[0]}")
    except Exception as error:  # files, the network and safetensors raise many
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PerceptualError(f"cannot load the perceptual model {model}: {reason}") from None
    return whisper.get_encoder()
