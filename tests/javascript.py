"""The JavaScript library in Node beside the Python package: what tests and a benchmark share."""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import subprocess
from pathlib import Path

import numpy as np
from paths import RESOURCES, ROOT

from vpcodec.hub import bundled_coder
from vpcodec.packets import PacketError, PacketFormat
from vpcodec.tokenfile import TokenFileError, TokenReader

TESTS = ROOT / "tests" / "web"
PATIENCE = 600  # seconds after which Node hangs


def node(*arguments: object, cwd: Path = ROOT) -> str:
    """What a script in Node prints; it must succeed."""
    done = subprocess.run(
        ["node", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def tool(*arguments: object) -> str:
    """What tests/web/tool.js prints."""
    return node(TESTS / "tool.js", *arguments)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """A file with bits flipped, bytes changed, or parts left out, doubled or put in."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, size = rng.randrange(len(changed)), rng.choice((1, 2, 8, 40))
        match rng.randrange(6):
            case 0 | 1:
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                changed[at] = rng.choice((0, 1, 127, 128, 255))
            case 3:
                del changed[at : at + size]
            case 4:
                changed[at:at] = changed[at : at + size]
            case 5:
                changed[at:at] = rng.randbytes(size)
        if not changed:
            break
    return bytes(changed)


def compare_mutated_files(count: int, folder: Path, seed: int = 0) -> tuple[int, list[str]]:
    """Mutated token files in JavaScript and in Python.

    Args:
        count: how many.
        folder: for a temporary file.
        seed: of the changes.

    Returns:
        How many were refused, and where the results differ or damage was not noticed.
    """
    rng = random.Random(seed)
    paths = [*(RESOURCES / "tok").glob("*.tok"), *(RESOURCES / "golden").glob("*.tok")]
    originals = [path.read_bytes() for path in sorted(paths)]
    files = originals + [mutated(rng, rng.choice(originals)) for _ in range(count)]
    found = json.loads(tool("outcomes", _bundle(folder / "files", files)))
    faults = []
    for data, outcome in zip(files, found, strict=True):
        if outcome != (expected := _read(data)):
            faults.append(f"{data.hex()}: {outcome}, in Python {expected}")
        elif ("tokens" in outcome) != (data in originals):
            faults.append(f"{data.hex()}: {outcome}")
    return sum("error" in outcome for outcome in found), faults


def compare_mutated_packets(count: int, folder: Path, seed: int = 0) -> tuple[int, list[str]]:
    """The same for packets. Their checksum has 16 bits, so some changes are not noticed; what
    matters is that both languages agree."""
    rng = random.Random(seed)
    fields = {"channels": 2, "frames": 3, "redundancy": 1}
    space, size = bytes(range(16)), 250_047
    format = PacketFormat(space, size, **fields)
    groups = np.random.default_rng(seed).integers(0, size, (2, 2, 3))
    originals = [format.pack(number, *groups) for number in range(8)]
    packets = originals + [mutated(rng, rng.choice(originals)) for _ in range(count)]
    first = json.dumps(fields | {"space": [*space], "codebookSize": size}).encode()
    found = json.loads(tool("packets", _bundle(folder / "packets", [first, *packets])))
    faults = []
    for data, outcome in zip(packets, found, strict=True):
        try:
            packet = format.unpack(data)
            tokens = [group.tolist() for group in packet.groups]
            expected = {"sequence": packet.sequence, "groups": tokens}
        except PacketError as error:
            expected = {"error": str(error)}
        if outcome != expected:
            faults.append(f"{data.hex()}: {outcome}, in Python {expected}")
    return sum("error" in outcome for outcome in found), faults


def _bundle(target: Path, parts: list[bytes]) -> Path:
    """One file with many, each behind its size."""
    target.write_bytes(b"".join(struct.pack("<I", len(part)) + part for part in parts))
    return target


def _read(data: bytes) -> dict[str, str]:
    """What reading a token file gives, in the words of tool.js."""
    try:
        reader = TokenReader(io.BytesIO(data))
        reader.coder = bundled_coder(reader.header)
        tokens, _ = reader.read_all()
    except TokenFileError as error:
        return {"error": str(error)}
    return {"tokens": hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()}
