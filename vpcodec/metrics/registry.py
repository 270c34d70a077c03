"""The registry of metrics: what each is called, measures and needs, loaded when it is asked for."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np

from ..media.audio import resample


class MetricError(ValueError):
    """A metric that does not exist, or cannot be computed here."""


@dataclass(frozen=True)
class Metric:
    """What is known about a metric without computing it.

    Attributes:
        name: in `--metrics`, JSON and CSV.
        label: in tables.
        unit: "" for plain numbers.
        better: which way is better: "higher", "lower", or "zero" for differences; "" for neither.
        kind: "audio", "image" or "both".
        rate: Hz at which it is computed; None for any, or for images.
        needs_reference: whether it compares with an original.
        packages: that must be importable.
        install: how a user gets them.
        source: where it is defined.
        default: whether it is computed without being named.
    """

    name: str
    label: str
    unit: str
    better: Literal["higher", "lower", "zero", ""]
    kind: Literal["audio", "image", "both"]
    source: str
    rate: int | None = None
    needs_reference: bool = True
    packages: tuple[str, ...] = ()
    install: str = "pip install 'vpcodec[score]'"
    default: bool = True

    @property
    def missing(self) -> tuple[str, ...]:
        """Packages that are not installed."""
        return tuple(name for name in self.packages if find_spec(name) is None)


class Clip:
    """A mono signal, and what metrics made of it: for many comparisons with one reference.

    Args:
        samples: float (T,), full scale at -1 and 1.
        rate: Hz.
    """

    def __init__(self, samples: np.ndarray, rate: int) -> None:
        self.samples = samples
        self.rate = rate
        self._made: dict[Hashable, Any] = {}

    def at(self, rate: int) -> np.ndarray:
        """The samples at another rate, (T',)."""
        if rate == self.rate:
            return self.samples
        return self.get(("rate", rate), lambda: resample(self.samples, self.rate, rate))

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for each key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


@dataclass(frozen=True)
class Measure:
    """Metrics that are computed together.

    Attributes:
        metrics: what it gives, in this order.
        function: "module:name" below this package, of a function of two `Clip` (or of two uint8
            images (H, W, C)), the reference first, that returns a value for each metric, NaN
            where one is not defined.
    """

    metrics: tuple[Metric, ...]
    function: str

    def load(self) -> Callable[[Any, Any], Sequence[float]]:
        """The function; imports its module."""
        module, name = self.function.split(":")
        return getattr(import_module(f".{module}", __package__), name)


MEASURES: tuple[Measure, ...] = (
    Measure(
        (
            Metric(
                name="pesq_wb",
                label="PESQ-WB",
                unit="MOS",
                better="higher",
                kind="audio",
                source="ITU-T P.862.2 (pesq)",
                rate=16_000,
                packages=("pesq",),
            ),
        ),
        "measures:pesq_wb",
    ),
    Measure(
        (
            Metric(
                name="pesq_nb",
                label="PESQ-NB",
                unit="MOS",
                better="higher",
                kind="audio",
                source="ITU-T P.862, P.862.1 (pesq)",
                rate=8_000,
                packages=("pesq",),
            ),
        ),
        "measures:pesq_nb",
    ),
    Measure(
        (
            Metric(
                name="stoi",
                label="STOI",
                unit="",
                better="higher",
                kind="audio",
                source="Taal et al. 2011 (pystoi)",
                rate=10_000,
                packages=("pystoi",),
            ),
        ),
        "measures:stoi",
    ),
    Measure(
        (
            Metric(
                name="estoi",
                label="ESTOI",
                unit="",
                better="higher",
                kind="audio",
                source="Jensen and Taal 2016 (pystoi)",
                rate=10_000,
                packages=("pystoi",),
            ),
        ),
        "measures:estoi",
    ),
    Measure(
        tuple(
            Metric(
                name=f"dnsmos_{name}",
                label=f"DNSMOS {label}",
                unit="MOS",
                better="higher",
                kind="audio",
                source=f"Reddy et al. {year} (speechmos)",
                rate=16_000,
                needs_reference=False,
                packages=("speechmos", "librosa", "requests"),
            )
            for name, label, year in (
                ("ovrl", "OVRL", 2022),
                ("sig", "SIG", 2022),
                ("bak", "BAK", 2022),
                ("p808", "P.808", 2021),
            )
        ),
        "measures:dnsmos",
    ),
    Measure(
        (
            Metric(
                name="mel_distance",
                label="Mel distance",
                unit="",
                better="lower",
                kind="audio",
                source="mean difference of log10 mel spectra, five FFT sizes",
            ),
        ),
        "measures:mel_distance",
    ),
    Measure(
        (
            Metric(
                name="stft_distance",
                label="STFT distance",
                unit="",
                better="lower",
                kind="audio",
                source="Yamamoto et al. 2020, as in auraloss",
            ),
        ),
        "measures:stft_distance",
    ),
    Measure(
        (
            Metric(
                name="log_spectral_distance",
                label="LSD",
                unit="dB",
                better="lower",
                kind="audio",
                source="Gray and Markel 1976, FFT 2048",
            ),
        ),
        "measures:log_spectral_distance",
    ),
    Measure(
        (
            Metric(
                name="mel_cepstral_distortion",
                label="MCD",
                unit="dB",
                better="lower",
                kind="audio",
                source="Kubichek 1993, 13 coefficients, no warping (librosa)",
                rate=16_000,
                packages=("librosa",),
            ),
        ),
        "measures:mel_cepstral_distortion",
    ),
    Measure(
        (
            Metric(
                name="si_sdr",
                label="SI-SDR",
                unit="dB",
                better="higher",
                kind="audio",
                source="Le Roux et al. 2019",
            ),
        ),
        "measures:si_sdr",
    ),
    Measure(
        (
            Metric(
                name="snr",
                label="SNR",
                unit="dB",
                better="higher",
                kind="audio",
                source="10 log10 of signal over error",
            ),
        ),
        "measures:snr",
    ),
    Measure(
        (
            Metric(
                name="f0_rmse",
                label="F0 RMSE",
                unit="cents",
                better="lower",
                kind="audio",
                source="pYIN, Mauch and Dixon 2014 (librosa)",
                rate=16_000,
                packages=("librosa",),
            ),
            Metric(
                name="voicing_error",
                label="Voicing error",
                unit="",
                better="lower",
                kind="audio",
                source="pYIN, Mauch and Dixon 2014 (librosa)",
                rate=16_000,
                packages=("librosa",),
            ),
        ),
        "measures:pitch",
    ),
    Measure(
        (
            Metric(
                name="loudness_difference",
                label="Loudness difference",
                unit="LU",
                better="zero",
                kind="audio",
                source="ITU-R BS.1770 (pyloudnorm)",
                packages=("pyloudnorm",),
            ),
        ),
        "measures:loudness_difference",
    ),
    Measure(
        (
            Metric(
                name="utmos",
                label="UTMOS",
                unit="MOS",
                better="higher",
                kind="audio",
                source="Saeki et al. 2022",
                rate=16_000,
                needs_reference=False,
                default=False,
            ),
        ),
        "neural:utmos",
    ),
    Measure(
        (
            Metric(
                name="wer",
                label="WER",
                unit="",
                better="lower",
                kind="audio",
                source="transcript against that of the reference",
                rate=16_000,
                packages=("torch", "transformers"),
                install="pip install torch transformers",
                default=False,
            ),
        ),
        "neural:wer",
    ),
    Measure(
        (
            Metric(
                name="speaker_similarity",
                label="Speaker similarity",
                unit="",
                better="higher",
                kind="audio",
                source="cosine of speaker embeddings",
                rate=16_000,
                default=False,
            ),
        ),
        "neural:speaker_similarity",
    ),
    Measure(
        (
            Metric(
                name="psnr",
                label="PSNR",
                unit="dB",
                better="higher",
                kind="image",
                source="10 log10 of 255^2 over mean square error, at most 100",
            ),
        ),
        "measures:psnr",
    ),
    Measure(
        (
            Metric(
                name="ssim",
                label="SSIM",
                unit="",
                better="higher",
                kind="image",
                source="Wang et al. 2004",
            ),
        ),
        "measures:ssim",
    ),
    Measure(
        (
            Metric(
                name="ms_ssim",
                label="MS-SSIM",
                unit="",
                better="higher",
                kind="image",
                source="Wang et al. 2003",
            ),
        ),
        "measures:ms_ssim",
    ),
    Measure(
        (
            Metric(
                name="lpips",
                label="LPIPS",
                unit="",
                better="lower",
                kind="image",
                source="Zhang et al. 2018, AlexNet (lpips)",
                packages=("lpips", "torchvision"),
                install="pip install lpips torchvision",
                default=False,
            ),
        ),
        "measures:lpips",
    ),
)

METRICS: dict[str, Metric] = {
    metric.name: metric for measure in MEASURES for metric in measure.metrics
}

SYSTEM_METRICS: dict[str, Metric] = {  # of codecs and codebooks, not of single comparisons
    metric.name: metric
    for metric in (
        Metric(
            name="bitrate",
            label="Bit rate",
            unit="bit/s",
            better="lower",
            kind="audio",
            source="8 x size of the coded file / duration",
            needs_reference=False,
        ),
        Metric(
            name="bits_per_pixel",
            label="Bits per pixel",
            unit="bit",
            better="lower",
            kind="image",
            source="8 x size of the coded file / pixels",
            needs_reference=False,
        ),
        Metric(
            name="entropy",
            label="Entropy",
            unit="bit/token",
            better="higher",
            kind="both",
            source="H = -sum p log2 p of all tokens",
            needs_reference=False,
        ),
        Metric(
            name="perplexity",
            label="Perplexity",
            unit="codes",
            better="higher",
            kind="both",
            source="2^H",
            needs_reference=False,
        ),
        Metric(
            name="cvu",
            label="CVU",
            unit="",
            better="higher",
            kind="both",
            source="codebook valid usage: 2^H / codebook size",
            needs_reference=False,
        ),
    )
}


def choose(
    kind: Literal["audio", "image"], names: Sequence[str] | None = None
) -> tuple[list[Measure], list[Metric], dict[str, str]]:
    """What to compute: the measures, the metrics that they give and were asked for, both in the
    order of tables, and for each that is left out, for want of a package, a line that says so.

    Args:
        names: of metrics; "all" stands for each one of the kind whose packages are there. None:
            the defaults.

    Raises:
        MetricError: a name that is not a metric of this kind, or one whose package is missing.
    """
    known = {name: metric for name, metric in METRICS.items() if metric.kind == kind}
    named = set(names or ()) - {"all"}
    for name in sorted(named - set(known)):
        raise MetricError(_unknown(name, kind, known))
    if names is None:
        wanted = {name for name, metric in known.items() if metric.default}
    else:
        wanted = set(known) if "all" in names else named
    unavailable = {name: _why_not(known[name]) for name in known if name in wanted}
    unavailable = {name: why for name, why in unavailable.items() if why}
    for name in unavailable:
        if name in named:
            raise MetricError(unavailable[name])
    metrics = [known[name] for name in known if name in wanted and name not in unavailable]
    measures = [measure for measure in MEASURES if set(measure.metrics) & set(metrics)]
    return measures, metrics, unavailable


def _why_not(metric: Metric) -> str:
    """Empty for a metric whose packages are there."""
    if not metric.missing:
        return ""
    plural = "s" if len(metric.missing) > 1 else ""
    return f"{metric.name} needs the package{plural} {', '.join(metric.missing)}: {metric.install}"


def _unknown(name: str, kind: str, known: dict[str, Metric]) -> str:
    if name in METRICS:
        problem = f"{name} is no metric of {'images' if kind == 'image' else kind}"
    elif name in SYSTEM_METRICS:
        problem = f"{name} is measured of each codec without being named"
    else:
        near = difflib.get_close_matches(name.lower(), known, 1)
        problem = f"there is no metric {name!r}" + (f"; did you mean {near[0]}?" if near else "")
    return f"{problem}; there are {', '.join(known)}"
