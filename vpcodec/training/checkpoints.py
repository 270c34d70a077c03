"""Checkpoints: one safetensors file with everything that resuming needs, written atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..files import atomic_output

CHECKPOINT = "checkpoint.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another model."""


def save_checkpoint(
    folder: Path, tensors: dict[str, dict[str, Any]], state: dict[str, Any]
) -> None:
    """Write `folder/checkpoint.safetensors`.

    Args:
        folder: the run.
        tensors: groups of tensors by name, e.g. {"model": state_dict, "rng": {...}}; values that
            are not tensors (step counts of optimisers) become scalars.
        state: JSON-serialisable rest.
    """
    flat = {
        f"{group}/{name}": torch.as_tensor(value).detach().contiguous().clone()
        for group, values in tensors.items()
        for name, value in values.items()
    }
    with atomic_output(folder / CHECKPOINT) as file:
        file.write(save(flat, metadata={"state": json.dumps(state)}))


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Read what `save_checkpoint` wrote.

    Raises:
        CheckpointError: no such file, or not a checkpoint.
    """
    path = folder / CHECKPOINT
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
        raise CheckpointError(f"{path}: not a checkpoint ({error})") from None
    return groups, state


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
