"""Encode every recording of a folder to an array of tokens.

python examples/encode_folder.py RECORDINGS TOKENS

Writes one .npy file per recording, int64 (channels, frames), in the same sub-folders. For files
that can be decoded to the original rate and length, use `vpcodec encode RECORDINGS TOKENS` instead.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from vpcodec import Codec
from vpcodec.media.audio import find_audio, load


def main(recordings: Path, target: Path) -> None:
    codec = Codec.from_pretrained("speech-3k")
    for name in find_audio(recordings):
        samples, rate = load(recordings / name)  # float32 (channels, samples), Hz
        tokens = codec.encode(samples, rate)
        path = target / name.with_suffix(".npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, tokens)
        print(f"{path}: {tokens.shape[0]} x {tokens.shape[1]} tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
