"""The command line with images, and with audio and images together."""

from __future__ import annotations

import io
import os
import re
import shutil
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from helpers import changed_tok, flipped, header_only, refuse, run, tree

from vpcodec import hub, read_tokens
from vpcodec.codec import ImageCodec
from vpcodec.media.image import load_image, save_image
from vpcodec.tokenfile import verify

Make = Callable[..., np.ndarray]

pytestmark = pytest.mark.slow

NAME = "image-debug"  # the model's, in its configuration


@pytest.fixture(autouse=True)
def folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    speech_wav: Path,
    picture: Make,
    debug_image_model: Path,
) -> Path:
    """An own working folder with a.png and a.wav; the debug model is bundled, for images."""
    bundled = hub.bundled_folders() | {NAME: debug_image_model}
    monkeypatch.setattr(hub, "bundled_folders", lambda: bundled)
    monkeypatch.setitem(hub.DEFAULT_MODELS, "image", NAME)
    monkeypatch.chdir(tmp_path)
    shutil.copy(speech_wav, "a.wav")
    save_image("a.png", picture(275, 131))
    return tmp_path


@pytest.fixture
def a_tok(folder: Path, tokens_of_picture: bytes) -> Path:
    """a.tok, the tokens of a.png."""
    Path("a.tok").write_bytes(tokens_of_picture)
    return folder / "a.tok"


@pytest.fixture
def tokens_of_picture(debug_image_model: Path) -> bytes:
    """The token file of a.png, two blocks."""
    out = io.BytesIO()
    ImageCodec.from_pretrained(debug_image_model).encode_file("a.png", out)
    return out.getvalue()


def draw(picture: Make, *paths: str, components: int = 3) -> None:
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_image(path, picture(40, 60, components))


# ------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    ("source", "components", "result"),
    [
        ("b.png", 1, "back.png"),
        ("b.png", 2, "back.webp"),
        ("b.jpg", 3, "back.jpeg"),
        ("b.webp", 4, "back.png"),
        ("b.bmp", 3, "back.tiff"),
        ("b.PGM", 1, "back.PGM"),
    ],
)
def test_size_and_components_come_back(
    picture: Make, source: str, components: int, result: str
) -> None:
    save_image(source, picture(50, 37, components))
    run("encode", source, "b.tok")
    done = run("decode", "b.tok", result)
    header = read_tokens("b.tok")[1]
    assert (header.width, header.height, header.components) == (37, 50, components)
    assert load_image(result).shape[:2] == (50, 37)
    assert "37 x 50 pixels" in done.err and done.out == b""


def test_an_image_is_known_without_its_suffix(a_tok: Path) -> None:
    for path in ("scan", "scan.dat"):
        shutil.copy("a.png", path)
        run("encode", path, "b.tok")
        assert Path("b.tok").read_bytes() == a_tok.read_bytes()
    shutil.copy("a.wav", "sound")
    run("encode", "sound", "b.tok")
    assert verify("b.tok").header.kind == 1


def test_derived_names(a_tok: Path) -> None:
    Path("a.png").rename("b.png")
    run("encode", "b.png")
    assert Path("b.tok").read_bytes() == a_tok.read_bytes()
    run("decode", "a.tok")
    assert load_image("a.png").shape == (275, 131, 3)
    run("decode", "a.tok", "b.tok", "out/", "--suffix", "BMP")
    assert tree("out") == {"a.BMP", "b.BMP"}
    run("decode", "a.tok", "flac/", "--suffix", "flac")  # is for audio
    assert tree("flac") == {"a.png"}


def test_results_are_kept_unless_forced(a_tok: Path) -> None:
    a_tok.write_text("old")
    result = run("encode", "a.png")
    assert a_tok.read_text() == "old" and "a.tok: exists, kept (--force" in result.err
    run("encode", "a.png", "--force")
    assert verify("a.tok").ok
    before = Path("a.png").read_bytes()
    assert "a.png: exists, kept" in run("decode", "a.tok").err
    assert Path("a.png").read_bytes() == before
    run("decode", "a.tok", "a.png")
    assert Path("a.png").read_bytes() != before


def test_jobs_torch_and_model_folder(a_tok: Path, picture: Make, debug_image_model: Path) -> None:
    run("encode", "a.png", "b.tok", "-m", debug_image_model)
    assert Path("b.tok").read_bytes() == a_tok.read_bytes()
    run("encode", "a.png", "c.tok", "--backend", "torch", "--device", "cpu")
    assert np.mean(read_tokens("c.tok")[0] != read_tokens("a.tok")[0]) <= 2e-3
    draw(picture, *(f"in/{i}.png" for i in range(4)))
    run("encode", "in", "out", "-j", 2)
    run("decode", "out", "back", "-j", 2, "--threads", 1)
    assert tree("back") == {f"{i}.png" for i in range(4)}


# ------------------------------------------------------------------------------ folders and globs


@pytest.fixture
def mixed(picture: Make) -> set[str]:
    """A folder `in` of audio and images; what it holds without suffixes."""
    draw(picture, "in/p.png", "in/deep/q.JPG", "in/same.webp", "in/.hidden.png")
    for path in ("in/s.wav", "in/deep/er/t.wav", "in/same.wav"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy("a.wav", path)
    Path("in/notes.txt").write_text("neither")
    return {"p.tok", "s.tok", "deep", "deep/q.tok", "deep/er", "deep/er/t.tok"}


def test_mixed_folder(mixed: set[str]) -> None:
    """Each file goes to the model of its kind and comes back with a suffix of its kind."""
    result = run("encode", "in", "out")
    assert tree("out") == mixed | {"same.webp.tok", "same.wav.tok"}
    assert "s of audio" in result.err and "megapixels" in result.err
    models = {path: read_tokens(f"out/{path}")[1].model for path in ("p.tok", "s.tok")}
    assert models == {"p.tok": NAME, "s.tok": hub.DEFAULT_MODEL}

    Path("out/p.tok").unlink()
    document = run("encode", "in", "out", "--json").json
    assert [row["target"] for row in document["results"]] == ["out/p.tok"]
    assert len(document["kept"]) == 5
    assert len(run("encode", "in", "out", "--json", "--force").json["results"]) == 6

    document = run("decode", "out", "back/", "--suffix", "flac", "--json").json
    names = {"p.png", "s.flac", "deep", "deep/q.png", "deep/er", "deep/er/t.flac"}
    assert tree("back") == names | {"same.webp.png", "same.wav.flac"}
    assert sorted(row["kind"] for row in document["results"]) == ["audio"] * 3 + ["image"] * 3


def test_mixed_folder_with_a_model(mixed: set[str]) -> None:
    run("encode", "in", "images", "-m", NAME)
    assert tree("images") == {"p.tok", "same.webp.tok", "deep", "deep/q.tok"}
    run("encode", "in", "audio", "-m", hub.DEFAULT_MODEL)
    assert tree("audio") == {"s.tok", "same.wav.tok", "deep", "deep/er", "deep/er/t.tok"}


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_pass_over_a_mixed_folder_for_each_model(mixed: set[str], force: list[str]) -> None:
    """Both give what one pass gives, in names and content; back again likewise."""
    for model in (hub.DEFAULT_MODEL, NAME):
        assert run("encode", "in", "out", "-m", model, "--json", *force).json["kept"] == []
    run("encode", "in", "both")
    assert tree("out") == tree("both") == mixed | {"same.webp.tok", "same.wav.tok"}
    for path in Path("both").rglob("*.tok"):
        assert Path("out", path.relative_to("both")).read_bytes() == path.read_bytes()
    Path("out/cut.tok").write_bytes(b"")
    for model, names in (
        (hub.DEFAULT_MODEL, {"s.wav", "same.wav.wav", "deep", "deep/er", "deep/er/t.wav"}),
        (NAME, {"p.png", "same.webp.png", "deep", "deep/q.png"}),
    ):
        err = run("decode", "out", f"back-{model}", "-m", model, check=1).err
        assert tree(f"back-{model}") == names
        assert "out/cut.tok: the file is empty" in err and "1 of 4 failed" in err


def test_audio_options_in_a_mixed_folder(mixed: set[str], picture: Make) -> None:
    """They are for the audio; a file of another kind, named alone, refuses them."""
    run("encode", "in", "out")
    run("decode", "out", "back", "--rate", 8_000, "--subtype", "PCM_24")
    assert (sf.info("back/s.wav").samplerate, sf.info("back/s.wav").subtype) == (8_000, "PCM_24")
    assert load_image("back/p.png").shape == (40, 60, 3)
    run("decode", "out", "raw", "--raw", "s16")
    assert {path.suffix for path in Path("raw").rglob("*.*")} == {".raw", ".png"}
    run("decode", "out/s.tok", "out/p.tok", "two/", "--rate", 8_000)
    assert tree("two") == {"s.wav", "p.png"}
    assert "only audio takes --rate" in refuse("decode", "out/p.tok", "--rate", 8_000)


def test_a_missing_model_stops_its_own_kind_only(
    mixed: set[str], picture: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hub.DEFAULT_MODELS, "image", "nobody")
    _, skipped, *failures, last = run("encode", "in", "out", check=1).err.splitlines()
    assert "skipped: in/" in skipped
    assert tree("out") == {"s.tok", "same.wav.tok", "deep", "deep/er", "deep/er/t.tok"}
    named = [re.match(r"vpcodec: (\S+): unknown model 'nobody'", line)[1] for line in failures]
    assert sorted(named) == ["in/deep/q.JPG", "in/p.png", "in/same.webp"]
    assert "3 of 6 failed" in last
    draw(picture, "pictures/p.png", "pictures/q.png")
    assert "unknown model 'nobody'" in refuse("encode", "pictures", "none/")  # said once


def test_alpha_fails_alone_where_the_format_has_none(a_tok: Path, picture: Make) -> None:
    draw(picture, "b.png", components=4)
    run("encode", "b.png")
    err = run("decode", "a.tok", "b.tok", "out/", "--suffix", "jpg", check=1).err
    assert tree("out") == {"a.jpg"} and "out/b.jpg: the format has no alpha" in err


def test_glob_of_both_kinds(picture: Make) -> None:
    draw(picture, "b.jpg")
    run("encode", *sorted(Path().glob("*.*")), "out/")
    assert tree("out") == {"a.wav.tok", "a.png.tok", "b.tok"}
    run("decode", *sorted(Path("out").iterdir()), "-o", "back")
    assert tree("back") == {"a.wav.wav", "a.png.png", "b.png"}


def test_folder_without_the_kind_of_the_model(picture: Make) -> None:
    draw(picture, "in/b.png")
    assert "no files found" in refuse("encode", "in", "out/", "-m", hub.DEFAULT_MODEL)
    assert "no files found" in refuse("encode", "in", "out/", "--raw", "s16")


# ------------------------------------------------------------------------------------------- pipes


@pytest.mark.parametrize("source", ["a.png", "b.jpg", "b.tiff", "b.webp"])
def test_pipes(picture: Make, source: str) -> None:
    draw(picture, *{source} - {"a.png"})
    data = Path(source).read_bytes()
    run("encode", source, "b.tok")
    piped = run("encode", "-", "-", stdin=data).out
    assert piped == Path("b.tok").read_bytes()
    assert run("encode", "-", stdin=data).out == piped
    with open(source) as file:  # not a pipe: can seek
        assert run("encode", "-", stdin=file).out == piped
    run("decode", "b.tok", "c.png")
    for args, stdin in ((["-", "-"], piped), (["-"], piped), (["b.tok", "-"], b"")):
        result = run("decode", *args, stdin=stdin)
        assert result.out.startswith(b"\x89PNG")
        assert np.array_equal(load_image(io.BytesIO(result.out)), load_image("c.png"))
    run("decode", "-", "d.bmp", stdin=piped)
    assert np.array_equal(load_image("d.bmp"), load_image("c.png"))


def feed(path: str, data: bytes) -> None:
    """Make a named pipe through which `data` comes."""
    os.mkfifo(path)
    threading.Thread(target=lambda: Path(path).write_bytes(data), daemon=True).start()


def test_named_pipes(a_tok: Path) -> None:
    """As process substitution makes them: `vpcodec encode <(cat a.png) out.tok`."""
    tokens = a_tok.read_bytes()
    feed("63", Path("a.png").read_bytes())
    run("encode", "63", "b.tok")
    assert Path("b.tok").read_bytes() == tokens
    feed("62", Path("a.wav").read_bytes())
    run("encode", "62", "c.tok")
    assert read_tokens("c.tok")[1].model == hub.DEFAULT_MODEL
    feed("61", b"neither one nor the other")
    assert "61: not an image" in refuse("encode", "61", "d.tok", "-m", NAME)
    feed("60", tokens)
    run("decode", "60", "b.png")
    assert load_image("b.png").shape == (275, 131, 3)
    feed("59", Path("c.tok").read_bytes())
    run("decode", "59", "out/")
    assert tree("out") == {"59.wav"}


def test_json_goes_to_stderr_beside_a_pipe() -> None:
    result = run("encode", "-", "-", "--json", stdin=Path("a.png").read_bytes())
    assert verify(io.BytesIO(result.out)).ok and '"bits_per_pixel"' in result.err


# --------------------------------------------------------------------------------------- bad input


def bomb() -> bytes:
    """A PNG whose header claims 60000 x 60000 pixels, with hardly any behind it."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")):
        png += struct.pack(">I", len(data)) + name + data
        png += struct.pack(">I", zlib.crc32(name + data))
    return png


HEADER = 40  # bytes before the payload, or a few more

SPOILT: dict[str, Callable[[bytes, bytes], bytes]] = {  # from a token file and a PNG
    "text.png": lambda tok, png: b"this is no image " * 100,
    "text.jpg": lambda tok, png: b"this is no image " * 100,
    "empty.png": lambda tok, png: b"",
    "cut.png": lambda tok, png: png[: len(png) // 2],
    "head.png": lambda tok, png: png[:20],
    "flip.png": lambda tok, png: flipped(png, len(png) // 2),
    "bomb.png": lambda tok, png: bomb(),
    "audio.png": lambda tok, png: b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(100),
    "empty.tok": lambda tok, png: b"",
    "cut.tok": lambda tok, png: tok[:-10],
    "half.tok": lambda tok, png: tok[: len(tok) // 2],
    "flip-head.tok": lambda tok, png: flipped(tok, 30),
    "flip.tok": lambda tok, png: flipped(tok, HEADER + 50),
    "flip-end.tok": lambda tok, png: flipped(tok, len(tok) - 20),
    "more.tok": lambda tok, png: tok + b"more",
    "weights.tok": lambda tok, png: changed_tok(tok, fingerprint=bytes(range(16))),
    "codebook.tok": lambda tok, png: changed_tok(tok, codebook_size=100),
    "nobody.tok": lambda tok, png: changed_tok(tok, model="nobody", fingerprint=bytes(16)),
    "huge.tok": lambda tok, png: header_only(tok, width=2**16, height=2**16, block_frames=2**15),
    "large.tok": lambda tok, png: header_only(tok, width=2**13, height=2**13),
}


@pytest.mark.parametrize("output", [["out"], ["-o", "sub/out"]], ids=["", "in a new folder"])
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("missing.png", "No such file"),
        ("folder.png/x.png", "No such file"),
        ("text.png", "not an image"),
        ("text.jpg", "not an image"),
        ("empty.png", "empty"),
        ("cut.png", "damaged"),
        ("head.png", "damaged"),
        ("flip.png", "damaged"),
        ("bomb.png", "3600000000|60000 x 60000"),
        ("audio.png", "not an image"),
        ("missing.tok", "No such file"),
        ("empty.tok", "the file is empty"),
        ("cut.tok", "block 0: the file ends inside it"),
        ("half.tok", "block [01]: the file ends"),
        ("flip-head.tok", "block 0: the checksum is wrong"),
        ("flip.tok", "block 0: the checksum is wrong"),
        ("flip-end.tok", "block 0: the checksum is wrong"),
        ("more.tok", "data after the end"),
        ("weights.tok", "made by other weights.*00010203.*--model FOLDER"),
        ("codebook.tok", "cannot decode"),
        ("nobody.tok", "model 'nobody'"),
        ("huge.tok", "65536 x 65536 pixels"),
        ("large.tok", "block 0: the file ends"),
        ("a.png", "not a token file"),
    ],
)
def test_bad_input(source: str, words: str, output: list[str], tokens_of_picture: bytes) -> None:
    if source in SPOILT:
        data = SPOILT[source](tokens_of_picture, Path("a.png").read_bytes())
        Path(source).write_bytes(data)
    encode = source.endswith((".png", ".jpg")) and source != "a.png"
    *option, target = output
    command, suffix = ("encode", ".tok") if encode else ("decode", ".png")
    line = refuse(command, source, *option, target + suffix)
    assert source in line and re.search(words, line), line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            "encode a.png out.tok -m speech-3k",
            "a.png: this is an image; .*'speech-3k' is for audio",
        ),
        (f"encode a.wav out.tok -m {NAME}", f"a.wav: this is audio; .*'{NAME}' is for images"),
        ("encode a.png out.tok -m nobody", "unknown model 'nobody'"),
        ("encode a.png out.tok --raw s16", "a.png: this is an image; only audio takes --raw"),
        ("encode a.png out.tok --rate 8000 --channels 2", "only audio takes --rate, --channels"),
        (
            f"encode a.wav out.tok --raw s16 -m {NAME}",
            f"--raw: this is audio; .*'{NAME}' is for im",
        ),
        ("encode a.png out.xyz", "out.xyz: the suffix .*.tok"),
        ("encode a.png a.png", "a.png: input and output are the same"),
        ("encode a.png folder.tok", "folder.tok/a.tok|folder"),
        (
            "encode a.png sub/a.png out/",
            "out/a.png.tok: both a.png and sub/a.png would be written there",
        ),
        ("encode a.png a.wav -", "several files cannot go to one pipe"),
        ("decode a.tok back.wav", "back.wav: this is an image; .*.png"),
        ("decode sound.tok back.png", "back.png: this is audio; .*.wav"),
        ("decode a.tok back.gif", "back.gif: the suffix"),
        ("decode a.tok back.raw --raw s16", "only audio takes --raw"),
        ("decode a.tok back.png --rate 8000", "a.tok: this is an image; only audio takes --rate"),
        ("decode a.tok back.png --subtype PCM_24", "only audio takes --subtype"),
        ("decode a.tok out/ --suffix xyz", "--suffix must be one of .*.png.*.wav"),
        ("decode a.tok out/ --suffix gif", "--suffix must be one of .*.png.*.wav"),
        ("decode a.tok back.png -m speech-3k", "a.tok: this is an image; .*'speech-3k' is for aud"),
        (f"decode sound.tok back.wav -m {NAME}", f"sound.tok: this is audio; .*'{NAME}' is for im"),
        ("decode alpha.tok back.jpg", "back.jpg: .*no alpha.*png"),
        ("decode a.tok back.pgm", "back.pgm: .*no colour.*png"),
    ],
    ids=lambda value: value if value.startswith(("encode", "decode")) else "",
)
def test_bad_requests(a_tok: Path, picture: Make, args: str, words: str) -> None:
    Path("sub").mkdir()
    Path("sub/a.png").symlink_to("../a.png")
    if "sound" in args:
        run("encode", "a.wav", "sound.tok")
    if "alpha" in args:
        save_image("alpha.png", picture(30, 30, 4))
        run("encode", "alpha.png", "alpha.tok")
    if "folder.tok" in args:
        Path("folder.tok").mkdir()
        Path("folder.tok/a.tok").mkdir()
        args += " --force"
    before = Path("a.png").read_bytes()
    line = refuse(*args.split())
    assert re.search(words, line), line
    assert Path("a.png").read_bytes() == before


def test_unknown_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hub.DEFAULT_MODELS, "image", "nobody")
    assert "unknown model 'nobody'" in refuse("encode", "a.png", "out.tok")


@pytest.mark.parametrize(
    ("args", "name"),
    [("encode - out.tok", "cut.png"), ("encode - -", "bomb.png"), ("decode - out.png", "flip.tok"),
     ("decode - -", "half.tok"), ("decode - out.png", "huge.tok")]
)  # fmt: skip
def test_bad_input_through_pipes(tokens_of_picture: bytes, args: str, name: str) -> None:
    data = SPOILT[name](tokens_of_picture, Path("a.png").read_bytes())
    result = run(*args.split(), stdin=data, check=2)
    (line,) = result.err.splitlines()
    assert line.startswith("vpcodec: ") and result.out == b""
    assert tree() == {"a.wav", "a.png"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("encode - out.tok -m speech-3k", "stdin: this is an image; .*'speech-3k' is for audio"),
        ("encode - out.tok --rate 8000", "stdin: this is an image; only audio takes --rate"),
    ],
)
def test_images_through_pipes_for_audio(args: str, words: str) -> None:
    line = refuse(*args.split(), stdin=Path("a.png").read_bytes())
    assert re.search(words, line), line


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nosuch", "nosuch: No such file"),
        ("notes.txt", "notes.txt: not an image"),
        ("empty", "empty: .*empty"),
        ("-", "stdin: not an image"),
    ],
)
def test_what_nobody_knows_is_no_audio_for_an_image_model(source: str, words: str) -> None:
    Path("notes.txt").write_text("neither one nor the other")
    Path("empty").touch()
    line = refuse("encode", source, "out.tok", "-m", NAME, stdin=b"neither one nor the other")
    assert re.search(words, line) and "audio" not in line, line


def test_tokens_of_an_image_from_a_pipe_to_a_wav(tokens_of_picture: bytes) -> None:
    line = refuse("decode", "-", "back.wav", stdin=tokens_of_picture)
    assert "back.wav: this is an image" in line


def test_failure_keeps_what_was_there(tokens_of_picture: bytes) -> None:
    Path("out.tok").write_text("old")
    Path("out.png").write_text("old")
    png = Path("a.png").read_bytes()
    for name in ("cut.png", "flip.tok"):
        Path(name).write_bytes(SPOILT[name](tokens_of_picture, png))
    refuse("encode", "cut.png", "out.tok")
    refuse("decode", "flip.tok", "out.png")
    assert Path("out.tok").read_text() == Path("out.png").read_text() == "old"


def test_some_of_several_fail(a_tok: Path) -> None:
    Path("b.png").write_text("no image")
    result = run("encode", "a.png", "a.wav", "b.png", "missing.jpg", "out/", check=1)
    assert tree("out") == {"a.png.tok", "a.wav.tok"}
    mixed, *failures, last = result.err.splitlines()
    assert "each coded with the default model of their kind" in mixed
    assert [line.split(": ")[1] for line in failures] == ["b.png", "missing.jpg"]
    assert "2 of 4 failed" in last


def test_files_that_are_not_for_the_model_fail_alone() -> None:
    Path("notes.txt").write_text("neither")
    err = run("encode", "a.png", "a.wav", "notes.txt", "out/", "-m", NAME, check=1).err
    assert tree("out") == {"a.png.tok"}
    assert f"a.wav: this is audio; the model '{NAME}' is for images" in err
    assert "notes.txt: not an image" in err and "2 of 3 failed" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which is Linux's")
@pytest.mark.parametrize("args", ["encode a.png full.tok", "decode a.tok full.png"])
def test_full_disk_is_named(a_tok: Path, args: str) -> None:
    target = args.split()[-1]
    Path(target).symlink_to("/dev/full")
    line = refuse(*args.split())
    assert target in line and "No space left" in line


@pytest.mark.parametrize("name", ["flip.tok", "half.tok", "cut.tok"])
def test_recover(name: str, tokens_of_picture: bytes) -> None:
    """Of one block, which is lost: the size is still that of the original."""
    Path(name).write_bytes(SPOILT[name](tokens_of_picture, b""))
    row = run("decode", name, "b.png", "--recover", "--json").json["results"][0]
    assert row["damaged_blocks"] == 1
    assert load_image("b.png").shape == load_image("a.png").shape
    assert "damaged blocks are grey" in run("decode", name, "b.png", "--recover").err


def test_force_decodes_tokens_of_other_weights(tokens_of_picture: bytes) -> None:
    Path("b.tok").write_bytes(SPOILT["weights.tok"](tokens_of_picture, b""))
    run("decode", "b.tok", "b.png", "--force")
    assert load_image("b.png").shape == (275, 131, 3)
    Path("c.tok").write_bytes(SPOILT["codebook.tok"](tokens_of_picture, b""))
    assert "cannot decode" in refuse("decode", "c.tok", "c.png", "--force")


# ---------------------------------------------------------------------------- documents and facts


def test_json_documents(a_tok: Path) -> None:
    size = a_tok.stat().st_size
    expected = {
        "source": "a.png",
        "target": "b.tok",
        "kind": "image",
        "width": 131,
        "height": 275,
        "components": 3,
        "tokens": 35 * 17,
        "bytes": size,
        "bits_per_pixel": pytest.approx(8 * size / (131 * 275), abs=1e-4),
        "damaged_blocks": 0,
    }
    result = run("encode", "a.png", "b.tok", "--json")
    (row,) = result.json["results"]
    assert expected.items() <= row.items()
    assert row["elapsed_seconds"] > 0 and row["megapixels_per_second"] > 0
    assert (result.json["kept"], result.json["failed"], result.err) == ([], [], "")
    (row,) = run("decode", "b.tok", "c.png", "--json").json["results"]
    assert (expected | {"source": "b.tok", "target": "c.png"}).items() <= row.items()


def test_summary(picture: Make) -> None:
    line = run("encode", "a.png", "b.tok").err
    assert re.fullmatch(
        r"b\.tok: 131 x 275 pixels, 595 tokens, \d+ bytes, 0\.\d+ bits per pixel, [\d.]+ s "
        r"\([\d.]+ megapixels/s\)\n",
        line,
    ), line
    draw(picture, "in/b.png", "in/c.png")
    assert "2 files: 0.00 megapixels, 80 tokens" in run("encode", "in").err


@pytest.mark.parametrize("components", [3, 4])
def test_info_of_tokens(picture: Make, debug_image_model: Path, components: int) -> None:
    save_image("b.png", picture(275, 131, components))
    run("encode", "b.png", "b.tok")
    codec = ImageCodec.from_pretrained(debug_image_model)
    size, channels = Path("b.tok").stat().st_size, 2 - components % 2
    facts = run("info", "b.tok", "--json").json
    assert facts == facts | {
        "kind": "image",
        "model": NAME,
        "fingerprint": codec.space[:8].hex(),
        "width": 131,
        "height": 275,
        "components": components,
        "rows": 35,
        "columns": 17,
        "channels": channels,
        "tokens": 35 * 17 * channels,
        "codebook_size": 125,
        "nominal_bits_per_pixel": pytest.approx(channels * codec.bits_per_pixel, abs=1e-4),
        "real_bits_per_pixel": pytest.approx(8 * size / (131 * 275), abs=1e-4),
        "bytes": size,
        "blocks": 1,
        "damaged_blocks": [],
        "checksums": "ok",
    }
    text = run("info", "b.tok").out.decode()
    for word in (NAME, "width", "275", "nominal bits per pixel", "checksums"):
        assert word in text
    assert run("info", "-", "--json", stdin=Path("b.tok").read_bytes()).json["rows"] == 35


def test_info_of_damaged_tokens(tokens_of_picture: bytes) -> None:
    Path("flip.tok").write_bytes(SPOILT["flip.tok"](tokens_of_picture, b""))
    result = run("info", "flip.tok", "--json", check=2)
    assert result.json["damaged_blocks"] == [0]
    assert result.err == "vpcodec: flip.tok: block 0: the checksum is wrong\n"


def test_info_of_a_model(debug_image_model: Path) -> None:
    facts = run("info", debug_image_model, "--json").json
    assert facts == facts | {
        "model": NAME,
        "kind": "image",
        "hop_length": 8,
        "codebook_size": 125,
        "nominal_bits_per_pixel": pytest.approx(np.log2(125) / 64, abs=1e-4),
        "checksums": "ok",
    }
    assert facts["parameters"] > 1e3
    assert {"encoder", "decoder", "transformer", "quantizer"} <= facts.keys()
    assert "windows of 4 x 4 tokens" in run("info", debug_image_model).out.decode()


@pytest.mark.parametrize("kind", ["audio", "image"])
def test_export_names_an_example_of_the_kind(
    kind: str, debug_image_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = hub.bundled_folders()[hub.DEFAULT_MODEL] if kind == "audio" else debug_image_model
    monkeypatch.setattr("vpcodec.training.checkpoints.load_newest", lambda run: ({}, {}))
    monkeypatch.setattr(
        "vpcodec.export.export_run", lambda run, output, **options: shutil.copytree(made, output)
    )
    example = re.search(
        "try: vpcodec (encode) (.*) (-m) (.*)", run("export", "run", "-o", "model").out.decode()
    )
    shutil.copy(f"a.{'wav' if kind == 'audio' else 'png'}", example[2])
    run(*example.groups())
    assert verify("in.tok").ok


def test_models_of_both_kinds() -> None:
    rows = {row["name"]: row for row in run("models", "--json").json}
    assert rows[NAME]["kind"] == "image" and rows[hub.DEFAULT_MODEL]["kind"] == "audio"
    assert {name for name, row in rows.items() if row["default"]} == {NAME, hub.DEFAULT_MODEL}
    text = run("models").out.decode()
    assert f"* {NAME}" in text and f"* {hub.DEFAULT_MODEL}" in text and "bit/pixel" in text


def test_help_names_both() -> None:
    for command in ("", "encode", "decode"):
        text = run(*command.split(), "--help").out.decode().lower()
        assert "audio" in text and "image" in text
