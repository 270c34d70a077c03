from __future__ import annotations

import base64
import errno
import io
import os
import struct
import subprocess
import sys
import threading
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vpcodec.media import image
from vpcodec.media.image import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    ImageError,
    find_images,
    is_image,
    load_image,
    save_image,
)

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)  # every value once
AVIF = base64.b64decode(  # a ramp of 16 x 16 grey pixels
    "AAAAHGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZgAAAOltZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAA"
    "AAAAAAAAAAAA5waXRtAAAAAAABAAAAHmlsb2MAAAAARAAAAQABAAAAAQAAAQ0AAAArAAAAKGlpbmYAAAAAAAEAAAAa"
    "aW5mZQIAAAAAAQAAYXYwMUNvbG9yAAAAAGhpcHJwAAAASWlwY28AAAAUaXNwZQAAAAAAAAAQAAAAEAAAAA5waXhpAA"
    "AAAAEIAAAADGF2MUOBABwAAAAAE2NvbHJuY2x4AAEADQAGgAAAABdpcG1hAAAAAAAAAAEAAQQBAoMEAAAAM21kYXQS"
    "AAoIGAz/2mAhoNQyHRIGqQCD5AB1hWINAHjSBl/FANfxRinLCCgqsbt4"
)
as_root = pytest.mark.skipif(
    hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read and write everything"
)


def noise(height: int, width: int, components: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, components), dtype=np.uint8)


def smooth(height: int, width: int, components: int = 3) -> np.ndarray:
    """Waves that JPEG keeps well, different in each component and at each side."""
    y, x = np.mgrid[:height, :width][..., None]
    c = np.arange(components)
    waves = np.sin(y / 19 + c) + np.cos(x / (11 + 5 * c) + 0.3)
    return (127.5 + 60 * waves).astype(np.uint8)


def to_bytes(pixels: np.ndarray | Image.Image, format: str, **options) -> bytes:
    if isinstance(pixels, np.ndarray):
        pixels = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    stream = io.BytesIO()
    pixels.save(stream, format, **options)
    return stream.getvalue()


def read(data: bytes) -> np.ndarray:
    return load_image(io.BytesIO(data))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(samples: np.ndarray, bits: int, before: bytes = b"", size: tuple[int, int] | None = None):
    """A PNG file by hand: samples (H, W, C) of 8 or 16 bits; its header may tell another size."""
    height, width, components = samples.shape
    width, height = size or (width, height)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[components]
    rows = b"".join(b"\0" + row.astype(f">u{bits // 8}").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before
        + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )  # fmt: skip


def assert_refused(path: Path, *words: str) -> None:
    """Reading `path`, as a file and as a stream, fails with one line that has all `words`."""
    with pytest.raises(ImageError) as file_error:
        load_image(path)
    with pytest.raises(ImageError) as stream_error, open(path, "rb") as stream:
        load_image(stream)
    for error, name in (file_error, str(path)), (stream_error, "stdin"):
        message = str(error.value)
        assert message.startswith(f"{name}: ")
        assert "\n" not in message
        assert all(word in message for word in words), message


# Round trips


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 70), (33, 1), (40, 61)])
@pytest.mark.parametrize("components", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_formats_that_keep_everything(tmp_path, suffix, components, height, width):
    pixels = noise(height, width, components)
    pixels[0, 0, -1] = 7  # alpha that is opaque everywhere would be dropped
    path = tmp_path / f"x{suffix.upper()}"
    save_image(path, pixels)
    expected = pixels
    if suffix == ".webp" and components < 3:  # it has no grey
        expected = pixels[..., [0, 0, 0, 1] if components == 2 else [0, 0, 0]]
    np.testing.assert_array_equal(load_image(path), expected)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("suffix", "components"), [(".bmp", 1), (".bmp", 3), (".ppm", 1), (".ppm", 3), (".pgm", 1)]
)
def test_formats_without_alpha_keep_the_rest(tmp_path, suffix, components):
    pixels = noise(23, 37, components)
    save_image(tmp_path / f"x{suffix}", pixels)
    np.testing.assert_array_equal(load_image(tmp_path / f"x{suffix}"), pixels)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg"])
@pytest.mark.parametrize("components", [1, 3])
def test_jpeg_keeps_the_look(tmp_path, suffix, components):
    pixels = smooth(50, 70, components)
    save_image(tmp_path / f"x{suffix}", pixels)
    back = load_image(tmp_path / f"x{suffix}")
    assert back.shape == pixels.shape
    assert np.abs(back.astype(int) - pixels).mean() < 1


def test_jpeg_keeps_sharp_colours(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, ::2] = 255, 0, 0
    pixels[:, 1::2] = 0, 0, 255
    save_image(tmp_path / "x.jpg", pixels)
    assert np.abs(load_image(tmp_path / "x.jpg").astype(int) - pixels).mean() < 8


def test_a_grey_array_needs_no_third_axis(tmp_path):
    save_image(tmp_path / "x.png", RAMP[..., 0])
    np.testing.assert_array_equal(load_image(tmp_path / "x.png"), RAMP)


def test_an_array_need_not_be_contiguous(tmp_path):
    pixels = noise(9, 12, 4)[::2, ::-3, :3]
    save_image(tmp_path / "x.png", pixels)
    np.testing.assert_array_equal(load_image(tmp_path / "x.png"), pixels)


def test_what_is_read_can_be_changed(tmp_path):
    save_image(tmp_path / "x.png", RAMP)
    pixels = load_image(tmp_path / "x.png")
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and pixels.flags.writeable


def test_streams():
    class Sink(io.RawIOBase):
        """Takes at most 100 bytes at a time, and cannot seek."""

        data = b""

        def writable(self):
            return True

        def write(self, data):
            self.data += bytes(data[:100])
            return min(len(data), 100)

    pixels = noise(40, 30, 3)
    for format, name in (None, "PNG"), ("webp", "WEBP"), (".TIF", "TIFF"), ("bmp", "BMP"):
        sink = Sink()
        save_image(sink, pixels, format=format)
        assert not sink.closed
        assert Image.open(io.BytesIO(sink.data)).format == name
        np.testing.assert_array_equal(read(sink.data), pixels)


def test_the_format_can_differ_from_the_suffix(tmp_path):
    save_image(tmp_path / "x.dat", RAMP, format="webp")
    assert (tmp_path / "x.dat").read_bytes()[8:12] == b"WEBP"
    assert load_image(str(tmp_path / "x.dat")).shape == (16, 16, 3)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM"])
def test_reading_from_a_pipe(tmp_path, format):
    data = to_bytes(smooth(300, 300), format)
    reading, writing = os.pipe()

    def feed() -> None:
        with open(writing, "wb", 0) as pipe:
            for start in range(0, len(data), 5000):
                pipe.write(data[start : start + 5000])

    thread = threading.Thread(target=feed)
    thread.start()
    with open(reading, "rb") as stream:
        pixels = load_image(stream)
        assert not stream.closed
    thread.join()
    np.testing.assert_array_equal(pixels, read(data))

    os.mkfifo(tmp_path / "fifo")
    thread = threading.Thread(target=lambda: (tmp_path / "fifo").write_bytes(data))
    thread.start()
    np.testing.assert_array_equal(load_image(tmp_path / "fifo"), pixels)
    thread.join()


def test_a_stream_is_read_from_where_it_stands():
    stream = io.BytesIO(b"before" + to_bytes(RAMP, "PNG"))
    stream.seek(6)
    np.testing.assert_array_equal(load_image(stream), RAMP)


# Kinds of pixels


@pytest.mark.parametrize("components", [1, 2, 3, 4])
def test_16_bits(components):
    samples = np.random.default_rng(0).integers(0, 2**16, (9, 13, components))
    np.testing.assert_array_equal(read(png(samples, 16)), samples >> 8)
    expanded = RAMP.repeat(components, axis=2)
    np.testing.assert_array_equal(read(png(expanded * np.uint16(257), 16)), expanded)


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff_and_pgm(order):
    samples = RAMP[..., 0].astype(f"{order}u2") * 257
    mode = "I;16" if order == "<" else "I;16B"
    grey = Image.frombytes(mode, (16, 16), samples.tobytes())
    np.testing.assert_array_equal(read(to_bytes(grey, "TIFF")), RAMP)
    data = b"P5 16 16 65535\n" + samples.astype(">u2").tobytes()
    np.testing.assert_array_equal(read(data), RAMP)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "PPM"])
def test_1_bit(format):
    bits = noise(9, 21, 1) > 127
    data = to_bytes(Image.fromarray(bits[..., 0]), format)
    np.testing.assert_array_equal(read(data), bits * np.uint8(255))


@pytest.mark.parametrize("format", ["PNG", "GIF", "TIFF", "BMP"])
def test_palettes_become_colour(format):
    indices = noise(12, 15, 1) % 16
    colours = noise(16, 3, 1)[..., 0]
    picture = Image.fromarray(indices[..., 0]).convert("P")
    picture.putpalette(colours.tobytes())
    np.testing.assert_array_equal(read(to_bytes(picture, format)), colours[indices[..., 0]])


def test_palettes_with_transparency():
    indices = noise(12, 15, 1)[..., 0] % 4
    colours = noise(4, 3, 1)[..., 0]
    picture = Image.fromarray(indices).convert("P")
    picture.putpalette(colours.tobytes())
    alpha = np.array([0, 80, 200, 255], np.uint8)
    expected = np.concatenate([colours, alpha[:, None]], axis=1)[indices]
    np.testing.assert_array_equal(
        read(to_bytes(picture, "PNG", transparency=alpha.tobytes())), expected
    )
    expected[..., 3] = np.where(indices == 2, 0, 255)
    np.testing.assert_array_equal(read(to_bytes(picture, "GIF", transparency=2)), expected)


@pytest.mark.parametrize("components", [1, 3])
def test_one_transparent_colour(components):
    pixels = noise(10, 10, components)
    chosen = tuple(pixels[3, 4].tolist())
    options = {"transparency": chosen if components == 3 else chosen[0]}
    back = read(to_bytes(pixels, "PNG", **options))
    np.testing.assert_array_equal(back[..., :-1], pixels)
    np.testing.assert_array_equal(back[..., -1], np.where((pixels == chosen).all(-1), 0, 255))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("components", [2, 4])
def test_opaque_alpha_is_dropped(format, components):
    pixels = smooth(20, 20, components)
    pixels[..., -1] = 255
    back = read(to_bytes(pixels, format, **({"lossless": True} if format == "WEBP" else {})))
    plain = pixels[..., :-1] if format != "WEBP" else pixels[..., [0, components // 4, -2]]
    np.testing.assert_array_equal(back, np.broadcast_to(plain, back.shape))
    assert back.shape[2] == (3 if format == "WEBP" else components - 1)


def test_cmyk():
    plates = np.zeros((16, 16, 4), np.uint8)
    plates[:8, :, 0] = 255  # cyan
    plates[8:, :, 3] = 255  # black
    picture = Image.frombytes("CMYK", (16, 16), plates.tobytes())
    for data in to_bytes(picture, "JPEG", quality=95), to_bytes(picture, "TIFF"):
        back = read(data).astype(int)
        assert back.shape == (16, 16, 3)
        assert np.abs(back[:8] - (0, 255, 255)).max() < 6 and back[8:].max() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_pictures_stand_upright(orientation, format):
    upright = smooth(40, 64)
    stored = {  # what has to be done to see it upright, undone
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(format, {})
    back = read(to_bytes(np.ascontiguousarray(stored), format, exif=exif, **options))
    assert back.shape == upright.shape
    assert np.abs(back.astype(int) - upright).mean() < (1.5 if format == "JPEG" else 1e-9)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"\xff" * 60])
def test_damaged_exif_is_no_damaged_picture(exif):
    np.testing.assert_array_equal(read(to_bytes(RAMP, "PNG", exif=exif)), RAMP)


def test_the_first_picture_of_a_phone():
    first, second = Image.fromarray(smooth(40, 50)), Image.fromarray(noise(10, 10, 3))
    data = to_bytes(first, "MPO", save_all=True, append_images=[second], quality=95)
    assert np.abs(read(data).astype(int) - smooth(40, 50)).mean() < 1.5


def test_large_pictures_are_copied_in_strips():
    pixels = smooth(1100, 2000)
    data = to_bytes(pixels, "PNG", compress_level=1)
    tracemalloc.start()
    try:
        back = read(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(back, pixels)
    assert peak < pixels.nbytes + 12e6  # and Pillow's own 4 bytes per pixel, not traced


# What is refused


def test_what_is_no_image(tmp_path):
    for name, data, words in (
        ("empty.png", b"", "it is empty"),
        ("text.png", b"once upon a time there was a file", "not an image that can be read"),
        ("wave.jpg", b"RIFF\0\1\0\0WAVEfmt " + bytes(99), "not an image that can be read"),
        ("short.png", b"\x89PNG", "not an image that can be read"),
        ("header.png", b"\x89PNG\r\n\x1a\n", "damaged"),
        ("head.jpg", b"\xff\xd8\xff" + bytes(99), "damaged"),
    ):
        (tmp_path / name).write_bytes(data)
        assert_refused(tmp_path / name, words)


def test_missing_files_and_folders(tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ImageError, match=r"gone\.png: No such file or directory$"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(ImageError, match=r"folder\.png: Is a directory$"):
        load_image(tmp_path / "folder.png")


@as_root
def test_unreadable_file(tmp_path):
    save_image(tmp_path / "x.png", RAMP)
    (tmp_path / "x.png").chmod(0)
    with pytest.raises(ImageError, match=r"x\.png: Permission denied$"):
        load_image(tmp_path / "x.png")


def test_errors_name_the_stream():
    with pytest.raises(ImageError, match="^photo from the pipe: not an image"):
        load_image(io.BytesIO(b"no"), name="photo from the pipe")


ENCODINGS = {
    "png": ("PNG", {}),
    "interlaced": ("PNG", {}),
    "jpeg": ("JPEG", {"quality": 90}),
    "progressive": ("JPEG", {"quality": 90, "progressive": True}),
    "webp": ("WEBP", {"quality": 90}),
    "lossless": ("WEBP", {"lossless": True}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "deflate": ("TIFF", {"compression": "tiff_deflate"}),
    "ppm": ("PPM", {}),
    "gif": ("GIF", {}),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_truncation_is_refused_and_never_filled_in(tmp_path, encoding):
    format, options = ENCODINGS[encoding]
    data = to_bytes(smooth(90, 120), format, **options)
    whole = read(data)
    path = tmp_path / "x"
    kept = 0
    for size in sorted(
        {*range(1, len(data), max(1, len(data) // 60)), *range(len(data) - 12, len(data))}
    ):
        path.write_bytes(data[:size])
        for source in path, io.BytesIO(data[:size]):
            try:
                pixels = load_image(source)
            except ImageError as error:
                assert "\n" not in str(error)
            else:  # only what ends the file is missing
                np.testing.assert_array_equal(pixels, whole)
                kept = max(kept, len(data) - size)
    assert kept <= 12, "much is missing, and yet the pixels are there"


def test_a_tiff_with_too_few_strips_is_not_filled_in(tmp_path):
    data = bytearray(to_bytes(RAMP, "TIFF"))
    place = data.index(struct.pack("<HH", 257, 4))  # the height
    struct.pack_into("<I", data, place + 8, 40)
    (tmp_path / "x.tif").write_bytes(data)
    assert_refused(tmp_path / "x.tif", "cut short: it has only 16 x 16 pixels")


def test_12_bit_tiff_is_refused(tmp_path):
    data = bytearray(to_bytes(Image.new("I;16", (16, 16)), "TIFF"))
    place = data.index(struct.pack("<HHI", 258, 3, 1))  # the bits per sample
    struct.pack_into("<H", data, place + 8, 12)
    (tmp_path / "x.tif").write_bytes(data)
    assert_refused(tmp_path / "x.tif", "12-bit")


@pytest.mark.parametrize(
    "tag, value, reason",
    [(262, 0, "16 bits of which 0 is white"), (339, 2, "signed pixels")],
)
def test_16_bit_tiffs_that_pillow_takes_for_others_are_refused(tmp_path, tag, value, reason):
    image = Image.new("I;16", (4, 4), 1000)
    image.save(tmp_path / "x.tif", tiffinfo={339: 1})
    data = bytearray((tmp_path / "x.tif").read_bytes())
    struct.pack_into("<H", data, data.index(struct.pack("<HHI", tag, 3, 1)) + 8, value)
    (tmp_path / "x.tif").write_bytes(data)
    assert_refused(tmp_path / "x.tif", reason)


def test_every_damaged_byte_of_a_png_is_noticed():
    data = to_bytes(noise(6, 7, 3), "PNG")
    for place in range(8, len(data) - 12):  # behind it is only the empty chunk that ends the file
        changed = bytearray(data)
        changed[place] ^= 4
        with pytest.raises(ImageError):
            read(bytes(changed))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_and_pages_are_refused(tmp_path, format):
    frames = [Image.fromarray(noise(20, 20, 3, seed)) for seed in range(3)]
    data = to_bytes(frames[0], format, save_all=True, append_images=frames[1:])
    (tmp_path / "x").write_bytes(data)
    assert_refused(tmp_path / "x", "several frames or pages")


@pytest.mark.parametrize("side", [60_000, 12_000])
def test_bombs_are_refused_before_anything_is_allocated(tmp_path, side):
    bombs = {
        "x.png": png(RAMP, 8, size=(side, side)),
        "x.ppm": f"P6 {side} {side} 255\n".encode() + bytes(99),
        "x.bmp": bytearray(to_bytes(RAMP, "BMP")),
        "x.gif": bytearray(to_bytes(RAMP, "GIF")),
        "x.tif": bytearray(to_bytes(RAMP, "TIFF")),
        "x.jpg": bytearray(to_bytes(RAMP, "JPEG")),
    }
    struct.pack_into("<II", bombs["x.bmp"], 18, side, side)
    struct.pack_into("<HH", bombs["x.gif"], 6, side, side)
    frame = bombs["x.jpg"].index(b"\xff\xc0")
    struct.pack_into(">HH", bombs["x.jpg"], frame + 5, side, side)
    for tag in 256, 257:
        place = bombs["x.tif"].index(struct.pack("<HH", tag, 4))
        struct.pack_into("<I", bombs["x.tif"], place + 8, side)
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
        tracemalloc.start()
        try:
            assert_refused(tmp_path / name, str(MAX_PIXELS), str(side))
            assert tracemalloc.get_traced_memory()[1] < 3e6
        finally:
            tracemalloc.stop()


def test_as_many_pixels_as_allowed_are_no_bomb(monkeypatch):
    data = to_bytes(noise(16, 16, 3), "PNG")
    monkeypatch.setattr(image, "MAX_PIXELS", 256)
    assert read(data).shape == (16, 16, 3)
    monkeypatch.setattr(image, "MAX_PIXELS", 255)
    with pytest.raises(ImageError, match="16 x 16 pixels are not 1 to 255"):
        read(data)


def test_pixels_without_a_known_range_are_refused(tmp_path):
    for name, picture in (
        ("float.tif", Image.new("F", (8, 8))),
        ("long.tif", Image.new("I", (8, 8))),
    ):
        picture.save(tmp_path / name)
        assert_refused(tmp_path / name, "no known range", "convert it")
    for components, colour in (1, b"\0\7"), (3, b"\0\7\0\7\0\7"):
        samples = np.full((4, 4, components), 7)
        (tmp_path / "x.png").write_bytes(png(samples, 16, before=chunk(b"tRNS", colour)))
        assert_refused(tmp_path / "x.png", "one transparent colour")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_damage_is_one_line_or_a_picture(data):
    format, options = data.draw(st.sampled_from(sorted(ENCODINGS.items())))[1]
    changed = bytearray(to_bytes(smooth(20, 30), format, **options))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(changed)))
        changed[start : start + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    try:
        pixels = read(bytes(changed))
    except ImageError as error:
        assert "\n" not in str(error) and str(error).startswith("stdin: ")
    else:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and 1 <= pixels.shape[2] <= 4


def test_nothing_reaches_stderr(tmp_path):
    """Neither Pillow's warnings and log, nor those of the libraries below it."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6"
    picture = Image.fromarray(RAMP[..., 0]).convert("P")
    lzw = bytearray(to_bytes(smooth(60, 60), "TIFF", compression="tiff_lzw"))
    lzw[100:140] = bytes(40)
    entries = bytearray(to_bytes(smooth(16, 16), "TIFF"))
    place = entries.index(struct.pack("<HHI", 277, 3, 1))
    struct.pack_into("<H", entries, place + 8, 999)  # samples per pixel
    for name, data in {
        "exif.jpg": to_bytes(smooth(16, 16), "JPEG", exif=exif),
        "large.png": png(RAMP, 8, size=(10_000, 9_000)),
        "palette.png": to_bytes(picture, "PNG", transparency=bytes(256)),
        "apng.png": png(RAMP, 8, before=chunk(b"acTL", bytes(3))),
        "lzw.tif": bytes(lzw),
        "cut.tif": bytes(lzw[:-20]),
        "samples.tif": bytes(entries),
        "cut.jpg": to_bytes(smooth(60, 60), "JPEG")[:-200],
        "cut.webp": to_bytes(smooth(60, 60), "WEBP")[:-200],
    }.items():
        (tmp_path / name).write_bytes(data)
    code = (
        "import sys; from vpcodec.media.image import *\n"
        "for path in sys.argv[1:]:\n"
        "    try: print(load_image(path).shape)\n"
        "    except ImageError as error: print(error)\n"
    )
    paths = sorted(str(path) for path in tmp_path.iterdir())
    result = subprocess.run(
        [sys.executable, "-W", "always", "-c", code, *paths], capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stderr == ""
    assert len(result.stdout.splitlines()) == len(paths)


def test_warnings_of_others_are_left_alone():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read(to_bytes(RAMP, "PNG"))
        warnings.warn("from elsewhere", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["from elsewhere"]


# Writing


@pytest.mark.parametrize(
    ("name", "components", "words"),
    [
        ("gone/x.png", 3, "its folder does not exist"),
        ("folder.png", 3, "it is a folder"),
        ("x.docx", 3, "'.docx' stands for no known format; choose from .png .jpg"),
        ("x", 3, "'' stands for no known format"),
        ("x.gif", 3, "'.gif'"),
        ("x.jpg", 4, "has no alpha; choose .png or .webp"),
        ("x.jpeg", 2, "has no alpha"),
        ("x.bmp", 4, "has no alpha"),
        ("x.ppm", 2, "has no alpha"),
        ("x.pgm", 3, "has no colour"),
    ],
)
def test_outputs_that_cannot_be(tmp_path, name, components, words):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ImageError) as error:
        save_image(tmp_path / name, noise(5, 5, components))
    assert str(error.value).startswith(f"{tmp_path / name}: ") and words in str(error.value)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["folder.png"]


def test_sides_that_a_format_cannot_hold(tmp_path):
    for name, side in ("x.webp", 16_384), ("x.jpg", 65_536):
        with pytest.raises(ImageError, match=f"{name}: cannot be written as"):
            save_image(tmp_path / name, np.zeros((1, side, 1), np.uint8))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4, 3)), np.zeros((4, 4, 3), np.int64), np.zeros(4, np.uint8),
        np.zeros((4, 4, 5), np.uint8), np.zeros((4, 4, 0), np.uint8), np.zeros((0, 4), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
    ],
)  # fmt: skip
def test_arrays_that_are_no_picture(tmp_path, pixels):
    with pytest.raises(ValueError, match=r"pixels (are|of)"):
        save_image(tmp_path / "x.png", pixels)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.tif", "x.bmp", "x.ppm"])
def test_full_disk(tmp_path, name):
    resource = pytest.importorskip("resource")
    (tmp_path / name).write_bytes(b"precious")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ImageError) as error:
            save_image(tmp_path / name, noise(100, 100, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value).startswith(f"{tmp_path / name}: ")
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == b"precious"


def test_broken_pipe_stays_a_broken_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb", 0) as stream, pytest.raises(BrokenPipeError):
        save_image(stream, RAMP)


def test_an_error_of_reading_keeps_its_cause():
    class Broken(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(ImageError, match="^stdin: Input/output error$"):
        load_image(Broken())


# Folders and formats


def test_formats_are_told_by_their_first_bytes():
    for format, options in ENCODINGS.values():
        assert is_image(to_bytes(smooth(20, 20), format, **options)[:16])
    for format in "BMP", "TIFF", "PNG", "GIF":
        assert is_image(to_bytes(Image.new("1", (20, 20)), format)[:16])
    big = io.BytesIO()
    Image.new("L", (8, 8)).save(big, "TIFF", big_tiff=True)
    assert is_image(big.getvalue()[:16]) and load_image(io.BytesIO(big.getvalue())).size == 64
    for head in (
        b"", b"\x89PNG", b"RIFF\0\0\0\0WAVEfmt ", b"OggS" + bytes(12), b"fLaC" + bytes(12),
        b"BM once upon a t", b"P7 is not for us", b"Please read this", b"II once upon a t",
        b"\x89TOK\r\n\x1a\n" + bytes(8), b"ID3\4" + bytes(12), b"\xff\xfb\x90\0" + bytes(12),
        bytes(16),
    ):  # fmt: skip
        assert not is_image(head), head


def test_find_images(tmp_path):
    for name in ["b.png", "a.JPG", "sub/c.webp", "sub/deep/d.tiff", "notes.txt", ".hidden.png",
                 ".git/e.png", "sub/.f.png", "png", "g.wav"]:  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    names = [path.as_posix() for path in find_images(tmp_path)]
    assert names == ["a.JPG", "b.png", "sub/c.webp", "sub/deep/d.tiff"]
    assert find_images(str(tmp_path), recursive=False) == [Path("a.JPG"), Path("b.png")]


@pytest.mark.parametrize("name", ["gone", "file"])
def test_find_images_without_a_folder(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match=name):
        find_images(tmp_path / name)


def test_every_suffix_can_be_read_and_all_but_gif_and_avif_written(tmp_path):
    for suffix in IMAGE_SUFFIXES - {".gif", ".avif"}:
        save_image(tmp_path / f"x{suffix}", RAMP)
    (tmp_path / "x.gif").write_bytes(to_bytes(RAMP, "GIF"))
    (tmp_path / "x.avif").write_bytes(AVIF)
    found = find_images(tmp_path)
    assert {path.suffix for path in found} == IMAGE_SUFFIXES
    for path in found:
        assert load_image(tmp_path / path).shape[:2] == (16, 16)


def test_importing_does_not_import_pillow():
    code = "import sys, vpcodec.media.image; assert 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_real_pictures(shared_data):
    paths = sorted((shared_data / "images_dev").iterdir())[:12]
    for path in paths:
        pixels = load_image(path)
        with Image.open(path) as picture:
            assert sorted(pixels.shape[:2]) == sorted(picture.size)
        assert pixels.std() > 1


# Damage that does not matter, and bombs


def spoil(data: bytes, name: bytes) -> bytes:
    """A PNG with a wrong checksum in a chunk."""
    at = data.index(name)
    end = at + 4 + int.from_bytes(data[at - 4 : at], "big")
    return data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :]


@pytest.mark.parametrize("name", [b"tEXt", b"tIME", b"iCCP", b"zTXt", b"pHYs"])
def test_png_with_a_wrong_checksum_in_what_is_not_seen(name):
    data = png(RAMP, 8, before=chunk(name, b"Comment\0hello") + chunk(b"tEXt", b"Title\0ok"))
    np.testing.assert_array_equal(read(spoil(data, name)), RAMP)


@pytest.mark.parametrize("name", [b"IHDR", b"IDAT", b"IEND", b"tRNS"])
def test_png_with_a_wrong_checksum_in_what_is_seen(tmp_path, name):
    data = png(RAMP, 8, before=chunk(b"tRNS", b"\0\1"))
    (tmp_path / "x.png").write_bytes(spoil(data, name))
    assert_refused(tmp_path / "x.png", "damaged", "checksum", name.decode())


def test_avif():
    assert is_image(AVIF[:16])
    assert np.abs(read(AVIF)[..., :1].astype(int) - RAMP).max() < 20


def test_avif_without_support_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    (tmp_path / "x.avif").write_bytes(AVIF)
    assert_refused(tmp_path / "x.avif", "AVIF needs Pillow 11.3")


def scans(width: int, height: int, n: int) -> bytes:
    """A progressive JPEG whose last scan comes n times."""
    data = to_bytes(smooth(height, width), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * n + data[-2:]


def test_jpeg_of_many_scans(tmp_path):
    assert read(scans(64, 64, 1)).shape == read(scans(64, 64, 100)).shape == (64, 64, 3)
    (tmp_path / "x.jpg").write_bytes(scans(64, 64, 1500))
    assert_refused(tmp_path / "x.jpg", "scans, more than 200")


def test_large_jpegs_have_fewer_scans(tmp_path, monkeypatch):
    monkeypatch.setattr("vpcodec.media.image.MAX_SCANNED", 64 * 64 * 50)
    assert read(scans(64, 64, 30)).shape == (64, 64, 3)
    (tmp_path / "x.jpg").write_bytes(scans(64, 64, 60))
    assert_refused(tmp_path / "x.jpg", "or than is usual for its size")


def test_what_only_looks_like_scans_is_none():
    data = to_bytes(RAMP, "JPEG")
    thumbnail = b"\xff\xe1" + struct.pack(">H", 60_002) + b"\xff\xda" * 30_000
    film = b"\xff\xda" * 2**20
    assert read(data[:2] + thumbnail + data[2:] + film).shape == read(data).shape


def test_scans_after_junk_count(tmp_path):  # as a decoder finds them
    data = scans(64, 64, 300).replace(b"\xff\xda", b"\0\0\xff\xff\xda")
    (tmp_path / "x.jpg").write_bytes(data)
    assert_refused(tmp_path / "x.jpg", "scans, more than 200")


@pytest.mark.parametrize("spoilt", [False, True])
def test_png_of_many_chunks(tmp_path, monkeypatch, spoilt):
    monkeypatch.setattr("vpcodec.media.image.MAX_PNG_CHUNKS", 1000)
    text = chunk(b"tEXt", b"a\0b")
    text = spoil(text, b"tEXt") if spoilt else text
    assert read(png(RAMP, 8, before=text * 900)).shape == read(png(RAMP, 8)).shape
    (tmp_path / "x.png").write_bytes(png(RAMP, 8, before=text * 1000))
    assert_refused(tmp_path / "x.png", "a PNG of more than 1,000 chunks")


def test_tiff_of_endless_pages(tmp_path):
    """A million pages, which are counted in quadratic time, are not counted."""
    data = bytearray(to_bytes(RAMP, "TIFF"))
    first = int.from_bytes(data[4:8], "little")
    n_tags = int.from_bytes(data[first : first + 2], "little")
    link = first + 2 + 12 * n_tags
    data[link : link + 4] = len(data).to_bytes(4, "little")
    start = len(data)
    pages = b"".join(struct.pack("<HI", 0, start + 6 * (i + 1)) for i in range(1_000_000))
    (tmp_path / "x.tif").write_bytes(data + pages)
    assert_refused(tmp_path / "x.tif", "several frames or pages")


def test_a_pipe_is_kept_up_to_a_limit(monkeypatch):
    monkeypatch.setattr("vpcodec.media.image.MAX_SPOOL", 2**20)
    endless = io.BytesIO(to_bytes(RAMP, "PNG") + bytes(2**21))
    with pytest.raises(ImageError, match="stdin: more than 1 MiB"):
        load_image(endless)
