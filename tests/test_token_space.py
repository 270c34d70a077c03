"""Files for ever: token spaces, their decoders, tables and revisions; token files of the past."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import changed_tok, refuse, run
from hub_server import Hub
from paths import RECIPES, RESOURCES

from vpcodec import Codec, read_tokens, write_tokens
from vpcodec.config import AudioConfig, ImageConfig, ModelConfig
from vpcodec.hub import bundled_folders, model_of, open_model
from vpcodec.model_folder import CONFIG, WEIGHTS, ModelError, ModelFolder, read_folder, token_space
from vpcodec.published.config import SQCodecConfig
from vpcodec.tokenfile import NoCoderError, TokenFileError, TokenReader

sys.path.insert(0, str(RESOURCES))

import make_golden as golden

pytestmark = pytest.mark.slow

INDEX = json.loads(golden.INDEX.read_text())


# ------------------------------------------------------------------------- token files of the past


@pytest.mark.parametrize("name", INDEX["files"])
def test_a_file_of_the_past_has_the_tokens_that_it_had(name: str) -> None:
    expected = dict(INDEX["files"][name])
    assert expected.pop("made_by")
    assert golden.tokens_facts(golden.FOLDER / name) == expected


@pytest.mark.parametrize("name", INDEX["files"])
def test_a_file_of_the_past_is_decoded_without_force(name: str, tmp_path: Path) -> None:
    """By the command, which finds the model itself, to the length of the original."""
    path = golden.FOLDER / name
    facts = run("info", path, "--json").json
    suffix = ".wav" if facts["kind"] == "audio" else ".png"
    run("decode", path, tmp_path / f"a{suffix}")
    size = facts["samples"] if facts["kind"] == "audio" else (facts["height"], facts["width"])
    assert size == (119_208 if facts["kind"] == "audio" else (75, 110))
    assert facts["decoded_by"] in bundled_folders()


def test_the_files_of_the_past_are_entropy_coded_wherever_there_are_tables() -> None:
    before_tables = {"image-fsp-1.tok", "image-fsp-2.tok", "image-fsp-3.tok"}
    for name in INDEX["files"]:
        with open(golden.FOLDER / name, "rb") as file:
            if name not in before_tables:
                with pytest.raises(NoCoderError):
                    TokenReader(file).read_all()
            else:
                TokenReader(file).read_all()


@pytest.mark.parametrize("name", bundled_folders())
def test_every_model_has_a_file_of_its_space_and_samples_of_its_decoder(name: str) -> None:
    """A new decoder keeps the tokens, but not the samples: run resources/make_golden.py."""
    model = read_folder(bundled_folders()[name])
    spaces = [facts["identity"] for facts in INDEX["files"].values()]  # 8 or 16 bytes
    assert any(model.space.hex().startswith(space) for space in spaces)
    assert model.fingerprint.hex() in INDEX["decoded"]


@pytest.mark.parametrize("backend", ["onnx", "torch"])
@pytest.mark.parametrize("name", bundled_folders())
def test_a_decoder_gives_the_samples_that_it_gave(name: str, backend: str) -> None:
    """Samples belong to one decoder, tokens to the space: those of other decoders are not
    compared."""
    if backend == "torch":
        pytest.importorskip("torch", reason="needs the train extra")
    codec = Codec.from_pretrained(name, backend=backend)
    expected = INDEX["decoded"][codec.fingerprint.hex()]
    values = np.array(expected["values"].split(), float)
    found = golden.samples(codec, golden.FOLDER / expected["file"])
    assert len(values) > 200
    tolerance = 1e-3 if codec.modality == "audio" else 1
    np.testing.assert_allclose(found, values, rtol=0, atol=tolerance)


def test_speech_3k_knows_the_models_that_had_its_encoder() -> None:
    """2e708758 was shipped with another decoder and other tables; ca32df31 had another encoder."""
    model = read_folder(bundled_folders()["speech-3k"])
    for mark, known in (("2e70875819c82039dbe232f7ff102e86", True), ("ca32df3141370083", False)):
        assert (bytes.fromhex(mark.ljust(32, "0")) in model.identities) == known
    assert len(model.tables) >= 2


# ------------------------------------------------------------------- what belongs to a token space

SMALL = AudioConfig(
    name="small",
    encoder_dims=(8, 16, 24),
    encoder_depths=(1, 1, 1),
    decoder_dims=(24, 16, 8),
    decoder_depths=(1, 1, 1),
    tconv_channels=8,
    attention_window=8,
    attention_heads=2,
    decoder_layers=1,
    last_dim=8,
    encoder_expansions=(4, 4, 4),
    encoder_feedforward_dim=64,
    decoder_expansions=None,
    quantizer={"type": "fsp", "levels": (5, 5, 5)},
)
SMALL_IMAGE = ImageConfig(
    name="small",
    dims=(8, 16),
    encoder_depths=(1, 1),
    decoder_depths=(1, 1),
    attention_window=2,
    attention_heads=2,
    quantizer={"type": "fsp", "levels": (5, 5, 5)},
)
OTHER: dict[type[ModelConfig], dict[str, Any]] = {  # another value of each field
    AudioConfig: {
        "name": "other",
        "description": "x",
        "license": "x",
        "decoder_dims": (32, 16, 8),
        "decoder_depths": (2, 1, 1),
        "decoder_expansions": (2, 2, 2),
        "decoder_layers": 2,
        "decoder_feedforward_dim": 32,
        "enhance_kernels": (1, 3, 5, 7),
        "enhance_dilations": (1, 2, 3, 4),
        "enhance_channels": 3,
        "last_dim": 16,
        "last_dilations": (1, 3),
        "synthesis_taps": 4,
        "noise_channels": 4,
        "decoder_delay": 3,
        "expansion": 2,
        "encoder_expansions": None,  # the same widths, from `expansion`
        "encoder_feedforward_dim": None,  # the same width, by the default
        "kind": ...,
        "sample_rate": 24_000,
        "strides": (4, 8, 3),
        "encoder_dims": (8, 16, 32),
        "encoder_depths": (1, 1, 2),
        "kernel_size": 5,
        "tconv_kernels": (1, 5, 11, 21),
        "tconv_channels": 4,
        "tconv_taps": 16,
        "attention_window": 16,
        "attention_heads": 4,
        "encoder_layers": 2,
        "quantizer": {"type": "fsp", "levels": (5, 5, 7)},
    },
    ImageConfig: {
        "name": "other",
        "description": "x",
        "license": "x",
        "decoder_depths": (2, 1),
        "decoder_layers": 2,
        "kind": ...,
        "patch_size": 4,
        "dims": (8, 24),
        "encoder_depths": (2, 1),
        "attention_window": 4,
        "attention_heads": 4,
        "encoder_layers": 2,
        "quantizer": {"type": "fsp", "levels": (5, 5, 7)},
    },
}
CASES = [
    (config, field)
    for config in (SMALL, SMALL_IMAGE)
    for field in sorted(type(config).model_fields)
]


def changed(config: ModelConfig, **fields: Any) -> ModelConfig:
    return type(config)(**config.model_dump() | fields)


def file_of(state: dict[str, Any]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in state.items()})


@pytest.mark.parametrize(
    ("config", "field"), CASES, ids=[f"{config.modality}-{field}" for config, field in CASES]
)
def test_a_field_is_part_of_the_space_if_it_changes_tokens(config: ModelConfig, field: str) -> None:
    """What is outside leaves the encoder as it is, with the same weights and the same tokens."""
    torch = pytest.importorskip("torch", reason="needs the train extra")
    from vpcodec.models import build_model

    value = OTHER[type(config)][field]
    if value is ...:
        return  # cannot be changed
    other = changed(config, **{field: value})
    assert other != config
    torch.manual_seed(0)
    first = build_model(config).eval()
    weights = file_of(first.state_dict())
    same = token_space(other, weights) == token_space(config, weights)
    assert same == (field in type(config).outside_space)
    if not same:
        return
    second = build_model(other).eval()
    for part in ("encoder", "quantizer"):
        getattr(second, part).load_state_dict(getattr(first, part).state_dict())
    assert token_space(other, file_of(second.state_dict())) == token_space(config, weights)
    shape = (1, 20 * config.hop_length)
    if config.modality == "image":
        shape = (1, 3, config.block_size, 2 * config.block_size)
    signal = torch.randn(shape, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    with torch.inference_mode():
        assert torch.equal(first.encode(signal), second.encode(signal))


def test_weights_of_encoder_and_quantizer_count_and_those_of_the_decoder_do_not() -> None:
    pytest.importorskip("torch", reason="needs the train extra")
    from vpcodec.models import build_model

    config = changed(SMALL, quantizer={"type": "simvq", "dim": 2, "codebook_size": 16})
    state = build_model(config).state_dict()
    before = token_space(config, file_of(state))
    assert {name.split(".")[0] for name in state} == {"encoder", "quantizer", "decoder"}
    for name, value in state.items():
        same = token_space(config, file_of(state | {name: value + 1})) == before
        assert same == name.startswith("decoder."), name
    first = next(name for name in state if name.startswith("encoder."))
    assert token_space(config, file_of(state | {first: state[first].half()})) != before


@pytest.mark.parametrize(
    ("field", "value", "same"), [("quantize_rate", 0.9, True), ("activation", "normal", False)]
)
def test_how_a_quantizer_was_trained_is_outside(field: str, value: object, same: bool) -> None:
    model = open_model("speech-3k")
    quantizer = model.config.quantizer.model_dump() | {field: value}
    other = changed(model.config, quantizer=quantizer)
    assert other != model.config
    weights = model.file(WEIGHTS).read_bytes()
    assert (token_space(other, weights) == model.space) == same


def test_published_models_have_two_parts_that_decode() -> None:
    assert SQCodecConfig.decoder_weights == ("decoder.", "en_decoder.")
    outside = {name for name in SQCodecConfig.model_fields if name.startswith("decoder_")}
    assert outside | {"silence", "name", "description", "license"} == SQCodecConfig.outside_space


# ---------------------------------------------------------------------- several decoders of a space


@pytest.fixture(scope="module")
def with_tables(tmp_path_factory: pytest.TempPathFactory, debug_model: Path) -> Path:
    """A model with entropy tables; its decoder has noise."""
    from vpcodec.training.entropy import add_tables

    folder = tmp_path_factory.mktemp("spaces")
    recordings = folder / "recordings"
    recordings.mkdir()
    shutil.copy(RESOURCES / "speech.wav", recordings)
    model = shutil.copytree(debug_model, folder / "model")
    add_tables(model, recordings, hidden=8, steps=20)
    return model


@pytest.fixture(scope="module")
def quiet(with_tables: Path) -> Path:
    """A model with the encoder and quantizer of `with_tables`, which is bundled while this one is
    exported: another name, a decoder of another size and without noise."""
    target = with_tables.parent / "quiet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vpcodec.export.bundled_folders", lambda: {"debug": with_tables})
        export_new_decoder(with_tables, target, None)
    return target


def export_new_decoder(folder: Path, target: Path, like: Path | None) -> None:
    import torch

    from vpcodec.backends.torch import load_model
    from vpcodec.export import export_model
    from vpcodec.models import build_model

    model = read_folder(folder)
    fields = {"name": "quiet", "noise_channels": None, "decoder_depths": (2, 1, 1)}
    torch.manual_seed(7)
    new = build_model(changed(model.config, **fields))
    for part in ("encoder", "quantizer"):
        getattr(new, part).load_state_dict(getattr(load_model(model), part).state_dict())
    export_model(new, target, like=like)


def test_a_new_decoder_reads_old_files_and_the_old_one_reads_new_files(
    with_tables: Path, quiet: Path, speech_wav: Path, tmp_path: Path
) -> None:
    """Entropy coded, with both sorts of identity."""
    old, new = Codec.from_pretrained(with_tables), Codec.from_pretrained(quiet)
    assert old.config.noise_channels and not new.config.noise_channels
    assert new.space == old.space and new.fingerprint != old.fingerprint
    old.encode_file(speech_wav, tmp_path / "a.tok")
    new.encode_file(speech_wav, tmp_path / "b.tok")
    tokens, header = read_tokens(tmp_path / "a.tok", coder=old.coder)
    assert header.fingerprint == old.space[:8]
    of_the_past = replace(header, fingerprint=old.fingerprint)
    write_tokens(tmp_path / "c.tok", tokens, of_the_past, coder=old.coder)
    for name in ("a", "b", "c"):
        with open(tmp_path / f"{name}.tok", "rb") as file, pytest.raises(NoCoderError):
            TokenReader(file).read_all()
    reached = {}
    for name in ("a", "b", "c"):
        for codec in (old, new):
            codec.decode_file(tmp_path / f"{name}.tok", tmp_path / "a.wav")
            reached[name, codec.name] = (tmp_path / "a.wav").read_bytes()
    for codec in (old, new):
        assert reached["a", codec.name] == reached["b", codec.name] == reached["c", codec.name]
    assert reached["a", old.name] != reached["a", new.name]


def test_a_new_decoder_of_a_bundled_model_has_its_tables_by_itself(
    with_tables: Path, quiet: Path, tmp_path: Path, speech_wav: Path, bundle: Callable[..., None]
) -> None:
    model, old = read_folder(quiet), read_folder(with_tables)
    model.check()
    assert model.tables and {name: model.files[name] for name in model.tables} == {
        name: old.files[name] for name in old.tables
    }
    assert model.earlier == (old.fingerprint,)
    bundle(debug=with_tables)
    Codec.from_pretrained(quiet).encode_file(speech_wav, tmp_path / "a.tok")
    run("decode", tmp_path / "a.tok", tmp_path / "a.wav")  # by the bundled model of the space
    assert run("info", tmp_path / "a.tok", "--json").json["decoded_by"] == "debug"


def test_tables_of_the_bundled_model_help_a_decoder_with_tables_of_its_own(
    with_tables: Path, quiet: Path, tmp_path: Path, speech_wav: Path, bundle: Callable[..., None]
) -> None:
    from vpcodec.training.entropy import add_tables

    Codec.from_pretrained(with_tables).encode_file(speech_wav, tmp_path / "a.tok")
    folder = shutil.copytree(quiet, tmp_path / "mine")
    files = {k: v for k, v in read_folder(folder).files.items() if not k.startswith("entropy")}
    edited(folder, files=files)
    add_tables(folder, with_tables.parent / "recordings", hidden=8, steps=20, seed=3)
    error = refuse("decode", tmp_path / "a.tok", tmp_path / "a.wav", "-m", folder)
    assert "other entropy tables" in error
    bundle(debug=with_tables)
    run("decode", tmp_path / "a.tok", tmp_path / "a.wav", "-m", folder)


def test_the_export_takes_only_after_a_model_of_the_same_space(
    with_tables: Path, tmp_path: Path, debug_model: Path
) -> None:
    other = bundled_folders()["speech-3k"]
    with pytest.raises(ModelError, match="another token space"):
        export_new_decoder(with_tables, tmp_path / "new", other)
    assert not (tmp_path / "new").exists()
    alone = read_folder(debug_model)
    assert (alone.tables, alone.earlier) == ([], ())


def test_training_the_decoder_alone_keeps_the_space(
    quiet: Path, tmp_path: Path, speech_wav: Path
) -> None:
    """Through the commands that a user types, with noise given to the decoder."""
    pytest.importorskip("accelerate", reason="needs the train extra")
    run("encode", speech_wav, tmp_path / "a.tok", "-m", quiet)
    recipe = RECIPES / "debug.yaml"
    settings = [
        *("train.decoder_only=true", "train.steps=2", "discriminator.size=none"),
        *("train.precision=fp32", "model.decoder_depths=[2, 1, 1]", "model.noise_channels=4"),
        "model.quantizer.quantize_rate=0.2",
    ]
    start = ("--run", tmp_path / "run", "--init-from", quiet / WEIGHTS)
    run("train", recipe, *start, *settings)
    run("export", tmp_path / "run", "-o", tmp_path / "noisy", "--like", quiet)
    noisy, before = read_folder(tmp_path / "noisy"), read_folder(quiet)
    assert noisy.space == before.space
    assert noisy.earlier == (*before.earlier, before.fingerprint)
    assert any(name.startswith("decoder.noise") for name in names_of(noisy))
    run("decode", tmp_path / "a.tok", tmp_path / "a.wav", "-m", noisy.path)


def names_of(model: ModelFolder) -> list[str]:
    data = model.file(WEIGHTS).read_bytes()
    return list(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))


# ------------------------------------------------------------------------------------ model folders


def edited(folder: Path, **fields: Any) -> Path:
    """Set fields of config.json; those set to ... go."""
    data = json.loads((folder / CONFIG).read_text()) | fields
    data = {name: value for name, value in data.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(data))
    return folder


def test_a_folder_without_the_new_fields_goes_on_working(tmp_path: Path, speech_wav: Path) -> None:
    folder = shutil.copytree(bundled_folders()["speech-3k"], tmp_path / "model")
    edited(folder, space=..., earlier=...)
    model = read_folder(folder)
    model.check()
    assert model.stated_space is None and model.space == open_model("speech-3k").space
    assert model.identities == {model.space, model.fingerprint}
    facts = run("info", folder, "--json").json
    assert (facts["space"], facts["earlier"]) == (model.space.hex(), [])
    run("encode", speech_wav, tmp_path / "a.tok", "-m", folder)
    old = changed_tok((tmp_path / "a.tok").read_bytes(), fingerprint=model.fingerprint)
    (tmp_path / "old.tok").write_bytes(old)  # as it was before spaces had an identity
    run("decode", tmp_path / "old.tok", tmp_path / "old.wav", "-m", folder)
    assert read_tokens(tmp_path / "a.tok")[1].fingerprint == model.space[:8]


def test_a_false_space_is_refused(tmp_path: Path, speech_wav: Path) -> None:
    folder = shutil.copytree(bundled_folders()["speech-3k"], tmp_path / "model")
    edited(folder, space="00" * 16)
    with pytest.raises(ModelError, match="the token space does not match"):
        read_folder(folder).check()
    error = refuse("encode", speech_wav, tmp_path / "a.tok", "-m", folder)
    assert "the token space does not match" in error


def test_tables_that_only_old_files_need_may_not_be_damaged(tmp_path: Path) -> None:
    folder = shutil.copytree(bundled_folders()["speech-3k"], tmp_path / "model")
    first = folder / read_folder(folder).tables[0]
    first.write_bytes(first.read_bytes()[:-1])
    coder = read_folder(folder).coder
    assert read_tokens(golden.FOLDER / "speech-3k-3.tok", coder=coder)[0].shape == (1, 902)
    with pytest.raises(TokenFileError, match=f"{first.name}: damaged or changed"):
        read_tokens(golden.FOLDER / "speech-3k-1.tok", coder=coder)
    assert "damaged or changed" in refuse("info", folder)


def test_bundled_models_are_read_once_for_many_files_and_again_when_they_change(
    bundle: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(bundled_folders()["speech-3k"], tmp_path / "model")
    bundle(mine=folder)
    read = []
    monkeypatch.setattr(
        "vpcodec.hub.read_folder", lambda path: read.append(path) or read_folder(path)
    )
    for name in ("speech-3k-1", "speech-3k-3", "speech-3k-1"):
        read_tokens(golden.FOLDER / f"{name}.tok")
    assert read == [folder]
    os.utime(folder / CONFIG, ns=(0, 0))
    read_tokens(golden.FOLDER / "speech-3k-1.tok")
    assert read == [folder, folder]


# -------------------------------------------------------------------------------------- revisions


@pytest.fixture
def bundle(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes other models the bundled ones, by name."""

    def use(**folders: Path) -> None:
        for module in ("vpcodec.hub", "vpcodec.export"):
            monkeypatch.setattr(f"{module}.bundled_folders", lambda: folders)

    return use


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path / "home")
        yield hub


@pytest.fixture(scope="module")
def exported_second(tmp_path_factory: pytest.TempPathFactory, debug_model: Path) -> Path:
    """Revision 2 of the model debug; the first is owner/debug@v1 on the Hub."""
    import torch

    from vpcodec.export import export_model
    from vpcodec.models import build_model

    first = read_folder(debug_model)
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("revisions") / "second"
    fields = {"name": "debug@2", "strides": (8, 4, 4)}
    export_model(build_model(changed(first.config, **fields)), folder)
    identities = [first.space.hex(), first.fingerprint.hex()]
    return edited(folder, revisions={"1": {"model": "owner/debug@v1", "identities": identities}})


@pytest.fixture
def second(exported_second: Path, bundle: Callable[..., None]) -> Path:
    """The same, bundled."""
    bundle(debug=exported_second)
    return exported_second


@pytest.fixture
def first_tok(tmp_path: Path, debug_model: Path, speech_wav: Path) -> Path:
    Codec.from_pretrained(debug_model).encode_file(speech_wav, tmp_path / "first.tok")
    return tmp_path / "first.tok"


def test_a_file_of_an_older_revision_is_decoded_with_that_from_the_hub(
    second: Path, first_tok: Path, debug_model: Path, tmp_path: Path, hub: Hub, monkeypatch: Any
) -> None:
    hub.add("owner/debug", debug_model)
    hub.repositories["owner/debug"].refs["v1"] = hub.repositories["owner/debug"].refs["main"]
    monkeypatch.chdir(tmp_path)
    run("decode", first_tok, "a.wav")
    run("decode", first_tok, "b.wav", "-m", debug_model)
    assert Path("a.wav").read_bytes() == Path("b.wav").read_bytes()
    assert run("info", first_tok, "--json").json["decoded_by"] == "owner/debug@v1"
    asked = len(hub.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run("decode", first_tok, "c.wav")  # from the cache
    assert Path("c.wav").exists() and len(hub.requests) == asked


def test_another_revision_says_which_one_and_where(
    second: Path, first_tok: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for model in ("debug", second):
        error = refuse("decode", first_tok, "a.wav", "-m", model)
        place = "which is at owner/debug@v1"
        assert f"made by 'debug', another revision of 'debug@2', {place}" in error
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "none"))
    assert "owner/debug@v1: cannot be fetched" in refuse("decode", first_tok, "a.wav")


def test_new_files_name_their_revision(
    second: Path, speech_wav: Path, debug_model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    run("encode", speech_wav, "a.tok", "-m", "debug")
    header = read_tokens("a.tok")[1]
    assert (header.model, header.fingerprint) == ("debug@2", read_folder(second).space[:8])
    assert model_of(header) == "debug"
    run("decode", "a.tok", "a.wav")
    future = replace(header, model="debug@3", fingerprint=bytes(16))
    write_tokens("b.tok", read_tokens("a.tok")[0], future)
    assert "'debug@3', a revision that the bundled 'debug' does not know" in refuse(
        "decode", "b.tok", "b.wav"
    )


def test_revisions_have_names(
    second: Path, debug_model: Path, hub: Hub, tmp_path: Path, monkeypatch: Any
) -> None:
    hub.add("owner/debug", debug_model)
    hub.repositories["owner/debug"].refs["v1"] = hub.repositories["owner/debug"].refs["main"]
    assert open_model("debug").config.revision == open_model("debug@2").config.revision == 2
    assert open_model("debug@1").fingerprint == read_folder(debug_model).fingerprint
    for name in ("debug@3", "debug@", "debug@v1"):
        with pytest.raises(ModelError, match="has no revision .* \\(known: 1, 2\\)"):
            open_model(name)


@pytest.mark.parametrize(
    ("name", "good"),
    [("a@2", True), ("a@10", True), ("a@1", False), ("a@0", False), ("a@", False), ("a@b", False)],
)
def test_names_of_revisions(name: str, good: bool) -> None:
    if good:
        assert AudioConfig(name=name).revision == int(name[2:])
        return
    with pytest.raises(ValueError, match="name"):
        AudioConfig(name=name)
    assert AudioConfig(name="a").revision == 1


def test_a_long_name_still_fits_a_token_file() -> None:
    assert AudioConfig(name="a" * 62 + "@2").revision == 2
    with pytest.raises(ValueError, match="name"):
        AudioConfig(name="a" * 63 + "@2")


def test_the_sha_of_tokens_is_of_their_bytes() -> None:
    """So that a decoder written from the format's description can be checked against the list."""
    name = "speech-3k-3.tok"
    tokens, _ = read_tokens(io.BytesIO((golden.FOLDER / name).read_bytes()))
    data = b"".join(int(token).to_bytes(8, "little") for token in tokens[0])
    assert hashlib.sha256(data).hexdigest() == INDEX["files"][name]["tokens"]
