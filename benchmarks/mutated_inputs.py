"""Mutated audio and token files through the readers: none may crash, hang or take much memory.

Seeds are WAV in several codings, FLAC, Ogg Vorbis and Opus, MP3, AIFF, AU, CAF and W64, made here,
and token files of both versions of the format, of one and of several blocks, from the tests.
`--only tok` takes only the seeds whose names begin with "tok". Token files are read strictly and
with recovery, and verified; every other one gets a right checksum at its end or somewhere in its
first bytes, so that mutations come through to the checks behind the checksum.

Each input is a seed with some bytes changed, mostly in its header, or with a part removed, repeated
or inserted, and is read as a file or as a pipe. Inputs are read in a worker process; if it dies,
computes for 5 s, is silent for a minute or runs out of memory, the input is reported, and `--keep`
saves it. The exit code is then 1. Times are CPU times, so that other work on the machine does not
count.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import zlib
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

HANG = 5.0  # CPU seconds
SILENCE = 60.0  # seconds
MEMORY = 512 * 2**20  # bytes that reading may add to a worker
TOKENS = Path(__file__).resolve().parents[1] / "tests" / "resources"
HEADER = 256  # bytes at the start, where most changes are


def make_seeds() -> dict[str, bytes]:
    """A short file of each format."""
    import soundfile as sf

    time_ = np.arange(16_000) / 16_000
    tone = 0.3 * np.sin(2 * np.pi * 300 * time_) + 0.05 * np.random.default_rng(0).normal(
        size=16_000
    )
    pair = np.stack([tone, tone[::-1]], 1)[:6000]
    formats = {
        "wav": ("WAV", "PCM_16"), "wav24": ("WAV", "PCM_24"), "float": ("WAV", "FLOAT"),
        "ulaw": ("WAV", "ULAW"), "ima": ("WAV", "IMA_ADPCM"), "ms": ("WAV", "MS_ADPCM"),
        "extensible": ("WAVEX", "PCM_16"), "rf64": ("RF64", "PCM_16"), "flac": ("FLAC", "PCM_16"),
        "flac24": ("FLAC", "PCM_24"), "vorbis": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS"),
        "mp3": ("MP3", "MPEG_LAYER_III"), "aiff": ("AIFF", "PCM_16"), "aifc": ("AIFF", "FLOAT"),
        "au": ("AU", "PCM_16"), "caf": ("CAF", "PCM_16"), "alac": ("CAF", "ALAC_16"),
        "w64": ("W64", "PCM_16"), "voc": ("VOC", "PCM_16"), "nist": ("NIST", "PCM_16"),
    }  # fmt: skip
    seeds = {}
    for name, (format, subtype) in formats.items():
        for channels in (1, 2):
            file = io.BytesIO()
            rate = 16_000 if channels == 1 else 48_000
            samples = tone if channels == 1 else pair
            sf.write(file, samples, rate, format=format, subtype=subtype)
            seeds[f"{name}/{channels}"] = file.getvalue()
    for path in (*TOKENS.glob("tok/*.tok"), *TOKENS.glob("golden/*.tok")):
        seeds[f"tok/{path.stem}"] = path.read_bytes()
    return seeds


def with_checksum(data: bytes, rng: np.random.Generator) -> bytes:
    """A mutated token file with a right CRC-32 at its end, or somewhere in its first bytes."""
    end = int(rng.choice([len(data) - 4, rng.integers(10, 100)]))
    if end < 10:
        return data
    return data[:end] + zlib.crc32(data[:end]).to_bytes(4, "little") + data[end + 4 :]


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Mutate a file: set bytes, or truncate, remove, repeat or insert a part."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        kind, size = rng.integers(10), len(out)
        at = int(rng.integers(min(HEADER, size) if rng.random() < 0.8 else size)) if size else 0
        if kind < 4:
            for i in rng.integers(0, 8, int(rng.integers(1, 4))):
                if at + i < size:
                    out[at + i] = rng.integers(256)
        elif kind < 6:  # an extreme value
            value = rng.choice([0, 1, 0x7F, 0x80, 0xFE, 0xFF])
            width = int(rng.choice([1, 2, 4, 8]))
            out[at : at + width] = bytes([value]) * width
        elif kind == 6:
            del out[at : at + int(rng.integers(1, 64))]
        elif kind == 7:
            out[at:at] = rng.bytes(int(rng.integers(1, 64)))
        elif kind == 8:
            del out[int(rng.integers(size + 1)) :]
        else:
            start = int(rng.integers(size + 1))
            out += out[start : start + int(rng.integers(20_000))]
    return bytes(out)


def read(data: bytes, path: Path, piped: bool) -> str:
    """The result of reading: "read", "refused", or a fault."""
    from vpcodec.media.audio import AudioError, AudioReader

    n_samples = None
    try:
        if piped:
            source: Any = io.BytesIO(data)
            source.seekable = lambda: False
        else:
            path.write_bytes(data)
            source = path
        with AudioReader(source) as reader:
            n_samples = reader.n_samples
            done = sum(block.shape[1] for block in reader.blocks(65_536 // reader.channels + 1))
    except AudioError as error:
        return "refused" if "\n" not in str(error) else f"two lines: {error}"
    except MemoryError:
        return "memory"
    except Exception as error:  # what a user would see as a traceback
        return f"{type(error).__name__}: {error}"
    if n_samples is not None and done != n_samples:
        return f"{done} samples, where {n_samples} were promised"
    return "read"


def read_tokens(data: bytes, path: Path, piped: bool) -> str:
    """As `read`, of a token file."""
    from vpcodec import read_tokens, tokenfile

    if not piped:
        path.write_bytes(data)
    results = []
    try:
        for recover in (False, True):
            source: Any = path
            if piped:
                source = io.BytesIO(data)
                source.seekable = lambda: False
            try:
                tokens, header = read_tokens(source, recover=recover)
                if tokens.shape != (header.channels, header.n_frames):
                    return f"{tokens.shape} tokens, where the header has {header}"
                results.append("read")
            except tokenfile.TokenFileError as error:
                if "\n" in str(error):
                    return f"two lines: {error}"
                results.append("refused")
        sound = tokenfile.verify(io.BytesIO(data)).ok
    except MemoryError:
        return "memory"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if results == ["read", "refused"] or (results[0] == "read" and not sound):
        return f"strict {results[0]}, recovering {results[1]}, verified {sound}"
    return results[0]


def serve(pipe: Connection, folder: str) -> None:
    """Read the inputs that come through the pipe, and send back the results."""
    import vpcodec.codec  # noqa: F401  its memory does not count

    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MEMORY, MEMORY))
    path = Path(folder) / f"{multiprocessing.current_process().pid}"
    while (request := pipe.recv()) is not None:
        start = time.process_time()
        result = (read_tokens if request[2] else read)(request[0], path, request[1])
        pipe.send((result, time.process_time() - start))


class Worker:
    """A process that reads inputs, and is replaced when it dies."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, self._folder), daemon=True)
        self._process.start()
        self._warm = False  # whether it has read an input
        other.close()

    def read(self, data: bytes, piped: bool, tokens: bool) -> tuple[str, float]:
        """The result of reading, and the CPU seconds that it took."""
        taken = math.nan
        try:
            self._pipe.send((data, piped, tokens))
            if self._warm:
                start, began = self._cpu_seconds(), time.monotonic()
                answered = self._pipe.poll(HANG)
                while not answered and (taken := self._cpu_seconds() - start) < HANG:
                    if time.monotonic() - began > SILENCE:
                        break
                    answered = self._pipe.poll(0.1)
            else:
                answered = self._pipe.poll(SILENCE)
            if answered:
                self._warm = True
                return self._pipe.recv()
            result = f"no answer after {taken:.1f} CPU seconds"
        except (EOFError, OSError):
            self._process.join()
            result = f"ended with {self._process.exitcode}"
        self._process.kill()
        self._process.join()
        self._start()
        return result, taken

    def _cpu_seconds(self) -> float:
        with open(f"/proc/{self._process.pid}/stat") as file:
            user, system = file.read().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(10)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="number of inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="NAME", help="seeds with names that begin so")
    parser.add_argument("--keep", type=Path, help="folder for inputs that went wrong")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    seeds = make_seeds()
    names = sorted(name for name in seeds if name.startswith(args.only))
    results: Counter[str] = Counter()
    wrong: list[dict[str, Any]] = []
    slowest, began = 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(folder)
        for i in range(args.count):
            rng = np.random.default_rng([args.seed, i])
            name = names[i % len(names)]
            data, piped = mutate(seeds[name], rng), bool(rng.integers(2))
            tokens = name.startswith("tok/")
            if tokens and rng.integers(2):
                data = with_checksum(data, rng)
            result, taken = worker.read(data, piped, tokens)
            slowest = max(slowest, taken)
            good = result in ("read", "refused")
            results[result if good else "wrong"] += 1
            if not good:
                wrong.append({"number": i, "seed": name, "piped": piped, "result": result})
                print(f"{i} {name} piped={piped}: {result}", file=sys.stderr)
                if args.keep:
                    args.keep.mkdir(parents=True, exist_ok=True)
                    (args.keep / f"{i}.bin").write_bytes(data)
        worker.close()
    elapsed = time.monotonic() - began
    document = {**results, "slowest_seconds": round(slowest, 3), "seconds": round(elapsed, 1)}
    print(json.dumps(document | {"inputs": wrong}) if args.json else document)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
