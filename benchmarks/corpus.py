"""The promises of `vpcodec tokenize` at full size: bytes, losses, throughput and memory.

    python benchmarks/corpus.py speech/ --work /tmp/corpus            # all of it
    python benchmarks/corpus.py speech/ --work /tmp/corpus node kills # some of it

Takes clips from the recordings in a folder and makes:

- node: --files short files on a local Ray of two nodes, one of which is lost in the middle: the
  same bytes as without Ray.
- kills: the driver is killed with SIGKILL at --kills random moments and repeated: the same bytes.
- corrupt: 3 % of 1,000 files are truncated: exactly these are in the quarantine.
- speed: one worker and two on the same minutes of speech: times real time, their ratio (at least
  1.6 on two idle cores), and what that means for 100,000 hours. Starting Ray does not count: the
  time is that from the first shard to the last one.
- memory: --hours of speech with two workers: the memory of all processes together (proportional set
  sizes) stays below 2 GB.

Timings need an idle machine. Exit code 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vpcodec.corpus import tokenize
from vpcodec.media.audio import find_audio, load, resample, save

RATE = 16_000
LIMIT_MB = 2000
RATIO = 1.6
COMMAND = [sys.executable, "-m", "vpcodec", "tokenize"]


def speech(folder: Path, seconds: float) -> np.ndarray:
    """(T,) float32 of the first recordings, at 16 kHz."""
    parts, n = [], 0
    for name in find_audio(folder):
        samples, rate = load(folder / name)
        parts.append(resample(samples, rate, RATE).mean(0))
        n += len(parts[-1])
        if n >= seconds * RATE:
            break
    whole = np.concatenate(parts)
    return np.resize(whole, round(seconds * RATE))


def make_clips(target: Path, source: np.ndarray, n: int, seconds: float, bad: int = 0) -> set[str]:
    """Different clips as files; the keys of those that are truncated."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    rng = np.random.default_rng(0)
    broken = set(rng.choice(n, bad, replace=False).tolist())
    for i in range(n):
        length = round(seconds * RATE * rng.uniform(0.5, 1.5))
        start = int(rng.integers(len(source) - length))
        path = target / f"{i:06d}.wav"
        save(path, source[None, start : start + length], RATE)
        if i in broken:
            path.write_bytes(path.read_bytes()[:-999])
    return {f"{i:06d}" for i in broken}


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def without_ray(recordings: Path, out: Path, shard_mb: float) -> dict[str, bytes]:
    """The corpus that one process makes, shard after shard."""
    from vpcodec import AudioCodec
    from vpcodec.corpus import engine
    from vpcodec.corpus.shards import ShardTokenizer

    def run(
        plan: Any, shards: list[int], *, on_report: Callable[..., None], **options: Any
    ) -> None:
        codec = AudioCodec.from_pretrained(plan.settings.model, threads=1)
        for shard in shards:
            on_report(ShardTokenizer(plan, codec).run(shard))

    before, engine.run_shards = engine.run_shards, run
    try:
        shutil.rmtree(out, ignore_errors=True)
        tokenize([str(recordings)], out, shard_mb=shard_mb)
    finally:
        engine.run_shards = before
    return contents(out)


def node(options: argparse.Namespace, source: np.ndarray) -> bool:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray
    from ray.cluster_utils import Cluster

    recordings, shard_mb = options.work / "short", options.files * 0.0002
    make_clips(recordings, source, options.files, 0.5)
    expected = without_ray(recordings, options.work / "expected", shard_mb)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)

    def progress(totals: Any) -> None:
        if totals.shards >= totals.n_shards // 2 and len(nodes) == 2:
            cluster.remove_node(nodes.pop(), allow_graceful=False)

    out = options.work / "node"
    shutil.rmtree(out, ignore_errors=True)
    totals = tokenize([str(recordings)], out, shard_mb=shard_mb, progress=progress)
    ray.shutdown()
    cluster.shutdown()
    same = contents(out) == expected
    print(f"node: {totals.records:,} of {options.files:,} files, a node lost, same bytes: {same}")
    return same and totals.records == options.files


def kills(options: argparse.Namespace, source: np.ndarray) -> bool:
    recordings, shard_mb = options.work / "killed", options.files * 0.00005
    n_files = options.files // 4
    make_clips(recordings, source, n_files, 0.5)
    expected = without_ray(recordings, options.work / "expected", shard_mb)
    out = options.work / "kills"
    shutil.rmtree(out, ignore_errors=True)
    command = [*COMMAND, str(recordings), "-o", str(out), "--shard-mb", str(shard_mb), "-j", "2"]
    chance, done = random.Random(0), 0
    for _ in range(options.kills):
        began = time.monotonic()
        driver = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while driver.poll() is None and len(list(out.glob("done/*.json"))) <= done:
            if time.monotonic() - began > 60:
                break
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 3))
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        done = len(list(out.glob("done/*.json")))
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    same = contents(out) == expected
    print(f"kills: {n_files:,} files, {options.kills} kills, same bytes: {same}")
    return same


def corrupt(options: argparse.Namespace, source: np.ndarray) -> bool:
    recordings, out = options.work / "corrupt", options.work / "quarantine"
    bad = make_clips(recordings, source, 1000, 1.0, bad=30)
    shutil.rmtree(out, ignore_errors=True)
    tokenize([str(recordings)], out, shard_mb=2, jobs=2)
    lines = (out / "quarantine.jsonl").read_text().splitlines()
    found = {json.loads(line)["key"] for line in lines}
    print(f"corrupt: {len(bad)} of 1,000, in quarantine {len(found)}, the same: {found == bad}")
    return found == bad


def speed(options: argparse.Namespace, source: np.ndarray) -> bool:
    recordings = options.work / "long"
    make_clips(recordings, source, 160, 15.0)
    found = {}
    for jobs in (1, 2):
        out = options.work / f"speed-{jobs}"
        shutil.rmtree(out, ignore_errors=True)
        marks: list[tuple[float, float, int]] = []

        def progress(totals: Any, marks: list[tuple[float, float, int]] = marks) -> None:
            marks.append((time.monotonic(), totals.seconds, totals.shards))

        tokenize([str(recordings)], out, shard_mb=2, jobs=jobs, progress=progress)
        # Both workers have begun when the fourth shard is done.
        first = next(mark for mark in marks if mark[2] >= 4)
        found[jobs] = (marks[-1][1] - first[1]) / (marks[-1][0] - first[0])
    ratio = found[2] / found[1]
    print(
        f"speed: {found[1]:.1f} x real time with one worker, {found[2]:.1f} with two: {ratio:.2f}"
    )
    hours = 100_000 / (found[2] / 2)
    print(f"speed: 100,000 hours take {hours:,.0f} hours of CPU, {hours / 96:,.0f} h on 96 CPUs")
    return ratio >= RATIO


def memory(options: argparse.Namespace, source: np.ndarray) -> bool:
    recordings, out = options.work / "hours", options.work / "memory"
    n_files = round(options.hours * 3600 / len(source) * RATE)
    shutil.rmtree(recordings, ignore_errors=True)
    recordings.mkdir(parents=True)
    save(recordings / "000000.wav", source[None], RATE)
    for i in range(1, n_files):
        os.link(recordings / "000000.wav", recordings / f"{i:06d}.wav")
    shutil.rmtree(out, ignore_errors=True)
    command = [*COMMAND, str(recordings), "-o", str(out), "-j", "2", "--json"]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    peak = 0.0

    def watch() -> None:
        nonlocal peak
        while driver.poll() is None:
            peak = max(peak, memory_of(driver.pid))
            time.sleep(0.5)

    thread = threading.Thread(target=watch)
    thread.start()
    facts = json.loads(driver.communicate()[0])
    thread.join()
    print(f"memory: {facts['hours']:.1f} h, peak {peak:,.0f} MB of all processes")
    return peak < LIMIT_MB


def memory_of(root: int) -> float:
    """Megabytes of a process and all its descendants, shared pages counted once."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    todo, total = [root], 0
    while todo:
        process = todo.pop()
        todo += children.get(process, [])
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1000


TESTS = {"node": node, "kills": kills, "corrupt": corrupt, "speed": speed, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("speech", type=Path, help="folder of recordings")
    parser.add_argument("tests", nargs="*", help=f"of {', '.join(TESTS)}; default: all")
    parser.add_argument("--work", type=Path, required=True, help="folder for files of this script")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--hours", type=float, default=20)
    options = parser.parse_intermixed_args()
    if unknown := set(options.tests) - set(TESTS):
        parser.error(f"no test {min(unknown)!r}")
    source = speech(options.speech, 600)
    broken = [name for name in options.tests or TESTS if not TESTS[name](options, source)]
    if broken:
        raise SystemExit(f"broken: {', '.join(broken)}")


if __name__ == "__main__":
    main()
