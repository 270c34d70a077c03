"""The report: one self-contained HTML page that never uses the network.

The template `report.html` draws its tables and charts from JSON that is made here; sounds and
images are embedded as data URLs.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import wave
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..media.files import atomic_output
from ..terminal import escape
from .scores import ORIGINAL

if TYPE_CHECKING:
    from ..metrics.base import Metric
    from .scores import Scores, SystemScores

EXAMPLES = 3  # files to hear or see
MAX_SECONDS = 20  # of an example
MAX_SIDE = 512  # pixels of an example image, cropped to its centre
MAX_FILES = 2000  # that are drawn as points
DEPTH = 80  # dB below the loudest point of the reference, where spectrograms end
DIFFERENCE = 30  # dB, both ways, where differences of spectrograms end
GAIN = 8  # of differences of images

_AUDIO_BYTES = 24 * 2**20  # of all sounds of a page, which are shortened to fit
_WINDOW = 0.024  # s, of the spectrograms
_COLUMNS, _BANDS = 600, 200  # pixels of a spectrogram at most
_LEVELS = 65  # colours of a spectrogram; odd, so that no difference has a colour
_BINS = 160  # steps of a codebook's histogram
_BLUR = 4  # points of a spectrogram, both ways, that its difference averages
_SILENCE = 1e-10  # of the power of a full-scale sine
_RATES = {
    "audio": {"name": "bitrate", "label": "Bit rate", "unit": "bit/s"},
    "image": {"name": "bits_per_pixel", "label": "Bits per pixel", "unit": "bit/pixel"},
}
_LAB_TO_CONES = np.array(
    [
        [1, 0.39633778, 0.21580376],
        [1, -0.10556135, -0.06385417],
        [1, -0.08948418, -1.29148555],
    ]
)
_CONES_TO_RGB = np.array(
    [
        [4.07674166, -3.30771159, 0.23096993],
        [-1.268438, 2.6097574, -0.3413194],
        [-0.00419609, -0.70341861, 1.7076147],
    ]
)
_KEPT = "\n\t"  # control characters that mean nothing to a browser
_PLACES = {"<!--title-->": "title", "<!--data-->": "data"}  # in the template


@dataclass
class Example:
    """A file to hear or see on the page.

    Attributes:
        title: its place: "best", "median", "worst", or such as "2 of 9".
        file: name of the file in the scores.
        note: such as "PESQ-WB 2.31 with speech-3k".
        rate: Hz; None for images.
        reference: audio float32 (C, T), full scale at -1 and 1; image uint8 (H, W, C).
        decoded: system -> decoded signal, aligned, of the same shape.
    """

    title: str
    file: str
    note: str
    rate: int | None
    reference: np.ndarray
    decoded: dict[str, np.ndarray]


def choose_examples(scores: Scores, count: int = EXAMPLES) -> list[tuple[str, str, str]]:
    """Title, file and note of some files: the best, the worst, and others evenly between them.

    They are ranked by the first metric with values that can be better or worse, averaged over
    systems (by magnitude if zero is best), among the files with values from the most systems.

    Args:
        scores: of the files.
        count: how many, at least 1; all of them if there are fewer.
    """
    for metric in _quality(scores):
        values = _values_by_file(scores, metric)
        if values:
            break
    else:
        return []
    most = max(map(len, values.values()))
    means = {file: sum(x.values()) / most for file, x in values.items() if len(x) == most}
    sign = -1 if metric.better == "higher" else 1
    ordered = sorted(means, key=lambda file: (sign * means[file], file))
    last = len(ordered) - 1
    titles = {last // 2: "median", last: "worst", 0: "best"}  # if there is one file, the best
    unit = f" {metric.unit}" if metric.unit else ""
    chosen = []
    for place in sorted({i * last // max(1, count - 1) for i in range(count)}):
        file = ordered[place]
        whose = f"on average of {most} systems" if most > 1 else f"with {next(iter(values[file]))}"
        title = titles.get(place, f"{place + 1} of {len(ordered)}")
        chosen.append((title, file, f"{metric.label} {means[file]:.2f}{unit} {whose}"))
    return chosen


def write_report(
    target: str | os.PathLike[str],
    scores: Scores,
    examples: list[Example],
    *,
    title: str | None = None,
    facts: dict[str, str] | None = None,
) -> None:
    """Write the page, which appears complete or not at all.

    Sounds are 16-bit WAV of at most two channels and 20 s, or less if many would make the page
    large; images are cropped to 512 x 512 pixels. The page says so.

    Args:
        target: path of the page.
        scores: what to show.
        examples: files to hear or see.
        title: of the page; None: the names of the systems.
        facts: more to show beside the settings, such as date and command.

    Raises:
        OSError: it cannot be written.
    """
    names = [system.name for system in scores.systems if system.name != ORIGINAL]
    title = title or "Scores of " + ", ".join(names)
    parts = {
        "title": html.escape(escape(title, keep=_KEPT)),
        "data": _json(_page(scores, examples, title, facts or {})),
    }
    page = (files(__package__) / "report.html").read_text(encoding="utf-8")
    for place, name in _PLACES.items():  # neither part can hold a place: "<" is escaped in both
        page = page.replace(place, parts[name])
    with atomic_output(target) as file:
        file.write(page.encode("utf-8", "replace"))


def _page(
    scores: Scores, examples: list[Example], title: str, facts: dict[str, str]
) -> dict[str, Any]:
    """Everything that the template draws."""
    systems = sorted(scores.systems, key=lambda system: system.name == ORIGINAL)  # it comes last
    quality = {metric.name for metric in _quality(scores)}
    rate = _RATES[scores.modality]
    keys = ("name", "label", "unit", "better", "source")
    names = sorted({row.file for row in scores.rows})
    shown = names[:: max(1, -(-len(names) // MAX_FILES))]
    order = {system.name: index for index, system in enumerate(systems)}
    values = {(row.system, row.file): row.values for row in scores.rows}
    metrics = [metric for metric in scores.metrics if metric.name != rate["name"]]
    n_sounds = sum(1 + len(example.decoded) for example in examples)
    return {
        "title": title,
        "kind": scores.modality,
        "settings": list((scores.settings | facts).items()),
        "rate": rate,
        "metrics": [
            {key: getattr(metric, key) for key in keys} | {"judges": metric.name in quality}
            for metric in metrics
        ],
        "systems": [_system(system) for system in systems],
        "n_files": len(names),
        "files": shown,
        "values": [
            {
                metric.name: [
                    values.get((system.name, name), {}).get(metric.name) for name in shown
                ]
                for metric in metrics
            }
            for system in systems
        ],
        "examples": [
            {
                "title": example.title,
                "file": example.file,
                "note": example.note,
                "scores": [
                    [order[name], values.get((name, example.file), {})] for name in example.decoded
                ],
            }
            | (
                _images(example)
                if scores.modality == "image"
                else _sounds(example, _AUDIO_BYTES // n_sounds)
            )
            for example in examples
        ],
        "scales": {
            "depth": DEPTH,
            "difference": DIFFERENCE,
            "gain": GAIN,
            "loudness_colours": _hex(_loudness_colours(9)),
            "difference_colours": _hex(_difference_colours(9)),
        },
        "unavailable": list(scores.unavailable.items()),
        "failed": list(scores.failed),
        "notes": list(scores.notes),
    }


def _quality(scores: Scores) -> list[Metric]:
    """The metrics of quality: not the rate, and none without a better direction."""
    rate = _RATES[scores.modality]["name"]
    return [metric for metric in scores.metrics if metric.better and metric.name != rate]


def _values_by_file(scores: Scores, metric: Metric) -> dict[str, dict[str, float]]:
    """File -> system -> value, or its magnitude if zero is best; undefined values are left out."""
    found: dict[str, dict[str, float]] = {}
    for row in scores.rows:
        value = row.values.get(metric.name, math.nan)
        if not math.isnan(value) and row.system != ORIGINAL:
            found.setdefault(row.file, {})[row.system] = (
                abs(value) if metric.better == "zero" else value
            )
    return found


def _system(system: SystemScores) -> dict[str, Any]:
    return {
        "name": system.name,
        "original": system.name == ORIGINAL,
        "delay": system.delay,
        "summaries": {name: asdict(summary) for name, summary in system.summaries.items()},
        "codebook": system.codebook,
        "codebook_size": system.codebook_size,
        "usage": None if system.counts is None else _usage(system.counts),
    }


def _usage(counts: np.ndarray) -> dict[str, list[float]] | None:
    """How often codes are used, the most frequent first, as means over ranges of ranks from 1.

    `shares[i]`, a share of all tokens, is the mean over the ranks from `ranks[i]` up to
    `ranks[i + 1]`; ranges are about equally wide on a log axis. Unused codes are left out.
    """
    used = np.sort(counts[counts > 0])[::-1]
    if not used.size:
        return None
    ranks = np.unique(np.geomspace(1, used.size + 1, _BINS + 1).round().astype(np.int64))
    shares = np.add.reduceat(used, ranks[:-1] - 1) / np.diff(ranks) / used.sum()
    return {"ranks": ranks.tolist(), "shares": shares.tolist()}


def _sounds(example: Example, n_bytes: int) -> dict[str, Any]:
    """Sounds of at most `n_bytes` each, their spectrograms, and the differences of these."""
    rate, whole = cast(int, example.rate), example.reference.shape[-1]  # audio has one
    frame = 2 * min(2, len(example.reference))  # bytes
    n_samples = min(whole, MAX_SECONDS * rate, max(rate, n_bytes // frame))

    def cut(signal: np.ndarray) -> np.ndarray:
        signal = np.nan_to_num(signal[:, :n_samples], posinf=1, neginf=-1)
        return signal if len(signal) <= 2 else signal.mean(axis=0, keepdims=True)

    reference = cut(example.reference)
    power, hertz, step = _spectrogram(reference, rate)
    peak = max(power.max(), _SILENCE)

    def levels(power: np.ndarray) -> np.ndarray:
        """dB relative to the peak, from -DEPTH to 0."""
        return 10 * np.log10(np.clip(power / peak, 10 ** (-DEPTH / 10), 1))

    def blurred(power: np.ndarray) -> np.ndarray:
        """Averaged levels, so that chance in noise does not hide differences."""
        return levels(_means(_means(power, _BLUR, 0), _BLUR, 1))

    def draw(power: np.ndarray) -> str:
        return _indexed(1 + levels(power) / DEPTH, _loudness_colours(_LEVELS))

    decoded = []
    for signal in map(cut, example.decoded.values()):
        found, _, _ = _spectrogram(signal, rate)
        change = (blurred(found) - blurred(power)) / DIFFERENCE
        decoded.append(
            {
                "sound": _wav(signal, rate),
                "picture": draw(found),
                "difference": _indexed((change + 1) / 2, _difference_colours(_LEVELS)),
            }
        )
    return {
        "blur": [_BLUR * hertz, _BLUR * step],
        "seconds": n_samples / rate,
        "whole_seconds": whole / rate,
        "top": rate / 2,
        "reference": {"sound": _wav(reference, rate), "picture": draw(power)},
        "decoded": decoded,
    }


def _images(example: Example) -> dict[str, Any]:
    """The centres of images, and their differences."""
    height, width = example.reference.shape[:2]
    down, right = (max(0, side - MAX_SIDE) // 2 for side in (height, width))
    middle = np.s_[down : down + MAX_SIDE, right : right + MAX_SIDE]
    reference = example.reference[middle]
    decoded = []
    for image in example.decoded.values():
        error = np.abs(image[middle].astype(np.int16) - reference).mean(axis=2)
        amplified = np.minimum(GAIN * error, 255).round().astype(np.uint8)
        decoded.append({"picture": _png(image[middle]), "difference": _png(amplified[..., None])})
    return {
        "size": [*reference.shape[1::-1]],
        "whole_size": [width, height],
        "reference": {"picture": _png(reference)},
        "decoded": decoded,
    }


def _spectrogram(signal: np.ndarray, rate: int) -> tuple[np.ndarray, float, float]:
    """The spectrogram of (C, T), averaged over channels, with periodic Hann windows of 24 ms.

    Returns:
        Power (bands, columns) from 0 to rate / 2, 1 for a full-scale sine; the width of a band, Hz;
        and the time between columns, s. If there are too many frequencies, bands are their means.
    """
    size = max(32, round(_WINDOW * rate))
    hop = max(1, size // 4, -(-signal.shape[1] // _COLUMNS))
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    frames = sliding_window_view(np.pad(signal, ((0, 0), (size // 2, size))), size, axis=1)
    spectra = np.fft.rfft(frames[:, : max(1, signal.shape[1]) : hop] * window)
    power = (np.abs(spectra / (window.sum() / 2)) ** 2).mean(axis=0).T
    group = -(-len(power) // _BANDS)
    return _means(power, group, 0), group * rate / size, hop / rate


def _means(values: np.ndarray, n: int, axis: int) -> np.ndarray:
    """Means of every `n` neighbours along an axis of a matrix, fewer at the end."""
    starts = np.arange(0, values.shape[axis], n)
    counts = np.diff(starts, append=values.shape[axis])
    return np.add.reduceat(values, starts, axis) / np.expand_dims(counts, 1 - axis)


def _loudness_colours(n: int) -> np.ndarray:
    """From dark violet to light yellow, (n, 3), with evenly rising lightness."""
    place = np.linspace(0, 1, n)
    chroma = 0.185 * np.sin(np.pi * np.clip(place, 0.0, 0.97)) ** 0.65
    return _colours(0.13 + 0.84 * place, chroma, 285 + 180 * place)


def _difference_colours(n: int) -> np.ndarray:
    """From light blue through near black to light orange, (n, 3); lightness is the magnitude."""
    place = np.linspace(-1, 1, n)
    size = np.abs(place)
    return _colours(0.16 + 0.66 * size, 0.14 * size**0.7, np.where(place < 0, 245, 60))


def _colours(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """OKLCH (Ottosson 2020; hue in degrees) to sRGB uint8 (n, 3), clipped."""
    a, b = chroma * np.cos(np.deg2rad(hue)), chroma * np.sin(np.deg2rad(hue))
    cones = (_LAB_TO_CONES @ np.stack([lightness, a, b])) ** 3
    linear = np.clip(_CONES_TO_RGB @ cones, 0, 1).T
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (255 * encoded).round().astype(np.uint8)


def _hex(colours: np.ndarray) -> list[str]:
    return [f"#{bytes(colour).hex()}" for colour in colours]


def _indexed(shares: np.ndarray, colours: np.ndarray) -> str:
    """A PNG of values from 0 to 1 in a list of colours; the first row is the lowest."""
    from PIL import Image

    indices = np.clip(np.rint(shares * (len(colours) - 1)), 0, len(colours) - 1)
    image = Image.fromarray(indices[::-1].astype(np.uint8))
    image.putpalette(colours.tobytes())
    return _saved(image)


def _png(pixels: np.ndarray) -> str:
    """(H, W, C)"""
    from PIL import Image

    return _saved(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))


def _saved(image: Any) -> str:
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return _address("image/png", data.getvalue())


def _wav(signal: np.ndarray, rate: int) -> str:
    """(C, T)"""
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setparams((len(signal), 2, rate, 0, "NONE", ""))
        samples = np.clip(np.rint(signal.T.astype(np.float64) * 2**15), -(2**15), 2**15 - 1)
        file.writeframes(samples.astype("<i2").tobytes())
    return _address("audio/wav", data.getvalue())


def _address(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def _json(value: Any) -> str:
    """ASCII that is the same inside a script element, whatever the strings."""
    text = json.dumps(_plain(value), allow_nan=False, separators=(",", ":"))
    for character in "<>&":  # which JSON has in strings only
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _plain(value: Any) -> Any:
    """What JSON can hold: null for NaN, "Infinity" for infinite, six digits of other floats."""
    if isinstance(value, dict):
        return {_plain(str(key)): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return escape(value, keep=_KEPT)
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        return float(f"{value:.6g}")
    return value
