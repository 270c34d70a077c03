"""Audio in and out: files, pipes, folders and resampling, in constant memory.

Samples are float32 arrays of shape (C, T), channels first, with full scale at -1 and 1.
libsndfile (through soundfile) reads and writes the formats, soxr resamples; linear PCM in WAV is
read and written here.
"""

from .common import AUDIO_SUFFIXES, AudioError, RawFormat
from .reader import AudioReader, find_audio, load
from .resampling import MAX_RESAMPLING, Resampler, resample, resampled_length
from .writer import AudioWriter, save

__all__ = [
    "AUDIO_SUFFIXES",
    "MAX_RESAMPLING",
    "AudioError",
    "AudioReader",
    "AudioWriter",
    "RawFormat",
    "Resampler",
    "find_audio",
    "load",
    "resample",
    "resampled_length",
    "save",
]
