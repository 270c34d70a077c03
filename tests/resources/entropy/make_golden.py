"""Makes tables.safetensors and payloads.json: python tests/resources/entropy/make_golden.py

They are kept as they were made first: a coder that changes them cannot read old files any more.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from test_entropy import make_tables

from vpcodec.entropy import parse_tables

tables = make_tables((3, 4, 2), seed=7, order=True, lane=6)
names = ("past", "current", "output", "bias", "exponentials", "order")
arrays = {name: tables[name] for name in names}
facts = {"format": "1", "levels": "[3, 4, 2]", "averages": "[2, 4]", "lags": "2", "lane": "6"}
data = save(arrays, metadata=facts)
(HERE / "tables.safetensors").write_bytes(data)
coder = parse_tables(data)
rng = np.random.default_rng(0)
cases = []
for shape in ((1, 1), (6, 1), (7, 2), (40, 1), (13, 3)):
    tokens = rng.integers(0, 24, shape)
    cases.append({"tokens": tokens.tolist(), "payload": coder.pack(tokens).hex()})
(HERE / "payloads.json").write_text(json.dumps(cases) + "\n")
