"""Checkpoints: one safetensors file with everything needed to resume a run, written atomically.

A run folder keeps the newest few as `checkpoints/step-00000500.safetensors`, and the averaged
weights that scored best on held-out data in `best.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from ..media.files import atomic_output

FOLDER = "checkpoints"
BEST = "best.safetensors"
NO_CHECKSUM = "0" * 64  # stands in for the checksum while the file is hashed
CHECKSUM = re.compile(rb'"checksum":"([0-9a-f]{64})"')  # in the header
CHECKED = "has_checksum"  # key of the state, so that a missing checksum is noticed
BLOCK = 2**20  # bytes hashed at a time
# Prefixes of the weights whose shapes depend on the quantizer.
AROUND_QUANTIZER = ("quantizer.", "encoder.project.", "decoder.project.")
NOISE = "decoder.noise."  # prefix of weights that may be added to a model later


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another model."""


class DamagedError(CheckpointError):
    """A checkpoint does not hold the bytes that were written."""


def checkpoint_path(run: Path, step: int) -> Path:
    """Path of the checkpoint of a step."""
    return run / FOLDER / f"step-{step:08d}.safetensors"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run / FOLDER).glob("step-*.safetensors"))


def find_checkpoint(path: Path) -> Path:
    """The newest checkpoint of a run folder; a path to a file is returned as it is.

    Raises:
        CheckpointError: the folder has no checkpoint.
    """
    if path.is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise CheckpointError(f"{path}: no checkpoint in this folder")
    return found[-1]


def remove_old_checkpoints(run: Path, keep: int, step: int) -> None:
    """Remove all checkpoints of a run except the newest `keep`.

    Checkpoints of later steps, which were damaged and therefore skipped when the run resumed, and
    unfinished files of killed runs are removed as well.

    Args:
        run: the run folder.
        keep: number of checkpoints to keep.
        step: step of the checkpoint that was saved last.
    """
    last = checkpoint_path(run, step)
    good = [path for path in checkpoints(run) if path <= last]
    later = [path for path in checkpoints(run) if path > last]
    for path in (*good[:-keep], *later, *(run / FOLDER).glob(".*.tmp")):
        path.unlink(missing_ok=True)


def save_checkpoint(path: Path, tensors: dict[str, dict[str, Any]], state: dict[str, Any]) -> None:
    """Write a checkpoint.

    Args:
        path: its file; missing folders are created.
        tensors: groups of tensors by name, such as {"model": state_dict}; values that are not
            tensors (step counts of optimisers) are stored as scalars.
        state: everything else, JSON-serialisable.
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
        DamagedError: the file does not hold what was written. Checkpoints of earlier versions have
            no checksum and are not verified.
        CheckpointError: the file does not exist or cannot be read.
    """
    groups: dict[str, dict[str, torch.Tensor]] = {}
    try:
        checked = _verify(path)
        with safe_open(path, "pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            if state.pop(CHECKED, False) and not checked:
                raise ValueError("its checksum is missing")
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
    run: Path, note: Callable[[str], None] | None = None
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Read the newest undamaged checkpoint of a run.

    Args:
        run: a run folder, or one checkpoint file.
        note: called with a message for each damaged newer checkpoint.

    Returns:
        The result of `load_checkpoint`.

    Raises:
        CheckpointError: there is no checkpoint, one cannot be read, or all are damaged; in the last
            case, the error is that of the newest.
    """
    if run.is_file():
        return load_checkpoint(run)
    damaged: list[DamagedError] = []
    find_checkpoint(run)
    for path in reversed(checkpoints(run)):
        try:
            found = load_checkpoint(path)
        except DamagedError as error:
            damaged.append(error)
            continue
        if note is not None:
            for problem in damaged:
                note(f"{problem}; using the one before it")
        return found
    raise damaged[0]


def _verify(path: Path) -> bool:
    """Verify the checksum of a file, if it has one.

    Returns:
        Whether it has one.

    Raises:
        ValueError: the checksum is wrong, or the header is truncated.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > os.fstat(file.fileno()).st_size:
            raise ValueError("its header is truncated")
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
    """State dict of the averaged model in a checkpoint: averaged parameters, buffers of the model.

    Raises:
        KeyError: the checkpoint has no model.
    """
    return groups.get("model", {}) | groups["average"]


def inference_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """State dict of a model without the training state of its quantizer."""
    training = {f"quantizer.{name}" for name in model.quantizer.training_state}
    return {name: value for name, value in model.state_dict().items() if name not in training}


def one_line(error: Exception) -> str:
    """The message of an error in one line; for torch's state dict errors, the first mismatch."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[1].strip() if lines[0].endswith(":") and len(lines) > 1 else lines[0]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The per-parameter state of an optimiser under flat names, `index.key`."""
    return {
        f"{index}.{key}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Restore an optimiser from the result of `optimizer_tensors`."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    full = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": full["param_groups"]})


def load_weights(model: torch.nn.Module, path: Path) -> list[str]:
    """Load a model.safetensors of the same architecture; quantizer and noise may differ.

    If the file has no weights for the decoder's noise, those of the model are kept.

    Returns:
        Names of the weights that were not loaded because the quantizers differ: weights of the
        quantizer and of the projections before and after it.

    Raises:
        CheckpointError: the file cannot be read, or is of another architecture.
    """
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None
    own, quantizer = model.state_dict(), model.quantizer

    def fits(name: str) -> bool:
        inside = name.removeprefix("quantizer.")
        if name not in found:
            return inside in quantizer.training_state
        shape = found[name].shape
        if inside in quantizer.lazy_buffers:  # either may still be empty
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
        reason = one_line(error)
        raise CheckpointError(f"{path}: weights of another architecture ({reason})") from None
    return left
