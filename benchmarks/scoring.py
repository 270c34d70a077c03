"""Duration of `vpcodec score`, by metric and in total, and whether its memory stays constant.

Scores a folder with a model and all default metrics, then several copies of the same clips, each in
its own process; and each metric on one of the clips.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SPEECH = ROOT.parent / "shared" / "data" / "speech_dev"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")


def run(folder: Path, model: str, jobs: int) -> dict[str, Any]:
    """Duration of a whole command, and peak memory of its largest process."""
    command = [sys.executable, "-m", "vpcodec", "score", folder, "-m", model, "--jobs", jobs]
    began = time.perf_counter()
    process = subprocess.Popen([*map(str, command), "--json"], stdout=subprocess.PIPE)
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} failed")
    found = json.loads(out)
    return {
        "files": int(found["settings"]["files"]),
        "metrics": len(found["systems"][-1]["metrics"]),
        "seconds": time.perf_counter() - began,
        "megabytes": usage.ru_maxrss / 1024,  # of the parent or of one of its processes
    }


def repeated(folder: Path, target: Path, times: int) -> None:
    """Copy all files of a folder several times, under different names."""
    for path in sorted(folder.iterdir()):
        for i in range(times):
            shutil.copy(path, target / f"{i}-{path.name}")


def each_metric(path: Path) -> dict[str, float]:
    """Measure -> CPU seconds of its second call, on one clip compared with itself."""
    from vpcodec.media.audio import load
    from vpcodec.metrics.base import Clip
    from vpcodec.metrics.registry import choose

    samples, rate = load(path)
    found = {}
    for measure in choose("audio", None)[0]:
        function = measure.function
        function(Clip(samples[0], rate), Clip(samples[0], rate))
        began = time.process_time()
        function(Clip(samples[0], rate), Clip(samples[0], rate))
        found[", ".join(metric.name for metric in measure.metrics)] = time.process_time() - began
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=SPEECH)
    parser.add_argument("--model", default="speech-3k")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--times", type=int, default=3, help="copies of each clip, for memory")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ.update(ONE_THREAD)
    runs = [run(args.folder, args.model, args.jobs)]
    with tempfile.TemporaryDirectory() as temporary:
        repeated(args.folder, Path(temporary), args.times)
        runs.append(run(Path(temporary), args.model, args.jobs))
    first = sorted(args.folder.iterdir())[0]
    document = {"runs": runs, "clip": first.name, "cpu_seconds": each_metric(first)}
    if args.json:
        print(json.dumps(document, indent=2))
        return
    for row in runs:
        print(
            f"{row['files']} files, {row['metrics']} metrics: {row['seconds']:.0f} s, "
            f"{row['megabytes']:.0f} MB at most in one process"
        )
    print(f"CPU seconds for {first.name}:")
    for name, seconds in document["cpu_seconds"].items():
        print(f"  {seconds:6.2f}  {name}")


if __name__ == "__main__":
    main()
