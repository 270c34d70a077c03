"""Code audio piece by piece, as for a call: 20 ms in, tokens across, audio out.

python examples/stream.py IN.wav OUT.wav

A live program would read the pieces from a microphone and send the tokens over a network.
"""

from __future__ import annotations

import sys

import numpy as np

from vpcodec import Codec
from vpcodec.media.audio import load, resample, save

PIECE = 0.02  # s


def main(source: str, target: str) -> None:
    codec = Codec.from_pretrained("speech-3k", threads=1)
    samples, rate = load(source)
    samples = resample(samples, rate, codec.sample_rate)  # streams run at the rate of the model
    encoder = codec.encoder_stream(channels=len(samples))
    decoder = codec.decoder_stream(channels=len(samples))

    step = round(PIECE * codec.sample_rate)
    sent, heard = [], []
    for start in range(0, samples.shape[1], step):
        tokens = encoder.push(samples[:, start : start + step])  # may be empty: no frame complete
        sent.append(tokens)
        heard.append(decoder.push(tokens))
    tokens = encoder.flush()
    sent.append(tokens)
    heard += [decoder.push(tokens), decoder.flush()]

    decoded = np.concatenate(heard, 1)[:, : samples.shape[1]]
    save(target, decoded, codec.sample_rate)
    same = np.array_equal(np.concatenate(sent, 1), codec.encode(samples))
    print(f"{target}: latency {1000 * codec.latency:.0f} ms; tokens as at once: {same}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
