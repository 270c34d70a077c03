"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture
def speech_wav() -> Path:
    """About 5 s of generated speech, 22,050 Hz mono."""
    return ROOT / "tests" / "resources" / "speech.wav"


@pytest.fixture
def speech() -> np.ndarray:
    """The same at 16 kHz, float32 (1, T)."""
    from vpcodec.audio import load, resample

    samples, rate = load(ROOT / "tests" / "resources" / "speech.wav")
    return resample(samples, rate, 16_000)


@pytest.fixture
def shared_data() -> Path:
    """Folder of real recordings beside the repository."""
    if not DATA.is_dir():
        pytest.skip("needs the real recordings in ../shared/data, which are not here")
    return DATA


@pytest.fixture(scope="session")
def debug_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folder of recipes/debug.yaml, untrained, exported."""
    torch = pytest.importorskip("torch", reason="needs the train extra")
    from vpcodec.config import load_recipe
    from vpcodec.export import export_model
    from vpcodec.models import AudioAutoencoder

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "debug"
    export_model(AudioAutoencoder(load_recipe(ROOT / "recipes" / "debug.yaml").model), folder)
    return folder
