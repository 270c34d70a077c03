"""Language models learn what can be predicted, resume exactly, and take one codec's tokens only."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("accelerate", reason="needs the train extra")
pytest.importorskip("transformers", reason="needs the lm extra")
import torch
from paths import RECIPES

from vpcodec.codec import Codec
from vpcodec.config import ConfigError, LMConfig
from vpcodec.hub import open_model
from vpcodec.lm import LanguageModel
from vpcodec.recipe import LMRecipe, load_recipe, parse_recipe
from vpcodec.records import Record, write_records
from vpcodec.training.checkpoints import CheckpointError, checkpoints, load_checkpoint
from vpcodec.training.corpora import DataError
from vpcodec.training.lm.data import Excerpts, read_clips
from vpcodec.training.lm.evaluation import HeldOutTokens
from vpcodec.training.lm.trainer import LMTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

CODEC, IMAGES = "speech-1k", "image-fsp"
PERIOD = 8


def predictable(n: int, seed: int) -> np.ndarray:
    """(n,) tokens: eight of them in turn, so that the next one is known but has 3 bits of entropy
    by itself."""
    codes = 14_000 * np.arange(PERIOD) + 123
    return codes[(np.arange(n) + seed) % PERIOD]


def write_tokens_of(path: Path, clips: list[np.ndarray], model: str) -> Path:
    """A file of records: clips (T,) of audio or (rows, columns) of images."""
    codec: Any = Codec.from_pretrained(model, threads=1)
    headers = [codec.token_header(clip[None]) for clip in clips]
    write_records(
        path,
        (Record(str(i), c.reshape(1, -1), h) for i, (c, h) in enumerate(zip(clips, headers))),
    )
    return path


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "clips.npz"
    return write_tokens_of(path, [predictable(n, n) for n in (50, 33, 9)], CODEC)


def recipe(tokens: Path, *, grid: list[int] | None = None, **sections: dict[str, Any]) -> LMRecipe:
    model = {"kind": "lm", "name": "tiny", "layers": 1, "width": 16, "heads": 2, "context": 12}
    model |= {"codec": CODEC if grid is None else IMAGES, "grid": grid}
    model["context"] = 12 if grid is None else math.prod(grid)
    found = parse_recipe(
        {
            "model": model,
            "data": {"train": str(tokens), "batch_size": 4},
            "eval": {"data": str(tokens), "every": 1000},
            "optim": {"lr": 0.02, "warmup_steps": 5, "ema_decay": 0.5},
            "train": {"steps": 60, "device": "cpu", "precision": "fp32", "log_every": 20}
            | sections.get("train", {}),
        }
    )
    assert isinstance(found, LMRecipe)
    return found


def last_evaluation(run: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval/entropy" in row][-1]


def test_what_can_be_predicted_is_learnt(tokens: Path, tmp_path: Path) -> None:
    LMTrainer(recipe(tokens), tmp_path / "run").train()
    row = last_evaluation(tmp_path / "run")
    assert row["step"] == 60
    assert row["eval/entropy"] == pytest.approx(3, abs=0.02)
    assert row["eval/bits_per_token"] < 2 < row["eval/unigram"]
    assert row["eval/bits_per_second"] == pytest.approx(
        row["eval/bits_per_token"] * 16_000 / 270, rel=1e-4
    )
    assert row["eval/coder"] > 3  # the codec's entropy coder expects speech
    _, best = load_checkpoint(tmp_path / "run" / "best.safetensors")
    assert best["value"] == pytest.approx(row["eval/bits_per_token"], rel=1e-4)
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_a_resumed_run_equals_an_undisturbed_one(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"steps": 6, "save_every": 3, "accumulate": 2}
    LMTrainer(recipe(tokens, train=train), tmp_path / "whole").train()
    broken = LMTrainer(recipe(tokens, train=train), tmp_path / "broken")
    step = broken.train_step

    def failing(*batches: torch.Tensor) -> dict[str, torch.Tensor]:
        if broken.step == 4:
            raise KeyboardInterrupt
        return step(*batches)

    failing.check_finite, failing.learning_rate = step.check_finite, step.learning_rate
    monkeypatch.setattr(broken, "train_step", failing)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    again = LMTrainer(recipe(tokens, train=train), tmp_path / "broken")
    assert again.step == 3
    again.train()
    whole, resumed = (
        load_checkpoint(checkpoints(tmp_path / name)[-1])[0] for name in ("whole", "broken")
    )
    for group in ("model", "average", "optimizer0"):
        assert whole[group].keys() == resumed[group].keys()
        for name, value in whole[group].items():
            assert torch.equal(value, resumed[group][name]), name


def test_a_run_on_other_tokens_is_not_resumed(tokens: Path, tmp_path: Path) -> None:
    LMTrainer(recipe(tokens, train={"steps": 1}), tmp_path / "run").train()
    other = write_tokens_of(tmp_path / "other.npz", [predictable(20, 0)], "speech-3k")
    changed = recipe(other, train={"steps": 2})
    model = changed.model.model_copy(update={"codec": "speech-3k"})
    evaluation = changed.eval.model_copy(update={"data": None})
    changed = changed.model_copy(update={"model": model, "eval": evaluation})
    with pytest.raises(CheckpointError, match="another model configuration"):
        LMTrainer(changed, tmp_path / "run")


def test_tokens_of_another_codec_are_refused(tmp_path: Path) -> None:
    other = write_tokens_of(tmp_path / "other.npz", [predictable(20, 0)], "speech-3k")
    with pytest.raises(DataError, match="tokens of the model 'speech-3k'.*not of 'speech-1k'"):
        LMTrainer(recipe(other), tmp_path / "run")


def test_a_picture_is_learnt_row_by_row(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:6, :9]
    pictures = [(100 * ((columns + k) % 3) + 7) for k in range(3)]
    tokens = write_tokens_of(tmp_path / "pictures.npz", pictures, IMAGES)
    LMTrainer(recipe(tokens, grid=[3, 4]), tmp_path / "run").train()
    row = last_evaluation(tmp_path / "run")
    assert row["eval/bits_per_token"] < 1 < row["eval/entropy"]
    assert row["eval/bits_per_pixel"] == pytest.approx(row["eval/bits_per_token"] / 64, rel=1e-4)


def test_images_need_a_grid_and_audio_has_none(tokens: Path, tmp_path: Path) -> None:
    pictures = write_tokens_of(tmp_path / "a.npz", [np.zeros((4, 4), np.int64)], IMAGES)
    audio, images = recipe(tokens).model, recipe(pictures, grid=[2, 2]).model
    for corpus, config, codec, message in (
        (pictures, audio, IMAGES, "tokens of images need model.grid"),
        (tokens, images, CODEC, "model.grid is for images"),
    ):
        corpora = recipe(corpus).data.train
        with pytest.raises(DataError, match=message):
            read_clips(corpora, open_model(codec), config)


def test_channels_are_clips_but_alpha_is_none(tmp_path: Path) -> None:
    two = np.stack([predictable(9, 0), predictable(9, 1)])
    speech: Any = Codec.from_pretrained(CODEC, threads=1)
    write_records(tmp_path / "a.npz", [Record("a", two, speech.token_header(two))])
    corpora = recipe(tmp_path / "a.npz").data.train
    clips, skipped = read_clips(corpora, speech.model, LMConfig(name="x"))
    assert np.array_equal(clips, two) and not skipped
    alpha = np.arange(24).reshape(2, 3, 4)
    images: Any = Codec.from_pretrained(IMAGES, threads=1)
    record = Record("b", alpha.reshape(2, -1), images.token_header(alpha))
    write_records(tmp_path / "b.npz", [record])
    corpora = recipe(tmp_path / "b.npz").data.train
    clips, _ = read_clips(corpora, images.model, LMConfig(name="x", grid=(2, 4), context=8))
    assert len(clips) == 1 and np.array_equal(clips[0], alpha[0])


def test_excerpts_are_parts_of_clips_with_their_ends() -> None:
    config = LMConfig(name="x", context=5)
    clips = [np.arange(20, dtype=np.int32), np.arange(100, 103, dtype=np.int32)]
    special = LanguageModel(LMConfig(name="x", layers=1, width=4, heads=1), (200,)).special
    data = Excerpts(clips, config, special, batch_size=8, seed=0)
    rows = np.concatenate([data.batch(i) for i in range(40)])
    assert rows.shape == (320, 6) and (rows[:, 0] == special.bos).all()
    short = rows[rows[:, 1] == 100]
    assert (short == [special.bos, 100, 101, 102, special.eos, special.pad]).all()
    assert 20 < len(short) < 70  # 3 of 23 tokens
    long = rows[rows[:, 1] < 20]
    starts = set(long[:, 1].tolist())
    assert starts == set(range(17))
    for row in long:
        whole = np.append(np.arange(20), special.eos)
        assert np.array_equal(row[1:], whole[row[1] : row[1] + 5])
    again = Excerpts(clips, config, special, batch_size=8, seed=0)
    assert np.array_equal(again.batch(7), data.batch(7))
    halves = [
        Excerpts(clips, config, special, batch_size=4, seed=0, process=i, processes=2)
        for i in range(2)
    ]
    assert np.array_equal(np.concatenate([half.batch(7) for half in halves]), data.batch(7))


@pytest.mark.parametrize("n", [1, 5, 6, 7, 8, 9, 20, 23])
def test_each_held_out_token_counts_once(n: int) -> None:
    """With all weights 0, every token costs the same, and the end takes a share of the first."""
    codec = open_model(CODEC)
    config = LMConfig(name="x", layers=1, width=4, heads=1, context=6)
    model = LanguageModel(config, (7,) * 6).eval()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    held_out = HeldOutTokens([predictable(n, 0).astype(np.int32)], config, codec)
    assert held_out.n_tokens == n
    assert held_out.bits(model) == pytest.approx(math.log2(8 * 7**5), rel=1e-5)


def test_the_shipped_recipe_trains_its_real_model(tokens: Path, tmp_path: Path) -> None:
    overrides = [f"data.train={tokens}", "eval.data=null", "train.steps=2", "data.batch_size=1"]
    shipped = load_recipe(RECIPES / "lm.yaml", [*overrides, "train.device=cpu"])
    run = LMTrainer(shipped, tmp_path)
    assert 2e6 < sum(p.numel() for p in run.state.model.parameters()) < 10e6
    run.train()
    assert LMTrainer(shipped, tmp_path).step == 2


def test_recipes_say_what_is_for_codecs(tokens: Path) -> None:
    with pytest.raises(ConfigError, match="decoder_only is for codecs"):
        recipe(tokens, train={"decoder_only": True})
