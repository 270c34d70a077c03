"""What the number of threads changes: tokens and samples of 16 bits, or, with --speed, times.

The table of times has a row for each number of cores, with and without a busy process beside it on
the same cores, and for each setting: the default, numbers of threads, and threads that spin while
they wait, as ONNX Runtime has it by default. Each row is a process of its own that may use only
these cores: a clip of ten seconds as an array, the same through streams in pieces of 20 ms, and the
entropy coding of sixty files, with NumPy's matrix products on one thread (as the package does it)
and on all. Medians of --runs, but for the sixty files. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SECONDS = 10
FILES, FILE_FRAMES = 60, 600  # of the entropy coding


def coded(model: str, threads: int, paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all recordings, and decoded samples in steps of 16 bits; int64 (N,) each."""
    from vpcodec import Codec
    from vpcodec.media.audio import load

    codec = Codec.from_pretrained(model, threads=threads)
    tokens = [codec.encode(*load(path)) for path in paths]
    samples = [np.rint(codec.decode(found).clip(-1, 1) * 32767).astype(int) for found in tokens]
    return tuple(np.concatenate([x.ravel() for x in each]) for each in (tokens, samples))


def differences(models: list[str], data: Path, every: int, numbers: list[int]) -> None:
    """Print what differs from the first number of threads."""
    from vpcodec.media.audio import find_audio

    paths = [data / name for name in find_audio(data)][::every]
    print(f"{len(paths)} recordings; what differs from {numbers[0]} thread(s)")
    print("| model | threads | tokens | differ | samples | differ | by at most |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for model in models:
        tokens, samples = coded(model, numbers[0], paths)
        for threads in numbers[1:]:
            others, outputs = coded(model, threads, paths)
            steps = np.abs(outputs - samples)
            print(
                f"| {model} | {threads} | {len(tokens):,} | {(others != tokens).sum():,} "
                f"| {len(samples):,} | {(steps > 0).mean():.3%} | {steps.max()} |",
                flush=True,
            )


def median(runs: int, work: Callable[[], object]) -> float:
    """Milliseconds."""
    work()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def measured(spec: dict) -> dict[str, float]:
    """The times of one row, in this process."""
    os.sched_setaffinity(0, spec["cores"])
    import onnxruntime as ort

    from vpcodec import Codec, entropy

    if spec["spinning"]:
        session = ort.InferenceSession

        def spinning(path: str, options: ort.SessionOptions, **more: object) -> object:
            options.add_session_config_entry("session.intra_op.allow_spinning", "1")
            return session(path, options, **more)

        ort.InferenceSession = spinning
    codec = Codec.from_pretrained(spec["model"], threads=spec["threads"])
    rate = codec.sample_rate
    samples = 0.1 * np.random.default_rng(0).normal(size=SECONDS * rate).astype(np.float32)
    tokens = codec.encode(samples)
    piece = rate // 50

    def stream() -> None:
        encoder = codec.encoder_stream()
        for first in range(0, len(samples), piece):
            encoder.push(samples[first : first + piece])

    def stream_back() -> None:
        decoder = codec.decoder_stream()
        for first in range(0, tokens.shape[1], 4):
            decoder.push(tokens[:, first : first + 4])

    payload = codec.coder.pack(tokens[:, :FILE_FRAMES].T)

    def unpack() -> None:
        for _ in range(FILES):
            codec.coder.unpack(payload, FILE_FRAMES, 1)

    times = {
        "encode": median(spec["runs"], lambda: codec.encode(samples)),
        "decode": median(spec["runs"], lambda: codec.decode(tokens)),
        "stream in": median(spec["runs"], stream),
        "stream out": median(spec["runs"], stream_back),
        "60 files, one": median(1, unpack),
    }
    entropy.one_blas_thread = nullcontext
    return times | {"60 files, all": median(1, unpack)}


@contextmanager
def neighbour(cores: list[int] | None) -> Iterator[None]:
    """A process that keeps cores busy, one thread for each; None: nobody."""
    workers = []
    for core in cores or ():
        code = f"import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"
        workers.append(subprocess.Popen([sys.executable, "-c", code]))
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def speed(model: str, counts: list[int], numbers: list[int], runs: int) -> None:
    """Print the table of times."""
    there = sorted(os.sched_getaffinity(0))
    header = False
    for count in counts:
        if count > len(there):
            print(f"{count} cores: this process may use only {len(there)}", file=sys.stderr)
            continue
        cores = there[:count]
        for busy in (False, True):
            settings = [(None, False), *((n, False) for n in numbers), (max(numbers), True)]
            for threads, spinning in settings:
                spec = {"model": model, "cores": cores, "threads": threads, "spinning": spinning}
                command = [sys.executable, __file__, "--row", json.dumps(spec | {"runs": runs})]
                with neighbour(cores if busy else None):
                    out = subprocess.run(command, check=True, capture_output=True, text=True)
                times = json.loads(out.stdout)
                if not header:
                    print(f"{model}; ms, medians of {runs}\n")
                    print(f"| cores | neighbour | threads | {' | '.join(times)} |")
                    print("|---:|---|---|" + "---:|" * len(times))
                    header = True
                name = f"{threads or 'default'}{', spinning' if spinning else ''}"
                cells = " | ".join(f"{value:.0f}" for value in times.values())
                print(f"| {count} | {'busy' if busy else ''} | {name} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "models", nargs="*", default=["speech-3k", "speech-6k", "speech-vp-16384", "speech-1k"]
    )
    parser.add_argument("--data", type=Path, default=DATA / "speech_dev", help="recordings")
    parser.add_argument("--every", type=int, default=5, help="take every n-th recording")
    parser.add_argument("--threads", type=int, nargs="+", help="1 2 3 4 8; with --speed 1 2 4")
    parser.add_argument("--speed", action="store_true", help="times, of the first model")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2], help="with --speed")
    parser.add_argument("--runs", type=int, default=5, help="with --speed")
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measured(args.row)))
    elif args.speed:
        speed(args.models[0], args.cores, args.threads or [1, 2, 4], args.runs)
    else:
        differences(args.models, args.data, args.every, args.threads or [1, 2, 3, 4, 8])


if __name__ == "__main__":
    main()
