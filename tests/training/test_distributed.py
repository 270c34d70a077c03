"""Trainings in processes of their own: killed, stopped, and several at once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
for package in ("yaml", "torchaudio", "safetensors", "accelerate", "tensorboard"):
    pytest.importorskip(package, reason="needs the train extra")

from paths import RESOURCES, ROOT

from vpcodec.recipe import load_recipe
from vpcodec.training.checkpoints import find_checkpoint, load_checkpoint
from vpcodec.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

DEBUG = {"audio": ROOT / "recipes" / "debug.yaml", "image": ROOT / "recipes" / "image_debug.yaml"}
FSP = ("model.quantizer={type: fsp, levels: [5, 5, 5]}",)
VP = ("model.quantizer={type: vp, dim: 3, codebook_size: 64}", "quantizer.calibrate_every=9")
COMMON = [
    "train.precision=fp32",
    "train.device=cpu",
    "train.log_every=1",
    "optim.warmup_steps=3",
    "discriminator.start_step=4",
]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TIMES = ("seconds", "audio_seconds_per_second", "megapixels_per_second", "wait_share")


def start(
    run: Path, *arguments: str, kind: str = "audio", launcher: tuple[str, ...] = ()
) -> subprocess.Popen:
    """`vpcodec train` of a debug recipe with overrides and options."""
    command = [sys.executable, *launcher, "-m", "vpcodec", "train", str(DEBUG[kind])]
    command += [*COMMON, *arguments]
    return subprocess.Popen(
        [*command, "--folder" if launcher else "--run", str(run)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def train_here(run: Path, *overrides: str, kind: str = "audio") -> None:
    Trainer(load_recipe(DEBUG[kind], [*COMMON, *overrides]), run).train()


def rows(run: Path) -> list[dict]:
    """The log without its times, as far as it is written."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in whole]


def wait_for_rows(process: subprocess.Popen, run: Path, number: int) -> None:
    deadline = time.monotonic() + 120
    while len(rows(run)) < number:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def assert_same_curve(run: Path, reference: Path, tolerance: float) -> None:
    found, expected = rows(run), rows(reference)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, expected_row in zip(found, expected):
        assert row == pytest.approx(expected_row, rel=tolerance, abs=1e-6)


@pytest.mark.parametrize(
    "kind, quantizer",
    [("audio", VP), ("image", FSP)],
    ids=["audio-VP", "image-FSP"],
)
def test_a_run_that_is_killed_at_any_step_has_the_curve_of_one_that_was_not(
    tmp_path, kind, quantizer
):
    overrides = [*quantizer, "train.steps=30", "train.save_every=6"]
    train_here(tmp_path / "whole", *overrides, kind=kind)
    number = random.randint(7, 20)
    process = start(tmp_path / "killed", *overrides, kind=kind)
    wait_for_rows(process, tmp_path / "killed", number)
    process.kill()
    process.communicate()
    assert 0 < len(rows(tmp_path / "killed")) < 30
    train_here(tmp_path / "killed", *overrides, kind=kind)
    assert_same_curve(tmp_path / "killed", tmp_path / "whole", 1e-5)
    found, expected = (
        load_checkpoint(find_checkpoint(tmp_path / name))[0] for name in ("killed", "whole")
    )
    assert found.keys() == expected.keys()
    for group, tensors in expected.items():
        for name, value in tensors.items():
            torch.testing.assert_close(found[group][name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["audio", "image"])
def test_two_processes_are_one_with_twice_the_batch(tmp_path, kind):
    """Adversarial, with noise in the quantizer, evaluated on the way; a few slow steps, since
    rounding grows from step to step."""
    overrides = [*FSP, "train.steps=8", "train.accumulate=2", "optim.lr=3e-4"]
    if kind == "audio":
        overrides += [f"eval.data={RESOURCES}", "eval.every=3"]
    process = start(
        tmp_path / "two", *overrides, "data.batch_size=2", "--processes", "2", kind=kind
    )
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    train_here(tmp_path / "one", *overrides, "data.batch_size=4", kind=kind)
    found, expected = ([r for r in rows(tmp_path / n) if "loss" in r] for n in ("two", "one"))
    assert len(found) == len(expected) == 8
    for row, expected_row in zip(found, expected):
        usage = ("perplexity", "cvu")  # of the main process
        for name in expected_row.keys() - set(usage):
            tolerance = 0.01 if name.endswith("grad_norm") else 1e-3
            assert row[name] == pytest.approx(expected_row[name], rel=tolerance, abs=1e-5), name
    evaluated = [row["step"] for row in rows(tmp_path / "two") if "eval/mel_distance" in row]
    assert evaluated == ([3, 6, 8] if kind == "audio" else [])


def test_two_processes_calibrate_and_make_a_codebook_together(tmp_path):
    overrides = [
        *VP,
        "train.steps=20",
        "data.batch_size=2",
        f"eval.data={RESOURCES}",
        "eval.every=10",
    ]
    process = start(tmp_path, *overrides, launcher=TORCHRUN)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    model = load_checkpoint(find_checkpoint(tmp_path))[0]["model"]
    assert model["quantizer.codebook"].shape == (64, 3)
    assert model["quantizer.eta"] != 1.5
    assert [r["step"] for r in rows(tmp_path) if "eval/mel_distance" in r] == [10, 20]
    losses = [row["loss"] for row in rows(tmp_path) if "loss" in row]
    assert all(0 < loss < 100 for loss in losses)


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_ends_all_processes_with_a_checkpoint(tmp_path, processes):
    overrides = [*FSP, "train.steps=10000", "train.save_every=10000"]
    process = start(tmp_path, *overrides, "--processes", str(processes))
    wait_for_rows(process, tmp_path, 5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "repeat the command to resume" in output
    state = load_checkpoint(find_checkpoint(tmp_path))[1]
    assert state["step"] == rows(tmp_path)[-1]["step"]


def test_what_is_wrong_is_said_in_one_line_by_several_processes(tmp_path):
    process = start(tmp_path, "data.train=nowhere", "--processes", "2")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "vpcodec: nowhere: no such folder or manifest" in output
    assert "Traceback" not in output
