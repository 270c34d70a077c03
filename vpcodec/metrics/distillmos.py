"""DistillMOS: predicted quality of speech, from a distilled speech encoder.

The package contains its weights (4.2 M parameters) and needs torch, which is imported when the
metric is first computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import lru_cache
from io import StringIO
from typing import Any

import numpy as np

from .base import Clip, Metric, registered

INSTALL = "pip install 'vpcodec[train]' distillmos"
RATE = 16_000  # Hz
MIN_SECONDS = 0.5  # below, there is too little to judge
MAX_SECONDS = 60  # at a time; bounds memory


@registered(
    Metric(
        name="distillmos",
        label="DistillMOS",
        unit="MOS",
        better="higher",
        modality="audio",
        source="Stahl and Gamper 2025 (distillmos)",
        rate=RATE,
        needs_reference=False,
        packages=("torch", "torchaudio", "distillmos"),
        install=INSTALL,
        default=False,
    ),
)
def distillmos(_: Clip, degraded: Clip) -> tuple[float]:
    """DistillMOS (Stahl and Gamper 2025), 1 to 5.

    It predicts how listeners rate the quality of the degraded clip; neither the reference nor the
    level matters. NaN below 0.5 s. Clips of more than 60 s are cut into equal parts of at most 60
    s, and the values are averaged. It runs on one thread, so that values do not depend on the
    caller.
    """
    samples = degraded.at(RATE).astype(np.float32, copy=False)
    if len(samples) < MIN_SECONDS * RATE:
        return (math.nan,)
    model = _model()
    import torch

    with on_one_thread():
        parts = np.array_split(samples, -(-len(samples) // (MAX_SECONDS * RATE)))
        values = [model(torch.from_numpy(part.copy())[None]).item() for part in parts]
    return (float(np.mean(values)),)


@contextmanager
def on_one_thread() -> Iterator[None]:
    """A context in which torch infers in float32 on one thread, whatever the caller's settings."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _model() -> Any:
    try:
        from distillmos import ConvTransformerSQAModel
    except ImportError as error:
        raise ImportError(f"DistillMOS needs a package: {INSTALL}") from error
    with redirect_stdout(StringIO()):  # it prints where its weights are
        return ConvTransformerSQAModel().eval()
