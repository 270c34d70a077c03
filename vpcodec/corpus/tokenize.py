"""From inputs to a corpus: plan, run what is not done, and say what there is."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..codec import AudioCodec
from ..media.audio import AudioError
from ..media.files import atomic_output
from ..records import smallest_dtype
from ..usage import CodebookUsage
from .inputs import CorpusError, Opener, Recording, list_recordings
from .plan import MANIFEST, QUARANTINE, SUCCESS, Plan, Settings, make_plan, open_plan
from .shards import read_shard

SAMPLED = 64  # recordings whose lengths are looked up for an estimate
TRIED_SECONDS = 10.0  # of audio that is encoded for an estimate
COUNTED = ("files", "bad", "records", "tokens", "seconds")  # in reports


@dataclass
class Totals:
    """How far the work is.

    Attributes:
        shards, n_shards: done, and all.
        kept: shards that were done before.
        files, n_files: recordings done, and all.
        bad: recordings that could not be tokenised.
        records, tokens, seconds: in the corpus so far.
        new_seconds: of audio, tokenised by this run.
        elapsed: seconds that this run took.
        left_out: recordings of earlier runs that are not among the inputs any more; they stay.
    """

    n_shards: int
    n_files: int
    shards: int = 0
    kept: int = 0
    files: int = 0
    bad: int = 0
    records: int = 0
    tokens: int = 0
    seconds: float = 0.0
    new_seconds: float = 0.0
    elapsed: float = 0.0
    left_out: int = 0
    _began: float = field(default_factory=time.monotonic, repr=False)

    @property
    def speed(self) -> float:
        """Times real time."""
        return self.new_seconds / self.elapsed if self.elapsed else 0.0

    def add(self, report: dict[str, Any], *, new: bool) -> None:
        """Count a shard that is done."""
        self.shards += 1
        for name in COUNTED:
            setattr(self, name, getattr(self, name) + report[name])
        if new:
            self.new_seconds += report["seconds"]
        else:
            self.kept += 1
        self.elapsed = time.monotonic() - self._began

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {key: value for key, value in asdict(self).items() if not key.startswith("_")}
        return found | {"hours": self.seconds / 3600, "speed": self.speed}


def tokenize(
    inputs: Iterable[str],
    folder: str | os.PathLike[str],
    *,
    model: str = "speech-3k",
    format: str = "parquet",
    shard_mb: float = 256,
    mono: bool = False,
    max_seconds: float | None = None,
    cut: str = "silence",
    jobs: int | None = None,
    address: str | None = None,
    gpus: int = 0,
    progress: Callable[[Totals], None] | None = None,
) -> Totals:
    """Tokenise recordings into a corpus, or go on with one; needs the extra `corpus`.

    What is written is a function of the inputs, the model and the settings: not of timing, the
    number of workers, or interruptions. Repeat an interrupted call to resume it.

    Args:
        inputs: audio files, folders, globs, manifests (.tsv, .jsonl, Lhotse cuts), tars of
            WebDataset, Parquet tables with an audio column.
        folder: of the corpus.
        model: name or folder of an audio model.
        format: "parquet", "webdataset" or "lhotse".
        shard_mb: megabytes of recordings per shard, about.
        mono: mix channels down to one.
        max_seconds: cut longer recordings; None: keep them whole.
        cut: "silence": at the quietest place in the second half of max_seconds; "exact".
        jobs: worker processes; None: one per CPU.
        address: of a Ray cluster; None: start one here.
        gpus: GPU workers instead.
        progress: called after each shard.

    Returns:
        The totals; recordings that failed are in quarantine.jsonl.

    Raises:
        CorpusError: bad inputs or settings, or Ray cannot be used.
        ModelError: a model that cannot be used.
        OSError: the folder cannot be written.
    """
    codec = AudioCodec.from_pretrained(model, threads=1)
    settings = Settings(
        model=os.path.abspath(model) if os.path.isdir(model) else model,
        space=codec.space.hex(),
        format=format,
        shard_bytes=round(shard_mb * 10**6),
        mono=mono,
        max_seconds=max_seconds,
        cut=cut,
    )
    folder = Path(folder).absolute()
    plan, shards = make_plan(folder, settings, list_recordings(inputs))
    totals = Totals(plan.n_shards, sum(map(len, shards)), left_out=plan.left_out)
    del shards
    reports: dict[int, dict[str, Any]] = {}
    missing = []
    for shard in range(plan.n_shards):
        report = plan.report(shard)
        if report is None:
            missing.append(shard)
        else:
            totals.add(report, new=False)
    if progress:
        progress(totals)

    def count(report: dict[str, Any]) -> None:
        if report["shard"] in reports:
            return
        reports[report["shard"]] = {}
        totals.add(report, new=True)
        if progress:
            progress(totals)

    if missing:
        from .engine import run_shards

        (folder / SUCCESS).unlink(missing_ok=True)
        run_shards(plan, missing, jobs=jobs, address=address, gpus=gpus, on_report=count)
    _finish(plan, codec)
    return totals


def _finish(plan: Plan, codec: AudioCodec) -> None:
    """Write the manifest, the quarantine and the mark of success."""
    totals: dict[str, Any] = dict.fromkeys(COUNTED, 0)
    shards = []
    with atomic_output(plan.folder / QUARANTINE) as file:
        for shard in range(plan.n_shards):
            report = plan.report(shard)
            if report is None:
                raise CorpusError(f"{plan.report_file(shard)}: gone; repeat the command")
            for failure in report["failed"]:
                file.write(json.dumps(failure).encode() + b"\n")
            for name in COUNTED:
                totals[name] += report[name]
            files = [str(path.relative_to(plan.folder)) for path in plan.data_files(shard)]
            about = {"files": files, "bytes": report["bytes"], "sha256": report["sha256"]}
            shards.append(about | {"records": report["records"], "tokens": report["tokens"]})
    manifest = {
        "format": plan.settings.format,
        "settings": asdict(plan.settings),
        "model": codec.name,
        "fingerprint": codec.space.hex(),
        "codebook_size": codec.codebook_size,
        "token_levels": codec.token_levels,
        "sample_rate": codec.sample_rate,
        "hop_length": codec.hop_length,
        "dtype": smallest_dtype(codec.codebook_size).name,
        "totals": totals,
        "shards": shards,
    }
    with atomic_output(plan.folder / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")
    with atomic_output(plan.folder / SUCCESS):
        pass


def estimate(
    inputs: Iterable[str], folder: str | os.PathLike[str], *, jobs: int = 1, **options: Any
) -> dict[str, Any]:
    """What `tokenize` would do, from the sizes of all recordings and the lengths of a few.

    Args:
        inputs: as for `tokenize`.
        folder: as for `tokenize`; nothing is written.
        jobs: worker processes.
        options: as for `tokenize`.

    Returns:
        `files`, `shards`, `bytes` of recordings, and about how many `hours`, `tokens` and
        `output_bytes` these are, and `seconds` of work.

    Raises:
        CorpusError, ModelError: as `tokenize`.
    """
    model = options.pop("model", "speech-3k")
    shard_bytes = round(options.pop("shard_mb", 256) * 10**6)
    codec = AudioCodec.from_pretrained(model, threads=1)
    settings = Settings(model=model, space=codec.space.hex(), shard_bytes=shard_bytes, **options)
    _, shards = make_plan(folder, settings, list_recordings(inputs), write=False)
    recordings = [recording for shard in shards for recording in shard]
    n_bytes = sum(recording.n_bytes for recording in recordings)
    step = max(1, len(recordings) // SAMPLED)
    seconds, channels, sampled = _lengths(recordings[::step])
    total = seconds / sampled * n_bytes if sampled else 0.0
    tokens = total * codec.frame_rate * (1 if settings.mono else channels)
    began = time.perf_counter()
    codec.encode(np.zeros(round(TRIED_SECONDS * codec.sample_rate), np.float32))
    speed = TRIED_SECONDS / (time.perf_counter() - began)
    return {
        "files": len(recordings),
        "shards": len(shards),
        "bytes": n_bytes,
        "hours": total / 3600,
        "tokens": round(tokens),
        "output_bytes": round(tokens * smallest_dtype(codec.codebook_size).itemsize),
        "seconds": total * (1 if settings.mono else channels) / speed / jobs,
    }


def _lengths(recordings: list[Recording]) -> tuple[float, float, int]:
    """Seconds of some recordings, their mean number of channels, and their bytes."""
    seconds, channels, n_bytes, n = 0.0, 0, 0, 0
    opener = Opener()
    for recording in recordings:
        try:
            with opener.open(recording) as reader:
                length = recording.seconds
                if length is None:
                    n_samples = reader.n_samples
                    if n_samples is None:
                        n_samples = sum(block.shape[1] for block in reader.blocks(2**16))
                    length = max(0.0, n_samples / reader.sample_rate - recording.offset)
                channels += reader.channels
        except (AudioError, CorpusError, OSError):
            continue
        seconds, n_bytes, n = seconds + length, n_bytes + recording.n_bytes, n + 1
    return seconds, channels / n if n else 1.0, n_bytes


def describe(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Facts about a corpus: counts, hours, entropy, use of the codebook, duplicates.

    Raises:
        CorpusError: the folder is none.
        RecordError: a shard is damaged.
    """
    import hashlib

    plan = open_plan(folder)
    done = [shard for shard in range(plan.n_shards) if plan.report(shard) is not None]
    totals: dict[str, Any] = dict.fromkeys(COUNTED, 0)
    for shard in done:
        report = plan.report(shard) or {}
        for name in COUNTED:
            totals[name] += report[name]
    usage: CodebookUsage | None = None
    seen: set[bytes] = set()
    duplicates = 0
    models: set[str] = set()
    for record in _records_of(plan, done):
        header = record.header
        usage = usage or CodebookUsage(header.codebook_size)
        usage.update(record.tokens)
        models.add(header.model)
        digest = hashlib.blake2b(record.tokens.tobytes(), digest_size=16).digest()
        duplicates += record.tokens.size > 0 and digest in seen
        seen.add(digest)
    return {
        "corpus": str(folder),
        "format": plan.settings.format,
        "model": ", ".join(sorted(models)) or plan.settings.model,
        "fingerprint": plan.settings.space,
        "complete": len(done) == plan.n_shards and (plan.folder / SUCCESS).exists(),
        "shards": plan.n_shards,
        "shards_done": len(done),
        **totals,
        "hours": totals["seconds"] / 3600,
        "codebook_size": usage.codebook_size if usage else None,
        "entropy": usage.entropy if usage and usage.tokens else None,
        "codes_used": usage.used if usage else None,
        "cvu": usage.cvu if usage and usage.tokens else None,
        "duplicates": duplicates,
    }


def _records_of(plan: Plan, shards: list[int]) -> Iterator[Any]:
    for shard in shards:
        yield from read_shard(plan, shard)
