"""The torch backend: the same model from model.safetensors, on any device that torch knows."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from ..config import FRAME_COUNTER, NOISE_FRAMES
from ..model_folder import WEIGHTS, ModelError, ModelFolder
from ..models import Autoencoder, build_model
from ..models.layers import State, zero_state
from ..threads import compiled_code
from .architecture import architecture_of
from .checks import check_states


class ModuleBackend:
    """Runs a torch model that is in memory, in float32 whatever the autocast.

    Args:
        model: in eval mode, with its weights on `device`.
        device: where it runs.
    """

    name = "torch"

    def __init__(self, model: Autoencoder, device: torch.device) -> None:
        self.model, self.device = model, device

    @property
    def for_streams(self) -> ModuleBackend:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a model that is in memory only cannot be copied or pickled; export it")

    def encode(self, samples: np.ndarray, state: dict | None) -> tuple[np.ndarray, dict]:
        if state is None:
            state = self._beginning(self.model.encoder_state, len(samples))
        return self._run(self.model.encode, samples, state)

    def decode(
        self, tokens: np.ndarray, state: dict | None, first_frame: int = 0
    ) -> tuple[np.ndarray, dict]:
        if state is None:
            state = self._beginning(self.model.decoder_state, len(tokens))
            if FRAME_COUNTER in state:
                state[FRAME_COUNTER].fill_(first_frame % NOISE_FRAMES)
        return self._run(self.model.decode, tokens, state)

    def _beginning(self, shapes: dict, batch: int) -> dict:
        return {name: tensor.to(self.device) for name, tensor in zero_state(shapes, batch).items()}

    @torch.inference_mode()
    def _run(self, function, x: np.ndarray, past: dict) -> tuple[np.ndarray, dict]:
        state = State(past)
        # Else cuDNN's convolutions may round to ten bits of mantissa, and tokens would differ.
        with (
            compiled_code(),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
            torch.autocast(self.device.type, enabled=False),
        ):
            y = function(torch.from_numpy(np.ascontiguousarray(x)).to(self.device), state)
        return y.cpu().numpy(), state.next


class TorchBackend(ModuleBackend):
    """Runs the torch model of a folder; a pickle holds the folder and the options.

    Args:
        model: the folder.
        threads: torch threads (a setting of the whole process); None leaves it.
        device: "cpu", "cuda", ... or "auto" (cuda where it is available).
    """

    def __init__(self, model: ModelFolder, *, threads: int | None, device: str) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._again = partial(TorchBackend, model, threads=threads, device=device)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            there = torch.device(device)
            super().__init__(load_model(model).to(there), there)
        except (RuntimeError, AssertionError) as error:  # torch without this device
            raise ModelError(f"device {device}: {str(error).splitlines()[0]}") from None

    def __reduce__(self) -> tuple[object, ...]:
        return self._again, ()


def load_model(folder: ModelFolder) -> Autoencoder:
    """The torch model of a folder, in eval mode, float32.

    Raises:
        ModelError: weights missing, damaged or of another architecture.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder.check()
    path = folder.path / WEIGHTS
    architecture = architecture_of(folder.config)
    try:
        if architecture is not None:
            return architecture.load(folder.config, load_file(path))
        model = build_model(folder.config).eval()
        model.load_state_dict(load_file(path))
        for shapes in (getattr(model, "encoder_state", {}), getattr(model, "decoder_state", {})):
            check_states(shapes)
    except SafetensorError as error:
        raise ModelError(f"{path}: {error}") from None
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ModelError(f"{path}: weights do not fit the configuration ({reason})") from None
    return model
