"""Reading, writing and resampling of audio: files, pipes and folders, in constant memory.

Samples are float32 arrays of shape (C, T), channels first, with full scale at -1 and 1.
Containers are parsed here, so that every byte of a file is accounted for, and linear PCM is read
and written here. libsndfile (through soundfile) decodes and encodes, ffmpeg decodes what libsndfile
cannot, and soxr resamples.
"""

from .common import AUDIO_SUFFIXES, OUTPUT_SUFFIXES, AudioError, PartialAudioError, RawFormat
from .reader import TRUNCATED, AudioReader, find_audio, load
from .resampling import MAX_RESAMPLING, Resampler, resample, resampled_length
from .writer import AudioWriter, save

__all__ = [
    "AUDIO_SUFFIXES",
    "MAX_RESAMPLING",
    "OUTPUT_SUFFIXES",
    "TRUNCATED",
    "AudioError",
    "AudioReader",
    "AudioWriter",
    "PartialAudioError",
    "RawFormat",
    "Resampler",
    "find_audio",
    "load",
    "resample",
    "resampled_length",
    "save",
]
