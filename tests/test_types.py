"""What an editor, a type checker and `help` know about the public face."""

from __future__ import annotations

import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

import vpcodec
from vpcodec import AudioCodec, Codec, ImageCodec

pytestmark = pytest.mark.slow

STATEMENTS = """
import numpy as np
from vpcodec import AudioCodec, Codec, ImageCodec, read_tokens

reveal_type(Codec.from_pretrained("speech-3k"))
reveal_type(Codec.from_pretrained("image-fsp", backend="torch"))
reveal_type(Codec.from_pretrained("some/folder"))
reveal_type(AudioCodec.from_pretrained("some/folder"))
reveal_type(ImageCodec.from_pretrained())
reveal_type(Codec.from_pretrained("speech-1k").encode(np.zeros(9, np.float32), 16_000))
reveal_type(Codec.from_pretrained("speech-1k").decoder_stream().push(np.zeros(9, np.int64)))
reveal_type(read_tokens("a.tok")[0])
reveal_type(Codec.from_pretrained("speech-1k").latency)
"""
INT64 = "ndarray[tuple[Any, ...], dtype[signedinteger[_64Bit]]]"
FLOAT32 = "ndarray[tuple[Any, ...], dtype[floating[_32Bit]]]"
PAGES = ["README.md", "docs/language-models.md", "docs/packets.md", "docs/streaming.md"]
REVEALED = [
    *("AudioCodec", "ImageCodec", "Codec", "AudioCodec", "ImageCodec"),
    *(INT64, FLOAT32, INT64, "float | None"),
]


def mypy(path: Path) -> list[str]:
    """The lines that mypy prints about a file, with the project's settings."""
    pytest.importorskip("mypy", reason="needs the dev extra")
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_types_are_those_that_a_user_gets(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(STATEMENTS)
    lines = mypy(tmp_path / "user.py")
    found = [match[1] for line in lines if (match := re.search(r'type is "(.*)"', line))]
    short = [re.sub(r"\b[a-z_]+(?:\.[a-z_]+)*\.(?=[A-Za-z_])", "", text) for text in found]
    assert short == REVEALED
    assert not [line for line in lines if "error:" in line]


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_has_no_wrong_type(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    (tmp_path / "page.py").write_text("\n".join(blocks))
    assert not [line for line in mypy(tmp_path / "page.py") if "error:" in line]


def test_the_package_lists_its_public_names_and_has_them() -> None:
    assert dir(vpcodec) == sorted(vpcodec.__all__)
    assert {"AudioCodec", "Codec", "ImageCodec", "read_tokens", "score", "write_tokens"} < set(
        dir(vpcodec)
    )
    for name in dir(vpcodec):
        assert getattr(vpcodec, name) is not None


@pytest.mark.parametrize(
    "name, kind, parts",
    [
        ("speech-3k", AudioCodec, ["speech-3k", "16000 Hz", "2989 bit/s", "backend onnx"]),
        ("image-fsp", ImageCodec, ["image-fsp", "8 x 8 pixels per token", "backend onnx"]),
    ],
)
def test_a_codec_says_what_it_is(name: str, kind: type[Codec], parts: list[str]) -> None:
    codec = Codec.from_pretrained(name)
    assert type(codec) is kind
    text = repr(codec)
    assert text.startswith(f"<{kind.__name__} ")
    assert [part for part in parts if part not in text] == []


def test_help_tells_of_rates_and_streams() -> None:
    text = pydoc.plain(pydoc.render_doc(AudioCodec))
    for word in ("sample_rate", "frame_rate", "bitrate", "latency", "encoder_stream"):
        assert word in text
    assert "bits_per_pixel" in pydoc.plain(pydoc.render_doc(ImageCodec))
    assert "encoder_stream" in pydoc.plain(pydoc.render_doc(Codec))
