from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

pytest.importorskip("torch", reason="needs the train extra")

import torch

from vpcodec.codec import Codec
from vpcodec.config import AudioConfig
from vpcodec.hub import open_model
from vpcodec.media.audio import resample
from vpcodec.recipe.audio import EvalConfig
from vpcodec.scoring.workers import METRICS, Workers, measure
from vpcodec.tokenfile import AudioHeader, write_tokens
from vpcodec.training.audio.evaluation import HeldOutAudio, codec_of
from vpcodec.training.evaluation import Evaluation, EvaluationError

RATE, HOP = 16_000, 96

pytestmark = pytest.mark.slow

MODEL = AudioConfig(name="toy")


def noise(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(int(seconds * rate))


def toy_codec(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens 0, 1, 2, 3, 0, ...; the samples, somewhat coarser."""
    return np.arange(len(samples) // HOP) % 4, np.round(samples * 30) / np.float32(30)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One second of noise in each of three files."""
    folder = tmp_path / "held out"
    folder.mkdir()
    for i in range(3):
        soundfile.write(folder / f"{i}.wav", noise(1.0, seed=i), RATE)
    return folder


@pytest.fixture
def make() -> Iterator[Callable[..., Evaluation]]:
    made = []

    def make(data: Path | str, **options) -> Evaluation:
        made.append(Evaluation(HeldOutAudio(EvalConfig(data=str(data), **options), MODEL)))
        return made[-1]

    yield make
    for evaluation in made:
        evaluation.close()


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within 30 s")


def test_clips_are_mono_at_the_models_rate_in_whole_hops_and_not_too_long(tmp_path, make):
    left, right = noise(1.2, 22_050, 1), noise(1.2, 22_050, 2)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 22_050, subtype="FLOAT")
    soundfile.write(tmp_path / "b.flac", noise(3.0), RATE)
    soundfile.write(tmp_path / "c.wav", noise(2.0), RATE, subtype="FLOAT")
    clips = make(tmp_path, max_seconds=2.0).items
    assert [len(clip) for clip in clips] == [19_200, 31_968, 31_968]
    assert all(clip.dtype == np.float32 and clip.ndim == 1 for clip in clips)
    np.testing.assert_allclose(clips[2], noise(2.0)[:31_968], atol=1e-7)
    mono = resample((left + right) / 2, 22_050, RATE)
    np.testing.assert_allclose(clips[0], mono[:19_200], atol=1e-6)


def test_files_are_spread_evenly_over_folder_glob_and_manifest(tmp_path, make):
    for i in range(9):
        folder = tmp_path / f"part {i % 2}"
        folder.mkdir(exist_ok=True)
        soundfile.write(folder / f"{i}.wav", np.full(RATE, 0.1 * i), RATE, subtype="FLOAT")
    manifest = tmp_path / "list.txt"
    manifest.write_text("part 0/2.wav\n\npart 1/3.wav\n")

    def values(data: Path | str, **options) -> list[float]:
        return [round(float(10 * clip[5000]), 3) for clip in make(data, **options).items]

    assert values(tmp_path) == [0, 2, 4, 6, 8, 1, 3, 5, 7]
    assert values(tmp_path, max_files=3) == [0, 8, 7]
    assert values(tmp_path / "*" / "[1-4].wav") == [2, 4, 1, 3]
    assert values(tmp_path / "**" / "5.wav") == [5]
    assert values(manifest) == [2, 3]


def test_files_that_cannot_be_used_are_left_out_and_listed(folder, make):
    (folder / "broken.wav").write_bytes(b"no audio at all")
    soundfile.write(folder / "short.wav", noise(0.4), RATE)
    evaluation = make(folder)
    assert len(evaluation.items) == 3
    assert [line.rpartition("/")[2][:5] for line in evaluation.skipped] == ["broke", "short"]


@pytest.mark.parametrize("data", ["missing", "*.flac", "missing.txt", "short"])
def test_data_without_a_clip_are_refused_by_name(tmp_path, data, make):
    (tmp_path / "short").mkdir()
    soundfile.write(tmp_path / "short" / "a.wav", noise(0.1), RATE)
    with pytest.raises(EvaluationError, match=data.replace("*", r"\*")):
        make(tmp_path / data)


def test_the_results_are_means_over_the_clips_that_have_a_value(folder, speech_wav, make):
    pytest.importorskip("pesq", reason="needs the score extra")
    pytest.importorskip("pystoi", reason="needs the score extra")
    (folder / "2.wav").write_bytes(speech_wav.read_bytes())
    soundfile.write(folder / "silence.wav", np.zeros(RATE), RATE)
    evaluation = make(folder)
    assert len(evaluation.items) == 4 and evaluation.missing == []
    evaluation.start(7, toy_codec)
    [(step, values)] = evaluation.results(wait=60.0)
    assert step == 7 and values["unscored"] == 1
    single = [measure(clip, toy_codec(clip)[1], RATE) for clip in evaluation.items]
    for name in METRICS:
        assert values[name] == pytest.approx(np.nanmean([row[name] for row in single]))
    assert values["entropy"] == pytest.approx(2, abs=1e-3)
    assert values["perplexity"] == pytest.approx(4, abs=1e-2)
    assert values["cvu"] == pytest.approx(4 / MODEL.codebook_size, rel=1e-2)
    assert evaluation.results() == [] and evaluation.failures == []


def test_the_bit_rate_is_that_of_token_files(folder, tmp_path, make):
    evaluation = make(folder)
    evaluation.start(0, toy_codec)
    n_bytes = 0
    for clip in evaluation.items:
        header = AudioHeader(
            model=MODEL.name,
            fingerprint=bytes(16),
            sample_rate=RATE,
            original_rate=RATE,
            channels=1,
            n_samples=len(clip),
            hop_length=HOP,
            codebook_size=MODEL.codebook_size,
        )
        write_tokens(tmp_path / "a.tok", toy_codec(clip)[0][None], header)
        n_bytes += (tmp_path / "a.tok").stat().st_size
    [(_, values)] = evaluation.results(wait=60.0)
    assert values["bitrate"] == pytest.approx(8 * n_bytes * RATE / sum(map(len, evaluation.items)))


def test_evaluations_come_in_the_order_in_which_they_were_started(folder, make):
    evaluation = make(folder, max_files=1)
    gains = {1: 1.0, 2: 0.5, 3: 0.25, 4: 0.125}
    for step, gain in gains.items():
        evaluation.start(step, lambda x, gain=gain: (toy_codec(x)[0], x * np.float32(gain)))
    found = evaluation.results(wait=60.0)
    assert [step for step, _ in found] == [1, 2, 3, 4]
    distances = [values["mel_distance"] for _, values in found]
    assert distances[0] == 0 and distances == sorted(distances)


def test_a_third_evaluation_waits_for_the_first(folder, make):
    evaluation = make(folder, max_files=1)
    evaluation.start(1, toy_codec)
    evaluation.start(2, toy_codec)
    before = []

    def codec(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        before.extend(step for step, _ in evaluation.results())
        return toy_codec(samples)

    evaluation.start(3, codec)
    assert before[:1] == [1]
    assert before + [step for step, _ in evaluation.results(wait=60.0)] == [1, 2, 3]


def test_results_are_not_waited_for_unless_asked(folder, make):
    evaluation = make(folder)
    assert evaluation.results() == [] == evaluation.results(wait=60.0)
    evaluation.start(1, toy_codec)
    stopped = []

    def stop() -> bool:
        stopped[:] = evaluation._workers.pids
        return bool(stopped)

    wait_for(stop)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    assert evaluation.results() == []
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    assert [step for step, _ in evaluation.results(wait=60.0)] == [1]


@pytest.mark.parametrize("idle", [False, True])
def test_a_killed_worker_costs_its_evaluation_at_most(folder, make, idle):
    evaluation = make(folder)
    evaluation.start(1, toy_codec)
    if idle:
        evaluation.results(wait=60.0)
    wait_for(lambda: bool(evaluation._workers.pids))
    for pid in evaluation._workers.pids:
        os.kill(pid, signal.SIGKILL)
        if idle:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    if not idle:
        assert evaluation.results(wait=60.0) == []
        [line] = evaluation.failures
        assert "step 1" in line and "signal 9" in line
    evaluation.start(2, toy_codec)
    assert [step for step, _ in evaluation.results(wait=60.0)] == [2]
    assert len(evaluation.failures) == (0 if idle else 1)


def test_a_model_that_gives_nan_costs_the_evaluation_only(folder, make):
    evaluation = make(folder)
    evaluation.start(1, lambda x: (toy_codec(x)[0], x * np.float32("nan")))
    evaluation.start(2, toy_codec)
    assert [step for step, _ in evaluation.results(wait=60.0)] == [2]
    assert len(evaluation.failures) == 1 and "NaN" in evaluation.failures[0]


def test_audio_of_another_length_and_errors_of_the_codec_reach_the_caller(folder, make):
    evaluation = make(folder)
    with pytest.raises(ValueError, match="shapes"):
        evaluation.start(1, lambda x: (toy_codec(x)[0], x[:-1]))

    def fail(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        evaluation.start(2, fail)
    assert evaluation.results(wait=60.0) == [] == evaluation.failures


def test_workers_do_not_stop_at_an_interrupt(folder, make):
    evaluation = make(folder)
    evaluation.start(1, toy_codec)
    evaluation.results(wait=60.0)
    workers = evaluation._workers.pids
    for pid in workers:
        os.kill(pid, signal.SIGINT)
    evaluation.start(2, toy_codec)
    assert [step for step, _ in evaluation.results(wait=60.0)] == [2]
    assert evaluation._workers.pids == workers


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_have_the_lowest_priority_one_thread_and_no_torch(folder, make):
    evaluation = make(folder)
    evaluation.start(1, toy_codec)
    evaluation.results(wait=60.0)
    for pid in evaluation._workers.pids:
        assert os.getpriority(os.PRIO_PROCESS, pid) == 19
        assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


def test_closing_ends_the_workers_of_a_running_evaluation(folder):
    with Evaluation(HeldOutAudio(EvalConfig(data=str(folder)), MODEL)) as evaluation:
        evaluation.start(1, toy_codec)
        wait_for(lambda: bool(evaluation._workers.pids))
        workers = evaluation._workers.pids
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert evaluation._workers.pids == [] == evaluation.results(wait=60.0)
    evaluation.close()


def test_workers_end_when_their_owner_is_killed():
    code = (
        "import os, signal, numpy; from vpcodec.scoring.workers import Workers; "
        "w = Workers(1); x = numpy.zeros(8000, 'f4'); w.submit(x, x, 16000).result(); "
        "print(*w.pids, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    # The worker shares stderr with its owner, so this returns when both have ended.
    owner = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert owner.returncode == -signal.SIGKILL and int(owner.stdout) > 0 and owner.stderr == b""


def test_metrics_without_their_package_are_left_out_and_named(folder, tmp_path, make, monkeypatch):
    (tmp_path / "pesq.py").write_text("raise ImportError('not here')")
    monkeypatch.delitem(sys.modules, "pesq", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    evaluation = make(folder)
    evaluation.start(1, toy_codec)
    [(_, values)] = evaluation.results(wait=60.0)
    assert "pesq_wb" in evaluation.missing and "pesq_wb" not in values
    assert math.isfinite(values["mel_distance"])
    with pytest.raises(EvaluationError, match=r"pesq_wb.*vpcodec\[score\]"):
        make(folder, best="pesq_wb")


def test_a_library_that_prints_does_not_disturb_the_answers(tmp_path, monkeypatch):
    (tmp_path / "pesq.py").write_text("import os; print('hello'); os.write(1, b'there\\n'); 1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with Workers(1) as workers:
        samples = np.zeros(8000, np.float32)
        error = workers.submit(samples, samples, RATE).exception()
    assert "ZeroDivisionError" in str(error)


def test_the_models_function_codes_as_the_codec_does(debug_model, speech, one_thread):
    codec = Codec.from_pretrained(debug_model, backend="torch", device="cpu")
    model = codec.backend.model
    hop = model.config.hop_length
    samples = speech[0, : speech.shape[1] // hop * hop]
    with torch.autocast("cpu", torch.bfloat16):
        tokens, decoded = codec_of(model, "cpu")(samples)
    assert open_model(debug_model).config == model.config
    assert tokens.dtype == np.int64 and decoded.dtype == np.float32
    expected = codec.encode(samples)
    np.testing.assert_array_equal(tokens, expected[0])
    np.testing.assert_allclose(decoded, codec.decode(expected)[0], atol=1e-4)
    assert decoded.shape == samples.shape and np.abs(decoded).max() > 1e-3
