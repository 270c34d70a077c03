"""Files of arrays as inputs of `vpcodec decode`: an item for each record."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..records import BARE_SUFFIX, SUFFIXES, RecordFile, path_of_key
from ..tokenfile import write_tokens
from .common import Item, check_items, is_folder
from .errors import UsageError

INPUTS = (*SUFFIXES, BARE_SUFFIX)


def is_array(name: str) -> bool:
    """Whether a name is that of a file of arrays."""
    return Path(name).suffix.lower() in INPUTS


class ArrayItems:
    """The records of files as items with outputs, read when they are asked for.

    Args:
        inputs: files of arrays; the last may be the output.
        output: a file, a folder, "-", or None: beside the file, or in a folder named after it.
        suffix: of outputs whose names are derived.
        output_suffixes: of files that can be outputs.
        force: replace existing outputs with derived names.
        stack: closes the files.

    Attributes:
        items, kept: to process, and those whose outputs exist.

    Raises:
        UsageError: other inputs, two records for one output, or a key that is no relative path.
        RecordError: a file that is damaged.
    """

    def __init__(
        self,
        inputs: list[str],
        output: str | None,
        *,
        suffix: str,
        output_suffixes: Collection[str],
        force: bool,
        stack: ExitStack,
    ) -> None:
        if output is None and len(inputs) > 1 and not is_array(inputs[-1]):
            *inputs, output = inputs
        if others := [name for name in inputs if not is_array(name)]:
            raise UsageError(f"{others[0]}: not an array, and arrays are decoded by themselves")
        files = [(name, stack.enter_context(RecordFile(name))) for name in inputs]
        self._lock = threading.Lock()
        self._places: dict[str, tuple[RecordFile, int]] = {}
        single = sum(len(file.keys) for _, file in files) == 1
        to_file = output is not None and (output == "-" or not is_folder(output)) and single
        if to_file and output != "-" and Path(str(output)).suffix.lower() not in output_suffixes:
            known = " ".join(sorted(output_suffixes))
            raise UsageError(f"{output}: the suffix of the output must be one of {known}")
        if output == "-" and not single:
            raise UsageError("several files cannot go to one pipe")
        items = []
        for name, file in files:
            alone = len(file.keys) == 1
            for number, key in enumerate(file.keys):
                source = name if alone else f"{name}: {key}"
                if to_file:
                    target = str(output)
                elif output is None and alone:
                    target = str(Path(name).with_suffix(suffix))
                else:
                    folder = Path(name).with_suffix("") if output is None else Path(output)
                    target = f"{folder / path_of_key(key)}{suffix}"
                self._places[source] = file, number
                items.append(Item(source, target))
        if not items:
            raise UsageError(f"{inputs[0]}: there is nothing in it")
        check_items(items)
        self.kept = [x for x in items if not to_file and not force and os.path.exists(x.target)]
        self.items = [item for item in items if item not in self.kept]

    def open(self, item: Item, codec_of: Callable[[Any], Any]) -> tuple[io.BytesIO, Any]:
        """The record of an item as a token file, and its codec.

        Args:
            item: of `items`.
            codec_of: header of the record, or None -> codec.
        """
        file, number = self._places[item.source]
        with self._lock:
            record = file.read(number)
        codec = codec_of(record.header)
        header = record.header or codec.token_header(record.tokens)
        stream = io.BytesIO()
        write_tokens(stream, record.tokens.reshape(header.channels, -1), header)
        stream.seek(0)
        return stream, codec
