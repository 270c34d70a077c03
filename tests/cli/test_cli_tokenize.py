"""The command line of `vpcodec tokenize`, where Ray is not needed; tests/corpus runs Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import refuse, run, tree

from vpcodec.corpus.plan import Plan
from vpcodec.corpus.shards import ShardTokenizer
from vpcodec.media.audio import save

for package in ("ray", "pyarrow"):
    pytest.importorskip(package, reason="needs the corpus extra")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with in/ of three recordings; shards run in this process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        save(tmp_path / "in" / f"{i}.wav", rng.uniform(-0.1, 0.1, (1, 8_000)), 16_000)

    def run_here(plan: Plan, shards, *, on_report, **options) -> None:
        from vpcodec import AudioCodec

        tokenizer = ShardTokenizer(plan, AudioCodec.from_pretrained(plan.settings.model))
        for shard in shards:
            on_report(tokenizer.run(shard))

    monkeypatch.setattr("vpcodec.corpus.engine.run_shards", run_here)
    return tmp_path


def test_a_corpus_and_what_is_said_of_it():
    done = run("tokenize", "in", "-o", "out")
    assert done.err.startswith(
        "out: 3 of 3 files, 3 records, 0.00 h, 252 tokens in 1 shards (0 kept)"
    )
    assert "nothing was left to do" in run("tokenize", "in", "-o", "out").err
    facts = run("tokenize", "in", "-o", "out", "--json").json
    assert (facts["files"], facts["bad"], facts["tokens"], facts["kept"]) == (3, 0, 252, 1)
    found = run("info", "out", "--json").json
    assert (found["records"], found["tokens"], found["duplicates"]) == (3, 252, 0)
    assert "complete       yes" in run("info", "out").out.decode()


def test_a_shard_can_be_heard():
    run("tokenize", "in", "-o", "out")
    run("decode", "out/data/part-00000.parquet", "audio/")
    assert tree("audio") == {"0.wav", "1.wav", "2.wav"}


def test_bad_files_are_counted_with_exit_code_1(here):
    (here / "in" / "bad.wav").write_bytes(b"RIFF")
    done = run("tokenize", "in", "-o", "out", check=1)
    assert done.err.splitlines()[1] == "vpcodec: 1 of 4 failed, see out/quarantine.jsonl"
    assert run("tokenize", "in", "-o", "out", "--json", check=1).json["bad"] == 1


def test_files_that_are_no_inputs_any_more_are_mentioned():
    run("tokenize", "in", "-o", "out")
    done = run("tokenize", "in/0.wav", "-o", "out")
    assert "2 files of earlier runs are no inputs any more; they stay" in done.err


def test_a_dry_run_does_nothing():
    before = tree()
    done = run("tokenize", "in", "-o", "out", "--dry-run")
    assert done.err.startswith("3 files, 0.0 MB, about 0.00 h: 25")
    facts = run("tokenize", "in", "-o", "out", "--dry-run", "--json").json
    assert facts["files"] == 3 and facts["tokens"] == pytest.approx(252, abs=10)
    assert tree() == before


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["in", "--ray", "auto", "--jobs", "2"], "name one of them"),
        (["missing"], "missing: no such file or folder"),
        (["in", "in"], "the key '0' twice: "),
        (["in", "--format", "csv"], "unknown format 'csv'"),
        (["in", "-m", "image-fsp"], "image-fsp is a model for image"),
    ],
    ids=str,
)
def test_what_is_refused(arguments, reason):
    assert reason in refuse("tokenize", *arguments, "-o", "out")


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "ray" else object()
    )
    assert "pip install 'vpcodec[corpus]'" in refuse("tokenize", "in", "-o", "out")
