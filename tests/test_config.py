from __future__ import annotations

from pathlib import Path

import pytest

from vpcodec.config import ConfigError, ModelConfig, parse_model
from vpcodec.recipe import load_recipe

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml"))
DEBUG = next(path for path in RECIPES if path.stem == "debug")
SPEECH_3K = next(path for path in RECIPES if path.stem == "speech_3k")


@pytest.fixture
def needs_yaml() -> None:
    pytest.importorskip("yaml", reason="needs the train extra")


@pytest.fixture
def recipe(tmp_path: Path, needs_yaml: None) -> Path:
    """The smallest recipe: a name."""
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name: small}\n")
    return path


@pytest.mark.parametrize(
    "fields, where",
    [
        ({"hop": 96}, "hop"),
        ({"quantizer": {"type": "fsp", "level": [9, 9]}}, "quantizer.level"),
        ({"quantizer": {"type": "vector"}}, "quantizer.type"),
        ({"quantizer": {"activation": "relu"}}, "quantizer.activation"),
        ({"quantizer": {"levels": [9, 1]}}, "quantizer.levels.1"),
        ({"quantizer": {"quantize_rate": 1.5}}, "quantizer.quantize_rate"),
        ({"sample_rate": "fast"}, "sample_rate"),
        ({"sample_rate": 0}, "sample_rate"),
        ({"sample_rate": 22050.5}, "sample_rate"),
        ({"strides": 8}, "strides"),
        ({"strides": [8, "four", 3]}, "strides.1"),
        ({"strides": [8, 0, 3]}, "strides.1"),
        ({"decoder_delay": 0}, "decoder_delay"),
        ({"encoder_layers": -1}, "encoder_layers"),
        ({"kind": "video"}, "kind"),
        ({"name": ""}, "name"),
        ({"name": None}, "name"),
    ],
)
def test_a_wrong_field_is_named_by_its_path(fields, where):
    with pytest.raises(ConfigError, match=f"^{where}: "):
        parse_model({"name": "m"} | fields)


@pytest.mark.parametrize("data", [{}, [], None, "m"])
def test_a_model_needs_a_mapping_with_a_name(data):
    with pytest.raises(ConfigError):
        parse_model(data)


@pytest.mark.parametrize(
    "field, value",
    [
        ("encoder_dims", [32, 96]),
        ("encoder_depths", [1, 2, 2, 2]),
        ("decoder_dims", [256]),
        ("decoder_depths", []),
        ("enhance_dilations", [1, 2]),
        ("tconv_taps", 7),
        ("attention_heads", 5),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        parse_model({"name": "m", field: value})


PER_STRIDE = ("strides", "encoder_dims", "encoder_depths", "decoder_dims", "decoder_depths")


@pytest.mark.parametrize(
    "fields, where",
    [
        (dict.fromkeys(PER_STRIDE, []), "strides"),
        ({"tconv_kernels": []}, "tconv_kernels"),
        ({"enhance_kernels": [], "enhance_dilations": []}, "enhance_kernels"),
        ({"quantizer": {"levels": []}}, "levels"),
    ],
    ids=["strides", "tconv_kernels", "enhance_kernels", "levels"],
)
def test_lists_that_a_model_cannot_do_without_are_not_empty(fields, where):
    with pytest.raises(ConfigError, match=where):
        parse_model({"name": "m"} | fields)


def test_a_codebook_beyond_exact_arithmetic_is_refused():
    with pytest.raises(ConfigError, match="levels"):
        parse_model({"name": "m", "quantizer": {"levels": [9] * 20}})


def test_a_model_survives_its_own_json():
    config = ModelConfig(name="m", strides=(6, 4, 4), quantizer={"levels": (7,) * 6})
    assert parse_model(config.model_dump(mode="json")) == config


def test_rates_follow_from_the_configuration():
    config = ModelConfig(name="m", sample_rate=16_000, strides=(10, 9, 3))
    assert config.hop_length == 270
    assert config.frame_rate == pytest.approx(59.26, abs=0.005)
    config = ModelConfig(name="m", strides=(10, 9, 3), quantizer={"levels": [7] * 6})
    assert config.codebook_size == 117_649
    assert config.bitrate == pytest.approx(998, abs=0.5)


def test_rates_of_speech_3k(needs_yaml):
    config = load_recipe(SPEECH_3K).model
    assert (config.name, config.sample_rate, config.hop_length) == ("speech-3k", 16_000, 96)
    assert config.frame_rate == pytest.approx(166.67, abs=0.005)
    assert config.codebook_size == 250_047
    assert config.bitrate == pytest.approx(2988.6, abs=0.05)
    assert config.latency <= 0.020


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path, needs_yaml):
    recipe = load_recipe(path)
    assert recipe.model.name and recipe.model.description and recipe.model.license != "unknown"


@pytest.mark.parametrize(
    "override, section, field, value",
    [
        ("train.steps=7", "train", "steps", 7),
        ("optim.lr=0.25", "optim", "lr", 0.25),
        ("optim.lr=3e-4", "optim", "lr", 3e-4),
        ("optim.final_lr=1E-6", "optim", "final_lr", 1e-6),
        ("optim.betas=[0.8, 0.9]", "optim", "betas", (0.8, 0.9)),
        ("model.strides=[6,4,4]", "model", "strides", (6, 4, 4)),
        ("data.train=/some/folder", "data", "train", "/some/folder"),
        ("data.train=a=b", "data", "train", "a=b"),
        ("data.train=null", "data", "train", None),
        ("optim.name=muon", "optim", "name", "muon"),
    ],
)
def test_an_override_sets_one_field(recipe, override, section, field, value):
    plain, changed = load_recipe(recipe), load_recipe(recipe, [override])
    assert getattr(getattr(changed, section), field) == value
    restored = getattr(changed, section).model_copy(
        update={field: getattr(getattr(plain, section), field)}
    )
    assert changed.model_copy(update={section: restored}) == plain


def test_overrides_apply_in_order_and_reach_nested_sections(recipe):
    overrides = ["train.steps=5", "train.steps=6", "model.quantizer.levels=[5, 5]"]
    changed = load_recipe(recipe, overrides)
    assert changed.train.steps == 6
    assert changed.model.codebook_size == 25


@pytest.mark.parametrize(
    "override, where",
    [
        ("optim.lr", "optim.lr"),
        ("optim.speed=1", "optim.speed"),
        ("speed=1", "speed"),
        ("model.name.first=x", "name"),
        ("train.steps=many", "train.steps"),
        ("train.steps=0", "train.steps"),
        ("optim.lr=-1", "optim.lr"),
        ("optim.lr=", "optim.lr"),
        ("model.strides=[8, 4", "model.strides"),
        ("loss.mel_bands=[0]", "mel_bands"),
        ("model.encoder_dims=[32]", "encoder_dims"),
    ],
)
def test_an_override_that_cannot_be_is_refused_and_named(recipe, override, where):
    with pytest.raises(ConfigError, match=where):
        load_recipe(recipe, [override])


def test_no_fft_size_at_all_is_refused(recipe):
    with pytest.raises(ConfigError, match="fft_sizes"):
        load_recipe(recipe, ["loss.fft_sizes=[]", "loss.mel_bands=[]"])


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"model: [unclosed\n", "not a YAML file"),
        (b"\xff\xfe\x00", "not a YAML file"),
        (b"- model\n", "mapping"),
        (b"", "mapping"),
        (b"model: {name: m}\nsteps: 5\n", "steps: "),
        (b"train: {steps: 5}\n", "model: "),
        (b"model: {name: m}\ndata: {crop_seconds: long}\n", "data.crop_seconds: "),
    ],
)
def test_a_recipe_file_that_cannot_be_used_is_named(tmp_path, needs_yaml, content, reason):
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"odd.yaml: .*{reason}"):
        load_recipe(path)


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_recipe_that_cannot_be_read_is_named(tmp_path, needs_yaml, name):
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_recipe(tmp_path / name)
