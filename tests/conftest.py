"""Fixtures that several test files share."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import settings
from paths import RECIPES, SHARED, SPEECH

import vpcodec  # noqa: F401  (before any test loads ONNX Runtime: it turns telemetry off)

DATA = SHARED / "data"


settings.register_profile("project", print_blob=True)  # how to repeat a failure
settings.load_profile("project")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="seed of each test's random numbers")


def pytest_report_header(config: pytest.Config) -> str:
    return f"random numbers: --seed {config.getoption('--seed')}"


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Global random numbers start each test with the same seed, whatever ran before it."""
    seed = request.config.getoption("--seed")
    random.seed(seed)
    np.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests for which a model has to be exported first are slow."""
    for item in items:
        if {"debug_model", "debug_image_model"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed:
        report.sections.append(("random numbers", f"--seed {item.config.getoption('--seed')}"))
    return report


@pytest.fixture
def speech_wav() -> Path:
    """About 5 s of generated speech, 22,050 Hz mono."""
    return SPEECH


@pytest.fixture
def speech() -> np.ndarray:
    """The same at 16 kHz, float32 (1, T)."""
    from vpcodec.media.audio import load, resample

    samples, rate = load(SPEECH)
    return resample(samples, rate, 16_000)


@pytest.fixture
def shared_data() -> Path:
    """Folder of real recordings beside the repository."""
    if not DATA.is_dir():
        pytest.skip("needs the real recordings in ../shared/data, which are not here")
    return DATA


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Several threads of torch only wait for each other where the cores are shared."""
    torch = pytest.importorskip("torch", reason="needs the train extra")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def through_onnx(tmp_path: Path) -> Callable[[Any, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Takes a quantizer and tokens; gives, from ONNX Runtime, their codes and the tokens of these.

    The graph is traced with five tokens and takes any number.
    """
    torch = pytest.importorskip("torch", reason="needs the train extra")
    pytest.importorskip("onnxscript", reason="needs the train extra")
    import onnxruntime

    class RoundTrip(torch.nn.Module):
        def __init__(self, quantizer: Any) -> None:
            super().__init__()
            self.quantizer = quantizer

        def forward(self, tokens: Any) -> tuple[Any, Any]:
            codes = self.quantizer.tokens_to_latents(tokens)
            return codes, self.quantizer.latents_to_tokens(codes)

    def run(quantizer: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        path = tmp_path / "round_trip.onnx"
        torch.onnx.export(
            RoundTrip(quantizer).eval(),
            (torch.zeros(5, dtype=torch.int64),),
            path,
            dynamo=True,
            opset_version=18,
            dynamic_shapes=({0: torch.export.Dim("length")},),
            input_names=["tokens"],
            verbose=False,
        )
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        codes, back = session.run(None, {"tokens": tokens})
        return codes, back

    return run


def exported(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folder of a recipe, untrained; exported once, however many processes run the tests."""
    torch = pytest.importorskip("torch", reason="needs the train extra")
    from vpcodec.export import export_model
    from vpcodec.models import build_model
    from vpcodec.recipe import load_recipe

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers
    folder = base / f"exported-{recipe}" / recipe
    with FileLock(base / f"{recipe}.lock"):
        if not folder.exists():
            torch.manual_seed(0)
            export_model(build_model(load_recipe(RECIPES / f"{recipe}.yaml").model), folder)
    return folder


@pytest.fixture(scope="session")
def debug_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folder of recipes/debug.yaml, untrained, exported. Tests leave it as it is."""
    return exported("debug", tmp_path_factory)


@pytest.fixture(scope="session")
def debug_image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folder of recipes/image_debug.yaml, untrained, exported. Tests leave it as it is."""
    return exported("image_debug", tmp_path_factory)


@pytest.fixture
def picture() -> Callable[..., np.ndarray]:
    """Makes pictures (height, width, components) uint8: waves with some noise, the same again."""

    def make(height: int, width: int, components: int = 3) -> np.ndarray:
        y, x, c = np.mgrid[:height, :width, :components]
        waves = 128 + 90 * np.sin((x + 2 * c) / 17) * np.cos(y / (11 + 3 * c))
        noise = np.random.default_rng(0).normal(0, 5, waves.shape)
        return (waves + noise).round().astype(np.uint8)

    return make
