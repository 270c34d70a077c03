"""Pruning: what is redundant goes without loss, the rest stands in for what went; the command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import refuse, run

torch = pytest.importorskip("torch", reason="needs the train extra")

from paths import RECIPES
from safetensors.torch import load_file

from vpcodec.config import AudioConfig
from vpcodec.models import build_model
from vpcodec.recipe import load_recipe
from vpcodec.training.checkpoints import load_weights
from vpcodec.training.pruning import DAMPING, PruningError, prune, surgeon

pytestmark = pytest.mark.slow

RECIPE = RECIPES / "debug.yaml"
TINY = dict(
    name="tiny",
    strides=(8, 4, 3),
    encoder_dims=(8, 12, 16),
    encoder_depths=(1, 2, 1),
    decoder_dims=(16, 12, 8),
    decoder_depths=(1, 1, 1),
    tconv_channels=8,
    attention_window=16,
    attention_heads=2,
    last_dim=8,
    quantizer={"type": "fsp", "levels": [5, 5, 5]},
)


@pytest.fixture
def wide():
    torch.manual_seed(0)
    return build_model(AudioConfig(**TINY)).eval()


@pytest.fixture
def samples():
    walk = np.cumsum(np.random.default_rng(0).standard_normal((4, 96 * 60)), 1)
    return torch.from_numpy((walk / np.abs(walk).max()).astype(np.float32))


def test_what_stays_is_the_least_squares_answer():
    rng = np.random.default_rng(0)
    h = torch.from_numpy(rng.standard_normal((500, 24)) @ rng.standard_normal((24, 24)))
    moments, weight = h.T @ h / len(h), torch.from_numpy(rng.standard_normal((7, 24)))
    kept, columns = surgeon(moments, weight, 15, fixed=2)
    assert len(set(kept.tolist())) == 15 and {22, 23} <= set(kept.tolist())
    damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(24)
    best = weight @ damped[:, kept] @ torch.linalg.inv(damped[kept][:, kept])
    torch.testing.assert_close(columns.double(), best, rtol=1e-4, atol=1e-5)


def test_a_unit_that_matters_less_goes_first():
    """Independent inputs: what is removed is what adds least to the output."""
    scale = torch.linspace(2, 0.1, 20).double()
    weight = torch.ones(3, 20).double()
    kept, columns = surgeon(torch.diag(scale**2), weight, 12)
    assert kept.tolist() == list(range(12))
    torch.testing.assert_close(columns.double(), weight[:, :12], rtol=1e-2, atol=0)


def test_redundant_units_go_without_loss(wide, samples):
    """Every second hidden unit a copy of the one before: half the width is enough."""
    for stage in (*wide.encoder.stages, *wide.decoder.stages):
        for unit in stage:
            unit.widen.weight.data[1::2] = unit.widen.weight.data[::2]
            unit.widen.bias.data[1::2] = unit.widen.bias.data[::2]
    for part in (wide.encoder, wide.decoder):
        for layer in part.transformer.layers:
            layer.gate.weight.data[1::2] = layer.gate.weight.data[::2]
    halves = {"encoder_feedforward_dim": 32, "decoder_feedforward_dim": 32}
    assert wide.encoder.transformer.layers[0].narrow.in_features == 2 * 32
    smaller = prune(wide, AudioConfig(**TINY | halves, expansion=2), samples.split(2))
    with torch.no_grad():
        expected, found = wide.encoder(samples), smaller.encoder(samples)
        assert (expected - found).abs().max() < 0.02 * expected.std()
        tokens = wide.encode(samples)
        expected, found = wide.decode(tokens), smaller.decode(tokens)
        assert (expected - found).abs().max() < 0.02 * expected.std()


def test_fewer_units_and_a_shorter_window(wide, samples):
    """First units and nearest distances stay as they are."""
    change = {"encoder_depths": (1, 1, 1), "attention_window": 5, "decoder_layers": 1}
    smaller = prune(wide, AudioConfig(**TINY | change), [samples])
    own, old = smaller.state_dict(), wide.state_dict()
    for name, value in own.items():
        torch.testing.assert_close(value, old[name][:5] if "distance_bias" in name else old[name])
    assert "encoder.stages.1.1.narrow.weight" in old.keys() - own.keys()


def test_expansions_of_one_part_alone(wide, samples):
    config = AudioConfig(**TINY, encoder_expansions=(4, 1, 3))
    smaller = prune(wide, config, [samples])
    widths = [[u.narrow.in_features for u in stage] for stage in smaller.encoder.stages]
    assert widths == [[32], [12, 12], [48]]
    own, old = smaller.state_dict(), wide.state_dict()
    same = [name for name in own if not name.startswith(("encoder.stages.1", "encoder.stages.2"))]
    assert all(torch.equal(own[name], old[name]) for name in same)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"expansion": 5}, "larger"),
        ({"encoder_layers": 2}, "larger"),
        ({"attention_window": 17}, "larger"),
        ({"expansion": 1, "attention_window": 17}, "larger"),
        ({"decoder_dims": (16, 12, 6)}, "decoder_dims differs"),
        ({"enhance_dilations": (1, 1, 1, 1)}, "enhance_dilations differs"),
        ({"quantizer": {"type": "fsq", "levels": [5, 5, 5]}}, "quantizer differs"),
    ],
)
def test_what_cannot_become_smaller_is_refused_before_data_is_read(change, reason, wide):
    def batches():
        raise AssertionError("data was read")
        yield

    with pytest.raises(PruningError, match=reason):
        prune(wide, AudioConfig(**TINY | change), batches())


def test_a_codebook_comes_along(samples):
    torch.manual_seed(0)
    tiny = TINY | {"quantizer": {"type": "vp", "dim": 3, "codebook_size": 16}}
    model = build_model(AudioConfig(**tiny)).eval()
    model.quantizer.fit(torch.randn(500, 3))
    smaller = prune(model, AudioConfig(**tiny, expansion=1), [samples])
    codes = torch.arange(16)
    expected = model.quantizer.tokens_to_latents(codes)
    assert torch.equal(smaller.quantizer.tokens_to_latents(codes), expected)


def test_no_samples_are_refused(wide):
    with pytest.raises(PruningError, match="no samples"):
        prune(wide, AudioConfig(**TINY, expansion=2), [])


def test_the_command(debug_model, tmp_path, monkeypatch):
    """Its result starts a training of the smaller model."""
    monkeypatch.chdir(tmp_path)
    text = RECIPE.read_text()
    Path("small.yaml").write_text(text.replace("  last_dim", "  expansion: 2\n  last_dim"))
    done = run("models", "prune", debug_model, "small.yaml", "-o", "w.safetensors", "--batches", 2)
    assert b"--init-from w.safetensors" in done.out
    before = load_file(debug_model / "model.safetensors")["encoder.stages.0.0.narrow.weight"]
    after = load_file("w.safetensors")["encoder.stages.0.0.narrow.weight"]
    assert before.shape == (8, 32) and after.shape == (8, 16)
    config = load_recipe("small.yaml").model
    assert load_weights(build_model(config), Path("w.safetensors")) == []


def test_the_command_refuses(debug_model, debug_image_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = RECIPE.read_text()
    Path("large.yaml").write_text(text.replace("  last_dim", "  expansion: 5\n  last_dim"))
    out = ("-o", "w.safetensors", "--batches", 1)
    assert "larger" in refuse("models", "prune", debug_model, "large.yaml", *out)
    assert "audio model" in refuse("models", "prune", debug_image_model, RECIPE, *out)
    assert "absent" in refuse("models", "prune", tmp_path / "absent", RECIPE, *out)
