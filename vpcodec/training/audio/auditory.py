"""Auditory losses: loudness disturbance as in PESQ, envelope correlation as in ESTOI.

Both are differentiable relatives of the metrics, not the metrics themselves: there is no time
alignment, no filter of the receiving end, and no aggregation over seconds. The metrics that they
resemble overrate a codec trained with them, so judge it by others too (DNSMOS, mel distance,
listening).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..adversarial import joint_means

QUIET = 1e-8  # mean square below which a crop counts as silence


class LoudnessLoss(nn.Module):
    """Disturbance of the loudness in critical bands, after ITU-T P.862 (PESQ).

    Power spectra of 32 ms windows with 50 % overlap are summed over bands of equal width on the
    Bark scale (Traunmueller 1990) and converted to specific loudness with Zwicker's law above the
    threshold of hearing (Terhardt 1979). Differences of up to a quarter of the softer loudness are
    masked. The symmetric disturbance is the root mean square of the rest over the bands; the
    asymmetric one is weighted by how much louder the output is, so that added sound costs more than
    missing sound. Their sum, with PESQ's weights, is of order 1 for unrelated speech, and 0.2 to
    0.5 for codecs whose PESQ-WB is 2.4 to 1.4.

    Args:
        sample_rate: sample rate of the signals, Hz.
        bands: number of bands up to the Nyquist frequency or 8 kHz.
    """

    window: torch.Tensor
    bank: torch.Tensor
    threshold: torch.Tensor

    LEVEL = 1e7  # power that crops are scaled to, in the units of the threshold
    EXPONENT = 0.23  # of Zwicker's law
    MASKED = 0.25  # share of the softer loudness
    # Also from PESQ. The asymmetric disturbance is weighted by the ratio of powers, each plus
    # FLOOR, to the power ASYMMETRY; less than LEAST is 0, more than MOST is MOST.
    FLOOR, ASYMMETRY, LEAST, MOST = 50.0, 1.2, 3.0, 12.0
    SYMMETRIC, ASYMMETRIC = 0.1, 0.0309  # weights of the disturbances

    def __init__(self, sample_rate: int, bands: int = 42) -> None:
        super().__init__()
        self.size = 2 ** round(math.log2(0.032 * sample_rate))
        frequencies = torch.arange(self.size // 2 + 1) * sample_rate / self.size
        bark = _bark(frequencies)
        low, high = _bark(torch.tensor([80.0, min(sample_rate / 2, 8000.0)]))
        centres = low + (torch.arange(bands) + 0.5) / bands * (high - low)
        bank = (1 - (bark[:, None] - centres).abs() * bands / (high - low)).clamp(min=0)
        hertz = frequencies[bank.argmax(0)].clamp(min=80)
        self.register_buffer("window", torch.hann_window(self.size), persistent=False)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("threshold", 10 ** (_threshold_db(hertz) / 10), persistent=False)

    def forward(self, target: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """(B, T) float32 target and output -> scalar, float32."""
        power = target.square().mean(-1)
        heard = power > QUIET
        gain = torch.where(heard, self.LEVEL / power.clamp(min=QUIET), 0.0)[:, None, None]
        x, y = self._bands(target) * gain, self._bands(output) * gain
        loud_x, loud_y = self._loudness(x), self._loudness(y)
        difference = loud_y - loud_x
        masked = self.MASKED * torch.minimum(loud_x, loud_y).detach()
        disturbance = F.relu(difference.abs() - masked)
        ratio = ((y.detach() + self.FLOOR) / (x + self.FLOOR)) ** self.ASYMMETRY
        added = torch.where(ratio < self.LEAST, 0.0, ratio.clamp(max=self.MOST)) * disturbance
        symmetric = (disturbance.square().mean(-1) + 1e-6).sqrt()
        frames = self.SYMMETRIC * symmetric + self.ASYMMETRIC * added.mean(-1)
        return 10 * frames.mean()

    def _bands(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, frames, bands) power per band."""
        spectrum = torch.stft(x, self.size, self.size // 2, window=self.window, return_complex=True)
        power = torch.view_as_real(spectrum).square().sum(-1) * (8 / 3 / self.size**2 * 2)
        return power.transpose(1, 2) @ self.bank

    def _loudness(self, power: torch.Tensor) -> torch.Tensor:
        """Specific loudness by Zwicker's law, proportional to sone; 0 below the threshold."""
        excess = (0.5 + 0.5 * power / self.threshold).clamp(min=1)
        return (2 * self.threshold) ** self.EXPONENT * (excess**self.EXPONENT - 1) * 0.19


class IntelligibilityLoss(nn.Module):
    """One minus the correlation of band envelopes over 384 ms, after ESTOI (Jensen and Taal 2016).

    Magnitudes of 15 third-octave bands from 150 Hz upwards are normalised over time, then over
    bands, in segments of 30 frames, and correlated. Segments are weighted by the fourth root of
    their energy, and those 40 dB below the loudest do not count; otherwise pauses would have most
    of the gradient.

    Args:
        sample_rate: sample rate of the signals, Hz.
    """

    window: torch.Tensor
    bank: torch.Tensor

    SEGMENT = 30  # frames
    FLOOR = 1e-2  # added to envelopes, relative to the mean power of a band; bounds gradients

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self.hop = round(0.0128 * sample_rate)
        self.size = 2 ** math.ceil(math.log2(2 * self.hop))
        frequencies = torch.arange(self.size // 2 + 1) * sample_rate / self.size
        centres = 150 * 2 ** (torch.arange(15) / 3)
        low, high = centres * 2 ** (-1 / 6), centres * 2 ** (1 / 6)
        bank = ((frequencies[:, None] >= low) & (frequencies[:, None] < high)).float()
        nearest = (frequencies[:, None] - centres).abs().argmin(0)
        bank[nearest, torch.arange(len(centres))] = 1  # for bands that contain no bin
        self.register_buffer("window", torch.hann_window(2 * self.hop), persistent=False)
        self.register_buffer("bank", bank, persistent=False)

    def forward(self, target: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """(B, T) float32 target and output -> scalar, float32, 0 to 2; 0 if too short."""
        x, y = self._power(target), self._power(output)
        if x.shape[2] < self.SEGMENT:
            return output.sum() * 0
        energy = x.unfold(2, self.SEGMENT, self.SEGMENT // 3).sum((1, 3))
        heard = energy > 1e-4 * energy.amax().clamp(min=QUIET)
        weights = heard * (energy + QUIET) ** 0.25
        floor = self.FLOOR * x.mean(2, keepdim=True) + QUIET
        x, y = ((z + floor).sqrt().unfold(2, self.SEGMENT, self.SEGMENT // 3) for z in (x, y))
        correlation = (_normalised(x) * _normalised(y)).sum((1, 3)) / self.SEGMENT
        (level,) = joint_means([weights])
        return ((1 - correlation) * weights).mean() / level.clamp(min=QUIET)

    def _power(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, 15, frames) power per band."""
        spectrum = torch.stft(
            x,
            self.size,
            self.hop,
            win_length=2 * self.hop,
            window=self.window,
            return_complex=True,
        )
        power = torch.view_as_real(spectrum).square().sum(-1)
        return (power.transpose(1, 2) @ self.bank).transpose(1, 2)


def _normalised(x: torch.Tensor) -> torch.Tensor:
    """Normalise (B, bands, segments, frames) to zero mean and unit norm over time, then bands."""
    x = x - x.mean(3, keepdim=True)
    x = x / (x.square().sum(3, keepdim=True) + QUIET).sqrt()
    x = x - x.mean(1, keepdim=True)
    return x / (x.square().sum(1, keepdim=True) + QUIET).sqrt()


def _bark(hertz: torch.Tensor) -> torch.Tensor:
    """Hertz to Bark (Traunmueller 1990)."""
    return 26.81 * hertz / (1960 + hertz) - 0.53


def _threshold_db(hertz: torch.Tensor) -> torch.Tensor:
    """Threshold of hearing, dB SPL (Terhardt 1979)."""
    k = hertz / 1000
    return 3.64 * k**-0.8 - 6.5 * torch.exp(-0.6 * (k - 3.3) ** 2) + 1e-3 * k**4
