"""The contract of every streaming layer, and of the two graphs made of them.

A layer takes frames of one or more input steps each, and gives the same number of output steps for
each. Whatever the layer:

- in pieces of any lengths, the state handed on, it gives what it gives for the whole at once;
- what stands in other rows of a batch, or behind the end of a row, changes nothing;
- an output frame depends on its own input frame, on no later step, and on as many earlier ones as
  the state holds: no more, and all of them.

After `verify_contract` of google/sequence-layers.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("yaml", reason="needs the train extra")

from autoencoders import build, config_of
from torch import nn

from vpcodec.models import AudioAutoencoder, layers, local_attention, tconv
from vpcodec.models.layers import (
    NOISE_FRAMES,
    Causal,
    CausalConv1d,
    ChannelNorm,
    ConvUnit,
    DilatedUnit,
    DownLayer,
    FrameCounter,
    NoiseInjection,
    Snake,
    State,
    SynthesisFilterbank,
    UpLayer,
    name_states,
    zero_state,
)
from vpcodec.models.local_attention import (
    LocalAttention,
    LocalTransformer,
    TransformerLayer,
)
from vpcodec.models.tconv import EnhanceBlock, TConv

pytestmark = pytest.mark.usefixtures("one_thread")

TIME_FIRST = (UpLayer, LocalAttention)  # whose state is (steps, channels)


class Noise(nn.Module):
    """A counter and the injection that it serves, as in the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = FrameCounter()
        self.noise = NoiseInjection(6, channels=4, rate=3, seed=0)

    def forward(self, x: torch.Tensor, state: State | None = None) -> torch.Tensor:
        return self.noise(x, self.frames(x[:, 0, ::3], state))


class Stateless(nn.Module):
    """A layer that has no history and is not told of any."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, state: State | None = None) -> torch.Tensor:
        return self.layer(x)


@dataclass(frozen=True)
class Case:
    """A layer and its signals.

    Attributes:
        make: the layer.
        shape: of an input of T steps without the batch, T given as None.
        column: input steps of a frame.
        frames: how many are tried.
        time: axis of the output along which time runs; that of the input is that of None.
        smooth: whether it has a gradient in all that it sees; counts of frames have none.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int | None, ...]
    column: int = 1
    frames: int = 60
    time: int = -1
    smooth: bool = True

    @property
    def axis(self) -> int:
        return self.shape.index(None) + 1

    def layer(self) -> nn.Module:
        """With no bias, scale or norm left at its neutral start."""
        torch.manual_seed(0)
        layer = self.make().eval().requires_grad_(False)
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        self.shapes(layer)
        return layer

    @staticmethod
    def shapes(layer: nn.Module) -> dict[str, tuple[int, int]]:
        return name_states(layer)

    def signal(self, rows: int = 2, seed: int = 1) -> torch.Tensor:
        shape = [self.frames * self.column if n is None else n for n in self.shape]
        return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))

    def fading(self) -> torch.Tensor:
        """One signal at all steps, ever weaker: the oldest step of a window is the largest."""
        x = self.signal().select(self.axis, 0).unsqueeze(self.axis)
        steps = [self.frames * self.column if n is None else 1 for n in self.shape]
        return x * torch.exp(-0.01 * torch.arange(self.frames * self.column)).view(1, *steps)


def conv(*sizes: int, **options: int) -> Callable[[], nn.Module]:
    return lambda: CausalConv1d(*sizes, **options)


CASES: dict[str, Case] = {
    "convolution": Case(conv(4, 6, 7), (4, None)),
    "convolution of one step": Case(conv(4, 6, 1), (4, None)),
    "dilated convolution": Case(conv(4, 6, 3, dilation=5), (4, None)),
    "depthwise convolution": Case(conv(6, 6, 5, groups=6), (6, None)),
    "strided convolution": Case(conv(4, 6, 8, stride=4), (4, None), column=4),
    "patches": Case(conv(4, 6, 3, stride=3), (4, None), column=3),
    "ConvUnit": Case(lambda: ConvUnit(6, kernel_size=7, expansion=2), (6, None)),
    "DownLayer": Case(lambda: DownLayer(4, 6, 3), (4, None), column=3),
    "UpLayer": Case(lambda: UpLayer(6, 4, 3), (6, None)),
    "UpLayer of two": Case(lambda: UpLayer(6, 4, 2), (6, None)),
    "DilatedUnit": Case(lambda: DilatedUnit(6, kernel_size=3, dilations=(1, 3)), (6, None)),
    "SynthesisFilterbank": Case(lambda: SynthesisFilterbank(6, 4, taps=3), (6, None)),
    "Snake": Case(lambda: Stateless(Snake(6)), (6, None)),
    "ChannelNorm": Case(lambda: Stateless(ChannelNorm(6)), (6, None)),
    "FrameCounter": Case(
        FrameCounter, (None, 5), frames=2 * NOISE_FRAMES + 7, time=1, smooth=False
    ),
    "NoiseInjection": Case(Noise, (6, None), column=3, frames=NOISE_FRAMES + 9),
    "TConv": Case(lambda: TConv((9, 1, 3), 8, 6, stride=4, taps=12), (1, None), column=4),
    "TConv of the wave": Case(lambda: TConv((1,), 8, 6, stride=4, taps=4), (1, None), column=4),
    "EnhanceBlock": Case(
        lambda: EnhanceBlock(
            6, windows=(1, 3, 5), dilations=(1, 2, 5), branch_channels=2, kernel_size=3
        ),
        (6, None),
    ),
    "LocalAttention": Case(lambda: LocalAttention(8, heads=2, window=5), (None, 8), time=1),
    "LocalAttention of one": Case(lambda: LocalAttention(8, heads=2, window=1), (None, 8), time=1),
    "TransformerLayer": Case(lambda: TransformerLayer(8, heads=2, window=5), (None, 8), time=1),
    "LocalTransformer": Case(lambda: LocalTransformer(8, layers=3, heads=2, window=5), (8, None)),
}
every_layer = pytest.mark.parametrize("name", CASES)


def pieces(frames: int, seed: int) -> list[int]:
    """Lengths that add up to so many frames, short ones among them."""
    rng, found = random.Random(seed), []
    while sum(found) < frames:
        found.append(min(rng.choice((1, 1, 2, 3, rng.randint(1, frames))), frames - sum(found)))
    return found


def in_pieces(
    step: Callable[[torch.Tensor, State], torch.Tensor],
    x: torch.Tensor,
    lengths: list[int],
    shapes: dict[str, tuple[int, int]],
    axis: int,
    time: int,
) -> torch.Tensor:
    """The pieces one after the other, with the state of each handed to the next."""
    past, parts = zero_state(shapes, len(x)), []
    for piece in x.split(lengths, axis):
        state = State(past)
        parts.append(step(piece, state))
        assert {k: v.shape for k, v in state.next.items()} == {k: v.shape for k, v in past.items()}
        past = state.next
    return torch.cat(parts, time)


def chunkings(frames: int, column: int) -> list[list[int]]:
    """Step by step, and in three other ways; lengths in input steps."""
    ways = [[1] * frames, *(pieces(frames, seed) for seed in range(3))]
    return [[n * column for n in way] for way in ways]


@every_layer
def test_pieces_give_what_the_whole_gives(name):
    case = CASES[name]
    layer, x = case.layer(), case.signal()
    whole = layer(x)
    for lengths in chunkings(case.frames, case.column):
        found = in_pieces(layer, x, lengths, case.shapes(layer), case.axis, case.time)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5, msg=str(lengths))


@every_layer
def test_the_state_of_silence_is_the_beginning(name):
    case = CASES[name]
    layer, x = case.layer(), case.signal()
    state = State(zero_state(case.shapes(layer), len(x)))
    torch.testing.assert_close(layer(x, state), layer(x), rtol=1e-4, atol=1e-5)


@every_layer
def test_other_rows_and_what_lies_behind_the_end_change_nothing(name):
    case = CASES[name]
    layer, x = case.layer(), case.signal(rows=3)
    end = 23  # frames of the second row
    garbage = 1e3 * case.signal(rows=3, seed=2)
    behind = torch.arange(x.shape[case.axis]) >= end * case.column
    behind = behind.view([-1 if n is None else 1 for n in case.shape])
    padded = torch.stack([garbage[0], torch.where(behind, garbage[1], x[1]), garbage[2]])
    alone = layer(x[1:2].narrow(case.axis, 0, end * case.column))
    found = layer(padded)[1:2].narrow(case.time, 0, alone.shape[case.time])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def seen(
    function: Callable[[torch.Tensor], torch.Tensor],
    signals: list[torch.Tensor],
    frame: int,
    frames: int,
    axis: int,
    time: int,
) -> tuple[int, int]:
    """First and last input step in which the outputs of a frame have a gradient."""
    total = 0.0
    for x in signals:
        x = x.clone().requires_grad_()
        y = function(x)
        each = y.shape[time] // frames
        part = y.narrow(time, frame * each, each)
        torch.manual_seed(0)
        (part * torch.randn_like(part)).sum().backward()
        total = total + x.grad.abs().transpose(axis, -1).flatten(0, -2).sum(0)
    steps = torch.nonzero(total)
    return int(steps.min()), int(steps.max())


def declared(run: Callable[[], object], module: nn.Module, steps: int, at: int, length: int) -> int:
    """The first input step that an output step may depend on, by the states of all that runs.

    The layers stand one after the other; what goes around them looks back less.

    Args:
        run: passes a signal through the module.
        steps: length of that signal.
        at, length: the output step, and how many there are.
    """
    calls: list[tuple[int, int, int]] = []

    def note(layer: Causal, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        axis = 1 if isinstance(layer, LocalAttention) else -1
        history = layer.state_shape[0 if isinstance(layer, TIME_FIRST) else 1]
        calls.append((inputs[0].shape[axis], output.shape[axis], history))

    layers = [x for x in module.modules() if isinstance(x, Causal)]
    hooks = [x.register_forward_hook(note) for x in layers if not isinstance(x, FrameCounter)]
    run()
    for hook in hooks:
        hook.remove()
    for before, after, history in reversed(calls):
        at = at * after // length  # the output of this layer,
        at = at * before // after - history  # and what it looks back at
        length = before
    return at * steps // length


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.smooth])
def test_gradients_reach_as_far_as_the_state_and_no_further(name):
    case = CASES[name]
    layer, frame = case.layer(), 40
    signals = [*(case.signal(seed=seed) for seed in range(8)), case.fading()]
    first, last = seen(layer, signals, frame, case.frames, case.axis, case.time)
    assert last == (frame + 1) * case.column - 1
    x = case.signal()
    length = layer(x).shape[case.time]
    at = frame * length // case.frames
    assert first == declared(lambda: layer(x), layer, x.shape[case.axis], at, length)
    assert first <= frame * case.column


def test_every_layer_that_takes_a_state_is_tried():
    there = {
        kind
        for module in (layers, local_attention, tconv)
        for kind in vars(module).values()
        if inspect.isclass(kind)
        and issubclass(kind, nn.Module)
        and "state" in inspect.signature(kind.forward).parameters
    }
    tried = {type(module) for case in CASES.values() for module in case.make().modules()}
    assert len(there) >= 12 and there - tried == set()


# --------------------------------------------------------------------------------- whole graphs


@pytest.fixture(
    scope="module",
    params=["debug.yaml", "debug.yaml without noise", "minimal", "speech_3k.yaml"],
)
def model(request: pytest.FixtureRequest) -> AudioAutoencoder:
    return build(config_of(request.param))


@pytest.fixture
def frames(model: AudioAutoencoder) -> int:
    """More than two windows of attention."""
    return 2 * model.config.attention_window + 44


@pytest.fixture
def samples(model: AudioAutoencoder, frames: int) -> torch.Tensor:
    torch.manual_seed(1)
    return 0.3 * torch.randn(2, frames * model.config.hop_length)


@pytest.fixture
def tokens(model: AudioAutoencoder, frames: int) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randint(model.config.codebook_size, (2, frames))


def test_a_graph_in_pieces_gives_what_it_gives_for_the_whole(model, frames, samples, tokens):
    encoded, decoded = model.encode(samples), model.decode(tokens)
    ways = zip(chunkings(frames, model.config.hop_length), chunkings(frames, 1))
    for in_samples, in_frames in list(ways)[1:]:  # a step each takes long
        found = in_pieces(model.encode, samples, in_samples, model.encoder_state, 1, 1)
        assert torch.equal(found, encoded)
        found = in_pieces(model.decode, tokens, in_frames, model.decoder_state, 1, 1)
        torch.testing.assert_close(found, decoded, rtol=0, atol=1e-5)


def test_a_graph_does_not_see_other_rows_or_what_lies_behind(model, samples, tokens):
    end, hop = 23, model.config.hop_length
    encoded, decoded = model.encode(samples)[:1, :end], model.decode(tokens)[:1, : end * hop]
    loud, other = samples.clone(), tokens.clone()
    loud[:, end * hop :], loud[1:] = 0.9, -0.9
    other[:, end:] = other[1:] = 0
    assert torch.equal(model.encode(loud)[:1, :end], encoded)
    torch.testing.assert_close(model.decode(other)[:1, : end * hop], decoded, rtol=0, atol=1e-5)
    assert torch.equal(model.encode(samples[:1, : end * hop]), encoded)
    torch.testing.assert_close(model.decode(tokens[:1, :end]), decoded, rtol=0, atol=1e-5)


def test_the_latency_is_what_gradients_say(model, frames, samples):
    """Of the last sample that a token depends on, and the last token that a sample depends on."""
    config, frame = model.config, frames - 9
    hop = config.hop_length
    _, last = seen(model.encoder, [samples], frame, frames, 1, 1)
    assert last == (frame + 1) * hop - 1
    latents = torch.randn(2, frames, config.quantizer.dim)
    _, newest = seen(model.decoder, [latents], frame, frames, 1, 1)
    assert newest == frame
    late = (frame - config.decoder_delay) * hop  # where the first sample of the frame belongs
    assert (last + 1 - late) / config.sample_rate == pytest.approx(config.latency)


def test_a_graph_sees_no_more_than_its_states_hold(model, frames, samples):
    config, frame = model.config, frames - 9
    earliest, _ = seen(model.encoder, [samples], frame, frames, 1, 1)
    assert earliest >= declared(
        lambda: model.encoder(samples), model.encoder, samples.shape[1], frame, frames
    )
    latents = torch.randn(2, frames, config.quantizer.dim)
    oldest, _ = seen(model.decoder, [latents], frame, frames, 1, 1)
    hop = config.hop_length
    assert oldest >= declared(
        lambda: model.decoder(latents), model.decoder, frames, frame * hop, frames * hop
    )
