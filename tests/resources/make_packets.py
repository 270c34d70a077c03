"""Makes packets.json, which docs/packets.md shows: python tests/resources/make_packets.py"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from vpcodec.packets import PacketFormat

SPACE = "000102030405060708090a0b0c0d0e0f"
CASES = {
    "three tokens of speech-3k": ({"codebook_size": 250_047}, 1, [[[0, 1, 250_046]]]),
    "with the packet before": (
        {"codebook_size": 250_047, "redundancy": 1},
        2,
        [[[100_000, 200_000, 3]], [[0, 1, 250_046]]],
    ),
    "two channels": (
        {"codebook_size": 117_649, "channels": 2, "frames": 2},
        65_535,
        [[[1, 2], [117_648, 0]]],
    ),
}

if __name__ == "__main__":
    vectors = []
    for name, (fields, sequence, groups) in CASES.items():
        format = PacketFormat(bytes.fromhex(SPACE), **fields)
        packet = format.pack(sequence, *map(np.array, groups))
        vectors.append(
            {
                "name": name,
                "format": {"space": SPACE, **fields},
                "sequence": sequence,
                "groups": groups,
                "packet": packet.hex(),
            }
        )
    (Path(__file__).parent / "packets.json").write_text(json.dumps(vectors, indent=1) + "\n")
