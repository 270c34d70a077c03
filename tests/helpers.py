"""What several test files use: the command line in this process, streams, spoilt token files."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import pytest

from vpcodec import read_tokens
from vpcodec.cli import main
from vpcodec.hub import bundled_coder
from vpcodec.tokenfile import TokenReader, TokenWriter, write_tokens

MODULE = [sys.executable, "-m", "vpcodec"]
CACHES = {".mypy_cache", ".pytest_cache", ".ruff_cache", "__pycache__"}
ENOUGH = 120  # seconds after which a process hangs


@dataclass
class Result:
    code: int
    out: bytes
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


def run(
    *args: object,
    stdin: bytes | TextIO = b"",
    stdout: TextIO | None = None,
    check: int | None = 0,
) -> Result:
    """A command in this process; `check` is the exit code that it must have, None any."""
    out, err, code = io.BytesIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vpcodec", *map(str, args)])
        if isinstance(stdin, bytes):
            stdin = io.TextIOWrapper(io.BytesIO(stdin))
        patch.setattr(sys, "stdin", stdin)
        patch.setattr(sys, "stdout", stdout or io.TextIOWrapper(out, write_through=True))
        patch.setattr(sys, "stderr", err)
        try:
            main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        result = Result(code, out.getvalue(), err.getvalue())
    assert check is None or code == check, result.err
    assert "Traceback" not in result.err
    return result


def refuse(*args: object, **streams: Any) -> str:
    """The line with which a command refuses, exit code 2; it must leave no file and no output."""
    before = tree()
    result = run(*args, **streams, check=2)
    assert result.out == b""
    assert tree() == before
    (line,) = result.err.splitlines()
    assert line.startswith("vpcodec: ")
    return line


def tree(folder: str = ".") -> set[str]:
    """Everything below a folder, hidden files too, but for what tools cache meanwhile."""
    found = (path.relative_to(folder) for path in Path(folder).rglob("*"))
    return {str(path) for path in found if not CACHES & set(path.parts)}


class Pipe:
    """A binary stream that can only be read, `limit` bytes at a time."""

    def __init__(self, data: bytes, limit: int = 5_000) -> None:
        self._file, self._limit = io.BytesIO(data), limit

    def read(self, n: int = -1) -> bytes:
        return self._file.read(self._limit if n < 0 else min(n, self._limit))

    def seekable(self) -> bool:
        return False


def blocks(path: Path) -> list[tuple[int, int]]:
    """First and last byte + 1 of every block of a token file."""
    with open(path, "rb") as file:
        reader = TokenReader(file)
        reader.coder = bundled_coder(reader.header)
        ends = [reader.total_bytes]
        for _ in reader:
            ends.append(reader.total_bytes)
    return list(zip(ends[:-1], ends[1:]))


def flipped(data: bytes, position: int) -> bytes:
    """The same with one bit changed."""
    return data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]


def changed_tok(data: bytes, **fields: object) -> bytes:
    """A sound token file like `data` with another header."""
    tokens, header = read_tokens(io.BytesIO(data))
    header = replace(header, **fields)
    out = io.BytesIO()
    write_tokens(out, tokens % header.codebook_size, header)
    return out.getvalue()


def header_only(data: bytes, **fields: object) -> bytes:
    """A header with a right checksum, and nothing behind it."""
    out = io.BytesIO()
    TokenWriter(out, replace(read_tokens(io.BytesIO(data))[1], **fields))
    return out.getvalue()
