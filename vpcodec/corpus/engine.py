"""Ray Data: the shards of a plan, on all processors of this machine or of a cluster."""

from __future__ import annotations

import io
import json
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from ..codec import AudioCodec
from .inputs import CorpusError
from .plan import Plan
from .shards import ShardError, ShardTokenizer

OBJECT_STORE = 128 * 2**20  # bytes; what passes through it is numbers of shards and reports
CONNECT_SECONDS = 10.0  # to a cluster
MAX_SOCKET_PATH = 40  # characters of the folder for temporary files that leave room for Ray's names


class Worker:
    """Holds the model in a process of Ray; called with one shard after the other.

    Args:
        plan: of the corpus.
        gpu: whether to run the model in torch on the GPU that this worker was given.
        threads: CPU threads.
    """

    def __init__(self, plan: Plan, gpu: bool, threads: int) -> None:
        kind: dict[str, Any] = {"backend": "torch", "device": "cuda"} if gpu else {"device": "cpu"}
        codec = AudioCodec.from_pretrained(plan.settings.model, threads=threads, **kind)
        if codec.space.hex() != plan.settings.space:
            raise ShardError(
                f"{plan.settings.model}: another model here than where the plan was made"
            )
        self._tokenizer = ShardTokenizer(plan, codec)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"report": json.dumps(self._tokenizer.run(int(row["shard"])))}
        except ShardError as error:
            return {"report": json.dumps({"fatal": str(error)})}


def run_shards(
    plan: Plan,
    shards: list[int],
    *,
    jobs: int | None = None,
    address: str | None = None,
    gpus: int = 0,
    on_report: Callable[[dict[str, Any]], None],
) -> None:
    """Tokenise shards with Ray Data, which runs those of a node that is lost again elsewhere.

    Args:
        plan: of the corpus, in a folder that all nodes see.
        shards: numbers of those that are not done.
        jobs: worker processes; None: one for each CPU of the cluster, or of this machine.
        address: of a Ray cluster; None: one is started here and ends with this call, unless this
            process is connected to one already.
        gpus: GPU workers, in place of those on CPUs.
        on_report: called with the report of each shard, in no particular order.

    Raises:
        CorpusError: Ray cannot be started or reached, or a shard cannot be written.
    """
    with _connected(jobs, address, gpus) as ray:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        size = gpus or jobs or max(1, int(ray.cluster_resources().get("CPU", 1)))
        rows = [{"shard": shard} for shard in shards]
        reports = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            Worker,
            fn_constructor_kwargs={"plan": plan, "gpu": gpus > 0, "threads": 1},
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(size, len(rows)),
                                               max_tasks_in_flight_per_actor=1),
            num_cpus=1,
            **({"num_gpus": 1} if gpus else {}),
        )  # fmt: skip
        for row in reports.iter_rows():
            report = json.loads(row["report"])
            if "fatal" in report:
                raise ShardError(report["fatal"])
            on_report(report)


@contextmanager
def _connected(jobs: int | None, address: str | None, gpus: int) -> Iterator[Any]:
    """Ray, connected to a cluster or started here; then disconnected or ended."""
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield sys.modules["ray"]
        return
    if address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
            # A token that Ray makes itself would be left in the home folder.
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray.data

    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with tempfile.TemporaryDirectory(prefix="vpcodec-", dir=_short_folder()) as folder:
        try:
            with _kept_handlers(), _quiet():
                if address is None:
                    ray.init(
                        address="local",
                        num_cpus=jobs,
                        num_gpus=gpus or None,
                        include_dashboard=False,
                        object_store_memory=OBJECT_STORE,
                        _node_ip_address="127.0.0.1",
                        _temp_dir=folder,
                        **common,
                    )
                else:
                    _check_reachable(address)
                    ray.init(address=address, **common)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = f"Ray at {address}" if address else "Ray"
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CorpusError(f"{where} cannot be used: {reason}") from None
        try:
            yield ray
        except BaseException:  # of which Ray's other processes need not tell
            with redirect_stderr(io.StringIO()):
                ray.shutdown()
            raise
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise OSError now where nothing listens at HOST:PORT, for which Ray would wait minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


def _short_folder() -> str:
    """The folder for temporary files, or /tmp where its path is too long for Ray's sockets."""
    folder = tempfile.gettempdir()
    return folder if len(folder) <= MAX_SOCKET_PATH or not Path("/tmp").is_dir() else "/tmp"


@contextmanager
def _quiet() -> Iterator[None]:
    """What Ray's compiled parts say when they start is no business of the user."""
    sys.stderr.flush()
    before = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


@contextmanager
def _kept_handlers() -> Iterator[None]:
    """Ray takes SIGTERM for itself; afterwards it is handled as before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
