"""Call oneself over UDP on this machine: packets, a jitter buffer, and losses that are concealed.

python examples/call.py IN.wav OUT.wav [--loss 0.05] [--burst 1] [--redundancy 0] [--depth 3]

One thread speaks: every 18 ms it encodes a piece of the file and sends a packet, some of which are
dropped. Another listens: every 18 ms it takes what its jitter buffer has and plays it, here into a
file. A real program has a microphone and a loudspeaker in place of the files, whose clocks pace it.
"""

from __future__ import annotations

import argparse
import random
import socket
import threading
import time

import numpy as np

from vpcodec import Codec
from vpcodec.media.audio import load, save
from vpcodec.packets import PacketError, PacketReceiver, PacketSender

FRAMES = 3  # per packet: 18 ms of speech-3k


def pace(seconds: float):
    """Yield 0, 1, 2 ... at this interval, without drifting."""
    start, number = time.monotonic(), 0
    while True:
        yield number
        number += 1
        time.sleep(max(0.0, start + number * seconds - time.monotonic()))


def speak(codec, packets, samples, rate, address, lost):
    """Send the audio in real time, but for the packets that `lost()` says."""
    encoder = codec.encoder_stream(len(samples), sample_rate=rate)
    sender = PacketSender(packets)
    step = round(FRAMES / codec.frame_rate * rate)
    n_pieces = -(-samples.shape[1] // step)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        for piece in pace(step / rate):
            tokens = encoder.push(samples[:, piece * step : (piece + 1) * step])
            out = sender.push(tokens)
            if piece >= n_pieces:
                out += sender.push(encoder.flush()) + sender.flush()
            for packet in out:
                if not lost():
                    link.sendto(packet, address)
            if piece >= n_pieces:
                return


def listen(codec, packets, rate, link, depth, spoken):
    """Receive until the speaker has gone; the audio, and the numbers of packets heard and lost."""
    receiver = PacketReceiver(packets, depth=depth)
    decoder = codec.decoder_stream(packets.channels, sample_rate=rate)
    heard, n_heard, n_lost = [], 0, 0
    for _ in pace(FRAMES / codec.frame_rate):
        while True:
            try:
                receiver.push(link.recv(65_536))
            except BlockingIOError:
                break
            except PacketError:  # damaged, or somebody else's: as if it had not come
                continue
        tokens = receiver.pull()
        if tokens is None and not receiver.waiting and not spoken.is_alive():
            return np.concatenate([*heard, decoder.flush()], 1), n_heard, n_lost
        if tokens is None:
            n_lost += 1
            heard.append(decoder.push_lost(FRAMES))
        else:
            n_heard += bool(tokens.shape[1])
            heard.append(decoder.push(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--loss", type=float, default=0.05, help="share of packets")
    parser.add_argument("--burst", type=int, default=1, help="packets lost in a row")
    parser.add_argument("--redundancy", type=int, default=0, help="packets each one repeats")
    parser.add_argument("--depth", type=int, default=3, help="packets in the jitter buffer")
    parser.add_argument("--seed", type=int, default=0, help="of the losses")
    options = parser.parse_args()

    codec = Codec.from_pretrained("speech-3k", threads=1)
    samples, rate = load(options.source)
    packets = codec.packet_format(FRAMES, channels=len(samples), redundancy=options.redundancy)
    dice, left = random.Random(options.seed), 0

    def lost() -> bool:
        nonlocal left
        if not left and dice.random() < options.loss / options.burst:
            left = options.burst
        if not left:
            return False
        left -= 1
        return True

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        link.bind(("127.0.0.1", 0))
        link.setblocking(False)
        spoken = threading.Thread(
            target=speak, args=(codec, packets, samples, rate, link.getsockname(), lost)
        )
        spoken.start()
        audio, n_heard, n_lost = listen(codec, packets, rate, link, options.depth, spoken)
        spoken.join()
    save(options.target, audio, rate)
    bits = 8 * packets.n_bytes * codec.frame_rate / FRAMES
    print(f"{options.target}: {n_heard} packets heard, {n_lost} lost; {bits / 1000:.1f} kbit/s")


if __name__ == "__main__":
    main()
