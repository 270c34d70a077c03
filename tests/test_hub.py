"""A model name to a verified folder, and back; the Hub is one of our own, in this process."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from hub_server import Hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from vpcodec import Codec
from vpcodec.hub import DEFAULT_MODEL, bundled_folders, download, open_model, push
from vpcodec.model_folder import ModelError, fingerprint

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


def test_a_field_that_is_not_set_does_not_change_the_fingerprint() -> None:
    """Else each new option would make the token files of all models unreadable."""
    config = open_model("speech-1k").config
    assert config.encoder_expansions is None
    set_now = config.model_copy(update={"encoder_expansions": (4, 4, 4)})
    assert fingerprint(set_now, b"weights") != fingerprint(config, b"weights")


@pytest.mark.parametrize("kind", [str, Path])
def test_folder(folder: Path, kind: type) -> None:
    model = open_model(kind(folder))
    assert model.path == folder
    assert model.config == open_model().config


def test_relative_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert open_model("model").fingerprint == open_model().fingerprint
    assert open_model("./model").fingerprint == open_model().fingerprint


@pytest.mark.parametrize("name", ["/no/such/folder", "./no/folder"])
def test_a_path_of_nothing_is_no_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # not to be called
    assert refusal(name) == f"{name}: no such folder"


@pytest.mark.parametrize("name", ["speech-4k", "speech 3k", "a/b/c"])
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
        ({"space": 7}, "not a model description"),
        ({"space": "00" * 15}, "identity is not 16 bytes"),
        ({"space": ""}, "identity is not 16 bytes"),
        ({"earlier": "00" * 16}, "not a model description"),
        ({"earlier": ["zz" * 16]}, "not a model description"),
        ({"earlier": ["00" * 17]}, "identity is not 16 bytes"),
        ({"revisions": ["a/b"]}, "not a model description"),
        ({"revisions": {"one": {"model": "a/b", "identities": []}}}, "not a model description"),
        ({"revisions": {"1": {"model": 1, "identities": []}}}, "not a model description"),
        ({"revisions": {"1": {"model": "a\nb", "identities": []}}}, "not a model description"),
        ({"revisions": {"1": {"model": "a/b", "identities": ["00"]}}}, "identity is not 16 bytes"),
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
    with pytest.raises(ModelError, match="encoder.onnx: not an ONNX graph") as error:
        Codec.from_pretrained(folder).encode(np.zeros(96, np.float32))
    assert len(str(error.value).splitlines()) == 1


# ------------------------------------------------------------------------------ names on the Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An own Hub, which huggingface_hub asks."""
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path / "home")
        yield hub


@pytest.fixture
def published(hub: Hub, folder: Path) -> Path:
    """What owner/name on the Hub holds: the default model, and files that belong to no model."""
    strangers = {"pytorch_model.bin": b"no", "onnx/other.onnx": b"no", "notes.json": b"{}"}
    hub.add("owner/name", folder)
    hub.add("owner/name", strangers)
    return folder


def one_line(action: Callable[[], object]) -> str:
    """The one line with which something is refused."""
    with pytest.raises(ModelError) as error:
        action()
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def described(folder: Path, text: str) -> Path:
    """The same model with another description."""
    change(folder, description=text)
    return folder


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("owner/name", "new"),
        ("owner/name@main", "new"),
        ("owner/name@v1.0", "old"),
        ("owner/name@trials/2", "trial"),
        ("owner/name@{old}", "old"),
        ("owner/name@{new}", "new"),
    ],
)
def test_revision_is_a_branch_a_tag_or_a_commit(
    hub: Hub, folder: Path, name: str, found: str
) -> None:
    commits = {"old": hub.add("owner/name", described(folder, "old"))}
    hub.add("owner/name", folder, ref="v1.0")
    hub.add("owner/name", described(folder, "trial"), ref="trials/2")
    commits["new"] = hub.add("owner/name", described(folder, "new"))
    for _ in range(2):  # from the Hub, then from the cache
        assert open_model(name.format(**commits)).config.description == found
    hub.stop()
    assert open_model(name.format(**commits)).config.description == found


def test_branch_that_moves_on(hub: Hub, folder: Path) -> None:
    hub.add("owner/name", described(folder, "old"))
    assert open_model("owner/name").config.description == "old"
    hub.add("owner/name", described(folder, "new"))
    assert open_model("owner/name").config.description == "new"
    assert len(hub.fetched("model.safetensors")) == 1
    hub.stop()
    assert open_model("owner/name").config.description == "new"


def test_branch_that_has_gone(hub: Hub, folder: Path) -> None:
    hub.add("owner/name", folder)
    hub.add("owner/name", folder, ref="trial")
    open_model("owner/name@trial")
    del hub.repositories["owner/name"].refs["trial"]
    assert "no such branch, tag or commit" in refusal("owner/name@trial")


def test_only_what_belongs_to_the_model_is_fetched(hub: Hub, published: Path) -> None:
    model = open_model("owner/name")
    assert {path.name for path in model.path.iterdir()} == {f.name for f in published.iterdir()}
    for name in ("pytorch_model.bin", "other.onnx", "notes.json"):
        assert hub.fetched(name) == []


def test_second_use_fetches_nothing(hub: Hub, published: Path) -> None:
    first = open_model("owner/name")
    hub.requests.clear()
    assert open_model("owner/name") == first
    assert hub.fetched("") == [] and len(hub.requests) <= 2  # what main is


@pytest.mark.parametrize("way", ["offline", "no network", "trouble"])
def test_cache_serves_without_the_hub(
    hub: Hub, published: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    first = open_model("owner/name")
    hub.requests.clear()
    if way == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    elif way == "no network":
        hub.stop()
    else:
        hub.break_down("/api/", status=503)
    assert open_model("owner/name") == first
    if way == "offline":
        assert hub.requests == []


def test_private_repository_needs_the_token(
    hub: Hub, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["owner/name"].private = True
    assert open_model("owner/name").config.name == DEFAULT_MODEL
    for token, words in ((None, "no such repository, or a private one"), ("hf_wrong", "HTTP 401")):
        hub.use(monkeypatch, tmp_path / f"home of {token}", token)
        text = refusal("owner/name")
        assert words in text and "`hf auth login`, or HF_TOKEN" in text
        assert "hf_wrong" not in text


# --------------------------------------------------------------------- downloads that go wrong


@pytest.mark.parametrize("name", ["encoder.onnx", "config.json"])
def test_cut_connection_is_taken_up_again(hub: Hub, published: Path, name: str) -> None:
    hub.break_down(f"/{name}", times=1, cut=700)
    assert open_model("owner/name").files == open_model(published).files
    assert len(hub.fetched(f"/{name}")) == 2


def test_large_download_is_resumed_where_it_stopped(hub: Hub, published: Path) -> None:
    data = np.random.default_rng(0).bytes(25 << 20)
    files = open_model(published).files | {"big.onnx": hashlib.sha256(data).hexdigest()}
    change(published, files=files)
    hub.add("owner/name", published)
    hub.add("owner/name", {"big.onnx": data})
    hub.break_down("big.onnx", times=1, cut=22 << 20)
    assert open_model("owner/name").file("big.onnx").read_bytes() == data
    assert hub.fetched("big.onnx") == [None, f"bytes={20 << 20}-"]  # the library takes 10 MiB each


def test_what_was_fetched_before_a_failure_is_kept(hub: Hub, published: Path) -> None:
    hub.break_down("model.safetensors", status=403, code="GatedRepo")
    refusal("owner/name")
    hub.repair()
    hub.requests.clear()
    open_model("owner/name")
    assert hub.fetched("config.json") == []
    assert len(hub.fetched("model.safetensors")) == 1


@pytest.mark.parametrize("name", ["encoder.onnx", "model.safetensors", "config.json"])
def test_damaged_download_is_fetched_again(hub: Hub, published: Path, name: str) -> None:
    hub.break_down(f"/{name}", times=1, flip=True)
    open_model("owner/name").check()
    assert len(hub.fetched(f"/{name}")) == 2


@pytest.mark.parametrize("name", ["encoder.onnx", "config.json"])
def test_download_that_stays_damaged_is_refused(hub: Hub, published: Path, name: str) -> None:
    hub.break_down(f"/{name}", flip=True)
    text = refusal("owner/name")
    assert name in text and text.endswith("fetched twice from owner/name")
    assert len(hub.fetched(f"/{name}")) == 2


@pytest.mark.parametrize("name", ["decoder.onnx", "config.json"])
def test_damaged_cache_is_mended(
    hub: Hub, published: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = open_model("owner/name").path / name
    path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    text = refusal("owner/name")
    assert name in text and "cannot be fetched again (offline mode is on" in text
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.requests.clear()
    open_model("owner/name").check()
    assert len(hub.fetched("")) == 1 and hub.fetched(name) == [None]


def test_file_that_the_repository_lacks(hub: Hub, folder: Path) -> None:
    (folder / "encoder.onnx").unlink()
    hub.add("owner/name", folder)
    text = refusal("owner/name")
    assert "encoder.onnx: No such file" in text and "HTTP 404" in text


def test_repository_that_is_no_model(hub: Hub) -> None:
    hub.add("owner/name", {"pytorch_model.bin": b"weights"})
    assert "config.json: No such file" in refusal("owner/name")
    hub.add("owner/name", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"..."})
    assert "config.json: not a model description" in refusal("owner/name")
    assert hub.fetched("model.safetensors") == []


def test_repository_that_is_absurdly_large(hub: Hub, published: Path) -> None:
    hub.listed_sizes["model.safetensors"] = 5 << 30
    text = refusal("owner/name")
    assert "owner/name" in text and "5.0 GiB" in text and "at most 4" in text
    assert hub.fetched("model.safetensors") == []
    hub.listed_sizes = {"pytorch_model.bin": 5 << 30}  # not wanted
    open_model("owner/name")


@pytest.mark.parametrize(
    "name", ["../evil.onnx", "/tmp/evil.onnx", "a/../../evil.onnx", "a\\b.onnx"]
)
def test_names_that_lead_out_of_the_folder(hub: Hub, published: Path, name: str) -> None:
    hub.add("owner/name", {name: b"evil"})
    assert repr(name) in one_line(lambda: download("owner/name", patterns=["*.onnx"]))
    assert hub.fetched("") == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"status": 401, "words": "Invalid username or password."}, "no valid token: `hf auth"),
        ({"status": 401, "code": "RepoNotFound"}, "no such repository"),
        ({"status": 404, "code": "RepoNotFound"}, "no such repository"),
        ({"status": 404, "code": "RevisionNotFound"}, "no such branch, tag or commit"),
        ({"status": 403, "code": "GatedRepo"}, "gated: ask for access"),
        ({"status": 403, "words": "not from here"}, "forbidden"),
        ({"status": 400, "words": "two\tlines"}, "HTTP 400, refused (two lines)"),
        ({"status": 429}, "too many requests"),
        ({"status": 500}, "HTTP 500, trouble on the Hub"),
        ({"status": 503}, "HTTP 503, trouble on the Hub"),
    ],
    ids=str,
)
def test_refusal_of_the_hub_is_one_line(
    hub: Hub, published: Path, fault: dict[str, Any], words: str
) -> None:
    hub.break_down("/api/models/owner/name", **fault)
    text = refusal("owner/name@v2")
    assert text.startswith("owner/name@v2: cannot be fetched from the Hub (") and words in text


def test_gated_files_of_a_repository_that_is_shown(hub: Hub, published: Path) -> None:
    hub.break_down("/resolve/", status=403, code="GatedRepo", words="Access is restricted")
    assert "gated: ask for access" in refusal("owner/name")


def test_unknown_names_on_the_hub(hub: Hub, published: Path) -> None:
    assert "no such repository" in refusal("owner/nothing")
    assert "no such branch, tag or commit" in refusal("owner/name@v9")
    assert "bad..name" in refusal("owner/bad..name")


def test_no_network(hub: Hub, published: Path) -> None:
    hub.stop()
    text = refusal("owner/name")
    assert text.startswith("owner/name: cannot be fetched from the Hub (") and "refused" in text


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LocalEntryNotFoundError("not on disk\nand no network"), "not on disk"),
        (HTTPError("the proxy refuses"), "the proxy refuses"),
        (ConnectionResetError(104, "Connection reset by peer"), "reset by peer"),
        (OSError(28, "No space left on device"), "No space left"),
        (TimeoutError(), "TimeoutError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_failure_of_a_download_is_one_line(
    hub: Hub, published: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    text = refusal("owner/name")
    assert text.startswith("owner/name") and "Hub" in text and words in text


def test_interrupt_passes(hub: Hub, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_model("owner/name")


def test_download_of_patterns(hub: Hub) -> None:
    commit = hub.add("owner/name", {"weights/a.v1/x.pt": b"x", "weights/b.v1/x.pt": b"no"})
    found = download("owner/name", patterns=["weights/a.v1/x.pt"])
    assert found.commit == commit
    assert (found.folder / "weights/a.v1/x.pt").read_bytes() == b"x"
    assert not (found.folder / "weights/b.v1").exists()


def test_settings_of_the_library_are_left_as_they_were(hub: Hub, published: Path) -> None:
    utils = huggingface_hub.utils
    utils.enable_progress_bars()
    utils.logging.set_verbosity_warning()
    before = utils.logging.get_verbosity()
    open_model("owner/name")
    refusal("owner/nothing")
    assert utils.logging.get_verbosity() == before
    assert not utils.are_progress_bars_disabled()


# ----------------------------------------------------------------------------------------- pushing


def test_pushed_model_works_elsewhere(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speech: np.ndarray
) -> None:
    url = push(folder, "owner/speech")
    (commit,) = set(hub.repositories["owner/speech"].commits) & {url.rpartition("/")[2]}
    assert hub.repositories["owner/speech"].refs["main"] == commit
    hub.use(monkeypatch, tmp_path / "elsewhere")
    codec = Codec.from_pretrained("owner/speech")
    tokens = codec.encode(speech[:, :9_600])
    assert np.array_equal(tokens, Codec.from_pretrained().encode(speech[:, :9_600]))
    assert codec.decode(tokens).shape == (1, 9_600)


def test_push_is_one_commit_of_what_belongs_to_the_model(hub: Hub, folder: Path) -> None:
    belongs = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "secrets.env").write_text("no")
    (folder / "other.onnx").write_text("no")
    (folder / "sub").mkdir()
    (folder / "sub" / "config.json").write_text("{}")
    push(folder, "owner/name", message="the first")
    made = hub.repositories["owner/name"]
    assert not made.private
    assert made.messages == ["initial commit", "the first"]
    assert set(made.files) == {*belongs, ".gitattributes"}
    assert {name: made.files[name] for name in belongs if name != "README.md"} == {
        name: data for name, data in belongs.items() if name != "README.md"
    }


def test_push_again(hub: Hub, folder: Path) -> None:
    url = push(folder, "owner/name")
    assert push(folder, "owner/name") == url  # nothing is new
    described(folder, "better")
    assert push(folder, "owner/name") != url
    assert len(hub.repositories["owner/name"].commits) == 3
    assert open_model("owner/name").config.description == "better"


def test_push_to_a_branch(hub: Hub, folder: Path) -> None:
    for text in ("one", "two"):  # makes it, finds it
        push(described(folder, text), "owner/name", revision="trials/2")
        assert open_model("owner/name@trials/2").config.description == text
    assert "config.json: No such file" in refusal("owner/name")


def test_push_private(hub: Hub, folder: Path) -> None:
    push(folder, "owner/name", private=True)
    assert hub.repositories["owner/name"].private
    push(described(folder, "new"), "owner/name", private=True)
    hub.add("owner/public", {"a": b""})
    text = one_line(lambda: push(folder, "owner/public", private=True))
    assert text.startswith("owner/public: exists and is public")
    assert set(hub.repositories["owner/public"].files) == {"a"}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("front", "added"),
    [
        ("license: mit", "library_name: vpcodec|pipeline_tag: audio-to-audio|"),
        ("license: mit|pipeline_tag: other # mine", "library_name: vpcodec|"),
        ("library_name:  vpcodec|license: [mit]|tags:|- a", "pipeline_tag: audio-to-audio|"),
        ("license: mit|library_name: vpcodec|pipeline_tag: audio-to-audio", ""),
    ],
)
def test_card_gets_what_it_lacks_and_nothing_else(
    hub: Hub, folder: Path, front: str, added: str, newline: str
) -> None:
    rest = "---|# A model  |||with --- é and|---|rules|"
    card = f"---|{front}|{rest}".replace("|", newline).encode()
    (folder / "README.md").write_bytes(card)
    push(folder, "owner/name")
    pushed = hub.repositories["owner/name"].files["README.md"]
    assert pushed == f"---|{front}|{added}{rest}".replace("|", newline).encode()
    assert (folder / "README.md").read_bytes() == card


def test_card_of_an_image_model(hub: Hub) -> None:
    push(bundled_folders()["image-fsp"], "owner/name")
    assert b"\npipeline_tag: image-to-image\n" in hub.repositories["owner/name"].files["README.md"]


@pytest.mark.parametrize(
    ("card", "words"),
    [
        (None, "README.md: No such file"),
        (b"", "names no licence"),
        (b"# A model\nlicense: mit\n", "names no licence"),
        (b"---\ntags: [a]\n---\n", "names no licence"),
        (b"---\nlicense:\n---\n", "names no licence"),
        (b"---\nlicense: mit\n", "names no licence"),
        (b"---\n- license\n---\n", "names no licence"),
        (b"---\nlicense: [mit\n---\n", "is not YAML"),
        (b"---\nlicense: \xff\n---\n", "is not YAML"),
        (b"---\n{license: mit}\n---\n", "front matter"),
    ],
)
def test_card_that_is_refused(hub: Hub, folder: Path, card: bytes | None, words: str) -> None:
    (folder / "README.md").unlink()
    if card is not None:
        (folder / "README.md").write_bytes(card)
    text = one_line(lambda: push(folder, "owner/name"))
    assert str(folder / "README.md") in text and words in text
    assert hub.requests == []


def test_damaged_folder_is_not_pushed(hub: Hub, folder: Path) -> None:
    whole = (folder / "config.json").read_bytes()
    change(folder, name="another")
    assert "fingerprint does not match" in one_line(lambda: push(folder, "owner/name"))
    (folder / "config.json").write_bytes(whole)
    with open(folder / "encoder.onnx", "ab") as file:
        file.write(b"more")
    assert "encoder.onnx: damaged" in one_line(lambda: push(folder, "owner/name"))
    (folder / "encoder.onnx").unlink()
    assert "encoder.onnx: No such file" in one_line(lambda: push(folder, "owner/name"))
    assert "config.json: No such file" in one_line(lambda: push(folder.parent, "owner/name"))
    assert hub.requests == []


def test_card_must_not_be_a_file_of_the_model(hub: Hub, folder: Path) -> None:
    digest = hashlib.sha256((folder / "README.md").read_bytes()).hexdigest()
    change(folder, files=open_model(folder).files | {"README.md": digest})
    assert "lists README.md" in one_line(lambda: push(folder, "owner/name"))


@pytest.mark.parametrize("repo", ["name", "", "a/b/c", "/name", "owner/", "owner/a..b", "o/a b"])
def test_push_to_no_repository(hub: Hub, folder: Path, repo: str) -> None:
    assert repo in one_line(lambda: push(folder, repo))
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        (None, "owner/name", "needs a token: `hf auth login`, or HF_TOKEN"),
        ("hf_wrong", "owner/name", "HTTP 401, no valid token: `hf auth login`, or HF_TOKEN"),
        ("hf_right", "other/name", "HTTP 403, forbidden"),
    ],
)
def test_push_without_permission(
    hub: Hub,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    repo: str,
    words: str,
) -> None:
    hub.use(monkeypatch, tmp_path / "home", token)
    text = one_line(lambda: push(folder, repo))
    assert repo in text and words in text and "hf_wrong" not in text
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("part", "fault", "words"),
    [
        ("/api/repos/create", {"status": 500}, "HTTP 500, trouble"),
        ("/commit/", {"status": 500}, "HTTP 500, trouble"),
        ("/preupload/", {"status": 403, "words": "read-only token"}, "read-only token"),
        ("/objects/batch", {"status": 413}, "HTTP 413"),
        ("/lfs/", {"status": 400, "words": "bad part"}, "HTTP 400, refused (bad part)"),
    ],
)
def test_failure_of_a_push_is_one_line(
    hub: Hub, folder: Path, part: str, fault: dict[str, Any], words: str
) -> None:
    hub.break_down(part, **fault)
    text = one_line(lambda: push(folder, "owner/name"))
    assert text.startswith(f"{folder}: cannot be pushed to owner/name (") and words in text
    hub.repair()
    push(folder, "owner/name")
    open_model("owner/name").check()


def test_push_without_network(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is on" in one_line(lambda: push(folder, "owner/name"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.stop()
    assert "refused" in one_line(lambda: push(folder, "owner/name"))


# ------------------------------------------------------------------------------------ as a process


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
