"""Formats that libsndfile does not read, through ffmpeg if it is installed."""

from __future__ import annotations

import io
import os
import select
import shutil
import subprocess
import time
from contextlib import ExitStack

import numpy as np

from .common import AudioError
from .pcm import PcmSource
from .stream import ByteStream
from .wav import wav_layout

PATIENCE = 60.0  # seconds without output after which ffmpeg is stopped
_MAX_MESSAGES = 2**16  # bytes of its messages that are kept
_MAX_ALLOCATION = 2**28  # bytes per allocation

# Position and value of magic bytes, name in messages, and demuxer of ffmpeg.
_MAGIC = (
    (4, b"ftyp", "MP4", "mov"),
    (0, b"\x1aE\xdf\xa3", "Matroska or WebM", "matroska"),
    (0, bytes.fromhex("3026b2758e66cf11"), "Windows Media", "asf"),
    (0, b"#!AMR", "AMR", "amr"),
    (0, b"ADIF", "AAC", "aac"),
    (0, b"\x0b\x77", "AC-3", "ac3"),
    (0, b"MAC ", "Monkey's Audio", "ape"),
    (0, b"wvpk", "WavPack", "wv"),
    (0, b"TTA1", "True Audio", "tta"),
    (0, b"MPCK", "Musepack", "mpc8"),
    (0, b"MP+", "Musepack", "mpc"),
    (0, b"FLV\x01", "Flash video", "flv"),
    (0, b".RMF", "RealMedia", "rm"),
    (0, b"DSD ", "DSD", "dsf"),
    (0, b"\x00\x00\x01\xba", "MPEG video", "mpeg"),
    (8, b"AVI ", "AVI", "avi"),
)


def find_demuxer(head: bytes) -> tuple[str, str] | None:
    """Name and demuxer of a format that needs ffmpeg, from the first 16 bytes of a file."""
    for at, magic, name, demuxer in _MAGIC:
        if head[at : at + len(magic)] == magic:
            return name, demuxer
    if len(head) >= 6 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return "AAC", "aac"
    return None


class FfmpegSource:
    """A regular file decoded by ffmpeg, which runs in parallel and never gets far ahead.

    Args:
        file: descriptor of the file.
        name: name of the format, for messages.
        demuxer: demuxer for ffmpeg, which would guess otherwise.
        stack: ends ffmpeg when it is closed.
        keep: read what there is of a truncated file.

    Raises:
        AudioError: ffmpeg is not installed, cannot read the file, or hangs.
    """

    def __init__(
        self, file: int, name: str, demuxer: str, stack: ExitStack, *, keep: bool = False
    ) -> None:
        program = shutil.which("ffmpeg")
        if program is None:
            raise AudioError(
                f"{name} is read through ffmpeg, which is not installed; install it (apt install "
                "ffmpeg, brew install ffmpeg, winget install ffmpeg) or convert the file to WAV "
                "or FLAC"
            )
        self._keep = keep
        command = [program, "-nostdin", "-hide_banner", "-nostats", "-loglevel", "level+info"]
        command += ["-max_alloc", str(_MAX_ALLOCATION), "-threads", "1"]
        command += ["-protocol_whitelist", "file", "-f", demuxer, "-i", f"file:/dev/fd/{file}"]
        command += ["-map", "0:a", "-vn", "-sn", "-dn", "-c:a", "pcm_f32le", "-f", "wav", "pipe:1"]
        self._process = _Process(command, file, stack)
        stream = ByteStream(self._process, on_disk=False)
        layout = wav_layout(stream)
        if layout is None or layout.coding is None:
            self._process.wait()
            raise AudioError(f"{name} that cannot be read ({self._process.trouble or 'no audio'})")
        self._pcm = PcmSource(stream, layout, None)
        self.sample_rate, self.channels = self._pcm.sample_rate, self._pcm.channels
        self.format, self.subtype = name, self._pcm.subtype
        self.n_samples: int | None = None
        self.cut: str | None = None

    def read(self, n: int) -> np.ndarray:
        """See `reader.Source`."""
        return self._pcm.read(n)

    def check_end(self, n_read: int) -> None:
        """See `reader.Source`."""
        self._pcm.check_end(n_read)
        self._process.wait()
        if trouble := self._process.trouble:
            self.cut = f"damaged or truncated, {n_read:,} samples can be read ({trouble})"


class _Process(io.RawIOBase):
    """The standard output of a program; its first messages are kept."""

    def __init__(self, command: list[str], file: int, stack: ExitStack) -> None:
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(file,),
        )
        assert self._child.stdout is not None and self._child.stderr is not None
        self._audio, self._messages = self._child.stdout, self._child.stderr
        stack.callback(self._stop)
        self._outputs = [self._audio, self._messages]
        self._said = bytearray()

    def read1(self, n: int) -> bytes:
        """The available bytes, up to `n`; empty at the end."""
        while self._audio in self._outputs:
            if data := self._step(n):
                return data
        return b""

    def read(self, n: int = -1) -> bytes:
        return self.read1(n)

    def _step(self, n: int) -> bytes:
        """Wait for output; returns audio, or nothing if there were messages."""
        ready = select.select(self._outputs, [], [], PATIENCE)[0]
        if not ready:
            self._stop()
            raise AudioError(f"ffmpeg did not move for {PATIENCE:.0f} seconds")
        if self._messages in ready:
            text = os.read(self._messages.fileno(), 4096)
            if not text:
                self._outputs.remove(self._messages)
            self._said += text[: _MAX_MESSAGES - len(self._said)]
        if self._audio in ready:
            data = os.read(self._audio.fileno(), n)
            if not data:
                self._outputs.remove(self._audio)
            return data
        return b""

    def wait(self) -> None:
        """Wait until the program ends."""
        while self._outputs:
            self._step(65536)
        deadline = time.monotonic() + PATIENCE
        while self._child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        self._stop()

    @property
    def trouble(self) -> str:
        """The first error message of the program; empty if there is none."""
        lines = self._said.decode(errors="replace").splitlines()
        for line in lines:
            if "[error]" in line or "[fatal]" in line:
                return " ".join(line.split("]", line.count("["))[-1].split())
        if self._child.returncode:
            return f"ffmpeg ended with {self._child.returncode}"
        return ""

    def _stop(self) -> None:
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        for output in (self._audio, self._messages):
            output.close()
