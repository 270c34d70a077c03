"""Published models here and in the authors' packages: agreement of tokens and audio, speed, memory.

Both have the same random weights (tests/published/official.py), so nothing is downloaded. Ours are
converted as published files are, and run through `Codec`. Every measurement runs in its own child
process, one after another."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from speed import RATE, SPEECH, machine, make_clip, peak_rss, timed

from vpcodec.published import MODULES, PUBLISHED

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/published"))

from published import Official, official_missing, random_weights, save_modules  # noqa: E402

SEAM_SECONDS = 40.0
LENGTHS = (0.3, 1.0, 5.0, 12.0)  # lengths of the clips that are compared, s
BY_NAME = {published.config.name: published for published in PUBLISHED}


# In the children


def clip(spec: dict[str, Any], seconds: float) -> np.ndarray:
    """(T,) float32 at the sample rate of the model."""
    from vpcodec.media.audio import resample

    rate = BY_NAME[spec["model"]].config.sample_rate
    samples = resample(make_clip(SPEECH, seconds), RATE, rate)[0]
    return np.ascontiguousarray(samples[: round(seconds * rate)])


def official(spec: dict[str, Any]) -> Official:
    import torch

    torch.set_num_threads(spec["threads"])
    files = {module: Path(spec["files"]) / f"{module}.pt" for module in MODULES}
    return Official(BY_NAME[spec["model"]], files)


def prepare(spec: dict[str, Any]) -> None:
    """Make the files that the authors would publish, and convert them to our model folder."""
    from vpcodec.published.convert import convert

    published = BY_NAME[spec["model"]]
    Path(spec["files"]).mkdir()
    files = save_modules(random_weights(published.config), Path(spec["files"]))
    convert(files, published, Path(spec["folder"]))


def compare(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare tokens and audio for each of `LENGTHS`; differences are relative to full scale.

    Both decode the same tokens, those of the package, which in SQCodec extend to the end of a
    window. Our audio is compared with that of the package, and with that of the package with exact
    interpolation positions (`Official.decode_exactly`). From the tokens of the clip alone, ours
    continues with those of silence: `kept_db` is the ratio of the audio to the resulting
    difference.
    """
    from vpcodec import Codec

    ours = Codec.from_pretrained(spec["folder"], backend=spec["backend"], threads=spec["threads"])
    theirs = official(spec)
    rows = []
    for seconds in LENGTHS:
        samples = clip(spec, seconds)
        n = len(samples)
        tokens = ours.encode(samples)[0]
        padded = theirs.encode(samples)
        kept = padded[: -(-n // ours.hop_length)]
        assert tokens.shape == kept.shape
        differ = tokens != kept
        positions = theirs.positions(samples)[: len(kept)][differ]
        edges = (0.5 - np.abs(positions - np.round(positions))).min(axis=1, initial=0.5)
        audio = ours.decode(padded[None])[0, :n].astype(np.float64)
        package, exact = theirs.decode(padded)[:n], theirs.decode_exactly(padded)[:n]
        row = {
            "model": spec["model"],
            "seconds": seconds,
            "tokens": len(tokens),
            "equal_tokens": float(np.mean(~differ)),
            "distance_to_edge": float(edges.max(initial=0)),
            "audio_difference": float(np.abs(audio - package).max()),
            "package_rounding": float(np.abs(package - exact).max()),
            "difference_from_exact": float(np.abs(audio - exact).max()),
        }
        if len(padded) > len(kept):
            wrong = ours.decode(kept[None])[0, :n] - exact
            row["kept_db"] = float(10 * np.log10(np.mean(exact**2) / np.mean(wrong**2)))
        rows.append(row)
    return rows


def seams(spec: dict[str, Any]) -> dict[str, Any]:
    """Compare a long clip coded in windows, as usual, with the same clip coded in one piece.

    `seam_jump` is the largest step between neighbouring samples within 10 ms of the seams of
    windows, over the largest step at the same positions of the clip decoded in one piece.
    """
    from vpcodec import Codec
    from vpcodec.published import streams

    codec = Codec.from_pretrained(spec["folder"], backend=spec["backend"], threads=spec["threads"])
    samples = clip(spec, SEAM_SECONDS)
    tokens = codec.encode(samples)
    windowed = codec.decode(tokens)[0]
    window = codec.decoder_stream()._window * codec.hop_length
    streams.ENCODE_SECONDS = streams.DECODE_SECONDS = 2 * SEAM_SECONDS
    whole_tokens = codec.encode(samples)
    whole = codec.decode(tokens)[0]
    seams_at = range(window, len(whole), window)
    near = round(0.01 * codec.sample_rate)
    jumps = [
        max(np.abs(np.diff(audio[at - near : at + near])).max() for at in seams_at)
        for audio in (windowed, whole)
    ]
    return {
        "model": spec["model"],
        "seconds": SEAM_SECONDS,
        "windows": len(seams_at) + 1,
        "equal_tokens": float(np.mean(tokens == whole_tokens)),
        "windowed_db": float(10 * np.log10(np.mean(whole**2) / np.mean((windowed - whole) ** 2))),
        "seam_jump": float(jumps[0] / jumps[1]),
    }


def measure_ours(spec: dict[str, Any]) -> dict[str, Any]:
    from vpcodec import Codec

    codec = Codec.from_pretrained(spec["folder"], backend=spec["backend"], threads=spec["threads"])
    samples = clip(spec, spec["seconds"])
    encode, tokens = timed(lambda: codec.encode(samples), spec["runs"])
    decode, decoded = timed(lambda: codec.decode(tokens, len(samples)), spec["runs"])
    assert decoded.shape == (1, len(samples))
    return {"encode": encode, "decode": decode, "peak_rss": peak_rss()}


def measure_official(spec: dict[str, Any]) -> dict[str, Any]:
    codec = official(spec)
    samples = clip(spec, spec["seconds"])
    encode, tokens = timed(lambda: codec.encode(samples), spec["runs"])
    decode, decoded = timed(lambda: codec.decode(tokens), spec["runs"])
    assert len(decoded) >= len(samples)
    return {"encode": encode, "decode": decode, "peak_rss": peak_rss()}


ROLES = {
    "prepare": prepare,
    "compare": compare,
    "seams": seams,
    "measure_ours": measure_ours,
    "measure_official": measure_official,
}


# In the parent


def child(role: str, **spec: Any) -> Any:
    """Run one role in its own process; returns its result."""
    threads = str(spec["threads"])
    limits = {f"{name}_NUM_THREADS": threads for name in ("OMP", "MKL", "OPENBLAS")}
    command = [sys.executable, __file__, "--child", json.dumps(spec), role]
    done = subprocess.run(command, env=os.environ | limits, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{role} of {spec['model']} failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def speed_row(model: str, seconds: float, ours: dict, theirs: dict) -> dict[str, Any]:
    """Speed (relative to real time) and memory (MB) of both, and their ratios."""
    row: dict[str, Any] = {"model": model, "seconds": seconds}
    for side in ("encode", "decode"):
        fast, slow = statistics.median(ours[side]), statistics.median(theirs[side])
        row |= {
            f"{side}_times": seconds / fast,
            f"package_{side}_times": seconds / slow,
            f"{side}_ratio": slow / fast,
            f"{side}_seconds": [round(x, 5) for x in ours[side]],
            f"package_{side}_seconds": [round(x, 5) for x in theirs[side]],
        }
    row["peak_rss_mb"] = ours["peak_rss"] / 1e6
    row["package_peak_rss_mb"] = theirs["peak_rss"] / 1e6
    row["memory_share"] = ours["peak_rss"] / theirs["peak_rss"]
    return row


def measure(args: argparse.Namespace) -> dict[str, Any]:
    parity, speed, long = [], [], []
    with tempfile.TemporaryDirectory() as temporary:
        for model in args.models:
            spec = {
                "model": model,
                "folder": str(Path(temporary) / model),
                "files": str(Path(temporary) / f"{model}-files"),
                "backend": args.backend,
                "threads": args.threads,
                "runs": args.runs,
            }
            child("prepare", **spec)
            if not args.no_parity:
                parity += child("compare", **spec)
                long.append(child("seams", **spec))
            for seconds in args.seconds:
                spec["seconds"] = seconds
                found = child("measure_ours", **spec), child("measure_official", **spec)
                speed.append(speed_row(model, seconds, *found))
            print(f"{model}: done", file=sys.stderr)
    versions = {name: metadata.version(name) for name in ("sq_codec", "vector-quantize-pytorch")}
    return {
        "machine": machine() | versions,
        "backend": args.backend,
        "threads": args.threads,
        "runs": args.runs,
        "parity": parity,
        "windows": long,
        "speed": speed,
    }


def show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=110)
    console.print(", ".join(f"{name} {value}" for name, value in found["machine"].items()))

    def table(title: str, names: list[str], rows: list[list[str]]) -> None:
        shown = Table(title=title, title_justify="left")
        shown.add_column("model")
        for name in names:
            shown.add_column(name, justify="right")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)

    if found["parity"]:
        table(
            "Tokens and decoded audio, compared with the authors' package (full scale is 1)",
            ["s", "tokens", "equal", "edge", "audio", "its rounding", "vs exact", "kept dB"],
            [
                [
                    row["model"],
                    f"{row['seconds']:g}",
                    str(row["tokens"]),
                    f"{row['equal_tokens']:.2%}",
                    f"{row['distance_to_edge']:.0e}" if row["equal_tokens"] < 1 else "-",
                    *(
                        f"{row[key]:.1e}"
                        for key in ("audio_difference", "package_rounding", "difference_from_exact")
                    ),
                    f"{row['kept_db']:.0f}" if "kept_db" in row else "-",
                ]
                for row in found["parity"]
            ],
        )
    if found["windows"]:
        table(
            f"{SEAM_SECONDS:g} s in windows, compared with the same in one piece",
            ["windows", "equal tokens", "audio dB", "largest step at seams, relative"],
            [
                [
                    row["model"],
                    str(row["windows"]),
                    f"{row['equal_tokens']:.2%}",
                    f"{row['windowed_db']:.0f}",
                    f"{row['seam_jump']:.2f}",
                ]
                for row in found["windows"]
            ],
        )
    if found["speed"]:
        table(
            f"Times faster than real time, and MB; threads: {found['threads']}, ours with "
            f"{found['backend']}, median of {found['runs']}",
            ["s", "encode", "package", "ratio", "decode", "package", "ratio", "MB", "package"],
            [
                [
                    row["model"],
                    f"{row['seconds']:g}",
                    *(
                        f"{row[key]:.1f}"
                        for side in ("encode", "decode")
                        for key in (f"{side}_times", f"package_{side}_times", f"{side}_ratio")
                    ),
                    f"{row['peak_rss_mb']:.0f}",
                    f"{row['package_peak_rss_mb']:.0f}",
                ]
                for row in found["speed"]
            ],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(BY_NAME), choices=BY_NAME, metavar="M")
    parser.add_argument(
        "--seconds",
        type=float,
        nargs="*",
        default=[10.0],
        help="lengths of timed clips",
    )
    parser.add_argument("--backend", choices=("onnx", "torch"), default="onnx", help="ours")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3, help="timed runs, after two warm-up runs")
    parser.add_argument("--no-parity", action="store_true", help="only speed and memory")
    parser.add_argument("--json", action="store_true", help="print a JSON document")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("role", nargs="?", choices=ROLES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(ROLES[args.role](json.loads(args.child))))
        return
    if reason := official_missing():
        raise SystemExit(f"{reason} (benchmarks/README.md)")
    found = measure(args)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


if __name__ == "__main__":
    main()
