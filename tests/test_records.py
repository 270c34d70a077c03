"""Records in NPZ, Parquet and JSON lines: what goes in comes out, and damage is named."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vpcodec.records import (
    Record,
    RecordError,
    RecordFile,
    path_of_key,
    read_records,
    smallest_dtype,
    write_records,
)
from vpcodec.tokenfile import AudioHeader, ImageHeader

FORMATS = ["npz", "parquet", "jsonl"]


@pytest.fixture(autouse=True)
def arrow(request: pytest.FixtureRequest) -> None:
    if "parquet" in request.node.name:
        pytest.importorskip("pyarrow", reason="needs the corpus extra")


def audio(key: str, n_samples: int, *, size: int = 250_047, channels: int = 1) -> Record:
    header = AudioHeader(
        model="größe",
        fingerprint=bytes(range(16)),
        sample_rate=16_000,
        original_rate=44_100,
        channels=channels,
        n_samples=n_samples,
        hop_length=96,
        codebook_size=size,
        block_frames=2048 // channels,
    )
    rng = np.random.default_rng(n_samples)
    tokens = rng.integers(size, size=(channels, header.n_frames))
    return Record(key, tokens, header, f"in/{key}.wav", 7 * n_samples)


def image(key: str) -> Record:
    header = ImageHeader(
        model="i", fingerprint=bytes(16), channels=2, hop_length=8, codebook_size=300,
        width=21, height=9, components=4,
    )  # fmt: skip
    return Record(key, np.arange(12).reshape(2, 6), header)


RECORDS = [audio("a", 0), audio("b/ü", 1_000), audio("c.d", 44_100, channels=2)]


def same(a: Record, b: Record) -> bool:
    facts = [(x.key, x.source, x.start, x.header) for x in (a, b)]
    return facts[0] == facts[1] and np.array_equal(a.tokens, b.tokens)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("records", [RECORDS, [image("x"), image("y")], []], ids=len)
def test_records_come_back(tmp_path: Path, suffix: str, records: list[Record]) -> None:
    path = tmp_path / f"a.{suffix}"
    assert write_records(path, records) == len(records)
    found = read_records(path)
    assert len(found) == len(records)
    for record, back in zip(records, found):
        assert same(
            Record(record.key, record.tokens, back.header, record.source, record.start), back
        )
        assert back.tokens.dtype == np.int64
        expected = record.header
        assert {**vars(back.header), "block_frames": 0} == {**vars(expected), "block_frames": 0}
    with RecordFile(path) as file:
        assert file.keys == [record.key for record in records]
        for number in [*reversed(range(len(records)))] * 2:
            assert np.array_equal(file.read(number).tokens, records[number].tokens)


@pytest.mark.parametrize("suffix", FORMATS)
def test_equal_records_are_equal_files(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b"):
        write_records(tmp_path / f"{name}.{suffix}", RECORDS)
    first, second = (tmp_path / f"{name}.{suffix}" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_many_records_of_parquet_are_read_by_group(tmp_path: Path) -> None:
    records = [audio(str(i), 96 * i) for i in range(600)]
    write_records(tmp_path / "a.parquet", iter(records))
    with RecordFile(tmp_path / "a.parquet") as file:
        for i in (599, 0, 256, 255, 300):
            assert np.array_equal(file.read(i).tokens, records[i].tokens)


@pytest.mark.parametrize("size, kind", [(2, "u1"), (256, "u1"), (257, "u2"), (2**16, "u2"),
                                        (2**16 + 1, "u4"), (2**32, "u4")])  # fmt: skip
def test_the_smallest_type_that_holds_all_tokens(tmp_path, size: int, kind: str) -> None:
    assert smallest_dtype(size) == np.dtype(kind)
    write_records(tmp_path / "a.npz", [audio("a", 9_600, size=size)])
    assert np.load(tmp_path / "a.npz")["a"].dtype == np.dtype(kind)


def test_numpy_reads_tokens_and_headers(tmp_path: Path) -> None:
    write_records(tmp_path / "a.npz", RECORDS)
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["b/ü"], RECORDS[1].tokens)
        assert json.loads(file["headers.json"])["b/ü"]["n_samples"] == 1_000


@pytest.mark.parametrize("array", [[1, 2], [[1, 2]], np.zeros((1, 0), np.uint8)], ids=str)
def test_arrays_without_headers(tmp_path: Path, array) -> None:
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", first=array, second=np.asfortranarray(array))
    for name, keys in (("x.npy", ["x"]), ("x.npz", ["first", "second"])):
        found = read_records(tmp_path / name)
        assert [record.key for record in found] == keys
        for record in found:
            assert record.header is None and np.array_equal(record.tokens, array)


def test_lines_without_headers(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(
        '{"key": "a", "tokens": [[1, 2]]}\n{"key": "b", "tokens": [3]}'
    )
    assert [x.tokens.tolist() for x in read_records(tmp_path / "x.jsonl")] == [[[1, 2]], [3]]


def written(tmp_path: Path, name: str, content: bytes) -> Path:
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


def npy(header: bytes, data: bytes = b"") -> bytes:
    header += b" " * (118 - len(header) - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def npz(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_", "."), content)
    return file.getvalue()


HUGE = npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,)}", b"12345678")


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("a.npy", HUGE, "are not an array of shape"),
        ("a.npy", npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"x" * 8),
         "must be integers, got object"),
        ("a.npy", npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", b"x" * 4),
         "must be integers, got float32"),
        ("a.npy", b"", "magic"),
        ("a.npz", b"PK", "not a zip file"),
        ("a.npz", npz(a_npy=HUGE), "a: .* are not an array"),
        ("a.npz", npz(a_npy=npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (0,)}"),
                      headers_json=b'{"b": {}}'), "a: not in headers.json"),
        ("a.npz", npz(headers_json=b"["), "Expecting value"),
        ("a.jsonl", b'{"key": "a", "tokens": [1]}\n{"tokens": []}', "line 2 is not a JSON object"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not a JSON object"),
        ("a.jsonl", b'{"key": "a", "tokens": [[1], [1, 2]]}', "a: the channels differ in length"),
        ("a.jsonl", b'{"key": "a", "tokens": [0.5]}', "a: tokens must be lists of integers"),
        ("a.jsonl", b'{"key": "a", "tokens": [[1]], "kind": "audio"}', "a: no column 'model'"),
        ("a.parquet", b"PAR1", "a.parquet: "),
        ("a.txt", b"", "the suffix must be one of"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    with pytest.raises(RecordError, match=reason) as caught:
        read_records(written(tmp_path, name, content))
    assert str(caught.value).startswith(str(tmp_path / name))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("suffix", ["npz", "jsonl"])
def test_a_token_out_of_range_is_named_with_its_place(tmp_path: Path, suffix: str) -> None:
    record = audio("x", 44_100)
    record.tokens[0, 17] = 250_047
    write_records(tmp_path / f"a.{suffix}", [audio("w", 9), record])
    expected = r"x: token 250047 at channel 0, frame 17 is outside \[0, 250047\)"
    with pytest.raises(RecordError, match=expected):
        read_records(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"channels": 2}, "not \\(2, 167\\)"),
        ({"n_samples": None}, "n_samples is missing"),
        ({"n_samples": 10**16}, "n_samples 10000000000000000 is not an integer"),
        ({"fingerprint": "zz"}, "fromhex"),
        ({"kind": "video"}, "neither audio nor image"),
    ],
)
def test_facts_that_do_not_fit_the_tokens(tmp_path: Path, change: dict, reason: str) -> None:
    write_records(tmp_path / "a.jsonl", [audio("x", 44_100)])
    facts = json.loads((tmp_path / "a.jsonl").read_text()) | change
    (tmp_path / "a.jsonl").write_text(json.dumps(facts))
    with pytest.raises(RecordError, match=reason):
        read_records(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "records, reason",
    [
        ([audio("a", 1), audio("a", 2)], "the key 'a' twice"),
        ([audio("a", 1), image("b")], "b: audio and images cannot be in one table"),
        ([Record("a", np.zeros((1, 1), np.int64), None)], "a: an array without a header"),
        ([Record("a", np.zeros((1, 9), np.int64), audio("a", 1).header)], "a: tokens of shape"),
    ],
    ids=["twice", "kinds", "bare", "shape"],
)
def test_what_cannot_be_written_leaves_no_file(tmp_path: Path, records, reason: str) -> None:
    pytest.importorskip("pyarrow", reason="needs the corpus extra")
    with pytest.raises(RecordError, match=reason):
        write_records(tmp_path / "a.parquet", records)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "key", ["", "/a", "../a", "a/../../b", "a\0", "a\n", "..", "a\\b", "x" * 300]
)
def test_keys_that_would_leave_their_folder(key: str) -> None:
    with pytest.raises(RecordError, match="the key"):
        path_of_key(key)
