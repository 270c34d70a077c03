"""vpcodec tokens: token files to arrays, and back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from . import options

if TYPE_CHECKING:
    from ..records import Record


def tokens(
    inputs: list[str] = typer.Argument(
        ..., metavar="IN...", help="Token files, folders of them, or files of arrays."
    ),
    output: str = typer.Option(
        ...,
        "--output",
        "-o",
        metavar="PATH",
        help="A file of arrays (.npz, .parquet or .jsonl), or a folder for token files.",
    ),
    model: str = typer.Option(
        None,
        "--model",
        "-m",
        metavar="MODEL",
        help="The model that made the tokens, for arrays without a header and for token files that "
        "are entropy coded by a model that is not bundled.",
    ),
    force: bool = options.FORCE,
    as_json: bool = options.JSON,
) -> None:
    """Convert token files to arrays with all that their headers hold, and back.

    \b
    vpcodec tokens tokens/ -o tokens.npz
    vpcodec tokens a.tok b.tok -o tokens.parquet
    vpcodec tokens tokens.parquet -o tokens/
    """
    from ..records import SUFFIXES, write_records
    from . import common

    codec = common.CodecCache("onnx", "cpu", 1, 1, inputs).get(model) if model is not None else None
    records = _records(inputs, codec)
    if Path(output).suffix.lower() in SUFFIXES and not os.path.isdir(output):
        counted = _Counted(records)
        write_records(output, counted)
        facts = {"output": output, "records": counted.records, "tokens": counted.tokens}
    elif Path(output).suffix and not os.path.isdir(output):
        raise common.UsageError(
            f"{output}: the suffix must be one of {' '.join(SUFFIXES)}, or none for a folder"
        )
    else:
        facts = _write_files(records, Path(output), codec, force)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        typer.echo(f"{output}: {facts['records']:,} records, {facts['tokens']:,} tokens", err=True)


class _Counted:
    """Records that are counted as they pass."""

    def __init__(self, records: Iterator[Record]) -> None:
        self._found = records
        self.records = self.tokens = 0

    def __iter__(self) -> Iterator[Record]:
        for record in self._found:
            self.records += 1
            self.tokens += record.tokens.size
            yield record


def _records(inputs: list[str], codec: Any) -> Iterator[Record]:
    """The records of all inputs, one by one; each with a header.

    Raises:
        UsageError: a folder without token files, an array without header or model.
        TokenFileError, RecordError: a damaged file.
    """
    from ..codec import read_tokens
    from ..records import Record, RecordFile
    from ..tokenfile import TokenFileError
    from . import arrays, common, modalities

    coder = codec.coder if codec else None
    for name in inputs:
        if arrays.is_array(name):
            with RecordFile(name) as file:
                for record in file:
                    if record.header is None and codec is None:
                        raise common.UsageError(
                            f"{name}: an array does not say which model made it: use --model"
                        )
                    yield record if record.header else _with_header(name, record, codec)
            continue
        folder = Path(name)
        places = [(name, folder.stem)]
        if folder.is_dir():
            found = modalities.find_media(folder, (".tok",))
            if not found:
                raise common.UsageError(f"{name}: no files found in this folder")
            places = [(str(folder / x), x.with_suffix("").as_posix()) for x in found]
        for path, key in places:
            try:
                found_tokens, header = read_tokens(path, coder=coder)
            except TokenFileError as error:
                raise type(error)(f"{path}: {error}") from None
            yield Record(key, found_tokens, header)


def _with_header(name: str, record: Record, codec: Any) -> Record:
    from ..records import Record, RecordError

    try:
        header = codec.token_header(record.tokens)
    except ValueError as error:
        raise RecordError(f"{name}: {record.key}: {error}") from None
    return Record(record.key, record.tokens.reshape(header.channels, -1), header)


def _write_files(
    records: Iterator[Record], folder: Path, codec: Any, force: bool
) -> dict[str, Any]:
    """Token files, one for each record; existing ones are kept unless `force`."""
    from ..hub import bundled_coder
    from ..records import path_of_key
    from ..tokenfile import write_tokens
    from . import common

    facts: dict[str, Any] = {"output": str(folder), "records": 0, "tokens": 0, "kept": 0}
    seen: set[str] = set()
    for record in records:
        header = record.header
        assert header is not None  # as `_records` saw to
        if record.key in seen:
            raise common.UsageError(f"the key {record.key!r} twice")
        seen.add(record.key)
        target = folder / f"{path_of_key(record.key)}.tok"
        if target.exists() and not force:
            facts["kept"] += 1
            continue
        own = codec is not None and header.fingerprint in codec.model.identities
        target.parent.mkdir(parents=True, exist_ok=True)
        coder = codec.coder if own else bundled_coder(header)
        write_tokens(target, record.tokens, header, coder=coder)
        facts["records"] += 1
        facts["tokens"] += record.tokens.size
    return facts
