"""The command line as a user meets it: results, messages, exit codes, nothing left behind."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest
import soundfile as sf
import typer
from helpers import ENOUGH, MODULE, changed_tok, flipped, header_only, refuse, run, tree
from paths import SPEECH

import vpcodec
from vpcodec import Codec, read_tokens
from vpcodec.cli import common, modalities
from vpcodec.codec import FileStats
from vpcodec.hub import DEFAULT_MODEL, bundled_folders, open_model
from vpcodec.media.audio import AudioError, load, save
from vpcodec.model_folder import WEIGHTS, fingerprint, write_folder_config
from vpcodec.tokenfile import AudioHeader, verify, write_tokens

COMMANDS = ["encode", "decode", "info", "models", "train", "export"]


@pytest.fixture(scope="module")
def tokens_of_speech(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The token file of speech.wav, one block."""
    path = tmp_path_factory.mktemp("tok") / "a.tok"
    speech = SPEECH
    Codec.from_pretrained().encode_file(speech, path)
    return path.read_bytes()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speech_wav: Path) -> Path:
    """An own working folder, in which a.wav is speech."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(speech_wav, "a.wav")
    return tmp_path


@pytest.fixture
def a_tok(folder: Path, tokens_of_speech: bytes) -> Path:
    """a.tok, the tokens of a.wav."""
    Path("a.tok").write_bytes(tokens_of_speech)
    return folder / "a.tok"


# ------------------------------------------------------------------------------------- round trips


def sound(path: str, rate: int, channels: int, seconds: float = 0.3) -> None:
    """Write a file of tones; its folder is made."""
    time = np.arange(round(rate * seconds)) / rate
    tones = [0.3 * np.sin(2 * np.pi * 220 * (i + 1) * time) for i in range(channels)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save(path, np.array(tones, np.float32), rate)


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (44_100, 2), (48_000, 6)])
def test_rate_channels_and_length_come_back(rate: int, channels: int) -> None:
    sound("in.wav", rate, channels)
    run("encode", "in.wav", "in.tok")
    run("decode", "in.tok", "back.wav")
    before, after = sf.info("in.wav"), sf.info("back.wav")
    for fact in ("samplerate", "channels", "frames", "format", "subtype"):
        assert getattr(after, fact) == getattr(before, fact)


@pytest.mark.parametrize("output", [["x.tok"], ["-o", "x.tok"], ["--output=sub/folder/x.tok"]])
def test_named_output_replaces(output: list[str]) -> None:
    Path("x.tok").write_text("old")
    result = run("encode", "a.wav", *output)
    assert verify(output[-1].rpartition("=")[2]).ok
    assert result.out == b""
    assert len(result.err.splitlines()) == 1 and "x.tok" in result.err


def test_derived_output_is_kept_unless_forced() -> None:
    Path("a.tok").write_text("old")
    result = run("encode", "a.wav")
    assert Path("a.tok").read_text() == "old"
    assert "a.tok: exists, kept (--force" in result.err
    run("encode", "a.wav", "--force")
    assert verify("a.tok").ok


def test_folder_keeps_its_tree() -> None:
    sound("in/b.flac", 16_000, 1)
    sound("in/deep/er/c.ogg", 44_100, 2)
    sound("in/.hidden.wav", 16_000, 1)
    Path("in/notes.txt").write_text("no audio")
    run("encode", "in", "out")
    assert tree("out") == {"b.tok", "deep", "deep/er", "deep/er/c.tok"}

    Path("out/b.tok").unlink()
    document = run("encode", "in", "out", "--json").json
    assert [row["target"] for row in document["results"]] == ["out/b.tok"]
    assert document["kept"] == ["out/deep/er/c.tok"]
    assert len(run("encode", "in", "out", "--json", "--force").json["results"]) == 2

    run("decode", "out", "back/", "--suffix", "flac")
    assert tree("back") == {"b.flac", "deep", "deep/er", "deep/er/c.flac"}
    assert sf.info("back/deep/er/c.flac").samplerate == 44_100


def test_results_stand_beside_their_inputs_without_an_output() -> None:
    sound("in/deep/b.wav", 16_000, 1)
    run("encode", "in", "a.wav")
    assert tree("in") == {"deep", "deep/b.wav", "deep/b.tok"}
    assert verify("a.tok").ok


def test_several_files_into_a_folder() -> None:
    sound("b.wav", 16_000, 1)
    sound("b.flac", 16_000, 1)
    run("encode", *sorted(Path().glob("*.wav")), "b.flac", "out/")
    assert tree("out") == {"a.tok", "b.wav.tok", "b.flac.tok"}
    run("decode", *sorted(Path("out").iterdir()), "-o", "back")
    assert tree("back") == {"a.wav", "b.wav.wav", "b.flac.wav"}


def test_jobs_and_threads_give_the_same(tokens_of_speech: bytes) -> None:
    for i in range(3):
        shutil.copy("a.wav", f"b{i}.wav")
    run("encode", "b0.wav", "b1.wav", "b2.wav", "out/", "--jobs", 2)
    single, _ = read_tokens(io.BytesIO(tokens_of_speech))
    for i in range(3):
        tokens, _ = read_tokens(f"out/b{i}.tok")
        assert np.mean(tokens != single) <= 2e-3
    run("decode", "out", "back", "-j", 2, "--threads", 1)
    assert {load(path)[0].shape for path in Path("back").iterdir()} == {load("a.wav")[0].shape}


def test_torch_backend(a_tok: Path) -> None:
    pytest.importorskip("torch", reason="needs the train extra")
    run("encode", "a.wav", "b.tok", "--backend", "torch", "--device", "cpu")
    assert np.mean(read_tokens("b.tok")[0] != read_tokens("a.tok")[0]) <= 2e-3


def test_model_folder(a_tok: Path) -> None:
    run("encode", "a.wav", "b.tok", "-m", bundled_folders()[DEFAULT_MODEL])
    assert Path("b.tok").read_bytes() == a_tok.read_bytes()


@pytest.mark.parametrize(("n", "rate"), [(0, 44_100), (1, 44_100), (0, 16_000)])
def test_nearly_no_audio(n: int, rate: int) -> None:
    save("n.wav", np.zeros((2, n)), rate)
    run("encode", "n.wav", "n.tok")
    facts = run("info", "n.tok", "--json").json
    assert (facts["samples"], facts["tokens"], facts["checksums"]) == (n, 2 * n, "ok")
    run("decode", "n.tok", "back.wav")
    samples, back = load("back.wav")
    assert (back, samples.shape) == (rate, (2, n))


# ------------------------------------------------------------------------------------------- pipes


def test_pipes_of_wav(a_tok: Path) -> None:
    data = Path("a.wav").read_bytes()
    piped = run("encode", "-", "-", stdin=data).out
    tokens, header = read_tokens(io.BytesIO(piped))
    assert np.array_equal(tokens, read_tokens("a.tok")[0])
    assert header.original_rate == 22_050
    for args, stdin in ((["-", "-"], piped), (["-"], piped), (["a.tok", "-"], b"")):
        wav = run("decode", *args, stdin=stdin).out
        samples, rate = load(io.BytesIO(wav))
        assert (samples.shape[1], rate) == (sf.info("a.wav").frames, 22_050)
    run("encode", "-", "piped.tok", stdin=data)
    assert np.array_equal(read_tokens("piped.tok")[0], tokens)


def test_pipes_of_raw_pcm() -> None:
    """The same samples as WAV and as headerless PCM."""
    sound("b.wav", 44_100, 2)
    samples, _ = load("b.wav")
    raw = samples.T.astype("<f4").tobytes()
    args = ["--raw", "f32", "--rate", 44_100, "--channels", 2]
    piped = run("encode", "-", "-", *args, stdin=raw).out
    run("encode", "b.wav", "b.tok")
    assert np.array_equal(read_tokens(io.BytesIO(piped))[0], read_tokens("b.tok")[0])

    run("decode", "b.tok", "b2.wav", "--subtype", "FLOAT")
    out = run("decode", "-", "-", "--raw", "f32", stdin=piped).out
    assert np.allclose(np.frombuffer(out, "<f4").reshape(-1, 2).T, load("b2.wav")[0], atol=1e-4)
    run("decode", "b.tok", "b.raw", "--raw", "s16")
    assert Path("b.raw").stat().st_size == samples.size * 2


def test_pipes_between_processes() -> None:
    """In a shell, where stdout and stdin are real and summaries must not mix with them."""
    me = " ".join(MODULE)
    command = f"{me} encode - - --json < a.wav | {me} decode - - --json > b.wav"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, timeout=ENOUGH, check=True
    )
    assert load("b.wav")[0].shape == load("a.wav")[0].shape
    assert done.stdout == "" and "Traceback" not in done.stderr


def test_tokens_flow_while_the_input_is_open() -> None:
    """A live source: the first block comes out before the source ends."""
    command = [*MODULE, "encode", "-", "-", "--raw", "s16"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        try:
            noise = np.random.default_rng(0).integers(-3000, 3000, 16_000 * 5, np.int16)
            process.stdin.write(noise.tobytes())
            process.stdin.flush()
            data = b""
            while len(data) < 500:  # more than a header
                assert select.select([process.stdout], [], [], ENOUGH)[0]
                data += (more := os.read(process.stdout.fileno(), 65_536))
                assert more
            assert process.poll() is None
            rest, err = process.communicate(timeout=ENOUGH)
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert read_tokens(io.BytesIO(data + rest))[0].shape == (1, -(-5 * 16_000 // 96))


def test_reader_that_leaves_early(a_tok: Path) -> None:
    """As in `vpcodec decode a.tok - | head -c 10`: nobody is left to tell."""
    command = [*MODULE, "decode", "a.tok", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(4) == b"RIFF"
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(ENOUGH) == 1
    assert err == b""


@pytest.fixture
def terminal() -> Iterator[TextIO]:
    master, slave = pty.openpty()
    with open(slave, "r+b", buffering=0) as file:
        yield io.TextIOWrapper(file, write_through=True)
    os.close(master)


@pytest.mark.parametrize(
    "args", [["encode", "-", "b.tok"], ["encode", "-"], ["decode", "-", "b.wav"], ["info", "-"]]
)
def test_terminal_as_input(args: list[str], terminal: TextIO) -> None:
    assert "stdin is a terminal" in refuse(*args, stdin=terminal)


@pytest.mark.parametrize("args", [["encode", "a.wav", "-"], ["decode", "a.tok", "-"]])
def test_terminal_as_output(args: list[str], a_tok: Path, terminal: TextIO) -> None:
    assert "stdout is a terminal" in refuse(*args, stdout=terminal)


@pytest.mark.parametrize(
    ("command", "err"),
    [
        ("encode - b.tok <&-", "vpcodec: stdin is closed\n"),
        ("decode - b.wav <&-", "vpcodec: stdin is closed\n"),
        ("encode a.wav - >&-", "vpcodec: a.wav: stdout is closed\n"),
        ("encode - - <a.wav 2>&-", ""),
    ],
)
def test_closed_streams(command: str, err: str) -> None:
    me = " ".join(MODULE)
    done = subprocess.run(f"{me} {command}", shell=True, capture_output=True, timeout=ENOUGH)
    assert (done.returncode, done.stderr.decode()) == (2 if err else 0, err)
    assert tree() == {"a.wav"}
    if not err:
        assert verify(io.BytesIO(done.stdout)).ok  # and no summary among the tokens


# -------------------------------------------------------------------------------------- interrupts

INTERRUPTIBLE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from vpcodec.cli import main
main()
"""


def long_tokens(path: str) -> None:
    """Write a token file of five minutes, of any tokens."""
    codec = Codec.from_pretrained()
    tokens = np.random.default_rng(0).integers(0, codec.codebook_size, (1, 50_000))
    header = AudioHeader(
        model=codec.name,
        fingerprint=codec.fingerprint,
        sample_rate=codec.sample_rate,
        original_rate=codec.sample_rate,
        channels=1,
        n_samples=tokens.size * codec.hop_length,
        hop_length=codec.hop_length,
        codebook_size=codec.codebook_size,
    )
    write_tokens(path, tokens, header)


PIPED = ["encode", "-", "out.tok", "--raw", "s16"]
FOLDER = ["encode", "long.wav", "long2.wav", "out/sub/", "-j", "2"]
DECODED = ["decode", "long.tok", "out.wav"]
INTERRUPTED = [
    (signal.SIGINT, args)
    for args in (PIPED, [*PIPED, "-j", "2"], ["encode", "long.wav", "out.tok"], FOLDER, DECODED)
]
INTERRUPTED += [(signal.SIGTERM, args) for args in (PIPED, FOLDER, DECODED)]
INTERRUPTED += [(signal.SIGHUP, args) for args in (PIPED, FOLDER)]


@pytest.mark.parametrize(("number", "args"), INTERRUPTED)
def test_interrupt_leaves_nothing(number: signal.Signals, args: list[str]) -> None:
    """A signal in the middle, the input being a pipe that stays open, or long files."""
    if "long.wav" in args:
        save("long.wav", np.zeros((1, 1200 * 16_000), np.float32), 16_000)
        shutil.copy("long.wav", "long2.wav")
    if "long.tok" in args:
        long_tokens("long.tok")
    stdin = subprocess.PIPE if "-" in args else subprocess.DEVNULL
    before = tree()
    command = [sys.executable, "-c", INTERRUPTIBLE, *args]
    with subprocess.Popen(command, stdin=stdin, stderr=subprocess.PIPE) as process:
        try:
            if process.stdin:
                process.stdin.write(bytes(3 * 32_000))
                process.stdin.flush()
            deadline = time.monotonic() + ENOUGH
            while not list(Path().rglob(".*.tmp")):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            if process.stdin:
                time.sleep(0.5)  # until it waits for more input
            process.send_signal(number)
            assert process.wait(20) == 128 + number
        finally:
            process.kill()
        err = process.stderr.read()
    assert err == b""
    assert tree() == before


# --------------------------------------------------------------------------------------- bad input


def damaged_wav(**fields: int) -> bytes:
    """A WAV of 100 samples whose header says otherwise."""
    said = {"channels": 1, "rate": 16_000, "size": 200} | fields
    align = 2 * said["channels"] % 2**16
    layout = said["channels"], said["rate"], said["rate"] * 2 % 2**32, align, 16
    head = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 236, b"WAVE", b"fmt ", 16, 1, *layout)
    return head + struct.pack("<4sI", b"data", said["size"]) + bytes(200)


def sound_bytes(format: str, value: float = 0.1) -> bytes:
    out = io.BytesIO()
    samples = np.linspace(0, 0.5, 30_000)
    samples[20_000] = value
    sf.write(out, samples, 16_000, format=format, subtype="FLOAT" if format == "WAV" else None)
    return out.getvalue()


HEADER = 27  # bytes before the coding id, of one block

SPOILT: dict[str, Callable[[bytes], bytes]] = {  # name -> made from a sound token file
    "text.wav": lambda tok: b"this is not audio " * 100,
    "text.mp3": lambda tok: b"this is not audio " * 100,
    "empty.wav": lambda tok: b"",
    "nan.wav": lambda tok: sound_bytes("WAV", np.nan),
    "inf.wav": lambda tok: sound_bytes("WAV", -np.inf),
    "cut.wav": lambda tok: sound_bytes("WAV")[:-1_000],
    "cut.flac": lambda tok: sound_bytes("FLAC")[:-1_000],
    "head.wav": lambda tok: sound_bytes("WAV")[:30],
    "channels.wav": lambda tok: damaged_wav(channels=65_535),
    "rate.wav": lambda tok: damaged_wav(rate=2**32 - 1),
    "rate0.wav": lambda tok: damaged_wav(rate=0),
    "slow.wav": lambda tok: damaged_wav(rate=1),
    "size.wav": lambda tok: damaged_wav(size=2**30),
    "text.tok": lambda tok: b"these are not tokens " * 100,
    "empty.tok": lambda tok: b"",
    "cut.tok": lambda tok: tok[:-10],
    "half.tok": lambda tok: tok[: len(tok) // 2],
    "head.tok": lambda tok: tok[: HEADER - 10],
    "flip-head.tok": lambda tok: flipped(tok, 30),
    "new.tok": lambda tok: flipped(tok, 9),
    "flip.tok": lambda tok: flipped(tok, HEADER + 500),
    "flip-end.tok": lambda tok: flipped(tok, len(tok) - 20),
    "more.tok": lambda tok: tok + b"more",
    "weights.tok": lambda tok: changed_tok(tok, fingerprint=bytes(range(16))),
    "codebook.tok": lambda tok: changed_tok(tok, codebook_size=1_000),
    "nobody.tok": lambda tok: changed_tok(tok, model="nobody", fingerprint=bytes(16)),
    "long.tok": lambda tok: header_only(tok, n_samples=5 * 10**10),
    "fast.tok": lambda tok: header_only(tok, original_rate=2**24, n_samples=None),
    "block.tok": lambda tok: tok[: HEADER + 1] + b"\xff\xff\xff\x07" + tok[HEADER + 3 :],
}


@pytest.mark.parametrize("output", [["out"], ["-o", "sub/out"]], ids=["", "in a new folder"])
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("missing.wav", "No such file"),
        ("text.wav", "not an audio file"),
        ("text.mp3", "not an audio file"),
        ("empty.wav", "empty"),
        ("nan.wav", "NaN or infinity at 1.25 s"),
        ("inf.wav", "NaN or infinity at 1.25 s"),
        ("cut.wav", "truncated"),
        ("cut.flac", "damaged after|truncated"),
        ("head.wav", "header is not complete"),
        ("channels.wav", "65535 channels|Too many channels"),
        ("rate.wav", "4294967295 Hz"),
        ("rate0.wav", "sample rate of 0 Hz"),
        ("slow.wav", "from 1 Hz"),
        ("size.wav", "truncated.*536,870,912"),
        ("a.tok", "not an audio file"),
        ("missing.tok", "No such file"),
        ("text.tok", "not a token file"),
        ("empty.tok", "the file is empty"),
        ("cut.tok", "block 0: the file ends inside it"),
        ("half.tok", "block 0: the file ends inside it"),
        ("head.tok", "the file ends inside its header"),
        ("flip-head.tok", "block 0: the checksum is wrong"),
        ("flip.tok", "block 0: the checksum is wrong"),
        ("flip-end.tok", "block 0: the checksum is wrong"),
        ("more.tok", "data after the end"),
        ("weights.tok", "made by other weights.*00010203.*--model FOLDER"),
        ("codebook.tok", "cannot decode"),
        ("nobody.tok", "model 'nobody'"),
        ("long.tok", "block 0: the file ends"),
        ("fast.tok", "16777216 Hz"),
        ("block.tok", "block 0: 16777215 bytes are too many"),
        ("a.wav", "not a token file"),
    ],
)
def test_bad_input(source: str, words: str, output: list[str], tokens_of_speech: bytes) -> None:
    Path("a.tok").write_bytes(tokens_of_speech)
    if source in SPOILT:
        Path(source).write_bytes(SPOILT[source](tokens_of_speech))
    encode = source == "a.tok" or source.endswith((".wav", ".mp3", ".flac")) and source != "a.wav"
    *option, target = output
    command, suffix = ("encode", ".tok") if encode else ("decode", ".wav")
    line = refuse(command, source, *option, target + suffix)
    assert source in line and re.search(words, line), line


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("missing.tok", "No such file"),
        ("text.tok", "not a token file"),
        ("a.wav", "not a token file"),
        ("empty.tok", "the file is empty"),
        ("new.tok", "format version 6 is newer than 2"),
        ("folder.tok", "Is a directory"),
        ("folder", "config.json: No such file"),
        ("nobody", "unknown model.*speech-3k"),
    ],
)
def test_info_of_bad_input(source: str, words: str, tokens_of_speech: bytes) -> None:
    if source in SPOILT:
        Path(source).write_bytes(SPOILT[source](tokens_of_speech))
    elif source.startswith("folder"):
        Path(source).mkdir()
    line = refuse("info", source)
    assert source in line and re.search(words, line), line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("encode a.wav out.xyz", "out.xyz: the suffix .*.tok"),
        ("encode a.wav out", "out: the suffix .*.tok"),
        ("decode a.tok out.xyz", "out.xyz: the suffix .*.wav"),
        ("decode a.tok --suffix xyz", "--suffix must be one of .*.wav"),
        ("decode a.tok out.wav --subtype PCM_7", "out.wav: WAV has no subtype PCM_7"),
        ("decode a.tok out.raw --raw s17", "s17"),
        ("decode a.tok out.wav --rate 100000000", "100000000 Hz"),
        ("encode a.wav out.tok -m nobody", "unknown model 'nobody' .*speech-3k"),
        ("encode a.wav out.tok -m ./nobody", "./nobody: no such folder"),
        ("encode a.wav out.tok -m empty", "empty/config.json: No such file"),
        ("decode a.tok out.wav -m nobody", "unknown model 'nobody'"),
        ("encode a.wav out.tok --backend tflite", "unknown backend 'tflite' .*onnx, torch"),
        ("decode a.tok out.wav --backend tflite", "unknown backend 'tflite' .*onnx, torch"),
        ("encode a.wav out.tok --raw s17", "s17"),
        ("encode a.wav out.tok --raw s16 --rate 0", "0 Hz"),
        ("encode a.wav out.tok --raw s16 --channels 256", "256 channels"),
        ("encode a.tok", "a.tok: input and output are the same"),
        ("encode a.wav a.wav", "a.wav: input and output are the same"),
        ("decode a.tok a.tok", "a.tok: input and output are the same"),
        ("encode a.wav link.tok", "link.tok: input and output are the same"),
        ("encode a.wav a.wav.txt/out.tok", "out.tok"),
        (
            "encode a.wav sub/a.wav out/",
            "out/a.wav.tok: both a.wav and sub/a.wav would be written there",
        ),
        ("encode a.wav b.wav -", "several files cannot go to one pipe"),
        ("encode a.wav b.wav -o a.wav.txt", "a.wav.txt: several inputs need a folder"),
        ("encode - a.wav out/", "a pipe cannot be one of several"),
        ("encode missing.wav out.tok --json", "missing.wav: No such file"),
        ("encode empty out/", "empty: .*no files found|no files found.* empty"),
        ("decode empty", "empty: .*no files found|no files found.* empty"),
    ],
    ids=lambda value: value if value.startswith(("encode", "decode")) else "",
)
def test_bad_requests(a_tok: Path, args: str, words: str) -> None:
    Path("empty").mkdir()
    Path("sub").mkdir()
    Path("sub/a.wav").symlink_to("../a.wav")
    Path("link.tok").symlink_to("a.wav")
    Path("a.wav.txt").write_text("no folder")
    sound_before = Path("a.wav").read_bytes()
    line = refuse(*args.split())
    assert re.search(words, line), line
    assert Path("a.wav").read_bytes() == sound_before


@pytest.mark.parametrize(
    ("args", "name"), [("encode - out.tok", "text.wav"), ("encode - out.tok", "cut.wav"),
                       ("encode - -", "nan.wav"), ("decode - out.wav", "flip.tok"),
                       ("decode - out.wav", "empty.tok"), ("info -", "text.tok")]
)  # fmt: skip
def test_bad_input_through_pipes(tokens_of_speech: bytes, args: str, name: str) -> None:
    result = run(*args.split(), stdin=SPOILT[name](tokens_of_speech), check=2)
    (line,) = result.err.splitlines()
    assert line.startswith("vpcodec: ")
    assert tree() == {"a.wav"}


def test_failure_keeps_what_was_there(tokens_of_speech: bytes) -> None:
    Path("out.tok").write_text("old")
    Path("out.wav").write_text("old")
    Path("cut.wav").write_bytes(sound_bytes("WAV")[:-1_000])
    Path("flip.tok").write_bytes(SPOILT["flip.tok"](tokens_of_speech))
    refuse("encode", "cut.wav", "out.tok")
    refuse("decode", "flip.tok", "out.wav")
    assert Path("out.tok").read_text() == Path("out.wav").read_text() == "old"


def test_some_of_several_fail(a_tok: Path) -> None:
    Path("b.wav").write_text("no audio")
    result = run("encode", "a.wav", "b.wav", "missing.wav", "out/", check=1)
    assert tree("out") == {"a.tok"}
    *failures, last = result.err.splitlines()
    assert [line.split(": ")[1] for line in failures] == ["b.wav", "missing.wav"]
    assert "2 of 3 failed" in last

    document = run("encode", "a.wav", "b.wav", "out/", "--force", "--json", check=1).json
    assert [row["source"] for row in document["results"]] == ["a.wav"]
    assert len(document["failed"]) == 1 and document["failed"][0]["error"].startswith("b.wav: ")


def test_fail_fast_stops(a_tok: Path) -> None:
    result = run("encode", "missing.wav", "a.wav", "out/", "--fail-fast", check=1)
    assert "missing.wav: No such file" in result.err
    assert "out/a.tok" not in tree()


def test_failure_leaves_the_folder_to_others() -> None:
    """With --jobs, two results go to a new folder, and the first fails while the second runs."""
    both = threading.Barrier(2)

    def work(item: common.Item, progress: object) -> tuple[modalities.Modality, FileStats]:
        both.wait(ENOUGH)
        if item.source == "bad.wav":
            raise AudioError("bad.wav: no audio")
        time.sleep(0.3)  # until the other one has cleaned up
        Path(item.target).write_text("done")
        return modalities.AUDIO, FileStats(0, 16_000, 1, 0, 0)

    items = [common.Item(f"{name}.wav", f"out/sub/{name}.tok") for name in ("bad", "good")]
    with pytest.raises(typer.Exit):
        common.run(items, [], work, label="", jobs=2, fail_fast=False, as_json=False)
    assert tree("out") == {"sub", "sub/good.tok"}


@pytest.mark.parametrize("weights", [b"", b"\xff" * 100, b"\x02" + bytes(7) + b"[]"])
def test_info_of_a_model_whose_weights_are_none(tmp_path: Path, weights: bytes) -> None:
    model = open_model()
    (tmp_path / WEIGHTS).write_bytes(weights)
    write_folder_config(tmp_path, model.config, fingerprint(model.config, weights), [WEIGHTS])
    assert f"{WEIGHTS}: not a safetensors file" in refuse("info", tmp_path)


def test_failure_towards_a_pipe_names_the_source(tmp_path: Path) -> None:
    def work(item: common.Item, progress: Callable) -> tuple[modalities.Modality, FileStats]:
        raise ValueError("well-known cause")

    item = common.Item("a.tok", "-")
    with pytest.raises(common.UsageError, match="^a.tok: well-known cause$"):
        common.run([item], [], work, label="", jobs=1, fail_fast=False, as_json=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which is Linux's")
@pytest.mark.parametrize("args", ["encode a.wav full.tok", "decode a.tok full.wav"])
def test_full_disk_is_named(a_tok: Path, args: str) -> None:
    target = args.split()[-1]
    Path(target).symlink_to("/dev/full")
    line = refuse(*args.split())
    assert target in line and "No space left" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("args", ["encode a.wav shut/out.tok", "decode a.tok shut/out.wav"])
def test_write_protected_folder(a_tok: Path, args: str) -> None:
    Path("shut").mkdir(mode=0o500)
    line = refuse(*args.split())
    assert args.split()[-1] in line and "Permission denied" in line


# -------------------------------------------------------------------------------- decoding options


def test_rate_and_subtype(a_tok: Path) -> None:
    run("decode", "a.tok", "b.wav", "--rate", 8_000, "--subtype", "PCM_24")
    facts = sf.info("b.wav")
    assert (facts.samplerate, facts.subtype) == (8_000, "PCM_24")
    assert facts.frames == -(-sf.info("a.wav").frames * 8_000 // 22_050)


@pytest.mark.parametrize("suffix", ["flac", ".flac", ".FLAC"])
def test_suffix(a_tok: Path, suffix: str) -> None:
    run("decode", "a.tok", "--suffix", suffix)
    (path,) = (path for path in Path().iterdir() if path.suffix.lower() == ".flac")
    assert sf.info(path).format == "FLAC"


def test_raw_result_is_not_called_wav(a_tok: Path) -> None:
    """Without a name for the output, headerless PCM must not pose as a WAV file."""
    Path("a.wav").unlink()
    run("decode", "a.tok", "--raw", "s16")
    (made,) = tree() - {"a.tok"}
    assert made in ("a.raw", "a.pcm")


@pytest.mark.parametrize("name", ["flip.tok", "half.tok"])
def test_recover(name: str, tokens_of_speech: bytes) -> None:
    Path(name).write_bytes(SPOILT[name](tokens_of_speech))
    document = run("decode", name, "b.wav", "--recover", "--json").json
    assert document["results"][0]["damaged_blocks"] >= 1
    assert sf.info("b.wav").frames == sf.info("a.wav").frames
    assert "damaged" in run("decode", name, "b.wav", "--recover").err


def test_gaps_have_a_limit(tokens_of_speech: bytes) -> None:
    Path("a.tok").write_bytes(header_only(tokens_of_speech, n_samples=10**10))
    line = refuse("decode", "a.tok", "b.wav", "--recover")
    assert "a.tok: more than 60 s in a row are lost, from 0.00 s on; --max-gap allows more" in line
    Path("half.tok").write_bytes(SPOILT["half.tok"](tokens_of_speech))
    assert "--max-gap allows more" in refuse(
        "decode", "half.tok", "b.wav", "--recover", "--max-gap", "0.1"
    )
    run("decode", "half.tok", "b.wav", "--recover", "--max-gap", "3600")


def test_info_is_short_whatever_a_file_claims(tokens_of_speech: bytes) -> None:
    Path("a.tok").write_bytes(header_only(tokens_of_speech, n_samples=10**12, block_frames=65_535))
    result = run("info", "a.tok", check=2)
    assert b"damaged blocks     0, 1, 2" in result.out and b"115,337" in result.out
    assert len(result.out) < 2_000
    document = run("info", "a.tok", "--json", check=2)
    assert document.json["damaged_count"] == 115_337 and len(document.out) < 20_000


def test_force_decodes_tokens_of_other_weights(tokens_of_speech: bytes) -> None:
    Path("b.tok").write_bytes(SPOILT["weights.tok"](tokens_of_speech))
    run("decode", "b.tok", "b.wav", "--force")
    assert sf.info("b.wav").frames == sf.info("a.wav").frames
    Path("c.tok").write_bytes(SPOILT["codebook.tok"](tokens_of_speech))
    assert "cannot decode" in refuse("decode", "c.tok", "c.wav", "--force")


# ---------------------------------------------------------------------------- documents and facts


def test_json_documents(a_tok: Path) -> None:
    frames, size = sf.info("a.wav").frames, a_tok.stat().st_size
    expected = {
        "source": "a.wav",
        "target": "b.tok",
        "seconds": pytest.approx(frames / 22_050, abs=1e-5),
        "sample_rate": 22_050,
        "channels": 1,
        "tokens": read_tokens(a_tok)[0].size,
        "bytes": size,
        "bitrate": pytest.approx(8 * size * 22_050 / frames, abs=0.1),
        "damaged_blocks": 0,
    }
    result = run("encode", "a.wav", "b.tok", "--json")
    (row,) = result.json["results"]
    assert expected.items() <= row.items()
    assert row["elapsed_seconds"] > 0
    assert (result.json["kept"], result.json["failed"], result.err) == ([], [], "")
    (row,) = run("decode", "b.tok", "c.wav", "--json").json["results"]
    assert (expected | {"source": "b.tok", "target": "c.wav"}).items() <= row.items()


def test_info_of_tokens(a_tok: Path) -> None:
    frames, size = sf.info("a.wav").frames, a_tok.stat().st_size
    codec = Codec.from_pretrained()
    facts = run("info", "a.tok", "--json").json
    assert facts == facts | {
        "model": codec.name,
        "fingerprint": codec.space[:8].hex(),
        "decoded_by": DEFAULT_MODEL,
        "duration_seconds": pytest.approx(frames / 22_050, abs=1e-5),
        "original_rate": 22_050,
        "model_rate": 16_000,
        "channels": 1,
        "samples": frames,
        "tokens": read_tokens("a.tok")[0].size,
        "tokens_per_second": pytest.approx(codec.frame_rate, abs=1e-3),
        "codebook_size": codec.codebook_size,
        "nominal_bitrate": pytest.approx(codec.bitrate, abs=0.1),
        "real_bitrate": pytest.approx(8 * size * 22_050 / frames, abs=0.1),
        "bytes": size,
        "damaged_blocks": [],
        "checksums": "ok",
    }
    assert 1 < facts["bits_per_token"] < 0.9 * codec.config.bits_per_token
    text = run("info", "a.tok").out.decode()
    for word in (codec.name, "nominal bitrate", "real bitrate", "22,050", "checksums", "ok"):
        assert word in text
    assert run("info", "-", "--json", stdin=a_tok.read_bytes()).json["tokens"] == facts["tokens"]


def test_info_of_damaged_tokens(tokens_of_speech: bytes) -> None:
    Path("flip.tok").write_bytes(SPOILT["flip.tok"](tokens_of_speech))
    result = run("info", "flip.tok", "--json", check=2)
    assert result.json["damaged_blocks"] == [0]
    assert result.json["checksums"] == "block 0: the checksum is wrong"
    assert result.err == "vpcodec: flip.tok: block 0: the checksum is wrong\n"


@pytest.mark.parametrize("by", ["name", "folder"])
def test_info_of_a_model(by: str) -> None:
    path = bundled_folders()[DEFAULT_MODEL]
    codec = Codec.from_pretrained()
    facts = run("info", DEFAULT_MODEL if by == "name" else path, "--json").json
    assert facts == facts | {
        "model": DEFAULT_MODEL,
        "license": codec.config.license,
        "fingerprint": codec.fingerprint.hex(),
        "space": codec.space.hex(),
        "earlier": [item.hex() for item in codec.model.earlier],
        "entropy_tables": len(codec.model.tables),
        "sample_rate": codec.sample_rate,
        "hop_length": codec.hop_length,
        "tokens_per_second": pytest.approx(codec.frame_rate, abs=1e-3),
        "codebook_size": codec.codebook_size,
        "nominal_bitrate": pytest.approx(codec.bitrate, abs=0.1),
        "latency_ms": pytest.approx(1_000 * codec.latency, abs=0.1),
        "entropy_coding": True,
        "checksums": "ok",
    }
    assert facts["parameters"] > 1e5
    assert facts["license"] not in ("", "unknown")
    assert {"encoder", "decoder", "transformer", "quantizer"} <= facts.keys()
    text = run("info", DEFAULT_MODEL).out.decode()
    assert f"{facts['parameters']:,}" in text and facts["license"] in text


def test_info_of_a_damaged_model() -> None:
    shutil.copytree(bundled_folders()[DEFAULT_MODEL], "model")
    data = Path("model/decoder.onnx").read_bytes()
    Path("model/decoder.onnx").write_bytes(flipped(data, 1_000))
    assert "model/decoder.onnx: damaged" in refuse("info", "model")
    assert "model/decoder.onnx: damaged" in refuse("info", "model", "--json")


def test_version_and_module() -> None:
    assert run("--version").out.decode() == f"{vpcodec.__version__}\n"
    done = subprocess.run([*MODULE, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{vpcodec.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    assert command in run("--help").out.decode()
    text = run(command, "--help").out.decode()
    assert "Usage:" in text and "--help" in text


@pytest.mark.parametrize("args", ["encode", "decode", "info", "encode --frobnicate", "frobnicate"])
def test_wrong_use(args: str) -> None:
    result = run(*args.split(), check=2)
    assert "Error: " in result.err and result.out == b""


# --------------------------------------------------------------------------------------- packages

MANY = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.machinery import PathFinder
hidden, watched, commands = json.loads(sys.argv[1])

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hide = name.partition(".")[0] in hidden
        return None if hide else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
from vpcodec.cli import main
results = []
for sys.argv in commands:
    code, err = 0, io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(err):
        try:
            main()
        except SystemExit as exit:
            code = exit.code or 0
    results.append((code, err.getvalue(), [name for name in watched if name in sys.modules]))
print(json.dumps(results))
"""


def run_many(*commands: str, hidden: list[str], watched: list[str]) -> list[tuple]:
    """(exit code, stderr, watched modules that are loaded) of commands in one new process.

    The packages `hidden` are as if not installed.
    """
    task = [hidden, watched, [["vpcodec", *command.split()] for command in commands]]
    done = subprocess.run(
        [sys.executable, "-c", MANY, json.dumps(task)], capture_output=True, timeout=ENOUGH
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


USE = ["encode a.wav a.tok", "decode a.tok b.wav", "info a.tok", "info speech-3k", "models"]


def test_use_imports_nothing_heavy() -> None:
    heavy = [
        "torch",
        "torchaudio",
        "librosa",
        "scipy",
        "huggingface_hub",
        "onnx",
        "safetensors",
        "PIL",
        "pyarrow",
        "ray",
    ]
    for command, result in zip(USE, run_many(*USE, hidden=[], watched=heavy), strict=True):
        assert (command, result[0], result[2]) == (command, 0, [])


def test_without_the_train_extra() -> None:
    hidden = ["torch", "torchaudio", "safetensors", "onnx", "onnxscript", "yaml", "tensorboard"]
    refused = [
        "train recipe.yaml",
        "export run -o model",
        "encode a.wav c.tok --backend torch",
        "decode a.tok c.wav --backend torch",
    ]
    results = run_many(*USE, *refused, hidden=hidden, watched=hidden)
    assert [result[0] for result in results] == [0] * len(USE) + [2] * len(refused)
    for _, err, _ in results[len(USE) :]:
        (line,) = err.splitlines()
        assert line.startswith("vpcodec: ") and "pip install 'vpcodec[train]'" in line
    assert tree() == {"a.wav", "a.tok", "b.wav"}


# -------------------------------------------------------------------------------------------- help


COMMANDS = ["encode", "decode", "info", "score", "train", "export", "models push", "models tables"]
COMMANDS += ["tokens", "tokenize"]


@pytest.mark.parametrize("command", ["", "models", *COMMANDS])
def test_help_is_short_for_help_and_plain(command: str) -> None:
    text = run(*command.split(), "-h").out.decode()
    assert text == run(*command.split(), "--help").out.decode()
    described = text.partition("Arguments:" if "Arguments:" in text else "Options:")[2]
    assert " <" not in described and "{" not in text.splitlines()[0]
    assert all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize(
    "command", ["encode", "decode", "info", "score", "train", "tokens", "tokenize"]
)
def test_help_has_examples(command: str) -> None:
    text = run(command, "-h").out.decode()
    assert f"\n  vpcodec {command} " in text


def test_version_and_completion() -> None:
    assert run("-V").out == run("--version").out == f"{vpcodec.__version__}\n".encode()
    assert "--install-completion" in run("-h").out.decode()
    command = [*MODULE, "--show-completion", "bash"]
    assert b"complete" in subprocess.run(command, capture_output=True, timeout=ENOUGH).stdout


def test_info_of_several_files_and_folders() -> None:
    run("encode", "a.wav", "t/sub/a.tok")
    run("encode", "a.wav", "t/b.tok")
    rows = run("info", "t", "t/b.tok", "speech-1k", "--json").json
    named = [row.get("file", row["model"]) for row in rows]
    assert named == ["t/b.tok", "t/sub/a.tok", "t/b.tok", "speech-1k"]
    text = run("info", "t").out.decode()
    assert text.count("\n\n") == 1 and text.count("checksums") == 2
    assert isinstance(run("info", "t/b.tok", "--json").json, dict)
    Path("t/c.tok").write_bytes(Path("t/b.tok").read_bytes()[:-20])
    Path("t/d.tok").touch()
    result = run("info", "t", "--json", check=1)
    assert [row["checksums"] == "ok" for row in result.json] == [True, False, True]
    assert "t/d.tok: " in result.err and result.err.endswith("vpcodec: 2 of 4 failed\n")
    Path("empty").mkdir()
    assert "empty/config.json: No such file" in refuse("info", "empty")


@pytest.mark.parametrize("name", ["./nosuch", "../nosuch", "/no/such", "./no/such"])
def test_what_is_a_path_is_no_name_on_the_hub(name: str) -> None:
    assert refuse("info", name) == f"vpcodec: {name}: no such folder"
    assert refuse("encode", "a.wav", "-m", name) == f"vpcodec: {name}: no such folder"
