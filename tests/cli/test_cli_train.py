"""The training path of the README: own recordings, a run, a model folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import refuse, run
from paths import RECIPES

from vpcodec.media.audio import save

pytestmark = pytest.mark.slow

pytest.importorskip("accelerate", reason="needs the train extra")

QUICK = ("discriminator.size=none", "train.steps=1", "train.device=cpu", "data.batch_size=1")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speech) -> Path:
    """A working folder with recordings in `mine`."""
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    save("mine/a.wav", speech, 16_000)
    return tmp_path


def test_a_run_s_model_is_called_like_the_run_and_claims_no_licence() -> None:
    recipe = Path("recipe.yaml")
    text = (RECIPES / "debug.yaml").read_text()
    recipe.write_text(text.replace("  name: debug\n", "").replace("  license: MIT\n", ""))
    run("train", recipe, *QUICK, "--run", "runs/mine")
    run("export", "runs/mine", "-o", "model")
    facts = run("info", "model", "--json").json
    assert (facts["model"], facts["license"]) == ("mine", "unknown")
    assert "license: unknown\n" in Path("model/README.md").read_text()
    run("encode", "mine/a.wav", "a.tok", "-m", "model")
    assert "made by the model 'mine', which is not bundled: use --model" in refuse(
        "decode", "a.tok", "b.wav"
    )
    Path("runs/mine").rename("runs/moved")
    run("train", recipe, *QUICK, "train.steps=2", "--run", "runs/moved")  # keeps its name
    run("export", "runs/moved", "-o", "model", "--force")
    assert run("info", "model", "--json").json["model"] == "mine"


def test_libritts_with_own_recordings_says_that_it_scores_none() -> None:
    small = ("model.encoder_dims=[8, 8, 8]", "model.decoder_dims=[8, 8, 8]", "optim.name=adamw")
    data = ("data.train=mine", "model.attention_heads=1", "model.attention_window=16")
    arguments = ["train", RECIPES / "libritts.yaml", *QUICK, *small, *data, "--run", "r"]
    result = run(*arguments)
    assert "data: no held-out data there, so none is scored; name some with eval.data" in result.err
    assert "eval.data: none: no such folder or manifest; set eval.data=FOLDER" in refuse(
        *arguments, "eval.data=none"
    )


@pytest.mark.parametrize("name", ["speech_3k", "libritts", "image"])
def test_missing_default_data_say_what_to_set(name: str) -> None:
    line = refuse("train", RECIPES / f"{name}.yaml", "train.device=cpu")
    assert "no such folder or manifest; set data.train=FOLDER" in line
    assert ("download: true" in line) is (name == "libritts")
