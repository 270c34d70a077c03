"""The graph of a published decoder computes in tiles what torch computes for the whole clip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from official import random_weights

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from vpcodec.config import FSQConfig
from vpcodec.graphs import strip, trace
from vpcodec.models.layers import State
from vpcodec.published import tiling
from vpcodec.published.architecture import load
from vpcodec.published.config import SQCodecConfig
from vpcodec.published.network import SQCodecAutoencoder

pytestmark = pytest.mark.slow

CONFIG = SQCodecConfig(
    name="small",
    architecture="l3ac",
    quantizer=FSQConfig(levels=(5, 5, 5)),
    strides=(3, 2),
    encoder_dims=(4, 4, 4),
    encoder_depths=(0, 0, 0),
    decoder_strides=(2, 3),
    decoder_dims=(16, 8, 4),
    decoder_depths=(0, 1),
    feature_dim=16,
    attention_heads=2,
    attention_window=8,
    encoder_layers=1,
    decoder_layers=1,
)
TILE_NUMBERS = 640  # of the widest tensor: 10 tokens of 2 * 32, and 53 half tokens of 3 * 4
TOLERANCE = 1e-5

Decode = Callable[[np.ndarray, dict[str, np.ndarray]], list[np.ndarray]]


@pytest.fixture(scope="module")
def model() -> SQCodecAutoencoder:
    weights = random_weights(CONFIG)
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
    return load(CONFIG, tensors).requires_grad_(False)


@pytest.fixture(scope="module")
def graph(model: SQCodecAutoencoder) -> onnx.ModelProto:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "TILE_NUMBERS", TILE_NUMBERS)
        patch.setattr(tiling, "SHORTEST_TILE", 1)
        tiled = tiling.tiled(model)
    assert [tiles.longest for tiles in tiled.decoder.levels] == [10, 53]
    frames = torch.export.Dim("frames", min=1, max=1 << 20)
    example = torch.zeros(2, 13, dtype=torch.int64)
    graph = trace(tiled, "decode", model.decoder_state, example, {1: frames})
    strip(graph)
    tiling.settle(graph)
    return graph


@pytest.fixture(scope="module")
def decoders(model: SQCodecAutoencoder, graph: onnx.ModelProto) -> tuple[Decode, Decode]:
    """Torch and the graph: tokens and states to samples and states."""
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])

    @torch.inference_mode()
    def whole(tokens: np.ndarray, past: dict[str, np.ndarray]) -> list[np.ndarray]:
        state = State({name: torch.from_numpy(value) for name, value in past.items()})
        samples = model.decode(torch.from_numpy(tokens), state)
        return [y.numpy() for y in (samples, *(state.next[name] for name in past))]

    def in_tiles(tokens: np.ndarray, past: dict[str, np.ndarray]) -> list[np.ndarray]:
        return session.run(
            ["samples", *(f"next.{name}" for name in past)],
            {"tokens": tokens} | {f"past.{name}": value for name, value in past.items()},
        )

    return whole, in_tiles


@pytest.mark.parametrize("n_tokens", [1, 4, 9, 10, 11, 20, 21, 26, 27, 101])
@pytest.mark.parametrize("batch", [1, 2])
def test_tiles_give_what_the_whole_clip_gives(model, decoders, n_tokens: int, batch: int) -> None:
    tokens, past = _example(model, batch, n_tokens)
    expected, found = (decode(tokens, past) for decode in decoders)
    assert expected[0].shape == (batch, n_tokens * CONFIG.hop_length)
    assert expected[0].std() > 0.01
    for y, y_tiled in zip(expected, found, strict=True):
        np.testing.assert_allclose(y_tiled, y, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kept", [1, 8, 15])
def test_tiles_go_over_past_features(model, decoders, kept: int) -> None:
    tokens, none = _example(model, 2, 16)
    results = []
    for decode in decoders:
        past = dict(zip(none, decode(tokens[:, ::-1].copy(), none)[1:]))
        past["decoder.features"] = past["decoder.features"][:, -kept:]
        results.append(decode(tokens, past)[0])
    assert results[0].shape == (2, (kept + 16) * CONFIG.hop_length)
    np.testing.assert_allclose(results[1], results[0], rtol=0, atol=TOLERANCE)
    assert np.abs(results[0][:, -96:] - decoders[0](tokens, none)[0]).max() > 0.01


def test_loops_hold_their_weights(graph: onnx.ModelProto) -> None:
    """Without them beside it, the runtime does not change the layout of a convolution."""
    loops = [node for node in graph.graph.node if node.op_type == "Scan"]
    assert len(loops) == len(CONFIG.decoder_strides) + CONFIG.decoder_layers
    bodies = [a.g for loop in loops for a in loop.attribute if a.name == "body"]
    levels = [body for body in bodies if any(node.op_type == "Conv" for node in body.node)]
    assert len(levels) == len(CONFIG.decoder_strides)  # the others are attention, without weights
    for body in levels:
        held = {tensor.name for tensor in body.initializer}
        convolutions = [node for node in body.node if node.op_type == "Conv"]
        constant = held | {y for n in body.node if set(n.input) <= held for y in n.output}
        assert all(set(node.input[1:]) <= constant for node in convolutions)
    assert str(Path(tiling.__file__).parent).encode() not in graph.SerializeToString()


def _example(
    model: SQCodecAutoencoder, batch: int, n_tokens: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Random tokens, and the states at the beginning of a clip."""
    rng = np.random.default_rng(n_tokens)
    tokens = rng.integers(0, CONFIG.codebook_size, (batch, n_tokens))
    shapes = model.decoder_state.items()
    return tokens, {name: np.zeros((batch, *shape), np.float32) for name, shape in shapes}
