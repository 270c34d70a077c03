"""The JavaScript library of web/, in Node, against the Python package."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from javascript import TESTS, compare_mutated_files, compare_mutated_packets, node, tool
from paths import RESOURCES, ROOT, SHARED
from sounds import sound

from vpcodec import Codec, __version__, read_tokens
from vpcodec.hub import bundled_folders
from vpcodec.media.audio import load, resample, save
from vpcodec.tokenfile import AudioHeader, write_tokens

pytestmark = pytest.mark.slow

SPEECH_MODELS = ("speech-3k", "speech-6k", "speech-vp-16384", "speech-1k")
MUTATED_FILES, MUTATED_PACKETS = 400, 2_000  # benchmarks/web.py does more of them


@pytest.fixture(scope="module", autouse=True)
def there_is_node() -> None:
    found = shutil.which("node") and node("--version")
    if not found or int(found[1:].split(".")[0]) < 20:
        pytest.skip("needs Node 20 or later, from nodejs.org or a package manager")


def test_the_tests_of_the_library_pass():
    node("--test", *sorted(TESTS.glob("*.test.js")))


def test_mutated_files_are_refused_for_the_reasons_of_python(tmp_path):
    refused, faults = compare_mutated_files(MUTATED_FILES, tmp_path)
    assert faults == []
    assert refused > 0.9 * MUTATED_FILES


def test_mutated_packets_are_refused_for_the_reasons_of_python(tmp_path):
    refused, faults = compare_mutated_packets(MUTATED_PACKETS, tmp_path)
    assert faults == []
    assert refused > 0.9 * MUTATED_PACKETS


@pytest.mark.parametrize("coded", [True, False])
def test_python_reads_what_javascript_writes_and_would_write_the_same(tmp_path, coded):
    codec = Codec.from_pretrained("speech-3k")
    header = AudioHeader(
        model=codec.name,
        fingerprint=codec.space,
        sample_rate=16_000,
        original_rate=44_100,
        channels=2,
        n_samples=300_000,
        hop_length=96,
        codebook_size=codec.codebook_size,
        block_frames=500,
    )
    # Tokens that repeat are coded; random ones are not, as that would be longer.
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, codec.codebook_size, (2, header.n_frames))
    tokens[:, 200:900] = tokens[:, :1]
    coder = codec.coder if coded else None
    write_tokens(tmp_path / "python.tok", tokens, header, coder=coder)
    fields: dict[str, Any] = {
        "kind": "audio",
        "model": codec.name,
        "identity": [*codec.space],
        "sampleRate": 16_000,
        "originalRate": 44_100,
        "channels": 2,
        "nSamples": 300_000,
        "hopLength": 96,
        "codebookSize": codec.codebook_size,
        "blockFrames": 500,
    }
    (tmp_path / "file.json").write_text(
        json.dumps({"fields": fields, "tokens": tokens.tolist(), "coder": coded})
    )
    tool("write", tmp_path / "file.json", tmp_path / "javascript.tok")
    written = (tmp_path / "javascript.tok").read_bytes()
    assert written == (tmp_path / "python.tok").read_bytes()
    assert np.array_equal(read_tokens(tmp_path / "javascript.tok")[0], tokens)


@pytest.fixture
def clips(tmp_path, speech) -> list[Path]:
    """Ten clips of 1 to 2 s, 16 kHz, 16 bits: speech, real if there is any, soft, noisy, stereo."""
    real = sorted((SHARED / "data" / "speech_dev").glob("*.flac"))[::9][:4]
    signals = [resample(*load(path), 16_000)[:, 16_000:40_000] for path in real]
    rng = np.random.default_rng(0)
    for i in range(10 - len(signals)):
        part = speech[:, 7_000 * i : 7_000 * i + 16_000 + 1_500 * i]
        part = part * (0.1, 1, 1.5)[i % 3] + rng.normal(0, (0, 0.01)[i % 2], part.shape)
        signals.append(np.concatenate([part, 0.5 * part[:, ::-1]]) if i == 1 else part)
    paths = []
    for i, signal in enumerate(signals):
        paths.append(tmp_path / f"{i}.wav")
        save(paths[-1], signal.clip(-1, 1).astype(np.float32), 16_000)
    return paths


@pytest.mark.parametrize("name", SPEECH_MODELS)
def test_ten_clips_become_the_files_that_python_makes(tmp_path, clips, name):
    """All tokens are equal, and so are the bytes, in both directions."""
    codec = Codec.from_pretrained(name, threads=1)
    clips = clips if name == "speech-3k" else clips[::3]
    pairs = [[path, path.with_suffix(".tok")] for path in clips]
    tool("encode", name, *sum(pairs, []))
    for path, found in pairs:
        codec.encode_file(path, tmp_path / "python.tok")
        tokens, _ = read_tokens(tmp_path / "python.tok")
        assert np.array_equal(read_tokens(found)[0], tokens)
        assert found.read_bytes() == (tmp_path / "python.tok").read_bytes()
    last = pairs[-1][1]
    tool("decode", name, last, tmp_path / "decoded.wav")
    codec.decode_file(last, tmp_path / "python.wav")
    decoded, rate = load(tmp_path / "decoded.wav")
    expected, expected_rate = load(tmp_path / "python.wav")
    assert decoded.shape == expected.shape and rate == expected_rate
    assert np.abs(decoded - expected).max() < 2e-4


def test_other_rates_are_restored(tmp_path, speech_wav):
    """The resamplers differ, so the tokens may; lengths and rates may not, nor what is heard."""
    with wave.open(str(speech_wav)) as file:
        n_samples, rate = file.getnframes(), file.getframerate()
    tool("encode", "speech-1k", speech_wav, tmp_path / "a.tok")
    _, header = read_tokens(tmp_path / "a.tok")
    assert isinstance(header, AudioHeader)
    assert (header.n_samples, header.original_rate) == (n_samples, rate)
    codec = Codec.from_pretrained("speech-1k", threads=1)
    found, expected = read_tokens(tmp_path / "a.tok")[0], codec.encode(*load(speech_wav))
    assert (found == expected).mean() > 0.5
    tool("decode", "speech-1k", tmp_path / "a.tok", tmp_path / "a.wav")
    codec.decode_file(tmp_path / "a.tok", tmp_path / "python.wav")
    (heard, heard_rate), (same, _) = load(tmp_path / "a.wav"), load(tmp_path / "python.wav")
    assert heard.shape == (1, n_samples) and heard_rate == rate
    assert 10 * np.log10((same**2).sum() / ((heard - same) ** 2).sum()) > 40


def test_compressed_files_say_their_rate(tmp_path):
    kinds = [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]
    cases = {
        (format, coding, rate): tmp_path / f"{coding}-{rate}"
        for format, coding in kinds
        for rate in (16_000, 44_100, 48_000)
        if coding != "OPUS" or rate != 44_100
    }
    for (format, coding, rate), path in cases.items():
        path.write_bytes(sound(format, rate=rate, subtype=coding))
    found = json.loads(tool("rates", *cases.values(), RESOURCES / "golden" / "golden.json"))
    expected = [48_000 if coding == "OPUS" else rate for _, coding, rate in cases]
    assert found == [*expected, None]


def test_images_become_the_files_that_python_makes(tmp_path, picture):
    """Of all components, smaller than a window, and in tiles."""
    shapes = [(40, 61, 3), (33, 20, 4), (16, 24, 1), (9, 9, 2), (700, 90, 3)]
    codec = Codec.from_pretrained("image-fsp", threads=1)
    encoded, decoded = [], []
    for i, (height, width, components) in enumerate(shapes):
        pixels, raw, found = picture(*shapes[i]), tmp_path / f"{i}.raw", tmp_path / f"{i}.tok"
        raw.write_bytes(pixels.tobytes())
        encoded += [raw, height, width, components, found]
        decoded += [found, tmp_path / f"{i}.decoded"]
    tool("encode-image", codec.name, *encoded)
    tool("decode-image", codec.name, *decoded)
    for i, shape in enumerate(shapes):
        header, tokens = codec.header(*shape), codec.encode(picture(*shape))
        flat = tokens.reshape(header.channels, -1)
        write_tokens(tmp_path / "python.tok", flat, header, coder=codec.coder)
        assert (tmp_path / f"{i}.tok").read_bytes() == (tmp_path / "python.tok").read_bytes()
        found = np.frombuffer((tmp_path / f"{i}.decoded").read_bytes(), np.uint8).reshape(shape)
        expected = codec.decode(tokens, shape[:2], shape[2])
        assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.fixture
def runtime(tmp_path) -> None:
    """The npm package onnxruntime-web in tmp_path, here of the files in web/vendor."""
    package = tmp_path / "node_modules" / "onnxruntime-web"
    shutil.copytree(ROOT / "web" / "vendor", package)
    exports = dict.fromkeys((".", "./wasm"), "./ort.wasm.min.mjs")
    (package / "package.json").write_text(json.dumps({"type": "module", "exports": exports}))


def test_the_example_of_the_library_does_what_it_says(tmp_path, runtime):
    for folder in ("web", "checkpoints"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    [code] = re.findall(r"```js\n(.*?)```", (ROOT / "docs" / "web.md").read_text(), re.DOTALL)
    (tmp_path / "example.mjs").write_text(code)
    node("example.mjs", cwd=tmp_path)
    tokens, header = read_tokens(tmp_path / "out.tok")
    assert (header.n_samples, header.original_rate) == (48_000, 48_000)
    silence = np.zeros((1, 16_000), np.float32)
    assert np.array_equal(tokens, Codec.from_pretrained("speech-3k", threads=1).encode(silence))


def test_example_plain_onnxruntime_in_node(tmp_path, speech, runtime):
    """Without vpcodec."""
    script = tmp_path / "plain.mjs"
    script.write_text((ROOT / "examples" / "plain_onnxruntime.mjs").read_text())
    speech.tofile(tmp_path / "in.f32")
    node(script, ROOT / "checkpoints/speech-3k", "in.f32", "out.f32", cwd=tmp_path)
    decoded = np.fromfile(tmp_path / "out.f32", np.float32)
    codec = Codec.from_pretrained("speech-3k", threads=1)
    expected = codec.decode(codec.encode(speech), speech.shape[1])[0]
    assert decoded.shape == expected.shape
    assert np.abs(decoded - expected).max() < 1e-4


def test_the_runtime_is_the_one_that_its_hashes_name():
    vendor = ROOT / "web" / "vendor"
    sums = [line.split() for line in (vendor / "SHA256SUMS").read_text().splitlines()]
    scripts = {path.name for path in vendor.iterdir() if path.suffix in (".mjs", ".wasm")}
    assert {name for _, name in sums} == scripts
    for digest, name in sums:
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == digest
    assert sum(path.stat().st_size for path in vendor.iterdir()) < 15e6


def test_the_npm_package_has_the_version_of_the_python_package():
    assert json.loads((ROOT / "web" / "package.json").read_text())["version"] == __version__


def test_the_page_offers_the_models_that_ship():
    listed = json.loads((ROOT / "web" / "models.json").read_text())
    assert {entry["name"] for entry in listed} == set(bundled_folders())
    for entry in listed:
        config = json.loads((bundled_folders()[entry["name"]] / "config.json").read_text())
        assert entry["kind"] == config["kind"]
