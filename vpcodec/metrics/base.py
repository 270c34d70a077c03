"""What a metric is: its registry entry, its inputs, and how it is registered.

A metric is a pure function with its entry beside it, added by `registered`. A new file in this
folder is found without being listed anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from ..media.audio import resample

MEASURES: list[Measure] = []  # in order of registration; `registry.MEASURES` is sorted

Function = TypeVar("Function", bound=Callable[[Any, Any], Sequence[float]])


class MetricError(ValueError):
    """A metric that does not exist or cannot be computed here."""


@dataclass(frozen=True)
class Metric:
    """What is known about a metric without computing it.

    Attributes:
        name: in `--metrics`, JSON and CSV.
        label: in tables.
        unit: "" for plain numbers.
        better: which values are better: "higher", "lower", or "zero" for differences; "" for none.
        modality: "audio", "image" or "both".
        source: where it is defined.
        rate: Hz at which it is computed; None for any, or for images.
        needs_reference: whether it compares with an original.
        packages: packages that must be importable.
        install: how a user installs them.
        default: whether it is computed unless others are named.
    """

    name: str
    label: str
    unit: str
    better: Literal["higher", "lower", "zero", ""]
    modality: Literal["audio", "image", "both"]
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
    """A mono signal with cached intermediate results, for many comparisons with one reference.

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
        """The result of `make`, computed once for each key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


@dataclass(frozen=True)
class Measure:
    """Metrics that are computed together.

    Attributes:
        metrics: the metrics, in the order of the values.
        function: takes two `Clip` (or two uint8 images (H, W, C)), the reference first, and returns
            a value for each metric, NaN where it is undefined. It caches what depends only on the
            reference in the reference's clip.
    """

    metrics: tuple[Metric, ...]
    function: Callable[[Any, Any], Sequence[float]]

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.function.__name__.removeprefix("measure_")


def registered(*metrics: Metric) -> Callable[[Function], Function]:
    """Register a function that computes these metrics; see `Measure`.

    Args:
        metrics: their entries, in the order of the values.
    """

    def register(function: Function) -> Function:
        MEASURES.append(Measure(metrics, function))
        return function

    return register


def package_file(package: str, name: str) -> Path | None:
    """A file below an installed package, none of whose code is loaded; None without it."""
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations if spec else None) or []:
        if (path := Path(folder, name)).is_file():
            return path
    return None
