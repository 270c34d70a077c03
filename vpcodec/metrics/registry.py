"""All metrics in table order, and the choice among them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Literal

from . import __path__ as _FOLDERS
from . import base
from .base import Measure, Metric, MetricError

FIRST = (
    "speech",
    "audio",
    "prosody",
    "visqol",
    "plcmos",
    "neural",
    "image",
)  # modules; others follow by name


def _measures() -> tuple[Measure, ...]:
    """All measures, after importing every module of this folder."""
    names = sorted(module.name for module in iter_modules(_FOLDERS))
    others = [name for name in names if name not in (*FIRST, "base", "registry")]
    modules = [import_module(f".{name}", __package__).__name__ for name in (*FIRST, *others)]
    place = {name: i for i, name in enumerate(modules)}
    return tuple(sorted(base.MEASURES, key=lambda measure: place[measure.function.__module__]))


MEASURES: tuple[Measure, ...] = _measures()
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
            modality="audio",
            source="8 x size of the coded file / duration",
            needs_reference=False,
        ),
        Metric(
            name="bits_per_pixel",
            label="Bits per pixel",
            unit="bit",
            better="lower",
            modality="image",
            source="8 x size of the coded file / pixels",
            needs_reference=False,
        ),
        Metric(
            name="consistency",
            label="Consistency",
            unit="",
            better="higher",
            modality="both",
            source="share of tokens that stay when what was decoded is encoded again",
            needs_reference=False,
        ),
        Metric(
            name="entropy",
            label="Entropy",
            unit="bit/token",
            better="higher",
            modality="both",
            source="H = -sum p log2 p of all tokens",
            needs_reference=False,
        ),
        Metric(
            name="perplexity",
            label="Perplexity",
            unit="codes",
            better="higher",
            modality="both",
            source="2^H",
            needs_reference=False,
        ),
        Metric(
            name="cvu",
            label="CVU",
            unit="",
            better="higher",
            modality="both",
            source="codebook valid usage: 2^H / codebook size",
            needs_reference=False,
        ),
    )
}


def choose(
    modality: Literal["audio", "image"], names: Sequence[str] | None = None
) -> tuple[list[Measure], list[Metric], dict[str, str]]:
    """Choose what to compute.

    Args:
        modality: of the files.
        names: of metrics; "all" stands for every metric of the modality whose packages are
            installed. None: the defaults.

    Returns:
        The measures and the metrics, both in table order; and for each metric that is left out
        because a package is missing, a line that says so.

    Raises:
        MetricError: a name that is not a metric of this modality, or one whose package is missing.
    """
    known = {name: metric for name, metric in METRICS.items() if metric.modality == modality}
    named = set(names or ()) - {"all"}
    for name in sorted(named - set(known)):
        raise MetricError(_unknown(name, modality, known))
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
    """Why a metric cannot be computed; empty if it can."""
    if not metric.missing:
        return ""
    plural = "s" if len(metric.missing) > 1 else ""
    return f"{metric.name} needs the package{plural} {', '.join(metric.missing)}: {metric.install}"


def _unknown(name: str, modality: str, known: dict[str, Metric]) -> str:
    if name in METRICS:
        problem = f"{name} is not a metric of {'images' if modality == 'image' else modality}"
    elif name in SYSTEM_METRICS:
        problem = f"{name} is always measured, without being named"
    else:
        near = difflib.get_close_matches(name.lower(), known, 1)
        problem = f"there is no metric {name!r}" + (f"; did you mean {near[0]}?" if near else "")
    return f"{problem}; there are {', '.join(known)}"
