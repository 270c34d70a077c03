"""How fast a recipe trains, and where the time goes.

Real steps of the trainer on real data, in variants of one recipe: with and without discriminators,
bf16 and fp32, FSP and VP, with torch.compile; on a GPU if there is one. Per step: waiting for the
loader, forward pass of the codec (and of its quantizer), losses (reconstruction and adversarial,
forward and backward to the output of the codec), backward pass of the codec, optimiser and
averaging, update of the discriminators. Each variant runs in its own process, one after another;
ratios refer to the first one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
FOLDERS = {"audio": DATA / "speech_train_opus", "image": DATA / "images_train"}
VP = (
    "model.quantizer={type: vp, dim: 5, codebook_size: 16384}",
    "quantizer.calibrate_every=0",
)
BF16, FP32 = "train.precision=bf16", "train.precision=fp32"
NONE, SMALL, FULL = (f"discriminator.size={size}" for size in ("none", "small", "full"))
VARIANTS = {
    "FSP, bf16": (BF16, NONE),
    "FSP, fp32": (FP32, NONE),
    "VP, bf16": (BF16, NONE, *VP),
    "FSP, bf16, compiled": (BF16, NONE, "train.compile=true"),
    "FSP, bf16, small GAN": (BF16, SMALL),
    "FSP, fp32, small GAN": (FP32, SMALL),
    "FSP, bf16, small GAN, D every 2nd": (BF16, SMALL, "discriminator.every=2"),
    "FSP, bf16, small GAN, balancer": (BF16, SMALL, "loss.balancer=true"),
    "VP, bf16, small GAN": (BF16, SMALL, *VP),
    "FSP, bf16, full GAN": (BF16, FULL),
}
PARTS = ("data", "forward", "quantizer", "losses", "backward", "update", "discriminators")


class Stopwatch:
    """Times the parts of a trainer's steps."""

    def __init__(self, trainer: Any) -> None:
        import torch

        self.trainer = trainer
        self.seconds: dict[str, float] = defaultdict(float)
        self._sync = torch.cuda.synchronize if trainer.device.type == "cuda" else lambda: None
        self._part_began = 0.0
        state, step = trainer.state, trainer.train_step
        state.model.quantizer.forward = self._timed("quantizer", state.model.quantizer.forward)
        state.update_average = self._timed("update", state.update_average)
        step.update_codec = self._timed("update", step.update_codec)
        step.update_discriminators = self._timed("discriminators", step.update_discriminators)
        step.codec_pass = self._codec_pass(step.codec_pass)
        step.model = self._forward(step.model)

    def now(self) -> float:
        self._sync()
        return time.perf_counter()

    def add(self, part: str, began: float) -> None:
        self.seconds[part] += self.now() - began

    def _timed(self, part: str, function: Callable) -> Callable:
        def wrapped(*arguments: Any) -> Any:
            began = self.now()
            result = function(*arguments)
            self.add(part, began)
            return result

        return wrapped

    def _forward(self, module: Any) -> Callable:
        def wrapped(*inputs: Any) -> Any:
            began = self.now()
            output, quantized = module(*inputs)
            self.add("forward", began)
            self._part_began = self.now()
            output.register_hook(self._at_output)
            return output, quantized

        return wrapped

    def _at_output(self, gradient: Any) -> None:
        """The gradient has reached the output: losses are done, and the codec's backward begins."""
        self.add("losses", self._part_began)
        self._part_began = self.now()

    def _codec_pass(self, function: Callable) -> Callable:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            self.add("backward", self._part_began)
            return result

        return wrapped


def measure(
    recipe: Path, overrides: list[str], warmup: int, steps: int, threads: int | None
) -> dict[str, float]:
    """Run one variant; returns seconds per step and its parts, and speed (s/s or MP/s)."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)

    from vpcodec.recipe import load_recipe
    from vpcodec.training.trainer import Trainer

    loaded = load_recipe(recipe, ["discriminator.start_step=0", *overrides])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(loaded, Path(folder))
        batches = trainer.data.batches(0, warmup + steps)
        for _ in range(warmup):
            trainer.train_step(torch.from_numpy(next(batches)).to(trainer.device))
        watch = Stopwatch(trainer)
        first = watch.now()
        numbers = 0
        for _ in range(steps):
            began = watch.now()
            batch = next(batches)
            watch.add("data", began)
            trainer.train_step(torch.from_numpy(batch).to(trainer.device))
            numbers += batch.size
        whole = watch.now() - first
        batches.close()
    row = {part: watch.seconds[part] / steps for part in PARTS}
    row["forward"] -= row["quantizer"]
    row |= {"step": whole / steps, "speed": numbers / trainer.task.speed[1] / whole}
    if trainer.device.type == "cuda":
        row["memory"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "speech_3k.yaml")
    parser.add_argument("--data", type=Path, help="folder; default: the shared speech or images")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--batch", type=int, help="data.batch_size; default: that of the recipe")
    parser.add_argument("--only", nargs="*", help="variants whose name contains one of these")
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[None],
        help="threads of torch; default: its choice",
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    from vpcodec.recipe import load_recipe

    modality = load_recipe(args.recipe).model.kind
    folder = args.data or FOLDERS[modality]
    if not folder.is_dir():
        parser.error(f"{folder}: no such folder")
    common = [f"data.train={folder}"]
    if args.batch:
        common.append(f"data.batch_size={args.batch}")
    context = multiprocessing.get_context("spawn")
    results: dict[str, dict[str, float]] = {}
    for (name, overrides), threads in product(VARIANTS.items(), args.threads):
        if args.only and not any(word in name for word in args.only):
            continue
        overrides = [*common, *overrides]
        if threads is not None:
            name = f"{name}, {threads} threads"
        print(f"{name} ...", file=sys.stderr)
        with ProcessPoolExecutor(1, context) as pool:
            done = pool.submit(measure, args.recipe, overrides, args.warmup, args.steps, threads)
            results[name] = done.result()
    if args.json:
        print(json.dumps(results, indent=2))
        return
    first = next(iter(results.values()))["speed"]
    unit = {"audio": "audio s/s", "image": "MP/s"}[modality]
    print(f"| {args.recipe.stem} | {unit} | ratio | ms per step | {' | '.join(PARTS)} |")
    print("|---|" + "---:|" * (3 + len(PARTS)))
    for name, row in results.items():
        shares = " | ".join(f"{row[part] / row['step']:.0%}" for part in PARTS)
        speed = f"{row['speed']:.3g} | {row['speed'] / first:.2f}"
        print(f"| {name} | {speed} | {1000 * row['step']:.0f} | {shares} |")


if __name__ == "__main__":
    main()
