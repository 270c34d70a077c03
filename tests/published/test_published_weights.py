"""The catalog of published models, and reading their weights: what is not sound is refused."""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from helpers import flipped
from official import random_weights, save_modules

from vpcodec.config import FSQConfig
from vpcodec.model_folder import ModelError
from vpcodec.published import MODULES, PUBLISHED, is_published, look_up
from vpcodec.published.architecture import load
from vpcodec.published.config import SQCodecConfig
from vpcodec.published.network import SQCodecAutoencoder
from vpcodec.published.tensors import expected_shapes, fold
from vpcodec.published.weights import read_weights

SMALL = SQCodecConfig(  # with all parts of the published ones
    name="small",
    architecture="sqcodec",
    quantizer=FSQConfig(levels=(7, 7)),
    strides=(3,),
    encoder_dims=(4, 8),
    encoder_depths=(1, 1),
    decoder_strides=(3,),
    decoder_dims=(8, 4),
    decoder_depths=(1,),
    feature_dim=8,
    attention_window=10,
    token_stride=2,
    encoder_layers=1,
    encoder_outer_layers=1,
    decoder_layers=1,
    decoder_outer_layers=1,
)
MODULE = "quantizer"  # the one that is spoilt

# What the authors give: tokens per second, bit/s (to 0.1), millions of parameters (L3AC only).
FACTS = {
    "zhai-lw/L3AC:0k75bps": (44.44, 748.6, 11.29),
    "zhai-lw/L3AC:1kbps": (59.26, 998.2, 11.27),
    "zhai-lw/L3AC:1k5bps": (88.89, 1497.3, 11.25),
    "zhai-lw/L3AC:3kbps": (166.67, 2988.6, 10.31),
    "zhai-lw/SQCodec:0k75bps": (44.44, 748.6, None),
    "zhai-lw/SQCodec:1k5bps": (88.89, 1497.3, None),
    "zhai-lw/SQCodec:3kbps": (177.78, 2994.5, None),
    "zhai-lw/SQCodec:6kbps": (355.56, 5989.0, None),
    "zhai-lw/SQCodec:12kbps": (666.67, 11_954.6, None),
    "zhai-lw/SQCodec:12kbps_24khz": (666.67, 11_954.6, None),
    "zhai-lw/SQCodec:24kbps_24khz": (1333.33, 23_909.1, None),
}


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return random_weights(SMALL)


@pytest.fixture
def files(weights: dict[str, np.ndarray], tmp_path: Path) -> dict[str, Path]:
    """The five files of a sound model, a small one."""
    return save_modules(weights, tmp_path)


def refused(files: dict[str, Path], module: str = MODULE) -> str:
    """What `read_weights` says against the file of a module, without the file's name."""
    with pytest.raises(ModelError) as caught:
        read_weights(files, SMALL)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{files[module]}: ")
    return line.removeprefix(f"{files[module]}: ")


def state_of(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def rezipped(path: Path, change: Callable[[str, bytes], bytes], **options: Any) -> None:
    """Write a zip file again, its entries changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))


# ---------------------------------------------------------------------------------------- catalog


def test_rates_are_the_published_ones():
    assert {published.spec for published in PUBLISHED} == set(FACTS)
    for published in PUBLISHED:
        tokens, bits, _ = FACTS[published.spec]
        assert published.config.frame_rate == pytest.approx(tokens, abs=0.005)
        assert published.config.bitrate == pytest.approx(bits, abs=0.05)


def test_numbers_of_parameters_are_the_published_ones():
    counted = [p for p in PUBLISHED if FACTS[p.spec][2] is not None]
    assert len(counted) == 4
    for published in counted:
        count = sum(map(math.prod, expected_shapes(published.config).values()))
        assert count / 1e6 == pytest.approx(FACTS[published.spec][2], abs=0.005)


def test_models_of_24_khz_run_at_24_khz():
    """The authors' description of one of them says 16 kHz."""
    for published in PUBLISHED:
        expected = 24_000 if published.name.endswith("24khz") else 16_000
        assert published.config.sample_rate == expected


def test_files_are_where_the_authors_put_them():
    assert look_up("zhai-lw/L3AC:1kbps").files == tuple(
        f"weights/1kbps.v1/{module}.pt" for module in MODULES
    )
    assert look_up("zhai-lw/SQCodec:12kbps_24khz").files[0] == "weights/12kbps_24khz.v0/encoder.pt"


def test_names_are_those_of_model_files():
    names = [published.config.name for published in PUBLISHED]
    assert len(set(names)) == len(names)
    assert look_up("zhai-lw/L3AC:1kbps").config.name == "l3ac-1kbps"
    assert look_up("zhai-lw/SQCodec:12kbps_24khz").config.name == "sqcodec-12kbps-24khz"


def test_a_published_name_is_told_by_its_form():
    assert is_published("zhai-lw/L3AC:1kbps")
    assert is_published("zhai-lw/L3AC:7kbps")  # an unknown one: `look_up` says which there are
    assert is_published("zhai-lw/L3AC")
    for name in ("zhai-lw/L3A", "speech-3k", "someone/L3AC:1kbps", "C:model", "", ":1kbps"):
        assert not is_published(name)


def test_an_unknown_model_is_refused_with_those_there_are():
    with pytest.raises(ModelError, match=re.escape("zhai-lw/L3AC:0k75bps")) as caught:
        look_up("zhai-lw/L3AC:7kbps")
    assert "7kbps" in str(caught.value) and "SQCodec" not in str(caught.value)
    with pytest.raises(ModelError, match="zhai-lw/SQCodec:24kbps_24khz"):
        look_up("someone/thing:1kbps")


# ----------------------------------------------------------------------------------- what is sound


@pytest.mark.parametrize("spec", ["zhai-lw/SQCodec:0k75bps", "zhai-lw/L3AC:3kbps"])
def test_weights_come_back_as_saved(spec, tmp_path):
    config = look_up(spec).config
    weights = random_weights(config)
    read = read_weights(save_modules(weights, tmp_path), config)
    assert list(read) == list(expected_shapes(config))
    for name, tensor in read.items():
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), weights[name])


def test_the_empty_tensor_of_the_first_version_is_expected():
    low, high = (look_up(f"zhai-lw/SQCodec:{name}").config for name in ("1k5bps", "3kbps"))
    assert expected_shapes(low)["en_encoder.cache_token"] == (1, 0, 256)
    assert "en_encoder.cache_token" not in expected_shapes(high)
    assert "en_encoder.cache_token" not in expected_shapes(look_up("zhai-lw/L3AC:1kbps").config)


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.config.name)
def test_random_weights_have_the_expected_shapes(published):
    shapes = expected_shapes(published.config)
    weights = random_weights(published.config)
    assert {name: value.shape for name, value in weights.items()} == shapes
    assert all(np.isfinite(value).all() for value in weights.values())
    assert all(value.any() for value in weights.values() if value.size)


def test_random_weights_are_the_same_everywhere():
    """Golden data are of no use otherwise. Those of another seed are others."""
    name = "quantizer.project_in.bias"
    values = random_weights(SMALL)[name]
    np.testing.assert_allclose(values, [-0.010055220686, 0.034347720444], rtol=1e-6)
    assert (values != random_weights(SMALL, seed=1)[name]).all()


def test_parameters_are_read_as_tensors(files):
    """A module's `named_parameters`, saved, hold the same."""
    state = {name: torch.nn.Parameter(value) for name, value in state_of(files[MODULE]).items()}
    torch.save(state, files[MODULE])
    read = read_weights(files, SMALL)
    assert not any(tensor.requires_grad for tensor in read.values())


# ------------------------------------------------------------------------------ what is no file


def test_a_missing_file_is_refused(files):
    files[MODULE].unlink()
    assert refused(files) == "No such file or directory"


def test_a_folder_is_refused(files):
    files[MODULE].unlink()
    files[MODULE].mkdir()
    assert refused(files) == "Is a directory"


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(files, share):
    data = files[MODULE].read_bytes()
    files[MODULE].write_bytes(data[: int(share * len(data))])
    assert refused(files) in (
        "truncated or damaged",
        "not a checkpoint of PyTorch in the zip format",
    )


def test_what_is_no_checkpoint_is_refused(files):
    for data in (b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n", b"\0" * 5000):
        files[MODULE].write_bytes(data)
        assert refused(files) == "not a checkpoint of PyTorch in the zip format"


def test_another_zip_file_is_refused(files):
    with zipfile.ZipFile(files[MODULE], "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert refused(files) == "damaged, or not a checkpoint of PyTorch"


def test_the_old_formats_of_pytorch_are_refused(files):
    state = state_of(files[MODULE])
    torch.save(state, files[MODULE], _use_new_zipfile_serialization=False)
    assert refused(files) == "not a checkpoint of PyTorch in the zip format"
    with tarfile.open(files[MODULE], "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    assert refused(files) == "not a checkpoint of PyTorch in the zip format"


def test_an_old_file_before_a_sound_one_is_refused(files):
    """A zip file may begin anywhere, so that two readers can see two files."""
    sound, old = files[MODULE].read_bytes(), io.BytesIO()
    torch.save(state_of(files[MODULE]), old, _use_new_zipfile_serialization=False)
    files[MODULE].write_bytes(old.getvalue() + sound)
    assert refused(files) == "not a checkpoint of PyTorch in the zip format"


def test_every_flipped_byte_is_refused_or_harmless(files, weights):
    """Nothing but a line comes of damage, and never other weights."""
    sound = files[MODULE].read_bytes()
    told = 0
    for position in range(0, len(sound), 31):
        files[MODULE].write_bytes(flipped(sound, position))
        try:
            read = read_weights(files, SMALL)
        except ModelError as error:
            assert len(str(error).splitlines()) == 1
            told += 1
        else:
            for name in (name for name in weights if name.startswith(f"{MODULE}.")):
                np.testing.assert_array_equal(read[name].numpy(), weights[name])
    assert told > 0.5 * len(range(0, len(sound), 31))


# ------------------------------------------------------------------------------ what is too large


def test_a_file_that_is_too_large_is_refused(files):
    with open(files[MODULE], "ab") as file:
        file.truncate(1 << 30)  # takes no place on the disk
    assert re.fullmatch(r"1073741824 bytes, where at most \d+ are expected", refused(files))


def test_a_zip_bomb_is_refused_before_it_is_unpacked(files):
    bomb = bytes(50_000_000)
    rezipped(
        files[MODULE],
        lambda name, data: bomb if name.endswith("data.pkl") else data,
        compression=zipfile.ZIP_DEFLATED,
    )
    assert files[MODULE].stat().st_size < 100_000
    assert re.fullmatch(r"unpacks to \d+ bytes, where at most \d+ are expected", refused(files))


def test_a_compressed_file_is_refused(files):
    """PyTorch would read it; that its directory tells its size could not be relied on."""
    rezipped(files[MODULE], lambda _, data: data, compression=zipfile.ZIP_DEFLATED)
    assert refused(files) == "not a checkpoint of PyTorch (compressed)"


def test_a_tensor_shorter_than_it_says_is_refused(files):
    rezipped(files[MODULE], lambda name, data: data[:4] if "/data/" in name else data)
    assert refused(files) == "damaged, or not a checkpoint of PyTorch"


# --------------------------------------------------------------------------- what is no tensor


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_file_is_refused_and_does_not_run(files, tmp_path):
    trace = tmp_path / "it-ran"
    pickle.loads(pickle.dumps(Malicious(trace)))
    assert trace.exists()  # it would
    trace.unlink()
    torch.save(state_of(files[MODULE]) | {"more": Malicious(trace)}, files[MODULE])
    assert refused(files) == "holds more than tensors (nothing in it was run)"
    torch.save(Malicious(trace), files[MODULE])
    assert refused(files) == "holds more than tensors (nothing in it was run)"
    assert not trace.exists()


def test_code_in_a_file_does_not_run_whatever_the_environment_says(files, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"more": Malicious(tmp_path / "it-ran")}, files[MODULE])
    assert refused(files) == "holds more than tensors (nothing in it was run)"
    assert not (tmp_path / "it-ran").exists()


def test_a_whole_module_is_refused(files):
    torch.save(torch.nn.Linear(2, 2), files[MODULE])
    assert refused(files) == "holds more than tensors (nothing in it was run)"


@pytest.mark.parametrize("value", [torch.zeros(3), [torch.zeros(3)], "text", {0: torch.zeros(3)}])
def test_what_is_no_dictionary_of_tensors_is_refused(files, value):
    torch.save(value, files[MODULE])
    assert refused(files) == "not a dictionary of tensors"


def test_a_value_that_is_no_tensor_is_refused(files):
    torch.save(state_of(files[MODULE]) | {"epoch": 7}, files[MODULE])
    assert refused(files) == "not a tensor: 'epoch'"


# --------------------------------------------------------------------------- other tensors


def spoil(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    state = state_of(path)
    change(state)
    torch.save(state, path)


def test_missing_tensors_are_refused(files):
    spoil(files[MODULE], lambda state: state.pop("project_in.bias"))
    assert refused(files) == "missing: 'project_in.bias'"
    spoil(files[MODULE], lambda state: state.clear())
    assert refused(files) == "missing: 'project_in.weight' and 3 more"


def test_unexpected_tensors_are_refused(files):
    spoil(files[MODULE], lambda state: state.update({"a\nb": torch.zeros(1), "c": torch.zeros(1)}))
    assert refused(files) == r"unexpected: 'a\nb' and 1 more"
    spoil(files[MODULE], lambda state: (state.pop("a\nb"), state.pop("c")))
    spoil(files[MODULE], lambda state: state.update({"x" * 9_999: torch.zeros(1)}))
    assert len(refused(files)) < 200


def test_a_tensor_of_another_shape_is_refused(files):
    def transpose(state: dict[str, Any]) -> None:
        state["project_in.weight"] = state["project_in.weight"].T.contiguous()

    spoil(files[MODULE], transpose)
    assert refused(files) == ("of another shape: 'project_in.weight', (8, 2) instead of (2, 8)")


@pytest.mark.parametrize("other", [{"strides": (1,), "decoder_strides": (1,)}, {"feature_dim": 16}])
def test_weights_of_another_model_are_refused(files, other):
    with pytest.raises(ModelError, match="of another shape"):
        read_weights(files, SMALL.model_copy(update=other))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (torch.Tensor.half, "float16"),
        (torch.Tensor.bfloat16, "bfloat16"),
        (torch.Tensor.int, "int32"),
        (torch.Tensor.to_sparse, "float32"),
        (lambda tensor: tensor.to("meta"), "float32"),
    ],
)
def test_tensors_of_another_kind_are_refused(files, change, kind):
    """Nobody published such: wider ones of the same values were not the same file."""
    spoil(files[MODULE], lambda state: state.update(dict.fromkeys(state, change(torch.ones(2)))))
    assert refused(files) == f"not plain float32: 'project_in.weight' and 3 more, {kind}"


def test_doubles_are_refused(files):
    def widen(state: dict[str, Any]) -> None:
        state["project_in.bias"] = state["project_in.bias"].double()

    spoil(files[MODULE], widen)
    assert refused(files) == "not plain float32: 'project_in.bias', float64"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(files, value):
    spoil(files[MODULE], lambda state: state["project_out.weight"][5, 1].fill_(value))
    assert refused(files) == "not finite: 'project_out.weight'"


@pytest.mark.parametrize("module", MODULES)
def test_every_file_is_checked(files, module):
    os.truncate(files[module], files[module].stat().st_size // 2)
    assert refused(files, module) == "truncated or damaged"


# ------------------------------------------------------------------------------- the table of names


def test_the_state_of_a_model_is_what_folding_gives_and_loads_again(weights):
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
    model = load(SMALL, tensors)
    state = model.state_dict()
    assert {k: v.shape for k, v in fold(tensors, SMALL).items()} == {
        k: v.shape for k, v in state.items()
    }
    other = SQCodecAutoencoder(SMALL)
    other.load_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())


def test_a_missing_tensor_is_named(weights):
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
    name = "decoder.blocks.1.0.module.act.alpha"
    del tensors[name]
    with pytest.raises(RuntimeError, match=f"not the published tensors .*{re.escape(name)}"):
        load(SMALL, tensors)
