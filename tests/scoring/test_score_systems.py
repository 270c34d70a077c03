"""What is scored: decoded files, models and classic codecs."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vpcodec import read_tokens
from vpcodec.hub import open_model
from vpcodec.media.audio import AudioError, load, resample, save
from vpcodec.media.image import ImageError, load_image, save_image
from vpcodec.model_folder import ModelError
from vpcodec.scoring import systems
from vpcodec.scoring.alignment import find_delay, remove_delay
from vpcodec.scoring.systems import (
    CODEC2_MODES,
    CODECS,
    Aac,
    Codec2,
    Decoded,
    Jpeg,
    Model,
    Mp3,
    Opus,
    ScoreError,
    System,
    WebP,
    build_system,
    pair_files,
    parse_codecs,
)

pytestmark = pytest.mark.slow


def need(*programs: str) -> pytest.MarkDecorator:
    absent = [program for program in programs if not shutil.which(program)]
    return pytest.mark.skipif(bool(absent), reason=f"needs {', '.join(absent)}")


need_opus = need("opusenc", "opusdec")
need_codec2 = need("c2enc", "c2dec")


def noise(channels: int, n: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, (channels, n)).astype(np.float32)


def likeness(x: np.ndarray, y: np.ndarray, rate: int) -> float:
    """The correlation of two signals (T,), once a delay is removed."""
    y = remove_delay(y, find_delay(x, y, rate), len(x))
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


# ------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("opus@6k", ["opus@6k"]),
        ("opus@6000,opus@6,opus@6.0K", ["opus@6k"]),
        ("opus@12, codec2@700c ,jpeg@0", ["opus@12k", "codec2@700C", "jpeg@0"]),
        ("opus@6.5k,opus@6500", ["opus@6.5k"]),
        ("opus@0.5k,opus@512k", ["opus@0.5k", "opus@512k"]),
        ("webp@100,codec2@3200,opus@8k", ["webp@100", "codec2@3200", "opus@8k"]),
    ],
)
def test_codecs_are_named_by_their_settings(text, specs):
    assert parse_codecs(text) == [f"codec:{spec}" for spec in specs]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vox@32k", ["unknown codec 'vox'", "opus", "mp3", "aac", "codec2", "jpeg", "webp"]),
        ("mp3@7k", ["codec mp3 has no bit rate", "8k to 320k"]),
        ("", ["unknown codec ''"]),
        ("opus@6k,", ["unknown codec ''"]),
        ("opus", ["setting", "opus@6k"]),
        ("codec2", ["setting", "codec2@3200"]),
        ("opus@", ["no bit rate ''", "0.5k to 512k"]),
        ("opus@fast", ["no bit rate 'fast'"]),
        ("opus@0", ["no bit rate"]),
        ("opus@-6k", ["no bit rate"]),
        ("opus@nan", ["no bit rate"]),
        ("opus@1e3", ["no bit rate"]),
        ("opus@513k", ["no bit rate"]),
        ("opus@6k@8k", ["no bit rate"]),
        ("codec2@3100", ["no mode '3100'", "3200", "700C"]),
        ("codec2@450PWB", ["no mode"]),
        ("jpeg@101", ["no quality '101'", "0 to 100"]),
        ("webp@-1", ["no quality"]),
        ("webp@1.5", ["no quality"]),
    ],
)
def test_what_a_codec_does_not_have_is_refused_with_what_there_is(text, words):
    with pytest.raises(ScoreError) as caught:
        parse_codecs(text)
    assert all(word in str(caught.value) for word in words)


def test_every_codec_has_an_example_that_works():
    for codec in CODECS.values():
        assert parse_codecs(codec.example) == [f"codec:{codec.example}"]


@pytest.mark.parametrize("system", [Opus(6000), Opus(6500), Codec2("700C"), Jpeg(10), WebP(0)])
def test_systems_are_made_again_by_their_spec_and_by_pickle(system, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/{name}")
    again = build_system(system.spec)
    assert again == system == pickle.loads(pickle.dumps(system))
    assert again.name == system.name and again.spec == system.spec == f"codec:{system.name}"


# ---------------------------------------------------------------------------------------- opus


@need_opus
def test_opus_keeps_rate_length_and_sound(speech_wav):
    original, rate = load(speech_wav)
    coded = Opus(12_000).code(speech_wav)
    assert coded.rate == rate == 22_050 and coded.signal.shape == original.shape
    assert coded.signal.dtype == np.float32 and coded.tokens is None
    assert likeness(original[0], coded.signal[0], rate) > 0.8
    assert np.array_equal(coded.signal, Opus(12_000).code(speech_wav).signal)  # the dither, too
    seconds = original.shape[1] / rate
    assert 8_000 < 8 * coded.n_bytes / seconds < 20_000
    assert Opus(24_000).code(speech_wav).n_bytes > 1.5 * coded.n_bytes


@need_opus
def test_opus_keeps_channels_apart(speech, tmp_path):
    left = resample(speech, 16_000, 44_100)[0, :88_200]
    right = (0.3 * np.sin(2 * np.pi * 440 / 44_100 * np.arange(88_200))).astype(np.float32)
    save(tmp_path / "a.wav", np.stack([left, right]), 44_100)
    coded = Opus(64_000).code(tmp_path / "a.wav")
    assert coded.signal.shape == (2, 88_200) and coded.rate == 44_100
    assert likeness(left, coded.signal[0], 44_100) > 0.95
    assert likeness(right, coded.signal[1], 44_100) > 0.95


@need_opus
@pytest.mark.parametrize("rate", [4_000, 8_000, 96_000, 200_000])
def test_opus_takes_any_rate(tmp_path, rate):
    save(tmp_path / "a.wav", noise(1, rate // 2), rate)
    coded = Opus(32_000).code(tmp_path / "a.wav")
    assert coded.rate == (rate if 8_000 <= rate <= 192_000 else 48_000)
    assert coded.signal.shape[1] == pytest.approx(coded.rate / 2, abs=2)


@need_opus
def test_opus_gets_the_same_from_16_bits_and_from_float(speech, tmp_path):
    clip = np.rint(speech[:, :32_000] * 32768) / np.float32(32768)
    for name, subtype in {"i.wav": "PCM_16", "f.wav": "FLOAT", "l.flac": "PCM_16"}.items():
        save(tmp_path / name, clip, 16_000, subtype=subtype)
    coded = [Opus(8_000).code(tmp_path / name) for name in ("i.wav", "f.wav", "l.flac")]
    assert len({one.n_bytes for one in coded}) == 1
    assert np.array_equal(coded[0].signal, coded[1].signal)
    assert np.array_equal(coded[0].signal, coded[2].signal)


@need_opus
@pytest.mark.parametrize("n", [0, 1])
def test_opus_takes_the_shortest_files(tmp_path, n):
    save(tmp_path / "a.wav", noise(1, n), 16_000)
    coded = Opus(6_000).code(tmp_path / "a.wav")
    assert coded.signal.shape == (1, n) and coded.n_bytes > 0


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
@pytest.mark.parametrize("kind", [Mp3, Aac])
def test_mp3_and_aac_have_the_length_and_the_channels_of_the_original(speech, tmp_path, kind):
    left = resample(speech, 16_000, 44_100)[0, :88_200]
    save(tmp_path / "a.wav", np.stack([left, 0.5 * left[::-1]]), 44_100)
    coded = kind.parse("96k").code(tmp_path / "a.wav")
    assert coded.rate == 44_100 and coded.signal.shape == (2, 88_200)
    assert coded.n_bytes == pytest.approx(2 * 96_000 / 8, rel=0.3)
    assert likeness(left, coded.signal[0], 44_100) > 0.95
    save(tmp_path / "b.wav", noise(1, 5_000), 10_000)
    assert kind.parse("16k").code(tmp_path / "b.wav").rate == 11_025
    with pytest.raises(ScoreError, match="3 channels"):
        save(tmp_path / "c.wav", noise(3, 5_000), 16_000)
        kind.parse("16k").code(tmp_path / "c.wav")


def test_opus_refuses_more_than_stereo(tmp_path):
    save(tmp_path / "a.wav", noise(3, 100), 16_000)
    with pytest.raises(ScoreError, match=r"a\.wav: 3 channels"):
        Opus(6_000).code(tmp_path / "a.wav")


@need_opus
@pytest.mark.parametrize("name", ["--bitrate 9.wav", "a\nb.wav", "$(exit 1);'\".wav"])
def test_odd_names_are_harmless(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    save(name, noise(1, 1000), 16_000)
    assert Opus(6_000).code(Path(name)).signal.shape == (1, 1000)
    assert os.listdir() == [name]


@need_opus
def test_opus_says_its_version():
    assert "libopus" in Opus(6_000).identity and Opus(6_000).identity == Opus(8_000).identity


# -------------------------------------------------------------------------------------- codec2


@need_codec2
def test_codec2_keeps_all_whole_frames(speech_wav):
    original, rate = load(speech_wav)
    coded = Codec2("3200").code(speech_wav)
    frames = int(original.shape[1] / rate / 0.02)
    assert coded.rate == 16_000 and coded.signal.shape == (1, 320 * frames)
    assert coded.n_bytes == 7 + 8 * frames
    assert coded.signal.dtype == np.float32 and coded.tokens is None
    loudness = np.sqrt(np.mean(coded.signal**2) / np.mean(original**2))
    assert 0.5 < loudness < 2


@need_codec2
def test_codec2_codes_each_channel_alone(speech, tmp_path):
    clips = speech[0, :32_000], speech[0, 32_000:64_000]
    for name, samples in {"l": clips[0], "r": clips[1], "both": np.stack(clips)}.items():
        save(tmp_path / f"{name}.wav", samples, 16_000)
    left, right, both = (
        Codec2("1300").code(tmp_path / f"{name}.wav") for name in ("l", "r", "both")
    )
    assert np.array_equal(both.signal, np.concatenate([left.signal, right.signal]))
    assert both.n_bytes == left.n_bytes + right.n_bytes


@need_codec2
@pytest.mark.parametrize("mode", CODEC2_MODES)
def test_every_mode_of_codec2_has_its_rate(speech, tmp_path, mode):
    save(tmp_path / "a.wav", speech[:, 16_000:48_000], 16_000)
    coded = Codec2(mode).code(tmp_path / "a.wav")
    assert coded.signal.shape == (1, 32_000)
    nominal = float(mode.rstrip("C"))
    assert nominal <= 8 * (coded.n_bytes - 7) / 2 < 1.4 * nominal  # frames are whole bytes


@need_codec2
def test_codec2_lets_faint_images_pass(speech_wav):
    power = np.abs(np.fft.rfft(Codec2("3200").code(speech_wav).signal[0])) ** 2
    half = len(power) // 2
    assert 1e-5 < power[half:].sum() / power[:half].sum() < 1e-2


@need_codec2
@pytest.mark.parametrize("n", [0, 1])
def test_codec2_takes_the_shortest_files(tmp_path, n):
    save(tmp_path / "a.wav", noise(2, n), 16_000)
    assert Codec2("3200").code(tmp_path / "a.wav").signal.shape == (2, 0)


@need_codec2
def test_codec2_clips_what_is_too_loud(tmp_path):
    tone = 4 * np.sin(2 * np.pi * 200 / 8_000 * np.arange(8_000)).astype(np.float32)
    save(tmp_path / "loud.wav", tone, 8_000, subtype="FLOAT")
    save(tmp_path / "clipped.wav", tone.clip(-1, 32767 / 32768), 8_000)
    loud, clipped = (Codec2("3200").code(tmp_path / f"{name}.wav") for name in ("loud", "clipped"))
    assert np.array_equal(loud.signal, clipped.signal)


@need_codec2
def test_the_identity_of_codec2_is_what_its_programs_do(tmp_path, monkeypatch):
    true = Codec2("3200").identity
    assert true == Codec2("3200").identity != Codec2("2400").identity
    fake(tmp_path, monkeypatch, c2dec="head -c 4000 /dev/zero > decoded.raw")
    assert Codec2("3200").identity != true


# ----------------------------------------------------------------------------- faults of programs


def fake(folder: Path, monkeypatch, **scripts: str) -> None:
    """Put programs, as shell scripts, before those that are installed."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, script in scripts.items():
        path = folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("codec:opus@6k", "codec opus needs opusenc and opusdec: apt install opus-tools"),
        ("codec:mp3@32k", "codec mp3 needs ffmpeg: apt install ffmpeg"),
        ("codec:codec2@3200", "codec codec2 needs c2enc and c2dec: apt install codec2"),
    ],
)
def test_a_missing_program_is_noticed_before_any_file(tmp_path, monkeypatch, spec, message):
    fake(tmp_path, monkeypatch, opusenc="", c2enc="")  # one of two
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert parse_codecs(spec.removeprefix("codec:")) == [spec]
    with pytest.raises(ScoreError, match=f"^{message}$"):
        build_system(spec)


def test_a_missing_package_is_noticed_before_any_file(tmp_path, monkeypatch):
    fake(tmp_path, monkeypatch, c2enc="", c2dec="")
    monkeypatch.setattr(systems, "find_spec", lambda name: None)
    with pytest.raises(ScoreError, match="^codec codec2 needs the package scipy: pip install"):
        build_system("codec:codec2@3200")


WRITES = "echo coded > coded.opus"


@pytest.mark.parametrize(
    ("scripts", "words"),
    [
        ({"opusenc": "echo one >&2; echo 'Error: broken' >&2; exit 1"}, "opusenc failed (Error: b"),
        ({"opusenc": "printf 'a\\033[31mb\\n\\n' >&2; exit 1"}, "opusenc failed (a[31mb)"),
        ({"opusenc": "exit 3"}, "opusenc failed (exit code 3)"),
        ({"opusenc": "kill -9 $$"}, "opusenc failed (exit code -9)"),
        ({"opusenc": "exit 0"}, "opusenc wrote no file"),
        ({"opusenc": "exec sleep 60"}, "opusenc did not end"),
        ({"opusenc": "sleep 5 & wait"}, "opusenc did not end"),
        ({"opusenc": WRITES, "opusdec": "echo no >&2; exit 1"}, "opusdec failed (no)"),
        ({"opusenc": WRITES, "opusdec": "exit 0"}, "opusdec wrote no file"),
        (
            {"opusenc": WRITES, "opusdec": "echo rubbish > decoded.wav"},
            "opusdec wrote audio that cannot be read",
        ),
    ],
)
def test_a_program_that_goes_wrong_costs_its_file_only(tmp_path, monkeypatch, scripts, words):
    fake(tmp_path, monkeypatch, **{"opusdec": "exit 9"} | scripts)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(systems, "TIMEOUT", 1.0 if "sleep" in str(scripts) else 60.0)
    source = tmp_path / "a.wav"
    save(source, noise(1, 1000), 16_000)
    with pytest.raises(ScoreError) as caught:
        Opus(6_000).code(source)
    message = str(caught.value)
    assert message.startswith(f"{source}: {words}") and message.isprintable()
    assert str(tmp_path / "temporary") not in message
    assert not os.listdir(tmp_path / "temporary")


def test_a_program_that_cannot_be_started_is_named(tmp_path, monkeypatch):
    fake(tmp_path, monkeypatch, opusenc="")
    (tmp_path / "bin" / "opusenc").write_bytes(b"\0")
    save(tmp_path / "a.wav", noise(1, 1000), 16_000)
    with pytest.raises(ScoreError, match="opusenc cannot be run"):
        Opus(6_000).code(tmp_path / "a.wav")


def test_decoded_audio_of_other_channels_is_not_taken(tmp_path, monkeypatch):
    save(tmp_path / "stereo.wav", noise(2, 1000), 16_000)
    save(tmp_path / "a.wav", noise(1, 1000), 16_000)
    fake(tmp_path, monkeypatch, opusenc=WRITES, opusdec=f"cp {tmp_path}/stereo.wav decoded.wav")
    with pytest.raises(ScoreError, match="2 channels of 1"):
        Opus(6_000).code(tmp_path / "a.wav")


def test_more_samples_than_there_were_are_not_read(tmp_path, monkeypatch):
    save(tmp_path / "a.wav", noise(1, 1000), 16_000)
    fake(
        tmp_path,
        monkeypatch,
        c2enc="echo coded > coded.c2",
        c2dec="truncate -s 100G decoded.raw || truncate -s 1M decoded.raw",
    )
    with pytest.raises(ScoreError, match="samples of 500"):
        Codec2("3200").code(tmp_path / "a.wav")


@pytest.mark.parametrize("system", [Opus(6_000), Codec2("3200"), Jpeg(10), WebP(10)])
def test_files_that_cannot_be_read_are_named(tmp_path, system):
    (tmp_path / "text.wav").write_text("neither audio nor an image")
    for name in ("text.wav", "nowhere.wav"):
        with pytest.raises((AudioError, ImageError), match=name):
            system.code(tmp_path / name)


# -------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(("system", "format"), [(Jpeg(10), "JPEG"), (WebP(0), "WEBP")])
def test_pictures_go_through_pillow(picture, tmp_path, system, format):
    from PIL import Image

    save_image(tmp_path / "a.png", picture(40, 61))
    data = io.BytesIO()
    Image.open(tmp_path / "a.png").save(data, format, quality=system.quality)
    coded = system.code(tmp_path / "a.png")
    assert coded.n_bytes == len(data.getvalue())
    assert np.array_equal(coded.signal, np.asarray(Image.open(data)))
    assert coded.rate is None and coded.tokens is None
    assert "Pillow" in system.identity


@pytest.mark.parametrize("codec", [Jpeg, WebP])
def test_more_quality_costs_more_and_is_better(picture, tmp_path, codec):
    save_image(tmp_path / "a.png", picture(64, 64))
    poor, good = (codec(quality).code(tmp_path / "a.png") for quality in (10, 90))
    assert good.n_bytes > 1.5 * poor.n_bytes
    errors = [np.std(one.signal - picture(64, 64).astype(float)) for one in (poor, good)]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    ("codec", "components"), [(Jpeg, 1), (WebP, 1), (Jpeg, 3), (WebP, 2), (WebP, 4)]
)
def test_grey_stays_grey_and_alpha_is_kept(picture, tmp_path, codec, components):
    pixels = picture(33, 48, components)
    save_image(tmp_path / "a.png", pixels)
    decoded = codec(80).code(tmp_path / "a.png").signal
    assert decoded.shape == pixels.shape and decoded.dtype == np.uint8
    assert np.abs(decoded - pixels.astype(float)).mean() < 6
    if components in (2, 4):
        assert np.array_equal(decoded[..., -1], pixels[..., -1])


@pytest.mark.parametrize("components", [2, 4])
def test_jpeg_refuses_alpha(picture, tmp_path, components):
    save_image(tmp_path / "a.png", picture(9, 9, components))
    with pytest.raises(ScoreError, match=r"a\.png: it has alpha"):
        Jpeg(10).code(tmp_path / "a.png")


def test_an_image_that_is_too_large_for_the_format_is_named(tmp_path):
    save_image(tmp_path / "a.png", np.zeros((1, 16_384, 1), np.uint8))
    with pytest.raises(ScoreError, match=r"a\.png: cannot be coded as WEBP \(.*16383"):
        WebP(10).code(tmp_path / "a.png")


# -------------------------------------------------------------------------------------- models


def test_a_model_of_audio_does_what_its_files_do(speech_wav, tmp_path):
    from vpcodec import Codec

    system = pickle.loads(pickle.dumps(Model("speech-3k")))
    assert system.name == "speech-3k" and system.modality == "audio"
    original, rate = load(speech_wav)
    source = tmp_path / "a.wav"
    save(source, np.stack([original[0, :20_000], original[0, 20_000:40_000]]), rate)
    coded = system.code(source)
    codec = Codec.from_pretrained("speech-3k", threads=1)
    codec.encode_file(source, tmp_path / "a.tok")
    codec.decode_file(tmp_path / "a.tok", tmp_path / "b.wav", subtype="FLOAT")
    assert coded.n_bytes == os.path.getsize(tmp_path / "a.tok")
    assert np.array_equal(coded.tokens, read_tokens(tmp_path / "a.tok")[0])
    assert np.array_equal(coded.signal, load(tmp_path / "b.wav")[0])
    assert coded.rate == rate and coded.signal.shape == (2, 20_000) and len(coded.tokens) == 2
    assert likeness(original[0, :20_000], coded.signal[0], rate) > 0.5
    assert system.identity == f"{codec.fingerprint.hex()} onnx"
    assert system.codebook_size == codec.codebook_size
    pickle.dumps(system)  # also after it was used


@pytest.mark.parametrize("components", [1, 2, 3, 4])
def test_a_model_of_images_keeps_the_layout(picture, tmp_path, components):
    system = build_system("model:image-fsp")
    pixels = picture(24, 41, components)
    if components in (2, 4):
        pixels[..., -1] = 254  # which may come back as opaque
    save_image(tmp_path / "a.png", pixels)
    coded = system.code(tmp_path / "a.png")
    assert system.modality == "image" and coded.rate is None
    assert coded.signal.shape == pixels.shape and coded.signal.dtype == np.uint8
    assert coded.tokens.shape == (2 - components % 2, 3 * 6)
    assert coded.n_bytes > 0
    if components in (2, 4):
        assert coded.signal[..., -1].min() > 230


def test_consistency_is_the_share_of_tokens_that_coding_again_keeps(speech_wav):
    from vpcodec import Codec

    system = build_system("model:speech-3k")
    coded = system.code(speech_wav)
    codec = Codec.from_pretrained("speech-3k")
    again = codec.encode(coded.signal, coded.rate)
    share = system.consistency(coded)
    assert share == np.mean(again == coded.tokens) and 0.1 < share < 0.9
    same = replace(coded, signal=load(speech_wav)[0])  # as if nothing had been lost
    assert system.consistency(same) == 1
    assert build_system("codec:opus@6k").consistency(coded) is None
    assert build_system("lossy:5%:speech-3k").consistency(replace(coded, tokens=None)) is None


def test_a_model_may_be_a_folder_with_the_name_of_another(tmp_path, monkeypatch):
    shutil.copytree(open_model("image-fsp").path, tmp_path / "speech-3k")
    monkeypatch.chdir(tmp_path)
    system = Model("./speech-3k")
    save_image("a.png", np.zeros((8, 8, 3), np.uint8))
    assert system.modality == "image" and system.code(Path("a.png")).signal.shape == (8, 8, 3)


def test_a_model_that_cannot_be_used_is_refused():
    with pytest.raises(ModelError, match="no-such-model"):
        build_system("model:no-such-model")
    with pytest.raises(ScoreError, match=r"'gpu'.*onnx"):
        build_system("model:speech-3k", backend="gpu")
    with pytest.raises(ValueError, match="no system"):
        build_system("tape:speech-3k")


# -------------------------------------------------------------------------------- decoded files


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Callable[..., None]:
    """Makes files of audio or images, each a little longer than the one before."""
    monkeypatch.chdir(tmp_path)
    count = 0

    def make(*names: str) -> None:
        nonlocal count
        for name in names:
            count += 1
            path = Path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".png":
                save_image(path, np.zeros((3, count, 3), np.uint8))
            else:
                save(path, np.zeros((1, 100 + count), np.float32), 8_000)

    return make


def paths(*names: str) -> list[Path]:
    return [Path(name) for name in names]


def test_files_are_matched_by_path_and_then_without_the_suffix(tree):
    tree("ref/a.flac", "ref/b.wav", "ref/sub/a.wav", "ref/sub/c.wav", "ref/d.e.wav", "ref/x.png")
    tree("deg/a.wav", "deg/b.wav", "deg/b.flac", "deg/sub/a.ogg", "deg/d.e.flac", "deg/d.wav")
    tree("deg/a.png", "deg/x.png", "deg/c.wav")
    found = pair_files(Path("ref"), Path("deg"))
    assert {str(original): str(other) for original, other in found.found.items()} == {
        "ref/a.flac": "deg/a.wav",
        "ref/b.wav": "deg/b.wav",
        "ref/d.e.wav": "deg/d.e.flac",
        "ref/sub/a.wav": "deg/sub/a.ogg",
        "ref/x.png": "deg/x.png",
    }
    assert list(found.found) == sorted(found.found)
    assert found.missing == paths("ref/sub/c.wav") and not found.unclear
    assert sorted(found.extra) == paths("deg/a.png", "deg/b.flac", "deg/c.wav", "deg/d.wav")
    system = Decoded(Path("deg"), Path("ref"))
    assert system.name == "deg" and system.modality is None and system.codebook_size is None
    for original, other in found.found.items():
        expected = load_image(other) if other.suffix == ".png" else load(other)[0]
        coded = system.code(original)
        assert np.array_equal(coded.signal, expected)
        assert coded.n_bytes is None and coded.tokens is None
        assert system.files(original) == [other]
    with pytest.raises(ScoreError, match=r"^ref/sub/c\.wav: no counterpart in deg$"):
        system.code(Path("ref/sub/c.wav"))
    assert system.files(Path("ref/sub/c.wav")) == []


def test_two_files_for_one_original_are_an_error_of_that_file(tree):
    tree("ref/a.flac", "ref/b.flac", "deg/a.wav", "deg/a.ogg", "deg/b.wav")
    system = build_system("folder:deg", references=Path("ref"))
    assert list(system.pairs.unclear) == paths("ref/a.flac")
    with pytest.raises(ScoreError, match=r"^ref/a\.flac: deg/a\.ogg and deg/a\.wav differ"):
        system.code(Path("ref/a.flac"))
    assert system.code(Path("ref/b.flac")).signal.size
    assert not system.pairs.missing and not system.pairs.extra


def test_two_originals_for_one_file_are_an_error_of_both(tree):
    tree("ref/a.flac", "ref/a.ogg", "ref/b.flac", "ref/b.wav", "deg/a.wav", "deg/b.wav")
    system = Decoded(Path("deg"), Path("ref"))
    for name in ("ref/a.flac", "ref/a.ogg"):
        with pytest.raises(ScoreError, match=r"ref/a\.flac and ref/a\.ogg differ"):
            system.code(Path(name))
    assert system.pairs.found == {Path("ref/b.wav"): Path("deg/b.wav")}
    assert system.pairs.missing == paths("ref/b.flac")  # the only file has its own original


def test_the_rate_may_be_another(tree):
    tree("ref/a.wav", "deg/a.wav")
    save("deg/a.wav", noise(2, 480), 48_000)
    coded = Decoded(Path("deg"), Path("ref")).code(Path("ref/a.wav"))
    assert coded.rate == 48_000 and coded.signal.shape == (2, 480)


def test_single_files_need_not_have_the_same_name(tree):
    tree("one.wav", "other.flac", "deg/one.flac", "deg/two.flac")
    for references, decoded in [("one.wav", "other.flac"), ("one.wav", "deg")]:
        system = Decoded(Path(decoded), Path(references))
        assert system.name == decoded
        expected = load(decoded if decoded != "deg" else "deg/one.flac")[0]
        assert np.array_equal(system.code(Path("one.wav")).signal, expected)
    assert Decoded(Path("deg"), Path("one.wav")).pairs.extra == paths("deg/two.flac")


def test_a_folder_against_itself(tree):
    tree("ref/a.wav", "ref/a.flac", "ref/b.png")
    pairs = Decoded(Path("ref"), Path("ref")).pairs
    assert len(pairs.found) == 3 and all(a == b for a, b in pairs.found.items())


@pytest.mark.parametrize(
    ("references", "decoded", "message"),
    [
        ("ref", "nowhere", "nowhere: no such file or folder"),
        ("nowhere", "ref", "nowhere: no such file or folder"),
        ("ref", "one.wav", "one.wav: one file, but ref is a folder"),
        ("ref", "strangers", "strangers: no audio or image in it has the name of an original"),
        ("ref", "tokens", "tokens: no audio or image in it has the name of an original"),
        ("tokens", "ref", "tokens: no audio or image in it"),
    ],
)
def test_what_cannot_be_matched_at_all_is_refused(tree, references, decoded, message):
    tree("ref/a.wav", "one.wav", "strangers/b.wav", "strangers/a.png")
    Path("tokens").mkdir()
    Path("tokens/a.tok").write_bytes(b"")
    with pytest.raises(ScoreError, match=f"^{message}$"):
        Decoded(Path(decoded), Path(references))


def test_errors_of_a_system_name_the_file():
    class Failing(System):
        name, spec, kind, identity = "failing", "", None, "1"

        def _code(self, source):
            raise OSError(28, "No space left on device", "/tmp/x")

    with pytest.raises(ScoreError, match="^a.wav: No space left on device$"):
        Failing().code(Path("a.wav"))


# -------------------------------------------------------------------------------- published sizes


@pytest.mark.parametrize(
    ("system", "key"),
    [
        pytest.param(Opus(6_000), "opus_6k", marks=need_opus),
        pytest.param(Opus(8_000), "opus_8k", marks=need_opus),
        pytest.param(Codec2("3200"), "codec2_3200", marks=need_codec2),
    ],
)
def test_bit_rates_are_those_measured_elsewhere(shared_data, system, key):
    peers = json.loads((shared_data / "peers_dev.json").read_text())
    for row in [row for row in peers if row["codec"] == key][:3]:
        source = shared_data / "speech_dev" / row["file"]
        original, rate = load(source)
        coded = system.code(source)
        assert 8 * coded.n_bytes / (original.shape[1] / rate) == pytest.approx(row["bps"])
        if key != "codec2_3200":
            assert coded.rate == rate and coded.signal.shape == original.shape
            assert find_delay(original[0], coded.signal[0], rate) == row["lag"]
