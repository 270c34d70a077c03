"""Published weights to a model folder, from a folder and from a Hub in miniature."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs vpcodec[train]")

from helpers import refuse, run
from hub_server import Hub
from official import random_weights, save_modules
from paths import SPEECH

from vpcodec import Codec
from vpcodec.config import FSQConfig
from vpcodec.hub import open_model
from vpcodec.media.audio import load, resample
from vpcodec.model_folder import ModelError
from vpcodec.published import MODULES, Published, look_up, open_published
from vpcodec.published.convert import convert

pytestmark = pytest.mark.slow

TINY = Published(
    repo="zhai-lw/SQCodec",
    name="tiny",
    version="v0",
    fields=dict(
        name="sqcodec-tiny",
        architecture="sqcodec",
        sample_rate=8000,
        strides=(5, 4),
        encoder_dims=(8, 12, 16),
        encoder_depths=(0, 1, 1),
        decoder_strides=(5, 4),
        decoder_dims=(16, 12, 8),
        decoder_depths=(1, 1),
        feature_dim=16,
        quantizer=FSQConfig(levels=(7, 7, 5)),
        attention_window=24,
        token_stride=2,
        encoder_layers=1,
        encoder_outer_layers=1,
        decoder_layers=1,
        decoder_outer_layers=1,
    ),
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A folder with the five files of TINY."""
    folder = tmp_path_factory.mktemp("weights")
    save_modules(random_weights(TINY.config), folder)
    return folder


@pytest.fixture(autouse=True)
def known(monkeypatch, tmp_path):
    """TINY is one of the published models, and this test has a cache of its own."""
    models = (look_up("zhai-lw/L3AC:1kbps"), TINY)
    monkeypatch.setattr("vpcodec.published.catalog.PUBLISHED", models)
    monkeypatch.setattr("vpcodec.published.PUBLISHED", models)
    monkeypatch.setenv("VPCODEC_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(weights, tmp_path_factory) -> Path:
    """The folder that `convert` makes of them."""
    target = tmp_path_factory.mktemp("models") / "tiny"
    files = {module: weights / f"{module}.pt" for module in MODULES}
    convert(files, TINY, target, commit="c0ffee")
    return target


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """An empty folder to be in."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def quick(model, monkeypatch):
    """Conversions take the graphs that were made once, whatever the weights."""

    def copy(network, folder, facts):
        for name in ("encoder.onnx", "decoder.onnx"):
            shutil.copy(model / name, folder)

    monkeypatch.setattr("vpcodec.published.convert._write_graphs", copy)
    monkeypatch.setattr("vpcodec.published.convert._verify", lambda folder, config: None)


@pytest.fixture
def serving(weights, quick, monkeypatch, tmp_path):
    """A Hub that has the weights."""
    with Hub() as hub:
        files = {name: (weights / Path(name).name).read_bytes() for name in TINY.files}
        hub.add(TINY.repo, files | {"README.md": b"# theirs", "weights/other.v0/encoder.pt": b"x"})
        hub.use(monkeypatch, tmp_path / "hf")
        yield hub


def changed(folder: Path) -> dict[str, Path]:
    """Other weights than those of TINY, module -> file."""
    other = dict(random_weights(TINY.config))
    other["quantizer.project_in.bias"] = other["quantizer.project_in.bias"] + 1
    folder.mkdir()
    return save_modules(other, folder)


def test_both_backends_run_it(model):
    onnx, torch_ = (Codec.from_pretrained(model, backend=name) for name in ("onnx", "torch"))
    samples, rate = load(SPEECH)
    samples = resample(samples[:1], rate, onnx.sample_rate)
    tokens = onnx.encode(samples)
    assert tokens.shape == (1, -(-samples.shape[1] // 40))
    assert len(np.unique(tokens)) > 15
    assert (tokens == torch_.encode(samples)).mean() > 0.998
    audio = onnx.decode(tokens)
    assert np.abs(audio - torch_.decode(tokens)).max() < 1e-4
    assert np.abs(audio).max() > 0.05


def test_the_decoder_runs_in_tiles(model):
    import onnx

    graph = onnx.load(model / "decoder.onnx").graph
    assert sum(node.op_type == "Scan" for node in graph.node) == 4  # two levels, two layers


def test_what_is_written(model, weights):
    folder = open_model(model)
    folder.check()
    assert set(folder.files) == {"model.safetensors", "encoder.onnx", "decoder.onnx"}
    assert folder.source["model"] == TINY.spec and folder.source["commit"] == "c0ffee"
    for path, digest in folder.source["sha256"].items():
        data = (weights / Path(path).name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest
        assert digest in (model / "README.md").read_text()
    assert tuple(folder.source["sha256"]) == TINY.files
    assert len(folder.config.silence) == 24
    from safetensors.numpy import load_file

    stored, published = load_file(model / "model.safetensors"), random_weights(TINY.config)
    assert stored.keys() == published.keys()
    assert all(np.array_equal(stored[name], published[name]) for name in published)


def test_same_weights_have_the_same_fingerprint_wherever_they_came_from(
    model, weights, quick, tmp_path
):
    files = {module: weights / f"{module}.pt" for module in MODULES}
    again = convert(files, TINY, tmp_path / "again")
    assert again.fingerprint == open_model(model).fingerprint
    other = convert(changed(tmp_path / "other"), TINY, tmp_path / "third")
    assert other.fingerprint != again.fingerprint


def test_a_wrong_file_leaves_nothing_behind(weights, tmp_path):
    files = {module: weights / f"{module}.pt" for module in MODULES}
    (tmp_path / "bad.pt").write_bytes(files["decoder"].read_bytes()[:-1000])
    with pytest.raises(ModelError, match="bad.pt"):
        convert(files | {"decoder": tmp_path / "bad.pt"}, TINY, tmp_path / "made" / "model")
    assert list((tmp_path / "made").iterdir()) == []
    wider = replace(TINY, fields=TINY.fields | {"feature_dim": 32})
    with pytest.raises(ModelError, match="shape"):
        convert(files, wider, tmp_path / "made" / "model")
    assert list((tmp_path / "made").iterdir()) == []


def test_an_existing_folder_is_replaced_only_when_told(model, weights, quick, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    files = {module: weights / f"{module}.pt" for module in MODULES}
    with pytest.raises(FileExistsError):
        convert(files, TINY, tmp_path / "model")
    with pytest.raises(FileExistsError, match="no config.json"):  # no model: not ours to replace
        convert(files, TINY, tmp_path / "model", force=True)
    assert (tmp_path / "model" / "mine.txt").read_text() == "mine"
    shutil.copytree(model, tmp_path / "old")
    (tmp_path / "old" / "mine.txt").write_text("mine")
    with pytest.raises(ModelError):
        convert(files | {"decoder": tmp_path / "none.pt"}, TINY, tmp_path / "old", force=True)
    assert (tmp_path / "old" / "mine.txt").exists()
    convert(files, TINY, tmp_path / "old", force=True)
    assert not (tmp_path / "old" / "mine.txt").exists()
    open_model(tmp_path / "old").check()


def test_a_folder_that_appears_meanwhile_is_kept(model, weights, quick, monkeypatch, tmp_path):
    """Two processes convert at the same time: the first one's folder stays, both can use it."""

    def verify(folder, config):
        shutil.copytree(model, tmp_path / "new")
        (tmp_path / "new" / "first.txt").write_text("first")

    monkeypatch.setattr("vpcodec.published.convert._verify", verify)
    files = {module: weights / f"{module}.pt" for module in MODULES}
    with pytest.raises(FileExistsError):
        convert(files, TINY, tmp_path / "new")
    assert (tmp_path / "new" / "first.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_weights_may_be_stored_as_views(weights, quick, tmp_path):
    files = {module: weights / f"{module}.pt" for module in MODULES}
    state = torch.load(files["quantizer"], weights_only=True)
    state["project_in.weight"] = state["project_in.weight"].T.contiguous().T
    torch.save(state, tmp_path / "quantizer.pt")
    convert(files | {"quantizer": tmp_path / "quantizer.pt"}, TINY, tmp_path / "made").check()


def test_what_cannot_be_exported_is_said_in_a_line(weights, monkeypatch, tmp_path):
    def fail(*args):
        raise RuntimeError("no such operator\nand a long story")

    monkeypatch.setattr("vpcodec.published.convert._write_graphs", fail)
    files = {module: weights / f"{module}.pt" for module in MODULES}
    with pytest.raises(ModelError, match=r"exported \(no such operator\)$"):
        convert(files, TINY, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_first_use_fetches_and_converts_and_later_ones_need_no_network(serving, tmp_path):
    tok, wav = tmp_path / "a.tok", tmp_path / "a.wav"
    run("encode", SPEECH, tok, "--model", TINY.spec)
    assert not serving.fetched("other.v0/encoder.pt")
    facts = run("info", TINY.spec, "--json").json
    assert facts["model"] == "sqcodec-tiny" and facts["checksums"] == "ok"
    assert facts["source"].startswith(f"{TINY.spec}@")
    asked = len(serving.requests)
    serving.stop()
    again = tmp_path / "b.tok"
    run("encode", SPEECH, again, "--model", TINY.spec)
    assert again.read_bytes() == tok.read_bytes()
    run("decode", tok, wav)  # it names a model that is here now
    assert load(wav)[1] == load(SPEECH)[1]
    assert load(wav)[0].shape == load(SPEECH)[0].shape
    assert len(serving.requests) == asked
    tokens = Codec.from_pretrained(TINY.spec).encode(*load(SPEECH))
    assert tokens.shape[0] == 1


def test_tokens_of_a_published_model_that_is_not_here(model, work):
    run("encode", SPEECH, "a.tok", "--model", model)
    assert f"--model {TINY.spec} fetches it" in refuse("decode", "a.tok", "a.wav")


def test_a_folder_that_is_called_like_a_bundled_model(model, work):
    shutil.copytree(model, work / "speech-3k")
    run("encode", SPEECH, "a.tok", "--model", "./speech-3k")
    assert run("info", "a.tok", "--json").json["model"] == "sqcodec-tiny"


def test_revisions_are_kept_apart(serving, weights, tmp_path):
    files = changed(tmp_path / "new")
    old = open_published(TINY.spec)
    new = {name: files[Path(name).stem].read_bytes() for name in TINY.files}
    serving.add(TINY.repo, new, ref="v9")
    new = open_published(f"{TINY.spec}@v9")
    assert new.fingerprint != old.fingerprint
    assert open_published(TINY.spec).fingerprint == old.fingerprint
    assert new.source["commit"] != old.source["commit"]


def test_what_the_hub_lacks_is_said_in_a_line(serving, work):
    assert "L3AC" in refuse("encode", SPEECH, "a.tok", "--model", "zhai-lw/L3AC:1kbps")
    assert "tiny" in refuse("encode", SPEECH, "a.tok", "--model", f"{TINY.repo}:giant")
    assert "nowhere" in refuse("encode", SPEECH, "a.tok", "--model", f"{TINY.spec}@nowhere")


def test_weights_damaged_on_the_hub_are_refused(serving, weights, work, tmp_path):
    name = TINY.files[2]
    serving.add(TINY.repo, {name: (weights / "decoder.pt").read_bytes()[:-1000]})
    assert "decoder.pt" in refuse("encode", SPEECH, "a.tok", "--model", TINY.spec)
    assert not list((tmp_path / "cache").rglob("*.onnx"))


def test_weights_damaged_on_the_way_are_refused(serving, work, tmp_path):
    serving.break_down("decoder.pt", flip=True)
    assert "damaged" in refuse("encode", SPEECH, "a.tok", "--model", TINY.spec)
    assert not list((tmp_path / "cache").rglob("*.onnx"))
    serving.repair()
    run("encode", SPEECH, "a.tok", "--model", TINY.spec)  # the damaged cache is fetched again


def test_a_cache_that_cannot_be_written(serving, monkeypatch, work):
    (work / "file").write_text("no folder")
    monkeypatch.setenv("VPCODEC_CACHE", str(work / "file"))
    assert "VPCODEC_CACHE" in refuse("encode", SPEECH, "a.tok", "--model", TINY.spec)


def test_a_repository_without_a_model_lists_its_models(work):
    assert TINY.spec in refuse("encode", SPEECH, "a.tok", "--model", TINY.repo)


def test_convert_command(weights, quick, work):
    told = run("models", "convert", weights, "--as", TINY.spec, "-o", "mine", "--json").json
    assert told["model"] == "sqcodec-tiny" and told["source"]["commit"] == ""
    assert told["fingerprint"] == open_model("mine").fingerprint.hex()
    assert "exists" in refuse("models", "convert", weights, "--as", TINY.spec, "-o", "mine")
    assert "--as" in refuse("models", "convert", weights)
    assert "no such folder" in refuse("models", "convert", "nothing", "--as", TINY.spec)
    assert "published" in refuse("models", "convert", "nothing")
    assert json.loads((work / "mine" / "config.json").read_text())["architecture"] == "sqcodec"
