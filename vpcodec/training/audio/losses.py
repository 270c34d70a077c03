"""Losses of decoded audio: waveform, multi-resolution STFT and mel, hearing, perceptual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...recipe.audio import LossConfig
from ..adversarial import joint_means
from .auditory import IntelligibilityLoss, LoudnessLoss

FLOOR = 1e-4  # of a full-scale sine: what lies 80 dB below counts as silence
JOINT_FLOOR = 1e-6  # of mean squares of differences of log10, whose root has no slope at 0


class ReconstructionLoss(nn.Module):
    """Distances between (B, T) signals, each of order 1 for unrelated speech.

    wave: mean |x - y| / mean |x|. stft: per FFT size, mean | |X| - |Y| | / mean |X| plus
    mean |log10 |X| - log10 |Y||, averaged over the sizes. mel: the log term on mel bands. The
    magnitudes are computed once per size for both. What is divided by are means over the batches of
    all processes, so that the mean of their losses is that of one process with all of the batch.
    loudness, intelligibility, perceptual: see `LoudnessLoss`, `IntelligibilityLoss` and
    `PerceptualLoss`; only where they have a weight.

    Raises:
        PerceptualError: the encoder of the perceptual loss is not to be had.
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
        self.hearing = nn.ModuleDict()
        if config.loudness:
            self.hearing["loudness"] = LoudnessLoss(sample_rate)
        if config.intelligibility:
            self.hearing["intelligibility"] = IntelligibilityLoss(sample_rate)
        self.perceptual: nn.Module | None = None
        if config.perceptual:
            from .perceptual import PerceptualLoss

            self.perceptual = PerceptualLoss(config.perceptual_model, sample_rate)

    def forward(self, target: torch.Tensor, output: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, T) target and output -> {"wave", "stft", "mel"} and, where they have a weight,
        {"loudness", "intelligibility", "perceptual"}: scalars, float32, unweighted.

        With an output of two draws, (2 B, T), the first three are energy distances (Gritsenko et
        al. 2020, eq. 5): d(x, y) / 2 + d(x, y') / 2 - d(y, y') / 2, whose smallest expectation is
        that of the distribution of x given the tokens, not of its median.
        """
        draws = len(output) // len(target)
        targets = target.repeat(draws, 1)
        terms = self._spectral(targets, output, target)
        if draws == 2:
            # Each draw is pushed away from the other, which is held still: the gradient of
            # d(y, y') / 2 where d is symmetric, and it reaches both sides once.
            other = output.detach().roll(len(target), 0)
            for name, value in self._spectral(other, output, target).items():
                terms[name] = terms[name] - value + 0.5 * value.detach()
        with torch.autocast(target.device.type, enabled=False):
            for name, loss in self.hearing.items():
                terms[name] = loss(targets.float(), output.float())
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(targets, output)
        return terms

    def _spectral(
        self, target: torch.Tensor, output: torch.Tensor, reference: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Distances of target and output relative to the level of the reference."""
        with torch.autocast(target.device.type, enabled=False):
            target, output, reference = target.float(), output.float(), reference.float()
            with torch.no_grad():
                spectra = [self._magnitude(target, size) for size in self.sizes]
                of_reference = (
                    spectra
                    if reference is target
                    else [self._magnitude(reference, size) for size in self.sizes]
                )
            level, *levels = joint_means([reference, *of_reference])
            wave = F.l1_loss(output, target) / level.clamp(min=FLOOR)
            stft, mel = [], []
            for size, bands, x, level in zip(self.sizes, self.bands, spectra, levels):
                y = self._magnitude(output, size)
                relative = F.l1_loss(y, x) / level.clamp(min=FLOOR / 10)
                stft.append(relative + self._log_distance(y, x))
                if bands:
                    bank = getattr(self, f"mel_{size}")
                    mel.append(self._log_distance(y @ bank, x @ bank))
            zero = wave.new_zeros(())
            return {
                "wave": wave,
                "stft": torch.stack(stft).mean(),
                "mel": torch.stack(mel).mean() if mel else zero,
            }

    def _log_distance(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Of (B, frames, bins) magnitudes on a log10 scale."""
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
