"""Plans and shards: the same bytes however often, and whenever, the work is interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from corpora import RATE, contents, make_recordings, tokenize_here

from vpcodec import AudioCodec
from vpcodec.corpus import CorpusError, describe, estimate
from vpcodec.corpus.plan import FORMATS, open_plan
from vpcodec.corpus.shards import ShardTokenizer, read_shard
from vpcodec.media.audio import load, save

pytest.importorskip("pyarrow", reason="needs the corpus extra")


@pytest.fixture(scope="module")
def codec() -> AudioCodec:
    return AudioCodec.from_pretrained("speech-3k", threads=1)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten files, of which two are truncated."""
    folder = tmp_path_factory.mktemp("recordings")
    make_recordings(folder, 10, bad=2)
    return folder


OPTIONS = {"shard_mb": 0.012}  # about three files


def records(folder: Path) -> list:
    plan = open_plan(folder)
    return [record for shard in range(plan.n_shards) for record in read_shard(plan, shard)]


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_holds_every_record(tmp_path, recordings, codec, format):
    totals = tokenize_here([recordings], tmp_path / "out", format=format, **OPTIONS)
    assert totals.n_shards > 2 and totals.shards == totals.n_shards
    assert (totals.files, totals.bad, totals.records) == (10, 2, 8)
    found = records(tmp_path / "out")
    assert [record.key for record in found] == sorted(record.key for record in found)
    assert totals.tokens == sum(record.tokens.size for record in found)
    for record in found:
        samples, rate = load(recordings / f"{record.key}.wav")
        assert np.array_equal(record.tokens, codec.encode(samples, rate))
        assert record.source == str(recordings / f"{record.key}.wav")
        assert record.header.n_samples == samples.shape[1]
        assert record.header.original_rate == RATE and record.header.fingerprint == codec.space
    assert (tmp_path / "out" / "_SUCCESS").read_bytes() == b""


@pytest.mark.parametrize("format", FORMATS)
def test_two_runs_give_the_same_bytes(tmp_path, recordings, format):
    for name in ("a", "b"):
        tokenize_here([recordings], tmp_path / name, format=format, **OPTIONS)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_exactly_the_bad_files_are_in_quarantine_and_counts_add_up(tmp_path):
    bad = make_recordings(tmp_path / "in", 60, bad=4)
    (tmp_path / "in" / "empty.wav").write_bytes(b"")
    totals = tokenize_here([tmp_path / "in"], tmp_path / "out", **OPTIONS)
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    found = {line["key"]: line for line in map(json.loads, lines)}
    assert set(found) == bad | {"empty"} and totals.bad == len(lines) == 5
    assert "truncated" in found[min(bad)]["reason"]
    assert found["empty"]["path"] == str(tmp_path / "in" / "empty.wav")
    assert totals.records + totals.bad == totals.files == 61
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest["totals"]["records"] == len(records(tmp_path / "out")) == 56
    assert sum(shard["tokens"] for shard in manifest["shards"]) == totals.tokens


@pytest.mark.parametrize("damage", ["report", "data", "cut", "plan"])
def test_what_is_missing_or_half_written_is_done_again(tmp_path, recordings, damage):
    out = tmp_path / "out"
    tokenize_here([recordings], out, **OPTIONS)
    before = contents(out)
    plan = open_plan(out)
    if damage == "report":
        plan.report_file(1).unlink()
    elif damage == "data":
        plan.data_files(1)[0].unlink()
    elif damage == "cut":
        plan.data_files(1)[0].write_bytes(before["data/part-00001.parquet"][:-9])
    else:  # killed while the plan was written
        for file in out.glob("plan/0000[2-9].jsonl"):
            file.unlink()
    times = {path: path.stat().st_mtime_ns for path in out.glob("data/*")}
    totals = tokenize_here([recordings], out, **OPTIONS)
    assert contents(out) == before
    kept = {path for path, time in times.items() if path.stat().st_mtime_ns == time}
    assert len(kept) == totals.n_shards - (damage != "plan")


def test_a_shard_that_cannot_be_finished_leaves_nothing_behind(tmp_path, recordings, codec):
    out = tmp_path / "out"
    tokenize_here([recordings], out, **OPTIONS)
    plan = open_plan(out)
    plan.report_file(0).unlink()
    tokenizer = ShardTokenizer(plan, codec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            codec, "encoder_stream", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            tokenizer.run(0)
    assert [path for path in out.rglob(".*")] == [] and not plan.report_file(0).exists()


def test_new_files_get_new_shards_and_the_old_ones_stay(tmp_path):
    make_recordings(tmp_path / "in", 6)
    tokenize_here([tmp_path / "in"], tmp_path / "out", **OPTIONS)
    before = contents(tmp_path / "out")
    save(tmp_path / "in" / "00000a.wav", np.zeros((1, 900), np.float32), RATE)
    totals = tokenize_here([tmp_path / "in"], tmp_path / "out", **OPTIONS)
    after = contents(tmp_path / "out")
    assert totals.n_shards == totals.kept + 1 and totals.files == 7
    same = {name for name in before if after[name] == before[name]}
    assert set(before) - same == {"manifest.json"}
    assert [record.key for record in records(tmp_path / "out")][-1] == "00000a"


def test_a_file_that_has_changed_is_done_again_with_its_shard_only(tmp_path):
    make_recordings(tmp_path / "in", 9, bad=1)
    tokenize_here([tmp_path / "in"], tmp_path / "out", **OPTIONS)
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    save(Path(json.loads(line)["path"]), np.zeros((1, 900), np.float32), RATE)
    totals = tokenize_here([tmp_path / "in"], tmp_path / "out", **OPTIONS)
    assert (totals.bad, totals.records, totals.kept) == (0, 9, totals.n_shards - 1)
    assert (tmp_path / "out" / "quarantine.jsonl").read_bytes() == b""


def test_files_that_are_no_inputs_any_more_stay(tmp_path):
    make_recordings(tmp_path / "in", 4)
    tokenize_here([tmp_path / "in"], tmp_path / "out")
    before = contents(tmp_path / "out")
    totals = tokenize_here([tmp_path / "in" / "00001.wav"], tmp_path / "out")
    assert totals.left_out == 3 and contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"format": "lhotse"}, "made with format 'parquet', not 'lhotse'"),
        ({"model": "speech-1k"}, "made with space "),
        ({"mono": True}, "made with mono False, not True"),
        ({"shard_mb": 1}, "made with shard_bytes"),
        ({"format": "csv"}, "unknown format 'csv'"),
        ({"cut": "anywhere"}, "unknown cut 'anywhere'"),
        ({"max_seconds": 0.01}, "max_seconds must be at least 0.1"),
    ],
)
def test_other_settings_are_refused(tmp_path, recordings, options, reason):
    tokenize_here([recordings], tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(CorpusError, match=reason):
        tokenize_here([recordings], tmp_path / "out", **options)
    assert contents(tmp_path / "out") == before


def test_a_folder_with_something_else_is_refused(tmp_path, recordings):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("")
    with pytest.raises(CorpusError, match="mine: exists and is not a corpus of tokens"):
        tokenize_here([recordings], tmp_path / "mine")


def loud_and_silent(seconds: list[float]) -> np.ndarray:
    """Noise and silence by turns, (1, T)."""
    rng = np.random.default_rng(0)
    parts = [
        rng.uniform(-0.5, 0.5, round(length * RATE)) * (i % 2 == 0)
        for i, length in enumerate(seconds)
    ]
    return np.concatenate(parts)[None].astype(np.float32)


def test_long_recordings_are_cut_in_silence(tmp_path, codec):
    samples = loud_and_silent([0.7, 0.1, 0.7, 0.1, 0.3])
    save(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    tokenize_here([tmp_path / "a.wav"], tmp_path / "out", max_seconds=1)
    found = records(tmp_path / "out")
    starts = [record.start for record in found]
    ends = [record.start + record.header.n_samples for record in found]
    assert starts == [0, *ends[:-1]] and ends[-1] == samples.shape[1]
    for start, silence in zip(starts[1:], (0.7, 1.5)):
        assert silence * RATE < start < (silence + 0.1) * RATE
    assert [record.key for record in found] == [f"a#{start}" for start in starts]
    for record, start, end in zip(found, starts, ends):
        assert np.array_equal(record.tokens, codec.encode(samples[:, start:end], RATE))


@pytest.mark.parametrize("seconds, n_clips", [(1.0, 1), (2.0, 2), (2.01, 3), (0.0, 1)])
def test_long_recordings_are_cut_exactly(tmp_path, seconds, n_clips):
    samples = np.ones((2, round(seconds * RATE)), np.float32) * 0.1
    save(tmp_path / "a.wav", samples, RATE)
    tokenize_here([tmp_path / "a.wav"], tmp_path / "out", max_seconds=1, cut="exact", mono=True)
    found = records(tmp_path / "out")
    assert [record.start for record in found] == [i * RATE for i in range(n_clips)]
    assert sum(record.header.n_samples for record in found) == samples.shape[1]
    assert {record.header.channels for record in found} == {1}


def test_a_key_that_a_cut_might_have_is_refused(tmp_path):
    make_recordings(tmp_path / "in", 1)
    (tmp_path / "in" / "00000.wav").rename(tmp_path / "in" / "a#0.wav")
    with pytest.raises(CorpusError, match="'a#0' has a #"):
        tokenize_here([tmp_path / "in"], tmp_path / "out", max_seconds=1)
    assert tokenize_here([tmp_path / "in"], tmp_path / "out").records == 1


def test_a_part_beyond_the_end_is_quarantined(tmp_path):
    make_recordings(tmp_path, 1)
    (tmp_path / "a.tsv").write_text("path\toffset\tseconds\n00000.wav\t0.01\t9\n")
    totals = tokenize_here([tmp_path / "a.tsv"], tmp_path / "out")
    assert (totals.bad, totals.records) == (1, 0)
    assert "s before the end of the part" in (tmp_path / "out" / "quarantine.jsonl").read_text()


@pytest.mark.parametrize("format", FORMATS)
def test_facts_of_a_corpus(tmp_path, format):
    make_recordings(tmp_path / "in", 5, bad=1)
    (tmp_path / "in" / "again.wav").write_bytes((tmp_path / "in" / "00000.wav").read_bytes())
    totals = tokenize_here([tmp_path / "in"], tmp_path / "out", format=format)
    facts = describe(tmp_path / "out")
    assert facts["complete"] and facts["format"] == format and facts["model"] == "speech-3k"
    names = ("files", "bad", "records", "tokens", "seconds")
    assert {name: facts[name] for name in names} == {name: getattr(totals, name) for name in names}
    assert facts["duplicates"] == 1
    every = np.concatenate([record.tokens.ravel() for record in records(tmp_path / "out")])
    share = np.unique(every, return_counts=True)[1] / every.size
    assert facts["entropy"] == pytest.approx(-(share * np.log2(share)).sum())
    assert facts["codes_used"] == len(share) / 250_047


def test_an_estimate_is_near_what_comes_out(tmp_path, recordings):
    guess = estimate([str(recordings)], tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()
    totals = tokenize_here([recordings], tmp_path / "out", **OPTIONS)
    assert (guess["files"], guess["shards"]) == (10, totals.n_shards)
    assert guess["tokens"] == pytest.approx(totals.tokens, rel=0.35)  # two files of ten are bad
