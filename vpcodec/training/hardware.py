"""What a training runs on: processes, devices, precision, and the signals that end it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from ..recipe import Recipe

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
LONGEST_WAIT = timedelta(hours=3)  # of a process for another, which may be making a codebook
SIGNAL_ECHO = 2.0  # seconds in which a second signal is the first one, sent on by a launcher


class TrainingError(RuntimeError):
    """A training that cannot start or go on; the last good checkpoint is kept."""


class NoWeightsError(TrainingError):
    """A training that needs weights to start from, and was given none."""


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Processes and devices; the precision is ours, since losses and quantizers are kept out."""
    missing = [name for name in recipe.train.trackers if find_spec(name) is None]
    if missing:
        raise TrainingError(f"train.trackers: pip install {' '.join(missing)}")
    if recipe.train.device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("train.device: there is no GPU that torch can use")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cpu = recipe.train.device == "cpu" or not torch.cuda.is_available()
    if cpu:
        keep_freed_memory()
    if not cpu and local > torch.cuda.device_count():
        raise TrainingError(f"{local} processes for {torch.cuda.device_count()} GPUs")
    group: dict[str, Any] = {"timeout": LONGEST_WAIT}
    if not cpu and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        group["backend"] = "cpu:gloo,cuda:nccl"  # gloo for what is said on the CPU
    return Accelerator(
        cpu=cpu,
        mixed_precision="no",
        log_with=list(recipe.train.trackers) or None,
        kwargs_handlers=[
            # queues and averages of quantizers are equal in all processes as they are
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(**group),
        ],
    )


def keep_freed_memory() -> None:
    """Let glibc keep what is freed; elsewhere nothing.

    Else each large tensor of each step is fresh from the system and costs a page fault per 4 KiB:
    63,000 of them per step of speech_3k on a CPU, a seventh of its time.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**28)


def lost_process(error: RuntimeError) -> bool:
    """Whether an error says that another process of the group is not there any more."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error)
    return "gloo" in text and any(word in text for word in ("closed", "reset", "Timed out"))


def loader_workers(recipe: Recipe, accelerator: Accelerator) -> int:
    """Loader processes: threads beside a CPU training, which leaves none idle."""
    if recipe.data.workers is not None or recipe.data.streams:
        return recipe.data.workers or 0
    if accelerator.device.type == "cpu":
        return 0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, (os.cpu_count() or 1) // local - 1))


def choose_precision(name: str, accelerator: Accelerator) -> str:
    """What to autocast to; "auto": bf16 where it is faster, as the main process finds for all."""
    device = accelerator.device
    if name == "fp16" and device.type == "cpu":
        raise TrainingError("train.precision: fp16 needs a GPU; bf16 and fp32 work on a CPU")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    faster = torch.tensor(_seconds(torch.bfloat16) < _seconds(torch.float32))
    if accelerator.num_processes > 1:
        torch.distributed.broadcast(faster, 0)
    return "bf16" if faster else "fp32"


def _seconds(dtype: torch.dtype) -> float:
    """For a few matrix products on the CPU."""
    a, b = torch.ones(1024, 256, dtype=dtype), torch.ones(256, 1024, dtype=dtype)
    a @ b
    began = time.perf_counter()
    for _ in range(5):
        a @ b
    return time.perf_counter() - began


def compile_options(precision: str, device: torch.device) -> dict[str, Any] | None:
    """What torch.compile is told; None: nothing.

    On processors with AMX, modules that torch 2.11 compiles for its widest vectors give no numbers
    under bf16; with vectors of 256 bits they do.
    """
    if precision == "bf16" and device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        return {"cpp.simdlen": 256}
    return None


def any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Whether the flag is set in any process."""
    if accelerator.num_processes == 1:
        return flag
    votes = torch.tensor(int(flag))  # on the CPU, so that no GPU is waited for
    torch.distributed.all_reduce(votes)
    return bool(votes)


def same_in_all_processes(number: int, accelerator: Accelerator) -> bool:
    """Whether all processes have the same number."""
    if accelerator.num_processes == 1:
        return True
    bounds = torch.tensor([number, -number])
    torch.distributed.all_reduce(bounds, torch.distributed.ReduceOp.MIN)
    return int(bounds[0]) == -int(bounds[1])


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device; a GPU is not waited for."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # a copy from other memory would wait
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold back the first Ctrl-C or SIGTERM; the function given tells whether one came."""
    came: list[float] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        came.append(time.monotonic())
        if came[-1] - came[0] > SIGNAL_ECHO:  # asked again: act at once
            signal.signal(number, previous[number])
            signal.raise_signal(number)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: signals are somebody else's
        pass
    try:
        yield lambda: bool(came)
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)
