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
        terms = self._spectral(target, output)
        targets = target.repeat(len(output) // len(target), 1)
        with torch.autocast(target.device.type, enabled=False):
            for name, loss in self.hearing.items():
                terms[name] = loss(targets.float(), output.float())
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(targets, output)
        return terms

    def _spectral(self, target: torch.Tensor, output: torch.Tensor) -> dict[str, torch.Tensor]:
        """The distances, of two draws the energy distances, relative to the target's level."""
        with torch.autocast(target.device.type, enabled=False):
            target, output = target.float(), output.float()
            with torch.no_grad():
                reference = [target, *(self._magnitude(target, size) for size in self.sizes)]
            found = [output, *(self._magnitude(output, size) for size in self.sizes)]
            levels = joint_means(reference)
            if len(output) == len(target):
                return self._distances(reference, found, levels)
            terms = self._distances([torch.cat([x, x]) for x in reference], found, levels)
            # Each draw is pushed away from the other, which is held still: the gradient of
            # d(y, y') / 2 where d is symmetric, and it reaches both sides once.
            other = [y.detach().roll(len(target), 0) for y in found]
            apart = self._distances(other, found, levels)
            return {name: terms[name] - x + 0.5 * x.detach() for name, x in apart.items()}

    def _distances(
        self, target: list[torch.Tensor], output: list[torch.Tensor], levels: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Of waves and their magnitudes at each FFT size, given the levels of both."""
        (wave, *spectra), (out, *found), (level, *others) = target, output, levels
        stft, mel = [], []
        for size, bands, x, y, mean in zip(self.sizes, self.bands, spectra, found, others):
            relative = F.l1_loss(y, x) / mean.clamp(min=FLOOR / 10)
            stft.append(relative + self._log_distance(y, x))
            if bands:
                bank = getattr(self, f"mel_{size}")
                mel.append(self._log_distance(y @ bank, x @ bank))
        return {
            "wave": F.l1_loss(out, wave) / level.clamp(min=FLOOR),
            "stft": torch.stack(stft).mean(),
            "mel": torch.stack(mel).mean() if mel else out.new_zeros(()),
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
