"""Losses: waveform, multi-resolution STFT and mel; adversarial training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import distributed, nn

from ..quantizers.base import processes
from ..recipe import LossConfig

FLOOR = 1e-4  # of a full-scale sine: what lies 80 dB below counts as silence
FEATURE_FLOOR = 1e-3  # of mean activations, which are of order 1

Outputs = list[list[torch.Tensor]]  # per discriminator its hidden activations, then its logits


class ReconstructionLoss(nn.Module):
    """Distances between (B, T) signals, each of order 1 for unrelated speech.

    wave: mean |x - y| / mean |x|. stft: per FFT size, mean | |X| - |Y| | / mean |X| plus
    mean |log10 |X| - log10 |Y||, averaged over the sizes. mel: the log term on mel bands. The
    magnitudes are computed once per size for both. What is divided by are means over the batches of
    all processes, so that the mean of their losses is that of one process with all of the batch.
    """

    def __init__(self, config: LossConfig, sample_rate: int) -> None:
        super().__init__()
        from torchaudio.functional import melscale_fbanks

        self.sizes = config.fft_sizes
        self.bands = config.mel_bands
        for size, bands in zip(self.sizes, self.bands):
            self.register_buffer(f"window_{size}", torch.hann_window(size), persistent=False)
            if bands:
                bank = melscale_fbanks(
                    size // 2 + 1, 0.0, sample_rate / 2, bands, sample_rate, None, "htk"
                )
                bank = bank / bank.sum(0).clamp(min=1e-6)
                self.register_buffer(f"mel_{size}", bank, persistent=False)

    def forward(self, target: torch.Tensor, output: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, T) target and output -> {"wave", "stft", "mel"} scalars, float32, unweighted."""
        with torch.autocast(target.device.type, enabled=False):
            target, output = target.float(), output.float()
            with torch.no_grad():
                spectra = [self._magnitude(target, size) for size in self.sizes]
            level, *levels = joint_means([target, *spectra])
            wave = F.l1_loss(output, target) / level.clamp(min=FLOOR)
            stft, mel = [], []
            for size, bands, x, level in zip(self.sizes, self.bands, spectra, levels):
                y = self._magnitude(output, size)
                relative = F.l1_loss(y, x) / level.clamp(min=FLOOR / 10)
                stft.append(relative + F.l1_loss(_log(y), _log(x)))
                if bands:
                    bank = getattr(self, f"mel_{size}")
                    mel.append(F.l1_loss(_log(y @ bank), _log(x @ bank)))
            zero = wave.new_zeros(())
            return {
                "wave": wave,
                "stft": torch.stack(stft).mean(),
                "mel": torch.stack(mel).mean() if mel else zero,
            }

    def _magnitude(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """(B, T) -> (B, frames, bins); a full-scale sine has magnitude 1."""
        window = getattr(self, f"window_{size}")
        spectrum = torch.stft(x, size, size // 4, window=window, return_complex=True)
        power = torch.view_as_real(spectrum).square().sum(-1).transpose(1, 2)
        return (power + 1e-10).sqrt() * (4 / size)


def _log(x: torch.Tensor) -> torch.Tensor:
    return torch.log10(x + FLOOR)


def discriminator_loss(real: Outputs, fake: Outputs) -> torch.Tensor:
    """LSGAN loss of the discriminators, given their outputs for recorded and decoded audio.

    Mean over the discriminators of mean (1 - D(x))^2 + mean D(y)^2: 0 at best, 0.5 if they cannot
    tell. Detach the decoded audio before.

    Returns:
        Scalar, float32.
    """
    return _mean(
        (1 - x[-1].float()).square().mean() + y[-1].float().square().mean()
        for x, y in zip(real, fake, strict=True)
    )


def generator_losses(real: Outputs, fake: Outputs) -> dict[str, torch.Tensor]:
    """What the discriminators' outputs for recorded and decoded audio ask of the codec.

    adversarial: mean over the discriminators of mean (1 - D(y))^2. feature: mean |x - y| / mean |x|
    per hidden layer, averaged over the layers of each discriminator, then over these; `real` is
    detached.

    Returns:
        {"adversarial", "feature"} scalars, float32, unweighted.
    """
    means = iter(joint_means([layer.detach().float() for layers in real for layer in layers[:-1]]))
    return {
        "adversarial": _mean((1 - y[-1].float()).square().mean() for y in fake),
        "feature": _mean(
            _mean(
                F.l1_loss(y.float(), x.detach().float()) / next(means).clamp(min=FEATURE_FLOOR)
                for x, y in zip(xs[:-1], ys[:-1])
            )
            for xs, ys in zip(real, fake, strict=True)
        ),
    }


@torch.no_grad()
def joint_means(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Means of the magnitudes of each tensor over all processes of the group, as scalars.

    The processes give tensors of the same shapes.
    """
    means = torch.stack([value.abs().mean() for value in values])
    if processes() > 1:
        distributed.all_reduce(means)
        means /= processes()
    return list(means.unbind())


def _mean(terms: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(terms)).mean()
