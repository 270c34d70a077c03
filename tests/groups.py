"""Runs a function in two processes of one group, as training on two devices does."""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WAIT = timedelta(seconds=300)  # for the other process, on a busy machine


def in_two_processes(function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What `function(rank, *args)` returns in each of two processes.

    Args:
        function: at the top level of its module; it returns tensors and plain values.
        folder: for the rendezvous and the results; an empty one.
    """
    torch.multiprocessing.spawn(_process, args=(function, str(folder), args), nprocs=2)
    return [torch.load(_result(folder, rank)) for rank in range(2)]


def _process(rank: int, function: Callable[..., Any], folder: str, args: tuple[Any, ...]) -> None:
    faulthandler.enable()  # an abort says where
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=WAIT)
    _save(function(rank, *args), _result(Path(folder), rank))
    # Gloo may abort a process whose peer closes a connection that it still uses, and so may the
    # threads of libraries when the interpreter ends: so nobody leaves before both are done, and
    # then without taking anything down.
    deadline = time.monotonic() + WAIT.total_seconds()
    while not _result(Path(folder), 1 - rank).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os._exit(0)


def _save(found: Any, path: Path) -> None:
    torch.save(found, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def _result(folder: Path, rank: int) -> Path:
    return folder / f"result-{rank}.pt"
