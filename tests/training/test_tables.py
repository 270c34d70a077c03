"""Making entropy tables: near the entropy that is known, for grids and codebooks; the command."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import refuse, run

from vpcodec import Codec, read_tokens
from vpcodec.config import AudioConfig, ImageConfig
from vpcodec.entropy import TABLES, ImageCoder, parse_tables
from vpcodec.media.image import save_image
from vpcodec.model_folder import read_folder
from vpcodec.tokenfile import verify

pytest.importorskip("torch", reason="needs the train extra")

from safetensors.numpy import load

from vpcodec.training.entropy import (
    TableError,
    add_tables,
    code_length,
    fit_tables,
    split_levels,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def grid(*levels: int) -> AudioConfig:
    return AudioConfig(name="x", quantizer={"type": "fsp", "levels": levels})


def markov(n: int, states: int, seed: int = 0) -> tuple[np.ndarray, float]:
    """Tokens of a chain that stays, or goes anywhere; and its entropy rate in bits."""
    rng = np.random.default_rng(seed)
    stay = 0.8
    tokens = rng.integers(0, states, n)
    for i in np.flatnonzero(rng.random(n) < stay):
        tokens[i] = tokens[i - 1] if i else tokens[i]
    same, other = stay + (1 - stay) / states, (1 - stay) / states
    return tokens, -(same * np.log2(same) + (states - 1) * other * np.log2(other))


def test_a_chain_is_coded_near_its_entropy():
    """Within 5 % of the entropy rate on tokens that the tables were not made of, headers included.

    A fair share of that is the first frame of each lane, which knows nothing.
    """
    tokens, rate = markov(60_000, 12)
    tables = fit_tables([tokens[:50_000]], grid(3, 4), hidden=32, steps=600, lane=256)
    coder = parse_tables(tables)
    found = code_length(coder, np.split(tokens[50_000:], 10))
    assert rate < found < 1.05 * rate + 8 * 8 / 1000  # mark and state: 6 bytes, and a word's rest


def test_independent_tokens_cost_what_they_are_worth():
    rng = np.random.default_rng(0)
    shares = np.array([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125])
    tokens = rng.choice(6, 40_000, p=shares)
    entropy = -(shares * np.log2(shares)).sum()
    coder = parse_tables(fit_tables([tokens[:30_000]], grid(2, 3), hidden=16, steps=300))
    assert entropy - 0.05 < code_length(coder, [tokens[30_000:]]) < 1.04 * entropy


def test_the_tables_are_the_same_for_the_same_seed():
    """To the byte: their hash is in the files that are coded with them."""
    tokens, _ = markov(5_000, 6)
    *same, other = (
        fit_tables([tokens], grid(2, 3), hidden=8, steps=20, seed=seed) for seed in (1, 1, 1, 2)
    )
    assert same[0] == same[1] == same[2]
    assert not np.array_equal(parse_tables(same[0]).past, parse_tables(other).past)
    assert (
        load(same[0]).keys() == load(other).keys() > {"past", "output"}
    )  # as safetensors reads it


def field(rows: int, columns: int, states: int, seed: int) -> tuple[np.ndarray, float]:
    """Tokens of an image, each that on its left or above it, or any; and their entropy in bits
    where both are known and differ, which is the most that is needed."""
    rng = np.random.default_rng(seed)
    stay = 0.9
    tokens = rng.integers(0, states, (rows, columns))
    for row in range(1, rows):
        for column in range(1, columns):
            if rng.random() < stay:
                left = rng.random() < 0.5
                tokens[row, column] = tokens[row, column - 1] if left else tokens[row - 1, column]
    near, other = stay / 2 + (1 - stay) / states, (1 - stay) / states
    return tokens, -(2 * near * np.log2(near) + (states - 2) * other * np.log2(other))


def test_images_are_coded_near_their_entropy_and_repeatably():
    images = [field(24, 40, 12, seed) for seed in range(40)]
    bound = images[0][1]
    config = ImageConfig(name="x", quantizer={"type": "fsp", "levels": (3, 4)})
    made = [
        fit_tables([tokens for tokens, _ in images], config, hidden=24, steps=400, seed=1)
        for _ in range(2)
    ]
    assert made[0] == made[1]
    coder = parse_tables(made[0])
    assert isinstance(coder, ImageCoder)
    tokens = [field(64, 64, 12, seed)[0] for seed in (100, 101)]
    assert code_length(coder, tokens) < 1.1 * bound < 0.8 * np.log2(12)
    for grid_ in tokens:
        found = coder.unpack(coder.pack(grid_.reshape(-1, 1), 64), grid_.size, 1, 64)
        assert (found.reshape(64, 64) == grid_).all()


def test_codes_that_are_near_share_a_digit():
    """A codebook's tree: each first digit is a region, so neighbours have fewer first digits."""
    codes = np.random.default_rng(0).standard_normal((4096, 3)).astype(np.float32)
    config = AudioConfig(name="x", quantizer={"type": "vp", "dim": 3, "codebook_size": 4096})
    levels, order = split_levels(config, codes)
    assert levels == (16, 16, 16) and np.array_equal(np.sort(order), np.arange(4096))
    distances = ((codes[:, None] - codes[None, :200]) ** 2).sum(2)
    neighbours = distances.argsort(0)[1:9].T
    first = order % 16
    share = (first[neighbours] == first[:200, None]).mean()
    assert share > 0.5  # 1/16 by chance


def test_a_codebook_is_coded_through_its_tree():
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((256, 2)).astype(np.float32)
    config = AudioConfig(name="x", quantizer={"type": "vp", "dim": 2, "codebook_size": 256})
    walk = np.cumsum(rng.standard_normal((20_000, 2)) * 0.15, 0)
    walk = np.sin(walk) * 1.5
    tokens = ((walk[:, None] - codes) ** 2).sum(2).argmin(1)
    coder = parse_tables(fit_tables([tokens[:18_000]], config, codes=codes, hidden=32, steps=300))
    assert code_length(coder, [tokens[18_000:]]) < 6  # of 8
    found = coder.unpack(coder.pack(tokens[:100, None]), 100, 1)
    np.testing.assert_array_equal(found[:, 0], tokens[:100])


def test_what_no_tables_can_be_made_of_is_refused():
    with pytest.raises(TableError, match="too few"):
        fit_tables([np.zeros(10, np.int64)], grid(3, 4))
    config = AudioConfig(name="x", quantizer={"type": "vp", "dim": 2, "codebook_size": 100})
    with pytest.raises(TableError, match="codebook of 100"):
        split_levels(config, np.zeros((100, 2)))


@pytest.fixture
def model(tmp_path: Path, debug_model: Path) -> Path:
    return Path(shutil.copytree(debug_model, tmp_path / "model"))


@pytest.fixture
def recordings(tmp_path: Path, speech_wav: Path) -> Path:
    folder = tmp_path / "recordings"
    folder.mkdir()
    shutil.copy(speech_wav, folder / "a.wav")
    return folder


def test_the_command_makes_files_shorter(model, recordings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("encode", "recordings/a.wav", "raw.tok", "-m", "model")
    before = read_folder(model)
    facts = run(
        *("models", "tables", "model", "recordings"), "--steps", 200, "--hidden", 16, "--json"
    ).json
    assert facts["bits_per_token"] < facts["nominal_bits_per_token"]
    after = read_folder(model)
    after.check()
    assert after.fingerprint == before.fingerprint and set(after.files) == {*before.files, TABLES}
    run("encode", "recordings/a.wav", "coded.tok", "-m", "model")
    assert Path("coded.tok").stat().st_size < 0.95 * Path("raw.tok").stat().st_size
    for name in ("raw", "coded"):  # files from before the tables are read as ever
        run("decode", f"{name}.tok", f"{name}.wav", "-m", "model")
    assert Path("raw.wav").read_bytes() == Path("coded.wav").read_bytes()


@pytest.mark.parametrize("done", [0, 1])
def test_new_tables_that_are_cut_short_leave_the_model_as_it_was(
    done, model, recordings, tmp_path, monkeypatch
):
    add_tables(model, recordings, hidden=8, steps=5)
    before = read_folder(model)
    real, left = os.replace, iter(range(done))

    def replace(source, target):
        if next(left, None) is None:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        add_tables(model, recordings, hidden=8, steps=5, seed=1)
    assert read_folder(model) == before
    before.check()
    codec = Codec.from_pretrained(model)
    codec.encode_file(recordings / "a.wav", tmp_path / "a.tok")
    codec.decode_file(tmp_path / "a.tok", tmp_path / "a.wav")


def test_tables_are_added_and_files_of_all_of_them_are_read(model, recordings, tmp_path):
    tokens, ids = [], []
    for seed in range(3):
        run(*("models", "tables", model, recordings), "--steps", 5, "--hidden", 8, "--seed", seed)
        codec = Codec.from_pretrained(model)
        codec.encode_file(recordings / "a.wav", tmp_path / f"{seed}.tok")
        ids.append(codec.coder.newest.tables_id)
    codec.model.check()
    assert len(set(ids)) == 3 and codec.model.tables[0] == TABLES
    facts = run("info", model, "--json").json
    assert (facts["entropy_coding"], facts["entropy_tables"]) == (True, 3)
    for seed in range(3):
        payload = (tmp_path / f"{seed}.tok").read_bytes()
        assert ids[seed] in payload  # it is entropy coded
        tokens.append(read_tokens(tmp_path / f"{seed}.tok", coder=codec.coder)[0])
        np.testing.assert_array_equal(tokens[seed], tokens[0])
    run("decode", tmp_path / "0.tok", tmp_path / "0.wav", "-m", model)
    run("decode", tmp_path / "2.tok", tmp_path / "2.wav", "-m", model)
    assert (tmp_path / "0.wav").read_bytes() == (tmp_path / "2.wav").read_bytes()


def test_the_same_tables_again_become_the_newest(model, recordings, monkeypatch):
    for seed in (0, 1):
        add_tables(model, recordings, hidden=8, steps=5, seed=seed)
    first = (model / TABLES).read_bytes()
    monkeypatch.setattr("vpcodec.training.entropy.fit_tables", lambda *args, **options: first)
    add_tables(model, recordings)
    folder = read_folder(model)
    folder.check()
    assert len(folder.tables) == 2 and folder.tables[-1] == TABLES
    assert len({folder.files[name] for name in folder.tables}) == 2


def test_tables_with_the_id_of_others_are_refused(model, recordings, monkeypatch):
    from vpcodec.training import entropy

    add_tables(model, recordings, hidden=8, steps=5)
    before = read_folder(model)
    same_id = before.files[TABLES][:4] + "0" * 60
    digest = SimpleNamespace(hexdigest=lambda: same_id)
    monkeypatch.setattr(entropy, "hashlib", SimpleNamespace(sha256=lambda data: digest))
    with pytest.raises(TableError, match="use another seed"):
        add_tables(model, recordings, hidden=8, steps=5, seed=1)
    assert read_folder(model) == before


def test_tables_that_the_model_does_not_have_are_told(model, recordings, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    add_tables(model, recordings, hidden=8, steps=5)
    codec = Codec.from_pretrained(model)
    codec.encode_file(recordings / "a.wav", tmp_path / "a.tok")
    add_tables(other, recordings, hidden=8, steps=5, seed=1)
    error = refuse("decode", tmp_path / "a.tok", tmp_path / "b.wav", "-m", other)
    assert "other entropy tables" in error and codec.coder.newest.tables_id.hex() in error
    assert not (tmp_path / "b.wav").exists()


def test_the_command_says_what_is_wrong(model, recordings, debug_image_model, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no audio files" in refuse("models", "tables", model, tmp_path / "empty")
    assert "no images" in refuse("models", "tables", debug_image_model, recordings)
    assert "absent" in refuse("models", "tables", tmp_path / "absent", recordings)


def test_the_command_makes_files_of_images_shorter(debug_image_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(debug_image_model, "model")
    Path("pictures").mkdir()
    y, x, c = np.mgrid[:130, :250, :4]
    pixels = (128 + 90 * np.sin((x + 2 * c) / 17) * np.cos(y / (11 + 3 * c))).astype(np.uint8)
    save_image("pictures/a.png", pixels[..., :3])
    save_image("pictures/b.png", pixels)  # with alpha, which is a channel of its own
    run("encode", "pictures/b.png", "raw.tok", "-m", "model")
    facts = run(
        *("models", "tables", "model", "pictures"), "--steps", 100, "--hidden", 16, "--json"
    ).json
    assert facts["bits_per_token"] < 0.9 * facts["nominal_bits_per_token"]
    run("encode", "pictures/b.png", "coded.tok", "-m", "model")
    assert Path("coded.tok").stat().st_size < 0.9 * Path("raw.tok").stat().st_size
    monkeypatch.setattr("vpcodec.codec.image.BLOCK_TOKENS", 64)
    run("encode", "pictures/b.png", "blocks.tok", "-m", "model")
    assert verify("blocks.tok").blocks == 9  # two rows of 32 each
    for name in ("raw", "coded", "blocks"):
        run("decode", f"{name}.tok", f"{name}.png", "-m", "model")
    whole = Path("raw.png").read_bytes()
    assert whole == Path("coded.png").read_bytes() == Path("blocks.png").read_bytes()


def test_damaged_tables_are_refused(model, recordings, tmp_path):
    add_tables(model, recordings, hidden=8, steps=5)
    data = bytearray((model / TABLES).read_bytes())
    data[-1] ^= 1
    (model / TABLES).write_bytes(data)
    error = refuse("encode", recordings / "a.wav", tmp_path / "a.tok", "-m", model)
    assert "SHA-256" in error
