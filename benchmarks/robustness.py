"""Quality in the conditions a speech codec meets: noise, music, languages, clipping, telephones.

Each condition is a folder of recordings, made here from held-out ones. The reference is the input
of the codec, so that preserving noise counts as good, and removing it does not.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import tempfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from vpcodec import score
from vpcodec.media.audio import find_audio, load, resample, save
from vpcodec.training.audio.data import mu_law

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
RATE = 16_000
COLUMNS = {  # metric -> title and format
    "bitrate": ("bit/s", ",.0f"),
    "pesq_wb": ("PESQ-WB", ".2f"),
    "stoi": ("STOI", ".3f"),
    "estoi": ("ESTOI", ".3f"),
    "mel_distance": ("mel distance", ".3f"),
    "dnsmos_p808": ("DNSMOS P.808", ".2f"),
}
METRICS = [name for name in COLUMNS if name != "bitrate"]  # always reported
# Files of audio_misc that no recipe here trains on.
NOISES = ("env_esc10_009*", "env_esc10_010*", "env_smstools_*")
MUSIC = ("music_librosa_fishin*", "music_smstools_[o-z]*")
Change = Callable[[np.ndarray, int], np.ndarray]  # (T,) samples and the number of the clip


def matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Audio files of a folder whose names match a pattern."""
    names = find_audio(folder, recursive=False)
    return [folder / name for name in names if any(fnmatch(name.name, p) for p in patterns)]


def read(path: Path) -> np.ndarray:
    """The first channel, (T,) float32 at 16 kHz."""
    samples, rate = load(path)
    return resample(samples[:1], rate, RATE)[0]


def conditions(args: argparse.Namespace) -> dict[str, tuple[list[Path], Change]]:
    """Name -> recordings, and the change that is applied to each."""
    clips = [args.speech / name for name in find_audio(args.speech)]
    noises = [read(path) for path in matching(args.misc, NOISES)]

    def same(x: np.ndarray, number: int) -> np.ndarray:
        return x

    def with_noise(snr_db: float) -> Change:
        def change(x: np.ndarray, number: int) -> np.ndarray:
            noise = np.resize(noises[number % len(noises)], len(x))
            gain = np.sqrt(np.mean(x**2) / max(np.mean(noise**2), 1e-12)) * 10 ** (-snr_db / 20)
            y = x + gain * noise
            return y * min(1, 0.99 / np.abs(y).max())

        return change

    def clipped(x: np.ndarray, number: int) -> np.ndarray:
        """Clip at twice the root mean square."""
        level = 2 * np.sqrt(np.mean(x**2))
        return np.clip(x, -level, level) * min(1, 0.99 / level)

    def telephone(x: np.ndarray, number: int) -> np.ndarray:
        """Band-limit to 300 to 3,400 Hz, at 8 kHz with 8 bits of mu-law, and resample back."""
        narrow = resample(x[None], RATE, 8000)[0]
        spectrum = np.fft.rfft(narrow)
        hertz = np.fft.rfftfreq(len(narrow), 1 / 8000)
        narrow = np.fft.irfft(spectrum * ((hertz > 300) & (hertz < 3400)), len(narrow))
        return resample(mu_law(narrow)[None].astype(np.float32), 8000, RATE)[0]

    def quiet(x: np.ndarray, number: int) -> np.ndarray:
        return x * 10 ** (-30 / 20)

    return {
        "clean": (clips, same),
        "other languages": (foreign(clips), same),
        "noise at 15 dB": (clips, with_noise(15)),
        "noise at 5 dB": (clips, with_noise(5)),
        "clipped": (clips, clipped),
        "telephone": (clips, telephone),
        "30 dB softer": (clips, quiet),
        "music": (matching(args.misc, MUSIC), same),
        "environment": (matching(args.misc, NOISES), same),
    }


def foreign(clips: list[Path]) -> list[Path]:
    """Clips in languages that are not in the training data, according to the manifest."""
    with open(clips[0].parents[1] / "MANIFEST.tsv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    folder = clips[0].parent.name

    def language(row: dict[str, str]) -> str:
        return row["language"].replace("_", "-").split("-")[0].split(" ")[0]

    known = {language(row) for row in rows if row["path"].startswith("speech_train")}
    names = {
        Path(row["path"]).name
        for row in rows
        if row["path"].startswith(folder) and language(row) not in known
    }
    return [clip for clip in clips if clip.name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["speech-3k"])
    parser.add_argument("--codecs", default="opus@6k,codec2@3200", help="as of `vpcodec score`")
    parser.add_argument("--speech", type=Path, default=DATA / "speech_dev")
    parser.add_argument("--misc", type=Path, default=DATA / "audio_misc")
    parser.add_argument("--every", type=int, default=1, help="use every n-th clip of speech")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    print(f"| condition | files | codec | {' | '.join(title for title, _ in COLUMNS.values())} |")
    print("|---|---:|---" + "|---:" * len(COLUMNS) + "|")
    for name, (paths, change) in conditions(args).items():
        paths = paths[:: args.every] if len(paths) > 20 else paths
        with tempfile.TemporaryDirectory() as folder:
            for number, path in enumerate(paths):
                x = change(read(path), number)[None].astype(np.float32)
                save(Path(folder, f"{path.stem}.wav"), x, RATE)
            found = score(
                folder, models=args.models, codecs=args.codecs, metrics=METRICS, jobs=args.jobs
            )
        results[name] = found.to_dict()
        for system in found.systems:
            values = {metric: summary.mean for metric, summary in system.summaries.items()}
            cells = [name, str(len(paths)), system.name]
            for metric, (_, form) in COLUMNS.items():
                value = values.get(metric, math.nan)
                cells.append("" if math.isnan(value) else format(value, form))
            print(f"| {' | '.join(cells)} |", flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
