"""vpcodec: a neural codec for speech and images, with one quantizer.

from vpcodec import Codec

codec = Codec.from_pretrained("speech-3k")
tokens = codec.encode(samples, sample_rate)
samples = codec.decode(tokens)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Read by dependencies when they load; what the user has set stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # huggingface_hub, hf_xet, transformers
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray

__version__ = "0.1.0"
__all__ = [
    "AudioCodec",
    "Codec",
    "ImageCodec",
    "__version__",
    "read_tokens",
    "score",
    "write_tokens",
]

if TYPE_CHECKING:
    from .codec import AudioCodec, Codec, ImageCodec, read_tokens
    from .scoring.run import score
    from .tokenfile import write_tokens


_PLACES = {  # public name: its module
    "AudioCodec": "codec",
    "Codec": "codec",
    "ImageCodec": "codec",
    "read_tokens": "codec",
    "score": "scoring.run",
    "write_tokens": "tokenfile",
}


def __getattr__(name: str) -> Any:  # so that `import vpcodec` alone stays cheap
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
