"""Checkpoints: one safetensors file with everything that resuming needs, written atomically.

A run folder keeps the newest few in `checkpoints/step-00000500.safetensors`, and in
`best.safetensors` the averaged weights that did best on held-out data.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from ..media.files import atomic_output

FOLDER = "checkpoints"
BEST = "best.safetensors"
AROUND_QUANTIZER = ("quantizer.", "encoder.project.", "decoder.project.")  # depend on it
NOISE = "decoder.noise."  # that a model may be given later


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another model."""


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / FOLDER / f"step-{step:08d}.safetensors"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run / FOLDER).glob("step-*.safetensors"))


def find_checkpoint(path: Path) -> Path:
    """The newest checkpoint of a run folder; a file is taken as it is.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise CheckpointError(f"{path}: no checkpoint in this folder")
    return found[-1]


def prune(run: Path, keep: int) -> None:
    """Remove all checkpoints of a run but the newest `keep`, and unfinished ones of killed runs."""
    for path in (*checkpoints(run)[:-keep], *(run / FOLDER).glob(".*.tmp")):
        path.unlink(missing_ok=True)


def save_checkpoint(path: Path, tensors: dict[str, dict[str, Any]], state: dict[str, Any]) -> None:
    """Write a checkpoint.

    Args:
        path: its file; the folder is made.
        tensors: groups of tensors by name, e.g. {"model": state_dict}; values that are not tensors
            (step counts of optimisers) become scalars.
        state: JSON-serialisable rest.
    """
    flat = {
        f"{group}/{name}": torch.as_tensor(value).detach().cpu().contiguous().clone()
        for group, values in tensors.items()
        for name, value in values.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_output(path) as file:
        file.write(save(flat, metadata={"state": json.dumps(state)}))
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Read what `save_checkpoint` wrote.

    Raises:
        CheckpointError: no such file, or not a checkpoint; what to do then if there are others.
    """
    groups: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(path, "pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            for key in file.keys():
                group, _, name = key.partition("/")
                groups.setdefault(group, {})[name] = file.get_tensor(key)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except (SafetensorError, KeyError, OSError, ValueError) as error:
        others = [other for other in path.parent.glob("step-*.safetensors") if other != path]
        advice = f"; without it, {max(others).name} is next" if others else ""
        raise CheckpointError(f"{path}: not a checkpoint ({error}){advice}") from None
    return groups, state


def averaged_weights(groups: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """State dict of the averaged model in a checkpoint: parameters averaged, buffers as they were.

    Raises:
        KeyError: the checkpoint has no model.
    """
    return groups.get("model", {}) | groups["average"]


def brief(error: Exception) -> str:
    """An error in one line; of torch's about state dicts, the first thing that is wrong."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[1].strip() if lines[0].endswith(":") and len(lines) > 1 else lines[0]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The per-parameter state of an optimiser as flat names `index.key`."""
    return {
        f"{index}.{key}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    full = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": full["param_groups"]})


def load_weights(model: torch.nn.Module, path: Path) -> list[str]:
    """Load a model.safetensors, of the same architecture but for quantizer and noise.

    The noise of the decoder begins as it was drawn where the file has none.

    Returns:
        Names of the weights that were left as they were, because the quantizers differ: some of its
        own, and of the projections into it and out of it.

    Raises:
        CheckpointError: unreadable, or of another architecture.
    """
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: not a safetensors file that can be read ({error})"
        ) from None
    own, quantizer = model.state_dict(), model.quantizer

    def fits(name: str) -> bool:
        inside = name.removeprefix("quantizer.")
        if name not in found:
            return inside in quantizer.training_state
        shape = found[name].shape
        if inside in quantizer.lazy_buffers:  # may have no rows here or there
            rows = ((0,), (quantizer.lazy_buffers[inside],))
            return shape[:1] in rows and shape[1:] == own[name].shape[1:]
        return shape == own[name].shape

    left = [name for name in own if name.startswith(AROUND_QUANTIZER) and not fits(name)]
    found = {n: v for n, v in found.items() if n in own or not n.startswith(AROUND_QUANTIZER)}
    found |= {name: own[name] for name in left}
    found = {n: v for n, v in own.items() if n.startswith(NOISE)} | found
    try:
        model.load_state_dict(found)
    except RuntimeError as error:
        reason = brief(error)
        raise CheckpointError(f"{path}: weights of another architecture ({reason})") from None
    return left
