"""What the documentation shows works: its Python blocks, and the scripts in examples/."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from paths import ROOT

from vpcodec import Codec, read_tokens
from vpcodec.media.audio import load, resample, save
from vpcodec.media.image import save_image

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"
PAGES = (
    *("README.md", "docs/images.md", "docs/language-models.md", "docs/packets.md"),
    "docs/streaming.md",
)


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    """A command, with this copy of the package; what it prints."""
    paths = {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=os.environ | paths | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speech_wav: Path, picture) -> None:
    """The files that the blocks name, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.wav").write_bytes(speech_wav.read_bytes())
    save_image(tmp_path / "photo.jpg", picture(40, 56))


@pytest.mark.parametrize(
    ("page", "block"), [(page, block) for page in PAGES for block in python_blocks(page)]
)
def test_a_python_block_runs(inputs: None, page: str, block: str) -> None:
    exec(compile(block, page, "exec"), {})


def test_the_blocks_of_the_readme_give_what_they_say(inputs: None) -> None:
    sound, image = python_blocks("README.md")
    names: dict[str, np.ndarray] = {}
    exec(sound, names)
    assert names["tokens"].dtype == np.int64 and names["tokens"].shape[0] == 1
    pieces = np.concatenate([names["first"], names["rest"]], 1)
    assert pieces.shape[1] == -(-1000 // 96)
    names = {}
    exec(image, names)
    assert names["tokens"].shape == (1, 5, 7)
    assert names["pixels"].shape == (40, 56, 3) and names["pixels"].dtype == np.uint8


@pytest.mark.parametrize("options", [(), ("--redundancy", "1")])
def test_example_call(tmp_path: Path, speech_wav: Path, options: tuple[str, ...]) -> None:
    said = run(
        *(sys.executable, EXAMPLES / "call.py", speech_wav, tmp_path / "out.wav"),
        *("--loss", "0.05", *options),
    )
    heard, lost = map(int, re.findall(r"(\d+) packets heard, (\d+) lost", said)[0])
    samples, rate = load(speech_wav)
    sent = -(-samples.shape[1] // round(0.018 * rate))
    assert 0 <= sent - (heard + lost) <= 5  # those at the end may be lost without a trace
    # On a busy machine packets may also come too late.
    assert heard > 0.7 * sent
    received, received_rate = load(tmp_path / "out.wav")
    assert received_rate == rate
    assert received.shape[1] == pytest.approx(samples.shape[1], abs=0.2 * rate)


def test_example_encode_folder(tmp_path: Path, speech_wav: Path) -> None:
    recordings = tmp_path / "recordings"
    (recordings / "sub").mkdir(parents=True)
    (recordings / "sub" / "a.wav").write_bytes(speech_wav.read_bytes())
    run(sys.executable, EXAMPLES / "encode_folder.py", recordings, tmp_path / "tokens")
    tokens = np.load(tmp_path / "tokens" / "sub" / "a.npy")
    assert np.array_equal(tokens, Codec.from_pretrained("speech-3k").encode(*load(speech_wav)))


def test_example_stream(tmp_path: Path, speech_wav: Path) -> None:
    printed = run(sys.executable, EXAMPLES / "stream.py", speech_wav, tmp_path / "out.wav")
    assert "18 ms" in printed and "as at once: True" in printed
    codec = Codec.from_pretrained("speech-3k")
    samples = resample(*load(speech_wav), codec.sample_rate)
    whole = codec.decode(codec.encode(samples), samples.shape[1])
    decoded, rate = load(tmp_path / "out.wav")
    assert rate == codec.sample_rate
    assert np.abs(decoded - whole).max() < 1e-4  # 16 bits


def test_example_plain_onnxruntime(tmp_path: Path, speech: np.ndarray) -> None:
    save(tmp_path / "in.wav", speech, 16_000)
    script = EXAMPLES / "plain_onnxruntime.py"
    assert "vpcodec" not in re.sub(r'""".*?"""', "", script.read_text(), count=1, flags=re.S)
    run(sys.executable, script, ROOT / "checkpoints/speech-3k", "in.wav", "out.wav", cwd=tmp_path)
    codec = Codec.from_pretrained("speech-3k")
    samples, _ = load(tmp_path / "in.wav")
    whole = codec.decode(codec.encode(samples), samples.shape[1])
    decoded, _ = load(tmp_path / "out.wav")
    assert decoded.shape == whole.shape
    assert np.abs(decoded - whole).max() < 2e-4  # 16 bits


def test_fixed_shapes(tmp_path: Path, speech: np.ndarray) -> None:
    """The commands of docs/onnx.md give a graph of 24 frames with the same tokens."""
    pytest.importorskip("onnx", reason="needs the train extra")
    commands = re.findall(
        r"^python (-m onnxruntime.*)$", (ROOT / "docs" / "onnx.md").read_text(), re.MULTILINE
    )
    model = ROOT / "checkpoints" / "speech-3k"
    for name in ("encoder.onnx", "model.safetensors"):
        shutil.copy(model / name, tmp_path)
    for command in commands:
        run(sys.executable, *shlex.split(command), cwd=tmp_path)
    fixed = onnxruntime.InferenceSession(tmp_path / "encoder-24.onnx")
    shapes = {node.name: node.shape for node in fixed.get_inputs()}
    assert shapes["samples"] == [1, 2304]
    states = {name: np.zeros(x, np.float32) for name, x in shapes.items() if name != "samples"}
    tokens, *_ = fixed.run(None, {"samples": speech[:, :2304]} | states)
    expected = Codec.from_pretrained("speech-3k").encode(speech)[:, :24]
    assert np.array_equal(tokens, expected)


def test_example_train_on_a_folder(tmp_path: Path, speech_wav: Path) -> None:
    for package in ("torch", "torchaudio", "accelerate", "tensorboard", "onnxscript"):
        pytest.importorskip(package, reason="needs the train extra")
    recordings, model = tmp_path / "recordings", tmp_path / "model"
    recordings.mkdir()
    (recordings / "a.wav").write_bytes(speech_wav.read_bytes())
    run(
        EXAMPLES / "train_on_a_folder.sh",
        recordings,
        model,
        ROOT / "recipes" / "debug.yaml",
        "train.steps=2",
        "train.device=cpu",
        "discriminator.size=none",
        cwd=tmp_path,
        TABLES_OPTIONS="--steps 5 --hidden 8",
    )
    codec = Codec.from_pretrained(model)
    tokens, header = read_tokens(model / "example.tok", coder=codec.coder)
    assert np.array_equal(tokens, codec.encode(*load(speech_wav)))
    decoded, rate = load(model / "example.wav")
    assert (decoded.shape[1], rate) == (header.n_samples, header.original_rate)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/index.md"])
def test_the_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]*)\)", text)]
    local = [link for link in links if link and ":" not in link]
    missing = [link for link in local if not ((ROOT / page).parent / link).exists()]
    named = re.findall(r"`((?:vpcodec|docs|recipes|tests|checkpoints|examples)/[\w./-]*)", text)
    missing += [path for path in named if not (ROOT / path).exists()]
    assert missing == []


def test_documents_name_no_data_that_a_reader_cannot_have() -> None:
    pages = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
    pages += [str(p.relative_to(ROOT)) for p in ROOT.glob("checkpoints/*/README.md")]
    pages += [str(p.relative_to(ROOT)) for p in ROOT.glob("recipes/*.yaml")]
    pages.remove("docs/figures.md")  # which says what lies there
    assert [page for page in pages if "shared/data" in (ROOT / page).read_text()] == []
