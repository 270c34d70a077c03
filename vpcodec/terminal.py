"""What may be printed: text from files, folders and servers never commands a terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# Control characters, those that turn the direction of text or end a line, and halves of characters.
_COMMANDS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def escape(text: str, *, keep: str = "") -> str:
    r"""Text with what could command a terminal written out, as in `\x1b` and `\n`.

    Args:
        text: from anywhere.
        keep: characters that stay what they are.
    """

    def written(found: re.Match[str]) -> str:
        character = found[0]
        return character if character in keep else ascii(character)[1:-1]

    return _COMMANDS.sub(written, text)


class _Escaping:
    """A text stream that writes out what could command a terminal, and what it has no bytes for.

    All else is the stream's own; its `buffer` takes bytes as they are.
    """

    def __init__(self, stream: TextIO) -> None:
        self.unescaped = stream

    def write(self, text: str) -> int:
        encoding = self.unescaped.encoding or "utf-8"
        text = escape(text, keep="\n\t")
        self.unescaped.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


@contextmanager
def escaping() -> Iterator[None]:
    """A context in which all that is printed on stdout and stderr is escaped."""
    before = sys.stdout, sys.stderr
    try:
        for name, stream in zip(("stdout", "stderr"), before):
            if stream is not None:
                setattr(sys, name, _Escaping(stream))
        yield
    finally:
        sys.stdout, sys.stderr = before


def plain_stderr() -> TextIO:
    """stderr without escaping, for progress bars, which do command the terminal."""
    stream: TextIO = getattr(sys.stderr, "unescaped", sys.stderr)
    return stream
