"""Reading a corpus: datasets of torch, and the two lines that other libraries need."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from corpora import make_recordings, tokenize_here
from paths import ROOT

pytestmark = pytest.mark.slow  # for the libraries that are imported

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("pyarrow", reason="needs the corpus extra")

from torch.utils.data import DataLoader

from vpcodec import Codec
from vpcodec.config import LMConfig
from vpcodec.corpus import CorpusError, IterableTokenDataset, TokenDataset
from vpcodec.corpus.plan import FORMATS, open_plan
from vpcodec.corpus.shards import read_shard
from vpcodec.recipe.lm import TokenCorpus
from vpcodec.training.lm.data import read_clips

N = 24


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same corpus in every format, of 24 clips in at least 4 shards."""
    root = tmp_path_factory.mktemp("corpora")
    make_recordings(root / "in", N)
    for format in FORMATS:
        tokenize_here([root / "in"], root / format, format=format, shard_mb=0.02)
    assert open_plan(root / "parquet").n_shards >= 4
    return {format: root / format for format in FORMATS}


@pytest.fixture(scope="module")
def expected(corpora) -> dict[str, np.ndarray]:
    plan = open_plan(corpora["parquet"])
    records = [record for shard in range(plan.n_shards) for record in read_shard(plan, shard)]
    return {record.key: record.tokens for record in records}


def keys(items) -> list[str]:
    return [item["key"] for item in items]


def test_clips_by_number(corpora, expected):
    dataset = TokenDataset(corpora["parquet"])
    assert len(dataset) == N
    assert keys(dataset[i] for i in range(N)) == list(expected)
    for i in (N - 1, 0, 13, -1):
        item = dataset[i]
        assert item["tokens"].dtype == torch.int64 and item["original_rate"] == 16_000
        assert np.array_equal(item["tokens"].numpy(), expected[item["key"]])
    with pytest.raises(IndexError):
        dataset[N]
    again = pickle.loads(pickle.dumps(dataset))
    assert again[3]["key"] == dataset[3]["key"]


def test_a_data_loader_with_workers(corpora, expected):
    loader = DataLoader(
        TokenDataset(corpora["parquet"]), batch_size=None, num_workers=2, shuffle=True
    )
    assert sorted(keys(loader)) == sorted(expected)


@pytest.mark.parametrize("format", FORMATS)
def test_clips_one_after_the_other(corpora, expected, format):
    items = list(IterableTokenDataset(corpora[format]))
    assert keys(items) == list(expected)
    for item in items:
        assert np.array_equal(item["tokens"].numpy(), expected[item["key"]])


@pytest.mark.parametrize("world_size", [1, 2, 50])  # 50: more than there are shards
@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_share_the_clips(corpora, expected, world_size, shuffle):
    found = []
    for rank in range(world_size):
        dataset = IterableTokenDataset(
            corpora["parquet"], shuffle=shuffle, rank=rank, world_size=world_size
        )
        found += keys(dataset)
    assert sorted(found) == sorted(expected)


def test_workers_share_the_clips(corpora, expected):
    dataset = IterableTokenDataset(corpora["webdataset"], shuffle=True)
    found = keys(DataLoader(dataset, batch_size=None, num_workers=2))
    assert sorted(found) == sorted(expected)


def test_the_order_depends_on_seed_and_epoch_alone(corpora, expected):
    def epochs(format: str, **options) -> list[list[str]]:
        dataset = IterableTokenDataset(corpora[format], **options)
        return [keys(dataset) for _ in range(2)]

    first, second = epochs("parquet", shuffle=True)
    assert [first, second] == epochs("lhotse", shuffle=True)
    assert first != second and first != list(expected)
    assert sorted(first) == sorted(second) == sorted(expected)
    assert epochs("parquet", shuffle=True, seed=1)[0] != first
    dataset = IterableTokenDataset(corpora["parquet"], shuffle=True)
    dataset.set_epoch(1)
    assert keys(dataset) == second


@pytest.mark.parametrize("done", [0, 1, 11, N - 1])
def test_resuming_in_the_middle(corpora, done):
    options = {"shuffle": True, "rank": 0, "world_size": 1}
    whole = IterableTokenDataset(corpora["parquet"], **options)
    whole.set_epoch(3)
    items = iter(whole)
    for _ in range(done):
        next(items)
    state = pickle.loads(pickle.dumps(whole.state_dict()))
    rest, following = keys(items), keys(whole)
    again = IterableTokenDataset(corpora["parquet"], **options)
    again.load_state_dict(state)
    assert keys(again) == rest and len(rest) == N - done
    assert keys(again) == following


def test_what_is_no_complete_corpus_is_refused(corpora, tmp_path):
    with pytest.raises(CorpusError, match="not a corpus of tokens"):
        TokenDataset(tmp_path)
    with pytest.raises(CorpusError, match="use IterableTokenDataset"):
        TokenDataset(corpora["lhotse"])
    make_recordings(tmp_path / "in", 3)
    tokenize_here([tmp_path / "in"], tmp_path / "out")
    open_plan(tmp_path / "out").report_file(0).unlink()
    for kind in (TokenDataset, IterableTokenDataset):
        with pytest.raises(CorpusError, match="not complete: shard 0 of 1 is missing"):
            kind(tmp_path / "out")


def recipes() -> dict[str, str]:
    """The Python blocks of docs/corpora.md, by the library that they are for."""
    blocks = re.findall(r"^```python\n# (\w+)\n(.*?)^```", (ROOT / "docs/corpora.md").read_text(),
                        re.M | re.S)  # fmt: skip
    return dict(blocks)


PACKAGES = {
    "datasets": "parquet",
    "polars": "parquet",
    "webdataset": "webdataset",
    "lhotse": "lhotse",
    "torch": "parquet",
}


@pytest.mark.parametrize("package", PACKAGES)
def test_two_lines_read_a_corpus(corpora, expected, package, tmp_path, monkeypatch):
    pytest.importorskip(package, reason="needs the dev extra")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "corpus").symlink_to(corpora[PACKAGES[package]])
    names: dict = {}
    exec(compile(recipes()[package], f"docs/corpora.md: {package}", "exec"), names)
    found = {key: np.asarray(tokens) for key, tokens in names["clips"]}
    assert list(found) == list(expected)
    for key, tokens in expected.items():
        assert np.array_equal(found[key], tokens)


def test_language_models_read_a_corpus_in_any_format_and_token_files_alike(tmp_path: Path) -> None:
    make_recordings(tmp_path / "in", 3)
    codec = Codec.from_pretrained("speech-1k", threads=1)
    for path in sorted((tmp_path / "in").iterdir()):
        (tmp_path / "files").mkdir(exist_ok=True)
        codec.encode_file(path, tmp_path / "files" / f"{path.stem}.tok")
    for format in FORMATS:
        tokenize_here([tmp_path / "in"], tmp_path / format, model="speech-1k", format=format)
    expected, *found = (
        read_clips([TokenCorpus(path=str(tmp_path / name))], codec.model, LMConfig(name="lm"))
        for name in ("files", *FORMATS)
    )
    assert len(expected[0]) == 3 and found
    for clips, skipped in found:
        assert skipped == []
        assert all(map(np.array_equal, clips, expected[0]))
