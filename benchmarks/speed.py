"""Speed of encoding and decoding, compared with other neural codecs; cold start; multiply-adds.

Every measurement runs in its own child process, one after another, so that thread settings and peak
memory are its own. Ours goes from a WAV file to a token file and back, including entropy coding;
the others go from samples to codes and back. They have random weights, on which speed does not
depend, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import io
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
LEAST_SECONDS = 10.0  # shortest total time of a measurement, to average out slow moments
COLD_SECONDS = 5
L3AC_MODEL = "3kbps"
PACKAGES = {  # peer -> package that it is in
    "l3ac 3 kbps": "l3ac",
    "encodec 24 kHz, 6 kbps": "transformers",
    "mimi, 8 codebooks": "transformers",
    "snac 24 kHz": "snac",
    "dac 16 kHz": "transformers",
}
FIRST = next(iter(PACKAGES))  # the peer that ratios refer to
RATIOS = (("encode", "encode_times"), ("decode", "decode_times"))


# In the children


def timed(
    function: Callable[[], Any], runs: int, least_seconds: float = 0.0
) -> tuple[list[float], Any]:
    """Seconds of each run after the warm-up (`runs`, or more short ones), and the last result."""
    for _ in range(WARM_UP):
        result = function()
    seconds = []
    while len(seconds) < runs or sum(seconds) < least_seconds:
        began = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - began)
    return seconds, result


def peak_rss() -> int:
    """Peak resident memory of this process, bytes.

    Linux's ru_maxrss would include the parent before exec.
    """
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def measure_ours(spec: dict[str, Any]) -> dict[str, Any]:
    from vpcodec import Codec, read_tokens

    codec = Codec.from_pretrained(spec["model"], backend=spec["backend"], threads=spec["threads"])

    def encode() -> io.BytesIO:
        file = io.BytesIO()
        codec.encode_file(spec["wav"], file)
        file.seek(0)
        return file

    def decode() -> io.BytesIO:
        file = io.BytesIO()
        codec.decode_file(io.BytesIO(coded.getvalue()), file)
        return file

    encoding, coded = timed(encode, spec["runs"], LEAST_SECONDS)
    decoding, _ = timed(decode, spec["runs"], LEAST_SECONDS)
    found = {"encode": encoding, "decode": decoding, "peak_rss": peak_rss()}
    if codec.coder is None:
        return found
    tokens, header = read_tokens(coded, coder=codec.coder)
    packing, file = timed(lambda: written(tokens, header, codec.coder), spec["runs"], LEAST_SECONDS)
    reading, _ = timed(
        lambda: read_tokens(io.BytesIO(file), coder=codec.coder), spec["runs"], LEAST_SECONDS
    )
    return found | {"pack": packing, "unpack": reading}


def written(tokens: np.ndarray, header: Any, coder: Any) -> bytes:
    """The contents of a token file."""
    from vpcodec.tokenfile import write_tokens

    file = io.BytesIO()
    write_tokens(file, tokens, header, coder=coder)
    return file.getvalue()


def build_peer(name: str) -> tuple[int, Callable[[Any], Any], Callable[[Any], Any]]:
    """A codec with random weights: sample rate, (1, T) samples to codes, codes to (..., T)."""
    import torch

    torch.manual_seed(0)
    if name == "l3ac 3 kbps":
        from l3ac import CONFIG_DIR, L3AC, L3ACConfig

        codec = L3AC(L3ACConfig(config_file=CONFIG_DIR / f"{L3AC_MODEL}.toml"))
        codec.network.eval()
        return (
            RATE,
            lambda samples: codec.encode_audio(samples)[1]["indices"],
            lambda codes: codec.decode_audio(indices=codes),
        )
    if name == "snac 24 kHz":
        from snac import SNAC

        model = SNAC(
            sampling_rate=24_000,
            encoder_dim=48,
            encoder_rates=[2, 4, 8, 8],
            decoder_dim=1024,
            decoder_rates=[8, 8, 4, 2],
            attn_window_size=None,
            codebook_size=4096,
            codebook_dim=8,
            vq_strides=[4, 2, 1],
            noise=True,
            depthwise=True,
        ).eval()
        return 24_000, lambda x: model.encode(x[None]), model.decode
    from transformers import (
        DacConfig,
        DacModel,
        EncodecConfig,
        EncodecModel,
        MimiConfig,
        MimiModel,
    )

    if name.startswith("encodec"):
        model = EncodecModel(EncodecConfig()).eval()
        return (
            24_000,
            lambda x: model.encode(x[None], bandwidth=6.0),
            lambda codes: model.decode(codes.audio_codes, codes.audio_scales).audio_values,
        )
    if name.startswith("mimi"):
        model = MimiModel(MimiConfig()).eval()
        return (
            24_000,
            lambda x: model.encode(x[None], num_quantizers=8).audio_codes,
            lambda codes: model.decode(codes).audio_values,
        )
    config = DacConfig(
        sampling_rate=16_000,
        downsampling_ratios=[2, 4, 5, 8],
        upsampling_ratios=[8, 5, 4, 2],
        hop_length=320,
        n_codebooks=12,
    )
    model = DacModel(config).eval()
    return (
        16_000,
        lambda x: model.encode(x[None]).quantized_representation,
        lambda latents: model.decode(latents).audio_values,
    )


def measure_peer(spec: dict[str, Any]) -> dict[str, Any]:
    import torch
    from torchaudio.functional import resample

    torch.set_num_threads(spec["threads"])
    rate, encode, decode = build_peer(spec["peer"])
    samples = resample(torch.from_numpy(np.load(spec["clip"])), RATE, rate)
    with torch.inference_mode():
        encoding, codes = timed(lambda: encode(samples), spec["runs"], LEAST_SECONDS)
        decoding, decoded = timed(lambda: decode(codes), spec["runs"], LEAST_SECONDS)
    assert decoded.shape[-1] >= 0.99 * samples.shape[-1]
    return {"encode": encoding, "decode": decoding, "peak_rss": peak_rss()}


def count_ours(spec: dict[str, Any]) -> dict[str, float]:
    """Multiply-adds per second of audio, in chunks as in `Codec`, with full state."""
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


def count_peer(spec: dict[str, Any]) -> dict[str, float]:
    """Multiply-adds per second of audio, for the whole clip in one piece."""
    import torch
    from torchaudio.functional import resample

    rate, encode, decode = build_peer(spec["peer"])
    samples = resample(torch.from_numpy(np.load(spec["clip"])), RATE, rate)
    seconds = samples.shape[-1] / rate
    with torch.no_grad():
        codes = encode(samples)
        return {
            "encode": count(lambda: encode(samples)) / seconds,
            "decode": count(lambda: decode(codes)) / seconds,
        }


def count(function: Callable[[], Any]) -> float:
    """Multiply-adds of the convolutions and matrix products in a call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 2


ROLES = {
    "measure_ours": measure_ours,
    "measure_peer": measure_peer,
    "count_ours": count_ours,
    "count_peer": count_peer,
}


# In the parent


def child(role: str, threads: int = 1, **spec: Any) -> dict[str, Any]:
    """Run one role in its own process; returns its result."""
    limits = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS")}
    command = [sys.executable, __file__, "--child", json.dumps(spec | {"threads": threads}), role]
    done = subprocess.run(command, env=os.environ | limits, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{role} failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, backend: str, threads: int, seconds: float, found: dict) -> dict[str, Any]:
    """A row of the table, from the result of a child process."""
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
        **{
            f"{side}_times": seconds / statistics.median(found[side])
            for side in ("pack", "unpack")
            if side in found
        },
    }


def cold_start(model: str, clip: Path, folder: Path, runs: int) -> list[float]:
    """Seconds from the shell to the token file, with the program compiled and in the disk cache."""
    script = Path(sys.executable).with_name("vpcodec")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "vpcodec"]
    command += ["encode", str(clip), str(folder / "cold.tok"), "--model", model]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def run() -> None:
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"vpcodec encode failed: {done.stderr.strip()}")

    return timed(run, runs)[0]


def make_clip(path: Path, seconds: float) -> np.ndarray:
    """(1, T) float32 at RATE: a file, repeated or cut to a length."""
    from vpcodec.media.audio import load, resample

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
    for package in ("vpcodec", "onnxruntime", "torch", *sorted(set(PACKAGES.values()))):
        if find_spec(package) is not None:
            versions[package] = metadata.version(package)
    return {"cpu": name, "cores": os.cpu_count(), "python": platform.python_version()} | versions


def measure(args: argparse.Namespace, note: Callable[[str], None]) -> dict[str, Any]:
    from vpcodec.media.audio import save

    has_torch = find_spec("torch") is not None
    peers = args.peers if has_torch else []
    for peer in [peer for peer in peers if find_spec(PACKAGES[peer]) is None]:
        peers = [name for name in peers if name != peer]
        note(f"{PACKAGES[peer]} is not installed (benchmarks/requirements.txt): no {peer}")
    backends = ["onnx", "torch"] if args.backend == "both" else [args.backend]
    seconds = args.seconds
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        clip = folder / "clip.npy"
        np.save(clip, make_clip(args.file, seconds))
        wav = folder / "clip.wav"
        save(wav, np.load(clip), RATE)
        spec = {"clip": str(clip), "wav": str(wav), "model": args.model, "runs": args.runs}
        for threads in args.threads:
            for backend in backends:
                found = child("measure_ours", threads, backend=backend, **spec)
                rows.append(row(args.model, backend, threads, seconds, found))
            for peer in peers:
                found = child("measure_peer", threads, peer=peer, **spec)
                rows.append(row(peer, "torch", threads, seconds, found))
        save(folder / "cold.wav", make_clip(args.file, COLD_SECONDS), RATE)
        cold = cold_start(args.model, folder / "cold.wav", folder, args.cold_runs)
        macs = {}
        if has_torch:
            macs[args.model] = child("count_ours", **spec)
        else:
            note("torch is not installed (vpcodec[train]): multiply-adds are not counted")
        for peer in peers:
            macs[peer] = child("count_peer", peer=peer, **spec)
    if FIRST in peers:
        first = {r["threads"]: r for r in rows if r["codec"] == FIRST}
        for r in rows:
            for side, key in RATIOS:
                r[f"{side}_ratio"] = r[key] / first[r["threads"]][key]
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
    title = f"{found['clip_seconds']:g} s clip, median of at least {found['runs']} runs"
    table = Table(title=f"Times faster than real time: {title}", title_justify="left")
    table.add_column("codec")
    table.add_column("backend")
    names = ["threads", "encode", "decode", *(["enc / l3ac", "dec / l3ac"] if with_peer else [])]
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
    for r in found["rows"]:
        if "unpack_times" in r:
            console.print(
                f"Of it, writing and reading {r['codec']}'s tokens, entropy coding included: "
                f"{r['pack_times']:.0f}x and {r['unpack_times']:.0f}x real time"
            )
            break
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
    parser.add_argument(
        "--runs", type=int, default=7, help="timed runs at least, after two warm-up runs"
    )
    parser.add_argument("--cold-runs", type=int, default=5)
    parser.add_argument(
        "--peers", nargs="*", choices=PACKAGES, default=list(PACKAGES), help="other codecs"
    )
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
