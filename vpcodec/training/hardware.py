"""The processes, devices and precision of a training run, and the signals that end it."""

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

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # from glibc's malloc.h
LONGEST_WAIT = timedelta(hours=3)  # for another process, which may be fitting a codebook
SIGNAL_ECHO = 2.0  # seconds in which a second signal is the first one, repeated by a launcher


class TrainingError(RuntimeError):
    """Training cannot start or continue; the last good checkpoint is kept."""


class NoWeightsError(TrainingError):
    """Training needs weights to start from, and none were given."""


def make_accelerator(recipe: Recipe) -> Accelerator:
    """The accelerator of a recipe.

    Its own mixed precision is off: training autocasts the networks alone, not losses and
    quantizers.

    Raises:
        TrainingError: a package or a device that the recipe asks for is missing.
    """
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
        group["backend"] = "cpu:gloo,cuda:nccl"  # gloo for tensors on the CPU
    return Accelerator(
        cpu=cpu,
        mixed_precision="no",
        log_with=list(recipe.train.trackers) or None,
        kwargs_handlers=[
            # the buffers of quantizers are equal in all processes without it
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(**group),
        ],
    )


def keep_freed_memory() -> None:
    """Make glibc keep freed memory; on other systems, do nothing.

    Otherwise, each large tensor of each step is allocated anew by the system and costs a page fault
    per 4 KiB: 63,000 per step of speech_3k on a CPU, a seventh of its time.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**28)


def lost_process(error: RuntimeError) -> bool:
    """Whether an error says that another process of the group has ended."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error)
    return "gloo" in text and any(word in text for word in ("closed", "reset", "Timed out"))


def loader_workers(recipe: Recipe, accelerator: Accelerator) -> int:
    """Number of loader processes; 0: threads, the default on CPUs, where no core is idle."""
    if recipe.data.workers is not None or recipe.data.streams:
        return recipe.data.workers or 0
    if accelerator.device.type == "cpu":
        return 0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, (os.cpu_count() or 1) // local - 1))


def choose_precision(name: str, accelerator: Accelerator) -> str:
    """The precision to compute networks in.

    "auto" is bf16 if that is faster than fp32; on CPUs, the main process measures it for all.

    Raises:
        TrainingError: fp16 on a CPU.
    """
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
    """Duration of a few matrix products on the CPU, s."""
    a, b = torch.ones(1024, 256, dtype=dtype), torch.ones(256, 1024, dtype=dtype)
    a @ b
    began = time.perf_counter()
    for _ in range(5):
        a @ b
    return time.perf_counter() - began


def compile_options(precision: str, device: torch.device) -> dict[str, Any] | None:
    """Options of torch.compile; None for the defaults.

    On processors with AMX, modules that torch 2.11 compiles for the widest vectors return NaN under
    bf16; with vectors of 256 bits they do not.
    """
    if precision == "bf16" and device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        return {"cpp.simdlen": 256}
    return None


def any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Whether the flag is set in any process."""
    if accelerator.num_processes == 1:
        return flag
    votes = torch.tensor(int(flag))  # on the CPU, so that no process waits for its GPU
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
    """A copy on the device, made without waiting for a GPU."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # copies from pageable memory wait
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Defer the first Ctrl-C or SIGTERM; yields a function that tells whether one has come."""
    came: list[float] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        came.append(time.monotonic())
        if came[-1] - came[0] > SIGNAL_ECHO:  # a second request: act at once
            signal.signal(number, previous[number])
            signal.raise_signal(number)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    except ValueError:  # signals can only be handled in the main thread
        pass
    try:
        yield lambda: bool(came)
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)
