"""How many threads are used: what the process is allowed, one for streams and small products."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import run

from vpcodec import Codec, threads
from vpcodec.backends import load_backend, onnx
from vpcodec.hub import open_model
from vpcodec.threads import allowed_cores, one_blas_thread

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="affinity and cgroups are Linux's"
)


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def machine(root: Path, group: str, **files: str) -> Path:
    """A root folder with /proc/self/cgroup and files below /sys/fs/cgroup ("__" is "/")."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(group)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/\n", {"cpuDOTmax": "300000 100000\n"}, 3),
        ("0::/\n", {"cpuDOTmax": "max 100000\n"}, 8),
        ("0::/\n", {"cpuDOTmax": "50000 100000\n"}, 1),
        ("0::/\n", {"cpuDOTmax": "250000 100000\n"}, 2),
        ("0::/\n", {"cpuDOTmax": "9900000 100000\n"}, 8),
        ("0::/a/b\n", {"a__cpuDOTmax": "200000 100000\n", "a__b__cpuDOTmax": "max 100000\n"}, 2),
        ("0::/a/b\n", {"cpuDOTmax": "200000 100000\n", "a__b__cpuDOTmax": "400000 100000"}, 2),
        ("0::/not/here\n", {"cpuDOTmax": "500000 100000\n"}, 5),
        (
            "4:memory:/x\n3:cpu,cpuacct:/x\n",
            {"cpu__x__cpuDOTcfs_quota_us": "400000", "cpu__x__cpuDOTcfs_period_us": "100000"},
            4,
        ),
        (
            "3:cpu,cpuacct:/x\n",
            {"cpu__x__cpuDOTcfs_quota_us": "-1", "cpu__x__cpuDOTcfs_period_us": "100000"},
            8,
        ),
        (
            "3:cpuset:/x\n",
            {"cpu__x__cpuDOTcfs_quota_us": "100000", "cpu__x__cpuDOTcfs_period_us": "100000"},
            8,
        ),
        ("0::/\n", {"cpuDOTmax": "nonsense"}, 8),
        ("0::/\n", {"cpuDOTmax": "1 0"}, 8),
        ("nonsense", {}, 8),
    ],
)
def test_the_quota_of_a_cgroup_is_respected(tmp_path, eight_cores, group, files, cores):
    assert allowed_cores(machine(tmp_path, group, **files)) == cores


def test_without_cgroups_the_affinity_counts(tmp_path, eight_cores):
    assert allowed_cores(tmp_path) == 8


def test_the_affinity_of_the_process_is_respected():
    """As under taskset, in a process of its own."""
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
        "from vpcodec.threads import allowed_cores, default_threads; "
        "print(allowed_cores(), default_threads())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1", "1"]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of threads of the sessions that are made."""
    numbers: list[int] = []
    session = onnx.ort.InferenceSession

    def noted(path, options, **more):
        numbers.append(options.intra_op_num_threads)
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        return session(path, options, **more)

    monkeypatch.setattr(onnx.ort, "InferenceSession", noted)
    return numbers


@pytest.mark.parametrize(("cores", "most"), [(1, 1), (2, 2), (64, 4)])
def test_arrays_take_the_cores_and_streams_one(monkeypatch, used, cores, most):
    monkeypatch.setattr(threads, "allowed_cores", lambda: cores)
    codec = Codec.from_pretrained()
    tokens = codec.encode(np.zeros(5000, np.float32))
    codec.decode(tokens)
    assert used == [most, most]
    used.clear()
    stream = codec.encoder_stream()
    assert (np.concatenate([stream.push(np.zeros(5000)), stream.flush()], 1) == tokens).all()
    codec.decoder_stream().push(tokens)
    assert used == ([] if most == 1 else [1, 1])


def test_a_number_that_is_given_is_taken_for_all(monkeypatch, used):
    monkeypatch.setattr(threads, "allowed_cores", lambda: 1)
    codec = Codec.from_pretrained(threads=3)
    codec.encode(np.zeros(100, np.float32))
    codec.encoder_stream().push(np.zeros(100, np.float32))
    assert used == [3]
    backend = load_backend("onnx", open_model("speech-3k"), threads=2)
    assert backend.for_streams is backend


def test_pipes_and_jobs_take_one_thread_for_each_file(monkeypatch, used, speech_wav, tmp_path):
    monkeypatch.setattr(threads, "allowed_cores", lambda: 4)
    run("encode", speech_wav, tmp_path / "a.tok")
    assert used == [4]
    for args in (["-", "-"], [speech_wav, tmp_path / "b.tok", "-j", "2"]):
        used.clear()
        run("encode", *args, stdin=speech_wav.read_bytes())
        assert used == [1]


def test_matrix_products_take_one_thread_while_any_block_is_coded():
    functions = threads._openblas()
    if functions is None:
        pytest.skip("this NumPy has no OpenBLAS of its own")
    get, put = functions
    before = get()
    put(2)
    try:
        inside = threading.Barrier(2, timeout=10)
        seen = []

        def other() -> None:
            with one_blas_thread():
                inside.wait()
                seen.append(get())
                inside.wait()

        thread = threading.Thread(target=other)
        thread.start()
        with one_blas_thread():
            inside.wait()
            seen.append(get())
        seen.append(get())  # the other one is still at work
        inside.wait()
        thread.join()
        assert seen == [1, 1, 1] and get() == 2
        with pytest.raises(ZeroDivisionError), one_blas_thread():
            raise ZeroDivisionError
        assert get() == 2
    finally:
        put(before)


def test_the_entropy_coder_takes_one_blas_thread(monkeypatch):
    entered = []
    monkeypatch.setattr(
        "vpcodec.entropy.one_blas_thread", lambda: (entered.append(1), one_blas_thread())[1]
    )
    coder = Codec.from_pretrained().coder
    tokens = np.zeros((50, 1), np.int64)
    assert (coder.unpack(coder.pack(tokens), 50, 1) == tokens).all()
    assert len(entered) == 2
