"""Inputs on the command line: folders in which nothing is lost, pipes, audio that is cut short."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import ENOUGH, MODULE, refuse, run, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sounds import M4A, sound

from vpcodec.media.audio import save
from vpcodec.media.audio.mp3 import parse_header
from vpcodec.media.image import save_image
from vpcodec.tokenfile import verify

TONE = sound("WAV", 1600, rate=16_000)
PICTURE = np.zeros((16, 16, 3), np.uint8)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_suffixes_that_one_file_alone_could_have(folder: Path) -> None:
    os.makedirs("in")
    for name, format in (
        ("a.aifc", "AIFF"),
        ("b.sph", "NIST"),
        ("c.voc", "VOC"),
        ("d.wave", "WAV"),
    ):
        Path("in", name).write_bytes(sound(format, 1600, rate=16_000))
    run("encode", "in", "out")
    assert tree("out") == {"a.tok", "b.tok", "c.tok", "d.tok"}


def test_skipped_files_are_named(folder: Path) -> None:
    os.makedirs("in/deep")
    Path("in/a.wav").write_bytes(TONE)
    for i in range(25):
        Path(f"in/deep/{i:02}.txt").touch()
    Path("elsewhere").mkdir()
    os.symlink(Path("elsewhere").absolute(), "in/link")
    result = run("encode", "in", "out")
    (line,) = (line for line in result.err.splitlines() if " skipped: " in line)
    assert line.startswith("vpcodec: 26 skipped: in/deep/00.txt, in/deep/01.txt")
    assert line.endswith("in/deep/19.txt and 6 more")
    document = run("encode", "in", "out", "--json", "--force").json
    assert len(document["skipped"]) == 26 and "in/link" in document["skipped"]
    run("encode", "in")  # results beside inputs are no inputs
    assert "in/a.tok" not in run("encode", "in", "--json").json["skipped"]


def test_a_model_skips_what_is_not_for_it(folder: Path) -> None:
    os.makedirs("in")
    Path("in/a.wav").write_bytes(TONE)
    save_image("in/b.png", PICTURE)
    result = run("encode", "in", "out", "--model", "speech-3k")
    assert "1 skipped: in/b.png" in result.err and tree("out") == {"a.tok"}


def test_a_folder_with_files_for_ffmpeg(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    os.makedirs("in")
    Path("in/a.wav").write_bytes(TONE)
    for name in ("b.m4a", "c.mp4"):
        Path("in", name).write_bytes(M4A)
    result = run("encode", "in", "out", check=1)
    assert "in/b.m4a: MP4 is read through ffmpeg, which is not installed; install it" in result.err
    assert "2 of 3 failed" in result.err and tree("out") == {"a.tok"}


NAMES = st.lists(
    st.tuples(
        st.sampled_from(["", "sub", "sub/deep"]),
        st.sampled_from("abc"),
        st.sampled_from(
            ".wav .WAV .png .flac .txt .m4a .tok .wave .aifc .xyz .jpg .mp3.part".split() + [""]
        ),
        st.sampled_from(["sound", "picture", "text", "empty", "cut"]),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda item: item[:3],
)


@settings(
    max_examples=12, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(NAMES, st.booleans(), st.sampled_from([None, "speech-3k", "image-fsp"]))
def test_every_file_of_a_folder_is_encoded_kept_skipped_or_failed(
    folder: Path, names: list, beside: bool, model: str | None
) -> None:
    root = Path(tempfile.mkdtemp(dir=folder))
    for parent, stem, suffix, what in names:
        path = root / "in" / parent / (stem + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        if what == "picture":
            save_image(folder / "x.png", PICTURE)
            shutil.copy(folder / "x.png", path)
        else:
            data = {"sound": TONE, "text": b"hello", "empty": b"", "cut": TONE[:-10]}[what]
            path.write_bytes(data)
    files = {str(path) for path in (root / "in").rglob("*") if path.is_file()}
    args = ["encode", root / "in", *([] if beside else [root / "out"]), "--json"]
    args += ["--model", model] if model else []
    for _ in range(2):  # the second time, results are kept
        result = run(*args, check=None)
        if not result.out:  # nothing for the model, or the only file failed
            assert result.code == 2
            alone = len(files) == 1 and f"{files.copy().pop()}: " in result.err
            assert alone or "no files found" in result.err
            return
        document = json.loads(result.out)
        found = files - {row["target"] for row in document["results"]} - set(document["kept"])
        assert result.code == (1 if document["failed"] else 0)
        done = {row["source"] for row in document["results"]}
        failed = {row["source"] for row in document["failed"]}
        assert all(row["source"] in row["error"] for row in document["failed"])
        n_kept = len(document["kept"])
        assert len(found) == len(done) + n_kept + len(failed) + len(document["skipped"])
        assert len(failed) == len(document["failed"]) and failed <= found
        assert not done & failed and set(document["skipped"]) <= found - done - failed
        if document["failed"]:
            counts = f"{len(done)} done, {n_kept} kept, {len(document['skipped'])} skipped"
            assert f"{counts}, {len(failed)} of" in result.err


def test_a_folder_of_audio_and_images_says_so(folder: Path) -> None:
    os.makedirs("in")
    Path("in/a.wav").write_bytes(TONE)
    save_image("in/b.png", PICTURE)
    said = "vpcodec: audio (1) and images (1) are each coded with the default model of their kind"
    err = run("encode", "in", "out").err
    assert said in err and err.endswith("vpcodec: 2 done, 0 kept, 0 skipped, 0 failed\n")
    assert said not in run("encode", "in", "out2", "--model", "speech-3k").err
    assert said not in run("encode", "in/a.wav").err


def test_the_closing_line_counts_everything(folder: Path) -> None:
    os.makedirs("in")
    for name in "abcd":
        Path(f"in/{name}.wav").write_bytes(TONE if name != "c" else b"no audio")
    Path("in/e.txt").touch()
    run("encode", "in/a.wav", "out/")
    last = run("encode", "in", "out", check=1).err.splitlines()[-1]
    assert last == "vpcodec: 2 done, 1 kept, 1 skipped, 1 of 3 failed"
    last = run("encode", "in", "out2", "--fail-fast", check=1).err.splitlines()[-1]
    assert last == "vpcodec: 2 done, 0 kept, 1 skipped, 1 of 4 failed, 1 not tried"


def test_mono_is_the_mean_of_the_channels(folder: Path) -> None:
    rng = np.random.default_rng(0)
    stereo = rng.normal(0, 0.1, (2, 9_000)).astype(np.float32)
    save("a.wav", stereo, 16_000, subtype="FLOAT")
    save("b.wav", stereo.mean(0, keepdims=True), 16_000, subtype="FLOAT")
    row = run("encode", "a.wav", "a.tok", "--mono", "--json").json["results"][0]
    run("encode", "b.wav", "b.tok")
    assert row["channels"] == 1
    assert Path("a.tok").read_bytes() == Path("b.tok").read_bytes()
    save_image("c.png", PICTURE)
    assert "only audio takes --mono" in refuse("encode", "c.png", "--mono")


@pytest.mark.parametrize(("rate", "opus"), [(44_100, 48_000), (11_025, 12_000), (96_000, 48_000)])
def test_opus_gets_the_next_rate_that_it_has(folder: Path, rate: int, opus: int) -> None:
    save("a.wav", np.zeros((1, rate // 4), np.float32), rate)
    run("encode", "a.wav")
    row = run("decode", "a.tok", "a.opus", "--json").json["results"][0]
    assert row["result_bytes"] == Path("a.opus").stat().st_size
    assert row["bytes"] == Path("a.tok").stat().st_size
    run("encode", "a.opus", "b.tok")
    assert run("info", "b.tok", "--json").json["original_rate"] in (opus, 48_000)
    assert f"{rate} Hz" in refuse("decode", "a.tok", "c.opus", "--rate", rate)


def test_the_line_of_a_result_has_its_bytes(folder: Path) -> None:
    Path("a.wav").write_bytes(TONE)
    line = run("encode", "a.wav").err
    assert f", {Path('a.tok').stat().st_size:,} bytes, " in line
    line = run("decode", "a.tok", "b.wav").err
    assert line.endswith(f"; {Path('b.wav').stat().st_size:,} bytes written\n")


@pytest.mark.parametrize("name", ["x.wav", "x.flac", "x.mp3", "x.ogg", "x.aiff"])
def test_truncated_audio_is_refused_or_kept(folder: Path, name: str) -> None:
    format = {"x.aiff": "AIFF"}.get(name, name[2:].upper())
    Path(name).write_bytes(sound(format, 96_000)[:-3000])
    line = refuse("encode", name, "x.tok")
    assert name in line and "truncated" in line and "--truncated keep" in line
    result = run("encode", name, "x.tok", "--truncated", "keep")
    assert verify("x.tok").ok and "truncated" in result.err
    (row,) = run("encode", name, "y.tok", "--truncated", "keep", "--json").json["results"]
    assert row["cut"].startswith("truncated") and 0 < row["seconds"] < 2
    assert "'maybe', not one of refuse, keep" in refuse("encode", name, "--truncated", "maybe")


def test_noise_through_a_pipe_is_refused_at_once(folder: Path) -> None:
    line = refuse("encode", "-", "x.tok", stdin=np.random.default_rng(0).bytes(200_000))
    assert "stdin: not an audio file" in line


@pytest.mark.parametrize("option", [[], ["-o"]])
def test_a_device_or_a_pipe_as_last_argument_is_the_output(folder: Path, option: list) -> None:
    Path("a.wav").write_bytes(TONE)
    run("encode", "a.wav", *option, os.devnull)
    assert tree() == {"a.wav"}
    os.mkfifo("pipe")
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(Path("pipe").read_bytes()))
    reader.start()
    run("encode", "a.wav", *option, "pipe")
    reader.join(60)
    Path("x.tok").write_bytes(received[0])
    assert verify("x.tok").ok and tree() == {"a.wav", "pipe", "x.tok"}


def test_dev_stdout_as_last_argument(folder: Path) -> None:
    Path("a.wav").write_bytes(TONE)
    command = [*MODULE, "encode", "a.wav", "/dev/stdout"]
    result = subprocess.run(command, capture_output=True, timeout=ENOUGH, check=True)
    Path("x.tok").write_bytes(result.stdout)
    assert verify("x.tok").ok and tree() == {"a.wav", "x.tok"}


def through(*command: object, **options: object) -> bytes:
    """What a command of its own gives on stdout."""
    arguments = [*MODULE, *map(str, command)]
    return subprocess.run(
        arguments, stdout=subprocess.PIPE, timeout=ENOUGH, check=True, **options
    ).stdout


def test_decode_to_devices_and_pipes(folder: Path) -> None:
    """Which get what a pipe gets, unless their suffix names another format."""
    Path("a.wav").write_bytes(TONE)
    save_image("b.png", PICTURE)
    run("encode", "a.wav", "b.png")
    run("decode", "a.tok", os.devnull)
    run("decode", "b.tok", os.devnull)
    wav, png = through("decode", "a.tok", "-"), through("decode", "b.tok", "-")
    assert wav.startswith(b"RIFF") and png.startswith(b"\x89PNG")
    assert through("decode", "a.tok", "/dev/stdout") == wav
    assert through("decode", "b.tok", "-o", "/dev/stdout") == png
    assert through("decode", "a.tok", "--raw", "s16", "/dev/stdout") == wav[44:]
    os.mkfifo("pipe.flac")
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(Path("pipe.flac").read_bytes()))
    reader.start()
    run("decode", "a.tok", "pipe.flac")
    reader.join(ENOUGH)
    assert received[0].startswith(b"fLaC")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="the system has no /dev/fd")
def test_names_of_stdin_and_stdout(folder: Path) -> None:
    """What is redirected into a file that has something in it keeps that."""
    Path("a.wav").write_bytes(TONE)
    whole = through("encode", "a.wav", "-")
    for name in ("/dev/stdin", "/dev/fd/0"):
        with open("a.wav", "rb") as file:
            assert through("encode", name, stdin=file) == through("encode", "-", input=TONE)
    for name in ("/dev/stdout", "/dev/fd/1"):
        Path("log").write_bytes(b"before\n")
        with open("log", "ab") as log:
            subprocess.run([*MODULE, "encode", "a.wav", name], stdout=log, check=True)
            log.write(b"after\n")
        assert Path("log").read_bytes() == b"before\n" + whole + b"after\n"
    assert tree() == {"a.wav", "log"}


def test_lines_of_scores_and_the_table_on_one_stdout(folder: Path) -> None:
    Path("a.wav").write_bytes(TONE)
    with open("all", "wb") as file:
        command = ["score", "a.wav", "a.wav", "--metrics", "si_sdr", "--csv", "/dev/stdout"]
        command += ["--jsonl", "/dev/stdout"]
        subprocess.run([*MODULE, *command], stdout=file, check=True, timeout=ENOUGH)
    row, *table = Path("all").read_text().splitlines()
    assert json.loads(row)["key"] == "a.wav"
    assert any(line.startswith("SI-SDR") for line in table)
    assert "system,metric,unit,n,missing,mean,low,high,median,p5,p95" in table


def damaged_mp3() -> bytes:
    """An MP3 whose frames are all there, but some claim more bits than they have."""
    data = bytearray(sound("MP3", 48_000, rate=16_000))
    at = n = 0
    while header := parse_header(bytes(data), at):
        if 10 <= n < 13:
            data[at + 5 : at + 8] = b"\xff\xff\xff"
        at, n = at + header.length, n + 1
    assert n > 13
    return bytes(data)


def test_what_the_decoder_of_mp3_says_has_the_name_of_the_file(folder: Path) -> None:
    Path("a.mp3").write_bytes(damaged_mp3())
    command = [*MODULE, "encode", "a.mp3", "--truncated", "keep"]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=ENOUGH)
    said = [line for line in result.stderr.splitlines() if "mpg123" in line]
    assert said and all(line.startswith("vpcodec: a.mp3: ") for line in said)


def test_what_libtiff_says_has_the_name_of_the_file(folder: Path) -> None:
    rng = np.random.default_rng(0)
    save_image("a.tif", rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = bytearray(Path("a.tif").read_bytes())
    data[2_000:2_040] = rng.bytes(40)
    Path("a.tif").write_bytes(data)
    command = [*MODULE, "encode", "a.tif"]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=ENOUGH)
    assert result.stderr
    assert all("a.tif" in line for line in result.stderr.splitlines())
    assert "tempfile" not in result.stderr
