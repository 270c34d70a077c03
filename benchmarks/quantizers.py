"""The same small autoencoder with every quantizer, on speech and on images: the papers' table.

Only the quantizer differs; data, order of the data, architecture, initial weights, steps and
optimiser are the same. There is no discriminator. With --backbone, the speech autoencoder is that
of a shipped model, with its weights except the projections before and after the quantizer, so that
a small CPU budget is spent on what differs between quantizers. FSP and FSQ use the level sets of
the VP-VAE paper, the others its dimensions and exact K; LFQ has one dimension per bit. Quality is
that of real tokens on held-out data. CVU = exp(entropy) / K over all held-out tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from vpcodec.config import AudioConfig
from vpcodec.hub import open_model
from vpcodec.media.audio import find_audio, load, resample
from vpcodec.media.image import find_images, load_image
from vpcodec.model_folder import WEIGHTS
from vpcodec.models import AudioAutoencoder
from vpcodec.quantizers import FSP, FSQ, LFQ, VP, VQ, CodebookUsage, Quantizer, SimVQ
from vpcodec.recipe.audio import DataConfig, LossConfig
from vpcodec.recipe.base import OptimConfig
from vpcodec.scoring.workers import Workers
from vpcodec.training.audio.data import AudioCrops
from vpcodec.training.audio.losses import ReconstructionLoss
from vpcodec.training.image.data import to_rgb
from vpcodec.training.optim import build_optimizers

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
RATE = 16_000
LEVELS = {256: (8, 6, 5), 1024: (8, 5, 5, 5), 4096: (7, 5, 5, 5, 5), 16384: (8, 8, 8, 6, 5)}
METHODS = {
    "FSP": lambda k: FSP(LEVELS[k]),
    "VP": lambda k: VP(len(LEVELS[k]), k),
    "FSQ": lambda k: FSQ(LEVELS[k]),
    "VQ": lambda k: VQ(len(LEVELS[k]), k),
    "SimVQ": lambda k: SimVQ(len(LEVELS[k]), k),
    "LFQ": lambda k: LFQ(k.bit_length() - 1),
}
CALIBRATIONS = (0.15, 0.4, 0.7)  # as shares of all steps
CALIBRATION_PER_CODE, FIT_PER_CODE, FIT_ITERATIONS = 16, 32, 20


class Speech:
    """Crops of speech and a one-stage AudioAutoencoder, whose layers all run at the token rate."""

    metrics = ("pesq_wb", "stoi", "mel")
    digits = (3, 4, 4)

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.backbone = args.backbone and open_model(args.backbone)
        seconds = 1.536 if self.backbone else 0.768
        data = DataConfig(train=str(args.speech), crop_seconds=seconds, batch_size=args.batch)
        self.hop = 96
        if self.backbone and self.backbone.config.hop_length != self.hop:
            raise SystemExit(f"{args.backbone}: the hop is not {self.hop}")
        self.crops = AudioCrops(data, sample_rate=RATE, hop_length=self.hop, seed=0)
        config = LossConfig(fft_sizes=(256, 1024), mel_bands=(40, 80))
        if self.backbone:
            config = LossConfig()
        self.loss = ReconstructionLoss(config, RATE)
        self.weights = {"wave": config.wave, "stft": config.stft, "mel": config.mel}
        self.clips = []
        for name in find_audio(args.speech_dev):
            samples, rate = load(args.speech_dev / name)
            samples = resample(samples[:1], rate, RATE)[0][: 6 * RATE]
            self.clips.append(samples[: len(samples) // self.hop * self.hop])

    def model(self, quantizer: Quantizer) -> nn.Module:
        if self.backbone:
            return self._from_backbone(quantizer)
        width = self.args.width
        config = AudioConfig(
            name="bench",
            strides=(self.hop,),
            encoder_dims=(width,),
            encoder_depths=(2,),
            decoder_dims=(width,),
            decoder_depths=(2,),
            tconv_kernels=(1, 11),
            tconv_channels=64,
            tconv_taps=2 * self.hop,
            attention_window=64,
            encoder_layers=1,
            decoder_layers=1,
            last_dim=width,
            last_dilations=(1, 3),
            synthesis_taps=2,
        )
        model = AudioAutoencoder(config)
        replace_quantizer(model, quantizer)
        return model

    def _from_backbone(self, quantizer: Quantizer) -> nn.Module:
        model = AudioAutoencoder(self.backbone.config)
        weights = load_file(self.backbone.path / WEIGHTS)
        model.load_state_dict({name: value.float() for name, value in weights.items()})
        replace_quantizer(model, quantizer)
        return model

    def batch(self, step: int) -> torch.Tensor:
        return torch.from_numpy(self.crops.batch(step))

    def losses(self, target: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        terms = self.loss.to(target.device)(target[:, : output.shape[1]], output)
        return sum(self.weights[name] * value for name, value in terms.items())

    def evaluate(self, model: nn.Module, workers: Workers) -> tuple[list, dict]:
        tokens, pairs, mels = [], [], []
        for clip in self.clips:
            samples = torch.from_numpy(clip)[None].to(self.args.device)
            output, quantized = model(samples)
            terms = self.loss(samples[:, : output.shape[1]], output)
            mels.append(terms["mel"].item())
            tokens.append(quantized.tokens)
            pairs.append((clip[: output.shape[1]], output[0].cpu().numpy()))
        pairs = pairs[:: max(1, len(pairs) // self.args.clips)][: self.args.clips]
        rows = [f.result() for f in [workers.submit(*pair, RATE) for pair in pairs]]
        values = {name: float(np.nanmean([r[name] for r in rows])) for name in ("pesq_wb", "stoi")}
        return tokens, values | {"mel": statistics.mean(mels)}


class Images:
    """64 x 64 crops and a small convolutional autoencoder with 8 x 8 tokens."""

    metrics = ("psnr", "ssim")
    digits = (2, 4)
    size = 64

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        paths = [args.images / path for path in find_images(args.images)]
        self.train = [read_image(path) for path in paths[:: args.every]]
        self.dev = torch.stack(
            [
                center(read_image(args.images_dev / path), self.size)
                for path in find_images(args.images_dev)
            ]
        )

    def model(self, quantizer: Quantizer) -> nn.Module:
        return ToyAutoencoder(quantizer, self.args.width)

    def batch(self, step: int) -> torch.Tensor:
        rng = np.random.default_rng((0, step))
        crops = []
        for number in rng.integers(len(self.train), size=self.args.image_batch):
            image = self.train[number]
            top, left = (int(rng.integers(n - self.size + 1)) for n in image.shape[1:])
            crop = image[:, top : top + self.size, left : left + self.size]
            crops.append(crop.flip(2) if rng.random() < 0.5 else crop)
        return torch.stack(crops).float() / 127.5 - 1

    def losses(self, target: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        total = F.l1_loss(output, target)
        for dim in (2, 3):
            total = total + F.l1_loss(output.diff(dim=dim), target.diff(dim=dim))
        return total

    def evaluate(self, model: nn.Module, workers: Workers) -> tuple[list, dict]:
        from skimage.metrics import peak_signal_noise_ratio, structural_similarity

        tokens, rows = [], []
        for part in self.dev.split(32):
            target = part.to(self.args.device).float() / 127.5 - 1
            output, quantized = model(target)
            tokens.append(quantized.tokens)
            decoded = ((output.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
            for pair in zip(part, decoded):
                x, y = (pixels.permute(1, 2, 0).numpy() for pixels in pair)
                ssim = structural_similarity(x, y, channel_axis=2)  # uniform windows of 7 x 7
                rows.append((peak_signal_noise_ratio(x, y), ssim))
        return tokens, dict(zip(self.metrics, map(statistics.mean, zip(*rows))))


class ToyAutoencoder(nn.Module):
    """Patches of 4 x 4, two residual units, downsampling to 8 x 8, two more units, and back."""

    def __init__(self, quantizer: Quantizer, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width // 2, 4, 4),
            *(Residual(width // 2) for _ in range(2)),
            nn.Conv2d(width // 2, width, 2, 2),
            *(Residual(width) for _ in range(2)),
            nn.GroupNorm(1, width),
        )
        self.decoder = nn.Sequential(
            *(Residual(width) for _ in range(2)),
            nn.Conv2d(width, width * 2, 1),
            nn.PixelShuffle(2),
            *(Residual(width // 2) for _ in range(2)),
            nn.Conv2d(width // 2, 48, 1),
            nn.PixelShuffle(4),
        )
        self.into, self.out = nn.Linear(width, quantizer.dim), nn.Linear(quantizer.dim, width)
        nn.init.normal_(self.into.weight, std=quantizer.latent_std / width**0.5)
        self.quantizer = quantizer

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        return self.into(self.encoder(images).permute(0, 2, 3, 1))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, Any]:
        quantized = self.quantizer(self.latents(images))
        return self.decoder(self.out(quantized.latents).permute(0, 3, 1, 2)).float(), quantized


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


def replace_quantizer(model: AudioAutoencoder, quantizer: Quantizer) -> None:
    """Replace the quantizer of a model, and the projections before and after it."""
    wide = model.encoder.project.in_features
    model.encoder.project = nn.Linear(wide, quantizer.dim)
    nn.init.normal_(model.encoder.project.weight, std=quantizer.latent_std / wide**0.5)
    model.decoder.project = nn.Linear(quantizer.dim, wide)
    model.quantizer = quantizer


def read_image(path: Path) -> torch.Tensor:
    """(3, H, W) uint8, at least 64 pixels each way."""
    from PIL import Image

    image = Image.fromarray(to_rgb(load_image(path)))
    scale = max(1.0, Images.size / min(image.size))
    if scale > 1:
        image = image.resize([max(Images.size, round(n * scale)) for n in image.size])
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def center(image: torch.Tensor, size: int) -> torch.Tensor:
    top, left = ((n - size) // 2 for n in image.shape[1:])
    return image[:, top : top + size, left : left + size]


def run(
    task: Speech | Images,
    method: str,
    size: int,
    seed: int,
    args: argparse.Namespace,
    workers: Workers,
) -> dict[str, Any]:
    """Train and evaluate one model."""
    torch.manual_seed(seed)
    quantizer = METHODS[method](size)
    torch.manual_seed(seed)  # again, so that all quantizers get the same weights
    model = task.model(quantizer).to(args.device).train()
    steps = args.steps if isinstance(task, Speech) else args.image_steps
    optim = OptimConfig(name="muon", lr=args.lr, warmup_steps=steps // 20)
    optimizers = build_optimizers(model, optim)
    calibrations = {round(share * steps) for share in CALIBRATIONS}
    first = seed * steps  # each seed sees different data
    began, training = time.perf_counter(), 0.0
    for step in range(steps):
        batch = task.batch(first + step).to(args.device)
        tick = time.perf_counter()
        rate = optim.lr * min(1.0, (step + 1) / optim.warmup_steps, 2 * (1 - step / steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        with torch.autocast(args.device, torch.bfloat16):
            output, quantized = model(batch)
        (task.losses(batch, output) + quantized.loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        training += time.perf_counter() - tick
        if isinstance(quantizer, VP) and step + 1 in calibrations:
            with suppress(ValueError):  # the latents of an early encoder may not allow it
                with torch.no_grad():
                    quantizer.calibrate(latents(task, model, CALIBRATION_PER_CODE * size))
    with torch.no_grad():
        if isinstance(quantizer, VP):
            quantizer.fit(latents(task, model, FIT_PER_CODE * size), max_iterations=FIT_ITERATIONS)
        tokens, values = task.evaluate(model.eval(), workers)
    usage = CodebookUsage(quantizer.codebook_size)
    for some in tokens:
        usage.update(some)
    return {
        "task": type(task).__name__.lower(),
        "method": method,
        "codebook_size": size,
        "codes": quantizer.codebook_size,
        "seed": seed,
        **values,
        "cvu": usage.cvu,
        "entropy": usage.entropy,
        "tokens": usage.tokens,
        "eta": quantizer.eta.item() if isinstance(quantizer, VP) else None,
        "mh_steps": quantizer.mh_steps if isinstance(quantizer, VP) else None,
        "train_seconds": training,
        "seconds": time.perf_counter() - began,
    }


def latents(task: Speech | Images, model: nn.Module, wanted: int) -> torch.Tensor:
    """(N, D) latents of training crops, N at least `wanted`."""
    found, step, count = [], 0, 0
    while count < wanted:
        batch = task.batch(step).to(next(model.parameters()).device)
        z = model.encoder(batch) if isinstance(task, Speech) else model.latents(batch)
        found.append(z.float().reshape(-1, z.shape[-1]))
        step, count = step + 1, count + len(found[-1])
    return torch.cat(found)


def table(rows: list[dict[str, Any]], task: Speech | Images) -> str:
    """A Markdown table of means over seeds, and half of their range."""
    rows = [row for row in rows if row["task"] == type(task).__name__.lower()]
    lines = [
        f"| K | method | codes | CVU | bits/token | {' | '.join(task.metrics)} |",
        f"|---:|---|---:|---:|---:|{'---:|' * len(task.metrics)}",
    ]
    for key in dict.fromkeys((row["codebook_size"], row["method"]) for row in rows):
        group = [row for row in rows if (row["codebook_size"], row["method"]) == key]
        cells = [spread([r["cvu"] for r in group], 3), spread([r["entropy"] for r in group], 2)]
        cells += [
            spread([r[name] for r in group], digits)
            for name, digits in zip(task.metrics, task.digits)
        ]
        lines.append(f"| {key[0]} | {key[1]} | {group[0]['codes']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=("speech", "images"), default=None)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sizes", nargs="+", type=int, choices=LEVELS, default=[256, 1024, 4096])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100, help="training steps on speech")
    parser.add_argument("--image-steps", type=int, default=120)
    parser.add_argument("--width", type=int, default=128, help="channels of the autoencoders")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--backbone", help="speech: start from this model, with crops of 1.536 s")
    parser.add_argument("--batch", type=int, default=12, help="crops per step")
    parser.add_argument("--image-batch", type=int, default=32)
    parser.add_argument("--every", type=int, default=2, help="use every n-th training image")
    parser.add_argument("--clips", type=int, default=10, help="clips for PESQ and STOI")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--speech", type=Path, default=DATA / "speech_train_opus")
    parser.add_argument("--speech-dev", type=Path, default=DATA / "speech_dev")
    parser.add_argument("--images", type=Path, default=DATA / "images_train")
    parser.add_argument("--images-dev", type=Path, default=DATA / "images_dev")
    parser.add_argument("--json", type=Path, help="write every run to this file as it ends")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    with Workers(2) as workers:
        for name in args.tasks or ("speech", "images"):
            task = {"speech": Speech, "images": Images}[name](args)
            for size in args.sizes:
                for method in args.methods:
                    for seed in range(args.seeds):
                        row = run(task, method, size, seed, args, workers)
                        rows.append(row)
                        values = "  ".join(f"{m} {row[m]:.3f}" for m in (*task.metrics, "cvu"))
                        print(
                            f"{name} K={size} {method} seed {seed}: {values}  "
                            f"{row['train_seconds']:.0f} of {row['seconds']:.0f} s",
                            file=sys.stderr,
                        )
                        if args.json:
                            args.json.write_text(json.dumps(rows, indent=1))
            print(f"\n{name}, {args.seeds} seeds, mean ± half range\n\n{table(rows, task)}")
    print(f"\n{(time.perf_counter() - began) / 60:.0f} minutes", file=sys.stderr)


if __name__ == "__main__":
    main()
