"""Makes tables and payloads, of recordings and of images, where they are missing.

python tests/resources/entropy/make_golden.py

They are kept as they were made first: a coder that changes them cannot read old files any more.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from test_entropy import make_image_tables, make_tables

from vpcodec.entropy import parse_tables

NAMES = ("past", "current", "output", "bias", "exponentials", "order")


def make(
    prefix: str, tables: dict, facts: dict[str, str], shapes: list[tuple[tuple, int | None]]
) -> None:
    """Tables, and the payloads of random tokens of each shape and number of columns."""
    file = HERE / f"{prefix}tables.safetensors"
    if file.exists():
        return
    arrays = {name: tables[name] for name in NAMES if tables[name] is not None}
    data = save(arrays, metadata=facts)
    file.write_bytes(data)
    coder = parse_tables(data)
    rng = np.random.default_rng(0)
    cases = []
    for shape, columns in shapes:
        tokens = rng.integers(0, 24, shape)
        case: dict[str, Any] = {} if columns is None else {"columns": columns}
        payload = coder.pack(tokens, columns).hex()
        cases.append(case | {"tokens": tokens.tolist(), "payload": payload})
    (HERE / f"{prefix}payloads.json").write_text(json.dumps(cases) + "\n")


make(
    "",
    make_tables((3, 4, 2), seed=7, order=True, lane=6),
    {"format": "1", "levels": "[3, 4, 2]", "averages": "[2, 4]", "lags": "2", "lane": "6"},
    [(shape, None) for shape in ((1, 1), (6, 1), (7, 2), (40, 1), (13, 3))],
)
tables = make_image_tables((3, 4, 2), seed=8)
make(
    "image-",
    tables,
    {
        "format": "2",
        "levels": "[3, 4, 2]",
        "tile": json.dumps(tables["tile"]),
        "neighbours": json.dumps(tables["neighbours"]),
    },
    [((1, 1), 1), ((6, 1), 4), ((35, 2), 6), ((40, 1), 40), ((13, 1), 1)],
)
