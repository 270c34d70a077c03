"""Losses of decoded audio: waveform, multi-resolution STFT and mel, auditory, perceptual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...recipe.audio import LossConfig
from ..adversarial import joint_means
from .auditory import IntelligibilityLoss, LoudnessLoss

FLOOR = 1e-4  # magnitude relative to a full-scale sine: -80 dB counts as silence
JOINT_FLOOR = 1e-6  # added to mean squares of log10 differences: bounds the slope of the root


class ReconstructionLoss(nn.Module):
    """Distances between (B, T) signals, each of order 1 for unrelated speech.

    wave: mean |x - y| / mean |x|. stft: per FFT size, mean | |X| - |Y| | / mean |X| plus
    mean |log10 |X| - log10 |Y||, averaged over the sizes. mel: the log term on mel bands. Both
    share the magnitudes of an FFT size. The divisors are means over the batches of all processes,
    so that the mean of their losses is the loss of one process with the joint batch. loudness,
    intelligibility, perceptual: see `LoudnessLoss`, `IntelligibilityLoss` and `PerceptualLoss`;
    computed only if they have a weight.

    Args:
        config: weights and settings of the losses.
        sample_rate: sample rate of the signals, Hz.

    Raises:
        PerceptualError: the encoder of the perceptual loss cannot be loaded.
    """

    def __init__(self, config: LossConfig, sample_rate: int) -> None:
        super().__init__()
        from torchaudio.functional import melscale_fbanks

        self.sizes = config.fft_sizes
        self.bands = config.mel_bands
        self.joint = config.joint
        for size, bands in zip(self.sizes, self.bands):
            self.register_buffer(f"window_{size}", torch.hann_window(size), persistent=False)
            if bands:
                bank = melscale_fbanks(
                    size // 2 + 1, 0.0, sample_rate / 2, bands, sample_rate, None, "htk"
                )
                bank = bank / bank.sum(0).clamp(min=1e-6)
                self.register_buffer(f"mel_{size}", bank, persistent=False)
        self.auditory = nn.ModuleDict()
        if config.loudness:
            self.auditory["loudness"] = LoudnessLoss(sample_rate)
        if config.intelligibility:
            self.auditory["intelligibility"] = IntelligibilityLoss(sample_rate)
        self.perceptual: nn.Module | None = None
        if config.perceptual:
            from .perceptual import PerceptualLoss

            self.perceptual = PerceptualLoss(config.perceptual_model, sample_rate)

    def forward(self, target: torch.Tensor, output: torch.Tensor) -> dict[str, torch.Tensor]:
        """The unweighted loss terms.

        With two draws of the output, the first three terms are energy distances (Gritsenko et al.
        2020, eq. 5), d(x, y) / 2 + d(x, y') / 2 - d(y, y') / 2. Their expectation is smallest if
        the output follows the distribution of x given the tokens, rather than its median.

        Args:
            target: (B, T) x.
            output: (B, T) y, or (2 B, T) two draws y and y', one batch after the other.

        Returns:
            {"wave", "stft", "mel"} and, if they have a weight, {"loudness", "intelligibility",
            "perceptual"}: float32 scalars.
        """
        terms = self._spectral(target, output)
        targets = target.repeat(len(output) // len(target), 1)
        with torch.autocast(target.device.type, enabled=False):
            for name, loss in self.auditory.items():
                terms[name] = loss(targets.float(), output.float())
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(targets, output)
        return terms

    def _spectral(self, target: torch.Tensor, output: torch.Tensor) -> dict[str, torch.Tensor]:
        """wave, stft and mel: distances for one draw, energy distances for two."""
        with torch.autocast(target.device.type, enabled=False):
            target, output = target.float(), output.float()
            with torch.no_grad():
                targets = [target, *(self._magnitude(target, size) for size in self.sizes)]
            outputs = [output, *(self._magnitude(output, size) for size in self.sizes)]
            levels = joint_means(targets)
            if len(output) == len(target):
                return self._distances(targets, outputs, levels)
            terms = self._distances([torch.cat([x, x]) for x in targets], outputs, levels)
            # Each draw is pushed away from the other one, detached. For a symmetric d, that is the
            # gradient of d(y, y') / 2, in one pass for both draws.
            swapped = [y.detach().roll(len(target), 0) for y in outputs]
            between = self._distances(swapped, outputs, levels)
            return {name: terms[name] - d + 0.5 * d.detach() for name, d in between.items()}

    def _distances(
        self, target: list[torch.Tensor], output: list[torch.Tensor], levels: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The distances between two signals.

        Args:
            target, output: the waveform, followed by its magnitudes at each FFT size.
            levels: mean magnitudes of the target, in the same order.
        """
        (wave, *spectra), (output_wave, *output_spectra) = target, output
        level, *spectral_levels = levels
        stft, mel = [], []
        for size, bands, x, y, mean in zip(
            self.sizes, self.bands, spectra, output_spectra, spectral_levels
        ):
            relative = F.l1_loss(y, x) / mean.clamp(min=FLOOR / 10)
            stft.append(relative + self._log_distance(y, x))
            if bands:
                bank = getattr(self, f"mel_{size}")
                mel.append(self._log_distance(y @ bank, x @ bank))
        return {
            "wave": F.l1_loss(output_wave, wave) / level.clamp(min=FLOOR),
            "stft": torch.stack(stft).mean(),
            "mel": torch.stack(mel).mean() if mel else wave.new_zeros(()),
        }

    def _log_distance(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Distance of (B, frames, bins) magnitudes on a log10 scale; see `LossConfig.joint`."""
        if not self.joint:
            return F.l1_loss(_log(y), _log(x))
        return ((_log(y) - _log(x)).square().mean(-1) + JOINT_FLOOR).sqrt().mean()

    def _magnitude(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """(B, T) -> (B, frames, bins); a full-scale sine has magnitude 1."""
        window = getattr(self, f"window_{size}")
        spectrum = torch.stft(x, size, size // 4, window=window, return_complex=True)
        power = torch.view_as_real(spectrum).square().sum(-1).transpose(1, 2)
        return (power + 1e-10).sqrt() * (4 / size)


def _log(x: torch.Tensor) -> torch.Tensor:
    return torch.log10(x + FLOOR)
