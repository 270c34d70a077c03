"""What `tokenize` takes: folders, globs, manifests, cuts, tars and tables."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from corpora import RATE, make_recordings, tokenize_here
from sounds import sound

from vpcodec import AudioCodec
from vpcodec.corpus import CorpusError, list_recordings
from vpcodec.corpus.inputs import Opener, Recording
from vpcodec.corpus.plan import open_plan
from vpcodec.corpus.shards import read_shard
from vpcodec.media.audio import load


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with in/ of three recordings and a text."""
    monkeypatch.chdir(tmp_path)
    make_recordings(tmp_path / "in", 2)
    (tmp_path / "in" / "sub").mkdir()
    (tmp_path / "in" / "sub" / "b.c.flac").write_bytes(sound("FLAC", 800))
    (tmp_path / "in" / "notes.txt").write_text("no audio")
    return tmp_path


def keys(*inputs: object) -> list[str]:
    return [recording.key for recording in list_recordings([str(name) for name in inputs])]


def test_folders_files_and_globs(folder):
    assert keys("in") == ["00000", "00001", "sub/b.c"]
    assert keys("in/sub/b.c.flac", "in/00001.wav") == ["b.c", "00001"]
    assert keys("in/**/*.wav") == ["00000", "00001"]
    assert keys("in/*/*.flac") == ["sub/b.c"]
    assert all(Path(x.path).is_absolute() and x.n_bytes > 0 for x in list_recordings(["in"]))


def test_manifests(folder):
    Path("a.tsv").write_text('path\toffset\tseconds\ntext\nin/00000.wav\t0.01\t0.02\t"x\n'.replace(
        "\ntext", "\ttext"))  # fmt: skip
    (part,) = list_recordings(["a.tsv"])
    assert (part.key, part.offset, part.seconds) == ("in/00000", 0.01, 0.02)
    lines = [{"path": "in/00000.wav", "key": "x"}, {"audio_filepath": "in/00001.wav"}]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert keys("a.jsonl") == ["x", "in/00001"]


def cut(key: str, start: float, duration: float, **recording: object) -> dict:
    source = {"type": "file", "channels": [0], "source": "in/00000.wav"}
    whole = {"id": "r", "sources": [source], "sampling_rate": RATE, "num_samples": 1600,
             "duration": 0.1} | recording  # fmt: skip
    return {"id": key, "start": start, "duration": duration, "channel": 0, "recording": whole,
            "supervisions": [], "type": "MonoCut"}  # fmt: skip


def test_cuts_of_lhotse(folder):
    lines = [cut("whole", 0, 0.1), cut("part", 0.01, 0.02)]
    with gzip.open("cuts.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, lines)))
    whole, part = list_recordings(["cuts.jsonl.gz"])
    assert (whole.key, whole.offset, whole.seconds) == ("whole", 0, None)
    assert (part.key, part.offset, part.seconds) == ("part", 0.01, 0.02)


def make_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("a/x.wav", "a/x.json", "y.flac"):
            content = sound(name.rsplit(".")[-1].upper(), 900) if "json" not in name else b"{}"
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def make_table(path: Path, ids: bool) -> None:
    pytest.importorskip("pyarrow", reason="needs the corpus extra")
    import pyarrow
    import pyarrow.parquet

    rows = [{"audio": {"bytes": sound("WAV", 500 + i), "path": f"{i}.wav"}, "text": "?"}
            for i in range(5)]  # fmt: skip
    rows[3]["audio"]["bytes"] = None
    if ids:
        rows = [row | {"id": f"n{i}"} for i, row in enumerate(rows)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def test_tars_and_tables(folder):
    make_tar(folder / "a.tar")
    make_table(folder / "t.parquet", ids=False)
    make_table(folder / "n.parquet", ids=True)
    assert keys("a.tar") == ["a/x", "y"]
    assert keys("t.parquet")[1:3] == ["t/00000-00001", "t/00001-00000"]
    assert keys("n.parquet") == ["n0", "n1", "n2", "n3", "n4"]
    opener = Opener()
    for recording in list_recordings(["a.tar", "n.parquet"]):
        if recording.key == "n3":
            with pytest.raises(CorpusError, match="row group 1, row 1: there is no audio"):
                opener.open(recording).__enter__()
            continue
        with opener.open(recording) as reader:
            n_samples = sum(block.shape[1] for block in reader.blocks(100))
        assert n_samples == (900 if recording.key in ("a/x", "y") else 500 + int(recording.key[1]))


def test_all_kinds_in_one_corpus_give_the_tokens_of_their_audio(folder):
    make_tar(folder / "a.tar")
    make_table(folder / "n.parquet", ids=True)
    Path("a.tsv").write_text("path\toffset\tseconds\tkey\nin/00000.wav\t0.01\t0.02\tpart\n")
    totals = tokenize_here(["in", "a.tar", "n.parquet", "a.tsv"], folder / "out")
    assert (totals.files, totals.bad, totals.records) == (11, 1, 10)
    found = {record.key: record for record in read_shard(open_plan("out"), 0)}
    codec = AudioCodec.from_pretrained("speech-3k")
    samples, rate = load("in/00000.wav")
    assert np.array_equal(found["00000"].tokens, codec.encode(samples, rate))
    assert np.array_equal(found["part"].tokens, codec.encode(samples[:, 160:480], rate))
    assert (found["part"].start, found["part"].header.n_samples) == (160, 320)
    samples, rate = load(io.BytesIO(sound("WAV", 502)))
    assert np.array_equal(found["n2"].tokens, codec.encode(samples, rate))
    assert found["a/x"].source.endswith("a.tar: a/x.wav")


def test_a_recording_survives_its_line():
    recordings = [Recording("a", "/a.wav", 3), Recording("b", "/t.tar", 3, member="x", place=(4,)),
                  Recording("ü", "/t", 3, 0.5, 1.5, "audio", (1, 2))]  # fmt: skip
    assert [Recording.from_json(x.to_json()) for x in recordings] == recordings
    assert recordings[0].to_json() == '{"key": "a", "path": "/a.wav", "n_bytes": 3}'


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("none.wav", None, "none.wav: no such file or folder"),
        ("empty", "folder", "empty: there is no audio in it"),
        ("a.txt", b"x", "a.txt: neither audio nor one of"),
        ("a.jsonl", b"[]", "a.jsonl:1: not a JSON object"),
        ("a.jsonl", b'{"text": ""}', "a.jsonl:1: no `path`"),
        ("a.jsonl", b'{"path": "x.wav", "offset": "-1"}', "offset is not a number of seconds"),
        ("a.jsonl", json.dumps(cut("c", 0, 1, sources=[])).encode(), "not a cut with one source"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: "),
        ("a.tar", b"no tar" * 200, "a.tar: "),
        ("a.tsv", b"name\nx\n", "a.tsv:2: no `path`"),
        ("a.parquet", b"PAR1", "a.parquet: "),
    ],
)
def test_what_is_no_input_is_refused(folder, name, content, reason):
    if "parquet" in name:
        pytest.importorskip("pyarrow", reason="needs the corpus extra")
    if content == "folder":
        Path(name).mkdir()
    elif content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(CorpusError, match=reason.replace(".", r"\.")) as caught:
        keys("in", name)
    assert len(str(caught.value).splitlines()) == 1


def test_a_key_that_occurs_twice_is_an_error_with_both_paths(folder):
    (folder / "in" / "00000.flac").write_bytes(sound("FLAC", 800))
    with pytest.raises(CorpusError, match=r"'00000' twice: .*00000\.flac and .*00000\.wav"):
        tokenize_here(["in"], folder / "out")
    assert not (folder / "out").exists()
