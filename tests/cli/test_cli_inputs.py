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
    (line,) = (line for line in result.err.splitlines() if "skipped" in line)
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
        if not result.out:  # nothing for the model, two of one name, or the only item failed
            assert result.code == 2 and "Traceback" not in result.err
            return
        document = json.loads(result.out)
        found = files - {row["target"] for row in document["results"]} - set(document["kept"])
        assert result.code == (1 if document["failed"] else 0)
        done = {row["source"] for row in document["results"]}
        failed = {
            next(name for name in found if f"{name}: " in text) for text in document["failed"]
        }
        n_kept = len(document["kept"])
        assert len(found) == len(done) + n_kept + len(failed) + len(document["skipped"])
        assert not done & failed and set(document["skipped"]) <= found - done - failed


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
