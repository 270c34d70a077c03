"""The parts that this package shares: errors, limits, and names of formats."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import soundfile as sf

from ...checks import MAX_CHANNELS, check_rate
from .. import files

MAX_SAMPLE_RATE = 1_000_000  # Hz
FORMATS = {  # suffix: libsndfile's format, default subtype
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".oga": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".aiff": ("AIFF", "PCM_16"),
    ".aif": ("AIFF", "PCM_16"),
    ".au": ("AU", "PCM_16"),
    ".snd": ("AU", "PCM_16"),
    ".caf": ("CAF", "PCM_16"),
    ".w64": ("W64", "PCM_16"),
    ".rf64": ("RF64", "PCM_16"),
}
OUTPUT_SUFFIXES = frozenset(FORMATS)
_MORE_SUFFIXES = (
    ".wave .bwf .bw64 .aifc .sph .nist .voc .ircam .paf .svx .8svx .avr .pvf .sds .htk .mp1 .mp2 "
    ".mpa .mpga .m4a .m4b .m4r .mp4 .aac .adts .webm .weba .mka .mkv .mov .3gp .3g2 .wma .asf .wmv "
    ".amr .awb .ac3 .ape .wv .tta .mpc .spx .flv .avi .dsf .ra .rm"
)
AUDIO_SUFFIXES = OUTPUT_SUFFIXES | frozenset(_MORE_SUFFIXES.split())  # of inputs
WIDTHS = {"PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}  # bytes
READ_WIDTHS = {**WIDTHS, "PCM_S8": 1, "ULAW": 1, "ALAW": 1}
RAW_CODINGS = {"s16": "PCM_16", "s24": "PCM_24", "s32": "PCM_32", "f32": "FLOAT"}
BLOCK = 65536  # samples per channel at a time, by default


class AudioError(ValueError):
    """Audio cannot be read or written; the message is one line with the file and the cause."""


class PartialAudioError(AudioError):
    """Only a part of the audio can be read; `truncated="keep"` reads that part."""


@dataclass(frozen=True)
class RawFormat:
    """Headerless PCM: interleaved little-endian samples in the `encoding` s16, s24, s32 or f32."""

    sample_rate: int
    channels: int = 1
    encoding: str = "s16"

    def __post_init__(self) -> None:
        raw_coding(self.encoding)
        object.__setattr__(self, "sample_rate", check_rate(self.sample_rate))
        check_limits(self.sample_rate, self.channels)


def check_limits(sample_rate: int, channels: int) -> None:
    """Raise AudioError for a sample rate or a number of channels out of bounds."""
    if not 1 <= sample_rate <= MAX_SAMPLE_RATE:
        raise AudioError(f"a sample rate of {sample_rate} Hz is not in 1 to {MAX_SAMPLE_RATE}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(f"{channels} channels are not in 1 to {MAX_CHANNELS}")


def raw_coding(encoding: str) -> str:
    """libsndfile's name of a raw encoding; AudioError if it is unknown."""
    if encoding not in RAW_CODINGS:
        raise AudioError(f"raw encoding {encoding!r} is not one of {', '.join(RAW_CODINGS)}")
    return RAW_CODINGS[encoding]


def cut_short(n_read: int, n_promised: int, sample_rate: int) -> str:
    """The message for audio that ends after `n_read` samples."""
    ends, promised = n_read / sample_rate, n_promised / sample_rate
    return (
        f"truncated: it ends at sample {n_read:,} of {n_promised:,} "
        f"({ends:.2f} s of {promised:.2f} s)"
    )


def choose_format(suffix: str, subtype: str | None, raw: str | None) -> tuple[str, str]:
    """libsndfile's names of the format and the subtype of an output; AudioError if unknown."""
    if raw is not None:
        return "RAW", raw_coding(raw)
    if suffix not in FORMATS:
        known = " ".join(FORMATS)
        raise AudioError(f"the suffix {suffix!r} stands for no known format; choose from {known}")
    format, default = FORMATS[suffix]
    subtype = subtype.upper() if subtype else default
    if not sf.check_format(format, subtype):
        known = " ".join(sf.available_subtypes(format))
        raise AudioError(f"{format} has no subtype {subtype}; choose from {known}")
    return format, subtype


def is_regular(file: BinaryIO) -> bool:
    """Whether an open file is a regular file, not a pipe or a device."""
    return stat.S_ISREG(os.fstat(file.fileno()).st_mode)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """`files.naming` with AudioError, for errors of libsndfile as well."""
    with files.naming(name, AudioError):
        try:
            yield
        except sf.LibsndfileError as error:
            raise AudioError(reason(error)) from error


def reason(error: sf.LibsndfileError) -> str:
    """The message of an error of libsndfile."""
    return error.error_string.removeprefix("Error : ").rstrip(".")
