"""Model folders of others: refused in one line, before they cost anything."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import refuse
from hub_server import Hub
from onnx import TensorProto, helper
from paths import SPEECH

from vpcodec import Codec
from vpcodec.config import parse_model
from vpcodec.hub import DEFAULT_MODEL, bundled_folders, open_model
from vpcodec.model_folder import CONFIG, WEIGHTS, ModelError, fingerprint, token_space

pytestmark = pytest.mark.slow

SAMPLES = np.zeros(2_400, np.float32)
FIFO = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the default model."""
    target = tmp_path / "model"
    shutil.copytree(bundled_folders()[DEFAULT_MODEL], target)
    monkeypatch.chdir(tmp_path)
    return target


def write(folder: Path, **fields: Any) -> None:
    """Set fields of config.json, with hashes and identities that fit, as an attacker would."""
    data = json.loads((folder / CONFIG).read_text()) | fields
    data["files"] = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in data["files"]
    }
    own = {"fingerprint", "space", "earlier", "revisions", "files", "source"}
    config = parse_model({key: value for key, value in data.items() if key not in own})
    weights = (folder / WEIGHTS).read_bytes()
    data["fingerprint"] = fingerprint(config, weights).hex()
    data["space"] = token_space(config, weights).hex()
    (folder / CONFIG).write_text(json.dumps(data))


def refusal(folder: Path, backend: str = "onnx") -> str:
    """The one line with which a model is refused that is opened and run."""
    with pytest.raises(ModelError) as error:
        codec = Codec.from_pretrained(folder, backend=backend)
        codec.decode(codec.encode(SAMPLES))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# ---------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("decoder_delay", "1e12"),
        ("decoder_delay", "1e400"),
        ("decoder_delay", "-1e400"),
        ("decoder_delay", "NaN"),
        ("decoder_delay", "9" * 4000),
        ("strides", "[8, 4, 1000000000]"),
        ("strides", str([1] * 100_000)),
        ("encoder_depths", "[1000000000, 1, 1]"),
        ("decoder_depths", "[1, 1, 1000000000]"),
        ("encoder_layers", "1000000000"),
        ("decoder_layers", "1000000000"),
        ("attention_window", "1000000000000"),
        ("encoder_dims", "[32, 96, 1000000000]"),
        ("decoder_dims", "[1000000000, 96, 32]"),
        ("kernel_size", "1000000000"),
        ("expansion", "1000000000"),
        ("decoder_feedforward_dim", "1000000000"),
        ("noise_channels", "1000000000"),
        ("last_dilations", "[1000000000]"),
        ("synthesis_taps", "1000000000"),
    ],
)
def test_bounds_of_the_configuration(folder: Path, field: str, value: str) -> None:
    data = json.loads((folder / CONFIG).read_text()) | {field: "here"}
    (folder / CONFIG).write_text(json.dumps(data).replace('"here"', value))
    with pytest.raises(ModelError) as error:
        open_model(folder)
    text = str(error.value)
    assert "config.json: " in text and len(text.splitlines()) == 1 and len(text) < 400
    if len(value) < 4000:  # which Python refuses by itself
        assert field in text


@pytest.mark.parametrize("backend", ["onnx", "torch"])
@pytest.mark.parametrize(
    "fields",
    [
        {"encoder_depths": [200, 200, 200]},
        {"decoder_layers": 200},
        {"decoder_dims": [8192, 8192, 8192]},
        {"encoder_feedforward_dim": 8192, "encoder_layers": 2},
        {"noise_channels": 4096},
    ],
    ids=str,
)
def test_weights_are_too_few(folder: Path, backend: str, fields: dict[str, Any]) -> None:
    """Before a model of that size is built."""
    if backend == "torch":
        pytest.importorskip("torch")
    write(folder, **fields)
    assert "describes a larger model than model.safetensors holds" in refusal(folder, backend)


def test_no_model_is_smaller_than_it_says() -> None:
    for name in bundled_folders():
        model = open_model(name)
        header = (model.path / WEIGHTS).read_bytes()
        size = int.from_bytes(header[:8], "little")
        tensors = json.loads(header[8 : 8 + size])
        tensors.pop("__metadata__", None)
        total = sum(int(np.prod(entry["shape"])) for entry in tensors.values())
        assert 0.5 * total < model.config.least_weights <= total


def test_huge_files_are_not_read(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 5 << 30)
    assert "model.safetensors: larger than 4 GiB" in refusal(folder)


@pytest.mark.parametrize(
    "weights", [b"", b"\xff" * 8, (2**40).to_bytes(8, "little") + b"{}", b"\2" + bytes(7) + b"[]"]
)
def test_weights_that_are_none(folder: Path, weights: bytes) -> None:
    (folder / WEIGHTS).write_bytes(weights)
    with pytest.raises(ModelError, match="not a safetensors file"):
        token_space(open_model(folder).config, weights)
    data = json.loads((folder / CONFIG).read_text())
    data["files"][WEIGHTS] = hashlib.sha256(weights).hexdigest()
    data["fingerprint"] = fingerprint(open_model(folder).config, weights).hex()
    (folder / CONFIG).write_text(json.dumps(data))
    assert "model.safetensors: not a safetensors file" in refusal(folder)


# ------------------------------------------------------------------------------------------ graphs


def graph_of(folder: Path, part: str) -> onnx.ModelProto:
    return onnx.load(folder / f"{part}.onnx", load_external_data=False)


def put(folder: Path, part: str, graph: onnx.ModelProto) -> None:
    (folder / f"{part}.onnx").write_bytes(graph.SerializeToString())
    write(folder)


def external(graph: onnx.ModelProto) -> TensorProto:
    return next(tensor for tensor in graph.graph.initializer if tensor.external_data)


def set_fact(tensor: TensorProto, key: str, value: str) -> None:
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("location", "../secret", "its weights are in '../secret', no file of the model"),
        ("location", "/etc/passwd", "its weights are in '/etc/passwd'"),
        ("location", "fifo", "its weights are in 'fifo'"),
        ("location", "./model.safetensors", "no file of the model"),
        ("location", "", "its weights are in ''"),
        ("offset", "-1", "a tensor of it is not inside model.safetensors"),
        ("offset", "1e3", "a tensor of it is not inside"),
        ("length", "-8", "a tensor of it is not inside"),
        ("length", str(2**62), "a tensor of it is not inside"),
        ("offset", "9" * 5000, "a tensor of it is not inside"),
    ],
)
def test_data_outside_the_folder(folder: Path, key: str, value: str, words: str) -> None:
    (folder.parent / "secret").write_bytes(bytes(1 << 20))
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "fifo")
    graph = graph_of(folder, "encoder")
    set_fact(external(graph), key, value)
    put(folder, "encoder", graph)
    assert words in refusal(folder)
    shutil.copy(SPEECH, "a.wav")
    assert words in refuse("encode", "a.wav", "a.tok", "--model", "model")


def test_data_outside_in_a_graph_within_the_graph(folder: Path) -> None:
    graph = graph_of(folder, "encoder")
    tensor = TensorProto()
    tensor.CopyFrom(external(graph))
    set_fact(tensor, "location", "../secret")
    constant = helper.make_node("Constant", [], ["x"], value=tensor)
    inner = helper.make_graph([constant], "inner", [], [onnx.ValueInfoProto(name="x")])
    condition = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    graph.graph.initializer.append(condition)
    graph.graph.node.append(
        helper.make_node("If", ["yes"], ["unused"], then_branch=inner, else_branch=inner)
    )
    put(folder, "encoder", graph)
    assert "its weights are in '../secret'" in refusal(folder)


def test_place_that_is_told_twice(folder: Path) -> None:
    graph = graph_of(folder, "encoder")
    external(graph).external_data.add(key="location", value="model.safetensors")
    put(folder, "encoder", graph)
    assert "not an ONNX graph" in refusal(folder)


def test_every_byte_cut_off_is_noticed_without_a_crash(folder: Path) -> None:
    data = (folder / "encoder.onnx").read_bytes()
    for size in range(0, len(data), len(data) // 12):
        (folder / "encoder.onnx").write_bytes(data[:size])
        write(folder)
        assert "encoder.onnx: " in refusal(folder)


def resize(value: onnx.ValueInfoProto, axis: int, size: int) -> None:
    dim = value.type.tensor_type.shape.dim[axis]
    dim.ClearField("dim_param")
    dim.dim_value = size


def big_state(graph: onnx.ModelProto) -> None:
    resize(graph.graph.input[1], 2, 5 << 30)


def small_kinds(size: int) -> Callable[[onnx.ModelProto], None]:
    """Another graph, of one token per `size` samples."""

    def change(graph: onnx.ModelProto) -> None:
        shape = helper.make_tensor("shape", TensorProto.INT64, [3], [0, -1, size])
        axes = helper.make_tensor("axes", TensorProto.INT64, [1], [2])
        value = helper.make_tensor("value", TensorProto.INT64, [], [10**9 if size == 96 else 0])
        nodes = [
            helper.make_node("Reshape", ["samples", "shape"], ["frames"]),
            helper.make_node("ReduceSum", ["frames", "axes"], ["sums"], keepdims=0),
            helper.make_node("Cast", ["sums"], ["whole"], to=TensorProto.INT64),
            helper.make_node("Add", ["whole", "value"], ["tokens"]),
        ]
        kinds = ("samples", TensorProto.FLOAT), ("tokens", TensorProto.INT64)
        first, last = (helper.make_tensor_value_info(n, t, ["batch", n]) for n, t in kinds)
        graph.graph.CopyFrom(
            helper.make_graph(nodes, "small", [first], [last], [shape, axes, value])
        )

    return change


def rename(graph: onnx.ModelProto) -> None:
    for node in graph.graph.node:
        node.input[:] = ["audio" if name == "samples" else name for name in node.input]
    graph.graph.input[0].name = "audio"


def drop_outputs(graph: onnx.ModelProto) -> None:
    del graph.graph.output[:]


def drop_state(graph: onnx.ModelProto) -> None:
    del graph.graph.output[-1]


def no_graph(graph: onnx.ModelProto) -> None:
    graph.ClearField("graph")


def fixed_batch(graph: onnx.ModelProto) -> None:
    resize(graph.graph.input[0], 0, 7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (big_state, "encoder.onnx: "),
        (drop_outputs, "encoder.onnx: "),
        (no_graph, "encoder.onnx: "),
        (drop_state, "the graph's states do not belong to each other"),
        (rename, "the graph has 'audio', tensor(float)"),
        (fixed_batch, "where 'samples', tensor(float) of 2 dimensions, belongs"),
        (
            small_kinds(100),
            "gives int64 of shape (1, 24), where config.json promises",
        ),
        (small_kinds(77), "encoder.onnx: cannot run"),
        (small_kinds(96), "encoder.onnx: gives tokens beyond its codebook"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_graphs_that_do_not_fit(
    folder: Path, change: Callable[[onnx.ModelProto], None], words: str
) -> None:
    graph = graph_of(folder, "encoder")
    change(graph)
    put(folder, "encoder", graph)
    assert words in refusal(folder)
    shutil.copy(SPEECH, "a.wav")
    assert "model/encoder.onnx: " in refuse("encode", "a.wav", "a.tok", "--model", "model")


def test_graphs_of_images_behind_audio(folder: Path) -> None:
    images = bundled_folders()["image-fsp"]
    for name in ("encoder.onnx", "decoder.onnx", WEIGHTS):
        shutil.copy(images / name, folder / name)
    write(folder)
    words = "the graph has 'images', tensor(float) ['batch', 3, '64*rows', '64*columns']"
    assert words in refusal(folder)


def test_encoder_in_place_of_the_decoder(folder: Path) -> None:
    shutil.copy(folder / "encoder.onnx", folder / "decoder.onnx")
    write(folder)
    assert "decoder.onnx: the graph has 'samples'" in refusal(folder)


# ------------------------------------------------------------------------------ pipes, the Hub


@FIFO
@pytest.mark.parametrize("name", [CONFIG, "encoder.onnx", WEIGHTS, "entropy.safetensors"])
def test_pipe_in_place_of_a_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert refusal(folder) == (
        f"{folder / name}: it is not a regular file"
        + (" (a model folder has a config.json)" if name == CONFIG else "")
    )


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path / "home")
        yield hub


@FIFO
@pytest.mark.parametrize("pattern", ["snapshots/*/encoder.onnx", "refs/main", "blobs/*"])
@pytest.mark.parametrize("online", [True, False])
def test_pipe_in_the_cache(
    hub: Hub, folder: Path, tmp_path: Path, pattern: str, online: bool
) -> None:
    hub.add("owner/name", folder)
    open_model("owner/name")
    (cache,) = (tmp_path / "home").rglob("models--owner--name/blobs")
    path = sorted(cache.parent.glob(pattern))[0]
    path.unlink()
    os.mkfifo(path)
    if not online:
        hub.stop()
    with pytest.raises(ModelError, match="it is not a regular file") as error:
        open_model("owner/name")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("etag", ["../../../owned", "/tmp/owned", "..", "a/b", "a\\b", ""])
def test_names_from_the_server_are_no_paths(
    hub: Hub, folder: Path, tmp_path: Path, etag: str
) -> None:
    """huggingface_hub makes the name of a file of what the server calls an ETag."""
    hub.add("owner/name", folder)
    before = {path for path in tmp_path.rglob("*") if "home" not in path.parts}
    hub.etag = etag
    with pytest.raises(ModelError, match="owner/name: cannot be fetched") as error:
        open_model("owner/name")
    assert len(str(error.value).splitlines()) == 1
    assert {path for path in tmp_path.rglob("*") if "home" not in path.parts} == before
    assert not any("owned" in path.name for path in tmp_path.rglob("*"))
    hub.etag = None
    open_model("owner/name")
