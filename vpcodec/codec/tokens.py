"""Token files to arrays, with the entropy tables of the model that made them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..hub import bundled_coder
from ..tokenfile import Coder, TokenHeader, TokenReader, opened
from .base import Source


def read_tokens(
    source: Source, *, recover: bool = False, coder: Coder | None = None
) -> tuple[NDArray[np.int64], TokenHeader]:
    """All tokens of a token file or binary stream.

    Args:
        source: path or stream.
        recover: return -1 for the tokens of damaged blocks instead of stopping.
        coder: `Codec.coder` of the model; None: that of the bundled model that made the file.

    Returns:
        int64 tokens (channels, frames), and the header including the number of samples.

    Raises:
        TokenFileError: damaged, or entropy coded by a model that is not bundled.
        OSError: a path that cannot be read.
    """
    with opened(source) as stream:
        reader = TokenReader(stream, recover=recover, coder=coder)
        if coder is None:
            reader.coder = bundled_coder(reader.header)
        return reader.read_all()
