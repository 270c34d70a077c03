"""What the number of threads changes: tokens, and samples of 16 bits, of recordings."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from vpcodec import Codec
from vpcodec.media.audio import find_audio, load

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def coded(model: str, threads: int, paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all recordings, and decoded samples in steps of 16 bits; int64 (N,) each."""
    codec = Codec.from_pretrained(model, threads=threads)
    tokens = [codec.encode(*load(path)) for path in paths]
    samples = [np.rint(codec.decode(found).clip(-1, 1) * 32767).astype(int) for found in tokens]
    return tuple(np.concatenate([x.ravel() for x in each]) for each in (tokens, samples))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["speech-3k", "speech-vp-16384", "speech-1k"])
    parser.add_argument("--data", type=Path, default=DATA / "speech_dev", help="recordings")
    parser.add_argument("--every", type=int, default=5, help="take every n-th recording")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 3, 4, 8])
    args = parser.parse_args()
    paths = [args.data / name for name in find_audio(args.data)][:: args.every]
    print(f"{len(paths)} recordings; what differs from {args.threads[0]} thread(s)")
    print("| model | threads | tokens | differ | samples | differ | by at most |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for model in args.models:
        tokens, samples = coded(model, args.threads[0], paths)
        for threads in args.threads[1:]:
            others, outputs = coded(model, threads, paths)
            steps = np.abs(outputs - samples)
            print(
                f"| {model} | {threads} | {len(tokens):,} | {(others != tokens).sum():,} "
                f"| {len(samples):,} | {(steps > 0).mean():.3%} | {steps.max()} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
