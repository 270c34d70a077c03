"""Ray Data: nodes that are lost and drivers that are killed change no byte."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from corpora import contents, make_recordings, tokenize_here
from helpers import MODULE, tree
from paths import ROOT
from test_datasets import recipes

pytestmark = pytest.mark.slow

pytest.importorskip("pyarrow", reason="needs the corpus extra")
ray = pytest.importorskip("ray", reason="needs the corpus extra")

from vpcodec.corpus import CorpusError, describe, tokenize
from vpcodec.corpus.plan import open_plan
from vpcodec.corpus.shards import read_shard

N, BAD = 300, 9  # recordings, and those that are corrupt
SHARD_MB = 0.1  # about ten shards
WAIT = 300  # seconds, on a busy machine


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    folder = tmp_path_factory.mktemp("recordings")
    return folder, make_recordings(folder, N, bad=BAD)


@pytest.fixture(scope="module")
def expected(recordings, tmp_path_factory) -> Path:
    """The corpus without Ray."""
    folder = tmp_path_factory.mktemp("corpora") / "expected"
    tokenize_here([recordings[0]], folder, shard_mb=SHARD_MB)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """A head without processors, and two nodes with one each; this process is connected to it."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        node = {"object_store_memory": 80 * 2**20}
        found = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **node}
        )
        for _ in range(2):
            found.add_node(num_cpus=1, **node)
        ray.init(address=found.address, log_to_driver=False, logging_level=logging.ERROR)
        yield found
        ray.shutdown()
        found.shutdown()


def test_a_node_that_is_lost_in_the_middle_changes_nothing(cluster, recordings, expected, tmp_path):
    folder, bad = recordings
    nodes = list(cluster.worker_nodes)

    def progress(totals) -> None:
        if totals.shards == 2 and len(cluster.worker_nodes) == 2:
            cluster.remove_node(nodes[1], allow_graceful=False)

    totals = tokenize([str(folder)], tmp_path / "out", shard_mb=SHARD_MB, progress=progress)
    assert len(cluster.worker_nodes) == 1
    assert contents(tmp_path / "out") == contents(expected)
    assert (totals.files, totals.bad, totals.records) == (N, BAD, N - BAD)
    plan = open_plan(tmp_path / "out")
    failed = {x["key"] for i in range(plan.n_shards) for x in plan.report(i)["failed"]}
    assert failed == bad
    keys = [record.key for i in range(plan.n_shards) for record in read_shard(plan, i)]
    assert sorted(keys) == sorted({f"{i:05d}" for i in range(N)} - bad)
    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)


def test_a_driver_that_is_killed_and_repeated_changes_nothing(
    cluster, recordings, expected, tmp_path
):
    out = tmp_path / "out"
    command = [*MODULE, "tokenize", str(recordings[0]), "-o", str(out)]
    command += ["--shard-mb", str(SHARD_MB), "--ray", cluster.address]
    chance = random.Random(0)
    for shards in (0, 3):  # done when it is killed
        driver = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment())
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline and driver.poll() is None:
            if len(list(out.glob("done/*.json"))) >= shards and out.is_dir():
                break
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        driver.send_signal(signal.SIGKILL)
        assert driver.wait(WAIT) == -signal.SIGKILL
        assert not (out / "_SUCCESS").exists()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 1, done.stderr
    assert f"{N - BAD:,} of {N} files" in done.stderr and f"{BAD} of {N} failed" in done.stderr
    assert contents(out) == contents(expected)
    assert describe(out)["complete"]


def test_a_recipe_for_ray(cluster, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "getcwd", lambda: str(tmp_path))
    (tmp_path / "corpus").symlink_to(expected)
    text = recipes()["ray"].replace('"corpus/data"', repr(str(expected / "data")))
    names: dict = {}
    exec(compile(text, "docs/corpora.md: ray", "exec"), names)
    found = dict(names["clips"])
    plan = open_plan(expected)
    for shard in range(plan.n_shards):
        for record in read_shard(plan, shard):
            assert np.array_equal(found.pop(record.key), record.tokens)
    assert found == {}


def test_a_shard_that_cannot_be_written_ends_the_command(cluster, recordings, tmp_path):
    tokenize_here([recordings[0]], tmp_path / "out", shard_mb=SHARD_MB)
    plan = open_plan(tmp_path / "out")
    plan.report_file(2).unlink()
    plan.data_files(2)[0].unlink()
    plan.data_files(2)[0].mkdir()
    with pytest.raises(CorpusError, match=f"{plan.data_files(2)[0]}: it is a folder"):
        tokenize([str(recordings[0])], tmp_path / "out", shard_mb=SHARD_MB)


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


def test_alone_it_starts_ray_and_leaves_nothing_behind(recordings, expected, tmp_path):
    """On a terminal interrupt: exit code, temporary files, home folder; then the whole run."""
    home, temporary, out = tmp_path / "home", tmp_path / "t", tmp_path / "out"
    home.mkdir()
    temporary.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    settings = kept | {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    command = [*MODULE, "tokenize", str(recordings[0]), "-o", str(out), "--jobs", "1"]
    command += ["--shard-mb", str(SHARD_MB)]
    driver = subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline and not list(out.glob("done/*.json")):
        time.sleep(0.05)
    driver.send_signal(signal.SIGTERM)
    assert driver.communicate(timeout=WAIT)[1].count("Traceback") == 0
    assert driver.returncode == 128 + signal.SIGTERM
    assert tree(str(home)) == tree(str(temporary)) == set()
    assert list(out.rglob(".*")) == [] and not (out / "_SUCCESS").exists()
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 2  # what was done, and how many failed
    assert contents(out) == contents(expected)
    assert tree(str(home)) == tree(str(temporary)) == set()


def test_ray_that_is_not_there_is_one_line(recordings, tmp_path):
    command = [*MODULE, "tokenize", str(recordings[0]), "-o", str(tmp_path / "out")]
    command += ["--ray", "127.0.0.1:1"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 2
    assert done.stderr.startswith("vpcodec: Ray at 127.0.0.1:1 cannot be used: ")
    assert len(done.stderr.splitlines()) == 1


def test_nothing_else_needs_ray():
    code = """
import sys
sys.modules["ray"] = None
import vpcodec.corpus, vpcodec.corpus.engine, vpcodec.cli.app
"""
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, timeout=WAIT)
