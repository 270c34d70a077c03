"""Checkpoints: one safetensors file with everything that resuming needs, written atomically.

A run folder keeps the newest few in `checkpoints/step-00000500.safetensors`, and in
`best.safetensors` the averaged weights that did best on held-out data.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from ..media.files import atomic_output

FOLDER = "checkpoints"
BEST = "best.safetensors"
NO_CHECKSUM = "0" * 64  # what is hashed in the place of the checksum
CHECKSUM = re.compile(rb'"checksum":"([0-9a-f]{64})"')  # in the header
CHECKED = "has_checksum"  # in the state, so that a checksum that is damaged itself is missed
BLOCK = 2**20  # bytes that are hashed at once
AROUND_QUANTIZER = ("quantizer.", "encoder.project.", "decoder.project.")  # depend on it
NOISE = "decoder.noise."  # that a model may be given later


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another model."""


class DamagedError(CheckpointError):
    """A checkpoint whose bytes are not those that were written."""


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


def prune(run: Path, keep: int, step: int) -> None:
    """Remove all checkpoints of a run but the newest `keep` up to `step`, the last that was saved.

    Later ones are damaged ones that were passed over. Unfinished ones of killed runs go as well.
    """
    last = checkpoint_path(run, step)
    good = [path for path in checkpoints(run) if path <= last]
    later = [path for path in checkpoints(run) if path > last]
    for path in (*good[:-keep], *later, *(run / FOLDER).glob(".*.tmp")):
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
    text = json.dumps(state | {CHECKED: True})
    data = save(flat, metadata={"state": text, "checksum": NO_CHECKSUM})
    start = CHECKSUM.search(data).start(1)
    with atomic_output(path) as file:
        file.write(data[:start])
        file.write(hashlib.sha256(data).hexdigest().encode())
        file.write(memoryview(data)[start + len(NO_CHECKSUM) :])
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Read what `save_checkpoint` wrote.

    Raises:
        DamagedError: it is not what was written; checkpoints of earlier versions have no checksum.
        CheckpointError: no such file, or it cannot be read.
    """
    groups: dict[str, dict[str, torch.Tensor]] = {}
    try:
        checked = _verify(path)
        with safe_open(path, "pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            if state.pop(CHECKED, False) and not checked:
                raise ValueError("its checksum is gone")
            for key in file.keys():
                group, _, name = key.partition("/")
                groups.setdefault(group, {})[name] = file.get_tensor(key)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise DamagedError(f"{path}: not a checkpoint, or damaged ({error})") from None
    return groups, state


def load_newest(
    run: Path,
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any], list[DamagedError]]:
    """Read the newest checkpoint of a run that is whole; a file is taken as it is.

    Returns:
        What `load_checkpoint` gives, and what is wrong with newer ones.

    Raises:
        CheckpointError: there is none, all are damaged (it is about the newest), or one cannot be
            read.
    """
    if run.is_file():
        return *load_checkpoint(run), []
    damaged: list[DamagedError] = []
    find_checkpoint(run)
    for path in reversed(checkpoints(run)):
        try:
            return *load_checkpoint(path), damaged
        except DamagedError as error:
            damaged.append(error)
    raise damaged[0]


def _verify(path: Path) -> bool:
    """Whether a file has a checksum; ValueError where it is another file's."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > os.fstat(file.fileno()).st_size:
            raise ValueError("its header is cut short")
        header = file.read(size)
        found = CHECKSUM.search(header)
        if found is None:
            return False
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        digest.update(header[: found.start(1)] + NO_CHECKSUM.encode() + header[found.end(1) :])
        while block := file.read(BLOCK):
            digest.update(block)
    if digest.hexdigest().encode() != found[1]:
        raise ValueError("its checksum differs")
    return True


def averaged_weights(groups: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """State dict of the averaged model in a checkpoint: parameters averaged, buffers as they were.

    Raises:
        KeyError: the checkpoint has no model.
    """
    return groups.get("model", {}) | groups["average"]


def kept_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """State dict of a model without what only the training of its quantizer needs."""
    training = {f"quantizer.{name}" for name in model.quantizer.training_state}
    return {name: value for name, value in model.state_dict().items() if name not in training}


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
