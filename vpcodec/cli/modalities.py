"""Audio and images as the commands see them: telling them apart, and reporting what was done."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..media.audio import AUDIO_SUFFIXES, OUTPUT_SUFFIXES
from ..media.files import find_files
from ..media.image import IMAGE_SUFFIXES, is_image
from ..tokenfile import ImageHeader, TokenFileError, TokenHeader, TokenReader
from .errors import UsageError

HEAD = 16  # bytes by which an image is recognised

Result = dict[str, Any]


@dataclass(frozen=True)
class Modality:
    """What a file holds: audio or an image.

    Attributes:
        name: "audio" or "image", as in config.json.
        one, many: nouns for messages.
        suffixes: those that can be read.
        outputs: suffixes that can be written.
        suffix: default for outputs whose names are derived.
        result: statistics of `encode_file` or `decode_file` and elapsed seconds -> an entry of the
            JSON document.
        summary: entries and elapsed seconds -> one line.
    """

    name: str
    one: str
    many: str
    suffixes: frozenset[str]
    outputs: frozenset[str]
    suffix: str
    result: Callable[[Any, float], Result]
    summary: Callable[[list[Result], float], str]


def _audio_result(stats: Any, elapsed: float) -> Result:
    return {
        "seconds": round(stats.seconds, 6),
        "sample_rate": stats.sample_rate,
        "channels": stats.channels,
        "tokens": stats.n_frames * stats.channels,
        "bytes": stats.n_bytes,
        "bitrate": round(stats.bitrate, 1),
        "damaged_blocks": stats.damaged,
        "cut": stats.cut,
        "elapsed_seconds": round(elapsed, 3),
    }


def _audio_summary(results: list[Result], elapsed: float) -> str:
    seconds, n_bytes, tokens, lost = _sums(results, "seconds", "bytes", "tokens", "damaged_blocks")
    rate = f"{8 * n_bytes / seconds:,.0f} bit/s, " if seconds else ""
    speed = f"{seconds / elapsed:.0f} times real time" if seconds else "empty"
    note = f"; {lost} damaged blocks are silent" if lost else ""
    if cut := [result for result in results if result["cut"]]:
        note += f"; {cut[0]['cut']}" if len(results) == 1 else f"; {len(cut)} were cut short"
    return (
        f"{seconds:.2f} s of audio, {tokens:,} tokens, {n_bytes:,} bytes, {rate}"
        f"{elapsed:.2f} s ({speed}){note}"
    )


def _image_result(stats: Any, elapsed: float) -> Result:
    return {
        "width": stats.width,
        "height": stats.height,
        "components": stats.components,
        "tokens": stats.n_frames * stats.channels,
        "bytes": stats.n_bytes,
        "bits_per_pixel": round(stats.bits_per_pixel, 4),
        "damaged_blocks": stats.damaged,
        "elapsed_seconds": round(elapsed, 3),
        "megapixels_per_second": round(stats.n_pixels / 1e6 / elapsed, 3),
    }


def _image_summary(results: list[Result], elapsed: float) -> str:
    n_bytes, tokens, lost = _sums(results, "bytes", "tokens", "damaged_blocks")
    n_pixels = sum(result["width"] * result["height"] for result in results)
    size = f"{n_pixels / 1e6:,.2f} megapixels"
    if len(results) == 1:
        size = f"{results[0]['width']} x {results[0]['height']} pixels"
    note = f"; {lost} damaged blocks are grey" if lost else ""
    return (
        f"{size}, {tokens:,} tokens, {n_bytes:,} bytes, {8 * n_bytes / n_pixels:.3f} bits per "
        f"pixel, {elapsed:.2f} s ({n_pixels / 1e6 / elapsed:.2f} megapixels/s){note}"
    )


def _sums(results: list[Result], *keys: str) -> list[Any]:
    return [sum(result[key] for result in results) for key in keys]


AUDIO = Modality(
    name="audio",
    one="audio",
    many="audio",
    suffixes=AUDIO_SUFFIXES,
    outputs=OUTPUT_SUFFIXES,
    suffix=".wav",
    result=_audio_result,
    summary=_audio_summary,
)
IMAGE = Modality(
    name="image",
    one="an image",
    many="images",
    suffixes=IMAGE_SUFFIXES,
    outputs=IMAGE_SUFFIXES - {".gif"},
    suffix=".png",
    result=_image_result,
    summary=_image_summary,
)
MODALITIES = {modality.name: modality for modality in (AUDIO, IMAGE)}
SUFFIXES = AUDIO.suffixes | IMAGE.suffixes
OUTPUTS = AUDIO.outputs | IMAGE.outputs


def find_media(
    folder: Path, suffixes: Collection[str] = SUFFIXES, odd: list[str] | None = None
) -> list[Path]:
    """The files with some suffixes in a folder; those that are not regular are added to `odd`."""

    def skipped(path: Path) -> None:
        if odd is not None:
            odd.append(str(folder / path))

    return find_files(folder, suffixes, skipped=skipped)


def of_suffix(path: str | Path) -> Modality | None:
    """The modality that a file's suffix names; None for an unknown suffix."""
    suffix = Path(path).suffix.lower()
    return next((modality for modality in MODALITIES.values() if suffix in modality.suffixes), None)


def of_file(path: str, stack: ExitStack) -> tuple[Modality | None, str | BinaryIO]:
    """The modality of a file, by its suffix or else its first bytes, and what to read it from.

    That is the path or, for a named pipe, which can be read only once, a stream that `stack`
    closes.

    Raises:
        OSError: the file cannot be opened.
    """
    if modality := of_suffix(path):
        return modality, path
    modality, stream = of_stream(stack.enter_context(open(path, "rb")))
    return modality, path if os.path.isfile(path) else stream


def of_stream(stream: BinaryIO) -> tuple[Modality | None, BinaryIO]:
    """The modality of a stream, by its first bytes, and a stream that still has those bytes."""
    if stream.seekable():
        position = stream.tell()
        head = stream.read(HEAD)
        stream.seek(position)
    else:
        head = stream.read(HEAD)
        stream = cast(BinaryIO, _Rejoined(head, stream))
    return _of_head(head), stream


def of_header(header: TokenHeader) -> Modality:
    return IMAGE if isinstance(header, ImageHeader) else AUDIO


def of_tokens(path: Path) -> Modality | None:
    """The modality of a token file; None if it cannot be read, or only once (a named pipe)."""
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            return of_header(TokenReader(file).header)
    except (OSError, TokenFileError):
        return None


def check_options(name: str, modality: Modality, **options: Any) -> None:
    """Refuse options that apply to audio only.

    Args:
        name: of the input, for the message.
        modality: of the input.
        options: by name; None if not given.

    Raises:
        UsageError: an option was given and the input is not audio.
    """
    names = [option.replace("_", "-") for option, value in options.items() if value is not None]
    given = ", ".join(f"--{name}" for name in names)
    if given and modality is not AUDIO:
        raise UsageError(f"{name}: this is {modality.one}; only audio takes {given}")


def check_model(name: str, modality: Modality, codec: Any) -> None:
    """Raise UsageError if the codec is not for the modality of the input `name`."""
    if codec.modality != modality.name:
        use = MODALITIES[codec.modality].many
        raise UsageError(f"{name}: this is {modality.one}; the model {codec.name!r} is for {use}")


def summary(results: list[Result], elapsed: float) -> str:
    """One line on what was done: how much, in how many bytes, how fast."""
    name = results[0]["target"] if len(results) == 1 else f"{len(results)} files"
    parts = []
    for modality in MODALITIES.values():
        own = [result for result in results if result["kind"] == modality.name]
        if own:
            alone = len(own) == len(results)
            took = elapsed if alone else sum(result["elapsed_seconds"] for result in own)
            parts.append(modality.summary(own, took))
    written = [result["result_bytes"] for result in results]
    total = sum(written) if None not in written else 0
    if total and total != sum(result["bytes"] for result in results):
        parts.append(f"{total:,} bytes written")
    return f"{name}: {'; '.join(parts)}"


def _of_head(head: bytes) -> Modality | None:
    return IMAGE if is_image(head) else None


class _Rejoined:
    """A stream that gives back `head`, which has already been read, first."""

    def __init__(self, head: bytes, stream: BinaryIO) -> None:
        self._head = head
        self._stream = stream

    def read1(self, n: int = -1) -> bytes:
        """What is there, without waiting for more."""
        if self._head:
            return self.read(len(self._head) if n < 0 else min(n, len(self._head)))
        return getattr(self._stream, "read1", self._stream.read)(n)

    def read(self, n: int = -1) -> bytes:
        part = self._head if n < 0 else self._head[:n]
        self._head = self._head[len(part) :]
        missing = n if n < 0 else n - len(part)
        return part + self._stream.read(missing) if missing else part

    def seekable(self) -> bool:
        return False
