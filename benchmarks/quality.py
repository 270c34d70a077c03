"""Quality and bit rate of a model on a folder of speech, beside other codecs.

Every file is encoded to a token file and decoded, as on the command line. PESQ-WB, STOI, ESTOI and
SI-SDR compare the result with the original at 16 kHz; channels count alone and are averaged.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
RATE = 16_000  # of the metrics
METRICS = ("pesq_wb", "stoi", "estoi", "si_sdr")

codec: Any = None  # of this process


def start(model: str, backend: str) -> None:
    global codec
    from vpcodec import Codec

    codec = Codec.from_pretrained(model, backend=backend, threads=1)


def evaluate(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Metrics and sizes of one file, and its tokens (C, N)."""
    from vpcodec.audio import load, resample
    from vpcodec.tokenfile import read_tokens

    with tempfile.TemporaryDirectory() as temporary:
        token_file, decoded_file = Path(temporary) / "a.tok", Path(temporary) / "a.wav"
        stats = codec.encode_file(path, token_file)
        codec.decode_file(token_file, decoded_file, rate=RATE, subtype="FLOAT")
        tokens, _ = read_tokens(token_file)
        n_bytes = token_file.stat().st_size
        decoded, _ = load(decoded_file)
    samples, rate = load(path)
    reference = resample(samples, rate, RATE)
    values = [compare(x, y) for x, y in zip(reference, decoded, strict=True)]
    row = {
        "file": path.name,
        "seconds": stats.seconds,
        "channels": stats.channels,
        "bytes": n_bytes,
        "bps": 8 * n_bytes / stats.seconds / stats.channels,
    }
    return row | {name: float(np.mean([v[name] for v in values])) for name in METRICS}, tokens


def compare(reference: np.ndarray, decoded: np.ndarray) -> dict[str, float]:
    """Metrics of one channel; NaN where they have no value, as PESQ without speech."""
    from vpcodec.metrics import pesq_wb, si_sdr, stoi

    return {
        "pesq_wb": pesq_wb(reference, decoded, RATE),
        "stoi": stoi(reference, decoded, RATE),
        "estoi": stoi(reference, decoded, RATE, extended=True),
        "si_sdr": si_sdr(reference, decoded),
    }


def usage(tokens: np.ndarray, codebook_size: int) -> dict[str, float]:
    """How evenly all tokens use a codebook."""
    from vpcodec.usage import CodebookUsage

    counted = CodebookUsage(codebook_size)
    counted.update(tokens)
    most = min(1.0, counted.tokens / codebook_size)
    return counted.summary() | {"codebook_size": codebook_size, "largest_possible": most}


def digit_usage(tokens: np.ndarray, levels: tuple[int, ...]) -> list[dict[str, float]]:
    """The usage of each digit of tokens that are numbers of mixed radix, lowest first."""
    found = []
    for level in levels:
        found.append(usage(tokens % level, level))
        tokens = tokens // level
    return found


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean over files of every column that the rows have, NaN left out."""
    columns = [name for name in ("bps", *METRICS) if name in rows[0]]
    return {name: float(np.nanmean([row[name] for row in rows])) for name in columns}


def peer_rows(path: Path, files: set[str]) -> dict[str, dict[str, float]]:
    """Codec -> means over the same files, from a list of rows with `file`, `codec` and columns."""
    by_codec: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads(path.read_text()):
        if row["file"] in files:
            by_codec.setdefault(row["codec"], []).append(row)
    found = {name: means(rows) | {"files": len(rows)} for name, rows in by_codec.items()}
    return dict(sorted(found.items(), key=lambda item: item[1]["bps"]))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from vpcodec.audio import find_audio
    from vpcodec.hub import open_model

    config = open_model(args.model).config
    paths = [args.folder / path for path in find_audio(args.folder)][: args.limit]
    if not paths:
        raise SystemExit(f"{args.folder}: no audio files")
    if args.jobs > 1:
        context = multiprocessing.get_context("spawn")
        settings = (args.model, args.backend)
        with ProcessPoolExecutor(args.jobs, context, start, settings) as pool:
            results = list(pool.map(evaluate, paths))
    else:
        start(args.model, args.backend)
        results = [evaluate(path) for path in paths]
    rows = [row for row, _ in results]
    tokens = np.concatenate([found.reshape(-1) for _, found in results])
    levels = getattr(config.quantizer, "levels", None)
    has_peers = args.peers is not None and args.peers.is_file()
    return {
        "model": config.name,
        "nominal_bps": config.bitrate,
        "files": len(rows),
        "seconds": sum(row["seconds"] for row in rows),
        "no_pesq": [row["file"] for row in rows if math.isnan(row["pesq_wb"])],
        "means": means(rows),
        "usage": usage(tokens, config.codebook_size),
        "digit_usage": digit_usage(tokens, levels) if levels else [],
        "peers": peer_rows(args.peers, {row["file"] for row in rows}) if has_peers else {},
        "rows": rows,
    }


def show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=100)
    title = f"{found['files']} files, {found['seconds']:.0f} s; means over files"
    table = Table(title=title, title_justify="left")
    table.add_column("codec")
    for name in ("bit/s on disk", "nominal", "PESQ-WB", "STOI", "ESTOI", "SI-SDR dB", "files"):
        table.add_column(name, justify="right")
    nominal = f"{found['nominal_bps']:,.0f}"
    ours = found["means"] | {"files": found["files"]}
    for name, row in {found["model"]: ours, **found["peers"]}.items():
        values = [f"{row['bps']:,.0f}", nominal if row is ours else ""]
        for metric, digits in zip(METRICS, (3, 3, 3, 2)):
            values.append(f"{row[metric]:.{digits}f}" if metric in row else "")
        table.add_row(name, *values, str(row["files"]))
    console.print(table)
    if found["no_pesq"]:
        console.print(f"PESQ found no speech in: {', '.join(found['no_pesq'])}")

    codes = found["usage"]
    size, n = codes["codebook_size"], codes["tokens"]
    console.print(
        f"Codebook of {size:,}: {codes['used']:.1%} of the codes used, CVU {codes['cvu']:.4f}, "
        f"{codes['entropy']:.2f} of {math.log2(size):.2f} bits per token."
    )
    if n < 20 * size:
        most = codes["largest_possible"]
        bound = f": at most {most:.1%} of them could be used, and CVU cannot pass {most:.4f}"
        console.print(
            f"These files hold {n:,} tokens for {size:,} codes{bound if most < 1 else ''}. "
            "Both figures are lower bounds of what more speech would show."
        )
    for i, digit in enumerate(found["digit_usage"]):
        console.print(
            f"  digit {i}: {digit['codebook_size']} levels, {digit['used']:.0%} used, "
            f"CVU {digit['cvu']:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=DATA / "speech_dev")
    parser.add_argument("--model", default="speech-3k", help="bundled name or folder")
    parser.add_argument("--backend", choices=("onnx", "torch"), default="onnx")
    parser.add_argument("--peers", type=Path, default=DATA / "peers_dev.json", help="JSON rows")
    parser.add_argument("--limit", type=int, help="only the first so many files")
    parser.add_argument("--jobs", type=int, default=1, help="files at the same time")
    parser.add_argument("--json", action="store_true", help="print a JSON document")
    args = parser.parse_args()
    if not args.folder.is_dir():
        raise SystemExit(f"{args.folder}: no such folder")
    found = measure(args)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


if __name__ == "__main__":
    main()
