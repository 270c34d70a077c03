from __future__ import annotations

from pathlib import Path

import pytest
from paths import RECIPES

pytest.importorskip("yaml", reason="needs the train extra")

from vpcodec.config import ConfigError
from vpcodec.recipe import (
    AudioRecipe,
    ImageRecipe,
    load_recipe,
    parse_recipe,
)
from vpcodec.recipe.audio import AudioCorpus, LibriTTSCorpus
from vpcodec.recipe.image import ImageCorpus


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The smallest recipe: a name."""
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name: small}\n")
    return path


@pytest.mark.parametrize(
    "override, section, field, value",
    [
        ("train.steps=7", "train", "steps", 7),
        ("optim.lr=0.25", "optim", "lr", 0.25),
        ("optim.lr=3e-4", "optim", "lr", 3e-4),
        ("optim.final_lr=1E-6", "optim", "final_lr", 1e-6),
        ("optim.betas=[0.8, 0.9]", "optim", "betas", (0.8, 0.9)),
        ("model.strides=[6,4,4]", "model", "strides", (6, 4, 4)),
        ("data.train=/some/folder", "data", "train", (AudioCorpus(path="/some/folder"),)),
        ("data.train=a=b", "data", "train", (AudioCorpus(path="a=b"),)),
        ("data.train=null", "data", "train", ()),
        ("data.train={path: x, weight: 2}", "data", "train", (AudioCorpus(path="x", weight=2),)),
        (
            "data.train=[x, {type: libritts, subsets: [dev-clean]}]",
            "data",
            "train",
            (AudioCorpus(path="x"), LibriTTSCorpus(subsets=("dev-clean",))),
        ),
        ("data.noise=rain/", "data", "noise", AudioCorpus(path="rain/")),
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
        ("optim.lr=true", "optim.lr: .*true or false"),
        ("optim.lr=.inf", "optim.lr: .*finite"),
        ("optim.final_lr=1", "optim: final_lr"),
        ("optim.betas=[0.9, 1]", "optim.betas.1"),
        ("data.batch_size='2'", "data.batch_size: should be a number"),
        ("train.compile=1", "train.compile: should be true or false"),
        ("train.seed=-1", "train.seed"),
        ("=5", "section.field=value"),
        (".x=1", "section.field=value"),
        ("data.gain_db=[0, .nan]", "data.gain_db.1"),
        ("data.crop_seconds=.inf", "data.crop_seconds: .*finite"),
        ("eval.max_seconds=0.3", "eval.max_seconds"),
        ("eval.data={type: huggingface, path: x}", "eval.data.type: must be one of audio"),
        ("loss.fft_sizes=[2]", "loss.fft_sizes.0"),
        ("loss={fft_sizes: [256, 256], mel_bands: [16, 16]}", "loss: .*duplicate"),
        ("loss={fft_sizes: [256], mel_bands: [65]}", "loss: .*quarter"),
        ("loss={wave: 0, stft: 0, mel: 0}", "loss: .*weight"),
        ("discriminator={size: small, periods: [20000]}", "discriminator.periods"),
        ("model.quantizer={type: vp, codebook_size: 2000000}", "model.quantizer.codebook_size"),
        ("quantizer.type=vp", "quantizer.type is vp, but the model has fsp"),
        ("quantizer.queue_size=5", "quantizer.queue_size"),
        ("quantizer.rejection=never", "quantizer.rejection"),
        ("quantizer=vp", "quantizer"),
        ("model.strides=[8, 4", "model.strides"),
        ("loss.mel_bands=[0]", "mel_bands"),
        ("model.encoder_dims=[32]", "encoder_dims"),
        ("data.train=[x, {weight: 2}]", "data.train.1.path"),
        ("data.train={path: x, weight: 0}", "data.train.0.weight"),
        ("data.train={type: libritts, subsets: [clean]}", "data.train.0.subsets.0"),
        ("data.train={type: tape, path: x}", "data.train.0.type: must be one of audio"),
        ("data.noise={type: huggingface, path: x}", "data.noise.type: must be one of audio"),
        ("data.gain_db=[6, -6]", "data: .*gain_db"),
        ("discriminator.size=huge", "discriminator.size"),
        ("discriminator={size: small, periods: [], fft_sizes: []}", "discriminator: .*periods"),
        ("discriminator={size: small, start_step: 1000}", "start_step is 1000"),
        ("discriminator={size: small, fft_sizes: [65536]}", "discriminator.fft_sizes"),
        ("train={precision: fp16, device: cpu}", "train: .*fp16"),
        ("data={train: {type: huggingface, path: x}, workers: 2}", "data: .*workers"),
    ],
)
def test_an_override_that_cannot_be_is_refused_and_named(recipe, override, where):
    with pytest.raises(ConfigError, match=where):
        load_recipe(recipe, [override])


VP = "model.quantizer={type: vp, dim: 3, codebook_size: 64}"


@pytest.mark.parametrize(
    "override, where",
    [
        ("quantizer.queue_size=50", "quantizer.queue_size must be at least .* 64"),
        ("quantizer={neighbors: 9, search_size: 8}", "quantizer: neighbors"),
        ("quantizer.rejection=vector", "quantizer.rejection"),
        ("quantizer.queue=5", "quantizer.queue: "),
    ],
)
def test_knobs_that_a_quantizer_does_not_have_are_refused_and_named(recipe, override, where):
    with pytest.raises(ConfigError, match=where):
        load_recipe(recipe, [VP, override])


def test_the_section_of_the_quantizer_is_of_the_one_that_the_model_has(recipe):
    found = load_recipe(recipe, [VP, "quantizer.push_size=7"])
    assert found.quantizer.type == "vp" and found.quantizer.options()["push_size"] == 7
    assert found.calibrate_every == 2000 and load_recipe(recipe).calibrate_every == 0
    assert parse_recipe(found.model_dump(mode="json")) == found
    assert AudioRecipe(model=found.model).quantizer.type == "vp"


def test_knobs_in_the_model_are_read_as_those_of_the_recipe(recipe):
    """As recipes had them before."""
    knobs = "queue_size: 999, calibrate_every: 3"
    old = VP.replace("}", f", {knobs}}}")
    assert load_recipe(recipe, [old]) == load_recipe(recipe, [VP, f"quantizer={{{knobs}}}"])
    assert load_recipe(recipe, [old, "quantizer.queue_size=100"]).quantizer.queue_size == 100
    with pytest.raises(ConfigError, match="model.quantizer.queue: "):
        load_recipe(recipe, [VP.replace("}", ", queue: 999}")])


IMAGE = ["model.kind=image"]


def test_the_kind_of_the_model_tells_what_a_recipe_is(recipe):
    assert isinstance(load_recipe(recipe), AudioRecipe)
    found = load_recipe(recipe, [*IMAGE, "data.train=photos/", "loss.ms_ssim=0.1"])
    assert isinstance(found, ImageRecipe)
    assert found.data.train == (ImageCorpus(path="photos/"),)
    assert parse_recipe(found.model_dump(mode="json")) == found


def test_a_stream_of_images_has_a_column_of_its_own(recipe):
    found = load_recipe(recipe, [*IMAGE, "data.train={type: huggingface, path: x}"])
    assert found.data.train[0].column == "image" and found.data.streams


@pytest.mark.parametrize(
    "override, where",
    [
        ("model.kind=video", "model.kind: must be one of audio, image"),
        ("model.strides=[8]", "model.strides"),
        ("data.crop_seconds=1", "data.crop_seconds"),
        ("data.crop_size=100", "data.crop_size must be a multiple of 64"),
        ("data={crop_size: 128, resize: 64}", "data: resize is 64"),
        ("data.train={type: libritts}", "data.train.0.type: must be one of image, huggingface"),
        ("data={train: {type: huggingface, path: x}, workers: 2}", "data: .*workers"),
        ("eval.data={type: huggingface, path: x}", "eval.data.type: "),
        ("eval.data={path: x, wight: 1}", "eval.data.wight: "),
        ("data.train={path: x, weight: -1}", "data.train.0.weight: "),
        ("eval.best=pesq_wb", "eval.best"),
        ("loss.mel=1", "loss.mel"),
        ("loss={l1: 0}", "loss: at least one of l1"),
        ("discriminator={size: small, layers: 5}", "data.crop_size is too small"),
        ("discriminator={size: small, start_step: 1000}", "start_step is 1000"),
    ],
)
def test_an_image_recipe_that_cannot_be_is_refused_and_named(recipe, override, where):
    with pytest.raises(ConfigError, match=where):
        load_recipe(recipe, ["model.kind=image", override])


@pytest.mark.parametrize(
    "overrides, where",
    [
        (["loss.perceptual=1", "data.crop_seconds=31"], "data.crop_seconds is 31"),
        (
            ["discriminator.size=small", "loss.adversarial=0", "loss.feature=0"],
            "loss.adversarial or loss.feature",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_refused(recipe, overrides, where):
    load_recipe(recipe, overrides[:1])
    with pytest.raises(ConfigError, match=where):
        load_recipe(recipe, overrides)


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
def test_a_recipe_file_that_cannot_be_used_is_named(tmp_path, content, reason):
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"odd.yaml: .*{reason}"):
        load_recipe(path)


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_recipe_that_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_recipe(tmp_path / name)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=3", "command line: optim.lrr: .*did you mean lr"),
        ("optm.lr=3", "command line: optm: .*did you mean optim"),
        ("optim.lr=abc", "command line: optim.lr: should be a number"),
        ("model.quantizer.level=[5]", "command line: model.quantizer.level: .*did you mean levels"),
        ("data.train=[{path: x, wight: 2}]", "command line: data.train.0.wight: .*mean weight"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_blamed_on_it(override, words):
    with pytest.raises(ConfigError, match=words):
        load_recipe(RECIPES / "speech_3k.yaml", ["optim.betas=[0.9, 0.99]", override])


def test_what_is_wrong_in_the_file_is_blamed_on_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text((RECIPES / "speech_3k.yaml").read_text() + "\nevalu: {}\n")
    with pytest.raises(ConfigError, match=f"^{path}: evalu: .*did you mean eval"):
        load_recipe(path, ["optim.lr=1e-3"])


def test_a_model_without_a_name_has_that_of_its_run_or_file():
    path = RECIPES / "speech_3k.yaml"
    assert load_recipe(path).model.name == "speech_3k"
    assert load_recipe(path, name="my run/ü").model.name == "my-run"
    assert load_recipe(path, name="---").model.name == "model"
    assert load_recipe(path, ["model.name=own"], name="mine").model.name == "own"
    assert load_recipe(path).model.license == "unknown"


@pytest.mark.parametrize("fetch", [True, False])
def test_held_out_subsets_of_libritts_are_fetched_where_the_others_are(fetch):
    train = f"data.train={{type: libritts, path: data, download: {str(fetch).lower()}}}"
    recipe = load_recipe(RECIPES / "libritts.yaml", [train])
    assert recipe.eval.data.subsets == ("dev-clean",)
    assert recipe.eval.data.download is recipe.data.train[0].download is fetch
