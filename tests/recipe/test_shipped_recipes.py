"""The recipes that ship, and their documentation."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
for package in ("yaml", "torchaudio", "safetensors", "accelerate", "tensorboard"):
    pytest.importorskip(package, reason="needs the train extra")

from paths import RECIPES, ROOT

from vpcodec.config import GridConfig, ModelConfig, Strict
from vpcodec.recipe import Recipe, load_recipe
from vpcodec.training.trainer import Trainer

pytestmark = pytest.mark.slow

ALL_RECIPES = sorted(RECIPES.glob("*.yaml"))
CODECS = [path for path in ALL_RECIPES if path.stem != "lm"]
RATES = {  # bit/s, or bits per pixel
    "debug": 1161,
    "image": 0.217,
    "image_debug": 0.109,
    "libritts": 2989,
    "speech_1k": 998,
    "speech_3k": 2989,
    "speech_6k": 5977,
    "speech_vp_16384": 2333,
}


@pytest.mark.parametrize("path", CODECS, ids=lambda path: path.stem)
def test_a_recipe_has_its_rate(path):
    model = load_recipe(path).model
    rate = model.bitrate if model.kind == "audio" else model.bits_per_pixel
    assert rate == pytest.approx(RATES[path.stem], rel=3e-3)


@pytest.mark.parametrize("path", ALL_RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_for_and_what_it_costs(path):
    model = load_recipe(path).model
    assert model.description
    if "debug" not in path.stem:  # what others train is neither our model nor under our licence
        assert (model.name, model.license) == (path.stem, "unknown")
    cost = path.read_text().partition("# Cost: ")[2].splitlines()[0]
    assert any(unit in cost for unit in ("second", "minute", "hour"))


@pytest.mark.parametrize("path", CODECS, ids=lambda path: path.stem)
def test_a_recipe_trains_two_steps_of_its_real_model(path, tmp_path):
    audio = load_recipe(path).model.kind == "audio"
    recipe = load_recipe(
        path,
        [
            "data.train=null",
            "data.batch_size=1",
            "data.crop_seconds=0.4" if audio else "data.crop_size=64",
            "discriminator.start_step=0",
            "eval.data=null",
            "train.steps=2",
            "train.log_every=1",
            "train.device=cpu",
        ],
    )
    run = Trainer(recipe, tmp_path)
    for step in range(2):
        terms = run.train_step(torch.from_numpy(run.data.batch(step)))
        assert all(math.isfinite(value) for value in terms.values())
        assert ("discriminator" in terms) == recipe.adversarial
    run.save()
    assert Trainer(recipe, tmp_path).step == 2


def test_the_documentation_of_recipes_is_up_to_date():
    script = ROOT / "docs" / "make_recipes.py"
    assert subprocess.run([sys.executable, script, "--check"]).returncode == 0


def test_every_field_of_a_recipe_is_documented():
    models = set(_descendants(Strict)) - {Recipe, GridConfig, ModelConfig}
    for model in models:
        for name, field in model.model_fields.items():
            section = field.annotation in models
            assert field.description or section or name in ("type", "kind"), (model, name)
    assert len(models) > 25


def _descendants(model):
    for child in model.__subclasses__():
        yield child
        yield from _descendants(child)
