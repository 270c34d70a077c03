"""VP's k-NN estimate: its accuracy, and its cost in training.

Accuracy: bias exp(E[log r]) - 1 and spread sd(log r) of the ratio r of estimated to exact D_M, for
several densities, compared with the spread of log D_M itself. Cost: one perturbation of 28,000
tokens (24 clips of 7 s at 166.67 tokens/s) for codebooks of 256 to 65,536 codes, the exact search
over the paper's queue (measured on fewer tokens), and the training step of a recipe's model on the
same tokens, in accumulated parts as on a small machine.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vpcodec.media.audio import find_audio, load, resample
from vpcodec.quantizers import VP
from vpcodec.quantizers.knn import kth_distances
from vpcodec.quantizers.vp import Walk
from vpcodec.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
DIMENSIONS = {256: 3, 1024: 4, 4096: 5, 16384: 5, 65536: 5}  # the paper's, and one more
QUERIES = 2000
TOKENS = 28_000
SECONDS, PARTS = 168, 14  # seconds of audio per step, and parts that it is split into


def gaussian(n: int, dim: int) -> torch.Tensor:
    return torch.randn(n, dim)


def uniform(n: int, dim: int) -> torch.Tensor:
    return (torch.rand(n, dim) - 0.5) * math.sqrt(12)


def heavy(n: int, dim: int) -> torch.Tensor:
    """Student t with 3 degrees of freedom."""
    return torch.distributions.StudentT(torch.tensor(3.0)).sample((n, dim)) / math.sqrt(3)


def speech_latents(folder: Path, seconds: float) -> torch.Tensor:
    """(N, 6) latents of speech-3k before its quantizer, with unit variance in each dimension."""
    from vpcodec.backends.torch import load_model
    from vpcodec.hub import open_model

    model = load_model(open_model("speech-3k"))
    hop, found, total = model.config.hop_length, [], 0.0
    with torch.inference_mode():
        for name in find_audio(folder):
            samples, rate = load(folder / name)
            samples = resample(samples[:1], rate, model.config.sample_rate)
            samples = samples[:, : samples.shape[1] // hop * hop]
            found.append(model.encoder(torch.from_numpy(samples))[0])
            total += samples.shape[1] / model.config.sample_rate
            if total >= seconds:
                break
    latents = torch.cat(found)
    return (latents - latents.mean(0)) / latents.std(0)


def accuracy(speech: torch.Tensor | None) -> list[dict]:
    def from_speech(n: int, dim: int) -> torch.Tensor:
        return speech[torch.randperm(len(speech))[:n], :dim].contiguous()

    densities: dict[str, Callable[[int, int], torch.Tensor]] = {
        "Gaussian": gaussian,
        "uniform": uniform,
        "Student t(3)": heavy,
    }
    if speech is not None:
        densities["speech"] = from_speech
    rows = []
    for name, draw in densities.items():
        for size, dim in DIMENSIONS.items():
            torch.manual_seed(0)
            # The paper's queue, as far as there are latents.
            every = draw(16 * dim * size + QUERIES, dim)
            queue, queries = every[QUERIES:], every[:QUERIES]
            mass = len(queue) / size
            order = max(1, round(mass))
            exact = kth_distances(queries, queue, (order,))[0] * (mass / order) ** (1 / dim)
            quantizer = VP(dim, size, seed=0)
            _, estimate = Walk(quantizer, queue[: quantizer.search_size]).distances(queries)
            ratio = (estimate / exact).log()
            rows.append(
                {
                    "density": name,
                    "codebook_size": size,
                    "dim": dim,
                    "queue": len(queue),
                    "bias": math.exp(ratio.mean()) - 1,
                    "spread": ratio.std().item(),
                    "spread_of_radii": exact.log().std().item(),
                }
            )
            print(name, size, file=sys.stderr)
    return rows


def cost(recipe: Path, runs: int, device: str) -> dict:
    times = {size: [] for size in DIMENSIONS}
    latents = torch.randn(TOKENS, 5, device=device)
    quantizers = {size: VP(5, size, seed=0).to(device) for size in DIMENSIONS}
    for quantizer in quantizers.values():
        quantizer.push(torch.randn(16_384, 5, device=device), number=16_384)
        quantizer(latents)
    for _ in range(runs):
        for size, quantizer in quantizers.items():  # alternating, so that disturbances affect all
            times[size].append(seconds(lambda q=quantizer: q(latents), device))
    few = latents[:500]
    queue = torch.randn(16 * 5 * 16_384, 5, device=device)
    exact = seconds(lambda: kth_distances(few, queue, (8, 80)), device) * 2 * TOKENS / len(few)
    step, tokens = codec_step(recipe, runs, device)
    return {
        "perturbation": {size: statistics.median(t) for size, t in times.items()},
        "exact_16384": exact,
        "codec_step": step,
        "codec_step_tokens": tokens,
    }


def codec_step(recipe: Path, runs: int, device: str) -> tuple[float, int]:
    """Seconds per training step of the recipe's model on 168 s of audio, and tokens per step."""
    from vpcodec.training.trainer import Trainer

    part = SECONDS / PARTS
    overrides = ["data.train=null", f"train.device={device}", f"data.crop_seconds={part / 8}"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(load_recipe(recipe, overrides), Path(folder))
        batch = torch.from_numpy(trainer.data.batch(0)).to(device)
        trainer.train_step(batch)
        times = [seconds(lambda: trainer.train_step(batch), device) for _ in range(runs * 2)]
    tokens = batch.numel() // trainer.recipe.model.hop_length
    return statistics.median(times) * TOKENS / tokens, tokens


def seconds(function: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "speech_3k.yaml")
    parser.add_argument("--speech", type=Path, default=DATA / "speech_train_opus")
    parser.add_argument("--speech-seconds", type=float, default=2400)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    spent = cost(args.recipe, args.runs, args.device)
    speech = speech_latents(args.speech, args.speech_seconds) if args.speech.is_dir() else None
    rows = accuracy(speech)
    if args.json:
        print(json.dumps({"accuracy": rows, "cost": spent}, indent=1))
        return
    print("| density | K | D | queue | bias | spread | spread of log D_M |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for r in rows:
        print(
            f"| {r['density']} | {r['codebook_size']} | {r['dim']} | {r['queue']} "
            f"| {r['bias']:+.1%} | {r['spread']:.3f} | {r['spread_of_radii']:.3f} |"
        )
    step = spent["codec_step"]
    print(f"\nTraining step of {args.recipe.stem} on {TOKENS} tokens: {step:.2f} s\n")
    print("| K | perturbation of 28,000 tokens | of the codec's step |\n|---:|---:|---:|")
    for size, value in spent["perturbation"].items():
        print(f"| {size} | {value:.3f} s | {value / step:.1%} |")
    exact = spent["exact_16384"]
    print(f"| 16384, exact | {exact:.1f} s | {exact / step:.0%} |")
    ratio = spent["perturbation"][65536] / spent["perturbation"][1024]
    print(f"\nK = 65,536 over K = 1,024: {ratio:.2f}")


if __name__ == "__main__":
    main()
