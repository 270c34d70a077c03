"""How decoded speech sounds: predicted listening quality, tonal lines in noise, and spectrograms.

Choices (losses, weights, when to stop) are made on a dev set of speakers, and results are reported
on a test set. Speakers are assigned to the sets alternately, in the order of their names.

python benchmarks/sound.py table speech-3k --decoded lyra-3.2k=DATA/lyra_dev/3200 --split test
python benchmarks/sound.py lines speech-3k MODEL_FOLDER
python benchmarks/sound.py spectrograms clip.flac out.png --models speech-3k --seconds 1.0 1.6
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from vpcodec import Codec, score
from vpcodec.media.audio import find_audio, load, resample

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
COLUMNS = {
    "bitrate": ("bit/s", ",.0f"),
    "distillmos": ("DistillMOS", ".2f"),
    "dnsmos_p808": ("DNSMOS P.808", ".2f"),
    "dnsmos_sig": ("SIG", ".2f"),
    "pesq_wb": ("PESQ-WB", ".2f"),
    "stoi": ("STOI", ".3f"),
    "estoi": ("ESTOI", ".3f"),
    "mel_distance": ("mel distance", ".3f"),
}
NOISE_SECONDS = 20
LINES_ABOVE_HZ = 1000


def speaker(name: str) -> str:
    """The speaker of a clip: its name without the number of the recording."""
    return "_".join(name.split("_")[:2])


def split(folder: Path, part: str) -> list[Path]:
    """The clips of the speakers in "dev", in "test", or of "all"."""
    clips = sorted(folder / path for path in find_audio(folder))
    speakers = sorted({speaker(clip.name) for clip in clips})
    chosen = {"dev": speakers[::2], "test": speakers[1::2], "all": speakers}[part]
    return [clip for clip in clips if speaker(clip.name) in chosen]


def table(args: argparse.Namespace) -> None:
    """Print means over the clips of a split, with a row per codec."""
    metrics = [name for name in COLUMNS if name != "bitrate"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "original")
        folder.mkdir()
        clips = split(args.speech, args.split)
        for clip in clips:
            (folder / clip.name).symlink_to(clip.resolve())
        decoded = []
        for text in args.decoded:
            name, _, place = text.partition("=")
            target = Path(temporary, name)
            target.mkdir()
            for path in Path(place).iterdir():
                if path.stem in {clip.stem for clip in clips}:
                    (target / path.name).symlink_to(path.resolve())
            decoded.append(f"{name}={target}")
        found = score(
            folder,
            *decoded,
            models=args.models,
            codecs=args.codecs,
            metrics=metrics,
            jobs=args.jobs,
        )
    print(f"{args.split}: {len(clips)} clips")
    print(f"| codec | {' | '.join(title for title, _ in COLUMNS.values())} |")
    print("|---" + "|---:" * len(COLUMNS) + "|")
    for system in found.systems:
        values = {metric: summary.mean for metric, summary in system.summaries.items()}
        cells = [system.name]
        for metric, (_, form) in COLUMNS.items():
            value = values.get(metric, math.nan)
            cells.append("" if math.isnan(value) else format(value, form))
        print(f"| {' | '.join(cells)} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found.to_dict(), indent=1))


def line_to_floor(codec: Codec, *, tilt: float = 0.0) -> float:
    """Level of lines at multiples of the frame rate above the noise between them, dB.

    The codec encodes and decodes white noise. Mean over the multiples above 1 kHz; about 0 for real
    noise.

    Args:
        codec: the codec.
        tilt: a in x(t) - a x(t - 1), which makes noise sound like a fricative.
    """
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(NOISE_SECONDS * codec.sample_rate)
    noise = 0.05 * (noise - tilt * np.concatenate([[0], noise[:-1]])).astype(np.float32)
    decoded = codec.decode(codec.encode(noise), len(noise))[0]
    size = 100 * codec.hop_length  # multiples of the frame rate are at multiples of 100 bins
    window = np.hanning(size)
    pieces = [decoded[i : i + size] for i in range(0, len(decoded) - size, size // 2)]
    power = np.mean([np.abs(np.fft.rfft(window * piece)) ** 2 for piece in pieces], 0)
    found = []
    for line in range(100, len(power) - 50, 100):
        if line * codec.sample_rate / size >= LINES_ABOVE_HZ:
            around = np.concatenate([power[line - 40 : line - 5], power[line + 6 : line + 41]])
            found.append(10 * np.log10(power[line] / np.median(around)))
    return float(np.mean(found))


def lines(args: argparse.Namespace) -> None:
    print("| codec | white noise, dB | like a fricative, dB |\n|---|---:|---:|")
    for name in args.models:
        codec = Codec.from_pretrained(name, threads=1)
        values = (line_to_floor(codec), line_to_floor(codec, tilt=0.9))
        print(f"| {name} | {values[0]:.1f} | {values[1]:.1f} |", flush=True)


def spectrogram(samples: np.ndarray, size: int = 1024, hop: int = 32) -> np.ndarray:
    """(T,) -> (bins, frames) uint8: -90 dB (0) to 0 dB (255) relative to a full-scale sine."""
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(samples, size // 2), size)[::hop]
    magnitude = np.abs(np.fft.rfft(frames * np.hanning(size))).T * 4 / size
    decibels = 20 * np.log10(magnitude + 1e-9)
    return ((decibels + 90) / 90 * 255).clip(0, 255).astype(np.uint8)[::-1]


def spectrograms(args: argparse.Namespace) -> None:
    """Write an image of spectrograms: the original, models and decoded files, top to bottom."""
    original, rate = load(args.clip)
    original = resample(original[:1], rate, 16_000)[0]
    signals = [original]
    for name in args.models:
        codec = Codec.from_pretrained(name, threads=1)
        signals.append(codec.decode(codec.encode(original), len(original))[0])
    for path in args.decoded:
        found, rate = load(path)
        signals.append(resample(found[:1], rate, 16_000)[0])
    first, last = (round(16_000 * second) for second in args.seconds)
    images = [spectrogram(signal[first:last]) for signal in signals]
    gap = np.full((6, images[0].shape[1]), 255, np.uint8)
    rows = [part for image in images for part in (image, gap)][:-1]
    Image.fromarray(np.concatenate(rows)).save(args.target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("table", help="predicted quality, in one table")
    command.add_argument("models", nargs="*")
    command.add_argument("--decoded", nargs="*", default=[], help="name=folder")
    command.add_argument("--codecs", default="", help="as of `vpcodec score`")
    command.add_argument("--speech", type=Path, default=DATA / "speech_dev")
    command.add_argument("--split", choices=("dev", "test", "all"), default="dev")
    command.add_argument("--jobs", type=int, default=1)
    command.add_argument("--json", type=Path)
    command.set_defaults(run=table)
    command = commands.add_parser("lines", help="tonal lines in decoded noise")
    command.add_argument("models", nargs="+")
    command.set_defaults(run=lines)
    command = commands.add_parser("spectrograms", help="an image of 1024-point spectra")
    command.add_argument("clip", type=Path)
    command.add_argument("target", type=Path)
    command.add_argument("--models", nargs="*", default=[])
    command.add_argument("--decoded", nargs="*", type=Path, default=[])
    command.add_argument("--seconds", nargs=2, type=float, default=(0.0, 2.0))
    command.set_defaults(run=spectrograms)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
