"""`vpcodec tokens`, and `vpcodec decode` of arrays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import refuse, run, tree
from paths import SPEECH

from vpcodec import Codec, read_tokens
from vpcodec.media.audio import load


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with tokens/a.tok and tokens/sub/b.tok."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokens" / "sub").mkdir(parents=True)
    run("encode", SPEECH, "tokens/a.tok")
    run("encode", SPEECH, "tokens/sub/b.tok", "-m", "speech-1k")
    return tmp_path


@pytest.mark.parametrize("suffix", ["npz", "parquet", "jsonl"])
def test_token_files_become_arrays_and_come_back(here: Path, suffix: str) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="needs the corpus extra")
    done = run("tokens", "tokens/", "-o", f"all.{suffix}")
    assert f"all.{suffix}: 2 records, 1,223 tokens" in done.err
    run("tokens", f"all.{suffix}", "-o", "back")
    assert tree("back") == tree("tokens")
    for name in ("a.tok", "sub/b.tok"):
        assert (here / "back" / name).read_bytes() == (here / "tokens" / name).read_bytes()
    run("decode", f"all.{suffix}", "audio/")
    for name in ("a", "sub/b"):
        run("decode", f"tokens/{name}.tok", "expected.wav")
        assert (here / f"audio/{name}.wav").read_bytes() == (here / "expected.wav").read_bytes()


def test_existing_token_files_are_kept_unless_forced(here: Path) -> None:
    run("tokens", "tokens/", "-o", "all.npz")
    (here / "tokens" / "a.tok").write_bytes(b"mine")
    assert run("tokens", "all.npz", "-o", "tokens", "--json").json["kept"] == 2
    assert (here / "tokens" / "a.tok").read_bytes() == b"mine"
    run("tokens", "all.npz", "-o", "tokens", "--force")
    assert read_tokens("tokens/a.tok")[0].shape == (1, 902)


def test_a_single_record_goes_to_a_file_or_a_pipe() -> None:
    run("tokens", "tokens/a.tok", "-o", "a.npz")
    run("decode", "a.npz", "a.flac", "--rate", 16_000)
    assert load("a.flac")[1] == 16_000
    assert run("decode", "a.npz", "-").out.startswith(b"RIFF")
    run("decode", "a.npz")
    assert load("a.wav")[1] == load(SPEECH)[1]


def test_arrays_of_a_language_model() -> None:
    codec = Codec.from_pretrained("speech-3k")
    tokens = np.random.default_rng(0).integers(codec.codebook_size, size=(3, 40))
    np.save("one.npy", tokens[0])
    np.savez("three.npz", *tokens)
    run("decode", "one.npy", "-m", "speech-3k")
    run("decode", "three.npz", "-m", "speech-3k")
    samples, rate = load("one.wav")
    assert rate == 16_000 and samples.shape == (1, 40 * 96)
    assert np.abs(samples - codec.decode(tokens[0])).max() < 2**-15
    assert tree("three") == {"arr_0.wav", "arr_1.wav", "arr_2.wav"}
    run("tokens", "one.npy", "-o", "back", "-m", "speech-3k")
    assert np.array_equal(read_tokens("back/one.tok")[0], tokens[:1])


def test_images_too(picture) -> None:
    from vpcodec.media.image import save_image

    save_image(Path("p.png"), picture(40, 56))
    run("encode", "p.png", "p.tok")
    run("tokens", "p.tok", "-o", "p.npz")
    run("decode", "p.npz", "q.png")
    run("decode", "p.tok", "p2.png")
    assert Path("q.png").read_bytes() == Path("p2.png").read_bytes()
    np.save("grid.npy", read_tokens("p.tok")[0].reshape(5, 7))
    run("decode", "grid.npy", "grid.png", "-m", "image-fsp")
    assert Path("grid.png").stat().st_size > 100


def test_a_token_out_of_range_is_named_with_its_place() -> None:
    tokens = np.zeros((1, 30), np.int64)
    tokens[0, 17] = 250_047
    np.save("bad.npy", tokens)
    line = refuse("decode", "bad.npy", "bad.wav", "-m", "speech-3k")
    assert "bad.npy: token 250047 at channel 0, frame 17 is outside [0, 250047)" in line
    np.savez("two.npz", good=tokens[:, :9], bad=tokens)
    done = run("decode", "two.npz", "-m", "speech-3k", check=1)
    assert "two.npz: bad: token 250047 at channel 0, frame 17" in done.err
    assert tree("two") == {"good.wav"}


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["decode", "x.npy", "x.wav"], "does not say which model made it: use --model"),
        (["decode", "x.npy", "tokens/a.tok", "out/"], "tokens/a.tok: not an array"),
        (["decode", "x.npz", "-", "-m", "speech-3k"], "several files cannot go to one pipe"),
        (["decode", "x.npy", "x.txt", "-m", "speech-3k"], "x.txt: the suffix of the output"),
        (["decode", "evil.npz", "out/", "-m", "speech-3k"], "'../evil' is no relative path"),
        (["decode", "x.npy", "x.wav", "-m", "image-fsp"], "tokens must be (C, rows, columns)"),
        (["decode", "all.npz", "-m", "speech-1k", "out.wav"], "whose tokens 'speech-1k' cannot"),
        (["tokens", "x.npy", "-o", "x.npz"], "does not say which model made it: use --model"),
        (["tokens", "tokens/a.tok", "-o", "x.csv"], "x.csv: the suffix must be one of"),
        (["tokens", "tokens", "tokens/a.tok", "-o", "x.npz"], "x.npz: the key 'a' twice"),
        (["tokens", "empty", "-o", "y.npz"], "empty: no files found"),
        (["tokens", "cut.tok", "-o", "y.npz"], "cut.tok: "),
    ],
    ids=str,
)
def test_what_is_refused(here: Path, arguments: list[str], reason: str) -> None:
    np.save("x.npy", np.zeros(9, np.int64))
    np.savez("x.npz", np.zeros(9, np.int64), np.zeros(9, np.int64))
    np.savez("evil.npz", **{"../evil": np.zeros(9, np.int64)})
    run("tokens", "tokens/a.tok", "-o", "all.npz")
    (here / "empty").mkdir()
    (here / "cut.tok").write_bytes((here / "tokens/a.tok").read_bytes()[:-40])
    assert reason in refuse(*arguments)


def test_columns_hold_what_the_header_holds() -> None:
    run("tokens", "tokens/a.tok", "-o", "a.jsonl")
    facts = json.loads(Path("a.jsonl").read_text())
    tokens, header = read_tokens("tokens/a.tok")
    assert facts.pop("tokens") == tokens.tolist()
    assert facts == {
        "key": "a", "kind": "audio", "model": "speech-3k", "channels": 1, "frames": 902,
        "fingerprint": header.fingerprint.hex(), "codebook_size": 250_047, "hop_length": 96,
        "sample_rate": 16_000, "original_rate": 22_050, "n_samples": header.n_samples,
        "duration": header.n_samples / 22_050, "source": "", "start": 0,
    }  # fmt: skip
