"""bf16 computes what float32 does, on the processor that runs this, or training takes float32."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
for package in ("yaml", "torchaudio", "safetensors", "accelerate", "tensorboard"):
    pytest.importorskip(package, reason="needs the train extra")

from paths import RECIPES

from vpcodec.recipe import Recipe, load_recipe
from vpcodec.training import hardware, step
from vpcodec.training.audio.discriminators import _conv, _convolve
from vpcodec.training.hardware import TrainingError, compile_options
from vpcodec.training.precision import Network, find_fault
from vpcodec.training.trainer import Trainer

pytestmark = pytest.mark.slow

CODECS = sorted(path for path in RECIPES.glob("*.yaml") if path.stem != "lm")
DEBUG = [path for path in CODECS if "debug" in path.stem]
FEW = {  # networks of few layers, since each takes seconds to compile
    "debug": [
        "model.strides=[8]",
        "model.encoder_dims=[16]",
        "model.encoder_depths=[1]",
        "model.decoder_dims=[16]",
        "model.decoder_depths=[1]",
        "discriminator.periods=[2]",
        "discriminator.fft_sizes=[256]",
    ],
    "image_debug": [],
}
BF16 = torch.bfloat16
CPU = torch.device("cpu")


def load(path: Path, *overrides: str) -> Recipe:
    """A recipe of generated data, small, adversarial from the start."""
    size = load_recipe(path).discriminator.size
    audio = load_recipe(path).model.kind == "audio"
    return load_recipe(
        path,
        [
            "data.train=null",
            "data.batch_size=2",
            "data.crop_seconds=0.4" if audio else "data.crop_size=64",
            f"discriminator.size={'small' if size == 'none' else size}",
            "discriminator.start_step=0",
            "eval.data=null",
            "train.device=cpu",
            "train.steps=3",
            "train.log_every=1",
            *overrides,
        ],
    )


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that multiplies bf16 faster, so that "auto" chooses it."""
    monkeypatch.setattr(hardware, "_seconds", {BF16: 1.0, torch.float32: 2.0}.get)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("path", CODECS, ids=lambda path: path.stem)
def test_every_network_computes_in_bf16_what_it_does_in_fp32(path, tmp_path):
    run = Trainer(load(path, "train.precision=bf16"), tmp_path)
    assert [network.name for network in run.train_step.networks(run.data.shape)] == [
        "encoder",
        "decoder",
        "discriminators",
    ]
    assert find_fault(run.train_step.networks(run.data.shape), BF16, compiled=False) is None


@pytest.mark.parametrize("path", DEBUG, ids=lambda path: path.stem)
def test_every_compiled_network_computes_in_bf16_what_it_does_in_fp32(path, tmp_path):
    run = Trainer(
        load(path, *FEW[path.stem], "train.precision=bf16", "train.compile=true"), tmp_path
    )
    assert find_fault(run.train_step.networks(run.data.shape), BF16, compiled=True) is None
    torch.compiler.reset()


def as_nothing(y: torch.Tensor) -> torch.Tensor:
    return y * math.nan


def as_one_nan(y: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(y.shape, dtype=torch.bool)
    mask.view(-1)[-1] = True
    return y.masked_fill(mask, math.nan)


def as_noise(y: torch.Tensor) -> torch.Tensor:
    return y + y.detach().std() * torch.randn_like(y) / 4


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, y):
        return y.view_as(y)

    @staticmethod
    def backward(context, gradient):
        return gradient / 2


def with_fault(monkeypatch: pytest.MonkeyPatch, spoil: Callable, only: Callable) -> None:
    """Convolutions whose input is `only` give something spoilt in bf16."""
    convolve = torch.nn.functional.conv2d

    def conv2d(x, *arguments, **options):
        y = convolve(x, *arguments, **options)
        return spoil(y) if y.dtype == BF16 and only(x) else y

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (as_nothing, "gives values that are not finite"),
        (as_one_nan, "gives values that are not finite"),
        (as_noise, "is off by"),
        (HalfGradient.apply, "has gradients off by"),
    ],
    ids=["nan", "one nan", "wrong", "wrong gradient"],
)
@pytest.mark.parametrize("path", DEBUG, ids=lambda path: path.stem)
def test_auto_takes_fp32_where_convolutions_are_wrong(
    monkeypatch, tmp_path, faster, path, spoil, words
):
    with_fault(monkeypatch, spoil, lambda x: True)
    run = Trainer(load(path), tmp_path)
    assert run.state.precision == "fp32"
    (note,) = run.notes
    assert note.startswith("train.precision=auto uses fp32: in bf16 on this machine, the ")
    assert words in note and "\n" not in note
    run.train()
    assert all(map(math.isfinite, losses(tmp_path)))
    assert Trainer(load(path), tmp_path).state.precision == "fp32"


@pytest.mark.parametrize("name", ["encoder", "decoder", "discriminators"])
def test_auto_says_which_network_is_wrong(monkeypatch, tmp_path, faster, name):
    make = step.Network
    wrong = torch.nn.Linear(1, 1)
    wrong.forward = lambda x: (
        x * wrong.weight * (math.nan if torch.is_autocast_enabled("cpu") else 1)
    )
    monkeypatch.setattr(
        step, "Network", lambda n, module, x: make(n, wrong if n == name else module, x)
    )
    run = Trainer(load(DEBUG[0]), tmp_path)
    assert run.state.precision == "fp32" and f"the {name} gives values" in run.notes[0]


def test_auto_takes_fp32_where_only_compiled_networks_are_wrong(monkeypatch, tmp_path, faster):
    def compile(module, **options):
        def call(*arguments):
            y = module._call_impl(*arguments)
            half = torch.is_autocast_enabled("cpu") and torch.is_tensor(y)
            return as_nothing(y) if half else y

        module._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    run = Trainer(load(DEBUG[0], "train.compile=true"), tmp_path)
    assert run.state.precision == "fp32" and "the encoder, compiled, gives values" in run.notes[0]
    assert Trainer(load(DEBUG[0]), tmp_path / "eager").state.precision == "bf16"


@pytest.mark.parametrize("path", DEBUG, ids=lambda path: path.stem)
def test_the_comparison_changes_nothing_of_the_run(tmp_path, faster, path):
    for precision in ("auto", "bf16"):
        run = Trainer(load(path, f"train.precision={precision}"), tmp_path / precision)
        assert run.state.precision == "bf16" and run.notes == []
        assert all(parameter.grad is None for parameter in run.state.model.parameters())
        run.train()
    assert losses(tmp_path / "auto") == losses(tmp_path / "bf16")


def test_the_comparison_draws_no_random_numbers():
    network = torch.nn.Linear(3, 2)
    noisy = torch.nn.Sequential(network, torch.nn.Dropout(0.5))  # the same noise in each pass
    before = torch.get_rng_state()
    x = torch.linspace(-1, 1, 12).view(4, 3).requires_grad_()
    assert find_fault([Network("net", noisy, x)], BF16, compiled=False) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_resumed_run_keeps_its_precision_unasked(monkeypatch, tmp_path, faster):
    Trainer(load(DEBUG[0]), tmp_path).save()
    with_fault(monkeypatch, as_nothing, lambda x: True)
    run = Trainer(load(DEBUG[0]), tmp_path)
    assert run.state.precision == "bf16" and run.notes == []


def test_what_the_recipe_says_is_done(monkeypatch, tmp_path):
    with_fault(monkeypatch, as_nothing, lambda x: True)
    run = Trainer(load(DEBUG[0], "train.precision=bf16"), tmp_path)
    with pytest.raises(TrainingError, match="not finite; .*; train.precision=fp32 may help$"):
        run.train()
    Trainer(load(DEBUG[0], "train.precision=fp32"), tmp_path).train()
    assert all(map(math.isfinite, losses(tmp_path)))


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_convolutions_of_narrow_spectra_are_the_same_without_onednn(monkeypatch, width, stride):
    """On a processor with AMX these give NaN from oneDNN: in bf16 they are not asked of it."""
    torch.manual_seed(0)
    conv = _conv(8, 4, (3, 9), (1, stride), (2, 1))
    x = torch.randn(2, 8, 11, width).to(memory_format=torch.channels_last)
    exact = conv(x)
    with_fault(monkeypatch, as_nothing, lambda x: x.shape[-1] <= 4)
    asked = conv.__class__._conv_forward

    def conv_forward(self, x, *arguments):
        assert x.shape[-1] > 4 or not torch.is_autocast_enabled("cpu")
        return asked(self, x, *arguments)

    monkeypatch.setattr(conv.__class__, "_conv_forward", conv_forward)
    with torch.autocast("cpu", BF16):
        found = _convolve(conv, x)
    assert found.dtype == BF16
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05)
    torch.testing.assert_close(_convolve(conv, x), exact)


def test_vectors_are_narrow_only_where_wide_ones_are_wrong(monkeypatch):
    for amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        expected = {"cpp.simdlen": 256} if amx else None
        assert compile_options("bf16", CPU) == expected
        assert compile_options("fp32", CPU) is None
        assert compile_options("bf16", torch.device("cuda")) is None
