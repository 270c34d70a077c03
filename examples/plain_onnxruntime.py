"""Encode and decode with ONNX Runtime and NumPy alone; vpcodec need not be installed.

python examples/plain_onnxruntime.py MODEL_FOLDER IN.wav OUT.wav

MODEL_FOLDER is that of a native audio model, such as checkpoints/speech-3k. IN.wav must be mono, 16
bits, at the rate of the model (16 kHz). The graphs are steps: each input `past.X` takes the output
`next.X` of the step before, and zeros in the first step.
"""

from __future__ import annotations

import sys
import wave
from pathlib import Path

import numpy as np
import onnxruntime as ort


class Graph:
    """One direction of a model, with its state."""

    def __init__(self, path: Path) -> None:
        self.session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.facts = self.session.get_modelmeta().custom_metadata_map
        self.input, *states = self.session.get_inputs()
        self.state = {s.name: np.zeros((1, *s.shape[1:]), np.float32) for s in states}

    def step(self, x: np.ndarray) -> np.ndarray:
        """x (1, n) -> the output for it; the state moves on."""
        y, *following = self.session.run(None, {self.input.name: x, **self.state})
        names = [output.name for output in self.session.get_outputs()[1:]]
        self.state = {n.replace("next.", "past.", 1): s for n, s in zip(names, following)}
        return y


def main(folder: Path, source: str, target: str) -> None:
    encoder, decoder = Graph(folder / "encoder.onnx"), Graph(folder / "decoder.onnx")
    hop, rate = int(encoder.facts["hop_length"]), int(encoder.facts["sample_rate"])
    with wave.open(source) as file:
        if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, rate):
            sys.exit(f"{source}: not mono, 16 bits, {rate} Hz")
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    samples = pcm.astype(np.float32) / 32768
    padded = np.pad(samples, (0, -len(samples) % hop))[None]  # whole frames

    chunk = 100 * hop  # any number of whole frames gives the same tokens
    parts = [encoder.step(padded[:, i : i + chunk]) for i in range(0, padded.shape[1], chunk)]
    tokens = np.concatenate(parts, 1)  # int64 (1, frames)

    # The decoder is some frames late: repeat the last token to get the end, and drop the beginning.
    delay = int(decoder.facts["decoder_delay"])
    extended = np.concatenate([tokens, np.repeat(tokens[:, -1:], delay, 1)], 1)
    parts = [decoder.step(extended[:, i : i + 100]) for i in range(0, extended.shape[1], 100)]
    decoded = np.concatenate(parts, 1)[0, delay * hop :][: len(samples)]

    with wave.open(target, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.rint(decoded * 32767).clip(-32768, 32767).astype("<i2").tobytes())
    print(f"{target}: {tokens.shape[1]} tokens, {len(decoded)} samples")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
