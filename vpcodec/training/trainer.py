"""The trainer: one process, reconstruction losses, exact resume."""

from __future__ import annotations

import copy
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..config import ConfigError, VPConfig, parse_model
from ..files import atomic_output
from ..models import AudioAutoencoder
from ..quantizers import VP
from ..recipe import OptimConfig, Recipe
from .checkpoints import (
    CHECKPOINT,
    CheckpointError,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from .data import Crops
from .losses import ReconstructionLoss

LATENTS_PER_CODE = 64  # that a codebook is made of after training


class TrainingError(RuntimeError):
    """A training that cannot go on; the last good checkpoint is kept."""


class Trainer:
    """Trains one recipe in one run folder.

    The folder holds `recipe.json`, `checkpoint.safetensors` (model, averaged weights, optimisers,
    random state), `metrics.jsonl` and TensorBoard events. A run that is interrupted at any step
    and resumed gives the same weights as one that was not.

    Args:
        recipe: what to train.
        folder: the run; created. An existing run is resumed if its recipe trains the same model.
        init_from: model.safetensors to start from, for a new run.
    """

    def __init__(self, recipe: Recipe, folder: Path, *, init_from: Path | None = None) -> None:
        self.recipe = recipe
        self.folder = folder
        self.device = _device(recipe.train.device)
        self.bf16 = _use_bf16(recipe.train.precision, self.device)
        torch.manual_seed(recipe.train.seed)
        self.model = AudioAutoencoder(recipe.model).to(self.device).train()
        if init_from is not None:
            load_weights(self.model, init_from)
        self.average = {k: v.detach().clone() for k, v in self.model.named_parameters()}
        self.loss = ReconstructionLoss(recipe.loss, recipe.model.sample_rate).to(self.device)
        self.optimizers = build_optimizers(self.model, recipe.optim)
        self.data = Crops(
            recipe.data,
            sample_rate=recipe.model.sample_rate,
            multiple=recipe.model.hop_length,
            seed=recipe.train.seed,
        )
        self.step = 0
        self.seconds = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CHECKPOINT).exists():
            self._resume()
        if isinstance(self.model.quantizer, VP) and self.step < recipe.train.steps:
            self.model.quantizer.forget_codebook()  # of other weights
        with atomic_output(folder / "recipe.json") as file:
            file.write(recipe.model_dump_json(indent=2).encode())

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then cosine decay from `lr` to `final_lr` at the last step."""
        optim, steps = self.recipe.optim, self.recipe.train.steps
        if step < optim.warmup_steps:
            return optim.lr * (step + 1) / optim.warmup_steps
        done = (step - optim.warmup_steps) / max(1, steps - 1 - optim.warmup_steps)
        return optim.final_lr + (optim.lr - optim.final_lr) * (1 + math.cos(math.pi * done)) / 2

    def train_step(self, samples: torch.Tensor) -> dict[str, torch.Tensor]:
        """One update on (B, T) samples; returns the loss terms."""
        rate = self.learning_rate(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            output, quantized = self.model(samples)
        terms = self.loss(samples[:, : output.shape[1]], output)
        terms["quantizer"] = quantized.loss
        weights = self.recipe.loss
        total = sum(getattr(weights, name) * value for name, value in terms.items())
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optim.grad_clip)
        if not torch.isfinite(norm):
            raise TrainingError(
                f"step {self.step}: loss or gradient is not finite; "
                f"the checkpoint in {self.folder} is the last good one"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._update_average()
        return {"loss": total, **terms, "grad_norm": norm, **quantized.stats}

    def train(self) -> None:
        """Run to the last step; on Ctrl-C or SIGTERM finish the step, save and stop."""
        train = self.recipe.train
        console = Console(stderr=True)
        with ExitStack() as stack:
            log = stack.enter_context(open(self.folder / "metrics.jsonl", "a"))
            progress = stack.enter_context(_progress(console))
            board = _tensorboard(self.folder)
            stack.callback(board.close)
            task = progress.add_task("training", total=train.steps, completed=self.step, note="")
            if self.data.skipped:
                console.print(f"left out {len(self.data.skipped)} files that cannot be read")
            began, first = time.perf_counter(), self.step
            interrupted = stack.enter_context(_deferred_interrupt())
            for batch in self.data.batches(self.step, train.steps):
                tick = time.perf_counter()
                terms = self.train_step(torch.from_numpy(batch).to(self.device))
                self.seconds += time.perf_counter() - tick
                if self.step % train.log_every == 0 or self.step == train.steps:
                    speed = batch.size * (self.step - first) / self.recipe.model.sample_rate
                    speed /= time.perf_counter() - began
                    row = self._log(terms, speed, log, board)
                    note = f"loss {row['loss']:.3f}  mel {row['mel']:.3f}  {speed:.1f} s/s"
                    if console.is_terminal:
                        progress.update(task, completed=self.step, note=note)
                    else:
                        print(f"step {self.step}/{train.steps}  {note}", file=sys.stderr)
                if self.step % train.audio_every == 0:
                    self._log_audio(batch, board)
                self._calibrate(console)
                last = self.step == train.steps
                if self.step % train.save_every == 0 or last or interrupted():
                    self.save()
                if interrupted():
                    raise KeyboardInterrupt
                if last:
                    self._fit_codebook(console)

    def save(self) -> None:
        """Write the checkpoint."""
        groups: dict[str, dict[str, Any]] = {
            "model": self.model.state_dict(),
            "average": self.average_state(),
            "rng": {"cpu": torch.get_rng_state()},
        }
        if self.device.type == "cuda":
            groups["rng"]["cuda"] = torch.cuda.get_rng_state()
        for i, optimizer in enumerate(self.optimizers):
            groups[f"optimizer{i}"] = optimizer_tensors(optimizer)
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "bf16": self.bf16,
            "optimizer": self.recipe.optim.name,
            "config": self.recipe.model.model_dump(mode="json"),
        }
        save_checkpoint(self.folder, groups, state)

    def _resume(self) -> None:
        groups, state = load_checkpoint(self.folder)
        try:
            if parse_model(state["config"]) != self.recipe.model:
                raise CheckpointError(f"{self.folder}: holds a run of another model configuration")
            if state["optimizer"] != self.recipe.optim.name:
                raise CheckpointError(f"{self.folder}: holds a run of another optimiser")
            self.model.load_state_dict(groups["model"])
            self.average = {k: groups["average"][k].to(self.device) for k in self.average}
            for i, optimizer in enumerate(self.optimizers):
                restore_optimizer(optimizer, groups.get(f"optimizer{i}", {}))
            torch.set_rng_state(groups["rng"]["cpu"])
            if self.device.type == "cuda" and "cuda" in groups["rng"]:
                torch.cuda.set_rng_state(groups["rng"]["cuda"])
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            if self.recipe.train.precision == "auto":
                self.bf16 = bool(state["bf16"])
        except (KeyError, TypeError, ConfigError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"{self.folder}: the checkpoint is incomplete ({reason})"
            ) from None
        self._cut_metrics()

    def _cut_metrics(self) -> None:
        """Drop rows of steps after the checkpoint: they will come again."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            rows = path.read_text().splitlines(keepends=True)
            with atomic_output(path) as file:
                for row in rows:
                    if row.endswith("\n") and json.loads(row)["step"] <= self.step:
                        file.write(row.encode())

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.recipe.optim.ema_decay, (1 + self.step) / (10 + self.step))
        current = [parameter.detach() for parameter in self.model.parameters()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)

    def average_state(self) -> dict[str, Any]:
        """State dict of the averaged model: parameters averaged, buffers those of now."""
        return self.model.state_dict() | self.average

    def _log(self, terms: dict[str, torch.Tensor], speed: float, log: TextIO, board: Any) -> dict:
        row = {name: value.item() for name, value in terms.items()}
        row |= {"lr": self.learning_rate(self.step - 1), "audio_seconds_per_second": speed}
        for name, value in row.items():
            board.add_scalar(name, value, self.step)
        rounded = {name: float(f"{value:.6g}") for name, value in row.items()}
        print(
            json.dumps({"step": self.step, "seconds": round(self.seconds, 1)} | rounded), file=log
        )
        log.flush()
        return row

    def _log_audio(self, batch: Any, board: Any) -> None:
        """First crop and its reconstruction by the averaged weights, really quantized."""
        rate = self.recipe.model.sample_rate
        crop = torch.from_numpy(batch[:1]).to(self.device)
        model = self._averaged()
        if not model.quantizer.fitted:
            if not isinstance(model.quantizer, VP):
                return
            try:
                model.quantizer.fit(max_iterations=5)  # of a copy, for listening
            except ValueError:  # too few latents so far
                return
        with torch.no_grad():
            output, _ = model(crop)
        board.add_audio("original", crop[0].cpu(), self.step, rate)
        board.add_audio("decoded", output[0].cpu(), self.step, rate)

    def _averaged(self) -> AudioAutoencoder:
        """A copy of the model with the averaged weights, in eval mode."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.average_state())
        return model.eval()

    def _calibrate(self, console: Console) -> None:
        """Let a VP quantizer set its eta when it is time to."""
        config = self.recipe.model.quantizer
        if not isinstance(config, VPConfig) or not config.calibrate_every:
            return
        if self.step % config.calibrate_every:
            return
        with console.status("calibrating the perturbation"):
            try:
                self.model.quantizer.calibrate(seed=self.step)
            except ValueError as error:
                console.print(f"step {self.step}: eta stays as it is: {error}")

    @torch.no_grad()
    def _fit_codebook(self, console: Console) -> None:
        """Make the codebook of a VP quantizer: of training crops through the averaged encoder."""
        if not isinstance(self.recipe.model.quantizer, VPConfig):
            return
        model = self._averaged()
        wanted = LATENTS_PER_CODE * model.quantizer.codebook_size
        latents: list[torch.Tensor] = []
        with console.status(f"making the codebook of {wanted:,} latents"):
            for batch in self.data.batches(0, self.recipe.train.steps):
                z = model.encoder(torch.from_numpy(batch).to(self.device))
                latents.append(z.float().flatten(0, 1))
                if len(latents) * len(latents[0]) >= wanted:
                    break
            data = torch.cat(latents)
            try:
                result = self.model.quantizer.fit(data, seed=self.recipe.train.seed)
            except ValueError as error:
                raise TrainingError(f"no codebook: {error}; the weights are saved") from None
        self.save()
        console.print(f"codebook of {len(data):,} latents: mean squared error {result.error:.4f}")


def build_optimizers(model: torch.nn.Module, optim: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for matrices of linear layers and AdamW for the rest.

    Weight decay applies to matrices and kernels, not to biases, norms and Snake's alpha.
    """
    matrices, kernels, vectors = [], [], []
    for name, parameter in model.named_parameters():
        plain = name.endswith("weight") and parameter.ndim >= 2
        if not plain or name.startswith("quantizer."):  # biases, norms, Snake's alpha, codes
            vectors.append(parameter)
        elif optim.name == "muon" and parameter.ndim == 2:
            matrices.append(parameter)
        else:
            kernels.append(parameter)
    decay = optim.weight_decay
    groups = [{"params": kernels, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas)
    ]
    if matrices:
        muon = torch.optim.Muon(
            matrices, lr=optim.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    return optimizers


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Load a model.safetensors strictly.

    Raises:
        CheckpointError: unreadable, or of another architecture.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: not a safetensors file that can be read ({error})"
        ) from None
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise CheckpointError(f"{path}: weights of another architecture ({reason})") from None


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to autocast to bf16; "auto" multiplies matrices both ways and takes the faster."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(1024, 256, dtype=dtype), torch.ones(256, 1024, dtype=dtype)
        a @ b
        began = time.perf_counter()
        for _ in range(5):
            a @ b
        return time.perf_counter() - began

    return seconds(torch.bfloat16) < seconds(torch.float32)


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold back the first Ctrl-C or SIGTERM; the function given tells whether one came."""
    came: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        came.append(number)
        signal.signal(number, previous[number])  # the second one acts at once

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: signals are somebody else's
        pass
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description} {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
