"""vpcodec: a neural codec with one quantizer, trained without a codebook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Codec", "__version__", "score"]

if TYPE_CHECKING:
    from .codec import Codec
    from .metrics.scoring import score


def __getattr__(name: str) -> Any:  # so that `import vpcodec` alone stays cheap
    if name == "Codec":
        from .codec import Codec

        return Codec
    if name == "score":
        from .metrics.scoring import score

        return score
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
