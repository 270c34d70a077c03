"""What half precision changes: tokens of recordings, and decoded audio, against float32.

python benchmarks/precision.py speech-3k --every 5

Weights and activations of encoder and decoder are rounded to the type, as phones, browsers' GPUs
and accelerators do; the quantizer stays in float32.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch

from vpcodec.backends.torch import load_model
from vpcodec.hub import open_model
from vpcodec.media.audio import find_audio, load, resample

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "models", nargs="*", default=["speech-3k", "speech-6k", "speech-vp-16384", "speech-1k"]
    )
    parser.add_argument("--data", type=Path, default=DATA / "speech_dev", help="recordings")
    parser.add_argument("--every", type=int, default=5, help="take every n-th recording")
    args = parser.parse_args()
    paths = [args.data / name for name in find_audio(args.data)][:: args.every]
    print(f"{len(paths)} recordings")
    print("| model | type | tokens | differ | SNR of the same tokens decoded, dB |")
    print("|---|---|---:|---:|---:|")
    for name in args.models:
        model = load_model(open_model(name)).eval()
        hop = model.config.hop_length
        clips = []
        for path in paths:
            samples, rate = load(path)
            clip = resample(samples[:1], rate, model.config.sample_rate)
            clips.append(torch.from_numpy(clip[:, : clip.shape[1] // hop * hop]))
        expected = [model.encode(clip) for clip in clips]
        heard = [model.decode(tokens) for tokens in expected]
        for dtype in (torch.float16, torch.bfloat16):
            half = copy.deepcopy(model).to(dtype)
            half.quantizer = model.quantizer
            n = differ = 0
            ratios = []
            for clip, tokens, samples in zip(clips, expected, heard):
                found = model.quantizer.encode(half.encoder(clip.to(dtype)).float())
                latents = model.quantizer.tokens_to_latents(tokens)
                error = half.decoder(latents.to(dtype)).float() - samples
                n += tokens.numel()
                differ += int((found != tokens).sum())
                ratios.append(
                    float(10 * torch.log10(samples.square().sum() / error.square().sum()))
                )
            kind = str(dtype).removeprefix("torch.")
            print(
                f"| {name} | {kind} | {n:,} | {differ / n:.2%} | {np.mean(ratios):.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
