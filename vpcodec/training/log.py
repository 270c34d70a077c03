"""What a person sees of a training: progress, metrics.jsonl, TensorBoard, the run's README."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .. import __version__
from ..media.files import atomic_output
from ..recipe import Recipe

METRICS = "metrics.jsonl"
README = "README.md"
PACKAGES = (
    "torch",
    "torchaudio",
    "accelerate",
    "numpy",
    "soundfile",
    "soxr",
    "pesq",
    "pystoi",
    "pillow",
)
FLOOR_DB = -80.0
FFT, HOP = 1024, 160


class RunLog:
    """Progress on stderr, rows in metrics.jsonl, curves, audio and pictures in TensorBoard.

    In all but the main process it does nothing.

    Args:
        folder: the run.
        recipe: what is trained.
        step: the step that the run goes on from.
        enabled: whether this is the main process.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, step: int, enabled: bool = True) -> None:
        self.enabled = enabled
        self.console = Console(stderr=True, quiet=not enabled)
        self._steps = recipe.train.steps
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        again = any(folder.glob("events.out.tfevents.*"))
        self._board = SummaryWriter(str(folder), purge_step=step + 1 if again else None)
        self._rows = open(folder / METRICS, "a")
        self._progress = Progress(
            TextColumn("{task.description} {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._progress.start()
        self._task = self._progress.add_task("training", total=self._steps, completed=step, note="")
        self._began = time.monotonic()
        self._first = step

    def close(self) -> None:
        """End the display and close the files."""
        if self.enabled:
            self._progress.stop()
            self._rows.close()
            self._board.close()

    def message(self, text: str) -> None:
        """A line on stderr."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def row(self, step: int, seconds: float, values: dict[str, float]) -> None:
        """A row of metrics.jsonl and a point on each curve."""
        if not self.enabled:
            return
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        rounded = {
            name: float(f"{value:.6g}") if math.isfinite(value) else None  # JSON has no NaN
            for name, value in values.items()
        }
        row = {"step": step, "seconds": round(seconds, 1)} | rounded
        print(json.dumps(row), file=self._rows, flush=True)

    def progress(self, step: int, note: str) -> None:
        """Say where the training is and how fast."""
        if not self.enabled:
            return
        if self.console.is_terminal:
            self._progress.update(self._task, completed=step, note=note)
            return
        done = max(1, step - self._first)
        left = (time.monotonic() - self._began) / done * (self._steps - step)
        eta = f"  {left / 60:.0f} min left" if left >= 60 else ""
        self.message(f"step {step}/{self._steps}  {note}{eta}")

    def audio(self, step: int, name: str, samples: torch.Tensor, rate: int) -> None:
        """(T,) samples to listen to, and their spectrogram to look at."""
        if not self.enabled:
            return
        samples = samples.detach().float().cpu()
        self._board.add_audio(name, samples, step, rate)
        self._board.add_image(f"{name} spectrogram", spectrogram(samples), step)

    def image(self, step: int, name: str, image: torch.Tensor) -> None:
        """(3, H, W) picture to look at; what is outside of 0 to 1 is clipped."""
        if self.enabled:
            self._board.add_image(name, image.detach().float().cpu().clamp(0, 1), step)


class Clock:
    """Time and data of the training itself, and how much of the time was waiting for data.

    What is done in between (saving, evaluating) does not count.
    """

    def __init__(self) -> None:
        self.numbers = 0  # of the batches
        self._spent = self._waited = 0.0

    @contextmanager
    def training(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._spent += time.perf_counter() - began

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def lap(self) -> tuple[float, float, float]:
        """Seconds, numbers per second and share of waiting since the last lap."""
        spent = max(self._spent, 1e-9)
        found = self._spent, self.numbers / spent, self._waited / spent
        self.numbers, self._spent, self._waited = 0, 0.0, 0.0
        return found


def spectrogram(samples: torch.Tensor) -> torch.Tensor:
    """(T,) samples -> (1, bins, frames) in 0..1: decibels from -80 to 0 of a full-scale sine."""
    window = torch.hann_window(FFT)
    padded = torch.nn.functional.pad(samples.float(), (0, max(0, FFT - len(samples))))
    spectrum = torch.stft(padded, FFT, HOP, window=window, return_complex=True).abs() * (4 / FFT)
    decibels = 20 * torch.log10(spectrum.clamp(min=1e-6))
    return (1 - decibels / FLOOR_DB).clamp(0, 1).flip(0).unsqueeze(0)


def cut_metrics(folder: Path, step: int) -> None:
    """Drop the rows of steps after a checkpoint, which will come again, and torn ones."""
    path = folder / METRICS
    if path.exists():
        rows = [(line, row) for line, row in read_metrics(folder) if row["step"] <= step]
        with atomic_output(path) as file:
            file.write("".join(line for line, _ in rows).encode())


def read_metrics(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lines and rows of metrics.jsonl that are whole."""
    found = []
    path = folder / METRICS
    if path.exists():
        for line in path.read_text(errors="replace").splitlines(keepends=True):
            with suppress(ValueError, TypeError, KeyError):
                row = json.loads(line)
                if line.endswith("\n") and isinstance(row["step"], int):
                    found.append((line, row))
    return found


def write_readme(folder: Path, recipe: Recipe, *, parameters: dict[str, int], data: str) -> None:
    """The run's README.md: recipe, state of the code, versions, hardware, what to do next.

    Args:
        folder: the run.
        recipe: what is trained.
        parameters: numbers of parameters by name.
        data: a line on the training data.
    """
    import yaml

    settings = recipe.model_dump(mode="json", exclude_unset=True)
    sizes = ", ".join(f"{name} {number / 1e6:.2f} M" for name, number in parameters.items())
    text = f"""# {recipe.model.name}: a training run

    {command()}

- Parameters: {sizes}
- Data: {data}
- vpcodec {__version__}; {git_state()}
- {versions()}
- {hardware()}

Repeat the command to resume. `vpcodec export {folder} -o FOLDER` makes a model folder of the newest
checkpoint, `vpcodec export {folder}/best.safetensors -o FOLDER` of the weights that did best on
held-out data. `metrics.jsonl` has a row per logged step; `tensorboard --logdir {folder}` shows
curves and samples.

## Recipe

What it sets; `recipe.json` has every field.

```yaml
{yaml.safe_dump(settings, sort_keys=False).rstrip()}
```
"""
    with atomic_output(folder / README) as file:
        file.write(text.encode())


def command() -> str:
    """The command line of this process, by its program's name."""
    import shlex

    name = Path(sys.argv[0]).name
    return shlex.join(["vpcodec" if name in ("__main__.py", "") else name, *sys.argv[1:]])


def git_state() -> str:
    """Commit of the package's repository, and whether files differ from it."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD") if (root / ".git").exists() else ""
        if not commit:
            return "not a git checkout"
        changed = len(git("status", "--porcelain").splitlines())
    except (OSError, subprocess.SubprocessError):
        return "git cannot tell the state of the code"
    return f"commit {commit}" + (f", {changed} files changed since" if changed else "")


def versions() -> str:
    """Python and the packages that a training depends on."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def hardware() -> str:
    """What computes."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"{len(names)} GPU: {names[0]}; {os.cpu_count()} CPU cores"
    return f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
