"""`vpcodec models`: what it lists, and pushing to a Hub of our own."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ENOUGH, MODULE, refuse, run
from hub_server import Hub

from vpcodec.hub import DEFAULT_MODEL, DEFAULT_MODELS, bundled_folders
from vpcodec.published import cache
from vpcodec.published.catalog import PUBLISHED

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speech_wav: Path) -> Path:
    """An own working folder, with a.wav and the default model as model/."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(speech_wav, "a.wav")
    shutil.copytree(bundled_folders()[DEFAULT_MODEL], "model")
    return tmp_path


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


# ----------------------------------------------------------------------------------------- listing


def test_list_in_json() -> None:
    rows = run("models", "--json").json
    bundled = {row["name"]: row for row in rows if row["bundled"]}
    published = {row["name"]: row for row in rows if not row["bundled"]}
    assert set(bundled) == set(bundled_folders())
    assert {row["name"] for row in rows if row["default"]} == set(DEFAULT_MODELS.values())
    assert {name: row["path"] for name, row in bundled.items()} == {
        name: str(path) for name, path in bundled_folders().items()
    }
    assert set(published) == {model.spec for model in PUBLISHED}
    assert {row["path"] for row in published.values()} == {None}
    row = published["zhai-lw/L3AC:1kbps"]
    assert (row["kind"], row["sample_rate"], row["codebook_size"]) == ("audio", 16_000, 7**6)
    assert row["frame_rate"] == pytest.approx(59.259) and row["bitrate"] == pytest.approx(998.2)
    assert all(row["license"] and row["description"] for row in rows)


def test_list_as_text() -> None:
    text = run("models").out.decode()
    assert all(len(line) <= 80 for line in text.splitlines())
    bundled, published = (part.splitlines() for part in text.split("fetched from the Hub"))
    for row in run("models", "--json").json:
        lines = bundled if row["bundled"] else published
        (at,) = [i for i, line in enumerate(lines) if f" {row['name']} " in line]
        assert lines[at].startswith("* " if row["default"] else "  ")
        said = " ".join(line.strip() for line in lines[at + 1 : at + 3])
        assert row["license"] in said and row["description"] in said
        assert "in the cache" not in said


def test_models_in_the_cache_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "zhai-lw/L3AC:1kbps"
    monkeypatch.setenv("VPCODEC_CACHE", str(tmp_path))
    kept = cache._cached(name)
    kept.mkdir(parents=True)
    rows = run("models", "--json").json
    assert [row["name"] for row in rows if row["cached"] and not row["bundled"]] == [name]
    text = run("models").out.decode()
    assert text.count("in the cache; ") == 1
    assert "in the cache; " in text.split(name)[1].splitlines()[1]


# ----------------------------------------------------------------------------------------- pushing


@pytest.fixture
def asked(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Hub:
    """The Hub, which this process asks; its home is not in the working folder."""
    hub.use(monkeypatch, tmp_path_factory.mktemp("home"))
    return hub


def test_push(asked: Hub) -> None:
    done = run("models", "push", "model", "owner/name")
    (url, _, usage) = done.out.decode().partition("; ")
    made = asked.repositories["owner/name"]
    assert url == f"{asked.url}/owner/name/commit/{made.refs['main']}"
    assert usage == "use it with: --model owner/name\n" and done.err == ""
    assert not made.private and f"Upload {DEFAULT_MODEL}" in made.messages


def test_push_with_options(asked: Hub) -> None:
    options = ["--private", "--revision", "v2", "--message", "better", "--json"]
    document = run("models", "push", "model", "owner/name", *options).json
    made = asked.repositories["owner/name"]
    url = f"{asked.url}/owner/name/commit/{made.refs['v2']}"
    assert document == {"model": "owner/name@v2", "private": True, "url": url}
    assert made.private and made.messages[-1] == "better"
    assert set(made.files) == {".gitattributes"}  # those of the main branch


def test_push_that_is_refused(asked: Hub) -> None:
    assert "config.json: No such file" in refuse("models", "push", ".", "owner/name")
    assert "owner/name" in refuse("models", "push", "model", "name")
    assert "HTTP 403, forbidden" in refuse("models", "push", "model", "other/name")
    Path("model/README.md").unlink()
    assert "README.md: No such file" in refuse("models", "push", "model", "owner/name")


@pytest.mark.parametrize("args", ["push", "push model", "push model a b", "frobnicate"])
def test_wrong_use(args: str) -> None:
    result = run("models", *args.split(), check=2)
    assert "Error: " in result.err and result.out == b""


# ------------------------------------------------------------------------- processes of their own


def process(*args: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A command in a new process, whose output is no terminal."""
    command = [*MODULE, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=ENOUGH)


def test_from_one_machine_to_another(hub: Hub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE hold; pipes get what was asked for only."""
    here, there = tmp_path / "here", tmp_path / "there"
    done = process("models", "push", "model", "owner/name", "--json", env=hub.settings(here))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["model"] == "owner/name"

    hub.break_down("encoder.onnx", times=1, cut=700)  # of which the library would tell
    encode = ["encode", "a.wav", "b.tok", "-m", "owner/name", "--json"]
    done = process(*encode, env=hub.settings(there, token=None))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["results"][0]["target"] == "b.tok"
    assert (there / "hub" / "models--owner--name").is_dir()
    run("encode", "a.wav", "a.tok")
    assert Path("b.tok").read_bytes() == Path("a.tok").read_bytes()

    hub.stop()
    done = process("info", "owner/name", env=hub.settings(there, offline=True))
    assert (done.returncode, done.stderr) == (0, "") and DEFAULT_MODEL in done.stdout
    done = process("info", "owner/name", env=hub.settings(tmp_path / "nowhere", offline=True))
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("vpcodec: owner/name: ") and "HF_HUB_OFFLINE" in line


def test_wrong_token_is_one_line(hub: Hub, tmp_path: Path) -> None:
    settings = hub.settings(tmp_path / "home", token="hf_wrong")
    done = process("models", "push", "model", "owner/name", env=settings)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "HTTP 401" in line and "`hf auth login`, or HF_TOKEN" in line
