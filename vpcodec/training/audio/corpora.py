"""Corpora of recordings: files with their lengths, LibriTTS, and parts of files."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import soundfile

from ...media.audio import OUTPUT_SUFFIXES, find_audio, resample
from ...recipe.audio import AudioCorpus, LibriTTSCorpus
from ..corpora import DataError, Files, Listing, MediaType, find_files, list_files

SHORT_SECONDS = 0.1  # files that are not longer are left out
UNSOUGHT_SECONDS = 60.0  # at the start of an MP3 file, which are read instead of seeking
CONTEXT = 256  # samples, at the lower rate, that resampling gets on both sides of a part
READERS = 16  # threads that scan files; they mostly wait for disks
# TypeError: soundfile needs more arguments for files named .raw.
UNREADABLE = (soundfile.SoundFileError, OSError, ValueError, TypeError)
AUDIO_FILES = MediaType(
    noun="audio file",
    suffixes=OUTPUT_SUFFIXES,  # formats that libsndfile opens on every platform
    find_files=partial(find_audio, suffixes=OUTPUT_SUFFIXES),
    errors=UNREADABLE,
    feature="Audio",
    columns={"offset": (0.0, ("offset",)), "seconds": (math.nan, ("seconds", "duration"))},
)


def list_audio(corpus: AudioCorpus | LibriTTSCorpus) -> Listing:
    """The files of a corpus, with columns `offset` (s) and `seconds` (s, NaN if unknown).

    Raises:
        DataError: there are none.
    """
    if isinstance(corpus, LibriTTSCorpus):
        root, names = _find_libritts(corpus)
        return Listing(root, names, AUDIO_FILES)
    return list_files(corpus.path, AUDIO_FILES)


class AudioFiles(Files):
    """The files of a corpus, or segments of them, drawn in proportion to their length.

    Attributes:
        seconds, offsets: (n,) lengths of the segments and their offsets in the files, s.
        ends: (n,) cumulative lengths, normalised to end at 1.
        whole: (n,) bool, whether a file is decoded whole and cached.
        index: number of the corpus among those that share a cache.

    Raises:
        DataError: no file can be read.
    """

    def __init__(self, corpus: AudioCorpus | LibriTTSCorpus) -> None:
        listing = list_audio(corpus)
        root, names = listing.root, listing.names
        seconds, offsets = listing.columns["seconds"], listing.columns["offset"]
        unknown = np.flatnonzero(np.isnan(seconds))
        parts = np.array_split(unknown, -(-len(unknown) // 256)) if len(unknown) else []

        def measure(part: np.ndarray) -> list[float]:
            return [length_or_zero(root / names[number]) for number in part]

        with ThreadPoolExecutor(READERS) as pool:
            for part, found in zip(parts, pool.map(measure, parts)):
                seconds[part] = np.array(found) - offsets[part]
        good = seconds > SHORT_SECONDS
        unreadable = [str(root / names[number]) for number in np.flatnonzero(~good)]
        if not good.any():
            raise DataError(f"{corpus.path}: no audio file that can be read")
        names = [names[number] for number in np.flatnonzero(good)]
        super().__init__(corpus.path, root, names, unreadable)
        self.seconds, self.offsets = seconds[good], offsets[good]
        ends = np.cumsum(self.seconds)
        self.ends = ends / ends[-1]
        self.whole = np.zeros(len(self), dtype=bool)
        self.index = 0

    def draw(self, share: float) -> int:
        return min(int(np.searchsorted(self.ends, share, side="right")), len(self) - 1)

    def label(self, number: int) -> str:
        offset = self.offsets[number]
        return f"{self.path(number)}{f' at {offset:g} s' if offset else ''}"

    def describe(self, write: Callable[[bytes], None]) -> None:
        super().describe(write)
        for times in (self.offsets, self.seconds):
            write(np.round(times * 1000).astype("<i8").tobytes())


def _find_libritts(corpus: LibriTTSCorpus) -> tuple[Path, list[str]]:
    """The LibriTTS folder and the paths below it; downloads subsets if the corpus asks for it."""
    root = Path(corpus.path)
    if root.name != "LibriTTS":
        inside = any((root / subset).is_dir() for subset in corpus.subsets)
        root = root if inside and not (root / "LibriTTS").is_dir() else root / "LibriTTS"
    names = []
    for subset in corpus.subsets:
        folder = root / subset
        if not folder.is_dir():
            if not corpus.download:
                raise DataError(
                    f"{folder}: no such folder; set `download: true` in this corpus of data.train "
                    "to fetch it"
                )
            _download_libritts(root, subset)
        names += [f"{subset}/{name}" for name in find_files(folder, AUDIO_FILES)]
    return root, names


def _download_libritts(root: Path, subset: str) -> None:
    import torchaudio

    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        torchaudio.datasets.LIBRITTS(
            root.parent, url=subset, folder_in_archive=root.name, download=True
        )
    except (OSError, RuntimeError, EOFError) as error:  # EOFError: a truncated archive
        raise DataError(f"{root / subset}: cannot be fetched ({error})") from None


def length(source: Path | io.BytesIO) -> float:
    """Seconds of audio in a file; raises one of UNREADABLE."""
    with soundfile.SoundFile(source) as file:
        if file.frames >= 2**62:  # how libsndfile says that it does not know the length
            raise ValueError("unknown length")
        return file.frames / file.samplerate


def length_or_zero(path: Path) -> float:
    """Seconds of audio in a file; 0 if it cannot be read."""
    try:
        return length(path)
    except UNREADABLE:
        return 0.0


def read_part(
    source: Path | io.BytesIO, offset: float, first: int, count: int, rate: int
) -> np.ndarray:
    """Read a part of a file, as if the whole file had been resampled and then cut.

    Args:
        source: path or contents of a file.
        offset: start of the segment in the file, s.
        first: first sample of the part within the segment, at `rate`.
        count: number of samples, at `rate`.
        rate: sample rate of the result, Hz.

    Returns:
        Mono float32, up to `count` samples.

    Raises:
        One of UNREADABLE: the file cannot be read, or has no samples there.
    """
    with soundfile.SoundFile(source) as file:
        common = math.gcd(file.samplerate, rate)
        up, down = rate // common, file.samplerate // common
        start = round(offset * rate) + first
        context = 0 if up == down else CONTEXT * max(1, -(-down // up))
        # Begin at an instant at which both rates have a sample.
        begin = max(0, start * down // up - context) // down * down
        end = -(-(start + count) * down // up) + context
        if file.format == "MP3" and begin < UNSOUGHT_SECONDS * file.samplerate:
            file.read(begin, "float32")  # libmpg123 prints warnings to stderr after a seek
        elif begin:
            file.seek(begin)
        samples = file.read(end - begin, "float32", always_2d=True)
    if not np.isfinite(samples).all():
        raise ValueError("NaN or infinite samples")
    skip = start - begin * up // down
    part = resample(samples.mean(1), file.samplerate, rate)[skip : skip + count]
    if not len(part):
        raise ValueError("no samples")
    return part
