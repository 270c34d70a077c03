"""Token files to arrays, with the tables of the model that made them."""

from __future__ import annotations

import numpy as np

from ..hub import bundled_coder
from ..tokenfile import Coder, TokenHeader, TokenReader, opened
from .base import Source


def read_tokens(
    source: Source, *, recover: bool = False, coder: Coder | None = None
) -> tuple[np.ndarray, TokenHeader]:
    """All tokens of a token file or binary stream.

    Args:
        source: path or stream.
        recover: give -1 for the tokens of damaged blocks instead of stopping there.
        coder: of the model, `Codec.coder`; None: that of the bundled model that made the file.

    Returns:
        int64 tokens (channels, frames), and the header with the number of samples.

    Raises:
        TokenFileError: damaged, or entropy coded by a model that is not bundled.
        OSError: a path that cannot be read.
    """
    with opened(source) as stream:
        reader = TokenReader(stream, recover=recover, coder=coder)
        if coder is None:
            reader.coder = bundled_coder(reader.header)
        return reader.read_all()
