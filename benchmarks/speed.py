"""Speed of encoding and decoding, beside L3AC 3 kbps; cold start; multiply-adds.

Every measurement runs in a child process of its own, one after another, so that thread settings
and peak memory belong to it alone. L3AC has random weights: its speed does not depend on them,
and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SPEECH = ROOT / "tests" / "resources" / "speech.wav"
RATE = 16_000  # of the clips; also that of L3AC
WARM_UP = 2
COLD_SECONDS = 5
L3AC_MODEL = "3kbps"
RATIOS = (("encode", "encode_times"), ("decode", "decode_times"))


# In the children


def timed(function: Callable[[], Any], runs: int) -> tuple[list[float], Any]:
    """Seconds of each run after the warm-up, and the last result."""
    for _ in range(WARM_UP):
        result = function()
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - began)
    return seconds, result


def peak_rss() -> int:
    """Largest resident memory of this process so far, bytes.

    Linux's ru_maxrss would count the parent as it was before exec.
    """
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def measure_ours(spec: dict[str, Any]) -> dict[str, Any]:
    from vpcodec import Codec
    from vpcodec.audio import resample

    codec = Codec.from_pretrained(spec["model"], backend=spec["backend"], threads=spec["threads"])
    samples = resample(np.load(spec["clip"]), RATE, codec.sample_rate)
    encode, tokens = timed(lambda: codec.encode(samples), spec["runs"])
    decode, decoded = timed(lambda: codec.decode(tokens, samples.shape[1]), spec["runs"])
    assert decoded.shape == samples.shape
    return {"encode": encode, "decode": decode, "peak_rss": peak_rss()}


def build_l3ac() -> Any:
    """L3AC 3 kbps with random weights."""
    import torch
    from l3ac import CONFIG_DIR, L3AC, L3ACConfig

    torch.manual_seed(0)
    codec = L3AC(L3ACConfig(config_file=CONFIG_DIR / f"{L3AC_MODEL}.toml"))
    codec.network.eval()
    return codec


def measure_l3ac(spec: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(spec["threads"])
    codec = build_l3ac()
    samples = torch.from_numpy(np.load(spec["clip"]))
    with torch.inference_mode():
        encode, (_, indices) = timed(lambda: codec.encode_audio(samples), spec["runs"])
        tokens = indices["indices"]
        decode, decoded = timed(lambda: codec.decode_audio(indices=tokens), spec["runs"])
    assert decoded.shape[-1] >= samples.shape[-1]
    return {"encode": encode, "decode": decode, "peak_rss": peak_rss()}


def count_ours(spec: dict[str, Any]) -> dict[str, float]:
    """Multiply-adds per second of audio, in the chunks of `Codec`, whose state is full."""
    import torch

    from vpcodec.backends.torch import load_model
    from vpcodec.hub import open_model
    from vpcodec.models.layers import State, zero_state

    model = load_model(open_model(spec["model"]))
    config = model.config
    frames = max(1, round(config.frame_rate))
    seconds = frames / config.frame_rate

    def steps(function: Any, shapes: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        state = State(zero_state(shapes, 1))

        def step(x: torch.Tensor) -> torch.Tensor:
            nonlocal state
            y = function(x, state)
            state = State(state.next)
            return y

        return step

    encode = steps(model.encode, model.encoder_state)
    decode = steps(model.decode, model.decoder_state)
    samples = torch.zeros(1, frames * config.hop_length)
    with torch.no_grad():
        tokens = encode(samples)
        decode(tokens)
        return {
            "encode": count(lambda: encode(samples)) / seconds,
            "decode": count(lambda: decode(tokens)) / seconds,
        }


def count_l3ac(spec: dict[str, Any]) -> dict[str, float]:
    """Multiply-adds per second of audio; the whole clip at once, as L3AC takes it."""
    import torch

    codec = build_l3ac()
    samples = torch.from_numpy(np.load(spec["clip"]))
    seconds = samples.shape[-1] / RATE
    with torch.no_grad():
        _, indices = codec.encode_audio(samples)
        return {
            "encode": count(lambda: codec.encode_audio(samples)) / seconds,
            "decode": count(lambda: codec.decode_audio(indices=indices["indices"])) / seconds,
        }


def count(function: Callable[[], Any]) -> float:
    """Multiply-adds of the convolutions and matrix products in a call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 2


ROLES = {
    "measure_ours": measure_ours,
    "measure_l3ac": measure_l3ac,
    "count_ours": count_ours,
    "count_l3ac": count_l3ac,
}


# In the parent


def child(role: str, threads: int = 1, **spec: Any) -> dict[str, Any]:
    """Run one role in a process of its own; its result."""
    limits = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS")}
    command = [sys.executable, __file__, "--child", json.dumps(spec | {"threads": threads}), role]
    done = subprocess.run(command, env=os.environ | limits, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{role} failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, backend: str, threads: int, seconds: float, found: dict) -> dict[str, Any]:
    """A line of the table, from the seconds that a child reports."""
    times = {
        f"{side}_times": seconds / statistics.median(found[side]) for side in ("encode", "decode")
    }
    return {
        "codec": name,
        "backend": backend,
        "threads": threads,
        **times,
        "encode_seconds": [round(x, 5) for x in found["encode"]],
        "decode_seconds": [round(x, 5) for x in found["decode"]],
        "peak_rss_mb": found["peak_rss"] / 1e6,
    }


def cold_start(model: str, clip: Path, folder: Path, runs: int) -> list[float]:
    """Seconds from the shell to the token file, the program in the disk cache."""
    script = Path(sys.executable).with_name("vpcodec")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "vpcodec"]
    command += ["encode", str(clip), str(folder / "cold.tok"), "--model", model]

    def run() -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"vpcodec encode failed: {done.stderr.strip()}")

    return timed(run, runs)[0]


def make_clip(path: Path, seconds: float) -> np.ndarray:
    """(1, T) float32 of that length at RATE: the file, repeated or cut."""
    from vpcodec.audio import load, resample

    samples, rate = load(path)
    samples = resample(samples[:1], rate, RATE)
    n = round(seconds * RATE)
    return np.ascontiguousarray(np.tile(samples, (1, -(-n // samples.shape[1])))[:, :n])


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            lines = (line for line in file if line.startswith("model name"))
            name = next(lines).partition(":")[2].strip()
    except (OSError, StopIteration):
        pass
    versions = {}
    for package in ("vpcodec", "onnxruntime", "torch", "l3ac"):
        if find_spec(package) is not None:
            versions[package] = metadata.version(package)
    return {"cpu": name, "cores": os.cpu_count(), "python": platform.python_version()} | versions


def measure(args: argparse.Namespace, note: Callable[[str], None]) -> dict[str, Any]:
    from vpcodec.audio import save

    has_torch = find_spec("torch") is not None
    has_peer = has_torch and find_spec("l3ac") is not None and not args.no_peer
    if not has_peer and not args.no_peer:
        note("l3ac is not installed (benchmarks/requirements.txt): no peer beside these figures")
    backends = ["onnx", "torch"] if args.backend == "both" else [args.backend]
    seconds = args.seconds
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        clip = folder / "clip.npy"
        np.save(clip, make_clip(args.file, seconds))
        spec = {"clip": str(clip), "model": args.model, "runs": args.runs}
        for threads in args.threads:
            for backend in backends:
                found = child("measure_ours", threads, backend=backend, **spec)
                rows.append(row(args.model, backend, threads, seconds, found))
            if has_peer:
                found = child("measure_l3ac", threads, **spec)
                rows.append(row(f"l3ac {L3AC_MODEL}", "torch", threads, seconds, found))
        save(folder / "cold.wav", make_clip(args.file, COLD_SECONDS), RATE)
        cold = cold_start(args.model, folder / "cold.wav", folder, args.cold_runs)
        macs = {}
        if has_torch:
            macs[args.model] = child("count_ours", **spec)
        else:
            note("torch is not installed (vpcodec[train]): multiply-adds are not counted")
        if has_peer:
            macs[f"l3ac {L3AC_MODEL}"] = child("count_l3ac", **spec)
    if has_peer:
        peers = {r["threads"]: r for r in rows if r["codec"].startswith("l3ac")}
        for r in rows:
            for side, key in RATIOS:
                r[f"{side}_ratio"] = r[key] / peers[r["threads"]][key]
    return {
        "machine": machine(),
        "clip_seconds": seconds,
        "runs": args.runs,
        "rows": rows,
        "cold_start_seconds": {"median": statistics.median(cold), "all": cold},
        "multiply_adds_per_second": macs,
    }


def show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(", ".join(f"{name} {value}" for name, value in found["machine"].items()))
    with_peer = "encode_ratio" in found["rows"][0]
    title = f"{found['clip_seconds']:g} s clip, median of {found['runs']} runs"
    table = Table(title=f"Times faster than real time: {title}", title_justify="left")
    table.add_column("codec")
    table.add_column("backend")
    names = ["threads", "encode", "decode", *(["enc / peer", "dec / peer"] if with_peer else [])]
    for name in [*names, "peak MB"]:
        table.add_column(name, justify="right")
    for r in found["rows"]:
        ratios = [f"{r[f'{side}_ratio']:.1f}" for side, _ in RATIOS] if with_peer else []
        speeds = [f"{r[key]:.1f}" for _, key in RATIOS]
        memory = f"{r['peak_rss_mb']:.0f}"
        table.add_row(r["codec"], r["backend"], str(r["threads"]), *speeds, *ratios, memory)
    console.print(table)
    if found["multiply_adds_per_second"]:
        table = Table(title="Multiply-adds per second of audio, 10^9", title_justify="left")
        table.add_column("codec")
        for name in ("encode", "decode", "both"):
            table.add_column(name, justify="right")
        for name, macs in found["multiply_adds_per_second"].items():
            both = macs["encode"], macs["decode"], macs["encode"] + macs["decode"]
            table.add_row(name, *(f"{x / 1e9:.3f}" for x in both))
        console.print(table)
    cold = found["cold_start_seconds"]
    console.print(
        f"Cold start, `vpcodec encode` of a {COLD_SECONDS} s clip: {cold['median']:.2f} s "
        f"(median of {len(cold['all'])}, {min(cold['all']):.2f} to {max(cold['all']):.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="speech-3k", help="bundled name or folder")
    parser.add_argument("--backend", choices=("onnx", "torch", "both"), default="onnx")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--file", type=Path, default=SPEECH, help="audio to repeat or cut")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the clip")
    parser.add_argument("--runs", type=int, default=7, help="timed runs, after two to warm up")
    parser.add_argument("--cold-runs", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true", help="leave L3AC out")
    parser.add_argument("--json", action="store_true", help="print a JSON document")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("role", nargs="?", choices=ROLES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(ROLES[args.role](json.loads(args.child))))
        return
    found = measure(args, lambda text: print(text, file=sys.stderr))
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


if __name__ == "__main__":
    main()
