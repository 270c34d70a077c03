"""Published models with random weights, for tests, benchmarks and golden data: ours and theirs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from vpcodec.published import MODULES, Published
from vpcodec.published.config import SQCodecConfig


def random_weights(config: SQCodecConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """All weights of a model, float32, the same on every machine but for rounding.

    None is what it would be at the start of a training, so that a mistake with any of them shows:
    gains and biases of norms, GRN, slopes of Snake, some of them negative. Sizes are such that
    activations stay of order 1, speech uses all levels of the quantizer, and the decoder gives
    audio that is not clipped.
    """
    from vpcodec.published.tensors import expected_shapes

    return {
        name: _draw(name, shape, _uniform(f"{seed}:{name}", shape))
        for name, shape in expected_shapes(config).items()
    }


def save_modules(weights: Mapping[str, np.ndarray], folder: Path) -> dict[str, Path]:
    """Write the files of a published model into a folder; module -> file."""
    import torch

    files = {}
    for module in MODULES:
        prefix = f"{module}."
        state = {
            name.removeprefix(prefix): torch.tensor(value)
            for name, value in weights.items()
            if name.startswith(prefix)
        }
        files[module] = folder / f"{module}.pt"
        torch.save(state, files[module])
    return files


def official_missing() -> str:
    """Why the authors' packages cannot be asked; empty if they can."""
    for package in ("torch", "l3ac", "sq_codec"):
        if find_spec(package) is None:
            return f"needs the package {package}"
    version = metadata.version("vector-quantize-pytorch")
    if tuple(map(int, version.split(".")[:2])) >= (1, 21):
        return "needs vector-quantize-pytorch before 1.21, which sq_codec builds on"
    return ""


class Official:
    """The authors' package with a model and its files (module -> .pt); clips are (T,) float32."""

    def __init__(self, published: Published, files: Mapping[str, Path]) -> None:
        import torch

        if published.config.architecture == "l3ac":
            from l3ac import CONFIG_DIR, L3AC, L3ACConfig

            self.codec = L3AC(L3ACConfig(config_file=CONFIG_DIR / f"{published.name}.toml"))
        else:
            from sq_codec import CONFIG_DIR, SQCodec, SQCodecConfig

            self.codec = SQCodec(SQCodecConfig(config_file=CONFIG_DIR / f"{published.name}.toml"))
        self.config = published.config
        self.network = self.codec.network
        for module, network in self.network.trainable_modules.items():
            network.load_state_dict(torch.load(files[module], weights_only=True))
        self.network.eval()
        # The first version only cuts empty cache tokens off by it, which needs whole windows.
        self.network.en_decoder.trans_window_size = 1
        self._exactly = False
        for layer in self.network.modules():
            if isinstance(layer, torch.nn.Upsample):
                layer.register_forward_hook(self._interpolate)

    def encode(self, samples: np.ndarray) -> np.ndarray:
        """int64 tokens (N,) of the clip and of the silence that the package puts behind it."""
        import torch

        with torch.inference_mode():
            _, tokens = self.codec.encode_audio(torch.from_numpy(samples[None]))
        tokens = tokens["indices"] if self.config.architecture == "l3ac" else tokens
        return tokens[0].numpy().astype(np.int64)

    def positions(self, samples: np.ndarray) -> np.ndarray:
        """float (N, D): what the quantizer rounds; cells are 1 wide, their middles whole."""
        import torch

        network = self.network
        with torch.inference_mode():
            padded, _ = network.preprocess(torch.from_numpy(samples[None]))
            features = network.en_encoder(network.encoder(padded.unsqueeze(1)))
            latents = network.quantizer.project_in(features)[0]
            quantizer = network.quantizer.vq
            if self.config.architecture == "l3ac":
                return (quantizer.act(latents) * (quantizer.levels - 1)).numpy()
            return quantizer.bound(latents).numpy()

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """float32 (N * hop,) of tokens (N,)."""
        import torch

        with torch.inference_mode():
            return self.codec.decode_audio(indices=torch.from_numpy(tokens[None]))[0].numpy()

    def decode_exactly(self, tokens: np.ndarray) -> np.ndarray:
        """The same, with interpolation by 3 and 5 at the places that are meant.

        PyTorch computes the places between samples in float32: they err by more the longer a clip
        is, and audio with them, by more than 1e-4 from about 5 s.
        """
        self._exactly = True
        try:
            return self.decode(tokens)
        finally:
            self._exactly = False

    def _interpolate(self, layer: Any, inputs: tuple[Any], _: Any) -> Any:
        from torch.nn.functional import interpolate

        if not self._exactly:
            return None  # which keeps the output
        x = inputs[0].double()
        return interpolate(x, scale_factor=layer.scale_factor, mode="linear").float()


def whole_windows(samples: np.ndarray, config: SQCodecConfig) -> np.ndarray:
    """A clip (T,) with the silence behind it that the authors' package would put there."""
    unit = config.hop_length
    if config.architecture == "sqcodec":
        unit *= config.attention_window
    return np.pad(samples, (0, -len(samples) % unit))


def _uniform(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform in [-1, 1), float64.

    From raw bits: numpy may change how it makes other distributions of them.
    """
    bits = np.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:16]))
    count = int(np.prod(shape))
    return ((bits.random_raw(count) >> np.uint64(11)) * 2.0**-52 - 1).reshape(shape)


def _draw(name: str, shape: tuple[int, ...], u: np.ndarray) -> np.ndarray:
    """Weights of a name from uniform numbers in [-1, 1)."""
    layer = name.removesuffix(".weight").partition(".parametrizations")[0]
    sign = np.where(np.abs(u) < 0.1, -1, 1)
    if name.endswith("original1"):  # directions, of any length
        value = 1.2 * _even(u)
    elif name.endswith("original0"):  # lengths, some negative
        value = _gain(layer) * (1 + 0.4 * u) * sign
    elif name.endswith("alpha"):  # 0.3 to 3, some negative
        value = (1.65 + 1.35 * u) * sign
    elif name.endswith(("gamma", "beta")):
        value = 0.5 * u
    elif name.endswith("bias"):
        value = 0.05 * u
    elif len(shape) == 1:  # norms
        value = 1 + 0.4 * u
    else:  # matrices without weight norm
        value = _gain(layer) * _even(u) * (3 / max(1, np.prod(shape[1:]))) ** 0.5
    return value.astype(np.float32)


def _even(rows: np.ndarray) -> np.ndarray:
    """Rows less most of their mean: those of the inputs, all positive behind Snake, would add up
    until nothing depends on the audio."""
    axes = tuple(range(1, rows.ndim))
    return rows - 0.95 * rows.mean(axes, keepdims=True) if rows[:1].size > 8 else rows


def _gain(layer: str) -> float:
    """Standard deviation of what a layer gives for inputs of variance 1."""
    if layer.startswith("encoder.blocks.0.blocks"):
        return 8.0  # speech is quiet
    if layer.endswith(("pw_conv2", "to_out", "1.4", "merge_layer.1", "module.block.3")):
        return 0.25  # ends of branches: less than is beside them
    if layer.endswith("mlp.0"):
        return 0.01  # distances are of hundreds
    if layer == "quantizer.project_in":
        return 0.5
    if layer.startswith("decoder") and layer.endswith(".block.2"):
        return 0.08  # before the last tanh
    return 1.0
