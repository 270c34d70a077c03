"""A codec in other processes: copied, pickled, forked, and in the workers of data loaders."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import ENOUGH

from vpcodec import AudioCodec, Codec, ImageCodec
from vpcodec.hub import bundled_folders
from vpcodec.model_folder import ModelError

pytestmark = pytest.mark.slow

SHORT = slice(8_000, 24_000)  # 1 s of the speech


@pytest.fixture(scope="module")
def codec() -> AudioCodec:
    return Codec.from_pretrained("speech-3k", threads=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder that may be changed."""
    return Path(shutil.copytree(bundled_folders()["speech-3k"], tmp_path / "model"))


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("way", ["pickle", "copy", "deepcopy"])
def test_a_copy_does_what_the_codec_does(speech: np.ndarray, way: str, used: bool) -> None:
    codec = Codec.from_pretrained("speech-3k", threads=1)
    if used:
        codec.decode(codec.encode(speech[:, SHORT]))
    ways = {"copy": copy.copy, "deepcopy": copy.deepcopy}
    other = ways.get(way, lambda x: pickle.loads(pickle.dumps(x)))(codec)
    tokens = codec.encode(speech[:, SHORT])
    assert type(other) is AudioCodec
    assert repr(other) == repr(codec)
    assert other.backend.threads == 1
    assert np.array_equal(other.encode(speech[:, SHORT]), tokens)
    assert np.array_equal(other.decode(tokens), codec.decode(tokens))


def test_a_pickle_holds_a_path_and_no_weights(codec: AudioCodec, speech: np.ndarray) -> None:
    codec.encode(speech[:, SHORT])
    assert len(pickle.dumps(codec)) < 1_000


def test_a_copy_of_torch_does_what_the_codec_does(debug_model: Path, one_thread: None) -> None:
    codec = Codec.from_pretrained(debug_model, backend="torch", device="cpu")
    other = pickle.loads(pickle.dumps(codec))
    assert other.backend.name == "torch"
    assert other.backend.model is not codec.backend.model
    tokens = np.arange(30)[None] % codec.codebook_size
    assert np.array_equal(other.decode(tokens), codec.decode(tokens))


def test_a_model_in_memory_is_refused(debug_model: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the train extra")
    from vpcodec.backends.torch import ModuleBackend, load_model
    from vpcodec.model_folder import read_folder

    folder = read_folder(debug_model)
    codec = AudioCodec(folder, ModuleBackend(load_model(folder), torch.device("cpu")))
    with pytest.raises(TypeError, match="in memory"):
        pickle.dumps(codec)


def test_images(debug_image_model: Path, picture) -> None:
    codec = Codec.from_pretrained(debug_image_model)
    other = pickle.loads(pickle.dumps(codec))
    assert isinstance(other, ImageCodec)
    pixels = picture(40, 50)
    assert np.array_equal(other.encode(pixels), codec.encode(pixels))


def test_a_relative_path_is_found_from_elsewhere(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder.parent)
    data = pickle.dumps(Codec.from_pretrained("model"))
    monkeypatch.chdir("/")
    assert pickle.loads(data).model.path == folder


def test_a_folder_that_vanished_is_one_clear_error(folder: Path, tmp_path: Path) -> None:
    codec = Codec.from_pretrained(folder)
    data = pickle.dumps(codec)
    folder.rename(tmp_path / "elsewhere")
    for copied in (lambda: pickle.loads(data), lambda: copy.deepcopy(codec)):
        with pytest.raises(ModelError, match="is not there") as caught:
            copied()
        assert str(folder) in str(caught.value)
    with pytest.raises(ModelError, match="encoder.onnx: No such file"):
        codec.encode(np.zeros(960, np.float32))


def test_another_model_in_its_place_is_refused(folder: Path) -> None:
    data = pickle.dumps(Codec.from_pretrained(folder))
    shutil.rmtree(folder)
    shutil.copytree(bundled_folders()["speech-1k"], folder)
    with pytest.raises(ModelError, match="another model"):
        pickle.loads(data)


def test_spawned_workers(codec: AudioCodec, speech: np.ndarray) -> None:
    codec.encode(speech[:, SHORT])
    context = multiprocessing.get_context("spawn")
    parts = [speech[:, start : start + 8_000] for start in (0, 8_000, 16_000)]
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        found = list(pool.map(codec.encode, parts))
    for part, tokens in zip(parts, found, strict=True):
        assert np.array_equal(tokens, codec.encode(part))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize("use", [True, False])
def test_a_forked_process_codes_and_ends(use: bool) -> None:
    """As Python ends, which would tear down the parent's sessions."""
    code = f"""
import os, signal, sys
import numpy as np
from vpcodec import Codec
codec = Codec.from_pretrained("speech-3k", threads=4)
x = np.zeros(16_000, np.float32)
tokens = codec.encode(x)
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
signal.alarm(60)
sys.exit({use} and not np.array_equal(codec.encode(x), tokens))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=ENOUGH).returncode == 0


class Coded:
    """A data set whose items are encoded by whoever asks for them."""

    def __init__(self, codec: AudioCodec, samples: np.ndarray) -> None:
        self.codec, self.samples = codec, samples

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> np.ndarray:
        return self.codec.encode(self.samples[:, 8_000 * index :][:, :8_000])


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_workers_of_a_data_loader(codec: AudioCodec, speech: np.ndarray, start: str) -> None:
    data = pytest.importorskip("torch.utils.data", reason="needs the train extra")
    items = Coded(codec, speech)
    expected = [items[i] for i in range(len(items))]  # the parent has its sessions
    loader = data.DataLoader(
        items, batch_size=None, num_workers=1, multiprocessing_context=start, timeout=ENOUGH
    )
    for tokens, wanted in zip(loader, expected, strict=True):
        assert np.array_equal(tokens, wanted)
