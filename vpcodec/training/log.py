"""The visible output of a training run: progress, metrics.jsonl, TensorBoard, README.md."""

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
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from .. import __version__
from ..media.files import atomic_output
from ..recipe import Recipe
from ..terminal import escape, plain_stderr

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
    """Progress on stderr, rows in metrics.jsonl, and curves, audio and images in TensorBoard.

    Does nothing in processes other than the main process.

    Args:
        folder: the run folder.
        recipe: the recipe of the run.
        step: the step that the run starts or continues from.
        enabled: whether this is the main process.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, step: int, enabled: bool = True) -> None:
        self.enabled = enabled
        self.console = Console(file=plain_stderr(), quiet=not enabled)
        self._steps = recipe.train.steps
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        again = any(folder.glob("events.out.tfevents.*"))
        self._board = SummaryWriter(str(folder), purge_step=step + 1 if again else None)
        self._rows = open(folder / METRICS, "a")
        self._bar = ProgressBar(
            TextColumn("{task.description} {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._bar.start()
        self._bar_task = self._bar.add_task("training", total=self._steps, completed=step, note="")
        self._began = time.monotonic()
        self._first = step

    def close(self) -> None:
        """Stop the progress bar and close the files."""
        if self.enabled:
            self._bar.stop()
            self._rows.close()
            self._board.close()

    def message(self, text: str) -> None:
        """Print a line to stderr."""
        self.console.print(escape(text), markup=False, highlight=False, soft_wrap=True)

    def row(self, step: int, seconds: float, values: dict[str, float]) -> None:
        """Append a row to metrics.jsonl, and a point to each curve."""
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
        """Show the current step, with a note on losses and speed."""
        if not self.enabled:
            return
        if self.console.is_terminal:
            self._bar.update(self._bar_task, completed=step, note=note)
            return
        done = max(1, step - self._first)
        left = (time.monotonic() - self._began) / done * (self._steps - step)
        eta = f"  {left / 60:.0f} min left" if left >= 60 else ""
        self.message(f"step {step}/{self._steps}  {note}{eta}")

    def audio(self, step: int, name: str, samples: torch.Tensor, rate: int) -> None:
        """Log (T,) samples at `rate` Hz, and their spectrogram."""
        if not self.enabled:
            return
        samples = samples.detach().float().cpu()
        self._board.add_audio(name, samples, step, rate)
        self._board.add_image(f"{name} spectrogram", spectrogram(samples), step)

    def image(self, step: int, name: str, image: torch.Tensor) -> None:
        """Log a (3, H, W) image; values are clipped to 0 to 1."""
        if self.enabled:
            self._board.add_image(name, image.detach().float().cpu().clamp(0, 1), step)


class Clock:
    """Measures the time and data of training steps, and the share of time spent waiting for data.

    Work between steps (saving, evaluating) does not count.

    Attributes:
        numbers: array elements of the batches since the last lap.
    """

    def __init__(self) -> None:
        self.numbers = 0
        self._spent = self._waited = 0.0

    @contextmanager
    def training(self) -> Iterator[None]:
        """A context manager around a training step."""
        began = time.perf_counter()
        yield
        self._spent += time.perf_counter() - began

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context manager around waiting for data, inside `training`."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def lap(self) -> tuple[float, float, float]:
        """Seconds, array elements per second and share of waiting since the last lap."""
        spent = max(self._spent, 1e-9)
        found = self._spent, self.numbers / spent, self._waited / spent
        self.numbers, self._spent, self._waited = 0, 0.0, 0.0
        return found


def spectrogram(samples: torch.Tensor) -> torch.Tensor:
    """(T,) samples -> (1, bins, frames) in 0..1: -80 to 0 dB relative to a full-scale sine."""
    window = torch.hann_window(FFT)
    padded = torch.nn.functional.pad(samples.float(), (0, max(0, FFT - len(samples))))
    spectrum = torch.stft(padded, FFT, HOP, window=window, return_complex=True).abs() * (4 / FFT)
    decibels = 20 * torch.log10(spectrum.clamp(min=1e-6))
    return (1 - decibels / FLOOR_DB).clamp(0, 1).flip(0).unsqueeze(0)


def truncate_metrics(folder: Path, step: int) -> None:
    """Drop incomplete rows of metrics.jsonl, and those after `step`, which will come again."""
    path = folder / METRICS
    if path.exists():
        rows = [(line, row) for line, row in read_metrics(folder) if row["step"] <= step]
        with atomic_output(path) as file:
            file.write("".join(line for line, _ in rows).encode())


def read_metrics(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """The complete lines of metrics.jsonl, each with the row that it holds."""
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
    """Write README.md of a run: command, recipe, versions, hardware, and the next commands.

    Args:
        folder: the run folder.
        recipe: the recipe of the run.
        parameters: number of parameters by name of the network.
        data: one line that describes the training data.
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

Repeat the command to resume. `vpcodec export {folder} -o FOLDER` makes a model folder from the
newest checkpoint, `vpcodec export {folder}/best.safetensors -o FOLDER` from the weights that scored
best on held-out data. `metrics.jsonl` has a row per logged step; `tensorboard --logdir {folder}`
shows curves and samples.

## Recipe

The fields that were set; `recipe.json` has all of them.

```yaml
{yaml.safe_dump(settings, sort_keys=False).rstrip()}
```
"""
    with atomic_output(folder / README) as file:
        file.write(text.encode())


def command() -> str:
    """The command line of this process, starting with the name of its program."""
    import shlex

    name = Path(sys.argv[0]).name
    return shlex.join(["vpcodec" if name in ("__main__.py", "") else name, *sys.argv[1:]])


def git_state() -> str:
    """Commit of the package's repository, and the number of files changed since."""
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
        return "the state of the code is unknown (git failed)"
    return f"commit {commit}" + (f", {changed} files changed since" if changed else "")


def versions() -> str:
    """Versions of Python and of the packages that training depends on."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def hardware() -> str:
    """The processors that training runs on."""
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
