"""What a graph must be before ONNX Runtime sees it, and before it runs.

A model folder may come from anyone. Its files have the hashes of its config.json, which says
nothing about what they do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import AudioModelConfig, ModelConfig
from ..model_folder import ModelError, ModelFolder

MAX_STATE = 2**24  # numbers that a stream keeps per channel
MAX_DEPTH = 16  # of graphs within graphs
PAST, NEXT = "past.", "next."  # in front of the names of states, in and out
SIGNALS = {"audio": "samples", "image": "images"}

# The messages of the ONNX format that lead to tensors: field number -> kind of message there.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}


def check_external_data(model: ModelFolder, path: Path) -> None:
    """Check that what a graph reads from other files is inside the model's own.

    Raises:
        ModelError: it is not, or the file is no ONNX graph.
    """
    data = path.read_bytes()
    try:
        tensors = list(_tensors(data, 0, len(data), "model", 0))
    except (ValueError, IndexError):
        raise ModelError(f"{path}: not an ONNX graph") from None
    sizes: dict[str, int] = {}
    for facts in tensors:
        location = facts.get(b"location", b"").decode("utf-8", "replace")
        if location not in model.files:
            raise ModelError(f"{path}: its weights are in {location!r}, no file of the model")
        if location not in sizes:
            sizes[location] = (model.path / location).stat().st_size
        try:
            start, length = (int(facts.get(key, b"0")) for key in (b"offset", b"length"))
        except ValueError:
            start = -1
        if start < 0 or length < 0 or start + length > sizes[location]:
            raise ModelError(f"{path}: a tensor of it is not inside {location}")


def _tensors(data: bytes, at: int, end: int, kind: str, depth: int) -> Iterator[dict[bytes, bytes]]:
    """What each tensor that is outside the graph says of its place.

    Raises:
        ValueError, IndexError: not the ONNX format.
    """
    if depth > 6 * MAX_DEPTH:  # a graph in a graph is six messages deep at most
        raise ValueError
    fields = _FIELDS[kind]
    facts: dict[bytes, bytes] = {}
    while at < end:
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 2:
            size, at = _varint(data, at)
            inner = fields.get(key >> 3)
            if at + size > end:
                raise ValueError
            if inner == "entry":
                name, value = _entry(data, at, at + size)
                if name in facts:
                    raise ValueError
                facts[name] = value
            elif inner is not None:
                yield from _tensors(data, at, at + size, inner, depth + 1)
            at += size
        elif wire == 0:
            _, at = _varint(data, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError
    if at != end:
        raise ValueError
    if facts:
        yield facts


def _entry(data: bytes, at: int, end: int) -> tuple[bytes, bytes]:
    """Key and value of a pair of strings."""
    found = {1: b"", 2: b""}
    while at < end:
        key, at = _varint(data, at)
        size, at = _varint(data, at)
        if key & 7 != 2 or at + size > end:
            raise ValueError
        found[key >> 3] = data[at : at + size]
        at += size
    return found[1], found[2]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer of the protocol buffers, and where it ends."""
    byte = data[at]
    if byte < 128:
        return byte, at + 1
    value, shift = byte & 127, 7
    while byte >= 128:
        at += 1
        byte = data[at]
        value |= (byte & 127) << shift
        shift += 7
        if shift > 70:
            raise ValueError
    return value, at + 1


def check_interface(
    config: ModelConfig, part: str, inputs: Sequence[Any], outputs: Sequence[Any]
) -> None:
    """Check names, types and shapes of what a graph takes and gives.

    Args:
        config: of the model.
        part: "encoder" or "decoder".
        inputs: of ONNX Runtime, with `name`, `type` and `shape`; likewise `outputs`.

    Raises:
        ModelError: they are not those of such a model.
    """
    audio = isinstance(config, AudioModelConfig)
    signal: tuple[str, str, list[int | None]] = (
        SIGNALS[config.kind],
        "tensor(float)",
        [None, None] if audio else [None, 3, None, None],
    )
    tokens: tuple[str, str, list[int | None]] = (
        "tokens",
        "tensor(int64)",
        [None, None] if audio else [None, None, None],
    )
    if not inputs or not outputs:
        raise ModelError("the graph has no inputs or no outputs")
    first, last = (signal, tokens) if part == "encoder" else (tokens, signal)
    for found, (name, kind, shape) in ((inputs[0], first), (outputs[0], last)):
        same = len(found.shape) == len(shape) and all(
            size == want if isinstance(size, int) and want else not isinstance(size, int)
            for size, want in zip(found.shape, shape)
        )
        if (found.name, found.type) != (name, kind) or not same:
            raise ModelError(
                f"the graph has {found.name!r}, {found.type} {found.shape}, where {name!r}, {kind} "
                f"of {len(shape)} dimensions, belongs"
            )
    past = {state.name.removeprefix(PAST): state for state in inputs[1:]}
    after = {state.name.removeprefix(NEXT): state for state in outputs[1:]}
    names = {state.name for state in inputs[1:]} | {state.name for state in outputs[1:]}
    if names != {PAST + name for name in past} | {NEXT + name for name in past} or (
        past.keys() != after.keys() or (past and not audio)
    ):
        raise ModelError("the graph's states do not belong to each other, or to such a model")
    for state in (*inputs[1:], *outputs[1:]):
        if state.type != "tensor(float)" or len(state.shape) < 2 or isinstance(state.shape[0], int):
            raise ModelError(f"the graph's state {state.name!r} is {state.type} {state.shape}")
    check_states({name: lengths(state.shape[1:]) for name, state in past.items()})


def lengths(shape: Sequence[Any]) -> list[int]:
    """A shape of ONNX Runtime at the beginning of a stream, where what is variable is 0."""
    return [size if isinstance(size, int) else 0 for size in shape]


def check_states(shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ModelError where states of these shapes, per channel, would take too much memory."""
    total = sum(math.prod(shape) for shape in shapes.values())
    if total > MAX_STATE:
        raise ModelError(f"its states have {total:,} numbers, more than {MAX_STATE:,}")
