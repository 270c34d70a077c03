"""A language model on disk: what was written comes back, and nothing else is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the lm extra")
import torch

from vpcodec.config import LMConfig
from vpcodec.hub import open_model
from vpcodec.lm import LanguageModel, load_lm, read_lm, write_lm
from vpcodec.model_folder import ModelError

CODEC = "speech-1k"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LMConfig(name="tiny", layers=1, width=8, heads=2, context=8, codec=CODEC)
    write_lm(LanguageModel(config, (3, 5)), open_model(CODEC).space, tmp_path / "lm")
    return tmp_path / "lm"


def edit(folder: Path, **fields: object) -> None:
    data = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(data))


def test_a_model_comes_back(folder: Path) -> None:
    found = read_lm(folder)
    model = load_lm(found)
    torch.manual_seed(0)
    again = LanguageModel(found.config, (3, 5)).eval()
    ids = torch.tensor([[model.special.bos, 3, 1, 4]])
    assert found.levels == (3, 5)
    assert torch.equal(model.log_likelihood(ids), again.log_likelihood(ids))
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}


def test_a_model_fits_its_codec_only(folder: Path) -> None:
    found = read_lm(folder)
    found.check_codec(open_model(CODEC))
    with pytest.raises(ModelError, match="made for the tokens of 'speech-1k' .*'speech-3k'"):
        found.check_codec(open_model("speech-3k"))


def test_changed_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match="damaged or changed"):
        load_lm(read_lm(folder))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layers": 64, "width": 4096}, "weights of another network"),
        ({"levels": [4096, 4096]}, "weights of another network"),
        ({"levels": [16384, 16385]}, "more than 268435456 codes or none"),
        ({"levels": []}, "more than 268435456 codes or none"),
        ({"levels": [3, True]}, "not a model description"),
        ({"space": "00"}, "not a model description"),
        ({"width": 9}, "width must be a multiple"),
        ({"kind": "audio"}, "a codec, not a language model"),
        ({"pickle": "x"}, "pickle"),
    ],
)
def test_other_descriptions_are_refused_in_one_line(folder: Path, fields, message) -> None:
    edit(folder, **fields)
    with pytest.raises(ModelError, match=message) as error:
        load_lm(read_lm(folder))
    assert "\n" not in str(error.value)


def test_the_folder_of_a_codec_is_refused() -> None:
    with pytest.raises(ModelError, match="a codec, not a language model"):
        read_lm(open_model(CODEC).path)
