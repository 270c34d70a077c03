"""A model name to a verified folder; the Hub itself is never asked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from vpcodec import Codec
from vpcodec.hub import (
    DEFAULT_MODEL,
    ModelError,
    bundled_folders,
    fingerprint,
    open_model,
)

HTTPError = HfHubHTTPError.__bases__[0]  # of the HTTP client that the Hub's library uses


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder to spoil: the default model's."""
    target = tmp_path / "model"
    shutil.copytree(bundled_folders()[DEFAULT_MODEL], target)
    return target


def change(folder: Path, **fields: Any) -> None:
    """Set fields of config.json; those set to ... go."""
    data = json.loads((folder / "config.json").read_text()) | fields
    data = {name: value for name, value in data.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(data))


def refusal(name: str | Path) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(ModelError) as error:
        open_model(name)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# ----------------------------------------------------------------------------- names and folders


def test_bundled_name() -> None:
    model = open_model()
    assert model.path == bundled_folders()[DEFAULT_MODEL]
    assert model.config.name == DEFAULT_MODEL
    assert len(model.fingerprint) == 16
    for name in ("encoder.onnx", "decoder.onnx", "model.safetensors"):
        assert model.file(name) == model.path / name


def test_every_bundled_model_is_whole() -> None:
    for name, path in bundled_folders().items():
        model = open_model(name)
        assert (model.config.name, model.path) == (name, path)
        weights = model.file("model.safetensors").read_bytes()
        assert model.fingerprint == fingerprint(model.config, weights)


@pytest.mark.parametrize("kind", [str, Path])
def test_folder(folder: Path, kind: type) -> None:
    model = open_model(kind(folder))
    assert model.path == folder
    assert model.config == open_model().config


def test_relative_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert open_model("model").fingerprint == open_model().fingerprint
    assert open_model("./model").fingerprint == open_model().fingerprint


@pytest.mark.parametrize("name", ["speech-4k", "/no/such/folder", "./no/folder", "a/b/c"])
def test_unknown_name_lists_the_bundled_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # not to be called
    text = refusal(name)
    assert repr(name) in text and DEFAULT_MODEL in text


def test_folder_without_a_model(tmp_path: Path) -> None:
    text = refusal(tmp_path)
    assert str(tmp_path / "config.json") in text and "No such file" in text


# ------------------------------------------------------------------------------- damaged folders


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"null",
        b"[1, 2]",
        b'"text"',
        b"{}",
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"9" * 10_000,
    ],
    ids=lambda text: f"{text[:6]!r}x{len(text)}",
)
def test_config_that_is_no_model(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    assert refusal(folder) == f"{folder / 'config.json'}: not a model description"


def test_huge_config(folder: Path) -> None:
    (folder / "config.json").write_bytes(b" " * (1 << 20) + b"{}")
    assert "larger than 1048576 bytes" in refusal(folder)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fingerprint": ...}, "not a model description"),
        ({"fingerprint": 7}, "not a model description"),
        ({"fingerprint": "zz" * 16}, "not a model description"),
        ({"fingerprint": "00" * 15}, "fingerprint is not 16 bytes"),
        ({"fingerprint": "00" * 17}, "fingerprint is not 16 bytes"),
        ({"files": ...}, "not a model description"),
        ({"files": ["encoder.onnx"]}, "not a model description"),
        ({"name": ...}, "name: Field required"),
        ({"name": ""}, "name: "),
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"kind": "video"}, "kind: "),
        ({"sample_rate": 0}, "sample_rate: "),
        ({"sample_rate": "fast"}, "sample_rate: "),
        ({"strides": [8, -4, 3]}, "strides.1: "),
        ({"strides": [8, 4]}, "entries, one per stride"),
        ({"quantizer": {"type": "rvq"}}, "quantizer"),
    ],
    ids=str,
)
def test_wrong_fields_are_named(folder: Path, fields: dict[str, Any], words: str) -> None:
    change(folder, **fields)
    text = refusal(folder)
    assert text.startswith(str(folder / "config.json")) and words in text


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx", "model.safetensors"])
def test_changed_file(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ModelError, match=f"{name}: damaged or changed"):
        open_model(folder).file(name)
    with pytest.raises(ModelError, match=f"{name}: damaged or changed"):
        Codec.from_pretrained(folder)


def test_missing_file(folder: Path) -> None:
    (folder / "encoder.onnx").unlink()
    with pytest.raises(ModelError, match="encoder.onnx: No such file"):
        open_model(folder).file("encoder.onnx")


def test_file_that_is_not_listed(folder: Path) -> None:
    with pytest.raises(ModelError, match="the model has no README.md"):
        open_model(folder).file("README.md")


def test_file_that_is_no_graph(folder: Path) -> None:
    (folder / "encoder.onnx").write_bytes(b"not a graph")
    digest = hashlib.sha256(b"not a graph").hexdigest()
    change(folder, files=open_model(folder).files | {"encoder.onnx": digest})
    with pytest.raises(ModelError, match="encoder.onnx: ONNX Runtime cannot load it") as error:
        Codec.from_pretrained(folder).encode(np.zeros(96, np.float32))
    assert len(str(error.value).splitlines()) == 1


# ----------------------------------------------------------------------------------------- the Hub


@pytest.mark.parametrize(
    ("name", "repo", "revision"),
    [
        ("owner/name", "owner/name", None),
        ("owner/name@v1.0", "owner/name", "v1.0"),
        ("owner/name@refs/pr/3", "owner/name", "refs/pr/3"),
    ],
)
def test_hub_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, repo: str, revision: str | None
) -> None:
    asked: list[tuple] = []

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision))
        for file in folder.iterdir():
            assert any(fnmatch(file.name, pattern) for pattern in allow_patterns)
        assert not any(fnmatch("pytorch_model.bin", pattern) for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_model(name).path == folder
    assert asked == [(repo, revision)]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LocalEntryNotFoundError("not on disk\nand no network"), "not on disk"),
        (HFValidationError("bad repo id"), "bad repo id"),
        (HTTPError("the proxy refuses"), "the proxy refuses"),
        (ConnectionResetError(104, "Connection reset by peer"), "reset by peer"),
        (OSError(28, "No space left on device"), "No space left"),
        (TimeoutError(), "TimeoutError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_hub_failure_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def download(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    text = refusal("owner/name@v2")
    assert text.startswith("owner/name") and "Hub" in text and words in text


def test_hub_repository_that_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert "config.json: No such file" in refusal("owner/name")


@pytest.fixture
def cache(folder: Path, tmp_path: Path) -> Path:
    """HF_HOME that holds owner/name: files as blobs, and links to them from a snapshot folder."""
    repo = tmp_path / "hf" / "hub" / "models--owner--name"
    commit = "0123456789" * 4
    for name in ("blobs", "refs", f"snapshots/{commit}"):
        (repo / name).mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(repo / "blobs" / str(number))
        (repo / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{number}")
    return tmp_path / "hf"


def test_model_of_links(cache: Path, speech: np.ndarray) -> None:
    (config,) = cache.rglob("config.json")
    codec = Codec.from_pretrained(config.parent)
    tokens = codec.encode(speech[:, :9_600])
    assert np.array_equal(tokens, Codec.from_pretrained().encode(speech[:, :9_600]))
    assert codec.decode(tokens).shape == (1, 9_600)


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [("owner/name", 0, ""), ("owner/nothing", 2, "owner/nothing: cannot be fetched from the Hub")],
)
def test_offline_asks_nobody(
    cache: Path, speech_wav: Path, tmp_path: Path, model: str, code: int, words: str
) -> None:
    """HF_HUB_OFFLINE and HF_HOME hold: what is there is used, what is not is one line."""
    target = tmp_path / "a.tok"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "HF_ENDPOINT": endpoint}
        done = subprocess.run(
            [sys.executable, "-m", "vpcodec", "encode", speech_wav, target, "-m", model],
            env=os.environ | settings,
            capture_output=True,
            text=True,
            timeout=120,
        )
        with pytest.raises(BlockingIOError):
            server.accept()
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr
    assert target.exists() == (code == 0)
