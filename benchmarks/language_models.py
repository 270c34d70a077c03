"""The same language model on the tokens of several codecs: which of them suit a generator?

    vpcodec train recipes/speech_1k.yaml --run runs/vp \
        'model.quantizer={type: vp, dim: 4, codebook_size: 4096}'
    vpcodec export runs/vp -o models/vp  # likewise vq, and fsp and fsq with levels: [8, 8, 8, 8]
    python benchmarks/language_models.py fsp=models/fsp vp=models/vp fsq=models/fsq vq=models/vq \
        --speech speech/ --held-out held_out/ --work lm/

The codecs need equal rates, and codebooks of a few thousand codes, all of which a flat one has as
outputs. Every language model gets the same recipe, recordings and number of steps, once for each
seed. A table in Markdown: bits per second of held-out speech, and of continuations of held-out
beginnings, all of the same length: DNSMOS (P.808), the median pitch and its spread, the share of
10 ms that is voiced, the mean length of voiced stretches and of the gaps between them, and the
share of tokens that are equal to the one before. The row `real` is what the codec makes of the
recordings themselves. Repeat the command to go on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from vpcodec import AudioCodec, read_tokens
from vpcodec.lm import LanguageModel, continue_tokens, load_lm, read_lm
from vpcodec.media.audio import find_audio
from vpcodec.metrics.prosody import pitch
from vpcodec.metrics.speech import dnsmos
from vpcodec.recipe import load_recipe
from vpcodec.training.lm.trainer import LMTrainer, export_lm

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "lm.yaml"
PITCHES_PER_SECOND = 100
COLUMNS = {
    "bits/s": 0,
    "DNSMOS": 2,
    "pitch, Hz": 0,
    "spread, semitones": 1,
    "voiced": 2,
    "voiced stretch, s": 2,
    "gap, s": 2,
    "repeated": 3,
}


def tokenise(codec: AudioCodec, recordings: Path, target: Path) -> Path:
    """A folder of token files; those that are there are kept."""
    for name in find_audio(recordings):
        file = target / name.with_suffix(".tok")
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            codec.encode_file(recordings / name, file, mono=True)
    return target


def train(
    codec: Path, tokens: Path, held_out: Path, folder: Path, seed: int, overrides: list[str]
) -> tuple[LanguageModel, float]:
    """A language model, and its bits per second of held-out speech."""
    own = [f"model.codec={codec}", f"data.train={tokens}", f"eval.data={held_out}"]
    recipe: Any = load_recipe(RECIPE, [*overrides, *own, f"train.seed={seed}"])
    LMTrainer(recipe, folder).train()
    export_lm(folder, folder / "model", force=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [row["eval/bits_per_second"] for row in rows if "eval/bits_per_second" in row]
    return load_lm(read_lm(folder / "model")), found[-1]


def measure(codec: AudioCodec, prompt: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Statistics of a continuation, decoded after its prompt."""
    audio = codec.decode(np.concatenate([prompt, tokens])[None])[0]
    audio = audio[len(prompt) * codec.hop_length :]
    found = pitch(audio, codec.sample_rate)
    heard = found[~np.isnan(found)]
    semitones = 12 * np.log2(heard / np.median(heard)) if heard.size else heard
    runs = [(voiced, len(list(run))) for voiced, run in groupby((~np.isnan(found)).tolist())]
    lengths = {
        kind: [n / PITCHES_PER_SECOND for voiced, n in runs if voiced is kind]
        for kind in (True, False)
    }
    return {
        "DNSMOS": dnsmos(audio, codec.sample_rate).p808,
        "pitch, Hz": float(np.median(heard)) if heard.size else np.nan,
        "spread, semitones": float(semitones.std()) if heard.size else np.nan,
        "voiced": len(heard) / len(found),
        "voiced stretch, s": mean(lengths[True]),
        "gap, s": mean(lengths[False]),
        "repeated": float((np.diff(tokens) == 0).mean()),
    }


def mean(values: list[float]) -> float:
    """Of the values that are defined; NaN if none is."""
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else np.nan


def row(name: str, bits: float, rows: list[dict[str, float]]) -> str:
    means = {"bits/s": bits} | {column: mean([x[column] for x in rows]) for column in rows[0]}
    cells = ("-" if np.isnan(means[x]) else f"{means[x]:.{n}f}" for x, n in COLUMNS.items())
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("codec", nargs="+", help="NAME=MODEL: a folder or a name")
    parser.add_argument("--speech", type=Path, required=True, help="recordings to learn from")
    parser.add_argument("--held-out", type=Path, required=True, help="of other speakers")
    parser.add_argument("--work", type=Path, required=True, help="tokens and runs")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--clips", type=int, default=16, help="continuations per model")
    parser.add_argument("--prompt", type=float, default=2.0, help="seconds")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a continuation")
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.FIELD=VALUE")
    args = parser.parse_args()
    print(f"| tokens | {' | '.join(COLUMNS)} |")
    print(f"|---|{'---:|' * len(COLUMNS)}", flush=True)
    for name, _, model in (item.partition("=") for item in args.codec):
        codec = AudioCodec.from_pretrained(model)
        folder = args.work / name
        tokens = tokenise(codec, args.speech, folder / "train")
        held_out = tokenise(codec, args.held_out, folder / "held_out")
        first, n = (round(x * codec.frame_rate) for x in (args.prompt, args.seconds))
        clips = [read_tokens(path, coder=codec.coder)[0][0] for path in held_out.rglob("*.tok")]
        clips = sorted((x for x in clips if len(x) >= first + n), key=lambda x: x.tolist())
        clips = clips[: args.clips]
        if not clips:
            raise SystemExit(f"{args.held_out}: no recording of {args.prompt + args.seconds} s")
        real = [measure(codec, clip[:first], clip[first : first + n]) for clip in clips]
        print(row(f"{name}, real", np.nan, real), flush=True)
        for seed in range(args.seeds):
            run = folder / f"seed-{seed}"
            lm, bits = train(Path(model), tokens, held_out, run, seed, args.set)
            made = [
                continue_tokens(lm, clip[:first], n, seed=i, may_end=False)
                for i, clip in enumerate(clips)
            ]
            rows = [measure(codec, clip[:first], x) for clip, x in zip(clips, made)]
            print(row(f"{name}, seed {seed}", bits, rows), flush=True)


if __name__ == "__main__":
    main()
