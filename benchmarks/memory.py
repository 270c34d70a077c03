"""Peak memory of encoding and decoding: hours of audio through pipes, and a 10 s clip; or a photo.

The audio is generated while it is read (a clip is repeated, each time at another level), and the
decoded audio is counted and dropped, so that nothing is stored. Fails if a process needs more than
the limit, or if the decoded length is wrong. With --image, an image of 12 megapixels is generated,
and its decoded size is checked.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
import wave
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SPEECH = ROOT / "tests" / "resources" / "speech.wav"
CLIP_SECONDS = 10
CLIP_AIM_MB = 150
AUDIO_LIMIT_MB, IMAGE_LIMIT_MB = 500, 1500
IMAGE_SIZE = 3000, 4000  # height, width
UNKNOWN = 0xFFFFFFFF  # size in a WAV header if it is too large
BLOCK = 1 << 16  # bytes


def read_clip(path: Path) -> tuple[np.ndarray, int]:
    """Samples of a mono 16-bit WAV, (T,) int16, and its sample rate, Hz."""
    with wave.open(str(path)) as file:
        if (file.getnchannels(), file.getsampwidth()) != (1, 2):
            raise SystemExit(f"{path}: must be mono WAV of 16 bits")
        return np.frombuffer(file.readframes(file.getnframes()), "<i2"), file.getframerate()


def write_wav(stream: BinaryIO, clip: np.ndarray, rate: int, n_samples: int) -> None:
    """Write a WAV of the repeated clip, each time at another level from -30 dB to full scale."""
    n_bytes = 2 * n_samples
    known = n_bytes < UNKNOWN - 36
    sizes = (36 + n_bytes, n_bytes) if known else (UNKNOWN, UNKNOWN)
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
    stream.write(struct.pack("<4sI4s", b"RIFF", sizes[0], b"WAVE") + fmt)
    stream.write(struct.pack("<4sI", b"data", sizes[1]))
    rng = np.random.default_rng(0)
    full = 32767 / np.abs(clip.astype(np.float64)).max()
    done = 0
    while done < n_samples:
        gain = full * 10 ** (rng.uniform(-30, 0) / 20)
        piece = (clip[: n_samples - done] * gain).astype("<i2")
        stream.write(piece.tobytes())
        done += len(piece)


def command(*words: str) -> list[str]:
    script = Path(sys.executable).with_name("vpcodec")
    return [*([str(script)] if script.exists() else [sys.executable, "-m", "vpcodec"]), *words]


def finish(**processes: subprocess.Popen) -> dict[str, dict[str, float]]:
    """Wait for child processes; returns peak memory and CPU time of each.

    ru_maxrss includes the forked copy of this script, which is smaller than what it starts.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    found, faults = {}, []
    for name, process in processes.items():
        with process.stderr:
            said = process.stderr.read().decode(errors="replace").strip()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            faults.append(f"vpcodec {name} failed with exit code {process.returncode}: {said}")
        found[name] = {
            "peak_rss_mb": usage.ru_maxrss * unit / 1e6,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
        }
    if faults:
        raise SystemExit("\n".join(faults))
    return found


class Counted:
    """The number of bytes that passed, and the first of them."""

    def __init__(self) -> None:
        self.bytes = 0
        self.head = b""

    def add(self, data: bytes) -> None:
        self.bytes += len(data)
        if len(self.head) < 4096:
            self.head += data

    @property
    def wav_samples(self) -> int:
        """Number of samples of a mono 16-bit WAV that has passed completely."""
        return (self.bytes - self.head.index(b"data") - 8) // 2


def relay(source: BinaryIO, target: BinaryIO | None, counted: Counted) -> None:
    """Copy until the end, or until the target closes; with None, drop everything."""
    try:
        while data := source.read1(BLOCK):
            counted.add(data)
            if target is not None:
                target.write(data)
        if target is not None:
            target.close()
    except BrokenPipeError:
        pass  # the process that reads it has failed; `finish` says so
    source.close()


def long_run(args: argparse.Namespace, clip: np.ndarray, rate: int) -> dict[str, Any]:
    """Hours of audio: generator | vpcodec encode - - | vpcodec decode - - | counter."""
    n_samples = round(args.hours * 3600 * rate)
    seconds = n_samples / rate
    options = ["--model", args.model, "--threads", str(args.threads)]
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    began = time.perf_counter()
    encoder = subprocess.Popen(command("encode", "-", "-", *options), **pipes)
    decoder = subprocess.Popen(command("decode", "-", "-", *options), **pipes)
    tokens, audio = Counted(), Counted()

    def feed() -> None:
        try:
            with encoder.stdin:
                write_wav(encoder.stdin, clip, rate, n_samples)
        except BrokenPipeError:
            pass

    workers = [
        threading.Thread(target=feed, daemon=True),
        threading.Thread(target=relay, daemon=True, args=(encoder.stdout, decoder.stdin, tokens)),
        threading.Thread(target=relay, daemon=True, args=(decoder.stdout, None, audio)),
    ]
    for worker in workers:
        worker.start()
    found = finish(encode=encoder, decode=decoder)
    for worker in workers:
        worker.join()
    wall = time.perf_counter() - began
    return {
        "hours": seconds / 3600,
        "sample_rate": rate,
        "wall_seconds": wall,
        "times_real_time": seconds / wall,
        "audio_bytes": 2 * n_samples,
        "token_bytes": tokens.bytes,
        "bitrate": 8 * tokens.bytes / seconds,
        "samples_in": n_samples,
        "samples_out": audio.wav_samples,
        **found,
    }


def short_run(args: argparse.Namespace, clip: np.ndarray, rate: int) -> dict[str, Any]:
    """Peak memory of both commands on a 10 s file."""
    with tempfile.TemporaryDirectory() as folder:
        audio, tokens, back = (str(Path(folder) / name) for name in ("a.wav", "a.tok", "b.wav"))
        with open(audio, "wb") as file:
            write_wav(file, clip, rate, CLIP_SECONDS * rate)
        found = {}
        for name, files in (("encode", (audio, tokens)), ("decode", (tokens, back))):
            words = command(name, *files, "--model", args.model, "--threads", str(args.threads))
            found |= finish(**{name: subprocess.Popen(words, stderr=subprocess.PIPE)})
        return found


def write_photo(path: str) -> None:
    """Write an image of IMAGE_SIZE with edges at all scales, weaker at fine ones, as in photos.

    Squares of noise are added from coarse to fine; part of the noise is common to the colours.
    """
    from vpcodec.media.image import save_image

    height, width = IMAGE_SIZE
    rng = np.random.default_rng(0)
    image = np.zeros((height, width, 3), np.float32)
    side = 4
    while side <= height:
        coarse = rng.standard_normal((side, side, 3), dtype=np.float32)
        coarse += 2 * rng.standard_normal((side, side, 1), dtype=np.float32)
        rows, columns = np.arange(height) * side // height, np.arange(width) * side // width
        image += coarse[rows][:, columns] * np.float32(24 / np.log2(side) ** 2)
        side *= 2
    save_image(path, np.clip(image + 128, 0, 255).astype(np.uint8))


def image_run(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory and seconds of both commands on a photo, JPEG in and PNG out."""
    from vpcodec.media.image import load_image

    with tempfile.TemporaryDirectory() as folder:
        photo, tokens, back = (str(Path(folder) / name) for name in ("a.jpg", "a.tok", "b.png"))
        with ProcessPoolExecutor(1) as elsewhere:  # keeps this process small, see `finish`
            elsewhere.submit(write_photo, photo).result()
        found: dict[str, Any] = {"height": IMAGE_SIZE[0], "width": IMAGE_SIZE[1]}
        for name, files in (("encode", (photo, tokens)), ("decode", (tokens, back))):
            words = command(name, *files, "--model", args.model, "--threads", str(args.threads))
            began = time.perf_counter()
            found |= finish(**{name: subprocess.Popen(words, stderr=subprocess.PIPE)})
            found[name]["wall_seconds"] = time.perf_counter() - began
        found["token_bytes"] = os.path.getsize(tokens)
        found["size_back"] = load_image(back).shape[:2]
        return found


def report_audio(args: argparse.Namespace) -> list[str]:
    """Run and print the measurements with audio; returns what is wrong."""
    clip, rate = read_clip(args.file)
    short = short_run(args, clip, rate)
    long = long_run(args, clip, rate)
    faults = _too_large(long, args.limit)
    if long["samples_out"] != long["samples_in"]:
        faults.append(f"{long['samples_in']} samples became {long['samples_out']}")

    if args.json:
        document = {"clip_seconds": CLIP_SECONDS, "clip": short, "long": long, "faults": faults}
        print(json.dumps(document, indent=2))
    else:
        print(f"{'peak MB':<28}{'encode':>10}{'decode':>10}{'at most':>10}")
        for title, found, most in (
            (f"{CLIP_SECONDS} s clip (aim)", short, CLIP_AIM_MB),
            (f"{long['hours']:g} h through pipes", long, args.limit),
        ):
            peaks = [found[name]["peak_rss_mb"] for name in ("encode", "decode")]
            print(f"{title:<28}{peaks[0]:>10.1f}{peaks[1]:>10.1f}{most:>10g}")
        cpu = [long[name]["cpu_seconds"] for name in ("encode", "decode")]
        audio_seconds = long["hours"] * 3600
        print(
            f"Both at once: {long['wall_seconds']:.1f} s, {long['times_real_time']:.1f} times real "
            f"time; per CPU second: encode {audio_seconds / cpu[0]:.1f}, decode "
            f"{audio_seconds / cpu[1]:.1f} s of audio"
        )
        print(
            f"{long['audio_bytes']:,} bytes of audio at {rate} Hz, {long['token_bytes']:,} bytes "
            f"of tokens ({long['bitrate']:.0f} bit/s), {long['samples_out']:,} of "
            f"{long['samples_in']:,} samples back"
        )
    return faults


def report_image(args: argparse.Namespace) -> list[str]:
    """Run and print the measurements with an image; returns what is wrong."""
    found = image_run(args)
    faults = _too_large(found, args.limit)
    if found["size_back"] != IMAGE_SIZE:
        faults.append(f"{IMAGE_SIZE} pixels became {found['size_back']}")
    if args.json:
        print(json.dumps({"image": found, "faults": faults}, indent=2))
        return faults
    megapixels = IMAGE_SIZE[0] * IMAGE_SIZE[1] / 1e6
    print(f"{megapixels:g} megapixels, {found['token_bytes']:,} bytes of tokens")
    print(f"{'':<10}{'peak MB':>10}{'at most':>10}{'seconds':>10}{'megapixels/s':>14}")
    for name in ("encode", "decode"):
        peak, seconds = found[name]["peak_rss_mb"], found[name]["wall_seconds"]
        print(
            f"{name:<10}{peak:>10.1f}{args.limit:>10g}{seconds:>10.1f}{megapixels / seconds:>14.2f}"
        )
    return faults


def _too_large(found: dict[str, Any], limit: float) -> list[str]:
    return [
        f"{name} took {found[name]['peak_rss_mb']:.0f} MB, more than {limit:g} MB"
        for name in ("encode", "decode")
        if found[name]["peak_rss_mb"] > limit
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", action="store_true", help="measure a photo instead of audio")
    parser.add_argument("--hours", type=float, default=10.0, help="length of the long run")
    parser.add_argument(
        "--limit",
        type=float,
        help=f"MB that a process may use; default: {AUDIO_LIMIT_MB}, images {IMAGE_LIMIT_MB}",
    )
    parser.add_argument(
        "--model", help="bundled name or folder; default: speech-3k, or image-fsp for images"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--file", type=Path, default=SPEECH, help="mono WAV of 16 bits to repeat")
    parser.add_argument("--json", action="store_true", help="print a JSON document")
    args = parser.parse_args()
    if args.limit is None:
        args.limit = IMAGE_LIMIT_MB if args.image else AUDIO_LIMIT_MB
    if args.model is None:
        args.model = "image-fsp" if args.image else "speech-3k"
    faults = report_image(args) if args.image else report_audio(args)
    for fault in faults:
        print(f"FAILED: {fault}", file=sys.stderr)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
