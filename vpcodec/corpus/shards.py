"""One shard: recordings to records in a file, and the records of a file."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..codec import AudioCodec
from ..media.audio import AudioError
from ..media.files import atomic_output
from ..model_folder import ModelError
from ..records import (
    Record,
    RecordError,
    RecordFile,
    facts_of,
    read_array,
    record_of,
    write_parquet,
)
from .inputs import CorpusError, Opener, Recording
from .plan import Plan

BLOCK_SECONDS = 4.0  # of audio that is read at once
MAX_BLOCK = 2**22  # samples of all channels in such a block
QUIET_SECONDS = 0.05  # window in which silence is looked for
EARLIEST = 0.5  # of max_seconds, before which no recording is cut


class ShardError(CorpusError):
    """A shard that cannot be written, whatever the recordings are."""


class ShardTokenizer:
    """Tokenises shards of a plan, one after the other.

    Args:
        plan: of the corpus.
        codec: the model of its settings.
    """

    def __init__(self, plan: Plan, codec: AudioCodec) -> None:
        self._plan = plan
        self._codec = codec
        self._opener = Opener()

    def run(self, shard: int) -> dict[str, Any]:
        """Tokenise a shard, unless it is done.

        Returns:
            Its report: number of `files`, `bad` files and `records`, `tokens`, `seconds` of audio,
            the failures, and digests.

        Raises:
            ShardError: the result cannot be written.
        """
        if (report := self._plan.report(shard)) is not None:
            return report
        recordings = self._plan.recordings(shard)
        counts = {"files": len(recordings), "bad": 0, "records": 0, "tokens": 0, "seconds": 0.0}
        failures: list[dict[str, str]] = []

        def records() -> Iterator[Record]:
            for recording in recordings:
                try:
                    found = list(self._records(recording))
                except ModelError as error:
                    raise ShardError(str(error)) from None
                except (AudioError, OSError, CorpusError, ValueError, MemoryError) as error:
                    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
                    reason = " ".join(text.split()).removeprefix(f"{recording.name}: ")
                    failures.append(
                        {"key": recording.key, "path": recording.name, "reason": reason}
                    )
                    continue
                for record in found:
                    counts["records"] += 1
                    counts["tokens"] += record.tokens.size
                    counts["seconds"] += facts_of(record)["duration"]
                yield from found

        paths = self._plan.data_files(shard)
        try:
            WRITERS[self._plan.settings.format](paths, records())
            counts["bad"] = len(failures)
            report = {
                "shard": shard,
                "plan": self._plan.digest(shard),
                **counts,
                "bytes": [path.stat().st_size for path in paths],
                "sha256": [_digest(path) for path in paths],
                "failed": failures,
            }
            with atomic_output(self._plan.report_file(shard)) as file:
                file.write(json.dumps(report, indent=1).encode() + b"\n")
        except OSError as error:
            raise ShardError(f"{error.filename or paths[0]}: {error.strerror or error}") from None
        return report

    def _records(self, recording: Recording) -> Iterator[Record]:
        """The clips of a recording."""
        settings, codec = self._plan.settings, self._codec
        with self._opener.open(recording) as reader:
            rate = reader.sample_rate
            channels = 1 if settings.mono else reader.channels
            first = round(recording.offset * rate)
            length = None if recording.seconds is None else round(recording.seconds * rate)
            n = max(1, min(round(BLOCK_SECONDS * rate), MAX_BLOCK // reader.channels))
            audio = _span(reader.blocks(n), first, length)
            if settings.mono:
                audio = (block.mean(0, keepdims=True) for block in audio)
            start = first
            for clip in _cut(audio, rate, settings.max_seconds, settings.cut):
                stream = codec.encoder_stream(channels, sample_rate=rate)
                tokens, n_samples = [], 0
                for block in clip:
                    n_samples += block.shape[1]
                    tokens.append(stream.push(block))
                tokens.append(stream.flush())
                header = codec.token_header(
                    np.concatenate(tokens, 1), n_samples=n_samples, original_rate=rate
                )
                key = recording.key if settings.max_seconds is None else f"{recording.key}#{start}"
                yield Record(key, np.concatenate(tokens, 1), header, recording.name, start)
                start += n_samples
            if length is not None and start < first + length - rate // 100:
                raise CorpusError(
                    f"it ends {(first + length - start) / rate:.2f} s before the end of the part"
                )


def _span(
    blocks: Iterator[NDArray[np.float32]], first: int, length: int | None
) -> Iterator[NDArray[np.float32]]:
    """The blocks (C, n) of a part: from sample `first` on, `length` of them; no more are read."""
    done = 0
    for block in blocks:
        begin, end = first - done, block.shape[1]
        done += block.shape[1]
        if length is not None:
            end = min(end, first + length - (done - block.shape[1]))
        part = block[:, max(0, begin) : max(0, end)]
        if part.shape[1]:
            yield part
        if length is not None and done >= first + length:
            return


def _cut(
    blocks: Iterator[NDArray[np.float32]], rate: int, max_seconds: float | None, cut: str
) -> Iterator[Iterator[NDArray[np.float32]]]:
    """The clips of a recording, each an iterator of blocks; at least one."""
    if max_seconds is None:
        yield blocks
        return
    most = max(1, round(max_seconds * rate))
    held: list[NDArray[np.float32]] = []
    size = n_clips = 0
    for block in blocks:
        held.append(block)
        size += block.shape[1]
        while size > most:
            audio = np.concatenate(held, 1)
            end = most if cut == "exact" else _quietest(audio[:, :most], rate)
            yield iter([audio[:, :end]])
            n_clips += 1
            held, size = [audio[:, end:]], size - end
    if size or not n_clips:
        yield iter(held)


def _quietest(audio: NDArray[np.float32], rate: int) -> int:
    """Where to cut (C, n): in the middle of the quietest window of the later part, the last one."""
    n = audio.shape[1]
    window = max(1, round(QUIET_SECONDS * rate))
    begin = int(EARLIEST * n)
    if n - begin < 2 * window:
        return n
    power = np.square(audio[:, begin:], dtype=np.float64).sum(0)
    sums = np.concatenate([[0.0], np.cumsum(power)])
    energy = np.round(sums[window:] - sums[:-window], 9)  # equal silence is equally quiet
    last = len(energy) - 1 - int(np.argmin(energy[::-1]))
    return max(1, begin + last + window // 2)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------- formats


def _write_parquet(paths: list[Path], records: Iterator[Record]) -> None:
    with atomic_output(paths[0]) as file:
        write_parquet(file, records)


def _write_tar(paths: list[Path], records: Iterator[Record]) -> None:
    """For each record NAME.npy and NAME.json; dots in keys, where WebDataset cuts, are escaped."""
    with atomic_output(paths[0]) as file, _tar(file) as archive:
        for record in records:
            name = record.key.replace("%", "%25").replace(".", "%2E")
            _add(archive, f"{name}.npy", _npy(record))
            _add(archive, f"{name}.json", json.dumps(facts_of(record)).encode())


def _write_shar(paths: list[Path], records: Iterator[Record]) -> None:
    """Lhotse Shar: cuts, and a field `tokens` of arrays."""
    with (
        atomic_output(paths[0]) as lines,
        gzip.GzipFile("", "wb", fileobj=lines, mtime=0) as cuts,
        atomic_output(paths[1]) as file,
        _tar(file) as archive,
    ):
        for record in records:
            facts = facts_of(record)
            array = {"storage_type": "shar", "storage_path": "", "storage_key": ""}
            shape = {"shape": list(record.tokens.shape)}
            channels: Any = list(range(facts["channels"]))
            mono = len(channels) == 1
            cut = {
                "id": record.key,
                "start": 0.0,
                "duration": facts["duration"],
                "channel": 0 if mono else channels,
                "supervisions": [],
                "custom": facts | {"tokens": array | shape},
                "type": "MonoCut" if mono else "MultiCut",
            }
            cuts.write(json.dumps(cut).encode() + b"\n")
            _add(archive, f"{record.key}.npy", _npy(record))
            _add(archive, f"{record.key}.json", json.dumps(array | shape).encode())


WRITERS: dict[str, Callable[[list[Path], Iterator[Record]], None]] = {
    "parquet": _write_parquet,
    "webdataset": _write_tar,
    "lhotse": _write_shar,
}


def _tar(file: BinaryIO) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # of no date and nobody
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def _npy(record: Record) -> bytes:
    file = io.BytesIO()
    array = record.tokens.astype(facts_of(record)["dtype"])
    np.lib.format.write_array(file, array, allow_pickle=False)
    return file.getvalue()


def read_shard(plan: Plan, shard: int) -> Iterator[Record]:
    """The records of a shard that is done.

    Raises:
        RecordError: it is damaged.
        OSError: it cannot be read.
    """
    paths = plan.data_files(shard)
    if plan.settings.format == "parquet":
        with RecordFile(paths[0]) as file:
            yield from file
        return
    if plan.settings.format == "lhotse":
        facts = [json.loads(line)["custom"] for line in gzip.open(paths[0])]
    else:
        facts = None
    try:
        with tarfile.open(paths[-1], "r:") as archive:
            members = iter(archive)
            for number, member in enumerate(members):
                content = archive.extractfile(member)
                about = archive.extractfile(next(members))
                assert content is not None and about is not None
                found = json.loads(about.read()) if facts is None else facts[number]
                yield record_of(found, read_array(content, member.size))
    except (tarfile.TarError, StopIteration, ValueError, KeyError, IndexError) as error:
        raise RecordError(f"{paths[-1]}: {error or 'damaged'}") from None
