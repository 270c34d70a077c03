"""Audio and images as the commands know them: telling them apart, and saying what was done."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..media.audio import AUDIO_SUFFIXES, OUTPUT_SUFFIXES
from ..media.files import find_files
from ..media.image import IMAGE_SUFFIXES, is_image
from ..tokenfile import ImageHeader, TokenFileError, TokenHeader, TokenReader
from .errors import UsageError

HEAD = 16  # bytes by which an image is known

Row = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """What a file holds.

    Attributes:
        name: as in the configuration of a model.
        one, many: for messages.
        suffixes: of files that can be read.
        outputs: of files that can be written.
        suffix: of results whose name is derived.
        row: what `encode_file` and `decode_file` return, and the seconds that they took -> entries
            of the JSON document.
        summary: rows, and the seconds that they took together -> one line.
    """

    name: str
    one: str
    many: str
    suffixes: frozenset[str]
    outputs: frozenset[str]
    suffix: str
    row: Callable[[Any, float], Row]
    summary: Callable[[list[Row], float], str]


def _audio_row(stats: Any, elapsed: float) -> Row:
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


def _audio_summary(rows: list[Row], elapsed: float) -> str:
    seconds, n_bytes, tokens, lost = _sums(rows, "seconds", "bytes", "tokens", "damaged_blocks")
    rate = f"{8 * n_bytes / seconds:,.0f} bit/s, " if seconds else ""
    speed = f"{seconds / elapsed:.0f} times real time" if seconds else "empty"
    note = f"; {lost} damaged blocks are silent" if lost else ""
    if cut := [row for row in rows if row["cut"]]:
        note += f"; {cut[0]['cut']}" if len(rows) == 1 else f"; {len(cut)} were cut short"
    return (
        f"{seconds:.2f} s of audio, {tokens:,} tokens, {n_bytes:,} bytes, {rate}"
        f"{elapsed:.2f} s ({speed}){note}"
    )


def _image_row(stats: Any, elapsed: float) -> Row:
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


def _image_summary(rows: list[Row], elapsed: float) -> str:
    n_bytes, tokens, lost = _sums(rows, "bytes", "tokens", "damaged_blocks")
    n_pixels = sum(row["width"] * row["height"] for row in rows)
    size = f"{n_pixels / 1e6:,.2f} megapixels"
    if len(rows) == 1:
        size = f"{rows[0]['width']} x {rows[0]['height']} pixels"
    note = f"; {lost} damaged blocks are grey" if lost else ""
    return (
        f"{size}, {tokens:,} tokens, {n_bytes:,} bytes, {8 * n_bytes / n_pixels:.3f} bits per "
        f"pixel, {elapsed:.2f} s ({n_pixels / 1e6 / elapsed:.2f} megapixels/s){note}"
    )


def _sums(rows: list[Row], *keys: str) -> list[Any]:
    return [sum(row[key] for row in rows) for key in keys]


AUDIO = Kind(
    name="audio",
    one="audio",
    many="audio",
    suffixes=AUDIO_SUFFIXES,
    outputs=OUTPUT_SUFFIXES,
    suffix=".wav",
    row=_audio_row,
    summary=_audio_summary,
)
IMAGE = Kind(
    name="image",
    one="an image",
    many="images",
    suffixes=IMAGE_SUFFIXES,
    outputs=IMAGE_SUFFIXES - {".gif"},
    suffix=".png",
    row=_image_row,
    summary=_image_summary,
)
KINDS = {kind.name: kind for kind in (AUDIO, IMAGE)}
SUFFIXES = AUDIO.suffixes | IMAGE.suffixes
OUTPUTS = AUDIO.outputs | IMAGE.outputs


def find(folder: Path) -> list[Path]:
    """The files of all kinds in a folder; as `vpcodec.media.files.find_files`."""
    return find_files(folder, SUFFIXES)


def of_suffix(path: str | Path) -> Kind | None:
    """The kind that the name of a file tells."""
    suffix = Path(path).suffix.lower()
    return next((kind for kind in KINDS.values() if suffix in kind.suffixes), None)


def of_file(path: str, stack: ExitStack) -> tuple[Kind | None, str | BinaryIO]:
    """The kind of a file, if its suffix or else its first bytes tell, and what to read it from.

    That is the path, or for a named pipe, which can be read once only, a stream that `stack`
    closes. Raises OSError.
    """
    if kind := of_suffix(path):
        return kind, path
    kind, stream = of_stream(stack.enter_context(open(path, "rb")))
    return kind, path if os.path.isfile(path) else stream


def of_stream(stream: BinaryIO) -> tuple[Kind | None, BinaryIO]:
    """The kind of a stream, if its first bytes tell, and a stream that still has them."""
    if stream.seekable():
        position = stream.tell()
        head = stream.read(HEAD)
        stream.seek(position)
    else:
        head = stream.read(HEAD)
        stream = _Rejoined(head, stream)
    return _of_head(head), stream


def of_header(header: TokenHeader) -> Kind:
    return IMAGE if isinstance(header, ImageHeader) else AUDIO


def of_tokens(path: Path) -> Kind | None:
    """The kind of a token file; None where it cannot be read, or only once as a named pipe."""
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            return of_header(TokenReader(file).header)
    except (OSError, TokenFileError):
        return None


def check_options(name: str, kind: Kind, **options: Any) -> None:
    """Refuse options that are for audio, unless they are None, where `name` is something else.

    Raises UsageError.
    """
    given = ", ".join(f"--{option}" for option, value in options.items() if value is not None)
    if given and kind is not AUDIO:
        raise UsageError(f"{name}: this is {kind.one}; only audio takes {given}")


def check_model(name: str, kind: Kind, codec: Any) -> None:
    """Refuse to use a codec of another kind for `name`; UsageError."""
    if codec.kind != kind.name:
        use = KINDS[codec.kind].many
        raise UsageError(f"{name}: this is {kind.one}; the model {codec.name!r} is for {use}")


def summary(rows: list[Row], elapsed: float) -> str:
    """One line on what was done in so many seconds: how much, how many bytes, how fast."""
    name = rows[0]["target"] if len(rows) == 1 else f"{len(rows)} files"
    parts = []
    for kind in KINDS.values():
        own = [row for row in rows if row["kind"] == kind.name]
        if own:
            alone = len(own) == len(rows)
            took = elapsed if alone else sum(row["elapsed_seconds"] for row in own)
            parts.append(kind.summary(own, took))
    return f"{name}: {'; '.join(parts)}"


def _of_head(head: bytes) -> Kind | None:
    return IMAGE if is_image(head) else None


class _Rejoined:
    """A stream of which `head` has been read already."""

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
