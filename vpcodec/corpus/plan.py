"""The plan of a corpus: which recordings belong to which shard, whatever runs when.

A corpus is a folder:

    plan/settings.json     how it is tokenised
    plan/00000.jsonl       the recordings of shard 0, in their order
    data/part-00000.*      their tokens
    done/00000.json        counts and failures of shard 0, and digests of its plan and data
    manifest.json, quarantine.jsonl, _SUCCESS    when all shards are done

Shards are filled in the order of the inputs, so that the plan is a function of these. Later inputs
get shards of their own. A shard is done if its last file, the one in done/, has the digest of its
plan; then it is never touched again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ..media.files import atomic_output
from .inputs import CorpusError, Recording

FORMATS = ("parquet", "webdataset", "lhotse")
CUTS = ("silence", "exact")
MAX_SHARD_FILES = 20_000
SUCCESS, MANIFEST, QUARANTINE = "_SUCCESS", "manifest.json", "quarantine.jsonl"

_SETTINGS = "settings.json"


@dataclass(frozen=True)
class Settings:
    """What decides the contents of a corpus, besides its inputs.

    Attributes:
        model: name or path for `Codec.from_pretrained`.
        space: token space of the model, hexadecimal.
        format: one of FORMATS.
        shard_bytes: of recordings in a shard, about.
        mono: whether channels are mixed down to one.
        max_seconds: longest clip; longer recordings are cut; None: they are kept whole.
        cut: where: at "silence", or "exact", after max_seconds.
    """

    model: str
    space: str
    format: str = "parquet"
    shard_bytes: int = 256 * 10**6
    mono: bool = False
    max_seconds: float | None = None
    cut: str = "silence"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise CorpusError(f"unknown format {self.format!r} (one of {', '.join(FORMATS)})")
        if self.cut not in CUTS:
            raise CorpusError(f"unknown cut {self.cut!r} (one of {', '.join(CUTS)})")
        if self.max_seconds is not None and not self.max_seconds >= 0.1:
            raise CorpusError(f"max_seconds must be at least 0.1, got {self.max_seconds}")


@dataclass(frozen=True)
class Plan:
    """The plan in a folder.

    Attributes:
        folder: of the corpus.
        settings: how it is tokenised.
        n_shards: number of shards.
        left_out: recordings of the plan that are not among the inputs any more.
    """

    folder: Path
    settings: Settings
    n_shards: int
    left_out: int = 0

    @cached_property
    def _head(self) -> bytes:
        return json.dumps(asdict(self.settings), sort_keys=True).encode()

    def recordings(self, shard: int) -> list[Recording]:
        """The recordings of a shard."""
        return _read_shard(_plan_file(self.folder, shard))

    def digest(self, shard: int) -> str:
        """Of the settings and the plan of a shard."""
        content = _plan_file(self.folder, shard).read_bytes()
        return hashlib.sha256(self._head + b"\n" + content).hexdigest()

    def data_files(self, shard: int) -> list[Path]:
        """The files with the tokens of a shard."""
        names = {
            "parquet": ["part-{:05d}.parquet"],
            "webdataset": ["part-{:05d}.tar"],
            "lhotse": ["cuts.{:05d}.jsonl.gz", "tokens.{:05d}.tar"],
        }[self.settings.format]
        return [self.folder / "data" / name.format(shard) for name in names]

    def report_file(self, shard: int) -> Path:
        """The file that is there when the shard is done."""
        return self.folder / "done" / f"{shard:05d}.json"

    def report(self, shard: int) -> dict[str, Any] | None:
        """Counts and failures of a shard; None if it is not done."""
        try:
            report = json.loads(self.report_file(shard).read_bytes())
            sizes = [path.stat().st_size for path in self.data_files(shard)]
            done = report["plan"] == self.digest(shard) and report["bytes"] == sizes
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return report if done else None


def open_plan(folder: str | os.PathLike[str]) -> Plan:
    """The plan of an existing corpus.

    Raises:
        CorpusError: the folder is none.
    """
    path = Path(folder)
    try:
        found = json.loads((path / "plan" / _SETTINGS).read_bytes())
        settings = Settings(**{field.name: found[field.name] for field in fields(Settings)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(f"{path}: not a corpus of tokens") from None
    return Plan(path, settings, len(_shard_files(path)))


def is_corpus(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is a corpus of tokens."""
    return (Path(folder) / "plan" / _SETTINGS).is_file()


def make_plan(
    folder: str | os.PathLike[str],
    settings: Settings,
    recordings: Iterable[Recording],
    *,
    write: bool = True,
) -> tuple[Plan, list[list[Recording]]]:
    """Plan a corpus, or add what is new to the plan of an existing one.

    Recordings whose files have changed stay in their shards, which are then not done any more.

    Args:
        folder: of the corpus; created if it is missing.
        settings: must be those of an existing corpus.
        recordings: all inputs.
        write: whether to write the plan, or only to make it.

    Returns:
        The plan, and the recordings of its shards.

    Raises:
        CorpusError: other settings, a key that occurs twice, or a folder with something else.
        OSError: the folder cannot be written.
    """
    path = Path(folder)
    if is_corpus(path):
        before = open_plan(path).settings
        for field in fields(Settings):
            if field.name == "model":  # the same space may have several names
                continue
            old, wanted = getattr(before, field.name), getattr(settings, field.name)
            if old != wanted:
                raise CorpusError(
                    f"{path}: made with {field.name} {old!r}, not {wanted!r}; choose another folder"
                )
        settings = before
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CorpusError(f"{path}: exists and is not a corpus of tokens")
    new: dict[str, Recording] = {}
    for recording in recordings:
        first = new.setdefault(recording.key, recording)
        if first is not recording:
            raise CorpusError(f"the key {recording.key!r} twice: {first.name} and {recording.name}")
        _check_key(recording, settings)
    old_shards = [_read_shard(file) for file in _shard_files(path)]
    shards, left_out = [], 0
    for shard in old_shards:
        left_out += sum(recording.key not in new for recording in shard)
        shards.append([new.pop(recording.key, recording) for recording in shard])
    shards += _filled(new.values(), settings.shard_bytes)
    if write:
        for name in ("plan", "data", "done"):
            (path / name).mkdir(parents=True, exist_ok=True)
        _write(path / "plan" / _SETTINGS, json.dumps(asdict(settings), indent=2) + "\n")
        for number, shard in enumerate(shards):
            if number >= len(old_shards) or shard != old_shards[number]:
                (path / SUCCESS).unlink(missing_ok=True)
                lines = "".join(recording.to_json() + "\n" for recording in shard)
                _write(_plan_file(path, number), lines)
    return Plan(path, settings, len(shards), left_out), shards


def _check_key(recording: Recording, settings: Settings) -> None:
    key = recording.key
    if not key or not key.isprintable() or key.startswith("/"):
        raise CorpusError(f"{recording.name}: the key {key!r} is no name")
    if settings.max_seconds is not None and "#" in key:
        raise CorpusError(f"{recording.name}: the key {key!r} has a #, as the keys of cuts have")


def _filled(recordings: Iterable[Recording], shard_bytes: int) -> Iterator[list[Recording]]:
    """Recordings in shards of about so many bytes."""
    shard: list[Recording] = []
    size = 0
    for recording in recordings:
        if shard and (size + recording.n_bytes > shard_bytes or len(shard) == MAX_SHARD_FILES):
            yield shard
            shard, size = [], 0
        shard.append(recording)
        size += recording.n_bytes
    if shard:
        yield shard


def _plan_file(folder: Path, shard: int) -> Path:
    return folder / "plan" / f"{shard:05d}.jsonl"


def _shard_files(folder: Path) -> list[Path]:
    """The plans of all shards: as many as follow each other."""
    found: list[Path] = []
    while (file := _plan_file(folder, len(found))).is_file():
        found.append(file)
    return found


def _read_shard(file: Path) -> list[Recording]:
    try:
        return [Recording.from_json(line) for line in file.read_text().splitlines()]
    except CorpusError as error:
        raise CorpusError(f"{file}: {error}") from None


def _write(path: Path, text: str) -> None:
    with atomic_output(path) as file:
        file.write(text.encode())
