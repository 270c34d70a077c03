from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
onnx = pytest.importorskip("onnx", reason="needs the train extra")
pytest.importorskip("yaml", reason="needs the train extra")

from helpers import ENOUGH, MODULE, run
from paths import RECIPES

from vpcodec import Codec, __version__, export, graphs
from vpcodec.backends.onnx import OnnxBackend
from vpcodec.export import export_model, export_run
from vpcodec.graphs import ExportError
from vpcodec.model_folder import (
    ModelError,
    fingerprint,
    read_folder,
    write_folder_config,
)
from vpcodec.models import AudioAutoencoder
from vpcodec.recipe import load_recipe
from vpcodec.training.checkpoints import (
    CheckpointError,
    checkpoint_path,
    save_checkpoint,
)
from vpcodec.training.trainer import Trainer

pytestmark = pytest.mark.slow

DEBUG = RECIPES / "debug.yaml"
GRAPHS = ("encoder.onnx", "decoder.onnx")
FILES = ("model.safetensors", *GRAPHS)


def build(*overrides: str) -> AudioAutoencoder:
    torch.manual_seed(1)
    return AudioAutoencoder(load_recipe(DEBUG, list(overrides)).model)


@pytest.fixture(params=["debug", "image_debug"])
def exported(request: pytest.FixtureRequest) -> Path:
    """A model folder of each kind."""
    fixtures = {"debug": "debug_model", "image_debug": "debug_image_model"}
    return request.getfixturevalue(fixtures[request.param])


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The debug model with layers wide enough that their weights are shared with the graphs."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    overrides = ("model.encoder_dims=[8,16,48]", "model.decoder_dims=[48,16,8]")
    export_model(build(*overrides), folder)
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, debug_model: Path) -> list[AudioAutoencoder]:
    """Makes an export write the debug model's files; collects the models to be written."""
    return write_files_of(debug_model, monkeypatch)


@pytest.fixture
def quick_either(monkeypatch: pytest.MonkeyPatch, exported: Path) -> list[AudioAutoencoder]:
    """The same with the debug model of each kind."""
    return write_files_of(exported, monkeypatch)


def write_files_of(source: Path, monkeypatch: pytest.MonkeyPatch) -> list[AudioAutoencoder]:
    written = []

    def write(model: AudioAutoencoder, folder: Path, like: Path | None) -> None:
        written.append(model)
        shutil.copytree(source, folder, dirs_exist_ok=True)

    monkeypatch.setattr(export, "_write", write)
    return written


@pytest.fixture
def copied(debug_model: Path, tmp_path: Path) -> Path:
    """A copy of the debug model to damage."""
    return shutil.copytree(debug_model, tmp_path / "copied")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def graph(folder: Path, name: str) -> onnx.ModelProto:
    return onnx.load(folder / name, load_external_data=False)


def test_the_folder_is_complete(exported):
    names = {path.name for path in exported.iterdir()}
    assert {"config.json", "README.md", *FILES} <= names
    assert [name for name in names if name.endswith((".data", ".tmp"))] == []
    assert list(exported.parent.iterdir()) == [exported]
    card = (exported / "README.md").read_text()
    name = read_folder(exported).config.name
    assert card.startswith("---\nlicense: mit\n") and f"# {name}" in card


def test_config_holds_the_model_and_true_hashes(exported):
    data = json.loads((exported / "config.json").read_text())
    assert set(data["files"]) >= set(FILES)
    for name, digest in data["files"].items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest
    folder = read_folder(exported)
    assert folder.config in (load_recipe(path).model for path in RECIPES.glob("*debug.yaml"))
    weights = (exported / "model.safetensors").read_bytes()
    assert folder.fingerprint == fingerprint(folder.config, weights)
    assert len(folder.fingerprint) == 16


def test_weights_are_the_model_s_own_rounded_to_float16(wide_model):
    from safetensors.torch import load_file

    saved = load_file(wide_model / "model.safetensors")
    model = build("model.encoder_dims=[8,16,48]", "model.decoder_dims=[48,16,8]")
    assert set(saved) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(saved[name], value.half())


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_say_what_they_are(exported, name):
    folder = read_folder(exported)
    config = folder.config
    proto = graph(exported, name)
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    audio = {}
    if config.kind == "audio":
        audio = {
            "sample_rate": str(config.sample_rate),
            "decoder_delay": str(config.decoder_delay),
        }
    assert facts == audio | {
        "model_type": "vpcodec",
        "version": __version__,
        "kind": config.kind,
        "name": config.name,
        "license": "MIT",
        "fingerprint": folder.fingerprint.hex(),
        "hop_length": str(config.hop_length),
        "codebook_size": str(config.codebook_size),
    }
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 18)]
    onnx.checker.check_model(str(exported / name))


def test_axes_of_outputs_have_the_names_of_those_of_the_input(exported):
    config = read_folder(exported).config
    if config.kind == "audio":
        samples = f"{config.hop_length}*frames"
        expected = {"tokens": ["batch", "frames"], "samples": ["batch", samples]}
    else:
        window, block = config.attention_window, config.block_size
        expected = {
            "tokens": ["batch", f"{window}*rows", f"{window}*columns"],
            "images": ["batch", "", f"{block}*rows", f"{block}*columns"],
        }
    for name in ("encoder.onnx", "decoder.onnx"):
        found = graph(exported, name).graph
        for value in (found.input[0], found.output[0]):
            axes = [axis.dim_param for axis in value.type.tensor_type.shape.dim]
            assert axes == expected[value.name]
        assert {axis.dim_param for value in found.output[1:] for axis in
                value.type.tensor_type.shape.dim} <= {"batch", ""}  # fmt: skip


def test_graphs_of_images_have_no_state_and_take_any_number_of_blocks(debug_image_model):
    block, window = (
        getattr(read_folder(debug_image_model).config, name)
        for name in ("block_size", "attention_window")
    )
    encoder, decoder = (onnxruntime.InferenceSession(debug_image_model / name) for name in GRAPHS)
    assert [entry.name for entry in encoder.get_inputs()] == ["images"]
    assert [entry.name for entry in decoder.get_inputs()] == ["tokens"]
    for batch, rows, columns in ((1, 1, 1), (3, 1, 4), (1, 5, 2)):
        images = np.zeros((batch, 3, rows * block, columns * block), np.float32)
        (tokens,) = encoder.run(None, {"images": images})
        assert tokens.shape == (batch, rows * window, columns * window)
        assert decoder.run(None, {"tokens": tokens})[0].shape == images.shape


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_give_back_every_state_that_they_take(debug_model, name):
    proto = graph(debug_model, name).graph
    first, *past = [entry.name for entry in proto.input]
    last, *following = [entry.name for entry in proto.output]
    assert {first, last} == {"samples", "tokens"}
    assert [entry.removeprefix("past.") for entry in past] == [
        entry.removeprefix("next.") for entry in following
    ]
    assert past and all(entry.startswith("past.") for entry in past)


@pytest.mark.parametrize("channels", [1, 3])
def test_graphs_take_any_batch_and_any_number_of_frames(debug_model, channels):
    backend = OnnxBackend(read_folder(debug_model), threads=1, device="cpu")
    rng = np.random.default_rng(0)
    samples = (0.3 * rng.standard_normal((channels, 60 * 96))).astype(np.float32)
    whole, _ = backend.encode(samples, None)
    decoded, _ = backend.decode(whole, None)
    assert whole.shape == (channels, 60) and decoded.shape == samples.shape
    encoder = decoder = None
    done = 0
    for frames in (1, 2, 17, 40):
        piece = slice(done, done := done + frames)
        tokens, encoder = backend.encode(samples[:, piece.start * 96 : piece.stop * 96], encoder)
        np.testing.assert_array_equal(tokens, whole[:, piece])
        part, decoder = backend.decode(tokens, decoder)
        np.testing.assert_allclose(
            part, decoded[:, piece.start * 96 : piece.stop * 96], rtol=0, atol=1e-5
        )


def test_weights_are_stored_once(wide_model):
    size = (wide_model / "model.safetensors").stat().st_size
    shared = 0
    for name in GRAPHS:
        for tensor in graph(wide_model, name).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                facts = {entry.key: entry.value for entry in tensor.external_data}
                assert facts["location"] == "model.safetensors"
                assert int(facts["offset"]) + int(facts["length"]) <= size
                noise = ".table" in tensor.name
                narrow = onnx.TensorProto.INT8 if noise else onnx.TensorProto.FLOAT16
                assert tensor.data_type == narrow
                shared += int(facts["length"])
            else:
                assert np.prod(tensor.dims) < 4096
    large = [p.numel() for p in build().parameters() if p.numel() >= 4096]
    assert large == []  # the debug model itself shares nothing
    wide = build("model.encoder_dims=[8,16,48]", "model.decoder_dims=[48,16,8]")
    weights = sum(2 * p.numel() for p in wide.parameters() if p.numel() >= 4096)
    tables = sum(b.numel() for b in wide.buffers() if b.dtype == torch.int8)
    assert shared == weights + tables and weights > 0 and tables > 0


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_know_nothing_of_the_machine_that_made_them(wide_model, name):
    proto = graph(wide_model, name)
    for tensor in proto.graph.initializer:
        tensor.ClearField("raw_data")  # numbers may spell anything
    data = proto.SerializeToString()
    assert data and len(data) < (wide_model / name).stat().st_size
    for trace in (b"/work", b"site-packages", b".py", b"/tmp", b"/home", b"/root", b"File "):
        assert trace not in data
    for other in ("config.json", "README.md"):
        assert b"/tmp" not in (wide_model / other).read_bytes()


@pytest.mark.parametrize("n", [1, 95, 96, 97, 5000])
@pytest.mark.parametrize("channels", [1, 2])
def test_backends_agree(wide_model, speech, n, channels):
    pieces = [speech[0, start : start + n] for start in (16_000, 40_000)[:channels]]
    samples = np.stack(pieces)
    first = Codec.from_pretrained(wide_model, backend="torch")
    second = Codec.from_pretrained(wide_model, backend="onnx")
    tokens = first.encode(samples)
    assert tokens.shape == (channels, -(-n // 96))
    np.testing.assert_array_equal(second.encode(samples), tokens)
    expected = first.decode(tokens, n)
    assert expected.shape == (channels, n) and np.abs(expected).max() > 0
    np.testing.assert_allclose(second.decode(tokens, n), expected, rtol=0, atol=1e-4)


ONE_STAGE = (  # half the time of an export
    "model.strides=[12]",
    "model.encoder_dims=[8]",
    "model.encoder_depths=[1]",
    "model.decoder_dims=[8]",
    "model.decoder_depths=[1]",
)
QUANTIZERS = [
    "{type: vp, dim: 5, codebook_size: 4096}",
    "{type: simvq, dim: 4, codebook_size: 1024}",
    "{type: fsq, levels: [8, 8, 8, 6, 5]}",
    "{type: lfq, dim: 12}",
]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_quantizer_runs_alike_in_torch_and_onnx(tmp_path, speech, quantizer):
    model = build(*ONE_STAGE, f"model.quantizer={quantizer}")
    hop = model.config.hop_length
    if not model.quantizer.fitted:
        with torch.no_grad():
            latents = model.encoder(torch.from_numpy(speech[:, : hop * 900]))
        latents = latents[0] + 0.3 * torch.randn(20, 900, model.quantizer.dim)
        model.quantizer.fit(latents, max_iterations=3)
    folder = tmp_path / "model"
    export_model(model, folder)
    first = Codec.from_pretrained(folder, backend="torch")
    second = Codec.from_pretrained(folder, backend="onnx")
    tokens = first.encode(speech)
    assert np.mean(second.encode(speech) != tokens) <= graphs.TOKEN_TOLERANCE
    assert len(np.unique(tokens)) > 1
    every = np.arange(model.config.codebook_size)[None, :600]
    for some in (tokens, every):
        np.testing.assert_allclose(second.decode(some), first.decode(some), rtol=0, atol=1e-4)


def test_a_codebook_keeps_its_full_precision_and_its_training_state_stays_behind(tmp_path):
    from safetensors.torch import load_file

    model = build(*ONE_STAGE, f"model.quantizer={QUANTIZERS[0]}")
    quantizer = model.quantizer.train()
    quantizer(torch.randn(20_000, 5))
    quantizer.fit(torch.randn(20_000, 5), max_iterations=3)
    export_model(model, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(stored["quantizer.codebook"], quantizer.codebook)
    assert [name for name in stored if name.startswith("quantizer.")] == ["quantizer.codebook"]
    for name in GRAPHS:  # the codebook is the only large table, and it is not repeated there
        assert (tmp_path / "model" / name).stat().st_size < 4096 * 5 * 4 * 2


def test_a_codebook_survives_in_onnx(through_onnx):
    from vpcodec.quantizers import VP

    quantizer = VP(5, 4096, seed=0)
    quantizer.fit(torch.randn(20_000, 5), max_iterations=3)
    tokens = np.arange(4096)
    _, back = through_onnx(quantizer, tokens)
    assert back.dtype == np.int64
    np.testing.assert_array_equal(back, tokens)


def test_an_interrupted_vp_run_exports_with_a_codebook_of_its_queue(tmp_path, quick):
    model = build("model.quantizer={type: vp, dim: 3, codebook_size: 16}")
    model.quantizer.train()(torch.randn(1000, 3))
    state = model.state_dict()
    save_checkpoint(
        checkpoint_path(tmp_path, 5),
        {"average": state},
        {"config": model.config.model_dump(mode="json")},
    )
    export_run(tmp_path, tmp_path / "model")
    assert quick[0].quantizer.codebook.shape == (16, 3)


def test_a_vp_run_without_latents_is_refused(tmp_path, quick):
    model = build("model.quantizer={type: vp, dim: 3, codebook_size: 16}")
    config = {"config": model.config.model_dump(mode="json")}
    save_checkpoint(checkpoint_path(tmp_path, 5), {"average": model.state_dict()}, config)
    with pytest.raises(CheckpointError, match="too few for 16 codes"):
        export_run(tmp_path, tmp_path / "model")


def test_a_model_that_fails_its_check_is_not_written(tmp_path, monkeypatch, quick):
    def refuse(folder: Path) -> None:
        assert (folder / "decoder.onnx").exists()
        raise ExportError("refused")

    monkeypatch.setattr(export, "_verify", refuse)
    with pytest.raises(ExportError, match="refused"):
        export_model(build(), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_differs_from_torch_is_noticed(tmp_path, monkeypatch, quick_either):
    decode = OnnxBackend.decode

    def off(self, tokens, state, first_frame=0):
        samples, state = decode(self, tokens, state)
        return samples + np.float32(1e-3), state

    monkeypatch.setattr(OnnxBackend, "decode", off)
    with pytest.raises(ExportError, match="decoded signal differs"):
        export_model(build(), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_is_no_number_is_noticed(tmp_path, monkeypatch, quick_either):
    decode = OnnxBackend.decode

    def off(self, tokens, state, first_frame=0):
        samples, state = decode(self, tokens, state)
        return samples * np.float32("nan"), state

    monkeypatch.setattr(OnnxBackend, "decode", off)
    with pytest.raises(ExportError, match="decoded signal differs"):
        export_model(build(), tmp_path / "new")


def test_tokens_that_differ_from_torch_are_noticed(tmp_path, monkeypatch, quick_either):
    encode = OnnxBackend.encode

    def off(self, samples, state):
        tokens, state = encode(self, samples, state)
        return (tokens + (np.arange(tokens.shape[-1]) % 50 == 0)) % 125, state

    monkeypatch.setattr(OnnxBackend, "encode", off)
    with pytest.raises(ExportError, match="tokens differ"):
        export_model(build(), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_without_force(tmp_path, quick):
    target = tmp_path / "model"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="model"):
        export_model(build(), target)
    assert contents(target) == {"mine.txt": b"mine"}
    assert quick == []


def test_the_command_says_how_to_replace_a_folder(tmp_path):
    Trainer(load_recipe(DEBUG), tmp_path / "run").save()
    (tmp_path / "model").mkdir()
    found = run("export", tmp_path / "run", "-o", tmp_path / "model", check=2).err
    assert found == f"vpcodec: {tmp_path / 'model'}: exists (use --force to replace it)\n"


def test_an_existing_folder_is_replaced_with_force(tmp_path, debug_model, quick):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.onnx").write_bytes(b"old")
    with pytest.raises(FileExistsError, match="no config.json"):  # not a model's: not ours
        export_model(build(), target, force=True)
    (target / "config.json").write_bytes(b"{}")
    export_model(build(), target, force=True)
    assert contents(target) == contents(debug_model)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path, quick):
    Trainer(load_recipe(DEBUG), tmp_path / "run").save()
    arguments = ["export", str(tmp_path / "run"), "-o", str(tmp_path / "model")]
    with subprocess.Popen([*MODULE, *arguments]) as process:
        deadline = time.monotonic() + ENOUGH
        while not list(tmp_path.glob(".*/made/*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    assert len(list(tmp_path.iterdir())) == 2
    run(*arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "model"}


def test_force_keeps_the_old_folder_if_the_new_one_fails(tmp_path, monkeypatch, quick):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.onnx").write_bytes(b"old")
    (target / "config.json").write_bytes(b"{}")

    def refuse(folder: Path) -> None:
        raise ExportError("refused")

    monkeypatch.setattr(export, "_verify", refuse)
    with pytest.raises(ExportError):
        export_model(build(), target, force=True)
    assert contents(target) == {"old.onnx": b"old", "config.json": b"{}"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_run_exports_its_averaged_weights(tmp_path, quick):
    model = build()
    average = {name: value + 1 for name, value in model.state_dict().items()}
    state = {"step": 5, "config": model.config.model_dump(mode="json")}
    save_checkpoint(
        checkpoint_path(tmp_path, 5), {"model": model.state_dict(), "average": average}, state
    )
    export_run(tmp_path, tmp_path / "models" / "new")
    (written,) = quick
    assert written.config == model.config
    for name, value in written.state_dict().items():
        assert torch.equal(value, average[name])


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="checkpoint"):
        export_run(tmp_path, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, backend",
    [*((name, "onnx") for name in FILES), ("model.safetensors", "torch")],
)
@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_a_damaged_file_is_refused_and_named(copied, name, backend, damage):
    path = copied / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "changed" else data[:-1])
    if damage == "missing":
        path.unlink()
    with pytest.raises(ModelError, match=name):
        Codec.from_pretrained(copied, backend=backend)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-3],
        lambda text: "[]",
        lambda text: text.replace('"fingerprint"', '"mark"'),
        lambda text: text.replace('"strides"', '"steps"'),
        lambda text: text.replace('"sample_rate": 16000', '"sample_rate": "fast"'),
        lambda text: text.replace('"sample_rate": 16000', '"sample_rate": 8000'),
        lambda text: text.replace('"decoder_delay": 2', '"decoder_delay": 1'),
    ],
    ids=["cut", "list", "no fingerprint", "unknown key", "wrong type", "rate", "delay"],
)
@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_a_changed_configuration_is_refused_and_named(copied, backend, change):
    path = copied / "config.json"
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    with pytest.raises(ModelError, match="config.json"):
        Codec.from_pretrained(copied, backend=backend)


def test_weights_of_another_architecture_are_refused_though_their_hash_is_right(copied, wide_model):
    shutil.copy(wide_model / "model.safetensors", copied)
    config = read_folder(copied).config
    mark = fingerprint(config, (copied / "model.safetensors").read_bytes())
    write_folder_config(copied, config, mark, list(FILES))
    with pytest.raises(ModelError, match="model.safetensors: weights do not fit"):
        Codec.from_pretrained(copied, backend="torch")
