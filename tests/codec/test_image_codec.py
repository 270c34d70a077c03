"""Images to tokens and back: sizes, components, tiles, recovery, backends."""

from __future__ import annotations

import importlib.util
import json
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import blocks, flipped
from paths import ROOT

from vpcodec import Codec
from vpcodec.codec import ImageCodec, ImageStats
from vpcodec.media.image import ImageError, load_image, save_image
from vpcodec.tokenfile import (
    ImageHeader,
    TokenFileError,
    TokenReader,
    TokenWriter,
    read_tokens,
    write_tokens,
)

Make = Callable[..., np.ndarray]
SIZES = [(1, 1), (7, 5), (8, 8), (9, 64), (257, 129)]  # height, width
TIES = 2e-3  # share of tokens that float rounding at a cell's edge may change


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of several blocks."""
    monkeypatch.setattr("vpcodec.codec.image.BLOCK_TOKENS", 512)


@pytest.fixture(scope="module")
def codec(debug_image_model: Path) -> ImageCodec:
    return ImageCodec.from_pretrained(debug_image_model)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of two windows, 64 pixels."""
    monkeypatch.setattr("vpcodec.codec.image.TILE_SIDE", 64)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether pixels are the same but for rounding."""
    return a.shape == b.shape and np.abs(a.astype(int) - b).max() <= 1


# ---------------------------------------------------------------------------- sizes and components


@pytest.mark.parametrize("components", [1, 2, 3, 4])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(codec: ImageCodec, picture: Make, size: tuple[int, int], components: int) -> None:
    height, width = size
    tokens = codec.encode(picture(height, width, components))
    assert tokens.dtype == np.int64
    assert tokens.shape == (2 - components % 2, -(-height // 8), -(-width // 8))
    assert 0 <= tokens.min() and tokens.max() < codec.codebook_size
    pixels = codec.decode(tokens, size, components)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (height, width, components)


def test_size_and_components_left_open(codec: ImageCodec, picture: Make) -> None:
    tokens = codec.encode(picture(70, 41, 4))
    whole = codec.decode(tokens)
    assert whole.shape == (72, 48, 4)
    assert np.array_equal(codec.decode(tokens, (70, 41)), whole[:70, :41])
    colour = codec.decode(tokens[0])
    assert np.array_equal(colour, whole[..., :3])
    assert np.array_equal(codec.decode(tokens[:1]), colour)


def test_facts_agree(codec: ImageCodec) -> None:
    assert codec.bits_per_pixel == pytest.approx(np.log2(codec.codebook_size) / 64)
    assert (codec.modality, codec.hop_length, len(codec.fingerprint)) == ("image", 8, 16)


def test_grey_is_coded_as_equal_channels(codec: ImageCodec, picture: Make) -> None:
    grey = picture(40, 50, 1)
    tokens = codec.encode(grey)
    assert np.array_equal(tokens, codec.encode(grey[..., 0]))
    assert np.array_equal(tokens, codec.encode(np.repeat(grey, 3, 2)))
    mean = codec.decode(tokens, (40, 50), 3).mean(2, keepdims=True)
    assert np.abs(codec.decode(tokens, (40, 50), 1) - mean).max() <= 1


@pytest.mark.parametrize("components", [2, 4])
def test_alpha_is_coded_as_grey(codec: ImageCodec, picture: Make, components: int) -> None:
    pixels = picture(40, 50, components)
    tokens = codec.encode(pixels)
    assert np.array_equal(tokens[:1], codec.encode(pixels[..., :-1]))
    assert np.array_equal(tokens[1:], codec.encode(pixels[..., -1]))
    decoded = codec.decode(tokens, (40, 50), components)
    assert np.array_equal(decoded[..., :-1], codec.decode(tokens[0], (40, 50), components - 1))
    assert np.array_equal(decoded[..., -1:], codec.decode(tokens[1], (40, 50), 1))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_pixels(codec: ImageCodec, picture: Make, dtype: type) -> None:
    pixels = picture(64, 96)
    tokens = codec.encode((pixels / 255).astype(dtype))
    most = TIES if dtype != np.float16 else 0.1
    assert np.mean(tokens != codec.encode(pixels)) <= most


def test_edges_go_on_as_they_are(codec: ImageCodec, picture: Make) -> None:
    """What is added to fill the last windows has the values of the edge."""
    pixels = picture(43, 70)
    longer = np.pad(pixels, [(0, 64 - 43), (0, 96 - 70), (0, 0)], mode="edge")
    assert np.array_equal(codec.encode(pixels), codec.encode(longer)[:, :6, :9])


# ------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("size", [(129, 129), (400, 331), (33, 500), (257, 40)], ids=str)
@pytest.mark.parametrize("components", [2, 3])
def test_tiles_are_as_the_whole(
    codec: ImageCodec,
    picture: Make,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    components: int,
) -> None:
    pixels = picture(*size, components)
    tokens = codec.encode(pixels)
    decoded = codec.decode(tokens, size, components)
    assert len(np.unique(tokens)) > 10  # of 125: else this test is worth nothing
    sides = []
    backend = codec.backend

    class Watched:
        def encode(self, images: np.ndarray, state: None) -> tuple:
            sides.extend(images.shape[2:])
            return backend.encode(images, state)

        def decode(self, tokens: np.ndarray, state: None) -> tuple:
            sides.extend(8 * n for n in tokens.shape[1:])
            return backend.decode(tokens, state)

    monkeypatch.setattr("vpcodec.codec.image.TILE_SIDE", 64)
    monkeypatch.setattr(codec, "backend", Watched())
    assert np.mean(codec.encode(pixels) != tokens) <= TIES
    assert close(codec.decode(tokens, size, components), decoded)
    assert max(sides) <= 64 + 2 * 32  # with the surroundings
    assert all(side % codec.config.block_size == 0 for side in sides)


def test_progress_by_tiles(codec: ImageCodec, picture: Make, small_tiles: None) -> None:
    calls: list[tuple[str, int, int]] = []
    tokens = codec.encode(picture(200, 150, 4), progress=lambda *call: calls.append(call))
    assert len(calls) == 4 * 3 and calls[-1] == ("encoding", 200 * 150, 200 * 150)
    assert calls == sorted(set(calls))
    del calls[:]
    codec.decode(tokens, (200, 150), progress=lambda *call: calls.append(call))
    assert calls[-1] == ("decoding", 200 * 150, 200 * 150)


# ---------------------------------------------------------------------------------------- backends


@pytest.mark.parametrize("components", [3, 4])
def test_backends_agree(
    codec: ImageCodec, debug_image_model: Path, picture: Make, components: int
) -> None:
    other = Codec.from_pretrained(debug_image_model, backend="torch", device="cpu")
    pixels = picture(150, 203, components)
    tokens = codec.encode(pixels)
    assert np.mean(tokens != other.encode(pixels)) <= TIES
    assert close(codec.decode(tokens, (150, 203)), other.decode(tokens, (150, 203)))


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("components", [1, 2, 3, 4])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_files(
    codec: ImageCodec, picture: Make, tmp_path: Path, size: tuple[int, int], components: int
) -> None:
    height, width = size
    pixels = picture(height, width, components)
    save_image(tmp_path / "in.png", pixels)
    stats = codec.encode_file(tmp_path / "in.png", tmp_path / "in.tok")
    tokens, header = read_tokens(tmp_path / "in.tok")
    assert isinstance(header, ImageHeader)
    assert (header.height, header.width, header.components) == (height, width, components)
    n_bytes = (tmp_path / "in.tok").stat().st_size
    assert stats == ImageStats(width, height, components, tokens.shape[1], n_bytes)
    assert stats.bits_per_pixel == pytest.approx(8 * n_bytes / (width * height))
    assert codec.decode_file(tmp_path / "in.tok", tmp_path / "out.png") == stats
    out = load_image(tmp_path / "out.png")
    grid = tokens.reshape(-1, header.rows, header.columns)
    expected = codec.decode(grid, size, components)
    if components % 2 == 0 and (expected[..., -1] == 255).all():  # as nothing was transparent
        expected = expected[..., :-1]
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_turned_photos_come_back_upright(
    codec: ImageCodec, picture: Make, tmp_path: Path, orientation: int
) -> None:
    from PIL import Image

    image = Image.fromarray(picture(40, 70))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "in.jpg", exif=exif)
    stats = codec.encode_file(tmp_path / "in.jpg", tmp_path / "in.tok")
    assert (stats.height, stats.width) == ((40, 70) if orientation == 3 else (70, 40))
    codec.decode_file(tmp_path / "in.tok", tmp_path / "out.png")
    upright = load_image(tmp_path / "in.jpg")
    assert load_image(tmp_path / "out.png").shape == upright.shape
    assert np.array_equal(codec.encode(upright).reshape(1, -1), read_tokens(tmp_path / "in.tok")[0])


def test_format_without_a_suffix(codec: ImageCodec, picture: Make, tmp_path: Path) -> None:
    save_image(tmp_path / "in.png", picture(30, 40))
    codec.encode_file(tmp_path / "in.png", tmp_path / "in.tok")
    codec.decode_file(tmp_path / "in.tok", tmp_path / "out.bin", format="bmp")
    assert (tmp_path / "out.bin").read_bytes().startswith(b"BM")


def test_header_is_that_of_files(codec: ImageCodec, picture: Make, tmp_path: Path) -> None:
    save_image(tmp_path / "in.png", picture(30, 43, 2))
    codec.encode_file(tmp_path / "in.png", tmp_path / "in.tok")
    header = codec.header(30, 43, 2)  # a file of one block holds the first bytes of the fingerprint
    short = replace(header, fingerprint=header.fingerprint[:8], block_frames=header.n_frames)
    assert read_tokens(tmp_path / "in.tok")[1] == short


class Counted:
    """A backend that counts what it decodes."""

    def __init__(self, codec: ImageCodec) -> None:
        self._decode, self.calls = codec.backend.decode, 0

    def decode(self, tokens: np.ndarray, state: None) -> tuple:
        self.calls += 1
        return self._decode(tokens, state)


@pytest.fixture
def counted(codec: ImageCodec, monkeypatch: pytest.MonkeyPatch) -> Counted:
    backend = Counted(codec)
    monkeypatch.setattr(codec, "backend", backend)
    return backend


@pytest.mark.parametrize(
    ("components", "target", "words"),
    [
        (4, "out.jpg", "out.jpg: the format has no alpha"),
        (3, "out.pgm", "out.pgm: the format has no colour"),
        (3, "out.xyz", "out.xyz: .*no known format"),
        (3, "no/out.png", "no/out.png: its folder does not exist"),
        (3, "folder.png", "folder.png: it is a folder"),
    ],
)
def test_bad_targets_cost_nothing(
    codec: ImageCodec, counted: Counted, tmp_path: Path, components: int, target: str, words: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    write_tokens(
        tmp_path / "a.tok",
        np.zeros((2 - components % 2, 4), np.int64),
        codec.header(16, 16, components),
    )
    with pytest.raises(ImageError, match=words):
        codec.decode_file(tmp_path / "a.tok", tmp_path / target)
    assert counted.calls == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.tok", "folder.png"}


@pytest.mark.parametrize("components", [3, 4])
def test_lost_patches_are_grey_and_opaque(
    codec: ImageCodec, picture: Make, tmp_path: Path, components: int
) -> None:
    """The second of two blocks: rows 30 to 34 of 35 x 17 tokens."""
    tok, size = tmp_path / "a.tok", (275, 131)
    save_image(tmp_path / "a.png", picture(*size, components))
    codec.encode_file(tmp_path / "a.png", tok)
    whole = codec.decode(read_tokens(tok)[0].reshape(-1, 35, 17), size, components)
    span = blocks(tok)
    assert len(span) == 2
    tok.write_bytes(flipped(tok.read_bytes(), span[1][0] + 30))
    stats = codec.decode_file(tok, tmp_path / "b.png", recover=True)
    part = load_image(tmp_path / "b.png")
    if part.shape[2] < components:
        part = np.dstack([part, np.full(size, 255, np.uint8)])
    assert stats.damaged == 1
    lost = np.zeros((35, 17), bool)
    lost[30:] = True
    lost = lost.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]]
    grey = [128, 128, 128, 255][:components]
    assert (part[lost] == grey).all()
    assert not (part[~lost] == grey).all(1).any()
    far = slice(8 * 24)
    assert close(part[far], whole[far])


def test_tiles_without_tokens_cost_nothing(
    codec: ImageCodec, counted: Counted, small_tiles: None, tmp_path: Path
) -> None:
    """Of seven tiles, five are lost wholly, and one in part."""
    tok, size = tmp_path / "a.tok", (448, 64)
    header = replace(codec.header(*size, 3), block_frames=80)  # ten rows
    write_tokens(tok, np.full((1, header.n_frames), 7), header)
    calls: list[tuple[str, int, int]] = []
    codec.decode_file(tok, tmp_path / "b.png")
    whole, of_whole = load_image(tmp_path / "b.png"), counted.calls
    assert of_whole == 7
    tok.write_bytes(tok.read_bytes()[: blocks(tok)[0][1]])
    codec.decode_file(
        tok, tmp_path / "b.png", recover=True, progress=lambda *call: calls.append(call)
    )
    part = load_image(tmp_path / "b.png")
    assert counted.calls == of_whole + 2
    assert close(part[:80], whole[:80]) and (part[80:] == 128).all()
    assert calls[-1] == ("decoding", 448 * 64, 448 * 64)


def test_lost_beginning(codec: ImageCodec, picture: Make, tmp_path: Path) -> None:
    tok = tmp_path / "a.tok"
    save_image(tmp_path / "a.png", picture(275, 131))
    codec.encode_file(tmp_path / "a.png", tok)
    tok.write_bytes(flipped(tok.read_bytes(), blocks(tok)[0][0] + 30))
    codec.decode_file(tok, tmp_path / "b.png", recover=True)
    part = load_image(tmp_path / "b.png")
    assert (part[: 30 * 8] == 128).all()
    assert part[31 * 8 :].std() > 0


def test_huge_claims_are_refused_before_anything_is_made(codec: ImageCodec, tmp_path: Path) -> None:
    header = ImageHeader(
        model=codec.name,
        fingerprint=codec.fingerprint,
        channels=1,
        hop_length=codec.hop_length,
        codebook_size=codec.codebook_size,
        width=2**16,
        height=2**16,
        components=3,
        block_frames=2**16 - 1,
    )
    with open(tmp_path / "a.tok", "wb") as file:
        TokenWriter(file, header)
    with pytest.raises(TokenFileError, match="65536 x 65536 pixels"):
        codec.decode_file(tmp_path / "a.tok", tmp_path / "a.png", recover=True)
    assert not (tmp_path / "a.png").exists()


def test_tokens_of_another_hop(codec: ImageCodec, picture: Make, tmp_path: Path) -> None:
    header = ImageHeader(
        model="other",
        fingerprint=codec.fingerprint,
        channels=1,
        hop_length=16,
        codebook_size=codec.codebook_size,
        width=64,
        height=64,
        components=3,
    )
    write_tokens(tmp_path / "a.tok", np.zeros((1, 16), np.int64), header)
    with pytest.raises(TokenFileError, match="'other'.*cannot decode"):
        codec.decode_file(tmp_path / "a.tok", tmp_path / "a.png", force=True)


# --------------------------------------------------------------------------------------- bad arrays


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((4, 4, 3), np.int16), "int16"),
        (np.zeros((4, 4, 3), bool), "bool"),
        (np.zeros((4, 4, 5), np.uint8), r"\(4, 4, 5\)"),
        (np.zeros((4, 4, 0), np.uint8), r"\(4, 4, 0\)"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (np.zeros(4, np.uint8), r"\(4,\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"\(1, 4, 4, 3\)"),
        (np.full((4, 4), 255.0), "255"),
        (np.full((4, 4), -0.5), "-0.5"),
        (np.full((4, 4), np.nan), "nan"),
        (np.full((4, 4), np.inf), "inf"),
        (np.array([["a"]]), "<U1"),
    ],
)
def test_bad_pixels(codec: ImageCodec, pixels: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        codec.encode(pixels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "size", "components", "words"),
    [
        ((4,), None, None, r"\(4,\)"),
        ((1, 1, 4, 4), None, None, r"\(1, 1, 4, 4\)"),
        ((3, 4, 4), None, None, r"\(3, 4, 4\)"),
        ((0, 4, 4), None, None, r"\(0, 4, 4\)"),
        ((1, 0, 4), None, None, r"\(1, 0, 4\)"),
        ((4, 4), (33, 32), None, "33 x 32 pixels"),
        ((4, 4), (32, 24), None, "32 x 24 pixels"),
        ((4, 4), (0, 32), None, "0 x 32 pixels"),
        ((4, 4), (-1, 32), None, "-1 x 32 pixels"),
        ((4, 4), (10**12, 32), None, "1000000000000 x 32"),
        ((4, 4), None, 4, "4 components"),
        ((2, 4, 4), None, 3, "3 components"),
        ((4, 4), None, 5, "5 components"),
    ],
)
def test_bad_shapes_of_tokens(
    codec: ImageCodec, shape: tuple, size: tuple | None, components: int | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        codec.decode(np.zeros(shape, np.int64), size, components)


def test_reader_of_damaged_tokens_decides_itself(
    codec: ImageCodec, picture: Make, tmp_path: Path
) -> None:
    tok = tmp_path / "a.tok"
    save_image(tmp_path / "a.png", picture(275, 131))
    codec.encode_file(tmp_path / "a.png", tok)
    tok.write_bytes(flipped(tok.read_bytes(), blocks(tok)[0][0] + 30))
    with open(tok, "rb") as file:
        assert codec.decode_file(TokenReader(file, recover=True), tmp_path / "b.png").damaged == 1


def peak(function: Callable[[], object]) -> int:
    """Most bytes that Python and NumPy hold at once."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_damage_takes_no_memory(codec: ImageCodec, picture: Make, tmp_path: Path) -> None:
    """Half of an image can be recovered with little more memory than the whole takes."""
    tok = tmp_path / "a.tok"
    save_image(tmp_path / "a.png", picture(1000, 1000))
    codec.encode_file(tmp_path / "a.png", tok)
    whole = peak(lambda: codec.decode_file(tok, tmp_path / "b.png"))
    data = bytearray(tok.read_bytes())
    for start, _ in blocks(tok)[::2]:
        data[start + 30] ^= 4
    tok.write_bytes(data)
    assert peak(lambda: codec.decode_file(tok, tmp_path / "b.png", recover=True)) < 1.2 * whole


def test_size_that_only_the_header_claims(codec: ImageCodec, tmp_path: Path) -> None:
    tok = tmp_path / "a.tok"
    with open(tok, "wb") as file:
        TokenWriter(file, codec.header(11_000, 11_000, 3))

    def decode() -> None:
        with pytest.raises(TokenFileError, match="1890625 tokens are lost, of 1890625"):
            codec.decode_file(tok, tmp_path / "b.png", recover=True)

    assert peak(decode) < 2**23
    assert [path.name for path in tmp_path.iterdir()] == ["a.tok"]


# -------------------------------------------------------------------------------------- benchmark


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs benchmarks/images.py."""
    path = ROOT / "benchmarks" / "images.py"
    spec = importlib.util.spec_from_file_location("benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def main(*args: object) -> None:
        monkeypatch.setattr(sys, "argv", ["images.py", *map(str, args)])
        module.main()

    return main


def test_benchmark(
    benchmark: Callable[..., None],
    codec: ImageCodec,
    debug_image_model: Path,
    picture: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The limit counts images that are compared; sizes are those of files."""
    for name, components in (("a", 1), ("b", 3), ("c", 3), ("d", 3)):
        save_image(tmp_path / f"{name}.png", picture(170, 180, components))
    (tmp_path / "e.png").write_text("never read")
    benchmark(debug_image_model, "--images", tmp_path, "--limit", 2, "--json")
    document = json.loads(capsys.readouterr().out)
    n_bytes = codec.encode_file(tmp_path / "b.png", tmp_path / "b.tok").n_bytes
    assert document["images"] == 2
    assert document["rows"][0]["bpp"] == pytest.approx(8 * n_bytes / (170 * 180))
    benchmark(debug_image_model, "--images", tmp_path, "--limit", 1, "--equal", "--json")
    ours, *others = json.loads(capsys.readouterr().out)["rows"]
    assert len(others) == 4
    for row in others:  # one image, so that means are its values
        if row["codec"].endswith("equal PSNR"):
            assert row["psnr"] >= ours["psnr"]


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [("nobody", b"", "unknown model 'nobody'"), (None, b"no picture", "a.png: not an image"),
     ("speech-3k", b"", "speech-3k.*audio")],
)  # fmt: skip
def test_benchmark_of_what_is_not_there(
    benchmark: Callable[..., None],
    debug_image_model: Path,
    picture: Make,
    tmp_path: Path,
    model: str | None,
    data: bytes,
    words: str,
) -> None:
    save_image(tmp_path / "a.png", picture(20, 20))
    if data:
        (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(SystemExit, match=words) as caught:
        benchmark(model or debug_image_model, "--images", tmp_path)
    assert "\n" not in str(caught.value)
