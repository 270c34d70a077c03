from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
for package in ("yaml", "torchaudio", "safetensors", "accelerate", "tensorboard"):
    pytest.importorskip(package, reason="needs the train extra")

from paths import RECIPES, SPEECH
from safetensors.torch import save_file

from vpcodec.models import build_model
from vpcodec.models.image import Conv2d
from vpcodec.recipe import Recipe, load_recipe, parse_recipe
from vpcodec.training import checkpoints, hardware
from vpcodec.training.checkpoints import (
    BEST,
    CheckpointError,
    averaged_weights,
    checkpoint_path,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from vpcodec.training.hardware import TrainingError
from vpcodec.training.optim import build_optimizers, learning_rate
from vpcodec.training.trainer import Trainer

pytestmark = pytest.mark.slow

DEBUG = {"audio": RECIPES / "debug.yaml", "image": RECIPES / "image_debug.yaml"}
TERMS = {  # of the loss, with their weights in the debug recipes
    "audio": {"wave": 1, "stft": 1, "mel": 2},
    "image": {"l1": 1, "gradient": 0.5},
}
SPEEDS = {"audio": "audio_seconds_per_second", "image": "megapixels_per_second"}
RATE = 16_000
VP_64 = (
    "model.quantizer={type: vp, dim: 3, codebook_size: 64}",
    "quantizer.calibrate_every=9",
)
VQ_64 = ("model.quantizer={type: vq, dim: 3, codebook_size: 64}",)
FSP_125 = ("model.quantizer={type: fsp, levels: [5, 5, 5]}",)


@pytest.fixture(scope="module", params=["audio", "image"])
def kind(request: pytest.FixtureRequest) -> str:
    """What is trained."""
    return request.param


def debug(*overrides: str, kind: str = "audio") -> Recipe:
    return load_recipe(DEBUG[kind], ["train.precision=fp32", *overrides])


def short(*overrides: str, kind: str = "audio") -> Recipe:
    """Twelve small steps, adversarial from the fourth on, saved every fifth, each in the log."""
    return debug(
        "train.steps=12",
        "train.save_every=5",
        "train.log_every=1",
        "train.show_every=4",
        "data.batch_size=2",
        "optim.name=muon",
        "optim.warmup_steps=3",
        "discriminator.start_step=4",
        *overrides,
        kind=kind,
    )


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def results(run: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Weights, averages and optimiser states, and the log without its times."""
    groups, state = load_checkpoint(find_checkpoint(run))
    assert state["step"] == 12
    flat = {f"{group}/{k}": v for group, values in groups.items() for k, v in values.items()}
    times = ("seconds", *SPEEDS.values(), "wait_share")
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


def train_interrupted(recipe: Recipe, run: Path, step: int) -> None:
    """Train to the end, with Ctrl-C at a step and a second start."""
    first = Trainer(recipe, run)
    first.train_step.loss = at_step(first, step, first.train_step.loss, press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    Trainer(recipe, run).train()


def no_numbers(terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value * math.nan for name, value in terms.items()}


@pytest.fixture(scope="module")
def debug_run(tmp_path_factory: pytest.TempPathFactory, kind: str) -> Path:
    """The debug recipe, trained to its end."""
    folder = tmp_path_factory.mktemp("runs") / "debug"
    Trainer(debug("train.log_every=1", kind=kind), folder).train()
    return folder


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, kind: str) -> Path:
    """The short recipe without any interruption."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    Trainer(short(kind=kind), folder).train()
    return folder


def test_training_lowers_the_losses(debug_run, kind):
    log = rows(debug_run)
    for name in ("mel", "stft") if kind == "audio" else ("l1",):
        first = np.mean([row[name] for row in log[:5]])
        assert np.mean([row[name] for row in log[-5:]]) < 0.75 * first


def test_the_log_holds_what_users_plot(debug_run, kind):
    log = rows(debug_run)
    assert [row["step"] for row in log] == list(range(1, 61))
    names = {"step", "seconds", "loss", *TERMS[kind], "quantizer", "grad_norm", "lr"}
    names |= {"accepted", SPEEDS[kind], "wait_share", "perplexity", "cvu"}
    adversarial = {"adversarial", "feature", "discriminator", "discriminator_grad_norm"}
    for row in log:
        assert names <= set(row)
        assert adversarial.isdisjoint(row) if row["step"] <= 20 else adversarial <= set(row)
        assert all(math.isfinite(value) for value in row.values())
        terms = sum(weight * row[name] for name, weight in TERMS[kind].items())
        terms += row["quantizer"] + 0.1 * row.get("adversarial", 0) + 0.5 * row.get("feature", 0)
        assert row["loss"] == pytest.approx(terms, rel=1e-4)
        assert 1 <= row["perplexity"] <= 125
        assert row["cvu"] == pytest.approx(row["perplexity"] / 125, rel=1e-4)


def test_tensorboard_shows_curves_and_samples(debug_run, kind):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert list(debug_run.glob("events.out.tfevents.*"))
    board = EventAccumulator(str(debug_run)).Reload()
    assert {"loss", *TERMS[kind], "lr"} <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("loss")] == list(range(1, 61))
    samples = {"original", "decoded"}
    if kind == "audio":
        assert set(board.Tags()["audio"]) == samples
        samples = {f"{name} spectrogram" for name in samples}
    assert set(board.Tags()["images"]) == samples


def test_the_run_keeps_its_recipe(debug_run, kind):
    saved = parse_recipe(json.loads((debug_run / "recipe.json").read_text()))
    assert saved == debug("train.log_every=1", kind=kind)


def test_a_finished_run_stays_as_it_is(whole_run, kind):
    path = find_checkpoint(whole_run)
    before = path.read_bytes(), rows(whole_run), sorted(whole_run.rglob("*"))
    Trainer(short(kind=kind), whole_run).train()
    assert (path.read_bytes(), rows(whole_run), sorted(whole_run.rglob("*"))) == before


@pytest.mark.parametrize("moment", ["before a step", "in a step", "between the optimisers"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(tmp_path, whole_run, kind, moment):
    first = Trainer(short(kind=kind), tmp_path)
    if moment == "before a step":
        first.train_step.seed = at_step(first, 7, first.train_step.seed, press_ctrl_c)
    elif moment == "in a step":
        first.train_step.loss = at_step(first, 7, first.train_step.loss, press_ctrl_c)
    else:
        optimizer = first.state.optimizers[0]
        optimizer.step = at_step(first, 7, optimizer.step, press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = Trainer(short(kind=kind), tmp_path)
    assert second.step in (7, 8)
    second.train()
    assert_same_run(tmp_path, whole_run)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, whole_run, kind):
    def die(terms):
        raise MemoryError

    first = Trainer(short(kind=kind), tmp_path)
    first.train_step.loss = at_step(first, 8, first.train_step.loss, die)
    with pytest.raises(MemoryError):
        first.train()
    second = Trainer(short(kind=kind), tmp_path)
    assert second.step == 5
    second.train()
    assert_same_run(tmp_path, whole_run)


@pytest.mark.parametrize("quantizer", [VP_64, VQ_64], ids=["vp", "vq"])
def test_a_quantizer_with_a_memory_goes_on_as_if_nothing_had_been(tmp_path, kind, quantizer):
    recipe = short(*quantizer, kind=kind)
    Trainer(recipe, tmp_path / "whole").train()
    train_interrupted(recipe, tmp_path / "cut", 7)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_vp_ends_with_a_codebook_of_the_averaged_encoder_s_latents(tmp_path, kind):
    run = Trainer(short(*VP_64, kind=kind), tmp_path)
    run.train()
    model = build_model(run.recipe.model).eval()
    model.load_state_dict(averaged_weights(load_checkpoint(find_checkpoint(tmp_path))[0]))
    assert len(torch.unique(model.quantizer.codebook, dim=0)) == 64
    with torch.no_grad():
        z = model.encoder(torch.from_numpy(run.data.batch(0)))
    error = (model.quantizer(z).latents - z).square().sum(-1).mean()
    assert error < z.reshape(-1, 3).var(0).sum() / 4


def test_vp_calibrates_when_the_recipe_says_so(tmp_path):
    run = Trainer(short(*VP_64), tmp_path / "on")
    run.train()
    assert run.state.model.quantizer.eta.item() != 1.5
    run = Trainer(short(*VP_64, "quantizer.calibrate_every=0"), tmp_path / "off")
    run.train()
    assert run.state.model.quantizer.eta.item() == 1.5
    assert {"accepted", "noise"} <= set(rows(tmp_path / "off")[-1])


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    first = Trainer(short(), tmp_path)
    first.train_step.loss = at_step(first, 8, first.train_step.loss, no_numbers)
    with pytest.raises(TrainingError, match="step 8"):
        first.train()
    groups, state = load_checkpoint(find_checkpoint(tmp_path))
    assert state["step"] == 5
    assert all(torch.isfinite(value).all() for value in groups["model"].values())


def test_resuming_keeps_the_precision(tmp_path, monkeypatch):
    recipe = short("train.precision=auto")
    seconds = {torch.bfloat16: 2.0, torch.float32: 1.0}
    monkeypatch.setattr(hardware, "_seconds", seconds.get)
    run = Trainer(recipe, tmp_path)
    assert run.state.precision == "fp32"
    run.save()
    seconds[torch.bfloat16] = 0.5
    assert Trainer(recipe, tmp_path / "other").state.precision == "bf16"
    assert Trainer(recipe, tmp_path).state.precision == "fp32"


@pytest.mark.parametrize("victim", ["replace", "write"])
def test_dying_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch, victim):
    run = Trainer(short(), tmp_path)
    run.save()
    before = checkpoint_path(tmp_path, 0).read_bytes()

    def die(*arguments, **options):
        raise KeyboardInterrupt

    module, name = (os, "replace") if victim == "replace" else (checkpoints, "save")
    monkeypatch.setattr(module, name, die)
    with pytest.raises(KeyboardInterrupt):
        run.save()
    assert checkpoint_path(tmp_path, 0).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints"}
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_a_run_of_another_model_is_refused(tmp_path):
    Trainer(short(), tmp_path).save()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="another model"):
        Trainer(short("model.quantizer.levels=[5, 5, 6]"), tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_with_other_knobs_of_the_quantizer_is_refused(tmp_path):
    Trainer(short(*VP_64), tmp_path).save()
    with pytest.raises(CheckpointError, match="other training options of the quantizer"):
        Trainer(short(*VP_64, "quantizer.queue_size=64"), tmp_path)


def test_a_checkpoint_with_the_knobs_in_its_model_goes_on(tmp_path):
    """As they were before they belonged to recipes; what is exported has them in its queue."""
    from vpcodec.export import export_run

    recipe = short(*VP_64, "quantizer.queue_size=256", "train.steps=6", "train.save_every=3")
    Trainer(recipe, tmp_path / "run").train()
    path = checkpoint_path(tmp_path / "run", 3)
    groups, state = load_checkpoint(path)
    knobs = state.pop("quantizer")
    state["config"]["quantizer"] |= {k: v for k, v in knobs.items() if k != "type"}
    checkpoint_path(tmp_path / "run", 6).unlink()
    save_checkpoint(path, groups, state)
    export_run(tmp_path / "run", tmp_path / "model")
    run = Trainer(recipe, tmp_path / "run")
    assert run.step == 3 and run.state.model.quantizer.filled == 256
    with pytest.raises(CheckpointError, match="other training options of the quantizer"):
        Trainer(short(*VP_64, "train.steps=6"), tmp_path / "run")


def test_a_run_of_another_optimiser_is_refused(tmp_path):
    Trainer(short(), tmp_path).save()
    with pytest.raises(CheckpointError, match="optimi"):
        Trainer(short("optim.name=adamw"), tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        lambda path: path.write_bytes(b"\xff" * 1000),
        lambda path: save_checkpoint(path, {}, {"step": 1}),
        lambda path: save_checkpoint(path, {}, {"step": 1, "config": {"name": "x"}}),
        lambda path: save_checkpoint(path, {}, {"step": 1, "config": {"size": 3}}),
        lambda path: save_checkpoint(
            path,
            {},
            {"step": 1, "seconds": 0.0, "config": short().model.model_dump(mode="json")},
        ),
    ],
    ids=["empty", "cut", "garbage", "no config", "other model", "other version", "no weights"],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    Trainer(short(), tmp_path).save()
    damage(checkpoint_path(tmp_path, 0))
    with pytest.raises(CheckpointError):
        Trainer(short(), tmp_path)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    groups = {"model": {"a.b": torch.randn(3, 2)}, "rng": {"cpu": torch.get_rng_state()}}
    path = tmp_path / "new folder" / "x.safetensors"
    save_checkpoint(path, groups | {"optimizer0": {"0.step": 7}}, {"step": 3, "x": [1.5]})
    loaded, state = load_checkpoint(path)
    assert state == {"step": 3, "x": [1.5]}
    assert torch.equal(loaded["model"]["a.b"], groups["model"]["a.b"])
    assert torch.equal(loaded["rng"]["cpu"], groups["rng"]["cpu"])
    assert loaded["optimizer0"]["0.step"] == 7


def test_training_starts_from_given_weights(tmp_path, debug_model):
    from safetensors.torch import load_file

    weights = debug_model / "model.safetensors"
    run = Trainer(short(), tmp_path, init_from=weights)
    found, parameters = load_file(weights), dict(run.state.model.named_parameters())
    assert found.keys() >= parameters.keys() == run.state.average.keys()
    for name, value in found.items():
        assert torch.equal(run.state.model.state_dict()[name].float(), value.float())
    for name in parameters:
        assert torch.equal(run.state.average[name], found[name].float())


def test_training_starts_from_weights_of_another_quantizer(tmp_path, debug_model):
    """All of the network is taken but what has the width of the latents."""
    from safetensors.torch import load_file

    weights = debug_model / "model.safetensors"
    vp = "model.quantizer={type: vp, dim: 2, codebook_size: 16}"
    run = Trainer(short(vp, "quantizer.queue_size=64"), tmp_path, init_from=weights)
    given, state = load_file(weights), run.state.model.state_dict()
    changed = [n for n, v in given.items() if n in state and state[n].shape != v.shape]
    assert {"encoder.project.weight", "decoder.project.weight"} <= set(changed)
    for name, value in given.items():
        if not name.startswith("quantizer.") and name not in changed:
            assert torch.equal(state[name], value.float())
    assert any("another quantizer: encoder.project.weight" in note for note in run.notes)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "absent.safetensors"])
def test_weights_that_do_not_fit_are_refused(tmp_path, debug_model, name):
    with pytest.raises(CheckpointError, match=name):
        Trainer(short("model.attention_window=8"), tmp_path, init_from=debug_model / name)


@pytest.mark.parametrize("quantizer", ["fsp", "vp"])
def test_the_decoder_alone_learns_from_tokens_that_stay(
    debug_run: Path, tmp_path: Path, kind: str, quantizer: str
):
    overrides = [] if quantizer == "fsp" else [*VP_64]
    source = debug_run
    if quantizer == "vp":
        source = tmp_path / "source"
        Trainer(short(*overrides, kind=kind), source).train()
    groups, _ = load_checkpoint(find_checkpoint(source))
    before = averaged_weights(groups)
    save_file({k: v.contiguous() for k, v in before.items()}, tmp_path / "w.safetensors")
    overrides = ["train.decoder_only=true", *overrides]
    run = Trainer(short(*overrides, kind=kind), tmp_path, init_from=tmp_path / "w.safetensors")
    run.train()
    after = averaged_weights(load_checkpoint(find_checkpoint(tmp_path))[0])
    assert set(after) == set(before)
    moved = {k.split(".")[0] for k in after if not torch.equal(after[k], before[k])}
    assert moved == {"decoder"}


def test_the_decoder_alone_needs_the_rest(debug_run: Path, tmp_path: Path, kind: str):
    recipe = short("train.decoder_only=true", kind=kind)
    with pytest.raises(TrainingError, match="decoder_only needs weights to start from"):
        Trainer(recipe, tmp_path / "new")
    groups, _ = load_checkpoint(find_checkpoint(debug_run))
    save_file(averaged_weights(groups), tmp_path / "w.safetensors")
    other = short("train.decoder_only=true", *VP_64, kind=kind)
    with pytest.raises(TrainingError, match="another quantizer"):
        Trainer(other, tmp_path / "new", init_from=tmp_path / "w.safetensors")
    Trainer(short(kind=kind), tmp_path / "whole").train()
    with pytest.raises(CheckpointError, match="decoder_only"):
        Trainer(recipe, tmp_path / "whole")


def test_the_learning_rate_warms_up_and_decays_to_its_end():
    recipe = debug("optim.warmup_steps=10", "optim.final_lr=1e-5")
    rates = [learning_rate(step, 60, recipe.optim) for step in range(60)]
    assert rates[0] == pytest.approx(0.003 / 10)
    assert max(rates) == pytest.approx(0.003)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1e-5)


def test_a_schedule_without_warm_up_starts_at_the_peak():
    assert learning_rate(0, 60, debug("optim.warmup_steps=0").optim) == pytest.approx(0.003)


def test_one_cycle_goes_up_to_its_peak_and_down_to_its_end():
    optim = debug("optim.schedule=onecycle", "optim.peak_at=0.4", "optim.final_lr=1e-5").optim
    rates = [learning_rate(step, 101, optim) for step in range(101)]
    assert rates[0] == pytest.approx(0.0003)
    assert rates.index(max(rates)) == 40 and rates[40] == pytest.approx(0.003)
    assert rates[20] == pytest.approx((0.0003 + 0.003) / 2)
    assert rates[70] == pytest.approx((0.00001 + 0.003) / 2)
    assert rates[100] == pytest.approx(1e-5)
    assert rates[:41] == sorted(rates[:41]) and rates[40:] == sorted(rates[40:], reverse=True)


def test_a_constant_schedule_stays_at_its_peak_after_the_warm_up():
    optim = debug("optim.schedule=constant", "optim.warmup_steps=10").optim
    rates = [learning_rate(step, 60, optim) for step in range(60)]
    assert rates[0] == pytest.approx(0.0003) and rates[9:] == pytest.approx([0.003] * 51)


def test_a_run_of_one_step_has_a_learning_rate():
    for schedule in ("cosine", "onecycle", "constant"):
        optim = debug(f"optim.schedule={schedule}", "optim.warmup_steps=0").optim
        assert 0 < learning_rate(0, 1, optim) <= 0.003


def test_the_learning_rate_reaches_every_parameter(tmp_path):
    run = Trainer(short(), tmp_path)
    run.train_step(torch.from_numpy(run.data.batch(0)))
    groups = [group for optimizer in run.state.optimizers for group in optimizer.param_groups]
    assert [group["lr"] for group in groups] == [run.train_step.learning_rate(0)] * len(groups)


@pytest.mark.parametrize("step, decay", [(1, 2 / 11), (50, 51 / 60), (10**6, 0.999)])
def test_the_averaged_weights_follow_their_formula(tmp_path, step, decay):
    run = Trainer(debug("optim.ema_decay=0.999"), tmp_path)
    run.state.step = step - 1
    before = {name: value.clone() for name, value in run.state.average.items()}
    run.train_step(torch.from_numpy(run.data.batch(0)))
    for name, value in run.state.model.named_parameters():
        value = value.detach()
        expected = decay * before[name] + (1 - decay) * value
        torch.testing.assert_close(run.state.average[name], expected, rtol=0, atol=1e-6)
        assert not torch.equal(value, before[name])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimisers_share_all_parameters_among_them(name):
    recipe = debug(f"optim.name={name}")
    model = build_model(recipe.model)
    optimizers = build_optimizers(model, recipe.optim)
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    assert len(optimizers) == (2 if name == "muon" else 1)


def test_muon_takes_the_matrices_of_layers_and_nothing_else(kind):
    recipe = debug("optim.name=muon", kind=kind)
    model = build_model(recipe.model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    _, muon = build_optimizers(model, recipe.optim)
    held = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv2d)
    }
    assert held == matrices


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_biases_norms_and_alphas_do_not_decay(name, kind):
    recipe = debug(f"optim.name={name}", "optim.weight_decay=0.1", kind=kind)
    model = build_model(recipe.model)
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
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d | Conv2d)
    }
    assert decaying == expected


def test_adversarial_training_improves_held_out_crops(debug_run, tmp_path, kind):
    """Loss on crops of another seed, against that of the same run without training."""
    recipe = debug("train.log_every=1", kind=kind)
    untrained = Trainer(recipe, tmp_path).state.model.eval()
    trained = build_model(recipe.model).eval()
    groups, _ = load_checkpoint(find_checkpoint(debug_run))
    trained.load_state_dict(averaged_weights(groups))
    other = Trainer(debug("train.seed=1", kind=kind), tmp_path / "other")
    crops = torch.from_numpy(other.data.batch(0))
    with torch.no_grad():
        before, after = (
            other.train_step.loss(model.target(crops), model(crops)[0])[other.task.shown].item()
            for model in (untrained, trained)
        )
    assert after < 0.65 * before


def test_the_discriminators_are_trained_and_their_learning_rate_moves(tmp_path):
    """At every update, whatever its interval: the rate is a function of the step alone."""
    run = Trainer(short("discriminator.every=3", "discriminator.start_step=2"), tmp_path)
    rates, weights = [], []
    for step in range(12):
        terms = run.train_step(torch.from_numpy(run.data.batch(step)))
        assert ("discriminator" in terms) == (step in (2, 5, 8, 11))
        assert ("adversarial" in terms) == (step >= 2)
        rates.append(run.state.discriminator_optimizer.param_groups[0]["lr"])
        weights.append(next(run.state.discriminators.parameters()).detach().clone())
    peak = run.recipe.discriminator.lr
    for step in (2, 5, 8, 11):
        assert rates[step] == pytest.approx(
            peak * run.train_step.learning_rate(step) / run.recipe.optim.lr
        )
    assert len({rates[step] for step in (2, 5, 8, 11)}) == 4
    assert not torch.equal(weights[2], weights[1]) and torch.equal(weights[3], weights[2])
    assert not torch.equal(weights[5], weights[4])


def test_the_codec_step_leaves_no_gradient_in_the_discriminators(tmp_path):
    run = Trainer(short("discriminator.every=2", "discriminator.start_step=1"), tmp_path)
    for step in range(3):
        run.train_step(torch.from_numpy(run.data.batch(step)))
    assert all(parameter.grad is None for parameter in run.state.discriminators.parameters())


@pytest.mark.parametrize("adversarial", [False, True])
def test_gradients_are_clipped_once_when_they_are_complete(tmp_path, monkeypatch, adversarial):
    recipe = short(
        "train.accumulate=3",
        "optim.grad_clip=1e-3",
        f"discriminator.start_step={0 if adversarial else 9}",
    )
    run = Trainer(recipe, tmp_path)
    backwards, clips = [], []
    clip, backward = torch.nn.utils.clip_grad_norm_, torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda *a, **o: (backwards.append(1), backward(*a, **o))[1]
    )

    def spy(parameters, largest):
        parameters = list(parameters)
        clips.append((len(backwards), clip(parameters, largest)))
        total = sum(p.grad.square().sum() for p in parameters if p.grad is not None).sqrt()
        assert total <= largest * 1.001
        return clips[-1][1]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    run.train_step(*(torch.from_numpy(run.data.batch(i)) for i in range(3)))
    assert [count for count, _ in clips] == ([3, 6] if adversarial else [3])


def test_accumulated_batches_give_the_mean_of_their_gradients(tmp_path):
    recipe = short("train.accumulate=2", "discriminator.size=none")
    run = Trainer(recipe, tmp_path)
    batches = torch.from_numpy(np.stack([run.data.batch(i) for i in range(2)]))
    found = []
    for batch in batches:
        run.train_step.seed(len(found))
        run.train_step.codec_pass(batch, adversarial=False)
        found.append([p.grad.clone() for p in run.state.model.parameters()])
        run.state.model.zero_grad()
    seen = []
    run.train_step.update_codec = lambda: (
        seen.extend(p.grad.clone() for p in run.state.model.parameters()) or torch.tensor(0.0)
    )
    run.train_step(*batches)
    for both, first, second in zip(seen, *found):
        torch.testing.assert_close(both, (first + second) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quantizer", [FSP_125, VP_64], ids=["fsp", "vp"])
def test_an_adversarial_run_goes_on_as_if_nothing_had_been(tmp_path, quantizer):
    recipe = short(*quantizer, "loss.balancer=true", "train.accumulate=2")
    Trainer(recipe, tmp_path / "whole").train()
    train_interrupted(recipe, tmp_path / "cut", 7)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_sigterm_saves_and_stops(tmp_path):
    run = Trainer(short(), tmp_path)

    def terminate(terms):
        os.kill(os.getpid(), signal.SIGTERM)
        return terms

    run.train_step.loss = at_step(run, 7, run.train_step.loss, terminate)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert load_checkpoint(find_checkpoint(tmp_path))[1]["step"] == 8
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 9))


def test_a_run_may_turn_adversarial_later_and_back(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        plain = Trainer(short("discriminator.size=none"), tmp_path)
        plain.train_step.loss = at_step(plain, 5, plain.train_step.loss, press_ctrl_c)
        plain.train()
    middle = Trainer(short("discriminator.start_step=6", "train.steps=9"), tmp_path)
    assert middle.step == 6
    middle.train()
    assert "discriminator" in rows(tmp_path)[-1]
    Trainer(short("discriminator.size=none"), tmp_path).train()
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))
    assert "discriminator" not in rows(tmp_path)[-1]


def test_a_run_with_other_discriminators_is_refused(tmp_path):
    Trainer(short(), tmp_path).save()
    with pytest.raises(CheckpointError, match="other discriminators"):
        Trainer(short("discriminator.periods=[2, 3, 5]"), tmp_path)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_are_kept(tmp_path, keep):
    Trainer(short(f"train.keep={keep}", "train.save_every=3"), tmp_path).train()
    steps = [int(path.stem.removeprefix("step-")) for path in checkpoints.checkpoints(tmp_path)]
    assert steps == [3, 6, 9, 12][-keep:]


def test_a_run_says_when_its_data_changed(tmp_path):
    folder = tmp_path / "speech"
    folder.mkdir()
    (folder / "a.wav").write_bytes(SPEECH.read_bytes())
    recipe = short(f"data.train={folder}", "train.steps=12")
    Trainer(recipe, tmp_path / "run").save()
    assert Trainer(recipe, tmp_path / "run").notes == []
    (folder / "b.wav").write_bytes(SPEECH.read_bytes())
    assert "data have changed" in Trainer(recipe, tmp_path / "run").notes[0]


def test_the_run_s_readme_says_how_it_was_made(debug_run):
    text = (debug_run / "README.md").read_text()
    for part in ("levels:", "Data: generated", "torch 2.11", "codec 0.0", "discriminators"):
        assert part in text
    assert "git checkout" in text or "commit " in text


def held_out(folder: Path, kind: str) -> list[str]:
    """Overrides that have a run evaluated, on speech or on two pictures."""
    if kind == "audio":
        pytest.importorskip("pesq", reason="needs the score extra")
        return [f"eval.data={SPEECH.parent}", "eval.max_seconds=2"]
    from vpcodec.media.image import save_image

    folder.mkdir()
    for name, height, width in (("a.png", 40, 70), ("b.png", 96, 130)):
        y, x = np.mgrid[:height, :width]
        save_image(folder / name, np.stack([x, y, x + y], -1).astype(np.uint8))
    return [f"eval.data={folder}"]


@pytest.fixture(scope="module")
def evaluated_run(tmp_path_factory, kind) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    overrides = held_out(folder / "data", kind)
    Trainer(short("eval.every=6", *overrides, kind=kind), folder / "evaluated").train()
    return folder / "evaluated"


def evaluations(run: Path) -> list[dict]:
    return [row for row in rows(run) if "eval/entropy" in row]


def test_evaluation_scores_held_out_data(evaluated_run, whole_run, kind):
    found = evaluations(evaluated_run)
    assert [row["step"] for row in found] == [6, 12]
    for row in found:
        assert 0 < row["eval/cvu"] <= 1 and 1 <= row["eval/perplexity"] <= 125
        if kind == "audio":
            assert 1 <= row["eval/pesq_wb"] < 4.7 and -1 < row["eval/stoi"] < 1
            assert row["eval/mel_distance"] > 0 and math.isfinite(row["eval/si_sdr"])
            assert 166.67 * math.log2(125) <= row["eval/bitrate"] < 3 * 166.67 * math.log2(125)
        else:
            assert 3 < row["eval/psnr"] < 60
            assert -1 < row["eval/ssim"] < 1 and 0 <= row["eval/ms_ssim"] < 1
            assert math.log2(125) / 64 <= row["eval/bits_per_pixel"] < 6 * math.log2(125) / 64
    rest = [row for row in rows(evaluated_run) if "eval/entropy" not in row]
    for row, expected in zip(rest, rows(whole_run), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_the_best_weights_are_kept_and_can_be_exported(evaluated_run, tmp_path, kind):
    from vpcodec import Codec
    from vpcodec.export import export_run

    metric, best = ("mel_distance", min) if kind == "audio" else ("psnr", max)
    scores = {row["step"]: row[f"eval/{metric}"] for row in evaluations(evaluated_run)}
    _, state = load_checkpoint(evaluated_run / BEST)
    assert state["step"] == best(scores, key=scores.get)
    assert state["metric"] == metric
    assert state["value"] == pytest.approx(best(scores.values()), rel=1e-4)
    export_run(evaluated_run / BEST, tmp_path / "best")
    codec = Codec.from_pretrained(str(tmp_path / "best"))
    if kind == "audio":
        assert codec.decode(codec.encode(np.zeros(960, np.float32), RATE)).shape == (1, 960)
    else:
        pixels = np.zeros((9, 20, 3), np.uint8)
        assert codec.decode(codec.encode(pixels), pixels.shape[:2]).shape == pixels.shape


def test_a_step_may_be_compiled(tmp_path, monkeypatch, kind):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **_: compiled.append(type(module).__name__)
    )
    run = Trainer(short("train.compile=true", kind=kind), tmp_path)
    parts = (run.state.model.encoder, run.state.model.decoder, run.state.discriminators)
    assert compiled == [type(part).__name__ for part in parts]


def test_half_precision_needs_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(TrainingError, match="fp16"):
        Trainer(debug("train.precision=fp16"), tmp_path)


def test_bf16_trains_like_fp32(tmp_path, whole_run, kind):
    Trainer(short("train.precision=bf16", kind=kind), tmp_path).train()
    found, expected = rows(tmp_path), rows(whole_run)
    assert 0 < abs(found[0]["loss"] - expected[0]["loss"]) < 0.02 * expected[0]["loss"]
    for name in TERMS[kind]:  # of different noise soon, since rounding decides on cells
        ends = [np.mean([row[name] for row in log[-4:]]) for log in (found, expected)]
        assert ends[0] == pytest.approx(ends[1], rel=0.25)


def test_trackers_that_are_not_installed_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match="pip install wandb"):
        Trainer(short("train.trackers=[wandb]"), tmp_path)


def test_a_better_score_is_not_forgotten_when_a_run_is_resumed(tmp_path):
    pytest.importorskip("pesq", reason="needs the score extra")
    recipe = short(f"eval.data={SPEECH.parent}", "eval.every=6", "eval.max_seconds=1")
    run = Trainer(recipe, tmp_path)
    weights = {name: value.clone() for name, value in run.state.model.state_dict().items()}
    state = {"step": 3, "metric": "mel_distance", "value": 0.0, "refined": False}
    save_checkpoint(tmp_path / BEST, {"average": weights}, state)
    run.train()
    assert load_checkpoint(tmp_path / BEST)[1] == state


def test_an_evaluation_that_was_lost_is_made_again(tmp_path):
    pytest.importorskip("pesq", reason="needs the score extra")
    recipe = short(f"eval.data={SPEECH.parent}", "eval.every=5", "eval.max_seconds=1")
    first = Trainer(recipe, tmp_path)
    first.train_step.loss = at_step(first, 7, first.train_step.loss, press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    checkpoint_path(tmp_path, 8).unlink()
    kept = [row for row in rows(tmp_path) if "eval/stoi" not in row]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    Trainer(recipe, tmp_path).train()
    assert sorted(row["step"] for row in rows(tmp_path) if "eval/entropy" in row) == [5, 10, 12]


def test_a_run_killed_while_it_makes_its_codebook_makes_it_when_resumed(tmp_path):
    recipe = short(*VP_64)
    Trainer(recipe, tmp_path / "whole").train()

    def die(*arguments):
        raise MemoryError

    first = Trainer(recipe, tmp_path / "cut")
    first.codebook.make = die
    with pytest.raises(MemoryError):
        first.train()
    Trainer(recipe, tmp_path / "cut").train()
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tmp_path, whole_run, kind):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "lo')
    Trainer(short(kind=kind), tmp_path).train()
    assert_same_run(tmp_path, whole_run)


def test_weights_that_run_away_stop_the_run_in_one_line(tmp_path):
    run = Trainer(short("optim.lr=1e30", "optim.warmup_steps=0"), tmp_path)
    with pytest.raises(
        TrainingError, match=r"^step \d+: .*not finite; there is no checkpoint yet$"
    ):
        run.train()


def test_rows_have_the_means_since_the_last_one(tmp_path, whole_run, kind):
    recipe = short("train.log_every=4", "discriminator.every=3", kind=kind)
    Trainer(recipe, tmp_path / "a").train()
    whole = rows(whole_run)
    found = rows(tmp_path / "a")
    assert [row["step"] for row in found] == [4, 8, 12]
    for name in TERMS[kind]:
        assert found[0][name] == pytest.approx(np.mean([r[name] for r in whole[:4]]), rel=1e-4)
    assert [("discriminator" in row) for row in found] == [False, True, True]
    train_interrupted(recipe, tmp_path / "b", 6)
    assert_same_run(tmp_path / "b", tmp_path / "a")


def flip(path: Path, place: float) -> None:
    """Change one bit, `place` of the way through a file."""
    data = bytearray(path.read_bytes())
    data[round(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "zeros at the end": lambda path: path.write_bytes(path.read_bytes()[:-4096] + bytes(4096)),
    "bit of the header": lambda path: flip(path, 0.001),
    "bit in the middle": lambda path: flip(path, 0.5),
    "last bit": lambda path: flip(path, 1.0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    tmp_path, whole_run, kind, damage
):
    shutil.copytree(whole_run, tmp_path / "run")
    run, newest = tmp_path / "run", checkpoint_path(tmp_path / "run", 12)
    (run / "checkpoints" / ".abc.tmp").write_bytes(b"of a killed run")
    DAMAGES[damage](newest)
    with pytest.raises(CheckpointError, match="not a checkpoint, or damaged"):
        load_checkpoint(newest)
    second = Trainer(short(kind=kind), run)
    assert second.step == 10
    (note,) = second.notes
    assert note.startswith(f"{newest}: ") and note.endswith("; using the one before it")
    second.train()
    assert_same_run(run, whole_run)
    assert len(list((run / "checkpoints").iterdir())) == 2


def test_every_bit_of_a_checkpoint_counts(tmp_path):
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, {"model": {"a": torch.arange(5)}}, {"step": 1})
    data = path.read_bytes()
    for i in range(8 * len(data)):
        spoilt = bytearray(data)
        spoilt[i // 8] ^= 1 << i % 8
        path.write_bytes(spoilt)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


def test_checkpoints_without_a_checksum_are_read(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file({"model/a": torch.arange(3)}, path, {"state": json.dumps({"step": 1})})
    groups, state = load_checkpoint(path)
    assert state == {"step": 1} and torch.equal(groups["model"]["a"], torch.arange(3))


def test_damaged_checkpoints_go_when_the_next_is_saved(tmp_path):
    run = Trainer(short("train.steps=20", "train.keep=2"), tmp_path)
    for step in (5, 10, 15):
        run.state.step = step
        run.save()
    flip(checkpoint_path(tmp_path, 15), 0.5)
    again = Trainer(short("train.steps=20", "train.keep=2"), tmp_path)
    again.state.step = 12
    again.save()
    assert checkpoints.checkpoints(tmp_path) == [checkpoint_path(tmp_path, n) for n in (10, 12)]


def test_where_all_checkpoints_are_damaged_the_newest_is_named(tmp_path):
    Trainer(short(), tmp_path).train()
    for path in checkpoints.checkpoints(tmp_path):
        flip(path, 0.5)
    with pytest.raises(CheckpointError, match="step-00000012.*damaged"):
        Trainer(short(), tmp_path)


def test_export_passes_over_a_damaged_checkpoint_and_says_so(tmp_path):
    from vpcodec.export import export_run

    Trainer(short(), tmp_path / "run").train()
    flip(checkpoint_path(tmp_path / "run", 12), 0.5)
    notes: list[str] = []
    export_run(tmp_path / "run", tmp_path / "model", note=notes.append)
    (note,) = notes
    assert "step-00000012" in note and note.endswith("using the one before it")


def test_a_run_says_what_it_does_not_use_and_what_changed(tmp_path, debug_model):
    Trainer(short(), tmp_path).save()
    again = Trainer(short("data.batch_size=3"), tmp_path, init_from=debug_model / "gone")
    assert "gone is not used" in again.notes[0] and "the batch size has changed" in again.notes[1]


def test_files_that_cannot_be_read_are_listed_in_the_run(tmp_path):
    folder = tmp_path / "speech"
    folder.mkdir()
    (folder / "good.wav").write_bytes(SPEECH.read_bytes())
    (folder / "bad.wav").write_bytes(b"no audio")
    Trainer(short(f"data.train={folder}"), tmp_path / "run").train()
    assert (tmp_path / "run" / "skipped.txt").read_text() == f"{folder / 'bad.wav'}\n"


def test_a_recipe_that_asks_for_fewer_steps_changes_nothing(whole_run, kind):
    before = {path: path.read_bytes() for path in whole_run.rglob("*") if path.is_file()}
    Trainer(short("train.steps=6", kind=kind), whole_run).train()
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_without_a_codebook_cannot_be_exported(tmp_path):
    from vpcodec.export import export_run

    Trainer(short("model.quantizer={type: vq, codebook_size: 65536}"), tmp_path / "run").save()
    with pytest.raises(CheckpointError, match="no codebook yet"):
        export_run(tmp_path / "run", tmp_path / "model")
