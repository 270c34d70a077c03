"""Nothing is sent, and nothing is left in the home folder that was not asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import ENOUGH, MODULE, tree
from paths import ROOT, SPEECH

pytestmark = pytest.mark.slow

OFF = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def environment(home: Path, **more: str) -> dict[str, str]:
    """That of a user with an empty home folder and no settings.

    Nothing says that this is a test run, where ONNX Runtime would keep quiet by itself.
    """
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG") if name in os.environ}
    return kept | {"HOME": str(home)} | more


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def vpcodec(home: Path, *arguments: object) -> None:
    subprocess.run(
        [*MODULE, *map(str, arguments)], env=environment(home), check=True, timeout=5 * ENOUGH
    )
    assert tree(str(home)) == set()


def test_coding_leaves_nothing_in_the_home_folder(home, tmp_path):
    vpcodec(home, "encode", SPEECH, tmp_path / "a.tok")
    vpcodec(home, "decode", tmp_path / "a.tok", tmp_path / "a.wav")
    vpcodec(home, "info", tmp_path / "a.tok")


@pytest.mark.skipif(find_spec("pesq") is None, reason="needs the score extra")
def test_scoring_leaves_nothing_in_the_home_folder(home, tmp_path):
    (tmp_path / "originals").mkdir()
    (tmp_path / "originals" / "a.wav").write_bytes(SPEECH.read_bytes())
    vpcodec(home, "score", tmp_path / "originals", "-m", "speech-3k")


@pytest.mark.skipif(find_spec("accelerate") is None, reason="needs the train extra")
def test_training_leaves_nothing_in_the_home_folder(home, tmp_path):
    recipe = ROOT / "recipes" / "debug.yaml"
    steps = ("train.steps=2", "discriminator.start_step=1", "train.device=cpu")
    vpcodec(home, "train", recipe, *steps, "--run", tmp_path / "run")


@pytest.mark.parametrize("module", ["vpcodec", "vpcodec.backends.onnx", "vpcodec.cli"])
def test_telemetry_is_off_before_anything_loads(home, module):
    assert settings(home, module) == OFF


@pytest.mark.parametrize("name", OFF)
def test_what_the_user_has_set_stays(home, name):
    assert settings(home, "vpcodec", **{name: "mine"}) == OFF | {name: "mine"}


def settings(home: Path, module: str, **set_by_user: str) -> dict[str, str]:
    """What the variables are when a module first imports a library that reads them."""
    code = f"""
import os, sys

class Watch:
    def find_spec(name, path, target=None):
        if name in ("onnxruntime", "huggingface_hub"):
            assert os.environ.keys() >= set({list(OFF)}), name

sys.meta_path.insert(0, Watch)
import {module}
print(*(os.environ[name] for name in {list(OFF)}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(home, **set_by_user),
        capture_output=True,
        text=True,
        check=True,
        timeout=ENOUGH,
    )
    return dict(zip(OFF, done.stdout.split()))
