"""Reading and writing of images: files, folders and pipes.

Pixels are uint8 arrays of shape (H, W, C): C is 1 for grey, 2 for grey and alpha, 3 for RGB, 4 for
RGBA. Pillow reads and writes the formats. Colour profiles are not applied.
"""

from __future__ import annotations

import io
import logging
import os
import re
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from .files import atomic_output, find_files, is_device, naming, spooling
from .noise import overheard, tell

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 2**27

_READ = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "AVIF")  # Pillow's names
MAX_SCANS = 200  # in a JPEG
MAX_SCANNED = 2**32  # pixels of a JPEG times its scans
MAX_PNG_CHUNKS = 2**18  # more than the largest image has in chunks of 8 KiB
MAX_SPOOL = 2**30  # most bytes of a pipe in a temporary file


class _Format(NamedTuple):
    name: str  # as in Pillow
    components: tuple[int, ...]
    options: dict[str, object] = {}


_PNG = _Format("PNG", (1, 2, 3, 4))
_JPEG = _Format("JPEG", (1, 3), {"quality": 95, "subsampling": 0})
_TIFF = _Format("TIFF", (1, 2, 3, 4), {"compression": "tiff_lzw"})
_FORMATS = {
    ".png": _PNG,
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": _Format("WEBP", (1, 2, 3, 4), {"lossless": True, "exact": True}),
    ".bmp": _Format("BMP", (1, 3)),
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".ppm": _Format("PPM", (1, 3)),
    ".pgm": _Format("PPM", (1,)),
}
IMAGE_SUFFIXES = frozenset(_FORMATS) | {".gif", ".avif"}

_MAGIC = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF.{4}WEBP|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0"
    rb"|II[*+]\0|MM\0[*+]|P[1-6][\s#]|GIF8[79]a|.{4}ftypavi[fs]",
    re.DOTALL,
)
_UPRIGHT = {  # EXIF orientation: name of Pillow's transposition
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_ORIENTATION = 0x0112  # the EXIF tag
_MARKER = re.compile(rb"\xff+[^\x00\x01\xd0-\xd8\xff]")  # JPEG markers that have a length
_EOI, _SOS = 0xD9, 0xDA
_PNG_NEEDED = (b"tRNS", b"acTL", b"fcTL", b"fdAT", b"eXIf")  # chunks that affect the pixels
_TIFF_HEADS = (b"II*\0", b"II+\0", b"MM\0*", b"MM\0+")
_PHOTOMETRIC, _SAMPLE_FORMAT = 262, 339  # TIFF tags
_STRIP = 2**20  # pixels, or bytes, copied at a time

logging.getLogger("PIL").addHandler(logging.NullHandler())  # otherwise its errors go to stderr


class ImageError(ValueError):
    """An image cannot be read or written; the message is one line with the file and the cause."""


def is_image(head: bytes) -> bool:
    """Whether `head`, at least the first 16 bytes of a file, belongs to a supported format."""
    return _MAGIC.match(head) is not None


def find_images(folder: str | os.PathLike[str], recursive: bool = True) -> list[Path]:
    """The images in `folder`, by suffix: sorted paths relative to it, without hidden files.

    Raises:
        ImageError: a folder cannot be read.
    """
    try:
        return find_files(folder, IMAGE_SUFFIXES, recursive=recursive)
    except OSError as error:
        raise ImageError(f"{error.filename}: {error.strerror}") from error


def load_image(source: str | os.PathLike[str] | BinaryIO, *, name: str = "stdin") -> np.ndarray:
    """Read an image, upright, as uint8 (H, W, C).

    Palettes are expanded, and other colour spaces are converted to RGB; of 16 bits, the upper 8 are
    kept; alpha that is opaque everywhere is dropped. Of the images in a phone's MPO, the first is
    read.

    Args:
        source: a path, or a binary stream, which need not be seekable and is left open.
        name: name of a stream in messages.

    Raises:
        ImageError: the source is missing, unreadable, not an image, damaged or truncated; has
            several frames or pages, or values without a known range (float, 32-bit); or exceeds
            MAX_PIXELS, MAX_SCANS, MAX_PNG_CHUNKS or, through a pipe, MAX_SPOOL.
    """
    path = source if isinstance(source, (str, os.PathLike)) else None
    called = name if path is None else os.fspath(path)
    with naming(called, ImageError), ExitStack() as stack:
        if isinstance(source, (str, os.PathLike)):
            source = stack.enter_context(open(source, "rb"))
        if path is None or not source.seekable():
            spool = stack.enter_context(tempfile.TemporaryFile())
            while data := source.read(_STRIP):
                if spool.tell() + len(data) > MAX_SPOOL:
                    raise ImageError(f"more than {MAX_SPOOL >> 20} MiB")
                with spooling():
                    spool.write(data)
                    spool.flush()
            spool.seek(0)
            source = spool
        if source.read(4) not in _TIFF_HEADS:
            source.seek(0)
            return _to_array(_decode(source))
        source.seek(0)
        with overheard() as lines:
            pixels = _to_array(_decode(source))
        tell(called, lines)
        return pixels


def save_image(
    target: str | os.PathLike[str] | BinaryIO, pixels: np.ndarray, *, format: str | None = None
) -> None:
    """Write an image; a file appears complete or not at all.

    All formats except JPEG (quality 95, full chroma resolution) are lossless. Grey stays grey
    except in WebP, which has no grey.

    Args:
        target: a path, or a binary stream, which is left open.
        pixels: uint8 (H, W) or (H, W, C).
        format: suffix such as "png"; None: that of the path, or PNG for streams and devices.

    Raises:
        ImageError: the target cannot be written, or its format does not support alpha or colour.
        BrokenPipeError: the reader of the stream has closed it.
    """
    if pixels.dtype != np.uint8:
        raise ValueError(f"pixels are {pixels.dtype}, not uint8")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or not pixels.size or pixels.shape[2] > 4:
        raise ValueError(f"pixels of shape {pixels.shape}, not (H, W, 1 to 4)")
    with image_writer(target, pixels.shape[2], format=format) as write:
        write(pixels)


@contextmanager
def image_writer(
    target: str | os.PathLike[str] | BinaryIO, components: int, *, format: str | None = None
) -> Iterator[Callable[[np.ndarray], None]]:
    """Open a target for `save_image` before the pixels are known, so that errors show early.

    Yields a function to call once with uint8 (H, W, components) pixels. Raises as `save_image`.
    """
    path = target if isinstance(target, (str, os.PathLike)) else None
    with naming("stdout" if path is None else os.fspath(path), ImageError), ExitStack() as stack:
        suffix = ".png" if path is None else Path(path).suffix
        if path is not None and is_device(path) and suffix.lower() not in _FORMATS:
            suffix = ".png"
        suffix = suffix if format is None else f".{format.lstrip('.')}"
        chosen = _choose_format(suffix, components)
        if isinstance(target, (str, os.PathLike)):
            target = stack.enter_context(atomic_output(target))
        file: BinaryIO = target

        def write(pixels: np.ndarray) -> None:
            left = _encode(pixels, chosen)
            while left:  # an unbuffered stream may accept only a part
                left = left[file.write(left) :]
            file.flush()

        yield write


def _decode(file: BinaryIO) -> Image:
    """The first image in a seekable file, upright, in a mode that `_to_array` supports."""
    from PIL import Image

    # Not undone, because warnings.catch_warnings does not work in threads.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    head = file.read(16)
    if not head:
        raise ImageError("not an image (it is empty)")
    file.seek(0)
    n_scans = 0
    try:
        if head.startswith(b"\xff\xd8\xff"):
            n_scans = _count_scans(file)
        file = _checked(file, head)
        trouble = "damaged" if is_image(head) else "not an image that can be read"
        with _pillow(trouble):
            image: Any = Image.open(file, formats=_formats())
    except Image.DecompressionBombError as error:
        n_pixels = re.findall(r"\d+", str(error))
        raise ImageError(f"{n_pixels[0]} pixels are more than {MAX_PIXELS}") from error
    if not 1 <= image.width * image.height <= MAX_PIXELS:
        raise ImageError(f"{image.width} x {image.height} pixels are not 1 to {MAX_PIXELS} in all")
    if n_scans > MAX_SCANS or n_scans * image.width * image.height > MAX_SCANNED:
        raise ImageError(
            f"a JPEG of {n_scans:,} scans, more than {MAX_SCANS} or than is usual for its size"
        )
    with _pillow("damaged"):
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise ImageError("several frames or pages, where one picture is wanted")
        layout = str(image.tile)  # contains the sample format, such as "LA;16B"
        _check_layout(image, layout)
        image.load()
    orientation = 1
    with suppress(Exception):  # damaged EXIF fails in many ways, but the image is intact
        orientation = image.getexif().get(_ORIENTATION, 1)
    if image.mode[0] != "I":
        with _pillow("cannot be converted"):
            grey = image.mode in ("1", "L", "LA", "La") or "LA;16" in layout
            image = _to_8_bits(image, "L" if grey else "RGB")
    if orientation in _UPRIGHT:
        image = image.transpose(Image.Transpose[_UPRIGHT[orientation]])
    return image


def _formats() -> list[str]:
    """The supported formats, except those that this version or build of Pillow lacks."""
    from PIL import features

    return [name for name in _READ if name != "AVIF" or features.check("avif")]


def _checked(file: BinaryIO, head: bytes) -> BinaryIO:
    """A file, or a copy of it without damaged chunks that do not matter.

    Raises:
        ImageError: there is damage that Pillow would not notice, or AVIF needs a newer Pillow.
    """
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _checked_png(file)
    if head[4:12] in (b"ftypavif", b"ftypavis") and "AVIF" not in _formats():
        raise ImageError("AVIF needs Pillow 11.3 or newer; install it with: pip install -U pillow")
    return file


def _count_scans(file: BinaryIO) -> int:
    """The number of scans of a JPEG, each of which takes as long to decode as the whole image.

    Thumbnails, and videos after the image, do not count. The file must be at its first byte, and is
    there again afterwards.
    """
    n_scans, buffer, at = 0, b"", 0
    while True:
        found = _MARKER.search(buffer, at)
        if found is None or found.end() + 2 > len(buffer):
            tail = buffer[found.start() if found else max(at, len(buffer) - 1) :]
            if not (more := file.read(_STRIP)):
                break
            buffer, at = tail + more, 0
            continue
        at = found.end()
        if found[0][-1] == _EOI:
            break
        n_scans += found[0][-1] == _SOS
        at += int.from_bytes(buffer[at : at + 2], "big")
        if at > len(buffer):
            file.seek(at - len(buffer), os.SEEK_CUR)
            buffer, at = b"", 0
    file.seek(0)
    return n_scans


def _checked_png(file: BinaryIO) -> BinaryIO:
    """A PNG without chunks that have wrong checksums but do not affect the pixels."""
    file.seek(8)
    kept, dropped = [], False  # (start, size) of chunks
    start, n_chunks = 8, 0
    while len(head := file.read(8)) == 8:
        size, name = struct.unpack(">I4s", head)
        check, left = zlib.crc32(name), size
        while left and (data := file.read(min(left, _STRIP))):
            check, left = zlib.crc32(data, check), left - len(data)
        end = file.read(4)
        if left or len(end) < 4:
            raise ImageError(f"damaged (it ends within its chunk {name.decode('latin-1')!a})")
        n_chunks += 1
        if n_chunks > MAX_PNG_CHUNKS:
            raise ImageError(f"a PNG of more than {MAX_PNG_CHUNKS:,} chunks")
        if int.from_bytes(end, "big") == check:
            kept.append((start, size + 12))
        elif not name[0] & 0x20 or name in _PNG_NEEDED:
            text = name.decode("latin-1")
            raise ImageError(f"damaged (the checksum of its chunk {text!a} is wrong)")
        else:
            dropped = True
        start += size + 12
        if name == b"IEND":
            break
    file.seek(0)
    if not dropped:
        return file
    copy = tempfile.TemporaryFile()  # noqa: SIM115  Pillow closes it with the image
    copy.write(file.read(8))
    for start, size in kept:
        file.seek(start)
        while size and (data := file.read(min(size, _STRIP))):
            size -= copy.write(data)
    copy.seek(0)
    return copy


def _check_layout(image: Any, layout: str) -> None:
    """Refuse, before decoding, what Pillow would fill in or not convert to 8 or 16 bits."""
    if image.format == "TIFF":
        width, height = (max((tile[1][side] for tile in image.tile), default=0) for side in (2, 3))
        if width * height < image.width * image.height:
            raise ImageError(f"cut short: it has only {width} x {height} pixels")
        if image.mode[0] == "I" and image.tag_v2.get(_PHOTOMETRIC) == 0:
            raise ImageError("16 bits of which 0 is white cannot be read; invert it first")
        if 2 in image.tag_v2.get(_SAMPLE_FORMAT, ()):
            raise ImageError("signed pixels have no known range; convert it to unsigned ones first")
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ImageError("float or 32-bit pixels have no known range; convert it to 16 bits first")
    if "I;12" in layout:
        raise ImageError("12-bit pixels cannot be read; convert it to 16 bits first")
    if ";16" in layout and "transparency" in image.info:
        raise ImageError("16 bits with one transparent colour cannot be read; give it alpha first")


def _to_8_bits(image: Image, mode: str) -> Image:
    """The image in `mode`, "L" or "RGB", with "A" appended unless alpha is opaque everywhere."""
    if image.has_transparency_data:
        image = image.convert(f"{mode}A") if image.mode != f"{mode}A" else image
        alpha: Any = image.getextrema()[-1]
        if alpha[0] < 255:
            return image
    return image.convert(mode) if image.mode != mode else image


def _to_array(image: Image) -> np.ndarray:
    """The pixels, uint8 (H, W, C); in modes I and I;16, the upper 8 of 16 bits."""
    n_bands = len(image.getbands())
    pixels = np.empty((image.height, image.width, n_bands), np.uint8)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):  # in strips, because Pillow makes temporary copies
        bottom = min(top + rows, image.height)
        strip = np.asarray(image.crop((0, top, image.width, bottom)))
        if image.mode[0] == "I":
            strip = strip >> 8
        pixels[top:bottom] = strip.reshape(-1, image.width, n_bands)
    return pixels


def _choose_format(suffix: str, n_components: int) -> _Format:
    if suffix.lower() not in _FORMATS:
        known = " ".join(_FORMATS)
        raise ImageError(f"the suffix {suffix!r} stands for no known format; choose from {known}")
    format = _FORMATS[suffix.lower()]
    if n_components not in format.components:
        lacking = "alpha" if n_components in (2, 4) else "colour"
        raise ImageError(f"the format has no {lacking}; choose .png or .webp")
    return format


def _encode(pixels: np.ndarray, format: _Format) -> memoryview:
    """Encode (H, W, C) pixels as the contents of an image file."""
    from PIL import Image

    data = io.BytesIO()
    with _pillow(f"cannot be written as {format.name}"):
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        image.save(data, format.name, **format.options)
    return data.getbuffer()


@contextmanager
def _pillow(trouble: str) -> Iterator[None]:
    """Turn any exception of Pillow into an ImageError that begins with `trouble`.

    Errors of the operating system and the error for too many pixels pass through.
    """
    from PIL.Image import DecompressionBombError, UnidentifiedImageError

    try:
        yield
    except (ImageError, DecompressionBombError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its message only names the Python object
        raise ImageError(trouble) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ImageError(f"{trouble} ({reason})") from error
