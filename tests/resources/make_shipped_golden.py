"""Makes shipped_golden.json: the tokens of a second of speech and of an image, by the models that
ship, and the SHA-256 of their token files. For decoding, see make_golden.py.

python tests/resources/make_shipped_golden.py

The tokens of a model never change. The file does, if the model gets new tables.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np

from vpcodec import Codec
from vpcodec.tokenfile import AudioHeader, write_tokens

HERE = Path(__file__).resolve().parent
MODELS = ("speech-3k", "speech-6k", "speech-vp-16384", "speech-1k", "image-fsp")


def signal(codec: Codec) -> np.ndarray:
    """(1, T) of speech or (H, W, 3) pixels."""
    if codec.modality == "image":
        y, x, c = np.mgrid[:48, :72, :3]
        return (128 + 90 * np.sin((x + 2 * c) / 17) * np.cos(y / (11 + 3 * c))).astype(np.uint8)
    raw = np.frombuffer((HERE / "speech.wav").read_bytes()[60_000:104_100], "<i2") / np.float32(
        32768
    )
    return np.interp(np.arange(16_000) * 22_050 / 16_000, np.arange(22_050), raw)[None]


def found(codec: Codec) -> dict[str, object]:
    """The tokens, and the hash of their file."""
    tokens = codec.encode(signal(codec))
    return {
        "file": hashlib.sha256(token_file(codec, tokens)).hexdigest(),
        "tokens": tokens.tolist(),
    }


def token_file(codec: Codec, tokens: np.ndarray) -> bytes:
    """The token file of what `signal` gives."""
    if codec.modality == "image":
        header = codec.header(48, 72, 3)
    else:
        header = AudioHeader(
            model=codec.name,
            fingerprint=codec.space,
            sample_rate=codec.sample_rate,
            original_rate=codec.sample_rate,
            channels=1,
            n_samples=16_000,
            hop_length=codec.hop_length,
            codebook_size=codec.codebook_size,
        )
    file = io.BytesIO()
    write_tokens(file, tokens.reshape(1, -1), header, coder=codec.coder)
    return file.getvalue()


def main() -> None:
    golden = {name: found(Codec.from_pretrained(name, threads=1)) for name in MODELS}
    (HERE / "shipped_golden.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
