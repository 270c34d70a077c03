"""The JavaScript library and the page: mutated inputs, equality of tokens, speed in Chromium.

python benchmarks/web.py mutated [--files 20000] [--packets 100000]
python benchmarks/web.py tokens FOLDER [--clips 10]
python benchmarks/web.py speed CLIP [--seconds 10] [--runs 5]

Needs Node 20 or later; `speed` needs Chromium instead. The exit code is 1 where a result is wrong.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from vpcodec import Codec, read_tokens
from vpcodec.cli.server import HOST, Server, site
from vpcodec.media.audio import load, resample, save

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from browser import Browser
from javascript import compare_mutated_files, compare_mutated_packets, tool

BATCH = 5_000  # files or packets that Node reads at once
MODELS = ("speech-3k", "speech-6k", "speech-vp-16384", "speech-1k")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("mutated")
    command.add_argument("--files", type=int, default=20_000)
    command.add_argument("--packets", type=int, default=100_000)
    command.set_defaults(run=mutated)
    command = commands.add_parser("tokens")
    command.add_argument("folder", type=Path)
    command.add_argument("--clips", type=int, default=10)
    command.set_defaults(run=tokens)
    command = commands.add_parser("speed")
    command.add_argument("clip", type=Path)
    command.add_argument("--seconds", type=float, default=10)
    command.add_argument("--runs", type=int, default=5)
    command.set_defaults(run=speed)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return options.run(options, Path(folder))


def mutated(options: argparse.Namespace, folder: Path) -> int:
    wrong = 0
    for what, count, compare in (
        ("token files", options.files, compare_mutated_files),
        ("packets", options.packets, compare_mutated_packets),
    ):
        refused, faults = 0, []
        for seed, first in enumerate(range(0, count, BATCH)):
            some, others = compare(min(BATCH, count - first), folder, seed)
            refused, faults = refused + some, faults + others
        print(f"{count} mutated {what}: {refused} refused, {len(faults)} wrong")
        print(*faults[:10], sep="\n", end="\n" if faults else "")
        wrong += len(faults)
    return int(wrong > 0)


def tokens(options: argparse.Namespace, folder: Path) -> int:
    """Clips at the models' rate, encoded in Node and in Python."""
    sources = sorted(options.folder.glob("*.flac")) + sorted(options.folder.glob("*.wav"))
    sources = sources[:: max(1, len(sources) // options.clips)][: options.clips]
    if not sources:
        sys.exit(f"{options.folder}: no WAV or FLAC files")
    wrong = 0
    for name in MODELS:
        codec = Codec.from_pretrained(name, threads=1)
        pairs = []
        for number, source in enumerate(sources):
            save(folder / f"{number}.wav", resample(*load(source), codec.sample_rate), 16_000)
            pairs.append((folder / f"{number}.wav", folder / f"{number}.tok"))
        tool("encode", name, *(path for pair in pairs for path in pair))
        total = different = 0
        for clip, found in pairs:
            expected = codec.encode(*load(clip))
            total += expected.size
            different += int((read_tokens(found)[0] != expected).sum())
        print(f"{name}: {len(pairs)} clips, {different} of {total} tokens differ")
        wrong += different
    return int(wrong > 0)


def speed(options: argparse.Namespace, folder: Path) -> int:
    """Times real time in the page, without loading the model."""
    samples = resample(*load(options.clip), 16_000)[:1]
    length = round(16_000 * options.seconds)
    save(folder / "clip.wav", np.tile(samples, -(-length // samples.shape[1]))[:, :length], 16_000)
    server = Server((HOST, 0), site())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    done = "document.querySelector('#work').hidden && !document.querySelector('#result').hidden"
    with server, Browser(folder / "profile") as page:
        page.open(f"http://{HOST}:{server.server_port}/")
        page.wait_for("document.documentElement.dataset.ready === 'true'")
        for name in MODELS:
            page.evaluate(f"document.querySelector('[value={name}]').checked = true")
            runs = []
            for _ in range(options.runs):
                page.evaluate("document.querySelector('#result').hidden = true")
                page.choose_files("#file", folder / "clip.wav")
                page.wait_for(done)
                found = page.evaluate("document.querySelector('#result').dataset.seconds")
                runs.append(json.loads(found))
            rates = (
                f"{part}s {options.seconds / statistics.median(run[part] for run in runs):.1f}"
                for part in ("encode", "decode")
            )
            print(f"{name}: {' and '.join(rates)} times faster than real time")
        server.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
