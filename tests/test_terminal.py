"""What files, folders and servers call themselves does not command the terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import ENOUGH, MODULE, changed_tok, run
from paths import SPEECH

from vpcodec.cli.errors import one_line
from vpcodec.hub import DEFAULT_MODEL, bundled_folders
from vpcodec.terminal import escape

TITLE = "\x1b]0;owned\x07"  # sets the title of a terminal
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def clean(text: str | bytes) -> str:
    """The text, in which there must be nothing for the terminal."""
    text = text.decode() if isinstance(text, bytes) else text
    assert not COMMANDS.search(text)
    return text


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("plain näme 声 👍", "plain näme 声 👍"),
        ("\x1b[31m", r"\x1b[31m"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x9b2J\x7f", r"\x9b2J\x7f"),
        ("gpj.\u202etxt\u2028", r"gpj.\u202etxt\u2028"),
        (os.fsdecode(b"\xff.wav"), r"\udcff.wav"),
    ],
)
def test_escape(text: str, written: str) -> None:
    assert escape(text) == written


def test_what_is_kept() -> None:
    assert escape("a\nb\t\x1b", keep="\n\t") == "a\nb\t\\x1b"


@pytest.mark.parametrize("name", [f"{TITLE}.wav", "a\x1b[2Jb.wav", "\x9bm\u202e.wav", "a\nb.wav"])
def test_names_of_files(work: Path, name: str) -> None:
    (work / "in").mkdir()
    (work / "in" / name).write_bytes(b"no audio")
    (work / "in" / f"{name}.txt").write_bytes(b"")
    shutil.copy(SPEECH, work / "in" / f"sound{name}")
    first = run("encode", "in", "out", check=1)
    assert escape(name) in clean(first.err)
    for line in first.err.splitlines():  # no name makes a line of its own
        assert line.startswith(("vpcodec: ", "2 files", "1 file", "out/")), first.err
    run("encode", "in", "out", "--json", check=1)
    assert f"sound{escape(name)[:-4]}" in clean(run("encode", "in", "out", check=1).err)
    assert one_line(f"in/{name}: not an") in clean(run("encode", f"in/{name}", check=2).err)
    assert len(run("encode", f"in/{name}", check=2).err.splitlines()) == 1
    assert escape(name[:3]) in clean(run("info", name, check=2).err)


def test_name_that_is_no_text(work: Path) -> None:
    name = os.fsdecode(b"a\xff\x1b.wav")
    (work / name).write_bytes(b"no audio")
    assert r"a\udcff\x1b.wav" in clean(run("encode", name, check=2).err)


def test_unknown_options_and_commands(work: Path) -> None:
    for arguments in ((TITLE,), ("encode", f"--{TITLE}"), ("info", "--model", TITLE)):
        assert clean(run(*arguments, check=None).err)


def test_names_in_a_model(work: Path) -> None:
    folder = work / "model"
    shutil.copytree(bundled_folders()[DEFAULT_MODEL], folder)
    data = json.loads((folder / "config.json").read_text())
    data |= {"description": f"a{TITLE}\nfingerprint  0", "license": "\x1b[8mMIT"}
    (folder / "config.json").write_text(json.dumps(data))
    out = clean(run("info", "model").out)
    assert escape(data["description"]) in out and escape(data["license"]) in out
    assert len(re.findall("^fingerprint", out, re.MULTILINE)) == 1
    assert run("info", "model", "--json").json["description"] == data["description"]


def test_audio_through_a_pipe_is_as_it_was(work: Path) -> None:
    """Bytes for a program are not text."""
    shutil.copy(SPEECH, "a.wav")
    run("encode", "a.wav", "a.tok")
    run("decode", "a.tok", "b.raw", "--raw", "s16", "--threads", "1")
    done = subprocess.run(
        [*MODULE, "decode", "a.tok", "-", "--raw", "s16", "--threads", "1"],
        capture_output=True,
        timeout=ENOUGH,
        check=True,
    )
    assert done.stdout == Path("b.raw").read_bytes() != b""


def test_streams_of_few_characters(work: Path) -> None:
    """What the terminal has no bytes for is written out, not an error."""
    (work / "ä声.wav").write_bytes(b"no audio")
    done = subprocess.run(
        [*MODULE, "encode", "ä声.wav"],
        capture_output=True,
        timeout=ENOUGH,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert done.returncode == 2 and rb"\xe4\u58f0.wav: not an audio file" in done.stderr


def test_model_that_a_token_file_names(work: Path) -> None:
    """The format allows printable text only."""
    shutil.copy(SPEECH, "a.wav")
    run("encode", "a.wav", "a.tok")
    data = changed_tok(Path("a.tok").read_bytes(), model="good-name")
    Path("a.tok").write_bytes(data.replace(b"good-name", b"bad\x1b[2Jab"))
    assert clean(run("info", "a.tok", check=2).err)
