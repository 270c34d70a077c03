"""Nothing that is sound is refused, and nothing of it is lost: files as they come.

The inputs are made here, in the way that the files of ../shared/cases came about; those are read
too, where they are.
"""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import SHARED
from sounds import M4A, noise, sound
from test_audio import assert_refused, chunk, read_pipe, wav

from vpcodec.media.audio import AudioError, AudioReader, PartialAudioError, load
from vpcodec.media.audio import ffmpeg as ffmpeg_module
from vpcodec.media.audio import reader as reader_module
from vpcodec.media.audio.flac import crc16, parse_head
from vpcodec.media.audio.mp3 import parse_header
from vpcodec.media.audio.ogg import make_page, read_pages
from vpcodec.media.audio.stream import ByteStream
from vpcodec.media.image import load_image

CASES = SHARED / "cases"
needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="compares with ffmpeg, which is not installed"
)


def length(path: Path, data: bytes, *, piped: bool = True, **options) -> int:
    """Samples that are read from a file of these bytes, and from a pipe."""
    path.write_bytes(data)
    with AudioReader(path, **options) as reader:
        samples = [block.shape[1] for block in reader.blocks(4567)]
        assert reader.n_samples in (None, sum(samples))
    if piped:
        assert read_pipe(data, **options)[0].shape[1] == sum(samples)
    return sum(samples)


# ------------------------------------------------------------------------------------ shared cases


@pytest.mark.skipif(not CASES.is_dir(), reason=f"no {CASES}")
@pytest.mark.parametrize(
    ("name", "n_samples"),  # as ffmpeg decodes them, where it can
    [
        ("01_two_mp3_concatenated_xing.mp3", 121_007),
        ("04_chained.opus", 129_751),  # ffmpeg: twice as many, at 48 kHz
        ("07_flac_more_samples_than_streaminfo.flac", 109_487),
        ("08_wav_data_size_0_riff_size_right.wav", 16_000),
        ("09_wav_24_bits_in_4_byte_container.wav", 16_000),
        ("10_mp3_in_wav_vbr.wav", 120_384),
        ("11_w64_from_ffmpeg_pipe.w64", 119_208),
        ("13_mp3_zeros_in_front.mp3", 89_856),
        ("15_mp3_zeros_behind.mp3", 89_856),
        ("23_score_ref.wav", 86_500),
    ],
)
def test_cases_are_read_to_their_ends(tmp_path, name, n_samples):
    assert length(tmp_path / "x", (CASES / name).read_bytes()) == n_samples


@pytest.mark.skipif(not CASES.is_dir(), reason=f"no {CASES}")
def test_cases_that_are_refused_or_pictures():
    assert_refused(CASES / "02_mp3_mono_then_stereo.mp3", "changes from 1 to 2 channels at 4.08 s")
    for name in ("20_png_bad_crc_in_comment.png", "21_photo.avif"):
        assert load_image(CASES / name).ndim == 3


@needs_ffmpeg
@pytest.mark.skipif(not CASES.is_dir(), reason=f"no {CASES}")
@pytest.mark.parametrize("number", ["01", "07", "08", "09", "10", "13", "15"])
def test_cases_have_the_samples_that_ffmpeg_decodes(number):
    (path,) = CASES.glob(f"{number}_*")
    command = ["ffmpeg", "-v", "quiet", "-i", path, "-c:a", "pcm_s16le", "-f", "s16le", "-"]
    decoded = subprocess.run(command, capture_output=True, check=True).stdout
    assert load(path)[0].size == len(decoded) // 2


# --------------------------------------------------------------------------------------------- MP3


def frames(data: bytes) -> list[bytes]:
    """The frames of an MP3 without tags."""
    found, at = [], 0
    while (header := parse_header(data, at)) is not None:
        found.append(data[at : at + header.length])
        at += header.length
    assert at == len(data)
    return found


MP3 = sound("MP3", 100_000)
PLAIN = b"".join(frames(MP3)[1:])  # without the frame that says how long it is
N_PLAIN = 1152 * len(frames(PLAIN))
ID3_FOOTER = b"ID3\4\0\x10\0\0\1\0" + bytes(128) + b"3DI\4\0\x10\0\0\1\0"
ID3V2 = b"ID3\3\0\0\0\0\1\0" + bytes(128)
ID3V1 = b"TAG" + b"title".ljust(125, b"\0")
APE_BODY = struct.pack("<II", 4, 0) + b"Title\0abcd"
APE = b"".join(
    b"APETAGEX" + struct.pack("<IIII8x", 2000, len(APE_BODY) + 32, 1, flags) + body
    for flags, body in ((0xA0000000, APE_BODY), (0x80000000, b""))
)
LYRICS = b"LYRICSBEGININD0000200EAL00003abc000028LYRICS200"
JUNK = b"Dear diary, this is no MPEG audio. " * 40


def test_an_mp3_has_the_samples_that_went_in(tmp_path):
    assert length(tmp_path / "x.mp3", MP3) == 100_000
    assert length(tmp_path / "x.mp3", PLAIN) == N_PLAIN


@pytest.mark.parametrize("name", ["x.mp3", "x", "x.wav"])
@pytest.mark.parametrize("front", [bytes(3000), JUNK, ID3V2, ID3_FOOTER, ID3V2 + bytes(700)])
def test_what_stands_in_front_of_an_mp3(tmp_path, front, name):
    assert length(tmp_path / name, front + PLAIN) == N_PLAIN
    assert length(tmp_path / name, front + MP3) == 100_000


@pytest.mark.parametrize(
    "end",
    [bytes(3000), JUNK, ID3V1, APE, LYRICS + ID3V1, APE + ID3V1, ID3V2, ID3_FOOTER, b"TAG+"]
    + [bytes(500) + ID3V1, JUNK + APE, b"TAG+".ljust(227, b"x") + ID3V1, b"\xff", b"\xff\xfb"],
)
def test_what_stands_behind_an_mp3(tmp_path, end):
    assert length(tmp_path / "x.mp3", PLAIN + end) == N_PLAIN
    assert length(tmp_path / "x.mp3", MP3 + end) == 100_000


@pytest.mark.parametrize("between", [b"", ID3V1, ID3V2, APE, ID3V1 + ID3V2, LYRICS + ID3V1 + ID3V2])
def test_concatenated_mp3_is_read_to_its_end(tmp_path, between):
    assert length(tmp_path / "x.mp3", PLAIN + between + PLAIN + between) == 2 * N_PLAIN
    # The delay of the first is taken off; headers of others are silent, or lost behind a tag.
    expected = 2 * N_PLAIN - 1105 + (0 if between else 1152)
    assert length(tmp_path / "x.mp3", MP3 + between + MP3) == expected


def test_a_long_mp3_with_a_short_one_behind_it_gives_both(tmp_path):
    short = b"".join(frames(PLAIN)[:3])
    padding = N_PLAIN - 1105 - 100_000
    assert 0 < padding < 3 * 1152
    n_samples = length(tmp_path / "x.mp3", MP3 + short, piped=False)
    assert n_samples == 100_000 + 3 * 1152  # the padding goes: so little behind is no second file
    assert read_pipe(MP3 + short)[0].shape[1] == n_samples + padding  # a pipe cannot know


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": 2}, "from 1 to 2 channels at 2."),
        ({"rate": 44_100}, "from 48000 to 44100 Hz at 2."),
        ({"rate": 22_050}, "from 48000 to 22050 Hz at 2."),
    ],
)
def test_mp3_that_changes_is_refused(tmp_path, options, words):
    other = sound("MP3", 50_000, **options)
    for first, second in ((PLAIN, b"".join(frames(other)[1:])), (MP3, ID3V2 + other)):
        (tmp_path / "x.mp3").write_bytes(first + second)
        assert_refused(tmp_path / "x.mp3", words, "split it")


def test_mp3_that_is_damaged_in_the_middle(tmp_path):
    path = tmp_path / "x.mp3"
    half = len(frames(PLAIN)) // 2
    before, after = frames(PLAIN)[:half], frames(PLAIN)[half:]
    path.write_bytes(b"".join(before) + JUNK + b"".join(after))
    assert_refused(path, "damaged after 1.", "1,400 bytes")
    assert length(path, path.read_bytes(), truncated="keep") == N_PLAIN


def test_mp3_cut_short_says_how_much_is_there(tmp_path):
    path = tmp_path / "x.mp3"
    path.write_bytes(MP3[: len(MP3) // 2])
    assert_refused(path, "truncated: it ends at sample", f"of {N_PLAIN:,}")
    path.write_bytes(b"".join(frames(MP3)[:-1]))  # at the end of a frame
    assert_refused(path, f"truncated: it ends at sample {N_PLAIN - 1152:,} of {N_PLAIN:,}")
    path.write_bytes(PLAIN[:-10])
    assert_refused(path, "truncated: its last frame has", f"behind {N_PLAIN - 1152:,} samples")
    assert length(path, PLAIN[:-10], truncated="keep") == N_PLAIN - 1152
    assert length(path, MP3[:-10], truncated="keep") == N_PLAIN - 1152 - 1105


@pytest.mark.parametrize("tag", [0x55, 0x50])
def test_mp3_in_wav(tmp_path, tag):
    options = {"tag": tag, "bits": 0, "rate": 48_000, "fmt": b"\0\0"}
    data = wav(PLAIN, **options, after=chunk(b"LIST", b"INFO"))
    assert length(tmp_path / "x.wav", data) == N_PLAIN
    data = wav(PLAIN, **options, size=0xFFFFFFFF)
    assert length(tmp_path / "x.wav", data) == N_PLAIN
    (tmp_path / "x.wav").write_bytes(wav(PLAIN, **options)[:-1000])
    assert_refused(tmp_path / "x.wav", "truncated")


# --------------------------------------------------------------------------------------------- Ogg


def pages(data: bytes) -> list[bytes]:
    return [page.data for page in read_pages(ByteStream(io.BytesIO(data), on_disk=False))]


OGG = {"VORBIS": 30_001, "OPUS": 30_001}


@pytest.mark.parametrize("subtype", OGG)
def test_chained_ogg_is_read_to_its_end(tmp_path, subtype):
    parts = [sound("OGG", n, subtype=subtype) for n in (30_001, 1, 20_000)]
    assert length(tmp_path / "x.ogg", b"".join(parts)) == 50_002
    assert length(tmp_path / "x.ogg", parts[0] * 3) == 90_003  # with equal serial numbers


@pytest.mark.parametrize(
    "other",
    [
        sound("OGG", 9_000, subtype="VORBIS", channels=2),
        sound("OGG", 9_000, subtype="VORBIS", rate=16_000),
        sound("OGG", 9_000, subtype="OPUS"),
    ],
)
def test_ogg_chain_that_changes_is_refused(tmp_path, other):
    (tmp_path / "x.ogg").write_bytes(sound("OGG", 9_000, subtype="VORBIS") + other)
    assert_refused(tmp_path / "x.ogg", "chain that changes from VORBIS of 1 channels", "split it")


@pytest.mark.parametrize("subtype", OGG)
def test_ogg_pages_that_are_damaged_missing_or_cut_off(tmp_path, subtype):
    path, whole = tmp_path / "x.ogg", pages(sound("OGG", 200_000, subtype=subtype))
    assert len(whole) > 5
    path.write_bytes(b"".join(whole[:3] + whole[4:]))
    assert_refused(path, "damaged: after Ogg page 2 comes 4")
    spoilt = bytearray(whole[3])
    spoilt[-5] ^= 1
    path.write_bytes(b"".join([*whole[:3], spoilt, *whole[4:]]))
    assert_refused(path, "damaged: the checksum of the Ogg page at byte")
    path.write_bytes(b"".join([*whole[:3], b"junk", *whole[3:]]))
    assert_refused(path, "damaged: there is no Ogg page at byte")
    path.write_bytes(b"".join([*whole, whole[-1]]))
    assert_refused(path, "damaged: an Ogg page follows the last one")
    path.write_bytes(b"".join(whole[:-1]))
    assert_refused(path, "truncated: behind sample")
    kept = length(path, b"".join(whole[:-1]), truncated="keep")
    path.write_bytes(b"".join(whole)[:-7])
    assert_refused(path, "truncated")
    assert length(path, b"".join(whole)[:-7], truncated="keep") == kept > 100_000


def test_what_stands_behind_ogg(tmp_path):
    data = sound("OGG", 9_000, subtype="VORBIS")
    for end in (ID3V1, bytes(2000)):
        assert length(tmp_path / "x.ogg", data + end) == 9_000


def test_ogg_beside_other_streams(tmp_path):
    """A stream of something else between the pages of audio is left out; two of audio are not."""
    path = tmp_path / "x.ogg"
    first, *rest = pages(sound("OGG", 9_000, subtype="VORBIS"))
    head, body = make_page(2, 0, 77, 0, b"fishead\0"), make_page(0, 5, 77, 1, b"bones")
    assert length(path, first + head + rest[0] + body + b"".join(rest[1:])) == 9_000
    path.write_bytes(first + b"".join(pages(sound("OGG", 9_000, subtype="OPUS"))[:1]) + rest[0])
    assert_refused(path, "2 audio streams, where one is wanted")


# -------------------------------------------------------------------------------------------- FLAC


def with_length(flac: bytes, n_samples: int) -> bytes:
    """A FLAC file whose header tells another number of samples."""
    out = bytearray(flac)
    out[21] = out[21] & 0xF0 | n_samples >> 32
    out[22:26] = (n_samples & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(out)


def flac_frames(flac: bytes) -> tuple[bytes, bytes]:
    """What is before the first frame, and the frames."""
    at = next(at for at in range(42, len(flac)) if parse_head(flac, at))
    return flac[:at], flac[at:]


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_flac_with_more_samples_than_its_header_tells(tmp_path, subtype):
    flac = sound("FLAC", 40_000, subtype=subtype)
    for n_samples in (0, 1, 12_345, 39_999, 40_000):
        assert length(tmp_path / "x.flac", with_length(flac, n_samples)) == 40_000
    (tmp_path / "x.flac").write_bytes(with_length(flac, 50_000))
    assert_refused(tmp_path / "x.flac", "ends at sample 40,000 of 50,000")


def test_flac_frames_that_start_again_are_read(tmp_path):
    one, other = sound("FLAC", 40_000), sound("FLAC", 12_288)
    assert length(tmp_path / "x.flac", one + flac_frames(other)[1]) == 52_288
    assert read_pipe(one + flac_frames(one)[1])[0].shape[1] == 80_000
    (tmp_path / "x.flac").write_bytes(one + flac_frames(one)[1])  # its last frame seems to fit
    with pytest.raises(AudioError, match="only 40,000 of 80,000 samples can be read"):
        load(tmp_path / "x.flac")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rate": 44_100}, "from 48000 to 44100 Hz at 0.8"),
        ({"channels": 2}, "from 1 to 2 channels at 0.8"),
        ({"subtype": "PCM_24"}, "from 16 to 24 bits at 0.8"),
    ],
)
def test_flac_that_changes_is_refused(tmp_path, options, words):
    other = flac_frames(sound("FLAC", 20_000, **options))[1]
    for n_samples in (0, 40_000, 60_000):
        data = with_length(sound("FLAC", 40_000), n_samples) + other
        (tmp_path / "x.flac").write_bytes(data)
        assert_refused(tmp_path / "x.flac", words, "split it")


def test_concatenated_flac_is_refused(tmp_path):
    (tmp_path / "x.flac").write_bytes(sound("FLAC", 40_000) * 2)
    assert_refused(tmp_path / "x.flac")


@pytest.mark.parametrize("n_samples", [0, 40_000])
def test_what_stands_around_flac(tmp_path, n_samples):
    flac = with_length(sound("FLAC", 40_000), n_samples)
    for front, end in ((ID3V2, b""), (b"", ID3V1), (ID3V2 * 2, ID3V1)):
        assert length(tmp_path / "x.flac", front + flac + end) == 40_000
    assert length(tmp_path / "x.flac", flac + APE, piped=False) == 40_000


@pytest.mark.parametrize("cut", [1, 2, 100, 20_000])
@pytest.mark.parametrize("n_samples", [0, 40_000])
def test_flac_cut_short(tmp_path, n_samples, cut):
    path = tmp_path / "x.flac"
    path.write_bytes(with_length(sound("FLAC", 40_000), n_samples)[:-cut])
    assert_refused(path, "truncated")
    n_whole = (40_000 - 1) // 4096 * 4096 if cut < 20_000 else None
    kept = length(path, path.read_bytes(), truncated="keep")
    assert kept == n_whole if n_whole else kept % 4096 == 0 and kept > 20_000


def test_crc_of_frames():
    head, body = flac_frames(sound("FLAC", 4096))
    assert crc16(body) == 0 and crc16(body[:-1]) != 0 and parse_head(head) is None


# --------------------------------------------------------------------------- WAV and other chunks


def test_second_data_chunk_is_read_from_files_and_refused_from_pipes(tmp_path):
    first, second = b"\1\0" * 1000, b"\2\0" * 500
    for between in (b"", chunk(b"LIST", b"INFO")):
        data = wav(first, after=between + chunk(b"data", second))
        assert length(tmp_path / "x.wav", data, piped=False) == 1500
        samples = load(tmp_path / "x.wav")[0][0] * 32768
        np.testing.assert_array_equal(samples, [1] * 1000 + [2] * 500)
        with pytest.raises(AudioError, match="more audio follows"):
            read_pipe(data)
    (tmp_path / "x.wav").write_bytes(wav(first, after=chunk(b"data", second)[:-10]))
    with pytest.raises(AudioError, match="it ends at sample 1,495 of 1,500"):
        load(tmp_path / "x.wav")


@pytest.mark.parametrize("align", [1, 2])
def test_chunks_behind_audio_of_odd_size(tmp_path, align):
    data = b"\x80" * 999 + (b"\0" if align == 2 else b"")  # some leave out the zero that is due
    whole = wav(data, size=999, bits=8, after=chunk(b"LIST", b"INFO") + chunk(b"data", b"\x80" * 7))
    assert length(tmp_path / "x.wav", whole, piped=False) == 1006


@pytest.mark.parametrize("after", [JUNK, wav(b"\1\0" * 100), b"\1\0" * 50])
def test_bytes_behind_wav_that_nothing_accounts_for(tmp_path, after):
    path = tmp_path / "x.wav"
    path.write_bytes(wav(b"\1\0" * 1000) + after)
    assert_refused(path, "behind its audio, at byte 2,044")
    assert length(path, path.read_bytes(), truncated="keep") == 1000


@pytest.mark.parametrize("after", [b"", b"?", bytes(5000), ID3V1, APE, chunk(b"id3 ", b"ID3")])
def test_what_may_stand_behind_wav(tmp_path, after):
    assert length(tmp_path / "x.wav", wav(b"\1\0" * 1000) + after) == 1000


@pytest.mark.parametrize("riff", [None, 0, 36, 0xFFFFFFFF])
def test_data_size_0_with_audio_behind_it(tmp_path, riff):
    data = noise(1, 5000).astype("<f4").tobytes()
    whole = wav(data, size=0, riff=riff, tag=3, bits=32)
    assert length(tmp_path / "x.wav", whole) == 5000
    empty = wav(b"", size=0, riff=riff, after=chunk(b"LIST", b"INFO" * 100))
    assert length(tmp_path / "x.wav", empty) == 0


SIZES = (0x7EFFFFF0, 0x7F800000, 0x80000000, 0x90000000, 0xFFFE0000, 0xFFFFF000 - 0x10000)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_near_2_and_4_gib_are_meant(tmp_path, size):
    path = tmp_path / "x.wav"
    info = chunk(b"LIST", b"INFOISFT" + bytes(1000))
    with open(path, "wb") as file:  # sparse: takes no room
        riff = min(0xFFFFFFFF, 36 + size + len(info))
        file.write(wav(b"", size=size, riff=riff, channels=2, rate=192_000))
        file.seek(size, os.SEEK_CUR)
        file.write(info)
    with AudioReader(path) as reader:
        assert reader.n_samples == size // 4
    os.truncate(path, size // 2)
    with pytest.raises(AudioError, match=f"truncated: .* of {size // 4:,}"):
        AudioReader(path)


@pytest.mark.parametrize("size", [0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFDB])
@pytest.mark.parametrize("riff", [0, 36, 0xFFFFFFFF])
def test_sizes_that_programs_write_into_pipes(tmp_path, size, riff):
    data = b"\1\0" * 1000
    whole = wav(data, size=size, riff=min(0xFFFFFFFF, size + 36) if riff == 36 else riff)
    assert length(tmp_path / "x.wav", whole) == 1000


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("extensible", [True, False])
def test_24_bits_in_4_bytes(tmp_path, upper, extensible):
    values = np.random.default_rng(0).integers(-(2**23), 2**23, 5000)
    values[:3000] = 0
    data = (values << 8 if upper else values).astype("<i4").tobytes()
    fmt = b""
    if extensible:
        fmt = struct.pack("<HHIH", 22, 24, 0, 1) + bytes.fromhex("000000001000800000aa00389b71")
    whole = bytearray(wav(data, tag=0xFFFE if extensible else 1, bits=32, fmt=fmt))
    whole[34:36] = b"\x18\0"
    (tmp_path / "x.wav").write_bytes(whole)
    expected = values / 2**23
    np.testing.assert_allclose(load(tmp_path / "x.wav")[0][0], expected, atol=1e-7)
    np.testing.assert_allclose(read_pipe(bytes(whole))[0][0], expected, atol=1e-7)


@pytest.mark.parametrize("after", [b"", chunk(b"LIST", b"INFO")])
def test_millions_of_empty_chunks(tmp_path, after):
    empty = chunk(b"JUNK", b"") * 200_000
    for data in (wav(b"", before=empty), wav(b"", after=empty)):
        (tmp_path / "x.wav").write_bytes(data + after)
        assert_refused(tmp_path / "x.wav", "more than 10000 chunks")


def streamed(format: str, subtype: str, sizes: dict) -> bytes:
    """A file as a program writes it to a pipe: without sizes."""
    data = bytearray(sound(format, 5000, subtype=subtype))
    for place, value in sizes.items():
        name, offset = place if isinstance(place, tuple) else (b"", place)
        at = data.index(name) + offset
        data[at : at + len(value)] = value
    return bytes(data)


HUGE = b"\xff" * 7 + b"\x7f"
UNKNOWN_SIZES = {  # where sizes are, in the file or in a chunk
    "AIFF": {4: bytes(4), (b"COMM", 10): bytes(4), (b"SSND", 4): bytes(4)},
    "AU": {8: b"\xff" * 4},
    "CAF": {(b"data", 4): b"\xff" * 8},
    "W64": {16: HUGE, (b"data", 16): HUGE},
}


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "ULAW", "FLOAT"])
@pytest.mark.parametrize("format", UNKNOWN_SIZES)
def test_formats_as_they_come_out_of_pipes(tmp_path, format, subtype):
    expected, _ = sf.read(io.BytesIO(sound(format, 5000, subtype=subtype)), dtype="float32")
    data = streamed(format, subtype, UNKNOWN_SIZES[format])
    assert data != sound(format, 5000, subtype=subtype)
    (tmp_path / "x").write_bytes(data)
    samples, rate = load(tmp_path / "x")
    assert rate == 48_000 and samples.shape[1] - len(expected) in range(5)  # chunks are even
    np.testing.assert_array_equal(samples[0, :5000], expected)
    np.testing.assert_array_equal(read_pipe(data)[0], samples)


@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("format", ["AIFF", "AU", "CAF", "W64"])
@pytest.mark.parametrize("endian", ["FILE", "LITTLE", "BIG"])
def test_containers_read_as_libsndfile_reads_them(tmp_path, format, subtype, endian):
    if not sf.check_format(format, subtype, endian):
        pytest.skip(f"{format} has no {subtype} in that order")
    file = io.BytesIO()
    options = {"format": format, "subtype": subtype, "endian": endian}
    sf.write(file, noise(2, 999).T, 22_050, **options)
    expected, rate = sf.read(io.BytesIO(file.getvalue()), dtype="float32")
    samples, reader = read_pipe(file.getvalue())
    np.testing.assert_array_equal(samples, expected.T)
    assert (reader.sample_rate, reader.format, reader.subtype) == (rate, format, subtype)


@pytest.mark.parametrize("format", ["AIFF", "CAF", "W64"])
def test_containers_with_bytes_that_nothing_accounts_for(tmp_path, format):
    (tmp_path / "x").write_bytes(sound(format, 5000) + b"\1\2\3\4" * 100)
    assert_refused(tmp_path / "x", "behind its audio")


@pytest.mark.parametrize("format", ["WAV", "AIFF", "AU", "CAF", "W64", "FLAC"])
def test_cut_short_files_tell_counts_and_can_be_kept(tmp_path, format):
    path = tmp_path / "x"
    path.write_bytes(sound(format, 5000)[:-1000])
    assert_refused(path, "truncated: it ends at sample 4,", "of 5,000")
    with AudioReader(path, truncated="keep") as reader:
        n_samples = sum(block.shape[1] for block in reader.blocks(100))
        assert reader.cut.startswith("truncated") and 4000 < n_samples < 5000


def test_what_can_be_kept_has_an_error_of_its_own(tmp_path):
    for data in (sound("WAV")[:-9], sound("WAV") + JUNK, PLAIN[:-9], sound("OGG")[:-9]):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(PartialAudioError, match=f"^{tmp_path}/x: "):
            load(tmp_path / "x")


def test_whole_files_are_not_said_to_be_cut(tmp_path):
    (tmp_path / "x").write_bytes(sound("WAV"))
    with AudioReader(tmp_path / "x", truncated="keep") as reader:
        assert sum(block.shape[1] for block in reader.blocks(1000)) == 40_000
        assert reader.cut is None and reader.n_samples == 40_000
    with pytest.raises(ValueError, match="'maybe', not one of refuse, keep"):
        AudioReader(tmp_path / "x", truncated="maybe")


# ------------------------------------------------------------------------------------------- pipes


class Endless(io.RawIOBase):
    """A pipe without an end, of which at most `limit` bytes may be read."""

    def __init__(self, head: bytes = b"", limit: int = 2**20) -> None:
        self._rng, self._left, self._head = np.random.default_rng(0), limit, head

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        n = min(len(buffer), 4096)
        self._left -= n
        assert self._left > 0, "too much was read"
        data = (self._head + self._rng.bytes(n))[:n]
        self._head = self._head[n:]
        buffer[:n] = data
        return n


def test_a_pipe_that_is_no_audio_is_refused_after_its_first_bytes():
    with pytest.raises(AudioError, match="stdin: not an audio file"):
        AudioReader(io.BufferedReader(Endless()))


@pytest.mark.parametrize("head", [b"NIST_1A\n   1024\n", b"\0\0\0\x20ftypM4A ", b"#!AMR\n"])
def test_a_pipe_that_has_to_be_kept_is_bounded(monkeypatch, head):
    monkeypatch.setattr(reader_module, "MAX_SPOOL", 2**18)
    with pytest.raises(AudioError, match="through a pipe, in a format that cannot be read as it"):
        AudioReader(io.BufferedReader(Endless(head)))


@pytest.mark.parametrize(
    "data",
    [
        sound("FLAC", 480_000),
        sound("OGG", 480_000, subtype="VORBIS"),
        sound("OGG", 480_000, subtype="OPUS"),
        sound("MP3", 480_000),
        sound("AIFF", 480_000),
        sound("CAF", 480_000),
        sound("AU", 480_000),
    ],
    ids=["flac", "vorbis", "opus", "mp3", "aiff", "caf", "au"],
)
def test_live_pipes_give_samples_as_they_come(data):
    reading, writing = os.pipe()
    with open(reading, "rb") as source, open(writing, "wb", 0) as pipe:
        may_go_on = threading.Event()

        def write() -> None:
            pipe.write(data[: len(data) // 2])
            assert may_go_on.wait(60)
            pipe.write(data[len(data) // 2 :])
            pipe.close()

        writer = threading.Thread(target=write)
        writer.start()
        with AudioReader(source) as reader:
            blocks = reader.blocks(4800)
            n_samples = sum(next(blocks).shape[1] for _ in range(30))  # the rest is not written yet
            may_go_on.set()
            assert n_samples + sum(block.shape[1] for block in blocks) == 480_000
        writer.join()


# ------------------------------------------------------------------------------------------ ffmpeg

MAGIC = {
    "MP4": M4A,
    "Matroska or WebM": b"\x1aE\xdf\xa3" + bytes(200),
    "Windows Media": bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c") + bytes(200),
    "AMR": b"#!AMR\n" + bytes(200),
    "AAC": b"\xff\xf1\x50\x80" + bytes(200),
}


@pytest.fixture
def fake_ffmpeg(tmp_path, monkeypatch):
    """Puts a program called ffmpeg on the PATH, with the code that is given."""

    def install(code: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        header = wav(b"", size=0xFFFFFFFF, riff=0xFFFFFFFF, tag=3, bits=32)
        prelude = f"import os, sys, time\nout = sys.stdout.buffer\nheader = {header!r}\n"
        program = folder / "ffmpeg"
        program.write_text(f"#!{sys.executable}\n{prelude}{textwrap.dedent(code)}")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return folder

    return install


@pytest.mark.parametrize("name", MAGIC)
def test_ffmpeg_that_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "x.bin").write_bytes(MAGIC[name])
    assert_refused(tmp_path / "x.bin", f"{name} is read through ffmpeg", "not installed", "apt")


@pytest.mark.parametrize("name", MAGIC)
def test_ffmpeg_gives_the_samples(tmp_path, fake_ffmpeg, name):
    folder = fake_ffmpeg("""
        (source,) = (arg for arg in sys.argv if arg.startswith("file:"))
        with open("args", "w") as file:
            file.write("\\n".join([*sys.argv[1:], str(os.path.getsize(source[5:]))]))
        out.write(header + bytes(4 * 5000))
    """)
    os.chdir(folder)
    data = MAGIC[name]
    assert length(tmp_path / "-i;rm x", data) == 5000
    *args, size = (folder / "args").read_text().splitlines()
    assert int(size) == len(data)
    assert "-nostdin" in args and args[args.index("-protocol_whitelist") + 1] == "file"
    assert "-f" in args[: args.index("-i")]  # the format is told, not guessed


def test_ffmpeg_that_complains(tmp_path, fake_ffmpeg):
    fake_ffmpeg("""
        out.write(header + bytes(4 * 5000))
        print("[info] Stream #0:0: Audio: aac", file=sys.stderr)
        print("[mov @ 0x55] [error] stream 0, offset 0x33: partial file", file=sys.stderr)
    """)
    path = tmp_path / "x.m4a"
    path.write_bytes(M4A)
    assert_refused(path, "5,000 samples can be read", "partial file")
    assert length(path, M4A, truncated="keep") == 5000


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("sys.exit('[mov] [error] moov atom not found')", "(moov atom not found)"),
        ("sys.exit(7)", "(ffmpeg ended with 7)"),
        ("out.write(header + bytes(400)); sys.exit(3)", "(ffmpeg ended with 3)"),
        ("out.write(header + bytes(400)); out.flush(); os.kill(os.getpid(), 9)", "ended with -9"),
        ("sys.stderr.write('x' * 10_000_000); sys.exit(3)", "ended with 3"),
    ],
)
def test_ffmpeg_that_fails(tmp_path, fake_ffmpeg, code, words):
    fake_ffmpeg(code)
    (tmp_path / "x.m4a").write_bytes(M4A)
    assert_refused(tmp_path / "x.m4a", words)


@pytest.mark.parametrize("written", ["b''", "header", "header + bytes(400)"])
def test_ffmpeg_that_does_not_move_is_stopped(tmp_path, fake_ffmpeg, monkeypatch, written):
    monkeypatch.setattr(ffmpeg_module, "PATIENCE", 0.3)
    fake_ffmpeg(f"""
        out.write({written}); out.flush()
        with open({str(tmp_path / "pid")!r}, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)
    """)
    (tmp_path / "x.m4a").write_bytes(M4A)
    with pytest.raises(AudioError, match="ffmpeg did not move"):
        load(tmp_path / "x.m4a")
    if (tmp_path / "pid").exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text() or 2**22 - 1), 0)


def test_a_reader_that_stops_early_ends_ffmpeg(tmp_path, fake_ffmpeg):
    fake_ffmpeg("""
        out.write(header)
        while True:
            out.write(bytes(65536))
    """)
    (tmp_path / "x.m4a").write_bytes(M4A)
    with AudioReader(tmp_path / "x.m4a") as reader:
        child = reader._source._process._child
        assert next(reader.blocks(100)).shape == (1, 100)
        assert child.poll() is None
    assert child.poll() is not None


@needs_ffmpeg
@pytest.mark.parametrize("name", ["x.m4a", "x.aac", "x.webm", "x.wma", "x.mka", "x.mp4", "x.spx"])
def test_real_ffmpeg(tmp_path, speech_wav, name):
    path = tmp_path / name
    command = ["ffmpeg", "-v", "error", "-i", speech_wav, "-ar", "16000", path]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"this ffmpeg does not write {name}")
    with AudioReader(path) as reader:
        rate = reader.sample_rate
        n_samples = sum(block.shape[1] for block in reader.blocks(1000))
    assert 86_016 <= n_samples * 16_000 / rate < 90_000  # WMA leaves out its last block
    assert length(path, path.read_bytes()) == n_samples
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    if name not in ("x.mka", "x.webm"):  # which may end anywhere, as live streams
        with pytest.raises(AudioError):
            load(path)


# ------------------------------------------------------------------------------------- any of them

SEEDS = [
    sound(format, 3000, rate=16_000, **options)
    for format, options in [
        ("WAV", {}), ("FLAC", {}), ("OGG", {"subtype": "VORBIS"}), ("OGG", {"subtype": "OPUS"}),
        ("MP3", {}), ("AIFF", {}), ("AU", {}), ("CAF", {}), ("W64", {}), ("RF64", {}),
        ("WAV", {"subtype": "IMA_ADPCM"}), ("CAF", {"subtype": "ALAC_16"}),
    ]
]  # fmt: skip


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(SEEDS), st.data())
def test_any_change_of_a_file_reads_or_is_refused_in_one_line(seed, data):
    out = bytearray(seed)
    for at in data.draw(st.lists(st.integers(0, 100), min_size=1, max_size=4)):
        out[at] = data.draw(st.integers(0, 255))
    out = bytes(out[: data.draw(st.integers(len(out) // 2, len(out)))])
    with tempfile.NamedTemporaryFile() as file:
        file.write(out)
        file.flush()
        for source in (file.name, io.BytesIO(out)):
            try:
                load(source)
            except AudioError as error:
                assert "\n" not in str(error)
