from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

torch = pytest.importorskip("torch", reason="needs the train extra")
for package in ("yaml", "torchaudio", "safetensors", "tensorboard"):
    pytest.importorskip(package, reason="needs the train extra")

from vpcodec.audio import resample  # noqa: E402
from vpcodec.config import DataConfig, LossConfig, Recipe, load_recipe  # noqa: E402
from vpcodec.models import AudioAutoencoder  # noqa: E402
from vpcodec.training import checkpoints, data, trainer  # noqa: E402
from vpcodec.training.checkpoints import (  # noqa: E402
    CHECKPOINT,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from vpcodec.training.data import Crops, DataError  # noqa: E402
from vpcodec.training.losses import ReconstructionLoss  # noqa: E402
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


def write(path: Path, samples: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> None:
    soundfile.write(path, samples, rate, subtype=subtype)


def crops(folder: Path | None, *, seed: int = 0, **config) -> Crops:
    config = {"crop_seconds": 0.1, "gain_db": (0.0, 0.0), "batch_size": 4} | config
    train = None if folder is None else str(folder)
    return Crops(DataConfig(train=train, **config), sample_rate=RATE, multiple=96, seed=seed)


def noise(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    return 0.2 * np.random.default_rng(seed).standard_normal(int(seconds * rate)).clip(-4, 4)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    folder = tmp_path / "recordings"
    (folder / "more").mkdir(parents=True)
    write(folder / "a.wav", noise(1.0))
    write(folder / "more" / "b.flac", noise(2.0, seed=1))
    return folder


@pytest.mark.parametrize("generated", [False, True])
def test_a_batch_depends_on_seed_and_step_alone(recordings, generated):
    folder = None if generated else recordings
    first = crops(folder)
    batches = [first.batch(step) for step in range(4)]
    np.testing.assert_array_equal(crops(folder).batch(3), batches[3])
    np.testing.assert_array_equal(first.batch(0), batches[0])
    np.testing.assert_array_equal(crops(folder, cache_mb=0).batch(2), batches[2])
    np.testing.assert_array_equal(list(crops(folder).batches(1, 4)), batches[1:])
    assert not np.array_equal(batches[0], batches[1])
    assert not np.array_equal(crops(folder, seed=1).batch(0), batches[0])
    assert len(np.unique(batches[0], axis=0)) == 4


def test_batches_are_whole_hops_of_float32_in_range(recordings):
    batch = crops(recordings, gain_db=(20.0, 30.0)).batch(0)
    assert batch.dtype == np.float32 and batch.shape == (4, 17 * 96)
    assert np.abs(batch).max() <= 1


def test_the_gain_is_uniform_in_decibels(tmp_path):
    write(tmp_path / "a.wav", np.full(RATE, 0.25))
    level = np.abs(crops(tmp_path, gain_db=(-12.0, 6.0), batch_size=400).batch(0)).max(1)
    decibels = 20 * np.log10(level / 0.25)
    assert -12.1 <= decibels.min() < -11 and 5 < decibels.max() <= 6.1
    assert decibels.mean() == pytest.approx(-3, abs=1)


def test_files_are_drawn_in_proportion_to_their_length(tmp_path):
    write(tmp_path / "quiet.wav", np.full(RATE, 0.25))
    write(tmp_path / "loud.wav", np.full(3 * RATE, 0.5))
    drawn = crops(tmp_path, batch_size=400)
    loud = np.abs(drawn.batch(0)).max(1) > 0.4
    assert loud.mean() == pytest.approx(0.75, abs=0.07)
    assert drawn.hours == pytest.approx(4 / 3600)


def test_a_file_shorter_than_a_crop_is_padded(tmp_path):
    write(tmp_path / "a.wav", np.full(RATE // 5, 0.25))
    batch = crops(tmp_path, crop_seconds=0.3).batch(0)
    assert np.abs(batch[:, : RATE // 5]).min() == pytest.approx(0.25, abs=1e-3)
    assert not batch[:, RATE // 5 :].any()


def test_files_that_cannot_be_read_are_left_out_and_listed(recordings):
    (recordings / "garbage.wav").write_bytes(b"no audio at all")
    (recordings / "empty.flac").write_bytes(b"")
    write(recordings / "nothing.wav", np.zeros(0))
    (recordings / "notes.txt").write_text("not audio by its name")
    drawn = crops(recordings)
    assert np.abs(drawn.batch(0)).max() > 0
    names = sorted(Path(path).name for path in drawn.skipped)
    assert names == ["empty.flac", "garbage.wav", "nothing.wav"]


def test_a_file_that_turns_out_bad_is_left_out_too(tmp_path):
    write(tmp_path / "good.wav", noise(1.0))
    write(tmp_path / "bad.wav", np.full(RATE, np.nan), subtype="FLOAT")
    (tmp_path / "garbage.wav").write_bytes(b"no audio at all")
    drawn = crops(tmp_path)
    for step in range(4):
        assert np.isfinite(drawn.batch(step)).all()
    assert sorted(Path(path).name for path in drawn.skipped) == ["bad.wav", "garbage.wav"]


def test_a_folder_of_bad_files_alone_ends_in_an_error(tmp_path):
    write(tmp_path / "bad.wav", np.full(RATE, np.nan), subtype="FLOAT")
    with pytest.raises(DataError, match="no audio file that can be read"):
        crops(tmp_path).batch(0)


@pytest.mark.parametrize("name", ["absent", "empty", "file.wav"])
def test_a_folder_without_audio_is_refused_and_named(tmp_path, name):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "file.wav", noise(0.5))
    with pytest.raises(DataError, match=name):
        crops(tmp_path / name)


def test_stereo_at_another_rate_becomes_mono_at_the_model_s(tmp_path):
    left, right = noise(1.0, 44_100), noise(1.0, 44_100, seed=1)
    write(tmp_path / "a.wav", np.stack([left, right], 1), 44_100)
    batch = crops(tmp_path, crop_seconds=0.996, batch_size=1).batch(0)[0]
    expected = resample(((left + right) / 2).astype(np.float32), 44_100, RATE)
    expected = np.squeeze(expected)
    starts = range(len(expected) - len(batch) + 1)
    errors = [
        np.abs(sign * batch - expected[start : start + len(batch)]).max()
        for start in starts
        for sign in (1, -1)
    ]
    assert min(errors) < 1e-3 < np.median(errors)


def test_a_long_file_is_read_where_the_crop_lies(tmp_path, monkeypatch):
    write(tmp_path / "a.wav", noise(5.0))
    expected = crops(tmp_path, batch_size=8).batch(0)
    reads = []

    class Spy(soundfile.SoundFile):
        def read(self, frames=-1, *arguments, **options):
            reads.append(frames)
            return super().read(frames, *arguments, **options)

    monkeypatch.setattr(soundfile, "SoundFile", Spy)
    monkeypatch.setattr(data, "LONG_SECONDS", 1.0)
    np.testing.assert_allclose(crops(tmp_path, batch_size=8).batch(0), expected, atol=1e-4)
    assert len(reads) == 8 and 0 < min(reads) and max(reads) <= 17 * 96 + 1


def test_a_crop_of_a_long_file_at_another_rate_is_full(tmp_path, monkeypatch):
    write(tmp_path / "a.wav", noise(3.0, 44_100), 44_100)
    monkeypatch.setattr(data, "LONG_SECONDS", 1.0)
    batch = crops(tmp_path, batch_size=16).batch(0)
    assert np.abs(batch[:, -8:]).max(1).min() > 0


@pytest.fixture
def loss() -> ReconstructionLoss:
    return ReconstructionLoss(LossConfig(), RATE)


def signal_noise(level: float = 0.2) -> torch.Tensor:
    return torch.from_numpy(noise(0.5, seed=2)).float()[None] * (level / 0.2)


def test_identical_signals_have_no_loss(loss):
    x = signal_noise()
    assert {k: v.item() for k, v in loss(x, x).items()} == {"wave": 0, "stft": 0, "mel": 0}


def test_the_loss_grows_with_the_noise(loss):
    x, error = signal_noise(), torch.from_numpy(noise(0.5, seed=3)).float()
    terms = [loss(x, x + level * error) for level in (0.01, 0.1, 1.0)]
    for name in ("wave", "stft", "mel"):
        values = [term[name].item() for term in terms]
        assert 0 < values[0] < 0.5 * values[1] < 0.25 * values[2]


def test_half_the_amplitude_costs_what_the_formula_says(loss):
    x = signal_noise(0.25)
    terms = loss(x, x / 2)
    assert terms["wave"].item() == pytest.approx(0.5, rel=1e-4)
    assert terms["stft"].item() == pytest.approx(0.5 + math.log10(2), rel=0.03)
    assert terms["mel"].item() == pytest.approx(math.log10(2), rel=0.03)


def test_the_loss_is_computed_in_float32(loss):
    x, y = signal_noise(), signal_noise(0.1)
    plain = loss(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        for name, value in loss(x, y).items():
            assert value.dtype == torch.float32
            assert torch.equal(value, plain[name])


@pytest.mark.parametrize("target", [0.0, 0.2])
@pytest.mark.parametrize("output", [0.0, 0.2])
def test_silence_gives_finite_losses_and_gradients(loss, target, output):
    y = signal_noise(output).requires_grad_()
    terms = loss(signal_noise(target), y)
    assert all(torch.isfinite(value) for value in terms.values())
    sum(terms.values()).backward()
    assert torch.isfinite(y.grad).all()


def test_sizes_without_mel_bands_leave_the_mel_term_out():
    loss = ReconstructionLoss(LossConfig(fft_sizes=(128,), mel_bands=(0,)), RATE)
    assert loss(signal_noise(), signal_noise(0.1))["mel"].item() == 0
