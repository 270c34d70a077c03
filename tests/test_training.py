from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
for package in ("yaml", "torchaudio", "safetensors", "tensorboard"):
    pytest.importorskip(package, reason="needs the train extra")

from vpcodec.models import AudioAutoencoder  # noqa: E402
from vpcodec.recipe import Recipe, load_recipe  # noqa: E402
from vpcodec.training import checkpoints, trainer  # noqa: E402
from vpcodec.training.checkpoints import (  # noqa: E402
    CHECKPOINT,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from vpcodec.training.trainer import Trainer, TrainingError, build_optimizers  # noqa: E402

DEBUG = Path(__file__).resolve().parents[1] / "recipes" / "debug.yaml"
RATE = 16_000
VP_64 = "{type: vp, dim: 3, codebook_size: 64, calibrate_every: 9}"


def debug(*overrides: str) -> Recipe:
    return load_recipe(DEBUG, ["train.precision=fp32", *overrides])


def short(*overrides: str) -> Recipe:
    """Twelve small steps, saved every fifth, each in the log."""
    return debug(
        "train.steps=12",
        "train.save_every=5",
        "train.log_every=1",
        "train.audio_every=4",
        "data.batch_size=2",
        "optim.name=muon",
        "optim.warmup_steps=3",
        *overrides,
    )


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def results(run: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Weights, averages and optimiser states, and the log without its times."""
    groups, state = load_checkpoint(run)
    assert state["step"] == 12
    flat = {f"{group}/{k}": v for group, values in groups.items() for k, v in values.items()}
    times = ("seconds", "audio_seconds_per_second")
    return flat, [{k: v for k, v in row.items() if k not in times} for row in rows(run)]


def assert_same_run(run: Path, reference: Path) -> None:
    (tensors, log), (expected, expected_log) = results(run), results(reference)
    assert set(tensors) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(tensors[name], value, rtol=0, atol=1e-6, msg=name)
    assert [row["step"] for row in log] == [row["step"] for row in expected_log]
    for row, expected_row in zip(log, expected_log):
        assert row == pytest.approx(expected_row, rel=1e-4, abs=1e-6)


def at_step(run: Trainer, step: int, function: Callable, action: Callable) -> Callable:
    """`function`, which calls `action` on its result when the run is at `step`."""

    def wrapped(*arguments):
        result = function(*arguments)
        return action(result) if run.step == step else result

    return wrapped


def press_ctrl_c(result):
    signal.raise_signal(signal.SIGINT)
    return result


def no_numbers(terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value * math.nan for name, value in terms.items()}


@pytest.fixture(scope="module")
def debug_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The debug recipe, trained to its end."""
    folder = tmp_path_factory.mktemp("runs") / "debug"
    Trainer(debug("train.log_every=1"), folder).train()
    return folder


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short recipe without any interruption."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    Trainer(short(), folder).train()
    return folder


def test_training_lowers_the_losses(debug_run):
    log = rows(debug_run)
    for name in ("loss", "mel", "stft"):
        first = np.mean([row[name] for row in log[:5]])
        assert np.mean([row[name] for row in log[-5:]]) < 0.75 * first


def test_the_log_holds_what_users_plot(debug_run):
    log = rows(debug_run)
    assert [row["step"] for row in log] == list(range(1, 61))
    names = {"step", "seconds", "loss", "wave", "stft", "mel", "quantizer", "grad_norm", "lr"}
    for row in log:
        assert names | {"accepted", "audio_seconds_per_second"} <= set(row)
        assert all(math.isfinite(value) for value in row.values())
        terms = row["wave"] + row["stft"] + 2 * row["mel"] + row["quantizer"]
        assert row["loss"] == pytest.approx(terms, rel=1e-4)


def test_tensorboard_shows_curves_and_audio(debug_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert list(debug_run.glob("events.out.tfevents.*"))
    board = EventAccumulator(str(debug_run)).Reload()
    assert {"loss", "mel", "lr"} <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("mel")] == list(range(1, 61))
    assert set(board.Tags()["audio"]) == {"original", "decoded"}


def test_the_run_keeps_its_recipe(debug_run):
    saved = Recipe.model_validate_json((debug_run / "recipe.json").read_text())
    assert saved == debug("train.log_every=1")


def test_a_finished_run_stays_as_it_is(whole_run):
    before = (whole_run / CHECKPOINT).read_bytes(), rows(whole_run)
    Trainer(short(), whole_run).train()
    assert ((whole_run / CHECKPOINT).read_bytes(), rows(whole_run)) == before


@pytest.mark.parametrize("moment", ["before a step", "in a step", "between the optimisers"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(tmp_path, whole_run, moment):
    first = Trainer(short(), tmp_path)
    if moment == "before a step":
        first.train_step = lambda batch, step=first.train_step: step(
            press_ctrl_c(batch) if first.step == 7 else batch
        )
    elif moment == "in a step":
        first.loss = at_step(first, 7, first.loss, press_ctrl_c)
    else:
        optimizer = first.optimizers[0]
        optimizer.step = at_step(first, 7, optimizer.step, press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = Trainer(short(), tmp_path)
    assert second.step in (7, 8)
    second.train()
    assert_same_run(tmp_path, whole_run)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, whole_run):
    def die(terms):
        raise MemoryError

    first = Trainer(short(), tmp_path)
    first.loss = at_step(first, 8, first.loss, die)
    with pytest.raises(MemoryError):
        first.train()
    second = Trainer(short(), tmp_path)
    assert second.step == 5
    second.train()
    assert_same_run(tmp_path, whole_run)


@pytest.mark.parametrize("quantizer", [VP_64, "{type: vq, dim: 3, codebook_size: 64}"])
def test_a_quantizer_with_a_memory_goes_on_as_if_nothing_had_been(tmp_path, quantizer):
    recipe = short(f"model.quantizer={quantizer}")
    Trainer(recipe, tmp_path / "whole").train()
    first = Trainer(recipe, tmp_path / "cut")
    first.loss = at_step(first, 7, first.loss, press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    Trainer(recipe, tmp_path / "cut").train()
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_vp_ends_with_a_codebook_of_the_averaged_encoder_s_latents(tmp_path):
    run = Trainer(short(f"model.quantizer={VP_64}"), tmp_path)
    run.train()
    model = AudioAutoencoder(run.recipe.model).eval()
    model.load_state_dict(load_checkpoint(tmp_path)[0]["average"])
    assert len(torch.unique(model.quantizer.codebook, dim=0)) == 64
    with torch.no_grad():
        z = model.encoder(torch.from_numpy(run.data.batch(0)))
    error = (model.quantizer(z).latents - z).square().sum(-1).mean()
    assert error < z.reshape(-1, 3).var(0).sum() / 4


def test_vp_calibrates_when_the_recipe_says_so(tmp_path):
    run = Trainer(short(f"model.quantizer={VP_64}"), tmp_path / "on")
    run.train()
    assert run.model.quantizer.eta.item() != 1.5
    off = VP_64.replace("calibrate_every: 9", "calibrate_every: 0")
    run = Trainer(short(f"model.quantizer={off}"), tmp_path / "off")
    run.train()
    assert run.model.quantizer.eta.item() == 1.5
    assert {"accepted", "noise"} <= set(rows(tmp_path / "off")[-1])


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    first = Trainer(short(), tmp_path)
    first.loss = at_step(first, 8, first.loss, no_numbers)
    with pytest.raises(TrainingError, match="step 8"):
        first.train()
    groups, state = load_checkpoint(tmp_path)
    assert state["step"] == 5
    assert all(torch.isfinite(value).all() for value in groups["model"].values())


def test_resuming_keeps_the_precision(tmp_path, monkeypatch):
    recipe = short("train.precision=auto")
    monkeypatch.setattr(trainer, "_use_bf16", lambda precision, device: False)
    Trainer(recipe, tmp_path).save()
    monkeypatch.setattr(trainer, "_use_bf16", lambda precision, device: True)
    assert Trainer(recipe, tmp_path).bf16 is False


@pytest.mark.parametrize("victim", ["replace", "write"])
def test_dying_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch, victim):
    run = Trainer(short(), tmp_path)
    run.save()
    before = (tmp_path / CHECKPOINT).read_bytes()
    run.step = 3

    def die(*arguments, **options):
        raise KeyboardInterrupt

    module, name = (os, "replace") if victim == "replace" else (checkpoints, "save")
    monkeypatch.setattr(module, name, die)
    with pytest.raises(KeyboardInterrupt):
        run.save()
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT, "recipe.json"}


def test_a_run_of_another_model_is_refused(tmp_path):
    Trainer(short(), tmp_path).save()
    before = (tmp_path / "recipe.json").read_bytes()
    with pytest.raises(CheckpointError, match="another model"):
        Trainer(short("model.quantizer.levels=[5, 5, 6]"), tmp_path)
    assert (tmp_path / "recipe.json").read_bytes() == before


def test_a_run_of_another_optimiser_is_refused(tmp_path):
    Trainer(short("train.steps=1"), tmp_path).train()
    with pytest.raises(CheckpointError, match="optimi"):
        Trainer(short("optim.name=adamw"), tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        lambda path: path.write_bytes(b"\xff" * 1000),
        lambda path: save_checkpoint(path.parent, {}, {"step": 1}),
        lambda path: save_checkpoint(path.parent, {}, {"step": 1, "config": {"name": "x"}}),
        lambda path: save_checkpoint(path.parent, {}, {"step": 1, "config": {"size": 3}}),
        lambda path: save_checkpoint(
            path.parent,
            {},
            {"step": 1, "seconds": 0.0, "config": short().model.model_dump(mode="json")},
        ),
    ],
    ids=["empty", "cut", "garbage", "no config", "other model", "other version", "no weights"],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    Trainer(short(), tmp_path).save()
    damage(tmp_path / CHECKPOINT)
    with pytest.raises(CheckpointError):
        Trainer(short(), tmp_path)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    groups = {"model": {"a.b": torch.randn(3, 2)}, "rng": {"cpu": torch.get_rng_state()}}
    save_checkpoint(tmp_path, groups | {"optimizer0": {"0.step": 7}}, {"step": 3, "x": [1.5]})
    loaded, state = load_checkpoint(tmp_path)
    assert state == {"step": 3, "x": [1.5]}
    assert torch.equal(loaded["model"]["a.b"], groups["model"]["a.b"])
    assert torch.equal(loaded["rng"]["cpu"], groups["rng"]["cpu"])
    assert loaded["optimizer0"]["0.step"] == 7


def test_training_starts_from_given_weights(tmp_path, debug_model):
    from safetensors.torch import load_file

    weights = debug_model / "model.safetensors"
    run = Trainer(short(), tmp_path, init_from=weights)
    for name, value in load_file(weights).items():
        assert torch.equal(run.model.state_dict()[name], value.float())
        assert torch.equal(run.average[name], value.float())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "absent.safetensors"])
def test_weights_that_do_not_fit_are_refused(tmp_path, debug_model, name):
    with pytest.raises(CheckpointError, match=name):
        Trainer(short("model.attention_window=8"), tmp_path, init_from=debug_model / name)


def test_the_learning_rate_warms_up_and_decays_to_its_end(tmp_path):
    run = Trainer(debug("train.steps=60", "optim.warmup_steps=10", "optim.final_lr=1e-5"), tmp_path)
    rates = [run.learning_rate(step) for step in range(60)]
    assert rates[0] == pytest.approx(0.003 / 10)
    assert max(rates) == pytest.approx(0.003)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1e-5)


def test_a_schedule_without_warm_up_starts_at_the_peak(tmp_path):
    run = Trainer(debug("optim.warmup_steps=0"), tmp_path)
    assert run.learning_rate(0) == pytest.approx(0.003)


def test_the_learning_rate_reaches_every_parameter(tmp_path):
    run = Trainer(short(), tmp_path)
    run.train_step(torch.from_numpy(run.data.batch(0)))
    groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
    assert [group["lr"] for group in groups] == [run.learning_rate(0)] * len(groups)


@pytest.mark.parametrize("step, decay", [(1, 2 / 11), (50, 51 / 60), (10**6, 0.999)])
def test_the_averaged_weights_follow_their_formula(tmp_path, step, decay):
    run = Trainer(debug("optim.ema_decay=0.999"), tmp_path)
    run.step = step - 1
    before = {name: value.clone() for name, value in run.average.items()}
    run.train_step(torch.from_numpy(run.data.batch(0)))
    for name, value in run.model.state_dict().items():
        expected = decay * before[name] + (1 - decay) * value
        torch.testing.assert_close(run.average[name], expected, rtol=0, atol=1e-6)
        assert not torch.equal(value, before[name])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimisers_share_all_parameters_among_them(name):
    recipe = debug(f"optim.name={name}")
    model = AudioAutoencoder(recipe.model)
    optimizers = build_optimizers(model, recipe.optim)
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    assert len(optimizers) == (2 if name == "muon" else 1)


def test_muon_takes_the_weights_of_linear_layers_and_nothing_else():
    recipe = debug("optim.name=muon")
    model = AudioAutoencoder(recipe.model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    _, muon = build_optimizers(model, recipe.optim)
    held = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert held == linear


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_biases_norms_and_alphas_do_not_decay(name):
    recipe = debug(f"optim.name={name}", "optim.weight_decay=0.1")
    model = AudioAutoencoder(recipe.model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying = {
        names[id(p)]
        for optimizer in build_optimizers(model, recipe.optim)
        for group in optimizer.param_groups
        if group["weight_decay"]
        for p in group["params"]
    }
    expected = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d)
    }
    assert decaying == expected
