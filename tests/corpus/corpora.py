"""Recordings and corpora that tests make; shards run here, one after the other, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf

from vpcodec import AudioCodec
from vpcodec.corpus import Totals, tokenize
from vpcodec.corpus.plan import Plan
from vpcodec.corpus.shards import ShardTokenizer

RATE = 16_000


def make_recordings(folder: Path, n: int, *, seconds: float = 0.1, bad: int = 0) -> set[str]:
    """Files of noise of different lengths, some of them truncated; the names of these."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    broken = set(rng.choice(n, bad, replace=False).tolist())
    for i in range(n):
        path = folder / f"{i:05d}.wav"
        length = int(RATE * seconds * rng.uniform(0.5, 1.5))
        sf.write(path, rng.uniform(-0.3, 0.3, length).astype(np.float32), RATE, subtype="PCM_16")
        if i in broken:
            path.write_bytes(path.read_bytes()[:-200])
    return {f"{i:05d}" for i in broken}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a corpus."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def run_here(
    plan: Plan, shards: list[int], *, on_report: Callable[[dict[str, Any]], None], **options: Any
) -> None:
    """In place of the engine."""
    codec = AudioCodec.from_pretrained(plan.settings.model, threads=1)
    tokenizer = ShardTokenizer(plan, codec)
    for shard in shards:
        on_report(tokenizer.run(shard))


def tokenize_here(inputs: list[Any], folder: Path, **options: Any) -> Totals:
    """`vpcodec.corpus.tokenize`, without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vpcodec.corpus.engine.run_shards", run_here)
        return tokenize([str(name) for name in inputs], folder, **options)
