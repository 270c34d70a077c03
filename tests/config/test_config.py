from __future__ import annotations

import pytest

from vpcodec.config import AudioConfig, ConfigError, ImageConfig, parse_model
from vpcodec.model_folder import fingerprint


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
        ("encoder_expansions", [4, 4]),
        ("decoder_expansions", []),
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
    config = AudioConfig(name="m", strides=(6, 4, 4), quantizer={"levels": (7,) * 6})
    assert parse_model(config.model_dump(mode="json")) == config


def test_rates_follow_from_the_configuration():
    config = AudioConfig(name="m", sample_rate=16_000, strides=(10, 9, 3))
    assert config.hop_length == 270
    assert config.frame_rate == pytest.approx(59.26, abs=0.005)
    config = AudioConfig(name="m", strides=(10, 9, 3), quantizer={"levels": [7] * 6})
    assert config.codebook_size == 117_649
    assert config.bitrate == pytest.approx(998, abs=0.5)


@pytest.mark.parametrize("kind, expected", [("audio", AudioConfig), ("image", ImageConfig)])
def test_the_kind_tells_what_a_model_is(kind, expected):
    config = parse_model({"name": "m", "kind": kind})
    assert type(config) is expected and config.kind == kind
    assert parse_model(config.model_dump(mode="json")) == config


def test_a_model_without_a_kind_is_of_audio():
    assert isinstance(parse_model({"name": "m"}), AudioConfig)


@pytest.mark.parametrize(
    "fields, where",
    [
        ({"kind": "video"}, "kind: must be one of audio, image"),
        ({"kind": ["image"]}, "kind: "),
        ({"strides": [8]}, "strides: "),
        ({"dims": []}, "dims: "),
        ({"dims": [8, 16]}, "encoder_depths needs 2 entries"),
        ({"decoder_depths": [1]}, "decoder_depths needs 3 entries"),
        ({"attention_heads": 7}, "multiple of attention_heads"),
        ({"attention_window": 0}, "attention_window: "),
        ({"patch_size": 64}, "patch_size: "),
    ],
)
def test_image_models_that_cannot_be_are_refused_and_named(fields, where):
    with pytest.raises(ConfigError, match=where):
        parse_model({"name": "m", "kind": "image"} | fields)


def test_sizes_of_an_image_model_follow_from_its_configuration():
    config = ImageConfig(name="m", patch_size=4, dims=(8, 16, 32), attention_window=4)
    assert config.hop_length == 16
    assert config.block_size == 64
    config = ImageConfig(name="m", quantizer={"levels": (8, 8, 8, 6, 5)})
    assert config.hop_length == 8
    assert config.codebook_size == 15_360
    assert config.bits_per_pixel == pytest.approx(13.907 / 64, rel=1e-4)


@pytest.mark.parametrize(
    "quantizer, knobs",
    [
        ({"type": "fsp", "levels": [5, 5]}, {"rejection": "vector", "eta": 1.0}),
        (
            {"type": "vp", "dim": 3, "codebook_size": 64},
            {"eta": 1.5, "mh_steps": 1, "neighbors": 8, "search_size": 8192, "queue_size": None}
            | {"push_size": 1024, "metropolis": True, "calibrate_every": 300},
        ),
        ({"type": "fsq", "levels": [5, 5]}, {"noise_rate": 0.5}),
        (
            {"type": "vq", "dim": 3, "codebook_size": 64},
            {"decay": None, "commitment": 0.25, "restart_below": 0.1, "push_size": 256},
        ),
        (
            {"type": "lfq", "dim": 7},
            {"entropy_weight": 0.1, "commitment": 0.25, "temperature": 0.01},
        ),
    ],
    ids=lambda value: value.get("type"),
)
def test_knobs_of_training_in_older_descriptions_are_no_part_of_a_model(quantizer, knobs):
    """Neither of what it is nor of its fingerprint."""
    plain = parse_model({"name": "m", "quantizer": quantizer})
    older = parse_model({"name": "m", "quantizer": quantizer | knobs})
    assert older == plain
    assert fingerprint(older, b"") == fingerprint(plain, b"")
    assert not knobs.keys() & older.model_dump()["quantizer"].keys()
