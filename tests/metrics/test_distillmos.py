from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
package = pytest.importorskip("distillmos", reason="needs the package distillmos")

import soundfile
from paths import SPEECH

from vpcodec.media.audio import resample
from vpcodec.metrics.base import Clip
from vpcodec.metrics.distillmos import distillmos
from vpcodec.metrics.registry import METRICS, choose
from vpcodec.scoring.workers import METRICS as DURING_TRAINING
from vpcodec.scoring.workers import Workers, measure

RATE = 16_000


def judged(samples: np.ndarray, rate: int = RATE) -> float:
    clip = Clip(samples.astype(np.float32), rate)
    (value,) = distillmos(clip, clip)
    return value


@pytest.fixture(scope="module")
def clean() -> np.ndarray:
    samples, rate = soundfile.read(SPEECH, dtype="float32")
    return resample(samples, rate, RATE)


def test_it_is_what_the_package_says(clean):
    with torch.inference_mode():
        expected = package.ConvTransformerSQAModel().eval()(torch.from_numpy(clean)[None]).item()
    assert judged(clean) == pytest.approx(expected, abs=1e-4)


def test_worse_speech_has_less(clean):
    noise = np.random.default_rng(0).standard_normal(len(clean)) * np.std(clean)
    worse = {"noise": clean + 3 * noise, "clipping": clean.clip(-0.02, 0.02)}
    for name, samples in worse.items():
        assert 1 < judged(samples) < judged(clean) - 0.3, name


def test_neither_level_nor_reference_have_a_part_in_it(clean):
    assert judged(0.1 * clean) == pytest.approx(judged(clean), abs=1e-3)
    other = Clip(np.zeros_like(clean), RATE)
    assert distillmos(other, Clip(clean, RATE))[0] == judged(clean)


def test_too_little_speech_has_no_value(clean):
    assert math.isnan(judged(clean[: RATE // 2 - 1]))
    assert not math.isnan(judged(clean[: RATE // 2]))


def test_other_rates_are_resampled(clean):
    wide = np.interp(np.arange(2 * len(clean)) / 2, np.arange(len(clean)), clean)
    assert judged(wide, 2 * RATE) == pytest.approx(judged(clean), abs=0.3)


def test_nothing_is_printed_and_the_threads_of_the_caller_stay(clean, capfd):
    threads = torch.get_num_threads()
    judged(clean)
    assert torch.get_num_threads() == threads
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_it_is_asked_for_by_name_alone():
    assert not METRICS["distillmos"].default
    names = [metric.name for metric in choose("audio", ["distillmos"])[1]]
    assert names == ["distillmos"]
    assert "distillmos" not in [metric.name for metric in choose("audio")[1]]


def test_evaluations_during_training_measure_it_where_it_is_asked_for(clean):
    names = (*DURING_TRAINING, "distillmos", "dnsmos_p808")
    with Workers(1) as workers:
        values = workers.submit(clean, clean, RATE, names).result(timeout=120)
    assert set(values) == set(names)
    assert values["distillmos"] == pytest.approx(judged(clean), abs=1e-3)
    assert "distillmos" not in measure(clean, clean, RATE)
