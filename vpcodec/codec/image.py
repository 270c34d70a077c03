"""ImageCodec: images to tokens and back, as arrays or files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from ..checks import check_tokens, to_array
from ..config import ImageConfig
from ..media.image import MAX_PIXELS, image_writer, load_image
from ..progress import Progress
from ..tokenfile import (
    MAX_BLOCK_FRAMES,
    ImageHeader,
    TokenFileError,
    TokenHeader,
    TokenReader,
    TokenWriter,
)
from .base import Codec, Source, open_target

TILE_SIDE = 512  # pixels of a tile without its surroundings; bounds memory
BLOCK_TOKENS = 1 << 14  # of a channel in a block of a token file, about, in whole rows
LOST = 128  # the grey of patches whose tokens are lost


class ImageCodec(Codec, modality="image"):
    """An image model that is ready to encode and decode; see `Codec`.

    Images may have any size. They are extended beyond their right and lower edges to whole windows
    of the model. Large ones are coded in tiles, with exactly the tokens and pixels of the whole.
    Grey is coded as RGB with equal channels, an alpha plane as a grey image of its own.
    """

    config: ImageConfig

    @property
    def _rate(self) -> str:
        side = self.hop_length
        return f"{side} x {side} pixels per token, {self.bits_per_pixel:.3f} bits per pixel"

    @property
    def bits_per_pixel(self) -> float:
        """Nominal bits per pixel of one channel of tokens."""
        return self.config.bits_per_pixel

    def encode(
        self, pixels: NDArray[Any], *, progress: Progress | None = None
    ) -> NDArray[np.int64]:
        """Pixels to tokens.

        Args:
            pixels: (H, W) or (H, W, C), uint8, or float in [0, 1]; C is 1 (grey), 2 (grey and
                alpha), 3 (RGB) or 4 (RGBA).
            progress: told the pixels that are done.

        Returns:
            (channels, rows, columns) int64: one channel, and a second one for alpha; rows =
            ceil(H / hop_length), columns = ceil(W / hop_length).

        Raises:
            ValueError: wrong shape or dtype, no pixels, or floats outside [0, 1].
        """
        pixels = _check_pixels(pixels)
        height, width, components = pixels.shape
        hop = self.hop_length
        tokens = np.empty((_channels(components), *self._grid(height, width)), np.int64)
        for down, right in self._tiles(
            height, width, self.config.encoder_halo, "encoding", progress
        ):
            tile = _cut(
                pixels, down.first * hop, down.last * hop, right.first * hop, right.last * hop
            )
            planes = [tile[..., :3] if components >= 3 else tile[..., :1], tile[..., -1:]]
            for channel, plane in zip(tokens, planes):
                found, _ = self.backend.encode(_to_network(plane), None)
                part = channel[down.start : down.stop, right.start : right.stop]
                part[:] = found[0, down.inside(), right.inside()][: part.shape[0], : part.shape[1]]
        return tokens

    def token_header(
        self, tokens: Any, *, size: tuple[int, int] | None = None, components: int | None = None
    ) -> ImageHeader:
        """The header of a token file with tokens of this model, for `write_tokens`.

        Args:
            tokens: as for `decode`.
            size: as for `decode`.
            components: as for `decode`.

        Raises:
            ValueError: as `decode`.
        """
        _, shape = self._checked(tokens, size, components)
        return self.header(*shape)

    def decode(
        self,
        tokens: NDArray[np.integer[Any]],
        size: tuple[int, int] | None = None,
        components: int | None = None,
        *,
        progress: Progress | None = None,
    ) -> NDArray[np.uint8]:
        """Tokens to pixels.

        Args:
            tokens: (rows, columns) or (channels, rows, columns) integers in [0, codebook_size).
            size: height and width to cut to; None: rows and columns times hop_length.
            components: of the result: 1 (grey) or 3 (RGB) from one channel, 2 or 4 (with alpha)
                from two; None: 3 or 4.
            progress: told the pixels that are done.

        Returns:
            (H, W, components) uint8.

        Raises:
            ValueError: wrong shape or dtype, a token out of range, or a size or components that do
                not fit the tokens.
        """
        tokens, shape = self._checked(tokens, size, components)
        return self._decode(tokens, np.ones(tokens.shape[1:], bool), shape, progress)

    def _checked(
        self, tokens: Any, size: tuple[int, int] | None, components: int | None
    ) -> tuple[NDArray[np.int64], tuple[int, int, int]]:
        """The tokens with channels, and (height, width, components) of their image."""
        tokens = check_tokens(tokens, "(C, rows, columns)", self.codebook_size)
        channels, rows, columns = tokens.shape
        if not tokens.size or channels > 2:
            raise ValueError(f"tokens of shape {tokens.shape} are not those of an image")
        hop = self.hop_length
        height, width = size or (rows * hop, columns * hop)
        if self._grid(height, width) != (rows, columns):
            raise ValueError(
                f"{rows} x {columns} tokens are not those of {height} x {width} pixels"
            )
        components = components or channels + 2
        if components not in (channels, channels + 2):
            raise ValueError(f"{channels} channels of tokens do not make {components} components")
        return tokens, (height, width, components)

    def _decode(
        self,
        tokens: NDArray[np.int64],
        known: NDArray[np.bool_],
        shape: tuple[int, int, int],
        progress: Progress | None,
    ) -> NDArray[np.uint8]:
        """Pixels uint8 of `shape`, (H, W, components), from int64 tokens (channels, rows, columns).

        Tiles without a `known` token, bool (rows, columns), are skipped: their pixels are
        arbitrary.
        """
        hop = self.hop_length
        height, width, components = shape
        channels = len(tokens)
        pixels = np.empty(shape, np.uint8)
        for down, right in self._tiles(
            height, width, self.config.decoder_halo, "decoding", progress
        ):
            if not known[down.start : down.stop, right.start : right.stop].any():
                continue
            part = pixels[down.start * hop : down.stop * hop, right.start * hop : right.stop * hop]
            colour, alpha = part[..., : components - channels + 1], part[..., -1:]
            for channel, plane in zip(tokens, (colour, alpha)):
                tile = _cut(channel, down.first, down.last, right.first, right.last)
                found, _ = self.backend.decode(tile[None], None)
                found = found[0, :, down.inside(hop), right.inside(hop)]
                plane[:] = _from_network(found[:, : part.shape[0], : part.shape[1]], plane.shape[2])
        return pixels

    def header(self, height: int, width: int, components: int) -> ImageHeader:
        """The header of a token file for an image (H, W, components)."""
        _, columns = self._grid(height, width)
        block_frames = min(columns * max(1, BLOCK_TOKENS // columns), MAX_BLOCK_FRAMES)
        return ImageHeader(
            model=self.name,
            fingerprint=self.space,
            channels=_channels(components),
            hop_length=self.hop_length,
            codebook_size=self.codebook_size,
            width=width,
            height=height,
            components=components,
            block_frames=block_frames,
        )

    def encode_file(
        self,
        source: Source,
        target: Source,
        *,
        name: str = "stdin",
        progress: Progress | None = None,
    ) -> ImageStats:
        """Image file (or binary stream) to token file (or stream).

        Args:
            source: path of any image that Pillow reads, or a stream.
            target: path of the token file, which appears complete or not at all, or a stream.
            name: of a stream, for error messages.
            progress: told the pixels that are done.

        Raises:
            ImageError: the source cannot be read.
            OSError: source or target cannot be opened or written.
        """
        pixels = load_image(source, name=name)
        height, width, components = pixels.shape
        header = self.header(height, width, components)
        with ExitStack() as stack:
            output = open_target(target, stack)
            tokens = self.encode(pixels, progress=progress)
            writer = TokenWriter(output, header, coder=self.coder)
            writer.write(tokens.reshape(header.channels, -1))
            writer.close()
        return ImageStats(width, height, components, writer.n_frames, output.bytes)

    def decode_file(
        self,
        source: Source | TokenReader,
        target: Source,
        *,
        format: str | None = None,
        recover: bool = False,
        force: bool = False,
        progress: Progress | None = None,
    ) -> ImageStats:
        """Token file (or binary stream) to image file (or stream).

        Args:
            source: path of a token file, a stream, or a reader at its first block.
            target: path of the image file, which appears complete or not at all, or a stream.
            format: a suffix such as "png"; None: that of the path, or PNG for streams.
            recover: paint patches with damaged tokens grey instead of stopping (a reader has its
                own setting).
            force: decode tokens of other weights all the same.
            progress: told the pixels that are done.

        Raises:
            TokenFileError: damaged file, with more lost than left (`TokenReader.read_all`), or
                tokens of another model.
            ImageError: the target cannot hold the image.
            OSError: source or target cannot be opened or written.
        """
        with ExitStack() as stack:
            reader = self._read(source, stack, recover=recover, force=force)
            header = cast(ImageHeader, reader.header)  # as `_fits` found
            if header.n_pixels > MAX_PIXELS:
                raise TokenFileError(
                    f"{header.width} x {header.height} pixels are more than {MAX_PIXELS}"
                )
            tokens, _ = reader.read_all()
        lost = tokens[0] < 0
        grid = _without_gaps(tokens, lost).reshape(-1, header.rows, header.columns)
        lost = lost.reshape(header.rows, header.columns)
        shape = header.height, header.width, header.components
        with image_writer(target, header.components, format=format) as write:
            pixels = self._decode(grid, ~lost, shape, progress)
            grey = np.full(header.components, LOST, np.uint8)
            if header.channels == 2:
                grey[-1] = 255
            for row in np.flatnonzero(lost.any(1)):
                patches = lost[row].repeat(self.hop_length)[: header.width]
                pixels[row * self.hop_length : (row + 1) * self.hop_length, patches] = grey
            write(pixels)
        return ImageStats(
            header.width,
            header.height,
            header.components,
            header.n_frames,
            reader.total_bytes,
            reader.n_damaged,
        )

    def _fits(self, header: TokenHeader) -> bool:
        return isinstance(header, ImageHeader) and header.hop_length == self.hop_length

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return -(-height // self.hop_length), -(-width // self.hop_length)

    def _tiles(
        self, height: int, width: int, halo: int, stage: str, progress: Progress | None
    ) -> Iterator[tuple[_Span, _Span]]:
        """The tiles of an image; each is reported as done when the next one is asked for."""
        hop, window = self.hop_length, self.config.attention_window
        axes = (_spans(n, hop, window, halo) for n in self._grid(height, width))
        done = 0
        for down, right in product(*axes):
            yield down, right
            done += down.length(hop, height) * right.length(hop, width)
            if progress:
                progress(stage, done, height * width)


@dataclass(frozen=True)
class ImageStats:
    """Statistics of `encode_file` or `decode_file`.

    Attributes:
        width, height: pixels.
        components: of the image, 1 to 4.
        n_frames: tokens per channel.
        n_bytes: size of the token file.
        damaged: blocks replaced by grey.
    """

    width: int
    height: int
    components: int
    n_frames: int
    n_bytes: int
    damaged: int = 0

    @property
    def channels(self) -> int:
        """Channels of the tokens: 2 with alpha, else 1."""
        return _channels(self.components)

    @property
    def n_pixels(self) -> int:
        """Width times height."""
        return self.width * self.height

    @property
    def bits_per_pixel(self) -> float:
        """Real bits per pixel, of all channels, file overhead included."""
        return 8 * self.n_bytes / self.n_pixels


class _Span(NamedTuple):
    """Tokens of a tile along one axis, and all those that go through the network with them."""

    start: int
    stop: int
    first: int
    last: int

    def inside(self, hop: int = 1) -> slice:
        """Where the tile lies in the result for all, of `hop` values per token."""
        return slice((self.start - self.first) * hop, (self.stop - self.first) * hop)

    def length(self, hop: int, end: int) -> int:
        """Pixels of the tile, of those up to `end`."""
        return min(self.stop * hop, end) - self.start * hop


def _spans(n_tokens: int, hop: int, window: int, halo: int) -> list[_Span]:
    """Cut an axis into tiles of whole windows, nearly equal, each with `halo` around it."""
    windows = -(-n_tokens // window)
    tiles = 1
    if windows * window * hop > TILE_SIDE + 2 * halo * hop:
        tiles = -(-windows // max(1, TILE_SIDE // (window * hop)))
    edges = [windows * i // tiles * window for i in range(tiles + 1)]
    return [
        _Span(start, stop, max(0, start - halo), min(edges[-1], stop + halo))
        for start, stop in pairwise(edges)
    ]


def _cut(array: NDArray[Any], top: int, bottom: int, left: int, right: int) -> NDArray[Any]:
    """Part of an array (H, W, ...), extended beyond its edges with their last values."""
    part = array[top:bottom, left:right]
    missing = [(0, bottom - top - part.shape[0]), (0, right - left - part.shape[1])]
    return np.pad(part, missing + [(0, 0)] * (array.ndim - 2), mode="edge")


def _channels(components: int) -> int:
    return 2 - components % 2


def _check_pixels(pixels: NDArray[Any]) -> NDArray[Any]:
    pixels = to_array(pixels, "pixels")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    known = pixels.dtype == np.uint8 or pixels.dtype.kind == "f"
    if not known or pixels.ndim != 3 or not pixels.size or pixels.shape[2] > 4:
        raise ValueError(
            "pixels must be uint8 or float, (H, W) or (H, W, C) with C from 1 to 4, got "
            f"{pixels.dtype} of shape {pixels.shape}"
        )
    if pixels.dtype != np.uint8:
        low, high = pixels.min(), pixels.max()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"float pixels must be in [0, 1], got {low:g} to {high:g}")
    return pixels


def _to_network(plane: NDArray[Any]) -> NDArray[np.float32]:
    """Pixels (h, w, 1 or 3) -> (1, 3, h, w) float32 in [-1, 1]."""
    scale = np.float32(2 / 255 if plane.dtype == np.uint8 else 2)
    x = plane.transpose(2, 0, 1).astype(np.float32) * scale - np.float32(1)
    return np.ascontiguousarray(np.broadcast_to(x, (3, *x.shape[1:])))[None]


def _from_network(y: NDArray[np.float32], components: int) -> NDArray[np.uint8]:
    """(3, h, w) float32 in [-1, 1] -> (h, w, components) uint8, the mean as the only one."""
    if components == 1:
        y = y.mean(0, keepdims=True)
    pixels: NDArray[np.uint8] = np.rint((y + 1) * 127.5).astype(np.uint8)
    return pixels.transpose(1, 2, 0)


def _without_gaps(tokens: NDArray[np.int64], lost: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Tokens (C, N) with each lost one replaced by the nearest known before it, or else after."""
    known = np.flatnonzero(~lost)
    if not known.size:
        return np.zeros_like(tokens)
    before = np.searchsorted(known, np.arange(lost.size), "right") - 1
    return tokens[:, known[np.maximum(before, 0)]]
