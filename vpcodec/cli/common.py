"""What the commands share: naming outputs, processing many items, progress, errors."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ..media.files import find_others, is_device
from ..progress import Progress
from ..terminal import escape, plain_stderr
from .errors import USER_ERRORS, MissingExtra, UsageError, explain, one_line
from .modalities import Modality, Result, summary

_STDIN = ("/dev/stdin", "/dev/fd/0")
MAX_NAMED = 20  # skipped files that are named; a JSON document names all
SHOW_AFTER = 2.0  # seconds before a progress bar appears


def need_extra(extra: str, *packages: str) -> None:
    """Raise MissingExtra if packages of an extra are not installed."""
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"this command needs {', '.join(missing)}; install it with: "
            f"pip install 'vpcodec[{extra}]'"
        )


@dataclass(frozen=True, order=True)
class Item:
    """One file to process; "-" is a pipe."""

    source: str
    target: str


@dataclass(frozen=True)
class Failure:
    """An item that failed, and the line that says why."""

    item: Item
    text: str


def plan(
    inputs: list[str],
    output: str | None,
    *,
    find: Callable[[Path], Iterable[Path]],
    wanted: Callable[[Path], bool],
    input_suffixes: Collection[str],
    suffix: Callable[[Path], str],
    output_suffixes: Collection[str],
    force: bool,
) -> tuple[list[Item], list[Item], bool]:
    """Pair every input with its output.

    The last of several inputs is the output if it is "-", a device or a named pipe, has an output
    suffix, or is or looks like a folder. Without an output, results go beside their inputs. An
    output that the user named is replaced; one whose name is derived is kept unless `force`.

    Args:
        inputs: files, folders or "-", which other names of stdin stand for.
        output: a file, a folder, "-", or None.
        find: lists the files of a folder.
        wanted: which of them to take. The others still count where outputs would have the same
            name, so that names do not depend on what is wanted.
        input_suffixes: of files that can be inputs.
        suffix: the suffix of the output for an input.
        output_suffixes: of files that can be outputs.
        force: replace existing outputs with derived names.

    Returns:
        The items to process, those whose outputs exist already, and whether it is a single file.

    Raises:
        UsageError: empty folder, two inputs for one output, output equal to input.
    """
    inputs = ["-" if name in _STDIN else name for name in inputs]
    repeated = [name for name in inputs[:-1] if _same(name, inputs[-1])]
    if output is None and repeated:
        raise UsageError(f"{inputs[-1]}: input and output are the same file")
    if (
        output is None
        and len(inputs) > 1
        and _is_output(inputs[-1], input_suffixes, output_suffixes)
    ):
        *inputs, output = inputs
    single = len(inputs) == 1 and not os.path.isdir(inputs[0])
    if single and output is None and (inputs[0] == "-" or inputs[0].startswith("/dev/fd/")):
        output = "-"
    if single and output is not None and not is_folder(output):
        known_suffix = Path(output).suffix.lower() in output_suffixes
        if output != "-" and not known_suffix and not is_device(output):
            known = " ".join(sorted(output_suffixes))
            raise UsageError(f"{output}: the suffix of the output must be one of {known}")
        items = [Item(inputs[0], output)]
        derived = False
    else:
        if output == "-":
            raise UsageError("several files cannot go to one pipe")
        if output is not None and os.path.exists(output) and not os.path.isdir(output):
            raise UsageError(f"{output}: several inputs need a folder as output")
        items = list(_derive(inputs, output, find, wanted, suffix))
        derived = True
    check_items(items)
    if not derived or force:
        return items, [], single
    kept = {item for item in items if os.path.exists(item.target)}
    return [item for item in items if item not in kept], sorted(kept), single


def skipped(inputs: list[str], items: list[Item], kept: list[Item]) -> list[str]:
    """The files in folders among the inputs that are neither items nor results; none hidden."""
    sources = {item.source for item in (*items, *kept)}
    results = {os.path.realpath(item.target) for item in (*items, *kept)}
    left = []
    for name in inputs:
        folder = Path(name)
        if not any(folder in Path(source).parents for source in sources):
            continue  # no folder, or one for results
        for path in find_others(folder):
            file = folder / path
            if str(file) not in sources and os.path.realpath(file) not in results:
                left.append(str(file))
    return sorted(set(left))


def _same(a: str, b: str) -> bool:
    return a != "-" and os.path.realpath(a) == os.path.realpath(b)


def is_folder(path: str) -> bool:
    """Whether a path is that of a folder, or looks like one."""
    return os.path.isdir(path) or path.endswith(os.sep)


def _is_output(
    last: str, input_suffixes: Collection[str], output_suffixes: Collection[str]
) -> bool:
    suffix = Path(last).suffix.lower()
    if last == "-" or is_folder(last) or suffix in output_suffixes or is_device(last):
        return True
    return not os.path.exists(last) and suffix not in input_suffixes


def _derive(
    inputs: list[str],
    output: str | None,
    find: Callable[[Path], Iterable[Path]],
    wanted: Callable[[Path], bool],
    suffix: Callable[[Path], str],
) -> Iterable[Item]:
    places = []  # source, result but for its suffix, that suffix, whether it is wanted
    for name in inputs:
        if name == "-":
            raise UsageError("a pipe cannot be one of several inputs, or be written to a folder")
        path = Path(name)
        if path.is_dir():
            base = Path(output) if output is not None else path
            there = [(path / name, base / name) for name in find(path)]
            found = [(file, place, suffix(file), wanted(file)) for file, place in there]
            if not any(take for *_, take in found):
                raise UsageError(f"{path}: no files found in this folder")
            places += found
        else:
            base = Path(output) if output is not None else path.parent
            places.append((path, base / path.name, suffix(path), True))
    counts = Counter(place.with_suffix(end) for _, place, end, _ in places)
    for source, place, end, take in places:
        target = place.with_suffix(end)
        if counts[target] > 1:  # a.wav and a.png become a.wav.tok and a.png.tok
            target = Path(f"{place}{end}")
        if take:
            yield Item(str(source), str(target))


def check_items(items: list[Item]) -> None:
    """Raise UsageError where an input is its own output, or two inputs have the same."""
    seen: dict[str, str] = {}
    for item in items:
        if "-" in (item.source, item.target):
            continue
        if _same(item.source, item.target):
            raise UsageError(f"{item.source}: input and output are the same file")
        other = seen.setdefault(os.path.realpath(item.target), item.source)
        if other != item.source:
            raise UsageError(
                f"{item.target}: both {other} and {item.source} would be written there"
            )


class ProgressBar:
    """A bar for all items, on stderr if that is a terminal and the work takes a while."""

    def __init__(self, label: str, n_items: int) -> None:
        self._label = label
        self._n_items = n_items
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._bar: Any = None
        self._task: Any = None
        self._items_done = 0
        self._share: dict[str, float] = {}

    def report(self, name: str, done: int, total: int | None) -> None:
        """Item `name` has processed `done` of `total` units."""
        with self._lock:
            self._share[name] = done / total if total else 0.0
            self._show()

    def finish(self, name: str) -> None:
        """Item `name` is done."""
        with self._lock:
            self._share.pop(name, None)
            self._items_done += 1
            self._show()

    def _show(self) -> None:
        if not sys.stderr.isatty() or time.monotonic() - self._began < SHOW_AFTER:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._bar = Bar(console=Console(file=plain_stderr()), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._n_items)
        self._bar.update(self._task, completed=self._items_done + sum(self._share.values()))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """A callback that shows what is going on, on stderr if that is a terminal."""
    with ExitStack() as stack:
        spinner: Any = None

        def note(text: str) -> None:
            nonlocal spinner
            if not sys.stderr.isatty():
                return
            if spinner is None:
                from rich.console import Console

                spinner = stack.enter_context(Console(file=plain_stderr()).status(escape(text)))
            spinner.update(escape(text))

        yield note


class _Stopped(BaseException):
    """Raised inside a worker thread when the whole command ends."""


def run(
    items: list[Item],
    kept: list[Item],
    work: Callable[[Item, Progress], tuple[Modality, Any]],
    *,
    label: str,
    jobs: int,
    fail_fast: bool,
    as_json: bool,
    skipped: list[str] | None = None,
) -> None:
    """Process items, `jobs` at a time; summarise on stderr or, with `as_json`, print a document.

    `skipped` are files in the same folders that are nothing to process; they are named.

    `work` takes an item and a progress callback, and returns its modality and statistics.

    Exits with 1 when some of several items failed (each is named on stderr); the failure of a
    single item is raised.
    """
    skipped = skipped or []
    results: list[Result] = []
    failures: list[Failure] = []
    started = time.perf_counter()
    stop = threading.Event()
    workers = {threading.current_thread()}
    bar = ProgressBar(label, len(items))

    def one(item: Item) -> Result | Failure | None:
        """The result of an item, or why there is none; None if it was not tried."""
        workers.add(threading.current_thread())
        if stop.is_set():
            return None

        def progress(stage: str, done: int, total: int | None) -> None:
            if stop.is_set():
                raise _Stopped
            bar.report(item.source, done, total)

        began = time.perf_counter()
        name = "stdin" if item.source == "-" else item.source
        try:
            modality, stats = work(item, progress)
        except BrokenPipeError:
            raise
        except (*USER_ERRORS, ValueError) as error:
            if fail_fast:
                stop.set()
            text = explain(error)
            target = "stdout:" if item.target == "-" else item.target
            named = one_line(name) in text or one_line(target) in text
            return Failure(item, text if named else f"{one_line(name)}: {text}")
        finally:
            bar.finish(item.source)
        result = modality.result(stats, time.perf_counter() - began)
        place = {"source": item.source, "target": item.target, "kind": modality.name}
        return place | result | {"result_bytes": _size_of(item.target)}

    def join() -> None:  # the pool loses a thread if an interrupt arrives while it starts
        for worker in workers - {threading.current_thread()}:
            worker.join()

    with ExitStack() as stack:
        stack.callback(bar.close)
        stack.enter_context(_parents(item.target for item in items if item.target != "-"))
        stack.callback(join)
        each: Callable[..., Iterable[Any]] = map
        if jobs > 1 and len(items) > 1:
            each = stack.enter_context(ThreadPoolExecutor(jobs)).map
        try:
            for outcome in each(one, items):
                if isinstance(outcome, Failure):
                    failures.append(outcome)
                elif outcome is not None:
                    results.append(outcome)
        except BaseException:
            stop.set()
            raise
    if failures and len(items) + len(kept) + len(skipped) == 1:
        raise UsageError(failures[0].text)
    for item in kept:
        print(
            f"vpcodec: {escape(item.target)}: exists, kept (--force replaces it)", file=sys.stderr
        )
    if skipped:
        names = ", ".join(map(_described, skipped[:MAX_NAMED]))
        more = f" and {len(skipped) - MAX_NAMED} more" if len(skipped) > MAX_NAMED else ""
        print(f"vpcodec: {len(skipped)} skipped: {escape(names)}{more}", file=sys.stderr)
    for failure in failures:
        print(f"vpcodec: {failure.text}", file=sys.stderr)
    untried = len(items) - len(results) - len(failures)
    if as_json:
        document = {
            "results": results,
            "kept": [item.target for item in kept],
            "failed": [vars(failure.item) | {"error": failure.text} for failure in failures],
            "skipped": skipped,
        }
        out = sys.stderr if any(item.target == "-" for item in items) else sys.stdout
        print(json.dumps(document, indent=2), file=out)
    elif results and not failures:
        print(escape(summary(results, time.perf_counter() - started)), file=sys.stderr)
    if failures or (len(items) + len(kept) + len(skipped) > 1 and not as_json):
        of = f" of {len(items)}" if failures else ""
        rest = f", {untried} not tried" if untried else ""
        print(
            f"vpcodec: {len(results)} done, {len(kept)} kept, {len(skipped)} skipped, "
            f"{len(failures)}{of} failed{rest}",
            file=sys.stderr,
        )
    if failures:
        raise typer.Exit(1)


def _size_of(target: str) -> int | None:
    """Bytes of a file; None of a pipe."""
    return os.path.getsize(target) if os.path.isfile(target) and not is_device(target) else None


def _described(path: str) -> str:
    """A file that is skipped, with what it is if it is no regular one."""
    odd = not os.path.isfile(path) and not os.path.isdir(path)
    return f"{path} (not a regular file)" if odd else path


@contextmanager
def _parents(targets: Iterable[str]) -> Iterator[None]:
    """Create the folders of the targets; remove those that end up empty."""
    made: set[Path] = set()
    try:
        for folder, target in {Path(target).parent: target for target in targets}.items():
            made.update(path for path in (folder, *folder.parents) if not path.exists())
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                reason = f"its folder cannot be made: {error.strerror}"
                raise OSError(error.errno, reason, target) from None
        yield
    finally:
        for folder in sorted(made, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):
                folder.rmdir()


def pipe_in() -> Any:
    """Binary stdin.

    Raises:
        UsageError: it is a terminal, or closed.
    """
    if sys.stdin is None:
        raise UsageError("stdin is closed")
    if sys.stdin.isatty():
        raise UsageError("stdin is a terminal, not audio, an image or tokens")
    return sys.stdin.buffer


def pipe_out() -> Any:
    """Binary stdout.

    Raises:
        UsageError: it is a terminal, or closed.
    """
    if sys.stdout is None:
        raise UsageError("stdout is closed")
    if sys.stdout.isatty():
        raise UsageError("stdout is a terminal: binary output needs a file or a pipe")
    return sys.stdout.buffer


class CodecCache:
    """Codecs by model name, each loaded once.

    Args:
        backend: "onnx" or "torch".
        device: "cpu", "cuda" or "auto".
        threads: CPU threads per file; None: one with several jobs or a pipe, else the backend's
            choice.
        jobs: files processed in parallel.
        inputs: of the command; "-" is a pipe, whose pieces are short.
    """

    def __init__(
        self, backend: str, device: str, threads: int | None, jobs: int, inputs: list[str]
    ) -> None:
        from ..backends import BACKENDS

        if backend not in BACKENDS:
            raise UsageError(f"unknown backend {backend!r} (one of {', '.join(BACKENDS)})")
        if backend == "torch":
            need_extra("train", "torch", "safetensors")
        if threads is None and (jobs > 1 or "-" in inputs):
            threads = 1
        self._settings: dict[str, Any] = {"backend": backend, "device": device, "threads": threads}
        self._codecs: dict[str, Any] = {}
        self._lock = threading.Lock()

    def get(self, model: str) -> Any:
        from ..codec import Codec

        with self._lock:
            if model not in self._codecs:
                with status() as note:
                    self._codecs[model] = Codec.from_pretrained(model, note=note, **self._settings)
            return self._codecs[model]
