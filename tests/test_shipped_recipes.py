"""The recipes that ship, and their documentation."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
for package in ("yaml", "torchaudio", "safetensors", "accelerate", "tensorboard"):
    pytest.importorskip(package, reason="needs the train extra")

from vpcodec.recipe import load_recipe  # noqa: E402
from vpcodec.training.trainer import Trainer  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
BITRATES = {
    "debug": 1161,
    "libritts": 2989,
    "speech_1k": 998,
    "speech_3k": 2989,
    "speech_vp_16384": 2333,
}


def test_all_recipes_are_known():
    assert {path.stem for path in RECIPES} == set(BITRATES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_its_bit_rate_and_says_what_it_costs(path):
    model = load_recipe(path).model
    assert model.bitrate == pytest.approx(BITRATES[path.stem], abs=0.7)
    assert model.name and model.description and model.license != "unknown"
    assert "# Cost: " in path.read_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_two_steps_of_its_real_model(path, tmp_path):
    recipe = load_recipe(
        path,
        [
            "data.train=null",
            "data.batch_size=1",
            "data.crop_seconds=0.4",
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


def test_rates_of_speech_3k():
    config = load_recipe(ROOT / "recipes" / "speech_3k.yaml").model
    assert (config.name, config.sample_rate, config.hop_length) == ("speech-3k", 16_000, 96)
    assert config.frame_rate == pytest.approx(166.67, abs=0.005)
    assert config.codebook_size == 250_047
    assert config.bitrate == pytest.approx(2988.6, abs=0.05)
    assert config.latency <= 0.020


def test_the_documentation_of_recipes_is_up_to_date():
    script = ROOT / "docs" / "make_recipes.py"
    assert subprocess.run([sys.executable, script, "--check"]).returncode == 0


def test_every_field_of_a_recipe_is_documented():
    page = (ROOT / "docs" / "recipes.md").read_text()
    for section in ("data", "loss", "discriminator", "optim", "eval", "train", "model"):
        assert f"\n## `{section}`\n" in page
    for line in page.splitlines():
        if line.startswith("| `"):
            assert len([cell for cell in line.split(" | ") if cell.strip("| ")]) == 4, line
