"""The models that ship: whole, small, described, and as good as the README says."""

from __future__ import annotations

import importlib.util
import io
import json
import sys

import numpy as np
import pytest
from paths import RESOURCES, ROOT

from vpcodec import Codec, read_tokens
from vpcodec.hub import DEFAULT_MODELS, bundled_folders
from vpcodec.media.audio import find_audio, load
from vpcodec.media.image import find_images, load_image
from vpcodec.metrics.image import psnr, ssim
from vpcodec.model_folder import read_folder

sys.path.insert(0, str(RESOURCES))

import make_shipped_golden as golden

pytestmark = pytest.mark.slow

MAX_BYTES = 12 * 2**20
NAMES = sorted(bundled_folders())


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_whole_small_and_described(name):
    folder = read_folder(bundled_folders()[name])
    folder.check()
    assert folder.config.name == name
    assert folder.config.description and folder.config.license != "unknown"
    assert sum(path.stat().st_size for path in folder.path.iterdir()) <= MAX_BYTES
    card = (folder.path / "README.md").read_text()
    for part in (f"# {name}", "license: ", "## Training", "## Quality", "## Limits", "CC BY"):
        assert part in card


@pytest.mark.parametrize("backend", ["onnx", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_files_stay_what_they_were(name, backend):
    """Files that users have depend on it; see resources/make_shipped_golden.py."""
    if backend == "torch":
        pytest.importorskip("torch", reason="needs the train extra")
    expected = json.loads((RESOURCES / "shipped_golden.json").read_text())[name]
    codec = Codec.from_pretrained(name, backend=backend)
    found = golden.found(codec)
    assert found["tokens"] == expected["tokens"]
    assert found["file"] == expected["file"]


@pytest.mark.parametrize("kind, name", DEFAULT_MODELS.items())
def test_the_default_of_a_kind_is_there(kind, name):
    assert read_folder(bundled_folders()[name]).config.kind == kind


def test_the_image_model_keeps_a_picture():
    """Smooth colours, an edge and a texture; in two sizes that are no multiples of anything."""
    codec = Codec.from_pretrained("image-fsp")
    assert 15_000 <= codec.codebook_size <= 17_000 and codec.hop_length == 8
    for height, width in ((100, 141), (33, 65)):
        y, x = np.mgrid[:height, :width] / max(height, width)
        picture = np.stack([x, y, (x + y) / 2], -1)
        picture[height // 2 :, width // 2 :] *= 0.3
        picture[: height // 3] += 0.05 * np.sin(40 * x[: height // 3, :, None])
        pixels = (picture.clip(0, 1) * 255).astype(np.uint8)
        decoded = codec.decode(codec.encode(pixels), (height, width))
        assert psnr(pixels, decoded) > 27
        assert ssim(pixels, decoded) > 0.8


def test_the_image_model_keeps_real_pictures(shared_data):
    """PSNR of at least 24 dB on average, over every third picture that it was not trained on."""
    codec = Codec.from_pretrained("image-fsp")
    folder = shared_data / "images_dev"
    values = []
    for path in find_images(folder)[::3]:
        pixels = load_image(folder / path)
        decoded = codec.decode(codec.encode(pixels), pixels.shape[:2], pixels.shape[2])
        values.append(psnr(pixels, decoded))
    assert len(values) >= 50
    assert np.mean(values) >= 24


def test_the_files_of_the_image_model_are_short(shared_data):
    """Container included, with 256 tokens in each."""
    codec = Codec.from_pretrained("image-fsp", threads=1)
    folder, shares = shared_data / "images_dev", []
    for path in find_images(folder)[::8]:
        pixels = load_image(folder / path)
        file = io.BytesIO()
        stats = codec.encode_file(folder / path, file)
        shares.append(stats.bits_per_pixel / codec.bits_per_pixel)
        tokens, _ = read_tokens(io.BytesIO(file.getvalue()))
        assert (tokens.ravel() == codec.encode(pixels).ravel()).all()
    assert len(shares) >= 15 and np.mean(shares) < 0.92


SPEECH = {  # model -> PESQ-WB, STOI, and share of its nominal bits on disk
    "speech-3k": (2.0, 0.87, 0.82),
    "speech-6k": (2.5, 0.9, 0.9),
    "speech-vp-16384": (1.6, 0.84, 0.9),
    "speech-1k": (1.25, 0.8, 0.8),
}


@pytest.mark.parametrize("name", SPEECH)
def test_the_speech_models_keep_real_speech(name, shared_data, tmp_path):
    """Clips of speakers that no model was trained on, from file to file: the rate of all of them,
    the quality of every third."""
    pytest.importorskip("pesq", reason="needs the score extra")
    from vpcodec.metrics.speech import pesq_wb, stoi

    codec = Codec.from_pretrained(name, threads=1)
    rows, n_bytes, seconds = [], 0, 0.0
    for number, path in enumerate(find_audio(shared_data / "speech_dev")):
        path = shared_data / "speech_dev" / path
        stats = codec.encode_file(path, tmp_path / "a.tok")
        n_bytes, seconds = n_bytes + stats.n_bytes, seconds + stats.seconds
        if number % 3:
            continue
        codec.decode_file(tmp_path / "a.tok", tmp_path / "a.wav", subtype="FLOAT")
        (original, rate), (decoded, _) = load(path), load(tmp_path / "a.wav")
        rows.append([f(original[0], decoded[0], rate) for f in (pesq_wb, stoi)])
    least_pesq, least_stoi, most_bits = SPEECH[name]
    assert len(rows) >= 15
    assert np.mean(rows, 0)[0] >= least_pesq
    assert np.mean(rows, 0)[1] >= least_stoi
    assert 8 * n_bytes / seconds <= most_bits * codec.bitrate


def test_white_noise_comes_out_as_noise_and_not_as_lines():
    """Without noise in its decoder the model had lines 16 dB above what is between them, one at
    each multiple of the frame rate."""
    spec = importlib.util.spec_from_file_location("sound", ROOT / "benchmarks" / "sound.py")
    sound = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sound)
    codec = Codec.from_pretrained("speech-3k", threads=1)
    for tilt in (0.0, 0.9):
        assert sound.line_to_floor(codec, tilt=tilt) < 9
