"""Makes published/*.npz from speech.wav with the authors' packages and random weights.

One model per family, both with several features per token:

- samples: int16 (T,), what is coded, at the rate of the model.
- tokens: int64 (N,), N = ceil(T / hop).
- padded_tokens: int64; SQCodec's own, which go on to the end of a window.
- audio: float32 (N hop,), decoded from `tokens`.
- padded_audio: float32 (N hop,), decoded from `padded_tokens`, the beginning.

Needs l3ac 1.0, sq_codec 0.0.1, vector-quantize-pytorch 1.20 and vpcodec on the path.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "published"))

from official import Official, random_weights, save_modules

from vpcodec.media.audio import load, resample
from vpcodec.published import look_up

SPECS = ("zhai-lw/L3AC:1kbps", "zhai-lw/SQCodec:0k75bps")
SECONDS = 2.3

if __name__ == "__main__":
    torch.set_num_threads(1)
    for spec in SPECS:
        config = look_up(spec).config
        recorded, rate = load(HERE / "speech.wav")
        clip = resample(recorded[:1], rate, config.sample_rate)[0, : int(SECONDS * 16_000) + 1]
        samples = np.round(clip * 2**15).astype(np.int16)
        with tempfile.TemporaryDirectory() as folder:
            official = Official(look_up(spec), save_modules(random_weights(config), Path(folder)))
        padded = official.encode(samples.astype(np.float32) / 2**15)
        tokens = padded[: -(-len(samples) // config.hop_length)]
        audio = official.decode(tokens)
        arrays = {"samples": samples, "tokens": tokens, "audio": audio}
        if len(padded) > len(tokens):
            arrays["padded_tokens"] = padded
            arrays["padded_audio"] = official.decode(padded)[: len(audio)]
        (HERE / "published").mkdir(exist_ok=True)
        np.savez_compressed(HERE / "published" / f"{config.name}.npz", **arrays)
