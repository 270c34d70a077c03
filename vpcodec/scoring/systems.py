"""What can be scored: existing decoded files, our own models, and classic codecs.

All systems are cheap to create, hold only their settings and can be pickled; a model is loaded for
the first file, once per process. A system can also be recreated from its specification:
`build_system(system.spec, ...)`.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
from numpy.typing import NDArray

from ..backends import BACKENDS
from ..codec import Codec
from ..hub import open_model
from ..media.audio import AUDIO_SUFFIXES, AudioError, load, resample, save
from ..media.files import find_files, naming
from ..media.image import IMAGE_SUFFIXES, is_image, load_image
from ..tokenfile import read_tokens

TIMEOUT = 60.0  # s that a program may take, plus the duration of the audio
PACKET_SECONDS = 0.018  # about, of what is lost at once
CODEC2_MODES = ("3200", "2400", "1600", "1400", "1300", "1200", "700C", "450")

_OPUS_BITRATES = 500, 512_000  # bit/s that opusenc takes
_OPUS_RATES = 8_000, 192_000  # Hz at which opusdec writes
_CODEC2_RATE = 8_000  # Hz
_MESSAGE_BYTES = 4096  # of the output of a program that are read


class ScoreError(ValueError):
    """A system that cannot be used, or a file that it cannot code; the message is one line."""


@dataclass(frozen=True)
class Coded:
    """A file after coding and decoding.

    Attributes:
        signal: audio float32 (C, T), or an image uint8 (H, W, C).
        rate: of audio, Hz; may differ from the original's. None for images.
        n_bytes: size when coded, with all headers; None if unknown.
        tokens: int64 (channels, N) in [0, codebook_size); None if there are none.
    """

    signal: np.ndarray
    rate: int | None = None
    n_bytes: int | None = None
    tokens: np.ndarray | None = None


class System(ABC):
    """Something that codes and decodes files.

    Attributes:
        name: in tables.
        spec: the specification that `build_system` takes.
        modality: "audio" or "image"; None: both.
        identity: changes if results may change for the same `files`: a fingerprint, or the version
            of programs.
        codebook_size: of its tokens; None if it has none.
    """

    name: str
    spec: str
    modality: Literal["audio", "image"] | None
    identity: str
    codebook_size: int | None = None

    def code(self, source: Path) -> Coded:
        """Code and decode a file.

        Raises:
            ScoreError: the system cannot code this file; the message names it.
            AudioError: an audio file that cannot be read.
            ImageError: an image that cannot be read.
        """
        with naming(os.fspath(source), ScoreError):
            return self._code(source)

    def consistency(self, coded: Coded) -> float | None:
        """Share of tokens that stay the same when the decoded signal is encoded again.

        Args:
            coded: what `code` returned.

        Returns:
            The share, 0 to 1; NaN without tokens; None for a system that cannot tell.
        """
        return None

    def files(self, source: Path) -> list[Path]:
        """Other files that the result for a file depends on."""
        return []

    @abstractmethod
    def _code(self, source: Path) -> Coded:
        """As `code`, without the name of the file in a ScoreError or OSError."""


def build_system(
    spec: str,
    *,
    backend: str = "onnx",
    threads: int | None = 1,
    references: Path | None = None,
) -> System:
    """Make a system from its specification.

    That is "model:NAME", "lossy:LOSS:NAME" (a model, with such losses as "5%x3"),
    "codec:NAME@SETTING" or "folder:PATH" (or a file).

    Args:
        spec: which system.
        backend: that runs models, "onnx" or "torch".
        threads: CPU threads of a model.
        references: the folder or file with the originals; needed for decoded files.

    Raises:
        ScoreError: it does not exist, or a program is not installed.
        ModelError: a model that cannot be used.
    """
    what, _, value = spec.partition(":")
    if what == "model":
        return Model(value, backend, threads)
    if what == "lossy":
        loss, _, name = value.partition(":")
        return LossyModel(name, Loss.parse(loss), backend, threads)
    if what == "folder" and references is not None:
        return Decoded(Path(value), references)
    if what == "codec":
        codec = _parse_codec(value)
        codec.check()
        return codec
    raise ValueError(f"no system {spec!r}")


def parse_codecs(text: str) -> list[str]:
    """The specifications of codecs such as "opus@6k,codec2@3200", each once, in the given order.

    Raises:
        ScoreError: unknown codec or setting.
    """
    return list(dict.fromkeys(_parse_codec(part.strip()).spec for part in text.split(",")))


# ------------------------------------------------------------------------------------ decoded files


@dataclass(frozen=True)
class Pairs:
    """Originals and their decoded files.

    Attributes:
        found: original -> decoded file.
        missing: originals without a decoded file.
        unclear: original -> the files that match equally well.
        extra: decoded files without an original.
    """

    found: dict[Path, Path]
    missing: list[Path]
    unclear: dict[Path, list[Path]]
    extra: list[Path]


def pair_files(
    references: Path,
    decoded: Path,
    suffixes: Collection[str] = AUDIO_SUFFIXES | IMAGE_SUFFIXES,
) -> Pairs:
    """Match the originals in a folder with the files in another.

    A counterpart has the same relative path or, failing that, the same path without the suffix,
    audio for audio and images for images, if exactly one original and one file have it. Two single
    files are matched whatever their names. The counterpart of a single original may be in a folder.

    Args:
        references: folder of the originals, or one file.
        decoded: folder of the decoded files, or one file.
        suffixes: of the files that are considered.

    Returns:
        The pairs, in the order of paths.

    Raises:
        ScoreError: a path that does not exist, a folder against a file, or nothing that matches.
        OSError: a folder that cannot be read.
    """
    for path in (references, decoded):
        if not path.exists():
            raise ScoreError(f"{path}: no such file or folder")
        if not (path.is_file() or path.is_dir()):
            raise ScoreError(f"{path}: not a regular file")
    if decoded.is_file():
        if not references.is_file():
            raise ScoreError(f"{decoded}: one file, but {references} is a folder")
        return Pairs({references: decoded}, [], {}, [])
    if references.is_file():
        root, originals = references.parent, [Path(references.name)]
    else:
        root, originals = references, find_files(references, suffixes)
    if not originals:
        raise ScoreError(f"{references}: no audio or image in it")
    others = find_files(decoded, suffixes)
    same = set(originals) & set(others)
    alike = _by_stem(path for path in others if path not in same)
    rivals = _by_stem(path for path in originals if path not in same)
    found, missing, unclear = {}, [], {}
    for path in originals:
        stem = _stem(path)
        if path in same:
            found[root / path] = decoded / path
        elif stem not in alike:
            missing.append(root / path)
        elif len(alike[stem]) > 1:
            unclear[root / path] = [decoded / other for other in alike[stem]]
        elif len(rivals[stem]) > 1:
            unclear[root / path] = [root / other for other in rivals[stem]]
        else:
            found[root / path] = decoded / alike[stem][0]
    if not found and not unclear:
        raise ScoreError(f"{decoded}: no audio or image in it has the name of an original")
    extra = [path for stem, paths in alike.items() if stem not in rivals for path in paths]
    return Pairs(found, missing, unclear, [decoded / path for path in extra])


def _by_stem(paths: Iterable[Path]) -> dict[tuple[Path, bool], list[Path]]:
    groups: dict[tuple[Path, bool], list[Path]] = {}
    for path in paths:
        groups.setdefault(_stem(path), []).append(path)
    return groups


def _stem(path: Path) -> tuple[Path, bool]:
    """The path without its suffix, and whether it is an image."""
    return path.with_suffix(""), path.suffix.lower() in IMAGE_SUFFIXES


class Decoded(System):
    """Existing decoded files, matched with their originals by `pair_files`.

    Their size says nothing about how they were coded, and does not count.

    Args:
        decoded: folder or file.
        references: folder or file with the originals.
        name: in tables; None: that of the folder or file.

    Attributes:
        pairs: which file belongs to which original.

    Raises:
        ScoreError: as `pair_files`.
        OSError: as `pair_files`.
    """

    modality = None

    def __init__(self, decoded: Path, references: Path, name: str | None = None) -> None:
        self.decoded = decoded
        self.name = name or decoded.name or decoded.resolve().name
        self.spec = f"folder:{decoded}"
        self.identity = str(decoded.resolve())
        self.pairs = pair_files(references, decoded)

    def files(self, source: Path) -> list[Path]:
        """The decoded file, if there is one."""
        return [self.pairs.found[source]] if source in self.pairs.found else []

    def _code(self, source: Path) -> Coded:
        if source in self.pairs.unclear:
            files = " and ".join(str(path) for path in self.pairs.unclear[source])
            raise ScoreError(f"{files} differ only in the suffix")
        if source not in self.pairs.found:
            raise ScoreError(f"no counterpart in {self.decoded}")
        path = self.pairs.found[source]
        with open(path, "rb") as file:
            image = is_image(file.read(16))
        return Coded(load_image(path)) if image else Coded(*load(path))


# ----------------------------------------------------------------------------------------- models


class Model(System):
    """One of our models.

    Args:
        name: as for `Codec.from_pretrained`.
        backend: "onnx" or "torch".
        threads: CPU threads; None leaves the choice to the backend.

    Raises:
        ScoreError: unknown backend.
        ModelError: a model that cannot be found or read.
    """

    def __init__(self, name: str | Path, backend: str = "onnx", threads: int | None = 1) -> None:
        if backend not in BACKENDS:
            raise ScoreError(f"unknown backend {backend!r} (one of {', '.join(BACKENDS)})")
        self.name = str(name)
        self.spec = f"model:{name}"
        self.backend, self.threads = backend, threads
        folder = open_model(name)
        self.path = folder.path.resolve()
        self.modality = cast(Literal["audio", "image"], folder.config.modality)
        self.identity = f"{folder.fingerprint.hex()} {backend}"
        self.codebook_size = folder.config.codebook_size

    def _code(self, source: Path) -> Coded:
        codec: Any = _load_codec(self.path, self.backend, self.threads)
        coded, decoded = io.BytesIO(), io.BytesIO()
        stats = codec.encode_file(source, coded)
        tokens = read_tokens(io.BytesIO(coded.getvalue()), coder=codec.coder)[0]
        coded.seek(0)
        if self.modality == "image":
            codec.decode_file(coded, decoded)
            decoded.seek(0)
            pixels = with_components(load_image(decoded), stats.components)
            return Coded(pixels, None, stats.n_bytes, tokens)
        codec.decode_file(coded, decoded, subtype="FLOAT")
        decoded.seek(0)
        return Coded(*load(decoded), stats.n_bytes, tokens)

    def consistency(self, coded: Coded) -> float | None:
        codec: Any = _load_codec(self.path, self.backend, self.threads)
        if coded.tokens is None:  # of a live link
            return None
        rate = [] if coded.rate is None else [coded.rate]
        again = codec.encode(coded.signal, *rate).reshape(len(coded.tokens), -1)
        return float((again == coded.tokens).mean()) if coded.tokens.size else math.nan


@dataclass(frozen=True)
class Loss:
    """Packets of about 18 ms that do not arrive, single ones or several in a row.

    Attributes:
        share: of all packets that are lost, 0 to 1.
        burst: packets lost in a row.
    """

    share: float
    burst: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "5%" or "10%x3".

        Raises:
            ScoreError: something else.
        """
        match = re.fullmatch(r"(\d{1,3}(?:\.\d{1,3})?)%(?:x(\d{1,3}))?", text.strip(), re.ASCII)
        if not match or not 0 < float(match[1]) <= 50 or match[2] == "0":
            raise ScoreError(f"no loss {text!r}; write 5% or 10%x3, up to 50%")
        return cls(float(match[1]) / 100, int(match[2] or 1))

    def __str__(self) -> str:
        return f"{100 * self.share:g}%" + (f"x{self.burst}" if self.burst > 1 else "")

    def draw(self, n_packets: int, seed: int) -> NDArray[np.bool_]:
        """Which packets are lost, (n_packets,): the same for a seed; the first two arrive."""
        random = np.random.default_rng(seed)
        lost = np.zeros(n_packets, bool)
        between = self.burst * (1 - self.share) / self.share  # packets that arrive, on average
        i = 2
        while (i := i + int(random.geometric(1 / between))) < n_packets:
            lost[i : i + self.burst] = True
            i += self.burst
        return lost


def parse_losses(text: str) -> list[Loss]:
    """Losses such as "5%,10%x3", each once, in the given order.

    Raises:
        ScoreError: something else.
    """
    return list(dict.fromkeys(map(Loss.parse, text.split(","))))


class LossyModel(Model):
    """One of our models over a live link that loses packets, concealed by `push_lost`.

    Args:
        name: as for `Codec.from_pretrained`.
        loss: how many packets are lost; which ones follows from the length of the clip.
        backend: "onnx" or "torch".
        threads: CPU threads; None leaves the choice to the backend.

    Raises:
        ScoreError: unknown backend, or a model that is not for live streams.
        ModelError: a model that cannot be found or read.
    """

    def __init__(
        self, name: str | Path, loss: Loss, backend: str = "onnx", threads: int | None = 1
    ) -> None:
        super().__init__(name, backend, threads)
        if getattr(open_model(name).config, "latency", None) is None:  # images have none either
            raise ScoreError(f"model {name} is not for live streams, so it has no losses")
        self.loss = loss
        self.name = f"{name} {loss}"
        self.spec = f"lossy:{loss}:{name}"
        self.identity += f" loss {loss}"

    def _code(self, source: Path) -> Coded:
        codec: Any = _load_codec(self.path, self.backend, self.threads)
        samples, rate = load(source)
        tokens = codec.encode(samples, rate)
        frames = max(1, round(PACKET_SECONDS * codec.frame_rate))
        n_frames = tokens.shape[1]
        lost = np.repeat(self.loss.draw(-(-n_frames // frames), n_frames), frames)[:n_frames]
        decoded = decode_with_losses(codec, tokens, lost, rate)
        return Coded(decoded[:, : samples.shape[1]], rate)


def decode_with_losses(
    codec: Any, tokens: NDArray[np.int64], lost: NDArray[np.bool_], sample_rate: int | None = None
) -> NDArray[np.float32]:
    """Decode tokens some of which did not arrive, concealed by `push_lost`.

    Args:
        codec: an `AudioCodec` for live streams.
        tokens: (C, N).
        lost: (N,), which of them are lost.
        sample_rate: of the result, Hz; None: the model's.

    Returns:
        (C, T) float32.
    """
    stream = codec.decoder_stream(len(tokens), sample_rate=sample_rate)
    edges = [0, *(np.flatnonzero(np.diff(lost)) + 1).tolist(), len(lost)]
    parts = [
        stream.push_lost(end - start) if lost[start] else stream.push(tokens[:, start:end])
        for start, end in pairwise(edges)
        if end > start
    ]
    return np.concatenate([*parts, stream.flush()], 1)


@cache
def _load_codec(path: Path, backend: str, threads: int | None) -> Codec:
    return Codec.from_pretrained(path, backend=backend, threads=threads)


# --------------------------------------------------------------------------------- classic codecs


class _Classic(System):
    """A codec by others with one setting: "NAME@SETTING" on the command line."""

    codec: ClassVar[str]
    example: ClassVar[str]
    programs: ClassVar[tuple[str, ...]] = ()
    package: ClassVar[str] = ""  # of a Linux distribution, with the programs

    @property
    def spec(self) -> str:
        return f"codec:{self.name}"

    @classmethod
    @abstractmethod
    def parse(cls, setting: str) -> Self:
        """The codec with a setting.

        Raises:
            ScoreError: unknown setting.
        """

    def check(self) -> None:
        """Check that the programs are installed.

        Raises:
            ScoreError: one is missing.
        """
        if not all(shutil.which(program) for program in self.programs):
            needed = " and ".join(self.programs)
            raise ScoreError(f"codec {self.codec} needs {needed}: apt install {self.package}")


@dataclass(frozen=True)
class Opus(_Classic):
    """opusenc and opusdec of opus-tools, for mono and stereo.

    The input is float. The output has the original rate if opusdec can write it, else 48 kHz, and
    16 bits with dither, which is opusdec's default and the basis of published values. (PESQ-WB of
    speech at 6 kbit/s is 0.04 lower without dither.) The size is that of the Ogg file.

    Args:
        bitrate: target of opusenc for all channels, bit/s.
    """

    bitrate: int
    modality = "audio"
    codec = "opus"
    example = "opus@6k"
    programs = ("opusenc", "opusdec")
    package = "opus-tools"

    @classmethod
    def parse(cls, setting: str) -> Self:
        """From "6k" or "6" (kbit/s if below 1000), or "6000"."""
        return cls(_bitrate(cls.codec, setting, _OPUS_BITRATES))

    @property
    def name(self) -> str:
        return f"opus@{self.bitrate / 1000:g}k"

    @cached_property
    def identity(self) -> str:
        """The versions of the programs."""
        with _Workshop() as shop:
            printed = (shop.run(program, "--version") for program in self.programs)
            return ", ".join(lines[0] if lines else "?" for lines in printed)

    def _code(self, source: Path) -> Coded:
        signal, rate = load(source)
        channels, n_samples = signal.shape
        if channels > 2:  # opusdec would make it stereo
            raise ScoreError(f"{channels} channels, but opus is run on mono and stereo only")
        low, high = _OPUS_RATES
        aim = ("--bitrate", f"{self.bitrate / 1000:g}")
        wanted = ("--rate", str(rate if low <= rate <= high else 48_000))
        with _Workshop(n_samples / rate) as shop:
            save(shop.folder / "original.wav", signal, rate, subtype="FLOAT")
            n_bytes = shop.make("opusenc", "--quiet", *aim, "original.wav", output="coded.opus")
            shop.make("opusdec", "--quiet", *wanted, "coded.opus", output="decoded.wav")
            try:
                decoded, rate = load(shop.folder / "decoded.wav")
            except AudioError as error:
                raise ScoreError("opusdec wrote audio that cannot be read") from error
        if len(decoded) != channels:
            raise ScoreError(f"opusdec wrote {len(decoded)} channels of {channels}")
        return Coded(decoded, rate, n_bytes)


def _bitrate(codec: str, setting: str, limits: tuple[int, int]) -> int:
    """Bit/s of a setting such as "6k", "6" or "6000".

    Raises:
        ScoreError: it is none, or out of the limits.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(k?)", setting.lower(), re.ASCII)
    value = float(match[1]) if match else 0.0
    bitrate = value * 1000 if match and (match[2] or value < 1000) else value
    low, high = limits
    if not low <= bitrate <= high:
        raise ScoreError(
            f"codec {codec} has no bit rate {setting!r} (from {low / 1000:g}k to {high / 1000:g}k)"
        )
    return round(bitrate)


@dataclass(frozen=True)
class _Ffmpeg(_Classic):
    """A codec of ffmpeg, for mono and stereo, at a constant bit rate.

    The input is float, at the original rate or the next that the codec has. The size is that of
    the file.

    Args:
        bitrate: of all channels, bit/s.
    """

    bitrate: int
    modality = "audio"
    programs = ("ffmpeg",)
    package = "ffmpeg"
    encoder: ClassVar[str]
    suffix: ClassVar[str]
    limits: ClassVar[tuple[int, int]]  # bit/s
    rates: ClassVar[tuple[int, ...]]  # Hz

    @classmethod
    def parse(cls, setting: str) -> Self:
        """From "32k" or "32" (kbit/s if below 1000), or "32000"."""
        return cls(_bitrate(cls.codec, setting, cls.limits))

    @property
    def name(self) -> str:
        return f"{self.codec}@{self.bitrate / 1000:g}k"

    @cached_property
    def identity(self) -> str:
        """The version of the program."""
        path = shutil.which("ffmpeg") or "ffmpeg"
        printed = subprocess.run([path, "-version"], capture_output=True, timeout=TIMEOUT)
        return f"{self.encoder}, {printed.stdout.decode(errors='replace').splitlines()[0]}"

    def _code(self, source: Path) -> Coded:
        signal, rate = load(source)
        channels, n_samples = signal.shape
        if channels > 2:
            raise ScoreError(
                f"{channels} channels, but {self.codec} is run on mono and stereo only"
            )
        wanted = next((x for x in self.rates if x >= rate), self.rates[-1])
        signal = resample(signal, rate, wanted) if wanted != rate else signal
        coded, quiet = f"coded{self.suffix}", ("-v", "error", "-nostdin")
        with _Workshop(n_samples / rate) as shop:
            save(shop.folder / "original.wav", signal, wanted, subtype="FLOAT")
            aim = ("-c:a", self.encoder, "-b:a", str(self.bitrate))
            n_bytes = shop.make("ffmpeg", *quiet, "-i", "original.wav", *aim, output=coded)
            float_wav = ("-c:a", "pcm_f32le")
            shop.make("ffmpeg", *quiet, "-i", coded, *float_wav, output="decoded.wav")
            decoded, found = load(shop.folder / "decoded.wav")
        if len(decoded) != channels or found != wanted:
            raise ScoreError(f"ffmpeg wrote {len(decoded)} channels at {found} Hz")
        return Coded(decoded[:, : signal.shape[1]], found, n_bytes)  # AAC ends with its frame


@dataclass(frozen=True)
class Mp3(_Ffmpeg):
    """LAME, by ffmpeg."""

    codec = "mp3"
    example = "mp3@32k"
    encoder = "libmp3lame"
    suffix = ".mp3"
    limits = (8_000, 320_000)
    rates = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)


@dataclass(frozen=True)
class Aac(_Ffmpeg):
    """AAC-LC by the encoder of ffmpeg."""

    codec = "aac"
    example = "aac@32k"
    encoder = "aac"
    suffix = ".m4a"
    limits = (6_000, 512_000)
    rates = (*Mp3.rates, 64_000, 88_200, 96_000)


@dataclass(frozen=True)
class Codec2(_Classic):
    """c2enc and c2dec, at 8 kHz, each channel separately; the result is at 16 kHz.

    The size is that of all `.c2` files, with their headers of 7 bytes. Samples at the end that do
    not fill a frame are not coded.

    The result is upsampled to 16 kHz by a filter as long as FFmpeg's default, which passes some of
    the images just above 4 kHz, and PESQ-WB hears them: over 46 clips at 3200 bit/s it is 1.65 with
    this filter and 1.60 with a steep one (soxr).

    Args:
        mode: one of CODEC2_MODES.
    """

    mode: str
    modality = "audio"
    codec = "codec2"
    example = "codec2@3200"
    programs = ("c2enc", "c2dec")
    package = "codec2"

    @classmethod
    def parse(cls, setting: str) -> Self:
        if setting.upper() not in CODEC2_MODES:
            raise ScoreError(f"codec codec2 has no mode {setting!r} ({', '.join(CODEC2_MODES)})")
        return cls(setting.upper())

    @property
    def name(self) -> str:
        return f"codec2@{self.mode}"

    def check(self) -> None:
        super().check()
        if find_spec("scipy") is None:
            raise ScoreError("codec codec2 needs the package scipy: pip install 'vpcodec[score]'")

    @cached_property
    def identity(self) -> str:
        """A digest of half a second after coding: the programs do not state their version."""
        t = np.arange(_CODEC2_RATE // 2) / _CODEC2_RATE
        tones = sum(np.sin(2 * np.pi * n * (120 + 40 * t) * t) / n for n in range(1, 20))
        with _Workshop() as shop:
            decoded, _ = self._through(shop, np.rint(4096 * tones))
        return hashlib.sha256(decoded.tobytes()).hexdigest()[:32]

    def _code(self, source: Path) -> Coded:
        from scipy.signal import firwin, resample_poly

        signal, rate = load(source)
        narrow = np.rint(resample(signal, rate, _CODEC2_RATE) * 32768).clip(-32768, 32767)
        with _Workshop(signal.shape[1] / rate * len(signal)) as shop:
            coded = [self._through(shop, channel) for channel in narrow]
        decoded = np.stack([samples for samples, _ in coded]).astype(np.float32) / 32768
        if decoded.size:  # it fails on empty input
            low_pass = firwin(65, 0.5, window=("kaiser", 9))
            decoded = resample_poly(decoded, 2, 1, axis=1, window=low_pass).astype(np.float32)
        return Coded(decoded, 2 * _CODEC2_RATE, sum(n_bytes for _, n_bytes in coded))

    def _through(self, shop: _Workshop, samples: np.ndarray) -> tuple[np.ndarray, int]:
        """Whole numbers (T,) -> int16 (T',), and the size when coded."""
        samples.astype("<i2").tofile(shop.folder / "original.raw")
        n_bytes = shop.make("c2enc", self.mode, "original.raw", output="coded.c2")
        n_decoded = shop.make("c2dec", self.mode, "coded.c2", output="decoded.raw") // 2
        if n_decoded > len(samples):
            raise ScoreError(f"c2dec wrote {n_decoded} samples of {len(samples)}")
        return np.fromfile(shop.folder / "decoded.raw", "<i2", n_decoded), n_bytes


@dataclass(frozen=True)
class _Picture(_Classic):
    """Pillow in memory, with default settings except the quality, 0 to 100."""

    quality: int
    modality = "image"
    format: ClassVar[str]  # Pillow's name of the format
    library: ClassVar[str]  # and of the library behind it

    @classmethod
    def parse(cls, setting: str) -> Self:
        if not (re.fullmatch(r"\d{1,3}", setting, re.ASCII) and int(setting) <= 100):
            raise ScoreError(f"codec {cls.codec} has no quality {setting!r} (from 0 to 100)")
        return cls(int(setting))

    @property
    def name(self) -> str:
        return f"{self.codec}@{self.quality}"

    @property
    def identity(self) -> str:
        """The versions of Pillow and of the library."""
        import PIL
        from PIL import features

        version = features.version(self.library)
        return f"Pillow {PIL.__version__}, {self.library} {version}"

    def _code(self, source: Path) -> Coded:
        from PIL import Image

        pixels = load_image(source)
        components = pixels.shape[2]
        if self.format == "JPEG" and components % 2 == 0:
            raise ScoreError("it has alpha, which JPEG cannot hold")
        coded = io.BytesIO()
        try:
            image = Image.fromarray(pixels[..., 0] if components == 1 else pixels)
            image.save(coded, self.format, quality=self.quality)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ScoreError(f"cannot be coded as {self.format} ({reason})") from error
        n_bytes = coded.tell()
        coded.seek(0)
        return Coded(with_components(load_image(coded), components), None, n_bytes)


class Jpeg(_Picture):
    """JPEG. Images with alpha are refused, because without alpha they would be other images."""

    codec = "jpeg"
    example = "jpeg@10"
    format = "JPEG"
    library = "jpg"


class WebP(_Picture):
    """Lossy WebP; alpha is coded without loss."""

    codec = "webp"
    example = "webp@10"
    format = "WEBP"
    library = "webp"


CODECS: dict[str, type[_Classic]] = {
    classic.codec: classic for classic in (Opus, Mp3, Aac, Codec2, Jpeg, WebP)
}


def _parse_codec(text: str) -> _Classic:
    codec, at, setting = text.partition("@")
    if codec not in CODECS:
        raise ScoreError(f"unknown codec {codec!r} (one of {', '.join(CODECS)})")
    if not at:
        raise ScoreError(f"codec {codec} needs a setting, such as {CODECS[codec].example}")
    return CODECS[codec].parse(setting)


class _Workshop:
    """A temporary folder for programs, which run without a shell and see only names in it.

    Args:
        seconds: duration of the audio, added to TIMEOUT.
    """

    def __init__(self, seconds: float = 0) -> None:
        self._limit = TIMEOUT + seconds

    def __enter__(self) -> Self:
        self._temporary = tempfile.TemporaryDirectory(prefix="vpcodec-")
        self.folder = Path(self._temporary.name)
        return self

    def __exit__(self, *exc: object) -> None:
        self._temporary.cleanup()

    def make(self, *command: str, output: str) -> int:
        """Run a program whose last argument is the file that it writes; returns the size of the
        file.

        Raises:
            ScoreError: it cannot be run, fails, takes too long or writes no file.
        """
        self.run(*command, output)
        try:
            return (self.folder / output).stat().st_size
        except FileNotFoundError:
            raise ScoreError(f"{command[0]} wrote no file") from None

    def run(self, program: str, *arguments: str) -> list[str]:
        """Run a program in the folder; returns the last lines that it prints. Raises as `make`."""
        path = os.path.abspath(shutil.which(program) or program)
        with open(self.folder / "printed", "w+b") as printed:
            try:
                # Its output goes to a file: a pipe could stay open when the program is killed.
                code = subprocess.run(
                    [path, *arguments],
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=printed,
                    stderr=printed,
                    timeout=self._limit,
                ).returncode
            except subprocess.TimeoutExpired:
                raise ScoreError(f"{program} did not end within {self._limit:.0f} s") from None
            except OSError as error:
                raise ScoreError(f"{program} cannot be run ({error.strerror})") from error
            printed.seek(max(0, printed.seek(0, os.SEEK_END) - _MESSAGE_BYTES))
            text = printed.read().decode(errors="replace")
        lines = ["".join(c for c in line if c.isprintable()) for line in text.splitlines()]
        lines = [line.strip() for line in lines if line.strip()]
        if code:
            raise ScoreError(f"{program} failed ({lines[-1] if lines else f'exit code {code}'})")
        return lines


def with_components(pixels: np.ndarray, components: int) -> np.ndarray:
    """The pixels with other components: reading drops opaque alpha, and WebP has no grey."""
    colour, alpha = pixels, np.full_like(pixels[..., :1], 255)
    if pixels.shape[2] % 2 == 0:
        colour, alpha = pixels[..., :-1], pixels[..., -1:]
    if components <= 2 < colour.shape[2]:
        colour = np.rint(colour.mean(2, keepdims=True)).astype(np.uint8)
    if components > 2 > colour.shape[2]:
        colour = np.repeat(colour, 3, axis=2)
    return colour if components % 2 else np.concatenate([colour, alpha], 2)
