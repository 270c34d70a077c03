"""What docs/reliability.md promises of faults: memory, disks, signals, odd files, threads."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from helpers import ENOUGH, MODULE, refuse, run, tree
from paths import SPEECH

from vpcodec import Codec
from vpcodec.media.audio import OUTPUT_SUFFIXES, AudioWriter, save
from vpcodec.media.files import atomic_folder, atomic_output, find_files
from vpcodec.media.image import save_image
from vpcodec.model_folder import ModelError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="limits and pipes of Linux"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.from_pretrained("speech-3k", threads=1)


def clip(seconds: float = 0.18) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, (1, round(16_000 * seconds))).astype(np.float32)


def sounds(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        save(name, clip(), 16_000)


def python(code: str, *arguments: object, **options: object) -> subprocess.CompletedProcess:
    """A program of its own, as from a terminal: Ctrl-C is not ignored."""
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    return subprocess.run(
        [sys.executable, "-c", start + code, *map(str, arguments)],
        timeout=ENOUGH,
        **{"capture_output": True, "text": True, **options},
    )


# Memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 103. MiB for an array"),
        RuntimeError("BFCArena Failed to allocate memory for requested buffer of size 26214400"),
        RuntimeError("std::bad_alloc"),
    ],
    ids=["numpy", "arena", "c++"],
)
def test_a_file_that_needs_too_much_memory_fails_alone(monkeypatch, error):
    sounds("in/a.wav", "in/b.wav", "in/c.wav")
    session_run, calls = onnxruntime.InferenceSession.run, []

    def fail_once(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:  # one for each file
            raise error
        return session_run(*arguments, **options)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", fail_once)
    result = run("encode", "in", "out", check=1)
    assert tree("out") == {"a.tok", "c.tok"}
    first, last = result.err.splitlines()
    assert first.startswith("vpcodec: in/b.wav: out of memory (")
    assert last == "vpcodec: 2 done, 0 kept, 0 skipped, 1 of 3 failed"


def test_other_errors_of_onnx_runtime_are_not_taken_for_lack_of_memory(monkeypatch, codec):
    def fail(*arguments):
        raise RuntimeError("Got invalid dimensions")

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", fail)
    with pytest.raises(ModelError, match="invalid dimensions"):
        codec.encode(clip())


def test_a_single_file_that_needs_too_much_memory_is_one_line(monkeypatch):
    def fail(*arguments, **options):
        raise MemoryError

    sounds("a.wav")
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", fail)
    assert refuse("encode", "a.wav", "b.tok") == "vpcodec: a.wav: out of memory (in ONNX Runtime)"


def test_under_a_real_limit_the_other_files_are_done():
    sounds("in/a.wav", "in/c.wav")
    save_image("in/b.png", np.zeros((6000, 6000, 3), np.uint8))
    save_image("warm.png", np.zeros((8, 8, 3), np.uint8))
    code = """
import resource, sys
import vpcodec.cli
def vpcodec_(*arguments):
    sys.argv[1:] = arguments
    try:
        vpcodec.cli.main()
    except SystemExit as end:
        return end.code
assert not vpcodec_("encode", "warm.png", "warm.tok")  # loads what there is to load
assert not vpcodec_("encode", "in/a.wav", "warm.tok")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, -1))
sys.exit(vpcodec_("encode", "in", "out"))
"""
    done = python(code)
    assert done.returncode == 1, done.stderr
    assert tree("out") == {"a.tok", "c.tok"}
    (line,) = [line for line in done.stderr.splitlines() if "memory" in line]
    assert line.startswith("vpcodec: in/b.png: out of memory")


# Ctrl-C, SIGTERM and SIGHUP

IMPORT = """
import sys, os, signal

class Finder:
    def find_spec(name, path, target=None):
        if name == sys.argv[-1]:
            {action}

sys.meta_path.insert(0, Finder)
from vpcodec.cli import main
sys.argv = ["vpcodec", "encode", "a.wav", "b.tok"]
main()
"""
ACTIONS = {
    "plainly": "signal.raise_signal(signal.SIGINT)",
    "as another exception": """
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ImportError("initialization failed") from None""",
    "where nothing can be raised": """
            class Dying:
                def __del__(self):
                    signal.raise_signal(signal.SIGINT)
            Dying()""",
}


@pytest.mark.parametrize("way", ACTIONS)
@pytest.mark.parametrize(
    "module", ["vpcodec.cli.app", "typer", "numpy", "soundfile", "vpcodec.codec", "onnxruntime"]
)
def test_ctrl_c_in_an_import_is_silent(module, way):
    sounds("a.wav")
    code = IMPORT.format(action=ACTIONS[way]).replace("sys.argv[-1]", repr(module))
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    assert tree() == {"a.wav"}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("way", ACTIONS)
def test_other_signals_in_an_import_are_silent(name, way):
    sounds("a.wav")
    action = ACTIONS[way].replace("SIGINT", name)
    code = IMPORT.format(action=action).replace("sys.argv[-1]", "'onnxruntime'")
    done = python("signal.signal(signal.SIGHUP, signal.SIG_DFL)\n" + code)
    assert (done.returncode, done.stdout, done.stderr) == (128 + getattr(signal, name), "", "")
    assert tree() == {"a.wav"}


def test_a_signal_that_is_ignored_stays_so():
    """As nohup does."""
    sounds("a.wav")
    code = IMPORT.format(action=ACTIONS["plainly"].replace("SIGINT", "SIGHUP"))
    code = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + code
    done = python(code.replace("sys.argv[-1]", "'onnxruntime'"))
    assert done.returncode == 0
    assert tree() == {"a.wav", "b.tok"}


def test_nothing_that_takes_time_is_imported_before_ctrl_c_is_ours():
    """All but a few small modules of the standard library would be time without a handler."""
    code = """
import _thread, contextlib, errno, os, signal, sys, time, typing
before = set(sys.modules)
import vpcodec.cli
print(*(set(sys.modules) - before))
"""
    assert set(python(code).stdout.split()) <= {
        *("vpcodec", "vpcodec.cli", "vpcodec.terminal", "__future__"),
    }


def test_the_handler_is_the_caller_s_again_afterwards():
    def handlers() -> list[object]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        return [*map(signal.getsignal, numbers), sys.unraisablehook]

    before = handlers()
    run("--version")
    assert handlers() == before


# Disks


@contextmanager
def full_disk(size: int = 8192) -> Iterator[None]:
    """No file can grow beyond so many bytes: the system refuses as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("suffix", sorted(OUTPUT_SUFFIXES))
@pytest.mark.parametrize("blocks", [1, 100])
def test_what_the_system_says_is_told_for_every_format(suffix, blocks):
    samples = clip(10.0)
    with pytest.raises(ValueError, match=f"^out{suffix}: File too large$"):
        with full_disk():
            with AudioWriter(f"out{suffix}", sample_rate=16_000, channels=1) as writer:
                for part in np.array_split(samples, blocks, axis=1):
                    writer.write(part)
    assert tree() == set()


def test_a_full_disk_is_one_line_that_names_the_output():
    run("encode", SPEECH, "a.tok")
    with full_disk(1000):
        line = refuse("encode", SPEECH, "b.tok")
    assert line.endswith("b.tok: File too large")
    for name in ("b.wav", "b.flac"):
        with full_disk():
            assert refuse("decode", "a.tok", name) == f"vpcodec: {name}: File too large"


@pytest.mark.parametrize(
    "arguments",
    [("encode", "a.wav", "-"), ("decode", "a.tok", "-"), ("info", "a.tok"), ("--version",)],
    ids=lambda arguments: arguments[0],
)
def test_a_full_stdout_is_named(arguments):
    sounds("a.wav")
    run("encode", "a.wav", "a.tok")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*MODULE, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=ENOUGH
        )
    assert done.returncode == 2
    assert done.stderr == "vpcodec: stdout: No space left on device\n"


def test_the_first_error_is_told_not_that_of_the_clean_up(monkeypatch):
    def refuse_(path, *arguments, **options):
        raise PermissionError(errno.EPERM, "Operation not permitted", path)

    with full_disk():
        with pytest.raises(OSError, match="File too large") as caught:
            with atomic_output("out") as file:
                monkeypatch.setattr(os, "unlink", refuse_)
                file.write(bytes(10_000))
                file.flush()
    assert caught.value.filename == "out"


def test_an_error_inside_is_told_though_what_is_written_cannot_be_closed():
    with full_disk(), pytest.raises(ZeroDivisionError):
        with atomic_output("out") as file:
            file.write(bytes(100))
            file.flush()
            file.write(bytes(8100))  # stays in the buffer until the file is closed
            raise ZeroDivisionError
    assert tree() == set()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EPERM, errno.ENOENT, errno.EIO])
@pytest.mark.parametrize("when", ["open", "replace"])
def test_errors_of_the_hidden_file_name_the_output(monkeypatch, code, when):
    sounds("a.wav")

    def fail(first, *others, **options):
        if ".tmp" in str(first):
            raise OSError(code, os.strerror(code), str(first), None, *map(str, others[:1]))
        return original(first, *others, **options)

    import builtins

    module = os if when == "replace" else builtins
    original = getattr(module, when)
    monkeypatch.setattr(module, when, fail)
    assert refuse("encode", "a.wav", "b.tok") == f"vpcodec: b.tok: {os.strerror(code)}"


def test_a_name_that_is_too_long_is_the_one_that_was_given():
    sounds("a.wav")
    name = "x" * 300 + ".tok"
    assert refuse("encode", "a.wav", name) == f"vpcodec: {name}: File name too long"


def test_a_folder_that_cannot_be_made_is_named():
    Path("file").touch()
    with pytest.raises(OSError) as caught:
        with atomic_folder(Path("file/model")):
            raise AssertionError
    assert ".model" not in str(caught.value) and "file" in str(caught.value)


def test_a_full_temporary_folder_is_named():
    """Not what came through the pipe, nor the output."""
    with full_disk():
        result = run(
            "encode", "-", "out.tok", stdin=b"Creative Voice File" + bytes(20_000), check=2
        )
    line = f"stdin: File too large in the temporary folder {tempfile.gettempdir()}"
    assert result.err == f"vpcodec: {line}\n"
    assert tree() == set()


def test_the_file_of_score_lines_is_named():
    sounds("a.wav")
    with full_disk(1):
        command = ["score", "a.wav", "a.wav", "--metrics", "si_sdr", "--jsonl", "./x.jsonl"]
        result = run(*command, check=2)
    assert result.err == "vpcodec: x.jsonl: File too large\n"


# Modes


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_a_file_that_is_replaced_keeps_its_mode(mode):
    sounds("a.wav")
    before = os.umask(0o022)
    try:
        run("encode", "a.wav", "out.tok")
        assert stat.S_IMODE(os.stat("out.tok").st_mode) == 0o644
        os.chmod("out.tok", mode)
        Path("link.tok").symlink_to("out.tok")
        run("encode", "a.wav", "link.tok")
        assert stat.S_IMODE(os.stat("out.tok").st_mode) == mode
        os.umask(0o077)
        run("decode", "out.tok", "b.wav")
        assert stat.S_IMODE(os.stat("b.wav").st_mode) == 0o600
    finally:
        os.umask(before)


# What a killed run leaves


def test_what_a_killed_run_left_is_removed_by_the_next():
    with subprocess.Popen([*MODULE, "encode", "-", "out.tok"], stdin=subprocess.PIPE) as process:
        process.stdin.write(SPEECH.read_bytes()[:50_000])
        process.stdin.flush()
        deadline = time.monotonic() + ENOUGH
        while not list(Path().glob(".*.tmp")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
    assert len(tree()) == 1
    run("encode", SPEECH, "other.tok")
    assert len(tree()) == 2  # of another name
    run("encode", SPEECH, "out.tok")
    assert tree() == {"other.tok", "out.tok"}


def test_what_is_being_written_is_left_alone():
    with atomic_output("out") as first:
        first.write(b"first")
        with atomic_output("out") as second:
            second.write(b"second")
        assert Path("out").read_bytes() == b"second"
    assert Path("out").read_bytes() == b"first"
    assert tree() == {"out"}


def test_what_another_process_writes_is_left_alone():
    code = """
import sys
from vpcodec.media.files import atomic_output
with atomic_output("out") as file:
    file.write(b"other")
    print(flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with atomic_output("out") as file:
            file.write(b"ours")
        assert len(tree()) == 2 and Path("out").read_bytes() == b"ours"
        other.stdin.close()
        assert other.wait(ENOUGH) == 0
    assert tree() == {"out"} and Path("out").read_bytes() == b"other"


def test_links_in_the_place_of_hidden_files_are_not_followed():
    Path("precious").write_bytes(b"precious")
    with atomic_output("out") as file:
        hidden = Path(file.name).name
    Path(hidden).symlink_to("precious")
    with atomic_output("out") as file:
        file.write(b"new")
    assert Path("precious").read_bytes() == b"precious" and Path("out").read_bytes() == b"new"


WRITING = """
import sys
from pathlib import Path
from vpcodec.media.files import atomic_folder
with atomic_folder(Path("model"), force=True) as folder:
    (folder / "other").touch()
    print(flush=True)
    sys.stdin.read()
"""


@contextmanager
def writing_a_folder() -> Iterator[subprocess.Popen]:
    """Another process in the middle of writing the folder `model`."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", WRITING], **pipes) as process:
        process.stdout.readline()
        yield process


def write_folder() -> None:
    with atomic_folder(Path("model"), force=True) as folder:
        (folder / "ours").touch()


def unfinished() -> list[Path]:
    return list(Path().glob(".*.tmp"))


def test_a_folder_that_a_killed_run_left_is_removed_by_the_next():
    with writing_a_folder() as process:
        process.kill()
    with atomic_folder(Path("another")):
        pass
    assert len(unfinished()) == 1  # of another name
    write_folder()
    assert tree() == {"another", "model", "model/ours"}


def test_folders_of_processes_that_were_killed_together_are_removed():
    with writing_a_folder() as first, writing_a_folder() as second:
        first.kill()
        second.kill()
    assert len(unfinished()) == 2
    write_folder()
    assert tree() == {"model", "model/ours"}


def test_a_folder_that_another_process_writes_is_left_alone():
    with writing_a_folder() as process:
        write_folder()
        assert len(unfinished()) == 1
        process.stdin.close()
        assert process.wait(ENOUGH) == 1  # `model` is not empty any more and is not replaced
    assert tree() == {"model", "model/ours"}


def test_a_folder_that_a_killed_run_had_moved_away_is_put_back():
    code = """
import os, signal
from pathlib import Path
from vpcodec.media.files import atomic_folder
rename = os.rename
def rename_once(*names):
    rename(*names)
    os.kill(os.getpid(), signal.SIGKILL)
os.rename = rename_once
with atomic_folder(Path("model"), force=True, mark="ours") as folder:
    (folder / "other").touch()
"""
    write_folder()
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert not Path("model").exists()
    with pytest.raises(FileExistsError, match="model: exists"), atomic_folder(Path("model")):
        raise AssertionError
    assert tree() == {"model", "model/ours"}


# Folders


def odd_files(suffix: str) -> list[str]:
    """What is no file, in the folder `in`; names relative to it."""
    os.mkfifo(f"in/pipe{suffix}")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"in/socket{suffix}")
    Path(f"in/loop{suffix}").symlink_to(f"loop{suffix}")
    Path(f"in/zero{suffix}").symlink_to("/dev/zero")
    return sorted(f"{name}{suffix}" for name in ("pipe", "socket", "loop", "zero"))


def test_what_is_no_file_is_skipped_and_not_opened():
    sounds("in/a.wav", "elsewhere/b.wav")
    Path("in/link.wav").symlink_to(Path("elsewhere/b.wav").resolve())
    odd = odd_files(".wav")
    done = subprocess.run(
        [*MODULE, "encode", "in", "out"], capture_output=True, text=True, timeout=ENOUGH
    )
    assert done.returncode == 0
    assert tree("out") == {"a.tok", "link.tok"}
    names = ", ".join(f"in/{x} (not a regular file)" for x in odd)
    named, counted = [line for line in done.stderr.splitlines() if "skipped" in line]
    assert named == f"vpcodec: {len(odd)} skipped: {names}"  # once
    assert counted == f"vpcodec: 2 done, 0 kept, {len(odd)} skipped, 0 failed"


def test_what_is_no_token_file_is_skipped_and_not_opened():
    sounds("a.wav")
    Path("in").mkdir()
    run("encode", "a.wav", "in/a.tok")
    odd = odd_files(".tok")
    done = subprocess.run(
        [*MODULE, "decode", "in", "out"], capture_output=True, text=True, timeout=ENOUGH
    )
    assert done.returncode == 0
    assert tree("out") == {"a.wav"}
    assert done.stderr.count("(not a regular file)") == len(odd)
    assert f"1 done, 0 kept, {len(odd)} skipped, 0 failed" in done.stderr


def test_a_link_to_nothing_is_a_file_that_is_missing():
    sounds("in/a.wav")
    Path("in/gone.wav").symlink_to("nothing")
    result = run("encode", "in", "out", check=1)
    assert "in/gone.wav: No such file or directory" in result.err
    assert find_files("in", (".wav",)) == [Path("a.wav"), Path("gone.wav")]


# Threads


def test_a_stream_is_for_one_thread_at_a_time(monkeypatch, codec):
    samples = clip(0.5)
    expected = codec.encode(samples)
    inside, leave = threading.Event(), threading.Event()
    encode = codec.backend.encode

    def slow(*arguments):
        inside.set()
        assert leave.wait(ENOUGH)
        return encode(*arguments)

    monkeypatch.setattr(codec.backend, "encode", slow)
    stream, found = codec.encoder_stream(), []
    thread = threading.Thread(target=lambda: found.append(stream.push(samples)))
    thread.start()
    assert inside.wait(ENOUGH)
    for method in (lambda: stream.push(samples), stream.flush):
        with pytest.raises(RuntimeError, match="EncoderStream is in use by another thread"):
            method()
    leave.set()
    thread.join()
    found.append(stream.flush())
    assert np.array_equal(np.concatenate(found, 1), expected)


def test_threads_share_a_codec(codec):
    clips = [clip(0.3) * (i + 1) / 8 for i in range(8)]
    expected = [codec.encode(x) for x in clips]
    found: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: codec.encode(clips[i])}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[i], expected[i]) for i in range(8))


def test_the_number_of_threads_changes_no_token_and_no_sample_by_more_than_a_step(codec):
    other = Codec.from_pretrained("speech-3k", threads=3)
    samples = clip(3.0)
    tokens = codec.encode(samples)
    assert np.array_equal(other.encode(samples), tokens)
    one, three = (np.rint(x.decode(tokens) * 32768.0) for x in (codec, other))
    assert np.abs(one - three).max() <= 1


@pytest.mark.parametrize("work", ["encode(samples, 44_100)", "decode(tokens)"])
def test_a_daemon_thread_does_not_abort_the_exit(work):
    code = f"""
import threading
import numpy as np
from vpcodec import Codec
codec = Codec.from_pretrained("speech-3k", threads=1)
samples = np.zeros(44_100, np.float32)
tokens = codec.encode(samples, 44_100)
begun = threading.Barrier(4)
def work():
    begun.wait()
    while True:
        codec.{work}
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
begun.wait()
"""
    for _ in range(3):
        done = python(code)
        assert (done.returncode, done.stderr) == (0, "")
